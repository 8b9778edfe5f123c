//! Deferred durability over the shim: what COMMIT, reads, checkpoints and open do with commits that
//! the quorum has not confirmed.

#![allow(clippy::unwrap_used, reason = "what fails in a test fails the test")]

mod common;

use common::*;
use durovfs_vfs::deferred::wait_confirmed;
use durovfs_wire::Lsn;
use libsqlite3_sys as sqlite;
use rusqlite::Connection;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const LONG: Option<Duration> = Some(Duration::from_secs(5));
const SHORT: Option<Duration> = Some(Duration::from_millis(50));

struct World {
    path: PathBuf,
    _dir: tempfile::TempDir,
}

impl World {
    /// A WAL database with a table, in deferred mode; one commit is in the log.
    fn new() -> (Self, Connection) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        let db = open_wal(&path);
        exec(&db, "CREATE TABLE t(a)");
        defer(&db);
        (Self { path, _dir: dir }, db)
    }

    fn name(&self) -> &str {
        self.path.to_str().unwrap()
    }

    fn wait(&self, timeout: Option<Duration>) -> Result<Option<Lsn>, i32> {
        let waited = wait_confirmed(sink().as_ref(), &self.path, timeout);
        waited
            .map(|position| position.map(|position| position.lsn))
            .map_err(|refusal| refusal.code())
    }
}

fn defer(db: &Connection) {
    assert_eq!(text(db, "PRAGMA durovfs_durability=deferred"), "deferred");
}

fn insert(db: &Connection, values: std::ops::Range<i64>) {
    for value in values {
        exec(db, &format!("INSERT INTO t VALUES ({value})"));
    }
}

fn count(db: &Connection) -> i64 {
    number(db, "SELECT count(*) FROM t")
}

/// Broken, COMMIT waits for the quorum all the same, or durovfs_wait() does not wait for it.
#[test]
fn a_commit_returns_before_the_quorum_has_it_and_waiting_waits() {
    let (world, db) = World::new();
    let base = sink().last_lsn(world.name());
    sink().hold(world.name());
    insert(&db, 0..20);
    assert_eq!((count(&db), sink().held(world.name())), (20, 20));
    assert_eq!(sink().last_lsn(world.name()), base);
    assert_eq!(world.wait(SHORT), Err(sqlite::SQLITE_IOERR_WRITE));
    // Nothing was given up by that.
    assert_eq!(count(&db), 20);
    let status = file_status(&db, c"main").unwrap();
    assert!(status.unconfirmed);
    assert_eq!(status.position.lsn.get(), base);
    sink().release(world.name(), 20);
    assert_eq!(world.wait(LONG), Ok(Some(Lsn::new(base + 20))));
    let status = file_status(&db, c"main").unwrap();
    assert_eq!(status.position.lsn.get(), base + 20);
    insert(&db, 20..21);
    assert_eq!(world.wait(LONG), Ok(Some(Lsn::new(base + 21))));
    drop(db);
    assert_level(&world.path);
}

/// Broken, an application answers its users from commits that no longer are.
#[test]
fn after_a_loss_every_statement_fails_and_a_new_open_has_what_the_quorum_has() {
    for kept in [0, 1, 3] {
        let (world, db) = World::new();
        let other = open(&world.path);
        insert(&db, 0..2);
        sink().hold(world.name());
        insert(&db, 2..7);
        assert_eq!(count(&other), 7);
        sink().release(world.name(), kept);
        let code = Err(sqlite::SQLITE_IOERR_WRITE);
        assert_eq!(world.wait(LONG), code);
        for db in [&db, &other] {
            for sql in ["SELECT count(*) FROM t", "INSERT INTO t VALUES (9)"] {
                let error = try_exec(db, sql).unwrap_err();
                assert_eq!(common::code(&error), sqlite::SQLITE_IOERR_WRITE, "{sql}");
            }
        }
        assert!(try_open(&world.path).is_err(), "others have it open");
        drop((db, other));
        let db = open(&world.path);
        assert_eq!(count(&db), 2 + kept as i64);
        insert(&db, 100..101);
        drop(db);
        assert_level(&world.path);
    }
}

/// Broken, a checkpoint moves into the database file what may have to be taken back.
#[test]
fn a_checkpoint_waits_for_what_it_moves() {
    let (world, db) = World::new();
    exec(&db, "PRAGMA durovfs_timeout=100");
    sink().hold(world.name());
    insert(&db, 0..5);
    let before = std::fs::read(&world.path).unwrap();
    assert!(try_exec(&db, "PRAGMA wal_checkpoint(TRUNCATE)").is_err());
    assert_eq!(std::fs::read(&world.path).unwrap(), before);
    sink().release(world.name(), 5);
    assert_eq!(
        world.wait(LONG).unwrap().map(Lsn::get),
        Some(sink().last_lsn(world.name()))
    );
    exec(&db, "PRAGMA wal_checkpoint(TRUNCATE)");
    insert(&db, 5..6);
    drop(db);
    assert_level(&world.path);
}

/// Broken, a large transaction or a connection in mode `quorum` overtakes what is unconfirmed.
#[test]
fn a_commit_that_waits_waits_for_all_before_it() {
    let (world, db) = World::new();
    let careful = open(&world.path);
    sink().hold(world.name());
    insert(&db, 0..3);
    let name = world.name().to_owned();
    let answering = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        sink().release(&name, 3);
    });
    exec(&careful, "INSERT INTO t VALUES (7)");
    answering.join().unwrap();
    let lsn = sink().last_lsn(world.name());
    exec(&db, "INSERT INTO t VALUES (randomblob(2000000))");
    assert_eq!(sink().last_lsn(world.name()), lsn + 1);
    drop((db, careful));
    assert_level(&world.path);
}

