//! The session's log: mutations in the order they were made, in numbered batches, kept until the
//! directory says they are durable.
//!
//! ```text
//! appended ... | forming (not numbered yet) | batches: to send | sent | applied | durable: gone
//! ```
//! Positions count mutations from 1 and are only known here; batch numbers are what the directory
//! knows. Invariants: a numbered batch never changes; batches leave only when durable, oldest first;
//! numbers have no gaps. Pure: the session's task takes what [`SessionLog::take_sendable`] gives.

use std::collections::VecDeque;

use prost::Message;
use us_core::limits::{BATCH_MUTATIONS_MAX, BATCH_TRACES_MAX};
use us_proto::v1;

/// The most encoded bytes in a batch, with room for the envelope.
pub const BATCH_BYTES_MAX: usize = (4 << 20) - (64 << 10);
/// The most encoded bytes the log may hold; above it, operations wait.
pub const LOG_BYTES_MAX: usize = 64 << 20;
/// How many batches may be on their way unapplied before small ones are gathered.
const UNAPPLIED_BATCHES_MAX: u64 = 3;

/// The place of a mutation in the log; the first is 1.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct LogPosition(pub u64);

/// With so many bytes a batch is worth sending by itself.
const WORTHWHILE_BYTES: usize = 128 << 10;

/// The log of one session.
#[derive(Debug, Default)]
pub struct SessionLog {
    forming: VecDeque<(v1::Mutation, usize)>,
    forming_bytes: usize,
    /// The requests that what is forming comes from, as far as anybody wants to know.
    traces: Vec<u64>,
    batches: VecDeque<Numbered>,
    batches_bytes: usize,
    appended: u64,
    /// The next batch to send on the present stream.
    send_next: u64,
    last_number: u64,
    applied: u64,
    durable: u64,
    durable_position: LogPosition,
}

#[derive(Debug)]
struct Numbered {
    batch: v1::Batch,
    bytes: usize,
    last: LogPosition,
}

impl SessionLog {
    /// An empty log, before the first batch.
    pub fn new() -> Self {
        Self { send_next: 1, ..Self::default() }
    }

    /// Appends a mutation.
    pub fn append(&mut self, op: v1::mutation::Op) -> LogPosition {
        let mutation = v1::Mutation { op: Some(op) };
        // Six bytes: tag and length of the mutation within the batch.
        let bytes = mutation.encoded_len() + 6;
        self.forming.push_back((mutation, bytes));
        self.forming_bytes += bytes;
        self.appended += 1;
        LogPosition(self.appended)
    }

    /// What was appended last comes from this request: for the directory's logs.
    pub fn note_trace(&mut self, trace: u64) {
        let known = trace == 0 || self.forming.is_empty() || self.traces.last() == Some(&trace);
        if !known && self.traces.len() < BATCH_TRACES_MAX {
            self.traces.push(trace);
        }
    }

    /// The position of the newest mutation.
    pub const fn end(&self) -> LogPosition {
        LogPosition(self.appended)
    }

    /// Everything up to here is durable.
    pub const fn durable_position(&self) -> LogPosition {
        self.durable_position
    }

    /// The last batch the directory has called durable.
    pub const fn durable_number(&self) -> u64 {
        self.durable
    }

    /// Everything up to here was applied, as far as the directory has said.
    pub fn applied_position(&self) -> LogPosition {
        let applied = self.batches.iter().take_while(|kept| kept.batch.number <= self.applied);
        applied.last().map_or(self.durable_position, |kept| kept.last)
    }

    /// Whether nothing waits to become durable.
    pub fn is_empty(&self) -> bool {
        self.durable_position.0 == self.appended
    }

    /// Encoded bytes held.
    pub const fn bytes(&self) -> usize {
        self.forming_bytes + self.batches_bytes
    }

    /// Whether operations must wait before they append more.
    pub const fn is_full(&self) -> bool {
        self.bytes() >= LOG_BYTES_MAX
    }

    /// Whether what is forming need not wait for more.
    pub const fn is_worthwhile(&self) -> bool {
        self.forming_bytes >= WORTHWHILE_BYTES
    }

    /// The next batch to send on this stream. Unless `force`d (a request or an fsync waits behind
    /// the log), a small batch is held back while enough others are on their way, so that what
    /// comes meanwhile travels with it.
    pub fn take_sendable(&mut self, force: bool) -> Option<v1::Batch> {
        if self.send_next > self.last_number {
            let unapplied = self.last_number.saturating_sub(self.applied);
            let small = self.forming_bytes < BATCH_BYTES_MAX / 2;
            if self.forming.is_empty() || (!force && small && unapplied >= UNAPPLIED_BATCHES_MAX) {
                return None;
            }
            self.form_batch();
        }
        let oldest = self.last_number + 1 - self.batches.len() as u64;
        let index = self.send_next.checked_sub(oldest)? as usize;
        let batch = self.batches.get(index)?.batch.clone();
        self.send_next += 1;
        Some(batch)
    }

    fn form_batch(&mut self) {
        let mut mutations = Vec::with_capacity(self.forming.len().min(BATCH_MUTATIONS_MAX));
        let mut total = 0;
        while let Some((_, bytes)) = self.forming.front() {
            let full = mutations.len() == BATCH_MUTATIONS_MAX || total + bytes > BATCH_BYTES_MAX;
            if full && !mutations.is_empty() {
                break;
            }
            if let Some((mutation, bytes)) = self.forming.pop_front() {
                total += bytes;
                mutations.push(mutation);
            }
        }
        self.forming_bytes -= total;
        self.batches_bytes += total;
        self.last_number += 1;
        let last = LogPosition(self.appended - self.forming.len() as u64);
        let batch = v1::Batch {
            number: self.last_number,
            mutations,
            traces: std::mem::take(&mut self.traces),
        };
        self.batches.push_back(Numbered { batch, bytes: total, last });
    }

