//! Opening private volumes: where their secrets come from, and the key that follows from one.
//!
//! A secret comes from a file, from the variable `US_PASSPHRASE`, or from a person at a terminal; never
//! from a command line, which every user of the machine can read. Nothing here logs one, and each
//! leaves memory when it was used.
//!
//! **The directory is not believed.** Its key ring opens only with the owner's secret and only as the
//! ring of its volume ([`us_core::keyring`]). Where a secret was given and the directory says that the
//! volume is managed and hands out a key of its own, that is refused: what was written under it the
//! directory could read.

mod secrets;

use std::sync::Arc;

use anyhow::{Context, bail};
use us_core::ids::VolumeId;
use us_core::keyring::{KeyRing, KeyRingError, SlotSecret};
use us_core::seal::VolumeKey;
use us_proto::v1;

use crate::ctl::Admin;

pub(crate) use secrets::{NewFile, long_enough, read_line, write_new_secret};
pub use secrets::{NewSecretArgs, PASSPHRASE_VARIABLE, Prompt, SecretArgs, Terminal};

/// The exit code of every program for a secret that opens nothing.
pub const EXIT_WRONG_SECRET: u8 = 77;

/// The secret that was given does not open the volume.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("volume {volume}: {reason}")]
pub struct WrongSecret {
    /// The volume.
    pub volume: String,
    /// What was tried.
    pub reason: KeyRingError,
}

/// A private volume was to be opened, and the directory says it is managed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "volume {volume} is managed: the directory has its key, but a private volume was asked for. If \
     it was private before, the directory is lying: write nothing to it. If it never was, leave the \
     key options away"
)]
pub struct NotPrivate {
    /// The volume.
    pub volume: String,
}

/// No secret was given for a private volume.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "volume {volume} is private and needs its passphrase or key: a file with the passphrase \
     (passphrase_file=FILE to a mount, --passphrase-file FILE to usctl), a key file (key_file=FILE, \
     --key-file FILE), a recovery key (recovery_key_file=FILE, --recovery-key-file FILE), the \
     variable US_PASSPHRASE, or a terminal to be asked at"
)]
pub struct SecretNeeded {
    /// The volume.
    pub volume: String,
}

/// The key of a private volume, and the volume it was wrapped for.
#[derive(Debug, Clone)]
pub struct PrivateKey {
    /// The volume.
    pub volume: VolumeId,
    /// Its key.
    pub key: VolumeKey,
}

/// What the directory says of a volume's keys.
#[derive(Debug, Clone)]
pub struct Keys {
    /// Its id.
    pub volume: VolumeId,
    /// Its name.
    pub name: String,
    /// Of a private volume: its ring.
    pub ring: Option<KeyRing>,
    /// The ring's version.
    pub version: u64,
}

impl Keys {
    /// Reads what the directory answered.
    ///
    /// # Errors
    /// When it makes no sense, or a ring is of another volume.
    pub fn from_reply(reply: &v1::VolumeKeysReply) -> anyhow::Result<Self> {
        let volume = VolumeId::from_slice(&reply.volume);
        let volume = volume.context("the directory's answer has no valid volume id")?;
        let (name, version) = (reply.name.clone(), reply.version);
        if !reply.private {
            return Ok(Self { volume, name, ring: None, version });
        }
        let ring = KeyRing::decode(&reply.key_ring)
            .with_context(|| format!("the directory's key ring of volume {name}"))?;
        if ring.volume() != volume {
            bail!("the directory gives volume {name} the key ring of another: it was not used");
        }
        Ok(Self { volume, name, ring: Some(ring), version })
    }

    /// Opens the ring with a secret; the key and the number of the slot that held it.
    ///
    /// # Errors
    /// [`WrongSecret`].
    pub async fn open(&self, secret: Arc<SlotSecret>) -> anyhow::Result<(PrivateKey, u32)> {
        let Some(ring) = self.ring.clone() else { bail!(NotPrivate { volume: self.name.clone() }) };
        let opened = tokio::task::spawn_blocking(move || ring.open(&secret)).await?;
        let (key, slot) =
            opened.map_err(|reason| WrongSecret { volume: self.name.clone(), reason })?;
        Ok((PrivateKey { volume: self.volume, key }, slot))
    }
}

