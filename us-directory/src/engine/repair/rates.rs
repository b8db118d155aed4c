//! What the lines of providers give, as seen in repairs and as their owners say: pure.
//!
//! A rebuilder tells of each source how many bytes came in how long. What a provider sent to several
//! rebuilders at once adds up: a sample is the mean of all it sent while the transfer ran. Of samples
//! the best counts, and fades by half a day: a line that had nothing better to do looks slow, and no
//! line looks faster than it is. What the owner says of the line stands above what was seen.

use std::collections::{HashMap, VecDeque};

/// Transfers of one end that are kept to add up.
const RECENT_MAX: usize = 64;
/// Transfers that ended this long ago overlap with nothing that is told now.
const RECENT_MS: f64 = 60_000.0;
/// Smaller transfers tell of latency, not of the line.
const BYTES_MIN: u64 = 16 << 10;
/// The best sample counts half after this time.
const HALF_LIFE_MS: f64 = 12.0 * 3_600_000.0;
/// Nothing is timed better than this.
const SHORTEST_MS: f64 = 0.5;

#[derive(Clone, Copy, Debug)]
struct Transfer {
    from_ms: f64,
    to_ms: f64,
    /// Bytes a millisecond.
    density: f64,
}

/// One direction of one line.
#[derive(Clone, Debug, Default)]
struct Meter {
    recent: VecDeque<Transfer>,
    /// Bytes a second, and when they were seen.
    best: Option<(f64, f64)>,
}

impl Meter {
    fn note(&mut self, transfer: Transfer) {
        let length_ms = transfer.to_ms - transfer.from_ms;
        self.recent.retain(|other| other.to_ms + RECENT_MS >= transfer.to_ms);
        let beside: f64 = self
            .recent
            .iter()
            .map(|other| {
                let from_ms = other.from_ms.max(transfer.from_ms);
                other.density * (other.to_ms.min(transfer.to_ms) - from_ms).max(0.0)
            })
            .sum();
        let seen = 1000.0 * (transfer.density + beside / length_ms);
        if self.recent.len() == RECENT_MAX {
            self.recent.pop_front();
        }
        self.recent.push_back(transfer);
        if self.rate(transfer.to_ms).is_none_or(|known| seen > known) {
            self.best = Some((seen, transfer.to_ms));
        }
    }

    fn rate(&self, now_ms: f64) -> Option<f64> {
        let (best, at_ms) = self.best?;
        Some(best * (-(now_ms - at_ms).max(0.0) / HALF_LIFE_MS).exp2())
    }
}

/// What an owner says of a line, in bytes a second; 0: nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stated {
    /// What it can send.
    pub up: u64,
    /// What it can receive.
    pub down: u64,
}

/// Bytes that came from a provider in one repair.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pulled {
    /// Who sent them.
    pub from: u32,
    /// How many.
    pub bytes: u64,
    /// How long that took, up to now.
    pub took_ms: f64,
}

/// All lines.
#[derive(Debug, Default)]
pub struct Rates {
    stated: HashMap<u32, Stated>,
    up: HashMap<u32, Meter>,
    down: HashMap<u32, Meter>,
    /// Between a site and all others.
    out: HashMap<String, Meter>,
    into: HashMap<String, Meter>,
}

fn told(stated: u64, meter: Option<&Meter>, now_ms: u64) -> Option<f64> {
    if stated > 0 {
        return Some(stated as f64);
    }
    meter.and_then(|meter| meter.rate(now_ms as f64))
}

impl Rates {
    /// What the owner of a provider says of its line.
    pub fn state(&mut self, provider: u32, stated: Stated) {
        self.stated.insert(provider, stated);
    }

