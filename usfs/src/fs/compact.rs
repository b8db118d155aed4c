//! Writing parts of a file anew: read them, make them dirty, and they are stored like new ones. So a
//! crowded chunk becomes one run, what an fsync put into the directory becomes fragments, and what lives of a
//! block of which most is dead goes to another.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use us_core::disk::Around;
use us_core::ids::Ino;

use super::files::assemble;
use super::shared::Shared;
use super::{Fs, FsError};
use crate::core::{Cleaning, Packing, Rewrite};

/// Tries against a file that changes all the time.
const TRIES_MAX: usize = 8;

/// Makes a chunk of a file dirty as a whole, where nothing newer is dirty already. The next flush
/// stores it as one run.
pub(crate) async fn compact(shared: &Arc<Shared>, ino: Ino, chunk: u64) -> Result<(), FsError> {
    let fs = Fs { shared: Arc::clone(shared) };
    for _ in 0..TRIES_MAX {
        let plan = shared.lock().core.plan_rewrite(ino, chunk);
        let Some(rewrite) = plan else { return Ok(()) };
        let content = assemble(&fs, rewrite.pieces.clone(), Around::Nothing).await?;
        let now = shared.now();
        if shared.lock().core.rewrite(now, &rewrite, &content) {
            shared.dirty.notify_one();
            return Ok(());
        }
    }
    Err(FsError::Io("the file changes too fast to tidy up its map".to_owned()))
}

/// Packs what lies inline in the directory: makes it dirty, and the background stores it in blocks with
/// what else is dirty. What cannot be read, or changed meanwhile, is left for the next time.
pub(crate) async fn pack(shared: &Arc<Shared>, packings: Vec<Packing>) {
    let fs = Fs { shared: Arc::clone(shared) };
    for Packing { ino, parts } in packings {
        let mut whole = true;
        for part in parts {
            whole &= make_dirty(&fs, &part).await;
        }
        if whole {
            shared.lock().core.packed(ino);
        }
    }
    shared.dirty.notify_one();
}

/// Cleans: what lives of some blocks becomes dirty, and is stored with what else is. What cannot be read, or
/// changed meanwhile, stays where it is; so does the rest where memory becomes short.
pub(crate) async fn clean(shared: &Arc<Shared>, cleaning: Cleaning, dirty_bytes_max: usize) {
    let fs = Fs { shared: Arc::clone(shared) };
    for chunk in cleaning.chunks {
        let busy = {
            let core = &shared.lock().core;
            let full = core.uncommitted_bytes() > dirty_bytes_max as u64 / 2;
            full || core.waits_for_space() || core.is_storing_troubled()
        };
        if busy || shared.closing.load(Ordering::Relaxed) {
            break;
        }
        let planned = fs.run(|state, now| state.core.plan_cleaning(now, chunk, &cleaning.blocks));
        match planned.await {
            Ok(parts) => {
                for part in parts {
                    make_dirty(&fs, &part).await;
                }
            }
            Err(error) => tracing::debug!(ino = %chunk.0, %error, "is not cleaned"),
        }
    }
    shared.dirty.notify_one();
}

/// Reads a part of a file and makes it dirty; whether it is.
async fn make_dirty(fs: &Fs, part: &Rewrite) -> bool {
    match assemble(fs, part.pieces.clone(), Around::Nothing).await {
        Ok(content) => {
            let now = fs.shared.now();
            fs.shared.lock().core.rewrite(now, part, &content)
        }
        Err(error) => {
            tracing::debug!(ino = %part.ino, %error, "stays where it is");
            false
        }
    }
}
