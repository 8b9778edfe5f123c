//! The target of VACUUM INTO is an ordinary file, and nothing else is taken for one.

#![allow(clippy::unwrap_used, reason = "what fails in a test fails the test")]

mod common;

use common::*;
use libsqlite3_sys as sqlite;
use rusqlite::{Connection, OpenFlags};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

unsafe extern "C" fn no_result(
    _: *mut sqlite::sqlite3_context,
    _: i32,
    _: *mut *mut sqlite::sqlite3_value,
) {
}

/// A connection that the shim knows, as the extension tells it of every one.
fn open_watched(path: &Path, mutex: OpenFlags) -> Connection {
    sink();
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE
        | OpenFlags::SQLITE_OPEN_CREATE
        | OpenFlags::SQLITE_OPEN_URI
        | mutex;
    let db = Connection::open_with_flags_and_vfs(path, flags, "durovfs").unwrap();
    watch(&db, no_result);
    db
}

fn transactions(path: &Path) -> u64 {
    sink().last_lsn(path.to_str().unwrap())
}

/// Broken, every copy that an application makes for its backups becomes a database of the cluster.
#[test]
fn the_target_is_an_ordinary_file() {
    let dir = tempfile::tempdir().unwrap();
    for journal in ["WAL", "DELETE"] {
        let path = dir.path().join(format!("{journal}.db"));
        let db = open_watched(&path, OpenFlags::SQLITE_OPEN_FULL_MUTEX);
        exec(
            &db,
            &format!("PRAGMA journal_mode={journal}; CREATE TABLE t(a, b)"),
        );
        exec(&db, "INSERT INTO t VALUES (1, randomblob(50000))");
        let target = dir.path().join(format!("{journal}-copy.db"));
        exec(
            &db,
            &format!("/* nightly */ vacuum main INTO '{}'", target.display()),
        );
        assert_eq!(transactions(&target), 0, "{journal}");
        assert_eq!(number(&open_plain(&target), "SELECT count(*) FROM t"), 1);
        // A second one over it is SQLite's own error.
        let again = format!("VACUUM INTO '{}'", target.display());
        assert!(
            try_exec(&db, &again)
                .unwrap_err()
                .to_string()
                .contains("exists")
        );
        exec(&db, "INSERT INTO t VALUES (2, 2)");
        drop(db);
        assert_level(&path);
        assert!(
            !target
                .with_file_name(format!("{journal}-copy.db-durovfs"))
                .exists()
        );
    }
}

/// Broken, whoever wants the copy protected cannot have it.
#[test]
fn a_target_that_is_asked_for_is_protected() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.db");
    let db = open_watched(&path, OpenFlags::SQLITE_OPEN_FULL_MUTEX);
    exec(
        &db,
        "CREATE TABLE t(a, b); INSERT INTO t VALUES (1, randomblob(5000))",
    );
    let named = dir.path().join("named");
    let copies = [dir.path().join("b.db"), dir.path().join("c.db")];
    let b = format!(
        "file:{}?durovfs_db={}",
        copies[0].display(),
        named.display()
    );
    let c = format!("file:{}?vfs=durovfs", copies[1].display());
    exec(&db, &format!("VACUUM INTO '{b}'; VACUUM INTO '{c}'"));
    assert_eq!(transactions(&named), 1);
    assert_eq!(transactions(&copies[1]), 1);
}

