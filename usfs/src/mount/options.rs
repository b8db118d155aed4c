//! `-o`: what fstab and `mount` give.

use std::path::PathBuf;

use us_core::daemon::size::Size;

use crate::fuse;

/// What `-o` said.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Options {
    /// What is mounted there already changes its kernel's options.
    pub remount: bool,
    /// Nothing can be changed.
    pub read_only: bool,
    /// Other users may use it; `None`: root lets them, others do not.
    pub allow_other: Option<bool>,
    /// Set-user-id bits count.
    pub suid: bool,
    /// Device files work.
    pub dev: bool,
    /// Programs cannot be started from it.
    pub no_exec: bool,
    /// Reading does not change access times.
    pub no_atime: bool,
    /// Every write is synchronous.
    pub sync: bool,
    /// The folder of the identity.
    pub identity: Option<PathBuf>,
    /// The most memory for data on its way.
    pub memory: Option<Size>,
    /// When a block counts as stored.
    pub ack: Ack,
    /// The folder in which pages that were read are kept, sealed, for the next time.
    pub cache: Option<PathBuf>,
    /// The most that is kept there.
    pub cache_size: Option<Size>,
}

/// Options that only the kernel gives.
const KERNELS: [&str; 4] = ["user_id=", "group_id=", "max_read=", "blksize="];

/// When a block counts as stored, so that an `fsync` that waits for it may return.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Ack {
    /// Any w of its providers may vanish; the other fragments follow in the background
    #[default]
    Margin,
    /// Every fragment is durable: any r of its providers may vanish
    Full,
}

/// An option that makes no sense.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OptionError {
    /// Nobody knows it.
    #[error(
        "unknown mount option {0:?}: there are ro, rw, remount, allow_other, suid, dev, noexec, \
         noatime, sync, ack=margin, ack=full, identity=DIR, memory=SIZE, \
         cache=DIR, cache_size=SIZE"
    )]
    Unknown(String),
    /// Its value is not what it takes.
    #[error("mount option {option}: {reason}")]
    Value {
        /// The option.
        option: String,
        /// What is wrong.
        reason: String,
    },
}

impl Options {
    /// Reads lists of options separated by commas; of two that contradict, the later wins.
    ///
    /// # Errors
    /// [`OptionError`].
    pub fn parse(lists: &[String]) -> Result<Self, OptionError> {
        Self::default().changed_by(lists)
    }

    /// What a mount has that is there already, changed by what is said.
    ///
    /// # Errors
    /// [`OptionError`].
    pub fn changed_by(mut self, lists: &[String]) -> Result<Self, OptionError> {
        let words =
            || lists.iter().flat_map(|list| list.split(',')).filter(|word| !word.is_empty());
        for word in words() {
            self.add(word)?;
        }
        let kernels = |word: &&str| KERNELS.iter().any(|known| word.starts_with(known));
        match words().find(kernels).filter(|_| !self.remount) {
            Some(word) => Err(OptionError::Unknown(word.to_owned())),
            None => Ok(self),
        }
    }

    /// What the table of mounts says of a mount that is there: what it does not name is allowed.
    ///
    /// # Errors
    /// [`OptionError`].
    pub fn of_mount(words: &str) -> Result<Self, OptionError> {
        let allowed = Self { remount: true, suid: true, dev: true, ..Self::default() };
        allowed.changed_by(&[words.to_owned()])
    }

    fn add(&mut self, word: &str) -> Result<(), OptionError> {
        match word {
            "remount" => self.remount = true,
            "ro" => self.read_only = true,
            "rw" => self.read_only = false,
            "allow_other" => self.allow_other = Some(true),
            "noallow_other" => self.allow_other = Some(false),
            "suid" => self.suid = true,
            "nosuid" => self.suid = false,
            "dev" => self.dev = true,
            "nodev" => self.dev = false,
            "exec" => self.no_exec = false,
            "noexec" => self.no_exec = true,
            "noatime" => self.no_atime = true,
            "atime" | "relatime" => self.no_atime = false,
            "sync" => self.sync = true,
            "async" => self.sync = false,
            // What fstab says to others.
            "defaults"
            | "auto"
            | "noauto"
            | "user"
            | "nouser"
            | "users"
            | "nofail"
            | "_netdev"
            | "default_permissions" => {}
            word if word.starts_with("x-") || word.starts_with("comment=") => {}
            // What the table of mounts says of ours, and `mount -o remount` repeats.
            word if KERNELS.iter().any(|known| word.starts_with(known)) => {}
            word => return self.add_value(word),
        }
        Ok(())
    }

