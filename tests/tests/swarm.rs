//! Twenty providers, real processes: deaths, a whole site gone, and lines as slow as at home.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use us_core::placement::helpers::{Rebuild, Senders, assign};
use us_proto::v1::{ProviderState, StatusReply};
use us_tests::admin::{is_whole, provider};
use us_tests::cluster::{Cluster, PATIENCE, Shape, fuse_is_here};
use us_tests::manifest::Manifest;
use us_tests::netns::{Net, namespaces_are_here};
use us_tests::poll;
use us_tests::tree::noise;

const PROVIDERS: usize = 20;
/// Of the code.
const S: usize = 4;
const R: i32 = 2;
/// How long the slowest repair of a test may take.
const HEALED: Duration = Duration::from_secs(240);

fn fill(folder: &Path, files: u64, bytes: usize) -> Vec<Vec<u8>> {
    let files: Vec<Vec<u8>> = (0..files).map(|seed| noise(seed, bytes)).collect();
    for (number, bytes) in files.iter().enumerate() {
        let path = folder.join(format!("file{number}"));
        fs::write(&path, bytes).unwrap();
        fs::File::open(&path).unwrap().sync_all().unwrap();
    }
    files
}

fn check(folder: &Path, files: &[Vec<u8>]) {
    for (number, bytes) in files.iter().enumerate() {
        let read = fs::read(folder.join(format!("file{number}"))).unwrap();
        assert!(read == *bytes, "file{number}: wrong bytes");
    }
}

fn state(status: &StatusReply, number: usize) -> ProviderState {
    provider(status, &format!("provider{number}")).unwrap().state()
}

fn wait_whole(cluster: &Cluster) -> StatusReply {
    let mut admin = cluster.admin();
    poll::until("full redundancy", HEALED, || {
        let status = admin.status()?;
        is_whole(&status, R).map(|()| status)
    })
}

#[test]
fn a_death_under_load_and_then_a_whole_site() {
    if !fuse_is_here() {
        return;
    }
    let directory = &["--absent-ms", "500", "--dead-ms", "3000", "--newcomer-ms", "3000"];
    let shape = Shape { providers: PROVIDERS, sites: 5, directory, ..Shape::default() };
    let mut cluster = Cluster::start(shape);
    let mount = cluster.mount();
    let files = fill(mount.path(), 20, 2 << 20);
    cluster.wait_settled();
    let stop = AtomicBool::new(false);
    let work = mount.path().join("work");
    fs::create_dir(&work).unwrap();
    thread::scope(|scope| {
        let (stop, work) = (&stop, &work);
        let worker = scope.spawn(move || {
            let mut manifest = Manifest::default();
            manifest.work(work, stop);
            manifest
        });
        cluster.kill_provider(7);
        let mut admin = cluster.admin();
        poll::until("its death and what it held", HEALED, || {
            let status = admin.status()?;
            let made = status.repair.unwrap_or_default().done_blocks;
            let dead = state(&status, 7) == ProviderState::Dead;
            (dead && made > 0).then_some(()).ok_or(format!("{made} made"))
        });
        check(mount.path(), &files);
        stop.store(true, Ordering::Relaxed);
        let mut manifest = worker.join().unwrap();
        wait_whole(&cluster);
        manifest.check(work);
    });
    // Site 0: all of it, at once. Nobody is taken for dead, and everything can be read.
    let site: Vec<usize> = (0..PROVIDERS).step_by(5).collect();
    site.iter().for_each(|number| cluster.kill_provider(*number));
    let mut admin = cluster.admin();
    poll::until("the brake", PATIENCE, || {
        let status = admin.status()?;
        (status.braked as usize >= site.len()).then_some(()).ok_or(format!("{}", status.braked))
    });
    let status = admin.status().unwrap();
    let blocks = status.blocks.clone().unwrap();
    assert_eq!((blocks.lost, blocks.waiting), (0, 0), "a site holds no more than r: {blocks:?}");
    assert_eq!(state(&status, site[0]), ProviderState::Dormant);
    check(mount.path(), &files);
    // It burnt down, its owner says: the other four sites hold everything again.
    for number in &site {
        cluster.usctl(&["give-up", &format!("provider{number}"), "--yes"]);
    }
    wait_whole(&cluster);
    check(mount.path(), &files);
    mount.unmount();
}

/// The holders of every block of these files, by fragment, and the bytes of a block.
fn holders(cluster: &Cluster, folder: &Path, files: usize) -> Vec<(Vec<u32>, u64)> {
    let blocks = (0..files).flat_map(|number| {
        let path = folder.join(format!("file{number}"));
        let text = cluster.usctl(&["where", "--json", path.to_str().unwrap()]);
        let place: serde_json::Value = serde_json::from_str(&text).unwrap();
        place["blocks"].as_array().unwrap().clone()
    });
    let mut known = BTreeMap::new();
    for block in blocks.filter(|block| block["inline"] == false) {
        let fragments = block["fragments"].as_array().unwrap();
        let holders: Vec<u32> =
            fragments.iter().map(|one| one["provider"].as_u64().unwrap() as u32).collect();
        let bytes = block["plaintext_bytes"].as_u64().unwrap();
        known.insert(block["block"].as_str().unwrap().to_owned(), (holders, bytes));
    }
    known.into_values().collect()
}

