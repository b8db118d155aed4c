//! The byte-range locks of this mount, file by file: a copy of what the directory holds of them, or,
//! of a file that this mount has for itself, the only place where they are. Pure.
//!
//! ```text
//! asked of the directory --granted, "alone", EXCLUSIVE lease--> kept here
//!          ^                                                      |
//!          '------ published: recall, somebody waits, close ------'
//! ```
//! Another mount asks the directory, which first has it lease the inode SHARED: that recalls the
//! EXCLUSIVE lease, and before it is returned the locks are published.

use std::collections::{HashMap, HashSet};

use us_core::ids::Ino;
use us_core::range_locks::{RangeLock, RangeLocks};
use us_proto::v1::LockKind;

/// A lock of an owner as the kernel numbers them.
pub(crate) type OwnLock = RangeLock<u64>;

/// How a request for a lock goes on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum LockStep {
    /// It is granted here, or not: this one is in the way.
    Done(Result<(), OwnLock>),
    /// The file cannot have more locks.
    TooMany,
    /// The directory is asked; [`HeldLocks::answered`] is told how that ended.
    Ask,
    /// What is kept here must be published first.
    Publish,
}

#[derive(Debug, Default)]
struct Held {
    own: RangeLocks<u64>,
    /// Whether the directory does not know of them.
    here: bool,
    /// Requests that the directory has not answered.
    asking: u32,
    /// A request was lost: the directory may hold more than `own`.
    unsure: bool,
    /// Publishing has begun and has not been confirmed.
    unpublished: bool,
    /// Owners of which the directory may hold locks.
    there: HashSet<u64>,
}

/// The locks of this mount.
#[derive(Debug, Default)]
pub(crate) struct HeldLocks {
    files: HashMap<Ino, Held>,
}

impl HeldLocks {
    /// A lock is asked for, or tested, or released. `may`: the mount has the file for itself now.
    pub fn begin(
        &mut self,
        ino: Ino,
        wanted: OwnLock,
        test: bool,
        wait: bool,
        may: bool,
    ) -> LockStep {
        let held = self.files.entry(ino).or_default();
        if held.unpublished || (held.here && !may) {
            return LockStep::Publish;
        }
        if !held.here {
            held.asking += 1;
            held.there.insert(wanted.by);
            return LockStep::Ask;
        }
        match held.own.in_the_way(&wanted) {
            Some(_) if wait => LockStep::Publish,
            Some(blocking) => LockStep::Done(Err(blocking)),
            None if test || held.own.set(wanted) => LockStep::Done(Ok(())),
            None => LockStep::TooMany,
        }
    }

    /// The directory answered: whether it was `granted`, and whether this mount may keep the file's
    /// locks itself; `None` where the answer was lost.
    pub fn answered(&mut self, ino: Ino, wanted: OwnLock, test: bool, reply: Option<(bool, bool)>) {
        let Some(held) = self.files.get_mut(&ino) else { return };
        held.asking -= 1;
        match reply {
            None => held.unsure = true,
            Some((true, alone)) => {
                if !test {
                    held.unsure |= held.own.in_the_way(&wanted).is_some() || !held.own.set(wanted);
                }
                held.here = alone && held.asking == 0 && !held.unsure && !held.unpublished;
            }
            Some((false, _)) => {}
        }
        self.tidy(ino);
    }

    /// Whether this mount keeps the file's locks itself.
    pub fn are_here(&self, ino: Ino) -> bool {
        self.files.get(&ino).is_some_and(|held| held.here || held.unpublished)
    }

    /// What the directory must be told, in this order, to hold what this mount holds; nothing where it
    /// does. From now on it is asked again.
    pub fn publish(&mut self, ino: Ino) -> Vec<OwnLock> {
        let Some(held) = self.files.get_mut(&ino).filter(|held| held.here || held.unpublished)
        else {
            return Vec::new();
        };
        (held.here, held.unpublished) = (false, true);
        let owners = held.own.held().iter().map(|lock| lock.by).collect::<HashSet<u64>>();
        let all = |by| RangeLock { by, start: 0, end: u64::MAX, kind: LockKind::Unlock, pid: 0 };
        let mut told: Vec<OwnLock> = held.there.union(&owners).map(|by| all(*by)).collect();
        told.extend(held.own.held());
        held.there = owners;
        told
    }

    /// The directory has confirmed what [`HeldLocks::publish`] said.
    pub fn published(&mut self, ino: Ino) {
        if let Some(held) = self.files.get_mut(&ino) {
            held.unpublished = false;
        }
        self.tidy(ino);
    }

