//! Compaction: segments go oldest first, so one database that is never archived would keep all that
//! come after its first entry. What is still needed of the oldest segment is written once more, at
//! the end, and the segment goes.
//!
//! An entry that is not complete cannot be moved, and keeps all segments after its first part's.
//! Its sender may be gone for good. So when the journal is nearly full, such an entry is given up:
//! who does write on is refused the next part, and begins the entry again or tells its client.
//!
//! Entries are moved only when the journal fills up, and only when most of it is not needed: then
//! each byte that is written again frees at least another one. A crash in between leaves both
//! copies, which is as good as one: the old segment goes when the new copy is durable.

use super::Writer;
use super::batch::{Batch, Encoded};
use crate::error::JournalError;
use crate::format::record_bytes;
use crate::reader::read_part;
use crate::record::Stored;
use crate::segments::{Segment, lock};
use crate::table::{Location, Table};
use durovfs_wire::entry::EntryPart;
use durovfs_wire::ids::DatabaseId;
use std::sync::Arc;

/// Written again between two batches: a few milliseconds, for which commits wait.
const STEP_BYTES: u64 = 1 << 20;
/// The journal fills up when more than one in this many of its segments is in use.
const CROWDED_SHARE: usize = 2;
/// One byte in this many may be needed.
const NEEDED_SHARE: u64 = 2;
/// From here on, in percent of the segments, an entry that is not complete is given up if the
/// oldest segment has parts of it. Above what the pages of a transaction that is still open may
/// fill, below where nothing is taken any more.
const INCOMPLETE_UP_TO_PERCENT: usize = 85;

impl Writer {
    /// Does a step, if it is worth it.
    pub(super) fn compact(&mut self) {
        let Some(parts) = self.plan() else {
            return;
        };
        let mut batch = Batch::default();
        for (segment, location) in parts {
            let part = match read_part(&segment, location) {
                Ok(part) => part,
                Err(error) => {
                    // Whoever reads the entry tells its owner; until then the segment stays.
                    tracing::warn!(%error, "an entry could not be moved");
                    break;
                }
            };
            if let Err(error) = self.add_moved(&mut batch, part) {
                tracing::warn!(%error, "an entry could not be moved");
                break;
            }
        }
        self.flush(batch);
        self.delete_unneeded();
    }

    /// Cuts entries off that are not complete and keep the oldest segment, when there is no room
    /// for that.
    pub(super) fn give_up_incomplete(&mut self) {
        let cuts = self.incomplete_in_the_way();
        if cuts.is_empty() {
            return;
        }
        let mut batch = Batch::default();
        for (database, cut) in cuts {
            tracing::warn!(%database,
                "the journal fills up: an entry that is not complete is given up");
            if let Err(error) = self.add_own(&mut batch, (database, cut), &[], false) {
                tracing::warn!(%error, "it could not be given up");
            }
        }
        self.flush(batch);
        self.delete_unneeded();
    }

    fn incomplete_in_the_way(&self) -> Vec<(DatabaseId, Stored)> {
        let tables = lock(&self.shared.tables);
        let taken_percent = tables.segments.len() * 100 / self.shared.segments_max().max(1);
        let Some((first_sequence, oldest)) = tables.segments.first_key_value() else {
            return Vec::new();
        };
        let active = self.needs_segment || Arc::ptr_eq(oldest, &self.active);
        if active || taken_percent < INCOMPLETE_UP_TO_PERCENT {
            return Vec::new();
        }
        let all = tables.databases.iter();
        all.filter(|(_, table)| table.is_written_in(*first_sequence))
            .map(|(database, table)| (*database, table.cut_incomplete()))
            .collect()
    }

    fn add_moved(&mut self, batch: &mut Batch, part: EntryPart) -> Result<(), JournalError> {
        let database = part.header.database;
        let stored = Stored::Moved(part.header);
        self.add_own(batch, (database, stored), &part.payload, true)
    }

    /// Adds a record that nobody asked for.
    fn add_own(
        &mut self,
        batch: &mut Batch,
        (database, stored): (DatabaseId, Stored),
        payload: &[u8],
        has_parts: bool,
    ) -> Result<(), JournalError> {
        let header = postcard::to_stdvec(&stored).map_err(|error| {
            let detail = error.to_string();
            JournalError::Refused { database, detail }
        })?;
        let mut encoded = Encoded {
            records: Vec::new(),
            bytes: record_bytes(header.len(), payload.len()),
            has_parts,
        };
        while !self.make_room(batch, &encoded)? {
            *batch = self.flush(std::mem::take(batch));
        }
        encoded.records.clear();
        self.push_record(batch, stored, &header, payload);
        Ok(())
    }

    /// The parts of the next entries to be moved, if there are any and it is worth it.
    fn plan(&self) -> Option<Vec<(Arc<Segment>, Location)>> {
        let tables = lock(&self.shared.tables);
        let count = tables.segments.len();
        if self.needs_segment || count * CROWDED_SHARE <= self.shared.segments_max() {
            return None;
        }
        let sealed = tables.segments.values().rev().skip(1);
        let used: u64 = sealed.map(|segment| segment.header.segment_bytes).sum();
        let needed: u64 = tables.databases.values().map(Table::held_bytes).sum();
        if needed * NEEDED_SHARE > used {
            return None;
        }
        let (first_sequence, oldest) = tables.segments.first_key_value()?;
        let is_written = |table: &Table| table.is_written_in(*first_sequence);
        if Arc::ptr_eq(oldest, &self.active) || tables.databases.values().any(is_written) {
            return None;
        }
        let mut parts = Vec::new();
        let mut bytes = 0;
        for table in tables.databases.values() {
            let left = STEP_BYTES.saturating_sub(bytes);
            for location in table.locations_in(*first_sequence, left) {
                bytes += u64::from(location.bytes);
                parts.push((tables.segments.get(&location.segment)?.clone(), location));
            }
        }
        (!parts.is_empty()).then_some(parts)
    }
}
