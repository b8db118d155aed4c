//! TLS 1.3 records (RFC 8446, section 5) of a connection whose handshake rustls has done: sealed from
//! the caller's bytes in one pass, opened into the caller's buffer.
//!
//! ```text
//! read    socket -> incoming -> opened into the caller's buffer
//! write   the caller's slices -> outgoing, sealed in place -> socket
//! ```
//! On the wire it is TLS as anybody speaks it. rustls' own record layer copies each byte twice more on
//! its way in and allocates every record on its way out, which on whole fragments cost more than the
//! cipher (docs/performance.md, "What TLS costs"). Secrets come from rustls and are updated by it.
//!
//! Invariants:
//! - no byte leaves [`Records`] that was not authenticated, in its order; the first record that is
//!   wrong ends the connection;
//! - a nonce is used once: sequence numbers only grow, and keys are updated long before their limit;
//! - what a peer can make it hold is one buffer of [`BUFFER_BYTES`] each way; of records that bring it
//!   nothing there are few in a row;
//! - one task polls both ways: reading does not write, and the answer to a key update leaves with what is
//!   written next, as the RFC asks.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use aws_lc_rs::aead::{
    AES_128_GCM, AES_256_GCM, Aad, Algorithm, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce,
    UnboundKey,
};
use rustls::kernel::KernelConnection;
use rustls::{AlertDescription, ConnectionTrafficSecrets, ExtractedSecrets};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Read and written ahead of the caller.
pub(super) const BUFFER_BYTES: usize = 256 << 10;
/// Plaintext of a record.
const PLAIN_BYTES_MAX: usize = 1 << 14;
const HEADER_BYTES: usize = 5;
const TAG_BYTES: usize = 16;
/// Of a record behind its header.
const SEALED_BYTES_MAX: usize = PLAIN_BYTES_MAX + 256;
/// A whole record at most.
pub(super) const RECORD_BYTES_MAX: usize = HEADER_BYTES + SEALED_BYTES_MAX;
/// Records in a row that bring no data: key updates, tickets, empty ones.
const IDLE_RECORDS_MAX: u32 = 32;
/// Records sealed under one key; AES-GCM allows 2^24.5 of this size (RFC 8446, section 5.5).
const RECORDS_A_KEY: u64 = 1 << 23;

const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;
const DATA: u8 = 23;
const NEW_SESSION_TICKET: u8 = 4;
const KEY_UPDATE: u8 = 24;
const CLOSE_NOTIFY: [u8; 2] = [1, 0];
const FATAL: u8 = 2;
const USER_CANCELED: u8 = 90;

/// What is wrong with a record.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RecordError {
    /// Its header says so many bytes.
    #[error("a TLS record of {0} bytes")]
    Length(usize),
    /// This has no place here.
    #[error("a TLS record of type {0} where it has no place")]
    Kind(u8),
    /// It was not sealed by the peer, or not in this order.
    #[error("a TLS record that the peer did not seal")]
    Seal,
    /// A message inside that makes no sense.
    #[error("a TLS message that makes no sense: {0}")]
    Message(&'static str),
    /// Nothing but records without data.
    #[error("{IDLE_RECORDS_MAX} TLS records in a row without data")]
    Idle,
    /// The peer ends the connection with an alert.
    #[error("the peer ended TLS: {0:?}")]
    Alert(AlertDescription),
}

impl RecordError {
    /// What the peer is told; `None` where it told this side.
    fn alert(&self) -> Option<AlertDescription> {
        match self {
            Self::Length(_) => Some(AlertDescription::RecordOverflow),
            Self::Kind(_) | Self::Idle => Some(AlertDescription::UnexpectedMessage),
            Self::Seal => Some(AlertDescription::BadRecordMac),
            Self::Message(_) => Some(AlertDescription::DecodeError),
            Self::Alert(_) => None,
        }
    }
}

impl From<RecordError> for io::Error {
    fn from(error: RecordError) -> Self {
        match error {
            // As rustls says it, so that callers see one kind.
            RecordError::Alert(alert) => {
                Self::new(io::ErrorKind::InvalidData, rustls::Error::AlertReceived(alert))
            }
            error => Self::new(io::ErrorKind::InvalidData, error),
        }
    }
}

