//! Model test: thousands of random operations on one or two mounts of a volume, each answer and then
//! the whole tree compared with a reference that is obviously right. Directory restarts, broken
//! connections and remounts come between. The directory is the real engine, the pipeline the real
//! one over providers in memory, which fail and come back; only the network and the kernel are
//! missing.
//!
//! `US_TEST_TIER=full` runs more seeds. A seed that failed stays in `SEEDS`.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "model/directory.rs"]
mod directory;
#[path = "model/tree.rs"]
mod tree;

use std::collections::HashMap;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use us_core::disk::memory::Fault;
use us_core::ids::Ino;
use usfs::fs::{
    AllocateMode, Caller, FileKind, Fs, FsError, Handle, Lookup, OpenFlags, RenameMode,
    SetAttributes, XattrMode,
};

use crate::directory::{PROVIDERS, TestDirectory};
use crate::tree::{Id, Kind, ROOT, Tree};

const NAMES: [&str; 5] = ["a", "b", "c", "d", "eeeeeeee"];
const SEEDS: [u64; 4] = [1, 2, 3, 4];
const RW: OpenFlags = OpenFlags {
    read: true,
    write: true,
    append: false,
    truncate: false,
    sync: false,
    exclusive: false,
    no_atime: false,
};

/// One file that is open in a mount and in the model.
struct Held {
    mount: usize,
    handle: Handle,
    id: Id,
}

struct World {
    directory: TestDirectory,
    mounts: Vec<Fs>,
    tree: Tree,
    held: Vec<Held>,
    rng: StdRng,
    rescue: tempfile::TempDir,
    log: Vec<String>,
}

fn errno<T>(result: Result<T, FsError>) -> Result<T, i32> {
    result.map_err(|error| {
        assert!(
            !matches!(error, FsError::Io(_) | FsError::TimedOut(_) | FsError::SessionEnded(_)),
            "{error}"
        );
        error.errno()
    })
}

async fn find(fs: &Fs, path: &[&str]) -> Result<Ino, i32> {
    let mut at = Ino::ROOT;
    for name in path {
        match errno(fs.lookup(Caller::default(), at, name.as_bytes()).await)? {
            Lookup::Found(entry) => at = entry.attributes.ino,
            Lookup::Absent(_) => return Err(libc::ENOENT),
        }
        fs.forget(at, 1);
    }
    Ok(at)
}

impl World {
    async fn new(seed: u64, mounts: usize) -> Self {
        let directory = TestDirectory::start();
        let rescue = tempfile::tempdir().unwrap();
        let mut world = Self {
            directory,
            mounts: Vec::new(),
            tree: Tree::new(),
            held: Vec::new(),
            rng: StdRng::seed_from_u64(seed),
            rescue,
            log: Vec::new(),
        };
        for _ in 0..mounts {
            let fs = world.directory.mount(world.rescue.path()).await;
            world.mounts.push(fs);
        }
        world
    }

