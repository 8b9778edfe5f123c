//! The mark: the file `<database>-durovfs`, which says which log a local file belongs to and what
//! of it the file is known to hold. All processes that use the database share it.
//!
//! Little-endian numbers. Changed only under SQLite's write lock, but for the stamp, which belongs
//! to the holder of the checkpoint lock.
//!
//! | offset | bytes | |
//! |---|---|---|
//! | 0, 512 | 512 each | two slots, written in turn; the valid one of higher sequence counts |
//! | 1024 | 40 | stamp of the database file: magic, size, inode, change time (s, ns), CRC-32 |
//! | 1088 | 88 | confirmation: magic, CRC-32 of the rest, client, sequence, flags, last, wal |
//! | 1280 | 1 | nothing; locked by whoever has the database open (`in_use.rs`) |
//! | 2048 | up to 6144 | name: length (u16), CRC-32 of the text, text |
//! | 8192 | 8 per page | page table (`page_table.rs`) |
//!
//! A slot:
//!
//! | offset | bytes | |
//! |---|---|---|
//! | 0 | 8 | magic `DUROMARK` |
//! | 8 | 4 | version, 1 |
//! | 12 | 4 | CRC-32 of bytes 16..256 |
//! | 16 | 8 | sequence |
//! | 24 | 16 | log id |
//! | 40 | 4 | flags: 1 last, 2 wal, 4 in flight, 8 applying, 16 unconfirmed, 32 its wal |
//! | 44 | 4 + 8 + 8 + 4 + 4 | last: epoch, lsn, checksum, page size, page count |
//! | 72 | 6 × 4 | wal: salt 1, salt 2, checkpoint sequence, frame, checksum 1, 2 |
//! | 96 | 16 + 8 + 8 + 8 | in flight: client, sequence, base lsn, checksum |
//! | 136 | 16 + 8 + 28 + 24 | unconfirmed: client, sequence; what is confirmed: last, wal |
//! | 212 | 8 | begins after: lsn |
//!
//! The confirmation is written by the holder of the checkpoint lock, who may not write a slot: all
//! deferred commits up to this one are on a quorum's disks.

use crate::error::{Refusal, RefusalKind};
use crate::file::BaseFile;
use crate::in_use;
use crate::page_table::PageTable;
use crate::resolve::way_out;
use durovfs_wire::wal::{WalChecksum, WalSalts};
use durovfs_wire::{
    ClientId, DatabaseChecksum, DatabaseId, Epoch, LogPosition, Lsn, Origin, PageSize,
};
use libsqlite3_sys as sqlite;
use std::fs::{File, OpenOptions, TryLockError};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

const MAGIC: &[u8; 8] = b"DUROMARK";
const VERSION: u32 = 1;
const SLOT_BYTES: usize = 512;
const SLOT_USED_BYTES: usize = 256;
const STAMP_OFFSET: u64 = 1024;
const STAMP_BYTES: usize = 40;
const STAMP_MAGIC: u32 = 0x5354_4d50;
const CONFIRMATION_OFFSET: u64 = 1088;
const CONFIRMATION_BYTES: usize = 88;
const CONFIRMATION_MAGIC: u32 = 0x4346_524d;
const NAME_OFFSET: u64 = 2048;
/// Longest name of a database: a path of the longest length Linux allows.
pub const MAX_NAME_BYTES: usize = 4096;
/// Where the page table begins.
pub const PAGE_TABLE_OFFSET: u64 = 8192;

const FLAG_LAST: u32 = 1;
const FLAG_WAL: u32 = 2;
const FLAG_IN_FLIGHT: u32 = 4;
const FLAG_APPLYING: u32 = 8;
const FLAG_UNCONFIRMED: u32 = 16;
const FLAG_CONFIRMED_WAL: u32 = 32;
const UNCONFIRMED_OFFSET: usize = 136;
const BEGINS_AFTER_OFFSET: usize = 212;
const KNOWN_BYTES: usize = 28;
const ORIGIN_BYTES: usize = 24;

