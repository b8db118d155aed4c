//! Telling the kernel to forget, on a thread of its own: such a call can block until a request in
//! flight is answered, so it must hold up neither the runtime nor a recall for ever.

use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::oneshot;
use us_core::ids::Ino;

use super::KernelNotifier;

/// Calls that may wait; above it a recall goes on without them (the kernel forgets by itself when
/// the time it was given is over).
const CALLS_MAX: usize = 64 << 10;
/// How long a recall waits for the kernel. Longer only where a request is in flight that itself
/// waits for the lease: it is answered after the lease is returned, and the call ends then.
const PATIENCE: Duration = Duration::from_millis(100);

enum Call {
    Inode { ino: Ino, offset: i64 },
    Entry { dir: Ino, name: Box<[u8]> },
    Mark(oneshot::Sender<()>),
}

/// The queue to the thread.
#[derive(Default)]
pub(crate) struct KernelCalls {
    queue: Mutex<Option<mpsc::SyncSender<Call>>>,
}

impl KernelCalls {
    /// Starts the thread.
    pub fn start(&self, notifier: Box<dyn KernelNotifier>) {
        let (queue, calls) = mpsc::sync_channel(CALLS_MAX);
        let work = move || {
            for call in calls {
                match call {
                    Call::Inode { ino, offset } => notifier.invalidate_inode(ino, offset, 0),
                    Call::Entry { dir, name } => notifier.invalidate_entry(dir, &name),
                    // Nobody waits any more: the wait was bounded.
                    Call::Mark(done) => drop(done.send(())),
                }
            }
        };
        match thread::Builder::new().name("kernel-notify".to_owned()).spawn(work) {
            Ok(_) => *self.queue.lock() = Some(queue),
            Err(error) => tracing::error!(%error, "no thread to tell the kernel from"),
        }
    }

    /// Ends the thread once it has made its calls.
    pub fn stop(&self) {
        self.queue.lock().take();
    }

    /// Forget attributes and pages.
    pub fn forget_inode(&self, ino: Ino) {
        self.call(Call::Inode { ino, offset: 0 });
    }

    /// Forget a name.
    pub fn forget_name(&self, dir: Ino, name: Box<[u8]>) {
        self.call(Call::Entry { dir, name });
    }

    fn call(&self, call: Call) {
        if let Some(queue) = &*self.queue.lock() {
            // Full: see `CALLS_MAX`.
            let _ = queue.try_send(call);
        }
    }

    /// Waits until the calls so far are made, or the patience is over.
    pub async fn settled(&self) {
        let (done, settled) = oneshot::channel();
        if self.queue.lock().is_none() {
            return;
        }
        self.call(Call::Mark(done));
        let _ = tokio::time::timeout(PATIENCE, settled).await;
    }
}
