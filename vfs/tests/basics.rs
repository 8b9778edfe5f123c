//! The shim in a real SQLite: what is committed is in the log and in the file, and nothing else is.

#![allow(clippy::unwrap_used, reason = "what fails in a test fails the test")]

mod common;

use common::model::Fault;
use common::*;

/// Broken, the simplest use does not work: create, write, close, open again.
#[test]
fn a_new_database_is_in_the_log_and_opens_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.db");
    let name = path.to_str().unwrap();
    let db = open_wal(&path);
    exec(
        &db,
        "CREATE TABLE t(a); INSERT INTO t VALUES (1); INSERT INTO t VALUES (2)",
    );
    assert_eq!(sink().last_lsn(name), 4);
    drop(db);
    assert_level(&path);
    let db = open(&path);
    assert_eq!(text(&db, "PRAGMA journal_mode"), "wal");
    exec(&db, "INSERT INTO t VALUES (3)");
    assert_eq!(number(&db, "SELECT sum(a) FROM t"), 6);
    assert_eq!(sink().last_lsn(name), 5);
    drop(db);
    assert_level(&path);
}

/// Broken, a refused commit stays in the file, or the connection is unusable after it.
#[test]
fn each_outcome_has_its_code_and_leaves_the_connection_usable() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.db");
    let name = path.to_str().unwrap();
    let db = open_wal(&path);
    exec(&db, "CREATE TABLE t(a)");
    for (fault, expected) in [
        (Fault::Refuse, libsqlite3_sys::SQLITE_IOERR_WRITE),
        (Fault::UnknownLost, libsqlite3_sys::SQLITE_IOERR_FSYNC),
        (Fault::NotPrimary, libsqlite3_sys::SQLITE_READONLY),
    ] {
        sink().fault(name, &[fault]);
        let error = try_exec(&db, "INSERT INTO t VALUES (1)").unwrap_err();
        assert_eq!(code(&error), expected, "{fault:?}");
        assert_eq!(number(&db, "SELECT count(*) FROM t"), 0);
        sink().fault(name, &[fault]);
        exec(&db, "BEGIN; INSERT INTO t VALUES (1)");
        assert_eq!(code(&try_exec(&db, "COMMIT").unwrap_err()), expected);
        assert!(db.is_autocommit());
        exec(&db, "INSERT INTO t VALUES (7); DELETE FROM t");
    }
    drop(db);
    assert_level(&path);
}

/// Broken, a commit whose outcome was unknown and that the quorum has would be lost in the local
/// file, or written a second time.
#[test]
fn an_unknown_commit_that_is_in_the_log_is_fetched_before_the_next() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.db");
    let name = path.to_str().unwrap();
    let db = open_wal(&path);
    let reader = open(&path);
    exec(&db, "CREATE TABLE t(a)");
    assert_eq!(number(&reader, "SELECT count(*) FROM t"), 0);
    sink().fault(name, &[Fault::UnknownCommitted]);
    let error = try_exec(&db, "INSERT INTO t VALUES (1)").unwrap_err();
    assert_eq!(code(&error), libsqlite3_sys::SQLITE_IOERR_FSYNC);
    assert_eq!(number(&db, "SELECT count(*) FROM t"), 0);
    sink().set_resolve_unknown(name, true);
    let error = try_exec(&db, "INSERT INTO t VALUES (2)").unwrap_err();
    assert_eq!(code(&error), libsqlite3_sys::SQLITE_IOERR_WRITE);
    assert_eq!(number(&reader, "SELECT count(*) FROM t"), 0);
    sink().set_resolve_unknown(name, false);
    exec(&db, "BEGIN IMMEDIATE");
    assert_eq!(number(&db, "SELECT sum(a) FROM t"), 1);
    assert_eq!(number(&reader, "SELECT sum(a) FROM t"), 1);
    exec(&db, "INSERT INTO t VALUES (2); COMMIT");
    assert_eq!(number(&db, "SELECT sum(a) FROM t"), 3);
    drop((db, reader));
    assert_level(&path);
}

/// Broken, a connection that cannot follow the log while it is open says nothing of what helps, or
/// writes on.
#[test]
fn in_exclusive_mode_reopening_follows_the_log() {
    for setup in [
        "PRAGMA locking_mode=EXCLUSIVE; PRAGMA journal_mode=WAL",
        "PRAGMA locking_mode=EXCLUSIVE",
    ] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        let name = path.to_str().unwrap();
        let db = open(&path);
        exec(&db, setup);
        exec(&db, "CREATE TABLE t(a)");
        sink().fault(name, &[Fault::UnknownCommitted]);
        let error = try_exec(&db, "INSERT INTO t VALUES (1)").unwrap_err();
        assert_eq!(code(&error), libsqlite3_sys::SQLITE_IOERR_FSYNC);
        for _ in 0..2 {
            let error = try_exec(&db, "INSERT INTO t VALUES (2)").unwrap_err();
            assert_eq!(code(&error), libsqlite3_sys::SQLITE_IOERR_WRITE);
            let status = file_status(&db, c"main").unwrap();
            assert!(
                status.last_error.contains("open it again"),
                "{}",
                status.last_error
            );
            assert_eq!(number(&db, "SELECT count(*) FROM t"), 0);
        }
        drop(db);
        let db = open(&path);
        assert_eq!(number(&db, "SELECT sum(a) FROM t"), 1);
        exec(&db, "INSERT INTO t VALUES (2)");
        drop(db);
        assert_level(&path);
    }
}

/// Broken, a commit of rollback mode whose outcome was unknown, and that the quorum has, is lost in
/// the local file, or stops all further ones.
#[test]
fn in_rollback_mode_an_unknown_commit_is_fetched_before_the_next() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.db");
    let name = path.to_str().unwrap();
    let db = open(&path);
    exec(&db, "CREATE TABLE t(a)");
    sink().fault(name, &[Fault::UnknownCommitted]);
    let error = try_exec(&db, "INSERT INTO t VALUES (1)").unwrap_err();
    assert_eq!(code(&error), libsqlite3_sys::SQLITE_IOERR_FSYNC);
    assert_eq!(number(&db, "SELECT count(*) FROM t"), 0);
    sink().set_resolve_unknown(name, true);
    let error = try_exec(&db, "INSERT INTO t VALUES (2)").unwrap_err();
    assert_eq!(code(&error), libsqlite3_sys::SQLITE_IOERR_WRITE);
    sink().set_resolve_unknown(name, false);
    // A busy handler is all that an application needs.
    exec(&db, "PRAGMA busy_timeout=5000; INSERT INTO t VALUES (2)");
    assert_eq!(number(&db, "SELECT sum(a) FROM t"), 3);
    drop(db);
    assert_level(&path);
}
