//! Providers that give wrong bytes and vouch for them: nobody is believed. Their disks are changed under
//! them so that their own checks find nothing ([`us_tests::liar`]).

use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use us_tests::admin::{is_whole, provider};
use us_tests::cluster::{Cluster, PATIENCE, Shape, fuse_is_here};
use us_tests::liar::{Lie, lie};
use us_tests::poll;
use us_tests::tree::noise;

const FILE_BYTES: usize = 20_000_000;
/// How long finding and mending may take.
const HEALED: Duration = Duration::from_secs(180);

fn write_file(cluster: &mut Cluster) -> Vec<u8> {
    let mount = cluster.mount();
    let bytes = noise(1, FILE_BYTES);
    let path = mount.path().join("file");
    fs::write(&path, &bytes).expect("a write");
    File::open(&path).and_then(|file| file.sync_all()).expect("a sync");
    mount.unmount();
    cluster.wait_settled();
    bytes
}

fn corrupt(cluster: &mut Cluster, number: usize, how: Lie) {
    cluster.stop_provider(number);
    lie(&cluster.provider_data(number), how);
    cluster.start_provider(number);
}

/// How often wrong bytes were reported of a provider: the events of damage that name it.
fn marks(cluster: &Cluster, number: usize) -> u64 {
    let status = cluster.admin().status().expect("a status");
    let name = format!("provider{number}");
    let id = provider(&status, &name).expect("it is known").provider;
    let lines = cluster.usctl(&["events", "--last", "100000", "--json"]);
    let events = lines.lines().map(|line| {
        serde_json::from_str::<serde_json::Value>(line).unwrap_or_else(|e| panic!("{e}: {line}"))
    });
    events.filter(|event| event["kind"] == "damage" && event["provider"] == id).count() as u64
}

/// 4+2: whichever way one or two lie, every byte read is right, and they are marked.
#[test]
fn up_to_r_liars_are_read_around_and_marked() {
    if !fuse_is_here() {
        return;
    }
    for (how, liars) in [
        (Lie::OwnSums, &[1][..]),
        (Lie::SameSums, &[4]),
        (Lie::OwnSums, &[0, 3]),
        (Lie::SameSums, &[2, 5]),
    ] {
        let mut cluster = Cluster::start(Shape::default());
        let bytes = write_file(&mut cluster);
        for liar in liars {
            corrupt(&mut cluster, *liar, how);
        }
        cluster.wait_online(6);
        let mount = cluster.mount();
        let read = fs::read(mount.path().join("file")).expect("it can be read");
        assert!(read == bytes, "{how:?} {liars:?}: wrong bytes");
        // Every one holds a data fragment of some block: each read of those shows it.
        poll::until("the liars' marks", PATIENCE, || {
            let marks: Vec<u64> = liars.iter().map(|liar| marks(&cluster, *liar)).collect();
            marks.iter().all(|marks| *marks > 0).then_some(()).ok_or(format!("{marks:?}"))
        });
        for honest in (0..6).filter(|number| !liars.contains(number)) {
            assert_eq!(marks(&cluster, honest), 0, "provider{honest} told the truth");
        }
        mount.unmount();
    }
}

/// Three liars of 4+2: an error, and never a byte that was not written.
#[test]
fn more_than_r_liars_make_an_error_and_no_wrong_byte() {
    if !fuse_is_here() {
        return;
    }
    for how in [Lie::OwnSums, Lie::SameSums] {
        let mut cluster = Cluster::start(Shape::default());
        let bytes = write_file(&mut cluster);
        for liar in [0, 2, 4] {
            corrupt(&mut cluster, liar, how);
        }
        cluster.wait_online(6);
        let mount = cluster.mount();
        let file = File::open(mount.path().join("file")).expect("it opens");
        let mut failed = 0;
        for at in (0..FILE_BYTES).step_by(1_000_003) {
            let mut page = vec![0; 4096.min(FILE_BYTES - at)];
            match file.read_exact_at(&mut page, at as u64) {
                Ok(()) => assert!(page == bytes[at..at + page.len()], "{how:?}: wrong bytes"),
                Err(error) => {
                    assert_eq!(error.raw_os_error(), Some(libc::EIO), "{how:?}: {error}");
                    failed += 1;
                }
            }
        }
        assert!(failed > 0, "{how:?}: three of six lie about every page");
        let mut all = Vec::new();
        let mut file = File::open(mount.path().join("file")).expect("it opens");
        let error = file.read_to_end(&mut all).expect_err("some of it cannot be read");
        assert_ne!(error.kind(), ErrorKind::UnexpectedEof);
        assert!(all == bytes[..all.len()], "{how:?}: wrong bytes before the error");
        drop(file);
        mount.unmount();
    }
}

/// A helper that lies, with sums that hold, poisons nothing that is rebuilt; it is found and marked.
#[test]
fn a_lying_helper_poisons_no_repair() {
    if !fuse_is_here() {
        return;
    }
    let (liar, lost) = (1, 3);
    for how in [Lie::OwnSums, Lie::SameSums] {
        let mut cluster = Cluster::start(Shape { providers: 8, ..Shape::default() });
        let bytes = write_file(&mut cluster);
        corrupt(&mut cluster, liar, how);
        cluster.kill_provider(lost);
        cluster.wait_online(7);
        let mut admin = cluster.admin();
        let status = admin.status().expect("a status");
        let number = provider(&status, &format!("provider{lost}")).expect("it is known").provider;
        cluster.usctl(&["give-up", &number.to_string(), "--yes"]);
        poll::until("repaired", HEALED, || is_whole(&admin.status()?, 2));
        // Whatever pair is away, the rest has every byte: what was rebuilt is right.
        for away in [[0, 2], [4, 5], [6, 7]] {
            away.iter().for_each(|number| cluster.kill_provider(*number));
            cluster.wait_online(5);
            let mount = cluster.mount();
            let read = fs::read(mount.path().join("file"));
            // The liar is a third that some block may lack.
            match read {
                Ok(read) => assert!(read == bytes, "{how:?}: wrong bytes"),
                Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EIO), "{how:?}"),
            }
            mount.unmount();
            away.iter().for_each(|number| cluster.start_provider(*number));
            cluster.wait_online(7);
        }
        let mount = cluster.mount();
        let read = fs::read(mount.path().join("file")).expect("it can be read");
        assert!(read == bytes, "{how:?}: wrong bytes");
        assert!(marks(&cluster, liar) > 0, "{how:?}: the liar was asked, and was found out");
        for honest in (0..8).filter(|number| ![liar, lost].contains(number)) {
            assert_eq!(marks(&cluster, honest), 0, "provider{honest} told the truth");
        }
        mount.unmount();
    }
}
