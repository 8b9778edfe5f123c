//! The SQLites of this process that have loaded the extension.
//!
//! A process may hold more than one SQLite (a language's own and the system's): each has a table of
//! functions of its own here. All share one client. No pointers: those are in `lib.rs`.

use crate::client::Client;
use crate::config::ClientConfig;
use durovfs_vfs::Api;
use libsqlite3_sys as sqlite;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

/// Most SQLites in one process: a language's, the system's, and room. Each needs SQL functions of
/// its own, which are made at compile time.
pub(crate) const MAX_HOSTS: usize = 4;

/// One SQLite that loaded the extension. Never freed: what SQLite holds points to it.
pub(crate) struct Host {
    pub(crate) api: Api,
    pub(crate) client: Arc<Client>,
    pub(crate) version: String,
    pub(crate) version_number: i32,
    /// Its place among the hosts.
    pub(crate) index: usize,
}

/// The hosts, in the order in which they loaded the extension. Read without a lock: a fork must
/// find it usable.
static HOSTS: [OnceLock<Host>; MAX_HOSTS] = [const { OnceLock::new() }; MAX_HOSTS];
static LOADING: Mutex<()> = Mutex::new(());
static CLIENT: OnceLock<Arc<Client>> = OnceLock::new();

/// Held while the extension is loaded, so that a host is not entered twice.
pub(crate) fn begin_loading() -> MutexGuard<'static, ()> {
    LOADING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The host at a place.
pub(crate) fn host_at(index: usize) -> Option<&'static Host> {
    HOSTS.get(index)?.get()
}

/// The host that a table is of.
pub(crate) fn host_of(api: &Api) -> Option<&'static Host> {
    hosts().find(|host| host.api.host_key() == api.host_key())
}

fn hosts() -> impl Iterator<Item = &'static Host> {
    HOSTS.iter().map_while(OnceLock::get)
}

/// Enters a host, or finds it. Call it while [`begin_loading`] is held.
///
/// # Errors
/// When there are too many.
pub(crate) fn remember(
    api: Api,
    client: Arc<Client>,
    version_number: i32,
) -> Result<&'static Host, String> {
    if let Some(host) = host_of(&api) {
        return Ok(host);
    }
    let index = hosts().count();
    let Some(place) = HOSTS.get(index) else {
        return Err(format!("more than {MAX_HOSTS} SQLites in one process"));
    };
    let version = api.version();
    Ok(place.get_or_init(|| Host {
        api,
        client,
        version,
        version_number,
        index,
    }))
}

/// The client of this process, made when the first host loads.
///
/// # Errors
/// When there is no configuration.
pub(crate) fn client(api: &Api) -> Result<Arc<Client>, String> {
    if let Some(client) = CLIENT.get() {
        return Ok(client.clone());
    }
    let config = ClientConfig::find(|name| std::env::var_os(name)).map_err(|e| e.to_string())?;
    let program = std::env::current_exe().ok();
    let program = program.as_deref().and_then(|path| path.file_name());
    let program = program.unwrap_or_default().to_string_lossy().into_owned();
    let description = format!("{program}, SQLite {}", api.version());
    Ok(CLIENT
        .get_or_init(|| Arc::new(Client::new(config, description)))
        .clone())
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
