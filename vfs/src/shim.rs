//! The VFS `durovfs`: our file object in front of the host's, and one trampoline per method, in the
//! order of SQLite's tables. What is decided is decided in the safe modules; here is the plumbing.
//!
//! No panic leaves a trampoline: it becomes `SQLITE_IOERR`, and the file takes no further write.

use crate::connection::{Connection, LogFn, LogLevel, Surroundings};
use crate::error::{Refusal, RefusalKind};
use crate::ffi::{Api, ApiRoutines, FCNTL_STATUS, text};
use crate::file::{BaseFile, DatabaseFile};
use crate::mark::note_wal_ended;
use crate::pragma::{PragmaAnswer, durability};
use crate::sink::Sink;
use crate::{FileStatus, open};
use libsqlite3_sys as sqlite;
use libsqlite3_sys::{sqlite3, sqlite3_file, sqlite3_io_methods, sqlite3_vfs};
use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Index of the WAL's write lock among the locks of `xShmLock`.
const WAL_WRITE_LOCK: c_int = 0;
/// Bytes of a region of the wal-index, and of the two headers at the start of its first.
const SHM_REGION_BYTES: c_int = 32768;
const WAL_INDEX_HEADERS_BYTES: usize = 96;
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
    /// How long opening a database waits for the sidecar and for other openers.
    pub open_timeout: Duration,
    /// Where lines of the log go.
    pub log: LogFn,
}

/// Why the VFS was not registered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RegisterError {
    /// The host is older than 3.37, or built with functions left out that are needed.
    #[error("the host's SQLite is older than 3.37 or lacks functions that durovfs needs")]
    Host,
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
    let api = unsafe { Api::new(api) }.ok_or(RegisterError::Host)?;
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
    process: u32,
}

enum Kind {
    Plain,
    Database(Arc<Mutex<Connection>>),
    Wal(Arc<Mutex<Connection>>),
}

/// A file object of the host.
struct RawFile {
    file: *mut sqlite3_file,
    api: Api,
    path: PathBuf,
    vfs_name: *const c_char,
}

// SAFETY: SQLite lets one thread at a time use a connection and its files, and the connection's
// mutex is held whenever this is used.
unsafe impl Send for RawFile {}

fn refused(code: c_int, what: &str, path: &Path) -> Refusal {
    Refusal::new(
        RefusalKind::File(code),
        format!("{what} {}: result {code}", path.display()),
    )
}

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

impl RawFile {
    fn check(&self, code: c_int, what: &str) -> Result<(), Refusal> {
        match code {
            sqlite::SQLITE_OK => Ok(()),
            code => Err(refused(code, what, &self.path)),
        }
    }
}

impl BaseFile for RawFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<usize, Refusal> {
        let bytes = buffer.len();
        let code = call!(
            self.file,
            xRead,
            buffer.as_mut_ptr().cast(),
            bytes as c_int,
            offset as i64
        );
        if code == sqlite::SQLITE_IOERR_SHORT_READ {
            // SQLite's contract fills the rest with zeros.
            let size = self.size()?;
            return Ok(usize::try_from(size.saturating_sub(offset))
                .unwrap_or(0)
                .min(bytes));
        }
        self.check(code, "read").map(|()| bytes)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> Result<(), Refusal> {
        let length = bytes.len() as c_int;
        let code = call!(
            self.file,
            xWrite,
            bytes.as_ptr().cast(),
            length,
            offset as i64
        );
        self.check(code, "write")
    }

    fn truncate(&self, size: u64) -> Result<(), Refusal> {
        self.check(call!(self.file, xTruncate, size as i64), "truncate")
    }

    fn sync(&self) -> Result<(), Refusal> {
        self.check(call!(self.file, xSync, sqlite::SQLITE_SYNC_NORMAL), "sync")
    }

    fn size(&self) -> Result<u64, Refusal> {
        let mut size = 0i64;
        self.check(call!(self.file, xFileSize, &raw mut size), "size")?;
        Ok(u64::try_from(size).unwrap_or(0))
    }
}

