//! Bytes of a segment: its header and its records. No I/O; `docs/journal-format.md` has the tables.
//!
//! All numbers are little-endian. A record's checksum is seeded with its segment's salt, so that
//! bytes copied from another segment (or a journal that is itself stored in a database) never pass
//! for a record of this one.

use crate::record::Stored;
use bytes::BufMut;

/// Bytes before the first record. A block of its own, so that no later write touches it.
pub(crate) const SEGMENT_HEADER_BYTES: u64 = 4096;
/// Magic of a segment.
const SEGMENT_MAGIC: [u8; 8] = *b"DUROJRNL";
/// Format version that this program reads and writes.
pub(crate) const FORMAT_VERSION: u32 = 3;
/// Bytes of the header that are used.
const HEADER_USED_BYTES: usize = 56;
/// Magic of a record.
const RECORD_MAGIC: u32 = 0x4345_524a;
/// Bytes of a record before its header.
pub(crate) const RECORD_PREFIX_BYTES: usize = 32;
/// Bytes of a record that its length does not count: length and checksum.
const UNCOUNTED_BYTES: usize = 8;
/// Records begin at multiples of this.
pub(crate) const ALIGNMENT: u64 = 8;
/// What a database's name, history and last transaction can take, generously.
const RECORD_HEADER_BYTES_MAX: usize = 256 << 10;
/// Longest record: a full part.
pub(crate) const RECORD_BYTES_MAX: usize =
    RECORD_PREFIX_BYTES + RECORD_HEADER_BYTES_MAX + durovfs_wire::entry::MAX_PART_PAYLOAD_BYTES;

/// The header of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SegmentHeader {
    /// Seeds the checksums of the records.
    pub salt: u64,
    /// Sequence of the first record.
    pub first_sequence: u64,
    /// Highest sequence that was durable when the segment was begun.
    pub synced_through: u64,
    /// Bytes of the whole file.
    pub segment_bytes: u64,
    /// Damage to records below this sequence was found and reported before this segment was begun,
    /// and its states tell what is left.
    pub damage_known_below: u64,
}

/// Why bytes are no segment header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HeaderError {
    BadMagic,
    UnsupportedVersion(u32),
    ChecksumMismatch,
}

impl SegmentHeader {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(SEGMENT_HEADER_BYTES as usize);
        bytes.put_slice(&SEGMENT_MAGIC);
        bytes.put_u32_le(FORMAT_VERSION);
        bytes.put_u32_le(0);
        bytes.put_u64_le(self.salt);
        bytes.put_u64_le(self.first_sequence);
        bytes.put_u64_le(self.synced_through);
        bytes.put_u64_le(self.segment_bytes);
        bytes.put_u64_le(self.damage_known_below);
        let crc = crc32fast::hash(&bytes);
        bytes[12..16].copy_from_slice(&crc.to_le_bytes());
        bytes.resize(SEGMENT_HEADER_BYTES as usize, 0);
        bytes
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, HeaderError> {
        let Some(head) = bytes.first_chunk::<HEADER_USED_BYTES>() else {
            return Err(HeaderError::BadMagic);
        };
        if head[..8] != SEGMENT_MAGIC {
            return Err(HeaderError::BadMagic);
        }
        // Before the checksum: another version may compute it otherwise.
        let version = u32_at(head, 8);
        if version != FORMAT_VERSION {
            return Err(HeaderError::UnsupportedVersion(version));
        }
        let mut zeroed = *head;
        zeroed[12..16].fill(0);
        if crc32fast::hash(&zeroed) != u32_at(head, 12) {
            return Err(HeaderError::ChecksumMismatch);
        }
        Ok(Self {
            salt: u64_at(head, 16),
            first_sequence: u64_at(head, 24),
            synced_through: u64_at(head, 32),
            segment_bytes: u64_at(head, 40),
            damage_known_below: u64_at(head, 48),
        })
    }
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes([
        bytes[offset],
        bytes[offset + 1],
        bytes[offset + 2],
        bytes[offset + 3],
    ])
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from(u32_at(bytes, offset)) | u64::from(u32_at(bytes, offset + 4)) << 32
}

