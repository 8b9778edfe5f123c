//! The WAL tap: turns SQLite's writes to a `-wal` file, byte ranges at offsets, into page images of
//! the open transaction, and finds the **completing write**: the one after which the chain of salts
//! and checksums holds through a frame with a database size. The bytes: `wire/src/wal.rs`.
//!
//! No pointers and no I/O: earlier frames are read back through [`BaseFile`], and what is to be
//! written is told, not done. Memory is bounded: images leave as payloads of streamed slots as soon
//! as they fill a part; what stays is a few words per frame, one frame, and one part.
//!
//! The rules, with what makes each necessary (`docs/architecture.md`, "The shim"):
//!
//! - A frame header with a database size and the WAL's salts is held, and its page with it: after a
//!   WAL restart the old bytes behind a header alone may equal the new page.
//! - One with zero salts passes; SQLite rewrites the headers of such a transaction when it commits,
//!   from the first overwritten frame on, and the last rewrite, of this header, completes it.
//!   SQLite up to 3.49.1 keeps a first frame that a savepoint took back: when the commit frame lies
//!   before it, no rewrite follows, and the commit is refused.
//! - A chain that does not hold at the completing write is refused: SQLite up to 3.49.1 loses such
//!   a commit, and all later ones, in a crash.
//! - The frame last committed is never overwritten within its generation: a transaction's start is
//!   compared with the mark before its first byte is written; here only the page that a savepoint
//!   left in place is let through once more, as a write already made.
//! - Where a VFS above hides that writes are powersafe, SQLite pads a commit to the end of the
//!   sector with copies of its last frame, and syncs in the middle of one. A copy is no
//!   transaction: the commit stands already, and the log does not get it again.

use crate::error::Refusal;
use crate::file::BaseFile;
use crate::mark::WalPosition;
use crate::page_table::PageChanges;
use bytes::Bytes;
use durovfs_wire::entry::PayloadBuilder;
use durovfs_wire::wal::{
    FRAME_HEADER_BYTES, FrameHeader, WAL_HEADER_BYTES, WalChecksum, WalHeader, WalSalts,
};
use durovfs_wire::{PageChecksum, PageNo, PageSize};

/// What the tap does not accept.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TapError {
    /// The commit would be lost in a crash.
    #[error(
        "checksum chain of the WAL is broken at frame {0}: SQLite could not recover this commit"
    )]
    BrokenChain(u32),
    /// A write that SQLite does not make.
    #[error("unexpected write to the WAL: {0}")]
    Unexpected(String),
    /// Earlier frames could not be read.
    #[error("{0}")]
    File(Refusal),
}

impl From<Refusal> for TapError {
    fn from(refusal: Refusal) -> Self {
        Self::File(refusal)
    }
}

/// What to do with a write.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// Pass it to the file as it came.
    Pass,
    /// Write these pieces instead (none: the write is held, or was made before).
    Pieces(Vec<(u64, Vec<u8>)>),
    /// Write the pieces, and commit; then, only if that is acknowledged, [`WalTap::held`].
    Complete(Vec<(u64, Vec<u8>)>),
    /// Write [`WalTap::held`]: a copy of the frame last committed is whole.
    Repeat,
}

/// A transaction whose completing write is held.
#[derive(Debug)]
pub struct Completion {
    /// Where it began.
    pub start: WalPosition,
    /// Where the WAL ends after it.
    pub end: WalPosition,
    /// Page size of the database.
    pub page_size: PageSize,
    /// Database size in pages after it.
    pub page_count: u32,
    /// Slots that count.
    pub slot_count: u32,
    /// Checksums of its pages.
    pub changes: PageChanges,
    /// The slots that were not streamed.
    pub payload: Bytes,
}

/// One frame of the open transaction.
#[derive(Debug, Clone, Copy)]
struct Slot {
    page_no: u32,
    /// The header as last written asks for a rewrite: a database size, but no salts.
    awaits_rewrite: bool,
    /// Claimed running checksum of a header with salts.
    claim: Option<WalChecksum>,
    /// Of the page as last written; none while only the header is.
    page: Option<PageChecksum>,
}

