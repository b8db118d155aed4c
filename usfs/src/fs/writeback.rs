//! Dirty data becomes blocks in the background, and at once for whoever waits.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tracing::Instrument;
use us_core::daemon::logging::RequestId;
use us_core::disk::{LateFragments, PlacementError, StoreError, StoredBlock};
use us_core::ids::{BlockId, Ino};

use super::FsError;
use super::compact::{clean, compact, pack};
use super::shared::{Shared, State};
use crate::core::{FlushReason, SealPlan, StoreFailure, Stored};
use crate::data::Ticket;
use crate::errno::whole;

/// Blocks of the background that may be on their way at once.
const BLOCKS_IN_FLIGHT_MAX: usize = 6;
/// How long storing one block may take before its bytes are dirty again, as long as something of it
/// gets through: what stands still ends much sooner (`DiskConfig::put_stall`).
const STORE_TIMEOUT: Duration = Duration::from_secs(3600);
/// How often a flush tries to get by a crowded chunk, and the pause while the background is at it.
const REWRITES_MAX: usize = 200;
const REWRITE_POLL: Duration = Duration::from_millis(5);
/// How many times longer than else space is waited for where the providers are full of what was
/// deleted: its graves and their trash are readable for two minutes.
const SPACE_PATIENCE: u32 = 8;
/// The pause before a file that somebody waits for is tried again.
const FLUSH_AGAIN: Duration = Duration::from_millis(500);
/// How long one order to clean is followed.
const CLEAN_MAX: Duration = Duration::from_secs(60);
/// The longest sleep of the background: new dirty data wakes it anyway.
const IDLE_MAX: Duration = Duration::from_secs(60);

/// The background: stores what is due until the mount stops.
pub(crate) async fn run(shared: Arc<Shared>, dirty_bytes_max: usize) {
    let slots = Arc::new(Semaphore::new(BLOCKS_IN_FLIGHT_MAX));
    let mut cleaning = shared.stop.child_token();
    loop {
        // Cancel-safe: acquiring a permit takes nothing before it is ready.
        let slot = tokio::select! {
            slot = Arc::clone(&slots).acquire_owned() => slot,
            () = shared.stop.cancelled() => return,
        };
        let Ok(slot) = slot else { return };
        let now = shared.now();
        let crowded = shared.lock().core.take_crowded(now);
        if let Some((ino, chunk)) = crowded {
            let shared_too = Arc::clone(&shared);
            shared.tasks.spawn(async move {
                if let Err(error) = compact(&shared_too, ino, chunk).await {
                    tracing::warn!(%ino, chunk, %error, "cannot write a crowded chunk anew yet");
                }
                drop(slot);
            });
            continue;
        }
        let packed = shared.lock().core.take_packed(now);
        if !packed.is_empty() {
            let shared_too = Arc::clone(&shared);
            shared.tasks.spawn(async move {
                pack(&shared_too, packed).await;
                drop(slot);
            });
            continue;
        }
        let order = shared.lock().core.take_cleaning();
        if let Some(order) = order {
            // A newer order takes the place of the rest of the older one.
            cleaning.cancel();
            cleaning = shared.stop.child_token();
            let (shared_too, ended) = (Arc::clone(&shared), cleaning.clone());
            shared.tasks.spawn(async move {
                let work = clean(&shared_too, order, dirty_bytes_max);
                // Cancel-safe: what was made dirty is whole, the rest stays where it is.
                let _ = tokio::time::timeout(CLEAN_MAX, ended.run_until_cancelled(work)).await;
            });
        }
        let (plan, due) = {
            let mut state = shared.lock();
            let pressure = state.core.uncommitted_bytes() > dirty_bytes_max as u64 / 2;
            let core = &state.core;
            let due = [core.next_block_at(), core.next_crowded_at(), core.next_packed_at()];
            (state.core.next_block(now, pressure), due.into_iter().flatten().min())
        };
        if let Some(plan) = plan {
            let shared_too = Arc::clone(&shared);
            // The bytes of many requests: a request of its own.
            let request = RequestId::next();
            let span = tracing::debug_span!("background", %request);
            let storing = async move {
                store(&shared_too, plan).await;
                drop(slot);
            };
            shared.tasks.spawn(request.scope(storing).instrument(span));
            continue;
        }
        drop(slot);
        let sleep = due.map_or(IDLE_MAX, |due| due.saturating_sub(now.boot));
        let sleep = sleep.clamp(Duration::from_millis(5), IDLE_MAX);
        // Cancel-safe: a notification that comes while nobody waits is kept.
        tokio::select! {
            () = shared.dirty.notified() => {}
            () = tokio::time::sleep(sleep) => {}
            () = shared.stop.cancelled() => return,
        }
    }
}