    fn path(&mut self) -> Vec<&'static str> {
        let depth = self.rng.random_range(1..=3);
        (0..depth).map(|_| NAMES[self.rng.random_range(0..NAMES.len())]).collect()
    }

    fn data(&mut self) -> Vec<u8> {
        let length = match self.rng.random_range(0..10) {
            0 => self.rng.random_range(1..300_000),
            1..4 => self.rng.random_range(1..20_000),
            _ => self.rng.random_range(1..300),
        };
        let salt: u8 = self.rng.random();
        (0..length).map(|at: usize| (at as u8).wrapping_mul(31) ^ salt).collect()
    }

    fn offset(&mut self) -> usize {
        match self.rng.random_range(0..12) {
            0 => self.rng.random_range(0..9_000_000),
            1..4 => self.rng.random_range(0..50_000),
            _ => self.rng.random_range(0..500),
        }
    }

    /// An operation on the parent of a random path: its directory in both, or the same error.
    async fn parents(&mut self, fs: &Fs, path: &[&'static str]) -> Option<(Ino, Id)> {
        let (_, dirs) = path.split_last().unwrap();
        let (real, model) = (find(fs, dirs).await, self.tree.find(dirs));
        assert_eq!(real.as_ref().err(), model.as_ref().err(), "parent of {path:?}");
        Some((real.ok()?, model.ok()?))
    }

    async fn step(&mut self) {
        let mount = self.rng.random_range(0..self.mounts.len());
        let fs = self.mounts[mount].clone();
        let choice = self.rng.random_range(0..100);
        self.log.push(format!("mount {mount} choice {choice}"));
        match choice {
            0..12 => self.create(&fs, mount).await,
            12..18 => self.make(&fs).await,
            18..26 => self.remove(&fs).await,
            26..36 => self.rename(&fs).await,
            36..40 => self.link(&fs).await,
            40..62 => self.write(&fs, mount).await,
            62..68 => self.truncate(&fs).await,
            68..73 => self.allocate(&fs, mount).await,
            73..77 => self.clone_range(&fs, mount).await,
            77..81 => self.xattr(&fs).await,
            81..84 => self.chmod(&fs).await,
            84..88 => self.hold(&fs, mount).await,
            88..91 => self.let_go().await,
            91..95 => self.fsync(&fs, mount).await,
            _ => self.read_one(&fs, mount).await,
        }
    }

    async fn create(&mut self, fs: &Fs, _mount: usize) {
        let path = self.path();
        let Some((dir, dir_id)) = self.parents(fs, &path).await else { return };
        let name = *path.last().unwrap();
        let flags = OpenFlags { exclusive: true, ..RW };
        let real = errno(fs.create(Caller::default(), dir, name.as_bytes(), 0o644, flags).await);
        let model = self.tree.make(dir_id, name, Kind::File(Vec::new()), 0o644);
        assert_eq!(real.as_ref().err(), model.as_ref().err(), "create {path:?}");
        if let (Ok((entry, opened)), Ok(id)) = (real, model) {
            let data = self.data();
            fs.write(opened.handle, 0, Bytes::from(data.clone()), false).await.unwrap();
            self.tree.write(id, 0, &data);
            fs.release(opened.handle);
            fs.forget(entry.attributes.ino, 1);
        }
    }

    async fn make(&mut self, fs: &Fs) {
        let path = self.path();
        let Some((dir, dir_id)) = self.parents(fs, &path).await else { return };
        let name = *path.last().unwrap();
        let (real, model) = if self.rng.random_range(0..5) == 0 {
            let real = fs.symlink(Caller::default(), dir, name.as_bytes(), b"to/there").await;
            let kind = Kind::Link("to/there".to_owned());
            (errno(real), self.tree.make(dir_id, name, kind, 0o777))
        } else {
            let real = fs.mkdir(Caller::default(), dir, name.as_bytes(), 0o755).await;
            (errno(real), self.tree.make(dir_id, name, Kind::Dir(Vec::new()), 0o755))
        };
        assert_eq!(real.as_ref().err(), model.as_ref().err(), "make {path:?}");
        if let Ok(entry) = real {
            fs.forget(entry.attributes.ino, 1);
        }
    }

    async fn remove(&mut self, fs: &Fs) {
        let path = self.path();
        let Some((dir, dir_id)) = self.parents(fs, &path).await else { return };
        let name = *path.last().unwrap();
        let directory = self.rng.random_bool(0.3);
        let real = match directory {
            true => fs.rmdir(Caller::default(), dir, name.as_bytes()).await,
            false => fs.unlink(Caller::default(), dir, name.as_bytes()).await,
        };
        let model = self.tree.remove(dir_id, name, directory);
        assert_eq!(errno(real), model, "remove {path:?} {directory}");
    }

    async fn rename(&mut self, fs: &Fs) {
        let (from, to) = (self.path(), self.path());
        let Some((from_dir, from_id)) = self.parents(fs, &from).await else { return };
        let Some((to_dir, to_id)) = self.parents(fs, &to).await else { return };
        let (from_name, to_name) = (*from.last().unwrap(), *to.last().unwrap());
        let (mode, number) = match self.rng.random_range(0..4) {
            0 => (RenameMode::NoReplace, 1),
            1 => (RenameMode::Exchange, 2),
            _ => (RenameMode::Replace, 0),
        };
        let (source, target) = ((from_dir, from_name.as_bytes()), (to_dir, to_name.as_bytes()));
        let real = fs.rename(Caller::default(), source, target, mode).await;
        let model = self.tree.rename((from_id, from_name), (to_id, to_name), number);
        assert_eq!(errno(real), model, "rename {from:?} {to:?} {mode:?}");
    }

    async fn link(&mut self, fs: &Fs) {
        let (from, to) = (self.path(), self.path());
        let Some((dir, dir_id)) = self.parents(fs, &to).await else { return };
        let (Ok(ino), Ok(id)) = (find(fs, &from).await, self.tree.find(&from)) else { return };
        if !matches!(self.tree.inodes[dir_id].kind, Kind::Dir(_)) || id == ROOT {
            return;
        }
        let name = *to.last().unwrap();
        let real = errno(fs.link(Caller::default(), ino, dir, name.as_bytes()).await);
        let model = self.tree.link(id, dir_id, name);
        assert_eq!(real.as_ref().err(), model.as_ref().err(), "link {from:?} {to:?}");
        if real.is_ok() {
            fs.forget(ino, 1);
        }
    }

    /// A file to work on: a held one of this mount, or one found by a path.
    async fn file(&mut self, fs: &Fs, mount: usize) -> Option<(Handle, Id, bool)> {
        let held: Vec<_> = self.held.iter().filter(|held| held.mount == mount).collect();
        if !held.is_empty() && self.rng.random_bool(0.4) {
            let held = held[self.rng.random_range(0..held.len())];
            return Some((held.handle, held.id, false));
        }
        let path = self.path();
        let (real, model) = (find(fs, &path).await, self.tree.find(&path));
        assert_eq!(real.as_ref().err(), model.as_ref().err(), "{path:?}");
        let id = model.ok()?;
        if !self.tree.is_file(id) {
            return None;
        }
        let opened = fs.open(Caller::default(), real.ok()?, RW).await.unwrap();
        Some((opened.handle, id, true))
    }

    async fn write(&mut self, fs: &Fs, mount: usize) {
        let Some((handle, id, close)) = self.file(fs, mount).await else { return };
        let (offset, data) = (self.offset(), self.data());
        let written = match fs.try_write(handle, offset as u64, &data, false) {
            Some(written) => written,
            None => fs.write(handle, offset as u64, Bytes::from(data.clone()), false).await,
        };
        assert_eq!(written.unwrap(), data.len());
        self.tree.write(id, offset, &data);
        if close {
            fs.flush(handle, 1).await.unwrap();
            fs.release(handle);
        }
    }

    async fn truncate(&mut self, fs: &Fs) {
        let path = self.path();
        let (Ok(ino), Ok(id)) = (find(fs, &path).await, self.tree.find(&path)) else { return };
        if !self.tree.is_file(id) {
            return;
        }
        let size = self.offset();
        let change = SetAttributes { size: Some(size as u64), ..SetAttributes::default() };
        let entry = fs.setattr(Caller::default(), ino, None, change).await.unwrap();
        assert_eq!(entry.attributes.size, size as u64);
        self.tree.bytes_mut(id).resize(size, 0);
    }

    async fn allocate(&mut self, fs: &Fs, mount: usize) {
        let Some((handle, id, close)) = self.file(fs, mount).await else { return };
        let (offset, length) = (self.offset(), self.offset() + 1);
        let keep_size = self.rng.random_bool(0.5);
        let mode = match self.rng.random_range(0..3) {
            0 => AllocateMode::PunchHole,
            1 => AllocateMode::ZeroRange { keep_size },
            _ => AllocateMode::Allocate { keep_size },
        };
        fs.fallocate(handle, offset as u64, length as u64, mode).await.unwrap();
        match mode {
            AllocateMode::PunchHole => self.tree.zero(id, offset, length, false),
            AllocateMode::ZeroRange { .. } => self.tree.zero(id, offset, length, !keep_size),
            AllocateMode::Allocate { .. } => {
                let bytes = self.tree.bytes_mut(id);
                if !keep_size && bytes.len() < offset + length {
                    bytes.resize(offset + length, 0);
                }
            }
        }
        if close {
            fs.release(handle);
        }
    }

    async fn clone_range(&mut self, fs: &Fs, mount: usize) {
        let Some((from, from_id, close_from)) = self.file(fs, mount).await else { return };
        if let Some((to, to_id, close_to)) = self.file(fs, mount).await {
            let (start, target, length) = (self.offset(), self.offset(), self.offset() + 1);
            let source = self.tree.bytes_mut(from_id).clone();
            let end = (start + length).min(source.len());
            let overlap = from_id == to_id && start < target + length && target < start + length;
            if start < end && !overlap {
                let copied = fs
                    .copy_file_range((from, start as u64), (to, target as u64), length as u64)
                    .await
                    .unwrap();
                assert_eq!(copied as usize, end - start);
                self.tree.write(to_id, target, &source[start..end]);
            }
            if close_to {
                fs.release(to);
            }
        }
        if close_from {
            fs.release(from);
        }
    }

    async fn xattr(&mut self, fs: &Fs) {
        let path = self.path();
        let (Ok(ino), Ok(id)) = (find(fs, &path).await, self.tree.find(&path)) else { return };
        let name = ["user.x", "user.y"][self.rng.random_range(0..2)];
        let xattrs = &mut self.tree.inodes[id].xattrs;
        if self.rng.random_bool(0.3) {
            let model = xattrs.remove(name).map(|_| ()).ok_or(libc::ENODATA);
            let real = fs.removexattr(Caller::default(), ino, name.as_bytes()).await;
            assert_eq!(errno(real), model);
        } else {
            let value = vec![self.rng.random::<u8>(); self.rng.random_range(0..60)];
            let mode = XattrMode::Set;
            fs.setxattr(Caller::default(), ino, name.as_bytes(), &value, mode).await.unwrap();
            xattrs.insert(name.to_owned(), value);
        }
    }

    async fn chmod(&mut self, fs: &Fs) {
        let path = self.path();
        let (Ok(ino), Ok(id)) = (find(fs, &path).await, self.tree.find(&path)) else { return };
        let mode = self.rng.random_range(0..0o1000);
        let change = SetAttributes { mode: Some(mode), ..SetAttributes::default() };
        fs.setattr(Caller::default(), ino, None, change).await.unwrap();
        self.tree.inodes[id].mode = mode;
    }

    async fn hold(&mut self, fs: &Fs, mount: usize) {
        if self.held.len() > 5 {
            return;
        }
        if let Some((handle, id, true)) = self.file(fs, mount).await {
            self.held.push(Held { mount, handle, id });
        }
    }

    async fn let_go(&mut self) {
        if self.held.is_empty() {
            return;
        }
        let held = self.held.swap_remove(self.rng.random_range(0..self.held.len()));
        let fs = &self.mounts[held.mount];
        fs.flush(held.handle, 1).await.unwrap();
        fs.release(held.handle);
    }

    async fn fsync(&mut self, fs: &Fs, mount: usize) {
        let Some((handle, _, close)) = self.file(fs, mount).await else { return };
        fs.fsync(handle, false).await.unwrap();
        if close {
            fs.release(handle);
        }
    }

    async fn read_one(&mut self, fs: &Fs, mount: usize) {
        let Some((handle, id, close)) = self.file(fs, mount).await else { return };
        let (offset, length) = (self.offset(), self.offset() + 1);
        let real = fs.read(handle, offset as u64, length).await.unwrap();
        let bytes = self.tree.bytes_mut(id);
        let end = bytes.len().min(offset + length);
        let model = bytes.get(offset..end).unwrap_or_default();
        assert!(real == model, "read of {length} at {offset} of {} bytes", bytes.len());
        if close {
            fs.release(handle);
        }
    }

    /// Compares everything, as mount `mount` sees it.
    async fn compare(&mut self, mount: usize) {
        let fs = self.mounts[mount].clone();
        let mut known: HashMap<Ino, Id> = HashMap::new();
        let mut todo = vec![(Ino::ROOT, ROOT)];
        while let Some((ino, id)) = todo.pop() {
            let attributes = fs.getattr(ino).await.unwrap().attributes;
            let inode = self.tree.inodes[id].clone();
            assert_eq!(*known.entry(ino).or_insert(id), id, "one inode, two files");
            assert_eq!(attributes.nlink, inode.nlink, "nlink of {ino}: {inode:?}");
            if id != ROOT && attributes.kind != FileKind::Symlink {
                assert_eq!(attributes.permissions, inode.mode, "mode of {ino}");
            }
            let names = fs.listxattr(ino).await.unwrap();
            let expected: Vec<u8> =
                inode.xattrs.keys().flat_map(|name| name.bytes().chain([0])).collect();
            assert_eq!(names, expected, "xattrs of {ino}");
            for (name, value) in &inode.xattrs {
                assert_eq!(fs.getxattr(ino, name.as_bytes()).await.unwrap(), value);
            }
            match &inode.kind {
                Kind::Link(target) => {
                    assert_eq!(fs.readlink(ino).await.unwrap(), target.as_bytes());
                }
                Kind::File(bytes) => {
                    assert_eq!(attributes.size, bytes.len() as u64);
                    let handle = fs.open(Caller::default(), ino, RW).await.unwrap().handle;
                    let real = fs.read(handle, 0, bytes.len() + 10).await.unwrap();
                    assert!(real == bytes, "content of {ino} ({} bytes)", bytes.len());
                    fs.release(handle);
                }
                Kind::Dir(children) => {
                    let listed = list(&fs, ino).await;
                    let real: Vec<&str> = listed.iter().map(|(name, _)| name.as_str()).collect();
                    let model: Vec<&str> = children.iter().map(|(name, _)| name.as_str()).collect();
                    assert_eq!(real, model, "listing of {ino}");
                    for ((_, ino), (_, id)) in listed.iter().zip(children) {
                        todo.push((*ino, *id));
                    }
                }
            }
        }
    }

    /// The one provider that failed is well again, and another fails in some way: never two at once,
    /// since a write goes on with one fragment less and nothing repairs here.
    fn fail_another(&mut self) {
        self.directory.heal_providers();
        let provider = self.rng.random_range(1..=PROVIDERS);
        let (fault, leaves) = match self.rng.random_range(0..8) {
            0 => (Fault::Dead, true),
            1 => (Fault::Dead, false),
            2 => (Fault::Silent, self.rng.random_bool(0.5)),
            3 => (Fault::Slow(Duration::from_millis(self.rng.random_range(1..200))), false),
            4 => (Fault::Lying, false),
            5 => (Fault::Truncating, false),
            6 => (Fault::Full, false),
            _ => (Fault::Busy, false),
        };
        self.log.push(format!("provider {provider}: {fault:?}, leaves: {leaves}"));
        self.directory.fail_provider(provider, fault, leaves);
    }

    async fn remount(&mut self, mount: usize) {
        self.held.retain(|held| held.mount != mount);
        self.mounts[mount].shutdown().await.unwrap();
        self.mounts[mount] = self.directory.mount(self.rescue.path()).await;
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- the last messages");
            self.directory.trace().iter().for_each(|said| eprintln!("{said}"));
            eprintln!("--- the last operations");
            self.log.iter().rev().take(20).rev().for_each(|done| eprintln!("{done}"));
        }
    }
}

