//! Bytes that rot on a provider's disk: right bytes are served all the same, it is reported, and
//! mended.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use us_tests::cluster::{Cluster, PATIENCE, Shape, fuse_is_here};
use us_tests::poll;
use us_tests::tree::noise;

/// How long finding and mending may take.
const HEALED: Duration = Duration::from_secs(180);

/// The segment files of a provider's store.
fn segments(data: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut pending = vec![data.to_path_buf()];
    while let Some(folder) = pending.pop() {
        for entry in fs::read_dir(folder).unwrap().flatten() {
            if entry.path().is_dir() {
                pending.push(entry.path());
            } else if entry.path().extension().is_some_and(|ending| ending == "seg") {
                found.push(entry.path());
            }
        }
    }
    assert!(!found.is_empty(), "no segments in {}", data.display());
    found
}

/// Flips bits all over the bodies of a segment, leaving its first block alone.
fn flip(path: &Path) {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let length = file.metadata().unwrap().len();
    let mut flipped = 0;
    for offset in (20_000..length.saturating_sub(4096)).step_by(50_021) {
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset).unwrap();
        file.write_all_at(&[byte[0] ^ 0x10], offset).unwrap();
        flipped += 1;
    }
    assert!(flipped > 0, "{}: {length} bytes, nothing to flip", path.display());
}

/// Swaps two runs of bytes inside a segment: fragments of different blocks end up in each other's
/// place, each whole.
fn swap_blocks(path: &Path) {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let length = file.metadata().unwrap().len() / 4096 * 4096;
    let half = (length / 2 / 4096 * 4096) as usize;
    let run = half.min(4 << 20) - 4096;
    let (mut first, mut second) = (vec![0; run], vec![0; run]);
    file.read_exact_at(&mut first, 4096).unwrap();
    file.read_exact_at(&mut second, half as u64).unwrap();
    assert!(first != second);
    file.write_all_at(&second, 4096).unwrap();
    file.write_all_at(&first, half as u64).unwrap();
}

fn truncate(path: &Path) {
    let file = OpenOptions::new().write(true).open(path).unwrap();
    let length = file.metadata().unwrap().len();
    file.set_len(length / 2).unwrap();
}

#[test]
fn damaged_fragments_are_read_around_and_reported() {
    if !fuse_is_here() {
        return;
    }
    type Harm = fn(&Path);
    let harms: [(&str, Harm); 3] = [("flip", flip), ("swap", swap_blocks), ("truncate", truncate)];
    for (name, harm) in harms {
        let mut cluster = Cluster::start(Shape::default());
        let mount = cluster.mount();
        let bytes = noise(1, 30_000_000);
        fs::write(mount.path().join("file"), &bytes).unwrap();
        mount.unmount();
        cluster.wait_settled();
        // Two of six: as many as the code forgives.
        for victim in [1, 4] {
            cluster.stop_provider(victim);
            segments(&cluster.provider_data(victim)).iter().for_each(|path| harm(path));
            cluster.start_provider(victim);
        }
        cluster.wait_online(6);
        let mount = cluster.mount();
        let read = fs::read(mount.path().join("file")).unwrap();
        assert!(read == bytes, "{name}: wrong bytes");
        poll::until(&format!("{name}: a report"), PATIENCE, || {
            let events = cluster.usctl(&["events", "--last", "1000"]);
            events.contains("damage").then_some(()).ok_or(events)
        });
        // What no reader came across a scrub finds, and repair mends all of it.
        cluster.usctl(&["scrub"]);
        poll::until(&format!("{name}: full redundancy again"), HEALED, || {
            let status = cluster.status()?;
            let idle = status["repair"]["queued"] == 0 && status["repair"]["running"] == 0;
            let well = status["health"] == "ok" && status["blocks"]["damaged_fragments"] == 0;
            (idle && well).then_some(()).ok_or(status.to_string())
        });
        mount.unmount();
    }
}
