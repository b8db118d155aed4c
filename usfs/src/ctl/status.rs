//! `usctl status`: one screen, truthfully.

use std::fmt::Write as _;
use std::io::{IsTerminal, Write as _};
use std::process::ExitCode;
use std::time::Duration;

use us_core::daemon::size::{Size, human_duration};
use us_proto::v1;

use super::act::repair_line;
use super::connect::{Admin, Target, connect};
use super::json::{Pids, health_word};
use super::{EXIT_UNREACHABLE, JsonArgs, json, table};
use crate::places::{self, UpRecord};

/// Columns of the longest bar.
const BAR_COLUMNS: u64 = 30;

/// Flags of `usctl status`.
#[derive(Debug, clap::Args)]
pub struct StatusArgs {
    #[command(flatten)]
    json: JsonArgs,
    /// Show it again and again, every SECONDS
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "2")]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=3600))]
    watch: Option<u64>,
    /// Answer the health as exit code: 0 ok, 1 degraded, 2 unreadable, 3 lost, 4 no answer
    #[arg(long)]
    exit_code: bool,
}

pub(super) async fn run(target: &Target, args: &StatusArgs) -> anyhow::Result<ExitCode> {
    let Some(seconds) = args.watch else {
        let reply = connect(target).await?.status().await?;
        super::print(args.json, &json::status(&reply), || to_text(&reply))?;
        return Ok(if args.exit_code { exit_code(reply.health()) } else { ExitCode::SUCCESS });
    };
    let mut admin: Option<Admin> = None;
    loop {
        let shown = show_once(target, &mut admin, args).await;
        if let Err(error) = shown {
            admin = None;
            println!("{error:#}");
        }
        tokio::time::sleep(Duration::from_secs(seconds)).await;
    }
}

async fn show_once(
    target: &Target,
    admin: &mut Option<Admin>,
    args: &StatusArgs,
) -> anyhow::Result<()> {
    let connected = match admin {
        Some(connected) => connected,
        None => admin.insert(connect(target).await?),
    };
    let reply = connected.status().await?;
    if args.json.json {
        // One object a line, for who reads along.
        println!("{}", json::status(&reply));
        return Ok(());
    }
    let mut out = std::io::stdout().lock();
    if out.is_terminal() {
        write!(out, "\x1b[H\x1b[2J")?;
    }
    writeln!(out, "{}", to_text(&reply))?;
    out.flush()?;
    Ok(())
}

/// The exit code that stands for a health.
fn exit_code(health: v1::Health) -> ExitCode {
    ExitCode::from(match health {
        v1::Health::Ok => 0,
        v1::Health::Degraded => 1,
        v1::Health::Unreadable => 2,
        v1::Health::Lost => 3,
        v1::Health::Unspecified => EXIT_UNREACHABLE,
    })
}

/// The processes of the `usfs up` on this machine, by name.
pub(super) fn local_pids() -> Pids {
    UpRecord::find()
        .and_then(|up| std::fs::read(up.data.join("pids")).ok())
        .and_then(|text| places::parse_pids(&text))
        .unwrap_or_default()
}

fn to_text(reply: &v1::StatusReply) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = write_text(&mut out, reply);
    out
}

fn write_text(out: &mut String, reply: &v1::StatusReply) -> std::fmt::Result {
    writeln!(out, "{}: {}", health_word(reply.health()).to_uppercase(), reply.summary)?;
    if reply.counting {
        writeln!(out, "The directory is still reading its state: the numbers below grow.")?;
    }
    let blocks = reply.blocks.clone().unwrap_or_default();
    writeln!(out)?;
    write_blocks(out, &blocks)?;
    if reply.pending_deletes > 0 {
        writeln!(out, "           {} fragments wait to be deleted", reply.pending_deletes)?;
    }
    writeln!(out, "Repair     {}", repair_line(&reply.repair.unwrap_or_default()))?;
    if reply.braked > 0 {
        let count = reply.braked;
        writeln!(out, "           {count} providers fell silent together: not taken for dead yet")?;
    }
    write_placement(out, &reply.placement.clone().unwrap_or_default())?;
    let (used, capacity) = (Size(reply.used_bytes), Size(reply.capacity_bytes));
    writeln!(out, "Space      {used} used of {capacity} that providers offer, fragments counted")?;
    let journal = reply.journal.clone().unwrap_or_default();
    let copies = directory_copies(&journal, &reply.providers);
    let uptime = human_duration(Duration::from_secs(reply.uptime_s));
    let bytes = Size(journal.bytes);
    writeln!(out, "Directory  {copies}; up {uptime}; journal {bytes}")?;
    writeln!(out, "\n{}", table::providers(&reply.providers, &Pids::new()))?;
    write!(out, "{}", table::volumes(&reply.volumes))?;
    if !reply.sessions.is_empty() {
        write!(out, "\n{}", table::sessions(&reply.sessions))?;
    }
    Ok(())
}

