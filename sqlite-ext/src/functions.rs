//! What the SQL functions do with their arguments. What they say is made in `status.rs`; how
//! SQLite calls them is in `lib.rs`.

use crate::Call;
use crate::status;
use durovfs_vfs::error::Refusal;
use durovfs_vfs::{FileStatus, deferred};
use durovfs_wire::Bookmark;
use libsqlite3_sys as sqlite;
use std::ffi::{CStr, CString, c_int};
use std::path::Path;
use std::time::Duration;

/// The schema that functions without a schema argument are about.
pub(crate) const MAIN: &CStr = c"main";

/// An answer: text or NULL, or an error.
pub(crate) type Answer = Result<Option<String>, Failure>;

/// One line of error, and SQLite's code for it.
#[derive(Debug)]
pub(crate) struct Failure {
    /// What failed, on what, and what to do.
    pub(crate) message: String,
    /// The result code.
    pub(crate) code: c_int,
}

impl From<String> for Failure {
    fn from(message: String) -> Self {
        let code = sqlite::SQLITE_ERROR;
        Self { message, code }
    }
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        let code = refusal.code();
        let message = refusal.message;
        Self { message, code }
    }
}

/// `durovfs_status([schema])`.
pub(crate) fn status(call: &Call<'_>) -> Answer {
    let schema = call.text(0).unwrap_or_else(|| "main".to_owned());
    let schema = CString::new(schema).map_err(|_| "schema name with a zero byte".to_owned())?;
    let host = call.host();
    let report = match call.file_status(&schema) {
        Some(file) => status::protected(&host.client, &file, &host.version),
        None => {
            let reason = why_unprotected(call, &schema);
            let version = (host.version.as_str(), host.version_number);
            status::unprotected(&host.client, reason, version, newest_error(call))
        }
    };
    serde_json::to_string(&report)
        .map(Some)
        .map_err(|error| error.to_string().into())
}

/// `durovfs_bookmark([when])`.
pub(crate) fn bookmark(call: &Call<'_>) -> Answer {
    let file = protected_file(call)?;
    let bookmark = match call.text(0) {
        Some(when) => Some(status::find_bookmark(&call.host().client, &file, &when)?),
        None => status::newest_bookmark(&file),
    };
    Ok(bookmark.map(|bookmark| bookmark.to_string()))
}

/// `durovfs_wait([bookmark [, timeout_ms]])`.
pub(crate) fn wait(call: &Call<'_>) -> Answer {
    let file = protected_file(call)?;
    let milliseconds = match call.integer(1) {
        Some(number) => {
            u64::try_from(number).map_err(|_| format!("timeout {number} is below zero"))?
        }
        None => file.timeout_ms,
    };
    let timeout = (milliseconds != 0).then(|| Duration::from_millis(milliseconds));
    let client = &call.host().client;
    let Some(bookmark) = call.text(0) else {
        let path = call.path(MAIN).unwrap_or_default();
        deferred::wait_confirmed(client.as_ref(), Path::new(&path), timeout)?;
        let file = protected_file(call)?;
        return Ok(status::newest_bookmark(&file).map(|bookmark| bookmark.to_string()));
    };
    let bookmark: Bookmark = bookmark.parse().map_err(|error| format!("{error}"))?;
    if let Some(refusal) = deferred::lost(client.as_ref(), file.database) {
        return Err(refusal.into());
    }
    let reached = status::wait_for(client, bookmark, timeout, || protected_file(call))?;
    Ok(Some(reached.to_string()))
}

/// `durovfs_last_error()`.
pub(crate) fn last_error(call: &Call<'_>) -> Answer {
    Ok(newest_error(call))
}

/// Why a connection that was open before the load is not protected, when it should be.
pub(crate) fn opened_too_early(call: &Call<'_>) -> Option<String> {
    let path = call.path(MAIN)?;
    let is_meant = call.host().client.config().protects(Path::new(&path));
    (is_meant && call.file_status(MAIN).is_none()).then(|| why_unprotected(call, MAIN))
}

fn protected_file(call: &Call<'_>) -> Result<FileStatus, String> {
    call.file_status(MAIN)
        .ok_or_else(|| why_unprotected(call, MAIN))
}

fn why_unprotected(call: &Call<'_>, schema: &CStr) -> String {
    let name = schema.to_string_lossy();
    let Some(path) = call.path(schema) else {
        return format!(
            "database {name:?} is not protected: it is in memory, temporary, or not there"
        );
    };
    let config = call.host().client.config();
    if !config.protects(Path::new(&path)) {
        let file = config.file.display();
        return format!("{path} is not protected: the client configuration {file} leaves it out");
    }
    let vfs = call
        .vfs_name(schema)
        .unwrap_or_else(|| "unknown".to_owned());
    format!(
        "{path} is not protected: this connection was opened before durovfs was loaded, or with \
         another VFS ({vfs}); close it and open it again"
    )
}

/// The last refusal of this database, or of an open in this process.
fn newest_error(call: &Call<'_>) -> Option<String> {
    let of_file = call.file_status(MAIN).map(|file| file.last_error);
    let of_open = durovfs_vfs::shim::last_open_refusal();
    of_file
        .into_iter()
        .chain([of_open])
        .find(|line| !line.is_empty())
}
