//! What is asked of the kernel outside FUSE's own protocol: the mount call, the table of mounts, the
//! read-ahead of a mount.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, UnmountFlags};

use super::MountOptions;

/// The type of our mounts in the table of mounts: FUSE, and whose.
pub const FILE_SYSTEM_TYPE: &str = "fuse.usfs";

/// A line of `/proc/self/mountinfo`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountEntry {
    /// Device number, as "MAJ:MIN".
    pub device: String,
    /// Where it is mounted.
    pub point: PathBuf,
    /// Type, such as [`FILE_SYSTEM_TYPE`].
    pub kind: String,
    /// What is mounted: for ours, "directory/volume".
    pub source: String,
    /// The mount's own options, separated by commas.
    pub options: String,
}

/// Everything mounted in this mount namespace, oldest first.
///
/// # Errors
/// When /proc is not there.
pub fn mounts() -> io::Result<Vec<MountEntry>> {
    let table = std::fs::read_to_string("/proc/self/mountinfo")?;
    Ok(table.lines().filter_map(parse_mount).collect())
}

/// What is mounted exactly at `point`; the newest where there are several.
///
/// # Errors
/// When /proc is not there.
pub fn mount_at(point: &Path) -> io::Result<Option<MountEntry>> {
    Ok(mounts()?.into_iter().rfind(|entry| entry.point == point))
}

/// The mount that holds `path` (absolute, without symbolic links).
///
/// # Errors
/// When /proc is not there.
pub fn mount_of(path: &Path) -> io::Result<Option<MountEntry>> {
    let covering = mounts()?.into_iter().filter(|entry| path.starts_with(&entry.point));
    Ok(covering.max_by_key(|entry| entry.point.components().count()))
}

/// Reads a line of `/proc/self/mountinfo`; `None` for another text.
pub fn parse_mount(line: &str) -> Option<MountEntry> {
    let (place, what) = line.split_once(" - ")?;
    let mut place = place.split(' ').skip(2);
    let device = place.next()?.to_owned();
    let point = PathBuf::from(unescape(place.nth(1)?));
    let options = place.next()?.to_owned();
    let mut what = what.split(' ');
    let kind = what.next()?.to_owned();
    Some(MountEntry { device, point, kind, source: unescape(what.next()?), options })
}

/// The table writes blanks, tabs, newlines and backslashes as three octal digits.
fn unescape(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        let octal = tail.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.filter(|_| *first == b'\\').and_then(|o| u8::from_str_radix(o, 8).ok()) {
            Some(byte) => {
                out.push(byte);
                rest = &tail[3..];
            }
            None => {
                out.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

pub(super) fn open_device() -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open("/dev/fuse")
}

/// Mounts without any helper program, which the kernel allows root alone. Done here and not by
/// fuser, because fuser 0.18 leaves the subtype out, and nothing would tell our mounts from others.
pub(super) fn mount(point: &Path, options: &MountOptions) -> io::Result<OwnedFd> {
    let device = open_device()?;
    let root_mode = File::open(point)?.metadata().map(|meta| {
        use std::os::unix::fs::MetadataExt;
        meta.mode() & libc::S_IFMT
    })?;
    let mut data = format!(
        "fd={},rootmode={root_mode:o},user_id={},group_id={},default_permissions",
        device.as_raw_fd(),
        rustix::process::getuid().as_raw(),
        rustix::process::getgid().as_raw(),
    );
    if options.allow_other {
        data.push_str(",allow_other");
    }
    let flags = options.flags();
    let data = std::ffi::CString::new(data)?;
    rustix::mount::mount(&options.source, point, FILE_SYSTEM_TYPE, flags, data.as_c_str())?;
    Ok(device.into())
}

/// Changes what the kernel allows on a mount. Who else may use it stays as it was mounted.
///
/// # Errors
/// What the system says: EBUSY where files are open for writing and it is to become read-only.
pub fn remount(point: &Path, options: &MountOptions) -> io::Result<()> {
    Ok(rustix::mount::mount_remount(point, options.flags(), c"")?)
}

impl MountOptions {
    fn flags(&self) -> MountFlags {
        let mut flags = MountFlags::empty();
        for (wanted, flag) in [
            (self.read_only, MountFlags::RDONLY),
            (!self.suid, MountFlags::NOSUID),
            (!self.dev, MountFlags::NODEV),
            (self.no_exec, MountFlags::NOEXEC),
            (self.no_atime, MountFlags::NOATIME),
            (self.sync, MountFlags::SYNCHRONOUS),
        ] {
            flags.set(flag, wanted);
        }
        flags
    }
}

/// Takes the mount away. Plainly, it fails with EBUSY while anything uses it; `detach` hides it at
/// once, and those who use it keep it until they are done.
///
/// # Errors
/// What the system says; without the right to, `fusermount3` is tried.
pub fn unmount(point: &Path, detach: bool) -> io::Result<()> {
    let flags = if detach { UnmountFlags::DETACH } else { UnmountFlags::empty() };
    match rustix::mount::unmount(point, flags) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::PERM) => unmount_with_helper(point, detach),
        Err(errno) => Err(errno.into()),
    }
}

fn unmount_with_helper(point: &Path, detach: bool) -> io::Result<()> {
    let mut command = std::process::Command::new("fusermount3");
    command.arg("-u").args(detach.then_some("-z")).arg("--").arg(point);
    let output = command.output()?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    if said.contains("busy") {
        return Err(io::Error::from_raw_os_error(libc::EBUSY));
    }
    Err(io::Error::other(said))
}

/// Raises the kernel's read-ahead on the mount at `point`, which is 128 KiB whatever FUSE agreed on.
/// Root only; a mount without it reads in smaller requests.
pub(super) fn raise_read_ahead(point: &Path, kib: u32) -> io::Result<()> {
    let Some(entry) = mount_at(point)? else { return Ok(()) };
    let path = format!("/sys/class/bdi/{}/read_ahead_kb", entry.device);
    OpenOptions::new()
        .write(true)
        .open(path)
        .and_then(|mut file| io::Write::write_all(&mut file, kib.to_string().as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_mounts_is_read() {
        let line = r"36 35 0:45 / /mnt/my\040disk rw,nosuid shared:1 master:2 - fuse.usfs [::1]:7/a\134b rw,user_id=0";
        let entry = parse_mount(line).unwrap();
        let wanted = MountEntry {
            device: "0:45".into(),
            point: "/mnt/my disk".into(),
            kind: "fuse.usfs".into(),
            source: r"[::1]:7/a\b".into(),
            options: "rw,nosuid".into(),
        };
        assert_eq!(entry, wanted);
        assert_eq!(parse_mount("36 35 0:45 / /mnt rw"), None);
        assert!(mounts().unwrap().iter().any(|entry| entry.kind == "proc"));
        let holder = mount_of(Path::new("/proc/self")).unwrap().unwrap();
        assert_eq!(holder.point, Path::new("/proc"));
        assert_eq!(mount_at(Path::new("/proc/self")).unwrap(), None);
    }
}
