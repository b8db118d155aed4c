//! The daemon's background work: purging, compaction, scrub, a piece at a time.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use us_core::daemon::files::{Access, write_atomic};
use us_core::ids::FragmentId;

use super::{GuestConfig, Pause, Pressure, may_work};
use crate::store::{MaintainLimits, Store};

/// Between two pieces of work.
const PIECE_EVERY: Duration = Duration::from_secs(1);
/// Between two looks for work when there was none, or the machine was busy.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// The scrub's position is kept on disk after as many pieces.
const SAVE_EVERY: u32 = 30;
/// Below this share of the capacity free (one in ...), the trash is purged before its time.
const PRESSURE_SHARE: u64 = 20;
/// And below so many bytes: more than those with which a provider calls itself full, and as many as
/// the places that mounts have leased ahead may take. Never more than half of the capacity.
const PRESSURE_BYTES_MIN: u64 = 64 << 20;

/// Where the scrub is; kept in the file `scrub`.
#[derive(Clone, Default, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ScrubPosition {
    /// The last fragment seen, in hexadecimal digits; empty: none yet.
    after: String,
    /// Unix seconds at which this round began; 0: never.
    begun_s: u64,
    /// Whether the round has seen everything.
    complete: bool,
    /// Whether somebody asked for the round.
    asked: bool,
}

/// Asks for a scrub of everything now. Clones share it.
#[derive(Clone, Default, Debug)]
pub struct ScrubRequests {
    notify: Arc<Notify>,
}

impl ScrubRequests {
    /// A round begins at once, unless one that was asked for is under way.
    pub fn ask(&self) {
        self.notify.notify_one();
    }
}

impl ScrubPosition {
    fn load(path: &Path) -> Self {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        // One that cannot be read costs a scrub from the start.
        serde_json::from_str(&text).unwrap_or_default()
    }

    fn save(&self, path: &Path) {
        let text = serde_json::to_vec(self).expect("strings and numbers serialise");
        if let Err(error) = write_atomic(path, &text, Access::Public) {
            tracing::warn!(%error, "the scrub's position is not kept");
        }
    }

    fn after(&self) -> Option<FragmentId> {
        let pairs = self
            .after
            .as_bytes()
            .chunks(2)
            .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok());
        FragmentId::from_key(&pairs.collect::<Option<Vec<u8>>>()?)
    }

    fn set_after(&mut self, id: FragmentId) {
        self.after = id.to_key().iter().map(|byte| format!("{byte:02x}")).collect();
    }

    /// Begins a new round where one is due; says whether there is anything to do.
    fn is_due(&mut self, now_s: u64, every_s: u64) -> bool {
        if self.begun_s == 0 || (self.complete && now_s >= self.begun_s.saturating_add(every_s)) {
            *self = Self { begun_s: now_s, ..Self::default() };
        }
        !self.complete
    }

    /// Begins a round that somebody asked for.
    fn ask(&mut self, now_s: u64) {
        if !self.asked || self.complete {
            *self = Self { begun_s: now_s, asked: true, ..Self::default() };
        }
    }
}

/// Works until `stop`. Reads the machine's pressure before every piece.
pub async fn run(
    store: Store,
    config: GuestConfig,
    pause: Pause,
    requests: ScrubRequests,
    stop: CancellationToken,
) {
    let path = store.dir().join("scrub");
    let mut position = ScrubPosition::load(&path);
    let (mut pieces, mut wait) = (0u32, LOOK_EVERY);
    loop {
        // Cancel-safe, all: a dropped sleep loses nothing, a request that was not seen stays, the
        // token stays cancelled.
        tokio::select! {
            () = stop.cancelled() => break,
            () = requests.notify.notified() => {
                position.ask(now_s());
                position.save(&path);
            }
            () = tokio::time::sleep(wait) => {}
        }
        let (cpu, io) = (Pressure::of("cpu"), Pressure::of("io"));
        if let Err(why) = may_work(&config, pause.is_on(), cpu, io) {
            tracing::debug!(why, "background work waits");
            let store = store.clone();
            let Ok(relieved) = tokio::task::spawn_blocking(move || relieve(&store)).await else {
                return;
            };
            wait = if relieved { PIECE_EVERY } else { LOOK_EVERY };
            continue;
        }
        let (piece_store, piece_config, mut piece_position) = (store.clone(), config, position);
        let piece = tokio::task::spawn_blocking(move || {
            let busy = piece(&piece_store, &piece_config, &mut piece_position);
            (busy, piece_position)
        });
        let Ok((busy, moved)) = piece.await else { return };
        position = moved;
        pieces += 1;
        if pieces.is_multiple_of(SAVE_EVERY) || position.complete {
            position.save(&path);
        }
        wait = if busy { PIECE_EVERY } else { LOOK_EVERY };
    }
    position.save(&path);
}

