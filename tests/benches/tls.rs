//! What TLS costs on the whole way of a block: sealed, coded and fingerprinted, over the links to six
//! provider processes with stores on the disk, each put synced; and back, cold. The same once as shipped,
//! with mutual TLS, and once over bare TCP, which only code reaches (`us_core::wire::unsecured`).
//!
//!     cargo bench -p us-tests --bench tls            # about a minute; -- ROUNDS
//!
//! The providers are this program, started again; each serves one store on two ports. Both ways take
//! turns, another first in each round, and each figure is the median of the rounds; rounds before them
//! warm the memory and are not counted. CPU seconds are those of the client and the six providers.
//! Whatever is read is compared with what was written. `docs/performance.md` has the figures.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use rustix::fs::{Advice, fadvise};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;
use us_core::daemon::heap;
use us_core::daemon::runtime::{Program, runtime};
use us_core::disk::memory::MemoryDirectory;
use us_core::disk::{
    BlockInfo, DiskConfig, LinksConfig, ProviderAddress, ProviderLinks, VirtualDisk,
};
use us_core::geometry::Code;
use us_core::grant::{Grant, GrantKey, Rights};
use us_core::ids::{ProviderId, VolumeId};
use us_core::seal::{KEY_BYTES, Secret, VolumeKey};
use us_core::tls::{CertificateAuthority, Identity, KeyHash, PeerIdentity, Role};
use us_core::wire::{BulkLimits, Server, ServerLimits, unsecured};
use us_provider::grants::{Grants, Told, encode_told};
use us_provider::guest::Pause;
use us_provider::rebuild::PeerLinks;
use us_provider::service::FragmentService;
use us_provider::store::{Store, StoreOptions};
use us_tests::tree::noise;
use us_tests::worker::{Worker, answer, median, own_cpu};

const PROVIDER_FLAG: &str = "--tls-bench-provider";
/// In a provider's folder: the hash of the client's key, for the port without TLS.
const CLIENT_FILE: &str = "client";
/// Data and spare fragments of the code: one fragment for each provider.
const CODE: (usize, usize) = (4, 2);
/// Whole blocks written and read in each round.
const BLOCKS: usize = 64;
/// Blocks on their way at once.
const BLOCKS_AT_ONCE: usize = 4;
/// Bytes of a small read, and how many of them are done one by one and 16 at once.
const PAGE_BYTES: usize = 4 << 10;
const READS: [(usize, usize); 2] = [(1, 3_000), (16, 8_000)];
/// Steps from one small read to the next, in pages: odd, so that none comes twice.
const STRIDE: usize = 40_503;
const ROUNDS: usize = 7;
const ROUNDS_WARM: usize = 2;
/// The most that TLS may take in time, as a share of the time without.
const SLOWER_MAX: f64 = 0.15;
const BLOCK_DEADLINE: Duration = Duration::from_secs(60);
/// Grants count for one period, which outlasts the benchmark.
const PERIOD_MS: u64 = 24 * 3600 * 1000;

fn main() -> Result<()> {
    heap::keep_large_buffers();
    let arguments: Vec<String> = std::env::args().collect();
    match arguments.iter().position(|argument| argument == PROVIDER_FLAG) {
        Some(at) => provider(Path::new(arguments.get(at + 1).context("no directory")?)),
        None => {
            let rounds = arguments.iter().find_map(|argument| argument.parse().ok());
            measure(rounds.unwrap_or(ROUNDS))
        }
    }
}

// ---------------------------------------------------------------- the provider processes

