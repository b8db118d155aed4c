//! What the own line takes: which puts may go on it, and which of them take too long.
//!
//! A put waits for its *turn*. Turns are given in order while the bytes on the line are at most
//! what it carries in a few seconds, so that on a slow line each fragment gets through soon after
//! it was begun, and its clock only runs while it is on the line. The rate is learnt from
//! acknowledgements, over the time in which there was something to acknowledge.
//!
//! ```text
//! put -> queue -> turn: on the line -> acknowledged: counts for the rate
//!                                   -> late: off the books, may still be acknowledged
//! ```
//! A turn is late when it took several times as long as all that was on the line with it should
//! have; while nothing at all gets through, the line is at fault and not the provider, and patience
//! is longer. Clocks come from the caller; no put is made here.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio::time::Instant;

/// Bytes on the line before anything is known of it.
const FIRST_WINDOW: u64 = 4 << 20;
/// Bytes that may be on any line.
const LEAST_WINDOW: u64 = 2 << 20;
/// How long a full line may take to deliver what is on it.
const WINDOW_TIME: Duration = Duration::from_secs(4);
/// What a line carries in a second as long as nothing is known of it: the slowest that is served.
const UNKNOWN_RATE: f64 = 128.0 * 1024.0;
/// The time of which the rate is the mean.
const RATE_TIME: Duration = Duration::from_secs(8);
/// A put may take this many times what everything on the line with it should take.
const SLACK: u32 = 3;
/// As many times more while nothing at all gets through.
const SLACK_WHILE_SILENT: u32 = 4;

/// The line of one disk. Clones are the same line.
#[derive(Clone, Debug, Default)]
pub(super) struct Uplink {
    line: Arc<Mutex<Line>>,
}

#[derive(Debug, Default)]
struct Line {
    /// Bytes of turns that are neither over nor late.
    under_way: u64,
    /// Bytes acknowledged ever.
    delivered: u64,
    last_delivery: Option<Instant>,
    /// The most bytes that were under way lately, and when: they share the line.
    peak: Option<(u64, Instant)>,
    rate: Rate,
    waiting: VecDeque<(u64, oneshot::Sender<Turn>)>,
}

/// Acknowledged bytes over busy time.
#[derive(Debug, Default)]
struct Rate {
    busy: Duration,
    /// Where the mean begins, on the clock of busy time.
    from: Duration,
    deliveries: VecDeque<(Duration, u64)>,
    bytes: u64,
}

impl Rate {
    fn delivered(&mut self, bytes: u64, busy: Duration) {
        self.busy += busy;
        self.deliveries.push_back((self.busy, bytes));
        self.bytes += bytes;
        while let Some((at, bytes)) = self.deliveries.front().copied()
            && self.busy - at >= RATE_TIME
        {
            self.deliveries.pop_front();
            self.bytes -= bytes;
            self.from = at;
        }
    }

    /// Bytes a second; `None` before the first delivery.
    fn get(&self) -> Option<f64> {
        let seconds = (self.busy - self.from).as_secs_f64().max(1e-4);
        (self.bytes > 0).then(|| self.bytes as f64 / seconds)
    }
}

impl Line {
    fn window(&self) -> u64 {
        let Some(rate) = self.rate.get() else { return FIRST_WINDOW };
        ((rate * WINDOW_TIME.as_secs_f64()) as u64).max(LEAST_WINDOW)
    }

    /// The turns that can be given now.
    fn admit(&mut self, line: &Uplink, now: Instant) -> Vec<(oneshot::Sender<Turn>, Turn)> {
        let mut admitted = Vec::new();
        while let Some((bytes, _)) = self.waiting.front() {
            if self.under_way > 0 && self.under_way + bytes > self.window() {
                break;
            }
            let Some((bytes, sender)) = self.waiting.pop_front() else { break };
            admitted.push((sender, self.begin(line, bytes, now)));
        }
        admitted
    }

    fn begin(&mut self, line: &Uplink, bytes: u64, now: Instant) -> Turn {
        self.under_way += bytes;
        let lately = self.peak.filter(|(_, at)| now.saturating_duration_since(*at) < RATE_TIME);
        if lately.is_none_or(|(peak, _)| self.under_way >= peak) {
            self.peak = Some((self.under_way, now));
        }
        Turn {
            line: line.clone(),
            bytes,
            begun: now,
            ahead: self.under_way,
            delivered_before: self.delivered,
            counts: Mutex::new(true),
        }
    }

    fn leave(&mut self, bytes: u64) {
        self.under_way -= bytes;
    }
}

impl Uplink {
    /// Waits for a turn. Cancel-safe: a turn that nobody takes is given back.
    pub async fn turn(&self, bytes: usize) -> Turn {
        let bytes = bytes as u64;
        let waiting = {
            let mut line = self.line.lock();
            if line.waiting.is_empty()
                && (line.under_way == 0 || line.under_way + bytes <= line.window())
            {
                return line.begin(self, bytes, Instant::now());
            }
            let (sender, receiver) = oneshot::channel();
            line.waiting.push_back((bytes, sender));
            receiver
        };
        waiting.await.expect("a turn is given to all who wait: the queue lives as long as they do")
    }

