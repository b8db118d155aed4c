//! What lies in a trash, with names opened and paths spelt. Pure.

use std::collections::{BTreeMap, HashMap};

use anyhow::{Context, bail};
use us_core::ids::Ino;
use us_core::limits::DEPTH_MAX;
use us_core::name::{NameHash, NameKey};
use us_core::seal::VolumeKey;
use us_proto::v1;

const S_IFMT: u32 = 0o170_000;
const S_IFDIR: u32 = 0o040_000;

/// Something in the trash.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Item {
    pub entry: v1::TrashEntry,
    pub name: Vec<u8>,
    /// Where it lay, from the root on, without a slash in front; `None`: a directory above it is gone
    /// for good.
    pub path: Option<Vec<u8>>,
}

impl Item {
    pub fn is_dir(&self) -> bool {
        self.entry.mode & S_IFMT == S_IFDIR
    }

    /// The path for people.
    pub fn shown(&self) -> String {
        let name = String::from_utf8_lossy(&self.name);
        match &self.path {
            Some(path) => String::from_utf8_lossy(path).into_owned(),
            None => format!("?/{name}"),
        }
    }
}

/// A trash, the oldest first.
#[derive(Debug, Default)]
pub(super) struct Listing {
    pub items: Vec<Item>,
    by_ino: HashMap<u64, usize>,
    /// Directories that are not in the trash: what they lie in, and their names.
    folders: HashMap<u64, (u64, Vec<u8>)>,
}

/// What was heard of a trash, names sealed.
#[derive(Debug, Default)]
pub(super) struct Heard {
    key: bytes::Bytes,
    entries: Vec<v1::TrashEntry>,
    folders: Vec<v1::TrashFolder>,
}

impl Heard {
    pub fn take(&mut self, reply: v1::TrashReply) {
        if !reply.volume_key.is_empty() {
            self.key = reply.volume_key;
        }
        self.entries.extend(reply.entries);
        self.folders.extend(reply.folders);
    }

    /// The keys of the volume's names.
    pub fn names(&self) -> anyhow::Result<NameKey> {
        if self.key.is_empty() {
            bail!("the directory gave no key of this volume: its names cannot be read");
        }
        let key: [u8; 32] = self.key.as_ref().try_into().context("the volume's key is no key")?;
        Ok(NameKey::new(&VolumeKey::from_bytes(key.into())))
    }

    /// All there is, with names left sealed.
    pub fn sealed(self) -> Listing {
        let mut listing = Listing::default();
        for entry in self.entries {
            listing.by_ino.insert(entry.ino, listing.items.len());
            listing.items.push(Item { entry, name: b"(sealed)".to_vec(), path: None });
        }
        listing
    }

    /// Opens the names and spells the paths.
    pub fn open(self, names: &NameKey) -> anyhow::Result<Listing> {
        let open = |dir: u64, hash: &[u8], sealed: &[u8]| -> anyhow::Result<Vec<u8>> {
            let hash: NameHash = hash.try_into().context("a name's hash has another length")?;
            Ok(names.open_name(Ino(dir), &hash, sealed)?)
        };
        let mut listing = Listing::default();
        for folder in self.folders {
            let name = open(folder.parent, &folder.name_hash, &folder.sealed_name)?;
            listing.folders.insert(folder.ino, (folder.parent, name));
        }
        for entry in self.entries {
            let name = open(entry.dir, &entry.name_hash, &entry.sealed_name)?;
            listing.by_ino.insert(entry.ino, listing.items.len());
            listing.items.push(Item { entry, name, path: None });
        }
        for at in 0..listing.items.len() {
            let item = &listing.items[at];
            let above = listing.folder_path(item.entry.dir);
            let path = above.map(|above| join(&above, &item.name));
            listing.items[at].path = path;
        }
        Ok(listing)
    }
}

/// A path with another name behind it.
pub(super) fn join(above: &[u8], name: &[u8]) -> Vec<u8> {
    if above.is_empty() { name.to_vec() } else { [above, b"/", name].concat() }
}

/// A path as it was given, as listings have it.
pub(super) fn plain(path: &str) -> Vec<u8> {
    let parts = path.split('/').filter(|part| !part.is_empty() && *part != ".");
    parts.collect::<Vec<_>>().join("/").into_bytes()
}

