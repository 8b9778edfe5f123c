//! A second writer of chunks and snapshots: takes apart what the product's wrote, and packs it anew
//! after edits. Offsets, counts, lengths and checksums fit again; edits of the footer and of the
//! finished bytes come after that.

use super::database::{self, DATABASE, NAME, PAGE_BYTES};
use crate::edits::{Edit, edit};
use arbitrary::Arbitrary;
use durovfs_archive::{ChunkWriter, LogIdentity, Normalizer};
use std::sync::OnceLock;

const HEADER_BYTES: usize = 40 + NAME.len();
const FOOTER_BYTES: usize = 90;
const RECORD_BYTES: usize = 112;
const IMAGE_BYTES: usize = 4 + PAGE_BYTES;

/// Which object, and what happens to it.
#[derive(Arbitrary, Debug)]
pub struct ObjectEdits {
    is_snapshot: bool,
    /// The object's images stand in blocks of so many.
    images_per_block: u8,
    header: Vec<Edit>,
    images: Vec<Edit>,
    records: Vec<Edit>,
    footer: Vec<Edit>,
    finished: Vec<Edit>,
}

/// An object without checksums, its blocks unpacked.
struct Pieces {
    header: Vec<u8>,
    images: Vec<u8>,
    records: Vec<u8>,
    footer: Vec<u8>,
}

/// The bytes of an object, edited.
pub fn build(edits: &ObjectEdits) -> Vec<u8> {
    static CHUNK: OnceLock<Pieces> = OnceLock::new();
    static SNAPSHOT: OnceLock<Pieces> = OnceLock::new();
    let pieces = match edits.is_snapshot {
        true => SNAPSHOT.get_or_init(|| take_apart(&write(true))),
        false => CHUNK.get_or_init(|| take_apart(&write(false))),
    };
    let mut bytes = pieces.header.clone();
    edit(&mut bytes, &edits.header);
    let crc = crc32fast::hash(&bytes);
    bytes.extend_from_slice(&crc.to_le_bytes());
    let mut images = pieces.images.clone();
    edit(&mut images, &edits.images);
    let block_bytes = usize::from(edits.images_per_block).max(1) * IMAGE_BYTES;
    let mut block_offsets = Vec::new();
    for block in images.chunks(block_bytes) {
        block_offsets.push(bytes.len() as u64);
        pack(&mut bytes, block);
    }
    let mut records = pieces.records.clone();
    for record in records.chunks_exact_mut(RECORD_BYTES) {
        let at = word(record, 32) as usize;
        if word(record, 36) > 0 && record[0] == 1 {
            let block = block_offsets.get(at / block_bytes).copied();
            record[24..32].copy_from_slice(&block.unwrap_or_default().to_le_bytes());
            record[32..36].copy_from_slice(&((at % block_bytes) as u32).to_le_bytes());
        }
    }
    edit(&mut records, &edits.records);
    let index_offset = bytes.len() as u64;
    pack(&mut bytes, &records);
    let mut footer = footer_of(&pieces.footer, index_offset, &records);
    edit(&mut footer, &edits.footer);
    footer.resize(FOOTER_BYTES, 0);
    let crc = footer_crc(&footer);
    footer[76..80].copy_from_slice(&crc.to_le_bytes());
    bytes.extend(footer);
    edit(&mut bytes, &edits.finished);
    bytes
}

/// By the product's own writer.
fn write(is_snapshot: bool) -> Vec<u8> {
    let scratch = tempfile::tempdir().expect("a folder");
    let identity = LogIdentity {
        database: DATABASE,
        name: NAME.into(),
    };
    let (writer, parts) = match is_snapshot {
        true => (
            ChunkWriter::create_snapshot(scratch.path(), &identity),
            vec![database::image()],
        ),
        false => (
            ChunkWriter::create(scratch.path(), &identity),
            database::log(),
        ),
    };
    let mut writer = writer.expect("a writer");
    let mut normalizer = Normalizer::new(scratch.path());
    for part in parts {
        let entry = normalizer.push(&part).expect("a part");
        writer.push(&entry.expect("an entry")).expect("the next");
    }
    let sealed = writer.finish().expect("an object");
    std::fs::read(sealed.path()).expect("its bytes")
}

fn take_apart(bytes: &[u8]) -> Pieces {
    let footer = &bytes[bytes.len() - FOOTER_BYTES..];
    let index_offset = long(footer, 0) as usize;
    Pieces {
        header: bytes[..HEADER_BYTES].to_vec(),
        images: unpack(&bytes[HEADER_BYTES + 4..index_offset]),
        records: unpack(&bytes[index_offset..bytes.len() - FOOTER_BYTES]),
        footer: footer.to_vec(),
    }
}

/// The raw bytes of the one block that these are.
fn unpack(block: &[u8]) -> Vec<u8> {
    assert_eq!(word(block, 0) as usize + 12, block.len(), "one block");
    zstd::bulk::decompress(&block[12..], word(block, 4) as usize).expect("a block")
}

fn pack(bytes: &mut Vec<u8>, raw: &[u8]) {
    let stored = zstd::bulk::compress(raw, 1).expect("a block");
    let mut checked = (bytes.len() as u64).to_le_bytes().to_vec();
    checked.extend_from_slice(&(stored.len() as u32).to_le_bytes());
    checked.extend_from_slice(&(raw.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&checked[8..]);
    checked.extend_from_slice(&stored);
    bytes.extend_from_slice(&crc32fast::hash(&checked).to_le_bytes());
    bytes.extend_from_slice(&stored);
}

/// A footer that says what the records do.
fn footer_of(written: &[u8], index_offset: u64, records: &[u8]) -> Vec<u8> {
    let mut footer = written.to_vec();
    let mut put = |at: usize, value: &[u8]| footer[at..at + value.len()].copy_from_slice(value);
    put(0, &index_offset.to_le_bytes());
    let records: Vec<&[u8]> = records.chunks_exact(RECORD_BYTES).collect();
    put(8, &(records.len() as u32).to_le_bytes());
    if let (Some(first), Some(last)) = (records.first(), records.last()) {
        put(12, &last[4..8]);
        put(32, &first[8..16]);
        put(40, &last[8..16]);
        put(48, &first[16..24]);
        put(56, &last[16..24]);
    }
    let image_bytes = |record: &&&[u8]| u64::from(word(record, 36)) * u64::from(word(record, 72));
    let transactions = records.iter().filter(|record| record[0] == 1);
    let sum = transactions.fold(0, |sum: u64, record| sum.wrapping_add(image_bytes(&record)));
    put(64, &sum.to_le_bytes());
    footer
}

fn footer_crc(footer: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&footer[..76]);
    crc.update(&footer[80..]);
    crc.finalize()
}

fn word(bytes: &[u8], at: usize) -> u32 {
    let mut four = [0u8; 4];
    four.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(four)
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from(word(bytes, at)) | u64::from(word(bytes, at + 4)) << 32
}
