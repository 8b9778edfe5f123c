//! Messages between an application process (the extension) or the command line and its sidecar.
//!
//! One connection per process; each bidirectional stream carries requests one way and answers the
//! other. All small commits of all databases share one stream; a large transaction, and a reading
//! of the log, have one of their own.

use crate::entry::{CommitHeader, Origin, TransactionSummary};
use crate::ids::{ClientId, DatabaseId, NodeName};
use crate::position::{Epoch, LogPosition, Lsn};
use crate::status::{DatabaseStatus, NodeStatus};
use crate::wal::PageSize;
use serde::{Deserialize, Serialize};

/// From a client to its sidecar. `request` numbers come back in the answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ClientMessage {
    /// First on each stream.
    Hello {
        /// The process.
        client: ClientId,
        /// What it is, for people: program name, process id, SQLite version.
        description: String,
    },
    /// Makes the sidecar the primary of a database, if it is not, and asks where its log ends.
    Open {
        /// Comes back.
        request: u64,
        /// Name in the cluster.
        name: String,
        /// The log that the local file says it belongs to, if it says so.
        known: Option<DatabaseId>,
        /// Whether it is taken from another node that is a live primary. Else that is refused.
        force: bool,
        /// Whether there must be a log of that name; else a new one is begun.
        must_exist: bool,
        /// Milliseconds that the client waits; zero is for ever.
        timeout_ms: u64,
    },
    /// Slots of a transaction that is still open; the payload is theirs. Part numbers are implied:
    /// 0, 1, 2 … in order of arrival.
    Pages {
        /// The log.
        database: DatabaseId,
        /// Of the commit to come.
        sequence: u64,
        /// Page size of the images.
        page_size: PageSize,
    },
    /// The transaction that [`ClientMessage::Pages`] began will not be committed.
    Abort {
        /// The log.
        database: DatabaseId,
        /// Of the commit that does not come.
        sequence: u64,
    },
    /// The last slots of a transaction (the payload), and its facts; `commit.time` is ignored.
    Commit {
        /// The log.
        database: DatabaseId,
        /// The facts.
        commit: CommitHeader,
        /// How many [`ClientMessage::Pages`] of this transaction were sent before. A sidecar that
        /// has not all of them (it was restarted in between) refuses the commit.
        streamed_parts: u32,
        /// Sequence of this client's commit that this one is made on top of, when that one was not
        /// answered yet (deferred durability); `commit.base_lsn` is then filled in by the sidecar.
        after: Option<u64>,
        /// Milliseconds that the client waits; zero is for ever.
        timeout_ms: u64,
    },
    /// Asks what became of a commit, and, if nothing is certain yet, makes it certain when a quorum
    /// answers. After this the commit is committed or never will be.
    Resolve {
        /// Comes back.
        request: u64,
        /// The log.
        database: DatabaseId,
        /// The commit.
        origin: Origin,
        /// What it was made on top of.
        base_lsn: Lsn,
        /// Milliseconds that the client waits; zero is for ever.
        timeout_ms: u64,
    },
    /// Asks for the committed entries from `first_lsn` on, on a stream of its own. Where they are
    /// more than an image of the database, the answer begins with that: a transaction after
    /// `first_lsn` that is a whole image.
    ReadLog {
        /// The log.
        database: DatabaseId,
        /// First entry wanted.
        first_lsn: Lsn,
        /// Whether the pages are wanted. Without them each transaction comes as its last part, with
        /// an empty payload; none is left out for an image, but the archive may have dropped the
        /// first.
        pages: bool,
    },
    /// Asks for the state of a node.
    NodeStatus {
        /// Comes back.
        request: u64,
    },
    /// Asks for the state of one database, by its name in the cluster.
    DatabaseStatus {
        /// Comes back.
        request: u64,
        /// Name in the cluster.
        name: String,
    },
    /// Replaces the replica of one node by one of another (or by a new one of the same node), or
    /// asks how far that is: the same question again changes nothing.
    Replace {
        /// Comes back.
        request: u64,
        /// Name of the database in the cluster.
        name: String,
        /// The node whose replica goes.
        old: NodeName,
        /// The node that gets one.
        new: NodeName,
    },
    /// Asks for the bookmark of the last commit at or before a moment (a WHEN, as people write it).
    FindBookmark {
        /// Comes back.
        request: u64,
        /// The log.
        database: DatabaseId,
        /// The moment.
        when: String,
    },
}

