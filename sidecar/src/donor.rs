//! The best promise of a claim: where its log ends, and the last transaction there. A log that
//! begins anew behind the archive does not know its last transaction itself, and learns it here.

use durovfs_wire::LogPosition;
use durovfs_wire::entry::TransactionSummary;
use durovfs_wire::peer::Promise;

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
}
