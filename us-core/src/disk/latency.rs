//! How fast each provider has answered lately, and so how long to wait before parity is asked too.
//!
//! Asking others as well ("hedging") is for the one provider that is slower than it was. Where all are
//! slow, because this machine or its line is busy, it only makes them slower: so it has a budget, a
//! share of the bytes that came (Dean and Barroso, The Tail at Scale, 2013). Without budget a get has
//! the longest patience. A provider that stopped answering anything is not hedged but passed by: that
//! costs no budget.

use std::collections::HashMap;
use std::ops::Range;
use std::time::Duration;

use tokio::time::Instant;

use crate::ids::ProviderId;

/// Answers remembered for each provider and size.
const SAMPLES: usize = 32;
/// Up to here a get is small; larger ones are remembered apart.
const SMALL_BYTES_MAX: usize = 64 << 10;
/// After so many answers in a row that came too late or not at all, nobody waits any more.
const MISSES_MAX: u32 = 3;
/// For so many bytes that came one byte may be asked of others.
const BYTES_PER_HEDGED: u64 = 16;
/// The most that is saved up: a window of a stream; what there is at the beginning is a quarter.
const HEDGED_BYTES_MAX: u64 = 16 << 20;

/// What is remembered of all providers. Pure: times come from the caller.
#[derive(Debug)]
pub(super) struct Latencies {
    providers: HashMap<ProviderId, History>,
    /// What may be asked of others, in bytes times [`BYTES_PER_HEDGED`].
    budget: u64,
}

impl Default for Latencies {
    fn default() -> Self {
        Self { providers: HashMap::new(), budget: HEDGED_BYTES_MAX / 4 * BYTES_PER_HEDGED }
    }
}

#[derive(Debug, Default)]
struct History {
    small: Ring,
    large: Ring,
    /// Answers missed since the last one that came.
    misses: u32,
    /// Since when it could not be asked at all.
    away_since: Option<Instant>,
    answered_at: Option<Instant>,
}

#[derive(Debug, Default)]
struct Ring {
    samples: Vec<Duration>,
    next: usize,
}

impl Ring {
    fn push(&mut self, sample: Duration) {
        if self.samples.len() < SAMPLES {
            self.samples.push(sample);
        } else {
            self.samples[self.next] = sample;
            self.next = (self.next + 1) % SAMPLES;
        }
    }

    fn p95(&self) -> Option<Duration> {
        let mut sorted = self.samples.clone();
        sorted.sort_unstable();
        let at = (sorted.len() * 95).div_ceil(100).checked_sub(1)?;
        sorted.get(at).copied()
    }
}

impl Latencies {
    /// The provider answered at `now` a get of `bytes` after `elapsed`.
    pub fn answered(
        &mut self,
        provider: ProviderId,
        bytes: usize,
        elapsed: Duration,
        now: Instant,
    ) {
        let history = self.providers.entry(provider).or_default();
        history.misses = 0;
        history.away_since = None;
        history.answered_at = Some(now);
        history.ring(bytes).push(elapsed);
        let most = HEDGED_BYTES_MAX * BYTES_PER_HEDGED;
        self.budget = (self.budget + bytes as u64).min(most);
    }

    /// What was asked of the provider at `asked_at` was not waited for any longer. It counts as
    /// missed unless the provider has answered something since: then it only had much to do.
    pub fn outrun(&mut self, provider: ProviderId, asked_at: Instant) {
        let answered_at = self.providers.get(&provider).and_then(|history| history.answered_at);
        if answered_at.is_none_or(|answered_at| answered_at < asked_at) {
            self.missed(provider);
        }
    }

    /// Takes `bytes`, which are to be asked of others because the provider is late, from the budget.
    /// False where it does not suffice.
    pub fn may_hedge(&mut self, provider: ProviderId, bytes: usize) -> bool {
        let history = self.providers.get(&provider);
        if history.is_some_and(|history| history.misses >= MISSES_MAX) {
            return true;
        }
        let cost = bytes as u64 * BYTES_PER_HEDGED;
        let may = self.budget >= cost;
        self.budget -= if may { cost } else { 0 };
        may
    }

    /// The provider failed, or answered nothing in time.
    pub fn missed(&mut self, provider: ProviderId) {
        let history = self.providers.entry(provider).or_default();
        history.misses = history.misses.saturating_add(1);
    }

    /// The provider could not be asked: no connection, or no answer.
    pub fn away(&mut self, provider: ProviderId, now: Instant) {
        self.providers.entry(provider).or_default().away_since.get_or_insert(now);
    }

