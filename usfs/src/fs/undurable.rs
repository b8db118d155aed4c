//! The plaintext of blocks whose commit is not durable yet: should the session end, the rescue file
//! has it from here. It shares the bytes that were dirty and counts against the same memory; what
//! does not fit is read back from the providers then.

use std::collections::{HashMap, VecDeque};

use bytes::Bytes;
use us_core::ids::BlockId;

use crate::core::Core;
use crate::data::Ticket;
use crate::session::log::LogPosition;

#[derive(Debug)]
struct Kept {
    block: BlockId,
    ticket: Ticket,
    /// Its commit is in the log up to here; `None` while it waits for older ones.
    logged: Option<LogPosition>,
    pieces: Vec<Bytes>,
    bytes: u64,
}

/// The blocks, oldest first.
#[derive(Debug)]
pub(crate) struct UndurableBlocks {
    kept: VecDeque<Kept>,
    bytes: u64,
    bytes_max: u64,
}

impl UndurableBlocks {
    /// Nothing yet. `bytes_max`: what is dirty and what is kept here together.
    pub fn new(bytes_max: usize) -> Self {
        Self { kept: VecDeque::new(), bytes: 0, bytes_max: bytes_max as u64 }
    }

    /// What is kept.
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// A block was stored from `pieces`.
    pub fn keep(&mut self, core: &Core, block: BlockId, ticket: Ticket, pieces: Vec<Bytes>) {
        let bytes = pieces.iter().map(|piece| piece.len() as u64).sum();
        self.bytes += bytes;
        self.kept.push_back(Kept { block, ticket, logged: None, pieces, bytes });
        let left = self.bytes_max.saturating_sub(core.uncommitted_bytes());
        while self.bytes > left
            && let Some(oldest) = self.kept.pop_front()
        {
            self.bytes -= oldest.bytes;
        }
    }

    /// Commits may have come into the log, and the log is durable up to `durable`.
    pub fn advance(&mut self, core: &Core, log_end: LogPosition, durable: LogPosition) {
        for kept in self.kept.iter_mut().filter(|kept| kept.logged.is_none()) {
            if !core.is_open(kept.ticket) {
                kept.logged = Some(log_end);
            }
        }
        let bytes = &mut self.bytes;
        self.kept.retain(|kept| {
            let stays = kept.logged.is_none_or(|logged| logged > durable);
            *bytes -= if stays { 0 } else { kept.bytes };
            stays
        });
    }

    /// Takes what is kept, by block.
    pub fn take(&mut self) -> HashMap<BlockId, Vec<Bytes>> {
        self.bytes = 0;
        self.kept.drain(..).map(|kept| (kept.block, kept.pieces)).collect()
    }
}
