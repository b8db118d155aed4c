//! The bytes of files: read, write, truncate, allocate, seek, clone.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use us_core::disk::{Around, BlockInfo};
use us_core::ids::{BlockId, Ino};
use us_core::limits::{CHUNK_BYTES, SMALL_FILE_BYTES, ZERO_EXTENT_BYTES_MAX};
use us_proto::v1;
use us_proto::v1::mutation::Op;

use super::flush::{COMMIT_EXTENTS_MAX, extent_write};
use super::node::{Level, Node};
use super::{Core, Now, Stall, Stop, Want, change_time};
use crate::attributes::FileKind;
use crate::data::{self, ClonePlan, Extent, FileData, MapSource, Place, Seek, Tail};
use crate::fs::{AllocateMode, FILE_BYTES_MAX, FsError, Handle, SeekFor};

/// Chunks of a map asked for at once, at least and at most.
const MAP_CHUNKS_MIN: u64 = 64;
const MAP_CHUNKS_MAX: u64 = 256;
/// The longest range of zeros one call allocates: so many chunks the directory writes at once.
const ALLOCATE_BYTES_MAX: u64 = 64 << 30;
/// Allocating up to this much is not worth asking for the volume's free space.
const UNASKED_BYTES_MAX: u64 = 64 << 20;
/// How long an answer about free space is believed.
const FREE_SPACE_AGE_MAX: Duration = Duration::from_secs(5);
/// Zeros in one mutation: a batch of few of them is a small commit at the directory.
const ZERO_EXTENT_BYTES: u64 = 1 << 30;
const _: () = assert!(ZERO_EXTENT_BYTES <= ZERO_EXTENT_BYTES_MAX);
/// The longest clone of one call.
const CLONE_BYTES_MAX: u64 = 1 << 30;

/// A piece of what a read answers.
#[derive(Clone, Debug)]
pub enum ReadPiece {
    /// These bytes.
    Bytes(Bytes),
    /// So many zeros.
    Zero(u64),
    /// A piece of a block that must be read.
    Block {
        /// The block.
        block: BlockId,
        /// Where it is, if that is known.
        info: Option<Arc<BlockInfo>>,
        /// The bytes of its plaintext.
        range: Range<usize>,
    },
}

/// How to serve a read.
#[derive(Clone, Debug, Default)]
pub struct ReadPlan {
    /// The answer, in order.
    pub pieces: Vec<ReadPiece>,
    /// Pieces of blocks worth reading ahead.
    pub ahead: Vec<(Arc<BlockInfo>, Range<usize>)>,
    /// What must be fetched should bring this along, if the whole file can be kept.
    pub around: Around,
    /// The size of the file.
    pub file_bytes: u64,
}

impl Core {
    /// Plans a read of up to `bytes` from `offset`; fewer only at the end of the file.
    pub fn read(
        &mut self,
        now: Now,
        handle: Handle,
        offset: u64,
        bytes: usize,
    ) -> Result<ReadPlan, Stop> {
        self.check_session(now)?;
        let file = self.open_file(handle)?;
        let ino = file.ino;
        if !file.flags.read {
            return Err(FsError::BadHandle.into());
        }
        let size = self.need_file(ino, Level::Shared)?;
        let range = offset.min(size)..offset.saturating_add(bytes as u64).min(size);
        let pieces = self.plan(ino, range.clone(), size)?;
        if !self.open_file(handle)?.flags.no_atime {
            self.touch_atime(now, ino);
        }
        let reader = &mut self.open_file_mut(handle)?.read_ahead;
        let ahead = reader.on_read(range, size);
        let around = match reader.around_bytes() {
            _ if size <= SMALL_FILE_BYTES => Around::Neighbours,
            bytes => Around::Bytes(bytes),
        };
        // A part of the map that is not here yet is fetched when the reader gets there.
        let plans = ahead.into_iter().filter_map(|range| self.plan(ino, range, size).ok());
        let ahead = plans.flatten().filter_map(ahead_piece).collect();
        Ok(ReadPlan { pieces, ahead, around, file_bytes: size })
    }