/// Stores all that is dirty, packed across files as in the background: an unmount leaves no small files in
/// blocks of their own. What cannot be stored stays dirty.
pub(crate) async fn store_all(shared: &Arc<Shared>) {
    let plans = futures::stream::iter(std::iter::from_fn(|| {
        let now = shared.now();
        shared.lock().core.next_block(now, true)
    }));
    plans.for_each_concurrent(BLOCKS_IN_FLIGHT_MAX, |plan| store(shared, plan)).await;
}

/// Stores one block and tells the core.
async fn store(shared: &Arc<Shared>, plan: SealPlan) {
    let SealPlan { ticket, pieces, inline } = plan;
    let plaintext = pieces.clone();
    let result = if inline {
        let sealed = shared.disk.seal_inline(&pieces);
        sealed.map(|block| (Stored { commit: block.to_commit(), info: block.info }, None))
    } else {
        let deadline = Instant::now() + STORE_TIMEOUT;
        shared.disk.store(pieces, deadline).await.map(|block| {
            let stored = Stored { commit: block.to_commit(), info: block.info.clone() };
            (stored, Some(block))
        })
    };
    let (result, block) = match result {
        Ok((stored, block)) => {
            let request = RequestId::current();
            tracing::debug!(%request, block = %stored.info.id, inline, "stored a block");
            (Ok(stored), block)
        }
        Err(error) => {
            let error_text = whole(&error);
            // Once for all that fails until something is stored again.
            if shared.lock().core.is_storing_troubled() {
                tracing::debug!(error = error_text, "a block could not be stored again");
            } else {
                tracing::warn!(
                    error = error_text,
                    "a block could not be stored; its bytes stay dirty and are tried again"
                );
            }
            let patience = shared.store_patience * patience(&error);
            (Err(StoreFailure { error: write_error(&error), patience }), None)
        }
    };
    let now = shared.now();
    {
        let mut state = shared.lock();
        let stored = result.as_ref().ok().map(|stored| stored.info.id);
        state.core.finish_ticket(now, ticket, result);
        state.note_request();
        let State { core, undurable, .. } = &mut *state;
        if let Some(block) = stored {
            undurable.keep(core, block, ticket, plaintext);
        }
        state.advance_undurable();
        shared.fit_cache(&state);
    }
    shared.outgoing.notify_one();
    shared.dirty.notify_one();
    shared.signal();
    if let Some(StoredBlock { info, late, .. }) = block {
        let fragments = info.geometry.code().fragments();
        if info.durable.count() < fragments {
            let shared_too = Arc::clone(shared);
            shared.settling.spawn(async move {
                report_late(&shared_too, info.id, fragments, late).await;
            });
        }
    }
}

/// Tells the directory of fragments that became durable after the block was acknowledged.
async fn report_late(shared: &Shared, block: BlockId, fragments: usize, mut late: LateFragments) {
    let mut durable = None;
    // Cancel-safe: `next` is, and losing a report only leaves the directory to find out itself.
    while let Some(bits) = tokio::select! {
        bits = late.next() => bits,
        () = shared.stop.cancelled() => None,
    } {
        durable = Some(bits);
        if bits.count() == fragments {
            break;
        }
    }
    if let Some(bits) = durable {
        shared.lock().core.fragments_durable(block, bits.to_bytes(fragments));
        shared.outgoing.notify_one();
    }
}

/// Why a file is not flushed.
enum NotFlushed {
    /// It is tried again, and nobody was told yet.
    Retried(FsError),
    Failed(FsError),
}

impl From<FsError> for NotFlushed {
    fn from(error: FsError) -> Self {
        Self::Failed(error)
    }
}

/// Stores all that is dirty in `ino`, and returns when that, and what was in flight, is committed in
/// the log (which says nothing of its durability). What may pass is waited for.
///
/// # Errors
/// Why it cannot be stored.
pub(crate) async fn flush_patiently(
    shared: &Arc<Shared>,
    ino: Ino,
    reason: FlushReason,
) -> Result<(), FsError> {
    // However much of it is stored meanwhile: a file may be written faster than that.
    let deadline = Instant::now() + shared.store_patience * SPACE_PATIENCE;
    loop {
        match flush_and_tidy(shared, ino, reason).await {
            Ok(()) => return Ok(()),
            Err(NotFlushed::Failed(error)) => return Err(error),
            Err(NotFlushed::Retried(error)) if Instant::now() >= deadline => return Err(error),
            Err(NotFlushed::Retried(_)) => {
                tokio::time::sleep(FLUSH_AGAIN.min(shared.store_patience)).await;
            }
        }
    }
}

