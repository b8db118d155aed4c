//! The client's end of a framed connection.
//!
//! One task drives the connection. A caller that finds it quiet writes its request to the socket
//! itself, which saves waking the task; else it hands the request over through a bounded channel.
//! Answers come through channels of the callers' own; when the connection ends, every one of them
//! learns why.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, Waker};

use futures::Stream;
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;
use us_proto::v1::{GetReply, GetRequest, PutReply, PutRequest};

use super::frame::{Frame, FrameError, HEADER_BYTES, Kind, Payload, Side, check_items, check_size};
use super::frame_io::{Admission, Admitted, FrameReader, FrameWriter, Received, byte_limit, units};
use super::watchdog::Watchdog;
use super::{BulkError, BulkLimits, CloseCause, ConnectError, dial};
use crate::tls::{ALPN_BULK, ExpectedPeer, Identity, PeerIdentity, client_config};

/// Requests between the callers and the connection's task.
const COMMANDS_MAX: usize = 64;

enum Command {
    Send { frame: Frame, waiter: Waiter, queued: Option<OwnedSemaphorePermit> },
    Cancel { request: u64 },
}

/// Who waits for the answer to a request. The permit bounds the requests under way: it is given back
/// when the peer has answered, not when the caller stops waiting.
enum Waiter {
    Put { reply: oneshot::Sender<PutReply>, _inflight: OwnedSemaphorePermit },
    Get { replies: mpsc::Sender<GetEvent>, missing: usize, _inflight: OwnedSemaphorePermit },
}

enum GetEvent {
    Reply { reply: GetReply, admitted: Admitted },
    End,
}

/// What the connection's task and the callers both see.
struct Status {
    /// Address and name of the peer, for errors.
    label: Arc<str>,
    inflight: Arc<Semaphore>,
    queued: Arc<Semaphore>,
    cause: OnceLock<Arc<CloseCause>>,
    closing: CancellationToken,
    closed: CancellationToken,
}

impl Status {
    /// From now on every new request fails with this cause (or with an earlier one).
    fn close(&self, cause: CloseCause) {
        // The cause must be there before anybody notices.
        self.cause.get_or_init(|| Arc::new(cause));
        self.inflight.close();
        self.queued.close();
        self.closed.cancel();
    }

    fn closed_error(&self) -> BulkError {
        let cause = self.cause.get().cloned().unwrap_or_else(|| Arc::new(CloseCause::Local));
        BulkError::Closed { peer: Arc::clone(&self.label), cause }
    }

    fn deadline_error(&self) -> BulkError {
        BulkError::Deadline { peer: Arc::clone(&self.label) }
    }
}

struct Shared {
    peer: PeerIdentity,
    commands: mpsc::Sender<Command>,
    direct: Arc<dyn Direct>,
    request_next: AtomicU64,
    status: Arc<Status>,
}

/// One framed connection to a provider. Requests travel on it in any number up to
/// [`BulkLimits::requests_inflight_max`] (further ones wait) and are answered in any order. It does
/// not connect again: whoever holds it looks at [`BulkClient::is_closed`] and makes another. Clones
/// share the connection, which ends with the last of them.
#[derive(Clone)]
pub struct BulkClient {
    shared: Arc<Shared>,
}

impl std::fmt::Debug for BulkClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("BulkClient").field(&self.shared.status.label).finish()
    }
}

