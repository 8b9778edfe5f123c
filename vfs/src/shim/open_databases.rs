//! Which open database a WAL or a journal belongs to, found without a look at memory that may not
//! be SQLite's: a VFS above this one may open files under copies of their names.

use super::locked;
use crate::connection::Connection;
use crate::mark::with_suffix;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Weak};

/// The databases that are open in one host.
#[derive(Default)]
pub(super) struct OpenDatabases {
    protected: Mutex<Vec<Entry>>,
    /// Names, as [`Entry::wal_name`], of connections that are not protected (read-only ones): their
    /// WAL is no other connection's, though its path is the same.
    unprotected: Mutex<Vec<usize>>,
}

struct Entry {
    /// Where SQLite keeps the name that it opens this connection's WAL with. Two connections to
    /// one file have two such names.
    wal_name: usize,
    wal_path: PathBuf,
    journal_path: PathBuf,
    connection: Weak<Mutex<Connection>>,
}

/// Whose WAL it is.
pub(super) enum Owner {
    /// No protected database's.
    None,
    /// This connection's.
    Connection(Arc<Mutex<Connection>>),
    /// One of several connections', and nothing tells which.
    Unclear,
}

impl OpenDatabases {
    pub(super) fn add(&self, wal_name: usize, path: &Path, connection: &Arc<Mutex<Connection>>) {
        let (wal_path, journal_path) = (with_suffix(path, "-wal"), with_suffix(path, "-journal"));
        let connection = Arc::downgrade(connection);
        locked(&self.protected).push(Entry {
            wal_name,
            wal_path,
            journal_path,
            connection,
        });
    }

    pub(super) fn add_unprotected(&self, wal_name: usize) {
        locked(&self.unprotected).push(wal_name);
    }

    pub(super) fn remove_unprotected(&self, wal_name: usize) {
        let mut open = locked(&self.unprotected);
        if let Some(index) = open.iter().position(|open| *open == wal_name) {
            open.swap_remove(index);
        }
    }

    pub(super) fn remove(&self, connection: &Arc<Mutex<Connection>>) {
        let closed = Arc::as_ptr(connection);
        locked(&self.protected).retain(|open| !std::ptr::eq(open.connection.as_ptr(), closed));
    }

    /// Whether a rollback journal belongs to one of them.
    pub(super) fn has_journal(&self, path: &Path) -> bool {
        locked(&self.protected)
            .iter()
            .any(|open| open.journal_path == path)
    }

    /// The owner of a WAL: by the place of its name, or, when that was copied, by its path.
    pub(super) fn owner_of(&self, wal_name: usize, wal_path: &Path) -> Owner {
        let open = locked(&self.protected);
        let by_name = open.iter().find(|open| open.wal_name == wal_name);
        if let Some(connection) = by_name.and_then(|open| open.connection.upgrade()) {
            return Owner::Connection(connection);
        }
        if locked(&self.unprotected).contains(&wal_name) {
            return Owner::None;
        }
        let mut by_path = open
            .iter()
            .filter(|open| open.wal_path == wal_path)
            .filter_map(|open| open.connection.upgrade());
        match (by_path.next(), by_path.next()) {
            (None, _) => Owner::None,
            (Some(connection), None) => Owner::Connection(connection),
            (Some(_), Some(_)) => Owner::Unclear,
        }
    }
}
