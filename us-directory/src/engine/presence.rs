//! The three clocks of a provider that is silent: *absent*, *dormant*, *dead*.
//!
//! ```text
//!            silent                 absent_ms                  due
//!   online ---------> absent ---------------------> dormant --------> dead
//!      ^                 \___ goodbye: at once ______/  |               |
//!      |_____________________ heard again ______________|_______________|
//! ```
//! A provider is due when it has been silent for `dead_ms` longer than it was expected to be: until
//! the return it announced, or the next hour in which its *profile* says it is usually on, or at
//! once where nothing is known. The profile is the share of each hour of the week in which it was
//! online, learnt over weeks.
//!
//! The *brake*: when a large share of the providers, or of one site, fell silent together, that is an
//! evening, a power cut or a partition, not as many deaths. None of them is dead by the clock alone
//! for `brake_ms`.
//!
//! Pure: everything is a function of what it is given. Durations count on the cluster's clock, which
//! stands still while no directory runs; the hour of the week is wall time, and decides nothing but
//! how much longer a silence is taken for sleep.

use us_proto::v1::ProviderState;

use crate::records::ProviderRecord;

/// Hours of a week.
pub const HOURS: usize = 168;
const HOUR_MS: u64 = 3_600_000;
/// How much of an hour's share the last week decides.
const LEARN: f64 = 0.25;
/// Weeks from which on it does.
const LEARN_WEEKS: u32 = 4;
/// From this share on an hour counts as one in which the provider is on.
const USUALLY_ON: u8 = 128;
/// Weeks after which a profile is believed.
const WEEKS_MIN: u32 = 2;
/// Providers that must have fallen silent together before it is a departure.
const BRAKE_PROVIDERS_MIN: usize = 3;

/// The times.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Clocks {
    /// How long a silence is an absence before it is a sleep.
    pub absent_ms: u64,
    /// How long a provider may be silent beyond what was expected before it is given up.
    pub dead_ms: u64,
    /// Silences that began within this time of each other began together.
    pub together_ms: u64,
    /// How many percent of a site or of all must fall silent together for the brake.
    pub brake_percent: u32,
    /// How long the brake holds.
    pub brake_ms: u64,
    /// The mean time to the death of a provider, for estimates.
    pub mttf_ms: u64,
}

impl Default for Clocks {
    fn default() -> Self {
        Self {
            absent_ms: 5 * 60_000,
            dead_ms: 24 * HOUR_MS,
            together_ms: HOUR_MS,
            brake_percent: 20,
            brake_ms: 7 * 24 * HOUR_MS,
            mttf_ms: 365 * 24 * HOUR_MS,
        }
    }
}

/// The hour of the week of a wall time, 0 = Monday 0:00 UTC.
pub fn hour_of_week(unix_ms: u64) -> usize {
    // 1 January 1970 was a Thursday.
    ((unix_ms / HOUR_MS + 3 * 24) % HOURS as u64) as usize
}

/// Notes the share of the hour of the week `hour` in which a provider was online; false where that
/// is no news.
pub fn learn(record: &mut ProviderRecord, hour: usize, share: f64) -> bool {
    let mut profile = record.profile.to_vec();
    if profile.len() != HOURS {
        profile = vec![(share * 255.0) as u8; HOURS];
        record.profile_hours = 0;
    }
    let known = f64::from(profile[hour]);
    // The first weeks are means, so that a profile does not start from a guess.
    let weeks = f64::from(record.profile_hours / HOURS as u32);
    let weight = (1.0 / (weeks + 1.0)).max(LEARN);
    profile[hour] = (known + (share * 255.0 - known) * weight).round().clamp(0.0, 255.0) as u8;
    // Hours are counted only as far as they change anything.
    let hours = (record.profile_hours + 1).min(LEARN_WEEKS * HOURS as u32);
    let is_news = profile[..] != record.profile[..] || hours != record.profile_hours;
    record.profile = profile.into();
    record.profile_hours = hours;
    is_news
}

