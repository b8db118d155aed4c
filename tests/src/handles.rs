//! File handles as an NFS server keeps them: a file without its name.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// More than any file system of Linux needs (`MAX_HANDLE_SZ`).
const HANDLE_BYTES_MAX: usize = 128;
const HEAD_BYTES: usize = size_of::<libc::file_handle>();

/// A `struct file_handle` with room behind it, aligned as it must be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FileHandle(Vec<u32>);

impl FileHandle {
    /// The handle of what is at `path`.
    ///
    /// # Errors
    /// What the system says.
    pub fn of(path: &Path) -> io::Result<Self> {
        let name = CString::new(path.as_os_str().as_bytes())?;
        let mut words = vec![0u32; (HEAD_BYTES + HANDLE_BYTES_MAX) / 4];
        words[0] = HANDLE_BYTES_MAX as u32;
        let mut mount_id = 0;
        // SAFETY: `words` has room for the head and for the bytes that its first field states; `name`
        // ends with a NUL; both outlive the call.
        let done = unsafe {
            let handle = words.as_mut_ptr().cast::<libc::file_handle>();
            libc::name_to_handle_at(libc::AT_FDCWD, name.as_ptr(), handle, &raw mut mount_id, 0)
        };
        if done == 0 { Ok(Self(words)) } else { Err(io::Error::last_os_error()) }
    }

    /// Opens what it stands for, on the file system that `disk` is part of.
    ///
    /// # Errors
    /// What the system says; `ESTALE` where it is gone.
    pub fn open(&self, disk: &File, flags: i32) -> io::Result<File> {
        let mut words = self.0.clone();
        // SAFETY: `words` is a handle that the kernel filled, whole; the descriptor it gives is new and
        // nobody else's.
        unsafe {
            let handle = words.as_mut_ptr().cast::<libc::file_handle>();
            match libc::open_by_handle_at(disk.as_raw_fd(), handle, flags) {
                -1 => Err(io::Error::last_os_error()),
                descriptor => Ok(File::from_raw_fd(descriptor)),
            }
        }
    }
}
