//! What a log's archive holds, commit by commit: read from the tails of its chunks.
//!
//! Indexes are read when they are needed, and few at a time; nothing is kept between calls.

use crate::chunk::{ChunkError, ChunkIndex, EntryFacts, FOOTER_BYTES, Footer};
use crate::listing::{ChunkObject, Listing, SnapshotObject};
use crate::restore::{PlanError, RestoreError, plan};
use crate::store::Store;
use crate::when::{When, format_time};
use durovfs_wire::entry::TransactionSummary;
use durovfs_wire::{Bookmark, LogPosition, Lsn, Timestamp};
use futures_util::stream::{self, StreamExt, TryStreamExt};
use std::fmt;
use std::sync::Arc;

/// Indexes that are read at once.
const PARALLEL_READS: usize = 8;
/// Most transactions in one answer: what a person or a script asks for at once, in 200 MB.
const MAX_TRANSACTIONS_LISTED: usize = 1_000_000;
/// Bytes of a chunk's tail that are read first: footer and, for most chunks, the whole index.
const TAIL_BYTES: u64 = 64 << 10;

/// A log's archive, opened by its listing.
#[derive(Debug, Clone)]
pub struct ArchiveIndex {
    store: Arc<dyn Store>,
    listing: Listing,
}

/// What an archive covers.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Covered {
    /// First and last commit; none when there is none.
    pub commits: Option<Box<(TransactionSummary, TransactionSummary)>>,
}

impl Covered {
    fn from_to(first: Option<TransactionSummary>, last: Option<TransactionSummary>) -> Self {
        Self {
            commits: first.zip(last).map(Box::new),
        }
    }
}

impl fmt::Display for Covered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some((first, last)) = self.commits.as_deref().copied() else {
            return f.write_str("no commit");
        };
        let words = |summary: TransactionSummary| {
            let bookmark = Bookmark::from(summary.position);
            format!("{} (bookmark {bookmark})", format_time(summary.commit.time))
        };
        write!(f, "{} to {}", words(first), words(last))
    }
}

impl ArchiveIndex {
    /// The archive of a log whose listing is known.
    pub fn of(store: &Arc<dyn Store>, listing: Listing) -> Self {
        Self {
            store: Arc::clone(store),
            listing,
        }
    }

    /// The listing.
    pub fn listing(&self) -> &Listing {
        &self.listing
    }

    /// The index of one chunk.
    ///
    /// # Errors
    /// When the store fails, or the chunk is damaged.
    pub async fn chunk_index(&self, chunk: &ChunkObject) -> Result<ChunkIndex, RestoreError> {
        let ChunkObject { range, key, size } = chunk;
        let last = range.last_position();
        read_index(self.store.as_ref(), key, *size, range.first_lsn, last).await
    }

    /// The transactions from `from` to `to`, both included, in order. `from` in the middle of
    /// nothing begins with the next one; what is not archived is not there.
    ///
    /// # Errors
    /// When the store fails, a chunk is damaged, or the chunks between leave a gap.
    pub async fn transactions(
        &self,
        from: Option<When>,
        to: Option<When>,
    ) -> Result<Vec<EntryFacts>, RestoreError> {
        let chunks = self.chunks_between(from, to)?;
        let reads = chunks.iter().map(|chunk| self.chunk_index(chunk));
        let mut indexes = std::pin::pin!(stream::iter(reads).buffered(PARALLEL_READS));
        let mut found = Vec::new();
        let mut next = Lsn::ZERO;
        while let Some(index) = indexes.try_next().await? {
            for facts in index.entries {
                // Chunks may overlap.
                if facts.position.lsn < next {
                    continue;
                }
                next = facts.position.lsn.next();
                let wanted = from.is_none_or(|from| !is_before(&facts, from))
                    && to.is_none_or(|to| !is_after(&facts, to));
                if facts.transaction().is_some() && wanted {
                    found.push(facts);
                }
            }
            if found.len() > MAX_TRANSACTIONS_LISTED {
                let limit = MAX_TRANSACTIONS_LISTED;
                return Err(RestoreError::TooMany { limit });
            }
        }
        Ok(found)
    }

    /// The last transaction at or before a moment; none when that is before the first.
    ///
    /// # Errors
    /// When the store fails, a chunk is damaged, or the chunks before leave a gap.
    pub async fn last_at(&self, when: When) -> Result<Option<TransactionSummary>, RestoreError> {
        let chunks = self.chunks_between(None, Some(when))?;
        for chunk in chunks.iter().rev() {
            let index = self.chunk_index(chunk).await?;
            let last = index
                .entries
                .iter()
                .rev()
                .filter(|facts| !is_after(facts, when))
                .find_map(EntryFacts::transaction);
            if last.is_some() {
                return Ok(last);
            }
        }
        Ok(None)
    }

    /// The last transaction at or below an entry: none when the log has none there.
    ///
    /// # Errors
    /// When the store fails, a chunk is damaged, or the archive does not hold all that is needed to
    /// tell.
    pub async fn last_through(
        &self,
        through_lsn: Lsn,
    ) -> Result<Option<TransactionSummary>, RestoreError> {
        let archived_lsn = self.listing.archived_lsn();
        if archived_lsn < through_lsn {
            let error = PlanError::BeyondEnd { last: archived_lsn };
            return Err(error.into_restore_error(&self.listing));
        }
        let in_chunks = self.last_at(When::Lsn(through_lsn)).await?;
        let mut snapshots = self.listing.snapshots.iter().rev();
        let in_snapshot = match snapshots.find(|snapshot| snapshot.point.lsn <= through_lsn) {
            Some(snapshot) => self.snapshot_transaction(snapshot).await?,
            None => None,
        };
        // Chunks before a snapshot may be gone already, or not yet.
        let found = in_chunks.into_iter().chain(in_snapshot);
        let last = found.max_by_key(|summary| summary.position.lsn);
        if last.is_none() && !self.begins_log() {
            return Err(PlanError::BeforeFirst.into_restore_error(&self.listing));
        }
        Ok(last)
    }

