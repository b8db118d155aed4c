//! A directory inside the test: the real engine on a store in memory, with six providers in memory
//! that a test can make fail, plugged straight into the mounts' [`DirectoryLink`].

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt};
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use us_core::disk::memory::{Fault, MemoryProviders};
use us_core::ids::ProviderId;
use us_core::placement::Spread;
use us_directory::engine::{
    AskId, ConnId, Effect, Engine, EngineConfig, Event, Moment, NewVolume, Peer, SystemEntropy,
};
use us_directory::store::WriteBatch;
use us_directory::store::memory::MemoryStore;
use us_proto::v1;
use us_proto::v1::provider_up::Event as ProviderSays;
use usfs::fs::{Fs, MountOptions, SwarmNews};
use usfs::session::{DirectoryLink, LinkStream, SessionError};

pub const PROVIDERS: u64 = 6;
const CLUSTER: [u8; 16] = [7; 16];

struct Inner {
    engine: Engine,
    history: Arc<Mutex<Vec<WriteBatch>>>,
    /// Commits of earlier runs, which the present store's history does not count.
    outlets: HashMap<ConnId, mpsc::UnboundedSender<v1::SessionDown>>,
    next_conn: u64,
    run: u64,
    /// When this run began: the engine's time counts from there.
    started: Instant,
    /// What each provider was given to prove itself with at its next hello.
    cookies: HashMap<u64, bytes::Bytes>,
    /// The providers have said hello: only then they may report.
    joined: bool,
    /// How many commits were called durable: no crash takes those.
    settled: usize,
    /// Commits become durable late, unless somebody waits for it.
    lazy: bool,
    /// Those whose stream has ended.
    absent: BTreeSet<u64>,
    /// What was said lately, for a test that fails.
    trace: VecDeque<String>,
}

/// A lazy directory settles by itself once in so many ticks of 5 ms.
const LAZY_TICKS: u64 = 40;

impl Inner {
    fn trace(&mut self, mut said: String) {
        said.truncate((0..=400).rev().find(|at| said.is_char_boundary(*at)).unwrap_or(0));
        if said.contains("Renew") || said.contains("Placements") {
            return;
        }
        self.trace.push_back(said);
        if self.trace.len() > 200 {
            self.trace.pop_front();
        }
    }
}

/// The directory; clones are the same one.
#[derive(Clone)]
pub struct TestDirectory {
    inner: Arc<Mutex<Inner>>,
    pub swarm: Arc<MemoryProviders>,
}

struct NoNews;

impl SwarmNews for NoNews {
    fn on_providers(&self, _table: &v1::ProviderTable) {}
    fn on_grant(&self, _grant: &bytes::Bytes) {}
}

fn engine(batches: Vec<WriteBatch>) -> (Engine, Arc<Mutex<Vec<WriteBatch>>>) {
    let (store, history) = MemoryStore::replay(batches);
    let config = EngineConfig { lease_ms: 3_000, fence_ms: 4_500, ..EngineConfig::default() };
    let entropy = Box::new(SystemEntropy);
    let engine = Engine::start(Box::new(store), config, entropy, Box::new(Spread), CLUSTER);
    (engine.unwrap(), history)
}

fn report() -> v1::ProviderReport {
    v1::ProviderReport {
        capacity_bytes: 1 << 44,
        free_bytes: 1 << 44,
        accepts_puts: true,
        ..Default::default()
    }
}

