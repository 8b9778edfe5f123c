//! Recovery: what is in the segments, where the journal ends, and whether it was damaged.
//!
//! Records are read in order of their sequence until the first that is missing or bad. What comes
//! after it decides: if any good record or segment header there says that the bad one was durable
//! (`synced_through`), the journal is damaged: opening fails, or, where the caller wants to mend,
//! goes on behind the hole with what is left (`recovery/scan.rs`). Otherwise the bad one belongs to
//! a batch that was never synced, of which a disk may keep any part: it is cut off, and zeros take
//! its place before anything new is written.

mod scan;

use crate::disk::{Disk, DiskFile};
use crate::error::JournalError;
use crate::format::{
    ALIGNMENT, FORMAT_VERSION, HeaderError, RawRecord, SEGMENT_HEADER_BYTES, SegmentHeader,
    parse_segment_name,
};
use crate::segments::{SPARE_NAME, Segment};
use crate::table::Table;
use durovfs_wire::ids::DatabaseId;
use scan::{Holes, Scan};
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
    /// Damage that no segment says to be known.
    pub damages: Vec<JournalError>,
}

/// What recovery may do.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rules {
    /// Go on behind damage, with what is left.
    pub mend: bool,
    /// Promises are kept a second time, and must be known.
    pub keeps_promises: bool,
}

/// Reads the journal; cuts a torn end.
pub(crate) fn recover(disk: &dyn Disk, rules: Rules) -> Result<Recovered, JournalError> {
    let names = disk
        .list()
        .map_err(|e| JournalError::io("list journal directory", &e))?;
    if names.iter().any(|name| name == SPARE_NAME) {
        disk.remove(SPARE_NAME)
            .map_err(|e| JournalError::io("remove spare", &e))?;
    }
    let mut sequences: Vec<u64> = names.iter().filter_map(|n| parse_segment_name(n)).collect();
    sequences.sort_unstable();
    let files = Files::open(disk, &sequences, rules)?;
    let mut scan = Scan {
        tables: BTreeMap::new(),
        sequence: sequences.first().copied().unwrap_or(1),
        announced: 0,
        holes: Holes {
            mend: rules.mend,
            known_below: files.damage_known_below(),
            found: Vec::new(),
            suspected: Vec::new(),
            more: false,
            any: !files.unreadable.is_empty(),
            open: !files.unreadable.is_empty(),
            doubts: BTreeMap::new(),
        },
    };
    files.remove_known(disk, &mut scan.holes)?;
    let (end, kept) = read_segments(disk, &files, &mut scan)?;
    if let Some(last) = files.unreadable.keys().next_back().copied()
        && last >= scan.sequence
    {
        // How many records it had is not known: fewer than this.
        scan.pass_hole(last + SEGMENT_BYTES_MAX / ALIGNMENT);
    }
    scan.settle(disk, rules, files.segments.first())?;
    let segments = files.segments.iter().take(kept);
    Ok(Recovered {
        tables: scan.tables,
        segments: segments
            .map(|s| (s.header.first_sequence, s.clone()))
            .collect(),
        offset: end,
        next_sequence: scan.sequence,
        announced: scan.announced,
        damages: scan.holes.found,
    })
}

/// Reads all records. Says where those of the last segment end, and how many segments are kept.
fn read_segments(
    disk: &dyn Disk,
    files: &Files,
    scan: &mut Scan,
) -> Result<(u64, usize), JournalError> {
    let segments = &files.segments;
    let mut end = SEGMENT_HEADER_BYTES;
    let mut kept = 0;
    for (index, segment) in segments.iter().enumerate() {
        let next_first = segments.get(index + 1).map(|s| s.header.first_sequence);
        if segment.header.first_sequence > scan.sequence {
            // Of a segment before the first that can be read.
            scan.pass_hole(segment.header.first_sequence);
        }
        let bytes = read_segment(segment)?;
        end = scan.segment(
            segment,
            &bytes,
            SEGMENT_HEADER_BYTES,
            next_first,
            index == 0,
        )?;
        kept = index + 1;
        while next_first != Some(scan.sequence) {
            let later = &segments[kept..];
            let Some(damage) = files.damage_at(scan, &bytes, end, segment, later)? else {
                break;
            };
            scan.holes.note(scan.sequence, damage)?;
            let Some((offset, sequence)) =
                resume_at(&bytes, end, segment, scan.sequence, next_first)
            else {
                scan.pass_hole(next_first.unwrap_or(scan.sequence));
                break;
            };
            scan.pass_hole(sequence);
            end = scan.segment(segment, &bytes, offset, next_first, index == 0)?;
        }
        if next_first != Some(scan.sequence) {
            cut(disk, &bytes, end, segment, &segments[kept..])?;
            break;
        }
    }
    Ok((end, kept))
}