/// Broken, memory grows as long as the quorum is slow.
#[test]
fn a_full_window_holds_the_next_commit_and_refuses_it_in_the_end() {
    let (world, db) = World::new();
    exec(&db, "PRAGMA durovfs_timeout=100");
    sink().hold(world.name());
    let window = durovfs_vfs::deferred::WINDOW_COMMITS as i64;
    insert(&db, 0..window);
    let error = try_exec(&db, "INSERT INTO t VALUES (-1)").unwrap_err();
    assert_eq!(common::code(&error), sqlite::SQLITE_IOERR_WRITE);
    assert_eq!(count(&db), window);
    sink().release(world.name(), window as usize);
    insert(&db, window..window + 1);
    drop(db);
    assert_level(&world.path);
}

/// Broken, the words of the contract mean nothing.
#[test]
fn the_pragma_and_the_uri_choose() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.db");
    let db = open_wal(&path);
    assert_eq!(text(&db, "PRAGMA durovfs_durability"), "quorum");
    let uri = format!("file:{}?durovfs_durability=deferred", path.display());
    let deferred = open(Path::new(&uri));
    assert_eq!(text(&deferred, "PRAGMA durovfs_durability"), "deferred");
    assert_eq!(
        text(&deferred, "PRAGMA durovfs_durability=QUORUM"),
        "quorum"
    );
    assert!(try_exec(&db, "PRAGMA durovfs_durability=maybe").is_err());
}

/// Not a test of its own: the process that is killed with unconfirmed commits.
#[test]
fn child() {
    let Ok(path) = std::env::var("DUROVFS_DEFERRED_CHILD") else {
        return;
    };
    let kept = std::env::var("DUROVFS_DEFERRED_KEPT")
        .unwrap()
        .parse()
        .unwrap();
    let path = PathBuf::from(path);
    let db = open_wal(&path);
    exec(&db, "CREATE TABLE t(a)");
    defer(&db);
    insert(&db, 0..3);
    exec(&db, "PRAGMA wal_checkpoint(PASSIVE)");
    insert(&db, 3..5);
    sink().hold(path.to_str().unwrap());
    insert(&db, 5..10);
    sink().release(path.to_str().unwrap(), kept);
    std::process::abort();
}

/// Broken, the local file is ahead of the quorum after a crash, for ever.
#[test]
fn a_killed_process_leaves_a_file_that_goes_back_to_what_the_quorum_has() {
    for kept in [0, 2, 5] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        let killed = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child"])
            .env("DUROVFS_DEFERRED_CHILD", &path)
            .env("DUROVFS_DEFERRED_KEPT", kept.to_string())
            .output()
            .unwrap();
        assert!(!killed.status.success());
        let db = open(&path);
        assert_eq!(count(&db), 5 + kept);
        insert(&db, 50..51);
        drop(db);
        assert_level(&path);
    }
}

/// Waits until the other process has come to a point, or says so to it.
fn signal(path: &Path, name: &str) {
    std::fs::write(path.with_extension(name), b"").unwrap();
}

fn await_signal(path: &Path, name: &str) {
    let signal = path.with_extension(name);
    for _ in 0..1000 {
        if signal.exists() {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("{} did not come", signal.display());
}

/// Not a test of its own: commits that another process checkpoints before this one hears that they
/// are confirmed, then more that never are.
#[test]
fn unaware_child() {
    let Ok(path) = std::env::var("DUROVFS_UNAWARE_CHILD") else {
        return;
    };
    let path = PathBuf::from(path);
    let name = path.to_str().unwrap();
    let db = open(&path);
    defer(&db);
    sink().hold(name);
    insert(&db, 1..5);
    exec(&db, "INSERT INTO u VALUES (1)");
    sink().commit_held_silently(name);
    signal(&path, "committed");
    await_signal(&path, "checkpointed");
    insert(&db, 5..7);
    std::process::abort();
}

/// Broken, a lost commit takes others with it that a checkpoint has moved into the database file,
/// and the file is no transaction's.
#[test]
fn a_checkpoint_by_another_process_is_not_undone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.db");
    let db = open_wal(&path);
    exec(&db, "CREATE TABLE t(a); CREATE TABLE u(a)");
    exec(&db, "PRAGMA wal_checkpoint(TRUNCATE)");
    // Its page stands in the WAL, and again behind it, where the other table's stands only once.
    insert(&db, 0..1);
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "unaware_child"])
        .env("DUROVFS_UNAWARE_CHILD", &path)
        .spawn()
        .unwrap();
    await_signal(&path, "committed");
    // A reader of the newest frame: with it the next writer does not begin the WAL again.
    let reader = open(&path);
    exec(&reader, "BEGIN");
    assert_eq!(count(&reader), 5);
    exec(&db, "PRAGMA wal_checkpoint(PASSIVE)");
    signal(&path, "checkpointed");
    assert!(!child.wait().unwrap().success());
    let error = try_exec(&db, "INSERT INTO t VALUES (8)").unwrap_err();
    assert_eq!(common::code(&error), sqlite::SQLITE_IOERR_WRITE);
    drop((db, reader));
    let db = open(&path);
    assert_eq!(count(&db), 5);
    insert(&db, 8..9);
    drop(db);
    assert_level(&path);
}
