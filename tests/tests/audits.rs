//! Audits with real processes: nobody reads and nobody scrubs, and what a provider does not keep is found,
//! stops counting, and is made again elsewhere.

use std::fs::{self, File};
use std::path::Path;
use std::time::Duration;

use us_proto::v1::{ProviderStatus, TrustRequest};
use us_tests::admin::{is_whole, provider};
use us_tests::cluster::{Cluster, PATIENCE, Shape, fuse_is_here};
use us_tests::liar::{Lie, lie};
use us_tests::poll;
use us_tests::tree::noise;

const FILE_BYTES: usize = 24_000_000;
/// How long finding and mending may take.
const HEALED: Duration = Duration::from_secs(180);
/// Half a second instead of ten minutes.
const AUDITED: &[&str] = &["--audit-every-ms", "500"];
const LIAR: usize = 1;

fn start(directory: &'static [&'static str]) -> (Cluster, Vec<u8>) {
    let mut cluster = Cluster::start(Shape { providers: 8, directory, ..Shape::default() });
    let mount = cluster.mount();
    let bytes = noise(7, FILE_BYTES);
    let path = mount.path().join("file");
    fs::write(&path, &bytes).expect("a write");
    File::open(&path).and_then(|file| file.sync_all()).expect("a sync");
    mount.unmount();
    cluster.wait_settled();
    (cluster, bytes)
}

fn about(cluster: &Cluster, number: usize) -> ProviderStatus {
    let status = cluster.admin().status().expect("a status");
    provider(&status, &format!("provider{number}")).expect("it is known").clone()
}

fn wait_distrusted(cluster: &Cluster) -> ProviderStatus {
    poll::until("the liar is found", HEALED, || {
        let about = about(cluster, LIAR);
        if about.distrusted { Ok(about) } else { Err(format!("{about:?}")) }
    })
}

fn check_only_the_liar_has_marks(cluster: &Cluster) {
    for number in (0..8).filter(|number| *number != LIAR) {
        let about = about(cluster, number);
        assert_eq!((about.found_wrong, about.distrusted), (0, false), "{about:?}");
    }
}

fn events(cluster: &Cluster) -> Vec<serde_json::Value> {
    let lines = cluster.usctl(&["events", "--last", "100000", "--json"]);
    lines.lines().map(|line| serde_json::from_str(line).expect("an event")).collect()
}

/// Everything there is elsewhere, and the file whole without the liar.
fn check_stopped_counting(cluster: &mut Cluster, bytes: &[u8]) {
    let mut admin = cluster.admin();
    poll::until("made again elsewhere", HEALED, || {
        let status = admin.status()?;
        let held = provider(&status, &format!("provider{LIAR}")).map_or(0, |about| about.fragments);
        is_whole(&status, 2)?;
        if held == 0 { Ok(()) } else { Err(format!("{held} fragments still count there")) }
    });
    assert!(!about(cluster, LIAR).accepts_puts, "nothing new goes there");
    for away in [LIAR, 4, 5] {
        cluster.kill_provider(away);
    }
    cluster.wait_online(5);
    let mount = cluster.mount();
    let read = fs::read(mount.path().join("file")).expect("two beside the liar may be away");
    assert!(read == *bytes, "wrong bytes");
    mount.unmount();
}

/// Bytes that have the sums of the right ones; bytes with sums of their own. The provider finds nothing.
#[test]
fn a_disk_that_was_changed_is_found_and_stops_counting() {
    if !fuse_is_here() {
        return;
    }
    for how in [Lie::SameSums, Lie::OwnSums] {
        let (mut cluster, bytes) = start(AUDITED);
        cluster.stop_provider(LIAR);
        lie(&cluster.provider_data(LIAR), how);
        cluster.start_provider(LIAR);
        cluster.wait_online(8);
        let found = wait_distrusted(&cluster);
        assert!(found.found_wrong >= 3, "{how:?}: {found:?}");
        check_only_the_liar_has_marks(&cluster);
        let listed = cluster.usctl(&["providers"]);
        assert!(listed.contains("DISTRUSTED"), "{listed}");
        check_stopped_counting(&mut cluster, &bytes);
    }
}