/// With less than this free the trash is purged before its time.
fn pressure_bytes(capacity_bytes: u64) -> u64 {
    (capacity_bytes / PRESSURE_SHARE).max(PRESSURE_BYTES_MIN.min(capacity_bytes / 2))
}

/// Makes room where there is hardly any left. Says whether there may be more to do at once.
fn relieve(store: &Store) -> bool {
    let pressure_bytes = pressure_bytes(store.state().capacity_bytes);
    match store.relieve(&MaintainLimits { pressure_bytes, ..MaintainLimits::default() }) {
        Ok(purged) => purged > 0,
        Err(error) => {
            tracing::warn!(%error, "cannot purge the trash");
            false
        }
    }
}

/// One piece. Says whether there may be more to do at once.
fn piece(store: &Store, config: &GuestConfig, position: &mut ScrubPosition) -> bool {
    let rate = config.background_rate.bytes().max(1);
    let limits = MaintainLimits {
        copy_bytes_max: rate,
        pressure_bytes: pressure_bytes(store.state().capacity_bytes),
        ..MaintainLimits::default()
    };
    let maintained = store.maintain(&limits).unwrap_or_else(|error| {
        tracing::warn!(%error, "maintenance failed");
        crate::store::Maintained::default()
    });
    let left = rate.saturating_sub(maintained.copied_bytes);
    maintained.did_something() | scrub(store, config, position, left)
}

fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

fn scrub(store: &Store, config: &GuestConfig, position: &mut ScrubPosition, bytes: u64) -> bool {
    let every_s = u64::from(config.scrub_every_hours) * 3600;
    if bytes == 0 || !position.is_due(now_s(), every_s) {
        return false;
    }
    match store.scrub(position.after(), bytes) {
        Ok(done) => {
            metrics::counter!("us_provider_scrubbed_bytes_total").increment(done.bytes);
            match done.next {
                Some(id) => position.set_after(id),
                None => position.complete = true,
            }
            !position.complete
        }
        Err(error) => {
            tracing::warn!(%error, "scrub failed");
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use us_core::ids::BlockId;

    #[test]
    fn a_scrub_goes_on_where_it_was_and_begins_again_when_due() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("scrub");
        let mut position = ScrubPosition::load(&path);
        assert!(position.is_due(1000, 3600));
        let id = FragmentId { block: BlockId::from_bytes([0xab; 16]), index: 5 };
        position.set_after(id);
        position.save(&path);
        let mut position = ScrubPosition::load(&path);
        assert_eq!(position.after(), Some(id));
        assert!(position.is_due(90_000, 3600));
        position.complete = true;
        assert!(!position.is_due(2000, 3600));
        assert!(position.is_due(4600, 3600));
        assert_eq!(position.after(), None);
        // Asked for, it begins at once, and is not begun again before it is over.
        position.set_after(id);
        position.ask(5000);
        assert_eq!((position.after(), position.complete), (None, false));
        position.set_after(id);
        position.ask(5001);
        assert_eq!(position.after(), Some(id));
        position.complete = true;
        position.ask(5002);
        assert_eq!((position.after(), position.is_due(5003, 3600)), (None, true));
        std::fs::write(&path, "nonsense").unwrap();
        assert_eq!(ScrubPosition::load(&path), ScrubPosition::default());
    }
}
