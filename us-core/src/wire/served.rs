//! One framed connection, as the server sees it.
//!
//! One task owns the connection and reads, writes and starts requests. What the service has at hand
//! it answers itself; every other request runs in a task of its own and hands its replies back through
//! a bounded channel.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::StreamExt;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::task::JoinSet;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use us_proto::v1::{GetRequest, PutRequest};

use super::frame::{Frame, FrameError, Kind, Payload, Side};
use super::frame_io::{Admission, Admitted, FrameReader, FrameWriter, Received, byte_limit, units};
use super::shares::Share;
use super::watchdog::Watchdog;
use super::{BulkLimits, BulkService, CloseCause};
use crate::tls::PeerIdentity;

/// Replies between the requests' tasks and the connection's.
const REPLIES_MAX: usize = 64;
/// How long a peer that broke the protocol is given to read why.
const FAREWELL_TIMEOUT: Duration = Duration::from_secs(1);

struct Reply {
    frame: Frame,
    guard: Option<OwnedSemaphorePermit>,
}

/// Where a request's task puts its replies.
#[derive(Clone)]
struct Outbox {
    replies: mpsc::Sender<Reply>,
    queued: Arc<Semaphore>,
}

impl Outbox {
    /// Waits until the reply has room. False when the connection is gone.
    async fn send(&self, request: u64, payload: Payload) -> bool {
        let frame = Frame { request, payload };
        let body_bytes = frame.body_bytes();
        let guard = if body_bytes == 0 {
            None
        } else {
            match Arc::clone(&self.queued).acquire_many_owned(units(body_bytes)).await {
                Ok(guard) => Some(guard),
                Err(_) => return false,
            }
        };
        self.replies.send(Reply { frame, guard }).await.is_ok()
    }
}

/// What a request's task leaves: the number of a get, for which a cancel may still come.
type Finished = Option<u64>;

struct Served<S, IO> {
    service: Arc<S>,
    peer: Arc<PeerIdentity>,
    io: IO,
    reader: FrameReader,
    writer: FrameWriter,
    watchdog: Watchdog,
    limits: BulkLimits,
    outbox: Outbox,
    replies: mpsc::Receiver<Reply>,
    gets: Arc<Semaphore>,
    cancels: HashMap<u64, oneshot::Sender<()>>,
    tasks: JoinSet<Finished>,
    shutdown: Pin<Box<WaitForCancellationFutureOwned>>,
    draining: bool,
}

/// Serves frames until the connection ends, and says why it did. After `shutdown` no request is
/// read; what is under way is answered.
pub(super) async fn serve_frames<S: BulkService, IO: AsyncRead + AsyncWrite + Unpin>(
    service: Arc<S>,
    peer: Arc<PeerIdentity>,
    io: IO,
    limits: BulkLimits,
    share: &Share,
    received: Arc<Semaphore>,
    shutdown: CancellationToken,
) -> CloseCause {
    let (sender, replies) = mpsc::channel(REPLIES_MAX);
    let admission = Admission::of(Arc::clone(&share.received), Some(received));
    let mut served = Served {
        service,
        peer,
        io,
        reader: FrameReader::new(Side::Server, admission),
        writer: FrameWriter::new(),
        watchdog: Watchdog::new(limits.progress_timeout),
        limits,
        outbox: Outbox { replies: sender, queued: Arc::clone(&share.queued) },
        replies,
        gets: Arc::clone(&share.gets),
        cancels: HashMap::new(),
        tasks: JoinSet::new(),
        shutdown: Box::pin(shutdown.cancelled_owned()),
        draining: false,
    };
    let cause = std::future::poll_fn(|cx| served.poll(cx)).await;
    served.farewell(&cause).await;
    cause
}

