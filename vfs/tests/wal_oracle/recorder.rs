//! A VFS below the shim that sees each write on its way to the real file, and asks the oracle what
//! a recovery would find before and after it.
//!
//! What is checked, at every write to a WAL: a commit becomes valid only by the write that
//! completes it; it is the next entry of the log, page by page, so the log has it already; nothing
//! committed goes, and a WAL begins anew only when the database file holds all of it.

use super::common::model::ModelSink;
use super::host::Host;
use super::recovery::{Committed, WalImage};
use durovfs_wire::{DatabaseChecksum, PageChecksum, PageNo};
use libsqlite3_sys as sqlite;
use libsqlite3_sys::{sqlite3_file, sqlite3_io_methods, sqlite3_vfs};
use std::cell::RefCell;
use std::collections::{BTreeSet, HashMap};
use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::{Arc, Mutex, OnceLock};

pub const RECORDER: &CStr = c"recorder";

/// Where the process dies at the completing write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Death {
    Before,
    /// With the first bytes of it in the file.
    Within,
    After,
}

/// One database and its WAL, as they are on disk.
#[derive(Default)]
struct Watched {
    open_files: usize,
    database: Vec<u8>,
    wal: WalImage,
    /// Entries of the log that the local file may be at; empty: not known.
    at: BTreeSet<usize>,
    completions: u64,
    death: Option<Death>,
    disagreements: Vec<String>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Database,
    Wal,
}

struct OpenFile {
    methods: usize,
    watched: Option<(String, Kind)>,
}

#[derive(Default)]
struct State {
    files: HashMap<usize, OpenFile>,
    databases: HashMap<String, Watched>,
    /// Our tables, by the host's.
    tables: HashMap<usize, usize>,
    bases: HashMap<usize, usize>,
    sink: Option<Arc<ModelSink>>,
}

fn state() -> std::sync::MutexGuard<'static, State> {
    static STATE: OnceLock<Mutex<State>> = OnceLock::new();
    STATE.get_or_init(Mutex::default).lock().unwrap()
}

/// Registers the recorder as the default VFS of a host, in front of the one that was.
pub fn register(host: &'static Host, sink: &Arc<ModelSink>) {
    state().sink = Some(Arc::clone(sink));
    // SAFETY: the host is initialized; the VFS lives as long as the process.
    unsafe {
        let base = host.api.vfs_find(std::ptr::null());
        let vfs = Box::leak(Box::new(sqlite3_vfs {
            pNext: std::ptr::null_mut(),
            zName: RECORDER.as_ptr(),
            xOpen: Some(x_open),
            xDelete: Some(x_delete),
            ..*base
        }));
        state()
            .bases
            .insert(std::ptr::from_mut(vfs) as usize, base as usize);
        assert_eq!(host.api.vfs_register(vfs, 1), sqlite::SQLITE_OK);
    }
}

/// Writes so far that made a transaction valid.
pub fn completions(name: &str) -> u64 {
    state().databases.get(name).map_or(0, |w| w.completions)
}

/// Committed frames in the WAL.
pub fn wal_frames(name: &str) -> usize {
    let state = state();
    let watched = state.databases.get(name);
    watched.map_or(0, |watched| watched.wal.committed().frames)
}

/// The process dies at the next completing write.
pub fn die_at_completion(name: &str, death: Death) {
    state().databases.get_mut(name).unwrap().death = Some(death);
}

/// Fails when the oracle and the shim disagreed about anything.
pub fn assert_agreement(name: &str) {
    let state = state();
    if let Some(watched) = state.databases.get(name) {
        assert!(
            watched.disagreements.is_empty(),
            "{:#?}",
            watched.disagreements
        );
    }
}

fn base_of(vfs: *mut sqlite3_vfs) -> *mut sqlite3_vfs {
    state().bases[&(vfs as usize)] as *mut sqlite3_vfs
}

fn text(name: *const c_char) -> String {
    if name.is_null() {
        return String::new();
    }
    // SAFETY: SQLite's names are C strings.
    unsafe { CStr::from_ptr(name) }
        .to_string_lossy()
        .into_owned()
}

