//! Segments come and go: the next one is begun when the active one is full, or not to be trusted;
//! the oldest goes when nothing in it is needed, and what comes after it is on disk.

use super::Writer;
use crate::error::JournalError;
use crate::format::{SEGMENT_HEADER_BYTES, SegmentHeader};
use crate::segments::{Segment, begin_segment, lock};
use std::sync::Arc;

impl Writer {
    pub(super) fn begin_next_segment(&mut self, for_entries: bool) -> Result<(), JournalError> {
        let count = lock(&self.shared.tables).segments.len();
        let max = self.shared.segments_max() + usize::from(!for_entries);
        if count >= max {
            let detail = format!("{count} segments are needed, the limit is {max}");
            return Err(JournalError::Full { detail });
        }
        let shared = self.shared.clone();
        let spare = shared
            .preparer
            .take(shared.disk.as_ref(), shared.segment_bytes, shared.sync);
        let file = spare.map_err(|error| match error {
            JournalError::Io {
                kind: std::io::ErrorKind::StorageFull,
                operation,
                message,
            } => JournalError::Full {
                detail: format!("{operation}: {message}"),
            },
            other => other,
        })?;
        let header = SegmentHeader {
            salt: self.shared.disk.draw_salt(),
            first_sequence: self.next_sequence,
            synced_through: self.synced_through,
            segment_bytes: self.shared.segment_bytes,
            damage_known_below: if self.notes_damage {
                self.next_sequence
            } else {
                0
            },
        };
        // Until it succeeds, a new name that may be there voids what follows in the old segment.
        self.needs_segment = true;
        let segment = Arc::new(begin_segment(self.shared.disk.as_ref(), file, header)?);
        self.needs_segment = false;
        self.notes_damage = false;
        self.needs_states = true;
        self.offset = SEGMENT_HEADER_BYTES;
        self.active = segment.clone();
        let mut tables = lock(&self.shared.tables);
        tables.segments.insert(header.first_sequence, segment);
        tables.active_bytes = self.offset;
        Ok(())
    }

    pub(super) fn want_spare(&self) {
        let count = lock(&self.shared.tables).segments.len();
        if self.offset > self.active.header.segment_bytes / 2 && count < self.shared.segments_max()
        {
            self.shared.preparer.want();
        }
    }

    /// Makes the next segment ready on the caller's thread, if one is wanted.
    pub(crate) fn prepare_next(&self) {
        let shared = &self.shared;
        let prepared = shared.preparer.prepare_if_wanted(
            shared.disk.as_ref(),
            shared.segment_bytes,
            shared.sync,
            false,
        );
        if let Err(error) = prepared {
            tracing::warn!(%error, "the next journal segment could not be prepared");
        }
    }

    /// Deletes the oldest segments as long as nothing in them is needed.
    pub(super) fn delete_unneeded(&mut self) {
        // The states must be restated in a later segment before theirs goes.
        while !self.needs_states && !self.needs_segment {
            let tables = lock(&self.shared.tables);
            let needed = tables
                .oldest_needed()
                .map_or(u64::MAX, |(segment, _)| segment);
            let active = self.active.header.first_sequence;
            let oldest = tables.segments.values().next().cloned();
            drop(tables);
            let Some(oldest) = oldest else { return };
            let first_sequence = oldest.header.first_sequence;
            if first_sequence >= needed.min(active) {
                return;
            }
            if let Err(error) = self.sync_all().and_then(|()| self.delete(&oldest)) {
                tracing::warn!(%error, "a segment could not be deleted");
                return;
            }
            lock(&self.shared.tables).segments.remove(&first_sequence);
        }
    }

    fn delete(&mut self, segment: &Segment) -> Result<(), JournalError> {
        let disk = &self.shared.disk;
        // Synced one by one: the segments that stay must follow each other without a gap.
        disk.remove(&segment.name)
            .or_else(|e| {
                if e.kind() == std::io::ErrorKind::NotFound {
                    Ok(())
                } else {
                    Err(e)
                }
            })
            .and_then(|()| disk.sync_directory())
            .map_err(|e| JournalError::io(format!("delete {}", segment.name), &e))
    }

    /// Makes all that was written durable, in a journal that does not sync each batch; after a sync
    /// that failed, as far as it can be. Nothing is said to be durable behind a segment that may
    /// have lost something, until that is deleted.
    pub(super) fn sync_all(&mut self) -> Result<(), JournalError> {
        while !self.unsynced.is_empty() {
            let segment = self.unsynced.remove(0);
            if let Err(error) = segment.file.sync_data() {
                self.needs_segment |= Arc::ptr_eq(&segment, &self.active);
                self.unsure.push(segment.header.first_sequence);
                return Err(JournalError::io(format!("sync {}", segment.name), &error));
            }
        }
        let tables = lock(&self.shared.tables);
        self.unsure
            .retain(|first| tables.segments.contains_key(first));
        drop(tables);
        if self.unsure.is_empty() {
            self.synced_through = self.next_sequence - 1;
        }
        Ok(())
    }
}
