//! One warm copy: opened, fed with transactions, compared with its log.

use crate::absent::{AbsentPages, MAX_RANGES};
use crate::stand::{CopyRecord, Stand, record_path};
use durovfs_archive::TransactionPages;
use durovfs_wire::entry::TransactionSummary;
use durovfs_wire::{DatabaseChecksum, DatabaseId, LogPosition, PageChecksum, PageNo, PageSize};
use rusqlite::{Connection, ErrorCode, OpenFlags, OptionalExtension};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Bytes of pages that are committed at once: readers see the log move in small steps, and SQLite
/// commits a few times a second under load, not a few thousand times.
const BATCH_BYTES: usize = 4 << 20;
/// Where page 1 says how SQLite journals: <https://sqlite.org/fileformat2.html>, 1.3.
const FORMAT: std::ops::Range<usize> = 18..20;
/// Both say WAL.
const WAL_FORMAT: [u8; 2] = [2, 2];
/// What a connection keeps in memory of page 1: it is opened anew when one of these changes. Text
/// encoding and schema, and how the database vacuums itself.
const CACHED_HEADER: [std::ops::Range<usize>; 3] = [40..48, 52..60, 64..68];
/// How long another writer (there should be none) may hold the copy.
const BUSY_TIMEOUT: Duration = Duration::from_secs(1);
/// The WAL of a copy that no reader holds back is cut to this when it begins anew.
const WAL_KEPT_BYTES: u32 = 16 << 20;
/// Longest WAL. Only a reader that keeps an old snapshot makes it grow; the copy then waits for it.
const WAL_LIMIT_BYTES: u64 = 1 << 30;

/// Why a copy did not take what it was given. Nothing of the open batch is in it then.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// The copy is not what its log says, and must be built anew.
    #[error("{0}")]
    Differs(String),
    /// The transaction does not follow where the copy stands: it needs a whole image first.
    #[error("the copy needs a whole image of the database first")]
    NeedsImage,
    /// The file is somebody else's, or another log's. It is left alone.
    #[error("{0}")]
    NotOurs(String),
    /// Somebody holds it, or the disk fails: to be tried again.
    #[error("{0}")]
    Failed(String),
}

impl CopyError {
    fn io(action: &str, path: &Path, error: &io::Error) -> Self {
        Self::Failed(format!("{action} {}: {error}", path.display()))
    }
}

impl From<rusqlite::Error> for CopyError {
    fn from(error: rusqlite::Error) -> Self {
        match error.sqlite_error_code() {
            Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => {
                Self::Differs(format!("SQLite finds the copy damaged: {error}"))
            }
            _ => Self::Failed(format!("SQLite: {error}")),
        }
    }
}

impl From<io::Error> for CopyError {
    fn from(error: io::Error) -> Self {
        Self::Failed(format!("read the transaction: {error}"))
    }
}

/// A batch that SQLite has not committed yet.
#[derive(Debug)]
struct Batch {
    next: Stand,
    bytes: usize,
    /// It changes what the connection keeps in memory.
    changes_header: bool,
    /// It cuts the file, which must be the last thing in it.
    cuts: bool,
}

/// A copy of one database, of which this is the only writer.
#[derive(Debug)]
pub struct WarmCopy {
    file: PathBuf,
    database: DatabaseId,
    connection: Option<Connection>,
    /// What the connection keeps of page 1.
    header: Vec<u8>,
    at: Option<Stand>,
    batch: Option<Batch>,
}

impl WarmCopy {
    /// Opens the copy, or makes an empty one, and finds out where it stands: it is read whole. The
    /// reason is given when it stands nowhere and was thrown away.
    ///
    /// # Errors
    /// When there is a file that is no copy of this log, or the disk fails.
    pub fn open(file: &Path, database: DatabaseId) -> Result<(Self, Option<String>), CopyError> {
        let failed = |action| move |error| CopyError::io(action, file, &error);
        if let Some(folder) = file.parent() {
            std::fs::create_dir_all(folder).map_err(failed("make the folder of"))?;
        }
        let record = CopyRecord::load(file).map_err(failed("read what stands beside"))?;
        let exists = |path: &Path| path.try_exists().map_err(failed("look for"));
        if record.is_none() && !exists(&record_path(file))? && exists(file)? {
            let file = file.display();
            return Err(CopyError::NotOurs(format!(
                "{file} is there and is no warm copy: move it away, or set another directory"
            )));
        }
        if let Some(other) = record.as_ref().filter(|other| other.database != database) {
            return Err(CopyError::NotOurs(format!(
                "{} is the copy of another log of that name, {}: remove it to have this one's",
                file.display(),
                other.database
            )));
        }
        let mut copy = Self {
            file: file.to_owned(),
            database,
            connection: None,
            header: Vec::new(),
            at: None,
            batch: None,
        };
        let record = record.filter(|record| record.at.is_some() || record.next.is_some());
        let known = record.is_some();
        let found = record.map_or(Ok(None), |record| copy.find_stand(record));
        match found {
            Ok(Some(stand)) => {
                copy.at = Some(stand);
                Ok((copy, None))
            }
            Ok(None) | Err(CopyError::Differs(_)) => {
                copy.start_over()?;
                let reason = "its checksum is that of no position that it can have";
                Ok((copy, known.then(|| reason.to_owned())))
            }
            Err(error) => Err(error),
        }
    }

