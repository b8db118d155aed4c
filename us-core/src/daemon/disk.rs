//! The door to the disk: what is acknowledged became durable here.
//!
//! A `write` reaches the page cache, and a `kill -9` leaves it there for the next start to read. Only
//! a sync makes it survive the power. So a start syncs what it reads before it believes it, and every
//! sync of bytes that others rely on goes through [`sync_data`], [`sync_all`] or [`sync_path`]: a test
//! holds a folder with [`Platter::hold`] and takes it back to what a power cut would leave.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// How many folders are held: zero outside tests, and then a sync costs one load more.
static HELD: AtomicUsize = AtomicUsize::new(0);
static PLATTERS: Mutex<Vec<Weak<Platter>>> = Mutex::new(Vec::new());

/// Makes the bytes of a file durable; `path` is where it lies.
///
/// # Errors
/// What the system says: nothing that was written since the last sync counts then.
pub fn sync_data(file: &File, path: &Path) -> io::Result<()> {
    file.sync_data()?;
    witness(file, path)
}

/// As [`sync_data`], with all that is known of the file.
///
/// # Errors
/// As [`sync_data`].
pub fn sync_all(file: &File, path: &Path) -> io::Result<()> {
    file.sync_all()?;
    witness(file, path)
}

/// Makes what a closed file holds durable, whoever wrote it.
///
/// # Errors
/// As [`sync_data`].
pub fn sync_path(path: &Path) -> io::Result<()> {
    sync_all(&File::open(path)?, path)
}

fn witness(file: &File, path: &Path) -> io::Result<()> {
    if HELD.load(Ordering::Acquire) == 0 {
        return Ok(());
    }
    let platters = PLATTERS.lock().unwrap_or_else(PoisonError::into_inner).clone();
    for platter in platters.iter().filter_map(Weak::upgrade) {
        platter.synced(file, path)?;
    }
    Ok(())
}

/// A folder of which is known what is on the disk and what only in the page cache. For tests.
#[derive(Debug)]
pub struct Platter {
    root: PathBuf,
    stable: Mutex<BTreeMap<PathBuf, Vec<u8>>>,
}

impl Platter {
    /// Holds the folder `root`: what lies in it now is on the disk, what is written later when it was
    /// synced.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn hold(root: &Path) -> io::Result<Arc<Self>> {
        let mut stable = BTreeMap::new();
        for path in files_under(root)? {
            stable.insert(path.clone(), fs::read(&path)?);
        }
        let platter = Arc::new(Self { root: root.to_owned(), stable: Mutex::new(stable) });
        PLATTERS.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::downgrade(&platter));
        HELD.fetch_add(1, Ordering::AcqRel);
        Ok(platter)
    }

    /// What the file has behind its first `bytes` was written but never synced.
    pub fn unsynced_behind(&self, path: &Path, bytes: u64) {
        let mut stable = self.stable.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(content) = stable.get_mut(path) {
            content.truncate(bytes as usize);
        }
    }

    /// The power goes: of every file that `ours` names only what was synced is left. The others (of a
    /// database with its own protocol) stay as they are.
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub fn cut(&self, ours: impl Fn(&Path) -> bool) -> io::Result<()> {
        let stable = self.stable.lock().unwrap_or_else(PoisonError::into_inner);
        for path in files_under(&self.root)?.into_iter().filter(|path| ours(path)) {
            match stable.get(&path) {
                Some(content) => fs::write(&path, content)?,
                None => fs::remove_file(&path)?,
            }
        }
        Ok(())
    }

    fn synced(&self, file: &File, path: &Path) -> io::Result<()> {
        if path.starts_with(&self.root) {
            let mut content = vec![0; file.metadata()?.len() as usize];
            file.read_exact_at(&mut content, 0).or_else(|_append_only| {
                content = fs::read(path)?;
                Ok::<(), io::Error>(())
            })?;
            let mut stable = self.stable.lock().unwrap_or_else(PoisonError::into_inner);
            stable.insert(path.to_owned(), content);
        }
        Ok(())
    }
}

impl Drop for Platter {
    fn drop(&mut self) {
        HELD.fetch_sub(1, Ordering::AcqRel);
        let mut platters = PLATTERS.lock().unwrap_or_else(PoisonError::into_inner);
        platters.retain(|platter| platter.strong_count() > 0);
    }
}

fn files_under(root: &Path) -> io::Result<Vec<PathBuf>> {
    let (mut files, mut folders) = (Vec::new(), vec![root.to_owned()]);
    while let Some(folder) = folders.pop() {
        for item in fs::read_dir(folder)? {
            let path = item?.path();
            if path.is_dir() { folders.push(path) } else { files.push(path) }
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_power_cut_leaves_what_was_synced() -> io::Result<()> {
        let dir = tempfile::tempdir()?;
        let (kept, new) = (dir.path().join("kept"), dir.path().join("new"));
        fs::write(&kept, b"old")?;
        let platter = Platter::hold(dir.path())?;
        let file = File::options().read(true).write(true).open(&kept)?;
        file.write_all_at(b"synced", 0)?;
        sync_data(&file, &kept)?;
        file.write_all_at(b"cached too", 0)?;
        fs::write(&new, b"never synced")?;
        platter.cut(|_| true)?;
        assert_eq!(fs::read(&kept)?, b"synced");
        assert!(!new.exists());
        platter.unsynced_behind(&kept, 2);
        platter.cut(|_| true)?;
        assert_eq!(fs::read(&kept)?, b"sy");
        Ok(())
    }
}
