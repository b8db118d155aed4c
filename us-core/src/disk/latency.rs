//! How fast each provider has answered lately, and so how long to wait before parity is asked too.

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

/// What is remembered of all providers. Pure: times come from the caller.
#[derive(Debug, Default)]
pub(super) struct Latencies {
    providers: HashMap<ProviderId, History>,
}

#[derive(Debug, Default)]
struct History {
    small: Ring,
    large: Ring,
    /// Answers missed since the last one that came.
    misses: u32,
    /// Since when it could not be asked at all.
    away_since: Option<Instant>,
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
    /// The provider answered a get of `bytes` after `elapsed`.
    pub fn answered(&mut self, provider: ProviderId, bytes: usize, elapsed: Duration) {
        let history = self.providers.entry(provider).or_default();
        history.misses = 0;
        history.away_since = None;
        history.ring(bytes).push(elapsed);
    }

    /// The provider failed, or its answer was not waited for any longer.
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
        assert_eq!(latencies.hedge_after(provider, 1, &bounds), bounds.end);
        for _ in 0..40 {
            latencies.answered(provider, 1, Duration::from_millis(20));
        }
        assert_eq!(latencies.hedge_after(provider, 1, &bounds), Duration::from_millis(30));
        assert_eq!(latencies.hedge_after(provider, 1 << 20, &bounds), bounds.end);
        for _ in 0..3 {
            latencies.missed(provider);
        }
        assert_eq!(latencies.hedge_after(provider, 1, &bounds), Duration::ZERO);
        latencies.answered(provider, 1, Duration::from_millis(1));
        assert_eq!(latencies.hedge_after(provider, 1, &bounds), Duration::from_millis(30));
        for _ in 0..40 {
            latencies.answered(provider, 1, Duration::from_micros(100));
        }
        assert_eq!(latencies.hedge_after(provider, 1, &bounds), bounds.start);
    }
}
