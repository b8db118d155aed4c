//! The pipeline over providers in memory: every loss that the code allows, every fault, and the
//! books kept straight afterwards.

mod around;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};
use tokio::time::Instant;

use super::memory::{Fault, MemoryDirectory, MemoryProviders};
use super::*;
use crate::ids::ProviderId;

const SECOND: Duration = Duration::from_secs(1);

struct World {
    providers: MemoryProviders,
    directory: MemoryDirectory,
    disk: VirtualDisk,
    volume: VolumeId,
    key: VolumeKey,
    code: Code,
}

fn ids(count: u32) -> impl Iterator<Item = ProviderId> {
    (1..=count).map(ProviderId)
}

impl World {
    fn new(s: usize, r: usize, providers: u32) -> Self {
        Self::with_config(s, r, providers, DiskConfig::default())
    }

    fn with_config(s: usize, r: usize, providers: u32, config: DiskConfig) -> Self {
        let code = Code::new(s, r).unwrap();
        let directory = MemoryDirectory::new(code, ids(providers));
        let providers = MemoryProviders::new();
        let (volume, key) = (VolumeId::generate(), VolumeKey::generate());
        let disk = VirtualDisk::new(
            volume,
            key.clone(),
            code,
            config,
            Arc::new(directory.clone()),
            Arc::new(providers.clone()),
        );
        Self { providers, directory, disk, volume, key, code }
    }

    /// A second mount: nothing cached, nothing learnt.
    fn fresh_disk(&self) -> VirtualDisk {
        VirtualDisk::new(
            self.volume,
            self.key.clone(),
            self.code,
            DiskConfig { read_deadline: 5 * SECOND, ..DiskConfig::default() },
            Arc::new(self.directory.clone()),
            Arc::new(self.providers.clone()),
        )
    }

    async fn store(&self, bytes: usize) -> (BlockInfo, Vec<u8>) {
        let content = random_bytes(bytes, bytes as u64);
        let pieces = content.chunks(10_007).map(Bytes::copy_from_slice).collect();
        let mut stored = self.disk.store(pieces, Instant::now() + 60 * SECOND).await.unwrap();
        while let Some(durable) = stored.late.next().await {
            stored.info.durable = durable;
        }
        self.directory.commit(stored.info.clone());
        (stored.info, content)
    }

    /// Makes fragment `index` of the block unusable in one of many ways.
    fn spoil(&self, block: &BlockInfo, index: usize, way: u32) {
        let (at, fragment) = (block.providers[index], block.fragment(index));
        let slot_bytes = block.geometry.slot_bytes();
        match way % 8 {
            0 => self.providers.set_fault(at, Fault::Dead),
            1 => self.providers.set_fault(at, Fault::Silent),
            2 => self.providers.set_fault(at, Fault::Lying),
            3 => self.providers.set_fault(at, Fault::Truncating),
            4 => self.providers.set_fault(at, Fault::Busy),
            5 => self.providers.remove(at, fragment),
            6 => self.providers.change(at, fragment, |body| {
                body.chunks_mut(slot_bytes).for_each(|slot| slot[slot_bytes / 2] ^= 1);
            }),
            _ => self.providers.change(at, fragment, |body| {
                StdRng::seed_from_u64(7).fill_bytes(body);
            }),
        }
    }

    fn check_permits(&self, disk: &VirtualDisk) {
        let all = permits_of(disk.shared.config.read_bytes_max);
        assert_eq!(disk.shared.read_permits.available_permits(), all);
        assert_eq!(disk.shared.rebuild_permits.available_permits(), all);
        let all = permits_of(disk.shared.config.store_bytes_max);
        assert_eq!(disk.shared.store_permits.available_permits(), all);
        assert!(disk.shared.flights.lock().is_empty());
    }
}

fn random_bytes(bytes: usize, seed: u64) -> Vec<u8> {
    let mut content = vec![0; bytes];
    StdRng::seed_from_u64(seed).fill_bytes(&mut content);
    content
}

async fn read_all(disk: &VirtualDisk, block: &BlockInfo) -> Result<Vec<u8>, ReadError> {
    Ok(disk.read(block, 0..block.plaintext_bytes()).await?.concat())
}

