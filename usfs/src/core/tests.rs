//! The core on its own, fed with made-up answers of the directory.

use bytes::Bytes;
use us_core::daemon::logging::RequestId;
use us_core::seal::VolumeKey;
use us_proto::v1::session_down::Event as Down;
use us_proto::v1::session_up::Event as Up;

use super::*;
use crate::attributes::SetAttributes;
use crate::fs::{Caller, Handle, Lookup, OpenFlags, RenameMode};

mod cleaning;
mod inlined;
mod kernel;
mod limits;
mod locks;
mod siblings;
mod size;
mod space;
mod tail;
mod unlinked;

const RW: OpenFlags = OpenFlags {
    read: true,
    write: true,
    append: false,
    truncate: false,
    sync: false,
    exclusive: false,
    no_atime: false,
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
        no_atime: false,
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
    store_at(core, at(3), plan);
}

fn store_at(core: &mut Core, now: Now, plan: &SealPlan) {
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
    core.finish_ticket(now, plan.ticket, Ok(Stored { info, commit }));
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

/// A handle (`name_to_handle_at`, NFS) of a file that the kernel had forgotten was refused: "." was only
/// looked up in directories.
#[test]
fn an_inode_is_found_by_its_number_alone() {
    let mut core = core();
    give_root(&mut core);
    let (ino, _) = file(&mut core, b"a");
    let Ok(Lookup::Found(found)) = core.lookup(at(3), ino, b".") else { panic!("it is there") };
    assert_eq!((found.attributes.ino, found.attributes.kind), (ino, FileKind::Regular));
    assert!(core.lookup(at(3), Ino::ROOT, b".").is_ok());
    let refused = core.lookup(at(3), ino, b"..").map(|_| ());
    assert_eq!(refused, Err(Stop::Fail(FsError::NotADirectory)));
    let want = Want::Inode { ino: Ino(77), level: Level::Shared };
    let unknown = core.lookup(at(3), Ino(77), b".").map(|_| ());
    assert_eq!(unknown, Err(Stop::Stall(Stall::Fetch(want))));
}

#[test]
fn names_are_made_and_moved_in_memory_and_logged_in_order() {
    let mut core = core();
    give_root(&mut core);
    let (ino, _) = file(&mut core, b"a");
    assert_eq!(ino, Ino(100));
    let renamed = core.rename(
        at(3),
        Caller::default(),
        (Ino::ROOT, b"a"),
        (Ino::ROOT, b"b"),
        RenameMode::Replace,
        &[],
    );
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
    let mut rename = || {
        core.rename(
            at(3),
            Caller::default(),
            (Ino::ROOT, b"new"),
            (Ino::ROOT, b"old"),
            RenameMode::Replace,
            &[],
        )
    };
    assert_eq!(rename(), Err(Stop::Stall(Stall::Flush(new))));
    let plans = core.seal_file(at(3), new, FlushReason::Commit);
    store(&mut core, &plans[0]);
    let renamed = core.rename(
        at(3),
        Caller::default(),
        (Ino::ROOT, b"new"),
        (Ino::ROOT, b"old"),
        RenameMode::Replace,
        &[],
    );
    assert!(renamed.is_ok());
}

/// A log is rotated onto an existing name while its writer goes on. There was always something dirty
/// when the rename looked, until it gave up after a minute.
#[test]
fn a_rename_beside_a_writer_waits_only_for_what_was_there() {
    let mut core = core();
    give_root(&mut core);
    let (new, handle) = file(&mut core, b"new");
    let (old, other) = file(&mut core, b"old");
    core.write(at(3), handle, 0, b"content", false).unwrap();
    let rename = |core: &mut Core, mode, flushed: &[Ino]| {
        core.rename(
            at(3),
            Caller::default(),
            (Ino::ROOT, b"new"),
            (Ino::ROOT, b"old"),
            mode,
            flushed,
        )
    };
    let stall = |ino| Err(Stop::Stall(Stall::Flush(ino)));
    assert_eq!(rename(&mut core, RenameMode::Replace, &[]), stall(new));
    let plans = core.seal_file(at(3), new, FlushReason::Commit);
    store(&mut core, &plans[0]);
    core.write(at(3), handle, 7, b" and more", false).unwrap();
    core.write(at(3), other, 0, b"the other", false).unwrap();
    assert_eq!(rename(&mut core, RenameMode::Exchange, &[new]), stall(old));
    assert!(rename(&mut core, RenameMode::Replace, &[new]).is_ok());
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
    core.finish_ticket(at(3), plans[0].ticket, Err(full.clone().into()));
    assert!(core.has_uncommitted(ino));
    assert_eq!(core.write(at(3), handle, 3, b"d", false), Err(Stop::Fail(full.clone())));
    assert_eq!(core.take_write_error(handle), Some(full.clone()));
    assert_eq!(core.take_write_error(handle), None);
    let plans = core.seal_file(at(3), ino, FlushReason::Durable);
    store(&mut core, &plans[0]);
    assert!(!core.has_uncommitted(ino));
    assert!(core.write(at(3), handle, 3, b"d", false).is_ok());
    // Where space comes back a writer goes on, and may wait for memory for as long as that takes.
    let comes = StoreFailure { error: full, patience: Duration::from_secs(240) };
    let plans = core.seal_file(at(4), ino, FlushReason::Durable);
    core.finish_ticket(at(4), plans[0].ticket, Err(comes));
    assert!(core.waits_for_space() && core.write(at(4), handle, 4, b"e", false).is_ok());
    let plans = core.seal_file(at(5), ino, FlushReason::Durable);
    store(&mut core, &plans[0]);
    assert!(!core.waits_for_space());
}

/// Two of six providers died under fsx: what was on its way to them was an error at once, though the
/// next try stored it.
#[test]
fn what_may_pass_is_tried_again_before_anybody_is_told() {
    let mut core = core();
    give_root(&mut core);
    let (ino, handle) = file(&mut core, b"a");
    let patience = Duration::from_millis(30);
    let dead = FsError::Io("two died".to_owned());
    let fails = |core: &mut Core, ms: u64| {
        let plans = core.seal_file(at(ms), ino, FlushReason::Commit);
        let failure = StoreFailure { error: dead.clone(), patience };
        core.finish_ticket(at(ms), plans[0].ticket, Err(failure));
        (core.storing_fails(ino).is_some(), core.storing_retries(ino).is_some())
    };
    core.write(at(3), handle, 0, b"abc", false).unwrap();
    assert_eq!(fails(&mut core, 3), (false, true));
    assert_eq!(core.take_write_error(handle), None);
    let plans = core.seal_file(at(30), ino, FlushReason::Commit);
    store(&mut core, &plans[0]);
    assert_eq!((core.storing_fails(ino), core.storing_retries(ino)), (None, None));
    assert!(!core.waits_for_space());
    // It counts from the first failure after that.
    core.write(at(31), handle, 0, b"abc", false).unwrap();
    assert_eq!(fails(&mut core, 31), (false, true));
    assert_eq!(fails(&mut core, 60), (false, true));
    assert_eq!(fails(&mut core, 61), (true, true));
    assert_eq!(core.take_write_error(handle), Some(dead.clone()));
    // What is cut off need not be stored.
    core.discard_data(ino);
    assert_eq!((core.storing_fails(ino), core.storing_retries(ino)), (None, None));
    core.write(at(90), handle, 0, b"new", false).unwrap();
    assert_eq!(fails(&mut core, 90), (false, true), "what failed before is not this");
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
    core.forget(ino, 1);
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
    core.unlink(at(3), Caller::default(), Ino::ROOT, b"a", false).unwrap();
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
