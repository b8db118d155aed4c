//! Buffers of whole blocks, used again: a fresh one costs a page fault every 4 KiB (the benchmark
//! `pipeline` shows storing at 0.31 CPU s/GB with them, 0.39 without).

use std::sync::{Arc, Weak};

use bytes::Bytes;
use parking_lot::Mutex;

/// Idle buffers kept.
const IDLE_MAX: usize = 4;

/// Buffers that nobody uses. What lies in them is old ciphertext, never plaintext.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    idle: Mutex<Vec<Vec<u8>>>,
}

/// A buffer in use. Goes back when it, or the last [`Bytes`] made of it, is dropped.
pub(super) struct Buffer {
    bytes: Vec<u8>,
    home: Weak<Buffers>,
}

impl Buffers {
    /// A buffer of `bytes` bytes with anything in it: the caller overwrites all.
    pub fn take(self: &Arc<Self>, bytes: usize) -> Buffer {
        let mut buffer = self.idle.lock().pop().unwrap_or_default();
        if buffer.capacity() < bytes {
            buffer = vec![0; bytes];
        } else {
            buffer.resize(bytes, 0);
        }
        Buffer { bytes: buffer, home: Arc::downgrade(self) }
    }
}

impl Buffer {
    /// The bytes, to write to.
    pub fn as_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }

    /// The bytes, to share.
    pub fn freeze(self) -> Bytes {
        Bytes::from_owner(self)
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let Some(home) = self.home.upgrade() else { return };
        let mut idle = home.idle.lock();
        if idle.len() < IDLE_MAX {
            idle.push(std::mem::take(&mut self.bytes));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_come_back_with_the_last_share_and_few_are_kept() {
        let buffers = Arc::new(Buffers::default());
        let shared = buffers.take(1000).freeze();
        let part = shared.slice(10..20);
        drop(shared);
        assert!(buffers.idle.lock().is_empty());
        drop(part);
        assert_eq!(buffers.idle.lock().len(), 1);
        assert_eq!(buffers.take(10).as_ref().len(), 10);
        let many: Vec<Buffer> = (0..10).map(|_| buffers.take(5)).collect();
        drop(many);
        assert_eq!(buffers.idle.lock().len(), IDLE_MAX);
    }
}
