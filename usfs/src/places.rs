//! Where programs keep and find things on this machine: data, what runs now, identities.
//!
//! ```text
//! data      $US_DATA, else /var/lib/us as root, else $XDG_DATA_HOME/us (~/.local/share/us)
//! data/up   the state of `usfs up`; data/up/up.json says how to reach what runs
//! joined    data/joined/client and data/joined/admin: the identities of `usfs join`, `usctl join`
//! running   /run/us as root, else $XDG_RUNTIME_DIR/us, else /tmp/us-UID
//! ```

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use us_core::daemon::files::{Access, write_atomic};
use us_core::daemon::joined::Profile;
use us_core::tls::{Identity, Role};

/// The file in the state of `usfs up`, and in the running folder, that says how to reach it.
const UP_FILE: &str = "up.json";

/// A `usfs up` that runs, or ran, on this machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UpRecord {
    /// Its process.
    pub pid: u32,
    /// Its state.
    pub data: PathBuf,
    /// Where the directory listens.
    pub directory: String,
    /// The identity `usctl` takes.
    pub admin_identity: PathBuf,
    /// The identity a mount takes.
    pub client_identity: PathBuf,
    /// Where the disk is mounted.
    pub mount_point: PathBuf,
}

fn environment_path(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Where state is kept where nobody says otherwise.
pub fn data_dir() -> PathBuf {
    if is_root() {
        return PathBuf::from("/var/lib/us");
    }
    let home = || environment_path("HOME").unwrap_or_else(std::env::temp_dir);
    environment_path("XDG_DATA_HOME").unwrap_or_else(|| home().join(".local/share")).join("us")
}

/// The state of `usfs up`: `US_DATA`, else the folder `up` of [`data_dir`].
pub fn up_data_dir() -> PathBuf {
    environment_path("US_DATA").unwrap_or_else(|| data_dir().join("up"))
}

/// Where a mount keeps its logs and what it could not send.
pub fn mount_data_dir() -> PathBuf {
    environment_path("US_DATA").unwrap_or_else(data_dir)
}

/// The identity that joining as `role` leaves.
pub fn joined_dir(role: Role) -> PathBuf {
    mount_data_dir().join("joined").join(role.as_str())
}

/// Where this machine joined as `role`: the directory's address, and the identity's folder. A profile
/// that cannot be read counts as none, and is told.
pub fn joined(role: Role) -> Option<(String, PathBuf)> {
    let dir = joined_dir(role);
    match Profile::load(&dir) {
        Ok(profile) => Some((profile?.directory, dir)).filter(|(_, dir)| Identity::exists(dir)),
        Err(error) => {
            tracing::warn!(%error, "what joining left cannot be read");
            None
        }
    }
}

/// Where programs that run say so; gone after a restart of the machine.
pub fn running_dir() -> PathBuf {
    if is_root() {
        return PathBuf::from("/run/us");
    }
    environment_path("XDG_RUNTIME_DIR").map_or_else(
        || {
            let uid = rustix::process::getuid().as_raw();
            std::env::temp_dir().join(format!("us-{uid}"))
        },
        |dir| dir.join("us"),
    )
}

/// Makes a folder that only its owner may enter.
///
/// # Errors
/// What the system says.
pub fn make_private_dir(dir: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)
}

impl UpRecord {
    /// Writes it where `usctl` looks: the state itself, and, if that can be, the running folder.
    ///
    /// # Errors
    /// When the state cannot be written.
    pub fn publish(&self) -> io::Result<()> {
        let text = serde_json::to_vec_pretty(self)?;
        write_atomic(&self.data.join(UP_FILE), &text, Access::Public)?;
        let running = running_dir();
        let said = make_private_dir(&running)
            .and_then(|()| write_atomic(&running.join(UP_FILE), &text, Access::Public));
        if let Err(error) = said {
            tracing::debug!(%error, "usctl will need US_DATA to find this disk");
        }
        Ok(())
    }

    /// Takes back what [`UpRecord::publish`] said of the running folder, if it is still ours.
    pub fn withdraw(&self) {
        let path = running_dir().join(UP_FILE);
        if read_record(&path).is_some_and(|record| record.pid == self.pid) {
            let _ = std::fs::remove_file(path);
        }
    }

    /// Reads what [`UpRecord::publish`] wrote; `None` for another text.
    pub fn parse(text: &[u8]) -> Option<Self> {
        serde_json::from_slice(text).ok()
    }

    /// The `usfs up` of this machine: the one whose state `US_DATA` names, else the one that runs,
    /// else the one of the usual place.
    pub fn find() -> Option<Self> {
        if let Some(data) = environment_path("US_DATA") {
            return read_record(&data.join(UP_FILE));
        }
        read_record(&running_dir().join(UP_FILE))
            .or_else(|| read_record(&up_data_dir().join(UP_FILE)))
    }
}

fn read_record(path: &Path) -> Option<UpRecord> {
    UpRecord::parse(&std::fs::read(path).ok()?)
}

/// The processes of a `usfs up`, by name: what its file `pids` holds. `None` for another text.
pub fn parse_pids(text: &[u8]) -> Option<BTreeMap<String, i32>> {
    serde_json::from_slice(text).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_read_as_it_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let record = UpRecord {
            pid: 7,
            data: dir.path().into(),
            directory: "127.0.0.1:4000".into(),
            admin_identity: dir.path().join("admin"),
            client_identity: dir.path().join("client"),
            mount_point: "/mnt/usfs".into(),
        };
        let path = dir.path().join(UP_FILE);
        std::fs::write(&path, serde_json::to_vec(&record).unwrap()).unwrap();
        assert_eq!(read_record(&path), Some(record));
        std::fs::write(&path, "{").unwrap();
        assert_eq!(read_record(&path), None);
    }
}
