//! The guard: whatever route a write takes to a protected database's file, the log has it, or the
//! file does not keep it, or the next write and the next open refuse the file.

#![allow(clippy::unwrap_used, reason = "what fails in a test fails the test")]

mod common;

use common::model::Fault;
use common::*;
use libsqlite3_sys as sqlite;
use rusqlite::{Connection, OpenFlags};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// The bytes of a file that this process has open: reading it here, and closing it, would drop
/// SQLite's locks.
fn bytes_of(path: &Path) -> Vec<u8> {
    let output = Command::new("cat").arg(path).output().unwrap();
    assert!(output.status.success());
    output.stdout
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    PathBuf::from(format!("{}{suffix}", path.display()))
}

/// Fails unless the log has what the file of an idle connection holds.
fn assert_replicated(db: &Connection, path: &Path, what: &str) {
    eprintln!("{what}");
    if text(db, "PRAGMA journal_mode") == "wal" {
        exec(db, "PRAGMA wal_checkpoint(FULL)");
    }
    sink().compare(path.to_str().unwrap(), &bytes_of(path));
}

fn fill(rows: u32) -> String {
    format!(
        "WITH n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i<{rows}) \
         INSERT INTO t SELECT i, randomblob(700) FROM n"
    )
}

fn reset(db: &Connection) {
    let on = rusqlite::config::DbConfig::SQLITE_DBCONFIG_RESET_DATABASE;
    db.set_db_config(on, true).unwrap();
    exec(db, "VACUUM");
    db.set_db_config(on, false).unwrap();
}

/// Broken, a write in some mode, or one that shrinks, moves or replaces the database, is in the
/// file and not in the log.
#[test]
fn every_mode_replicates_what_changes_the_file() {
    let modes = ["DELETE", "TRUNCATE", "PERSIST", "MEMORY", "WAL"];
    for (round, mode) in modes.into_iter().enumerate() {
        let kinds = ["NONE", "FULL", "INCREMENTAL"];
        for auto_vacuum in [kinds[round % 3], kinds[(round + 1) % 3]] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("a.db");
            let db = open(&path);
            exec(
                &db,
                &format!("PRAGMA auto_vacuum={auto_vacuum}; PRAGMA page_size=1024"),
            );
            exec(
                &db,
                &format!("PRAGMA journal_mode={mode}; PRAGMA cache_size=10"),
            );
            if round % 2 == 0 {
                exec(&db, "PRAGMA mmap_size=10000000");
            }
            let check = |what: &str| {
                assert_replicated(&db, &path, &format!("{mode} {auto_vacuum} {what}"));
            };
            exec(&db, "CREATE TABLE t(a, b); CREATE INDEX i ON t(b)");
            exec(&db, &fill(300));
            check("filled");
            exec(&db, "DELETE FROM t WHERE a > 20");
            check("shrunk");
            exec(
                &db,
                "PRAGMA incremental_vacuum(50); PRAGMA incremental_vacuum",
            );
            check("incremental_vacuum");
            exec(&db, &fill(100));
            exec(
                &db,
                &format!(
                    "BEGIN; SAVEPOINT s; {}; ROLLBACK TO s; RELEASE s; COMMIT",
                    fill(99)
                ),
            );
            exec(&db, &format!("BEGIN; {}; ROLLBACK", fill(400)));
            check("rolled back");
            exec(
                &db,
                "PRAGMA writable_schema=ON; \
                 UPDATE sqlite_schema SET sql = 'CREATE TABLE t(a, b /*!*/)' WHERE name = 't'; \
                 PRAGMA writable_schema=RESET",
            );
            check("writable_schema");
            exec(
                &db,
                "PRAGMA user_version=7; PRAGMA application_id=9; VACUUM",
            );
            check("vacuumed");
            sink().fault(path.to_str().unwrap(), &[Fault::Refuse]);
            try_exec(&db, &fill(200)).unwrap_err();
            check("refused");
            reset(&db);
            check("reset");
            exec(&db, "CREATE TABLE t(a, b)");
            check("made again");
            drop(db);
            assert_level(&path);
        }
    }
}

