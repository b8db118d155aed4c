//! `usctl trash`: what was removed, had back or removed for ever.
//!
//! The directory tells names sealed; they are opened here, with the key that any mount of the volume gets.
//! What comes back does so through a session of its own, so that every mount sees it.

mod listing;
mod putting_back;
mod session;

use std::time::Duration;

use anyhow::{anyhow, bail};
use serde_json::{Value, json};
use us_core::daemon::size::{Size, human_duration};
use us_core::name::NameKey;
use us_proto::v1;

use super::act::utc_time;
use super::connect::{Admin, Target, connect, resolved};
use super::{JsonArgs, Senseless, table};
use crate::unlock::{SecretArgs, Terminal, unlock};
use listing::{Heard, Item, Listing, plain};
use putting_back::{Back, PuttingBack};
use session::Session;

/// Things purged with one request.
const PURGED_AT_ONCE: usize = 1000;

/// `usctl trash …`
#[derive(Debug, clap::Subcommand)]
pub enum TrashCommand {
    /// List what was removed, the oldest first
    List {
        /// Only of this volume
        volume: Option<String>,
        /// Only what lay at this path or under it
        #[arg(value_name = "PATH")]
        path: Option<String>,
        #[command(flatten)]
        secret: SecretArgs,
        #[command(flatten)]
        json: JsonArgs,
    },
    /// Put back what was removed
    Restore {
        /// The volume
        volume: String,
        /// What, by its number in the list, or by its path: then the newest, and all that lay under it
        #[arg(required = true, value_name = "ID|PATH")]
        what: Vec<String>,
        /// Put it into this folder of the volume, not where it lay
        #[arg(long, value_name = "FOLDER")]
        to: Option<String>,
        #[command(flatten)]
        secret: SecretArgs,
        #[command(flatten)]
        json: JsonArgs,
    },
    /// Remove it for ever
    Purge(PurgeArgs),
}

/// Flags of `usctl trash purge`.
#[derive(Debug, clap::Args)]
#[command(group(clap::ArgGroup::new("which").required(true).multiple(false)))]
pub struct PurgeArgs {
    /// The volume
    volume: String,
    /// What, by its number in the list, or all that lay at a path or under it
    #[arg(value_name = "ID|PATH", group = "which")]
    what: Vec<String>,
    /// Everything
    #[arg(long, group = "which")]
    all: bool,
    /// What was removed more than so many hours ago
    #[arg(long, value_name = "HOURS", group = "which")]
    older_than: Option<u64>,
    /// Yes, for ever
    #[arg(long)]
    yes: bool,
    #[command(flatten)]
    secret: SecretArgs,
    #[command(flatten)]
    json: JsonArgs,
}

pub(super) async fn run(target: &Target, command: TrashCommand) -> anyhow::Result<()> {
    match command {
        TrashCommand::List { volume, path, secret, json } => {
            list(target, volume.as_deref(), path.as_deref(), &secret, json).await
        }
        TrashCommand::Restore { volume, what, to, secret, json } => {
            restore(target, &volume, &what, to.as_deref(), &secret, json).await
        }
        TrashCommand::Purge(args) => purge(target, &args).await,
    }
}

/// A trash with its names opened, and what opens them: of a private volume with its owner's secret, of
/// a managed one with the key that the directory gives.
async fn heard(
    admin: &mut Admin,
    volume: &str,
    secret: &SecretArgs,
) -> anyhow::Result<(NameKey, Listing)> {
    let private = unlock(admin, volume, secret, false, &Terminal).await?;
    let mut heard = Heard::default();
    admin.trash(volume, |reply| heard.take(reply)).await?;
    let names = match &private {
        Some(private) => NameKey::new(&private.key),
        None => heard.names()?,
    };
    let listing = heard.open(&names)?;
    Ok((names, listing))
}