#[derive(Debug)]
struct Transaction {
    header: WalHeader,
    start: WalPosition,
    slots: Vec<Slot>,
    /// Frames whose chain was seen to hold, in order; the rest is read back when it commits.
    chained: usize,
    chain: WalChecksum,
    overwritten: bool,
}

/// A frame that arrives in pieces.
#[derive(Debug)]
struct Partial {
    /// Offset of the region (a frame's header, its page, or the WAL's header).
    region_start: u64,
    bytes: Vec<u8>,
}

/// Header of a commit frame, and its page if that came, not yet written to the file.
#[derive(Debug)]
struct Held {
    frame: u32,
    offset: u64,
    bytes: Vec<u8>,
}

/// What the last committed transaction left at the end of the WAL.
#[derive(Debug, Clone, Copy)]
struct Tail {
    end: WalPosition,
    page_size: PageSize,
    page_count: u32,
    page_no: PageNo,
    page: PageChecksum,
}

/// The state machine, one per open WAL file.
#[derive(Debug, Default)]
pub struct WalTap {
    transaction: Option<Transaction>,
    /// A WAL header in the making, or the one whose frames come.
    partial: Option<Partial>,
    held: Option<Held>,
    tail: Option<Tail>,
    /// First frame whose header SQLite will rewrite when it commits (its `iReCksum`): the first
    /// whose page was overwritten since it last wrote a header with salts.
    rewrite_from: Option<u32>,
    /// The frame whose header was written last: its page comes next, and overwrites nothing.
    page_follows: Option<u32>,
    /// From an acknowledged commit until SQLite ended it: its last frame may come again.
    may_repeat: bool,
    builder: PayloadBuilder,
    ready: Vec<Bytes>,
    streamed_parts: u32,
    completion: Option<Completion>,
}

enum Region {
    WalHeader,
    FrameHeader(u32),
    Page(u32),
}

impl WalTap {
    /// Takes a write of `data` at `offset`; `file` is the WAL without it.
    ///
    /// # Errors
    /// [`TapError`]: nothing is to be written, and the transaction cannot be committed.
    pub fn write(
        &mut self,
        file: &dyn BaseFile,
        offset: u64,
        data: &[u8],
    ) -> Result<Step, TapError> {
        let mut pieces = Vec::new();
        let mut as_it_came = true;
        let mut at = offset;
        let mut rest = data;
        let mut completes = false;
        let mut repeats = false;
        while !rest.is_empty() {
            if completes || repeats {
                return Err(TapError::Unexpected(
                    "bytes behind the completing frame".into(),
                ));
            }
            let (region, start, length) = self.region(file, at)?;
            let within = (at - start) as usize;
            let (now, later) = rest.split_at(rest.len().min(length - within));
            match self.piece(file, &region, start, length, within, now)? {
                Flow::Pass => pieces.push((at, now.to_vec())),
                Flow::Write(bytes, from) => {
                    as_it_came = false;
                    pieces.push((from, bytes));
                }
                Flow::Hold => as_it_came = false,
                Flow::Complete => {
                    as_it_came = false;
                    completes = true;
                }
                Flow::Repeat => repeats = true,
            }
            at += now.len() as u64;
            rest = later;
        }
        if repeats {
            return Ok(Step::Repeat);
        }
        Ok(match (completes, as_it_came) {
            (true, _) => Step::Complete(pieces),
            (false, true) => Step::Pass,
            (false, false) => Step::Pieces(pieces),
        })
    }

    /// Where the open transaction began, if one is open.
    pub fn start(&self) -> Option<WalPosition> {
        self.transaction
            .as_ref()
            .map(|transaction| transaction.start)
    }

    /// The header of the WAL that the open transaction is written to: its own if it begins one.
    pub fn header(&self) -> Option<WalHeader> {
        self.transaction
            .as_ref()
            .map(|transaction| transaction.header)
    }

