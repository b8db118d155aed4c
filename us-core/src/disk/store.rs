//! Storing a block: seal and encode on the CPU pool, put everywhere at once, answer when the margin
//! holds.
//!
//! One task drives the puts of a block to their end, whether or not anybody still waits; it owns
//! the fragments and the permits for their bytes. What takes time because the own line is slow is
//! waited for ([`super::uplink`]): a block is given up when nothing of it gets through any more.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, StreamExt};
use tokio::sync::{OwnedSemaphorePermit, oneshot, watch};
use tokio::time::{Instant, sleep_until, timeout_at};

use super::buffers::Buffer;
use super::placing::{Placing, Replacement};
use super::uplink::Turn;
use super::{
    BlockInfo, FragmentBits, FragmentFailure, InlineBlock, PlacementError, PlacementLease, Retry,
    Shared, StoreError, StoredBlock, permits_for,
};
use crate::code::ErasureCode;
use crate::daemon::logging::RequestId;
use crate::fragment::{FingerprintKind, FragmentRecord, records_of_block};
use crate::geometry::BlockGeometry;
use crate::ids::{Birth, BlockId, ProviderId, VolumeId};
use crate::seal::{BlockSealer, FreshBlockId, INLINE_BYTES_MAX};

/// The fingerprints of new blocks.
const KIND: FingerprintKind = FingerprintKind::Blake3;
/// How long a provider that asked to try later is left alone.
const RETRY_AFTER: Duration = Duration::from_millis(200);
/// How long one put may take in all: what is on the line is given up by other clocks.
const PUT_MAX: Duration = Duration::from_secs(3600);
/// How long the late fragments of acknowledged blocks may take once the disk is closed.
const CLOSE_GRACE: Duration = Duration::from_secs(1);

/// Fragments of an acknowledged block that become durable later.
#[derive(Debug)]
pub struct LateFragments {
    progress: watch::Receiver<FragmentBits>,
    seen: FragmentBits,
}

impl LateFragments {
    /// Waits until more fragments are durable and returns all that are; `None` once no put of the
    /// block is under way any more. Cancel-safe.
    pub async fn next(&mut self) -> Option<FragmentBits> {
        loop {
            let current = *self.progress.borrow_and_update();
            if current != self.seen {
                self.seen = current;
                return Some(current);
            }
            self.progress.changed().await.ok()?;
        }
    }
}

/// What the CPU makes of a plaintext.
struct Encoded {
    block: BlockId,
    geometry: BlockGeometry,
    records: Vec<FragmentRecord>,
    fingerprint_hash: [u8; 32],
}

/// What the putting task answers: the places and what is durable.
type Acknowledged = (Vec<ProviderId>, FragmentBits);

impl Shared {
    pub(super) async fn store(
        self: &Arc<Self>,
        plaintext: Vec<Bytes>,
        deadline: Instant,
    ) -> Result<StoredBlock, StoreError> {
        if self.closed.is_cancelled() {
            return Err(StoreError::Closed);
        }
        let bytes = plaintext.iter().map(Bytes::len).sum();
        let geometry = BlockGeometry::new(self.code.code(), bytes)?;
        let on_the_way = geometry.fragment_bytes() * self.code.code().fragments();
        let units = permits_for(on_the_way, self.config.store_bytes_max);
        let waiting = Arc::clone(&self.store_permits).acquire_many_owned(units);
        let late = |what: &str| PlacementError::Unavailable { detail: what.to_owned() };
        let permit = match timeout_at(deadline, waiting).await {
            Ok(permit) => permit.map_err(|_| StoreError::Closed)?,
            Err(_) => return Err(late("earlier blocks are not stored in time").into()),
        };
        let leased = timeout_at(deadline, self.directory.lease_placement()).await;
        let lease = leased.map_err(|_| late("no placement lease in time"))??;
        if lease.providers.len() != self.code.code().fragments() {
            return Err(late("a placement lease of another code").into());
        }
        let encoded = self.encode(plaintext, geometry, lease.birth).await?;
        self.put_all(encoded, lease, permit, deadline).await
    }

    /// Seals and encodes on the CPU pool.
    async fn encode(
        &self,
        plaintext: Vec<Bytes>,
        geometry: BlockGeometry,
        birth: Birth,
    ) -> Result<Encoded, StoreError> {
        let (key, volume, code) = (self.key.clone(), self.volume, self.code.clone());
        let buffers = Arc::clone(&self.buffers);
        let job = move || {
            let buffer = buffers.take(geometry.code().fragments() * geometry.fragment_bytes());
            let sealer = BlockSealer::new(&key, volume, FreshBlockId::generate());
            encode(sealer, volume, &code, plaintext, geometry, birth, buffer)
        };
        self.cpu.run(job).await.ok_or(StoreError::Closed)
    }

