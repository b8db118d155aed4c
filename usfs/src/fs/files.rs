//! Operations on open files: read, write, sync.

use std::ops::Range;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures::future::try_join_all;
use us_core::disk::{Around, BlockDirectory, BlockInfo};
use us_core::ids::{BlockId, Ino};

use super::shared::State;
use super::writeback::flush_patiently;
use super::{
    AllocateMode, Caller, Fs, FsError, Handle, KernelNotifier, OpenFlags, Opened, SeekFor,
    WriteFlags,
};
use crate::core::{FlushReason, Now, ReadPiece, Stop};

impl Fs {
    /// Gives the mount the way to the kernel's caches, once it exists.
    pub fn set_notifier(&self, notifier: Box<dyn KernelNotifier>) {
        self.shared.kernel.start(notifier);
    }

    /// Opens a file.
    pub async fn open(
        &self,
        _caller: Caller,
        ino: Ino,
        flags: OpenFlags,
    ) -> Result<Opened, FsError> {
        self.run(|state, now| state.core.open(now, ino, flags)).await
    }

    /// Reads up to `length` bytes; fewer only at the end of the file.
    pub async fn read(&self, handle: Handle, offset: u64, length: usize) -> Result<Bytes, FsError> {
        let plan = self.run(|state, now| state.core.read(now, handle, offset, length)).await?;
        for (info, range) in &plan.ahead {
            self.shared.disk.prefetch(info, range.clone());
        }
        // A file that is read here and there and fits into the cache is soon there.
        let fits = plan.file_bytes <= self.shared.disk.cache_bytes();
        assemble(self, plan.pieces, if fits { plan.around } else { Around::Nothing }).await
    }

    async fn read_block(
        &self,
        block: BlockId,
        info: Option<Arc<BlockInfo>>,
        range: Range<usize>,
        around: Around,
    ) -> Result<Vec<Bytes>, FsError> {
        let info = match info {
            Some(info) => info,
            None => {
                let found = self.shared.blocks.locate(block).await;
                Arc::new(found.ok_or_else(|| {
                    FsError::Io(format!("the directory does not say where block {block} is"))
                })?)
            }
        };
        self.shared.disk.read_around(&info, range, around).await.map_err(|error| {
            tracing::error!(%block, %error, "cannot read");
            FsError::Io(error.to_string())
        })
    }

    /// How a write through `handle` is done where nothing else is said: as it was opened.
    fn write_flags(&self, handle: Handle, kill_suid: bool) -> Result<WriteFlags, FsError> {
        let state = self.shared.lock();
        let OpenFlags { append, sync, .. } = state.core.open_file(handle)?.flags;
        Ok(WriteFlags { append, sync, kill_suid })
    }

    /// [`Fs::try_write_as`] as the file was opened.
    pub fn try_write(
        &self,
        handle: Handle,
        offset: u64,
        data: &[u8],
        kill_suid: bool,
    ) -> Option<Result<usize, FsError>> {
        match self.write_flags(handle, kill_suid) {
            Ok(flags) => self.try_write_as(handle, offset, data, flags),
            Err(error) => Some(Err(error)),
        }
    }

    /// [`Fs::write_as`] as the file was opened.
    pub async fn write(
        &self,
        handle: Handle,
        offset: u64,
        data: Bytes,
        kill_suid: bool,
    ) -> Result<usize, FsError> {
        let flags = self.write_flags(handle, kill_suid)?;
        self.write_as(handle, offset, data, flags).await
    }

    /// Writes all of `data` if that needs no wait: `None` means call [`Fs::write_as`]. Copies the
    /// bytes once, into the file's dirty buffer.
    pub fn try_write_as(
        &self,
        handle: Handle,
        offset: u64,
        data: &[u8],
        flags: WriteFlags,
    ) -> Option<Result<usize, FsError>> {
        if flags.sync {
            return None;
        }
        let (mut before, mut after) = (0, 0);
        let mut write = |state: &mut State, now: Now| {
            before = state.core.uncommitted_bytes();
            state.core.open_file_mut(handle)?.flags.append = flags.append;
            let written = state.core.write(now, handle, offset, data, flags.kill_suid);
            after = state.core.uncommitted_bytes();
            self.shared.fit_cache(state);
            written
        };
        let written = match self.attempt(&mut write) {
            Ok(written) => Ok(written),
            Err(Stop::Fail(error)) => Err(error),
            Err(Stop::Stall(_)) => return None,
        };
        self.note_dirty(before, after);
        Some(written)
    }

    /// Writes all of `data`.
    pub async fn write_as(
        &self,
        handle: Handle,
        offset: u64,
        data: Bytes,
        flags: WriteFlags,
    ) -> Result<usize, FsError> {
        let (mut before, mut after) = (0, 0);
        let written = self
            .run(|state, now| {
                before = state.core.uncommitted_bytes();
                state.core.open_file_mut(handle)?.flags.append = flags.append;
                let written = state.core.write(now, handle, offset, &data, flags.kill_suid);
                after = state.core.uncommitted_bytes();
                self.shared.fit_cache(state);
                written
            })
            .await?;
        self.note_dirty(before, after);
        if flags.sync {
            self.fsync(handle, true).await?;
        }
        Ok(written)
    }

