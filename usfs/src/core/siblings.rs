//! Maps of small files, fetched many at once: who reads a file of a directory reads the next one.
//!
//! The map of a file is a question to the directory service, which for a small file takes as long as all
//! else about it. So with the map of one small file those of others of its directory are asked for, more
//! each time, in the order of the listing. Nothing is recalled for them: the mount holds their leases,
//! or they do not come.

use us_core::ids::Ino;
use us_core::limits::{SIBLINGS_MAX, SMALL_FILE_BYTES};
use us_proto::v1;

use super::node::{Dentry, Level, Node};
use super::{Core, Want};
use crate::attributes::FileKind;
use crate::session::log::LogPosition;

/// With the second small file of a directory whose map is asked for come so many others.
const FIRST: usize = 8;
/// Names looked at for one request.
const LOOKED_AT_MAX: usize = 2048;

impl Core {
    /// Other files whose maps `want` should bring along.
    pub(super) fn siblings(&mut self, want: &Want) -> Vec<u64> {
        let Want::Map { ino, first_chunk: 0, .. } = *want else { return Vec::new() };
        let asked = self.nodes.get(&ino).filter(|node| is_small(node));
        let Some(dir) = asked.map(|node| node.beside) else { return Vec::new() };
        // Names leave the map while the nodes are looked at.
        let names = self.nodes.get_mut(&dir).and_then(|node| node.names.take());
        let Some(mut names) = names else { return Vec::new() };
        let wanted = names.siblings_wanted;
        names.siblings_wanted = (wanted * 8).clamp(FIRST, SIBLINGS_MAX);
        let mut siblings = Vec::new();
        let from = names.siblings_from;
        for (cookie, name) in names.order.range(from..).take(LOOKED_AT_MAX) {
            if siblings.len() == wanted {
                break;
            }
            names.siblings_from = cookie + 1;
            if let Some(Dentry::Present { ino: sibling, .. }) = names.names.get(name)
                && *sibling != ino
                && self.nodes.get(sibling).is_some_and(is_unmapped)
            {
                siblings.push(sibling.0);
            }
        }
        if siblings.len() < wanted && names.order.range(names.siblings_from..).next().is_none() {
            // Through: maps that are dropped from now on come along in a further pass.
            (names.siblings_from, names.siblings_wanted) = (0, 0);
        }
        if let Some(node) = self.nodes.get_mut(&dir) {
            node.names = Some(names);
        }
        siblings
    }

    /// The maps that came along. `at`: the directory had applied at least so much of the log.
    pub(super) fn install_siblings(&mut self, maps: &[v1::SiblingMap], at: LogPosition) {
        for map in maps {
            let ino = Ino(map.ino);
            let node = self.nodes.get(&ino).filter(|node| is_unmapped(node));
            if node.is_some_and(|node| node.logged <= at) {
                // One that makes no sense is asked for again by whoever needs it, and refused then.
                let _ = self.install_chunks(ino, 0..1, map.chunk.as_slice(), map.complete);
            }
        }
    }
}

fn is_small(node: &Node) -> bool {
    node.attributes.is_some_and(|attributes| {
        attributes.kind == FileKind::Regular && attributes.size <= SMALL_FILE_BYTES
    })
}

/// A small file with bytes at the directory, whose map may be kept and is not here.
fn is_unmapped(node: &Node) -> bool {
    node.lease.usable() > Level::None
        && is_small(node)
        && node.data.as_ref().is_some_and(|data| !data.map().is_known(0))
}
