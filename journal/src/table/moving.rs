//! Entries that were written once more, so that the segment they were in can go.
//!
//! In recovery a moved part may come up although its entry does not: the segment that had it is
//! gone. Such entries are kept apart until all is read, and then take their place before the rest.

use super::{Fact, IndexEntry, Location, Locations, Table};
use crate::record::DatabaseState;
use durovfs_wire::entry::{PartHeader, TransactionSummary};
use durovfs_wire::position::{LogPosition, Lsn};
use std::collections::BTreeMap;

/// What moving leaves to remember.
#[derive(Debug, Clone, Default)]
pub(super) struct Moves {
    /// Whether entries may lie in segments in another order than in the log.
    pub any: bool,
    /// The entry of which parts are still to come.
    open: Option<(LogPosition, Vec<Location>)>,
    /// Only in recovery: entries that were not read where they were first.
    loose: BTreeMap<Lsn, IndexEntry>,
    /// The last transaction below the first of them.
    loose_base: Option<TransactionSummary>,
}

impl Moves {
    pub(super) fn drop_through(&mut self, lsn: Lsn) {
        while let Some(first) = self.loose.first_entry().filter(|first| *first.key() <= lsn) {
            let (lsn, entry) = first.remove_entry();
            let position = LogPosition::new(entry.epoch, lsn);
            self.loose_base = entry.fact.transaction(position, self.loose_base);
        }
    }

    pub(super) fn truncate_after(&mut self, lsn: Lsn) {
        self.open = None;
        self.loose.split_off(&lsn.next());
    }
}

impl Table {
    /// In recovery: as restated, with none of the entries before; some may come up moved.
    pub(crate) fn from_restated(
        state: DatabaseState,
        pending: Option<(LogPosition, u32)>,
        base: Option<TransactionSummary>,
    ) -> Self {
        let mut table = Self::from_state(state, pending);
        table.moves.loose_base = base;
        table
    }

    pub(super) fn apply_moved(&mut self, header: &PartHeader, location: Location) {
        let position = header.position();
        if header.part == 0 {
            self.moves.open = Some((position, Vec::new()));
        }
        let Some((open, locations)) = &mut self.moves.open else {
            return;
        };
        if *open != position || locations.len() != header.part as usize {
            self.moves.open = None;
            return;
        }
        locations.push(location);
        let Some(fact) = Fact::of(header) else {
            return;
        };
        let locations = Locations::of(locations);
        self.moves.open = None;
        self.moves.any = true;
        if let Some(entry) = self.entry_mut(position.lsn) {
            if entry.epoch == position.epoch {
                entry.locations = locations;
            }
        } else if position.lsn < self.state.first_lsn {
            let entry = IndexEntry {
                epoch: position.epoch,
                fact,
                locations,
                bytes_through: 0,
            };
            self.moves.loose.insert(position.lsn, entry);
        }
    }

    fn entry_mut(&mut self, lsn: Lsn) -> Option<&mut IndexEntry> {
        let index = lsn.get().checked_sub(self.state.first_lsn.get())?;
        self.entries.get_mut(usize::try_from(index).ok()?)
    }

    /// In recovery, when all is read: moved entries take their place.
    pub(crate) fn settle_moved(&mut self) {
        let mut attached = false;
        while let Some(lsn) = self.state.first_lsn.previous()
            && let Some(entry) = self.moves.loose.remove(&lsn)
            && self.epoch_at(lsn).is_none_or(|epoch| epoch == entry.epoch)
        {
            self.entries.push_front(entry);
            self.state.first_lsn = lsn;
            attached = true;
        }
        if attached {
            // What is below them was dropped, or is missing: then it is not known.
            let rest = !self.moves.loose.is_empty();
            self.base_transaction = self.moves.loose_base.filter(|_| !rest);
            self.base_bytes = 0;
            let mut bytes = 0;
            for entry in &mut self.entries {
                let locations = entry.locations.as_slice();
                bytes += locations.iter().map(|l| u64::from(l.bytes)).sum::<u64>();
                entry.bytes_through = bytes;
            }
        }
        self.moves.loose.clear();
    }

    /// Bytes of all entries that are held.
    pub(crate) fn held_bytes(&self) -> u64 {
        self.entry_bytes(self.state.first_lsn, self.state.last.lsn)
    }

    /// Whether an entry that is not complete yet has parts in this segment.
    pub(crate) fn is_written_in(&self, segment: u64) -> bool {
        let pending = self.pending.as_ref();
        pending.is_some_and(|pending| pending.locations.iter().any(|l| l.segment == segment))
    }

    /// Entries with parts in this segment, whole, up to about so many bytes.
    pub(crate) fn locations_in(&self, segment: u64, bytes_max: u64) -> Vec<Location> {
        let mut found = Vec::new();
        let mut bytes = 0;
        for entry in &self.entries {
            let locations = entry.locations.as_slice();
            if bytes < bytes_max && locations.iter().any(|l| l.segment == segment) {
                found.extend_from_slice(locations);
                bytes += locations.iter().map(|l| u64::from(l.bytes)).sum::<u64>();
            }
        }
        found
    }
}
