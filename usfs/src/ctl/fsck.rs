//! `usctl fsck`: is what the directory says true, and is anything there that nobody needs.
//!
//! Exit code, as fsck(8) means it, a sum: 0 all is as it should be; 1 something was wrong, and is
//! mended or given to repair; 4 something is left as it was; 8 not everything could be looked at.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::IsTerminal;
use std::process::ExitCode;

use serde_json::{Value, json};
use us_proto::v1::fsck_reply::Event;
use us_proto::v1::{self, FsckFate, FsckKind};

use super::JsonArgs;
use super::connect::{Target, connect};
use super::json::hex;

/// Mended, or given to repair.
const EXIT_MENDED: u8 = 1;
/// Left as it was.
const EXIT_LEFT: u8 = 4;
/// Not everything could be looked at.
const EXIT_PARTIAL: u8 = 8;

/// Flags of `usctl fsck`.
#[derive(Debug, clap::Args)]
pub struct FsckArgs {
    /// Mend what can be: missing fragments are made again, what nothing names goes to the trash
    #[arg(long)]
    repair: bool,
    /// Findings of each kind that are shown one by one; all are counted
    #[arg(long, value_name = "N", default_value_t = 20)]
    show: u32,
    #[command(flatten)]
    json: JsonArgs,
}

pub(super) async fn run(target: &Target, args: &FsckArgs) -> ExitCode {
    match check(target, args).await {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("usctl: fsck: {error:#}");
            ExitCode::from(EXIT_PARTIAL)
        }
    }
}

async fn check(target: &Target, args: &FsckArgs) -> anyhow::Result<u8> {
    let mut admin = connect(target).await?;
    let request = v1::FsckRequest { repair: args.repair, findings_max: args.show };
    let mut stream = admin.fsck(request).await?;
    let mut findings = Vec::new();
    let mut summary = None;
    let is_shown = std::io::stderr().is_terminal() && !args.json.json;
    while let Some(event) = stream.next().await? {
        match event {
            Event::Progress(at) if is_shown => {
                eprint!("\r\x1b[K{} {}: {}", at.phase, at.subject, at.done);
            }
            Event::Progress(_) => {}
            Event::Finding(finding) if args.json.json => findings.push(finding_json(&finding)),
            Event::Finding(finding) => {
                if is_shown {
                    eprint!("\r\x1b[K");
                }
                println!("{}", finding_text(&finding));
            }
            Event::Summary(last) => summary = Some(last),
        }
    }
    if is_shown {
        eprint!("\r\x1b[K");
    }
    let summary = summary.ok_or_else(|| anyhow::anyhow!("the check ended before its end"))?;
    let code = exit_code(&summary);
    let value = summary_json(&summary, findings, code);
    super::print(args.json, &value, || summary_text(&summary, args.repair))?;
    Ok(code)
}

fn kind_word(kind: FsckKind) -> &'static str {
    match kind {
        FsckKind::Unspecified => "unknown",
        FsckKind::DanglingExtent => "dangling-extent",
        FsckKind::WrongReference => "wrong-reference",
        FsckKind::WrongCount => "wrong-count",
        FsckKind::UnreferencedBlock => "unreferenced-block",
        FsckKind::WrongHolding => "wrong-holding",
        FsckKind::MissingFragment => "missing-fragment",
        FsckKind::OrphanFragment => "orphan-fragment",
        FsckKind::StrayFragment => "stray-fragment",
        FsckKind::ProviderNotAsked => "provider-not-asked",
        FsckKind::LostBlock => "lost-block",
        FsckKind::WrongUsage => "wrong-usage",
    }
}

/// What a number of them are, for people.
fn kind_text(kind: FsckKind) -> &'static str {
    match kind {
        FsckKind::Unspecified => "findings of a kind this usctl does not know",
        FsckKind::DanglingExtent => "pieces of files in blocks that are not there",
        FsckKind::WrongReference => "maps and blocks that disagree",
        FsckKind::WrongCount => "blocks whose counts are wrong",
        FsckKind::UnreferencedBlock => "blocks that no file refers to",
        FsckKind::WrongHolding => "blocks listed wrongly for a provider",
        FsckKind::MissingFragment => "fragments that are not where they should be",
        FsckKind::OrphanFragment => "fragments that nothing names",
        FsckKind::StrayFragment => "fragments that lie elsewhere than their block knows",
        FsckKind::ProviderNotAsked => "providers that could not be asked",
        FsckKind::LostBlock => "reports of lost blocks",
        FsckKind::WrongUsage => "volumes whose usage is counted wrongly",
    }
}

fn fate_word(fate: FsckFate) -> &'static str {
    match fate {
        FsckFate::Unspecified | FsckFate::Left => "left",
        FsckFate::Mended => "mended",
        FsckFate::Fed => "given to repair",
    }
}

fn finding_text(finding: &v1::FsckFinding) -> String {
    let mut line = kind_word(finding.kind()).to_owned();
    // Writing to a String cannot fail.
    if !finding.block.is_empty() {
        let _ = write!(line, " block {}", hex(&finding.block));
    }
    if matches!(
        finding.kind(),
        FsckKind::MissingFragment | FsckKind::OrphanFragment | FsckKind::StrayFragment
    ) {
        let _ = write!(line, "/{}", finding.index);
    }
    if finding.ino > 0 {
        let _ = write!(line, " inode {}", finding.ino);
    }
    if finding.provider > 0 {
        let _ = write!(line, " provider {}", finding.provider);
    }
    let _ = write!(line, ": {} ({})", finding.detail, fate_word(finding.fate()));
    line
}

