//! Reading: every byte that leaves was checked in this read.
//!
//! A read looks the fragment up, then reads its segment without any lock. Meanwhile the fragment may
//! be moved by compaction or purged, so bytes that do not hold are damage only if the index still
//! points to them afterwards.
//!
//! Small pieces of a large fragment are read again and again: its header and its sums, checked when
//! they were first read, are kept for the next ([`Fronts`]), which then needs one call and not three.

use std::io;
use std::sync::Arc;

use bytes::Bytes;
use us_core::code::combine;
use us_core::fragment::{FragmentHeader, FragmentRecord, FragmentTrailer, HEADER_BYTES};
use us_core::ids::FragmentId;

use super::format::{ENVELOPE_BYTES, Envelope, RecordKind};
use super::index::{Entry, Place};
use super::segments::{Segment, SegmentError};
use super::writer::Command;
use super::{Shared, Store, StoreError};

/// Lookups of a fragment that moves while it is read.
const ATTEMPTS: usize = 4;
/// A record up to this size is read whole, whatever is wanted of it: one call instead of three.
const WHOLE_BYTES: usize = 64 << 10;

/// Fragments whose header and sums are kept: about a KiB each.
const FRONTS_MAX: usize = 4096;

/// Header and sums of a record.
#[derive(Debug)]
struct Front {
    /// Where the record lies, and its number: another one has another front.
    place: Place,
    seq: u64,
    header: FragmentHeader,
    trailer: Bytes,
    sums: FragmentTrailer,
}

/// The fronts of fragments of which a part was read lately.
#[derive(Debug)]
pub(super) struct Fronts(quick_cache::sync::Cache<FragmentId, Arc<Front>>);

impl Default for Fronts {
    fn default() -> Self {
        Self(quick_cache::sync::Cache::new(FRONTS_MAX))
    }
}

impl Fronts {
    fn get(&self, id: FragmentId, entry: &Entry) -> Option<Arc<Front>> {
        self.0.get(&id).filter(|front| front.place == entry.place && front.seq == entry.seq)
    }
}

/// How bytes are read from a segment.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Patience {
    /// They are waited for.
    Waits,
    /// Only what the system has in memory.
    Now,
}

/// What to read of a fragment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ReadRequest {
    /// The fragment.
    pub id: FragmentId,
    /// The first slot.
    pub first_slot: usize,
    /// How many slots; `None`: all from the first on.
    pub slots: Option<usize>,
}

/// What was read of a fragment.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Read {
    /// Its header.
    pub header: FragmentHeader,
    /// Its trailer, as stored.
    pub trailer: Bytes,
    /// The slots asked for.
    pub data: Bytes,
}

/// Why bytes read are not the answer.
enum Miss {
    /// They are not what they must be.
    Wrong(String),
    /// The request does not fit the fragment.
    Request(StoreError),
    /// The disk failed, or has not yet what is wanted now.
    Io(&'static str, io::Error),
}

impl Store {
    /// Reads slots of a fragment. Blocks.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], [`StoreError::Damaged`], [`StoreError::Invalid`] for slots it does
    /// not have, [`StoreError::Io`], [`StoreError::Segment`], [`StoreError::Index`].
    pub fn read(&self, request: ReadRequest) -> Result<Read, StoreError> {
        let fronts = &self.handle.shared.fronts;
        self.attempt(request.id, |segment, entry| {
            read_slots(fronts, segment, entry, &request, Patience::Waits)
        })
    }

    /// As [`Store::read`] where the system has all of it in memory. `None` where it must be waited
    /// for, or is not well: [`Store::read`] says what it is. Does not wait for the disk, but for a
    /// page of the index that is not in its cache.
    pub fn read_now(&self, request: ReadRequest) -> Option<Read> {
        let shared = &self.handle.shared;
        let entry = shared.readable(request.id).ok()?;
        let segment = shared.segments.opened(entry.place.segment)?;
        read_slots(&shared.fronts, &segment, &entry, &request, Patience::Now).ok()
    }

    /// Reads a fragment's whole record. Blocks.
    ///
    /// # Errors
    /// As [`Store::read`].
    pub fn read_record(&self, id: FragmentId) -> Result<Bytes, StoreError> {
        self.attempt(id, |segment, entry| {
            read_whole(segment, entry, id).map(|(payload, _record)| payload)
        })
    }