    async fn put_all(
        self: &Arc<Self>,
        encoded: Encoded,
        lease: PlacementLease,
        permit: OwnedSemaphorePermit,
        deadline: Instant,
    ) -> Result<StoredBlock, StoreError> {
        let (code, acknowledge) = (self.code.code(), self.config.acknowledge);
        let placing = Placing::new(encoded.block, code, acknowledge, &lease);
        placing.check()?;
        let (answer, answered) = oneshot::channel();
        let (progress, late) = watch::channel(FragmentBits::EMPTY);
        let puts = Puts {
            shared: Arc::clone(self),
            records: encoded.records,
            placing,
            deadline,
            answer: Some(answer),
            progress,
            moved_at: Instant::now(),
            running: FuturesUnordered::new(),
            started: (0..code.fragments()).map(|_| Vec::new()).collect(),
            leasing: None,
            waiting: Vec::new(),
            closing: false,
            _permit: permit,
        };
        self.tasks.spawn(RequestId::carried(puts.run()));
        let (providers, durable) = answered.await.map_err(|_| StoreError::Closed)??;
        Ok(StoredBlock {
            info: BlockInfo {
                id: encoded.block,
                geometry: encoded.geometry,
                providers: providers.into(),
                durable,
                fingerprint_kind: KIND as u32,
                fingerprint_hash: encoded.fingerprint_hash,
                inline: None,
            },
            birth: lease.birth,
            late: LateFragments { progress: late, seen: durable },
        })
    }

    pub(super) fn seal_inline(&self, plaintext: &[Bytes]) -> Result<InlineBlock, StoreError> {
        let slices: Vec<&[u8]> = plaintext.iter().map(AsRef::as_ref).collect();
        let bytes = slices.iter().map(|slice| slice.len()).sum();
        if bytes == 0 || bytes > INLINE_BYTES_MAX {
            return Err(StoreError::InlineBytes { bytes });
        }
        let sealer = BlockSealer::new(&self.key, self.volume, FreshBlockId::generate());
        let block = sealer.block();
        let sealed = sealer.seal_inline(&slices).expect("the length was checked");
        let info = InlineBlock::info(block, bytes, sealed.into());
        Ok(InlineBlock { info: info.ok_or(StoreError::InlineBytes { bytes })? })
    }
}

/// Seals the pages into the data fragments and encodes the parity: all in one buffer.
fn encode(
    sealer: BlockSealer,
    volume: VolumeId,
    code: &ErasureCode,
    plaintext: Vec<Bytes>,
    geometry: BlockGeometry,
    birth: Birth,
    mut buffer: Buffer,
) -> Encoded {
    let (s, fragment_bytes) = (geometry.code().s(), geometry.fragment_bytes());
    let (data, parity) = buffer.as_mut().split_at_mut(s * fragment_bytes);
    let slices: Vec<&[u8]> = plaintext.iter().map(AsRef::as_ref).collect();
    let sealed = sealer.seal_block(&geometry, &slices, data);
    let block = sealed.expect("the geometry was made for these lengths");
    drop(slices);
    drop(plaintext);
    let data: Vec<&[u8]> = data.chunks_exact(fragment_bytes).collect();
    let mut parity: Vec<&mut [u8]> = parity.chunks_exact_mut(fragment_bytes).collect();
    code.encode(&data, &mut parity).expect("s and r slices of one length");
    let mut buffer = buffer.freeze();
    let bodies = (0..geometry.code().fragments()).map(|_| buffer.split_to(fragment_bytes));
    let records = records_of_block(KIND, volume, block, birth, geometry, bodies.collect());
    let fingerprint_hash = records[0].trailer.fingerprints.hash();
    Encoded { block, geometry, records, fingerprint_hash }
}

type Put = BoxFuture<'static, (usize, ProviderId, Result<(), FragmentFailure>)>;
type Leasing = BoxFuture<'static, Result<PlacementLease, PlacementError>>;

/// The puts of one block, from the first to the last.
struct Puts {
    shared: Arc<Shared>,
    records: Vec<FragmentRecord>,
    placing: Placing,
    /// The caller's: there is an answer by then.
    deadline: Instant,
    /// Until the acknowledgement: who waits for it.
    answer: Option<oneshot::Sender<Result<Acknowledged, StoreError>>>,
    progress: watch::Sender<FragmentBits>,
    /// When something of the block last got through.
    moved_at: Instant,
    running: FuturesUnordered<Put>,
    /// For each fragment the tries that are under way.
    started: Vec<Vec<Try>>,
    leasing: Option<Leasing>,
    /// Fragments that wait for the lease.
    waiting: Vec<usize>,
    /// The disk is closed: what is late has until the deadline.
    closing: bool,
    _permit: OwnedSemaphorePermit,
}

