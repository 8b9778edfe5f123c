//! Other VFSes above the shim: one that opens files under copies of their names, as SQLite's own
//! multiplexer does, and one that hides what the shim promises of its writes.

#![allow(clippy::unwrap_used, reason = "what fails in a test fails the test")]

mod common;

use common::*;
use libsqlite3_sys as sqlite;
use rusqlite::{Connection, OpenFlags};
use std::ffi::{CStr, c_char, c_int};
use std::path::Path;
use std::sync::Once;

unsafe extern "C" fn open_a_copy(
    above: *mut sqlite::sqlite3_vfs,
    name: *const c_char,
    file: *mut sqlite::sqlite3_file,
    flags: c_int,
    out_flags: *mut c_int,
) -> c_int {
    // SAFETY: SQLite passes the structure of `register_above`, which points to the shim's; a name
    // that SQLite makes from another is a name. It is never freed: this is a test.
    unsafe {
        let below: *mut sqlite::sqlite3_vfs = (*above).pAppData.cast();
        let mut copy = name;
        if !name.is_null() {
            let none = c"".as_ptr();
            copy = sqlite::sqlite3_create_filename(name, none, none, 0, std::ptr::null_mut());
        }
        (*below).xOpen.unwrap()(below, copy, file, flags, out_flags)
    }
}

unsafe extern "C" fn promise_nothing(_: *mut sqlite::sqlite3_file) -> c_int {
    0
}

unsafe extern "C" fn open_without_promises(
    above: *mut sqlite::sqlite3_vfs,
    name: *const c_char,
    file: *mut sqlite::sqlite3_file,
    flags: c_int,
    out_flags: *mut c_int,
) -> c_int {
    // SAFETY: as in `open_a_copy`; the methods are copied, and the copy is never freed.
    unsafe {
        let below: *mut sqlite::sqlite3_vfs = (*above).pAppData.cast();
        let code = (*below).xOpen.unwrap()(below, name, file, flags, out_flags);
        if !(*file).pMethods.is_null() {
            let methods = Box::leak(Box::new(std::ptr::read((*file).pMethods)));
            methods.xDeviceCharacteristics = Some(promise_nothing);
            (*file).pMethods = methods;
        }
        code
    }
}

fn register_above() {
    static ONCE: Once = Once::new();
    sink();
    ONCE.call_once(|| {
        register(c"above", open_a_copy);
        register(c"cautious", open_without_promises);
    });
}

type Open = unsafe extern "C" fn(
    *mut sqlite::sqlite3_vfs,
    *const c_char,
    *mut sqlite::sqlite3_file,
    c_int,
    *mut c_int,
) -> c_int;

fn register(name: &'static CStr, open: Open) {
    // SAFETY: the shim is registered, and its structure is copied; all but xOpen find their
    // way through what it holds. The structure lives as long as the process.
    unsafe {
        let below = sqlite::sqlite3_vfs_find(c"durovfs".as_ptr());
        assert!(!below.is_null());
        let above = Box::leak(Box::new(std::ptr::read(below)));
        above.zName = name.as_ptr();
        above.xOpen = Some(open);
        above.xDelete = Some(delete_below);
        above.xAccess = Some(access_below);
        above.xFullPathname = Some(full_pathname_below);
        above.xRandomness = Some(randomness_below);
        above.xCurrentTimeInt64 = Some(current_time_below);
        above.xSleep = Some(sleep_below);
        above.xGetLastError = Some(last_error_below);
        above.pAppData = below.cast();
        above.pNext = std::ptr::null_mut();
        assert_eq!(sqlite::sqlite3_vfs_register(above, 0), 0);
    }
}

macro_rules! pass_on {
    ($name:ident, $method:ident, $($argument:ident: $type:ty),*) => {
        unsafe extern "C" fn $name(
            above: *mut sqlite::sqlite3_vfs,
            $($argument: $type),*
        ) -> c_int {
            // SAFETY: as in `open_a_copy`.
            unsafe {
                let below: *mut sqlite::sqlite3_vfs = (*above).pAppData.cast();
                (*below).$method.unwrap()(below, $($argument),*)
            }
        }
    };
}

pass_on!(delete_below, xDelete, name: *const c_char, sync: c_int);
pass_on!(access_below, xAccess, name: *const c_char, flags: c_int, out: *mut c_int);
pass_on!(full_pathname_below, xFullPathname, name: *const c_char, length: c_int, out: *mut c_char);
pass_on!(randomness_below, xRandomness, length: c_int, out: *mut c_char);
pass_on!(current_time_below, xCurrentTimeInt64, out: *mut i64);
pass_on!(sleep_below, xSleep, micros: c_int);
pass_on!(last_error_below, xGetLastError, length: c_int, out: *mut c_char);

