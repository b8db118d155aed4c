//! The shell around the engine: its thread, its clock, its connections.
//!
//! One thread owns the engine and takes events from one bounded queue; tasks of the service feed it.
//! What the engine sends goes into a bounded queue for each connection; a peer that does not read is
//! cut off, so that nobody's slowness grows memory or stops the thread. When the store fails, the
//! thread ends and [`Directory::failed`] says why: the process must end too.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use us_core::placement::Hybrid;
use us_core::seal::Secret;
use us_core::tls::{KeyHash, PeerIdentity};
use us_core::wire::admission::{Door, RefusedKeys};
use us_proto::v1::{ProviderDown, SessionDown};

use crate::engine::health::count_slice;
use crate::engine::{
    Answer, AskId, ConnId, Effect, Engine, EngineConfig, EngineError, Event, Moment, Question,
    SystemEntropy,
};
use crate::store::{DurableSink, MetaStore, Progress, StoreError};

/// Events that wait for the engine.
const EVENTS_MAX: usize = 4096;
/// Messages that wait for a mount to read them.
const SESSION_QUEUE_MAX: usize = 8192;
/// Messages that wait for a provider to read them.
const PROVIDER_QUEUE_MAX: usize = 1024;
/// How often the figures of /metrics are brought up to date, and how much longer than that takes is
/// waited at least.
const GAUGES_EVERY_MS: u64 = 1000;
const GAUGES_SHARE: u64 = 50;
/// How often the engine hears that time passes.
const TICK: Duration = Duration::from_millis(50);

/// What waits for the engine's thread.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "nearly all are events: a box each would cost more")]
enum Input {
    Event(Event),
    /// Look at the mark.
    Wake,
    /// Sync and end.
    Stop,
}

/// Where messages for a connection go.
#[derive(Debug)]
enum Outlet {
    Session(mpsc::Sender<SessionDown>),
    Provider(mpsc::Sender<ProviderDown>),
}

#[derive(Debug)]
struct Registry {
    door: Door,
    outlets: HashMap<ConnId, (Outlet, CancellationToken)>,
    asks: HashMap<AskId, oneshot::Sender<Answer>>,
}

/// A connection as a service task holds it.
#[derive(Debug)]
pub struct Attached<T> {
    /// Its number.
    pub conn: ConnId,
    /// What the engine sends.
    pub down: mpsc::Receiver<T>,
    /// Cancelled when the engine has ended the connection.
    pub ended: CancellationToken,
}

/// Why the directory does not answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the directory is shutting down, or its store has failed")]
pub struct Gone;

/// The running directory.
#[derive(Debug, Clone)]
pub struct Directory {
    events: mpsc::Sender<Input>,
    registry: Arc<Mutex<Registry>>,
    next: Arc<AtomicU64>,
    failed: watch::Receiver<Option<String>>,
    door: Door,
}

/// How far the store has got, and whether it has failed: set by the store's threads.
#[derive(Debug, Default)]
pub struct DurableMark {
    written: AtomicU64,
    synced: AtomicU64,
    failed: Mutex<Option<StoreError>>,
    wake: Mutex<Option<mpsc::Sender<Input>>>,
}

impl DurableMark {
    /// A mark, and the sink that sets it.
    pub fn new() -> (Arc<Self>, DurableSink) {
        let mark = Arc::new(Self::default());
        let set = mark.clone();
        let sink: DurableSink = Arc::new(move |progress| set.set(progress));
        (mark, sink)
    }

    fn set(&self, progress: Result<Progress, StoreError>) {
        match progress {
            Ok(progress) => {
                self.written.fetch_max(progress.written, Ordering::AcqRel);
                self.synced.fetch_max(progress.synced, Ordering::AcqRel);
            }
            Err(error) => *self.failed.lock() = Some(error),
        }
        // A full queue needs no waking: the engine's thread looks at the mark after every event.
        if let Some(events) = &*self.wake.lock() {
            let _full = events.try_send(Input::Wake);
        }
    }
}

fn boottime_ms() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    now.tv_sec as u64 * 1000 + now.tv_nsec as u64 / 1_000_000
}

fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_millis() as u64)
}

/// The engine's thread.
struct Owner {
    engine: Engine,
    started_ms: u64,
    registry: Arc<Mutex<Registry>>,
    mark: Arc<DurableMark>,
    told: Progress,
    /// When the last event was taken up.
    stepped_ms: u64,
}

/// Ticks come far more often: after this long without an event the engine has stood still.
const STOOD_STILL_MS: u64 = 1000;

