//! Maps of small files that come along with others'.

use us_core::limits::{SIBLINGS_MAX, SMALL_FILE_BYTES};
use us_proto::v1::fetch::Want as Wire;

use super::*;

const FILES: u64 = 600;

fn ino(number: u64) -> Ino {
    Ino(20_000 + number)
}

fn name(number: u64) -> Vec<u8> {
    format!("file{number:04}").into_bytes()
}

/// A root that was listed: many files of this size, with leases.
fn listed(size: impl Fn(u64) -> u64) -> Core {
    let mut core = core();
    let want = Want::Inode { ino: Ino::ROOT, level: Level::Shared };
    answer(&mut core, &want, |fetched| {
        fetched.leases = vec![lease(1, Level::Exclusive, 5)];
        fetched.inodes = vec![root()];
    });
    for number in 0..FILES {
        let name = name(number).into_boxed_slice();
        let want = Want::Entry { dir: Ino::ROOT, name, level: Level::Shared };
        answer(&mut core, &want, |fetched| {
            fetched.leases = vec![lease(ino(number).0, Level::Exclusive, 10 + number)];
            let (mode, size) = (0o100_644, size(number));
            let (ino, allocated_bytes) = (ino(number).0, size);
            let child =
                v1::Inode { ino, mode, nlink: 1, size, allocated_bytes, ..Default::default() };
            fetched.inodes = vec![child];
            fetched.entries = vec![v1::Entry { ino, cookie: number + 1, ..Default::default() }];
        });
        core.lookup(at(2), Ino::ROOT, &self::name(number)).unwrap();
    }
    while !outgoing(&mut core).is_empty() {}
    core
}

/// Reads a file until its map must be asked for: the inodes whose maps are to come along.
fn asked(core: &mut Core, number: u64) -> Option<(Want, Vec<u64>)> {
    let handle = core.open(at(3), ino(number), RW).unwrap().handle;
    let want = match core.read(at(3), handle, 0, 4096) {
        Ok(_) => return None,
        Err(Stop::Stall(Stall::Fetch(want))) => want,
        Err(other) => panic!("{other:?}"),
    };
    core.request(&want, RequestId::NONE);
    let siblings = outgoing(core).into_iter().find_map(|up| match up {
        Up::Fetch(v1::Fetch { want: Some(Wire::Map(map)), .. }) => Some(map.siblings),
        _ => None,
    });
    Some((want, siblings.expect("it asks for a map")))
}

fn chunk(block: u8) -> v1::MapChunk {
    let extent =
        v1::Extent { offset: 0, length: 4096, block: vec![block; 16].into(), block_offset: 0 };
    v1::MapChunk { chunk: 0, extents: vec![extent] }
}

fn give(core: &mut Core, want: &Want, siblings: &[u64]) {
    answer(core, want, |fetched| {
        (fetched.chunks, fetched.complete) = (vec![chunk(1)], true);
        let map = |ino: &u64| v1::SiblingMap { ino: *ino, chunk: Some(chunk(2)), complete: true };
        fetched.siblings = siblings.iter().map(map).collect();
    });
}

#[test]
fn a_directory_read_file_by_file_asks_for_few_maps_and_each_once() {
    let mut core = listed(|_| 4096);
    let (mut requests, mut along) = (Vec::new(), Vec::new());
    for number in 0..FILES {
        let Some((want, siblings)) = asked(&mut core, number) else { continue };
        give(&mut core, &want, &siblings);
        requests.push(siblings.len());
        along.extend(siblings);
    }
    assert_eq!(requests[..4], [0, 8, 64, SIBLINGS_MAX]);
    assert!(requests.len() < 8, "{requests:?}");
    let count = along.len();
    along.sort_unstable();
    along.dedup();
    assert_eq!(along.len(), count, "none twice");
}

#[test]
fn large_files_and_files_whose_map_is_here_do_not_come_along() {
    let large = |number: u64| number % 3 == 1;
    let mut core = listed(|number| if large(number) { SMALL_FILE_BYTES + 1 } else { 4096 });
    let (want, siblings) = asked(&mut core, 1).unwrap();
    assert_eq!(siblings, [0; 0], "it is large itself");
    give(&mut core, &want, &[]);
    for number in [0, 2, 3] {
        let Some((want, siblings)) = asked(&mut core, number) else { continue };
        assert!(siblings.iter().all(|sibling| !large(sibling - ino(0).0) && *sibling != ino(0).0));
        give(&mut core, &want, &siblings);
    }
}

/// What this mount changed after it had asked is newer than the answer; what it holds no more, nobody
/// may answer reads from.
#[test]
fn a_map_that_comes_along_never_overwrites_and_needs_the_lease() {
    let mut core = listed(|_| 4096);
    let (first, none) = asked(&mut core, 0).unwrap();
    give(&mut core, &first, &none);
    let (want, siblings) = asked(&mut core, 1).unwrap();
    let (changed, gone) = (siblings[0] - ino(0).0, siblings[1] - ino(0).0);
    let cut = SetAttributes { size: Some(0), ..SetAttributes::default() };
    core.setattr(at(4), ino(changed), None, cut).unwrap();
    let grow = SetAttributes { size: Some(4096), ..SetAttributes::default() };
    core.setattr(at(4), ino(changed), None, grow).unwrap();
    let recall = Recall { ino: ino(gone), keep: Level::None, grant: 10 + gone };
    core.begin_recall(at(500), recall);
    assert_eq!(core.finish_recall(recall), leases::FinishedRecall::Returned);
    give(&mut core, &want, &siblings);
    let handle = core.open(at(5), ino(changed), RW).unwrap().handle;
    let plan = core.read(at(5), handle, 0, 4096).unwrap();
    assert!(matches!(plan.pieces[..], [ReadPiece::Zero(4096)]), "{plan:?}");
    assert!(core.nodes.get(&ino(gone)).is_none_or(|node| node.data.is_none()));
}

/// A directory of `names` whose first is known, and no lease but on it.
fn unlisted(names: u64) -> Core {
    let mut core = core();
    let want = Want::Inode { ino: Ino::ROOT, level: Level::Shared };
    answer(&mut core, &want, |fetched| {
        fetched.leases = vec![lease(1, Level::Shared, 5)];
        fetched.inodes = vec![v1::Inode { next_cookie: names + 1, ..root() }];
    });
    core
}

fn wanted(core: &mut Core, number: u64) -> Want {
    match core.lookup(at(2), Ino::ROOT, &name(number)) {
        Err(Stop::Stall(Stall::Fetch(want))) => want,
        other => panic!("{other:?}"),
    }
}

#[test]
fn who_looks_up_name_after_name_is_given_all_of_them() {
    // One of many is looked up alone, however often the others are few.
    for (names, alone) in [(100, 1), (1000, 15), (4000, 62), (1_000_000, 63)] {
        let mut core = unlisted(names);
        for number in 0..alone {
            let want = wanted(&mut core, number);
            assert!(matches!(want, Want::Entry { .. }), "{names}, {number}: {want:?}");
        }
        assert_eq!(wanted(&mut core, alone), Want::Entries { dir: Ino::ROOT, after: 0 });
    }
    let mut core = unlisted(3);
    wanted(&mut core, 0);
    let want = wanted(&mut core, 1);
    answer(&mut core, &want, |fetched| fetched.complete = true);
    assert!(matches!(core.lookup(at(2), Ino::ROOT, b"file0001"), Ok(Lookup::Absent(_))));
}
