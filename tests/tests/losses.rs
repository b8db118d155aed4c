//! What dead providers may and may not do to a reader and a writer.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::path::Path;
use std::time::Duration;

use us_tests::cluster::{Cluster, Mount, PATIENCE, Shape, fuse_is_here};
use us_tests::poll;
use us_tests::tree::noise;

const FILE_BYTES: usize = 20_000_000;

/// Reads without the mount's caches: a fresh mount has none.
fn read_fresh(
    cluster: &mut Cluster,
    mount: Mount,
    name: &str,
) -> (Mount, std::io::Result<Vec<u8>>) {
    mount.unmount();
    let mount = cluster.mount();
    let bytes = fs::read(mount.path().join(name));
    (mount, bytes)
}

fn write_synced(path: &Path, bytes: &[u8]) {
    let mut file = File::create(path).unwrap();
    file.write_all(bytes).unwrap();
    file.sync_all().unwrap();
}

/// 4+2 on six providers: whichever two die, every byte is right, and writing goes on.
#[test]
fn every_pair_of_providers_may_die() {
    if !fuse_is_here() {
        return;
    }
    let mut cluster = Cluster::start(Shape::default());
    let mut mount = cluster.mount();
    let bytes = noise(1, FILE_BYTES);
    write_synced(&mount.path().join("file"), &bytes);
    cluster.wait_settled();
    assert_eq!(cluster.status_code(), 0, "healthy: {:?}", cluster.status());
    for first in 0..6 {
        for second in first + 1..6 {
            cluster.kill_provider(first);
            cluster.kill_provider(second);
            cluster.wait_online(4);
            assert_ne!(cluster.status_code(), 0, "two are dead");
            let (remounted, read) = read_fresh(&mut cluster, mount, "file");
            mount = remounted;
            assert!(read.unwrap() == bytes, "providers {first} and {second} are dead");
            let name = format!("written-without-{first}-{second}");
            let more = noise((first * 6 + second) as u64, 5_000_000);
            write_synced(&mount.path().join(&name), &more);
            cluster.start_provider(first);
            cluster.start_provider(second);
            cluster.wait_online(6);
            let (remounted, read) = read_fresh(&mut cluster, mount, &name);
            mount = remounted;
            assert!(read.unwrap() == more, "{name}");
        }
    }
    mount.unmount();
}

/// w = 1 for 4+2: the provider that dies right after an fsync takes nothing acknowledged with it.
#[test]
fn a_provider_dies_right_after_fsync() {
    if !fuse_is_here() {
        return;
    }
    let mut cluster = Cluster::start(Shape::default());
    let mut mount = cluster.mount();
    for victim in 0..6 {
        let name = format!("file{victim}");
        let bytes = noise(victim as u64, 6_000_000);
        write_synced(&mount.path().join(&name), &bytes);
        cluster.kill_provider(victim);
        let (remounted, read) = read_fresh(&mut cluster, mount, &name);
        mount = remounted;
        assert!(read.unwrap() == bytes, "provider {victim} died after the fsync");
        cluster.start_provider(victim);
        cluster.wait_online(6);
    }
    mount.unmount();
}

/// More than r dead: a clean error, never wrong bytes; and right again when one is back.
#[test]
fn three_dead_are_an_error_and_one_back_is_not() {
    if !fuse_is_here() {
        return;
    }
    let mut cluster = Cluster::start(Shape::default());
    let mount = cluster.mount();
    let bytes = noise(9, FILE_BYTES);
    write_synced(&mount.path().join("file"), &bytes);
    cluster.wait_settled();
    for victim in [0, 2, 4] {
        cluster.kill_provider(victim);
    }
    cluster.wait_online(3);
    let (mount, read) = read_fresh(&mut cluster, mount, "file");
    let error = read.expect_err("only three of six fragments are left");
    assert_eq!(error.raw_os_error(), Some(libc::EIO), "{error}");
    let status = cluster.status().unwrap();
    assert_eq!(status["health"], "unreadable", "{status}");
    // Names and attributes do not need providers.
    assert_eq!(fs::metadata(mount.path().join("file")).unwrap().len(), FILE_BYTES as u64);

    cluster.start_provider(2);
    cluster.wait_online(4);
    let read = poll::until("the file to be readable", PATIENCE, || {
        let mut read = Vec::new();
        let file =
            File::open(mount.path().join("file")).and_then(|mut file| file.read_to_end(&mut read));
        file.map_err(|error| error.to_string()).map(|_| read)
    });
    assert!(read == bytes);
    mount.unmount();
}

/// With too few providers even for the margin, a write is refused in bounded time; nothing is
/// acknowledged that is not there, and writing goes on when providers return.
#[test]
fn too_few_providers_refuse_writes_clearly() {
    if !fuse_is_here() {
        return;
    }
    let mut cluster = Cluster::start(Shape::default());
    let mount = cluster.mount();
    for victim in 0..6 {
        cluster.kill_provider(victim);
    }
    cluster.wait_online(0);
    let mut file = File::create(mount.path().join("file")).unwrap();
    file.write_all(&noise(3, 1_000_000)).unwrap();
    let error = file.sync_all().expect_err("no provider is there");
    assert_ne!(error.kind(), ErrorKind::Interrupted);
    drop(file);
    for number in 0..6 {
        cluster.start_provider(number);
    }
    cluster.wait_online(6);
    let bytes = noise(4, 1_000_000);
    poll::until("writing to go on", Duration::from_secs(90), || {
        let mut file =
            File::create(mount.path().join("file")).map_err(|error| error.to_string())?;
        file.write_all(&bytes).and_then(|()| file.sync_all()).map_err(|error| error.to_string())
    });
    assert!(fs::read(mount.path().join("file")).unwrap() == bytes);
    mount.unmount();
}
