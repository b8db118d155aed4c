//! Which providers hold copies of the journal, and how far each has got: pure.
//!
//! ```text
//! online --choose--> catching up --everything written was sent--> counted --> gone, late, refused
//!                    (does not count)                      (durable waits for it)     (another is
//!                                                                                      chosen)
//! ```
//! A holder gets the records in order from the root's first on, a bounded number of bytes ahead of
//! what it has stored. It is *counted* once everything written was sent to it: from then on nothing
//! is called durable that it has not stored. Before that it cannot make anyone wait, so a slow
//! catch-up stalls nothing; a counted holder that falls silent is given up after a bounded time.
//! Without any holder what is durable is what the own disk has.
//!
//! Invariants (checked by the simulation below):
//! - what is called durable while holders are counted is stored at every one of them;
//! - a holder's records have no gap between the root and what it has stored;
//! - whoever answers or not, durability goes on within `ack_ms` and a tick.

use std::collections::{BTreeMap, VecDeque};

use crate::store::Seq;

/// Providers that must be online before holders are chosen.
const PROVIDERS_MIN: usize = 3;
/// A holder that failed is not chosen again for this many acknowledgement times.
const AVOID_FACTOR: u64 = 10;

/// Limits of the copies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CopiesConfig {
    /// How many holders; 0: none.
    pub copies: usize,
    /// How long a holder may take to acknowledge anything.
    pub ack_ms: u64,
    /// Bytes on their way to one holder.
    pub window_bytes: usize,
}

/// A provider that can be chosen.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct OnlineProvider {
    /// Its number.
    pub provider: u32,
    /// Its site; may be empty.
    pub site: String,
    /// Whether it can be a holder: it takes new data and has stored the newest root.
    pub eligible: bool,
    /// The records of this run it said it still has, when it came: they need not be sent again.
    pub held: Option<(Seq, Seq)>,
}

#[derive(Debug)]
struct Holder {
    sent: Seq,
    stored: Seq,
    /// Records on their way: number, bytes, when they were sent.
    flight: VecDeque<(Seq, usize, u64)>,
    flight_bytes: usize,
    /// When it last got on while it catches up; when it was counted, from then on.
    waiting_ms: u64,
    counted: bool,
}

impl Holder {
    fn count(&mut self, now_ms: u64, written: Seq) {
        if !self.counted && self.sent >= written {
            self.counted = true;
            self.waiting_ms = now_ms;
        }
    }

    /// While it catches up it must get on at all; once it is waited for, each record counts.
    fn is_late(&self, now_ms: u64, ack_ms: u64) -> bool {
        let Some((_, _, sent_ms)) = self.flight.front() else { return false };
        let since_ms = if self.counted { self.waiting_ms.max(*sent_ms) } else { self.waiting_ms };
        now_ms > since_ms + ack_ms
    }
}

/// The holders.
#[derive(Debug)]
pub struct Copies {
    config: CopiesConfig,
    holders: BTreeMap<u32, Holder>,
    avoided: BTreeMap<u32, u64>,
    covered: Seq,
    written: Seq,
}

impl Copies {
    /// No holders yet; a root covers the commits up to `covered`.
    pub fn new(config: CopiesConfig, covered: Seq) -> Self {
        let (holders, avoided) = (BTreeMap::new(), BTreeMap::new());
        Self { config, holders, avoided, covered, written: covered }
    }

    /// Records up to here can be read.
    pub fn wrote(&mut self, seq: Seq) {
        self.written = self.written.max(seq);
    }

    /// How far records can be read.
    pub fn written(&self) -> Seq {
        self.written
    }

