//! What a join leaves beside the certificate: the file `joined.toml`, which its owner may edit when the
//! directory moves.

use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::files::{Access, write_atomic};
use crate::tls::{CodeError, InviteCode};

const FILE: &str = "joined.toml";
/// The longest code read: one line.
const CODE_BYTES_MAX: u64 = 1024;

/// Where a member joined.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// The directory's "host:port".
    pub directory: String,
    /// The site of the invitation; may be empty.
    #[serde(default)]
    pub site: String,
}

impl Profile {
    /// Writes it into the folder of an identity.
    ///
    /// # Errors
    /// What the system says.
    pub fn save(&self, dir: &Path) -> io::Result<()> {
        let text = toml::to_string(self).map_err(io::Error::other)?;
        write_atomic(&dir.join(FILE), text.as_bytes(), Access::Public)
    }

    /// Reads what [`Profile::save`] wrote; `None`: this identity did not come by joining.
    ///
    /// # Errors
    /// What the system says; `InvalidData` with the file's name for another text.
    pub fn load(dir: &Path) -> io::Result<Option<Self>> {
        let path = dir.join(FILE);
        let text = match std::fs::read_to_string(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            text => text?,
        };
        let wrong = |error: toml::de::Error| {
            let detail = format!("{}: {}", path.display(), error.message());
            io::Error::new(io::ErrorKind::InvalidData, detail)
        };
        toml::from_str(&text).map(Some).map_err(wrong)
    }
}

/// Why there is no code.
#[derive(Debug, thiserror::Error)]
pub enum NoCode {
    /// It cannot be read.
    #[error("read the code: {0}")]
    Io(#[from] io::Error),
    /// It is none.
    #[error("{0}")]
    Code(#[from] CodeError),
}

/// The code given as an argument; read from standard input where there is none, or it is `-`.
///
/// # Errors
/// [`NoCode`].
pub fn read_code(given: Option<&str>) -> Result<InviteCode, NoCode> {
    use std::io::{BufRead, IsTerminal, Read};
    if let Some(code) = given.filter(|code| *code != "-") {
        return Ok(code.parse()?);
    }
    let input = io::stdin();
    if input.is_terminal() {
        eprint!("The code of the invitation: ");
    }
    let mut line = Zeroizing::new(String::new());
    input.lock().take(CODE_BYTES_MAX).read_line(&mut line)?;
    Ok(line.parse()?)
}

/// This machine's name, as far as a certificate can carry it.
pub fn machine_name() -> String {
    let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let name: String = name.chars().filter(|c| !c.is_control()).collect();
    if name.is_empty() { "unnamed".to_owned() } else { name }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_profile_is_read_as_it_was_written() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Profile::load(dir.path()).unwrap(), None);
        let profile = Profile { directory: "us.example:7460".into(), site: "a/b".into() };
        profile.save(dir.path()).unwrap();
        assert_eq!(Profile::load(dir.path()).unwrap(), Some(profile));
        std::fs::write(dir.path().join(FILE), "directory = 7").unwrap();
        let error = Profile::load(dir.path()).unwrap_err();
        assert!(error.to_string().contains(FILE), "{error}");
    }
}
