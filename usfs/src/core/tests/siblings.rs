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
    let mut along = Vec::new();
    for number in [0, 2, 3] {
        let Some((want, siblings)) = asked(&mut core, number) else { continue };
        give(&mut core, &want, &siblings);
        along.extend(siblings.iter().map(|sibling| sibling - ino(0).0));
    }
    assert_eq!(along[..6], [3, 5, 6, 8, 9, 11], "each but the large, and those that are here");
}

/// What this mount changed after it had asked is newer than the answer; what it holds no more, nobody
/// may answer reads from.
#[test]
fn a_map_that_comes_along_is_dropped_after_a_change_and_without_the_lease() {
    let mut core = listed(|_| 4096);
    let (first, none) = asked(&mut core, 0).unwrap();
    give(&mut core, &first, &none);
    let (want, siblings) = asked(&mut core, 1).unwrap();
    let (changed, gone, kept) = (Ino(siblings[0]), Ino(siblings[1]), Ino(siblings[2]));
    let mode = SetAttributes { mode: Some(0o600), ..SetAttributes::default() };
    core.setattr(at(4), changed, None, mode).unwrap();
    core.nodes.get_mut(&gone).unwrap().lease.level = Level::None;
    give(&mut core, &want, &siblings);
    let is_known = |ino| core.nodes[&ino].data.as_ref().unwrap().map().is_known(0);
    assert_eq!([changed, gone, kept].map(is_known), [false, false, true]);
}

/// Whose maps another mount's changes made untrue is read again, later: a further pass brings them.
#[test]
fn a_second_pass_over_a_directory_brings_maps_along_again() {
    let mut core = listed(|_| 4096);
    for _pass in 0..2 {
        let mut requests = Vec::new();
        for number in 0..FILES {
            let Some((want, siblings)) = asked(&mut core, number) else { continue };
            give(&mut core, &want, &siblings);
            requests.push(siblings.len());
        }
        assert!(requests.len() < 12 && requests.contains(&SIBLINGS_MAX), "{requests:?}");
        for number in 0..FILES {
            core.nodes.get_mut(&ino(number)).unwrap().data.as_mut().unwrap().map_mut().forget();
        }
    }
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
    for (names, alone) in [(3, 3), (100, 3), (1000, 31), (4000, 125)] {
        let mut core = unlisted(names);
        for number in 0..alone {
            let want = wanted(&mut core, number);
            assert!(matches!(want, Want::Entry { .. }), "{names}, {number}: {want:?}");
        }
        assert_eq!(wanted(&mut core, alone), Want::Entries { dir: Ino::ROOT, after: 0 });
    }
    let mut core = unlisted(3);
    (0..3).for_each(|number| drop(wanted(&mut core, number)));
    let want = wanted(&mut core, 3);
    answer(&mut core, &want, |fetched| fetched.complete = true);
    assert!(matches!(core.lookup(at(2), Ino::ROOT, b"file0001"), Ok(Lookup::Absent(_))));
}

/// One name that fails its seal ends the listing, and is nothing to whoever looks up another.
#[test]
fn a_name_that_cannot_be_opened_ends_listings_and_no_lookup_of_others() {
    let mut core = unlisted(100);
    (0..3).for_each(|number| drop(wanted(&mut core, number)));
    let want = wanted(&mut core, 3);
    assert!(matches!(want, Want::Entries { .. }));
    let answered = answer(&mut core, &want, |fetched| {
        let bad =
            v1::Entry { ino: 77, cookie: 4, sealed_name: vec![1; 40].into(), ..Default::default() };
        fetched.entries = vec![bad];
        fetched.complete = true;
    });
    assert!(matches!(answered, Some(Effect::Answered(_, Ok(())))), "{answered:?}");
    for number in 3..40 {
        assert!(matches!(wanted(&mut core, number), Want::Entry { .. }));
    }
    let mut names = 0;
    let mut sink = |_: crate::fs::Listed<'_>| {
        names += 1;
        true
    };
    let (_, listed) = core.list(at(3), Ino::ROOT, 0, false, &mut sink);
    assert!(matches!(listed, Err(Stop::Fail(FsError::Io(_)))), "{listed:?}");
    assert_eq!(names, 2, "the dots");
}

/// 4,096 names that are not there are kept, then all of them are forgotten: one that was removed while
/// a listing was on its way came back with it.
#[test]
fn a_name_that_is_removed_while_a_listing_comes_stays_removed() {
    let mut core = unlisted(100);
    let want = Want::Entries { dir: Ino::ROOT, after: 0 };
    core.request(&want, RequestId::NONE);
    let names = core.nodes.get_mut(&Ino::ROOT).unwrap().names.as_mut().unwrap();
    names.remove(b"gone");
    (0..5000).for_each(|number| names.put(&name(number), Dentry::Absent));
    assert_eq!(names.get(b"gone"), Some(Dentry::Absent));
    answer(&mut core, &want, |_| {});
    let names = core.nodes.get_mut(&Ino::ROOT).unwrap().names.as_mut().unwrap();
    names.put(b"another", Dentry::Absent);
    assert_eq!(names.names.len(), 1, "they are forgotten as before");
}
