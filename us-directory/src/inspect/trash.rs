//! What lies in a volume's trash and where it lay, for administrators: read from a snapshot.
//!
//! Names stay sealed. An entry names the directory it lay in by inode; that directory is in the trash
//! itself, or it is told where it lies now, and so on up to the root: whoever has the key can spell the
//! path. A directory's own name is found by reading the listing of the one above it.

use std::collections::{BTreeMap, BTreeSet};

use us_core::limits::DEPTH_MAX;
use us_proto::v1::{TrashEntry, TrashFolder, TrashReply};

use crate::engine::trash::TrashBasis;
use crate::keys;
use crate::namespace::{S_IFDIR, S_IFMT};
use crate::records::{CookieRecord, InodeRecord, RemovedRecord, decode};
use crate::store::{KeyRange, StoreError};

/// Entries told together.
const ENTRIES_PAGE: usize = 1024;
/// Names of a listing read together.
const NAMES_PAGE: usize = 4096;

/// Tells all there is, until `sink` answers false.
///
/// # Errors
/// [`StoreError`].
pub fn list_trash(
    basis: &TrashBasis,
    mut sink: impl FnMut(TrashReply) -> bool,
) -> Result<(), StoreError> {
    if !sink(TrashReply { volume_key: basis.key.clone(), ..Default::default() }) {
        return Ok(());
    }
    let (mut above, mut trashed_dirs) = (BTreeSet::new(), BTreeSet::new());
    let mut range = KeyRange::prefix(&keys::tag(&basis.volume, b't'));
    loop {
        let page = basis.view.scan(&range, ENTRIES_PAGE)?;
        let Some((last, _)) = page.last() else { break };
        range = range.after(last);
        let mut entries = Vec::with_capacity(page.len());
        for (key, _) in &page {
            let ino = keys::last_number(key);
            let Some(record) = inode(basis, ino)? else { continue };
            let Some(removed) = record.removed.clone().filter(|removed| removed.trashed) else {
                continue;
            };
            above.insert(removed.dir);
            if record.mode & S_IFMT == S_IFDIR {
                trashed_dirs.insert(ino);
            }
            entries.push(entry(basis, ino, &record, removed));
        }
        if !sink(TrashReply { entries, ..Default::default() }) {
            return Ok(());
        }
    }
    let mut wanted: BTreeSet<u64> = &above - &trashed_dirs;
    let mut known = BTreeSet::from([1]);
    for _ in 0..DEPTH_MAX {
        wanted = &wanted - &known;
        if wanted.is_empty() {
            return Ok(());
        }
        known.extend(&wanted);
        let folders = folders(basis, &wanted)?;
        wanted = folders.iter().map(|folder| folder.parent).collect();
        if !sink(TrashReply { folders, ..Default::default() }) {
            return Ok(());
        }
    }
    Ok(())
}

fn inode(basis: &TrashBasis, ino: u64) -> Result<Option<InodeRecord>, StoreError> {
    let key = keys::inode(&basis.volume, ino);
    basis.view.get(&key)?.map(|value| decode(&key, &value)).transpose()
}

fn entry(basis: &TrashBasis, ino: u64, record: &InodeRecord, removed: RemovedRecord) -> TrashEntry {
    TrashEntry {
        ino,
        dir: removed.dir,
        name_hash: removed.name_hash,
        sealed_name: removed.sealed_name,
        mode: record.mode,
        uid: record.uid,
        gid: record.gid,
        size: record.size,
        stored_bytes: record.stored_bytes(),
        removed: removed.time,
        removed_uid: removed.uid,
        age_s: basis.clock_ms.saturating_sub(removed.at_ms) / 1000,
    }
}

/// Where these directories lie. Those that lie nowhere any more are left out.
fn folders(basis: &TrashBasis, wanted: &BTreeSet<u64>) -> Result<Vec<TrashFolder>, StoreError> {
    let mut by_parent: BTreeMap<u64, BTreeSet<u64>> = BTreeMap::new();
    let mut found = Vec::new();
    for ino in wanted {
        let Some(record) = inode(basis, *ino)?.filter(|record| !record.is_trashed()) else {
            continue;
        };
        match record.removed {
            // Removed, and still open somewhere.
            Some(removed) => found.push(TrashFolder {
                ino: *ino,
                parent: removed.dir,
                name_hash: removed.name_hash,
                sealed_name: removed.sealed_name,
            }),
            None => {
                by_parent.entry(record.parent).or_default().insert(*ino);
            }
        }
    }
    for (parent, mut inside) in by_parent {
        let mut range = KeyRange::prefix(&keys::cookies(&basis.volume, parent));
        while !inside.is_empty() {
            let page = basis.view.scan(&range, NAMES_PAGE)?;
            let Some((last, _)) = page.last() else { break };
            range = range.after(last);
            for (key, value) in &page {
                let line: CookieRecord = decode(key, value)?;
                if inside.remove(&line.ino) {
                    let CookieRecord { ino, name_hash, sealed_name } = line;
                    found.push(TrashFolder { ino, parent, name_hash, sealed_name });
                }
            }
        }
    }
    Ok(found)
}
