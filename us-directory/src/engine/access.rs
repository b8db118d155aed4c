//! Who may use which volume.
//!
//! A volume is open to every client until it is closed: those made since there is access are closed
//! from the start, others with the first client that is allowed. Administrators may use all. Whoever
//! loses access loses his sessions in the same step; providers serve his last grant until it ends.

use bytes::Bytes;
use us_core::grant::Rights;
use us_core::ids::VolumeId;
use us_core::tls::{KeyHash, PeerIdentity, Role};
use us_proto::v1::{AccessLevel, EndReason, VolumeAccess};

use super::admin::refused;
use super::event::{Answer, AskId, Effect, Peer, RefusalKind};
use super::events::EventKind;
use super::private::Refusal;
use super::sessions::Ending;
use super::{Durability, Engine, Then, Volume};
use crate::keys;
use crate::records::{AccessRecord, VolumeRecord, encode};
use crate::store::{StoreError, WriteBatch};

/// Clients in one volume's list.
pub(super) const ACCESS_MAX: usize = 1024;
/// The fewest digits of a key's hash that name a client.
const PREFIX_DIGITS_MIN: usize = 8;

/// What the holder of this key may do with a volume; `None`: nothing.
pub(super) fn rights(record: &VolumeRecord, peer: &Peer) -> Option<Rights> {
    if peer.admin || !record.closed {
        return Some(Rights::ReadWrite);
    }
    let entry = record.access.iter().find(|entry| entry.key_hash[..] == peer.key_hash[..])?;
    Some(if entry.read_only { Rights::Read } else { Rights::ReadWrite })
}

/// The key of a client that makes a volume; empty for an administrator, and for nobody.
pub(super) fn maker_key(maker: Option<&Peer>) -> Bytes {
    let client = maker.filter(|maker| !maker.admin);
    client.map_or_else(Bytes::new, |maker| maker.key_hash.clone().into())
}

/// A new volume's list: who made it, where that is a client, and those it names.
pub(super) fn first_access(maker: Option<&Peer>, named: &[VolumeAccess]) -> Vec<AccessRecord> {
    let maker = maker
        .filter(|maker| !maker.admin)
        .map(|maker| AccessRecord { key_hash: maker.key_hash.clone().into(), read_only: false });
    let named = named
        .iter()
        .map(|entry| AccessRecord { key_hash: entry.key_hash.clone(), read_only: entry.read_only });
    let mut list: Vec<AccessRecord> = Vec::new();
    for entry in maker.into_iter().chain(named) {
        let known = list.iter().any(|known| known.key_hash == entry.key_hash);
        if entry.key_hash.len() == 32 && !known && list.len() < ACCESS_MAX {
            list.push(entry);
        }
    }
    list
}

/// The list as it is shown.
pub(super) fn shown(record: &VolumeRecord) -> Vec<VolumeAccess> {
    let entry = |entry: &AccessRecord| VolumeAccess {
        key_hash: entry.key_hash.clone(),
        read_only: entry.read_only,
    };
    record.access.iter().map(entry).collect()
}

