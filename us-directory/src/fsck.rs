//! `usctl fsck`: the directory's records against each other ([`maps`]), and against what every
//! provider that can be reached says it holds, both ways. Beside running work, in bounded memory.
//!
//! ```text
//! snapshot 1, the floor of births
//!    -> records against each other
//!    -> each provider's inventory, beside what it should hold by snapshot 1:
//!         not there: still said to be there in a snapshot taken afterwards?      -> missing
//!         not named: old enough, not dying in either snapshot? the engine judges -> orphan, stray
//! ```
//! Invariants:
//! - what is written, moved or deleted meanwhile is never a finding: what is missing was durable
//!   there before the inventory and is after it; what is an orphan is one by the engine's word, which
//!   looks at the state as it is then;
//! - nothing is changed here: with `repair` the engine is asked to, and looks again before it does.
//!
//! Runs outside the engine's thread; ends when the caller is gone.

pub(crate) mod maps;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tonic::Status;
use us_core::ids::{BlockId, FragmentId, VolumeId};
use us_core::tls::{ExpectedPeer, Identity, KeyHash, Role};
use us_core::wire::connect_grpc;
use us_proto::v1::fragments_client::FragmentsClient;
use us_proto::v1::fsck_reply::Event as Reply;
use us_proto::v1::{
    FsckFate, FsckFinding, FsckKind, FsckProgress, FsckReply, FsckSummary, FsckTally,
    InventoryItem, InventoryPage, InventoryRequest, ProviderEntry,
};

use crate::engine::garbage::{FsckBasis, Stray, Verdict};
use crate::engine::{Answer, Question, StateSnapshot};
use crate::holdings::{Held, Holdings};
use crate::keys;
use crate::records::{BlockRecord, GraveRecord, HoldingRecord, bit, decode};
use crate::shell::Directory;
use crate::store::{KeyRange, StoreError};
use maps::Maps;

/// Findings or fragments handed to the engine together.
const TOGETHER: usize = 4096;
/// Unnamed fragments that are looked at together: for each such heap the graves are read once.
const STRAYS_MAX: usize = 65_536;
/// Graves read together.
const GRAVES_PAGE: usize = 4096;
/// A provider must answer a call within this time, and send its next page.
const PROVIDER_TIMEOUT: Duration = Duration::from_secs(20);
/// Fragments between two words about progress.
const PROGRESS_EVERY: u64 = 16_384;
/// The most findings of a kind that are told one by one.
const FINDINGS_MAX: u32 = 100_000;
/// The largest page of an inventory.
const PAGE_BYTES_MAX: usize = 8 << 20;

/// Something that is not as it should be.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Found {
    /// What kind of.
    pub kind: FsckKind,
    /// The volume.
    pub volume: Option<VolumeId>,
    /// The block.
    pub block: Option<BlockId>,
    /// The inode.
    pub ino: u64,
    /// The provider.
    pub provider: u32,
    /// The fragment.
    pub index: u8,
    /// For people.
    pub detail: String,
}

