//! Decides what each command does: numbers records, stages their effects.

use bytes::Bytes;
use us_core::fragment::{FragmentHeader, crc32c};
use us_core::ids::FragmentId;

use super::{Batch, Command, Reply, Writer};
use crate::store::format::{
    ALIGN, ENVELOPE_BYTES, Envelope, RecordKind, SEGMENT_HEADER_BYTES, encode_control, padded_bytes,
};
use crate::store::index::{Entry, Place};
use crate::store::scan::verify_record;
use crate::store::{PutOutcome, StoreError};

/// What a put meets.
enum Meeting {
    /// Nothing, or only a damaged record: store it.
    Store { replaces: Option<Entry> },
    /// The same bytes, here or in the batch.
    Same { trashed: Option<Entry> },
    /// Other bytes.
    Other,
}

/// Why a command is not staged.
enum Stop {
    /// It waits for the next batch.
    Full,
    /// It is answered with this.
    Failed(StoreError),
}

impl From<StoreError> for Stop {
    fn from(error: StoreError) -> Self {
        Self::Failed(error)
    }
}

impl Writer {
    /// Stages a command, or answers it at once. Returns it where it must wait for this batch's end.
    pub(super) fn stage(&mut self, batch: &mut Batch, command: Command) -> Option<Command> {
        if let Some(error) = &self.broken {
            refuse(command, error);
            return None;
        }
        match command {
            Command::Put { header, record, permit, reply } => {
                match self.stage_put(batch, &header, &record) {
                    Ok(outcome) => batch.wait(reply, outcome, Some(permit)),
                    Err(Stop::Failed(error)) => answer(reply, Err(error)),
                    Err(Stop::Full) => return Some(Command::Put { header, record, permit, reply }),
                }
            }
            Command::Trash { ids, reply } => {
                let at_s = (self.shared.options.clock)().max(1);
                match self.stage_trash(batch, &ids, at_s) {
                    Ok(count) => batch.wait(reply, count, None),
                    Err(Stop::Failed(error)) => answer(reply, Err(error)),
                    Err(Stop::Full) => return Some(Command::Trash { ids, reply }),
                }
            }
            Command::Restore { ids, reply } => match self.stage_restore(batch, &ids) {
                Ok(count) => batch.wait(reply, count, None),
                Err(Stop::Failed(error)) => answer(reply, Err(error)),
                Err(Stop::Full) => return Some(Command::Restore { ids, reply }),
            },
            Command::Move { entry, known, record, reply } => {
                match self.stage_move(batch, entry, known, &record) {
                    Ok(moved) => batch.wait(reply, moved, None),
                    Err(Stop::Failed(error)) => answer(reply, Err(error)),
                    Err(Stop::Full) => return Some(Command::Move { entry, known, record, reply }),
                }
            }
            Command::Probe { reply } => {
                match self.stage_control(batch, RecordKind::Restore, &[], 0) {
                    Ok(()) => batch.wait(reply, (), None),
                    Err(Stop::Failed(error)) => answer(reply, Err(error)),
                    Err(Stop::Full) => return Some(Command::Probe { reply }),
                }
            }
            Command::Damaged { id, place } => {
                if let Err(error) = self.stage_damage(batch, id, place) {
                    tracing::warn!(%id, %error, "damage not noted");
                }
            }
            command @ (Command::Carry { .. }
            | Command::Purge { .. }
            | Command::Remove { .. }
            | Command::Seal { .. }) => return Some(command),
        }
        None
    }

    fn stage_put(
        &mut self,
        batch: &mut Batch,
        header: &FragmentHeader,
        record: &Bytes,
    ) -> Result<PutOutcome, Stop> {
        let id = header.id();
        let current = batch.staged().entry(&self.shared.index, id).map_err(StoreError::Index)?;
        let replaces = match self.meet(batch, id, current, record) {
            Meeting::Same { trashed } => {
                if let Some(entry) = trashed {
                    self.stage_control(batch, RecordKind::Restore, &[id], 0)?;
                    let live = Entry { trashed_at_s: 0, ..entry };
                    batch.staged().set(id, current, Some(live));
                }
                return Ok(PutOutcome::Present);
            }
            Meeting::Other => return Err(StoreError::Refused { id }.into()),
            Meeting::Store { replaces } => replaces,
        };
        self.check_space(batch, padded_bytes(record.len() as u32))?;
        self.append_fragment(batch, header, record, current, 0)?;
        replaces.into_iter().for_each(|entry| batch.supersede(entry));
        Ok(PutOutcome::Stored)
    }

