//! See `recovery_key` in src/us_directory.rs.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| us_fuzz::us_directory::recovery_key(bytes));
