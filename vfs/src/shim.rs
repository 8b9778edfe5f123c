//! The VFS `durovfs`: our file object in front of the host's, and one trampoline per method, in the
//! order of SQLite's tables. What is decided is decided in the safe modules; here is the plumbing.
//!
//! No panic leaves a trampoline: it becomes `SQLITE_IOERR`, and the file takes no further write.

// Before the modules: they use it.
macro_rules! call {
    // A method that every file of the host has.
    ($file:expr, $method:ident $(, $arg:expr)*) => {{
        let file: *mut sqlite3_file = $file;
        // SAFETY: the host opened the file, so its table is set; arguments are SQLite's own or of
        // the sizes that are told.
        match unsafe { (*(*file).pMethods).$method } {
            // SAFETY: as above.
            Some(method) => unsafe { method(file $(, $arg)*) },
            None => sqlite::SQLITE_IOERR,
        }
    }};
}

mod base_file;
mod file_methods;
mod open_databases;
mod vacuum_into;
mod vfs_methods;

use crate::connection::{Connection, LogFn, LogLevel, Surroundings, Unprotected};
use crate::deferred::Durability;
use crate::ffi::{Api, ApiRoutines, HostProblem, text};
use crate::mark::mark_path;
use crate::open;
use crate::pragma::durability;
use crate::sink::Sink;
use base_file::RawFile;
use libsqlite3_sys as sqlite;
use libsqlite3_sys::{sqlite3_file, sqlite3_vfs};
use open_databases::{OpenDatabases, Owner};
use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_int};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use vfs_methods::*;

pub use vacuum_into::{OWN_THREAD_NAME, watch};

/// Alignment of the host's file object behind ours.
const FILE_ALIGNMENT: usize = 16;

/// How the VFS is registered.
pub struct Options {
    /// Its name.
    pub vfs_name: &'static CStr,
    /// Whether connections that name no VFS get it.
    pub make_default: bool,
    /// Whether the database file at this path is protected.
    pub is_included: Box<dyn Fn(&Path) -> bool + Send + Sync>,
    /// Whether the database file at this path counts when it is not what its log says.
    pub keeps_local: Box<dyn Fn(&Path) -> bool + Send + Sync>,
    /// How long opening a database waits for the sidecar and for other openers.
    pub open_timeout: Duration,
    /// Where lines of the log go.
    pub log: LogFn,
}

/// Why the VFS was not registered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RegisterError {
    /// The host is not one that can be served.
    #[error(transparent)]
    Host(#[from] HostProblem),
    /// The host has no VFS to wrap.
    #[error("the host's SQLite has no default VFS")]
    NoBase,
    /// Another copy of this library has the name.
    #[error("another copy of durovfs is registered in this SQLite")]
    Taken,
    /// SQLite refused with this code.
    #[error("sqlite3_vfs_register returned {0}")]
    Refused(c_int),
}

/// One SQLite library of the process, with our VFS in it. Never freed: files point to it.
struct Host {
    api: Api,
    base: *mut sqlite3_vfs,
    vfs: sqlite3_vfs,
    options: Options,
    sink: Arc<dyn Sink>,
    /// Our method tables, by the host's table that they stand before.
    methods: Mutex<HashMap<usize, usize>>,
    databases: OpenDatabases,
}

/// Hosts that have our VFS, by [`Api::host_key`]; only to register again after a
/// `sqlite3_shutdown`. Everything else finds its host through its own pointers.
static HOSTS: Mutex<Vec<(usize, usize)>> = Mutex::new(Vec::new());

