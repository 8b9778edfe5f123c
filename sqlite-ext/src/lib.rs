//! `libdurovfs`: what a SQLite loads. Registers the VFS and the SQL functions, and talks to the
//! sidecar. No function of SQLite is linked: all go through the table that the host hands over.
//!
//! This file is the C boundary: the entry point, what SQLite calls, and the calls into SQLite. All
//! unsafe code of the crate is here, and as little else as can be; no panic leaves it.

#![deny(unsafe_op_in_unsafe_fn)]

pub mod client;
pub mod config;
mod functions;
mod host;
pub mod log;
mod replicas;
pub mod status;
mod unprotected;

use crate::functions::Answer;
use crate::host::{Host, MAX_HOSTS};
use durovfs_vfs::ffi::{EntryPoint, ScalarFn, text};
use durovfs_vfs::sink::Sink;
use durovfs_vfs::{Api, ApiRoutines, FileReport, Options, register, shim};
use durovfs_wire::status::ReplicaStatus;
use libsqlite3_sys as sqlite;
use libsqlite3_sys::{
    sqlite3, sqlite3_context, sqlite3_index_info, sqlite3_int64, sqlite3_module, sqlite3_value,
    sqlite3_vtab, sqlite3_vtab_cursor,
};
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

/// Name of the VFS, as in `vfs=durovfs`.
const VFS_NAME: &CStr = c"durovfs";
/// How long opening a database waits for the sidecar: a restarted one needs the promises of three
/// replicas, and rolling forward has times of its own.
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);
/// `SQLITE_TRANSIENT`: SQLite copies the text.
const TRANSIENT: isize = -1;

/// An entry point, with the arguments that SQLite passes.
type ConnectionHook =
    unsafe extern "C" fn(*mut sqlite3, *mut *mut c_char, *const ApiRoutines) -> c_int;

/// The entry point: `.load libdurovfs`, or any language's `load_extension`. May be called again, in
/// the same SQLite (also after `sqlite3_shutdown`) or in another one of the process.
///
/// # Safety
/// SQLite calls it, with the arguments of an extension's entry point.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sqlite3_durovfs_init(
    db: *mut sqlite3,
    error: *mut *mut c_char,
    table: *const ApiRoutines,
) -> c_int {
    // SAFETY: by the caller's promise.
    let loaded = catch_unwind(|| unsafe { load(db, table) })
        .unwrap_or_else(|_| Err("a bug: a panic while it was loaded".to_owned()));
    let Err(problem) = loaded else {
        // The VFS and the runtime thread are in use until the process ends.
        return sqlite::SQLITE_OK_LOAD_PERMANENTLY;
    };
    // A host may drop the line that it gets.
    log::error(format_args!("not loaded: {problem}"));
    // SAFETY: by the caller's promise.
    unsafe { Api::store_error(table, error, &format!("durovfs: {problem}")) };
    sqlite::SQLITE_ERROR
}

/// # Safety
/// As of the entry point.
unsafe fn load(db: *mut sqlite3, table: *const ApiRoutines) -> Result<(), String> {
    log::init()?;
    // SAFETY: by the caller's promise.
    let api = unsafe { Api::new(table) }.map_err(|problem| problem.to_string())?;
    let _loading = host::begin_loading();
    let client = host::client(&api)?;
    let sink: Arc<dyn Sink> = client.clone();
    let (included, kept) = (client.clone(), client.clone());
    let options = Options {
        vfs_name: VFS_NAME,
        make_default: true,
        is_included: Box::new(move |path| included.config().protects(path)),
        keeps_local: Box::new(move |path| kept.config().keeps_local(path)),
        open_timeout: OPEN_TIMEOUT,
        log: log::from_shim,
    };
    // SAFETY: the table is SQLite's; the library stays loaded, as the entry point's result demands.
    unsafe { register(table, sink, options) }.map_err(|error| error.to_string())?;
    // SAFETY: the function takes no arguments.
    let host = host::remember(api, client, unsafe { api.libversion_number() })?;
    // SAFETY: SQLite calls it with the arguments of an extension's entry point, whatever the type
    // of the slot says; registering it again changes nothing.
    let code = unsafe {
        api.auto_extension(Some(std::mem::transmute::<ConnectionHook, EntryPoint>(
            on_connection,
        )))
    };
    if code != sqlite::SQLITE_OK {
        return Err(format!("sqlite3_auto_extension returned {code}"));
    }
    if !db.is_null() {
        // SAFETY: SQLite is loading the extension into this connection, on this thread.
        unsafe { install(host, db, false)? };
        functions::tell_unprotected(&Call {
            host,
            db,
            arguments: &[],
            opened_after_load: false,
        });
    }
    Ok(())
}