    /// Gives up holders that are gone or late, and chooses others.
    pub fn choose(&mut self, now_ms: u64, online: &[OnlineProvider], can_catch_up: bool) {
        let ack_ms = self.config.ack_ms;
        let late = self.holders.iter().filter(|(_, holder)| holder.is_late(now_ms, ack_ms));
        let late: Vec<u32> = late.map(|(id, _)| *id).collect();
        late.into_iter().for_each(|provider| self.refused(now_ms, provider));
        self.holders.retain(|id, _| online.iter().any(|found| found.provider == *id));
        self.avoided.retain(|_, until_ms| *until_ms > now_ms);
        if online.len() < PROVIDERS_MIN || !can_catch_up {
            return;
        }
        while self.holders.len() < self.config.copies {
            let sites: Vec<&str> = online
                .iter()
                .filter(|found| self.holders.contains_key(&found.provider))
                .map(|found| found.site.as_str())
                .collect();
            let free = online.iter().filter(|found| {
                found.eligible
                    && !self.holders.contains_key(&found.provider)
                    && !self.avoided.contains_key(&found.provider)
            });
            let same_site =
                |found: &&OnlineProvider| (sites.contains(&found.site.as_str()), found.provider);
            let Some(best) = free.min_by_key(same_site) else { return };
            let useful = |(first, last): &(Seq, Seq)| {
                *first <= self.covered + 1 && (self.covered..=self.written).contains(last)
            };
            let stored = best.held.filter(useful).map_or(self.covered, |(_, last)| last);
            let mut holder = Holder {
                sent: stored,
                stored,
                flight: VecDeque::new(),
                flight_bytes: 0,
                waiting_ms: now_ms,
                counted: false,
            };
            holder.count(now_ms, self.written);
            self.holders.insert(best.provider, holder);
        }
    }

    /// A provider cannot be a holder: another is chosen for a while.
    pub fn refused(&mut self, now_ms: u64, provider: u32) {
        if self.holders.remove(&provider).is_some() {
            tracing::warn!(provider, "a holder of the journal's copy is given up");
            self.avoided.insert(provider, now_ms + AVOID_FACTOR * self.config.ack_ms);
        }
    }

    /// A provider's connection ended: nothing that was on its way to it counts.
    pub fn gone(&mut self, provider: u32) {
        self.holders.remove(&provider);
    }

    /// Holders that can be sent something, the first record each wants, and how many bytes.
    pub fn wanting(&self) -> Vec<(u32, Seq, usize)> {
        let free = |holder: &Holder| self.config.window_bytes.saturating_sub(holder.flight_bytes);
        let wanting = self
            .holders
            .iter()
            .filter(|(_, holder)| holder.sent < self.written && free(holder) > 0);
        wanting.map(|(id, holder)| (*id, holder.sent + 1, free(holder))).collect()
    }

    /// A record was sent to a holder: the next it wanted.
    pub fn sent(&mut self, now_ms: u64, provider: u32, seq: Seq, bytes: usize) {
        let Some(holder) = self.holders.get_mut(&provider) else { return };
        debug_assert_eq!(seq, holder.sent + 1, "records are sent in order");
        if holder.flight.is_empty() && !holder.counted {
            holder.waiting_ms = now_ms;
        }
        holder.sent = seq;
        holder.flight.push_back((seq, bytes, now_ms));
        holder.flight_bytes += bytes;
        holder.count(now_ms, self.written);
    }

    /// A holder has stored records up to here.
    pub fn stored(&mut self, now_ms: u64, provider: u32, seq: Seq) {
        let Some(holder) = self.holders.get_mut(&provider) else { return };
        let seq = seq.min(holder.sent);
        if seq <= holder.stored {
            return;
        }
        holder.stored = seq;
        if !holder.counted {
            holder.waiting_ms = now_ms;
        }
        while let Some((_, bytes, _)) = holder.flight.pop_front_if(|(sent, ..)| *sent <= seq) {
            holder.flight_bytes -= bytes;
        }
    }

    /// A newer root covers commits up to here: who becomes a holder from now on begins behind it.
    pub fn covers(&mut self, seq: Seq) {
        self.covered = self.covered.max(seq);
        self.written = self.written.max(seq);
    }

    /// A holder has stored the newest root, so that it needs no records up to there.
    pub fn root_stored(&mut self, provider: u32) {
        let covered = self.covered;
        let Some(holder) = self.holders.get_mut(&provider) else { return };
        if holder.sent < covered {
            holder.sent = covered;
            holder.flight.clear();
            holder.flight_bytes = 0;
        }
        holder.stored = holder.stored.max(covered);
    }

    /// How far commits are durable, when the own disk has them up to `synced`.
    pub fn floor(&self, synced: Seq) -> Seq {
        let counted = self.holders.values().filter(|holder| holder.counted);
        counted.map(|holder| holder.stored).fold(synced, Seq::min)
    }

    /// The holders that have everything up to `durable`.
    pub fn live(&self, durable: Seq) -> Vec<u32> {
        let live = self.holders.iter().filter(|(_, h)| h.counted && h.stored >= durable);
        live.map(|(id, _)| *id).collect()
    }

    /// Whether a provider is a holder, live or not yet.
    pub fn is_holder(&self, provider: u32) -> bool {
        self.holders.contains_key(&provider)
    }
}

#[cfg(test)]
mod tests;