fn locked<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Registers the VFS in a host. Again for the same host: makes sure that it is still registered.
///
/// # Errors
/// [`RegisterError`]; nothing is changed then.
///
/// # Safety
/// `api` is the table that SQLite passed to an extension's entry point, and this library stays
/// loaded for as long as the process lives.
pub unsafe fn register(
    api: *const ApiRoutines,
    sink: Arc<dyn Sink>,
    options: Options,
) -> Result<(), RegisterError> {
    // SAFETY: by the caller's promise.
    let api = unsafe { Api::new(api) }?;
    let mut hosts = locked(&HOSTS);
    let known = hosts.iter().find(|(key, _)| *key == api.host_key());
    // SAFETY: the name is a C string; the host is initialized, or it could not load extensions.
    let registered = unsafe { api.vfs_find(options.vfs_name.as_ptr()) };
    if let Some((_, host)) = known {
        let host = *host as *mut Host;
        let make_default = c_int::from(options.make_default);
        // SAFETY: hosts are never freed; SQLite has the structure from us.
        let code = unsafe { api.vfs_register(&raw mut (*host).vfs, make_default) };
        return if code == sqlite::SQLITE_OK {
            Ok(())
        } else {
            Err(RegisterError::Refused(code))
        };
    }
    if !registered.is_null() {
        return Err(RegisterError::Taken);
    }
    // SAFETY: null asks for the default.
    let base = unsafe { api.vfs_find(std::ptr::null()) };
    if base.is_null() {
        return Err(RegisterError::NoBase);
    }
    let make_default = c_int::from(options.make_default);
    // SAFETY: SQLite returned the pointer.
    let vfs = shim_vfs(unsafe { &*base }, options.vfs_name);
    let methods = Mutex::new(HashMap::new());
    let host = Box::into_raw(Box::new(Host {
        api,
        base,
        vfs,
        options,
        sink,
        methods,
        databases: OpenDatabases::default(),
    }));
    // SAFETY: just made, not shared yet; from here on it is never freed or moved.
    let code = unsafe {
        (*host).vfs.pAppData = host.cast();
        api.vfs_register(&raw mut (*host).vfs, make_default)
    };
    if code != sqlite::SQLITE_OK {
        // SAFETY: SQLite did not take it.
        drop(unsafe { Box::from_raw(host) });
        return Err(RegisterError::Refused(code));
    }
    hosts.push((api.host_key(), host as usize));
    Ok(())
}

fn file_bytes() -> usize {
    size_of::<ShimFile>().next_multiple_of(FILE_ALIGNMENT)
}

fn shim_vfs(base: &sqlite3_vfs, name: &'static CStr) -> sqlite3_vfs {
    sqlite3_vfs {
        iVersion: base.iVersion.min(3),
        szOsFile: base.szOsFile + file_bytes() as c_int,
        mxPathname: base.mxPathname,
        pNext: std::ptr::null_mut(),
        zName: name.as_ptr(),
        pAppData: std::ptr::null_mut(),
        xOpen: Some(x_open),
        xDelete: Some(x_delete),
        xAccess: Some(x_access),
        xFullPathname: Some(x_full_pathname),
        xDlOpen: base.xDlOpen.and(Some(x_dl_open)),
        xDlError: base.xDlError.and(Some(x_dl_error)),
        xDlSym: base.xDlSym.and(Some(x_dl_sym)),
        xDlClose: base.xDlClose.and(Some(x_dl_close)),
        xRandomness: Some(x_randomness),
        xSleep: Some(x_sleep),
        xCurrentTime: Some(x_current_time),
        xGetLastError: base.xGetLastError.and(Some(x_get_last_error)),
        xCurrentTimeInt64: base.xCurrentTimeInt64.and(Some(x_current_time_int64)),
        xSetSystemCall: base.xSetSystemCall.and(Some(x_set_system_call)),
        xGetSystemCall: base.xGetSystemCall.and(Some(x_get_system_call)),
        xNextSystemCall: base.xNextSystemCall.and(Some(x_next_system_call)),
    }
}

/// Our file object; the host's stands right behind it in the same memory of SQLite's.
#[repr(C)]
struct ShimFile {
    base: sqlite3_file,
    inner: *mut Inner,
}

struct Inner {
    host: &'static Host,
    real: *mut sqlite3_file,
    kind: Kind,
    /// Of an unprotected database: where the name of its WAL is.
    unprotected_wal_name: usize,
    process: u32,
}

