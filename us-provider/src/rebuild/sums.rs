//! Partial sums: each source multiplies its fragment and adds what others send it, so that one
//! fragment (a chain) or one a site arrives here.
//!
//! Slices of slots travel one behind the other, so that all hops work at once. A sum cannot be
//! checked before it is whole: where it is wrong, a star makes the fragment, and then each node's
//! sum is asked for again and compared, upstreams first. The first wrong one is the liar's.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::{self, StreamExt};
use futures::{FutureExt, TryFutureExt};
use tokio::time::{Instant, sleep_until};
use us_core::code::combine_into;
use us_core::fragment::{FingerprintList, FragmentRecord};
use us_core::placement::paths::slice_slots;
use us_proto::v1::{CombineReply, CombineRequest, FragmentStatus};

use super::forest::{self, Node};
use super::order::Path;
use super::pull::Star;
use super::work::{Fault, Short, Shown, Work, examine, off_runtime, records};

/// Sums asked for at once, at most.
const WINDOW_MAX: usize = 40;
/// Choices of sources that are tried before a star takes over.
const TRIES: usize = 3;

/// For each wanted fragment, by its place in the list: the coefficient of each source.
type Coefficients = Vec<BTreeMap<usize, u8>>;

/// Sums that came out wrong.
struct Wrong {
    forest: Vec<Node>,
    coefficients: Coefficients,
    bodies: Vec<Vec<u8>>,
}

/// A sum that did not come.
struct NoSum {
    /// Whose fault it is said to be.
    source: usize,
    fault: Fault,
    /// Whether another node says so.
    hearsay: bool,
    slots: Range<usize>,
}

enum Attempt {
    Right(Vec<FragmentRecord>),
    Wrong(Wrong),
    /// A source failed; it is among the faults.
    Failed,
    /// One says of another what that one denies.
    Contested,
}

impl Work {
    /// The missing fragments by sums; by a star where that does not work.
    ///
    /// # Errors
    /// [`Short`].
    pub async fn summed(&mut self) -> Result<Vec<FragmentRecord>, Short> {
        let s = self.code.code().s();
        for _ in 0..TRIES {
            let chosen = self.ranked();
            let chosen: Vec<usize> = chosen
                .into_iter()
                .filter(|source| !self.faults.contains_key(source))
                .take(s)
                .collect();
            if chosen.len() < s || self.deadline <= Instant::now() {
                break;
            }
            match self.attempt(chosen).await {
                Attempt::Right(records) => return Ok(records),
                Attempt::Failed => {}
                Attempt::Contested => break,
                Attempt::Wrong(wrong) => {
                    tracing::warn!(block = %self.order.block, "a partial sum is wrong");
                    let star = self.star().await?;
                    self.find_liar(&wrong, &star).await;
                    return Ok(star.records);
                }
            }
        }
        Ok(self.star().await?.records)
    }

    async fn attempt(&mut self, chosen: Vec<usize>) -> Attempt {
        let Some(coefficients) = self.coefficients(&chosen) else { return Attempt::Failed };
        let (here, remote): (Vec<usize>, Vec<usize>) =
            chosen.iter().partition(|source| self.order.sources[**source].place.is_none());
        let mut own = Vec::new();
        for source in here {
            match self.load(source).await {
                Ok(body) => own.push((source, body)),
                Err(fault) => {
                    self.fault(source, fault);
                    return Attempt::Failed;
                }
            }
        }
        let forest = match self.order.path {
            Path::Sites => forest::sites(&remote, &self.order),
            Path::Star | Path::RotatedStar | Path::Chain => forest::chain(&remote),
        };
        let Some(list) = self.learn_list(&chosen).await else { return Attempt::Failed };
        let sums = match self.sum(&forest, &coefficients).await {
            Ok(sums) => sums,
            Err(failed) => return self.blame(failed, &coefficients).await,
        };
        let (order, missing, known) =
            (Arc::clone(&self.order), self.missing.clone(), coefficients.clone());
        let added = off_runtime(move || {
            let bodies = add_up(&order, &known, &own, sums);
            match records(&order, &missing, bodies.clone(), &list) {
                Some(records) => Ok(records),
                None => Err(bodies),
            }
        });
        match added.await {
            Some(Ok(records)) => Attempt::Right(records),
            Some(Err(bodies)) => Attempt::Wrong(Wrong { forest, coefficients, bodies }),
            None => Attempt::Failed,
        }
    }

    /// Notes whose fault it is. What one node says of another's bytes is believed when that one says
    /// it too: a liar could have anybody declared damaged.
    async fn blame(&mut self, failed: NoSum, coefficients: &Coefficients) -> Attempt {
        let NoSum { source, fault, hearsay, slots } = failed;
        tracing::debug!(block = %self.order.block, source, ?fault, hearsay, "no sum");
        if !hearsay || !fault.concerns_bytes() {
            self.fault(source, fault);
            return Attempt::Failed;
        }
        let alone = Node { source, upstreams: Vec::new() };
        match self.ask_sum(&alone, &coefficients[0], &slots, Instant::now()).await {
            Ok(_) => Attempt::Contested,
            Err(failed) => {
                self.fault(source, failed.fault);
                Attempt::Failed
            }
        }
    }