fn remove_segments(folder: &Path) -> usize {
    let mut removed = 0;
    for entry in fs::read_dir(folder).expect("a folder").flatten() {
        let path = entry.path();
        if path.is_dir() {
            removed += remove_segments(&path);
        } else if path.extension().is_some_and(|ending| ending == "seg") {
            fs::OpenOptions::new()
                .write(true)
                .open(&path)
                .expect("a segment")
                .set_len(0)
                .expect("cut");
            fs::remove_file(&path).expect("a segment");
            removed += 1;
        }
    }
    removed
}

/// Its segments are gone from under it, and its index says that all is there: the first audit finds out. It
/// owns to it, so that is damage and no lie: all of it is made again.
#[test]
fn segments_that_are_gone_are_found_and_made_again_without_a_mark() {
    if !fuse_is_here() {
        return;
    }
    let (mut cluster, bytes) = start(AUDITED);
    let before = about(&cluster, LIAR);
    assert!(remove_segments(&cluster.provider_data(LIAR)) > 0);
    poll::until("all that is lost is found", HEALED, || {
        let all = events(&cluster);
        let told = all
            .iter()
            .filter(|event| event["kind"] == "damage" && event["provider"] == before.provider);
        // "N fragments: …"
        let number = |event: &serde_json::Value| -> Option<u64> {
            event["detail"].as_str()?.split(' ').next()?.parse().ok()
        };
        let found: u64 = told.filter_map(number).sum();
        (found >= before.fragments).then_some(()).ok_or(format!("{found} of {before:?}: {all:?}"))
    });
    let mut admin = cluster.admin();
    poll::until("made again", HEALED, || {
        let status = admin.status()?;
        let damaged = status.blocks.clone().unwrap_or_default().damaged_fragments;
        is_whole(&status, 2)?;
        if damaged == 0 { Ok(()) } else { Err(format!("{damaged} damaged fragments")) }
    });
    for number in 0..8 {
        assert_eq!(about(&cluster, number).found_wrong, 0, "provider{number}");
    }
    for away in [0, 4] {
        cluster.kill_provider(away);
    }
    cluster.wait_online(6);
    let mount = cluster.mount();
    let read = fs::read(mount.path().join("file")).expect("two may be away");
    assert!(read == bytes, "wrong bytes");
    mount.unmount();
}

/// Honest providers are audited, and stay as they are; who is trusted again counts again.
#[test]
fn trust_takes_marks_back_and_honest_providers_have_none() {
    if !fuse_is_here() {
        return;
    }
    let (mut cluster, bytes) = start(AUDITED);
    let name = format!("provider{LIAR}");
    let (code, said) = cluster.usctl_code(&["trust", &name]);
    assert!(code != 0, "nothing to take back: {said}");
    cluster.stop_provider(LIAR);
    lie(&cluster.provider_data(LIAR), Lie::SameSums);
    cluster.start_provider(LIAR);
    let found = wait_distrusted(&cluster);
    // The directory remembers.
    cluster.kill_directory();
    cluster.start_directory();
    cluster.wait_online(8);
    assert!(about(&cluster, LIAR).distrusted, "a restart changes nothing");
    let mut admin = cluster.admin();
    poll::until("made again elsewhere", HEALED, || {
        let status = admin.status()?;
        let held = provider(&status, &name).map_or(0, |about| about.fragments);
        if held == 0 { is_whole(&status, 2) } else { Err(format!("{held} fragments")) }
    });
    cluster.usctl(&["trust", &name]);
    poll::until("it counts again", PATIENCE, || {
        let about = about(&cluster, LIAR);
        let counts = !about.distrusted && about.found_wrong == 0 && about.accepts_puts;
        if counts { Ok(()) } else { Err(format!("{about:?}")) }
    });
    let all = events(&cluster);
    let trusted = all.iter().find(|event| event["kind"] == "provider-trusted");
    let trusted = trusted.expect("it is in the log");
    assert_eq!(trusted["provider"], found.provider);
    assert!(trusted["by"].as_str().is_some_and(|by| by.contains("admin")), "{trusted}");
    // What it takes now it keeps: audits find nothing.
    let mount = cluster.mount();
    fs::write(mount.path().join("again"), &bytes).expect("a write");
    mount.unmount();
    cluster.wait_settled();
    assert!(about(&cluster, LIAR).fragments > 0, "new fragments go there");
    let refused = admin.call(async |client| client.trust(TrustRequest { provider: 999 }).await);
    assert!(refused.is_err(), "{refused:?}");
    for number in 0..8 {
        assert_eq!(about(&cluster, number).found_wrong, 0, "provider{number}");
    }
}