    /// Where the copy is.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// The last transaction that readers see. `None` while there is nothing to see.
    pub fn position(&self) -> Option<LogPosition> {
        self.at.as_ref().map(Stand::position)
    }

    /// Takes the next transaction. It is committed with the batch, or with [`Self::commit`]; one
    /// that the copy has already is passed over.
    ///
    /// # Errors
    /// See [`CopyError`].
    pub fn push(&mut self, pages: &TransactionPages) -> Result<(), CopyError> {
        let result = self.push_or_fail(pages);
        if result.is_err() {
            self.give_up_batch();
        }
        result
    }

    fn push_or_fail(&mut self, pages: &TransactionPages) -> Result<(), CopyError> {
        let summary = &pages.summary;
        let newest = self.batch.as_ref().map(|batch| &batch.next);
        let newest = newest.or(self.at.as_ref());
        let stands_at = newest.map_or(LogPosition::ZERO, Stand::position);
        if summary.position.lsn <= stands_at.lsn {
            return Ok(());
        }
        let page_size = summary.commit.page_size;
        if !summary.commit.whole_image && summary.commit.base_lsn != stands_at.lsn {
            return Err(CopyError::NeedsImage);
        }
        let fits = newest.is_some_and(|stand| stand.summary.commit.page_size == page_size);
        if !fits {
            if newest.is_some() && !summary.commit.whole_image {
                return Err(CopyError::NeedsImage);
            }
            self.commit()?;
            self.start_over()?;
            self.connection = Some(self.connect(Some(page_size))?);
        } else if self.batch.as_ref().is_some_and(Batch::must_end) {
            self.commit()?;
        }
        self.write(pages)?;
        if self.batch.as_ref().is_some_and(Batch::must_end) {
            self.commit()?;
        }
        Ok(())
    }

    /// Lets readers see what was pushed.
    ///
    /// # Errors
    /// When SQLite could not commit it: the copy stands where it stood.
    pub fn commit(&mut self) -> Result<(), CopyError> {
        let Some(batch) = self.batch.take() else {
            return Ok(());
        };
        let result = self.commit_batch(&batch);
        if result.is_err() {
            self.give_up_batch();
            return result;
        }
        let page_count = batch.next.page_count();
        self.at = Some(batch.next);
        if batch.changes_header {
            self.connection = None;
        }
        let found: u32 = self
            .connected()?
            .query_row("PRAGMA page_count", [], |row| row.get(0))?;
        if found != page_count {
            return Err(CopyError::Differs(format!(
                "the copy has {found} pages where the log has {page_count}"
            )));
        }
        Ok(())
    }

    fn commit_batch(&mut self, batch: &Batch) -> Result<(), CopyError> {
        let record = CopyRecord {
            database: self.database,
            at: self.at.clone(),
            next: Some(batch.next.clone()),
        };
        // Before SQLite commits: whichever of the two a crash leaves can be told by its checksum.
        record
            .store(&self.file)
            .map_err(|error| CopyError::io("write beside", &self.file, &error))?;
        self.connected()?.execute_batch("COMMIT")?;
        Ok(())
    }

    fn give_up_batch(&mut self) {
        self.batch = None;
        // Closing rolls back.
        self.connection = None;
    }

    /// Reads the whole copy and compares it with the checksum that the log states.
    ///
    /// # Errors
    /// [`CopyError::Differs`] when it is another.
    pub fn verify(&mut self) -> Result<(), CopyError> {
        let Some(stand) = self.at.clone() else {
            return Ok(());
        };
        let found = self.checksum(&stand)?;
        if found == stand.checksum() {
            return Ok(());
        }
        Err(CopyError::Differs(format!(
            "at lsn {} the copy's checksum is {found}, the log's {}",
            stand.position().lsn,
            stand.checksum()
        )))
    }

