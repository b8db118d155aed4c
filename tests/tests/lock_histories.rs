//! Seeded histories of byte-range locks: mounts with many programs (the mount's own state machine)
//! and a directory (its own engine) under virtual time.
//!
//! Fault budget: messages are late, every stream on its own; connections break and take what was on
//! its way with them; the directory dies and starts again; a mount hangs for longer than the fence,
//! or dies; programs give up waiting, close, and die.
//!
//! Checked at every step: no two programs that may trust their locks have locks that exclude each
//! other; a test finds every lock that was there all the while it was asked; nobody is refused where
//! nothing can have been in the way. Whenever all is quiet: whoever still waits has a reason. At the
//! end: every lock is found from another mount, and when all have closed, everything is free.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

#[path = "lock_histories/checks.rs"]
mod checks;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use rand::prelude::*;
use us_core::geometry::Code;
use us_core::ids::Ino;
use us_core::name::NameKey;
use us_core::placement::Hybrid;
use us_core::seal::VolumeKey;
use us_directory::engine::{
    AskId, ConnId, Effect, Engine, EngineConfig, Event, Moment, NewVolume, Peer, SystemEntropy,
};
use us_directory::store::WriteBatch;
use us_directory::store::memory::MemoryStore;
use us_proto::v1::session_down::Event as Down;
use us_proto::v1::session_up::Event as Up;
use us_proto::v1::{LockKind, OpenSession, Renew, SessionUp};
use us_tests::tier;
use usfs::attributes::FileTime;
use usfs::core::locks::{LockAsk, LockEvent, LockOutcome, Locked, OwnLock};
use usfs::core::{Core, CoreConfig, Effect as CoreEffect, Now};

const STEPS: usize = 400;
const OWNERS: u64 = 3;
const FILES: u64 = 2;
const BYTES: usize = 6;
const LEASE_MS: u64 = 30_000;

/// A lock a program believes in, and since which step.
type Believed = [(LockKind, usize); BYTES];

/// A request of a program that is not answered.
#[derive(Clone, Debug)]
struct Asking {
    ino: u64,
    ask: LockAsk,
    at: usize,
}

struct MountSim {
    core: Core,
    key: u8,
    session: u64,
    conn: Option<u64>,
    opened: bool,
    asked_open_at: u64,
    up: VecDeque<Up>,
    down: VecDeque<Down>,
    renewals: VecDeque<u64>,
    renewed_at: u64,
    /// Nothing moves on its connection before.
    stalled_until: u64,
    trusted_until: u64,
    asking: BTreeMap<u64, Asking>,
    believed: BTreeMap<(u64, u64), Believed>,
    /// Owners and files of requests that were given up.
    gave_up: BTreeSet<(u64, u64)>,
    /// Killed: its stream is silent.
    dead: bool,
}

struct Sim {
    engine: Engine,
    history: Arc<Mutex<Vec<WriteBatch>>>,
    now_ms: u64,
    started_ms: u64,
    next_conn: u64,
    mounts: Vec<MountSim>,
    /// By mount, owner, file: the last step at which it can have had a lock on a byte.
    possible: BTreeMap<(usize, u64, u64), [usize; BYTES]>,
    /// Of nobody knows whom: killed mounts, requests that were given up.
    ghosts: BTreeSet<u64>,
    durable: u64,
    /// Whether mounts are killed in this history.
    kills: bool,
    random: StdRng,
    step: usize,
    kept_seen: u64,
    /// Requests that waited when all was quiet, and had a reason.
    waits_seen: u64,
    granted: u64,
}

fn engine_on(store: MemoryStore) -> Engine {
    let (entropy, chooser) = (Box::new(SystemEntropy), Box::<Hybrid>::default());
    Engine::start(Box::new(store), EngineConfig::default(), entropy, chooser, [7; 16]).unwrap()
}

fn core() -> Core {
    let key = VolumeKey::from_bytes([3; 32].into());
    Core::new(CoreConfig {
        names: NameKey::new(&key),
        code: Code::new(4, 2).unwrap(),
        read_only: false,
        no_atime: false,
        dirty_bytes_max: 1 << 20,
        nodes_max: 1000,
    })
}

fn excludes(a: LockKind, b: LockKind) -> bool {
    let none = a == LockKind::Unlock || b == LockKind::Unlock;
    !none && (a == LockKind::Write || b == LockKind::Write)
}

