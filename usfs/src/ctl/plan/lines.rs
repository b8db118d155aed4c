//! `usctl plan lines`: the pseudo-affine lines over so many peers (or metapeers). Asks nobody.

use std::io::{self, Write};

use anyhow::Context as _;
use serde_json::{Value, json};
use us_core::geometry::FRAGMENTS_MAX;
use us_core::placement::lines::{Lines, Rule, lines_bound};

use crate::ctl::JsonArgs;

/// The most peers there can be lines over.
const PEERS_MAX: i64 = 1 << 17;

/// Which moduli lines may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum RuleArg {
    /// The greatest prime from the fragments on: the rule of the published tables
    Slide,
    /// The greatest number without a small factor: never fewer lines; what the directory uses
    Modulus,
}

/// Flags of `usctl plan lines`.
#[derive(Debug, clap::Args)]
pub struct LinesArgs {
    /// Peers, or metapeers, that the lines run over
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=PEERS_MAX))]
    peers: u32,
    /// Fragments a block: places on a line
    #[arg(long, value_name = "F")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=FRAGMENTS_MAX as i64))]
    fragments: u32,
    /// Which moduli the lines may use
    #[arg(long, value_enum, default_value = "modulus")]
    rule: RuleArg,
    /// Print no more lines than these
    #[arg(long, value_name = "LINES", default_value_t = 1000)]
    limit: u64,
    #[command(flatten)]
    json: JsonArgs,
}

pub(in crate::ctl) fn lines(args: &LinesArgs) -> anyhow::Result<()> {
    let mut out = io::BufWriter::new(io::stdout().lock());
    let written = write(&mut out, args).and_then(|()| out.flush());
    match written {
        // `usctl … | head` is no error.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other.context("print"),
    }
}

/// Writes line by line: a family can be larger than memory.
fn write(out: &mut impl Write, args: &LinesArgs) -> io::Result<()> {
    let (peers, fragments) = (args.peers as usize, args.fragments as usize);
    let rule = match args.rule {
        RuleArg::Slide => Rule::Slide,
        RuleArg::Modulus => Rule::Modulus,
    };
    let family = Lines::new(peers, fragments, rule);
    let (count, bound) = (family.count(), lines_bound(peers, fragments));
    let shown = count.min(args.limit);
    // Peers are counted from 1, as the published tables do.
    let line = |k: u64| -> Vec<usize> {
        family.line(k).unwrap_or_default().iter().map(|peer| peer + 1).collect()
    };
    if args.json.json {
        let head =
            json!({ "peers": peers, "fragments": fragments, "count": count, "bound": bound });
        let Value::Object(head) = head else { return Ok(()) };
        writeln!(out, "{{")?;
        for (name, value) in &head {
            writeln!(out, "  \"{name}\": {value},")?;
        }
        writeln!(out, "  \"lines\": [")?;
        for k in 0..shown {
            let comma = if k + 1 < shown { "," } else { "" };
            writeln!(out, "    {}{comma}", json!(line(k)))?;
        }
        return writeln!(out, "  ]\n}}");
    }
    writeln!(
        out,
        "{count} lines of {fragments} over {peers} peers; no family has more than {bound}"
    )?;
    if peers < fragments * fragments && count > 0 {
        writeln!(out, "below {} peers most lines are disjoint groups", fragments * fragments)?;
    }
    for k in 0..shown {
        let line: Vec<String> = line(k).iter().map(usize::to_string).collect();
        writeln!(out, "{}", line.join(" "))?;
    }
    if shown < count {
        writeln!(out, "and {} more (--limit)", count - shown)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(peers: u32, fragments: u32, rule: RuleArg, limit: u64, json: bool) -> String {
        let args = LinesArgs { peers, fragments, rule, limit, json: JsonArgs { json } };
        let mut out = Vec::new();
        write(&mut out, &args).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn the_printed_table_is_printed() {
        let table = text(40, 5, RuleArg::Slide, 1000, false);
        let lines: Vec<&str> = table.lines().collect();
        assert_eq!(lines[0], "55 lines of 5 over 40 peers; no family has more than 72");
        assert_eq!((lines.len(), lines[1], lines[2]), (56, "1 8 15 22 29", "1 9 16 23 30"));
        assert_eq!((lines[8], lines[21]), ("2 8 16 24 32", "3 14 16 25 34"));
    }

    #[test]
    fn a_limit_and_a_collapse_are_said() {
        let table = text(30, 6, RuleArg::Modulus, 2, false);
        assert!(table.contains("below 36 peers") && table.ends_with("more (--limit)\n"), "{table}");
        assert_eq!(text(3, 6, RuleArg::Modulus, 9, false).lines().count(), 1, "no line at all");
    }

    #[test]
    fn json_is_json() {
        for (peers, limit, shown) in [(25, 1000, 30), (25, 4, 4), (25, 0, 0), (4, 9, 0)] {
            let value: Value =
                serde_json::from_str(&text(peers, 5, RuleArg::Modulus, limit, true)).unwrap();
            assert_eq!(value["lines"].as_array().unwrap().len(), shown);
            assert_eq!(value["peers"], peers);
        }
    }
}