/// Why a check ends before its end.
#[derive(Debug, thiserror::Error)]
enum FsckError {
    #[error(transparent)]
    Gone(#[from] crate::shell::Gone),
    #[error("the state cannot be read: {0}")]
    Store(#[from] StoreError),
    #[error("an answer to another question")]
    Answer,
    #[error("the caller is gone")]
    Caller,
}

/// Why a provider could not be asked to the end.
#[derive(Debug, thiserror::Error)]
enum AskError {
    #[error("{0}")]
    Provider(String),
    #[error(transparent)]
    Fsck(#[from] FsckError),
}

impl From<StoreError> for AskError {
    fn from(error: StoreError) -> Self {
        Self::Fsck(error.into())
    }
}

/// One check.
pub struct Fsck {
    /// The running directory.
    pub directory: Directory,
    /// Its identity, shown to providers.
    pub identity: Identity,
    /// What is wrong is mended, as far as it can be.
    pub repair: bool,
    /// Findings of a kind told one by one.
    pub findings_max: u32,
    /// Who hears.
    pub replies: mpsc::Sender<Result<FsckReply, Status>>,
}

/// A check under way.
struct Run {
    fsck: Fsck,
    runtime: Handle,
    summary: FsckSummary,
    tallies: BTreeMap<FsckKind, FsckTally>,
}

impl Fsck {
    /// Checks everything. Blocks; call it where blocking is allowed, within a runtime.
    pub fn run(self) {
        let replies = self.replies.clone();
        let mut run = Run {
            fsck: self,
            runtime: Handle::current(),
            summary: FsckSummary::default(),
            tallies: BTreeMap::new(),
        };
        let last = match run.check() {
            Ok(()) => {
                let tallies = std::mem::take(&mut run.tallies).into_values().collect();
                let summary = FsckSummary { tallies, ..run.summary };
                Ok(FsckReply { event: Some(Reply::Summary(summary)) })
            }
            Err(FsckError::Caller) => return,
            Err(error @ FsckError::Gone(_)) => Err(Status::unavailable(error.to_string())),
            Err(error) => Err(Status::internal(error.to_string())),
        };
        // A caller that is gone needs no end.
        let _gone = replies.blocking_send(last);
    }
}

impl Run {
    fn ask(&self, question: Question) -> Result<Answer, FsckError> {
        Ok(self.runtime.block_on(self.fsck.directory.ask(question))?)
    }

    fn say(&self, event: Reply) -> Result<(), FsckError> {
        let reply = FsckReply { event: Some(event) };
        self.fsck.replies.blocking_send(Ok(reply)).map_err(|_gone| FsckError::Caller)
    }

    fn progress(&self, phase: &str, subject: &str, done: u64) -> Result<(), FsckError> {
        let (phase, subject) = (phase.to_owned(), subject.to_owned());
        self.say(Reply::Progress(FsckProgress { phase, subject, done }))
    }

    /// Counts a finding and tells of it, unless there were many of its kind.
    fn tell(&mut self, found: &Found, fate: FsckFate) -> Result<(), FsckError> {
        let none = FsckTally { kind: found.kind.into(), ..Default::default() };
        let tally = self.tallies.entry(found.kind).or_insert(none);
        let told = tally.left + tally.mended + tally.fed;
        match fate {
            FsckFate::Mended => tally.mended += 1,
            FsckFate::Fed => tally.fed += 1,
            FsckFate::Left | FsckFate::Unspecified => tally.left += 1,
        }
        if told >= u64::from(self.fsck.findings_max.min(FINDINGS_MAX)) {
            return Ok(());
        }
        let id = |bytes: Option<&[u8; 16]>| {
            bytes.map_or_else(Bytes::new, |bytes| Bytes::copy_from_slice(bytes))
        };
        self.say(Reply::Finding(FsckFinding {
            kind: found.kind.into(),
            fate: fate.into(),
            volume: id(found.volume.as_ref().map(VolumeId::as_bytes)),
            block: id(found.block.as_ref().map(BlockId::as_bytes)),
            ino: found.ino,
            provider: found.provider,
            index: u32::from(found.index),
            detail: found.detail.clone(),
        }))
    }

    fn check(&mut self) -> Result<(), FsckError> {
        let Answer::FsckBasis(basis) = self.ask(Question::FsckBasis)? else {
            return Err(FsckError::Answer);
        };
        if basis.lost > 0 {
            let detail = format!("{} blocks have fewer fragments than it takes", basis.lost);
            let found = Found { kind: FsckKind::LostBlock, detail, ..Found::default() };
            self.tell(&found, FsckFate::Left)?;
        }
        for (volume, name) in basis.snapshot.volumes.clone() {
            self.maps(&basis.snapshot, volume, &name)?;
        }
        for entry in &basis.providers.providers {
            self.provider(&basis, entry)?;
        }
        Ok(())
    }

    // ------------------------------------------------------------ the directory's own records

    fn maps(
        &mut self,
        snapshot: &StateSnapshot,
        volume: VolumeId,
        name: &str,
    ) -> Result<(), FsckError> {
        let mut seen = std::mem::take(&mut self.summary);
        let view = Arc::clone(&snapshot.view);
        let has_files = !name.starts_with('.');
        let mut wrong: Vec<Found> = Vec::new();
        let mut end = Ok(());
        {
            let this = std::cell::RefCell::new(&mut *self);
            let mut sink = |found: Found| {
                wrong.push(found);
                if wrong.len() < TOGETHER {
                    return true;
                }
                end = this.borrow_mut().wrong_records(volume, &std::mem::take(&mut wrong));
                end.is_ok()
            };
            let mut progress = |done: u64| this.borrow().progress("maps", name, done).is_ok();
            let mut maps = Maps { view: &*view, volume, has_files, seen: &mut seen };
            maps.check(&mut sink, &mut progress)?;
        }
        self.summary = seen;
        end?;
        self.wrong_records(volume, &wrong)?;
        self.progress("maps", name, self.summary.chunks + self.summary.blocks)
    }

    /// Has holdings written right and forgotten blocks ended; the rest nobody can mend here.
    fn wrong_records(&mut self, volume: VolumeId, wrong: &[Found]) -> Result<(), FsckError> {
        let can_be_mended = |found: &&Found| {
            matches!(found.kind, FsckKind::WrongHolding | FsckKind::UnreferencedBlock)
        };
        let (mendable, others): (Vec<&Found>, Vec<&Found>) = wrong.iter().partition(can_be_mended);
        for found in others {
            self.tell(found, FsckFate::Left)?;
        }
        for found in &mendable {
            let fate = if self.fsck.repair { FsckFate::Mended } else { FsckFate::Left };
            self.tell(found, fate)?;
        }
        if self.fsck.repair && !mendable.is_empty() {
            let blocks = mendable.iter().filter_map(|found| Some((found.block?, found.provider)));
            self.ask(Question::Mend { volume, blocks: blocks.collect() })?;
        }
        Ok(())
    }

    // ------------------------------------------------------------ one provider

    fn provider(&mut self, basis: &FsckBasis, entry: &ProviderEntry) -> Result<(), FsckError> {
        let provider = entry.provider;
        let asked = if entry.reachable {
            self.inventory(basis, entry)
        } else {
            Err(AskError::Provider("it is not here, or not believed".to_owned()))
        };
        match asked {
            Ok(()) => {
                self.summary.providers += 1;
                Ok(())
            }
            Err(AskError::Fsck(error)) => Err(error),
            Err(AskError::Provider(detail)) => {
                let kind = FsckKind::ProviderNotAsked;
                self.tell(&Found { kind, provider, detail, ..Found::default() }, FsckFate::Left)
            }
        }
    }

    /// Lays what the provider says it holds beside what it should hold.
    fn inventory(&mut self, basis: &FsckBasis, entry: &ProviderEntry) -> Result<(), AskError> {
        let volumes = basis.snapshot.volumes.iter().map(|(id, _)| *id);
        let view = Arc::clone(&basis.snapshot.view);
        let mut sides = Sides {
            basis,
            provider: entry.provider,
            name: entry.address.clone(),
            due: Expected::new(Holdings::new(view, volumes, entry.provider)?)?,
            missing: Vec::new(),
            strays: Vec::new(),
        };
        let mut pages = self.dial(entry)?;
        let mut seen = 0u64;
        while let Some(page) = self.page(&mut pages)? {
            for item in &page.items {
                self.item(&mut sides, item)?;
            }
            seen += page.items.len() as u64;
            if seen / PROGRESS_EVERY != (seen - page.items.len() as u64) / PROGRESS_EVERY {
                self.progress("providers", &sides.name, seen)?;
            }
        }
        while let Some(id) = sides.due.head {
            self.not_there(&mut sides, id, false)?;
            sides.due.advance()?;
        }
        self.missing(&mut sides)?;
        self.strays(&mut sides)?;
        Ok(self.progress("providers", &sides.name, seen)?)
    }

    fn dial(&self, entry: &ProviderEntry) -> Result<tonic::Streaming<InventoryPage>, AskError> {
        let bytes: Option<[u8; 32]> = entry.key_hash.as_ref().try_into().ok();
        let Some(key) = bytes.map(KeyHash::from_bytes) else {
            return Err(AskError::Provider("its key is not known".to_owned()));
        };
        let dial = async {
            let expected = ExpectedPeer::key(Role::Provider, key);
            let channel = connect_grpc(&entry.address, &self.fsck.identity, expected).await;
            let channel = channel.map_err(|error| error.to_string())?;
            let mut client =
                FragmentsClient::new(channel).max_decoding_message_size(PAGE_BYTES_MAX);
            let pages = client.inventory(InventoryRequest::default()).await;
            Ok(pages.map_err(|status| status.message().to_owned())?.into_inner())
        };
        self.within(dial)
    }

    fn page(
        &self,
        pages: &mut tonic::Streaming<InventoryPage>,
    ) -> Result<Option<InventoryPage>, AskError> {
        self.within(async { pages.message().await.map_err(|status| status.message().to_owned()) })
    }

    fn within<T>(&self, call: impl Future<Output = Result<T, String>>) -> Result<T, AskError> {
        let limited = async { tokio::time::timeout(PROVIDER_TIMEOUT, call).await };
        match self.runtime.block_on(limited) {
            Ok(answered) => answered.map_err(AskError::Provider),
            Err(_elapsed) => Err(AskError::Provider("it does not answer in time".to_owned())),
        }
    }

    /// One line of the inventory.
    fn item(&mut self, sides: &mut Sides<'_>, item: &InventoryItem) -> Result<(), AskError> {
        let fragment = item.fragment.clone().unwrap_or_default();
        let (Some(block), Ok(index), Some(volume)) = (
            BlockId::from_slice(&fragment.block),
            u8::try_from(fragment.index),
            VolumeId::from_slice(&item.volume),
        ) else {
            return Err(AskError::Provider("its inventory makes no sense".to_owned()));
        };
        let id = FragmentId { block, index };
        while let Some(due) = sides.due.head.filter(|due| due.key() < (block, index)) {
            self.not_there(sides, due, false)?;
            sides.due.advance()?;
        }
        let due = sides.due.head.filter(|due| due.key() == (block, index));
        if item.trashed {
            self.summary.trashed += 1;
            if let Some(due) = due {
                self.not_there(sides, due, true)?;
                sides.due.advance()?;
            }
            return Ok(());
        }
        self.summary.fragments += 1;
        if due.is_some() {
            sides.due.advance()?;
            return Ok(());
        }
        sides.strays.push(Stray { volume, block: id.block, index, birth: item.birth });
        if sides.strays.len() >= STRAYS_MAX {
            self.strays(sides)?;
        }
        Ok(())
    }

    /// The provider does not have a fragment: is it said to be durable there?
    fn not_there(
        &mut self,
        sides: &mut Sides<'_>,
        due: Due,
        in_trash: bool,
    ) -> Result<(), AskError> {
        if is_said_to_be(&sides.basis.snapshot, &due, sides.provider)? {
            sides.missing.push((due, in_trash));
        }
        if sides.missing.len() >= TOGETHER {
            self.missing(sides)?;
        }
        Ok(())
    }

    /// What was durable there before the inventory and is, by the record, still now.
    fn missing(&mut self, sides: &mut Sides<'_>) -> Result<(), FsckError> {
        let missing = std::mem::take(&mut sides.missing);
        if missing.is_empty() {
            return Ok(());
        }
        let now = self.snapshot()?;
        let mut pieces = Vec::new();
        for (due, in_trash) in missing {
            if !is_said_to_be(&now, &due, sides.provider)? {
                continue;
            }
            pieces.push((due.volume, due.block, due.index));
            let detail = if in_trash { "it lies in its trash" } else { "it does not have it" };
            let found = Found {
                kind: FsckKind::MissingFragment,
                volume: Some(due.volume),
                block: Some(due.block),
                provider: sides.provider,
                index: due.index,
                detail: detail.to_owned(),
                ..Found::default()
            };
            self.tell(&found, if self.fsck.repair { FsckFate::Fed } else { FsckFate::Left })?;
        }
        if self.fsck.repair && !pieces.is_empty() {
            self.ask(Question::Doubt { provider: sides.provider, pieces })?;
        }
        Ok(())
    }

    fn snapshot(&self) -> Result<StateSnapshot, FsckError> {
        match self.ask(Question::Snapshot)? {
            Answer::Snapshot(snapshot) => Ok(snapshot),
            _ => Err(FsckError::Answer),
        }
    }

    /// What nothing named when the check began.
    fn strays(&mut self, sides: &mut Sides<'_>) -> Result<(), FsckError> {
        let mut strays = std::mem::take(&mut sides.strays);
        let floor = sides.basis.floor;
        let before = strays.len();
        strays.retain(|stray| stray.birth < floor);
        self.summary.young += (before - strays.len()) as u64;
        if strays.is_empty() {
            return Ok(());
        }
        let now = self.snapshot()?;
        for state in [&sides.basis.snapshot, &now] {
            let before = strays.len();
            let dying = dying(state, sides.provider, &strays)?;
            strays.retain(|stray| !dying.contains(&(stray.block, stray.index)));
            self.summary.dying += (before - strays.len()) as u64;
        }
        for together in strays.chunks(TOGETHER) {
            let mend = self.fsck.repair;
            let (provider, strays) = (sides.provider, together.to_vec());
            let answer = self.ask(Question::Judge { provider, strays, mend })?;
            let Answer::Verdicts(verdicts) = answer else { return Err(FsckError::Answer) };
            for (stray, verdict) in together.iter().zip(verdicts) {
                self.judged(sides.provider, stray, verdict)?;
            }
        }
        Ok(())
    }

    fn judged(&mut self, provider: u32, stray: &Stray, verdict: Verdict) -> Result<(), FsckError> {
        let (kind, detail) = match verdict {
            Verdict::Named => return Ok(()),
            Verdict::Young => {
                self.summary.young += 1;
                return Ok(());
            }
            Verdict::Dying => {
                self.summary.dying += 1;
                return Ok(());
            }
            Verdict::Spared => {
                self.summary.spared += 1;
                return Ok(());
            }
            Verdict::Busy => {
                self.summary.busy += 1;
                return Ok(());
            }
            Verdict::Orphan => (FsckKind::OrphanFragment, "nothing names it"),
            Verdict::Wanted => (FsckKind::StrayFragment, "its block lacks it where it should lie"),
        };
        let found = Found {
            kind,
            volume: Some(stray.volume),
            block: Some(stray.block),
            provider,
            index: stray.index,
            detail: detail.to_owned(),
            ..Found::default()
        };
        self.tell(&found, if self.fsck.repair { FsckFate::Mended } else { FsckFate::Left })
    }
}

/// A fragment a provider should hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Due {
    volume: VolumeId,
    block: BlockId,
    index: u8,
}

impl Due {
    fn key(&self) -> (BlockId, u8) {
        (self.block, self.index)
    }
}

/// The fragments a provider should hold, in the order of its index.
struct Expected {
    holdings: Holdings,
    block: Option<Held>,
    head: Option<Due>,
}

impl Expected {
    fn new(holdings: Holdings) -> Result<Self, StoreError> {
        let mut expected = Self { holdings, block: None, head: None };
        expected.advance()?;
        Ok(expected)
    }

    fn advance(&mut self) -> Result<(), StoreError> {
        let mut from = self.head.map_or(0, |due| usize::from(due.index) + 1);
        loop {
            if let Some(held) = &self.block {
                let next = (from..8 * held.fragments.len()).find(|at| bit(&held.fragments, *at));
                if let Some(index) = next.and_then(|index| u8::try_from(index).ok()) {
                    let (volume, block) = (held.volume, held.block);
                    self.head = Some(Due { volume, block, index });
                    return Ok(());
                }
            }
            from = 0;
            self.block = self.holdings.next_block()?;
            if self.block.is_none() {
                self.head = None;
                return Ok(());
            }
        }
    }
}

/// What is being laid side by side.
struct Sides<'a> {
    basis: &'a FsckBasis,
    provider: u32,
    name: String,
    due: Expected,
    /// Not there, and whether it lies in the trash.
    missing: Vec<(Due, bool)>,
    strays: Vec<Stray>,
}

/// Whether a record says a fragment is durable at the provider, and nobody has said otherwise.
fn is_said_to_be(state: &StateSnapshot, due: &Due, provider: u32) -> Result<bool, StoreError> {
    let key = keys::block(&due.volume, &due.block);
    let Some(value) = state.view.get(&key)? else { return Ok(false) };
    let record: BlockRecord = decode(&key, &value)?;
    let index = usize::from(due.index);
    Ok(record.providers.get(index) == Some(&provider)
        && bit(&record.durable, index)
        && !bit(&record.damaged, index)
        && !bit(&record.missing, index))
}

/// Of these fragments those that wait to be deleted at the provider: told already, or in a grave.
fn dying(
    state: &StateSnapshot,
    provider: u32,
    strays: &[Stray],
) -> Result<HashSet<(BlockId, u8)>, StoreError> {
    let mut dying = HashSet::new();
    let mut blocks: HashMap<BlockId, Vec<u8>> = HashMap::new();
    for stray in strays {
        let key = keys::delete(provider, &stray.block);
        let told = state.view.get(&key)?.map(|value| decode::<HoldingRecord>(&key, &value));
        if told.transpose()?.is_some_and(|told| bit(&told.fragments, stray.index.into())) {
            dying.insert((stray.block, stray.index));
        } else {
            blocks.entry(stray.block).or_default().push(stray.index);
        }
    }
    let mut range = KeyRange::prefix(&keys::tag(&keys::CLUSTER, b'g'));
    while !blocks.is_empty() {
        let graves = state.view.scan(&range, GRAVES_PAGE)?;
        for (key, value) in &graves {
            let Some(block) = keys::last_block(key) else { continue };
            let Some(indexes) = blocks.get(&block) else { continue };
            let grave: GraveRecord = decode(key, value)?;
            let lies = |index: &&u8| grave.providers.get(usize::from(**index)) == Some(&provider);
            dying.extend(indexes.iter().filter(lies).map(|index| (block, *index)));
        }
        match graves.last() {
            Some((last, _)) if graves.len() == GRAVES_PAGE => range = range.after(last),
            _ => break,
        }
    }
    Ok(dying)
}
