//! Answering recalls: another mount wants what this one holds.
//!
//! Each recall is a task of its own. It stops new changes, flushes, lets the kernel forget, and
//! returns the lease behind everything in the log; it holds no lock while it waits and needs no
//! other lease.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc};
use tokio::time::{Instant, timeout};
use us_core::ids::Ino;

use super::notify::Forget;
use super::shared::Shared;
use super::writeback::flush_file;
use crate::core::node::Level;
use crate::core::{FinishedRecall, FlushReason, Recall};

/// Recalls answered at once.
const RECALLS_AT_ONCE: usize = 64;
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

/// Answers recalls until the mount stops.
pub(crate) async fn run(shared: Arc<Shared>, mut recalls: mpsc::Receiver<Recall>) {
    let slots = Arc::new(Semaphore::new(RECALLS_AT_ONCE));
    loop {
        // Cancel-safe: `recv` takes nothing before it is ready.
        let recall = tokio::select! {
            recall = recalls.recv() => recall,
            () = shared.stop.cancelled() => return,
        };
        let Some(recall) = recall else { return };
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        let shared_too = Arc::clone(&shared);
        shared.tasks.spawn(async move {
            // Cancel-safe: a mount that stops returns all leases by closing its session.
            tokio::select! {
                () = answer(&shared_too, recall) => {}
                () = shared_too.stop.cancelled() => {}
            }
            drop(slot);
        });
    }
}

async fn answer(shared: &Arc<Shared>, recall: Recall) {
    let Recall { ino, keep, .. } = recall;
    loop {
        let now = shared.now();
        let begun = shared.lock().core.begin_recall(now, recall);
        match begun {
            FinishedRecall::Pinned => tokio::time::sleep(PIN_POLL).await,
            FinishedRecall::Dirty => {
                if let Err(error) = flush_file(shared, ino, FlushReason::Commit).await {
                    tracing::warn!(%ino, %error, "cannot flush for another mount; trying again");
                    tokio::time::sleep(FLUSH_RETRY).await;
                }
            }
            FinishedRecall::Returned => {
                if keep == Level::None {
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
        drop(shared.kernel.forget(vec![Forget { ino, names: Vec::new() }]));
    }
}

/// Waits until the kernel has forgotten the inode and its names. A call that is blocked by a request
/// of this mount which needs the lease's return is not waited for: it ends soon after.
async fn forget_in_kernel(shared: &Shared, ino: Ino) {
    let (names, before) = {
        let state = shared.lock();
        (state.core.cached_names(ino), state.core.unanswered())
    };
    let mut forgotten = shared.kernel.forget(vec![Forget { ino, names }]);
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
