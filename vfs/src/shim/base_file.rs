//! The host's own file object, as the safe modules see it.

use crate::error::{Refusal, RefusalKind};
use crate::ffi::Api;
use crate::file::{BaseFile, DatabaseFile};
use libsqlite3_sys as sqlite;
use libsqlite3_sys::{sqlite3, sqlite3_file};
use std::ffi::{CString, c_char, c_int};
use std::path::{Path, PathBuf};

/// Index of the lock of checkpoints among the locks of `xShmLock`.
const WAL_CHECKPOINT_LOCK: c_int = 1;

/// A file object of the host.
pub(super) struct RawFile {
    pub(super) file: *mut sqlite3_file,
    pub(super) api: Api,
    pub(super) path: PathBuf,
    pub(super) vfs_name: *const c_char,
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

impl RawFile {
    /// Takes a lock; none is left when it is not to be had.
    fn try_lock(&self, level: c_int) -> Result<bool, Refusal> {
        let code = call!(self.file, xLock, level);
        if code == sqlite::SQLITE_OK {
            return Ok(true);
        }
        self.unlock_all();
        match code & 0xff {
            sqlite::SQLITE_BUSY => Ok(false),
            _ => Err(refused(code, "lock", &self.path)),
        }
    }

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

    fn has_moved(&self) -> Result<bool, Refusal> {
        let mut moved: c_int = 0;
        let argument: *mut c_int = &raw mut moved;
        let operation = sqlite::SQLITE_FCNTL_HAS_MOVED;
        match call!(self.file, xFileControl, operation, argument.cast()) {
            // A VFS that does not know the operation has no names that lead elsewhere.
            sqlite::SQLITE_NOTFOUND => Ok(false),
            code => self
                .check(code, "look for the name of")
                .map(|()| moved != 0),
        }
    }

    fn outside_checkpoints(
        &self,
        body: &mut dyn FnMut() -> Result<(), Refusal>,
    ) -> Result<bool, Refusal> {
        let lock = sqlite::SQLITE_SHM_LOCK | sqlite::SQLITE_SHM_EXCLUSIVE;
        let unlock = sqlite::SQLITE_SHM_UNLOCK | sqlite::SQLITE_SHM_EXCLUSIVE;
        match call!(self.file, xShmLock, WAL_CHECKPOINT_LOCK, 1, lock) {
            sqlite::SQLITE_OK => {
                let done = body();
                call!(self.file, xShmLock, WAL_CHECKPOINT_LOCK, 1, unlock);
                done.map(|()| true)
            }
            sqlite::SQLITE_BUSY => Ok(false),
            // Without shared memory (exclusive locking) nobody else can make one.
            _ => body().map(|()| true),
        }
    }
}

impl DatabaseFile for RawFile {
    fn try_lock_exclusive(&self) -> Result<bool, Refusal> {
        Ok(self.try_lock_shared()? && self.try_lock(sqlite::SQLITE_LOCK_EXCLUSIVE)?)
    }

    fn try_lock_shared(&self) -> Result<bool, Refusal> {
        self.try_lock(sqlite::SQLITE_LOCK_SHARED)
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
