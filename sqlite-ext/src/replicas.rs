//! `durovfs_replicas`: the replicas of the connection's main database, as their primary sees them. A
//! table without storage; each scan asks the sidecar once.

use crate::host::Host;
use crate::status;
use durovfs_wire::status::ReplicaStatus;
use libsqlite3_sys as sqlite;
use libsqlite3_sys::{
    sqlite3, sqlite3_context, sqlite3_index_info, sqlite3_int64, sqlite3_module, sqlite3_value,
    sqlite3_vtab, sqlite3_vtab_cursor,
};
use std::ffi::{CStr, c_char, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};

const NAME: &CStr = c"durovfs_replicas";
/// Columns in the order of [`column`].
const SCHEMA: &CStr = c"CREATE TABLE durovfs_replicas(node TEXT, address TEXT, state TEXT, \
    flush_lsn INTEGER, lag_entries INTEGER, lag_ms INTEGER, ack_p50_us INTEGER, ack_p99_us INTEGER)";
/// `SQLITE_TRANSIENT`: SQLite copies the text.
const TRANSIENT: isize = -1;

/// SQLite keeps a pointer to it as long as a connection lives.
struct Module(sqlite3_module);

// SAFETY: constant; SQLite only reads it.
unsafe impl Sync for Module {}

static MODULE: Module = Module(sqlite3_module {
    // No xCreate: the table is there without CREATE VIRTUAL TABLE, and only so.
    xConnect: Some(x_connect),
    xBestIndex: Some(x_best_index),
    xDisconnect: Some(x_disconnect),
    xOpen: Some(x_open),
    xClose: Some(x_close),
    xFilter: Some(x_filter),
    xNext: Some(x_next),
    xEof: Some(x_eof),
    xColumn: Some(x_column),
    xRowid: Some(x_rowid),
    // SAFETY: plain data, in which zero is the version and "no such method".
    ..unsafe { std::mem::zeroed() }
});

/// What SQLite knows as the table. Its own part comes first.
#[repr(C)]
struct Table {
    base: sqlite3_vtab,
    host: &'static Host,
    db: *mut sqlite3,
}

/// What SQLite knows as a scan. Its own part comes first.
#[repr(C)]
struct Scan {
    base: sqlite3_vtab_cursor,
    rows: Vec<ReplicaStatus>,
    row: usize,
}

/// Gives a connection the table.
///
/// # Safety
/// `db` is a connection of this host that this thread may use.
pub(crate) unsafe fn install(host: &'static Host, db: *mut sqlite3) -> Result<(), String> {
    let data: *const Host = host;
    // SAFETY: name and module are constants, the host lives for ever, the connection is the caller's.
    let code = unsafe {
        host.api
            .create_module_v2(db, NAME.as_ptr(), &MODULE.0, data.cast_mut().cast(), None)
    };
    match code {
        sqlite::SQLITE_OK => Ok(()),
        code => Err(format!("sqlite3_create_module_v2 returned {code}")),
    }
}

/// Runs a method's body; no panic leaves it.
fn guarded(body: impl FnOnce() -> c_int) -> c_int {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or(sqlite::SQLITE_INTERNAL)
}

unsafe extern "C" fn x_connect(
    db: *mut sqlite3,
    data: *mut c_void,
    _count: c_int,
    _arguments: *const *const c_char,
    table: *mut *mut sqlite3_vtab,
    _error: *mut *mut c_char,
) -> c_int {
    guarded(|| {
        // SAFETY: what `install` registered.
        let host: &'static Host = unsafe { &*data.cast::<Host>() };
        // SAFETY: SQLite is connecting the table, and asks for its schema now.
        let code = unsafe { host.api.declare_vtab(db, SCHEMA.as_ptr()) };
        if code != sqlite::SQLITE_OK {
            return code;
        }
        // SAFETY: plain data that SQLite fills.
        let base = unsafe { std::mem::zeroed() };
        let made = Box::into_raw(Box::new(Table { base, host, db }));
        // SAFETY: SQLite's place for the result.
        unsafe { *table = made.cast() };
        sqlite::SQLITE_OK
    })
}

unsafe extern "C" fn x_disconnect(table: *mut sqlite3_vtab) -> c_int {
    guarded(|| {
        // SAFETY: made by `x_connect`; SQLite does not use it after this.
        drop(unsafe { Box::from_raw(table.cast::<Table>()) });
        sqlite::SQLITE_OK
    })
}

unsafe extern "C" fn x_best_index(
    _table: *mut sqlite3_vtab,
    info: *mut sqlite3_index_info,
) -> c_int {
    // SAFETY: SQLite's own structure. Every plan is a whole scan of a few rows.
    unsafe { (*info).estimatedCost = 1000.0 };
    sqlite::SQLITE_OK
}

