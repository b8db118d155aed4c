//! fcntl byte-range locks of all sessions, those who wait for one, and who keeps the locks of which
//! file itself. Pure: no clock, no I/O; it is asked in the order of the engine's events.
//!
//! ```text
//!             nobody else has or wants a lock: LockReply.keep
//!   here  ---------------------------------------------------->  kept by a mount
//!    ^                                                                |
//!    '---- Locks, LockRequest or end of the session <-- RecallLocks --' somebody else asks
//! ```
//! Invariants:
//! - LOCK-1: two locks of different owners on overlapping bytes are both read locks;
//! - LOCK-2: while a session keeps a file's locks itself nobody else has one, is given one, or is
//!   told that there is none: who asks waits until they were said, or the session has ended;
//! - LOCK-3: who waits is answered in the step that removes what is in the way.
//!
//! Locks live as long as their session, in memory only; after a start each mount says its own before
//! its session counts as claimed, and until all have, nothing is given (`Grace`).

use std::collections::{BTreeMap, HashMap, VecDeque};

use us_core::ids::VolumeId;
use us_core::range_locks::{NotSet, RangeLock, RangeLocks, SESSION_LOCKS_MAX};
use us_proto::v1::{LockKind, LockReply};

use super::ConnId;
use super::leases::InodeKey;

/// Lock requests of all sessions that may wait at once.
const WAITERS_MAX: usize = 16_384;
/// What a session may say it has: locks it kept itself, and others that it was granted meanwhile.
const SAID_MAX: usize = 2 * SESSION_LOCKS_MAX;
/// Files of which anybody has locks, from which on no mount is told to keep any.
const FILES_MANY: usize = 1 << 20;

/// Who owns a lock: the kernel's owner, of a session.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct LockOwner {
    /// The session.
    pub session: u64,
    /// The kernel's number.
    pub owner: u64,
}

/// A lock of a session.
pub type Lock = RangeLock<LockOwner>;

/// A request for a lock.
#[derive(Clone, Copy, Debug)]
pub struct Asked {
    /// Where the answer goes.
    pub conn: ConnId,
    /// Its number there.
    pub request: u64,
    /// The lock, or what is to be released or tested.
    pub wanted: Lock,
    /// It is only asked who is in the way.
    pub test: bool,
    /// It waits for what is in the way.
    pub wait: bool,
    /// The mount can keep the file's locks itself.
    pub may_keep: bool,
    /// It is answered by then, one way or the other.
    pub deadline_ms: u64,
}

/// What a session says of its locks on a file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Said {
    /// It has these, and asks from now on. `kept`: it goes on keeping them.
    All { locks: Vec<Lock>, kept: bool },
    /// It keeps none: what is known here is true.
    Unchanged,
}

/// Sessions that have not said what they hold since the directory started: while there is another
/// of the volume, no lock is given, and nobody is told that there is none.
#[derive(Debug, Default)]
pub struct Grace {
    /// They, and their volumes.
    pub unclaimed: Vec<(u64, VolumeId)>,
}

impl Grace {
    /// Those that `session` waits for.
    fn others(&self, session: u64, key: &InodeKey) -> impl Iterator<Item = u64> {
        let of_volume = self.unclaimed.iter().filter(|(_, volume)| *volume == key.0);
        of_volume.map(|(other, _)| *other).filter(move |other| *other != session)
    }

    fn lasts(&self, session: u64, key: &InodeKey) -> bool {
        self.others(session, key).next().is_some()
    }
}

/// What happens to the locks.
#[derive(Debug)]
pub enum LockEvent {
    /// A session asks.
    Asked(InodeKey, Asked),
    /// A session says what it has. `claims`: it has not said all it holds since the directory started.
    Said { session: u64, key: InodeKey, said: Said, claims: bool },
    /// A session has a new connection: what it keeps it says on it.
    Resumed { session: u64 },
    /// It has said all.
    Claimed { session: u64 },
    /// A session ended durably.
    Ended { session: u64 },
    /// Requests of a connection have nobody left who waits.
    Lost(ConnId),
    /// Time has passed.
    Tick,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq)]
pub enum LockEffect {
    /// An answer.
    Reply(ConnId, LockReply),
    /// The session is to say the locks it keeps of the file.
    Recall { session: u64, ino: u64 },
    /// The session is in another's way: if it is silent it is to be shut out.
    InTheWay { session: u64 },
    /// The session broke a rule.
    Broken { session: u64, detail: String },
}