    /// Gives turns to those who wait, without the lock: one who is gone gives his back.
    fn admit(&self) {
        let admitted = {
            let mut line = self.line.lock();
            line.admit(self, Instant::now())
        };
        for (sender, turn) in admitted {
            drop(sender.send(turn));
        }
    }
}

/// A put that is on the line. Dropping it takes it off.
#[derive(Debug)]
pub(super) struct Turn {
    line: Uplink,
    bytes: u64,
    /// Since when.
    pub begun: Instant,
    /// Bytes on the line when it began, with its own.
    ahead: u64,
    delivered_before: u64,
    /// Neither over nor late.
    counts: Mutex<bool>,
}

impl Turn {
    /// The fragment is durable.
    pub fn delivered(&self) {
        let now = Instant::now();
        {
            let mut line = self.line.line.lock();
            line.delivered += self.bytes;
            // What waits for a silent provider does not make the line slow.
            let since = line.last_delivery.map_or(self.begun, |last| last.max(self.begun));
            line.rate.delivered(self.bytes, now.saturating_duration_since(since));
            line.last_delivery = Some(now);
        }
        self.leave();
    }

    /// It takes too long: others get its place on the line.
    pub fn leave(&self) {
        if std::mem::take(&mut *self.counts.lock()) {
            self.line.line.lock().leave(self.bytes);
            self.line.admit();
        }
    }

    /// How long it may be on the line before its provider counts as slow: at least `patience`.
    pub fn patience(&self, patience: Duration) -> Duration {
        let line = self.line.line.lock();
        // All that is on the line shares it, whatever began first.
        let shared = line.peak.map_or(self.ahead, |(peak, _)| peak.max(self.ahead));
        let time = |rate: f64| Duration::from_secs_f64((shared as f64 / rate).min(1e6));
        let Some(rate) = line.rate.get() else { return patience.max(time(UNKNOWN_RATE)) };
        let patience = patience.max(SLACK * time(rate));
        let alone = line.under_way <= self.bytes;
        let silent = line.delivered == self.delivered_before;
        if silent && !alone { SLACK_WHILE_SILENT * patience } else { patience }
    }

    /// When the line last delivered something, while there may still be something on it that was
    /// there before this turn: then its provider cannot have answered yet.
    pub fn held_up_until(&self) -> Option<Instant> {
        let line = self.line.line.lock();
        let passed = line.delivered - self.delivered_before;
        (passed < 2 * self.ahead).then_some(line.last_delivery).flatten()
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.leave();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1 << 20;

    #[tokio::test(start_paused = true)]
    async fn a_slow_line_holds_what_it_carries_in_seconds_and_a_fast_one_everything() {
        let line = Uplink::default();
        let mut turns = Vec::new();
        for _ in 0..4 {
            turns.push(line.turn(MIB).await);
        }
        let fifth = line.clone();
        let fifth = tokio::spawn(async move { fifth.turn(MIB).await });
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(!fifth.is_finished(), "four MiB of an unknown line are under way");
        // One MiB a second.
        turns.pop().unwrap().delivered();
        let fifth = fifth.await.unwrap();
        assert_eq!(line.line.lock().window(), 4 * MIB as u64);
        assert_eq!(fifth.patience(Duration::from_secs(3)), Duration::from_secs(4 * 3 * 4));
        for turn in turns.drain(..) {
            tokio::time::sleep(Duration::from_secs(1)).await;
            turn.delivered();
        }
        assert_eq!(line.line.lock().window(), 4 * MIB as u64);
        assert_eq!(fifth.patience(Duration::from_secs(3)), Duration::from_secs(3 * 4));
        drop(fifth);
        // A faster one.
        for _ in 0..2_000 {
            let turn = line.turn(MIB).await;
            tokio::time::sleep(Duration::from_millis(10)).await;
            turn.delivered();
        }
        assert!(line.line.lock().window() > 300 * MIB as u64);
        assert_eq!(line.line.lock().under_way, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_late_or_gone_holds_up_nobody() {
        let line = Uplink::default();
        let mut turns = Vec::new();
        for _ in 0..4 {
            turns.push(line.turn(MIB).await);
        }
        let gone = line.clone();
        let gone = tokio::spawn(async move { gone.turn(MIB).await });
        let next = line.clone();
        let next = tokio::spawn(async move { next.turn(MIB).await });
        tokio::time::sleep(Duration::from_secs(1)).await;
        gone.abort();
        turns[0].leave();
        turns[0].leave();
        drop(next.await.unwrap());
        // What was late still counts when it comes.
        turns[0].delivered();
        drop(turns);
        assert_eq!(line.line.lock().under_way, 0);
        assert_eq!(line.line.lock().delivered, MIB as u64);
    }
}