/// A put of one fragment that has been started.
struct Try {
    provider: ProviderId,
    /// Its place on the line, once it has one.
    turn: Arc<OnceLock<Turn>>,
    /// It took too long: the fragment was put elsewhere too.
    given_up: bool,
}

/// What happened next.
enum Event {
    Put(usize, ProviderId, Result<(), FragmentFailure>),
    Lease(Result<PlacementLease, PlacementError>),
    Patience,
    Deadline,
    Close,
}

impl Puts {
    async fn run(mut self) {
        for (index, provider) in self.placing.providers.clone().into_iter().enumerate() {
            self.put(index, provider, Duration::ZERO);
        }
        while !self.placing.is_settled() && !self.is_over() {
            let event = self.next_event().await;
            if let Err(error) = self.apply(event) {
                if let Some(answer) = self.answer.take() {
                    // Refused only where the caller is gone.
                    let _ = answer.send(Err(error));
                }
                return;
            }
        }
        // Places were given up, nothing is under way any more, and the margin does not hold.
        if let Some(answer) = self.answer.take() {
            let _ = answer.send(Err(self.placing.hopeless()));
        }
    }

    /// Nothing runs and nothing will be started.
    fn is_over(&self) -> bool {
        self.running.is_empty() && self.leasing.is_none()
    }

    async fn next_event(&mut self) -> Event {
        let config = &self.shared.config;
        let now = Instant::now();
        let (late, stalled) = (self.late_at(), self.stalled_at());
        // Both move with what other blocks get through: looked at again now and then.
        let look = now + config.put_patience.max(Duration::from_millis(1));
        let impatient = late.map(|late| late.min(look));
        let mut deadline = stalled.map_or(look, |stalled| stalled.min(look));
        if self.answer.is_some() || self.closing {
            deadline = deadline.min(self.deadline);
        }
        let leasing = async {
            match self.leasing.as_mut() {
                Some(leasing) => leasing.await,
                None => std::future::pending().await,
            }
        };
        // Every branch is cancel-safe: the puts and the lease stay in `self` and go on at the next
        // call; the sleeps are made anew.
        tokio::select! {
            Some((index, provider, result)) = self.running.next() => {
                Event::Put(index, provider, result)
            }
            lease = leasing => Event::Lease(lease),
            () = sleep_until(impatient.unwrap_or(deadline)), if impatient.is_some() => {
                Event::Patience
            }
            () = sleep_until(deadline) => Event::Deadline,
            () = self.shared.closed.cancelled(), if !self.closing => Event::Close,
        }
    }

    /// When the next try counts as slow; only until the acknowledgement.
    fn late_at(&self) -> Option<Instant> {
        let patience = self.shared.config.put_patience;
        let waits = self.started.iter().filter_map(|tries| tries.last());
        let turns = waits.filter(|one| !one.given_up).filter_map(|one| one.turn.get());
        let late = turns.map(|turn| turn.begun + turn.patience(patience)).min();
        self.answer.is_some().then_some(late).flatten()
    }

    /// When nothing of the block has got through for too long. Never while all of it waits for the
    /// line, or while the line delivers what was on it before.
    fn stalled_at(&self) -> Option<Instant> {
        let config = &self.shared.config;
        let stall = if self.answer.is_some() { config.put_stall } else { config.put_background };
        let turns = || self.started.iter().flatten().filter_map(|one| one.turn.get());
        let begun = turns().map(|turn| turn.begun).max()?;
        let held_up = turns().filter_map(Turn::held_up_until).max();
        let since = self.moved_at.max(begun);
        let stalled = held_up.map_or(since, |held_up| since.max(held_up)) + stall;
        // First all are tried elsewhere who are only too slow.
        let late = self.late_at().map(|late| late + config.put_patience);
        Some(late.map_or(stalled, |late| stalled.max(late)))
    }

