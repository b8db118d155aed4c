//! What the operations and the background tasks of one mount share: the core behind its lock, who
//! waits for which answer, and the signals between tasks.
//!
//! The lock is short and never held across an await. Signals are levels, not events: whoever waits
//! subscribes first and looks again after each signal.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::{Notify, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use us_core::daemon::logging::RequestId;
use us_core::disk::VirtualDisk;
use us_core::ids::SessionId;
use us_proto::v1;
use us_proto::v1::session_down::Event as Down;
use us_proto::v1::session_up::Event as Up;

use super::blocks::Blocks;
use super::locks::LockOwners;
use super::notify::KernelCalls;
use super::undurable::UndurableBlocks;
use super::{FsError, SwarmNews};
use crate::attributes::FileTime;
use crate::core::locks::{LockEvent, LockOutcome, Locked};
use crate::core::{Core, Effect, Now};
use crate::session::SessionError;
use crate::session::log::LogPosition;
use crate::session::stream::{OpenStream, margin};

/// How an answered request ended.
#[derive(Clone, Debug)]
pub(crate) enum Answer {
    /// It is in the cache.
    Done(Result<(), FsError>),
    /// Another mount did not give its lease back in time.
    Contended,
}

/// The core and those who wait for it: one lock.
pub(crate) struct State {
    pub core: Core,
    waiters: HashMap<u64, Vec<oneshot::Sender<Answer>>>,
    replies: HashMap<u64, oneshot::Sender<Down>>,
    pub lock_owners: LockOwners,
    lock_waiters: HashMap<u64, oneshot::Sender<LockOutcome>>,
    /// The session will look at the log soon: only what is urgent need wake it.
    pub gathering: bool,
    /// The plaintext of blocks whose commit is not durable.
    pub undurable: UndurableBlocks,
}

/// The memory for data that is not written yet, as far as it is free, keeps pages that were read. It is
/// given and taken in steps: a write shrinks the cache before it has taken the step's bytes.
struct CacheShare {
    /// What the cache always has.
    least_bytes: u64,
    /// What unwritten data may take.
    dirty_bytes_max: u64,
    /// Steps that the cache has beyond the least.
    steps: AtomicU64,
}

/// A step of a [`CacheShare`].
const CACHE_STEP_BYTES: u64 = 8 << 20;

impl CacheShare {
    fn new(disk: &VirtualDisk, dirty_bytes_max: usize) -> Self {
        let share = Self {
            least_bytes: disk.cache_bytes(),
            dirty_bytes_max: dirty_bytes_max as u64,
            steps: AtomicU64::new(0),
        };
        share.fit(disk, 0);
        share
    }

    /// `held_bytes` of the memory for unwritten data are taken. One step more stays free.
    fn fit(&self, disk: &VirtualDisk, held_bytes: u64) {
        let free = self.dirty_bytes_max.saturating_sub(held_bytes);
        let steps = (free / CACHE_STEP_BYTES).saturating_sub(1);
        if self.steps.swap(steps, Ordering::Relaxed) != steps {
            disk.set_cache_bytes(self.least_bytes + steps * CACHE_STEP_BYTES);
        }
    }
}

/// One mount.
pub(crate) struct Shared {
    state: Mutex<State>,
    /// Something may be there to send.
    pub outgoing: Notify,
    /// Something changed that operations wait for: trust, inode numbers, space, the log.
    pub progress: watch::Sender<u64>,
    /// How far the log is durable.
    pub durable: watch::Sender<LogPosition>,
    /// A block may be due.
    pub dirty: Notify,
    /// A recall waits in the core.
    pub recalled: Notify,
    pub kernel: KernelCalls,
    pub disk: VirtualDisk,
    /// What the disk keeps of pages it read.
    cache: CacheShare,
    pub blocks: Arc<Blocks>,
    pub swarm: Arc<dyn SwarmNews>,
    pub tasks: TaskTracker,
    /// Tasks that report late fragments.
    pub settling: TaskTracker,
    pub stop: CancellationToken,
    /// It is being unmounted: nothing is begun that need not be.
    pub closing: AtomicBool,
    pub rescue_dir: PathBuf,
    pub volume_name: String,
    pub session: SessionId,
    /// How long an unmount waits while nothing more becomes durable.
    pub flush_patience: Duration,
    /// How long data that cannot be stored is only tried again.
    pub store_patience: Duration,
}

/// What a mount is made of.
pub(crate) struct Parts {
    pub core: Core,
    pub disk: VirtualDisk,
    pub blocks: Arc<Blocks>,
    pub swarm: Arc<dyn SwarmNews>,
    pub rescue_dir: PathBuf,
    pub volume_name: String,
    pub session: SessionId,
    pub dirty_bytes_max: usize,
    pub flush_patience: Duration,
    /// How long data that cannot be stored is only tried again.
    pub store_patience: Duration,
}

