//! Mounts against the real engine and providers in memory: what one operation at a time does not
//! show. The directory and the pipeline are the real ones; the network and the kernel are missing.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "model/directory.rs"]
#[expect(dead_code, reason = "the model test uses all of it")]
mod directory;

use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use us_core::disk::memory::Fault;
use us_core::ids::{Ino, ProviderId};
use usfs::fs::{Caller, Fs, FsError, Handle, Lock, LockType, MountOptions, OpenFlags, WriteFlags};

use crate::directory::TestDirectory;

const RW: OpenFlags = OpenFlags {
    read: true,
    write: true,
    append: false,
    truncate: false,
    sync: false,
    exclusive: false,
    no_atime: false,
};

async fn create(fs: &Fs, dir: Ino, name: &str, flags: OpenFlags) -> (Ino, Handle) {
    let made = fs.create(Caller::default(), dir, name.as_bytes(), 0o644, flags).await;
    let (entry, opened) = made.unwrap();
    (entry.attributes.ino, opened.handle)
}

async fn mount_with(
    directory: &TestDirectory,
    folder: &tempfile::TempDir,
    change: impl FnOnce(&mut MountOptions),
) -> Fs {
    let rescue_dir = folder.path().to_owned();
    let mut options = MountOptions { rescue_dir, ..MountOptions::default() };
    change(&mut options);
    directory.mount_with(options).await
}

fn rescue_of(folder: &tempfile::TempDir) -> Option<PathBuf> {
    std::fs::read_dir(folder.path()).unwrap().flatten().map(|entry| entry.path()).next()
}

/// `usfs up` had two clocks of 120 seconds for the last flush, and the outer one began first: with
/// too few providers it dropped the unmount before the rescue file was written. What was in the
/// rescue file had no path, and names were ciphertext.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unmount_that_cannot_flush_leaves_a_rescue_file_with_paths() {
    let (directory, folder) = (TestDirectory::start(), tempfile::tempdir().unwrap());
    let patience = Duration::from_millis(500);
    let fs = mount_with(&directory, &folder, |options| options.flush_patience = patience).await;
    let dir = fs.mkdir(Caller::default(), Ino::ROOT, b"dir", 0o755).await.unwrap();
    (1..=6).for_each(|id| directory.swarm.set_fault(ProviderId(id), Fault::Dead));
    let (_, file) = create(&fs, dir.attributes.ino, "lost & found", RW).await;
    let content: Vec<u8> = (0..200_000u32).map(|at| (at / 7) as u8).collect();
    fs.write(file, 1000, Bytes::from(content.clone()), false).await.unwrap();

    let told = fs.shutdown().await.unwrap_err().to_string();
    let rescue = rescue_of(&folder).expect("a rescue file");
    assert!(told.contains(rescue.to_str().unwrap()), "{told}");
    let index = std::fs::read_to_string(rescue.join("index")).unwrap();
    let line = index.lines().find(|line| line.contains(": /dir/lost & found, size 201000"));
    let name = line.unwrap_or_else(|| panic!("{index}")).split(':').next().unwrap();
    let rescued = std::fs::read(rescue.join(name)).unwrap();
    assert_eq!(rescued[..1000], [0; 1000]);
    assert!(rescued[1000..] == content);
}

/// After the session ended nothing is accepted: a write that came while the rescue file was written
/// returned success and was in neither place.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_accepted_once_the_session_is_over() {
    let (directory, folder) = (TestDirectory::start(), tempfile::tempdir().unwrap());
    let patience = Duration::from_millis(500);
    let fs = mount_with(&directory, &folder, |options| options.flush_patience = patience).await;
    (1..=6).for_each(|id| directory.swarm.set_fault(ProviderId(id), Fault::Dead));
    let (_, file) = create(&fs, Ino::ROOT, "file", RW).await;
    fs.write(file, 0, Bytes::from(vec![1; 100_000]), false).await.unwrap();
    let writing = fs.clone();
    let writer = tokio::spawn(async move {
        let mut accepted = 100_000u64;
        while let Ok(written) =
            writing.write(file, accepted, Bytes::from_static(&[2; 64]), false).await
        {
            accepted += written as u64;
            tokio::task::yield_now().await;
            if accepted > 20 << 20 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
        accepted
    });
    fs.shutdown().await.unwrap_err();
    let accepted = writer.await.unwrap();
    let rescue = rescue_of(&folder).expect("a rescue file");
    let index = std::fs::read_to_string(rescue.join("index")).unwrap();
    assert!(index.contains(&format!("/file, size {accepted}")), "{accepted}\n{index}");
}

