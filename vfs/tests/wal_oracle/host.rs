//! A SQLite library by its table of functions: the bundled one, which is the newest, or the
//! system's, which on Debian 12 is 3.40.1. Both can be in one process.

use durovfs_vfs::ffi::SLOTS;
use durovfs_vfs::{Api, ApiRoutines};
use libsqlite3_sys as sqlite;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::Path;
use std::sync::OnceLock;

/// A SQLite library.
pub struct Host {
    pub table: *const ApiRoutines,
    pub api: Api,
    pub version: c_int,
}

// SAFETY: the table is constant, and lives as long as the process.
unsafe impl Send for Host {}
// SAFETY: as above.
unsafe impl Sync for Host {}

/// Which of the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    Oldest,
    Newest,
}

impl Which {
    pub fn name(self) -> &'static str {
        match self {
            Self::Oldest => "oldest",
            Self::Newest => "newest",
        }
    }

    pub fn host(self) -> &'static Host {
        static OLDEST: OnceLock<Host> = OnceLock::new();
        static NEWEST: OnceLock<Host> = OnceLock::new();
        match self {
            Self::Oldest => OLDEST.get_or_init(|| Host::new(system_table())),
            Self::Newest => NEWEST.get_or_init(|| Host::new(super::common::table())),
        }
    }
}

fn system_table() -> *const ApiRoutines {
    let flags = libc::RTLD_NOW | libc::RTLD_LOCAL;
    // SAFETY: loading SQLite has no other effect.
    let library = unsafe { libc::dlopen(c"libsqlite3.so.0".as_ptr(), flags) };
    assert!(!library.is_null(), "libsqlite3.so.0 is not installed");
    let slots = SLOTS.iter().map(|(_, index)| index + 1).max().unwrap();
    let mut table = vec![std::ptr::null::<c_void>(); slots];
    for (name, index) in SLOTS {
        let symbol = CString::new(format!("sqlite3_{name}")).unwrap();
        // SAFETY: the library stays loaded.
        table[*index] = unsafe { libc::dlsym(library, symbol.as_ptr()) };
        assert!(!table[*index].is_null(), "{name} is not in libsqlite3.so.0");
    }
    Box::leak(table.into_boxed_slice()).as_ptr().cast()
}

impl Host {
    fn new(table: *const ApiRoutines) -> Self {
        // SAFETY: the table is made of the functions of one library, which stays loaded.
        let api = unsafe { Api::new(table) }.expect("a host that the shim takes");
        // SAFETY: finding the default VFS initializes SQLite.
        assert!(!unsafe { api.vfs_find(std::ptr::null()) }.is_null());
        // SAFETY: no arguments.
        let version = unsafe { api.libversion_number() };
        Self {
            table,
            api,
            version,
        }
    }

    /// Whether a savepoint can leave a transaction that could not be recovered (up to 3.49.1).
    pub fn has_savepoint_bug(&self) -> bool {
        self.version < 3_050_000
    }
}

/// Why a statement failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// Extended result code.
    pub code: c_int,
    pub message: String,
}

pub type Rows = Vec<Vec<String>>;

/// A connection.
pub struct Db {
    host: &'static Host,
    handle: *mut sqlite::sqlite3,
}

unsafe extern "C" fn on_row(
    rows: *mut c_void,
    count: c_int,
    values: *mut *mut c_char,
    _names: *mut *mut c_char,
) -> c_int {
    // SAFETY: `run` passes its rows.
    let rows = unsafe { &mut *rows.cast::<Rows>() };
    let value = |index: c_int| {
        // SAFETY: SQLite passes that many strings, null for NULL.
        let text = unsafe { *values.offset(index as isize) };
        if text.is_null() {
            return "NULL".to_owned();
        }
        // SAFETY: a C string of SQLite's.
        unsafe { CStr::from_ptr(text) }
            .to_string_lossy()
            .into_owned()
    };
    rows.push((0..count).map(value).collect());
    0
}

impl Db {
    pub fn open(host: &'static Host, path: &Path, vfs: &CStr) -> Result<Self, Failure> {
        let name = CString::new(path.to_str().unwrap()).unwrap();
        let flags = sqlite::SQLITE_OPEN_READWRITE | sqlite::SQLITE_OPEN_CREATE;
        let mut handle = std::ptr::null_mut();
        // SAFETY: the strings live through the call; the handle is closed by Drop.
        let code = unsafe {
            let name = name.as_ptr();
            host.api.open_v2(name, &raw mut handle, flags, vfs.as_ptr())
        };
        let db = Self { host, handle };
        if code == sqlite::SQLITE_OK {
            Ok(db)
        } else {
            Err(db.failure(code))
        }
    }

    fn failure(&self, code: c_int) -> Failure {
        // SAFETY: the handle is open, and used by this thread only.
        let (extended, message) = unsafe {
            let message = CStr::from_ptr(self.host.api.errmsg(self.handle));
            (
                self.host.api.extended_errcode(self.handle),
                message.to_string_lossy().into_owned(),
            )
        };
        let code = if extended == 0 { code } else { extended };
        Failure { code, message }
    }

    /// Runs statements and returns their rows as text.
    pub fn run(&self, sql: &str) -> Result<Rows, Failure> {
        let text = CString::new(sql).unwrap();
        let mut rows = Rows::new();
        // SAFETY: the string and the rows live through the call.
        let code = unsafe {
            let rows = (&raw mut rows).cast();
            let none = std::ptr::null_mut();
            self.host
                .api
                .exec(self.handle, text.as_ptr(), Some(on_row), rows, none)
        };
        if code == sqlite::SQLITE_OK {
            Ok(rows)
        } else {
            Err(self.failure(code))
        }
    }

    /// Runs what must succeed.
    pub fn must(&self, sql: &str) -> Rows {
        self.run(sql)
            .unwrap_or_else(|failure| panic!("{sql}: {failure:?}"))
    }

    pub fn is_autocommit(&self) -> bool {
        // SAFETY: the handle is open.
        unsafe { self.host.api.get_autocommit(self.handle) != 0 }
    }

    /// The last refusal's line, which `durovfs_last_error()` tells.
    pub fn last_error(&self) -> String {
        // SAFETY: the handle is open, and used by this thread only.
        let status = unsafe { self.host.api.file_status(self.handle, c"main") };
        status.map(|status| status.last_error).unwrap_or_default()
    }
}

impl Drop for Db {
    fn drop(&mut self) {
        // SAFETY: made by `open`; not used after this.
        unsafe { self.host.api.close(self.handle) };
    }
}
