//! The tables printed at the end.

use std::collections::BTreeMap;

use crate::bed::Sample;
use crate::disks::Kind;
use crate::extras::Factors;
use crate::rows::{ROWS, Row, Unit};

/// The most CPU seconds of the machine a GiB written and read may cost.
const CPU_SECONDS_A_GIB: [(&str, &str, f64); 2] =
    [("seq-write", "written, fsync", 4.0), ("seq-read", "read, cold", 3.0)];

/// Everything taken so far, by row and file system; what failed left nothing.
pub(crate) type Samples = BTreeMap<(&'static str, Kind), Vec<Sample>>;

/// Of an even number of values the mean of the two in the middle.
pub(crate) fn median(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        count if count % 2 == 1 => Some(values[middle]),
        _ => Some(f64::midpoint(values[middle - 1], values[middle])),
    }
}

/// Three digits, or all before the point.
fn figure(value: f64) -> String {
    match value {
        value if value >= 100.0 => format!("{value:.0}"),
        value if value >= 10.0 => format!("{value:.1}"),
        value => format!("{value:.2}"),
    }
}

fn mark(kept: bool) -> &'static str {
    if kept { "" } else { "**missed**" }
}

fn head(first: &str, kinds: &[Kind], last: &[&str]) {
    let names = kinds.iter().map(|kind| kind.name());
    let all: Vec<&str> = std::iter::once(first).chain(names).chain(last.iter().copied()).collect();
    println!("\n| {} |", all.join(" | "));
    println!("|---|{}", "--:|".repeat(all.len() - 1));
}

fn value(row: &Row, samples: &Samples, kind: Kind) -> Option<f64> {
    median(samples.get(&(row.name, kind))?.iter().map(|sample| row.unit.value(sample)))
}

fn cell(row: &Row, samples: &Samples, kind: Kind) -> String {
    let Some(value) = value(row, samples, kind) else { return "-".into() };
    let all = &samples[&(row.name, kind)];
    let cpu = median(all.iter().map(|sample| sample.cost.cpu_seconds)).unwrap_or_default();
    let partial = if all.iter().any(|sample| sample.done.partial) { "~" } else { "" };
    format!("{partial}{} ({cpu:.2})", figure(value))
}

/// The table of the rows.
pub(crate) fn rows(samples: &Samples, kinds: &[Kind]) {
    println!(
        "\nMedians; in brackets CPU seconds of the whole machine. `~`: not all done in the time."
    );
    head("", kinds, &["usfs / pass-through", "wanted", ""]);
    for row in &ROWS {
        if !samples.keys().any(|(name, _)| *name == row.name) {
            continue;
        }
        let cells: Vec<_> = kinds.iter().map(|kind| cell(row, samples, *kind)).collect();
        let ours = value(row, samples, Kind::Usfs);
        let theirs = value(row, samples, Kind::PassThrough);
        let ratio = ours.zip(theirs).map(|(ours, theirs)| row.unit.ratio(ours, theirs));
        let shown = ratio.map_or("-".into(), |ratio| format!("{ratio:.2}"));
        let (unit, cells, wanted) = (row.unit.name(), cells.join(" | "), row.target);
        let mark = mark(ratio.is_none_or(|ratio| ratio >= wanted));
        println!("| {}, {unit} | {cells} | {shown} | {wanted} | {mark} |", row.title);
    }
}

/// What a GiB costs in CPU seconds.
pub(crate) fn cpu(samples: &Samples, kinds: &[Kind]) {
    if CPU_SECONDS_A_GIB.iter().all(|(name, ..)| !samples.keys().any(|(row, _)| row == name)) {
        return;
    }
    let of = |name, kind, after: bool| {
        let all = samples.get(&(name, kind))?;
        median(all.iter().map(|sample| {
            let after = if after { sample.cpu_seconds_after } else { 0.0 };
            (sample.cost.cpu_seconds + after) / (sample.done.amount / 1024.0)
        }))
    };
    println!("\nCPU seconds of the whole machine a GiB; in brackets until it is quiet again.");
    head("", kinds, &["usfs at most", ""]);
    for (name, title, most) in CPU_SECONDS_A_GIB {
        let cells = kinds.iter().map(|kind| {
            let both = of(name, *kind, false).zip(of(name, *kind, true));
            both.map_or("-".into(), |(during, all)| format!("{during:.2} ({all:.2})"))
        });
        let cells: Vec<_> = cells.collect();
        let kept = of(name, Kind::Usfs, false).is_none_or(|seconds| seconds <= most);
        println!("| {title} | {} | {most} | {} |", cells.join(" | "), mark(kept));
    }
}

/// The bytes stored for each byte of the files: `factors` has a line for each kind of files, with its
/// title and the most that is wanted.
pub(crate) fn space(factors: &Factors, kinds: &[Kind]) {
    println!("\nBytes the stores occupy for each byte of the files.");
    head("", kinds, &["usfs at most", ""]);
    for (title, most, factors) in factors {
        let cells = kinds.iter().map(|kind| match factors.get(kind) {
            Some(factor) => format!("{factor:.3}"),
            None => "-".into(),
        });
        let cells: Vec<_> = cells.collect();
        let kept = factors.get(&Kind::Usfs).is_none_or(|factor| factor <= most);
        println!("| {title} | {} | {most} | {} |", cells.join(" | "), mark(kept));
    }
}

/// What usfs does with two of six providers dead: title, healthy and degraded MiB/s.
pub(crate) fn degraded(lines: &[(&str, Vec<Sample>, Vec<Sample>)], wanted: f64) {
    println!("\nusfs with two of six providers killed, MiB/s.");
    println!("\n| | healthy | degraded | ratio | wanted | |");
    println!("|---|--:|--:|--:|--:|---|");
    for (title, healthy, degraded) in lines {
        let rate = |samples: &[Sample]| {
            median(samples.iter().map(|sample| Unit::Rate("MiB/s").value(sample)))
        };
        let Some((healthy, degraded)) = rate(healthy).zip(rate(degraded)) else { continue };
        let ratio = degraded / healthy;
        let (healthy, degraded, mark) = (figure(healthy), figure(degraded), mark(ratio >= wanted));
        println!("| {title} | {healthy} | {degraded} | {ratio:.2} | {wanted} | {mark} |");
    }
}
