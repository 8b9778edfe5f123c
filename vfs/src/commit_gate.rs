//! The commit gate: what happens between the completing write of a WAL transaction and its reaching
//! the file, and the sending that both gates share. The order of its steps is the product's
//! guarantee; `docs/architecture.md`, "Gate, in order", tells it.

use crate::connection::{Connection, LogLevel};
use crate::error::{Refusal, RefusalKind};
use crate::file::{BaseFile, FileIdentity};
use crate::mark::{InFlight, KnownTransaction, MarkState, WalPosition, describe, with_suffix};
use crate::page_table::PageChanges;
use crate::survey::{Content, DatabaseHeader, WalSurvey};
use crate::wal_tap::Completion;
use bytes::Bytes;
use durovfs_wire::client::CommitOutcome;
use durovfs_wire::{CommitHeader, LogPosition, Origin, PageSize, Timestamp};
use std::sync::Arc;

/// A WAL transaction whose completing write is held, ready to be sent.
pub(crate) struct Prepared {
    /// The mark's state before it.
    pub(crate) base: MarkState,
    pub(crate) commit: CommitHeader,
    /// Its last slots.
    pub(crate) payload: Bytes,
    pub(crate) changes: PageChanges,
    /// Whether earlier slots were streamed.
    pub(crate) streamed: bool,
    /// Where the WAL ends after it.
    pub(crate) completion_end: WalPosition,
}

impl Prepared {
    /// The transaction, once its position is known.
    pub(crate) fn known_at(&self, position: LogPosition) -> KnownTransaction {
        KnownTransaction {
            position,
            checksum: self.commit.checksum,
            page_size: self.commit.page_size,
            page_count: self.commit.page_count,
        }
    }
}

impl Connection {
    /// A WAL transaction begins: settles what is open, and checks that nobody wrote in between.
    pub(crate) fn begin_wal_transaction(
        &mut self,
        wal: &dyn BaseFile,
        start: WalPosition,
    ) -> Result<(), Refusal> {
        self.check_in_place()?;
        if let Some(refusal) = self.write_refusal.clone() {
            return Err(refusal);
        }
        if FileIdentity::of(&with_suffix(&self.path, "-wal")) != self.wal_identity {
            return Err(replaced("WAL"));
        }
        let mut state = self.mark.read()?;
        self.settle(&mut state)?;
        if state.applying {
            return Err(Refusal::not_committed(
                "a roll forward of the local file was cut short: close all connections and open it \
                 again",
            ));
        }
        let Some(last) = state.last else {
            return Err(self.foreign("its WAL is written before it has a first transaction"));
        };
        let continues = state.wal.is_some_and(|wal| {
            (wal.salts, wal.frame, wal.checksum) == (start.salts, start.frame, start.checksum)
        });
        if !continues {
            if self.index_lags(wal, (&last, state.wal), &start)? {
                self.must_void_index = true;
                return Err(Refusal::not_committed(
                    "the process that made the last commit died before it was in the wal-index, \
                     which is made again now: try again",
                ));
            }
            if start.frame != 0 {
                let marked = state.wal.map_or("none".to_owned(), |wal| describe(&wal));
                return Err(self.foreign(&format!(
                    "its WAL ends at {}, where the mark says {marked}",
                    describe(&start)
                )));
            }
            // A WAL that starts afresh has all before it in the database file.
            self.check_ended_wal(wal)?;
            self.check_database_file(&last)?;
        } else if !self.mark.stamp_matches()? {
            self.check_below_wal(wal, &last)?;
        }
        self.base = Some(state);
        Ok(())
    }

    /// Whether SQLite would write over the last commit, which the mark knows and the WAL has: a
    /// process that dies between the write that completes its commit and the wal-index leaves it
    /// so, and who has the database open does not look into the WAL again by itself.
    fn index_lags(
        &self,
        wal: &dyn BaseFile,
        (last, marked): (&KnownTransaction, Option<WalPosition>),
        start: &WalPosition,
    ) -> Result<bool, Refusal> {
        let (Some(marked), Some(header)) = (marked, self.tap.header()) else {
            return Ok(false);
        };
        if start.frame >= marked.frame {
            return Ok(false);
        }
        let survey = WalSurvey::read(wal)?;
        if survey.is_none_or(|survey| survey.end != marked) {
            return Ok(false);
        }
        if start.salts == marked.salts {
            return Ok(true);
        }
        // SQLite begins a WAL with other salts when all of it is in the database file; or when it
        // knows of no WAL at all.
        Ok(header.checkpoint_sequence == 0 && !self.is_checkpointed(wal, last, &marked)?)
    }

    /// Makes sure that the database file holds what the mark says; scans it only when it does not
    /// look as we left it.
    pub(crate) fn check_database_file(&mut self, last: &KnownTransaction) -> Result<(), Refusal> {
        if self.mark.stamp_matches()? {
            return Ok(());
        }
        self.scan(last, None)
    }

