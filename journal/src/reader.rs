//! Reading entries back, one part at a time, each checked against its checksum and its place.

use crate::error::JournalError;
use crate::format::{RECORD_PREFIX_BYTES, RawRecord};
use crate::journal::{DamagedEntry, Shared};
use crate::record::Stored;
use crate::segments::{Segment, lock};
use crate::table::Location;
use bytes::Bytes;
use durovfs_wire::entry::EntryPart;
use durovfs_wire::ids::DatabaseId;
use durovfs_wire::position::Lsn;
use std::sync::Arc;

/// The parts of a range of entries, in order. Holds one part in memory; ends after an error.
pub struct Parts {
    shared: Arc<Shared>,
    database: DatabaseId,
    lsn: Lsn,
    part: u32,
    last_lsn: Lsn,
    cuts: u64,
    failed: bool,
}

impl Parts {
    pub(crate) fn new(
        shared: Arc<Shared>,
        database: DatabaseId,
        first_lsn: Lsn,
        last_lsn: Lsn,
    ) -> Result<Self, JournalError> {
        let tables = lock(&shared.tables);
        let (first_held, last, cuts) = match tables.databases.get(&database) {
            Some(table) => (
                table.state().first_lsn,
                table.state().last.lsn,
                table.cuts(),
            ),
            None => (Lsn::ZERO.next(), Lsn::ZERO, 0),
        };
        drop(tables);
        if first_lsn < first_held {
            return Err(JournalError::Gone {
                first_lsn,
                first_held,
            });
        }
        let last_lsn = last_lsn.min(last);
        Ok(Self {
            shared,
            database,
            lsn: first_lsn,
            part: 0,
            last_lsn,
            cuts,
            failed: false,
        })
    }

    /// Where the next part is, and whether it is its entry's last.
    fn locate(&self) -> Result<(Location, bool, Arc<Segment>), JournalError> {
        let tables = lock(&self.shared.tables);
        let table = tables.databases.get(&self.database);
        let first_held = table.map_or(Lsn::ZERO.next(), |table| table.state().first_lsn);
        let gone = || JournalError::Gone {
            first_lsn: self.lsn,
            first_held,
        };
        // After a truncation the same position may hold another entry.
        let table = table
            .filter(|table| table.cuts() == self.cuts)
            .ok_or_else(gone)?;
        let (location, count) = table.part_location(self.lsn, self.part).ok_or_else(gone)?;
        let segment = tables.segments.get(&location.segment).ok_or_else(gone)?;
        Ok((location, self.part + 1 == count, segment.clone()))
    }

    fn read_next(&mut self) -> Result<EntryPart, JournalError> {
        let (location, is_last, segment) = self.locate()?;
        let part = read_part(&segment, location)?;
        let header = &part.header;
        let expected = (self.database, self.lsn, self.part);
        if (header.database, header.lsn, header.part) != expected || header.is_last() != is_last {
            let detail = format!("another part than the index says: {header:?}");
            return Err(JournalError::damaged(
                &segment.name,
                location.offset,
                detail,
            ));
        }
        (self.lsn, self.part) = if is_last {
            (self.lsn.next(), 0)
        } else {
            (self.lsn, self.part + 1)
        };
        Ok(part)
    }
}

pub(crate) fn read_part(segment: &Segment, location: Location) -> Result<EntryPart, JournalError> {
    let mut bytes = vec![0u8; location.bytes as usize];
    segment
        .file
        .read_at(&mut bytes, location.offset)
        .map_err(|e| JournalError::io(format!("read {}", segment.name), &e))?;
    let damaged = |what: &str| JournalError::damaged(&segment.name, location.offset, what);
    let raw = RawRecord::parse(&bytes, segment.header.salt)
        .ok_or_else(|| damaged("record checksum mismatch"))?;
    let Some(Stored::Part(header) | Stored::Moved(header)) = raw.stored() else {
        return Err(damaged("record is no part"));
    };
    let length = raw.payload.len();
    let start = raw.payload_start();
    debug_assert!(start >= RECORD_PREFIX_BYTES);
    let payload = Bytes::from(bytes).slice(start..start + length);
    Ok(EntryPart { header, payload })
}

impl Iterator for Parts {
    type Item = Result<EntryPart, JournalError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed || self.lsn > self.last_lsn {
            return None;
        }
        let next = self.read_next();
        if let Err(error @ (JournalError::Damaged { .. } | JournalError::Io { .. })) = &next {
            let damaged = DamagedEntry {
                database: self.database,
                lsn: self.lsn,
                error: error.clone(),
            };
            let mut unreadable = lock(&self.shared.unreadable);
            let first = unreadable.entry(self.database).or_insert(damaged.clone());
            if damaged.lsn < first.lsn {
                *first = damaged;
            }
        }
        self.failed = next.is_err();
        Some(next)
    }
}
