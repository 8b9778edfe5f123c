//! Reads a chunk: the index from its tail alone, the images from a local file.

use super::format::{
    BLOCK_PREFIX_BYTES, BlockPrefix, FOOTER_BYTES, Footer, HEADER_FIXED_BYTES, Header,
    PAGE_NUMBER_BYTES, RECORD_BYTES, decode_record,
};
use super::{ChunkError, ChunkKind, EntryFacts, EntryKind, LogIdentity};
use durovfs_wire::entry::PayloadBuilder;
use durovfs_wire::{EntryPart, Lsn, PageNo, PartHeader, PartKind};
use std::fs::File;
use std::os::unix::fs::FileExt;

/// Footer and index of a chunk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChunkIndex {
    /// The footer.
    pub footer: Footer,
    /// The entries, in order.
    pub entries: Vec<EntryFacts>,
}

impl ChunkIndex {
    /// Decodes the index blocks that stand between `footer.index_offset` and the footer.
    ///
    /// # Errors
    /// When they are damaged, or do not fit the footer.
    pub fn decode(footer: Footer, mut stored: &[u8]) -> Result<Self, ChunkError> {
        const DAMAGED: ChunkError = ChunkError::Damaged("index is damaged");
        let mut decompressor = zstd::bulk::Decompressor::new()?;
        let mut entries = Vec::with_capacity(footer.entry_count as usize);
        let mut offset = footer.index_offset;
        while !stored.is_empty() {
            let (head, rest) = stored
                .split_first_chunk::<BLOCK_PREFIX_BYTES>()
                .ok_or(DAMAGED)?;
            let prefix = BlockPrefix::decode(head)?;
            let (block, rest) = rest.split_at_checked(prefix.stored_bytes).ok_or(DAMAGED)?;
            let raw = prefix.unpack(offset, block, &mut decompressor)?;
            let whole = raw.len() % RECORD_BYTES == 0;
            if !whole || entries.len() + raw.len() / RECORD_BYTES > footer.entry_count as usize {
                return Err(DAMAGED);
            }
            for record in raw.chunks_exact(RECORD_BYTES) {
                entries.push(decode_record(record)?);
            }
            offset += (BLOCK_PREFIX_BYTES + block.len()) as u64;
            stored = rest;
        }
        let index = Self { footer, entries };
        index.check()?;
        Ok(index)
    }

    /// The index must say what the footer says, in an order that a log can have.
    fn check(&self) -> Result<(), ChunkError> {
        let footer = &self.footer;
        let bounds = self.entries.first().zip(self.entries.last());
        let fits = bounds.is_some_and(|(first, last)| {
            first.position.lsn == footer.first_lsn
                && first.time == footer.first_time
                && last.position == footer.last_position
                && last.time == footer.last_time
        });
        let ordered = self.entries.windows(2).all(|pair| {
            pair[0].position.lsn.next() == pair[1].position.lsn
                && pair[0].epoch() <= pair[1].epoch()
        });
        let count = self.entries.len() == footer.entry_count as usize;
        let bytes: u64 = self.entries.iter().map(EntryFacts::image_bytes).sum();
        let inside = self
            .entries
            .iter()
            .all(|facts| facts.place.block < footer.index_offset);
        let snapshot = footer.kind == ChunkKind::Chunk
            || self.entries.iter().all(
                |facts| matches!(facts.kind, EntryKind::Transaction(commit) if commit.whole_image),
            );
        if fits && ordered && count && bytes == footer.image_bytes && inside && snapshot {
            Ok(())
        } else {
            Err(ChunkError::Damaged("index does not fit the footer"))
        }
    }

    /// The entry with this position in the log, if it is in the chunk.
    pub fn entry(&self, lsn: Lsn) -> Option<&EntryFacts> {
        let index = lsn.get().checked_sub(self.footer.first_lsn.get())?;
        self.entries.get(usize::try_from(index).ok()?)
    }
}

/// A chunk in a local file.
pub struct ChunkReader {
    file: File,
    identity: LogIdentity,
    header_bytes: u64,
    index: ChunkIndex,
    decompressor: zstd::bulk::Decompressor<'static>,
    /// The block read last: many small transactions share one.
    block: Option<Block>,
}

impl std::fmt::Debug for ChunkReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChunkReader")
            .field("footer", &self.index.footer)
            .finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct Block {
    offset: u64,
    next_offset: u64,
    raw: Vec<u8>,
}

impl ChunkReader {
    /// Reads header, footer and index.
    ///
    /// # Errors
    /// When any of them is damaged or of another version.
    pub fn open(file: File) -> Result<Self, ChunkError> {
        let object_bytes = file.metadata()?.len();
        if object_bytes < (HEADER_FIXED_BYTES + FOOTER_BYTES) as u64 {
            return Err(ChunkError::Damaged("object is shorter than a chunk can be"));
        }
        let mut fixed = [0u8; HEADER_FIXED_BYTES];
        file.read_exact_at(&mut fixed, 0)?;
        let mut header = vec![0u8; Header::length(&fixed)?];
        read_inside(&file, &mut header, 0, object_bytes)?;
        let header_bytes = header.len() as u64;
        let header = Header::decode(&header)?;
        let mut bytes = [0u8; FOOTER_BYTES];
        let footer_offset = object_bytes - FOOTER_BYTES as u64;
        file.read_exact_at(&mut bytes, footer_offset)?;
        let footer = Footer::decode(&bytes, object_bytes)?;
        if footer.kind != header.kind
            || footer.database != header.identity.database
            || footer.first_lsn != header.first_lsn
            || footer.index_offset < header_bytes
        {
            return Err(ChunkError::Damaged(
                "header and footer are not of one chunk",
            ));
        }
        // At most MAX_INDEX_BYTES: the footer was checked.
        let mut stored = vec![0u8; (footer_offset - footer.index_offset) as usize];
        file.read_exact_at(&mut stored, footer.index_offset)?;
        Ok(Self {
            file,
            identity: header.identity,
            header_bytes,
            index: ChunkIndex::decode(footer, &stored)?,
            decompressor: zstd::bulk::Decompressor::new()?,
            block: None,
        })
    }

