//! The recovery key as a small text file that people copy, print or put into a safe.

use std::path::Path;

use us_core::daemon::files::{Access, write_atomic};
use us_core::fragment::crc32c;
use us_core::ids::ClusterId;
use us_core::seal::{KEY_BYTES, Secret};
use us_core::tls::{CertificateAuthority, TlsError};
use zeroize::Zeroizing;

const TITLE: &str = "Us recovery key, version 1";
const CERTIFICATE: &str = "-----BEGIN CERTIFICATE-----";
const PRIVATE_KEY: &str = "-----BEGIN PRIVATE KEY-----";

/// Why there is no recovery key.
#[derive(Debug, thiserror::Error)]
pub enum KitError {
    /// The file cannot be read or written.
    #[error("{action} the recovery key {path}: {source}")]
    Io {
        /// What was being done.
        action: &'static str,
        /// The file.
        path: String,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The text is no recovery key, or was changed.
    #[error("this is not a whole recovery key: {detail}")]
    Text {
        /// What is wrong.
        detail: &'static str,
    },
    /// The authority in it is none.
    #[error("the certificate authority in the recovery key: {0}")]
    Authority(#[from] TlsError),
}

/// The secret everything is sealed with, and the cluster's certificate authority.
#[derive(Debug)]
pub struct RecoveryKit {
    secret: Secret,
    authority: CertificateAuthority,
}

impl RecoveryKit {
    /// A kit of a new secret and this authority.
    pub fn new(authority: CertificateAuthority) -> Self {
        Self { secret: Secret::generate(), authority }
    }

    /// The secret.
    pub fn secret(&self) -> &Secret {
        &self.secret
    }

    /// The authority.
    pub fn authority(&self) -> &CertificateAuthority {
        &self.authority
    }

    /// The cluster it belongs to.
    pub fn cluster(&self) -> ClusterId {
        self.authority.cluster()
    }

    /// The text of the file.
    pub fn to_text(&self) -> Zeroizing<String> {
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let secret = Zeroizing::new(hex(self.secret.expose()));
        let content = Zeroizing::new(format!(
            "cluster {}\nsecret {}\n\n{}{}",
            self.cluster(),
            *secret,
            with_newline(self.authority.ca_pem()),
            with_newline(self.authority.key_pem()),
        ));
        Zeroizing::new(format!(
            "{TITLE}\n\
             # With this file and any provider (or a backup) the directory can be rebuilt:\n\
             # us-directory restore. Whoever has it can read everything: keep it secret, and keep a\n\
             # copy away from the directory's machine.\n\
             sum {:08x}\n{}",
            crc32c(content.as_bytes()),
            *content
        ))
    }

    /// Reads the text of a file.
    ///
    /// # Errors
    /// [`KitError::Text`], [`KitError::Authority`].
    pub fn from_text(text: &str) -> Result<Self, KitError> {
        let text = Zeroizing::new(text.replace("\r\n", "\n"));
        let wrong = |detail| KitError::Text { detail };
        let body = text.strip_prefix(TITLE).ok_or(wrong("it does not begin with its title"))?;
        let (_, body) = body.split_once("\nsum ").ok_or(wrong("its sum is missing"))?;
        let (sum, content) = body.split_once('\n').ok_or(wrong("it ends early"))?;
        let sum = u32::from_str_radix(sum.trim(), 16).map_err(|_| wrong("its sum is no number"))?;
        if crc32c(content.as_bytes()) != sum {
            return Err(wrong("its sum does not hold: a character was changed or lost"));
        }
        let secret = content.lines().find_map(|line| line.strip_prefix("secret "));
        let secret = secret.and_then(from_hex).ok_or(wrong("its secret is missing"))?;
        let from = |marker: &str| content.find(marker).map(|at| &content[at..]);
        let certificate = from(CERTIFICATE).ok_or(wrong("the certificate is missing"))?;
        let key = from(PRIVATE_KEY).ok_or(wrong("the authority's key is missing"))?;
        let certificate =
            certificate.strip_suffix(key).ok_or(wrong("its parts are out of order"))?;
        let certificate = certificate.to_owned();
        let key = Zeroizing::new(key.to_owned());
        let authority = CertificateAuthority::from_pem(certificate, key)?;
        Ok(Self { secret: Secret::from_bytes(secret), authority })
    }

    /// Reads a kit's file.
    ///
    /// # Errors
    /// [`KitError`].
    pub fn load(path: &Path) -> Result<Self, KitError> {
        let text = std::fs::read_to_string(path).map_err(|source| io("reading", path, source))?;
        Self::from_text(&Zeroizing::new(text))
    }

    /// Writes the kit, durably, with mode 0600.
    ///
    /// # Errors
    /// [`KitError::Io`].
    pub fn save(&self, path: &Path) -> Result<(), KitError> {
        let text = self.to_text();
        write_atomic(path, text.as_bytes(), Access::Secret)
            .map_err(|source| io("writing", path, source))
    }
}

fn io(action: &'static str, path: &Path, source: std::io::Error) -> KitError {
    KitError::Io { action, path: path.display().to_string(), source }
}

fn with_newline(text: &str) -> String {
    format!("{}\n", text.trim_end())
}

fn from_hex(text: &str) -> Option<Zeroizing<[u8; KEY_BYTES]>> {
    let text = text.trim();
    let mut bytes = Zeroizing::new([0; KEY_BYTES]);
    (text.len() == 2 * KEY_BYTES && text.is_ascii()).then_some(())?;
    for (index, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * index..2 * index + 2], 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_kit_survives_its_file_and_a_changed_one_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("recovery.key");
        let kit = RecoveryKit::new(CertificateAuthority::create().unwrap());
        kit.save(&path).unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, 0o600);
        let loaded = RecoveryKit::load(&path).unwrap();
        assert_eq!(loaded.secret().expose(), kit.secret().expose());
        assert_eq!(loaded.cluster(), kit.cluster());
        let text = kit.to_text();
        assert!(RecoveryKit::from_text(&text.replace('\n', "\r\n")).is_ok(), "mailed around");
        let at = text.find("secret ").unwrap() + 9;
        let mut changed = text.as_bytes().to_vec();
        changed[at] ^= 1;
        let error = RecoveryKit::from_text(std::str::from_utf8(&changed).unwrap()).unwrap_err();
        assert!(error.to_string().contains("sum does not hold"), "{error}");
        for end in (0..text.len()).step_by(97) {
            assert!(RecoveryKit::from_text(&text[..end]).is_err(), "cut at {end}");
        }
    }
}