/// A session keeps a file's locks itself.
#[derive(Clone, Copy, Debug)]
struct Kept {
    by: u64,
    /// It was asked for them.
    recalled: bool,
    /// It has a new connection and has not said yet, on this one, that it keeps them.
    unsaid: bool,
}

#[derive(Debug, Default)]
struct FileLocks {
    held: RangeLocks<LockOwner>,
    /// In the order they came.
    waiting: VecDeque<Asked>,
    kept: Option<Kept>,
}

/// How many locks each session has here, over all files; a file that it keeps counts as one.
#[derive(Debug, Default)]
struct Counts(HashMap<u64, usize>);

impl Counts {
    fn of(&self, session: u64) -> usize {
        self.0.get(&session).copied().unwrap_or(0)
    }

    fn room(&self, session: u64) -> usize {
        SESSION_LOCKS_MAX.saturating_sub(self.of(session))
    }

    /// A file of which it had `before` has `now`.
    fn changed(&mut self, session: u64, before: usize, now: usize) {
        let count = self.0.entry(session).or_default();
        *count = (*count + now).saturating_sub(before);
        if *count == 0 {
            self.0.remove(&session);
        }
    }
}

/// All locks.
#[derive(Debug, Default)]
pub struct Locks {
    files: HashMap<InodeKey, FileLocks>,
    counts: Counts,
    /// How many wait, by file.
    waiting: BTreeMap<InodeKey, usize>,
    waiters: usize,
}

/// How a request stands.
enum Verdict {
    Answer(LockReply),
    /// For another's lock.
    Blocked(Lock),
    /// For what somebody keeps or has not said.
    Undecided,
}

impl Locks {
    /// Takes one event.
    pub fn step(&mut self, now_ms: u64, grace: &Grace, event: LockEvent) -> Vec<LockEffect> {
        let mut effects = Vec::new();
        match event {
            LockEvent::Asked(key, asked) => self.asked(grace, key, asked, &mut effects),
            LockEvent::Said { session, key, said, claims } => {
                self.said(session, &key, said, claims, &mut effects);
                self.retry(grace, &key, &mut effects);
            }
            LockEvent::Resumed { session } => {
                for kept in self.kept_by(session) {
                    kept.unsaid = true;
                }
            }
            LockEvent::Claimed { session } => {
                for file in self.files.values_mut() {
                    if file.kept.take_if(|kept| kept.by == session && kept.unsaid).is_some() {
                        self.counts.changed(session, 1, 0);
                    }
                }
                self.retry_all(grace, &mut effects);
                self.tidy_all();
            }
            LockEvent::Ended { session } => {
                for file in self.files.values_mut() {
                    file.held.retain(|by| by.session != session);
                    file.kept.take_if(|kept| kept.by == session);
                }
                self.counts.0.remove(&session);
                self.drop_waiters(|asked| asked.wanted.by.session == session);
                self.retry_all(grace, &mut effects);
                self.tidy_all();
            }
            LockEvent::Lost(conn) => self.drop_waiters(|asked| asked.conn == conn),
            LockEvent::Tick => {
                self.retry_all(grace, &mut effects);
                self.end_waits(now_ms, grace, &mut effects);
            }
        }
        effects
    }

    /// Requests that wait may wait so much longer.
    pub fn wait_longer(&mut self, by_ms: u64) {
        for asked in self.files.values_mut().flat_map(|file| &mut file.waiting) {
            asked.deadline_ms = asked.deadline_ms.saturating_add(by_ms);
        }
    }

    fn kept_by(&mut self, session: u64) -> impl Iterator<Item = &mut Kept> {
        let kept = self.files.values_mut().filter_map(|file| file.kept.as_mut());
        kept.filter(move |kept| kept.by == session)
    }

