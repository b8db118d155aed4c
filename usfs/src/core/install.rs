//! What the directory says: answers that fill the cache, grants, recalls, marks of the log.
//!
//! A cached value is at least as new as an answer's, because nobody else changes what is leased:
//! an answer fills gaps and never overwrites.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use us_core::daemon::logging::RequestId;
use us_core::disk::BlockInfo;
use us_core::ids::Ino;
use us_core::name::NameHash;
use us_proto::v1;
use us_proto::v1::session_down::Event as Down;
use us_proto::v1::session_up::Event as Up;

use super::cleaning::Cleaning;
use super::leases::{PIN, Recall};
use super::locks::{LockEvent, Locked};
use super::node::{Dentry, DirNames, LISTED_MAX, Level, Node, attributes_from_proto};
use super::{Asked, Core, INODES_LEASED, Now, Want};
use crate::attributes::FileKind;
use crate::data::FileData;
use crate::fs::FsError;
use crate::session::log::LogPosition;

/// What the shell must do after a message.
#[derive(Clone, PartialEq, Debug)]
pub enum Effect {
    /// Operations waiting for this request go on: all is in the cache, or it failed.
    Answered(u64, Result<(), FsError>),
    /// The directory had no time for the request (another mount did not give its lease back):
    /// it may be asked again.
    Contended(u64),
    /// A recall waits to be answered.
    Recalled,
    /// Something is to be cleaned.
    Cleaning,
    /// Everything up to here is durable.
    Durable(LogPosition),
    /// New inode numbers are there.
    Inodes,
    /// What became of requests for locks.
    Locked(Locked),
    /// The session is over.
    Ended(String),
    /// Not for the core: placements, statistics, providers, grants.
    Other(Down),
}

impl Core {
    /// Registers a want, first of the request `trace`; answers the number under which it is asked.
    pub fn request(&mut self, want: &Want, trace: RequestId) -> u64 {
        if let Some(number) = self.requests.get(want) {
            return *number;
        }
        let number = self.request_number();
        self.requests.insert(want.clone(), number);
        let asked = Asked { want: want.clone(), trace, at: self.log.end() };
        self.pending.insert(number, asked);
        if let Want::Entries { dir, .. } = want {
            self.note_listing(*dir, true);
        }
        let siblings = self.siblings(want);
        let mut event = self.fetch_event(number, want, trace);
        if let Up::Fetch(v1::Fetch { want: Some(v1::fetch::Want::Map(map)), .. }) = &mut event {
            map.siblings = siblings;
        }
        self.send(event);
        number
    }

    /// Asks for inode numbers, unless that is under way.
    pub fn ask_inodes(&mut self) {
        if !std::mem::replace(&mut self.inodes_asked, true) {
            let request = self.request_number();
            self.send(Up::LeaseInodes(v1::LeaseInodes { request, count: INODES_LEASED }));
        }
    }

    /// Whether new inode numbers should be asked for ahead of need.
    pub fn inodes_low(&self) -> bool {
        self.inodes.end - self.inodes.start < u64::from(INODES_LEASED / 4)
    }

    pub(super) fn fetch_event(&self, request: u64, want: &Want, trace: RequestId) -> Up {
        use v1::fetch::Want as Wire;
        let shared = Level::Shared.to_proto();
        let wire = match want {
            Want::Inode { ino, level } => {
                Wire::Inode(v1::FetchInode { ino: ino.0, level: level.to_proto() })
            }
            Want::Entry { dir, name, level } => Wire::Entry(v1::FetchEntry {
                dir: dir.0,
                name_hash: Bytes::copy_from_slice(&self.config.names.name_hash(*dir, name)),
                dir_level: level.to_proto(),
                child_level: shared,
            }),
            Want::Entries { dir, after } => Wire::Entries(v1::FetchEntries {
                dir: dir.0,
                after_cookie: *after,
                limit: LISTED_MAX as u32,
                dir_level: shared,
            }),
            Want::Map { ino, first_chunk, chunks } => Wire::Map(v1::FetchMap {
                ino: ino.0,
                first_chunk: *first_chunk,
                chunks: *chunks,
                level: shared,
                // Not when it is asked for again: what comes along is no duty.
                siblings: Vec::new(),
            }),
            Want::Xattrs { ino, level } => {
                Wire::Xattrs(v1::FetchXattrs { ino: ino.0, level: level.to_proto() })
            }
        };
        Up::Fetch(v1::Fetch { request, want: Some(wire), trace: trace.0 })
    }

