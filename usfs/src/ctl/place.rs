//! `usctl where` and `usctl block`: blocks, their fragments, who holds them, what is missing.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use serde_json::{Value, json};
use us_core::daemon::size::Size;
use us_core::disk::{FragmentBits, durable_after_loss};
use us_core::ids::ProviderId;
use us_proto::v1;

use super::json::{self, hex, state_word};
use super::table::provider_name;
use crate::fuse::kernel;

/// A file on a mounted volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct File {
    pub path: PathBuf,
    pub ino: u64,
    pub directory: String,
    pub volume: String,
}

/// Finds the inode of `path`, and the volume it is on, by the table of mounts.
pub(super) fn find(path: &Path) -> anyhow::Result<File> {
    let absolute = path.canonicalize().with_context(|| format!("no file {}", path.display()))?;
    let mount = kernel::mount_of(&absolute)?;
    let Some(mount) = mount.filter(|mount| mount.kind == kernel::FILE_SYSTEM_TYPE) else {
        bail!("{} is not on a mounted Us volume", path.display());
    };
    let Some((directory, volume)) = mount.source.rsplit_once('/') else {
        bail!("the mount at {} does not say its volume", mount.point.display());
    };
    // What was written a moment ago has no place yet; fsync gives it one. A file we may not open
    // is shown as it is.
    if let Ok(file) = std::fs::File::open(&absolute) {
        let _ = file.sync_all();
    }
    let ino = std::fs::metadata(&absolute)?.ino();
    let (directory, volume) = (directory.to_owned(), volume.to_owned());
    Ok(File { path: absolute, ino, directory, volume })
}

/// How a block stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Standing {
    reachable: usize,
    /// Providers any of which may still go; `None`: it cannot be read now.
    spare: Option<usize>,
}

fn usable(fragment: &v1::WhereFragment) -> bool {
    fragment.durable && !fragment.damaged && fragment.state() == v1::ProviderState::Online
}

fn standing(block: &v1::WhereBlock) -> Standing {
    let (providers, usable): (Vec<ProviderId>, Vec<bool>) = block
        .fragments
        .iter()
        .map(|fragment| (ProviderId(fragment.provider), usable(fragment)))
        .unzip();
    let mut bits = FragmentBits::EMPTY;
    let reachable = usable.iter().enumerate().filter(|(_, usable)| **usable);
    let reachable = reachable.map(|(index, _)| bits.insert(index)).count();
    // The worst to lose are those that hold the most fragments.
    let left = |lost: &usize| durable_after_loss(&providers, &bits, *lost);
    let spare = (0..=providers.len()).take_while(|lost| left(lost) >= block.s as usize).last();
    Standing { reachable, spare }
}

pub(super) fn to_json(file: &File, blocks: &[v1::WhereBlock]) -> Value {
    json!({
        "path": file.path,
        "ino": file.ino,
        "volume": file.volume,
        "directory": file.directory,
        "blocks": blocks.iter().map(json::block).collect::<Vec<_>>(),
    })
}

pub(super) fn to_text(
    file: &File,
    blocks: &[v1::WhereBlock],
    providers: &[v1::ProviderStatus],
) -> String {
    let mut out = String::new();
    let bytes = blocks.iter().flat_map(|block| &block.ranges).map(|range| range.length).sum();
    let spread = blocks.iter().filter(|block| !block.inline);
    let worst = spread.map(|block| standing(block).spare).min();
    let verdict = match worst {
        None if blocks.is_empty() => "nothing of it is stored: it is empty, or a hole".to_owned(),
        None => "all of it is still in the directory".to_owned(),
        Some(None) => "part of it CANNOT BE READ until providers return".to_owned(),
        Some(Some(0)) => "all of it can be read, but no further provider may be lost".to_owned(),
        Some(Some(1)) => "all of it can be read, and one more provider may be lost".to_owned(),
        Some(Some(spare)) => {
            format!("all of it can be read, and any {spare} more providers may be lost")
        }
    };
    let count = match blocks.len() {
        1 => "1 block".to_owned(),
        count => format!("{count} blocks"),
    };
    let _ = writeln!(
        out,
        "{} (inode {} of {}): {} in {count}; {verdict}.",
        file.path.display(),
        file.ino,
        file.volume,
        Size(bytes)
    );
    let names = names(providers);
    let mut ordered: Vec<_> = blocks.iter().collect();
    ordered.sort_by_key(|block| block.ranges.first().map_or(u64::MAX, |range| range.offset));
    for block in ordered {
        let _ = writeln!(out);
        write_block(&mut out, block, &names);
    }
    out
}

pub(super) fn block_text(block: &v1::WhereBlock, providers: &[v1::ProviderStatus]) -> String {
    let mut out = String::new();
    write_block(&mut out, block, &names(providers));
    out
}

fn names(providers: &[v1::ProviderStatus]) -> HashMap<u32, String> {
    providers.iter().map(|provider| (provider.provider, provider_name(provider))).collect()
}

