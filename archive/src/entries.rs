//! The log's entries read back out of the archive, for those whom a journal has no more to give.
//!
//! Goes on from a position, either entry by entry or from a snapshot on, whichever is less to
//! download; a snapshot comes as the transaction that it is, with the whole image. One object at a
//! time is on the local disk beside the next, one part at a time in memory.

use crate::chunk::{ChunkError, ChunkReader, LogIdentity};
use crate::index::ArchiveIndex;
use crate::listing::{ChunkObject, Listing, SnapshotObject};
use crate::restore::{RestoreError, blocking, download};
use crate::store::Store;
use durovfs_wire::entry::TransactionSummary;
use durovfs_wire::{EntryPart, LogPosition, Lsn};
use futures_util::stream::{self, StreamExt};
use std::path::Path;
use std::sync::Arc;
use tokio::sync::mpsc;

/// Objects on the local disk at once: one that is read, one that is downloaded meanwhile.
const PARALLEL_DOWNLOADS: usize = 2;

/// Which objects hold the entries after a position.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EntryPlan {
    identity: LogIdentity,
    /// Where to begin; without one, with the entry that was asked for.
    snapshot: Option<SnapshotObject>,
    /// What follows, without a gap; neighbours may overlap.
    chunks: Vec<ChunkObject>,
    first_lsn: Lsn,
}

/// Plans a reading from `first_lsn` on that leads at least through `through_lsn`; none when the
/// archive does not lead there without a gap.
pub fn plan(listing: &Listing, first_lsn: Lsn, through_lsn: Lsn) -> Option<EntryPlan> {
    let cover = |first_lsn| cover(listing, first_lsn, through_lsn);
    let bytes = |chunks: &[ChunkObject]| chunks.iter().map(|chunk| chunk.size).sum::<u64>();
    let plain = cover(first_lsn).map(|chunks| (bytes(&chunks), None, chunks));
    let newest = listing.snapshots.last();
    let imaged = newest
        .filter(|snapshot| snapshot.point.lsn >= first_lsn)
        .and_then(|snapshot| {
            let chunks = cover(snapshot.point.lsn.next())?;
            Some((bytes(&chunks) + snapshot.size, Some(snapshot), chunks))
        });
    // Of equal cost the entries themselves: the file that they are for need not be replaced.
    let (_, snapshot, chunks) = [plain, imaged]
        .into_iter()
        .flatten()
        .min_by_key(|(bytes, ..)| *bytes)?;
    Some(EntryPlan {
        identity: LogIdentity {
            database: listing.database,
            name: listing.name.clone(),
        },
        snapshot: snapshot.cloned(),
        chunks,
        first_lsn,
    })
}

/// The chunks that hold a range without a gap; none when there is one.
fn cover(listing: &Listing, first_lsn: Lsn, through_lsn: Lsn) -> Option<Vec<ChunkObject>> {
    let mut chunks: Vec<ChunkObject> = Vec::new();
    let mut reached = first_lsn.previous().unwrap_or(Lsn::ZERO);
    for chunk in listing.cover_from(first_lsn) {
        if reached >= through_lsn {
            break;
        }
        reached = chunk.range.last_lsn;
        chunks.push(chunk.clone());
    }
    (reached >= through_lsn).then_some(chunks)
}

/// Finds a transaction among the entries of a range. None when the archive does not hold all of
/// them, so that nothing follows from its not being found.
///
/// # Errors
/// When the store fails, or an index is damaged.
pub async fn find(
    store: &Arc<dyn Store>,
    listing: Listing,
    (first_lsn, through_lsn): (Lsn, Lsn),
    wanted: impl Fn(&TransactionSummary) -> bool,
) -> Result<Option<Option<TransactionSummary>>, RestoreError> {
    let Some(chunks) = cover(&listing, first_lsn, through_lsn) else {
        return Ok(None);
    };
    let index = ArchiveIndex::of(store, listing);
    for chunk in chunks {
        let entries = index.chunk_index(&chunk).await?.entries;
        let mut found = entries.iter().filter_map(|facts| facts.transaction());
        if let Some(found) = found.find(|summary| wanted(summary)) {
            return Ok(Some(Some(found)));
        }
    }
    Ok(Some(None))
}

