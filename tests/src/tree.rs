//! File trees: made, copied, compared.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// What a comparison looks at, for one path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node {
    /// A directory with its permission bits.
    Directory(u32),
    /// A file with its permission bits, length and checksum.
    File(u32, u64, u64),
    /// A symbolic link and where it points.
    Link(PathBuf),
}

/// FNV-1a over `bytes`: enough to tell trees apart, and obvious.
pub fn checksum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |sum, byte| {
        (sum ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
    })
}

/// Everything under `root`, by path relative to it.
///
/// # Errors
/// When something under it cannot be read: the error names it.
pub fn scan(root: &Path) -> io::Result<BTreeMap<PathBuf, Node>> {
    let mut nodes = BTreeMap::new();
    let mut pending = vec![root.to_path_buf()];
    while let Some(directory) = pending.pop() {
        let named = |error: io::Error, path: &Path| {
            io::Error::new(error.kind(), format!("{}: {error}", path.display()))
        };
        for entry in fs::read_dir(&directory).map_err(|error| named(error, &directory))? {
            let path = entry?.path();
            let meta = fs::symlink_metadata(&path).map_err(|error| named(error, &path))?;
            let mode = meta.permissions().mode() & 0o7777;
            let node = if meta.is_dir() {
                pending.push(path.clone());
                Node::Directory(mode)
            } else if meta.is_symlink() {
                Node::Link(fs::read_link(&path).map_err(|error| named(error, &path))?)
            } else {
                let bytes = fs::read(&path).map_err(|error| named(error, &path))?;
                assert_eq!(bytes.len() as u64, meta.size(), "{}: size and bytes", path.display());
                Node::File(mode, meta.size(), checksum(&bytes))
            };
            let relative = path.strip_prefix(root).expect("found under root").to_path_buf();
            nodes.insert(relative, node);
        }
    }
    Ok(nodes)
}

/// Fails with the first differences between two trees.
///
/// # Panics
/// When they differ.
pub fn assert_same(left: &Path, right: &Path) {
    let left_nodes = scan(left).expect("the left tree is readable");
    let right_nodes = scan(right).expect("the right tree is readable");
    let different: Vec<_> = left_nodes
        .keys()
        .chain(right_nodes.keys())
        .filter(|path| left_nodes.get(*path) != right_nodes.get(*path))
        .take(10)
        .map(|path| (path, left_nodes.get(path), right_nodes.get(path)))
        .collect();
    assert!(
        different.is_empty(),
        "{} and {} differ: {different:#?}",
        left.display(),
        right.display()
    );
    assert!(!left_nodes.is_empty(), "{}: nothing to compare", left.display());
}

/// `len` bytes that only `seed` decides, not compressible.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// A real source tree to work with: the Rust library's sources where rustup has them, else the
/// sources of the crates this workspace was built from; at least 2,000 files, copied to `target`.
///
/// # Panics
/// When there are not enough.
pub fn copy_real_sources(target: &Path) {
    const FILES: usize = 2_200;
    const FILE_BYTES_MAX: u64 = 2 << 20;
    let mut pending = source_folders();
    let mut copied = 0;
    while let Some((from, to)) = pending.pop() {
        if copied >= FILES {
            break;
        }
        fs::create_dir_all(target.join(&to)).expect("a folder");
        let mut entries: Vec<_> = fs::read_dir(&from).expect("sources").flatten().collect();
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let meta = entry.metadata().expect("sources");
            let to = to.join(entry.file_name());
            if meta.is_dir() {
                pending.push((entry.path(), to));
            } else if meta.is_file() && meta.len() <= FILE_BYTES_MAX {
                fs::copy(entry.path(), target.join(to)).expect("a copy");
                copied += 1;
            }
        }
    }
    assert!(copied >= 2_000, "only {copied} source files on this machine");
}

fn source_folders() -> Vec<(PathBuf, PathBuf)> {
    let sysroot = std::process::Command::new("rustc").args(["--print", "sysroot"]).output();
    let sysroot = sysroot.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_string());
    let library = PathBuf::from(sysroot.unwrap_or_default()).join("lib/rustlib/src/rust/library");
    if library.is_dir() {
        return vec![(library, PathBuf::from("library"))];
    }
    let cargo = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = std::env::var_os("HOME").map(PathBuf::from).unwrap_or_default();
    let registry = cargo.unwrap_or_else(|| home.join(".cargo")).join("registry/src");
    let mut folders = Vec::new();
    for index in fs::read_dir(registry).expect("crate sources").flatten() {
        for package in fs::read_dir(index.path()).expect("crate sources").flatten() {
            folders.push((package.path(), PathBuf::from(package.file_name())));
        }
    }
    // Popped from the end: plain Rust crates come before the giant C ones.
    folders.sort_by(|left, right| right.1.cmp(&left.1));
    folders.retain(|(_, name)| !name.to_string_lossy().contains("-sys-"));
    folders
}
