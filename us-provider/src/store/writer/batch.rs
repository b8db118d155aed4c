//! What is made durable by one fdatasync.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, IoSlice};

use bytes::Bytes;
use tokio::sync::OwnedSemaphorePermit;
use us_core::ids::FragmentId;

use super::{Reply, StoreError};
use crate::store::format::{ALIGN, ENVELOPE_BYTES, Envelope};
use crate::store::index::{Entry, Staged};

/// Slices the system takes in one call (IOV_MAX), three a record.
const SLICES_MAX: usize = 1024 / 3 * 3;

static ZEROS: [u8; ALIGN as usize] = [0; ALIGN as usize];

/// One record to append.
#[derive(Debug)]
struct Piece {
    envelope: [u8; ENVELOPE_BYTES],
    payload: Bytes,
    padding: usize,
}

/// Records are large from here on, on the average of a batch.
const BULK_RECORD_BYTES: u64 = 512 << 10;

/// Tells its waiter what became of the batch.
type Waiter = Box<dyn FnOnce(Result<(), StoreError>) + Send>;

/// Records, their effects, and who waits for them.
#[derive(Default)]
pub(in crate::store) struct Batch {
    pieces: Vec<Piece>,
    bytes: u64,
    fragments: HashMap<FragmentId, usize>,
    staged: Staged,
    waiters: Vec<Waiter>,
    superseded: Vec<Entry>,
    /// Bytes that may be written, as of the batch's first put.
    free_bytes: Option<u64>,
}

impl Batch {
    /// Bytes to append.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether it is mostly large records.
    pub fn is_bulk(&self) -> bool {
        self.bytes >= BULK_RECORD_BYTES * self.pieces.len().max(1) as u64
    }

    /// Whether there is nothing to make durable or visible.
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty() && self.staged.is_empty()
    }

    /// Bytes that may still be appended; `measure` is asked once a batch.
    pub fn free_bytes(&mut self, measure: impl FnOnce() -> u64) -> u64 {
        self.free_bytes.get_or_insert_with(measure).saturating_sub(self.bytes)
    }

    /// The effects so far.
    pub fn staged(&mut self) -> &mut Staged {
        &mut self.staged
    }

    /// The effects, to be applied.
    pub fn take_staged(&mut self) -> Staged {
        std::mem::take(&mut self.staged)
    }

    /// Appends a record.
    pub fn push(&mut self, envelope: &Envelope, payload: Bytes) {
        let padding = envelope.padded_bytes() as usize - ENVELOPE_BYTES - payload.len();
        self.bytes += envelope.padded_bytes();
        self.pieces.push(Piece { envelope: envelope.encode(), payload, padding });
    }

    /// As [`Batch::push`], of a fragment.
    pub fn push_fragment(&mut self, id: FragmentId, envelope: &Envelope, payload: Bytes) {
        self.fragments.insert(id, self.pieces.len());
        self.push(envelope, payload);
    }

    /// The record of a fragment that this batch appends.
    pub fn payload_of(&self, id: FragmentId) -> Option<&Bytes> {
        let piece = self.fragments.get(&id)?;
        Some(&self.pieces[*piece].payload)
    }

    /// This record no longer counts once the batch is durable.
    pub fn supersede(&mut self, entry: Entry) {
        self.superseded.push(entry);
    }

    /// The records that no longer count.
    pub fn take_superseded(&mut self) -> Vec<Entry> {
        std::mem::take(&mut self.superseded)
    }

    /// `reply` gets `value` when the batch is durable, its error when it is not. The permit is kept
    /// until then.
    pub fn wait<T: Send + 'static>(
        &mut self,
        reply: Reply<T>,
        value: T,
        permit: Option<OwnedSemaphorePermit>,
    ) {
        self.waiters.push(Box::new(move |result| {
            drop(permit);
            // Whoever no longer waits does not want to know.
            let _ = reply.send(result.map(|()| value));
        }));
    }

    /// Tells everybody who waits.
    pub fn answer(self, result: Result<(), StoreError>) {
        drop(self.pieces);
        for waiter in self.waiters {
            waiter(result.clone());
        }
    }

    /// Writes the records at `offset`, in few large writes.
    ///
    /// # Errors
    /// Any I/O error; some of the records may be written then.
    pub fn write_to(&self, file: &File, mut offset: u64) -> io::Result<()> {
        let mut slices = Vec::with_capacity(SLICES_MAX.min(self.pieces.len() * 3));
        for pieces in self.pieces.chunks(SLICES_MAX / 3) {
            slices.clear();
            for piece in pieces {
                slices.push(IoSlice::new(&piece.envelope));
                slices.push(IoSlice::new(&piece.payload));
                slices.push(IoSlice::new(&ZEROS[..piece.padding]));
            }
            offset += write_slices(file, &mut slices, offset)?;
        }
        Ok(())
    }
}

fn write_slices(file: &File, mut slices: &mut [IoSlice<'_>], offset: u64) -> io::Result<u64> {
    let mut written = 0;
    IoSlice::advance_slices(&mut slices, 0);
    while !slices.is_empty() {
        match rustix::io::pwritev(file, slices, offset + written) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(bytes) => {
                written += bytes as u64;
                IoSlice::advance_slices(&mut slices, bytes);
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(written)
}
