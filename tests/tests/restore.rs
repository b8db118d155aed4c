//! The directory's disk is lost, and nothing that fsync acknowledged with it.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use us_tests::cluster::{Cluster, Mount, PATIENCE, Shape, fuse_is_here};
use us_tests::manifest::Manifest;
use us_tests::poll;
use us_tests::tree::noise;

/// A journal of one MiB: images come soon.
const SMALL: &[&str] = &["--journal-mib", "1"];

struct Load {
    stop: Arc<AtomicBool>,
    worker: JoinHandle<Manifest>,
}

impl Load {
    fn start(mut manifest: Manifest, folder: &Path) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (folder, stopped) = (folder.to_path_buf(), stop.clone());
        let worker = thread::spawn(move || {
            manifest.work(&folder, &stopped);
            manifest
        });
        Self { stop, worker }
    }

    fn end(self) -> Manifest {
        self.stop.store(true, Ordering::Relaxed);
        self.worker.join().unwrap()
    }
}

fn write_synced(path: &Path, bytes: &[u8]) {
    let mut file = File::create(path).unwrap();
    file.write_all(bytes).unwrap();
    file.sync_all().unwrap();
}

/// Under load until at least this many images of the state are in the swarm.
fn work_until_image(cluster: &Cluster, mount: &Mount, manifest: Manifest) -> Manifest {
    let before = image_sequence(cluster).unwrap();
    let load = Load::start(manifest, mount.path());
    poll::until("an image in the swarm", Duration::from_secs(180), || {
        let now = image_sequence(cluster)?;
        (now > before).then_some(()).ok_or(format!("it covers {now}"))
    });
    load.end()
}

fn image_sequence(cluster: &Cluster) -> Result<u64, String> {
    cluster.status()?["journal"]["image_sequence"].as_u64().ok_or("no number".to_owned())
}

/// Nothing was lost: the mount that was there, and a fresh one, have it all.
fn check(cluster: &mut Cluster, mount: Mount, manifest: &mut Manifest) -> Mount {
    manifest.check(mount.path());
    mount.unmount();
    let mount = cluster.mount();
    manifest.check(mount.path());
    mount
}

#[test]
fn a_lost_directory_comes_back_under_load_with_everything_acknowledged() {
    if !fuse_is_here() {
        return;
    }
    let mut cluster = Cluster::start(Shape::default());
    let mut mount = cluster.mount();
    let holders = cluster.wait_copies(2);
    let mut manifest = Manifest::default();
    // From records alone: no image was ever made.
    for (round, from) in
        [holders[0], (0..6).find(|id| !holders.contains(id)).unwrap()].into_iter().enumerate()
    {
        cluster.wait_copies(2);
        let load = Load::start(manifest, mount.path());
        // The moment is the point of the test, not a wait for anything.
        thread::park_timeout(Duration::from_millis(2_500));
        cluster.lose_directory();
        let said = cluster.restore_directory(from);
        assert!(said.contains("nothing that was acknowledged is missing"), "{said}");
        assert!(said.contains("0 commits in its image"), "{said}");
        cluster.start_directory();
        cluster.wait_online(6);
        thread::park_timeout(Duration::from_millis(500));
        manifest = load.end();
        eprintln!("round {round}: {} files acknowledged so far", manifest.files());
        mount = check(&mut cluster, mount, &mut manifest);
        // Work goes on as if nothing had been.
        let bytes = noise(round as u64, 3_000_000);
        write_synced(&mount.path().join("after"), &bytes);
        assert!(fs::read(mount.path().join("after")).unwrap() == bytes);
    }
    assert!(manifest.files() > 0, "the load did nothing");
    mount.unmount();
}

#[test]
fn from_an_image_and_records_with_two_providers_dead() {
    if !fuse_is_here() {
        return;
    }
    let mut cluster = Cluster::start(Shape { directory: SMALL, ..Shape::default() });
    let mount = cluster.mount();
    cluster.wait_copies(2);
    // A base, and a run that says what changed since.
    let manifest = work_until_image(&cluster, &mount, Manifest::default());
    let manifest = work_until_image(&cluster, &mount, manifest);
    let holders = cluster.wait_copies(2);
    let load = Load::start(manifest, mount.path());
    thread::park_timeout(Duration::from_millis(1_000));
    // One of those that keep the records, and one that does not.
    let other = (0..6).find(|id| !holders.contains(id)).unwrap();
    let alive = (0..6).rfind(|id| *id != holders[0] && *id != other).unwrap();
    cluster.kill_provider(holders[0]);
    cluster.kill_provider(other);
    cluster.lose_directory();
    let said = cluster.restore_directory(alive);
    assert!(said.contains("4 of 6 providers answered"), "{said}");
    assert!(!said.contains(" 0 commits in its image"), "{said}");
    cluster.start_directory();
    cluster.wait_online(4);
    let mut manifest = load.end();
    let mount = check(&mut cluster, mount, &mut manifest);
    cluster.start_provider(holders[0]);
    cluster.start_provider(other);
    cluster.wait_online(6);
    cluster.wait_copies(2);
    let mount = check(&mut cluster, mount, &mut manifest);
    assert_eq!(image_volume_shown(&cluster), 0);
    mount.unmount();
}

fn image_volume_shown(cluster: &Cluster) -> usize {
    let status = cluster.status().unwrap();
    let volumes = status["volumes"].as_array().unwrap().clone();
    volumes.iter().filter(|one| one["name"].as_str().unwrap().starts_with('.')).count()
}

