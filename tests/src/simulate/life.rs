//! When providers are on, and when they die: drawn from the seed alone.

use us_core::placement::draw::SplitMix;

/// A minute.
pub const MINUTE_MS: u64 = 60_000;
/// An hour.
pub const HOUR_MS: u64 = 60 * MINUTE_MS;
/// A day.
pub const DAY_MS: u64 = 24 * HOUR_MS;
/// A year.
pub const YEAR_MS: u64 = 365 * DAY_MS;

/// When machines are on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// Always.
    Always,
    /// On working days from eight or so to six or so; some are left on for ever.
    Office {
        /// Of a hundred, those that are left on.
        always_on_percent: u64,
    },
    /// On and off at random, for times that are exponential.
    Homes {
        /// Mean time on.
        on_ms: u64,
        /// Mean time off.
        off_ms: u64,
    },
}

/// The habits of one machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Habit {
    /// Never goes.
    Stays,
    /// Comes and goes at about these times of the day.
    Works {
        /// Minutes after midnight.
        comes_min: u64,
        /// Minutes after midnight.
        goes_min: u64,
    },
    /// At random.
    Roams {
        /// Mean time on.
        on_ms: u64,
        /// Mean time off.
        off_ms: u64,
    },
}

/// An exponential time of this mean, at least a millisecond.
pub fn exponential(random: &mut SplitMix, mean_ms: u64) -> u64 {
    let time = -(1.0 - random.unit()).ln() * mean_ms as f64;
    (time as u64).max(1)
}

impl Presence {
    /// One machine's.
    pub fn habit(self, random: &mut SplitMix) -> Habit {
        match self {
            Self::Always => Habit::Stays,
            Self::Office { always_on_percent } if random.below(100) < always_on_percent => {
                Habit::Stays
            }
            Self::Office { .. } => Habit::Works {
                comes_min: 7 * 60 + 30 + random.below(90),
                goes_min: 17 * 60 + random.below(90),
            },
            Self::Homes { on_ms, off_ms } => Habit::Roams { on_ms, off_ms },
        }
    }
}

/// The minutes around its time within which one comes or goes.
const JITTER_MIN: u64 = 20;

/// The first moment from `after_ms` (since a Monday's midnight) on, on a working day, at about this
/// minute of the day.
fn next_at(after_ms: u64, minute: u64, random: &mut SplitMix) -> u64 {
    let mut day = after_ms / DAY_MS;
    loop {
        let at = day * DAY_MS + (minute + random.below(JITTER_MIN)) * MINUTE_MS;
        if day % 7 < 5 && at > after_ms {
            return at + random.below(MINUTE_MS);
        }
        day += 1;
    }
}

impl Habit {
    /// Whether it is on at the start, a Monday's midnight.
    pub fn begins_on(self) -> bool {
        !matches!(self, Self::Works { .. })
    }

    /// When a machine that is on goes; `None`: it stays.
    pub fn goes(self, now_ms: u64, random: &mut SplitMix) -> Option<u64> {
        match self {
            Self::Stays => None,
            Self::Works { goes_min, .. } => Some(next_at(now_ms, goes_min, random)),
            Self::Roams { on_ms, .. } => Some(now_ms + exponential(random, on_ms)),
        }
    }

    /// When a machine that is off comes.
    pub fn comes(self, now_ms: u64, random: &mut SplitMix) -> u64 {
        match self {
            Self::Stays => now_ms + MINUTE_MS,
            Self::Works { comes_min, .. } => next_at(now_ms, comes_min, random),
            Self::Roams { off_ms, .. } => now_ms + exponential(random, off_ms),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_office_works_five_days() {
        let mut random = SplitMix::new(3);
        let habit = Habit::Works { comes_min: 480, goes_min: 1080 };
        let (mut now_ms, mut on_ms) = (0, 0);
        for day in 0..10 {
            let comes = habit.comes(now_ms, &mut random);
            let goes = habit.goes(comes, &mut random).unwrap();
            assert_eq!(comes / DAY_MS, day / 5 * 7 + day % 5);
            assert_eq!(comes / DAY_MS, goes / DAY_MS);
            on_ms += goes - comes;
            now_ms = goes;
        }
        assert!(on_ms > 95 * HOUR_MS && on_ms < 105 * HOUR_MS);
    }

    #[test]
    fn exponential_times_have_their_mean() {
        let mut random = SplitMix::new(1);
        let sum: u64 = (0..20_000).map(|_| exponential(&mut random, 1000)).sum();
        assert!((950..1050).contains(&(sum / 20_000)));
    }
}