/// All names but the dots, three at a time.
async fn list(fs: &Fs, ino: Ino) -> Vec<(String, Ino)> {
    let opened = fs.opendir(Caller::default(), ino).await.unwrap();
    let mut names = Vec::new();
    let mut cookie = 0;
    loop {
        let (mut room, before) = (3, cookie);
        let mut sink = |listed: usfs::fs::Listed<'_>| {
            if room == 0 {
                return false;
            }
            room -= 1;
            cookie = listed.cookie;
            if listed.name != b"." && listed.name != b".." {
                names.push((String::from_utf8(listed.name.to_vec()).unwrap(), listed.ino));
            }
            true
        };
        fs.readdir(opened.handle, before, &mut sink).await.unwrap();
        if cookie == before {
            break;
        }
    }
    fs.releasedir(opened.handle);
    names
}

fn rounds() -> (u64, usize) {
    match std::env::var("US_TEST_TIER").as_deref() {
        Ok("full") => (40, 3000),
        Ok("soak") => (400, 5000),
        _ => (SEEDS.len() as u64, 800),
    }
}

/// What goes wrong among the operations.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Trouble {
    None,
    /// The directory restarts, connections break.
    Directory,
    /// A provider fails, comes back, and another fails; the caches are dropped by more remounts.
    Providers,
    Both,
}

