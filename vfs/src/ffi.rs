//! The host's SQLite, as the table of function pointers that it hands to an extension.
//!
//! The table's slots are addressed by index, in the order of `sqlite3ext.h` (a test compares them),
//! because `libsqlite3-sys` has the type opaque here, and an older host's table is shorter than a
//! new header's. Nothing here links SQLite: each host in the process has its own table.

use crate::connection::{FileReport, FileStatus};
use libsqlite3_sys::{
    sqlite3, sqlite3_callback, sqlite3_context, sqlite3_module, sqlite3_mutex, sqlite3_stmt,
    sqlite3_value, sqlite3_vfs,
};
use std::ffi::{CStr, CString, c_char, c_int, c_uchar, c_void};

/// `sqlite3_api_routines` of the host. Never made here.
#[repr(C)]
pub struct ApiRoutines {
    _opaque: [u8; 0],
}

/// Number of the file control that asks a database file for its [`FileReport`]: above the
/// million that SQLite keeps for itself, and no other VFS's ("DUR1").
pub const FCNTL_REPORT: c_int = 0x4455_5231;

/// A scalar function of SQL.
pub type ScalarFn = unsafe extern "C" fn(*mut sqlite3_context, c_int, *mut *mut sqlite3_value);
/// What frees a value.
pub type Destructor = unsafe extern "C" fn(*mut c_void);
/// An entry point of an extension, as `auto_extension` takes it.
pub type EntryPoint = unsafe extern "C" fn();

/// The oldest SQLite that can be served: the first whose table has all slots.
const OLDEST_VERSION: c_int = 3_037_000;

/// Why a SQLite cannot be served. Nothing of it is protected then.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HostProblem {
    /// It handed over no table of functions.
    #[error("this SQLite cannot load extensions: it hands over no functions")]
    NoTable,
    /// Its version is below [`OLDEST_VERSION`].
    #[error(
        "SQLite {0} of this program is too old, nothing is protected: run the program with SQLite \
         3.37 or newer"
    )]
    TooOld(String),
    /// It was built without a function.
    #[error(
        "this SQLite was built without sqlite3_{0}, nothing is protected: run the program with one \
         that was built whole"
    )]
    Lacks(&'static str),
}

/// The table of one host. Copying it is cheap; it is valid as long as the host's library is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Api {
    table: *const ApiRoutines,
}

// SAFETY: the table is constant once the host is initialized.
unsafe impl Send for Api {}
// SAFETY: as above.
unsafe impl Sync for Api {}

