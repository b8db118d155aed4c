//! Waiting for a condition.

use std::time::{Duration, Instant};

/// How often a condition is looked at.
const PERIOD: Duration = Duration::from_millis(50);

/// Looks at `condition` until it gives a value.
///
/// # Panics
/// When `deadline` has passed; the message says what was waited for and the last reason against it.
pub fn until<T>(
    what: &str,
    deadline: Duration,
    mut condition: impl FnMut() -> Result<T, String>,
) -> T {
    let start = Instant::now();
    loop {
        match condition() {
            Ok(value) => return value,
            Err(reason) if start.elapsed() > deadline => {
                panic!("waited {deadline:?} for {what}: {reason}")
            }
            Err(_) => std::thread::sleep(PERIOD),
        }
    }
}
