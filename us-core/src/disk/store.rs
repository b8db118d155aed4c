//! Storing a block.

use super::FragmentBits;
use tokio::sync::watch;

/// Fragments of an acknowledged block that become durable later.
#[derive(Debug)]
pub struct LateFragments {
    progress: watch::Receiver<FragmentBits>,
    seen: FragmentBits,
}

impl LateFragments {
    /// Waits until more fragments are durable and returns all that are; `None` once no put of the
    /// block is under way any more. Cancel-safe.
    pub async fn next(&mut self) -> Option<FragmentBits> {
        loop {
            let current = *self.progress.borrow_and_update();
            if current != self.seen {
                self.seen = current;
                return Some(current);
            }
            self.progress.changed().await.ok()?;
        }
    }
}