fn write_blocks(out: &mut String, blocks: &v1::BlockSummary) -> std::fmt::Result {
    let (live, stored) = (Size(blocks.live_bytes), Size(blocks.stored_bytes));
    write!(out, "Blocks     {}, holding {live} of data in {stored}", blocks.total)?;
    if blocks.inline > 0 {
        write!(out, "; {} of them kept in the directory", blocks.inline)?;
    }
    writeln!(out)?;
    let largest = blocks.by_redundancy.values().copied().max().unwrap_or(0).max(1);
    let mut rows: Vec<_> = blocks.by_redundancy.iter().collect();
    rows.sort_unstable_by(|a, b| b.0.cmp(a.0));
    for (left, count) in rows {
        let bar = "#".repeat((count * BAR_COLUMNS).div_ceil(largest) as usize);
        let label = match left {
            ..0 => "cannot be read now".to_owned(),
            0 => "readable, no loss to spare".to_owned(),
            1 => "1 loss to spare".to_owned(),
            left => format!("{left} losses to spare"),
        };
        writeln!(out, "           {label:<27}{count:>10}  {bar}")?;
    }
    if blocks.waiting > 0 {
        writeln!(out, "           {} readable when providers return", blocks.waiting)?;
    }
    if blocks.lost > 0 {
        writeln!(out, "           {} lost: fewer fragments exist than it takes", blocks.lost)?;
    }
    let (unsettled, crowded) = (blocks.unsettled, blocks.crowded);
    write!(out, "Unsettled  {unsettled} blocks with fragments still on their way")?;
    if crowded > 0 {
        write!(out, "; {crowded} with fragments that share a provider")?;
    }
    if blocks.damaged_fragments > 0 {
        write!(out, "; {} damaged fragments", blocks.damaged_fragments)?;
    }
    writeln!(out)
}

/// How blocks are spread, where there is something to say.
fn write_placement(out: &mut String, placement: &v1::PlacementStatus) -> std::fmt::Result {
    if placement.degraded {
        writeln!(out, "Placement  degraded: {}", placement.detail)?;
    }
    let (width, metapeers) = (placement.fragments, placement.metapeers);
    let (smallest, largest) = (placement.smallest, placement.largest);
    // Metapeers of one provider each are the providers.
    if metapeers > 0 && largest > 1 {
        writeln!(
            out,
            "Metapeers  {metapeers} of {smallest} to {largest} providers, for blocks of {width} \
             fragments"
        )?;
    }
    Ok(())
}

/// How many copies of the directory's journal there are, and who has the others.
fn directory_copies(journal: &v1::JournalStatus, providers: &[v1::ProviderStatus]) -> String {
    if journal.copies == 0 {
        return "one copy".to_owned();
    }
    let name = |holder: &u32| {
        let known = providers.iter().find(|provider| provider.provider == *holder);
        known.map_or_else(|| format!("provider {holder}"), |provider| provider.name.clone())
    };
    let names: Vec<String> = journal.holders.iter().map(name).collect();
    format!("{} copies (also with {})", journal.copies + 1, names.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_screen_says_what_matters() {
        let provider = |name: &str, state: v1::ProviderState| v1::ProviderStatus {
            name: name.into(),
            state: state.into(),
            capacity_bytes: 10 << 30,
            last_seen_s: 75,
            ..Default::default()
        };
        let reply = v1::StatusReply {
            health: v1::Health::Degraded.into(),
            summary: "Everything is readable; 5 blocks miss a fragment.".into(),
            blocks: Some(v1::BlockSummary {
                total: 25,
                by_redundancy: [(2, 20), (1, 5)].into(),
                unsettled: 3,
                live_bytes: 5 << 20,
                stored_bytes: 6 << 20,
                ..Default::default()
            }),
            providers: vec![
                provider("provider0", v1::ProviderState::Online),
                provider("provider1", v1::ProviderState::Absent),
            ],
            ..Default::default()
        };
        let text = to_text(&reply);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0], "DEGRADED: Everything is readable; 5 blocks miss a fragment.");
        assert!(text.contains("2 losses to spare") && text.contains("1 loss to spare"), "{text}");
        assert!(text.find("2 losses") < text.find("1 loss to"), "the best first");
        assert!(text.contains("one copy") && text.contains("3 blocks with"), "{text}");
        let journal = v1::JournalStatus { copies: 1, holders: vec![0], ..Default::default() };
        let text_with = to_text(&v1::StatusReply { journal: Some(journal), ..reply.clone() });
        assert!(text_with.contains("2 copies (also with provider0)"), "{text_with}");
        assert!(text.contains("absent") && text.contains("1 min 15 s ago"), "{text}");
        assert!(lines.len() < 24, "one screen");
        assert!(!text.contains("Placement") && !text.contains("Metapeers"), "{text}");
        let placement = v1::PlacementStatus {
            degraded: true,
            detail: "one provider holds 2 fragments of a block".into(),
            fragments: 6,
            metapeers: 9,
            smallest: 2,
            largest: 3,
            ..Default::default()
        };
        let text = to_text(&v1::StatusReply { placement: Some(placement), ..reply });
        assert!(text.contains("Placement  degraded: one provider holds 2"), "{text}");
        assert!(text.contains("9 of 2 to 3 providers"), "{text}");
    }

    #[test]
    fn the_exit_code_is_the_health() {
        let code = |health| format!("{:?}", exit_code(health));
        assert_eq!(code(v1::Health::Ok), format!("{:?}", ExitCode::from(0)));
        assert_eq!(code(v1::Health::Degraded), format!("{:?}", ExitCode::from(1)));
        assert_eq!(code(v1::Health::Unreadable), format!("{:?}", ExitCode::from(2)));
        assert_eq!(code(v1::Health::Lost), format!("{:?}", ExitCode::from(3)));
    }
}
