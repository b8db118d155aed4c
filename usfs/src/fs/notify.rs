//! Telling the kernel to forget, on threads of their own: such a call blocks until a request in
//! flight on the same inode or directory is answered, so it must hold up neither the runtime nor
//! what the kernel is to forget elsewhere.
//!
//! A job is a few inodes with their names; one thread makes its calls in order. As long as a thread
//! is blocked another takes the next job, up to [`THREADS_MAX`].

use std::collections::VecDeque;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use tokio::sync::oneshot;
use us_core::ids::Ino;

use super::KernelNotifier;

/// Threads at most; beyond it jobs wait.
const THREADS_MAX: usize = 64;
/// How long a thread without work stays.
const IDLE: Duration = Duration::from_secs(10);

/// What is to be forgotten of an inode.
#[derive(Debug)]
pub(crate) struct Forget {
    pub ino: Ino,
    /// Names in it, if it is a directory.
    pub names: Vec<Box<[u8]>>,
    /// Attributes and pages too.
    pub inode: bool,
}

impl Forget {
    /// An inode with its attributes and pages, and names in it.
    pub const fn whole(ino: Ino, names: Vec<Box<[u8]>>) -> Self {
        Self { ino, names, inode: true }
    }
}

struct Job {
    forget: Vec<Forget>,
    done: oneshot::Sender<()>,
}

/// The jobs, and the threads that do them.
#[derive(Default)]
pub(crate) struct KernelCalls {
    inner: Arc<Inner>,
}

#[derive(Default)]
struct Inner {
    queue: Mutex<Queue>,
    wake: Condvar,
}

#[derive(Default)]
struct Queue {
    notifier: Option<Arc<dyn KernelNotifier>>,
    jobs: VecDeque<Job>,
    threads: usize,
    idle: usize,
}

impl KernelCalls {
    /// From now on there is a kernel.
    pub fn start(&self, notifier: Box<dyn KernelNotifier>) {
        self.inner.queue.lock().notifier = Some(notifier.into());
    }

    /// There is no kernel any more: what was not told yet need not be.
    pub fn stop(&self) {
        let mut queue = self.inner.queue.lock();
        queue.notifier = None;
        queue.jobs.clear();
        self.inner.wake.notify_all();
    }

    /// Begins to tell the kernel; what comes back is ready once it has forgotten, or where there is
    /// no kernel.
    pub fn forget(&self, forget: Vec<Forget>) -> oneshot::Receiver<()> {
        let (done, forgotten) = oneshot::channel();
        let mut queue = self.inner.queue.lock();
        if queue.notifier.is_none() || forget.is_empty() {
            return forgotten;
        }
        queue.jobs.push_back(Job { forget, done });
        if queue.idle >= queue.jobs.len() {
            self.inner.wake.notify_one();
        } else if queue.threads < THREADS_MAX {
            let inner = Arc::clone(&self.inner);
            let thread = thread::Builder::new().name("kernel-notify".to_owned());
            match thread.spawn(move || inner.work()) {
                Ok(_) => queue.threads += 1,
                Err(error) => tracing::error!(%error, "no thread to tell the kernel from"),
            }
        }
        forgotten
    }
}

impl Inner {
    fn work(&self) {
        while let Some((notifier, job)) = self.next() {
            for Forget { ino, names, inode } in job.forget {
                names.iter().for_each(|name| notifier.invalidate_entry(ino, name));
                if inode {
                    notifier.invalidate_inode(ino, 0, 0);
                }
            }
            // Nobody waits any more: the wait was bounded.
            let _ = job.done.send(());
        }
    }

    fn next(&self) -> Option<(Arc<dyn KernelNotifier>, Job)> {
        let mut queue = self.queue.lock();
        loop {
            let notifier = queue.notifier.clone();
            if let (Some(notifier), Some(job)) = (notifier.clone(), queue.jobs.pop_front()) {
                return Some((notifier, job));
            }
            queue.idle += 1;
            let waited = self.wake.wait_for(&mut queue, IDLE);
            queue.idle -= 1;
            let over = queue.notifier.is_none() || waited.timed_out();
            if over && queue.jobs.is_empty() {
                queue.threads -= 1;
                return None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// A kernel in which a request on inode 1 is in flight until the test lets go.
    struct Kernel {
        held: Mutex<mpsc::Receiver<()>>,
        told: Arc<Mutex<Vec<(u64, usize)>>>,
    }

    impl KernelNotifier for Kernel {
        fn invalidate_inode(&self, ino: Ino, _offset: i64, _length: i64) {
            if ino == Ino(1) {
                self.held.lock().recv().unwrap();
            }
            self.told.lock().push((ino.0, usize::MAX));
        }

        fn invalidate_entry(&self, parent: Ino, name: &[u8]) {
            self.told.lock().push((parent.0, name.len()));
        }
    }

    /// One thread made all calls: behind one that was blocked by a read of half a minute every
    /// other recall gave its lease back with the kernel's caches intact.
    #[tokio::test]
    async fn a_blocked_call_holds_up_no_other() {
        let (let_go, held) = mpsc::channel();
        let told = Arc::new(Mutex::new(Vec::new()));
        let calls = KernelCalls::default();
        let forget = |ino| vec![Forget::whole(Ino(ino), vec![b"ab"[..].into()])];
        assert!(calls.forget(forget(9)).await.is_err(), "there is no kernel yet");
        calls.start(Box::new(Kernel { held: Mutex::new(held), told: Arc::clone(&told) }));
        let mut blocked = calls.forget(forget(1));
        for ino in 2..200 {
            calls.forget(forget(ino)).await.unwrap();
        }
        assert!(blocked.try_recv().is_err());
        let_go.send(()).unwrap();
        blocked.await.unwrap();
        let mut told = told.lock().clone();
        told.sort_unstable();
        let wanted = (1..200).flat_map(|ino| [(ino, 2), (ino, usize::MAX)]);
        assert_eq!(told, wanted.collect::<Vec<_>>());
        calls.stop();
    }

    /// A directory with more names than the queue was long lost the rest of them, silently.
    #[tokio::test]
    async fn every_name_of_a_large_directory_is_told() {
        let (_let_go, held) = mpsc::channel();
        let told = Arc::new(Mutex::new(Vec::new()));
        let calls = KernelCalls::default();
        calls.start(Box::new(Kernel { held: Mutex::new(held), told: Arc::clone(&told) }));
        let names = (0..100_000).map(|_| b"name"[..].into()).collect();
        calls.forget(vec![Forget::whole(Ino(2), names)]).await.unwrap();
        assert_eq!(told.lock().len(), 100_001);
        calls.stop();
    }
}