    /// Page size of the open transaction.
    pub fn page_size(&self) -> Option<PageSize> {
        self.transaction
            .as_ref()
            .map(|transaction| transaction.header.page_size)
    }

    /// Payloads that must be streamed now.
    pub fn take_ready(&mut self) -> Vec<Bytes> {
        let ready = std::mem::take(&mut self.ready);
        self.streamed_parts += ready.len() as u32;
        ready
    }

    /// How many payloads were given out for the open transaction.
    pub fn streamed_parts(&self) -> u32 {
        self.streamed_parts
    }

    /// The transaction to commit, after [`Step::Complete`].
    pub fn take_completion(&mut self) -> Option<Completion> {
        self.completion.take()
    }

    /// Bytes to write once the commit is acknowledged, and where.
    pub fn held(&self) -> Option<(u64, &[u8])> {
        self.held
            .as_ref()
            .map(|held| (held.offset, held.bytes.as_slice()))
    }

    /// The commit was acknowledged and the held bytes are in the file; or those of a copy are.
    /// Returns where the WAL ends now.
    pub fn acknowledge(&mut self) -> Option<WalPosition> {
        if let Some(transaction) = self.transaction.take() {
            let last = transaction.slots.last().zip(self.held.as_ref());
            self.tail = last.and_then(|(slot, held)| {
                let header = held.header();
                Some(Tail {
                    end: WalPosition {
                        frame: held.frame,
                        checksum: header.checksum,
                        ..transaction.start
                    },
                    page_size: transaction.header.page_size,
                    page_count: header.commit_page_count,
                    page_no: PageNo::new(slot.page_no)?,
                    page: slot.page?,
                })
            });
        }
        self.forget();
        self.may_repeat = self.tail.is_some();
        self.tail.map(|tail| tail.end)
    }

    /// SQLite ended the commit: what comes now is another transaction.
    pub fn commit_ended(&mut self) {
        self.may_repeat = false;
    }

    /// Whether what is held began as a copy of the frame last committed does. What it is shows its
    /// page; no transaction has begun before.
    pub fn awaits_repeat(&self) -> bool {
        let (Some(transaction), Some(held), Some(tail)) =
            (&self.transaction, &self.held, &self.tail)
        else {
            return false;
        };
        let header = held.header();
        self.may_repeat
            && self.completion.is_none()
            && held.frame == tail.end.frame + 1
            && transaction.start == tail.end
            && transaction.slots.is_empty()
            && header.page_no == tail.page_no.get()
            && header.commit_page_count == tail.page_count
    }

    /// The open transaction will not be committed. True if parts of it were streamed.
    pub fn abandon(&mut self) -> bool {
        let streamed = self.streamed_parts > 0;
        self.forget();
        streamed
    }

    fn forget(&mut self) {
        self.transaction = None;
        self.partial = None;
        self.held = None;
        self.builder = PayloadBuilder::default();
        self.ready.clear();
        self.streamed_parts = 0;
        self.completion = None;
        self.may_repeat = false;
        self.rewrite_from = None;
        self.page_follows = None;
    }

    /// Whether a commit frame is held whose page never came: the commit must not be taken for done.
    pub fn is_holding(&self) -> bool {
        self.held.is_some()
    }

    /// Lays what is held, or arrived in part, over bytes that were read from `offset`; returns
    /// where the WAL ends if that is in held bytes.
    pub fn overlay(&self, buffer: &mut [u8], offset: u64) -> Option<u64> {
        let held = self.held.as_ref().map(|held| (held.offset, &held.bytes));
        let partial = self
            .partial
            .as_ref()
            .map(|partial| (partial.region_start, &partial.bytes));
        let mut end = None;
        for (start, bytes) in held.into_iter().chain(partial) {
            let stop = start + bytes.len() as u64;
            end = end.max(Some(stop));
            let (from, to) = (start.max(offset), stop.min(offset + buffer.len() as u64));
            if from < to {
                let source = &bytes[(from - start) as usize..(to - start) as usize];
                buffer[(from - offset) as usize..(to - offset) as usize].copy_from_slice(source);
            }
        }
        end
    }

