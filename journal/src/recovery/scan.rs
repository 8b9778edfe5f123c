//! Reading records into the index, and what becomes of it behind a hole.
//!
//! Behind a hole every database is in doubt: the missing records may have been its. What follows is
//! built on as long as it fits; the state that the next segment restates ends the doubt. Where it
//! differs, or something does not fit, the database is cut to what is certain, and nothing is built
//! on it until a state says the same. Whatever is in doubt at the end is marked as mending.

use super::Rules;
use crate::disk::Disk;
use crate::error::JournalError;
use crate::format::RawRecord;
use crate::promises;
use crate::record::{DatabaseState, Stored};
use crate::segments::Segment;
use crate::table::{Head, Location, Table};
use durovfs_wire::LogPosition;
use durovfs_wire::ids::DatabaseId;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Where reading has come.
pub(super) struct Scan {
    pub tables: BTreeMap<DatabaseId, Table>,
    /// Of the next record.
    pub sequence: u64,
    pub announced: u64,
    pub holes: Holes,
}

/// Damage on the way.
pub(super) struct Holes {
    pub mend: bool,
    /// Damage below this sequence was reported before.
    pub known_below: u64,
    pub found: Vec<JournalError>,
    /// Damage below it: new all the same, if less is left than was restated after the report.
    pub suspected: Vec<JournalError>,
    /// Whether less is left than was known.
    pub more: bool,
    /// Whether there was one, known or not.
    pub any: bool,
    /// Whether no states were restated since.
    pub open: bool,
    pub doubts: BTreeMap<DatabaseId, Doubt>,
}

/// What holes leave of a database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Doubt {
    /// Some of its records may be missing; all that came since fits.
    Open,
    /// Some are: what comes is not built on it.
    Cut,
}

impl Holes {
    /// Notes damage, or fails with it.
    pub fn note(&mut self, sequence: u64, damage: JournalError) -> Result<(), JournalError> {
        if sequence < self.known_below {
            self.suspected.push(damage);
            return Ok(());
        }
        if !self.mend {
            return Err(damage);
        }
        self.found.push(damage);
        Ok(())
    }

    /// Less is left than a state says that was restated behind all known damage.
    fn note_more(&mut self) -> Result<(), JournalError> {
        let suspected = std::mem::take(&mut self.suspected);
        suspected
            .into_iter()
            .try_for_each(|damage| self.note(u64::MAX, damage))
    }
}

impl Scan {
    /// Goes on behind missing records.
    pub fn pass_hole(&mut self, sequence: u64) {
        self.sequence = sequence;
        self.holes.any = true;
        self.holes.open = true;
        for database in self.tables.keys() {
            self.holes.doubts.entry(*database).or_insert(Doubt::Open);
        }
    }

    /// Reads the records of a segment as far as they follow; says where that is. What the next
    /// segment begins with was never acknowledged here: an earlier attempt to write it failed.
    pub fn segment(
        &mut self,
        segment: &Segment,
        bytes: &[u8],
        start: u64,
        next_first: Option<u64>,
        oldest: bool,
    ) -> Result<u64, JournalError> {
        self.announced = self.announced.max(segment.header.synced_through);
        let mut offset = start;
        while next_first != Some(self.sequence)
            && let Some(raw) = RawRecord::parse(&bytes[offset as usize..], segment.header.salt)
            && raw.sequence == self.sequence
        {
            let stored = raw.stored().ok_or_else(|| {
                JournalError::damaged(&segment.name, offset, "record of an unknown kind")
            })?;
            let location = Location {
                segment: segment.header.first_sequence,
                offset,
                bytes: raw.bytes as u32,
            };
            self.take(&stored, location, oldest)
                .map_err(|detail| JournalError::damaged(&segment.name, offset, detail))?;
            if std::mem::take(&mut self.holes.more) {
                self.holes.note_more()?;
            }
            self.announced = self.announced.max(raw.synced_through);
            self.sequence += 1;
            offset += raw.bytes;
            if offset as usize > bytes.len() {
                // The padding of the last record is missing in a file that was cut.
                offset = bytes.len() as u64;
            }
        }
        Ok(offset)
    }

    fn take(&mut self, stored: &Stored, location: Location, oldest: bool) -> Result<(), String> {
        let Some(database) = stored.database() else {
            return Ok(());
        };
        let known = self.tables.contains_key(&database);
        if self.holes.any && !known {
            self.holes.doubts.entry(database).or_insert(Doubt::Open);
        }
        let doubt = self.holes.doubts.get(&database).copied();
        if let Stored::State { state, pending, .. } = stored {
            self.holes.open = false;
            // A state that is mending was written by a recovery that knew what is missing.
            let was_cut = state.mending && known && !self.is_mending(database);
            if doubt.is_none() && !was_cut {
                return self.take_state(state, *pending, stored, oldest);
            }
            self.take_state_in_doubt(state, *pending);
            return Ok(());
        }
        let admitted = self.admit(database, stored);
        match (doubt, stored) {
            (None, _) => admitted?,
            // These are the only things that hold whatever the log was.
            (Some(Doubt::Cut), Stored::Promise { .. } | Stored::Membership { .. })
                if admitted.is_ok() => {}
            (Some(Doubt::Cut), _) => return Ok(()),
            // They speak of a log that may not be the one that was read.
            (
                Some(Doubt::Open),
                Stored::Progress { .. } | Stored::Dropped { .. } | Stored::Mended { .. },
            ) => return Ok(()),
            (Some(Doubt::Open), _) if admitted.is_err() => {
                self.holes.doubts.insert(database, Doubt::Cut);
                let table = self.tables.entry(database);
                table
                    .or_insert_with(|| Table::new(database))
                    .stop_building();
                return Ok(());
            }
            (Some(Doubt::Open), _) => {}
        }
        self.tables
            .entry(database)
            .or_insert_with(|| Table::new(database))
            .apply(stored, location);
        Ok(())
    }

