//! What is checked of a history: what programs are told against what all of them believe.

use us_core::ids::Ino;
use us_proto::v1::LockKind;
use usfs::core::Effect as CoreEffect;
use usfs::core::locks::{LockAsk, LockEvent, LockOutcome, OwnLock};

use super::{Asking, BYTES, FILES, OWNERS, Sim, bytes, excludes};

impl Sim {
    fn others<'a>(
        &'a self,
        index: usize,
        asking: &'a Asking,
    ) -> impl Iterator<Item = (usize, u64)> + 'a {
        let all = (0..self.mounts.len()).flat_map(|other| (0..OWNERS).map(move |by| (other, by)));
        all.filter(move |(other, by)| (*other, *by) != (index, asking.ask.wanted.by))
    }

    pub fn check_outcome(&self, index: usize, asking: &Asking, outcome: LockOutcome) {
        let wanted = asking.ask.wanted;
        if wanted.kind == LockKind::Unlock {
            assert_eq!(outcome, LockOutcome::Granted, "a release is refused");
            return;
        }
        if outcome == LockOutcome::Granted && !self.mounts[index].trusts(self.now_ms) {
            return;
        }
        for (other, by) in self.others(index, asking) {
            let mount = &self.mounts[other];
            let Some(believed) = mount.believed.get(&(by, asking.ino)) else { continue };
            for at in bytes(&wanted).filter(|_| mount.trusts(self.now_ms)) {
                let (kind, since) = believed[at];
                let there = excludes(kind, wanted.kind) && outcome == LockOutcome::Granted;
                let overlooked = there && (!asking.ask.test || since <= asking.at);
                assert!(
                    !overlooked,
                    "mount {index} is granted {asking:?}, and owner {by} of mount {other} has \
                     {kind:?} on byte {at} since step {since}"
                );
            }
        }
        if matches!(outcome, LockOutcome::InTheWay(_)) {
            let possible = |(other, by): (usize, u64)| {
                let possible = self.possible.get(&(other, by, asking.ino));
                possible.is_some_and(|steps| bytes(&wanted).any(|at| steps[at] >= asking.at))
            };
            let reason = self.others(index, asking).any(possible);
            let reason = reason || self.ghosts.contains(&asking.ino);
            assert!(reason, "mount {index} is refused {asking:?}: {outcome:?}");
        }
    }

    /// Notes what everybody can have now.
    pub fn note_possible(&mut self) {
        let step = self.step;
        for (index, mount) in self.mounts.iter().enumerate() {
            for ((by, ino), believed) in &mount.believed {
                let steps = self.possible.entry((index, *by, *ino)).or_default();
                let held = (0..BYTES).filter(|at| believed[*at].0 != LockKind::Unlock);
                held.for_each(|at| steps[at] = step);
            }
            for asking in mount.asking.values().filter(|asking| !asking.ask.test) {
                let wanted = asking.ask.wanted;
                let steps = self.possible.entry((index, wanted.by, asking.ino)).or_default();
                bytes(&wanted).for_each(|at| steps[at] = step);
            }
            for ino in 1..=FILES {
                for held in mount.core.locks().held(Ino(ino)) {
                    let steps = self.possible.entry((index, held.by, ino)).or_default();
                    bytes(held).for_each(|at| steps[at] = step);
                }
            }
        }
    }

    /// Nothing is on its way: whoever waits waits for somebody's lock.
    pub fn check_waiters(&mut self) {
        let mut seen = 0;
        for (index, mount) in self.mounts.iter().enumerate() {
            for asking in mount.asking.values() {
                let wanted = asking.ask.wanted;
                let has = |(other, by): (usize, u64)| {
                    let held = self.mounts[other].core.locks().held(Ino(asking.ino));
                    held.iter().any(|held| {
                        let same = (other, held.by) == (index, wanted.by);
                        !same
                            && held.by == by
                            && excludes(held.kind, wanted.kind)
                            && held.overlaps(&wanted)
                    })
                };
                let reason = self.others(index, asking).any(has);
                // It waits for what it gave up to be taken back.
                let gave_up = mount.gave_up.contains(&(wanted.by, asking.ino));
                seen += 1;
                assert!(reason || gave_up, "mount {index} waits in vain: {asking:?}");
            }
        }
        self.waits_seen += seen;
    }

    /// A fresh owner of the mount asks, and is answered.
    fn probe(&mut self, index: usize, ino: u64, wanted: OwnLock, test: bool) -> LockOutcome {
        let number = self.mounts[index].core.request_number();
        let ask = LockAsk { wanted, test, wait_ms: 0 };
        let (now_ms, mount) = (self.now_ms, &mut self.mounts[index]);
        let now = mount.now(now_ms);
        let locked = mount.core.step_locks(now, LockEvent::Asked { number, ino: Ino(ino), ask });
        let mut done = locked.done;
        for round in 0.. {
            if !done.is_empty() {
                break;
            }
            assert!(round < 100, "mount {index} is not answered: {wanted:?}");
            let before = self.now_ms;
            for other in 0..self.mounts.len() {
                self.pump(other);
                while !self.mounts[other].up.is_empty() {
                    self.arrives(other);
                }
            }
            for other in 0..self.mounts.len() {
                while let Some(down) = self.mounts[other].down.pop_front() {
                    let now = self.mounts[other].now(before);
                    let effect = self.mounts[other].core.on_down(now, down);
                    let Some(CoreEffect::Locked(locked)) = effect else { continue };
                    done.extend(locked.done.iter().filter(|(n, _)| other == index && *n == number));
                    self.ended(other, &locked);
                }
            }
        }
        done[0].1
    }

    /// Whoever is not asking has what he believes he has, and nothing besides.
    fn check_held(&mut self) {
        for index in 0..self.mounts.len() {
            let owners = (0..OWNERS).flat_map(|by| (1..=FILES).map(move |ino| (by, ino)));
            for (by, ino) in owners {
                let mount = &mut self.mounts[index];
                if mount.is_asking(by, ino) {
                    continue;
                }
                let believed = mount.believes(by, ino).map(|(kind, _)| kind != LockKind::Unlock);
                let mut held = [false; BYTES];
                let locks = mount.core.locks().held(Ino(ino));
                for lock in locks.iter().filter(|lock| lock.by == by) {
                    bytes(lock).for_each(|at| held[at] = true);
                }
                assert_eq!(held, believed, "owner {by} of mount {index} on inode {ino}");
            }
        }
    }

    pub fn check_end(&mut self) {
        self.look();
        self.heal();
        self.look();
        self.check_held();
        let (count, fresh) = (self.mounts.len(), OWNERS + 1);
        for index in 0..count {
            for ((by, ino), believed) in self.mounts[index].believed.clone() {
                for (at, (kind, _)) in believed.into_iter().enumerate() {
                    let from = (index + 1) % count;
                    let at = at as u64;
                    let (start, end) = (at, at);
                    let wanted = OwnLock { by: fresh, start, end, kind: LockKind::Write, pid: 0 };
                    let found = self.probe(from, ino, wanted, true) != LockOutcome::Granted;
                    let lost = kind != LockKind::Unlock && !found;
                    assert!(
                        !lost,
                        "owner {by} of mount {index}: {kind:?} on {at} of {ino} is lost"
                    );
                }
            }
        }
        for index in 0..count {
            let numbers: Vec<u64> = self.mounts[index].asking.keys().copied().collect();
            numbers.into_iter().for_each(|number| self.gives_up(index, number));
            for owner in 0..OWNERS {
                (1..=FILES).for_each(|ino| self.close(index, owner, ino));
            }
        }
        self.heal();
        for index in 0..count {
            for ino in 1..=FILES {
                let (start, end, kind) = (0, u64::MAX, LockKind::Write);
                let wanted = OwnLock { by: fresh, start, end, kind, pid: 0 };
                let mut outcome = self.probe(index, ino, wanted, false);
                for _ in 0..if self.kills { 8 } else { 0 } {
                    if outcome == LockOutcome::Granted {
                        break;
                    }
                    // A dead mount is shut out when it is in the way.
                    self.pass(1);
                    outcome = self.probe(index, ino, wanted, false);
                }
                assert_eq!(outcome, LockOutcome::Granted, "mount {index}, inode {ino}");
                let free = OwnLock { kind: LockKind::Unlock, ..wanted };
                assert_eq!(self.probe(index, ino, free, false), LockOutcome::Granted);
            }
        }
    }
}
