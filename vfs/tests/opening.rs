//! Every row of the table of what a local file and a log can be to each other when a database is
//! opened, and crashes in between.

#![allow(clippy::unwrap_used, reason = "what fails in a test fails the test")]

mod common;

use common::model::Fault;
use common::*;
use libsqlite3_sys as sqlite;
use std::path::{Path, PathBuf};
use std::process::Command;

fn files(path: &Path) -> Vec<PathBuf> {
    let suffixes = ["", "-wal", "-shm", "-journal", "-durovfs"];
    suffixes
        .iter()
        .map(|suffix| PathBuf::from(format!("{}{suffix}", path.display())))
        .collect()
}

fn filled(path: &Path) {
    let db = open_wal(path);
    exec(
        &db,
        "CREATE TABLE t(a, b); INSERT INTO t VALUES (1, randomblob(9000))",
    );
    exec(
        &db,
        "WITH n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i<200) \
               INSERT INTO t SELECT i, randomblob(100) FROM n",
    );
}

/// Broken, an application with data cannot start to use durovfs, or loses what is in its WAL.
#[test]
fn an_existing_database_is_adopted_with_what_its_wal_holds() {
    for page_size in [512, 4096, 65536] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        let plain = open_plain(&path);
        exec(
            &plain,
            &format!("PRAGMA page_size={page_size}; PRAGMA journal_mode=WAL"),
        );
        exec(
            &plain,
            "CREATE TABLE t(a); INSERT INTO t VALUES (randomblob(100000))",
        );
        exec(&plain, "PRAGMA wal_checkpoint(TRUNCATE)");
        exec(&plain, "INSERT INTO t VALUES (5)");
        // A copy with the WAL as it stands: as after a crash.
        let copy = dir.path().join("b.db");
        for (from, to) in files(&path).iter().zip(files(&copy)).take(2) {
            std::fs::copy(from, to).unwrap();
        }
        let db = open(&copy);
        assert_eq!(number(&db, "SELECT count(*) FROM t"), 2);
        assert_eq!(sink().last_lsn(copy.to_str().unwrap()), 1);
        exec(&db, "INSERT INTO t VALUES (6)");
        drop(db);
        assert_level(&copy);
    }
}

/// Broken, a database whose file was lost cannot be brought back by opening it.
#[test]
fn a_lost_file_is_written_from_the_log() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.db");
    filled(&path);
    for keep_mark in [true, false] {
        for file in files(&path) {
            if !(keep_mark && file.to_str().unwrap().ends_with("-durovfs")) {
                let _ = std::fs::remove_file(file);
            }
        }
        let db = open(&path);
        assert_eq!(number(&db, "SELECT count(*) FROM t"), 201);
        exec(
            &db,
            "INSERT INTO t VALUES (1, 2); DELETE FROM t WHERE b = 2",
        );
        drop(db);
        assert_level(&path);
    }
}

/// Broken, an old copy of a database is taken for the newest, or a newer one is thrown away.
#[test]
fn an_older_file_rolls_forward_and_a_different_one_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.db");
    filled(&path);
    let old = std::fs::read(&path).unwrap();
    let old_mark = std::fs::read(&files(&path)[4]).unwrap();
    let db = open(&path);
    exec(
        &db,
        "UPDATE t SET b = randomblob(50) WHERE a % 3 = 0; CREATE TABLE u(x)",
    );
    drop(db);
    // With its mark, without one, and with the newer one.
    for mark in [
        Some(old_mark),
        None,
        Some(std::fs::read(&files(&path)[4]).unwrap()),
    ] {
        std::fs::write(&path, &old).unwrap();
        match mark {
            Some(mark) => std::fs::write(&files(&path)[4], mark).unwrap(),
            None => std::fs::remove_file(&files(&path)[4]).unwrap(),
        }
        let db = open(&path);
        assert_eq!(number(&db, "SELECT count(*) FROM u"), 0);
        drop(db);
        assert_level(&path);
    }
    let plain = open_plain(&path);
    exec(&plain, "INSERT INTO u VALUES (1)");
    drop(plain);
    let before = std::fs::read(&path).unwrap();
    let error = try_open(&path).unwrap_err();
    assert_eq!(code(&error) & 0xff, sqlite::SQLITE_CANTOPEN);
    let line = durovfs_vfs::shim::last_open_refusal();
    assert!(
        line.contains("lsn 6") && line.contains("durovfs resolve"),
        "{line}"
    );
    assert_eq!(std::fs::read(&path).unwrap(), before);
}

