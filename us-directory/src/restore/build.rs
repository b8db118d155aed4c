//! Building the data directory: the image as checkpoint, the records as journal, and a last commit
//! that makes the state a new incarnation.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail};
use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use us_core::disk::{
    BlockDirectory, BlockInfo, Damage, DiskConfig, LinksConfig, PlacementError, PlacementLease,
    ProviderLinks, VirtualDisk,
};
use us_core::geometry::Code;
use us_core::ids::BlockId;
use us_core::tls::Identity;
use us_proto::v1::{ProviderEntry, ProviderTable};

use crate::image::ImageReader;
use crate::keys;
use crate::records::{ClusterRecord, ProviderRecord, VolumeRecord, decode, encode};
use crate::recovery::{Manifest, RecoveryKit, RootRecord, image_key, image_volume};
use crate::store::embedded::{CheckpointBuilder, EmbeddedOptions, EmbeddedStore};
use crate::store::journal::{FileTag, JournalFile, decode_body, encode_record};
use crate::store::{Durability, KeyRange, MetaStore, Seq, StoreError, View, WriteBatch};

/// How far counters jump, so that nothing the lost directory gave out is given again.
const RUNS_JUMP: u64 = 1 << 10;
const SESSIONS_JUMP: u64 = 1 << 16;
const PROVIDERS_JUMP: u32 = 1 << 10;
const BIRTHS_JUMP: u64 = 1 << 32;
const INODES_JUMP: u64 = 1 << 32;
const IMAGE_RUNS_JUMP: u64 = 1 << 10;
/// Incarnations may have followed a backup.
const BACKUP_INCARNATIONS_JUMP: u64 = 1 << 10;
/// Bytes of records appended to the journal at once.
const JOURNAL_WRITE_BYTES: usize = 4 << 20;

/// What was built.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Rebuilt {
    /// The last commit of the lost directory that is in it.
    pub last_seq: Seq,
    /// The new incarnation.
    pub incarnation: u64,
    /// Volumes, the directory's own not counted.
    pub volumes: u64,
    /// Providers that are to be asked after what they hold.
    pub providers: u64,
    /// Sessions that may go on.
    pub sessions: u64,
}

/// A store in the making.
#[derive(Debug)]
pub struct Builder {
    dir: PathBuf,
    checkpoint: CheckpointBuilder,
}

impl Builder {
    /// Begins the store of the data directory `data`.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn new(data: &Path) -> Result<Self, StoreError> {
        let dir = data.join("store");
        let checkpoint = CheckpointBuilder::create(&dir)?;
        Ok(Self { dir, checkpoint })
    }

    /// Adds a piece of the image.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn image(&mut self, batch: WriteBatch) -> Result<(), StoreError> {
        self.checkpoint.apply(batch)
    }

    /// Ends a store that was filled from a backup of `cluster` at commit `seq`.
    ///
    /// # Errors
    /// When the state is none, or the disk fails.
    pub fn finish_backup(self, seq: Seq, cluster: [u8; 16]) -> anyhow::Result<Rebuilt> {
        self.checkpoint.finish(seq, 1)?;
        renew(&self.dir, cluster, &Renewal { lossy: true, manifest: None })
    }

    /// Ends a store that was filled from a root's image: the records follow.
    ///
    /// # Errors
    /// When the state is none, or the disk fails.
    pub fn finish_records(
        self,
        manifest: &Manifest,
        records: Vec<(Seq, Bytes)>,
        lossy: bool,
    ) -> anyhow::Result<Rebuilt> {
        let incarnation = manifest.incarnation + 1;
        self.checkpoint.finish(manifest.covers_seq, incarnation)?;
        write_journal(&self.dir, incarnation, &records)?;
        let cluster = manifest.cluster[..].try_into().context("the root names no cluster")?;
        renew(&self.dir, cluster, &Renewal { lossy, manifest: Some(manifest) })
    }
}

fn write_journal(dir: &Path, incarnation: u64, records: &[(Seq, Bytes)]) -> anyhow::Result<()> {
    let Some((first_seq, _)) = records.first() else { return Ok(()) };
    let salt = getrandom::u64().context("the system gives no randomness")?;
    let tag = FileTag { incarnation, salt };
    let mut file = JournalFile::create(dir, tag, *first_seq)?;
    let mut buffer = Vec::new();
    for (seq, body) in records {
        encode_record(&mut buffer, tag, *seq, 0, body);
        if buffer.len() >= JOURNAL_WRITE_BYTES {
            file.append(&buffer)?;
            buffer.clear();
        }
    }
    file.append(&buffer)?;
    Ok(file.finish()?)
}