/// A program that clears `O_APPEND` with `fcntl` still wrote to the end; pages of a mapping that
/// the kernel wrote back through a descriptor opened for appending went there too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_is_done_as_the_file_is_now_and_not_as_it_was_opened() {
    let (directory, folder) = (TestDirectory::start(), tempfile::tempdir().unwrap());
    let fs = directory.mount(folder.path()).await;
    let (_, file) = create(&fs, Ino::ROOT, "log", OpenFlags { append: true, ..RW }).await;
    fs.write(file, 0, Bytes::from_static(b"first"), false).await.unwrap();
    fs.write(file, 0, Bytes::from_static(b"second"), false).await.unwrap();
    let plain = WriteFlags::default();
    assert_eq!(fs.try_write_as(file, 0, b"F", plain), Some(Ok(1)));
    let append = WriteFlags { append: true, ..plain };
    assert_eq!(fs.try_write_as(file, 0, b"!", append), Some(Ok(1)));
    let sync = WriteFlags { sync: true, ..plain };
    assert_eq!(fs.try_write_as(file, 1, b"I", sync), None, "it waits to be durable");
    fs.write_as(file, 1, Bytes::from_static(b"I"), sync).await.unwrap();
    assert_eq!(fs.read(file, 0, 100).await.unwrap(), &b"FIrstsecond!"[..]);
    fs.shutdown().await.unwrap();
}

/// `-o noatime` and `O_NOATIME` reached the kernel only; the mount went on renewing access times.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn access_times_stay_where_nobody_wants_them() {
    let (directory, folder) = (TestDirectory::start(), tempfile::tempdir().unwrap());
    let quiet = OpenFlags { no_atime: true, ..RW };
    for (no_atime, flags, changes) in [(false, RW, true), (true, RW, false), (false, quiet, false)]
    {
        let fs = mount_with(&directory, &folder, |options| options.no_atime = no_atime).await;
        let (ino, file) = create(&fs, Ino::ROOT, &format!("{no_atime}{changes}"), flags).await;
        fs.write(file, 0, Bytes::from_static(b"text"), false).await.unwrap();
        let before = fs.getattr(ino).await.unwrap().attributes.atime;
        fs.read(file, 0, 4).await.unwrap();
        let after = fs.getattr(ino).await.unwrap().attributes.atime;
        assert_eq!(after != before, changes, "noatime {no_atime}, {flags:?}");
        fs.shutdown().await.unwrap();
    }
}

fn whole(owner: u64) -> Lock {
    Lock { owner, start: 0, end: u64::MAX, kind: LockType::Write, pid: 1 }
}

/// The owner was forgotten before the directory was asked: a connection that broke meanwhile left
/// the lock behind for the life of the session. And a lock that was taken by an open file (OFD) was
/// never released by its close.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn locks_end_with_the_open_file() {
    let (directory, folder) = (TestDirectory::start(), tempfile::tempdir().unwrap());
    let (one, two) = (directory.mount(folder.path()).await, directory.mount(folder.path()).await);
    let (ino, file) = create(&one, Ino::ROOT, "file", RW).await;
    one.fsync(file, true).await.unwrap();
    for round in 0..4 {
        let other = one.open(Caller::default(), ino, RW).await.unwrap().handle;
        one.setlk(ino, other, whole(7), false).await.unwrap();
        let there = two.open(Caller::default(), ino, RW).await.unwrap().handle;
        assert_eq!(two.setlk(ino, there, whole(9), false).await, Err(FsError::Locked));
        if round % 2 == 0 {
            // As a POSIX owner closes.
            one.flush(other, 7).await.unwrap();
        }
        one.release(other);
        two.setlk(ino, there, whole(9), true).await.unwrap();
        two.flush(there, 9).await.unwrap();
        two.release(there);
    }
    one.shutdown().await.unwrap();
    two.shutdown().await.unwrap();
}