macro_rules! slots {
    ($(
        $(#[$doc:meta])*
        $name:ident = $index:literal ($($arg:ident: $type:ty),*) $(-> $ret:ty)?;
    )*) => {
        /// Slots that the shim or the extension calls: name in `sqlite3ext.h`, index.
        pub const SLOTS: &[(&str, usize)] = &[
            $((stringify!($name), $index),)*
            ("log", LOG_SLOT), ("mprintf", MPRINTF_SLOT),
        ];

        impl Api {
            $(
                $(#[$doc])*
                ///
                /// # Safety
                /// As SQLite's documentation of the function demands of its arguments.
                #[allow(clippy::too_many_arguments, reason = "the signature is SQLite's")]
                pub unsafe fn $name(&self, $($arg: $type),*) $(-> $ret)? {
                    // SAFETY: `new` found the slot filled, and the index is the header's.
                    let function = unsafe {
                        std::mem::transmute::<
                            unsafe extern "C" fn(),
                            unsafe extern "C" fn($($type),*) $(-> $ret)?,
                        >(self.slot($index))
                    };
                    // SAFETY: the caller keeps SQLite's rules.
                    unsafe { function($($arg),*) }
                }
            )*
        }
    };
}

// What hosts are told apart by, and a version before it is known that the table is long enough.
const LIBVERSION_SLOT: usize = 66;
const LIBVERSION_NUMBER_SLOT: usize = 67;
const VFS_REGISTER_SLOT: usize = 142;
const LOG_SLOT: usize = 167;
const MPRINTF_SLOT: usize = 69;

slots! {
    /// `sqlite3_auto_extension`.
    auto_extension = 192 (entry: Option<EntryPoint>) -> c_int;
    /// `sqlite3_cancel_auto_extension`.
    cancel_auto_extension = 195 (entry: Option<EntryPoint>) -> c_int;
    /// `sqlite3_close`.
    close = 16 (db: *mut sqlite3) -> c_int;
    /// `sqlite3_context_db_handle`.
    context_db_handle = 149 (context: *mut sqlite3_context) -> *mut sqlite3;
    /// `sqlite3_create_function_v2`.
    create_function_v2 = 162 (
        db: *mut sqlite3, name: *const c_char, argument_count: c_int, flags: c_int,
        data: *mut c_void, function: Option<ScalarFn>, step: Option<ScalarFn>,
        finish: Option<unsafe extern "C" fn(*mut sqlite3_context)>, destroy: Option<Destructor>
    ) -> c_int;
    /// `sqlite3_create_module_v2`.
    create_module_v2 = 119 (
        db: *mut sqlite3, name: *const c_char, module: *const sqlite3_module, data: *mut c_void,
        destroy: Option<Destructor>
    ) -> c_int;
    /// `sqlite3_db_filename`.
    db_filename = 180 (db: *mut sqlite3, schema: *const c_char) -> *const c_char;
    /// `sqlite3_db_readonly`.
    db_readonly = 181 (db: *mut sqlite3, schema: *const c_char) -> c_int;
    /// `sqlite3_db_mutex`; null when the connection has none.
    db_mutex = 164 (db: *mut sqlite3) -> *mut sqlite3_mutex;
    /// `sqlite3_declare_vtab`.
    declare_vtab = 50 (db: *mut sqlite3, sql: *const c_char) -> c_int;
    /// `sqlite3_errmsg`.
    errmsg = 53 (db: *mut sqlite3) -> *const c_char;
    /// `sqlite3_errstr`.
    errstr = 183 (code: c_int) -> *const c_char;
    /// `sqlite3_exec`.
    exec = 55 (
        db: *mut sqlite3, sql: *const c_char, callback: sqlite3_callback, data: *mut c_void,
        message: *mut *mut c_char
    ) -> c_int;
    /// `sqlite3_extended_errcode`.
    extended_errcode = 166 (db: *mut sqlite3) -> c_int;
    /// `sqlite3_file_control`.
    file_control = 127 (
        db: *mut sqlite3, schema: *const c_char, operation: c_int, argument: *mut c_void
    ) -> c_int;
    /// `sqlite3_filename_wal`.
    filename_wal = 248 (name: *const c_char) -> *const c_char;
    /// `sqlite3_free`.
    free = 58 (memory: *mut c_void);
    /// `sqlite3_get_autocommit`.
    get_autocommit = 60 (db: *mut sqlite3) -> c_int;
    /// `sqlite3_libversion`.
    libversion = 66 () -> *const c_char;
    /// `sqlite3_libversion_number`.
    libversion_number = 67 () -> c_int;
    /// `sqlite3_malloc64`.
    malloc64 = 197 (bytes: u64) -> *mut c_void;
    /// `sqlite3_mutex_leave`.
    mutex_leave = 133 (mutex: *mut sqlite3_mutex);
    /// `sqlite3_mutex_try`.
    mutex_try = 134 (mutex: *mut sqlite3_mutex) -> c_int;
    /// `sqlite3_next_stmt`.
    next_stmt = 152 (db: *mut sqlite3, after: *mut sqlite3_stmt) -> *mut sqlite3_stmt;
    /// `sqlite3_open_v2`.
    open_v2 = 135 (
        name: *const c_char, db: *mut *mut sqlite3, flags: c_int, vfs: *const c_char
    ) -> c_int;
    /// `sqlite3_result_double`.
    result_double = 79 (context: *mut sqlite3_context, value: f64);
    /// `sqlite3_result_error`.
    result_error = 80 (context: *mut sqlite3_context, text: *const c_char, length: c_int);
    /// `sqlite3_result_error_code`.
    result_error_code = 146 (context: *mut sqlite3_context, code: c_int);
    /// `sqlite3_result_int`.
    result_int = 82 (context: *mut sqlite3_context, value: c_int);
    /// `sqlite3_result_int64`.
    result_int64 = 83 (context: *mut sqlite3_context, value: i64);
    /// `sqlite3_result_null`.
    result_null = 84 (context: *mut sqlite3_context);
    /// `sqlite3_result_text`; a destructor of -1 (`SQLITE_TRANSIENT`) has SQLite copy the text.
    result_text = 85 (
        context: *mut sqlite3_context, text: *const c_char, length: c_int, destructor: isize
    );
    /// `sqlite3_sql`.
    sql = 153 (statement: *mut sqlite3_stmt) -> *const c_char;
    /// `sqlite3_stmt_busy`.
    stmt_busy = 184 (statement: *mut sqlite3_stmt) -> c_int;
    /// `sqlite3_uri_boolean`.
    uri_boolean = 187 (name: *const c_char, key: *const c_char, default: c_int) -> c_int;
    /// `sqlite3_uri_parameter`.
    uri_parameter = 189 (name: *const c_char, key: *const c_char) -> *const c_char;
    /// `sqlite3_user_data`.
    user_data = 101 (context: *mut sqlite3_context) -> *mut c_void;
    /// `sqlite3_value_bytes`.
    value_bytes = 103 (value: *mut sqlite3_value) -> c_int;
    /// `sqlite3_value_int64`.
    value_int64 = 107 (value: *mut sqlite3_value) -> i64;
    /// `sqlite3_value_text`.
    value_text = 109 (value: *mut sqlite3_value) -> *const c_uchar;
    /// `sqlite3_value_type`.
    value_type = 113 (value: *mut sqlite3_value) -> c_int;
    /// `sqlite3_vfs_find`.
    vfs_find = 141 (name: *const c_char) -> *mut sqlite3_vfs;
    /// `sqlite3_vfs_register`.
    vfs_register = 142 (vfs: *mut sqlite3_vfs, make_default: c_int) -> c_int;
    /// `sqlite3_vfs_unregister`.
    vfs_unregister = 143 (vfs: *mut sqlite3_vfs) -> c_int;
}

impl Api {
    /// The table that a host handed over.
    ///
    /// # Errors
    /// When the host cannot be served.
    ///
    /// # Safety
    /// `table` is the `sqlite3_api_routines` that SQLite passed to an extension's entry point.
    pub unsafe fn new(table: *const ApiRoutines) -> Result<Self, HostProblem> {
        let api = Self { table };
        if table.is_null() {
            return Err(HostProblem::NoTable);
        }
        // SAFETY: by the caller's promise; the slots are older than any host.
        let version = unsafe {
            api.raw(LIBVERSION_NUMBER_SLOT)
                .and(api.raw(LIBVERSION_SLOT))
        };
        if version.is_none() {
            return Err(HostProblem::NoTable);
        }
        // What lies behind the table of an older host must not be read.
        // SAFETY: the slot was just found filled.
        if unsafe { api.libversion_number() } < OLDEST_VERSION {
            return Err(HostProblem::TooOld(api.version()));
        }
        // SAFETY: every index is below the end of a 3.37 table.
        let empty = SLOTS
            .iter()
            .find(|(_, index)| unsafe { api.raw(*index) }.is_none());
        match empty {
            Some((name, _)) => Err(HostProblem::Lacks(name)),
            None => Ok(api),
        }
    }

    /// Stores the line of a failed load where an entry point has it. Also for a host that cannot be
    /// served: one that is too old has this much.
    ///
    /// # Safety
    /// The arguments are those that SQLite passed to an extension's entry point.
    pub unsafe fn store_error(table: *const ApiRoutines, error: *mut *mut c_char, line: &str) {
        let api = Self { table };
        // SAFETY: by the caller's promise; the slot is older than any host.
        if table.is_null() || error.is_null() || unsafe { api.raw(MPRINTF_SLOT) }.is_none() {
            return;
        }
        // SAFETY: SQLite's own place; it frees what is stored there.
        unsafe { *error = api.copy_text(line) };
    }

    unsafe fn raw(&self, index: usize) -> Option<unsafe extern "C" fn()> {
        // SAFETY: the caller's index lies within the host's table, an array of function pointers.
        unsafe {
            *self
                .table
                .cast::<Option<unsafe extern "C" fn()>>()
                .add(index)
        }
    }

    unsafe fn slot(&self, index: usize) -> unsafe extern "C" fn() {
        // SAFETY: `new` found all indices in use filled.
        match unsafe { self.raw(index) } {
            Some(function) => function,
            // `new` made sure of it; going on would jump to address zero in the host's process.
            None => std::process::abort(),
        }
    }

    /// What tells hosts of one process apart: where their `sqlite3_vfs_register` is.
    pub fn host_key(&self) -> usize {
        // SAFETY: `new` found the slot filled.
        (unsafe { self.slot(VFS_REGISTER_SLOT) }) as usize
    }

    /// Writes a line to the host's error log (`sqlite3_log`).
    pub fn log(&self, code: c_int, line: &str) {
        type Log = unsafe extern "C" fn(c_int, *const c_char, ...);
        let Ok(line) = CString::new(line) else { return };
        // SAFETY: the slot is the header's `log`, with this signature.
        let log =
            unsafe { std::mem::transmute::<unsafe extern "C" fn(), Log>(self.slot(LOG_SLOT)) };
        // SAFETY: one `%s`, one string that lives through the call.
        unsafe { log(code, c"%s".as_ptr(), line.as_ptr()) }
    }

    /// A copy of the text in the host's memory; null when there is none left, or the text has a
    /// zero byte.
    pub fn copy_text(&self, text: &str) -> *mut c_char {
        type Mprintf = unsafe extern "C" fn(*const c_char, ...) -> *mut c_char;
        let Ok(text) = CString::new(text) else {
            return std::ptr::null_mut();
        };
        // SAFETY: the slot is the header's `mprintf`, with this signature.
        let mprintf = unsafe {
            std::mem::transmute::<unsafe extern "C" fn(), Mprintf>(self.slot(MPRINTF_SLOT))
        };
        // SAFETY: one `%s`, one string that lives through the call.
        unsafe { mprintf(c"%s".as_ptr(), text.as_ptr()) }
    }

    /// The host's version, as text.
    pub fn version(&self) -> String {
        // SAFETY: the host returns a constant string.
        unsafe { text(self.libversion()) }.unwrap_or_default()
    }

    /// Asks the database `schema` of a connection what it is to durovfs; none when it was not
    /// opened through our VFS.
    ///
    /// # Safety
    /// `db` is an open connection of this host, used by this thread only until the call returns.
    pub unsafe fn file_report(&self, db: *mut sqlite3, schema: &CStr) -> Option<FileReport> {
        let mut report: Option<FileReport> = None;
        let argument: *mut Option<FileReport> = &raw mut report;
        // SAFETY: our VFS alone knows the operation, and takes the argument for what it is.
        let code = unsafe { self.file_control(db, schema.as_ptr(), FCNTL_REPORT, argument.cast()) };
        report.filter(|_| code == libsqlite3_sys::SQLITE_OK)
    }

    /// The status of the database `schema` of a connection; none when it is not protected.
    ///
    /// # Safety
    /// As of [`Api::file_report`].
    pub unsafe fn file_status(&self, db: *mut sqlite3, schema: &CStr) -> Option<FileStatus> {
        // SAFETY: by the caller's promise.
        match unsafe { self.file_report(db, schema) }? {
            FileReport::Protected(status) => Some(*status),
            FileReport::Unprotected(_) => None,
        }
    }
}

/// A C string as text; none when it is null or not UTF-8.
///
/// # Safety
/// `pointer` is null or points to a string that ends with a zero byte.
pub unsafe fn text(pointer: *const c_char) -> Option<String> {
    if pointer.is_null() {
        return None;
    }
    // SAFETY: by the caller's promise.
    unsafe { CStr::from_ptr(pointer) }
        .to_str()
        .ok()
        .map(str::to_owned)
}