/// What the last commit must know.
struct Renewal<'m> {
    /// Something that was durable may be missing: no session goes on.
    lossy: bool,
    /// The root the state was rebuilt from; none for a backup.
    manifest: Option<&'m Manifest>,
}

/// Makes the state in `dir` a new incarnation.
fn renew(dir: &Path, cluster: [u8; 16], renewal: &Renewal<'_>) -> anyhow::Result<Rebuilt> {
    let mut store = EmbeddedStore::open(dir, EmbeddedOptions::default(), Arc::new(|_| {}))?;
    let last_seq = store.facts().seq;
    let mut batch = WriteBatch::new();
    let mut rebuilt = Rebuilt { last_seq, ..Rebuilt::default() };
    let key = keys::cluster();
    let Some(value) = store.get(&key)? else {
        bail!("what was recovered is no directory's state: its counters are missing");
    };
    let mut counters: ClusterRecord = decode(&key, &value)?;
    if counters.cluster != cluster[..] {
        bail!("what was recovered is the state of another cluster");
    }
    let jump = if renewal.manifest.is_some() { 1 } else { BACKUP_INCARNATIONS_JUMP };
    let seen = renewal.manifest.map_or(0, |manifest| manifest.incarnation);
    counters.incarnation = counters.incarnation.max(seen) + jump;
    counters.run += RUNS_JUMP;
    counters.next_session += SESSIONS_JUMP;
    counters.next_provider += PROVIDERS_JUMP;
    counters.births_end += BIRTHS_JUMP;
    // Blocks that were committed after what is restored here have births from the floor on.
    counters.spare_births(counters.births_end);
    if renewal.lossy {
        counters.sessions_lost_below = counters.next_session;
    }
    rebuilt.incarnation = counters.incarnation;
    batch.put(key, encode(&counters));
    each(&store, b'v', |key, mut record: VolumeRecord| {
        rebuilt.volumes += u64::from(!record.name.starts_with('.') && !record.deleting);
        record.next_ino += INODES_JUMP;
        batch.put(key, encode(&record));
    })?;
    each(&store, b'y', |key, mut record: ProviderRecord| {
        rebuilt.providers += 1;
        record.suspect = true;
        batch.put(key, encode(&record));
    })?;
    each(&store, b's', |_, record: crate::records::SessionRecord| {
        rebuilt.sessions += u64::from(!record.fenced && !renewal.lossy);
    })?;
    let key = keys::root();
    let root = store.get(&key)?.map(|value| decode(&key, &value)).transpose()?;
    batch.put(key, encode(&renewed_root(root.unwrap_or_default(), renewal.manifest)));
    store.commit(batch, Durability::Durable)?;
    // Closing syncs; a failure is found by opening again.
    drop(store);
    let store = EmbeddedStore::open(dir, EmbeddedOptions::default(), Arc::new(|_| {}))?;
    if store.facts().seq <= last_seq {
        bail!("the restored store did not keep its last commit: the disk is not to be trusted");
    }
    Ok(rebuilt)
}

/// The state's own root, where it is the one it was rebuilt from; else there is none until the next
/// image.
fn renewed_root(root: RootRecord, manifest: Option<&Manifest>) -> RootRecord {
    let numbers = |runs: &[crate::recovery::ImageRun]| -> Vec<u64> {
        runs.iter().map(|run| run.number).collect()
    };
    let sequence = root.sequence.max(manifest.map_or(0, |manifest| manifest.sequence)) + 1;
    let same = manifest.is_some_and(|manifest| {
        !root.void
            && root.covers_seq == manifest.covers_seq
            && numbers(&root.runs) == numbers(&manifest.runs)
    });
    let next_run = root.next_run + IMAGE_RUNS_JUMP;
    if same {
        return RootRecord { sequence, next_run, ..root };
    }
    let mut superseded = root.superseded;
    superseded.extend(root.runs);
    RootRecord { sequence, next_run, superseded, void: true, ..RootRecord::default() }
}

