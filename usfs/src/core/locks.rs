//! The byte-range locks of this mount's programs, file by file: a copy of what the directory has of
//! them, or, of a file that the directory let it *keep*, the only place where they are. Pure.
//!
//! ```text
//!   asked of the directory  --- LockReply.keep, none other on its way --->  kept here
//!          ^                                                                   |
//!          '--- Locks: recalled, nobody has it open any more, not trusted -----'
//! ```
//! Messages of one session have one order, and so have the answers: what a mount says with `Locks`
//! stands behind everything it asked before, and a recall arrives behind the answer that it recalls.
//!
//! Invariants:
//! - LOCK-4: locks are granted here only while the file is kept and the session is trusted; it is
//!   kept from an answer whose question was asked after the last recall (the file's `epoch`) and
//!   behind which none is on its way, so that the answer is true when it is believed;
//! - LOCK-5: while a file is not kept, `own` is what the directory has of this session, as far as it
//!   was answered; whatever it can have besides is on its way here, and every file of which it may
//!   have anything is known.
//!
//! A request whose asker has gone (a FUSE request cannot wait for ever) is taken back once it is
//! answered; what the same owner asks meanwhile waits for that.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};

use us_core::ids::Ino;
use us_core::range_locks::{NotSet, RangeLock, RangeLocks, SESSION_LOCKS_MAX};
use us_proto::v1;
use us_proto::v1::LockKind;
use us_proto::v1::session_up::Event as Up;

use super::{Core, Now};

/// A lock of an owner as the kernel numbers them.
pub type OwnLock = RangeLock<u64>;

/// What is asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LockAsk {
    /// The lock; `Unlock` releases.
    pub wanted: OwnLock,
    /// It is only asked who is in the way.
    pub test: bool,
    /// How long it waits for what is in the way; 0: not at all.
    pub wait_ms: u32,
}

/// What happens.
#[derive(Clone, PartialEq, Debug)]
pub enum LockEvent {
    /// A program asks, under a number that no request of the session had.
    Asked {
        /// The number.
        number: u64,
        /// The file.
        ino: Ino,
        /// What.
        ask: LockAsk,
    },
    /// It does not wait any longer.
    GivenUp {
        /// The number it asked under.
        number: u64,
    },
    /// The directory answered.
    Answered(v1::LockReply),
    /// The directory wants the locks of a file that were kept here.
    Recalled(Ino),
    /// Nobody has the file open any more.
    Closed(Ino),
}

/// How a request ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LockOutcome {
    /// Set, released, or (tested) nothing is in the way.
    Granted,
    /// This one is in the way.
    InTheWay(OwnLock),
    /// The file, or this mount, would have too many locks.
    TooMany,
    /// A write lock, and the mount is read-only.
    ReadOnly,
    /// Another mount did not say its locks in time.
    Undecided,
}

/// What a step leads to.
#[derive(Debug, Default)]
pub struct LockStep {
    /// Messages for the directory, in order.
    pub send: Vec<Up>,
    /// Requests that ended.
    pub done: Vec<(u64, LockOutcome)>,
}

/// Where a request is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Place {
    /// It waits here for a lock that is kept here.
    Here,
    /// The directory was asked.
    There,
    /// It is asked when an earlier one of the same owner has been taken back.
    Behind,
}

#[derive(Clone, Debug)]
struct Pending {
    ino: Ino,
    ask: LockAsk,
    place: Place,
    /// The file's when the directory was asked.
    epoch: u64,
    /// Its asker has gone.
    given_up: bool,
    /// It was granted after that: what is still to be set so that all is as before.
    taken_back: Option<VecDeque<OwnLock>>,
    /// A stronger lock was given up for it when the session resumed.
    weakened: bool,
}

#[derive(Debug, Default)]
struct FileLocks {
    own: RangeLocks<u64>,
    kept: bool,
    /// Recalls, and times it was no longer kept.
    epoch: u64,
    /// Requests that the directory has not answered.
    there: usize,
    /// Those of them whose askers have gone.
    given_up: usize,
    /// Requests that wait here.
    here: BTreeSet<u64>,
}

/// The locks of this mount.
#[derive(Debug, Default)]
pub struct OwnLocks {
    files: HashMap<Ino, FileLocks>,
    pending: BTreeMap<u64, Pending>,
    /// The locks of all files, and the files that are kept.
    count: usize,
}