/// The last transaction that the local file is known to hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KnownTransaction {
    /// Where it stands in the log.
    pub position: LogPosition,
    /// Checksum of the database after it.
    pub checksum: DatabaseChecksum,
    /// Page size of the database.
    pub page_size: PageSize,
    /// Pages of the database after it.
    pub page_count: u32,
}

/// A place in a WAL: after this frame of this generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WalPosition {
    /// The generation.
    pub salts: WalSalts,
    /// How often the WAL was started again.
    pub checkpoint_sequence: u32,
    /// Index of the last committed frame, from 1; zero when there is none yet.
    pub frame: u32,
    /// Running checksum through it.
    pub checksum: WalChecksum,
}

/// What a local file holds, and where its WAL ends then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tip {
    /// The last transaction.
    pub last: KnownTransaction,
    /// The WAL's end after it; none when there is no WAL, or all of it is in the database file.
    pub wal: Option<WalPosition>,
}

/// Deferred commits that the local file has, and that may not be on a quorum's disks yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unconfirmed {
    /// The newest of them.
    pub newest: Origin,
    /// What the file goes back to when they are lost.
    pub confirmed: Tip,
}

/// A commit that was sent, or is about to be, and whose outcome is not known to be certain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InFlight {
    /// Who made it.
    pub origin: Origin,
    /// What it was made on top of.
    pub base_lsn: Lsn,
    /// Checksum of the database after it.
    pub checksum: DatabaseChecksum,
}

/// What a slot says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MarkState {
    /// The log.
    pub database: DatabaseId,
    /// What the file holds; none before the first transaction. With unconfirmed commits its
    /// position is that of the newest confirmed one.
    pub last: Option<KnownTransaction>,
    /// Where its WAL ends; none when there is no WAL, or all of it is in the database file.
    pub wal: Option<WalPosition>,
    /// The commit in flight.
    pub in_flight: Option<InFlight>,
    /// Entries after `last` are being written into the database file itself; until this is cleared
    /// its content is no transaction's, and writing them again mends it.
    pub applying: bool,
    /// Deferred commits after the confirmed ones.
    pub unconfirmed: Option<Unconfirmed>,
    /// While `last` is none: what the file will hold has nothing of the log up to here, and its
    /// first transaction, a whole image, comes after it. Zero for a new log.
    pub begins_after: Lsn,
}

impl MarkState {
    /// Of a database that has no transaction yet.
    pub const fn new(database: DatabaseId) -> Self {
        Self {
            database,
            last: None,
            wal: None,
            in_flight: None,
            applying: false,
            unconfirmed: None,
            begins_after: Lsn::ZERO,
        }
    }

    /// Position of the last transaction, or of the one that the first will follow.
    pub fn last_lsn(&self) -> Lsn {
        self.last
            .map_or(self.begins_after, |last| last.position.lsn)
    }

    /// Checksum of what the file holds.
    pub fn checksum(&self) -> DatabaseChecksum {
        self.last
            .map_or(DatabaseChecksum::EMPTY, |last| last.checksum)
    }

    /// Pages that the file holds.
    pub fn page_count(&self) -> u32 {
        self.last.map_or(0, |last| last.page_count)
    }
}

/// How a database file looked at some moment: size, inode, time of its last change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Look([u8; STAMP_BYTES]);

/// The open mark of one database.
#[derive(Debug)]
pub struct Mark {
    file: Arc<File>,
    path: PathBuf,
    database_path: PathBuf,
    sequence: u64,
    name: String,
}

/// The mark's path.
pub fn mark_path(database_path: &Path) -> PathBuf {
    with_suffix(database_path, "-durovfs")
}

/// The path with something added to its last component.
pub fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

