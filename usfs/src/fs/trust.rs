//! When leases can no longer be believed, neither can what the kernel made of them.
//!
//! The kernel serves attributes and names for the time it was given, and pages of open files and
//! mappings without any limit. So when the directory has not answered for a lease, and when the
//! session is over, the kernel is told to forget everything: then it asks, and the answer is the
//! mount's, which waits or fails. A suspend is such a silence too.

use std::sync::Arc;
use std::time::Duration;

use us_core::ids::Ino;

use super::notify::Forget;
use super::shared::Shared;

/// How often is looked: sleeping does not count while the machine is suspended, leases do.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// The shortest sleep.
const LOOK_AGAIN: Duration = Duration::from_millis(5);
/// Inodes in one job.
const JOB_INODES: usize = 512;

/// Watches the session's trust until the mount stops.
pub(crate) async fn run(shared: Arc<Shared>) {
    let mut progress = shared.progress.subscribe();
    let mut forgotten = false;
    loop {
        let now = shared.now().boot;
        let (ended, trusted_until) = {
            let state = shared.lock();
            (state.core.ended().is_some(), state.core.trusted_until())
        };
        let lost = ended || now >= trusted_until;
        if lost && !forgotten {
            tracing::warn!(ended, "leases cannot be believed; the kernel forgets what it cached");
            forget_all(&shared);
        }
        forgotten = lost;
        if ended {
            return;
        }
        let left = trusted_until.saturating_sub(now);
        let sleep = if lost { LOOK_EVERY } else { left.clamp(LOOK_AGAIN, LOOK_EVERY) };
        // Cancel-safe: all only wait.
        tokio::select! {
            () = tokio::time::sleep(sleep) => {}
            _ = progress.changed() => {}
            () = shared.stop.cancelled() => return,
        }
    }
}

fn forget_all(shared: &Shared) {
    let known = shared.lock().core.known_to_kernel();
    for some in known.chunks(JOB_INODES) {
        let forget = {
            let state = shared.lock();
            let forget = |ino: &Ino| Forget::whole(*ino, state.core.cached_names(*ino));
            some.iter().map(forget).collect()
        };
        // Nobody waits for it: operations fail or wait already.
        drop(shared.kernel.forget(forget));
    }
}
