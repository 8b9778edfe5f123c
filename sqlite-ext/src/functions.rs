//! The SQL functions: arguments in, answers out. What they say is made in `status.rs`.

use crate::host::{Host, MAX_HOSTS, host};
use crate::status;
use durovfs_vfs::ffi::{ScalarFn, text};
use durovfs_vfs::{ApiRoutines, FileStatus};
use durovfs_wire::Bookmark;
use libsqlite3_sys as sqlite;
use libsqlite3_sys::{sqlite3, sqlite3_context, sqlite3_value};
use std::ffi::{CStr, CString, c_char, c_int};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::Duration;

/// An entry point with the arguments that SQLite passes.
pub(crate) type EntryPoint =
    unsafe extern "C" fn(*mut sqlite3, *mut *mut c_char, *const ApiRoutines) -> c_int;

/// `SQLITE_TRANSIENT`: SQLite copies the text.
const TRANSIENT: isize = -1;
const MAIN: &CStr = c"main";

/// Each function of one host, with the numbers of arguments that it takes. Which host a call is from
/// must be known before any function of SQLite can be called, so each host has functions of its own.
const fn functions_of<const HOST: usize>() -> [(&'static CStr, c_int, ScalarFn); 8] {
    [
        (c"durovfs_status", 0, x_status::<HOST>),
        (c"durovfs_status", 1, x_status::<HOST>),
        (c"durovfs_bookmark", 0, x_bookmark::<HOST>),
        (c"durovfs_bookmark", 1, x_bookmark::<HOST>),
        (c"durovfs_wait", 0, x_wait::<HOST>),
        (c"durovfs_wait", 1, x_wait::<HOST>),
        (c"durovfs_wait", 2, x_wait::<HOST>),
        (c"durovfs_last_error", 0, x_last_error::<HOST>),
    ]
}

const FUNCTIONS: [[(&CStr, c_int, ScalarFn); 8]; MAX_HOSTS] = [
    functions_of::<0>(),
    functions_of::<1>(),
    functions_of::<2>(),
    functions_of::<3>(),
];

unsafe extern "C" fn x_status<const HOST: usize>(
    context: *mut sqlite3_context,
    count: c_int,
    values: *mut *mut sqlite3_value,
) {
    // SAFETY: SQLite's own arguments.
    unsafe { answer(HOST, context, (count, values), |call| call.status()) }
}

unsafe extern "C" fn x_bookmark<const HOST: usize>(
    context: *mut sqlite3_context,
    count: c_int,
    values: *mut *mut sqlite3_value,
) {
    // SAFETY: SQLite's own arguments.
    unsafe { answer(HOST, context, (count, values), |call| call.bookmark()) }
}

unsafe extern "C" fn x_wait<const HOST: usize>(
    context: *mut sqlite3_context,
    count: c_int,
    values: *mut *mut sqlite3_value,
) {
    // SAFETY: SQLite's own arguments.
    unsafe { answer(HOST, context, (count, values), |call| call.wait()) }
}

unsafe extern "C" fn x_last_error<const HOST: usize>(
    context: *mut sqlite3_context,
    count: c_int,
    values: *mut *mut sqlite3_value,
) {
    // SAFETY: SQLite's own arguments.
    unsafe { answer(HOST, context, (count, values), |call| Ok(call.last_error())) }
}

/// Gives a connection the functions.
///
/// # Safety
/// `db` is a connection of this host that this thread may use.
pub(crate) unsafe fn install(host: &Host, db: *mut sqlite3) -> Result<(), String> {
    for (name, arguments, function) in &FUNCTIONS[host.index] {
        // SAFETY: the name is a constant, the connection is the caller's.
        let code = unsafe {
            host.api.create_function_v2(
                db,
                name.as_ptr(),
                *arguments,
                sqlite::SQLITE_UTF8,
                std::ptr::null_mut(),
                Some(*function),
                None,
                None,
                None,
            )
        };
        if code != sqlite::SQLITE_OK {
            return Err(format!("sqlite3_create_function_v2 returned {code}"));
        }
    }
    Ok(())
}

/// Why the connection that loads the extension is not protected, when it should be.
///
/// # Safety
/// `db` is a connection of this host that this thread may use.
pub(crate) unsafe fn opened_too_early(host: &Host, db: *mut sqlite3) -> Option<String> {
    let call = Call {
        host,
        db,
        arguments: &[],
    };
    let path = call.path(MAIN)?;
    let is_meant = host.client.config().protects(Path::new(&path));
    (is_meant && call.file_status(MAIN).is_none()).then(|| call.why_unprotected(MAIN))
}

/// One call of a function.
struct Call<'a> {
    host: &'a Host,
    db: *mut sqlite3,
    arguments: &'a [*mut sqlite3_value],
}

