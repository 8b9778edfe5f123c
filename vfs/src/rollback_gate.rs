//! The gate of rollback-journal mode, and of the first transaction of every new database, which
//! SQLite makes in that mode before a WAL exists.
//!
//! Page writes to the database file outside a checkpoint are noted by number. SQLite sends
//! `SQLITE_FCNTL_SYNC` when all pages of a commit are written and before the journal ends; then the
//! pages are read back and committed. SQLite sends it as well after it played a journal back:
//! then no page differs from the page table, and there is nothing to commit.

use crate::connection::{Acknowledged, Connection};
use crate::error::{Refusal, RefusalKind};
use crate::file::BaseFile;
use crate::mark::{KnownTransaction, MarkState, with_suffix};
use crate::page_table::PageChanges;
use crate::survey::{Content, DatabaseHeader, committed_after, is_lock_page};
use durovfs_wire::entry::PayloadBuilder;
use durovfs_wire::wal::{WAL_HEADER_BYTES, WalHeader};
use durovfs_wire::{CommitHeader, DatabaseChecksum, PageChecksum, PageNo, Timestamp};
use std::fs::File;

/// Another connection's WAL holds commits that this transaction, which knows of no WAL, has not
/// seen: it changes the journal mode while that one writes.
fn in_wal_mode() -> Refusal {
    Refusal::busy("the database is in WAL mode, and another connection writes to it: try again")
}

impl Connection {
    /// A write transaction in rollback mode may begin (the reserved lock was taken).
    ///
    /// # Errors
    /// When the file must be brought level first (`open/following.rs`): the lock is to be given
    /// back, and SQLite tries again. All other reasons not to commit are told at the commit, so
    /// that a journal can be played back before.
    pub fn reserved(&mut self) -> Result<(), Refusal> {
        if !self.dirty.is_empty() {
            return Ok(());
        }
        self.rollback_refusal = self.check_rollback_base().err();
        match self.rollback_refusal.take_if(|_| self.must_follow) {
            Some(refusal) => Err(self.noted(Refusal::busy(refusal.message))),
            None => Ok(()),
        }
    }

    /// The log has what the file lacks.
    fn note_behind(&mut self) {
        self.must_follow |= std::mem::take(&mut self.must_roll_forward);
    }

    fn check_rollback_base(&mut self) -> Result<(), Refusal> {
        self.must_check_again = false;
        self.began_stamped = self.mark.stamp_matches().unwrap_or(false);
        self.check_not_poisoned()?;
        self.check_in_place()?;
        let mut state = self.mark.read()?;
        self.settle(&mut state)
            .inspect_err(|_| self.note_behind())?;
        self.reserved_at = Some(state.last_lsn());
        match state.last {
            Some(last) if state.wal.is_none() => self.check_database_file(&last)?,
            Some(_) if self.wal_is_in_use(&state)? => return Err(in_wal_mode()),
            // In this mode there is no WAL, and the mark knows of one: somebody took it away.
            Some(last) => self.scan(&last, None)?,
            None => {}
        }
        self.began_stamped = true;
        Ok(())
    }

    /// Whether the WAL that the mark knows of is there. SQLite leaves WAL mode in two steps, and
    /// holds no lock in between that keeps others from beginning a WAL anew.
    fn wal_is_in_use(&self, state: &MarkState) -> Result<bool, Refusal> {
        let path = with_suffix(&self.path, "-wal");
        let wal = match File::open(&path) {
            Ok(wal) => wal,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(Refusal::io("open WAL", &path, &error)),
        };
        let mut head = [0u8; WAL_HEADER_BYTES];
        let read = BaseFile::read_at(&wal, &mut head, 0)?;
        let header = WalHeader::parse(&head).filter(|_| read == head.len());
        Ok(header.map(|header| header.salts) == state.wal.map(|wal| wal.salts))
    }

    /// A write to the database file. None is refused but a checkpoint's: SQLite must be able to
    /// play its journal back.
    ///
    /// # Errors
    /// The file's own; a refusal when a checkpoint would write what is not confirmed.
    pub fn write_database(&mut self, offset: u64, data: &[u8]) -> Result<(), Refusal> {
        if let Some(refusal) = self.checkpoint_refusal.clone() {
            return Err(refusal);
        }
        if !self.in_checkpoint {
            if self.must_check_again {
                self.rollback_refusal = self.check_rollback_base().err();
            }
            if !std::mem::replace(&mut self.unaccounted, true) {
                self.mark.void_stamp()?;
            }
            let length = self.dirty.entry(offset).or_default();
            *length = (*length).max(data.len() as u64);
        }
        self.database_touched = true;
        self.database.write_at(data, offset)
    }

