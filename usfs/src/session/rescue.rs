//! The rescue file: what a mount had not made durable when its session ended.
//!
//! A directory of its own under the mount's data, readable with ordinary tools: `changes` says what
//! was done and is not durable, one change a line, oldest first; `inode-N` holds the bytes of a
//! file that are not durable, at their offsets (the rest is holes); `index` says which bytes of
//! which path those are, and what could not be had.
//!
//! Bytes that a block holds whose commit is not durable come from memory, or are read back from the
//! providers, for a bounded time.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use tokio::time::{Instant, timeout_at};
use us_core::disk::{BlockInfo, VirtualDisk};
use us_core::ids::BlockId;

use crate::core::{Core, Undurable, UndurableFile};

/// How long reading blocks back may take in all.
const READ_BACK: Duration = Duration::from_secs(60);

/// What is to be saved.
pub(crate) struct Rescue {
    changes: Vec<String>,
    files: Vec<UndurableFile>,
    /// The plaintext of blocks, as far as it is in memory.
    kept: HashMap<BlockId, Vec<Bytes>>,
}

impl Rescue {
    /// Everything that is not durable; `None` if there is nothing that anybody would miss.
    pub fn collect(core: &Core, kept: HashMap<BlockId, Vec<Bytes>>) -> Option<Self> {
        let (changes, files) = core.undurable();
        (!changes.is_empty() || !files.is_empty()).then_some(Self { changes, files, kept })
    }

    /// Writes it under `dir` and answers where.
    pub async fn write(
        self,
        dir: PathBuf,
        volume: &str,
        disk: &VirtualDisk,
    ) -> io::Result<PathBuf> {
        let path = off_runtime({
            let volume = volume.to_owned();
            move || make_dir(&dir, &volume)
        })
        .await?;
        let until = Instant::now() + READ_BACK;
        let Self { changes, files, mut kept } = self;
        let mut index = String::new();
        for UndurableFile { ino, path: of, size, pieces } in files {
            let name = format!("inode-{ino}");
            let size = size.map_or("unknown".to_owned(), |size| size.to_string());
            let _ = writeln!(index, "{name}: {of}, size {size}");
            let at = path.join(&name);
            let file = Arc::new(off_runtime(move || File::create(at)).await?);
            for (offset, piece) in pieces {
                let bytes = match piece {
                    Undurable::Bytes(bytes) => Ok(vec![bytes]),
                    Undurable::Zero(bytes) => {
                        let _ = writeln!(index, "  bytes {offset}+{bytes}: zeros");
                        continue;
                    }
                    Undurable::Block { block, info, range } => {
                        plaintext(&mut kept, disk, block, info, range, until).await
                    }
                };
                match bytes {
                    Ok(bytes) => {
                        let length: usize = bytes.iter().map(Bytes::len).sum();
                        let _ = writeln!(index, "  bytes {offset}+{length}");
                        let file = Arc::clone(&file);
                        off_runtime(move || write_at(&file, &bytes, offset)).await?;
                    }
                    Err(missing) => {
                        let _ = writeln!(index, "  from byte {offset} MISSING: {missing}");
                    }
                }
            }
            off_runtime(move || file.sync_all()).await?;
        }
        let written = path.clone();
        off_runtime(move || {
            let mut changes = changes.join("\n");
            changes.push('\n');
            for (name, content) in [("index", index), ("changes", changes)] {
                let file = File::create(path.join(name))?;
                file.write_all_at(content.as_bytes(), 0)?;
                file.sync_all()?;
            }
            File::open(&path)?.sync_all()
        })
        .await?;
        Ok(written)
    }
}

async fn off_runtime<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

/// A directory that no other rescue has.
fn make_dir(dir: &Path, volume: &str) -> io::Result<PathBuf> {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    fs::create_dir_all(dir)?;
    let volume: String =
        volume.chars().map(|c| if c == '/' || c == '\0' { '_' } else { c }).collect();
    for number in 0..1000 {
        let more = if number == 0 { String::new() } else { format!("-{number}") };
        let path = dir.join(format!("rescue-{volume}-{seconds}{more}"));
        match fs::create_dir(&path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => return made.map(|()| path),
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}

fn write_at(file: &File, pieces: &[Bytes], mut offset: u64) -> io::Result<()> {
    for piece in pieces {
        file.write_all_at(piece, offset)?;
        offset += piece.len() as u64;
    }
    Ok(())
}

/// Bytes of a block, from memory or from where it lies; else why they are missing.
async fn plaintext(
    kept: &mut HashMap<BlockId, Vec<Bytes>>,
    disk: &VirtualDisk,
    block: BlockId,
    info: Option<Arc<BlockInfo>>,
    range: Range<usize>,
    until: Instant,
) -> Result<Vec<Bytes>, String> {
    if let Some(pieces) = kept.get(&block) {
        return Ok(cut(pieces, range));
    }
    let info = info.ok_or_else(|| format!("it is not known where block {block} lies"))?;
    match timeout_at(until, disk.read(&info, range)).await {
        Ok(read) => read.map_err(|error| error.to_string()),
        Err(_) => Err(format!("block {block} could not be read back in time")),
    }
}

/// `range` of the concatenation of `pieces`.
fn cut(pieces: &[Bytes], range: Range<usize>) -> Vec<Bytes> {
    let mut at = 0;
    let mut out = Vec::new();
    for piece in pieces {
        let (from, to) = (range.start.max(at), range.end.min(at + piece.len()));
        if from < to {
            out.push(piece.slice(from - at..to - at));
        }
        at += piece.len();
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_of_pieces_is_a_range_of_their_bytes() {
        let pieces: Vec<Bytes> = ["abc", "", "de", "fghi"].map(Bytes::from).to_vec();
        let whole = b"abcdefghi";
        for start in 0..9 {
            for end in start..10 {
                let found = cut(&pieces, start..end).concat();
                assert_eq!(found, whole[start..end.min(9)], "{start}..{end}");
            }
        }
    }

    #[test]
    fn two_rescues_of_one_second_have_two_places() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) =
            (make_dir(dir.path(), "a/b").unwrap(), make_dir(dir.path(), "a/b").unwrap());
        assert!(one != two && one.is_dir() && two.is_dir());
        assert_eq!(one.parent(), Some(dir.path()));
    }
}