fn bytes(lock: &OwnLock) -> std::ops::Range<usize> {
    lock.start as usize..(lock.end.min(BYTES as u64 - 1) + 1) as usize
}

impl MountSim {
    fn now(&self, now_ms: u64) -> Now {
        Now { boot: Duration::from_millis(now_ms), wall: FileTime { seconds: 1, nanos: 0 } }
    }

    fn trusts(&self, now_ms: u64) -> bool {
        !self.dead && self.core.ended().is_none() && now_ms < self.trusted_until
    }

    fn trust(&mut self, asked_at: u64) {
        self.trusted_until = asked_at + LEASE_MS / 10 * 9;
        self.core.trust_until(Duration::from_millis(self.trusted_until));
    }

    fn believes(&mut self, owner: u64, ino: u64) -> &mut Believed {
        self.believed.entry((owner, ino)).or_insert([(LockKind::Unlock, 0); BYTES])
    }

    fn is_asking(&self, owner: u64, ino: u64) -> bool {
        self.asking.values().any(|known| known.ino == ino && known.ask.wanted.by == owner)
    }

    /// It is over, or was killed: nobody believes in anything of it.
    fn forget(&mut self) {
        self.asking.clear();
        self.believed.clear();
    }
}

impl Sim {
    fn new(seed: u64) -> Self {
        let (store, history) = MemoryStore::manual();
        let mut sim = Self {
            engine: engine_on(store),
            history,
            now_ms: 1,
            started_ms: 0,
            next_conn: 1,
            mounts: Vec::new(),
            possible: BTreeMap::new(),
            ghosts: BTreeSet::new(),
            durable: 0,
            kills: seed.is_multiple_of(2),
            random: StdRng::seed_from_u64(seed),
            step: 1,
            kept_seen: 0,
            waits_seen: 0,
            granted: 0,
        };
        let question = NewVolume::named("v", 4, 2).into();
        sim.event(Event::Ask { ask: AskId(1), question });
        for key in 0..2 + sim.random.random_range(0..2) {
            let mount = sim.fresh(key);
            sim.mounts.push(mount);
        }
        for index in 0..sim.mounts.len() {
            sim.connect(index);
        }
        sim
    }

    fn fresh(&self, key: u8) -> MountSim {
        MountSim {
            core: core(),
            key,
            session: 0,
            conn: None,
            opened: false,
            asked_open_at: 0,
            up: VecDeque::new(),
            down: VecDeque::new(),
            renewals: VecDeque::new(),
            renewed_at: 0,
            stalled_until: 0,
            trusted_until: 0,
            asking: BTreeMap::new(),
            believed: BTreeMap::new(),
            gave_up: BTreeSet::new(),
            dead: false,
        }
    }

