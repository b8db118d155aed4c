//! The swarm heals itself, on real processes: what is lost for good is made again while work goes
//! on, an evening is not taken for an epidemic, and nobody's crash in the middle loses anything.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use us_tests::cluster::{Cluster, PATIENCE, Shape, fuse_is_here};
use us_tests::manifest::Manifest;
use us_tests::tree::noise;
use us_tests::{poll, tier};

/// How long the slowest repair of a test may take.
const HEALED: Duration = Duration::from_secs(240);
/// Files of a volume's data.
const FILES: u64 = 24;
const FILE_BYTES: usize = 4 << 20;

/// Providers that are given up after a few seconds.
fn hasty(providers: usize) -> Shape {
    let directory = &["--absent-ms", "500", "--dead-ms", "3000", "--newcomer-ms", "3000"];
    Shape { providers, directory, ..Shape::default() }
}

fn fill(folder: &Path) -> Vec<Vec<u8>> {
    let files: Vec<Vec<u8>> = (0..FILES).map(|seed| noise(seed, FILE_BYTES)).collect();
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

/// Waits until every block has all its fragments on living providers, and says what was made.
fn wait_whole(cluster: &Cluster) -> serde_json::Value {
    poll::until("full redundancy", HEALED, || {
        let status = cluster.status()?;
        let repair = &status["repair"];
        let idle = repair["queued"] == 0 && repair["running"] == 0 && repair["waiting"] == 0;
        let lacking = status["blocks"]["by_durability"]
            .as_object()
            .ok_or("no blocks")?
            .keys()
            .any(|left| left != "2");
        let whole = idle && !lacking && repair["scanning"] == false && status["counting"] == false;
        whole.then(|| status.clone()).ok_or(format!("{repair} {}", status["blocks"]))
    })
}

fn state_of(status: &serde_json::Value, provider: usize) -> String {
    let name = format!("provider{provider}");
    let all = status["providers"].as_array().unwrap();
    let found = all.iter().find(|one| one["name"] == name).unwrap();
    found["state"].as_str().unwrap().to_owned()
}

fn made(cluster: &Cluster) -> u64 {
    cluster.status().unwrap()["repair"]["done_blocks"].as_u64().unwrap()
}

#[test]
fn what_a_dead_provider_held_is_made_again_while_work_goes_on() {
    if !fuse_is_here() {
        return;
    }
    let mut cluster = Cluster::start(hasty(8));
    let mount = cluster.mount();
    let files = fill(mount.path());
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
        cluster.kill_provider(3);
        poll::until("its death", PATIENCE, || {
            let status = cluster.status()?;
            let state = state_of(&status, 3);
            (state == "dead").then_some(()).ok_or(state)
        });
        check(mount.path(), &files);
        poll::until("something to be made", HEALED, || {
            (made(&cluster) > 0).then_some(()).ok_or("nothing yet".to_owned())
        });
        stop.store(true, Ordering::Relaxed);
        let mut manifest = worker.join().unwrap();
        wait_whole(&cluster);
        manifest.check(work);
    });
    // Two more for good: without the repair the first three would have been one too many.
    mount.unmount();
    cluster.kill_provider(0);
    cluster.kill_provider(5);
    let mount = cluster.mount();
    check(mount.path(), &files);
    mount.unmount();
}

#[test]
fn eighty_percent_go_home_and_come_back_without_any_repair() {
    if !fuse_is_here() {
        return;
    }
    let mut cluster = Cluster::start(hasty(10));
    let mount = cluster.mount();
    let files = fill(mount.path());
    mount.unmount();
    cluster.wait_settled();
    (0..8).for_each(|number| cluster.kill_provider(number));
    poll::until("the brake", PATIENCE, || {
        let status = cluster.status()?;
        (status["braked"].as_u64() >= Some(8)).then_some(()).ok_or(status["braked"].to_string())
    });
    let status = cluster.status().unwrap();
    assert_eq!((&status["blocks"]["lost"], state_of(&status, 0).as_str()), (&0.into(), "dormant"));
    (0..8).for_each(|number| cluster.start_provider(number));
    cluster.wait_online(10);
    wait_whole(&cluster);
    assert_eq!(made(&cluster), 0);
    let mount = cluster.mount();
    check(mount.path(), &files);
    mount.unmount();
}

