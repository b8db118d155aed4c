//! Rebuilding a directory that has lost its disk: from providers and the recovery key, or from a
//! backup.
//!
//! ```text
//! collect   every provider that answers: its root, its records          (collect.rs)
//! merge     newest root; of the records the prefix without a gap        (merge.rs, pure)
//! build     image -> checkpoint, records -> journal, then one commit    (build.rs)
//!           that makes the state a new incarnation
//! ```
//! The new incarnation gives nothing twice: births, inode numbers, sessions, providers and runs jump.
//! Every provider is suspect until it was asked after all it should have; what lies in its trash and
//! is wanted comes back. Sessions go on only where all that they were told is durable is there.

pub mod build;
pub mod collect;
pub mod merge;

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use us_core::daemon::files::DirLock;
use us_core::tls::{Identity, Role};

use crate::backup::read_backup;
use crate::recovery::RecoveryKit;
use crate::restore::build::{Builder, Rebuilt};
use crate::restore::collect::{Collected, collect};
use crate::restore::merge::{Gap, merge};
use crate::run::{authority_dir, identity_dir, recovery_key};
use crate::store::WriteBatch;

/// Where a state comes from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Source {
    /// Providers: one is enough, it knows of the others.
    Providers(Vec<String>),
    /// A backup's file.
    Backup(PathBuf),
}

/// What is asked for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RestoreOptions {
    /// The data directory to make.
    pub data: PathBuf,
    /// The recovery key's file.
    pub recovery_key: PathBuf,
    /// From where.
    pub source: Source,
    /// Go on although records are known to be missing.
    pub accept_loss: bool,
}

/// What was recovered.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Restored {
    /// The state that was built.
    pub rebuilt: Rebuilt,
    /// Commits up to here came from the image or the backup.
    pub image_seq: u64,
    /// Commits after that came from records.
    pub records: u64,
    /// Providers that answered, and those that did not, with the reason.
    pub reached: Vec<String>,
    /// Those that did not answer.
    pub unreached: Vec<(String, String)>,
    /// Records known to be missing.
    pub gap: Option<Gap>,
}

/// Rebuilds a directory in an empty data directory.
///
/// # Errors
/// When the data directory is not empty, nothing usable is found, records are missing and that was
/// not accepted, or a disk fails. The data directory is empty again then.
pub async fn restore(options: &RestoreOptions) -> anyhow::Result<Restored> {
    let data = &options.data;
    std::fs::create_dir_all(data).with_context(|| format!("making {}", data.display()))?;
    check_empty(data)?;
    let kit = RecoveryKit::load(&options.recovery_key)?;
    let lock = DirLock::take(data)?;
    let restored = restore_into(options, &kit).await;
    if restored.is_err() {
        for name in ["ca", "identity", "store"] {
            let _may_not_be_there = std::fs::remove_dir_all(data.join(name));
        }
    }
    drop(lock);
    if restored.is_err() {
        let _may_not_be_there = std::fs::remove_file(data.join("lock"));
    }
    restored
}

fn check_empty(data: &Path) -> anyhow::Result<()> {
    let mut entries =
        std::fs::read_dir(data).with_context(|| format!("listing {}", data.display()))?;
    if let Some(entry) = entries.next() {
        let name = entry?.file_name();
        bail!(
            "{} is not empty (it holds {}): a restore only fills an empty directory",
            data.display(),
            name.to_string_lossy()
        );
    }
    Ok(())
}

async fn restore_into(options: &RestoreOptions, kit: &RecoveryKit) -> anyhow::Result<Restored> {
    let identity = kit.authority().issue(Role::Directory, "directory")?;
    let restored = match &options.source {
        Source::Providers(addresses) => from_providers(options, kit, &identity, addresses).await?,
        Source::Backup(file) => {
            let (data, file, secret) = (options.data.clone(), file.clone(), kit.to_text());
            let read = move || from_backup(&data, &file, &RecoveryKit::from_text(&secret)?);
            tokio::task::spawn_blocking(read).await??
        }
    };
    kit.authority().save(&authority_dir(&options.data))?;
    kit.save(&recovery_key(&options.data))?;
    // Last: with it the directory is whole.
    identity.save(&identity_dir(&options.data))?;
    Ok(restored)
}

fn from_backup(data: &Path, file: &Path, kit: &RecoveryKit) -> anyhow::Result<Restored> {
    let input = std::fs::File::open(file).with_context(|| format!("opening {}", file.display()))?;
    let mut builder = Builder::new(data)?;
    let range = read_backup(std::io::BufReader::new(input), kit, |batch: WriteBatch| {
        builder.image(batch).map_err(anyhow::Error::from)
    })?;
    let rebuilt = builder.finish_backup(range.last_seq, *kit.cluster().as_bytes())?;
    Ok(Restored {
        rebuilt,
        image_seq: range.last_seq,
        records: 0,
        reached: Vec::new(),
        unreached: Vec::new(),
        gap: None,
    })
}

async fn from_providers(
    options: &RestoreOptions,
    kit: &RecoveryKit,
    identity: &Identity,
    addresses: &[String],
) -> anyhow::Result<Restored> {
    let Collected { manifest, runs, reached, unreached } =
        collect(kit, identity, addresses).await?;
    let covers = manifest.covers_seq;
    let merged = merge(runs, covers);
    if let Some(gap) = merged.gap
        && !options.accept_loss
    {
        bail!(
            "{gap}; {}. Nothing was restored. Bring more providers back and try again, or restore \
             what is there with --accept-loss",
            spoken(&reached, &unreached)
        );
    }
    if covers == 0 && merged.records.is_empty() {
        bail!(
            "the newest root refers to no image, and no provider that answered has records of the \
             journal; {}",
            spoken(&reached, &unreached)
        );
    }
    let mut builder = Builder::new(&options.data)?;
    let addresses = build::addresses(&manifest, &merged.records)?;
    build::read_image(kit, identity, &manifest, addresses, &mut builder).await?;
    let records = merged.records.len() as u64;
    let lossy = merged.gap.is_some();
    let rebuilt = tokio::task::spawn_blocking(move || {
        builder.finish_records(&manifest, merged.records, lossy)
    })
    .await??;
    Ok(Restored { rebuilt, image_seq: covers, records, reached, unreached, gap: merged.gap })
}

/// Who answered, for people.
pub fn spoken(reached: &[String], unreached: &[(String, String)]) -> String {
    let mut text =
        format!("{} of {} providers answered", reached.len(), reached.len() + unreached.len());
    for (address, why) in unreached {
        text.push_str(&format!("; {address} did not: {why}"));
    }
    text
}

#[cfg(test)]
mod tests;
