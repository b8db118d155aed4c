//! Putting back what lies in a trash: where it lay, or under another folder.
//!
//! A folder that is there is used as it is. One that lies in the trash itself comes back with what was in
//! it; under another folder one is made where the old one still stands. A name that is taken is never
//! replaced: what comes back has another one.

use std::collections::{HashMap, HashSet};

use anyhow::bail;
use us_core::limits::DEPTH_MAX;
use us_core::name::NAME_BYTES_MAX;
use us_proto::v1::LeaseLevel;

use super::listing::{Item, Listing, join};
use super::session::Session;

/// Names tried where one is taken.
const NAMES_TRIED: u32 = 10_000;

/// Something that is back.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Back {
    pub ino: u64,
    pub from: String,
    pub to: String,
}

/// What is put back, and where folders are by now.
pub(super) struct PuttingBack<'l> {
    session: Session,
    listing: &'l Listing,
    /// Under another folder.
    elsewhere: bool,
    /// Of a folder as the listing has it: the one that takes its place.
    homes: HashMap<u64, u64>,
    /// Of folders that are there: their paths.
    paths: HashMap<u64, Vec<u8>>,
    /// Folders that came back or were made, and hold nothing but what is in `used`.
    fresh: HashSet<u64>,
    used: HashSet<(u64, Vec<u8>)>,
    pub back: Vec<Back>,
}

impl<'l> PuttingBack<'l> {
    pub fn new(session: Session, listing: &'l Listing) -> Self {
        Self {
            session,
            listing,
            elsewhere: false,
            homes: HashMap::new(),
            paths: HashMap::from([(1, Vec::new())]),
            fresh: HashSet::new(),
            used: HashSet::new(),
            back: Vec::new(),
        }
    }

    /// Everything goes under the folder at this path from now on: what lay in one of `tops` right into
    /// it.
    pub async fn under(&mut self, path: &[u8], tops: &[u64]) -> anyhow::Result<()> {
        let mut at = 1;
        for name in path.split(|byte| *byte == b'/').filter(|name| !name.is_empty()) {
            match self.session.lookup(at, name, LeaseLevel::Shared).await? {
                Some(found) if found.is_dir => at = found.ino,
                _ => bail!("there is no folder {:?}", String::from_utf8_lossy(path)),
            }
        }
        self.elsewhere = true;
        self.paths.insert(at, path.to_vec());
        self.homes.insert(1, at);
        self.homes.extend(tops.iter().map(|top| (*top, at)));
        Ok(())
    }

    /// Puts one thing back, and the folders it lay in.
    pub async fn put(&mut self, item: &Item) -> anyhow::Result<()> {
        if item.is_dir() {
            self.home(item.entry.ino, item).await?;
            return Ok(());
        }
        let home = self.home(item.entry.dir, item).await?;
        let name = self.free_name(home, &item.name).await?;
        self.session.restore(home, &name, item.entry.ino).await?;
        self.came_back(item, home, name);
        Ok(())
    }

    fn came_back(&mut self, item: &Item, home: u64, name: Vec<u8>) {
        let to = self.path_in(home, &name);
        let to = String::from_utf8_lossy(&to).into_owned();
        self.back.push(Back { ino: item.entry.ino, from: item.shown(), to });
        self.used.insert((home, name));
    }

    fn path_in(&self, dir: u64, name: &[u8]) -> Vec<u8> {
        let known = self.paths.get(&dir).cloned();
        join(&known.or_else(|| self.listing.folder_path(dir)).unwrap_or_default(), name)
    }

