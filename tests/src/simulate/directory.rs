//! The directory's own engine under virtual time, on a store in memory: what the shell does for it,
//! and the one mount that fills it with blocks.
//!
//! Every commit is durable at once; crashes of the directory are the subject of its own tests.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context as _, bail};
use bytes::Bytes;
use us_core::geometry::{BlockGeometry, Code};
use us_core::placement::Chooser;
use us_core::placement::draw::SplitMix;
use us_directory::engine::health::count_slice;
use us_directory::engine::{
    Answer, AskId, ConnId, Effect, Engine, EngineConfig, Entropy, Event, Moment, NewVolume, Peer,
    Question,
};
use us_directory::store::Progress;
use us_directory::store::memory::MemoryStore;
use us_proto::v1::fetch::Want;
use us_proto::v1::mutation::Op;
use us_proto::v1::provider_down::Event as ToProvider;
use us_proto::v1::provider_up::Event as FromProvider;
use us_proto::v1::session_down::Event as ToMount;
use us_proto::v1::session_up::Event as FromMount;
use us_proto::v1::{
    Batch, BlockCommit, ClusterEvent, CommitData, Create, ExtentWrite, Fetch, FetchInode,
    FileGrowth, LeaseInodes, LeasePlacements, Mutation, OpenSession, ProviderUp, SessionUp,
    StatusReply, Timestamp,
};

/// The one volume.
const VOLUME: &str = "v";
/// The mount's connection; providers count from behind it.
const MOUNT: u64 = 1;
/// Blocks placed and committed together; as many files as commits.
const BLOCKS_A_COMMIT: usize = 128;
/// Bytes of a file that one block fills.
const CHUNK_BYTES: u64 = 4 << 20;
/// A Monday, 0:00 UTC.
const MONDAY_MS: u64 = 4 * 24 * 3_600_000 + 2_000 * 7 * 24 * 3_600_000;

struct Seeded(SplitMix);

impl Entropy for Seeded {
    fn fill(&mut self, bytes: &mut [u8]) {
        for part in bytes.chunks_mut(8) {
            part.copy_from_slice(&self.0.next().to_le_bytes()[..part.len()]);
        }
    }
}

/// The directory.
pub struct Directory {
    engine: Engine,
    committed: Arc<AtomicU64>,
    durable: u64,
    /// Virtual time since the start.
    pub now_ms: u64,
    next_conn: u64,
    /// What it said to providers, oldest first; the shell of the simulation takes it.
    pub to_providers: VecDeque<(u64, ToProvider)>,
    /// Connections it ended.
    pub ended: Vec<u64>,
    to_mount: VecDeque<ToMount>,
    answers: VecDeque<Answer>,
    next_ino: u64,
    batch: u64,
    blocks: u32,
    /// Events it was given.
    pub steps: u64,
}

impl std::fmt::Debug for Directory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Directory").field("now_ms", &self.now_ms).finish_non_exhaustive()
    }
}

/// The id of a block by its number.
pub fn block_id(number: u32) -> Bytes {
    let mut id = [0; 16];
    id[8..12].copy_from_slice(&number.to_be_bytes());
    // Placement and repair are seeded by an id's end.
    let mut mixed = SplitMix::new(u64::from(number));
    id[12..].copy_from_slice(&(mixed.next() as u32).to_be_bytes());
    Bytes::copy_from_slice(&id)
}

/// The number of a block by its id.
pub fn block_number(id: &[u8]) -> Option<u32> {
    id.get(8..12)?.try_into().ok().map(u32::from_be_bytes)
}