impl Mark {
    /// Opens the mark and reads it; none when there is no such file, or it was never finished.
    ///
    /// # Errors
    /// When it cannot be read, is damaged, or of an unknown version.
    pub fn open(database_path: &Path) -> Result<Option<(Self, MarkState)>, Refusal> {
        let path = mark_path(database_path);
        let file = match OpenOptions::new().read(true).write(true).open(&path) {
            Ok(file) => Arc::new(file),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Refusal::io("open mark", &path, &error)),
        };
        let database_path = database_path.to_owned();
        let mut mark = Self {
            file,
            path,
            database_path,
            sequence: 0,
            name: String::new(),
        };
        if mark.file.size()? < NAME_OFFSET || mark.is_blank()? {
            return Ok(None);
        }
        mark.name = mark.read_name()?;
        let state = mark.read()?;
        Ok(Some((mark, state)))
    }

    /// Whether nothing of it reached the disk before the power was lost.
    fn is_blank(&self) -> Result<bool, Refusal> {
        let mut bytes = [0u8; 2 * SLOT_BYTES];
        self.file.read_at(&mut bytes, 0)?;
        Ok(bytes.iter().all(|byte| *byte == 0))
    }

    /// Makes a mark, or begins one afresh. The caller holds the database's exclusive lock.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn create(database_path: &Path, name: &str, state: &MarkState) -> Result<Self, Refusal> {
        let path = mark_path(database_path);
        if name.len() > MAX_NAME_BYTES {
            return Err(Refusal::cannot_open(format!(
                "database name of {} bytes is longer than {MAX_NAME_BYTES}",
                name.len()
            )));
        }
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        // As readable as the database is: whoever may write the one must be able to do the other.
        let mode = std::fs::metadata(database_path).map_or(0o644, |m| m.mode() & 0o666);
        let file = options.mode(mode).open(&path);
        let file = Arc::new(file.map_err(|error| Refusal::io("create mark", &path, &error))?);
        file.truncate(0)?;
        let mut head = u16::try_from(name.len())
            .unwrap_or(u16::MAX)
            .to_le_bytes()
            .to_vec();
        head.extend_from_slice(&crc32fast::hash(name.as_bytes()).to_le_bytes());
        head.extend_from_slice(name.as_bytes());
        file.write_at(&head, NAME_OFFSET)?;
        let database_path = database_path.to_owned();
        let name = name.to_owned();
        let mut mark = Self {
            file,
            path,
            database_path,
            sequence: 0,
            name,
        };
        mark.write(state)?;
        Ok(mark)
    }

    /// The name that the database had in the cluster when the mark was made.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What a person does when the local file is not what it should be.
    pub(crate) fn way_out(&self) -> String {
        way_out(&self.database_path, &self.name)
    }

    /// The page table, which lives in the same file.
    pub fn page_table(&self) -> PageTable {
        PageTable::new(Arc::clone(&self.file))
    }

    /// Reads the newest slot. Call under the write lock: another process may have changed it.
    ///
    /// # Errors
    /// When it cannot be read, or no slot is valid.
    pub fn read(&mut self) -> Result<MarkState, Refusal> {
        let Some((sequence, state)) = self.newest_slot()? else {
            let message = format!(
                "{}: no slot of the mark is valid (magic, version {VERSION} or CRC); {}",
                self.path.display(),
                self.way_out()
            );
            return Err(Refusal::new(RefusalKind::CannotOpen, message));
        };
        self.sequence = sequence;
        Ok(state)
    }

    /// What the newest slot says, for a message; none when there is none.
    pub(crate) fn newest(&self) -> Option<MarkState> {
        self.newest_slot().ok().flatten().map(|(_, state)| state)
    }

    fn newest_slot(&self) -> Result<Option<(u64, MarkState)>, Refusal> {
        let mut bytes = [0u8; 2 * SLOT_BYTES];
        self.file.read_at(&mut bytes, 0)?;
        let (first, second) = bytes.split_at(SLOT_BYTES);
        Ok([decode(first), decode(second)]
            .into_iter()
            .flatten()
            .max_by_key(|s| s.0))
    }

    /// Writes the other slot.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&mut self, state: &MarkState) -> Result<(), Refusal> {
        let sequence = self.sequence + 1;
        let slot = encode(sequence, state);
        self.file
            .write_at(&slot, (sequence % 2) * SLOT_BYTES as u64)?;
        self.sequence = sequence;
        Ok(())
    }

    /// Notes that the deferred commits up to this one are on a quorum's disks, and what the file
    /// holds after it. Durable when it returns: the checkpoint that follows cannot be undone.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn confirm(&self, newest: Origin, tip: &Tip) -> Result<(), Refusal> {
        let mut bytes = vec![0u8; 8];
        bytes[..4].copy_from_slice(&CONFIRMATION_MAGIC.to_le_bytes());
        encode_origin(&mut bytes, newest);
        bytes.extend_from_slice(&u32::from(tip.wal.is_some()).to_le_bytes());
        encode_known(&mut bytes, &tip.last);
        if let Some(wal) = &tip.wal {
            encode_wal(&mut bytes, wal);
        }
        bytes.resize(CONFIRMATION_BYTES, 0);
        let crc = crc32fast::hash(&bytes[8..]);
        bytes[4..8].copy_from_slice(&crc.to_le_bytes());
        self.file.write_at(&bytes, CONFIRMATION_OFFSET)?;
        self.file.sync()
    }

    /// What was confirmed last; none when nothing was, or the confirmation was never finished.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn confirmation(&self) -> Result<Option<(Origin, Tip)>, Refusal> {
        let mut bytes = [0u8; CONFIRMATION_BYTES];
        self.file.read_at(&mut bytes, CONFIRMATION_OFFSET)?;
        let is_whole = word(&bytes, 0) == CONFIRMATION_MAGIC
            && word(&bytes, 4) == crc32fast::hash(&bytes[8..]);
        let at = 8 + ORIGIN_BYTES + 4;
        let last = decode_known(&bytes, at).filter(|_| is_whole);
        Ok(last.map(|last| {
            let has_wal = word(&bytes, 8 + ORIGIN_BYTES) != 0;
            let wal = has_wal.then(|| decode_wal(&bytes, at + KNOWN_BYTES));
            (decode_origin(&bytes, 8), Tip { last, wal })
        }))
    }

    /// Holds other processes off making deferred commits, while the file lives. None when another
    /// process does so.
    ///
    /// # Errors
    /// When the mark cannot be opened or locked.
    pub fn try_own(&self) -> Result<Option<File>, Refusal> {
        let options = OpenOptions::new().read(true).write(true).open(&self.path);
        let file = options.map_err(|error| Refusal::io("open mark", &self.path, &error))?;
        match file.try_lock() {
            Ok(()) => Ok(Some(file)),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(Refusal::io("lock mark", &self.path, &error)),
        }
    }

    /// Tells other openers, for as long as it is open, that this one has found the file level.
    ///
    /// # Errors
    /// When the mark cannot be locked.
    pub(crate) fn hold_in_use(&self) -> Result<(), Refusal> {
        in_use::hold(&self.file).map_err(|error| Refusal::io("lock mark", &self.path, &error))
    }

    /// Whether another opener has told so.
    ///
    /// # Errors
    /// When the lock cannot be asked for.
    pub(crate) fn is_in_use(&self) -> Result<bool, Refusal> {
        let held = in_use::is_held_by_others(&self.file);
        held.map_err(|error| Refusal::io("ask for the lock of mark", &self.path, &error))
    }

    /// Makes all that was written durable.
    ///
    /// # Errors
    /// When it cannot be synced.
    pub(crate) fn sync(&self) -> Result<(), Refusal> {
        self.file.sync()
    }

    /// Notes how the database file looks now, after a write of ours. A file that looks otherwise at
    /// the next open was written by somebody else, or a crash came between; then it is scanned.
    ///
    /// # Errors
    /// When the file cannot be looked at, or the mark not be written.
    pub fn stamp(&self) -> Result<(), Refusal> {
        self.stamp_as(&self.look()?)
    }

    /// How the database file looks now. Taken before the file is read, a stamp of it does not cover
    /// what is written meanwhile.
    ///
    /// # Errors
    /// When the file cannot be looked at.
    pub fn look(&self) -> Result<Look, Refusal> {
        self.fingerprint().map(Look)
    }

    /// Notes that the database file is ours as it looked then.
    ///
    /// # Errors
    /// When the mark cannot be written.
    pub fn stamp_as(&self, look: &Look) -> Result<(), Refusal> {
        self.file.write_at(&look.0, STAMP_OFFSET)
    }

    /// Before the database file is written otherwise than in a checkpoint: whoever looks at it
    /// before it is stamped again reads it. Times of files may be too coarse to show the write.
    ///
    /// # Errors
    /// When the mark cannot be written.
    pub fn void_stamp(&self) -> Result<(), Refusal> {
        self.file.write_at(&[0; STAMP_BYTES], STAMP_OFFSET)
    }

    /// Whether the database file looks as it was last stamped.
    ///
    /// # Errors
    /// When the file cannot be looked at, or the mark not be read.
    pub fn stamp_matches(&self) -> Result<bool, Refusal> {
        let mut stored = [0u8; STAMP_BYTES];
        self.file.read_at(&mut stored, STAMP_OFFSET)?;
        Ok(stored == self.fingerprint()?)
    }

    // By path: opening the database file itself, and closing it again, would drop SQLite's locks.
    fn fingerprint(&self) -> Result<[u8; STAMP_BYTES], Refusal> {
        let metadata = std::fs::metadata(&self.database_path)
            .map_err(|error| Refusal::io("stat", &self.database_path, &error))?;
        let mut bytes = [0u8; STAMP_BYTES];
        bytes[..4].copy_from_slice(&STAMP_MAGIC.to_le_bytes());
        bytes[4..12].copy_from_slice(&metadata.size().to_le_bytes());
        bytes[12..20].copy_from_slice(&metadata.ino().to_le_bytes());
        bytes[20..28].copy_from_slice(&metadata.ctime().to_le_bytes());
        bytes[28..36].copy_from_slice(&metadata.ctime_nsec().to_le_bytes());
        let crc = crc32fast::hash(&bytes[..36]);
        bytes[36..].copy_from_slice(&crc.to_le_bytes());
        Ok(bytes)
    }

    fn read_name(&self) -> Result<String, Refusal> {
        let mut head = [0u8; 6];
        self.file.read_at(&mut head, NAME_OFFSET)?;
        let length = usize::from(u16::from_le_bytes([head[0], head[1]]));
        let damaged = || {
            let message = format!("{}: the name in the mark is damaged", self.path.display());
            Refusal::new(RefusalKind::CannotOpen, message)
        };
        if length > MAX_NAME_BYTES {
            return Err(damaged());
        }
        let mut text = vec![0u8; length];
        self.file.read_at(&mut text, NAME_OFFSET + 6)?;
        if crc32fast::hash(&text).to_le_bytes() != head[2..] {
            return Err(damaged());
        }
        String::from_utf8(text).map_err(|_| damaged())
    }
}

