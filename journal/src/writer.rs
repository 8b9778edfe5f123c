//! The writer's thread: batches, group commit, new segments, and what happens when the disk fails.
//!
//! While one batch is written and synced the next one gathers in the queue. The index changes, and
//! completions run, only after that. A batch that failed leaves the index as it was; its segment is
//! never written to again (after a failed sync nobody can tell what is on disk): the next batch
//! goes to a fresh one, whose header says which sequence it begins with, so that recovery takes
//! nothing of the failed batch for part of the journal.

mod compact;

use crate::block::{Blocks, cuts};
use crate::error::JournalError;
use crate::format::{SEGMENT_HEADER_BYTES, SegmentHeader, encode_record, record_bytes};
use crate::journal::{Append, Completion, Item, Shared, Tables};
use crate::promises::{self, KeptPromise};
use crate::record::{Record, STATE_BYTES, Stored};
use crate::segments::{Segment, begin_segment, capacity, lock};
use crate::table::{ENTRIES_MAX, Head, Location, Table};
use bytes::Bytes;
use durovfs_wire::entry::{MAX_PART_PAYLOAD_BYTES, PartKind};
use durovfs_wire::ids::DatabaseId;
use durovfs_wire::peer::MAX_NAME_BYTES;
use durovfs_wire::position::{Epoch, Lsn};
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

/// A batch is written when it has this many bytes: long enough that the sync costs little beside
/// the write, short enough that the first append in it does not wait for long.
const BATCH_BYTES: usize = 4 << 20;
/// Most of a segment's end that only promises and the like may use when no next segment is ready.
const RESERVE_BYTES_MAX: u64 = 256 << 10;
/// Idle time after which a mark says that the last batch is durable, so that damage to it can be
/// told from a torn write.
const MARK_AFTER: Duration = Duration::from_millis(200);

/// Records that are written together.
#[derive(Default)]
struct Batch {
    bytes: Vec<u8>,
    operations: Vec<(Stored, Location)>,
    heads: BTreeMap<DatabaseId, Head>,
    /// What is blocked if the batch fails.
    blocks: Blocks,
    completions: Vec<(Completion, Result<(), JournalError>)>,
    record_count: u64,
}

/// An append in the form in which it is written.
struct Encoded {
    records: Vec<(Stored, Vec<u8>, Bytes)>,
    bytes: u64,
    has_parts: bool,
}

/// What became of an attempt to add an append to the batch.
enum Added {
    Yes,
    /// Write the batch first.
    Flush,
    Refused(JournalError),
}

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
                Added::Yes => batch.completions.push((done, Ok(()))),
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
        self.compact();
        self.want_spare();
    }

    /// Tries to add an append to the batch. It is added whole or not at all.
    fn add(&mut self, batch: &mut Batch, records: &[Record]) -> Added {
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
    fn note_dropped(&mut self, batch: &mut Batch, database: DatabaseId, through: Lsn) {
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
    fn make_room(&mut self, batch: &Batch, encoded: &Encoded) -> Result<bool, JournalError> {
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

    fn begin_next_segment(&mut self, for_entries: bool) -> Result<(), JournalError> {
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

    fn push_record(&mut self, batch: &mut Batch, stored: Stored, header: &[u8], payload: &[u8]) {
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

    fn encode(&self, batch: &mut Batch, header: &[u8], payload: &[u8]) {
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

    fn unblock(&mut self, records: &[Record]) {
        let shared = self.shared.clone();
        self.blocked
            .make_good(records, |database| promised(&shared, database));
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

    fn want_spare(&self) {
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
    fn delete_unneeded(&mut self) {
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

    /// Makes all that was written durable, in a journal that does not sync each batch.
    fn sync_all(&mut self) -> Result<(), JournalError> {
        while let Some(segment) = self.unsynced.first() {
            if let Err(error) = segment.file.sync_data() {
                self.needs_segment |= Arc::ptr_eq(segment, &self.active);
                return Err(JournalError::io(format!("sync {}", segment.name), &error));
            }
            self.unsynced.remove(0);
        }
        self.synced_through = self.next_sequence - 1;
        Ok(())
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
