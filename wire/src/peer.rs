//! Messages between the primary of a database and its replicas. `docs/protocol.md` tells the order.
//!
//! Every message of a log names its database, and every one that changes or reports the log names
//! the epoch it speaks for and the membership's generation; a receiver refuses what is not current.

use crate::entry::PartHeader;
use crate::ids::{ClaimantId, DatabaseId, NodeName, ReplicaId};
use crate::membership::Membership;
use crate::position::{Epoch, EpochRun, LogPosition, Lsn};
use serde::{Deserialize, Serialize};

/// Longest database name.
pub const MAX_NAME_BYTES: usize = 4096;
/// Most runs of a log's history that a promise carries: those above the archive, newest last.
pub const MAX_HISTORY_RUNS: usize = 4096;

/// From a primary (or one that wants to be) to a replica.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum PrimaryMessage {
    /// Asks which logs the replica knows under a name.
    Find {
        /// Comes back in the answer.
        request: u64,
        /// The database's name in the cluster.
        name: String,
    },
    /// Asks for the promise to serve no older epoch.
    Claim(Claim),
    /// The membership that the primary of an epoch decided on. Goes before the first append of a
    /// feed; a replica takes no entry in the epoch without it.
    Members {
        /// The log.
        database: DatabaseId,
        /// The membership; its epoch is the sender's.
        membership: Membership,
    },
    /// One part of an entry; the payload is the part's.
    Append {
        /// Generation of the membership that the primary goes by.
        generation: u32,
        /// The primary's epoch. The part keeps the epoch that its entry was written in, which is
        /// lower when an entry of an earlier primary is fed again.
        epoch: Epoch,
        /// The entry before this one.
        previous: LogPosition,
        /// Known committed, at the primary.
        commit_lsn: Lsn,
        /// Confirmed in the object store.
        archive_lsn: Lsn,
        /// The part.
        part: PartHeader,
    },
    /// What is committed and archived, when no append is there to carry it.
    Progress {
        /// The log.
        database: DatabaseId,
        /// The sender's epoch.
        epoch: Epoch,
        /// Known committed, at the primary.
        commit_lsn: Lsn,
        /// Confirmed in the object store.
        archive_lsn: Lsn,
    },
    /// Asks for entries, for recovery: only a replica that promised `epoch` answers. Goes on a
    /// stream of its own, on which [`ReplicaMessage::FetchedPart`]s and one
    /// [`ReplicaMessage::FetchEnd`] come back.
    Fetch {
        /// The log.
        database: DatabaseId,
        /// The epoch that the asker claims or holds.
        epoch: Epoch,
        /// First entry wanted.
        first_lsn: Lsn,
        /// Last entry wanted.
        last_lsn: Lsn,
    },
    /// A replica that is mending votes again when it holds the primary's log up to here: more than
    /// it can ever have acked. Answers its promise, before any entry is fed.
    Mend {
        /// The log.
        database: DatabaseId,
        /// The sender's epoch.
        epoch: Epoch,
        /// The last entry of the log when the promise came.
        lsn: Lsn,
    },
    /// Asks for a sign of life.
    Ping {
        /// Comes back in the answer.
        sequence: u64,
    },
}

/// A claim of an epoch.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Claim {
    /// The log.
    pub database: DatabaseId,
    /// Its name, which a replica that never heard of it notes down.
    pub name: String,
    /// The epoch it wants.
    pub epoch: Epoch,
    /// Which attempt: a repeated claim has the same, a competing one has not.
    pub claimant: ClaimantId,
    /// Whether it counts although another node is a live primary: an operator said so, or a quorum
    /// has promised this epoch already. A matter of liveness only.
    pub forced: bool,
}

/// A log that a replica knows under a name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct FoundLog {
    /// The log.
    pub database: DatabaseId,
    /// The node that is its primary and gave a sign of life lately, if there is one.
    pub primary: Option<LivePrimary>,
    /// The membership that the replica goes by, if a primary told it.
    pub membership: Option<Membership>,
}