impl OwnLocks {
    /// Takes one event. `trusted`: the session's leases can be believed now.
    pub fn step(&mut self, trusted: bool, event: LockEvent) -> LockStep {
        let mut step = LockStep::default();
        let ino = match &event {
            LockEvent::Asked { ino, .. } | LockEvent::Recalled(ino) | LockEvent::Closed(ino) => {
                Some(*ino)
            }
            LockEvent::GivenUp { number } => self.pending.get(number).map(|known| known.ino),
            LockEvent::Answered(reply) => self.pending.get(&reply.request).map(|known| known.ino),
        };
        let before = self.weight(ino);
        match event {
            LockEvent::Asked { number, ino, ask } => {
                self.asked(trusted, number, ino, ask, &mut step);
            }
            LockEvent::GivenUp { number } => self.given_up(number, &mut step),
            LockEvent::Answered(reply) => self.answered(&reply, &mut step),
            LockEvent::Recalled(ino) => self.recalled(ino, &mut step),
            LockEvent::Closed(ino) => {
                self.say_kept(ino, &mut step);
                self.tidy(ino);
            }
        }
        self.count = (self.count + self.weight(ino)).saturating_sub(before);
        step
    }

    /// What a file adds to the count.
    fn weight(&self, ino: Option<Ino>) -> usize {
        ino.and_then(|ino| self.files.get(&ino)).map_or(0, FileLocks::weight)
    }

    /// How many more locks may be granted here.
    fn room(&self) -> usize {
        SESSION_LOCKS_MAX.saturating_sub(self.count)
    }

    /// Whether the file's locks are kept here.
    pub fn keeps(&self, ino: Ino) -> bool {
        self.files.get(&ino).is_some_and(|file| file.kept)
    }

    /// The locks this mount's programs have on a file, as far as is known.
    pub fn held(&self, ino: Ino) -> &[OwnLock] {
        self.files.get(&ino).map_or(&[], |file| file.own.held())
    }

    fn asked(&mut self, trusted: bool, number: u64, ino: Ino, ask: LockAsk, step: &mut LockStep) {
        let release = ask.wanted.kind == LockKind::Unlock;
        if !trusted && !release {
            self.say_kept(ino, step);
        }
        let room = self.room();
        let file = self.files.entry(ino).or_default();
        if !file.kept {
            let behind = file.given_up > 0 && self.is_taken_back(ino, ask.wanted.by);
            let place = if behind { Place::Behind } else { Place::There };
            self.pending.insert(number, Pending::new(ino, ask, place));
            if !behind {
                self.send(number, step);
            }
            return;
        }
        match file.decide(&ask, room) {
            LockOutcome::InTheWay(_) if ask.wait_ms > 0 && !ask.test => {
                file.here.insert(number);
                self.pending.insert(number, Pending::new(ino, ask, Place::Here));
            }
            outcome => {
                step.done.push((number, outcome));
                if outcome == LockOutcome::Granted && !ask.test {
                    self.let_in(trusted, ino, step);
                }
            }
        }
    }

    /// Grants what waits here and has nothing in its way any more.
    fn let_in(&mut self, trusted: bool, ino: Ino, step: &mut LockStep) {
        let room = self.room();
        let Some(file) = self.files.get_mut(&ino).filter(|file| !file.here.is_empty()) else {
            return;
        };
        if !trusted {
            return self.say_kept(ino, step);
        }
        // A lock that takes the place of a stronger one lets others in.
        let mut again = true;
        while std::mem::take(&mut again) {
            for number in file.here.clone() {
                let Some(pending) = self.pending.get(&number) else { continue };
                let outcome = file.decide(&pending.ask, room);
                if matches!(outcome, LockOutcome::InTheWay(_)) {
                    continue;
                }
                again = true;
                file.here.remove(&number);
                self.pending.remove(&number);
                step.done.push((number, outcome));
            }
        }
    }

    fn is_taken_back(&self, ino: Ino, owner: u64) -> bool {
        self.pending.values().any(|pending| {
            let same = pending.ino == ino && pending.ask.wanted.by == owner;
            same && pending.given_up && pending.place == Place::There
        })
    }

