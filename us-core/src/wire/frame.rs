//! The frame codec: pure, no I/O.
//!
//! ```text
//!  0      4      5      6        8          16           20           24
//!  | magic| kind | 0    | 0  0   | request  | head_bytes | body_bytes | head ... | body ... |
//!    "USB1"                        u64        u32          u32
//! ```
//! Little-endian. The head is the protobuf message without its `request` and without its large last
//! bytes field; that field is the body, so that nobody copies it through a protobuf buffer.

use bytes::{BufMut, Bytes, BytesMut};
use prost::Message;
use us_proto::v1::{GetReply, GetRequest, PutReply, PutRequest};

/// Bytes of a frame's header.
pub const HEADER_BYTES: usize = 24;
/// The largest frame: header, head and body together.
pub const FRAME_BYTES_MAX: usize = 8 << 20;
/// The largest head: what is not fragment bytes is small.
pub const HEAD_BYTES_MAX: usize = 64 << 10;
/// Items of one get.
pub const GET_ITEMS_MAX: usize = 256;
/// The longest text of a goodbye or an error.
const TEXT_BYTES_MAX: usize = 1024;

const MAGIC: [u8; 4] = *b"USB1";

/// What makes bytes no frame, or a frame out of place.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The first four bytes are not "USB1".
    #[error("a frame starts with {found:02x?} instead of \"USB1\"")]
    Magic {
        /// What they are.
        found: [u8; 4],
    },
    /// A kind that does not exist, or reserved bytes that are not zero.
    #[error("unknown kind of frame {kind}, reserved {reserved:02x?}")]
    Kind {
        /// The kind byte.
        kind: u8,
        /// The three bytes after it.
        reserved: [u8; 3],
    },
    /// A kind this side never receives, or with a body it cannot have.
    #[error("a frame of kind {kind:?} with a body of {body_bytes} bytes has no place here")]
    OutOfPlace {
        /// The kind.
        kind: Kind,
        /// Its body's length.
        body_bytes: u32,
    },
    /// Larger than [`FRAME_BYTES_MAX`], or its head larger than [`HEAD_BYTES_MAX`].
    #[error("a frame with a head of {head_bytes} and a body of {body_bytes} bytes is too large")]
    TooLarge {
        /// Bytes of the head.
        head_bytes: usize,
        /// Bytes of the body.
        body_bytes: usize,
    },
    /// The head is no message of its kind.
    #[error("the head of a {kind:?} frame does not decode: {detail}")]
    Head {
        /// The kind.
        kind: Kind,
        /// The decoder's reason.
        detail: String,
    },
    /// More than [`GET_ITEMS_MAX`] items, or none.
    #[error("a get of {items} items: 1 to {GET_ITEMS_MAX} are possible")]
    Items {
        /// Items in it.
        items: usize,
    },
    /// A request number that is under way already.
    #[error("request {request} is under way already")]
    Duplicate {
        /// The number.
        request: u64,
    },
    /// A reply to nothing, or one reply too many.
    #[error("a {kind:?} frame answers request {request}, which does not wait for one")]
    Unasked {
        /// The kind.
        kind: Kind,
        /// The request it names.
        request: u64,
    },
    /// The connection ended inside a frame.
    #[error("the connection ended inside a frame")]
    Truncated,
}

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// `PutRequest`; the body is its record.
    Put = 1,
    /// `PutReply`.
    PutReply = 2,
    /// `GetRequest`.
    Get = 3,
    /// `GetReply`; the body is its data.
    GetReply = 4,
    /// No further reply comes for this get.
    GetEnd = 5,
    /// The client no longer wants the replies of this get.
    Cancel = 6,
    /// The server is going away; the head is a text.
    Goodbye = 7,
    /// The other side broke the protocol; the head is a text. The connection ends.
    Error = 8,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Self> {
        [
            Self::Put,
            Self::PutReply,
            Self::Get,
            Self::GetReply,
            Self::GetEnd,
            Self::Cancel,
            Self::Goodbye,
            Self::Error,
        ]
        .into_iter()
        .find(|kind| *kind as u8 == byte)
    }

    const fn has_body(self) -> bool {
        matches!(self, Self::Put | Self::GetReply)
    }

    const fn is_for(self, side: Side) -> bool {
        match self {
            Self::Put | Self::Get | Self::Cancel => matches!(side, Side::Server),
            Self::PutReply | Self::GetReply | Self::GetEnd | Self::Goodbye => {
                matches!(side, Side::Client)
            }
            Self::Error => true,
        }
    }
}

