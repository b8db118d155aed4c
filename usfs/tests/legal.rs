//! Whatever programs may do, a session does not end for it. And what a crash of the mount leaves is
//! what was synced, and a prefix of the rest.
//!
//! Random operations, each on inodes as a kernel has them: with a name or without (removed working
//! directories, `O_PATH` descriptors, files unlinked while open), on two mounts that write and one that
//! only reads, several at a time. No answer is checked but this: none is EIO, and no session ends. The
//! directory is the real engine, as in `model.rs`; a rule that a mutation breaks ends the session.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "model/directory.rs"]
mod directory;

use std::collections::BTreeMap;
use std::path::Path;

use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use us_core::disk::memory::Fault;
use us_core::ids::Ino;
use usfs::fs::{
    AllocateMode, Caller, Entry, FileKind, Fs, FsError, Handle, Lookup, MountOptions, OpenFlags,
    RenameMode, SetAttributes, XattrMode,
};

use crate::directory::{PROVIDERS, TestDirectory};

const CHUNK_BYTES: u64 = us_core::limits::CHUNK_BYTES;
const NAMES: [&[u8]; 6] = [b"a", b"b", b"c", b"d", b"e", b"f"];
/// Inodes a made-up kernel knows at once.
const KNOWN_MAX: usize = 24;
const RW: OpenFlags = OpenFlags {
    read: true,
    write: true,
    append: false,
    truncate: false,
    sync: false,
    exclusive: false,
    no_atime: false,
};

/// One process on one mount, and its part of the kernel: what it has looked up and opened.
struct Process {
    fs: Fs,
    rng: StdRng,
    known: Vec<(Ino, FileKind)>,
    open: Vec<Handle>,
    last: String,
}

fn steps() -> u64 {
    match std::env::var("US_TEST_TIER").as_deref() {
        Ok("full") => 6_000,
        Ok("soak") => 40_000,
        _ => 700,
    }
}

fn seeds() -> u64 {
    match std::env::var("US_TEST_TIER").as_deref() {
        Ok("full" | "soak") => 20,
        _ => 3,
    }
}

impl Process {
    fn new(fs: &Fs, seed: u64) -> Self {
        let known = vec![(Ino::ROOT, FileKind::Directory)];
        let rng = StdRng::seed_from_u64(seed);
        Self { fs: fs.clone(), rng, known, open: Vec::new(), last: String::new() }
    }

    /// Any error will do that says what is wrong with the operation itself.
    fn check<T>(&self, result: Result<T, FsError>) -> Option<T> {
        if let Err(error) = &result {
            let broken = matches!(
                error,
                FsError::Io(_)
                    | FsError::TimedOut(_)
                    | FsError::SessionEnded(_)
                    | FsError::ShuttingDown
            );
            assert!(!broken, "{}: {error}", self.last);
        }
        result.ok()
    }

