//! See `tls_record` in src/us_core.rs.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| us_fuzz::us_core::tls_record(bytes));