fn methods_of(file: *mut sqlite3_file) -> &'static sqlite3_io_methods {
    let methods = state().files[&(file as usize)].methods;
    // SAFETY: the host's tables are constants.
    unsafe { &*(methods as *const sqlite3_io_methods) }
}

unsafe extern "C" fn x_open(
    vfs: *mut sqlite3_vfs,
    name: *const c_char,
    file: *mut sqlite3_file,
    flags: c_int,
    out_flags: *mut c_int,
) -> c_int {
    let base = base_of(vfs);
    // SAFETY: SQLite's own arguments, for a VFS that is a copy of the base's.
    let code = unsafe { (*base).xOpen.unwrap()(base, name, file, flags, out_flags) };
    // SAFETY: the base sets it when there is something to close.
    let methods = unsafe { (*file).pMethods };
    if code != sqlite::SQLITE_OK || methods.is_null() {
        return code;
    }
    let kind = match flags {
        flags if flags & sqlite::SQLITE_OPEN_MAIN_DB != 0 => Some(Kind::Database),
        flags if flags & sqlite::SQLITE_OPEN_WAL != 0 => Some(Kind::Wal),
        _ => None,
    };
    let watched = kind.map(|kind| {
        let name = text(name);
        let name = name
            .strip_suffix("-wal")
            .map_or(name.clone(), str::to_owned);
        (name, kind)
    });
    let mut state = state();
    if let Some((name, kind)) = &watched {
        let watched = state.databases.entry(name.clone()).or_default();
        watched.opened(*kind, || read_all(file, methods));
    }
    let table = state.tables.entry(methods as usize).or_insert_with(|| {
        // SAFETY: the host's tables are constants.
        let table = sqlite3_io_methods {
            xClose: Some(x_close),
            xWrite: Some(x_write),
            xTruncate: Some(x_truncate),
            xUnfetch: Some(x_unfetch),
            ..unsafe { *methods }
        };
        Box::leak(Box::new(table)) as *const sqlite3_io_methods as usize
    });
    let table = *table as *const sqlite3_io_methods;
    // SAFETY: the file's own memory; all methods but these stay the host's.
    unsafe { (*file).pMethods = table };
    let methods = methods as usize;
    state
        .files
        .insert(file as usize, OpenFile { methods, watched });
    sqlite::SQLITE_OK
}

fn read_all(file: *mut sqlite3_file, methods: *const sqlite3_io_methods) -> Vec<u8> {
    // SAFETY: just opened; the buffer has the file's size.
    unsafe {
        let mut size = 0i64;
        assert_eq!((*methods).xFileSize.unwrap()(file, &raw mut size), 0);
        let mut bytes = vec![0u8; size as usize];
        if size > 0 {
            let buffer = bytes.as_mut_ptr().cast::<c_void>();
            assert_eq!((*methods).xRead.unwrap()(file, buffer, size as c_int, 0), 0);
        }
        bytes
    }
}

unsafe extern "C" fn x_delete(vfs: *mut sqlite3_vfs, name: *const c_char, sync: c_int) -> c_int {
    if let Some(database) = text(name).strip_suffix("-wal")
        && let State {
            databases, sink, ..
        } = &mut *state()
        && let Some(watched) = databases.get_mut(database)
    {
        watched.ends(database, sink.as_ref().unwrap());
        watched.wal = WalImage::default();
    }
    let base = base_of(vfs);
    // SAFETY: SQLite's own arguments.
    unsafe { (*base).xDelete.unwrap()(base, name, sync) }
}

unsafe extern "C" fn x_close(file: *mut sqlite3_file) -> c_int {
    let methods = methods_of(file);
    let closed = state().files.remove(&(file as usize)).unwrap();
    if let Some((name, _)) = closed.watched {
        state().databases.get_mut(&name).unwrap().open_files -= 1;
    }
    // SAFETY: the file is open, with the host's own table.
    unsafe { methods.xClose.unwrap()(file) }
}