/// Notes that the WAL of a database is gone or empty, with all of it in the database file. The
/// caller (SQLite) holds the locks under which it may end a WAL. Nothing happens without a mark.
///
/// # Errors
/// When the mark cannot be read or written.
pub fn note_wal_ended(database_path: &Path) -> Result<(), Refusal> {
    let Some((mut mark, mut state)) = Mark::open(database_path)? else {
        return Ok(());
    };
    if state.wal.take().is_some() {
        mark.write(&state)?;
    }
    Ok(())
}

/// A place in a WAL, for people.
pub(crate) fn describe(wal: &WalPosition) -> String {
    format!(
        "frame {} of salts {:08x} {:08x}",
        wal.frame, wal.salts.0, wal.salts.1
    )
}

/// Makes an empty slot's worth of a bad-argument error.
pub(crate) fn misuse(message: &str) -> Refusal {
    Refusal::new(RefusalKind::File(sqlite::SQLITE_IOERR), message)
}

fn encode(sequence: u64, state: &MarkState) -> [u8; SLOT_BYTES] {
    let mut out = Vec::with_capacity(SLOT_BYTES);
    out.extend_from_slice(MAGIC);
    out.extend_from_slice(&VERSION.to_le_bytes());
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&sequence.to_le_bytes());
    out.extend_from_slice(state.database.as_bytes());
    let flag = |set: bool, bit: u32| if set { bit } else { 0 };
    let flags = flag(state.last.is_some(), FLAG_LAST)
        | flag(state.wal.is_some(), FLAG_WAL)
        | flag(state.in_flight.is_some(), FLAG_IN_FLIGHT)
        | flag(state.applying, FLAG_APPLYING)
        | flag(state.unconfirmed.is_some(), FLAG_UNCONFIRMED)
        | flag(
            state.unconfirmed.is_some_and(|u| u.confirmed.wal.is_some()),
            FLAG_CONFIRMED_WAL,
        );
    out.extend_from_slice(&flags.to_le_bytes());
    if let Some(last) = &state.last {
        encode_known(&mut out, last);
    }
    out.resize(72, 0);
    if let Some(wal) = &state.wal {
        encode_wal(&mut out, wal);
    }
    out.resize(96, 0);
    if let Some(in_flight) = state.in_flight {
        encode_origin(&mut out, in_flight.origin);
        out.extend_from_slice(&in_flight.base_lsn.get().to_le_bytes());
        out.extend_from_slice(&in_flight.checksum.as_u64().to_le_bytes());
    }
    out.resize(UNCONFIRMED_OFFSET, 0);
    if let Some(unconfirmed) = &state.unconfirmed {
        encode_origin(&mut out, unconfirmed.newest);
        encode_known(&mut out, &unconfirmed.confirmed.last);
        if let Some(wal) = &unconfirmed.confirmed.wal {
            encode_wal(&mut out, wal);
        }
    }
    out.resize(BEGINS_AFTER_OFFSET, 0);
    out.extend_from_slice(&state.begins_after.get().to_le_bytes());
    out.resize(SLOT_BYTES, 0);
    let mut slot = [0u8; SLOT_BYTES];
    slot.copy_from_slice(&out);
    let crc = crc32fast::hash(&slot[16..SLOT_USED_BYTES]);
    slot[12..16].copy_from_slice(&crc.to_le_bytes());
    slot
}