/// Serves the store below `home` on two ports, with TLS and without, and prints both.
fn provider(home: &Path) -> Result<()> {
    let identity = Identity::load(home)?;
    let client = KeyHash::from_slice(&fs::read(home.join(CLIENT_FILE))?).context("no key")?;
    let client = PeerIdentity { role: Role::Client, key_hash: client, ..identity.own().clone() };
    let store = Store::open(&home.join("store"), StoreOptions::default())?;
    runtime(Program::Guest)?.block_on(async {
        let peers = Arc::new(PeerLinks::new(identity.clone()));
        let service = FragmentService::new(store, Grants::load(home), Pause::load(home), peers);
        let service = Arc::new(service);
        let listeners =
            [TcpListener::bind("127.0.0.1:0").await?, TcpListener::bind("127.0.0.1:0").await?];
        let ports: Vec<String> = listeners
            .iter()
            .map(|listener| Ok(listener.local_addr()?.port().to_string()))
            .collect::<Result<_>>()?;
        let [tls, plain] = listeners;
        let server = Server::new(&identity, ServerLimits::default()).bulk(Arc::clone(&service));
        tokio::spawn(server.serve(tls, CancellationToken::new()));
        tokio::spawn(serve_plain(plain, service, client));
        tokio::task::spawn_blocking(move || answer(&ports.join(" "))).await?
    })
}

async fn serve_plain(
    listener: TcpListener,
    service: Arc<FragmentService>,
    client: PeerIdentity,
) -> Result<()> {
    loop {
        let (tcp, _) = listener.accept().await?;
        tcp.set_nodelay(true)?;
        let (service, client) = (Arc::clone(&service), client.clone());
        let (limits, stop) = (BulkLimits::default(), CancellationToken::new());
        tokio::spawn(unsecured::serve_plain(service, client, tcp, limits, stop));
    }
}

// ---------------------------------------------------------------- the client

#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Tls,
    Plain,
}

/// Both, in the order in which providers print their ports.
const WAYS: [Way; 2] = [Way::Tls, Way::Plain];

/// What a piece of work took.
#[derive(Clone, Copy)]
struct Cost {
    seconds: f64,
    cpu_seconds: f64,
}

struct Bench {
    runtime: Runtime,
    code: Code,
    volume: VolumeId,
    directory: Arc<MemoryDirectory>,
    /// For each of [`WAYS`].
    links: [ProviderLinks; 2],
    providers: Vec<Worker>,
    stores: PathBuf,
    data: Vec<Bytes>,
}

impl Bench {
    fn start(home: &Path) -> Result<Self> {
        let runtime = runtime(Program::Foreground)?;
        let inside = runtime.enter();
        let (authority, volume) = (CertificateAuthority::create()?, VolumeId::generate());
        let identity = authority.issue(Role::Client, "bench")?;
        let PeerIdentity { cluster, key_hash: holder, .. } = *identity.own();
        let key = GrantKey::of(&Secret::generate(), cluster);
        let (incarnation, period) = (1, 1);
        let told = Told { key: key.public(), cluster, incarnation, period, period_ms: PERIOD_MS };
        let grant = key.sign(&Grant {
            cluster,
            volume,
            block: None,
            holder,
            rights: Rights::ReadWrite,
            incarnation,
            from: period,
            until: period,
            serial: 1,
        });
        let config = LinksConfig::default();
        let links = [
            ProviderLinks::new(identity.clone(), config),
            ProviderLinks::unsecured(identity, config),
        ];
        links.iter().for_each(|links| links.set_grant(grant.clone()));
        let code = Code::new(CODE.0, CODE.1)?;
        let mut providers = Vec::new();
        let ids: Vec<ProviderId> = (1..=code.fragments() as u32).map(ProviderId).collect();
        for id in &ids {
            let home = home.join(id.0.to_string());
            let own = authority.issue(Role::Provider, "bench")?;
            own.save(&home)?;
            fs::write(home.join("grants"), encode_told(&told))?;
            fs::write(home.join(CLIENT_FILE), holder.as_bytes())?;
            let (worker, ports) = Worker::start(PROVIDER_FLAG, &home)?;
            for (links, port) in links.iter().zip(ports.split(' ')) {
                let (address, key_hash) = (format!("127.0.0.1:{port}"), own.own().key_hash);
                links.learn(*id, ProviderAddress { address, key_hash, reachable: true });
            }
            providers.push(worker);
        }
        let bytes = code.block_bytes_max();
        let data = (0..BLOCKS).map(|number| noise(number as u64, bytes).into()).collect();
        let directory = Arc::new(MemoryDirectory::new(code, ids));
        let stores = home.to_owned();
        drop(inside);
        Ok(Self { runtime, code, volume, directory, links, providers, stores, data })
    }

