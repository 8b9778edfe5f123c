//! Where a copy stands, in a file beside it: `COPY-durovfs-copy`.
//!
//! The file is written before SQLite commits a batch: where the copy stands, and where it will
//! stand after the batch. A crash leaves the copy at one of the two, and its checksum tells at
//! which. No sync is needed for that: what a power cut leaves is found to be one of them, or is
//! made anew.

use crate::absent::AbsentPages;
use durovfs_wire::entry::TransactionSummary;
use durovfs_wire::{DatabaseChecksum, DatabaseId, LogPosition};
use serde::{Deserialize, Serialize};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

/// Ends the file's name.
pub const SUFFIX: &str = "-durovfs-copy";
/// Begins the file: what it is, and the version of its format.
const MAGIC: &str = "durovfs-copy 1 ";
/// Longest file: both stands, with all the ranges of absent pages that are kept.
const MAX_BYTES: u64 = 1 << 20;

/// A moment of a log, as a copy has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stand {
    /// The last transaction that was applied.
    pub summary: TransactionSummary,
    /// Bytes 18 and 19 of page 1 as the log has them; the copy says WAL there.
    pub format: [u8; 2],
    /// Pages without an image.
    #[serde(default, skip_serializing_if = "AbsentPages::is_empty")]
    pub absent: AbsentPages,
}

impl Stand {
    /// Where it is in the log.
    pub fn position(&self) -> LogPosition {
        self.summary.position
    }

    /// Checksum of the database, as the log states it.
    pub fn checksum(&self) -> DatabaseChecksum {
        self.summary.commit.checksum
    }

    /// Pages without an image in a database that has become this long, before any is written.
    pub fn absent_in(&self, page_count: u32) -> AbsentPages {
        let mut absent = self.absent.clone();
        absent.truncate(page_count);
        absent.grow(self.page_count().saturating_add(1), page_count);
        absent
    }

    /// Pages of the database.
    pub fn page_count(&self) -> u32 {
        self.summary.commit.page_count
    }
}

/// What is written down of a copy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyRecord {
    /// The log.
    pub database: DatabaseId,
    /// Where the copy stood before the last batch.
    pub at: Option<Stand>,
    /// Where it stands if SQLite committed the batch.
    pub next: Option<Stand>,
}

/// The file beside a copy.
pub fn record_path(copy: &Path) -> PathBuf {
    let mut name = copy.as_os_str().to_owned();
    name.push(SUFFIX);
    name.into()
}

impl CopyRecord {
    /// Reads the file beside a copy. `None` when there is none, or none that can be believed.
    ///
    /// # Errors
    /// When the disk cannot be read.
    pub fn load(copy: &Path) -> io::Result<Option<Self>> {
        let file = match std::fs::File::open(record_path(copy)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            file => file?,
        };
        let mut text = Vec::new();
        file.take(MAX_BYTES + 1).read_to_end(&mut text)?;
        Ok(Self::parse(&text))
    }

    /// Of the bytes of such a file.
    fn parse(text: &[u8]) -> Option<Self> {
        if text.len() as u64 > MAX_BYTES {
            return None;
        }
        let rest = text.strip_prefix(MAGIC.as_bytes())?;
        let line = rest.iter().position(|byte| *byte == b'\n')?;
        let (crc, body) = (std::str::from_utf8(&rest[..line]).ok()?, &rest[line + 1..]);
        if u32::from_str_radix(crc, 16).ok()? != crc32fast::hash(body) {
            return None;
        }
        let record: Self = serde_json::from_slice(body).ok()?;
        let mut stands = record.at.iter().chain(&record.next);
        stands
            .all(|stand| stand.absent.is_sound(stand.page_count()))
            .then_some(record)
    }

    fn to_bytes(&self) -> io::Result<Vec<u8>> {
        let body = serde_json::to_vec(self)?;
        let mut text = format!("{MAGIC}{:08x}\n", crc32fast::hash(&body)).into_bytes();
        text.extend(body);
        Ok(text)
    }

    /// Replaces the file beside a copy.
    ///
    /// # Errors
    /// When the disk cannot be written.
    pub fn store(&self, copy: &Path) -> io::Result<()> {
        let path = record_path(copy);
        let folder = path.parent().unwrap_or(Path::new("."));
        let mut file = tempfile::Builder::new()
            .prefix(".durovfs-copy-")
            .tempfile_in(folder)?;
        file.write_all(&self.to_bytes()?)?;
        file.persist(path)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use durovfs_wire::entry::Origin;
    use durovfs_wire::{ClientId, CommitHeader, Epoch, Lsn, PageSize, Timestamp};

    fn record() -> CopyRecord {
        let commit = CommitHeader {
            origin: Origin {
                client: ClientId::from_bytes([2; 16]),
                sequence: 3,
            },
            time: Timestamp::from_micros(4),
            base_lsn: Lsn::new(1),
            page_size: PageSize::try_from(4096).unwrap(),
            page_count: 7,
            slot_count: 2,
            checksum: DatabaseChecksum::from_u64(u64::MAX),
            whole_image: false,
        };
        let stand = |lsn| Stand {
            summary: TransactionSummary {
                position: LogPosition::new(Epoch::new(2), Lsn::new(lsn)),
                commit,
            },
            format: [1, 1],
            absent: AbsentPages::default(),
        };
        CopyRecord {
            database: DatabaseId::from_bytes([9; 16]),
            at: Some(stand(5)),
            next: Some(stand(8)),
        }
    }

    #[test]
    fn what_was_written_is_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let copy = folder.path().join("app.db");
        assert_eq!(CopyRecord::load(&copy).unwrap(), None);
        record().store(&copy).unwrap();
        assert_eq!(CopyRecord::load(&copy).unwrap(), Some(record()));
    }

    #[test]
    fn no_damaged_record_is_believed() {
        // Broken: a copy would pass for one of another position.
        let whole = record().to_bytes().unwrap();
        assert_eq!(CopyRecord::parse(&whole), Some(record()));
        for length in 0..whole.len() {
            assert_eq!(CopyRecord::parse(&whole[..length]), None, "cut at {length}");
        }
        for index in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[index] ^= 1;
            let parsed = CopyRecord::parse(&bytes);
            // The checksum's hex digits may be written in capitals.
            assert!(parsed.is_none() || parsed == Some(record()), "byte {index}");
        }
    }

    #[test]
    fn no_record_with_absent_pages_that_cannot_be_is_believed() {
        // Broken: the pages with an image would be counted below zero, and a node would panic.
        for (absent, is_sound) in [
            ("[[1,1],[3,7]]", true),
            ("[[0,2]]", false),
            ("[[0,4294967295]]", false),
            ("[[5,8]]", false),
            ("[[6,5]]", false),
            ("[[3,4],[2,6]]", false),
        ] {
            let mut body: serde_json::Value = serde_json::to_value(record()).unwrap();
            body["at"]["absent"] = serde_json::from_str(absent).unwrap();
            let body = body.to_string();
            let crc = crc32fast::hash(body.as_bytes());
            let parsed = CopyRecord::parse(format!("{MAGIC}{crc:08x}\n{body}").as_bytes());
            assert_eq!(parsed.is_some(), is_sound, "{absent}");
        }
    }
}
