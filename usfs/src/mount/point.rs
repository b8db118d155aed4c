//! A mount point: what is there, made ready or explained.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use crate::fuse::kernel;

/// How long a mount that is there may take to answer before it counts as hung.
const ANSWER: Duration = Duration::from_secs(3);

/// Why nothing can be mounted there.
#[derive(Debug, thiserror::Error)]
pub enum PointError {
    /// There is something else than a folder.
    #[error("{} is not a folder: choose another mount point", .0.display())]
    NotADirectory(PathBuf),
    /// The folder is in use as a folder.
    #[error(
        "{} is not empty ({example:?} is in it), and mounting would hide that: choose an empty \
         folder, or one that does not exist yet", point.display()
    )]
    NotEmpty {
        /// The folder.
        point: PathBuf,
        /// Something in it.
        example: String,
    },
    /// It is mounted, and it works.
    #[error(
        "{} is mounted already, from {source_name} ({kind}): unmount it with `usfs umount {}`, or \
         choose another mount point", point.display(), point.display()
    )]
    Mounted {
        /// Where.
        point: PathBuf,
        /// What.
        source_name: String,
        /// Of which type.
        kind: String,
    },
    /// It is mounted, and whoever serves it does not answer.
    #[error(
        "{} is mounted already, and does not answer: end its process, or unmount it with \
         `usfs umount --lazy {}`", point.display(), point.display()
    )]
    Hung {
        /// Where.
        point: PathBuf,
    },
    /// It cannot be made.
    #[error(
        "cannot make the folder {}: make it yourself, or choose one in a place of yours, such as \
         ~/usfs", point.display()
    )]
    Create {
        /// Where.
        point: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The system does not let us look.
    #[error("cannot look at {}", point.display())]
    Look {
        /// Where.
        point: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// The absolute path of `point`, found without asking the file system that may be mounted on it.
///
/// # Errors
/// When the folder that holds it is not there.
pub fn absolute(point: &Path) -> io::Result<PathBuf> {
    let point = std::path::absolute(point)?;
    match (point.parent(), point.file_name()) {
        (Some(parent), Some(name)) => match parent.canonicalize() {
            Ok(parent) => {
                let inside = parent.join(name);
                // A symbolic link to a folder is followed; a dead mount is no link.
                match std::fs::read_link(&inside) {
                    Ok(_) => inside.canonicalize(),
                    Err(_) => Ok(inside),
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(point),
            Err(error) => Err(error),
        },
        _ => Ok(point),
    }
}

/// Makes `point` fit to mount on: takes away a dead mount, makes the folder. Answers its absolute
/// path. Blocks.
///
/// # Errors
/// [`PointError`], which says what to do.
pub fn prepare(point: &Path) -> Result<PathBuf, PointError> {
    let look = |source| PointError::Look { point: point.to_owned(), source };
    let point = absolute(point).map_err(look)?;
    let look = |source| PointError::Look { point: point.clone(), source };
    while let Some(entry) = kernel::mount_at(&point).map_err(look)? {
        match answer_of(&point) {
            Answer::Dead => {
                tracing::warn!(point = %point.display(), "took away a mount whose process is gone");
                kernel::unmount(&point, true).map_err(look)?;
            }
            Answer::None => return Err(PointError::Hung { point }),
            Answer::Alive => {
                let (source_name, kind) = (entry.source, entry.kind);
                return Err(PointError::Mounted { point, source_name, kind });
            }
        }
    }
    match std::fs::metadata(&point) {
        Ok(meta) if !meta.is_dir() => return Err(PointError::NotADirectory(point)),
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            std::fs::create_dir_all(&point)
                .map_err(|source| PointError::Create { point: point.clone(), source })?;
        }
        Err(error) => return Err(look(error)),
    }
    let first = std::fs::read_dir(&point).map_err(look)?.next();
    if let Some(Ok(entry)) = first {
        let example = entry.file_name().to_string_lossy().into_owned();
        return Err(PointError::NotEmpty { point, example });
    }
    Ok(point)
}

enum Answer {
    Alive,
    Dead,
    None,
}

/// Asks the mount for its free space: unlike attributes, the kernel never answers that from memory.
/// A thread that gets no answer is left behind.
fn answer_of(point: &Path) -> Answer {
    let (sender, answer) = mpsc::sync_channel(1);
    let asked = point.to_owned();
    std::thread::spawn(move || {
        // Nobody may wait any more.
        let _ = sender.send(rustix::fs::statvfs(&asked).err());
    });
    match answer.recv_timeout(ANSWER) {
        // The second while the kernel is still ending the dead process's connection.
        Ok(Some(rustix::io::Errno::NOTCONN | rustix::io::Errno::CONNABORTED)) => Answer::Dead,
        Ok(_) => Answer::Alive,
        Err(_elapsed) => Answer::None,
    }
}

/// Who uses the mount, as "name (pid)", as far as we may see.
pub fn users(point: &Path) -> Vec<String> {
    let own = std::process::id();
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| *pid != own && uses(*pid, point))
        .map(|pid| {
            let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            format!("{} ({pid})", name.trim())
        })
        .collect()
}

fn uses(pid: u32, point: &Path) -> bool {
    let below = |link: PathBuf| std::fs::read_link(link).is_ok_and(|to| to.starts_with(point));
    let process = PathBuf::from(format!("/proc/{pid}"));
    let open_files = std::fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
    ["cwd", "root", "exe"].iter().any(|name| below(process.join(name)))
        || open_files.map(|entry| entry.path()).any(below)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_point_is_made_or_refused() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        assert_eq!(prepare(&root.join("new/deep")).unwrap(), root.join("new/deep"));
        assert!(root.join("new/deep").is_dir());
        assert_eq!(prepare(&root.join("new/deep")).unwrap(), root.join("new/deep"));
        match prepare(&root.join("new")) {
            Err(PointError::NotEmpty { example, .. }) => assert_eq!(example, "deep"),
            other => panic!("{other:?}"),
        }
        std::fs::write(root.join("file"), "").unwrap();
        assert!(matches!(prepare(&root.join("file")), Err(PointError::NotADirectory(_))));
        assert!(matches!(prepare(Path::new("/proc")), Err(PointError::Mounted { .. })));
        std::os::unix::fs::symlink(root.join("new/deep"), root.join("link")).unwrap();
        assert_eq!(absolute(&root.join("link")).unwrap(), root.join("new/deep"));
    }

    #[test]
    fn who_uses_a_folder_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let mut child =
            std::process::Command::new("sleep").arg("60").current_dir(dir.path()).spawn().unwrap();
        let found = users(&dir.path().canonicalize().unwrap());
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].contains(&child.id().to_string()));
    }
}
