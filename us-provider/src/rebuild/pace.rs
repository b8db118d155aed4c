//! How fast to ask and how long to wait, without a clock of its own.

use std::num::NonZeroU64;
use std::time::Duration;

use tokio::time::Instant;

/// A source is not late before this time, however fast the others were.
const PATIENCE_MIN: Duration = Duration::from_millis(500);
/// Nor before as many times what the slowest of the others took.
const SLOWER_MAX: u32 = 3;

/// A limit of bytes a second: whoever asks is told when.
#[derive(Clone, Debug)]
pub struct Bucket {
    bytes_per_s: Option<NonZeroU64>,
    free_at: Instant,
}

impl Bucket {
    /// A bucket that gives `bytes_per_s`, from `now` on; without it there is no limit.
    pub fn new(now: Instant, bytes_per_s: Option<NonZeroU64>) -> Self {
        Self { bytes_per_s, free_at: now }
    }

    /// When `bytes` may be asked for, which then count: as soon as those before have had their time.
    pub fn reserve(&mut self, now: Instant, bytes: usize) -> Instant {
        let Some(rate) = self.bytes_per_s else { return now };
        let at = self.free_at.max(now);
        let millis = (bytes as u64).saturating_mul(1000) / rate;
        // A rate so low that its times cannot be counted is the deadline's affair.
        self.free_at = at + Duration::from_millis(millis.min(1 << 32));
        at
    }
}

/// How long a source may take before another is asked too.
#[derive(Clone, Debug)]
pub struct Patience {
    most: Duration,
    least: Duration,
    slowest: Option<Duration>,
}

impl Patience {
    /// For an order that may take `deadline` in all: a quarter of it while nobody has answered. Never
    /// less than `asked`, which the directory knows of slow lines, but at most half of it.
    pub fn new(deadline: Duration, asked: Duration) -> Self {
        let least = asked.min(deadline / 2);
        Self { most: (deadline / 4).max(least), least, slowest: None }
    }

    /// Somebody answered in good time.
    pub fn answered(&mut self, elapsed: Duration) {
        self.slowest = Some(self.slowest.map_or(elapsed, |slowest| slowest.max(elapsed)));
    }

    /// How long from the asking on.
    pub fn now(&self) -> Duration {
        match self.slowest {
            Some(slowest) => {
                (slowest * SLOWER_MAX).max(PATIENCE_MIN.max(self.least)).min(self.most)
            }
            None => self.most,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn never_more_than_the_rate_behind_the_first(
            rate in 1u64..10_000_000, asks in prop::collection::vec(0usize..5_000_000, 1..30),
        ) {
            let begun = Instant::now();
            let mut bucket = Bucket::new(begun, NonZeroU64::new(rate));
            let mut before = 0u64;
            for bytes in asks {
                let at = bucket.reserve(begun, bytes);
                let millis = at.duration_since(begun).as_millis() as u64;
                // Rounding gives away less than a millisecond an ask.
                prop_assert!((millis + 30).saturating_mul(rate) / 1000 + 1 >= before);
                before += bytes as u64;
            }
        }
    }

    #[test]
    fn patience_follows_the_others() {
        let slow = Patience::new(Duration::from_secs(60), Duration::from_secs(20));
        assert_eq!(slow.now(), Duration::from_secs(20));
        let mut told = Patience::new(Duration::from_secs(60), Duration::from_secs(10));
        told.answered(Duration::from_millis(10));
        assert_eq!(told.now(), Duration::from_secs(10), "the others' lines are faster");
        let mut patience = Patience::new(Duration::from_secs(60), Duration::ZERO);
        assert_eq!(patience.now(), Duration::from_secs(15));
        patience.answered(Duration::from_millis(10));
        assert_eq!(patience.now(), PATIENCE_MIN);
        patience.answered(Duration::from_secs(1));
        patience.answered(Duration::from_millis(10));
        assert_eq!(patience.now(), Duration::from_secs(3));
        patience.answered(Duration::from_secs(50));
        assert_eq!(patience.now(), Duration::from_secs(15));
    }
}