impl Owner {
    fn run(&mut self, mut inputs: mpsc::Receiver<Input>) -> Result<(), StoreError> {
        let mut gauges_due_ms = 0;
        while let Some(input) = inputs.blocking_recv() {
            match input {
                Input::Event(event) => self.step(event)?,
                Input::Wake => {}
                Input::Stop => break,
            }
            self.check_mark()?;
            let now_ms = boottime_ms();
            if now_ms >= gauges_due_ms {
                for (name, value) in self.engine.gauges() {
                    metrics::gauge!(name).set(value);
                }
                // Where many blocks make them slow they come less often.
                let took_ms = boottime_ms().saturating_sub(now_ms);
                gauges_due_ms = now_ms + GAUGES_EVERY_MS.max(GAUGES_SHARE * took_ms);
            }
        }
        self.engine.shut_down()
    }

    fn check_mark(&mut self) -> Result<(), StoreError> {
        if let Some(error) = self.mark.failed.lock().clone() {
            return Err(error);
        }
        let seq = self.mark.synced.load(Ordering::Acquire);
        if seq > self.told.synced {
            self.told.synced = seq;
            self.step(Event::Durable { seq })?;
        }
        let seq = self.mark.written.load(Ordering::Acquire);
        if seq > self.told.written {
            self.told.written = seq;
            self.step(Event::Written { seq })?;
        }
        Ok(())
    }

    fn step(&mut self, event: Event) -> Result<(), StoreError> {
        let now_ms = boottime_ms().saturating_sub(self.started_ms);
        let gap_ms = now_ms.saturating_sub(std::mem::replace(&mut self.stepped_ms, now_ms));
        if gap_ms > STOOD_STILL_MS {
            tracing::warn!(gap_ms, "the directory stood still: nobody is blamed for that time");
            metrics::counter!("us_directory_stood_still_total").increment(1);
            self.engine.stood_still(gap_ms, now_ms);
        }
        let effects = self.engine.step(Moment { now_ms, unix_ms: unix_ms() }, event)?;
        if effects.is_empty() {
            return Ok(());
        }
        let mut registry = self.registry.lock();
        for effect in effects {
            registry.carry_out(effect);
        }
        Ok(())
    }
}

impl Registry {
    fn carry_out(&mut self, effect: Effect) {
        let (conn, sent) = match effect {
            Effect::Session { conn, down } => match self.outlets.get(&conn) {
                Some((Outlet::Session(outlet), _)) => (conn, outlet.try_send(down).is_ok()),
                _ => return,
            },
            Effect::Provider { conn, down } => match self.outlets.get(&conn) {
                Some((Outlet::Provider(outlet), _)) => (conn, outlet.try_send(down).is_ok()),
                _ => return,
            },
            Effect::End { conn } => {
                // What is queued is still sent: the receiver ends when it has drained the queue.
                if let Some((_, ended)) = self.outlets.remove(&conn) {
                    ended.cancel();
                }
                return;
            }
            Effect::Refuse(list) => {
                self.door.refuse(refused_keys(&list));
                return;
            }
            Effect::Answer { ask, answer } => {
                if let Some(waiting) = self.asks.remove(&ask) {
                    let _gone = waiting.send(answer);
                }
                return;
            }
        };
        if !sent {
            tracing::warn!(conn = conn.0, "a peer does not read what it is sent: cut off");
            if let Some((_, ended)) = self.outlets.remove(&conn) {
                ended.cancel();
            }
        }
    }
}

impl Directory {
    /// Starts the engine's thread on a store whose sink is `mark`'s. With a recovery secret it keeps
    /// copies of its state on providers.
    ///
    /// # Errors
    /// [`EngineError`] when the store cannot be read or is not this cluster's.
    pub fn start(
        store: Box<dyn MetaStore>,
        mark: Arc<DurableMark>,
        config: EngineConfig,
        cluster: [u8; 16],
        recovery: Option<Secret>,
    ) -> Result<(Self, JoinHandle<()>), EngineError> {
        let entropy = Box::new(SystemEntropy);
        let chooser = Box::<Hybrid>::default();
        let mut engine = Engine::start(store, config, entropy, chooser, cluster)?;
        if let Some(secret) = recovery {
            engine.sign_grants(&secret)?;
            engine.keep(secret)?;
        }
        let (events, queue) = mpsc::channel(EVENTS_MAX);
        let (failing, failed) = watch::channel(None);
        *mark.wake.lock() = Some(events.clone());
        let door = Door::new(refused_keys(&engine.refused_keys()));
        let (outlets, asks) = (HashMap::new(), HashMap::new());
        let registry = Arc::new(Mutex::new(Registry { door: door.clone(), outlets, asks }));
        spawn_count(&engine, events.downgrade());
        let started_ms = boottime_ms();
        let mut owner = Owner {
            engine,
            started_ms,
            registry: registry.clone(),
            mark,
            told: Progress::default(),
            stepped_ms: 0,
        };
        let thread = std::thread::Builder::new().name("engine".into()).spawn(move || {
            if let Err(error) = owner.run(queue) {
                tracing::error!(%error, "the store has failed: the directory stops");
                let _nobody_waits = failing.send(Some(error.to_string()));
            }
            owner.registry.lock().outlets.clear();
            owner.registry.lock().asks.clear();
        });
        let thread = thread.map_err(|source| {
            EngineError::Store(StoreError::io("start the thread of", "engine".as_ref(), source))
        })?;
        let next = Arc::new(AtomicU64::new(1));
        let directory = Self { events, registry, next, failed, door };
        Ok((directory, thread))
    }

