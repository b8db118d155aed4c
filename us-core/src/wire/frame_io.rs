//! Moves frames over a byte stream. Both halves are polled by the one task that drives the
//! connection, so that reading and writing never wait for each other.
//!
//! A body is read straight into a buffer of its own size and written straight from the caller's
//! `Bytes`; only what shares a read with its header is copied. Small frames leave together, in one
//! vectored write.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::PollSemaphore;

use super::CloseCause;
use super::frame::{FRAME_BYTES_MAX, Frame, FrameError, HEADER_BYTES, Header, Side};

/// Headers, heads and small bodies are read in pieces of up to this size.
const READ_AHEAD_BYTES: usize = 64 << 10;
/// Slices of one vectored write.
const WRITE_SLICES_MAX: usize = 64;
/// Frames are taken from their channel until this many bytes wait to be written.
pub(super) const WRITE_QUEUE_BYTES: usize = 2 << 20;
/// Byte limits are counted in units of this size, because a semaphore counts to 2^32 at most.
const UNIT_BYTES: usize = 1 << 10;

/// A byte limit, as a semaphore. Every frame fits, however small the limit asked for.
pub(super) fn byte_limit(bytes_max: usize) -> Arc<Semaphore> {
    Arc::new(Semaphore::new(units(bytes_max.max(FRAME_BYTES_MAX)) as usize))
}

/// What `bytes` take of a byte limit.
pub(super) fn units(bytes: usize) -> u32 {
    bytes.div_ceil(UNIT_BYTES) as u32
}

/// What lets a received body stay in memory: dropped when it is consumed.
#[derive(Debug, Default)]
pub(super) struct Admitted {
    _own: Option<OwnedSemaphorePermit>,
    _shared: Option<OwnedSemaphorePermit>,
}

/// The limits that a body passes before it is read: the connection's, then the process's.
pub(super) struct Admission {
    own: PollSemaphore,
    shared: Option<PollSemaphore>,
    own_permit: Option<OwnedSemaphorePermit>,
}

impl Admission {
    pub(super) fn new(bytes_max: usize, shared: Option<Arc<Semaphore>>) -> Self {
        Self::of(byte_limit(bytes_max), shared)
    }

    /// With limits that are the connection's own, or its identity's.
    pub(super) fn of(own: Arc<Semaphore>, shared: Option<Arc<Semaphore>>) -> Self {
        Self {
            own: PollSemaphore::new(own),
            shared: shared.map(PollSemaphore::new),
            own_permit: None,
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>, bytes: usize) -> Poll<Admitted> {
        if bytes == 0 {
            return Poll::Ready(Admitted::default());
        }
        if self.own_permit.is_none() {
            self.own_permit = ready!(self.own.poll_acquire_many(cx, units(bytes)));
        }
        let shared = match &mut self.shared {
            Some(shared) => ready!(shared.poll_acquire_many(cx, units(bytes))),
            None => None,
        };
        Poll::Ready(Admitted { _own: self.own_permit.take(), _shared: shared })
    }
}

/// A frame that arrived.
pub(super) struct Received {
    pub(super) frame: Frame,
    pub(super) admitted: Admitted,
}

struct Partial {
    header: Header,
    head: BytesMut,
    body: BytesMut,
    admitted: Admitted,
}

/// The reading half.
pub(super) struct FrameReader {
    side: Side,
    ahead: BytesMut,
    partial: Option<Partial>,
    admission: Admission,
    read_bytes: u64,
}

impl FrameReader {
    pub(super) fn new(side: Side, admission: Admission) -> Self {
        Self { side, ahead: BytesMut::new(), partial: None, admission, read_bytes: 0 }
    }

    /// All bytes read so far.
    pub(super) fn read_bytes(&self) -> u64 {
        self.read_bytes
    }

    /// Whether a frame has begun and is not complete.
    pub(super) fn in_frame(&self) -> bool {
        self.partial.is_some() || !self.ahead.is_empty()
    }

