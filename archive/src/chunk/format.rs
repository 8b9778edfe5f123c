//! Bytes of a chunk's header, blocks, index records and footer; the numbers are in
//! `docs/archive-format.md`. Encoding and checked decoding only: no files, no order of entries.

use super::MAX_NAME_BYTES;
use super::{ChunkError, ChunkKind, EntryFacts, EntryKind, LogIdentity, MAX_ENTRIES, Place};
use crate::fields::Fields;
use durovfs_wire::entry::{Origin, TransactionSummary};
use durovfs_wire::{
    ClientId, CommitHeader, DatabaseChecksum, DatabaseId, Epoch, LogPosition, Lsn, PageSize,
    Timestamp,
};

pub(super) const VERSION: u16 = 1;
const MAGIC: [u8; 8] = *b"DUROCHNK";
const END_MAGIC: [u8; 8] = *b"DUROCEND";
/// Fixed part of the header, before the name.
pub(super) const HEADER_FIXED_BYTES: usize = 40;
/// Bytes of the footer.
pub const FOOTER_BYTES: usize = 90;
/// Bytes before the compressed ones of a block.
pub(super) const BLOCK_PREFIX_BYTES: usize = 12;
/// Most raw bytes in a block: three pages of the largest size, and far past where zstd gains more.
pub(super) const MAX_BLOCK_RAW_BYTES: usize = 256 << 10;
/// Most stored bytes in a block; zstd adds less than this to bytes that do not shrink.
pub(super) const MAX_BLOCK_STORED_BYTES: usize = MAX_BLOCK_RAW_BYTES + (8 << 10);
/// Bytes before each image.
pub(super) const PAGE_NUMBER_BYTES: usize = 4;
/// Bytes of an index record.
pub(super) const RECORD_BYTES: usize = 112;
/// Most bytes of an index as stored: a full one that does not shrink at all.
pub const MAX_INDEX_BYTES: u64 = (MAX_ENTRIES * RECORD_BYTES + (1 << 20)) as u64;
const _: () = assert!(MAX_BLOCK_RAW_BYTES >= PAGE_NUMBER_BYTES + 65536);

const KIND_EPOCH_START: u8 = 0;
const KIND_TRANSACTION: u8 = 1;
const FLAG_WHOLE_IMAGE: u8 = 1;
const FLAG_HAS_LAST_TRANSACTION: u8 = 2;

const TRUNCATED: ChunkError = ChunkError::Damaged("object is cut short");

fn kind_byte(kind: ChunkKind) -> u8 {
    match kind {
        ChunkKind::Chunk => 0,
        ChunkKind::Snapshot => 1,
    }
}

fn kind_from_byte(byte: u8) -> Result<ChunkKind, ChunkError> {
    match byte {
        0 => Ok(ChunkKind::Chunk),
        1 => Ok(ChunkKind::Snapshot),
        _ => Err(ChunkError::Damaged("unknown kind of object")),
    }
}

fn check_version(got: u16) -> Result<(), ChunkError> {
    match got {
        VERSION => Ok(()),
        _ => Err(ChunkError::UnsupportedVersion {
            got,
            supported: VERSION,
        }),
    }
}

/// First bytes of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) kind: ChunkKind,
    pub(super) identity: LogIdentity,
    pub(super) first_lsn: Lsn,
}

impl Header {
    pub(super) fn encode(&self) -> Result<Vec<u8>, ChunkError> {
        let name = self.identity.name.as_bytes();
        if name.len() > MAX_NAME_BYTES {
            return Err(ChunkError::Limit("database name is too long for a chunk"));
        }
        let mut bytes = Vec::with_capacity(HEADER_FIXED_BYTES + name.len() + 4);
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&[kind_byte(self.kind), 0]);
        bytes.extend_from_slice(&(name.len() as u16).to_le_bytes());
        bytes.extend_from_slice(&[0; 2]);
        bytes.extend_from_slice(self.identity.database.as_bytes());
        bytes.extend_from_slice(&self.first_lsn.get().to_le_bytes());
        bytes.extend_from_slice(name);
        let crc = crc32fast::hash(&bytes);
        bytes.extend_from_slice(&crc.to_le_bytes());
        Ok(bytes)
    }

    /// How long the whole header is, by its fixed part.
    pub(super) fn length(fixed: &[u8; HEADER_FIXED_BYTES]) -> Result<usize, ChunkError> {
        if fixed[..8] != MAGIC {
            return Err(ChunkError::Damaged("object does not begin as a chunk"));
        }
        check_version(u16::from_le_bytes([fixed[8], fixed[9]]))?;
        let name = usize::from(u16::from_le_bytes([fixed[12], fixed[13]]));
        if name > MAX_NAME_BYTES {
            return Err(ChunkError::Damaged("header is damaged"));
        }
        Ok(HEADER_FIXED_BYTES + name + 4)
    }

    /// Decodes a header of the length that [`Self::length`] said.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, ChunkError> {
        let (body, crc) = bytes.split_last_chunk::<4>().ok_or(TRUNCATED)?;
        if crc32fast::hash(body) != u32::from_le_bytes(*crc) {
            return Err(ChunkError::Damaged("header is damaged"));
        }
        let mut fields = Fields(body.get(10..).ok_or(TRUNCATED)?);
        let kind = kind_from_byte(fields.u8().ok_or(TRUNCATED)?)?;
        fields.bytes(5).ok_or(TRUNCATED)?;
        let database = DatabaseId::from_bytes(fields.array().ok_or(TRUNCATED)?);
        let first_lsn = Lsn::new(fields.u64().ok_or(TRUNCATED)?);
        let name = String::from_utf8(fields.0.to_vec())
            .map_err(|_| ChunkError::Damaged("database name is not UTF-8"))?;
        Ok(Self {
            kind,
            identity: LogIdentity { database, name },
            first_lsn,
        })
    }
}

