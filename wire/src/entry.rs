//! Entries: what one database's log is made of, and how a large one is cut into parts.
//!
//! An entry is a transaction or an epoch start. A transaction is a set of page images and the facts
//! of its commit. While SQLite spills a large transaction its pages are sent before anyone knows
//! whether it commits, and a page may be sent again, or taken back by a savepoint. So each image
//! goes into a numbered **slot**, as SQLite's own frames do:
//!
//! - a slot that is written again holds the later image,
//! - slots at or above the commit's `slot_count` do not count,
//! - of several slots with the same page the highest counts.
//!
//! An entry travels and is stored as parts 0, 1, 2 …; all but the last are [`PartKind::Pages`], and
//! the last one, [`PartKind::Commit`], makes it an entry. A part 0 begins the entry afresh: parts
//! of the same position that came before it do not count.
//!
//! A payload is a run of slots: slot number (u32), page number (u32), image; little-endian.

use crate::checksum::DatabaseChecksum;
use crate::ids::{ClientId, DatabaseId};
use crate::position::{Epoch, LogPosition, Lsn, Timestamp};
use crate::wal::{PageNo, PageSize};
use bytes::{BufMut, Bytes, BytesMut};
use serde::{Deserialize, Serialize};

/// Largest payload of one part. Large enough that headers cost nothing, small enough that a few
/// dozen in flight fit into the memory a node may use.
pub const MAX_PART_PAYLOAD_BYTES: usize = 1 << 20;
/// Bytes before each image in a payload.
pub const SLOT_HEADER_BYTES: usize = 8;
// At least one page of the largest size fits a part.
const _: () = assert!(MAX_PART_PAYLOAD_BYTES >= SLOT_HEADER_BYTES + 65536);

/// Who made a commit: the process, and its count of commits. Answers "what became of mine?" after
/// a broken connection, so that no commit is ever sent twice as two entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Origin {
    /// The process.
    pub client: ClientId,
    /// Its own count of commits over all databases, from 1, never reused.
    pub sequence: u64,
}

/// The facts of a commit, known when its last part is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct CommitHeader {
    /// Who made it.
    pub origin: Origin,
    /// When the primary took it; never earlier than the transaction before.
    pub time: Timestamp,
    /// The transaction that this one was made on top of; zero for the first.
    pub base_lsn: Lsn,
    /// Page size of the database.
    pub page_size: PageSize,
    /// Database size in pages after this transaction; pages above it are gone.
    pub page_count: u32,
    /// Slots that count.
    pub slot_count: u32,
    /// Checksum of the whole database after this transaction.
    pub checksum: DatabaseChecksum,
    /// Whether these pages are the whole database, whatever was there before.
    pub whole_image: bool,
}

/// A committed transaction without its pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct TransactionSummary {
    /// Where it stands in the log.
    pub position: LogPosition,
    /// Its facts.
    pub commit: CommitHeader,
}

/// What a part is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum PartKind {
    /// Slots of a transaction of which more parts follow.
    Pages {
        /// Page size of the images.
        page_size: PageSize,
    },
    /// The last slots of a transaction, and its facts.
    Commit(CommitHeader),
    /// A new primary's first entry. When a quorum holds it, all before it is committed.
    EpochStart {
        /// When the primary wrote it.
        time: Timestamp,
        /// The last transaction before it, so that a log whose transactions are all archived still
        /// says how the database stood.
        last_transaction: Option<TransactionSummary>,
    },
}

/// Where a part belongs, and what it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PartHeader {
    /// The log.
    pub database: DatabaseId,
    /// The entry's epoch.
    pub epoch: Epoch,
    /// The entry's position.
    pub lsn: Lsn,
    /// Index of this part in the entry, from 0.
    pub part: u32,
    /// What it is.
    pub kind: PartKind,
}

impl PartHeader {
    /// The entry that this part belongs to.
    pub const fn position(&self) -> LogPosition {
        LogPosition::new(self.epoch, self.lsn)
    }

