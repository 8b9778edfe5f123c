//! The WAL's write lock: what is put right when it is taken, before SQLite looks whether its
//! snapshot is the newest, and when it is given back.
//!
//! A process that dies in a commit can leave a commit that the log has and the WAL lacks, or that
//! the WAL has and the wal-index lacks. Found when the lock is taken, both are mended at once and
//! the index is made void: SQLite sees that somebody else committed, reads the index anew, and
//! tries again by its busy handler. Found later, at the gate, only a refusal is left.

use crate::connection::Connection;
use crate::error::Refusal;
use crate::file::BaseFile;
use crate::mark::{MarkState, WalPosition};
use crate::survey::WalSurvey;
use durovfs_wire::wal::WalSalts;

/// Bytes of a copy of the wal-index header, of which there are two
/// (<https://www.sqlite.org/walformat.html#the_wal_index_header>).
const HEADER_BYTES: usize = 48;
/// Bytes of both.
pub(crate) const HEADERS_BYTES: usize = 2 * HEADER_BYTES;

/// What the wal-index says of the WAL's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct IndexEnd {
    salts: WalSalts,
    frame: u32,
}

impl IndexEnd {
    /// Reads both copies of the header; none when SQLite has to make the index anew.
    pub(crate) fn parse(bytes: &[u8; HEADERS_BYTES]) -> Option<Self> {
        let (first, second) = bytes.split_at(HEADER_BYTES);
        let is_set = bytes[12] != 0;
        if first != second || !is_set {
            return None;
        }
        let word = |at: usize| [bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]];
        Some(Self {
            // The index is of the host's byte order, but for the salts, which are the WAL's bytes.
            frame: u32::from_ne_bytes(word(16)),
            salts: WalSalts(u32::from_be_bytes(word(32)), u32::from_be_bytes(word(36))),
        })
    }

    /// Whether the index may lack a commit that the mark knows.
    fn may_lag(&self, marked: &WalPosition) -> bool {
        self.salts != marked.salts || self.frame < marked.frame
    }
}

impl Connection {
    /// The WAL's write lock was taken. True when the index must be made void.
    ///
    /// Without an `index` it is about to be made anew, for a reader perhaps: reading does not wait
    /// for the log.
    pub(crate) fn write_locked(&mut self, index: Option<IndexEnd>) -> bool {
        self.holds_write_lock = true;
        self.write_refusal = None;
        let Some(index) = index.filter(|_| self.poisoned.is_none()) else {
            return false;
        };
        // What is wrong with the mark is said when a transaction begins.
        let Ok(mut state) = self.mark.read() else {
            return false;
        };
        if state.in_flight.is_some()
            && let Err(refusal) = self.settle(&mut state)
        {
            return self.follow_dead_writer(refusal);
        }
        self.lacks_last_commit(&state, &index).unwrap_or(false)
    }

    /// A commit that a process left in flight is committed, or its outcome cannot be told.
    fn follow_dead_writer(&mut self, refusal: Refusal) -> bool {
        if !std::mem::take(&mut self.must_roll_forward) {
            self.write_refusal = Some(refusal);
            return false;
        }
        if let Err(refusal) = self.roll_forward_live() {
            self.write_refusal = Some(self.noted(refusal));
        }
        // Some frames may be there already, whatever came of it.
        true
    }

    /// Whether the WAL ends where the mark says, and the index before.
    fn lacks_last_commit(&self, state: &MarkState, index: &IndexEnd) -> Result<bool, Refusal> {
        let (Some(last), Some(marked), Some(wal)) = (state.last, state.wal, &self.wal) else {
            return Ok(false);
        };
        if !index.may_lag(&marked) {
            return Ok(false);
        }
        let wal: &dyn BaseFile = wal.as_ref();
        if WalSurvey::read(wal)?.is_none_or(|survey| survey.end != marked) {
            return Ok(false);
        }
        // An index of another generation is of a WAL that is to be begun anew when all of this one
        // is in the database file.
        Ok(index.salts == marked.salts || !self.is_checkpointed(wal, &last, &marked)?)
    }

    /// The WAL's write lock is about to be released. True when the WAL has more than its index
    /// says, which must be made void before the lock goes.
    pub fn before_write_unlock(&mut self) -> bool {
        self.end_wal_transaction();
        self.holds_write_lock = false;
        self.write_refusal = None;
        let lags = std::mem::take(&mut self.must_void_index);
        if !std::mem::take(&mut self.must_roll_forward) || self.poisoned.is_some() {
            return lags;
        }
        match self.roll_forward_live() {
            Ok(()) => true,
            Err(refusal) => {
                self.noted(refusal);
                // Some frames may be there already; the index must be read from the file again.
                true
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(frame: u32) -> [u8; HEADERS_BYTES] {
        let mut bytes = [0u8; HEADERS_BYTES];
        for copy in bytes.chunks_mut(HEADER_BYTES) {
            copy[12] = 1;
            copy[16..20].copy_from_slice(&frame.to_ne_bytes());
            copy[32..40].copy_from_slice(&[0, 0, 0, 7, 0, 0, 0, 8]);
        }
        bytes
    }

    #[test]
    fn an_index_that_is_void_or_being_written_says_nothing() {
        let whole = headers(3);
        let end = IndexEnd::parse(&whole).unwrap();
        assert_eq!((end.salts, end.frame), (WalSalts(7, 8), 3));
        assert_eq!(IndexEnd::parse(&[0; HEADERS_BYTES]), None);
        let mut torn = whole;
        torn[HEADER_BYTES + 16] ^= 1;
        assert_eq!(IndexEnd::parse(&torn), None);
    }

    #[test]
    fn an_index_lags_behind_a_later_frame_and_another_generation() {
        let marked = |frame, salts| WalPosition {
            salts,
            checkpoint_sequence: 0,
            frame,
            checksum: Default::default(),
        };
        let end = IndexEnd::parse(&headers(3)).unwrap();
        assert!(!end.may_lag(&marked(3, WalSalts(7, 8))));
        assert!(!end.may_lag(&marked(2, WalSalts(7, 8))));
        assert!(end.may_lag(&marked(4, WalSalts(7, 8))));
        assert!(end.may_lag(&marked(1, WalSalts(8, 8))));
    }
}
