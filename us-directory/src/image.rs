//! Images of the state: a stream of key-value pairs that is stored as blocks of the swarm, or in a
//! backup file.
//!
//! ```text
//! header (32 bytes) | frame | frame | ... | end frame
//! header   0  magic "USIMAGE1"    8  first seq u64 (0: the whole state)   16  last seq u64
//!         24  zero u32           28  CRC-32C of bytes 0..28
//! frame    0  bytes of the body u32   4  CRC-32C of the body   8  body: as a journal record's
//! end      0  zero u32                4  CRC-32C of bytes 8..16   8  number of frames u64
//! ```
//! A run is a base (the whole state at `last seq`) or a delta (what commits `first..=last` left of
//! the keys they wrote). Reading refuses whatever is not whole. The [`job`] makes runs of a running
//! directory.

pub mod job;

use std::collections::BTreeMap;

use bytes::{Buf, Bytes, BytesMut};
use us_core::fragment::crc32c;

use crate::store::journal::{decode_body, encode_body};
use crate::store::{KeyRange, Seq, StoreError, View, WriteBatch};

const MAGIC: [u8; 8] = *b"USIMAGE1";
/// Bytes of a stream's header.
pub const HEADER_BYTES: usize = 32;
const FRAME_HEADER_BYTES: usize = 8;
/// Keys and values in one frame, about; at most this many keys.
const FRAME_BYTES: usize = 256 << 10;
const FRAME_KEYS_MAX: usize = 4096;
/// The longest frame that is read.
const FRAME_BYTES_MAX: usize = 64 << 20;

/// Why a stream cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the image is damaged or cut short: {detail}")]
pub struct ImageError {
    /// What is wrong.
    pub detail: &'static str,
}

/// What a run holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RunRange {
    /// The first commit; 0: the whole state.
    pub first_seq: Seq,
    /// The last commit.
    pub last_seq: Seq,
}

/// Makes the bytes of a stream.
#[derive(Debug)]
pub struct ImageWriter {
    out: BytesMut,
    frames: u64,
}

impl ImageWriter {
    /// A stream of this range, with its header.
    pub fn new(first_seq: Seq, last_seq: Seq) -> Self {
        let mut out = BytesMut::new();
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&first_seq.to_le_bytes());
        out.extend_from_slice(&last_seq.to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        let sum = crc32c(&out);
        out.extend_from_slice(&sum.to_le_bytes());
        Self { out, frames: 0 }
    }

    /// Adds a frame.
    pub fn push(&mut self, batch: &WriteBatch) {
        let body = encode_body(batch);
        self.out.extend_from_slice(&(body.len() as u32).to_le_bytes());
        self.out.extend_from_slice(&crc32c(&body).to_le_bytes());
        self.out.extend_from_slice(&body);
        self.frames += 1;
    }

    /// Ends the stream.
    pub fn finish(&mut self) {
        let frames = self.frames.to_le_bytes();
        self.out.extend_from_slice(&[0; 4]);
        self.out.extend_from_slice(&crc32c(&frames).to_le_bytes());
        self.out.extend_from_slice(&frames);
    }

    /// Takes `bytes` of what was made; nothing while there is less.
    pub fn take(&mut self, bytes: usize) -> Option<Bytes> {
        (self.out.len() >= bytes && bytes > 0).then(|| self.out.split_to(bytes).freeze())
    }

    /// Takes what is left.
    pub fn take_rest(&mut self) -> Bytes {
        std::mem::take(&mut self.out).freeze()
    }

    /// Writes the whole of `view` and the end, in pieces of `bytes`; stops when `sink` says `false`.
    ///
    /// # Errors
    /// [`StoreError`] when the view cannot be read.
    pub fn write_view(
        &mut self,
        view: &dyn View,
        bytes: usize,
        mut sink: impl FnMut(Bytes) -> bool,
    ) -> Result<(), StoreError> {
        let mut range = KeyRange { from: Bytes::new(), to: None };
        loop {
            let pairs = view.scan(&range, FRAME_KEYS_MAX)?;
            let Some((last, _)) = pairs.last() else { break };
            range = range.after(last);
            for frame in frames(pairs.into_iter().map(|(key, value)| (key, Some(value)))) {
                self.push(&frame);
                while let Some(piece) = self.take(bytes) {
                    if !sink(piece) {
                        return Ok(());
                    }
                }
            }
        }
        self.finish();
        while let Some(piece) = self.take(bytes) {
            if !sink(piece) {
                return Ok(());
            }
        }
        let rest = self.take_rest();
        if !rest.is_empty() {
            sink(rest);
        }
        Ok(())
    }