    /// Asks the directory.
    fn send(&mut self, number: u64, step: &mut LockStep) {
        let Some(pending) = self.pending.get_mut(&number) else { return };
        let file = self.files.entry(pending.ino).or_default();
        file.there += 1;
        file.given_up += usize::from(pending.given_up && pending.taken_back.is_none());
        (pending.place, pending.epoch) = (Place::There, file.epoch);
        step.send.push(pending.request(number));
    }

    /// The directory is told what was kept here, and asked for what waits.
    fn say_kept(&mut self, ino: Ino, step: &mut LockStep) {
        let Some(file) = self.files.get_mut(&ino).filter(|file| file.kept) else { return };
        file.kept = false;
        file.epoch += 1;
        step.send.push(file.says(ino));
        for number in std::mem::take(&mut file.here) {
            self.send(number, step);
        }
    }

    fn recalled(&mut self, ino: Ino, step: &mut LockStep) {
        if self.keeps(ino) {
            self.say_kept(ino, step);
        } else {
            if let Some(file) = self.files.get_mut(&ino) {
                file.epoch += 1;
            }
            let unchanged = v1::Locks { ino: ino.0, unchanged: true, ..v1::Locks::default() };
            step.send.push(Up::Locks(unchanged));
        }
        self.tidy(ino);
    }

    fn given_up(&mut self, number: u64, step: &mut LockStep) {
        let Some(pending) = self.pending.get_mut(&number) else { return };
        let ino = pending.ino;
        let Some(file) = self.files.get_mut(&ino) else { return };
        match pending.place {
            Place::There => {
                pending.given_up = true;
                file.given_up += 1;
            }
            // A release is done all the same.
            Place::Behind if pending.ask.wanted.kind == LockKind::Unlock => pending.given_up = true,
            Place::Behind => drop(self.pending.remove(&number)),
            Place::Here => {
                let blocking = file.own.in_the_way(&pending.ask.wanted);
                let outcome = blocking.map_or(LockOutcome::Undecided, LockOutcome::InTheWay);
                file.here.remove(&number);
                self.pending.remove(&number);
                step.done.push((number, outcome));
            }
        }
        self.tidy(ino);
    }

    fn answered(&mut self, reply: &v1::LockReply, step: &mut LockStep) {
        let number = reply.request;
        let there = self.pending.get(&number).is_some_and(|known| known.place == Place::There);
        let Some(mut pending) = self.pending.remove(&number).filter(|_| there) else { return };
        let (ino, wanted) = (pending.ino, pending.ask.wanted);
        let Some(file) = self.files.get_mut(&ino) else { return };
        file.there -= 1;
        let mut outcome = outcome(reply, wanted.by);
        if outcome == LockOutcome::Granted && !pending.ask.test {
            if pending.given_up && pending.taken_back.is_none() {
                pending.taken_back = Some(to_take_back(file.own.held(), &wanted));
            }
            if let Err(not_set) = file.own.set(wanted) {
                tracing::error!(%ino, ?not_set, "the directory granted what cannot be");
                outcome = LockOutcome::Undecided;
            }
        } else if pending.weakened {
            tracing::error!(%ino, "a lock was lost when the directory restarted");
            outcome = LockOutcome::Undecided;
        }
        if !pending.given_up {
            step.done.push((number, outcome));
        } else if let Some(next) = pending.taken_back.as_mut().and_then(VecDeque::pop_front) {
            pending.ask = LockAsk { wanted: next, test: false, wait_ms: 0 };
            self.pending.insert(number, pending);
            return self.send(number, step);
        } else {
            file.given_up -= 1;
            self.ask_behind(ino, wanted.by, step);
        }
        let Some(file) = self.files.get_mut(&ino) else { return };
        let is_news = pending.epoch == file.epoch && file.there == 0;
        file.kept = reply.keep && is_news && outcome != LockOutcome::Undecided;
        self.tidy(ino);
    }

    /// Asks for what waited for a request of the same owner to be taken back.
    fn ask_behind(&mut self, ino: Ino, owner: u64, step: &mut LockStep) {
        let waits = |pending: &Pending| {
            let same = pending.ino == ino && pending.ask.wanted.by == owner;
            same && pending.place == Place::Behind
        };
        let of_owner = self.pending.iter().filter(|(_, pending)| waits(pending));
        let numbers: Vec<u64> = of_owner.map(|(number, _)| *number).collect();
        if !self.is_taken_back(ino, owner) {
            numbers.into_iter().for_each(|number| self.send(number, step));
        }
    }