    fn asked(&mut self, grace: &Grace, key: InodeKey, asked: Asked, effects: &mut Vec<LockEffect>) {
        let many = self.files.len() >= FILES_MANY;
        let session = asked.wanted.by.session;
        let file = self.files.entry(key).or_default();
        // Who asks does not keep them: its question crossed the answer that said it may.
        let given_up = file.kept.take_if(|kept| kept.by == session).is_some();
        self.counts.changed(session, usize::from(given_up), 0);
        let mut reply = match file.decide(grace, &key, &asked, &mut self.counts, effects) {
            Verdict::Answer(reply) => reply,
            verdict @ (Verdict::Blocked(_) | Verdict::Undecided) => {
                let waits = asked.wait || matches!(verdict, Verdict::Undecided);
                if waits && self.waiters < WAITERS_MAX {
                    file.waiting.push_back(asked);
                    *self.waiting.entry(key).or_default() += 1;
                    self.waiters += 1;
                    return if given_up {
                        self.retry(grace, &key, effects)
                    };
                }
                refused(&asked, &verdict)
            }
        };
        let may_keep = asked.may_keep && !many && self.counts.room(session) > 0;
        if may_keep && file.is_alone(grace, &key, &asked) && !reply.too_many {
            self.counts.changed(session, 0, 1);
            reply.keep = true;
            file.kept = Some(Kept { by: session, recalled: false, unsaid: false });
        }
        effects.push(LockEffect::Reply(asked.conn, reply));
        self.retry(grace, &key, effects);
    }

    fn said(
        &mut self,
        session: u64,
        key: &InodeKey,
        said: Said,
        claims: bool,
        effects: &mut Vec<LockEffect>,
    ) {
        let file = self.files.entry(*key).or_default();
        let kept = file.kept.take_if(|kept| kept.by == session).is_some();
        self.counts.changed(session, usize::from(kept), 0);
        let Said::All { locks, kept: goes_on } = said else { return };
        let before = file.held_by(session);
        let others = file.held.held().iter().any(|lock| lock.by.session != session);
        let others_keep = file.kept.is_some();
        let may_go_on = kept || (claims && !others_keep && !others);
        let may_have = !others_keep || locks.is_empty();
        let fits = may_have && file.held.replace(|by| by.session == session, locks);
        self.counts.changed(session, before, file.held_by(session) + usize::from(goes_on));
        if self.counts.of(session) > SAID_MAX {
            let detail = format!("it has more than {SAID_MAX} locks");
            effects.push(LockEffect::Broken { session, detail });
        }
        if !fits || (goes_on && !may_go_on) {
            self.counts.changed(session, usize::from(goes_on), 0);
            let detail = format!("inode {}: its locks cannot be what it says they are", key.1);
            effects.push(LockEffect::Broken { session, detail });
        } else if goes_on {
            file.kept = Some(Kept { by: session, recalled: false, unsaid: false });
        }
    }

    /// Tries the requests that wait for locks of a file, in the order they came, until none can be
    /// answered.
    fn retry(&mut self, grace: &Grace, key: &InodeKey, effects: &mut Vec<LockEffect>) {
        let Some(file) = self.files.get_mut(key) else { return };
        let before = file.waiting.len();
        let mut again = before > 0;
        while again {
            again = false;
            for asked in std::mem::take(&mut file.waiting) {
                match file.decide(grace, key, &asked, &mut self.counts, effects) {
                    Verdict::Answer(reply) => {
                        effects.push(LockEffect::Reply(asked.conn, reply));
                        // A lock that takes the place of a stronger one lets others in.
                        again = true;
                    }
                    verdict @ Verdict::Blocked(_) if !asked.wait => {
                        effects.push(LockEffect::Reply(asked.conn, refused(&asked, &verdict)));
                    }
                    Verdict::Blocked(_) | Verdict::Undecided => file.waiting.push_back(asked),
                }
            }
        }
        let waiting = file.waiting.len();
        self.waits_now(key, before, waiting);
        self.tidy(key);
    }

    fn retry_all(&mut self, grace: &Grace, effects: &mut Vec<LockEffect>) {
        let keys: Vec<InodeKey> = self.waiting.keys().copied().collect();
        keys.iter().for_each(|key| self.retry(grace, key, effects));
    }

    fn waits_now(&mut self, key: &InodeKey, before: usize, now: usize) {
        self.waiters = self.waiters + now - before;
        if now == 0 {
            self.waiting.remove(key);
        } else {
            self.waiting.insert(*key, now);
        }
    }

    fn drop_waiters(&mut self, gone: impl Fn(&Asked) -> bool) {
        let keys: Vec<InodeKey> = self.waiting.keys().copied().collect();
        for key in keys {
            let Some(file) = self.files.get_mut(&key) else { continue };
            let before = file.waiting.len();
            file.waiting.retain(|asked| !gone(asked));
            let now = file.waiting.len();
            self.waits_now(&key, before, now);
            self.tidy(&key);
        }
    }

