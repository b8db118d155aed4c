//! The directory itself: a state machine over a store.
//!
//! [`Engine::step`] takes the time and one event and returns effects. It reads no clock, draws
//! randomness only from the [`Entropy`] it was given, and does no I/O but through its store. One
//! thread owns it, so everything it does has one order, which is the order of the store's commits.
//!
//! Invariants:
//! - nothing undurable crosses a lease: before an inode that one session changed is shown or granted
//!   to another, the change is durable;
//! - a session's last applied batch number is in the same commit as the batch's effects;
//! - a fence is durable before what the fenced session held is granted again;
//! - where the journal has copies, nothing is called durable that a live one has not stored;
//! - births, inode ranges and session numbers are never given twice: their high-water marks are
//!   durable before the answer leaves;
//! - a client that breaks a rule loses its session; it never stops the directory.
//!
//! Fails only with the store: the shell must then stop the process.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use us_core::geometry::Code;
use us_core::ids::{BlockId, VolumeId};
use us_core::placement::{Chooser, Placer};
use us_proto::v1::{SessionDown, session_down};

use crate::keys;
use crate::namespace::{BlockChange, Tx};
use crate::records::{
    ClusterRecord, ProviderRecord, SessionRecord, VolumeRecord, decode, encode, volume_id,
};
use crate::store::{Durability, KeyRange, MetaStore, Seq, StoreError, WriteBatch};

mod access;
mod admin;
pub mod audit;
mod batches;
mod chores;
mod cleaning;
mod copies;
mod damage;
mod deaths;
mod distrust;
mod event;
mod events;
mod fetch;
pub mod garbage;
mod grants;
pub mod health;
mod keeping;
pub mod leases;
mod leave;
mod locks;
mod lockwait;
mod members;
mod placement;
pub mod presence;
mod private;
mod quota;
mod refusals;
pub mod registry;
pub mod repair;
mod retain;
mod sessions;
mod spread;
#[cfg(test)]
mod tests;
pub mod trash;

pub use audit::{AuditOutcome, AuditPlace, AuditPlan};
pub use event::{
    Answer, AskId, ConnId, Effect, Event, Moment, NewVolume, Peer, Question, RefusalKind,
    StateSnapshot,
};
use fetch::Parked;
use health::Counts;
pub use keeping::{ImageContent, ImagePlan};
use leases::{InodeKey, Leases};
use locks::Locks;
use members::{Member, Query};
pub use private::PrivateVolume;

/// Requests of all sessions that may wait for a lease at once.
pub const PARKED_MAX: usize = 65_536;
/// Sessions, fenced ones among them.
pub const SESSIONS_MAX: usize = 16_384;
/// Of them those of one certificate.
const SESSIONS_OF_ONE_MAX: usize = 1024;
/// Volumes.
pub const VOLUMES_MAX: usize = 1024;
/// Of them those that one client made; administrators may make all.
pub const VOLUMES_OF_ONE_MAX: usize = 64;
/// Births reserved durably at a time.
const BIRTHS_AHEAD: u64 = 1 << 16;

/// Where randomness comes from (cookies, volume keys, the cluster's id).
pub trait Entropy: Send {
    /// Fills `bytes`.
    fn fill(&mut self, bytes: &mut [u8]);
}

/// The system's randomness.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemEntropy;

impl Entropy for SystemEntropy {
    fn fill(&mut self, bytes: &mut [u8]) {
        getrandom::fill(bytes).expect("the system gives randomness");
    }
}

