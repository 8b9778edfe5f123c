//! What is written together: whether an append may follow what is there, and its bytes. Nothing in
//! here touches the disk, but that a batch which does not fit any more begins the next segment.

use super::Writer;
use crate::block::{Blocks, cuts};
use crate::error::JournalError;
use crate::format::{encode_record, record_bytes};
use crate::journal::{Completion, Shared, Tables};
use crate::record::{Record, STATE_BYTES, Stored};
use crate::segments::{capacity, lock};
use crate::table::{ENTRIES_MAX, Head, Location, Table};
use bytes::Bytes;
use durovfs_wire::entry::{MAX_PART_PAYLOAD_BYTES, PartKind};
use durovfs_wire::ids::DatabaseId;
use durovfs_wire::peer::MAX_NAME_BYTES;
use durovfs_wire::position::{Epoch, Lsn};
use std::collections::BTreeMap;

/// Most of a segment's end that only promises and the like may use when no next segment is ready.
const RESERVE_BYTES_MAX: u64 = 256 << 10;

/// Records that are written together.
#[derive(Default)]
pub(super) struct Batch {
    pub(super) bytes: Vec<u8>,
    pub(super) operations: Vec<(Stored, Location)>,
    pub(super) heads: BTreeMap<DatabaseId, Head>,
    /// What is blocked if the batch fails.
    pub(super) blocks: Blocks,
    pub(super) completions: Vec<(Completion, Result<(), JournalError>)>,
    pub(super) record_count: u64,
}

/// An append in the form in which it is written.
pub(super) struct Encoded {
    pub(super) records: Vec<(Stored, Vec<u8>, Bytes)>,
    pub(super) bytes: u64,
    pub(super) has_parts: bool,
}

/// What became of an attempt to add an append to the batch.
pub(super) enum Added {
    Yes,
    /// Write the batch first.
    Flush,
    Refused(JournalError),
}

impl Writer {
    /// Tries to add an append to the batch. It is added whole or not at all.
    pub(super) fn add(&mut self, batch: &mut Batch, records: &[Record]) -> Added {
        if let Some(database) = records.iter().find_map(|r| cuts(r).then(|| r.database()))
            && batch.heads.contains_key(&database)
        {
            // A truncation is decided by the index, which must have all before it.
            return Added::Flush;
        }
        if let Err(error) = self
            .blocked
            .check(records, |database| promised(&self.shared, database))
        {
            return Added::Refused(error);
        }
        let (heads, encoded) = match self.admit(batch, records) {
            Ok(admitted) => admitted,
            Err(error) => return Added::Refused(error),
        };
        match self.make_room(batch, &encoded) {
            Ok(true) => {}
            Ok(false) => return Added::Flush,
            Err(error) => {
                let mut trouble = lock(&self.shared.trouble);
                let kind = if encoded.has_parts {
                    &mut trouble.full
                } else {
                    &mut trouble.io
                };
                *kind = Some(error.to_string());
                return Added::Refused(error);
            }
        }
        if encoded.has_parts {
            lock(&self.shared.trouble).full = None;
        }
        self.unblock(records);
        batch.heads.extend(heads);
        batch.blocks.note(records);
        for (stored, header, payload) in encoded.records {
            self.push_record(batch, stored, &header, &payload);
        }
        Added::Yes
    }

    /// Writes down what was dropped, if there is room: it only spares dropping it again.
    pub(super) fn note_dropped(&mut self, batch: &mut Batch, database: DatabaseId, through: Lsn) {
        let stored = Stored::Dropped { database, through };
        let Ok(header) = postcard::to_stdvec(&stored) else {
            return;
        };
        let end = self.offset + batch.bytes.len() as u64 + record_bytes(header.len(), 0);
        if !self.needs_segment && !self.needs_states && end <= self.active.header.segment_bytes {
            self.push_record(batch, stored, &header, &[]);
        }
    }