    /// Whether nothing was dropped from the beginning.
    fn begins_log(&self) -> bool {
        let first = self.listing.chunks.first();
        first.is_some_and(|chunk| chunk.range.first_lsn == Lsn::new(1))
    }

    /// First and last commit that can be restored.
    ///
    /// # Errors
    /// When the store fails, or a chunk is damaged.
    pub async fn covered(&self) -> Result<Covered, RestoreError> {
        let newest = match self.listing.snapshots.last() {
            Some(snapshot) => self.snapshot_transaction(snapshot).await?,
            None => None,
        };
        let last = self.last_at(When::Latest).await?.or(newest);
        let begins_log = self.begins_log();
        let oldest = self.listing.snapshots.first().filter(|_| !begins_log);
        if let Some(snapshot) = oldest {
            let first = self.snapshot_transaction(snapshot).await?;
            return Ok(Covered::from_to(first, last));
        }
        for chunk in &self.listing.chunks {
            let index = self.chunk_index(chunk).await?;
            let mut transactions = index.entries.iter().filter_map(EntryFacts::transaction);
            // In the middle of a log only a whole image can be a beginning.
            let first = transactions.find(|found| begins_log || found.commit.whole_image);
            if first.is_some() {
                return Ok(Covered::from_to(first, last));
            }
        }
        Ok(Covered::default())
    }

    async fn snapshot_transaction(
        &self,
        snapshot: &SnapshotObject,
    ) -> Result<Option<TransactionSummary>, RestoreError> {
        let SnapshotObject { point, key, size } = snapshot;
        let (first, last) = (point.lsn, point.position());
        let index = read_index(self.store.as_ref(), key, *size, first, last).await?;
        Ok(index.entries.first().and_then(EntryFacts::transaction))
    }

    /// The chunks that hold the entries between two moments, without a gap, in order.
    fn chunks_between(
        &self,
        from: Option<When>,
        to: Option<When>,
    ) -> Result<Vec<ChunkObject>, RestoreError> {
        // Without snapshots a plan has all chunks up to the target.
        let bare = Listing {
            snapshots: Vec::new(),
            ..self.listing.clone()
        };
        let to = match to {
            None | Some(When::Latest) => When::Latest,
            Some(when) => when,
        };
        let planned = match plan(&bare, to) {
            Ok(plan) => plan.chunks,
            // All that there is lies before the moment.
            Err(PlanError::BeyondEnd { .. }) => match plan(&bare, When::Latest) {
                Ok(plan) => plan.chunks,
                Err(error) => return Err(error.into_restore_error(&self.listing)),
            },
            Err(PlanError::BeforeFirst) => Vec::new(),
            Err(error @ PlanError::Gap { .. }) => {
                return Err(error.into_restore_error(&self.listing));
            }
        };
        let ends_before = |chunk: &ChunkObject| match from {
            None => false,
            Some(When::Latest) => false,
            Some(When::Time(time)) => chunk.range.last_time < time,
            Some(When::Lsn(lsn)) => chunk.range.last_lsn < lsn,
            Some(When::Bookmark(bookmark)) => chunk.range.last_lsn < bookmark.lsn,
        };
        Ok(planned
            .into_iter()
            .filter(|chunk| !ends_before(chunk))
            .collect())
    }

    /// Time of the newest archived entry.
    pub fn last_time(&self) -> Option<Timestamp> {
        self.listing.last_time()
    }
}

fn is_before(facts: &EntryFacts, when: When) -> bool {
    match when {
        When::Latest => true,
        When::Time(time) => facts.time < time,
        When::Lsn(lsn) => facts.position.lsn < lsn,
        When::Bookmark(bookmark) => facts.position.lsn < bookmark.lsn,
    }
}

fn is_after(facts: &EntryFacts, when: When) -> bool {
    match when {
        When::Latest => false,
        When::Time(time) => facts.time > time,
        When::Lsn(lsn) => facts.position.lsn > lsn,
        When::Bookmark(bookmark) => facts.position.lsn > bookmark.lsn,
    }
}

/// Reads footer and index from the end of an object, in one request if they are small.
async fn read_index(
    store: &dyn Store,
    key: &str,
    size: u64,
    first_lsn: Lsn,
    last: LogPosition,
) -> Result<ChunkIndex, RestoreError> {
    let damaged = |error| RestoreError::in_object(key, error);
    let tail_bytes = TAIL_BYTES.min(size);
    let tail_start = size - tail_bytes;
    let tail = store.get_range(key, tail_start, tail_bytes).await?;
    let Some((index_part, footer)) = tail.split_last_chunk::<FOOTER_BYTES>() else {
        return Err(damaged(ChunkError::Damaged(
            "object is shorter than a chunk can be",
        )));
    };
    let footer = Footer::decode(footer, size).map_err(damaged)?;
    if footer.first_lsn != first_lsn || footer.last_position != last {
        return Err(damaged(ChunkError::Damaged(
            "object holds other entries than its key says",
        )));
    }
    match footer.index_offset.checked_sub(tail_start) {
        // Within the tail: the footer was checked against the object's length.
        Some(start) => {
            let stored = index_part.get(start as usize..).unwrap_or_default();
            ChunkIndex::decode(footer, stored).map_err(damaged)
        }
        None => {
            let length = size - FOOTER_BYTES as u64 - footer.index_offset;
            let stored = store.get_range(key, footer.index_offset, length).await?;
            ChunkIndex::decode(footer, &stored).map_err(damaged)
        }
    }
}