/// Which end of a connection reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Client,
    Server,
}

/// A frame's header, checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) kind: Kind,
    pub(crate) request: u64,
    pub(crate) head_bytes: u32,
    pub(crate) body_bytes: u32,
}

impl Header {
    /// Reads a header that `side` received.
    pub(crate) fn decode(bytes: &[u8; HEADER_BYTES], side: Side) -> Result<Self, FrameError> {
        let [magic @ .., _, _, _, _] = bytes.first_chunk::<8>().expect("a header is longer");
        if *magic != MAGIC {
            return Err(FrameError::Magic { found: *magic });
        }
        let reserved = [bytes[5], bytes[6], bytes[7]];
        let kind = match Kind::from_byte(bytes[4]) {
            Some(known) if reserved == [0; 3] => known,
            _ => return Err(FrameError::Kind { kind: bytes[4], reserved }),
        };
        let u32_at = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        let header = Self {
            kind,
            request: u64::from(u32_at(8)) | u64::from(u32_at(12)) << 32,
            head_bytes: u32_at(16),
            body_bytes: u32_at(20),
        };
        if !kind.is_for(side) || (header.body_bytes > 0 && !kind.has_body()) {
            return Err(FrameError::OutOfPlace { kind, body_bytes: header.body_bytes });
        }
        check_size(header.head_bytes as usize, header.body_bytes as usize)?;
        Ok(header)
    }

    fn encode(&self, out: &mut BytesMut) {
        out.put_slice(&MAGIC);
        out.put_u8(self.kind as u8);
        out.put_slice(&[0; 3]);
        out.put_u64_le(self.request);
        out.put_u32_le(self.head_bytes);
        out.put_u32_le(self.body_bytes);
    }
}

/// Whether a frame of this size may exist.
pub(crate) fn check_size(head_bytes: usize, body_bytes: usize) -> Result<(), FrameError> {
    let fits = head_bytes <= HEAD_BYTES_MAX
        && body_bytes <= FRAME_BYTES_MAX
        && HEADER_BYTES + head_bytes + body_bytes <= FRAME_BYTES_MAX;
    if fits { Ok(()) } else { Err(FrameError::TooLarge { head_bytes, body_bytes }) }
}

/// What a frame carries.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Payload {
    Put(PutRequest),
    PutReply(PutReply),
    Get(GetRequest),
    GetReply(GetReply),
    GetEnd,
    Cancel,
    Goodbye(String),
    Error(String),
}

/// One message of the framed protocol.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Frame {
    pub(crate) request: u64,
    pub(crate) payload: Payload,
}

impl Frame {
    /// Puts head and body together again. The message's `request` is the header's.
    pub(crate) fn decode(header: &Header, head: &[u8], body: Bytes) -> Result<Self, FrameError> {
        let request = header.request;
        let payload = match header.kind {
            Kind::Put => {
                Payload::Put(PutRequest { request, record: body, ..message(header, head)? })
            }
            Kind::PutReply => Payload::PutReply(PutReply { request, ..message(header, head)? }),
            Kind::Get => {
                let get = GetRequest { request, ..message(header, head)? };
                check_items(&get)?;
                Payload::Get(get)
            }
            Kind::GetReply => {
                Payload::GetReply(GetReply { request, data: body, ..message(header, head)? })
            }
            Kind::GetEnd => Payload::GetEnd,
            Kind::Cancel => Payload::Cancel,
            Kind::Goodbye => Payload::Goodbye(text(head)),
            Kind::Error => Payload::Error(text(head)),
        };
        Ok(Self { request, payload })
    }

