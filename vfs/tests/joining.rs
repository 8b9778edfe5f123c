//! Opening a database on which others hold locks: those who have it open, those who are still
//! opening it, and processes without durovfs.

#![allow(clippy::unwrap_used, reason = "what fails in a test fails the test")]

mod common;

use common::*;
use libsqlite3_sys as sqlite;
use std::path::Path;
use std::sync::mpsc::channel;
use std::time::Duration;

/// Longer than an open takes that waits for nobody.
const WHILE: Duration = Duration::from_millis(200);

/// A closed database with one row, and the log of it one transaction ahead, with two.
fn behind(path: &Path) {
    let name = path.to_str().unwrap();
    let db = open_wal(path);
    exec(&db, "CREATE TABLE t(a); INSERT INTO t VALUES (1)");
    drop(db);
    let files = ["", "-durovfs"].map(|suffix| format!("{name}{suffix}"));
    let before = files.clone().map(|file| std::fs::read(file).unwrap());
    let db = open(path);
    exec(&db, "INSERT INTO t VALUES (2)");
    drop(db);
    for (file, bytes) in files.iter().zip(before) {
        std::fs::write(file, bytes).unwrap();
    }
}

/// Broken, a database that is opened by two at once is open for the second one although the first
/// found that it cannot be brought level: it reads what is no longer so, and is refused each commit
/// for good.
#[test]
fn who_comes_while_another_is_opening_waits_for_what_it_finds() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.db");
    behind(&path);
    let (reads, reading) = channel();
    let (go, gone) = channel::<()>();
    sink().in_place_of_reading(move || {
        reads.send(()).unwrap();
        gone.recv().unwrap();
    });
    let first = std::thread::spawn({
        let path = path.clone();
        move || try_open(&path).map(drop)
    });
    reading.recv().unwrap();
    let second = std::thread::spawn({
        let path = path.clone();
        move || open(&path)
    });
    std::thread::sleep(WHILE);
    assert!(
        !second.is_finished(),
        "open, and nobody knows what it holds"
    );
    go.send(()).unwrap();
    let error = first.join().unwrap().unwrap_err();
    assert_eq!(code(&error), sqlite::SQLITE_CANTOPEN);
    let db = second.join().unwrap();
    assert_eq!(number(&db, "SELECT count(*) FROM t"), 2);
    exec(&db, "INSERT INTO t VALUES (3)");
    drop(db);
    assert_level(&path);
}

/// Broken, a program without durovfs that has the file open keeps the application from starting; or
/// makes it start with what the log has left behind.
#[test]
fn beside_a_process_without_durovfs_only_a_level_file_opens() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.db");
    behind(&path);
    let plain = open_plain(&path);
    exec(&plain, "BEGIN; SELECT * FROM t");
    let error = try_open(&path).map(drop).unwrap_err();
    assert_eq!(code(&error), sqlite::SQLITE_CANTOPEN);
    assert_eq!(number(&plain, "SELECT count(*) FROM t"), 1);
    drop(plain);
    drop(open(&path));
    let plain = open_plain(&path);
    exec(&plain, "BEGIN; SELECT * FROM t");
    let db = open(&path);
    exec(&db, "INSERT INTO t VALUES (3)");
    assert_eq!(number(&plain, "SELECT count(*) FROM t"), 2);
    // And who comes next joins the one that is level.
    let other = open(&path);
    assert_eq!(number(&other, "SELECT count(*) FROM t"), 3);
    drop((plain, db, other));
    assert_level(&path);
}

/// Broken, what somebody without durovfs wrote, and has open, is taken for what the log has.
#[test]
fn beside_a_process_without_durovfs_what_it_wrote_is_not_taken_for_level() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.db");
    let db = open_wal(&path);
    exec(&db, "CREATE TABLE t(a); INSERT INTO t VALUES (1)");
    drop(db);
    let plain = open_plain(&path);
    exec(&plain, "INSERT INTO t VALUES (2); PRAGMA wal_checkpoint");
    let error = try_open(&path).map(drop).unwrap_err();
    assert_eq!(code(&error), sqlite::SQLITE_CANTOPEN);
}