/// SQLite calls this for each new connection.
unsafe extern "C" fn on_connection(
    db: *mut sqlite3,
    _error: *mut *mut c_char,
    table: *const ApiRoutines,
) -> c_int {
    let installed = catch_unwind(|| -> Result<(), String> {
        // SAFETY: SQLite passes its table to extensions of every kind.
        let api = unsafe { Api::new(table) };
        let host = api.as_ref().ok().and_then(host::host_of);
        let host = host.ok_or("its SQLite did not load durovfs")?;
        // SAFETY: SQLite is opening this connection, on this thread.
        unsafe { install(host, db, true)? };
        functions::tell_unprotected(&Call {
            host,
            db,
            arguments: &[],
            opened_after_load: true,
        });
        Ok(())
    });
    let installed = installed.unwrap_or_else(|_| Err("a bug: a panic".to_owned()));
    if let Err(error) = installed {
        // The database is protected by the VFS all the same: the application must not fail for want
        // of a function that tells it so.
        log::error(format_args!("no SQL functions on a connection: {error}"));
    }
    sqlite::SQLITE_OK
}

/// What the functions of a connection that was opened after the load have as their data; those of
/// the one that the extension was loaded into have none.
static OPENED_AFTER_LOAD: u8 = 1;

/// Gives a connection the functions and the table.
///
/// # Safety
/// `db` is a connection of this host that this thread may use.
unsafe fn install(
    host: &'static Host,
    db: *mut sqlite3,
    opened_after_load: bool,
) -> Result<(), String> {
    let [(name, arguments, function), others @ ..] = &FUNCTIONS[host.index];
    // SAFETY: the name is a constant, the connection is the caller's.
    let code = unsafe { shim::watch(&host.api, db, name, *arguments, *function) };
    if code != sqlite::SQLITE_OK {
        return Err(format!("sqlite3_create_function_v2 returned {code}"));
    }
    let data = match opened_after_load {
        true => (&raw const OPENED_AFTER_LOAD).cast_mut().cast(),
        false => std::ptr::null_mut(),
    };
    for (name, arguments, function) in others {
        let (name, function) = (name.as_ptr(), Some(*function));
        let (arguments, flags) = (*arguments, sqlite::SQLITE_UTF8);
        // SAFETY: the name is a constant, the connection is the caller's.
        let code = unsafe {
            host.api
                .create_function_v2(db, name, arguments, flags, data, function, None, None, None)
        };
        if code != sqlite::SQLITE_OK {
            return Err(format!("sqlite3_create_function_v2 returned {code}"));
        }
    }
    let data: *const Host = host;
    let name = c"durovfs_replicas".as_ptr();
    // SAFETY: name and module are constants, the host lives for ever, the connection is the
    // caller's.
    let code = unsafe {
        host.api
            .create_module_v2(db, name, &MODULE.0, data.cast_mut().cast(), None)
    };
    match code {
        sqlite::SQLITE_OK => Ok(()),
        code => Err(format!("sqlite3_create_module_v2 returned {code}")),
    }
}

/// One call of a SQL function: its arguments, and the connection that it is made on. Lives no
/// longer than the call, and stays on its thread.
pub(crate) struct Call<'a> {
    host: &'static Host,
    db: *mut sqlite3,
    arguments: &'a [*mut sqlite3_value],
    opened_after_load: bool,
}

