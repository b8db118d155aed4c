//! Full disks: a clear error from the write, nothing lost, and room again after a delete.

use std::fs::{self, File};
use std::io::{ErrorKind, Seek, Write};
use std::time::Duration;

use us_tests::cluster::{Cluster, Shape, fuse_is_here};
use us_tests::poll;
use us_tests::tree::noise;

#[test]
fn a_full_swarm_says_so_and_recovers() {
    if !fuse_is_here() {
        return;
    }
    let mut cluster = Cluster::start(Shape { capacity: "64M".into(), ..Shape::default() });
    let mount = cluster.mount();
    let kept = noise(1, 20_000_000);
    fs::write(mount.path().join("kept"), &kept).unwrap();
    File::open(mount.path().join("kept")).unwrap().sync_all().unwrap();

    // 6 x 64 MiB hold at most 256 MiB of data at 4+2.
    let chunk = noise(2, 4 << 20);
    let mut file = File::create(mount.path().join("filler")).unwrap();
    let full = (0..128).find_map(|_| file.write_all(&chunk).and_then(|()| file.sync_data()).err());
    let error = full.expect("it must become full");
    assert_eq!(error.kind(), ErrorKind::StorageFull, "{error}");
    drop(file);
    assert!(fs::read(mount.path().join("kept")).unwrap() == kept, "what was there is there");
    assert_ne!(cluster.status().unwrap()["health"], "lost");

    fs::remove_file(mount.path().join("filler")).unwrap();
    // The trash stays readable for a minute, whatever is pressed for. The same file each time, cut
    // again at once: a writer that began anew this way was once refused for ever.
    poll::until("room after the delete", Duration::from_secs(300), || {
        let mut file =
            File::create(mount.path().join("again")).map_err(|error| error.to_string())?;
        file.write_all(&chunk).and_then(|()| file.sync_all()).map_err(|error| error.to_string())
    });
    assert!(fs::read(mount.path().join("again")).unwrap() == chunk);
    mount.unmount();
    let mount = cluster.mount();
    assert!(fs::read(mount.path().join("kept")).unwrap() == kept, "after a remount too");
    mount.unmount();
}

/// What is overwritten lies in graves and in the trash for a while: a small file, overwritten often
/// enough, filled the disk, and a write failed though a moment later there was space again.
#[test]
fn what_is_overwritten_does_not_fill_the_disk() {
    if !fuse_is_here() {
        return;
    }
    let mut cluster = Cluster::start(Shape { capacity: "96M".into(), ..Shape::default() });
    let mount = cluster.mount();
    let path = mount.path().join("again");
    let mut file = File::create(&path).unwrap();
    let mut last = Vec::new();
    // 960 MiB of fragments where 576 MiB fit.
    for round in 0..40 {
        last = noise(round, 16 << 20);
        file.rewind().unwrap();
        file.write_all(&last).and_then(|()| file.sync_data()).unwrap();
    }
    drop(file);
    assert!(fs::read(&path).unwrap() == last);
    // The trash counts as free: it yields to need.
    poll::until("space for other files", Duration::from_secs(120), || {
        let space = rustix::fs::statvfs(mount.path()).map_err(|error| error.to_string())?;
        let free = space.f_bfree * space.f_frsize;
        (free > 300 << 20).then_some(()).ok_or(format!("{free} bytes are free"))
    });
    mount.unmount();
}