/// The engine's times and limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineConfig {
    /// How long a lease is good for without renewal.
    pub lease_ms: u64,
    /// After how long a silent session is shut out when another wants what it holds.
    pub fence_ms: u64,
    /// How long a fetch waits for another's lease.
    pub fetch_wait_ms: u64,
    /// How long fragments may be on their way before their provider is asked.
    pub settle_ms: u64,
    /// How long ago a birth must have been leased for its fragments to be garbage where nothing
    /// names them.
    pub garbage_age_ms: u64,
    /// How often a provider gets its retain list; 0: never.
    pub retain_every_ms: u64,
    /// How often each provider is asked for a fragment at random, on average; 0: never.
    pub audit_every_ms: u64,
    /// KiB a second read so from all of them together; 0: no limit.
    pub audit_kib_per_s: u64,
    /// How often providers report.
    pub report_every_ms: u64,
    /// Files that are removed younger than this do not go to the trash.
    pub trash_age_ms: u64,
    /// How long a block is let alone by the cleaner after something of it died.
    pub clean_after_ms: u64,
    /// How long a grant is good for.
    pub grant_ms: u64,
    /// When a silent provider is absent, dormant, dead.
    pub clocks: presence::Clocks,
    /// How much repair may be under way.
    pub repair: repair::RepairLimits,
    /// Copies of the journal on providers, where there are enough of them.
    pub copies: usize,
    /// How long a provider may take to acknowledge a record of the journal.
    pub copy_ack_ms: u64,
    /// Records of this many bytes since the last image start another.
    pub image_bytes: u64,
    /// Data and parity fragments of the image's blocks.
    pub image_code: (u32, u32),
    /// How long a certificate is good without renewal.
    pub certificate_life_ms: u64,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            lease_ms: 30_000,
            fence_ms: 45_000,
            fetch_wait_ms: 60_000,
            settle_ms: 60_000,
            garbage_age_ms: 3_600_000,
            retain_every_ms: 7 * 24 * 3_600_000,
            audit_every_ms: 600_000,
            audit_kib_per_s: 4096,
            report_every_ms: 2_000,
            trash_age_ms: 10_000,
            clean_after_ms: 30_000,
            grant_ms: 900_000,
            clocks: presence::Clocks::default(),
            repair: repair::RepairLimits::default(),
            copies: 2,
            copy_ack_ms: 3_000,
            image_bytes: 64 << 20,
            image_code: (4, 2),
            certificate_life_ms: 365 * 24 * 3_600_000,
        }
    }
}

#[derive(Debug)]
struct Volume {
    record: VolumeRecord,
    code: Code,
}

#[derive(Debug)]
struct Connection {
    peer: Peer,
    session: Option<u64>,
    provider: Option<u32>,
}

/// What waits for a commit to be durable.
#[derive(Debug)]
enum Then {
    Send(ConnId, Box<SessionDown>),
    Greet { conn: ConnId, session: u64, resumed: bool },
    Ended { session: u64, end: sessions::Ending },
    Answer(AskId, Answer),
    Deletes,
    Member { conn: ConnId, provider: u32 },
    Left { conn: ConnId },
    Period(u64),
    Root,
}

/// The directory's state machine.
pub struct Engine {
    store: Box<dyn MetaStore>,
    config: EngineConfig,
    entropy: Box<dyn Entropy>,
    placer: Placer,
    at: Moment,
    cluster: ClusterRecord,
    clock_base_ms: u64,
    clock_stored_ms: u64,
    next_birth: u64,
    births_promised: Seq,
    volumes: BTreeMap<VolumeId, Volume>,
    connections: HashMap<ConnId, Connection>,
    sessions: BTreeMap<u64, sessions::Session>,
    leases: Leases,
    parked: BTreeMap<u64, Parked>,
    waiters: HashMap<InodeKey, VecDeque<u64>>,
    next_park: u64,
    awake: BTreeSet<u64>,
    recall_again: Vec<(u64, InodeKey, leases::Level, u64)>,
    locks: Locks,
    left: quota::Left,
    recent: HashMap<InodeKey, (u64, Seq)>,
    recent_order: VecDeque<(Seq, Vec<InodeKey>)>,
    /// On the own disk up to here; durable where the copies say so too.
    synced: Seq,
    durable: Seq,
    last_seq: Seq,
    run_first_seq: Seq,
    keeping: Option<keeping::Keeping>,
    signer: Option<grants::Signer>,
    after: BTreeMap<Seq, Vec<Then>>,
    members: BTreeMap<u32, Member>,
    provider_of_key: HashMap<Bytes, u32>,
    queries: HashMap<u64, Query>,
    next_query: u64,
    counts: Counts,
    unsettled: HashMap<(VolumeId, BlockId), chores::Unsettled>,
    settle_order: BTreeSet<(u64, VolumeId, BlockId)>,
    changed_while_counting: HashSet<(VolumeId, BlockId)>,
    pending_deletes: i64,
    /// A deletion was not sent because a repair is at work on its block.
    deletes_wait: bool,
    last_slow_tick_ms: u64,
    repairs: repair::Repairs,
    audits: audit::Audits,
    births: garbage::Births,
    spread: spread::Spread,
    cleaning: cleaning::Cleaning,
    retain: Option<retain::Retain>,
    trash: trash::Trash,
    /// The wall-clock hour whose presence was learnt last, and the slow ticks of the present one.
    learnt_hour: u64,
    hour_ticks: u64,
    next_event: u64,
    registry: registry::Registry,
    /// Whose question is being answered, for the log, and who that is.
    asker: Option<String>,
    asker_is: Option<us_core::tls::PeerIdentity>,
    effects: Vec<Effect>,
}

