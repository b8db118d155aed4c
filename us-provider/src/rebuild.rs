//! Rebuilding: makes fragments of a block again from others, as the directory orders, and stores
//! them here.
//!
//! ```text
//! order -> checked -> block, turn, memory -> what is here already -> work -> store -> Rebuilt
//!                  \-> BUSY, REFUSED
//! ```
//! [`order`] checks, [`gather`] and [`forest`] plan without I/O, `work` carries out.
//!
//! Invariants:
//! - Nothing is stored that is not the writer's, byte for byte: the order holds the hash of the
//!   block's fingerprints.
//! - OK is said after every wanted fragment is durable.
//! - Of one block one order works at a time; the next finds what it left.
//! - Orders taken in, orders at work and their memory are bounded; who comes beyond is BUSY.
//!
//! Called by membership. It uses memory and CPU of its own: the service's limits are not touched.

mod copy;
mod forest;
mod gather;
pub mod order;
mod pace;
mod peers;
mod pull;
mod sums;
#[cfg(test)]
mod tests;
mod work;

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use us_core::fragment::FragmentRecord;
use us_core::ids::{BlockId, ProviderId};
use us_proto::v1::{RebuildFragments, RebuildStatus, Rebuilt};

use crate::guest::{GuestConfig, Pause, Pressure, may_repair};
use crate::store::{Store, StoreError};
pub use forest::{COMBINE_DEPTH_MAX, COMBINE_UPSTREAMS_MAX};
use order::Order;
pub use peers::{PeerLinks, Peers};
use work::{Work, off_runtime};

/// Bytes a permit of memory stands for.
const UNIT_BYTES: usize = 4096;

/// What rebuilding may take.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RebuildLimits {
    /// Orders at work.
    pub orders_inflight_max: usize,
    /// Orders that wait for those; more are BUSY.
    pub orders_queued_max: usize,
    /// Memory of all orders at work.
    pub bytes_max: usize,
}

impl Default for RebuildLimits {
    fn default() -> Self {
        Self { orders_inflight_max: 4, orders_queued_max: 64, bytes_max: 128 << 20 }
    }
}

/// Which order: the stream it came by, and its number there.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Ticket {
    /// The stream, counted by the protocol.
    pub stream: u64,
    /// The directory's number.
    pub ticket: u64,
}

/// How an order ended.
#[derive(Clone, PartialEq, Debug)]
pub struct Ended {
    /// The stream it came by.
    pub stream: u64,
    /// What the directory is told.
    pub rebuilt: Rebuilt,
}

/// Carries out orders. Cheap to clone.
#[derive(Clone)]
pub struct Rebuilder {
    inner: Arc<Inner>,
}

impl std::fmt::Debug for Rebuilder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Rebuilder").field("limits", &self.inner.limits).finish_non_exhaustive()
    }
}

struct Inner {
    store: Store,
    pause: Pause,
    guest: GuestConfig,
    peers: Arc<dyn Peers>,
    limits: RebuildLimits,
    /// Room for orders, at work or waiting.
    room: Arc<Semaphore>,
    turns: Arc<Semaphore>,
    /// In units of [`UNIT_BYTES`].
    memory: Arc<Semaphore>,
    running: Mutex<HashMap<Ticket, CancellationToken>>,
    /// The blocks that are worked on.
    blocks: Mutex<HashMap<BlockId, Arc<tokio::sync::Mutex<()>>>>,
    ended: mpsc::Sender<Ended>,
    closed: CancellationToken,
    tasks: TaskTracker,
}

/// What is stored under the id of a wanted fragment.
enum Present {
    /// The writer's record.
    Right(Bytes),
    /// A whole record that is not the writer's.
    Other,
    /// Nothing, or a damaged record.
    Nothing,
}

/// What an order came to, before it is told.
struct Outcome {
    status: RebuildStatus,
    detail: String,
    faults: Vec<us_proto::v1::SourceFault>,
    received_bytes: u64,
    pulled: Vec<us_proto::v1::Pulled>,
}

impl Outcome {
    fn new(status: RebuildStatus, detail: impl Into<String>) -> Self {
        let (faults, pulled) = (Vec::new(), Vec::new());
        Self { status, detail: detail.into(), faults, received_bytes: 0, pulled }
    }

    fn failed(error: &StoreError) -> Self {
        let status = match error {
            StoreError::NoSpace { .. } => RebuildStatus::NoSpace,
            StoreError::Refused { .. } | StoreError::Invalid(_) | StoreError::Request { .. } => {
                RebuildStatus::Refused
            }
            StoreError::Busy | StoreError::Closed => RebuildStatus::Busy,
            StoreError::NotFound { .. }
            | StoreError::Damaged { .. }
            | StoreError::Io { .. }
            | StoreError::Segment(_)
            | StoreError::Combine(_)
            | StoreError::Index(_) => RebuildStatus::Io,
        };
        Self::new(status, error.to_string())
    }
}