/// The key of a volume, if it is private: with the secret that `args` name, or that `prompt` asks for.
///
/// # Errors
/// [`NotPrivate`] where `demanded` or a secret was given; [`SecretNeeded`]; [`WrongSecret`]; what the
/// directory or the system says.
pub async fn unlock(
    admin: &mut Admin,
    volume: &str,
    args: &SecretArgs,
    demanded: bool,
    prompt: &dyn Prompt,
) -> anyhow::Result<Option<PrivateKey>> {
    let keys = Keys::from_reply(&admin.volume_keys(volume).await?)?;
    if keys.ring.is_none() {
        return match demanded || args.is_silent() {
            true => Err(NotPrivate { volume: keys.name }.into()),
            false => Ok(None),
        };
    }
    let secret = args.secret(&keys.name, prompt)?;
    Ok(Some(keys.open(Arc::new(secret)).await?.0))
}

/// Whether asking again without another flag would not help.
pub fn is_senseless(error: &anyhow::Error) -> bool {
    error.is::<NotPrivate>() || error.is::<SecretNeeded>()
}

/// The exit code that an error of opening a volume has of its own.
pub fn exit_code(error: &anyhow::Error) -> Option<u8> {
    error.is::<WrongSecret>().then_some(EXIT_WRONG_SECRET)
}

#[cfg(test)]
mod tests {
    use us_core::keyring::{Cost, NewSlot};

    use super::*;

    const CHEAP: Cost = Cost { memory_kib: 8, passes: 1, lanes: 1 };

    fn reply() -> (v1::VolumeKeysReply, VolumeKey) {
        let (volume, key) = (VolumeId::generate(), VolumeKey::generate());
        let mut ring = KeyRing::new(volume);
        let secret = SlotSecret::Passphrase(b"a passphrase".to_vec().into());
        ring.add(&key, &NewSlot { secret: &secret, label: "", cost: CHEAP, unix_s: 1 }).unwrap();
        let reply = v1::VolumeKeysReply {
            volume: volume.as_bytes().to_vec().into(),
            name: "disk".into(),
            private: true,
            key_ring: ring.encode().into(),
            version: 1,
        };
        (reply, key)
    }

    #[tokio::test]
    async fn a_ring_opens_with_its_secret_alone() {
        let (reply, key) = reply();
        let keys = Keys::from_reply(&reply).unwrap();
        let right = SlotSecret::Passphrase(b"a passphrase".to_vec().into());
        let (opened, slot) = keys.open(Arc::new(right)).await.unwrap();
        assert_eq!((opened.key.expose(), slot), (key.expose(), 1));
        assert_eq!(opened.volume, keys.volume);
        let wrong = SlotSecret::Passphrase(b"a passphrasE".to_vec().into());
        let error = keys.open(Arc::new(wrong)).await.unwrap_err();
        assert_eq!(exit_code(&error), Some(EXIT_WRONG_SECRET));
        assert!(error.to_string().contains("volume disk: wrong passphrase"), "{error}");
    }

    #[tokio::test]
    async fn a_lying_directory_is_not_believed() {
        // Another volume's ring.
        let mut swapped = reply().0;
        swapped.volume = VolumeId::generate().as_bytes().to_vec().into();
        let error = Keys::from_reply(&swapped).unwrap_err().to_string();
        assert!(error.contains("the key ring of another"), "{error}");
        // "It is managed", to have data written under a key it knows.
        let managed = v1::VolumeKeysReply { private: false, ..reply().0 };
        let keys = Keys::from_reply(&managed).unwrap();
        let secret = SlotSecret::Passphrase(b"a passphrase".to_vec().into());
        let error = keys.open(Arc::new(secret)).await.unwrap_err();
        assert!(error.is::<NotPrivate>(), "{error}");
        // No ring at all.
        let empty = v1::VolumeKeysReply { key_ring: Default::default(), ..reply().0 };
        assert!(Keys::from_reply(&empty).is_err());
    }
}
