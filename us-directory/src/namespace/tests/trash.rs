//! What goes to the trash, in what order, and what it keeps.

use super::*;

const LATE: TrashRule = TrashRule { clock_ms: 1_000, age_ms: 10, on: true };

fn unlink(dir: u64, name: u8, ino: u64, directory: bool) -> Op {
    Op::Unlink(Unlink { dir, name_hash: hash(name), ino, directory, ..Default::default() })
}

fn block(id: u8) -> BlockCommit {
    let inline = vec![1; 64].into();
    BlockCommit { block: vec![id; 16].into(), plaintext_bytes: 48, inline, ..Default::default() }
}

/// A file of 48 bytes in a block and 100 zeros behind it.
fn file(volume: &mut Volume, name: u8, ino: u64) {
    let write =
        ExtentWrite { ino, length: 48, block: vec![ino as u8; 16].into(), ..Default::default() };
    let zeros = ExtentWrite { ino, offset: 48, length: 100, zero: true, ..Default::default() };
    let data = CommitData {
        blocks: vec![block(ino as u8)],
        extents: vec![write, zeros],
        files: vec![FileGrowth { ino, size: 148, ..Default::default() }],
    };
    volume.apply(vec![create(1, name, ino, S_IFREG | 0o644), Op::CommitData(data)]).unwrap();
}

fn trashed(volume: &Volume) -> Vec<u64> {
    let keys = volume.scan(&keys::tag(&VOLUME, b't'));
    keys.iter().map(|(key, _)| keys::last_number(key)).collect()
}

fn usage(volume: &Volume) -> UsageRecord {
    volume.get(&keys::usage(&VOLUME)).unwrap()
}

fn count(volume: &Volume, tag: u8) -> usize {
    volume.scan(&keys::tag(&VOLUME, tag)).len()
}

/// The map and the block stay where they are; only what lies in blocks counts as kept.
#[test]
fn a_removed_file_keeps_its_bytes_until_it_is_purged() {
    let mut volume = Volume::new();
    file(&mut volume, 1, 2);
    volume.trash = LATE;
    volume.apply(vec![unlink(1, 1, 2, false)]).unwrap();
    assert_eq!(trashed(&volume), [2]);
    let kept = usage(&volume);
    assert_eq!((kept.inodes, kept.trash_files, kept.trash_bytes), (1, 1, 48));
    assert_eq!((kept.live_bytes, kept.blocks), (48, 1));
    assert_eq!((count(&volume, b'm'), count(&volume, b'b'), count(&volume, b'k')), (1, 1, 0));
    let mut tx = volume.tx();
    assert_eq!(tx.purge(2).unwrap().stored_bytes, 48);
    let outcome = tx.finish().unwrap();
    volume.finish(outcome);
    assert_eq!((trashed(&volume).len(), count(&volume, b'k'), count(&volume, b'i')), (0, 1, 1));
    let mut tx = volume.tx();
    tx.reap(2, 10).unwrap();
    let outcome = tx.finish().unwrap();
    volume.finish(outcome);
    assert_eq!(usage(&volume), UsageRecord { inodes: 1, ..Default::default() });
    assert_eq!((count(&volume, b'm'), count(&volume, b'b'), count(&volume, b'k')), (0, 0, 0));
}

/// Programs make many files that they remove at once.
#[test]
fn what_is_young_goes_for_good() {
    let mut volume = Volume::new();
    volume.trash = TrashRule { clock_ms: 991, ..LATE };
    file(&mut volume, 1, 2);
    volume.trash = LATE;
    volume.apply(vec![unlink(1, 1, 2, false)]).unwrap();
    assert_eq!((trashed(&volume).len(), count(&volume, b'k')), (0, 1));
}

#[test]
fn a_file_goes_with_its_last_name() {
    let mut volume = Volume::new();
    file(&mut volume, 1, 2);
    let (name_hash, sealed_name) = (hash(9), hash(9));
    let link = Link { dir: 1, name_hash, sealed_name, ino: 2, time: None };
    volume.trash = LATE;
    volume.apply(vec![Op::Link(link), unlink(1, 1, 2, false)]).unwrap();
    assert_eq!(trashed(&volume), [0u64; 0], "it has another name");
    volume.apply(vec![unlink(1, 9, 2, false)]).unwrap();
    assert_eq!(trashed(&volume), [2]);
    let record: InodeRecord = volume.get(&keys::inode(&VOLUME, 2)).unwrap();
    assert_eq!(record.removed.unwrap().name_hash, hash(9));
}

/// Editors save so: the version before is in the trash.
#[test]
fn what_a_rename_replaces_goes_to_the_trash() {
    let mut volume = Volume::new();
    file(&mut volume, 1, 2);
    file(&mut volume, 2, 3);
    volume.trash = LATE;
    let rename = Rename {
        from_dir: 1,
        from_hash: hash(2),
        ino: 3,
        to_dir: 1,
        to_hash: hash(1),
        to_sealed_name: hash(1),
        replaced: 2,
        uid: Some(7),
        ..Default::default()
    };
    volume.apply(vec![Op::Rename(rename)]).unwrap();
    assert_eq!(trashed(&volume), [2]);
    let record: InodeRecord = volume.get(&keys::inode(&VOLUME, 2)).unwrap();
    let removed = record.removed.unwrap();
    assert_eq!((removed.dir, removed.name_hash, removed.uid), (1, hash(1), Some(7)));
}

