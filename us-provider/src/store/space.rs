//! What is used, what is free, what is wrong: the store's state as others see it.

use us_core::ids::FragmentId;

use super::{Shared, Store, StoreError};

/// Newly found damage remembered until it is reported; what is more is found again by a scrub, and
/// is in the index anyway.
pub(super) const FRESH_DAMAGE_MAX: usize = 65_536;

/// The state of a store.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StoreState {
    /// Bytes the store may take: the cap or, without one, what the disk allows.
    pub capacity_bytes: u64,
    /// Bytes it takes, the trash included.
    pub used_bytes: u64,
    /// Bytes that can still be put: cap, reserve and disk all considered.
    pub free_bytes: u64,
    /// Fragments that count.
    pub fragments: u64,
    /// Fragments in the trash.
    pub trashed: u64,
    /// Bytes of the trash.
    pub trashed_bytes: u64,
    /// Fragments known to be damaged.
    pub damaged: u64,
    /// Segment files.
    pub segments: u64,
    /// The number of the next record; 0 where the index cannot say.
    pub next_record: u64,
    /// Why puts fail; `None` while they do not.
    pub trouble: Option<String>,
}

impl Shared {
    /// Bytes that may still be written when `used` are.
    pub(super) fn free_bytes(&self, used: u64) -> u64 {
        let disk = self.disk_free_bytes().saturating_sub(self.options.reserve_bytes);
        let cap = self.options.capacity_bytes.map_or(u64::MAX, |cap| cap.saturating_sub(used));
        disk.min(cap)
    }

    /// Bytes the segments take.
    pub(super) fn used_bytes(&self) -> u64 {
        self.accounts.lock().used_bytes()
    }

    /// Bytes the file system gives to us; 0 where it does not say.
    fn disk_free_bytes(&self) -> u64 {
        match rustix::fs::statvfs(self.segments.dir()) {
            Ok(figures) => figures.f_bavail.saturating_mul(figures.f_frsize),
            Err(error) => {
                tracing::warn!(%error, "the file system does not say how much is free");
                0
            }
        }
    }

    /// Remembers a damaged fragment for the next report.
    pub(super) fn note_damage(&self, id: FragmentId) {
        metrics::counter!("us_provider_damage_found_total").increment(1);
        let mut fresh = self.fresh_damage.lock();
        if fresh.len() < FRESH_DAMAGE_MAX {
            fresh.push(id);
        }
    }
}

impl Store {
    /// The state now.
    pub fn state(&self) -> StoreState {
        let shared = &self.handle.shared;
        let (used_bytes, live, trashed, segments) = {
            let accounts = shared.accounts.lock();
            let segments = accounts.segments().count() as u64;
            (accounts.used_bytes(), accounts.live(), accounts.trashed(), segments)
        };
        let free_bytes = shared.free_bytes(used_bytes);
        let capacity_bytes = shared.options.capacity_bytes.unwrap_or(used_bytes + free_bytes);
        StoreState {
            capacity_bytes,
            used_bytes,
            free_bytes,
            fragments: live.records,
            trashed: trashed.records,
            trashed_bytes: trashed.bytes,
            damaged: shared.index.damaged_count(),
            segments,
            next_record: shared.index.mark().ok().flatten().map_or(0, |mark| mark.next_seq),
            trouble: shared.trouble.lock().clone(),
        }
    }

    /// The damage found since this was last called.
    pub fn take_fresh_damage(&self) -> Vec<FragmentId> {
        std::mem::take(&mut *self.handle.shared.fresh_damage.lock())
    }

    /// Fragments known to be damaged, at most `limit`. Blocks.
    ///
    /// # Errors
    /// [`StoreError::Index`].
    pub fn damaged(&self, limit: usize) -> Result<Vec<FragmentId>, StoreError> {
        Ok(self.handle.shared.index.damaged(limit)?)
    }
}
