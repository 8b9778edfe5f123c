//! Warm copies: ordinary SQLite files that follow logs on the nodes that keep replicas.
//!
//! A [`WarmCopy`] is written through SQLite (`sqlite_dbpage`), one write transaction for a batch of
//! entries, so that plain SQLite on that host reads consistent snapshots while the log goes on. Its
//! pages are those of the log, but for the bytes of page 1 that say how SQLite journals (a copy is
//! always in WAL mode) and those that SQLite rewrites with every commit.
//!
//! Knows no journal, no store and no network: it takes transactions and says where it stands.

#![forbid(unsafe_code)]

mod absent;
mod copy;
mod path;
mod stand;

#[cfg(fuzzing)]
pub use absent::AbsentPages;
pub use copy::{CopyError, CopySnapshot, WarmCopy};
pub use path::{UnusableName, copy_path};
#[cfg(fuzzing)]
pub use stand::{CopyRecord, Stand, record_path};