/// What one without access is told.
pub(super) fn denied(volume: &str, peer: &Peer, wants_write: bool) -> String {
    let (name, key) = (&peer.name, hex(&peer.key_hash));
    if wants_write {
        format!(
            "client {name:?} may only read volume {volume:?}: mount it with -o ro, or have an \
             administrator run `usctl volume allow {volume} {key}`"
        )
    } else {
        format!(
            "client {name:?} has no access to volume {volume:?}: an administrator can give it with \
             `usctl volume allow {volume} {key}`"
        )
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Engine {
    /// Whether who asks may know of this volume: a client of those it may open, all others of all.
    pub(super) fn asker_sees(&self, id: &VolumeId) -> bool {
        let Some(client) = self.asking_client() else { return true };
        let key_hash = client.key_hash.as_bytes().to_vec();
        let peer = Peer { key_hash, ..Peer::default() };
        let volume = self.volumes.get(id).filter(|_| !self.is_hidden(id));
        volume.is_some_and(|volume| rights(&volume.record, &peer).is_some())
    }

    /// Whether who asks may know of all volumes, also of those that are gone.
    pub(super) fn asker_sees_all(&self) -> bool {
        self.asking_client().is_none()
    }

    fn asking_client(&self) -> Option<&PeerIdentity> {
        self.asker_is.as_ref().filter(|asker| asker.role == Role::Client)
    }

    /// The volume of this name or id that `peer` may see; why not.
    pub(super) fn volume_for(&self, name: &str, peer: &Peer) -> Result<VolumeId, Refusal> {
        let none = || (RefusalKind::NotFound, format!("there is no volume {name:?}"));
        let id = self.volume_named(name).ok_or_else(none)?;
        let volume = self.volumes.get(&id).ok_or_else(none)?;
        match rights(&volume.record, peer) {
            Some(_) => Ok(id),
            None => {
                let detail = denied(&volume.record.name, peer, false);
                Err((RefusalKind::Denied, detail))
            }
        }
    }

    /// The one key that a name, a hash, or the beginning of one, names.
    fn client_named(&self, client: &str) -> Result<Bytes, Refusal> {
        let invalid = |detail: String| (RefusalKind::Invalid, detail);
        let digits = client.to_ascii_lowercase();
        let is_hex = digits.bytes().all(|digit| digit.is_ascii_hexdigit());
        // What may be a key is one: names are their bearers' choice.
        let called = if is_hex && digits.len() >= PREFIX_DIGITS_MIN {
            Vec::new()
        } else {
            self.registry.clients_called(client)
        };
        match &called[..] {
            [one] => return Ok(Bytes::copy_from_slice(one.as_bytes())),
            [] => {}
            many => {
                return Err(invalid(format!(
                    "{} clients are called {client:?}: give the beginning of a key (`usctl members`)",
                    many.len()
                )));
            }
        }
        if !is_hex || !(PREFIX_DIGITS_MIN..=64).contains(&digits.len()) {
            return Err(invalid(format!(
                "{client:?} names no client (`usctl members`): give its name, or its key's hash, \
                 {PREFIX_DIGITS_MIN} to 64 hexadecimal digits (a mount without access prints it)"
            )));
        }
        if digits.len() == 64 {
            let pairs = digits.as_bytes().chunks_exact(2);
            let bytes = pairs
                .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap_or_default(), 16));
            let bytes = bytes.collect::<Result<Vec<u8>, _>>();
            let hash = bytes.ok().and_then(|bytes| KeyHash::from_slice(&bytes));
            let hash = hash.ok_or_else(|| invalid(format!("{client:?} is no hash")))?;
            return Ok(Bytes::copy_from_slice(hash.as_bytes()));
        }
        let listed = self.volumes.values().flat_map(|volume| &volume.record.access);
        let listed = listed.map(|entry| entry.key_hash.clone());
        let seen = self.sessions.values().map(|known| known.record.key_hash.clone());
        let mut found: Vec<Bytes> =
            listed.chain(seen).filter(|key| hex(key).starts_with(&digits)).collect();
        found.sort_unstable();
        found.dedup();
        match &found[..] {
            [one] => Ok(one.clone()),
            [] => Err((
                RefusalKind::NotFound,
                format!("no client whose key begins with {client} was seen: give all 64 digits"),
            )),
            many => Err(invalid(format!(
                "{} clients have keys that begin with {client}: give more digits",
                many.len()
            ))),
        }
    }

    /// Gives or takes access.
    pub(super) fn set_access(
        &mut self,
        ask: AskId,
        name: &str,
        client: &str,
        level: AccessLevel,
    ) -> Result<(), StoreError> {
        let none = || (RefusalKind::NotFound, format!("there is no volume {name:?}"));
        let found = self.volume_named(name).ok_or_else(none);
        let found = found.and_then(|id| Ok((id, self.client_named(client)?)));
        let found = found.and_then(|(id, key)| {
            let volume = self.volumes.get_mut(&id).ok_or_else(none)?;
            change(volume, &key, level)?;
            Ok((id, key))
        });
        let (id, key) = match found {
            Ok(found) => found,
            Err((kind, detail)) => {
                self.effects.push(Effect::Answer { ask, answer: refused(kind, detail) });
                return Ok(());
            }
        };
        let usage = self.usage(&id)?;
        let Some(volume) = self.volumes.get(&id) else { return Ok(()) };
        let mut batch = WriteBatch::new();
        batch.put(keys::volume(&id), encode(&volume.record));
        let info = super::admin::volume_info(&id, volume, usage);
        let word = match level {
            AccessLevel::None => "denied",
            AccessLevel::Read => "allowed to read",
            AccessLevel::Write => "allowed",
        };
        let detail = format!("{}: {word} {}", info.name, hex(&key));
        self.note_volume_event(EventKind::VolumeChanged, &id, detail)?;
        // Durable before anybody hears that it is so; the sessions end in the same order.
        let seq = self.commit(batch, Durability::Durable)?;
        self.end_denied(id)?;
        self.then(seq, Then::Answer(ask, Answer::Volume(info)))
    }

    /// Ends the sessions of a volume whose clients may not have them any more.
    fn end_denied(&mut self, id: VolumeId) -> Result<(), StoreError> {
        let Some(volume) = self.volumes.get(&id) else { return Ok(()) };
        let name = volume.record.name.clone();
        let mut ended = Vec::new();
        for (session, known) in &self.sessions {
            if known.volume != id || !known.is_alive() || known.record.by_admin {
                continue;
            }
            let peer = Peer { key_hash: known.record.key_hash.to_vec(), ..Peer::default() };
            match rights(&volume.record, &peer) {
                Some(Rights::ReadWrite) => {}
                Some(Rights::Read) if known.record.read_only => {}
                Some(Rights::Read) => ended.push((*session, "it may only be read now")),
                None => ended.push((*session, "the access was taken away")),
            }
        }
        for (session, why) in ended {
            let detail = format!("volume {name:?}: {why} by an administrator");
            tracing::warn!(session, %detail, "session ended");
            self.end_session(session, Ending { reason: EndReason::Denied, detail })?;
        }
        Ok(())
    }
}

fn change(volume: &mut Volume, key: &Bytes, level: AccessLevel) -> Result<(), Refusal> {
    let record = &mut volume.record;
    let at = record.access.iter().position(|entry| entry.key_hash == *key);
    let read_only = level == AccessLevel::Read;
    match (level, at) {
        (AccessLevel::None, Some(at)) => drop(record.access.remove(at)),
        (AccessLevel::None, None) if record.closed => {
            let detail = format!("client {} has no access to volume {:?}", hex(key), record.name);
            return Err((RefusalKind::NotFound, detail));
        }
        (AccessLevel::None, None) => {
            let detail = format!(
                "volume {:?} is open to every client: allow those who are to keep it first",
                record.name
            );
            return Err((RefusalKind::Busy, detail));
        }
        (_, Some(at)) => record.access[at].read_only = read_only,
        (_, None) if record.access.len() >= ACCESS_MAX => {
            let detail = format!("a volume is for at most {ACCESS_MAX} clients");
            return Err((RefusalKind::Busy, detail));
        }
        (_, None) => record.access.push(AccessRecord { key_hash: key.clone(), read_only }),
    }
    record.closed = true;
    Ok(())
}
