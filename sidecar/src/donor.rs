//! The best promise of a claim: where its log ends, and the last transaction there. A log that
//! begins anew behind the archive does not know its last transaction itself, and learns it here.

use durovfs_journal::DatabaseState;
use durovfs_wire::entry::TransactionSummary;
use durovfs_wire::peer::Promise;
use durovfs_wire::{LogPosition, Lsn};

/// What is known of the last transaction of a log that is about to be opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LastTransaction {
    /// It is this one; without one, the log never had a transaction.
    Known(Option<TransactionSummary>),
    /// No log that was heard of reaches back to a transaction, or to the log's beginning: only the
    /// archive, which has all through this entry, can tell.
    Archived {
        /// The last entry before those that are held.
        through_lsn: Lsn,
    },
}

/// The end of the longest log among the promises of one claim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DonorEnd {
    last: LogPosition,
    last_transaction: Option<TransactionSummary>,
}

impl DonorEnd {
    /// Before any promise.
    pub const NONE: Self = Self {
        last: LogPosition::ZERO,
        last_transaction: None,
    };

    /// Notes a promise of this claim. Of two logs that end alike, one may have begun anew there:
    /// the other one knows more.
    pub fn note(&mut self, promise: &Promise) {
        if promise.last > self.last || promise.last == self.last && self.last_transaction.is_none()
        {
            self.last = promise.last;
            self.last_transaction = promise.last_transaction;
        }
    }

    /// The last transaction of a log that ends there. Nothing when the promises ended elsewhere, or
    /// do not know it.
    pub fn transaction_at(&self, end: LogPosition) -> Option<TransactionSummary> {
        self.last_transaction.filter(|_| self.last == end)
    }

    /// The last transaction of the log that ends there, of which our own journal says `held`. A log
    /// that began anew behind the archive has no transaction of its own to tell of, and neither may
    /// those have that promised: that is not a log without transactions.
    pub fn last_transaction(
        &self,
        held: Option<&DatabaseState>,
        end: LogPosition,
    ) -> LastTransaction {
        let own = held.and_then(|state| state.last_transaction);
        let known = own.or_else(|| self.transaction_at(end));
        let first_lsn = held.map_or(end.lsn.next(), |state| state.first_lsn);
        match first_lsn.previous() {
            Some(through_lsn) if known.is_none() && through_lsn > Lsn::ZERO => {
                LastTransaction::Archived { through_lsn }
            }
            _ => LastTransaction::Known(known),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use durovfs_wire::entry::{CommitHeader, Origin};
    use durovfs_wire::{
        ClaimantId, ClientId, DatabaseChecksum, DatabaseId, Epoch, Lsn, PageSize, ReplicaId,
        Timestamp,
    };

    fn at(epoch: u32, lsn: u64) -> LogPosition {
        LogPosition::new(Epoch::new(epoch), Lsn::new(lsn))
    }

    fn transaction(position: LogPosition) -> TransactionSummary {
        let client = ClientId::from_bytes([1; 16]);
        let commit = CommitHeader {
            origin: Origin {
                client,
                sequence: 1,
            },
            time: Timestamp::from_micros(0),
            base_lsn: Lsn::ZERO,
            page_size: PageSize::try_from(512).unwrap(),
            page_count: 1,
            slot_count: 1,
            checksum: DatabaseChecksum::EMPTY,
            whole_image: false,
        };
        TransactionSummary { position, commit }
    }

    fn promise(last: LogPosition, last_transaction: Option<TransactionSummary>) -> Promise {
        Promise {
            database: DatabaseId::from_bytes([1; 16]),
            replica: ReplicaId::from_bytes([1; 16]),
            membership: None,
            epoch: Epoch::new(9),
            claimant: ClaimantId::from_bytes([1; 16]),
            previous_promise: Epoch::ZERO,
            last,
            commit_lsn: last.lsn,
            archive_lsn: last.lsn,
            last_transaction,
            history: Vec::new(),
            mending: false,
        }
    }

    // If this failed, a log whose first promise came from a replica that began anew would be opened
    // as a log without transactions, and an empty database would be shown and written on.
    #[test]
    fn of_two_promises_that_end_alike_the_one_that_knows_counts() {
        let known = transaction(at(1, 80));
        for order in [[None, Some(known)], [Some(known), None]] {
            let mut donor = DonorEnd::NONE;
            for last_transaction in order {
                donor.note(&promise(at(1, 81), last_transaction));
            }
            assert_eq!(donor.transaction_at(at(1, 81)), Some(known));
        }
    }

    #[test]
    fn the_transaction_belongs_to_the_end_of_the_longest_log() {
        let (old, new) = (transaction(at(1, 80)), transaction(at(2, 82)));
        let mut donor = DonorEnd::NONE;
        for (last, transaction) in [(at(1, 81), old), (at(2, 82), new), (at(1, 90), old)] {
            donor.note(&promise(last, Some(transaction)));
        }
        assert_eq!(donor.transaction_at(at(2, 82)), Some(new));
        assert_eq!(donor.transaction_at(at(1, 81)), None);
    }

    fn held(first_lsn: u64, last: LogPosition) -> DatabaseState {
        DatabaseState {
            database: DatabaseId::from_bytes([1; 16]),
            name: String::new(),
            replica: None,
            membership: None,
            promised: last.epoch,
            claimant: None,
            last,
            first_lsn: Lsn::new(first_lsn),
            commit_lsn: last.lsn,
            archive_lsn: last.lsn,
            history: Vec::new(),
            last_transaction: None,
            mending: false,
        }
    }

    // If this failed, a host without a log of its own would find logs that all began anew behind
    // the archive, and open an empty database in the place of the one that is in the archive.
    #[test]
    fn a_log_that_does_not_reach_back_is_not_one_without_transactions() {
        let end = at(3, 81);
        let mut donor = DonorEnd::NONE;
        donor.note(&promise(end, None));
        let unknown = |through| LastTransaction::Archived {
            through_lsn: Lsn::new(through),
        };
        let ask = |first_lsn| donor.last_transaction(Some(&held(first_lsn, end)), end);
        assert_eq!(ask(82), unknown(81));
        assert_eq!(ask(80), unknown(79));
        assert_eq!(donor.last_transaction(None, end), unknown(81));
        assert_eq!(ask(1), LastTransaction::Known(None));
        let begun = donor.last_transaction(None, LogPosition::ZERO);
        assert_eq!(begun, LastTransaction::Known(None));
    }
}
