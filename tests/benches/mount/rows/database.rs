//! sqlite3: a row a transaction, each durable.

use std::fmt::Write;
use std::fs::{self, File};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::bed::{Bed, Done, Sample, Shared, remove};

const ROWS: usize = 1000;

pub(super) fn journal(bed: &mut Bed, shared: &Shared) -> Result<Sample> {
    transactions(bed, shared, "delete")
}

pub(super) fn wal(bed: &mut Bed, shared: &Shared) -> Result<Sample> {
    transactions(bed, shared, "wal")
}

fn transactions(bed: &Bed, shared: &Shared, mode: &str) -> Result<Sample> {
    let database = bed.path(&format!("{mode}.db"));
    for ending in ["", "-wal", "-shm", "-journal"] {
        remove(&bed.path(&format!("{mode}.db{ending}")))?;
    }
    let made = format!("pragma journal_mode={mode}; create table t(id integer primary key, a, b);");
    let sqlite = |script: &str| -> Result<String> {
        let path = shared.scratch.join("script.sql");
        fs::write(&path, script)?;
        let mut command = Command::new("sqlite3");
        command.arg("-bail").arg(&database).stdin(File::open(path)?).stdout(Stdio::piped());
        let output = command.output().context("start sqlite3")?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "sqlite3 ended with {}: {said}", output.status);
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let now = sqlite(&made)?;
    ensure!(now == mode, "the journal's mode is {now}");
    let mut script = String::from("pragma synchronous=full;\n");
    for number in 0..ROWS {
        let bytes = shared.data.of(3 << 40 | number as u64, 64);
        let text = bytes.iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}"));
        writeln!(script, "insert into t(a, b) values('row {number}', x'{text}');")?;
    }
    let sample = bed.time(shared, || {
        sqlite(&script)?;
        Ok(Done::all(ROWS as f64))
    })?;
    let found = sqlite("select count(*) from t; pragma integrity_check;")?;
    ensure!(found == format!("{ROWS}\nok"), "the database says {found:?}");
    Ok(sample)
}
