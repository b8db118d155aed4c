//! The core on its own, fed with made-up answers of the directory.

use bytes::Bytes;
use us_core::daemon::logging::RequestId;
use us_core::seal::VolumeKey;
use us_proto::v1::session_down::Event as Down;
use us_proto::v1::session_up::Event as Up;

use super::*;
use crate::attributes::SetAttributes;
use crate::fs::{Caller, Handle, Lookup, OpenFlags, RenameMode};

const RW: OpenFlags = OpenFlags {
    read: true,
    write: true,
    append: false,
    truncate: false,
    sync: false,
    exclusive: false,
};

fn at(millis: u64) -> Now {
    let wall = FileTime { seconds: 1_000_000, nanos: millis as u32 };
    Now { boot: Duration::from_millis(millis), wall }
}

fn core() -> Core {
    let key = VolumeKey::from_bytes([3; 32].into());
    let mut core = Core::new(CoreConfig {
        names: NameKey::new(&key),
        code: Code::new(4, 2).unwrap(),
        read_only: false,
        dirty_bytes_max: 1 << 20,
        nodes_max: 1000,
    });
    core.trust_until(Duration::from_secs(20));
    core
}

fn root() -> v1::Inode {
    v1::Inode { ino: 1, mode: 0o040_755, nlink: 2, parent: 1, next_cookie: 1, ..Default::default() }
}

fn lease(ino: u64, level: Level, grant: u64) -> v1::InodeLease {
    v1::InodeLease { ino, level: level.to_proto(), open: false, grant }
}

/// Answers the want with what `fill` makes of an empty answer.
fn answer(core: &mut Core, want: &Want, fill: impl FnOnce(&mut v1::Fetched)) -> Option<Effect> {
    let mut fetched =
        v1::Fetched { request: core.request(want, RequestId::NONE), ..Default::default() };
    fill(&mut fetched);
    core.on_down(at(1), Down::Fetched(fetched))
}

fn give_root(core: &mut Core) {
    let want = Want::Inode { ino: Ino::ROOT, level: Level::Shared };
    answer(core, &want, |fetched| {
        fetched.leases = vec![lease(1, Level::Exclusive, 5)];
        fetched.inodes = vec![root()];
    });
    let want = Want::Entries { dir: Ino::ROOT, after: 0 };
    answer(core, &want, |fetched| fetched.complete = true);
    let inodes = v1::InodesLeased { request: 0, first: 100, count: 50 };
    core.on_down(at(1), Down::Inodes(inodes));
}

fn file(core: &mut Core, name: &[u8]) -> (Ino, Handle) {
    let made = core.create(at(2), Caller::default(), Ino::ROOT, name, 0o644, RW);
    let (entry, opened) = made.unwrap();
    (entry.attributes.ino, opened.handle)
}

fn outgoing(core: &mut Core) -> Vec<Up> {
    let mut out = Vec::new();
    core.take_outgoing(100, &mut out);
    out
}

fn mutations(core: &mut Core) -> Vec<Op> {
    let batch = |event| match event {
        Up::Batch(batch) => batch.mutations,
        _ => Vec::new(),
    };
    outgoing(core).into_iter().flat_map(batch).filter_map(|mutation| mutation.op).collect()
}

fn recall(ino: Ino) -> Recall {
    Recall { ino, keep: Level::None, grant: 0 }
}

fn store(core: &mut Core, plan: &SealPlan) {
    let id = BlockId::generate();
    let bytes: usize = plan.pieces.iter().map(Bytes::len).sum();
    let info = v1::BlockInfo {
        block: Bytes::copy_from_slice(id.as_bytes()),
        plaintext_bytes: bytes as u32,
        inline: vec![1; bytes].into(),
        ..Default::default()
    };
    let info = BlockInfo::from_proto(&info).unwrap();
    let commit =
        v1::BlockCommit { block: info.id.as_bytes().to_vec().into(), ..Default::default() };
    core.finish_ticket(at(3), plan.ticket, Ok(Stored { info, commit }));
}

#[test]
fn nothing_is_answered_without_a_lease() {
    let mut core = core();
    let want = Want::Inode { ino: Ino::ROOT, level: Level::Shared };
    let stall = Err(Stop::Stall(Stall::Fetch(want)));
    assert_eq!(core.lookup(at(1), Ino::ROOT, b"a").map(|_| ()), stall);
    give_root(&mut core);
    assert!(matches!(core.lookup(at(1), Ino::ROOT, b"a"), Ok(Lookup::Absent(_))));
    assert_eq!(core.lookup(at(20_000), Ino::ROOT, b"a"), Err(Stop::Stall(Stall::Session)));
}

