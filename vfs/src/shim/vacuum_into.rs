//! Tells the target of `VACUUM … INTO`, an ordinary file, from a database that an application
//! makes.
//!
//! At `xOpen` both are a new file of an ATTACH. The difference is a statement that runs on this
//! very thread, so the connections of the process are known here: while a connection's mutex is
//! held, its statements may be looked at. `sqlite3_mutex_try` gets a mutex that is free, or that
//! this thread has already; a statement that runs under a free mutex there is none. A connection
//! without a mutex (`SQLITE_OPEN_NOMUTEX`, or SQLite built so, as in its shell) may be in use by
//! another thread: it is looked at when the program has no other. Else the file is protected at
//! first; SQLite tells it its connection before it writes anything, and then that one, which this
//! thread is using, is looked at. What was begun for the copy is taken back; the log that it got
//! stays empty in the cluster.

use crate::ffi::{Api, ScalarFn, text};
use crate::vacuum::is_vacuum_into;
use libsqlite3_sys as sqlite;
use libsqlite3_sys::sqlite3;
use std::ffi::{CStr, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Name of each thread that durovfs starts in the host's process.
pub const OWN_THREAD_NAME: &str = "durovfs";

/// Open connections: their host's key, and their address.
static CONNECTIONS: Mutex<Vec<(usize, usize)>> = Mutex::new(Vec::new());

fn connections() -> MutexGuard<'static, Vec<(usize, usize)>> {
    CONNECTIONS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Gives a connection a SQL function, whose end tells that the connection is closed, and knows the
/// connection until then. Returns SQLite's code for the function.
///
/// # Safety
/// `db` is a connection of this host, used by this thread only until the call returns.
pub unsafe fn watch(
    api: &Api,
    db: *mut sqlite3,
    name: &CStr,
    argument_count: c_int,
    function: ScalarFn,
) -> c_int {
    // SAFETY: the connection is the caller's; SQLite calls `forget` once, with it. If it has the
    // function already it forgets the connection first.
    let code = unsafe {
        api.create_function_v2(
            db,
            name.as_ptr(),
            argument_count,
            sqlite::SQLITE_UTF8,
            db.cast(),
            Some(function),
            None,
            None,
            Some(forget),
        )
    };
    if code == sqlite::SQLITE_OK {
        connections().push((api.host_key(), db as usize));
    }
    code
}

/// The connection ends: SQLite frees it when this returns.
unsafe extern "C" fn forget(db: *mut c_void) {
    // Waits for whoever looks at it.
    let _ = catch_unwind(|| connections().retain(|(_, known)| *known != db as usize));
}

/// Whether this thread is running a `VACUUM … INTO` of this host.
pub(super) fn runs_here(api: &Api) -> bool {
    // Held all along, so that none of them is freed.
    let connections = connections();
    let mut ours = connections
        .iter()
        .filter(|(host, _)| *host == api.host_key());
    // SAFETY: `forget` was not called for them.
    ours.any(|(_, db)| unsafe { runs_on(api, *db as *mut sqlite3) })
}

/// Whether a `VACUUM … INTO` runs on the connection that SQLite tells to a file that it has opened.
///
/// # Safety
/// The argument is that of `SQLITE_FCNTL_PDB`, in a call of SQLite's.
pub(super) unsafe fn opens_copy(api: &Api, argument: *mut c_void) -> bool {
    // SAFETY: a pointer to the connection, or to none; this thread is in a call with it.
    unsafe {
        let db = argument.cast::<*mut sqlite3>().read();
        !db.is_null() && has_running(api, db)
    }
}

/// # Safety
/// The connection is open, and stays so until this returns.
unsafe fn runs_on(api: &Api, db: *mut sqlite3) -> bool {
    // SAFETY: by the caller's promise.
    let mutex = unsafe { api.db_mutex(db) };
    if mutex.is_null() {
        // SAFETY: there is no other thread that could use the connection.
        return is_only_thread() && unsafe { has_running(api, db) };
    }
    // SAFETY: the connection's own mutex.
    if unsafe { api.mutex_try(mutex) } != sqlite::SQLITE_OK {
        return false;
    }
    // SAFETY: with its mutex nobody else changes the list, or a statement in it.
    let found = catch_unwind(AssertUnwindSafe(|| unsafe { has_running(api, db) }));
    // SAFETY: taken above.
    unsafe { api.mutex_leave(mutex) };
    found.unwrap_or(false)
}

/// Whether this is the program's only thread, our own left aside: these never call SQLite, and are
/// known by their name. False where the system does not tell.
fn is_only_thread() -> bool {
    let threads = || -> std::io::Result<bool> {
        let this = std::fs::read_link("/proc/thread-self")?;
        for thread in std::fs::read_dir("/proc/self/task")? {
            let thread = thread?;
            let is_this = this.file_name() == Some(&thread.file_name());
            let name = || std::fs::read_to_string(thread.path().join("comm"));
            if !is_this && name()?.trim_end() != OWN_THREAD_NAME {
                return Ok(false);
            }
        }
        Ok(true)
    };
    threads().unwrap_or(false)
}

/// # Safety
/// This thread holds the connection's mutex, is the only one, or is in a call with the connection.
unsafe fn has_running(api: &Api, db: *mut sqlite3) -> bool {
    // SAFETY: by the caller's promise, here and below.
    let mut statement = unsafe { api.next_stmt(db, std::ptr::null_mut()) };
    while !statement.is_null() {
        // SAFETY: as above; the text lives as long as the statement.
        let is_it = unsafe {
            api.stmt_busy(statement) != 0
                && text(api.sql(statement)).is_some_and(|sql| is_vacuum_into(&sql))
        };
        if is_it {
            return true;
        }
        // SAFETY: as above.
        statement = unsafe { api.next_stmt(db, statement) };
    }
    false
}