impl BulkClient {
    /// Dials `address` ("host:port") and checks that `expected` answers.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub async fn connect(
        address: &str,
        identity: &Identity,
        expected: ExpectedPeer,
        limits: BulkLimits,
    ) -> Result<Self, ConnectError> {
        let config = client_config(identity, &[ALPN_BULK])
            .map_err(|source| ConnectError::Identity { address: address.to_owned(), source })?;
        let (stream, peer) = dial::dial_framed(address, config, expected).await?;
        Ok(Self::start(stream, peer, address, limits))
    }

    fn start<IO>(io: IO, peer: PeerIdentity, address: &str, limits: BulkLimits) -> Self
    where
        IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (commands, receiver) = mpsc::channel(COMMANDS_MAX);
        let status = Arc::new(Status {
            label: format!("{} at {address}", peer.name).into(),
            inflight: Arc::new(Semaphore::new(limits.requests_inflight_max)),
            queued: byte_limit(limits.queued_bytes_max),
            cause: OnceLock::new(),
            closing: CancellationToken::new(),
            closed: CancellationToken::new(),
        });
        let driver = Arc::new(Mutex::new(Some(Driver {
            io,
            reader: FrameReader::new(Side::Client, Admission::new(limits.received_bytes_max, None)),
            writer: FrameWriter::new(),
            watchdog: Watchdog::new(limits.progress_timeout),
            limits,
            commands: receiver,
            waiters: HashMap::new(),
            status: Arc::clone(&status),
            leaving: false,
            waker: None,
            fault: None,
        })));
        tokio::spawn(drive(Arc::clone(&driver), Arc::clone(&status)));
        let request_next = AtomicU64::new(1);
        let direct = driver;
        Self { shared: Arc::new(Shared { peer, commands, direct, request_next, status }) }
    }

    /// Who is at the other end.
    pub fn peer(&self) -> &PeerIdentity {
        &self.shared.peer
    }

    /// Whether the connection has ended, or its peer is going away: every new request fails.
    pub fn is_closed(&self) -> bool {
        self.shared.status.closed.is_cancelled()
    }

    /// Waits until [`BulkClient::is_closed`]; says why.
    pub async fn closed(&self) -> BulkError {
        self.shared.status.closed.cancelled().await;
        self.shared.status.closed_error()
    }

    /// Ends the connection; what is under way fails with [`CloseCause::Local`].
    pub fn close(&self) {
        self.shared.status.closing.cancel();
    }

    /// Stores a fragment; answers when the provider has it durably, or says why it has not.
    /// `put.request` is the caller's and comes back in the reply.
    ///
    /// # Errors
    /// [`BulkError`]. After [`BulkError::Closed`] or [`BulkError::Deadline`] the fragment may be
    /// stored or not; the same put may be repeated.
    pub async fn put(&self, put: PutRequest, deadline: Instant) -> Result<PutReply, BulkError> {
        let (request, body_bytes) = (put.request, put.record.len());
        check_size(HEADER_BYTES + put.grant.len(), body_bytes).map_err(BulkError::Request)?;
        let (reply, answer) = oneshot::channel();
        let answered = async {
            let _inflight = self.acquire(&self.shared.status.inflight, 1).await?;
            let queued = self.acquire(&self.shared.status.queued, units(body_bytes)).await?;
            let waiter = Waiter::Put { reply, _inflight };
            self.send(self.request_number(), Payload::Put(put), waiter, Some(queued)).await?;
            answer.await.map_err(|_| self.shared.status.closed_error())
        };
        let reply = timeout_at(deadline, answered)
            .await
            .map_err(|_| self.shared.status.deadline_error())??;
        Ok(PutReply { request, ..reply })
    }

    /// Reads fragments: one reply for each item, in any order, all before `deadline`. An item
    /// without reply failed at the provider. Dropping the replies cancels the rest.
    ///
    /// Replies that arrived and are not taken count against [`BulkLimits::received_bytes_max`], and
    /// at the limit nothing more is read for anybody on this connection: take them or drop them.
    ///
    /// # Errors
    /// [`BulkError`].
    pub async fn get(&self, get: GetRequest, deadline: Instant) -> Result<GetReplies, BulkError> {
        check_items(&get).map_err(BulkError::Request)?;
        let (caller_request, items) = (get.request, get.items.len());
        let request = self.request_number();
        // One reply for each item and the end: the connection's task never waits for a caller.
        let (replies, events) = mpsc::channel(items + 1);
        let sent = async {
            let _inflight = self.acquire(&self.shared.status.inflight, 1).await?;
            let waiter = Waiter::Get { replies, missing: items, _inflight };
            self.send(request, Payload::Get(get), waiter, None).await
        };
        timeout_at(deadline, sent).await.map_err(|_| self.shared.status.deadline_error())??;
        let shared = Arc::clone(&self.shared);
        Ok(GetReplies {
            shared,
            request,
            caller_request,
            deadline,
            events,
            missing: items,
            ended: false,
        })
    }

    fn request_number(&self) -> u64 {
        self.shared.request_next.fetch_add(1, Ordering::Relaxed)
    }

    async fn acquire(
        &self,
        limit: &Arc<Semaphore>,
        count: u32,
    ) -> Result<OwnedSemaphorePermit, BulkError> {
        // A semaphore is closed with the connection only.
        let permit = Arc::clone(limit).acquire_many_owned(count).await;
        permit.map_err(|_| self.shared.status.closed_error())
    }

    async fn send(
        &self,
        request: u64,
        payload: Payload,
        waiter: Waiter,
        queued: Option<OwnedSemaphorePermit>,
    ) -> Result<(), BulkError> {
        let frame = Frame { request, payload };
        let command = Command::Send { frame, waiter, queued };
        let Some(command) = self.shared.direct.send(command) else { return Ok(()) };
        let sent = self.shared.commands.send(command).await;
        sent.map_err(|_| self.shared.status.closed_error())
    }
}