    /// Writes what a delta changed, and the end.
    pub fn write_changes(&mut self, changes: BTreeMap<Bytes, Option<Bytes>>) {
        frames(changes.into_iter()).for_each(|frame| self.push(&frame));
        self.finish();
    }
}

/// Batches of bounded size.
fn frames(
    writes: impl Iterator<Item = (Bytes, Option<Bytes>)>,
) -> impl Iterator<Item = WriteBatch> {
    let mut writes = writes.peekable();
    std::iter::from_fn(move || {
        writes.peek()?;
        let (mut batch, mut bytes) = (WriteBatch::new(), 0);
        while bytes < FRAME_BYTES && batch.len() < FRAME_KEYS_MAX {
            let Some((key, value)) = writes.next() else { break };
            bytes += key.len() + value.as_ref().map_or(0, Bytes::len);
            match value {
                Some(value) => batch.put(key, value),
                None => batch.delete(key),
            }
        }
        Some(batch)
    })
}

/// Reads a stream piece by piece.
#[derive(Debug, Default)]
pub struct ImageReader {
    input: BytesMut,
    range: Option<RunRange>,
    frames: u64,
    ended: bool,
}

impl ImageReader {
    /// A reader at the start of a stream.
    pub fn new() -> Self {
        Self::default()
    }

    /// What the run holds, once its header was read.
    pub fn range(&self) -> Option<RunRange> {
        self.range
    }

    /// Takes the next bytes and gives the batches that are whole now, in order.
    ///
    /// # Errors
    /// [`ImageError`].
    pub fn push(&mut self, bytes: &[u8]) -> Result<Vec<WriteBatch>, ImageError> {
        self.input.extend_from_slice(bytes);
        if self.range.is_none() && !self.read_header()? {
            return Ok(Vec::new());
        }
        let mut batches = Vec::new();
        while let Some(batch) = self.next_frame()? {
            batches.push(batch);
        }
        Ok(batches)
    }

    fn read_header(&mut self) -> Result<bool, ImageError> {
        if self.input.len() < HEADER_BYTES {
            return Ok(false);
        }
        let header = self.input.split_to(HEADER_BYTES);
        let sum = (&header[28..]).get_u32_le();
        if header[..8] != MAGIC || crc32c(&header[..28]) != sum {
            return Err(ImageError { detail: "its header does not hold" });
        }
        let mut numbers = &header[8..24];
        let (first_seq, last_seq) = (numbers.get_u64_le(), numbers.get_u64_le());
        self.range = Some(RunRange { first_seq, last_seq });
        Ok(true)
    }

    fn next_frame(&mut self) -> Result<Option<WriteBatch>, ImageError> {
        if self.ended {
            let behind = !self.input.is_empty();
            return if behind {
                Err(ImageError { detail: "bytes behind its end" })
            } else {
                Ok(None)
            };
        }
        if self.input.len() < FRAME_HEADER_BYTES {
            return Ok(None);
        }
        let mut header = &self.input[..FRAME_HEADER_BYTES];
        let (bytes, sum) = (header.get_u32_le() as usize, header.get_u32_le());
        if bytes > FRAME_BYTES_MAX {
            return Err(ImageError { detail: "a frame is too long" });
        }
        let body_bytes = if bytes == 0 { 8 } else { bytes };
        if self.input.len() < FRAME_HEADER_BYTES + body_bytes {
            return Ok(None);
        }
        self.input.advance(FRAME_HEADER_BYTES);
        let body = self.input.split_to(body_bytes).freeze();
        if crc32c(&body) != sum {
            return Err(ImageError { detail: "a frame's sum does not hold" });
        }
        if bytes == 0 {
            self.ended = true;
            if (&body[..]).get_u64_le() != self.frames {
                return Err(ImageError { detail: "frames are missing" });
            }
            return self.next_frame();
        }
        self.frames += 1;
        let batch = decode_body(&body).ok_or(ImageError { detail: "a frame makes no sense" })?;
        Ok(Some(batch))
    }

    /// The stream is over.
    ///
    /// # Errors
    /// [`ImageError`] when it ended early.
    pub fn end(&self) -> Result<RunRange, ImageError> {
        match self.range {
            Some(range) if self.ended && self.input.is_empty() => Ok(range),
            _ => Err(ImageError { detail: "it ends early" }),
        }
    }
}

#[cfg(test)]
mod tests;
