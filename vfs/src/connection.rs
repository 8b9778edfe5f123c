//! One connection's view of one protected database: the mark, the WAL tap and both gates, fed with
//! what SQLite does to its files. No pointers; `shim.rs` calls in, holding SQLite's own locks.
//!
//! What follows when a gate says no, and how the local file is brought level while it is open, is
//! in `commit_gate.rs`, `rollback_gate.rs` and `roll_forward.rs`.

use crate::deferred::Durability;
use crate::error::{Refusal, RefusalKind};
use crate::file::{BaseFile, DatabaseFile, FileIdentity};
use crate::mark::{Mark, MarkState, mark_path, with_suffix};
use crate::page_table::{PageChanges, PageTable};
use crate::sink::Sink;
use crate::wal_tap::{Step, WalTap};
use durovfs_wire::client::CommitOutcome;
use durovfs_wire::{DatabaseId, Epoch, LogPosition, Lsn, Origin};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// How long a COMMIT waits for the quorum unless `PRAGMA durovfs_timeout` says otherwise: longer
/// than a replica's restart takes, shorter than people wait.
pub const DEFAULT_TIMEOUT_MS: u64 = 10_000;

/// How loud a line of the log is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum LogLevel {
    /// Something that a person must look at.
    Error,
    /// What happened.
    Info,
    /// How it happened.
    Debug,
}

/// Where lines of the log go.
pub type LogFn = fn(LogLevel, &str);

/// Why a database file that was opened through the VFS is not protected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unprotected {
    /// The host leaves its path out.
    LeftOut,
    /// It is open for reading only.
    ReadOnly,
    /// Its URI says that nobody changes it.
    Immutable,
}

/// What the VFS says about a database file that it opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FileReport {
    /// Its commits go to the quorum.
    Protected(Box<FileStatus>),
    /// They do not.
    Unprotected(Unprotected),
}

/// What a connection says about its database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileStatus {
    /// The log.
    pub database: DatabaseId,
    /// Name in the cluster.
    pub name: String,
    /// Last transaction that the local file holds.
    pub position: LogPosition,
    /// The sidecar's epoch when it was last heard of.
    pub epoch: Epoch,
    /// Milliseconds that a COMMIT waits; zero is for ever.
    pub timeout_ms: u64,
    /// When COMMIT returns.
    pub durability: Durability,
    /// Whether the file has deferred commits that may not be confirmed.
    pub unconfirmed: bool,
    /// Whether a commit's outcome is open.
    pub in_flight: bool,
    /// The last refusal's line; empty when there was none.
    pub last_error: String,
    /// What a person should look at: one line each.
    pub warnings: Vec<String>,
}

/// What a connection needs from outside.
#[derive(Clone)]
pub struct Surroundings {
    /// Where transactions go.
    pub sink: Arc<dyn Sink>,
    /// Where lines of the log go.
    pub log: LogFn,
    /// How long opening waits for the sidecar, for other openers and for what became of a commit.
    pub open_timeout: Duration,
    /// Whether the local file counts when it is not what the log says (`open/keep_local.rs`).
    pub keep_local: bool,
}

/// A commit that is acknowledged, and that the local file takes over next.
pub(crate) struct Acknowledged {
    pub(crate) state: MarkState,
    pub(crate) old_count: u32,
    pub(crate) changes: PageChanges,
    pub(crate) whole_image: bool,
}