    /// Answers requests that waited long enough.
    fn end_waits(&mut self, now_ms: u64, grace: &Grace, effects: &mut Vec<LockEffect>) {
        for key in self.waiting.keys() {
            let Some(file) = self.files.get_mut(key) else { continue };
            let is_late = |asked: &Asked| asked.deadline_ms <= now_ms;
            for asked in file.waiting.iter().copied().filter(is_late).collect::<Vec<_>>() {
                let verdict = file.decide(grace, key, &asked, &mut self.counts, effects);
                effects.push(LockEffect::Reply(asked.conn, refused(&asked, &verdict)));
            }
        }
        self.drop_waiters(|asked| asked.deadline_ms <= now_ms);
    }

    fn tidy(&mut self, key: &InodeKey) {
        if self.files.get(key).is_some_and(FileLocks::is_nothing) {
            self.files.remove(key);
        }
    }

    fn tidy_all(&mut self) {
        self.files.retain(|_, file| !file.is_nothing());
    }
}

impl FileLocks {
    /// How a request stands now; grants it where nothing is in the way.
    fn decide(
        &mut self,
        grace: &Grace,
        key: &InodeKey,
        asked: &Asked,
        counts: &mut Counts,
        effects: &mut Vec<LockEffect>,
    ) -> Verdict {
        let (wanted, request, session) = (asked.wanted, asked.request, asked.wanted.by.session);
        let reply = |granted| LockReply { request, granted, ..LockReply::default() };
        if wanted.kind != LockKind::Unlock {
            if let Some(kept) = self.kept.as_mut().filter(|kept| kept.by != session) {
                if !std::mem::replace(&mut kept.recalled, true) {
                    effects.push(LockEffect::Recall { session: kept.by, ino: key.1 });
                }
                effects.push(LockEffect::InTheWay { session: kept.by });
                return Verdict::Undecided;
            }
            if grace.lasts(session, key) {
                let others = grace.others(session, key);
                effects.extend(others.map(|session| LockEffect::InTheWay { session }));
                return Verdict::Undecided;
            }
        }
        let tested =
            self.held.in_the_way(&wanted).map_or(Ok(()), |held| Err(NotSet::InTheWay(held)));
        match if asked.test { tested } else { self.set(wanted, counts) } {
            Ok(()) => Verdict::Answer(reply(true)),
            Err(NotSet::TooMany) => Verdict::Answer(LockReply { too_many: true, ..reply(false) }),
            Err(NotSet::InTheWay(held)) => {
                if held.by.session != session {
                    effects.push(LockEffect::InTheWay { session: held.by.session });
                }
                Verdict::Blocked(held)
            }
        }
    }

    /// Sets a lock, as far as its session has room for one more.
    fn set(&mut self, wanted: Lock, counts: &mut Counts) -> Result<(), NotSet<LockOwner>> {
        let session = wanted.by.session;
        let before = self.held_by(session);
        let set = self.held.set_within(wanted, counts.room(session));
        counts.changed(session, before, self.held_by(session));
        set
    }

    fn held_by(&self, session: u64) -> usize {
        self.held.held().iter().filter(|lock| lock.by.session == session).count()
    }

    /// Whether the session that asks may keep the file's locks from now on.
    fn is_alone(&self, grace: &Grace, key: &InodeKey, asked: &Asked) -> bool {
        let session = asked.wanted.by.session;
        asked.wanted.kind != LockKind::Unlock
            && self.kept.is_none()
            && self.waiting.is_empty()
            && !grace.lasts(session, key)
            && self.held.held().iter().all(|lock| lock.by.session == session)
    }

    fn is_nothing(&self) -> bool {
        self.held.held().is_empty() && self.waiting.is_empty() && self.kept.is_none()
    }
}

/// The answer to a request that waits no longer.
fn refused(asked: &Asked, verdict: &Verdict) -> LockReply {
    let mut reply = LockReply { request: asked.request, ..LockReply::default() };
    match verdict {
        Verdict::Answer(answer) => return *answer,
        Verdict::Undecided => reply.undecided = true,
        Verdict::Blocked(held) => {
            reply.blocking_kind = held.kind as i32;
            reply.blocking_start = held.start;
            reply.blocking_end = held.end;
            let own = held.by.session == asked.wanted.by.session;
            reply.blocking_pid = if own { held.pid } else { 0 };
        }
    }
    reply
}
