//! What the directory would refuse never gets into the log.

use super::unlinked::make_dir;
use super::*;

/// The mount counted names and values, the directory their sealed bytes: sixteen large attributes
/// passed here and ended the session there.
#[test]
fn extended_attributes_are_counted_as_they_are_stored() {
    let mut core = core();
    give_root(&mut core);
    let (ino, _) = file(&mut core, b"a");
    let value = vec![7; 65_520];
    let mut set = |number: usize| {
        let name = format!("user.x{number:02}");
        core.set_xattr(at(3), ino, name.as_bytes(), &value, crate::fs::XattrMode::Set)
    };
    let stored = (0..16).take_while(|number| set(*number).is_ok()).count();
    assert_eq!(stored, 15);
    assert!(matches!(set(16), Err(Stop::Fail(FsError::NoSpace(_)))));
    let sealed = mutations(&mut core).into_iter().map(|op| match op {
        Op::SetXattr(set) => set.sealed.len(),
        _ => 0,
    });
    assert!(sealed.sum::<usize>() <= us_core::limits::SEALED_XATTRS_BYTES_MAX);
}

fn rename_dir(core: &mut Core, from: (Ino, &[u8]), to: (Ino, &[u8])) -> Result<Renamed, Stop> {
    core.rename(at(9), Caller::default(), from, to, RenameMode::Replace, &[])
}

/// The directory looks at so many parents; a rename below more of them ended the session.
#[test]
fn a_directory_is_not_moved_below_more_parents_than_the_directory_looks_at() {
    let mut core = core();
    give_root(&mut core);
    let inodes = v1::InodesLeased { request: 0, first: 1000, count: 10_000 };
    core.on_down(at(1), Down::Inodes(inodes));
    make_dir(&mut core, b"moved");
    let new = NewNode { kind: FileKind::Directory, permissions: 0o755, rdev: 0, target: &[] };
    let mut deep = vec![Ino::ROOT];
    for _ in 0..=us_core::limits::DEPTH_MAX {
        let dir = *deep.last().unwrap();
        deep.push(core.make(at(2), Caller::default(), dir, b"x", new).unwrap());
    }
    let max = us_core::limits::DEPTH_MAX;
    let too_deep = rename_dir(&mut core, (Ino::ROOT, b"moved"), (deep[max], b"moved"));
    assert_eq!(too_deep, Err(Stop::Fail(FsError::TooDeep)));
    assert!(rename_dir(&mut core, (Ino::ROOT, b"moved"), (deep[max - 1], b"moved")).is_ok());
    // Within one directory nothing can come to lie in itself.
    core.make(at(2), Caller::default(), deep[max], b"y", new).unwrap();
    assert!(rename_dir(&mut core, (deep[max], b"y"), (deep[max], b"z")).is_ok());
}

/// Mount A: `mv /x/a /y/b/a`. Mount B, which knew `a` below `x`: `mv /y/b /x/a/c/d`. Its kernel and its
/// cache saw no loop; the directory did, and ended B's session.
#[test]
fn a_directory_is_moved_only_where_every_parent_is_known_under_a_lease() {
    let mut core = core();
    give_root(&mut core);
    let (b, a) = (make_dir(&mut core, b"b"), make_dir(&mut core, b"a"));
    let new = NewNode { kind: FileKind::Directory, permissions: 0o755, rdev: 0, target: &[] };
    let c = core.make(at(2), Caller::default(), a, b"c", new).unwrap();
    assert_eq!(core.finish_recall(recall(a)), FinishedRecall::Returned);
    let want = Want::Inode { ino: a, level: Level::Shared };
    let moved = rename_dir(&mut core, (Ino::ROOT, b"b"), (c, b"b"));
    assert_eq!(moved, Err(Stop::Stall(Stall::Fetch(want.clone()))));
    answer(&mut core, &want, |fetched| {
        fetched.leases = vec![lease(a.0, Level::Shared, 9)];
        fetched.inodes = vec![v1::Inode { ino: a.0, parent: b.0, nlink: 3, ..root() }];
    });
    let moved = rename_dir(&mut core, (Ino::ROOT, b"b"), (c, b"b"));
    assert!(matches!(moved, Err(Stop::Fail(FsError::Invalid(_)))), "{moved:?}");
}
