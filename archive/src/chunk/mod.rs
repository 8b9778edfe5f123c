//! Chunks and snapshots: the immutable objects of the archive, as bytes.
//!
//! One format for both: a snapshot is a chunk whose only entry is a transaction that is the whole
//! image. `docs/archive-format.md` is the specification; this file has its numbers, `writer` and
//! `reader` its two directions. All numbers are little-endian.
//!
//! | part | bytes |
//! |---|---|
//! | header | 40 + name + 4 |
//! | image blocks | page records, compressed |
//! | index blocks | one record of 112 bytes per entry, compressed |
//! | footer | 90 |

mod format;
mod reader;
mod writer;

pub use format::{FOOTER_BYTES, Footer, MAX_INDEX_BYTES};
pub use reader::{ChunkIndex, ChunkReader};
pub use writer::{ChunkWriter, SealedChunk, prepare_scratch};

use durovfs_wire::entry::TransactionSummary;
use durovfs_wire::{CommitHeader, DatabaseId, Epoch, LogPosition, Timestamp};

/// Most entries in one chunk, so that its index (7 MB raw) can be held in memory by a reader of
/// many chunks at once. A writer starts the next chunk when [`ChunkWriter::is_full`].
pub const MAX_ENTRIES: usize = 65_536;
/// Longest database name in a header: the longest path that Linux knows.
pub const MAX_NAME_BYTES: usize = 4096;

/// Which log a chunk belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogIdentity {
    /// The log.
    pub database: DatabaseId,
    /// Name of its database in the cluster.
    pub name: String,
}

/// What an object of this format holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChunkKind {
    /// Entries, without a gap.
    Chunk,
    /// One transaction that is the whole image after it.
    Snapshot,
}

/// Why bytes are not a chunk.
#[derive(Debug, thiserror::Error)]
pub enum ChunkError {
    /// The bytes are not what was written, or never were a chunk.
    #[error("{0}")]
    Damaged(&'static str),
    /// Written by a program with another format.
    #[error("archive format version {got}, this program reads version {supported}")]
    UnsupportedVersion {
        /// The object's.
        got: u16,
        /// Ours.
        supported: u16,
    },
    /// An entry that cannot stand where it is put.
    #[error("entry at {got} cannot follow {previous} in a chunk")]
    OutOfOrder {
        /// The entry before.
        previous: LogPosition,
        /// The entry.
        got: LogPosition,
    },
    /// The chunk is full, or would be empty.
    #[error("{0}")]
    Limit(&'static str),
    /// The local file cannot be read or written.
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

/// An entry as a chunk's index has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EntryFacts {
    /// Where it stands in the log.
    pub position: LogPosition,
    /// When it was committed, or the epoch began.
    pub time: Timestamp,
    /// What it is.
    pub kind: EntryKind,
    /// Where its images begin.
    place: Place,
}

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryKind {
    /// A new primary's first entry.
    EpochStart {
        /// The last transaction before it.
        last_transaction: Option<TransactionSummary>,
    },
    /// A transaction; `slot_count` is the number of its images in the chunk.
    Transaction(CommitHeader),
}

/// Where in a chunk the images of a transaction begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Place {
    /// Offset of the block in the object.
    block: u64,
    /// Offset of the first page record in the block's raw bytes.
    within: u32,
}

impl EntryFacts {
    /// Of an epoch start.
    pub const fn epoch_start(
        position: LogPosition,
        time: Timestamp,
        last_transaction: Option<TransactionSummary>,
    ) -> Self {
        let kind = EntryKind::EpochStart { last_transaction };
        Self {
            position,
            time,
            kind,
            place: Place {
                block: 0,
                within: 0,
            },
        }
    }

    /// Its facts, if it is a transaction.
    pub const fn transaction(&self) -> Option<TransactionSummary> {
        match self.kind {
            EntryKind::Transaction(commit) => Some(TransactionSummary {
                position: self.position,
                commit,
            }),
            EntryKind::EpochStart { .. } => None,
        }
    }

    /// Number of its page images.
    pub const fn image_count(&self) -> u32 {
        match self.kind {
            EntryKind::Transaction(commit) => commit.slot_count,
            EntryKind::EpochStart { .. } => 0,
        }
    }

    /// Bytes of its page images before compression.
    pub const fn image_bytes(&self) -> u64 {
        match self.kind {
            EntryKind::Transaction(commit) => {
                commit.slot_count as u64 * commit.page_size.get() as u64
            }
            EntryKind::EpochStart { .. } => 0,
        }
    }

    /// Epoch of the entry.
    pub const fn epoch(&self) -> Epoch {
        self.position.epoch
    }

    /// Whether the same entry is meant, wherever its images are.
    pub fn is_same_entry(&self, other: &Self) -> bool {
        Self {
            place: Place::default(),
            ..*self
        } == Self {
            place: Place::default(),
            ..*other
        }
    }
}

#[cfg(test)]
mod tests;