    pub(super) fn plan(
        &mut self,
        ino: Ino,
        range: Range<u64>,
        size: u64,
    ) -> Result<Vec<ReadPiece>, Stop> {
        if range.is_empty() {
            return Ok(Vec::new());
        }
        let planned = match self.data(ino)?.read_plan(range, size) {
            data::ReadPlan::Ready(pieces) => pieces,
            data::ReadPlan::Fetch(chunks) => return Err(want_map(ino, chunks)),
        };
        let piece = |piece| match piece {
            data::ReadPiece::Bytes { bytes, .. } => ReadPiece::Bytes(bytes),
            data::ReadPiece::Zero { bytes, .. } => ReadPiece::Zero(bytes),
            data::ReadPiece::Block { bytes, block, block_offset, .. } => {
                let start = block_offset as usize;
                let info = self.blocks.get(&block).cloned();
                ReadPiece::Block { block, info, range: start..start + bytes as usize }
            }
        };
        Ok(planned.into_iter().map(piece).collect())
    }

    /// A regular file under a lease; answers its size.
    pub(super) fn need_file(&mut self, ino: Ino, level: Level) -> Result<u64, Stop> {
        let node = self.need(ino, level)?;
        match node.attributes {
            Some(attributes) if attributes.kind == FileKind::Regular => Ok(attributes.size),
            Some(attributes) if attributes.kind == FileKind::Directory => {
                Err(FsError::IsADirectory.into())
            }
            Some(_) | None => Err(FsError::Invalid("not a regular file").into()),
        }
    }

    fn data(&mut self, ino: Ino) -> Result<&mut FileData, Stop> {
        let data = self.nodes.get_mut(&ino).and_then(|node| node.data.as_deref_mut());
        data.ok_or(Stop::Fail(FsError::Stale(ino)))
    }

    /// A handle that may write, its file under an EXCLUSIVE lease; answers inode and size.
    fn need_writable(&mut self, now: Now, handle: Handle) -> Result<(Ino, u64), Stop> {
        self.check_change(now)?;
        let file = self.open_file(handle)?;
        if !file.flags.write {
            return Err(FsError::BadHandle.into());
        }
        let ino = file.ino;
        Ok((ino, self.need_file(ino, Level::Exclusive)?))
    }

    /// Writes `bytes` at `offset`, or at the end of the file where it is open for appending.
    pub fn write(
        &mut self,
        now: Now,
        handle: Handle,
        offset: u64,
        bytes: &[u8],
        kill_suid: bool,
    ) -> Result<usize, Stop> {
        let (ino, size) = self.need_writable(now, handle)?;
        let append = self.open_file(handle)?.flags.append;
        let offset = if append { size } else { offset };
        let end = offset.checked_add(bytes.len() as u64).filter(|end| *end <= FILE_BYTES_MAX);
        let end = end.ok_or(FsError::TooLarge)?;
        if bytes.is_empty() {
            return Ok(0);
        }
        if let Some(error) = self.no_space(now) {
            return Err(error.into());
        }
        if !self.has_space(bytes.len()) {
            return Err(Stop::Stall(Stall::Space));
        }
        self.need_map(ino, offset, end)?;
        self.need_tail(ino, size, end)?;
        self.data(ino)?.write(offset, bytes);
        self.attributes_mut(ino).size = size.max(end);
        self.touch_file(now, ino);
        self.drop_suid(ino, kill_suid);
        self.note_dirty(now, ino);
        Ok(bytes.len())
    }

    /// The map of the chunks at both ends of a write: how many extents they have decides how the
    /// bytes are stored. What lies between is replaced as a whole.
    fn need_map(&mut self, ino: Ino, start: u64, end: u64) -> Result<(), Stop> {
        let map = self.data(ino)?.map();
        for chunk in [start / CHUNK_BYTES, end.saturating_sub(1) / CHUNK_BYTES] {
            if !map.is_known(chunk) {
                return Err(want_map(ino, chunk..chunk + 1));
            }
        }
        Ok(())
    }

