//! What every program of Us shares: logs, layered configuration, `/metrics` and `/healthz`, an
//! ordered end, the allocator's and the runtime's settings, sizes as people write them, and files that are replaced
//! whole or not at all.
//!
//! It owns nothing durable. A daemon's `main` reads top to bottom: [`logging::init`],
//! [`config::load`], [`shutdown::Shutdown::on_signals`], [`http::serve`], its own work, then the
//! stages of its end, each with [`shutdown::drain`].

pub mod append;
pub mod cli;
pub mod config;
pub mod disk;
pub mod files;
pub mod heap;
pub mod http;
pub mod joined;
pub mod logging;
pub mod runtime;
pub mod shutdown;
pub mod size;