    /// Whether the records may follow, and their bytes.
    fn admit(
        &self,
        batch: &Batch,
        records: &[Record],
    ) -> Result<(BTreeMap<DatabaseId, Head>, Encoded), JournalError> {
        let tables = lock(&self.shared.tables);
        let mut heads = BTreeMap::new();
        let mut encoded = Encoded {
            records: Vec::new(),
            bytes: 0,
            has_parts: false,
        };
        for record in records {
            let database = record.database();
            let refused = |detail: String| JournalError::Refused { database, detail };
            let table = tables.databases.get(&database);
            self.check_limits(&tables, batch, record, table)?;
            let head = heads.entry(database).or_insert_with(|| {
                let earlier = batch.heads.get(&database).cloned();
                earlier.unwrap_or_else(|| table.map_or_else(Head::unknown, Table::head))
            });
            let (stored, payload) = to_stored(record, table);
            head.admit(&stored, table).map_err(refused)?;
            let header = postcard::to_stdvec(&stored)
                .map_err(|e| refused(format!("record header cannot be encoded: {e}")))?;
            encoded.bytes += record_bytes(header.len(), payload.len());
            encoded.has_parts |= matches!(record, Record::Part(_));
            encoded.records.push((stored, header, payload));
        }
        let longest = capacity(self.shared.segment_bytes) / 2;
        if encoded.bytes > longest
            && let Some(record) = records.first()
        {
            let detail = format!(
                "{} bytes in one append, at most {longest} fit",
                encoded.bytes
            );
            return Err(JournalError::Refused {
                database: record.database(),
                detail,
            });
        }
        Ok((heads, encoded))
    }

    fn check_limits(
        &self,
        tables: &Tables,
        batch: &Batch,
        record: &Record,
        table: Option<&Table>,
    ) -> Result<(), JournalError> {
        let database = record.database();
        let refused = |detail: String| Err(JournalError::Refused { database, detail });
        match record {
            Record::Part(part) => {
                let length = part.payload.len();
                if length > MAX_PART_PAYLOAD_BYTES {
                    return refused(format!("part with a payload of {length} bytes"));
                }
                if tables.entry_count + batch.operations.len() >= ENTRIES_MAX {
                    return Err(JournalError::Full {
                        detail: format!("{ENTRIES_MAX} entries"),
                    });
                }
                let starts_epoch = matches!(part.header.kind, PartKind::EpochStart { .. });
                if starts_epoch && table.is_some_and(Table::history_is_full) {
                    let detail = format!("history of database {database} has too many epochs");
                    return Err(JournalError::Full { detail });
                }
            }
            Record::Promise { name, .. } if name.len() > MAX_NAME_BYTES => {
                return refused(format!("name of {} bytes", name.len()));
            }
            Record::State(state) if state.name.len() > MAX_NAME_BYTES => {
                return refused(format!("name of {} bytes", state.name.len()));
            }
            _ => {}
        }
        if table.is_none() && !batch.heads.contains_key(&database) {
            // Each segment restates all databases: they must leave room for something else.
            let known: usize = tables
                .databases
                .values()
                .map(|table| table.state().bytes_guess())
                .sum();
            let new = (batch.heads.len() + 1) * (STATE_BYTES + MAX_NAME_BYTES);
            if (known + new) as u64 > capacity(self.shared.segment_bytes) / 2 {
                let count = tables.databases.len();
                return Err(JournalError::Full {
                    detail: format!("{count} databases"),
                });
            }
        }
        Ok(())
    }