impl Call<'_> {
    /// An argument as text; none for NULL or when it is not there.
    fn text(&self, index: usize) -> Option<String> {
        let value = *self.arguments.get(index)?;
        // SAFETY: SQLite's own values, during the call; the text is copied at once.
        unsafe { text(self.host.api.value_text(value).cast()) }
    }

    /// An argument as a number; none for NULL or when it is not there.
    fn integer(&self, index: usize) -> Option<i64> {
        let value = *self.arguments.get(index)?;
        // SAFETY: SQLite's own values, during the call.
        let is_null = unsafe { self.host.api.value_type(value) } == sqlite::SQLITE_NULL;
        // SAFETY: as above.
        (!is_null).then(|| unsafe { self.host.api.value_int64(value) })
    }

    fn file_status(&self, schema: &CStr) -> Option<FileStatus> {
        // SAFETY: the connection is this call's.
        unsafe { self.host.api.file_status(self.db, schema) }
    }

    fn protected_file(&self) -> Result<FileStatus, String> {
        self.file_status(MAIN)
            .ok_or_else(|| self.why_unprotected(MAIN))
    }

    /// Path of the database; none for one in memory, or a temporary one.
    fn path(&self, schema: &CStr) -> Option<String> {
        // SAFETY: the connection is this call's; the name is copied at once.
        let name = unsafe { text(self.host.api.db_filename(self.db, schema.as_ptr())) };
        name.filter(|name| !name.is_empty())
    }

    /// Name of the VFS below a database: ours says so.
    fn vfs_name(&self, schema: &CStr) -> Option<String> {
        let mut name: *mut c_char = std::ptr::null_mut();
        let argument: *mut *mut c_char = &raw mut name;
        // SAFETY: the operation stores a string from the host's allocator, or nothing.
        unsafe {
            let api = &self.host.api;
            let operation = sqlite::SQLITE_FCNTL_VFSNAME;
            api.file_control(self.db, schema.as_ptr(), operation, argument.cast());
            let copy = text(name);
            api.free(name.cast());
            copy
        }
    }

    fn why_unprotected(&self, schema: &CStr) -> String {
        let name = schema.to_string_lossy();
        let Some(path) = self.path(schema) else {
            return format!(
                "database {name:?} is not protected: it is in memory, temporary, or not there"
            );
        };
        let config = self.host.client.config();
        if !config.protects(Path::new(&path)) {
            let file = config.file.display();
            return format!(
                "{path} is not protected: the client configuration {file} leaves it out"
            );
        }
        let vfs = self
            .vfs_name(schema)
            .unwrap_or_else(|| "unknown".to_owned());
        format!(
            "{path} is not protected: this connection was opened before durovfs was loaded, or \
             with another VFS ({vfs}); close it and open it again"
        )
    }

    fn last_error(&self) -> Option<String> {
        let of_file = self.file_status(MAIN).map(|file| file.last_error);
        let mut lines = of_file
            .into_iter()
            .chain(std::iter::once(durovfs_vfs::shim::last_open_refusal()));
        lines.find(|line| !line.is_empty())
    }

    fn status(&self) -> Result<Option<String>, String> {
        let schema = self.text(0).unwrap_or_else(|| "main".to_owned());
        let schema = CString::new(schema).map_err(|_| "schema name with a zero byte".to_owned())?;
        let host = self.host;
        let report = match self.file_status(&schema) {
            Some(file) => status::protected(&host.client, &file, &host.version),
            None => {
                let reason = self.why_unprotected(&schema);
                status::unprotected(
                    &host.client,
                    reason,
                    (&host.version, host.version_number),
                    self.last_error(),
                )
            }
        };
        serde_json::to_string(&report)
            .map(Some)
            .map_err(|error| error.to_string())
    }

    fn bookmark(&self) -> Result<Option<String>, String> {
        let file = self.protected_file()?;
        let bookmark = match self.text(0) {
            Some(when) => Some(status::find_bookmark(&self.host.client, &file, &when)?),
            None => status::newest_bookmark(&file),
        };
        Ok(bookmark.map(|bookmark| bookmark.to_string()))
    }

    fn wait(&self) -> Result<Option<String>, String> {
        let file = self.protected_file()?;
        let Some(bookmark) = self.text(0) else {
            // In the mode `quorum` each COMMIT has waited already.
            return Ok(status::newest_bookmark(&file).map(|bookmark| bookmark.to_string()));
        };
        let bookmark: Bookmark = bookmark.parse().map_err(|error| format!("{error}"))?;
        let milliseconds = match self.integer(1) {
            Some(number) => {
                u64::try_from(number).map_err(|_| format!("timeout {number} is below zero"))?
            }
            None => file.timeout_ms,
        };
        let timeout = (milliseconds != 0).then(|| Duration::from_millis(milliseconds));
        let reached = status::wait_for(&self.host.client, bookmark, timeout, || {
            self.protected_file()
        })?;
        Ok(Some(reached.to_string()))
    }
}

/// Runs a function's body and hands its answer to SQLite; no panic leaves it.
///
/// # Safety
/// The arguments are what SQLite passed to a function that was registered for that host.
unsafe fn answer(
    host_index: usize,
    context: *mut sqlite3_context,
    (count, values): (c_int, *mut *mut sqlite3_value),
    body: impl FnOnce(&Call<'_>) -> Result<Option<String>, String>,
) {
    // Registered functions have a host; without one there is nothing to answer with.
    let Some(host) = host(host_index) else { return };
    let api = &host.api;
    let answered = catch_unwind(AssertUnwindSafe(|| {
        let arguments = match usize::try_from(count) {
            // SAFETY: SQLite passes that many values.
            Ok(count) if count > 0 => unsafe { std::slice::from_raw_parts(values, count) },
            Ok(_) | Err(_) => &[],
        };
        // SAFETY: SQLite's own context.
        let db = unsafe { api.context_db_handle(context) };
        body(&Call {
            host,
            db,
            arguments,
        })
    }));
    let answered = answered.unwrap_or_else(|_| Err("a bug: a panic in a function".to_owned()));
    // A status is far below 2 GiB; the limit is SQLite's own.
    let length = |text: &str| c_int::try_from(text.len()).unwrap_or(0);
    match answered {
        // SAFETY: the context is this call's; SQLite copies the text.
        Ok(Some(text)) => unsafe {
            api.result_text(context, text.as_ptr().cast(), length(&text), TRANSIENT);
        },
        // SAFETY: as above.
        Ok(None) => unsafe { api.result_null(context) },
        Err(error) => {
            let error = format!("durovfs: {error}");
            // SAFETY: as above.
            unsafe { api.result_error(context, error.as_ptr().cast(), length(&error)) }
        }
    }
}
