//! kill -9 of a provider, the directory or the mount at random moments under load: every byte that
//! fsync acknowledged is there.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use us_tests::cluster::{Cluster, Shape, fuse_is_here};
use us_tests::manifest::Manifest;
use us_tests::poll;
use us_tests::tier::{rounds, seed};

/// How long mending may take.
const HEALED: Duration = Duration::from_secs(180);

#[test]
fn what_fsync_acknowledged_survives_pulled_plugs() {
    if !fuse_is_here() {
        return;
    }
    let mut random = StdRng::seed_from_u64(seed());
    let mut cluster = Cluster::start(Shape::default());
    let mut mount = cluster.mount();
    let mut manifest = Manifest::default();
    for round in 0..rounds(5, 50, 500) {
        let stop = Arc::new(AtomicBool::new(false));
        let folder = mount.path().to_path_buf();
        let before = manifest.files();
        let worker = thread::spawn({
            let stop = stop.clone();
            move || {
                manifest.work(&folder, &stop);
                manifest
            }
        });
        // The random moment is the point of the test, not a wait for anything.
        let moment = Duration::from_millis(random.random_range(300..3000));
        thread::park_timeout(moment);
        let victim = random.random_range(0..3);
        eprintln!(
            "round {round}: after {moment:?}, kill {}",
            ["provider", "directory", "mount"][victim]
        );
        match victim {
            0 => {
                let provider = random.random_range(0..6);
                cluster.kill_provider(provider);
                thread::park_timeout(Duration::from_millis(random.random_range(0..1500)));
                cluster.start_provider(provider);
                stop.store(true, Ordering::Relaxed);
                manifest = worker.join().unwrap();
            }
            1 => {
                cluster.kill_directory();
                thread::park_timeout(Duration::from_millis(random.random_range(0..1500)));
                cluster.start_directory();
                stop.store(true, Ordering::Relaxed);
                manifest = worker.join().unwrap();
                // A mount outlives its directory: nothing it did is lost, synced or not.
            }
            _ => {
                mount.kill();
                stop.store(true, Ordering::Relaxed);
                manifest = worker.join().unwrap();
                mount = cluster.mount();
            }
        }
        cluster.wait_online(6);
        manifest.check(mount.path());
        if round % 5 == 4 {
            // And without this mount's caches.
            mount.unmount();
            mount = cluster.mount();
            manifest.check(mount.path());
        }
        eprintln!("round {round}: {} files acknowledged", manifest.files() - before);
    }
    assert!(manifest.files() > 0, "the load did nothing");
    // A put that its provider's death cut short is made again.
    cluster.wait_settled();
    poll::until("full redundancy", HEALED, || match cluster.status_code() {
        0 => Ok(()),
        code => Err(format!("status {code}: {:?}", cluster.status())),
    });
    mount.unmount();
}