    /// Whether the append fits behind the batch; `Ok(false)`: write the batch first.
    pub(super) fn make_room(
        &mut self,
        batch: &Batch,
        encoded: &Encoded,
    ) -> Result<bool, JournalError> {
        if !self.needs_segment {
            let used = self.offset + batch.bytes.len() as u64 + self.states_bytes(batch);
            let reserve = if encoded.has_parts && !self.shared.preparer.is_ready() {
                RESERVE_BYTES_MAX.min(self.shared.segment_bytes / 8)
            } else {
                0
            };
            if used + encoded.bytes + reserve <= self.active.header.segment_bytes {
                return Ok(true);
            }
        }
        if batch.record_count > 0 {
            return Ok(false);
        }
        self.begin_next_segment(encoded.has_parts)?;
        let used = self.offset + self.states_bytes(batch) + encoded.bytes;
        if used > self.active.header.segment_bytes {
            let detail = "the states of all databases fill a segment".to_owned();
            return Err(JournalError::Full { detail });
        }
        Ok(true)
    }

    /// Bytes that the states will take which the batch has to begin with.
    fn states_bytes(&self, batch: &Batch) -> u64 {
        if !self.needs_states || batch.record_count > 0 {
            return 0;
        }
        let tables = lock(&self.shared.tables);
        let stored = tables.databases.values().map(Table::restated);
        stored
            .filter_map(|stored| postcard::to_stdvec(&stored).ok())
            .map(|header| record_bytes(header.len(), 0))
            .sum()
    }

    pub(super) fn push_record(
        &mut self,
        batch: &mut Batch,
        stored: Stored,
        header: &[u8],
        payload: &[u8],
    ) {
        if std::mem::take(&mut self.needs_states) {
            let states: Vec<Stored> = lock(&self.shared.tables)
                .databases
                .values()
                .map(Table::restated)
                .collect();
            for state in states {
                if let Ok(header) = postcard::to_stdvec(&state) {
                    self.encode(batch, &header, &[]);
                }
            }
        }
        let offset = self.offset + batch.bytes.len() as u64;
        self.encode(batch, header, payload);
        let end = self.offset + batch.bytes.len() as u64;
        let segment = self.active.header.first_sequence;
        let location = Location {
            segment,
            offset,
            bytes: (end - offset) as u32,
        };
        batch.operations.push((stored, location));
    }

    pub(super) fn encode(&self, batch: &mut Batch, header: &[u8], payload: &[u8]) {
        let sequence = self.next_sequence + batch.record_count;
        let salt = self.active.header.salt;
        encode_record(
            &mut batch.bytes,
            salt,
            sequence,
            self.synced_through,
            header,
            payload,
        );
        batch.record_count += 1;
    }

    fn unblock(&mut self, records: &[Record]) {
        let shared = self.shared.clone();
        self.blocked
            .make_good(records, |database| promised(&shared, database));
    }
}

fn promised(shared: &Shared, database: DatabaseId) -> Epoch {
    let tables = lock(&shared.tables);
    tables
        .databases
        .get(&database)
        .map_or(Epoch::ZERO, |table| table.state().promised)
}

fn to_stored(record: &Record, table: Option<&Table>) -> (Stored, Bytes) {
    let stored = match record.clone() {
        Record::Part(part) => return (Stored::Part(part.header), part.payload),
        Record::Promise {
            database,
            name,
            epoch,
            claimant,
            replica,
        } => Stored::Promise {
            database,
            name,
            epoch,
            claimant,
            replica,
        },
        Record::Membership {
            database,
            membership,
        } => Stored::Membership {
            database,
            membership,
        },
        Record::Truncate { database, after } => {
            let last_transaction = table.and_then(|table| table.transaction_through(after.lsn));
            Stored::Truncate {
                database,
                after,
                last_transaction,
            }
        }
        Record::Restart { database, at } => Stored::Restart { database, at },
        Record::Progress {
            database,
            commit_lsn,
            archive_lsn,
        } => Stored::Progress {
            database,
            commit_lsn,
            archive_lsn,
        },
        Record::State(state) => Stored::State {
            base: state.last_transaction,
            state,
            pending: None,
        },
        Record::Damaged {
            database,
            first_lsn,
        } => Stored::Damaged {
            database,
            first_lsn,
        },
        Record::Mended { database } => Stored::Mended { database },
    };
    (stored, Bytes::new())
}
