//! `libdurovfs`: what a SQLite loads. Registers the VFS and the SQL functions, and talks to the
//! sidecar. No function of SQLite is linked: all go through the table that the host hands over.

pub mod client;
pub mod config;
mod functions;
mod host;
pub mod log;
mod replicas;
mod signals;
pub mod status;

use durovfs_vfs::{Api, ApiRoutines};
use libsqlite3_sys as sqlite;
use libsqlite3_sys::sqlite3;
use std::ffi::{c_char, c_int};
use std::panic::catch_unwind;

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
    let loaded = catch_unwind(|| unsafe { host::load(db, table) })
        .unwrap_or_else(|_| Err("durovfs has a bug: a panic while it was loaded".to_owned()));
    let Err(text) = loaded else {
        // The VFS and the runtime thread are in use until the process ends.
        return sqlite::SQLITE_OK_LOAD_PERMANENTLY;
    };
    // SAFETY: by the caller's promise; SQLite frees what is stored there.
    unsafe {
        match Api::new(table) {
            Some(api) if !error.is_null() => *error = api.copy_text(&text),
            Some(_) | None => {}
        }
    }
    sqlite::SQLITE_ERROR
}