/// How long after `unix_ms` the profile expects the provider to be on: 0 where it should be on now,
/// or where too little is known.
pub fn expected_back_ms(record: &ProviderRecord, unix_ms: u64) -> u64 {
    let known = record.profile.len() == HOURS
        && record.profile_hours >= WEEKS_MIN * HOURS as u32
        && record.profile.iter().any(|share| *share >= USUALLY_ON);
    if !known {
        return 0;
    }
    let now = hour_of_week(unix_ms);
    let wait = (0..HOURS).find(|wait| record.profile[(now + wait) % HOURS] >= USUALLY_ON);
    match wait {
        None | Some(0) => 0,
        Some(hours) => hours as u64 * HOUR_MS - unix_ms % HOUR_MS,
    }
}

/// Notes that a provider fell silent: `back_in_ms` is what it announced, 0 for nothing.
pub fn fell_silent(record: &mut ProviderRecord, clock_ms: u64, unix_ms: u64, back_in_ms: u64) {
    record.silent_since_ms = clock_ms.max(1);
    let expected = expected_back_ms(record, unix_ms);
    record.back_at_ms = match back_in_ms.max(expected) {
        0 => 0,
        wait => clock_ms + wait,
    };
}

/// When the provider is given up, by its own clock; the brake may put it off.
pub fn due_ms(record: &ProviderRecord, clocks: &Clocks) -> u64 {
    record.silent_since_ms.max(record.back_at_ms) + clocks.dead_ms
}

/// The state of a provider that is `reachable` or not.
pub fn state(
    record: &ProviderRecord,
    reachable: bool,
    clock_ms: u64,
    clocks: &Clocks,
) -> ProviderState {
    if record.dead {
        ProviderState::Dead
    } else if reachable {
        ProviderState::Online
    } else if record.dormant || clock_ms >= record.silent_since_ms + clocks.absent_ms {
        ProviderState::Dormant
    } else {
        ProviderState::Absent
    }
}

/// How many times likelier to be gone for good than an online one a provider is: 1 while it is
/// online or asleep as expected, growing without bound towards its due time.
pub fn hazard_factor(
    record: &ProviderRecord,
    reachable: bool,
    clock_ms: u64,
    clocks: &Clocks,
) -> f64 {
    if reachable || record.silent_since_ms == 0 {
        return 1.0;
    }
    let expected = record.silent_since_ms.max(record.back_at_ms);
    let overdue = clock_ms.saturating_sub(expected) as f64 / clocks.dead_ms.max(1) as f64;
    1.0 / (1.0 - overdue).max(1e-3)
}

/// A provider as the brake sees it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Silence<'a> {
    /// Its site; an empty one is no site.
    pub site: &'a str,
    /// When it fell silent; `None`: it is online.
    pub since_ms: Option<u64>,
}