enum Kind {
    /// No database, or one that nobody but its connection sees.
    Plain,
    /// A database file that passes through.
    Unprotected(Unprotected),
    /// The rollback journal of a protected database.
    Journal,
    Database(Arc<Mutex<Connection>>),
    Wal(Arc<Mutex<Connection>>),
}

/// Runs a trampoline's body; a panic becomes an error.
fn guarded<R>(otherwise: R, body: impl FnOnce() -> R) -> R {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or(otherwise)
}

fn host_of(vfs: *mut sqlite3_vfs) -> &'static Host {
    // SAFETY: SQLite passes the structure that `register` gave it; hosts are never freed.
    unsafe { &*(*vfs).pAppData.cast::<Host>() }
}

/// SQLite 3.51.3, in which the last known bug that can lose a commit was fixed.
const FIRST_WITHOUT_KNOWN_BUGS: c_int = 3_051_003;

fn kind_of(
    host: &'static Host,
    name: *const c_char,
    real: *mut sqlite3_file,
    flags: c_int,
) -> Result<Kind, c_int> {
    if name.is_null() {
        return Ok(Kind::Plain);
    }
    if flags & sqlite::SQLITE_OPEN_WAL != 0 {
        return wal_kind(host, name, real);
    }
    if flags & sqlite::SQLITE_OPEN_MAIN_JOURNAL != 0 {
        // SAFETY: SQLite's names are C strings.
        let path = PathBuf::from(unsafe { text(name) }.unwrap_or_default());
        return Ok(match host.databases.has_journal(&path) {
            true => Kind::Journal,
            false => Kind::Plain,
        });
    }
    if flags & sqlite::SQLITE_OPEN_MAIN_DB == 0 {
        return Ok(Kind::Plain);
    }
    // SAFETY: the name of a main database carries its URI parameters.
    let (given, durable, immutable, takeover) = unsafe {
        (
            text(host.api.uri_parameter(name, c"durovfs_db".as_ptr())),
            text(host.api.uri_parameter(name, c"durovfs_durability".as_ptr())),
            host.api.uri_boolean(name, c"immutable".as_ptr(), 0) != 0,
            host.api.uri_boolean(name, c"durovfs_takeover".as_ptr(), 0) != 0,
        )
    };
    if immutable {
        return Ok(Kind::Unprotected(Unprotected::Immutable));
    }
    if flags & sqlite::SQLITE_OPEN_READWRITE == 0 {
        return Ok(Kind::Unprotected(Unprotected::ReadOnly));
    }
    // SAFETY: SQLite's names are C strings.
    let Some(path) = (unsafe { text(name) }).map(PathBuf::from) else {
        let line = "a database path that is not UTF-8 cannot be protected";
        host.tell(LogLevel::Error, line);
        return Err(sqlite::SQLITE_CANTOPEN);
    };
    if given.is_none() && !(host.options.is_included)(&path) {
        return Ok(Kind::Unprotected(Unprotected::LeftOut));
    }
    let may_be_copy = given.is_none() && !is_asked_for(host, name) && !mark_path(&path).exists();
    if may_be_copy && vacuum_into::runs_here(&host.api) {
        let line = format!("{}: not protected: made by VACUUM INTO", path.display());
        host.tell(LogLevel::Info, &line);
        return Ok(Kind::Plain);
    }
    let durability = match durable.as_deref().map(durability).transpose() {
        Ok(durability) => durability.unwrap_or_default(),
        Err(message) => {
            host.tell(LogLevel::Error, &message);
            return Err(sqlite::SQLITE_CANTOPEN);
        }
    };
    let database = given.unwrap_or_else(|| path.to_string_lossy().into_owned());
    let how = (durability, takeover);
    let connection = protect(host, real, path.clone(), &database, how)?;
    locked(&connection).may_be_copy = may_be_copy;
    // SAFETY: as with the parameters.
    let wal_name = unsafe { host.api.filename_wal(name) } as usize;
    host.databases.add(wal_name, &path, &connection);
    Ok(Kind::Database(connection))
}