    /// The log that the chunk belongs to.
    pub fn identity(&self) -> &LogIdentity {
        &self.identity
    }

    /// Footer and index.
    pub fn index(&self) -> &ChunkIndex {
        &self.index
    }

    /// Calls `sink` with each image of an entry of this chunk, by page, ascending.
    ///
    /// # Errors
    /// When the images are damaged, or `sink` fails.
    pub fn read_images(
        &mut self,
        facts: &EntryFacts,
        mut sink: impl FnMut(PageNo, &[u8]) -> std::io::Result<()>,
    ) -> Result<(), ChunkError> {
        const DAMAGED: ChunkError = ChunkError::Damaged("images do not fit the index");
        let EntryKind::Transaction(commit) = facts.kind else {
            return Ok(());
        };
        if commit.slot_count == 0 {
            return Ok(());
        }
        self.load_block(facts.place.block)?;
        let record_bytes = PAGE_NUMBER_BYTES + commit.page_size.get();
        let mut within = facts.place.within as usize;
        let mut last_page = 0;
        for _ in 0..commit.slot_count {
            if self
                .block
                .as_ref()
                .is_some_and(|block| within == block.raw.len())
            {
                self.load_next_block()?;
                within = 0;
            }
            let raw = self.block.as_ref().map_or(&[][..], |block| &block.raw);
            let record = within
                .checked_add(record_bytes)
                .and_then(|end| raw.get(within..end));
            let (number, image) = record
                .and_then(|r| r.split_first_chunk::<PAGE_NUMBER_BYTES>())
                .ok_or(DAMAGED)?;
            let page_no = PageNo::new(u32::from_le_bytes(*number)).ok_or(DAMAGED)?;
            if page_no.get() <= last_page || page_no.get() > commit.page_count {
                return Err(DAMAGED);
            }
            last_page = page_no.get();
            sink(page_no, image)?;
            within += record_bytes;
        }
        Ok(())
    }

    /// The entry as parts of a log, for those that read the archive where a journal has no more.
    ///
    /// # Errors
    /// When the images are damaged, or `sink` fails.
    pub fn read_parts(
        &mut self,
        facts: &EntryFacts,
        mut sink: impl FnMut(EntryPart) -> std::io::Result<()>,
    ) -> Result<(), ChunkError> {
        let mut header = PartHeader {
            database: self.identity.database,
            epoch: facts.epoch(),
            lsn: facts.position.lsn,
            part: 0,
            kind: match facts.kind {
                EntryKind::EpochStart { last_transaction } => PartKind::EpochStart {
                    time: facts.time,
                    last_transaction,
                },
                EntryKind::Transaction(commit) => PartKind::Pages {
                    page_size: commit.page_size,
                },
            },
        };
        let mut payload = PayloadBuilder::default();
        let mut slot = 0;
        if let EntryKind::Transaction(commit) = facts.kind {
            self.read_images(facts, |page_no, image| {
                if !payload.has_room(commit.page_size) {
                    sink(EntryPart {
                        header,
                        payload: payload.take(),
                    })?;
                    header.part += 1;
                }
                payload.push(slot, page_no, image);
                slot += 1;
                Ok(())
            })?;
            header.kind = PartKind::Commit(commit);
        }
        Ok(sink(EntryPart {
            header,
            payload: payload.take(),
        })?)
    }

    /// Reads all of the chunk, so that damage anywhere in it is found.
    ///
    /// # Errors
    /// When anything is damaged.
    pub fn verify(&mut self) -> Result<(), ChunkError> {
        let mut offset = self.header_bytes;
        while offset < self.index.footer.index_offset {
            offset = self.load_block(offset)?;
        }
        for facts in self.index.entries.clone() {
            self.read_images(&facts, |_, _| Ok(()))?;
        }
        Ok(())
    }

    fn load_next_block(&mut self) -> Result<u64, ChunkError> {
        let next = self
            .block
            .as_ref()
            .map_or(self.header_bytes, |block| block.next_offset);
        self.load_block(next)
    }

    /// Makes the block at `offset` the current one; gives the offset of the next.
    fn load_block(&mut self, offset: u64) -> Result<u64, ChunkError> {
        if let Some(block) = self.block.as_ref().filter(|block| block.offset == offset) {
            return Ok(block.next_offset);
        }
        let end = self.index.footer.index_offset;
        let mut head = [0u8; BLOCK_PREFIX_BYTES];
        read_inside(&self.file, &mut head, offset, end)?;
        let prefix = BlockPrefix::decode(&head)?;
        let mut stored = vec![0u8; prefix.stored_bytes];
        let start = offset + BLOCK_PREFIX_BYTES as u64;
        read_inside(&self.file, &mut stored, start, end)?;
        let raw = prefix.unpack(offset, &stored, &mut self.decompressor)?;
        let next_offset = start + stored.len() as u64;
        self.block = Some(Block {
            offset,
            next_offset,
            raw,
        });
        Ok(next_offset)
    }
}

fn read_inside(file: &File, into: &mut [u8], offset: u64, end: u64) -> Result<(), ChunkError> {
    match offset.checked_add(into.len() as u64) {
        Some(stop) if stop <= end => Ok(file.read_exact_at(into, offset)?),
        Some(_) | None => Err(ChunkError::Damaged(
            "block reaches beyond its part of the object",
        )),
    }
}
