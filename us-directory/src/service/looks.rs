//! Looks into the stored state that take a thread: a few at once, and fewer for one member, so that who
//! asks much, or does not read the answer, holds up nobody else.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use tonic::Status;
use us_core::tls::{KeyHash, PeerIdentity};

/// Looks at once, of all and of one member.
const LOOKS_MAX: usize = 64;
const LOOKS_OF_ONE_MAX: usize = 4;

/// The looks under way, by who looks.
#[derive(Clone, Debug, Default)]
pub(super) struct Looks(Arc<Mutex<HashMap<KeyHash, usize>>>);

/// One of them; it ends with the value.
#[derive(Debug)]
pub(super) struct Look {
    looks: Looks,
    who: KeyHash,
}

impl Looks {
    /// A look for `who`.
    ///
    /// # Errors
    /// `RESOURCE_EXHAUSTED` where there are too many.
    pub fn begin(&self, who: &PeerIdentity) -> Result<Look, Status> {
        let mut under_way = self.0.lock();
        let all: usize = under_way.values().sum();
        let its = under_way.get(&who.key_hash).copied().unwrap_or(0);
        if all >= LOOKS_MAX || its >= LOOKS_OF_ONE_MAX {
            return Err(Status::resource_exhausted("too many such questions at once: ask again"));
        }
        under_way.insert(who.key_hash, its + 1);
        Ok(Look { looks: self.clone(), who: who.key_hash })
    }
}

impl Drop for Look {
    fn drop(&mut self) {
        let mut under_way = self.looks.0.lock();
        match under_way.get_mut(&self.who) {
            Some(count) if *count > 1 => *count -= 1,
            _ => drop(under_way.remove(&self.who)),
        }
    }
}

#[cfg(test)]
mod tests {
    use us_core::ids::ClusterId;
    use us_core::tls::Role;

    use super::*;

    fn member(byte: u8) -> PeerIdentity {
        let key_hash = KeyHash::from_slice(&[byte; 32]).unwrap();
        PeerIdentity {
            role: Role::Client,
            name: "m".into(),
            cluster: ClusterId::generate(),
            key_hash,
        }
    }

    #[test]
    fn one_member_never_has_all_of_them() {
        let looks = Looks::default();
        let greedy: Vec<Look> =
            (0..LOOKS_OF_ONE_MAX).map(|_| looks.begin(&member(1)).unwrap()).collect();
        assert!(looks.begin(&member(1)).is_err());
        let other = looks.begin(&member(2)).expect("there is room for others");
        drop(greedy);
        assert!(looks.begin(&member(1)).is_ok());
        drop(other);
        assert!(looks.0.lock().is_empty());
        let all: Vec<Look> =
            (0..LOOKS_MAX).map(|at| looks.begin(&member((at / 4) as u8)).unwrap()).collect();
        assert!(looks.begin(&member(200)).is_err());
        drop(all);
    }
}
