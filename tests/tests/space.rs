//! Space that comes back: what is overwritten, cut off and removed leaves blocks of which little lives; they
//! are written anew, and the providers hold little more than the code asks for.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use us_tests::cluster::{Cluster, Shape, fuse_is_here};
use us_tests::poll;
use us_tests::tier::{rounds, seed};
use us_tests::tree::noise;

/// Graves, the cleaner's orders one after another, and what follows from them.
const SETTLED: Duration = Duration::from_secs(240);
/// Of 4+2, and what may come on top (issue 4): headers, sums, what of a block is dead.
const BOUND: f64 = 1.3 * 6.0 / 4.0;

/// A folder on the disk, and what must be in it.
struct Churned<'a> {
    folder: &'a Path,
    model: BTreeMap<String, Vec<u8>>,
    random: StdRng,
}

impl Churned<'_> {
    fn write(&mut self, name: &str, bytes: usize) {
        let content = noise(self.random.random(), bytes);
        fs::write(self.folder.join(name), &content).expect("a write");
        self.model.insert(name.to_owned(), content);
    }

    /// Overwrites most of every large file, a piece here and a piece there: all of its blocks live on, each
    /// with a third of what it had.
    fn thin_out(&mut self) {
        for name in
            self.model.keys().filter(|name| name.starts_with("large")).cloned().collect::<Vec<_>>()
        {
            let file = File::options().write(true).open(self.folder.join(&name)).expect("open");
            file.sync_all().expect("a sync");
            let content = self.model.get_mut(&name).expect("it is there");
            for at in (0..content.len() - 200_000).step_by(300_000) {
                let new = noise(self.random.random(), 200_000);
                file.write_all_at(&new, at as u64).expect("a write");
                content[at..at + 200_000].copy_from_slice(&new);
            }
            file.sync_all().expect("a sync");
        }
    }

    fn any(&mut self) -> String {
        let at = self.random.random_range(0..self.model.len());
        self.model.keys().nth(at).expect("there is one").clone()
    }

    fn step(&mut self) {
        let name = self.any();
        let file = File::options().write(true).open(self.folder.join(&name)).expect("open");
        let content = self.model.get_mut(&name).expect("it is there");
        match self.random.random_range(0..10) {
            0 => {
                let bytes = content.len() / 2;
                file.set_len(bytes as u64).expect("a truncate");
                content.truncate(bytes);
            }
            1 => {
                fs::remove_file(self.folder.join(&name)).expect("rm");
                self.model.remove(&name);
                let bytes = self.random.random_range(1..3_000_000);
                let name = format!("again{}", self.random.random::<u32>());
                self.write(&name, bytes);
            }
            2 => file.sync_all().expect("a sync"),
            _ => {
                let bytes = self.random.random_range(1..200_000).min(content.len());
                let at = self.random.random_range(0..=content.len() - bytes);
                let new = noise(self.random.random(), bytes);
                file.write_all_at(&new, at as u64).expect("a write");
                content[at..at + bytes].copy_from_slice(&new);
            }
        }
    }

    fn check(&self, folder: &Path) {
        for (name, content) in &self.model {
            assert!(fs::read(folder.join(name)).expect(name) == *content, "{name}");
        }
        assert_eq!(fs::read_dir(folder).expect("a listing").count(), self.model.len());
    }

    /// When each file was changed last: cleaning changes no file.
    fn times(&self, folder: &Path) -> Vec<(i64, i64, u64)> {
        let times = |name: &String| {
            let file = fs::metadata(folder.join(name)).expect("attributes");
            (file.mtime(), file.mtime_nsec(), file.len())
        };
        self.model.keys().map(times).collect()
    }
}

/// Bytes that the providers hold and that nothing has deleted, and bytes that live.
fn held_and_live(cluster: &Cluster) -> Result<(u64, u64), String> {
    let status = cluster.status()?;
    let providers = status["providers"].as_array().ok_or("no providers")?.iter();
    let bytes = |value: &serde_json::Value| value.as_u64().ok_or("no number");
    let mut held = 0;
    for one in providers {
        held += bytes(&one["used_bytes"])? - bytes(&one["reclaimable_bytes"])?;
    }
    Ok((held, bytes(&status["blocks"]["live_bytes"])?))
}

#[test]
fn churn_leaves_little_behind() {
    if !fuse_is_here() {
        return;
    }
    // Nothing is old enough for the trash.
    let directory = &["--clean-after-ms", "2000", "--trash-age-ms", "86400000"];
    let mut cluster = Cluster::start(Shape { directory, ..Shape::default() });
    let mount = cluster.mount();
    let folder = mount.path().join("churn");
    fs::create_dir(&folder).expect("a folder");
    let random = StdRng::seed_from_u64(seed());
    let mut churned = Churned { folder: &folder, model: BTreeMap::new(), random };
    for number in 0..24 {
        churned.write(&format!("large{number}"), 4_000_000);
    }
    for number in 0..600 {
        churned.write(&format!("small{number}"), 10_000 + 37 * number);
    }
    churned.thin_out();
    for _ in 0..rounds(1500, 20_000, 200_000) {
        churned.step();
    }
    // Most of the small files go: the blocks they shared are nearly empty.
    for number in (0..600).filter(|number| number % 5 != 0) {
        let name = format!("small{number}");
        if churned.model.remove(&name).is_some() {
            fs::remove_file(folder.join(&name)).expect("rm");
        }
    }
    File::open(&folder).and_then(|folder| folder.sync_all()).expect("a sync");
    let before = churned.times(&folder);
    let live: u64 = churned.model.values().map(|content| content.len() as u64).sum();
    let (churned_bytes, _) = held_and_live(&cluster).expect("a status");
    let held = poll::until("space comes back", SETTLED, || {
        let (held, counted) = held_and_live(&cluster)?;
        let settled = counted == live && (held as f64) <= BOUND * live as f64;
        let parts = held as f64 / (1.5 * live as f64);
        settled.then_some(held).ok_or(format!("{held} held, {parts:.2} of {live} ({counted})"))
    });
    eprintln!(
        "{live} bytes live: {churned_bytes} held after the churn, {held} settled, {:.3} of the least",
        held as f64 / (1.5 * live as f64)
    );
    churned.check(&folder);
    assert_eq!(churned.times(&folder), before, "no file was changed");
    assert_eq!(cluster.usctl_code(&["fsck"]).0, 0);
    let other = cluster.mount();
    churned.check(&other.path().join("churn"));
    other.unmount();
    mount.unmount();
}

/// An unmount right after many small files stored each in a block of its own: six pages for one.
#[test]
fn an_unmount_leaves_small_files_packed() {
    if !fuse_is_here() {
        return;
    }
    let mut cluster = Cluster::start(Shape::default());
    let mount = cluster.mount();
    let (files, bytes) = (500_u64, 4096_u64);
    let content = |number: u64| noise(number, bytes as usize);
    for number in 0..files {
        fs::write(mount.path().join(number.to_string()), content(number)).expect("a write");
    }
    mount.unmount();
    let (held, live) = held_and_live(&cluster).expect("a status");
    assert_eq!(live, files * bytes);
    assert!(held <= 2 * live, "{held} bytes held of {live}");
    let mount = cluster.mount();
    for number in 0..files {
        let read = fs::read(mount.path().join(number.to_string())).expect("a read");
        assert!(read == content(number), "{number}");
    }
    mount.unmount();
}