    fn coefficients(&self, chosen: &[usize]) -> Option<Coefficients> {
        let indexes: Vec<usize> =
            chosen.iter().map(|source| self.order.sources[*source].index.into()).collect();
        let rows = self.missing.iter().map(|wanted| {
            let row = self.code.coefficients(usize::from(*wanted), &indexes).ok()?;
            Some(chosen.iter().copied().zip(row).collect())
        });
        rows.collect()
    }

    /// The whole body of a source on the own disk.
    async fn load(&mut self, source: usize) -> Result<Bytes, Fault> {
        let slots = 0..self.order.geometry.fragment_slots();
        let fetched = self.fetch(source, slots.clone(), Instant::now()).await?;
        let (order, data) = (Arc::clone(&self.order), fetched.data.clone());
        let index = order.sources[source].index;
        let look = move || {
            examine(&order, index, &slots, &fetched.header, &fetched.trailer, &fetched.data)
        };
        match off_runtime(look).await {
            Some(Ok(Shown::List(list))) => {
                self.list.get_or_insert(list);
                Ok(data)
            }
            Some(Ok(Shown::Doubtful(detail)) | Err(detail)) => Err(Fault::damaged(detail)),
            None => Err(Fault::new(FragmentStatus::Unspecified, "stopped")),
        }
    }

    /// The fingerprint list, from the first of these whose trailer has it.
    async fn learn_list(&mut self, sources: &[usize]) -> Option<FingerprintList> {
        let end = self.order.geometry.fragment_slots();
        for source in sources.iter().copied() {
            if self.list.is_some() {
                break;
            }
            let fetching = self.fetch(source, end..end, Instant::now());
            let patience = (Instant::now() + self.patience.now()).min(self.deadline);
            let late = |_| Err(Fault::new(FragmentStatus::Unspecified, "not in time"));
            let fetched = tokio::time::timeout_at(patience, fetching).await.unwrap_or_else(late);
            let shown = fetched.and_then(|fetched| {
                let index = self.order.sources[source].index;
                let (header, trailer) = (&fetched.header, &fetched.trailer);
                match examine(&self.order, index, &(end..end), header, trailer, &fetched.data) {
                    Ok(Shown::List(list)) => Ok(list),
                    Ok(Shown::Doubtful(detail)) | Err(detail) => Err(Fault::damaged(detail)),
                }
            });
            match shown {
                Ok(list) => self.list = Some(list),
                Err(fault) => self.fault(source, fault),
            }
        }
        let faulty = sources.iter().any(|source| self.faults.contains_key(source));
        self.list.clone().filter(|_| !faulty)
    }

    /// The sum of every tree, slice by slice: for each wanted fragment its slots' bytes.
    async fn sum(
        &mut self,
        forest: &[Node],
        coefficients: &Coefficients,
    ) -> Result<Vec<(usize, Range<usize>, Bytes)>, NoSum> {
        let slots = self.order.geometry.fragment_slots();
        let depth = forest.iter().map(Node::depth).max().unwrap_or(0);
        let slice = slice_slots(slots, depth);
        let mut asks = Vec::new();
        for first in (0..slots).step_by(slice) {
            let slots = first..(first + slice).min(slots);
            let bytes = slots.len() * self.order.geometry.slot_bytes();
            for (wanted, row) in coefficients.iter().enumerate() {
                for root in forest {
                    let at = self.bucket.reserve(Instant::now(), bytes);
                    let asked = self.ask_sum(root, row, &slots, at);
                    let slots = slots.clone();
                    asks.push(asked.map_ok(move |sum| (wanted, slots, sum)));
                }
            }
        }
        let window = ((depth + 2) * forest.len().max(1) * coefficients.len()).min(WINDOW_MAX);
        let mut running = stream::iter(asks).buffer_unordered(window);
        let (mut sums, begun) = (Vec::new(), Instant::now());
        while let Some(sum) = running.next().await {
            let (wanted, slots, sum) = sum?;
            self.received_bytes += sum.len() as u64;
            sums.push((wanted, slots, sum));
        }
        // Every node passed on as much as its root.
        let bytes = self.order.geometry.fragment_bytes() * coefficients.len();
        for node in forest.iter().flat_map(Node::members) {
            let provider = self.order.sources[node.source].provider;
            self.note_sent(provider, bytes, begun.elapsed());
        }
        Ok(sums)
    }

