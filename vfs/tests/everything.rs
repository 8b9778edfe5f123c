//! Everything that SQL has, in every page size: the same rows as with plain SQLite, and a log that
//! has what the file has.

#![allow(clippy::unwrap_used, reason = "what fails in a test fails the test")]

mod common;

use common::*;
use rusqlite::{Connection, MAIN_DB};
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;

const SCHEMA: &str = "
    CREATE VIRTUAL TABLE words USING fts5(text);
    CREATE VIRTUAL TABLE boxes USING rtree(id, x0, x1);
    CREATE TABLE keyed(k TEXT PRIMARY KEY, v) WITHOUT ROWID;
    CREATE TABLE made(a INTEGER PRIMARY KEY, d TEXT, twice AS (a * 2) STORED,
                      x AS (json_extract(d, '$.x')));
    CREATE INDEX made_x ON made(x) WHERE x > 3;
    CREATE INDEX made_expression ON made(length(d));
    CREATE TABLE seen(what TEXT, n INTEGER) STRICT;
    CREATE TRIGGER note AFTER INSERT ON keyed BEGIN INSERT INTO seen VALUES (new.k, 1); END;
    CREATE VIEW both AS SELECT k FROM keyed UNION ALL SELECT d FROM made;
    CREATE TABLE parent(id INTEGER PRIMARY KEY);
    CREATE TABLE child(p REFERENCES parent(id) ON DELETE CASCADE);
    CREATE TABLE blobs(id INTEGER PRIMARY KEY, b BLOB);
    CREATE TEMP TABLE scratch(x)";

const WORK: &str = "
    PRAGMA foreign_keys=ON;
    BEGIN;
    INSERT INTO words VALUES ('three of five'), ('two of five'), ('seven');
    INSERT INTO boxes VALUES (1, 0, 10), (2, 20, 30), (3, 5, 25);
    WITH n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 90)
      INSERT INTO keyed SELECT printf('key %05d', i * 7 % 97), i FROM n;
    WITH n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 60)
      INSERT INTO made(d) SELECT json_object('x', i % 9, 'y', hex(zeroblob(i))) FROM n;
    INSERT INTO scratch SELECT k FROM keyed;
    INSERT INTO parent VALUES (1), (2);
    INSERT INTO child VALUES (1), (1), (2);
    INSERT INTO blobs VALUES (1, zeroblob(70000));
    COMMIT;
    UPDATE made SET d = json_set(d, '$.x', 100) WHERE x = 4;
    DELETE FROM keyed WHERE v % 3 = 0;
    INSERT INTO keyed VALUES ('key 00001', -1) ON CONFLICT(k) DO UPDATE SET v = excluded.v;
    DELETE FROM parent WHERE id = 1;
    DELETE FROM boxes WHERE id = 2;
    INSERT INTO words(words) VALUES ('optimize');
    ALTER TABLE seen ADD COLUMN extra INTEGER DEFAULT 5;
    ALTER TABLE keyed RENAME COLUMN v TO value;
    ANALYZE; REINDEX;
    DROP VIEW both";

/// All rows of all tables, in an order of their own.
fn rows(db: &Connection) -> Vec<String> {
    let sql = "SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE '%stat%' \
               AND name NOT LIKE 'boxes_%' AND name NOT LIKE 'words_%' ORDER BY name";
    let mut names = db.prepare(sql).unwrap();
    let names = names.query_map([], |row| row.get::<_, String>(0)).unwrap();
    let mut all = Vec::new();
    for name in names.map(Result::unwrap) {
        let mut statement = db
            .prepare(&format!("SELECT * FROM {name} ORDER BY 1"))
            .unwrap();
        let columns = statement.column_count();
        let mut rows = statement.query([]).unwrap();
        while let Some(row) = rows.next().unwrap() {
            let values: Vec<_> = (0..columns).map(|at| row.get_ref(at).unwrap()).collect();
            all.push(format!("{name}: {values:?}"));
        }
    }
    all
}