    /// The folder that takes the place of `dir`, made or brought back where it is not there.
    async fn home(&mut self, dir: u64, item: &Item) -> anyhow::Result<u64> {
        let (mut at, mut missing) = (dir, Vec::new());
        let mut home = loop {
            if let Some(home) = self.homes.get(&at) {
                break *home;
            }
            if !self.elsewhere && self.listing.is_live(at) {
                break at;
            }
            let Some((above, _)) = self.listing.place(at).filter(|_| missing.len() < DEPTH_MAX)
            else {
                let (id, name) = (item.entry.ino, item.shown());
                bail!("the folder that {name} ({id}) lay in is gone for good: say --to FOLDER");
            };
            missing.push(at);
            at = above;
        };
        for dir in missing.into_iter().rev() {
            home = self.folder(home, dir, item).await?;
            self.homes.insert(dir, home);
        }
        Ok(home)
    }

    /// The folder in `above` that takes the place of `dir`.
    async fn folder(&mut self, above: u64, dir: u64, item: &Item) -> anyhow::Result<u64> {
        let Some((_, name)) = self.listing.place(dir) else { bail!("a folder is gone") };
        let mut name = name.to_vec();
        if !self.is_free(above, &name) {
            match self.session.lookup(above, &name, LeaseLevel::Exclusive).await? {
                Some(found) if found.is_dir => {
                    self.paths.insert(found.ino, self.path_in(above, &name));
                    return Ok(found.ino);
                }
                Some(_) => name = self.free_name(above, &name).await?,
                None => {}
            }
        }
        let path = self.path_in(above, &name);
        let made = match self.listing.item(dir) {
            Some(trashed) => {
                self.session.restore(above, &name, dir).await?;
                self.came_back(trashed, above, name);
                dir
            }
            None => {
                let owner = (item.entry.uid, item.entry.gid);
                let made = self.session.make_dir(above, &name, owner).await?;
                self.used.insert((above, name));
                made
            }
        };
        self.fresh.insert(made);
        self.paths.insert(made, path);
        Ok(made)
    }

    /// Whether a name is known to be free.
    fn is_free(&mut self, dir: u64, name: &[u8]) -> bool {
        for ino in self.session.given_back.drain(..) {
            self.fresh.remove(&ino);
        }
        self.fresh.contains(&dir) && !self.used.contains(&(dir, name.to_vec()))
    }

    /// The name, or the first like it that is not taken.
    async fn free_name(&mut self, dir: u64, name: &[u8]) -> anyhow::Result<Vec<u8>> {
        for number in 0..NAMES_TRIED {
            let tried = numbered(name, number);
            if self.is_free(dir, &tried) {
                return Ok(tried);
            }
            if self.session.lookup(dir, &tried, LeaseLevel::Exclusive).await?.is_none() {
                return Ok(tried);
            }
        }
        bail!("{:?} and all names like it are taken", String::from_utf8_lossy(name))
    }

    /// Waits until all of it is durable; what came back.
    pub async fn done(self) -> anyhow::Result<Vec<Back>> {
        self.session.close().await?;
        Ok(self.back)
    }
}

/// The name that is tried after so many were taken: `a`, `a (restored)`, `a (restored 2)`.
fn numbered(name: &[u8], number: u32) -> Vec<u8> {
    let suffix = match number {
        0 => return name.to_vec(),
        1 => " (restored)".to_owned(),
        number => format!(" (restored {number})"),
    };
    let room = NAME_BYTES_MAX - suffix.len();
    let mut end = name.len().min(room);
    // No half of a letter.
    while end < name.len() && end > 0 && name[end] & 0xc0 == 0x80 {
        end -= 1;
    }
    [&name[..end], suffix.as_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_taken_name_gets_a_number_and_stays_a_name() {
        assert_eq!(numbered(b"a.txt", 0), b"a.txt");
        assert_eq!(numbered(b"a.txt", 1), b"a.txt (restored)");
        assert_eq!(numbered(b"a.txt", 2), b"a.txt (restored 2)");
        let long = "ä".repeat(127);
        let cut = numbered(long.as_bytes(), 1);
        assert!(cut.len() <= NAME_BYTES_MAX && String::from_utf8(cut).is_ok());
    }
}
