//! Copies of the directory's journal: sealed records this provider keeps for it, and what it gives
//! back to a directory that has lost its disk.
//!
//! ```text
//! link --StoreRecords, StoreRoot--> queue --> thread: append, one fdatasync for what came together,
//!                                             acknowledge; a root lets older files go
//! ```
//! The thread has files of its own and a queue of its own: fragments never wait for it, nor it for
//! them. What it keeps is bounded ([`RecordLog`]); above the bound it refuses, and the directory
//! chooses another provider.

pub mod format;
mod log;

use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;

use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};
use us_proto::v1::provider_up::Event as Up;
use us_proto::v1::{ProviderUp, RecordsHeld, RecordsStored, RootStored, StoreRecords, StoreRoot};

use crate::membership::MembershipFiles;
pub use log::{LogError, Reading, RecordLog};

/// Messages that wait for the thread; the directory has 4 MiB on their way at most.
const QUEUE_MAX: usize = 64;
/// Messages written before they are synced together.
const GROUP_MAX: usize = 64;

type Outbox = mpsc::Sender<ProviderUp>;

enum Job {
    Records(StoreRecords, Outbox),
    Root(StoreRoot, Outbox),
    Held(oneshot::Sender<Held>),
}

/// What is kept, for the hello.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Held {
    /// The number of the root; 0: none.
    pub root_sequence: u64,
    /// Records of the newest run.
    pub records: Option<RecordsHeld>,
}

/// The thread that keeps copies. Clones share it; it ends with the last.
#[derive(Clone, Debug)]
pub struct Copies {
    jobs: mpsc::Sender<Job>,
    thread: Arc<Mutex<Option<JoinHandle<()>>>>,
}

impl Copies {
    /// Opens what is kept in the data folder `data` and starts the thread. Blocks.
    ///
    /// # Errors
    /// [`LogError`] when the disk fails.
    pub fn start(data: &Path, limit_bytes: u64) -> Result<Self, LogError> {
        let log = RecordLog::open(&log::dir_of(data), limit_bytes)?;
        let keeper = Keeper { log, files: MembershipFiles::new(data) };
        let (jobs, queue) = mpsc::channel(QUEUE_MAX);
        let thread = std::thread::Builder::new()
            .name("copies".into())
            .spawn(move || keeper.run(queue))
            .map_err(|source| LogError::io("start the thread of", data, source))?;
        Ok(Self { jobs, thread: Arc::new(Mutex::new(Some(thread))) })
    }

    /// Keeps records and acknowledges them on `outbox` when they are durable. Waits while the queue
    /// is full.
    pub async fn keep_records(&self, records: StoreRecords, outbox: Outbox) {
        let _ended = self.jobs.send(Job::Records(records, outbox)).await;
    }

    /// Keeps a root, acknowledges it, and lets go of records it makes needless.
    pub async fn keep_root(&self, root: StoreRoot, outbox: Outbox) {
        let _ended = self.jobs.send(Job::Root(root, outbox)).await;
    }

    /// What is kept, behind everything asked for before.
    pub async fn held(&self) -> Held {
        let (answer, answered) = oneshot::channel();
        let _ended = self.jobs.send(Job::Held(answer)).await;
        answered.await.unwrap_or_default()
    }

    /// Ends the thread when the queue is empty and no other clone is left. Blocks.
    pub fn close(self) {
        let Self { jobs, thread } = self;
        drop(jobs);
        if Arc::strong_count(&thread) == 1
            && let Some(thread) = thread.lock().take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that keeps the directory's copies had panicked");
        }
    }
}

struct Keeper {
    log: RecordLog,
    files: MembershipFiles,
}

impl Keeper {
    fn run(mut self, mut queue: mpsc::Receiver<Job>) {
        while let Some(first) = queue.blocking_recv() {
            let mut acks: Vec<(RecordsStored, Outbox)> = Vec::new();
            let mut next = Some(first);
            let mut taken = 0;
            while let Some(job) = next {
                taken += 1;
                match job {
                    Job::Records(records, outbox) => acks.push((self.append(&records), outbox)),
                    Job::Root(root, outbox) => {
                        self.acknowledge(&mut acks);
                        self.keep_root(&root, &outbox);
                    }
                    Job::Held(answer) => {
                        self.acknowledge(&mut acks);
                        let _gone = answer.send(self.held());
                    }
                }
                next = if taken < GROUP_MAX { queue.try_recv().ok() } else { None };
            }
            self.acknowledge(&mut acks);
        }
    }

    fn append(&mut self, records: &StoreRecords) -> RecordsStored {
        let (incarnation, run) = (records.incarnation, records.run);
        match self.log.append(records) {
            Ok(seq) => RecordsStored { incarnation, run, seq, error: String::new() },
            Err(error) => RecordsStored { incarnation, run, seq: 0, error: error.to_string() },
        }
    }

    /// Makes what was appended durable and says so; of answers to one stream the last says all.
    fn acknowledge(&mut self, acks: &mut Vec<(RecordsStored, Outbox)>) {
        if acks.is_empty() {
            return;
        }
        let synced = self.log.sync();
        let mut last: Option<(RecordsStored, Outbox)> = None;
        for (mut ack, outbox) in acks.drain(..) {
            if let Err(error) = &synced {
                ack.error = error.to_string();
            }
            if !ack.error.is_empty() {
                tracing::error!(error = %ack.error, "a copy of the directory's journal is refused");
            }
            match &mut last {
                Some((kept, at))
                    if kept.run == ack.run && kept.error.is_empty() && at.same_channel(&outbox) =>
                {
                    *kept = ack;
                }
                _ => {
                    if let Some((kept, at)) = last.replace((ack, outbox)) {
                        send(&at, Up::RecordsStored(kept));
                    }
                }
            }
        }
        if let Some((kept, at)) = last {
            send(&at, Up::RecordsStored(kept));
        }
        self.log.drop_superseded();
    }

    fn keep_root(&mut self, root: &StoreRoot, outbox: &Outbox) {
        let sequence = root.sequence;
        match self.files.keep_root(sequence, &root.root) {
            Ok(()) => {
                send(outbox, Up::RootStored(RootStored { sequence }));
                self.log.drop_covered(root);
            }
            Err(error) => {
                tracing::error!(%error, sequence, "the directory's root is not kept");
            }
        }
    }

    fn held(&self) -> Held {
        let root_sequence = match self.files.load_root() {
            Ok(root) => root.map_or(0, |(sequence, _)| sequence),
            Err(error) => {
                tracing::warn!(%error, "the directory will send its root again");
                0
            }
        };
        Held { root_sequence, records: self.log.held() }
    }
}

/// A stream that has ended hears nothing; the next begins with a hello.
fn send(outbox: &Outbox, event: Up) {
    let _ended = outbox.blocking_send(ProviderUp { event: Some(event) });
}
