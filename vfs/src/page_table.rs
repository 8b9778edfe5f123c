//! The page table: the 64-bit checksum of each page of the local database, in the mark's file, so
//! that a commit updates the database's checksum in the time its own pages take.
//!
//! Zero stands for a page that does not exist (or SQLite's lock page, which nobody writes). Entries
//! change only after a commit is acknowledged and while it is still in flight in the mark, so that
//! a crash in between is mended by writing that commit's pages again.

use crate::error::Refusal;
use crate::file::BaseFile;
use crate::mark::PAGE_TABLE_OFFSET;
use durovfs_wire::{DatabaseChecksum, PageChecksum, PageNo};
use std::collections::BTreeMap;
use std::fs::File;
use std::sync::Arc;

/// Entries read at once when many are read.
const BATCH: u32 = 8192;

/// Checksums of the pages that a transaction writes.
pub type PageChanges = BTreeMap<PageNo, PageChecksum>;

/// The page table of one database.
#[derive(Debug)]
pub struct PageTable {
    file: Arc<File>,
}

fn offset(page_no: u32) -> u64 {
    PAGE_TABLE_OFFSET + (u64::from(page_no) - 1) * 8
}

impl PageTable {
    /// The table in this mark.
    pub fn new(file: Arc<File>) -> Self {
        Self { file }
    }

    /// Checksum of a page; zero when it does not exist.
    ///
    /// # Errors
    /// When the table cannot be read.
    pub fn read(&self, page_no: PageNo) -> Result<PageChecksum, Refusal> {
        let mut bytes = [0u8; 8];
        self.file.read_at(&mut bytes, offset(page_no.get()))?;
        Ok(PageChecksum::from_u64(u64::from_le_bytes(bytes)))
    }

    /// XOR of the pages `first..=last`.
    ///
    /// # Errors
    /// When the table cannot be read.
    pub fn sum(&self, first: u32, last: u32) -> Result<DatabaseChecksum, Refusal> {
        let mut sum = DatabaseChecksum::EMPTY;
        let mut next = first.max(1);
        while next <= last {
            let count = BATCH.min(last - next + 1);
            let mut bytes = vec![0u8; count as usize * 8];
            self.file.read_at(&mut bytes, offset(next))?;
            for entry in bytes.chunks_exact(8) {
                let mut word = [0u8; 8];
                word.copy_from_slice(entry);
                sum.toggle(PageChecksum::from_u64(u64::from_le_bytes(word)));
            }
            next += count;
        }
        Ok(sum)
    }

    /// Checksum that the database will have after `changes`, when it has the checksum `before` and
    /// `old_count` pages now and `new_count` then. Changes above `new_count` do not count.
    ///
    /// # Errors
    /// When the table cannot be read.
    pub fn checksum_after(
        &self,
        before: DatabaseChecksum,
        old_count: u32,
        new_count: u32,
        changes: &PageChanges,
    ) -> Result<DatabaseChecksum, Refusal> {
        let mut sum = before;
        for (page_no, checksum) in changes.iter().filter(|(page, _)| page.get() <= new_count) {
            if page_no.get() <= old_count {
                sum.toggle(self.read(*page_no)?);
            }
            sum.toggle(*checksum);
        }
        if new_count < old_count {
            let gone = self.sum(new_count + 1, old_count)?;
            sum.toggle(PageChecksum::from_u64(gone.as_u64()));
        }
        Ok(sum)
    }

    /// The same from the table alone, whatever part of `changes` it has taken over already: a
    /// process that was killed between the table and the mark leaves the table ahead of the mark.
    ///
    /// # Errors
    /// When the table cannot be read.
    pub fn checksum_with(
        &self,
        page_count: u32,
        changes: &PageChanges,
    ) -> Result<DatabaseChecksum, Refusal> {
        let mut sum = self.sum(1, page_count)?;
        for (page_no, checksum) in changes.iter().filter(|(page, _)| page.get() <= page_count) {
            sum.toggle(self.read(*page_no)?);
            sum.toggle(*checksum);
        }
        Ok(sum)
    }