/// Broken, a database that leaves WAL mode, enters it, or changes its page size on the way, is
/// written past the log in between.
#[test]
fn every_switch_of_mode_is_replicated() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.db");
    let db = open(&path);
    exec(&db, "CREATE TABLE t(a, b)");
    let modes = [
        "WAL", "DELETE", "WAL", "TRUNCATE", "PERSIST", "WAL", "MEMORY", "DELETE",
    ];
    for (round, mode) in modes.into_iter().enumerate() {
        exec(&db, &format!("PRAGMA journal_mode={mode}"));
        assert_eq!(text(&db, "PRAGMA journal_mode"), mode.to_lowercase());
        exec(&db, &fill(40));
        assert_replicated(&db, &path, mode);
        let page_size = [512, 2048, 8192][round % 3];
        exec(&db, &format!("PRAGMA page_size={page_size}; VACUUM"));
        assert_replicated(&db, &path, &format!("{mode} with pages of {page_size}"));
        exec(
            &db,
            "PRAGMA locking_mode=EXCLUSIVE; INSERT INTO t VALUES (1, 1)",
        );
        exec(
            &db,
            "PRAGMA locking_mode=NORMAL; INSERT INTO t VALUES (2, 2)",
        );
        assert_replicated(&db, &path, &format!("{mode} after exclusive locking"));
    }
    drop(db);
    assert_level(&path);
}

/// Broken, a refused commit stays in the file when SQLite has no journal to take it back with, and
/// the next one is built upon it.
#[test]
fn without_a_journal_a_refused_commit_ends_the_database_here() {
    for locking in ["NORMAL", "EXCLUSIVE"] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        let name = path.to_str().unwrap();
        drop(open(&path));
        // The pragma without a schema asks the main database, which nobody protects here.
        let db = open(Path::new(":memory:"));
        exec(
            &db,
            &format!("ATTACH '{name}' AS p; PRAGMA p.locking_mode={locking}"),
        );
        exec(&db, "CREATE TABLE p.t(a, b); PRAGMA journal_mode=OFF");
        assert_eq!(text(&db, "PRAGMA p.journal_mode"), "off");
        exec(&db, "INSERT INTO p.t VALUES (1, 1)");
        let lsn = sink().last_lsn(name);
        sink().fault(name, &[Fault::Refuse]);
        try_exec(&db, "INSERT INTO p.t VALUES (2, 2)").unwrap_err();
        for sql in ["INSERT INTO p.t VALUES (3, 3)", "PRAGMA p.user_version=3"] {
            try_exec(&db, sql).unwrap_err();
        }
        assert_eq!(sink().last_lsn(name), lsn, "{locking}");
        drop(db);
        for _ in 0..2 {
            let error = try_open(&path).unwrap_err();
            assert_eq!(code(&error) & 0xff, sqlite::SQLITE_CANTOPEN, "{locking}");
        }
        assert_eq!(sink().last_lsn(name), lsn, "{locking}");
    }
}

/// Broken, one refusal in exclusive mode would be the answer to every later commit.
#[test]
fn in_exclusive_rollback_mode_a_refusal_passes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.db");
    let name = path.to_str().unwrap();
    let db = open(&path);
    exec(&db, "PRAGMA journal_mode=TRUNCATE; CREATE TABLE t(a, b)");
    sink().fault(name, &[Fault::UnknownLost]);
    try_exec(&db, "INSERT INTO t VALUES (0, 0)").unwrap_err();
    sink().set_resolve_unknown(name, true);
    exec(&db, "PRAGMA locking_mode=EXCLUSIVE");
    // The lock is taken, and kept, while nobody can tell what became of the commit before.
    try_exec(&db, "INSERT INTO t VALUES (1, 1)").unwrap_err();
    try_exec(&db, "INSERT INTO t VALUES (2, 2)").unwrap_err();
    sink().set_resolve_unknown(name, false);
    exec(&db, "INSERT INTO t VALUES (3, 3)");
    assert_eq!(number(&db, "SELECT sum(a) FROM t"), 3);
    drop(db);
    assert_level(&path);
}

