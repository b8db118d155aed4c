//! Where secrets come from: files, the environment, a terminal.

use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use us_core::keyring::{RecoveryKey, SlotKind, SlotSecret};
use us_core::seal::KEY_BYTES;
use zeroize::Zeroizing;

use super::SecretNeeded;

/// The variable that may hold a passphrase.
pub const PASSPHRASE_VARIABLE: &str = "US_PASSPHRASE";
/// The longest passphrase, and the largest file with one.
const PASSPHRASE_BYTES_MAX: usize = 4096;
/// The shortest new one.
const PASSPHRASE_CHARS_MIN: usize = 8;

/// A passphrase, as bytes.
type Text = Zeroizing<Vec<u8>>;

/// Asks a person.
pub trait Prompt: Send + Sync {
    /// The answer to a question, not shown; `None`: there is nobody to ask.
    ///
    /// # Errors
    /// What the system says.
    fn ask(&self, question: &str) -> io::Result<Option<Text>>;
}

/// The terminal this program was started at, if it was.
#[derive(Debug, Clone, Copy)]
pub struct Terminal;

impl Prompt for Terminal {
    fn ask(&self, question: &str) -> io::Result<Option<Text>> {
        if no_terminal() {
            return Ok(None);
        }
        let config = rpassword::ConfigBuilder::new().password_feedback_hide().build();
        let text = rpassword::prompt_password_with_config(format!("{question}: "), config)?;
        Ok(Some(Zeroizing::new(text.into_bytes())))
    }
}

/// Whether nobody can be asked.
pub(crate) fn no_terminal() -> bool {
    !io::stdin().is_terminal()
}

/// Flags that name the secret of a private volume.
#[derive(Debug, Clone, Default, PartialEq, Eq, clap::Args)]
pub struct SecretArgs {
    /// A file with the passphrase of a private volume
    #[arg(long, value_name = "FILE", help_heading = "Private volumes", group = "secret")]
    pub passphrase_file: Option<PathBuf>,
    /// The key file of a private volume
    #[arg(long, value_name = "FILE", help_heading = "Private volumes", group = "secret")]
    pub key_file: Option<PathBuf>,
    /// A file with the recovery key of a private volume
    #[arg(long, value_name = "FILE", help_heading = "Private volumes", group = "secret")]
    pub recovery_key_file: Option<PathBuf>,
}

impl SecretArgs {
    /// Whether any was given: then the volume must be private.
    pub fn is_given(&self) -> bool {
        self.passphrase_file.is_some()
            || self.key_file.is_some()
            || self.recovery_key_file.is_some()
    }

    /// Whether a secret can be had without asking anybody.
    pub(crate) fn is_silent(&self) -> bool {
        self.is_given() || std::env::var_os(PASSPHRASE_VARIABLE).is_some()
    }

    /// The secret: of a file that was named, else of the variable, else as a person says. At a prompt
    /// and in the variable a recovery key does too.
    ///
    /// # Errors
    /// [`SecretNeeded`]; what the system says; what is wrong with a file.
    pub fn secret(&self, volume: &str, prompt: &dyn Prompt) -> anyhow::Result<SlotSecret> {
        if let Some(path) = &self.key_file {
            return key_file(path);
        }
        if let Some(path) = &self.recovery_key_file {
            let text = read_small(path)?;
            let text = std::str::from_utf8(&text).context("a recovery key is text")?;
            let key = text.parse().with_context(|| format!("no key in {}", path.display()))?;
            return Ok(SlotSecret::Recovery(key));
        }
        if let Some(path) = &self.passphrase_file {
            return passphrase_file(path);
        }
        let said = match variable() {
            Some(text) => Some(text),
            None => prompt
                .ask(&format!("Passphrase of volume {volume}"))
                .context("ask for the passphrase")?,
        };
        let said = said.ok_or_else(|| SecretNeeded { volume: volume.to_owned() })?;
        let recovery = std::str::from_utf8(&said).ok().and_then(|text| text.parse().ok());
        if let Some(key) = recovery {
            return Ok(SlotSecret::Recovery(key));
        }
        checked(said).map(SlotSecret::Passphrase)
    }
}

fn variable() -> Option<Text> {
    use std::os::unix::ffi::OsStringExt;
    let value = std::env::var_os(PASSPHRASE_VARIABLE).filter(|value| !value.is_empty())?;
    Some(Zeroizing::new(value.into_vec()))
}

fn checked(text: Text) -> anyhow::Result<Text> {
    match text.len() {
        0 => bail!("the passphrase is empty"),
        bytes if bytes > PASSPHRASE_BYTES_MAX => {
            bail!("a passphrase has at most {PASSPHRASE_BYTES_MAX} bytes")
        }
        _ => Ok(text),
    }
}

fn passphrase_file(path: &Path) -> anyhow::Result<SlotSecret> {
    let mut text = read_small(path)?;
    // An editor's last newline is none of it.
    if text.last() == Some(&b'\n') {
        text.pop();
    }
    if text.last() == Some(&b'\r') {
        text.pop();
    }
    let text = checked(text).with_context(|| format!("in {}", path.display()))?;
    Ok(SlotSecret::Passphrase(text))
}

