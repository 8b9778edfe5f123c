//! Records: what callers append, and the form in which it is stored.

use durovfs_wire::entry::{EntryPart, PartHeader, TransactionSummary};
use durovfs_wire::ids::{ClaimantId, DatabaseId, ReplicaId};
use durovfs_wire::membership::Membership;
use durovfs_wire::position::{Epoch, EpochRun, LogPosition, Lsn};
use serde::{Deserialize, Serialize};

/// One thing to write down.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Record {
    /// One part of an entry. Its entry must be the one after the last, or have begun already.
    Part(EntryPart),
    /// The promise to serve no older epoch. Makes the database known to this journal.
    Promise {
        /// The log.
        database: DatabaseId,
        /// Its name in the cluster.
        name: String,
        /// The epoch promised.
        epoch: Epoch,
        /// To which attempt.
        claimant: ClaimantId,
        /// Which replica promises; none in a primary's own journal, which is no replica.
        replica: Option<ReplicaId>,
    },
    /// Who votes on the log, as the primary of an epoch decided it.
    Membership {
        /// The log.
        database: DatabaseId,
        /// Of an epoch at or above that of the membership before.
        membership: Membership,
    },
    /// All entries after this one are gone. In an append it must come before the
    /// database's parts.
    Truncate {
        /// The log.
        database: DatabaseId,
        /// The last entry that stays.
        after: LogPosition,
    },
    /// The log begins again after this entry: it and all before it are archived. In an
    /// append it must come before the database's parts.
    Restart {
        /// The log.
        database: DatabaseId,
        /// The entry before the next.
        at: LogPosition,
    },
    /// What is committed and archived. Never goes back; clamped to the entries that are there.
    Progress {
        /// The log.
        database: DatabaseId,
        /// Known committed.
        commit_lsn: Lsn,
        /// Known archived.
        archive_lsn: Lsn,
    },
    /// A whole state. The journal restates all of them at the start of each segment; a caller may
    /// append one for a database that this journal does not know, with no entries held and all
    /// committed.
    State(DatabaseState),
    /// An entry that is held cannot be read any more: it and all after it leave the index, and the
    /// database is marked ([`DatabaseState::mending`]). In an append it must come before the
    /// database's parts.
    Damaged {
        /// The log.
        database: DatabaseId,
        /// The entry that cannot be read.
        first_lsn: Lsn,
    },
    /// The database holds again at least what it held before it was damaged.
    Mended {
        /// The log.
        database: DatabaseId,
    },
}

impl Record {
    /// The log that it belongs to.
    pub fn database(&self) -> DatabaseId {
        match self {
            Self::Part(part) => part.header.database,
            Self::Promise { database, .. }
            | Self::Membership { database, .. }
            | Self::Truncate { database, .. }
            | Self::Restart { database, .. }
            | Self::Progress { database, .. }
            | Self::Damaged { database, .. }
            | Self::Mended { database } => *database,
            Self::State(state) => state.database,
        }
    }
}

/// What a journal knows of one database.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DatabaseState {
    /// The log.
    pub database: DatabaseId,
    /// Its name in the cluster; empty if no promise said it.
    pub name: String,
    /// Which replica this is, since its first promise; none in a primary's own journal.
    pub replica: Option<ReplicaId>,
    /// The membership of the newest epoch whose primary told it.
    pub membership: Option<Membership>,
    /// The highest epoch promised.
    pub promised: Epoch,
    /// To which attempt.
    pub claimant: Option<ClaimantId>,
    /// The last whole entry.
    pub last: LogPosition,
    /// First entry still held; the one after `last` when none is.
    pub first_lsn: Lsn,
    /// Known committed.
    pub commit_lsn: Lsn,
    /// Known archived.
    pub archive_lsn: Lsn,
    /// Runs of the log, oldest first; from the one that holds `archive_lsn` on, at least.
    pub history: Vec<EpochRun>,
    /// The last transaction at or below `last`, if it is known.
    pub last_transaction: Option<TransactionSummary>,
    /// Damage took records of this database, or may have: it may have held, and acknowledged, more
    /// than this says. `promised` is true in any case.
    pub mending: bool,
}

/// Guess of a state's bytes beside its name, history and members.
pub(crate) const STATE_BYTES: usize = 256;
/// Guess of an epoch run's bytes.
const RUN_BYTES: usize = 10;
/// What a member can take without its address.
const MEMBER_BYTES: usize = 96;

impl DatabaseState {
    /// What it takes about in a segment.
    pub(crate) fn bytes_guess(&self) -> usize {
        let members = self.membership.iter().flat_map(Membership::all_members);
        let member_bytes: usize = members.map(|m| MEMBER_BYTES + m.address.len()).sum();
        STATE_BYTES + self.name.len() + self.history.len() * RUN_BYTES + member_bytes
    }

    /// Of a database of which nothing is known but its id.
    pub(crate) fn empty(database: DatabaseId) -> Self {
        Self {
            database,
            name: String::new(),
            replica: None,
            membership: None,
            promised: Epoch::ZERO,
            claimant: None,
            last: LogPosition::ZERO,
            first_lsn: Lsn::ZERO.next(),
            commit_lsn: Lsn::ZERO,
            archive_lsn: Lsn::ZERO,
            history: Vec::new(),
            last_transaction: None,
            mending: false,
        }
    }
}

/// A record as it is stored: the header in postcard encoding (the order of the variants is part of
/// the format); the payload of a part follows it as raw bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[allow(
    clippy::large_enum_variant,
    reason = "one at a time, on the stack, while it is written or read"
)]
pub(crate) enum Stored {
    /// Says that all before it is durable, when nothing else came that would say so.
    Mark,
    Part(PartHeader),
    Promise {
        database: DatabaseId,
        name: String,
        epoch: Epoch,
        claimant: ClaimantId,
        replica: Option<ReplicaId>,
    },
    Truncate {
        database: DatabaseId,
        after: LogPosition,
        /// As it is afterwards: the entries that would tell may be dropped before this record is.
        last_transaction: Option<TransactionSummary>,
    },
    Restart {
        database: DatabaseId,
        at: LogPosition,
    },
    Progress {
        database: DatabaseId,
        commit_lsn: Lsn,
        archive_lsn: Lsn,
    },
    State {
        state: DatabaseState,
        /// The entry that is under way, and how many parts of it are there.
        pending: Option<(LogPosition, u32)>,
        /// The last transaction below the first entry that is held, if it is known.
        base: Option<TransactionSummary>,
    },
    /// Entries up to here are not needed any more, so that they are not held again after a restart.
    Dropped {
        database: DatabaseId,
        through: Lsn,
    },
    Damaged {
        database: DatabaseId,
        first_lsn: Lsn,
    },
    Mended {
        database: DatabaseId,
    },
    /// A part of an entry that is held, once more: the segment that it was in is to go.
    Moved(PartHeader),
    Membership {
        database: DatabaseId,
        membership: Membership,
    },
}

impl Stored {
    pub(crate) fn database(&self) -> Option<DatabaseId> {
        match self {
            Self::Mark => None,
            Self::Part(header) | Self::Moved(header) => Some(header.database),
            Self::Promise { database, .. }
            | Self::Truncate { database, .. }
            | Self::Restart { database, .. }
            | Self::Progress { database, .. }
            | Self::Dropped { database, .. }
            | Self::Damaged { database, .. }
            | Self::Membership { database, .. }
            | Self::Mended { database } => Some(*database),
            Self::State { state, .. } => Some(state.database),
        }
    }
}