/// Broken, a database that an application makes while a copy is written, or after one failed, is
/// never protected.
#[test]
fn what_else_is_made_is_protected() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.db");
    let db = open_watched(&path, OpenFlags::SQLITE_OPEN_FULL_MUTEX);
    exec(&db, "CREATE TABLE t(a, b)");
    for n in 0..200 {
        exec(
            &db,
            &format!("INSERT INTO t VALUES ({n}, randomblob(30000))"),
        );
    }
    let fresh = |name: &str| {
        let path = dir.path().join(name);
        let other = open_watched(&path, OpenFlags::SQLITE_OPEN_FULL_MUTEX);
        exec(&other, "CREATE TABLE t(a)");
        assert_eq!(transactions(&path), 1, "{name}");
    };
    // Failed before it made anything, and after.
    for sql in [
        "BEGIN; VACUUM INTO 'x'",
        "VACUUM INTO 17",
        "VACUUM INTO '/nowhere/x'",
    ] {
        try_exec(&db, sql).unwrap_err();
        let _ = try_exec(&db, "ROLLBACK");
        fresh(&format!("after {}", sql.len()));
    }
    exec(
        &db,
        &format!("ATTACH '{}' AS o", dir.path().join("o.db").display()),
    );
    exec(&db, "CREATE TABLE o.t(a)");
    assert_eq!(transactions(&dir.path().join("o.db")), 1);
    exec(&db, "DETACH o");
    // One that is prepared, and does not run.
    let prepared = db.prepare("VACUUM INTO 'never'").unwrap();
    exec(
        &db,
        &format!("ATTACH '{}' AS p", dir.path().join("p.db").display()),
    );
    exec(&db, "CREATE TABLE p.t(a)");
    assert_eq!(transactions(&dir.path().join("p.db")), 1);
    exec(&db, "DETACH p");
    drop(prepared);
    // On other threads, while this one copies.
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let made = scope.spawn(|| {
            let mut count = 0;
            while !done.load(Ordering::Relaxed) && count < 60 {
                fresh(&format!("meanwhile {count}"));
                count += 1;
            }
            count
        });
        for n in 0..5 {
            let target = dir.path().join(format!("copy-{n}.db"));
            exec(&db, &format!("VACUUM INTO '{}'", target.display()));
            assert_eq!(transactions(&target), 0);
        }
        done.store(true, Ordering::Relaxed);
        assert!(made.join().unwrap() > 0);
    });
}

/// Broken, the copy that a connection without a mutex makes in a program of several threads is a
/// database of the cluster, or what else it opens is not.
#[test]
fn without_a_mutex_the_target_is_an_ordinary_file_too() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.db");
    let db = open_watched(&path, OpenFlags::SQLITE_OPEN_NO_MUTEX);
    exec(
        &db,
        "CREATE TABLE t(a); INSERT INTO t VALUES (randomblob(9000))",
    );
    let target = dir.path().join("b.db");
    exec(&db, &format!("VACUUM INTO '{}'", target.display()));
    assert_eq!(transactions(&target), 0);
    assert!(!dir.path().join("b.db-durovfs").exists());
    let copy = open_plain(&target);
    assert_eq!(text(&copy, "PRAGMA integrity_check"), "ok");
    assert_eq!(number(&copy, "SELECT length(a) FROM t"), 9000);
    drop(copy);
    let asked = dir.path().join("c.db");
    exec(
        &db,
        &format!("VACUUM INTO 'file:{}?vfs=durovfs'", asked.display()),
    );
    assert_eq!(transactions(&asked), 1);
    let attached = dir.path().join("d.db");
    exec(
        &db,
        &format!("ATTACH '{}' AS d; CREATE TABLE d.t(a)", attached.display()),
    );
    assert_eq!(transactions(&attached), 1);
    // Opened as a database, the copy becomes one.
    exec(&open(&target), "CREATE TABLE u(a)");
    assert_eq!(transactions(&target), 2);
    assert_level(&target);
}

/// Broken, a connection that was closed is looked at: a crash.
#[test]
fn closed_connections_are_forgotten() {
    let dir = tempfile::tempdir().unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let dir = dir.path();
            scope.spawn(move || {
                for round in 0..25 {
                    let path = dir.join(format!("{thread}-{round}.db"));
                    let db = open_watched(&path, OpenFlags::SQLITE_OPEN_FULL_MUTEX);
                    watch(&db, no_result);
                    exec(&db, "CREATE TABLE t(a)");
                    let target = dir.join(format!("{thread}-{round}-copy.db"));
                    exec(&db, &format!("VACUUM INTO '{}'", target.display()));
                    assert_eq!(transactions(&target), 0);
                }
            });
        }
    });
}