impl DatabaseFile for RawFile {
    fn try_lock_exclusive(&self) -> Result<bool, Refusal> {
        for level in [sqlite::SQLITE_LOCK_SHARED, sqlite::SQLITE_LOCK_EXCLUSIVE] {
            match call!(self.file, xLock, level) {
                sqlite::SQLITE_OK => {}
                code => {
                    self.unlock_all();
                    return match code & 0xff {
                        sqlite::SQLITE_BUSY => Ok(false),
                        _ => Err(refused(code, "lock", &self.path)),
                    };
                }
            }
        }
        Ok(true)
    }

    fn unlock_all(&self) {
        call!(self.file, xUnlock, sqlite::SQLITE_LOCK_NONE);
    }

    fn recover_journal(&self) -> Result<(), Refusal> {
        let failed = |code| refused(code, "play back the journal of", &self.path);
        let path = self.path.to_str().and_then(|path| CString::new(path).ok());
        let path = path.ok_or_else(|| failed(sqlite::SQLITE_CANTOPEN))?;
        let mut db: *mut sqlite3 = std::ptr::null_mut();
        // Its own cache: in shared-cache mode SQLite holds a mutex here that it does not nest.
        let flags = sqlite::SQLITE_OPEN_READWRITE | sqlite::SQLITE_OPEN_PRIVATECACHE;
        // SAFETY: the strings live through the calls; the handle is closed whatever they return.
        let code = unsafe {
            let mut code = self
                .api
                .open_v2(path.as_ptr(), &raw mut db, flags, self.vfs_name);
            if code == sqlite::SQLITE_OK {
                let sql = c"SELECT count(*) FROM sqlite_master".as_ptr();
                let none = std::ptr::null_mut();
                code = self.api.exec(db, sql, None, none, std::ptr::null_mut());
            }
            self.api.close(db);
            code
        };
        if code == sqlite::SQLITE_OK {
            Ok(())
        } else {
            Err(failed(code))
        }
    }
}

/// Runs a trampoline's body; a panic becomes an error.
fn guarded<R>(otherwise: R, body: impl FnOnce() -> R) -> R {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or(otherwise)
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
        std::process::id() != self.process && !matches!(self.kind, Kind::Plain)
    }
}

fn methods_for(host: &'static Host, real: *mut sqlite3_file) -> *const sqlite3_io_methods {
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

fn host_of(vfs: *mut sqlite3_vfs) -> &'static Host {
    // SAFETY: SQLite passes the structure that `register` gave it; hosts are never freed.
    unsafe { &*(*vfs).pAppData.cast::<Host>() }
}

// The methods of sqlite3_vfs.

