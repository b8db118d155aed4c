//! Keeps PEM files: each is written whole or not at all, secrets are readable by their owner only.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use zeroize::Zeroizing;

use super::TlsError;

/// Mode of a file that holds a private key.
pub(super) const SECRET_MODE: u32 = 0o600;
/// Mode of a certificate.
pub(super) const PUBLIC_MODE: u32 = 0o644;
const DIR_MODE: u32 = 0o700;

/// Makes `dir` and its parents, for the owner only. A directory that exists keeps its mode.
pub(super) fn make_dir(dir: &Path) -> Result<(), TlsError> {
    DirBuilder::new().recursive(true).mode(DIR_MODE).create(dir).map_err(|source| TlsError::File {
        action: "create",
        path: dir.to_owned(),
        source,
    })
}

/// Writes `name` in `dir`: temporary file, fsync, rename, fsync of the directory.
pub(super) fn save(dir: &Path, name: &str, bytes: &[u8], mode: u32) -> Result<(), TlsError> {
    replace(dir, name, bytes, mode).map_err(|source| TlsError::File {
        action: "write",
        path: dir.join(name),
        source,
    })
}

fn replace(dir: &Path, name: &str, bytes: &[u8], mode: u32) -> io::Result<()> {
    let temporary = dir.join(format!(".{name}.new"));
    // One left by an interrupted save may have another mode.
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&temporary, dir.join(name))?;
    File::open(dir)?.sync_all()
}

/// Reads `name` in `dir`; wiped from memory when dropped.
pub(super) fn load(dir: &Path, name: &str) -> Result<Zeroizing<String>, TlsError> {
    let path = dir.join(name);
    match fs::read_to_string(&path) {
        Ok(text) => Ok(Zeroizing::new(text)),
        Err(source) => Err(TlsError::File { action: "read", path, source }),
    }
}