    /// A disk that has read nothing yet.
    fn disk(&self, way: Way) -> VirtualDisk {
        let _inside = self.runtime.enter();
        VirtualDisk::new(
            self.volume,
            VolumeKey::from_bytes([9; KEY_BYTES].into()),
            self.code,
            DiskConfig::default(),
            self.directory.clone(),
            Arc::new(self.links[way as usize].clone()),
        )
    }

    fn cpu(&mut self) -> Result<Duration> {
        self.providers.iter_mut().map(Worker::cpu).try_fold(own_cpu(), |sum, cpu| Ok(sum + cpu?))
    }

    /// Does `count` pieces of work with a fresh disk, `at_once` under way, each on a thread that waits
    /// for it, and measures them.
    fn work<T: Send>(
        &mut self,
        way: Way,
        (at_once, count): (usize, usize),
        piece: impl Fn(&Self, &VirtualDisk, usize) -> Result<T> + Sync,
    ) -> Result<(Vec<T>, Cost)> {
        let disk = self.disk(way);
        let (cpu, begun, next) = (self.cpu()?, Instant::now(), AtomicUsize::new(0));
        let work = || -> Result<Vec<(usize, T)>> {
            let numbers = std::iter::from_fn(|| Some(next.fetch_add(1, Ordering::Relaxed)));
            let numbers = numbers.take_while(|number| *number < count);
            numbers.map(|number| Ok((number, piece(self, &disk, number)?))).collect()
        };
        let mut done = std::thread::scope(|scope| -> Result<Vec<(usize, T)>> {
            let threads: Vec<_> = (0..at_once).map(|_| scope.spawn(work)).collect();
            let done = threads.into_iter().map(|thread| thread.join().expect("no panic"));
            Ok(done.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect())
        })?;
        let seconds = begun.elapsed().as_secs_f64();
        let cpu_seconds = (self.cpu()? - cpu).as_secs_f64();
        self.runtime.block_on(disk.close());
        done.sort_unstable_by_key(|(number, _)| *number);
        let cost = Cost { seconds, cpu_seconds };
        Ok((done.into_iter().map(|(_, value)| value).collect(), cost))
    }

    /// Stores a block; returns when all its fragments are durable.
    fn store(&self, disk: &VirtualDisk, number: usize) -> Result<BlockInfo> {
        self.runtime.block_on(async {
            let deadline = tokio::time::Instant::now() + BLOCK_DEADLINE;
            let mut stored = disk.store(vec![self.data[number].clone()], deadline).await?;
            let mut durable = stored.info.durable;
            while let Some(more) = stored.late.next().await {
                durable = more;
            }
            ensure!(durable.count() == self.code.fragments(), "a put failed: {durable:?}");
            Ok(stored.info)
        })
    }

    /// Reads a part of a block and compares it with what was written.
    fn read(
        &self,
        disk: &VirtualDisk,
        blocks: &[BlockInfo],
        number: usize,
        range: std::ops::Range<usize>,
    ) -> Result<()> {
        let mut expected = &self.data[number][range.clone()];
        for piece in self.runtime.block_on(disk.read(&blocks[number], range))? {
            let (same, rest) = expected.split_at(piece.len());
            ensure!(piece == same, "block {number} is not what was written");
            expected = rest;
        }
        ensure!(expected.is_empty(), "block {number} is short");
        Ok(())
    }

    /// A round of one way: the cost of each of [`ROWS`].
    fn round(&mut self, way: Way) -> Result<Vec<Cost>> {
        let whole = (BLOCKS_AT_ONCE, BLOCKS);
        let (blocks, wrote) = self.work(way, whole, Self::store)?;
        forget(&self.stores)?;
        let bytes = self.code.block_bytes_max();
        let read =
            |bench: &Self, disk: &VirtualDisk, number| bench.read(disk, &blocks, number, 0..bytes);
        let mut costs = vec![wrote, self.work(way, whole, read)?.1];
        let pages = bytes / PAGE_BYTES;
        let small = |bench: &Self, disk: &VirtualDisk, number: usize| {
            let page = number * STRIDE % (BLOCKS * pages);
            let from = page % pages * PAGE_BYTES;
            bench.read(disk, &blocks, page / pages, from..from + PAGE_BYTES)
        };
        for reads in READS {
            forget(&self.stores)?;
            costs.push(self.work(way, reads, small)?.1);
        }
        Ok(costs)
    }
}

