//! The reference: a file tree that is obviously right. Inodes in a map, names in a list in the order
//! they were made, bytes in a vector.

use std::collections::BTreeMap;

pub type Id = usize;
pub type Outcome<T> = Result<T, i32>;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    File(Vec<u8>),
    Dir(Vec<(String, Id)>),
    Link(String),
}

#[derive(Clone, Debug)]
pub struct Inode {
    pub kind: Kind,
    pub nlink: u32,
    pub mode: u32,
    pub parent: Id,
    pub xattrs: BTreeMap<String, Vec<u8>>,
}

#[derive(Clone, Debug)]
pub struct Tree {
    pub inodes: Vec<Inode>,
}

pub const ROOT: Id = 0;

impl Tree {
    pub fn new() -> Self {
        Self { inodes: vec![Inode::new(Kind::Dir(Vec::new()), 0o777, ROOT)] }
    }

    pub fn find(&self, path: &[&str]) -> Outcome<Id> {
        path.iter().try_fold(ROOT, |dir, name| self.child(dir, name)?.ok_or(libc::ENOENT))
    }

    fn names(&self, dir: Id) -> Outcome<&Vec<(String, Id)>> {
        match &self.inodes[dir].kind {
            Kind::Dir(names) => Ok(names),
            Kind::File(_) | Kind::Link(_) => Err(libc::ENOTDIR),
        }
    }

    fn names_mut(&mut self, dir: Id) -> &mut Vec<(String, Id)> {
        match &mut self.inodes[dir].kind {
            Kind::Dir(names) => names,
            Kind::File(_) | Kind::Link(_) => unreachable!("checked before"),
        }
    }

    pub fn child(&self, dir: Id, name: &str) -> Outcome<Option<Id>> {
        Ok(self.names(dir)?.iter().find(|(known, _)| known == name).map(|(_, id)| *id))
    }

    fn is_dir(&self, id: Id) -> bool {
        matches!(self.inodes[id].kind, Kind::Dir(_))
    }

    pub fn make(&mut self, dir: Id, name: &str, kind: Kind, mode: u32) -> Outcome<Id> {
        if self.child(dir, name)?.is_some() {
            return Err(libc::EEXIST);
        }
        let id = self.inodes.len();
        let inode = Inode::new(kind, mode, dir);
        self.inodes.push(inode);
        if self.is_dir(id) {
            self.inodes[dir].nlink += 1;
        }
        self.names_mut(dir).push((name.to_owned(), id));
        Ok(id)
    }

    pub fn link(&mut self, id: Id, dir: Id, name: &str) -> Outcome<()> {
        if self.child(dir, name)?.is_some() {
            return Err(libc::EEXIST);
        }
        if self.is_dir(id) {
            return Err(libc::EPERM);
        }
        self.inodes[id].nlink += 1;
        self.names_mut(dir).push((name.to_owned(), id));
        Ok(())
    }

    fn take(&mut self, dir: Id, name: &str) -> Id {
        let names = self.names_mut(dir);
        let at = names.iter().position(|(known, _)| known == name).unwrap();
        let (_, id) = names.remove(at);
        if self.is_dir(id) {
            self.inodes[dir].nlink -= 1;
        }
        id
    }

    fn put(&mut self, dir: Id, name: &str, id: Id) {
        self.names_mut(dir).push((name.to_owned(), id));
        if self.is_dir(id) {
            self.inodes[dir].nlink += 1;
            self.inodes[id].parent = dir;
        }
    }

    fn unname(&mut self, id: Id) {
        let nlink = &mut self.inodes[id].nlink;
        *nlink -= 1;
        if self.is_dir(id) {
            self.inodes[id].nlink = 0;
        }
    }

    pub fn remove(&mut self, dir: Id, name: &str, directory: bool) -> Outcome<()> {
        let id = self.child(dir, name)?.ok_or(libc::ENOENT)?;
        match (directory, self.is_dir(id)) {
            (true, false) => return Err(libc::ENOTDIR),
            (false, true) => return Err(libc::EISDIR),
            (true, true) if !self.names(id)?.is_empty() => return Err(libc::ENOTEMPTY),
            _ => {}
        }
        self.take(dir, name);
        self.unname(id);
        Ok(())
    }

    fn lies_in(&self, dir: Id, above: Id) -> bool {
        let mut at = dir;
        while at != above && at != ROOT {
            at = self.inodes[at].parent;
        }
        at == above
    }

    /// `mode`: 0 replace, 1 no replace, 2 exchange.
    pub fn rename(&mut self, from: (Id, &str), to: (Id, &str), mode: u8) -> Outcome<()> {
        self.names(from.0)?;
        self.names(to.0)?;
        let moved = self.child(from.0, from.1)?.ok_or(libc::ENOENT)?;
        let replaced = self.child(to.0, to.1)?;
        match (mode, replaced) {
            (2, None) => return Err(libc::ENOENT),
            (1, Some(_)) => return Err(libc::EEXIST),
            _ => {}
        }
        if replaced == Some(moved) {
            return Ok(());
        }
        if self.is_dir(moved) && self.lies_in(to.0, moved) {
            return Err(libc::EINVAL);
        }
        if let (2, Some(other)) = (mode, replaced) {
            if self.is_dir(other) && self.lies_in(from.0, other) {
                return Err(libc::EINVAL);
            }
            self.take(from.0, from.1);
            self.take(to.0, to.1);
            self.put(to.0, to.1, moved);
            self.put(from.0, from.1, other);
            return Ok(());
        }
        if let Some(other) = replaced {
            match (self.is_dir(moved), self.is_dir(other)) {
                (true, false) => return Err(libc::ENOTDIR),
                (false, true) => return Err(libc::EISDIR),
                (true, true) if !self.names(other)?.is_empty() => return Err(libc::ENOTEMPTY),
                _ => {}
            }
            self.take(to.0, to.1);
            self.unname(other);
        }
        self.take(from.0, from.1);
        self.put(to.0, to.1, moved);
        Ok(())
    }

    pub fn bytes_mut(&mut self, id: Id) -> &mut Vec<u8> {
        match &mut self.inodes[id].kind {
            Kind::File(bytes) => bytes,
            Kind::Dir(_) | Kind::Link(_) => unreachable!("only files are opened"),
        }
    }

    pub fn is_file(&self, id: Id) -> bool {
        matches!(self.inodes[id].kind, Kind::File(_))
    }

    pub fn write(&mut self, id: Id, offset: usize, data: &[u8]) {
        let bytes = self.bytes_mut(id);
        let end = offset + data.len();
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        bytes[offset..end].copy_from_slice(data);
    }

    /// Zeros a range; grows the file to its end if `grow`.
    pub fn zero(&mut self, id: Id, offset: usize, length: usize, grow: bool) {
        let bytes = self.bytes_mut(id);
        if grow && bytes.len() < offset + length {
            bytes.resize(offset + length, 0);
        }
        let end = bytes.len().min(offset + length);
        if offset < end {
            bytes[offset..end].fill(0);
        }
    }
}

impl Inode {
    fn new(kind: Kind, mode: u32, parent: Id) -> Self {
        let nlink = if matches!(kind, Kind::Dir(_)) { 2 } else { 1 };
        Self { kind, nlink, mode, parent, xattrs: BTreeMap::new() }
    }
}