/// Broken, an application that looks whether a file is a database gets another error than from
/// plain SQLite; or a database whose file was overwritten is begun anew, and its log with it.
#[test]
fn a_file_that_is_no_database_is_refused_by_sqlite_itself() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.txt");
    for text in [&b"no database"[..], &[7; 5000]] {
        std::fs::write(&path, text).unwrap();
        let db = open(&path);
        for sql in ["SELECT * FROM sqlite_schema", "CREATE TABLE t(a)"] {
            let error = try_exec(&db, sql).unwrap_err();
            assert_eq!(code(&error), sqlite::SQLITE_NOTADB, "{sql}");
        }
        drop(db);
        assert_eq!(std::fs::read(&path).unwrap(), text);
        assert_eq!(sink().last_lsn(path.to_str().unwrap()), 0);
    }
    let path = dir.path().join("a.db");
    filled(&path);
    std::fs::write(&path, [7; 5000]).unwrap();
    let error = try_open(&path).unwrap_err();
    assert_eq!(code(&error) & 0xff, sqlite::SQLITE_CANTOPEN);
}

/// Broken, a write by a process without durovfs, while the database is open, ends up under commits
/// that the log believes to stand on something else.
#[test]
fn a_foreign_write_is_refused_at_the_next_write() {
    for checkpoint in [
        "",
        "PRAGMA wal_checkpoint(TRUNCATE)",
        "PRAGMA wal_checkpoint(RESTART)",
    ] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        let db = open_wal(&path);
        exec(&db, "CREATE TABLE t(a)");
        let lsn = sink().last_lsn(path.to_str().unwrap());
        let plain = open_plain(&path);
        std::thread::sleep(std::time::Duration::from_millis(20));
        exec(&plain, "INSERT INTO t VALUES (1)");
        if !checkpoint.is_empty() {
            exec(&plain, checkpoint);
        }
        let error = try_exec(&db, "INSERT INTO t VALUES (2)").unwrap_err();
        assert_eq!(code(&error), sqlite::SQLITE_IOERR_WRITE, "{checkpoint}");
        assert_eq!(sink().last_lsn(path.to_str().unwrap()), lsn);
        drop((db, plain));
        assert_eq!(
            code(&try_open(&path).unwrap_err()) & 0xff,
            sqlite::SQLITE_CANTOPEN
        );
    }
}

/// Broken, what somebody wrote without durovfs is moved into the database file by a checkpoint of
/// ours, and is taken for ours from then on.
#[test]
fn a_checkpoint_of_ours_makes_no_foreign_write_ours() {
    for checkpoint in ["SELECT 1", "TRUNCATE", "RESTART", "PASSIVE"] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        let db = open_wal(&path);
        exec(&db, "CREATE TABLE t(a); INSERT INTO t VALUES (1)");
        let lsn = sink().last_lsn(path.to_str().unwrap());
        exec(&open_plain(&path), "INSERT INTO t VALUES (2)");
        if checkpoint != "SELECT 1" {
            exec(&db, &format!("PRAGMA wal_checkpoint({checkpoint})"));
            try_exec(&db, "INSERT INTO t VALUES (3)").unwrap_err();
        }
        // The last to close.
        drop(db);
        for _ in 0..2 {
            let error = try_open(&path).unwrap_err();
            assert_eq!(code(&error) & 0xff, sqlite::SQLITE_CANTOPEN, "{checkpoint}");
        }
        assert_eq!(sink().last_lsn(path.to_str().unwrap()), lsn);
        assert_eq!(number(&open_plain(&path), "SELECT sum(a) FROM t"), 3);
    }
}

