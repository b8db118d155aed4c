//! The key ring of a private volume: its key, wrapped once for each secret that may open it.
//!
//! ```text
//! wrapping key = argon2id(passphrase, salt, cost)                       a passphrase
//!              | HKDF-SHA256(salt, secret, info = "us key slot 1 file")      a key file
//!              | HKDF-SHA256(salt, secret, info = "us key slot 1 recovery")  a recovery key
//! wrapped      = AES-256-GCM(wrapping key, nonce 0, volume key,
//!                            AAD = "us key slot 1" || volume id || all of the slot before it)
//! ```
//! docs/formats.md draws the bytes. The directory keeps a ring as bytes it cannot use; whoever opens
//! one does not believe it either. What a slot says of itself (kind, cost, salt, label) and the volume
//! it is of are bound by its seal: a slot of another volume, or one that was changed, opens with
//! nothing. What a hostile ring may cost to be tried is bounded before any of it is paid
//! ([`Cost::check`], [`WORK_KIB_MAX`]).
//!
//! A nonce of zero is safe: a wrapping key follows from a salt of 32 random bytes made for its slot,
//! and seals once.
//!
//! Who calls it: `usctl volume create --private` and `usctl volume keys` make and change rings; a mount
//! and `usctl trash` open them. CPU and memory only, no I/O: the caller keeps it off the async runtime.

mod format;
mod recovery;

#[cfg(test)]
mod tests;

use std::fmt;

use argon2::{Algorithm, Argon2, Block, Params, Version};
use aws_lc_rs::aead::{Aad, NONCE_LEN, Nonce};
use aws_lc_rs::hkdf::{HKDF_SHA256, Salt};
use zeroize::{Zeroize, Zeroizing};

use crate::geometry::TAG_BYTES;
use crate::ids::VolumeId;
use crate::seal::{KEY_BYTES, VolumeKey, aead_key};

pub use format::{LABEL_BYTES_MAX, RING_BYTES_MAX, SLOTS_MAX};
pub use recovery::{RECOVERY_BYTES, RecoveryKey, RecoveryTextError};

/// Random bytes that make a slot's wrapping key its own.
const SALT_BYTES: usize = 32;
/// A wrapped volume key.
const WRAPPED_BYTES: usize = KEY_BYTES + TAG_BYTES;
/// The first bytes of what a slot's seal binds.
const SLOT_LABEL: &[u8] = b"us key slot 1";

/// The most memory a slot may ask for: 1 GiB.
pub const MEMORY_KIB_MAX: u32 = 1 << 20;
/// The most passes over it.
pub const PASSES_MAX: u32 = 16;
/// The most lanes.
pub const LANES_MAX: u32 = 4;
/// The most that all slots of a ring together may ask for, memory times passes: some ten seconds.
pub const WORK_KIB_MAX: u64 = 16 << 20;

/// What trying one passphrase costs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Cost {
    /// Memory in KiB.
    pub memory_kib: u32,
    /// Passes over it.
    pub passes: u32,
    /// Lanes, one after another.
    pub lanes: u32,
}

impl Cost {
    /// What new passphrases are given: 128 MiB, three passes; some tenths of a second.
    pub const NEW: Self = Self { memory_kib: 128 << 10, passes: 3, lanes: 1 };
    /// What keys that need no stretching say.
    const NONE: Self = Self { memory_kib: 0, passes: 0, lanes: 0 };

    /// Whether argon2id can be asked for this, and it is within reason.
    fn check(self) -> Result<(), KeyRingError> {
        let lanes = (1..=LANES_MAX).contains(&self.lanes);
        let passes = (1..=PASSES_MAX).contains(&self.passes);
        let least = self.lanes.saturating_mul(8);
        let memory = (least..=MEMORY_KIB_MAX).contains(&self.memory_kib);
        if lanes && passes && memory {
            return Ok(());
        }
        Err(KeyRingError::Cost { memory_kib: self.memory_kib.into(), passes: self.passes.into() })
    }

    fn work_kib(self) -> u64 {
        u64::from(self.memory_kib) * u64::from(self.passes)
    }
}

/// What a slot is opened with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum SlotKind {
    /// A passphrase, stretched.
    Passphrase = 1,
    /// A file of 32 random bytes.
    KeyFile = 2,
    /// A recovery key on paper.
    Recovery = 3,
}

impl fmt::Display for SlotKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Passphrase => "passphrase",
            Self::KeyFile => "key file",
            Self::Recovery => "recovery key",
        })
    }
}

/// A secret that may open a volume. It leaves memory when dropped, and does not print.
pub enum SlotSecret {
    /// What a person knows.
    Passphrase(Zeroizing<Vec<u8>>),
    /// What a file holds.
    KeyFile(Zeroizing<[u8; KEY_BYTES]>),
    /// What is on paper.
    Recovery(RecoveryKey),
}