    fn apply(&mut self, event: Event) -> Result<(), StoreError> {
        match event {
            Event::Put(index, provider, result) => {
                self.started[index].retain(|one| one.provider != provider);
                match result {
                    Ok(()) => self.stored(index, provider),
                    Err(failure) => self.failed(index, provider, failure)?,
                }
            }
            Event::Lease(lease) => {
                self.leasing = None;
                match lease {
                    Ok(lease) => self.placing.leased(&lease),
                    Err(_) => self.placing.no_more_leases(),
                }
                for index in std::mem::take(&mut self.waiting) {
                    self.replace(index)?;
                }
            }
            Event::Patience => self.lose_patience()?,
            Event::Deadline => self.look_at_clocks()?,
            Event::Close if self.answer.is_some() => return Err(StoreError::Closed),
            Event::Close => {
                self.closing = true;
                self.deadline = Instant::now() + CLOSE_GRACE;
            }
        }
        Ok(())
    }

    /// Ends what has been under way for too long.
    fn look_at_clocks(&mut self) -> Result<(), StoreError> {
        let now = Instant::now();
        let limited = self.answer.is_some() || self.closing;
        let over = limited && self.deadline <= now;
        if !over && self.stalled_at().is_none_or(|stalled| now < stalled) {
            return Ok(());
        }
        if self.answer.is_some() {
            return Err(self.placing.timeout());
        }
        // What is not durable now is left to repair.
        self.running.clear();
        self.leasing = None;
        Ok(())
    }

    fn stored(&mut self, index: usize, provider: ProviderId) {
        self.placing.stored(index, provider, self.answer.is_none());
        self.moved_at = Instant::now();
        self.progress.send_replace(self.placing.durable);
        if self.placing.is_acknowledged()
            && let Some(answer) = self.answer.take()
        {
            let places = (self.placing.providers.clone(), self.placing.durable);
            // The caller may be gone; the block is then garbage, and its puts end with the task.
            let _ = answer.send(Ok(places));
        }
    }

    fn failed(
        &mut self,
        index: usize,
        provider: ProviderId,
        failure: FragmentFailure,
    ) -> Result<(), StoreError> {
        let later = failure.retry() == Retry::SamePeerLater;
        self.placing.failed(index, provider, failure);
        if self.placing.durable.contains(index) || self.placing.providers[index] != provider {
            return Ok(());
        }
        if later {
            self.put(index, provider, RETRY_AFTER);
            return Ok(());
        }
        if self.answer.is_some() { self.replace(index) } else { Ok(()) }
    }

    /// Gives up the places that have been silent for too long.
    fn lose_patience(&mut self) -> Result<(), StoreError> {
        let patience = self.shared.config.put_patience;
        let now = Instant::now();
        for index in 0..self.started.len() {
            let Some(last) = self.started[index].last_mut().filter(|one| !one.given_up) else {
                continue;
            };
            let Some(turn) = last.turn.get() else { continue };
            let waited = now.saturating_duration_since(turn.begun);
            if waited < turn.patience(patience) {
                continue;
            }
            // The try itself goes on and still counts if it succeeds.
            last.given_up = true;
            turn.leave();
            let provider = last.provider;
            self.placing.slow(index, provider, waited.as_millis() as u64);
            self.replace(index)?;
        }
        Ok(())
    }

    /// Finds another place for a fragment that is not durable.
    fn replace(&mut self, index: usize) -> Result<(), StoreError> {
        if self.placing.durable.contains(index) || self.answer.is_none() {
            return Ok(());
        }
        if self.leasing.is_some() {
            self.waiting.push(index);
            return Ok(());
        }
        match self.placing.replace(index) {
            Replacement::Put(provider) => self.put(index, provider, Duration::ZERO),
            Replacement::Lease => {
                let shared = Arc::clone(&self.shared);
                let leasing = async move { shared.directory.lease_placement().await };
                self.leasing = Some(leasing.boxed());
                self.waiting.push(index);
            }
            // The puts under way may still reach the margin.
            Replacement::Nobody if !self.running.is_empty() => {}
            Replacement::Nobody => return Err(self.placing.hopeless()),
        }
        Ok(())
    }

    fn put(&mut self, index: usize, provider: ProviderId, after: Duration) {
        let turn = Arc::new(OnceLock::new());
        self.started[index].push(Try { provider, turn: Arc::clone(&turn), given_up: false });
        let shared = Arc::clone(&self.shared);
        let record = self.records[index].clone();
        let put = async move {
            if !after.is_zero() {
                tokio::time::sleep(after).await;
            }
            let begun = shared.uplink.turn(record.body.len()).await;
            let turn = turn.get_or_init(|| begun);
            let deadline = Instant::now() + PUT_MAX;
            let result = shared.transport.put(provider, record, deadline).await;
            match result {
                Ok(()) => turn.delivered(),
                Err(_) => turn.leave(),
            }
            (index, provider, result)
        };
        self.running.push(put.boxed());
    }
}