/// Whether `path` is `top` or lies under it.
fn lies_in(path: &[u8], top: &[u8]) -> bool {
    let under = path.strip_prefix(top);
    top.is_empty() || under.is_some_and(|rest| rest.is_empty() || rest[0] == b'/')
}

impl Listing {
    pub fn item(&self, ino: u64) -> Option<&Item> {
        self.by_ino.get(&ino).map(|at| &self.items[*at])
    }

    /// Whether this directory is not in the trash.
    pub fn is_live(&self, dir: u64) -> bool {
        dir == 1 || self.folders.contains_key(&dir)
    }

    /// What a directory lies or lay in, and its name there.
    pub fn place(&self, dir: u64) -> Option<(u64, &[u8])> {
        let live = self.folders.get(&dir).map(|(parent, name)| (*parent, name.as_slice()));
        live.or_else(|| self.item(dir).map(|item| (item.entry.dir, item.name.as_slice())))
    }

    /// The path of a directory, in the trash or not.
    pub fn folder_path(&self, dir: u64) -> Option<Vec<u8>> {
        let (mut at, mut parts) = (dir, Vec::new());
        for _ in 0..DEPTH_MAX {
            if at == 1 {
                parts.reverse();
                return Some(parts.join(&b'/'));
            }
            let (parent, name) = self.place(at)?;
            parts.push(name);
            at = parent;
        }
        None
    }

    /// The directory outside the trash that has this path, if something in the trash lay under it.
    pub fn folder_at(&self, path: &[u8]) -> Option<u64> {
        let mut folders = self.folders.keys().copied().chain([1]);
        folders.find(|ino| self.folder_path(*ino).is_some_and(|found| found == path))
    }

    /// All that was at a path or under it, the oldest first.
    pub fn under(&self, path: &[u8]) -> Vec<&Item> {
        let here = |item: &&Item| item.path.as_ref().is_some_and(|at| lies_in(at, path));
        self.items.iter().filter(here).collect()
    }

    /// The newest of each path at or under one.
    pub fn newest_under(&self, path: &[u8]) -> Vec<&Item> {
        let mut newest: BTreeMap<&[u8], &Item> = BTreeMap::new();
        for item in self.under(path) {
            newest.insert(item.path.as_deref().unwrap_or_default(), item);
        }
        newest.into_values().collect()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(crate) fn item(ino: u64, dir: u64, name: &str, mode: u32) -> Item {
        let entry = v1::TrashEntry { ino, dir, mode, ..Default::default() };
        Item { entry, name: name.as_bytes().to_vec(), path: None }
    }

    pub(crate) fn listing(items: Vec<Item>, folders: &[(u64, u64, &str)]) -> Listing {
        let mut listing = Listing::default();
        for (ino, parent, name) in folders {
            listing.folders.insert(*ino, (*parent, name.as_bytes().to_vec()));
        }
        for (at, item) in items.iter().enumerate() {
            listing.by_ino.insert(item.entry.ino, at);
        }
        listing.items = items;
        for at in 0..listing.items.len() {
            let item = &listing.items[at];
            let above = listing.folder_path(item.entry.dir);
            listing.items[at].path = above.map(|above| join(&above, &item.name));
        }
        listing
    }

    #[test]
    fn paths_go_through_folders_in_the_trash_and_out_of_it() {
        let dir = S_IFDIR | 0o755;
        let all = listing(
            vec![
                item(10, 7, "a", 0o100_644),
                item(11, 8, "b", 0o100_644),
                item(8, 7, "sub", dir),
                item(12, 99, "lost", 0o100_644),
                item(13, 7, "a", 0o100_644),
            ],
            &[(7, 1, "docs")],
        );
        let shown: Vec<String> = all.items.iter().map(Item::shown).collect();
        assert_eq!(shown, ["docs/a", "docs/sub/b", "docs/sub", "?/lost", "docs/a"]);
        let inos = |items: Vec<&Item>| items.iter().map(|i| i.entry.ino).collect::<Vec<_>>();
        assert_eq!(inos(all.under(b"docs/a")), [10, 13]);
        assert_eq!(inos(all.newest_under(b"docs")), [13, 8, 11]);
        assert_eq!(inos(all.newest_under(b"doc")), [0u64; 0]);
        assert_eq!(all.folder_at(b"docs"), Some(7));
        assert_eq!(all.folder_at(b"docs/sub"), None);
        assert_eq!(plain("/docs//./sub/"), b"docs/sub");
    }
}
