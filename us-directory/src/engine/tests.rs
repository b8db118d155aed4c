//! The engine as mounts, providers and administrators see it, on a memory store that says what is
//! durable when the test says so.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use us_core::placement::Hybrid;
use us_proto::v1::fetch::Want;
use us_proto::v1::mutation::Op;
use us_proto::v1::provider_down::Event as PDown;
use us_proto::v1::provider_up::Event as PUp;
use us_proto::v1::session_down::Event as Down;
use us_proto::v1::session_up::Event as Up;
use us_proto::v1::*;

use super::leases::Level;
use super::*;
use crate::store::memory::MemoryStore;

mod access;
mod audits;
mod basics;
mod checks;
mod cleaning;
mod crash;
mod evenings;
mod garbage;
mod keeping;
mod leaving;
mod locks;
mod lying;
mod private;
mod quota;
mod registry;
mod repair;
mod routes;
mod siblings;
mod simulation;
mod swarm;
mod trash;

/// Counts up: distinct, and the same in every run.
struct Counting(u8);

impl Entropy for Counting {
    fn fill(&mut self, bytes: &mut [u8]) {
        self.0 = self.0.wrapping_add(1);
        bytes.fill(self.0);
    }
}

/// An engine, its time, and what it has sent to each connection.
pub(super) struct World {
    pub engine: Engine,
    history: Arc<Mutex<Vec<WriteBatch>>>,
    durable: usize,
    /// Every commit is durable at once.
    pub auto: bool,
    pub now_ms: u64,
    next_conn: u64,
    pub to_sessions: HashMap<u64, VecDeque<Down>>,
    pub to_providers: HashMap<u64, VecDeque<PDown>>,
    answers: VecDeque<Answer>,
    /// What the audits' job was given.
    pub audits: VecDeque<AuditPlan>,
    pub providers: Vec<(u64, u32)>,
    /// What the owners of all providers state of their lines, up and down, bytes a second.
    pub line: (u64, u64),
    /// What is free at each of them.
    pub free_bytes: u64,
    pub capacity_bytes: u64,
    trash_age_ms: u64,
}

fn engine_on(store: MemoryStore, trash_age_ms: u64) -> Engine {
    let (entropy, chooser) = (Box::new(Counting(0)), Box::<Hybrid>::default());
    let mut config = EngineConfig::default();
    // Who is silent is waited for as long as for one that has been known for weeks.
    config.clocks.newcomer_ms = config.clocks.dead_ms;
    config.trash_age_ms = trash_age_ms;
    Engine::start(Box::new(store), config, entropy, chooser, [7; 16]).unwrap()
}

impl World {
    pub fn new() -> Self {
        Self::with_trash_age(EngineConfig::default().trash_age_ms)
    }

    /// Files that are removed younger than this do not go to the trash.
    pub fn with_trash_age(trash_age_ms: u64) -> Self {
        let (store, history) = MemoryStore::manual();
        let mut world = Self {
            engine: engine_on(store, trash_age_ms),
            history,
            durable: 0,
            auto: true,
            now_ms: 0,
            next_conn: 1,
            to_sessions: HashMap::new(),
            to_providers: HashMap::new(),
            answers: VecDeque::new(),
            audits: VecDeque::new(),
            providers: Vec::new(),
            line: (0, 0),
            free_bytes: report().free_bytes,
            capacity_bytes: report().capacity_bytes,
            trash_age_ms,
        };
        world.make_durable();
        world
    }

    /// The directory dies; what is durable, and `more` commits, are all that is left.
    pub fn restart(&mut self, more: usize) {
        let mut batches = std::mem::take(&mut *self.history.lock());
        batches.truncate(self.durable + more);
        let (store, history) = MemoryStore::replay(batches);
        self.engine = engine_on(store, self.trash_age_ms);
        self.history = history;
        self.to_sessions.clear();
        self.to_providers.clear();
        self.providers.clear();
        self.now_ms = 0;
        self.make_durable();
    }

    pub fn undurable(&self) -> usize {
        self.history.lock().len() - self.durable
    }

    pub fn make_durable(&mut self) {
        let seq = self.history.lock().len();
        if seq > self.durable || seq as u64 > self.engine.durable {
            self.durable = seq;
            self.event(Event::Durable { seq: seq as u64 });
        }
    }

    pub fn event(&mut self, event: Event) {
        let at = Moment { now_ms: self.now_ms, unix_ms: 1_700_000_000_000 + self.now_ms };
        for effect in self.engine.step(at, event).unwrap() {
            match effect {
                Effect::Refuse(_) => {}
                Effect::Session { conn, down } => {
                    self.to_sessions.entry(conn.0).or_default().extend(down.event);
                }
                Effect::Provider { conn, down } => {
                    self.to_providers.entry(conn.0).or_default().extend(down.event);
                }
                Effect::End { .. } => {}
                Effect::Answer { answer: Answer::Audit(plan), .. } => self.audits.push_back(*plan),
                Effect::Answer { answer, .. } => self.answers.push_back(answer),
            }
        }
        assert!(self.engine.leases.is_consistent());
        if self.auto && self.history.lock().len() > self.durable {
            self.make_durable();
        }
    }