/// Whether the silence that began at `since_ms` in `site` is part of a departure of many: within
/// `together_ms` of it so many others of the site, or of all, fell silent that it is no death.
/// `all` are the providers that are not dead, the one in question among them.
pub fn is_departure<'a>(
    all: impl Iterator<Item = Silence<'a>>,
    site: &str,
    since_ms: u64,
    clocks: &Clocks,
) -> bool {
    let (mut everywhere, mut here) = ((0usize, 0usize), (0usize, 0usize));
    for other in all {
        let together = other.since_ms.is_some_and(|at| at.abs_diff(since_ms) <= clocks.together_ms);
        everywhere = (everywhere.0 + 1, everywhere.1 + usize::from(together));
        if !site.is_empty() && other.site == site {
            here = (here.0 + 1, here.1 + usize::from(together));
        }
    }
    let many = |(count, gone): (usize, usize)| {
        gone >= BRAKE_PROVIDERS_MIN && gone * 100 >= count * clocks.brake_percent as usize
    };
    many(everywhere) || many(here)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY_MS: u64 = 24 * HOUR_MS;
    /// A Monday, 0:00 UTC.
    const MONDAY_MS: u64 = 4 * DAY_MS;

    /// On from 8 to 18 on working days, for some weeks.
    fn office() -> ProviderRecord {
        let mut record = ProviderRecord::default();
        for hour in 0..3 * HOURS {
            let (day, of_day) = (hour % HOURS / 24, hour % 24);
            let on = day < 5 && (8..18).contains(&of_day);
            learn(&mut record, hour % HOURS, f64::from(u8::from(on)));
        }
        record
    }

    #[test]
    fn the_week_begins_on_monday() {
        assert_eq!(hour_of_week(0), 3 * 24);
        assert_eq!(hour_of_week(MONDAY_MS), 0);
        assert_eq!(hour_of_week(MONDAY_MS - 1), HOURS - 1);
    }

    #[test]
    fn a_machine_that_goes_home_at_six_is_not_dead_on_monday_morning() {
        let (mut record, clocks) = (office(), Clocks::default());
        let friday_evening = MONDAY_MS + 4 * DAY_MS + 18 * HOUR_MS;
        let clock_ms = 1_000_000_000;
        fell_silent(&mut record, clock_ms, friday_evening, 0);
        assert_eq!(record.back_at_ms - clock_ms, 62 * HOUR_MS, "Monday at eight");
        assert!(due_ms(&record, &clocks) > clock_ms + 85 * HOUR_MS);
        assert!(hazard_factor(&record, false, clock_ms + 60 * HOUR_MS, &clocks) == 1.0);
        let overdue = hazard_factor(&record, false, clock_ms + 74 * HOUR_MS, &clocks);
        assert!((overdue - 2.0).abs() < 0.01, "half a day late: {overdue}");
    }

    #[test]
    fn in_working_hours_its_silence_counts_from_the_first_minute() {
        let (mut record, clocks) = (office(), Clocks::default());
        fell_silent(&mut record, 5_000, MONDAY_MS + 10 * HOUR_MS, 0);
        assert_eq!((record.back_at_ms, due_ms(&record, &clocks)), (0, 5_000 + DAY_MS));
        let at = |after: u64| state(&record, false, 5_000 + after, &clocks);
        assert_eq!(at(1_000), ProviderState::Absent);
        assert_eq!(at(6 * 60_000), ProviderState::Dormant);
    }

    #[test]
    fn a_goodbye_says_when_it_comes_back() {
        let (mut record, clocks) = (ProviderRecord::default(), Clocks::default());
        fell_silent(&mut record, 7, MONDAY_MS, 30 * DAY_MS);
        assert_eq!(due_ms(&record, &clocks), 7 + 31 * DAY_MS);
    }

    #[test]
    fn a_week_like_the_others_is_no_news() {
        let mut record = ProviderRecord::default();
        let mut news = 0;
        for hour in 0..10 * HOURS {
            news += usize::from(learn(&mut record, hour % HOURS, 1.0));
        }
        assert_eq!((news, record.profile_hours), (LEARN_WEEKS as usize * HOURS, 4 * 168));
        assert!(learn(&mut record, 5, 0.0), "a change is");
    }

    #[test]
    fn nothing_is_believed_of_a_week() {
        let mut record = ProviderRecord::default();
        for hour in 0..HOURS {
            learn(&mut record, hour, f64::from(u8::from(hour < 50)));
        }
        assert_eq!(expected_back_ms(&record, MONDAY_MS + 60 * HOUR_MS), 0);
    }

    #[test]
    fn an_evening_is_no_epidemic_and_one_death_is_no_evening() {
        let clocks = Clocks::default();
        let silence = |site, since_ms| Silence { site, since_ms };
        let mut all: Vec<Silence<'_>> = (0..100).map(|_| silence("office", None)).collect();
        all[0].since_ms = Some(10 * HOUR_MS);
        let departs = |all: &[Silence<'_>]| {
            is_departure(all.iter().copied(), "office", 10 * HOUR_MS, &clocks)
        };
        assert!(!departs(&all));
        (0..30).for_each(|at| all[at].since_ms = Some(10 * HOUR_MS + at as u64 * 60_000));
        assert!(departs(&all));
        (1..30).for_each(|at| all[at].since_ms = Some(20 * HOUR_MS));
        assert!(!departs(&all), "the others went another evening");
        // A small site of its own, in a large cluster.
        all[0].site = "lab";
        all.extend([silence("lab", Some(10 * HOUR_MS)), silence("lab", Some(10 * HOUR_MS))]);
        assert!(is_departure(all.iter().copied(), "lab", 10 * HOUR_MS, &clocks));
    }
}