impl Shared {
    pub fn new(parts: Parts) -> Self {
        let state = State {
            core: parts.core,
            waiters: HashMap::new(),
            replies: HashMap::new(),
            lock_owners: LockOwners::default(),
            lock_waiters: HashMap::new(),
            gathering: false,
            undurable: UndurableBlocks::new(parts.dirty_bytes_max),
        };
        Self {
            state: Mutex::new(state),
            outgoing: Notify::new(),
            progress: watch::Sender::new(0),
            durable: watch::Sender::new(LogPosition(0)),
            dirty: Notify::new(),
            recalled: Notify::new(),
            kernel: KernelCalls::default(),
            cache: CacheShare::new(&parts.disk, parts.dirty_bytes_max),
            disk: parts.disk,
            blocks: parts.blocks,
            swarm: parts.swarm,
            tasks: TaskTracker::new(),
            settling: TaskTracker::new(),
            stop: CancellationToken::new(),
            closing: AtomicBool::new(false),
            rescue_dir: parts.rescue_dir,
            volume_name: parts.volume_name,
            session: parts.session,
            flush_patience: parts.flush_patience,
            store_patience: parts.store_patience,
        }
    }

    pub fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    /// Both clocks, now.
    pub fn now(&self) -> Now {
        now()
    }

    /// Wakes whoever waits for anything but an answer.
    pub fn signal(&self) {
        self.progress.send_modify(|changes| *changes = changes.wrapping_add(1));
    }

    /// Gives the memory that unwritten data leaves free to the pages that were read.
    pub fn fit_cache(&self, state: &State) {
        self.cache.fit(&self.disk, state.core.uncommitted_bytes() + state.undurable.bytes());
    }

    /// Asks the directory something that only the caller understands.
    pub async fn ask(
        &self,
        make: impl FnOnce(u64) -> Up,
        timeout: Duration,
    ) -> Result<Down, FsError> {
        let (number, answer) = {
            let mut state = self.lock();
            if let Some(why) = state.core.ended() {
                return Err(FsError::SessionEnded(why.to_owned()));
            }
            let number = state.core.request_number();
            let (sender, answer) = oneshot::channel();
            state.replies.insert(number, sender);
            let event = make(number);
            state.core.send(event);
            (number, answer)
        };
        self.outgoing.notify_one();
        let answer = tokio::time::timeout(timeout, answer).await;
        self.lock().replies.remove(&number);
        match answer {
            Ok(Ok(down)) => Ok(down),
            Ok(Err(_)) => Err(FsError::TimedOut("the connection with the directory broke".into())),
            Err(_) => Err(FsError::TimedOut("the directory did not answer".into())),
        }
    }

    /// Takes a message in.
    pub fn on_down(&self, event: Down) {
        let now = self.now();
        let effect = {
            let mut state = self.lock();
            let effect = state.core.on_down(now, event);
            match &effect {
                Some(Effect::Answered(number, result)) => {
                    state.answer(*number, &Answer::Done(result.clone()));
                }
                Some(Effect::Contended(number)) => state.answer(*number, &Answer::Contended),
                Some(Effect::Durable(_)) => {
                    state.advance_undurable();
                    self.fit_cache(&state);
                }
                Some(Effect::Locked(locked)) => state.tell_locked(locked),
                _ => {}
            }
            effect
        };
        match effect {
            None | Some(Effect::Locked(_)) => self.outgoing.notify_one(),
            Some(Effect::Answered(..) | Effect::Contended(_)) => {}
            Some(Effect::Cleaning) => self.dirty.notify_one(),
            Some(Effect::Recalled) => self.recalled.notify_one(),
            Some(Effect::Durable(position)) => {
                self.durable.send_replace(position);
                self.signal();
            }
            Some(Effect::Inodes) => self.signal(),
            Some(Effect::Ended(why)) => tracing::error!(why, "the session ended"),
            Some(Effect::Other(event)) => self.on_other(event),
        }
    }

    fn on_other(&self, event: Down) {
        let number = match &event {
            Down::Placements(placements) => placements.request,
            Down::Statfs(statfs) => statfs.request,
            Down::Fetched(fetched) => fetched.request,
            Down::Providers(table) => return self.swarm.on_providers(table),
            other => return tracing::debug!(?other, "a message nobody waits for"),
        };
        if let Some(reply) = self.lock().replies.remove(&number) {
            // Whoever asked may have gone; then nobody misses the answer.
            let _ = reply.send(event);
        }
    }

    /// Registers for the answer to a want of the core.
    pub fn wait_for(&self, want: &crate::core::Want) -> oneshot::Receiver<Answer> {
        let (sender, answer) = oneshot::channel();
        let request = RequestId::current();
        let number = {
            let mut state = self.lock();
            let number = state.core.request(want, request);
            state.waiters.entry(number).or_default().push(sender);
            number
        };
        tracing::debug!(%request, number, ?want, "asks the directory");
        self.outgoing.notify_one();
        answer
    }

    /// Leases are believed until `until`.
    pub fn trust_until(&self, until: Duration) {
        self.lock().core.trust_until(until);
        self.signal();
    }