impl Directory {
    /// An empty directory with a volume of `code`, at a Monday's midnight.
    ///
    /// # Errors
    /// When it does not start.
    pub fn new(
        seed: u64,
        config: EngineConfig,
        chooser: Box<dyn Chooser>,
        code: Code,
    ) -> anyhow::Result<Self> {
        let committed = Arc::new(AtomicU64::new(0));
        let told = committed.clone();
        let sink = Arc::new(move |progress: Result<Progress, _>| {
            if let Ok(progress) = progress {
                told.store(progress.synced, Ordering::Relaxed);
            }
        });
        let store = Box::new(MemoryStore::new(sink));
        let entropy = Box::new(Seeded(SplitMix::new(seed)));
        let engine = Engine::start(store, config, entropy, chooser, [7; 16])?;
        let mut directory = Self {
            engine,
            committed,
            durable: 0,
            now_ms: 0,
            next_conn: MOUNT,
            to_providers: VecDeque::new(),
            ended: Vec::new(),
            to_mount: VecDeque::new(),
            answers: VecDeque::new(),
            next_ino: 0,
            batch: 0,
            blocks: 0,
            steps: 0,
        };
        directory.count_blocks()?;
        directory.ask(NewVolume::named(VOLUME, code.s() as u32, code.r() as u32).into())?;
        Ok(directory)
    }

    /// What the shell's thread does after a start.
    fn count_blocks(&mut self) -> anyhow::Result<()> {
        let (view, mut cursor) = self.engine.to_count();
        loop {
            let slice = count_slice(&*view, &mut cursor)?;
            let last = slice.last;
            self.event(Event::Counted(slice))?;
            if last {
                return Ok(());
            }
        }
    }

    /// Wall time.
    pub fn unix_ms(&self) -> u64 {
        MONDAY_MS + self.now_ms
    }

    fn step(&mut self, event: Event) -> anyhow::Result<()> {
        self.steps += 1;
        let at = Moment { now_ms: self.now_ms, unix_ms: self.unix_ms() };
        for effect in self.engine.step(at, event)? {
            match effect {
                Effect::Provider { conn, down } => {
                    self.to_providers.extend(down.event.map(|event| (conn.0, event)));
                }
                Effect::Session { down, .. } => self.to_mount.extend(down.event),
                Effect::Refuse(_) => {}
                Effect::End { conn } => self.ended.push(conn.0),
                Effect::Answer { answer, .. } => self.answers.push_back(answer),
            }
        }
        Ok(())
    }

    /// Takes an event, and tells the engine what it committed is durable.
    fn event(&mut self, event: Event) -> anyhow::Result<()> {
        self.step(event)?;
        loop {
            let seq = self.committed.load(Ordering::Relaxed);
            if seq <= self.durable {
                return Ok(());
            }
            self.durable = seq;
            self.step(Event::Durable { seq })?;
        }
    }

    /// Time passes.
    ///
    /// # Errors
    /// When the store fails.
    pub fn tick(&mut self) -> anyhow::Result<()> {
        self.event(Event::Tick)
    }

    /// Whether there is repair work: then ticks are to come soon.
    pub fn is_repairing(&self) -> bool {
        self.engine.is_repairing()
    }

    /// The placer of the engine.
    pub fn placer(&self) -> &us_core::placement::Placer {
        self.engine.placer()
    }

    fn ask(&mut self, question: Question) -> anyhow::Result<Answer> {
        self.event(Event::Ask { ask: AskId(1), question })?;
        match self.answers.pop_front() {
            Some(Answer::Refused { detail, .. }) => bail!("the directory refuses: {detail}"),
            Some(answer) => Ok(answer),
            None => bail!("the directory does not answer"),
        }
    }

    /// The one screen.
    ///
    /// # Errors
    /// When the store fails.
    pub fn status(&mut self) -> anyhow::Result<StatusReply> {
        match self.ask(Question::Status)? {
            Answer::Status(status) => Ok(*status),
            other => bail!("a status, not {other:?}"),
        }
    }

    /// The log behind event `after`, one page.
    ///
    /// # Errors
    /// When the store fails.
    pub fn events(&mut self, after: u64) -> anyhow::Result<Vec<ClusterEvent>> {
        match self.ask(Question::Events { after, last: 0 })? {
            Answer::Events(events) => Ok(events),
            other => bail!("events, not {other:?}"),
        }
    }