    /// Header and head, written behind what `scratch` holds; and the body, untouched.
    pub(crate) fn encode(self, scratch: &mut BytesMut) -> Result<(Bytes, Bytes), FrameError> {
        let request = self.request;
        match self.payload {
            Payload::Put(mut put) => {
                put.request = 0;
                let body = std::mem::take(&mut put.record);
                encode(scratch, Kind::Put, request, &put, body)
            }
            Payload::PutReply(mut reply) => {
                reply.request = 0;
                encode(scratch, Kind::PutReply, request, &reply, Bytes::new())
            }
            Payload::Get(mut get) => {
                check_items(&get)?;
                get.request = 0;
                encode(scratch, Kind::Get, request, &get, Bytes::new())
            }
            Payload::GetReply(mut reply) => {
                reply.request = 0;
                let body = std::mem::take(&mut reply.data);
                encode(scratch, Kind::GetReply, request, &reply, body)
            }
            Payload::GetEnd => encode(scratch, Kind::GetEnd, request, &(), Bytes::new()),
            Payload::Cancel => encode(scratch, Kind::Cancel, request, &(), Bytes::new()),
            Payload::Goodbye(text) => encode_text(scratch, Kind::Goodbye, &text),
            Payload::Error(text) => encode_text(scratch, Kind::Error, &text),
        }
    }

    /// Bytes of the body: what counts against the byte limits.
    pub(crate) fn body_bytes(&self) -> usize {
        match &self.payload {
            Payload::Put(put) => put.record.len(),
            Payload::GetReply(reply) => reply.data.len(),
            Payload::PutReply(_)
            | Payload::Get(_)
            | Payload::GetEnd
            | Payload::Cancel
            | Payload::Goodbye(_)
            | Payload::Error(_) => 0,
        }
    }
}

/// Decodes the whole frame at the start of `bytes`, as the server's end reads it or the client's,
/// and encodes it again: what a decoder's test compares.
///
/// # Errors
/// [`FrameError`]; [`FrameError::Truncated`] where `bytes` end too early.
pub fn reencode(bytes: &[u8], at_server: bool) -> Result<Vec<u8>, FrameError> {
    let side = if at_server { Side::Server } else { Side::Client };
    let (header, rest) = bytes.split_first_chunk().ok_or(FrameError::Truncated)?;
    let header = Header::decode(header, side)?;
    let head_bytes = header.head_bytes as usize;
    let (head, rest) = rest.split_at_checked(head_bytes).ok_or(FrameError::Truncated)?;
    let body = rest.get(..header.body_bytes as usize).ok_or(FrameError::Truncated)?;
    let frame = Frame::decode(&header, head, Bytes::copy_from_slice(body))?;
    let (front, body) = frame.encode(&mut BytesMut::new())?;
    Ok([front, body].concat())
}

/// Whether a get's number of items is possible.
pub(crate) fn check_items(get: &GetRequest) -> Result<(), FrameError> {
    let items = get.items.len();
    if (1..=GET_ITEMS_MAX).contains(&items) { Ok(()) } else { Err(FrameError::Items { items }) }
}

fn message<M: Message + Default>(header: &Header, head: &[u8]) -> Result<M, FrameError> {
    M::decode(head)
        .map_err(|error| FrameError::Head { kind: header.kind, detail: error.to_string() })
}

fn text(head: &[u8]) -> String {
    String::from_utf8_lossy(&head[..head.len().min(TEXT_BYTES_MAX)]).into_owned()
}

fn encode(
    scratch: &mut BytesMut,
    kind: Kind,
    request: u64,
    message: &impl Message,
    body: Bytes,
) -> Result<(Bytes, Bytes), FrameError> {
    let head_bytes = message.encoded_len();
    check_size(head_bytes, body.len())?;
    let header =
        Header { kind, request, head_bytes: head_bytes as u32, body_bytes: body.len() as u32 };
    scratch.reserve(HEADER_BYTES + head_bytes);
    header.encode(scratch);
    message.encode(scratch).expect("a BytesMut grows");
    Ok((scratch.split().freeze(), body))
}

fn encode_text(
    scratch: &mut BytesMut,
    kind: Kind,
    text: &str,
) -> Result<(Bytes, Bytes), FrameError> {
    let text = &text[..text.floor_char_boundary(TEXT_BYTES_MAX)];
    let header = Header { kind, request: 0, head_bytes: text.len() as u32, body_bytes: 0 };
    scratch.reserve(HEADER_BYTES + text.len());
    header.encode(scratch);
    scratch.put_slice(text.as_bytes());
    Ok((scratch.split().freeze(), Bytes::new()))
}

#[cfg(test)]
pub(in crate::wire) mod tests;