impl Call<'_> {
    /// The SQLite that calls.
    pub(crate) fn host(&self) -> &'static Host {
        self.host
    }

    /// An argument as text; none for NULL or when it is not there.
    pub(crate) fn text(&self, index: usize) -> Option<String> {
        let value = *self.arguments.get(index)?;
        // SAFETY: SQLite's own values, during the call; the text is copied at once.
        unsafe { text(self.host.api.value_text(value).cast()) }
    }

    /// An argument as a number; none for NULL or when it is not there.
    pub(crate) fn integer(&self, index: usize) -> Option<i64> {
        let value = *self.arguments.get(index)?;
        // SAFETY: SQLite's own values, during the call.
        let is_null = unsafe { self.host.api.value_type(value) } == sqlite::SQLITE_NULL;
        // SAFETY: as above.
        (!is_null).then(|| unsafe { self.host.api.value_int64(value) })
    }

    /// Whether the connection was opened when durovfs was loaded.
    pub(crate) fn is_opened_after_load(&self) -> bool {
        self.opened_after_load
    }

    /// What our VFS says about a database of the connection; none when it did not open it.
    pub(crate) fn file_report(&self, schema: &CStr) -> Option<FileReport> {
        // SAFETY: the connection is this call's.
        unsafe { self.host.api.file_report(self.db, schema) }
    }

    /// Whether the connection has a database of that name.
    pub(crate) fn has_schema(&self, schema: &CStr) -> bool {
        // SAFETY: the connection is this call's.
        unsafe { self.host.api.db_readonly(self.db, schema.as_ptr()) != -1 }
    }

    /// The names of the attached databases that are files.
    pub(crate) fn attached_files(&self) -> Vec<CString> {
        let mut found: Vec<CString> = Vec::new();
        let (sql, data) = (c"PRAGMA database_list", &raw mut found);
        let (callback, none) = (Some(on_database as Callback), std::ptr::null_mut());
        // SAFETY: the connection is this call's; the callback runs within it, with that data. An
        // error leaves the list short: a host may forbid the pragma.
        unsafe {
            let api = &self.host.api;
            api.exec(self.db, sql.as_ptr(), callback, data.cast(), none);
        }
        found
    }

    /// A parameter of the URI that a database was opened with.
    pub(crate) fn uri_parameter(&self, schema: &CStr, key: &CStr) -> Option<String> {
        let api = &self.host.api;
        // SAFETY: the connection is this call's; the name of a database carries its parameters.
        unsafe {
            let name = api.db_filename(self.db, schema.as_ptr());
            (!name.is_null()).then(|| text(api.uri_parameter(name, key.as_ptr())))?
        }
    }

    /// Path of a database; none for one in memory, or a temporary one.
    pub(crate) fn path(&self, schema: &CStr) -> Option<String> {
        // SAFETY: the connection is this call's; the name is copied at once.
        let name = unsafe { text(self.host.api.db_filename(self.db, schema.as_ptr())) };
        name.filter(|name| !name.is_empty())
    }

    /// Name of the VFS below a database.
    pub(crate) fn vfs_name(&self, schema: &CStr) -> Option<String> {
        let mut name: *mut c_char = std::ptr::null_mut();
        let argument: *mut *mut c_char = &raw mut name;
        let api = &self.host.api;
        let operation = sqlite::SQLITE_FCNTL_VFSNAME;
        // SAFETY: the operation stores a string from the host's allocator, or nothing.
        unsafe {
            api.file_control(self.db, schema.as_ptr(), operation, argument.cast());
            let copy = text(name);
            api.free(name.cast());
            copy
        }
    }
}

/// What SQLite calls for each row of a result.
type Callback =
    unsafe extern "C" fn(*mut c_void, c_int, *mut *mut c_char, *mut *mut c_char) -> c_int;

/// A row of `PRAGMA database_list`: number, name, file.
unsafe extern "C" fn on_database(
    data: *mut c_void,
    count: c_int,
    values: *mut *mut c_char,
    _names: *mut *mut c_char,
) -> c_int {
    guarded(|| {
        if count < 3 {
            return sqlite::SQLITE_OK;
        }
        // SAFETY: SQLite passes that many strings; the data is `attached_files`'s own.
        let (name, file, found) = unsafe {
            let (name, file) = (text(*values.add(1)), text(*values.add(2)));
            (name, file, &mut *data.cast::<Vec<CString>>())
        };
        let is_file = file.is_some_and(|file| !file.is_empty());
        let name = name.and_then(|name| CString::new(name).ok());
        found.extend(name.filter(|name| is_file && name.as_c_str() != functions::MAIN));
        sqlite::SQLITE_OK
    })
}