#[tokio::test(start_paused = true)]
async fn every_loss_up_to_r_reads_right_and_one_more_is_an_error() {
    for (s, r) in [(1, 1), (1, 2), (2, 1), (2, 2), (3, 2), (4, 2)] {
        let fragments = s + r;
        let world = World::new(s, r, fragments as u32);
        let (block, content) = world.store(s * 40_000 + 123).await;
        for lost in 0u32..1 << fragments {
            for seed in 0..if lost.count_ones() as usize > r { 1 } else { 3 } {
                world.providers.restore(block.id);
                let fresh = world.fresh_disk();
                let mut rng = StdRng::seed_from_u64(u64::from(lost) * 31 + seed);
                for index in (0..fragments).filter(|index| lost >> index & 1 == 1) {
                    world.spoil(&block, index, rng.next_u32());
                }
                let read = read_all(&fresh, &block).await;
                if lost.count_ones() as usize <= r {
                    assert!(read.unwrap() == content, "{s}+{r} lost {lost:b} seed {seed}");
                } else {
                    let error = read.unwrap_err();
                    assert!(
                        matches!(error, ReadError::Lost { .. } | ReadError::Tampered { .. }),
                        "{s}+{r} lost {lost:b}: {error}"
                    );
                    let (ReadError::Lost { losses, .. } | ReadError::Tampered { losses, .. }) =
                        error
                    else {
                        continue;
                    };
                    assert!(losses.iter().all(|loss| lost >> loss.fragment.index & 1 == 1));
                }
                fresh.close().await;
                world.check_permits(&fresh);
                world.providers.heal();
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn damage_is_reported_after_the_reader_was_served_and_only_where_it_is() {
    let world = World::new(4, 2, 6);
    let (block, content) = world.store(300_000).await;
    // A data fragment is gone and a parity that is asked instead lies: both must be named.
    world.spoil(&block, 1, 5);
    world.providers.set_fault(block.providers[4], Fault::Lying);
    let disk = world.fresh_disk();
    assert!(read_all(&disk, &block).await.unwrap() == content);
    disk.close().await;
    let mut damaged: Vec<u8> =
        world.directory.damage().iter().map(|damage| damage.fragment.index).collect();
    damaged.sort_unstable();
    assert_eq!(damaged, [1, 4]);
    world.check_permits(&disk);
}

#[tokio::test(start_paused = true)]
async fn slow_and_dead_providers_are_no_damage() {
    let world = World::new(4, 2, 6);
    let (block, content) = world.store(300_000).await;
    world.providers.set_fault(block.providers[0], Fault::Dead);
    world.providers.set_fault(block.providers[3], Fault::Slow(20 * SECOND));
    let disk = world.fresh_disk();
    let started = Instant::now();
    assert!(read_all(&disk, &block).await.unwrap() == content);
    assert!(started.elapsed() < SECOND, "hedged: {:?}", started.elapsed());
    disk.close().await;
    assert_eq!(world.directory.damage(), []);
    // Learnt: after a few misses nobody waits for it at all.
    for _ in 0..4 {
        let disk = world.fresh_disk();
        for _ in 0..4 {
            let again = disk.read(&block, 0..block.plaintext_bytes()).await.unwrap();
            assert!(again.concat() == content);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_small_read_touches_one_provider_and_one_flight_serves_all_readers() {
    let world = World::new(4, 2, 6);
    let (block, content) = world.store(1 << 20).await;
    let disk = world.fresh_disk();
    let before = world.providers.gets();
    let at = 500_000;
    let reads = (0..100).map(|by| disk.read(&block, at + by..at + by + 4096));
    for (by, read) in futures::future::join_all(reads).await.into_iter().enumerate() {
        assert!(read.unwrap().concat() == content[at + by..at + by + 4096]);
    }
    assert_eq!(world.providers.gets() - before, 1);
    // And the cache serves what comes later.
    disk.read(&block, at..at + 10).await.unwrap();
    assert_eq!(world.providers.gets() - before, 1);
    // A lost small read asks for one slot of s others.
    world.providers.set_fault(block.providers[0], Fault::Dead);
    let before = world.providers.gets();
    assert!(disk.read(&block, 0..100).await.unwrap().concat() == content[..100]);
    assert_eq!(world.providers.gets() - before, 1 + 4);
}

#[tokio::test(start_paused = true)]
async fn a_moved_block_is_located_once_more_before_it_counts_as_damage() {
    let world = World::new(2, 1, 3);
    let (block, content) = world.store(100_000).await;
    // The directory knows better: in the reader's map two places are mixed up.
    let mut stale = block.clone();
    let mut places = block.providers.to_vec();
    places.swap(0, 2);
    stale.providers = places.into();
    let disk = world.fresh_disk();
    assert!(read_all(&disk, &stale).await.unwrap() == content);
    disk.close().await;
    assert_eq!(world.directory.damage(), []);
}

/// A mount that had a file's map from before a drain could not read it any more once the drained
/// provider was off and two others died: nobody said NOT_FOUND, so it never asked again.
#[tokio::test(start_paused = true)]
async fn a_moved_block_is_located_once_more_before_it_counts_as_unreadable() {
    let world = World::new(2, 1, 4);
    let (block, content) = world.store(100_000).await;
    let mut stale = block.clone();
    let other = (1..=4).map(ProviderId).find(|id| !block.providers.contains(id)).unwrap();
    let mut places = block.providers.to_vec();
    places[1] = other;
    stale.providers = places.into();
    world.providers.set_fault(other, Fault::Dead);
    world.providers.set_fault(block.providers[0], Fault::Dead);
    let disk = world.fresh_disk();
    assert!(read_all(&disk, &stale).await.unwrap() == content);
    disk.close().await;
}

/// A reader that came before the last put had arrived reported the fragment as damaged.
#[tokio::test(start_paused = true)]
async fn a_fragment_on_its_way_is_no_damage() {
    let world = World::new(4, 2, 6);
    let (mut block, content) = world.store(100_000).await;
    block.durable.remove(1);
    world.directory.commit(block.clone());
    world.providers.remove(block.providers[1], block.fragment(1));
    let disk = world.fresh_disk();
    assert!(read_all(&disk, &block).await.unwrap() == content);
    disk.close().await;
    assert_eq!(world.directory.damage(), []);
}

#[tokio::test(start_paused = true)]
async fn fragments_swapped_between_blocks_are_found_out() {
    let world = World::new(4, 2, 6);
    let (one, content) = world.store(300_000).await;
    let (other, other_content) = world.store(300_000).await;
    for index in [0, 2] {
        let (at, from) = (one.providers[index], other.providers[index]);
        let foreign = world.providers.body(from, other.fragment(index)).unwrap();
        world.providers.change(at, one.fragment(index), |body| *body = foreign.to_vec());
    }
    let disk = world.fresh_disk();
    assert!(read_all(&disk, &one).await.unwrap() == content);
    assert!(read_all(&disk, &other).await.unwrap() == other_content);
    disk.close().await;
    assert_eq!(world.directory.damage().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_block_is_acknowledged_with_its_margin_and_settles_later() {
    let world = World::new(4, 2, 6);
    world.providers.set_fault(ProviderId(3), Fault::Slow(2 * SECOND));
    let content = Bytes::from(random_bytes(200_000, 1));
    let started = Instant::now();
    let mut stored = world.disk.store(vec![content], started + 30 * SECOND).await.unwrap();
    assert!(started.elapsed() < SECOND);
    assert_eq!(stored.info.durable.count(), 5);
    assert!(margin_holds(world.code, &stored.info.providers, &stored.info.durable));
    assert_eq!(stored.late.next().await, Some(FragmentBits::all(6)));
    assert_eq!(stored.late.next().await, None);
    world.disk.close().await;
    world.check_permits(&world.disk);
    assert!(matches!(
        world.disk.store(vec![Bytes::from_static(b"x")], Instant::now() + SECOND).await,
        Err(StoreError::Closed)
    ));
}

#[tokio::test(start_paused = true)]
async fn full_acknowledgement_waits_for_every_fragment() {
    let config = DiskConfig { acknowledge: Acknowledge::Full, ..DiskConfig::default() };
    let world = World::with_config(4, 2, 6, config);
    world.providers.set_fault(ProviderId(3), Fault::Slow(2 * SECOND));
    let content = Bytes::from(random_bytes(200_000, 1));
    let stored = world.disk.store(vec![content], Instant::now() + 30 * SECOND).await.unwrap();
    assert_eq!(stored.info.durable, FragmentBits::all(6));
}

#[tokio::test(start_paused = true)]
async fn failing_and_silent_places_are_replaced() {
    for fault in [Fault::Dead, Fault::Silent, Fault::Full] {
        let world = World::new(4, 2, 9);
        // The first placement is on providers 7 8 9 1 2 3.
        world.providers.set_fault(ProviderId(8), fault);
        world.providers.set_fault(ProviderId(1), fault);
        let content = Bytes::from(random_bytes(200_000, 1));
        let deadline = Instant::now() + 30 * SECOND;
        let stored = world.disk.store(vec![content.clone()], deadline).await.unwrap();
        assert!(margin_holds(world.code, &stored.info.providers, &stored.info.durable));
        assert!(stored.info.durable.count() >= 5, "{fault:?}");
        world.disk.close().await;
        world.providers.heal();
        let disk = world.fresh_disk();
        assert!(read_all(&disk, &stored.info).await.unwrap() == content);
        world.check_permits(&world.disk);
    }
}

#[tokio::test(start_paused = true)]
async fn without_a_margin_there_is_an_error_and_never_an_acknowledgement() {
    let content = Bytes::from(random_bytes(100_000, 1));
    let store = async |world: &World| {
        let deadline = Instant::now() + 10 * SECOND;
        let error = world.disk.store(vec![content.clone()], deadline).await.unwrap_err();
        assert!(Instant::now() <= deadline + SECOND);
        world.disk.close().await;
        world.check_permits(&world.disk);
        error
    };
    let alone = World::new(4, 2, 1);
    assert!(matches!(store(&alone).await, StoreError::TooFewProviders { providers: 1, .. }));
    let full = World::new(4, 2, 6);
    ids(6).for_each(|id| full.providers.set_fault(id, Fault::Full));
    assert!(matches!(store(&full).await, StoreError::NoSpace { .. }));
    let dead = World::new(4, 2, 6);
    ids(5).for_each(|id| dead.providers.set_fault(id, Fault::Dead));
    assert!(matches!(store(&dead).await, StoreError::TooFewProviders { .. }));
    let silent = World::new(4, 2, 6);
    ids(6).for_each(|id| silent.providers.set_fault(id, Fault::Silent));
    assert!(matches!(
        store(&silent).await,
        StoreError::Timeout { .. } | StoreError::TooFewProviders { .. }
    ));
    let no_lease = World::new(4, 2, 6);
    no_lease.directory.limit_leases(0);
    assert!(matches!(
        store(&no_lease).await,
        StoreError::Placement(PlacementError::NoSpace { .. })
    ));
}

#[tokio::test]
async fn inline_blocks_read_back_and_refuse_wrong_bytes() {
    let world = World::new(4, 2, 6);
    let content = random_bytes(20_000, 4);
    let pieces: Vec<Bytes> = content.chunks(777).map(Bytes::copy_from_slice).collect();
    let block = world.disk.seal_inline(&pieces).unwrap();
    let disk = world.fresh_disk();
    assert!(read_all(&disk, &block.info).await.unwrap() == content);
    assert!(disk.read(&block.info, 19_000..20_001).await.is_err());
    let mut wrong = block.info.clone();
    let mut sealed = wrong.inline.unwrap().to_vec();
    sealed[5] ^= 1;
    wrong.inline = Some(sealed.into());
    assert!(matches!(
        read_all(&world.fresh_disk(), &wrong).await,
        Err(ReadError::InlineTampered { .. })
    ));
    let too_much = Bytes::from(vec![0; crate::seal::INLINE_BYTES_MAX + 1]);
    assert!(matches!(world.disk.seal_inline(&[too_much]), Err(StoreError::InlineBytes { .. })));
}

#[test]
fn bits_go_over_the_wire_and_back() {
    let mut bits = FragmentBits::EMPTY;
    [0, 7, 8, 63, 64, 254].into_iter().for_each(|index| bits.insert(index));
    assert_eq!(bits.to_bytes(255).len(), 32);
    assert_eq!(FragmentBits::from_bytes(&bits.to_bytes(255)), bits);
    assert_eq!(FragmentBits::all(6).to_bytes(6), [0b11_1111]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    #[test]
    fn a_disk_is_a_byte_array(seed: u64, s in 1usize..6, r in 0usize..4) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .start_paused(true)
            .build()
            .unwrap();
        runtime.block_on(async {
            let mut rng = StdRng::seed_from_u64(seed);
            let config = DiskConfig { cache_bytes: 1 << 20, ..DiskConfig::default() };
            let world = World::with_config(s, r, (s + r) as u32, config);
            let mut blocks: Vec<(BlockInfo, Vec<u8>)> = Vec::new();
            for _ in 0..4 {
                let bytes_max = world.code.block_bytes_max();
                let most = [5000, 200_000, bytes_max][rng.random_range(0..3)];
                let bytes = rng.random_range(1..=most);
                blocks.push(world.store(bytes).await);
            }
            // Within the fault budget of the code: r providers in trouble at any time.
            for _ in 0..30 {
                world.providers.heal();
                for _ in 0..r {
                    let faults = [Fault::Dead, Fault::Silent, Fault::Lying, Fault::Truncating];
                    let at = ProviderId(rng.random_range(1..=(s + r) as u32));
                    world.providers.set_fault(at, faults[rng.random_range(0..4)]);
                }
                let (block, content) = &blocks[rng.random_range(0..blocks.len())];
                let start = rng.random_range(0..content.len());
                let end = rng.random_range(start + 1..=content.len());
                let around = match rng.random_range(0..4) {
                    0 => Around::Nothing,
                    1 => Around::Bytes(32 << 10),
                    2 => Around::Bytes(64 << 10),
                    _ => Around::Neighbours,
                };
                let pieces = world.disk.read_around(block, start..end, around).await.unwrap();
                assert!(pieces.concat() == content[start..end]);
                world.disk.prefetch(block, start..end);
                // What it asked under these faults must not meet the next ones: together they
                // could be more than r.
                while !world.disk.shared.flights.lock().is_empty() {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            }
            world.disk.close().await;
            world.check_permits(&world.disk);
        });
    }
}

#[tokio::test(start_paused = true)]
async fn a_liar_found_among_the_helpers_is_replaced_by_an_honest_one() {
    // A row that had s slots, lost one to a liar and got another was once taken for tried.
    let world = World::new(4, 2, 6);
    let (block, content) = world.store(1 << 20).await;
    world.providers.set_fault(block.providers[2], Fault::Lying);
    world.providers.set_fault(block.providers[3], Fault::Lying);
    let disk = world.fresh_disk();
    let range = 600_000..600_001;
    assert!(disk.read(&block, range.clone()).await.unwrap().concat() == content[range]);
    disk.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_that_share_one_cpu_job_do_not_wait_for_each_other_for_ever() {
    // A gather that rebuilt once waited for the CPU while answers it did not poll held the permits.
    let config = DiskConfig {
        cpu_jobs_max: 1,
        cache_bytes: 1 << 20,
        read_bytes_max: 16 << 20,
        hedge_after: Duration::ZERO..Duration::from_micros(50),
        ..DiskConfig::default()
    };
    let world = World::with_config(4, 2, 6, config);
    let mut blocks = Vec::new();
    for _ in 0..4 {
        blocks.push(world.store(world.code.block_bytes_max()).await);
    }
    world.providers.set_fault(ProviderId(2), Fault::Lying);
    let reading = async {
        for _ in 0..5 {
            let reads = blocks.iter().map(|(block, _)| read_all(&world.disk, block));
            let read = futures::future::join_all(reads).await;
            for (read, (_, content)) in read.into_iter().zip(&blocks) {
                assert!(read.unwrap() == *content);
            }
        }
    };
    tokio::time::timeout(60 * SECOND, reading).await.expect("it goes on");
    world.disk.close().await;
    world.check_permits(&world.disk);
}

/// A line of 1 Mbit/s used to store nothing for ever: each block had 45 seconds from the moment it
/// was handed over, waiting for the blocks before it included, and each fragment that took three
/// seconds was sent to another provider as well, up to five times.
#[tokio::test(start_paused = true)]
async fn a_slow_line_is_waited_for_and_its_bytes_are_sent_once() {
    for (rate, blocks) in [(1 << 17, 4), (1 << 20, 12), (1 << 24, 12)] {
        let world = World::new(4, 2, 9);
        world.providers.limit_line(rate);
        let far = Instant::now() + 7200 * SECOND;
        let content = Bytes::from(random_bytes(world.code.block_bytes_max(), 1));
        let stores = (0..blocks).map(|_| world.disk.store(vec![content.clone()], far));
        for stored in futures::future::join_all(stores).await {
            let mut stored = stored.unwrap();
            while stored.late.next().await.is_some() {}
        }
        let geometry = crate::geometry::BlockGeometry::new(world.code, content.len()).unwrap();
        let once = (blocks * world.code.fragments() * geometry.fragment_bytes()) as u64;
        assert_eq!(world.providers.put_bytes(), once, "{rate} bytes a second");
        world.disk.close().await;
        world.check_permits(&world.disk);
    }
}

/// Patience with the own line is none with a silent provider: its fragments go elsewhere.
#[tokio::test(start_paused = true)]
async fn a_silent_provider_on_a_slow_line_is_replaced() {
    let world = World::new(4, 2, 9);
    world.providers.limit_line(1 << 20);
    world.providers.set_fault(ProviderId(3), Fault::Silent);
    world.providers.set_fault(ProviderId(7), Fault::Silent);
    let far = Instant::now() + 7200 * SECOND;
    let content = Bytes::from(random_bytes(world.code.block_bytes_max(), 1));
    let started = Instant::now();
    for _ in 0..6 {
        let stored = world.disk.store(vec![content.clone()], far).await.unwrap();
        assert!(stored.info.durable.count() >= 5);
    }
    // Six seconds a block and what patience costs.
    assert!(started.elapsed() < 6 * 40 * SECOND, "{:?}", started.elapsed());
    world.disk.close().await;
    world.check_permits(&world.disk);
}

/// A line that is dead is told after a bounded time, whatever the caller's limit.
#[tokio::test(start_paused = true)]
async fn nothing_getting_through_is_an_error_after_a_bounded_time() {
    let world = World::new(4, 2, 6);
    ids(6).for_each(|id| world.providers.set_fault(id, Fault::Silent));
    let far = Instant::now() + 7200 * SECOND;
    let content = Bytes::from(random_bytes(world.code.block_bytes_max(), 1));
    let stores = (0..20).map(|_| world.disk.store(vec![content.clone()], far));
    let started = Instant::now();
    for stored in futures::future::join_all(stores).await {
        assert!(stored.is_err());
    }
    assert!(started.elapsed() < 3600 * SECOND, "{:?}", started.elapsed());
    world.disk.close().await;
    world.check_permits(&world.disk);
}

/// Closing used to wait for the late fragment on a silent provider: an unmount of a minute with
/// everything durable.
#[tokio::test(start_paused = true)]
async fn closing_waits_for_no_silent_provider() {
    let world = World::new(4, 2, 6);
    world.providers.set_fault(ProviderId(2), Fault::Silent);
    let started = Instant::now();
    let content = Bytes::from(random_bytes(100_000, 1));
    let stored = world.disk.store(vec![content.clone()], started + 60 * SECOND).await.unwrap();
    world.directory.commit(stored.info.clone());
    // One that nobody answers, and a read of what only silent ones have.
    ids(6).for_each(|id| world.providers.set_fault(id, Fault::Silent));
    let disk = world.disk.clone();
    let far = started + 7200 * SECOND;
    let storing = tokio::spawn(async move { disk.store(vec![content], far).await });
    let (disk, info) = (world.disk.clone(), stored.info.clone());
    let reading = tokio::spawn(async move { disk.read(&info, 0..1).await });
    tokio::time::sleep(Duration::from_millis(1)).await;
    let closed = Instant::now();
    world.disk.close().await;
    assert!(closed.elapsed() <= 2 * SECOND, "{:?}", closed.elapsed());
    assert_eq!(storing.await.unwrap().unwrap_err(), StoreError::Closed);
    assert_eq!(reading.await.unwrap().unwrap_err(), ReadError::Closed);
    world.check_permits(&world.disk);
}

/// The network gone for two seconds, or three providers that restart, used to be EIO at once.
#[tokio::test(start_paused = true)]
async fn a_moment_without_providers_is_waited_for_and_a_long_one_only_once() {
    let world = World::new(4, 2, 6);
    let (block, content) = world.store(300_000).await;
    let away =
        |count| (1..=count).for_each(|id| world.providers.set_fault(ProviderId(id), Fault::Dead));
    for moment in [Duration::from_millis(300), 2 * SECOND, 20 * SECOND] {
        away(6);
        let disk = VirtualDisk::new(
            world.volume,
            world.key.clone(),
            world.code,
            DiskConfig::default(),
            Arc::new(world.directory.clone()),
            Arc::new(world.providers.clone()),
        );
        let healing = world.providers.clone();
        let heal = tokio::spawn(async move {
            tokio::time::sleep(moment).await;
            healing.heal();
        });
        assert!(read_all(&disk, &block).await.unwrap() == content, "away for {moment:?}");
        heal.await.unwrap();
    }
    // Longer than a read may take: an error, and from then on at once.
    away(3);
    let disk = world.fresh_disk();
    let started = Instant::now();
    assert!(matches!(read_all(&disk, &block).await, Err(ReadError::Lost { have: 3, .. })));
    assert!(started.elapsed() >= 2 * SECOND && started.elapsed() <= 6 * SECOND);
    tokio::time::sleep(10 * SECOND).await;
    let again = Instant::now();
    assert!(read_all(&disk, &block).await.is_err());
    assert!(again.elapsed() < SECOND, "{:?}", again.elapsed());
    // They are asked all the same, and found when they are back.
    world.providers.heal();
    assert!(read_all(&disk, &block).await.unwrap() == content);
}

/// The block of a dead provider, repaired elsewhere: the mount rebuilt its pages from parity at
/// each cold read for as long as it lived.
#[tokio::test(start_paused = true)]
async fn the_new_place_of_a_repaired_fragment_is_asked_for_after_a_read() {
    let world = World::new(4, 2, 6);
    let (block, content) = world.store(300_000).await;
    let asked = || world.directory.located();
    world.providers.set_fault(block.providers[0], Fault::Dead);
    for _ in 0..5 {
        let disk = world.fresh_disk();
        let before = asked();
        assert!(read_all(&disk, &block).await.unwrap() == content);
        tokio::time::sleep(Duration::from_millis(10)).await;
        assert_eq!(asked(), before + 1);
        disk.close().await;
    }
}

/// What was read lies on the disk of this machine: the next mount needs no provider for it, and believes
/// nothing that lies there.
#[tokio::test]
async fn what_was_read_is_read_again_without_the_swarm() {
    let dir = tempfile::tempdir().unwrap();
    let open = || SealedPages::open(dir.path(), SEALED_PAGES_BYTES_MIN).unwrap();
    let world = World::new(4, 2, 6);
    let (block, content) = world.store(300_000).await;
    let (other, other_content) = world.store(200_000).await;

    // One data fragment is away: its pages are rebuilt, and kept as well.
    world.providers.set_fault(block.providers[1], Fault::Dead);
    let first = world.fresh_disk().keeping(open());
    assert!(read_all(&first, &block).await.unwrap() == content);
    let half = first.read(&other, 0..100_000).await.unwrap().concat();
    assert!(half == other_content[..100_000]);
    first.close().await;
    drop(first);

    (1..=6).for_each(|at| world.providers.set_fault(ProviderId(at), Fault::Dead));
    let second = world.fresh_disk().keeping(open());
    assert!(read_all(&second, &block).await.unwrap() == content, "nobody else is there");
    let half = second.read(&other, 0..100_000).await.unwrap().concat();
    assert!(half == other_content[..100_000]);
    assert!(read_all(&second, &other).await.is_err(), "the rest was never read");
    world.check_permits(&second);
    second.close().await;
    drop(second);

    // A bit flips in every page: all of it comes from the swarm again, and is kept anew.
    let path = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().path());
    for path in path.filter(|path| path.extension().is_some_and(|kind| kind == "pages")) {
        let mut bytes = std::fs::read(&path).unwrap();
        bytes.iter_mut().step_by(1000).for_each(|byte| *byte ^= 4);
        std::fs::write(&path, bytes).unwrap();
    }
    let third = world.fresh_disk().keeping(open());
    assert!(read_all(&third, &block).await.is_err(), "wrong bytes are not there");
    (1..=6).for_each(|at| world.providers.set_fault(ProviderId(at), Fault::None));
    assert!(read_all(&third, &block).await.unwrap() == content);
    third.close().await;
    drop(third);
    (1..=6).for_each(|at| world.providers.set_fault(ProviderId(at), Fault::Dead));
    let last = world.fresh_disk().keeping(open());
    assert!(read_all(&last, &block).await.unwrap() == content);
    last.close().await;
}