impl Rebuilder {
    /// A rebuilder that stores into `store` and asks `peers`. What becomes of orders is heard on the
    /// receiver, once each.
    pub fn new(
        store: Store,
        pause: Pause,
        guest: GuestConfig,
        peers: Arc<dyn Peers>,
        limits: RebuildLimits,
    ) -> (Self, mpsc::Receiver<Ended>) {
        let room = limits.orders_inflight_max.max(1) + limits.orders_queued_max;
        let (ended, endings) = mpsc::channel(room);
        let inner = Inner {
            store,
            pause,
            guest,
            peers,
            limits,
            room: Arc::new(Semaphore::new(room)),
            turns: Arc::new(Semaphore::new(limits.orders_inflight_max.max(1))),
            memory: Arc::new(Semaphore::new(limits.bytes_max.div_ceil(UNIT_BYTES).max(1))),
            running: Mutex::default(),
            blocks: Mutex::default(),
            ended,
            closed: CancellationToken::new(),
            tasks: TaskTracker::new(),
        };
        (Self { inner: Arc::new(inner) }, endings)
    }

    /// Takes an order for the provider `own`; never waits. The answer comes by the receiver, except
    /// where there is no room for the order: then it is returned.
    pub fn start(
        &self,
        ticket: Ticket,
        own: ProviderId,
        order: RebuildFragments,
    ) -> Option<Rebuilt> {
        let inner = &self.inner;
        let busy =
            |detail| Some(told(ticket, Outcome::new(RebuildStatus::Busy, detail), Instant::now()));
        if inner.closed.is_cancelled() {
            return busy("the provider is shutting down");
        }
        if inner.pause.is_on() {
            return busy("paused by its owner");
        }
        let Ok(room) = Arc::clone(&inner.room).try_acquire_owned() else {
            return busy("too many orders at once");
        };
        let cancel = inner.closed.child_token();
        inner.running.lock().insert(ticket, cancel.clone());
        let running = Arc::clone(inner);
        inner.tasks.spawn(async move { running.carry_out(ticket, own, order, room, cancel).await });
        None
    }

    /// Ends an order as soon as possible; it is answered as BUSY, unless it was done just then.
    pub fn cancel(&self, ticket: Ticket) {
        if let Some(cancel) = self.inner.running.lock().get(&ticket) {
            cancel.cancel();
        }
    }

    /// Refuses new orders, ends those under way and waits for their ends.
    pub async fn close(&self) {
        self.inner.closed.cancel();
        self.inner.tasks.close();
        self.inner.tasks.wait().await;
    }
}

fn told(ticket: Ticket, outcome: Outcome, begun: Instant) -> Rebuilt {
    let labels = [("status", label(outcome.status))];
    metrics::counter!("us_provider_rebuilds_total", &labels).increment(1);
    Rebuilt {
        ticket: ticket.ticket,
        status: outcome.status.into(),
        detail: outcome.detail,
        faults: outcome.faults,
        received_bytes: outcome.received_bytes,
        pulled: outcome.pulled,
        elapsed_ms: begun.elapsed().as_millis() as u64,
    }
}

/// The value of the metrics' label `status`.
fn label(status: RebuildStatus) -> &'static str {
    match status {
        RebuildStatus::Unspecified => "unspecified",
        RebuildStatus::Ok => "ok",
        RebuildStatus::Sources => "sources",
        RebuildStatus::NoSpace => "no_space",
        RebuildStatus::Refused => "refused",
        RebuildStatus::Busy => "busy",
        RebuildStatus::Io => "io",
    }
}

impl Inner {
    async fn carry_out(
        self: Arc<Self>,
        ticket: Ticket,
        own: ProviderId,
        order: RebuildFragments,
        room: OwnedSemaphorePermit,
        cancel: CancellationToken,
    ) {
        let begun = Instant::now();
        let outcome = match Order::check(&order, own) {
            // Cancel-safe: whatever is dropped half-way has stored whole fragments or none.
            Ok(order) => match cancel.run_until_cancelled(self.in_turn(order, begun)).await {
                Some(outcome) => outcome,
                None => Outcome::new(RebuildStatus::Busy, "cancelled"),
            },
            Err(error) => Outcome::new(RebuildStatus::Refused, error.to_string()),
        };
        self.running.lock().remove(&ticket);
        metrics::histogram!("us_provider_rebuild_seconds").record(begun.elapsed().as_secs_f64());
        metrics::counter!("us_provider_rebuild_received_bytes_total")
            .increment(outcome.received_bytes);
        let rebuilt = told(ticket, outcome, begun);
        tracing::info!(
            ticket = ticket.ticket, status = ?rebuilt.status(), detail = %rebuilt.detail,
            faults = rebuilt.faults.len(), received = rebuilt.received_bytes,
            took_ms = rebuilt.elapsed_ms, "rebuilding ended"
        );
        // Refused only where nobody listens any more. There is room for each order.
        let _ = self.ended.send(Ended { stream: ticket.stream, rebuilt }).await;
        drop(room);
    }