    /// The next frame; `None` when the stream ended between two frames. Pending also while the
    /// next body has no room under the limits.
    pub(super) fn poll_next<IO: AsyncRead + Unpin>(
        &mut self,
        io: &mut IO,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Option<Received>, CloseCause>> {
        loop {
            if self.partial.is_some() {
                ready!(self.poll_body(io, cx))?;
                if let Some(Partial { header, head, body, admitted }) = self.partial.take() {
                    let frame = Frame::decode(&header, &head, body.freeze())?;
                    return Poll::Ready(Ok(Some(Received { frame, admitted })));
                }
            }
            if ready!(self.poll_header(cx))? {
                continue;
            }
            self.ahead.reserve(READ_AHEAD_BYTES);
            let read = ready!(pin!(io.read_buf(&mut self.ahead)).poll(cx))?;
            self.read_bytes += read as u64;
            if read == 0 {
                let whole = self.ahead.is_empty();
                return Poll::Ready(if whole {
                    Ok(None)
                } else {
                    Err(FrameError::Truncated.into())
                });
            }
        }
    }

    /// Begins a frame when its header and head are here; false when more must be read first.
    fn poll_header(&mut self, cx: &mut Context<'_>) -> Poll<Result<bool, CloseCause>> {
        let Some(header) = self.ahead.first_chunk::<HEADER_BYTES>() else {
            return Poll::Ready(Ok(false));
        };
        let header = Header::decode(header, self.side)?;
        let front = HEADER_BYTES + header.head_bytes as usize;
        if self.ahead.len() < front {
            return Poll::Ready(Ok(false));
        }
        let body_bytes = header.body_bytes as usize;
        let admitted = ready!(self.admission.poll(cx, body_bytes));
        self.ahead.advance(HEADER_BYTES);
        let head = self.ahead.split_to(header.head_bytes as usize);
        // A copy: a small body that shared the read buffer would keep all of it in memory.
        let mut body = BytesMut::with_capacity(body_bytes);
        let here = body_bytes.min(self.ahead.len());
        body.put_slice(&self.ahead[..here]);
        self.ahead.advance(here);
        self.partial = Some(Partial { header, head, body, admitted });
        Poll::Ready(Ok(true))
    }

    fn poll_body<IO: AsyncRead + Unpin>(
        &mut self,
        io: &mut IO,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), CloseCause>> {
        let Some(partial) = &mut self.partial else { return Poll::Ready(Ok(())) };
        loop {
            let missing = partial.header.body_bytes as usize - partial.body.len();
            if missing == 0 {
                return Poll::Ready(Ok(()));
            }
            let mut rest = (&mut partial.body).limit(missing);
            let read = ready!(pin!(io.read_buf(&mut rest)).poll(cx))?;
            self.read_bytes += read as u64;
            if read == 0 {
                return Poll::Ready(Err(FrameError::Truncated.into()));
            }
        }
    }
}

struct Chunk {
    bytes: Bytes,
    /// Dropped when the chunk is written.
    _guard: Option<OwnedSemaphorePermit>,
}

/// The writing half.
pub(super) struct FrameWriter {
    scratch: BytesMut,
    chunks: VecDeque<Chunk>,
    queued_bytes: usize,
    unflushed: bool,
    written_bytes: u64,
}

impl FrameWriter {
    pub(super) fn new() -> Self {
        Self {
            scratch: BytesMut::new(),
            chunks: VecDeque::new(),
            queued_bytes: 0,
            unflushed: false,
            written_bytes: 0,
        }
    }

    /// All bytes written so far.
    pub(super) fn written_bytes(&self) -> u64 {
        self.written_bytes
    }

    /// Whether everything is written and flushed.
    pub(super) fn is_idle(&self) -> bool {
        self.chunks.is_empty() && !self.unflushed
    }

    /// Whether further frames should be queued now.
    pub(super) fn has_room(&self) -> bool {
        self.queued_bytes < WRITE_QUEUE_BYTES
    }

    /// Queues a frame; `guard` is dropped when its body is written.
    pub(super) fn push(
        &mut self,
        frame: Frame,
        guard: Option<OwnedSemaphorePermit>,
    ) -> Result<(), FrameError> {
        let (front, body) = frame.encode(&mut self.scratch)?;
        self.queued_bytes += front.len() + body.len();
        if body.is_empty() {
            self.chunks.push_back(Chunk { bytes: front, _guard: guard });
        } else {
            self.chunks.push_back(Chunk { bytes: front, _guard: None });
            self.chunks.push_back(Chunk { bytes: body, _guard: guard });
        }
        Ok(())
    }

    /// Writes and flushes everything queued.
    pub(super) fn poll_write<IO: AsyncWrite + Unpin>(
        &mut self,
        io: &mut IO,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        while !self.chunks.is_empty() {
            let mut slices = [IoSlice::new(&[]); WRITE_SLICES_MAX];
            let count = self.chunks.len().min(WRITE_SLICES_MAX);
            for (slice, chunk) in slices.iter_mut().zip(&self.chunks) {
                *slice = IoSlice::new(&chunk.bytes);
            }
            let written = ready!(Pin::new(&mut *io).poll_write_vectored(cx, &slices[..count]))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.unflushed = true;
            self.take(written);
        }
        if self.unflushed {
            ready!(Pin::new(&mut *io).poll_flush(cx))?;
            self.unflushed = false;
        }
        Poll::Ready(Ok(()))
    }

    fn take(&mut self, mut written: usize) {
        self.written_bytes += written as u64;
        self.queued_bytes -= written;
        while let Some(first) = self.chunks.front_mut() {
            if written < first.bytes.len() {
                first.bytes.advance(written);
                return;
            }
            written -= first.bytes.len();
            self.chunks.pop_front();
        }
    }
}