    /// Tells the engine that time passes, until `shutdown`.
    pub async fn run_clock(&self, shutdown: CancellationToken) {
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
        // Cancel-safe: a tick that is dropped is only late.
        while shutdown.run_until_cancelled(ticks.tick()).await.is_some() {
            if self.event(Event::Tick).await.is_err() {
                return;
            }
        }
    }

    /// Ends every connection when what is queued on it is sent.
    pub fn end_streams(&self) {
        let outlets = std::mem::take(&mut self.registry.lock().outlets);
        for (_, ended) in outlets.into_values() {
            ended.cancel();
        }
    }

    /// Ends the engine's thread when it has taken what is queued: it syncs the store and stops.
    pub async fn stop(&self) {
        let _ended_before = self.events.send(Input::Stop).await;
    }

    /// Why the store failed; `None` while it has not.
    pub fn failed(&self) -> watch::Receiver<Option<String>> {
        self.failed.clone()
    }

    /// Hands an event to the engine; waits while the queue is full.
    ///
    /// # Errors
    /// [`Gone`] when the engine has ended.
    pub async fn event(&self, event: Event) -> Result<(), Gone> {
        self.events.send(Input::Event(event)).await.map_err(|_| Gone)
    }

    /// A connection of a mount; the caller tells the engine.
    pub fn attach_session(&self) -> Attached<SessionDown> {
        let (outlet, down) = mpsc::channel(SESSION_QUEUE_MAX);
        let (conn, ended) = self.attach(Outlet::Session(outlet));
        Attached { conn, down, ended }
    }

    /// A connection of a provider; the caller tells the engine.
    pub fn attach_provider(&self) -> Attached<ProviderDown> {
        let (outlet, down) = mpsc::channel(PROVIDER_QUEUE_MAX);
        let (conn, ended) = self.attach(Outlet::Provider(outlet));
        Attached { conn, down, ended }
    }

    fn attach(&self, outlet: Outlet) -> (ConnId, CancellationToken) {
        let conn = ConnId(self.next.fetch_add(1, Ordering::Relaxed));
        let ended = CancellationToken::new();
        self.registry.lock().outlets.insert(conn, (outlet, ended.clone()));
        (conn, ended)
    }

    /// The stream of a connection has ended.
    pub async fn detach(&self, conn: ConnId) {
        self.registry.lock().outlets.remove(&conn);
        let _gone = self.event(Event::Disconnected { conn }).await;
    }

    /// Asks the engine.
    ///
    /// # Errors
    /// [`Gone`] when the engine has ended.
    pub async fn ask(&self, question: Question) -> Result<Answer, Gone> {
        self.ask_with(|ask| Event::Ask { ask, question }).await
    }

    /// Asks the engine in somebody's name.
    ///
    /// # Errors
    /// [`Gone`] when the engine has ended.
    pub async fn ask_by(&self, by: PeerIdentity, question: Question) -> Result<Answer, Gone> {
        self.ask_with(|ask| Event::AskedBy { ask, by, question }).await
    }

    /// Which keys are refused, for the server.
    pub fn door(&self) -> &Door {
        &self.door
    }

    async fn ask_with(&self, event: impl FnOnce(AskId) -> Event) -> Result<Answer, Gone> {
        let ask = AskId(self.next.fetch_add(1, Ordering::Relaxed));
        let (answer, answered) = oneshot::channel();
        self.registry.lock().asks.insert(ask, answer);
        if self.event(event(ask)).await.is_err() {
            self.registry.lock().asks.remove(&ask);
            return Err(Gone);
        }
        answered.await.map_err(|_| Gone)
    }
}

fn refused_keys(list: &us_proto::v1::RefusedKeys) -> RefusedKeys {
    list.keys.iter().filter_map(|key| KeyHash::from_slice(key)).collect()
}

/// Counts the stored blocks on a thread of its own.
fn spawn_count(engine: &Engine, events: mpsc::WeakSender<Input>) {
    let (view, mut cursor) = engine.to_count();
    let count = move || {
        loop {
            let slice = match count_slice(&*view, &mut cursor) {
                Ok(slice) => slice,
                Err(error) => {
                    tracing::error!(%error, "counting the blocks failed; status stays partial");
                    return;
                }
            };
            let last = slice.last;
            let Some(events) = events.upgrade() else { return };
            if events.blocking_send(Input::Event(Event::Counted(slice))).is_err() || last {
                return;
            }
        }
    };
    if let Err(error) = std::thread::Builder::new().name("count".into()).spawn(count) {
        tracing::error!(%error, "no thread to count the blocks; status stays partial");
    }
}
