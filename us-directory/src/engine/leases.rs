//! Leases on inodes: who holds what, who was asked to give it back.
//!
//! Invariant: of one inode there is either one EXCLUSIVE holder or any number of SHARED ones.
//! Grants are numbered; a return that names an older grant than the newest is ignored, so that the
//! answer to an old recall never gives up a newer grant. Pure: no clock, no I/O.

use std::collections::{HashMap, HashSet};

use us_core::ids::VolumeId;
use us_proto::v1::LeaseLevel;

/// How much a lease allows, in order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Hash)]
pub enum Level {
    /// Nothing.
    #[default]
    None,
    /// Caching.
    Shared,
    /// Buffering changes too.
    Exclusive,
}

impl Level {
    /// The level on the wire; a number nobody knows counts as none.
    pub fn from_wire(level: i32) -> Self {
        match LeaseLevel::try_from(level) {
            Ok(LeaseLevel::Shared) => Self::Shared,
            Ok(LeaseLevel::Exclusive) => Self::Exclusive,
            Ok(LeaseLevel::None) | Err(_) => Self::None,
        }
    }

    /// For the wire.
    pub fn to_wire(self) -> i32 {
        match self {
            Self::None => LeaseLevel::None as i32,
            Self::Shared => LeaseLevel::Shared as i32,
            Self::Exclusive => LeaseLevel::Exclusive as i32,
        }
    }

    /// What another may keep while somebody has this.
    pub fn allows(self) -> Self {
        match self {
            Self::None => Self::Exclusive,
            Self::Shared => Self::Shared,
            Self::Exclusive => Self::None,
        }
    }
}

/// An inode of a volume.
pub type InodeKey = (VolumeId, u64);

#[derive(Clone, Copy, Debug)]
struct Holder {
    session: u64,
    level: Level,
    grant: u64,
    /// What a recall that was sent lets it keep.
    recalled: Option<Level>,
}

/// A lease that is in another's way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conflict {
    /// Who holds it.
    pub session: u64,
    /// Its newest grant.
    pub grant: u64,
    /// What it may keep.
    pub keep: Level,
    /// Whether it was not yet asked.
    pub ask: bool,
}

/// What became of a return.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Returned {
    /// The lease is lower now.
    Lowered,
    /// It names an older grant, or raises: ignored. The recall (if one is out) must be sent again.
    Ignored {
        /// What the holder may keep, and its newest grant, where a recall is out.
        again: Option<(Level, u64)>,
    },
    /// The session holds nothing there.
    Unknown,
}

/// All leases.
#[derive(Debug, Default)]
pub struct Leases {
    holders: HashMap<InodeKey, Vec<Holder>>,
    sessions: HashMap<u64, HashSet<InodeKey>>,
    next_grant: u64,
}

impl Leases {
    /// No leases; grants are numbered from `first_grant`.
    pub fn new(first_grant: u64) -> Self {
        Self { next_grant: first_grant, ..Self::default() }
    }

    /// What the session holds.
    pub fn level(&self, session: u64, key: &InodeKey) -> Level {
        let holders = self.holders.get(key).into_iter().flatten();
        holders
            .filter(|holder| holder.session == session)
            .map(|h| h.level)
            .next()
            .unwrap_or_default()
    }

    /// How many inodes the session holds.
    pub fn count(&self, session: u64) -> usize {
        self.sessions.get(&session).map_or(0, HashSet::len)
    }

    /// Whether anyone else holds anything.
    pub fn others(&self, session: u64, key: &InodeKey) -> bool {
        self.holders.get(key).is_some_and(|all| all.iter().any(|h| h.session != session))
    }

    /// The leases in the way of `session` having `level`; they count as recalled from now on.
    pub fn conflicts(&mut self, session: u64, key: &InodeKey, level: Level) -> Vec<Conflict> {
        let keep = level.allows();
        let holders = self.holders.get_mut(key).into_iter().flatten();
        holders
            .filter(|holder| holder.session != session && holder.level > keep)
            .map(|holder| {
                let ask = holder.recalled.is_none_or(|asked| asked > keep);
                if ask {
                    holder.recalled = Some(keep);
                }
                Conflict { session: holder.session, grant: holder.grant, keep, ask }
            })
            .collect()
    }

    /// Whether a lease is in the way, without recalling it.
    pub fn is_free(&self, session: u64, key: &InodeKey, level: Level) -> bool {
        let keep = level.allows();
        !self.holders.get(key).is_some_and(|all| {
            all.iter().any(|holder| holder.session != session && holder.level > keep)
        })
    }

    /// Gives `session` at least `level`, under a new grant number. Returns the level it has, the
    /// grant, and what a recall that is out lets it keep (it must be sent again).
    ///
    /// # Panics
    /// When another's lease is in the way.
    pub fn grant(
        &mut self,
        session: u64,
        key: &InodeKey,
        level: Level,
    ) -> (Level, u64, Option<Level>) {
        let grant = self.next_grant;
        self.next_grant += 1;
        self.put(session, key, level, grant)
    }

    /// The session made the inode: it is its own, under grant 0. Whoever held what did not exist has
    /// broken a rule: it loses that and is named.
    pub fn created(&mut self, session: u64, key: &InodeKey) -> Vec<u64> {
        let holders = self.holders.get(key).into_iter().flatten();
        let others: Vec<u64> =
            holders.map(|holder| holder.session).filter(|other| *other != session).collect();
        others.iter().for_each(|other| self.remove(*other, key));
        self.put(session, key, Level::Exclusive, 0);
        others
    }