/// What is still open is no trash; when it is closed it is, in line by the time it was removed.
#[test]
fn an_open_file_goes_when_it_is_closed() {
    let mut volume = Volume::new();
    file(&mut volume, 1, 2);
    file(&mut volume, 2, 3);
    volume.trash = LATE;
    let open = Unlink { dir: 1, name_hash: hash(1), ino: 2, open: true, ..Default::default() };
    volume.apply(vec![Op::Unlink(open)]).unwrap();
    assert_eq!((trashed(&volume).len(), usage(&volume).inodes), (0, 3));
    volume.trash.clock_ms += 5;
    volume.apply(vec![unlink(1, 2, 3, false)]).unwrap();
    volume.trash.clock_ms += 5;
    volume.apply(vec![Op::Release(Release { ino: 2 })]).unwrap();
    assert_eq!(trashed(&volume), [2, 3]);
    // One that was made and removed at once is a temporary file however long it stays open.
    file(&mut volume, 4, 4);
    let open = Unlink { dir: 1, name_hash: hash(4), ino: 4, open: true, ..Default::default() };
    volume.apply(vec![Op::Unlink(open)]).unwrap();
    volume.trash.clock_ms += 1_000;
    volume.apply(vec![Op::Release(Release { ino: 4 })]).unwrap();
    assert_eq!((trashed(&volume), count(&volume, b'k')), (vec![2, 3], 1));
}

/// A directory is behind all that lay in it, so it is there for as long as they are.
#[test]
fn a_tree_comes_back_into_its_own_directories() {
    let mut volume = Volume::new();
    volume.apply(vec![create(1, 1, 2, S_IFDIR | 0o700)]).unwrap();
    volume.apply(vec![create(2, 1, 3, S_IFDIR | 0o700)]).unwrap();
    volume.apply(vec![create(3, 1, 4, S_IFREG | 0o600)]).unwrap();
    volume.trash = LATE;
    volume.apply(vec![unlink(3, 1, 4, false)]).unwrap();
    volume.trash.clock_ms += 1;
    volume.apply(vec![unlink(2, 1, 3, true)]).unwrap();
    volume.trash.clock_ms += 1;
    volume.apply(vec![unlink(1, 1, 2, true)]).unwrap();
    assert_eq!(trashed(&volume), [4, 3, 2]);
    let restore = |dir, name, ino| {
        let (name_hash, sealed_name) = (hash(name), hash(name));
        Op::Restore(Restore { dir, name_hash, sealed_name, ino, time: None })
    };
    assert!(volume.apply(vec![restore(3, 1, 4)]).is_err(), "its directory is in the trash");
    volume.apply(vec![restore(1, 8, 2), restore(2, 1, 3), restore(3, 1, 4)]).unwrap();
    assert_eq!(trashed(&volume), [0u64; 0]);
    let root: InodeRecord = volume.get(&keys::inode(&VOLUME, 1)).unwrap();
    let dir: InodeRecord = volume.get(&keys::inode(&VOLUME, 3)).unwrap();
    assert_eq!((root.nlink, root.entries), (3, 1));
    assert_eq!((dir.nlink, dir.entries, dir.parent, dir.mode), (2, 1, 2, S_IFDIR | 0o700));
    let again = volume.apply(vec![restore(1, 9, 2)]);
    assert!(matches!(again, Err(ApplyError::Rule(crate::namespace::Rule::NotTrashed { ino: 2 }))));
    assert_eq!(usage(&volume).trash_files, 0);
}

/// All of it in one millisecond, as `rm -r` may: the line was by inode then, folders before what lay in them,
/// and trash that yielded to need lost the folder first.
#[test]
fn a_tree_removed_at_once_stands_in_line_behind_what_lay_in_it() {
    let mut volume = Volume::new();
    volume.apply(vec![create(1, 1, 2, S_IFDIR | 0o700)]).unwrap();
    volume.apply(vec![create(2, 1, 3, S_IFDIR | 0o700)]).unwrap();
    volume.apply(vec![create(3, 1, 4, S_IFREG | 0o600)]).unwrap();
    volume.apply(vec![create(1, 2, 5, S_IFDIR | 0o700)]).unwrap();
    volume.trash = LATE;
    let all = [unlink(3, 1, 4, false), unlink(2, 1, 3, true), unlink(1, 1, 2, true)];
    volume.apply(all.to_vec()).unwrap();
    volume.apply(vec![unlink(1, 2, 5, true)]).unwrap();
    assert_eq!(trashed(&volume), [4, 5, 3, 2], "an empty one has nothing to stand behind");
    let inos = [4, 5, 3, 2];
    let mut tx = volume.tx();
    for ino in inos {
        assert_eq!(tx.purge(ino).unwrap().files, 1);
    }
    let outcome = tx.finish().unwrap();
    volume.finish(outcome);
    assert_eq!((trashed(&volume).len(), usage(&volume).trash_files), (0, 0));
}

/// Nothing but the trash knows what is in it.
#[test]
fn what_is_in_the_trash_is_changed_by_nobody() {
    let mut volume = Volume::new();
    file(&mut volume, 1, 2);
    volume.trash = LATE;
    volume.apply(vec![unlink(1, 1, 2, false)]).unwrap();
    let before = volume.scan(&keys::volume_prefix(&VOLUME));
    let set = SetAttributes { ino: 2, size: Some(0), ..Default::default() };
    assert!(volume.apply(vec![Op::SetAttributes(set)]).is_err());
    let (name_hash, sealed_name) = (hash(1), hash(1));
    let link = Link { dir: 1, name_hash, sealed_name, ino: 2, time: None };
    assert!(volume.apply(vec![Op::Link(link)]).is_err());
    assert!(volume.apply(vec![create(1, 3, 2, S_IFREG | 0o644)]).is_err(), "a number used twice");
    volume.apply(vec![Op::Release(Release { ino: 2 })]).unwrap();
    assert_eq!(volume.scan(&keys::volume_prefix(&VOLUME)), before);
}
