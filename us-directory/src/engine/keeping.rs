//! Keeping the state elsewhere: feeding the journal's copies, the root, and the image in the swarm.
//!
//! [`copies::Copies`](super::copies) decides who holds copies; this module sends them records, sealed,
//! and takes their word into what is durable. The image's blocks are those of a hidden volume: the
//! engine leases places for them, commits them with a reference for each run, and drops the blocks
//! of superseded runs once the newest root is stored where it matters.

use us_core::geometry::Code;
use us_core::ids::{BlockId, VolumeId};
use us_core::seal::Secret;
use us_proto::v1::provider_down::Event as Down;
use us_proto::v1::{
    BlockCommit, PlacementsLeased, ProviderTable, RecordsHeld, RecordsStored, StoreRecords,
    StoreRoot,
};

use super::copies::{Copies, CopiesConfig, OnlineProvider};
use super::event::{Answer, AskId, Effect, RefusalKind};
use super::{Durability, Engine, Then, Volume};
use crate::keys;
use crate::namespace::{ApplyError, Authority};
use crate::records::{BlockRecord, VolumeRecord, decode, encode};
use crate::recovery::{
    IMAGE_VOLUME_NAME, ImageBlock, ImageRun, Manifest, ManifestProvider, RootRecord, RunLabel,
    RunSeal, image_volume, seal_root,
};
use crate::store::{Seq, StoreError, View, WriteBatch};

/// Bytes of records read and sent together.
const MESSAGE_BYTES: usize = 512 << 10;
/// Bytes of records on their way to one holder.
const WINDOW_BYTES: usize = 4 << 20;
/// Providers that must be reachable before an image is tried.
const IMAGE_PROVIDERS_MIN: usize = 3;
/// Providers beside the holders that must have a new root before old blocks go, where there are any.
const ROOTS_STORED_MIN: usize = 2;
/// Memory the keys of one delta may come from.
const DELTA_RECORDS_BYTES_MAX: usize = 512 << 20;

/// What the engine keeps about keeping.
#[derive(Debug)]
pub(super) struct Keeping {
    secret: Secret,
    seal: RunSeal,
    pub copies: Copies,
    pub volume: VolumeId,
    root: RootRecord,
    /// The newest root as it is sent; none while there is no image and records are missing.
    sent: Option<StoreRoot>,
    /// What the root says has changed.
    root_changed: bool,
    /// Who is online has changed.
    pub members_changed: bool,
    /// Records that were not readable when a holder wanted them: only an image helps.
    records_missing: bool,
}

/// What the image's job is to write.
#[derive(Clone)]
pub struct ImagePlan {
    /// The number of the run.
    pub number: u64,
    /// The last commit in it.
    pub last_seq: Seq,
    /// What to write.
    pub content: ImageContent,
    /// Where providers are.
    pub providers: ProviderTable,
}

/// What a run of an image holds.
#[derive(Clone)]
pub enum ImageContent {
    /// The whole state.
    Base(std::sync::Arc<dyn View>),
    /// What the records from this one on changed.
    Delta {
        /// The first.
        first_seq: Seq,
    },
}

impl std::fmt::Debug for ImagePlan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let first = match &self.content {
            ImageContent::Base(_) => 0,
            ImageContent::Delta { first_seq } => *first_seq,
        };
        write!(f, "ImagePlan {{ number: {}, {first}..={} }}", self.number, self.last_seq)
    }
}

/// The engine itself commits: it knows what it gave out.
struct EngineAuthority<'e>(&'e Engine);

impl Authority for EngineAuthority<'_> {
    fn session(&self) -> u64 {
        0
    }
    fn exclusive(&self, _ino: u64) -> bool {
        false
    }
    fn may_create(&self, _ino: u64) -> bool {
        false
    }
    fn open_elsewhere(&self, _ino: u64) -> Vec<u64> {
        Vec::new()
    }
    fn provider_exists(&self, provider: u32) -> bool {
        // One that has left may still be named by a place leased before: its fragment is made again.
        provider > 0 && provider < self.0.cluster.next_provider
    }
    fn birth_given(&self, birth: u64) -> bool {
        birth > 0 && birth < self.0.cluster.births_end
    }
    fn next_grant(&self) -> u64 {
        1
    }
}