    /// The same for a database whose WAL has committed frames: they count before what the file
    /// has. Left out while another connection's checkpoint writes the file, and made at the next
    /// transaction then: each page that it writes stands in the WAL, too.
    fn check_below_wal(
        &mut self,
        wal: &dyn BaseFile,
        last: &KnownTransaction,
    ) -> Result<(), Refusal> {
        let mut scan = || {
            let survey = WalSurvey::read(wal)?;
            self.scan(last, survey.as_ref().map(|survey| (wal, survey)))
        };
        self.database.outside_checkpoints(&mut scan).map(drop)
    }

    pub(crate) fn scan(
        &self,
        last: &KnownTransaction,
        wal: Option<(&dyn BaseFile, &WalSurvey)>,
    ) -> Result<(), Refusal> {
        let line = format!("{}: scan, its stamp does not match", self.path.display());
        (self.surroundings.log)(LogLevel::Info, &line);
        let look = self.mark.look()?;
        let header = DatabaseHeader {
            page_size: last.page_size,
            page_count: last.page_count,
        };
        let content = Content {
            database: self.database.as_ref(),
            wal,
            header,
        };
        if !content.is_as_marked(last, &self.table)? {
            return Err(self.foreign("the file holds other pages"));
        }
        self.mark.stamp_as(&look)
    }

    /// Makes sure that the name of the database still leads to the file that is open.
    pub(crate) fn check_in_place(&self) -> Result<(), Refusal> {
        match self.database.has_moved()? {
            true => Err(replaced("database file")),
            false => Ok(()),
        }
    }

    /// Somebody wrote to the files without durovfs. Names where the log stands, and the way out.
    pub(crate) fn foreign(&self, what: &str) -> Refusal {
        let last = self.mark.newest().and_then(|state| state.last);
        let position = last.map_or(LogPosition::ZERO, |last| last.position);
        Refusal::not_committed(format!(
            "the local file was changed without durovfs after {position}, where its log stands: \
             {what}; nothing was sent or overwritten; close all connections, then {}",
            self.mark.way_out()
        ))
    }

    /// Streams slots of the open transaction.
    pub(crate) fn stream(&mut self, payload: Bytes) -> Result<(), Refusal> {
        let page_size = self.tap.page_size();
        let (Some(page_size), Some(mut base)) = (page_size, self.base) else {
            return Err(crate::mark::misuse("pages outside a transaction"));
        };
        // A large transaction waits for the quorum, and so for all before it.
        self.confirm_all(&mut base)?;
        self.base = Some(base);
        self.stream_pages(&base, page_size, payload)
    }

    pub(crate) fn stream_pages(
        &mut self,
        base: &MarkState,
        page_size: PageSize,
        payload: Bytes,
    ) -> Result<(), Refusal> {
        let sink = Arc::clone(&self.surroundings.sink);
        let origin = self.take_origin();
        self.origin = Some(origin);
        sink.send_pages(base.database, origin, page_size, payload)
            .map_err(|error| Refusal::not_committed(error.message))
    }

    fn take_origin(&mut self) -> Origin {
        let sink = &self.surroundings.sink;
        self.origin.take().unwrap_or_else(|| sink.next_origin())
    }

    /// Tells the sink that what was streamed will not be committed.
    pub(crate) fn abort_origin(&mut self) {
        if let Some(origin) = self.origin.take()
            && let Ok(state) = self.mark.read()
        {
            self.surroundings.sink.abort(state.database, origin);
        }
    }

    /// Commits the transaction whose completing write is held, and writes that.
    pub(crate) fn commit_wal_transaction(&mut self, wal: &dyn BaseFile) -> Result<(), Refusal> {
        let mut prepared = self.prepare()?;
        if self.may_defer(&prepared)? {
            return self.commit_deferred(wal, prepared);
        }
        self.confirm_all(&mut prepared.base)?;
        prepared.commit.base_lsn = Self::base_lsn(&prepared.base);
        let Prepared { base, commit, .. } = prepared;
        let position = self.submit(&base, commit, prepared.payload.clone())?;
        let state = MarkState {
            last: Some(prepared.known_at(position)),
            wal: Some(prepared.completion_end),
            in_flight: None,
            ..base
        };
        match self.release_held(wal) {
            Ok(()) => self.note_taken_over(&prepared, &state),
            Err(refusal) => {
                // The quorum has the transaction and this file does not: nothing may build on it.
                let message =
                    format!("{position} is committed, the local file could not take it: {refusal}");
                self.poison(&message);
                return Err(Refusal::new(RefusalKind::Unknown, message));
            }
        }
        Ok(())
    }

