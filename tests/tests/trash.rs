//! `usctl trash` on a real cluster and mount: what `rm -rf` removed is listed, comes back byte for byte
//! beside the mount that removed it, and frees space at the providers when it is purged.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;
use us_tests::cluster::{Cluster, PATIENCE, Shape, fuse_is_here};
use us_tests::poll;
use us_tests::tree::{assert_same, noise};

/// Two lease times until dead blocks are deleted, and their providers' confirmation.
const FREED: Duration = Duration::from_secs(120);

fn trash(cluster: &Cluster, arguments: &[&str]) -> Value {
    let arguments: Vec<&str> = ["trash"].iter().chain(arguments).copied().collect();
    let text = cluster.usctl(&[&arguments[..], &["--json"]].concat());
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

fn paths(listed: &Value) -> Vec<String> {
    let items = listed.as_array().expect("a list").iter();
    let mut paths: Vec<String> =
        items.map(|item| item["path"].as_str().expect("a path").to_owned()).collect();
    paths.sort();
    paths
}

/// What lies at or under a path in the trash, when it is so many things.
fn wait_listed(cluster: &Cluster, path: &str, wanted: usize) -> Value {
    poll::until("what was removed is listed", PATIENCE, || {
        let listed = trash(cluster, &["list", "disk", path]);
        let found = paths(&listed);
        (found.len() == wanted).then_some(listed).ok_or(format!("{found:?}"))
    })
}

/// At all providers.
fn fragments(cluster: &Cluster) -> Result<u64, String> {
    let status = cluster.status()?;
    let providers = status["providers"].as_array().ok_or("no providers")?.iter();
    Ok(providers.map(|one| one["fragments"].as_u64().unwrap_or(0)).sum())
}

fn write(path: &Path, seed: u64, bytes: usize) {
    fs::write(path, noise(seed, bytes)).expect("a write");
    File::open(path).and_then(|file| file.sync_all()).expect("a sync");
}

fn make_tree(root: &Path) {
    fs::create_dir_all(root.join("sub/deep")).expect("folders");
    write(&root.join("a"), 1, 3_000_000);
    write(&root.join("sub/b"), 2, 700_000);
    write(&root.join("sub/deep/c"), 3, 5);
    fs::write(root.join("sub/empty"), b"").expect("an empty file");
    std::os::unix::fs::symlink("../a", root.join("sub/link")).expect("a link");
}

/// Two restores that each want, again and again, the folder the other has: each kept it until the directory
/// had answered, and both failed after two minutes.
fn restore_at_once(cluster: &Cluster, disk: &Path) {
    const FILES: u64 = 20;
    let name = |number: u64| format!("{}/{number}", ["left", "right"][number as usize % 2]);
    for folder in ["left", "right"] {
        fs::create_dir(disk.join(folder)).expect("a folder");
    }
    for number in 0..2 * FILES {
        let mut file = File::create(disk.join(name(number))).expect("a file");
        file.write_all(number.to_string().as_bytes()).expect("a write");
        file.sync_all().expect("a sync");
    }
    for number in 0..2 * FILES {
        fs::remove_file(disk.join(name(number))).expect("rm");
    }
    for folder in ["left", "right"] {
        wait_listed(cluster, folder, FILES as usize);
    }
    std::thread::scope(|scope| {
        for half in [0..FILES, FILES..2 * FILES] {
            scope.spawn(move || {
                let names: Vec<String> = half.map(name).collect();
                let names: Vec<&str> = names.iter().map(String::as_str).collect();
                trash(cluster, &[&["restore", "disk"], &names[..]].concat());
            });
        }
    });
    for number in 0..2 * FILES {
        let text = fs::read_to_string(disk.join(name(number))).expect("it is back");
        assert_eq!(text, number.to_string());
    }
    for folder in ["left", "right"] {
        fs::remove_dir_all(disk.join(folder)).expect("rm -rf");
    }
}

#[test]
fn what_rm_removed_comes_back_and_a_purge_frees_its_space() {
    if !fuse_is_here() {
        return;
    }
    // Everything is old enough.
    let directory = &["--trash-age-ms", "0"];
    let mut cluster = Cluster::start(Shape { directory, ..Shape::default() });
    let mount = cluster.mount();
    let other = cluster.mount();
    let local = tempfile::tempdir().expect("a folder");
    make_tree(local.path());
    let tree = mount.path().join("docs/tree");
    fs::create_dir_all(&tree).expect("folders");
    make_tree(&tree);
    write(&mount.path().join("docs/kept"), 9, 100_000);
    assert_same(local.path(), &other.path().join("docs/tree"));

    fs::remove_dir_all(&tree).expect("rm -rf");
    assert!(!other.path().join("docs/tree").exists(), "it is gone everywhere");
    let listed = wait_listed(&cluster, "docs/tree", 8);
    let expected = ["", "/a", "/sub", "/sub/b", "/sub/deep", "/sub/deep/c", "/sub/empty"];
    let mut expected: Vec<String> =
        expected.iter().map(|path| format!("docs/tree{path}")).collect();
    expected.push("docs/tree/sub/link".to_owned());
    assert_eq!(paths(&listed), expected);
    assert_eq!(listed[0]["removed_by_uid"], rustix::process::getuid().as_raw());
    let status = cluster.status().expect("a status");
    let live = status["blocks"]["live_bytes"].as_u64().expect("bytes");
    assert!(live >= 3_800_000, "its blocks live: {live}");

    // One file, elsewhere; then the tree, where it lay. Both mounts know the folders.
    let one = trash(&cluster, &["restore", "disk", "docs/tree/sub/b", "--to", "docs"]);
    assert_eq!(one[0]["to"], "docs/b");
    assert!(fs::read(mount.path().join("docs/b")).expect("bytes") == noise(2, 700_000));
    assert!(fs::read(other.path().join("docs/b")).expect("bytes") == noise(2, 700_000));
    trash(&cluster, &["restore", "disk", "/docs/tree"]);
    fs::rename(mount.path().join("docs/b"), tree.join("sub/b")).expect("a rename");
    assert_same(local.path(), &tree);
    assert_same(local.path(), &other.path().join("docs/tree"));
    assert!(paths(&trash(&cluster, &["list", "disk", "docs/tree"])).is_empty());

    restore_at_once(&cluster, mount.path());

    // What an editor replaced: a name that is taken stays what it is.
    let kept = mount.path().join("docs/kept");
    write(&mount.path().join("docs/new"), 10, 200_000);
    fs::rename(mount.path().join("docs/new"), &kept).expect("a rename");
    wait_listed(&cluster, "docs/kept", 1);
    let back = trash(&cluster, &["restore", "disk", "docs/kept"]);
    assert_eq!(back[0]["to"], "docs/kept (restored)");
    assert!(fs::read(&kept).expect("bytes") == noise(10, 200_000));
    let before = fs::read(other.path().join("docs/kept (restored)")).expect("bytes");
    assert!(before == noise(9, 100_000));

    // A file that is open when it goes is there until it is closed, and in the trash then.
    let file = File::open(&kept).expect("open");
    fs::remove_file(&kept).expect("rm");
    drop(file);
    let listed = wait_listed(&cluster, "docs/kept", 1);
    let id = listed[0]["id"].to_string();
    assert_ne!(cluster.usctl_code(&["trash", "purge", "disk", &id]).0, 0, "it asks for --yes");
    fs::remove_dir_all(mount.path().join("docs")).expect("rm -rf");
    wait_listed(&cluster, "docs", 11);
    let (code, text) = cluster.usctl_code(&["trash", "restore", "disk", "docs/nothing"]);
    assert_eq!(code, 64, "{text}");
    assert_eq!(cluster.usctl_code(&["fsck"]).0, 0);
    let before = fragments(&cluster).expect("a status");
    let purged = trash(&cluster, &["purge", "disk", "--all", "--yes"]);
    let pair = 2 * 20 + 2;
    assert_eq!(purged["files"], 11 + pair);
    poll::until("no block of it at any provider", FREED, || {
        let status = cluster.status()?;
        let blocks = &status["volumes"][0]["blocks"];
        let left = (blocks, fragments(&cluster)?, &status["pending_deletes"]);
        (*blocks == 0 && left.1 + 6 <= before && *left.2 == 0)
            .then_some(())
            .ok_or(format!("{left:?}"))
    });
    assert_eq!(cluster.usctl_code(&["fsck"]).0, 0);
    other.unmount();
    mount.unmount();
}
