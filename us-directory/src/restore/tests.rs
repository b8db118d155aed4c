//! Whatever a directory did, image and records give it back.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use proptest::prelude::*;
use us_core::tls::CertificateAuthority;
use us_proto::v1::StoreRecords;

use super::*;
use crate::image::{ImageReader, ImageWriter};
use crate::keys;
use crate::records::{ClusterRecord, ProviderRecord, VolumeRecord, decode, encode};
use crate::recovery::{ImageRun, Manifest, ManifestProvider, RootRecord, RunLabel, RunSeal};
use crate::restore::build::Builder;
use crate::restore::collect::open_records;
use crate::store::embedded::{EmbeddedOptions, EmbeddedStore};
use crate::store::journal::decode_body;
use crate::store::{Durability, KeyRange, MetaStore, View};

const CLUSTER: [u8; 16] = [7; 16];
/// Small, and yet so few files (each checkpoint begins one) that all records stay readable: more than
/// `FILES_KEPT_MAX` behind the checkpoint go although somebody wants them, and then there is no delta.
const SMALL: EmbeddedOptions =
    EmbeddedOptions { cache_bytes: 1 << 20, journal_file_bytes: 256 << 10, overlay_keys: 120 };
const DATA: &[u8] = b"some volume's id";

type Model = BTreeMap<Bytes, Bytes>;

fn contents(view: &dyn View) -> Model {
    let mut range = KeyRange::prefix(DATA);
    let mut all = Model::new();
    loop {
        let page = view.scan(&range, 7).unwrap();
        let Some((last, _)) = page.last() else { return all };
        range = range.after(last);
        all.extend(page);
    }
}

fn first_batch() -> WriteBatch {
    let mut batch = WriteBatch::new();
    let cluster = ClusterRecord {
        cluster: CLUSTER.to_vec().into(),
        incarnation: 1,
        run: 1,
        next_session: 5,
        next_provider: 3,
        births_end: 100,
        ..Default::default()
    };
    batch.put(keys::cluster(), encode(&cluster));
    let volume = us_core::ids::VolumeId::from_bytes([3; 16]);
    let record = VolumeRecord { name: "v".into(), s: 4, r: 2, next_ino: 9, ..Default::default() };
    batch.put(keys::volume(&volume), encode(&record));
    let provider = ProviderRecord { address: "old:1".into(), ..Default::default() };
    batch.put(keys::provider(1), encode(&provider));
    let root = RootRecord { sequence: 1, next_run: 1, ..RootRecord::default() };
    batch.put(keys::root(), encode(&root));
    batch
}

fn batch(writes: &[(u8, Option<Vec<u8>>)]) -> WriteBatch {
    let mut batch = WriteBatch::new();
    for (key, value) in writes {
        let key = Bytes::from([DATA, &[*key]].concat());
        match value {
            Some(value) => batch.put(key, value.clone().into()),
            None => batch.delete(key),
        }
    }
    batch
}

fn writes() -> impl Strategy<Value = Vec<Vec<(u8, Option<Vec<u8>>)>>> {
    let write = (any::<u8>(), prop::option::of(prop::collection::vec(any::<u8>(), 0..60)));
    prop::collection::vec(prop::collection::vec(write, 1..8), 1..50)
}

/// Bytes of a run, as the image's job makes them.
fn run_of(store: &EmbeddedStore, first_seq: u64, last_seq: u64) -> Vec<u8> {
    let mut writer = ImageWriter::new(first_seq, last_seq);
    let mut stream = Vec::new();
    if first_seq == 0 {
        let sink = |piece: Bytes| {
            stream.extend_from_slice(&piece);
            true
        };
        writer.write_view(&*store.snapshot(), 300, sink).unwrap();
        return stream;
    }
    let mut changes = BTreeMap::new();
    for (seq, body) in store.records(first_seq, usize::MAX).unwrap() {
        if seq <= last_seq {
            changes.extend(decode_body(&body).unwrap());
        }
    }
    writer.write_changes(changes);
    writer.take_rest().to_vec()
}

