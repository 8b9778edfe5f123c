//! The shim in the SQLite that `rusqlite` bundles, over a log kept in a file of the test.

#![allow(clippy::unwrap_used, reason = "what fails in a test fails the test")]
#![allow(dead_code, reason = "each test uses its part")]

pub mod model;

use durovfs_vfs::{LogLevel, Options};
use libsqlite3_sys as sqlite;
use model::ModelSink;
use rusqlite::fallible_iterator::FallibleIterator;
use rusqlite::{Connection, OpenFlags};
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// Slots of the table that an extension gets: as many as the newest header has.
const TABLE_SLOTS: usize = 300;

pub fn table() -> *const durovfs_vfs::ApiRoutines {
    let entries: &[(usize, *const ())] = &[
        (192, sqlite::sqlite3_auto_extension as *const ()),
        (195, sqlite::sqlite3_cancel_auto_extension as *const ()),
        (16, sqlite::sqlite3_close as *const ()),
        (149, sqlite::sqlite3_context_db_handle as *const ()),
        (162, sqlite::sqlite3_create_function_v2 as *const ()),
        (119, sqlite::sqlite3_create_module_v2 as *const ()),
        (248, sqlite::sqlite3_filename_wal as *const ()),
        (180, sqlite::sqlite3_db_filename as *const ()),
        (181, sqlite::sqlite3_db_readonly as *const ()),
        (50, sqlite::sqlite3_declare_vtab as *const ()),
        (53, sqlite::sqlite3_errmsg as *const ()),
        (183, sqlite::sqlite3_errstr as *const ()),
        (164, sqlite::sqlite3_db_mutex as *const ()),
        (133, sqlite::sqlite3_mutex_leave as *const ()),
        (134, sqlite::sqlite3_mutex_try as *const ()),
        (152, sqlite::sqlite3_next_stmt as *const ()),
        (153, sqlite::sqlite3_sql as *const ()),
        (184, sqlite::sqlite3_stmt_busy as *const ()),
        (55, sqlite::sqlite3_exec as *const ()),
        (166, sqlite::sqlite3_extended_errcode as *const ()),
        (127, sqlite::sqlite3_file_control as *const ()),
        (58, sqlite::sqlite3_free as *const ()),
        (60, sqlite::sqlite3_get_autocommit as *const ()),
        (66, sqlite::sqlite3_libversion as *const ()),
        (67, sqlite::sqlite3_libversion_number as *const ()),
        (197, sqlite::sqlite3_malloc64 as *const ()),
        (135, sqlite::sqlite3_open_v2 as *const ()),
        (79, sqlite::sqlite3_result_double as *const ()),
        (80, sqlite::sqlite3_result_error as *const ()),
        (146, sqlite::sqlite3_result_error_code as *const ()),
        (82, sqlite::sqlite3_result_int as *const ()),
        (83, sqlite::sqlite3_result_int64 as *const ()),
        (84, sqlite::sqlite3_result_null as *const ()),
        (85, sqlite::sqlite3_result_text as *const ()),
        (187, sqlite::sqlite3_uri_boolean as *const ()),
        (189, sqlite::sqlite3_uri_parameter as *const ()),
        (101, sqlite::sqlite3_user_data as *const ()),
        (103, sqlite::sqlite3_value_bytes as *const ()),
        (107, sqlite::sqlite3_value_int64 as *const ()),
        (109, sqlite::sqlite3_value_text as *const ()),
        (113, sqlite::sqlite3_value_type as *const ()),
        (141, sqlite::sqlite3_vfs_find as *const ()),
        (142, sqlite::sqlite3_vfs_register as *const ()),
        (143, sqlite::sqlite3_vfs_unregister as *const ()),
        (167, sqlite::sqlite3_log as *const ()),
        (69, sqlite::sqlite3_mprintf as *const ()),
    ];
    let mut table = vec![std::ptr::null::<()>(); TABLE_SLOTS];
    for (index, function) in entries {
        table[*index] = *function;
    }
    Box::leak(table.into_boxed_slice()).as_ptr().cast()
}

fn log(level: LogLevel, line: &str) {
    if std::env::var_os("DUROVFS_TEST_LOG").is_some() {
        eprintln!("{level:?}: {line}");
    }
}

/// Registers the shim once in this process, and returns the sink of all its databases.
pub fn sink() -> &'static Arc<ModelSink> {
    static SINK: OnceLock<Arc<ModelSink>> = OnceLock::new();
    SINK.get_or_init(|| {
        let sink = Arc::new(ModelSink::default());
        // SAFETY: SQLite is initialized before a VFS is registered in it.
        assert_eq!(unsafe { sqlite::sqlite3_initialize() }, 0);
        register(&sink).unwrap();
        sink
    })
}