/// Has the system forget the pages of these files.
fn forget(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            forget(&path)?;
        } else if let Ok(file) = File::open(&path) {
            fadvise(&file, 0, None, Advice::DontNeed)?;
        }
    }
    Ok(())
}

// ---------------------------------------------------------------- the measurement

/// What a row counts in, and how many of them a round does.
enum Unit {
    MiB(f64),
    Reads(f64),
}

struct Row {
    title: String,
    unit: Unit,
}

fn rows(code: Code) -> Vec<Row> {
    let mib = || Unit::MiB((BLOCKS * code.block_bytes_max()) as f64 / f64::from(1 << 20));
    let whole = ["write, synced", "read, cold, whole blocks"];
    let mut rows: Vec<Row> = whole.map(|title| Row { title: title.to_owned(), unit: mib() }).into();
    rows.extend(READS.map(|(at_once, count)| {
        let title = format!("read, cold, 4 KiB, {at_once} at once");
        Row { title, unit: Unit::Reads(count as f64) }
    }));
    rows
}

fn measure(rounds: usize) -> Result<()> {
    let home = tempfile::tempdir()?;
    let mut bench = Bench::start(home.path())?;
    // By way, then round, then row.
    let mut costs: [Vec<Vec<Cost>>; 2] = Default::default();
    for round in 0..ROUNDS_WARM + rounds.max(1) {
        let order = if round % 2 == 0 { WAYS } else { [Way::Plain, Way::Tls] };
        for way in order {
            let cost = bench.round(way)?;
            if round >= ROUNDS_WARM {
                costs[way as usize].push(cost);
            }
        }
        eprintln!("round {} of {} done", round + 1, ROUNDS_WARM + rounds.max(1));
    }
    print(&rows(bench.code), &costs);
    Ok(())
}

/// The tables, and whether the limit holds.
fn print(rows: &[Row], [tls, plain]: &[Vec<Vec<Cost>>; 2]) {
    println!("| | TLS | bare TCP | slower in time | rounds | CPU, TLS | CPU, bare | more |");
    println!("|---|--:|--:|--:|--:|--:|--:|--:|");
    let mut all_hold = true;
    for (at, row) in rows.iter().enumerate() {
        let of = |rounds: &[Vec<Cost>], figure: fn(&Cost) -> f64| {
            median(rounds.iter().map(|costs| figure(&costs[at])))
        };
        let seconds = [tls, plain].map(|rounds| of(rounds, |cost| cost.seconds));
        let cpu = [tls, plain].map(|rounds| of(rounds, |cost| cost.cpu_seconds));
        let pairs = tls.iter().zip(plain);
        let mut slower: Vec<f64> =
            pairs.map(|(tls, plain)| tls[at].seconds / plain[at].seconds - 1.0).collect();
        slower.sort_by(f64::total_cmp);
        let (least, most) = (slower[0] * 100.0, slower[slower.len() - 1] * 100.0);
        let share = |[tls, plain]: [f64; 2]| tls / plain - 1.0;
        let (rates, costs, unit, cost_unit) = match row.unit {
            Unit::MiB(mib) => {
                (seconds.map(|s| mib / s), cpu.map(|s| s * 1024.0 / mib), "MiB/s", "s/GiB")
            }
            Unit::Reads(reads) => {
                (seconds.map(|s| reads / s), cpu.map(|s| s * 1e6 / reads), "reads/s", "us/read")
            }
        };
        println!(
            "| {}, {unit} | {:.0} | {:.0} | {:.1} % | {least:.0} to {most:.0} % | {:.2} {cost_unit} | {:.2} | {:.0} % |",
            row.title,
            rates[0],
            rates[1],
            share(seconds) * 100.0,
            costs[0],
            costs[1],
            share(cpu) * 100.0,
        );
        all_hold &= share(seconds) <= SLOWER_MAX;
    }
    let says = if all_hold { "holds in every row" } else { "MISSED" };
    println!("at most {:.0} % slower with TLS: {says}", SLOWER_MAX * 100.0);
}