    /// Wakes the background when the first byte is dirty, and with every block's worth.
    fn note_dirty(&self, before: u64, after: u64) {
        let block = self.shared.disk.code().block_bytes_max() as u64;
        if before == 0 || before / block != after / block {
            self.shared.dirty.notify_one();
        }
    }

    /// A descriptor was closed: reports a pending error of writing, and drops the owner's locks.
    pub async fn flush(&self, handle: Handle, lock_owner: u64) -> Result<(), FsError> {
        let (ino, error) = {
            let mut state = self.shared.lock();
            let ino = state.core.open_file(handle)?.ino;
            (ino, state.core.take_write_error(handle))
        };
        let unlocked = self.drop_locks(ino, lock_owner).await;
        // It is told once: nothing may hide it.
        error.map_or(unlocked, Err)
    }

    /// The last descriptor of an open file was closed: locks that were taken through it go.
    pub fn release(&self, handle: Handle) {
        let (ino, locked) = {
            let mut state = self.shared.lock();
            let ino = state.core.open_file(handle).map(|file| file.ino).ok();
            let locked = ino.map(|ino| state.lock_owners.closed(ino, handle));
            state.core.close(handle);
            (ino, locked.unwrap_or_default())
        };
        self.shared.outgoing.notify_one();
        self.drop_locks_later(locked);
        if let Some(ino) = ino {
            self.locks_closed(ino);
        }
    }

    /// Returns when the file's data, and every change of names before now, is durable.
    pub async fn fsync(&self, handle: Handle, _data_only: bool) -> Result<(), FsError> {
        let ino = self.shared.lock().core.open_file(handle)?.ino;
        let flushed = flush_patiently(&self.shared, ino, FlushReason::Durable).await;
        let reported = self.shared.lock().core.take_write_error(handle);
        flushed?;
        reported.map_or(Ok(()), Err)?;
        self.wait_durable().await
    }

    /// Changes how a range is backed.
    pub async fn fallocate(
        &self,
        handle: Handle,
        offset: u64,
        length: u64,
        mode: AllocateMode,
    ) -> Result<(), FsError> {
        let end = offset.checked_add(length).ok_or(FsError::TooLarge)?;
        if mode != AllocateMode::PunchHole {
            self.run(|state, now| state.core.check_free_space(now, handle, length)).await?;
        }
        let mut at = offset;
        loop {
            at = self.run(|state, now| state.core.allocate(now, handle, at..end, mode)).await?;
            if at >= end {
                return Ok(());
            }
            // A long range is many records at the directory: no more are sent than it keeps up with.
            self.wait_durable().await?;
        }
    }

    /// The next data or hole at or after `offset`.
    pub async fn lseek(&self, handle: Handle, offset: u64, seek: SeekFor) -> Result<u64, FsError> {
        self.run(|state, now| state.core.seek(now, handle, offset, seek)).await
    }

    /// Copies a range by sharing the blocks under it; answers how many bytes.
    pub async fn copy_file_range(
        &self,
        from: (Handle, u64),
        to: (Handle, u64),
        length: u64,
    ) -> Result<u64, FsError> {
        self.run(|state, now| state.core.clone_range(now, from, to, length)).await
    }
}

/// Reads `pieces`, in order; what of a block must be fetched brings `around` along.
pub(super) async fn assemble(
    fs: &Fs,
    mut pieces: Vec<ReadPiece>,
    around: Around,
) -> Result<Bytes, FsError> {
    if pieces.len() == 1
        && let Some(ReadPiece::Bytes(bytes)) = pieces.first()
    {
        return Ok(bytes.clone());
    }
    let blocks = pieces.iter_mut().filter_map(|piece| match piece {
        ReadPiece::Block { block, info, range } => {
            Some(fs.read_block(*block, info.take(), range.clone(), around))
        }
        ReadPiece::Bytes(_) | ReadPiece::Zero(_) => None,
    });
    let mut blocks: std::collections::VecDeque<Vec<Bytes>> = try_join_all(blocks).await?.into();
    let mut parts = Vec::with_capacity(pieces.len());
    for piece in pieces {
        match piece {
            ReadPiece::Bytes(bytes) => parts.push(bytes),
            ReadPiece::Zero(bytes) => parts.push(Bytes::from(vec![0; bytes as usize])),
            ReadPiece::Block { .. } => parts.extend(blocks.pop_front().unwrap_or_default()),
        }
    }
    if parts.len() == 1 {
        return Ok(parts.swap_remove(0));
    }
    let mut whole = BytesMut::with_capacity(parts.iter().map(Bytes::len).sum());
    parts.iter().for_each(|part| whole.extend_from_slice(part));
    Ok(whole.freeze())
}