fn wait_written(store: &EmbeddedStore) {
    let seq = store.facts().seq;
    let late = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while store.records(seq, 1).unwrap().is_empty() {
        assert!(std::time::Instant::now() < late, "record {seq} is not written");
        std::thread::yield_now();
    }
}

fn manifest(covers_seq: u64, runs: Vec<ImageRun>) -> Manifest {
    let provider = ManifestProvider { provider: 1, address: "old:1".into(), ..Default::default() };
    Manifest {
        cluster: CLUSTER.to_vec().into(),
        incarnation: 1,
        sequence: 4,
        covers_seq,
        runs,
        providers: vec![provider],
    }
}

fn open(data: &std::path::Path) -> EmbeddedStore {
    let options = EmbeddedOptions::default();
    EmbeddedStore::open(&data.join("store"), options, Arc::new(|_| {})).unwrap()
}

fn cluster_of(store: &dyn View) -> ClusterRecord {
    let key = keys::cluster();
    decode(&key, &store.get(&key).unwrap().unwrap()).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn image_and_records_give_the_store_back(
        steps in writes(), base_at in 0usize..50, delta_at in 0usize..50, has_image: bool,
    ) {
        let lost = tempfile::tempdir().unwrap();
        let mut store = EmbeddedStore::open(lost.path(), SMALL, Arc::new(|_| {})).unwrap();
        store.commit(first_batch(), Durability::Applied).unwrap();
        let mut runs: Vec<(ImageRun, Vec<u8>)> = Vec::new();
        for (step, writes) in steps.iter().enumerate() {
            store.commit(batch(writes), Durability::Durable).unwrap();
            let covers = runs.last().map_or(0, |(run, _)| run.last_seq);
            let first_seq = match runs.len() {
                0 if has_image && step == base_at => 0,
                1 if step >= delta_at => covers + 1,
                _ => continue,
            };
            wait_written(&store);
            let last_seq = store.facts().seq;
            store.keep_records(last_seq + 1).unwrap();
            let number = runs.len() as u64 + 1;
            let run = ImageRun { number, first_seq, last_seq, ..ImageRun::default() };
            let bytes = run_of(&store, first_seq, last_seq);
            runs.push((run, bytes));
        }
        wait_written(&store);
        let covers = runs.last().map_or(0, |(run, _)| run.last_seq);
        let records = store.records(covers + 1, usize::MAX).unwrap();
        prop_assert_eq!(records.len() as u64, store.facts().seq - covers, "kept as long as wanted");

        let data = tempfile::tempdir().unwrap();
        let mut builder = Builder::new(data.path()).unwrap();
        for (_, bytes) in &runs {
            let mut reader = ImageReader::new();
            for piece in bytes.chunks(97) {
                for batch in reader.push(piece).unwrap() {
                    builder.image(batch).unwrap();
                }
            }
            reader.end().unwrap();
        }
        let manifest = manifest(covers, runs.into_iter().map(|(run, _)| run).collect());
        let rebuilt = builder.finish_records(&manifest, records, false).unwrap();
        prop_assert_eq!(rebuilt.last_seq, store.facts().seq);
        prop_assert_eq!((rebuilt.volumes, rebuilt.providers, rebuilt.incarnation), (1, 1, 2));
        let restored = open(data.path());
        prop_assert_eq!(contents(&restored), contents(&store));
        let counters = cluster_of(&restored);
        prop_assert!(counters.next_session > 5 && counters.births_end > 1 << 31);
        prop_assert!(counters.next_provider > 3 && counters.run > 1 && counters.incarnation == 2);
        let key = keys::provider(1);
        let provider: ProviderRecord = decode(&key, &restored.get(&key).unwrap().unwrap()).unwrap();
        prop_assert!(provider.suspect);
        prop_assert_eq!(restored.first_record().max(covers + 1), covers + 1, "a copy can catch up");
    }
}