/// Broken, an application that opens a database which others have open reads what somebody wrote
/// there without durovfs, and is told nothing.
#[test]
fn a_foreign_write_is_refused_at_an_open_that_joins() {
    for restarted in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        let name = path.to_str().unwrap();
        let db = open_wal(&path);
        exec(&db, "CREATE TABLE t(a); INSERT INTO t VALUES (1)");
        let plain = open_plain(&path);
        if restarted {
            exec(&plain, "PRAGMA wal_checkpoint(RESTART)");
        }
        exec(&plain, "BEGIN IMMEDIATE; ROLLBACK");
        drop(open(&path));
        exec(&plain, "INSERT INTO t VALUES (2)");
        for _ in 0..2 {
            let error = try_open(&path).unwrap_err();
            assert_eq!(code(&error) & 0xff, sqlite::SQLITE_CANTOPEN);
            let line = durovfs_vfs::shim::last_open_refusal();
            let lsn = format!("lsn {} ", sink().last_lsn(name));
            assert!(
                line.contains(&lsn) && line.contains("durovfs resolve"),
                "{line}"
            );
        }
        try_exec(&db, "INSERT INTO t VALUES (3)").unwrap_err();
    }
}

/// Broken, a checkpoint by a process without durovfs, which changes nothing, locks users out.
#[test]
fn a_foreign_checkpoint_is_no_foreign_write() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.db");
    let db = open_wal(&path);
    exec(&db, "CREATE TABLE t(a); INSERT INTO t VALUES (1)");
    let plain = open_plain(&path);
    exec(&plain, "PRAGMA wal_checkpoint(TRUNCATE)");
    drop(plain);
    exec(&db, "INSERT INTO t VALUES (2)");
    drop(db);
    assert_level(&path);
    let plain = open_plain(&path);
    exec(&plain, "PRAGMA wal_checkpoint(TRUNCATE); SELECT * FROM t");
    drop(plain);
    let db = open(&path);
    exec(&db, "INSERT INTO t VALUES (3)");
    drop(db);
    assert_level(&path);
}

/// Broken, a commit of another host is overwritten, or the connection never gets past it.
#[test]
fn a_log_that_moved_on_is_followed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.db");
    let name = path.to_str().unwrap();
    let db = open_wal(&path);
    let reader = open(&path);
    exec(&db, "CREATE TABLE t(a); INSERT INTO t VALUES (1)");
    for round in 0..3 {
        if round == 1 {
            exec(&db, "PRAGMA wal_checkpoint(RESTART)");
        }
        if round == 2 {
            exec(&db, "PRAGMA wal_checkpoint(TRUNCATE)");
        }
        exec(&reader, "BEGIN; SELECT * FROM t");
        let page = sink().with_log(name, |log| log.image.last_key_value().unwrap().1.clone());
        let last = sink().with_log(name, |log| *log.image.last_key_value().unwrap().0);
        let mut changed = page.clone();
        // A free byte of the leaf page: the content is another, the rows are the same.
        changed[200 + round] ^= 0x55;
        sink().commit_elsewhere(name, &[(last, changed)].into_iter().collect());
        let lsn = sink().last_lsn(name);
        let error = try_exec(&db, "INSERT INTO t VALUES (2)").unwrap_err();
        assert_eq!(code(&error), sqlite::SQLITE_IOERR_WRITE);
        exec(&reader, "COMMIT");
        exec(&db, "INSERT INTO t VALUES (2)");
        assert_eq!(sink().last_lsn(name), lsn + 1);
        assert_eq!(number(&reader, "SELECT count(*) FROM t"), round as i64 + 2);
    }
    drop((db, reader));
    assert_level(&path);
}

/// Broken, a crash right after the local write, before the mark says so, makes the database one
/// that no longer opens, or one that takes the commit twice.
#[test]
fn a_mark_that_lags_behind_its_file_is_put_right() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.db");
    let files = files(&path);
    filled(&path);
    let grow = "WITH n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i<300) \
                INSERT INTO t SELECT i, randomblob(400) FROM n";
    let steps = [
        "INSERT INTO t VALUES (1, 1)",
        grow,
        "DELETE FROM t WHERE a > 5",
        "VACUUM",
    ];
    for (round, sql) in steps.into_iter().enumerate() {
        let db = open(&path);
        exec(&db, "INSERT INTO t VALUES (0, 0)");
        let mark = std::fs::read(&files[4]).unwrap();
        exec(&db, sql);
        let (file, wal) = (
            std::fs::read(&path).unwrap(),
            std::fs::read(&files[1]).unwrap(),
        );
        let mut table = std::fs::read(&files[4]).unwrap();
        let lsn = sink().last_lsn(path.to_str().unwrap());
        drop(db);
        std::fs::write(&path, file).unwrap();
        std::fs::write(&files[1], wal).unwrap();
        // The slots are of the commit before; the page table in odd rounds is of this one.
        table[..8192].copy_from_slice(&mark[..8192]);
        std::fs::write(&files[4], if round % 2 == 0 { mark } else { table }).unwrap();
        let db = open(&path);
        assert_eq!(sink().last_lsn(path.to_str().unwrap()), lsn, "{sql}");
        exec(&db, "INSERT INTO t VALUES (2, 2)");
        drop(db);
        assert_level(&path);
    }
}