/// [`flush_patiently`] for those who wait elsewhere.
///
/// # Errors
/// Why it was not stored, this time.
pub(crate) async fn flush_file(
    shared: &Arc<Shared>,
    ino: Ino,
    reason: FlushReason,
) -> Result<(), FsError> {
    let flushed = flush_and_tidy(shared, ino, reason).await;
    flushed.map_err(|(NotFlushed::Retried(error) | NotFlushed::Failed(error))| error)
}

async fn flush_and_tidy(
    shared: &Arc<Shared>,
    ino: Ino,
    reason: FlushReason,
) -> Result<(), NotFlushed> {
    // Bytes whose commit would have overfilled a chunk are stored when the chunk is written anew.
    for _ in 0..REWRITES_MAX {
        let before = flush_once(shared, ino, reason).await?;
        let (postponed, crowded) = {
            let mut state = shared.lock();
            let postponed = state.core.postponed(ino) != before;
            (postponed, postponed.then(|| state.core.take_crowded_of(ino)).flatten())
        };
        match (postponed, crowded) {
            (false, _) => return Ok(()),
            (true, Some(chunk)) => compact(shared, ino, chunk).await?,
            // The background is at it.
            (true, None) => tokio::time::sleep(REWRITE_POLL).await,
        }
    }
    Err(FsError::Io("the map of the file could not be tidied up".to_owned()).into())
}

/// Answers how often bytes of the file had been postponed when they were sealed.
async fn flush_once(
    shared: &Arc<Shared>,
    ino: Ino,
    reason: FlushReason,
) -> Result<u64, NotFlushed> {
    let mut progress = shared.progress.subscribe();
    let now = shared.now();
    let (before, aborts, plans, tickets) = {
        let mut state = shared.lock();
        let (before, aborts) = (state.core.postponed(ino), state.core.aborts(ino));
        let plans = state.core.seal_file(now, ino, reason);
        (before, aborts, plans, state.core.open_tickets(ino))
    };
    for plan in plans {
        if plan.inline {
            // Nothing in it waits.
            store(shared, plan).await;
        } else {
            let shared_too = Arc::clone(shared);
            let storing = async move { store(&shared_too, plan).await };
            shared.tasks.spawn(RequestId::carried(storing));
        }
    }
    wait_tickets(shared, &tickets, &mut progress).await?;
    let core = &shared.lock().core;
    match (core.storing_fails(ino), core.storing_retries(ino)) {
        (Some(error), _) => Err(NotFlushed::Failed(error)),
        (None, Some(error)) => Err(NotFlushed::Retried(error)),
        // Stored by the background meanwhile, or not of this flush.
        (None, None) if core.aborts(ino) == aborts => Ok(before),
        (None, None) => Err(NotFlushed::Retried(FsError::Io("tried again".to_owned()))),
    }
}

async fn wait_tickets(
    shared: &Shared,
    tickets: &HashSet<Ticket>,
    progress: &mut tokio::sync::watch::Receiver<u64>,
) -> Result<(), FsError> {
    loop {
        {
            let state = shared.lock();
            if let Some(why) = state.core.ended() {
                return Err(FsError::SessionEnded(why.to_owned()));
            }
            if !state.core.any_open(tickets) {
                return Ok(());
            }
        }
        if progress.changed().await.is_err() {
            return Err(FsError::ShuttingDown);
        }
    }
}

/// For how long this is only tried again, in times of the mount's patience.
fn patience(error: &StoreError) -> u32 {
    match error {
        StoreError::Placement(PlacementError::SpaceComes { .. }) => SPACE_PATIENCE,
        // A later try finds others, or asks the directory, which says whether there will be space.
        StoreError::NoSpace { .. }
        | StoreError::Placement(
            PlacementError::TooFewProviders { .. } | PlacementError::Unavailable { .. },
        )
        | StoreError::TooFewProviders { .. }
        | StoreError::Timeout { .. } => 1,
        StoreError::Placement(PlacementError::NoSpace { .. } | PlacementError::Ended { .. })
        | StoreError::Geometry(_)
        | StoreError::InlineBytes { .. }
        | StoreError::Closed => 0,
    }
}

fn write_error(error: &StoreError) -> FsError {
    match error {
        StoreError::Placement(
            PlacementError::NoSpace { .. } | PlacementError::SpaceComes { .. },
        )
        | StoreError::NoSpace { .. } => FsError::NoSpace(whole(error)),
        StoreError::Placement(PlacementError::Ended { detail }) => {
            FsError::SessionEnded(detail.clone())
        }
        StoreError::Placement(
            PlacementError::TooFewProviders { .. } | PlacementError::Unavailable { .. },
        )
        | StoreError::Geometry(_)
        | StoreError::InlineBytes { .. }
        | StoreError::TooFewProviders { .. }
        | StoreError::Timeout { .. }
        | StoreError::Closed => FsError::Io(whole(error)),
    }
}
