//! Allocating, cloning, and how many extents a chunk gets.

use us_core::limits::CHUNK_BYTES;

use super::*;

fn allocate(core: &mut Core, handle: Handle, range: std::ops::Range<u64>) -> Result<u64, Stop> {
    let mode = crate::fs::AllocateMode::Allocate { keep_size: false };
    core.allocate(at(3), handle, range, mode)
}

/// `fallocate -l 4E` made a list of four thousand million extents while the core was locked.
#[test]
fn a_file_is_allocated_in_bounded_steps_and_only_where_there_is_space() {
    let mut core = core();
    give_root(&mut core);
    let (ino, handle) = file(&mut core, b"a");
    assert_eq!(core.check_free_space(at(3), handle, 1 << 20), Ok(()), "little is not asked about");
    let huge = 4 << 60;
    assert_eq!(core.check_free_space(at(3), handle, huge), Err(Stop::Stall(Stall::FreeSpace)));
    core.note_free_space(at(3), 10 << 30);
    let refused = core.check_free_space(at(3), handle, huge);
    assert!(matches!(refused, Err(Stop::Fail(FsError::NoSpace(_)))), "{refused:?}");
    assert_eq!(core.check_free_space(at(3), handle, 9 << 30), Ok(()));
    assert_eq!(
        core.check_free_space(at(8003), handle, 9 << 30),
        Err(Stop::Stall(Stall::FreeSpace))
    );
    assert_eq!(allocate(&mut core, handle, 0..huge), Ok(64 << 30));
    assert_eq!(core.getattr(at(3), ino).unwrap().attributes.size, 64 << 30);
    let extents = mutations(&mut core).into_iter().map(|op| match op {
        Op::CommitData(commit) => commit.extents.len(),
        _ => 0,
    });
    assert_eq!(extents.sum::<usize>(), 64);
    let punch = crate::fs::AllocateMode::PunchHole;
    assert_eq!(core.allocate(at(3), handle, 0..huge, punch), Ok(huge));
    assert_eq!(core.getattr(at(3), ino).unwrap().attributes.allocated_bytes, 0);
}

/// The pieces of a chunk in which every other byte is written.
fn write_dust(core: &mut Core, handle: Handle, start: u64, pieces: u64) {
    for piece in 0..pieces {
        core.write(at(3), handle, start + piece * 3, b"x", false).unwrap();
    }
}

fn chunk_extents(core: &mut Core, ino: Ino, chunk: u64) -> usize {
    let range = chunk * CHUNK_BYTES..(chunk + 1) * CHUNK_BYTES;
    let data = core.nodes.get_mut(&ino).unwrap().data.as_deref().unwrap();
    let hole = crate::data::MapSource::Place(crate::data::Place::Hole);
    data.map().lookup(range).iter().filter(|piece| piece.source != hole).count()
}

/// Filling the holes of a range counted only what the chunks at its ends have: one between with many
/// holes came to have more extents than the directory takes, and the session ended.
#[test]
fn no_chunk_within_an_allocated_range_gets_too_many_extents() {
    let mut core = core();
    give_root(&mut core);
    let (ino, handle) = file(&mut core, b"a");
    write_dust(&mut core, handle, CHUNK_BYTES, 700);
    core.write(at(3), handle, 3 * CHUNK_BYTES, b"end", false).unwrap();
    for plan in core.seal_file(at(3), ino, FlushReason::Commit) {
        store(&mut core, &plan);
    }
    assert_eq!(chunk_extents(&mut core, ino, 1), 700);
    let filled = allocate(&mut core, handle, 0..3 * CHUNK_BYTES);
    assert_eq!(filled, Err(Stop::Stall(Stall::Compact(ino, 1))));
    // Many holes in many chunks are no reason to refuse.
    let (other, handle) = file(&mut core, b"b");
    for chunk in 0..8 {
        write_dust(&mut core, handle, chunk * CHUNK_BYTES, 300);
    }
    for plan in core.seal_file(at(3), other, FlushReason::Commit) {
        store(&mut core, &plan);
    }
    assert_eq!(allocate(&mut core, handle, 0..8 * CHUNK_BYTES), Ok(8 * CHUNK_BYTES));
    assert_eq!(chunk_extents(&mut core, other, 5), 600);
}

