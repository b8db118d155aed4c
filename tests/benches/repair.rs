//! How long a swarm takes to make a lost disk's fragments again, and what it moves for that: six
//! providers on this machine, 4+2, one provider's disk replaced by an empty one. Where GlusterFS is
//! installed it heals the same in the same run (`gluster_heal.sh`), and the ratio is printed.
//!
//!     cargo bench -p us-tests --bench repair [-- MIB [ROUNDS]]
//!
//! They take turns, three rounds of 2 GiB unless told otherwise; the ratios are of the medians. The
//! least that can be moved is s fragments for each one made. CPU seconds are those of all processes of
//! the cluster.

use std::fs::{self, File};
use std::io::Write;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use us_proto::v1::{ProviderState, StatusReply};
use us_tests::admin::{is_whole, provider};
use us_tests::cluster::{Cluster, Shape, fuse_is_here};
use us_tests::tree::noise;

/// The provider whose disk is replaced.
const VICTIM: usize = 2;
const PATIENCE: Duration = Duration::from_secs(600);
/// How often the directory is asked how it is.
const LOOK_EVERY: Duration = Duration::from_millis(20);
const FILE_MIB: u64 = 64;
/// Data and spare fragments of the cluster's code.
const S: u64 = 4;
const R: i32 = 2;

fn sent(status: &StatusReply) -> u64 {
    status.providers.iter().map(|provider| provider.repair_sent_bytes).sum()
}

/// What a repair took.
struct Repair {
    seconds: f64,
    cpu_seconds: f64,
}

fn repair(mib: u64) -> Repair {
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
    let mut admin = cluster.admin();
    let before = admin.status().expect("status");
    cluster.stop_provider(VICTIM);
    let data = cluster.provider_data(VICTIM);
    let address = fs::read(data.join("address")).expect("its address");
    fs::remove_dir_all(&data).expect("its disk is gone");
    fs::create_dir(&data).expect("a new disk");
    fs::write(data.join("address"), address).expect("the same port");
    let blocks = before.blocks.clone().unwrap_or_default();
    let wanted = blocks.total - blocks.inline;
    let made_before = before.repair.unwrap_or_default();
    rustix::fs::sync();
    let cpu_before = cluster.cpu_seconds();
    let begun = Instant::now();
    cluster.start_provider(VICTIM);
    let (mut online, mut first) = (None, None);
    let after = loop {
        let status = admin.status().expect("status");
        let now = begun.elapsed().as_secs_f64();
        let made = status.repair.unwrap_or_default().done_blocks - made_before.done_blocks;
        let victim = provider(&status, &format!("provider{VICTIM}")).expect("it is known");
        if victim.state() == ProviderState::Online {
            online.get_or_insert(now);
        }
        if made > 0 {
            first.get_or_insert(now);
        }
        if made >= wanted && is_whole(&status, R).is_ok() {
            break status;
        }
        assert!(begun.elapsed() < PATIENCE, "not whole in {PATIENCE:?}: {made} of {wanted}");
        std::thread::sleep(LOOK_EVERY);
    };
    let seconds = begun.elapsed().as_secs_f64();
    let cpu_seconds = cluster.cpu_seconds() - cpu_before;
    let made_bytes = after.repair.unwrap_or_default().done_bytes - made_before.done_bytes;
    let moved = sent(&after) - sent(&before);
    println!("{mib} MiB in 4+2, one disk of six replaced: {wanted} fragments made again");
    println!("online and checked                  {:.2} s", online.unwrap_or_default());
    println!("first fragment made                 {:.2} s", first.unwrap_or_default());
    println!("from its start to full redundancy   {seconds:.2} s");
    println!("made                                {:.0} MiB", made_bytes as f64 / 1048576.0);
    println!("moved                               {:.0} MiB", moved as f64 / 1048576.0);
    println!("moved / least                       {:.3}", moved as f64 / (S * made_bytes) as f64);
    println!("CPU seconds                         {cpu_seconds:.1}");
    Repair { seconds, cpu_seconds }
}

/// What GlusterFS takes; `None` where it is not installed or does not run.
fn gluster(mib: u64) -> Option<Repair> {
    let here = ["glusterd", "gluster", "unshare", "setfattr"].iter().all(|tool| {
        let mut looked = Command::new("sh");
        let looked = looked.args(["-c", &format!("command -v {tool}")]);
        looked.stdout(Stdio::null()).status().is_ok_and(|status| status.success())
    });
    if !here {
        println!("GlusterFS is not installed (glusterfs-server, attr): no comparison");
        return None;
    }
    let folder = tempfile::Builder::new().prefix("us-gluster-").tempdir().ok()?;
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/gluster_heal.sh");
    let output = Command::new(script).arg(folder.path()).arg(mib.to_string()).output().ok()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let figures: Vec<f64> = said.split_whitespace().filter_map(|one| one.parse().ok()).collect();
    let [seconds, cpu_seconds, read_mib] = figures[..] else {
        println!("GlusterFS did not heal: {}", String::from_utf8_lossy(&output.stderr).trim());
        return None;
    };
    println!("GlusterFS, the same                 {seconds:.2} s");
    println!("  CPU seconds                       {cpu_seconds:.1}");
    println!("  read by the other bricks          {read_mib:.0} MiB");
    Some(Repair { seconds, cpu_seconds })
}

fn median(of: impl Fn(&Repair) -> f64, repairs: &[Repair]) -> f64 {
    let mut values: Vec<f64> = repairs.iter().map(of).collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    if !fuse_is_here() {
        return;
    }
    let mut numbers = std::env::args().filter_map(|text| text.parse::<u64>().ok());
    let (mib, rounds) = (numbers.next().unwrap_or(2048), numbers.next().unwrap_or(3));
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..rounds.max(1) {
        ours.push(repair(mib));
        theirs.extend(gluster(mib));
    }
    let seconds = median(|one| one.seconds, &ours);
    println!("median seconds                      {seconds:.2}");
    if !theirs.is_empty() {
        let cpu_seconds = median(|one| one.cpu_seconds, &ours);
        let (their_seconds, their_cpu) =
            (median(|one| one.seconds, &theirs), median(|one| one.cpu_seconds, &theirs));
        println!("GlusterFS / Us, seconds             {:.2}", their_seconds / seconds);
        println!("GlusterFS / Us, CPU seconds         {:.2}", their_cpu / cpu_seconds);
    }
}
