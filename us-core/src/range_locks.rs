//! fcntl byte-range locks of one file. Pure: no clock, no I/O. The directory has such a table for
//! every locked file, and a mount for each that its own programs have locked.
//!
//! Invariant (LOCK-1): two locks of different owners on overlapping bytes are both read locks. An
//! owner's own locks never overlap each other, and those of one kind never touch.

use us_proto::v1::LockKind;

/// The most locks one file can have.
pub const FILE_LOCKS_MAX: usize = 16_384;
/// The most locks one session can have on all files together; a file whose locks a mount keeps itself
/// counts as one more.
pub const SESSION_LOCKS_MAX: usize = 65_536;

/// A lock on bytes `start..=end`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RangeLock<O> {
    /// Whose.
    pub by: O,
    /// First byte.
    pub start: u64,
    /// Last byte.
    pub end: u64,
    /// Read or write; `Unlock` only where one is asked for.
    pub kind: LockKind,
    /// Of the process, for people.
    pub pid: u32,
}

impl<O: PartialEq> RangeLock<O> {
    /// Whether they have a byte in common.
    pub fn overlaps(&self, other: &Self) -> bool {
        self.start <= other.end && other.start <= self.end
    }

    /// Whether the two cannot both be.
    pub fn excludes(&self, other: &Self) -> bool {
        let none = self.kind == LockKind::Unlock || other.kind == LockKind::Unlock;
        let write = self.kind == LockKind::Write || other.kind == LockKind::Write;
        !none && self.by != other.by && self.overlaps(other) && write
    }

    /// One behind the other, or overlapping.
    fn touches(&self, other: &Self) -> bool {
        self.start <= other.end.saturating_add(1) && other.start <= self.end.saturating_add(1)
    }
}

/// Why a lock is not set.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NotSet<O> {
    /// This one is in the way.
    InTheWay(RangeLock<O>),
    /// The file would have more than [`FILE_LOCKS_MAX`], or its owners more than they have room for.
    TooMany,
}

/// The locks of one file.
#[derive(Clone, Debug)]
pub struct RangeLocks<O> {
    held: Vec<RangeLock<O>>,
}

impl<O> Default for RangeLocks<O> {
    fn default() -> Self {
        Self { held: Vec::new() }
    }
}

impl<O: Copy + Ord> RangeLocks<O> {
    /// All of them.
    pub fn held(&self) -> &[RangeLock<O>] {
        &self.held
    }

    /// The first lock in the way of this one.
    pub fn in_the_way(&self, wanted: &RangeLock<O>) -> Option<RangeLock<O>> {
        self.held.iter().find(|held| held.excludes(wanted)).copied()
    }

    /// Sets or removes a lock; the owner's own locks on these bytes give way. Removing the middle of
    /// one makes two of it, so that this too can be too many.
    ///
    /// # Errors
    /// [`NotSet`]; then nothing has changed.
    pub fn set(&mut self, wanted: RangeLock<O>) -> Result<(), NotSet<O>> {
        self.set_within(wanted, usize::MAX)
    }

    /// As [`RangeLocks::set`], where there is room for so many more locks.
    ///
    /// # Errors
    /// [`NotSet`]; then nothing has changed.
    pub fn set_within(&mut self, wanted: RangeLock<O>, room: usize) -> Result<(), NotSet<O>> {
        if let Some(held) = self.in_the_way(&wanted) {
            return Err(NotSet::InTheWay(held));
        }
        let mut new = wanted;
        let mut kept = Vec::with_capacity(self.held.len() + 2);
        for held in &self.held {
            if held.by != wanted.by || !held.touches(&wanted) {
                kept.push(*held);
            } else if held.kind == wanted.kind {
                (new.start, new.end) = (new.start.min(held.start), new.end.max(held.end));
            } else {
                if held.start < wanted.start {
                    kept.push(RangeLock { end: held.end.min(wanted.start - 1), ..*held });
                }
                if held.end > wanted.end {
                    kept.push(RangeLock { start: held.start.max(wanted.end + 1), ..*held });
                }
            }
        }
        if new.kind != LockKind::Unlock {
            kept.push(new);
        }
        let more = kept.len().saturating_sub(self.held.len());
        if more > room || (more > 0 && kept.len() > FILE_LOCKS_MAX) {
            return Err(NotSet::TooMany);
        }
        self.held = kept;
        Ok(())
    }