    /// The file's content changed now.
    fn touch_file(&mut self, now: Now, ino: Ino) {
        let attributes = self.attributes_mut(ino);
        let time = change_time(now, attributes);
        attributes.mtime = time;
        attributes.ctime = time;
    }

    /// The file is about to grow from `size` to `end`: nothing may come to light that lies behind its
    /// end. Blocks commit in any order and sizes wait for them, so a mount that crashed may have left
    /// bytes there that never were part of the file.
    fn need_tail(&mut self, ino: Ino, size: u64, end: u64) -> Result<(), Stop> {
        let Some(node) = self.nodes.get(&ino) else { return Err(FsError::Stale(ino).into()) };
        if end <= size || node.tail_checked {
            return Ok(());
        }
        let left = match self.data(ino)?.map().tail(size) {
            Tail::Known(left) => left,
            Tail::Unknown => {
                let chunk = size / CHUNK_BYTES;
                return Err(want_map(ino, chunk..chunk + MAP_CHUNKS_MAX));
            }
            // At worst it was allocated in advance, and is not any more.
            Tail::Long => Some(size..FILE_BYTES_MAX),
        };
        if let Some(range) = left {
            let (offset, bytes) = (range.start, range.end - range.start);
            self.place_counted(ino, &Extent { offset, bytes, place: Place::Hole })?;
            let cut = Extent { offset, bytes, place: Place::Hole };
            self.log_extents(ino, vec![extent_write(ino, &cut)]);
        }
        if let Some(node) = self.nodes.get_mut(&ino) {
            node.tail_checked = true;
        }
        Ok(())
    }

    /// Puts an extent over everything in its range, and counts what is allocated then.
    fn place_counted(&mut self, ino: Ino, extent: &Extent) -> Result<(), Stop> {
        let data = self.data(ino)?;
        let known = data.map().is_all_known(extent.range());
        let before = data.map().mapped_bytes();
        data.place(extent);
        let grown = data.map().mapped_bytes() as i64 - before as i64;
        self.count_allocated(ino, grown, known);
        Ok(())
    }

    /// The map has `grown` by so many bytes. Unless all that went was `known`, only the directory can
    /// tell how much that leaves.
    fn count_allocated(&mut self, ino: Ino, grown: i64, known: bool) {
        let attributes = self.attributes_mut(ino);
        let allocated = attributes.allocated_bytes.saturating_add_signed(grown);
        attributes.allocated_bytes = allocated;
        if let Some(node) = self.nodes.get_mut(&ino) {
            node.allocated_guessed |= !known;
        }
    }

    /// Cuts a file whose lease is held at `size`, or extends it by a hole.
    pub(super) fn truncate(&mut self, now: Now, ino: Ino, size: u64) -> Result<(), Stop> {
        let old = self.need_file(ino, Level::Exclusive)?;
        self.need_tail(ino, old, size)?;
        self.touch_file(now, ino);
        if size < old {
            let data = self.data(ino)?;
            let (known, before) =
                (data.map().is_all_known(size..u64::MAX), data.map().mapped_bytes());
            data.truncate(size);
            let grown = data.map().mapped_bytes() as i64 - before as i64;
            self.count_allocated(ino, grown, known);
        }
        let node = self.nodes.get_mut(&ino).ok_or(FsError::Stale(ino))?;
        let Some(attributes) = &mut node.attributes else { return Ok(()) };
        attributes.size = size;
        if size == 0 {
            attributes.allocated_bytes = 0;
            node.allocated_guessed = false;
        }
        let (mtime, ctime) = (attributes.mtime, attributes.ctime);
        if size < node.logged_size {
            node.logged_size = size;
            // The directory clears whatever lies behind.
            node.tail_checked = true;
            let message = v1::SetAttributes {
                ino: ino.0,
                size: Some(size),
                mtime: Some(mtime.into()),
                ctime: Some(ctime.into()),
                ..v1::SetAttributes::default()
            };
            self.append(Op::SetAttributes(message), &[ino]);
        } else {
            // The directory knows a smaller size: it must not clear what is committed behind that.
            let behind = Extent { offset: size, bytes: FILE_BYTES_MAX - size, place: Place::Hole };
            let cut = (size < old && behind.bytes > 0).then(|| extent_write(ino, &behind));
            self.log_extents(ino, cut.into_iter().collect());
        }
        self.note_dirty(now, ino);
        Ok(())
    }