    /// Takes the changes over.
    ///
    /// # Errors
    /// When the table cannot be written.
    pub fn apply(
        &self,
        old_count: u32,
        new_count: u32,
        changes: &PageChanges,
    ) -> Result<(), Refusal> {
        let mut run: Vec<u8> = Vec::new();
        let mut run_start = 0u32;
        for (page_no, checksum) in changes.iter().filter(|(page, _)| page.get() <= new_count) {
            let page_no = page_no.get();
            let contiguous = run_start + (run.len() / 8) as u32 == page_no;
            if !run.is_empty() && (!contiguous || run.len() >= BATCH as usize * 8) {
                self.file.write_at(&run, offset(run_start))?;
                run.clear();
            }
            if run.is_empty() {
                run_start = page_no;
            }
            run.extend_from_slice(&checksum.as_u64().to_le_bytes());
        }
        if !run.is_empty() {
            self.file.write_at(&run, offset(run_start))?;
        }
        if new_count < old_count {
            self.file.truncate(offset(new_count + 1))?;
        }
        Ok(())
    }

    /// Forgets every page.
    ///
    /// # Errors
    /// When the table cannot be written.
    pub fn clear(&self) -> Result<(), Refusal> {
        self.file.truncate(PAGE_TABLE_OFFSET)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(number: u32) -> PageNo {
        PageNo::new(number).unwrap()
    }

    /// Broken, a database's checksum would drift from its content, and open would refuse it.
    #[test]
    fn the_running_checksum_is_the_sum_of_the_table() {
        let table = PageTable::new(Arc::new(tempfile::tempfile().unwrap()));
        let mut sum = DatabaseChecksum::EMPTY;
        let mut count = 0u32;
        for round in 0u64..50 {
            let new_count = [7, 20_000, 3, 9, 1][round as usize % 5];
            let first = if new_count > count { count + 1 } else { 1 };
            let changes: PageChanges = (first..=new_count)
                .map(|n| {
                    (
                        page(n),
                        PageChecksum::from_u64(round * 7919 + u64::from(n) + 1),
                    )
                })
                .chain([(page(1), PageChecksum::from_u64(round + 99))])
                .collect();
            sum = table
                .checksum_after(sum, count, new_count, &changes)
                .unwrap();
            table.apply(count, new_count, &changes).unwrap();
            count = new_count;
            assert_eq!(table.sum(1, count).unwrap(), sum, "round {round}");
        }
        table.clear().unwrap();
        assert_eq!(table.sum(1, count).unwrap(), DatabaseChecksum::EMPTY);
    }

    #[test]
    fn a_table_that_has_part_of_a_change_already_gives_the_same_checksum() {
        // Broken: after a kill between table and mark nobody could roll the file forward.
        let file = tempfile::tempfile().unwrap();
        let table = PageTable::new(Arc::new(file));
        let checksums = |pages: &[(u32, u64)]| -> PageChanges {
            pages
                .iter()
                .map(|(n, c)| (page(*n), PageChecksum::from_u64(*c)))
                .collect()
        };
        let before = checksums(&[(1, 11), (2, 22), (3, 33), (4, 44)]);
        table.apply(0, 4, &before).unwrap();
        let changes = checksums(&[(1, 101), (3, 303), (5, 505)]);
        let old = table.sum(1, 4).unwrap();
        let expected = table.checksum_after(old, 4, 5, &changes).unwrap();
        assert_eq!(table.checksum_with(5, &changes).unwrap(), expected);
        // The killed process got this far.
        table.apply(4, 4, &checksums(&[(1, 101)])).unwrap();
        assert_ne!(table.checksum_after(old, 4, 5, &changes).unwrap(), expected);
        assert_eq!(table.checksum_with(5, &changes).unwrap(), expected);
        // Or all the way through the table.
        table.apply(4, 5, &changes).unwrap();
        assert_eq!(table.checksum_with(5, &changes).unwrap(), expected);
    }
}