    fn is_mending(&self, database: DatabaseId) -> bool {
        let table = self.tables.get(&database);
        table.is_some_and(|table| table.state().mending)
    }

    fn admit(&self, database: DatabaseId, stored: &Stored) -> Result<(), String> {
        let known = self.tables.get(&database);
        known
            .map_or_else(Head::unknown, Table::head)
            .admit(stored, known)
    }

    /// A restated state introduces what the deleted segments held, or must agree with what was
    /// read so far.
    fn take_state(
        &mut self,
        state: &DatabaseState,
        pending: Option<(LogPosition, u32)>,
        stored: &Stored,
        oldest: bool,
    ) -> Result<(), String> {
        let Some(table) = self.tables.get_mut(&state.database) else {
            if !oldest && state.commit_lsn != state.last.lsn {
                return Err("state of a database that was never mentioned before".to_owned());
            }
            let base = match stored {
                Stored::State { base, .. } => *base,
                _ => None,
            };
            let table = Table::from_restated(state.clone(), pending, base);
            self.tables.insert(state.database, table);
            return Ok(());
        };
        let Stored::State {
            state: mut ours,
            pending: ours_pending,
            ..
        } = table.restated()
        else {
            return Ok(());
        };
        // What was dropped when the state was restated may have been read again here.
        ours.first_lsn = state.first_lsn;
        table.drop_through(state.first_lsn.previous().unwrap_or_default());
        if &ours != state || ours_pending != pending {
            return Err(format!(
                "restated state differs: stored {stored:?}, read {ours:?}"
            ));
        }
        Ok(())
    }

    fn take_state_in_doubt(&mut self, state: &DatabaseState, pending: Option<(LogPosition, u32)>) {
        let database = state.database;
        let table = self
            .tables
            .entry(database)
            .or_insert_with(|| Table::new(database));
        if table.compare_after_hole(state, pending) {
            self.holes.doubts.remove(&database);
        } else {
            self.holes.doubts.insert(database, Doubt::Cut);
            self.holes.more |= self.sequence >= self.holes.known_below;
        }
    }

    /// All is read: marks what is still in doubt, and checks the rest.
    pub fn settle(
        &mut self,
        disk: &dyn Disk,
        rules: Rules,
        oldest: Option<&Arc<Segment>>,
    ) -> Result<(), JournalError> {
        for database in self.holes.doubts.keys() {
            if let Some(table) = self.tables.get_mut(database) {
                table.mark_mending();
            }
        }
        let uncertain = self.holes.open || !self.holes.doubts.is_empty();
        if uncertain && rules.keeps_promises {
            self.recall_promises(disk, oldest)?;
        }
        for table in self.tables.values_mut() {
            table.settle_moved();
            let state = table.state();
            // Entries that are not there must have been dropped, and only committed ones are.
            let missing = state.first_lsn.previous().unwrap_or_default();
            if missing <= state.commit_lsn {
                continue;
            }
            let name = oldest.map_or("", |segment| segment.name.as_str());
            let damage = JournalError::damaged(
                name,
                0,
                format!(
                    "entries of database {} through lsn {missing} are missing, but only those \
                     through {} are committed",
                    state.database, state.commit_lsn
                ),
            );
            self.holes.note(u64::MAX, damage)?;
            let held_lsn = state.commit_lsn;
            table.lose_from(held_lsn.next());
        }
        Ok(())
    }

    /// A promise in a hole must be kept all the same.
    fn recall_promises(
        &mut self,
        disk: &dyn Disk,
        oldest: Option<&Arc<Segment>>,
    ) -> Result<(), JournalError> {
        let kept = match promises::read(disk) {
            Ok(kept) => kept,
            Err(error) => {
                let name = oldest.map_or(promises::PROMISES_NAME, |segment| &segment.name);
                let detail = format!(
                    "what was promised cannot be known: {} ({error}); this replica has to be \
                     replaced by a new one",
                    promises::PROMISES_NAME
                );
                return Err(JournalError::damaged(name, 0, detail));
            }
        };
        for promise in kept {
            let database = promise.database;
            let table = self.tables.entry(database).or_insert_with(|| {
                let mut table = Table::new(database);
                table.mark_mending();
                table
            });
            table.take_promise(promise);
        }
        Ok(())
    }
}