fn kit() -> RecoveryKit {
    RecoveryKit::new(CertificateAuthority::create().unwrap())
}

fn sealed(
    kit: &RecoveryKit,
    label: &RunLabel,
    seqs: std::ops::RangeInclusive<u64>,
) -> StoreRecords {
    let seal = RunSeal::new(kit.secret(), label.clone());
    let parts = seqs.flat_map(|seq| seal.seal(seq, &seq.to_le_bytes())).collect();
    StoreRecords { parts, ..label.message() }
}

#[test]
fn what_one_provider_has_damaged_another_gives() {
    let kit = kit();
    let label = RunLabel { incarnation: 1, run: 1, first_seq: 1, salt: [4; 16] };
    let mut one = sealed(&kit, &label, 1..=4);
    let mut flipped = one.parts[1].sealed.to_vec();
    flipped[0] ^= 1;
    one.parts[1].sealed = flipped.into();
    let two = sealed(&kit, &label, 2..=5);
    let merged = merge(open_records(&kit, [&one].into_iter()), 0);
    assert_eq!(merged.gap.unwrap().first, 2, "alone it has a gap");
    let merged = merge(open_records(&kit, [&one, &two].into_iter()), 0);
    assert_eq!((merged.records.len(), merged.gap), (5, None));
    // With another key nothing opens.
    assert!(open_records(&self::kit(), [&one, &two].into_iter()).is_empty());
}

#[test]
fn later_addresses_count() {
    let provider = ProviderRecord { address: "new:2".into(), ..Default::default() };
    let mut batch = WriteBatch::new();
    batch.put(keys::provider(1), encode(&provider));
    let body = Bytes::from(crate::store::journal::encode_body(&batch));
    let table = build::addresses(&manifest(0, Vec::new()), &[(1, body)]).unwrap();
    assert_eq!(table.providers[0].address, "new:2");
}

#[tokio::test]
async fn a_backup_of_a_stopped_directory_gives_it_back() {
    let root = tempfile::tempdir().unwrap();
    let lost = root.path().join("lost");
    crate::run::init(&lost).unwrap();
    let cluster = RecoveryKit::load(&recovery_key(&lost)).unwrap().cluster();
    let mut store = open(&lost);
    let mut first = first_batch();
    let counters = ClusterRecord {
        cluster: cluster.as_bytes().to_vec().into(),
        incarnation: 3,
        next_session: 5,
        ..Default::default()
    };
    first.put(keys::cluster(), encode(&counters));
    store.commit(first, Durability::Durable).unwrap();
    store.commit(batch(&[(1, Some(vec![1; 100])), (2, None)]), Durability::Durable).unwrap();
    let wanted = contents(&store);
    drop(store);
    let file = root.path().join("backup");
    let made = crate::backup::backup(&lost, &file).await.unwrap();
    assert!(!made.running);
    assert!(crate::backup::backup(&lost, &file).await.is_err(), "it replaces nothing");

    let key = root.path().join("key");
    std::fs::copy(recovery_key(&lost), &key).unwrap();
    let data = root.path().join("found");
    let source = Source::Backup(file);
    let options =
        RestoreOptions { data: data.clone(), recovery_key: key, source, accept_loss: false };
    let stranger = root.path().join("stranger");
    kit().save(&stranger).unwrap();
    let wrong = RestoreOptions { recovery_key: stranger, ..options.clone() };
    let error = restore(&wrong).await.unwrap_err();
    assert!(format!("{error:#}").contains("of cluster"), "{error:#}");
    let restored = restore(&options).await.unwrap();
    assert_eq!(restored.rebuilt.incarnation, 3 + (1 << 10));
    assert!(restore(&options).await.is_err(), "only into an empty directory");
    let store = open(&data);
    assert_eq!(contents(&store), wanted);
    assert!(cluster_of(&store).sessions_lost_below > 5, "no session goes on from a backup");
    assert!(crate::run::is_initialised(&data) && recovery_key(&data).exists());
}
