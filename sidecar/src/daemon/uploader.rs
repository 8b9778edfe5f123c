//! From our own journal to the archive: chunks by size or age, and snapshots now and then.
//!
//! Only committed entries go up. `archive_lsn` moves when the store has confirmed the object; only
//! then may replicas drop what it holds.

use super::event::{Event, EventSender};
use super::node::Node;
use super::primary::{PrimaryDatabase, now_micros};
use durovfs_archive::chunk::LogIdentity;
use durovfs_archive::listing::Listing;
use durovfs_archive::store::Store;
use durovfs_archive::{snapshot, upkeep, uploader};
use durovfs_journal::{Journal, Record};
use durovfs_wire::{DatabaseId, EntryPart, Lsn, Timestamp};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How often thresholds are looked at.
const CHECK_INTERVAL: Duration = Duration::from_millis(250);
/// Pause after a failed upload; doubles with each further one.
const RETRY_PAUSE_FIRST: Duration = Duration::from_secs(1);
/// Longest pause after failed uploads.
const RETRY_PAUSE_MAX: Duration = Duration::from_secs(60);
/// History that is kept.
const RETENTION: Duration = Duration::from_secs(30 * 24 * 3600);
/// Chunks are merged when nobody is likely to be reading them as the newest.
const MERGE_AGE: Duration = Duration::from_secs(3600);
/// How often it is asked whether a snapshot is due: it takes a listing.
const SNAPSHOT_INTERVAL: Duration = Duration::from_secs(60);
/// The part of our own journal's limit up to which archived entries are kept: replicas that lag
/// and files that roll forward are served from it without the archive.
const KEEP_ARCHIVED_SHARE: u64 = 2;

/// An archived entry up to this size is kept although the journal needs the room: with it a replica
/// that lacks all of them is level, also when nothing is committed any more.
const KEPT_ENTRY_BYTES_MAX: u64 = 256 << 10;

/// How a database's archive stands.
#[derive(Debug, Default)]
pub struct UploadState {
    running: bool,
    snapshot_running: bool,
    snapshot_looked: Option<Instant>,
    oldest: Option<Instant>,
    checked: Option<Instant>,
    failures: u32,
    retry_at: Option<Instant>,
    last_error: Option<String>,
    listed: bool,
}

/// What an upload has reached.
pub struct Uploaded {
    /// Last entry that is in the store.
    pub last_lsn: Lsn,
}

impl UploadState {
    /// Entries were committed.
    pub fn note_committed(&mut self) {
        self.oldest.get_or_insert_with(Instant::now);
    }

    /// What a person should look at.
    pub fn warnings(&self) -> Vec<String> {
        self.last_error
            .iter()
            .map(|error| format!("the archive is behind: {error}"))
            .collect()
    }

    fn failed(&mut self, error: String) {
        let pause = RETRY_PAUSE_FIRST.saturating_mul(1 << self.failures.min(16));
        self.failures += 1;
        self.retry_at = Some(Instant::now() + pause.min(RETRY_PAUSE_MAX));
        self.last_error = Some(error);
    }
}

impl PrimaryDatabase {
    /// Whether committed entries are not in the archive yet.
    pub fn has_unarchived(&self) -> bool {
        self.machine.archive_lsn() < self.machine.commit_lsn()
    }
}

impl Node {
    /// Starts what uploads are due.
    pub fn tick_uploads(&mut self, now: Instant) {
        let (Some(store), Some(archive)) = (self.store.clone(), self.config.archive.clone()) else {
            self.uploads_due.clear();
            return;
        };
        let stopping = self.is_stopping();
        let scratch = self.scratch_folder();
        for database in self.uploads_due.clone() {
            let Some(db) = self.primaries.get_mut(&database) else {
                self.uploads_due.remove(&database);
                continue;
            };
            let last_lsn = db.machine.commit_lsn().min(db.written_lsn);
            let first_lsn = db.machine.archive_lsn().next();
            let upload = &mut db.upload;
            let checked = upload.checked.is_some_and(|at| now - at < CHECK_INTERVAL);
            let waiting = upload.retry_at.is_some_and(|at| now < at) && !stopping;
            if upload.running || checked || waiting {
                continue;
            }
            upload.checked = Some(now);
            if first_lsn > last_lsn {
                upload.oldest = None;
                self.uploads_due.remove(&database);
                continue;
            }
            let oldest = *upload.oldest.get_or_insert(now);
            let bytes = self
                .primary_journal
                .entry_bytes(database, first_lsn, last_lsn);
            let due = stopping
                || bytes >= archive.chunk_bytes
                || now.duration_since(oldest) >= archive.chunk_interval;
            if due {
                upload.running = true;
                upload.oldest = None;
                let job = UploadJob {
                    journal: self.primary_journal.clone(),
                    store: Arc::clone(&store),
                    identity: LogIdentity {
                        database,
                        name: db.name.clone(),
                    },
                    range: (first_lsn, last_lsn),
                    chunk_bytes: archive.chunk_bytes,
                    scratch: scratch.clone(),
                    read_listing: !upload.listed,
                };
                spawn_upload(job, self.events.clone());
            }
        }
    }

