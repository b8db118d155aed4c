//! Remembers which sessions this machine's mounts have, so that after a kill the next mount can tell
//! the directory at once that the old one is dead, and nobody waits for its fence.
//!
//! One file a session, named by its number, locked by its process for life: a file without a lock is
//! of a dead one. The folder is of one directory and volume.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use us_core::ids::SessionId;

use crate::places;

/// The most sessions one open may end.
const REPLACES_MAX: usize = 64;

/// The sessions of one volume's mounts on this machine.
#[derive(Debug)]
pub(super) struct Sessions {
    dir: PathBuf,
}

/// A session of this process; its file goes when it was closed.
#[derive(Debug)]
pub(super) struct Kept {
    path: PathBuf,
    _file: File,
}

/// A name for what is kept of one directory's volume.
pub(super) fn folder_name(directory: &str, volume: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || "-.".contains(c) { c } else { '_' };
    format!("{directory}-{volume}").chars().map(plain).collect()
}

impl Sessions {
    pub fn of(data: &Path, directory: &str, volume: &str) -> io::Result<Self> {
        let dir = data.join("sessions").join(folder_name(directory, volume));
        places::make_private_dir(&dir)?;
        Ok(Self { dir })
    }

    /// The sessions whose processes are dead.
    pub fn dead(&self) -> Vec<SessionId> {
        let entries = std::fs::read_dir(&self.dir).into_iter().flatten().flatten();
        let dead = entries.filter(|entry| {
            File::open(entry.path())
                .is_ok_and(|file| flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok())
        });
        let numbers = dead.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        numbers.map(SessionId).take(REPLACES_MAX).collect()
    }

    /// The directory has ended these.
    pub fn forget(&self, sessions: &[SessionId]) {
        for session in sessions {
            let _ = std::fs::remove_file(self.dir.join(session.to_string()));
        }
    }

    /// Keeps a session of this process.
    pub fn keep(&self, session: SessionId) -> io::Result<Kept> {
        let path = self.dir.join(session.to_string());
        let file = OpenOptions::new().write(true).create(true).truncate(false).open(&path)?;
        flock(&file, FlockOperation::NonBlockingLockExclusive)?;
        Ok(Kept { path, _file: file })
    }
}

impl Kept {
    /// The session was closed.
    pub fn closed(self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_sessions_of_the_dead_are_given_up() {
        let data = tempfile::tempdir().unwrap();
        let sessions = Sessions::of(data.path(), "[::1]:70", "my/disk").unwrap();
        let living = sessions.keep(SessionId(7)).unwrap();
        let dying = sessions.keep(SessionId(8)).unwrap();
        drop(dying);
        assert_eq!(sessions.dead(), [SessionId(8)]);
        sessions.forget(&[SessionId(8)]);
        living.closed();
        assert_eq!(sessions.dead(), []);
    }
}