    /// Whether the entry is complete with this part.
    pub const fn is_last(&self) -> bool {
        !matches!(self.kind, PartKind::Pages { .. })
    }

    /// Page size of the images in the payload; none for an epoch start, whose payload is empty.
    pub const fn page_size(&self) -> Option<PageSize> {
        match &self.kind {
            PartKind::Pages { page_size } => Some(*page_size),
            PartKind::Commit(commit) => Some(commit.page_size),
            PartKind::EpochStart { .. } => None,
        }
    }

    /// The transaction's summary, if this part commits one.
    pub const fn transaction(&self) -> Option<TransactionSummary> {
        match self.kind {
            PartKind::Commit(commit) => Some(TransactionSummary {
                position: self.position(),
                commit,
            }),
            PartKind::Pages { .. } | PartKind::EpochStart { .. } => None,
        }
    }
}

/// One part of an entry.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct EntryPart {
    /// Where it belongs, and what it is.
    pub header: PartHeader,
    /// Its slots.
    pub payload: Bytes,
}

impl EntryPart {
    /// The slots of the payload.
    ///
    /// # Errors
    /// When the payload is not a whole number of slots, or one has page number zero.
    pub fn slots(&self) -> Result<SlotPages<'_>, PayloadError> {
        SlotPages::parse(&self.payload, self.header.page_size())
    }
}

/// Why a payload is not a run of slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PayloadError {
    /// Its length is not a multiple of a slot's, or above the limit.
    #[error("payload of {got} bytes is not a run of slots of {slot} bytes")]
    Length {
        /// Bytes of the payload.
        got: usize,
        /// Bytes of a slot.
        slot: usize,
    },
    /// An epoch start carries no pages.
    #[error("payload of {0} bytes where none belongs")]
    Unexpected(usize),
    /// Pages are counted from 1.
    #[error("page number zero in slot {0}")]
    PageZero(u32),
}

/// One slot of a payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotPage<'a> {
    /// Number of the slot.
    pub slot: u32,
    /// The page.
    pub page_no: PageNo,
    /// Its bytes.
    pub image: &'a [u8],
}

/// Iterator over the slots of a payload that was found whole.
#[derive(Debug, Clone)]
pub struct SlotPages<'a> {
    payload: &'a [u8],
    slot_bytes: usize,
}

impl<'a> SlotPages<'a> {
    /// Checks the payload once, so that reading it cannot fail.
    ///
    /// # Errors
    /// When it is not a whole number of slots, or one has page number zero.
    pub fn parse(payload: &'a [u8], page_size: Option<PageSize>) -> Result<Self, PayloadError> {
        let Some(page_size) = page_size else {
            return match payload.len() {
                0 => Ok(Self {
                    payload,
                    slot_bytes: 1,
                }),
                got => Err(PayloadError::Unexpected(got)),
            };
        };
        let slot_bytes = SLOT_HEADER_BYTES + page_size.get();
        let got = payload.len();
        if !got.is_multiple_of(slot_bytes) || got > MAX_PART_PAYLOAD_BYTES {
            return Err(PayloadError::Length {
                got,
                slot: slot_bytes,
            });
        }
        for slot in payload.chunks_exact(slot_bytes) {
            if slot[4..8] == [0; 4] {
                return Err(PayloadError::PageZero(le_word(slot)));
            }
        }
        Ok(Self {
            payload,
            slot_bytes,
        })
    }
}

fn le_word(bytes: &[u8]) -> u32 {
    u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

impl<'a> Iterator for SlotPages<'a> {
    type Item = SlotPage<'a>;

    fn next(&mut self) -> Option<SlotPage<'a>> {
        let (head, rest) = self.payload.split_at_checked(self.slot_bytes)?;
        // `parse` refused page number zero, so the conversion always succeeds.
        let page_no = PageNo::new(le_word(&head[4..]))?;
        self.payload = rest;
        Some(SlotPage {
            slot: le_word(head),
            page_no,
            image: &head[SLOT_HEADER_BYTES..],
        })
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let count = self.payload.len() / self.slot_bytes;
        (count, Some(count))
    }
}

