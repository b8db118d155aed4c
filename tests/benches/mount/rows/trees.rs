//! Ordinary programs on a tree of sources.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use us_tests::tree::scan;

use crate::bed::{Bed, Done, Sample, Shared, remove as remove_all};
use crate::sources::Sources;

const TREE: &str = "tree";
const COPY: &str = "tree-copy";
const CLONE: &str = "clone";

/// Runs a program to its end, in the C locale and with nobody's settings.
pub(crate) fn run(program: &str, arguments: &[&OsStr]) -> Result<Vec<u8>> {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).env("LC_ALL", "C");
    command.env("GIT_CONFIG_NOSYSTEM", "1").env("GIT_CONFIG_GLOBAL", "/dev/null");
    let output = command.output().with_context(|| format!("start {program}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program} ended with {}: {}", output.status, said.trim());
    Ok(output.stdout)
}

fn sources(shared: &Shared) -> Result<&Sources> {
    shared.sources.as_ref().context("no sources: tar and git are needed")
}

fn unpack(tar: &Path, folder: &Path) -> Result<Done> {
    std::fs::create_dir(folder)?;
    run("tar", &["xf".as_ref(), tar.as_ref(), "-C".as_ref(), folder.as_ref()])?;
    Ok(Done::all(1.0))
}

/// The unpacked tree.
fn tree(bed: &Bed, shared: &Shared) -> Result<PathBuf> {
    let path = bed.path(TREE);
    if !path.exists() {
        unpack(&sources(shared)?.tar, &path)?;
    }
    Ok(path)
}

fn verify(shared: &Shared, folder: &Path) -> Result<()> {
    let found = scan(folder)?;
    ensure!(found == sources(shared)?.nodes, "{} is not the tree it should be", folder.display());
    Ok(())
}

pub(super) fn tar(bed: &mut Bed, shared: &Shared) -> Result<Sample> {
    let (path, sources) = (bed.path(TREE), sources(shared)?);
    remove_all(&path)?;
    let sample = bed.time(shared, || unpack(&sources.tar, &path))?;
    verify(shared, &path)?;
    Ok(sample)
}

pub(super) fn copy(bed: &mut Bed, shared: &Shared) -> Result<Sample> {
    let (tree, path) = (tree(bed, shared)?, bed.path(COPY));
    remove_all(&path)?;
    let sample = bed.time(shared, || {
        run("cp", &["-r".as_ref(), tree.as_ref(), path.as_ref()])?;
        Ok(Done::all(1.0))
    })?;
    verify(shared, &path)?;
    remove_all(&path)?;
    Ok(sample)
}

pub(super) fn remove(bed: &mut Bed, shared: &Shared) -> Result<Sample> {
    let tree = tree(bed, shared)?;
    bed.time(shared, || {
        run("rm", &["-rf".as_ref(), tree.as_ref()])?;
        Ok(Done::all(1.0))
    })
}

pub(super) fn clone(bed: &mut Bed, shared: &Shared) -> Result<Sample> {
    let path = bed.path(CLONE);
    remove_all(&path)?;
    let from = format!("file://{}", sources(shared)?.git.display());
    let sample = bed.time(shared, || {
        run("git", &["clone".as_ref(), "-q".as_ref(), from.as_ref(), path.as_ref()])?;
        Ok(Done::all(1.0))
    })?;
    let status = ["status".as_ref(), "--porcelain".as_ref()];
    let changed = run("git", &[&["-C".as_ref(), path.as_os_str()][..], &status[..]].concat())?;
    ensure!(changed.is_empty(), "the clone differs: {}", String::from_utf8_lossy(&changed));
    remove_all(&path)?;
    Ok(sample)
}
