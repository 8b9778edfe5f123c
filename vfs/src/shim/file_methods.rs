//! The methods of `sqlite3_io_methods`, in SQLite's order. Plain files, and all that is not about
//! the content of a protected database, pass through.

use super::{Host, Inner, Kind, ShimFile, guarded, locked, vacuum_into};
use crate::FileReport;
use crate::connection::{Connection, LogLevel};
use crate::error::Refusal;
use crate::ffi::{FCNTL_REPORT, text};
use crate::pragma::PragmaAnswer;
use crate::write_lock::{HEADERS_BYTES, IndexEnd};
use libsqlite3_sys as sqlite;
use libsqlite3_sys::{sqlite3_file, sqlite3_io_methods};
use std::ffi::{c_char, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;

/// Index of the WAL's write lock among the locks of `xShmLock`.
const WAL_WRITE_LOCK: c_int = 0;
/// Bytes of a region of the wal-index.
const SHM_REGION_BYTES: c_int = 32768;
pub(super) fn methods_for(
    host: &'static Host,
    real: *mut sqlite3_file,
) -> *const sqlite3_io_methods {
    // SAFETY: the host opened the file.
    let base_table = unsafe { (*real).pMethods };
    let mut tables = locked(&host.methods);
    let table = tables.entry(base_table as usize).or_insert_with(|| {
        // SAFETY: the host's tables are constants of its library.
        let base = unsafe { &*base_table };
        let version = base.iVersion.min(3);
        let shm = version >= 2 && base.xShmMap.is_some();
        let fetch = version >= 3 && base.xFetch.is_some();
        let table = sqlite3_io_methods {
            iVersion: version,
            xClose: Some(x_close),
            xRead: Some(x_read),
            xWrite: Some(x_write),
            xTruncate: Some(x_truncate),
            xSync: Some(x_sync),
            xFileSize: Some(x_file_size),
            xLock: Some(x_lock),
            xUnlock: Some(x_unlock),
            xCheckReservedLock: Some(x_check_reserved_lock),
            xFileControl: Some(x_file_control),
            xSectorSize: Some(x_sector_size),
            xDeviceCharacteristics: Some(x_device_characteristics),
            xShmMap: if shm { Some(x_shm_map) } else { None },
            xShmLock: if shm { Some(x_shm_lock) } else { None },
            xShmBarrier: if shm { Some(x_shm_barrier) } else { None },
            xShmUnmap: if shm { Some(x_shm_unmap) } else { None },
            xFetch: if fetch { Some(x_fetch) } else { None },
            xUnfetch: if fetch { Some(x_unfetch) } else { None },
        };
        // Never freed: one per kind of file that the host has.
        Box::leak(Box::new(table)) as *const sqlite3_io_methods as usize
    });
    *table as *const sqlite3_io_methods
}

/// Runs a file method's body; after a panic the database takes no further write.
fn with_file(file: *mut sqlite3_file, body: impl FnOnce(&Inner) -> c_int) -> c_int {
    // SAFETY: SQLite calls our methods on files that `x_open` made, until it closed them.
    let inner = unsafe { &*(*file.cast::<ShimFile>()).inner };
    catch_unwind(AssertUnwindSafe(|| body(inner))).unwrap_or_else(|_| {
        if let Kind::Database(connection) | Kind::Wal(connection) = &inner.kind {
            locked(connection).poison("durovfs has a bug: a panic in the shim");
        }
        sqlite::SQLITE_IOERR
    })
}

fn code_of(result: Result<(), Refusal>) -> c_int {
    match result {
        Ok(()) => sqlite::SQLITE_OK,
        Err(refusal) => refusal.code(),
    }
}

impl Inner {
    /// Connections do not survive a fork: the child would write with its parent's view.
    fn is_inherited(&self) -> bool {
        std::process::id() != self.process
            && !matches!(self.kind, Kind::Plain | Kind::Unprotected(_))
    }
}

pub(super) unsafe extern "C" fn x_close(file: *mut sqlite3_file) -> c_int {
    guarded(sqlite::SQLITE_IOERR_CLOSE, || {
        let shim = file.cast::<ShimFile>();
        // SAFETY: `x_open` made it, and SQLite closes a file once.
        let inner = unsafe { Box::from_raw((*shim).inner) };
        // SAFETY: ours.
        unsafe { (*shim).inner = std::ptr::null_mut() };
        match &inner.kind {
            Kind::Wal(connection) => locked(connection).detach_wal(),
            Kind::Database(connection) => inner.host.databases.remove(connection),
            Kind::Unprotected(_) => {
                let name = inner.unprotected_wal_name;
                inner.host.databases.remove_unprotected(name);
            }
            Kind::Plain | Kind::Journal => {}
        }
        // SAFETY: ours; after this SQLite does not touch it.
        unsafe { (*file).pMethods = std::ptr::null() };
        call!(inner.real, xClose)
    })
}

pub(super) unsafe extern "C" fn x_read(
    file: *mut sqlite3_file,
    out: *mut c_void,
    bytes: c_int,
    offset: i64,
) -> c_int {
    with_file(file, |inner| {
        if matches!(inner.kind, Kind::Journal) && inner.is_inherited() {
            // Rolling back, the child would play its parent's journal back, and end it.
            return sqlite::SQLITE_IOERR_READ;
        }
        let code = call!(inner.real, xRead, out, bytes, offset);
        let Kind::Wal(connection) = &inner.kind else {
            return code;
        };
        if !matches!(code, sqlite::SQLITE_OK | sqlite::SQLITE_IOERR_SHORT_READ) {
            return code;
        }
        // SAFETY: SQLite's buffer of that size, which the read has filled.
        let buffer = unsafe { std::slice::from_raw_parts_mut(out.cast::<u8>(), bytes as usize) };
        let held_end = locked(connection).overlay_wal(buffer, offset as u64);
        match held_end {
            Some(end) if end >= offset as u64 + bytes as u64 => sqlite::SQLITE_OK,
            _ => code,
        }
    })
}

pub(super) unsafe extern "C" fn x_write(
    file: *mut sqlite3_file,
    data: *const c_void,
    bytes: c_int,
    offset: i64,
) -> c_int {
    with_file(file, |inner| {
        if inner.is_inherited() {
            return sqlite::SQLITE_IOERR_WRITE;
        }
        // SAFETY: SQLite's buffer of that size.
        let buffer = unsafe { std::slice::from_raw_parts(data.cast::<u8>(), bytes as usize) };
        match &inner.kind {
            Kind::Plain | Kind::Journal | Kind::Unprotected(_) => {
                call!(inner.real, xWrite, data, bytes, offset)
            }
            Kind::Database(connection) => {
                code_of(locked(connection).write_database(offset as u64, buffer))
            }
            Kind::Wal(connection) => code_of(locked(connection).write_wal(offset as u64, buffer)),
        }
    })
}

pub(super) unsafe extern "C" fn x_truncate(file: *mut sqlite3_file, size: i64) -> c_int {
    with_file(file, |inner| {
        if inner.is_inherited() {
            return sqlite::SQLITE_IOERR_TRUNCATE;
        }
        if let (Kind::Wal(connection), 0) = (&inner.kind, size)
            && let Err(refusal) = locked(connection).before_wal_ends()
        {
            return refusal.code();
        }
        let code = call!(inner.real, xTruncate, size);
        if code == sqlite::SQLITE_OK {
            match &inner.kind {
                Kind::Plain | Kind::Journal | Kind::Unprotected(_) => {}
                Kind::Database(connection) => locked(connection).database_truncated(),
                Kind::Wal(connection) => {
                    return code_of(locked(connection).wal_truncated(size as u64));
                }
            }
        }
        code
    })
}

pub(super) unsafe extern "C" fn x_sync(file: *mut sqlite3_file, flags: c_int) -> c_int {
    with_file(file, |inner| match &inner.kind {
        Kind::Plain | Kind::Journal | Kind::Unprotected(_) => call!(inner.real, xSync, flags),
        Kind::Wal(connection) => {
            let needed = locked(connection).sync_wal();
            match needed {
                Ok(true) => call!(inner.real, xSync, flags),
                Ok(false) => sqlite::SQLITE_OK,
                Err(refusal) => refusal.code(),
            }
        }
        Kind::Database(connection) => {
            let code = call!(inner.real, xSync, flags);
            let connection = locked(connection);
            if code != sqlite::SQLITE_OK && connection.may_swallow_database_sync() {
                let line = format!("sync of the database file failed ({code}); the commit is safe");
                inner.host.tell(LogLevel::Error, &line);
                return sqlite::SQLITE_OK;
            }
            code
        }
    })
}

pub(super) unsafe extern "C" fn x_file_size(file: *mut sqlite3_file, size: *mut i64) -> c_int {
    with_file(file, |inner| {
        let code = call!(inner.real, xFileSize, size);
        if let (sqlite::SQLITE_OK, Kind::Wal(connection)) = (code, &inner.kind)
            && let Some(end) = locked(connection).overlay_wal(&mut [], 0)
        {
            // SAFETY: SQLite's own variable, set by the call.
            unsafe { *size = (*size).max(end as i64) };
        }
        code
    })
}

pub(super) unsafe extern "C" fn x_lock(file: *mut sqlite3_file, level: c_int) -> c_int {
    with_file(file, |inner| {
        if inner.is_inherited() {
            return sqlite::SQLITE_IOERR_LOCK;
        }
        if let (sqlite::SQLITE_LOCK_SHARED, Kind::Database(connection)) = (level, &inner.kind) {
            locked(connection).before_shared_lock();
        }
        let code = call!(inner.real, xLock, level);
        if let (sqlite::SQLITE_OK, Kind::Database(connection)) = (code, &inner.kind) {
            match level {
                sqlite::SQLITE_LOCK_RESERVED => {
                    let may_write = locked(connection).reserved();
                    if let Err(refusal) = may_write {
                        call!(inner.real, xUnlock, sqlite::SQLITE_LOCK_SHARED);
                        return refusal.code();
                    }
                }
                sqlite::SQLITE_LOCK_EXCLUSIVE => locked(connection).exclusively_locked(),
                _ => {}
            }
        }
        code
    })
}

pub(super) unsafe extern "C" fn x_unlock(file: *mut sqlite3_file, level: c_int) -> c_int {
    with_file(file, |inner| {
        if let Kind::Database(connection) = &inner.kind
            && level < sqlite::SQLITE_LOCK_RESERVED
            && !inner.is_inherited()
        {
            locked(connection).before_unlock();
        }
        call!(inner.real, xUnlock, level)
    })
}

pub(super) unsafe extern "C" fn x_check_reserved_lock(
    file: *mut sqlite3_file,
    out: *mut c_int,
) -> c_int {
    with_file(file, |inner| call!(inner.real, xCheckReservedLock, out))
}

pub(super) unsafe extern "C" fn x_file_control(
    file: *mut sqlite3_file,
    operation: c_int,
    argument: *mut c_void,
) -> c_int {
    if operation == sqlite::SQLITE_FCNTL_PDB {
        guarded((), || leave_copy_alone(file, argument));
    }
    with_file(file, |inner| {
        if operation == FCNTL_REPORT
            && let Some(report) = report(inner)
        {
            // SAFETY: `Api::file_report` alone sends this operation, with this argument.
            unsafe { *argument.cast::<Option<FileReport>>() = Some(report) };
            return sqlite::SQLITE_OK;
        }
        let Kind::Database(connection) = &inner.kind else {
            return call!(inner.real, xFileControl, operation, argument);
        };
        match operation {
            sqlite::SQLITE_FCNTL_PRAGMA => {
                if let Some(code) = pragma(inner, connection, argument.cast()) {
                    return code;
                }
            }
            sqlite::SQLITE_FCNTL_SYNC => {
                if let Err(refusal) = locked(connection).commit_database() {
                    return refusal.code();
                }
            }
            sqlite::SQLITE_FCNTL_COMMIT_PHASETWO => {
                locked(connection).commit_ended();
                // The transaction is committed: an error here would be shown as one of COMMIT.
                call!(inner.real, xFileControl, operation, argument);
                return sqlite::SQLITE_OK;
            }
            sqlite::SQLITE_FCNTL_CKPT_START => locked(connection).checkpoint(true),
            sqlite::SQLITE_FCNTL_CKPT_DONE => locked(connection).checkpoint(false),
            _ => {}
        }
        let code = call!(inner.real, xFileControl, operation, argument);
        if operation == sqlite::SQLITE_FCNTL_VFSNAME && code == sqlite::SQLITE_OK {
            name_vfs(inner, argument.cast());
        }
        code
    })
}

/// The file was opened as a database, and is the target of a `VACUUM INTO`: an ordinary file.
fn leave_copy_alone(file: *mut sqlite3_file, argument: *mut c_void) {
    let shim = file.cast::<ShimFile>();
    // SAFETY: SQLite calls our methods on files that `x_open` made, until it closed them.
    let inner = unsafe { &mut *(*shim).inner };
    let Kind::Database(connection) = &inner.kind else {
        return;
    };
    // SAFETY: the argument is SQLite's own.
    let is_copy = locked(connection).may_be_copy
        && unsafe { vacuum_into::opens_copy(&inner.host.api, argument) };
    if !is_copy || !locked(connection).forget_new() {
        return;
    }
    inner.host.databases.remove(connection);
    let line = format!(
        "{}: not protected: made by VACUUM INTO",
        locked(connection).path.display()
    );
    inner.host.tell(LogLevel::Info, &line);
    inner.kind = Kind::Plain;
}

/// None of a file that is no database.
fn report(inner: &Inner) -> Option<FileReport> {
    match &inner.kind {
        Kind::Database(connection) => {
            let status = locked(connection).status();
            Some(FileReport::Protected(Box::new(status)))
        }
        Kind::Unprotected(why) => Some(FileReport::Unprotected(*why)),
        Kind::Plain | Kind::Journal | Kind::Wal(_) => None,
    }
}

/// Puts our name before that of the VFS below.
fn name_vfs(inner: &Inner, argument: *mut *mut c_char) {
    // SAFETY: the operation's argument is a pointer to a string of the host's memory.
    let below = unsafe { text(*argument) }.unwrap_or_default();
    let ours = inner.host.options.vfs_name.to_string_lossy();
    let name = inner.host.api.copy_text(&format!("{ours}/{below}"));
    if !name.is_null() {
        // SAFETY: as above; the old string is freed where it was made.
        unsafe {
            inner.host.api.free((*argument).cast());
            *argument = name;
        }
    }
}

/// None when the pragma is SQLite's own.
fn pragma(
    inner: &Inner,
    connection: &Mutex<Connection>,
    arguments: *mut *mut c_char,
) -> Option<c_int> {
    // SAFETY: the operation's argument is an array: result, name, argument or null.
    let (name, argument) = unsafe { (text(*arguments.add(1))?, text(*arguments.add(2))) };
    let (answer, code) = match locked(connection).pragma(&name, argument.as_deref()) {
        PragmaAnswer::NotOurs => return None,
        PragmaAnswer::Value(value) => (value, sqlite::SQLITE_OK),
        PragmaAnswer::Refused(message) => (message, sqlite::SQLITE_ERROR),
    };
    // A result must be set with SQLITE_OK, or some hosts fail on a column without a name.
    let copy = inner.host.api.copy_text(&answer);
    if copy.is_null() {
        return Some(sqlite::SQLITE_NOMEM);
    }
    // SAFETY: as above; SQLite frees it.
    unsafe { *arguments = copy };
    Some(code)
}

pub(super) unsafe extern "C" fn x_sector_size(file: *mut sqlite3_file) -> c_int {
    with_file(file, |inner| call!(inner.real, xSectorSize))
}

pub(super) unsafe extern "C" fn x_device_characteristics(file: *mut sqlite3_file) -> c_int {
    with_file(file, |inner| {
        let real = call!(inner.real, xDeviceCharacteristics);
        match inner.kind {
            Kind::Plain | Kind::Journal | Kind::Unprotected(_) => real,
            // Without it SQLite pads a commit with copies of its last frame, and splits writes at
            // a sync. Batch writes are committed by the file system, out of the gate's sight.
            Kind::Database(_) | Kind::Wal(_) => {
                (real | sqlite::SQLITE_IOCAP_POWERSAFE_OVERWRITE)
                    & !sqlite::SQLITE_IOCAP_BATCH_ATOMIC
            }
        }
    })
}

pub(super) unsafe extern "C" fn x_shm_map(
    file: *mut sqlite3_file,
    region: c_int,
    bytes: c_int,
    extend: c_int,
    out: *mut *mut c_void,
) -> c_int {
    with_file(file, |inner| {
        call!(inner.real, xShmMap, region, bytes, extend, out)
    })
}

pub(super) unsafe extern "C" fn x_shm_lock(
    file: *mut sqlite3_file,
    offset: c_int,
    count: c_int,
    flags: c_int,
) -> c_int {
    with_file(file, |inner| {
        let unlocks = flags & sqlite::SQLITE_SHM_UNLOCK != 0;
        if !unlocks && inner.is_inherited() {
            return sqlite::SQLITE_IOERR_SHMLOCK;
        }
        if let Kind::Database(connection) = &inner.kind
            && !unlocks
            && let Err(refusal) = locked(connection).check_not_lost()
        {
            return refusal.code();
        }
        if let Kind::Database(connection) = &inner.kind
            && unlocks
            && flags & sqlite::SQLITE_SHM_EXCLUSIVE != 0
            && offset == WAL_WRITE_LOCK
            && !inner.is_inherited()
            && locked(connection).before_write_unlock()
        {
            void_wal_index(inner);
        }
        let code = call!(inner.real, xShmLock, offset, count, flags);
        if let (sqlite::SQLITE_OK, Kind::Database(connection)) = (code, &inner.kind)
            && !unlocks
            && flags & sqlite::SQLITE_SHM_EXCLUSIVE != 0
            && offset == WAL_WRITE_LOCK
            && locked(connection).write_locked(wal_index_end(inner))
        {
            void_wal_index(inner);
        }
        code
    })
}

/// What the wal-index says of the WAL's end. The write lock is held.
fn wal_index_end(inner: &Inner) -> Option<IndexEnd> {
    let mut region: *mut c_void = std::ptr::null_mut();
    let code = call!(inner.real, xShmMap, 0, SHM_REGION_BYTES, 0, &raw mut region);
    if code != sqlite::SQLITE_OK || region.is_null() {
        return None;
    }
    // SAFETY: the region is shared memory of 32 KB that the host has mapped; only the holder of the
    // write lock changes the header.
    let bytes = unsafe { region.cast::<[u8; HEADERS_BYTES]>().read_volatile() };
    IndexEnd::parse(&bytes)
}

/// Makes the next reader build the wal-index again from the WAL. The write lock is held.
fn void_wal_index(inner: &Inner) {
    let mut region: *mut c_void = std::ptr::null_mut();
    let code = call!(inner.real, xShmMap, 0, SHM_REGION_BYTES, 0, &raw mut region);
    if code != sqlite::SQLITE_OK || region.is_null() {
        return;
    }
    for at in 0..HEADERS_BYTES {
        // SAFETY: the region is shared memory of 32 KB that the host has mapped; other processes
        // read the header without a lock and check that its two copies are equal and set.
        unsafe { region.cast::<u8>().add(at).write_volatile(0) };
    }
    // SAFETY: the file has shared memory, so its table has the barrier.
    if let Some(barrier) = unsafe { (*(*inner.real).pMethods).xShmBarrier } {
        // SAFETY: as above.
        unsafe { barrier(inner.real) };
    }
}

pub(super) unsafe extern "C" fn x_shm_barrier(file: *mut sqlite3_file) {
    with_file(file, |inner| {
        // SAFETY: only files that have shared memory have this method in their table.
        if let Some(barrier) = unsafe { (*(*inner.real).pMethods).xShmBarrier } {
            // SAFETY: as above.
            unsafe { barrier(inner.real) };
        }
        sqlite::SQLITE_OK
    });
}

pub(super) unsafe extern "C" fn x_shm_unmap(file: *mut sqlite3_file, delete: c_int) -> c_int {
    with_file(file, |inner| call!(inner.real, xShmUnmap, delete))
}

pub(super) unsafe extern "C" fn x_fetch(
    file: *mut sqlite3_file,
    offset: i64,
    bytes: c_int,
    out: *mut *mut c_void,
) -> c_int {
    with_file(file, |inner| call!(inner.real, xFetch, offset, bytes, out))
}

pub(super) unsafe extern "C" fn x_unfetch(
    file: *mut sqlite3_file,
    offset: i64,
    memory: *mut c_void,
) -> c_int {
    with_file(file, |inner| call!(inner.real, xUnfetch, offset, memory))
}
