//! A benchmark's other processes: its own program, started again, which says when it is asked how much
//! CPU time it has used. And the median that benchmarks print.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::time::{ClockId, clock_gettime};

/// A running one. It ends with this value.
#[derive(Debug)]
pub struct Worker {
    child: Child,
    requests: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Worker {
    /// Starts this program with `flag` and the folder `home`; the first line it prints comes back too.
    ///
    /// # Errors
    /// The system's.
    pub fn start(flag: &str, home: &Path) -> Result<(Self, String)> {
        let mut child = Command::new(std::env::current_exe()?)
            .arg(flag)
            .arg(home)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("start this program again")?;
        let requests = child.stdin.take().context("no standard input")?;
        let answers = BufReader::new(child.stdout.take().context("no standard output")?);
        let mut worker = Self { child, requests, answers };
        let first = worker.line()?;
        Ok((worker, first))
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        Ok(line.trim().to_owned())
    }

    /// The CPU time it has used so far.
    ///
    /// # Errors
    /// It has ended, or does not call [`answer`].
    pub fn cpu(&mut self) -> Result<Duration> {
        self.requests.write_all(b"\n")?;
        let micros = self.line()?;
        Ok(Duration::from_micros(micros.parse().context("a worker has ended")?))
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // It may have ended already; nothing can be done here if not.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The worker's side: prints `first`, then answers each line of standard input with the CPU time used so
/// far, until standard input ends. Blocks.
///
/// # Errors
/// The system's.
pub fn answer(first: &str) -> Result<()> {
    println!("{first}");
    for line in std::io::stdin().lock().lines() {
        line?;
        println!("{}", own_cpu().as_micros());
    }
    Ok(())
}

/// User and system time of this process.
pub fn own_cpu() -> Duration {
    let used = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(used.tv_sec as u64, used.tv_nsec as u32)
}

/// Of an odd number of values.
///
/// # Panics
/// Where there are none.
pub fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
