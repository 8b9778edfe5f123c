//! Copies of real databases, whose commits are taken apart into pages here.

use super::*;
use bytes::Bytes;
use durovfs_archive::{NormalizedEntry, Normalizer};
use durovfs_wire::entry::Origin;
use durovfs_wire::{
    ClientId, CommitHeader, EntryPart, Epoch, Lsn, PartHeader, PartKind, Timestamp,
};

fn log() -> DatabaseId {
    DatabaseId::from_bytes([1; 16])
}

/// A database in rollback mode, whose file is all of it after each commit.
struct Source {
    folder: tempfile::TempDir,
    connection: Connection,
    pages: Vec<Vec<u8>>,
    lsn: u64,
    base_lsn: u64,
}

impl Source {
    fn new(setup: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let connection = Connection::open(folder.path().join("source.db")).unwrap();
        connection.execute_batch(setup).unwrap();
        Self {
            folder,
            connection,
            pages: Vec::new(),
            lsn: 1, // an epoch start
            base_lsn: 0,
        }
    }

    fn read(&self) -> Vec<Vec<u8>> {
        let bytes = std::fs::read(self.folder.path().join("source.db")).unwrap();
        if bytes.is_empty() {
            return Vec::new();
        }
        let size = match u16::from_be_bytes([bytes[16], bytes[17]]) {
            1 => 65536,
            size => usize::from(size),
        };
        bytes.chunks(size).map(<[u8]>::to_vec).collect()
    }

    fn checksum(pages: &[Vec<u8>]) -> DatabaseChecksum {
        let mut checksum = DatabaseChecksum::EMPTY;
        for (number, image) in (1..).zip(pages) {
            checksum.toggle(PageChecksum::of(PageNo::new(number).unwrap(), image));
        }
        checksum
    }

    /// What a commit changed, as the log has it.
    fn commit(&mut self, sql: &str) -> TransactionPages {
        self.connection.execute_batch(sql).unwrap();
        let pages = self.read();
        let whole_image = !self.pages.is_empty()
            && self.pages.first().map(Vec::len) != pages.first().map(Vec::len);
        let before = if whole_image {
            &[][..]
        } else {
            &self.pages[..]
        };
        let mut payload = Vec::new();
        let mut slot_count = 0;
        for (index, image) in pages.iter().enumerate() {
            if before.get(index) != Some(image) {
                payload.extend(u32::to_le_bytes(slot_count));
                payload.extend((index as u32 + 1).to_le_bytes());
                payload.extend(image);
                slot_count += 1;
            }
        }
        self.lsn += 1;
        let commit = CommitHeader {
            origin: Origin {
                client: ClientId::from_bytes([2; 16]),
                sequence: self.lsn,
            },
            time: Timestamp::from_micros(0),
            base_lsn: Lsn::new(self.base_lsn),
            page_size: PageSize::try_from(pages[0].len() as u32).unwrap(),
            page_count: pages.len() as u32,
            slot_count,
            checksum: Self::checksum(&pages),
            whole_image,
        };
        self.base_lsn = self.lsn;
        self.pages = pages;
        normalized(self.lsn, commit, payload)
    }

    /// The whole database, as an image that nothing need come before.
    fn image(&mut self) -> TransactionPages {
        self.pages = vec![vec![0]];
        self.commit("")
    }
}

fn normalized(lsn: u64, commit: CommitHeader, payload: Vec<u8>) -> TransactionPages {
    let slot_bytes = 8 + commit.page_size.get();
    let per_part = (durovfs_wire::entry::MAX_PART_PAYLOAD_BYTES / slot_bytes) * slot_bytes;
    let mut chunks: Vec<&[u8]> = payload.chunks(per_part).collect();
    if chunks.is_empty() {
        chunks.push(&[]);
    }
    let mut normalizer = Normalizer::new(std::env::temp_dir());
    let last = chunks.len() - 1;
    for (index, chunk) in chunks.into_iter().enumerate() {
        let kind = if index == last {
            PartKind::Commit(commit)
        } else {
            PartKind::Pages {
                page_size: commit.page_size,
            }
        };
        let header = PartHeader {
            database: log(),
            epoch: Epoch::new(1),
            lsn: Lsn::new(lsn),
            part: index as u32,
            kind,
        };
        let payload = Bytes::copy_from_slice(chunk);
        if let Some(NormalizedEntry::Transaction(pages)) =
            normalizer.push(&EntryPart { header, payload }).unwrap()
        {
            return pages;
        }
    }
    panic!("no transaction");
}