    fn region(&self, file: &dyn BaseFile, at: u64) -> Result<(Region, u64, usize), TapError> {
        if at < WAL_HEADER_BYTES as u64 {
            return Ok((Region::WalHeader, 0, WAL_HEADER_BYTES));
        }
        let page_size = match &self.transaction {
            Some(transaction) => transaction.header.page_size,
            None => read_header(file)?.page_size,
        };
        let frame_bytes = (FRAME_HEADER_BYTES + page_size.get()) as u64;
        let index = (at - WAL_HEADER_BYTES as u64) / frame_bytes;
        let frame = u32::try_from(index + 1)
            .map_err(|_| TapError::Unexpected(format!("frame at offset {at}")))?;
        let start = WalHeader::frame_offset(page_size, frame);
        let page_start = start + FRAME_HEADER_BYTES as u64;
        Ok(if at < page_start {
            (Region::FrameHeader(frame), start, FRAME_HEADER_BYTES)
        } else {
            (Region::Page(frame), page_start, page_size.get())
        })
    }

    fn piece(
        &mut self,
        file: &dyn BaseFile,
        region: &Region,
        start: u64,
        length: usize,
        within: usize,
        bytes: &[u8],
    ) -> Result<Flow, TapError> {
        if within == 0 {
            self.partial = None;
        }
        if within == 0 && bytes.len() == length {
            return self.whole(file, region, start, bytes, false);
        }
        let mut partial = match self.partial.take() {
            None if within == 0 => Partial {
                region_start: start,
                bytes: Vec::new(),
            },
            Some(partial) if partial.region_start == start && partial.bytes.len() == within => {
                partial
            }
            _ => {
                let message = format!("{} bytes at {} out of order", bytes.len(), start);
                return Err(TapError::Unexpected(message));
            }
        };
        partial.bytes.extend_from_slice(bytes);
        if partial.bytes.len() < length {
            self.partial = Some(partial);
            return Ok(Flow::Hold);
        }
        self.whole(file, region, start, &partial.bytes, true)
    }

    fn whole(
        &mut self,
        file: &dyn BaseFile,
        region: &Region,
        start: u64,
        bytes: &[u8],
        gathered: bool,
    ) -> Result<Flow, TapError> {
        let flow = match *region {
            Region::WalHeader => self.wal_header(bytes),
            Region::FrameHeader(frame) => self.frame_header(file, frame, start, bytes),
            Region::Page(frame) => self.page(file, frame, bytes),
        }?;
        Ok(match flow {
            Flow::Pass if gathered => Flow::Write(bytes.to_vec(), start),
            other => other,
        })
    }

    fn wal_header(&mut self, bytes: &[u8]) -> Result<Flow, TapError> {
        let mut fixed = [0u8; WAL_HEADER_BYTES];
        fixed.copy_from_slice(bytes);
        let Some(header) = WalHeader::parse(&fixed) else {
            return Err(TapError::Unexpected(
                "a WAL header that is not valid".into(),
            ));
        };
        // Frames streamed before it belonged to a transaction that is no more; their slots are
        // written again, or do not count.
        self.check_not_holding(None)?;
        self.tail = None;
        self.transaction = Some(Transaction::new(header, 0, header.checksum));
        Ok(Flow::Pass)
    }

    fn begin(&mut self, file: &dyn BaseFile, frame: u32) -> Result<&mut Transaction, TapError> {
        if self.transaction.is_none() {
            let header = read_header(file)?;
            let before = match frame {
                1 => header.checksum,
                _ => read_frame_header(file, header.page_size, frame - 1)?.checksum,
            };
            self.transaction = Some(Transaction::new(header, frame - 1, before));
        }
        self.transaction
            .as_mut()
            .ok_or(TapError::BrokenChain(frame))
    }

