//! Why a database is not protected, and what to do about it: one line for each case, the same in
//! `durovfs_status()` and in the log. No pointers; `lib.rs` asks SQLite.

use crate::Call;
use crate::config::Selection;
use crate::functions::MAIN;
use durovfs_vfs::{FileReport, FileStatus, Unprotected};
use std::ffi::CStr;
use std::fmt;
use std::path::{Path, PathBuf};

/// The case that a database of a connection is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Reason {
    /// The connection has no database of that name.
    NoSuchSchema(String),
    /// Nothing of it outlives its connection.
    InMemory(String),
    /// A pattern of the configuration leaves it out.
    LeftOut {
        path: String,
        config: PathBuf,
        pattern: &'static str,
    },
    /// It is open for reading only.
    ReadOnly(String),
    /// It is open as a file that never changes.
    Immutable(String),
    /// Its URI names another VFS.
    OtherVfs { path: String, vfs: String },
    /// The VFS of its connection is another, although durovfs was loaded.
    NamedVfs { path: String, vfs: String },
    /// The VFS of its connection is another: most likely it is older than the load.
    OpenedEarly { path: String, vfs: String },
    /// It was attached to such a connection.
    Attached { path: String, vfs: String },
}

impl Reason {
    /// Whether its user may believe that it is protected: nothing but the order of events speaks
    /// against it.
    pub(crate) fn is_unexpected(&self) -> bool {
        matches!(self, Self::OpenedEarly { .. })
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoSuchSchema(schema) => {
                write!(f, "there is no database {schema:?} on this connection")
            }
            Self::InMemory(schema) => write!(
                f,
                "database {schema:?} is not protected: it is in memory or temporary, and ends with \
                 its connection; keep what must stay in a file"
            ),
            Self::LeftOut {
                path,
                config,
                pattern,
            } => write!(
                f,
                "{path} is not protected: the client configuration {} leaves it out; change \
                 {pattern} there, start the program again",
                config.display()
            ),
            Self::ReadOnly(path) => write!(
                f,
                "{path} is not protected here: this connection has it open for reading only, and \
                 sees what the local file holds; to write it, open it without mode=ro, as a user \
                 who may"
            ),
            Self::Immutable(path) => write!(
                f,
                "{path} is not protected: immutable=1 says that nobody changes it; if it does \
                 change, open it without immutable=1"
            ),
            Self::OtherVfs { path, vfs } => write!(
                f,
                "{path} is not protected: its URI says vfs={vfs}; open it without that, or with \
                 vfs=durovfs"
            ),
            Self::NamedVfs { path, vfs } => write!(
                f,
                "{path} is not protected: the program opened this connection with the VFS {vfs}; \
                 open it without naming one, or with durovfs"
            ),
            Self::OpenedEarly { path, vfs } => write!(
                f,
                "{path} is not protected: this connection was opened before durovfs was loaded, or \
                 with another VFS ({vfs}); close it and open it again"
            ),
            Self::Attached { path, vfs } => write!(
                f,
                "{path} is not protected: ATTACH takes the VFS of its connection, which is {vfs}; \
                 close the connection, open it again with durovfs loaded, and attach again"
            ),
        }
    }
}

/// The state of a protected database of a connection, or why it is not protected.
pub(crate) fn protected(call: &Call<'_>, schema: &CStr) -> Result<FileStatus, Reason> {
    let why = match call.file_report(schema) {
        Some(FileReport::Protected(status)) => return Ok(*status),
        Some(FileReport::Unprotected(why)) => Some(why),
        None => None,
    };
    let name = schema.to_string_lossy().into_owned();
    let Some(path) = call.path(schema) else {
        // It has no file before its first table.
        let is_there = name.eq_ignore_ascii_case("temp") || call.has_schema(schema);
        return Err(match is_there {
            true => Reason::InMemory(name),
            false => Reason::NoSuchSchema(name),
        });
    };
    let config = call.host().client.config();
    Err(match (why, config.selects(Path::new(&path))) {
        (Some(Unprotected::ReadOnly), _) => Reason::ReadOnly(path),
        (Some(Unprotected::Immutable), _) => Reason::Immutable(path),
        (Some(Unprotected::LeftOut) | None, Selection::LeftOut { pattern }) => Reason::LeftOut {
            path,
            config: config.file.clone(),
            pattern,
        },
        (Some(Unprotected::LeftOut) | None, Selection::Protected) => other_vfs(call, schema, path),
    })
}

/// The file is not one that our VFS opened.
fn other_vfs(call: &Call<'_>, schema: &CStr, path: String) -> Reason {
    if let Some(vfs) = call.uri_parameter(schema, c"vfs") {
        return Reason::OtherVfs { path, vfs };
    }
    let vfs = call.vfs_name(schema);
    let vfs = vfs.unwrap_or_else(|| "unknown".to_owned());
    if schema != MAIN {
        Reason::Attached { path, vfs }
    } else if call.is_opened_after_load() {
        Reason::NamedVfs { path, vfs }
    } else {
        Reason::OpenedEarly { path, vfs }
    }
}
