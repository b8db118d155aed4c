//! TLS handshakes whose connections carry frames: rustls does the handshake, [`Records`] goes on with
//! its secrets.
//!
//! rustls' unbuffered connections are used for it, because they leave the caller his buffer. It is shown
//! one record after the other, and none behind the handshake: the first request often comes in one
//! segment with the end, and what rustls had made of it would be lost with its state.

use std::future::poll_fn;
use std::io;

use rustls::client::{ClientConnectionData, UnbufferedClientConnection};
use rustls::kernel::KernelConnection;
use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::unbuffered::{
    ConnectionState, EncodeError, EncodeTlsData, InsufficientSizeError, UnbufferedStatus,
};
use rustls::{CommonState, ExtractedSecrets};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};

use super::records::{Incoming, RECORD_BYTES_MAX, Records};
use crate::tls::{PeerIdentity, TlsError};

/// States of rustls after an error until its alert comes.
const FAREWELL_STATES_MAX: usize = 8;

/// Either side of a handshake.
pub(super) trait Shaking {
    type Data: Send + 'static;

    fn process<'c, 'i>(
        &'c mut self,
        incoming: &'i mut [u8],
    ) -> UnbufferedStatus<'c, 'i, Self::Data>;

    fn state(&self) -> &CommonState;

    fn into_secrets(
        self,
    ) -> Result<(ExtractedSecrets, KernelConnection<Self::Data>), rustls::Error>;
}

impl Shaking for UnbufferedClientConnection {
    type Data = ClientConnectionData;

    fn process<'c, 'i>(
        &'c mut self,
        incoming: &'i mut [u8],
    ) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(incoming)
    }

    fn state(&self) -> &CommonState {
        self
    }

    fn into_secrets(
        self,
    ) -> Result<(ExtractedSecrets, KernelConnection<Self::Data>), rustls::Error> {
        self.dangerous_into_kernel_connection()
    }
}

impl Shaking for UnbufferedServerConnection {
    type Data = ServerConnectionData;

    fn process<'c, 'i>(
        &'c mut self,
        incoming: &'i mut [u8],
    ) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(incoming)
    }

    fn state(&self) -> &CommonState {
        self
    }

    fn into_secrets(
        self,
    ) -> Result<(ExtractedSecrets, KernelConnection<Self::Data>), rustls::Error> {
        self.dangerous_into_kernel_connection()
    }
}

/// What is to be done next.
enum Next {
    Again,
    Send,
    Receive,
    Done,
    Failed(rustls::Error),
}

/// A handshake that is over.
pub(super) struct Shaken<IO> {
    pub records: Records<IO>,
    /// Whose certificate was verified.
    pub peer: Result<PeerIdentity, TlsError>,
    /// The protocol agreed upon.
    pub alpn: Option<Vec<u8>>,
}

/// Shakes hands on `io`, of which `incoming` was read already.
///
/// # Errors
/// Those of `io`; [`io::ErrorKind::InvalidData`] around a [`rustls::Error`] where the two do not come
/// together, of which the peer is told.
pub(super) async fn shake<C: Shaking, IO: AsyncRead + AsyncWrite + Unpin>(
    mut connection: C,
    mut io: IO,
    mut incoming: Incoming,
) -> io::Result<Shaken<IO>> {
    let mut outgoing = Vec::new();
    // Of what is read: bytes of the records that rustls is shown.
    let mut shown = 0;
    loop {
        let (discard, next) =
            step(&mut connection, &mut incoming.filled()[..shown], &mut outgoing)?;
        incoming.discard(discard);
        shown -= discard;
        match next {
            Next::Again => {}
            Next::Send => {
                io.write_all(&outgoing).await?;
                io.flush().await?;
                outgoing.clear();
            }
            Next::Receive => {
                if let Some(bytes) = first_record(&incoming.filled()[shown..]) {
                    shown += bytes;
                    continue;
                }
                let fill = poll_fn(|cx| incoming.poll_fill(&mut io, cx).map_ok(<[u8]>::len));
                if fill.await? == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
            }
            Next::Done => break,
            Next::Failed(error) => {
                // Whether the peer hears of it or not: this is over.
                let seen = &mut incoming.filled()[..shown];
                let _ = farewell(&mut connection, &mut io, seen, outgoing).await;
                return Err(io::Error::new(io::ErrorKind::InvalidData, error));
            }
        }
    }
    let state = connection.state();
    let peer = PeerIdentity::from_chain(state.peer_certificates());
    let alpn = state.alpn_protocol().map(<[u8]>::to_vec);
    let (secrets, keys) = connection.into_secrets().map_err(io::Error::other)?;
    let records = Records::new(io, secrets, keys, incoming)?;
    Ok(Shaken { records, peer, alpn })
}

/// The bytes of the first record, of whatever kind; `None` while it is not complete.
fn first_record(bytes: &[u8]) -> Option<usize> {
    let [_, _, _, high, low] = bytes.first_chunk()?;
    let end = 5 + usize::from(u16::from_be_bytes([*high, *low]));
    // One that is too long is rustls' to refuse, as soon as it sees that.
    (bytes.len() >= end.min(RECORD_BYTES_MAX)).then_some(end.min(bytes.len()))
}

/// One state of rustls: how many bytes of `incoming` are used, and what is next.
fn step<C: Shaking>(
    connection: &mut C,
    incoming: &mut [u8],
    outgoing: &mut Vec<u8>,
) -> io::Result<(usize, Next)> {
    let UnbufferedStatus { discard, state } = connection.process(incoming);
    let next = match state {
        Err(error) => Next::Failed(error),
        Ok(ConnectionState::EncodeTlsData(data)) => {
            encode(data, outgoing)?;
            Next::Again
        }
        Ok(ConnectionState::TransmitTlsData(data)) => {
            data.done();
            Next::Send
        }
        Ok(ConnectionState::BlockedHandshake) => Next::Receive,
        Ok(ConnectionState::WriteTraffic(_)) => Next::Done,
        Ok(ConnectionState::PeerClosed | ConnectionState::Closed) => {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        // Data before the end is not offered; rustls' later states are not known here.
        Ok(_) => return Err(io::ErrorKind::Unsupported.into()),
    };
    // A server could write before the client has shown who it is: it does not.
    let is_early = matches!(next, Next::Done) && connection.state().is_handshaking();
    Ok((discard, if is_early { Next::Receive } else { next }))
}

fn encode<Data>(mut data: EncodeTlsData<'_, Data>, outgoing: &mut Vec<u8>) -> io::Result<()> {
    let start = outgoing.len();
    loop {
        match data.encode(&mut outgoing[start..]) {
            Ok(bytes) => {
                outgoing.truncate(start + bytes);
                return Ok(());
            }
            Err(EncodeError::InsufficientSize(InsufficientSizeError { required_size })) => {
                outgoing.resize(start + required_size, 0);
            }
            Err(error) => return Err(io::Error::other(error)),
        }
    }
}

/// Sends the alert that rustls has for the peer.
async fn farewell<C: Shaking, IO: AsyncWrite + Unpin>(
    connection: &mut C,
    io: &mut IO,
    mut seen: &mut [u8],
    mut outgoing: Vec<u8>,
) -> io::Result<()> {
    let before = outgoing.len();
    for _ in 0..FAREWELL_STATES_MAX {
        // What rustls has not used of it must be there, alert or no alert.
        let (discard, next) = step(connection, seen, &mut outgoing)?;
        seen = &mut seen[discard..];
        if outgoing.len() > before || !matches!(next, Next::Again) {
            break;
        }
    }
    io.write_all(&outgoing).await?;
    io.shutdown().await
}