/// Why an engine does not start.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The store is of another cluster than the certificates.
    #[error("the store belongs to another cluster than the certificate authority beside it")]
    Cluster,
    /// A stored volume's code is impossible.
    #[error("volume {name}: its stored code {s}+{r} is impossible")]
    Code {
        /// Its name.
        name: String,
        /// Data fragments.
        s: u32,
        /// Parity fragments.
        r: u32,
    },
}

impl Engine {
    /// Starts on a store; an empty store becomes the state of cluster `cluster_id`.
    ///
    /// # Errors
    /// [`EngineError`] when the store fails or holds nonsense.
    pub fn start(
        store: Box<dyn MetaStore>,
        config: EngineConfig,
        entropy: Box<dyn Entropy>,
        chooser: Box<dyn Chooser>,
        cluster_id: [u8; 16],
    ) -> Result<Self, EngineError> {
        let key = keys::cluster();
        let stored = store.get(&key)?.map(|value| decode::<ClusterRecord>(&key, &value));
        let mut cluster = match stored.transpose()? {
            Some(cluster) if cluster.cluster != cluster_id[..] => {
                return Err(EngineError::Cluster);
            }
            Some(cluster) => cluster,
            None => ClusterRecord {
                cluster: bytes::Bytes::copy_from_slice(&cluster_id),
                incarnation: 1,
                next_session: 1,
                next_provider: 1,
                births_end: 1,
                ..Default::default()
            },
        };
        cluster.run += 1;
        let (mut entropy, mut seed) = (entropy, [0; 8]);
        entropy.fill(&mut seed);
        let mut engine = Self {
            leases: Leases::new(cluster.run << 40 | 1),
            next_birth: cluster.births_end,
            births_promised: 0,
            clock_base_ms: cluster.clock_ms,
            clock_stored_ms: cluster.clock_ms,
            store,
            config,
            entropy,
            placer: Placer::new(chooser),
            at: Moment::default(),
            cluster,
            volumes: BTreeMap::new(),
            connections: HashMap::new(),
            sessions: BTreeMap::new(),
            parked: BTreeMap::new(),
            waiters: HashMap::new(),
            next_park: 1,
            awake: BTreeSet::new(),
            recall_again: Vec::new(),
            locks: Locks::default(),
            left: quota::Left::default(),
            recent: HashMap::new(),
            recent_order: VecDeque::new(),
            synced: 0,
            durable: 0,
            last_seq: 0,
            run_first_seq: 1,
            keeping: None,
            signer: None,
            after: BTreeMap::new(),
            members: BTreeMap::new(),
            provider_of_key: HashMap::new(),
            queries: HashMap::new(),
            next_query: 1,
            counts: Counts::default(),
            unsettled: HashMap::new(),
            settle_order: BTreeSet::new(),
            changed_while_counting: HashSet::new(),
            pending_deletes: 0,
            deletes_wait: false,
            last_slow_tick_ms: 0,
            repairs: repair::Repairs::new(config.repair),
            audits: audit::Audits::new(u64::from_le_bytes(seed)),
            births: garbage::Births::default(),
            spread: spread::Spread::default(),
            cleaning: cleaning::Cleaning::default(),
            retain: None,
            trash: trash::Trash::default(),
            learnt_hour: 0,
            hour_ticks: 0,
            next_event: 1,
            registry: registry::Registry::default(),
            asker: None,
            asker_is: None,
            effects: Vec::new(),
        };
        engine.load()?;
        engine.commit_cluster(Durability::Durable)?;
        Ok(engine)
    }

