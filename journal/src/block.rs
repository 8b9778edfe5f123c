//! What may not be built on: databases of which a promise or a cut failed to be written.
//!
//! Callers hand over records before they know what became of the earlier ones. Parts that follow
//! nothing are refused by the rules of the log, but after a promise or a truncation that failed
//! the next records may fit by chance. So they are refused until the caller shows that it knows.

use crate::error::JournalError;
use crate::record::Record;
use durovfs_wire::ids::DatabaseId;
use durovfs_wire::position::Epoch;
use std::collections::BTreeMap;

/// What failed of one database.
#[derive(Debug, Clone, Copy, Default)]
struct Block {
    /// The highest promise.
    promise: Option<Epoch>,
    /// A truncation, a restart or a first state.
    cut: bool,
}

impl Block {
    fn is_clear(&self) -> bool {
        self.promise.is_none() && !self.cut
    }

    fn merge(&mut self, other: Self) {
        self.promise = self.promise.max(other.promise);
        self.cut |= other.cut;
    }

    /// What is left of it if this record is written.
    fn make_good(&mut self, record: &Record, promised: Epoch) {
        match record {
            // A new claim is answered only after its caller heard of all failures before it.
            Record::Promise { epoch, .. } if Some(*epoch) > self.promise && *epoch > promised => {
                *self = Self::default();
            }
            Record::Promise { epoch, .. } if Some(*epoch) >= self.promise => self.promise = None,
            // Cuts say where the log ends, whatever was there before.
            _ if cuts(record) => self.cut = false,
            _ => {}
        }
    }
}

/// Whether a record moves the end of its log.
pub(crate) fn cuts(record: &Record) -> bool {
    matches!(
        record,
        Record::Truncate { .. }
            | Record::Restart { .. }
            | Record::State(_)
            | Record::Damaged { .. }
    )
}

/// By database; at most one each.
#[derive(Debug, Default)]
pub(crate) struct Blocks(BTreeMap<DatabaseId, Block>);

impl Blocks {
    /// These records failed.
    pub(crate) fn note(&mut self, records: &[Record]) {
        for record in records {
            let block = match record {
                Record::Promise { epoch, .. } => Block {
                    promise: Some(*epoch),
                    cut: false,
                },
                // Who votes must be on disk before the entries of its epoch.
                Record::Membership { membership, .. } => Block {
                    promise: Some(membership.epoch),
                    cut: false,
                },
                _ if cuts(record) => Block {
                    promise: None,
                    cut: true,
                },
                _ => continue,
            };
            self.0.entry(record.database()).or_default().merge(block);
        }
    }

    pub(crate) fn merge(&mut self, other: Self) {
        for (database, block) in other.0 {
            self.0.entry(database).or_default().merge(block);
        }
    }

    /// The caller says that it knows.
    pub(crate) fn clear(&mut self, database: DatabaseId) {
        self.0.remove(&database);
    }

    /// Refuses records that may build on what failed.
    pub(crate) fn check(
        &self,
        records: &[Record],
        promised: impl Fn(DatabaseId) -> Epoch,
    ) -> Result<(), JournalError> {
        let mut blocks = BTreeMap::new();
        for record in records {
            let database = record.database();
            let Some(block) = self.0.get(&database) else {
                continue;
            };
            let block = blocks.entry(database).or_insert(*block);
            block.make_good(record, promised(database));
            if !block.is_clear() && !matches!(record, Record::Promise { .. }) {
                let detail =
                    "an earlier promise or truncation failed; take up again from the state";
                return Err(JournalError::Refused {
                    database,
                    detail: detail.to_owned(),
                });
            }
        }
        Ok(())
    }

    /// These records will be written.
    pub(crate) fn make_good(&mut self, records: &[Record], promised: impl Fn(DatabaseId) -> Epoch) {
        for record in records {
            let database = record.database();
            if let Some(block) = self.0.get_mut(&database) {
                block.make_good(record, promised(database));
                if block.is_clear() {
                    self.0.remove(&database);
                }
            }
        }
    }
}