/// Broken, a transaction over two attached databases leaves one of them with what its log lacks, or
/// lacking what its log has.
#[test]
fn a_transaction_over_two_databases_leaves_each_as_its_log() {
    for journal in ["DELETE", "PERSIST", "WAL"] {
        for (first, second) in [
            (Fault::None, Fault::None),
            (Fault::Refuse, Fault::None),
            (Fault::None, Fault::Refuse),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let paths = [dir.path().join("a.db"), dir.path().join("b.db")];
            let db = open(&paths[0]);
            exec(&db, &format!("ATTACH '{}' AS b", paths[1].display()));
            for schema in ["main", "b"] {
                exec(&db, &format!("PRAGMA {schema}.journal_mode={journal}"));
                exec(&db, &format!("CREATE TABLE {schema}.t(a, b)"));
            }
            sink().fault(paths[0].to_str().unwrap(), &[first]);
            sink().fault(paths[1].to_str().unwrap(), &[second]);
            let both = "BEGIN; INSERT INTO main.t VALUES (1, 1); INSERT INTO b.t VALUES (1, 1); \
                        COMMIT";
            let result = try_exec(&db, both);
            let what = format!("{journal} {first:?} {second:?}: {result:?}");
            let committed = first == Fault::None && second == Fault::None;
            assert_eq!(result.is_ok(), committed, "{what}");
            assert!(db.is_autocommit());
            for path in &paths {
                sink().clear_faults(path.to_str().unwrap());
            }
            drop(db);
            let rows = |path: &Path| number(&open(path), "SELECT count(*) FROM t");
            let (a, b) = (rows(&paths[0]), rows(&paths[1]));
            assert_eq!((a, b) == (1, 1), committed, "{what}");
            for path in &paths {
                exec(&open(path), "INSERT INTO t VALUES (2, 2)");
                assert_level(path);
            }
        }
    }
}

/// Broken, a copy into a protected database (`sqlite3_backup`) of another page size, in whatever
/// mode, is in the file and not in the log.
#[test]
fn a_copy_over_a_protected_database_is_replicated() {
    let sizes = [1024u32, 4096, 16384];
    for (from, to) in sizes.iter().flat_map(|a| sizes.map(|b| (*a, b))) {
        for mode in ["DELETE", "MEMORY", "WAL"] {
            let dir = tempfile::tempdir().unwrap();
            let source = open_plain(&dir.path().join("source.db"));
            exec(
                &source,
                &format!("PRAGMA page_size={from}; CREATE TABLE t(a, b)"),
            );
            exec(&source, &fill(60));
            let path = dir.path().join("a.db");
            let mut db = open(&path);
            exec(
                &db,
                &format!("PRAGMA page_size={to}; PRAGMA journal_mode={mode}"),
            );
            exec(
                &db,
                &format!("CREATE TABLE t(a, b); {}; CREATE TABLE gone(a)", fill(200)),
            );
            let backup = rusqlite::backup::Backup::new(&source, &mut db).unwrap();
            let copied = backup.run_to_completion(9, Duration::ZERO, None);
            drop(backup);
            // SQLite itself refuses to change the page size of a WAL database.
            assert_eq!(copied.is_ok(), mode != "WAL" || from == to, "{copied:?}");
            assert_replicated(&db, &path, &format!("{from} over {to}, {mode}"));
            let rows = if copied.is_ok() { 60 } else { 200 };
            assert_eq!(number(&db, "SELECT count(*) FROM t"), rows);
            exec(&db, "DELETE FROM t WHERE a > 5");
            // As a source.
            let mut copy = open(&dir.path().join("copy.db"));
            let backup = rusqlite::backup::Backup::new(&db, &mut copy).unwrap();
            backup.run_to_completion(3, Duration::ZERO, None).unwrap();
            drop(backup);
            assert_eq!(number(&copy, "SELECT count(*) FROM t"), 5);
            drop((db, copy));
            assert_level(&path);
            assert_level(&dir.path().join("copy.db"));
        }
    }
}

