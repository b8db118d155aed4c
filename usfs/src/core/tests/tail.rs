//! What lies behind the end of a file, and how much is allocated.

use us_core::limits::CHUNK_BYTES;

use super::kernel::look_up;
use super::*;

/// A file that the directory has: `chunks` of 4 MiB in one block each, `size` bytes of it in the file.
fn known_file(core: &mut Core, size: u64, chunks: u64) -> Ino {
    let ino = look_up(core, 7);
    let node = core.nodes.get_mut(&ino).unwrap();
    node.drop_cached();
    node.lease.level = Level::None;
    let want = Want::Inode { ino, level: Level::Exclusive };
    answer(core, &want, |fetched| {
        fetched.leases = vec![lease(ino.0, Level::Exclusive, 90_000)];
        let allocated_bytes = chunks * CHUNK_BYTES;
        let mode = 0o100_644;
        let inode =
            v1::Inode { ino: ino.0, mode, nlink: 1, size, allocated_bytes, ..Default::default() };
        fetched.inodes = vec![inode];
    });
    ino
}

fn give_map(core: &mut Core, want: &Want, chunks: u64) {
    let Want::Map { first_chunk, .. } = want else { panic!("{want:?}") };
    let first = *first_chunk;
    answer(core, want, |fetched| {
        let chunk = |chunk| {
            let extent = v1::Extent {
                offset: chunk * CHUNK_BYTES,
                length: CHUNK_BYTES,
                block: vec![chunk as u8 + 1; 16].into(),
                block_offset: 0,
            };
            v1::MapChunk { chunk, extents: vec![extent] }
        };
        fetched.chunks = (first..chunks).map(chunk).collect();
        fetched.complete = true;
    });
}

/// Blocks commit in any order. A mount that crashed left one behind the end of its file; when the file
/// grew over it later, its bytes came to light, on the other mount and after the next start.
#[test]
fn what_a_crash_left_behind_the_end_of_a_file_never_comes_to_light() {
    let mut core = core();
    let ino = known_file(&mut core, 100, 3);
    let grow = SetAttributes { size: Some(2 * CHUNK_BYTES), ..SetAttributes::default() };
    let Err(Stop::Stall(Stall::Fetch(want))) = core.setattr(at(4), ino, None, grow) else {
        panic!("it must look");
    };
    give_map(&mut core, &want, 3);
    core.setattr(at(4), ino, None, grow).unwrap();
    let logged = mutations(&mut core);
    let Some(Op::CommitData(cut)) = logged.first() else { panic!("{logged:?}") };
    let extent = &cut.extents[0];
    assert_eq!((extent.offset, extent.length), (100, 3 * CHUNK_BYTES - 100));
    assert!(extent.block.is_empty() && !extent.zero);
    assert_eq!(sizes(logged).last(), Some(&(2 * CHUNK_BYTES)));
    let handle = core.open(at(4), ino, RW).unwrap().handle;
    let plan = core.read(at(4), handle, CHUNK_BYTES, 10).unwrap();
    assert!(matches!(plan.pieces[..], [ReadPiece::Zero(10)]));
    assert_eq!(core.getattr(at(4), ino).unwrap().attributes.allocated_bytes, 100);
    // It looks once.
    core.write(at(4), handle, 3 * CHUNK_BYTES, b"far", false).unwrap();
}

/// A file of 10 MiB cut to one byte showed 4 MiB for as long as the lease was held.
#[test]
fn blocks_of_a_cut_file_are_counted_by_who_knows_them() {
    let mut core = core();
    let ino = known_file(&mut core, 3 * CHUNK_BYTES, 3);
    let cut = SetAttributes { size: Some(1), ..SetAttributes::default() };
    let entry = core.setattr(at(4), ino, None, cut).unwrap();
    assert_eq!(entry.valid, Duration::ZERO, "the kernel must ask again");
    let want = Want::Inode { ino, level: Level::Shared };
    assert_eq!(core.getattr(at(4), ino), Err(Stop::Stall(Stall::Fetch(want.clone()))));
    let told = |core: &mut Core, allocated_bytes| {
        answer(core, &want, |fetched| {
            let inode = v1::Inode { ino: ino.0, mode: 0o100_644, allocated_bytes, ..root() };
            fetched.inodes = vec![inode];
        });
    };
    told(&mut core, 1);
    assert_eq!(core.getattr(at(4), ino).unwrap().attributes.allocated_bytes, 1);
    let handle = core.open(at(4), ino, RW).unwrap().handle;
    let write = |core: &mut Core| core.write(at(4), handle, 1, &[1; 9], false);
    let Err(Stop::Stall(Stall::Fetch(map))) = write(&mut core) else { panic!("the map is needed") };
    give_map(&mut core, &map, 1);
    write(&mut core).unwrap();
    let plan = core.seal_file(at(4), ino, FlushReason::Commit);
    store(&mut core, &plan[0]);
    told(&mut core, 77);
    assert_eq!(core.getattr(at(4), ino).unwrap().attributes.allocated_bytes, 10, "not a guess");
}