    /// A stream that resumes the session: what is said on it before the session counts as claimed,
    /// and what is asked again.
    ///
    /// What was on its way may have been done or not. A lock that was granted is taken from us by
    /// what is said, for nobody was told of it; what was released may be somebody else's already, so
    /// it counts as released.
    pub fn resume(&mut self) -> LockStep {
        let mut step = LockStep::default();
        let lost = |known: &&mut Pending| known.place == Place::There || known.given_up;
        for pending in self.pending.values_mut().filter(lost) {
            if let Some(file) = self.files.get_mut(&pending.ino) {
                pending.settle(&mut file.own);
            }
        }
        self.pending.retain(|_, pending| !pending.given_up);
        for (ino, file) in &mut self.files {
            (file.there, file.given_up) = (0, 0);
            file.epoch += u64::from(!file.kept);
            step.send.push(file.says(*ino));
        }
        let away = self.pending.iter().filter(|(_, pending)| pending.place != Place::Here);
        let numbers: Vec<u64> = away.map(|(number, _)| *number).collect();
        let mut again = LockStep::default();
        numbers.into_iter().for_each(|number| self.send(number, &mut again));
        step.send.append(&mut again.send);
        self.files.retain(|_, file| !file.is_nothing());
        self.count = self.files.values().map(FileLocks::weight).sum();
        step
    }

    fn tidy(&mut self, ino: Ino) {
        let waits = |pending: &Pending| pending.ino == ino && pending.place == Place::Behind;
        if self.files.get(&ino).is_some_and(FileLocks::is_nothing)
            && !self.pending.values().any(waits)
        {
            self.files.remove(&ino);
        }
    }
}

impl Pending {
    fn new(ino: Ino, ask: LockAsk, place: Place) -> Self {
        Self { ino, ask, place, epoch: 0, given_up: false, taken_back: None, weakened: false }
    }

    fn request(&self, number: u64) -> Up {
        let LockAsk { wanted, test, wait_ms } = self.ask;
        Up::Lock(v1::LockRequest {
            request: number,
            ino: self.ino.0,
            owner: wanted.by,
            start: wanted.start,
            end: wanted.end,
            kind: wanted.kind as i32,
            pid: wanted.pid,
            test,
            wait: wait_ms > 0,
            wait_ms,
            may_keep: true,
        })
    }

    /// Its answer will never come: what it can have released counts as released.
    fn settle(&mut self, own: &mut RangeLocks<u64>) {
        let wanted = self.ask.wanted;
        let weaker = match (self.taken_back.take(), wanted.kind) {
            (Some(rest), _) => std::iter::once(wanted).chain(rest).collect(),
            _ if self.ask.test => Vec::new(),
            (None, LockKind::Unlock) => vec![wanted],
            (None, LockKind::Read) => {
                let stronger = own.held().iter().filter(|held| {
                    held.by == wanted.by && held.kind == LockKind::Write && held.overlaps(&wanted)
                });
                let weakened: Vec<OwnLock> = stronger.map(|held| clip(&wanted, held)).collect();
                self.weakened |= !weakened.is_empty();
                weakened
            }
            (None, LockKind::Write) => Vec::new(),
        };
        for lock in weaker {
            if let Err(not_set) = own.set(lock) {
                tracing::error!(ino = %self.ino, ?not_set, "a release cannot be done");
            }
        }
    }
}

impl FileLocks {
    fn weight(&self) -> usize {
        self.own.held().len() + usize::from(self.kept)
    }

    fn decide(&mut self, ask: &LockAsk, room: usize) -> LockOutcome {
        let blocking = self.own.in_the_way(&ask.wanted);
        if ask.test {
            return blocking.map_or(LockOutcome::Granted, LockOutcome::InTheWay);
        }
        match self.own.set_within(ask.wanted, room) {
            Ok(()) => LockOutcome::Granted,
            Err(NotSet::InTheWay(held)) => LockOutcome::InTheWay(held),
            Err(NotSet::TooMany) => LockOutcome::TooMany,
        }
    }