    fn prepare(&mut self) -> Result<Prepared, Refusal> {
        let (Some(completion), Some(base)) = (self.tap.take_completion(), self.base) else {
            return Err(crate::mark::misuse("commit outside a transaction"));
        };
        let Completion {
            page_size,
            page_count,
            slot_count,
            changes,
            payload,
            end,
            ..
        } = completion;
        if base.last.is_some_and(|last| last.page_size != page_size) {
            return Err(self.foreign("the page size of its WAL is another"));
        }
        let old_count = base.page_count();
        let checksum =
            self.table
                .checksum_after(base.checksum(), old_count, page_count, &changes)?;
        let streamed = self.origin.is_some();
        let commit = CommitHeader {
            origin: self.take_origin(),
            time: Timestamp::default(),
            base_lsn: Self::base_lsn(&base),
            page_size,
            page_count,
            slot_count,
            checksum,
            whole_image: false,
        };
        Ok(Prepared {
            base,
            commit,
            payload,
            changes,
            streamed,
            completion_end: end,
        })
    }

    /// Lets the held write go to the file.
    pub(crate) fn release_held(&mut self, wal: &dyn BaseFile) -> Result<(), Refusal> {
        if let Some((offset, bytes)) = self.tap.held() {
            wal.write_at(bytes, offset)?;
        }
        self.tap.acknowledge();
        self.base = None;
        self.skips_wal_sync = true;
        Ok(())
    }

    /// Writes a copy of the frame last committed, with which SQLite pads its commit. The log has
    /// the transaction already, so the mark only notes that the WAL ends later.
    pub(crate) fn repeat_commit_frame(&mut self, wal: &dyn BaseFile) -> Result<(), Refusal> {
        let Some((offset, bytes)) = self.tap.held() else {
            return Err(crate::mark::misuse("a copy of a frame that is not held"));
        };
        if let Err(refusal) = wal.write_at(bytes, offset) {
            // The commit stands, and SQLite takes it back: nothing may build on that.
            let message = format!(
                "a commit is done, the local file could not take SQLite's padding: {refusal}"
            );
            self.poison(&message);
            return Err(Refusal::new(RefusalKind::Unknown, message));
        }
        let end = self.tap.acknowledge();
        // A crash before this leaves a WAL that ends later than the mark says, with the pages that
        // the mark knows: the next open finds that.
        let noted = self.mark.read().and_then(|state| {
            self.mark.write(&MarkState {
                wal: end.or(state.wal),
                ..state
            })
        });
        if let Err(refusal) = noted {
            self.poison(&refusal.message);
            self.noted(refusal);
        }
        Ok(())
    }

    /// The file has the transaction. From here on SQLite must hear success: it recovers this commit
    /// from the WAL in any case.
    pub(crate) fn note_taken_over(&mut self, prepared: &Prepared, state: &MarkState) {
        let (old_count, page_count) = (prepared.base.page_count(), prepared.commit.page_count);
        let noted = self
            .table
            .apply(old_count, page_count, &prepared.changes)
            .and_then(|()| self.mark.write(state));
        if let Err(refusal) = noted {
            self.poison(&refusal.message);
            self.noted(refusal);
        }
    }

    /// Sends a commit and waits for what becomes of it. On success it is still in flight in the
    /// mark, so that a crash before the local file has it is found.
    pub(crate) fn submit(
        &mut self,
        base: &MarkState,
        commit: CommitHeader,
        payload: Bytes,
    ) -> Result<LogPosition, Refusal> {
        let CommitHeader {
            origin,
            base_lsn,
            checksum,
            ..
        } = commit;
        let in_flight = Some(InFlight {
            origin,
            base_lsn,
            checksum,
        });
        // Before it is sent: whoever comes after a crash must know that there is one to ask for.
        self.mark.write(&MarkState { in_flight, ..*base })?;
        let sink = Arc::clone(&self.surroundings.sink);
        let outcome = sink.commit(base.database, commit, payload, self.timeout());
        let refusal = match outcome {
            CommitOutcome::Committed { position } => {
                self.epoch = position.epoch;
                return Ok(position);
            }
            CommitOutcome::Unknown { reason } => {
                return Err(Refusal::new(RefusalKind::Unknown, reason));
            }
            CommitOutcome::NotCommitted { reason } => Refusal::not_committed(reason),
            CommitOutcome::NotPrimary { reason } => Refusal::new(RefusalKind::NotPrimary, reason),
            CommitOutcome::Behind { last_transaction } => {
                self.must_roll_forward = true;
                let position = last_transaction.position;
                let (lsn, way) = (base.last_lsn(), self.way_forward());
                let message = format!("local file is at lsn {lsn}, the log at {position}; {way}");
                Refusal::not_committed(message)
            }
        };
        self.mark.write(&MarkState {
            in_flight: None,
            ..*base
        })?;
        Err(refusal)
    }
}

/// What is written to an open file that has no name any more nobody will find.
fn replaced(what: &str) -> Refusal {
    Refusal::not_committed(format!(
        "the {what} was moved, deleted or replaced while it is open; nothing was sent; close all \
         connections and open the database again"
    ))
}
