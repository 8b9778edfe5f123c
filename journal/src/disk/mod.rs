//! What the journal asks of a disk, and the disk of this machine.
//!
//! One directory of files; positioned reads and writes, and two kinds of sync. The journal reaches
//! storage through these traits only, so that a disk which loses, tears or refuses writes can take
//! their place ([`memory::MemoryDisk`]).

pub mod memory;
mod real;

pub use real::RealDisk;

use std::io;
use std::sync::Arc;

/// One directory.
pub trait Disk: Send + Sync + 'static {
    /// Makes an empty file; one of that name is emptied.
    ///
    /// # Errors
    /// What the system says.
    fn create(&self, name: &str) -> io::Result<Arc<dyn DiskFile>>;
    /// Opens a file for reading and writing.
    ///
    /// # Errors
    /// What the system says.
    fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>>;
    /// Names of all files.
    ///
    /// # Errors
    /// What the system says.
    fn list(&self) -> io::Result<Vec<String>>;
    /// Gives a file another name.
    ///
    /// # Errors
    /// What the system says.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    /// Removes a name; handles of the file stay readable.
    ///
    /// # Errors
    /// What the system says.
    fn remove(&self, name: &str) -> io::Result<()>;
    /// Makes creations, renames and removals durable.
    ///
    /// # Errors
    /// What the system says.
    fn sync_directory(&self) -> io::Result<()>;
    /// A number that is not the same twice, so that bytes of one segment never pass for another's.
    fn draw_salt(&self) -> u64;
}

/// One file of it.
pub trait DiskFile: Send + Sync + 'static {
    /// Fills `buffer` from `offset` on.
    ///
    /// # Errors
    /// What the system says; `UnexpectedEof` when the file ends before.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
    /// Writes all of `bytes` at `offset`.
    ///
    /// # Errors
    /// What the system says; any part of the bytes may have been written.
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;
    /// Makes what was written durable. After an error nothing written since the last success may
    /// be trusted to be on disk, even if a later call succeeds.
    ///
    /// # Errors
    /// What the system says.
    fn sync_data(&self) -> io::Result<()>;
    /// Bytes of the file.
    ///
    /// # Errors
    /// What the system says.
    fn byte_count(&self) -> io::Result<u64>;
}