fn finding_json(finding: &v1::FsckFinding) -> Value {
    json!({
        "kind": kind_word(finding.kind()),
        "fate": fate_word(finding.fate()),
        "volume": hex(&finding.volume),
        "block": hex(&finding.block),
        "ino": finding.ino,
        "provider": finding.provider,
        "index": finding.index,
        "detail": finding.detail,
    })
}

/// The exit code that stands for what was found.
fn exit_code(summary: &v1::FsckSummary) -> u8 {
    summary.tallies.iter().fold(0, |code, tally| {
        let left = match tally.kind() {
            FsckKind::ProviderNotAsked => EXIT_PARTIAL,
            _ => EXIT_LEFT,
        };
        code | if tally.left > 0 { left } else { 0 }
            | if tally.mended + tally.fed > 0 { EXIT_MENDED } else { 0 }
    })
}

fn summary_json(summary: &v1::FsckSummary, findings: Vec<Value>, code: u8) -> Value {
    let tally = |tally: &v1::FsckTally| {
        let counts = json!({"left": tally.left, "mended": tally.mended, "fed": tally.fed});
        (kind_word(tally.kind()), counts)
    };
    let found: BTreeMap<&str, Value> = summary.tallies.iter().map(tally).collect();
    json!({
        "exit_code": code,
        "clean": code == 0,
        "found": found,
        "findings": findings,
        "chunks": summary.chunks,
        "extents": summary.extents,
        "blocks": summary.blocks,
        "holdings": summary.holdings,
        "providers": summary.providers,
        "fragments": summary.fragments,
        "trashed": summary.trashed,
        "young": summary.young,
        "dying": summary.dying,
        "spared": summary.spared,
        "busy": summary.busy,
    })
}

fn summary_text(summary: &v1::FsckSummary, repair: bool) -> String {
    let mut out = format!(
        "{} extents, {} blocks; {} fragments at {} providers, {} more in their trash\n",
        summary.extents, summary.blocks, summary.fragments, summary.providers, summary.trashed
    );
    let asides = [
        (summary.young, "may still be committed"),
        (summary.dying, "wait to be deleted"),
        (summary.busy, "are of blocks under repair"),
        (summary.spared, "are of a time this directory does not remember, and stay"),
    ];
    for (count, text) in asides.into_iter().filter(|(count, _)| *count > 0) {
        let _ = writeln!(out, "{count} unnamed fragments {text}");
    }
    for tally in &summary.tallies {
        let (left, mended, fed) = (tally.left, tally.mended, tally.fed);
        let total = left + mended + fed;
        let _ = write!(out, "{total} {}:", kind_text(tally.kind()));
        let fates = [(mended, "mended"), (fed, "given to repair"), (left, "left")];
        let fates = fates.iter().filter(|(count, _)| *count > 0);
        let fates: Vec<String> = fates.map(|(count, word)| format!(" {count} {word}")).collect();
        let _ = writeln!(out, "{}", fates.join(","));
    }
    match exit_code(summary) {
        0 => out.push_str("everything is as it should be\n"),
        code if code & EXIT_LEFT > 0 && !repair => {
            out.push_str("nothing was changed; `usctl fsck --repair` mends what can be\n");
        }
        _ => {}
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally(kind: FsckKind, left: u64, mended: u64, fed: u64) -> v1::FsckTally {
        v1::FsckTally { kind: kind.into(), left, mended, fed }
    }

    #[test]
    fn the_exit_code_is_a_sum() {
        let code = |tallies| exit_code(&v1::FsckSummary { tallies, ..Default::default() });
        assert_eq!(code(vec![]), 0);
        assert_eq!(code(vec![tally(FsckKind::MissingFragment, 0, 0, 3)]), 1);
        assert_eq!(code(vec![tally(FsckKind::OrphanFragment, 2, 0, 0)]), 4);
        let unasked = tally(FsckKind::ProviderNotAsked, 1, 0, 0);
        assert_eq!(code(vec![unasked]), 8);
        assert_eq!(code(vec![unasked, tally(FsckKind::WrongHolding, 1, 1, 0)]), 13);
    }

    #[test]
    fn findings_are_told_and_counted() {
        let finding = v1::FsckFinding {
            kind: FsckKind::MissingFragment.into(),
            fate: FsckFate::Fed.into(),
            block: vec![0xab; 16].into(),
            provider: 7,
            index: 3,
            detail: "it does not have it".into(),
            ..Default::default()
        };
        let line = finding_text(&finding);
        assert!(line.starts_with("missing-fragment block abab"), "{line}");
        assert!(line.ends_with("/3 provider 7: it does not have it (given to repair)"), "{line}");
        let tallies = vec![tally(FsckKind::MissingFragment, 0, 0, 3)];
        let summary = v1::FsckSummary { tallies, young: 5, ..Default::default() };
        let text = summary_text(&summary, true);
        assert!(text.contains("3 fragments that are not where they should be: 3 given"), "{text}");
        assert!(text.contains("5 unnamed fragments may still be committed"), "{text}");
        let clean = summary_text(&v1::FsckSummary::default(), false);
        assert!(clean.contains("everything is as it should be"), "{clean}");
        let value = summary_json(&summary, vec![finding_json(&finding)], 1);
        assert_eq!(value["found"]["missing-fragment"]["fed"], 3);
    }
}