    /// All pages of a rollback-mode transaction are in the file: commits them.
    ///
    /// # Errors
    /// A refusal; SQLite then plays its journal back.
    pub fn commit_database(&mut self) -> Result<(), Refusal> {
        if self.dirty.is_empty() || self.in_checkpoint {
            return Ok(());
        }
        let plays_back = std::mem::take(&mut self.expects_playback);
        if plays_back && self.rollback_refusal.is_some() {
            // What the journal brings back is not in the page table: that was the refusal's reason.
            // In exclusive mode the next transaction begins without a lock to be taken.
            self.must_check_again = true;
            self.unaccounted = false;
            return Ok(());
        }
        let result = self.try_commit_database(plays_back);
        match &result {
            Ok(()) => self.unaccounted = false,
            Err(refusal) => {
                self.note_behind();
                if refusal.kind == RefusalKind::Busy {
                    // What the journal brings back may stand in the WAL otherwise.
                    self.rollback_refusal = Some(refusal.clone());
                }
                self.expects_playback = true;
                self.abort_origin();
            }
        }
        result.map_err(|refusal| self.noted(refusal))
    }

    fn try_commit_database(&mut self, plays_back: bool) -> Result<(), Refusal> {
        let mut base = self.mark.read()?;
        let Some(header) = DatabaseHeader::read(self.database.as_ref())? else {
            return match base.page_count() {
                0 => Ok(()),
                _ => Err(self.foreign("it is empty now")),
            };
        };
        let whole_image = base
            .last
            .is_none_or(|last| last.page_size != header.page_size);
        let changes = self.changed_pages(&base, &header, whole_image)?;
        if header.page_count == base.page_count()
            && !self.is_transaction(header, whole_image, &changes)?
        {
            return Ok(());
        }
        if plays_back {
            self.poison("a refused commit was not taken back (journal_mode=OFF?)");
        }
        self.check_not_poisoned()?;
        if let Some(refusal) = self.rollback_refusal.clone() {
            return Err(refusal);
        }
        if self.reserved_at.is_some_and(|lsn| lsn != base.last_lsn()) {
            return Err(in_wal_mode());
        }
        self.settle(&mut base)?;
        self.submit_pages(&base, &header, whole_image, changes)
    }

    /// Whether these changes are more than a journal that was played back. SQLite does not journal
    /// what stands on free pages, so that playing back leaves other bytes there than it found.
    fn is_transaction(
        &self,
        header: DatabaseHeader,
        whole_image: bool,
        changes: &PageChanges,
    ) -> Result<bool, Refusal> {
        if whole_image || changes.is_empty() {
            return Ok(!changes.is_empty());
        }
        let content = Content {
            database: self.database.as_ref(),
            wal: None,
            header,
        };
        let free = content.free_pages()?;
        Ok(!changes.keys().all(|page_no| free.contains(page_no)))
    }

    /// Pages that were written and are not as the page table has them.
    fn changed_pages(
        &self,
        base: &MarkState,
        header: &DatabaseHeader,
        whole_image: bool,
    ) -> Result<PageChanges, Refusal> {
        let mut changes = PageChanges::new();
        let mut image = vec![0u8; header.page_size.get()];
        let pages: Box<dyn Iterator<Item = u32>> = if whole_image {
            Box::new(1..=header.page_count)
        } else {
            Box::new(self.dirty_pages(header.page_size.get() as u64).into_iter())
        };
        for page_no in pages
            .filter(|n| *n <= header.page_count)
            .filter_map(PageNo::new)
        {
            if is_lock_page(page_no, header.page_size) {
                continue;
            }
            self.database
                .read_at(&mut image, page_no.file_offset(header.page_size))?;
            let checksum = PageChecksum::of(page_no, &image);
            let known = !whole_image && page_no.get() <= base.page_count();
            if !known || self.table.read(page_no)? != checksum {
                changes.insert(page_no, checksum);
            }
        }
        Ok(changes)
    }

