//! Databases whose local file counts: what was done to the file without durovfs becomes the log's
//! next transaction, and a file that was deleted begins again.

#![allow(clippy::unwrap_used, reason = "what fails in a test fails the test")]

mod common;

use common::model::Fault;
use common::*;
use std::path::{Path, PathBuf};

fn beside(path: &Path, suffix: &str) -> PathBuf {
    PathBuf::from(format!("{}{suffix}", path.display()))
}

fn directory() -> tempfile::TempDir {
    tempfile::Builder::new()
        .prefix("keep-local-")
        .tempdir()
        .unwrap()
}

/// Broken, an application that deletes its database and makes a new one finds the old one again, or
/// the log's history before it is gone.
#[test]
fn a_deleted_file_begins_again_in_the_same_log() {
    let dir = directory();
    let path = dir.path().join("a.db");
    let name = path.to_str().unwrap();
    for (round, wal) in [(1u64, true), (2, false), (3, true)] {
        let db = if wal { open_wal(&path) } else { open(&path) };
        assert_eq!(number(&db, "SELECT count(*) FROM sqlite_schema"), 0);
        exec(&db, "CREATE TABLE t(a); INSERT INTO t VALUES (1)");
        drop(db);
        assert_level(&path);
        assert!(sink().last_lsn(name) >= 2 * round);
        std::fs::remove_file(&path).unwrap();
        if round == 2 {
            // Whoever deletes all that has the name.
            std::fs::remove_file(beside(&path, "-durovfs")).unwrap();
        }
    }
    // Opened, and closed before anything was written: it is as empty the next time.
    let lsn = sink().last_lsn(name);
    for _ in 0..2 {
        let db = open(&path);
        assert_eq!(number(&db, "SELECT count(*) FROM sqlite_schema"), 0);
    }
    assert_eq!(sink().last_lsn(name), lsn);
    let db = open(&path);
    exec(&db, "CREATE TABLE u(a)");
    drop(db);
    assert_eq!(sink().last_lsn(name), lsn + 1);
    assert_level(&path);
}

/// Broken, a copy that was put back is rolled forward over, or refused; or a write from outside is.
#[test]
fn what_others_made_of_the_file_is_the_next_transaction() {
    let dir = directory();
    let path = dir.path().join("a.db");
    let name = path.to_str().unwrap();
    let db = open_wal(&path);
    exec(&db, "CREATE TABLE t(a); INSERT INTO t VALUES (1)");
    drop(db);
    let (copy, mark) = (dir.path().join("copy"), dir.path().join("copy-durovfs"));
    std::fs::copy(&path, &copy).unwrap();
    std::fs::copy(beside(&path, "-durovfs"), &mark).unwrap();
    let db = open(&path);
    exec(&db, "INSERT INTO t VALUES (2)");
    drop(db);
    let lsn = sink().last_lsn(name);
    // Put back without its mark, with it, and by somebody who writes.
    std::fs::copy(&copy, &path).unwrap();
    let db = open(&path);
    assert_eq!(number(&db, "SELECT count(*) FROM t"), 1);
    exec(&db, "INSERT INTO t VALUES (2)");
    drop(db);
    assert_eq!(sink().last_lsn(name), lsn + 2);
    assert_level(&path);
    std::fs::copy(&copy, &path).unwrap();
    std::fs::copy(&mark, beside(&path, "-durovfs")).unwrap();
    assert_eq!(number(&open(&path), "SELECT count(*) FROM t"), 1);
    assert_eq!(sink().last_lsn(name), lsn + 3);
    assert_level(&path);
    let plain = open_plain(&path);
    exec(&plain, "INSERT INTO t VALUES (3)");
    drop(plain);
    assert_eq!(number(&open(&path), "SELECT sum(a) FROM t"), 4);
    assert_eq!(sink().last_lsn(name), lsn + 4);
    // Nobody did anything: nothing is sent.
    assert_eq!(number(&open(&path), "SELECT sum(a) FROM t"), 4);
    assert_eq!(sink().last_lsn(name), lsn + 4);
    assert_level(&path);
}

/// Broken, the copy of a database takes part in the log of its original, or cannot be opened.
#[test]
fn a_copy_with_its_mark_is_a_database_of_its_own() {
    let dir = directory();
    let (path, copy) = (dir.path().join("a.db"), dir.path().join("b.db"));
    let db = open_wal(&path);
    exec(&db, "CREATE TABLE t(a); INSERT INTO t VALUES (1)");
    drop(db);
    for suffix in ["", "-durovfs"] {
        std::fs::copy(beside(&path, suffix), beside(&copy, suffix)).unwrap();
    }
    let db = open(&copy);
    exec(&db, "INSERT INTO t VALUES (2)");
    drop(db);
    assert_level(&copy);
    assert_eq!(number(&open(&path), "SELECT count(*) FROM t"), 1);
    assert_level(&path);
}

/// Broken, a commit that is in the log is given up because a crash kept the file from getting it.
#[test]
fn a_commit_in_flight_is_settled_by_the_log() {
    let dir = directory();
    let path = dir.path().join("a.db");
    let name = path.to_str().unwrap();
    let db = open_wal(&path);
    exec(&db, "CREATE TABLE t(a); INSERT INTO t VALUES (1)");
    sink().fault(name, &[Fault::UnknownCommitted]);
    sink().set_resolve_unknown(name, true);
    try_exec(&db, "INSERT INTO t VALUES (2)").unwrap_err();
    drop(db);
    sink().set_resolve_unknown(name, false);
    assert_eq!(number(&open(&path), "SELECT sum(a) FROM t"), 3);
    assert_level(&path);
}
