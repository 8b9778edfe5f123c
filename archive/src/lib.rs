//! The archive: a database's history in an object store, and the way back from it.
//!
//! Entries of a log are [normalized](normalize) into [chunks](chunk), put under [keys](layout) that
//! make a [listing](listing) the index, into a [store]; a [restore] plans from the listing and
//! applies exactly up to one transaction. `docs/archive-format.md` has the bytes.
//!
//! Knows no journal, no network of ours and no SQLite: it takes parts of entries and gives files.

#![forbid(unsafe_code)]

pub mod chunk;
pub mod entries;
mod fields;
pub mod index;
pub mod layout;
pub mod listing;
pub mod normalize;
pub mod restore;
pub mod snapshot;
pub mod store;
#[cfg(test)]
mod testing;
pub mod upkeep;
pub mod uploader;
pub mod when;

pub use chunk::{ChunkError, ChunkKind, ChunkReader, ChunkWriter, EntryFacts, LogIdentity};
pub use index::ArchiveIndex;
pub use listing::Listing;
pub use normalize::{NormalizedEntry, Normalizer, TransactionPages};
pub use restore::{RestoreError, RestoreOptions, Restored};
pub use store::{PutOutcome, S3Options, Store, StoreError};
pub use when::When;
