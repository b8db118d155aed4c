//! What the kernel may believe, and what keeps an operation from its answer: for telling the kernel
//! to forget.

use std::collections::HashSet;

use us_core::ids::Ino;

use super::Core;
use crate::data::Ticket;

impl Core {
    /// Every inode that the kernel has looked up and not forgotten.
    pub fn known_to_kernel(&self) -> Vec<Ino> {
        let known = self.nodes.iter().filter(|(_, node)| node.is_referred());
        known.map(|(ino, _)| *ino).collect()
    }

    /// Whether the block of `ticket` is not committed yet.
    pub fn is_open(&self, ticket: Ticket) -> bool {
        self.any_open(&HashSet::from([ticket]))
    }

    /// The requests that operations wait for now: number, and the inode they are about.
    pub fn unanswered(&self) -> Vec<(u64, Ino)> {
        self.pending.iter().map(|(number, asked)| (*number, asked.want.ino())).collect()
    }
}
