//! Giving space back: purging the trash, burying records that no longer count, removing segments.
//!
//! Order of a purge, so that a crash at any point leaves a state that a later purge completes:
//! ```text
//! envelope becomes a tombstone -> fdatasync -> hole punched -> index forgets the fragment
//! ```
//! A tombstone is one write inside one sector, so it is there or not.

use std::collections::BTreeMap;
use std::sync::Arc;

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;
use us_core::daemon::disk;
use us_core::ids::FragmentId;

use super::stage::{answer, kept_bytes};
use super::{Batch, Command, Writer};
use crate::store::StoreError;
use crate::store::format::{CONTROL_IDS_MAX, ENVELOPE_BYTES, Envelope, RecordKind};
use crate::store::index::{Entry, Staged};
use crate::store::segments::{Segment, write_all_at};

impl Writer {
    /// Whether a command is not part of a batch.
    pub(super) fn stands_alone(command: &Command) -> bool {
        match command {
            Command::Carry { .. }
            | Command::Purge { .. }
            | Command::Remove { .. }
            | Command::Seal { .. } => true,
            Command::Put { .. }
            | Command::Trash { .. }
            | Command::Restore { .. }
            | Command::Move { .. }
            | Command::Probe { .. }
            | Command::Damaged { .. } => false,
        }
    }

    /// Does a command that stands alone; there is no batch open.
    pub(super) fn alone(&mut self, command: Command) {
        match command {
            Command::Carry { ids, from_segment, reply } => {
                let carried = self.carry(&ids, from_segment);
                answer(reply, carried);
            }
            Command::Purge { ids, reply } => {
                let purged = self.purge(&ids);
                answer(reply, purged);
            }
            Command::Remove { segment, reply } => {
                let removed = self.remove(segment);
                answer(reply, removed);
            }
            Command::Seal { reply } => {
                self.active = None;
                let sealed = self.apply(Staged::default());
                answer(reply, sealed);
            }
            Command::Put { .. }
            | Command::Trash { .. }
            | Command::Restore { .. }
            | Command::Move { .. }
            | Command::Probe { .. }
            | Command::Damaged { .. } => unreachable!("staged, never alone"),
        }
    }

    /// Writes again what a segment's control records say of fragments that lie elsewhere.
    fn carry(&mut self, ids: &[FragmentId], from_segment: u32) -> Result<usize, StoreError> {
        let mut batch = Batch::default();
        let elsewhere = |entry: &Entry| entry.place.segment != from_segment;
        let mut by_time: BTreeMap<u64, Vec<FragmentId>> = BTreeMap::new();
        for (id, entry) in self.select(&mut batch, ids, elsewhere)? {
            by_time.entry(entry.trashed_at_s).or_default().push(id);
        }
        let mut carried = 0;
        for (at_s, ids) in by_time {
            let kind = if at_s == 0 { RecordKind::Restore } else { RecordKind::Trash };
            for ids in ids.chunks(CONTROL_IDS_MAX) {
                let mut batch = Batch::default();
                self.append_control(&mut batch, kind, ids, at_s)?;
                self.commit_alone(batch)?;
                carried += ids.len();
            }
        }
        Ok(carried)
    }

    fn commit_alone(&mut self, mut batch: Batch) -> Result<(), StoreError> {
        let result = self.write(&mut batch).and_then(|()| self.publish(&mut batch));
        self.note(result.as_ref().err());
        result
    }

    /// Gives back the space of fragments in the trash. One whose record the disk cannot mark is
    /// forgotten all the same, its bytes are dead; where a whole segment cannot be synced or punched
    /// its fragments stay, once, and the others go.
    fn purge(&mut self, ids: &[FragmentId]) -> Result<usize, StoreError> {
        let mut batch = Batch::default();
        let trashed = self.select(&mut batch, ids, |entry| entry.trashed_at_s != 0)?;
        let mut by_segment: BTreeMap<u32, Vec<(FragmentId, Entry)>> = BTreeMap::new();
        for (id, entry) in trashed {
            by_segment.entry(entry.place.segment).or_default().push((id, entry));
        }
        let (mut staged, mut purged, mut failed) = (Staged::default(), 0, None);
        for (number, trashed) in by_segment {
            let entries: Vec<_> = trashed.iter().map(|(_, entry)| *entry).collect();
            if let Err(error) = self.entomb(&entries)
                && self.unburied.insert(number)
            {
                tracing::error!(%error, segment = number, "cannot be purged; once more");
                failed = Some(error);
                continue;
            }
            purged += trashed.len();
            for (id, entry) in &trashed {
                staged.set(*id, Some(*entry), None);
            }
        }
        self.apply(staged)?;
        metrics::counter!("us_provider_purged_total").increment(purged as u64);
        match failed {
            Some(error) if purged == 0 => Err(error),
            Some(_) | None => Ok(purged),
        }
    }

