//! Directories as others use them: a listing that goes on while names come and go, places in it that are
//! kept over a remount, and files that are reached by a handle instead of a name (NFS).

use std::fs::{self, File};
use std::io::Read;
use std::mem::MaybeUninit;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};

use rustix::fs::{RawDir, RenameFlags, SeekFrom, renameat_with, seek};
use rustix::io::Errno;
use us_tests::cluster::{Cluster, Shape, fuse_is_here};
use us_tests::handles::FileHandle;
use us_tests::tier::rounds;
use us_tests::tree::noise;

/// Names that another makes and removes meanwhile, and that are there at once.
const COMING_AND_GOING: u64 = 20;
/// The other mount has its turn after so many names, and makes so many changes in it.
const NAMES_A_TURN: usize = 500;
const CHANGES: usize = 10;

/// A name in a listing, and the cookie of the place behind it.
type Listed = (String, u64);

fn list(dir: &File, mut each: impl FnMut(Listed) -> bool) {
    let mut buffer = [MaybeUninit::uninit(); 32 << 10];
    let mut listing = RawDir::new(dir, &mut buffer);
    while let Some(entry) = listing.next() {
        let entry = entry.expect("an entry");
        let name = entry.file_name().to_str().expect("text").to_owned();
        if name != "." && name != ".." && !each((name, entry.next_entry_cookie())) {
            return;
        }
    }
}

fn name(number: u64) -> String {
    format!("{number:07}")
}

/// Makes and removes names, a few each time it is asked, and says when they are done; how many changes.
fn come_and_go(dir: &Path, asked: &Receiver<()>, done: &Sender<()>) -> u64 {
    let mut made = 0;
    while asked.recv().is_ok() {
        for _ in 0..CHANGES {
            File::create(dir.join(format!("new{made}"))).expect("a file");
            if let Some(old) = u64::checked_sub(made, COMING_AND_GOING) {
                fs::remove_file(dir.join(format!("new{old}"))).expect("it is there");
            }
            made += 1;
        }
        done.send(()).expect("it is waited for");
    }
    made
}

/// Every name that is there all the time is listed once, in the order in which they were made; whatever another
/// mount does meanwhile. A place in the listing is the same after a remount and a restart of the directory.
#[test]
fn a_large_directory_is_listed_in_order_while_it_changes() {
    if !fuse_is_here() {
        return;
    }
    let entries = u64::from(rounds(10_000, 1_000_000, 1_000_000));
    let mut cluster = Cluster::start(Shape::default());
    let (left, right) = (cluster.mount(), cluster.mount());
    let large = left.path().join("large");
    fs::create_dir(&large).expect("a folder");
    for number in 0..entries {
        File::create(large.join(name(number))).expect("a file");
    }

    let mut listed: Vec<Listed> = Vec::new();
    let ((ask, asked), (done, is_done)) = (channel(), channel());
    let changes = std::thread::scope(|scope| {
        let theirs = right.path().join("large");
        let other = scope.spawn(move || come_and_go(&theirs, &asked, &done));
        let dir = File::open(&large).expect("open");
        list(&dir, |entry| {
            listed.push(entry);
            if listed.len().is_multiple_of(NAMES_A_TURN) {
                ask.send(()).expect("it is there");
                is_done.recv().expect("the other mount's changes");
            }
            true
        });
        drop(ask);
        other.join().expect("no panic")
    });
    eprintln!("{entries} names, {changes} changes meanwhile");
    assert_eq!(changes as usize, CHANGES * (listed.len() / NAMES_A_TURN));
    assert!(changes as usize > 2 * COMING_AND_GOING as usize, "names were removed too");
    assert!(listed.is_sorted_by(|one, next| one.1 < next.1), "cookies go up");
    let stable = |entry: &&Listed| !entry.0.starts_with("new");
    let stable: Vec<Listed> = listed.iter().filter(stable).cloned().collect();
    assert_eq!(stable.len() as u64, entries);
    for (number, (found, _)) in (0..).zip(&stable) {
        assert_eq!(*found, name(number), "in the order in which they were made");
    }
    let mut others: Vec<&String> =
        listed.iter().map(|entry| &entry.0).filter(|name| name.starts_with("new")).collect();
    let count = others.len();
    others.sort_unstable();
    others.dedup();
    assert_eq!(others.len(), count, "no name twice");

    for number in (0..entries).filter(|number| number % 3 == 0) {
        fs::remove_file(right.path().join("large").join(name(number))).expect("rm");
    }
    left.unmount();
    right.unmount();
    cluster.kill_directory();
    cluster.start_directory();
    let mount = cluster.mount();
    let dir = File::open(mount.path().join("large")).expect("open");
    let last = entries - 3;
    for number in (0..last).step_by((entries / 50) as usize).chain([last]) {
        let (_, cookie) = stable[number as usize];
        seek(&dir, SeekFrom::Start(cookie)).expect("a place");
        let mut next = None;
        list(&dir, |(name, _)| {
            next = Some(name);
            false
        });
        let behind = (number + 1..).find(|number| number % 3 != 0).expect("there is one");
        assert_eq!(next.as_deref(), Some(&*name(behind)), "behind {number}");
    }
    mount.unmount();
}

