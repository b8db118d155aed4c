//! What `usfs up` keeps: a lock, the settings of the disk, ports, keys, a folder a process.
//!
//! ```text
//! DATA/lock            who uses it
//!      up.toml         the settings of the first start
//!      up.json         how usctl reaches what runs (places::UpRecord)
//!      pids            the processes: {"directory": 1, "provider0": 2, …}
//!      directory/      data of the directory, its certificate authority
//!      provider0/ …    data of the providers
//!      identity/NAME/  certificates: provider0 …, client, admin
//!      logs/NAME.log
//! ```

use std::collections::BTreeMap;
use std::io;
use std::net::TcpListener;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};
use us_core::daemon::files::{Access, DirLock, write_atomic};
use us_core::daemon::size::Size;
use us_core::disk::{FragmentBits, margin_holds};
use us_core::geometry::Code;
use us_core::ids::ProviderId;

use super::UpArgs;

/// The name of the one volume.
pub(super) const VOLUME: &str = "disk";
/// Providers of a disk where nobody says otherwise.
const PROVIDERS: u16 = 6;
/// The code of a disk where nobody says otherwise.
const CODE: &str = "4+2";
/// The same with too few providers for that one.
const FEW_PROVIDERS_CODE: &str = "1+1";
/// What a provider offers at the least where nobody says otherwise.
const CAPACITY_MIN: Size = Size(1 << 30);

/// What was chosen at the first start, and may not change, or may grow.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Settings {
    code: String,
    pub providers: u16,
    /// Of each provider.
    pub capacity: Size,
}

/// The state, locked by this process.
#[derive(Debug)]
pub(super) struct State {
    _lock: DirLock,
    pub dir: PathBuf,
    pub settings: Settings,
    /// There was nothing before.
    pub new: bool,
}

impl Settings {
    pub fn code(&self) -> anyhow::Result<Code> {
        self.code.parse().context("the code in up.toml")
    }

    /// The settings of a start: those kept, as the flags change them.
    fn choose(kept: Option<Self>, args: &UpArgs, free: Size) -> anyhow::Result<Self> {
        let Some(mut settings) = kept else {
            let providers = args.providers.unwrap_or(PROVIDERS);
            let code = match args.code {
                Some(code) => code,
                None => fitting_code(providers)?,
            };
            check_fits(code, providers)?;
            // Half of what is free stays free.
            let share = Size((free.0 / 2 / u64::from(providers)).max(CAPACITY_MIN.0));
            return Ok(Self {
                code: code.to_string(),
                providers,
                capacity: args.capacity.unwrap_or(share),
            });
        };
        if let Some(code) = args.code.map(|code| code.to_string())
            && code != settings.code
        {
            bail!(
                "this disk has the code {}, and a disk keeps its code: leave out --code, or begin \
                 another disk with --data DIR",
                settings.code
            );
        }
        if let Some(providers) = args.providers {
            if providers < settings.providers {
                bail!(
                    "this disk lies on {} providers: with {providers} of them part of it could \
                     not be read. Leave out --providers, or give a larger number",
                    settings.providers
                );
            }
            settings.providers = providers;
        }
        if let Some(capacity) = args.capacity {
            settings.capacity = capacity;
        }
        check_fits(settings.code()?, settings.providers)?;
        Ok(settings)
    }
}

/// Whether a block of this code can be acknowledged on so many providers, its fragments evenly
/// among them.
fn fits(code: Code, providers: u16) -> bool {
    let places = (0..code.fragments() as u32).map(|index| ProviderId(index % u32::from(providers)));
    margin_holds(code, &places.collect::<Vec<_>>(), &FragmentBits::all(code.fragments()))
}

/// The code of a new disk where nobody says otherwise.
fn fitting_code(providers: u16) -> anyhow::Result<Code> {
    let codes = [CODE, FEW_PROVIDERS_CODE].map(|code| code.parse::<Code>());
    for code in codes {
        let code = code.context("a code of ours")?;
        if fits(code, providers) {
            return Ok(code);
        }
    }
    bail!(
        "{providers} provider is too few: what it holds is lost with it, and a disk of Us bears the \
         loss of at least one. Give --providers 2 or more"
    )
}

/// An error where nothing could ever be stored.
fn check_fits(code: Code, providers: u16) -> anyhow::Result<()> {
    if fits(code, providers) {
        return Ok(());
    }
    let enough = (providers..=u16::from(u8::MAX)).find(|providers| fits(code, *providers));
    let advice =
        enough.map_or("another --code".to_owned(), |enough| format!("--providers {enough}"));
    bail!(
        "nothing could be stored with the code {code} on {providers} providers: any {} of them may \
         vanish at any time, and too few fragments would remain. Give {advice} or more",
        code.write_margin()
    )
}