    fn load(&mut self) -> Result<(), EngineError> {
        // What an earlier run left is durable: it was read back from stable storage.
        self.durable = self.store.facts().seq;
        self.last_seq = self.durable;
        self.synced = self.durable;
        self.run_first_seq = self.durable + 1;
        for (key, value) in self.scan_all(&keys::tag(&keys::CLUSTER, b'v'))? {
            let record: VolumeRecord = decode(&key, &value)?;
            let code = Code::new(record.s as usize, record.r as usize).map_err(|_| {
                EngineError::Code { name: record.name.clone(), s: record.s, r: record.r }
            })?;
            self.volumes.insert(volume_id(&key[keys::HEAD_BYTES..]), Volume { record, code });
        }
        for (key, value) in self.scan_all(&keys::tag(&keys::CLUSTER, b's'))? {
            let record: SessionRecord = decode(&key, &value)?;
            let session = sessions::Session::restored(record);
            self.sessions.insert(keys::last_number(&key), session);
        }
        for (key, value) in self.scan_all(&keys::tag(&keys::CLUSTER, b'y'))? {
            let number = key[keys::HEAD_BYTES..].try_into().map_or(0, u32::from_be_bytes);
            let mut record: ProviderRecord = decode(&key, &value)?;
            // One that was online when the directory stopped is silent since it started.
            if record.silent_since_ms == 0 {
                record.silent_since_ms = self.clock_base_ms.max(1);
            }
            if record.dead || record.draining || record.distrusted {
                self.repairs.unwell.insert(number);
            }
            if record.draining && self.holds_something(number)? {
                self.repairs.drains.insert(number);
            }
            let is_dead = record.dead;
            self.provider_of_key.insert(record.key_hash.clone(), number);
            self.members.insert(number, Member::restored(record));
            self.note_provider(number);
            if is_dead {
                self.placer.retire(us_core::ids::ProviderId(number));
            }
        }
        self.load_events()?;
        self.load_registry()?;
        Ok(())
    }

    fn scan_all(&self, prefix: &[u8]) -> Result<Vec<crate::store::Pair>, StoreError> {
        let mut range = KeyRange::prefix(prefix);
        let mut all = Vec::new();
        loop {
            let page = self.store.scan(&range, 1024)?;
            let Some((last, _)) = page.last() else { return Ok(all) };
            range = range.after(last);
            all.extend(page);
        }
    }

    /// The snapshot and the volumes over which the shell is to count blocks in the background.
    pub fn to_count(&self) -> (Arc<dyn crate::store::View>, health::CountCursor) {
        let volumes: Vec<VolumeId> = self.volumes.keys().copied().collect();
        let sampling = self.audits.pivots.sampling;
        (self.store.snapshot(), health::CountCursor::new(&volumes, sampling))
    }

    /// The cluster's id.
    pub fn cluster(&self) -> &[u8] {
        &self.cluster.cluster
    }

    /// The owner of what placement knows.
    pub fn placer(&self) -> &Placer {
        &self.placer
    }

    /// Whether blocks are being looked for, wait for, or are under repair: until then time may pass
    /// in long steps.
    pub fn is_repairing(&self) -> bool {
        self.is_scanning() || self.repairs.is_busy()
    }

