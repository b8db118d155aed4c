//! Programs that test file systems, from the registry; `.ci/run` says how they are installed.

use std::path::PathBuf;

/// Where `name` is: in `US_TEST_TOOLS`, else in one of the folders of `PATH`.
///
/// # Panics
/// In CI, where it must be there.
pub fn tool(name: &str) -> Option<PathBuf> {
    let folders = std::env::var_os("US_TEST_TOOLS").unwrap_or_default();
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&folders).chain(std::env::split_paths(&path));
    let found = folders.map(|folder| folder.join(name)).find(|program| program.is_file());
    if found.is_none() {
        let message = format!("NOT TESTED: this test needs `{name}` (cargo install {name})");
        assert!(std::env::var_os("CI").is_none(), "{message}");
        eprintln!("\n{message}\n");
    }
    found
}
