//! Who has a database open: a lock on one byte of its mark, shared by all connections that found
//! the local file level with the log, or joined one that had.
//!
//! SQLite's own locks do not tell: whoever is still finding out what the file holds takes them as
//! well, and so does a process without durovfs. The lock belongs to the open file (`F_OFD_SETLK`,
//! fcntl(2)), not to the process, so that connections of one process count each other, and it goes
//! with the last descriptor, however the process ends.

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc::{F_RDLCK, F_UNLCK, F_WRLCK, SEEK_SET, c_int, flock, off_t};
use std::fs::File;
use std::io;

/// Where the byte is: in a part of the mark that holds nothing.
const BYTE: off_t = 1280;

fn lock_of(kind: c_int) -> flock {
    flock {
        l_type: kind as i16,
        l_whence: SEEK_SET as i16,
        l_start: BYTE,
        l_len: 1,
        l_pid: 0,
    }
}

/// Counts this open mark among those that have the database open, until it is closed.
///
/// # Errors
/// When the file system has no such locks.
pub(crate) fn hold(mark: &File) -> io::Result<()> {
    // Nobody holds it exclusively, so that nobody ever waits.
    fcntl(mark, FcntlArg::F_OFD_SETLK(&lock_of(F_RDLCK)))?;
    Ok(())
}

/// Whether another open mark is counted.
///
/// # Errors
/// When the file system has no such locks.
pub(crate) fn is_held_by_others(mark: &File) -> io::Result<bool> {
    let mut lock = lock_of(F_WRLCK);
    fcntl(mark, FcntlArg::F_OFD_GETLK(&mut lock))?;
    Ok(c_int::from(lock.l_type) != F_UNLCK)
}
