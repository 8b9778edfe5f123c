//! Checksums of pages and of whole databases.
//!
//! A database's checksum is the XOR of its pages' 64-bit checksums, so that a commit updates it in
//! the time its own pages take. A page's is XXH3-64 of its bytes, seeded with its number, so that
//! two pages that change places do not cancel out.
//!
//! SQLite rewrites bytes 24..28 (change counter) and 92..100 (version-valid-for, library version)
//! of page 1 whenever it applies pages by itself; they are hashed as zeros.

use crate::wal::PageNo;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::ops::Range;
use xxhash_rust::xxh3::{Xxh3, xxh3_64_with_seed};

/// Bytes of page 1 that differ between equal databases
/// (<https://sqlite.org/fileformat2.html>, 1.3).
pub const VOLATILE_HEADER_RANGES: [Range<usize>; 2] = [24..28, 92..100];

/// Checksum of one page of one database.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct PageChecksum(u64);

impl PageChecksum {
    /// Of the page `page_no` with the bytes `image` (a whole page, at least 512 bytes).
    pub fn of(page_no: PageNo, image: &[u8]) -> Self {
        let seed = u64::from(page_no.get());
        if page_no.get() != 1 || image.len() < 100 {
            return Self(xxh3_64_with_seed(image, seed));
        }
        let [counter, version] = VOLATILE_HEADER_RANGES;
        let mut hasher = Xxh3::with_seed(seed);
        hasher.update(&image[..counter.start]);
        hasher.update(&[0; 4]);
        hasher.update(&image[counter.end..version.start]);
        hasher.update(&[0; 8]);
        hasher.update(&image[version.end..]);
        Self(hasher.digest())
    }

    /// From its number, as stored. Zero stands for a page that does not exist.
    pub const fn from_u64(value: u64) -> Self {
        Self(value)
    }

    /// Its number, to be stored.
    pub const fn as_u64(self) -> u64 {
        self.0
    }
}

/// Checksum of a whole database: XOR of the checksums of its pages. Zero for an empty one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct DatabaseChecksum(u64);

impl DatabaseChecksum {
    /// Of a database without pages.
    pub const EMPTY: Self = Self(0);

    /// Adds a page that was not there, or takes away one that was: XOR is its own inverse.
    pub const fn toggle(&mut self, page: PageChecksum) {
        self.0 ^= page.0;
    }

    /// From its number, as stored.
    pub const fn from_u64(value: u64) -> Self {
        Self(value)
    }

    /// Its number, to be stored.
    pub const fn as_u64(self) -> u64 {
        self.0
    }
}

impl fmt::Display for DatabaseChecksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_one_is_hashed_without_what_sqlite_rewrites() {
        let first = PageNo::new(1).unwrap();
        let mut image = vec![7u8; 512];
        let before = PageChecksum::of(first, &image);
        image[24] = 1;
        image[99] = 1;
        assert_eq!(PageChecksum::of(first, &image), before);
        image[100] = 1;
        assert_ne!(PageChecksum::of(first, &image), before);
    }

    #[test]
    fn the_streamed_hash_of_page_one_is_the_plain_one_of_zeroed_bytes() {
        let first = PageNo::new(1).unwrap();
        let mut image: Vec<u8> = (0..1024u32).map(|i| i as u8).collect();
        let streamed = PageChecksum::of(first, &image);
        VOLATILE_HEADER_RANGES
            .into_iter()
            .for_each(|range| image[range].fill(0));
        assert_eq!(streamed.as_u64(), xxh3_64_with_seed(&image, 1));
    }

    #[test]
    fn pages_that_change_places_change_the_database() {
        let (two, three) = (PageNo::new(2).unwrap(), PageNo::new(3).unwrap());
        let (a, b) = (vec![1u8; 512], vec![2u8; 512]);
        let mut straight = DatabaseChecksum::EMPTY;
        straight.toggle(PageChecksum::of(two, &a));
        straight.toggle(PageChecksum::of(three, &b));
        let mut swapped = DatabaseChecksum::EMPTY;
        swapped.toggle(PageChecksum::of(two, &b));
        swapped.toggle(PageChecksum::of(three, &a));
        assert_ne!(straight, swapped);
    }
}