/// What an opened record holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Inner {
    /// So many bytes of data, from its beginning.
    Data(usize),
    /// The peer seals with its next key from now on, and may want the same of this side.
    KeyUpdate { wanted: bool },
    /// The peer sends no more.
    Closed,
    /// What needs no answer.
    Nothing,
}

/// The bytes behind a record's header; `None` while the header is not complete.
///
/// # Errors
/// [`RecordError`].
pub(super) fn sealed_bytes(front: &[u8]) -> Result<Option<usize>, RecordError> {
    let Some([kind, _, _, high, low]) = front.first_chunk::<HEADER_BYTES>() else {
        return Ok(None);
    };
    let bytes = usize::from(u16::from_be_bytes([*high, *low]));
    // Plaintext records end with the handshake.
    if *kind != DATA {
        return Err(RecordError::Kind(*kind));
    }
    if !(TAG_BYTES + 1..=SEALED_BYTES_MAX).contains(&bytes) {
        return Err(RecordError::Length(bytes));
    }
    Ok(Some(bytes))
}

/// Looks into an opened record: the type is its last byte that is not zero.
///
/// # Errors
/// [`RecordError`].
pub(super) fn inner(opened: &[u8]) -> Result<Inner, RecordError> {
    let Some(end) = opened.iter().rposition(|byte| *byte != 0) else {
        return Err(RecordError::Message("it has no type"));
    };
    let (kind, plain) = (opened[end], &opened[..end]);
    match kind {
        _ if plain.len() > PLAIN_BYTES_MAX => Err(RecordError::Length(plain.len())),
        DATA => Ok(Inner::Data(end)),
        ALERT => match plain {
            [_, 0] => Ok(Inner::Closed),
            [_, USER_CANCELED] => Ok(Inner::Nothing),
            [_, alert] => Err(RecordError::Alert(AlertDescription::from(*alert))),
            _ => Err(RecordError::Message("an alert")),
        },
        HANDSHAKE => after_handshake(plain),
        _ => Err(RecordError::Kind(kind)),
    }
}

/// Everything that is said of a record's header and of what an opened one holds, as long as it makes
/// sense: the fuzzer's way in.
///
/// # Errors
/// [`RecordError`].
#[doc(hidden)]
pub fn look_into(bytes: &[u8]) -> Result<(), RecordError> {
    let opened = match sealed_bytes(bytes)? {
        Some(sealed) => bytes.get(HEADER_BYTES..HEADER_BYTES + sealed),
        None => None,
    };
    opened.map_or(Ok(()), |opened| inner(opened).map(drop))
}

/// Handshake messages behind the handshake: tickets, which nobody wants, and key updates, which end
/// their record.
fn after_handshake(mut messages: &[u8]) -> Result<Inner, RecordError> {
    if messages.is_empty() {
        return Err(RecordError::Message("an empty handshake record"));
    }
    while let [kind, high, middle, low, rest @ ..] = messages {
        let bytes = u32::from_be_bytes([0, *high, *middle, *low]) as usize;
        let (body, behind) =
            rest.split_at_checked(bytes).ok_or(RecordError::Message("a part of a message"))?;
        match (*kind, body) {
            (NEW_SESSION_TICKET, _) => messages = behind,
            (KEY_UPDATE, [wanted @ (0 | 1)]) if behind.is_empty() => {
                return Ok(Inner::KeyUpdate { wanted: *wanted == 1 });
            }
            _ => return Err(RecordError::Message("a handshake message")),
        }
    }
    match messages {
        [] => Ok(Inner::Nothing),
        _ => Err(RecordError::Message("a part of a message")),
    }
}

/// One direction.
struct Half {
    key: LessSafeKey,
    iv: [u8; NONCE_LEN],
    sequence: u64,
}

impl Half {
    fn new((sequence, secrets): (u64, ConnectionTrafficSecrets)) -> io::Result<Self> {
        let (algorithm, key, iv): (&'static Algorithm, _, _) = match secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&AES_128_GCM, key, iv),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (&AES_256_GCM, key, iv),
            ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => (&CHACHA20_POLY1305, key, iv),
            _ => return Err(io::Error::other("a cipher that is not known here")),
        };
        let key = UnboundKey::new(algorithm, key.as_ref()).map_err(io::Error::other)?;
        let iv = iv.as_ref().try_into().map_err(io::Error::other)?;
        Ok(Self { key: LessSafeKey::new(key), iv, sequence })
    }