    /// Since when the provider could not be asked; `None` where it answered when last asked.
    pub fn failing_since(&self, provider: ProviderId) -> Option<Instant> {
        self.providers.get(&provider)?.away_since
    }

    /// How long to wait for the provider's answer before others are asked: its p95, within
    /// `bounds`; not at all when it missed the last few.
    pub fn hedge_after(
        &self,
        provider: ProviderId,
        bytes: usize,
        bounds: &Range<Duration>,
    ) -> Duration {
        let Some(history) = self.providers.get(&provider) else { return bounds.end };
        if history.misses >= MISSES_MAX {
            return Duration::ZERO;
        }
        let ring = if bytes <= SMALL_BYTES_MAX { &history.small } else { &history.large };
        // A little more than the p95, so that an evenly fast provider is not doubted.
        let patience = ring.p95().map(|p95| p95 * 3 / 2);
        patience.unwrap_or(bounds.end).clamp(bounds.start, bounds.end.max(bounds.start))
    }

    /// Orders providers for being asked: lower is better.
    pub fn rank(&self, provider: ProviderId, bytes: usize) -> (u32, Duration) {
        let Some(history) = self.providers.get(&provider) else { return (0, Duration::ZERO) };
        let ring = if bytes <= SMALL_BYTES_MAX { &history.small } else { &history.large };
        (history.misses.min(MISSES_MAX), ring.p95().unwrap_or_default())
    }
}

impl History {
    fn ring(&mut self, bytes: usize) -> &mut Ring {
        if bytes <= SMALL_BYTES_MAX { &mut self.small } else { &mut self.large }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patience_follows_the_p95_within_its_bounds() {
        let bounds = Duration::from_millis(5)..Duration::from_millis(500);
        let provider = ProviderId(1);
        let mut latencies = Latencies::default();
        let now = Instant::now();
        assert_eq!(latencies.hedge_after(provider, 1, &bounds), bounds.end);
        for _ in 0..40 {
            latencies.answered(provider, 1, Duration::from_millis(20), now);
        }
        assert_eq!(latencies.hedge_after(provider, 1, &bounds), Duration::from_millis(30));
        assert_eq!(latencies.hedge_after(provider, 1 << 20, &bounds), bounds.end);
        for _ in 0..3 {
            latencies.missed(provider);
        }
        assert_eq!(latencies.hedge_after(provider, 1, &bounds), Duration::ZERO);
        latencies.answered(provider, 1, Duration::from_millis(1), now);
        assert_eq!(latencies.hedge_after(provider, 1, &bounds), Duration::from_millis(30));
        for _ in 0..40 {
            latencies.answered(provider, 1, Duration::from_micros(100), now);
        }
        assert_eq!(latencies.hedge_after(provider, 1, &bounds), bounds.start);
    }

    /// Streams read 1.9 times their bytes on a busy machine: every provider was late, so parity was
    /// asked too, which made them later; and what was outrun by it counted as missed.
    #[test]
    fn where_all_are_late_others_are_asked_for_a_small_share() {
        let mut latencies = Latencies::default();
        let (now, megabyte) = (Instant::now(), 1 << 20);
        let hedged = |latencies: &mut Latencies, asked: usize| {
            let mut hedged = 0;
            for number in 0..asked {
                let provider = ProviderId(number as u32 % 6);
                hedged += usize::from(latencies.may_hedge(provider, megabyte));
                latencies.outrun(provider, now);
                latencies.answered(provider, megabyte, Duration::from_millis(300), now);
            }
            hedged
        };
        let saved = HEDGED_BYTES_MAX as usize / 4 / megabyte;
        assert_eq!(hedged(&mut latencies, 160), saved + 159 / BYTES_PER_HEDGED as usize);
        assert_eq!(latencies.rank(ProviderId(0), megabyte).0, 0, "late is not missing");
    }

    #[test]
    fn who_answers_nothing_is_passed_by_without_budget() {
        let mut latencies = Latencies::default();
        let (silent, now) = (ProviderId(1), Instant::now());
        latencies.answered(silent, 1, Duration::from_millis(1), now);
        let asked = now + Duration::from_millis(1);
        while latencies.may_hedge(ProviderId(2), 1 << 20) {}
        assert!(!latencies.may_hedge(silent, 1 << 20));
        for _ in 0..MISSES_MAX {
            latencies.outrun(silent, asked);
        }
        let bounds = Duration::from_millis(5)..Duration::from_millis(500);
        assert!(latencies.may_hedge(silent, 1 << 20));
        assert_eq!(latencies.hedge_after(silent, 1 << 20, &bounds), Duration::ZERO);
    }
}