/// The figure in docs/placement.md, "Slow lines": what the plan says the busiest survivor has to send, and
/// what leaves its interface.
#[test]
fn on_slow_lines_the_busiest_sends_no_more_than_the_plan_says() {
    /// What a node may send beside fragments while it lasts: handshakes, heartbeats.
    const BESIDE_BYTES: u64 = 24 << 10;
    /// Of a line this slow each segment of 1,448 bytes is acknowledged by 66: in percent of what a node
    /// received. One that makes two fragments itself receives eight.
    const ACKNOWLEDGED_PERCENT: u64 = 5;
    /// Headers of TLS, TCP, IP and Ethernet, and what is sent again, in percent of the fragments.
    const OVERHEAD_PERCENT: u64 = 12;
    if !fuse_is_here() || !namespaces_are_here() {
        return;
    }
    let net = Arc::new(Net::new(PROVIDERS, Some("128kbit"), Some("10mbit"), 1, None));
    let shape = Shape {
        providers: PROVIDERS,
        directory: &[
            "--absent-ms",
            "500",
            "--dead-ms",
            "3000",
            "--newcomer-ms",
            "3000",
            "--repair-uplink-percent",
            "90",
            // Whole fragments that are no repair's; that they wait for repairs is the engine's test.
            "--audit-every-ms",
            "0",
        ],
        provider: &["--uplink-kib-per-s", "16", "--downlink-kib-per-s", "1220"],
        net: Some(Arc::clone(&net)),
        ..Shape::default()
    };
    let mut cluster = Cluster::start(shape);
    let mount = cluster.mount();
    let files = fill(mount.path(), 24, 512 << 10);
    cluster.wait_settled();
    let blocks = holders(&cluster, mount.path(), files.len());
    let fragment_bytes = blocks.iter().map(|(_, bytes)| bytes.div_ceil(S as u64)).max().unwrap();
    let mut admin = cluster.admin();
    let before = admin.status().unwrap();
    let numbers: Vec<u32> = (0..PROVIDERS)
        .map(|number| provider(&before, &format!("provider{number}")).unwrap().provider)
        .collect();
    // The one that holds the most dies.
    let held = |victim: &usize| {
        blocks.iter().filter(|(holders, _)| holders.contains(&numbers[*victim])).count()
    };
    let victim = (0..PROVIDERS).max_by_key(held).unwrap();
    let rebuilds: Vec<Rebuild> = blocks
        .iter()
        .filter(|(holders, _)| holders.contains(&numbers[victim]))
        .map(|(holders, _)| {
            let at = |holder: &u32| numbers.iter().position(|number| number == holder).unwrap();
            let holders = holders.iter().map(at).filter(|at| *at != victim).collect();
            Rebuild { holders, needed: S }
        })
        .collect();
    let cost = assign(&Senders::equal(PROVIDERS), &rebuilds).busiest();
    let counters = |node: usize| (net.sent_bytes(node), net.received_bytes(node));
    let counted_before: Vec<(u64, u64)> = (0..PROVIDERS).map(counters).collect();
    cluster.kill_provider(victim);
    poll::until("its death", HEALED, || {
        let status = admin.status()?;
        let state = state(&status, victim);
        (state == ProviderState::Dead).then_some(()).ok_or(format!("{state:?}"))
    });
    let after = wait_whole(&cluster);
    let survivors = (0..PROVIDERS).filter(|node| *node != victim);
    let counted = survivors.clone().map(|node| {
        let (now, before) = (counters(node), counted_before[node]);
        (now.0 - before.0, now.1 - before.1)
    });
    let (sent, received): (Vec<u64>, Vec<u64>) = counted.unzip();
    let asked: Vec<u64> = survivors
        .map(|node| provider(&after, &format!("provider{node}")).unwrap().repair_sent_bytes)
        .collect();
    let (busiest, most) = (*sent.iter().max().unwrap(), *asked.iter().max().unwrap());
    println!("{} blocks of {S}+{R} lost a fragment of {fragment_bytes} bytes", rebuilds.len());
    println!("plan: the busiest survivor sends {cost} fragments");
    println!("asked of it:                     {:.2}", most as f64 / fragment_bytes as f64);
    println!("left its interface, all told:    {:.2}", busiest as f64 / fragment_bytes as f64);
    println!("every survivor's, in fragments:  {:.1?}", {
        let mut all: Vec<f64> =
            sent.iter().map(|one| *one as f64 / fragment_bytes as f64).collect();
        all.sort_by(f64::total_cmp);
        all
    });
    println!("orders that failed:              {}", after.repair.unwrap_or_default().failed);
    // Slots carry a seal of 16 bytes a page.
    let plan_bytes = (cost * fragment_bytes as f64 * 1.005) as u64;
    assert!(most <= plan_bytes, "asked for {most}, planned {plan_bytes}");
    let allowed = plan_bytes * (100 + OVERHEAD_PERCENT) / 100 + BESIDE_BYTES;
    let most_allowed = allowed + (40 << 10);
    assert!(busiest <= most_allowed, "{busiest} bytes left the busiest: {sent:?}");
    for (sent, received) in sent.iter().zip(&received) {
        let own = sent.saturating_sub(received * ACKNOWLEDGED_PERCENT / 100);
        assert!(
            own <= allowed,
            "{sent} bytes left a node that received {received}, planned {plan_bytes}"
        );
    }
    check(mount.path(), &files[..2]);
    mount.unmount();
}