/// Broken, a database with a page of zeros that a transaction wrote is refused after a loss of
/// power that took the mark, or its newest part.
#[test]
fn a_page_of_zeros_is_known_without_its_mark() {
    for keep_mark in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        let mark = &files(&path)[4];
        let db = open_wal(&path);
        exec(&db, "CREATE TABLE t(a); INSERT INTO t VALUES (1)");
        drop(db);
        let old_mark = std::fs::read(mark).unwrap();
        let db = open(&path);
        // The last page of such a value has neither content nor a successor.
        exec(&db, "INSERT INTO t VALUES (zeroblob(20000))");
        drop(db);
        let image = std::fs::read(&path).unwrap();
        assert!(
            image
                .chunks(4096)
                .any(|page| page.iter().all(|byte| *byte == 0))
        );
        if keep_mark {
            std::fs::write(mark, old_mark).unwrap();
        } else {
            std::fs::remove_file(mark).unwrap();
        }
        let db = open(&path);
        exec(&db, "INSERT INTO t VALUES (3)");
        assert_eq!(number(&db, "SELECT count(*) FROM t"), 3);
    }
}

/// Broken, a database that cannot reach its log opens all the same, or blocks for ever.
#[test]
fn without_a_sidecar_nothing_opens() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.db");
    filled(&path);
    sink().set_unreachable(path.to_str().unwrap(), true);
    assert_eq!(
        code(&try_open(&path).unwrap_err()) & 0xff,
        sqlite::SQLITE_CANTOPEN
    );
    sink().set_unreachable(path.to_str().unwrap(), false);
    drop(open(&path));
    assert_level(&path);
}

/// The process that the crash tests kill. Does nothing when it is run as a test.
#[test]
fn crash_child() {
    let Ok(path) = std::env::var("DUROVFS_CRASH_PATH") else {
        return;
    };
    let sql = std::env::var("DUROVFS_CRASH_SQL").unwrap();
    let fault = match std::env::var("DUROVFS_CRASH_FAULT").unwrap().as_str() {
        "commit" => Fault::CommitAndDie,
        _ => Fault::Die,
    };
    let after: usize = std::env::var("DUROVFS_CRASH_AFTER")
        .unwrap()
        .parse()
        .unwrap();
    let path = PathBuf::from(path);
    let mut faults = vec![Fault::None; after];
    faults.push(fault);
    let db = open(&path);
    sink().fault(path.to_str().unwrap(), &faults);
    exec(&db, "PRAGMA cache_size=10");
    exec(&db, &sql);
    panic!("not killed");
}

fn crash(path: &Path, fault: &str, after: usize, sql: &str) {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["crash_child", "--exact", "--nocapture"])
        .env("DUROVFS_CRASH_PATH", path)
        .env("DUROVFS_CRASH_SQL", sql)
        .env("DUROVFS_CRASH_FAULT", fault)
        .env("DUROVFS_CRASH_AFTER", after.to_string())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    use std::os::unix::process::ExitStatusExt;
    assert_eq!(output.status.signal(), Some(6), "{text}");
}

/// Broken, a crash between the quorum's acknowledgement and the local write loses an acknowledged
/// commit, or one before it was sent brings it to life.
#[test]
fn a_crash_at_the_gate_leaves_what_the_log_has() {
    let spilled = "WITH n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i<500) \
                   INSERT INTO t SELECT i, randomblob(500) FROM n";
    for journal in ["WAL", "DELETE", "TRUNCATE", "PERSIST"] {
        for sql in ["INSERT INTO t VALUES (1, 2)", spilled] {
            for (fault, rows) in [("commit", true), ("die", false)] {
                let dir = tempfile::tempdir().unwrap();
                let path = dir.path().join("a.db");
                let db = open(&path);
                exec(
                    &db,
                    &format!("PRAGMA journal_mode={journal}; CREATE TABLE t(a, b)"),
                );
                exec(&db, "INSERT INTO t VALUES (0, 0)");
                drop(db);
                let sql = format!("PRAGMA journal_mode={journal}; {sql}");
                crash(&path, fault, 0, &sql);
                let db = open(&path);
                let what = format!("{journal} {fault} {sql}");
                assert_eq!(number(&db, "SELECT count(*) FROM t") > 1, rows, "{what}");
                exec(&db, "INSERT INTO t VALUES (3, 4)");
                assert_eq!(text(&db, "PRAGMA integrity_check"), "ok", "{what}");
                drop(db);
                assert_level(&path);
            }
        }
    }
}

