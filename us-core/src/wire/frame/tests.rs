use super::*;
use bytes::Buf;
use proptest::prelude::*;
use us_proto::v1::{FragmentId, GetItem};

fn bytes(max: usize) -> impl Strategy<Value = Bytes> {
    prop::collection::vec(any::<u8>(), 0..max).prop_map(Bytes::from)
}

fn item() -> impl Strategy<Value = GetItem> {
    let numbers = (any::<u32>(), any::<u32>(), any::<u64>());
    (bytes(17), numbers, any::<bool>()).prop_map(|(block, (a, b, trace), trailer)| {
        let fragment = Some(FragmentId { block, index: a });
        GetItem { fragment, first_slot: b, slots: a, trailer, trace }
    })
}

/// Frames as a decoder returns them: the message's number is the header's.
pub(in crate::wire) fn frame() -> impl Strategy<Value = Frame> {
    let put = (any::<u64>(), bytes(100), bytes(3000), any::<u64>()).prop_map(
        |(request, grant, record, trace)| {
            Payload::Put(PutRequest { request, grant, record, trace })
        },
    );
    let put_reply = (any::<u64>(), any::<i32>(), ".*").prop_map(|(request, status, detail)| {
        Payload::PutReply(PutReply { request, status, detail })
    });
    let get = (any::<u64>(), bytes(100), prop::collection::vec(item(), 1..9))
        .prop_map(|(request, grant, items)| Payload::Get(GetRequest { request, grant, items }));
    let get_reply = (any::<u64>(), any::<u32>(), bytes(40), bytes(40), bytes(3000)).prop_map(
        |(request, item, header, trailer, data)| {
            let (status, detail) = (1, String::new());
            Payload::GetReply(GetReply { request, item, status, detail, header, trailer, data })
        },
    );
    let empty = prop_oneof![Just(Payload::GetEnd), Just(Payload::Cancel)];
    let text = prop_oneof![
        "[a-zé ]{0,50}".prop_map(Payload::Goodbye),
        "[a-zé ]{0,50}".prop_map(Payload::Error)
    ];
    prop_oneof![put, put_reply, get, get_reply, empty, text].prop_map(|mut payload| {
        let request = match &mut payload {
            Payload::Put(message) => message.request,
            Payload::PutReply(message) => message.request,
            Payload::Get(message) => message.request,
            Payload::GetReply(message) => message.request,
            Payload::GetEnd | Payload::Cancel => 9,
            Payload::Goodbye(_) | Payload::Error(_) => 0,
        };
        Frame { request, payload }
    })
}

fn side_of(payload: &Payload) -> Side {
    match payload {
        Payload::Put(_) | Payload::Get(_) | Payload::Cancel => Side::Server,
        _ => Side::Client,
    }
}

fn decode(mut wire: &[u8], side: Side) -> Result<Frame, FrameError> {
    let header = Header::decode(wire.first_chunk().unwrap(), side)?;
    wire.advance(HEADER_BYTES);
    let (head, body) = wire.split_at(header.head_bytes as usize);
    assert_eq!(body.len(), header.body_bytes as usize);
    Frame::decode(&header, head, Bytes::copy_from_slice(body))
}

proptest! {
    #[test]
    fn frames_come_back(frame in frame()) {
        let side = side_of(&frame.payload);
        let (front, body) = frame.clone().encode(&mut BytesMut::new()).unwrap();
        let wire = [front, body].concat();
        prop_assert_eq!(decode(&wire, side), Ok(frame));
    }

    #[test]
    fn any_header_is_read_or_refused(
        header in any::<[u8; HEADER_BYTES]>(), magic in any::<bool>(), client in any::<bool>(),
    ) {
        let mut header = header;
        if magic {
            header[..4].copy_from_slice(&MAGIC);
            header[4] %= 10;
            header[5..8].fill(0);
        }
        let side = if client { Side::Client } else { Side::Server };
        if let Ok(header) = Header::decode(&header, side) {
            let size = HEADER_BYTES as u64 + u64::from(header.head_bytes)
                + u64::from(header.body_bytes);
            prop_assert!(size <= FRAME_BYTES_MAX as u64);
            prop_assert!(header.kind.is_for(side));
        }
    }

    #[test]
    fn any_head_is_read_or_refused(kind in 1u8..9, head in bytes(300), body in bytes(10)) {
        let kind = Kind::from_byte(kind).unwrap();
        let (head_bytes, body_bytes) = (head.len() as u32, body.len() as u32);
        let header = Header { kind, request: 1, head_bytes, body_bytes };
        // The only promise: no panic.
        let _ = Frame::decode(&header, &head, body);
    }
}

#[test]
fn the_header_lies_as_drawn() {
    let put = PutRequest {
        request: 0x0102,
        grant: Bytes::from("g"),
        record: Bytes::from("rec"),
        trace: 0,
    };
    let (front, body) =
        Frame { request: 0x0102, payload: Payload::Put(put) }.encode(&mut BytesMut::new()).unwrap();
    let header =
        [b'U', b'S', b'B', b'1', 1, 0, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 3, 0, 0, 0];
    assert_eq!(front[..HEADER_BYTES], header);
    assert_eq!(front[HEADER_BYTES..], [0x12, 1, b'g'], "field 2, one byte: no request, no record");
    assert_eq!(body, "rec");
}

#[test]
fn what_is_too_large_is_neither_sent_nor_taken() {
    let record = Bytes::from(vec![0; FRAME_BYTES_MAX]);
    let put = PutRequest { record, ..PutRequest::default() };
    let encoded = Frame { request: 1, payload: Payload::Put(put) }.encode(&mut BytesMut::new());
    assert!(matches!(encoded, Err(FrameError::TooLarge { .. })));

    for (head_bytes, body_bytes) in [(0, u32::MAX), (u32::MAX, 0), (u32::MAX, u32::MAX)] {
        let mut wire = BytesMut::new();
        Header { kind: Kind::Put, request: 1, head_bytes, body_bytes }.encode(&mut wire);
        let decoded = Header::decode(wire.first_chunk().unwrap(), Side::Server);
        assert!(matches!(decoded, Err(FrameError::TooLarge { .. })));
    }
}

#[test]
fn a_get_has_some_items_but_not_too_many() {
    for items in [0, GET_ITEMS_MAX + 1] {
        let get = GetRequest { items: vec![GetItem::default(); items], ..GetRequest::default() };
        let frame = Frame { request: 1, payload: Payload::Get(get) };
        assert_eq!(frame.encode(&mut BytesMut::new()), Err(FrameError::Items { items }));
    }
}

#[test]
fn long_texts_are_cut_between_characters() {
    let frame = Frame { request: 0, payload: Payload::Error("é".repeat(TEXT_BYTES_MAX)) };
    let (front, _) = frame.encode(&mut BytesMut::new()).unwrap();
    assert!(front.len() <= HEADER_BYTES + TEXT_BYTES_MAX);
    let Payload::Error(text) = decode(&front, Side::Client).unwrap().payload else { panic!() };
    assert!(text.chars().all(|letter| letter == 'é'));
}