fn read_all(mut file: File) -> Vec<u8> {
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).expect("bytes");
    bytes
}

/// What an NFS server keeps of a file is good for as long as the file is, also over a remount, when the
/// kernel knows nothing but the number; then it is told that the handle is stale.
#[test]
fn a_handle_outlives_a_remount_and_a_rename_but_not_the_file() {
    if !fuse_is_here() {
        return;
    }
    let mut cluster = Cluster::start(Shape::default());
    let mount = cluster.mount();
    let folder = mount.path().join("one/two");
    fs::create_dir_all(&folder).expect("folders");
    fs::write(folder.join("file"), noise(1, 70_000)).expect("a write");
    fs::write(folder.join("doomed"), b"not for long").expect("a write");
    let handles =
        ["file", "doomed", "."].map(|name| FileHandle::of(&folder.join(name)).expect(name));
    let ino = fs::metadata(folder.join("file")).expect("attributes").ino();
    mount.unmount();

    let mount = cluster.mount();
    let [file, doomed, dir] = handles;
    let disk = File::open(mount.path()).expect("open");
    let opened = file.open(&disk, libc::O_RDONLY).expect("by its number alone");
    assert_eq!(opened.metadata().expect("attributes").ino(), ino);
    assert!(read_all(opened) == noise(1, 70_000));
    fs::rename(mount.path().join("one/two/file"), mount.path().join("moved")).expect("a rename");
    assert!(read_all(file.open(&disk, libc::O_RDONLY).expect("elsewhere")) == noise(1, 70_000));
    assert_eq!(FileHandle::of(&mount.path().join("moved")).expect("a handle"), file);

    let opened = dir.open(&disk, libc::O_RDONLY | libc::O_DIRECTORY).expect("a folder");
    let mut names = Vec::new();
    list(&opened, |(name, _)| {
        names.push(name);
        true
    });
    assert_eq!(names, ["doomed"]);
    let removed = fs::remove_file(mount.path().join("one/two/doomed"));
    removed.expect("rm");
    let stale = doomed.open(&disk, libc::O_RDONLY).expect_err("it is gone");
    assert_eq!(stale.raw_os_error(), Some(libc::ESTALE), "{stale}");
    drop((opened, disk));
    mount.unmount();
    let mount = cluster.mount();
    let disk = File::open(mount.path()).expect("open");
    let stale = doomed.open(&disk, libc::O_RDONLY).expect_err("it is gone");
    assert_eq!(stale.raw_os_error(), Some(libc::ESTALE), "{stale}");

    // The renames that are no plain ones: refused or done, and no kind spoils another.
    let [a, b] = ["a", "b"].map(|name| mount.path().join(name));
    fs::write(&a, "a").expect("a write");
    fs::write(&b, "b").expect("a write");
    let rename = |flags| renameat_with(rustix::fs::CWD, &a, rustix::fs::CWD, &b, flags);
    assert_eq!(rename(RenameFlags::WHITEOUT), Err(Errno::INVAL));
    assert_eq!(rename(RenameFlags::NOREPLACE), Err(Errno::EXIST));
    assert_eq!(rename(RenameFlags::EXCHANGE), Ok(()));
    assert_eq!(
        (fs::read(&a).expect("bytes"), fs::read(&b).expect("bytes")),
        (b"b".into(), b"a".into())
    );
    drop(disk);
    mount.unmount();
}
