//! Identifiers. Each is a type of its own, so that none can be passed for another.
//!
//! Byte order: ids are big-endian wherever they are part of a key, so that keys sort as the numbers.

use std::fmt;
use std::str::FromStr;
use std::time::{SystemTime, UNIX_EPOCH};

macro_rules! id128 {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name([u8; 16]);

        impl $name {
            /// The id with these bytes.
            pub const fn from_bytes(bytes: [u8; 16]) -> Self {
                Self(bytes)
            }

            /// The id in `bytes`; `None` unless there are exactly 16.
            pub fn from_slice(bytes: &[u8]) -> Option<Self> {
                bytes.try_into().ok().map(Self)
            }

            /// The 16 bytes.
            pub const fn as_bytes(&self) -> &[u8; 16] {
                &self.0
            }

            /// A fresh id: 48 bits of Unix time in milliseconds, then 80 random bits (the layout of
            /// UUIDv7, without its version bits). The random part comes from the system at the call,
            /// never from a pool, so that a cloned machine cannot repeat one.
            ///
            /// # Panics
            /// When the system has no randomness to give: no safe id exists then.
            pub fn generate() -> Self {
                let millis = SystemTime::now()
                    .duration_since(UNIX_EPOCH)
                    .map_or(0, |elapsed| elapsed.as_millis() as u64);
                let mut bytes = [0u8; 16];
                getrandom::fill(&mut bytes).expect("the system gives randomness");
                bytes[..6].copy_from_slice(&millis.to_be_bytes()[2..]);
                Self(bytes)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;

            fn from_str(text: &str) -> Result<Self, ParseIdError> {
                let digits = text.as_bytes();
                if digits.len() != 32 {
                    return Err(ParseIdError);
                }
                let nibble = |digit: u8| (digit as char).to_digit(16).ok_or(ParseIdError);
                let mut bytes = [0u8; 16];
                for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
                    *byte = (nibble(pair[0])? << 4 | nibble(pair[1])?) as u8;
                }
                Ok(Self(bytes))
            }
        }
    };
}

/// A text is not an id: 32 hexadecimal digits were expected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not an id: expected 32 hexadecimal digits")]
pub struct ParseIdError;

id128! {
    /// One virtual disk.
    VolumeId
}
id128! {
    /// One immutable block. Made by the client when the block is sealed and never used again.
    BlockId
}
id128! {
    /// One directory with its providers and mounts; made with its certificate authority.
    ClusterId
}

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

number! {
    /// A provider, as metadata knows it; the directory gives the number to a key at its first hello.
    ProviderId(u32)
}
number! {
    /// An inode of a volume, never reused. The root is 1.
    Ino(u64)
}
number! {
    /// A mount's session with the directory.
    SessionId(u64)
}
number! {
    /// The number the directory gives with a placement lease. It grows for ever, and says which
    /// garbage lists may speak of a fragment.
    Birth(u64)
}
number! {
    /// The place of a mutation batch in its session's log. The first batch is 1.
    BatchNumber(u64)
}

impl Ino {
    /// The root directory of every volume.
    pub const ROOT: Self = Self(1);
}

/// One of the s + r coded pieces of a block.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct FragmentId {
    /// The block it is a piece of.
    pub block: BlockId,
    /// 0..s are data, s..s+r parity.
    pub index: u8,
}

impl FragmentId {
    /// 17 bytes: block, index. Sorts the fragments of one block together.
    pub fn to_key(self) -> [u8; 17] {
        let mut key = [0u8; 17];
        key[..16].copy_from_slice(self.block.as_bytes());
        key[16] = self.index;
        key
    }

    /// The inverse of [`FragmentId::to_key`]; `None` unless there are exactly 17 bytes.
    pub fn from_key(key: &[u8]) -> Option<Self> {
        let (index, block) = key.split_last()?;
        Some(Self { block: BlockId::from_slice(block)?, index: *index })
    }
}

impl fmt::Display for FragmentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.block, self.index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_time_ordered_and_print_round() {
        let first = BlockId::generate();
        std::thread::sleep(std::time::Duration::from_millis(2));
        let second = BlockId::generate();
        assert!(first < second);
        assert_eq!(first.to_string().parse(), Ok(first));
        assert_eq!("abc".parse::<BlockId>(), Err(ParseIdError));
        assert_eq!("é".repeat(16).parse::<BlockId>(), Err(ParseIdError));
    }

    #[test]
    fn fragment_keys_sort_by_block_then_index() {
        let block = BlockId::from_bytes([7; 16]);
        let fragment = FragmentId { block, index: 3 };
        assert_eq!(FragmentId::from_key(&fragment.to_key()), Some(fragment));
        assert_eq!(FragmentId::from_key(&[0; 16]), None);
    }
}