    /// Takes one event.
    ///
    /// # Errors
    /// [`StoreError`] when the store failed: nothing more can be done.
    pub fn step(&mut self, at: Moment, event: Event) -> Result<Vec<Effect>, StoreError> {
        self.at = Moment { now_ms: at.now_ms.max(self.at.now_ms), unix_ms: at.unix_ms };
        match event {
            Event::SessionConnected { conn, peer } | Event::ProviderConnected { conn, peer } => {
                let is_refused = self.is_refused(&peer.key_hash);
                let connection = Connection { peer, session: None, provider: None };
                self.connections.insert(conn, connection);
                if is_refused {
                    self.refuse_connection(conn, us_core::wire::admission::REFUSED)?;
                }
            }
            Event::Met { peer } => self.met(peer)?,
            Event::Session { conn, up } => self.session_says(conn, up)?,
            Event::Provider { conn, up } => self.provider_says(conn, up)?,
            Event::Disconnected { conn } => self.disconnected(conn)?,
            Event::Written { seq } => self.now_written(seq),
            Event::Durable { seq } => {
                self.now_written(seq);
                self.synced = self.synced.max(seq);
            }
            Event::Ask { ask, question } => self.ask(ask, question)?,
            Event::AskedBy { ask, by, question } => {
                let role = by.role.as_str();
                self.asker = Some(registry::spoken(role, &by.name, &by.key_hash));
                self.asker_is = Some(by.clone());
                let is_refused = self.is_refused(by.key_hash.as_bytes());
                self.met(by)?;
                if is_refused {
                    let detail = us_core::wire::admission::REFUSED;
                    let answer = admin::refused(RefusalKind::Invalid, detail);
                    self.effects.push(Effect::Answer { ask, answer });
                } else {
                    self.ask(ask, question)?;
                }
                (self.asker, self.asker_is) = (None, None);
            }
            Event::Counted(slice) => self.counted(slice),
            Event::Tick => self.tick()?,
        }
        self.keep_up()?;
        self.run_awake()?;
        Ok(std::mem::take(&mut self.effects))
    }

    /// This directory stood still for `gap_ms` up to `now_ms`: its thread was busy, the machine slept.
    /// What peers sent meanwhile waits behind the next event, so the time is not charged to them.
    pub fn stood_still(&mut self, gap_ms: u64, now_ms: u64) {
        let shift = |at_ms: &mut u64| *at_ms = at_ms.saturating_add(gap_ms).min(now_ms);
        self.sessions.values_mut().for_each(|known| shift(&mut known.heard_ms));
        self.members.values_mut().for_each(|member| shift(&mut member.heard_ms));
        self.parked_longer(gap_ms);
        self.locks.wait_longer(gap_ms);
        self.repairs.jobs.wait_longer(gap_ms);
    }

    fn now_ms(&self) -> u64 {
        self.at.now_ms
    }

    /// The cluster's own time: it stands still while no directory runs and never goes back.
    fn clock_ms(&self) -> u64 {
        self.clock_base_ms + self.at.now_ms
    }

    fn send(&mut self, conn: ConnId, event: session_down::Event) {
        self.effects.push(Effect::Session { conn, down: SessionDown { event: Some(event) } });
    }

    fn send_session(&mut self, session: u64, event: session_down::Event) {
        let greeted = self.sessions.get(&session).filter(|session| session.greeted);
        if let Some(conn) = greeted.and_then(|session| session.conn) {
            self.send(conn, event);
        }
    }

    fn commit(&mut self, batch: WriteBatch, durability: Durability) -> Result<Seq, StoreError> {
        self.last_seq = self.store.commit(batch, durability)?;
        Ok(self.last_seq)
    }

    fn commit_cluster(&mut self, durability: Durability) -> Result<Seq, StoreError> {
        self.cluster.clock_ms = self.clock_ms();
        self.clock_stored_ms = self.cluster.clock_ms;
        let mut batch = WriteBatch::new();
        batch.put(keys::cluster(), encode(&self.cluster));
        self.commit(batch, durability)
    }

    /// Does something once `seq` is durable.
    fn then(&mut self, seq: Seq, then: Then) -> Result<(), StoreError> {
        if seq <= self.durable {
            return self.run_then(then);
        }
        self.after.entry(seq).or_default().push(then);
        Ok(())
    }