/// Broken, a process that dies in the making of a database leaves one that nobody can open.
#[test]
fn a_crash_while_a_database_is_made_leaves_one_that_opens() {
    for (fault, after) in [
        ("commit", 0),
        ("die", 0),
        ("commit", 1),
        ("die", 1),
        ("commit", 2),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        crash(
            &path,
            fault,
            after,
            "PRAGMA journal_mode=WAL; CREATE TABLE t(a); CREATE TABLE u(a)",
        );
        let db = open(&path);
        exec(
            &db,
            "CREATE TABLE IF NOT EXISTS t(a); INSERT INTO t VALUES (1)",
        );
        drop(db);
        assert_level(&path);
    }
}

/// Broken, a process that dies while others have the database open leaves them a file that lacks an
/// acknowledged commit, on which they go on to build.
#[test]
fn others_go_on_after_a_crash_at_the_gate() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.db");
    let db = open_wal(&path);
    exec(&db, "CREATE TABLE t(a, b)");
    for round in 1..6 {
        let before = number(&db, "SELECT count(*) FROM t");
        crash(
            &path,
            "commit",
            0,
            "INSERT INTO t VALUES (1, randomblob(5000))",
        );
        // Whoever has read the state before it cannot write any more, as after any other commit.
        if round % 2 == 0 {
            exec(&db, "BEGIN; SELECT count(*) FROM t");
            let error = try_exec(&db, "INSERT INTO t VALUES (2, 2)").unwrap_err();
            assert_eq!(code(&error), sqlite::SQLITE_BUSY_SNAPSHOT, "round {round}");
            exec(&db, "ROLLBACK");
            assert_eq!(number(&db, "SELECT count(*) FROM t"), before + 1);
        }
        exec(&db, "INSERT INTO t VALUES (3, 3)");
        assert_eq!(number(&db, "SELECT count(*) FROM t"), before + 2);
        if round == 3 {
            exec(&db, "PRAGMA wal_checkpoint(RESTART)");
        }
        if round == 4 {
            exec(&db, "PRAGMA wal_checkpoint(TRUNCATE)");
        }
    }
    drop(db);
    assert_level(&path);
}

