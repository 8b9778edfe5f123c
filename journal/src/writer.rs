//! The writer's thread: group commit, and what happens when the disk fails. `batch.rs` has what may
//! be written together, `rotation.rs` how segments come and go.
//!
//! While one batch is written and synced the next one gathers in the queue. The index changes, and
//! completions run, only after that. A batch that failed leaves the index as it was; its segment is
//! never written to again (after a failed sync nobody can tell what is on disk): the next batch
//! goes to a fresh one, whose header says which sequence it begins with, so that recovery takes
//! nothing of the failed batch for part of the journal.

mod batch;
mod compact;
mod rotation;

use crate::block::{Blocks, cuts};
use crate::error::JournalError;
use crate::format::{SEGMENT_HEADER_BYTES, record_bytes};
use crate::journal::{Append, Completion, Item, Shared};
use crate::promises::{self, KeptPromise};
use crate::record::Stored;
use crate::segments::{Segment, lock};
use crate::table::{Location, Table};
use batch::{Added, Batch};
use durovfs_wire::ids::DatabaseId;
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

/// A batch is written when it has this many bytes: long enough that the sync costs little beside
/// the write, short enough that the first append in it does not wait for long.
const BATCH_BYTES: usize = 4 << 20;
/// Idle time after which a mark says that the last batch is durable, so that damage to it can be
/// told from a torn write.
const MARK_AFTER: Duration = Duration::from_millis(200);

pub(crate) struct Writer {
    shared: Arc<Shared>,
    active: Arc<Segment>,
    offset: u64,
    next_sequence: u64,
    synced_through: u64,
    /// What the last record on disk says of it.
    announced: u64,
    /// Segments with records that no sync has covered, when the journal does not sync.
    unsynced: Vec<Arc<Segment>>,
    /// Segments of which a sync failed, by their first sequences: what the system then forgot it
    /// does not tell again, so a later sync of theirs would prove nothing.
    unsure: Vec<u64>,
    /// The active segment must not be written to.
    needs_segment: bool,
    /// The segment began, and its states are not written yet.
    needs_states: bool,
    /// The next segment says that damage before it is known.
    notes_damage: bool,
    blocked: Blocks,
    waiting: VecDeque<Item>,
}

impl Writer {
    pub(crate) fn new(
        shared: Arc<Shared>,
        active: Arc<Segment>,
        offset: u64,
        next_sequence: u64,
        synced_through: u64,
        unsynced: Vec<Arc<Segment>>,
    ) -> Self {
        // A crash may have come between a segment's beginning and its states.
        let needs_states = offset == SEGMENT_HEADER_BYTES;
        let damaged = !shared.damages.is_empty();
        Self {
            shared,
            active,
            offset,
            next_sequence,
            synced_through,
            announced: 0,
            unsynced,
            unsure: Vec::new(),
            // What is left after damage is restated before anything is built on it.
            needs_segment: damaged,
            needs_states,
            notes_damage: damaged,
            blocked: Blocks::default(),
            waiting: VecDeque::new(),
        }
    }

    /// The thread's loop.
    pub(crate) fn run(mut self) {
        while self.gather() {
            self.write_waiting();
        }
        self.finish();
    }