    fn says(&self, ino: Ino) -> Up {
        let lock = |held: &OwnLock| v1::HeldLock {
            owner: held.by,
            start: held.start,
            end: held.end,
            kind: held.kind as i32,
            pid: held.pid,
        };
        let locks = self.own.held().iter().map(lock).collect();
        Up::Locks(v1::Locks { ino: ino.0, locks, kept: self.kept, unchanged: false })
    }

    fn is_nothing(&self) -> bool {
        let quiet = self.there == 0 && self.here.is_empty();
        quiet && !self.kept && self.own.held().is_empty()
    }
}

/// What a step with the locks led to.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Locked {
    /// Requests that ended.
    pub done: Vec<(u64, LockOutcome)>,
    /// How many messages for the directory were queued.
    pub sent: usize,
}

impl Core {
    /// Has the locks take an event; what is to be said is queued.
    pub fn step_locks(&mut self, now: Now, event: LockEvent) -> Locked {
        if let LockEvent::Asked { number, ask, .. } = &event
            && ask.wanted.kind == LockKind::Write
            && !ask.test
            && self.config.read_only
        {
            return Locked { done: vec![(*number, LockOutcome::ReadOnly)], sent: 0 };
        }
        let trusted = self.check_session(now).is_ok();
        let LockStep { send, done } = self.locks.step(trusted, event);
        let sent = send.len();
        send.into_iter().for_each(|message| self.send(message));
        Locked { done, sent }
    }

    /// The byte-range locks of this mount's programs.
    pub const fn locks(&self) -> &OwnLocks {
        &self.locks
    }

    /// The session is resumed on a new stream: what is to be said there of locks, before it is said
    /// that all leases are claimed.
    pub fn claim_locks(&mut self) -> Vec<Up> {
        let is_lock = |event: &Up| matches!(event, Up::Lock(_) | Up::Locks(_));
        self.outbox.retain(|event| !is_lock(event));
        let all = self.locks.resume().send;
        let (claims, again) = all.into_iter().partition(|event| matches!(event, Up::Locks(_)));
        let again: Vec<Up> = again;
        again.into_iter().for_each(|request| self.send(request));
        claims
    }
}

/// `lock` on those of its bytes that `bytes` has.
fn clip(lock: &OwnLock, bytes: &OwnLock) -> OwnLock {
    RangeLock { start: lock.start.max(bytes.start), end: lock.end.min(bytes.end), ..*lock }
}

/// What is to be set after `granted`, so that its owner has what it had: nothing of it is stronger
/// than `granted`, so that nobody is in the way. What was stronger stays as it is.
fn to_take_back(held: &[OwnLock], granted: &OwnLock) -> VecDeque<OwnLock> {
    if granted.kind == LockKind::Unlock {
        return VecDeque::new();
    }
    let own = held.iter().filter(|held| held.by == granted.by && held.overlaps(granted));
    let mut before: Vec<OwnLock> = own.map(|held| clip(held, granted)).collect();
    before.sort_unstable_by_key(|held| held.start);
    let free = OwnLock { kind: LockKind::Unlock, ..*granted };
    let (mut rest, mut all) = (Some(granted.start), VecDeque::new());
    for held in before {
        if let Some(start) = rest.filter(|start| *start < held.start) {
            all.push_back(OwnLock { start, end: held.start - 1, ..free });
        }
        if granted.kind == LockKind::Write && held.kind == LockKind::Read {
            all.push_back(held);
        }
        rest = held.end.checked_add(1);
    }
    if let Some(start) = rest.filter(|start| *start <= granted.end) {
        all.push_back(OwnLock { start, ..free });
    }
    all
}

fn outcome(reply: &v1::LockReply, owner: u64) -> LockOutcome {
    match (reply.granted, reply.too_many, reply.undecided) {
        (true, ..) => LockOutcome::Granted,
        (_, true, _) => LockOutcome::TooMany,
        (_, _, true) => LockOutcome::Undecided,
        (false, false, false) => LockOutcome::InTheWay(RangeLock {
            // Whose it is the directory does not say.
            by: !owner,
            start: reply.blocking_start,
            end: reply.blocking_end,
            kind: reply.blocking_kind(),
            pid: reply.blocking_pid,
        }),
    }
}