    /// The places of the fragments of all blocks, as the records say: number, holders, durable bits.
    ///
    /// # Errors
    /// When the store fails.
    pub fn records(&mut self) -> anyhow::Result<Vec<(u32, us_directory::records::BlockRecord)>> {
        let Answer::Snapshot(state) = self.ask(Question::Snapshot)? else {
            bail!("no snapshot");
        };
        let mut records = Vec::new();
        for (volume, _) in &state.volumes {
            let mut range =
                us_directory::store::KeyRange::prefix(&us_directory::keys::tag(volume, b'b'));
            loop {
                let page = state.view.scan(&range, 4096)?;
                let Some((last, _)) = page.last() else { break };
                range = range.after(last);
                for (key, value) in &page {
                    let number = block_number(&key[us_directory::keys::HEAD_BYTES..]);
                    let number = number.context("a block that nobody wrote")?;
                    records.push((number, us_directory::records::decode(key, value)?));
                }
            }
        }
        Ok(records)
    }

    // ------------------------------------------------------------ providers

    /// A provider whose key is `key` dials.
    ///
    /// # Errors
    /// When the store fails.
    pub fn dial(&mut self, key: u32) -> anyhow::Result<u64> {
        self.next_conn += 1;
        let conn = self.next_conn;
        let mut key_hash = vec![0; 32];
        key_hash[..4].copy_from_slice(&key.to_be_bytes());
        let peer = Peer { key_hash, name: format!("provider-{key}"), ..Peer::default() };
        self.event(Event::ProviderConnected { conn: ConnId(conn), peer })?;
        Ok(conn)
    }

    /// A provider says something.
    ///
    /// # Errors
    /// When the store fails.
    pub fn hear(&mut self, conn: u64, said: FromProvider) -> anyhow::Result<()> {
        let up = ProviderUp { event: Some(said) };
        self.event(Event::Provider { conn: ConnId(conn), up })
    }

    /// A provider's stream broke.
    ///
    /// # Errors
    /// When the store fails.
    pub fn hang_up(&mut self, conn: u64) -> anyhow::Result<()> {
        self.event(Event::Disconnected { conn: ConnId(conn) })
    }

    // ------------------------------------------------------------ the mount

    fn mount_says(&mut self, said: FromMount) -> anyhow::Result<()> {
        let up = SessionUp { event: Some(said) };
        self.event(Event::Session { conn: ConnId(MOUNT), up })
    }

    /// The first message to the mount that `pick` wants; others are dropped.
    fn mount_hears<T>(&mut self, pick: impl Fn(ToMount) -> Option<T>) -> anyhow::Result<T> {
        while let Some(down) = self.to_mount.pop_front() {
            if let ToMount::Ended(ended) = &down {
                bail!("the directory ended the mount's session: {ended:?}");
            }
            if let Some(found) = pick(down) {
                return Ok(found);
            }
        }
        bail!("the directory does not answer the mount")
    }

    /// The volume is mounted.
    ///
    /// # Errors
    /// When the directory does not have it.
    pub fn mount(&mut self) -> anyhow::Result<()> {
        let peer = Peer { key_hash: vec![0xff; 32], name: "mount".to_owned(), ..Peer::default() };
        self.event(Event::SessionConnected { conn: ConnId(MOUNT), peer })?;
        let open = OpenSession { volume: VOLUME.to_owned(), ..Default::default() };
        self.mount_says(FromMount::Open(open))?;
        self.mount_says(FromMount::LeaseInodes(LeaseInodes { request: 1, count: 65_536 }))?;
        self.next_ino = self.mount_hears(|down| match down {
            ToMount::Inodes(leased) => Some(leased.first),
            _ => None,
        })?;
        let want = Want::Inode(FetchInode { ino: 1, level: 2 });
        self.mount_says(FromMount::Fetch(Fetch { request: 1, want: Some(want), trace: 0 }))?;
        let fetched = self.mount_hears(|down| match down {
            ToMount::Fetched(fetched) => Some(fetched),
            _ => None,
        })?;
        if fetched.leases.is_empty() { bail!("no lease on the root: {fetched:?}") } else { Ok(()) }
    }