/// Last bytes of an object: all that a listing cannot say about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Footer {
    /// Chunk or snapshot.
    pub kind: ChunkKind,
    /// The log.
    pub database: DatabaseId,
    /// Where the index begins.
    pub index_offset: u64,
    /// Number of entries.
    pub entry_count: u32,
    /// First entry.
    pub first_lsn: Lsn,
    /// Last entry.
    pub last_position: LogPosition,
    /// Time of the first entry.
    pub first_time: Timestamp,
    /// Time of the last entry.
    pub last_time: Timestamp,
    /// Bytes of all images before compression.
    pub image_bytes: u64,
}

impl Footer {
    pub(super) fn encode(&self) -> [u8; FOOTER_BYTES] {
        let mut bytes = Vec::with_capacity(FOOTER_BYTES);
        bytes.extend_from_slice(&self.index_offset.to_le_bytes());
        bytes.extend_from_slice(&self.entry_count.to_le_bytes());
        bytes.extend_from_slice(&self.last_position.epoch.get().to_le_bytes());
        bytes.extend_from_slice(self.database.as_bytes());
        bytes.extend_from_slice(&self.first_lsn.get().to_le_bytes());
        bytes.extend_from_slice(&self.last_position.lsn.get().to_le_bytes());
        bytes.extend_from_slice(&self.first_time.as_micros().to_le_bytes());
        bytes.extend_from_slice(&self.last_time.as_micros().to_le_bytes());
        bytes.extend_from_slice(&self.image_bytes.to_le_bytes());
        bytes.extend_from_slice(&[kind_byte(self.kind), 0, 0, 0]);
        let mut footer = [0u8; FOOTER_BYTES];
        footer[..76].copy_from_slice(&bytes);
        footer[80..82].copy_from_slice(&VERSION.to_le_bytes());
        footer[82..].copy_from_slice(&END_MAGIC);
        let crc = footer_crc(&footer);
        footer[76..80].copy_from_slice(&crc.to_le_bytes());
        footer
    }

    /// Decodes the last [`FOOTER_BYTES`] of an object of `object_bytes`.
    ///
    /// # Errors
    /// When they are damaged, of another version, or describe what cannot be.
    pub fn decode(bytes: &[u8; FOOTER_BYTES], object_bytes: u64) -> Result<Self, ChunkError> {
        const DAMAGED: ChunkError = ChunkError::Damaged("footer is damaged");
        if bytes[82..] != END_MAGIC {
            return Err(ChunkError::Damaged(
                "object does not end as a chunk; is it cut short?",
            ));
        }
        check_version(u16::from_le_bytes([bytes[80], bytes[81]]))?;
        let mut fields = Fields(bytes);
        let index_offset = fields.u64().ok_or(DAMAGED)?;
        let entry_count = fields.u32().ok_or(DAMAGED)?;
        let last_epoch = Epoch::new(fields.u32().ok_or(DAMAGED)?);
        let database = DatabaseId::from_bytes(fields.array().ok_or(DAMAGED)?);
        let first_lsn = Lsn::new(fields.u64().ok_or(DAMAGED)?);
        let last_lsn = Lsn::new(fields.u64().ok_or(DAMAGED)?);
        let first_time = Timestamp::from_micros(fields.i64().ok_or(DAMAGED)?);
        let last_time = Timestamp::from_micros(fields.i64().ok_or(DAMAGED)?);
        let image_bytes = fields.u64().ok_or(DAMAGED)?;
        let kind = fields.u8().ok_or(DAMAGED)?;
        fields.bytes(3).ok_or(DAMAGED)?;
        if fields.u32() != Some(footer_crc(bytes)) {
            return Err(DAMAGED);
        }
        let footer = Self {
            kind: kind_from_byte(kind)?,
            database,
            index_offset,
            entry_count,
            first_lsn,
            last_position: LogPosition::new(last_epoch, last_lsn),
            first_time,
            last_time,
            image_bytes,
        };
        footer.check(object_bytes)?;
        Ok(footer)
    }