/// A trash without names.
async fn heard_sealed(admin: &mut Admin, volume: &str) -> anyhow::Result<Listing> {
    let mut heard = Heard::default();
    admin.trash(volume, |reply| heard.take(reply)).await?;
    Ok(heard.sealed())
}

async fn list(
    target: &Target,
    volume: Option<&str>,
    path: Option<&str>,
    secret: &SecretArgs,
    json: JsonArgs,
) -> anyhow::Result<()> {
    let mut admin = connect(target).await?;
    let mut volumes = admin.list_volumes().await?;
    if let Some(name) = volume {
        volumes.retain(|known| known.name == name);
        if volumes.is_empty() {
            return Err(Senseless(anyhow!("there is no volume {name:?}")).into());
        }
    }
    let path = plain(path.unwrap_or_default());
    let (mut lines, mut values) = (Vec::new(), Vec::new());
    for known in &volumes {
        if volume.is_none() && known.private && !secret.is_silent() {
            let name = &known.name;
            eprintln!(
                "usctl: volume {name} is private: `usctl trash list {name}` asks for its key"
            );
            continue;
        }
        // Of all volumes a secret is for the private ones.
        let none = SecretArgs::default();
        let secret = if volume.is_none() && !known.private { &none } else { secret };
        let (_, listing) = heard(&mut admin, &known.name, secret).await?;
        let items =
            if path.is_empty() { listing.items.iter().collect() } else { listing.under(&path) };
        for item in items {
            values.push(to_json(known, item));
            lines.push(to_line(known, item));
        }
    }
    super::print(json, &Value::Array(values), || table::trash(lines))
}

/// For how long it can still be had back.
fn left_s(volume: &v1::VolumeInfo, item: &Item) -> u64 {
    (u64::from(volume.trash_hours) * 3600).saturating_sub(item.entry.age_s)
}

fn removed_ms(item: &Item) -> u64 {
    let time = item.entry.removed.unwrap_or_default();
    u64::try_from(time.seconds).unwrap_or_default() * 1000 + u64::from(time.nanos / 1_000_000)
}

fn to_json(volume: &v1::VolumeInfo, item: &Item) -> Value {
    json!({
        "id": item.entry.ino,
        "volume": volume.name,
        "path": item.path.as_ref().map(|path| String::from_utf8_lossy(path)),
        "name": String::from_utf8_lossy(&item.name),
        "directory": item.is_dir(),
        "size": item.entry.size,
        "stored_bytes": item.entry.stored_bytes,
        "mode": format!("{:o}", item.entry.mode),
        "uid": item.entry.uid,
        "removed_unix_ms": removed_ms(item),
        "removed_by_uid": item.entry.removed_uid,
        "age_s": item.entry.age_s,
        "left_s": left_s(volume, item),
    })
}

fn to_line(volume: &v1::VolumeInfo, item: &Item) -> [String; 7] {
    let size = if item.is_dir() { "folder".to_owned() } else { Size(item.entry.size).to_string() };
    [
        item.entry.ino.to_string(),
        volume.name.clone(),
        size,
        utc_time(removed_ms(item)),
        item.entry.removed_uid.map_or_else(|| "?".to_owned(), |uid| uid.to_string()),
        human_duration(Duration::from_secs(left_s(volume, item))),
        item.shown(),
    ]
}

/// What an argument names: something by its number, or a path.
enum Named {
    Id(u64),
    Path(Vec<u8>),
}

fn named(argument: &str) -> Named {
    argument.parse().map_or_else(|_| Named::Path(plain(argument)), Named::Id)
}

fn nothing(argument: &str) -> anyhow::Error {
    Senseless(anyhow!("nothing in the trash is {argument}: `usctl trash list` shows what is"))
        .into()
}