/// From a sidecar to its client.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum SidecarMessage {
    /// Answer to [`ClientMessage::Hello`].
    Welcome {
        /// The sidecar's name.
        node: NodeName,
    },
    /// Answer to [`ClientMessage::Open`].
    Opened {
        /// Of the question.
        request: u64,
        /// The log.
        database: DatabaseId,
        /// The primary's epoch.
        epoch: Epoch,
        /// The last committed entry, of any kind.
        end: LogPosition,
        /// The last committed transaction; none in a log that has none yet.
        last_transaction: Option<TransactionSummary>,
        /// The live primary that it was taken from by force.
        taken_from: Option<NodeName>,
    },
    /// What became of a commit. Answer to [`ClientMessage::Commit`] and [`ClientMessage::Resolve`].
    Outcome {
        /// The log.
        database: DatabaseId,
        /// Which commit of this client (of a [`ClientMessage::Resolve`]: which request).
        sequence: u64,
        /// What became of it.
        outcome: CommitOutcome,
    },
    /// A large commit makes progress: the client's time begins again. On the stream of a
    /// [`ClientMessage::ReadLog`]: the next part takes a while.
    Progress {
        /// The log.
        database: DatabaseId,
        /// Which commit; zero for a reading.
        sequence: u64,
    },
    /// One part of a committed entry; the payload is the part's.
    LogPart {
        /// The part.
        part: crate::entry::PartHeader,
    },
    /// No more parts follow.
    LogEnd {
        /// Why not all of them came, if so.
        error: Option<String>,
    },
    /// Answer to [`ClientMessage::NodeStatus`].
    NodeStatus {
        /// Of the question.
        request: u64,
        /// The state.
        status: NodeStatus,
    },
    /// Answer to [`ClientMessage::DatabaseStatus`]; none when no database has the name.
    DatabaseStatus {
        /// Of the question.
        request: u64,
        /// The state.
        status: Option<DatabaseStatus>,
    },
    /// Answer to [`ClientMessage::FindBookmark`].
    FoundBookmark {
        /// Of the question.
        request: u64,
        /// The bookmark, or why there is none.
        bookmark: Result<LogPosition, String>,
    },
    /// Answer to [`ClientMessage::Replace`].
    Replacing {
        /// Of the question.
        request: u64,
        /// How far it is.
        state: ReplaceState,
    },
    /// A request that could not be carried out.
    Failed {
        /// Of the question.
        request: u64,
        /// What the caller can do.
        kind: FailureKind,
        /// What failed, on what, and what to do: one line.
        message: String,
    },
}

/// How far a replacement is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReplaceState {
    /// The new replica is fed, and has no vote yet.
    CatchingUp {
        /// Entries that it lacks.
        lag_entries: u64,
    },
    /// Both sets of replicas are needed for every commit.
    Joint {
        /// Entries that the new replica lacks.
        lag_entries: u64,
    },
    /// The new replica has the old one's place.
    Done {
        /// Generation of the membership since.
        generation: u32,
    },
}

/// Kinds of failure, by what the caller does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FailureKind {
    /// The certificate does not allow it.
    Forbidden,
    /// Another sidecar is the primary.
    NotPrimary,
    /// Fewer replicas answer than a quorum: try again later.
    NoQuorum,
    /// No database of that name, or another log under it than the local file says.
    UnknownDatabase,
    /// The moment asked for is not covered by the archive.
    NotCovered,
    /// Something else, told in the message.
    Other,
}

/// What became of a commit. No layer turns one of these into another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum CommitOutcome {
    /// On the disks of a quorum, for good.
    Committed {
        /// Where.
        position: LogPosition,
    },
    /// Certainly in no log, now and later.
    NotCommitted {
        /// Why: one line.
        reason: String,
    },
    /// It was sent, and no quorum said what became of it.
    Unknown {
        /// Why: one line.
        reason: String,
    },
    /// Certainly not committed: the log has transactions that the local file lacks. Answer to
    /// [`ClientMessage::Resolve`]: the log has some, and it cannot be told whether the commit is
    /// among them.
    Behind {
        /// The last committed transaction.
        last_transaction: TransactionSummary,
    },
    /// Certainly not committed: this host is no longer the primary.
    NotPrimary {
        /// Why: one line.
        reason: String,
    },
}