    /// Forgets a file of which nobody holds anything.
    fn tidy(&mut self, ino: Ino) {
        let needless = |held: &Held| {
            let known = !held.here && !held.unsure && !held.unpublished;
            known && held.asking == 0 && held.own.held().is_empty()
        };
        if self.files.get(&ino).is_some_and(needless) {
            self.files.remove(&ino);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: Ino = Ino(7);

    fn lock(by: u64, kind: LockKind, bytes: std::ops::RangeInclusive<u64>) -> OwnLock {
        RangeLock { by, start: *bytes.start(), end: *bytes.end(), kind, pid: 1 }
    }

    fn write(by: u64) -> OwnLock {
        lock(by, LockKind::Write, 0..=9)
    }

    /// Locks of which the directory has granted the first, and said that nobody else is there.
    fn alone() -> HeldLocks {
        let mut locks = HeldLocks::default();
        assert_eq!(locks.begin(FILE, write(1), false, false, true), LockStep::Ask);
        locks.answered(FILE, write(1), false, Some((true, true)));
        assert!(locks.are_here(FILE));
        locks
    }

    #[test]
    fn alone_with_a_file_nobody_is_asked() {
        let mut locks = alone();
        let other = lock(2, LockKind::Read, 5..=5);
        let refused = LockStep::Done(Err(write(1)));
        assert_eq!(locks.begin(FILE, other, false, false, true), refused);
        let free = lock(1, LockKind::Unlock, 0..=u64::MAX);
        assert_eq!(locks.begin(FILE, free, false, false, true), LockStep::Done(Ok(())));
        assert_eq!(locks.begin(FILE, other, false, false, true), LockStep::Done(Ok(())));
        assert_eq!(locks.begin(FILE, write(1), true, false, true), LockStep::Done(Err(other)));
    }

    #[test]
    fn what_the_directory_is_told_replaces_what_it_knew() {
        let mut locks = alone();
        let free = lock(1, LockKind::Unlock, 0..=4);
        locks.begin(FILE, free, false, false, true);
        let other = lock(2, LockKind::Read, 20..=29);
        locks.begin(FILE, other, false, false, true);
        // Somebody who waits waits at the directory.
        assert_eq!(locks.begin(FILE, write(3), false, true, true), LockStep::Publish);
        let told = locks.publish(FILE);
        let kinds: Vec<LockKind> = told.iter().map(|lock| lock.kind).collect();
        use LockKind::{Read, Unlock, Write};
        assert_eq!(kinds, [Unlock, Unlock, Write, Read], "what it knew of both owners goes first");
        assert_eq!(told[2..], [lock(1, Write, 5..=9), other]);
        assert_eq!(locks.begin(FILE, other, false, false, true), LockStep::Publish, "unconfirmed");
        locks.published(FILE);
        assert_eq!(locks.begin(FILE, other, false, false, true), LockStep::Ask);
        assert!(locks.publish(FILE).is_empty());
    }

    #[test]
    fn without_the_lease_nothing_is_granted_here() {
        let mut locks = alone();
        let other = lock(2, LockKind::Read, 50..=50);
        assert_eq!(locks.begin(FILE, other, false, false, false), LockStep::Publish);
    }

    #[test]
    fn nothing_is_kept_here_while_an_answer_is_out_or_was_lost() {
        let mut locks = HeldLocks::default();
        let reads = [1, 2].map(|by| lock(by, LockKind::Read, 0..=9));
        for read in reads {
            assert_eq!(locks.begin(FILE, read, false, false, true), LockStep::Ask);
        }
        locks.answered(FILE, reads[0], false, Some((true, true)));
        assert!(!locks.are_here(FILE), "the other is on its way");
        locks.answered(FILE, reads[1], false, None);
        assert_eq!(locks.begin(FILE, reads[0], false, false, true), LockStep::Ask);
        locks.answered(FILE, reads[0], false, Some((true, true)));
        assert!(!locks.are_here(FILE), "who knows what the directory holds");
    }

    #[test]
    fn files_without_locks_are_forgotten() {
        let mut locks = HeldLocks::default();
        locks.begin(FILE, write(1), false, false, true);
        locks.answered(FILE, write(1), false, Some((true, false)));
        let free = lock(1, LockKind::Unlock, 0..=u64::MAX);
        locks.begin(FILE, free, false, false, true);
        locks.answered(FILE, free, false, Some((true, false)));
        assert!(locks.files.is_empty());
    }
}
