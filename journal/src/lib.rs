//! The journal of a node: one append-only log on disk, shared by all the node's databases.
//!
//! What lives here: segments and their bytes, the writer with its group commit, recovery, and the
//! in-memory index that answers without reading. What does not: the rules of the quorum (who may
//! append what), the network, the archive. `docs/journal-format.md` has the bytes and the reasons.

#![forbid(unsafe_code)]

mod block;
pub mod disk;
mod error;
mod format;
mod journal;
mod promises;
mod reader;
mod record;
mod recovery;
mod segments;
mod table;
#[cfg(test)]
mod tests;
mod writer;

pub use error::JournalError;
pub use journal::{Completion, DamagedEntry, Journal, JournalDriver, JournalOptions, Usage};
pub use reader::Parts;
pub use record::{DatabaseState, Record};
