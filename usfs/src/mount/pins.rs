//! Remembers which volumes were private when this machine mounted them, and which volumes those were:
//! a directory that later says otherwise under the same name is lying, or someone deleted the volume
//! and made another.
//!
//! One small file a cluster and volume, which holds the volume's id. The cluster is that of the own
//! certificate, so that no other spelling of the directory's address evades what is remembered. A volume
//! that is named by its id is found by what the files of its cluster hold.

use std::io;
use std::path::{Path, PathBuf};

use anyhow::Context;
use us_core::daemon::files::{Access, write_atomic};
use us_core::ids::{ClusterId, VolumeId};

use super::sessions::folder_name;
use crate::places;

/// The place where one volume is remembered.
#[derive(Debug)]
pub(super) struct Pin {
    path: PathBuf,
    /// Where it was remembered before, by the directory's address.
    by_address: PathBuf,
    cluster: ClusterId,
    /// The id that was given for a name.
    id: Option<VolumeId>,
}

impl Pin {
    /// That of a volume, as it is named, of the cluster whose directory is at this address.
    pub fn of(data: &Path, cluster: ClusterId, directory: &str, volume: &str) -> Self {
        let folder = data.join("private");
        let path = folder.join(folder_name(&cluster.to_string(), volume));
        let by_address = folder.join(folder_name(directory, volume));
        Self { path, by_address, cluster, id: volume.parse().ok() }
    }

    /// The volume that was private here, if one was.
    pub fn get(&self) -> anyhow::Result<Option<VolumeId>> {
        for path in [&self.path, &self.by_address] {
            match std::fs::read_to_string(path) {
                Ok(text) => return text.trim().parse().map(Some).with_context(|| self.explained()),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => {
                    return Err(error).with_context(|| format!("read {}", path.display()));
                }
            }
        }
        Ok(self.id.filter(|id| self.is_held_by_another(*id)))
    }

    /// Whether a volume of the cluster was remembered by its name that has this id.
    fn is_held_by_another(&self, id: VolumeId) -> bool {
        let cluster = format!("{}-", self.cluster);
        let folder = self.path.parent().map(std::fs::read_dir);
        let files = folder.into_iter().flatten().flatten().flatten();
        let mut own = files.filter(|file| file.file_name().to_string_lossy().starts_with(&cluster));
        own.any(|file| {
            std::fs::read_to_string(file.path()).is_ok_and(|text| text.trim().parse() == Ok(id))
        })
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

    const CLUSTER: ClusterId = ClusterId::from_bytes([7; 16]);

    #[test]
    fn what_was_private_is_remembered() {
        let data = tempfile::tempdir().unwrap();
        let pin = Pin::of(data.path(), CLUSTER, "h:1", "disk");
        assert_eq!(pin.get().unwrap(), None);
        let volume = VolumeId::generate();
        pin.set(volume).unwrap();
        let get = |cluster, directory: &str, name: &str| {
            Pin::of(data.path(), cluster, directory, name).get().unwrap()
        };
        assert_eq!(get(CLUSTER, "h:1", "disk"), Some(volume));
        assert_eq!(get(CLUSTER, "h:1", "other"), None);
        assert_eq!(get(CLUSTER, "other-spelling.:1", "disk"), Some(volume), "the same cluster");
        assert_eq!(get(ClusterId::from_bytes([8; 16]), "h:1", "disk"), None, "another cluster's");
        // By its id it is the same volume.
        assert_eq!(get(CLUSTER, "h:1", &volume.to_string()), Some(volume));
        assert_eq!(get(CLUSTER, "h:1", &VolumeId::generate().to_string()), None);
        assert_eq!(get(ClusterId::from_bytes([8; 16]), "h:1", &volume.to_string()), None);
        std::fs::write(&pin.path, "nonsense").unwrap();
        assert!(pin.get().is_err(), "what cannot be read is not forgotten");
    }

    /// What was remembered by an address still counts there.
    #[test]
    fn what_was_remembered_by_the_address_counts() {
        let data = tempfile::tempdir().unwrap();
        let volume = VolumeId::generate();
        let pin = Pin::of(data.path(), CLUSTER, "h:1", "disk");
        std::fs::create_dir(data.path().join("private")).unwrap();
        std::fs::write(&pin.by_address, format!("{volume}\n")).unwrap();
        assert_eq!(pin.get().unwrap(), Some(volume));
    }
}