    /// The directory applied batch `number`.
    pub fn on_applied(&mut self, number: u64) {
        self.applied = self.applied.max(number.min(self.last_number));
    }

    /// Batches up to `number` are durable: they leave. Answers whether that is news.
    pub fn on_durable(&mut self, number: u64) -> bool {
        let number = number.min(self.last_number);
        self.on_applied(number);
        let mut news = false;
        while self.durable < number {
            let Some(batch) = self.batches.pop_front() else { break };
            self.batches_bytes -= batch.bytes;
            self.durable_position = batch.last;
            self.durable = batch.batch.number;
            news = true;
        }
        self.send_next = self.send_next.max(self.durable + 1);
        news
    }

    /// A new stream of the same session begins: the directory has applied batches up to `applied`,
    /// the next is sent again. Answers `false` where the directory has forgotten batches that it
    /// called durable: nothing can be replayed then.
    pub fn resume(&mut self, applied: u64) -> bool {
        if applied < self.durable || applied > self.last_number {
            return false;
        }
        self.applied = applied;
        self.send_next = applied + 1;
        true
    }

    /// The stream is gone: nothing more is sent until [`SessionLog::resume`].
    pub fn pause(&mut self) {
        self.send_next = u64::MAX;
    }

    /// All that is not durable, oldest first: for the rescue file.
    pub fn undurable(&self) -> impl Iterator<Item = &v1::Mutation> {
        let numbered = self.batches.iter().flat_map(|batch| &batch.batch.mutations);
        numbered.chain(self.forming.iter().map(|(mutation, _)| mutation))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn release(ino: u64) -> v1::mutation::Op {
        v1::mutation::Op::Release(v1::Release { ino })
    }

    fn inos(batch: &v1::Batch) -> Vec<u64> {
        let ino = |mutation: &v1::Mutation| match &mutation.op {
            Some(v1::mutation::Op::Release(release)) => release.ino,
            _ => 0,
        };
        batch.mutations.iter().map(ino).collect()
    }

    #[test]
    fn batches_are_numbered_and_leave_when_durable() {
        let mut log = SessionLog::new();
        log.append(release(1));
        log.append(release(2));
        let first = log.take_sendable(false).unwrap();
        assert_eq!((first.number, inos(&first)), (1, vec![1, 2]));
        assert_eq!(log.take_sendable(true), None);
        let third = log.append(release(3));
        assert_eq!(log.take_sendable(false).unwrap().number, 2);
        assert!(log.on_durable(1));
        assert_eq!(log.durable_position(), LogPosition(2));
        assert!(!log.is_empty());
        assert!(log.on_durable(2));
        assert_eq!(log.durable_position(), third);
        assert!(log.is_empty() && log.bytes() == 0);
    }

    #[test]
    fn a_resumed_stream_starts_behind_what_was_applied() {
        let mut log = SessionLog::new();
        for ino in 1..=4 {
            log.append(release(ino));
            assert!(log.take_sendable(true).is_some());
        }
        log.on_durable(1);
        log.pause();
        log.append(release(5));
        assert_eq!(log.take_sendable(true), None);
        assert!(log.resume(2));
        let replayed: Vec<_> =
            std::iter::from_fn(|| log.take_sendable(true)).flat_map(|b| inos(&b)).collect();
        assert_eq!(replayed, [3, 4, 5]);
        assert!(!log.resume(0), "batch 1 was durable");
        assert!(!log.resume(9), "never sent");
    }

    #[test]
    fn small_batches_gather_while_others_are_on_their_way() {
        let mut log = SessionLog::new();
        for ino in 1..=3 {
            log.append(release(ino));
            assert!(log.take_sendable(false).is_some());
        }
        log.append(release(4));
        log.append(release(5));
        assert_eq!(log.take_sendable(false), None);
        log.on_applied(1);
        assert_eq!(inos(&log.take_sendable(false).unwrap()), [4, 5]);
    }

    #[test]
    fn a_batch_names_the_requests_it_comes_from() {
        let mut log = SessionLog::new();
        log.note_trace(1);
        for trace in [2, 2, 0, 3] {
            log.append(release(trace));
            log.note_trace(trace);
        }
        let first = log.take_sendable(true).unwrap();
        assert_eq!(first.traces, [2, 3], "1 has appended nothing");
        log.append(release(4));
        assert!(log.take_sendable(true).unwrap().traces.is_empty());
        for trace in 1..100 {
            log.append(release(trace));
            log.note_trace(trace);
        }
        assert_eq!(log.take_sendable(true).unwrap().traces.len(), BATCH_TRACES_MAX);
    }

    #[test]
    fn batches_keep_their_limits() {
        let mut log = SessionLog::new();
        for ino in 0..=BATCH_MUTATIONS_MAX as u64 {
            log.append(release(ino));
        }
        assert_eq!(log.take_sendable(true).unwrap().mutations.len(), BATCH_MUTATIONS_MAX);
        assert_eq!(log.take_sendable(true).unwrap().mutations.len(), 1);
    }
}