/// A primary that a replica heard of lately.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct LivePrimary {
    /// The node.
    pub node: NodeName,
    /// Milliseconds since its last sign of life.
    pub silent_ms: u32,
}

/// From a replica to a primary.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ReplicaMessage {
    /// Answer to [`PrimaryMessage::Find`].
    Found {
        /// Of the question.
        request: u64,
        /// Every log known under the name.
        logs: Vec<FoundLog>,
    },
    /// The promise, already on the replica's disk.
    Promised(Promise),
    /// All entries up to here are on the replica's disk.
    Ack {
        /// The log.
        database: DatabaseId,
        /// The epoch that the replica serves.
        epoch: Epoch,
        /// Generation of the membership that the replica goes by.
        generation: u32,
        /// Which replica this is.
        replica: ReplicaId,
        /// Its last synced entry.
        flush_lsn: Lsn,
    },
    /// A claim or an append that was not taken.
    Rejected {
        /// The log.
        database: DatabaseId,
        /// The epoch of the message that was refused.
        epoch: Epoch,
        /// Why.
        reason: RejectReason,
    },
    /// One part of an entry that was asked for; the payload is the part's.
    FetchedPart {
        /// The part.
        part: PartHeader,
    },
    /// No more parts follow.
    FetchEnd {
        /// Why not all of them came, if so.
        error: Option<String>,
    },
    /// Answer to [`PrimaryMessage::Ping`].
    Pong {
        /// Of the question.
        sequence: u64,
        /// Why the replica takes no entries now (disk full, damage), if so.
        trouble: Option<String>,
        /// How much of what its journal may take is taken, in percent.
        journal_percent: u8,
        /// What its journal may take, in bytes.
        journal_limit_bytes: u64,
    },
}

/// What a replica had when it promised an epoch.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Promise {
    /// The log.
    pub database: DatabaseId,
    /// Which replica this is.
    pub replica: ReplicaId,
    /// The membership of the newest epoch whose primary told it; none if none did.
    pub membership: Option<Membership>,
    /// The epoch promised now.
    pub epoch: Epoch,
    /// To which attempt.
    pub claimant: ClaimantId,
    /// The epoch promised before.
    pub previous_promise: Epoch,
    /// Its last entry.
    pub last: LogPosition,
    /// Known committed.
    pub commit_lsn: Lsn,
    /// Known archived.
    pub archive_lsn: Lsn,
    /// The last transaction at or below `last`, as its journal knows it: a primary whose own log
    /// begins anew behind the archive learns from it how the database stands.
    pub last_transaction: Option<crate::entry::TransactionSummary>,
    /// The runs of its log, oldest first; from the one that holds `archive_lsn` on, at least.
    pub history: Vec<EpochRun>,
    /// Damage took, or may have taken, entries that it acked. It serves no older epoch, and is to
    /// be fed, but its log must not be counted when the end of the log is looked for.
    pub mending: bool,
}

/// Why a replica did not take a message.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum RejectReason {
    /// It promised a higher epoch (or this one to another claimant).
    Fenced {
        /// The epoch promised.
        promised: Epoch,
    },
    /// It promised an epoch to another node: told once to the primary that it served before.
    TakenOver {
        /// The epoch promised.
        promised: Epoch,
        /// To this node.
        by: NodeName,
    },
    /// Another node is the primary and gave a sign of life lately; the claim is not forced.
    Alive {
        /// That node.
        primary: NodeName,
    },
    /// The entry before the one sent is not the one it has.
    Gap {
        /// Its last entry.
        last: LogPosition,
    },
    /// It was not told the membership of this epoch, or goes by another.
    Generation {
        /// Its own; zero for none.
        current: u32,
    },
    /// Its disk does not take the entry.
    Storage {
        /// What the disk said.
        message: String,
    },
}
