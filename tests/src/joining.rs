//! Inviting and joining through the programs, as people do.

use std::io::Write;
use std::process::{Command, Output, Stdio};

use us_core::tls::InviteCode;

use crate::cluster::Cluster;

/// Makes an invitation with `usctl invite`; the code.
///
/// # Panics
/// When it does not work.
pub fn invite(cluster: &Cluster, arguments: &[&str]) -> String {
    let said = cluster.usctl(&[&["invite", "--json"], arguments].concat());
    let said: serde_json::Value = serde_json::from_str(&said).expect("JSON");
    said["code"].as_str().expect("a code").to_owned()
}

/// Runs `program join` with the code on standard input.
///
/// # Panics
/// When it does not start.
pub fn join(cluster: &Cluster, program: &str, code: &str, data: &str) -> Output {
    let mut command = joining(cluster, program, data);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it starts");
    let mut input = child.stdin.take().expect("a pipe");
    // It may have ended before it read.
    let _ = writeln!(input, "{code}");
    drop(input);
    child.wait_with_output().expect("it ends")
}

/// `program join`, for whoever keeps its things in `data`.
pub fn joining(cluster: &Cluster, program: &str, data: &str) -> Command {
    let mut command = cluster.program(program);
    command.arg("join").env("US_DATA", data).env("US_PROVIDER_DATA", data);
    command
}

/// [`join`], which must work.
///
/// # Panics
/// When it does not.
pub fn must_join(cluster: &Cluster, program: &str, code: &str, data: &str) {
    let output = join(cluster, program, code, data);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} join: {said}");
}

/// [`join`], which must fail; what it said.
///
/// # Panics
/// When it works.
pub fn must_not_join(cluster: &Cluster, program: &str, code: &str, data: &str) -> String {
    let output = join(cluster, program, code, data);
    assert!(!output.status.success(), "{program} joined");
    String::from_utf8(output.stderr).expect("text")
}

/// The same invitation, at another address.
///
/// # Panics
/// When `code` is none.
pub fn at_address(code: &str, address: &str) -> String {
    let code: InviteCode = code.parse().expect("a code");
    InviteCode { address: address.to_owned(), ..code }.reveal().to_string()
}

/// `usctl members`.
///
/// # Panics
/// When it does not work.
pub fn members(cluster: &Cluster) -> Vec<serde_json::Value> {
    let said = cluster.usctl(&["members", "--json"]);
    serde_json::from_str(&said).expect("JSON")
}

/// The member of this name.
pub fn member(cluster: &Cluster, name: &str) -> Option<serde_json::Value> {
    members(cluster).into_iter().find(|member| member["name"] == name)
}