/// [`serve_frames`] without TLS, for a peer of the caller's invention.
#[doc(hidden)]
pub async fn serve_plain<S: BulkService, IO: AsyncRead + AsyncWrite + Unpin>(
    service: Arc<S>,
    peer: PeerIdentity,
    io: IO,
    limits: BulkLimits,
    shutdown: CancellationToken,
) -> CloseCause {
    let received = byte_limit(limits.received_bytes_max);
    let share = Share::alone(&limits);
    serve_frames(service, Arc::new(peer), io, limits, &share, received, shutdown).await
}

impl<S: BulkService, IO: AsyncRead + AsyncWrite + Unpin> Served<S, IO> {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<CloseCause> {
        let before = self.reader.read_bytes() + self.writer.written_bytes();
        if !self.draining && self.shutdown.as_mut().poll(cx).is_ready() {
            self.draining = true;
            let goodbye = Payload::Goodbye("shutting down".to_owned());
            if let Err(error) = self.writer.push(Frame { request: 0, payload: goodbye }, None) {
                return Poll::Ready(error.into());
            }
        }
        loop {
            match self.step(cx) {
                Ok(true) => {}
                Ok(false) => break,
                Err(cause) => return Poll::Ready(cause),
            }
        }
        if self.draining && self.tasks.is_empty() && self.writer.is_idle() {
            return Poll::Ready(CloseCause::Local);
        }
        // A frame that waits for the service to consume earlier ones is not the peer's silence.
        let receiving = self.reader.in_frame() && self.tasks.is_empty();
        let busy = !self.writer.is_idle() || receiving;
        let progress = self.reader.read_bytes() + self.writer.written_bytes() != before;
        match self.watchdog.poll(cx, busy, progress) {
            Poll::Ready(()) => {
                Poll::Ready(CloseCause::Silent { silence: self.limits.progress_timeout })
            }
            Poll::Pending => Poll::Pending,
        }
    }

    /// One round of everything; false when every source is pending.
    fn step(&mut self, cx: &mut Context<'_>) -> Result<bool, CloseCause> {
        while let Poll::Ready(Some(finished)) = self.tasks.poll_join_next(cx) {
            match finished {
                Ok(get) => {
                    get.and_then(|request| self.cancels.remove(&request));
                }
                Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
                Err(_) => {}
            }
        }
        let mut drained = false;
        while self.writer.has_room() && !drained {
            match self.replies.poll_recv(cx) {
                Poll::Ready(Some(reply)) => self.writer.push(reply.frame, reply.guard)?,
                // It never ends: this side holds a sender.
                Poll::Ready(None) | Poll::Pending => drained = true,
            }
        }
        let wrote = match self.writer.poll_write(&mut self.io, cx) {
            Poll::Ready(written) => written.map(|()| true)?,
            Poll::Pending => false,
        };
        if !self.draining && self.tasks.len() < self.limits.requests_inflight_max {
            match self.reader.poll_next(&mut self.io, cx)? {
                Poll::Ready(Some(received)) => {
                    self.accept(received)?;
                    return Ok(true);
                }
                Poll::Ready(None) => return Err(CloseCause::PeerClosed),
                Poll::Pending => {}
            }
        }
        // With room again, the replies must be polled until they will wake this task.
        Ok(wrote && !drained)
    }

    fn accept(&mut self, received: Received) -> Result<(), CloseCause> {
        let Received { frame: Frame { request, payload }, admitted } = received;
        let (service, peer) = (Arc::clone(&self.service), Arc::clone(&self.peer));
        let outbox = self.outbox.clone();
        match payload {
            Payload::Put(put) => {
                self.tasks.spawn(serve_put(service, peer, outbox, put, admitted));
            }
            Payload::Get(get) => {
                if self.answer_now(request, &get)? {
                    return Ok(());
                }
                let (cancel, cancelled) = oneshot::channel();
                if self.cancels.insert(request, cancel).is_some() {
                    return Err(FrameError::Duplicate { request }.into());
                }
                let turns = Arc::clone(&self.gets);
                self.tasks.spawn(serve_get(service, peer, outbox, get, turns, cancelled));
            }
            Payload::Cancel => {
                // Of one that just ended: there is nothing to do.
                self.cancels.remove(&request);
            }
            Payload::Error(detail) => return Err(CloseCause::PeerRefused { detail }),
            Payload::PutReply(_) => return Err(out_of_place(Kind::PutReply)),
            Payload::GetReply(_) => return Err(out_of_place(Kind::GetReply)),
            Payload::GetEnd => return Err(out_of_place(Kind::GetEnd)),
            Payload::Goodbye(_) => return Err(out_of_place(Kind::Goodbye)),
        }
        Ok(())
    }