unsafe extern "C" fn x_write(
    file: *mut sqlite3_file,
    data: *const c_void,
    length: c_int,
    offset: i64,
) -> c_int {
    let methods = methods_of(file);
    let write = methods.xWrite.unwrap();
    // SAFETY: SQLite's buffer of that size.
    let bytes = unsafe { std::slice::from_raw_parts(data.cast::<u8>(), length as usize) };
    let death = {
        let State {
            files,
            databases,
            sink,
            ..
        } = &mut *state();
        match &files[&(file as usize)].watched {
            Some((name, kind)) => {
                let watched = databases.get_mut(name).unwrap();
                watched.wrote(name, *kind, offset as usize, bytes, sink.as_ref().unwrap())
            }
            None => None,
        }
    };
    match death {
        Some(Death::Before) => std::process::abort(),
        Some(Death::Within) => {
            // Page number, size and a part of the salts: never a frame, whatever stood there.
            // SAFETY: as SQLite would write it, less of it.
            unsafe { write(file, data, 10, offset) };
            std::process::abort()
        }
        Some(Death::After) => {
            // SAFETY: SQLite's own arguments.
            unsafe { write(file, data, length, offset) };
            std::process::abort()
        }
        // SAFETY: SQLite's own arguments.
        None => unsafe { write(file, data, length, offset) },
    }
}

unsafe extern "C" fn x_truncate(file: *mut sqlite3_file, size: i64) -> c_int {
    let methods = methods_of(file);
    {
        let State {
            files,
            databases,
            sink,
            ..
        } = &mut *state();
        if let Some((name, kind)) = &files[&(file as usize)].watched {
            let watched = databases.get_mut(name).unwrap();
            watched.truncated(name, *kind, size as usize, sink.as_ref().unwrap());
        }
    }
    // SAFETY: SQLite's own arguments.
    unsafe { methods.xTruncate.unwrap()(file, size) }
}

thread_local! {
    static AT_UNFETCH: RefCell<Option<Box<dyn FnOnce()>>> = const { RefCell::new(None) };
}

/// Runs once when this thread's SQLite gives back its memory map: a checkpoint does that when it
/// has read the wal-index of somebody else's commit, and has not looked yet at what is copied.
pub fn at_next_unfetch(what: impl FnOnce() + 'static) {
    AT_UNFETCH.set(Some(Box::new(what)));
}

unsafe extern "C" fn x_unfetch(file: *mut sqlite3_file, offset: i64, page: *mut c_void) -> c_int {
    if let Some(what) = AT_UNFETCH.take() {
        what();
    }
    let methods = methods_of(file);
    // SAFETY: SQLite's own arguments.
    unsafe { methods.xUnfetch.unwrap()(file, offset, page) }
}

impl Watched {
    fn opened(&mut self, kind: Kind, read: impl FnOnce() -> Vec<u8>) {
        let first = self.open_files == 0;
        self.open_files += 1;
        match kind {
            Kind::Database if first => {
                self.database = read();
                self.wal = WalImage::default();
                self.at.clear();
            }
            Kind::Database => {}
            Kind::Wal => {
                let bytes = read();
                if self.wal.bytes() != bytes {
                    self.wal = WalImage::new(bytes);
                }
            }
        }
    }

    fn wrote(
        &mut self,
        name: &str,
        kind: Kind,
        offset: usize,
        data: &[u8],
        sink: &ModelSink,
    ) -> Option<Death> {
        if kind == Kind::Database {
            let end = offset + data.len();
            if self.database.len() < end {
                self.database.resize(end, 0);
            }
            self.database[offset..end].copy_from_slice(data);
            return None;
        }
        let before = self.wal.committed();
        if self.at.is_empty() {
            self.at = self.positions(name, sink);
        }
        let old = (offset < 32).then(|| self.wal.clone());
        self.wal.write(offset, data);
        let after = self.wal.committed();
        if after.salts != before.salts {
            self.begins_anew(name, &old.unwrap_or_default(), after, sink);
        } else if after.frames > before.frames {
            self.completes(name, before, after, sink);
            return self.death.take().inspect(|_| self.tell());
        } else if after.frames < before.frames {
            self.disagree(format!(
                "a write at {offset} takes back commits: {before:?} to {after:?}"
            ));
        }
        None
    }

    fn truncated(&mut self, name: &str, kind: Kind, size: usize, sink: &ModelSink) {
        if kind == Kind::Database {
            self.database.resize(size, 0);
            return;
        }
        let before = self.wal.committed();
        let old = self.wal.clone();
        self.wal.truncate(size);
        let after = self.wal.committed();
        if after.frames < before.frames {
            self.begins_anew(name, &old, after, sink);
        }
    }

