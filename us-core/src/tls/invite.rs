//! The code that an invitation prints and a newcomer types.
//!
//! ```text
//! XXXXX-XXXXX-XXXXX-XXXXX-XXXXX-XXXXX-XXXXX@HOST:PORT
//! 35 base32 digits: 80 bits secret | 80 bits pin | 15 bits check
//! ```
//! The *secret* proves the invitation; the directory keeps only its hash. The *pin* is the beginning of
//! the SHA-256 of the authority's certificate: whoever answers at the address must show a chain to that
//! certificate before the secret is sent. The *check* covers everything, the address too, so that a
//! typing error is told before anybody is asked.
//!
//! Digits are those of Crockford: no I, L, O, U; small letters and `O`, `I`, `L` are read as meant.

use std::fmt;
use std::str::FromStr;

use aws_lc_rs::digest::{SHA256, digest};
use rustls::pki_types::CertificateDer;
use zeroize::Zeroizing;

/// Bytes of the secret.
pub const SECRET_BYTES: usize = 10;
/// Bytes of the pin.
pub const PIN_BYTES: usize = 10;
/// The longest address in a code.
pub const ADDRESS_BYTES_MAX: usize = 255;

const DIGITS: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";
const CODE_DIGITS: usize = (SECRET_BYTES + PIN_BYTES) * 8 / 5 + CHECK_DIGITS;
const CHECK_DIGITS: usize = 3;
const GROUP_DIGITS: usize = 5;

/// The beginning of the hash of an authority's certificate.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AuthorityPin([u8; PIN_BYTES]);

impl AuthorityPin {
    /// The pin of this certificate.
    pub fn of(certificate: &CertificateDer<'_>) -> Self {
        let hash = digest(&SHA256, certificate);
        let mut pin = [0; PIN_BYTES];
        pin.copy_from_slice(&hash.as_ref()[..PIN_BYTES]);
        Self(pin)
    }
}

/// What is wrong with a code, found without asking anybody.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CodeError {
    /// No `@`, or nothing behind it.
    #[error("the code is not complete: it ends with @ and the directory's HOST:PORT")]
    Address,
    /// Another number of digits.
    #[error("the code has {found} letters and digits before the @; it must be {CODE_DIGITS}")]
    Length {
        /// How many there are.
        found: usize,
    },
    /// A character no code has.
    #[error("no code has a {found:?} in it")]
    Digit {
        /// The character.
        found: char,
    },
    /// Everything looks right, but the check does not fit.
    #[error("the code has a typing error")]
    Check,
}

/// An invitation as it is handed on.
#[derive(Clone, PartialEq, Eq)]
pub struct InviteCode {
    /// Proves the invitation.
    pub secret: Zeroizing<[u8; SECRET_BYTES]>,
    /// Whose certificates are meant.
    pub pin: AuthorityPin,
    /// The directory's "host:port".
    pub address: String,
}

impl fmt::Debug for InviteCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The secret stays out of logs.
        f.debug_struct("InviteCode").field("address", &self.address).finish_non_exhaustive()
    }
}

/// What the directory keeps of a secret: enough to recognise it, not to use it.
pub fn secret_hash(secret: &[u8]) -> [u8; 32] {
    let text = Zeroizing::new([b"us invite secret", secret].concat());
    digest(&SHA256, &text).as_ref().try_into().expect("SHA-256 gives 32 bytes")
}

impl InviteCode {
    fn check(&self) -> u16 {
        let parts = [b"us invite check", &self.secret[..], &self.pin.0, self.address.as_bytes()];
        let text = Zeroizing::new(parts.concat());
        let hash = digest(&SHA256, &text);
        u16::from_be_bytes([hash.as_ref()[0], hash.as_ref()[1]]) >> 1
    }

    /// The code, for the newcomer and nobody else.
    pub fn reveal(&self) -> Zeroizing<String> {
        let mut text = Zeroizing::new(String::with_capacity(CODE_DIGITS * 2 + self.address.len()));
        let (mut bits, mut held) = (0u32, 0u32);
        let check = self.check();
        let bytes = self.secret.iter().chain(&self.pin.0).map(|byte| (u32::from(*byte), 8));
        let mut digits = 0;
        for (value, width) in bytes.chain([(u32::from(check), 15)]) {
            bits = (bits << width) | value;
            held += width;
            while held >= 5 {
                held -= 5;
                if digits > 0 && digits % GROUP_DIGITS == 0 {
                    text.push('-');
                }
                text.push(char::from(DIGITS[(bits >> held) as usize & 31]));
                digits += 1;
            }
            bits &= (1 << held) - 1;
        }
        text.push('@');
        text.push_str(&self.address);
        text
    }
}