/// The segment files of a journal.
struct Files {
    segments: Vec<Arc<Segment>>,
    /// Segments whose header is damaged, by the first sequence that their name says.
    unreadable: BTreeMap<u64, JournalError>,
}

impl Files {
    fn open(disk: &dyn Disk, sequences: &[u64], rules: Rules) -> Result<Self, JournalError> {
        let mut files = Self {
            segments: Vec::new(),
            unreadable: BTreeMap::new(),
        };
        for first_sequence in sequences {
            match open_segment(disk, *first_sequence) {
                Ok(segment) => files.segments.push(segment),
                Err(damage @ JournalError::Damaged { .. }) => {
                    files.unreadable.insert(*first_sequence, damage);
                }
                Err(error) => return Err(error),
            }
        }
        let known_below = files.damage_known_below();
        let mut unreadable = files.unreadable.iter();
        match unreadable.find(|(first_sequence, _)| **first_sequence >= known_below) {
            Some((_, damage)) if !rules.mend => Err(damage.clone()),
            _ => Ok(files),
        }
    }

    fn damage_known_below(&self) -> u64 {
        let known = self.segments.iter().map(|s| s.header.damage_known_below);
        known.max().unwrap_or(0)
    }

    /// Unreadable segments of which it was reported before: nothing is left to be had from them.
    fn remove_known(&self, disk: &dyn Disk, holes: &mut Holes) -> Result<(), JournalError> {
        for (first_sequence, damage) in &self.unreadable {
            if *first_sequence >= holes.known_below {
                holes.found.push(damage.clone());
                continue;
            }
            let name = crate::format::segment_name(*first_sequence);
            disk.remove(&name)
                .map_err(|e| JournalError::io(format!("remove {name}"), &e))?;
        }
        Ok(())
    }

    /// What is wrong with the record at which reading stopped, if something says that it was
    /// durable or that the damage is known; else it was never synced.
    fn damage_at(
        &self,
        scan: &Scan,
        bytes: &[u8],
        end: u64,
        segment: &Segment,
        later: &[Arc<Segment>],
    ) -> Result<Option<JournalError>, JournalError> {
        let mut synced_through = synced_through_after(bytes, end, segment, scan.sequence);
        for segment in later {
            let bytes = read_segment(segment)?;
            let records =
                synced_through_after(&bytes, SEGMENT_HEADER_BYTES, segment, scan.sequence);
            let header = segment.header;
            let known = header.damage_known_below.saturating_sub(1);
            synced_through = synced_through
                .max(records)
                .max(header.synced_through)
                .max(known);
        }
        if let Some(unreadable) = self.unreadable.keys().next_back() {
            // A segment is begun when all before it is durable, and it was begun itself.
            synced_through = synced_through.max(*unreadable);
        }
        Ok((synced_through >= scan.sequence).then(|| {
            JournalError::damaged(
                &segment.name,
                end,
                format!(
                    "record {} is missing or bad, but what follows says that all through record \
                     {synced_through} was on disk",
                    scan.sequence
                ),
            )
        }))
    }
}

/// The next good record of this segment behind a bad one: its offset and sequence.
fn resume_at(
    bytes: &[u8],
    end: u64,
    segment: &Segment,
    bad: u64,
    next_first: Option<u64>,
) -> Option<(u64, u64)> {
    let mut offset = end.next_multiple_of(ALIGNMENT);
    while offset < bytes.len() as u64 {
        if let Some(raw) = RawRecord::parse(&bytes[offset as usize..], segment.header.salt)
            && raw.sequence > bad
            && next_first.is_none_or(|next| raw.sequence < next)
        {
            return Some((offset, raw.sequence));
        }
        offset += ALIGNMENT;
    }
    None
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

/// The highest `synced_through` of good records from `start` on whose sequence is at least `from`.
fn synced_through_after(bytes: &[u8], start: u64, segment: &Segment, from: u64) -> u64 {
    let mut highest = 0;
    let mut offset = start.next_multiple_of(ALIGNMENT) as usize;
    // No record begins in the zeros at the end, most of a segment that was begun lately.
    let used = used_bytes(bytes);
    while offset < used {
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

/// Where the zeros at the end begin, or a little later.
fn used_bytes(bytes: &[u8]) -> usize {
    let zeros = [0u8; ZERO_BLOCK_BYTES];
    let blocks = bytes.rchunks(ZERO_BLOCK_BYTES);
    // Block by block: byte by byte it would be most of the time that a start takes.
    let unused = blocks.take_while(|block| **block == zeros[..block.len()]);
    bytes.len() - unused.map(<[u8]>::len).sum::<usize>()
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
    if used_bytes(tail) > 0 {
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
        if *block != zeros[..block.len()] {
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
