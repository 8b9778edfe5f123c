//! What must hold when a WAL ends, because it is begun again, truncated or deleted: the database
//! file has all that was committed in it.
//!
//! SQLite before 3.51.3 can break that: a checkpoint that another connection overtakes counts
//! frames as copied that it never saw, and their pages go with the WAL. The page table knows each
//! page's checksum, so what is missing is found, and written from the WAL while it is still there.

use crate::connection::{Connection, LogLevel};
use crate::error::Refusal;
use crate::file::BaseFile;
use crate::mark::{KnownTransaction, WalPosition};
use crate::survey::is_lock_page;
use durovfs_wire::wal::{FRAME_HEADER_BYTES, FrameHeader, WAL_HEADER_BYTES, WalHeader};
use durovfs_wire::{PageChecksum, PageNo, PageSize};
use std::collections::BTreeMap;

impl Connection {
    /// Before a transaction begins the WAL anew.
    ///
    /// # Errors
    /// When the database file lacked pages: the transaction may have read them as they were before.
    /// They are written now, and every connection reads them when it begins again: SQLite has noted
    /// in the wal-index that this WAL is over.
    pub(crate) fn check_ended_wal(&mut self, wal: &dyn BaseFile) -> Result<(), Refusal> {
        let missing = self.complete_checkpoint(wal)?;
        if missing == 0 {
            return Ok(());
        }
        Err(Refusal::not_committed(format!(
            "SQLite's last checkpoint left {missing} pages out of the database file (a bug before \
             3.51.3); they are written now: try again"
        )))
    }

    /// Before the WAL is truncated to nothing, or deleted: nobody writes.
    ///
    /// # Errors
    /// When pages are missing, and cannot be written.
    pub fn before_wal_ends(&mut self) -> Result<(), Refusal> {
        let Some(wal) = self.wal.take() else {
            return Ok(());
        };
        let completed = self.complete_checkpoint(wal.as_ref());
        self.wal = Some(wal);
        completed.map(drop).map_err(|refusal| self.noted(refusal))
    }

    /// Whether the database file has every page that is committed in the WAL.
    pub(crate) fn is_checkpointed(
        &self,
        wal: &dyn BaseFile,
        last: &KnownTransaction,
        end: &WalPosition,
    ) -> Result<bool, Refusal> {
        let mut image = vec![0u8; last.page_size.get()];
        for page_no in frames_of(wal, last, end)?.into_keys() {
            self.database
                .read_at(&mut image, page_no.file_offset(last.page_size))?;
            if PageChecksum::of(page_no, &image) != self.table.read(page_no)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Writes pages that are committed in the WAL and not in the database file; returns how many.
    fn complete_checkpoint(&mut self, wal: &dyn BaseFile) -> Result<u32, Refusal> {
        // What others wrote is never overwritten: it is found, and refused, by its scan.
        if !self.distrusts_checkpoints || !self.mark.stamp_matches()? {
            return Ok(0);
        }
        let state = self.mark.read()?;
        let (Some(last), Some(end)) = (state.last, state.wal) else {
            return Ok(0);
        };
        let mut missing = 0;
        let mut image = vec![0u8; last.page_size.get()];
        for (page_no, frame) in frames_of(wal, &last, &end)? {
            let known = self.table.read(page_no)?;
            let offset = page_no.file_offset(last.page_size);
            self.database.read_at(&mut image, offset)?;
            if PageChecksum::of(page_no, &image) == known {
                continue;
            }
            wal.read_at(&mut image, page_offset(last.page_size, frame))?;
            if PageChecksum::of(page_no, &image) != known {
                return Err(Refusal::not_committed(format!(
                    "page {page_no} is damaged, in the database file and in the WAL; close all \
                     connections, then {}",
                    self.mark.way_out()
                )));
            }
            if missing == 0 {
                self.mark.void_stamp()?;
            }
            self.database.write_at(&image, offset)?;
            missing += 1;
        }
        if missing > 0 {
            // Before the WAL may go.
            self.database.sync()?;
            self.mark.stamp()?;
            let path = self.path.display();
            let line = format!("{path}: wrote {missing} pages that a checkpoint left out");
            (self.surroundings.log)(LogLevel::Error, &line);
        }
        Ok(missing)
    }
}

/// The newest frame of each page in the WAL that the mark knows; none when another stands there.
fn frames_of(
    wal: &dyn BaseFile,
    last: &KnownTransaction,
    end: &WalPosition,
) -> Result<BTreeMap<PageNo, u32>, Refusal> {
    let mut frames = BTreeMap::new();
    let mut head = [0u8; WAL_HEADER_BYTES];
    wal.read_at(&mut head, 0)?;
    if WalHeader::parse(&head).is_none_or(|header| header.salts != end.salts) {
        return Ok(frames);
    }
    let mut head = [0u8; FRAME_HEADER_BYTES];
    for frame in 1..=end.frame {
        wal.read_at(&mut head, WalHeader::frame_offset(last.page_size, frame))?;
        let Some(page_no) = PageNo::new(FrameHeader::parse(&head).page_no) else {
            continue;
        };
        if page_no.get() <= last.page_count && !is_lock_page(page_no, last.page_size) {
            frames.insert(page_no, frame);
        }
    }
    Ok(frames)
}

fn page_offset(page_size: PageSize, frame: u32) -> u64 {
    WalHeader::frame_offset(page_size, frame) + FRAME_HEADER_BYTES as u64
}
