//! Names against a tree of maps.

use super::*;

#[derive(Clone, Debug)]
enum Step {
    Create { dir: usize, name: u8, is_dir: bool },
    Link { dir: usize, name: u8, target: usize },
    Unlink { dir: usize, name: u8 },
    Rename { from: (usize, u8), to: (usize, u8), exchange: bool },
    Restore { dir: usize, name: u8, which: usize },
    Purge { which: usize },
}

fn step() -> impl Strategy<Value = Step> {
    let place = (0usize..5, 0u8..4);
    prop_oneof![
        (place.clone(), any::<bool>()).prop_map(|((dir, name), is_dir)| Step::Create {
            dir,
            name,
            is_dir
        }),
        (place.clone(), 0usize..8).prop_map(|((dir, name), target)| Step::Link {
            dir,
            name,
            target
        }),
        place.clone().prop_map(|(dir, name)| Step::Unlink { dir, name }),
        (place.clone(), 0usize..8).prop_map(|((dir, name), which)| Step::Restore {
            dir,
            name,
            which
        }),
        (0usize..8).prop_map(|which| Step::Purge { which }),
        (place.clone(), place, any::<bool>()).prop_map(|(from, to, exchange)| Step::Rename {
            from,
            to,
            exchange
        }),
    ]
}

/// A tree as it should be: directories by inode, and what is a directory; and its trash.
#[derive(Clone, Debug, Default)]
struct Tree {
    dirs: BTreeMap<u64, BTreeMap<u8, u64>>,
    files: BTreeSet<u64>,
    /// Whether it is a directory, and when it was removed.
    trash: BTreeMap<u64, (bool, u64)>,
    born: BTreeMap<u64, u64>,
    /// Directories that something in the trash lay in.
    keeps: BTreeSet<u64>,
    /// Steps so far, when there is a trash.
    clock: Option<u64>,
}

/// What is removed within so many steps is not kept.
const AGE: u64 = 4;

impl Tree {
    fn inodes(&self) -> Vec<u64> {
        self.dirs.keys().chain(&self.files).copied().collect()
    }

    fn names_of(&self, ino: u64) -> usize {
        self.dirs.values().flat_map(BTreeMap::values).filter(|found| **found == ino).count()
    }

    fn lies_in(&self, dir: u64, above: u64) -> bool {
        let mut at = dir;
        loop {
            if at == above {
                return true;
            }
            let parent = self.dirs.iter().find(|(_, names)| names.values().any(|ino| *ino == at));
            match parent {
                Some((parent, _)) => at = *parent,
                None => return false,
            }
        }
    }

    fn forget(&mut self, ino: u64, dir: u64) {
        if self.names_of(ino) > 0 {
            return;
        }
        let is_dir = self.dirs.remove(&ino).is_some();
        self.files.remove(&ino);
        let Some(now) = self.clock else { return };
        if now >= self.born[&ino] + AGE || self.keeps.contains(&ino) {
            self.trash.insert(ino, (is_dir, now));
            self.keeps.insert(dir);
        }
    }

    fn is_full_dir(&self, ino: u64) -> bool {
        self.dirs.get(&ino).is_some_and(|names| !names.is_empty())
    }

    /// Renames, or says that it may not be.
    fn rename(&mut self, from: (u64, u8), to: (u64, u8), exchange: bool) -> bool {
        let Some(moved) = self.dirs[&from.0].get(&from.1).copied() else { return false };
        let there = self.dirs[&to.0].get(&to.1).copied();
        if from == to {
            return true;
        }
        let is_dir = |ino: u64| self.dirs.contains_key(&ino);
        if is_dir(moved) && self.lies_in(to.0, moved) {
            return false;
        }
        if exchange {
            let Some(there) = there else { return false };
            if there == moved {
                return true;
            }
            if is_dir(there) && self.lies_in(from.0, there) {
                return false;
            }
            self.dirs.get_mut(&from.0).unwrap().insert(from.1, there);
            self.dirs.get_mut(&to.0).unwrap().insert(to.1, moved);
            return true;
        }
        if let Some(there) = there {
            if there == moved {
                return true;
            }
            if is_dir(there) != is_dir(moved) || self.is_full_dir(there) {
                return false;
            }
        }
        self.dirs.get_mut(&from.0).unwrap().remove(&from.1);
        self.dirs.get_mut(&to.0).unwrap().insert(to.1, moved);
        there.into_iter().for_each(|there| self.forget(there, to.0));
        true
    }
}