    /// Answers a get whose replies are at hand and have room; false where a task must.
    fn answer_now(&mut self, request: u64, get: &GetRequest) -> Result<bool, CloseCause> {
        if self.cancels.contains_key(&request) || !self.writer.has_room() {
            return Ok(false);
        }
        let Some(replies) = self.service.get_now(&self.peer, get) else { return Ok(false) };
        let bytes = replies.iter().map(|reply| reply.data.len()).sum();
        let queued = Arc::clone(&self.outbox.queued);
        let Ok(guard) = queued.try_acquire_many_owned(units(bytes)) else { return Ok(false) };
        let mut frames: Vec<Payload> = replies.into_iter().map(Payload::GetReply).collect();
        frames.push(Payload::GetEnd);
        let mut guard = Some(guard);
        // The bytes are given back with the last of them.
        let last = frames.len().saturating_sub(2);
        for (at, payload) in frames.into_iter().enumerate() {
            let guard = if at == last { guard.take() } else { None };
            self.writer.push(Frame { request, payload }, guard)?;
        }
        Ok(true)
    }

    /// Tells a peer that broke the protocol so, if it reads, and closes.
    async fn farewell(mut self, cause: &CloseCause) {
        let closing = async {
            if let CloseCause::Frame(error) = cause {
                let payload = Payload::Error(error.to_string());
                if self.writer.push(Frame { request: 0, payload }, None).is_ok() {
                    let Self { writer, io, .. } = &mut self;
                    std::future::poll_fn(|cx| writer.poll_write(io, cx)).await?;
                }
            }
            self.io.shutdown().await
        };
        // The connection is over in any case; its cause is what is reported.
        let _ = tokio::time::timeout(FAREWELL_TIMEOUT, closing).await;
    }
}

fn out_of_place(kind: Kind) -> CloseCause {
    CloseCause::Frame(FrameError::OutOfPlace { kind, body_bytes: 0 })
}

async fn serve_put<S: BulkService>(
    service: Arc<S>,
    peer: Arc<PeerIdentity>,
    outbox: Outbox,
    put: PutRequest,
    admitted: Admitted,
) -> Finished {
    let request = put.request;
    let reply = service.put(&peer, put).await;
    drop(admitted);
    outbox.send(request, Payload::PutReply(reply)).await;
    None
}

async fn serve_get<S: BulkService>(
    service: Arc<S>,
    peer: Arc<PeerIdentity>,
    outbox: Outbox,
    get: GetRequest,
    turns: Arc<Semaphore>,
    cancelled: oneshot::Receiver<()>,
) -> Finished {
    let request = get.request;
    let answer = async {
        let Ok(_turn) = turns.acquire().await else { return };
        let mut replies = service.get(&peer, get);
        while let Some(reply) = replies.next().await {
            if !outbox.send(request, Payload::GetReply(reply)).await {
                return;
            }
        }
    };
    tokio::select! {
        // Cancel-safe: dropped only when nobody wants the answer; a reply is sent whole or not at
        // all.
        () = answer => {}
        // Cancel-safe: a oneshot loses nothing; it ends when the connection drops the sender.
        _ = cancelled => {}
    }
    outbox.send(request, Payload::GetEnd).await;
    Some(request)
}