fn each<T: prost::Message + Default>(
    view: &dyn View,
    tag: u8,
    mut sink: impl FnMut(Bytes, T),
) -> Result<(), StoreError> {
    let mut range = KeyRange::prefix(&keys::tag(&keys::CLUSTER, tag));
    loop {
        let pairs = view.scan(&range, 1024)?;
        let Some((last, _)) = pairs.last() else { return Ok(()) };
        range = range.after(last);
        for (key, value) in pairs {
            let record = decode(&key, &value)?;
            sink(key, record);
        }
    }
}

/// Where providers are: as the root says, and as later records say.
///
/// # Errors
/// [`StoreError::Value`] when a record makes no sense.
pub fn addresses(
    manifest: &Manifest,
    records: &[(Seq, Bytes)],
) -> Result<ProviderTable, StoreError> {
    let mut table: std::collections::BTreeMap<u32, ProviderEntry> = manifest
        .providers
        .iter()
        .map(|known| {
            let (provider, address) = (known.provider, known.address.clone());
            let key_hash = known.key_hash.clone();
            (provider, ProviderEntry { provider, address, key_hash, reachable: true })
        })
        .collect();
    let prefix = keys::tag(&keys::CLUSTER, b'y');
    for (seq, body) in records {
        let batch = decode_body(body).ok_or_else(|| StoreError::Value {
            key: format!("record {seq}"),
            detail: "it is no batch".to_owned(),
        })?;
        for (key, value) in batch.range(&KeyRange::prefix(&prefix)) {
            let number = key[prefix.len()..].try_into().map_or(0, u32::from_be_bytes);
            let Some(value) = value else { continue };
            let record: ProviderRecord = decode(key, value)?;
            let (address, key_hash) = (record.address, record.key_hash);
            let entry = ProviderEntry { provider: number, address, key_hash, reachable: true };
            table.insert(number, entry);
        }
    }
    Ok(ProviderTable { providers: table.into_values().collect(), whole: true })
}

/// Nobody to ask: the directory is what is being rebuilt.
struct NoDirectory;

impl BlockDirectory for NoDirectory {
    fn lease_placement(&self) -> BoxFuture<'_, Result<PlacementLease, PlacementError>> {
        let detail = "a restore writes no blocks".to_owned();
        async { Err(PlacementError::Ended { detail }) }.boxed()
    }

    fn locate(&self, _block: BlockId) -> BoxFuture<'_, Option<BlockInfo>> {
        async { None }.boxed()
    }

    fn report(&self, damage: Damage) {
        tracing::warn!(?damage, "a fragment of the image");
    }
}

/// Reads the image that a root names into the builder.
///
/// # Errors
/// When a block cannot be read or a run is not whole.
pub async fn read_image(
    kit: &RecoveryKit,
    identity: &Identity,
    manifest: &Manifest,
    table: ProviderTable,
    builder: &mut Builder,
) -> anyhow::Result<()> {
    let Some(first) = manifest.runs.iter().flat_map(|run| &run.blocks).next() else {
        return Ok(());
    };
    let cluster = kit.cluster();
    let code = Code::new(first.s as usize, first.r as usize)?;
    let links = ProviderLinks::new(identity.clone(), LinksConfig::default());
    links.update(&table);
    let disk = VirtualDisk::new(
        image_volume(cluster.as_bytes()),
        image_key(kit.secret(), &cluster),
        code,
        DiskConfig { cache_bytes: 1 << 20, ..DiskConfig::default() },
        Arc::new(NoDirectory),
        Arc::new(links),
    );
    for run in &manifest.runs {
        let mut reader = ImageReader::new();
        for (index, block) in run.blocks.iter().enumerate() {
            let of = || format!("block {} of {} of the image", index + 1, run.blocks.len());
            let info = block.info().with_context(of)?;
            let bytes = info.plaintext_bytes();
            for piece in disk.read(&info, 0..bytes).await.with_context(of)? {
                for batch in reader.push(&piece).with_context(of)? {
                    builder.image(batch)?;
                }
            }
        }
        let range = reader.end()?;
        if (range.first_seq, range.last_seq) != (run.first_seq, run.last_seq) {
            bail!("run {} of the image is another than the root says", run.number);
        }
    }
    disk.close().await;
    Ok(())
}