    /// Where chunks are built; this node's alone.
    pub fn scratch_folder(&self) -> PathBuf {
        self.config.data.join("scratch")
    }

    /// An upload has ended.
    pub fn handle_uploaded(&mut self, database: DatabaseId, result: Result<Uploaded, String>) {
        let Some(db) = self.primaries.get_mut(&database) else {
            return;
        };
        db.upload.running = false;
        db.upload.checked = None;
        let uploaded = match result {
            Ok(uploaded) => uploaded,
            Err(error) => {
                tracing::warn!(name = %db.name, %error, "upload failed");
                db.upload.failed(error);
                return;
            }
        };
        db.upload.failures = 0;
        db.upload.retry_at = None;
        db.upload.last_error = None;
        // A machine that began again meanwhile may not know yet that so much is committed. The next
        // upload finds out what of its range is there.
        let archived_lsn = uploaded.last_lsn.min(db.machine.commit_lsn());
        db.upload.listed = archived_lsn == uploaded.last_lsn;
        if archived_lsn > db.machine.archive_lsn() {
            db.machine.handle_archived(archived_lsn);
            self.note_own_archived(database);
        }
        self.commits_untold.insert(database);
        self.consider_snapshot(database);
    }

    /// Writes down what is archived; drops it only when our own journal needs the room.
    fn note_own_archived(&mut self, database: DatabaseId) {
        let Some(db) = self.primaries.get_mut(&database) else {
            return;
        };
        let (commit_lsn, archive_lsn) = (db.machine.commit_lsn(), db.machine.archive_lsn());
        let usage = self.primary_journal.usage();
        let journal = self.primary_journal.clone();
        let crowded = usage.bytes > usage.limit_bytes / KEEP_ARCHIVED_SHARE;
        let newest_bytes = journal.entry_bytes(database, archive_lsn, archive_lsn);
        let drop_through = if newest_bytes <= KEPT_ENTRY_BYTES_MAX {
            archive_lsn.previous().unwrap_or_default()
        } else {
            archive_lsn
        };
        if crowded {
            // Told first: no feed begins at an entry that is about to go.
            db.machine.handle_retained(drop_through.next());
        }
        self.primary_journal.append(
            vec![Record::Progress {
                database,
                commit_lsn,
                archive_lsn,
            }],
            Box::new(move |result| match result {
                Ok(()) if crowded => journal.drop_through(database, drop_through),
                Ok(()) => {}
                Err(error) => tracing::warn!(%database, %error, "progress was not written"),
            }),
        );
    }

    /// Makes a snapshot when the chunks since the last one add up to more than the database.
    fn consider_snapshot(&mut self, database: DatabaseId) {
        let Some(store) = self.store.clone() else {
            return;
        };
        let scratch = self.scratch_folder();
        let stopping = self.is_stopping();
        let Some(db) = self.primaries.get_mut(&database) else {
            return;
        };
        let Some(last) = db.last_transaction else {
            return;
        };
        let looked = db
            .upload
            .snapshot_looked
            .is_some_and(|at| at.elapsed() < SNAPSHOT_INTERVAL);
        if looked || db.upload.snapshot_running || stopping {
            return;
        }
        db.upload.snapshot_running = true;
        db.upload.snapshot_looked = Some(Instant::now());
        let bytes = u64::from(last.commit.page_count) * last.commit.page_size.get() as u64;
        let name = db.name.clone();
        let events = self.events.clone();
        tokio::task::spawn_local(async move {
            let result = tend_archive(&store, &name, database, bytes, &scratch).await;
            events.send(Event::SnapshotMade { database, result }).await;
        });
    }

    /// A snapshot has been made, or not.
    pub fn handle_snapshot_made(
        &mut self,
        database: DatabaseId,
        result: Result<Option<Lsn>, String>,
    ) {
        let Some(db) = self.primaries.get_mut(&database) else {
            return;
        };
        db.upload.snapshot_running = false;
        match result {
            Ok(Some(lsn)) => tracing::info!(name = %db.name, %lsn, "snapshot made"),
            Ok(None) => {}
            Err(error) => {
                // Chunks alone restore as well; the next upload tries again.
                tracing::warn!(name = %db.name, %error, "no snapshot was made");
            }
        }
    }
}

