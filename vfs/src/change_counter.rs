//! The change counter in the header of a database file, by which connections that hold no lock find
//! out in rollback mode that their page cache is of an older file
//! (<https://sqlite.org/fileformat2.html>, 1.3.7).
//!
//! It is no part of what is replicated: each host counts its own file's changes. So whoever writes
//! pages of the log into a file counts on from what stood there, whatever the pages say.

use crate::error::Refusal;
use crate::file::BaseFile;
use std::ops::Range;

const COUNTER: Range<usize> = 24..28;
/// The counter at the moment when the size in the header was written: it counts when both agree.
const VALID_FOR: Range<usize> = 92..96;
const HEADER_BYTES: usize = 100;

/// A value that the counter of a file never had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ChangeCounter(u32);

impl ChangeCounter {
    /// The one after the file's. None for a file without a header, of which nobody has pages.
    pub(crate) fn next_of(database: &dyn BaseFile) -> Result<Option<Self>, Refusal> {
        let mut header = [0u8; HEADER_BYTES];
        if database.read_at(&mut header, 0)? < HEADER_BYTES {
            return Ok(None);
        }
        let [a, b, c, d] = [header[24], header[25], header[26], header[27]];
        Ok(Some(Self(u32::from_be_bytes([a, b, c, d]).wrapping_add(1))))
    }

    /// Puts it into page 1. The size there counts afterwards if it did before.
    pub(crate) fn put_into(self, page: &mut [u8]) {
        let valid_for = match page[COUNTER] == page[VALID_FOR] {
            true => self.0,
            false => !self.0,
        };
        page[COUNTER].copy_from_slice(&self.0.to_be_bytes());
        page[VALID_FOR].copy_from_slice(&valid_for.to_be_bytes());
    }

    /// Puts it into the file.
    pub(crate) fn write_to(self, database: &dyn BaseFile) -> Result<(), Refusal> {
        let mut header = [0u8; HEADER_BYTES];
        database.read_at(&mut header, 0)?;
        self.put_into(&mut header);
        database.write_at(&header, 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    fn header(counter: u32, valid_for: u32) -> [u8; HEADER_BYTES] {
        let mut header = [7; HEADER_BYTES];
        header[COUNTER].copy_from_slice(&counter.to_be_bytes());
        header[VALID_FOR].copy_from_slice(&valid_for.to_be_bytes());
        header
    }

    #[test]
    fn it_counts_on_from_the_file_and_keeps_what_the_size_is_worth() {
        let file = tempfile::tempfile().unwrap();
        assert_eq!(ChangeCounter::next_of(&file).unwrap(), None);
        file.write_all_at(&header(8, 8), 0).unwrap();
        let next = ChangeCounter::next_of(&file).unwrap().unwrap();
        // Of a page that another host wrote.
        let mut page = header(3, 3);
        next.put_into(&mut page);
        assert_eq!(page, header(9, 9));
        let mut page = header(3, 9);
        next.put_into(&mut page);
        assert_eq!(page, header(9, !9));
        next.write_to(&file).unwrap();
        let mut written = [0; HEADER_BYTES];
        file.read_exact_at(&mut written, 0).unwrap();
        assert_eq!(written, header(9, 9));
    }
}
