//! The keys of the store. Each starts with the volume (16 bytes; zeros for the cluster's own), then
//! a tag byte, then big-endian numbers, so that keys sort as what they mean.
//!
//! ARCHITECTURE.md has the table; this module is its only implementation. Of the cluster's own:
//! `s` sessions, `g` dead blocks by due time, `q` fragments a provider is to delete, `v` volumes,
//! `y` providers, `h` provider of a key hash, `e` events, `a` members, `j` invitations, `z` their
//! counters, `w` where the image of the state lies, `n` the cluster's counters.

use bytes::{BufMut, Bytes, BytesMut};
use us_core::ids::{BlockId, VolumeId};

/// The volume field of the cluster's own keys.
pub const CLUSTER: VolumeId = VolumeId::from_bytes([0; 16]);

/// Bytes before a key's numbers: volume and tag.
pub const HEAD_BYTES: usize = 17;

fn key(volume: &VolumeId, tag: u8, rest: usize) -> BytesMut {
    let mut key = BytesMut::with_capacity(HEAD_BYTES + rest);
    key.put_slice(volume.as_bytes());
    key.put_u8(tag);
    key
}

fn numbers(volume: &VolumeId, tag: u8, values: &[u64]) -> Bytes {
    let mut key = key(volume, tag, 8 * values.len());
    values.iter().for_each(|value| key.put_u64(*value));
    key.freeze()
}

fn number_and_hash(volume: &VolumeId, tag: u8, number: u64, hash: &[u8]) -> Bytes {
    let mut key = key(volume, tag, 8 + hash.len());
    key.put_u64(number);
    key.put_slice(hash);
    key.freeze()
}

/// All keys with this tag of a volume.
pub fn tag(volume: &VolumeId, tag: u8) -> Bytes {
    key(volume, tag, 0).freeze()
}

/// All keys of a volume.
pub fn volume_prefix(volume: &VolumeId) -> Bytes {
    Bytes::copy_from_slice(volume.as_bytes())
}

/// `i` ino: attributes.
pub fn inode(volume: &VolumeId, ino: u64) -> Bytes {
    numbers(volume, b'i', &[ino])
}

/// `d` dir, name hash: what a name is.
pub fn entry(volume: &VolumeId, dir: u64, name_hash: &[u8]) -> Bytes {
    number_and_hash(volume, b'd', dir, name_hash)
}

/// `c` dir, cookie: the listing order.
pub fn cookie(volume: &VolumeId, dir: u64, cookie: u64) -> Bytes {
    numbers(volume, b'c', &[dir, cookie])
}

/// All `c` keys of a directory.
pub fn cookies(volume: &VolumeId, dir: u64) -> Bytes {
    numbers(volume, b'c', &[dir])
}

/// `x` ino, name hash: a sealed xattr.
pub fn xattr(volume: &VolumeId, ino: u64, name_hash: &[u8]) -> Bytes {
    number_and_hash(volume, b'x', ino, name_hash)
}

/// All `x` keys of an inode.
pub fn xattrs(volume: &VolumeId, ino: u64) -> Bytes {
    numbers(volume, b'x', &[ino])
}

/// `m` ino, chunk: the map of 4 MiB of a file.
pub fn chunk(volume: &VolumeId, ino: u64, chunk: u64) -> Bytes {
    numbers(volume, b'm', &[ino, chunk])
}

/// All `m` keys of an inode.
pub fn chunks(volume: &VolumeId, ino: u64) -> Bytes {
    numbers(volume, b'm', &[ino])
}

/// `b` block: geometry, place, state.
pub fn block(volume: &VolumeId, block: &BlockId) -> Bytes {
    let mut key = key(volume, b'b', 16);
    key.put_slice(block.as_bytes());
    key.freeze()
}

/// `r` block, ino, chunk: bytes of the block that the chunk refers to.
pub fn reference(volume: &VolumeId, block: &BlockId, ino: u64, chunk: u64) -> Bytes {
    let mut key = key(volume, b'r', 32);
    key.put_slice(block.as_bytes());
    key.put_u64(ino);
    key.put_u64(chunk);
    key.freeze()
}

/// All `r` keys of a block.
pub fn references(volume: &VolumeId, block: &BlockId) -> Bytes {
    let mut key = key(volume, b'r', 16);
    key.put_slice(block.as_bytes());
    key.freeze()
}

/// `p` provider, block: the fragments of a block that a provider holds.
pub fn holding(volume: &VolumeId, provider: u32, block: &BlockId) -> Bytes {
    let mut key = key(volume, b'p', 20);
    key.put_u32(provider);
    key.put_slice(block.as_bytes());
    key.freeze()
}

/// All `p` keys of a provider in a volume.
pub fn holdings(volume: &VolumeId, provider: u32) -> Bytes {
    let mut key = key(volume, b'p', 4);
    key.put_u32(provider);
    key.freeze()
}

