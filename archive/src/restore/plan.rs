//! Which objects a restore needs: a pure function of the listing and the moment.

use super::RestoreError;
use crate::chunk::LogIdentity;
use crate::index::Covered;
use crate::listing::{ChunkObject, Listing, SnapshotObject};
use crate::when::{When, format_time};
use durovfs_wire::{LogPosition, Lsn};

/// What to download, in order, and where to stop.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// The log.
    pub identity: LogIdentity,
    /// The moment.
    pub target: When,
    /// Where to begin; without one, with an empty file.
    pub snapshot: Option<SnapshotObject>,
    /// The chunks to apply, in order. Neighbours may overlap, but leave no gap.
    pub chunks: Vec<ChunkObject>,
    /// Positions that all keys of the log name: an entry that is met there must have that epoch.
    pub known: Vec<LogPosition>,
    /// Bytes to download.
    pub download_bytes: u64,
}

/// Why the listing has no way to the target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PlanError {
    /// The target lies before all that the archive has.
    BeforeFirst,
    /// The archive ends before the target.
    BeyondEnd {
        /// Last entry.
        last: Lsn,
    },
    /// Entries before the target are missing.
    Gap {
        /// First missing entry.
        first: Lsn,
        /// Last missing entry.
        last: Lsn,
    },
}

impl PlanError {
    pub(crate) fn into_restore_error(self, listing: &Listing) -> RestoreError {
        let what = match self {
            Self::BeforeFirst => "no commit that early".to_owned(),
            Self::BeyondEnd { last } => format!("no commit that late (the last lsn is {last})"),
            Self::Gap { first, last } => {
                return RestoreError::Damaged {
                    object: format!("archive of {}", listing.name),
                    reason: format!("chunks with lsn {first} to {last} are missing"),
                };
            }
        };
        RestoreError::NotCovered {
            what,
            name: listing.name.clone(),
            covered: Covered::default(),
        }
    }
}

/// Plans a restore: the newest snapshot that is not after the target, then the chunks up to it.
///
/// A time may turn out to lie before the first commit only when chunks are read; then executing
/// the plan says so.
///
/// # Errors
/// When the target is not covered, or the chain of chunks has a gap before it.
pub fn plan(listing: &Listing, target: When) -> Result<Plan, PlanError> {
    let ceiling = match target {
        When::Lsn(lsn) => Some(lsn),
        When::Bookmark(bookmark) => Some(bookmark.lsn),
        When::Latest | When::Time(_) => None,
    };
    let snapshot = listing
        .snapshots
        .iter()
        .rev()
        .find(|snapshot| match target {
            When::Time(time) => snapshot.point.time <= time,
            _ => ceiling.is_none_or(|ceiling| snapshot.point.lsn <= ceiling),
        });
    let start = snapshot
        .map(|snapshot| snapshot.point.lsn.next())
        .or_else(|| listing.chunks.first().map(|chunk| chunk.range.first_lsn))
        .ok_or(PlanError::BeforeFirst)?;
    if ceiling.is_some_and(|ceiling| snapshot.is_none() && ceiling < start) {
        return Err(PlanError::BeforeFirst);
    }
    let chunks = chain(listing, start, ceiling, target)?;
    let reached = chunks.last().map(|chunk| chunk.range.last_lsn);
    let last = reached
        .or(snapshot.map(|snapshot| snapshot.point.lsn))
        .unwrap_or(Lsn::ZERO);
    if ceiling.is_some_and(|ceiling| last < ceiling) {
        return Err(PlanError::BeyondEnd { last });
    }
    let download_bytes = chunks.iter().map(|chunk| chunk.size).sum::<u64>()
        + snapshot.map_or(0, |snapshot| snapshot.size);
    Ok(Plan {
        identity: LogIdentity {
            database: listing.database,
            name: listing.name.clone(),
        },
        target,
        snapshot: snapshot.cloned(),
        chunks,
        known: known_positions(listing),
        download_bytes,
    })
}

fn chain(
    listing: &Listing,
    start: Lsn,
    ceiling: Option<Lsn>,
    target: When,
) -> Result<Vec<ChunkObject>, PlanError> {
    let mut chunks: Vec<ChunkObject> = Vec::new();
    let mut next = start;
    let reached = |next: Lsn, last: Option<&ChunkObject>| match (target, last) {
        (When::Time(time), Some(last)) => last.range.last_time > time,
        _ => ceiling.is_some_and(|ceiling| next > ceiling),
    };
    for chunk in listing.cover_from(start) {
        if reached(next, chunks.last()) {
            return Ok(chunks);
        }
        chunks.push(chunk.clone());
        next = chunk.range.last_lsn.next();
    }
    if reached(next, chunks.last()) {
        return Ok(chunks);
    }
    // What comes after the gap, if anything: then what is missing may hold the target.
    let chunk = listing.chunks.iter().map(|chunk| chunk.range.first_lsn);
    let snapshot = listing
        .snapshots
        .iter()
        .map(|snapshot| snapshot.point.lsn.next());
    let after = chunk.chain(snapshot).filter(|lsn| *lsn > next).min();
    match after.and_then(Lsn::previous) {
        Some(last) => Err(PlanError::Gap { first: next, last }),
        None => Ok(chunks),
    }
}

fn known_positions(listing: &Listing) -> Vec<LogPosition> {
    let chunks = listing
        .chunks
        .iter()
        .map(|chunk| chunk.range.last_position());
    let snapshots = listing
        .snapshots
        .iter()
        .map(|snapshot| snapshot.point.position());
    let mut known: Vec<_> = chunks.chain(snapshots).collect();
    known.sort_by_key(|position| (position.lsn, position.epoch));
    known.dedup();
    known
}

/// The target in words, for messages.
pub(super) fn describe(target: When) -> String {
    match target {
        When::Latest => "latest".into(),
        When::Time(time) => format_time(time),
        When::Bookmark(bookmark) => format!("bookmark {bookmark}"),
        When::Lsn(lsn) => format!("lsn {lsn}"),
    }
}
