//! What applications do besides writing rows, and several processes at once.

#![allow(clippy::unwrap_used, reason = "what fails in a test fails the test")]

mod common;

use common::model::Fault;
use common::*;
use libsqlite3_sys as sqlite;
use rusqlite::{Connection, OpenFlags};
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::Ordering;

/// Broken, a file that is nobody's business is sent to the cluster, or cannot be opened.
#[test]
fn what_is_not_protected_passes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("excluded.db");
    let db = open_wal(&path);
    exec(
        &db,
        "CREATE TABLE t(a); INSERT INTO t VALUES (1); PRAGMA temp_store=FILE",
    );
    exec(
        &db,
        "CREATE TEMP TABLE u AS SELECT * FROM t; ATTACH ':memory:' AS m; CREATE TABLE m.v(x)",
    );
    exec(
        &db,
        "ATTACH '' AS e; CREATE TABLE e.v(x); INSERT INTO e.v VALUES (randomblob(5000000))",
    );
    assert_eq!(sink().last_lsn(path.to_str().unwrap()), 0);
    drop(db);
    // A URI can name a database that the paths leave out.
    let uri = format!("file:{}?durovfs_db=named", path.display());
    let name = dir.path().join("named").to_str().unwrap().to_owned();
    let uri = uri.replace("durovfs_db=named", &format!("durovfs_db={name}"));
    let db = open(&PathBuf::from(uri));
    assert_eq!(sink().last_lsn(&name), 1);
    drop(db);
    let read_only = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_URI;
    let included = dir.path().join("included.db");
    drop(open_wal(&included));
    sink().set_unreachable(included.to_str().unwrap(), true);
    let db = Connection::open_with_flags_and_vfs(&included, read_only, "durovfs").unwrap();
    assert_eq!(number(&db, "SELECT count(*) FROM sqlite_master"), 0);
}

/// Broken, an application cannot ask or set what INTERFACE.md promises, or gets no message.
#[test]
fn pragmas_answer() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.db");
    let db = open_wal(&path);
    exec(&db, "CREATE TABLE t(a)");
    assert_eq!(text(&db, "PRAGMA durovfs_durability"), "quorum");
    assert_eq!(text(&db, "PRAGMA durovfs_timeout"), "10000");
    assert_eq!(text(&db, "PRAGMA durovfs_timeout=0"), "0");
    assert_eq!(text(&db, "PRAGMA main.durovfs_timeout"), "0");
    let refused = |sql: &str| try_exec(&db, sql).unwrap_err().to_string();
    let text = refused("PRAGMA durovfs_durability=later");
    assert!(text.contains("neither quorum nor deferred"), "{text}");
    assert!(refused("PRAGMA durovfs_timeout=soon").contains("milliseconds"));
    assert!(refused("PRAGMA journal_mode=OFF").contains("durovfs"));
    let uri = PathBuf::from(format!("file:{}?durovfs_durability=later", path.display()));
    assert_eq!(
        code(&try_open(&uri).unwrap_err()) & 0xff,
        sqlite::SQLITE_CANTOPEN
    );
}

/// Broken, leaving WAL mode, a page size change or a copy by the backup API escapes the log.
#[test]
fn modes_sizes_and_copies_are_followed() {
    let dir = tempfile::tempdir().unwrap();
    let (path, copy) = (dir.path().join("a.db"), dir.path().join("b.db"));
    let db = open_wal(&path);
    exec(
        &db,
        "CREATE TABLE t(a); WITH n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i<300) \
               INSERT INTO t SELECT randomblob(200) FROM n",
    );
    exec(
        &db,
        "PRAGMA journal_mode=DELETE; PRAGMA page_size=8192; VACUUM",
    );
    assert_eq!(number(&db, "PRAGMA page_size"), 8192);
    exec(
        &db,
        "INSERT INTO t VALUES (1); PRAGMA journal_mode=WAL; INSERT INTO t VALUES (2)",
    );
    let whole = sink().with_log(path.to_str().unwrap(), |log| {
        log.entries
            .iter()
            .filter(|entry| entry.commit.whole_image)
            .count()
    });
    assert_eq!(
        whole, 2,
        "the first transaction, and the one that changed the page size"
    );
    let mut target = open(&copy);
    exec(
        &target,
        "PRAGMA page_size=4096; PRAGMA journal_mode=WAL; CREATE TABLE old(a)",
    );
    // SQLite refuses this for a WAL target of another page size; it must stay as it was.
    if let Ok(backup) = rusqlite::backup::Backup::new(&db, &mut target) {
        let _ = backup.run_to_completion(100, std::time::Duration::ZERO, None);
    }
    drop(target);
    let fresh = dir.path().join("c.db");
    let mut target = open(&fresh);
    let backup = rusqlite::backup::Backup::new(&db, &mut target).unwrap();
    backup
        .run_to_completion(7, std::time::Duration::ZERO, None)
        .unwrap();
    drop(backup);
    assert_eq!(number(&target, "SELECT count(*) FROM t"), 302);
    exec(
        &db,
        &format!(
            "VACUUM INTO 'file:{}?vfs=durovfs'",
            dir.path().join("d.db").display()
        ),
    );
    exec(&db, &format!("ATTACH '{}' AS other", copy.display()));
    exec(
        &db,
        "BEGIN; INSERT INTO t VALUES (9); CREATE TABLE other.new(a); COMMIT",
    );
    drop((db, target));
    for file in [path, copy, fresh, dir.path().join("d.db")] {
        assert_level(&file);
    }
}

