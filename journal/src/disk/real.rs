//! The disk of this machine: a locked directory.

use super::{Disk, DiskFile};
use crate::error::JournalError;
use std::fs::{File, OpenOptions, TryLockError};
use std::hash::{BuildHasher, Hasher};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Name of the file whose advisory lock says that a process has the directory.
const LOCK_NAME: &str = "journal.lock";
/// Segments hold the pages of databases: nobody else's to read.
const FILE_MODE: u32 = 0o600;

/// A directory of the file system, locked for as long as this lives.
#[derive(Debug)]
pub struct RealDisk {
    directory: PathBuf,
    // Held for its lock only.
    _lock: File,
}

impl RealDisk {
    /// Makes the directory if it is missing, and locks it.
    ///
    /// # Errors
    /// When another process has it, or the system refuses.
    pub fn open(directory: &Path) -> Result<Self, JournalError> {
        let shown = directory.display();
        std::fs::create_dir_all(directory)
            .map_err(|e| JournalError::io(format!("create directory {shown}"), &e))?;
        let path = directory.join(LOCK_NAME);
        let lock = options()
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(|e| JournalError::io(format!("open {}", path.display()), &e))?;
        match lock.try_lock() {
            Ok(()) => Ok(Self {
                directory: directory.to_owned(),
                _lock: lock,
            }),
            Err(TryLockError::WouldBlock) => Err(JournalError::Locked {
                directory: shown.to_string(),
            }),
            Err(TryLockError::Error(e)) => {
                Err(JournalError::io(format!("lock {}", path.display()), &e))
            }
        }
    }
}

fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(FILE_MODE);
    options
}

impl Disk for RealDisk {
    fn create(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        let file = options()
            .create(true)
            .truncate(true)
            .open(self.directory.join(name))?;
        Ok(Arc::new(RealFile(file)))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        Ok(Arc::new(RealFile(
            options().open(self.directory.join(name))?,
        )))
    }

    fn list(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&self.directory)? {
            // A name that is not text is not one of the journal's.
            names.extend(entry?.file_name().into_string());
        }
        Ok(names)
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        std::fs::rename(self.directory.join(from), self.directory.join(to))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        std::fs::remove_file(self.directory.join(name))
    }

    fn sync_directory(&self) -> io::Result<()> {
        File::open(&self.directory)?.sync_all()
    }

    fn draw_salt(&self) -> u64 {
        // The standard library seeds each of these from the system's randomness.
        std::collections::hash_map::RandomState::new()
            .build_hasher()
            .finish()
    }
}

#[derive(Debug)]
struct RealFile(File);

impl DiskFile for RealFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_exact_at(buffer, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_all_at(bytes, offset)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn byte_count(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }
}
