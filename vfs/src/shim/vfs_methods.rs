//! The methods of `sqlite3_vfs`, in SQLite's order: what a file is to us is decided in `x_open`,
//! all else goes to the host's VFS.

use super::file_methods::methods_for;
use super::{Inner, Kind, ShimFile, file_bytes, guarded, host_of, kind_of};
use crate::connection::LogLevel;
use crate::ffi::text;
use crate::mark::note_wal_ended;
use libsqlite3_sys as sqlite;
use libsqlite3_sys::{sqlite3_file, sqlite3_vfs};
use std::ffi::{c_char, c_int, c_void};
use std::path::Path;

pub(super) unsafe extern "C" fn x_open(
    vfs: *mut sqlite3_vfs,
    name: *const c_char,
    file: *mut sqlite3_file,
    flags: c_int,
    out_flags: *mut c_int,
) -> c_int {
    // On failure without methods SQLite does not call xClose.
    // SAFETY: SQLite gives szOsFile bytes.
    unsafe { (*file).pMethods = std::ptr::null() };
    guarded(sqlite::SQLITE_IOERR, || {
        let host = host_of(vfs);
        // SAFETY: szOsFile has room for the host's object behind ours.
        let real = unsafe { file.cast::<u8>().add(file_bytes()) }.cast::<sqlite3_file>();
        // SAFETY: as above; the host sets it when it succeeds.
        unsafe { (*real).pMethods = std::ptr::null() };
        let mut flags_now = flags;
        // The name itself, never a copy: SQLite keeps URI parameters behind it.
        // SAFETY: the arguments are SQLite's own.
        let code = match unsafe { (*host.base).xOpen } {
            // SAFETY: as above.
            Some(open) => unsafe { open(host.base, name, real, flags, &raw mut flags_now) },
            None => sqlite::SQLITE_CANTOPEN,
        };
        if !out_flags.is_null() {
            // SAFETY: SQLite's own variable.
            unsafe { *out_flags = flags_now };
        }
        // SAFETY: set by the host, or null.
        if unsafe { (*real).pMethods }.is_null() {
            return code;
        }
        if code != sqlite::SQLITE_OK {
            call!(real, xClose);
            return code;
        }
        let kind = guarded(Err(sqlite::SQLITE_IOERR), || {
            kind_of(host, name, real, flags_now)
        });
        let kind = match kind {
            Ok(kind) => kind,
            Err(code) => {
                call!(real, xClose);
                return code;
            }
        };
        let mut unprotected_wal_name = 0;
        if let Kind::Unprotected(_) = kind {
            // SAFETY: the name of a main database.
            unprotected_wal_name = unsafe { host.api.filename_wal(name) } as usize;
            host.databases.add_unprotected(unprotected_wal_name);
        }
        let inner = Box::new(Inner {
            host,
            real,
            kind,
            unprotected_wal_name,
            process: std::process::id(),
        });
        let methods = methods_for(host, real);
        // SAFETY: SQLite gives szOsFile bytes, of which ours are the first.
        unsafe {
            (*file.cast::<ShimFile>()).inner = Box::into_raw(inner);
            (*file).pMethods = methods;
        }
        sqlite::SQLITE_OK
    })
}

macro_rules! base_vfs {
    ($vfs:expr, $otherwise:expr, $method:ident $(, $arg:expr)*) => {
        guarded($otherwise, || {
            let base = host_of($vfs).base;
            // SAFETY: the host's own VFS, with SQLite's own arguments.
            match unsafe { (*base).$method } {
                // SAFETY: as above.
                Some(method) => unsafe { method(base $(, $arg)*) },
                None => $otherwise,
            }
        })
    };
}

pub(super) unsafe extern "C" fn x_delete(
    vfs: *mut sqlite3_vfs,
    name: *const c_char,
    sync: c_int,
) -> c_int {
    let code = base_vfs!(vfs, sqlite::SQLITE_IOERR_DELETE, xDelete, name, sync);
    guarded((), || {
        // SAFETY: SQLite's names are C strings.
        let path = unsafe { text(name) };
        let database = path.as_deref().and_then(|path| path.strip_suffix("-wal"));
        if let (sqlite::SQLITE_OK, Some(database)) = (code, database)
            && let Err(refusal) = note_wal_ended(Path::new(database))
        {
            // The next open finds no WAL where the mark says one, and scans the file.
            host_of(vfs).tell(LogLevel::Info, &refusal.message);
        }
    });
    code
}

