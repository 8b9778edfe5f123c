//! Recovery: what is in the segments, where the journal ends, and whether it was damaged.
//!
//! Records are read in order of their sequence until the first that is missing or bad. What comes
//! after it decides: if any good record or segment header there says that the bad one was durable
//! (`synced_through`), the journal is damaged and nothing is touched. Otherwise the bad one belongs
//! to a batch that was never synced, of which a disk may keep any part: it is cut off, and zeros
//! take its place before anything new is written.

use crate::disk::{Disk, DiskFile};
use crate::error::JournalError;
use crate::format::{
    ALIGNMENT, FORMAT_VERSION, HeaderError, RawRecord, SEGMENT_HEADER_BYTES, SegmentHeader,
    parse_segment_name,
};
use crate::record::Stored;
use crate::segments::{SPARE_NAME, Segment};
use crate::table::{Head, Location, Table};
use durovfs_wire::ids::DatabaseId;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Largest segment: recovery holds one in memory.
pub(crate) const SEGMENT_BYTES_MAX: u64 = 256 << 20;
/// Bytes zeroed at a time.
const ZERO_BLOCK_BYTES: usize = 4096;

/// What was found.
pub(crate) struct Recovered {
    pub tables: BTreeMap<DatabaseId, Table>,
    /// By first sequence.
    pub segments: BTreeMap<u64, Arc<Segment>>,
    /// Where the last segment's records end.
    pub offset: u64,
    pub next_sequence: u64,
    /// Highest sequence that a record or header says to be durable.
    pub announced: u64,
}

/// Reads the journal; cuts a torn end.
pub(crate) fn recover(disk: &dyn Disk) -> Result<Recovered, JournalError> {
    let names = disk
        .list()
        .map_err(|e| JournalError::io("list journal directory", &e))?;
    if names.iter().any(|name| name == SPARE_NAME) {
        disk.remove(SPARE_NAME)
            .map_err(|e| JournalError::io("remove spare", &e))?;
    }
    let mut sequences: Vec<u64> = names.iter().filter_map(|n| parse_segment_name(n)).collect();
    sequences.sort_unstable();
    let segments: Vec<Arc<Segment>> = sequences
        .iter()
        .map(|s| open_segment(disk, *s))
        .collect::<Result<_, _>>()?;
    let mut scan = Scan {
        tables: BTreeMap::new(),
        sequence: sequences.first().copied().unwrap_or(1),
        announced: 0,
    };
    let mut end = SEGMENT_HEADER_BYTES;
    let mut kept = 0;
    for (index, segment) in segments.iter().enumerate() {
        let next_first = segments
            .get(index + 1)
            .map(|next| next.header.first_sequence);
        let bytes = read_segment(segment)?;
        end = scan.segment(segment, &bytes, next_first, index == 0)?;
        kept = index + 1;
        if next_first != Some(scan.sequence) {
            check_end(&scan, &bytes, end, segment, &segments[kept..])?;
            cut(disk, &bytes, end, segment, &segments[kept..])?;
            break;
        }
    }
    check_held(&scan.tables, segments.first())?;
    let segments = segments
        .into_iter()
        .take(kept)
        .map(|s| (s.header.first_sequence, s))
        .collect();
    Ok(Recovered {
        tables: scan.tables,
        segments,
        offset: end,
        next_sequence: scan.sequence,
        announced: scan.announced,
    })
}

fn open_segment(disk: &dyn Disk, first_sequence: u64) -> Result<Arc<Segment>, JournalError> {
    let name = crate::format::segment_name(first_sequence);
    let failed = |e: &std::io::Error| JournalError::io(format!("open {name}"), e);
    let file = disk.open(&name).map_err(|e| failed(&e))?;
    let byte_count = file.byte_count().map_err(|e| failed(&e))?;
    if !(SEGMENT_HEADER_BYTES..=SEGMENT_BYTES_MAX).contains(&byte_count) {
        return Err(JournalError::damaged(
            &name,
            0,
            format!("file of {byte_count} bytes"),
        ));
    }
    let mut bytes = vec![0u8; SEGMENT_HEADER_BYTES as usize];
    file.read_at(&mut bytes, 0).map_err(|e| failed(&e))?;
    let header = SegmentHeader::decode(&bytes).map_err(|e| match e {
        HeaderError::UnsupportedVersion(got) => JournalError::UnsupportedVersion {
            segment: name.clone(),
            got,
            supported: FORMAT_VERSION,
        },
        HeaderError::BadMagic => JournalError::damaged(&name, 0, "no segment header"),
        HeaderError::ChecksumMismatch => JournalError::damaged(&name, 0, "header checksum"),
    })?;
    if header.first_sequence != first_sequence || header.segment_bytes > SEGMENT_BYTES_MAX {
        return Err(JournalError::damaged(
            &name,
            0,
            "header does not belong to the file",
        ));
    }
    Ok(Arc::new(Segment { name, header, file }))
}