/// When both providers that keep the last records die with the directory, what it had since the last
/// image waits for one of them. Nobody goes on as if nothing had been: a mount that was told more is
/// durable than is there ends with an error.
#[test]
fn with_both_copies_dead_too_a_mount_is_told_and_the_image_is_there() {
    if !fuse_is_here() {
        return;
    }
    let mut cluster = Cluster::start(Shape { directory: SMALL, ..Shape::default() });
    let mut mount = cluster.mount();
    cluster.wait_copies(2);
    let bytes = noise(1, 500_000);
    write_synced(&mount.path().join("early"), &bytes);
    let manifest = work_until_image(&cluster, &mount, Manifest::default());
    assert!(manifest.files() > 0);
    write_synced(&mount.path().join("late"), &bytes);
    let holders = cluster.wait_copies(2);
    // All at once: otherwise others would take their place.
    cluster.kill_directory();
    holders.iter().for_each(|holder| cluster.kill_provider(*holder));
    fs::remove_dir_all(cluster.at("directory")).unwrap();
    let alive = (0..6).find(|id| !holders.contains(id)).unwrap();
    let said = cluster.restore_directory(alive);
    assert!(said.contains("unless every provider that kept the last records"), "{said}");
    // With one of the two, everything is there; so the owner looks again.
    fs::remove_dir_all(cluster.at("directory")).unwrap();
    cluster.start_provider(holders[1]);
    poll::until("the provider to answer", PATIENCE, || {
        let address = cluster.provider_address(holders[1]);
        std::net::TcpStream::connect(address).map(drop).map_err(|error| error.to_string())
    });
    let whole = cluster.restore_directory(alive);
    let after = |text: &str| -> u64 {
        let line = text.lines().find(|line| line.contains("in its image")).unwrap();
        line.split(' ').rev().nth(2).unwrap().parse().unwrap()
    };
    assert!(after(&whole) > after(&said), "{whole}\n{said}");
    // But this time it was really gone.
    fs::remove_dir_all(cluster.at("directory")).unwrap();
    cluster.kill_provider(holders[1]);
    cluster.restore_directory(alive);
    cluster.start_directory();
    cluster.wait_online(4);
    poll::until("the mount to be told", PATIENCE, || {
        let file = File::create(mount.path().join("more"));
        let synced = file.and_then(|mut file| {
            file.write_all(b"more")?;
            file.sync_all()
        });
        match synced {
            Ok(()) => Err("it goes on".to_owned()),
            Err(error) if error.raw_os_error() == Some(libc::EIO) => Ok(()),
            Err(error) => Err(error.to_string()),
        }
    });
    assert!(cluster.log("mount0").contains("the directory was restored"), "it says why");
    mount.kill();
    drop(mount);
    let mount = cluster.mount();
    assert!(fs::read(mount.path().join("early")).unwrap() == bytes);
    assert!(!mount.path().join("late").exists(), "it was in the lost records only");
    mount.unmount();
}

#[test]
fn from_a_backup_and_never_with_a_wrong_key() {
    if !fuse_is_here() {
        return;
    }
    let mut cluster = Cluster::start(Shape::default());
    let mount = cluster.mount();
    let bytes = noise(1, 5_000_000);
    write_synced(&mount.path().join("file"), &bytes);
    cluster.wait_settled();
    let (data, backup) = (cluster.at("directory"), cluster.at("backup"));
    let (ok, said) = cluster.us_directory(&["backup", "--data", &data, "--out", &backup]);
    assert!(ok && said.contains("running"), "{said}");
    // Deleted since: the fragments lie in the providers' trash when the backup comes back.
    write_synced(&mount.path().join("later"), b"not in the backup");
    fs::remove_file(mount.path().join("file")).unwrap();
    mount.unmount();
    poll::until("the file's fragments to be deleted", PATIENCE, || {
        let status = cluster.status()?;
        let left = &status["blocks"]["total"];
        let waiting = &status["pending_deletes"];
        (left == 0 || left == 1).then_some(()).ok_or(format!("{left} blocks"))?;
        (waiting == 0).then_some(()).ok_or(format!("{waiting} to delete"))
    });
    cluster.lose_directory();

    let other = cluster.at("other");
    let (ok, _) = cluster.us_directory(&["init", "--data", &other]);
    assert!(ok);
    let wrong = cluster.at("other/recovery.key");
    let from = cluster.provider_address(0);
    let (key, arguments) = (cluster.at("recovery.key"), ["restore", "--data", &data]);
    let restore = |more: &[&str]| cluster.us_directory(&[&arguments[..], more].concat());
    let (ok, said) = restore(&["--recovery-key", &wrong, "--from", &from]);
    assert!(!ok && said.contains("no provider answered"), "another cluster's key: {said}");
    let (ok, said) = restore(&["--recovery-key", &wrong, "--backup", &backup]);
    assert!(!ok && said.contains("of cluster"), "{said}");
    let (ok, said) = restore(&["--recovery-key", &key, "--backup", &backup]);
    assert!(ok && said.contains("what changed after the backup is not in it"), "{said}");
    let (ok, said) = restore(&["--recovery-key", &key, "--from", &from]);
    assert!(!ok && said.contains("is not empty"), "{said}");

    cluster.start_directory();
    cluster.wait_online(6);
    let mount = cluster.mount();
    assert!(fs::read(mount.path().join("file")).unwrap() == bytes, "back from the trash");
    assert!(!mount.path().join("later").exists());
    cluster.wait_copies(2);
    poll::until("everything to be well", PATIENCE, || match cluster.status_code() {
        0 => Ok(()),
        code => Err(format!("status {code}: {:?}", cluster.status())),
    });
    mount.unmount();
}
