//! Notices that a connection with work under way makes no progress.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::{Instant, Sleep, sleep_until};

/// Expires when there was work, but no progress, for the whole timeout. An idle connection never
/// expires; the timer it may have left behind fires once and is not set again.
pub(crate) struct Watchdog {
    timeout: Duration,
    last_progress: Instant,
    busy: bool,
    sleep: Option<Pin<Box<Sleep>>>,
}

impl Watchdog {
    pub(crate) fn new(timeout: Duration) -> Self {
        Self { timeout, last_progress: Instant::now(), busy: false, sleep: None }
    }

    /// Work begins outside the task that polls. False where no timer is running that would wake the
    /// task: then it must be woken, and sets one.
    pub(crate) fn begin(&mut self) -> bool {
        let armed = self.sleep.as_ref().is_some_and(|sleep| !sleep.is_elapsed());
        if armed && !self.busy {
            self.busy = true;
            self.last_progress = Instant::now();
        }
        armed
    }

    /// Ready when the time is over. Progress only notes the time; the timer is moved when it fires.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>, busy: bool, progress: bool) -> Poll<()> {
        if progress || busy != self.busy {
            self.last_progress = Instant::now();
        }
        self.busy = busy;
        if !busy {
            return Poll::Pending;
        }
        let until = self.last_progress + self.timeout;
        let sleep = self.sleep.get_or_insert_with(|| Box::pin(sleep_until(until)));
        while sleep.as_mut().poll(cx).is_ready() {
            if until <= Instant::now() {
                return Poll::Ready(());
            }
            sleep.as_mut().reset(until);
        }
        Poll::Pending
    }
}