/// One connection's view of one protected database.
pub struct Connection {
    pub(crate) surroundings: Surroundings,
    pub(crate) path: PathBuf,
    pub(crate) database_id: DatabaseId,
    pub(crate) durability: Durability,
    pub(crate) mark: Mark,
    pub(crate) table: PageTable,
    pub(crate) database: Box<dyn DatabaseFile + Send>,
    pub(crate) wal: Option<Box<dyn BaseFile + Send>>,
    /// What the WAL's name led to when it was opened.
    pub(crate) wal_identity: Option<FileIdentity>,
    pub(crate) tap: WalTap,
    pub(crate) epoch: Epoch,
    pub(crate) timeout_ms: u64,
    /// The mark as it was when the open WAL transaction began.
    pub(crate) base: Option<MarkState>,
    /// Of the open transaction, once some of it was sent.
    pub(crate) origin: Option<Origin>,
    /// From an acknowledged commit until the write lock is released: three disks have it.
    pub(crate) skips_wal_sync: bool,
    /// Ranges written in rollback mode: length by offset.
    pub(crate) dirty: BTreeMap<u64, u64>,
    pub(crate) in_checkpoint: bool,
    /// Why the running checkpoint must not write.
    pub(crate) checkpoint_refusal: Option<Refusal>,
    pub(crate) database_touched: bool,
    /// Bytes were written in rollback mode that no commit and no playback accounts for yet.
    pub(crate) unaccounted: bool,
    /// Whether the file was known to be ours when the checkpoint, or the transaction of rollback
    /// mode, began.
    pub(crate) began_stamped: bool,
    /// The reason not to commit was found in a transaction that is over; the lock was kept.
    pub(crate) must_check_again: bool,
    pub(crate) acknowledged: Option<Acknowledged>,
    /// Where the log stood when the reserved lock was taken for a transaction that knows of no WAL;
    /// none when it was not.
    pub(crate) reserved_at: Option<Lsn>,
    /// Why the open rollback-mode transaction cannot be committed, found when it began.
    pub(crate) rollback_refusal: Option<Refusal>,
    /// A commit of rollback mode was refused: SQLite plays its journal back next.
    pub(crate) expects_playback: bool,
    pub(crate) must_roll_forward: bool,
    /// The file lacks what the log has, in rollback mode: it is brought level before the next lock.
    pub(crate) must_follow: bool,
    /// The wal-index lacks a commit that the WAL has.
    pub(crate) must_void_index: bool,
    /// Why no transaction may begin while the WAL's write lock is held, found when it was taken.
    pub(crate) write_refusal: Option<Refusal>,
    /// Whether the host's checkpoints can leave pages out (before 3.51.3).
    pub(crate) distrusts_checkpoints: bool,
    /// Whether the database file is locked exclusively: when its WAL is closed then, it goes.
    pub(crate) holds_exclusive_lock: bool,
    /// Whether the WAL's write lock in shared memory is held: only at its release can the file be
    /// brought level while it is open.
    pub(crate) holds_write_lock: bool,
    /// Nothing says that the file is to be protected, if a `VACUUM INTO` opens it.
    pub(crate) may_be_copy: bool,
    pub(crate) poisoned: Option<String>,
    pub(crate) last_error: String,
    pub(crate) warnings: Vec<String>,
}

impl Connection {
    /// A connection whose local file is level with the log, or was found so by another opener.
    pub(crate) fn new(
        surroundings: Surroundings,
        path: PathBuf,
        mark: Mark,
        database: Box<dyn DatabaseFile + Send>,
        log: (DatabaseId, Epoch),
    ) -> Self {
        let (database_id, epoch) = log;
        Self {
            surroundings,
            path,
            database_id,
            durability: Durability::default(),
            table: mark.page_table(),
            mark,
            database,
            wal: None,
            wal_identity: None,
            tap: WalTap::default(),
            epoch,
            timeout_ms: DEFAULT_TIMEOUT_MS,
            base: None,
            origin: None,
            skips_wal_sync: false,
            dirty: BTreeMap::new(),
            in_checkpoint: false,
            checkpoint_refusal: None,
            database_touched: false,
            unaccounted: false,
            began_stamped: false,
            must_check_again: false,
            acknowledged: None,
            reserved_at: None,
            rollback_refusal: None,
            expects_playback: false,
            must_roll_forward: false,
            must_follow: false,
            must_void_index: false,
            write_refusal: None,
            distrusts_checkpoints: false,
            holds_exclusive_lock: false,
            holds_write_lock: false,
            may_be_copy: false,
            poisoned: None,
            last_error: String::new(),
            warnings: Vec::new(),
        }
    }

    /// The state, for `durovfs_status()`.
    pub fn status(&mut self) -> FileStatus {
        let state = self.mark.read().ok();
        let position = state.map(|state| self.confirmed_position(&state));
        FileStatus {
            database: self.database_id,
            name: self.mark.name().to_owned(),
            position: position.unwrap_or(LogPosition::ZERO),
            epoch: self.epoch,
            timeout_ms: self.timeout_ms,
            durability: self.durability,
            unconfirmed: state.is_some_and(|state| state.unconfirmed.is_some()),
            in_flight: state.is_some_and(|state| state.in_flight.is_some()),
            last_error: self.last_error.clone(),
            warnings: self
                .warnings
                .iter()
                .chain(&self.poisoned)
                .cloned()
                .collect(),
        }
    }

