//! SQLite's own numbers: page numbers, page sizes, and the bytes of a `-wal` file.
//!
//! Layout from <https://sqlite.org/fileformat2.html#the_write_ahead_log>:
//!
//! | WAL header  | bytes | frame header | bytes |
//! |---|---|---|---|
//! | magic 0x377f0682 or …83 (big-endian checksums) | 0..4 | page number | 0..4 |
//! | format version 3007000 | 4..8 | database size in pages if a commit, else 0 | 4..8 |
//! | page size | 8..12 | salt 1, salt 2 | 8..16 |
//! | checkpoint sequence | 12..16 | checksum 1, 2 of all before and the page | 16..24 |
//! | salt 1, salt 2 | 16..24 | | |
//! | checksum 1, 2 of bytes 0..24 | 24..32 | | |
//!
//! All numbers are big-endian; the checksum's own word order is the magic's last bit.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::num::NonZeroU32;

/// Bytes of a WAL header.
pub const WAL_HEADER_BYTES: usize = 32;
/// Bytes of a frame header.
pub const FRAME_HEADER_BYTES: usize = 24;
const MAGIC_LITTLE_ENDIAN: u32 = 0x377f_0682;
const MAGIC_BIG_ENDIAN: u32 = 0x377f_0683;
const FORMAT_VERSION: u32 = 3_007_000;

/// Number of a page in a database, from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PageNo(NonZeroU32);

impl PageNo {
    /// The page with this number, unless it is zero.
    pub const fn new(number: u32) -> Option<Self> {
        match NonZeroU32::new(number) {
            Some(number) => Some(Self(number)),
            None => None,
        }
    }

    /// The number.
    pub const fn get(self) -> u32 {
        self.0.get()
    }

    /// Where the page begins in the database file.
    pub const fn file_offset(self, page_size: PageSize) -> u64 {
        (self.0.get() as u64 - 1) * page_size.get() as u64
    }
}

impl fmt::Display for PageNo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Bytes of a page: a power of two from 512 to 65536.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct PageSize(u32);

/// The number is not a page size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("page size {0}: must be a power of two from 512 to 65536")]
pub struct InvalidPageSize(pub u32);

impl PageSize {
    /// Bytes of a page.
    pub const fn get(self) -> usize {
        self.0 as usize
    }

    /// The page size that the 16-bit field at offset 16 of a database header means (1 is 65536).
    pub fn from_database_header(field: u16) -> Result<Self, InvalidPageSize> {
        Self::try_from(if field == 1 { 65536 } else { u32::from(field) })
    }
}

impl TryFrom<u32> for PageSize {
    type Error = InvalidPageSize;

    fn try_from(bytes: u32) -> Result<Self, InvalidPageSize> {
        if bytes.is_power_of_two() && (512..=65536).contains(&bytes) {
            Ok(Self(bytes))
        } else {
            Err(InvalidPageSize(bytes))
        }
    }
}

impl From<PageSize> for u32 {
    fn from(size: PageSize) -> u32 {
        size.0
    }
}

/// The two salts of a WAL; frames with others are leftovers of an earlier WAL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct WalSalts(pub u32, pub u32);

/// SQLite's running WAL checksum.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct WalChecksum(pub u32, pub u32);

impl WalChecksum {
    /// The checksum after `bytes` (a multiple of 8), words read in the WAL's own order.
    #[must_use]
    pub fn update(self, big_endian: bool, bytes: &[u8]) -> Self {
        debug_assert_eq!(bytes.len() % 8, 0);
        let word = |bytes: &[u8]| {
            let bytes = [bytes[0], bytes[1], bytes[2], bytes[3]];
            if big_endian {
                u32::from_be_bytes(bytes)
            } else {
                u32::from_le_bytes(bytes)
            }
        };
        let Self(mut first, mut second) = self;
        for pair in bytes.chunks_exact(8) {
            first = first.wrapping_add(word(&pair[..4])).wrapping_add(second);
            second = second.wrapping_add(word(&pair[4..])).wrapping_add(first);
        }
        Self(first, second)
    }
}

fn word_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_be_bytes([
        bytes[offset],
        bytes[offset + 1],
        bytes[offset + 2],
        bytes[offset + 3],
    ])
}

/// A valid WAL header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WalHeader {
    /// Whether the checksums read words big-endian.
    pub big_endian_checksums: bool,
    /// Page size of the database.
    pub page_size: PageSize,
    /// How often the WAL was started again.
    pub checkpoint_sequence: u32,
    /// The salts that valid frames carry.
    pub salts: WalSalts,
    /// The checksum that the first frame's continues.
    pub checksum: WalChecksum,
}

