//! Listings of directories, in the stable order of cookies.
//!
//! What the caller passes and gets as a cookie is the directory's cookie plus [`DOTS`]; 1 is behind
//! ".", 2 behind "..".

use us_core::ids::Ino;

use super::node::{Dentry, Level};
use super::{Core, Now, Stall, Stop, Want};
use crate::attributes::FileKind;
use crate::fs::{FsError, Listed};

/// Names a listing begins with that no directory stores.
const DOTS: u64 = 2;

impl Core {
    /// Lists names after `cookie` into `sink` until it refuses one, or the end. Names told before a
    /// stall stay told: the answer is the cookie to go on from, and the stall if there is one. With
    /// `plus` every name has its entry; a listing ends early at one that must be fetched.
    pub fn list(
        &mut self,
        now: Now,
        dir: Ino,
        cookie: u64,
        plus: bool,
        sink: &mut (dyn for<'a> FnMut(Listed<'a>) -> bool + Send),
    ) -> (u64, Result<(), Stop>) {
        let mut at = cookie;
        let result = self.list_from(now, dir, &mut at, plus, sink);
        (at, result)
    }

    fn list_from(
        &mut self,
        now: Now,
        dir: Ino,
        at: &mut u64,
        plus: bool,
        sink: &mut (dyn for<'a> FnMut(Listed<'a>) -> bool + Send),
    ) -> Result<(), Stop> {
        self.check_session(now)?;
        let cookie = *at;
        let parent = self.need_dir(dir, Level::Shared)?.parent;
        if self.attributes_mut(dir).nlink == 0 {
            return Ok(());
        }
        for (position, name, ino) in [(0, &b"."[..], dir), (1, &b".."[..], parent)] {
            let listed = Listed {
                ino: if ino.0 == 0 { dir } else { ino },
                kind: FileKind::Directory,
                cookie: position + 1,
                name,
                entry: None,
            };
            if *at == position {
                if !sink(listed) {
                    return Ok(());
                }
                *at = position + 1;
            }
        }
        // Names leave the map while they are told, so that entries can be made and counted.
        let names = self.nodes.get_mut(&dir).and_then(|node| node.names.take());
        let names = names.ok_or(FsError::NotADirectory)?;
        let told = self.tell_names(now, dir, &names, at, plus, sink);
        let (complete, listed, unlistable) = (names.complete, names.listed, names.unlistable);
        if let Some(node) = self.nodes.get_mut(&dir) {
            node.names = Some(names);
        }
        match told {
            Told::Missing(ino) if *at == cookie.max(DOTS) => {
                let level = Level::Shared;
                return Err(Stop::Stall(Stall::Fetch(Want::Inode { ino, level })));
            }
            Told::Full | Told::Missing(_) => return Ok(()),
            Told::All if complete => return Ok(()),
            Told::All => check_listable(dir, unlistable)?,
        }
        Err(Stop::Stall(Stall::Fetch(Want::Entries { dir, after: listed })))
    }

    fn tell_names(
        &mut self,
        now: Now,
        dir: Ino,
        names: &super::DirNames,
        at: &mut u64,
        plus: bool,
        sink: &mut (dyn for<'a> FnMut(Listed<'a>) -> bool + Send),
    ) -> Told {
        for (cookie, name) in names.order.range((*at + 1).saturating_sub(DOTS)..) {
            if !names.complete && *cookie > names.listed {
                break;
            }
            let Some(Dentry::Present { ino, kind, .. }) = names.names.get(name) else { continue };
            let known = self.nodes.get(ino).and_then(|node| node.attributes);
            let Some(kind) = kind.or(known.map(|attributes| attributes.kind)) else {
                return Told::Missing(*ino);
            };
            let entry = if plus { self.entry(now, *ino, Some(dir)) } else { None };
            if plus && entry.is_none() {
                return Told::Missing(*ino);
            }
            let cookie = cookie + DOTS;
            if !sink(Listed { ino: *ino, kind, cookie, name, entry }) {
                return Told::Full;
            }
            if entry.is_some() {
                self.count_lookup(*ino, dir);
            }
            *at = cookie;
        }
        Told::All
    }
}

/// A name that cannot be opened ends every listing: none may look complete without it.
pub(super) fn check_listable(dir: Ino, unlistable: Option<u64>) -> Result<(), FsError> {
    unlistable.map_or(Ok(()), |cookie| {
        Err(FsError::Io(format!("directory {dir}: the name at cookie {cookie} fails its seal")))
    })
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Told {
    /// All that is known.
    All,
    /// The sink took no more.
    Full,
    /// Up to a name whose attributes are not known: another mount holds them.
    Missing(Ino),
}
