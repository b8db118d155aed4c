//! POSIX ACLs: kept, inherited, checked, and the same on another mount.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::fs::{XattrFlags, getxattr, setxattr};
use us_tests::cluster::{Cluster, Shape, fuse_is_here};

const ACCESS: &str = "system.posix_acl_access";
const DEFAULT: &str = "system.posix_acl_default";
/// A user without any rights of his own.
const GUEST: u32 = 65_534;
/// The tags of an entry, as the kernel numbers them.
const USER_OBJ: u16 = 0x01;
const USER: u16 = 0x02;
const GROUP_OBJ: u16 = 0x04;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;
const NOBODY: u32 = u32::MAX;

/// The bytes of an ACL: version 2, then (tag, permissions, id).
fn acl(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    let mut bytes = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(permissions.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

/// That of a file which only its owner and the guest may use.
fn for_guest(permissions: u16) -> Vec<u8> {
    acl(&[
        (USER_OBJ, 6, NOBODY),
        (USER, permissions, GUEST),
        (GROUP_OBJ, 0, NOBODY),
        (MASK, 6, NOBODY),
        (OTHER, 0, NOBODY),
    ])
}

fn get(path: &Path, name: &str) -> Option<Vec<u8>> {
    let mut bytes = vec![0; 1024];
    let length = getxattr(path, name, &mut bytes[..]).ok()?;
    bytes.truncate(length);
    Some(bytes)
}

fn guest_can(what: &str, path: &Path) -> bool {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", what, "sh"]).arg(path).uid(GUEST).gid(GUEST);
    command.stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap().success()
}

const READ: &str = r#"cat "$1""#;
const WRITE: &str = r#"echo more >> "$1""#;

#[test]
fn access_control_lists_are_kept_inherited_and_checked_on_every_mount() {
    if !fuse_is_here() {
        return;
    }
    let mut cluster = Cluster::start(Shape::default());
    let left = cluster.mount_with(&["-o", "allow_other"]);
    let right = cluster.mount_with(&["-o", "allow_other"]);
    // The guest must get as far as the mounts.
    let root = left.path().parent().unwrap();
    fs::set_permissions(root, Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(left.path(), Permissions::from_mode(0o755)).unwrap();
    let (here, there) = (left.path().join("file"), right.path().join("file"));
    fs::write(&here, b"for one guest\n").unwrap();
    fs::set_permissions(&here, Permissions::from_mode(0o600)).unwrap();
    assert!(!guest_can(READ, &here) && !guest_can(READ, &there));

    setxattr(&here, ACCESS, &for_guest(4), XattrFlags::empty()).unwrap();
    for path in [&here, &there] {
        assert_eq!(get(path, ACCESS).unwrap(), for_guest(4));
        assert!(guest_can(READ, path) && !guest_can(WRITE, path), "{}", path.display());
        // The mask is what `ls` shows as the group's.
        assert_eq!(fs::metadata(path).unwrap().mode() & 0o777, 0o660);
    }
    setxattr(&there, ACCESS, &for_guest(6), XattrFlags::empty()).unwrap();
    assert!(guest_can(WRITE, &there) && guest_can(WRITE, &here));
    // chmod of the group's bits changes the mask, and the mask takes the guest's rights away.
    fs::set_permissions(&here, Permissions::from_mode(0o600)).unwrap();
    assert!(!guest_can(READ, &here) && !guest_can(READ, &there));

    // A default ACL is inherited, by files and by directories below.
    let (dir, elsewhere) = (left.path().join("dir"), right.path().join("dir"));
    fs::create_dir(&dir).unwrap();
    fs::set_permissions(&dir, Permissions::from_mode(0o755)).unwrap();
    setxattr(&dir, DEFAULT, &for_guest(4), XattrFlags::empty()).unwrap();
    fs::write(elsewhere.join("inherits"), b"yes\n").unwrap();
    fs::create_dir(elsewhere.join("below")).unwrap();
    assert_eq!(get(&dir.join("below"), DEFAULT).unwrap(), for_guest(4));
    let inherited = get(&dir.join("inherits"), ACCESS).unwrap();
    assert!(inherited.windows(8).any(|entry| entry == &acl(&[(USER, 4, GUEST)])[4..]));
    assert!(guest_can(READ, &dir.join("inherits")) && guest_can(READ, &elsewhere.join("inherits")));
    assert!(!guest_can(WRITE, &dir.join("inherits")));
    assert_eq!(get(&dir.join("inherits"), DEFAULT), None, "files have none");
    left.unmount();
    right.unmount();
}
