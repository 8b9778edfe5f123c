//! The one door out of this crate: where transactions go, and where a log is read from.
//!
//! The extension implements it over its connection to the sidecar; tests implement it in memory.
//! Calls block the calling SQLite thread. No implementation may call back into SQLite.

use bytes::Bytes;
use durovfs_wire::client::{CommitOutcome, FailureKind};
use durovfs_wire::entry::{CommitHeader, EntryPart, Origin, TransactionSummary};
use durovfs_wire::{DatabaseId, Epoch, LogPosition, Lsn, PageSize};
use std::time::{Duration, Instant};

/// A log, as the sidecar opened it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OpenedLog {
    /// The log.
    pub database: DatabaseId,
    /// The sidecar's epoch as its primary.
    pub epoch: Epoch,
    /// Last committed entry of any kind.
    pub end: LogPosition,
    /// Last committed transaction; none in a new log.
    pub last_transaction: Option<TransactionSummary>,
}

/// A call that did not reach its end. Never used for commits: they have [`CommitOutcome`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct SinkError {
    /// What the caller can do.
    pub kind: SinkErrorKind,
    /// What failed, on what, and what to do: one line.
    pub message: String,
}

/// Kinds of [`SinkError`], by what the caller does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SinkErrorKind {
    /// The sidecar was not reached in time.
    Unreachable,
    /// The sidecar answered that it cannot.
    Refused(FailureKind),
    /// The receiver of the data stopped it.
    Stopped,
}

/// Where a database's transactions go. One per process, shared by all its connections.
pub trait Sink: Send + Sync + 'static {
    /// Makes the sidecar the database's primary, if it is not, and tells where the log ends.
    ///
    /// # Errors
    /// When the sidecar is not reached, or refuses.
    fn open(
        &self,
        name: &str,
        known: Option<DatabaseId>,
        timeout: Option<Duration>,
    ) -> Result<OpenedLog, SinkError>;

    /// The same, also when another host's sidecar is a live primary: it is taken from that one.
    ///
    /// # Errors
    /// When the sidecar is not reached, or refuses.
    fn take_over(
        &self,
        name: &str,
        known: Option<DatabaseId>,
        timeout: Option<Duration>,
    ) -> Result<OpenedLog, SinkError> {
        self.open(name, known, timeout)
    }

    /// An origin for the next commit of this process; never the same one twice.
    fn next_origin(&self) -> Origin;

    /// Streams slots of a transaction that is still open, in order; blocks when the link is full.
    ///
    /// # Errors
    /// When they cannot be sent; the transaction can then not be committed.
    fn send_pages(
        &self,
        database: DatabaseId,
        origin: Origin,
        page_size: PageSize,
        payload: Bytes,
    ) -> Result<(), SinkError>;

    /// The transaction whose pages were sent will not be committed.
    fn abort(&self, database: DatabaseId, origin: Origin);

    /// Sends the rest of a transaction and waits for what becomes of it. `None` waits for ever.
    fn commit(
        &self,
        database: DatabaseId,
        commit: CommitHeader,
        payload: Bytes,
        timeout: Option<Duration>,
    ) -> CommitOutcome;

    /// Hands over a commit whose outcome is asked for later, with [`Sink::take_deferred`]. `after`
    /// is the sequence of this process's commit that it is made on top of, when the outcome of that
    /// one is still open.
    ///
    /// # Errors
    /// When it could not be handed over: it is certainly not committed.
    fn commit_deferred(
        &self,
        database: DatabaseId,
        commit: CommitHeader,
        after: Option<u64>,
        payload: Bytes,
        timeout: Option<Duration>,
    ) -> Result<(), SinkError>;

    /// Whether this process makes commits with this origin.
    fn is_own(&self, origin: Origin) -> bool;

    /// Takes the outcome of a deferred commit, once; none while it is open. Does not block.
    fn take_deferred(&self, origin: Origin) -> Option<CommitOutcome>;

    /// Blocks until a deferred commit has an outcome to take, or somebody took it, or the moment
    /// has come; none is for ever.
    fn wait_deferred(&self, origin: Origin, until: Option<Instant>);

    /// Finds out what became of a commit, and makes it certain if a quorum answers in time. Here
    /// `NotPrimary` says nothing of the commit: this host can find out nothing.
    fn resolve(
        &self,
        database: DatabaseId,
        origin: Origin,
        base_lsn: Lsn,
        timeout: Option<Duration>,
    ) -> CommitOutcome;

    /// Reads the committed entries from `first_lsn` on, part by part, in order. May begin with a
    /// transaction after `first_lsn` that is a whole image, in place of all before it.
    ///
    /// # Errors
    /// When the log could not be read to its end, or `visit` returned an error.
    fn read_log(
        &self,
        database: DatabaseId,
        first_lsn: Lsn,
        visit: &mut dyn FnMut(EntryPart) -> Result<(), SinkError>,
    ) -> Result<(), SinkError>;

    /// Lists the committed transactions from `first_lsn` on that journals and archive still have,
    /// in order.
    ///
    /// # Errors
    /// When they could not be read to the end, or `visit` returned an error.
    fn read_summaries(
        &self,
        database: DatabaseId,
        first_lsn: Lsn,
        visit: &mut dyn FnMut(TransactionSummary) -> Result<(), SinkError>,
    ) -> Result<(), SinkError> {
        self.read_log(database, first_lsn, &mut |part| {
            part.header.transaction().map_or(Ok(()), &mut *visit)
        })
    }
}
