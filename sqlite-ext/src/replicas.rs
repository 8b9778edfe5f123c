//! `durovfs_replicas`: the replicas of the connection's main database, as their primary sees them.
//! A table without storage; each scan asks the sidecar once. How SQLite scans it is in `lib.rs`.

use crate::client::Client;
use crate::status;
use durovfs_vfs::FileStatus;
use durovfs_wire::status::ReplicaStatus;
use std::ffi::{CStr, c_int};

/// Columns in the order of [`column`].
pub(crate) const SCHEMA: &CStr = c"CREATE TABLE durovfs_replicas(node TEXT, address TEXT, \
    state TEXT, flush_lsn INTEGER, lag_entries INTEGER, lag_ms INTEGER, ack_p50_us INTEGER, \
    ack_p99_us INTEGER)";

/// The rows of one scan.
///
/// # Errors
/// When there is nothing to show, for a reason that is told in one line.
pub(crate) fn rows(
    client: &Client,
    file: Option<FileStatus>,
) -> Result<Vec<ReplicaStatus>, String> {
    match file {
        Some(file) => status::replicas(client, &file),
        None => Err("durovfs_replicas: the main database is not protected".to_owned()),
    }
}

/// A value of a row.
pub(crate) enum Value<'a> {
    /// Text.
    Text(&'a str),
    /// A count or a time.
    Number(u64),
}

/// The value in a column; none in one that is not there.
pub(crate) fn column(row: &ReplicaStatus, index: c_int) -> Option<Value<'_>> {
    Some(match index {
        0 => Value::Text(row.node.as_str()),
        1 => Value::Text(&row.address),
        2 => Value::Text(&row.state),
        3 => Value::Number(row.flush_lsn.get()),
        4 => Value::Number(row.lag_entries),
        5 => Value::Number(row.lag_ms),
        6 => Value::Number(row.ack_p50_us),
        7 => Value::Number(row.ack_p99_us),
        _ => return None,
    })
}
