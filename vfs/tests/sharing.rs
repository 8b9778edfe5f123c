//! Several threads and processes on one database at once.

#![allow(clippy::unwrap_used, reason = "what fails in a test fails the test")]

mod common;

use common::model::Fault;
use common::*;
use libsqlite3_sys as sqlite;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;

/// Broken, threads with a connection each overtake each other at the gate.
#[test]
fn threads_write_at_once_through_connections_of_their_own() {
    for journal in ["WAL", "TRUNCATE"] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        let db = open(&path);
        exec(
            &db,
            &format!("PRAGMA journal_mode={journal}; CREATE TABLE t(a, b)"),
        );
        let (threads, commits) = (4, 15);
        let write = |thread: i64| {
            let db = open(&path);
            db.busy_timeout(Duration::from_secs(60)).unwrap();
            exec(&db, "PRAGMA wal_autocheckpoint=7; PRAGMA cache_size=10");
            for n in 0..commits {
                let rows = if n % 5 == 0 { 40 } else { 1 };
                exec(
                    &db,
                    &format!(
                        "BEGIN IMMEDIATE; WITH n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n \
                         WHERE i<{rows}) INSERT INTO t SELECT {thread}, randomblob(500) FROM n; \
                         COMMIT"
                    ),
                );
            }
        };
        std::thread::scope(|scope| {
            for thread in 0..threads {
                scope.spawn(move || write(thread));
            }
        });
        let rows = threads * (3 * 40 + commits - 3);
        assert_eq!(number(&db, "SELECT count(*) FROM t"), rows, "{journal}");
        drop(db);
        assert_level(&path);
    }
}

/// Broken, who opens a database while others open it, write and close it takes their commits for
/// somebody's without durovfs: the log was asked for its end before they made them.
#[test]
fn a_commit_between_the_answer_and_the_lock_is_no_foreign_one() {
    for place in ["plain", "keep-local"] {
        let dir = tempfile::Builder::new().prefix(place).tempdir().unwrap();
        let path = dir.path().join("a.db");
        let name = path.to_str().unwrap();
        for wal in [true, false] {
            let db = if wal { open_wal(&path) } else { open(&path) };
            exec(&db, "CREATE TABLE IF NOT EXISTS t(a)");
            drop(db);
            let lsn = sink().last_lsn(name);
            let other = path.clone();
            sink().after_open(move || exec(&open(&other), "INSERT INTO t VALUES (1)"));
            let db = open(&path);
            // Taken for foreign, it would be refused; or be the log's next transaction once more.
            assert_eq!(sink().last_lsn(name), lsn + 1);
            exec(&db, "INSERT INTO t VALUES (2)");
            drop(db);
            assert_eq!(sink().last_lsn(name), lsn + 2);
            assert_level(&path);
        }
    }
}

/// Broken, connections that change the journal mode to and fro and close the database take each
/// other's commits for somebody's without durovfs. SQLite's `walthread.test` does the same for
/// longer.
#[test]
fn the_journal_mode_changes_while_others_write() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.db");
    exec(
        &open(&path),
        "CREATE TABLE t(a INTEGER PRIMARY KEY, b UNIQUE)",
    );
    let (threads, rounds) = (4, 30);
    let work = |mode: &str| {
        for _ in 0..rounds {
            let db = open(&path);
            db.busy_timeout(Duration::from_secs(60)).unwrap();
            assert!(number(&db, "SELECT count(*) FROM sqlite_schema") > 0);
            if let Err(error) = try_exec(&db, &format!("PRAGMA journal_mode={mode}")) {
                assert_eq!(code(&error) & 0xff, sqlite::SQLITE_BUSY, "{error}");
            }
            exec(
                &db,
                "BEGIN; INSERT INTO t(b) VALUES (randomblob(100)); COMMIT",
            );
        }
    };
    std::thread::scope(|scope| {
        for thread in 0..threads {
            scope.spawn(move || work(["WAL", "DELETE"][thread % 2]));
        }
    });
    let db = open(&path);
    let rows = i64::try_from(threads * rounds).unwrap();
    assert_eq!(number(&db, "SELECT count(*) FROM t"), rows);
    drop(db);
    assert_level(&path);
}

