//! What `usctl` does to a cluster: repair, scrub, drain, giving a provider up; and what it foretells
//! and tells: what-if, events.

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{anyhow, bail};
use serde_json::{Value, json};
use us_core::daemon::size::{Size, human_duration};
use us_proto::v1;

use super::connect::{Admin, Target, connect};
use super::table::provider_name;
use super::{JsonArgs, Senseless};

/// How often a command that waits looks again.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// How often `events --follow` asks.
const FOLLOW_EVERY: Duration = Duration::from_secs(1);
/// Files `what-if` names.
const FILES_MAX: u32 = 100;

/// A provider as people name it: its number, or its name.
pub(super) async fn provider_number(admin: &mut Admin, wanted: &str) -> anyhow::Result<u32> {
    let providers = admin.status().await?.providers;
    let found: Vec<&v1::ProviderStatus> = providers
        .iter()
        .filter(|known| known.name == wanted || known.provider.to_string() == wanted)
        .collect();
    match found[..] {
        [one] => Ok(one.provider),
        [] => {
            Err(Senseless(anyhow!("there is no provider {wanted:?}; `usctl providers` lists them"))
                .into())
        }
        _ => Err(Senseless(anyhow!("{wanted:?} can mean more than one provider: give its number"))
            .into()),
    }
}

/// One line about what repair is doing.
pub(super) fn repair_line(repair: &v1::RepairStatus) -> String {
    let mut line = match repair.queued + repair.running {
        0 => "nothing to do".to_owned(),
        left => format!("{left} blocks to repair, {} of them now", repair.running),
    };
    // Writing to a String cannot fail.
    if repair.urgent > 0 {
        let _ = write!(line, "; {} urgent", repair.urgent);
    }
    if repair.bytes_per_s > 0 && repair.queued + repair.running > 0 {
        let left = human_duration(Duration::from_secs(repair.left_s));
        let _ = write!(line, "; {}/s, {left} left", Size(repair.bytes_per_s));
    }
    if repair.waiting > 0 {
        let _ = write!(line, "; {} wait for providers to return", repair.waiting);
    }
    if repair.scanning {
        line.push_str("; still looking");
    }
    line
}

/// What `--json` says of repair.
pub(super) fn repair_json(repair: &v1::RepairStatus) -> Value {
    json!({
        "queued": repair.queued,
        "urgent": repair.urgent,
        "running": repair.running,
        "waiting": repair.waiting,
        "scanning": repair.scanning,
        "done_blocks": repair.done_blocks,
        "done_bytes": repair.done_bytes,
        "failed": repair.failed,
        "bytes_per_s": repair.bytes_per_s,
        "left_s": repair.left_s,
    })
}

/// Flags of `usctl repair`.
#[derive(Debug, clap::Args)]
pub struct RepairArgs {
    /// Wait until there is nothing left to repair
    #[arg(long)]
    wait: bool,
    #[command(flatten)]
    json: JsonArgs,
}

pub(super) async fn repair(target: &Target, args: &RepairArgs) -> anyhow::Result<()> {
    let mut admin = connect(target).await?;
    let mut repair = admin.repair().await?;
    let mut shown = String::new();
    while args.wait && (repair.scanning || repair.queued + repair.running > 0) {
        let line = repair_line(&repair);
        if !args.json.json && line != shown {
            super::say(&line)?;
            shown = line;
        }
        tokio::time::sleep(LOOK_EVERY).await;
        repair = admin.status().await?.repair.unwrap_or_default();
    }
    super::print(args.json, &repair_json(&repair), || format!("{}\n", repair_line(&repair)))
}

/// Flags of `usctl scrub`.
#[derive(Debug, clap::Args)]
pub struct ScrubArgs {
    /// Only this one, by number or name
    provider: Option<String>,
}

pub(super) async fn scrub(target: &Target, args: &ScrubArgs) -> anyhow::Result<()> {
    let mut admin = connect(target).await?;
    let provider = match &args.provider {
        Some(provider) => provider_number(&mut admin, provider).await?,
        None => 0,
    };
    let told = admin.scrub(provider).await?;
    super::say(&format!(
        "{told} providers read all they hold now; `usctl status` shows what they find"
    ))?;
    Ok(())
}

/// Flags of `usctl drain`.
#[derive(Debug, clap::Args)]
pub struct DrainArgs {
    /// Which one, by number or name
    provider: String,
    /// End it: the provider takes new fragments again
    #[arg(long)]
    undo: bool,
    /// Wait until nothing is left there
    #[arg(long, conflicts_with = "undo")]
    wait: bool,
}

pub(super) async fn drain(target: &Target, args: &DrainArgs) -> anyhow::Result<()> {
    let mut admin = connect(target).await?;
    let provider = provider_number(&mut admin, &args.provider).await?;
    let fragments = admin.drain(provider, args.undo).await?;
    if args.undo {
        super::say(&format!("provider {provider} takes new fragments again"))?;
        return Ok(());
    }
    super::say(&format!(
        "provider {provider} takes nothing new; {fragments} fragments are to be moved"
    ))?;
    if args.wait { wait_drained(&mut admin, provider, fragments).await } else { Ok(()) }
}

