//! Freeing what deleted inodes and volumes leave, a bounded slice at a time.

use super::data::Place;
use super::{ApplyError, CHUNK_BYTES, Tx};
use crate::keys;
use crate::store::KeyRange;

impl Tx<'_> {
    /// Frees up to `limit` chunks and xattrs of a deleted inode. Returns how many; fewer than
    /// `limit` means that the inode's `k` key is gone too.
    ///
    /// # Errors
    /// [`ApplyError`] when the store fails.
    pub fn reap(&mut self, ino: u64, limit: usize) -> Result<usize, ApplyError> {
        let chunks = self.mapped_chunks(ino, 0, u64::MAX, limit)?;
        for chunk in &chunks {
            self.write_range(ino, chunk * CHUNK_BYTES, CHUNK_BYTES, Place::Hole)?;
            self.bury()?;
        }
        let range = KeyRange::prefix(&keys::xattrs(&self.volume, ino));
        let xattrs = self.scan(&range, limit - chunks.len())?;
        for (key, _) in &xattrs {
            self.delete(key.clone());
        }
        let freed = chunks.len() + xattrs.len();
        if freed < limit {
            self.delete(keys::doomed(&self.volume, ino));
        }
        Ok(freed)
    }

    /// Frees `limit` whole chunks of a file between two bytes. False, and nothing is done, where no more
    /// than that are mapped.
    ///
    /// # Errors
    /// [`ApplyError`] when the store fails.
    pub fn free_slice(
        &mut self,
        ino: u64,
        from: u64,
        to: u64,
        limit: usize,
    ) -> Result<bool, ApplyError> {
        let (first, end) = (from.div_ceil(CHUNK_BYTES), to / CHUNK_BYTES);
        if first >= end {
            return Ok(false);
        }
        let chunks = self.mapped_chunks(ino, first, end, limit + 1)?;
        if chunks.len() <= limit {
            return Ok(false);
        }
        for chunk in &chunks[..limit] {
            self.write_range(ino, chunk * CHUNK_BYTES, CHUNK_BYTES, Place::Hole)?;
            self.bury()?;
        }
        Ok(true)
    }

    /// Frees up to `limit` chunks of a volume that is being deleted, whatever file they are of.
    /// Returns how many.
    ///
    /// # Errors
    /// [`ApplyError`] when the store fails.
    pub fn reap_volume(&mut self, limit: usize) -> Result<usize, ApplyError> {
        let range = KeyRange::prefix(&keys::tag(&self.volume, b'm'));
        let chunks = self.scan(&range, limit)?;
        for (key, _) in &chunks {
            let chunk = keys::last_number(key);
            let ino = keys::last_number(&key[..key.len() - 8]);
            self.write_range(ino, chunk * CHUNK_BYTES, CHUNK_BYTES, Place::Hole)?;
            self.bury()?;
        }
        Ok(chunks.len())
    }
}
