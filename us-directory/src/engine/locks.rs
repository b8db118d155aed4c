//! fcntl byte-range locks of all sessions. Pure: no clock, no I/O. They live as long as their session,
//! in memory only.

use std::collections::HashMap;

use us_core::range_locks::{RangeLock, RangeLocks};

use super::leases::InodeKey;

/// Who owns a lock: the kernel's owner, of a session.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct LockOwner {
    /// The session.
    pub session: u64,
    /// The kernel's number.
    pub owner: u64,
}

/// A lock of a session.
pub type Lock = RangeLock<LockOwner>;

/// All locks.
#[derive(Debug, Default)]
pub struct Locks {
    inodes: HashMap<InodeKey, RangeLocks<LockOwner>>,
}

impl Locks {
    /// The first lock in the way of this one.
    pub fn in_the_way(&self, key: &InodeKey, wanted: &Lock) -> Option<Lock> {
        self.inodes.get(key)?.in_the_way(wanted)
    }

    /// Sets or removes a lock; the owner's own locks on these bytes give way. `false`: the inode
    /// has too many locks.
    ///
    /// # Panics
    /// When another's lock is in the way.
    pub fn set(&mut self, key: &InodeKey, wanted: Lock) -> bool {
        let locks = self.inodes.entry(*key).or_default();
        let set = locks.set(wanted);
        if locks.held().is_empty() {
            self.inodes.remove(key);
        }
        set
    }

    /// Whether only this session has locks on the inode, or nobody.
    pub fn are_of(&self, session: u64, key: &InodeKey) -> bool {
        let held = self.inodes.get(key).map(RangeLocks::held).unwrap_or_default();
        held.iter().all(|lock| lock.by.session == session)
    }

    /// Drops all locks of a session and says which inodes had some.
    pub fn drop_session(&mut self, session: u64) -> Vec<InodeKey> {
        let mut freed = Vec::new();
        self.inodes.retain(|key, locks| {
            if locks.retain(|by| by.session != session) {
                freed.push(*key);
            }
            !locks.held().is_empty()
        });
        freed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use us_core::ids::VolumeId;
    use us_proto::v1::LockKind;

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
