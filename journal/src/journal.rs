//! The handle that callers have of a journal: they hand over records, and read from the index.

use crate::disk::{Disk, RealDisk};
use crate::error::JournalError;
use crate::format::SegmentHeader;
use crate::reader::Parts;
use crate::record::{DatabaseState, Record};
use crate::recovery::{Recovered, Rules, SEGMENT_BYTES_MAX, recover};
use crate::segments::{Preparer, Segment, begin_segment, lock, write_spare};
use crate::table::Table;
use crate::writer::Writer;
use durovfs_wire::entry::TransactionSummary;
use durovfs_wire::ids::DatabaseId;
use durovfs_wire::position::Lsn;
use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;

/// Smallest segment: room for a few records beside the header and the restated states.
const SEGMENT_BYTES_MIN: u64 = 64 << 10;
/// Fewest segments that the limit must allow: one that is written, one that may be dropped.
const SEGMENTS_MIN: u64 = 2;
/// Most transactions in one answer; the caller goes on after the last one it got.
pub(crate) const TRANSACTIONS_MAX: usize = 1 << 16;

/// Where a journal is, and how it works.
#[derive(Debug, Clone)]
pub struct JournalOptions {
    /// Its directory; made if missing, and locked.
    pub directory: PathBuf,
    /// Whether appends complete only when they are durable. Not so on a primary, whose own copy
    /// is no vote.
    pub sync: bool,
    /// Bytes of a segment.
    pub segment_bytes: u64,
    /// Bytes that all segments may take. Promises and truncations may take one segment more.
    pub limit_bytes: u64,
    /// Whether a damaged journal is opened with what is left of it: [`Journal::damages`] tells, and
    /// the databases that may have lost something are [`DatabaseState::mending`]. Otherwise opening
    /// fails, and nothing is touched.
    pub mend: bool,
}

impl JournalOptions {
    /// Segments of 64 MiB, and 4 GiB of them.
    pub fn new(directory: impl Into<PathBuf>, sync: bool) -> Self {
        Self {
            directory: directory.into(),
            sync,
            segment_bytes: 64 << 20,
            limit_bytes: 4 << 30,
            mend: false,
        }
    }

    fn check(&self) -> Result<(), JournalError> {
        let Self {
            segment_bytes,
            limit_bytes,
            ..
        } = *self;
        let detail = if !(SEGMENT_BYTES_MIN..=SEGMENT_BYTES_MAX).contains(&segment_bytes) {
            format!(
                "segments of {segment_bytes} bytes: use {SEGMENT_BYTES_MIN} to {SEGMENT_BYTES_MAX}"
            )
        } else if segment_bytes % 4096 != 0 {
            format!("segments of {segment_bytes} bytes: use a multiple of 4096")
        } else if limit_bytes / segment_bytes < SEGMENTS_MIN {
            format!(
                "a limit of {limit_bytes} bytes holds fewer than {SEGMENTS_MIN} segments of \
                 {segment_bytes} bytes"
            )
        } else {
            return Ok(());
        };
        Err(JournalError::Options { detail })
    }
}

/// Told what became of an append. Runs on the writer's thread: it must be short, and not block.
pub type Completion = Box<dyn FnOnce(Result<(), JournalError>) + Send>;

/// How much a journal holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Usage {
    /// Bytes of records in all segments, needed or not yet deleted.
    pub bytes: u64,
    /// Bytes that the files take on disk.
    pub disk_bytes: u64,
    /// What the options allow.
    pub limit_bytes: u64,
    /// Files in use.
    pub segment_count: usize,
    /// Entries that are held, of all databases.
    pub entry_count: usize,
    /// What keeps the oldest segment from being deleted: the database, and its first held entry.
    pub oldest_needed: Option<(DatabaseId, Lsn)>,
}

/// An entry that is held but cannot be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DamagedEntry {
    /// The log.
    pub database: DatabaseId,
    /// The entry.
    pub lsn: Lsn,
    /// What was found, and where.
    pub error: JournalError,
}

/// The index, as of the last completed append.
#[derive(Default)]
pub(crate) struct Tables {
    pub databases: BTreeMap<DatabaseId, Table>,
    /// By first sequence; the last one is written to.
    pub segments: BTreeMap<u64, Arc<Segment>>,
    pub entry_count: usize,
    /// Bytes used of the last segment.
    pub active_bytes: u64,
}

impl Tables {
    /// The oldest segment that anything is needed from, and whose.
    pub(crate) fn oldest_needed(&self) -> Option<(u64, DatabaseId)> {
        let needed = self
            .databases
            .iter()
            .filter_map(|(id, t)| Some((t.oldest_segment()?, *id)));
        needed.min_by_key(|(segment, _)| *segment)
    }
}

