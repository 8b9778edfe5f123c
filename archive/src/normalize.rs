//! From the parts of an entry to one image per page, ascending, in bounded memory.
//!
//! A transaction may be larger than memory, and its slots say only at its end which of them count
//! (`wire::entry`). So images go to an unnamed scratch file as they come, the index of slots stays
//! in memory (about 40 bytes per slot), and afterwards the pages are read back in order.

use crate::chunk::EntryFacts;
use durovfs_wire::entry::{SlotIndex, TransactionSummary};
use durovfs_wire::{EntryPart, LogPosition, PageNo, PageSize, PartKind, PayloadError};
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Images kept in memory before a scratch file is made. Most transactions stay far below.
const MEMORY_IMAGES_BYTES: usize = 4 << 20;

/// Why parts are not an entry.
#[derive(Debug, thiserror::Error)]
pub enum NormalizeError {
    /// A part that does not follow the one before.
    #[error("part {part} of {position} does not follow what came before it")]
    OutOfOrder {
        /// The entry of the part.
        position: LogPosition,
        /// Its index.
        part: u32,
    },
    /// A payload that is no run of slots.
    #[error("part of {position}: {source}")]
    Payload {
        /// The entry of the part.
        position: LogPosition,
        /// What is wrong with it.
        source: PayloadError,
    },
    /// More slots than a transaction can have pages.
    #[error("transaction at {0} has too many slots")]
    TooLarge(LogPosition),
    /// The scratch file cannot be used.
    #[error("scratch file in {folder:?}: {source}")]
    Scratch {
        /// Where it is.
        folder: PathBuf,
        /// What failed.
        source: io::Error,
    },
}

/// An entry as the archive keeps it.
#[derive(Debug)]
pub enum NormalizedEntry {
    /// A transaction.
    Transaction(TransactionPages),
    /// An epoch start; it has no pages.
    EpochStart(EntryFacts),
}

impl NormalizedEntry {
    /// Where the entry stands in the log.
    pub fn position(&self) -> LogPosition {
        match self {
            Self::Transaction(pages) => pages.summary.position,
            Self::EpochStart(facts) => facts.position,
        }
    }
}

/// A transaction with one image per page, ascending.
#[derive(Debug)]
pub struct TransactionPages {
    /// Its facts; `slot_count` is the number of images.
    pub summary: TransactionSummary,
    pages: Vec<(PageNo, u32)>,
    images: Spool,
}

impl TransactionPages {
    /// How many pages it has an image of.
    pub fn image_count(&self) -> u32 {
        self.summary.commit.slot_count
    }

    /// The pages, ascending.
    pub fn page_numbers(&self) -> impl ExactSizeIterator<Item = PageNo> + '_ {
        self.pages.iter().map(|(page_no, _)| *page_no)
    }

    /// Calls `sink` with each page and its image, ascending.
    ///
    /// # Errors
    /// When the scratch file cannot be read, or `sink` fails.
    pub fn for_each<E: From<io::Error>>(
        &self,
        mut sink: impl FnMut(PageNo, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut image = vec![0u8; self.summary.commit.page_size.get()];
        for (page_no, index) in &self.pages {
            self.images
                .read(u64::from(*index) * image.len() as u64, &mut image)?;
            sink(*page_no, &image)?;
        }
        Ok(())
    }
}

/// Takes the parts of a log in order and gives its entries, one at a time.
#[derive(Debug)]
pub struct Normalizer {
    scratch: PathBuf,
    open: Option<OpenTransaction>,
}

#[derive(Debug)]
struct OpenTransaction {
    position: LogPosition,
    page_size: PageSize,
    next_part: u32,
    slots: SlotIndex<u32>,
    image_count: u32,
    images: Spool,
}

impl Normalizer {
    /// One that puts large transactions into `scratch`, a folder that exists.
    pub fn new(scratch: impl Into<PathBuf>) -> Self {
        Self {
            scratch: scratch.into(),
            open: None,
        }
    }

    /// Whether a transaction was begun and not ended.
    pub fn is_open(&self) -> bool {
        self.open.is_some()
    }

