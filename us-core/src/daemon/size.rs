//! Sizes and durations as people write and read them.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A number of bytes in a configuration or on a command line.
///
/// Written as a number and a unit: `100G`, `512MiB`, `1.5T`, `10GB`. `K M G T P` and `KiB MiB …`
/// count in 1024s (as `dd` and `truncate` do), `KB MB GB …` in 1000s; no unit means bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Size(pub u64);

/// A text is not a size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a size: write a number and a unit, for example 100G, 512MiB or 10GB")]
pub struct ParseSizeError {
    /// What was read.
    pub text: String,
}

const UNITS: [&str; 6] = ["", "k", "m", "g", "t", "p"];

impl Size {
    /// The bytes.
    pub const fn bytes(self) -> u64 {
        self.0
    }
}

impl FromStr for Size {
    type Err = ParseSizeError;

    fn from_str(text: &str) -> Result<Self, ParseSizeError> {
        let wrong = || ParseSizeError { text: text.to_owned() };
        let trimmed = text.trim();
        let digits_end = trimmed
            .find(|c: char| !(c.is_ascii_digit() || c == '.' || c == '_'))
            .unwrap_or(trimmed.len());
        let (number, unit) = trimmed.split_at(digits_end);
        let number = number.replace('_', "");
        let unit = unit.trim().to_ascii_lowercase();
        let (letter, base) = match unit.strip_suffix("ib").or(unit.strip_suffix('i')) {
            Some(letter) if !letter.is_empty() => (letter, 1024u64),
            _ => match unit.strip_suffix('b') {
                Some("") => ("", 1024),
                Some(letter) => (letter, 1000),
                None => (unit.as_str(), 1024),
            },
        };
        let power = UNITS.iter().position(|known| *known == letter).ok_or_else(wrong)?;
        let factor = base.pow(power as u32);
        if let Ok(whole) = number.parse::<u64>() {
            return whole.checked_mul(factor).map(Self).ok_or_else(wrong);
        }
        let fraction: f64 = number.parse().map_err(|_| wrong())?;
        let bytes = fraction * factor as f64;
        if !(0.0..9e18).contains(&bytes) {
            return Err(wrong());
        }
        Ok(Self(bytes as u64))
    }
}

/// For people: three digits and a binary unit, `12.3 GiB`.
impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const NAMES: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
        let mut value = self.0 as f64;
        let mut unit = 0;
        while value >= 999.5 && unit + 1 < NAMES.len() {
            value /= 1024.0;
            unit += 1;
        }
        let decimals = match (unit, value) {
            (0, _) => 0,
            (_, value) if value < 9.995 => 2,
            (_, value) if value < 99.95 => 1,
            _ => 0,
        };
        f.pad(&format!("{value:.decimals$} {}", NAMES[unit]))
    }
}

impl Serialize for Size {
    /// Exact: the number of bytes, or with a binary unit where that loses nothing.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut value = self.0;
        let mut unit = 0;
        while value > 0 && value.is_multiple_of(1024) && unit + 1 < UNITS.len() {
            value /= 1024;
            unit += 1;
        }
        serializer.collect_str(&format_args!("{value}{}", UNITS[unit].to_uppercase()))
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Raw {
            Bytes(u64),
            Text(String),
        }
        match Raw::deserialize(deserializer)? {
            Raw::Bytes(bytes) => Ok(Self(bytes)),
            Raw::Text(text) => text.parse().map_err(serde::de::Error::custom),
        }
    }
}

/// A time span for people, in its two largest units: `850 ms`, `42 s`, `3 min 20 s`, `2 h 5 min`,
/// `4 d 3 h`.
pub fn human_duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let pair = |large: u64, large_unit: &str, small: u64, small_unit: &str| match small {
        0 => format!("{large} {large_unit}"),
        _ => format!("{large} {large_unit} {small} {small_unit}"),
    };
    match seconds {
        0 => format!("{} ms", duration.as_millis()),
        1..60 => format!("{seconds} s"),
        60..3_600 => pair(seconds / 60, "min", seconds % 60, "s"),
        3_600..86_400 => pair(seconds / 3_600, "h", seconds % 3_600 / 60, "min"),
        _ => pair(seconds / 86_400, "d", seconds % 86_400 / 3_600, "h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_as_people_write_them() {
        let bytes = |text: &str| text.parse::<Size>().map(Size::bytes).ok();
        assert_eq!(bytes("100G"), Some(100 << 30));
        assert_eq!(bytes("512MiB"), Some(512 << 20));
        assert_eq!(bytes("10 GB"), Some(10_000_000_000));
        assert_eq!(bytes("1.5T"), Some(3 << 39));
        assert_eq!(bytes("4096"), Some(4096));
        assert_eq!(bytes("7b"), Some(7));
        assert_eq!(bytes("1_000k"), Some(1000 << 10));
        assert_eq!(bytes("0"), Some(0));
        for wrong in ["", "G", "ten", "1X", "-1G", "1.2.3M", "99999999P", "1 G G", "iB"] {
            assert_eq!(bytes(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn sizes_for_people() {
        let text = |bytes: u64| Size(bytes).to_string();
        assert_eq!(text(0), "0 B");
        assert_eq!(text(999), "999 B");
        assert_eq!(text(1000), "0.98 KiB");
        assert_eq!(text(1536), "1.50 KiB");
        assert_eq!(text(100 << 30), "100 GiB");
        assert_eq!(text(u64::MAX), "16.0 EiB");
        assert_eq!(format!("{:>9}|", Size(5)), "      5 B|");
    }

    #[test]
    fn durations_for_people() {
        let text = |millis| human_duration(Duration::from_millis(millis));
        assert_eq!(text(850), "850 ms");
        assert_eq!(text(42_900), "42 s");
        assert_eq!(text(200_000), "3 min 20 s");
        assert_eq!(text(7_200_000), "2 h");
        assert_eq!(text(86_400_000 * 4 + 3_600_000 * 3), "4 d 3 h");
    }

    proptest! {
        #[test]
        fn what_is_stored_is_exact(bytes in 0u64..i64::MAX as u64) {
            let value = toml::Value::try_from(Size(bytes)).unwrap();
            prop_assert_eq!(value.try_into::<Size>().unwrap(), Size(bytes));
        }

        #[test]
        fn any_text_is_an_answer_not_a_panic(text in ".{0,12}") {
            let _ = text.parse::<Size>();
        }
    }
}
