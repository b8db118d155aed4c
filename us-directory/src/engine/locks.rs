//! fcntl byte-range locks of all sessions. Pure: no clock, no I/O.
//!
//! Invariant: two locks of different owners on overlapping bytes are both read locks. An owner's
//! own locks never overlap each other. They live as long as their session, in memory only.

use std::collections::HashMap;

use us_proto::v1::LockKind;

use super::leases::InodeKey;

/// The most locks one inode can have.
pub const INODE_LOCKS_MAX: usize = 16_384;

/// Who owns a lock: the kernel's owner, of a session.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct LockOwner {
    /// The session.
    pub session: u64,
    /// The kernel's number.
    pub owner: u64,
}

/// A lock on bytes `start..=end`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Lock {
    /// Whose.
    pub by: LockOwner,
    /// First byte.
    pub start: u64,
    /// Last byte.
    pub end: u64,
    /// Read or write.
    pub kind: LockKind,
    /// Of the process, for people.
    pub pid: u32,
}

impl Lock {
    fn overlaps(&self, other: &Self) -> bool {
        self.start <= other.end && other.start <= self.end
    }

    fn excludes(&self, other: &Self) -> bool {
        let write = self.kind == LockKind::Write || other.kind == LockKind::Write;
        self.by != other.by && self.overlaps(other) && write
    }
}

/// All locks.
#[derive(Debug, Default)]
pub struct Locks {
    inodes: HashMap<InodeKey, Vec<Lock>>,
}

impl Locks {
    /// The first lock in the way of this one.
    pub fn in_the_way(&self, key: &InodeKey, wanted: &Lock) -> Option<Lock> {
        self.inodes.get(key)?.iter().find(|held| held.excludes(wanted)).copied()
    }

    /// Sets or removes a lock; the owner's own locks on these bytes give way. `false`: the inode
    /// has too many locks.
    ///
    /// # Panics
    /// When another's lock is in the way.
    pub fn set(&mut self, key: &InodeKey, wanted: Lock) -> bool {
        let unlock = wanted.kind == LockKind::Unlock;
        assert!(unlock || self.in_the_way(key, &wanted).is_none(), "a lock is in the way");
        let locks = self.inodes.entry(*key).or_default();
        if locks.len() >= INODE_LOCKS_MAX && !unlock {
            return false;
        }
        let mut kept = Vec::with_capacity(locks.len() + 2);
        for held in locks.drain(..) {
            if held.by != wanted.by || !held.overlaps(&wanted) {
                kept.push(held);
                continue;
            }
            if held.start < wanted.start {
                kept.push(Lock { end: wanted.start - 1, ..held });
            }
            if held.end > wanted.end {
                kept.push(Lock { start: wanted.end + 1, ..held });
            }
        }
        if !unlock {
            kept.push(wanted);
        }
        if kept.is_empty() {
            self.inodes.remove(key);
        } else {
            *locks = kept;
        }
        true
    }

    /// Drops all locks of a session and says which inodes had some.
    pub fn drop_session(&mut self, session: u64) -> Vec<InodeKey> {
        let mut freed = Vec::new();
        self.inodes.retain(|key, locks| {
            let before = locks.len();
            locks.retain(|lock| lock.by.session != session);
            if locks.len() < before {
                freed.push(*key);
            }
            !locks.is_empty()
        });
        freed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use us_core::ids::VolumeId;

    const KEY: InodeKey = (VolumeId::from_bytes([1; 16]), 7);

    proptest! {
        #[test]
        fn locks_agree_with_an_array_of_bytes(
            steps in proptest::collection::vec((0u64..3, 0u64..16, 0u64..16, 0i32..3), 1..60),
        ) {
            let mut locks = Locks::default();
            let mut bytes = [[0i32; 16]; 3];
            for (owner, from, to, kind) in steps {
                let (start, end) = (from.min(to), from.max(to));
                let by = LockOwner { session: owner, owner };
                let kind = LockKind::try_from(kind).unwrap();
                let wanted = Lock { by, start, end, kind, pid: 0 };
                let clash = (0..3).filter(|other| *other != owner as usize).any(|other| {
                    (start..=end).any(|byte| {
                        let held = bytes[other][byte as usize];
                        held != 0 && (held == 2 || kind == LockKind::Write)
                    })
                });
                if kind != LockKind::Unlock {
                    prop_assert_eq!(locks.in_the_way(&KEY, &wanted).is_some(), clash);
                    if clash { continue; }
                }
                prop_assert!(locks.set(&KEY, wanted));
                for byte in start..=end {
                    bytes[owner as usize][byte as usize] = kind as i32;
                }
            }
        }
    }
}