/// File name of the segment whose first record has this sequence.
pub(crate) fn segment_name(first_sequence: u64) -> String {
    format!("journal-{first_sequence:016x}.seg")
}

/// First sequence of the segment with this name, if it is one.
pub(crate) fn parse_segment_name(name: &str) -> Option<u64> {
    let digits = name.strip_prefix("journal-")?.strip_suffix(".seg")?;
    let legal = digits.len() == 16 && digits.bytes().all(|b| b"0123456789abcdef".contains(&b));
    if legal {
        u64::from_str_radix(digits, 16).ok()
    } else {
        None
    }
}

/// Bytes that a record takes in the file.
pub(crate) fn record_bytes(header_bytes: usize, payload_bytes: usize) -> u64 {
    ((RECORD_PREFIX_BYTES + header_bytes + payload_bytes) as u64).next_multiple_of(ALIGNMENT)
}

/// Adds a record to `buffer`, padded.
pub(crate) fn encode_record(
    buffer: &mut Vec<u8>,
    salt: u64,
    sequence: u64,
    synced_through: u64,
    header: &[u8],
    payload: &[u8],
) {
    let start = buffer.len();
    let length = RECORD_PREFIX_BYTES - UNCOUNTED_BYTES + header.len() + payload.len();
    buffer.put_u32_le(length as u32);
    buffer.put_u32_le(0);
    buffer.put_u32_le(RECORD_MAGIC);
    buffer.put_u32_le(header.len() as u32);
    buffer.put_u64_le(sequence);
    buffer.put_u64_le(synced_through);
    buffer.put_slice(header);
    buffer.put_slice(payload);
    let crc = record_checksum(salt, &buffer[start..]);
    buffer[start + 4..start + 8].copy_from_slice(&crc.to_le_bytes());
    let padded = start + record_bytes(header.len(), payload.len()) as usize;
    buffer.resize(padded, 0);
}

/// Of a record without its padding: salt, length, then all after the checksum.
fn record_checksum(salt: u64, record: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&salt.to_le_bytes());
    crc.update(&record[..4]);
    crc.update(&record[UNCOUNTED_BYTES..]);
    crc.finalize()
}

/// A record that was found whole.
#[derive(Debug)]
pub(crate) struct RawRecord<'a> {
    pub sequence: u64,
    pub synced_through: u64,
    header: &'a [u8],
    /// Its payload.
    pub payload: &'a [u8],
    /// Bytes with padding.
    pub bytes: u64,
}

impl<'a> RawRecord<'a> {
    /// The record at the start of `bytes`, if a whole and undamaged one is there.
    pub(crate) fn parse(bytes: &'a [u8], salt: u64) -> Option<Self> {
        let prefix = bytes.first_chunk::<RECORD_PREFIX_BYTES>()?;
        if u32_at(prefix, 8) != RECORD_MAGIC {
            return None;
        }
        let end = u32_at(prefix, 0) as usize + UNCOUNTED_BYTES;
        let header_end = RECORD_PREFIX_BYTES + u32_at(prefix, 12) as usize;
        if end > RECORD_BYTES_MAX || header_end > end {
            return None;
        }
        let record = bytes.get(..end)?;
        if record_checksum(salt, record) != u32_at(prefix, 4) {
            return None;
        }
        Some(Self {
            sequence: u64_at(prefix, 16),
            synced_through: u64_at(prefix, 24),
            header: &record[RECORD_PREFIX_BYTES..header_end],
            payload: &record[header_end..],
            bytes: (end as u64).next_multiple_of(ALIGNMENT),
        })
    }

    /// Where the payload begins.
    pub(crate) fn payload_start(&self) -> usize {
        RECORD_PREFIX_BYTES + self.header.len()
    }

    /// What the record says; `None` when its header is none that this version knows.
    pub(crate) fn stored(&self) -> Option<Stored> {
        match postcard::take_from_bytes(self.header) {
            Ok((stored, [])) => Some(stored),
            Ok(_) | Err(_) => None,
        }
    }
}
