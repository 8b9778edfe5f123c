//! Brings the local file level with the log: missing entries are appended to the WAL as committed
//! frames, or written into the database file when there is no WAL to append to.
//!
//! An entry's parts are gathered in a spool, because slots may be written again and only the last
//! part tells which count; the spool keeps little in memory and the rest in a temporary file.

use crate::change_counter::ChangeCounter;
use crate::connection::{Connection, LogLevel};
use crate::error::Refusal;
use crate::file::BaseFile;
use crate::mark::{KnownTransaction, Mark, MarkState, WalPosition, misuse, with_suffix};
use crate::page_table::{PageChanges, PageTable};
use crate::sink::{Sink, SinkError, SinkErrorKind};
use durovfs_wire::client::FailureKind;
use durovfs_wire::entry::{EntryPart, PartKind, SlotIndex, TransactionSummary};
use durovfs_wire::wal::{FRAME_HEADER_BYTES, FrameHeader, WalChecksum, WalHeader, WalSalts};
use durovfs_wire::{DatabaseChecksum, Lsn, PageChecksum, PageNo, PageSize};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};

/// Bytes of an entry that are kept in memory; what is more goes to a file. The open call of an
/// application must not grow it by the size of a transaction.
const SPOOL_MEMORY_BYTES: usize = 8 << 20;

/// Images of one entry, wherever they fit.
struct Spool {
    memory: Vec<u8>,
    file: Option<File>,
    file_bytes: u64,
    path: PathBuf,
}

impl Spool {
    fn new(database_path: &Path) -> Self {
        let path = with_suffix(database_path, "-durovfs-spool");
        Self {
            memory: Vec::new(),
            file: None,
            file_bytes: 0,
            path,
        }
    }

    fn clear(&mut self) {
        self.memory.clear();
        self.file_bytes = 0;
    }

    fn push(&mut self, bytes: &[u8]) -> Result<u64, Refusal> {
        if self.file_bytes == 0 && self.memory.len() + bytes.len() <= SPOOL_MEMORY_BYTES {
            let at = self.memory.len() as u64;
            self.memory.extend_from_slice(bytes);
            return Ok(at);
        }
        let file = match self.file.take() {
            Some(file) => file,
            None => {
                let mut options = OpenOptions::new();
                options.read(true).write(true).create(true).truncate(true);
                let file = options.open(&self.path);
                let file = file.map_err(|error| Refusal::io("create spool", &self.path, &error))?;
                // Nobody else needs the name, and a crash must not leave it behind.
                std::fs::remove_file(&self.path)
                    .map_err(|error| Refusal::io("unlink spool", &self.path, &error))?;
                file
            }
        };
        let at = self.memory.len() as u64 + self.file_bytes;
        let written = file.write_at(bytes, self.file_bytes);
        self.file = Some(file);
        written?;
        self.file_bytes += bytes.len() as u64;
        Ok(at)
    }

    fn read(&self, at: u64, image: &mut [u8]) -> Result<(), Refusal> {
        let in_memory = self.memory.len() as u64;
        if at < in_memory {
            let start = at as usize;
            image.copy_from_slice(&self.memory[start..start + image.len()]);
            return Ok(());
        }
        match &self.file {
            Some(file) => BaseFile::read_at(file, image, at - in_memory).map(drop),
            None => Err(misuse("spool without a file")),
        }
    }
}

/// A transaction of the log with its pages.
pub(crate) struct Transaction<'a> {
    pub(crate) summary: TransactionSummary,
    pages: BTreeMap<PageNo, u64>,
    spool: &'a Spool,
}