fn encode_origin(out: &mut Vec<u8>, origin: Origin) {
    out.extend_from_slice(origin.client.as_bytes());
    out.extend_from_slice(&origin.sequence.to_le_bytes());
}

fn encode_known(out: &mut Vec<u8>, known: &KnownTransaction) {
    out.extend_from_slice(&known.position.epoch.get().to_le_bytes());
    out.extend_from_slice(&known.position.lsn.get().to_le_bytes());
    out.extend_from_slice(&known.checksum.as_u64().to_le_bytes());
    out.extend_from_slice(&u32::from(known.page_size).to_le_bytes());
    out.extend_from_slice(&known.page_count.to_le_bytes());
}

fn encode_wal(out: &mut Vec<u8>, wal: &WalPosition) {
    let words = [
        wal.salts.0,
        wal.salts.1,
        wal.checkpoint_sequence,
        wal.frame,
        wal.checksum.0,
        wal.checksum.1,
    ];
    words
        .iter()
        .for_each(|word| out.extend_from_slice(&word.to_le_bytes()));
}

fn word(bytes: &[u8], offset: usize) -> u32 {
    let mut word = [0u8; 4];
    word.copy_from_slice(&bytes[offset..offset + 4]);
    u32::from_le_bytes(word)
}

fn long(bytes: &[u8], offset: usize) -> u64 {
    u64::from(word(bytes, offset)) | u64::from(word(bytes, offset + 4)) << 32
}