    fn submit_pages(
        &mut self,
        base: &MarkState,
        header: &DatabaseHeader,
        whole_image: bool,
        changes: PageChanges,
    ) -> Result<(), Refusal> {
        let DatabaseHeader {
            page_size,
            page_count,
        } = *header;
        let mut builder = PayloadBuilder::default();
        let mut image = vec![0u8; page_size.get()];
        for (slot, page_no) in changes.keys().enumerate() {
            if !builder.has_room(page_size) {
                self.stream_pages(base, page_size, builder.take())?;
            }
            self.database
                .read_at(&mut image, page_no.file_offset(page_size))?;
            builder.push(slot as u32, *page_no, &image);
        }
        let old_count = if whole_image { 0 } else { base.page_count() };
        let before = if whole_image {
            DatabaseChecksum::EMPTY
        } else {
            base.checksum()
        };
        let checksum = self
            .table
            .checksum_after(before, old_count, page_count, &changes)?;
        let sink = &self.surroundings.sink;
        let origin = self.origin.take().unwrap_or_else(|| sink.next_origin());
        let commit = CommitHeader {
            origin,
            time: Timestamp::default(),
            base_lsn: Self::base_lsn(base),
            page_size,
            page_count,
            slot_count: changes.len() as u32,
            checksum,
            whole_image,
        };
        let position = self.submit(base, commit, builder.take())?;
        let last = Some(KnownTransaction {
            position,
            checksum,
            page_size,
            page_count,
        });
        let state = MarkState {
            last,
            wal: None,
            in_flight: None,
            ..*base
        };
        let old_count = base.page_count();
        self.acknowledged = Some(Acknowledged {
            state,
            old_count,
            changes,
            whole_image,
        });
        Ok(())
    }

    fn dirty_pages(&self, page_bytes: u64) -> std::collections::BTreeSet<u32> {
        let page = |offset: u64| u32::try_from(offset / page_bytes + 1).unwrap_or(u32::MAX);
        let pages = |(start, length): (&u64, &u64)| page(*start)..=page(start + length.max(&1) - 1);
        self.dirty.iter().flat_map(pages).collect()
    }

    /// Whether a sync of the database file may fail without SQLite hearing it: three disks have
    /// the commit.
    pub fn may_swallow_database_sync(&self) -> bool {
        self.acknowledged.is_some()
    }

    /// SQLite ended its journal: the local file has the acknowledged commit.
    pub(crate) fn finish_rollback_commit(&mut self) -> Result<(), Refusal> {
        self.dirty.clear();
        let Some(done) = self.acknowledged.take() else {
            return Ok(());
        };
        if done.whole_image {
            self.table.clear()?;
        }
        self.table
            .apply(done.old_count, done.state.page_count(), &done.changes)?;
        self.mark.write(&done.state)?;
        // In exclusive mode the lock is kept, and nobody comes in between.
        self.reserved_at = None;
        self.mark.stamp()
    }

    /// The exclusive lock was taken.
    pub fn exclusively_locked(&mut self) {
        self.holds_exclusive_lock = true;
    }

    /// The database lock drops below RESERVED, or goes.
    pub fn before_unlock(&mut self) {
        self.holds_exclusive_lock = false;
        self.dirty.clear();
        self.reserved_at = None;
        self.rollback_refusal = None;
        self.expects_playback = false;
        self.must_check_again = false;
        if std::mem::take(&mut self.unaccounted) {
            // Not stamped: whoever comes next reads the file, and finds what it holds.
            self.database_touched = false;
            let message = "pages were written that no commit sent and no journal took back \
                           (journal_mode=OFF?)";
            self.poison(message);
            self.noted(Refusal::not_committed(message));
        }
        if self.acknowledged.take().is_some() {
            let message = "a commit is acknowledged, and SQLite rolled it back here";
            self.poison(message);
            self.noted(Refusal::not_committed(message));
        }
        self.stamp_if_touched();
    }

    /// Stamps the file when it was written since, and was ours before: what was somebody else's is
    /// not ours because some pages were checkpointed, or played back.
    pub fn stamp_if_touched(&mut self) {
        if !std::mem::take(&mut self.database_touched) || !self.began_stamped {
            return;
        }
        if let Err(refusal) = self.mark.stamp() {
            // A stamp that is missing costs a scan at the next open, nothing else.
            self.noted(refusal);
        }
    }

    /// A checkpoint begins or ends.
    pub fn checkpoint(&mut self, running: bool) {
        self.in_checkpoint = running;
        self.checkpoint_refusal = None;
        if !running {
            self.stamp_if_touched();
            return;
        }
        self.began_stamped =
            self.mark.stamp_matches().unwrap_or(false) && !self.wal_has_unknown_commits();
        if let Err(refusal) = self.confirm_for_checkpoint() {
            // SQLite does not look at what the start of a checkpoint returns.
            self.checkpoint_refusal = Some(self.noted(refusal));
        }
    }

    /// Whether a checkpoint moves what somebody wrote without durovfs.
    fn wal_has_unknown_commits(&self) -> bool {
        let (Some(wal), Some(state)) = (&self.wal, self.mark.newest()) else {
            return false;
        };
        !matches!(committed_after(wal.as_ref(), state.wal), Ok(None))
    }

    /// The database file was truncated.
    pub fn database_truncated(&mut self) {
        // After a checkpoint no unlock of the database may follow: stamp at once.
        self.database_touched = true;
        if self.dirty.is_empty() {
            self.stamp_if_touched();
        }
    }
}