    /// The nonce of the next record, which is then used.
    fn nonce(&mut self) -> Nonce {
        let mut nonce = self.iv;
        for (byte, of) in nonce[NONCE_LEN - 8..].iter_mut().zip(self.sequence.to_be_bytes()) {
            *byte ^= of;
        }
        self.sequence += 1;
        Nonce::assume_unique_for_key(nonce)
    }

    /// Seals what stands in `record` behind its header's place, and sets header and tag.
    fn seal(&mut self, record: &mut Vec<u8>, start: usize) -> io::Result<()> {
        let sealed = (record.len() - start - HEADER_BYTES + TAG_BYTES) as u16;
        let [high, low] = sealed.to_be_bytes();
        let header = [DATA, 3, 3, high, low];
        let (nonce, body) = (self.nonce(), start + HEADER_BYTES);
        record[start..body].copy_from_slice(&header);
        let tag =
            self.key.seal_in_place_separate_tag(nonce, Aad::from(header), &mut record[body..]);
        record.extend_from_slice(tag.map_err(io::Error::other)?.as_ref());
        Ok(())
    }

    /// Opens a whole record into `room`, which has its size without header and tag.
    fn open_to(&mut self, record: &[u8], room: &mut [u8]) -> Result<(), RecordError> {
        let (header, sealed) =
            record.split_first_chunk::<HEADER_BYTES>().ok_or(RecordError::Length(0))?;
        let (sealed, tag) =
            sealed.split_last_chunk::<TAG_BYTES>().ok_or(RecordError::Length(sealed.len()))?;
        let nonce = self.nonce();
        self.key
            .open_separate_gather(nonce, Aad::from(*header), sealed, tag, room)
            .map_err(|_unspecified| RecordError::Seal)
    }

    /// Opens a whole record in place; the bytes behind its header.
    fn open<'r>(&mut self, record: &'r mut [u8]) -> Result<&'r mut [u8], RecordError> {
        let (header, sealed) =
            record.split_first_chunk_mut::<HEADER_BYTES>().ok_or(RecordError::Length(0))?;
        let nonce = self.nonce();
        self.key
            .open_in_place(nonce, Aad::from(*header), sealed)
            .map_err(|_unspecified| RecordError::Seal)
    }
}

/// What rustls keeps of a connection: it makes the next keys.
trait NextKeys: Send {
    fn sending(&mut self) -> Result<(u64, ConnectionTrafficSecrets), rustls::Error>;
    fn receiving(&mut self) -> Result<(u64, ConnectionTrafficSecrets), rustls::Error>;
}

impl<Data: Send> NextKeys for KernelConnection<Data> {
    fn sending(&mut self) -> Result<(u64, ConnectionTrafficSecrets), rustls::Error> {
        self.update_tx_secret()
    }

    fn receiving(&mut self) -> Result<(u64, ConnectionTrafficSecrets), rustls::Error> {
        self.update_rx_secret()
    }
}

/// Bytes that were read and not used.
pub(super) struct Incoming {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Incoming {
    pub(super) fn new() -> Self {
        Self { bytes: vec![0; BUFFER_BYTES].into(), start: 0, end: 0 }
    }

    pub(super) fn filled(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.end]
    }

    /// The first `bytes` are used.
    pub(super) fn discard(&mut self, bytes: usize) {
        self.start += bytes;
    }