#[test]
fn names_are_made_and_moved_in_memory_and_logged_in_order() {
    let mut core = core();
    give_root(&mut core);
    let (ino, _) = file(&mut core, b"a");
    assert_eq!(ino, Ino(100));
    let renamed = core.rename(at(3), (Ino::ROOT, b"a"), (Ino::ROOT, b"b"), RenameMode::Replace);
    assert_eq!(renamed, Ok(Renamed { moved: ino, replaced: None }));
    assert!(matches!(core.lookup(at(3), Ino::ROOT, b"a"), Ok(Lookup::Absent(_))));
    let logged = mutations(&mut core);
    assert!(matches!(logged[..], [Op::Create(_), Op::Rename(_)]), "{logged:?}");
    // The new name comes behind the old one's place: the second cookie of the directory.
    let names = core.names_mut(Ino::ROOT);
    assert_eq!(names.order.keys().copied().collect::<Vec<_>>(), [2]);
}

fn sizes(ops: Vec<Op>) -> Vec<u64> {
    let size = |op| match op {
        Op::CommitData(commit) => commit.files.first().map(|file| file.size),
        _ => None,
    };
    ops.into_iter().filter_map(size).collect()
}

#[test]
fn a_size_never_runs_ahead_of_committed_data() {
    let mut core = core();
    give_root(&mut core);
    let (ino, handle) = file(&mut core, b"a");
    core.write(at(3), handle, 10, b"late", false).unwrap();
    let late = core.seal_file(at(3), ino, FlushReason::Commit);
    core.write(at(3), handle, 0, b"early", false).unwrap();
    store(&mut core, &late[0]);
    assert_eq!(sizes(mutations(&mut core)), [0], "bytes 0..5 are not committed");
    let early = core.seal_file(at(3), ino, FlushReason::Commit);
    store(&mut core, &early[0]);
    assert_eq!(sizes(mutations(&mut core)), [14]);
    assert!(!core.has_uncommitted(ino));
}

#[test]
fn a_rename_over_a_file_waits_for_the_data_of_the_moved_one() {
    let mut core = core();
    give_root(&mut core);
    let (new, handle) = file(&mut core, b"new");
    file(&mut core, b"old");
    core.write(at(3), handle, 0, b"content", false).unwrap();
    let mut rename =
        || core.rename(at(3), (Ino::ROOT, b"new"), (Ino::ROOT, b"old"), RenameMode::Replace);
    assert_eq!(rename(), Err(Stop::Stall(Stall::Flush(new))));
    let plans = core.seal_file(at(3), new, FlushReason::Commit);
    store(&mut core, &plans[0]);
    let renamed = core.rename(at(3), (Ino::ROOT, b"new"), (Ino::ROOT, b"old"), RenameMode::Replace);
    assert!(renamed.is_ok());
}

#[test]
fn commits_of_a_file_come_in_the_order_of_its_seals_and_wait_for_no_other() {
    let mut core = core();
    give_root(&mut core);
    let (one, first) = file(&mut core, b"one");
    let (two, second) = file(&mut core, b"two");
    core.write(at(3), first, 0, b"aaaa", false).unwrap();
    let older = core.seal_file(at(3), one, FlushReason::Commit);
    core.write(at(3), first, 0, b"bb", false).unwrap();
    let newer = core.seal_file(at(3), one, FlushReason::Commit);
    core.write(at(3), second, 0, b"cc", false).unwrap();
    let other = core.seal_file(at(3), two, FlushReason::Durable);
    assert!(other[0].inline);
    let commits = |core: &mut Core| {
        mutations(core).into_iter().filter(|op| matches!(op, Op::CommitData(_))).count()
    };
    store(&mut core, &newer[0]);
    assert_eq!(commits(&mut core), 0, "an older block of the same file is under way");
    store(&mut core, &other[0]);
    assert_eq!(commits(&mut core), 1, "another file does not wait");
    store(&mut core, &older[0]);
    assert_eq!(commits(&mut core), 2);
}

#[test]
fn what_could_not_be_stored_stays_dirty_and_is_reported_once() {
    let mut core = core();
    give_root(&mut core);
    let (ino, handle) = file(&mut core, b"a");
    core.write(at(3), handle, 0, b"abc", false).unwrap();
    let plans = core.seal_file(at(3), ino, FlushReason::Durable);
    let full = FsError::NoSpace("full".to_owned());
    core.finish_ticket(at(3), plans[0].ticket, Err(full.clone()));
    assert!(core.has_uncommitted(ino));
    assert_eq!(core.write(at(3), handle, 3, b"d", false), Err(Stop::Fail(full.clone())));
    assert_eq!(core.take_write_error(handle), Some(full));
    assert_eq!(core.take_write_error(handle), None);
    let plans = core.seal_file(at(3), ino, FlushReason::Durable);
    store(&mut core, &plans[0]);
    assert!(!core.has_uncommitted(ino));
    assert!(core.write(at(3), handle, 3, b"d", false).is_ok());
}

