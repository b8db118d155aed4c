//! How long a swarm takes to make a lost disk's fragments again, and what it moves for that: six
//! providers on this machine, 4+2, one provider's disk replaced by an empty one.
//!
//!     cargo bench -p us-tests --bench repair [-- MIB]
//!
//! The least that can be moved is s fragments for each one made. CPU seconds are those of all
//! processes of the cluster.

use std::fs::{self, File};
use std::io::Write;
use std::time::{Duration, Instant};

use us_tests::cluster::{Cluster, Shape, fuse_is_here};
use us_tests::poll;
use us_tests::tree::noise;

/// The provider whose disk is replaced.
const VICTIM: usize = 2;
const PATIENCE: Duration = Duration::from_secs(600);
const FILE_MIB: u64 = 64;
/// Data fragments of the cluster's code.
const S: u64 = 4;

fn sum(status: &serde_json::Value, field: &str) -> u64 {
    let providers = status["providers"].as_array().expect("providers");
    providers.iter().filter_map(|provider| provider[field].as_u64()).sum()
}

fn main() {
    if !fuse_is_here() {
        return;
    }
    let mib: u64 = std::env::args().filter_map(|text| text.parse().ok()).next().unwrap_or(2048);
    let mut cluster = Cluster::start(Shape::default());
    let mount = cluster.mount();
    for number in 0..mib.div_ceil(FILE_MIB) {
        let bytes = noise(number, (FILE_MIB << 20) as usize);
        let mut file = File::create(mount.path().join(number.to_string())).expect("a file");
        file.write_all(&bytes).expect("written");
        file.sync_all().expect("synced");
    }
    mount.unmount();
    cluster.wait_settled();
    cluster.stop_provider(VICTIM);
    let data = cluster.provider_data(VICTIM);
    let address = fs::read(data.join("address")).expect("its address");
    fs::remove_dir_all(&data).expect("its disk is gone");
    fs::create_dir(&data).expect("a new disk");
    fs::write(data.join("address"), address).expect("the same port");
    let before = cluster.status().expect("status");
    let wanted = before["blocks"]["total"].as_u64().unwrap_or(0)
        - before["blocks"]["inline"].as_u64().unwrap_or(0);
    let cpu_before = cluster.cpu_seconds();
    let begun = Instant::now();
    cluster.start_provider(VICTIM);
    let after = poll::until("full redundancy", PATIENCE, || {
        let status = cluster.status()?;
        let repair = &status["repair"];
        let made = repair["done_blocks"].as_u64().unwrap_or(0);
        let whole = status["health"] == "ok" && made >= wanted;
        whole.then(|| status.clone()).ok_or(format!("{made} of {wanted} {repair}"))
    });
    let seconds = begun.elapsed().as_secs_f64();
    let cpu = cluster.cpu_seconds() - cpu_before;
    let made_bytes = after["repair"]["done_bytes"].as_u64().unwrap_or(0);
    let moved = sum(&after, "repair_sent_bytes") - sum(&before, "repair_sent_bytes");
    println!("{mib} MiB in 4+2, one disk of six replaced: {wanted} fragments made again");
    println!("from its start to full redundancy   {seconds:.2} s");
    println!("made                                {:.0} MiB", made_bytes as f64 / 1048576.0);
    println!("moved                               {:.0} MiB", moved as f64 / 1048576.0);
    println!("moved / least                       {:.3}", moved as f64 / (S * made_bytes) as f64);
    println!("CPU seconds                         {cpu:.1}");
}