/// Broken, a file control of the application's makes a file that durovfs takes for somebody else's.
#[test]
fn file_controls_change_nothing_of_substance() {
    for mode in ["DELETE", "WAL"] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        let db = open(&path);
        exec(
            &db,
            &format!("PRAGMA journal_mode={mode}; CREATE TABLE t(a, b)"),
        );
        let control = |operation: i32, mut argument: i64| {
            let argument: *mut i64 = &raw mut argument;
            // SAFETY: the connection is open; each operation takes a number of at most this size.
            unsafe {
                let main = c"main".as_ptr();
                sqlite::sqlite3_file_control(db.handle(), main, operation, argument.cast())
            }
        };
        assert_eq!(control(sqlite::SQLITE_FCNTL_CHUNK_SIZE, 1 << 16), 0);
        exec(&db, &fill(100));
        assert_eq!(control(sqlite::SQLITE_FCNTL_SIZE_HINT, 1 << 20), 0);
        assert_eq!(control(sqlite::SQLITE_FCNTL_PERSIST_WAL, 1), 0);
        assert_eq!(control(sqlite::SQLITE_FCNTL_POWERSAFE_OVERWRITE, 0), 0);
        assert_eq!(control(sqlite::SQLITE_FCNTL_RESERVE_BYTES, 8), 0);
        exec(&db, "DELETE FROM t WHERE a > 10; VACUUM");
        exec(&db, &fill(30));
        drop(db);
        let db = open(&path);
        assert_eq!(number(&db, "SELECT count(*) FROM t"), 40);
        exec(&db, "DELETE FROM t; VACUUM");
        drop(db);
        assert_level(&path);
    }
}

/// Broken, a database that others hold, or that may only be read, cannot be opened, or is opened
/// without protection and written.
#[test]
fn locked_and_read_only_databases_open() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.db");
    let name = path.to_str().unwrap();
    let db = open(&path);
    exec(&db, "CREATE TABLE t(a, b)");
    exec(&db, "BEGIN EXCLUSIVE; INSERT INTO t VALUES (1, 1)");
    let other = open(&path);
    other.busy_timeout(Duration::ZERO).unwrap();
    let busy = try_exec(&other, "INSERT INTO t VALUES (2, 2)").unwrap_err();
    assert_eq!(code(&busy) & 0xff, sqlite::SQLITE_BUSY);
    exec(&db, "COMMIT");
    exec(&other, "INSERT INTO t VALUES (2, 2)");
    let read_only = format!("file:{name}?mode=ro");
    let reader = open(Path::new(&read_only));
    assert_eq!(number(&reader, "SELECT count(*) FROM t"), 2);
    let refused = try_exec(&reader, "INSERT INTO t VALUES (3, 3)").unwrap_err();
    assert_eq!(code(&refused) & 0xff, sqlite::SQLITE_READONLY);
    drop((db, other, reader));
    let immutable = format!("file:{name}?immutable=1");
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_URI;
    let reader = Connection::open_with_flags_and_vfs(immutable, flags, "durovfs").unwrap();
    assert_eq!(number(&reader, "SELECT count(*) FROM t"), 2);
    try_exec(&reader, "INSERT INTO t VALUES (3, 3)").unwrap_err();
    drop(reader);
    assert_level(&path);
}

/// What a person must be told: both positions, and exactly what to type.
fn assert_tells(line: &str, path: &Path, lsn: u64) {
    let position = format!("lsn {lsn} of epoch 1");
    let command = format!("`durovfs resolve {} --keep log`", path.display());
    assert!(line.contains(&command), "no {command} in: {line}");
    assert!(line.contains(&position), "no {position} in: {line}");
}

