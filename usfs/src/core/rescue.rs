//! What a person needs to know of a session that ended: which changes are not durable, in words,
//! and which bytes of which files, by their paths.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use us_core::disk::BlockInfo;
use us_core::ids::{BlockId, Ino};
use us_core::name::{NameHash, NameKey};
use us_proto::v1;
use us_proto::v1::mutation::Op;

use super::Core;
use super::node::Dentry;
use crate::attributes::FileKind;
use crate::data::Place;
use crate::data::Places;

/// A piece of a file that is not durable.
#[derive(Clone, Debug)]
pub enum Undurable {
    /// Bytes that are not stored, or were not committed.
    Bytes(Bytes),
    /// A piece of a block that is stored, and whose commit is not durable.
    Block {
        /// The block, and where it lies where that is known.
        block: BlockId,
        /// Where it lies.
        info: Option<Arc<BlockInfo>>,
        /// Which bytes of its plaintext.
        range: Range<usize>,
    },
    /// Zeros of this length, or a hole.
    Zero(u64),
}

/// A file of which something is not durable.
#[derive(Clone, Debug)]
pub struct UndurableFile {
    /// The inode.
    pub ino: Ino,
    /// Where it is, as far as the mount knows; bytes that are not text are escaped.
    pub path: String,
    /// Its size, where it is known.
    pub size: Option<u64>,
    /// Offset and content, oldest first: later ones lie over earlier ones.
    pub pieces: Vec<(u64, Undurable)>,
}

/// Paths of inodes, from the names that are cached and those in the log.
struct Paths<'a> {
    keys: &'a NameKey,
    places: HashMap<Ino, (Ino, Vec<u8>)>,
    /// Names that the log makes, by their hash: a removal has no more than that.
    hashes: HashMap<(u64, Bytes), Vec<u8>>,
}

impl Paths<'_> {
    fn name(&mut self, dir: u64, hash: &Bytes, sealed: &[u8]) -> Vec<u8> {
        let known = NameHash::try_from(&hash[..]).ok();
        let opened = known.and_then(|known| self.keys.open_name(Ino(dir), &known, sealed).ok());
        let name = opened.or_else(|| self.hashes.get(&(dir, hash.clone())).cloned());
        let name = name.unwrap_or_else(|| b"?".to_vec());
        self.hashes.entry((dir, hash.clone())).or_insert_with(|| name.clone());
        name
    }

    fn of(&self, ino: Ino) -> String {
        let mut parts = Vec::new();
        let mut at = ino;
        while at != Ino::ROOT {
            match self.places.get(&at) {
                Some((dir, name)) if parts.len() < 4096 => {
                    parts.push(name.escape_ascii().to_string());
                    at = *dir;
                }
                _ => {
                    parts.push(format!("(inode {at})"));
                    break;
                }
            }
        }
        parts.reverse();
        if at == Ino::ROOT { format!("/{}", parts.join("/")) } else { parts.join("/") }
    }

    fn in_dir(&self, dir: u64, name: &[u8]) -> String {
        let dir = self.of(Ino(dir));
        format!("{}/{}", dir.trim_end_matches('/'), name.escape_ascii())
    }
}

impl Core {
    /// The undurable changes in words, oldest first, and the files with undurable bytes.
    pub fn undurable(&self) -> (Vec<String>, Vec<UndurableFile>) {
        let mut paths =
            Paths { keys: &self.config.names, places: HashMap::new(), hashes: HashMap::new() };
        for (dir, node) in &self.nodes {
            for (name, dentry) in node.names.iter().flat_map(|names| &names.names) {
                if let Dentry::Present { ino, .. } = dentry {
                    paths.places.insert(*ino, (*dir, name.to_vec()));
                }
            }
        }
        let mut words = Vec::new();
        let mut files: BTreeMap<Ino, Places> = BTreeMap::new();
        for mutation in self.log.undurable() {
            let Some(op) = &mutation.op else { continue };
            words.extend(describe(op, &mut paths));
            note_data(op, &mut files);
        }
        for ino in self.uncommitted_files() {
            files.entry(ino).or_default();
        }
        let undurable = files.into_iter().map(|(ino, places)| {
            let mut pieces: Vec<_> =
                places.iter().map(|(range, place)| self.undurable_piece(range, place)).collect();
            let newer = self.uncommitted_pieces(ino).into_iter();
            pieces.extend(newer.map(|(offset, bytes)| (offset, Undurable::Bytes(bytes))));
            let attributes = self.nodes.get(&ino).and_then(|node| node.attributes);
            let size = attributes.map(|attributes| attributes.size);
            UndurableFile { ino, path: paths.of(ino), size, pieces }
        });
        let undurable = undurable.filter(|file| !file.pieces.is_empty()).collect();
        (words, undurable)
    }