/// Waits until nothing is left at a provider.
async fn wait_drained(admin: &mut Admin, provider: u32, fragments: u64) -> anyhow::Result<()> {
    let mut shown = fragments;
    loop {
        let status = admin.status().await?;
        let found = status.providers.iter().find(|known| known.provider == provider);
        let left = found.map_or(0, |known| known.fragments);
        if left == 0 {
            super::say(&format!("nothing is left at provider {provider}: it can be taken away"))?;
            return Ok(());
        }
        if left != shown {
            let repair = repair_line(&status.repair.unwrap_or_default());
            super::say(&format!("{left} fragments left; {repair}"))?;
            shown = left;
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Flags of `usctl give-up`.
#[derive(Debug, clap::Args)]
pub struct GiveUpArgs {
    /// Which one, by number or name; it must be offline
    provider: String,
    /// Yes, it will not come back
    #[arg(long)]
    yes: bool,
}

pub(super) async fn give_up(target: &Target, args: &GiveUpArgs) -> anyhow::Result<()> {
    let mut admin = connect(target).await?;
    let provider = provider_number(&mut admin, &args.provider).await?;
    if !args.yes {
        bail!(
            "what provider {provider} held is made again elsewhere, and what it has is surplus \
             should it return: say --yes if it will not"
        );
    }
    let fragments = admin.give_up(provider).await?;
    super::say(&format!(
        "provider {provider} is given up: {fragments} fragments are made again elsewhere"
    ))?;
    Ok(())
}

/// Flags of `usctl trust`.
#[derive(Debug, clap::Args)]
pub struct TrustArgs {
    /// Which one, by number or name
    provider: String,
}

pub(super) async fn trust(target: &Target, args: &TrustArgs) -> anyhow::Result<()> {
    let mut admin = connect(target).await?;
    let provider = provider_number(&mut admin, &args.provider).await?;
    let fragments = admin.trust(provider).await?;
    super::say(&format!(
        "provider {provider} has no marks any more: it counts again when it was asked after \
         {fragments} fragments"
    ))?;
    Ok(())
}

/// Flags of `usctl what-if`.
#[derive(Debug, clap::Args)]
pub struct WhatIfArgs {
    /// Providers to imagine gone, by number or name
    #[arg(long, required = true, num_args = 1.., value_name = "PROVIDER")]
    without: Vec<String>,
    #[command(flatten)]
    json: JsonArgs,
}

pub(super) async fn what_if(target: &Target, args: &WhatIfArgs) -> anyhow::Result<()> {
    let mut admin = connect(target).await?;
    let mut without = Vec::with_capacity(args.without.len());
    for name in &args.without {
        without.push(provider_number(&mut admin, name).await?);
    }
    let reply = admin.what_if(without, FILES_MAX).await?;
    super::print(args.json, &what_if_json(&reply), || what_if_text(&reply))
}

fn what_if_json(reply: &v1::WhatIfReply) -> Value {
    let file = |file: &v1::WhatIfFile| {
        json!({
            "volume": file.volume_name,
            "ino": file.ino,
            "unreadable_blocks": file.unreadable_blocks,
        })
    };
    let by_redundancy: serde_json::Map<String, Value> =
        reply.by_redundancy.iter().map(|(left, count)| (left.to_string(), json!(count))).collect();
    json!({
        "total": reply.total,
        "unreadable": reply.unreadable,
        "endangered": reply.endangered,
        "by_redundancy": by_redundancy,
        "files": reply.files.iter().map(file).collect::<Vec<_>>(),
        "more_files": reply.more_files,
    })
}

fn what_if_text(reply: &v1::WhatIfReply) -> String {
    let mut out = format!(
        "of {} blocks {} could not be read, {} could lose no more fragment\n",
        reply.total, reply.unreadable, reply.endangered
    );
    for file in &reply.files {
        // Names are sealed; `find MOUNT -inum N` tells which file it is.
        let (volume, ino, blocks) = (&file.volume_name, file.ino, file.unreadable_blocks);
        let _ = writeln!(out, "  volume {volume}, inode {ino}: {blocks} blocks");
    }
    if reply.more_files {
        out.push_str("  and more files\n");
    }
    if !reply.files.is_empty() {
        out.push_str("(`find MOUNTPOINT -inum N` names a file)\n");
    }
    out
}

/// Flags of `usctl events`.
#[derive(Debug, clap::Args)]
pub struct EventsArgs {
    /// Only so many of the newest
    #[arg(long, value_name = "N", default_value_t = 50)]
    last: u64,
    /// Go on printing what happens
    #[arg(long)]
    follow: bool,
    /// One JSON object a line
    #[arg(long)]
    json: bool,
}

pub(super) async fn events(target: &Target, args: &EventsArgs) -> anyhow::Result<()> {
    let mut admin = connect(target).await?;
    let (mut after, mut last) = (0, args.last);
    loop {
        let events = admin.events(after, last).await?;
        for event in &events {
            after = event.number;
            let text = if args.json { event_json(event).to_string() } else { event_text(event) };
            super::say(&text)?;
        }
        // Later pages go on behind the last event, however many there are.
        last = 0;
        if events.is_empty() {
            if !args.follow {
                return Ok(());
            }
            tokio::time::sleep(FOLLOW_EVERY).await;
        }
    }
}

fn event_json(event: &v1::ClusterEvent) -> Value {
    json!({
        "number": event.number,
        "unix_ms": event.unix_ms,
        "kind": event.kind,
        "provider": event.provider,
        "detail": event.detail,
        "by": event.by,
    })
}

/// A wall time as RFC 3339 writes it, to the second.
pub(super) fn utc_time(unix_ms: u64) -> String {
    let seconds = i64::try_from(unix_ms / 1000).unwrap_or_default();
    let time = time::OffsetDateTime::from_unix_timestamp(seconds);
    let text = time.map(|time| time.format(&time::format_description::well_known::Rfc3339));
    match text {
        Ok(Ok(text)) => text,
        Ok(Err(_)) | Err(_) => format!("{unix_ms} ms"),
    }
}

fn event_text(event: &v1::ClusterEvent) -> String {
    let time = utc_time(event.unix_ms);
    let mut line = format!("{time}  {:<17}", event.kind);
    if event.provider > 0 {
        let _ = write!(line, " provider {}", event.provider);
    }
    if !event.detail.is_empty() {
        let _ = write!(line, " {}", event.detail);
    }
    if !event.by.is_empty() {
        let _ = write!(line, ", by {}", event.by);
    }
    line
}

/// What sleeping, dying, draining and lying add to a provider's note.
pub(super) fn provider_note(provider: &v1::ProviderStatus) -> String {
    let mut notes = Vec::new();
    if provider.distrusted {
        notes.push("DISTRUSTED: what it holds does not count".to_owned());
    }
    if provider.found_wrong > 0 {
        notes.push(format!("claimed {} fragments it had not", provider.found_wrong));
    }
    if provider.draining {
        notes.push(format!("draining, {} left", provider.fragments));
    }
    if provider.back_in_s > 0 && provider.state() != v1::ProviderState::Online {
        let back = human_duration(Duration::from_secs(provider.back_in_s));
        notes.push(format!("expected in {back}"));
    }
    if provider.metapeer > 0 {
        notes.push(format!("metapeer {}", provider.metapeer));
    }
    if provider.damaged > 0 {
        notes.push(format!("{} damaged fragments", provider.damaged));
    }
    if !provider.note.is_empty() {
        notes.push(provider.note.clone());
    }
    notes.join("; ")
}

/// The provider's name with its number, which commands take.
pub(super) fn full_name(provider: &v1::ProviderStatus) -> String {
    if provider.name.is_empty() {
        provider_name(provider)
    } else {
        format!("{} #{}", provider.name, provider.provider)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repair_says_what_is_left_and_for_how_long() {
        let mut repair = v1::RepairStatus::default();
        assert_eq!(repair_line(&repair), "nothing to do");
        repair = v1::RepairStatus {
            queued: 90,
            running: 10,
            urgent: 2,
            waiting: 1,
            bytes_per_s: 4 << 20,
            left_s: 25,
            ..repair
        };
        let line = repair_line(&repair);
        for part in ["100 blocks", "2 urgent", "4.00 MiB/s", "25 s left", "1 wait"] {
            assert!(line.contains(part), "{part}: {line}");
        }
    }

    #[test]
    fn an_event_is_one_line_with_its_time() {
        let event = v1::ClusterEvent {
            number: 7,
            unix_ms: 1_700_000_000_000,
            kind: "provider-dead".to_owned(),
            provider: 3,
            detail: "attic".to_owned(),
            by: "admin ann (0123abcd)".to_owned(),
        };
        let line = event_text(&event);
        let wanted =
            "2023-11-14T22:13:20Z  provider-dead     provider 3 attic, by admin ann (0123abcd)";
        assert_eq!(line, wanted);
        assert_eq!(event_json(&event)["kind"], "provider-dead");
    }

    #[test]
    fn a_sleeper_says_when_it_is_expected() {
        let provider = v1::ProviderStatus {
            state: v1::ProviderState::Dormant.into(),
            back_in_s: 7200,
            draining: true,
            fragments: 5,
            ..Default::default()
        };
        assert_eq!(provider_note(&provider), "draining, 5 left; expected in 2 h");
    }

    #[test]
    fn a_distrusted_provider_is_said_to_be_one() {
        let provider =
            v1::ProviderStatus { found_wrong: 3, distrusted: true, ..Default::default() };
        let wanted = "DISTRUSTED: what it holds does not count; claimed 3 fragments it had not";
        assert_eq!(provider_note(&provider), wanted);
    }
}
