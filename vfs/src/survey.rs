//! What a local file holds, found out by reading it: the database header, the WAL's valid chain,
//! and the checksum of both laid over each other.

use crate::error::Refusal;
use crate::file::BaseFile;
use crate::mark::{KnownTransaction, WalPosition};
use crate::page_table::{PageChanges, PageTable};
use durovfs_wire::wal::{
    FRAME_HEADER_BYTES, FrameHeader, WAL_HEADER_BYTES, WalChecksum, WalHeader,
};
use durovfs_wire::{DatabaseChecksum, PageChecksum, PageNo, PageSize};
use std::collections::{BTreeMap, BTreeSet};

/// SQLite takes its locks on the byte at this offset, and never uses the page that holds it.
const LOCK_BYTE: u64 = 0x4000_0000;

/// What every database file begins with.
const MAGIC: &[u8; 16] = b"SQLite format 3\0";

/// Whether this is the page that SQLite never uses.
pub fn is_lock_page(page_no: PageNo, page_size: PageSize) -> bool {
    u64::from(page_no.get()) == LOCK_BYTE / page_size.get() as u64 + 1
}

/// What the first page says about a database file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DatabaseHeader {
    /// Page size.
    pub page_size: PageSize,
    /// Pages, WAL left aside.
    pub page_count: u32,
}

impl DatabaseHeader {
    /// Reads it; none when the file is empty.
    ///
    /// # Errors
    /// When it cannot be read; of the kind `CannotOpen` when it is no SQLite database.
    pub fn read(file: &dyn BaseFile) -> Result<Option<Self>, Refusal> {
        let size = file.size()?;
        if size == 0 {
            return Ok(None);
        }
        let mut bytes = [0u8; 100];
        file.read_at(&mut bytes, 0)?;
        Self::parse(&bytes, size).map(Some)
    }

    fn parse(bytes: &[u8; 100], size: u64) -> Result<Self, Refusal> {
        let word = |at: usize| {
            u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        let page_size = PageSize::from_database_header(u16::from_be_bytes([bytes[16], bytes[17]]));
        let (Ok(page_size), true) = (page_size, bytes[..16] == *MAGIC) else {
            return Err(Refusal::cannot_open(
                "the local file is not a SQLite database",
            ));
        };
        // As SQLite does: a page that the file has a part of counts.
        let in_file = u32::try_from(size.div_ceil(page_size.get() as u64)).unwrap_or(u32::MAX);
        // The header's own count is valid when the change counter says so (fileformat2, 1.3.8); one
        // that is larger than the file is damage, and not to be believed.
        let counted = word(24) == word(92) && word(28) != 0;
        let page_count = match counted {
            true => word(28).min(in_file),
            false => in_file,
        };
        Ok(Self {
            page_size,
            page_count,
        })
    }
}

/// Whether a page, that has this image in the file, was written by a transaction.
pub type IsWritten<'a> = &'a dyn Fn(PageNo, &[u8]) -> bool;

/// Whether a page has content: one without may be a page that no transaction wrote.
pub fn is_not_empty(_: PageNo, image: &[u8]) -> bool {
    image.iter().any(|byte| *byte != 0)
}

/// The committed part of a WAL.
#[derive(Debug, Clone)]
pub struct WalSurvey {
    /// The header.
    pub header: WalHeader,
    /// Where the committed part ends.
    pub end: WalPosition,
    /// Database size in pages after it; none when nothing is committed.
    pub page_count: Option<u32>,
    /// Frame that holds the newest committed image of each page.
    pub pages: BTreeMap<PageNo, u32>,
}

impl WalSurvey {
    /// Reads a WAL as SQLite's own recovery does; none when it has no valid header.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn read(wal: &dyn BaseFile) -> Result<Option<Self>, Refusal> {
        let mut head = [0u8; WAL_HEADER_BYTES];
        if wal.read_at(&mut head, 0)? < WAL_HEADER_BYTES {
            return Ok(None);
        }
        let Some(header) = WalHeader::parse(&head) else {
            return Ok(None);
        };
        let mut end = WalPosition {
            salts: header.salts,
            checkpoint_sequence: header.checkpoint_sequence,
            frame: 0,
            checksum: header.checksum,
        };
        let (mut page_count, mut pages) = (None, BTreeMap::new());
        let mut pending: Vec<(PageNo, u32)> = Vec::new();
        let mut chain = header.checksum;
        let mut bytes = vec![0u8; FRAME_HEADER_BYTES + header.page_size.get()];
        for index in 1u32.. {
            let Some((frame, page_no)) = valid_frame(wal, &header, index, chain, &mut bytes)?
            else {
                break;
            };
            chain = frame.checksum;
            pending.push((page_no, index));
            if frame.commit_page_count != 0 {
                pages.extend(pending.drain(..));
                page_count = Some(frame.commit_page_count);
                (end.frame, end.checksum) = (index, chain);
            }
        }
        if let Some(count) = page_count {
            pages.retain(|page_no, _| page_no.get() <= count);
        }
        Ok(Some(Self {
            header,
            end,
            page_count,
            pages,
        }))
    }
}