    fn event(&mut self, event: Event) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            let now_ms = self.now_ms - self.started_ms;
            let at = Moment { now_ms, unix_ms: 1_700_000_000_000 + self.now_ms };
            for effect in self.engine.step(at, event).unwrap() {
                let Effect::Session { conn, down } = effect else { continue };
                let to = self.mounts.iter_mut().find(|mount| mount.conn == Some(conn.0));
                if let Some(mount) = to {
                    mount.down.extend(down.event);
                }
            }
            let seq = self.history.lock().len() as u64;
            if seq > self.durable {
                self.durable = seq;
                events.push_back(Event::Durable { seq });
            }
        }
    }

    fn connect(&mut self, index: usize) {
        let (conn, now_ms) = (self.next_conn, self.now_ms);
        self.next_conn += 1;
        let mount = &mut self.mounts[index];
        mount.conn = Some(conn);
        (mount.opened, mount.asked_open_at) = (false, now_ms);
        mount.up.clear();
        mount.down.clear();
        mount.renewals.clear();
        let open = OpenSession {
            volume: "v".to_owned(),
            session: mount.session,
            incarnation: 1,
            ..Default::default()
        };
        mount.up.push_back(Up::Open(open));
        let peer =
            Peer { key_hash: vec![mount.key; 32], name: "mount".to_owned(), ..Peer::default() };
        self.event(Event::SessionConnected { conn: ConnId(conn), peer });
    }

    fn break_off(&mut self, index: usize) {
        let mount = &mut self.mounts[index];
        // A session that nobody has heard of is as one whose mount was killed.
        self.kills |= mount.session == 0;
        mount.opened = false;
        mount.up.clear();
        mount.down.clear();
        mount.core.log().pause();
        if let Some(conn) = mount.conn.take() {
            self.event(Event::Disconnected { conn: ConnId(conn) });
        }
    }

    fn restart_directory(&mut self) {
        let batches = std::mem::take(&mut *self.history.lock());
        let (store, history) = MemoryStore::replay(batches);
        self.engine = engine_on(store);
        self.history = history;
        self.started_ms = self.now_ms;
        self.durable = 0;
        for mount in &mut self.mounts {
            self.kills |= mount.session == 0;
            mount.conn = None;
            mount.opened = false;
            mount.up.clear();
            mount.down.clear();
            mount.core.log().pause();
        }
        self.event(Event::Tick);
    }

    /// What the mount has to say goes out.
    fn pump(&mut self, index: usize) {
        let mount = &mut self.mounts[index];
        if mount.opened && !mount.dead {
            let mut out = Vec::new();
            mount.core.take_outgoing(64, &mut out);
            mount.up.extend(out);
        }
    }

    fn arrives(&mut self, index: usize) {
        let mount = &mut self.mounts[index];
        let Some(conn) = mount.conn.filter(|_| self.now_ms >= mount.stalled_until) else { return };
        if let Some(up) = mount.up.pop_front() {
            let up = SessionUp { event: Some(up) };
            self.event(Event::Session { conn: ConnId(conn), up });
        }
    }

    fn hears(&mut self, index: usize) {
        let now_ms = self.now_ms;
        let mount = &mut self.mounts[index];
        if now_ms < mount.stalled_until || mount.dead {
            return;
        }
        let Some(down) = mount.down.pop_front() else { return };
        let now = mount.now(now_ms);
        match down {
            Down::Opened(opened) => {
                mount.opened = true;
                mount.trust(mount.asked_open_at);
                mount.renewed_at = now_ms;
                if opened.resumed {
                    assert!(mount.core.log().resume(opened.applied));
                    mount.core.resend_requests();
                    let claims = mount.core.claim_locks();
                    mount.up.extend(claims);
                    mount.up.extend(mount.core.reclaims().into_iter().map(Up::Reclaim));
                }
                mount.session = opened.session;
            }
            Down::Renewed(_) => {
                let asked_at = mount.renewals.pop_front().unwrap();
                mount.trust(asked_at);
            }
            Down::Ended(ended) => {
                let fenced = us_proto::v1::EndReason::Fenced as i32;
                assert_eq!(ended.reason, fenced, "{ended:?}");
                mount.core.end("fenced".to_owned());
                (mount.conn, mount.opened) = (None, false);
                mount.forget();
            }
            other => {
                if let Some(CoreEffect::Locked(locked)) = mount.core.on_down(now, other) {
                    self.ended(index, &locked);
                }
            }
        }
    }

    fn lock_event(&mut self, index: usize, event: LockEvent) {
        let now_ms = self.now_ms;
        let mount = &mut self.mounts[index];
        let now = mount.now(now_ms);
        let locked = mount.core.step_locks(now, event);
        let granted = locked.done.iter().filter(|(_, outcome)| *outcome == LockOutcome::Granted);
        for (number, _) in granted {
            let mount = &self.mounts[index];
            let release = mount.asking[number].ask.wanted.kind == LockKind::Unlock;
            assert!(release || mount.trusts(now_ms), "mount {index} grants what it cannot know");
        }
        self.ended(index, &locked);
    }

    /// Programs hear how their requests ended.
    fn ended(&mut self, index: usize, locked: &Locked) {
        for (number, outcome) in &locked.done {
            let Some(asking) = self.mounts[index].asking.remove(number) else { continue };
            self.check_outcome(index, &asking, *outcome);
            let LockAsk { wanted, test, .. } = asking.ask;
            if *outcome == LockOutcome::Granted && !test {
                self.granted += 1;
                let step = self.step;
                let mount = &mut self.mounts[index];
                let believed = mount.believes(wanted.by, asking.ino);
                bytes(&wanted).for_each(|at| believed[at] = (wanted.kind, step));
            }
        }
        self.kept_seen += (1..=FILES)
            .filter(|ino| self.mounts[index].core.locks().keeps(Ino(*ino)))
            .count() as u64;
    }

    fn ask(&mut self, index: usize, owner: u64, ino: u64, ask: LockAsk) {
        let at = self.step;
        let mount = &mut self.mounts[index];
        if mount.core.ended().is_some() || mount.dead {
            return;
        }
        // As the session numbers all its requests.
        let number = mount.core.request_number();
        let wanted = ask.wanted;
        if !ask.test {
            for byte in &mut mount.believes(owner, ino)[bytes(&wanted)] {
                // Whoever gives something up does not count on it from then on.
                byte.0 = byte.0.min(wanted.kind);
            }
        }
        mount.asking.insert(number, Asking { ino, ask, at });
        self.note_possible();
        self.lock_event(index, LockEvent::Asked { number, ino: Ino(ino), ask });
    }

    fn random_ask(&mut self, index: usize) {
        let random = &mut self.random;
        let (owner, ino) = (random.random_range(0..OWNERS), random.random_range(1..=FILES));
        let (from, to) = (random.random_range(0..BYTES), random.random_range(0..BYTES));
        let (start, mut end) = (from.min(to) as u64, from.max(to) as u64);
        if end == BYTES as u64 - 1 {
            end = u64::MAX;
        }
        let kind = [LockKind::Read, LockKind::Write, LockKind::Write, LockKind::Unlock]
            [random.random_range(0..4)];
        let test = kind != LockKind::Unlock && random.random_bool(0.15);
        let wait_ms = if !test && random.random_bool(0.5) { 10_000 } else { 0 };
        if self.mounts[index].is_asking(owner, ino) {
            return;
        }
        let wanted = OwnLock { by: owner, start, end, kind, pid: 7 };
        self.ask(index, owner, ino, LockAsk { wanted, test, wait_ms });
    }

    fn close(&mut self, index: usize, owner: u64, ino: u64) {
        let free = OwnLock { by: owner, start: 0, end: u64::MAX, kind: LockKind::Unlock, pid: 0 };
        self.ask(index, owner, ino, LockAsk { wanted: free, test: false, wait_ms: 0 });
    }

    fn give_up(&mut self, index: usize) {
        let asking = &self.mounts[index].asking;
        let Some(number) = asking.keys().copied().choose(&mut self.random) else { return };
        self.gives_up(index, number);
    }

    fn gives_up(&mut self, index: usize, number: u64) {
        self.lock_event(index, LockEvent::GivenUp { number });
        let mount = &mut self.mounts[index];
        if let Some(asking) = mount.asking.remove(&number) {
            mount.gave_up.insert((asking.ask.wanted.by, asking.ino));
            self.ghosts.insert(asking.ino);
        }
    }

    /// A program dies with all it has.
    fn die(&mut self, index: usize) {
        let owner = self.random.random_range(0..OWNERS);
        let of_owner = |asking: &Asking| asking.ask.wanted.by == owner;
        let asking = self.mounts[index].asking.iter().filter(|(_, asking)| of_owner(asking));
        for number in asking.map(|(number, _)| *number).collect::<Vec<_>>() {
            self.gives_up(index, number);
        }
        (1..=FILES).for_each(|ino| self.close(index, owner, ino));
    }

    fn pass(&mut self, ms: u64) {
        self.now_ms += ms;
        for index in 0..self.mounts.len() {
            let now_ms = self.now_ms;
            let mount = &mut self.mounts[index];
            let due = now_ms >= mount.renewed_at + LEASE_MS / 3;
            if mount.opened && due && now_ms >= mount.stalled_until && !mount.dead {
                mount.renewed_at = now_ms;
                mount.renewals.push_back(now_ms);
                mount.up.push_back(Up::Renew(Renew::default()));
            }
        }
        self.event(Event::Tick);
    }

    fn random_step(&mut self) {
        self.step += 1;
        let index = self.random.random_range(0..self.mounts.len());
        match self.random.random_range(0..1000) {
            0..300 => self.random_ask(index),
            300..480 => self.pump(index),
            480..660 => self.arrives(index),
            660..840 => self.hears(index),
            840..880 => {
                let ms = self.random.random_range(0..2_000);
                self.pass(ms);
            }
            880..900 => self.give_up(index),
            900..920 => self.die(index),
            920..935 => {
                let ino = self.random.random_range(1..=FILES);
                self.lock_event(index, LockEvent::Closed(Ino(ino)));
            }
            935..945 => self.break_off(index),
            945..960 if self.mounts[index].conn.is_none() => self.reconnect(index),
            980..984 => self.restart_directory(),
            984..988 => self.mounts[index].stalled_until = self.now_ms + 80_000,
            988..991 if self.kills => self.kill(index),
            991..995 => self.pass(50_000),
            995..999 => self.settle(),
            960..980 => self.look(),
            999 => self.heal(),
            _ => {}
        }
        self.note_possible();
    }

    fn reconnect(&mut self, index: usize) {
        let mount = &self.mounts[index];
        if mount.dead || mount.core.ended().is_some() {
            // Somebody mounts again.
            self.mounts[index] = self.fresh(mount.key);
        }
        self.connect(index);
    }

    /// kill -9 of a mount: its programs have nothing any more, and the directory hears nothing.
    fn kill(&mut self, index: usize) {
        let mount = &mut self.mounts[index];
        mount.dead = true;
        mount.forget();
        self.ghosts.extend(1..=FILES);
        // Its locks are in the way until it is shut out.
        if self.random.random_bool(0.5) {
            self.break_off(index);
        }
    }

    /// Whoever is away comes back, and all messages arrive.
    fn settle(&mut self) {
        for _ in 0..3 {
            for index in 0..self.mounts.len() {
                let mount = &mut self.mounts[index];
                mount.stalled_until = mount.stalled_until.min(self.now_ms);
                if mount.conn.is_none() && !mount.dead {
                    self.reconnect(index);
                }
            }
            self.pass(1);
            self.quiet();
        }
    }

    /// All messages arrive; nobody waits for the clock to tell him what he waits for.
    fn look(&mut self) {
        for mount in &mut self.mounts {
            mount.stalled_until = mount.stalled_until.min(self.now_ms);
        }
        self.quiet();
        let here = |mount: &MountSim| mount.opened && mount.trusts(self.now_ms);
        if !self.kills && self.mounts.iter().all(here) {
            self.check_waiters();
        }
    }

    /// And as much time passes as it takes for the dead to be given up.
    fn heal(&mut self) {
        for index in 0..self.mounts.len() {
            if self.mounts[index].dead {
                self.break_off(index);
                self.reconnect(index);
            }
        }
        for _ in 0..20 {
            self.settle();
            self.pass(6_000);
        }
        self.settle();
    }

    fn quiet(&mut self) {
        self.step += 1;
        let mut moved = true;
        while std::mem::take(&mut moved) {
            for index in 0..self.mounts.len() {
                self.pump(index);
                while self.mounts[index].conn.is_some() && !self.mounts[index].up.is_empty() {
                    self.arrives(index);
                    moved = true;
                }
            }
            for index in 0..self.mounts.len() {
                while !self.mounts[index].dead && !self.mounts[index].down.is_empty() {
                    self.hears(index);
                    self.note_possible();
                    moved = true;
                }
            }
        }
    }
}

/// Histories of the tier; what all of them came to.
fn histories(first: u64, count: u64) -> (u64, u64, u64) {
    let mut all = (0, 0, 0);
    for seed in first..first + count {
        let run = std::panic::catch_unwind(|| {
            let mut sim = Sim::new(seed);
            (0..STEPS).for_each(|_| sim.random_step());
            sim.check_end();
            (sim.granted, sim.kept_seen, sim.waits_seen)
        });
        let Ok(ended) = run else { panic!("seed {seed}") };
        all = (all.0 + ended.0, all.1 + ended.1, all.2 + ended.2);
    }
    all
}

#[test]
fn locks_of_several_mounts_exclude_each_other_and_none_is_lost() {
    let count = u64::from(tier::rounds(2_000, 40_000, 400_000));
    let begun = std::time::Instant::now();
    let (granted, kept, waits) = histories(tier::seed(), count);
    eprintln!(
        "{granted} locks granted, {kept} times one kept, {waits} waits, {:?}",
        begun.elapsed()
    );
    assert!(granted > 10 * count && kept > count && waits > count, "the histories are too quiet");
}
