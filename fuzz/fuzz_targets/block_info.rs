//! See `block_info` in src/usfs.rs.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| us_fuzz::usfs::block_info(bytes));