    fn name(&mut self) -> &'static [u8] {
        NAMES[self.rng.random_range(0..NAMES.len())]
    }

    fn pick(&mut self, wanted: Option<FileKind>) -> Option<Ino> {
        let all: Vec<Ino> = self
            .known
            .iter()
            .filter(|(_, kind)| wanted.is_none_or(|wanted| *kind == wanted))
            .map(|(ino, _)| *ino)
            .collect();
        (!all.is_empty()).then(|| all[self.rng.random_range(0..all.len())])
    }

    fn learn(&mut self, entry: Entry) {
        self.known.push((entry.attributes.ino, entry.attributes.kind));
        if self.known.len() > KNOWN_MAX {
            self.forget();
        }
    }

    fn forget(&mut self) {
        if self.known.len() > 1 {
            let at = self.rng.random_range(1..self.known.len());
            let (ino, _) = self.known.swap_remove(at);
            self.fs.forget(ino, 1);
        }
    }

    fn offset(&mut self) -> u64 {
        match self.rng.random_range(0..6) {
            0 => self.rng.random_range(0..3 * CHUNK_BYTES),
            1 => CHUNK_BYTES - self.rng.random_range(0..3000),
            _ => self.rng.random_range(0..5000),
        }
    }

    async fn step(&mut self) {
        let choice = self.rng.random_range(0..100);
        self.last = format!("choice {choice}");
        match choice {
            0..16 => self.look_up().await,
            16..34 => self.change_names().await,
            34..46 => self.change_attributes().await,
            46..52 => self.open().await,
            52..88 => self.use_file().await,
            88..92 => self.close().await,
            92..96 => self.forget(),
            _ => self.list().await,
        }
    }

    async fn look_up(&mut self) {
        let Some(dir) = self.pick(Some(FileKind::Directory)) else { return };
        let name = self.name();
        let found = self.fs.lookup(Caller::default(), dir, name).await;
        if let Some(Lookup::Found(entry)) = self.check(found) {
            self.learn(entry);
        }
    }

    async fn change_names(&mut self) {
        let caller = Caller::default();
        let (Some(dir), name) = (self.pick(Some(FileKind::Directory)), self.name()) else { return };
        let (Some(to), new) = (self.pick(Some(FileKind::Directory)), self.name()) else { return };
        let fs = self.fs.clone();
        match self.rng.random_range(0..9) {
            0 | 1 => {
                let made = fs.mkdir(caller, dir, name, 0o755).await;
                self.check(made).into_iter().for_each(|entry| self.learn(entry));
            }
            2 => {
                let made = fs.create(caller, dir, name, 0o644, RW).await;
                if let Some((entry, opened)) = self.check(made) {
                    self.learn(entry);
                    self.open.push(opened.handle);
                }
            }
            3 => {
                let removed = fs.unlink(caller, dir, name).await;
                self.check(removed);
            }
            4 => {
                let removed = fs.rmdir(caller, dir, name).await;
                self.check(removed);
            }
            5 => {
                let Some(ino) = self.pick(None) else { return };
                let linked = fs.link(caller, ino, dir, name).await;
                self.check(linked).into_iter().for_each(|entry| self.learn(entry));
            }
            6 => {
                let made = fs.symlink(caller, dir, name, b"there").await;
                self.check(made).into_iter().for_each(|entry| self.learn(entry));
            }
            _ => {
                let modes = [RenameMode::Replace, RenameMode::NoReplace, RenameMode::Exchange];
                let mode = modes[self.rng.random_range(0..modes.len())];
                self.last = format!("rename {dir} {name:?} to {to} {new:?} {mode:?}");
                let renamed = fs.rename(caller, (dir, name), (to, new), mode).await;
                self.check(renamed);
            }
        }
    }

    async fn change_attributes(&mut self) {
        let Some(ino) = self.pick(None) else { return };
        let fs = self.fs.clone();
        let name = [&b"user.a"[..], b"user.b", b"user.c"][self.rng.random_range(0..3)];
        match self.rng.random_range(0..5) {
            0 => {
                let mode = Some(self.rng.random_range(0..0o1000));
                let change = SetAttributes { mode, ..SetAttributes::default() };
                let changed = fs.setattr(Caller::default(), ino, None, change).await;
                self.check(changed);
            }
            1 => {
                let size = Some(self.offset());
                let change = SetAttributes { size, ..SetAttributes::default() };
                let changed = fs.setattr(Caller::default(), ino, None, change).await;
                self.check(changed);
            }
            2 => {
                // Seventeen of the largest do not fit an inode.
                let name = format!("user.{}", self.rng.random_range(0..20));
                let value = vec![1; self.rng.random_range(60_000..=65_536)];
                let set =
                    fs.setxattr(Caller::default(), ino, name.as_bytes(), &value, XattrMode::Set);
                let set = set.await;
                self.check(set);
            }
            3 => {
                let set = fs.setxattr(Caller::default(), ino, name, b"small", XattrMode::Set).await;
                self.check(set);
            }
            _ => {
                let removed = fs.removexattr(Caller::default(), ino, name).await;
                self.check(removed);
            }
        }
    }

    async fn open(&mut self) {
        let Some(ino) = self.pick(Some(FileKind::Regular)) else { return };
        let write = self.rng.random_bool(0.7);
        let opened = self.fs.open(Caller::default(), ino, OpenFlags { write, ..RW }).await;
        if let Some(opened) = self.check(opened) {
            self.open.push(opened.handle);
        }
        if self.open.len() > 8 {
            self.close().await;
        }
    }

    async fn close(&mut self) {
        if !self.open.is_empty() {
            let handle = self.open.swap_remove(self.rng.random_range(0..self.open.len()));
            let flushed = self.fs.flush(handle, 1).await;
            self.check(flushed);
            self.fs.release(handle);
        }
    }

    async fn use_file(&mut self) {
        if self.open.is_empty() {
            return self.open().await;
        }
        let handle = self.open[self.rng.random_range(0..self.open.len())];
        let other = self.open[self.rng.random_range(0..self.open.len())];
        let (offset, fs) = (self.offset(), self.fs.clone());
        let length = self.rng.random_range(1..9000);
        match self.rng.random_range(0..12) {
            0..5 => {
                let written = fs.write(handle, offset, vec![7u8; length].into(), false).await;
                self.check(written);
            }
            5 => {
                for piece in 0..self.rng.random_range(1..400) {
                    let at = offset + piece * 3;
                    let written = fs.write(handle, at, Bytes::from_static(b"x"), false).await;
                    self.check(written);
                }
            }
            6 => {
                let read = fs.read(handle, offset, length).await;
                self.check(read);
            }
            7 | 8 => {
                let synced = fs.fsync(handle, false).await;
                self.check(synced);
            }
            9 => {
                let keep_size = self.rng.random_bool(0.5);
                let modes = [
                    AllocateMode::PunchHole,
                    AllocateMode::ZeroRange { keep_size },
                    AllocateMode::Allocate { keep_size },
                ];
                let mode = modes[self.rng.random_range(0..modes.len())];
                let length = self.offset() + 1;
                let allocated = fs.fallocate(handle, offset, length, mode).await;
                self.check(allocated);
            }
            _ => {
                let (target, length) = (self.offset(), self.offset() + 1);
                let cloned = fs.copy_file_range((handle, offset), (other, target), length).await;
                self.check(cloned);
            }
        }
    }

    async fn list(&mut self) {
        let Some(dir) = self.pick(Some(FileKind::Directory)) else { return };
        let opened = self.fs.opendir(Caller::default(), dir).await;
        let Some(opened) = self.check(opened) else { return };
        let mut entries = Vec::new();
        let mut sink = |listed: usfs::fs::Listed<'_>| {
            entries.extend(listed.entry);
            true
        };
        let listed = self.fs.readdirplus(opened.handle, 0, &mut sink).await;
        self.check(listed);
        entries.into_iter().for_each(|entry| self.learn(entry));
        self.fs.releasedir(opened.handle);
    }
}

