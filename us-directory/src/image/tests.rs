//! Streams: whatever goes in comes out, in whatever pieces; nothing cut or changed is believed.

use proptest::prelude::*;

use super::*;
use crate::store::memory::MemoryStore;
use crate::store::{Durability, MetaStore};

fn read(
    stream: &[u8],
    piece: usize,
) -> Result<(RunRange, BTreeMap<Bytes, Option<Bytes>>), ImageError> {
    let mut reader = ImageReader::new();
    let mut found = BTreeMap::new();
    for bytes in stream.chunks(piece) {
        for batch in reader.push(bytes)? {
            found.extend(batch);
        }
    }
    Ok((reader.end()?, found))
}

fn store(pairs: &BTreeMap<Vec<u8>, Vec<u8>>) -> MemoryStore {
    let (mut store, _) = MemoryStore::manual();
    let mut batch = WriteBatch::new();
    for (key, value) in pairs {
        batch.put(key.clone().into(), value.clone().into());
    }
    store.commit(batch, Durability::Applied).unwrap();
    store
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_view_comes_back_in_any_pieces(
        pairs in prop::collection::btree_map(
            prop::collection::vec(any::<u8>(), 1..20), prop::collection::vec(any::<u8>(), 0..300), 0..60),
        piece in 1usize..700, out in 1usize..5000,
    ) {
        let mut stream = Vec::new();
        let mut writer = ImageWriter::new(0, 7);
        writer.write_view(&store(&pairs), out, |bytes| {
            stream.extend_from_slice(&bytes);
            true
        }).unwrap();
        let (range, found) = read(&stream, piece).unwrap();
        prop_assert_eq!(range, RunRange { first_seq: 0, last_seq: 7 });
        let wanted: BTreeMap<Bytes, Option<Bytes>> =
            pairs.into_iter().map(|(key, value)| (key.into(), Some(value.into()))).collect();
        prop_assert_eq!(found, wanted);
    }

    #[test]
    fn cut_or_changed_streams_are_refused(cut in 0usize..10_000, flip in 0usize..10_000) {
        let pairs = (0..200u32).map(|at| (at.to_be_bytes().to_vec(), vec![at as u8; 40])).collect();
        let mut stream = Vec::new();
        let mut writer = ImageWriter::new(0, 7);
        writer.write_view(&store(&pairs), 512, |bytes| {
            stream.extend_from_slice(&bytes);
            true
        }).unwrap();
        let cut = cut % stream.len();
        prop_assert!(read(&stream[..cut], 100).is_err());
        let at = flip % stream.len();
        stream[at] ^= 1;
        prop_assert!(read(&stream, 100).is_err(), "byte {at}");
    }
}

#[test]
fn changes_keep_deletions() {
    let mut writer = ImageWriter::new(4, 9);
    let changes = BTreeMap::from([
        (Bytes::from_static(b"a"), Some(Bytes::from_static(b"1"))),
        (Bytes::from_static(b"b"), None),
    ]);
    writer.write_changes(changes.clone());
    let (range, found) = read(&writer.take_rest(), 3).unwrap();
    assert_eq!((range, found), (RunRange { first_seq: 4, last_seq: 9 }, changes));
}