    fn add_value(&mut self, word: &str) -> Result<(), OptionError> {
        match word.split_once('=') {
            Some(("ack", "margin")) => self.ack = Ack::Margin,
            Some(("ack", "full")) => self.ack = Ack::Full,
            Some(("ack", _)) => {
                return Err(OptionError::Value {
                    option: word.to_owned(),
                    reason: "it can be margin or full".to_owned(),
                });
            }
            Some(("identity", dir)) if !dir.is_empty() => self.identity = Some(dir.into()),
            Some(("cache", dir)) if !dir.is_empty() => self.cache = Some(dir.into()),
            Some(("memory", size)) => self.memory = Some(parse_size(word, size)?),
            Some(("cache_size", size)) => self.cache_size = Some(parse_size(word, size)?),
            _ => return Err(OptionError::Unknown(word.to_owned())),
        }
        Ok(())
    }

    /// What the kernel is told.
    pub(super) fn for_kernel(&self, source: String) -> fuse::MountOptions {
        let root = rustix::process::geteuid().is_root();
        fuse::MountOptions {
            source,
            read_only: self.read_only,
            allow_other: self.allow_other.unwrap_or(root),
            suid: self.suid,
            dev: self.dev,
            no_exec: self.no_exec,
            no_atime: self.no_atime,
            sync: self.sync,
        }
    }
}

fn parse_size(word: &str, size: &str) -> Result<Size, OptionError> {
    size.parse()
        .map_err(|error| OptionError::Value { option: word.to_owned(), reason: format!("{error}") })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Options, OptionError> {
        Options::parse(&[text.to_owned()])
    }

    #[test]
    fn ack_is_margin_or_full() {
        assert_eq!(parse("").unwrap().ack, Ack::Margin);
        assert_eq!(parse("rw,ack=full").unwrap().ack, Ack::Full);
        assert_eq!(parse("ack=full,ack=margin").unwrap().ack, Ack::Margin);
        let error = parse("ack=most").unwrap_err().to_string();
        assert_eq!(error, "mount option ack=most: it can be margin or full");
        assert_eq!(parse("ack"), Err(OptionError::Unknown("ack".into())));
    }

    #[test]
    fn a_remount_changes_what_it_names() {
        let there = Options::of_mount("ro,nosuid,noexec,relatime").unwrap();
        let known = (there.read_only, there.suid, there.dev, there.no_exec);
        assert_eq!(known, (true, false, true, true));
        let lists = ["rw,remount,nosuid,user_id=0,group_id=0,max_read=131072".to_owned()];
        let changed = there.changed_by(&lists).unwrap();
        assert_eq!((changed.read_only, changed.suid, changed.dev), (false, false, true));
        assert_eq!(parse("max_read=1"), Err(OptionError::Unknown("max_read=1".into())));
    }

    #[test]
    fn options_of_fstab() {
        let options = parse("rw,noatime,_netdev,x-systemd.automount,identity=/etc/us,memory=256M");
        let wanted = Options {
            no_atime: true,
            identity: Some("/etc/us".into()),
            memory: Some(Size(256 << 20)),
            ..Options::default()
        };
        assert_eq!(options, Ok(wanted));
        assert!(parse("ro").unwrap().read_only);
        assert!(!parse("ro,rw").unwrap().read_only);
        assert_eq!(parse(""), Ok(Options::default()));
        let cached = parse("cache=/var/cache/us,cache_size=1G").unwrap();
        let wanted = (Some("/var/cache/us".into()), Some(Size(1 << 30)));
        assert_eq!((cached.cache, cached.cache_size), wanted);
        assert!(matches!(parse("cache_size=big"), Err(OptionError::Value { .. })));
        assert_eq!(parse("cache"), Err(OptionError::Unknown("cache".into())));
        assert!(matches!(parse("memory=lots"), Err(OptionError::Value { .. })));
        assert!(matches!(parse("identity="), Err(OptionError::Unknown(_))));
    }
}
