//! Being a guest in somebody's machine: when background work may run, and the owner's pause.
//!
//! Putting and reading fragments is what the owner agreed to; scrub, compaction and purging are our
//! own business and wait while the machine is busy. The owner's pause stops those and new puts;
//! reads go on, because other people's data hangs on them.

mod background;
mod pressure;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::{Deserialize, Serialize};
use us_core::daemon::files::{Access, write_atomic};
use us_core::daemon::size::Size;

pub use background::{ScrubRequests, run as run_background};
pub use pressure::{Pressure, parse_pressure};

/// What a guest allows itself.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GuestConfig {
    /// CPU niceness of the whole daemon, 0 to 19.
    pub nice: u8,
    /// Background work waits while more than this share of time (percent, over 10 s) some task of
    /// the machine waited for a CPU.
    pub cpu_pressure_percent_max: f64,
    /// The same of time waited for a disk.
    pub io_pressure_percent_max: f64,
    /// New orders to rebuild fragments are refused while the pressure on the CPUs is above this: more
    /// than for other background work, because somebody's data hangs on them.
    pub repair_cpu_pressure_percent_max: f64,
    /// The same of the disks.
    pub repair_io_pressure_percent_max: f64,
    /// Bytes a second that scrub and compaction read.
    pub background_rate: Size,
    /// A scrub of everything begins this many hours after the last one began.
    pub scrub_every_hours: u32,
}

impl Default for GuestConfig {
    fn default() -> Self {
        Self {
            nice: 19,
            cpu_pressure_percent_max: 60.0,
            io_pressure_percent_max: 30.0,
            repair_cpu_pressure_percent_max: 95.0,
            repair_io_pressure_percent_max: 90.0,
            background_rate: Size(8 << 20),
            scrub_every_hours: 7 * 24,
        }
    }
}

/// Whether background work may run now, and if not, why not.
pub fn may_work(
    config: &GuestConfig,
    paused: bool,
    cpu: Option<Pressure>,
    io: Option<Pressure>,
) -> Result<(), &'static str> {
    if paused {
        return Err("paused by its owner");
    }
    below((cpu, config.cpu_pressure_percent_max), (io, config.io_pressure_percent_max))
}

/// Whether fragments may be rebuilt now, and if not, why not. The owner's pause is not asked.
pub fn may_repair(
    config: &GuestConfig,
    cpu: Option<Pressure>,
    io: Option<Pressure>,
) -> Result<(), &'static str> {
    let (cpu_max, io_max) =
        (config.repair_cpu_pressure_percent_max, config.repair_io_pressure_percent_max);
    below((cpu, cpu_max), (io, io_max))
}

/// Whether both pressures are at most what stands beside them.
fn below(cpu: (Option<Pressure>, f64), io: (Option<Pressure>, f64)) -> Result<(), &'static str> {
    let over = |(pressure, percent_max): (Option<Pressure>, f64)| {
        pressure.is_some_and(|pressure| pressure.some_percent > percent_max)
    };
    if over(cpu) {
        Err("the CPUs are busy")
    } else if over(io) {
        Err("the disks are busy")
    } else {
        Ok(())
    }
}

/// The owner's pause. It survives restarts: a file says that it is on.
#[derive(Clone, Debug)]
pub struct Pause {
    on: Arc<AtomicBool>,
    path: Arc<PathBuf>,
}

impl Pause {
    /// The pause as the last run left it.
    pub fn load(dir: &Path) -> Self {
        let path = dir.join("paused");
        Self { on: Arc::new(AtomicBool::new(path.exists())), path: Arc::new(path) }
    }

    /// Whether it is on.
    pub fn is_on(&self) -> bool {
        self.on.load(Ordering::Relaxed)
    }

    /// Turns it on or off, durably. Blocks.
    ///
    /// # Errors
    /// When the file cannot be written or removed; nothing has changed then.
    pub fn set(&self, on: bool) -> std::io::Result<()> {
        if on {
            write_atomic(&self.path, b"by its owner\n", Access::Public)?;
        } else if let Err(error) = std::fs::remove_file(self.path.as_path())
            && error.kind() != std::io::ErrorKind::NotFound
        {
            return Err(error);
        }
        self.on.store(on, Ordering::Relaxed);
        Ok(())
    }
}

/// Gives the daemon the niceness of `config`. Call it before threads start: they inherit it.
///
/// # Errors
/// What the system says.
pub fn lower_priority(config: &GuestConfig) -> std::io::Result<()> {
    rustix::process::nice(i32::from(config.nice.min(19)))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_gives_way() {
        let config = GuestConfig::default();
        let pressure = |some_percent| Some(Pressure { some_percent });
        assert_eq!(may_work(&config, false, None, None), Ok(()));
        assert_eq!(may_work(&config, false, pressure(59.0), pressure(29.0)), Ok(()));
        assert!(may_work(&config, false, pressure(61.0), None).is_err());
        assert!(may_work(&config, false, None, pressure(31.0)).is_err());
        assert!(may_work(&config, true, None, None).is_err());
        assert_eq!(may_repair(&config, pressure(94.0), pressure(89.0)), Ok(()));
        assert!(may_repair(&config, pressure(96.0), None).is_err());
        assert!(may_repair(&config, None, pressure(91.0)).is_err());
    }

    #[test]
    fn a_pause_survives_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let pause = Pause::load(dir.path());
        assert!(!pause.is_on());
        pause.set(true).unwrap();
        assert!(Pause::load(dir.path()).is_on());
        pause.set(false).unwrap();
        pause.set(false).unwrap();
        assert!(!Pause::load(dir.path()).is_on());
    }
}