unsafe extern "C" fn x_open(
    _table: *mut sqlite3_vtab,
    cursor: *mut *mut sqlite3_vtab_cursor,
) -> c_int {
    guarded(|| {
        // SAFETY: plain data that SQLite fills.
        let base = unsafe { std::mem::zeroed() };
        let made = Box::into_raw(Box::new(Scan {
            base,
            rows: Vec::new(),
            row: 0,
        }));
        // SAFETY: SQLite's place for the result.
        unsafe { *cursor = made.cast() };
        sqlite::SQLITE_OK
    })
}

unsafe extern "C" fn x_close(cursor: *mut sqlite3_vtab_cursor) -> c_int {
    guarded(|| {
        // SAFETY: made by `x_open`; SQLite does not use it after this.
        drop(unsafe { Box::from_raw(cursor.cast::<Scan>()) });
        sqlite::SQLITE_OK
    })
}

unsafe extern "C" fn x_filter(
    cursor: *mut sqlite3_vtab_cursor,
    _plan: c_int,
    _plan_text: *const c_char,
    _count: c_int,
    _values: *mut *mut sqlite3_value,
) -> c_int {
    guarded(|| {
        // SAFETY: made by `x_open`, and SQLite set its table, which `x_connect` made.
        let (scan, table) = unsafe {
            let scan = &mut *cursor.cast::<Scan>();
            let table = &mut *scan.base.pVtab.cast::<Table>();
            (scan, table)
        };
        let api = &table.host.api;
        // SAFETY: the connection is scanning, on this thread.
        let file = unsafe { api.file_status(table.db, c"main") };
        let rows = match file {
            Some(file) => status::replicas(&table.host.client, &file),
            None => Err("durovfs_replicas: the main database is not protected".to_owned()),
        };
        match rows {
            Ok(rows) => {
                scan.rows = rows;
                scan.row = 0;
                sqlite::SQLITE_OK
            }
            Err(error) => {
                // SAFETY: SQLite frees the message; an older one is freed where it was made.
                unsafe { api.free(table.base.zErrMsg.cast()) };
                table.base.zErrMsg = api.copy_text(&format!("durovfs: {error}"));
                sqlite::SQLITE_ERROR
            }
        }
    })
}

unsafe extern "C" fn x_next(cursor: *mut sqlite3_vtab_cursor) -> c_int {
    // SAFETY: made by `x_open`.
    unsafe { (*cursor.cast::<Scan>()).row += 1 };
    sqlite::SQLITE_OK
}

unsafe extern "C" fn x_eof(cursor: *mut sqlite3_vtab_cursor) -> c_int {
    // SAFETY: made by `x_open`.
    let scan = unsafe { &*cursor.cast::<Scan>() };
    c_int::from(scan.row >= scan.rows.len())
}

unsafe extern "C" fn x_rowid(cursor: *mut sqlite3_vtab_cursor, rowid: *mut sqlite3_int64) -> c_int {
    // SAFETY: made by `x_open`; SQLite's place for the result. There are a few rows.
    unsafe { *rowid = (*cursor.cast::<Scan>()).row as sqlite3_int64 + 1 };
    sqlite::SQLITE_OK
}

unsafe extern "C" fn x_column(
    cursor: *mut sqlite3_vtab_cursor,
    context: *mut sqlite3_context,
    index: c_int,
) -> c_int {
    guarded(|| {
        // SAFETY: made by `x_open`, and SQLite set its table, which `x_connect` made.
        let (scan, table) = unsafe {
            let scan = &*cursor.cast::<Scan>();
            (scan, &*scan.base.pVtab.cast::<Table>())
        };
        let api = &table.host.api;
        let value = scan.rows.get(scan.row).and_then(|row| column(row, index));
        // SAFETY: SQLite's own context; it copies the text.
        match value {
            Some(Value::Text(text)) => unsafe {
                let length = c_int::try_from(text.len()).unwrap_or(0);
                api.result_text(context, text.as_ptr().cast(), length, TRANSIENT);
            },
            // SAFETY: as above.
            Some(Value::Number(number)) => unsafe {
                api.result_int64(context, i64::try_from(number).unwrap_or(i64::MAX));
            },
            // SAFETY: as above.
            None => unsafe { api.result_null(context) },
        }
        sqlite::SQLITE_OK
    })
}

enum Value<'a> {
    Text(&'a str),
    Number(u64),
}

fn column(row: &ReplicaStatus, index: c_int) -> Option<Value<'_>> {
    Some(match index {
        0 => Value::Text(row.node.as_str()),
        1 => Value::Text(&row.address),
        2 => Value::Text(&row.state),
        3 => Value::Number(row.flush_lsn.get()),
        4 => Value::Number(row.lag_entries),
        5 => Value::Number(row.lag_ms),
        6 => Value::Number(row.ack_p50_us),
        7 => Value::Number(row.ack_p99_us),
        _ => return None,
    })
}