    fn frame_header(
        &mut self,
        file: &dyn BaseFile,
        frame: u32,
        offset: u64,
        bytes: &[u8],
    ) -> Result<Flow, TapError> {
        self.check_not_holding(Some(frame))?;
        let mut fixed = [0u8; FRAME_HEADER_BYTES];
        fixed.copy_from_slice(bytes);
        let header = FrameHeader::parse(&fixed);
        let transaction = self.begin(file, frame)?;
        let index = transaction.index_of(frame)?;
        let salted = header.salts == transaction.header.salts;
        if header.page_no == 0 || !(salted || header.salts == WalSalts::default()) {
            return Err(TapError::BrokenChain(frame));
        }
        let known = transaction.slots.get(index).copied();
        if salted {
            self.rewrite_from = None;
        } else if header.commit_page_count != 0
            && self.rewrite_from.is_none_or(|first| first > frame)
        {
            return Err(TapError::BrokenChain(frame));
        }
        self.page_follows = Some(frame);
        let rewritten = known.filter(|s| s.page_no == header.page_no && s.page.is_some());
        let is_commit = header.commit_page_count != 0;
        if is_commit && salted {
            let was_awaited = rewritten.is_some_and(|slot| slot.awaits_rewrite);
            self.held = Some(Held {
                frame,
                offset,
                bytes: bytes.to_vec(),
            });
            if rewritten.is_none() {
                return Ok(Flow::Hold);
            }
            // The page is in the file already: the header alone may complete the transaction.
            let image = read_page(file, self.held_transaction()?.header.page_size, frame)?;
            return match self.complete(file, frame, &header, &image) {
                Ok(()) => Ok(Flow::Complete),
                // A frame that a savepoint took back; its new page follows.
                Err(TapError::BrokenChain(_)) if !was_awaited => Ok(Flow::Hold),
                Err(error) => Err(error),
            };
        }
        self.held = None;
        let transaction = self.held_transaction()?;
        transaction.overwritten |= index < transaction.chained;
        let slot = Slot {
            page_no: header.page_no,
            awaits_rewrite: is_commit,
            claim: salted.then_some(header.checksum),
            page: rewritten.and_then(|slot| slot.page),
        };
        transaction.set(index, slot);
        Ok(Flow::Pass)
    }

    fn page(&mut self, file: &dyn BaseFile, frame: u32, image: &[u8]) -> Result<Flow, TapError> {
        if let Some(tail) = self.tail
            && self.transaction.is_none()
            && frame == tail.end.frame
            && tail.page == PageChecksum::of(tail.page_no, image)
            && tail.page_size.get() == image.len()
            && read_header(file)?.salts == tail.end.salts
        {
            // A savepoint left this very page behind the header that completed the commit.
            return Ok(Flow::Hold);
        }
        self.check_not_holding(Some(frame))?;
        if let Some(held) = &mut self.held
            && held.frame == frame
        {
            held.bytes.truncate(FRAME_HEADER_BYTES);
            held.bytes.extend_from_slice(image);
            let header = held.header();
            if self.repeat(&header, image) {
                return Ok(Flow::Repeat);
            }
            self.complete(file, frame, &header, image)?;
            return Ok(Flow::Complete);
        }
        if self.page_follows.take() != Some(frame) {
            let first = self.rewrite_from.unwrap_or(frame);
            self.rewrite_from = Some(first.min(frame));
        }
        let Some(transaction) = self.transaction.as_mut() else {
            return Err(TapError::Unexpected(format!(
                "page of frame {frame} without a header"
            )));
        };
        let index = transaction.index_of(frame)?;
        let be = transaction.header.big_endian_checksums;
        let page_size = transaction.header.page_size;
        let Some(slot) = transaction.slots.get_mut(index) else {
            return Err(TapError::Unexpected(format!(
                "page of frame {frame} without a header"
            )));
        };
        let page_no = PageNo::new(slot.page_no).ok_or(TapError::BrokenChain(frame))?;
        slot.page = Some(PageChecksum::of(page_no, image));
        let claim = slot.claim;
        if index < transaction.chained {
            transaction.overwritten = true;
        } else if index == transaction.chained && !transaction.overwritten {
            let words = FrameHeader {
                page_no: page_no.get(),
                commit_page_count: 0,
                salts: transaction.header.salts,
                checksum: WalChecksum::default(),
            };
            let chain = words.chain(transaction.chain, be, image);
            if claim == Some(chain) {
                transaction.chained += 1;
                transaction.chain = chain;
            } else {
                transaction.overwritten = true;
            }
        }
        self.push_slot(index as u32, page_no, page_size, image);
        Ok(Flow::Pass)
    }