/// A framed connection over a stream without TLS.
#[doc(hidden)]
pub fn connect_plain<IO>(io: IO, peer: PeerIdentity, limits: BulkLimits) -> BulkClient
where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    BulkClient::start(io, peer, "a plain stream", limits)
}

/// As [`BulkClient::connect`], without TLS: whoever answers is taken for `peer`.
///
/// # Errors
/// [`ConnectError::Tcp`], [`ConnectError::Timeout`].
#[doc(hidden)]
pub async fn dial_plain(
    address: &str,
    peer: PeerIdentity,
    limits: BulkLimits,
) -> Result<BulkClient, ConnectError> {
    Ok(BulkClient::start(dial::dial_tcp(address).await?, peer, address, limits))
}

/// The replies of one get, as they arrive.
pub struct GetReplies {
    shared: Arc<Shared>,
    request: u64,
    caller_request: u64,
    deadline: Instant,
    events: mpsc::Receiver<GetEvent>,
    /// Replies that have not come.
    missing: usize,
    ended: bool,
}

impl std::fmt::Debug for GetReplies {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GetReplies").field("request", &self.caller_request).finish()
    }
}

impl GetReplies {
    /// The next reply; `None` after the last. Nothing follows an error. Cancel-safe.
    pub async fn next(&mut self) -> Option<Result<GetReply, BulkError>> {
        if self.ended {
            return None;
        }
        match timeout_at(self.deadline, self.events.recv()).await {
            Ok(Some(GetEvent::Reply { reply, admitted })) => {
                // From here on the bytes are the caller's.
                drop(admitted);
                self.missing -= 1;
                Some(Ok(GetReply { request: self.caller_request, ..reply }))
            }
            Ok(Some(GetEvent::End)) => {
                self.ended = true;
                None
            }
            Ok(None) => {
                self.ended = true;
                Some(Err(self.shared.status.closed_error()))
            }
            Err(_) => {
                self.cancel();
                Some(Err(self.shared.status.deadline_error()))
            }
        }
    }

    /// All replies.
    ///
    /// # Errors
    /// The first [`BulkError`].
    pub async fn all(mut self) -> Result<Vec<GetReply>, BulkError> {
        let mut replies = Vec::new();
        while let Some(reply) = self.next().await {
            replies.push(reply?);
        }
        Ok(replies)
    }