/// A provider whose root is further ahead than this is not believed: numbers would run out.
const ROOT_AHEAD_MAX: u64 = 1 << 32;

impl Engine {
    /// Begins to keep copies and images, sealed with `secret`. Called once, after the start.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn keep(&mut self, secret: Secret) -> Result<(), StoreError> {
        let cluster: [u8; 16] = self.cluster.cluster[..].try_into().unwrap_or_default();
        let volume = image_volume(&cluster);
        let mut batch = WriteBatch::new();
        let (s, r) = self.config.image_code;
        let known = self.volumes.get(&volume).map(|known| known.record.clone());
        let record = VolumeRecord {
            name: IMAGE_VOLUME_NAME.to_owned(),
            s,
            r,
            next_ino: 2,
            ..known.clone().unwrap_or_default()
        };
        let code = Code::new(s as usize, r as usize).map_err(|error| StoreError::Value {
            key: "image_code".to_owned(),
            detail: error.to_string(),
        })?;
        if known.as_ref() != Some(&record) {
            batch.put(keys::volume(&volume), encode(&record));
        }
        self.volumes.insert(volume, Volume { record, code });
        let key = keys::root();
        let stored = self.store.get(&key)?.map(|value| decode(&key, &value)).transpose()?;
        let root: RootRecord = stored.unwrap_or_else(|| {
            let void = self.store.first_record() > 1;
            RootRecord { sequence: 1, next_run: 1, void, ..RootRecord::default() }
        });
        batch.put(key, encode(&root));
        self.commit(batch, Durability::Durable)?;
        let mut salt = [0; 16];
        self.entropy.fill(&mut salt);
        let (incarnation, run) = (self.cluster.incarnation, self.cluster.run);
        let label = RunLabel { incarnation, run, first_seq: self.run_first_seq, salt };
        let config = CopiesConfig {
            copies: self.config.copies,
            ack_ms: self.config.copy_ack_ms,
            window_bytes: WINDOW_BYTES,
        };
        self.store.keep_records(if root.void { u64::MAX } else { root.covers_seq + 1 })?;
        self.keeping = Some(Keeping {
            seal: RunSeal::new(&secret, label),
            secret,
            copies: Copies::new(config, root.covers_seq),
            volume,
            root,
            sent: None,
            root_changed: true,
            members_changed: true,
            records_missing: false,
        });
        Ok(())
    }

    /// Commits are readable (and perhaps synced) up to here.
    pub(super) fn now_written(&mut self, seq: Seq) {
        if let Some(keeping) = &mut self.keeping {
            keeping.copies.wrote(seq);
        }
    }

    /// How far commits are durable: here and at every holder that counts.
    pub(super) fn durable_floor(&self) -> Seq {
        self.keeping.as_ref().map_or(self.synced, |keeping| keeping.copies.floor(self.synced))
    }

    /// After every event: whoever holds copies is sent what there is, and durability moves on.
    pub(super) fn keep_up(&mut self) -> Result<(), StoreError> {
        if self.keeping.as_ref().is_some_and(|keeping| keeping.members_changed) {
            self.choose_holders();
        }
        self.feed_holders()?;
        self.advance_durable()
    }

    /// Chooses holders anew where some are gone or late.
    pub(super) fn choose_holders(&mut self) {
        let now_ms = self.now_ms();
        let first_record = self.store.first_record();
        let root = self.keeping.as_ref().and_then(|keeping| keeping.sent.as_ref());
        let root_sequence = root.map_or(u64::MAX, |root| root.sequence);
        let run = root.map(|root| (root.incarnation, root.run));
        let online: Vec<OnlineProvider> = self
            .members
            .iter()
            .filter(|(_, member)| member.is_reachable())
            .map(|(provider, member)| OnlineProvider {
                provider: *provider,
                site: member.record.site.clone(),
                eligible: member.report.accepts_puts
                    && !member.record.distrusted
                    && member.root_stored >= root_sequence,
                held: member
                    .records_held
                    .filter(|held| run == Some((held.incarnation, held.run)))
                    .map(|held| (held.first_seq, held.last_seq)),
            })
            .collect();
        let Some(keeping) = &mut self.keeping else { return };
        keeping.members_changed = false;
        keeping.records_missing |= !keeping.root.void && first_record > keeping.root.covers_seq + 1;
        let can_catch_up = keeping.sent.is_some() && !keeping.records_missing;
        keeping.copies.choose(now_ms, &online, can_catch_up);
    }

    fn feed_holders(&mut self) -> Result<(), StoreError> {
        loop {
            let Some(keeping) = &self.keeping else { return Ok(()) };
            let wanting = keeping.copies.wanting();
            if wanting.is_empty() {
                return Ok(());
            }
            for (provider, from, free) in wanting {
                let records = self.kept_records(from, free.min(MESSAGE_BYTES));
                self.send_records(provider, from, records);
            }
        }
    }

    /// Records read back. What cannot be read is as good as not kept: an image takes its place. The
    /// own state does not need it.
    pub(super) fn kept_records(&mut self, from: Seq, bytes_max: usize) -> Vec<(Seq, bytes::Bytes)> {
        self.store.records(from, bytes_max).unwrap_or_else(|error| {
            tracing::error!(%error, from, "the journal's records cannot be read back");
            if let Some(keeping) = &mut self.keeping {
                keeping.records_missing = true;
            }
            Vec::new()
        })
    }

    fn send_records(&mut self, provider: u32, from: Seq, records: Vec<(Seq, bytes::Bytes)>) {
        let now_ms = self.now_ms();
        let conn = self.members.get(&provider).and_then(|member| member.conn);
        let Some(keeping) = &mut self.keeping else { return };
        let Some(conn) = conn else { return keeping.copies.gone(provider) };
        if records.first().is_none_or(|(first, _)| *first != from) {
            if from <= keeping.root.covers_seq {
                // A newer image has come meanwhile: it begins again behind that.
                keeping.members_changed = true;
                return keeping.copies.gone(provider);
            }
            tracing::warn!(provider, from, "records a copy needs are not kept any more");
            keeping.records_missing = true;
            return keeping.copies.gone(provider);
        }
        let mut messages: Vec<StoreRecords> = Vec::new();
        let mut bytes = usize::MAX;
        for (seq, body) in records {
            keeping.copies.sent(now_ms, provider, seq, body.len());
            for part in keeping.seal.seal(seq, &body) {
                if bytes >= MESSAGE_BYTES {
                    messages.push(keeping.seal.label().message());
                    bytes = 0;
                }
                bytes += part.sealed.len();
                messages.last_mut().expect("just made").parts.push(part);
            }
        }
        for message in messages {
            self.tell(conn, Down::StoreRecords(message));
        }
    }

    pub(super) fn records_stored(&mut self, provider: u32, stored: &RecordsStored) {
        let now_ms = self.now_ms();
        let Some(keeping) = &mut self.keeping else { return };
        let label = keeping.seal.label();
        if (stored.incarnation, stored.run) != (label.incarnation, label.run) {
            return;
        }
        if stored.error.is_empty() {
            keeping.copies.stored(now_ms, provider, stored.seq);
        } else {
            tracing::warn!(provider, error = %stored.error, "it cannot store the journal's copy");
            keeping.copies.refused(now_ms, provider);
            keeping.members_changed = true;
        }
    }

    /// A provider is online: it gets the root. When it has stored that it may become a holder.
    pub(super) fn keep_with(&mut self, conn: super::ConnId) {
        let Some(keeping) = &mut self.keeping else { return };
        keeping.members_changed = true;
        if let Some(root) = keeping.sent.clone() {
            self.tell(conn, Down::StoreRoot(root));
        }
    }

    /// A provider says which root it has: ours must be newer than any.
    pub(super) fn root_seen(&mut self, sequence: u64) {
        if let Some(keeping) = &mut self.keeping
            && sequence > keeping.root.sequence
            && sequence - keeping.root.sequence <= ROOT_AHEAD_MAX
        {
            keeping.root.sequence = sequence;
            keeping.root_changed = true;
        }
    }

    /// A provider says which run's records it has. Only an old copy of the data directory can be
    /// behind that.
    pub(super) fn run_seen(&mut self, provider: u32, held: Option<&RecordsHeld>) {
        let own = (self.cluster.incarnation, self.cluster.run);
        if let Some(held) = held.filter(|held| (held.incarnation, held.run) > own) {
            tracing::error!(
                provider,
                incarnation = held.incarnation,
                run = held.run,
                "this provider has records of a later directory: the data directory here is an old \
                 copy. Stop, and use `us-directory restore`"
            );
            // What the later directory committed is not known here: none of it is garbage, ever.
            self.cluster.spare_births(u64::MAX);
        }
    }

    /// What the root says of providers has changed.
    pub(super) fn root_outdated(&mut self) {
        if let Some(keeping) = &mut self.keeping {
            keeping.root_changed = true;
            keeping.members_changed = true;
        }
    }

    pub(super) fn root_stored(&mut self, provider: u32, sequence: u64) {
        let Some(keeping) = &mut self.keeping else { return };
        if let Some(member) = self.members.get_mut(&provider) {
            member.root_stored = sequence;
        }
        keeping.members_changed = true;
        if keeping.sent.as_ref().is_some_and(|root| sequence >= root.sequence) {
            keeping.copies.root_stored(provider);
        }
    }

    /// Now and then: late holders, a changed root, blocks nobody needs any more.
    pub(super) fn keeping_chores(&mut self) -> Result<(), StoreError> {
        self.choose_holders();
        let Some(keeping) = &mut self.keeping else { return Ok(()) };
        if std::mem::take(&mut keeping.root_changed) {
            keeping.root.sequence += 1;
            let mut batch = WriteBatch::new();
            batch.put(keys::root(), encode(&keeping.root));
            let seq = self.commit(batch, Durability::Durable)?;
            self.then(seq, Then::Root)?;
        }
        self.drop_superseded()
    }

    /// The newest root is durable: everybody gets it.
    pub(super) fn send_root(&mut self) -> Result<(), StoreError> {
        let Some(keeping) = &self.keeping else { return Ok(()) };
        if keeping.root.void {
            return Ok(());
        }
        let manifest = self.manifest(&keeping.root, &keeping.volume)?;
        let mut salt = [0; 16];
        self.entropy.fill(&mut salt);
        let Some(keeping) = &mut self.keeping else { return Ok(()) };
        let label = keeping.seal.label();
        let root = StoreRoot {
            sequence: keeping.root.sequence,
            root: seal_root(&keeping.secret, salt, &encode(&manifest)).into(),
            covers_seq: keeping.root.covers_seq,
            incarnation: label.incarnation,
            run: label.run,
            run_first_seq: label.first_seq,
        };
        keeping.sent = Some(root.clone());
        keeping.members_changed = true;
        keeping.copies.covers(root.covers_seq);
        let online = self.members.values().filter(|member| member.online);
        let conns: Vec<_> = online.filter_map(|member| member.conn).collect();
        for conn in conns {
            self.tell(conn, Down::StoreRoot(root.clone()));
        }
        Ok(())
    }

    fn manifest(&self, root: &RootRecord, volume: &VolumeId) -> Result<Manifest, StoreError> {
        let mut runs = root.runs.clone();
        for block in runs.iter_mut().flat_map(|run| &mut run.blocks) {
            let Some(id) = BlockId::from_slice(&block.block) else { continue };
            let key = keys::block(volume, &id);
            if let Some(value) = self.store.get(&key)? {
                let record: BlockRecord = decode(&key, &value)?;
                block.providers = record.providers;
            }
        }
        let providers = self.members.iter().map(|(provider, member)| ManifestProvider {
            provider: *provider,
            address: member.record.address.clone(),
            key_hash: member.record.key_hash.clone(),
        });
        Ok(Manifest {
            cluster: self.cluster.cluster.clone(),
            incarnation: self.cluster.incarnation,
            sequence: root.sequence,
            covers_seq: root.covers_seq,
            runs,
            providers: providers.collect(),
        })
    }

    // ------------------------------------------------------------ images

    /// What the image's job is to do now, if anything.
    pub(super) fn plan_image(&mut self) -> Result<Option<ImagePlan>, StoreError> {
        // The job asks when it has nothing under way: what an attempt before leased is not used.
        self.births.image = None;
        let reachable = self.members.values().filter(|member| member.is_usable()).count();
        let Some(keeping) = &self.keeping else { return Ok(None) };
        let root = &keeping.root;
        let next = root.covers_seq + 1;
        let broken = root.void || keeping.records_missing || self.store.first_record() > next;
        let record_bytes = self.store.record_bytes(next);
        if reachable < IMAGE_PROVIDERS_MIN || (!broken && record_bytes < self.config.image_bytes) {
            return Ok(None);
        }
        let base = root.runs.first().map_or(0, |run| run.bytes);
        let deltas: u64 = root.runs.iter().skip(1).map(|run| run.bytes).sum();
        let whole = broken
            || root.runs.is_empty()
            || deltas + record_bytes > base / 2
            || record_bytes > DELTA_RECORDS_BYTES_MAX as u64;
        let (number, written) = (root.next_run, keeping.copies.written());
        let (last_seq, content) = if whole {
            (self.last_seq, ImageContent::Base(self.store.snapshot()))
        } else {
            (written, ImageContent::Delta { first_seq: next })
        };
        if broken {
            self.store.keep_records(last_seq + 1)?;
        }
        let providers = self.provider_table();
        Ok(Some(ImagePlan { number, last_seq, content, providers }))
    }

    /// Places for the image's blocks; the answer comes when their births are safe to use.
    pub(super) fn lease_for_image(&mut self, ask: AskId, count: u32) -> Result<(), StoreError> {
        let code = self.keeping.as_ref().and_then(|keeping| self.volumes.get(&keeping.volume));
        let Some(code) = code.map(|volume| volume.code) else {
            let answer = Answer::Placements(PlacementsLeased::default());
            self.effects.push(Effect::Answer { ask, answer });
            return Ok(());
        };
        // What was leased for an image is committed when the whole of it is written, or never.
        self.births.image.get_or_insert(self.next_birth);
        let leased = self.choose_places(code, count)?;
        self.then(self.births_promised, Then::Answer(ask, Answer::Placements(leased)))
    }

    /// Where a block of the image is now.
    pub(super) fn locate_image(&self, block: &us_core::ids::BlockId) -> Result<Answer, StoreError> {
        let Some(keeping) = &self.keeping else { return Ok(Answer::Done) };
        let key = keys::block(&keeping.volume, block);
        let stored = self.store.get(&key)?.map(|value| decode(&key, &value)).transpose()?;
        let info = stored.map(|record: BlockRecord| {
            let commit = ImageBlock {
                block: bytes::Bytes::copy_from_slice(block.as_bytes()),
                s: record.s,
                r: record.r,
                page_bytes: record.page_bytes,
                plaintext_bytes: record.plaintext_bytes,
                birth: record.birth,
                providers: record.providers,
                fingerprint_kind: record.fingerprint_kind,
                fingerprint_hash: record.fingerprint_hash,
            };
            Box::new(commit)
        });
        Ok(Answer::ImageBlock(info))
    }

    /// A run of the image is in the swarm: its blocks, the new root and the end of what it replaces
    /// are one commit.
    pub(super) fn commit_image(
        &mut self,
        ask: AskId,
        run: ImageRun,
        blocks: &[BlockCommit],
    ) -> Result<(), StoreError> {
        let refuse = |engine: &mut Self, detail: String| {
            let answer = Answer::Refused { kind: RefusalKind::Busy, detail };
            engine.effects.push(Effect::Answer { ask, answer });
            Ok(())
        };
        let Some(keeping) = &self.keeping else { return refuse(self, "no recovery key".into()) };
        let (volume, mut root) = (keeping.volume, keeping.root.clone());
        let is_next = run.number == root.next_run
            && (run.first_seq == 0 || run.first_seq == root.covers_seq + 1);
        if !is_next {
            return refuse(self, format!("run {} is not the next", run.number));
        }
        root.next_run += 1;
        root.sequence += 1;
        root.covers_seq = run.last_seq;
        root.void = false;
        if run.first_seq == 0 {
            let old = std::mem::take(&mut root.runs);
            root.superseded.extend(old);
        }
        root.runs.push(run.clone());
        let Some(mut tx) = self.tx(volume) else { return refuse(self, "no volume".into()) };
        match tx.commit_image_run(&EngineAuthority(self), run.number, blocks) {
            Ok(()) => {}
            Err(ApplyError::Store(error)) => return Err(error),
            Err(ApplyError::Rule(rule)) => return refuse(self, rule.to_string()),
        }
        tx.put(keys::root(), &root);
        let outcome = tx.finish()?;
        let seq = self.commit(outcome.batch, Durability::Durable)?;
        self.note_blocks(volume, outcome.blocks);
        let covers_seq = root.covers_seq;
        self.births.image = None;
        if let Some(keeping) = &mut self.keeping {
            keeping.root = root;
            keeping.records_missing = false;
        }
        tracing::info!(
            number = run.number,
            first_seq = run.first_seq,
            covers_seq,
            bytes = run.bytes,
            blocks = blocks.len(),
            "an image of the state is in the swarm"
        );
        self.store.keep_records(covers_seq + 1)?;
        self.then(seq, Then::Root)?;
        self.then(seq, Then::Answer(ask, Answer::Done))
    }

    /// Ends the blocks of runs that no stored root needs.
    fn drop_superseded(&mut self) -> Result<(), StoreError> {
        let Some(keeping) = &self.keeping else { return Ok(()) };
        let sequence = keeping.root.sequence;
        let is_sent = keeping.sent.as_ref().is_some_and(|sent| sent.sequence == sequence);
        if keeping.root.superseded.is_empty() || !is_sent {
            return Ok(());
        }
        let online = self.members.values().filter(|member| member.online).count();
        let has = |member: &super::Member| member.root_stored >= sequence;
        let stored = self.members.values().filter(|member| member.online && has(member)).count();
        let mut holders = self.members.iter().filter(|(id, _)| keeping.copies.is_holder(**id));
        let holders_have = holders.all(|(_, member)| has(member));
        if stored == 0 || stored < online.min(ROOTS_STORED_MIN) || !holders_have {
            return Ok(());
        }
        let (volume, mut root) = (keeping.volume, keeping.root.clone());
        let Some(mut tx) = self.tx(volume) else { return Ok(()) };
        for run in std::mem::take(&mut root.superseded) {
            let dropped = tx.drop_image_run(&run);
            dropped.or_else(|error| match error {
                ApplyError::Store(error) => Err(error),
                ApplyError::Rule(rule) => {
                    tracing::error!(%rule, run = run.number, "an old image's block is gone");
                    Ok(())
                }
            })?;
        }
        tx.put(keys::root(), &root);
        let outcome = tx.finish()?;
        self.commit(outcome.batch, Durability::Applied)?;
        self.pending_deletes += outcome.graves as i64;
        self.note_blocks(volume, outcome.blocks);
        if let Some(keeping) = &mut self.keeping {
            keeping.root = root;
        }
        Ok(())
    }

    /// The providers that keep a live copy of the journal.
    pub(super) fn live_copies(&self) -> Vec<u32> {
        let live = |keeping: &Keeping| keeping.copies.live(self.durable);
        self.keeping.as_ref().map(live).unwrap_or_default()
    }

    /// The last commit that is in the image.
    pub(super) fn image_covers(&self) -> Seq {
        self.keeping.as_ref().map_or(0, |keeping| keeping.root.covers_seq)
    }

    /// Whether a volume is the directory's own.
    pub(super) fn is_hidden(&self, volume: &VolumeId) -> bool {
        self.volumes.get(volume).is_some_and(|known| known.record.name == IMAGE_VOLUME_NAME)
    }
}

impl From<&BlockCommit> for ImageBlock {
    fn from(commit: &BlockCommit) -> Self {
        Self {
            block: commit.block.clone(),
            s: commit.s,
            r: commit.r,
            page_bytes: commit.page_bytes,
            plaintext_bytes: commit.plaintext_bytes,
            birth: commit.birth,
            providers: commit.providers.clone(),
            fingerprint_kind: commit.fingerprint_kind,
            fingerprint_hash: commit.fingerprint_hash.clone(),
        }
    }
}
