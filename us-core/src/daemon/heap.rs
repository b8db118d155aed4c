//! The C allocator, told how daemons use it: fragments and blocks come and go by the megabyte.
//!
//! glibc gives a buffer above 128 KiB a mapping of its own, or hands the end of its heap back at once:
//! each fragment is then zeroed by the kernel page by page once more. Measured with
//! `cargo bench -p us-tests --bench repair`: 5.6 to 6.0 CPU seconds for 2 GiB repaired without, 4.8 to
//! 5.1 with these settings. Other allocators (mimalloc 2.0, jemalloc 5.3, preloaded) took 6.1 to 6.8.
//! Elsewhere than on glibc nothing is set.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

/// Free bytes at the end of a heap that are kept for the next buffer.
pub const KEPT_BYTES: i32 = 64 << 20;
/// Buffers below this come out of a heap, larger ones from a mapping of their own.
pub const MAPPED_FROM_BYTES: i32 = 16 << 20;
/// Heaps, shared by all threads: what each keeps is kept at most so often.
pub const HEAPS_MAX: i32 = 2;

/// Keeps freed buffers for the next ones. To be called once, before threads are started.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
pub fn keep_large_buffers() {
    let settings = [
        (libc::M_MMAP_THRESHOLD, MAPPED_FROM_BYTES),
        (libc::M_TRIM_THRESHOLD, KEPT_BYTES),
        (libc::M_ARENA_MAX, HEAPS_MAX),
    ];
    for (parameter, value) in settings {
        // SAFETY: mallopt takes two numbers and only changes the allocator's own settings.
        let set = unsafe { libc::mallopt(parameter, value) };
        tracing::debug!(parameter, value, taken = set == 1, "allocator set");
    }
}

/// Gives what is free back to the system every `period`, until `stop`: what a busy time needed is not
/// kept from the machine's owner, nor counted beside what a memory limit allows.
pub async fn give_back_every(period: Duration, stop: CancellationToken) {
    // Cancel-safe: a dropped sleep loses nothing.
    while stop.run_until_cancelled(tokio::time::sleep(period)).await.is_some() {
        let _ = tokio::task::spawn_blocking(give_back).await;
    }
}

/// Takes milliseconds.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn give_back() {
    // SAFETY: malloc_trim takes a number and frees only pages that hold no live allocation.
    let _ = unsafe { libc::malloc_trim(0) };
}

/// Keeps freed buffers for the next ones: the allocator here does as it likes.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub fn keep_large_buffers() {}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn give_back() {}