    /// The replies as a stream.
    pub fn into_stream(self) -> impl Stream<Item = Result<GetReply, BulkError>> + Send {
        futures::stream::unfold(self, |mut replies| async move {
            let reply = replies.next().await?;
            Some((reply, replies))
        })
    }

    fn cancel(&mut self) {
        if !std::mem::replace(&mut self.ended, true) && self.missing > 0 {
            // With a full channel the peer is not told; its replies are then dropped as they come.
            let _ = self.shared.commands.try_send(Command::Cancel { request: self.request });
        }
        self.events.close();
        while self.events.try_recv().is_ok() {}
    }
}

impl Drop for GetReplies {
    fn drop(&mut self) {
        self.cancel();
    }
}

/// The way past the channel.
trait Direct: Send + Sync {
    /// Writes the request to a quiet connection; gives it back where the connection has other work,
    /// or is over.
    fn send(&self, command: Command) -> Option<Command>;
}

impl<IO: AsyncRead + AsyncWrite + Unpin + Send> Direct for Mutex<Option<Driver<IO>>> {
    fn send(&self, command: Command) -> Option<Command> {
        match self.try_lock().as_mut().and_then(|driver| driver.as_mut()) {
            Some(driver) => driver.send_directly(command),
            None => Some(command),
        }
    }
}

struct Driver<IO> {
    io: IO,
    reader: FrameReader,
    writer: FrameWriter,
    watchdog: Watchdog,
    limits: BulkLimits,
    commands: mpsc::Receiver<Command>,
    waiters: HashMap<u64, Waiter>,
    status: Arc<Status>,
    /// The peer said goodbye: it still answers what it has, and gets nothing new.
    leaving: bool,
    /// Wakes the task; `None` before it ran.
    waker: Option<Waker>,
    /// Why the task must end the connection: found by a caller that wrote itself.
    fault: Option<CloseCause>,
}

/// The connection's task. Its lock is held by others for as long as they write one request.
async fn drive<IO>(driver: Arc<Mutex<Option<Driver<IO>>>>, status: Arc<Status>)
where
    IO: AsyncRead + AsyncWrite + Unpin + Send,
{
    let poll = |cx: &mut Context<'_>| match driver.lock().as_mut() {
        Some(driver) => driver.poll(cx),
        None => Poll::Ready(CloseCause::Local),
    };
    let cause = tokio::select! {
        // Cancel-safe: dropped only when the connection is to end.
        cause = std::future::poll_fn(poll) => cause,
        // Cancel-safe: a token stays cancelled.
        () = status.closing.cancelled() => CloseCause::Local,
    };
    status.close(cause);
    let ended = driver.lock().take();
    let Some(Driver { mut io, waiters, commands, .. }) = ended else { return };
    // Whoever still waits learns it by losing the other end of its channel.
    drop((waiters, commands));
    // The connection is over in any case.
    let _ = tokio::time::timeout(dial::CLOSE_TIMEOUT, io.shutdown()).await;
}