impl TestDirectory {
    /// A directory with one volume, "v", coded 4+2.
    pub fn start() -> Self {
        let (engine, history) = engine(Vec::new());
        let inner = Inner {
            engine,
            history,
            outlets: HashMap::new(),
            next_conn: 1,
            run: 0,
            started: Instant::now(),
            cookies: HashMap::new(),
            joined: false,
            settled: 0,
            lazy: false,
            absent: BTreeSet::new(),
            trace: VecDeque::new(),
        };
        let directory =
            Self { inner: Arc::new(Mutex::new(inner)), swarm: Arc::new(MemoryProviders::new()) };
        directory.join_providers();
        let question = NewVolume::named("v", 4, 2).into();
        directory.step(Event::Ask { ask: AskId(1), question });
        directory.settle();
        let ticking = directory.clone();
        tokio::spawn(async move {
            for tick in 0u64.. {
                tokio::time::sleep(Duration::from_millis(5)).await;
                ticking.step(Event::Tick);
                if !ticking.inner.lock().lazy || tick % LAZY_TICKS == 0 {
                    ticking.settle();
                }
                if tick % 50 == 0 {
                    ticking.report_providers();
                }
            }
        });
        directory
    }

    fn join_providers(&self) {
        let absent = self.inner.lock().absent.clone();
        (1..=PROVIDERS).filter(|number| !absent.contains(number)).for_each(|at| self.join(at));
        self.inner.lock().joined = true;
        self.settle();
    }

    fn join(&self, number: u64) {
        let conn = self.provider_conn(number);
        let key_hash = vec![number as u8; 32];
        let peer = Peer { key_hash, name: format!("provider-{number}"), ..Peer::default() };
        self.step(Event::ProviderConnected { conn, peer });
        let hello = v1::ProviderHello {
            address: format!("test:{number}"),
            store: vec![number as u8; 16].into(),
            cookie: self.inner.lock().cookies.get(&number).cloned().unwrap_or_default(),
            report: Some(report()),
            ..Default::default()
        };
        let up = v1::ProviderUp { event: Some(ProviderSays::Hello(hello)) };
        self.step(Event::Provider { conn, up });
    }

    /// Something goes wrong with one provider (counted from 1); where `leaves`, its stream ends too.
    pub fn fail_provider(&self, number: u64, fault: Fault, leaves: bool) {
        self.swarm.set_fault(ProviderId(number as u32), fault);
        if leaves && self.inner.lock().absent.insert(number) {
            self.step(Event::Disconnected { conn: self.provider_conn(number) });
        }
    }

    /// Everybody is there again and well.
    pub fn heal_providers(&self) {
        self.swarm.heal();
        let absent = std::mem::take(&mut self.inner.lock().absent);
        absent.into_iter().for_each(|number| self.join(number));
        self.settle();
    }

    fn provider_conn(&self, number: u64) -> ConnId {
        ConnId(1_000_000 + self.inner.lock().run * 100 + number)
    }

    fn report_providers(&self) {
        if !self.inner.lock().joined {
            return;
        }
        let absent = self.inner.lock().absent.clone();
        for number in (1..=PROVIDERS).filter(|number| !absent.contains(number)) {
            let up = v1::ProviderUp { event: Some(ProviderSays::Report(report())) };
            self.step(Event::Provider { conn: self.provider_conn(number), up });
        }
    }

    fn step(&self, event: Event) {
        let mut inner = self.inner.lock();
        let at = Moment { now_ms: inner.started.elapsed().as_millis() as u64, unix_ms: 0 };
        if matches!(
            event,
            Event::Session { .. } | Event::SessionConnected { .. } | Event::Disconnected { .. }
        ) {
            inner.trace(format!("{} up {event:?}", at.now_ms));
        }
        let effects = inner.engine.step(at, event).unwrap();
        for effect in effects {
            match effect {
                Effect::Refuse(_) => {}
                Effect::Session { conn, down } => {
                    inner.trace(format!("{} down {conn:?} {down:?}", at.now_ms));
                    if let Some(outlet) = inner.outlets.get(&conn) {
                        let _ = outlet.send(down);
                    }
                }
                Effect::End { conn } => {
                    inner.trace(format!("{} end {conn:?}", at.now_ms));
                    inner.outlets.remove(&conn);
                }
                Effect::Provider { conn, down } => {
                    inner.trace(format!("{} provider {conn:?} {down:?}", at.now_ms));
                    if let Some(v1::provider_down::Event::Welcome(welcome)) = down.event {
                        inner.cookies.insert(conn.0 % 100, welcome.cookie);
                    }
                }
                Effect::Answer { .. } => {}
            }
        }
    }

