//! What `durovfs resolve` leaves to the next open, and crashes in between.

#![allow(clippy::unwrap_used, reason = "what fails in a test fails the test")]

mod common;

use common::model::{Fault, id_of};
use common::*;
use durovfs_wire::resolution::{RESOLUTION_SUFFIX, Resolution};
use durovfs_wire::{Epoch, LogPosition, Lsn};
use libsqlite3_sys as sqlite;
use std::path::{Path, PathBuf};
use std::process::Command;

fn beside(path: &Path, suffix: &str) -> PathBuf {
    PathBuf::from(format!("{}{suffix}", path.display()))
}

/// As `durovfs resolve --keep local` writes it.
fn keep_local(path: &Path, lsn: u64) {
    let resolution = Resolution {
        database: id_of(path.to_str().unwrap()),
        given_up: LogPosition::new(Epoch::new(u32::from(lsn > 0)), Lsn::new(lsn)),
    };
    std::fs::write(beside(path, RESOLUTION_SUFFIX), resolution.encode()).unwrap();
}

/// A database that was written without durovfs: a row in the log, and two in the file. The last
/// stands in its WAL when `mode` is WAL.
fn parted(path: &Path, mode: &str) {
    let db = open(path);
    exec(
        &db,
        &format!("PRAGMA journal_mode={mode}; CREATE TABLE t(a, b)"),
    );
    exec(&db, "INSERT INTO t VALUES (1, randomblob(20000))");
    drop(db);
    let plain = open_plain(path);
    exec(
        &plain,
        "PRAGMA wal_autocheckpoint=0; INSERT INTO t VALUES (2, randomblob(9000))",
    );
    let copy = beside(path, ".copy");
    for suffix in ["", "-wal"] {
        let _ = std::fs::copy(beside(path, suffix), beside(&copy, suffix));
    }
    drop(plain);
    // As after a crash: the WAL is there.
    for suffix in ["", "-wal"] {
        let _ = std::fs::copy(beside(&copy, suffix), beside(path, suffix));
        let _ = std::fs::remove_file(beside(&copy, suffix));
    }
    let error = try_open(path).unwrap_err();
    assert_eq!(code(&error) & 0xff, sqlite::SQLITE_CANTOPEN);
}

fn assert_kept(path: &Path, lsn: u64) {
    let name = path.to_str().unwrap();
    let db = open(path);
    assert_eq!(number(&db, "SELECT count(*) FROM t"), 2);
    assert_eq!(sink().last_lsn(name), lsn);
    sink().with_log(name, |log| {
        let last = log.entries.last().unwrap();
        assert!(last.commit.whole_image);
    });
    assert!(!beside(path, RESOLUTION_SUFFIX).exists());
    exec(&db, "INSERT INTO t VALUES (3, 3)");
    drop(db);
    assert_level(path);
    assert_eq!(number(&open(path), "SELECT count(*) FROM t"), 3);
}

/// Broken, what a person decided to keep is lost, or is in no log.
#[test]
fn a_local_file_that_is_kept_becomes_the_next_transaction() {
    for mode in ["WAL", "DELETE"] {
        for mark in ["there", "gone", "damaged"] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("a.db");
            parted(&path, mode);
            let lsn = sink().last_lsn(path.to_str().unwrap());
            match mark {
                "gone" => std::fs::remove_file(beside(&path, "-durovfs")).unwrap(),
                "damaged" => std::fs::write(beside(&path, "-durovfs"), vec![7; 20000]).unwrap(),
                _ => {}
            }
            keep_local(&path, lsn);
            assert_kept(&path, lsn + 1);
        }
    }
}

/// Broken, a decision about one version throws away another, that nobody has seen.
#[test]
fn a_log_that_went_on_is_not_given_up() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.db");
    let name = path.to_str().unwrap();
    parted(&path, "WAL");
    let lsn = sink().last_lsn(name);
    let (number, image) = sink().with_log(name, |log| {
        let (number, image) = log.image.last_key_value().unwrap();
        (*number, image.clone())
    });
    keep_local(&path, lsn);
    sink().commit_elsewhere(name, &[(number, image)].into_iter().collect());
    let before = std::fs::read(&path).unwrap();
    for _ in 0..2 {
        try_open(&path).unwrap_err();
        let line = durovfs_vfs::shim::last_open_refusal();
        for word in [format!("lsn {lsn} "), format!("lsn {} ", lsn + 1)] {
            assert!(line.contains(&word), "{line}");
        }
    }
    assert_eq!(std::fs::read(&path).unwrap(), before);
    std::fs::write(beside(&path, RESOLUTION_SUFFIX), "torn").unwrap();
    try_open(&path).unwrap_err();
    keep_local(&path, lsn + 1);
    assert_kept(&path, lsn + 2);
}

