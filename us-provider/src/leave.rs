//! Leaving for good: the owner's word, kept in a file so that a crash in the middle changes nothing;
//! the directory moves everything elsewhere first, says how far it is, and at the end that this
//! provider is none any more.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use us_core::daemon::files::{Access, write_atomic};
use us_proto::v1::LeaveProgress;

/// What the file says while it is going on.
const LEAVING: &[u8] = b"leaving\n";
/// What it says afterwards.
const LEFT: &[u8] = b"left\n";

/// How far the leaving is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Fragments that are still to be moved; `None`: the directory has not said yet.
    pub fragments_left: Option<u64>,
    /// Seconds it will take at the present rate; 0: not known.
    pub left_s: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Staying,
    Leaving(Progress),
    Left,
}

/// Whether this provider is leaving. Clones share it.
#[derive(Clone, Debug)]
pub struct Leave {
    state: Arc<Mutex<State>>,
    path: Arc<PathBuf>,
}

impl Leave {
    /// As the last run left it.
    pub fn load(dir: &Path) -> Self {
        let path = dir.join("leaving");
        let state = match std::fs::read(&path) {
            Ok(text) if text == LEFT => State::Left,
            Ok(_) => State::Leaving(Progress::default()),
            Err(_) => State::Staying,
        };
        Self { state: Arc::new(Mutex::new(state)), path: Arc::new(path) }
    }

    /// Whether it is leaving, and has not left.
    pub fn is_on(&self) -> bool {
        matches!(*self.state.lock(), State::Leaving(_))
    }

    /// Whether it has left.
    pub fn has_left(&self) -> bool {
        *self.state.lock() == State::Left
    }

    /// How far it is; `None` where it is not leaving.
    pub fn progress(&self) -> Option<Progress> {
        match *self.state.lock() {
            State::Leaving(progress) => Some(progress),
            State::Staying | State::Left => None,
        }
    }

    /// Begins to leave, or stays after all, durably. Blocks. What has left does not come back so.
    ///
    /// # Errors
    /// When the file cannot be written or removed; nothing has changed then.
    pub fn set(&self, on: bool) -> std::io::Result<()> {
        let mut state = self.state.lock();
        match (*state, on) {
            (State::Left, _) | (State::Leaving(_), true) | (State::Staying, false) => Ok(()),
            (State::Staying, true) => {
                write_atomic(&self.path, LEAVING, Access::Public)?;
                *state = State::Leaving(Progress::default());
                Ok(())
            }
            (State::Leaving(_), false) => {
                std::fs::remove_file(self.path.as_path())?;
                *state = State::Staying;
                Ok(())
            }
        }
    }

    /// The directory says how far it is; whether that was the last word. Blocks.
    ///
    /// # Errors
    /// When the end cannot be kept.
    pub fn heard(&self, said: LeaveProgress) -> std::io::Result<bool> {
        let mut state = self.state.lock();
        if *state == State::Staying {
            // The owner has thought better of it, and the directory does not know yet.
            return Ok(false);
        }
        if said.left {
            write_atomic(&self.path, LEFT, Access::Public)?;
            *state = State::Left;
            return Ok(true);
        }
        let fragments_left = Some(said.fragments_left);
        *state = State::Leaving(Progress { fragments_left, left_s: said.left_s });
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_remembered_and_ends_once() {
        let dir = tempfile::tempdir().unwrap();
        let leave = Leave::load(dir.path());
        assert!(!leave.is_on() && leave.progress().is_none());
        leave.set(true).unwrap();
        leave.set(true).unwrap();
        let said = LeaveProgress { fragments_left: 5, left_s: 9, left: false };
        assert!(!leave.heard(said).unwrap());
        let progress = Progress { fragments_left: Some(5), left_s: 9 };
        assert_eq!(leave.progress(), Some(progress));
        // A crash in the middle: it goes on.
        let leave = Leave::load(dir.path());
        assert!(leave.is_on());
        leave.set(false).unwrap();
        assert!(!Leave::load(dir.path()).is_on());
        let last = LeaveProgress { left: true, ..said };
        assert!(!leave.heard(last).unwrap(), "it stays");
        leave.set(true).unwrap();
        assert!(leave.heard(last).unwrap());
        let leave = Leave::load(dir.path());
        leave.set(false).unwrap();
        assert!(leave.has_left() && !leave.is_on());
    }
}
