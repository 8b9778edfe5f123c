//! The files below the shim, as the safe modules see them.
//!
//! Implemented by the host's own file objects (`shim.rs`) and by plain files. The database file and
//! `-shm` are reached only through the host's objects: closing any other descriptor of them would
//! drop the process's POSIX locks.

use crate::error::{Refusal, RefusalKind};
use libsqlite3_sys as sqlite;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

/// Bytes at offsets.
pub trait BaseFile {
    /// Fills `buffer` from `offset`; what lies behind the end reads as zeros. Returns the bytes
    /// that were there.
    ///
    /// # Errors
    /// The file's own result code.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<usize, Refusal>;

    /// Writes all of `bytes` at `offset`.
    ///
    /// # Errors
    /// The file's own result code.
    fn write_at(&self, bytes: &[u8], offset: u64) -> Result<(), Refusal>;

    /// Sets the size.
    ///
    /// # Errors
    /// The file's own result code.
    fn truncate(&self, size: u64) -> Result<(), Refusal>;

    /// Makes all that was written durable.
    ///
    /// # Errors
    /// The file's own result code.
    fn sync(&self) -> Result<(), Refusal>;

    /// Bytes of the file.
    ///
    /// # Errors
    /// The file's own result code.
    fn size(&self) -> Result<u64, Refusal>;

    /// Whether the file is no longer what its name leads to: moved, deleted, or replaced.
    ///
    /// # Errors
    /// The file's own result code.
    fn has_moved(&self) -> Result<bool, Refusal> {
        Ok(false)
    }

    /// Runs `body` while no connection to this database makes a checkpoint; false when one does
    /// now, and nothing is run.
    ///
    /// # Errors
    /// What `body` returns.
    fn outside_checkpoints(
        &self,
        body: &mut dyn FnMut() -> Result<(), Refusal>,
    ) -> Result<bool, Refusal> {
        body().map(|()| true)
    }
}

/// A database file of the host.
pub trait DatabaseFile: BaseFile {
    /// Takes the exclusive lock of SQLite's own protocol; false when somebody holds a lock.
    ///
    /// # Errors
    /// The file's own result code.
    fn try_lock_exclusive(&self) -> Result<bool, Refusal>;

    /// Takes the shared lock, under which nobody changes the database file but a checkpoint; false
    /// when somebody holds it exclusively.
    ///
    /// # Errors
    /// The file's own result code.
    fn try_lock_shared(&self) -> Result<bool, Refusal>;

    /// Gives every lock back.
    fn unlock_all(&self);

    /// Has SQLite play back the journal of a transaction that a crash cut short. No lock is held.
    ///
    /// # Errors
    /// When the host's SQLite cannot.
    fn recover_journal(&self) -> Result<(), Refusal>;
}

/// Which file a name leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileIdentity {
    device: u64,
    inode: u64,
}

impl FileIdentity {
    /// Of the file with this name; none when there is none.
    pub fn of(path: &Path) -> Option<Self> {
        let metadata = std::fs::metadata(path).ok()?;
        Some(Self {
            device: metadata.dev(),
            inode: metadata.ino(),
        })
    }
}

fn system(action: &str, error: &std::io::Error, code: i32) -> Refusal {
    Refusal::new(RefusalKind::File(code), format!("{action}: {error}"))
}

impl BaseFile for File {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<usize, Refusal> {
        let mut filled = 0;
        while filled < buffer.len() {
            let at = offset + filled as u64;
            match FileExt::read_at(self, &mut buffer[filled..], at) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(system("read", &error, sqlite::SQLITE_IOERR_READ)),
            }
        }
        buffer[filled..].fill(0);
        Ok(filled)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> Result<(), Refusal> {
        self.write_all_at(bytes, offset)
            .map_err(|error| system("write", &error, sqlite::SQLITE_IOERR_WRITE))
    }

    fn truncate(&self, size: u64) -> Result<(), Refusal> {
        self.set_len(size)
            .map_err(|error| system("truncate", &error, sqlite::SQLITE_IOERR_TRUNCATE))
    }

    fn sync(&self) -> Result<(), Refusal> {
        self.sync_data()
            .map_err(|error| system("sync", &error, sqlite::SQLITE_IOERR_FSYNC))
    }

    fn size(&self) -> Result<u64, Refusal> {
        let metadata = self.metadata();
        metadata
            .map(|m| m.len())
            .map_err(|e| system("stat", &e, sqlite::SQLITE_IOERR_FSTAT))
    }
}