/// Broken, a commit that waits for the quorum makes readers wait with it, shows them what is not
/// committed, or gives a checkpoint what the log may never have.
#[test]
fn readers_go_on_while_a_commit_is_held() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.db");
    let name = path.to_str().unwrap();
    let db = open_wal(&path);
    exec(&db, "CREATE TABLE t(a); INSERT INTO t VALUES (1)");
    let other = open(&path);
    other.busy_timeout(Duration::ZERO).unwrap();
    sink().fault(name, &[Fault::Wait]);
    let committing = std::thread::spawn(move || {
        exec(&db, "INSERT INTO t VALUES (2)");
        db
    });
    sink().wait_for_commit();
    assert_eq!(number(&other, "SELECT count(*) FROM t"), 1);
    let fresh = open(&path);
    assert_eq!(number(&fresh, "SELECT count(*) FROM t"), 1);
    // As any process reads the files that are on disk.
    let copy = dir.path().join("copy.db");
    for suffix in ["", "-wal"] {
        let from = format!("{name}{suffix}");
        let to = format!("{}{suffix}", copy.display());
        assert!(
            Command::new("cp")
                .args([from, to])
                .status()
                .unwrap()
                .success()
        );
    }
    assert_eq!(number(&open_plain(&copy), "SELECT count(*) FROM t"), 1);
    let busy = try_exec(&other, "INSERT INTO t VALUES (3)").unwrap_err();
    assert_eq!(code(&busy) & 0xff, sqlite::SQLITE_BUSY);
    assert_eq!(number(&other, "PRAGMA wal_checkpoint(PASSIVE)"), 0);
    assert_eq!(number(&other, "PRAGMA wal_checkpoint(FULL)"), 1);
    assert_eq!(number(&open_plain(&copy), "SELECT count(*) FROM t"), 1);
    sink().let_go();
    let db = committing.join().unwrap();
    assert_eq!(number(&other, "SELECT count(*) FROM t"), 2);
    exec(&other, "INSERT INTO t VALUES (3)");
    drop((db, other, fresh));
    assert_level(&path);
}

/// The process that is killed in the middle of a transaction. Does nothing when it is run as a
/// test.
#[test]
fn transaction_child() {
    let Ok(path) = std::env::var("DUROVFS_TRANSACTION_PATH") else {
        return;
    };
    let db = match std::env::var_os("DUROVFS_TRANSACTION_PLAIN") {
        Some(_) => open_plain(Path::new(&path)),
        None => open(Path::new(&path)),
    };
    if let Ok(journal) = std::env::var("DUROVFS_TRANSACTION_JOURNAL") {
        exec(&db, &format!("PRAGMA journal_mode={journal}"));
    }
    exec(
        &db,
        "PRAGMA cache_size=5; PRAGMA cache_spill=1; BEGIN IMMEDIATE; UPDATE t SET b = 0; \
         WITH n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i<500) \
         INSERT INTO t SELECT -1, randomblob(900) FROM n",
    );
    std::fs::write(format!("{path}.ready"), "").unwrap();
    std::thread::sleep(Duration::from_secs(600));
}

fn spawn_transaction(path: &Path) -> Child {
    spawn_transaction_with(path, &[])
}

fn spawn_transaction_with(path: &Path, environment: &[(&str, &str)]) -> Child {
    let ready = PathBuf::from(format!("{}.ready", path.display()));
    let _ = std::fs::remove_file(&ready);
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["transaction_child", "--exact"])
        .env("DUROVFS_TRANSACTION_PATH", path)
        .envs(environment.iter().copied())
        .spawn()
        .unwrap();
    while !ready.exists() {
        std::thread::sleep(Duration::from_millis(2));
    }
    child
}

/// Broken, a process that dies with the write lock, pages of its transaction written already,
/// leaves its lock, its pages, or a database that the others cannot write.
#[test]
fn others_go_on_when_the_writer_is_killed() {
    for journal in ["WAL", "DELETE", "PERSIST"] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        let db = open(&path);
        exec(
            &db,
            &format!("PRAGMA journal_mode={journal}; CREATE TABLE t(a, b)"),
        );
        exec(
            &db,
            "WITH n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i<50) \
             INSERT INTO t SELECT i, randomblob(900) FROM n",
        );
        for round in 1..=3 {
            let mut child = spawn_transaction(&path);
            db.busy_timeout(Duration::ZERO).unwrap();
            let busy = try_exec(&db, "INSERT INTO t VALUES (1, 1)").unwrap_err();
            assert_eq!(code(&busy) & 0xff, sqlite::SQLITE_BUSY, "{journal}");
            child.kill().unwrap();
            child.wait().unwrap();
            let sum = number(&db, "SELECT count(*) FROM t WHERE a > 0 AND length(b) > 1");
            assert_eq!(sum, 50, "{journal} {round}");
            exec(&db, "INSERT INTO t VALUES (0, 1)");
            let other = open(&path);
            exec(&other, "INSERT INTO t VALUES (0, 2)");
            assert_eq!(
                number(&db, "SELECT count(*) FROM t"),
                50 + 2 * round,
                "{journal}"
            );
        }
        drop(db);
        assert_level(&path);
    }
}

