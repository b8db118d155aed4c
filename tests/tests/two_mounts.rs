//! Two mounts of one volume: what one closed, the other sees.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;

use us_tests::cluster::{Cluster, Shape, fuse_is_here};
use us_tests::tree::{assert_same, noise};

#[test]
fn what_one_mount_closed_the_other_sees() {
    if !fuse_is_here() {
        return;
    }
    let mut cluster = Cluster::start(Shape::default());
    let (left, right) = (cluster.mount(), cluster.mount());
    for round in 0..20u64 {
        let (writer, reader) =
            if round % 2 == 0 { (left.path(), right.path()) } else { (right.path(), left.path()) };
        // A new file, the same file rewritten, the same file grown.
        let bytes = noise(round, 10_000 + round as usize * 7_919);
        fs::write(writer.join(format!("new{round}")), &bytes).unwrap();
        assert!(
            fs::read(reader.join(format!("new{round}"))).unwrap() == bytes,
            "round {round}: new"
        );
        fs::write(writer.join("same"), &bytes).unwrap();
        assert!(fs::read(reader.join("same")).unwrap() == bytes, "round {round}: rewritten");
        let mut log =
            OpenOptions::new().create(true).append(true).open(writer.join("log")).unwrap();
        writeln!(log, "line {round}").unwrap();
        drop(log);
        let lines = fs::read_to_string(reader.join("log")).unwrap();
        assert_eq!(lines.lines().count() as u64, round + 1, "round {round}: appended\n{lines}");
        // Names.
        fs::create_dir(writer.join(format!("dir{round}"))).unwrap();
        fs::rename(writer.join(format!("new{round}")), writer.join(format!("dir{round}/moved")))
            .unwrap();
        assert!(!reader.join(format!("new{round}")).exists());
        assert!(reader.join(format!("dir{round}/moved")).exists());
    }
    assert_same(left.path(), right.path());

    // A file open on one side and removed on the other stays readable there.
    fs::write(left.path().join("doomed"), b"still here").unwrap();
    let held = fs::File::open(right.path().join("doomed")).unwrap();
    fs::remove_file(left.path().join("doomed")).unwrap();
    let mut bytes = [0; 10];
    held.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(&bytes, b"still here");
    drop(held);
    left.unmount();
    right.unmount();
}