/// A function of SQL: name, number of arguments, what SQLite calls.
type Function = (&'static CStr, c_int, ScalarFn);

/// Each function of one host. Which host a call is from must be known before any function of SQLite
/// can be called, so each host has functions of its own.
const fn functions_of<const HOST: usize>() -> [Function; 8] {
    [
        // The first has the connection as its data, and tells when it ends.
        (c"durovfs_last_error", 0, x_last_error::<HOST>),
        (c"durovfs_status", 0, x_status::<HOST>),
        (c"durovfs_status", 1, x_status::<HOST>),
        (c"durovfs_bookmark", 0, x_bookmark::<HOST>),
        (c"durovfs_bookmark", 1, x_bookmark::<HOST>),
        (c"durovfs_wait", 0, x_wait::<HOST>),
        (c"durovfs_wait", 1, x_wait::<HOST>),
        (c"durovfs_wait", 2, x_wait::<HOST>),
    ]
}

const FUNCTIONS: [[Function; 8]; MAX_HOSTS] = [
    functions_of::<0>(),
    functions_of::<1>(),
    functions_of::<2>(),
    functions_of::<3>(),
];

macro_rules! sql_function {
    ($trampoline:ident, $body:path) => {
        unsafe extern "C" fn $trampoline<const HOST: usize>(
            context: *mut sqlite3_context,
            count: c_int,
            values: *mut *mut sqlite3_value,
        ) {
            // SAFETY: SQLite's own arguments, of a function that was registered with this host.
            unsafe { answer(HOST, context, (count, values), |call| $body(call)) }
        }
    };
}

sql_function!(x_status, functions::status);
sql_function!(x_bookmark, functions::bookmark);
sql_function!(x_wait, functions::wait);
sql_function!(x_last_error, functions::last_error);

/// Runs a function's body and hands its answer to SQLite.
///
/// # Safety
/// The arguments are what SQLite passed to a function that was registered for that host.
unsafe fn answer(
    host_index: usize,
    context: *mut sqlite3_context,
    (count, values): (c_int, *mut *mut sqlite3_value),
    body: impl FnOnce(&Call<'_>) -> Answer,
) {
    // Registered functions have a host; without one there is nothing to answer with.
    let Some(host) = host::host_at(host_index) else {
        return;
    };
    let api = &host.api;
    let answered = catch_unwind(AssertUnwindSafe(|| {
        let arguments = match usize::try_from(count) {
            // SAFETY: SQLite passes that many values.
            Ok(count) if count > 0 => unsafe { std::slice::from_raw_parts(values, count) },
            Ok(_) | Err(_) => &[],
        };
        // SAFETY: SQLite's own context.
        let (db, data) = unsafe { (api.context_db_handle(context), api.user_data(context)) };
        body(&Call {
            host,
            db,
            arguments,
            opened_after_load: data.cast_const() == (&raw const OPENED_AFTER_LOAD).cast(),
        })
    }));
    let bug = || "a bug: a panic in a function".to_owned();
    let answered = answered.unwrap_or_else(|_| Err(bug().into()));
    match answered {
        // SAFETY: the context is this call's; SQLite copies the text.
        Ok(Some(text)) => unsafe {
            api.result_text(context, text.as_ptr().cast(), length_of(&text), TRANSIENT);
        },
        // SAFETY: as above.
        Ok(None) => unsafe { api.result_null(context) },
        Err(error) => {
            let text = format!("durovfs: {}", error.message);
            // SAFETY: as above. The code goes last: the other call sets one too.
            unsafe {
                api.result_error(context, text.as_ptr().cast(), length_of(&text));
                api.result_error_code(context, error.code);
            }
        }
    }
}

/// SQLite counts in `int`; nothing that is said here comes near its end.
fn length_of(text: &str) -> c_int {
    c_int::try_from(text.len()).unwrap_or(0)
}

/// How SQLite scans `durovfs_replicas`. It keeps a pointer to it as long as a connection lives.
struct Module(sqlite3_module);

// SAFETY: constant; SQLite only reads it.
unsafe impl Sync for Module {}

static MODULE: Module = Module(sqlite3_module {
    // No xCreate: the table is there without CREATE VIRTUAL TABLE, and only so.
    xConnect: Some(x_connect),
    xBestIndex: Some(x_best_index),
    xDisconnect: Some(x_disconnect),
    xOpen: Some(x_open_scan),
    xClose: Some(x_close_scan),
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
        let code = unsafe { host.api.declare_vtab(db, replicas::SCHEMA.as_ptr()) };
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

unsafe extern "C" fn x_open_scan(
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

unsafe extern "C" fn x_close_scan(cursor: *mut sqlite3_vtab_cursor) -> c_int {
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
        let file = unsafe { api.file_status(table.db, functions::MAIN) };
        match replicas::rows(&table.host.client, file) {
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
        let value = scan
            .rows
            .get(scan.row)
            .and_then(|row| replicas::column(row, index));
        match value {
            // SAFETY: SQLite's own context; it copies the text.
            Some(replicas::Value::Text(text)) => unsafe {
                let length = length_of(text);
                api.result_text(context, text.as_ptr().cast(), length, TRANSIENT);
            },
            // SAFETY: as above.
            Some(replicas::Value::Number(number)) => unsafe {
                api.result_int64(context, i64::try_from(number).unwrap_or(i64::MAX));
            },
            // SAFETY: as above.
            None => unsafe { api.result_null(context) },
        }
        sqlite::SQLITE_OK
    })
}

/// Starts a thread with all signals blocked: a signal of the host must be handled on one of the
/// host's threads. The new thread inherits the mask, so no signal can reach it first.
///
/// # Errors
/// When the system gives no thread.
pub(crate) fn spawn_without_signals<F>(builder: Builder, body: F) -> io::Result<JoinHandle<()>>
where
    F: FnOnce() + Send + 'static,
{
    // SAFETY: a sigset_t is plain data; both sets live through the calls, which fill them.
    let before = unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        let mut before: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        match libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before) {
            0 => before,
            code => return Err(io::Error::from_raw_os_error(code)),
        }
    };
    let spawned = builder.spawn(body);
    // SAFETY: the set was filled above. The call fails only for an unknown first argument.
    unsafe {
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut());
    }
    spawned
}