    fn run_then(&mut self, then: Then) -> Result<(), StoreError> {
        match then {
            Then::Send(conn, down) => self.effects.push(Effect::Session { conn, down: *down }),
            Then::Greet { conn, session, resumed } => self.greet(conn, session, resumed),
            Then::Ended { session, end } => self.ended(session, end)?,
            Then::Answer(ask, answer) => self.effects.push(Effect::Answer { ask, answer }),
            Then::Deletes => self.send_deletes()?,
            Then::Member { conn, provider } => self.welcome(conn, provider)?,
            Then::Left { conn } => self.say_left(conn),
            Then::Period(period) => self.begin_period(period),
            Then::Root => self.send_root()?,
        }
        Ok(())
    }

    /// Looks how far commits are durable now, here and where the copies are.
    fn advance_durable(&mut self) -> Result<(), StoreError> {
        let seq = self.durable_floor();
        if seq <= self.durable {
            return Ok(());
        }
        self.durable = seq;
        self.tell_durable();
        while let Some(entry) = self.after.first_entry() {
            if *entry.key() > self.durable {
                break;
            }
            for then in entry.remove() {
                self.run_then(then)?;
            }
        }
        while self.recent_order.front().is_some_and(|(seq, _)| *seq <= self.durable) {
            let Some((seq, keys)) = self.recent_order.pop_front() else { break };
            for key in keys {
                if self.recent.get(&key).is_some_and(|(_, latest)| *latest == seq) {
                    self.recent.remove(&key);
                }
            }
        }
        self.wake_durable();
        Ok(())
    }

    /// A transaction on a volume as it is now.
    fn tx(&self, volume: VolumeId) -> Option<Tx<'_>> {
        let known = self.volumes.get(&volume)?;
        let due_ms = self.clock_ms() + 2 * self.config.lease_ms;
        let tx = Tx::new(&*self.store, volume, known.code, due_ms);
        Some(tx.with_trash(self.trash_rule(known)))
    }

    /// Notes what a commit changed, so that no other session sees it before it is durable.
    fn note_recent(&mut self, session: u64, volume: VolumeId, touched: &[u64], seq: Seq) {
        if touched.is_empty() || seq <= self.durable {
            return;
        }
        let keys: Vec<InodeKey> = touched.iter().map(|ino| (volume, *ino)).collect();
        for key in &keys {
            self.recent.insert(*key, (session, seq));
        }
        self.recent_order.push_back((seq, keys));
    }

    /// Keeps the counters and the list of unsettled blocks up to date with a commit.
    fn note_blocks(&mut self, volume: VolumeId, changes: Vec<BlockChange>) {
        for change in changes {
            let key = (volume, change.block);
            let late = self.unsettled.get(&key).is_some_and(|unsettled| unsettled.late);
            self.note_placement(change.before.as_ref(), change.after.as_ref());
            self.note_pivot(key, change.after.as_ref());
            if let Some(before) = &change.before {
                self.counts.remove(before, late);
            }
            if !self.counts.complete {
                self.changed_while_counting.insert(key);
            }
            let settled =
                change.after.as_ref().is_none_or(|block| block.is_inline() || block.is_settled());
            if settled {
                self.settled(&key);
            } else {
                self.watch(key);
            }
            if let Some(after) = &change.after {
                self.counts.add(after, late && !settled);
                let is_new = change.before.is_none() && !after.is_inline();
                if is_new && after.birth < self.cluster.births_floor {
                    self.committed_late(key, after);
                }
            }
            let times = (self.now_ms(), self.config.clean_after_ms);
            self.cleaning.note(key, change.after.as_ref(), times);
            self.consider(key, change.after.as_ref());
        }
    }
}

impl Engine {
    /// Makes everything applied durable, at the end.
    ///
    /// # Errors
    /// [`StoreError`] when the store failed.
    pub fn shut_down(&mut self) -> Result<(), StoreError> {
        self.commit_cluster(Durability::Durable)?;
        Ok(())
    }
}