fn digit(found: char) -> Result<u8, CodeError> {
    let upper = match found.to_ascii_uppercase() {
        'O' => '0',
        'I' | 'L' => '1',
        other => other,
    };
    let place = DIGITS.iter().position(|digit| char::from(*digit) == upper);
    place.map(|place| place as u8).ok_or(CodeError::Digit { found })
}

impl FromStr for InviteCode {
    type Err = CodeError;

    fn from_str(text: &str) -> Result<Self, CodeError> {
        let (digits, address) = text.trim().split_once('@').ok_or(CodeError::Address)?;
        let plain = |c: char| c.is_ascii_graphic();
        let port = address.rsplit_once(':').map(|(host, port)| (host.len(), port.parse::<u16>()));
        let has_port = port.is_some_and(|(host, port)| host > 0 && port.is_ok());
        if !has_port || address.len() > ADDRESS_BYTES_MAX || !address.chars().all(plain) {
            return Err(CodeError::Address);
        }
        let values = digits.chars().filter(|c| !matches!(c, '-' | ' ')).map(digit);
        let values = Zeroizing::new(values.collect::<Result<Vec<u8>, _>>()?);
        if values.len() != CODE_DIGITS {
            return Err(CodeError::Length { found: values.len() });
        }
        let (data, check) = values.split_at(CODE_DIGITS - CHECK_DIGITS);
        let mut bytes = Zeroizing::new([0u8; SECRET_BYTES + PIN_BYTES]);
        // Eight digits are five bytes.
        for (group, out) in data.chunks_exact(8).zip(bytes.chunks_exact_mut(5)) {
            let bits = group.iter().fold(0u64, |bits, value| (bits << 5) | u64::from(*value));
            out.copy_from_slice(&bits.to_be_bytes()[3..]);
        }
        let (secret, pin) = bytes.split_at(SECRET_BYTES);
        let code = Self {
            secret: Zeroizing::new(secret.try_into().expect("it was cut there")),
            pin: AuthorityPin(pin.try_into().expect("it was cut there")),
            address: address.to_owned(),
        };
        let check = check.iter().fold(0, |bits, value| (bits << 5) | u16::from(*value));
        if check == code.check() { Ok(code) } else { Err(CodeError::Check) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn code(secret: [u8; SECRET_BYTES], pin: [u8; PIN_BYTES], address: &str) -> InviteCode {
        let (secret, pin) = (Zeroizing::new(secret), AuthorityPin(pin));
        InviteCode { secret, pin, address: address.to_owned() }
    }

    proptest! {
        #[test]
        fn a_code_is_read_as_it_was_written(secret: [u8; 10], pin: [u8; 10], port: u16) {
            let code = code(secret, pin, &format!("us.example:{port}"));
            let text = code.reveal();
            prop_assert_eq!(text.split('@').next().unwrap().len(), 41);
            prop_assert_eq!(text.parse::<InviteCode>(), Ok(code.clone()));
            let sloppy = text.replace('-', " ").replace('0', "o").replace('1', "l");
            // The address is read as it stands.
            let (digits, _) = sloppy.split_once('@').unwrap();
            let sloppy = format!(" {}@{}\n", digits.to_lowercase(), code.address);
            prop_assert_eq!(sloppy.parse::<InviteCode>(), Ok(code));
        }

        #[test]
        fn a_wrong_digit_is_told(secret: [u8; 10], at in 0usize..35, to in 0usize..32) {
            let text = code(secret, [7; 10], "h:1").reveal().replace('-', "");
            let mut bytes = text.clone().into_bytes();
            prop_assume!(bytes[at] != DIGITS[to]);
            bytes[at] = DIGITS[to];
            let wrong = String::from_utf8(bytes).unwrap().parse::<InviteCode>();
            // 15 bits: one in 32,768 slips through, and is then a wrong code for the directory.
            prop_assume!(wrong.is_err());
            prop_assert_eq!(wrong, Err(CodeError::Check));
        }

        #[test]
        fn no_text_panics(text in "\\PC{0,80}") {
            let _ = text.parse::<InviteCode>();
        }
    }

    #[test]
    fn errors_say_what_is_wrong() {
        let good = code([1; 10], [2; 10], "h:1").reveal();
        let digits = good.split('@').next().unwrap().to_owned();
        let parse = |text: String| text.parse::<InviteCode>().unwrap_err();
        assert_eq!(parse(digits.clone()), CodeError::Address);
        assert_eq!(parse(format!("{digits}@host")), CodeError::Address);
        assert_eq!(parse(format!("{digits}@h:2")), CodeError::Check, "the address is covered");
        assert_eq!(parse(format!("{}@h:1", &digits[1..])), CodeError::Length { found: 34 });
        assert_eq!(parse(good.replacen(&digits[..1], "u", 1)), CodeError::Digit { found: 'u' });
        assert!(!format!("{:?}", code([1; 10], [2; 10], "h:1")).contains(&digits[..5]));
    }
}