fn check(volume: &Volume, tree: &Tree) {
    let inodes = volume.scan(&keys::tag(&VOLUME, b'i')).into_iter();
    let inodes = inodes.map(|(key, value)| {
        (keys::last_number(&key), decode::<InodeRecord>(&key, &value).unwrap())
    });
    let (trashed, found): (Vec<_>, Vec<_>) = inodes.partition(|(_, record)| record.is_trashed());
    let found: BTreeSet<u64> = found.into_iter().map(|(ino, _)| ino).collect();
    assert_eq!(found, tree.inodes().into_iter().collect());
    let trashed: BTreeMap<u64, (bool, u64)> = trashed
        .into_iter()
        .map(|(ino, record)| {
            let is_dir = record.mode & crate::namespace::S_IFMT == S_IFDIR;
            (ino, (is_dir, record.removed.unwrap().at_ms))
        })
        .collect();
    assert_eq!(trashed, tree.trash);
    let line = volume.scan(&keys::tag(&VOLUME, b't'));
    let line: BTreeMap<u64, u64> =
        line.iter().map(|(key, _)| (keys::last_number(key), keys::trashed_at(key))).collect();
    assert_eq!(line, tree.trash.iter().map(|(ino, (_, at_ms))| (*ino, *at_ms)).collect());
    for (dir, names) in &tree.dirs {
        let record: InodeRecord = volume.get(&keys::inode(&VOLUME, *dir)).unwrap();
        assert_eq!(record.entries as usize, names.len());
        let subdirs = names.values().filter(|ino| tree.dirs.contains_key(ino)).count();
        assert_eq!(record.nlink as usize, 2 + subdirs);
        let mut listed = BTreeMap::new();
        for (key, value) in volume.scan(&keys::cookies(&VOLUME, *dir)) {
            let line: CookieRecord = decode(&key, &value).unwrap();
            let entry: EntryRecord =
                volume.get(&keys::entry(&VOLUME, *dir, &line.name_hash)).unwrap();
            assert_eq!((entry.ino, entry.cookie), (line.ino, keys::last_number(&key)));
            assert!(entry.cookie <= record.last_cookie);
            listed.insert(line.name_hash[0], line.ino);
            if let Some(child) = tree.dirs.get(&line.ino).map(|_| line.ino) {
                let child: InodeRecord = volume.get(&keys::inode(&VOLUME, child)).unwrap();
                assert_eq!(child.parent, *dir);
            }
        }
        assert_eq!(&listed, names);
    }
    for file in &tree.files {
        let record: InodeRecord = volume.get(&keys::inode(&VOLUME, *file)).unwrap();
        assert_eq!(record.nlink as usize, tree.names_of(*file));
    }
    let usage: UsageRecord = volume.get(&keys::usage(&VOLUME)).unwrap();
    assert_eq!(usage.inodes as usize, found.len());
    assert_eq!(usage.trash_files as usize, tree.trash.len());
}