fn key_file(path: &Path) -> anyhow::Result<SlotSecret> {
    let bytes = read_small(path)?;
    let Ok(key) = <[u8; KEY_BYTES]>::try_from(bytes.as_slice()) else {
        bail!("{} is no key file: it has not {KEY_BYTES} bytes", path.display());
    };
    Ok(SlotSecret::KeyFile(key.into()))
}

/// A file that holds a secret. Warns where others can read it.
fn read_small(path: &Path) -> anyhow::Result<Text> {
    let what = || format!("read {}", path.display());
    let file = File::open(path).with_context(what)?;
    let meta = file.metadata().with_context(what)?;
    if meta.is_file() && meta.mode() & 0o077 != 0 {
        tracing::warn!(path = %path.display(), "other users can read this secret: chmod 600 it");
    }
    // Room from the start: a buffer that grows leaves copies behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(PASSPHRASE_BYTES_MAX + 3));
    file.take(PASSPHRASE_BYTES_MAX as u64 + 3).read_to_end(&mut bytes).with_context(what)?;
    Ok(bytes)
}

/// One line of what was piped in, without its end; `None` at the end. Reads byte by byte: nothing of
/// it stays in a buffer.
pub(crate) fn read_line(mut from: impl Read) -> io::Result<Option<Text>> {
    let mut line = Zeroizing::new(Vec::with_capacity(PASSPHRASE_BYTES_MAX + 1));
    let mut byte = Zeroizing::new([0]);
    while line.len() <= PASSPHRASE_BYTES_MAX {
        match from.read(&mut *byte) {
            Ok(0) => return Ok((!line.is_empty()).then_some(line)),
            Ok(_) if byte[0] == b'\n' => return Ok(Some(line)),
            Ok(_) => line.push(byte[0]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::new(io::ErrorKind::InvalidData, "the passphrase is too long"))
}

/// Flags that say what shall open a volume from now on.
#[derive(Debug, Clone, Default, PartialEq, Eq, clap::Args)]
pub struct NewSecretArgs {
    /// A file with the new passphrase
    #[arg(long, value_name = "FILE", help_heading = "Private volumes", group = "new")]
    pub new_passphrase_file: Option<PathBuf>,
    /// A new key file, made here; it must not be there yet
    #[arg(long, value_name = "FILE", help_heading = "Private volumes", group = "new")]
    pub new_key_file: Option<PathBuf>,
}

/// A file that was made, and goes again if what it was made for fails.
#[derive(Debug)]
#[must_use]
pub(crate) struct NewFile(Option<PathBuf>);

impl NewFile {
    /// None was made.
    pub fn none() -> Self {
        Self(None)
    }

    /// What it was made for is done.
    pub fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if let Some(path) = self.0.take() {
            let _ = std::fs::remove_file(path);
        }
    }
}

impl NewSecretArgs {
    /// The new secret; a person says a passphrase twice.
    ///
    /// # Errors
    /// [`SecretNeeded`]; what the system says; a passphrase that is too short.
    pub(crate) fn secret(
        &self,
        volume: &str,
        prompt: &dyn Prompt,
    ) -> anyhow::Result<(SlotSecret, NewFile)> {
        if let Some(path) = &self.new_key_file {
            let mut key = Zeroizing::new([0; KEY_BYTES]);
            getrandom::fill(&mut *key).context("the system has no randomness")?;
            let made = write_new_secret(path, &*key)?;
            return Ok((SlotSecret::KeyFile(key), made));
        }
        let secret = match &self.new_passphrase_file {
            Some(path) => passphrase_file(path)?,
            None => asked_twice(volume, prompt)?,
        };
        Ok((long_enough(secret)?, NewFile::none()))
    }
}

/// A passphrase that can be taken for new.
pub(crate) fn long_enough(secret: SlotSecret) -> anyhow::Result<SlotSecret> {
    if let SlotSecret::Passphrase(text) = &secret {
        let chars = std::str::from_utf8(text).map_or(text.len(), |text| text.chars().count());
        if chars < PASSPHRASE_CHARS_MIN {
            bail!(
                "a new passphrase has at least {PASSPHRASE_CHARS_MIN} characters; several words \
                 are better"
            );
        }
    }
    Ok(secret)
}

fn asked_twice(volume: &str, prompt: &dyn Prompt) -> anyhow::Result<SlotSecret> {
    let ask = |question: String| prompt.ask(&question).context("ask for the passphrase");
    let first = ask(format!("New passphrase of volume {volume}"))?;
    let first = first.ok_or_else(|| SecretNeeded { volume: volume.to_owned() })?;
    let again = ask("The same again".to_owned())?;
    if again.as_deref() != Some(&*first) {
        bail!("the two passphrases are not the same");
    }
    let text = checked(first)?;
    if std::str::from_utf8(&text).is_ok_and(|text| text.parse::<RecoveryKey>().is_ok()) {
        bail!("this is a {}: it cannot be a passphrase too", SlotKind::Recovery);
    }
    Ok(SlotSecret::Passphrase(text))
}

/// Writes a secret into a file that must not be there yet, for its owner alone.
pub(crate) fn write_new_secret(path: &Path, bytes: &[u8]) -> anyhow::Result<NewFile> {
    let what = || format!("make {}", path.display());
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    let made = match &mut file {
        Ok(_) => NewFile(Some(path.to_owned())),
        Err(_) => NewFile::none(),
    };
    let file = file.as_mut().map_err(|error| anyhow::anyhow!("{error}")).with_context(what)?;
    file.write_all(bytes).and_then(|()| file.sync_all()).with_context(what)?;
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    us_core::daemon::files::sync_dir(parent.unwrap_or(Path::new("."))).with_context(what)?;
    Ok(made)
}

#[cfg(test)]
mod tests {
    use parking_lot::Mutex;

    use super::*;

    /// Answers in order; then nobody is there.
    struct Script(Mutex<Vec<&'static str>>);

    impl Script {
        fn of(answers: &[&'static str]) -> Self {
            Self(Mutex::new(answers.iter().rev().copied().collect()))
        }
    }

    impl Prompt for Script {
        fn ask(&self, _question: &str) -> io::Result<Option<Text>> {
            Ok(self.0.lock().pop().map(|text| text.as_bytes().to_vec().into()))
        }
    }

    fn passphrase(secret: SlotSecret) -> String {
        match secret {
            SlotSecret::Passphrase(text) => String::from_utf8(text.to_vec()).unwrap(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn files_hold_secrets() {
        let dir = tempfile::tempdir().unwrap();
        let nobody = Script::of(&[]);
        let path = dir.path().join("secret");
        for (content, wanted) in [("one two\n", "one two"), ("a\nb\r\n", "a\nb"), (" x", " x")] {
            std::fs::write(&path, content).unwrap();
            let args = SecretArgs { passphrase_file: Some(path.clone()), ..Default::default() };
            assert_eq!(passphrase(args.secret("v", &nobody).unwrap()), wanted);
        }
        std::fs::write(&path, "\n").unwrap();
        let args = SecretArgs { passphrase_file: Some(path.clone()), ..Default::default() };
        assert!(args.secret("v", &nobody).is_err(), "an empty passphrase");
        std::fs::write(&path, "x".repeat(5000)).unwrap();
        assert!(args.secret("v", &nobody).is_err(), "a long one");
        let args = SecretArgs { key_file: Some(path.clone()), ..Default::default() };
        assert!(args.secret("v", &nobody).is_err(), "a key file of another size");
        let key = RecoveryKey::generate();
        std::fs::write(&path, format!("{}\n", *key.to_text())).unwrap();
        let args = SecretArgs { recovery_key_file: Some(path), ..Default::default() };
        assert_eq!(args.secret("v", &nobody).unwrap().kind(), SlotKind::Recovery);
    }

    #[test]
    fn a_new_key_file_is_its_owners_and_never_replaces_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let args = NewSecretArgs { new_key_file: Some(path.clone()), ..Default::default() };
        let (secret, made) = args.secret("v", &Script::of(&[])).unwrap();
        assert_eq!(secret.kind(), SlotKind::KeyFile);
        let meta = std::fs::metadata(&path).unwrap();
        assert_eq!((meta.mode() & 0o777, meta.len()), (0o600, 32));
        let before = std::fs::read(&path).unwrap();
        assert!(args.secret("v", &Script::of(&[])).is_err(), "it is there");
        assert_eq!(std::fs::read(&path).unwrap(), before);
        made.keep();
        assert!(path.exists());
        let other = dir.path().join("other");
        drop(write_new_secret(&other, b"x").unwrap());
        assert!(!other.exists(), "what it was made for failed");
    }

    #[test]
    fn people_are_asked_and_new_passphrases_twice() {
        let args = SecretArgs::default();
        let error = args.secret("v", &Script::of(&[])).unwrap_err();
        assert!(error.is::<SecretNeeded>() && error.to_string().contains("volume v is private"));
        assert_eq!(passphrase(args.secret("v", &Script::of(&["x"])).unwrap()), "x");
        let new = NewSecretArgs::default();
        let asked = |answers: &[&'static str]| new.secret("v", &Script::of(answers));
        assert_eq!(passphrase(asked(&["long enough", "long enough"]).unwrap().0), "long enough");
        assert!(asked(&["long enough", "long Enough"]).is_err());
        assert!(asked(&["short", "short"]).is_err());
        assert!(asked(&[]).unwrap_err().is::<SecretNeeded>());
    }

    #[test]
    fn a_line_is_read_without_its_end() {
        let line = |text: &str| read_line(text.as_bytes()).unwrap().map(|line| line.to_vec());
        assert_eq!(line("ab\ncd"), Some(b"ab".to_vec()));
        assert_eq!(line("ab"), Some(b"ab".to_vec()));
        assert_eq!(line("\n"), Some(Vec::new()));
        assert_eq!(line(""), None);
        assert!(read_line("x".repeat(5000).as_bytes()).is_err());
    }
}
