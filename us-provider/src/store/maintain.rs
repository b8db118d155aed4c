//! Background work on a store: the trash, compaction, scrub. Each call does a bounded piece and
//! returns, so that the caller can pause between pieces; nothing here runs by itself.

use std::sync::Arc;

use us_core::ids::FragmentId;

use super::accounts::{Accounts, SegmentAccount};
use super::format::SEGMENT_HEADER_BYTES;
use super::index::Entry;
use super::scan::{Content, Depth, Found, Scanner, verify_record};
use super::segments::Segment;
use super::writer::{Command, entry_of};
use super::{IDS_MAX, Store, StoreError};

/// Fragments named in control records that are gathered before they are written again.
const CARRY_IDS_MAX: usize = 65_536;
/// Fragments purged at once for want of space, before it is looked at again.
const PRESSED_STEP: usize = 64;

/// How much one call of [`Store::maintain`] may do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MaintainLimits {
    /// Fragments purged from the trash.
    pub purge_max: usize,
    /// Bytes copied out of a segment that is compacted.
    pub copy_bytes_max: u64,
    /// Below this many free bytes the trash is purged before its time.
    pub pressure_bytes: u64,
}

impl Default for MaintainLimits {
    fn default() -> Self {
        Self { purge_max: IDS_MAX, copy_bytes_max: 64 << 20, pressure_bytes: 0 }
    }
}

/// What one call of [`Store::maintain`] did.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Maintained {
    /// Fragments purged from the trash.
    pub purged: usize,
    /// Bytes copied out of a segment.
    pub copied_bytes: u64,
    /// The segment removed.
    pub removed: Option<u32>,
}

impl Maintained {
    /// Whether there was anything to do: there may be more.
    pub const fn did_something(&self) -> bool {
        self.purged > 0 || self.copied_bytes > 0 || self.removed.is_some()
    }
}

/// What one call of [`Store::scrub`] did.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Scrubbed {
    /// Where the next call goes on; `None`: every fragment was seen.
    pub next: Option<FragmentId>,
    /// Fragments read.
    pub fragments: u64,
    /// Bytes read.
    pub bytes: u64,
    /// Fragments found damaged.
    pub damaged: u64,
}

impl Store {
    /// Purges what is due, looks whether a disk in trouble works again, and compacts or removes one
    /// segment: each whatever became of the others. Blocks.
    ///
    /// # Errors
    /// [`StoreError`] of the first step that failed; what the others did stays done.
    pub fn maintain(&self, limits: &MaintainLimits) -> Result<Maintained, StoreError> {
        let mut done = Maintained::default();
        let purged = self.purge_due(limits).map(|purged| done.purged = purged);
        let probed = if self.handle.shared.trouble.lock().is_some() {
            // Does the disk work again? If so this clears the trouble.
            self.ask_blocking(|reply| Command::Probe { reply })
        } else {
            Ok(())
        };
        let compacted = self.compact_one(limits.copy_bytes_max, &mut done);
        purged.and(probed).and(compacted).map(|()| done)
    }

    fn compact_one(&self, copy_bytes_max: u64, done: &mut Maintained) -> Result<(), StoreError> {
        let shared = &self.handle.shared;
        let (chosen, dead_last) = {
            let accounts = shared.accounts.lock();
            let stuck = shared.stuck.lock();
            let is_stuck = |number: u32, account: &SegmentAccount| {
                stuck.get(&number) == Some(&(account.live.records + account.trashed.records))
            };
            (choose(&accounts, is_stuck), dead_last(&accounts))
        };
        if chosen.is_none() && dead_last.is_some() {
            self.ask_blocking(|reply| Command::Seal { reply })?;
        }
        let Some(number) = chosen.or(dead_last) else { return Ok(()) };
        let compacted = self.compact(number, copy_bytes_max, done);
        if compacted.is_err()
            || *done == (Maintained { purged: done.purged, ..Maintained::default() })
        {
            // Something in it can be neither moved nor dropped. The others have their turn.
            let account = shared.accounts.lock().segment(number);
            let records = account.live.records + account.trashed.records;
            shared.stuck.lock().insert(number, records);
        }
        compacted
    }