    /// Takes a message of the directory in.
    pub fn on_down(&mut self, now: Now, event: Down) -> Option<Effect> {
        match event {
            Down::Applied(applied) => {
                self.log.on_applied(applied.number);
                None
            }
            Down::Durable(durable) => {
                let news = self.log.on_durable(durable.number);
                news.then(|| Effect::Durable(self.log.durable_position()))
            }
            Down::Fetched(fetched) => self.on_fetched(now, &fetched),
            Down::Recall(recall) => {
                let keep = Level::from_proto(recall.level);
                let recall = Recall { ino: Ino(recall.ino), keep, grant: recall.grant };
                self.recalls.push_back(recall);
                Some(Effect::Recalled)
            }
            Down::Lock(reply) => {
                Some(Effect::Locked(self.step_locks(now, LockEvent::Answered(reply))))
            }
            Down::RecallLocks(recall) => {
                let recalled = LockEvent::Recalled(Ino(recall.ino));
                Some(Effect::Locked(self.step_locks(now, recalled)))
            }
            Down::Inodes(leased) => {
                self.inodes_asked = false;
                // What is left of the old range is given up: numbers are never short.
                self.inodes = leased.first..leased.first + u64::from(leased.count);
                Some(Effect::Inodes)
            }
            Down::Clean(order) => {
                // The directory gives one at a time.
                self.dirty.cleaning = Some(Cleaning::from_proto(&order));
                Some(Effect::Cleaning)
            }
            Down::Ended(ended) => {
                let reason = v1::EndReason::try_from(ended.reason).unwrap_or_default();
                Some(Effect::Ended(format!("{}: {}", reason.as_str_name(), ended.detail)))
            }
            other @ (Down::Opened(_)
            | Down::Placements(_)
            | Down::Statfs(_)
            | Down::Providers(_)
            | Down::Renewed(_)) => Some(Effect::Other(other)),
        }
    }

    fn note_listing(&mut self, dir: Ino, listing: bool) {
        let names = self.nodes.get_mut(&dir).and_then(|node| node.names.as_deref_mut());
        if let Some(names) = names {
            names.listing = listing;
        }
    }

    fn on_fetched(&mut self, now: Now, fetched: &v1::Fetched) -> Option<Effect> {
        let number = fetched.request;
        let Some(Asked { want, at, .. }) = self.pending.remove(&number) else {
            return Some(Effect::Other(Down::Fetched(fetched.clone())));
        };
        self.requests.remove(&want);
        for lease in &fetched.leases {
            // Only what was asked for waits to be used; the rest came along.
            let asked = lease.ino == want.ino().0 || matches!(want, Want::Entry { .. });
            self.install_lease(now, lease, asked);
        }
        for inode in &fetched.inodes {
            self.install_inode(inode, at);
        }
        for block in &fetched.blocks {
            self.remember_block(block);
        }
        let error = v1::FetchError::try_from(fetched.error).unwrap_or(v1::FetchError::Internal);
        if let (Want::Entries { dir, .. }, true) = (&want, error != v1::FetchError::None) {
            self.note_listing(*dir, false);
        }
        let failed = |error| Some(Effect::Answered(number, Err(error)));
        match error {
            v1::FetchError::None => {}
            v1::FetchError::NotFound => return failed(FsError::Stale(want.ino())),
            v1::FetchError::NotADirectory => return failed(FsError::NotADirectory),
            v1::FetchError::Contended => return Some(Effect::Contended(number)),
            v1::FetchError::Invalid | v1::FetchError::Internal => {
                return failed(FsError::Io(format!("the directory: {}", fetched.detail)));
            }
        }
        let installed = match &want {
            Want::Inode { .. } => Ok(()),
            Want::Entry { dir, name, .. } => self.install_entry(*dir, name, fetched),
            Want::Entries { dir, after } => {
                self.install_entries(*dir, *after, fetched);
                Ok(())
            }
            Want::Map { ino, first_chunk, chunks } => {
                self.install_siblings(&fetched.siblings, at);
                self.install_map(*ino, *first_chunk, *chunks, fetched)
            }
            Want::Xattrs { ino, .. } => self.install_xattrs(*ino, fetched),
        };
        Some(Effect::Answered(number, installed))
    }

    fn install_lease(&mut self, now: Now, lease: &v1::InodeLease, asked: bool) {
        let node = self.nodes.entry(Ino(lease.ino)).or_insert_with(Node::unknown);
        if lease.grant < node.lease.grant {
            return;
        }
        let level = Level::from_proto(lease.level);
        if node.lease.level == Level::None {
            node.drop_cached();
        }
        if asked && level > node.lease.level {
            node.lease.pinned_until = Some(now.boot + PIN);
        }
        node.lease.grant = lease.grant;
        node.lease.level = node.lease.level.max(level);
        node.told_open = false;
    }

    /// `at`: the directory has applied at least so much of the log before it answered.
    fn install_inode(&mut self, inode: &v1::Inode, at: LogPosition) {
        let Some(node) = self.nodes.get_mut(&Ino(inode.ino)) else { return };
        if node.lease.level == Level::None {
            return;
        }
        if let Some(attributes) = &mut node.attributes {
            if node.allocated_guessed && node.logged <= at {
                attributes.allocated_bytes = inode.allocated_bytes;
                node.allocated_guessed = false;
            }
            return;
        }
        let Some(attributes) = attributes_from_proto(inode) else { return };
        node.attributes = Some(attributes);
        node.logged_size = attributes.size;
        node.tail_checked = inode.allocated_bytes == 0;
        node.parent = Ino(inode.parent);
        node.has_xattrs = inode.has_xattrs;
        node.xattrs = (!inode.has_xattrs).then(Default::default);
        match attributes.kind {
            FileKind::Directory => {
                let next_cookie = inode.next_cookie;
                node.names = Some(Box::new(DirNames { next_cookie, ..DirNames::default() }));
            }
            FileKind::Regular => {
                node.data = Some(Box::new(if inode.allocated_bytes == 0 {
                    FileData::new_file()
                } else {
                    FileData::known_file()
                }));
            }
            FileKind::Symlink => {
                let target = self.config.names.open_target(attributes.ino, &inode.sealed_target);
                node.target = target.ok().map(Into::into);
            }
            FileKind::Fifo | FileKind::Socket | FileKind::CharDevice | FileKind::BlockDevice => {}
        }
    }