    fn undurable_piece(&self, range: Range<u64>, place: &Place) -> (u64, Undurable) {
        let bytes = range.end - range.start;
        let piece = match place {
            Place::Block { block, offset } => {
                let info = self.blocks.peek(block).cloned();
                let range = *offset as usize..(*offset + bytes) as usize;
                Undurable::Block { block: *block, info, range }
            }
            Place::Zero | Place::Hole => Undurable::Zero(bytes),
        };
        (range.start, piece)
    }

    /// The session is over: the reason may say more once the rescue file is written.
    pub fn explain_end(&mut self, why: String) {
        self.ended = Some(why);
    }
}

/// Notes what a mutation says of files' bytes.
fn note_data(op: &Op, files: &mut BTreeMap<Ino, Places>) {
    match op {
        Op::CommitData(commit) => {
            for extent in &commit.extents {
                let block = <[u8; 16]>::try_from(&extent.block[..]).map(BlockId::from_bytes);
                let place = match block {
                    Ok(block) => Place::Block { block, offset: extent.block_offset },
                    Err(_) if extent.zero => Place::Zero,
                    Err(_) => Place::Hole,
                };
                let range = extent.offset..extent.offset.saturating_add(extent.length);
                files.entry(Ino(extent.ino)).or_default().set(range, place);
            }
        }
        Op::SetAttributes(v1::SetAttributes { ino, size: Some(size), .. }) => {
            files.entry(Ino(*ino)).or_default().cut(*size..u64::MAX);
        }
        _ => {}
    }
}

fn describe(op: &Op, paths: &mut Paths<'_>) -> Option<String> {
    Some(match op {
        Op::Create(create) => {
            let name = paths.name(create.dir, &create.name_hash, &create.sealed_name);
            let path = paths.in_dir(create.dir, &name);
            paths.places.entry(Ino(create.ino)).or_insert((Ino(create.dir), name));
            let kind = match FileKind::from_mode(create.mode) {
                Some(FileKind::Directory) => "directory",
                Some(FileKind::Regular) => "file",
                Some(FileKind::Symlink) => "symbolic link",
                _ => "special file",
            };
            format!("made the {kind} {path} (inode {})", create.ino)
        }
        Op::Link(link) => {
            let name = paths.name(link.dir, &link.name_hash, &link.sealed_name);
            format!("linked {} (inode {})", paths.in_dir(link.dir, &name), link.ino)
        }
        Op::Unlink(unlink) => {
            let name = paths.name(unlink.dir, &unlink.name_hash, &[]);
            format!("removed {} (inode {})", paths.in_dir(unlink.dir, &name), unlink.ino)
        }
        Op::Rename(rename) => {
            let from = paths.name(rename.from_dir, &rename.from_hash, &rename.from_sealed_name);
            let to = paths.name(rename.to_dir, &rename.to_hash, &rename.to_sealed_name);
            let (from, to) =
                (paths.in_dir(rename.from_dir, &from), paths.in_dir(rename.to_dir, &to));
            let verb = if rename.exchange { "exchanged" } else { "renamed" };
            format!("{verb} {from} (inode {}) and {to}", rename.ino).replacen(
                " and ",
                if rename.exchange { " and " } else { " to " },
                1,
            )
        }
        Op::SetAttributes(set) => {
            let mut what = Vec::new();
            what.extend(set.mode.map(|mode| format!("mode {mode:o}")));
            what.extend(set.uid.map(|uid| format!("owner {uid}")));
            what.extend(set.gid.map(|gid| format!("group {gid}")));
            what.extend(set.size.map(|size| format!("size {size}")));
            if what.is_empty() {
                what.push("times".to_owned());
            }
            format!("set {} of {} (inode {})", what.join(", "), paths.of(Ino(set.ino)), set.ino)
        }
        Op::SetXattr(set) => {
            let opened = NameHash::try_from(&set.name_hash[..])
                .ok()
                .and_then(|hash| paths.keys.open_xattr(Ino(set.ino), &hash, &set.sealed).ok());
            let name = opened.map_or("?".to_owned(), |xattr| xattr.name.escape_ascii().to_string());
            format!("set the attribute {name} of {} (inode {})", paths.of(Ino(set.ino)), set.ino)
        }
        Op::RemoveXattr(set) => {
            format!("removed an attribute of {} (inode {})", paths.of(Ino(set.ino)), set.ino)
        }
        Op::CommitData(commit) => {
            let mut bytes: BTreeMap<u64, u64> = BTreeMap::new();
            for extent in &commit.extents {
                *bytes.entry(extent.ino).or_default() += extent.length;
            }
            let file = |(ino, bytes): (&u64, &u64)| {
                format!("{bytes} bytes of {} (inode {ino})", paths.of(Ino(*ino)))
            };
            if bytes.is_empty() {
                return None;
            }
            format!("stored {}", bytes.iter().map(file).collect::<Vec<_>>().join(", "))
        }
        // A mount restores nothing.
        Op::Release(_) | Op::FragmentsDurable(_) | Op::Restore(_) => return None,
    })
}