    /// Reads once; the new bytes, none at the end.
    pub(super) fn poll_fill<IO: AsyncRead + Unpin>(
        &mut self,
        io: &mut IO,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<&[u8]>> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.bytes.len() - self.end < RECORD_BYTES_MAX {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let mut room = ReadBuf::new(&mut self.bytes[self.end..]);
        if room.remaining() == 0 {
            return Poll::Ready(Err(RecordError::Length(BUFFER_BYTES).into()));
        }
        ready!(Pin::new(io).poll_read(cx, &mut room))?;
        let read = room.filled().len();
        self.end += read;
        Poll::Ready(Ok(&self.bytes[self.end - read..self.end]))
    }
}

/// A stream over TLS 1.3 records.
pub(super) struct Records<IO> {
    io: IO,
    receiving: Half,
    sending: Half,
    keys: Box<dyn NextKeys>,
    incoming: Incoming,
    /// Opened bytes at the front of `incoming`, and what is to be discarded behind them.
    opened: (usize, usize),
    outgoing: Vec<u8>,
    sent: usize,
    records_a_key: u64,
    /// A key update that the peer wanted is sealed, and no data behind it: further wishes are the same.
    answering: bool,
    /// Records without data since the last data.
    idle_records: u32,
    /// The peer sends no more.
    is_ended: bool,
    /// What ended the connection, and whether the peer was told.
    failed: Option<RecordError>,
    has_closed: bool,
}

impl<IO> Records<IO> {
    /// A connection as rustls left it: `incoming` are bytes behind the handshake.
    pub(super) fn new<Data: Send + 'static>(
        io: IO,
        secrets: ExtractedSecrets,
        keys: KernelConnection<Data>,
        incoming: Incoming,
    ) -> io::Result<Self> {
        Ok(Self {
            io,
            receiving: Half::new(secrets.rx)?,
            sending: Half::new(secrets.tx)?,
            keys: Box::new(keys),
            incoming,
            opened: (0, 0),
            outgoing: Vec::new(),
            sent: 0,
            records_a_key: RECORDS_A_KEY,
            answering: false,
            idle_records: 0,
            is_ended: false,
            failed: None,
            has_closed: false,
        })
    }

    /// Keys last for so many records.
    #[cfg(test)]
    pub(super) fn with_records_a_key(self, records_a_key: u64) -> Self {
        Self { records_a_key, ..self }
    }

    fn put_record(&mut self, kind: u8, plain: &[u8]) -> io::Result<()> {
        let start = self.outgoing.len();
        self.outgoing.extend_from_slice(&[0; HEADER_BYTES]);
        self.outgoing.extend_from_slice(plain);
        self.outgoing.push(kind);
        self.sending.seal(&mut self.outgoing, start)
    }

    /// From the next record on another key is used.
    fn update_sending(&mut self) -> io::Result<()> {
        self.put_record(HANDSHAKE, &[KEY_UPDATE, 0, 0, 1, 0])?;
        self.sending = Half::new(self.keys.sending().map_err(io::Error::other)?)?;
        Ok(())
    }

    /// Seals slices until `outgoing` is full; how many bytes of them.
    fn put_data(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let (mut slices, mut taken) = (slices.iter().map(|slice| &slice[..]), 0);
        let mut rest = slices.next().unwrap_or_default();
        // For what is offered: most of what is written is small.
        let offered = rest.len() + slices.clone().map(<[u8]>::len).sum::<usize>();
        let records = offered / PLAIN_BYTES_MAX + 1;
        let overhead = records * (RECORD_BYTES_MAX - PLAIN_BYTES_MAX);
        self.outgoing.reserve(BUFFER_BYTES.min(offered + overhead));
        while self.outgoing.len() + RECORD_BYTES_MAX <= BUFFER_BYTES {
            if self.sending.sequence >= self.records_a_key {
                self.update_sending()?;
            }
            let start = self.outgoing.len();
            self.outgoing.extend_from_slice(&[0; HEADER_BYTES]);
            let mut room = PLAIN_BYTES_MAX;
            while room > 0 {
                if rest.is_empty() {
                    let Some(next) = slices.next() else { break };
                    rest = next;
                    continue;
                }
                let (piece, behind) = rest.split_at(rest.len().min(room));
                self.outgoing.extend_from_slice(piece);
                (rest, room) = (behind, room - piece.len());
            }
            if room == PLAIN_BYTES_MAX {
                self.outgoing.truncate(start);
                break;
            }
            self.outgoing.push(DATA);
            self.sending.seal(&mut self.outgoing, start)?;
            taken += PLAIN_BYTES_MAX - room;
            self.answering = false;
        }
        Ok(taken)
    }

