//! Keeping an archive small: old history goes, small chunks become larger ones.
//!
//! What to do is a pure function of the listing; when, the caller knows. At every moment of either
//! work, whatever fails, all that is to be kept can be restored.

use crate::chunk::{ChunkError, ChunkReader, ChunkWriter, LogIdentity, MAX_ENTRIES};
use crate::listing::{ChunkObject, Listing};
use crate::restore::{RestoreError, blocking, download};
use crate::snapshot::SnapshotError;
use crate::store::Store;
use crate::uploader::{Uploaded, upload};
use durovfs_wire::{Lsn, Timestamp};
use std::path::Path;
use std::sync::Arc;

/// Chunks are merged up to this size: what is downloaded in a few requests, and a merge can hold
/// on a small disk.
const MAX_MERGED_BYTES: u64 = 64 << 20;
/// A chunk above this size is left as it is: it is worth its requests, and entries would be copied
/// again and again.
const MAX_SMALL_BYTES: u64 = 4 << 20;
/// Fewer chunks than this are not worth a merge: each entry would be copied too often.
const MIN_MERGED_CHUNKS: usize = 16;
/// Most chunks in one merge: an hour of one every ten seconds, and bounds its requests.
const MAX_MERGED_CHUNKS: usize = 512;

/// Keys of what only serves moments before `horizon`, in the order in which they may be deleted:
/// all before the newest snapshot that is not after it. Without such a snapshot, nothing.
pub fn expired(listing: &Listing, horizon: Timestamp) -> Vec<String> {
    let Some(base) = listing
        .snapshots
        .iter()
        .rev()
        .find(|found| found.point.time <= horizon)
    else {
        return Vec::new();
    };
    // Older snapshots first: one whose chunks are gone would look like a hole in the history.
    let older = listing
        .snapshots
        .iter()
        .filter(|found| found.point.lsn < base.point.lsn);
    let before = listing
        .chunks
        .iter()
        .filter(|chunk| chunk.range.last_lsn <= base.point.lsn);
    older
        .map(|found| &found.key)
        .chain(before.map(|chunk| &chunk.key))
        .cloned()
        .collect()
}

/// The oldest run of neighbouring chunks that should become one, all of them with entries before
/// `before` only, so that the newest part of the log is left to its uploader.
pub fn mergeable(listing: &Listing, before: Timestamp) -> Option<Vec<ChunkObject>> {
    let first = listing.chunks.first()?.range.first_lsn;
    let mut run: Vec<ChunkObject> = Vec::new();
    let mut bytes = 0;
    for chunk in listing.cover_from(first) {
        if chunk.range.last_time >= before {
            break;
        }
        let start = run
            .first()
            .map_or(chunk.range.first_lsn, |first| first.range.first_lsn);
        let entries = chunk.range.last_lsn.get() - start.get() + 1;
        let small = chunk.size <= MAX_SMALL_BYTES;
        let fits = small
            && bytes + chunk.size <= MAX_MERGED_BYTES
            && run.len() < MAX_MERGED_CHUNKS
            && entries <= MAX_ENTRIES as u64;
        if !fits {
            if run.len() >= MIN_MERGED_CHUNKS {
                break;
            }
            run.clear();
            bytes = 0;
        }
        if !small {
            continue;
        }
        bytes += chunk.size;
        run.push(chunk.clone());
    }
    (run.len() >= MIN_MERGED_CHUNKS).then_some(run)
}

/// Makes one chunk of a run that [`mergeable`] gave, and then deletes all that it replaces. A
/// restore that was planned before and runs on may miss them, and must be started again.
///
/// # Errors
/// When a chunk is damaged, the chunks do not follow each other, or the store fails. Nothing is
/// deleted then that is not in the new chunk.
pub async fn merge(
    store: &Arc<dyn Store>,
    listing: &Listing,
    run: &[ChunkObject],
    scratch: &Path,
) -> Result<Uploaded, SnapshotError> {
    let identity = LogIdentity {
        database: listing.database,
        name: listing.name.clone(),
    };
    let mut writer = ChunkWriter::create(scratch, &identity)?;
    let mut next = Lsn::ZERO;
    for chunk in run {
        let file = download(store.as_ref(), &chunk.key, chunk.size, scratch, &|_| ()).await?;
        let (key, expected) = (chunk.key.clone(), identity.clone());
        (writer, next) = blocking(move || {
            let copied = copy_entries(file, &expected, &mut writer, next);
            let next = copied.map_err(|error| RestoreError::in_object(&key, error))?;
            Ok((writer, next))
        })
        .await?;
    }
    let sealed = blocking(move || {
        writer
            .finish()
            .map_err(|error| RestoreError::in_object("merged chunk", error))
    })
    .await?;
    let uploaded = upload(store, &sealed, scratch).await?;
    let replaced: Vec<_> = listing
        .chunks
        .iter()
        .filter(|chunk| {
            chunk.key != uploaded.key
                && chunk.range.first_lsn >= uploaded.range.first_lsn
                && chunk.range.last_lsn <= uploaded.range.last_lsn
        })
        .map(|chunk| chunk.key.clone())
        .collect();
    store.delete(&replaced).await.map_err(RestoreError::from)?;
    Ok(uploaded)
}

/// Copies the entries from `next` on; gives the one that follows them.
fn copy_entries(
    file: std::fs::File,
    identity: &LogIdentity,
    writer: &mut ChunkWriter,
    mut next: Lsn,
) -> Result<Lsn, ChunkError> {
    let mut chunk = ChunkReader::open(file)?;
    if chunk.identity() != identity {
        return Err(ChunkError::Damaged("object is of another log"));
    }
    // Copying reads every image, so damage is found; what is skipped was copied from another chunk.
    for facts in chunk.index().entries.clone() {
        if facts.position.lsn >= next {
            writer.copy(&mut chunk, &facts)?;
            next = facts.position.lsn.next();
        }
    }
    Ok(next)
}