fn open_above(path: &Path) -> rusqlite::Result<Connection> {
    register_above();
    Connection::open_with_flags_and_vfs(path, OpenFlags::default(), "above")
}

/// Broken, the shim looks for SQLite's pager before a name that SQLite did not make: the host
/// crashes, or the WAL is written past the gate.
#[test]
fn a_wal_under_a_copied_name_is_still_its_databases() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.db");
    let name = path.to_str().unwrap();
    let db = open_above(&path).unwrap();
    exec(&db, "PRAGMA journal_mode=WAL; CREATE TABLE t(a)");
    let lsn = sink().last_lsn(name);
    exec(&db, "INSERT INTO t VALUES (1)");
    assert_eq!(sink().last_lsn(name), lsn + 1);
    drop(db);
    assert_level(&path);
    // An unprotected database stays one.
    let excluded = dir.path().join("excluded.db");
    let db = open_above(&excluded).unwrap();
    exec(&db, "PRAGMA journal_mode=WAL; CREATE TABLE t(a)");
    assert!(file_status(&db, c"main").is_none());
}

/// Broken, one connection's transaction is taken for another's.
#[test]
fn which_of_two_connections_is_not_guessed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.db");
    let db = open_above(&path).unwrap();
    exec(&db, "PRAGMA journal_mode=WAL; CREATE TABLE t(a)");
    let second = open_above(&path).unwrap();
    let error = try_exec(&second, "SELECT * FROM t").unwrap_err();
    assert_eq!(code(&error) & 0xff, sqlite::SQLITE_CANTOPEN);
    drop(second);
    exec(&db, "INSERT INTO t VALUES (1)");
    drop(db);
    // Without a VFS above, names are SQLite's own, and tell.
    let (first, second) = (open(&path), open(&path));
    assert_eq!(number(&second, "SELECT count(*) FROM t"), 1);
    exec(&first, "INSERT INTO t VALUES (2)");
    exec(&second, "INSERT INTO t VALUES (3)");
    drop((first, second));
    assert_level(&path);
}

/// Broken, SQLite hears of a failure after the commit was acknowledged, or its padding becomes
/// transactions, or the next one is taken for somebody else's: where a VFS above hides that writes
/// are powersafe, SQLite fills the last sector with copies of the last frame.
#[test]
fn padded_commits_are_one_transaction_each() {
    for page_size in [512, 1024, 4096] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        let name = path.to_str().unwrap();
        register_above();
        let open = || {
            let flags = OpenFlags::default();
            let db = Connection::open_with_flags_and_vfs(&path, flags, "cautious").unwrap();
            exec(&db, "PRAGMA synchronous=FULL");
            db
        };
        let db = open();
        let mode = format!("PRAGMA page_size={page_size}; PRAGMA journal_mode=WAL");
        exec(&db, &mode);
        exec(&db, "CREATE TABLE t(a)");
        let wal = dir.path().join("a.db-wal");
        for round in 0..20 {
            let (lsn, size) = (sink().last_lsn(name), wal.metadata().unwrap().len());
            exec(&db, "INSERT INTO t VALUES (randomblob(300))");
            assert_eq!(
                sink().last_lsn(name),
                lsn + 1,
                "page size {page_size}, {round}"
            );
            let frames = (wal.metadata().unwrap().len() - size) / (page_size + 24);
            assert!(frames > 1, "it is not padded");
            // Another connection goes on behind the copies.
            let other = open();
            exec(&other, "UPDATE t SET a = randomblob(300) WHERE rowid = 1");
            assert_eq!(sink().last_lsn(name), lsn + 2);
        }
        // As a process that dies leaves it: the WAL is read as it stands in the file.
        let copy = dir.path().join("copy.db");
        std::fs::copy(&path, &copy).unwrap();
        std::fs::copy(&wal, dir.path().join("copy.db-wal")).unwrap();
        let flags = OpenFlags::default();
        let plain = Connection::open_with_flags_and_vfs(&copy, flags, "unix").unwrap();
        assert_eq!(number(&plain, "SELECT count(*) FROM t"), 20);
        drop(plain);
        drop(db);
        assert_level(&path);
        assert_eq!(number(&open(), "SELECT count(*) FROM t"), 20);
    }
}