fn read_segment(segment: &Segment) -> Result<Vec<u8>, JournalError> {
    let failed = |e: &std::io::Error| JournalError::io(format!("read {}", segment.name), e);
    let byte_count = segment.file.byte_count().map_err(|e| failed(&e))?;
    let mut bytes = vec![0u8; byte_count.min(SEGMENT_BYTES_MAX) as usize];
    segment
        .file
        .read_at(&mut bytes, 0)
        .map_err(|e| failed(&e))?;
    Ok(bytes)
}

/// Where reading has come.
struct Scan {
    tables: BTreeMap<DatabaseId, Table>,
    /// Of the next record.
    sequence: u64,
    announced: u64,
}

impl Scan {
    /// Reads the records of a segment as far as they follow; says where that is. What the next
    /// segment begins with was never acknowledged here: an earlier attempt to write it failed.
    fn segment(
        &mut self,
        segment: &Segment,
        bytes: &[u8],
        next_first: Option<u64>,
        oldest: bool,
    ) -> Result<u64, JournalError> {
        self.announced = self.announced.max(segment.header.synced_through);
        let mut offset = SEGMENT_HEADER_BYTES;
        while next_first != Some(self.sequence)
            && let Some(raw) = RawRecord::parse(&bytes[offset as usize..], segment.header.salt)
            && raw.sequence == self.sequence
        {
            let stored = raw.stored().ok_or_else(|| {
                JournalError::damaged(&segment.name, offset, "record of an unknown kind")
            })?;
            let location = Location {
                segment: segment.header.first_sequence,
                offset,
                bytes: raw.bytes as u32,
            };
            self.take(&stored, location, oldest)
                .map_err(|detail| JournalError::damaged(&segment.name, offset, detail))?;
            self.announced = self.announced.max(raw.synced_through);
            self.sequence += 1;
            offset += raw.bytes;
            if offset as usize > bytes.len() {
                // The padding of the last record is missing in a file that was cut.
                offset = bytes.len() as u64;
            }
        }
        Ok(offset)
    }

    fn take(&mut self, stored: &Stored, location: Location, oldest: bool) -> Result<(), String> {
        let Some(database) = stored.database() else {
            return Ok(());
        };
        if let Stored::State { state, pending } = stored {
            return self.take_state(state, *pending, stored, oldest);
        }
        let known = self.tables.get(&database);
        known
            .map_or_else(Head::unknown, Table::head)
            .admit(stored, known)?;
        self.tables
            .entry(database)
            .or_insert_with(|| Table::new(database))
            .apply(stored, location);
        Ok(())
    }

    /// A restated state introduces what the deleted segments held, or must agree with what was
    /// read so far.
    fn take_state(
        &mut self,
        state: &crate::record::DatabaseState,
        pending: Option<(durovfs_wire::LogPosition, u32)>,
        stored: &Stored,
        oldest: bool,
    ) -> Result<(), String> {
        let Some(table) = self.tables.get_mut(&state.database) else {
            if !oldest && state.commit_lsn != state.last.lsn {
                return Err("state of a database that was never mentioned before".to_owned());
            }
            let table = Table::from_state(state.clone(), pending);
            self.tables.insert(state.database, table);
            return Ok(());
        };
        let Stored::State {
            state: mut ours,
            pending: ours_pending,
        } = table.restated()
        else {
            return Ok(());
        };
        // What was dropped when the state was restated may have been read again here.
        ours.first_lsn = state.first_lsn;
        table.drop_through(state.first_lsn.previous().unwrap_or_default());
        if &ours != state || ours_pending != pending {
            return Err(format!(
                "restated state differs: stored {stored:?}, read {ours:?}"
            ));
        }
        Ok(())
    }
}

