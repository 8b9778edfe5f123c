//! Writes a chunk to a local file, entry by entry, in memory of one block and the index.

use super::format::{
    Footer, Header, MAX_BLOCK_RAW_BYTES, PAGE_NUMBER_BYTES, RECORD_BYTES, encode_block,
    encode_record,
};
use super::{
    ChunkError, ChunkKind, ChunkReader, EntryFacts, EntryKind, LogIdentity, MAX_ENTRIES, Place,
};
use crate::layout::{ChunkRange, SnapshotPoint};
use crate::normalize::NormalizedEntry;
use durovfs_wire::entry::TransactionSummary;
use durovfs_wire::{CommitHeader, Lsn, PageNo};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use tempfile::{NamedTempFile, TempPath};

/// Chunks are written beside commits, so speed counts; snapshots are read more often than written.
const CHUNK_COMPRESSION_LEVEL: i32 = 1;
const SNAPSHOT_COMPRESSION_LEVEL: i32 = 3;
/// Begins the names of files in a scratch folder.
pub(crate) const SCRATCH_PREFIX: &str = "durovfs-";

/// Writes one chunk or snapshot. The same entries give the same bytes, whoever writes them.
pub struct ChunkWriter {
    kind: ChunkKind,
    identity: LogIdentity,
    file: BufWriter<NamedTempFile>,
    offset: u64,
    raw: Vec<u8>,
    compressor: zstd::bulk::Compressor<'static>,
    entries: Vec<EntryFacts>,
    image_bytes: u64,
}

/// A finished chunk in a local file, which is deleted when this is dropped.
#[derive(Debug)]
pub struct SealedChunk {
    /// Chunk or snapshot.
    pub kind: ChunkKind,
    /// Its log.
    pub identity: LogIdentity,
    /// Its entries.
    pub range: ChunkRange,
    /// Length of the file.
    pub bytes: u64,
    /// Facts of its entries.
    pub entries: Vec<EntryFacts>,
    path: TempPath,
}

impl SealedChunk {
    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The transaction, for a snapshot's key.
    pub fn snapshot_point(&self) -> SnapshotPoint {
        let ChunkRange {
            last_lsn,
            last_epoch,
            last_time,
            ..
        } = self.range;
        SnapshotPoint {
            lsn: last_lsn,
            epoch: last_epoch,
            time: last_time,
        }
    }
}

impl std::fmt::Debug for ChunkWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChunkWriter")
            .field("identity", &self.identity)
            .field("entries", &self.entries.len())
            .field("image_bytes", &self.image_bytes)
            .finish_non_exhaustive()
    }
}