/// Broken, a write from outside is taken for ours after one refusal, and the log goes on without
/// it.
#[test]
fn a_foreign_write_in_rollback_mode_is_refused_again_and_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.db");
    let name = path.to_str().unwrap();
    let db = open(&path);
    exec(&db, "CREATE TABLE t(a, b); INSERT INTO t VALUES (1, 1)");
    let lsn = sink().last_lsn(name);
    exec(&open_plain(&path), "INSERT INTO t VALUES (2, 2)");
    for _ in 0..3 {
        let error = try_exec(&db, "INSERT INTO t VALUES (3, 3)").unwrap_err();
        assert_eq!(code(&error), sqlite::SQLITE_IOERR_WRITE);
        assert_tells(&file_status(&db, c"main").unwrap().last_error, &path, lsn);
    }
    // Nobody holds a lock: the next opener looks at the file, too.
    try_open(&path).unwrap_err();
    try_exec(&db, "INSERT INTO t VALUES (4, 4)").unwrap_err();
    drop(db);
    assert_eq!(sink().last_lsn(name), lsn);
    for _ in 0..2 {
        let error = try_open(&path).unwrap_err();
        assert_eq!(code(&error) & 0xff, sqlite::SQLITE_CANTOPEN);
        assert_tells(&durovfs_vfs::shim::last_open_refusal(), &path, lsn);
    }
    assert_eq!(number(&open_plain(&path), "SELECT sum(a) FROM t"), 3);
}

/// Does something to the files of a database that stays open.
type Outside = fn(&Path);

fn replace_by_rename(path: &Path) {
    let other = beside(path, ".other");
    let db = open_plain(&other);
    exec(&db, "CREATE TABLE t(a, b); INSERT INTO t VALUES (77, 7)");
    drop(db);
    std::fs::rename(&other, path).unwrap();
}

fn copy_over(path: &Path) {
    let other = beside(path, ".other");
    let db = open_plain(&other);
    exec(&db, "CREATE TABLE t(a, b); INSERT INTO t VALUES (77, 7)");
    drop(db);
    // As a process of its own: it closes the file.
    let status = Command::new("cp").arg(&other).arg(path).status().unwrap();
    assert!(status.success());
}

fn delete_wal(path: &Path) {
    std::fs::remove_file(beside(path, "-wal")).unwrap();
}

fn delete(path: &Path) {
    std::fs::remove_file(path).unwrap();
}

/// Broken, commits go on over a file that somebody replaced while it was open: they end in a file
/// that nobody will find, or in one that the log knows nothing of.
#[test]
fn files_that_are_replaced_while_open_take_no_further_commit() {
    let cases: [(&str, &str, Outside); 8] = [
        ("WAL", "replaced by rename", replace_by_rename),
        ("WAL", "copied over", copy_over),
        ("WAL", "WAL deleted", delete_wal),
        ("WAL", "deleted", delete),
        ("DELETE", "replaced by rename", replace_by_rename),
        ("DELETE", "copied over", copy_over),
        ("DELETE", "deleted", delete),
        ("TRUNCATE", "copied over", copy_over),
    ];
    for (mode, what, outside) in cases {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        let name = path.to_str().unwrap();
        let db = open(&path);
        exec(
            &db,
            &format!("PRAGMA journal_mode={mode}; CREATE TABLE t(a, b)"),
        );
        exec(&db, &fill(20));
        if mode == "WAL" {
            exec(&db, "PRAGMA wal_checkpoint; INSERT INTO t VALUES (21, 21)");
        }
        let lsn = sink().last_lsn(name);
        outside(&path);
        for _ in 0..2 {
            let result = try_exec(&db, "INSERT INTO t VALUES (22, 22)");
            assert!(result.is_err(), "{mode}, {what}");
        }
        assert_eq!(sink().last_lsn(name), lsn, "{mode}, {what}");
        drop(db);
        // What is left opens as the log has it, or is refused: it is never taken for the log's.
        let opened = try_open(&path);
        let refused = what.starts_with("replaced") || what.starts_with("copied");
        assert_eq!(opened.is_err(), refused, "{mode}, {what}: {opened:?}");
        if let Ok(db) = opened {
            let rows = if mode == "WAL" { 21 } else { 20 };
            assert_eq!(
                number(&db, "SELECT count(*) FROM t"),
                rows,
                "{mode}, {what}"
            );
            exec(&db, "INSERT INTO t VALUES (23, 23)");
            drop(db);
            assert_level(&path);
        } else {
            assert_tells(&durovfs_vfs::shim::last_open_refusal(), &path, lsn);
        }
        assert!(sink().last_lsn(name) <= lsn + 1);
    }
}
