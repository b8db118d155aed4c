//! A day's work on the mount with ordinary programs, and everything still there after a remount.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use us_tests::cluster::{Cluster, Shape, fuse_is_here};
use us_tests::run::run;
use us_tests::tree::{assert_same, copy_real_sources, noise};

/// One cluster serves all of a day: starting one is what costs.
#[test]
fn a_days_work_survives_a_remount() {
    if !fuse_is_here() {
        return;
    }
    let outside = tempfile::tempdir().unwrap();
    copy_real_sources(&outside.path().join("sources"));
    let mut cluster = Cluster::start(Shape::default());
    let mount = cluster.mount();
    let disk = mount.path().to_path_buf();

    run(outside.path(), "cp", &["-a", "sources", disk.to_str().unwrap()]);
    assert_same(&outside.path().join("sources"), &disk.join("sources"));
    work_with_git(outside.path(), &disk);
    build_a_crate(&disk);
    work_with_sqlite(&disk);
    write_a_large_sparse_file(&disk);

    mount.unmount();
    let mount = cluster.mount();
    let disk = mount.path();
    assert_same(&outside.path().join("sources"), &disk.join("sources"));
    run(&disk.join("clone"), "git", &["fsck", "--full", "--strict"]);
    assert_eq!(run(&disk.join("clone"), "git", &["status", "--porcelain"]), "");
    let check =
        run(disk, "sqlite3", &["test.db", "pragma integrity_check; select count(*) from t"]);
    assert_eq!(check, "ok\n2000\n");
    check_the_large_sparse_file(disk);
    run(disk, "rm", &["-rf", "sources", "clone", "hello", "large"]);
    mount.unmount();
}

fn work_with_git(outside: &Path, disk: &Path) {
    let sources = outside.join("sources");
    run(&sources, "git", &["init", "-q"]);
    run(&sources, "git", &["add", "-A", "-f"]);
    run(&sources, "git", &["commit", "-qm", "All"]);
    run(disk, "git", &["clone", "-q", sources.to_str().unwrap(), "clone"]);
    fs::remove_dir_all(sources.join(".git")).unwrap();
    let clone = disk.join("clone");
    run(&clone, "git", &["fsck", "--full", "--strict"]);
    fs::write(clone.join("new"), "a file\n").unwrap();
    run(&clone, "git", &["add", "new"]);
    run(&clone, "git", &["commit", "-qm", "Add a file"]);
    run(&clone, "git", &["gc", "-q"]);
    assert_eq!(run(&clone, "git", &["status", "--porcelain"]), "");
}

fn build_a_crate(disk: &Path) {
    let package = disk.join("hello");
    fs::create_dir_all(package.join("src")).unwrap();
    let manifest =
        "[package]\nname = \"hello\"\nversion = \"0.1.0\"\nedition = \"2021\"\n[workspace]\n";
    fs::write(package.join("Cargo.toml"), manifest).unwrap();
    fs::write(package.join("src/main.rs"), "fn main() { println!(\"from the disk\") }\n").unwrap();
    run(&package, "cargo", &["build", "-q", "--offline"]);
    let program = package.join("target/debug/hello");
    assert_eq!(run(&package, program.to_str().unwrap(), &[]), "from the disk\n");
}

fn work_with_sqlite(disk: &Path) {
    let script = "pragma journal_mode=wal; create table t(a integer primary key, b text);
        with recursive n(i) as (select 1 union all select i + 1 from n where i < 2000)
        insert into t select i, hex(randomblob(50)) from n;
        update t set b = b || 'x' where a % 3 = 0; pragma wal_checkpoint(truncate);";
    run(disk, "sqlite3", &["test.db", script]);
    let check = run(disk, "sqlite3", &["test.db", "pragma integrity_check"]);
    assert_eq!(check, "ok\n");
}

const FIVE_GIB: u64 = 5 << 30;

fn write_a_large_sparse_file(disk: &Path) {
    let mut file = fs::File::create(disk.join("large")).unwrap();
    file.write_all(&noise(1, 9_000_001)).unwrap();
    file.write_all_at(&noise(2, 3_000_000), FIVE_GIB).unwrap();
    // Overwritten in the middle, off every boundary.
    file.write_all_at(&noise(3, 700_003), 4_194_303).unwrap();
    file.sync_all().unwrap();
    check_the_large_sparse_file(disk);
}

fn check_the_large_sparse_file(disk: &Path) {
    let mut file = fs::File::open(disk.join("large")).unwrap();
    assert_eq!(file.metadata().unwrap().len(), FIVE_GIB + 3_000_000);
    let mut wanted = noise(1, 9_000_001);
    wanted[4_194_303..4_194_303 + 700_003].copy_from_slice(&noise(3, 700_003));
    let mut start = vec![0; wanted.len()];
    file.read_exact(&mut start).unwrap();
    assert!(start == wanted, "the start of the file");
    let mut hole = vec![1; 100_000];
    file.read_exact_at(&mut hole, 3 << 30).unwrap();
    assert!(hole.iter().all(|byte| *byte == 0), "a hole reads as zeros");
    file.seek(SeekFrom::Start(FIVE_GIB)).unwrap();
    let mut end = Vec::new();
    file.read_to_end(&mut end).unwrap();
    assert!(end == noise(2, 3_000_000), "the end of the file");
}
