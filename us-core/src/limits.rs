//! What a volume can hold and a session may say: limits the mount keeps and the directory enforces.
//!
//! A mutation that breaks one costs its mount the session, with all that is not durable. So there is
//! one set of them: the mount answers an error before anything gets into its log. Lengths of names,
//! targets and values are in [`crate::name`].

/// Bytes of a file that one chunk of its map covers.
pub const CHUNK_BYTES: u64 = 4 << 20;
/// The most extents a chunk's map can have.
pub const CHUNK_EXTENTS_MAX: usize = 1024;
/// The largest offset a file can have.
pub const FILE_BYTES_MAX: u64 = i64::MAX as u64;
/// The longest extent of zeros in one mutation.
pub const ZERO_EXTENT_BYTES_MAX: u64 = 64 << 30;
/// The most bytes of extended attributes an inode can have, as they are stored: sealed
/// ([`crate::name::sealed_xattr_bytes`]).
pub const SEALED_XATTRS_BYTES_MAX: usize = 1 << 20;
/// The most directories above one that a directory is moved to.
pub const DEPTH_MAX: usize = 4096;
/// The most mutations a batch may have.
pub const BATCH_MUTATIONS_MAX: usize = 4096;
/// The most requests a batch may name for the logs.
pub const BATCH_TRACES_MAX: usize = 64;
/// Files of up to this size are read as one thing: with their neighbours' bytes and maps.
pub const SMALL_FILE_BYTES: u64 = 64 << 10;
/// The most other files whose maps may be asked for with the map of one.
pub const SIBLINGS_MAX: usize = 256;
/// The most leases in one message.
pub const LEASES_MESSAGE_MAX: usize = 4096;
/// The most leases one session may hold.
pub const SESSION_LEASES_MAX: usize = 1 << 20;