    /// Compares a put with what is stored under its id.
    fn meet(
        &self,
        batch: &Batch,
        id: FragmentId,
        current: Option<Entry>,
        record: &Bytes,
    ) -> Meeting {
        let Some(entry) = current else { return Meeting::Store { replaces: None } };
        if let Some(payload) = batch.payload_of(id) {
            return if payload == record {
                Meeting::Same { trashed: (entry.trashed_at_s != 0).then_some(entry) }
            } else {
                Meeting::Other
            };
        }
        let stored = self.shared.read_payload(&entry, id);
        match stored {
            // The bytes are right now, but were not once: they are written again elsewhere.
            Ok(stored) if stored == *record && entry.damaged => {
                Meeting::Store { replaces: Some(entry) }
            }
            Ok(stored) if stored == *record => {
                Meeting::Same { trashed: (entry.trashed_at_s != 0).then_some(entry) }
            }
            Ok(stored) if verify_record(stored.clone(), id).is_ok() => Meeting::Other,
            Ok(_) | Err(_) => Meeting::Store { replaces: Some(entry) },
        }
    }

    fn append_fragment(
        &mut self,
        batch: &mut Batch,
        header: &FragmentHeader,
        record: &Bytes,
        current: Option<Entry>,
        trashed_at_s: u64,
    ) -> Result<Entry, Stop> {
        let payload_bytes = record.len() as u32;
        let room = self.room(batch, padded_bytes(payload_bytes))?.ok_or(Stop::Full)?;
        let envelope = Envelope {
            salt: room.0.salt,
            seq: self.take_seq(),
            offset: room.1,
            trashed_at_s,
            payload_bytes,
            payload_sum: 0,
            kind: RecordKind::Fragment,
        };
        let entry = entry_of(header, &envelope, room.0.number);
        batch.staged().set(header.id(), current, Some(entry));
        batch.push_fragment(header.id(), &envelope, record.clone());
        Ok(entry)
    }

    fn stage_trash(
        &mut self,
        batch: &mut Batch,
        ids: &[FragmentId],
        at_s: u64,
    ) -> Result<usize, Stop> {
        let live = self.select(batch, ids, |entry| entry.trashed_at_s == 0)?;
        let names: Vec<_> = live.iter().map(|(id, _)| *id).collect();
        if names.is_empty() {
            return Ok(0);
        }
        self.stage_control(batch, RecordKind::Trash, &names, at_s)?;
        for (id, entry) in live {
            batch.staged().set(id, Some(entry), Some(Entry { trashed_at_s: at_s, ..entry }));
        }
        Ok(names.len())
    }

    fn stage_restore(&mut self, batch: &mut Batch, ids: &[FragmentId]) -> Result<usize, Stop> {
        let trashed = self.select(batch, ids, |entry| entry.trashed_at_s != 0)?;
        let names: Vec<_> = trashed.iter().map(|(id, _)| *id).collect();
        if names.is_empty() {
            return Ok(0);
        }
        self.stage_control(batch, RecordKind::Restore, &names, 0)?;
        for (id, entry) in trashed {
            batch.staged().set(id, Some(entry), Some(Entry { trashed_at_s: 0, ..entry }));
        }
        Ok(names.len())
    }

    /// The named fragments that are here and fulfil `wanted`, each once.
    pub(super) fn select(
        &self,
        batch: &mut Batch,
        ids: &[FragmentId],
        wanted: impl Fn(&Entry) -> bool,
    ) -> Result<Vec<(FragmentId, Entry)>, StoreError> {
        let mut names = ids.to_vec();
        names.sort_unstable();
        names.dedup();
        let mut selected = Vec::new();
        for id in names {
            let entry = batch.staged().entry(&self.shared.index, id)?;
            selected.extend(entry.filter(&wanted).map(|entry| (id, entry)));
        }
        Ok(selected)
    }

    fn stage_move(
        &mut self,
        batch: &mut Batch,
        from: Entry,
        known: Option<Place>,
        record: &Bytes,
    ) -> Result<bool, Stop> {
        let header = FragmentHeader::decode(record).map_err(StoreError::Invalid)?;
        let current = batch.staged().entry(&self.shared.index, header.id());
        let current = current.map_err(StoreError::Index)?;
        if current.map(|entry| entry.place) != known {
            return Ok(false);
        }
        let trashed_at_s = current.unwrap_or(from).trashed_at_s;
        let entry = self.append_fragment(batch, &header, record, current, trashed_at_s)?;
        if current.is_some_and(|entry| entry.damaged) {
            // Moving does not make it better.
            batch.staged().set(header.id(), current, Some(Entry { damaged: true, ..entry }));
        }
        // A later look at the old segment must not take the old record for one the index has lost.
        batch.supersede(from);
        Ok(true)
    }