fn work(db: &Connection, page_size: u32, journal: &str) -> Vec<String> {
    exec(
        db,
        &format!("PRAGMA page_size={page_size}; PRAGMA journal_mode={journal}"),
    );
    exec(db, "PRAGMA cache_size=20; PRAGMA journal_size_limit=30000");
    exec(db, SCHEMA);
    exec(db, WORK);
    let mut blob = db.blob_open(MAIN_DB, "blobs", "b", 1, false).unwrap();
    blob.seek(SeekFrom::Start(30_000)).unwrap();
    blob.write_all(&[7; 20_000]).unwrap();
    blob.close().unwrap();
    assert_eq!(text(db, "PRAGMA integrity_check"), "ok");
    assert_eq!(number(db, "PRAGMA page_size"), i64::from(page_size));
    assert_eq!(
        number(db, "SELECT count(*) FROM words WHERE words MATCH 'five'"),
        2
    );
    assert_eq!(number(db, "SELECT count(*) FROM scratch"), 90);
    rows(db)
}

/// Broken, an application that uses a part of SQL, or a page size, that few use loses what it
/// wrote.
#[test]
fn everything_that_sql_has_is_replicated() {
    for (round, shift) in (9..=16).enumerate() {
        let journal = ["WAL", "DELETE", "WAL", "TRUNCATE"][round % 4];
        let page_size = 1u32 << shift;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        let expected = work(
            &open_plain(&dir.path().join("plain.db")),
            page_size,
            journal,
        );
        let db = open(&path);
        let found = work(&db, page_size, journal);
        assert_eq!(found, expected, "{page_size} {journal}");
        drop(db);
        assert_level(&path);
        // From the log alone.
        for suffix in ["", "-durovfs"] {
            std::fs::remove_file(format!("{}{suffix}", path.display())).unwrap();
        }
        let db = open(&path);
        assert_eq!(rows(&db), expected, "{page_size} {journal}");
        drop(db);
        assert_level(&path);
    }
}

/// Broken, a transaction over a protected database and files that are nobody's business fails, or
/// sends them.
#[test]
fn protected_and_unprotected_files_share_a_transaction() {
    for journal in ["WAL", "DELETE"] {
        let dir = tempfile::tempdir().unwrap();
        let (path, other) = (dir.path().join("a.db"), dir.path().join("excluded.db"));
        let db = open(&path);
        exec(
            &db,
            &format!("ATTACH '{}' AS o; ATTACH ':memory:' AS m", other.display()),
        );
        exec(
            &db,
            &format!("PRAGMA main.journal_mode={journal}; CREATE TABLE main.t(a)"),
        );
        exec(
            &db,
            "CREATE TABLE o.t(a); CREATE TABLE m.t(a); CREATE TEMP TABLE u(a)",
        );
        let all = "BEGIN; INSERT INTO main.t VALUES (1); INSERT INTO o.t VALUES (1); \
                   INSERT INTO m.t VALUES (1); INSERT INTO u VALUES (1); COMMIT";
        exec(&db, all);
        sink().fault(path.to_str().unwrap(), &[common::model::Fault::Refuse]);
        try_exec(&db, all).unwrap_err();
        assert_eq!(number(&db, "SELECT count(*) FROM main.t"), 1);
        assert_eq!(number(&db, "SELECT count(*) FROM u"), 1);
        drop(db);
        assert_level(&path);
        assert_eq!(sink().last_lsn(other.to_str().unwrap()), 0);
    }
}

/// Broken, the same file by another spelling of its name is another database.
#[test]
fn a_file_is_one_database_by_whatever_name_it_is_opened() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.db");
    let link = dir.path().join("link.db");
    exec(&open(&path), "CREATE TABLE t(a)");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    let spellings = [
        path.display().to_string(),
        format!("file:{}", path.display()),
        format!("file:{}?cache=private", path.display()),
        format!(
            "{}/../{}/a.db",
            dir.path().display(),
            dir.path().file_name().unwrap().display()
        ),
        link.display().to_string(),
        // Without locks of SQLite's own.
        format!("file:{}?nolock=1", path.display()),
    ];
    for (round, spelling) in spellings.iter().enumerate() {
        let db = open(Path::new(spelling));
        exec(&db, &format!("INSERT INTO t VALUES ({round})"));
        drop(db);
        let lsn = sink().last_lsn(path.to_str().unwrap());
        assert_eq!(lsn, round as u64 + 2, "{spelling}");
        assert_level(&path);
    }
}
