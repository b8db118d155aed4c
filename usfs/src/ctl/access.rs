//! Who may use a volume: give, take, show.

use std::fmt::Write as _;

use anyhow::{anyhow, bail};
use us_proto::v1::{self, AccessLevel};

use super::connect::{Target, connect};
use super::{JsonArgs, Senseless, json, print, table};

/// `usctl volume allow`.
#[derive(Debug, clap::Args)]
pub struct AllowArgs {
    /// The volume
    volume: String,
    /// The client: its key's hash in hexadecimal, or how it begins; a mount without access prints it
    client: String,
    /// It may only read
    #[arg(long)]
    read_only: bool,
    #[command(flatten)]
    json: JsonArgs,
}

/// `usctl volume deny`.
#[derive(Debug, clap::Args)]
pub struct DenyArgs {
    /// The volume
    volume: String,
    /// The client: its key's hash in hexadecimal, or how it begins
    client: String,
    /// Yes, end its mounts; what they have not made durable stays on that machine, in a rescue file
    #[arg(long)]
    yes: bool,
    #[command(flatten)]
    json: JsonArgs,
}

/// `usctl volume show`.
#[derive(Debug, clap::Args)]
pub struct ShowArgs {
    /// The volume
    volume: String,
    #[command(flatten)]
    json: JsonArgs,
}

pub(super) async fn allow(target: &Target, args: AllowArgs) -> anyhow::Result<()> {
    let level = if args.read_only { AccessLevel::Read } else { AccessLevel::Write };
    set(target, args.volume, args.client, level, args.json).await
}

pub(super) async fn deny(target: &Target, args: DenyArgs) -> anyhow::Result<()> {
    if !args.yes {
        bail!(
            "the mounts of client {} on volume {} end at once: say --yes if they are to",
            args.client,
            args.volume
        );
    }
    set(target, args.volume, args.client, AccessLevel::None, args.json).await
}

async fn set(
    target: &Target,
    name: String,
    client: String,
    level: AccessLevel,
    json: JsonArgs,
) -> anyhow::Result<()> {
    let request = v1::SetAccessRequest { name, client, level: level.into() };
    let info = connect(target).await?.set_access(request).await?;
    print(json, &json::volume(&info), || lines(&info))
}

pub(super) async fn show(target: &Target, args: &ShowArgs) -> anyhow::Result<()> {
    let volumes = connect(target).await?.list_volumes().await?;
    let Some(info) = volumes.iter().find(|volume| volume.name == args.volume) else {
        let wanted = &args.volume;
        let none = anyhow!("there is no volume {wanted:?}; `usctl volume list` lists them");
        return Err(Senseless(none).into());
    };
    let text = || table::volumes(std::slice::from_ref(info)) + &lines(info);
    print(args.json, &json::volume(info), text)
}

/// Who may use a volume, a line each.
fn lines(info: &v1::VolumeInfo) -> String {
    let name = &info.name;
    if !info.closed {
        return format!("Volume {name} is open to every client of the cluster.\n");
    }
    if info.access.is_empty() {
        return format!("Volume {name} is closed; no client may use it.\n");
    }
    let mut text = format!("Volume {name} is closed; these clients may use it:\n");
    for client in &info.access {
        let what = if client.read_only { "reads" } else { "reads and writes" };
        // Text grows without failing.
        let _ = writeln!(text, "  {}  {what}", json::hex(&client.key_hash));
    }
    text
}

/// How many may use a volume, in a word.
pub(super) fn word(info: &v1::VolumeInfo) -> String {
    match info.access.len() {
        _ if !info.closed => "everyone".to_owned(),
        0 => "nobody".to_owned(),
        1 => "1 client".to_owned(),
        clients => format!("{clients} clients"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_said_in_words() {
        let open = v1::VolumeInfo { name: "disk".to_owned(), ..Default::default() };
        assert_eq!(lines(&open), "Volume disk is open to every client of the cluster.\n");
        let closed = v1::VolumeInfo { closed: true, ..open.clone() };
        assert_eq!((word(&open), word(&closed)), ("everyone".to_owned(), "nobody".to_owned()));
        let access = vec![v1::VolumeAccess { key_hash: vec![0xab; 2].into(), read_only: true }];
        let one = v1::VolumeInfo { access, ..closed };
        assert!(lines(&one).ends_with("use it:\n  abab  reads\n"), "{}", lines(&one));
        assert_eq!(word(&one), "1 client");
    }
}
