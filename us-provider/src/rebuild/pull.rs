//! Pulling: asks sources for slots as [`Gather`] says, checks what comes, computes.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, StreamExt};
use tokio::time::{Instant, sleep_until};
use us_core::disk::{FetchedSlots, SlotRange};
use us_core::fragment::FragmentRecord;
use us_proto::v1::FragmentStatus;

use super::gather::{Ask, Gather};
use super::order::Source;
use super::work::{Fault, Short, Shown, Slices, Work, examine, off_runtime, reconstruct, records};
use crate::service::status_of;
use crate::store::ReadRequest;

/// Choices of sources that are tried where fragments contradict each other.
const CHOICES_MAX: usize = 1024;

/// What came of the sources, by their position.
#[derive(Default)]
pub(super) struct Pulled {
    runs: BTreeMap<usize, Vec<(Range<usize>, Bytes)>>,
    /// Whole bodies whose trailers are not the writer's.
    doubtful: BTreeMap<usize, Bytes>,
}

/// Fragments computed by a star, and what they were computed of.
pub(super) struct Star {
    pub records: Vec<FragmentRecord>,
    /// Right bodies, by the source's position.
    pub bodies: BTreeMap<usize, Bytes>,
}

/// An ask that is under way.
struct Waiting {
    ask: Ask,
    /// When it was, or will be, sent.
    at: Instant,
    late: bool,
}

struct Answer {
    ask: Ask,
    elapsed: Duration,
    result: Result<(Bytes, Shown), Fault>,
}

impl Pulled {
    fn slots(&self, source: usize, slots: &Range<usize>, slot_bytes: usize) -> Option<Bytes> {
        let (run, bytes) = self
            .runs
            .get(&source)?
            .iter()
            .find(|(run, _)| run.start <= slots.start && slots.end <= run.end)?;
        let at = |slot: usize| (slot - run.start) * slot_bytes;
        Some(bytes.slice(at(slots.start)..at(slots.end)))
    }
}

impl Work {
    /// Whole fragments of s sources, each checked as it comes.
    ///
    /// # Errors
    /// [`Short`] when too few sources gave right bytes in time.
    pub async fn star(&mut self) -> Result<Star, Short> {
        let (s, slots) = (self.code.code().s(), self.order.geometry.fragment_slots());
        let mut gather = Gather::star(s, self.ranked(), slots);
        let mut pulled = Pulled::default();
        loop {
            self.pull(&mut gather, &mut pulled).await?;
            let here: Vec<usize> = gather.slices().flat_map(|(_, here)| here).collect();
            let bodies: BTreeMap<usize, Bytes> = here
                .into_iter()
                .filter_map(|source| {
                    let body = pulled.slots(source, &(0..slots), self.order.geometry.slot_bytes());
                    Some((source, body?))
                })
                .collect();
            if let Some(star) = self.agree(bodies).await {
                return Ok(star);
            }
            // Each has its fingerprint, and together they are wrong: somebody forged a CRC-32C.
            tracing::warn!(block = %self.order.block, "fragments contradict each other");
            gather.need_more();
        }
    }

    /// The same share of each source; where that gives wrong bytes, a star finds out whose.
    ///
    /// # Errors
    /// As [`Work::star`].
    pub async fn rotated_star(&mut self) -> Result<Vec<FragmentRecord>, Short> {
        let (s, geometry) = (self.code.code().s(), self.order.geometry);
        let mut gather = Gather::rotated(s, self.order.sources.len(), geometry.fragment_slots());
        let mut pulled = Pulled::default();
        self.pull(&mut gather, &mut pulled).await?;
        let slices = gather.slices().map(|(slots, here)| {
            let present = here.into_iter().filter_map(|source| {
                let bytes = pulled.slots(source, &slots, geometry.slot_bytes())?;
                Some((usize::from(self.order.sources[source].index), bytes))
            });
            let present = present.collect();
            (slots, present)
        });
        let slices: Slices = slices.collect();
        drop(pulled);
        match self.compute(slices).await {
            Some(records) => Ok(records),
            None => Ok(self.star().await?.records),
        }
    }