/// `o` session, ino: open but unlinked.
pub fn orphan(volume: &VolumeId, session: u64, ino: u64) -> Bytes {
    numbers(volume, b'o', &[session, ino])
}

/// All `o` keys of a session.
pub fn orphans(volume: &VolumeId, session: u64) -> Bytes {
    numbers(volume, b'o', &[session])
}

/// `k` ino: deleted, its map not yet freed.
pub fn doomed(volume: &VolumeId, ino: u64) -> Bytes {
    numbers(volume, b'k', &[ino])
}

/// `t` when it was removed, ino: something in the trash.
pub fn trashed(volume: &VolumeId, at_ms: u64, ino: u64) -> Bytes {
    numbers(volume, b't', &[at_ms, ino])
}

/// The end of the `t` keys of what was removed at `at_ms` or before.
pub fn trashed_end(volume: &VolumeId, at_ms: u64) -> Bytes {
    numbers(volume, b't', &[at_ms.saturating_add(1)])
}

/// When what a `t` key names was removed.
pub fn trashed_at(key: &[u8]) -> u64 {
    last_number(&key[..key.len().saturating_sub(8)])
}

/// `u`: what a volume uses.
pub fn usage(volume: &VolumeId) -> Bytes {
    tag(volume, b'u')
}

/// `s` session.
pub fn session(session: u64) -> Bytes {
    numbers(&CLUSTER, b's', &[session])
}

/// `g` due, block: a dead block whose fragments go when due.
pub fn grave(due_ms: u64, block: &BlockId) -> Bytes {
    number_and_hash(&CLUSTER, b'g', due_ms, block.as_bytes())
}

/// The end of the `g` keys that are due at `now_ms`.
pub fn graves_end(now_ms: u64) -> Bytes {
    numbers(&CLUSTER, b'g', &[now_ms.saturating_add(1)])
}

/// `q` provider, block: fragments the provider is to delete now.
pub fn delete(provider: u32, block: &BlockId) -> Bytes {
    let mut key = key(&CLUSTER, b'q', 20);
    key.put_u32(provider);
    key.put_slice(block.as_bytes());
    key.freeze()
}

/// All `q` keys of a provider.
pub fn deletes(provider: u32) -> Bytes {
    let mut key = key(&CLUSTER, b'q', 4);
    key.put_u32(provider);
    key.freeze()
}

/// `v` volume: its record.
pub fn volume(volume: &VolumeId) -> Bytes {
    number_and_hash_free(b'v', volume.as_bytes())
}

/// `y` provider: its record.
pub fn provider(provider: u32) -> Bytes {
    let mut key = key(&CLUSTER, b'y', 4);
    key.put_u32(provider);
    key.freeze()
}

/// `e` number: an event, for people.
pub fn event(number: u64) -> Bytes {
    numbers(&CLUSTER, b'e', &[number])
}

/// `a` key hash: a member.
pub fn joined(key_hash: &[u8]) -> Bytes {
    number_and_hash_free(b'a', key_hash)
}

/// `j` hash of a secret: an invitation.
pub fn invite(secret_hash: &[u8]) -> Bytes {
    number_and_hash_free(b'j', secret_hash)
}

/// `z`: the number of the list of refused keys.
pub fn registry() -> Bytes {
    tag(&CLUSTER, b'z')
}

/// `w`: where the image of the state lies.
pub fn root() -> Bytes {
    tag(&CLUSTER, b'w')
}

/// `n`: the cluster's counters.
pub fn cluster() -> Bytes {
    tag(&CLUSTER, b'n')
}

fn number_and_hash_free(tag: u8, bytes: &[u8]) -> Bytes {
    let mut key = key(&CLUSTER, tag, bytes.len());
    key.put_slice(bytes);
    key.freeze()
}

/// The big-endian number at the end of a key.
pub fn last_number(key: &[u8]) -> u64 {
    let tail = key.len().saturating_sub(8);
    key[tail..].try_into().map_or(0, u64::from_be_bytes)
}

/// The block id at the end of a key.
pub fn last_block(key: &[u8]) -> Option<BlockId> {
    BlockId::from_slice(key.get(key.len().checked_sub(16)?..)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_sort_as_their_numbers() {
        let volume = VolumeId::from_bytes([7; 16]);
        assert!(chunk(&volume, 1, 255) < chunk(&volume, 1, 256));
        assert!(chunk(&volume, 1, u64::MAX) < chunk(&volume, 2, 0));
        assert_eq!(last_number(&chunk(&volume, 9, 77)), 77);
        let id = BlockId::from_bytes([3; 16]);
        assert_eq!(last_block(&grave(5, &id)), Some(id));
        assert!(grave(5, &id) < graves_end(5));
        assert!(grave(6, &id) >= graves_end(5));
    }
}
