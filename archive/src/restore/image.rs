//! The database file that entries are applied to, one after the other, and its proof.
//!
//! Blocking: runs on the blocking pool.

use crate::chunk::{ChunkError, ChunkReader, EntryFacts, EntryKind};
use crate::when::When;
use durovfs_wire::entry::TransactionSummary;
use durovfs_wire::{
    CommitHeader, DatabaseChecksum, Epoch, EpochRun, LogPosition, Lsn, PageChecksum, PageNo,
    PageSize,
};
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

/// Neighbouring pages are written together up to this size.
const WRITE_BUFFER_BYTES: usize = 1 << 20;
/// Read at once when the file is proved.
const READ_BUFFER_BYTES: usize = 1 << 20;

/// Whether the target was reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Applied {
    /// All entries of the chunk are applied, and the target may lie behind them.
    All,
    /// The entries that follow lie behind the target.
    TargetReached,
}

/// A database file under construction.
#[derive(Debug)]
pub(crate) struct Image {
    file: File,
    write: WriteBuffer,
    /// Pages that the log has an image of. Those without (SQLite's lock page, and pages that were
    /// never written) are zeros in the file and do not count in the database's checksum.
    present: PageSet,
    /// Whether the file holds a whole database: it began empty, or with a whole image.
    based: bool,
    last_entry: LogPosition,
    last_transaction: Option<TransactionSummary>,
    epochs: Vec<EpochRun>,
}

impl Image {
    /// Begins with an empty file. `based` when an empty database is what the first entry follows.
    pub(super) fn new(file: File, based: bool) -> Self {
        Self {
            file,
            write: WriteBuffer::default(),
            present: PageSet::default(),
            based,
            last_entry: LogPosition::ZERO,
            last_transaction: None,
            epochs: Vec::new(),
        }
    }

    /// The transaction that the file is the image after, once there is one and it is whole.
    pub(crate) fn transaction(&self) -> Option<TransactionSummary> {
        self.last_transaction.filter(|_| self.based)
    }

    /// The last entry applied.
    pub(super) fn last_entry(&self) -> LogPosition {
        self.last_entry
    }

    /// Number of pages that have an image.
    pub(crate) fn image_count(&self) -> u32 {
        self.present.count()
    }

    /// Applies the entries of a chunk that come next, up to the target. `known` are positions that
    /// entries must agree with.
    pub(super) fn apply(
        &mut self,
        chunk: &mut ChunkReader,
        target: When,
        known: &[LogPosition],
    ) -> Result<Applied, ChunkError> {
        for facts in chunk.index().entries.clone() {
            if is_behind(&facts, target) {
                return Ok(Applied::TargetReached);
            }
            let position = facts.position;
            self.check_position(position, known)?;
            if position.lsn <= self.last_entry.lsn {
                continue;
            }
            if let EntryKind::Transaction(commit) = facts.kind {
                self.apply_transaction(chunk, &facts, &commit)?;
            }
            self.note_position(position);
        }
        Ok(Applied::All)
    }

    /// An entry must be the next one, or one that was applied already with the same epoch.
    fn check_position(&self, got: LogPosition, known: &[LogPosition]) -> Result<(), ChunkError> {
        const FORKED: ChunkError =
            ChunkError::Damaged("chunks disagree about the epoch of an entry: two histories");
        if got.lsn <= self.last_entry.lsn {
            return match self.epoch_of(got.lsn) {
                Some(epoch) if epoch != got.epoch => Err(FORKED),
                Some(_) | None => Ok(()),
            };
        }
        let first = self.last_entry == LogPosition::ZERO;
        if !first && got.lsn != self.last_entry.lsn.next() {
            return Err(ChunkError::Damaged("entries before this chunk are missing"));
        }
        if got.epoch < self.last_entry.epoch {
            return Err(FORKED);
        }
        let start = known.partition_point(|position| position.lsn < got.lsn);
        let named = known[start..]
            .iter()
            .take_while(|position| position.lsn == got.lsn);
        for position in named {
            if position.epoch != got.epoch {
                return Err(FORKED);
            }
        }
        Ok(())
    }

    fn note_position(&mut self, position: LogPosition) {
        if self.last_entry.epoch != position.epoch || self.epochs.is_empty() {
            self.epochs.push(EpochRun {
                epoch: position.epoch,
                first_lsn: position.lsn,
            });
        }
        self.last_entry = position;
    }

    /// Epoch of an entry that was applied.
    pub(super) fn epoch_of(&self, lsn: Lsn) -> Option<Epoch> {
        let runs = self.epochs.partition_point(|run| run.first_lsn <= lsn);
        Some(self.epochs[..runs].last()?.epoch)
    }

    fn apply_transaction(
        &mut self,
        chunk: &mut ChunkReader,
        facts: &EntryFacts,
        commit: &CommitHeader,
    ) -> Result<(), ChunkError> {
        self.last_transaction = facts.transaction();
        if commit.whole_image {
            self.write.clear();
            self.file.set_len(0)?;
            self.present = PageSet::default();
            self.based = true;
            self.write.page_size = Some(commit.page_size);
        }
        if !self.based {
            // Nothing to apply it to: an older chunk is gone, and no whole image came yet.
            return Ok(());
        }
        if *self.write.page_size.get_or_insert(commit.page_size) != commit.page_size {
            return Err(ChunkError::Damaged(
                "page size changes without a whole image",
            ));
        }
        let (file, write, present) = (&self.file, &mut self.write, &mut self.present);
        chunk.read_images(facts, |page_no, image| {
            present.insert(page_no);
            write.push(file, page_no, image)
        })?;
        self.write.flush(&self.file)?;
        self.present.truncate(commit.page_count);
        self.file.set_len(database_bytes(commit))?;
        Ok(())
    }