pub(super) unsafe extern "C" fn x_access(
    vfs: *mut sqlite3_vfs,
    name: *const c_char,
    flags: c_int,
    out: *mut c_int,
) -> c_int {
    base_vfs!(vfs, sqlite::SQLITE_IOERR_ACCESS, xAccess, name, flags, out)
}

pub(super) unsafe extern "C" fn x_full_pathname(
    vfs: *mut sqlite3_vfs,
    name: *const c_char,
    length: c_int,
    out: *mut c_char,
) -> c_int {
    base_vfs!(
        vfs,
        sqlite::SQLITE_CANTOPEN,
        xFullPathname,
        name,
        length,
        out
    )
}

pub(super) unsafe extern "C" fn x_dl_open(
    vfs: *mut sqlite3_vfs,
    name: *const c_char,
) -> *mut c_void {
    base_vfs!(vfs, std::ptr::null_mut(), xDlOpen, name)
}

pub(super) unsafe extern "C" fn x_dl_error(vfs: *mut sqlite3_vfs, length: c_int, out: *mut c_char) {
    base_vfs!(vfs, (), xDlError, length, out);
}

pub(super) type Symbol = Option<unsafe extern "C" fn(*mut sqlite3_vfs, *mut c_void, *const c_char)>;

pub(super) unsafe extern "C" fn x_dl_sym(
    vfs: *mut sqlite3_vfs,
    handle: *mut c_void,
    name: *const c_char,
) -> Symbol {
    base_vfs!(vfs, None, xDlSym, handle, name)
}

pub(super) unsafe extern "C" fn x_dl_close(vfs: *mut sqlite3_vfs, handle: *mut c_void) {
    base_vfs!(vfs, (), xDlClose, handle);
}

pub(super) unsafe extern "C" fn x_randomness(
    vfs: *mut sqlite3_vfs,
    bytes: c_int,
    out: *mut c_char,
) -> c_int {
    base_vfs!(vfs, 0, xRandomness, bytes, out)
}

pub(super) unsafe extern "C" fn x_sleep(vfs: *mut sqlite3_vfs, micros: c_int) -> c_int {
    base_vfs!(vfs, 0, xSleep, micros)
}

pub(super) unsafe extern "C" fn x_current_time(vfs: *mut sqlite3_vfs, out: *mut f64) -> c_int {
    base_vfs!(vfs, sqlite::SQLITE_ERROR, xCurrentTime, out)
}

pub(super) unsafe extern "C" fn x_get_last_error(
    vfs: *mut sqlite3_vfs,
    length: c_int,
    out: *mut c_char,
) -> c_int {
    base_vfs!(vfs, 0, xGetLastError, length, out)
}

pub(super) unsafe extern "C" fn x_current_time_int64(
    vfs: *mut sqlite3_vfs,
    out: *mut i64,
) -> c_int {
    base_vfs!(vfs, sqlite::SQLITE_ERROR, xCurrentTimeInt64, out)
}

pub(super) unsafe extern "C" fn x_set_system_call(
    vfs: *mut sqlite3_vfs,
    name: *const c_char,
    call: sqlite::sqlite3_syscall_ptr,
) -> c_int {
    base_vfs!(vfs, sqlite::SQLITE_NOTFOUND, xSetSystemCall, name, call)
}

pub(super) unsafe extern "C" fn x_get_system_call(
    vfs: *mut sqlite3_vfs,
    name: *const c_char,
) -> sqlite::sqlite3_syscall_ptr {
    base_vfs!(vfs, None, xGetSystemCall, name)
}

pub(super) unsafe extern "C" fn x_next_system_call(
    vfs: *mut sqlite3_vfs,
    name: *const c_char,
) -> *const c_char {
    base_vfs!(vfs, std::ptr::null(), xNextSystemCall, name)
}