/// Broken, memory grows with the transaction, or what was streamed is not what is committed.
#[test]
fn a_large_transaction_streams_in_bounded_memory() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.db");
    let name = path.to_str().unwrap();
    let db = open_wal(&path);
    exec(&db, "PRAGMA cache_size=50; CREATE TABLE t(a)");
    let parts = sink().streamed_parts.load(Ordering::Relaxed);
    let insert = "WITH n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i<600) \
                  INSERT INTO t SELECT randomblob(10000) FROM n";
    exec(
        &db,
        &format!(
            "BEGIN; {insert}; SAVEPOINT s; {insert}; ROLLBACK TO s; UPDATE t SET a = 1 \
                        WHERE rowid % 50 = 0; COMMIT"
        ),
    );
    let streamed = sink().streamed_parts.load(Ordering::Relaxed) - parts;
    assert!(
        streamed >= 10,
        "{streamed} parts of 1 MiB, of a transaction of 12 MB"
    );
    let lsn = sink().last_lsn(name);
    let aborts = sink().aborts.load(Ordering::Relaxed);
    exec(&db, &format!("BEGIN; {insert}; ROLLBACK"));
    exec(&db, "BEGIN IMMEDIATE; ROLLBACK");
    assert!(
        sink().aborts.load(Ordering::Relaxed) > aborts,
        "the sink holds pages for ever"
    );
    sink().fault(name, &[Fault::Refuse]);
    try_exec(&db, insert).unwrap_err();
    assert_eq!(sink().last_lsn(name), lsn);
    exec(&db, "DELETE FROM t WHERE rowid < 100");
    drop(db);
    assert_level(&path);
}

/// Broken, status shows another database, or misses an outcome that is open.
#[test]
fn status_tells_what_a_connection_knows() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.db");
    let name = path.to_str().unwrap();
    let db = open_wal(&path);
    exec(&db, "CREATE TABLE t(a)");
    let status = file_status(&db, c"main").unwrap();
    assert_eq!(
        (status.name.as_str(), status.position.lsn.get()),
        (name, sink().last_lsn(name))
    );
    assert!(
        !status.in_flight && status.last_error.is_empty(),
        "{status:?}"
    );
    sink().fault(name, &[Fault::UnknownLost]);
    try_exec(&db, "INSERT INTO t VALUES (1)").unwrap_err();
    let status = file_status(&db, c"main").unwrap();
    assert!(
        status.in_flight && status.last_error.contains("UnknownLost"),
        "{status:?}"
    );
    assert!(file_status(&open_plain(&path), c"main").is_none());
}

/// The writer that several processes run. Does nothing when it is run as a test.
#[test]
fn writer_child() {
    let Ok(path) = std::env::var("DUROVFS_WRITER_PATH") else {
        return;
    };
    let count: i64 = std::env::var("DUROVFS_WRITER_COUNT")
        .unwrap()
        .parse()
        .unwrap();
    for round in 0..count {
        // Opening and closing is part of the test.
        let db = open(&PathBuf::from(&path));
        exec(
            &db,
            "PRAGMA busy_timeout=60000; PRAGMA wal_autocheckpoint=5; PRAGMA synchronous=OFF",
        );
        for row in 0..8 {
            db.execute(
                "INSERT INTO t VALUES (?1, randomblob(300))",
                [round * 10 + row],
            )
            .unwrap();
        }
    }
}

/// Broken, processes that share a database overtake each other at the gate or in the mark.
#[test]
fn several_processes_write_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.db");
    let db = open_wal(&path);
    exec(&db, "CREATE TABLE t(a, b)");
    let spawn = || {
        Command::new(std::env::current_exe().unwrap())
            .args(["writer_child", "--exact"])
            .env("DUROVFS_WRITER_PATH", &path)
            .env("DUROVFS_WRITER_COUNT", "6")
            .spawn()
            .unwrap()
    };
    let children = [spawn(), spawn(), spawn()];
    drop(db);
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    let db = open(&path);
    assert_eq!(number(&db, "SELECT count(*) FROM t"), 3 * 6 * 8);
    drop(db);
    assert_level(&path);
}