fn write_block(out: &mut String, block: &v1::WhereBlock, names: &HashMap<u32, String>) {
    let Standing { reachable, spare } = standing(block);
    let (id, s, r) = (hex(&block.block), block.s, block.r);
    let plaintext = Size(u64::from(block.plaintext_bytes));
    let code = if block.inline { "inline".to_owned() } else { format!("{s}+{r}") };
    let _ = writeln!(out, "block {id}  {code}  {plaintext}, {} live", Size(block.live_bytes));
    for range in &block.ranges {
        let end = range.offset + range.length;
        let _ = writeln!(out, "  bytes {}..{end} of the file", range.offset);
    }
    if block.inline {
        let _ = writeln!(out, "  kept in the directory, until it is packed into a larger block");
        return;
    }
    for fragment in &block.fragments {
        let unnamed = || format!("#{}", fragment.provider);
        let name = names.get(&fragment.provider).cloned().unwrap_or_else(unnamed);
        let kind = if fragment.index < block.s { "data" } else { "parity" };
        let _ = writeln!(out, "  {:>3} {kind:<6} {name:<16} {}", fragment.index, words(fragment));
    }
    let verdict = match spare {
        None => format!("UNREADABLE: {reachable} of the {s} fragments it takes"),
        Some(0) => "readable, no provider to spare".to_owned(),
        Some(1) => "readable, any 1 provider to spare".to_owned(),
        Some(spare) => format!("readable, any {spare} providers to spare"),
    };
    let missing = block.fragments.len().saturating_sub(reachable);
    let _ = match missing {
        0 => writeln!(out, "  {verdict}"),
        missing => writeln!(out, "  {verdict}; missing: {missing}"),
    };
}

fn words(fragment: &v1::WhereFragment) -> String {
    if fragment.damaged {
        return "MISSING: damaged".to_owned();
    }
    match (fragment.state(), fragment.durable) {
        (v1::ProviderState::Online, true) => "here".to_owned(),
        (v1::ProviderState::Online, false) => "on its way".to_owned(),
        (state, _) => format!("MISSING: provider {}", state_word(state)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fragment(index: u32, state: v1::ProviderState, durable: bool) -> v1::WhereFragment {
        let state = state.into();
        v1::WhereFragment { index, provider: index + 1, state, durable, damaged: false }
    }

    #[test]
    fn what_is_missing_is_said() {
        let online = v1::ProviderState::Online;
        let mut fragments: Vec<_> = (0..6).map(|index| fragment(index, online, true)).collect();
        fragments[1] = fragment(1, v1::ProviderState::Absent, true);
        fragments[4].damaged = true;
        let ranges = vec![v1::FileRange { offset: 0, length: 4096, block_offset: 0 }];
        let block = v1::WhereBlock {
            block: vec![0xab; 16].into(),
            s: 4,
            r: 2,
            plaintext_bytes: 4096,
            fragments,
            ranges,
            ..Default::default()
        };
        assert_eq!(standing(&block), Standing { reachable: 4, spare: Some(0) });
        let file = File {
            path: "/mnt/usfs/a".into(),
            ino: 9,
            directory: "h:1".into(),
            volume: "disk".into(),
        };
        let name = v1::ProviderStatus { provider: 1, name: "attic".into(), ..Default::default() };
        let text = to_text(&file, std::slice::from_ref(&block), &[name]);
        assert!(text.contains("4.00 KiB in 1 block; all of it can be read, but no"), "{text}");
        assert!(text.contains("attic") && text.contains("MISSING: provider absent"), "{text}");
        assert!(text.contains("MISSING: damaged") && text.contains("missing: 2"), "{text}");
        assert!(text.contains("bytes 0..4096"), "{text}");
        assert_eq!(to_json(&file, &[block])["blocks"][0]["block"], "ab".repeat(16));
        assert!(to_text(&file, &[], &[]).contains("empty"));
        let inline = v1::WhereBlock { inline: true, s: 1, ..Default::default() };
        assert!(to_text(&file, &[inline], &[]).contains("still in the directory"));
    }

    /// With two fragments on each of three providers it said "any 2 more providers may be lost".
    #[test]
    fn losses_are_counted_in_providers() {
        let online = v1::ProviderState::Online;
        let block = |places: [u32; 6]| {
            let fragments = places.iter().enumerate().map(|(index, provider)| {
                let fragment = fragment(index as u32, online, true);
                v1::WhereFragment { provider: *provider, ..fragment }
            });
            v1::WhereBlock { s: 4, r: 2, fragments: fragments.collect(), ..Default::default() }
        };
        let spare = |places| standing(&block(places)).spare;
        assert_eq!(spare([1, 2, 3, 4, 5, 6]), Some(2));
        assert_eq!(spare([1, 2, 3, 1, 2, 3]), Some(1));
        assert_eq!(spare([1, 1, 1, 2, 2, 2]), Some(0));
        let mut lost = block([1, 2, 3, 4, 5, 6]);
        lost.fragments.iter_mut().take(3).for_each(|fragment| fragment.damaged = true);
        assert_eq!(standing(&lost), Standing { reachable: 3, spare: None });
    }

    #[test]
    fn a_file_elsewhere_is_told_so() {
        let error = find(Path::new("/proc/self/status")).unwrap_err().to_string();
        assert!(error.contains("not on a mounted Us volume"), "{error}");
    }
}