    /// Waits for the block, for a turn and for memory, then works.
    async fn in_turn(&self, order: Order, begun: Instant) -> Outcome {
        let deadline = begun + order.deadline;
        let guest = self.guest;
        let gate = move || may_repair(&guest, Pressure::of("cpu"), Pressure::of("io"));
        match off_runtime(gate).await {
            Some(Ok(())) => {}
            Some(Err(why)) => return Outcome::new(RebuildStatus::Busy, why),
            None => return Outcome::new(RebuildStatus::Busy, "stopping"),
        }
        let units = order.memory_bytes().div_ceil(UNIT_BYTES);
        let units = units.clamp(1, self.limits.bytes_max.div_ceil(UNIT_BYTES).max(1)) as u32;
        let block = order.block;
        let turn = async {
            // The block first: who waits for it takes no turn from others.
            let lock = Arc::clone(self.blocks.lock().entry(block).or_default());
            let alone = lock.lock_owned().await;
            let turn = Arc::clone(&self.turns).acquire_owned().await.ok()?;
            let memory = Arc::clone(&self.memory).acquire_many_owned(units).await.ok()?;
            Some((alone, turn, memory))
        };
        let outcome = match timeout_at(deadline, turn).await {
            Ok(Some(_held)) => self.rebuild(Arc::new(order), deadline).await,
            Ok(None) | Err(_) => Outcome::new(RebuildStatus::Busy, "its turn did not come in time"),
        };
        // Whoever waits for the block holds the lock's other count.
        self.blocks.lock().retain(|_, lock| Arc::strong_count(lock) > 1);
        outcome
    }

    async fn rebuild(&self, order: Arc<Order>, deadline: Instant) -> Outcome {
        let (store, looked_for) = (self.store.clone(), Arc::clone(&order));
        let present = off_runtime(move || {
            let present = |index: &u8| Ok((*index, present(&store, &looked_for, *index)?));
            looked_for.wanted.iter().map(present).collect::<Result<Vec<_>, StoreError>>()
        });
        let present = match present.await.unwrap_or(Err(StoreError::Closed)) {
            Ok(present) => present,
            Err(error) => return Outcome::failed(&error),
        };
        let mut missing = Vec::new();
        for (index, present) in present {
            match present {
                // Put again, it comes out of the trash, and a mark of damage goes.
                Present::Right(record) => {
                    if let Err(error) = self.store.put(record).await {
                        return Outcome::failed(&error);
                    }
                }
                Present::Other => {
                    return Outcome::failed(&StoreError::Refused { id: order.id(index) });
                }
                Present::Nothing => missing.push(index),
            }
        }
        if missing.is_empty() {
            return Outcome::new(RebuildStatus::Ok, "");
        }
        let needed_bytes = (missing.len() * order.geometry.fragment_bytes()) as u64;
        let free_bytes = self.store.state().free_bytes;
        if free_bytes < needed_bytes {
            return Outcome::failed(&StoreError::NoSpace { needed_bytes, free_bytes });
        }
        let (store, peers) = (self.store.clone(), Arc::clone(&self.peers));
        let mut work = Work::new(order, store, peers, missing, deadline);
        let outcome = match work.run().await {
            Ok(records) => self.keep(records).await,
            Err(short) => Outcome::new(RebuildStatus::Sources, short.to_string()),
        };
        Outcome {
            faults: work.wire_faults(),
            received_bytes: work.received_bytes,
            pulled: work.wire_pulled(),
            ..outcome
        }
    }

    async fn keep(&self, records: Vec<FragmentRecord>) -> Outcome {
        if self.pause.is_on() {
            return Outcome::new(RebuildStatus::Busy, "paused by its owner");
        }
        for record in records {
            let Some(bytes) = off_runtime(move || record.to_bytes()).await else {
                return Outcome::new(RebuildStatus::Busy, "stopping");
            };
            if let Err(error) = self.store.put(bytes).await {
                return Outcome::failed(&error);
            }
        }
        Outcome::new(RebuildStatus::Ok, "")
    }
}

/// What is here of a wanted fragment. Blocks.
fn present(store: &Store, order: &Order, index: u8) -> Result<Present, StoreError> {
    match store.read_record(order.id(index)) {
        Ok(bytes) => {
            let record = FragmentRecord::decode(bytes.clone());
            let is_right = record.is_ok_and(|record| {
                record.header == order.header(index)
                    && record.trailer.fingerprints.hash() == order.list_hash
                    && record.trailer.fingerprints.check(index, &record.body).is_ok()
            });
            Ok(if is_right { Present::Right(bytes) } else { Present::Other })
        }
        Err(
            StoreError::NotFound { .. }
            | StoreError::Damaged { .. }
            | StoreError::Io { .. }
            | StoreError::Segment(_),
        ) => Ok(Present::Nothing),
        Err(error) => Err(error),
    }
}