    fn check(&self, object_bytes: u64) -> Result<(), ChunkError> {
        let index_end = object_bytes
            .checked_sub(FOOTER_BYTES as u64)
            .ok_or(TRUNCATED)?;
        let index_bytes = index_end.checked_sub(self.index_offset).ok_or(TRUNCATED)?;
        let span = self
            .last_position
            .lsn
            .get()
            .checked_sub(self.first_lsn.get());
        let whole = span.and_then(|span| span.checked_add(1)) == Some(self.entry_count.into());
        let count = self.entry_count as usize;
        let one = self.kind == ChunkKind::Chunk || count == 1;
        if !whole || !one || count == 0 || count > MAX_ENTRIES || self.first_lsn == Lsn::ZERO {
            return Err(ChunkError::Damaged(
                "footer describes an impossible range of entries",
            ));
        }
        if index_bytes > MAX_INDEX_BYTES {
            return Err(ChunkError::Damaged("index is larger than one can be"));
        }
        Ok(())
    }
}

fn footer_crc(footer: &[u8; FOOTER_BYTES]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&footer[..76]);
    crc.update(&footer[80..]);
    crc.finalize()
}

/// Encodes a block that will stand at `offset`.
pub(super) fn encode_block(
    offset: u64,
    raw: &[u8],
    compressor: &mut zstd::bulk::Compressor<'_>,
) -> Result<Vec<u8>, ChunkError> {
    let stored = compressor.compress(raw)?;
    if raw.len() > MAX_BLOCK_RAW_BYTES || stored.len() > MAX_BLOCK_STORED_BYTES {
        return Err(ChunkError::Limit("block is too large"));
    }
    let mut block = Vec::with_capacity(BLOCK_PREFIX_BYTES + stored.len());
    block.extend_from_slice(&(stored.len() as u32).to_le_bytes());
    block.extend_from_slice(&(raw.len() as u32).to_le_bytes());
    let crc = block_crc(offset, &block, &stored);
    block.extend_from_slice(&crc.to_le_bytes());
    block.extend_from_slice(&stored);
    Ok(block)
}

/// The fixed part of a block, its lengths within the limits.
#[derive(Debug, Clone, Copy)]
pub(super) struct BlockPrefix {
    pub(super) stored_bytes: usize,
    raw_bytes: usize,
    crc: u32,
}

impl BlockPrefix {
    pub(super) fn decode(bytes: &[u8; BLOCK_PREFIX_BYTES]) -> Result<Self, ChunkError> {
        let word = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|i| bytes[at + i]));
        let (stored_bytes, raw_bytes) = (word(0) as usize, word(4) as usize);
        if stored_bytes > MAX_BLOCK_STORED_BYTES || raw_bytes > MAX_BLOCK_RAW_BYTES {
            return Err(ChunkError::Damaged("block is damaged"));
        }
        Ok(Self {
            stored_bytes,
            raw_bytes,
            crc: word(8),
        })
    }

    /// The raw bytes of the block at `offset` whose stored bytes are `stored`.
    pub(super) fn unpack(
        &self,
        offset: u64,
        stored: &[u8],
        decompressor: &mut zstd::bulk::Decompressor<'_>,
    ) -> Result<Vec<u8>, ChunkError> {
        let lengths = [
            (self.stored_bytes as u32).to_le_bytes(),
            (self.raw_bytes as u32).to_le_bytes(),
        ];
        if stored.len() != self.stored_bytes
            || block_crc(offset, lengths.as_flattened(), stored) != self.crc
        {
            return Err(ChunkError::Damaged("block is damaged"));
        }
        let raw = decompressor
            .decompress(stored, self.raw_bytes)
            .map_err(|_| ChunkError::Damaged("block does not decompress"))?;
        if raw.len() != self.raw_bytes {
            return Err(ChunkError::Damaged("block decompresses to another length"));
        }
        Ok(raw)
    }
}

// The offset is part of the checksum, so that a block that stands elsewhere is found.
fn block_crc(offset: u64, lengths: &[u8], stored: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&offset.to_le_bytes());
    crc.update(lengths);
    crc.update(stored);
    crc.finalize()
}

