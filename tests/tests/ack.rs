//! `-o ack=full`: after `fsync` every fragment is durable, also where one provider is slow.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;
use std::io::Write;
use std::path::Path;
use std::thread;
use std::time::Duration;

use us_tests::cluster::{Cluster, Shape, fuse_is_here, programs};
use us_tests::run::run;
use us_tests::tree::noise;

/// How long one provider is held still.
const STILL: Duration = Duration::from_millis(700);

/// Durable fragments, and all there are, of the blocks of `file`: asked of the directory, at once.
fn fragments(cluster: &Cluster, file: &Path) -> (usize, usize) {
    let text = cluster.usctl(&["where", "--json", file.to_str().unwrap()]);
    let place: serde_json::Value = serde_json::from_str(&text).unwrap();
    let blocks = place["blocks"].as_array().unwrap();
    assert!(blocks.iter().all(|block| block["inline"] == false), "{place}");
    let fragments: Vec<_> =
        blocks.iter().flat_map(|block| block["fragments"].as_array().unwrap()).collect();
    (fragments.iter().filter(|one| one["durable"] == true).count(), fragments.len())
}

fn write_and_sync(path: &Path, seed: u64) {
    let mut file = fs::File::create(path).unwrap();
    file.write_all(&noise(seed, 3_000_000)).unwrap();
    file.sync_all().unwrap();
}

#[test]
fn fsync_waits_for_every_fragment() {
    if !fuse_is_here() {
        return;
    }
    let mut cluster = Cluster::start(Shape { providers: 3, code: "2+1", ..Shape::default() });
    let mount = cluster.mount_with(&["-o", "ack=full"]);
    for seed in 0..5 {
        let path = mount.path().join(format!("file{seed}"));
        write_and_sync(&path, seed);
        assert_eq!(fragments(&cluster, &path), (3, 3), "file {seed}");
        assert_eq!(cluster.status().unwrap()["blocks"]["unsettled"], 0, "file {seed}");
    }
    // One provider is slow for a while: the answer comes when all is durable, not before.
    let path = mount.path().join("slow");
    cluster.freeze_provider(1);
    thread::scope(|scope| {
        scope.spawn(|| {
            // The test's own event, not a wait for one.
            thread::sleep(STILL);
            cluster.thaw_provider(1);
        });
        write_and_sync(&path, 9);
        assert_eq!(fragments(&cluster, &path), (3, 3));
    });
    assert_eq!(fs::read(&path).unwrap(), noise(9, 3_000_000));
    mount.unmount();
}

#[test]
fn what_it_cannot_be_is_said() {
    let said = |arguments: &[&str]| {
        let mut usfs = std::process::Command::new(programs().join("usfs"));
        let output = usfs.args(arguments).output().unwrap();
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    let text = said(&["mount", "127.0.0.1:1/disk", "/nowhere", "-o", "ack=most"]);
    assert!(text.contains("mount option ack=most: it can be margin or full"), "{text}");
    let text = said(&["up", "/nowhere", "--ack", "most"]);
    assert!(text.contains("margin") && text.contains("full"), "{text}");
    let help = run(Path::new("/"), programs().join("usfs").to_str().unwrap(), &["up", "--help"]);
    assert!(help.contains("--ack"), "{help}");
}