    /// A rebuilder tells what came from whom. `site` gives a provider's site.
    pub fn note<'s>(
        &mut self,
        rebuilder: u32,
        pulled: &[Pulled],
        now_ms: u64,
        site: impl Fn(u32) -> &'s str,
    ) {
        let here = site(rebuilder);
        for pulled in pulled {
            let took_ms = pulled.took_ms.max(SHORTEST_MS);
            if pulled.bytes < BYTES_MIN || !took_ms.is_finite() || pulled.from == rebuilder {
                continue;
            }
            let (from_ms, to_ms) = (now_ms as f64 - took_ms, now_ms as f64);
            let transfer = Transfer { from_ms, to_ms, density: pulled.bytes as f64 / took_ms };
            self.up.entry(pulled.from).or_default().note(transfer);
            self.down.entry(rebuilder).or_default().note(transfer);
            let there = site(pulled.from);
            if here.is_empty() || there.is_empty() || here == there {
                continue;
            }
            self.out.entry(there.to_owned()).or_default().note(transfer);
            self.into.entry(here.to_owned()).or_default().note(transfer);
        }
    }

    /// Bytes a second a provider can send; `None`: nobody knows.
    pub fn up(&self, provider: u32, now_ms: u64) -> Option<f64> {
        let stated = self.stated.get(&provider).map_or(0, |stated| stated.up);
        told(stated, self.up.get(&provider), now_ms)
    }

    /// Bytes a second a provider can receive; `None`: nobody knows.
    pub fn down(&self, provider: u32, now_ms: u64) -> Option<f64> {
        let stated = self.stated.get(&provider).map_or(0, |stated| stated.down);
        told(stated, self.down.get(&provider), now_ms)
    }

    /// What the owner says the line can send: the budget is a share of it.
    pub fn stated_up(&self, provider: u32) -> Option<u64> {
        self.stated.get(&provider).map(|stated| stated.up).filter(|up| *up > 0)
    }

    /// What goes out of a site and into it, where it was seen.
    pub fn trunk(&self, site: &str, now_ms: u64) -> (Option<f64>, Option<f64>) {
        let rate = |meters: &HashMap<String, Meter>| meters.get(site)?.rate(now_ms as f64);
        (rate(&self.out), rate(&self.into))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SITES: fn(u32) -> &'static str = |provider| match provider {
        1..=3 => "north",
        4..=6 => "south",
        _ => "",
    };

    fn pulled(from: u32, bytes: u64, took_ms: f64) -> Pulled {
        Pulled { from, bytes, took_ms }
    }

    fn about(found: Option<f64>, expected: f64) -> bool {
        found.is_some_and(|found| (found / expected - 1.0).abs() < 0.01)
    }

    #[test]
    fn what_goes_to_several_at_once_adds_up() {
        let mut rates = Rates::default();
        assert_eq!(rates.up(1, 0), None);
        // 100 kB in a second to each of two rebuilders, at the same time.
        rates.note(2, &[pulled(1, 100_000, 1000.0)], 5000, SITES);
        assert!(about(rates.up(1, 5000), 100e3));
        rates.note(3, &[pulled(1, 100_000, 1000.0)], 5000, SITES);
        assert!(about(rates.up(1, 5000), 200e3) && about(rates.down(3, 5000), 100e3));
        // Half as fast later says nothing: the line may have been idle.
        rates.note(3, &[pulled(1, 100_000, 2000.0)], 9000, SITES);
        assert!(about(rates.up(1, 9000), 200e3));
        assert!(about(rates.up(1, 9000 + 12 * 3_600_000), 100e3), "it fades");
    }

    #[test]
    fn a_star_is_the_receivers_rate_and_crosses_the_trunk() {
        let mut rates = Rates::default();
        let star: Vec<Pulled> = [1, 2, 4].map(|from| pulled(from, 50_000, 500.0)).to_vec();
        rates.note(5, &star, 10_000, SITES);
        assert!(about(rates.down(5, 10_000), 300e3), "{:?}", rates.down(5, 10_000));
        assert!(about(rates.up(4, 10_000), 100e3));
        let (out, into) = rates.trunk("north", 10_000);
        assert!(about(out, 200e3) && into.is_none());
        assert!(about(rates.trunk("south", 10_000).1, 200e3));
        rates.note(9, &star, 10_000, SITES);
        assert_eq!(rates.trunk("", 10_000), (None, None));
    }

    #[test]
    fn what_the_owner_says_stands() {
        let mut rates = Rates::default();
        rates.state(1, Stated { up: 16_000, down: 0 });
        rates.note(2, &[pulled(1, 100_000, 1.0)], 5000, SITES);
        assert_eq!((rates.up(1, 5000), rates.stated_up(1)), (Some(16_000.0), Some(16_000)));
        assert_eq!((rates.down(1, 5000), rates.stated_up(2)), (None, None));
    }

    #[test]
    fn nonsense_is_not_believed() {
        let mut rates = Rates::default();
        let strange = [f64::NAN, f64::INFINITY, -1.0];
        for took_ms in strange {
            rates.note(2, &[pulled(1, 100_000, took_ms)], 5000, SITES);
        }
        rates.note(2, &[pulled(1, 10, 1.0), pulled(2, 1 << 40, 1.0)], 5000, SITES);
        assert_eq!(rates.down(2, 5000).map(|rate| rate <= 5e8), Some(true));
        assert_eq!(rates.up(2, 5000), None);
    }
}