impl State {
    /// Takes the state in `dir`, made where there is none.
    pub fn open(dir: &Path, args: &UpArgs) -> anyhow::Result<Self> {
        let lock = match DirLock::take(dir) {
            Ok(lock) => lock,
            Err(error @ us_core::daemon::files::LockError::InUse { .. }) => {
                return Err(anyhow::Error::from(error)
                    .context("another `usfs up` runs with this state: `usctl status` shows it"));
            }
            Err(error) => return Err(error.into()),
        };
        let dir = dir.canonicalize().context("the state's folder")?;
        let path = dir.join("up.toml");
        let kept = match std::fs::read_to_string(&path) {
            Ok(text) => Some(toml::from_str(&text).context("up.toml in the state")?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error).context("read up.toml"),
        };
        let new = kept.is_none();
        let settings = Settings::choose(kept, args, free_bytes(&dir)?)?;
        settings.code()?;
        let text = toml::to_string(&settings).context("write up.toml")?;
        write_atomic(&path, text.as_bytes(), Access::Public).context("write up.toml")?;
        std::fs::create_dir_all(dir.join("logs")).context("make the folder of logs")?;
        Ok(Self { _lock: lock, dir, settings, new })
    }

    pub fn identity(&self, name: &str) -> PathBuf {
        self.dir.join("identity").join(name)
    }

    pub fn data(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    pub fn log(&self, name: &str) -> PathBuf {
        self.dir.join("logs").join(format!("{name}.log"))
    }

    /// Where a process listens: where it did the last time, if that is free.
    pub fn listen(&self, name: &str) -> String {
        std::fs::read_to_string(self.data(name).join("address"))
            .ok()
            .map(|text| text.trim().to_owned())
            .filter(|address| TcpListener::bind(address.as_str()).is_ok())
            .unwrap_or_else(|| "127.0.0.1:0".to_owned())
    }

    /// Says which processes run.
    pub fn write_pids(&self, pids: &BTreeMap<String, i32>) -> anyhow::Result<()> {
        let text = serde_json::to_vec_pretty(pids).context("pids")?;
        write_atomic(&self.dir.join("pids"), &text, Access::Public).context("write pids")
    }
}

fn free_bytes(dir: &Path) -> anyhow::Result<Size> {
    let space = rustix::fs::statvfs(dir).context("ask for free space")?;
    Ok(Size(space.f_bavail * space.f_frsize))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(code: Option<&str>, providers: Option<u16>) -> UpArgs {
        let code = code.map(|code| code.parse().unwrap());
        UpArgs { code, providers, ..UpArgs::default() }
    }

    #[test]
    fn a_disk_keeps_its_code_and_its_providers() {
        let first = Settings::choose(None, &args(None, None), Size(120 << 30)).unwrap();
        let wanted = Settings { code: "4+2".into(), providers: 6, capacity: Size(10 << 30) };
        assert_eq!(first, wanted);
        let again = |args: &UpArgs| Settings::choose(Some(first.clone()), args, Size(0));
        assert_eq!(again(&args(None, None)).unwrap(), first);
        assert_eq!(again(&args(Some("4+2"), Some(8))).unwrap().providers, 8);
        let error = again(&args(Some("2+1"), None)).unwrap_err().to_string();
        assert!(error.contains("4+2") && error.contains("--data"), "{error}");
        assert!(again(&args(None, Some(5))).unwrap_err().to_string().contains("6 providers"));
    }

    /// `usfs up --providers 2` greeted a disk of code 4+2 on which every write failed.
    #[test]
    fn a_disk_that_could_store_nothing_is_refused() {
        let first =
            |code, providers| Settings::choose(None, &args(code, Some(providers)), Size(120 << 30));
        assert_eq!(first(None, 6).unwrap().code, "4+2");
        assert_eq!(first(None, 3).unwrap().code, "4+2");
        assert_eq!(first(None, 2).unwrap().code, "1+1");
        assert!(first(None, 1).unwrap_err().to_string().contains("--providers 2"));
        let error = first(Some("4+2"), 2).unwrap_err().to_string();
        assert!(error.contains("--providers 3"), "{error}");
        assert!(first(Some("2+1"), 3).is_ok());
        let kept = Settings { code: "4+2".into(), providers: 2, capacity: Size(1 << 30) };
        let again =
            |providers| Settings::choose(Some(kept.clone()), &args(None, providers), Size(0));
        assert!(again(None).is_err() && again(Some(3)).is_ok());
    }

    #[test]
    fn the_state_is_found_again_and_locked() {
        let dir = tempfile::tempdir().unwrap();
        let state = State::open(dir.path(), &args(Some("2+1"), Some(3))).unwrap();
        assert!(state.new);
        let busy = State::open(dir.path(), &args(None, None)).unwrap_err();
        assert!(format!("{busy:#}").contains("another `usfs up`"), "{busy:#}");
        drop(state);
        let state = State::open(dir.path(), &args(None, None)).unwrap();
        assert!(!state.new);
        assert_eq!(state.settings.code().unwrap().to_string(), "2+1");
        assert_eq!(state.listen("provider0"), "127.0.0.1:0");
    }
}
