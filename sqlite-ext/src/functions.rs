//! What the SQL functions do with their arguments. What they say is made in `status.rs`; how
//! SQLite calls them is in `lib.rs`.

use crate::unprotected::Reason;
use crate::{Call, log, status, unprotected};
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
    let mut report = match unprotected::protected(call, &schema) {
        Ok(file) => status::protected(&host.client, &file, &host.version),
        Err(reason) => {
            let version = (host.version.as_str(), host.version_number);
            status::unprotected(
                &host.client,
                reason.to_string(),
                version,
                newest_error(call),
            )
        }
    };
    if call.text(0).is_none() {
        report.warnings.extend(attached_unprotected(call));
    }
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

/// Writes a line about a connection whose main database is not protected: as an error if its user
/// may believe that it is.
pub(crate) fn tell_unprotected(call: &Call<'_>) {
    match unprotected::protected(call, MAIN) {
        Ok(_) | Err(Reason::InMemory(_) | Reason::NoSuchSchema(_)) => {}
        Err(reason) if reason.is_unexpected() => log::error(format_args!("{reason}")),
        Err(reason) => log::info(format_args!("{reason}")),
    }
}

/// One line for each attached file that is not protected: the report of the main database alone
/// would hide it.
fn attached_unprotected(call: &Call<'_>) -> impl Iterator<Item = String> {
    let attached = call.attached_files().into_iter();
    attached.filter_map(|schema| {
        let reason = unprotected::protected(call, &schema).err()?;
        Some(format!(
            "attached as {}: {reason}",
            schema.to_string_lossy()
        ))
    })
}

fn protected_file(call: &Call<'_>) -> Result<FileStatus, String> {
    unprotected::protected(call, MAIN).map_err(|reason| reason.to_string())
}

/// The last refusal of this database, or of an open in this process.
fn newest_error(call: &Call<'_>) -> Option<String> {
    let of_file = unprotected::protected(call, MAIN).map(|file| file.last_error);
    let of_file = of_file.ok();
    let of_open = durovfs_vfs::shim::last_open_refusal();
    of_file
        .into_iter()
        .chain([of_open])
        .find(|line| !line.is_empty())
}
