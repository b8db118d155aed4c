//! Answering recalls: another mount wants what this one holds.
//!
//! Each recall is a task of its own. It stops new changes, flushes, lets the kernel forget, and
//! returns the lease behind everything in the log; it holds no lock while it waits and needs no
//! other lease. One that cannot flush waits for the swarm and keeps nobody else waiting.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout};
use us_core::ids::Ino;

use super::notify::Forget;
use super::shared::Shared;
use super::writeback::flush_file;
use crate::core::node::Level;
use crate::core::{FinishedRecall, FlushReason, Recall};

/// Recalls under way at once; further ones wait in the core.
const RECALLS_AT_ONCE: usize = 4096;
/// Recalls that flush at once, and those that let the kernel forget.
const FLUSHES_AT_ONCE: usize = 64;
const FORGETTING_AT_ONCE: usize = 64;
/// How often a pinned lease is looked at.
const PIN_POLL: Duration = Duration::from_millis(2);
/// How long the kernel may take to forget while an operation on the same inode waits for the
/// directory: it may hold what the kernel waits for, and wait for this very lease.
const PATIENCE: Duration = Duration::from_millis(100);
/// The same while an operation on anything waits.
const PATIENCE_STUCK: Duration = Duration::from_secs(1);
/// The same while only reads are in flight, which end by themselves.
const PATIENCE_MAX: Duration = Duration::from_secs(30);
/// The pause before a flush that failed is tried again.
const FLUSH_RETRY: Duration = Duration::from_millis(500);

/// What the recalls of a mount share: how many may do what at once.
struct Slots {
    flushing: Semaphore,
    forgetting: Semaphore,
}

/// Answers recalls until the mount stops.
pub(crate) async fn run(shared: Arc<Shared>) {
    let at_once = Arc::new(Semaphore::new(RECALLS_AT_ONCE));
    let slots = Arc::new(Slots {
        flushing: Semaphore::new(FLUSHES_AT_ONCE),
        forgetting: Semaphore::new(FORGETTING_AT_ONCE),
    });
    loop {
        // Cancel-safe: a permit is given back where it is dropped.
        let permit = tokio::select! {
            permit = Arc::clone(&at_once).acquire_owned() => permit,
            () = shared.stop.cancelled() => return,
        };
        let Ok(permit) = permit else { return };
        let next = shared.lock().core.take_recall();
        let Some(recall) = next else {
            // Cancel-safe: a notification that comes while nobody waits is kept.
            tokio::select! {
                () = shared.recalled.notified() => {}
                () = shared.stop.cancelled() => return,
            }
            continue;
        };
        let (shared_too, slots) = (Arc::clone(&shared), Arc::clone(&slots));
        shared.tasks.spawn(async move {
            // Cancel-safe: a mount that stops returns all leases by closing its session.
            tokio::select! {
                () = answer(&shared_too, &slots, recall) => {}
                () = shared_too.stop.cancelled() => {}
            }
            drop(permit);
        });
    }
}

async fn answer(shared: &Arc<Shared>, slots: &Slots, recall: Recall) {
    let Recall { ino, keep, .. } = recall;
    loop {
        let now = shared.now();
        let begun = shared.lock().core.begin_recall(now, recall);
        match begun {
            FinishedRecall::Pinned => tokio::time::sleep(PIN_POLL).await,
            FinishedRecall::Dirty => flush(shared, slots, ino).await,
            FinishedRecall::Returned => {
                if keep == Level::None {
                    let Ok(_slot) = slots.forgetting.acquire().await else { return };
                    forget_in_kernel(shared, ino).await;
                }
                if shared.lock().core.finish_recall(recall) == FinishedRecall::Returned {
                    break;
                }
            }
        }
        if shared.lock().core.ended().is_some() {
            return;
        }
    }
    shared.outgoing.notify_one();
    if keep == Level::None {
        // What was read while the kernel forgot.
        drop(shared.kernel.forget(vec![Forget::whole(ino, Vec::new())]));
    }
}

/// Flushes a file for another mount; where that fails the slot is free while it waits.
async fn flush(shared: &Arc<Shared>, slots: &Slots, ino: Ino) {
    let Ok(slot) = slots.flushing.acquire().await else { return };
    if let Err(error) = flush_file(shared, ino, FlushReason::Commit).await {
        tracing::warn!(%ino, %error, "cannot flush for another mount; trying again");
        drop(slot);
        tokio::time::sleep(FLUSH_RETRY).await;
    }
}

/// Waits until the kernel has forgotten the inode and its names. A call that is blocked by a request
/// of this mount which needs the lease's return is not waited for: it ends soon after.
async fn forget_in_kernel(shared: &Shared, ino: Ino) {
    let (names, before) = {
        let state = shared.lock();
        (state.core.cached_names(ino), state.core.unanswered())
    };
    let mut forgotten = shared.kernel.forget(vec![Forget::whole(ino, names)]);
    let begun = Instant::now();
    while timeout(PATIENCE, &mut forgotten).await.is_err() {
        let now = shared.lock().core.unanswered();
        let mut stuck = before.iter().filter(|request| now.contains(request)).peekable();
        let waited = begun.elapsed();
        let anything = stuck.peek().is_some();
        let give_up = stuck.any(|(_, about)| *about == ino)
            || (anything && waited >= PATIENCE_STUCK)
            || waited >= PATIENCE_MAX;
        if give_up {
            tracing::debug!(%ino, ?waited, "the kernel forgets once its request is answered");
            return;
        }
    }
}
