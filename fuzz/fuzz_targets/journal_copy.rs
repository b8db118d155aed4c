//! See `journal_copy` in src/us_provider.rs.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| us_fuzz::us_provider::journal_copy(bytes));
