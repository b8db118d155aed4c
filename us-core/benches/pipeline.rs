//! The block pipeline over providers in memory: what sealing, coding and handing out cost beside a
//! plain copy. Run with `cargo bench -p us-core --bench pipeline`.
//!
//! Each line is GB/s of plaintext by the wall clock, and CPU seconds of the whole process a GB.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use rustix::time::{ClockId, clock_gettime};
use us_core::disk::memory::{MemoryDirectory, MemoryProviders};
use us_core::disk::{BlockInfo, DiskConfig, VirtualDisk};
use us_core::geometry::{BlockGeometry, Code};
use us_core::ids::{ProviderId, VolumeId};
use us_core::seal::{BlockSealer, FreshBlockId, VolumeKey};

const ROUND: Duration = Duration::from_millis(700);

struct Bench {
    volume: VolumeId,
    key: VolumeKey,
    code: Code,
    directory: MemoryDirectory,
    providers: MemoryProviders,
}

impl Bench {
    fn disk(&self, providers: &MemoryProviders) -> VirtualDisk {
        VirtualDisk::new(
            self.volume,
            self.key.clone(),
            self.code,
            DiskConfig { cache_bytes: 8 << 20, ..DiskConfig::default() },
            Arc::new(self.directory.clone()),
            Arc::new(providers.clone()),
        )
    }
}

fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

fn report(what: &str, bytes: usize, wall: Duration, cpu: Duration) {
    let gigabytes = bytes as f64 / 1e9;
    println!(
        "  {what:<46} {:>7.2} GB/s {:>8.3} CPU s/GB",
        gigabytes / wall.as_secs_f64(),
        cpu.as_secs_f64() / gigabytes
    );
}

/// Repeats `work`, which answers the bytes it moved, for about [`ROUND`].
async fn measure(what: &str, mut work: impl AsyncFnMut() -> usize) {
    work().await;
    let (started, cpu) = (Instant::now(), cpu_time());
    let mut bytes = 0;
    while started.elapsed() < ROUND {
        bytes += work().await;
    }
    report(what, bytes, started.elapsed(), cpu_time() - cpu);
}

async fn store(disk: &VirtualDisk, content: &Bytes, at_once: usize) -> Vec<BlockInfo> {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
    let stores = (0..at_once).map(|_| disk.store(vec![content.clone()], deadline));
    let mut blocks = Vec::new();
    for stored in futures::future::join_all(stores).await {
        let mut stored = stored.expect("memory takes it");
        while stored.late.next().await.is_some() {}
        blocks.push(stored.info);
    }
    blocks
}

async fn limits(bench: &Bench, content: &Bytes) {
    let mut copy = vec![0u8; content.len()];
    measure("memcpy of a block", async || {
        copy.copy_from_slice(content);
        std::hint::black_box(&mut copy).len()
    })
    .await;
    let geometry = BlockGeometry::new(bench.code, content.len()).expect("a full block");
    let mut sealed = vec![0u8; bench.code.s() * geometry.fragment_bytes()];
    measure("seal only, one thread", async || {
        let sealer = BlockSealer::new(&bench.key, bench.volume, FreshBlockId::generate());
        sealer.seal_block(&geometry, &[content], &mut sealed).expect("lengths fit");
        content.len()
    })
    .await;
}

async fn reads(bench: &Bench, content: &Bytes) {
    let disk = bench.disk(&bench.providers);
    let blocks = store(&disk, content, 16).await;
    for (what, dead) in [("read whole blocks, 4 at once", 0), ("the same, one provider dead", 1)] {
        for id in 0..dead {
            let fault = us_core::disk::memory::Fault::Dead;
            bench.providers.set_fault(blocks[0].providers[id], fault);
        }
        let (mut at, before) = (0, bench.providers.gets());
        measure(what, async || {
            let reads = (0..4).map(|by| disk.read(&blocks[(at + by) % 16], 0..content.len()));
            let pieces = futures::future::join_all(reads).await;
            at += 4;
            pieces.into_iter().flatten().flatten().map(|piece| piece.len()).sum()
        })
        .await;
        let gets = (bench.providers.gets() - before) as f64 / at as f64;
        println!("  {gets:>60.2} gets a block");
    }
    bench.providers.heal();
    let mut at = 0;
    let started = Instant::now();
    let mut count = 0u32;
    measure("read 4 KiB at random, one at a time", async || {
        at = (at + 7_919_017) % (16 * content.len() - 16 * 4096);
        count += 1;
        let (block, offset) = (at / content.len(), at % (content.len() - 4096));
        let pieces = disk.read(&blocks[block], offset..offset + 4096).await;
        std::hint::black_box(pieces).map(|_| 4096).unwrap_or(0)
    })
    .await;
    println!("  {:>60.1} us each", started.elapsed().as_secs_f64() * 1e6 / f64::from(count));
}

fn main() {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    for (s, r) in [(4, 2), (10, 4)] {
        let code = Code::new(s, r).expect("a code");
        let bench = Bench {
            volume: VolumeId::generate(),
            key: VolumeKey::generate(),
            code,
            directory: MemoryDirectory::new(code, (1..=(s + r) as u32).map(ProviderId)),
            providers: MemoryProviders::new(),
        };
        let content = Bytes::from(vec![0x5A; code.block_bytes_max()]);
        println!("code {code}, blocks of {} bytes", content.len());
        runtime.block_on(async {
            limits(&bench, &content).await;
            let forgetful = bench.disk(&MemoryProviders::forgetful());
            for at_once in [1, 4] {
                measure(&format!("store, {at_once} at once"), async || {
                    store(&forgetful, &content, at_once).await.len() * content.len()
                })
                .await;
            }
            reads(&bench, &content).await;
        });
    }
}
