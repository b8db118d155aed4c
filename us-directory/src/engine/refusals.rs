//! Who is let in no more: the list of refused keys, and what ends with a key that gets onto it.
//!
//! The list has a number, which grows with each change, and the directory's incarnation: providers keep
//! to what was refused before a restore, until they hear that somebody invited the key since.

use bytes::Bytes;
use us_core::tls::KeyHash;
use us_proto::v1::provider_down::Event as Down;
use us_proto::v1::{EndReason, ProviderRefused, RefusedKeys};

use super::event::Effect;
use super::sessions::Ending;
use super::{ConnId, Engine};
use crate::keys;
use crate::records::{JoinedRecord, RegistryRecord, encode};
use crate::store::{StoreError, WriteBatch};

impl Engine {
    /// The keys that are refused now.
    pub fn refused_keys(&self) -> RefusedKeys {
        let incarnation = self.cluster.incarnation;
        let invited = |member: &JoinedRecord| member.incarnation == incarnation && incarnation > 1;
        let which = |wanted: &dyn Fn(&JoinedRecord) -> bool| -> Vec<Bytes> {
            let members = self.registry.members.iter().filter(|(_, member)| wanted(member));
            members.map(|(key, _)| Bytes::copy_from_slice(key.as_bytes())).collect()
        };
        RefusedKeys {
            version: self.registry.version,
            keys: which(&JoinedRecord::is_refused),
            incarnation,
            readmitted: which(&|member| invited(member) && !member.is_refused()),
        }
    }

    /// Whether this key is a member no more.
    pub(super) fn is_refused(&self, key_hash: &[u8]) -> bool {
        let member = KeyHash::from_slice(key_hash).and_then(|key| self.registry.members.get(&key));
        member.is_some_and(JoinedRecord::is_refused)
    }

    /// The list of refused keys has changed: it gets a new number, and everyone who enforces it hears.
    pub(super) fn refusals_changed(&mut self, batch: &mut WriteBatch) {
        self.registry.version += 1;
        let record = RegistryRecord { version: self.registry.version };
        batch.put(keys::registry(), encode(&record));
        let list = self.refused_keys();
        let online = self.members.values().filter(|member| member.online);
        let online: Vec<ConnId> = online.filter_map(|member| member.conn).collect();
        for conn in online {
            self.tell(conn, Down::RefusedKeys(list.clone()));
        }
        self.effects.push(Effect::Refuse(list));
    }

    /// Ends what a key has open here; how many sessions.
    pub(super) fn shut_out(&mut self, key: &KeyHash, why: &str) -> Result<u32, StoreError> {
        let sessions = self.sessions.iter();
        let own = |known: &super::sessions::Session| known.record.key_hash == key.as_bytes()[..];
        let sessions: Vec<u64> = sessions
            .filter(|(_, known)| own(known) && known.is_alive())
            .map(|(id, _)| *id)
            .collect();
        for session in &sessions {
            let end = Ending { reason: EndReason::Revoked, detail: why.to_owned() };
            self.end_session(*session, end)?;
        }
        let conns = self.connections.iter();
        let mut conns: Vec<ConnId> = conns
            .filter(|(_, open)| open.peer.key_hash == key.as_bytes()[..] && open.session.is_none())
            .map(|(conn, _)| *conn)
            .collect();
        conns.sort_unstable_by_key(|conn| conn.0);
        for conn in conns {
            self.refuse_connection(conn, why)?;
        }
        Ok(sessions.len() as u32)
    }

    /// Ends a connection that has no session, of a mount or a provider.
    pub(super) fn refuse_connection(&mut self, conn: ConnId, why: &str) -> Result<(), StoreError> {
        let provides = self.connections.get(&conn).is_some_and(|open| open.provider.is_some());
        if provides {
            let refused = ProviderRefused { reason: why.to_owned() };
            self.tell(conn, Down::Refused(refused));
        }
        self.effects.push(Effect::End { conn });
        self.disconnected(conn)
    }
}