    /// Asks until enough is here.
    async fn pull(&mut self, gather: &mut Gather, pulled: &mut Pulled) -> Result<(), Short> {
        let mut running: FuturesUnordered<BoxFuture<'static, Answer>> = FuturesUnordered::new();
        let mut waiting: Vec<Waiting> = Vec::new();
        let end = loop {
            for ask in gather.asks() {
                let at = self.reserve(&ask);
                running.push(self.ask(ask.clone(), at));
                waiting.push(Waiting { ask, at, late: false });
            }
            if gather.is_complete() {
                break Ok(());
            }
            if gather.is_hopeless() {
                if self.redeem(gather, pulled).await {
                    continue;
                }
                break Err(Short::new(format!(
                    "fewer than {} of {} sources gave right bytes",
                    self.code.code().s(),
                    self.order.sources.len()
                )));
            }
            let patience = self.patience.now();
            let late_at = waiting.iter().filter(|waiting| !waiting.late);
            let late_at = late_at.map(|waiting| waiting.at + patience).min();
            // Cancel-safe, all: asks stay in `running`, sleeps are made anew. Answers first: a
            // source is not late because this task was.
            tokio::select! {
                biased;
                Some(answer) = running.next() => {
                    let late = waiting.iter().any(|waiting| waiting.ask == answer.ask && waiting.late);
                    waiting.retain(|waiting| waiting.ask != answer.ask);
                    self.answered(answer, late, gather, pulled);
                }
                () = sleep_until(late_at.unwrap_or(self.deadline)), if late_at.is_some() => {
                    let now = Instant::now();
                    for waiting in waiting.iter_mut().filter(|one| one.at + patience <= now) {
                        waiting.late = true;
                        gather.late(&waiting.ask);
                    }
                }
                () = sleep_until(self.deadline) => break Err(Short::new("not done in time")),
            }
        };
        let out_of_time = self.deadline <= Instant::now();
        for Waiting { ask, late, .. } in waiting {
            gather.dropped(&ask);
            if late || out_of_time {
                self.fault(ask.source, Fault::new(FragmentStatus::Unspecified, "not in time"));
            }
        }
        end
    }

    /// When to ask, so that the order's rate holds.
    fn reserve(&mut self, ask: &Ask) -> Instant {
        let order = Arc::clone(&self.order);
        self.reserve_from(&order.sources[ask.source], &ask.slots)
    }

    /// As [`Work::reserve`], of anybody the order names.
    pub(super) fn reserve_from(&mut self, source: &Source, slots: &Range<usize>) -> Instant {
        let now = Instant::now();
        match source.place {
            Some(_) => self.bucket.reserve(now, slots.len() * self.order.geometry.slot_bytes()),
            None => now,
        }
    }