pub(super) fn encode_record(facts: &EntryFacts, into: &mut Vec<u8>) {
    let start = into.len();
    let (kind, described) = match facts.kind {
        EntryKind::EpochStart { last_transaction } => (KIND_EPOCH_START, last_transaction),
        EntryKind::Transaction(_) => (KIND_TRANSACTION, facts.transaction()),
    };
    let mut flags = 0;
    if let Some(summary) = described {
        flags |= if summary.commit.whole_image {
            FLAG_WHOLE_IMAGE
        } else {
            0
        };
        flags |= if kind == KIND_EPOCH_START {
            FLAG_HAS_LAST_TRANSACTION
        } else {
            0
        };
    }
    into.extend_from_slice(&[kind, flags, 0, 0]);
    into.extend_from_slice(&facts.position.epoch.get().to_le_bytes());
    into.extend_from_slice(&facts.position.lsn.get().to_le_bytes());
    into.extend_from_slice(&facts.time.as_micros().to_le_bytes());
    into.extend_from_slice(&facts.place.block.to_le_bytes());
    into.extend_from_slice(&facts.place.within.to_le_bytes());
    if let Some(TransactionSummary { position, commit }) = described {
        into.extend_from_slice(&commit.slot_count.to_le_bytes());
        into.extend_from_slice(commit.origin.client.as_bytes());
        into.extend_from_slice(&commit.origin.sequence.to_le_bytes());
        into.extend_from_slice(&commit.base_lsn.get().to_le_bytes());
        into.extend_from_slice(&u32::from(commit.page_size).to_le_bytes());
        into.extend_from_slice(&commit.page_count.to_le_bytes());
        into.extend_from_slice(&commit.checksum.as_u64().to_le_bytes());
        into.extend_from_slice(&commit.time.as_micros().to_le_bytes());
        into.extend_from_slice(&position.lsn.get().to_le_bytes());
        into.extend_from_slice(&position.epoch.get().to_le_bytes());
    }
    into.resize(start + RECORD_BYTES, 0);
}

pub(super) fn decode_record(record: &[u8]) -> Result<EntryFacts, ChunkError> {
    const DAMAGED: ChunkError = ChunkError::Damaged("index record is damaged");
    let mut fields = Fields(record);
    let [kind, flags, _, _] = fields.array().ok_or(DAMAGED)?;
    let epoch = Epoch::new(fields.u32().ok_or(DAMAGED)?);
    let position = LogPosition::new(epoch, Lsn::new(fields.u64().ok_or(DAMAGED)?));
    if position.lsn >= Lsn::MAX {
        return Err(DAMAGED);
    }
    let time = Timestamp::from_micros(fields.i64().ok_or(DAMAGED)?);
    let block = fields.u64().ok_or(DAMAGED)?;
    let place = Place {
        block,
        within: fields.u32().ok_or(DAMAGED)?,
    };
    let kind = match kind {
        KIND_TRANSACTION => {
            let summary = decode_summary(&mut fields, flags).ok_or(DAMAGED)?;
            let commit = summary.commit;
            let is_consistent = summary.position == position && commit.time == time;
            if !is_consistent || commit.slot_count > commit.page_count {
                return Err(DAMAGED);
            }
            EntryKind::Transaction(commit)
        }
        KIND_EPOCH_START if flags & FLAG_HAS_LAST_TRANSACTION == 0 => EntryKind::EpochStart {
            last_transaction: None,
        },
        KIND_EPOCH_START => {
            let summary = decode_summary(&mut fields, flags).ok_or(DAMAGED)?;
            EntryKind::EpochStart {
                last_transaction: Some(summary),
            }
        }
        _ => return Err(ChunkError::Damaged("unknown kind of entry")),
    };
    Ok(EntryFacts {
        position,
        time,
        kind,
        place,
    })
}

fn decode_summary(fields: &mut Fields<'_>, flags: u8) -> Option<TransactionSummary> {
    let slot_count = fields.u32()?;
    let client = ClientId::from_bytes(fields.array()?);
    let origin = Origin {
        client,
        sequence: fields.u64()?,
    };
    let base_lsn = Lsn::new(fields.u64()?);
    let page_size = PageSize::try_from(fields.u32()?).ok()?;
    let page_count = fields.u32()?;
    let checksum = DatabaseChecksum::from_u64(fields.u64()?);
    let time = Timestamp::from_micros(fields.i64()?);
    let lsn = Lsn::new(fields.u64()?);
    let position = LogPosition::new(Epoch::new(fields.u32()?), lsn);
    let commit = CommitHeader {
        origin,
        time,
        base_lsn,
        page_size,
        page_count,
        slot_count,
        checksum,
        whole_image: flags & FLAG_WHOLE_IMAGE != 0,
    };
    Some(TransactionSummary { position, commit })
}
