//! What is going to happen, in order of time; what is noted for one moment happens in the order in
//! which it was noted.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::blocks::Fragment;

/// Something that happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Happening {
    /// The directory's time passes.
    Tick,
    /// The state is noted.
    Sample,
    /// A machine is switched off. Machines are indexes.
    Goes(usize),
    /// A machine is switched on.
    Comes(usize),
    /// A machine dies, disk and all.
    Dies(usize),
    /// A new machine of this site.
    Newcomer(u32),
    /// A site burns down.
    Fire(u32),
    /// A provider has carried out the order with this ticket.
    Done(usize, u64),
    /// Some fragment somewhere rots.
    Rot,
    /// The scrub of a provider finds it.
    Found(usize, Fragment),
    /// What the machine with this number of death held must be there again.
    Overdue(usize),
    /// An order must have been answered or taken back.
    OrderOverdue(usize, u64),
    /// No more faults.
    Calm,
    /// Everybody comes back.
    Roll,
}

/// The calendar.
#[derive(Debug, Default)]
pub struct Calendar {
    entries: BinaryHeap<Reverse<(u64, u64, Happening)>>,
    next: u64,
}

impl Calendar {
    /// Something will happen.
    pub fn note(&mut self, at_ms: u64, what: Happening) {
        self.entries.push(Reverse((at_ms, self.next, what)));
        self.next += 1;
    }

    /// The next that happens, and when.
    pub fn take_next(&mut self) -> Option<(u64, Happening)> {
        self.entries.pop().map(|Reverse((at_ms, _, what))| (at_ms, what))
    }
}