async fn run(seed: u64, mounts: usize, trouble: Trouble) {
    let world = World::new(seed, mounts).await;
    run_world(world, trouble, 0).await;
}

/// Of what was not durable a restart loses up to `lost_max` commits.
async fn run_world(mut world: World, trouble: Trouble, lost_max: usize) {
    let (_, steps) = rounds();
    let mounts = world.mounts.len();
    for step in 0..steps {
        world.step().await;
        if step % 97 == 96 {
            for mount in 0..mounts {
                world.compare(mount).await;
            }
        }
        if step % 211 == 210 {
            let mount = world.rng.random_range(0..mounts);
            world.remount(mount).await;
        }
        let directory = matches!(trouble, Trouble::Directory | Trouble::Both);
        let providers = matches!(trouble, Trouble::Providers | Trouble::Both);
        if providers && step % 23 == 22 {
            world.fail_another();
        }
        if providers && step % 61 == 60 {
            let mount = world.rng.random_range(0..mounts);
            world.remount(mount).await;
            world.compare(mount).await;
        }
        if directory && step % 71 == 70 {
            match world.rng.random_range(0..2) {
                0 => world.directory.disconnect_all(),
                _ => {
                    let lost = world.rng.random_range(0..=lost_max);
                    world.directory.restart(lost);
                }
            }
        }
    }
    for mount in 0..mounts {
        world.compare(mount).await;
        world.mounts[mount].shutdown().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_mount_is_like_the_model() {
    for seed in 0..rounds().0 {
        run(seed + SEEDS[0], 1, Trouble::None).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_mounts_are_like_one_model() {
    for seed in 0..rounds().0 {
        run(seed + 100, 2, Trouble::None).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn restarts_and_broken_connections_change_nothing() {
    for seed in 0..rounds().0 {
        run(seed + 200, 1, Trouble::Directory).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn providers_that_fail_and_return_change_nothing() {
    // A read with too few providers waits for them first: some histories wait side by side.
    let runs = (0..rounds().0).flat_map(|seed| {
        [run(seed + 300, 1, Trouble::Providers), run(seed + 400, 2, Trouble::Both)]
    });
    futures::stream::iter(runs).buffer_unordered(6).collect::<()>().await;
}

/// What a live mount did and the directory had not written down is sent again, and nothing is lost or
/// done twice.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commits_that_a_restart_lost_are_replayed() {
    for seed in 0..rounds().0 {
        let world = World::new(seed + 300, 1 + seed as usize % 2).await;
        world.directory.be_lazy();
        run_world(world, Trouble::Directory, 60).await;
    }
}

/// A log with an fsync a line once took a chunk beyond the 1,024 extents it can have, and the
/// directory ended the session.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_small_pieces_of_one_chunk_are_written_anew() {
    let mut world = World::new(7, 1).await;
    let fs = world.mounts[0].clone();
    let flags = OpenFlags { append: true, ..RW };
    let (_, log) = fs.create(Caller::default(), Ino::ROOT, b"log", 0o644, flags).await.unwrap();
    let log_id = world.tree.make(ROOT, "log", Kind::File(Vec::new()), 0o644).unwrap();
    for line in 0..2500u32 {
        let text = format!("line {line}\n").into_bytes();
        fs.write(log.handle, 0, Bytes::from(text.clone()), false).await.unwrap();
        fs.fsync(log.handle, true).await.unwrap();
        world.tree.bytes_mut(log_id).extend(text);
    }
    let (_, holes) = fs.create(Caller::default(), Ino::ROOT, b"holes", 0o644, RW).await.unwrap();
    let holes_id = world.tree.make(ROOT, "holes", Kind::File(Vec::new()), 0o644).unwrap();
    for piece in 0..6000usize {
        fs.write(holes.handle, piece as u64 * 3, Bytes::from_static(b"x"), false).await.unwrap();
        world.tree.write(holes_id, piece * 3, b"x");
    }
    fs.fsync(holes.handle, false).await.unwrap();
    fs.release(log.handle);
    fs.release(holes.handle);
    world.compare(0).await;
    world.remount(0).await;
    world.compare(0).await;
}