    pub fn pass(&mut self, ms: u64) {
        self.now_ms += ms;
        for (conn, _) in self.providers.clone() {
            let (uplink_bytes_per_s, downlink_bytes_per_s) = self.line;
            let (free_bytes, capacity_bytes) = (self.free_bytes, self.capacity_bytes);
            let line = ProviderReport {
                uplink_bytes_per_s,
                downlink_bytes_per_s,
                free_bytes,
                capacity_bytes,
                ..report()
            };
            self.provider_says(conn, PUp::Report(line));
        }
        self.event(Event::Tick);
    }

    pub fn ask(&mut self, question: Question) -> Answer {
        self.event(Event::Ask { ask: AskId(1), question });
        self.answers.pop_front().expect("an answer")
    }

    pub fn status(&mut self) -> StatusReply {
        match self.ask(Question::Status) {
            Answer::Status(status) => *status,
            other => panic!("{other:?}"),
        }
    }

    pub fn volume(&mut self, name: &str, s: u32, r: u32) {
        let question = NewVolume::named(name, s, r).into();
        assert!(matches!(self.ask(question), Answer::Volume(_)));
    }

    pub fn conn(&mut self) -> u64 {
        self.next_conn += 1;
        self.next_conn
    }

    /// A stream of a mount whose key is `key`.
    pub fn dial(&mut self, key: u8, open: OpenSession) -> u64 {
        let conn = self.conn();
        let (key_hash, name) = (vec![key; 32], format!("mount-{key}"));
        let peer = Peer { key_hash, name, ..Peer::default() };
        self.event(Event::SessionConnected { conn: ConnId(conn), peer });
        self.says(conn, Up::Open(open));
        conn
    }

    pub fn open(&mut self, key: u8, volume: &str) -> Mount {
        let open = OpenSession { volume: volume.to_owned(), ..Default::default() };
        let conn = self.dial(key, open);
        let session = match self.hear(conn) {
            Down::Opened(opened) => opened.session,
            other => panic!("{other:?}"),
        };
        assert!(matches!(self.hear(conn), Down::Providers(_)));
        let mut mount = Mount { key, conn, session, batch: 0, next_ino: 0, end_ino: 0, request: 0 };
        mount.lease_inodes(self, 1000);
        mount
    }

    pub fn says(&mut self, conn: u64, up: Up) {
        self.event(Event::Session { conn: ConnId(conn), up: SessionUp { event: Some(up) } });
    }

    pub fn provider_says(&mut self, conn: u64, up: PUp) {
        self.event(Event::Provider { conn: ConnId(conn), up: ProviderUp { event: Some(up) } });
    }

    pub fn heard(&mut self, conn: u64) -> Option<Down> {
        self.to_sessions.entry(conn).or_default().pop_front()
    }

    pub fn hear(&mut self, conn: u64) -> Down {
        self.heard(conn).expect("a message")
    }

    /// The first message that `pick` wants; those before it are dropped.
    pub fn hear_some<T>(&mut self, conn: u64, pick: impl Fn(&Down) -> Option<T>) -> Option<T> {
        while let Some(down) = self.heard(conn) {
            if let Some(found) = pick(&down) {
                return Some(found);
            }
        }
        None
    }

    pub fn provider(&mut self, key: u8, cookie: Bytes) -> (u64, u32, Bytes) {
        let conn = self.conn();
        let (key_hash, name) = (vec![key; 32], format!("provider-{key}"));
        let peer = Peer { key_hash, name, ..Peer::default() };
        self.event(Event::ProviderConnected { conn: ConnId(conn), peer });
        let hello = ProviderHello {
            address: format!("10.0.0.{key}:1"),
            store: vec![key; 16].into(),
            cookie,
            report: Some(report()),
            ..Default::default()
        };
        self.provider_says(conn, PUp::Hello(hello));
        let first = self.to_providers.entry(conn).or_default().pop_front();
        let Some(PDown::Welcome(welcome)) = first else { panic!("{first:?}") };
        self.provider_says(conn, PUp::Report(report()));
        self.providers.push((conn, welcome.provider));
        (conn, welcome.provider, welcome.cookie)
    }

    pub fn lose_provider(&mut self, provider: u32) {
        let at = self.providers.iter().position(|(_, id)| *id == provider).unwrap();
        let (conn, _) = self.providers.remove(at);
        self.event(Event::Disconnected { conn: ConnId(conn) });
    }
}