    /// Sums coefficient x slots over fragments of one shape; `None` where one of them is not
    /// `covered`. Blocks; holds one fragment per item.
    ///
    /// # Errors
    /// As [`Store::read`], and [`StoreError::Request`], [`StoreError::Combine`].
    pub fn combine(
        &self,
        items: &[(FragmentId, u8)],
        first_slot: usize,
        slots: Option<usize>,
        covered: impl Fn(&FragmentHeader) -> bool,
    ) -> Result<Option<Bytes>, StoreError> {
        let read = |&(id, _): &(FragmentId, u8)| self.read(ReadRequest { id, first_slot, slots });
        let parts = items.iter().map(read).collect::<Result<Vec<_>, _>>()?;
        if !parts.iter().all(|part| covered(&part.header)) {
            return Ok(None);
        }
        let coefficients: Vec<u8> = items.iter().map(|(_, coefficient)| *coefficient).collect();
        let data: Vec<&[u8]> = parts.iter().map(|part| &part.data[..]).collect();
        let bytes = data.first().map_or(0, |first| first.len());
        if data.iter().any(|part| part.len() != bytes) {
            return Err(StoreError::Request { detail: "fragments of different lengths" });
        }
        let mut sum = vec![0u8; bytes];
        combine(&coefficients, &data, &mut sum)?;
        Ok(Some(sum.into()))
    }

    /// Reads a fragment whole and checks it. A fragment in the trash counts as not found. Blocks.
    ///
    /// # Errors
    /// As [`Store::read`].
    pub fn verify(&self, id: FragmentId) -> Result<(), StoreError> {
        let entry = self.handle.shared.index.entry(id)?;
        if entry.is_none_or(|entry| entry.trashed_at_s != 0) {
            return Err(StoreError::NotFound { id });
        }
        self.read_record(id).map(drop)
    }

    /// Whether a fragment is here and not known to be damaged, without reading it. Blocks on the
    /// index only.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], [`StoreError::Damaged`], [`StoreError::Index`].
    pub fn check(&self, id: FragmentId) -> Result<(), StoreError> {
        match self.handle.shared.index.entry(id)? {
            Some(entry) if entry.trashed_at_s != 0 => Err(StoreError::NotFound { id }),
            Some(entry) if entry.damaged => {
                Err(StoreError::Damaged { id, detail: "found damaged before".to_owned() })
            }
            Some(_) => Ok(()),
            None => Err(StoreError::NotFound { id }),
        }
    }

    fn attempt<T>(
        &self,
        id: FragmentId,
        read: impl Fn(&Segment, &Entry) -> Result<T, Miss>,
    ) -> Result<T, StoreError> {
        let shared = &self.handle.shared;
        for _ in 0..ATTEMPTS {
            let entry = shared.readable(id)?;
            let segment = match shared.segments.open(entry.place.segment) {
                Ok(segment) => segment,
                Err(error) if shared.has_moved(id, &entry)? => {
                    tracing::debug!(%id, %error, "moved while it was read");
                    continue;
                }
                Err(error) => return Err(self.segment_lost(id, &entry, error)),
            };
            match read(&segment, &entry) {
                Ok(value) => return Ok(value),
                Err(Miss::Request(error)) => return Err(error),
                Err(Miss::Wrong(_) | Miss::Io(..)) if shared.has_moved(id, &entry)? => {}
                Err(Miss::Wrong(detail)) => {
                    self.report_damage(id, &entry);
                    return Err(StoreError::Damaged { id, detail });
                }
                Err(Miss::Io(action, source)) => {
                    metrics::counter!("us_provider_read_failures_total").increment(1);
                    self.report_damage(id, &entry);
                    let (path, source) = (segment.path.clone(), Arc::new(source));
                    return Err(StoreError::Io { action, path, source });
                }
            }
        }
        Err(StoreError::NotFound { id })
    }

    /// The fragment's segment is gone or unreadable.
    fn segment_lost(&self, id: FragmentId, entry: &Entry, error: SegmentError) -> StoreError {
        self.report_damage(id, entry);
        match error {
            SegmentError::Io { ref source, .. } if source.kind() != io::ErrorKind::NotFound => {
                StoreError::Segment(Arc::new(error))
            }
            SegmentError::Io { .. }
            | SegmentError::Header { .. }
            | SegmentError::Foreign { .. } => StoreError::Damaged { id, detail: error.to_string() },
        }
    }