fn decode_origin(bytes: &[u8], offset: usize) -> Origin {
    let mut client = [0u8; 16];
    client.copy_from_slice(&bytes[offset..offset + 16]);
    Origin {
        client: ClientId::from_bytes(client),
        sequence: long(bytes, offset + 16),
    }
}

/// None when the page size is none of SQLite's.
fn decode_known(bytes: &[u8], offset: usize) -> Option<KnownTransaction> {
    let epoch = Epoch::new(word(bytes, offset));
    Some(KnownTransaction {
        position: LogPosition::new(epoch, Lsn::new(long(bytes, offset + 4))),
        checksum: DatabaseChecksum::from_u64(long(bytes, offset + 12)),
        page_size: PageSize::try_from(word(bytes, offset + 20)).ok()?,
        page_count: word(bytes, offset + 24),
    })
}

fn decode_wal(bytes: &[u8], offset: usize) -> WalPosition {
    let word = |index: usize| word(bytes, offset + 4 * index);
    WalPosition {
        salts: WalSalts(word(0), word(1)),
        checkpoint_sequence: word(2),
        frame: word(3),
        checksum: WalChecksum(word(4), word(5)),
    }
}

fn decode(slot: &[u8]) -> Option<(u64, MarkState)> {
    let intact = slot[..8] == *MAGIC
        && word(slot, 8) == VERSION
        && word(slot, 12) == crc32fast::hash(&slot[16..SLOT_USED_BYTES]);
    let sequence = long(slot, 16);
    // After the last number there is none for the other slot. Nobody counts as far.
    if !intact || sequence == u64::MAX {
        return None;
    }
    let flags = word(slot, 40);
    let is_set = |flag: u32| flags & flag != 0;
    let last = match is_set(FLAG_LAST) {
        true => Some(decode_known(slot, 44)?),
        false => None,
    };
    let in_flight = is_set(FLAG_IN_FLIGHT).then(|| InFlight {
        origin: decode_origin(slot, 96),
        base_lsn: Lsn::new(long(slot, 120)),
        checksum: DatabaseChecksum::from_u64(long(slot, 128)),
    });
    let unconfirmed = match is_set(FLAG_UNCONFIRMED) {
        true => {
            let at = UNCONFIRMED_OFFSET + ORIGIN_BYTES;
            let last = decode_known(slot, at)?;
            let wal = is_set(FLAG_CONFIRMED_WAL).then(|| decode_wal(slot, at + KNOWN_BYTES));
            Some(Unconfirmed {
                newest: decode_origin(slot, UNCONFIRMED_OFFSET),
                confirmed: Tip { last, wal },
            })
        }
        false => None,
    };
    let mut id = [0u8; 16];
    id.copy_from_slice(&slot[24..40]);
    let state = MarkState {
        database: DatabaseId::from_bytes(id),
        last,
        wal: is_set(FLAG_WAL).then(|| decode_wal(slot, 72)),
        in_flight,
        applying: is_set(FLAG_APPLYING),
        unconfirmed,
        begins_after: Lsn::new(long(slot, BEGINS_AFTER_OFFSET)),
    };
    Some((sequence, state))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full() -> MarkState {
        MarkState {
            database: DatabaseId::from_bytes([7; 16]),
            last: Some(KnownTransaction {
                position: LogPosition::new(Epoch::new(3), Lsn::new(1 << 40)),
                checksum: DatabaseChecksum::from_u64(u64::MAX - 5),
                page_size: PageSize::try_from(65536).unwrap(),
                page_count: 9,
            }),
            wal: Some(WalPosition {
                salts: WalSalts(1, 2),
                checkpoint_sequence: 3,
                frame: 4,
                checksum: WalChecksum(5, 6),
            }),
            in_flight: Some(InFlight {
                origin: Origin {
                    client: ClientId::from_bytes([9; 16]),
                    sequence: 11,
                },
                base_lsn: Lsn::new(12),
                checksum: DatabaseChecksum::from_u64(13),
            }),
            applying: true,
            unconfirmed: Some(Unconfirmed {
                newest: Origin {
                    client: ClientId::from_bytes([8; 16]),
                    sequence: 14,
                },
                confirmed: Tip {
                    last: KnownTransaction {
                        position: LogPosition::new(Epoch::new(2), Lsn::new(15)),
                        checksum: DatabaseChecksum::from_u64(16),
                        page_size: PageSize::try_from(512).unwrap(),
                        page_count: 17,
                    },
                    wal: Some(WalPosition {
                        salts: WalSalts(18, 19),
                        checkpoint_sequence: 20,
                        frame: 21,
                        checksum: WalChecksum(22, 23),
                    }),
                },
            }),
            begins_after: Lsn::new(24),
        }
    }

    /// Broken, a database would be taken for another log's, or for behind when it is not.
    #[test]
    fn a_mark_reads_back_what_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let db = dir.path().join("a.db");
        std::fs::write(&db, b"x").unwrap();
        assert!(Mark::open(&db).unwrap().is_none());
        let mut mark = Mark::create(&db, "name", &MarkState::new(full().database)).unwrap();
        mark.write(&full()).unwrap();
        let (reopened, state) = Mark::open(&db).unwrap().unwrap();
        assert_eq!((reopened.name(), state), ("name", full()));
        assert!(!reopened.stamp_matches().unwrap());
        reopened.stamp().unwrap();
        assert!(reopened.stamp_matches().unwrap());
        std::fs::write(&db, b"xy").unwrap();
        assert!(!reopened.stamp_matches().unwrap());
    }

    /// Broken, commits that a checkpoint has moved into the database file would be taken back out
    /// of the WAL, and the file would be no transaction's.
    #[test]
    fn a_confirmation_reads_back_unless_it_is_torn() {
        let dir = tempfile::tempdir().unwrap();
        let db = dir.path().join("a.db");
        let mark = Mark::create(&db, "name", &full()).unwrap();
        assert_eq!(mark.confirmation().unwrap(), None);
        let Unconfirmed { newest, confirmed } = full().unconfirmed.unwrap();
        for wal in [confirmed.wal, None] {
            let tip = Tip { wal, ..confirmed };
            mark.confirm(newest, &tip).unwrap();
            assert_eq!(mark.confirmation().unwrap(), Some((newest, tip)));
        }
        mark.file
            .write_at(&[0xff], CONFIRMATION_OFFSET + 30)
            .unwrap();
        assert_eq!(mark.confirmation().unwrap(), None);
    }

    /// Broken, two processes would each take the other's commits for given up.
    #[test]
    fn one_process_owns_the_window() {
        let dir = tempfile::tempdir().unwrap();
        let db = dir.path().join("a.db");
        let mark = Mark::create(&db, "name", &full()).unwrap();
        let owned = mark.try_own().unwrap();
        assert!(owned.is_some());
        assert!(mark.try_own().unwrap().is_none());
        drop(owned);
        assert!(mark.try_own().unwrap().is_some());
    }

    /// Broken, a crash in the middle of writing a slot would make the database unopenable, or a
    /// damaged slot would be believed.
    #[test]
    fn a_torn_slot_leaves_the_one_before() {
        let dir = tempfile::tempdir().unwrap();
        let db = dir.path().join("a.db");
        let first = MarkState::new(DatabaseId::from_bytes([1; 16]));
        let mut mark = Mark::create(&db, "n", &first).unwrap();
        mark.write(&full()).unwrap();
        let torn_slot = (mark.sequence % 2) * SLOT_BYTES as u64;
        mark.file.write_at(&[0xff; 3], torn_slot + 50).unwrap();
        assert_eq!(mark.read().unwrap(), first);
        mark.file
            .write_at(&[0xff; 3], SLOT_BYTES as u64 - torn_slot + 50)
            .unwrap();
        assert!(mark.read().is_err());
    }

    /// Broken, the slot written after it would not be the newest, or the host would panic.
    #[test]
    fn a_slot_that_none_can_follow_is_not_believed() {
        assert_eq!(decode(&encode(7, &full())), Some((7, full())));
        assert_eq!(decode(&encode(u64::MAX, &full())), None);
    }
}