    /// Logs extents of `ino` that refer to no new block, and its size as far as it is committed.
    fn log_extents(&mut self, ino: Ino, extents: Vec<v1::ExtentWrite>) {
        let files = self.growth(ino).into_iter().collect();
        let message = v1::CommitData { blocks: Vec::new(), extents, files };
        self.append_commit(message, &[ino]);
    }

    /// Whether `bytes` more may be allocated for a file: as far as the volume has space for what the
    /// file does not have yet. Little is never asked about.
    pub fn check_free_space(&mut self, now: Now, handle: Handle, bytes: u64) -> Result<(), Stop> {
        let (ino, _) = self.need_writable(now, handle)?;
        let needed = bytes.saturating_sub(self.attributes_mut(ino).allocated_bytes);
        if needed <= UNASKED_BYTES_MAX {
            return Ok(());
        }
        let fresh = |(at, _): &(Duration, u64)| now.boot.saturating_sub(*at) < FREE_SPACE_AGE_MAX;
        match self.free_space.filter(fresh) {
            None => Err(Stop::Stall(Stall::FreeSpace)),
            Some((_, free)) if needed > free => {
                let detail = format!("for {needed} bytes: the volume has {free} left");
                Err(FsError::NoSpace(detail).into())
            }
            Some(_) => Ok(()),
        }
    }

    /// The directory says how many bytes are left in the volume.
    pub fn note_free_space(&mut self, now: Now, bytes: u64) {
        self.free_space = Some((now.boot, bytes));
    }

    /// Changes how a range is backed, or the first part of it: answers up to where. One call is a
    /// bounded piece of work here and at the directory.
    pub fn allocate(
        &mut self,
        now: Now,
        handle: Handle,
        range: Range<u64>,
        mode: AllocateMode,
    ) -> Result<u64, Stop> {
        let (ino, size) = self.need_writable(now, handle)?;
        if range.end > FILE_BYTES_MAX {
            return Err(FsError::TooLarge.into());
        }
        if range.is_empty() {
            return Err(FsError::Invalid("a range of no bytes").into());
        }
        let (place, grows) = match mode {
            AllocateMode::PunchHole => (Place::Hole, false),
            AllocateMode::ZeroRange { keep_size } | AllocateMode::Allocate { keep_size } => {
                (Place::Zero, !keep_size)
            }
        };
        let mut end = range.end;
        if place == Place::Zero {
            end = end.min(range.start.saturating_add(ALLOCATE_BYTES_MAX));
            self.need_tail(ino, size, end)?;
        }
        let whole = range.start..end;
        let mut ranges = vec![whole];
        if let AllocateMode::Allocate { .. } = mode {
            ranges = self.holes(ino, range.start..end)?;
            if ranges.len() > COMMIT_EXTENTS_MAX {
                ranges.truncate(COMMIT_EXTENTS_MAX);
                end = ranges.last().map_or(end, |last| last.end);
            }
        }
        self.check_crowding(ino, &ranges)?;
        let mut written = Vec::new();
        for range in ranges {
            let extent = Extent { offset: range.start, bytes: range.end - range.start, place };
            match mode {
                // Holes of the map may be dirty; the dirty bytes stay.
                AllocateMode::Allocate { .. } => {
                    self.data(ino)?.map_mut().apply(&extent);
                    self.count_allocated(ino, extent.bytes as i64, true);
                }
                AllocateMode::PunchHole | AllocateMode::ZeroRange { .. } => {
                    self.place_counted(ino, &extent)?;
                }
            }
            written.extend(split(&extent).map(|extent| extent_write(ino, &extent)));
        }
        if grows {
            self.attributes_mut(ino).size = size.max(end);
        }
        self.touch_file(now, ino);
        self.note_dirty(now, ino);
        self.log_extents(ino, written);
        Ok(end)
    }