fn rows(file: &Path) -> Vec<String> {
    let reader = Connection::open(file).unwrap();
    let check: String = reader
        .query_row("PRAGMA integrity_check", [], |row| row.get(0))
        .unwrap();
    assert_eq!(check, "ok");
    let mut statement = reader
        .prepare("SELECT id || ':' || length(data) || ':' || hex(substr(data, 1, 8)) FROM t")
        .unwrap();
    let rows = statement.query_map([], |row| row.get(0)).unwrap();
    rows.map(Result::unwrap).collect()
}

fn source_rows(source: &Source) -> Vec<String> {
    rows(&source.folder.path().join("source.db"))
}

const INSERT: &str = "INSERT INTO t(data) WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 \
                      FROM n WHERE i < 40) SELECT randomblob(1 + abs(random()) % 3000) FROM n;";

/// A history with all that changes a file's size and header.
const HISTORY: [&str; 9] = [
    "CREATE TABLE t(id INTEGER PRIMARY KEY, data BLOB);",
    INSERT,
    "BEGIN; CREATE INDEX by_size ON t(length(data)); DELETE FROM t WHERE id % 3 = 0; COMMIT;",
    "VACUUM;",
    INSERT,
    "DELETE FROM t WHERE id > 20;",
    "PRAGMA incremental_vacuum;",
    "VACUUM;",
    INSERT,
];

fn follow(setup: &str) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("deep/er/copy.db");
    let mut source = Source::new(setup);
    let (mut copy, differed) = WarmCopy::open(&file, log()).unwrap();
    assert_eq!((copy.position(), differed), (None, None));
    for sql in HISTORY {
        let pages = source.commit(sql);
        copy.push(&pages).unwrap();
        copy.commit().unwrap();
        copy.verify()
            .unwrap_or_else(|error| panic!("{setup} {sql}: {error}"));
        assert_eq!(copy.position(), Some(pages.summary.position));
        assert_eq!(rows(&file), source_rows(&source), "{setup} {sql}");
    }
    // Opened again, also by one that does not know the schema, it goes on.
    let position = copy.position();
    drop(copy);
    let (mut copy, differed) = WarmCopy::open(&file, log()).unwrap();
    assert_eq!((copy.position(), differed), (position, None));
    copy.push(&source.commit(INSERT)).unwrap();
    copy.commit().unwrap();
    copy.verify().unwrap();
    assert_eq!(rows(&file), source_rows(&source));
}

// If one of these failed, readers of a copy would see what was never in the database, or the copy
// would be built anew for ever.
#[test]
fn a_copy_is_what_the_log_says_after_each_commit() {
    for page_size in [512, 1024, 4096, 65536] {
        for vacuum in ["NONE", "INCREMENTAL", "FULL"] {
            follow(&format!(
                "PRAGMA page_size={page_size}; PRAGMA auto_vacuum={vacuum};"
            ));
        }
    }
    follow("PRAGMA encoding='UTF-16le';");
}

#[test]
fn a_new_page_size_makes_a_new_file() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("copy.db");
    let mut source = Source::new("");
    let (mut copy, _) = WarmCopy::open(&file, log()).unwrap();
    for sql in [HISTORY[0], INSERT, "PRAGMA page_size=1024; VACUUM;", INSERT] {
        copy.push(&source.commit(sql)).unwrap();
        copy.commit().unwrap();
        copy.verify().unwrap();
        assert_eq!(rows(&file), source_rows(&source));
    }
}

#[test]
fn a_reader_keeps_its_snapshot_while_the_copy_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("copy.db");
    let mut source = Source::new("");
    let (mut copy, _) = WarmCopy::open(&file, log()).unwrap();
    for sql in [HISTORY[0], INSERT] {
        copy.push(&source.commit(sql)).unwrap();
    }
    copy.commit().unwrap();
    let reader = Connection::open(&file).unwrap();
    let count = || -> i64 {
        reader
            .query_row("SELECT count(*) FROM t", [], |row| row.get(0))
            .unwrap()
    };
    reader.execute_batch("BEGIN").unwrap();
    assert_eq!(count(), 40);
    for _ in 0..3 {
        copy.push(&source.commit(INSERT)).unwrap();
        copy.commit().unwrap();
    }
    assert_eq!(count(), 40);
    reader.execute_batch("COMMIT").unwrap();
    assert_eq!(count(), 160);
}

