//! A recovery key: random bytes as a text that can be printed, read aloud and typed.
//!
//! 22 random bytes and the first three of their SHA-256, in Crockford's base 32 (no I, L, O, U), eight
//! groups of five. Reading is generous: any case, any blanks and hyphens, `O` for `0`, `I` and `L` for `1`.

use std::fmt;
use std::str::FromStr;

use aws_lc_rs::digest::{SHA256, digest};
use zeroize::Zeroizing;

/// Random bytes of a recovery key.
pub const RECOVERY_BYTES: usize = 22;
const CHECK_BYTES: usize = 3;
const TEXT_BYTES: usize = RECOVERY_BYTES + CHECK_BYTES;
const DIGITS: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";
/// Digits of the text: five bits each.
const TEXT_DIGITS: usize = TEXT_BYTES * 8 / 5;
const GROUP_DIGITS: usize = 5;

/// A secret to be kept on paper. It leaves memory when dropped, and does not print.
#[derive(Clone)]
pub struct RecoveryKey(Zeroizing<[u8; RECOVERY_BYTES]>);

/// A text is no recovery key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RecoveryTextError {
    /// Too short or too long.
    #[error(
        "a recovery key has {TEXT_DIGITS} letters and digits in groups of {GROUP_DIGITS}; this has {digits}"
    )]
    Length {
        /// The letters and digits found.
        digits: usize,
    },
    /// A character that no recovery key has.
    #[error("{found:?} is in no recovery key")]
    Character {
        /// The character.
        found: char,
    },
    /// Something was misread.
    #[error("the recovery key's check does not hold: a character was misread, changed or left out")]
    Check,
}

impl RecoveryKey {
    /// A new one from the system's randomness.
    ///
    /// # Panics
    /// When the system has no randomness to give.
    pub fn generate() -> Self {
        let mut bytes = Zeroizing::new([0; RECOVERY_BYTES]);
        getrandom::fill(&mut *bytes).expect("the system gives randomness");
        Self(bytes)
    }

    /// The key of these bytes.
    pub fn from_bytes(bytes: Zeroizing<[u8; RECOVERY_BYTES]>) -> Self {
        Self(bytes)
    }

    pub(super) fn expose(&self) -> &[u8] {
        &*self.0
    }

    fn check(&self) -> [u8; CHECK_BYTES] {
        let mut check = [0; CHECK_BYTES];
        check.copy_from_slice(&digest(&SHA256, &*self.0).as_ref()[..CHECK_BYTES]);
        check
    }

    /// The text for people.
    pub fn to_text(&self) -> Zeroizing<String> {
        let mut bytes = Zeroizing::new([0; TEXT_BYTES]);
        bytes[..RECOVERY_BYTES].copy_from_slice(&*self.0);
        bytes[RECOVERY_BYTES..].copy_from_slice(&self.check());
        let mut text = Zeroizing::new(String::with_capacity(TEXT_DIGITS + TEXT_DIGITS / 5));
        for at in 0..TEXT_DIGITS {
            if at > 0 && at % GROUP_DIGITS == 0 {
                text.push('-');
            }
            let value = (0..5).fold(0, |value, bit| {
                let bit = at * 5 + bit;
                value << 1 | (bytes[bit / 8] >> (7 - bit % 8) & 1)
            });
            text.push(char::from(DIGITS[usize::from(value)]));
        }
        text
    }
}

impl FromStr for RecoveryKey {
    type Err = RecoveryTextError;

    fn from_str(text: &str) -> Result<Self, RecoveryTextError> {
        let mut bytes = Zeroizing::new([0u8; TEXT_BYTES]);
        let mut digits = 0;
        for found in text.chars().filter(|c| !c.is_whitespace() && *c != '-') {
            let plain = match found.to_ascii_uppercase() {
                'O' => '0',
                'I' | 'L' => '1',
                other => other,
            };
            let value = DIGITS.iter().position(|digit| char::from(*digit) == plain);
            let value = value.ok_or(RecoveryTextError::Character { found })?;
            for bit in (0..5).filter(|_| digits < TEXT_DIGITS) {
                let at = digits * 5 + bit;
                bytes[at / 8] |= ((value >> (4 - bit) & 1) as u8) << (7 - at % 8);
            }
            digits += 1;
        }
        if digits != TEXT_DIGITS {
            return Err(RecoveryTextError::Length { digits });
        }
        let mut secret = Zeroizing::new([0; RECOVERY_BYTES]);
        secret.copy_from_slice(&bytes[..RECOVERY_BYTES]);
        let key = Self(secret);
        let holds = key.check()[..] == bytes[RECOVERY_BYTES..];
        holds.then_some(key).ok_or(RecoveryTextError::Check)
    }
}

impl fmt::Debug for RecoveryKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RecoveryKey(secret)")
    }
}