async fn restore(
    target: &Target,
    volume: &str,
    what: &[String],
    to: Option<&str>,
    secret: &SecretArgs,
    json: JsonArgs,
) -> anyhow::Result<()> {
    let mut admin = connect(target).await?;
    let (names, listing) = heard(&mut admin, volume, secret).await?;
    let (mut chosen, mut tops) = (Vec::new(), Vec::new());
    for argument in what {
        match named(argument) {
            Named::Id(ino) => {
                let item = listing.item(ino).ok_or_else(|| nothing(argument))?;
                tops.push(item.entry.dir);
                chosen.push(item);
            }
            Named::Path(path) => {
                let found = listing.newest_under(&path);
                if found.is_empty() {
                    return Err(nothing(argument));
                }
                let itself = found.iter().find(|item| item.path.as_ref() == Some(&path));
                tops.extend(itself.map(|item| item.entry.dir));
                tops.extend(listing.folder_at(&path).filter(|_| itself.is_none()));
                chosen.extend(found);
            }
        }
    }
    let (directory, identity) = resolved(target)?;
    let session = Session::open(directory, identity, volume, names).await?;
    let mut putting_back = PuttingBack::new(session, &listing);
    if let Some(to) = to {
        putting_back.under(&plain(to), &tops).await.map_err(Senseless)?;
    }
    let mut seen = std::collections::HashSet::new();
    chosen.retain(|item| seen.insert(item.entry.ino));
    // Folders first, upper ones before those in them: of two that had one path the newest comes back,
    // and what lay in the other goes there too.
    chosen.sort_by_key(|item| !item.is_dir());
    let mut failed = None;
    for item in chosen {
        if let Err(error) = putting_back.put(item).await {
            failed = Some(error);
            break;
        }
    }
    // What came back before something failed stays.
    let back = putting_back.done().await;
    if let Some(error) = failed {
        return Err(error);
    }
    let back = back?;
    let value = back.iter().map(|b| json!({ "id": b.ino, "from": b.from, "to": b.to })).collect();
    super::print(json, &Value::Array(value), || back.iter().map(back_line).collect())
}

fn back_line(back: &Back) -> String {
    if back.from == back.to {
        format!("{} is back\n", back.to)
    } else {
        format!("{} is back as {}\n", back.from, back.to)
    }
}

async fn purge(target: &Target, args: &PurgeArgs) -> anyhow::Result<()> {
    let mut admin = connect(target).await?;
    let by_name = |what: &String| matches!(named(what), Named::Path(_));
    let listing = match args.what.iter().any(by_name) || args.secret.is_given() {
        true => heard(&mut admin, &args.volume, &args.secret).await?.1,
        // Numbers and ages need no names.
        false => heard_sealed(&mut admin, &args.volume).await?,
    };
    let mut chosen: Vec<&Item> = Vec::new();
    for argument in &args.what {
        let found = match named(argument) {
            Named::Id(ino) => listing.item(ino).into_iter().collect(),
            Named::Path(path) => listing.under(&path),
        };
        if found.is_empty() {
            return Err(nothing(argument));
        }
        chosen.extend(found);
    }
    let old = |item: &&Item| {
        let hours = args.older_than.map(|hours| hours.saturating_mul(3600));
        args.all || hours.is_some_and(|seconds| item.entry.age_s > seconds)
    };
    chosen.extend(listing.items.iter().filter(old));
    if !args.yes {
        bail!("{} things would be gone for ever: say --yes if they are to be", chosen.len());
    }
    let (mut files, mut bytes) = (0, 0);
    for page in chosen.chunks(PURGED_AT_ONCE) {
        let inos = page.iter().map(|item| item.entry.ino).collect();
        let request = v1::PurgeTrashRequest { volume: args.volume.clone(), inos };
        let purged = admin.purge_trash(request).await?;
        files += purged.files;
        bytes += purged.stored_bytes;
    }
    let value = json!({ "files": files, "stored_bytes": bytes });
    super::print(args.json, &value, || {
        format!("{files} things are gone for ever: {} come free\n", Size(bytes))
    })
}