impl Transaction<'_> {
    fn page_size(&self) -> PageSize {
        self.summary.commit.page_size
    }

    /// Calls `visit` with each page that counts, ascending.
    fn for_each_page(
        &self,
        mut visit: impl FnMut(PageNo, &[u8]) -> Result<(), Refusal>,
    ) -> Result<(), Refusal> {
        let mut image = vec![0u8; self.page_size().get()];
        let page_count = self.summary.commit.page_count;
        for (page_no, at) in self
            .pages
            .iter()
            .filter(|(page, _)| page.get() <= page_count)
        {
            self.spool.read(*at, &mut image)?;
            visit(*page_no, &image)?;
        }
        Ok(())
    }
}

/// Reads the log from `first_lsn` on and calls `visit` with each transaction.
pub(crate) fn read_transactions(
    sink: &dyn Sink,
    state: &MarkState,
    first_lsn: Lsn,
    database_path: &Path,
    visit: &mut dyn FnMut(&Transaction<'_>) -> Result<(), Refusal>,
) -> Result<(), Refusal> {
    let mut spool = Spool::new(database_path);
    let mut index: SlotIndex<u64> = SlotIndex::default();
    let mut failure: Option<Refusal> = None;
    let mut take = |part: EntryPart| -> Result<(), Refusal> {
        if part.header.part == 0 {
            spool.clear();
            index = SlotIndex::default();
        }
        let slots = part
            .slots()
            .map_err(|error| Refusal::cannot_open(error.to_string()))?;
        for slot in slots {
            let at = spool.push(slot.image)?;
            index.insert(slot.slot, slot.page_no, at);
        }
        let (PartKind::Commit(commit), Some(summary)) =
            (part.header.kind, part.header.transaction())
        else {
            return Ok(());
        };
        let pages = std::mem::take(&mut index).finish(commit.slot_count);
        visit(&Transaction {
            summary,
            pages,
            spool: &spool,
        })
    };
    let read = sink.read_log(state.database, first_lsn, &mut |part| {
        take(part).map_err(|refusal| {
            let message = refusal.message.clone();
            failure = Some(refusal);
            SinkError {
                kind: SinkErrorKind::Stopped,
                message,
            }
        })
    });
    match (failure, read) {
        (Some(refusal), _) => Err(refusal),
        (None, Ok(())) => Ok(()),
        (None, Err(error)) => {
            let hint = match error.kind {
                SinkErrorKind::Refused(FailureKind::NotCovered) => "; use `durovfs restore`",
                _ => "",
            };
            let message = format!("read the log from lsn {first_lsn} on: {error}{hint}");
            Err(Refusal::cannot_open(message))
        }
    }
}

/// Writes transactions where SQLite finds them, and keeps the page table and the state level.
pub(crate) struct Applier<'a> {
    database: &'a dyn BaseFile,
    /// The WAL, when frames are to be appended to it.
    wal: Option<(&'a dyn BaseFile, WalHeader)>,
    mark: &'a mut Mark,
    table: PageTable,
    pub(crate) state: MarkState,
    /// Pages were written into the database file itself.
    is_in_place: bool,
    /// Of the file, once it is written in place.
    counter: Option<ChangeCounter>,
}

impl<'a> Applier<'a> {
    /// One that goes on from this state.
    pub(crate) fn new(
        database: &'a dyn BaseFile,
        wal: Option<(&'a dyn BaseFile, WalHeader)>,
        mark: &'a mut Mark,
        state: MarkState,
    ) -> Self {
        Self {
            database,
            wal,
            table: mark.page_table(),
            mark,
            state,
            is_in_place: false,
            counter: None,
        }
    }

    /// Applies one transaction; the mark follows with [`Self::finish`].
    pub(crate) fn apply(&mut self, transaction: &Transaction<'_>) -> Result<(), Refusal> {
        let commit = transaction.summary.commit;
        let fresh = commit.whole_image;
        if self
            .state
            .last
            .is_some_and(|last| last.page_size != commit.page_size)
            && !fresh
        {
            return Err(Refusal::cannot_open(
                "the log changes the page size without an image",
            ));
        }
        let (old_count, before) = match fresh {
            true => (0, DatabaseChecksum::EMPTY),
            false => (self.state.page_count(), self.state.checksum()),
        };
        let mut changes = PageChanges::new();
        transaction.for_each_page(|page_no, image| {
            changes.insert(page_no, PageChecksum::of(page_no, image));
            Ok(())
        })?;
        let mut checksum =
            self.table
                .checksum_after(before, old_count, commit.page_count, &changes)?;
        if checksum != commit.checksum && !fresh {
            // Whoever was killed may have noted some of these pages, or all, and not the mark.
            checksum = self.table.checksum_with(commit.page_count, &changes)?;
        }
        // While a cut-short run is mended the table may hold pages of later transactions already.
        if checksum != commit.checksum && !self.state.applying {
            return Err(Refusal::cannot_open(format!(
                "checksum after {} is {checksum} here and {} in the log: they differ; {}",
                transaction.summary.position,
                commit.checksum,
                self.mark.way_out()
            )));
        }
        if fresh || self.wal.is_none() {
            self.write_in_place(transaction)?;
        } else {
            self.append_frames(transaction)?;
        }
        if fresh {
            self.table.clear()?;
        }
        self.table.apply(old_count, commit.page_count, &changes)?;
        self.state.last = Some(KnownTransaction {
            position: transaction.summary.position,
            checksum: commit.checksum,
            page_size: commit.page_size,
            page_count: commit.page_count,
        });
        Ok(())
    }

    /// Writes the mark: the local file holds all that was applied.
    pub(crate) fn finish(&mut self) -> Result<(), Refusal> {
        if self.state.applying {
            let sum = self.table.sum(1, self.state.page_count())?;
            if sum != self.state.checksum() {
                return Err(Refusal::cannot_open(format!(
                    "checksum is {sum} after the roll forward, in the log {}; {}",
                    self.state.checksum(),
                    self.mark.way_out()
                )));
            }
            self.database.sync()?;
            self.state.applying = false;
        }
        self.state.in_flight = None;
        self.mark.write(&self.state)?;
        self.mark.stamp()?;
        // Or a loss of power would have all of it fetched and written once more.
        match self.is_in_place {
            true => self.mark.sync(),
            false => Ok(()),
        }
    }

    fn write_in_place(&mut self, transaction: &Transaction<'_>) -> Result<(), Refusal> {
        if !self.is_in_place {
            // On disk before the first byte: from here on the file's content is no transaction's,
            // and after a loss of power nothing else would tell that it is to be written again.
            self.is_in_place = true;
            self.state.applying = true;
            self.state.wal = None;
            self.mark.write(&self.state)?;
            self.mark.sync()?;
        }
        if let Some((wal, _)) = self.wal.take() {
            wal.truncate(0)?;
        }
        if self.counter.is_none()
            && let Some(counter) = ChangeCounter::next_of(self.database)?
        {
            // Connections that hold no lock have pages of what is overwritten now.
            counter.write_to(self.database)?;
            self.counter = Some(counter);
        }
        let page_size = transaction.page_size();
        let mut first = vec![0u8; page_size.get()];
        transaction
            .for_each_page(|page_no, image| {
                let offset = page_no.file_offset(page_size);
                let Some(counter) = self.counter.filter(|_| offset == 0) else {
                    return self.database.write_at(image, offset);
                };
                first.copy_from_slice(image);
                counter.put_into(&mut first);
                self.database.write_at(&first, offset)
            })
            .and_then(|()| {
                let pages = u64::from(transaction.summary.commit.page_count);
                self.database.truncate(pages * page_size.get() as u64)
            })
    }

    fn append_frames(&mut self, transaction: &Transaction<'_>) -> Result<(), Refusal> {
        let Some((wal, header)) = self.wal else {
            return Err(misuse("no WAL to append to"));
        };
        let page_size = transaction.page_size();
        let last = self.state.wal.filter(|end| end.salts == header.salts);
        let (mut frame, mut chain) = match last {
            Some(end) => (end.frame, end.checksum),
            None => (0, header.checksum),
        };
        let total = transaction
            .pages
            .keys()
            .filter(|page| page.get() <= transaction.summary.commit.page_count);
        let (total, mut done) = (total.count(), 0);
        let mut bytes = Vec::with_capacity(FRAME_HEADER_BYTES + page_size.get());
        transaction.for_each_page(|page_no, image| {
            done += 1;
            frame += 1;
            let is_last = done == total;
            let mut head = FrameHeader {
                page_no: page_no.get(),
                commit_page_count: if is_last {
                    transaction.summary.commit.page_count
                } else {
                    0
                },
                salts: header.salts,
                checksum: WalChecksum::default(),
            };
            chain = head.chain(chain, header.big_endian_checksums, image);
            head.checksum = chain;
            bytes.clear();
            bytes.extend_from_slice(&head.encode());
            bytes.extend_from_slice(image);
            wal.write_at(&bytes, WalHeader::frame_offset(page_size, frame))
        })?;
        self.state.wal = Some(WalPosition {
            salts: header.salts,
            checkpoint_sequence: header.checkpoint_sequence,
            frame,
            checksum: chain,
        });
        Ok(())
    }
}

/// A header for a WAL that is begun by a roll forward. Its salts only must differ from those of
/// frames that may still stand in the file.
fn fresh_wal_header(page_size: PageSize, state: &MarkState) -> WalHeader {
    let nanos = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.as_nanos() as u64);
    let mut seed = state.database.as_bytes().to_vec();
    seed.extend_from_slice(&nanos.to_le_bytes());
    let salts = WalSalts(crc32fast::hash(&seed), nanos as u32);
    let header = WalHeader {
        big_endian_checksums: cfg!(target_endian = "big"),
        page_size,
        checkpoint_sequence: 0,
        salts,
        checksum: WalChecksum::default(),
    };
    WalHeader::parse(&header.encode()).unwrap_or(header)
}

impl Connection {
    /// Appends what the log has and the local file lacks. SQLite's write lock on the WAL is held.
    pub(crate) fn roll_forward_live(&mut self) -> Result<(), Refusal> {
        let Some(wal) = self.wal.take() else {
            return Err(misuse("roll forward without a WAL"));
        };
        let result = self.roll_forward_into(wal.as_ref());
        self.wal = Some(wal);
        result
    }

    fn roll_forward_into(&mut self, wal: &dyn BaseFile) -> Result<(), Refusal> {
        let state = self.mark.read()?;
        let Some(last) = state.last else {
            return Err(misuse("roll forward without a base"));
        };
        let mut head = [0u8; durovfs_wire::wal::WAL_HEADER_BYTES];
        wal.read_at(&mut head, 0)?;
        let header = match (WalHeader::parse(&head), state.wal) {
            (Some(header), Some(end)) if header.salts == end.salts => header,
            // The refused transaction began the WAL again: all before it is in the database file.
            (Some(header), _) => header,
            (None, _) => {
                let header = fresh_wal_header(last.page_size, &state);
                wal.write_at(&header.encode(), 0)?;
                header
            }
        };
        let surroundings = self.surroundings.clone();
        let database: &dyn BaseFile = self.database.as_ref();
        let mut applier = Applier::new(database, Some((wal, header)), &mut self.mark, state);
        let first_lsn = last.position.lsn.next();
        read_transactions(
            surroundings.sink.as_ref(),
            &state,
            first_lsn,
            &self.path,
            &mut |tx| {
                if tx.summary.commit.whole_image {
                    return Err(Refusal::not_committed(
                        "the log replaces the whole database: close all connections and open it \
                         again",
                    ));
                }
                applier.apply(tx)
            },
        )?;
        applier.finish()?;
        let end = applier.state.last_lsn();
        let line = format!("{}: rolled forward to lsn {end}", self.path.display());
        (surroundings.log)(LogLevel::Info, &line);
        Ok(())
    }
}