impl SlotSecret {
    /// The kind of slot it opens.
    pub fn kind(&self) -> SlotKind {
        match self {
            Self::Passphrase(_) => SlotKind::Passphrase,
            Self::KeyFile(_) => SlotKind::KeyFile,
            Self::Recovery(_) => SlotKind::Recovery,
        }
    }

    /// The key that wraps under this salt.
    fn wrapping_key(&self, salt: &[u8; SALT_BYTES], cost: Cost) -> Zeroizing<[u8; KEY_BYTES]> {
        match self {
            Self::Passphrase(passphrase) => stretched(passphrase, salt, cost),
            Self::KeyFile(secret) => derived(&**secret, salt, b"us key slot 1 file"),
            Self::Recovery(key) => derived(key.expose(), salt, b"us key slot 1 recovery"),
        }
    }
}

impl fmt::Debug for SlotSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SlotSecret({}, secret)", self.kind())
    }
}

/// Argon2id. The cost was checked.
fn stretched(passphrase: &[u8], salt: &[u8], cost: Cost) -> Zeroizing<[u8; KEY_BYTES]> {
    let Cost { memory_kib, passes, lanes } = cost;
    let params = Params::new(memory_kib, passes, lanes, Some(KEY_BYTES));
    let params = params.expect("the cost was checked");
    let mut memory = vec![Block::default(); params.block_count()];
    let mut key = Zeroizing::new([0; KEY_BYTES]);
    Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
        .hash_password_into_with_memory(passphrase, salt, &mut *key, &mut memory)
        .expect("a passphrase is short, and the salt and the memory have the right size");
    memory.iter_mut().for_each(Zeroize::zeroize);
    key
}

fn derived(secret: &[u8], salt: &[u8], info: &[u8]) -> Zeroizing<[u8; KEY_BYTES]> {
    let extracted = Salt::new(HKDF_SHA256, salt).extract(secret);
    let mut key = Zeroizing::new([0; KEY_BYTES]);
    extracted
        .expand(&[info], HKDF_SHA256)
        .and_then(|material| material.fill(&mut *key))
        .expect("HKDF-SHA256 gives 32 bytes");
    key
}

/// One wrapped copy of the key.
#[derive(Clone, PartialEq, Eq)]
pub struct KeySlot {
    id: u32,
    kind: SlotKind,
    cost: Cost,
    made_unix_s: u64,
    salt: [u8; SALT_BYTES],
    label: String,
    wrapped: [u8; WRAPPED_BYTES],
}

impl KeySlot {
    /// Its number in the ring.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// What opens it.
    pub fn kind(&self) -> SlotKind {
        self.kind
    }

    /// What trying a passphrase costs; `None` for other kinds.
    pub fn cost(&self) -> Option<Cost> {
        (self.kind == SlotKind::Passphrase).then_some(self.cost)
    }

    /// When it was made, as the machine that did so saw it.
    pub fn made_unix_s(&self) -> u64 {
        self.made_unix_s
    }

    /// What its owner called it.
    pub fn label(&self) -> &str {
        &self.label
    }

    fn bound(&self, volume: VolumeId) -> Vec<u8> {
        let mut bound = [SLOT_LABEL, volume.as_bytes()].concat();
        self.encode_head(&mut bound);
        bound
    }

    fn open(&self, volume: VolumeId, secret: &SlotSecret) -> Option<VolumeKey> {
        let wrapping = aead_key(&secret.wrapping_key(&self.salt, self.cost));
        let (sealed, tag) = self.wrapped.split_at(KEY_BYTES);
        let mut key = Zeroizing::new([0; KEY_BYTES]);
        let bound = Aad::from(self.bound(volume));
        wrapping.open_separate_gather(zero_nonce(), bound, sealed, tag, &mut *key).ok()?;
        Some(VolumeKey::from_bytes(key))
    }
}

impl fmt::Debug for KeySlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeySlot({} {} {:?})", self.id, self.kind, self.label)
    }
}

fn zero_nonce() -> Nonce {
    Nonce::assume_unique_for_key([0; NONCE_LEN])
}

/// A slot to be made.
#[derive(Debug)]
pub struct NewSlot<'a> {
    /// What shall open it.
    pub secret: &'a SlotSecret,
    /// What it is called, for people.
    pub label: &'a str,
    /// What a passphrase costs; ignored for other kinds.
    pub cost: Cost,
    /// Now.
    pub unix_s: u64,
}

/// The wrapped copies of one volume's key.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct KeyRing {
    volume: VolumeId,
    slots: Vec<KeySlot>,
}

impl KeyRing {
    /// A ring without slots.
    pub fn new(volume: VolumeId) -> Self {
        Self { volume, slots: Vec::new() }
    }

    /// Whose key it holds.
    pub fn volume(&self) -> VolumeId {
        self.volume
    }

    /// Its slots, the oldest first.
    pub fn slots(&self) -> &[KeySlot] {
        &self.slots
    }