/// An append on its way to the writer.
pub(crate) struct Append {
    pub records: Vec<Record>,
    pub done: Completion,
}

pub(crate) enum Item {
    Append(Append),
    Resume(DatabaseId),
    Dropped(DatabaseId, Lsn),
}

#[derive(Default)]
pub(crate) struct Queue {
    pub items: VecDeque<Item>,
    pub closed: bool,
}

/// What is wrong now.
#[derive(Default)]
pub(crate) struct Trouble {
    /// The last write failed.
    pub io: Option<String>,
    /// Entries are refused for lack of room.
    pub full: Option<String>,
}

/// What the handles, the readers and the threads share.
pub(crate) struct Shared {
    pub disk: Arc<dyn Disk>,
    pub sync: bool,
    pub segment_bytes: u64,
    pub limit_bytes: u64,
    pub tables: Mutex<Tables>,
    pub queue: Mutex<Queue>,
    pub wake: Condvar,
    pub preparer: Preparer,
    pub trouble: Mutex<Trouble>,
    /// What recovery found.
    pub damages: Vec<JournalError>,
    /// What readers met since; the first of each database.
    pub unreadable: Mutex<BTreeMap<DatabaseId, DamagedEntry>>,
}

impl Shared {
    /// Segments that entries may fill.
    pub(crate) fn segments_max(&self) -> usize {
        usize::try_from(self.limit_bytes / self.segment_bytes).unwrap_or(usize::MAX)
    }

    fn push(&self, item: Item) {
        let mut queue = lock(&self.queue);
        if queue.closed {
            drop(queue);
            if let Item::Append(append) = item {
                (append.done)(Err(JournalError::Closed));
            }
            return;
        }
        // The writer looks at the queue before it waits, so only the first item needs to wake it.
        let was_empty = queue.items.is_empty();
        queue.items.push_back(item);
        drop(queue);
        if was_empty {
            self.wake.notify_one();
        }
    }
}

struct Threads {
    shared: Arc<Shared>,
    handles: Mutex<Vec<JoinHandle<()>>>,
}

