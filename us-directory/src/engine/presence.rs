//! The three clocks of a provider that is silent: *absent*, *dormant*, *dead*.
//!
//! ```text
//!            silent                 absent_ms                  due
//!   online ---------> absent ---------------------> dormant --------> dead
//!      ^                 \___ goodbye: at once ______/  |               |
//!      |_____________________ heard again ______________|_______________|
//! ```
//! A provider is due when it has been silent for `dead_ms` longer than it was expected to be: until
//! the return it announced, or the next hour in which its *profile* says it is usually on. The profile
//! is the share of each hour of the week in which it was online, learnt over weeks; until it is
//! believed any evening may be a Friday's, and a silence may last `newcomer_ms`.
//!
//! The *brake*: when a large share of the providers, or of one site, fell silent together, that is an
//! evening, a power cut or a partition, not as many deaths. None of them is dead by the clock alone
//! for `brake_ms`.
//!
//! Pure: everything is a function of what it is given. Durations count on the cluster's clock, which
//! stands still while no directory runs; the hour of the week is wall time, and decides nothing but
//! how much longer a silence is taken for sleep.

use std::collections::HashMap;

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
    /// The same for one of which nothing is known and that announced nothing; never less than
    /// `dead_ms`.
    pub newcomer_ms: u64,
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
            newcomer_ms: 3 * 24 * HOUR_MS,
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

/// Whether the profile is believed: it is some weeks old, and there are hours in which the provider is
/// on.
fn is_known(record: &ProviderRecord) -> bool {
    record.profile.len() == HOURS
        && record.profile_hours >= WEEKS_MIN * HOURS as u32
        && record.profile.iter().any(|share| *share >= USUALLY_ON)
}

/// How long after `unix_ms` the profile expects the provider to be on: 0 where it should be on now,
/// or where too little is known.
pub fn expected_back_ms(record: &ProviderRecord, unix_ms: u64) -> u64 {
    if !is_known(record) {
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
    record.stranger = !is_known(record);
    let expected = expected_back_ms(record, unix_ms);
    record.back_at_ms = match back_in_ms.max(expected) {
        0 => 0,
        wait => clock_ms + wait,
    };
}

/// How long the provider may be silent beyond what is expected.
fn patience_ms(record: &ProviderRecord, clocks: &Clocks) -> u64 {
    // What is learnt of it while it is away is that it is away.
    match record.stranger && record.back_at_ms == 0 {
        true => clocks.dead_ms.max(clocks.newcomer_ms),
        false => clocks.dead_ms,
    }
}

/// When the provider is given up, by its own clock; the brake may put it off.
pub fn due_ms(record: &ProviderRecord, clocks: &Clocks) -> u64 {
    record.silent_since_ms.max(record.back_at_ms) + patience_ms(record, clocks)
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
    let patience_ms = patience_ms(record, clocks).max(1);
    let overdue = clock_ms.saturating_sub(expected) as f64 / patience_ms as f64;
    1.0 / (1.0 - overdue).max(1e-3)
}

/// When the providers that are silent fell silent, as the brake sees it.
#[derive(Debug, Default)]
pub struct Silences<'a> {
    everywhere: Group,
    /// By site; an empty one is no site.
    sites: HashMap<&'a str, Group>,
}

/// Providers among which a departure stands out.
#[derive(Debug, Default)]
struct Group {
    providers: usize,
    /// Of those that are silent, in order once all are noted.
    since_ms: Vec<u64>,
}

impl Group {
    fn note(&mut self, since_ms: Option<u64>) {
        self.providers += 1;
        self.since_ms.extend(since_ms);
    }

    fn is_departure(&self, since_ms: u64, clocks: &Clocks) -> bool {
        let from = since_ms.saturating_sub(clocks.together_ms);
        let first = self.since_ms.partition_point(|at| *at < from);
        let last = self.since_ms.partition_point(|at| *at <= since_ms + clocks.together_ms);
        let gone = last - first;
        gone >= BRAKE_PROVIDERS_MIN && gone * 100 >= self.providers * clocks.brake_percent as usize
    }
}

impl<'a> Silences<'a> {
    /// Of all providers that are not dead: their sites, and when they fell silent (`None`: they are
    /// online).
    pub fn new(all: impl Iterator<Item = (&'a str, Option<u64>)>) -> Self {
        let mut silences = Self::default();
        for (site, since_ms) in all {
            silences.everywhere.note(since_ms);
            if !site.is_empty() {
                silences.sites.entry(site).or_default().note(since_ms);
            }
        }
        silences.everywhere.since_ms.sort_unstable();
        silences.sites.values_mut().for_each(|site| site.since_ms.sort_unstable());
        silences
    }

    /// Whether the silence that began at `since_ms` in `site` is part of a departure of many: within
    /// `together_ms` of it so many others of the site, or of all, fell silent that it is no death.
    pub fn is_departure(&self, site: &str, since_ms: u64, clocks: &Clocks) -> bool {
        self.everywhere.is_departure(since_ms, clocks)
            || self.sites.get(site).is_some_and(|here| here.is_departure(since_ms, clocks))
    }
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
    fn a_newcomer_may_be_away_for_its_first_weekend() {
        let (mut record, clocks) = (ProviderRecord::default(), Clocks::default());
        (0..5 * 24).for_each(|hour| assert!(learn(&mut record, hour, 1.0)));
        let friday_evening = MONDAY_MS + 4 * DAY_MS + 17 * HOUR_MS;
        fell_silent(&mut record, 1_000, friday_evening, 0);
        let monday_morning = 1_000 + 64 * HOUR_MS;
        assert!(due_ms(&record, &clocks) > monday_morning + 6 * HOUR_MS);
        assert_eq!(due_ms(&record, &clocks), 1_000 + 3 * DAY_MS);
        // On Saturday it has been known for two weeks.
        record.profile_hours = 2 * HOURS as u32 - 12;
        (0..60).for_each(|hour| assert!(learn(&mut record, 5 * 24 + hour % 48, 0.0) || hour > 0));
        assert_eq!(due_ms(&record, &clocks), 1_000 + 3 * DAY_MS);
        let patient = Clocks { dead_ms: 9 * DAY_MS, ..clocks };
        assert_eq!(due_ms(&record, &patient), 1_000 + 9 * DAY_MS, "never less than for the others");
    }

    #[test]
    fn an_evening_is_no_epidemic_and_one_death_is_no_evening() {
        const TEN_MS: u64 = 10 * HOUR_MS;
        let clocks = Clocks::default();
        let mut all = vec![("office", None); 100];
        let departs = |all: &[(&str, Option<u64>)], site| {
            Silences::new(all.iter().copied()).is_departure(site, TEN_MS, &clocks)
        };
        all[0].1 = Some(TEN_MS);
        assert!(!departs(&all, "office"));
        (0..30).for_each(|at| all[at].1 = Some(TEN_MS + at as u64 * 60_000));
        assert!(departs(&all, "office"));
        (1..30).for_each(|at| all[at].1 = Some(20 * HOUR_MS));
        assert!(!departs(&all, "office"), "the others went another evening");
        // A small site of its own, in a large cluster.
        all[0].0 = "lab";
        all.extend([("lab", Some(9 * HOUR_MS)), ("lab", Some(11 * HOUR_MS))]);
        assert!(departs(&all, "lab") && !departs(&all, "office"));
        all[101].1 = Some(11 * HOUR_MS + 1);
        assert!(!departs(&all, "lab"), "the last of the three went more than an hour later");
    }
}