    /// What was said lately.
    pub fn trace(&self) -> Vec<String> {
        self.inner.lock().trace.iter().cloned().collect()
    }

    /// Everything committed so far becomes durable.
    pub fn settle(&self) {
        let seq = {
            let mut inner = self.inner.lock();
            let commits = inner.history.lock().len();
            inner.settled = commits;
            commits as u64
        };
        self.step(Event::Durable { seq });
    }

    /// From now on commits become durable late, so that a crash has something to lose.
    pub fn be_lazy(&self) {
        self.inner.lock().lazy = true;
    }

    /// The directory crashes and starts again: up to `lose_last` commits that were not durable are
    /// lost.
    pub fn restart(&self, lose_last: usize) {
        {
            let mut inner = self.inner.lock();
            let mut batches = inner.history.lock().clone();
            let keep = batches.len() - lose_last.min(batches.len() - inner.settled);
            batches.truncate(keep);
            inner.settled = keep;
            let (engine, history) = engine(batches);
            inner.engine = engine;
            inner.history = history;
            inner.outlets.clear();
            inner.run += 1;
            inner.started = Instant::now();
            inner.joined = false;
            inner.trace("restart".to_owned());
        }
        self.join_providers();
    }

    /// Breaks every connection.
    pub fn disconnect_all(&self) {
        let conns: Vec<_> = self.inner.lock().outlets.drain().map(|(conn, _)| conn).collect();
        conns.into_iter().for_each(|conn| self.step(Event::Disconnected { conn }));
    }

    fn attach(&self) -> LinkStream {
        let (outlet, down) = mpsc::unbounded_channel();
        let (up, mut said) = mpsc::channel::<v1::SessionUp>(16);
        let (conn, run) = {
            let mut inner = self.inner.lock();
            let conn = ConnId(inner.next_conn);
            inner.next_conn += 1;
            inner.outlets.insert(conn, outlet);
            (conn, inner.run)
        };
        let peer = Peer { key_hash: vec![99; 32], name: "mount".to_owned(), ..Peer::default() };
        self.step(Event::SessionConnected { conn, peer });
        let directory = self.clone();
        tokio::spawn(async move {
            while let Some(up) = said.recv().await {
                if directory.inner.lock().run != run {
                    return;
                }
                let sync = matches!(up.event, Some(v1::session_up::Event::Sync(_)));
                directory.step(Event::Session { conn, up });
                if sync {
                    directory.settle();
                }
            }
            if directory.inner.lock().run == run {
                directory.step(Event::Disconnected { conn });
            }
        });
        LinkStream { up, down: UnboundedReceiverStream::new(down).map(Ok).boxed() }
    }

    /// Mounts the volume.
    pub async fn mount(&self, rescue_dir: &std::path::Path) -> Fs {
        let rescue_dir = rescue_dir.to_owned();
        // What fails here fails until the test goes on.
        let store_patience = Duration::from_millis(5);
        self.mount_with(MountOptions { rescue_dir, store_patience, ..MountOptions::default() })
            .await
    }

    /// Mounts the volume with these options besides.
    pub async fn mount_with(&self, options: MountOptions) -> Fs {
        let options = MountOptions {
            volume: "v".to_owned(),
            host: "test".to_owned(),
            memory_bytes: 96 << 20,
            ..options
        };
        let (link, news) = (Arc::new(self.clone()), Arc::new(NoNews));
        let transport = Arc::clone(&self.swarm);
        Fs::mount(options, link, transport, news).await.unwrap()
    }
}

impl DirectoryLink for TestDirectory {
    fn connect(&self) -> BoxFuture<'_, Result<LinkStream, SessionError>> {
        async { Ok(self.attach()) }.boxed()
    }
}