impl<IO: AsyncRead + AsyncWrite + Unpin> Driver<IO> {
    fn send_directly(&mut self, command: Command) -> Option<Command> {
        let quiet = self.writer.is_idle() && self.commands.is_empty() && !self.leaving;
        let Some(waker) = self.waker.clone().filter(|_| quiet && self.fault.is_none()) else {
            return Some(command);
        };
        if !self.watchdog.begin() {
            return Some(command);
        }
        // What does not fit is written by the task: its waker is the one that waits for room.
        let written = self
            .obey(command)
            .map(|()| self.writer.poll_write(&mut self.io, &mut Context::from_waker(&waker)));
        let fault = match written {
            Ok(Poll::Ready(Ok(())) | Poll::Pending) => None,
            Ok(Poll::Ready(Err(error))) => Some(error.into()),
            Err(cause) => Some(cause),
        };
        if fault.is_some() {
            self.fault = fault;
            waker.wake();
        }
        None
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<CloseCause> {
        if let Some(cause) = self.fault.take() {
            return Poll::Ready(cause);
        }
        if !self.waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            self.waker = Some(cx.waker().clone());
        }
        let before = self.reader.read_bytes() + self.writer.written_bytes();
        loop {
            match self.step(cx) {
                Ok(true) => {}
                Ok(false) => break,
                Err(cause) => return Poll::Ready(cause),
            }
        }
        if self.leaving && self.waiters.is_empty() {
            return Poll::Ready(CloseCause::PeerClosed);
        }
        let busy = !self.waiters.is_empty() || !self.writer.is_idle() || self.reader.in_frame();
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
        let mut drained = self.leaving;
        while self.writer.has_room() && !drained {
            match self.commands.poll_recv(cx) {
                Poll::Ready(Some(command)) => self.obey(command)?,
                Poll::Ready(None) => return Err(CloseCause::Local),
                Poll::Pending => drained = true,
            }
        }
        let wrote = match self.writer.poll_write(&mut self.io, cx) {
            Poll::Ready(written) => written.map(|()| true)?,
            Poll::Pending => false,
        };
        match self.reader.poll_next(&mut self.io, cx)? {
            Poll::Ready(Some(received)) => {
                self.deliver(received)?;
                return Ok(true);
            }
            Poll::Ready(None) => return Err(CloseCause::PeerClosed),
            Poll::Pending => {}
        }
        // With room again, the commands must be polled until they will wake this task.
        Ok(wrote && !drained)
    }

    fn obey(&mut self, command: Command) -> Result<(), CloseCause> {
        match command {
            Command::Send { frame, waiter, queued } => {
                self.waiters.insert(frame.request, waiter);
                self.writer.push(frame, queued)?;
            }
            Command::Cancel { request } => {
                if self.waiters.contains_key(&request) {
                    self.writer.push(Frame { request, payload: Payload::Cancel }, None)?;
                }
            }
        }
        Ok(())
    }

    fn deliver(&mut self, received: Received) -> Result<(), CloseCause> {
        let Received { frame: Frame { request, payload }, admitted } = received;
        match payload {
            Payload::PutReply(answer) => match self.waiters.remove(&request) {
                // A caller past its deadline is not there any more.
                Some(Waiter::Put { reply, .. }) => drop(reply.send(answer)),
                Some(Waiter::Get { .. }) | None => return Err(unasked(Kind::PutReply, request)),
            },
            Payload::GetReply(reply) => match self.waiters.get_mut(&request) {
                Some(Waiter::Get { replies, missing: missing @ 1.., .. }) => {
                    *missing -= 1;
                    // Refused only where the caller is gone: there is room for every reply.
                    let _ = replies.try_send(GetEvent::Reply { reply, admitted });
                }
                Some(_) | None => return Err(unasked(Kind::GetReply, request)),
            },
            Payload::GetEnd => match self.waiters.remove(&request) {
                Some(Waiter::Get { replies, .. }) => drop(replies.try_send(GetEvent::End)),
                Some(Waiter::Put { .. }) | None => return Err(unasked(Kind::GetEnd, request)),
            },
            Payload::Goodbye(detail) => {
                self.status.close(CloseCause::PeerGoodbye { detail });
                self.leaving = true;
                // What was not sent yet fails now.
                self.commands.close();
                while self.commands.try_recv().is_ok() {}
            }
            Payload::Error(detail) => return Err(CloseCause::PeerRefused { detail }),
            Payload::Put(_) => return Err(unasked(Kind::Put, request)),
            Payload::Get(_) => return Err(unasked(Kind::Get, request)),
            Payload::Cancel => return Err(unasked(Kind::Cancel, request)),
        }
        Ok(())
    }
}

fn unasked(kind: Kind, request: u64) -> CloseCause {
    CloseCause::Frame(FrameError::Unasked { kind, request })
}