    /// Buries records that were replaced. A failure costs space, nothing else: it is logged.
    pub(super) fn bury(&mut self, superseded: &[Entry]) {
        if superseded.is_empty() {
            return;
        }
        if let Err(error) = self.entomb(superseded).and_then(|()| self.apply(Staged::default())) {
            tracing::warn!(%error, "a replaced record is not buried");
        }
    }

    /// Tombstones, made durable, then holes.
    fn entomb(&mut self, entries: &[Entry]) -> Result<(), StoreError> {
        let mut by_segment: BTreeMap<u32, Vec<&Entry>> = BTreeMap::new();
        for entry in entries {
            by_segment.entry(entry.place.segment).or_default().push(entry);
        }
        for (number, entries) in by_segment {
            let segment = self.shared.segments.open(number).map_err(Arc::new);
            let segment = segment.map_err(StoreError::Segment)?;
            let failed = |action, error: std::io::Error| StoreError::Io {
                action,
                path: segment.path.clone(),
                source: Arc::new(error),
            };
            let mut buried = Vec::with_capacity(entries.len());
            for entry in &entries {
                match self.mark(&segment, entry) {
                    Ok(true) => buried.push(*entry),
                    Ok(false) => {}
                    Err(error) => {
                        let (path, offset) = (segment.path.display(), entry.place.offset);
                        tracing::error!(%error, %path, offset, "a record cannot be marked as gone");
                    }
                }
            }
            disk::sync_data(&segment.file, &segment.path).map_err(|error| failed("sync", error))?;
            let mut punched = 0;
            for entry in &buried {
                punched += self.punch(&segment, entry).map_err(|error| failed("punch", error))?;
            }
            self.shared.accounts.lock().punch(number, punched);
            self.touched.push(number);
        }
        Ok(())
    }

    fn mark(&self, segment: &Segment, entry: &Entry) -> std::io::Result<bool> {
        #[cfg(test)]
        if self.shared.options.bad_sectors.lock().contains(&entry.place.offset) {
            return Err(Errno::IO.into());
        }
        tombstone(segment, entry)
    }

    /// Gives a record's body back to the file system; says how many bytes that is.
    fn punch(&self, segment: &Segment, entry: &Entry) -> std::io::Result<u64> {
        let bytes = entry.padded_bytes() - kept_bytes();
        if bytes == 0 || !self.shared.options.punch_holes {
            return Ok(0);
        }
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match fallocate(&segment.file, flags, entry.place.offset + kept_bytes(), bytes) {
            Ok(()) => Ok(bytes),
            // This file system has no holes: compaction gives the space back.
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(0),
            Err(error) => Err(error.into()),
        }
    }

    /// Removes a segment in which nothing counts.
    fn remove(&mut self, number: u32) -> Result<bool, StoreError> {
        let is_active = self.active.as_ref().is_some_and(|active| active.segment.number == number);
        if is_active || !self.shared.accounts.lock().segment(number).is_dead() {
            return Ok(false);
        }
        let removed = self.shared.segments.remove(number);
        removed.map_err(|error| StoreError::Segment(Arc::new(error)))?;
        self.shared.accounts.lock().remove(number);
        let mut staged = Staged::default();
        staged.touch(number);
        self.apply(staged)?;
        Ok(true)
    }
}

/// Makes a fragment's record a tombstone; whether it is one now. Whatever stands there that is not this
/// record is left.
fn tombstone(segment: &Segment, entry: &Entry) -> std::io::Result<bool> {
    let offset = entry.place.offset;
    let bytes = segment.read(offset, ENVELOPE_BYTES)?;
    match Envelope::decode(&bytes, &segment.salt, offset) {
        Some(envelope) if envelope.kind == RecordKind::Fragment && envelope.seq == entry.seq => {
            let envelope = Envelope { kind: RecordKind::Tombstone, ..envelope };
            write_all_at(&segment.file, &envelope.encode(), offset).map(|()| true)
        }
        // Of an attempt that did not get further.
        Some(envelope) => Ok(envelope.kind == RecordKind::Tombstone && envelope.seq == entry.seq),
        None => Ok(false),
    }
}