fn with_rows(path: &Path) -> rusqlite::Connection {
    let db = open(path);
    exec(
        &db,
        "PRAGMA journal_mode=DELETE; CREATE TABLE t(a, b); \
         WITH n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i<50) \
         INSERT INTO t SELECT i, randomblob(900) FROM n",
    );
    db
}

/// Broken, the journal that a process without durovfs left behind is played back past the log, or
/// what it put right is taken for somebody's write.
#[test]
fn a_foreign_journal_is_played_back_and_nothing_is_foreign() {
    for is_open in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        let mut db = Some(with_rows(&path)).filter(|_| is_open);
        let before = sink().last_lsn(path.to_str().unwrap());
        let mut child = spawn_transaction_with(&path, &[("DUROVFS_TRANSACTION_PLAIN", "1")]);
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(dir.path().join("a.db-journal").exists());
        let db = db.take().unwrap_or_else(|| open(&path));
        assert_eq!(number(&db, "SELECT sum(length(b)) FROM t"), 50 * 900);
        assert_eq!(sink().last_lsn(path.to_str().unwrap()), before);
        exec(&db, "INSERT INTO t VALUES (0, 1)");
        drop(db);
        assert_level(&path);
    }
}

/// Broken, a file that a crash left half written, with its journal in the memory of who died, is
/// taken for the log's, or cannot be had back from it.
#[test]
fn a_crash_without_a_journal_on_disk_is_refused_and_the_log_has_all() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.db");
    let db = with_rows(&path);
    let mut child = spawn_transaction_with(&path, &[("DUROVFS_TRANSACTION_JOURNAL", "MEMORY")]);
    child.kill().unwrap();
    child.wait().unwrap();
    try_exec(&db, "INSERT INTO t VALUES (0, 1)").unwrap_err();
    drop(db);
    assert!(try_open(&path).is_err());
    let line = durovfs_vfs::shim::last_open_refusal();
    assert!(line.contains("durovfs resolve"), "{line}");
    // What `--keep log` does, the copy that it saves left aside.
    std::fs::write(&path, "").unwrap();
    let db = open(&path);
    assert_eq!(number(&db, "SELECT sum(length(b)) FROM t"), 50 * 900);
    exec(&db, "INSERT INTO t VALUES (0, 1)");
    drop(db);
    assert_level(&path);
}

/// Writes the beginning of a file that this process has open, without opening it here.
fn put_back(path: &Path, bytes: &[u8]) {
    let mut dd = Command::new("dd")
        .arg(format!("of={}", path.display()))
        .args(["conv=notrunc", "status=none"])
        .stdin(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    std::io::Write::write_all(&mut dd.stdin.take().unwrap(), bytes).unwrap();
    assert!(dd.wait().unwrap().success());
}

/// Broken, a process that is killed between its commit and the wal-index leaves a database in which
/// nobody can write, or whose next writer overwrites that commit.
#[test]
fn a_commit_that_the_wal_index_lacks_is_found() {
    // Both copies of the header, and what is known of checkpoints.
    const INDEX_HEADER_BYTES: usize = 136;
    let beginnings = [
        "the first WAL",
        "INSERT INTO t VALUES (0)",
        "PRAGMA wal_checkpoint(TRUNCATE)",
        "PRAGMA wal_checkpoint(RESTART); INSERT INTO t VALUES (0)",
    ];
    for beginning in beginnings {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        exec(&open(&path), "CREATE TABLE t(a)");
        let dying = open_wal(&path);
        if beginning != "the first WAL" {
            exec(&dying, "INSERT INTO t VALUES (0)");
            text(&dying, "SELECT group_concat(a) FROM t");
            exec(&dying, beginning);
        }
        let db = open(&path);
        let before = number(&db, "SELECT count(*) FROM t");
        let index = PathBuf::from(format!("{}-shm", path.display()));
        let bytes = std::process::Command::new("cat")
            .arg(&index)
            .output()
            .unwrap()
            .stdout;
        exec(&dying, "INSERT INTO t VALUES (1)");
        put_back(&index, &bytes[..INDEX_HEADER_BYTES]);
        assert_eq!(number(&db, "SELECT count(*) FROM t"), before, "{beginning}");
        exec(&db, "INSERT INTO t VALUES (3)");
        assert_eq!(
            number(&db, "SELECT count(*) FROM t"),
            before + 2,
            "{beginning}"
        );
        drop((db, dying));
        assert_level(&path);
    }
}
