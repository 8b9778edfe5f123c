//! The SQLites of this process that have loaded the extension, and what loading does in each.
//!
//! A process may hold more than one SQLite (a language's own and the system's): each has a table of
//! its own here. All share one client.

use crate::client::Client;
use crate::config::ClientConfig;
use crate::{functions, log, replicas};
use durovfs_vfs::ffi::EntryPoint;
use durovfs_vfs::sink::Sink;
use durovfs_vfs::{Api, ApiRoutines, Options, register};
use libsqlite3_sys as sqlite;
use libsqlite3_sys::sqlite3;
use std::ffi::{CStr, c_char, c_int};
use std::panic::catch_unwind;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

/// Name of the VFS, as in `vfs=durovfs`.
const VFS_NAME: &CStr = c"durovfs";
/// How long opening a database waits for the sidecar: a restarted one needs a claim of three
/// replicas, and rolling forward has times of its own.
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);

/// One SQLite that loaded the extension. Never freed: its functions point to it.
pub(crate) struct Host {
    pub(crate) api: Api,
    pub(crate) client: Arc<Client>,
    pub(crate) version: String,
    pub(crate) version_number: i32,
    /// Its place among the hosts.
    pub(crate) index: usize,
}

/// Most SQLites in one process: a language's, the system's, and room. Each needs functions of its
/// own ([`functions`]), which are made at compile time.
pub(crate) const MAX_HOSTS: usize = 4;

/// The hosts, in the order in which they loaded the extension. Read without a lock: a fork must
/// find it usable.
static HOSTS: [OnceLock<Host>; MAX_HOSTS] = [const { OnceLock::new() }; MAX_HOSTS];
/// Held while the extension is loaded, so that a host is not entered twice.
static LOADING: Mutex<()> = Mutex::new(());
static CLIENT: OnceLock<Arc<Client>> = OnceLock::new();

/// The host that a function was made for.
pub(crate) fn host(index: usize) -> Option<&'static Host> {
    HOSTS.get(index)?.get()
}

fn hosts() -> impl Iterator<Item = &'static Host> {
    HOSTS.iter().map_while(OnceLock::get)
}

fn host_of(api: &Api) -> Option<&'static Host> {
    hosts().find(|host| host.api.host_key() == api.host_key())
}

/// Writes a line to the own log of each host.
pub(crate) fn log_to_all(is_error: bool, line: &str) {
    let code = if is_error {
        sqlite::SQLITE_ERROR
    } else {
        sqlite::SQLITE_NOTICE
    };
    let line = format!("durovfs: {line}");
    hosts().for_each(|host| host.api.log(code, &line));
}

/// What the entry point does; the error is one line for whoever loads.
///
/// # Safety
/// `db` and `table` are what SQLite passed to the entry point.
pub(crate) unsafe fn load(db: *mut sqlite3, table: *const ApiRoutines) -> Result<(), String> {
    // SAFETY: by the caller's promise.
    let Some(api) = (unsafe { Api::new(table) }) else {
        return Err("durovfs needs SQLite 3.37 or newer, built without parts left out".to_owned());
    };
    log::init()?;
    let _loading = LOADING.lock().unwrap_or_else(PoisonError::into_inner);
    let client = client(&api)?;
    let sink: Arc<dyn Sink> = client.clone();
    let config = client.clone();
    let options = Options {
        vfs_name: VFS_NAME,
        make_default: true,
        is_included: Box::new(move |path| config.config().protects(path)),
        open_timeout: OPEN_TIMEOUT,
        log: log::from_shim,
    };
    // SAFETY: the table is SQLite's; the library stays loaded, as the entry point's result demands.
    unsafe { register(table, sink, options) }.map_err(|error| format!("durovfs: {error}"))?;
    let host = remember(api, client)?;
    // SAFETY: SQLite calls it with the arguments of an extension's entry point, whatever the type
    // of the slot says; registering it again changes nothing.
    let code = unsafe {
        api.auto_extension(Some(
            std::mem::transmute::<functions::EntryPoint, EntryPoint>(on_connection),
        ))
    };
    if code != sqlite::SQLITE_OK {
        return Err(format!("durovfs: sqlite3_auto_extension returned {code}"));
    }
    if !db.is_null() {
        // SAFETY: SQLite is loading the extension into this connection, on this thread.
        unsafe { install(host, db) }.map_err(|e| format!("durovfs: {e}"))?;
        // SAFETY: as above.
        if let Some(reason) = unsafe { functions::opened_too_early(host, db) } {
            log::error(format_args!("{reason}"));
        }
    }
    Ok(())
}

/// The client of this process, made when the first host loads.
fn client(api: &Api) -> Result<Arc<Client>, String> {
    if let Some(client) = CLIENT.get() {
        return Ok(client.clone());
    }
    let config =
        ClientConfig::find(|name| std::env::var_os(name)).map_err(|e| format!("durovfs: {e}"))?;
    let program = std::env::current_exe().ok();
    let program = program.as_deref().and_then(|path| path.file_name());
    let program = program.unwrap_or_default().to_string_lossy().into_owned();
    let description = format!("{program}, SQLite {}", api.version());
    Ok(CLIENT
        .get_or_init(|| Arc::new(Client::new(config, description)))
        .clone())
}

fn remember(api: Api, client: Arc<Client>) -> Result<&'static Host, String> {
    if let Some(host) = host_of(&api) {
        return Ok(host);
    }
    let index = hosts().count();
    let Some(place) = HOSTS.get(index) else {
        return Err(format!(
            "durovfs: more than {MAX_HOSTS} SQLites in one process"
        ));
    };
    // SAFETY: the slot takes no arguments.
    let version_number = unsafe { api.libversion_number() };
    let version = api.version();
    Ok(place.get_or_init(|| Host {
        api,
        client,
        version,
        version_number,
        index,
    }))
}

/// Gives a connection all that SQL can ask of durovfs.
///
/// # Safety
/// `db` is a connection of this host that this thread may use.
unsafe fn install(host: &'static Host, db: *mut sqlite3) -> Result<(), String> {
    // SAFETY: by the caller's promise.
    unsafe {
        functions::install(host, db)?;
        replicas::install(host, db)
    }
}

/// SQLite calls this for each new connection.
unsafe extern "C" fn on_connection(
    db: *mut sqlite3,
    _error: *mut *mut c_char,
    table: *const ApiRoutines,
) -> c_int {
    let installed = catch_unwind(|| {
        // SAFETY: SQLite passes its table to extensions of every kind.
        let api = unsafe { Api::new(table) };
        match api.as_ref().and_then(host_of) {
            // SAFETY: SQLite is opening this connection, on this thread.
            Some(host) => unsafe { install(host, db) },
            None => Err("a connection of a SQLite that did not load durovfs".to_owned()),
        }
    });
    match installed {
        Ok(Ok(())) => {}
        // The database is protected by the VFS all the same: the application must not fail for want
        // of a function that tells it so.
        Ok(Err(error)) => log::error(format_args!("no SQL functions on a connection: {error}")),
        Err(_) => log::error(format_args!(
            "no SQL functions on a connection: a bug in durovfs"
        )),
    }
    sqlite::SQLITE_OK
}
