//! Whether the index of the last run may be trusted: a line in the file `index.state`.
//!
//! ```text
//! opening <boot>   an open is going on; found at a start: it killed the process
//! open <boot>      in use; found at a start of the same boot: only the process died
//! closed           written out completely
//! suspect          found wrong while in use
//! ```
//! sled does not sync what it writes, so after a crash of the machine (another boot id) the index
//! is not to be trusted; after a crash of the process it is.

use std::path::{Path, PathBuf};

use us_core::daemon::files::{Access, write_atomic};

/// What is known about the index of the last run, and the place to note what happens in this one.
#[derive(Clone, Debug)]
pub struct Soundness {
    path: PathBuf,
    boot: String,
    suspect: bool,
    was_closed: bool,
}

impl Soundness {
    /// Reads what the last run noted, and notes that an open begins.
    pub fn begin(dir: &Path) -> Self {
        let path = dir.join("index.state");
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
            .map_or_else(|_| "unknown".to_owned(), |id| id.trim().to_owned());
        let noted = std::fs::read_to_string(&path).unwrap_or_default();
        let noted = noted.trim();
        let same_boot = boot != "unknown" && noted == format!("open {boot}");
        let soundness = Self {
            path,
            boot,
            suspect: noted != "closed" && !same_boot,
            was_closed: noted == "closed",
        };
        soundness.note(&format!("opening {}", soundness.boot));
        soundness
    }

    /// Whether the index must be deleted before it is opened.
    pub fn is_suspect(&self) -> bool {
        self.suspect
    }

    /// Whether the last run wrote everything out.
    pub fn was_closed(&self) -> bool {
        self.was_closed
    }

    /// The open went well.
    pub fn opened(&mut self) {
        self.note(&format!("open {}", self.boot));
    }

    /// Everything is written out.
    pub fn closed(&self) {
        self.note("closed");
    }

    /// The next start must rebuild.
    pub fn distrust(&self) {
        self.note("suspect");
    }

    /// A note that cannot be written makes the next start rebuild or, at worst, find the
    /// inconsistency itself; the store can work.
    fn note(&self, text: &str) {
        if let Err(error) = write_atomic(&self.path, text.as_bytes(), Access::Public) {
            tracing::warn!(%error, path = %self.path.display(), "cannot note the index's state");
        }
    }
}