/// Reads what was planned and hands it over part by part, in order. Returns the last entry; zero
/// when there was none. Ends early, with success, when nobody receives any more.
///
/// # Errors
/// When the store or the local disk fails, or an object is damaged, of another log, or does not
/// follow the one before.
pub async fn read(
    store: &Arc<dyn Store>,
    plan: &EntryPlan,
    scratch: &Path,
    sink: &mpsc::Sender<EntryPart>,
) -> Result<LogPosition, RestoreError> {
    let snapshot = plan.snapshot.iter().map(|s| (&s.key, s.size));
    let chunks = plan.chunks.iter().map(|chunk| (&chunk.key, chunk.size));
    let downloads = snapshot.chain(chunks).map(|(key, size)| async move {
        let file = download(store.as_ref(), key, size, scratch, &|_| ()).await;
        (key, file)
    });
    let mut downloads = std::pin::pin!(stream::iter(downloads).buffered(PARALLEL_DOWNLOADS));
    let begin = plan.first_lsn.previous().unwrap_or(Lsn::ZERO);
    let mut cursor = Cursor {
        last: LogPosition::new(durovfs_wire::Epoch::ZERO, begin),
        at_snapshot: plan.snapshot.is_some(),
    };
    while let Some((key, file)) = downloads.next().await {
        let (file, key, identity) = (file?, key.clone(), plan.identity.clone());
        let receiver = sink.clone();
        cursor = blocking(move || {
            let damaged = |error| RestoreError::in_object(&key, error);
            let mut chunk = ChunkReader::open(file).map_err(damaged)?;
            if *chunk.identity() != identity {
                let found = chunk.identity();
                let reason = format!("is of log {} of {:?}", found.database, found.name);
                return Err(RestoreError::Damaged {
                    object: key,
                    reason,
                });
            }
            cursor.hand_over(&mut chunk, &receiver).map_err(damaged)
        })
        .await?;
        if sink.is_closed() {
            break;
        }
    }
    Ok(cursor.last)
}

/// The transactions among the entries that hold `first_lsn` to `through_lsn`, without their pages.
/// What the archive has dropped since is left out, so that the first may come later.
///
/// # Errors
/// When the store fails, or an index is damaged.
pub async fn summaries(
    store: &Arc<dyn Store>,
    listing: Listing,
    first_lsn: Lsn,
    through_lsn: Lsn,
    sink: &mpsc::Sender<TransactionSummary>,
) -> Result<Lsn, RestoreError> {
    let oldest = listing.chunks.first().map(|chunk| chunk.range.first_lsn);
    let mut next = oldest.map_or(first_lsn, |oldest| oldest.max(first_lsn));
    let chunks: Vec<ChunkObject> = listing.cover_from(next).cloned().collect();
    let index = ArchiveIndex::of(store, listing);
    for chunk in chunks {
        if next > through_lsn {
            break;
        }
        for facts in index.chunk_index(&chunk).await?.entries {
            // Neighbours may overlap.
            if facts.position.lsn < next {
                continue;
            }
            next = facts.position.lsn.next();
            if let Some(summary) = facts.transaction()
                && sink.send(summary).await.is_err()
            {
                return Ok(next);
            }
        }
    }
    Ok(next)
}

/// How far a reading has come.
#[derive(Debug, Clone, Copy)]
struct Cursor {
    last: LogPosition,
    /// The next object is the snapshot, which may begin anywhere.
    at_snapshot: bool,
}

impl Cursor {
    fn hand_over(
        mut self,
        chunk: &mut ChunkReader,
        sink: &mpsc::Sender<EntryPart>,
    ) -> Result<Self, ChunkError> {
        for facts in chunk.index().entries.clone() {
            let LogPosition { lsn, epoch } = facts.position;
            if lsn <= self.last.lsn {
                continue; // neighbours may overlap
            }
            let follows = self.at_snapshot || lsn == self.last.lsn.next();
            if !follows || epoch < self.last.epoch {
                return Err(ChunkError::OutOfOrder {
                    previous: self.last,
                    got: facts.position,
                });
            }
            let sent = chunk.read_parts(&facts, |part| {
                let sent = sink.blocking_send(part);
                sent.map_err(|_| std::io::Error::from(std::io::ErrorKind::BrokenPipe))
            });
            match sent {
                Ok(()) => {}
                // Nobody wants more.
                Err(_) if sink.is_closed() => return Ok(self),
                Err(error) => return Err(error),
            }
            self.last = facts.position;
        }
        self.at_snapshot = false;
        Ok(self)
    }
}

#[cfg(test)]
mod tests;