    /// Opens the next record, into the caller's buffer where all of it has room; false where it is not
    /// complete.
    fn open_next(&mut self, buffer: &mut ReadBuf<'_>) -> Result<bool, RecordError> {
        let front = self.incoming.filled();
        let Some(sealed) = sealed_bytes(front)? else { return Ok(false) };
        let record_bytes = HEADER_BYTES + sealed;
        let Some(record) = front.get_mut(..record_bytes) else { return Ok(false) };
        // With the type behind the data.
        let opened_bytes = sealed - TAG_BYTES;
        let has_room = buffer.remaining() >= opened_bytes;
        let inner = if has_room {
            let room = buffer.initialize_unfilled_to(opened_bytes);
            self.receiving.open_to(record, room)?;
            inner(room)?
        } else {
            inner(self.receiving.open(record)?)?
        };
        let has_data = matches!(inner, Inner::Data(1..));
        self.idle_records = if has_data { 0 } else { self.idle_records + 1 };
        if self.idle_records > IDLE_RECORDS_MAX {
            return Err(RecordError::Idle);
        }
        match inner {
            Inner::Data(bytes) if !has_room => {
                self.incoming.discard(HEADER_BYTES);
                self.opened = (bytes, record_bytes - HEADER_BYTES - bytes);
                self.take_opened(0);
                return Ok(true);
            }
            Inner::Data(bytes) => buffer.advance(bytes),
            other => self.obey(other)?,
        }
        self.incoming.discard(record_bytes);
        Ok(true)
    }

    fn obey(&mut self, inner: Inner) -> Result<(), RecordError> {
        let failed = |_| RecordError::Message("no next key");
        match inner {
            Inner::KeyUpdate { wanted } => {
                let next = self.keys.receiving().map_err(io::Error::other);
                self.receiving = next.and_then(Half::new).map_err(failed)?;
                // Behind the own farewell nothing is sent.
                if wanted && !self.has_closed && !std::mem::replace(&mut self.answering, true) {
                    self.update_sending().map_err(failed)?;
                }
            }
            Inner::Closed => self.is_ended = true,
            Inner::Data(_) | Inner::Nothing => {}
        }
        Ok(())
    }

    fn take_opened(&mut self, bytes: usize) {
        self.incoming.discard(bytes);
        self.opened.0 -= bytes;
        if self.opened.0 == 0 {
            self.incoming.discard(std::mem::take(&mut self.opened.1));
        }
    }

    /// Moves what is opened to the caller.
    fn give(&mut self, buffer: &mut ReadBuf<'_>) {
        let bytes = buffer.remaining().min(self.opened.0);
        buffer.put_slice(&self.incoming.filled()[..bytes]);
        self.take_opened(bytes);
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> Records<IO> {
    /// Writes what is sealed.
    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.sent < self.outgoing.len() {
            let written =
                ready!(Pin::new(&mut self.io).poll_write(cx, &self.outgoing[self.sent..]))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.sent += written;
        }
        self.outgoing.clear();
        self.sent = 0;
        Poll::Ready(Ok(()))
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncRead for Records<IO> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buffer.filled().len();
        loop {
            this.give(buffer);
            if buffer.filled().len() > before || buffer.remaining() == 0 || this.is_ended {
                return Poll::Ready(Ok(()));
            }
            if let Some(failed) = &this.failed {
                return Poll::Ready(Err(failed.clone().into()));
            }
            match this.open_next(buffer) {
                Ok(true) => continue,
                Ok(false) => {}
                Err(error) => {
                    this.failed = Some(error);
                    continue;
                }
            }
            let Self { io, incoming, .. } = this;
            if ready!(incoming.poll_fill(io, cx))?.is_empty() {
                let detail = "the peer closed the connection without saying so in TLS";
                return Poll::Ready(Err(io::Error::new(io::ErrorKind::UnexpectedEof, detail)));
            }
        }
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Records<IO> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.has_closed {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        // What is taken is sealed and must leave: nothing new before it has.
        ready!(this.poll_drain(cx))?;
        let taken = this.put_data(slices)?;
        if let Poll::Ready(Err(error)) = this.poll_drain(cx) {
            return Poll::Ready(Err(error));
        }
        Poll::Ready(Ok(taken))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_drain(cx))?;
        Pin::new(&mut this.io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !std::mem::replace(&mut this.has_closed, true) {
            match this.failed.as_ref().map(RecordError::alert) {
                None => this.put_record(ALERT, &CLOSE_NOTIFY)?,
                Some(Some(alert)) => this.put_record(ALERT, &[FATAL, alert.into()])?,
                // The peer ended it, and listens no more.
                Some(None) => {}
            }
        }
        ready!(this.poll_drain(cx))?;
        Pin::new(&mut this.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests;