    /// Purges the trash before its time if less than `limits.pressure_bytes` is free: somebody waits
    /// for the space, so this is done on a busy machine too. Says how many went. Blocks.
    ///
    /// # Errors
    /// As [`Store::maintain`].
    pub fn relieve(&self, limits: &MaintainLimits) -> Result<usize, StoreError> {
        let shared = &self.handle.shared;
        if shared.free_bytes(shared.used_bytes()) >= limits.pressure_bytes {
            return Ok(0);
        }
        self.purge_due(limits)
    }

    fn purge_due(&self, limits: &MaintainLimits) -> Result<usize, StoreError> {
        let shared = &self.handle.shared;
        let now_s = (shared.options.clock)();
        let pressed = shared.free_bytes(shared.used_bytes()) < limits.pressure_bytes;
        let keep_s =
            if pressed { shared.options.trash_readable_s + 1 } else { shared.options.trash_keep_s };
        let Some(before_s) = now_s.checked_sub(keep_s) else { return Ok(0) };
        // Under pressure a small step at a time, so that no more goes than is needed: fragments may
        // be of any size.
        let step = if pressed { PRESSED_STEP } else { IDS_MAX };
        let mut purged = 0;
        while purged < limits.purge_max {
            let ids = shared.index.trash(before_s + 1, step.min(limits.purge_max - purged))?;
            if ids.is_empty() {
                break;
            }
            let went = self.ask_blocking(|reply| Command::Purge { ids, reply })?;
            purged += went;
            let is_pressed = shared.free_bytes(shared.used_bytes()) < limits.pressure_bytes;
            if went == 0 || !pressed || !is_pressed {
                break;
            }
        }
        Ok(purged)
    }

    /// Moves what counts out of a segment and removes it. Where the limit ends it before, a later
    /// call goes on: what was moved is then skipped.
    fn compact(
        &self,
        number: u32,
        copy_bytes_max: u64,
        done: &mut Maintained,
    ) -> Result<(), StoreError> {
        let shared = &self.handle.shared;
        let segment = shared.segments.open(number);
        let segment = segment.map_err(|error| StoreError::Segment(Arc::new(error)))?;
        let failed = |source| StoreError::Io {
            action: "read",
            path: segment.path.clone(),
            source: Arc::new(source),
        };
        let mut scanner = Scanner::new(Arc::clone(&segment), SEGMENT_HEADER_BYTES, Depth::Headers)
            .map_err(failed)?;
        let mut named = Vec::new();
        while let Some(found) = scanner.step().map_err(failed)? {
            if done.copied_bytes >= copy_bytes_max {
                return Ok(());
            }
            match found {
                Found::Record(envelope, Content::Fragment { header, .. }) => {
                    let entry = entry_of(&header, &envelope, number);
                    done.copied_bytes += self.rescue(header.id(), entry, &segment)?;
                }
                Found::Record(_, Content::Trash(ids) | Content::Restore(ids)) => {
                    named.extend(ids);
                    if named.len() >= CARRY_IDS_MAX {
                        self.carry(number, &mut named)?;
                    }
                }
                Found::Record(_, Content::Tombstone(_)) | Found::Unreadable { .. } => {}
            }
        }
        self.carry(number, &mut named)?;
        if self.ask_blocking(|reply| Command::Remove { segment: number, reply })? {
            tracing::info!(segment = number, "segment removed");
            metrics::counter!("us_provider_segments_removed_total").increment(1);
            done.removed = Some(number);
        }
        Ok(())
    }

