//! Running ordinary programs on a mount.

use std::path::Path;
use std::process::{Command, Output};

/// Runs a program and gives what it printed.
///
/// # Panics
/// When it cannot start or fails; the message has all it printed.
pub fn run(folder: &Path, program: &str, arguments: &[&str]) -> String {
    let output = try_run(folder, program, arguments);
    assert!(
        output.status.success(),
        "{program} {arguments:?} in {} ended with {}:\n{}{}",
        folder.display(),
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs a program, however it ends.
///
/// # Panics
/// When it cannot start.
pub fn try_run(folder: &Path, program: &str, arguments: &[&str]) -> Output {
    let mut command = Command::new(program);
    command.args(arguments).current_dir(folder);
    // The tests' own cargo must not leak into what they run.
    for (key, _) in std::env::vars_os() {
        if key.to_string_lossy().starts_with("CARGO_") && key != "CARGO_HOME" {
            command.env_remove(key);
        }
    }
    command.env("GIT_CONFIG_NOSYSTEM", "1").env("GIT_CONFIG_GLOBAL", "/dev/null");
    for who in ["GIT_AUTHOR", "GIT_COMMITTER"] {
        command.env(format!("{who}_NAME"), "Test").env(format!("{who}_EMAIL"), "test@example.org");
    }
    command.output().unwrap_or_else(|error| panic!("{program} does not start: {error}"))
}