/// A clone takes as much as fits.
#[test]
fn a_clone_of_many_pieces_ends_where_a_chunk_is_full() {
    let mut core = core();
    give_root(&mut core);
    let (source, from) = file(&mut core, b"a");
    write_dust(&mut core, from, CHUNK_BYTES - 1500, 430);
    write_dust(&mut core, from, CHUNK_BYTES, 430);
    for plan in core.seal_file(at(3), source, FlushReason::Commit) {
        store(&mut core, &plan);
    }
    let (target, to) = file(&mut core, b"b");
    // Both dusty chunks would come to lie in the same one.
    let size = core.getattr(at(3), source).unwrap().attributes.size;
    let mut cloned = 0;
    let start = 2000;
    while cloned < size {
        let part = core.clone_range(at(3), (from, cloned), (to, start + cloned), size - cloned);
        cloned += part.unwrap();
    }
    assert_eq!(core.getattr(at(3), target).unwrap().attributes.size, start + size);
    assert_eq!(chunk_extents(&mut core, target, 1), 860);
    // Not even one piece more goes into a full chunk: it must be tidied up.
    let (full, to) = file(&mut core, b"c");
    write_dust(&mut core, to, 0, 900);
    for plan in core.seal_file(at(3), full, FlushReason::Commit) {
        store(&mut core, &plan);
    }
    let stalled = core.clone_range(at(3), (from, 0), (to, 1 << 20), 100);
    assert_eq!(stalled, Err(Stop::Stall(Stall::Compact(full, 0))));
}

/// Newer bytes in flight hid how many pieces an older block commits; the directory counted them.
#[test]
fn a_commit_is_counted_by_its_own_pieces() {
    let mut core = core();
    give_root(&mut core);
    let (ino, handle) = file(&mut core, b"a");
    write_dust(&mut core, handle, 0, 1100);
    let dust = core.seal_file(at(3), ino, FlushReason::Commit);
    core.write(at(3), handle, 0, &[1; 4000], false).unwrap();
    let whole = core.seal_file(at(3), ino, FlushReason::Commit);
    mutations(&mut core);
    store(&mut core, &dust[0]);
    store(&mut core, &whole[0]);
    let most = mutations(&mut core).into_iter().map(|op| match op {
        Op::CommitData(commit) => commit.extents.len(),
        _ => 0,
    });
    assert!(most.max().unwrap() <= us_core::limits::CHUNK_EXTENTS_MAX);
    assert_eq!(core.postponed(ino), 1, "whoever waits for the dust goes on waiting");
}

/// Many tiny files in one block made a mutation that no message could carry.
#[test]
fn the_files_of_a_commit_are_cut_too() {
    let mut core = core();
    let growth = |ino| v1::FileGrowth { ino, ..Default::default() };
    let files = (0..20_000).map(growth).collect();
    core.append_commit(v1::CommitData { files, ..Default::default() }, &[]);
    let counts: Vec<usize> = mutations(&mut core)
        .into_iter()
        .map(|op| match op {
            Op::CommitData(commit) => commit.files.len(),
            _ => 0,
        })
        .collect();
    assert_eq!(counts, [8192, 8192, 3616]);
}

/// Mutations are applied one by one: a chunk's new extents come in one of them.
#[test]
fn a_long_commit_is_cut_between_chunks() {
    let mut core = core();
    let extent = |number: u64| v1::ExtentWrite {
        ino: 9,
        offset: number / 900 * CHUNK_BYTES + number % 900 * 3,
        length: 1,
        ..Default::default()
    };
    let extents = (0..20_000).map(extent).collect();
    core.append_commit(v1::CommitData { extents, ..Default::default() }, &[]);
    let parts: Vec<Vec<u64>> = mutations(&mut core)
        .into_iter()
        .filter_map(|op| match op {
            Op::CommitData(commit) => Some(commit.extents),
            _ => None,
        })
        .map(|extents| extents.iter().map(|extent| extent.offset / CHUNK_BYTES).collect())
        .collect();
    assert_eq!(parts.iter().map(Vec::len).sum::<usize>(), 20_000);
    assert!(parts.windows(2).all(|pair| pair[0].last() < pair[1].first()), "{parts:?}");
}
