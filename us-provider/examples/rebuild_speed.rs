//! How fast fragments are rebuilt over loopback TLS, all in one process.
//!
//! `cargo run --release -p us-provider --example rebuild_speed [FRAGMENTS]`. For each path: fragments
//! of about 1 MiB of 4+2 blocks made again on a provider that has none. Prints MB/s of rebuilt
//! fragments, and CPU seconds of the whole process (sources, rebuilder, its disk) for each GB of them.

#[path = "../samples/swarm.rs"]
mod swarm;

use std::time::{Duration, Instant};

use us_proto::v1::{RebuildPath, RebuildStatus};

use swarm::{SampleBlock, Swarm};

/// Orders given at once: as many as are at work and a few that wait.
const ORDERS: usize = 16;

#[tokio::main]
async fn main() {
    let count = std::env::args().nth(1).map_or(64, |count| count.parse().expect("a number"));
    let swarm = Swarm::start(6).await;
    let bytes = 4 * 64 * 16384 - 4 * 16384;
    let mut blocks = Vec::with_capacity(count);
    for seed in 0..count as u64 {
        let block = SampleBlock::new(4, 2, bytes, seed);
        swarm.put(&block, |_, record| Some(record.clone())).await;
        blocks.push(block);
    }
    let paths =
        [RebuildPath::Star, RebuildPath::RotatedStar, RebuildPath::Chain, RebuildPath::Sites];
    for path in paths {
        let mut target = swarm.newcomer().await;
        let orders: Vec<_> = blocks.iter().map(|block| swarm.order(block, &[5], path)).collect();
        let (begun, cpu) = (Instant::now(), cpu_time());
        for orders in orders.chunks(ORDERS) {
            for rebuilt in target.rebuild_all(orders).await {
                assert_eq!(rebuilt.status(), RebuildStatus::Ok, "{}", rebuilt.detail);
            }
        }
        let (elapsed, cpu) = (begun.elapsed(), cpu_time() - cpu);
        let made = (count * blocks[0].geometry.fragment_bytes()) as f64;
        println!(
            "{:28} {count} fragments  {:7.1} MB/s  {:5.2} CPU s/GB",
            path.as_str_name(),
            made / 1e6 / elapsed.as_secs_f64(),
            cpu.as_secs_f64() / (made / 1e9),
        );
    }
}

/// CPU time of the process so far.
fn cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}