impl Threads {
    fn stop(&self) {
        lock(&self.shared.queue).closed = true;
        self.shared.wake.notify_one();
        let me = std::thread::current().id();
        for handle in std::mem::take(&mut *lock(&self.handles)) {
            // A completion may hold the last handle: a thread cannot wait for itself.
            if handle.thread().id() != me {
                // A thread that panicked has said so, and failed what it had.
                let _ = handle.join();
            }
        }
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A node's journal. Cheap to clone; the files close when the last handle and reader are gone.
#[derive(Clone)]
pub struct Journal {
    shared: Arc<Shared>,
    threads: Arc<Threads>,
}

impl Journal {
    /// Locks the directory, reads what is there, and starts the writer.
    ///
    /// # Errors
    /// When another process has the directory, the disk fails, or the journal is damaged.
    pub fn open(options: JournalOptions) -> Result<(Self, Vec<DatabaseState>), JournalError> {
        options.check()?;
        let disk = RealDisk::open(&options.directory)?;
        Self::open_on(Arc::new(disk), options)
    }

    /// The same on another disk; `options.directory` is not used.
    ///
    /// # Errors
    /// When the disk fails, or the journal is damaged.
    pub fn open_on(
        disk: Arc<dyn Disk>,
        options: JournalOptions,
    ) -> Result<(Self, Vec<DatabaseState>), JournalError> {
        let (shared, writer) = open_shared(disk, &options, Preparer::default())?;
        let preparing = shared.clone();
        let handles = vec![
            spawn("journal-writer", move || writer.run())?,
            spawn("journal-prepare", move || {
                preparing.preparer.run(
                    preparing.disk.as_ref(),
                    preparing.segment_bytes,
                    preparing.sync,
                );
            })?,
        ];
        let threads = Arc::new(Threads {
            shared: shared.clone(),
            handles: Mutex::new(handles),
        });
        let journal = Self { shared, threads };
        let states = journal.databases();
        Ok((journal, states))
    }

    /// The same without threads: what is handed over is written when the driver is called, on the
    /// caller's thread. For simulations, in which the same calls always do the same.
    ///
    /// # Errors
    /// When the disk fails, or the journal is damaged.
    pub fn open_driven(
        disk: Arc<dyn Disk>,
        options: &JournalOptions,
    ) -> Result<(Self, JournalDriver, Vec<DatabaseState>), JournalError> {
        let (shared, writer) = open_shared(disk, options, Preparer::inline())?;
        let threads = Arc::new(Threads {
            shared: shared.clone(),
            handles: Mutex::default(),
        });
        let journal = Self { shared, threads };
        let states = journal.databases();
        Ok((journal, JournalDriver { writer }, states))
    }

    /// Hands over records. They are written in the order of the calls; `done` runs when they are
    /// in the file (and durable, if the journal syncs), or when they certainly do not count now. A
    /// refused or failed append leaves nothing behind.
    ///
    /// After a failure the records already on their way may no longer fit: parts that follow
    /// nothing are refused. When a promise, truncation or restart failed, the database takes no
    /// parts until the same is made good, a higher epoch is promised, or [`Self::resume`].
    pub fn append(&self, records: Vec<Record>, done: Completion) {
        self.shared.push(Item::Append(Append { records, done }));
    }

    /// Says that the caller has heard of all failures of this database, and has taken up again
    /// from [`Self::state`].
    pub fn resume(&self, database: DatabaseId) {
        self.shared.push(Item::Resume(database));
    }

    /// What is known of a database, as of the last completed append.
    pub fn state(&self, database: DatabaseId) -> Option<DatabaseState> {
        lock(&self.shared.tables)
            .databases
            .get(&database)
            .map(|table| table.state().clone())
    }

    /// What is known of all.
    pub fn databases(&self) -> Vec<DatabaseState> {
        lock(&self.shared.tables)
            .databases
            .values()
            .map(|table| table.state().clone())
            .collect()
    }

    /// The parts of the whole entries `first_lsn..=last_lsn`, as far as they are there.
    ///
    /// # Errors
    /// [`JournalError::Gone`] when `first_lsn` is not held any more.
    pub fn parts(
        &self,
        database: DatabaseId,
        first_lsn: Lsn,
        last_lsn: Lsn,
    ) -> Result<Parts, JournalError> {
        Parts::new(self.shared.clone(), database, first_lsn, last_lsn)
    }

    /// The transactions among the held entries `first_lsn..=last_lsn`, without reading the disk.
    /// At most 65,536: go on after the last one.
    pub fn transactions(
        &self,
        database: DatabaseId,
        first_lsn: Lsn,
        last_lsn: Lsn,
    ) -> Vec<TransactionSummary> {
        let tables = lock(&self.shared.tables);
        let Some(table) = tables.databases.get(&database) else {
            return Vec::new();
        };
        table.transactions(first_lsn, last_lsn, TRANSACTIONS_MAX)
    }

    /// Bytes that the held entries `first_lsn..=last_lsn` take in the journal.
    pub fn entry_bytes(&self, database: DatabaseId, first_lsn: Lsn, last_lsn: Lsn) -> u64 {
        let tables = lock(&self.shared.tables);
        tables
            .databases
            .get(&database)
            .map_or(0, |table| table.entry_bytes(first_lsn, last_lsn))
    }

    /// Entries at or below `lsn` are not needed any more. Segments of which nothing is needed are
    /// deleted, oldest first.
    ///
    /// # Panics
    /// When one of them is not committed by the persisted state: dropping it could lose it.
    pub fn drop_through(&self, database: DatabaseId, lsn: Lsn) {
        let mut guard = lock(&self.shared.tables);
        let tables = &mut *guard;
        let Some(table) = tables.databases.get_mut(&database) else {
            return;
        };
        let commit_lsn = table.state().commit_lsn;
        // Damage takes back what is known to be committed, also while this call is on its way.
        let lsn = if table.state().mending {
            lsn.min(commit_lsn)
        } else {
            lsn
        };
        assert!(
            lsn <= commit_lsn,
            "database {database}: entries through lsn {lsn} must not be dropped, only those \
             through {commit_lsn} are committed"
        );
        let before = table.entry_count();
        table.drop_through(lsn);
        tables.entry_count -= before - table.entry_count();
        drop(guard);
        self.shared.push(Item::Dropped(database, lsn));
    }

    /// How much the journal holds.
    pub fn usage(&self) -> Usage {
        let spare = u64::from(self.shared.preparer.is_ready()) * self.shared.segment_bytes;
        let tables = lock(&self.shared.tables);
        let sealed = tables.segments.values().rev().skip(1);
        let disk_bytes: u64 = tables
            .segments
            .values()
            .map(|s| s.header.segment_bytes)
            .sum();
        let oldest_needed = tables.oldest_needed().and_then(|(_, database)| {
            Some((database, tables.databases.get(&database)?.state().first_lsn))
        });
        Usage {
            bytes: sealed.map(|s| s.header.segment_bytes).sum::<u64>() + tables.active_bytes,
            disk_bytes: disk_bytes + spare,
            limit_bytes: self.shared.limit_bytes,
            segment_count: tables.segments.len(),
            entry_count: tables.entry_count,
            oldest_needed,
        }
    }

    /// Bytes of records in all segments, in percent of the limit; at most 100. Cheap: it does not
    /// look at every database.
    pub fn percent_taken(&self) -> u8 {
        let tables = lock(&self.shared.tables);
        let sealed = tables.segments.values().rev().skip(1);
        let bytes = sealed.map(|s| s.header.segment_bytes).sum::<u64>() + tables.active_bytes;
        let percent = bytes.saturating_mul(100) / self.shared.limit_bytes.max(1);
        u8::try_from(percent.min(100)).unwrap_or(100)
    }

    /// Damage that was found when the journal was opened, and not before.
    pub fn damages(&self) -> &[JournalError] {
        &self.shared.damages
    }

    /// Entries that readers could not read since this was last asked: the first of each database.
    /// The caller appends [`Record::Damaged`].
    pub fn take_unreadable(&self) -> Vec<DamagedEntry> {
        let found = std::mem::take(&mut *lock(&self.shared.unreadable));
        found.into_values().collect()
    }

    /// Why the journal does not take all it is given, if so: one line.
    pub fn trouble(&self) -> Option<String> {
        let trouble = lock(&self.shared.trouble);
        trouble.io.clone().or_else(|| trouble.full.clone())
    }

    /// Writes what was handed over, and stops. Appends through other handles fail from now on.
    pub fn close(self) {
        self.threads.stop();
    }
}

/// Does what the threads of a journal do, when it is called. Dropping it closes the journal without
/// a further write, as a killed process does.
pub struct JournalDriver {
    writer: Writer,
}

impl JournalDriver {
    /// Writes and syncs all that was handed over until now, and runs its completions; false when
    /// there was nothing. What is handed over meanwhile waits for the next call.
    pub fn write_waiting(&mut self) -> bool {
        self.writer.write_now()
    }

    /// What an idle journal does: notes that all is durable, and makes the next segment ready.
    pub fn rest(&mut self) {
        self.writer.write_mark();
        self.writer.prepare_next();
    }
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, JournalError> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(body)
        .map_err(|e| JournalError::io(format!("start thread {name}"), &e))
}

fn open_shared(
    disk: Arc<dyn Disk>,
    options: &JournalOptions,
    preparer: Preparer,
) -> Result<(Arc<Shared>, Writer), JournalError> {
    options.check()?;
    let rules = Rules {
        mend: options.mend,
        keeps_promises: options.sync,
    };
    let mut recovered = recover(disk.as_ref(), rules)?;
    for damage in &recovered.damages {
        tracing::error!(%damage, "going on with what is left");
    }
    let shared = Arc::new(Shared {
        disk,
        sync: options.sync,
        segment_bytes: options.segment_bytes,
        limit_bytes: options.limit_bytes,
        tables: Mutex::default(),
        queue: Mutex::default(),
        wake: Condvar::new(),
        preparer,
        trouble: Mutex::default(),
        damages: std::mem::take(&mut recovered.damages),
        unreadable: Mutex::default(),
    });
    let writer = start_writer(&shared, recovered)?;
    Ok((shared, writer))
}

/// Brings what was recovered into a state that can be written to.
fn start_writer(shared: &Arc<Shared>, found: Recovered) -> Result<Writer, JournalError> {
    let Recovered {
        tables: databases,
        mut segments,
        mut offset,
        next_sequence,
        announced,
        ..
    } = found;
    let mut synced_through = announced.min(next_sequence - 1);
    if shared.sync {
        // What a killed process wrote may be in the cache only; it will be told to be durable.
        for segment in segments.values() {
            segment
                .file
                .sync_data()
                .map_err(|e| JournalError::io(format!("sync {}", segment.name), &e))?;
        }
        synced_through = next_sequence - 1;
    }
    if segments.is_empty() {
        let disk = shared.disk.as_ref();
        let header = SegmentHeader {
            salt: disk.draw_salt(),
            first_sequence: next_sequence,
            synced_through,
            segment_bytes: shared.segment_bytes,
            damage_known_below: 0,
        };
        let file = write_spare(disk, shared.segment_bytes, shared.sync, || true)?
            .ok_or(JournalError::Closed)?;
        segments.insert(next_sequence, Arc::new(begin_segment(disk, file, header)?));
        offset = crate::format::SEGMENT_HEADER_BYTES;
    }
    let Some(active) = segments.values().next_back().cloned() else {
        return Err(JournalError::Closed);
    };
    let entry_count = databases.values().map(Table::entry_count).sum();
    let unsynced = if shared.sync {
        Vec::new()
    } else {
        segments.values().cloned().collect()
    };
    *lock(&shared.tables) = Tables {
        databases,
        segments,
        entry_count,
        active_bytes: offset,
    };
    Ok(Writer::new(
        shared.clone(),
        active,
        offset,
        next_sequence,
        synced_through,
        unsynced,
    ))
}