    /// Takes a part; gives the entry when it is complete. A part 0 begins its entry afresh.
    ///
    /// # Errors
    /// When the parts are not those of a log in order, or the scratch file fails. Nothing of the
    /// open entry counts after that.
    pub fn push(&mut self, part: &EntryPart) -> Result<Option<NormalizedEntry>, NormalizeError> {
        let header = &part.header;
        let position = header.position();
        let out_of_order = || NormalizeError::OutOfOrder {
            position,
            part: header.part,
        };
        let before = self.open.take();
        if let PartKind::EpochStart {
            time,
            last_transaction,
        } = header.kind
        {
            part.slots()
                .map_err(|source| NormalizeError::Payload { position, source })?;
            if header.part != 0 {
                return Err(out_of_order());
            }
            let facts = EntryFacts::epoch_start(position, time, last_transaction);
            return Ok(Some(NormalizedEntry::EpochStart(facts)));
        }
        let page_size = header.page_size().ok_or_else(out_of_order)?;
        let mut open = match before {
            _ if header.part == 0 => OpenTransaction::new(position, page_size),
            Some(open) if open.continues_with(part, page_size) => open,
            Some(_) | None => return Err(out_of_order()),
        };
        open.take_slots(part, &self.scratch)?;
        match header.transaction() {
            Some(summary) => Ok(Some(NormalizedEntry::Transaction(open.finish(summary)))),
            None => {
                self.open = Some(open);
                Ok(None)
            }
        }
    }
}

impl OpenTransaction {
    fn new(position: LogPosition, page_size: PageSize) -> Self {
        Self {
            position,
            page_size,
            next_part: 0,
            slots: SlotIndex::default(),
            image_count: 0,
            images: Spool::default(),
        }
    }

    fn continues_with(&self, part: &EntryPart, page_size: PageSize) -> bool {
        self.position == part.header.position()
            && self.page_size == page_size
            && self.next_part == part.header.part
    }

    fn take_slots(&mut self, part: &EntryPart, scratch: &Path) -> Result<(), NormalizeError> {
        let position = self.position;
        let slots = part
            .slots()
            .map_err(|source| NormalizeError::Payload { position, source })?;
        for slot in slots {
            self.images
                .append(slot.image, scratch)
                .map_err(|source| NormalizeError::Scratch {
                    folder: scratch.to_owned(),
                    source,
                })?;
            self.slots.insert(slot.slot, slot.page_no, self.image_count);
            self.image_count = self
                .image_count
                .checked_add(1)
                .ok_or(NormalizeError::TooLarge(position))?;
        }
        self.next_part = self
            .next_part
            .checked_add(1)
            .ok_or(NormalizeError::TooLarge(position))?;
        Ok(())
    }

    fn finish(self, mut summary: TransactionSummary) -> TransactionPages {
        let commit = &mut summary.commit;
        // An image of a page that the same transaction cut off is no part of the database.
        let pages: Vec<_> = self
            .slots
            .finish(commit.slot_count)
            .into_iter()
            .take_while(|(page_no, _)| page_no.get() <= commit.page_count)
            .collect();
        // Page numbers are u32 and distinct, and at most `page_count` of them.
        commit.slot_count = pages.len() as u32;
        TransactionPages {
            summary,
            pages,
            images: self.images,
        }
    }
}

/// Bytes that are appended, then read anywhere: in memory at first, then in an unnamed file.
#[derive(Debug, Default)]
struct Spool {
    /// What is not in the file yet; it follows what is.
    memory: Vec<u8>,
    file: Option<File>,
    file_bytes: u64,
}

impl Spool {
    fn append(&mut self, bytes: &[u8], scratch: &Path) -> io::Result<()> {
        if self.memory.len() + bytes.len() > MEMORY_IMAGES_BYTES {
            let file = match &mut self.file {
                Some(file) => file,
                None => self.file.insert(tempfile::tempfile_in(scratch)?),
            };
            file.write_all(&self.memory)?;
            self.file_bytes += self.memory.len() as u64;
            self.memory.clear();
        }
        self.memory.extend_from_slice(bytes);
        Ok(())
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        match (&self.file, offset.checked_sub(self.file_bytes)) {
            (Some(file), None) => file.read_exact_at(into, offset),
            (_, Some(start)) => {
                let start = start as usize;
                let bytes = self.memory.get(start..start + into.len());
                into.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
                Ok(())
            }
            (None, None) => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}