    /// The parts of `range` that the map has no place for.
    fn holes(&mut self, ino: Ino, range: Range<u64>) -> Result<Vec<Range<u64>>, Stop> {
        let mut holes = Vec::new();
        for piece in self.data(ino)?.map().lookup(range.clone()) {
            match piece.source {
                MapSource::Place(Place::Hole) => holes.push(piece.range),
                MapSource::Place(Place::Zero | Place::Block { .. }) => {}
                MapSource::Unknown => {
                    let (from, to) = (piece.range.start, piece.range.end);
                    let chunks = from / CHUNK_BYTES..to.div_ceil(CHUNK_BYTES);
                    return Err(want_map(ino, chunks));
                }
            }
        }
        Ok(holes)
    }

    /// The next data or hole.
    pub fn seek(
        &mut self,
        now: Now,
        handle: Handle,
        offset: u64,
        seek: SeekFor,
    ) -> Result<u64, Stop> {
        self.check_session(now)?;
        let ino = self.open_file(handle)?.ino;
        let size = self.need_file(ino, Level::Shared)?;
        let data = self.data(ino)?;
        let found = match seek {
            SeekFor::Data => data.seek_data(offset, size),
            SeekFor::Hole => data.seek_hole(offset, size),
        };
        match found {
            Seek::At(at) => Ok(at),
            Seek::None => Err(FsError::NoSuchOffset.into()),
            Seek::Fetch(chunk) => Err(want_map(ino, chunk..chunk + 1)),
        }
    }

    /// Clones up to `bytes` from one file to another place; answers how many.
    pub fn clone_range(
        &mut self,
        now: Now,
        from: (Handle, u64),
        to: (Handle, u64),
        bytes: u64,
    ) -> Result<u64, Stop> {
        self.check_change(now)?;
        let (source, target) = (self.open_file(from.0)?, self.open_file(to.0)?);
        if !source.flags.read || !target.flags.write || target.flags.append {
            return Err(FsError::BadHandle.into());
        }
        let (source, target) = (source.ino, target.ino);
        if source < target {
            self.need_file(source, Level::Shared)?;
        }
        let target_size = self.need_file(target, Level::Exclusive)?;
        let size = self.need_file(source, Level::Shared)?;
        let end = from.1.saturating_add(bytes.min(CLONE_BYTES_MAX)).min(size);
        let bytes = end.saturating_sub(from.1);
        let target_end = to.1.checked_add(bytes).filter(|end| *end <= FILE_BYTES_MAX);
        let target_end = target_end.ok_or(FsError::TooLarge)?;
        if source == target && from.1 < target_end && to.1 < end {
            return Err(FsError::Invalid("the ranges overlap").into());
        }
        if bytes == 0 {
            return Ok(0);
        }
        let extents = match self.data(source)?.clone_range(from.1..end) {
            ClonePlan::Extents(extents) => extents,
            ClonePlan::Flush => return Err(Stop::Stall(Stall::Flush(source))),
            ClonePlan::Fetch(chunks) => return Err(want_map(source, chunks)),
        };
        let moved = |extent: &Extent| Extent { offset: extent.offset - from.1 + to.1, ..*extent };
        let mut extents: Vec<Extent> = extents.iter().map(moved).collect();
        let target_end = self.clone_end(target, &extents)?;
        self.need_tail(target, target_size, target_end)?;
        extents.retain(|extent| extent.offset < target_end);
        let mut written = Vec::with_capacity(extents.len());
        for extent in &mut extents {
            extent.bytes = extent.bytes.min(target_end - extent.offset);
            self.place_counted(target, extent)?;
            written.push(extent_write(target, extent));
        }
        self.attributes_mut(target).size = target_size.max(target_end);
        self.touch_file(now, target);
        self.drop_suid(target, true);
        self.note_dirty(now, target);
        self.log_extents(target, written);
        Ok(target_end - to.1)
    }

