//! A provider leaves for good: nothing is dropped before it lies elsewhere, whoever crashes meanwhile.

use super::swarm::{DAY_MS, MINUTE_MS, Swarm};
use super::*;

/// The owner's word, with every report as a real provider sends it.
fn say(swarm: &mut Swarm, key: u8, leaving: bool) {
    let conn = swarm.disks[&key].conn.unwrap();
    swarm.world.provider_says(conn, PUp::Report(ProviderReport { leaving, ..report() }));
}

/// Time passes; `key` goes on saying that it leaves. What it heard of that.
fn pass(swarm: &mut Swarm, key: u8, ms: u64) -> Vec<LeaveProgress> {
    swarm.heard.clear();
    for _ in 0..ms / 500 {
        // The others' reports say that they stay.
        let conn = swarm.disks[&key].conn.unwrap();
        swarm.world.providers.retain(|(known, _)| *known != conn);
        say(swarm, key, true);
        swarm.run(500);
        if swarm.heard.last().is_some_and(|said| said.left) {
            break;
        }
    }
    swarm.heard.clone()
}

#[test]
fn a_provider_leaves_when_nothing_is_left_there() {
    let mut swarm = Swarm::new(8);
    swarm.write(40);
    let id = swarm.disks[&3].id;
    let held = swarm.disks[&3].has.len();
    let heard = pass(&mut swarm, 3, 5 * MINUTE_MS);
    let last = heard.last().unwrap();
    assert!(last.left && heard.len() > 2, "{heard:?}");
    let times: Vec<u64> = heard.iter().map(|said| said.left_s).collect();
    assert!(times.is_sorted_by(|before, after| before >= after), "{times:?}");
    assert_eq!(swarm.copies, held as u64, "moved whole, once each");
    assert!(swarm.records().iter().all(|(_, record)| !record.providers.contains(&id)));
    let status = swarm.world.status();
    assert!(status.providers.iter().all(|known| known.provider != id));
    swarm.disks.remove(&3);
    swarm.run(MINUTE_MS);
    swarm.check_whole();
    let Answer::Events(events) = swarm.world.ask(Question::Events { after: 0, last: 0 }) else {
        panic!()
    };
    let kinds: Vec<&str> = events.iter().map(|event| event.kind.as_str()).collect();
    assert!(kinds.contains(&"provider-left") && kinds.contains(&"drain-done"), "{kinds:?}");
    // A place leased before may still name it: what is committed so is made again elsewhere.
    assert!(swarm.world.engine.cluster.next_provider > id);
}

#[test]
fn one_that_holds_nothing_is_gone_soon_and_a_drain_of_nothing_is_done() {
    let mut swarm = Swarm::new(7);
    let id = swarm.disks[&7].id;
    let drained = swarm.world.ask(Question::Drain { provider: id, undo: false });
    assert!(matches!(drained, Answer::Count(0)));
    swarm.run(5_000);
    let kinds = |swarm: &mut Swarm| -> Vec<String> {
        match swarm.world.ask(Question::Events { after: 0, last: 0 }) {
            Answer::Events(events) => events.into_iter().map(|event| event.kind).collect(),
            other => panic!("{other:?}"),
        }
    };
    let done = |kinds: &[String]| kinds.iter().filter(|kind| *kind == "drain-done").count();
    let told = kinds(&mut swarm);
    assert_eq!(done(&told), 1, "{told:?}");
    let heard = pass(&mut swarm, 7, 5 * MINUTE_MS);
    assert!(heard.last().unwrap().left, "{heard:?}");
    let told = kinds(&mut swarm);
    assert_eq!(done(&told), 1, "said once: {told:?}");
}

#[test]
fn leaving_goes_on_after_everybody_crashed_and_ends_where_it_is_taken_back() {
    let mut swarm = Swarm::new(8);
    swarm.write(30);
    let id = swarm.disks[&2].id;
    say(&mut swarm, 2, true);
    assert!(swarm.world.status().providers[usize::try_from(id).unwrap() - 1].draining);
    let undone = swarm.world.ask(Question::Drain { provider: id, undo: true });
    assert!(matches!(undone, Answer::Refused { kind: RefusalKind::Busy, .. }), "{undone:?}");
    // The provider crashes in the middle, is away for a while, and goes on.
    swarm.leave(2);
    swarm.run(MINUTE_MS);
    swarm.join(2);
    let some = pass(&mut swarm, 2, 1_000);
    assert!(some.iter().all(|said| !said.left), "{some:?}");
    // It stays after all.
    say(&mut swarm, 2, false);
    let conn = swarm.disks[&2].conn.unwrap();
    swarm.world.providers.push((conn, id));
    swarm.run(5 * MINUTE_MS);
    assert!(!swarm.world.status().providers[usize::try_from(id).unwrap() - 1].draining);
    swarm.world.now_ms += DAY_MS;
    swarm.run(MINUTE_MS);
    swarm.check_whole();
}