    /// Waits for something to do; false when the journal is closed and all is written.
    fn gather(&mut self) -> bool {
        let shared = self.shared.clone();
        let mut queue = lock(&shared.queue);
        loop {
            if !queue.items.is_empty() {
                std::mem::swap(&mut self.waiting, &mut queue.items);
                return true;
            }
            if queue.closed {
                return false;
            }
            if self.wants_mark() {
                let waited = shared.wake.wait_timeout(queue, MARK_AFTER);
                let (guard, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
                queue = guard;
                if timeout.timed_out() && queue.items.is_empty() && !queue.closed {
                    drop(queue);
                    self.write_mark();
                    queue = lock(&shared.queue);
                }
            } else {
                queue = shared
                    .wake
                    .wait(queue)
                    .unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    /// Takes and writes all that waits now, on the caller's thread; false when nothing did.
    pub(crate) fn write_now(&mut self) -> bool {
        let shared = self.shared.clone();
        std::mem::swap(&mut self.waiting, &mut lock(&shared.queue).items);
        let any = !self.waiting.is_empty();
        self.write_waiting();
        any
    }

    fn write_waiting(&mut self) {
        let mut batch = Batch::default();
        let mut clean = false;
        while let Some(item) = self.waiting.pop_front() {
            let append = match item {
                Item::Append(append) => append,
                Item::Dropped(database, through) => {
                    self.note_dropped(&mut batch, database, through);
                    clean = true;
                    continue;
                }
                Item::Resume(database) => {
                    // What failed before it in this batch would block again.
                    batch = self.flush(batch);
                    self.blocked.clear(database);
                    continue;
                }
            };
            let Append { records, done } = append;
            match self.add(&mut batch, &records) {
                Added::Yes => {
                    // What is cut off may have been all that kept a segment.
                    clean |= records.iter().any(cuts);
                    batch.completions.push((done, Ok(())));
                }
                Added::Refused(error) => {
                    self.blocked.note(&records);
                    batch.completions.push((done, Err(error)));
                }
                Added::Flush => {
                    self.waiting
                        .push_front(Item::Append(Append { records, done }));
                    batch = self.flush(batch);
                }
            }
            if batch.bytes.len() >= BATCH_BYTES {
                batch = self.flush(batch);
            }
        }
        self.flush(batch);
        if clean {
            self.delete_unneeded();
        }
        self.give_up_incomplete();
        self.compact();
        self.want_spare();
    }

    /// Writes the batch, changes the index, and tells. The new batch is empty.
    fn flush(&mut self, batch: Batch) -> Batch {
        if batch.record_count > 0
            && let Err(error) = self
                .keep_promises(&batch.operations)
                .and_then(|()| self.write(&batch.bytes, batch.record_count))
        {
            self.fail(batch, &error);
            return Batch::default();
        }
        if batch.record_count > 0 {
            let damaged = |(stored, _): &(Stored, _)| matches!(stored, Stored::Damaged { .. });
            if batch.operations.iter().any(damaged) {
                // A recovery meets the same damage: the next segment tells what was left.
                (self.needs_segment, self.notes_damage) = (true, true);
            }
            self.apply(batch.operations);
            lock(&self.shared.trouble).io = None;
        }
        for (done, result) in batch.completions {
            done(result);
        }
        // Keeps the buffer: batches come by the thousand.
        let mut bytes = batch.bytes;
        bytes.clear();
        Batch {
            bytes,
            ..Batch::default()
        }
    }

    /// Writes the promises of a batch a second time, before it.
    fn keep_promises(&self, operations: &[(Stored, Location)]) -> Result<(), JournalError> {
        let new: Vec<KeptPromise> = operations
            .iter()
            .filter_map(|(stored, _)| KeptPromise::of_record(stored))
            .collect();
        if !self.shared.sync || new.is_empty() {
            return Ok(());
        }
        let tables = lock(&self.shared.tables);
        let old = tables.databases.values().filter_map(Table::kept_promise);
        let kept: BTreeMap<DatabaseId, KeptPromise> =
            old.chain(new).map(|kept| (kept.database, kept)).collect();
        drop(tables);
        promises::write(self.shared.disk.as_ref(), kept.into_values())
    }

    fn write(&mut self, bytes: &[u8], record_count: u64) -> Result<(), JournalError> {
        let name = &self.active.name;
        let written = self
            .active
            .file
            .write_at(bytes, self.offset)
            .map_err(|e| JournalError::io(format!("write {name}"), &e))
            .and_then(|()| {
                if !self.shared.sync {
                    return Ok(());
                }
                let synced = self.active.file.sync_data();
                synced.map_err(|e| JournalError::io(format!("sync {name}"), &e))
            });
        if let Err(error) = written {
            self.needs_segment = true;
            return Err(error);
        }
        self.announced = self.synced_through;
        self.offset += bytes.len() as u64;
        self.next_sequence += record_count;
        if self.shared.sync {
            self.synced_through = self.next_sequence - 1;
        } else if self
            .unsynced
            .last()
            .is_none_or(|last| !Arc::ptr_eq(last, &self.active))
        {
            self.unsynced.push(self.active.clone());
        }
        Ok(())
    }

    fn apply(&self, operations: Vec<(Stored, Location)>) {
        let mut guard = lock(&self.shared.tables);
        let tables = &mut *guard;
        tables.active_bytes = self.offset;
        for (stored, location) in operations {
            let Some(database) = stored.database() else {
                continue;
            };
            let table = tables
                .databases
                .entry(database)
                .or_insert_with(|| Table::new(database));
            let before = table.entry_count();
            table.apply(&stored, location);
            tables.entry_count = tables.entry_count + table.entry_count() - before;
        }
    }

    /// Fails the batch and all that waits behind it: it was handed over without knowing.
    fn fail(&mut self, batch: Batch, error: &JournalError) {
        tracing::error!(%error, "the journal could not be written");
        lock(&self.shared.trouble).io = Some(error.to_string());
        // The batch began with them, if nothing stands in the segment yet.
        self.needs_states |= self.offset == SEGMENT_HEADER_BYTES;
        self.blocked.merge(batch.blocks);
        self.waiting
            .extend(std::mem::take(&mut lock(&self.shared.queue).items));
        let mut failed: Vec<(Completion, Result<(), JournalError>)> = batch.completions;
        for item in std::mem::take(&mut self.waiting) {
            match item {
                Item::Append(Append { records, done }) => {
                    self.blocked.note(&records);
                    failed.push((done, Ok(())));
                }
                // Said before this failure was heard of.
                Item::Resume(_) => {}
                // What is not noted is held again after a restart, and dropped again.
                Item::Dropped(..) => {}
            }
        }
        for (done, result) in failed {
            done(result.and_then(|()| Err(error.clone())));
        }
    }

    fn wants_mark(&self) -> bool {
        !self.needs_segment && self.announced < self.synced_through
    }

    /// Says that all so far is durable. Only a hint: without room it is left out.
    pub(crate) fn write_mark(&mut self) {
        if !self.wants_mark() {
            return;
        }
        let mut batch = Batch::default();
        let Ok(header) = postcard::to_stdvec(&Stored::Mark) else {
            return;
        };
        let end = self.offset + record_bytes(header.len(), 0);
        // What it says holds for all before it; the mark itself needs no mark.
        let announced = self.synced_through;
        if self.needs_states || end > self.active.header.segment_bytes {
            self.announced = announced;
            return;
        }
        self.encode(&mut batch, &header, &[]);
        match self.write(&batch.bytes, batch.record_count) {
            Ok(()) => self.announced = self.synced_through,
            Err(error) => self.fail(batch, &error),
        }
    }

    /// The journal is closed and all is written.
    fn finish(mut self) {
        if let Err(error) = self.sync_all() {
            tracing::warn!(%error, "the journal was closed without a sync");
        }
        self.write_mark();
    }
}

impl Drop for Writer {
    /// However the thread ends, nobody is left waiting.
    fn drop(&mut self) {
        self.shared.preparer.stop();
        let mut queue = lock(&self.shared.queue);
        queue.closed = true;
        let left = std::mem::take(&mut queue.items);
        drop(queue);
        for item in self.waiting.drain(..).chain(left) {
            if let Item::Append(append) = item {
                (append.done)(Err(JournalError::Closed));
            }
        }
    }
}