    /// A fresh grant for providers.
    pub fn new_grant(&self, grant: &bytes::Bytes) {
        if !grant.is_empty() {
            self.swarm.on_grant(grant);
        }
    }

    /// Waits until providers refuse the present grant.
    pub async fn grant_wanted(&self) {
        self.swarm.grant_wanted().await;
    }

    /// The stream broke.
    pub fn disconnected(&self) {
        let mut state = self.lock();
        state.core.log().pause();
        state.replies.clear();
    }

    /// A new stream of the same session: what to reclaim on it.
    pub fn resume(&self, stream: OpenStream) -> Result<(OpenStream, Vec<Up>), SessionError> {
        let opened = &stream.opened;
        if !opened.resumed {
            return Err(SessionError::Ended {
                reason: v1::EndReason::Unknown.as_str_name(),
                detail: "the directory does not know the session any more".to_owned(),
            });
        }
        let lease = Duration::from_millis(u64::from(opened.lease_ms));
        let claims = {
            let mut state = self.lock();
            if !state.core.log().resume(opened.applied) {
                return Err(SessionError::Protocol {
                    detail: format!("it has applied batch {}, which cannot be", opened.applied),
                });
            }
            state.core.resend_requests();
            state.core.trust_until(stream.asked_at + lease - margin(lease));
            // The last of the reclaims says that this is all.
            let mut claims = state.core.claim_locks();
            claims.extend(state.core.reclaims().into_iter().map(Up::Reclaim));
            claims
        };
        self.new_grant(&opened.grant);
        self.outgoing.notify_one();
        self.signal();
        tracing::info!(applied = opened.applied, "the directory is back");
        Ok((stream, claims))
    }

    /// The session is over: everything fails from now on, and what is not durable goes into a rescue
    /// file. Answers why it ended, and where that lies.
    pub async fn session_ended(&self, why: &str) -> String {
        // First, so that nothing is accepted that would be in neither place.
        self.end(why.to_owned());
        let rescue = {
            let mut state = self.lock();
            let kept = state.undurable.take();
            crate::session::rescue::Rescue::collect(&state.core, kept)
        };
        let text = match rescue {
            None => why.to_owned(),
            Some(rescue) => {
                let dir = self.rescue_dir.clone();
                match rescue.write(dir, &self.volume_name, &self.disk).await {
                    Ok(path) => {
                        format!("{why}; what was not durable lies in {}", path.display())
                    }
                    Err(error) => format!("{why}; what was not durable is lost: {error}"),
                }
            }
        };
        tracing::error!(reason = text, "the session with the directory ended");
        self.lock().core.explain_end(text.clone());
        self.signal();
        text
    }

    /// From now on everything fails, and whoever waits is told so.
    pub fn end(&self, why: String) {
        {
            let mut state = self.lock();
            state.core.end(why);
            state.waiters.clear();
            state.replies.clear();
            state.lock_waiters.clear();
        }
        self.signal();
        self.durable.send_modify(|_| {});
    }
}

impl State {
    /// What was just appended to the log comes from the request this code runs for. Nothing is
    /// noted where nobody logs it.
    pub fn note_request(&mut self) {
        if tracing::enabled!(tracing::Level::DEBUG) {
            self.core.log().note_trace(RequestId::current().0);
        }
    }

    /// Lets go of the plaintext of blocks whose commits have become durable.
    pub fn advance_undurable(&mut self) {
        let (end, durable) = (self.core.log().end(), self.core.log().durable_position());
        self.undurable.advance(&self.core, end, durable);
    }

    /// Has the locks take an event, and tells those whose requests end with it.
    pub fn step_locks(&mut self, now: Now, event: LockEvent) -> Locked {
        let locked = self.core.step_locks(now, event);
        self.tell_locked(&locked);
        locked
    }

    /// Where it is told how a request for a lock ended.
    pub fn wait_for_lock(&mut self, number: u64) -> oneshot::Receiver<LockOutcome> {
        let (sender, outcome) = oneshot::channel();
        self.lock_waiters.insert(number, sender);
        outcome
    }

    /// Nobody waits for it any more.
    pub fn forget_lock(&mut self, number: u64) {
        self.lock_waiters.remove(&number);
    }

    fn tell_locked(&mut self, locked: &Locked) {
        for (number, outcome) in &locked.done {
            if let Some(waiter) = self.lock_waiters.remove(number) {
                // Whoever asked may have gone; then it is taken back.
                let _ = waiter.send(*outcome);
            }
        }
    }

    fn answer(&mut self, number: u64, answer: &Answer) {
        for waiter in self.waiters.remove(&number).unwrap_or_default() {
            // Who gave up waiting does not miss it.
            let _ = waiter.send(answer.clone());
        }
    }
}

/// Both clocks, now.
pub(crate) fn now() -> Now {
    let boot = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let wall = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    Now {
        boot: Duration::new(boot.tv_sec.unsigned_abs(), boot.tv_nsec as u32),
        wall: FileTime { seconds: wall.tv_sec, nanos: wall.tv_nsec as u32 },
    }
}
