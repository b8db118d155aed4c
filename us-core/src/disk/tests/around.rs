//! Reads that bring along what lies around them.

use super::*;

/// Pages of 16 KiB: four of a fragment come at once and are kept, and no fifth.
#[tokio::test(start_paused = true)]
async fn a_read_brings_along_what_lies_around_it() {
    let world = World::new(4, 2, 6);
    let (block, content) = world.store(world.code.block_bytes_max()).await;
    let disk = world.fresh_disk();
    let around = Around::Bytes(64 << 10);
    let before = world.providers.gets();
    let gets = || world.providers.gets() - before;
    let read = async |at: usize| {
        let read = disk.read_around(&block, at..at + 4096, around).await.unwrap().concat();
        assert!(read == content[at..at + 4096]);
    };
    // Page 1 and its neighbours 0, 2, 3.
    read(20_000).await;
    assert_eq!(gets(), 1);
    for at in [0, 16 << 10, 40_000, 60_000] {
        read(at).await;
    }
    assert_eq!(gets(), 1, "they came along");
    read(64 << 10).await;
    assert_eq!(gets(), 2);
    // The last run of a fragment ends with it, and the last of the block with the block.
    for at in (0..block.plaintext_bytes() - 4096).step_by(50_000) {
        read(at).await;
    }
    read(block.plaintext_bytes() - 4096).await;
    // Less room: what is too much leaves, what stays is right.
    disk.set_cache_bytes(0);
    assert_eq!(disk.cache_bytes(), DiskConfig::default().cache_bytes as u64);
    // A neighbour that lies is its own trouble: the page that was asked for is there.
    world.providers.set_fault(block.providers[1], Fault::Lying);
    let fresh = world.fresh_disk();
    let at = 1_100_000;
    let page = fresh.read_around(&block, at..at + 10, around).await.unwrap().concat();
    assert!(page == content[at..at + 10]);
    fresh.close().await;
    world.check_permits(&fresh);
}

/// A tree read file by file, on another machine than it was written: each file is a read of its own.
#[tokio::test(start_paused = true)]
async fn small_files_that_share_a_block_come_in_few_gets() {
    let world = World::new(4, 2, 6);
    let (block, content) = world.store(world.code.block_bytes_max()).await;
    let disk = world.fresh_disk();
    let before = world.providers.gets();
    let mut files = 0;
    for at in (0..content.len() - 4000).step_by(4000) {
        let read = disk.read_around(&block, at..at + 4000, Around::Neighbours).await;
        assert!(read.unwrap().concat() == content[at..at + 4000]);
        files += 1;
    }
    let gets = world.providers.gets() - before;
    assert!(files > 1000 && gets < 20, "{gets} gets for {files} files");
    disk.close().await;
    world.check_permits(&disk);
}