    /// The WAL is deleted.
    fn ends(&mut self, name: &str, sink: &ModelSink) {
        let old = std::mem::take(&mut self.wal);
        if old.committed().frames > 0 {
            self.begins_anew(name, &old, Committed::default(), sink);
        }
    }

    /// The WAL goes or begins again: all that was in it must be in the database file.
    fn begins_anew(&mut self, name: &str, old: &WalImage, after: Committed, sink: &ModelSink) {
        if after.frames != 0 {
            self.disagree(format!("a new WAL begins with commits: {after:?}"));
        }
        if self.at.is_empty() {
            return;
        }
        for (page, image) in old.pages_from(0) {
            let size = image.len();
            let start = (page as usize - 1) * size;
            let counts = old.database_size().is_some_and(|pages| page <= pages);
            if counts && self.database.get(start..start + size) != Some(&image) {
                self.disagree(format!("page {page} goes with the WAL"));
            }
        }
        let now = self.positions(name, sink);
        if now.iter().max() < self.at.iter().min() {
            let was = std::mem::take(&mut self.at);
            self.disagree(format!("the file is at {now:?}, it was at {was:?}"));
        }
        self.at = now;
    }

    /// A transaction became valid: it must be the next entry of the log.
    fn completes(&mut self, name: &str, before: Committed, after: Committed, sink: &ModelSink) {
        self.completions += 1;
        if after.commits != before.commits + 1 {
            self.disagree(format!(
                "one write completed more than one commit: {before:?} to {after:?}"
            ));
        }
        let size = self.wal.database_size().unwrap_or(0);
        let mut pages = self.wal.pages_from(before.frames);
        pages.retain(|page, _| *page <= size);
        let entry_is_next = |at: &usize| {
            sink.with_log(name, |log| {
                log.entries
                    .get(*at)
                    .is_some_and(|entry| entry.commit.page_count == size && entry.pages == pages)
            })
        };
        let at = std::mem::take(&mut self.at);
        self.at = at
            .iter()
            .filter(|at| entry_is_next(at))
            .map(|at| at + 1)
            .collect();
        if self.at.is_empty() {
            let end = sink.last_lsn(name);
            let pages: Vec<u32> = pages.into_keys().collect();
            self.disagree(format!(
                "a commit of pages {pages:?} is valid in the file at entry {at:?}, \
                 and is not the next one of the log, which ends at {end}"
            ));
        }
    }

    /// After which entries of the log the database was what the files hold.
    fn positions(&self, name: &str, sink: &ModelSink) -> BTreeSet<usize> {
        let mut bytes = self.database.clone();
        let pages = self.wal.pages_from(0);
        let size = match (bytes.get(16..18), pages.values().next()) {
            (_, Some(image)) => image.len(),
            (Some(&[0, 1]), None) => 65536,
            (Some(field), None) => usize::from(u16::from_be_bytes([field[0], field[1]])),
            (None, None) => return BTreeSet::new(),
        };
        if let Some(count) = self.wal.database_size() {
            bytes.resize(count as usize * size, 0);
        }
        for (page, image) in &pages {
            let start = (*page as usize - 1) * size;
            if let Some(place) = bytes.get_mut(start..start + size) {
                place.copy_from_slice(image);
            }
        }
        let mut checksum = DatabaseChecksum::EMPTY;
        for (number, page) in (1..).zip(bytes.chunks(size.max(1))) {
            checksum.toggle(PageChecksum::of(PageNo::new(number).unwrap(), page));
        }
        sink.with_log(name, |log| {
            let entries = (1..).zip(&log.entries);
            let same = entries.filter(|(_, entry)| entry.commit.checksum == checksum);
            same.map(|(at, _)| at).collect()
        })
    }

    fn disagree(&mut self, what: String) {
        self.disagreements.push(what);
    }

    /// Before the process dies: what was found must not die with it.
    fn tell(&self) {
        if !self.disagreements.is_empty() {
            eprintln!("{:#?}", self.disagreements);
            std::process::exit(77);
        }
    }
}