async fn mounts(directory: &TestDirectory, rescue: &Path) -> Vec<Fs> {
    let mut mounts = Vec::new();
    for read_only in [false, false, true] {
        let rescue_dir = rescue.to_owned();
        let options = MountOptions { read_only, rescue_dir, ..MountOptions::default() };
        mounts.push(directory.mount_with(options).await);
    }
    mounts
}

/// Runs two processes on each of `mounts`, all at once, while connections break and a provider is
/// away, and then looks whether all live.
async fn run(directory: &TestDirectory, mounts: &[Fs], seed: u64) {
    let mut running = tokio::task::JoinSet::new();
    for (number, fs) in mounts.iter().chain(mounts).enumerate() {
        let mut process = Process::new(fs, seed * 100 + number as u64);
        running.spawn(async move {
            for _ in 0..steps() {
                process.step().await;
            }
        });
    }
    while let Some(ended) = running.join_next().await {
        if ended.is_err() {
            directory.trace().iter().for_each(|said| eprintln!("{said}"));
        }
        ended.unwrap();
        directory.disconnect_all();
        directory.heal_providers();
        directory.fail_provider(1 + seed % PROVIDERS, Fault::Dead, true);
    }
    directory.heal_providers();
    for fs in mounts {
        fs.getattr(Ino::ROOT).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_a_program_does_ends_a_session() {
    for seed in 1..=seeds() {
        let (directory, rescue) = (TestDirectory::start(), tempfile::tempdir().unwrap());
        let mounts = mounts(&directory, rescue.path()).await;
        run(&directory, &mounts, seed).await;
        for fs in mounts {
            fs.shutdown().await.unwrap();
        }
    }
}

/// A file that another mount removes while a mount that only reads has it open.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_read_only_mount_lives_on_when_what_it_has_open_is_changed() {
    let (directory, rescue) = (TestDirectory::start(), tempfile::tempdir().unwrap());
    let mounts = mounts(&directory, rescue.path()).await;
    let (writer, reader) = (&mounts[0], &mounts[2]);
    let caller = Caller::default();
    for gone in [false, true] {
        let (_, made) = writer.create(caller, Ino::ROOT, b"f", 0o644, RW).await.unwrap();
        writer.write(made.handle, 0, Bytes::from_static(b"one"), false).await.unwrap();
        let Lookup::Found(entry) = reader.lookup(caller, Ino::ROOT, b"f").await.unwrap() else {
            panic!("the file is there");
        };
        let ino = entry.attributes.ino;
        let flags = OpenFlags { write: false, ..RW };
        let opened = reader.open(caller, ino, flags).await.unwrap();
        assert_eq!(reader.read(opened.handle, 0, 10).await.unwrap(), "one");
        writer.write(made.handle, 0, Bytes::from_static(b"two"), false).await.unwrap();
        if gone {
            writer.unlink(caller, Ino::ROOT, b"f").await.unwrap();
        }
        assert_eq!(reader.read(opened.handle, 0, 10).await.unwrap(), "two");
        writer.release(made.handle);
        reader.release(opened.handle);
        reader.forget(ino, 1);
        reader.getattr(Ino::ROOT).await.unwrap();
        if !gone {
            writer.unlink(caller, Ino::ROOT, b"f").await.unwrap();
        }
    }
    for fs in mounts {
        fs.shutdown().await.unwrap();
    }
}

fn pattern(file: usize, bytes: usize) -> Vec<u8> {
    (0..bytes).map(|at| (at as u8).wrapping_mul(7) ^ file as u8 | 1).collect()
}

/// What a mount did before it crashed.
#[derive(Default)]
struct Done {
    /// Lengths of the files made, in order: file `n` is named `n`.
    files: Vec<usize>,
    /// Files that were synced, and how many names were there then.
    synced: BTreeMap<usize, usize>,
    /// The newest version of the hot file that was synced.
    hot: u8,
}

/// Makes files, syncs some of them, and all the while one file is rewritten and synced.
async fn work(fs: &Fs, rng: &mut StdRng) -> Done {
    let caller = Caller::default();
    let (_, hot) = fs.create(caller, Ino::ROOT, b"hot", 0o644, RW).await.unwrap();
    let mut done = Done::default();
    for file in 0..rng.random_range(20..120) {
        let bytes = if rng.random_bool(0.2) { 200_000 } else { rng.random_range(1..9000) };
        let name = file.to_string();
        let made = fs.create(caller, Ino::ROOT, name.as_bytes(), 0o644, RW).await;
        let (entry, opened) = made.unwrap();
        done.files.push(bytes);
        let content = Bytes::from(pattern(file, bytes));
        fs.write(opened.handle, 0, content, false).await.unwrap();
        if rng.random_bool(0.3) {
            // A writer goes on while the file is synced.
            let version = done.hot + 1;
            fs.write(hot.handle, 0, vec![version; 5000].into(), false).await.unwrap();
            let newer = fs.write(hot.handle, 0, vec![version + 1; 5000].into(), false);
            let (hot_synced, synced, newer) =
                tokio::join!(fs.fsync(hot.handle, false), fs.fsync(opened.handle, false), newer);
            hot_synced.unwrap();
            synced.unwrap();
            newer.unwrap();
            done.hot = version;
            done.synced.insert(file, done.files.len());
        }
        fs.release(opened.handle);
        fs.forget(entry.attributes.ino, 1);
    }
    done
}

async fn content(fs: &Fs, name: &str) -> Option<Vec<u8>> {
    let caller = Caller::default();
    let Lookup::Found(entry) = fs.lookup(caller, Ino::ROOT, name.as_bytes()).await.unwrap() else {
        return None;
    };
    let opened = fs.open(caller, entry.attributes.ino, RW).await.unwrap();
    let read = fs.read(opened.handle, 0, 1 << 20).await.unwrap();
    assert_eq!(read.len() as u64, entry.attributes.size);
    fs.release(opened.handle);
    Some(read.to_vec())
}

/// The mount dies; the next one finds what was synced, and of the rest a prefix.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_synced_survives_a_crash_of_the_mount_and_the_rest_is_a_prefix() {
    for seed in 1..=seeds() * 3 {
        let mut rng = StdRng::seed_from_u64(seed);
        let (directory, rescue) = (TestDirectory::start(), tempfile::tempdir().unwrap());
        directory.be_lazy();
        let fs = directory.mount(rescue.path()).await;
        let done = work(&fs, &mut rng).await;
        let session = fs.session();
        fs.abandon().await;
        if rng.random_bool(0.5) {
            // The directory dies as well, with what nobody was told is durable.
            directory.restart(rng.random_range(0..40));
        }
        let (rescue_dir, replaces) = (rescue.path().to_owned(), vec![session]);
        let options = MountOptions { rescue_dir, replaces, ..MountOptions::default() };
        let fs = directory.mount_with(options).await;
        let mut found = 0;
        for (file, bytes) in done.files.iter().enumerate() {
            let Some(content) = content(&fs, &file.to_string()).await else { continue };
            assert_eq!(found, file, "seed {seed}: a name is there and an older one is not");
            found += 1;
            let whole = pattern(file, *bytes);
            assert!(whole.starts_with(&content), "seed {seed}: file {file} has wrong bytes");
            if done.synced.contains_key(&file) {
                assert_eq!(content.len(), whole.len(), "seed {seed}: file {file} was synced");
            }
        }
        let names = done.synced.values().max().copied().unwrap_or_default();
        assert!(found >= names, "seed {seed}: {found} names of {names} that were synced");
        if done.hot > 0 {
            let hot = content(&fs, "hot").await.unwrap();
            assert_eq!(hot.len(), 5000, "seed {seed}: the hot file was synced");
            assert!(hot.iter().all(|byte| *byte >= done.hot), "seed {seed}: an old version");
        }
        fs.shutdown().await.unwrap();
    }
}