    /// Proves that the file is the database after its last transaction.
    pub(crate) fn verify(&mut self) -> Result<(), ChunkError> {
        let Some(TransactionSummary { commit, .. }) = self.transaction() else {
            return Err(ChunkError::Damaged("no transaction"));
        };
        if self.file.metadata()?.len() != database_bytes(&commit) {
            return Err(ChunkError::Damaged(
                "restored file has another length than the database",
            ));
        }
        let mut checksum = DatabaseChecksum::EMPTY;
        self.for_each_page(|page_no, image| {
            checksum.toggle(PageChecksum::of(page_no, image));
            Ok::<_, ChunkError>(())
        })?;
        if checksum == commit.checksum {
            Ok(())
        } else {
            Err(ChunkError::Damaged(
                "restored file does not have the checksum of the commit",
            ))
        }
    }

    /// Calls `sink` with each page that has an image, ascending.
    pub(crate) fn for_each_page<E: From<io::Error>>(
        &mut self,
        mut sink: impl FnMut(PageNo, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let Some(TransactionSummary { commit, .. }) = self.transaction() else {
            return Ok(());
        };
        let mut image = vec![0u8; commit.page_size.get()];
        self.file.seek(SeekFrom::Start(0))?;
        let mut reader = BufReader::with_capacity(READ_BUFFER_BYTES, &self.file);
        for number in 1..=commit.page_count {
            reader.read_exact(&mut image)?;
            if let Some(page_no) = PageNo::new(number).filter(|page| self.present.contains(*page)) {
                sink(page_no, &image)?;
            }
        }
        Ok(())
    }
}

fn is_behind(facts: &EntryFacts, target: When) -> bool {
    match target {
        When::Latest => false,
        When::Time(time) => facts.time > time,
        When::Lsn(lsn) => facts.position.lsn > lsn,
        When::Bookmark(bookmark) => facts.position.lsn > bookmark.lsn,
    }
}

fn database_bytes(commit: &CommitHeader) -> u64 {
    u64::from(commit.page_count) * commit.page_size.get() as u64
}

/// Gathers neighbouring pages into one write.
#[derive(Debug, Default)]
struct WriteBuffer {
    page_size: Option<PageSize>,
    offset: u64,
    bytes: Vec<u8>,
}

impl WriteBuffer {
    fn push(&mut self, file: &File, page_no: PageNo, image: &[u8]) -> io::Result<()> {
        let offset = self.page_size.map_or(0, |size| page_no.file_offset(size));
        let follows = offset == self.offset + self.bytes.len() as u64;
        if !follows || self.bytes.len() + image.len() > WRITE_BUFFER_BYTES {
            self.flush(file)?;
            self.offset = offset;
        }
        self.bytes.extend_from_slice(image);
        Ok(())
    }

    fn flush(&mut self, file: &File) -> io::Result<()> {
        file.write_all_at(&self.bytes, self.offset)?;
        self.clear();
        Ok(())
    }

    fn clear(&mut self) {
        self.offset += self.bytes.len() as u64;
        self.bytes.clear();
    }
}

/// A set of pages: one bit each.
#[derive(Debug, Default)]
struct PageSet {
    words: Vec<u64>,
}

impl PageSet {
    fn place(page_no: PageNo) -> (usize, u64) {
        let index = page_no.get() - 1;
        ((index / 64) as usize, 1 << (index % 64))
    }

    fn insert(&mut self, page_no: PageNo) {
        let (word, bit) = Self::place(page_no);
        if word >= self.words.len() {
            self.words.resize(word + 1, 0);
        }
        self.words[word] |= bit;
    }

    fn contains(&self, page_no: PageNo) -> bool {
        let (word, bit) = Self::place(page_no);
        self.words.get(word).is_some_and(|bits| bits & bit != 0)
    }

    /// Takes out all pages above `page_count`.
    fn truncate(&mut self, page_count: u32) {
        let full = (page_count / 64) as usize;
        let rest = page_count % 64;
        if rest == 0 {
            self.words.truncate(full);
        } else {
            self.words.truncate(full + 1);
            if let Some(last) = self.words.get_mut(full) {
                *last &= (1 << rest) - 1;
            }
        }
    }

    fn count(&self) -> u32 {
        self.words.iter().map(|word| word.count_ones()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Broken: a database that shrank and grew again would be proved against pages of its past.
    #[test]
    fn a_page_set_forgets_exactly_what_is_cut_off() {
        let page = |number| PageNo::new(number).unwrap();
        for cut in [0, 1, 63, 64, 65, 127, 128, 200] {
            let mut set = PageSet::default();
            (1..=190).for_each(|number| set.insert(page(number)));
            set.truncate(cut);
            for number in 1..=256 {
                assert_eq!(
                    set.contains(page(number)),
                    number <= cut.min(190),
                    "{number} of {cut}"
                );
            }
            assert_eq!(set.count(), cut.min(190));
        }
    }
}