/// Damage, if anything after the end says that the record there was durable.
fn check_end(
    scan: &Scan,
    bytes: &[u8],
    end: u64,
    segment: &Segment,
    later: &[Arc<Segment>],
) -> Result<(), JournalError> {
    let mut synced_through = synced_through_after(bytes, end, segment, scan.sequence);
    for segment in later {
        let bytes = read_segment(segment)?;
        let records = synced_through_after(&bytes, SEGMENT_HEADER_BYTES, segment, scan.sequence);
        synced_through = synced_through
            .max(records)
            .max(segment.header.synced_through);
    }
    if synced_through >= scan.sequence {
        return Err(JournalError::damaged(
            &segment.name,
            end,
            format!(
                "record {} is missing or bad, but what follows says that all through record \
                 {synced_through} was on disk",
                scan.sequence
            ),
        ));
    }
    Ok(())
}

/// The highest `synced_through` of good records from `start` on whose sequence is at least `from`.
fn synced_through_after(bytes: &[u8], start: u64, segment: &Segment, from: u64) -> u64 {
    let mut highest = 0;
    let mut offset = (start.next_multiple_of(ALIGNMENT) as usize).min(bytes.len());
    while offset < bytes.len() {
        match RawRecord::parse(&bytes[offset..], segment.header.salt) {
            Some(raw) if raw.sequence >= from => {
                highest = highest.max(raw.synced_through);
                offset += raw.bytes as usize;
            }
            _ => offset += ALIGNMENT as usize,
        }
    }
    highest
}

/// Makes all after the end zeros, and removes the segments after it. In an order that a crash at
/// any point leaves a journal that is cut in the same place again.
fn cut(
    disk: &dyn Disk,
    bytes: &[u8],
    end: u64,
    segment: &Segment,
    later: &[Arc<Segment>],
) -> Result<(), JournalError> {
    for segment in later.iter().rev() {
        tracing::warn!(
            segment = segment.name,
            "removing a segment that was never synced"
        );
        disk.remove(&segment.name)
            .and_then(|()| disk.sync_directory())
            .map_err(|e| JournalError::io(format!("remove {}", segment.name), &e))?;
    }
    let tail = &bytes[end as usize..];
    let torn = tail.iter().any(|byte| *byte != 0);
    if torn {
        tracing::warn!(
            segment = segment.name,
            offset = end,
            "cutting a torn end of the journal"
        );
    }
    zero_tail(
        segment.file.as_ref(),
        tail,
        end,
        segment.header.segment_bytes,
    )
    .map_err(|e| JournalError::io(format!("cut {}", segment.name), &e))
}

fn zero_tail(
    file: &dyn DiskFile,
    tail: &[u8],
    end: u64,
    segment_bytes: u64,
) -> std::io::Result<()> {
    let zeros = [0u8; ZERO_BLOCK_BYTES];
    let mut offset = end;
    for block in tail.chunks(ZERO_BLOCK_BYTES) {
        if block.iter().any(|byte| *byte != 0) {
            file.write_at(&zeros[..block.len()], offset)?;
        }
        offset += block.len() as u64;
    }
    // A file that was cut short is made whole again.
    while offset < segment_bytes {
        let step = (segment_bytes - offset).min(ZERO_BLOCK_BYTES as u64);
        file.write_at(&zeros[..step as usize], offset)?;
        offset += step;
    }
    file.sync_data()
}

/// Entries that are not there must have been dropped, and only committed ones are.
fn check_held(
    tables: &BTreeMap<DatabaseId, Table>,
    oldest: Option<&Arc<Segment>>,
) -> Result<(), JournalError> {
    for table in tables.values() {
        let state = table.state();
        let missing = state.first_lsn.previous().unwrap_or_default();
        if missing > state.commit_lsn {
            let name = oldest.map_or("", |segment| segment.name.as_str());
            return Err(JournalError::damaged(
                name,
                0,
                format!(
                    "entries of database {} through lsn {missing} are missing, but only those \
                     through {} are committed",
                    state.database, state.commit_lsn
                ),
            ));
        }
    }
    Ok(())
}
