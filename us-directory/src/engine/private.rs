//! Private volumes: their key rings are kept as bytes that mean nothing here.
//!
//! **Invariant: a private volume has no key in this process.** Its record has a ring and no key; the
//! ring is bound to the volume's id by seals that only those who know a secret can check, so whoever
//! makes the volume chooses the id. A ring is replaced as a whole, and only by one that was made from
//! the version that is there: of two administrators at once, one is told to look again.

use bytes::Bytes;
use us_core::ids::VolumeId;
use us_core::keyring::RING_BYTES_MAX;
use us_proto::v1::VolumeKeysReply;

use super::admin::refused;
use super::event::{Answer, AskId, Effect, RefusalKind};
use super::events::EventKind;
use super::{Durability, Engine, Peer, Then, Volume};
use crate::keys;
use crate::records::{VolumeRecord, encode};
use crate::recovery::image_volume;
use crate::store::{StoreError, WriteBatch};

/// What makes a volume private.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PrivateVolume {
    /// The id its ring is bound to.
    pub volume: VolumeId,
    /// The ring.
    pub key_ring: Bytes,
}

/// Why something is refused, of what kind and for people.
pub(super) type Refusal = (RefusalKind, String);

impl Engine {
    /// The id and the secrets of a volume to be made: of a private one what its maker chose, of a
    /// managed one fresh.
    ///
    /// # Errors
    /// Why it is refused.
    pub(super) fn keys_of_new(
        &mut self,
        record: &mut VolumeRecord,
        private: Option<PrivateVolume>,
    ) -> Result<VolumeId, Refusal> {
        let Some(PrivateVolume { volume, key_ring }) = private else {
            let (mut key, mut id) = (vec![0; 32], [0; 16]);
            self.entropy.fill(&mut key);
            self.entropy.fill(&mut id);
            record.key = key.into();
            return Ok(VolumeId::from_bytes(id));
        };
        check_ring(&key_ring)?;
        let cluster = <[u8; 16]>::try_from(self.cluster.cluster.as_ref()).unwrap_or_default();
        let reserved = *volume.as_bytes() == [0; 16] || volume == image_volume(&cluster);
        if reserved || self.volumes.contains_key(&volume) {
            return Err((RefusalKind::Exists, "there is a volume of this id already".to_owned()));
        }
        record.key_ring = key_ring;
        record.key_ring_version = 1;
        Ok(volume)
    }

    /// The key ring of a volume.
    pub(super) fn volume_keys(&self, named: &str, asker: &Peer) -> Answer {
        let id = match self.volume_for(named, asker) {
            Ok(id) => id,
            Err((kind, detail)) => return refused(kind, detail),
        };
        match self.volumes.get(&id) {
            Some(volume) => Answer::VolumeKeys(reply(&id, volume)),
            None => refusal(not_there(named)),
        }
    }

    /// Replaces the ring of a private volume, if it is still the one that was looked at.
    pub(super) fn set_volume_keys(
        &mut self,
        ask: AskId,
        named: &str,
        version: u64,
        key_ring: Bytes,
    ) -> Result<(), StoreError> {
        let found = self.volume_named(named);
        let found = found.and_then(|id| Some((id, &self.volumes.get(&id)?.record)));
        let checked = match found {
            None => Err(not_there(named)),
            Some((_, record)) if record.key_ring.is_empty() => {
                let detail = format!("volume {named:?} is managed: it has no key slots");
                Err((RefusalKind::Invalid, detail))
            }
            Some((_, record)) if record.key_ring_version != version => Err((
                RefusalKind::Busy,
                "another has changed the key slots meanwhile: look at them and try again"
                    .to_owned(),
            )),
            Some((id, _)) => check_ring(&key_ring).map(|()| id),
        };
        let id = match checked {
            Ok(id) => id,
            Err(refused) => {
                self.effects.push(Effect::Answer { ask, answer: refusal(refused) });
                return Ok(());
            }
        };
        let Some(volume) = self.volumes.get_mut(&id) else { return Ok(()) };
        volume.record.key_ring = key_ring;
        volume.record.key_ring_version += 1;
        let mut batch = WriteBatch::new();
        batch.put(keys::volume(&id), encode(&volume.record));
        let reply = reply(&id, volume);
        self.note_volume_event(
            EventKind::VolumeChanged,
            &id,
            format!("{}: its key slots", reply.name),
        )?;
        let seq = self.commit(batch, Durability::Durable)?;
        self.then(seq, Then::Answer(ask, Answer::VolumeKeys(reply)))
    }
}

fn check_ring(key_ring: &[u8]) -> Result<(), Refusal> {
    if (1..=RING_BYTES_MAX).contains(&key_ring.len()) {
        return Ok(());
    }
    Err((RefusalKind::Invalid, format!("a key ring has 1 to {RING_BYTES_MAX} bytes")))
}

fn not_there(named: &str) -> Refusal {
    (RefusalKind::NotFound, format!("there is no volume {named:?}"))
}

fn refusal((kind, detail): Refusal) -> Answer {
    refused(kind, detail)
}

fn reply(id: &VolumeId, volume: &Volume) -> VolumeKeysReply {
    VolumeKeysReply {
        volume: Bytes::copy_from_slice(id.as_bytes()),
        name: volume.record.name.clone(),
        private: volume.record.key.is_empty(),
        key_ring: volume.record.key_ring.clone(),
        version: volume.record.key_ring_version,
    }
}