    fn install_entry(
        &mut self,
        dir: Ino,
        name: &[u8],
        fetched: &v1::Fetched,
    ) -> Result<(), FsError> {
        let dentry = match fetched.entries.first() {
            Some(entry) if entry.ino != 0 => {
                let (ino, cookie) = (Ino(entry.ino), entry.cookie);
                let told = fetched.inodes.iter().find(|inode| inode.ino == ino.0);
                let told = told.and_then(|inode| FileKind::from_mode(inode.mode));
                Dentry::Present { ino, cookie, kind: self.kind_of(ino, told) }
            }
            _ => Dentry::Absent,
        };
        let Some(node) = self.nodes.get_mut(&dir) else { return Ok(()) };
        if node.lease.level > Level::None {
            let names = node.names.get_or_insert_default();
            if names.get(name).is_none() {
                names.put(name, dentry);
            }
        }
        Ok(())
    }

    fn install_entries(&mut self, dir: Ino, after: u64, fetched: &v1::Fetched) {
        let told = fetched.inodes.iter().map(|inode| (inode.ino, FileKind::from_mode(inode.mode)));
        let told: HashMap<u64, Option<FileKind>> = told.collect();
        let mut unlistable = None;
        let mut opened = Vec::with_capacity(fetched.entries.len());
        for entry in &fetched.entries {
            let hash: Option<NameHash> = entry.name_hash[..].try_into().ok();
            let name = hash
                .and_then(|hash| self.config.names.open_name(dir, &hash, &entry.sealed_name).ok());
            let Some(name) = name else {
                unlistable.get_or_insert(entry.cookie);
                continue;
            };
            let (ino, cookie) = (Ino(entry.ino), entry.cookie);
            let kind = self.kind_of(ino, told.get(&ino.0).copied().flatten());
            opened.push((name, Dentry::Present { ino, cookie, kind }));
        }
        let Some(node) = self.nodes.get_mut(&dir) else { return };
        if node.lease.level == Level::None {
            return;
        }
        let names = node.names.get_or_insert_default();
        names.listing = false;
        for (name, dentry) in opened {
            if names.get(&name).is_none() {
                names.put(&name, dentry);
            }
        }
        names.unlistable = names.unlistable.or(unlistable);
        if after <= names.listed && unlistable.is_none() {
            let last = fetched.entries.last().map_or(after, |entry| entry.cookie);
            names.listed = names.listed.max(last);
            names.complete |= fetched.complete;
        }
        if names.complete {
            names.names.retain(|_, dentry| *dentry != Dentry::Absent);
        }
    }

    fn install_xattrs(&mut self, ino: Ino, fetched: &v1::Fetched) -> Result<(), FsError> {
        let mut xattrs = std::collections::BTreeMap::new();
        for xattr in &fetched.xattrs {
            let hash: Option<NameHash> = xattr.name_hash[..].try_into().ok();
            let opened =
                hash.and_then(|hash| self.config.names.open_xattr(ino, &hash, &xattr.sealed).ok());
            let Some(opened) = opened else {
                return Err(FsError::Io(format!("inode {ino}: an xattr fails its seal")));
            };
            xattrs.insert(opened.name, opened.value.into());
        }
        if let Some(node) = self.nodes.get_mut(&ino)
            && node.lease.level > Level::None
            && node.xattrs.is_none()
        {
            node.xattrs = Some(xattrs);
        }
        Ok(())
    }

    /// What an inode is, if it was not told; its kind never changes, so the cache may know it too.
    fn kind_of(&self, ino: Ino, told: Option<FileKind>) -> Option<FileKind> {
        let known = || self.nodes.get(&ino).and_then(|node| node.attributes);
        told.or_else(|| known().map(|attributes| attributes.kind))
    }

    /// Where a block is, as the directory says now.
    pub fn remember_block(&mut self, block: &v1::BlockInfo) -> Option<Arc<BlockInfo>> {
        let info = Arc::new(BlockInfo::from_proto(block)?);
        self.blocks.insert(info.id, Arc::clone(&info));
        Some(info)
    }
}

impl Want {
    /// The inode it is about.
    pub fn ino(&self) -> Ino {
        match self {
            Self::Inode { ino, .. } | Self::Map { ino, .. } | Self::Xattrs { ino, .. } => *ino,
            Self::Entry { dir, .. } | Self::Entries { dir, .. } => *dir,
        }
    }
}
