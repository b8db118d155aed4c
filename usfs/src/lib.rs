//! The Us file system: everything between a kernel's requests and the swarm.
//!
//! ```text
//! fuse     adapts the kernel's requests to `fs`, owns nothing
//! fs       the operations; waits and retries stalls
//! core     pure state: names, attributes, maps, dirty data, the session's log
//! session  the one ordered stream with the directory
//! data     dirty buffers, bytes in flight, maps, packing: pure structures of `core`
//! ```

pub mod attributes;
pub mod cli;
pub mod core;
pub mod ctl;
pub mod data;
pub mod errno;
pub mod fs;
pub mod fuse;
pub mod mount;
pub mod places;
pub mod session;
pub mod unlock;
pub mod up;
