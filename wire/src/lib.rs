//! The vocabulary of durovfs and its bytes: positions, entries, messages, the codec of all links.
//!
//! Pure data. No I/O, no clock, no async, no randomness: what needs any of these lives in the crate
//! that uses this one. `docs/protocol.md` explains each exchange.

#![forbid(unsafe_code)]

pub mod checksum;
pub mod client;
pub mod codec;
pub mod entry;
pub mod ids;
pub mod membership;
pub mod peer;
pub mod position;
pub mod resolution;
pub mod status;
pub mod wal;

pub use checksum::{DatabaseChecksum, PageChecksum};
pub use codec::{Decoder, Frame, FrameError};
pub use entry::{
    CommitHeader, EntryPart, Origin, PartHeader, PartKind, PayloadError, SlotPage, SlotPages,
};
pub use ids::{ClaimantId, ClientId, DatabaseId, InvalidNodeName, NodeName, ReplicaId};
pub use membership::{InvalidMembership, Member, Membership};
pub use position::{Bookmark, Epoch, EpochRun, LogPosition, Lsn, Timestamp};
pub use wal::{PageNo, PageSize};

/// Replicas of a database unless its membership says otherwise.
pub const REPLICA_COUNT: usize = 5;
/// Replicas that must hold an entry on disk before it is committed.
pub const ACK_QUORUM: usize = 3;
// Any two quorums must share a replica: every safety argument starts here.
const _: () = assert!(2 * ACK_QUORUM > REPLICA_COUNT);
