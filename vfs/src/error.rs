//! Why the shim says no, and the one place where that becomes a SQLite result code.

use std::ffi::c_int;

use libsqlite3_sys as sqlite;

/// Kinds of refusal, by what the application does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RefusalKind {
    /// The transaction is in no log, now and later; the connection stays usable.
    NotCommitted,
    /// Somebody else is in the way; the transaction is in no log, and can be tried again. Of the
    /// database file's gate only: see `code`.
    Busy,
    /// It was sent and nobody knows; or it is committed and the local file could not take it.
    Unknown,
    /// This host is no longer the primary: reopen.
    NotPrimary,
    /// The database cannot be opened safely.
    CannotOpen,
    /// The file below failed with this result code of its own.
    File(c_int),
}

/// A refusal and the line that explains it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// What the application does next.
    pub kind: RefusalKind,
    /// What failed, on what, and what to do: one line.
    pub message: String,
}

impl Refusal {
    /// A refusal of this kind.
    pub fn new(kind: RefusalKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
        }
    }

    /// Certainly not committed.
    pub fn not_committed(message: impl Into<String>) -> Self {
        Self::new(RefusalKind::NotCommitted, message)
    }

    /// Certainly not committed, and worth another try.
    pub fn busy(message: impl Into<String>) -> Self {
        Self::new(RefusalKind::Busy, message)
    }

    /// Cannot be opened safely.
    pub fn cannot_open(message: impl Into<String>) -> Self {
        Self::new(RefusalKind::CannotOpen, message)
    }

    /// An I/O error of a file that the shim itself uses (mark, WAL at open).
    pub fn io(action: &str, path: &std::path::Path, error: &std::io::Error) -> Self {
        let message = format!("{action} {}: {error}", path.display());
        Self::new(RefusalKind::File(sqlite::SQLITE_IOERR), message)
    }

    /// The code that SQLite sees. Never `SQLITE_BUSY` for a write to the WAL: it makes SQLite
    /// continue a broken checksum chain, and every later commit is lost.
    pub fn code(&self) -> c_int {
        match self.kind {
            RefusalKind::NotCommitted => sqlite::SQLITE_IOERR_WRITE,
            RefusalKind::Busy => sqlite::SQLITE_BUSY,
            RefusalKind::Unknown => sqlite::SQLITE_IOERR_FSYNC,
            RefusalKind::NotPrimary => sqlite::SQLITE_READONLY,
            RefusalKind::CannotOpen => sqlite::SQLITE_CANTOPEN,
            RefusalKind::File(code) if code & 0xff == sqlite::SQLITE_BUSY => sqlite::SQLITE_IOERR,
            RefusalKind::File(code) => code,
        }
    }
}
