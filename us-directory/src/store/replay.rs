//! What a start reads: the journal behind the checkpoint, file by file, torn tails cut.

use std::path::Path;

use bytes::Bytes;
use us_core::daemon::disk::sync_path;

use super::embedded::Overlay;
use super::journal::{cut, file_path, list_files, read_file, sync_dir};
use super::{Seq, StoreError};

/// Replays the journal behind the checkpoint. Returns the last commit and the journal's bytes.
///
/// # Errors
/// [`StoreError::Damaged`] when durable records are damaged or missing; [`StoreError::Io`].
pub(super) fn replay(
    dir: &Path,
    checkpoint: Seq,
    overlay: &mut Overlay,
) -> Result<(Seq, u64), StoreError> {
    let mut files = list_files(dir)?;
    // Files whose records are all in the checkpoint are there for readers of records only.
    let needless = files.iter().skip(1).take_while(|(first, _)| *first <= checkpoint + 1).count();
    files.drain(..needless);
    let (mut seq, mut journal_bytes) = (checkpoint, 0);
    if let Some((_, path)) = files.first().filter(|(first_seq, _)| *first_seq > checkpoint + 1) {
        return Err(StoreError::Damaged {
            path: path.display().to_string(),
            offset: 0,
            seq: checkpoint + 1,
            detail: "the journal starts behind the checkpoint",
        });
    }
    for (index, (first_seq, path)) in files.iter().enumerate() {
        let last = index + 1 == files.len();
        if index > 0 && *first_seq != seq + 1 {
            return Err(StoreError::Damaged {
                path: path.display().to_string(),
                offset: 0,
                seq: seq + 1,
                detail: "records are missing between two files",
            });
        }
        // A kill leaves records in the page cache: they are on the disk before they are believed,
        // told to anybody, and followed by another file.
        sync_path(path).map_err(|error| StoreError::io("sync", path, error))?;
        let replayed = read_file(path, *first_seq, checkpoint + 1, last)?;
        if replayed.good_bytes == 0 || (last && replayed.batches.is_empty()) {
            // A file in the making, or one that holds nothing we need: the next takes its place.
            std::fs::remove_file(path).map_err(|error| StoreError::io("remove", path, error))?;
            continue;
        }
        if replayed.torn_bytes > 0 {
            if !replayed.clean {
                let bytes = replayed.torn_bytes;
                tracing::warn!(path = %path.display(), bytes, "torn tail cut");
            }
            cut(path, replayed.good_bytes)?;
        }
        journal_bytes += replayed.good_bytes;
        for (number, batch) in replayed.batches {
            seq = number;
            for (key, value) in batch {
                // A key of its own: a slice would keep the whole file's bytes alive.
                let value = value.map(|value| Bytes::copy_from_slice(&value));
                overlay.insert(Bytes::copy_from_slice(&key), value);
            }
        }
    }
    debug_assert!(!file_path(dir, seq + 1).exists(), "the next file is free");
    sync_dir(dir)?;
    Ok((seq, journal_bytes))
}