    /// Time that a commit may take; none is for ever.
    pub(crate) fn timeout(&self) -> Option<Duration> {
        (self.timeout_ms != 0).then(|| Duration::from_millis(self.timeout_ms))
    }

    /// Notes a refusal for `durovfs_last_error()` and the log, and returns it.
    pub(crate) fn noted(&mut self, refusal: Refusal) -> Refusal {
        let line = format!("{}: {}", self.path.display(), refusal.message);
        (self.surroundings.log)(LogLevel::Error, &line);
        self.last_error.clone_from(&refusal.message);
        refusal
    }

    /// No further write is taken until the database is opened again.
    pub fn poison(&mut self, reason: &str) {
        if self.poisoned.is_none() {
            self.poisoned = Some(format!("{reason}; close all connections and open it again"));
        }
    }

    /// Takes back what opening began for a file without content, which is not to be protected.
    /// False when there is more than that.
    pub(crate) fn forget_new(&mut self) -> bool {
        let is_new = self.mark.read().is_ok_and(|state| {
            state.last.is_none() && state.in_flight.is_none() && state.unconfirmed.is_none()
        });
        is_new && self.may_be_copy && std::fs::remove_file(mark_path(&self.path)).is_ok()
    }

    pub(crate) fn check_not_poisoned(&self) -> Result<(), Refusal> {
        match &self.poisoned {
            Some(reason) => Err(Refusal::not_committed(reason.clone())),
            None => Ok(()),
        }
    }

    /// The WAL was opened.
    pub fn attach_wal(&mut self, wal: Box<dyn BaseFile + Send>) {
        self.end_wal_transaction();
        self.tap = WalTap::default();
        self.reserved_at = None;
        self.wal_identity = FileIdentity::of(&with_suffix(&self.path, "-wal"));
        self.wal = Some(wal);
    }

    /// The WAL is about to be closed.
    pub fn detach_wal(&mut self) {
        self.end_wal_transaction();
        if self.holds_exclusive_lock {
            // SQLite deletes it next, whatever is said here; what is wrong is in the log.
            let _ = self.before_wal_ends();
        }
        self.wal = None;
    }

    /// A write to the WAL.
    ///
    /// # Errors
    /// A refusal that SQLite must see; it then rolls back.
    pub fn write_wal(&mut self, offset: u64, data: &[u8]) -> Result<(), Refusal> {
        match self.try_write_wal(offset, data) {
            Ok(()) => Ok(()),
            Err(refusal) => {
                self.abandon_wal_transaction();
                Err(self.noted(refusal))
            }
        }
    }

    fn try_write_wal(&mut self, offset: u64, data: &[u8]) -> Result<(), Refusal> {
        self.check_not_poisoned()?;
        let Some(wal) = self.wal.take() else {
            return Err(crate::mark::misuse("write to a WAL that is not open"));
        };
        let result = self.write_wal_to(wal.as_ref(), offset, data);
        self.wal = Some(wal);
        result
    }

    fn write_wal_to(
        &mut self,
        wal: &dyn BaseFile,
        offset: u64,
        data: &[u8],
    ) -> Result<(), Refusal> {
        let before = self.tap.start();
        let step = self.tap.write(wal, offset, data);
        let step = step.map_err(|error| Refusal::not_committed(error.to_string()))?;
        if let Some(start) = self.tap.start()
            && (before != Some(start) || self.base.is_none())
            && step != Step::Repeat
            && !self.tap.awaits_repeat()
        {
            // Before the first byte of it is written.
            self.skips_wal_sync = false;
            self.begin_wal_transaction(wal, start)?;
        }
        for payload in self.tap.take_ready() {
            self.stream(payload)?;
        }
        match step {
            Step::Pass => wal.write_at(data, offset),
            Step::Pieces(pieces) => write_pieces(wal, &pieces),
            Step::Complete(pieces) => {
                write_pieces(wal, &pieces)?;
                self.commit_wal_transaction(wal)
            }
            Step::Repeat => self.repeat_commit_frame(wal),
        }
    }

