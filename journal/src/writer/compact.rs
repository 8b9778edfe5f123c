//! Compaction: segments go oldest first, so one database that is never archived would keep all that
//! come after its first entry. What is still needed of the oldest segment is written once more, at
//! the end, and the segment goes.
//!
//! Only when the journal fills up, and only when most of it is not needed: then each byte that is
//! written again frees at least another one. A crash in between leaves both copies, which is as
//! good as one: the old segment goes when the new copy is durable.

use super::Writer;
use super::batch::{Batch, Encoded};
use crate::error::JournalError;
use crate::format::record_bytes;
use crate::reader::read_part;
use crate::record::Stored;
use crate::segments::{Segment, lock};
use crate::table::{Location, Table};
use durovfs_wire::entry::EntryPart;
use std::sync::Arc;

/// Written again between two batches: a few milliseconds, for which commits wait.
const STEP_BYTES: u64 = 1 << 20;
/// The journal fills up when more than one in this many of its segments is in use.
const CROWDED_SHARE: usize = 2;
/// One byte in this many may be needed.
const NEEDED_SHARE: u64 = 2;

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

    fn add_moved(&mut self, batch: &mut Batch, part: EntryPart) -> Result<(), JournalError> {
        let database = part.header.database;
        let stored = Stored::Moved(part.header);
        let header = postcard::to_stdvec(&stored).map_err(|error| {
            let detail = error.to_string();
            JournalError::Refused { database, detail }
        })?;
        let mut encoded = Encoded {
            records: Vec::new(),
            bytes: record_bytes(header.len(), part.payload.len()),
            has_parts: true,
        };
        while !self.make_room(batch, &encoded)? {
            *batch = self.flush(std::mem::take(batch));
        }
        encoded.records.clear();
        self.push_record(batch, stored, &header, &part.payload);
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
