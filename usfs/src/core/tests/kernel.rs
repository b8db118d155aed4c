//! What the kernel is told and what is let go of.

use super::*;

/// A name that is not there was remembered by the kernel, and not by the mount where the directory was
/// wholly known: another mount made it, and it stayed away here for the rest of the lease.
#[test]
fn names_that_the_kernel_was_told_are_not_there_are_forgotten_at_a_recall() {
    let mut core = core();
    give_root(&mut core);
    let absent = |core: &mut Core, name: &[u8]| match core.lookup(at(3), Ino::ROOT, name) {
        Ok(Lookup::Absent(valid)) => valid,
        other => panic!("{other:?}"),
    };
    assert!(absent(&mut core, b"flag") > Duration::ZERO);
    assert_eq!(core.cached_names(Ino::ROOT), [b"flag".to_vec().into_boxed_slice()]);
    for number in 0..node::TOLD_ABSENT_MAX {
        absent(&mut core, number.to_string().as_bytes());
    }
    assert_eq!(absent(&mut core, b"one too many"), Duration::ZERO);
    assert_eq!(core.cached_names(Ino::ROOT).len(), node::TOLD_ABSENT_MAX);
}

/// Looked-up names of a directory that is not wholly known.
pub(super) fn look_up(core: &mut Core, number: u64) -> Ino {
    let name = format!("name{number}");
    let (ino, level) = (Ino(10_000 + number), Level::Shared);
    let want = Want::Entry { dir: Ino::ROOT, name: name.as_bytes().into(), level };
    answer(core, &want, |fetched| {
        fetched.leases =
            vec![lease(1, Level::Shared, 50_000 + number), lease(ino.0, level, 50_000 + number)];
        let child = v1::Inode { ino: ino.0, mode: 0o100_644, nlink: 1, ..Default::default() };
        fetched.inodes = vec![root(), child];
        let entry = v1::Entry { ino: ino.0, cookie: number + 1, ..Default::default() };
        fetched.entries = vec![entry];
    });
    assert!(matches!(core.lookup(at(2), Ino::ROOT, name.as_bytes()), Ok(Lookup::Found(_))));
    ino
}

/// What was found by its path stayed pinned for the operation that had asked, for ever: it was never
/// let go of, and after a million files nothing could be looked up.
#[test]
fn what_was_looked_up_and_forgotten_is_let_go_of() {
    let mut core = core();
    let inos: Vec<Ino> = (0..3000).map(|number| look_up(&mut core, number)).collect();
    assert!(core.evict(at(500)) || core.nodes.len() > 3000, "the kernel still knows them");
    assert!(core.nodes.len() > 3000);
    inos.iter().for_each(|ino| core.forget(*ino, 1));
    core.evict(at(500));
    core.evict(at(500));
    assert!(core.nodes.len() <= 1000, "{} are left", core.nodes.len());
    let mut sent = Vec::new();
    core.take_outgoing(usize::MAX, &mut sent);
    let returned = sent.into_iter().filter_map(|event| match event {
        Up::LeaseReturn(returned) => Some(returned.leases.len()),
        _ => None,
    });
    assert!(returned.sum::<usize>() >= 2000);
}

/// Once an operation is over, nothing of what it asked for keeps a recall waiting.
#[test]
fn an_operation_that_is_over_pins_nothing() {
    let mut core = core();
    let ino = look_up(&mut core, 1);
    assert_eq!(core.begin_recall(at(2), recall(ino)), FinishedRecall::Pinned);
    let want = Want::Entry { dir: Ino::ROOT, name: (*b"name1").into(), level: Level::Shared };
    core.unpin(&[want]);
    assert_eq!(core.begin_recall(at(2), recall(ino)), FinishedRecall::Returned);
    assert_eq!(core.begin_recall(at(2), recall(Ino::ROOT)), FinishedRecall::Returned);
}