/// Opens a protected database.
fn protect(
    host: &'static Host,
    real: *mut sqlite3_file,
    path: PathBuf,
    name: &str,
    (durability, takeover): (Durability, bool),
) -> Result<Arc<Mutex<Connection>>, c_int> {
    let surroundings = Surroundings {
        sink: Arc::clone(&host.sink),
        log: host.options.log,
        open_timeout: host.options.open_timeout,
        keep_local: (host.options.keeps_local)(&path),
    };
    // SAFETY: the host's VFS has a name.
    let vfs_name = unsafe { (*host.base).zName };
    let file = RawFile {
        file: real,
        api: host.api,
        path: path.clone(),
        vfs_name,
    };
    match open::open(surroundings, &path, name, file, takeover) {
        Ok(mut connection) => {
            connection.warnings.extend(known_bugs(host));
            connection.distrusts_checkpoints = has_known_bugs(host);
            connection.set_durability(durability);
            Ok(Arc::new(Mutex::new(connection)))
        }
        Err(refusal) => {
            host.tell(LogLevel::Error, &refusal.message);
            *locked(&LAST_OPEN_REFUSAL) = refusal.message;
            Err(sqlite::SQLITE_CANTOPEN)
        }
    }
}

/// Whether the URI names this VFS.
fn is_asked_for(host: &Host, name: *const c_char) -> bool {
    // SAFETY: the name of a main database carries its URI parameters.
    let asked = unsafe { text(host.api.uri_parameter(name, c"vfs".as_ptr())) };
    asked.is_some_and(|asked| asked.as_bytes() == host.options.vfs_name.to_bytes())
}

/// What is known to be wrong with the host's SQLite.
fn known_bugs(host: &Host) -> Option<String> {
    has_known_bugs(host).then(|| {
        format!(
            "SQLite {} can corrupt a WAL database when two connections checkpoint at once \
             (fixed in 3.51.3); up to 3.49.1 a savepoint rollback can make it refuse a commit here",
            host.api.version()
        )
    })
}

fn has_known_bugs(host: &Host) -> bool {
    // SAFETY: a constant of the host's library.
    unsafe { host.api.libversion_number() < FIRST_WITHOUT_KNOWN_BUGS }
}

/// The line of the last open that was refused in this process, for `durovfs_last_error()`: a
/// connection that was not opened cannot be asked.
static LAST_OPEN_REFUSAL: Mutex<String> = Mutex::new(String::new());

/// The line of the last open that was refused in this process; empty when there was none.
pub fn last_open_refusal() -> String {
    locked(&LAST_OPEN_REFUSAL).clone()
}

fn wal_kind(
    host: &'static Host,
    name: *const c_char,
    real: *mut sqlite3_file,
) -> Result<Kind, c_int> {
    // SAFETY: SQLite's names are C strings.
    let path = PathBuf::from(unsafe { text(name) }.unwrap_or_default());
    let connection = match host.databases.owner_of(name as usize, &path) {
        Owner::Connection(connection) => connection,
        Owner::None => return Ok(Kind::Plain),
        Owner::Unclear => {
            let line = format!(
                "{}: another VFS stands above durovfs, and hides which of several connections this \
                 WAL belongs to; open the database in one connection, or with vfs=durovfs",
                path.display()
            );
            host.tell(LogLevel::Error, &line);
            return Err(sqlite::SQLITE_CANTOPEN);
        }
    };
    let vfs_name = std::ptr::null();
    let wal = RawFile {
        file: real,
        api: host.api,
        path,
        vfs_name,
    };
    locked(&connection).attach_wal(Box::new(wal));
    Ok(Kind::Wal(connection))
}

impl Host {
    fn tell(&self, level: LogLevel, line: &str) {
        (self.options.log)(level, line);
        if level == LogLevel::Error {
            self.api.log(sqlite::SQLITE_WARNING, line);
        }
    }
}