    /// Takes a frame for a copy of the one last committed, if it is one.
    fn repeat(&mut self, header: &FrameHeader, image: &[u8]) -> bool {
        if !self.awaits_repeat() {
            return false;
        }
        let (Some(tail), Some(transaction)) = (self.tail, self.transaction.as_mut()) else {
            return false;
        };
        let big_endian = transaction.header.big_endian_checksums;
        let chain = header.chain(tail.end.checksum, big_endian, image);
        let is_copy = chain == header.checksum
            && tail.page_size.get() == image.len()
            && tail.page == PageChecksum::of(tail.page_no, image);
        if is_copy {
            transaction.slots.push(Slot {
                page_no: header.page_no,
                awaits_rewrite: false,
                claim: Some(chain),
                page: Some(tail.page),
            });
        }
        is_copy
    }

    fn push_slot(&mut self, slot: u32, page_no: PageNo, page_size: PageSize, image: &[u8]) {
        if !self.builder.has_room(page_size) {
            self.ready.push(self.builder.take());
        }
        self.builder.push(slot, page_no, image);
    }

    fn complete(
        &mut self,
        file: &dyn BaseFile,
        frame: u32,
        header: &FrameHeader,
        image: &[u8],
    ) -> Result<(), TapError> {
        let transaction = self.held_transaction()?;
        let index = transaction.index_of(frame)?;
        let before = if transaction.overwritten || transaction.chained != index {
            transaction.read_chain(file, index)?
        } else {
            transaction.chain
        };
        let chain = header.chain(before, transaction.header.big_endian_checksums, image);
        if chain != header.checksum {
            return Err(TapError::BrokenChain(frame));
        }
        let page_no = PageNo::new(header.page_no).ok_or(TapError::BrokenChain(frame))?;
        let page = PageChecksum::of(page_no, image);
        let unchanged = transaction
            .slots
            .get(index)
            .is_some_and(|slot| slot.page == Some(page));
        transaction.slots.truncate(index);
        transaction.slots.push(Slot {
            page_no: header.page_no,
            awaits_rewrite: false,
            claim: Some(chain),
            page: Some(page),
        });
        let mut changes = PageChanges::new();
        for slot in &transaction.slots {
            // Every frame before the last was written whole, or the chain would not hold.
            let (Some(page_no), Some(page)) = (PageNo::new(slot.page_no), slot.page) else {
                return Err(TapError::BrokenChain(frame));
            };
            changes.insert(page_no, page);
        }
        let (start, page_size) = (transaction.start, transaction.header.page_size);
        if !unchanged {
            self.push_slot(index as u32, page_no, page_size, image);
        }
        self.completion = Some(Completion {
            start,
            end: WalPosition {
                frame,
                checksum: chain,
                ..start
            },
            page_size,
            page_count: header.commit_page_count,
            slot_count: index as u32 + 1,
            changes,
            payload: self.builder.take(),
        });
        Ok(())
    }

    fn held_transaction(&mut self) -> Result<&mut Transaction, TapError> {
        let missing = || TapError::Unexpected("a commit frame outside a transaction".into());
        self.transaction.as_mut().ok_or_else(missing)
    }