pub(super) fn report() -> ProviderReport {
    ProviderReport {
        capacity_bytes: 1 << 40,
        free_bytes: 1 << 39,
        accepts_puts: true,
        ..Default::default()
    }
}

/// A mount's side of a session.
#[derive(Clone, Debug)]
pub(super) struct Mount {
    pub key: u8,
    pub conn: u64,
    pub session: u64,
    pub batch: u64,
    next_ino: u64,
    end_ino: u64,
    request: u64,
}

pub(super) fn hash(name: &str) -> Bytes {
    let mut hash = [0; 16];
    hash[..name.len()].copy_from_slice(name.as_bytes());
    Bytes::copy_from_slice(&hash)
}

pub(super) fn at(seconds: i64) -> Option<Timestamp> {
    Some(Timestamp { seconds, nanos: 0 })
}

pub(super) fn create(dir: u64, name: &str, ino: u64, mode: u32) -> Op {
    Op::Create(Create {
        dir,
        name_hash: hash(name),
        sealed_name: hash(name),
        ino,
        mode,
        time: at(100),
        ..Default::default()
    })
}

pub(super) fn unlink(dir: u64, name: &str, ino: u64, open: bool) -> Op {
    let name_hash = hash(name);
    let (directory, time) = (false, at(200));
    Op::Unlink(Unlink { dir, name_hash, ino, directory, open, time, uid: Some(7) })
}

impl Mount {
    fn lease_inodes(&mut self, world: &mut World, count: u32) {
        world.says(self.conn, Up::LeaseInodes(LeaseInodes { request: 1, count }));
        let leased = world.hear_some(self.conn, |down| match down {
            Down::Inodes(leased) => Some(*leased),
            _ => None,
        });
        let leased = leased.expect("inode numbers");
        self.next_ino = leased.first;
        self.end_ino = leased.first + u64::from(leased.count);
    }

    pub fn ino(&mut self) -> u64 {
        self.next_ino += 1;
        assert!(self.next_ino <= self.end_ino);
        self.next_ino - 1
    }

    pub fn send(&mut self, world: &mut World, ops: Vec<Op>) {
        self.batch += 1;
        let mutations = ops.into_iter().map(|op| Mutation { op: Some(op) }).collect();
        world.says(self.conn, Up::Batch(Batch { number: self.batch, mutations, traces: vec![7] }));
    }

    /// Sends a batch that must be applied.
    pub fn change(&mut self, world: &mut World, ops: Vec<Op>) {
        self.send(world, ops);
        let number = self.batch;
        let applied = world.hear_some(self.conn, |down| match down {
            Down::Applied(applied) => Some(applied.number),
            Down::Ended(ended) => panic!("{ended:?}"),
            _ => None,
        });
        assert_eq!(applied, Some(number));
    }

    pub fn want(&mut self, world: &mut World, want: Want) -> u64 {
        self.request += 1;
        let fetch = Fetch { request: self.request, want: Some(want), trace: 7 };
        world.says(self.conn, Up::Fetch(fetch));
        self.request
    }

    pub fn answer(&self, world: &mut World) -> Option<Fetched> {
        world.hear_some(self.conn, |down| match down {
            Down::Fetched(fetched) => Some(fetched.clone()),
            _ => None,
        })
    }

    pub fn inode(&mut self, world: &mut World, ino: u64, level: Level) -> Option<Fetched> {
        let want = FetchInode { ino, level: level.to_wire() };
        self.want(world, Want::Inode(want));
        self.answer(world)
    }

    pub fn entry(&mut self, world: &mut World, dir: u64, name: &str) -> Option<Fetched> {
        let want = FetchEntry {
            dir,
            name_hash: hash(name),
            dir_level: Level::Shared.to_wire(),
            child_level: Level::Shared.to_wire(),
        };
        self.want(world, Want::Entry(want));
        self.answer(world)
    }

    pub fn recall(&self, world: &mut World) -> Option<Recall> {
        world.hear_some(self.conn, |down| match down {
            Down::Recall(recall) => Some(*recall),
            _ => None,
        })
    }

    pub fn give_back(&self, world: &mut World, recall: &Recall, open: bool) {
        let lease = InodeLease { ino: recall.ino, level: recall.level, open, grant: recall.grant };
        world.says(self.conn, Up::LeaseReturn(LeaseReturn { leases: vec![lease] }));
    }

    /// Dials again and resumes; returns what the directory says.
    pub fn resume(&mut self, world: &mut World, volume: &str) -> Down {
        let open = OpenSession {
            volume: volume.to_owned(),
            session: self.session,
            incarnation: 1,
            ..Default::default()
        };
        self.conn = world.dial(self.key, open);
        world.hear(self.conn)
    }
}