pub fn register(sink: &Arc<ModelSink>) -> Result<(), durovfs_vfs::RegisterError> {
    static TABLE: OnceLock<usize> = OnceLock::new();
    let table = *TABLE.get_or_init(|| table() as usize);
    let options = Options {
        vfs_name: c"durovfs",
        make_default: false,
        is_included: Box::new(|path| !path.to_string_lossy().contains("excluded")),
        keeps_local: Box::new(|path| path.to_string_lossy().contains("keep-local")),
        open_timeout: Duration::from_secs(5),
        log,
    };
    let sink: Arc<dyn durovfs_vfs::Sink> = Arc::clone(sink) as _;
    // SAFETY: the table is made of the functions of the SQLite in this very program.
    unsafe { durovfs_vfs::register(table as *const _, sink, options) }
}

fn flags() -> OpenFlags {
    OpenFlags::SQLITE_OPEN_READ_WRITE
        | OpenFlags::SQLITE_OPEN_CREATE
        | OpenFlags::SQLITE_OPEN_URI
        | OpenFlags::SQLITE_OPEN_NO_MUTEX
}

/// Opens through the shim.
pub fn try_open(path: &Path) -> rusqlite::Result<Connection> {
    sink();
    let db = Connection::open_with_flags_and_vfs(path, flags(), "durovfs")?;
    db.busy_timeout(Duration::from_secs(5))?;
    Ok(db)
}

/// Opens through the shim.
pub fn open(path: &Path) -> Connection {
    try_open(path).unwrap()
}

/// Opens through the shim, in WAL mode.
pub fn open_wal(path: &Path) -> Connection {
    let db = open(path);
    exec(&db, "PRAGMA journal_mode=WAL");
    db
}

/// Opens as a process without durovfs does.
pub fn open_plain(path: &Path) -> Connection {
    Connection::open_with_flags_and_vfs(path, flags(), "unix").unwrap()
}

/// Runs statements, whatever they return.
pub fn exec(db: &Connection, sql: &str) {
    try_exec(db, sql).unwrap_or_else(|error| panic!("{sql}: {error:?}"));
}

pub fn try_exec(db: &Connection, sql: &str) -> rusqlite::Result<()> {
    let mut batch = rusqlite::Batch::new(db, sql);
    while let Some(mut statement) = batch.next()? {
        let mut rows = statement.query([])?;
        while rows.next()?.is_some() {}
    }
    Ok(())
}

/// First column of the first row, as a number.
pub fn number(db: &Connection, sql: &str) -> i64 {
    db.query_row(sql, [], |row| row.get(0))
        .unwrap_or_else(|error| panic!("{sql}: {error:?}"))
}

/// First column of the first row, as text.
pub fn text(db: &Connection, sql: &str) -> String {
    db.query_row(sql, [], |row| row.get(0))
        .unwrap_or_else(|error| panic!("{sql}: {error:?}"))
}

/// Extended result code of an error.
pub fn code(error: &rusqlite::Error) -> i32 {
    match error {
        rusqlite::Error::SqliteFailure(failure, _) => failure.extended_code,
        other => panic!("not an error of SQLite: {other:?}"),
    }
}

/// The seed of a randomized test: `DUROVFS_SEED`, or one from the clock, which is printed.
pub fn seed() -> u64 {
    let given = std::env::var("DUROVFS_SEED")
        .ok()
        .and_then(|text| text.parse().ok());
    let seed = given.unwrap_or_else(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        now.unwrap().as_nanos() as u64
    });
    eprintln!("DUROVFS_SEED={seed}");
    seed
}

/// The file `path` (no connection is open) must hold what the log says, page by page.
pub fn assert_level(path: &Path) {
    let wal = path.with_file_name(format!(
        "{}-wal",
        path.file_name().unwrap().to_str().unwrap()
    ));
    assert!(
        !wal.exists(),
        "a connection is open still, or the last one did not checkpoint"
    );
    let bytes = std::fs::read(path).unwrap();
    sink().compare(path.to_str().unwrap(), &bytes);
    let db = open_plain(path);
    // Read-only: a write would leave a stamp that is not ours.
    assert_eq!(text(&db, "PRAGMA integrity_check"), "ok");
}

/// The status of a protected database of a connection.
pub fn file_status(db: &Connection, schema: &std::ffi::CStr) -> Option<durovfs_vfs::FileStatus> {
    sink();
    // SAFETY: the table is a host's; the handle is open, and used by this thread only.
    unsafe {
        durovfs_vfs::Api::new(table())
            .unwrap()
            .file_status(db.handle(), schema)
    }
}

/// Tells the shim of a connection, as the extension does.
pub fn watch(db: &Connection, function: durovfs_vfs::ffi::ScalarFn) {
    // SAFETY: the table is a host's; the handle is open, and used by this thread only.
    let code = unsafe {
        let api = durovfs_vfs::Api::new(table()).unwrap();
        durovfs_vfs::shim::watch(&api, db.handle(), c"durovfs_watched", 0, function)
    };
    assert_eq!(code, sqlite::SQLITE_OK);
}
