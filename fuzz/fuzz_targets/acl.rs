//! See `acl` in src/usfs.rs.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| us_fuzz::usfs::acl(bytes));
