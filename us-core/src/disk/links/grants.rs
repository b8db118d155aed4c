//! The grant that a mount shows to providers, and what happens when one no longer takes it.
//!
//! The session brings a fresh grant long before the old one ends. Where a provider refuses the present
//! one all the same (the mount was asleep, or the directory away), a fresh one is asked for and the
//! request sent again with it: nobody else sees that it ended.

use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, timeout_at};

use super::FragmentFailure;

/// How long a fresh grant is waited for.
const FRESH_TIMEOUT: Duration = Duration::from_secs(10);
/// Fresh grants that one request tries.
const FRESH_MAX: usize = 3;

/// The present grant, and the wish for another.
#[derive(Debug, Default)]
pub(super) struct Grants {
    present: watch::Sender<Bytes>,
    wanted: Notify,
    /// The grant for which another was asked last: once is enough.
    asked: Mutex<Bytes>,
}

/// What one request shows.
pub(super) struct Shown<'a> {
    grants: &'a Grants,
    /// What it shows now.
    pub grant: Bytes,
    fresh: usize,
    deadline: Instant,
}

impl Grants {
    pub fn set(&self, grant: Bytes) {
        self.present.send_replace(grant);
    }

    /// Waits until a fresh grant is wanted; one wish is kept for who comes later.
    pub async fn wanted(&self) {
        self.wanted.notified().await;
    }

    /// For one request that gives up at `deadline`.
    pub fn show(&self, deadline: Instant) -> Shown<'_> {
        Shown { grants: self, grant: self.present.borrow().clone(), fresh: 0, deadline }
    }

    fn ask(&self, refused: &Bytes) {
        let mut asked = self.asked.lock();
        if *asked != *refused || refused.is_empty() {
            *asked = refused.clone();
            self.wanted.notify_one();
        }
    }
}

impl Shown<'_> {
    /// Whether the request is to be made once more, because this answer refused its grant and there is
    /// a fresh one now.
    pub async fn is_renewed<T>(&mut self, answer: &Result<T, FragmentFailure>) -> bool {
        if !matches!(answer, Err(FragmentFailure::NoGrant { .. })) || self.fresh >= FRESH_MAX {
            return false;
        }
        self.fresh += 1;
        let mut present = self.grants.present.subscribe();
        if *present.borrow_and_update() == self.grant {
            self.grants.ask(&self.grant);
        }
        let until = self.deadline.min(Instant::now() + FRESH_TIMEOUT);
        let waited = timeout_at(until, present.wait_for(|grant| *grant != self.grant)).await;
        let Ok(Ok(fresh)) = waited else { return false };
        let fresh = fresh.clone();
        self.grant = fresh;
        true
    }
}