    /// The sum of one tree over one slice; who failed, where there is none.
    fn ask_sum(
        &self,
        root: &Node,
        coefficients: &BTreeMap<usize, u8>,
        slots: &Range<usize>,
        at: Instant,
    ) -> BoxFuture<'static, Result<Bytes, NoSum>> {
        let request = root.request(&self.order, coefficients, slots);
        let (order, peers, root) = (Arc::clone(&self.order), Arc::clone(&self.peers), root.clone());
        let expected = slots.len() * order.geometry.slot_bytes();
        let (patience, end) = (self.patience.now(), self.deadline);
        let slots = slots.clone();
        async move {
            let failed = |source, fault| {
                let (hearsay, slots) = (source != root.source, slots.clone());
                NoSum { source, fault, hearsay, slots }
            };
            let Some(place) = order.sources[root.source].place.clone() else {
                let fault = Fault::new(FragmentStatus::Invalid, "it is here");
                return Err(failed(root.source, fault));
            };
            sleep_until(at).await;
            let begun = Instant::now();
            let deadline = (begun + patience).min(end);
            let left_ms = deadline.saturating_duration_since(begun).as_millis() as u64;
            let request = CombineRequest { deadline_ms: left_ms.max(1), ..request };
            let reply = peers.combine(&place, request, deadline).await;
            let reply = reply.map_err(|failure| failed(root.source, failure.into()))?;
            sum_of(reply, expected).map_err(|(index, fault)| {
                let named = index.and_then(|index| root.find(index, &order.sources));
                failed(named.unwrap_or(root.source), fault)
            })
        }
        .boxed()
    }

    /// Asks for each node's sum again, where a wrong one shows whose it is.
    async fn find_liar(&mut self, wrong: &Wrong, star: &Star) {
        let slot_bytes = self.order.geometry.slot_bytes();
        let Some((wanted, slot)) = first_difference(wrong, &star.records, slot_bytes) else {
            return;
        };
        let slots = slot..slot + 1;
        let range = slot * slot_bytes..(slot + 1) * slot_bytes;
        let coefficients = &wrong.coefficients[wanted];
        for node in wrong.forest.iter().flat_map(Node::members) {
            let mut expected = vec![0u8; slot_bytes];
            for member in node.members() {
                let coefficient = coefficients.get(&member.source).copied().unwrap_or_default();
                let Some(body) = star.bodies.get(&member.source) else { return };
                combine_into(&[coefficient], &[&body[range.clone()]], &mut expected)
                    .expect("slots of one length");
            }
            match self.ask_sum(node, coefficients, &slots, Instant::now()).await {
                Ok(sum) if sum[..] == expected => {}
                Ok(_) => {
                    return self.fault(node.source, Fault::damaged("its partial sum is wrong"));
                }
                // It added up before: now it is somebody's affair whom nobody can name.
                Err(_) => return,
            }
        }
    }
}

/// The bytes of a good reply; else the fragment it names, and what it says.
fn sum_of(reply: CombineReply, expected: usize) -> Result<Bytes, (Option<u32>, Fault)> {
    let named = reply.fault.as_ref().map(|fault| fault.index);
    match reply.status() {
        FragmentStatus::Ok if reply.data.len() == expected => Ok(reply.data),
        FragmentStatus::Ok => {
            let detail = format!("{} bytes came where {expected} were asked for", reply.data.len());
            Err((None, Fault::damaged(detail)))
        }
        status => Err((named, Fault::new(status, reply.detail))),
    }
}

/// The wanted bodies: the parts on the own disk and all sums.
fn add_up(
    order: &super::order::Order,
    coefficients: &Coefficients,
    own: &[(usize, Bytes)],
    sums: Vec<(usize, Range<usize>, Bytes)>,
) -> Vec<Vec<u8>> {
    let slot_bytes = order.geometry.slot_bytes();
    let mut bodies = vec![vec![0u8; order.geometry.fragment_bytes()]; coefficients.len()];
    for (body, row) in bodies.iter_mut().zip(coefficients) {
        let factors: Vec<u8> =
            own.iter().map(|(source, _)| row.get(source).copied().unwrap_or_default()).collect();
        let parts: Vec<&[u8]> = own.iter().map(|(_, part)| &part[..]).collect();
        combine_into(&factors, &parts, body).expect("bodies of one block");
    }
    for (wanted, slots, sum) in sums {
        let range = slots.start * slot_bytes..slots.end * slot_bytes;
        combine_into(&[1], &[&sum], &mut bodies[wanted][range]).expect("lengths were compared");
    }
    bodies
}

/// The first wanted fragment, and its first slot, that came out wrong.
fn first_difference(
    wrong: &Wrong,
    right: &[FragmentRecord],
    slot_bytes: usize,
) -> Option<(usize, usize)> {
    wrong.bodies.iter().zip(right).enumerate().find_map(|(wanted, (body, record))| {
        let slots = body.chunks(slot_bytes).zip(record.body.chunks(slot_bytes));
        Some((wanted, slots.enumerate().find(|(_, (a, b))| a != b)?.0))
    })
}
