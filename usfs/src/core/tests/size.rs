//! Sizes and the bytes they cover.

use super::*;

/// One thread syncs a file, another rewrites the same bytes meanwhile. What was synced is committed,
/// and lay behind the end of the file after a crash: the newer version held the size back.
#[test]
fn a_byte_that_is_rewritten_holds_no_size_back_once_it_is_committed() {
    let mut core = core();
    give_root(&mut core);
    let (ino, handle) = file(&mut core, b"a");
    core.write(at(3), handle, 0, &[1; 100], false).unwrap();
    let synced = core.seal_file(at(3), ino, FlushReason::Durable);
    core.write(at(3), handle, 0, &[2; 60], false).unwrap();
    let newer = core.seal_file(at(3), ino, FlushReason::Commit);
    core.write(at(3), handle, 40, &[3; 80], false).unwrap();
    store(&mut core, &synced[0]);
    assert_eq!(sizes(mutations(&mut core)), [100], "bytes from 100 on were never committed");
    store(&mut core, &newer[0]);
    assert_eq!(sizes(mutations(&mut core)), [100]);
    let last = core.seal_file(at(3), ino, FlushReason::Commit);
    store(&mut core, &last[0]);
    assert_eq!(sizes(mutations(&mut core)), [120]);
}

/// Zeros that were allocated in advance are no version of what is written over them.
#[test]
fn allocated_zeros_do_not_count_as_written() {
    let mut core = core();
    give_root(&mut core);
    let (ino, handle) = file(&mut core, b"a");
    let keep = crate::fs::AllocateMode::Allocate { keep_size: true };
    core.allocate(at(3), handle, 0..200, keep).unwrap();
    core.write(at(3), handle, 0, &[1; 50], false).unwrap();
    core.write(at(3), handle, 100, &[1; 50], false).unwrap();
    let first = core.seal_file(at(3), ino, FlushReason::Commit);
    core.write(at(3), handle, 150, &[1; 10], false).unwrap();
    mutations(&mut core);
    store(&mut core, &first[0]);
    assert_eq!(sizes(mutations(&mut core)), [150]);
}
