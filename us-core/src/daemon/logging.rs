//! Logs of every program, on standard error; and what a panic does.
//!
//! `US_LOG` (or `--log`) chooses what is logged in the syntax of `tracing`'s filters, for example
//! `info,us_core::disk=debug`. `--log-json` writes one JSON object a line.
//!
//! A request keeps one id on its whole way: the FUSE call makes a [`RequestId`], events and spans
//! carry it as the field `request`, messages to the directory and to providers as their `trace`
//! (docs/wire.md). To follow one: log at `debug`, and search the logs of all machines for its digits.

use std::fmt;
use std::io::IsTerminal;
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};

use tracing::Instrument;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// The command-line flags about logs; flatten it into a program's own.
#[derive(clap::Args, Debug, Clone, Default)]
pub struct LogArgs {
    /// What to log: error, warn, info, debug, trace, or a filter such as info,us_core=debug
    #[arg(long, env = "US_LOG", value_name = "FILTER", global = true, help_heading = "Logs")]
    pub log: Option<String>,
    /// Write logs as JSON, one object a line
    #[arg(long, global = true, help_heading = "Logs")]
    pub log_json: bool,
}

/// Logs could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The filter makes no sense.
    #[error("{filter:?} is not a log filter: try info, debug, or info,us_core=debug")]
    Filter {
        /// What was given.
        filter: String,
        /// What is wrong with it.
        source: tracing_subscriber::filter::ParseError,
    },
    /// Logs were set up before.
    #[error("logs are set up already")]
    Twice(#[from] tracing_subscriber::util::TryInitError),
}

/// Sets up logs for the whole process; `otherwise` is the filter where none was given. Once only.
///
/// # Errors
/// [`LogError`].
pub fn init(args: &LogArgs, otherwise: &str) -> Result<(), LogError> {
    let filter = args.log.as_deref().filter(|filter| !filter.is_empty()).unwrap_or(otherwise);
    let filter = EnvFilter::try_new(filter)
        .map_err(|source| LogError::Filter { filter: filter.to_owned(), source })?;
    let registry = tracing_subscriber::registry().with(filter);
    if args.log_json {
        let lines = tracing_subscriber::fmt::layer()
            .json()
            .flatten_event(true)
            .with_writer(std::io::stderr);
        registry.with(lines).try_init()?;
    } else {
        let lines = tracing_subscriber::fmt::layer()
            .with_ansi(std::io::stderr().is_terminal())
            .with_writer(std::io::stderr);
        registry.with(lines).try_init()?;
    }
    Ok(())
}

/// From now on a panic in any thread or task is logged and ends the process. A task that dies alone
/// would lose its request, and keep whatever waits for it waiting for ever. For programs none of
/// whose libraries are expected to panic: `catch_unwind` no longer helps.
pub fn abort_on_panic() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        tracing::error!(%panic, "a broken invariant: the process ends");
        print(panic);
        std::process::abort();
    }));
}

/// The number of one request, the same in the logs of every process it passes through.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct RequestId(pub u64);

impl RequestId {
    /// No request: what is done for nobody in particular.
    pub const NONE: Self = Self(0);

    /// A new one: 32 bits of the process (random at its first use), then a count.
    pub fn next() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let mut next = NEXT.fetch_add(1, Ordering::Relaxed);
        if next == 0 {
            // Another thread that comes between takes a number without the random part: harmless.
            let mut random = [0u8; 4];
            let _ = getrandom::fill(&mut random);
            next = u64::from(u32::from_le_bytes(random).max(1)) << 32;
            NEXT.fetch_add(next, Ordering::Relaxed);
        }
        Self(next)
    }
}

tokio::task_local! {
    static CURRENT: RequestId;
}

impl RequestId {
    /// Runs `work` as this request: inside it, [`RequestId::current`] knows the number. A task it
    /// spawns knows it only through [`RequestId::carried`].
    pub fn scope<F: Future>(self, work: F) -> impl Future<Output = F::Output> {
        CURRENT.scope(self, work)
    }

    /// Work for a task of its own that goes on being this request's, in its logs too.
    pub fn carried<F: Future>(work: F) -> impl Future<Output = F::Output> {
        CURRENT.scope(Self::current(), work.in_current_span())
    }

    /// The request this code runs for; [`RequestId::NONE`] outside of any.
    pub fn current() -> Self {
        CURRENT.try_with(|id| *id).unwrap_or(Self::NONE)
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl FromStr for RequestId {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        u64::from_str_radix(text, 16).map(Self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_told_apart() {
        let first = RequestId::next();
        let second = RequestId::next();
        assert_ne!(first, second);
        assert_eq!(first.to_string().parse(), Ok(first));
        assert_eq!(first.to_string().len(), 16);
    }

    #[tokio::test]
    async fn a_request_is_known_in_its_own_work_only() {
        let id = RequestId::next();
        assert_eq!(id.scope(async { RequestId::current() }).await, id);
        assert_eq!(RequestId::current(), RequestId::NONE);
        let spawn =
            async { tokio::spawn(RequestId::carried(async { RequestId::current() })).await };
        assert_eq!(id.scope(spawn).await.unwrap(), id, "a task of its own");
    }

    #[test]
    fn a_wrong_filter_is_an_error_that_says_so() {
        let args = LogArgs { log: Some("us_core=shout".into()), log_json: false };
        assert!(init(&args, "info").unwrap_err().to_string().contains("us_core=shout"));
    }
}