    /// Has what the control records of a segment say written again, many small ones as one.
    fn carry(&self, from_segment: u32, named: &mut Vec<FragmentId>) -> Result<(), StoreError> {
        let ids = std::mem::take(named);
        if ids.is_empty() {
            return Ok(());
        }
        self.ask_blocking(|reply| Command::Carry { ids, from_segment, reply }).map(drop)
    }

    /// Writes a fragment again that still counts and lies where `found` says. One that the index does
    /// not know is written again too: either its put was never acknowledged, which harms nobody, or
    /// the index has lost it, and then this is what saves it.
    fn rescue(&self, id: FragmentId, found: Entry, segment: &Segment) -> Result<u64, StoreError> {
        let shared = &self.handle.shared;
        let known = shared.index.entry(id)?.map(|entry| entry.place);
        let is_elsewhere = known.is_some_and(|place| place != found.place);
        if is_elsewhere || known.is_none() && shared.unmarked.lock().contains(&found.place) {
            return Ok(0);
        }
        let record = match shared.read_payload(&found, id) {
            Ok(record) => record,
            Err(error) => {
                // It stays, and the segment with it; what lies behind it is moved.
                tracing::warn!(%id, %error, path = %segment.path.display(), "cannot be moved");
                return Ok(0);
            }
        };
        if known.is_none() && verify_record(record.clone(), id).is_err() {
            return Ok(0);
        }
        self.ask_blocking(|reply| Command::Move { entry: found, known, record, reply })?;
        Ok(found.padded_bytes())
    }

    /// Reads the fragments after `after` until `bytes_max` are read, and checks them. Damage is
    /// noted in the index and by [`Store::take_fresh_damage`]. Blocks.
    ///
    /// # Errors
    /// [`StoreError::Index`], [`StoreError::Closed`]; a fragment that cannot be read is damage, not
    /// an error.
    pub fn scrub(&self, after: Option<FragmentId>, bytes_max: u64) -> Result<Scrubbed, StoreError> {
        let mut done = Scrubbed { next: after, ..Scrubbed::default() };
        while done.bytes < bytes_max {
            let page = self.handle.shared.index.page(done.next, 256)?;
            if page.is_empty() {
                done.next = None;
                return Ok(done);
            }
            for (id, entry) in page {
                done.next = Some(id);
                if entry.trashed_at_s != 0 {
                    continue;
                }
                done.fragments += 1;
                done.bytes += entry.padded_bytes();
                match self.read_record(id) {
                    Ok(_) | Err(StoreError::NotFound { .. }) => {}
                    Err(error @ (StoreError::Index(_) | StoreError::Closed)) => return Err(error),
                    Err(_) => {
                        done.damaged += 1;
                        if entry.damaged {
                            // Known, but perhaps not to the directory: only so many are named at once.
                            self.handle.shared.note_damage(id);
                        }
                    }
                }
                if done.bytes >= bytes_max {
                    break;
                }
            }
        }
        Ok(done)
    }
}

/// The segment whose compaction gives back the most: all dead, or at least half of what it takes.
/// Never the last one, which is being written.
fn choose(accounts: &Accounts, is_stuck: impl Fn(u32, &SegmentAccount) -> bool) -> Option<u32> {
    let last = accounts.segments().last().map(|(number, _)| number);
    let worth = |account: &SegmentAccount| {
        account.is_dead() || account.dead_bytes() * 2 >= account.used_bytes()
    };
    accounts
        .segments()
        .filter(|(number, account)| {
            Some(*number) != last && worth(account) && !is_stuck(*number, account)
        })
        .max_by_key(|(_, account)| (account.is_dead(), account.dead_bytes()))
        .map(|(number, _)| number)
}

/// The segment being written, where it holds records but no fragment is left in the whole store: what
/// its control records say matters to nobody.
fn dead_last(accounts: &Accounts) -> Option<u32> {
    let (number, account) = accounts.segments().last()?;
    if accounts.live().records + accounts.trashed().records > 0 {
        return None;
    }
    (account.is_dead() && account.bytes > SEGMENT_HEADER_BYTES).then_some(number)
}