    /// Puts `locks` in the place of all locks of the owners that `whose` names. `false`: they
    /// overlap, or somebody else's are in the way; then nothing has changed.
    pub fn replace(&mut self, whose: impl Fn(O) -> bool, locks: Vec<RangeLock<O>>) -> bool {
        let is_lock = |lock: &RangeLock<O>| {
            whose(lock.by) && lock.kind != LockKind::Unlock && lock.start <= lock.end
        };
        let mut kept: Vec<_> = self.held.iter().filter(|held| !whose(held.by)).copied().collect();
        let clash =
            |lock: &RangeLock<O>| !is_lock(lock) || kept.iter().any(|held| held.excludes(lock));
        if locks.iter().any(clash) || !fit_together(&locks) {
            return false;
        }
        kept.extend(locks);
        self.held = kept;
        true
    }

    /// Drops the locks of owners that are not to be kept; says whether there were any.
    pub fn retain(&mut self, keep: impl Fn(O) -> bool) -> bool {
        let before = self.held.len();
        self.held.retain(|lock| keep(lock.by));
        self.held.len() < before
    }
}

/// Whether these locks can all be at once, an owner's not overlapping either.
fn fit_together<O: Copy + Ord>(locks: &[RangeLock<O>]) -> bool {
    let mut sorted: Vec<&RangeLock<O>> = locks.iter().collect();
    sorted.sort_unstable_by_key(|lock| (lock.by, lock.start));
    let apart = |pair: &[&RangeLock<O>]| pair[0].by != pair[1].by || pair[0].end < pair[1].start;
    if !sorted.windows(2).all(apart) {
        return false;
    }
    // By start: a lock clashes with an earlier one that ends behind its start, if either is a write.
    sorted.sort_unstable_by_key(|lock| lock.start);
    let (mut any_end, mut write_end) = (None, None);
    for lock in sorted {
        let write = lock.kind == LockKind::Write;
        let before = if write { any_end } else { write_end };
        if before >= Some(lock.start) {
            return false;
        }
        any_end = any_end.max(Some(lock.end));
        if write {
            write_end = write_end.max(Some(lock.end));
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BYTES: usize = 16;

    /// What each owner has on each byte.
    type Oracle = [[LockKind; BYTES]; 3];

    fn lock(by: usize, start: u64, end: u64, kind: LockKind) -> RangeLock<usize> {
        RangeLock { by, start, end, kind, pid: 0 }
    }

    fn kind(number: i32) -> LockKind {
        LockKind::try_from(number).unwrap()
    }

    fn clashes(bytes: &Oracle, wanted: &RangeLock<usize>) -> bool {
        let others = (0..3).filter(|other| *other != wanted.by);
        others.flat_map(|other| (wanted.start..=wanted.end).map(move |at| (other, at))).any(
            |(other, at)| {
                let held = bytes[other][at as usize];
                let both = held != LockKind::Unlock && wanted.kind != LockKind::Unlock;
                both && (held == LockKind::Write || wanted.kind == LockKind::Write)
            },
        )
    }

    fn of_bytes(bytes: &Oracle) -> Vec<RangeLock<usize>> {
        let mut runs: Vec<RangeLock<usize>> = Vec::new();
        for (by, row) in bytes.iter().enumerate() {
            for (at, held) in row.iter().enumerate().filter(|(_, held)| **held != LockKind::Unlock)
            {
                let at = at as u64;
                match runs.last_mut() {
                    Some(last) if (last.by, last.kind, last.end + 1) == (by, *held, at) => {
                        last.end = at;
                    }
                    _ => runs.push(lock(by, at, at, *held)),
                }
            }
        }
        runs
    }

    proptest! {
        #[test]
        fn locks_agree_with_an_array_of_bytes(
            steps in proptest::collection::vec((0usize..3, 0u64..16, 0u64..16, 0i32..3), 1..60),
        ) {
            let mut locks = RangeLocks::default();
            let mut bytes = [[LockKind::Unlock; BYTES]; 3];
            for (by, from, to, number) in steps {
                let wanted = lock(by, from.min(to), from.max(to), kind(number));
                let clash = clashes(&bytes, &wanted);
                prop_assert_eq!(locks.in_the_way(&wanted).is_some(), clash);
                prop_assert_eq!(locks.set(wanted).is_err(), clash);
                if !clash {
                    (wanted.start..=wanted.end).for_each(|at| bytes[by][at as usize] = wanted.kind);
                }
                let mut held = locks.held().to_vec();
                held.sort_unstable_by_key(|lock| (lock.by, lock.start));
                prop_assert_eq!(held, of_bytes(&bytes));
            }
        }

        #[test]
        fn what_is_replaced_agrees_with_setting_one_by_one(
            before in proptest::collection::vec((0usize..3, 0u64..16, 0u64..4, 1i32..3), 0..8),
            after in proptest::collection::vec((0usize..3, 0u64..16, 0u64..4, 1i32..3), 0..6),
        ) {
            let made = |(by, start, more, number): (usize, u64, u64, i32)| {
                lock(by, start, (start + more).min(15), kind(number))
            };
            let mut locks = RangeLocks::default();
            for wanted in before.into_iter().map(made) {
                // What is in the way stays out.
                let _ = locks.set(wanted);
            }
            let told: Vec<_> = after.into_iter().map(made).collect();
            let mut slow = locks.clone();
            slow.retain(|by| by == 0);
            let overlapping = (0..told.len())
                .any(|a| (0..a).any(|b| told[a].by == told[b].by && told[a].overlaps(&told[b])));
            let foreign = told.iter().any(|lock| lock.by == 0);
            let good = !foreign && !overlapping && told.iter().all(|lock| slow.set(*lock).is_ok());
            let old = locks.held().to_vec();
            prop_assert_eq!(locks.replace(|by| by != 0, told.clone()), good);
            if !good {
                prop_assert_eq!(locks.held(), old);
            }
            for lock in told.iter().filter(|_| good) {
                prop_assert!(locks.held().contains(lock));
            }
        }
    }

    /// A release that splits a lock went over the limit, and what cannot be told to the directory in
    /// one message was told for ever.
    #[test]
    fn a_file_has_never_too_many_locks() {
        let mut locks = RangeLocks::default();
        for at in 0..FILE_LOCKS_MAX as u64 - 1 {
            locks.set(lock(0, at * 2, at * 2, LockKind::Write)).unwrap();
        }
        let wide = lock(0, 1 << 40, u64::MAX, LockKind::Read);
        locks.set(wide).unwrap();
        let middle = lock(0, 1 << 41, 1 << 41, LockKind::Unlock);
        assert_eq!(locks.set(middle), Err(NotSet::TooMany));
        assert_eq!(locks.set(lock(1, 1 << 39, 1 << 39, LockKind::Read)), Err(NotSet::TooMany));
        assert_eq!(locks.held().len(), FILE_LOCKS_MAX);
        // What makes no more of them goes on.
        locks.set(lock(0, 1 << 41, u64::MAX, LockKind::Unlock)).unwrap();
        locks.set(lock(0, 0, u64::MAX, LockKind::Unlock)).unwrap();
        assert!(locks.held().is_empty());
    }
}
