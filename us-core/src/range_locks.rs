//! fcntl byte-range locks of one file. Pure: no clock, no I/O. The directory keeps such a table for
//! every file, and a mount for each that it has for itself.
//!
//! Invariant: two locks of different owners on overlapping bytes are both read locks. An owner's own
//! locks never overlap each other.

use us_proto::v1::LockKind;

/// The most locks one file can have.
pub const FILE_LOCKS_MAX: usize = 16_384;

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
    fn overlaps(&self, other: &Self) -> bool {
        self.start <= other.end && other.start <= self.end
    }

    fn excludes(&self, other: &Self) -> bool {
        let write = self.kind == LockKind::Write || other.kind == LockKind::Write;
        self.by != other.by && self.overlaps(other) && write
    }
}

/// The locks of one file.
#[derive(Debug)]
pub struct RangeLocks<O> {
    held: Vec<RangeLock<O>>,
}

impl<O> Default for RangeLocks<O> {
    fn default() -> Self {
        Self { held: Vec::new() }
    }
}

impl<O: Copy + PartialEq> RangeLocks<O> {
    /// All of them.
    pub fn held(&self) -> &[RangeLock<O>] {
        &self.held
    }

    /// The first lock in the way of this one.
    pub fn in_the_way(&self, wanted: &RangeLock<O>) -> Option<RangeLock<O>> {
        if wanted.kind == LockKind::Unlock {
            return None;
        }
        self.held.iter().find(|held| held.excludes(wanted)).copied()
    }

    /// Sets or removes a lock; the owner's own locks on these bytes give way. `false`: the file has
    /// too many locks.
    ///
    /// # Panics
    /// When another's lock is in the way.
    pub fn set(&mut self, wanted: RangeLock<O>) -> bool {
        let unlock = wanted.kind == LockKind::Unlock;
        assert!(self.in_the_way(&wanted).is_none(), "a lock is in the way");
        if self.held.len() >= FILE_LOCKS_MAX && !unlock {
            return false;
        }
        let mut kept = Vec::with_capacity(self.held.len() + 2);
        for held in self.held.drain(..) {
            if held.by != wanted.by || !held.overlaps(&wanted) {
                kept.push(held);
                continue;
            }
            if held.start < wanted.start {
                kept.push(RangeLock { end: wanted.start - 1, ..held });
            }
            if held.end > wanted.end {
                kept.push(RangeLock { start: wanted.end + 1, ..held });
            }
        }
        if !unlock {
            kept.push(wanted);
        }
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