    fn ask(&self, ask: Ask, at: Instant) -> BoxFuture<'static, Answer> {
        let order = Arc::clone(&self.order);
        let fetched = self.fetch(ask.source, ask.slots.clone(), at);
        async move {
            let fetched = fetched.await;
            let elapsed = at.elapsed();
            let index = order.sources[ask.source].index;
            let result = match fetched {
                Ok(FetchedSlots { header, trailer, data }) => {
                    let (slots, bytes) = (ask.slots.clone(), data.clone());
                    let look = move || examine(&order, index, &slots, &header, &trailer, &bytes);
                    match off_runtime(look).await {
                        Some(Ok(shown)) => Ok((data, shown)),
                        Some(Err(wrong)) => Err(Fault::damaged(wrong)),
                        None => Err(Fault::new(FragmentStatus::Unspecified, "stopped")),
                    }
                }
                Err(fault) => Err(fault),
            };
            Answer { ask, elapsed, result }
        }
        .boxed()
    }

    /// Slots of a source with header and trailer, from its provider or from the own disk.
    pub(super) fn fetch(
        &self,
        source: usize,
        slots: Range<usize>,
        at: Instant,
    ) -> BoxFuture<'static, Result<FetchedSlots, Fault>> {
        self.fetch_from(&self.order.sources[source], slots, at)
    }

    /// As [`Work::fetch`], of anybody the order names.
    pub(super) fn fetch_from(
        &self,
        source: &Source,
        slots: Range<usize>,
        at: Instant,
    ) -> BoxFuture<'static, Result<FetchedSlots, Fault>> {
        let id = self.order.id(source.index);
        let Some(place) = source.place.clone() else {
            let (store, first_slot, slots) = (self.store.clone(), slots.start, Some(slots.len()));
            let read = move || store.read(ReadRequest { id, first_slot, slots });
            return async move {
                let stopped = || Fault::new(FragmentStatus::Unspecified, "stopped");
                let read = off_runtime(read).await.ok_or_else(stopped)?;
                let read =
                    read.map_err(|error| Fault::new(status_of(&error), error.to_string()))?;
                let header = read.header.encode().to_vec().into();
                Ok(FetchedSlots { header, trailer: read.trailer, data: read.data })
            }
            .boxed();
        };
        let range = SlotRange {
            fragment: id,
            first_slot: slots.start as u32,
            slots: slots.len() as u32,
            slot_bytes: self.order.geometry.slot_bytes() as u32,
        };
        let (peers, provider, deadline) = (Arc::clone(&self.peers), source.provider, self.deadline);
        let grant = self.order.grant.clone();
        async move {
            sleep_until(at).await;
            Ok(peers.fetch(provider, &place, grant, range, deadline).await?)
        }
        .boxed()
    }

    fn answered(&mut self, answer: Answer, late: bool, gather: &mut Gather, pulled: &mut Pulled) {
        let Answer { ask, elapsed, result } = answer;
        let source = ask.source;
        let remote = self.order.sources[source].place.is_some();
        match result {
            Ok((data, shown)) => {
                if remote {
                    self.received_bytes += data.len() as u64;
                    let provider = self.order.sources[source].provider;
                    self.note_sent(provider, data.len(), elapsed);
                }
                match shown {
                    Shown::List(list) => {
                        self.list.get_or_insert(list);
                        if remote && !late {
                            self.patience.answered(elapsed);
                        }
                        self.pardon(source);
                        pulled.runs.entry(source).or_default().push((ask.slots.clone(), data));
                        gather.arrived(&ask);
                    }
                    Shown::Doubtful(detail) => {
                        self.fault(source, Fault::damaged(detail));
                        gather.failed(source);
                        if ask.slots.len() == self.order.geometry.fragment_slots() {
                            pulled.doubtful.insert(source, data);
                        }
                    }
                }
            }
            Err(fault) => {
                tracing::debug!(block = %self.order.block, source, ?fault, "source of no use");
                self.fault(source, fault);
                gather.failed(source);
            }
        }
    }

    /// Where too few sources are left: those whose trailer is not the writer's may have the right
    /// body. Says whether any has.
    async fn redeem(&mut self, gather: &mut Gather, pulled: &mut Pulled) -> bool {
        let doubtful = std::mem::take(&mut pulled.doubtful);
        let Some(list) = self.list.clone().filter(|_| !doubtful.is_empty()) else { return false };
        let order = Arc::clone(&self.order);
        let right = off_runtime(move || {
            let is_right = |(source, body): &(usize, Bytes)| {
                list.check(order.sources[*source].index, body).is_ok()
            };
            doubtful.into_iter().filter(is_right).collect::<Vec<_>>()
        });
        let right = right.await.unwrap_or_default();
        let slots = 0..self.order.geometry.fragment_slots();
        for (source, body) in &right {
            pulled.runs.insert(*source, vec![(slots.clone(), body.clone())]);
            gather.redeemed(*source);
        }
        !right.is_empty()
    }

    /// The missing fragments from the first choice of s bodies that gives the writer's; who does not
    /// fit the choice has a forged one.
    async fn agree(&mut self, bodies: BTreeMap<usize, Bytes>) -> Option<Star> {
        let (order, code) = (Arc::clone(&self.order), self.code.clone());
        let (missing, list) = (self.missing.clone(), self.list.clone()?);
        let slots = 0..order.geometry.fragment_slots();
        let found = off_runtime(move || {
            let s = code.code().s();
            let sources: Vec<usize> = bodies.keys().copied().collect();
            let index = |source: &usize| usize::from(order.sources[*source].index);
            for chosen in choices(sources.len(), s).take(CHOICES_MAX) {
                let chosen: Vec<usize> = chosen.into_iter().map(|at| sources[at]).collect();
                let present = chosen.iter().map(|one| (index(one), bodies[one].clone())).collect();
                let slices = vec![(slots.clone(), present)];
                let computed = reconstruct(&code, &order, &missing, &slices).ok()?;
                let Some(records) = records(&order, &missing, computed, &list) else { continue };
                let others = sources.iter().filter(|source| !chosen.contains(source));
                let forged: Vec<usize> = others
                    .copied()
                    .filter(|source| {
                        let index = order.sources[*source].index;
                        let right = reconstruct(&code, &order, &[index], &slices);
                        right.map_or(true, |right| right[0] != bodies[source])
                    })
                    .collect();
                let mut bodies = bodies;
                bodies.retain(|source, _| !forged.contains(source));
                return Some((Star { records, bodies }, forged));
            }
            None
        });
        let (star, forged) = found.await??;
        for source in forged {
            self.fault(source, Fault::damaged("it does not fit the other fragments"));
        }
        Some(star)
    }
}

/// The ways to take `take` of `of` things, in lexical order.
fn choices(of: usize, take: usize) -> impl Iterator<Item = Vec<usize>> {
    let first = (take <= of).then(|| (0..take).collect::<Vec<usize>>());
    std::iter::successors(first, move |choice| {
        let mut next = choice.clone();
        let at = (0..take).rev().find(|at| next[*at] < of - take + at)?;
        next[at] += 1;
        (at + 1..take).for_each(|after| next[after] = next[after - 1] + 1);
        Some(next)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_choices_each_once() {
        let all: Vec<_> = choices(4, 2).collect();
        assert_eq!(all, [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]);
        assert_eq!(choices(3, 3).count(), 1);
        assert_eq!(choices(2, 3).count(), 0);
        assert_eq!(choices(10, 4).collect::<std::collections::BTreeSet<_>>().len(), 210);
    }
}