unsafe extern "C" fn x_open(
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
        let inner = Box::new(Inner {
            host,
            real,
            kind,
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
        return Ok(wal_kind(host, name, real));
    }
    let writable = flags & sqlite::SQLITE_OPEN_READWRITE != 0;
    if flags & sqlite::SQLITE_OPEN_MAIN_DB == 0 || !writable {
        return Ok(Kind::Plain);
    }
    // SAFETY: the name of a main database carries its URI parameters.
    let (given, durable, immutable) = unsafe {
        (
            text(host.api.uri_parameter(name, c"durovfs_db".as_ptr())),
            text(host.api.uri_parameter(name, c"durovfs_durability".as_ptr())),
            host.api.uri_boolean(name, c"immutable".as_ptr(), 0) != 0,
        )
    };
    // SAFETY: SQLite's names are C strings.
    let path = match unsafe { text(name) } {
        Some(path) => PathBuf::from(path),
        None => {
            host.tell(
                LogLevel::Error,
                "a database path that is not UTF-8 cannot be protected",
            );
            return Err(sqlite::SQLITE_CANTOPEN);
        }
    };
    if immutable || (given.is_none() && !(host.options.is_included)(&path)) {
        return Ok(Kind::Plain);
    }
    if let Some(durable) = durable
        && let PragmaAnswer::Refused(message) = durability(Some(&durable))
    {
        host.tell(LogLevel::Error, &message);
        return Err(sqlite::SQLITE_CANTOPEN);
    }
    let surroundings = Surroundings {
        sink: Arc::clone(&host.sink),
        log: host.options.log,
        open_timeout: host.options.open_timeout,
    };
    // SAFETY: the host's VFS has a name.
    let vfs_name = unsafe { (*host.base).zName };
    let file = RawFile {
        file: real,
        api: host.api,
        path: path.clone(),
        vfs_name,
    };
    let name = given.unwrap_or_else(|| path.to_string_lossy().into_owned());
    match open::open(surroundings, &path, &name, file) {
        Ok(mut connection) => {
            // SAFETY: a constant of the host's library.
            if unsafe { host.api.libversion_number() } < 3_051_003 {
                connection.warnings.push(format!(
                    "SQLite {} can corrupt a WAL database when two connections checkpoint at once \
                     (fixed in 3.51.3); up to 3.49.1 a savepoint rollback can make it refuse a \
                     commit here",
                    host.api.version()
                ));
            }
            Ok(Kind::Database(Arc::new(Mutex::new(connection))))
        }
        Err(refusal) => {
            host.tell(LogLevel::Error, &refusal.message);
            *locked(&LAST_OPEN_REFUSAL) = refusal.message;
            Err(sqlite::SQLITE_CANTOPEN)
        }
    }
}

/// The line of the last open that was refused in this process, for `durovfs_last_error()`: a
/// connection that was not opened cannot be asked.
static LAST_OPEN_REFUSAL: Mutex<String> = Mutex::new(String::new());

/// The line of the last open that was refused in this process; empty when there was none.
pub fn last_open_refusal() -> String {
    locked(&LAST_OPEN_REFUSAL).clone()
}

fn wal_kind(host: &'static Host, name: *const c_char, real: *mut sqlite3_file) -> Kind {
    // SAFETY: SQLite opens a WAL with a name that it made together with its database's.
    let database = unsafe { host.api.database_file_object(name) };
    if database.is_null() {
        return Kind::Plain;
    }
    // SAFETY: an open file of this host.
    let table = unsafe { (*database).pMethods } as usize;
    if !locked(&host.methods).values().any(|ours| *ours == table) {
        return Kind::Plain;
    }
    // SAFETY: its method table is one of ours, so it is a file of ours.
    let inner = unsafe { &*(*database.cast::<ShimFile>()).inner };
    let Kind::Database(connection) = &inner.kind else {
        return Kind::Plain;
    };
    // SAFETY: SQLite's names are C strings.
    let path = PathBuf::from(unsafe { text(name) }.unwrap_or_default());
    let vfs_name = std::ptr::null();
    let wal = RawFile {
        file: real,
        api: host.api,
        path,
        vfs_name,
    };
    locked(connection).attach_wal(Box::new(wal));
    Kind::Wal(Arc::clone(connection))
}

impl Host {
    fn tell(&self, level: LogLevel, line: &str) {
        (self.options.log)(level, line);
        if level == LogLevel::Error {
            self.api.log(sqlite::SQLITE_WARNING, line);
        }
    }
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

unsafe extern "C" fn x_delete(vfs: *mut sqlite3_vfs, name: *const c_char, sync: c_int) -> c_int {
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

unsafe extern "C" fn x_access(
    vfs: *mut sqlite3_vfs,
    name: *const c_char,
    flags: c_int,
    out: *mut c_int,
) -> c_int {
    base_vfs!(vfs, sqlite::SQLITE_IOERR_ACCESS, xAccess, name, flags, out)
}

unsafe extern "C" fn x_full_pathname(
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

unsafe extern "C" fn x_dl_open(vfs: *mut sqlite3_vfs, name: *const c_char) -> *mut c_void {
    base_vfs!(vfs, std::ptr::null_mut(), xDlOpen, name)
}

unsafe extern "C" fn x_dl_error(vfs: *mut sqlite3_vfs, length: c_int, out: *mut c_char) {
    base_vfs!(vfs, (), xDlError, length, out);
}

type Symbol = Option<unsafe extern "C" fn(*mut sqlite3_vfs, *mut c_void, *const c_char)>;

unsafe extern "C" fn x_dl_sym(
    vfs: *mut sqlite3_vfs,
    handle: *mut c_void,
    name: *const c_char,
) -> Symbol {
    base_vfs!(vfs, None, xDlSym, handle, name)
}

unsafe extern "C" fn x_dl_close(vfs: *mut sqlite3_vfs, handle: *mut c_void) {
    base_vfs!(vfs, (), xDlClose, handle);
}

unsafe extern "C" fn x_randomness(vfs: *mut sqlite3_vfs, bytes: c_int, out: *mut c_char) -> c_int {
    base_vfs!(vfs, 0, xRandomness, bytes, out)
}

unsafe extern "C" fn x_sleep(vfs: *mut sqlite3_vfs, micros: c_int) -> c_int {
    base_vfs!(vfs, 0, xSleep, micros)
}

unsafe extern "C" fn x_current_time(vfs: *mut sqlite3_vfs, out: *mut f64) -> c_int {
    base_vfs!(vfs, sqlite::SQLITE_ERROR, xCurrentTime, out)
}

unsafe extern "C" fn x_get_last_error(
    vfs: *mut sqlite3_vfs,
    length: c_int,
    out: *mut c_char,
) -> c_int {
    base_vfs!(vfs, 0, xGetLastError, length, out)
}

unsafe extern "C" fn x_current_time_int64(vfs: *mut sqlite3_vfs, out: *mut i64) -> c_int {
    base_vfs!(vfs, sqlite::SQLITE_ERROR, xCurrentTimeInt64, out)
}

unsafe extern "C" fn x_set_system_call(
    vfs: *mut sqlite3_vfs,
    name: *const c_char,
    call: sqlite::sqlite3_syscall_ptr,
) -> c_int {
    base_vfs!(vfs, sqlite::SQLITE_NOTFOUND, xSetSystemCall, name, call)
}

unsafe extern "C" fn x_get_system_call(
    vfs: *mut sqlite3_vfs,
    name: *const c_char,
) -> sqlite::sqlite3_syscall_ptr {
    base_vfs!(vfs, None, xGetSystemCall, name)
}

unsafe extern "C" fn x_next_system_call(
    vfs: *mut sqlite3_vfs,
    name: *const c_char,
) -> *const c_char {
    base_vfs!(vfs, std::ptr::null(), xNextSystemCall, name)
}

// The methods of sqlite3_file.

unsafe extern "C" fn x_close(file: *mut sqlite3_file) -> c_int {
    guarded(sqlite::SQLITE_IOERR_CLOSE, || {
        let shim = file.cast::<ShimFile>();
        // SAFETY: `x_open` made it, and SQLite closes a file once.
        let inner = unsafe { Box::from_raw((*shim).inner) };
        // SAFETY: ours.
        unsafe { (*shim).inner = std::ptr::null_mut() };
        if let Kind::Wal(connection) = &inner.kind {
            locked(connection).detach_wal();
        }
        // SAFETY: ours; after this SQLite does not touch it.
        unsafe { (*file).pMethods = std::ptr::null() };
        call!(inner.real, xClose)
    })
}

unsafe extern "C" fn x_read(
    file: *mut sqlite3_file,
    out: *mut c_void,
    bytes: c_int,
    offset: i64,
) -> c_int {
    with_file(file, |inner| {
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

unsafe extern "C" fn x_write(
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
            Kind::Plain => call!(inner.real, xWrite, data, bytes, offset),
            Kind::Database(connection) => {
                code_of(locked(connection).write_database(offset as u64, buffer))
            }
            Kind::Wal(connection) => code_of(locked(connection).write_wal(offset as u64, buffer)),
        }
    })
}

unsafe extern "C" fn x_truncate(file: *mut sqlite3_file, size: i64) -> c_int {
    with_file(file, |inner| {
        if inner.is_inherited() {
            return sqlite::SQLITE_IOERR_TRUNCATE;
        }
        let code = call!(inner.real, xTruncate, size);
        if code == sqlite::SQLITE_OK {
            match &inner.kind {
                Kind::Plain => {}
                Kind::Database(connection) => locked(connection).database_truncated(),
                Kind::Wal(connection) => {
                    return code_of(locked(connection).wal_truncated(size as u64));
                }
            }
        }
        code
    })
}

unsafe extern "C" fn x_sync(file: *mut sqlite3_file, flags: c_int) -> c_int {
    with_file(file, |inner| match &inner.kind {
        Kind::Plain => call!(inner.real, xSync, flags),
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

unsafe extern "C" fn x_file_size(file: *mut sqlite3_file, size: *mut i64) -> c_int {
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

unsafe extern "C" fn x_lock(file: *mut sqlite3_file, level: c_int) -> c_int {
    with_file(file, |inner| {
        if inner.is_inherited() {
            return sqlite::SQLITE_IOERR_LOCK;
        }
        let code = call!(inner.real, xLock, level);
        if let (sqlite::SQLITE_OK, Kind::Database(connection)) = (code, &inner.kind)
            && level == sqlite::SQLITE_LOCK_RESERVED
        {
            locked(connection).reserved();
        }
        code
    })
}

unsafe extern "C" fn x_unlock(file: *mut sqlite3_file, level: c_int) -> c_int {
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

unsafe extern "C" fn x_check_reserved_lock(file: *mut sqlite3_file, out: *mut c_int) -> c_int {
    with_file(file, |inner| call!(inner.real, xCheckReservedLock, out))
}

unsafe extern "C" fn x_file_control(
    file: *mut sqlite3_file,
    operation: c_int,
    argument: *mut c_void,
) -> c_int {
    with_file(file, |inner| {
        let Kind::Database(connection) = &inner.kind else {
            return call!(inner.real, xFileControl, operation, argument);
        };
        match operation {
            FCNTL_STATUS => {
                // SAFETY: `Api::file_status` alone sends this operation, with this argument.
                unsafe {
                    *argument.cast::<Option<FileStatus>>() = Some(locked(connection).status())
                };
                return sqlite::SQLITE_OK;
            }
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

unsafe extern "C" fn x_sector_size(file: *mut sqlite3_file) -> c_int {
    with_file(file, |inner| call!(inner.real, xSectorSize))
}

unsafe extern "C" fn x_device_characteristics(file: *mut sqlite3_file) -> c_int {
    with_file(file, |inner| {
        let real = call!(inner.real, xDeviceCharacteristics);
        match inner.kind {
            Kind::Plain => real,
            // Without it SQLite pads a commit with copies of its last frame, and splits writes at
            // a sync. Batch writes are committed by the file system, out of the gate's sight.
            Kind::Database(_) | Kind::Wal(_) => {
                (real | sqlite::SQLITE_IOCAP_POWERSAFE_OVERWRITE)
                    & !sqlite::SQLITE_IOCAP_BATCH_ATOMIC
            }
        }
    })
}

unsafe extern "C" fn x_shm_map(
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

unsafe extern "C" fn x_shm_lock(
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
            && unlocks
            && flags & sqlite::SQLITE_SHM_EXCLUSIVE != 0
            && offset == WAL_WRITE_LOCK
            && !inner.is_inherited()
            && locked(connection).before_write_unlock()
        {
            void_wal_index(inner);
        }
        call!(inner.real, xShmLock, offset, count, flags)
    })
}

/// Makes the next reader build the wal-index again from the WAL. The write lock is held.
fn void_wal_index(inner: &Inner) {
    let mut region: *mut c_void = std::ptr::null_mut();
    let code = call!(inner.real, xShmMap, 0, SHM_REGION_BYTES, 0, &raw mut region);
    if code != sqlite::SQLITE_OK || region.is_null() {
        return;
    }
    for at in 0..WAL_INDEX_HEADERS_BYTES {
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

unsafe extern "C" fn x_shm_barrier(file: *mut sqlite3_file) {
    with_file(file, |inner| {
        // SAFETY: only files that have shared memory have this method in their table.
        if let Some(barrier) = unsafe { (*(*inner.real).pMethods).xShmBarrier } {
            // SAFETY: as above.
            unsafe { barrier(inner.real) };
        }
        sqlite::SQLITE_OK
    });
}

unsafe extern "C" fn x_shm_unmap(file: *mut sqlite3_file, delete: c_int) -> c_int {
    with_file(file, |inner| call!(inner.real, xShmUnmap, delete))
}

unsafe extern "C" fn x_fetch(
    file: *mut sqlite3_file,
    offset: i64,
    bytes: c_int,
    out: *mut *mut c_void,
) -> c_int {
    with_file(file, |inner| call!(inner.real, xFetch, offset, bytes, out))
}

unsafe extern "C" fn x_unfetch(file: *mut sqlite3_file, offset: i64, memory: *mut c_void) -> c_int {
    with_file(file, |inner| call!(inner.real, xUnfetch, offset, memory))
}