/// Broken, a process that dies between the quorum's acknowledgement and the end of its journal
/// leaves the others refused until all have closed the database, or with a file that lacks the
/// commit.
#[test]
fn in_rollback_mode_others_go_on_after_a_crash_at_the_gate() {
    for (journal, locking) in [
        ("DELETE", "NORMAL"),
        ("PERSIST", "NORMAL"),
        ("TRUNCATE", "EXCLUSIVE"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        let db = open(&path);
        let setup = format!("PRAGMA journal_mode={journal}");
        exec(&db, &format!("{setup}; CREATE TABLE t(a, b)"));
        let idle = open(&path);
        let what = format!("{journal} {locking}");
        for round in 1..6 {
            let before = number(&db, "SELECT count(*) FROM t");
            assert_eq!(number(&idle, "SELECT count(*) FROM t"), before);
            // In exclusive mode only the first commit changes the file's change counter.
            crash(
                &path,
                "commit",
                1,
                &format!(
                    "{setup}; PRAGMA locking_mode={locking}; \
                     INSERT INTO t VALUES (1, 1); INSERT INTO t VALUES (2, 2)"
                ),
            );
            // It plays the dead process's journal back; reading does not wait for the log.
            assert_eq!(
                number(&idle, "SELECT count(*) FROM t"),
                before + 1,
                "{what}"
            );
            if round % 2 == 0 {
                // Nothing is changed under the feet of whoever reads.
                exec(&idle, "BEGIN; SELECT count(*) FROM t");
                exec(&db, "PRAGMA busy_timeout=0");
                for _ in 0..2 {
                    let error = try_exec(&db, "INSERT INTO t VALUES (3, 3)").unwrap_err();
                    assert_eq!(code(&error), sqlite::SQLITE_BUSY, "{what} {round}");
                    let status = file_status(&db, c"main").unwrap();
                    assert!(status.last_error.contains("try again"), "{status:?}");
                }
                // Whoever is told so in a transaction holds no lock that SQLite does not know of.
                exec(&db, "BEGIN; SELECT count(*) FROM t");
                try_exec(&db, "INSERT INTO t VALUES (3, 3)").unwrap_err();
                exec(&open_plain(&path), "BEGIN IMMEDIATE; ROLLBACK");
                exec(&db, "ROLLBACK; PRAGMA busy_timeout=5000");
                exec(&idle, "COMMIT");
            }
            // A busy handler is all that it takes.
            exec(&db, "INSERT INTO t VALUES (3, 3)");
            assert_eq!(
                number(&db, "SELECT count(*) FROM t"),
                before + 3,
                "{what} {round}"
            );
            let counted = number(&idle, "SELECT count(*) FROM t WHERE a > 0");
            assert_eq!(counted, before + 3, "{what} {round}");
            exec(&idle, "UPDATE t SET b = b + 1 WHERE a = 2");
        }
        assert_eq!(text(&idle, "PRAGMA integrity_check"), "ok");
        drop((db, idle));
        assert_level(&path);
    }
}

/// The process that is killed under load. Does nothing when it is run as a test.
#[test]
fn load_child() {
    let Ok(path) = std::env::var("DUROVFS_LOAD_PATH") else {
        return;
    };
    let db = open(Path::new(&path));
    exec(
        &db,
        "PRAGMA cache_size=10; PRAGMA wal_autocheckpoint=20; PRAGMA synchronous=OFF",
    );
    let acknowledged = format!("{path}.acknowledged");
    let mut acknowledged = std::fs::OpenOptions::new()
        .append(true)
        .create(true)
        .open(acknowledged)
        .unwrap();
    for id in number(&db, "SELECT coalesce(max(a), 0) + 1 FROM t").. {
        let rows = if id % 5 == 0 { 60 } else { 1 };
        exec(
            &db,
            &format!(
                "BEGIN; WITH n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i<{rows}) \
                 INSERT INTO t SELECT {id}, randomblob(700) FROM n; \
                 UPDATE t SET b = randomblob(600) WHERE a = {id} - 5; COMMIT"
            ),
        );
        std::io::Write::write_all(&mut acknowledged, &(id as u64).to_le_bytes()).unwrap();
    }
}

/// Broken, kill -9 at some moment loses a commit that COMMIT reported as done, or leaves a file
/// that is not what the log has.
#[test]
fn killed_at_random_moments_nothing_acknowledged_is_lost() {
    use rand::{RngExt, SeedableRng};
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed());
    for journal in ["WAL", "DELETE"] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        let db = open(&path);
        exec(
            &db,
            &format!("PRAGMA journal_mode={journal}; CREATE TABLE t(a, b)"),
        );
        drop(db);
        let (mut most, rounds) = (0, 10);
        for round in 0..rounds {
            let mut child = Command::new(std::env::current_exe().unwrap())
                .args(["load_child", "--exact"])
                .env("DUROVFS_LOAD_PATH", &path)
                .stderr(std::process::Stdio::null())
                .spawn()
                .unwrap();
            std::thread::sleep(std::time::Duration::from_millis(rng.random_range(60..400)));
            child.kill().unwrap();
            child.wait().unwrap();
            let db = open(&path);
            let bytes = std::fs::read(format!("{}.acknowledged", path.display()));
            let bytes = bytes.unwrap_or_default();
            let told = bytes
                .chunks_exact(8)
                .map(|b| u64::from_le_bytes(b.try_into().unwrap()));
            let told: std::collections::BTreeSet<u64> = told.collect();
            for id in &told {
                let rows = number(&db, &format!("SELECT count(*) FROM t WHERE a = {id}"));
                assert_eq!(
                    rows,
                    if id % 5 == 0 { 60 } else { 1 },
                    "round {round}, commit {id}"
                );
            }
            most = most.max(told.len());
            exec(
                &db,
                "CREATE TABLE IF NOT EXISTS u(a); INSERT INTO u VALUES (1)",
            );
            drop(db);
            assert_level(&path);
        }
        assert!(most > 0, "nothing was committed before the kills");
    }
}