    /// A held header whose page does not follow would vanish, and the chain with it.
    fn check_not_holding(&self, but: Option<u32>) -> Result<(), TapError> {
        match &self.held {
            Some(held) if but != Some(held.frame) => Err(TapError::BrokenChain(held.frame)),
            _ => Ok(()),
        }
    }
}

enum Flow {
    Pass,
    Write(Vec<u8>, u64),
    Hold,
    Complete,
    Repeat,
}

impl Held {
    fn header(&self) -> FrameHeader {
        let mut fixed = [0u8; FRAME_HEADER_BYTES];
        fixed.copy_from_slice(&self.bytes[..FRAME_HEADER_BYTES]);
        FrameHeader::parse(&fixed)
    }
}

impl Transaction {
    fn new(header: WalHeader, frame: u32, checksum: WalChecksum) -> Self {
        let start = WalPosition {
            salts: header.salts,
            checkpoint_sequence: header.checkpoint_sequence,
            frame,
            checksum,
        };
        let slots = Vec::new();
        Self {
            header,
            start,
            slots,
            chained: 0,
            chain: checksum,
            overwritten: false,
        }
    }

    fn index_of(&self, frame: u32) -> Result<usize, TapError> {
        let index = i64::from(frame) - i64::from(self.start.frame) - 1;
        match usize::try_from(index) {
            Ok(index) if index <= self.slots.len() => Ok(index),
            _ => Err(TapError::Unexpected(format!(
                "frame {frame}, where the transaction began at {} and has {} frames",
                self.start.frame + 1,
                self.slots.len()
            ))),
        }
    }

    fn set(&mut self, index: usize, slot: Slot) {
        match self.slots.get_mut(index) {
            Some(known) => *known = slot,
            None => self.slots.push(slot),
        }
    }

    /// The running checksum through the first `count` frames, as they stand in the file.
    fn read_chain(&self, file: &dyn BaseFile, count: usize) -> Result<WalChecksum, TapError> {
        let mut chain = self.start.checksum;
        let mut bytes = vec![0u8; FRAME_HEADER_BYTES + self.header.page_size.get()];
        for index in 0..count {
            let frame = self.start.frame + 1 + index as u32;
            file.read_at(
                &mut bytes,
                WalHeader::frame_offset(self.header.page_size, frame),
            )?;
            let (head, image) = bytes.split_at(FRAME_HEADER_BYTES);
            let mut fixed = [0u8; FRAME_HEADER_BYTES];
            fixed.copy_from_slice(head);
            let header = FrameHeader::parse(&fixed);
            chain = header.chain(chain, self.header.big_endian_checksums, image);
            let holds = header.salts == self.header.salts && header.checksum == chain;
            // A size in the middle would make a part of the transaction a commit of its own.
            if !holds || header.commit_page_count != 0 {
                return Err(TapError::BrokenChain(frame));
            }
        }
        Ok(chain)
    }
}

/// The WAL's header as it stands in the file.
fn read_header(file: &dyn BaseFile) -> Result<WalHeader, TapError> {
    let mut bytes = [0u8; WAL_HEADER_BYTES];
    file.read_at(&mut bytes, 0)?;
    WalHeader::parse(&bytes)
        .ok_or_else(|| TapError::Unexpected("a frame in a WAL without a valid header".into()))
}

fn read_frame_header(
    file: &dyn BaseFile,
    page_size: PageSize,
    frame: u32,
) -> Result<FrameHeader, TapError> {
    let mut bytes = [0u8; FRAME_HEADER_BYTES];
    file.read_at(&mut bytes, WalHeader::frame_offset(page_size, frame))?;
    Ok(FrameHeader::parse(&bytes))
}

fn read_page(file: &dyn BaseFile, page_size: PageSize, frame: u32) -> Result<Vec<u8>, TapError> {
    let mut image = vec![0u8; page_size.get()];
    let offset = WalHeader::frame_offset(page_size, frame) + FRAME_HEADER_BYTES as u64;
    file.read_at(&mut image, offset)?;
    Ok(image)
}