impl ExactSizeIterator for SlotPages<'_> {}

/// Builds a payload slot by slot.
#[derive(Debug, Default)]
pub struct PayloadBuilder {
    bytes: BytesMut,
}

impl PayloadBuilder {
    /// Adds a slot.
    pub fn push(&mut self, slot: u32, page_no: PageNo, image: &[u8]) {
        self.bytes.reserve(SLOT_HEADER_BYTES + image.len());
        self.bytes.put_u32_le(slot);
        self.bytes.put_u32_le(page_no.get());
        self.bytes.put_slice(image);
    }

    /// Whether another image of this size still fits a part.
    pub fn has_room(&self, page_size: PageSize) -> bool {
        self.bytes.len() + SLOT_HEADER_BYTES + page_size.get() <= MAX_PART_PAYLOAD_BYTES
    }

    /// Whether nothing was added.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Bytes so far.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// The payload; the builder is empty again.
    pub fn take(&mut self) -> Bytes {
        self.bytes.split().freeze()
    }
}

/// Decides which slots of a multi-part transaction count, without holding their images.
///
/// Feed it every slot in the order of the parts, with a token that tells where the image is; then
/// [`Self::finish`] gives, per page in ascending order, the token of the image that counts.
#[derive(Debug)]
pub struct SlotIndex<T> {
    slots: std::collections::BTreeMap<u32, (PageNo, T)>,
}

impl<T> Default for SlotIndex<T> {
    fn default() -> Self {
        Self {
            slots: std::collections::BTreeMap::new(),
        }
    }
}

impl<T: Copy> SlotIndex<T> {
    /// Notes a slot; one that was noted before is replaced.
    pub fn insert(&mut self, slot: u32, page_no: PageNo, token: T) {
        self.slots.insert(slot, (page_no, token));
    }

    /// The images that count after a commit with this `slot_count`, by page.
    pub fn finish(self, slot_count: u32) -> std::collections::BTreeMap<PageNo, T> {
        // Ascending slots: a later one of the same page replaces the earlier.
        self.slots
            .into_iter()
            .take_while(|(slot, _)| *slot < slot_count)
            .map(|(_, v)| v)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(number: u32) -> PageNo {
        PageNo::new(number).unwrap()
    }

    #[test]
    fn a_payload_reads_back_slot_by_slot() {
        let size = PageSize::try_from(512).unwrap();
        let mut builder = PayloadBuilder::default();
        builder.push(0, page(3), &[1; 512]);
        builder.push(1, page(9), &[2; 512]);
        let payload = builder.take();
        let slots: Vec<_> = SlotPages::parse(&payload, Some(size)).unwrap().collect();
        assert_eq!(slots.len(), 2);
        assert_eq!(
            (slots[1].slot, slots[1].page_no, slots[1].image[0]),
            (1, page(9), 2)
        );
    }

    #[test]
    fn damaged_payloads_are_refused() {
        let size = PageSize::try_from(512).unwrap();
        assert!(SlotPages::parse(&[0; 100], Some(size)).is_err());
        assert_eq!(
            SlotPages::parse(&[0; 520], Some(size)).err(),
            Some(PayloadError::PageZero(0))
        );
        assert_eq!(
            SlotPages::parse(&[0; 1], None).err(),
            Some(PayloadError::Unexpected(1))
        );
    }

    #[test]
    fn the_last_image_of_a_page_counts_and_slots_taken_back_do_not() {
        let mut index = SlotIndex::default();
        index.insert(0, page(1), 'a');
        index.insert(1, page(2), 'b');
        index.insert(2, page(1), 'c'); // the same page again, in a later slot
        index.insert(1, page(5), 'd'); // a savepoint took slot 1 back, another page took it
        index.insert(3, page(7), 'e'); // taken back, never written again
        let pages: Vec<_> = index.finish(3).into_iter().collect();
        assert_eq!(pages, vec![(page(1), 'c'), (page(5), 'd')]);
    }
}