    /// Wraps `key` in one more slot; its number.
    ///
    /// # Errors
    /// [`KeyRingError::Full`], [`KeyRingError::Label`], [`KeyRingError::Cost`].
    ///
    /// # Panics
    /// When the system has no randomness to give.
    pub fn add(&mut self, key: &VolumeKey, new: &NewSlot<'_>) -> Result<u32, KeyRingError> {
        if self.slots.len() >= SLOTS_MAX {
            return Err(KeyRingError::Full);
        }
        if new.label.len() > LABEL_BYTES_MAX || new.label.chars().any(char::is_control) {
            return Err(KeyRingError::Label);
        }
        let kind = new.secret.kind();
        let cost = if kind == SlotKind::Passphrase { new.cost } else { Cost::NONE };
        if kind == SlotKind::Passphrase {
            cost.check()?;
        }
        let mut salt = [0; SALT_BYTES];
        getrandom::fill(&mut salt).expect("the system gives randomness");
        let id = self.slots.iter().map(|slot| slot.id).max().unwrap_or(0).saturating_add(1);
        let label = new.label.to_owned();
        let (made_unix_s, wrapped) = (new.unix_s, [0; WRAPPED_BYTES]);
        let mut slot = KeySlot { id, kind, cost, made_unix_s, salt, label, wrapped };
        let wrapping = aead_key(&new.secret.wrapping_key(&salt, cost));
        let bound = Aad::from(slot.bound(self.volume));
        let (sealed, tag) = slot.wrapped.split_at_mut(KEY_BYTES);
        sealed.copy_from_slice(key.expose());
        let made = wrapping
            .seal_in_place_separate_tag(zero_nonce(), bound, sealed)
            .expect("AES-GCM seals 32 bytes");
        tag.copy_from_slice(made.as_ref());
        self.slots.push(slot);
        check_work(&self.slots).inspect_err(|_| drop(self.slots.pop()))?;
        Ok(id)
    }

    /// Takes a slot away.
    ///
    /// # Errors
    /// [`KeyRingError::NoSlot`]; [`KeyRingError::Last`]: nothing would open the volume any more.
    pub fn remove(&mut self, id: u32) -> Result<KeySlot, KeyRingError> {
        let at = self.slots.iter().position(|slot| slot.id == id);
        let at = at.ok_or(KeyRingError::NoSlot { slot: id })?;
        if self.slots.len() == 1 {
            return Err(KeyRingError::Last);
        }
        Ok(self.slots.remove(at))
    }

    /// The ring without a slot, for one that takes its place: it may have none left.
    #[must_use]
    pub fn without(mut self, id: u32) -> Self {
        self.slots.retain(|slot| slot.id != id);
        self
    }

    /// The volume's key, and the number of the slot that held it.
    ///
    /// # Errors
    /// [`KeyRingError::Wrong`] when the secret opens none.
    pub fn open(&self, secret: &SlotSecret) -> Result<(VolumeKey, u32), KeyRingError> {
        let mut fitting = self.slots.iter().filter(|slot| slot.kind == secret.kind());
        fitting
            .find_map(|slot| Some((slot.open(self.volume, secret)?, slot.id)))
            .ok_or(KeyRingError::Wrong { kind: secret.kind() })
    }
}

fn check_work(slots: &[KeySlot]) -> Result<(), KeyRingError> {
    let work: u64 = slots.iter().map(|slot| slot.cost.work_kib()).sum();
    if work <= WORK_KIB_MAX {
        return Ok(());
    }
    Err(KeyRingError::Cost { memory_kib: work, passes: 1 })
}

/// Why a ring is none, or was not opened or changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyRingError {
    /// The bytes are no ring.
    #[error("this is no key ring: {detail}")]
    Format {
        /// What is wrong.
        detail: &'static str,
    },
    /// A later version made it.
    #[error("the key ring has version {version}, which this program does not know")]
    Version {
        /// The version it says.
        version: u16,
    },
    /// Trying it would cost more than is sane.
    #[error(
        "the key ring asks for {memory_kib} KiB of memory in {passes} passes to try a passphrase: \
         refused"
    )]
    Cost {
        /// The memory.
        memory_kib: u64,
        /// The passes.
        passes: u64,
    },
    /// The secret opens no slot.
    #[error("wrong {kind}: it opens no key slot of this volume")]
    Wrong {
        /// What it was.
        kind: SlotKind,
    },
    /// There is no room.
    #[error("the key ring is full: {SLOTS_MAX} slots; remove one first")]
    Full,
    /// A label is too long, or has control characters.
    #[error("a label has at most {LABEL_BYTES_MAX} bytes and no control characters")]
    Label,
    /// There is no such slot.
    #[error("there is no key slot {slot}")]
    NoSlot {
        /// As asked for.
        slot: u32,
    },
    /// It is the last.
    #[error("this is the last key slot: without it nobody could ever open the volume again")]
    Last,
}