#[test]
fn a_recall_stops_changes_waits_for_data_and_returns_behind_the_log() {
    let mut core = core();
    give_root(&mut core);
    let (ino, handle) = file(&mut core, b"a");
    core.write(at(3), handle, 0, b"abc", false).unwrap();
    assert_eq!(core.begin_recall(at(3), recall(ino)), FinishedRecall::Dirty);
    let want = Want::Inode { ino, level: Level::Exclusive };
    let stall = Err(Stop::Stall(Stall::Fetch(want)));
    assert_eq!(core.write(at(3), handle, 3, b"d", false), stall);
    assert!(core.read(at(3), handle, 0, 3).is_ok(), "what holds a lease may still be read");
    let plans = core.seal_file(at(3), ino, FlushReason::Commit);
    assert_eq!(core.finish_recall(recall(ino)), FinishedRecall::Dirty);
    store(&mut core, &plans[0]);
    assert_eq!(core.finish_recall(recall(ino)), FinishedRecall::Returned);
    let out = outgoing(&mut core);
    let is_batch = |event: &Up| matches!(event, Up::Batch(_));
    let returned = out.iter().position(|event| match event {
        Up::LeaseReturn(message) => message.leases[0].open && message.leases[0].ino == ino.0,
        _ => false,
    });
    assert!(out.iter().rposition(is_batch) < returned, "{out:?}");
    assert!(core.read(at(3), handle, 0, 3).is_err());
}

#[test]
fn a_lease_let_go_is_reclaimed_as_long_as_the_log_behind_it_may_be_replayed() {
    let mut core = core();
    give_root(&mut core);
    let (ino, handle) = file(&mut core, b"a");
    core.close(handle);
    assert_eq!(core.finish_recall(recall(ino)), FinishedRecall::Returned);
    outgoing(&mut core);
    let reclaimed = |core: &mut Core| {
        let messages = core.reclaims();
        messages.iter().flat_map(|message| &message.leases).any(|lease| lease.ino == ino.0)
    };
    assert!(reclaimed(&mut core), "the batch may have to be sent again");
    core.on_down(at(4), Down::Durable(v1::Durable { number: 1 }));
    assert!(!reclaimed(&mut core));
}

#[test]
fn an_answer_never_overwrites_what_was_changed_since() {
    let mut core = core();
    give_root(&mut core);
    let number =
        core.request(&Want::Inode { ino: Ino::ROOT, level: Level::Exclusive }, RequestId::NONE);
    let change = SetAttributes { mode: Some(0o700), ..SetAttributes::default() };
    core.setattr(at(3), Ino::ROOT, None, change).unwrap();
    let fetched = v1::Fetched {
        request: number,
        leases: vec![lease(1, Level::Exclusive, 6)],
        inodes: vec![root()],
        ..Default::default()
    };
    let effect = core.on_down(at(3), Down::Fetched(fetched));
    assert_eq!(effect, Some(Effect::Answered(number, Ok(()))));
    assert_eq!(core.getattr(at(3), Ino::ROOT).unwrap().attributes.permissions, 0o700);
}

#[test]
fn an_unlinked_file_lives_until_its_last_close() {
    let mut core = core();
    give_root(&mut core);
    let (ino, handle) = file(&mut core, b"a");
    core.write(at(3), handle, 0, b"abc", false).unwrap();
    core.unlink(at(3), Ino::ROOT, b"a", false).unwrap();
    core.forget(ino, 1);
    assert_eq!(core.getattr(at(3), ino).unwrap().attributes.nlink, 0);
    assert!(matches!(core.read(at(3), handle, 0, 3).unwrap().pieces[..], [ReadPiece::Bytes(_)]));
    core.close(handle);
    assert!(core.getattr(at(3), ino).is_err());
    assert_eq!(core.uncommitted_bytes(), 0);
    let mut logged = mutations(&mut core);
    logged.retain(|op| !matches!(op, Op::SetAttributes(_)));
    assert!(matches!(logged[..], [Op::Create(_), Op::Unlink(_), Op::Release(_)]), "{logged:?}");
}

#[test]
fn appends_go_to_the_true_end_and_memory_is_bounded() {
    let mut core = core();
    give_root(&mut core);
    let (ino, handle) = file(&mut core, b"a");
    core.write(at(3), handle, 0, b"abc", false).unwrap();
    let append = core.open(at(3), ino, OpenFlags { append: true, ..RW }).unwrap().handle;
    core.write(at(3), append, 0, b"def", false).unwrap();
    assert_eq!(core.getattr(at(3), ino).unwrap().attributes.size, 6);
    let big = vec![0; 1 << 20];
    assert_eq!(core.write(at(3), handle, 0, &big, false), Err(Stop::Stall(Stall::Space)));
}

fn make_dir(core: &mut Core, name: &[u8]) -> Ino {
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
    core.unlink(at(3), Ino::ROOT, b"d", true).unwrap();
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
    core.unlink(at(3), Ino::ROOT, b"a", false).unwrap();
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
    core.rename(at(9), from, to, RenameMode::Replace)
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
    core.allocate(at(3), handle, 0, 200, keep).unwrap();
    core.write(at(3), handle, 0, &[1; 50], false).unwrap();
    core.write(at(3), handle, 100, &[1; 50], false).unwrap();
    let first = core.seal_file(at(3), ino, FlushReason::Commit);
    core.write(at(3), handle, 150, &[1; 10], false).unwrap();
    mutations(&mut core);
    store(&mut core, &first[0]);
    assert_eq!(sizes(mutations(&mut core)), [150]);
}
