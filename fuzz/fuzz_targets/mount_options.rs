//! See `mount_options` in src/usfs.rs.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| us_fuzz::usfs::mount_options(bytes));
