//! How hard the tests try: `US_TEST_TIER=quick` (CI, the default), `full`, `soak`.

/// The rounds of a test in the tier asked for.
///
/// # Panics
/// When `US_TEST_TIER` is none of quick, full, soak.
pub fn rounds(quick: u32, full: u32, soak: u32) -> u32 {
    match std::env::var("US_TEST_TIER").as_deref() {
        Err(_) | Ok("quick") => quick,
        Ok("full") => full,
        Ok("soak") => soak,
        Ok(other) => panic!("US_TEST_TIER={other}: it can be quick, full or soak"),
    }
}

/// The seed of a test's randomness: `US_TEST_SEED`, else 1. Printed, so that a failure can be had again.
pub fn seed() -> u64 {
    let seed = std::env::var("US_TEST_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(1);
    eprintln!("US_TEST_SEED={seed}");
    seed
}
