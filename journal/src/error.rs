//! What can go wrong with a journal, by what the caller does next.

use durovfs_wire::ids::DatabaseId;
use durovfs_wire::position::Lsn;
use std::io;

/// Why the journal did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JournalError {
    /// The disk failed. Nothing of the append counts; it may be tried again.
    #[error("{operation}: {message}")]
    Io {
        /// What was tried, on which file.
        operation: String,
        /// The kind of failure.
        kind: io::ErrorKind,
        /// What the system said.
        message: String,
    },
    /// No room for entries until some are dropped. Nothing of the append counts.
    #[error("journal is full: {detail}")]
    Full {
        /// Which limit was met.
        detail: String,
    },
    /// The journal's bytes are not what was written: repair from other replicas.
    #[error("journal is damaged: segment={segment} offset={offset}: {detail}")]
    Damaged {
        /// Name of the file.
        segment: String,
        /// Where in it.
        offset: u64,
        /// What is wrong there.
        detail: String,
    },
    /// The entries were dropped, or cut off, or replaced since: ask again, or ask elsewhere.
    #[error("entries from lsn {first_lsn} on are not held: the first held is lsn {first_held}")]
    Gone {
        /// First entry that was asked for.
        first_lsn: Lsn,
        /// First entry that is held.
        first_held: Lsn,
    },
    /// Records that do not follow from what the journal has. Nothing of the append counts; the
    /// caller takes up again from [`crate::Journal::state`].
    #[error("append to database {database} refused: {detail}")]
    Refused {
        /// Whose records.
        database: DatabaseId,
        /// What does not fit.
        detail: String,
    },
    /// Another process has the directory.
    #[error("journal directory {directory} is in use by another process")]
    Locked {
        /// The directory.
        directory: String,
    },
    /// The file was written by another version of durovfs.
    #[error("segment={segment} has format version {got}, this program reads {supported}")]
    UnsupportedVersion {
        /// Name of the file.
        segment: String,
        /// Its version.
        got: u32,
        /// The version that this program reads and writes.
        supported: u32,
    },
    /// The options contradict each other.
    #[error("journal options: {detail}")]
    Options {
        /// What is wrong with them.
        detail: String,
    },
    /// The journal was closed before this was written.
    #[error("journal is closed")]
    Closed,
}

impl JournalError {
    pub(crate) fn io(operation: impl Into<String>, error: &io::Error) -> Self {
        Self::Io {
            operation: operation.into(),
            kind: error.kind(),
            message: error.to_string(),
        }
    }

    pub(crate) fn damaged(segment: &str, offset: u64, detail: impl Into<String>) -> Self {
        Self::Damaged {
            segment: segment.to_owned(),
            offset,
            detail: detail.into(),
        }
    }
}