impl WalHeader {
    /// Reads a header; `None` when SQLite would not accept it either.
    pub fn parse(bytes: &[u8; WAL_HEADER_BYTES]) -> Option<Self> {
        let big_endian_checksums = match word_at(bytes, 0) {
            MAGIC_LITTLE_ENDIAN => false,
            MAGIC_BIG_ENDIAN => true,
            _ => return None,
        };
        let checksum = WalChecksum::default().update(big_endian_checksums, &bytes[..24]);
        let stored = WalChecksum(word_at(bytes, 24), word_at(bytes, 28));
        if word_at(bytes, 4) != FORMAT_VERSION || checksum != stored {
            return None;
        }
        Some(Self {
            big_endian_checksums,
            page_size: PageSize::try_from(word_at(bytes, 8)).ok()?,
            checkpoint_sequence: word_at(bytes, 12),
            salts: WalSalts(word_at(bytes, 16), word_at(bytes, 20)),
            checksum,
        })
    }

    /// Writes the header that [`Self::parse`] reads; `checksum` is computed, not taken from `self`.
    pub fn encode(&self) -> [u8; WAL_HEADER_BYTES] {
        let magic = if self.big_endian_checksums {
            MAGIC_BIG_ENDIAN
        } else {
            MAGIC_LITTLE_ENDIAN
        };
        let mut bytes = [0u8; WAL_HEADER_BYTES];
        let words = [
            magic,
            FORMAT_VERSION,
            u32::from(self.page_size),
            self.checkpoint_sequence,
            self.salts.0,
            self.salts.1,
        ];
        for (slot, word) in bytes.chunks_exact_mut(4).zip(words) {
            slot.copy_from_slice(&word.to_be_bytes());
        }
        let checksum = WalChecksum::default().update(self.big_endian_checksums, &bytes[..24]);
        bytes[24..28].copy_from_slice(&checksum.0.to_be_bytes());
        bytes[28..32].copy_from_slice(&checksum.1.to_be_bytes());
        bytes
    }

    /// Byte offset of the frame with this index (from 1, as SQLite's mxFrame counts).
    pub fn frame_offset(page_size: PageSize, frame_index: u32) -> u64 {
        let frame_bytes = (FRAME_HEADER_BYTES + page_size.get()) as u64;
        WAL_HEADER_BYTES as u64 + u64::from(frame_index.saturating_sub(1)) * frame_bytes
    }
}

/// A frame header as it stands in the file; whether it is valid depends on the chain before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameHeader {
    /// Page number; zero is never valid.
    pub page_no: u32,
    /// Database size in pages after the transaction, if this frame commits one; else zero.
    pub commit_page_count: u32,
    /// Salts, equal to the header's in a valid frame.
    pub salts: WalSalts,
    /// Running checksum through this frame.
    pub checksum: WalChecksum,
}

impl FrameHeader {
    /// Reads the fields; any 24 bytes have some.
    pub fn parse(bytes: &[u8; FRAME_HEADER_BYTES]) -> Self {
        Self {
            page_no: word_at(bytes, 0),
            commit_page_count: word_at(bytes, 4),
            salts: WalSalts(word_at(bytes, 8), word_at(bytes, 12)),
            checksum: WalChecksum(word_at(bytes, 16), word_at(bytes, 20)),
        }
    }

    /// Writes the header that [`Self::parse`] reads.
    pub fn encode(&self) -> [u8; FRAME_HEADER_BYTES] {
        let mut bytes = [0u8; FRAME_HEADER_BYTES];
        let words = [
            self.page_no,
            self.commit_page_count,
            self.salts.0,
            self.salts.1,
            self.checksum.0,
            self.checksum.1,
        ];
        for (slot, word) in bytes.chunks_exact_mut(4).zip(words) {
            slot.copy_from_slice(&word.to_be_bytes());
        }
        bytes
    }

    /// The checksum that a valid frame with these first 8 header bytes and this page must carry.
    pub fn chain(&self, before: WalChecksum, big_endian: bool, image: &[u8]) -> WalChecksum {
        let head = self.encode();
        before
            .update(big_endian, &head[..8])
            .update(big_endian, image)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_reads_back_and_refuses_a_flipped_bit() {
        let header = WalHeader {
            big_endian_checksums: false,
            page_size: PageSize::try_from(4096).unwrap(),
            checkpoint_sequence: 3,
            salts: WalSalts(0xdead_beef, 0x0102_0304),
            checksum: WalChecksum::default(),
        };
        let mut bytes = header.encode();
        let parsed = WalHeader::parse(&bytes).unwrap();
        assert_eq!(parsed.salts, header.salts);
        assert_eq!(
            WalHeader {
                checksum: WalChecksum::default(),
                ..parsed
            },
            header
        );
        bytes[17] ^= 1;
        assert_eq!(WalHeader::parse(&bytes), None);
    }

    #[test]
    fn page_sizes_are_what_sqlite_allows() {
        assert_eq!(PageSize::from_database_header(1).unwrap().get(), 65536);
        for bad in [0u32, 256, 1000, 131_072] {
            assert!(PageSize::try_from(bad).is_err(), "{bad}");
        }
    }
}