    /// The mount ends, so that nothing is left to renew.
    ///
    /// # Errors
    /// When the store fails.
    pub fn unmount(&mut self) -> anyhow::Result<()> {
        self.mount_says(FromMount::Close(us_proto::v1::CloseSession {}))?;
        self.to_mount.clear();
        Ok(())
    }

    /// Writes a file of up to `blocks` new blocks of this shape, whole at once; `stored` is told each
    /// block's number and the provider of each of its fragments before it is committed.
    ///
    /// # Errors
    /// When blocks find no place.
    pub fn write(
        &mut self,
        blocks: usize,
        geometry: BlockGeometry,
        mut stored: impl FnMut(u32, &[u32]),
    ) -> anyhow::Result<usize> {
        let count = blocks.min(BLOCKS_A_COMMIT) as u32;
        self.mount_says(FromMount::LeasePlacements(LeasePlacements { request: 9, count }))?;
        let leased = self.mount_hears(|down| match down {
            ToMount::Placements(leased) => Some(leased),
            _ => None,
        })?;
        if leased.leases.is_empty() {
            bail!("no place for a block: {}", leased.error);
        }
        let code = geometry.code();
        let bytes = geometry.plaintext_bytes() as u32;
        let ino = self.next_ino;
        self.next_ino += 1;
        let mut data = CommitData::default();
        for (at, lease) in leased.leases.iter().enumerate() {
            let block = block_id(self.blocks);
            stored(self.blocks, &lease.providers);
            self.blocks += 1;
            let durable = (0..code.fragments()).fold(Bytes::new(), |bits, index| {
                us_directory::records::with_bit(&bits, index, true)
            });
            data.blocks.push(BlockCommit {
                block: block.clone(),
                s: code.s() as u32,
                r: code.r() as u32,
                page_bytes: geometry.page_bytes() as u32,
                plaintext_bytes: bytes,
                birth: lease.birth,
                providers: lease.providers.clone(),
                durable,
                fingerprint_hash: vec![1; 32].into(),
                ..Default::default()
            });
            let (offset, length) = (at as u64 * CHUNK_BYTES, u64::from(bytes));
            data.extents.push(ExtentWrite { ino, offset, length, block, ..Default::default() });
        }
        let now = Some(Timestamp { seconds: (self.unix_ms() / 1000) as i64, nanos: 0 });
        let size = (leased.leases.len() as u64 - 1) * CHUNK_BYTES + u64::from(bytes);
        data.files.push(FileGrowth { ino, size, mtime: now, ctime: now, clear_suid: false });
        let mut name = [0; 16];
        name[..8].copy_from_slice(&ino.to_be_bytes());
        let name = Bytes::copy_from_slice(&name);
        let create = Create {
            dir: 1,
            name_hash: name.clone(),
            sealed_name: name,
            ino,
            mode: 0o100_644,
            time: now,
            ..Default::default()
        };
        self.batch += 1;
        let ops = [Op::Create(create), Op::CommitData(data)];
        let mutations = ops.into_iter().map(|op| Mutation { op: Some(op) }).collect();
        let batch = Batch { number: self.batch, mutations, traces: vec![0] };
        self.mount_says(FromMount::Batch(batch))?;
        let number = self.batch;
        self.mount_hears(|down| match down {
            ToMount::Applied(applied) => (applied.number == number).then_some(()),
            _ => None,
        })?;
        Ok(leased.leases.len())
    }
}