    /// Whether a sync of the WAL is made: not between an acknowledged commit and the release of the
    /// write lock; in the middle of a copy of its last frame neither.
    ///
    /// # Errors
    /// When SQLite takes a transaction for written whose commit frame is still held.
    pub fn sync_wal(&mut self) -> Result<bool, Refusal> {
        if self.tap.is_holding() && !self.tap.awaits_repeat() {
            let refusal = Refusal::not_committed("commit frame without its page");
            self.abandon_wal_transaction();
            return Err(self.noted(refusal));
        }
        Ok(!self.skips_wal_sync)
    }

    /// The WAL was truncated.
    ///
    /// # Errors
    /// When the mark cannot be written.
    pub fn wal_truncated(&mut self, size: u64) -> Result<(), Refusal> {
        if size != 0 {
            return Ok(());
        }
        let mut state = self.mark.read()?;
        if state.wal.take().is_some() {
            self.mark.write(&state)?;
        }
        Ok(())
    }

    /// Lays held bytes over what was read; the end of the WAL if that is held.
    pub fn overlay_wal(&self, buffer: &mut [u8], offset: u64) -> Option<u64> {
        self.tap.overlay(buffer, offset)
    }

    /// What the user of a connection does whose local file is behind.
    pub(crate) fn way_forward(&self) -> &'static str {
        match self.holds_write_lock {
            true => "it is fetched now: try again",
            // Rollback mode, or exclusive mode, in which nothing is changed under SQLite's feet.
            false => {
                "it is fetched when nobody reads the file: try again; in exclusive locking mode, \
                 close all connections and open it again"
            }
        }
    }

    /// SQLite ended a transaction well (both modes).
    pub fn commit_ended(&mut self) {
        self.skips_wal_sync = false;
        self.tap.commit_ended();
        if let Err(refusal) = self.finish_rollback_commit() {
            // The commit stays in flight in the mark; the next open finds out.
            self.poison(&refusal.message);
            self.noted(refusal);
        }
    }

    pub(crate) fn end_wal_transaction(&mut self) {
        self.skips_wal_sync = false;
        self.abandon_wal_transaction();
    }

    fn abandon_wal_transaction(&mut self) {
        self.tap.abandon();
        self.abort_origin();
        self.base = None;
    }

    /// Settles deferred commits, and a commit in flight, left by this process or by one that died.
    ///
    /// # Errors
    /// When the local file lacks it, or nobody can tell.
    pub(crate) fn settle(&mut self, state: &mut MarkState) -> Result<(), Refusal> {
        let Some(in_flight) = state.in_flight else {
            return self.settle_deferred(state);
        };
        let sink = Arc::clone(&self.surroundings.sink);
        let (origin, base_lsn) = (in_flight.origin, in_flight.base_lsn);
        match sink.resolve(state.database, origin, base_lsn, self.timeout()) {
            CommitOutcome::NotCommitted { .. } => {
                state.in_flight = None;
                self.mark.write(state)
            }
            CommitOutcome::Committed { position } => {
                self.must_roll_forward = true;
                Err(Refusal::not_committed(format!(
                    "an earlier commit ({position}) is committed and not in the local file yet; {}",
                    self.way_forward()
                )))
            }
            CommitOutcome::Behind { last_transaction } => {
                self.must_roll_forward = true;
                let position = last_transaction.position;
                let way = self.way_forward();
                Err(Refusal::not_committed(format!(
                    "the log is ahead, at {position}; {way}"
                )))
            }
            CommitOutcome::Unknown { reason } => Err(Refusal::not_committed(format!(
                "what became of an earlier commit is not known yet, so nothing was sent: {reason}"
            ))),
            CommitOutcome::NotPrimary { reason } => {
                Err(Refusal::new(RefusalKind::NotPrimary, reason))
            }
        }
    }

    /// Position of the last transaction that counts as the base of the next one.
    pub(crate) fn base_lsn(state: &MarkState) -> Lsn {
        state.last_lsn()
    }
}

fn write_pieces(file: &dyn BaseFile, pieces: &[(u64, Vec<u8>)]) -> Result<(), Refusal> {
    pieces
        .iter()
        .try_for_each(|(offset, bytes)| file.write_at(bytes, *offset))
}

#[cfg(test)]
mod tests;
