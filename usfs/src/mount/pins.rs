//! Remembers which volumes were private when this machine mounted them, and which volumes those were:
//! a directory that later says otherwise under the same name is lying, or someone deleted the volume
//! and made another.
//!
//! One small file a directory and volume, which holds the volume's id.

use std::io;
use std::path::{Path, PathBuf};

use anyhow::Context;
use us_core::daemon::files::{Access, write_atomic};
use us_core::ids::VolumeId;

use super::sessions::folder_name;
use crate::places;

/// The place where one volume is remembered.
#[derive(Debug)]
pub(super) struct Pin {
    path: PathBuf,
}

impl Pin {
    pub fn of(data: &Path, directory: &str, volume: &str) -> Self {
        Self { path: data.join("private").join(folder_name(directory, volume)) }
    }

    /// The volume that was private here, if one was.
    pub fn get(&self) -> anyhow::Result<Option<VolumeId>> {
        match std::fs::read_to_string(&self.path) {
            Ok(text) => text.trim().parse().map(Some).with_context(|| self.explained()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("read {}", self.path.display())),
        }
    }

    /// Remembers it.
    pub fn set(&self, volume: VolumeId) -> io::Result<()> {
        if let Some(folder) = self.path.parent() {
            places::make_private_dir(folder)?;
        }
        write_atomic(&self.path, format!("{volume}\n").as_bytes(), Access::Secret)
    }

    /// What to think of a volume that is not the one that is remembered.
    pub fn explained(&self) -> String {
        format!(
            "another private volume was mounted here by this name before. If it was deleted and made \
             again, remove {}; if not, the directory is lying",
            self.path.display()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_private_is_remembered() {
        let data = tempfile::tempdir().unwrap();
        let pin = Pin::of(data.path(), "h:1", "disk");
        assert_eq!(pin.get().unwrap(), None);
        let volume = VolumeId::generate();
        pin.set(volume).unwrap();
        assert_eq!(Pin::of(data.path(), "h:1", "disk").get().unwrap(), Some(volume));
        assert_eq!(Pin::of(data.path(), "h:1", "other").get().unwrap(), None);
        std::fs::write(&pin.path, "nonsense").unwrap();
        assert!(pin.get().is_err(), "what cannot be read is not forgotten");
    }
}