/// Broken, a refused or unanswered commit of the kept file loses it, or the decision.
#[test]
fn a_decision_stands_until_it_is_carried_out() {
    for fault in [
        Fault::Refuse,
        Fault::UnknownLost,
        Fault::UnknownCommitted,
        Fault::NotPrimary,
    ] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        let name = path.to_str().unwrap();
        parted(&path, "WAL");
        let lsn = sink().last_lsn(name);
        keep_local(&path, lsn);
        sink().fault(name, &[fault]);
        try_open(&path).unwrap_err();
        assert_kept(&path, lsn + 1);
    }
}

/// The process that dies while it carries a decision out. Does nothing when it is run as a test.
#[test]
fn resolving_child() {
    let Ok(path) = std::env::var("DUROVFS_RESOLVING_PATH") else {
        return;
    };
    let fault = match std::env::var("DUROVFS_RESOLVING_FAULT").unwrap().as_str() {
        "commit" => Fault::CommitAndDie,
        _ => Fault::Die,
    };
    sink().fault(&path, &[fault]);
    let _ = try_open(Path::new(&path));
}

/// Broken, kill -9 while the kept file is sent, or after the log has it, leaves a database that
/// nobody can open, or one that the log has twice.
#[test]
fn a_crash_while_it_is_carried_out_leaves_it_to_the_next_open() {
    for mode in ["WAL", "DELETE"] {
        for fault in ["die", "commit"] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("a.db");
            parted(&path, mode);
            let lsn = sink().last_lsn(path.to_str().unwrap());
            keep_local(&path, lsn);
            let status = Command::new(std::env::current_exe().unwrap())
                .args(["resolving_child", "--exact"])
                .env("DUROVFS_RESOLVING_PATH", &path)
                .env("DUROVFS_RESOLVING_FAULT", fault)
                .stderr(std::process::Stdio::null())
                .status()
                .unwrap();
            assert!(!status.success());
            assert!(beside(&path, RESOLUTION_SUFFIX).exists());
            assert_kept(&path, lsn + 1);
        }
    }
}

/// Broken, a file that was emptied so that the log counts is not written from the log.
#[test]
fn an_emptied_file_is_written_from_the_log() {
    for mode in ["WAL", "DELETE"] {
        for mark in [true, false] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("a.db");
            parted(&path, mode);
            let lsn = sink().last_lsn(path.to_str().unwrap());
            let _ = std::fs::remove_file(beside(&path, "-wal"));
            std::fs::write(&path, "").unwrap();
            if !mark {
                std::fs::remove_file(beside(&path, "-durovfs")).unwrap();
            }
            let db = open(&path);
            assert_eq!(number(&db, "SELECT count(*) FROM t"), 1);
            assert_eq!(sink().last_lsn(path.to_str().unwrap()), lsn);
            drop(db);
            assert_level(&path);
        }
    }
}

/// Broken, a file from which a WAL was taken away is written in rollback mode, on top of commits
/// that it lacks.
#[test]
fn a_file_without_its_wal_takes_no_commit_in_rollback_mode() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.db");
    let name = path.to_str().unwrap();
    let db = open_wal(&path);
    exec(&db, "CREATE TABLE t(a, b); INSERT INTO t VALUES (1, 1)");
    let lsn = sink().last_lsn(name);
    let mark = std::fs::read(beside(&path, "-durovfs")).unwrap();
    drop(db);
    let joined = open(&path);
    // The mark knows of a WAL, and somebody emptied the file, before `joined` reads any of it.
    std::fs::write(beside(&path, "-durovfs"), mark).unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(0).unwrap();
    drop(file);
    let error = try_exec(&joined, "CREATE TABLE u(a)").unwrap_err();
    assert_eq!(code(&error), sqlite::SQLITE_IOERR_WRITE);
    assert_eq!(sink().last_lsn(name), lsn);
}