/// The frame at an index, if the chain of salts and checksums holds through it. `bytes` has room
/// for a frame.
fn valid_frame(
    wal: &dyn BaseFile,
    header: &WalHeader,
    index: u32,
    chain: WalChecksum,
    bytes: &mut [u8],
) -> Result<Option<(FrameHeader, PageNo)>, Refusal> {
    let offset = WalHeader::frame_offset(header.page_size, index);
    if wal.read_at(bytes, offset)? < bytes.len() {
        return Ok(None);
    }
    let (head, image) = bytes.split_at(FRAME_HEADER_BYTES);
    let mut fixed = [0u8; FRAME_HEADER_BYTES];
    fixed.copy_from_slice(head);
    let frame = FrameHeader::parse(&fixed);
    let Some(page_no) = PageNo::new(frame.page_no) else {
        return Ok(None);
    };
    let chain = frame.chain(chain, header.big_endian_checksums, image);
    let holds = frame.salts == header.salts && frame.checksum == chain;
    Ok(holds.then_some((frame, page_no)))
}

/// Where a WAL ends that has commits after a place; none when it has none. A WAL of another
/// generation than the place's has only what came after.
///
/// # Errors
/// When it cannot be read.
pub fn committed_after(
    wal: &dyn BaseFile,
    place: Option<WalPosition>,
) -> Result<Option<WalPosition>, Refusal> {
    let mut head = [0u8; WAL_HEADER_BYTES];
    let read = wal.read_at(&mut head, 0)?;
    let Some(header) = WalHeader::parse(&head).filter(|_| read == head.len()) else {
        return Ok(None);
    };
    let mut at = place
        .filter(|place| place.salts == header.salts)
        .unwrap_or(WalPosition {
            salts: header.salts,
            checkpoint_sequence: header.checkpoint_sequence,
            frame: 0,
            checksum: header.checksum,
        });
    let mut end = None;
    let mut bytes = vec![0u8; FRAME_HEADER_BYTES + header.page_size.get()];
    while let Some((frame, _)) = valid_frame(wal, &header, at.frame + 1, at.checksum, &mut bytes)? {
        at.frame += 1;
        at.checksum = frame.checksum;
        if frame.commit_page_count != 0 {
            end = Some(at);
        }
    }
    Ok(end)
}

/// A database file with the committed part of its WAL laid over it.
pub struct Content<'a> {
    /// The database file.
    pub database: &'a dyn BaseFile,
    /// The WAL, if one has committed frames.
    pub wal: Option<(&'a dyn BaseFile, &'a WalSurvey)>,
    /// Page size and count.
    pub header: DatabaseHeader,
}

impl<'a> Content<'a> {
    /// Lays them over each other; none when there is no content at all.
    ///
    /// # Errors
    /// When they cannot be read; of the kind `CannotOpen` when they are no database together.
    pub fn new(
        database: &'a dyn BaseFile,
        wal: Option<(&'a dyn BaseFile, &'a WalSurvey)>,
    ) -> Result<Option<Self>, Refusal> {
        let Some(in_file) = DatabaseHeader::read(database)? else {
            return Ok(None);
        };
        let wal = wal.filter(|(_, survey)| survey.page_count.is_some());
        let header = match &wal {
            None => in_file,
            Some((_, survey)) => DatabaseHeader {
                page_size: survey.header.page_size,
                page_count: survey.page_count.unwrap_or(0),
            },
        };
        if header.page_size != in_file.page_size {
            return Err(Refusal::cannot_open(
                "page sizes of the file and its WAL differ",
            ));
        }
        Ok(Some(Self {
            database,
            wal,
            header,
        }))
    }