#[test]
fn a_replaced_disk_is_filled_again() {
    if !fuse_is_here() {
        return;
    }
    let mut cluster = Cluster::start(Shape::default());
    let mount = cluster.mount();
    let files = fill(mount.path());
    mount.unmount();
    cluster.wait_settled();
    cluster.stop_provider(2);
    let data = cluster.provider_data(2);
    let address = fs::read(data.join("address")).unwrap();
    fs::remove_dir_all(&data).unwrap();
    // The same machine with a new disk: the same key, the same port.
    fs::create_dir(&data).unwrap();
    fs::write(data.join("address"), address).unwrap();
    cluster.start_provider(2);
    cluster.wait_online(6);
    let before = cluster.status().unwrap()["blocks"]["total"].as_u64().unwrap();
    poll::until("its fragments to be made again", HEALED, || {
        let (made, inline) = (made(&cluster), cluster.status()?["blocks"]["inline"].as_u64());
        (made + inline.unwrap() >= before).then_some(()).ok_or(format!("{made} of {before}"))
    });
    wait_whole(&cluster);
    // What was made again is good: two others go, and it is needed.
    cluster.kill_provider(0);
    cluster.kill_provider(1);
    let mount = cluster.mount();
    check(mount.path(), &files);
    mount.unmount();
}

#[test]
fn a_drained_provider_can_be_taken_away() {
    if !fuse_is_here() {
        return;
    }
    let mut cluster = Cluster::start(Shape { providers: 7, ..Shape::default() });
    let mount = cluster.mount();
    let files = fill(mount.path());
    cluster.wait_settled();
    let said = cluster.usctl(&["drain", "provider4", "--wait"]);
    assert!(said.contains("it can be taken away"), "{said}");
    let worst = cluster.status().unwrap()["providers"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| one["repair_worst_fragments"].as_u64().unwrap())
        .max()
        .unwrap();
    assert!(worst > 0);
    cluster.stop_provider(4);
    cluster.kill_provider(0);
    cluster.kill_provider(1);
    check(mount.path(), &files);
    let foretold = cluster.usctl(&["what-if", "--without", "provider2", "--json"]);
    let foretold: serde_json::Value = serde_json::from_str(&foretold).unwrap();
    assert!(foretold["unreadable"].as_u64() > Some(0), "{foretold}");
    assert!(!foretold["files"].as_array().unwrap().is_empty());
    let events = cluster.usctl(&["events"]);
    assert!(events.contains("drain-begun") && events.contains("drain-done"), "{events}");
    mount.unmount();
}

#[test]
fn crashes_in_the_middle_of_repairs_lose_and_double_nothing() {
    if !fuse_is_here() {
        return;
    }
    let rounds = tier::rounds(3, 30, 100);
    let mut random = StdRng::seed_from_u64(tier::seed());
    let mut cluster = Cluster::start(hasty(8));
    let mount = cluster.mount();
    let files = fill(mount.path());
    mount.unmount();
    cluster.wait_settled();
    for round in 0..rounds {
        let victim = random.random_range(0..8);
        println!("round {round}: provider {victim} is replaced");
        cluster.stop_provider(victim);
        let data = cluster.provider_data(victim);
        let address = fs::read(data.join("address")).unwrap();
        fs::remove_dir_all(&data).unwrap();
        fs::create_dir(&data).unwrap();
        fs::write(data.join("address"), address).unwrap();
        cluster.start_provider(victim);
        // The moment is random, whatever it hits.
        thread::park_timeout(Duration::from_millis(random.random_range(0..1500)));
        if random.random_bool(0.5) {
            cluster.kill_directory();
            cluster.start_directory();
        }
        thread::park_timeout(Duration::from_millis(random.random_range(0..500)));
        let rebuilder = random.random_range(0..8);
        cluster.kill_provider(rebuilder);
        cluster.start_provider(rebuilder);
        cluster.wait_online(8);
        wait_whole(&cluster);
        let mount = cluster.mount();
        check(mount.path(), &files);
        mount.unmount();
    }
}