fn take(volume: &mut Volume, tree: &mut Tree, next: &mut u64, step: &Step) {
    let dirs: Vec<u64> = tree.dirs.keys().copied().collect();
    let dir = |index: usize| dirs[index % dirs.len()];
    match step {
        Step::Create { dir: at, name, is_dir } => {
            let (at, ino) = (dir(*at), *next);
            *next += 1;
            let mode = if *is_dir { S_IFDIR } else { S_IFREG } | 0o644;
            let allowed = !tree.dirs[&at].contains_key(name);
            assert_eq!(volume.apply(vec![create(at, *name, ino, mode)]).is_ok(), allowed);
            if allowed {
                tree.born.insert(ino, tree.clock.unwrap_or(0));
                tree.dirs.get_mut(&at).unwrap().insert(*name, ino);
                if *is_dir {
                    tree.dirs.insert(ino, BTreeMap::new());
                } else {
                    tree.files.insert(ino);
                }
            }
        }
        Step::Link { dir: at, name, target } => {
            let (at, inodes) = (dir(*at), tree.inodes());
            let ino = inodes[target % inodes.len()];
            let (name_hash, sealed_name) = (hash(*name), hash(*name));
            let link = Link { dir: at, name_hash, sealed_name, ino, time: None };
            let allowed = tree.files.contains(&ino) && !tree.dirs[&at].contains_key(name);
            assert_eq!(volume.apply(vec![Op::Link(link)]).is_ok(), allowed);
            if allowed {
                tree.dirs.get_mut(&at).unwrap().insert(*name, ino);
            }
        }
        Step::Unlink { dir: at, name } => {
            let at = dir(*at);
            let ino = tree.dirs[&at].get(name).copied();
            let directory = ino.is_some_and(|ino| tree.dirs.contains_key(&ino));
            let unlink = Unlink {
                dir: at,
                name_hash: hash(*name),
                ino: ino.unwrap_or(1),
                directory,
                ..Default::default()
            };
            let allowed = ino.is_some_and(|ino| !tree.is_full_dir(ino));
            assert_eq!(volume.apply(vec![Op::Unlink(unlink)]).is_ok(), allowed);
            if let Some(ino) = ino.filter(|_| allowed) {
                tree.dirs.get_mut(&at).unwrap().remove(name);
                tree.forget(ino, at);
            }
        }
        Step::Restore { dir: at, name, which } => {
            let at = dir(*at);
            // What is not in the trash is tried too.
            let some: Vec<u64> = tree.trash.keys().copied().chain(tree.inodes()).collect();
            let ino = some[which % some.len()];
            let (name_hash, sealed_name) = (hash(*name), hash(*name));
            let restore = Restore { dir: at, name_hash, sealed_name, ino, time: None };
            let allowed = tree.trash.contains_key(&ino) && !tree.dirs[&at].contains_key(name);
            assert_eq!(volume.apply(vec![Op::Restore(restore)]).is_ok(), allowed);
            if allowed && let Some((is_dir, _)) = tree.trash.remove(&ino) {
                tree.dirs.get_mut(&at).unwrap().insert(*name, ino);
                if is_dir {
                    tree.dirs.insert(ino, BTreeMap::new());
                } else {
                    tree.files.insert(ino);
                }
            }
        }
        Step::Purge { which } => {
            let some: Vec<u64> = tree.trash.keys().copied().chain(tree.inodes()).collect();
            let ino = some[which % some.len()];
            let mut tx = volume.tx();
            let purged = tx.purge(ino).unwrap();
            let outcome = tx.finish().unwrap();
            volume.finish(outcome);
            assert_eq!(purged.files, u64::from(tree.trash.remove(&ino).is_some()));
        }
        Step::Rename { from, to, exchange } => {
            let (from, to) = ((dir(from.0), from.1), (dir(to.0), to.1));
            let at = |place: (u64, u8)| tree.dirs[&place.0].get(&place.1).copied();
            let rename = Rename {
                from_dir: from.0,
                from_hash: hash(from.1),
                ino: at(from).unwrap_or(0),
                to_dir: to.0,
                to_hash: hash(to.1),
                to_sealed_name: hash(to.1),
                replaced: at(to).unwrap_or(0),
                exchange: *exchange,
                from_sealed_name: hash(from.1),
                ..Default::default()
            };
            let mut after = tree.clone();
            let allowed = after.rename(from, to, *exchange);
            let applied = volume.apply(vec![Op::Rename(rename)]);
            assert_eq!(applied.is_ok(), allowed, "{applied:?}");
            if allowed {
                *tree = after;
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn names_agree_with_a_tree(
        steps in proptest::collection::vec(step(), 1..80),
        trash in any::<bool>(),
    ) {
        let mut volume = Volume::new();
        let mut tree = Tree { clock: trash.then_some(0), ..Tree::default() };
        tree.dirs.insert(1, BTreeMap::new());
        let mut next = 2;
        for (now, step) in steps.iter().enumerate() {
            if trash {
                tree.clock = Some(now as u64);
                volume.trash = TrashRule { clock_ms: now as u64, age_ms: AGE, on: true };
            }
            take(&mut volume, &mut tree, &mut next, step);
            check(&volume, &tree);
        }
    }
}