    /// Reads a page.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn read_page(&self, page_no: PageNo, image: &mut [u8]) -> Result<(), Refusal> {
        if let Some((wal, survey)) = self.wal
            && let Some(frame) = survey.pages.get(&page_no)
        {
            let offset = WalHeader::frame_offset(self.header.page_size, *frame);
            return wal
                .read_at(image, offset + FRAME_HEADER_BYTES as u64)
                .map(drop);
        }
        self.database
            .read_at(image, page_no.file_offset(self.header.page_size))
            .map(drop)
    }

    /// Calls `visit` with every page that SQLite uses, in order.
    ///
    /// # Errors
    /// When one cannot be read, or `visit` says so.
    pub fn for_each_page(
        &self,
        mut visit: impl FnMut(PageNo, &[u8]) -> Result<(), Refusal>,
    ) -> Result<(), Refusal> {
        let mut image = vec![0u8; self.header.page_size.get()];
        for page_no in (1..=self.header.page_count).filter_map(PageNo::new) {
            if !is_lock_page(page_no, self.header.page_size) {
                self.read_page(page_no, &mut image)?;
                visit(page_no, &image)?;
            }
        }
        Ok(())
    }

    /// Whether the WAL has a page behind a position: frames of an older WAL are before all of it.
    pub fn is_in_wal_since(&self, position: Option<WalPosition>, page_no: PageNo) -> bool {
        let Some((_, survey)) = self.wal else {
            return false;
        };
        let before = position.filter(|position| position.salts == survey.header.salts);
        let before = before.map_or(0, |position| position.frame);
        let frame = survey.pages.get(&page_no);
        frame.is_some_and(|frame| *frame > before)
    }

    /// Checksums of all pages, and their sum. A page that `table` does not know was never written
    /// by a transaction (SQLite freed it before), so that whatever the file has there is not part
    /// of the database. Where there is no table, `is_written` decides.
    ///
    /// # Errors
    /// When a page cannot be read.
    pub fn checksums(
        &self,
        table: Option<(&PageTable, u32)>,
        is_written: IsWritten<'_>,
    ) -> Result<(DatabaseChecksum, PageChanges), Refusal> {
        let mut sum = DatabaseChecksum::EMPTY;
        let mut pages = PageChanges::new();
        self.for_each_page(|page_no, image| {
            let skipped = match table {
                Some((table, count)) if page_no.get() <= count => {
                    table.read(page_no)? == PageChecksum::default()
                }
                _ => !is_written(page_no, image),
            };
            if !skipped {
                let checksum = PageChecksum::of(page_no, image);
                sum.toggle(checksum);
                pages.insert(page_no, checksum);
            }
            Ok(())
        })?;
        Ok((sum, pages))
    }

    /// Pages on SQLite's list of free pages that are no trunks of it: what stands on them is of no
    /// meaning (<https://sqlite.org/fileformat2.html>, 1.5).
    ///
    /// # Errors
    /// When a page cannot be read.
    pub fn free_pages(&self) -> Result<BTreeSet<PageNo>, Refusal> {
        let mut free = BTreeSet::new();
        let mut image = vec![0u8; self.header.page_size.get()];
        let word = |image: &[u8], at: usize| {
            u32::from_be_bytes([image[at], image[at + 1], image[at + 2], image[at + 3]])
        };
        let Some(first) = PageNo::new(1) else {
            return Ok(free);
        };
        self.read_page(first, &mut image)?;
        let mut trunk = PageNo::new(word(&image, 32));
        // A damaged list may be a ring: no list has more trunks than the database has pages.
        for _ in 0..self.header.page_count {
            let Some(page_no) = trunk.filter(|p| p.get() <= self.header.page_count) else {
                break;
            };
            self.read_page(page_no, &mut image)?;
            let count = (word(&image, 4) as usize).min(image.len() / 4 - 2);
            free.extend((0..count).filter_map(|leaf| PageNo::new(word(&image, 8 + leaf * 4))));
            trunk = PageNo::new(word(&image, 0));
        }
        Ok(free)
    }

    /// Whether this is what the mark and its page table say, but for free pages.
    ///
    /// # Errors
    /// When a page cannot be read.
    pub fn is_as_marked(
        &self,
        last: &KnownTransaction,
        table: &PageTable,
    ) -> Result<bool, Refusal> {
        let same_shape =
            (self.header.page_size, self.header.page_count) == (last.page_size, last.page_count);
        if !same_shape || table.sum(1, last.page_count)? != last.checksum {
            return Ok(false);
        }
        let mut different = BTreeSet::new();
        self.for_each_page(|page_no, image| {
            let known = table.read(page_no)?;
            if known != PageChecksum::default() && known != PageChecksum::of(page_no, image) {
                different.insert(page_no);
            }
            Ok(())
        })?;
        Ok(different.is_empty() || different.is_subset(&self.free_pages()?))
    }
}
