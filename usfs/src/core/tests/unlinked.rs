//! Inodes without a name that the kernel or a program still reaches.

use super::*;

pub(super) fn make_dir(core: &mut Core, name: &[u8]) -> Ino {
    let new = NewNode { kind: FileKind::Directory, permissions: 0o755, rdev: 0, target: &[] };
    let made = core.make_entry(at(2), Caller::default(), Ino::ROOT, name, new);
    made.unwrap().attributes.ino
}

/// `mkdir d; cd d; rmdir ../d; chmod 700 .` once ended the session of every user of the mount: the
/// directory had removed the inode and its lease, because nobody had a handle on it.
#[test]
fn a_removed_working_directory_can_be_changed_until_the_kernel_forgets_it() {
    let mut core = core();
    give_root(&mut core);
    let dir = make_dir(&mut core, b"d");
    core.unlink(at(3), Caller::default(), Ino::ROOT, b"d", true).unwrap();
    let change = SetAttributes { mode: Some(0o700), ..SetAttributes::default() };
    assert_eq!(core.setattr(at(4), dir, None, change).unwrap().attributes.nlink, 0);
    core.set_xattr(at(4), dir, b"user.x", b"y", crate::fs::XattrMode::Set).unwrap();
    core.forget(dir, 1);
    assert!(core.getattr(at(5), dir).is_err());
    let logged = mutations(&mut core);
    let kept = |op: &Op| matches!(op, Op::Unlink(unlink) if unlink.open);
    assert_eq!(logged.iter().position(kept), Some(1), "{logged:?}");
    assert!(matches!(logged.last(), Some(Op::Release(release)) if release.ino == dir.0));
}

/// A descriptor opened with `O_PATH` is no handle of ours; what it reaches was read as zeros once its
/// name was gone.
#[test]
fn an_unlinked_file_that_the_kernel_knows_keeps_its_bytes() {
    let mut core = core();
    give_root(&mut core);
    let (ino, handle) = file(&mut core, b"a");
    core.write(at(3), handle, 0, b"abc", false).unwrap();
    core.close(handle);
    core.unlink(at(3), Caller::default(), Ino::ROOT, b"a", false).unwrap();
    let again = core.open(at(4), ino, RW).unwrap().handle;
    let plan = core.read(at(4), again, 0, 3).unwrap();
    assert!(matches!(&plan.pieces[..], [ReadPiece::Bytes(bytes)] if bytes == &b"abc"[..]));
    core.forget(ino, 1);
    core.close(again);
    assert_eq!(core.uncommitted_bytes(), 0);
    assert!(matches!(mutations(&mut core).last(), Some(Op::Release(_))));
}

/// The return of a lease waits behind the log, the `Release` of a last close does not wait behind the
/// return: it once came first, and the inode counted as open for as long as the mount lived.
#[test]
fn a_lease_goes_back_with_what_is_true_when_it_is_sent() {
    let mut core = core();
    give_root(&mut core);
    let (ino, handle) = file(&mut core, b"a");
    assert_eq!(core.finish_recall(recall(ino)), FinishedRecall::Returned);
    core.close(handle);
    core.forget(ino, 1);
    let returned = outgoing(&mut core).into_iter().find_map(|event| match event {
        Up::LeaseReturn(returned) => returned.leases.first().copied(),
        _ => None,
    });
    assert!(!returned.unwrap().open);
}
