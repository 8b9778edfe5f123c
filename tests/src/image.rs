//! Database files as bytes: copy one that is in use, fold its WAL in, compute its checksum, compare
//! two page by page.

use crate::app::plain_query;
use durovfs_wire::checksum::VOLATILE_HEADER_RANGES;
use durovfs_wire::{DatabaseChecksum, PageChecksum, PageNo, PageSize};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Copies a database and its WAL to another path. The database must not be written meanwhile.
///
/// # Panics
/// When a file cannot be copied.
pub fn copy_database(from: &Path, to: &Path) {
    std::fs::copy(from, to).expect("copy the database");
    for suffix in ["-wal", "-journal"] {
        let part = beside(from, suffix);
        if part.exists() {
            std::fs::copy(part, beside(to, suffix)).expect("copy what stands beside it");
        }
    }
}

/// The path of a file that SQLite keeps beside a database.
pub fn beside(database: &Path, suffix: &str) -> PathBuf {
    let mut path = database.as_os_str().to_owned();
    path.push(suffix);
    path.into()
}

/// The whole image of a database as plain SQLite sees it, made from a copy with its WAL folded in.
///
/// # Panics
/// When plain SQLite cannot do that.
pub fn image_of(database: &Path, scratch: &Path) -> Vec<u8> {
    let copy = scratch.join("image-of.db");
    for suffix in ["", "-wal", "-shm", "-journal"] {
        let _ = std::fs::remove_file(beside(&copy, suffix));
    }
    copy_database(database, &copy);
    assert_eq!(plain_query(&copy, "PRAGMA integrity_check"), ["ok"]);
    // In WAL mode this prints a row "0|0|0"; otherwise "0|-1|-1".
    let folded = plain_query(&copy, "PRAGMA wal_checkpoint(TRUNCATE)");
    assert!(folded[0].starts_with("0|"), "{folded:?}");
    std::fs::read(&copy).expect("read the copy")
}

/// Page size of an image.
///
/// # Panics
/// When it is no database.
pub fn page_size(image: &[u8]) -> PageSize {
    assert!(
        image.starts_with(b"SQLite format 3\0"),
        "not a database of {} bytes",
        image.len()
    );
    let field = u16::from_be_bytes([image[16], image[17]]);
    PageSize::from_database_header(field).expect("page size in the database header")
}

/// Checksum of an image, as the log's entries carry it.
///
/// # Panics
/// When it is no database.
pub fn checksum_of(image: &[u8]) -> DatabaseChecksum {
    let mut checksum = DatabaseChecksum::EMPTY;
    for (number, page) in (1..).zip(image.chunks(page_size(image).get())) {
        let page_no = PageNo::new(number).expect("pages are counted from 1");
        checksum.toggle(PageChecksum::of(page_no, page));
    }
    checksum
}

/// Leaves of SQLite's list of free pages, whose content is nobody's: SQLite does not journal it, so
/// a rollback may leave other bytes in the file than a commit sent to the log.
fn free_pages(image: &[u8]) -> BTreeSet<usize> {
    let size = page_size(image).get();
    let word = |at: usize| {
        let bytes = image.get(at..at + 4).expect("a page of the free list");
        u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) as usize
    };
    let (mut free, mut trunk) = (BTreeSet::new(), word(32));
    while trunk != 0 {
        let at = (trunk - 1) * size;
        free.extend((0..word(at + 4)).map(|leaf| word(at + 8 + leaf * 4)));
        trunk = word(at);
    }
    free
}

/// Fails unless two images are the same database: as [`assert_same`], but for free pages.
///
/// # Panics
/// When they differ.
pub fn assert_same_content(what: &str, left: &[u8], right: &[u8]) {
    let free = free_pages(left);
    let size = page_size(left).get();
    let mut masked = (left.to_vec(), right.to_vec());
    for page in free {
        for image in [&mut masked.0, &mut masked.1] {
            if let Some(page) = image.get_mut((page - 1) * size..page * size) {
                page.fill(0);
            }
        }
    }
    assert_same(what, &masked.0, &masked.1);
}

/// Fails unless two images are equal, byte for byte outside what SQLite rewrites by itself.
///
/// # Panics
/// When they differ: tells the first page that does.
pub fn assert_same(what: &str, left: &[u8], right: &[u8]) {
    assert_eq!(left.len(), right.len(), "{what}: sizes differ");
    let size = page_size(left).get();
    for (index, (a, b)) in left.chunks(size).zip(right.chunks(size)).enumerate() {
        let (mut a, mut b) = (a.to_vec(), b.to_vec());
        if index == 0 {
            for range in VOLATILE_HEADER_RANGES {
                a[range.clone()].fill(0);
                b[range].fill(0);
            }
        }
        let differs = a.iter().zip(&b).position(|(a, b)| a != b);
        assert_eq!(
            differs,
            None,
            "{what}: page {} differs at this byte",
            index + 1
        );
    }
}
