//! Walks the records of a segment, whatever state its bytes are in.
//!
//! A record that does not hold is passed over: the walk goes on at the next multiple of 4 KiB where
//! an envelope with the segment's salt and its own offset stands.

use std::io;
use std::sync::Arc;

use bytes::Bytes;
use us_core::fragment::{FragmentError, FragmentHeader, FragmentRecord, HEADER_BYTES, crc32c};
use us_core::ids::FragmentId;

use super::format::{
    ALIGN, ENVELOPE_BYTES, Envelope, RecordKind, SEGMENT_HEADER_BYTES, decode_control,
};
use super::segments::Segment;

/// Bytes read at once while the records are small.
const READ_AHEAD: usize = 256 << 10;
/// Bytes read at once while they are large and only their headers matter.
const READ_HEADER: usize = ALIGN as usize;

/// How closely a walk looks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Depth {
    /// Envelopes, fragment headers, control records.
    Headers,
    /// The fragments' bodies too.
    Whole,
}

/// What a record says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Content {
    /// A fragment.
    Fragment {
        /// Its header.
        header: FragmentHeader,
        /// `false`: its body or trailer is damaged (looked at with [`Depth::Whole`] only).
        intact: bool,
    },
    /// What is left of one.
    Tombstone(FragmentId),
    /// These went to the trash.
    Trash(Vec<FragmentId>),
    /// These came back from the trash.
    Restore(Vec<FragmentId>),
}

/// One step of a walk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Found {
    /// A record.
    Record(Envelope, Content),
    /// Bytes that are no record, up to the next record or the end of the file.
    Unreadable {
        /// Where they begin.
        offset: u64,
        /// Where they end.
        end: u64,
    },
}

/// A walk over the records of one segment.
#[derive(Debug)]
pub struct Scanner {
    segment: Arc<Segment>,
    offset: u64,
    end: u64,
    depth: Depth,
    buffer: Vec<u8>,
    buffer_at: u64,
    small: bool,
}

impl Scanner {
    /// A walk from `offset` (at least the end of the header) to the end of the file as it is now.
    ///
    /// # Errors
    /// Any I/O error.
    pub fn new(segment: Arc<Segment>, offset: u64, depth: Depth) -> io::Result<Self> {
        let end = segment.file_bytes()?;
        let offset = offset.max(SEGMENT_HEADER_BYTES).next_multiple_of(ALIGN);
        Ok(Self { segment, offset, end, depth, buffer: Vec::new(), buffer_at: 0, small: true })
    }

    /// The next step; `None` at the end of the file.
    ///
    /// # Errors
    /// Any I/O error.
    pub fn step(&mut self) -> io::Result<Option<Found>> {
        let begin = self.offset;
        while self.offset < self.end {
            let Some((envelope, content)) = self.record_at(self.offset)? else {
                self.small = true;
                self.offset += ALIGN;
                continue;
            };
            if self.offset > begin {
                return Ok(Some(Found::Unreadable { offset: begin, end: self.offset }));
            }
            self.small = envelope.padded_bytes() < READ_AHEAD as u64 / 4;
            self.offset += envelope.padded_bytes();
            return Ok(Some(Found::Record(envelope, content)));
        }
        let end = self.end;
        Ok((begin < end).then_some(Found::Unreadable { offset: begin, end }))
    }

    /// The record at `offset`, if one stands there whole.
    fn record_at(&mut self, offset: u64) -> io::Result<Option<(Envelope, Content)>> {
        let salt = self.segment.salt;
        let mut start = [0u8; ENVELOPE_BYTES + HEADER_BYTES];
        let found = self.bytes(offset, start.len())?;
        let start = &mut start[..found.len()];
        start.copy_from_slice(found);
        let Some(envelope) = Envelope::decode(start, &salt, offset) else { return Ok(None) };
        if offset + ENVELOPE_BYTES as u64 + u64::from(envelope.payload_bytes) > self.end {
            return Ok(None);
        }
        let content = match envelope.kind {
            RecordKind::Fragment | RecordKind::Tombstone => {
                let header =
                    FragmentHeader::decode(start.get(ENVELOPE_BYTES..).unwrap_or_default()).ok();
                match header {
                    Some(header) if header.record_bytes() == envelope.payload_bytes as usize => {
                        self.fragment(&envelope, header)?
                    }
                    Some(_) | None => return Ok(None),
                }
            }
            RecordKind::Trash | RecordKind::Restore => match self.control(&envelope)? {
                Some(content) => content,
                None => return Ok(None),
            },
        };
        Ok(Some((envelope, content)))
    }

    fn fragment(&mut self, envelope: &Envelope, header: FragmentHeader) -> io::Result<Content> {
        if envelope.kind == RecordKind::Tombstone {
            return Ok(Content::Tombstone(header.id()));
        }
        let intact = match self.depth {
            Depth::Headers => true,
            Depth::Whole => {
                let payload = Bytes::copy_from_slice(self.payload(envelope)?);
                verify_record(payload, header.id()).is_ok()
            }
        };
        Ok(Content::Fragment { header, intact })
    }

    fn control(&mut self, envelope: &Envelope) -> io::Result<Option<Content>> {
        let payload = self.payload(envelope)?;
        if crc32c(payload) != envelope.payload_sum {
            return Ok(None);
        }
        let ids = decode_control(payload);
        Ok(ids.map(|ids| match envelope.kind {
            RecordKind::Restore => Content::Restore(ids),
            RecordKind::Trash | RecordKind::Fragment | RecordKind::Tombstone => Content::Trash(ids),
        }))
    }

    fn payload(&mut self, envelope: &Envelope) -> io::Result<&[u8]> {
        self.bytes(envelope.offset + ENVELOPE_BYTES as u64, envelope.payload_bytes as usize)
    }

    /// `bytes` at `offset`, fewer only where the file ends.
    fn bytes(&mut self, offset: u64, bytes: usize) -> io::Result<&[u8]> {
        let buffered = self.buffer_at..self.buffer_at + self.buffer.len() as u64;
        let end = (offset + bytes as u64).min(self.end);
        if !(buffered.contains(&offset) && end <= buffered.end) {
            let ahead = if self.small { READ_AHEAD } else { READ_HEADER };
            self.buffer = self.segment.read(offset, bytes.max(ahead))?;
            self.buffer_at = offset;
        }
        let start = (offset - self.buffer_at) as usize;
        let content = self.buffer.get(start..).unwrap_or_default();
        Ok(&content[..bytes.min(content.len())])
    }
}

/// Checks that `payload` is the whole, undamaged record of fragment `id`.
///
/// # Errors
/// [`FragmentError`] naming the first thing wrong.
pub fn verify_record(payload: Bytes, id: FragmentId) -> Result<FragmentRecord, FragmentError> {
    let record = FragmentRecord::decode(payload)?;
    if record.header.id() != id {
        let fragments = record.header.geometry().code().fragments();
        return Err(FragmentError::Index { index: record.header.id().index, fragments });
    }
    record.verify_body()?;
    Ok(record)
}