    /// Has the writer note the damage. When its queue is full the next read finds it again.
    fn report_damage(&self, id: FragmentId, entry: &Entry) {
        if entry.damaged || entry.trashed_at_s != 0 {
            return;
        }
        tracing::warn!(%id, segment = entry.place.segment, offset = entry.place.offset, "damaged");
        let commands = self.handle.commands.lock().clone();
        if let Some(commands) = commands {
            let _ = commands.try_send(Command::Damaged { id, place: entry.place });
        }
    }
}

impl Shared {
    /// The entry of a fragment that may be read: live, or deleted a short time ago.
    fn readable(&self, id: FragmentId) -> Result<Entry, StoreError> {
        let readable = |entry: &Entry| {
            entry.trashed_at_s == 0
                || (self.options.clock)()
                    <= entry.trashed_at_s.saturating_add(self.options.trash_readable_s)
        };
        self.index.entry(id)?.filter(readable).ok_or(StoreError::NotFound { id })
    }

    /// Whether the index no longer points where it did.
    fn has_moved(&self, id: FragmentId, entry: &Entry) -> Result<bool, StoreError> {
        Ok(self.index.entry(id)?.is_none_or(|now| now.place != entry.place))
    }

    /// The record's bytes as they are, checked no further than that the record is this fragment's.
    pub(super) fn read_payload(&self, entry: &Entry, id: FragmentId) -> Result<Bytes, StoreError> {
        let segment = self.segments.open(entry.place.segment);
        let segment = segment.map_err(|error| StoreError::Segment(Arc::new(error)))?;
        read_raw(&segment, entry, Patience::Waits).map_err(|miss| match miss {
            Miss::Wrong(detail) => StoreError::Damaged { id, detail },
            Miss::Request(error) => error,
            Miss::Io(action, source) => {
                let (path, source) = (segment.path.clone(), Arc::new(source));
                StoreError::Io { action, path, source }
            }
        })
    }
}

fn read_slots(
    fronts: &Fronts,
    segment: &Segment,
    entry: &Entry,
    request: &ReadRequest,
    patience: Patience,
) -> Result<Read, Miss> {
    let whole = entry.payload_bytes as usize <= WHOLE_BYTES;
    let part = request.slots.is_some() || request.first_slot > 0;
    if !part || whole {
        let (payload, record) = read_envelope_and_all(segment, entry, request.id, patience)?;
        let range = slot_range(&record.header, request)?;
        let trailer_at = HEADER_BYTES + record.header.fragment_bytes();
        let trailer = payload.slice(trailer_at..);
        let data = record.body.slice(range);
        check_slots(&record.header, &record.trailer, request, &data)?;
        return Ok(Read { header: record.header, trailer, data });
    }
    let front = match fronts.get(request.id, entry) {
        Some(front) => front,
        None => {
            let front = Arc::new(read_front(segment, entry, request.id, patience)?);
            fronts.0.insert(request.id, Arc::clone(&front));
            front
        }
    };
    let range = slot_range(&front.header, request)?;
    let body_at = ENVELOPE_BYTES + HEADER_BYTES;
    let data = fetch(segment, entry, body_at + range.start, range.len(), patience)?;
    check_slots(&front.header, &front.sums, request, &data)?;
    let (header, trailer) = (front.header, front.trailer.clone());
    Ok(Read { header, trailer, data: Bytes::from(data) })
}

/// What is around the slots, checked.
fn read_front(
    segment: &Segment,
    entry: &Entry,
    id: FragmentId,
    patience: Patience,
) -> Result<Front, Miss> {
    let start_bytes = ENVELOPE_BYTES + HEADER_BYTES;
    let start = fetch(segment, entry, 0, start_bytes, patience)?;
    check_envelope(segment, entry, &start)?;
    let header = header_of(&start[ENVELOPE_BYTES..], entry, id)?;
    let trailer_at = start_bytes + header.fragment_bytes();
    let trailer = fetch(segment, entry, trailer_at, header.trailer_bytes(), patience)?;
    let sums = FragmentTrailer::decode(&header, &trailer).map_err(wrong)?;
    let (place, seq, trailer) = (entry.place, entry.seq, Bytes::from(trailer));
    Ok(Front { place, seq, header, trailer, sums })
}

fn check_slots(
    header: &FragmentHeader,
    trailer: &FragmentTrailer,
    request: &ReadRequest,
    data: &[u8],
) -> Result<(), Miss> {
    trailer.verify_slots(header, request.first_slot, data).map_err(wrong)
}

/// The whole record, its body checked too.
fn read_whole(
    segment: &Segment,
    entry: &Entry,
    id: FragmentId,
) -> Result<(Bytes, FragmentRecord), Miss> {
    let (payload, record) = read_envelope_and_all(segment, entry, id, Patience::Waits)?;
    record.verify_body().map_err(wrong)?;
    Ok((payload, record))
}

/// The whole record; its body is not checked.
fn read_envelope_and_all(
    segment: &Segment,
    entry: &Entry,
    id: FragmentId,
    patience: Patience,
) -> Result<(Bytes, FragmentRecord), Miss> {
    let payload = read_raw(segment, entry, patience)?;
    let record = FragmentRecord::decode(payload.clone()).map_err(wrong)?;
    if record.header.id() != id {
        return Err(Miss::Wrong(format!("fragment {} lies there", record.header.id())));
    }
    Ok((payload, record))
}

/// The payload where the entry says, under its envelope.
fn read_raw(segment: &Segment, entry: &Entry, patience: Patience) -> Result<Bytes, Miss> {
    let bytes = ENVELOPE_BYTES + entry.payload_bytes as usize;
    let bytes = fetch(segment, entry, 0, bytes, patience)?;
    check_envelope(segment, entry, &bytes)?;
    Ok(Bytes::from(bytes).slice(ENVELOPE_BYTES..))
}

fn check_envelope(segment: &Segment, entry: &Entry, bytes: &[u8]) -> Result<(), Miss> {
    match Envelope::decode(bytes, &segment.salt, entry.place.offset) {
        Some(envelope)
            if envelope.seq == entry.seq
                && envelope.payload_bytes == entry.payload_bytes
                && envelope.kind == RecordKind::Fragment =>
        {
            Ok(())
        }
        Some(_) => Err(Miss::Wrong("another record lies there".to_owned())),
        None => Err(Miss::Wrong("no record lies there".to_owned())),
    }
}

fn header_of(bytes: &[u8], entry: &Entry, id: FragmentId) -> Result<FragmentHeader, Miss> {
    let header = FragmentHeader::decode(bytes).map_err(wrong)?;
    if header.id() != id {
        return Err(Miss::Wrong(format!("fragment {} lies there", header.id())));
    }
    if header.record_bytes() != entry.payload_bytes as usize {
        return Err(Miss::Wrong("its record has another length".to_owned()));
    }
    Ok(header)
}

fn slot_range(
    header: &FragmentHeader,
    request: &ReadRequest,
) -> Result<std::ops::Range<usize>, Miss> {
    let (slots, slot_bytes) = (header.slots(), header.geometry().slot_bytes());
    let first_slot = request.first_slot;
    let end_slot = request.slots.map_or(slots, |count| first_slot.saturating_add(count));
    if first_slot > end_slot || end_slot > slots {
        let id = header.id();
        let error =
            us_core::fragment::FragmentError::NoSuchSlot { id, first_slot, end_slot, slots };
        return Err(Miss::Request(error.into()));
    }
    Ok(first_slot * slot_bytes..end_slot * slot_bytes)
}

/// Exactly `bytes` at `offset` of the entry's record.
fn fetch(
    segment: &Segment,
    entry: &Entry,
    offset: usize,
    bytes: usize,
    patience: Patience,
) -> Result<Vec<u8>, Miss> {
    let at = entry.place.offset + offset as u64;
    let found = match patience {
        Patience::Waits => segment.read(at, bytes),
        Patience::Now => segment.read_now(at, bytes),
    };
    let found = found.map_err(|error| Miss::Io("read", error))?;
    if found.len() != bytes {
        return Err(Miss::Wrong(format!("{} of {bytes} bytes are there", found.len())));
    }
    Ok(found)
}

fn wrong(error: us_core::fragment::FragmentError) -> Miss {
    Miss::Wrong(error.to_string())
}