    /// The session held this before the directory restarted. `false`: another's is in the way.
    pub fn reclaim(&mut self, session: u64, key: &InodeKey, level: Level, grant: u64) -> bool {
        if !self.is_free(session, key, level) {
            return false;
        }
        self.put(session, key, level, grant);
        true
    }

    fn put(
        &mut self,
        session: u64,
        key: &InodeKey,
        level: Level,
        grant: u64,
    ) -> (Level, u64, Option<Level>) {
        assert!(self.is_free(session, key, level), "conflicting leases on inode {}", key.1);
        self.sessions.entry(session).or_default().insert(*key);
        let holders = self.holders.entry(*key).or_default();
        if let Some(holder) = holders.iter_mut().find(|holder| holder.session == session) {
            holder.level = holder.level.max(level);
            holder.grant = holder.grant.max(grant);
            return (holder.level, holder.grant, holder.recalled);
        }
        holders.push(Holder { session, level, grant, recalled: None });
        (level, grant, None)
    }

    /// The session keeps only `level`, and has seen `grant`.
    pub fn lower(&mut self, session: u64, key: &InodeKey, level: Level, grant: u64) -> Returned {
        let Some(holders) = self.holders.get_mut(key) else { return Returned::Unknown };
        let Some(index) = holders.iter().position(|holder| holder.session == session) else {
            return Returned::Unknown;
        };
        let holder = &mut holders[index];
        if grant < holder.grant || level > holder.level {
            return Returned::Ignored { again: holder.recalled.map(|keep| (keep, holder.grant)) };
        }
        if holder.recalled.is_some_and(|keep| level <= keep) {
            holder.recalled = None;
        }
        holder.level = level;
        if level == Level::None {
            self.remove(session, key);
        }
        Returned::Lowered
    }

    /// What the session was asked to give back must be asked again: it may not have heard.
    pub fn forget_recalls(&mut self, session: u64) {
        for key in self.held_by(session) {
            let holders = self.holders.get_mut(&key).into_iter().flatten();
            holders.filter(|h| h.session == session).for_each(|holder| holder.recalled = None);
        }
    }

    /// The inode is gone: nobody holds it.
    pub fn forget(&mut self, session: u64, key: &InodeKey) {
        self.remove(session, key);
    }

    /// The inode was in the trash, where nobody holds anything: what is left is of the time before.
    pub fn forget_everyone(&mut self, key: &InodeKey) {
        let holders = self.holders.get(key).into_iter().flatten();
        let sessions: Vec<u64> = holders.map(|holder| holder.session).collect();
        sessions.into_iter().for_each(|session| self.remove(session, key));
    }

    /// The number of the next grant.
    pub fn next_grant(&self) -> u64 {
        self.next_grant
    }

    fn remove(&mut self, session: u64, key: &InodeKey) {
        if let Some(holders) = self.holders.get_mut(key) {
            holders.retain(|holder| holder.session != session);
            if holders.is_empty() {
                self.holders.remove(key);
            }
        }
        if let Some(keys) = self.sessions.get_mut(&session) {
            keys.remove(key);
        }
    }

    /// Takes everything from a session and says what it was.
    pub fn drop_session(&mut self, session: u64) -> Vec<InodeKey> {
        let keys: Vec<InodeKey> = self.held_by(session);
        keys.iter().for_each(|key| self.remove(session, key));
        self.sessions.remove(&session);
        keys
    }

    /// What a session holds.
    pub fn held_by(&self, session: u64) -> Vec<InodeKey> {
        self.sessions.get(&session).into_iter().flatten().copied().collect()
    }

    /// Whether the invariant holds (tests).
    pub fn is_consistent(&self) -> bool {
        self.holders.values().all(|all| {
            let exclusive = all.iter().filter(|h| h.level == Level::Exclusive).count();
            !all.is_empty() && (exclusive == 0 || all.len() == 1)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: InodeKey = (VolumeId::from_bytes([1; 16]), 7);

    #[test]
    fn an_answer_to_an_old_recall_gives_up_nothing() {
        let mut leases = Leases::new(10);
        let (_, first, _) = leases.grant(1, &KEY, Level::Shared);
        let (level, second, _) = leases.grant(1, &KEY, Level::Exclusive);
        assert_eq!((level, first, second), (Level::Exclusive, 10, 11));
        let conflict = leases.conflicts(2, &KEY, Level::Shared);
        let expected = Conflict { session: 1, grant: 11, keep: Level::Shared, ask: true };
        assert_eq!(conflict, [expected]);
        let again = Some((Level::Shared, 11));
        assert_eq!(leases.lower(1, &KEY, Level::None, first), Returned::Ignored { again });
        assert_eq!(leases.lower(1, &KEY, Level::Shared, second), Returned::Lowered);
        assert!(leases.conflicts(2, &KEY, Level::Shared).is_empty());
        leases.grant(2, &KEY, Level::Shared);
        assert!(leases.is_consistent());
    }

    #[test]
    fn a_recall_is_asked_once_unless_more_is_wanted() {
        let mut leases = Leases::new(1);
        leases.grant(1, &KEY, Level::Exclusive);
        assert!(leases.conflicts(2, &KEY, Level::Shared)[0].ask);
        assert!(!leases.conflicts(3, &KEY, Level::Shared)[0].ask);
        assert!(leases.conflicts(3, &KEY, Level::Exclusive)[0].ask);
        assert_eq!(leases.drop_session(1), [KEY]);
        assert!(leases.is_free(2, &KEY, Level::Exclusive));
    }
}