    /// Throws the copy away; what follows must begin with a whole image. Readers that have the old
    /// file open keep what they see, and must open the new one.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn start_over(&mut self) -> Result<(), CopyError> {
        self.connection = None;
        self.at = None;
        self.batch = None;
        let nothing = CopyRecord {
            database: self.database,
            at: None,
            next: None,
        };
        // First the record, so that whatever stays of the files is known to be ours.
        nothing
            .store(&self.file)
            .map_err(|error| CopyError::io("write beside", &self.file, &error))?;
        // First the database: who opens it now finds none, not one without its WAL.
        for suffix in ["", "-wal", "-shm"] {
            let file = beside(&self.file, suffix);
            match std::fs::remove_file(&file) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(CopyError::io("remove", &file, &error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn find_stand(&mut self, record: CopyRecord) -> Result<Option<Stand>, CopyError> {
        for stand in [record.next, record.at].into_iter().flatten() {
            match self.checksum(&stand) {
                Ok(found) if found == stand.checksum() => return Ok(Some(stand)),
                Ok(_) | Err(CopyError::Differs(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    fn checksum(&mut self, stand: &Stand) -> Result<DatabaseChecksum, CopyError> {
        let mut checksum = DatabaseChecksum::EMPTY;
        walk(self.connected()?, stand, |page_no, image| {
            checksum.toggle(PageChecksum::of(page_no, image));
            Ok(())
        })?;
        Ok(checksum)
    }

    /// What readers see now, to be read while the copy goes on. `None` while there is nothing.
    ///
    /// # Errors
    /// When SQLite cannot read it.
    pub fn snapshot(&mut self) -> Result<Option<CopySnapshot>, CopyError> {
        self.commit()?;
        let Some(stand) = self.at.clone() else {
            return Ok(None);
        };
        let connection = self.connect(None)?;
        // The first read fixes what is seen: nothing else writes, so it is this stand.
        connection.execute_batch("BEGIN; SELECT count(*) FROM sqlite_schema;")?;
        Ok(Some(CopySnapshot { connection, stand }))
    }

    /// Whether SQLite has the file open.
    pub fn is_connected(&self) -> bool {
        self.connection.is_some()
    }

    /// Gives up the connection until it is needed again.
    pub fn rest(&mut self) {
        if self.batch.is_none() {
            self.connection = None;
        }
    }

    /// Writes a transaction into the batch.
    fn write(&mut self, pages: &TransactionPages) -> Result<(), CopyError> {
        let TransactionSummary { commit, .. } = pages.summary;
        let before = match &self.batch {
            Some(batch) => Some(batch.next.clone()),
            None => self.at.clone(),
        };
        if self.batch.is_none() {
            self.check_wal()?;
            self.connected()?.execute_batch("BEGIN IMMEDIATE")?;
        }
        let page_count = before.as_ref().map_or(0, Stand::page_count);
        let mut absent = match &before {
            Some(stand) if !commit.whole_image => stand.absent_in(commit.page_count),
            _ => AbsentPages::all(commit.page_count),
        };
        let mut first_page = None;
        let connection = self.connected()?;
        let mut insert =
            connection.prepare_cached("INSERT INTO sqlite_dbpage(pgno, data) VALUES(?1, ?2)")?;
        pages.for_each(|page_no, image| {
            absent.remove(page_no.get());
            if page_no.get() == 1 {
                first_page = Some(image.to_vec());
                return Ok(());
            }
            insert.execute((page_no.get(), image))?;
            Ok::<_, CopyError>(())
        })?;
        if absent.contains(commit.page_count) && commit.page_count > page_count {
            // The file must reach as far as the database does.
            insert.execute((commit.page_count, vec![0u8; commit.page_size.get()]))?;
        }
        if absent.is_too_long() {
            return Err(CopyError::Failed(format!(
                "the database has more than {MAX_RANGES} ranges of pages that were never written"
            )));
        }
        let mut format = before.map_or(WAL_FORMAT, |stand| stand.format);
        let mut header = None;
        if let Some(mut image) = first_page {
            if let Some(bytes) = image.get_mut(FORMAT) {
                format.copy_from_slice(bytes);
                bytes.copy_from_slice(&WAL_FORMAT);
            }
            // Last: SQLite looks at it for the schema before each statement.
            insert.execute((1, &image))?;
            header = Some(cached_header(&image));
        }
        let cuts = commit.page_count < page_count;
        if cuts {
            insert.execute((commit.page_count + 1, rusqlite::types::Null))?;
        }
        drop(insert);
        let header = header.filter(|header| *header != self.header);
        let changes_header = header.is_some();
        self.header = header.unwrap_or_else(|| std::mem::take(&mut self.header));
        let bytes = pages.image_count() as usize * commit.page_size.get();
        let batch_bytes = self.batch.as_ref().map_or(0, |batch| batch.bytes);
        self.batch = Some(Batch {
            next: Stand {
                summary: pages.summary,
                format,
                absent,
            },
            bytes: batch_bytes + bytes,
            changes_header,
            cuts,
        });
        Ok(())
    }

    /// A WAL that a reader holds back does not grow for ever.
    fn check_wal(&self) -> Result<(), CopyError> {
        let wal = beside(&self.file, "-wal");
        let bytes = std::fs::metadata(&wal).map_or(0, |wal| wal.len());
        if bytes < WAL_LIMIT_BYTES {
            return Ok(());
        }
        if let Some(connection) = &self.connection {
            let busy = connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| {
                row.get::<_, i64>(0)
            })?;
            if busy == 0 {
                return Ok(());
            }
        }
        Err(CopyError::Failed(format!(
            "{} has {bytes} bytes: a reader keeps an old snapshot, and the copy waits for it",
            wal.display()
        )))
    }

    fn connected(&mut self) -> Result<&Connection, CopyError> {
        let connection = match self.connection.take() {
            Some(connection) => connection,
            None => self.connect(None)?,
        };
        Ok(self.connection.insert(connection))
    }

    /// Opens the file with SQLite; an empty one gets this page size.
    fn connect(&mut self, page_size: Option<PageSize>) -> Result<Connection, CopyError> {
        // Not URI: the name is a name, whatever stands in it.
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE
            | OpenFlags::SQLITE_OPEN_CREATE
            | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(&self.file, flags)?;
        connection.busy_timeout(BUSY_TIMEOUT)?;
        if let Some(page_size) = page_size {
            connection.pragma_update(None, "page_size", page_size.get() as i64)?;
        }
        // The record tells what a crash left, so SQLite syncs with its checkpoints only.
        connection.execute_batch(&format!(
            "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; \
             PRAGMA journal_size_limit={WAL_KEPT_BYTES}; PRAGMA trusted_schema=OFF;"
        ))?;
        self.header = connection
            .query_row("SELECT data FROM sqlite_dbpage WHERE pgno = 1", [], |row| {
                Ok(row.get_ref(0)?.as_blob().map(cached_header)?)
            })
            .optional()?
            .unwrap_or_default();
        Ok(connection)
    }
}

/// A database as it was after one transaction.
#[derive(Debug)]
pub struct CopySnapshot {
    connection: Connection,
    stand: Stand,
}

impl CopySnapshot {
    /// The transaction.
    pub fn summary(&self) -> TransactionSummary {
        self.stand.summary
    }

    /// How many pages have an image.
    pub fn image_count(&self) -> u32 {
        self.stand.page_count() - self.stand.absent.count()
    }

    /// Calls `sink` with each page that has an image, ascending, as the log has it.
    ///
    /// # Errors
    /// When SQLite cannot read it, or `sink` fails.
    pub fn for_each(
        &self,
        sink: impl FnMut(PageNo, &[u8]) -> Result<(), CopyError>,
    ) -> Result<(), CopyError> {
        walk(&self.connection, &self.stand, sink)
    }
}

/// The pages of the file that have an image, as the log has them at this stand.
fn walk(
    connection: &Connection,
    stand: &Stand,
    mut sink: impl FnMut(PageNo, &[u8]) -> Result<(), CopyError>,
) -> Result<(), CopyError> {
    let mut statement = connection.prepare("SELECT pgno, data FROM sqlite_dbpage")?;
    let mut rows = statement.query([])?;
    let mut found = 0;
    while let Some(row) = rows.next()? {
        let number: u32 = row.get(0)?;
        found += 1;
        let page_no = PageNo::new(number).filter(|_| !stand.absent.contains(number));
        let Some(page_no) = page_no else {
            continue;
        };
        let image = row.get_ref(1)?.as_blob().map_err(|error| {
            CopyError::Differs(format!("page {number} of the copy is no page: {error}"))
        })?;
        if number == 1 {
            let mut first = image.to_vec();
            if let Some(format) = first.get_mut(FORMAT) {
                format.copy_from_slice(&stand.format);
            }
            sink(page_no, &first)?;
        } else {
            sink(page_no, image)?;
        }
    }
    if found == stand.page_count() {
        return Ok(());
    }
    Err(CopyError::Differs(format!(
        "the copy has {found} pages where the log has {}",
        stand.page_count()
    )))
}

impl Batch {
    fn must_end(&self) -> bool {
        self.bytes >= BATCH_BYTES || self.changes_header || self.cuts
    }
}

fn cached_header(first_page: &[u8]) -> Vec<u8> {
    let cached = CACHED_HEADER.into_iter();
    let bytes = cached.filter_map(|range| first_page.get(range));
    bytes.flatten().copied().collect()
}

fn beside(file: &Path, suffix: &str) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

#[cfg(test)]
mod tests;