    /// The directory's answer about chunks of a map.
    pub(super) fn install_map(
        &mut self,
        ino: Ino,
        first: u64,
        chunks: u32,
        fetched: &v1::Fetched,
    ) -> Result<(), FsError> {
        let end = first + u64::from(chunks);
        self.install_chunks(ino, first..end, &fetched.chunks, fetched.complete)
    }

    /// Installs `chunks` of a map; of those that are not `told` nothing is mapped, and nothing behind
    /// them where they are the last.
    pub(super) fn install_chunks(
        &mut self,
        ino: Ino,
        chunks: Range<u64>,
        told: &[v1::MapChunk],
        complete: bool,
    ) -> Result<(), FsError> {
        let Some(node) = self.nodes.get_mut(&ino) else { return Ok(()) };
        let held = node.lease.level > Level::None;
        let Some(data) = node.data.as_deref_mut().filter(|_| held) else { return Ok(()) };
        let map = data.map_mut();
        for chunk in chunks.clone() {
            let told = told.iter().find(|told| told.chunk == chunk);
            let extents = match told {
                Some(told) => told.extents.iter().map(extent).collect::<Option<Vec<_>>>(),
                None => Some(Vec::new()),
            };
            let bad = || FsError::Io(format!("the map of inode {ino} makes no sense"));
            map.install(chunk, &extents.ok_or_else(bad)?);
        }
        if complete {
            map.install_end(chunks.end);
        }
        Ok(())
    }
}

impl Node {
    /// Bytes that take space, with what is not committed yet.
    pub(super) fn allocated_bytes(&self) -> u64 {
        let Some(attributes) = self.attributes else { return 0 };
        let mapped = attributes.allocated_bytes;
        let Some(data) = &self.data else { return mapped };
        let pending = data.dirty().bytes() + data.in_flight().bytes();
        if pending == 0 {
            return mapped;
        }
        // Dirty bytes may lie over mapped ones: never show more than the file has.
        (mapped + pending).min(attributes.size).max(mapped)
    }
}

fn ahead_piece(piece: ReadPiece) -> Option<(Arc<BlockInfo>, Range<usize>)> {
    match piece {
        ReadPiece::Block { info: Some(info), range, .. } => Some((info, range)),
        ReadPiece::Block { info: None, .. } | ReadPiece::Bytes(_) | ReadPiece::Zero(_) => None,
    }
}

pub(super) fn want_map(ino: Ino, chunks: Range<u64>) -> Stop {
    let count = (chunks.end - chunks.start).clamp(MAP_CHUNKS_MIN, MAP_CHUNKS_MAX);
    Stop::Stall(Stall::Fetch(Want::Map { ino, first_chunk: chunks.start, chunks: count as u32 }))
}

/// The extent in parts that one mutation may carry.
fn split(extent: &Extent) -> impl Iterator<Item = Extent> + use<> {
    let Extent { offset, bytes, place } = *extent;
    let step = if place == Place::Hole { u64::MAX } else { ZERO_EXTENT_BYTES };
    let starts = std::iter::successors(Some(0u64), move |at| at.checked_add(step));
    starts.take_while(move |at| *at < bytes).map(move |at| Extent {
        offset: offset + at,
        bytes: step.min(bytes - at),
        place,
    })
}

fn extent(message: &v1::Extent) -> Option<Extent> {
    let place = if message.block.is_empty() {
        Place::Zero
    } else {
        let block = BlockId::from_slice(&message.block)?;
        Place::Block { block, offset: message.block_offset }
    };
    Some(Extent { offset: message.offset, bytes: message.length, place })
}
