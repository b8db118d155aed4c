//! The bytes of a key ring (docs/formats.md, "Key ring"). Little-endian.

use super::{
    Cost, KeyRing, KeyRingError, KeySlot, SALT_BYTES, SlotKind, WRAPPED_BYTES, check_work,
};
use crate::fragment::crc32c;
use crate::ids::VolumeId;

const MAGIC: &[u8; 8] = b"USKEYRNG";
const VERSION: u16 = 1;
const HEADER_BYTES: usize = 28;
const SLOT_HEAD_BYTES: usize = 60;
const SUM_BYTES: usize = 4;

/// The most slots of a ring.
pub const SLOTS_MAX: usize = 16;
/// The longest label of a slot.
pub const LABEL_BYTES_MAX: usize = 64;
/// The largest ring.
pub const RING_BYTES_MAX: usize =
    HEADER_BYTES + SLOTS_MAX * (SLOT_HEAD_BYTES + LABEL_BYTES_MAX + WRAPPED_BYTES) + SUM_BYTES;

/// Takes fields from the front.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], KeyRingError> {
        let (taken, rest) = self.0.split_first_chunk().ok_or(wrong("it ends early"))?;
        self.0 = rest;
        Ok(*taken)
    }

    fn slice(&mut self, bytes: usize) -> Result<&'a [u8], KeyRingError> {
        let (taken, rest) = self.0.split_at_checked(bytes).ok_or(wrong("it ends early"))?;
        self.0 = rest;
        Ok(taken)
    }

    fn u16(&mut self) -> Result<u16, KeyRingError> {
        self.take().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32, KeyRingError> {
        self.take().map(u32::from_le_bytes)
    }
}

fn wrong(detail: &'static str) -> KeyRingError {
    KeyRingError::Format { detail }
}

impl KeySlot {
    /// All of a slot before the wrapped key.
    pub(super) fn encode_head(&self, out: &mut Vec<u8>) {
        out.extend(self.id.to_le_bytes());
        out.push(self.kind as u8);
        out.push(self.label.len() as u8);
        out.extend([0; 2]);
        for number in [self.cost.memory_kib, self.cost.passes, self.cost.lanes] {
            out.extend(number.to_le_bytes());
        }
        out.extend(self.made_unix_s.to_le_bytes());
        out.extend(self.salt);
        out.extend(self.label.as_bytes());
    }

    fn decode(from: &mut Reader<'_>) -> Result<Self, KeyRingError> {
        let id = from.u32()?;
        let [kind, label_bytes] = from.take()?;
        let kind = match kind {
            1 => SlotKind::Passphrase,
            2 => SlotKind::KeyFile,
            3 => SlotKind::Recovery,
            _ => return Err(wrong("a slot is of no known kind")),
        };
        if from.u16()? != 0 {
            return Err(wrong("reserved bytes are not zero"));
        }
        let (memory_kib, passes, lanes) = (from.u32()?, from.u32()?, from.u32()?);
        let cost = Cost { memory_kib, passes, lanes };
        match kind {
            SlotKind::Passphrase => cost.check()?,
            SlotKind::KeyFile | SlotKind::Recovery if cost != Cost::NONE => {
                return Err(wrong("a key that is not stretched has a cost"));
            }
            SlotKind::KeyFile | SlotKind::Recovery => {}
        }
        let made_unix_s = u64::from_le_bytes(from.take()?);
        let salt: [u8; SALT_BYTES] = from.take()?;
        if usize::from(label_bytes) > LABEL_BYTES_MAX {
            return Err(wrong("a label is too long"));
        }
        let label = std::str::from_utf8(from.slice(label_bytes.into())?);
        let label = label.map_err(|_| wrong("a label is no text"))?.to_owned();
        if label.chars().any(char::is_control) {
            return Err(wrong("a label has control characters"));
        }
        Ok(Self { id, kind, cost, made_unix_s, salt, label, wrapped: from.take()? })
    }
}

impl KeyRing {
    /// The ring's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        out.extend(VERSION.to_le_bytes());
        out.extend((self.slots.len() as u16).to_le_bytes());
        out.extend(self.volume.as_bytes());
        for slot in &self.slots {
            slot.encode_head(&mut out);
            out.extend(slot.wrapped);
        }
        out.extend(crc32c(&out).to_le_bytes());
        out
    }

    /// The ring in these bytes. Nothing of it is believed yet but that trying it is affordable.
    ///
    /// # Errors
    /// [`KeyRingError::Format`], [`KeyRingError::Version`], [`KeyRingError::Cost`].
    pub fn decode(bytes: &[u8]) -> Result<Self, KeyRingError> {
        if bytes.len() > RING_BYTES_MAX {
            return Err(wrong("it is too long"));
        }
        let (content, sum) = bytes.split_last_chunk().ok_or(wrong("it ends early"))?;
        let mut from = Reader(content);
        if from.take::<8>()? != *MAGIC {
            return Err(wrong("it does not begin as one"));
        }
        let version = from.u16()?;
        if version != VERSION {
            return Err(KeyRingError::Version { version });
        }
        if crc32c(content) != u32::from_le_bytes(*sum) {
            return Err(wrong("its sum does not hold"));
        }
        let count = usize::from(from.u16()?);
        if !(1..=SLOTS_MAX).contains(&count) {
            return Err(wrong("it has no slots, or too many"));
        }
        let volume = VolumeId::from_bytes(from.take()?);
        let mut slots: Vec<KeySlot> = Vec::with_capacity(count);
        for _ in 0..count {
            let slot = KeySlot::decode(&mut from)?;
            if slots.iter().any(|known| known.id == slot.id) {
                return Err(wrong("two slots have one number"));
            }
            slots.push(slot);
        }
        if !from.0.is_empty() {
            return Err(wrong("something follows its slots"));
        }
        check_work(&slots)?;
        Ok(Self { volume, slots })
    }
}