impl ChunkWriter {
    /// Begins a chunk in a temporary file in `scratch`.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub fn create(scratch: &Path, identity: &LogIdentity) -> Result<Self, ChunkError> {
        Self::begin(scratch, identity, ChunkKind::Chunk, CHUNK_COMPRESSION_LEVEL)
    }

    /// Begins a snapshot in a temporary file in `scratch`.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub fn create_snapshot(scratch: &Path, identity: &LogIdentity) -> Result<Self, ChunkError> {
        Self::begin(
            scratch,
            identity,
            ChunkKind::Snapshot,
            SNAPSHOT_COMPRESSION_LEVEL,
        )
    }

    fn begin(
        scratch: &Path,
        identity: &LogIdentity,
        kind: ChunkKind,
        level: i32,
    ) -> Result<Self, ChunkError> {
        let file = tempfile::Builder::new()
            .prefix(SCRATCH_PREFIX)
            .tempfile_in(scratch)?;
        Ok(Self {
            kind,
            identity: identity.clone(),
            file: BufWriter::new(file),
            offset: 0,
            raw: Vec::with_capacity(MAX_BLOCK_RAW_BYTES),
            compressor: zstd::bulk::Compressor::new(level)?,
            entries: Vec::new(),
            image_bytes: 0,
        })
    }

    /// Bytes of the images so far, before compression: what the size of a chunk is measured by.
    pub fn image_bytes(&self) -> u64 {
        self.image_bytes
    }

    /// Number of entries so far.
    pub fn entry_count(&self) -> usize {
        self.entries.len()
    }

    /// Whether no further entry fits.
    pub fn is_full(&self) -> bool {
        self.entries.len() >= MAX_ENTRIES
    }

    /// Adds an entry of the log, the next one after the last.
    ///
    /// # Errors
    /// When it is not the next one, the chunk is full, or the file cannot be written. The chunk is
    /// of no use after that.
    pub fn push(&mut self, entry: &NormalizedEntry) -> Result<(), ChunkError> {
        match entry {
            NormalizedEntry::EpochStart(facts) => self.add(*facts),
            NormalizedEntry::Transaction(pages) => {
                self.begin_transaction(pages.summary)?;
                pages.for_each(|page_no, image| self.push_image(page_no, image))
            }
        }
    }

    /// Adds an entry of another chunk.
    pub(crate) fn copy(
        &mut self,
        from: &mut ChunkReader,
        facts: &EntryFacts,
    ) -> Result<(), ChunkError> {
        match facts.transaction() {
            None => self.add(*facts),
            Some(summary) => {
                self.begin_transaction(summary)?;
                let failed = |error| std::io::Error::other(error);
                from.read_images(facts, |page_no, image| {
                    self.push_image(page_no, image).map_err(failed)
                })
            }
        }
    }

    /// Begins the transaction whose images [`Self::push_image`] then gets, `slot_count` of them.
    pub(crate) fn begin_transaction(
        &mut self,
        summary: TransactionSummary,
    ) -> Result<(), ChunkError> {
        let TransactionSummary { position, commit } = summary;
        let kind = EntryKind::Transaction(commit);
        self.add(EntryFacts {
            position,
            time: commit.time,
            kind,
            place: Place::default(),
        })?;
        self.image_bytes += u64::from(commit.slot_count) * commit.page_size.get() as u64;
        Ok(())
    }

    fn add(&mut self, mut facts: EntryFacts) -> Result<(), ChunkError> {
        if self.is_full() {
            return Err(ChunkError::Limit(
                "chunk has as many entries as one may have",
            ));
        }
        let got = facts.position;
        match self.entries.last() {
            Some(last) => {
                let previous = last.position;
                if got.lsn != previous.lsn.next() || got.epoch < previous.epoch {
                    return Err(ChunkError::OutOfOrder { previous, got });
                }
            }
            None => self.write_header(got.lsn)?,
        }
        if let EntryKind::Transaction(commit) = facts.kind {
            facts.place = self.next_place(&commit)?;
        }
        self.entries.push(facts);
        Ok(())
    }

    fn write_header(&mut self, first_lsn: Lsn) -> Result<(), ChunkError> {
        let header = Header {
            kind: self.kind,
            identity: self.identity.clone(),
            first_lsn,
        };
        let bytes = header.encode()?;
        self.file.write_all(&bytes)?;
        self.offset += bytes.len() as u64;
        Ok(())
    }

    /// Where the first image of a transaction will stand.
    fn next_place(&mut self, commit: &CommitHeader) -> Result<Place, ChunkError> {
        if commit.slot_count == 0 {
            return Ok(Place::default());
        }
        self.make_room(PAGE_NUMBER_BYTES + commit.page_size.get())?;
        Ok(Place {
            block: self.offset,
            within: self.raw.len() as u32,
        })
    }

    /// Adds an image of the transaction that was begun last.
    pub(crate) fn push_image(&mut self, page_no: PageNo, image: &[u8]) -> Result<(), ChunkError> {
        self.make_room(PAGE_NUMBER_BYTES + image.len())?;
        self.raw.extend_from_slice(&page_no.get().to_le_bytes());
        self.raw.extend_from_slice(image);
        Ok(())
    }

    fn make_room(&mut self, bytes: usize) -> Result<(), ChunkError> {
        if self.raw.len() + bytes > MAX_BLOCK_RAW_BYTES {
            self.flush_block()
        } else {
            Ok(())
        }
    }

    fn flush_block(&mut self) -> Result<(), ChunkError> {
        if self.raw.is_empty() {
            return Ok(());
        }
        let block = encode_block(self.offset, &self.raw, &mut self.compressor)?;
        self.file.write_all(&block)?;
        self.offset += block.len() as u64;
        self.raw.clear();
        Ok(())
    }

    /// Ends the chunk.
    ///
    /// # Errors
    /// When it has no entry, or the file cannot be written.
    pub fn finish(mut self) -> Result<SealedChunk, ChunkError> {
        let (Some(first), Some(last)) =
            (self.entries.first().copied(), self.entries.last().copied())
        else {
            return Err(ChunkError::Limit("chunk without entries"));
        };
        self.flush_block()?;
        let index_offset = self.offset;
        let entries = std::mem::take(&mut self.entries);
        for facts in &entries {
            self.make_room(RECORD_BYTES)?;
            encode_record(facts, &mut self.raw);
        }
        self.flush_block()?;
        let footer = Footer {
            kind: self.kind,
            database: self.identity.database,
            index_offset,
            entry_count: entries.len() as u32,
            first_lsn: first.position.lsn,
            last_position: last.position,
            first_time: first.time,
            last_time: last.time,
            image_bytes: self.image_bytes,
        };
        self.file.write_all(&footer.encode())?;
        let file = self
            .file
            .into_inner()
            .map_err(std::io::IntoInnerError::into_error)?;
        let bytes = self.offset + super::FOOTER_BYTES as u64;
        let range = ChunkRange {
            first_lsn: first.position.lsn,
            last_lsn: last.position.lsn,
            last_epoch: last.position.epoch,
            last_time: last.time,
        };
        let path = file.into_temp_path();
        Ok(SealedChunk {
            kind: self.kind,
            identity: self.identity,
            range,
            bytes,
            entries,
            path,
        })
    }
}

/// Makes a scratch folder, and removes what an earlier process left in it. The folder must belong
/// to the caller alone.
///
/// # Errors
/// When the folder cannot be made or read.
pub fn prepare_scratch(folder: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(folder)?;
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        if entry
            .file_name()
            .to_string_lossy()
            .starts_with(SCRATCH_PREFIX)
        {
            std::fs::remove_file(entry.path())?;
        }
    }
    File::open(folder)?.sync_all()
}