    fn stage_damage(
        &mut self,
        batch: &mut Batch,
        id: FragmentId,
        place: Place,
    ) -> Result<(), StoreError> {
        let current = batch.staged().entry(&self.shared.index, id)?;
        if let Some(entry) = current.filter(|entry| entry.place == place && !entry.damaged) {
            batch.staged().set(id, current, Some(Entry { damaged: true, ..entry }));
            self.shared.note_damage(id);
        }
        Ok(())
    }

    /// Appends a control record. It may use the reserve: deleting must always be possible.
    fn stage_control(
        &mut self,
        batch: &mut Batch,
        kind: RecordKind,
        ids: &[FragmentId],
        trashed_at_s: u64,
    ) -> Result<(), Stop> {
        let payload = encode_control(ids);
        let payload_bytes = payload.len() as u32;
        let room = self.room(batch, padded_bytes(payload_bytes))?.ok_or(Stop::Full)?;
        let envelope = Envelope {
            salt: room.0.salt,
            seq: self.take_seq(),
            offset: room.1,
            trashed_at_s,
            payload_bytes,
            payload_sum: crc32c(&payload),
            kind,
        };
        batch.push(&envelope, payload.into());
        Ok(())
    }

    /// As [`Writer::stage_control`], beginning a segment where the record does not fit.
    pub(super) fn append_control(
        &mut self,
        batch: &mut Batch,
        kind: RecordKind,
        ids: &[FragmentId],
        trashed_at_s: u64,
    ) -> Result<(), StoreError> {
        match self.stage_control(batch, kind, ids, trashed_at_s) {
            Ok(()) => Ok(()),
            Err(Stop::Failed(error)) => Err(error),
            Err(Stop::Full) => Err(StoreError::Request { detail: "control record does not fit" }),
        }
    }

    /// Whether cap, reserve and disk allow `bytes` more than the batch already has.
    fn check_space(&self, batch: &mut Batch, bytes: u64) -> Result<(), StoreError> {
        let shared = &self.shared;
        let free_bytes = batch.free_bytes(|| shared.free_bytes(shared.used_bytes()));
        // At worst it begins a segment.
        if bytes + SEGMENT_HEADER_BYTES > free_bytes {
            return Err(StoreError::NoSpace { needed_bytes: bytes, free_bytes });
        }
        Ok(())
    }

    fn take_seq(&mut self) -> u64 {
        self.next_seq += 1;
        self.next_seq - 1
    }
}

/// The entry of a fragment's record.
pub(in crate::store) fn entry_of(
    header: &FragmentHeader,
    envelope: &Envelope,
    segment: u32,
) -> Entry {
    Entry {
        place: Place { segment, offset: envelope.offset },
        seq: envelope.seq,
        payload_bytes: envelope.payload_bytes,
        fragment_bytes: header.fragment_bytes() as u32,
        volume: header.volume(),
        birth: header.birth(),
        trashed_at_s: envelope.trashed_at_s,
        damaged: false,
    }
}

/// Bytes of a record before its body: what stays when a body is punched out.
pub(in crate::store) const fn kept_bytes() -> u64 {
    let bytes = (ENVELOPE_BYTES + us_core::fragment::HEADER_BYTES) as u64;
    bytes.next_multiple_of(ALIGN)
}

pub(super) fn answer<T>(reply: Reply<T>, result: Result<T, StoreError>) {
    // Whoever no longer waits does not want to know.
    let _ = reply.send(result);
}

/// Answers any command with an error.
fn refuse(command: Command, error: &StoreError) {
    let error = error.clone();
    match command {
        Command::Put { reply, .. } => answer(reply, Err(error)),
        Command::Trash { reply, .. }
        | Command::Restore { reply, .. }
        | Command::Carry { reply, .. }
        | Command::Purge { reply, .. } => answer(reply, Err(error)),
        Command::Move { reply, .. } | Command::Remove { reply, .. } => answer(reply, Err(error)),
        Command::Seal { reply } | Command::Probe { reply } => answer(reply, Err(error)),
        Command::Damaged { .. } => {}
    }
}