/// A range of a log that is to be in the store.
pub struct UploadJob {
    /// Where it is read.
    pub journal: Journal,
    /// Where it goes.
    pub store: Arc<dyn Store>,
    /// Whose it is.
    pub identity: LogIdentity,
    /// First and last entry, both committed.
    pub range: (Lsn, Lsn),
    /// About where the chunk ends.
    pub chunk_bytes: u64,
    /// For temporary files.
    pub scratch: PathBuf,
    /// Whether the store may have some of it already.
    pub read_listing: bool,
}

fn spawn_upload(job: UploadJob, events: EventSender) {
    tokio::task::spawn_local(async move {
        let database = job.identity.database;
        let result = upload(job).await;
        events.send(Event::Uploaded { database, result }).await;
    });
}

/// Uploads the beginning of the range as one chunk, or finds that the store has it.
pub async fn upload(job: UploadJob) -> Result<Uploaded, String> {
    let LogIdentity { database, name } = job.identity.clone();
    if job.read_listing {
        // After a restart the store may be ahead of what our own journal noted.
        let listing = Listing::load_log(&*job.store, &name, database)
            .await
            .map_err(|error| error.to_string())?;
        let archived = listing.archived_lsn();
        if archived >= job.range.0 {
            return Ok(Uploaded {
                last_lsn: archived.min(job.range.1),
            });
        }
    }
    let UploadJob {
        journal,
        store,
        identity,
        range,
        chunk_bytes,
        scratch,
        ..
    } = job;
    let parts = move || {
        let parts = journal.parts(database, range.0, range.1);
        let (parts, failed) = match parts {
            Ok(parts) => (Some(parts), None),
            Err(error) => (None, Some(Err(error))),
        };
        failed
            .into_iter()
            .chain(WholeEntries::new(parts.into_iter().flatten(), chunk_bytes))
    };
    let uploaded = uploader::write_chunk(&store, &identity, &scratch, parts)
        .await
        .map_err(|error| error.to_string())?;
    Ok(Uploaded {
        last_lsn: uploaded.range.last_lsn,
    })
}

/// Parts up to the end of the entry with which a number of bytes is reached.
struct WholeEntries<I> {
    parts: I,
    bytes_left: u64,
    ended: bool,
}

impl<I> WholeEntries<I> {
    fn new(parts: I, bytes: u64) -> Self {
        Self {
            parts,
            bytes_left: bytes,
            ended: false,
        }
    }
}

impl<I, E> Iterator for WholeEntries<I>
where
    I: Iterator<Item = Result<EntryPart, E>>,
{
    type Item = Result<EntryPart, E>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let part = self.parts.next()?;
        if let Ok(part) = &part {
            self.bytes_left = self.bytes_left.saturating_sub(part.payload.len() as u64);
            self.ended = self.bytes_left == 0 && part.header.is_last();
        }
        Some(part)
    }
}

/// Keeps a log's archive restorable in little time and of bounded size: a snapshot when one is due,
/// then what is older than the retention goes, then small old chunks become larger ones.
async fn tend_archive(
    store: &Arc<dyn Store>,
    name: &str,
    database: DatabaseId,
    database_bytes: u64,
    scratch: &std::path::Path,
) -> Result<Option<Lsn>, String> {
    let listing = Listing::load_log(&**store, name, database)
        .await
        .map_err(|error| error.to_string())?;
    let mut made = None;
    if let Some(lsn) = snapshot::due(&listing, database_bytes) {
        let uploaded = snapshot::make(store, &listing, lsn, scratch)
            .await
            .map_err(|error| error.to_string())?;
        made = Some(uploaded.range.last_lsn);
    }
    let before = |age: Duration| {
        let age_micros = i64::try_from(age.as_micros()).unwrap_or(i64::MAX);
        Timestamp::from_micros(now_micros().saturating_sub(age_micros))
    };
    let expired = upkeep::expired(&listing, before(RETENTION));
    if !expired.is_empty() {
        store
            .delete(&expired)
            .await
            .map_err(|error| error.to_string())?;
        return Ok(made); // the listing is not what it was: merging waits for the next round
    }
    if let Some(run) = upkeep::mergeable(&listing, before(MERGE_AGE)) {
        upkeep::merge(store, &listing, &run, scratch)
            .await
            .map_err(|error| error.to_string())?;
    }
    Ok(made)
}