#[test]
fn a_snapshot_is_the_logs_image_while_the_copy_goes_on() {
    // Broken: a database that is opened from a copy would not be what was committed.
    let folder = tempfile::tempdir().unwrap();
    let mut source = Source::new("");
    let (mut copy, _) = WarmCopy::open(&folder.path().join("copy.db"), log()).unwrap();
    for sql in [HISTORY[0], INSERT] {
        copy.push(&source.commit(sql)).unwrap();
    }
    let snapshot = copy.snapshot().unwrap().unwrap();
    let pages = source.pages.clone();
    for _ in 0..3 {
        copy.push(&source.commit(INSERT)).unwrap();
        copy.commit().unwrap();
    }
    let mut checksum = DatabaseChecksum::EMPTY;
    let mut count = 0;
    let toggle = |page_no, image: &[u8]| {
        checksum.toggle(PageChecksum::of(page_no, image));
        count += 1;
        Ok(())
    };
    snapshot.for_each(toggle).unwrap();
    assert_eq!(checksum, Source::checksum(&pages));
    assert_eq!(checksum, snapshot.summary().commit.checksum);
    assert_eq!(count, snapshot.image_count());
}

#[test]
fn a_crash_before_or_after_sqlites_commit_leaves_a_copy_that_knows_where_it_stands() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("copy.db");
    let mut source = Source::new("");
    let (mut copy, _) = WarmCopy::open(&file, log()).unwrap();
    copy.push(&source.commit(HISTORY[0])).unwrap();
    copy.commit().unwrap();
    let before = copy.position();
    let pages = source.commit(INSERT);
    copy.push(&pages).unwrap();
    // The record is written, and SQLite's commit is not.
    let batch = copy.batch.take().unwrap();
    let record = CopyRecord {
        database: log(),
        at: copy.at.clone(),
        next: Some(batch.next),
    };
    record.store(&file).unwrap();
    drop(copy);
    let (mut copy, differed) = WarmCopy::open(&file, log()).unwrap();
    assert_eq!((copy.position(), differed), (before, None));
    copy.push(&pages).unwrap();
    copy.commit().unwrap();
    // As right after the commit: the record has both.
    drop(copy);
    let (copy, differed) = WarmCopy::open(&file, log()).unwrap();
    assert_eq!(copy.position(), Some(pages.summary.position));
    assert_eq!(differed, None);
}

#[test]
fn a_copy_that_differs_is_told_and_thrown_away() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("copy.db");
    let mut source = Source::new("");
    let (mut copy, _) = WarmCopy::open(&file, log()).unwrap();
    for sql in [HISTORY[0], INSERT] {
        copy.push(&source.commit(sql)).unwrap();
    }
    copy.commit().unwrap();
    let intruder = Connection::open(&file).unwrap();
    intruder
        .execute_batch("DELETE FROM t WHERE id = 7")
        .unwrap();
    assert!(matches!(copy.verify(), Err(CopyError::Differs(_))));
    drop((intruder, copy));
    let (mut copy, differed) = WarmCopy::open(&file, log()).unwrap();
    assert!(differed.is_some());
    assert_eq!(copy.position(), None);
    assert!(matches!(
        copy.push(&source.commit(INSERT)),
        Err(CopyError::NeedsImage)
    ));
    copy.push(&source.image()).unwrap();
    copy.commit().unwrap();
    copy.verify().unwrap();
    assert_eq!(rows(&file), source_rows(&source));
}

#[test]
fn a_file_that_is_no_copy_of_this_log_is_left_alone() {
    // Broken: a configuration mistake would overwrite somebody's database.
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("copy.db");
    std::fs::write(&file, "mine").unwrap();
    let refused = WarmCopy::open(&file, log());
    assert!(matches!(refused, Err(CopyError::NotOurs(_))), "{refused:?}");
    assert_eq!(std::fs::read(&file).unwrap(), b"mine");
    std::fs::remove_file(&file).unwrap();
    WarmCopy::open(&file, log()).unwrap();
    let other = WarmCopy::open(&file, DatabaseId::from_bytes([3; 16]));
    assert!(matches!(other, Err(CopyError::NotOurs(_))), "{other:?}");
}
