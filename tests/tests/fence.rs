//! A mount that falls silent for longer than the fence: another gets what it held, and what it had
//! not made durable is an error there and lies in a rescue file.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use us_tests::cluster::{Cluster, PATIENCE, Shape, fuse_is_here};
use us_tests::poll;
use us_tests::tree::noise;

/// The rescue file of a cluster's one fenced mount, once it is whole.
fn rescue_file(cluster: &Cluster) -> PathBuf {
    let folder = PathBuf::from(cluster.at("data")).join("rescue");
    poll::until("a rescue file", PATIENCE, || {
        let entries = fs::read_dir(&folder).map_err(|error| error.to_string())?;
        let found = entries.flatten().map(|entry| entry.path()).next();
        let path = found.ok_or("nothing in the folder")?;
        // Written last.
        path.join("changes").exists().then_some(path).ok_or_else(|| "not whole yet".to_owned())
    })
}

/// Where the rescue has the bytes of `path`.
fn rescued(rescue: &Path, path: &str) -> PathBuf {
    let index = fs::read_to_string(rescue.join("index")).unwrap();
    let wanted = format!(": {path}, size");
    let line = index.lines().find(|line| line.contains(&wanted));
    let line = line.unwrap_or_else(|| panic!("{path} is not in\n{index}"));
    rescue.join(line.split(':').next().unwrap())
}

#[test]
fn a_mount_that_is_frozen_too_long_loses_to_the_other_and_keeps_a_rescue_file() {
    if !fuse_is_here() {
        return;
    }
    let mut cluster = Cluster::start(Shape::default());
    let (left, right) = (cluster.mount(), cluster.mount());
    fs::create_dir(left.path().join("dir")).unwrap();
    fs::write(left.path().join("dir/shared"), b"from the beginning").unwrap();
    File::open(left.path().join("dir/shared")).unwrap().sync_all().unwrap();

    // Seen, cached, changed, and not durable when it falls silent.
    let path = left.path().join("dir/shared");
    let shared = File::options().read(true).write(true).open(path).unwrap();
    let mut bytes = [0; 18];
    shared.read_exact_at(&mut bytes, 0).unwrap();
    let mut fresh = File::create(left.path().join("dir/fresh")).unwrap();
    let content = noise(1, 300_000);
    fresh.write_all(&content).unwrap();
    shared.write_all_at(b"from the LEFT mount", 0).unwrap();
    left.freeze();

    // The other one waits for the fence, and then its data wins.
    fs::write(right.path().join("dir/shared"), b"from the right mount").unwrap();
    File::open(right.path().join("dir/shared")).unwrap().sync_all().unwrap();
    left.thaw();

    // It learns that it was fenced; what was written there is an error, and never merged.
    poll::until("the fenced mount to fail", PATIENCE, || match fresh.sync_all() {
        Err(error) if error.raw_os_error() == Some(libc::EIO) => Ok(()),
        answer => Err(format!("{answer:?}")),
    });
    assert!(shared.sync_all().is_err());
    assert!(shared.write_all_at(b"again", 0).is_err());
    // Nor does the kernel go on showing what it had cached.
    poll::until("the kernel to forget", PATIENCE, || {
        match shared.read_exact_at(&mut bytes, 0).map_err(|error| error.raw_os_error()) {
            Err(Some(libc::EIO)) => Ok(()),
            answer => Err(format!("{answer:?}")),
        }
    });
    assert_eq!(fs::read(right.path().join("dir/shared")).unwrap(), b"from the right mount");

    // What it had lies where its owner finds it, by the names it had.
    let rescue = rescue_file(&cluster);
    assert!(fs::read(rescued(&rescue, "/dir/fresh")).unwrap() == content);
    assert_eq!(fs::read(rescued(&rescue, "/dir/shared")).unwrap(), b"from the LEFT mount");
    let log = cluster.log("mount0");
    assert!(log.contains(rescue.to_str().unwrap()), "the log names it:\n{log}");
    drop((shared, fresh));
    right.unmount();
}
