//! Snapshots: whole images, made from the archive itself, so that each proves that a restore works.

use crate::chunk::{ChunkError, ChunkWriter, LogIdentity};
use crate::listing::Listing;
use crate::restore::{PlanError, RestoreError, blocking, build_image, local, plan};
use crate::store::Store;
use crate::uploader::{UploadError, Uploaded, upload};
use crate::when::When;
use durovfs_wire::Lsn;
use durovfs_wire::entry::TransactionSummary;
use std::path::Path;
use std::sync::Arc;

/// No snapshot is made for fewer chunk bytes than this: a restore reads them in a moment, and a
/// tiny database would be snapshotted with every chunk.
const MIN_CHUNK_BYTES: u64 = 4 << 20;
/// A snapshot is made after this many chunks, however small: each costs a restore a request.
const MAX_CHUNKS: usize = 512;

/// Why no snapshot was made.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The archive has no way to that entry.
    #[error("make a snapshot: {0}")]
    Restore(#[from] RestoreError),
    /// It could not be put into the store.
    #[error("make a snapshot: {0}")]
    Upload(#[from] UploadError),
}

impl From<ChunkError> for SnapshotError {
    fn from(error: ChunkError) -> Self {
        Self::Upload(error.into())
    }
}

/// Whether a snapshot is due, and of which entry: when the chunks since the last one add up to more
/// than the database of `database_bytes`, so that a restore downloads at most twice its size.
pub fn due(listing: &Listing, database_bytes: u64) -> Option<Lsn> {
    let last = listing
        .snapshots
        .last()
        .map_or(Lsn::ZERO, |snapshot| snapshot.point.lsn);
    let newer = || {
        listing
            .chunks
            .iter()
            .filter(|chunk| chunk.range.last_lsn > last)
    };
    let bytes: u64 = newer().map(|chunk| chunk.size).sum();
    let archived = listing.archived_lsn();
    let enough = bytes > database_bytes.max(MIN_CHUNK_BYTES) || newer().count() > MAX_CHUNKS;
    (enough && archived > last).then_some(archived)
}

/// Makes a snapshot of the last transaction at or before `lsn`, from the archive, and uploads it.
/// Temporary files in `scratch` take twice the database's size and that of four chunks.
///
/// # Errors
/// When the archive cannot be restored there, or the store fails.
pub async fn make(
    store: &Arc<dyn Store>,
    listing: &Listing,
    lsn: Lsn,
    scratch: &Path,
) -> Result<Uploaded, SnapshotError> {
    let planned = plan(listing, When::Lsn(lsn))
        .map_err(|error: PlanError| error.into_restore_error(listing))?;
    let file = tempfile::tempfile_in(scratch)
        .map_err(|source| local("create a file in", scratch, source))?;
    let mut image = build_image(store, &planned, file, scratch, &|_| ()).await?;
    let identity = LogIdentity {
        database: listing.database,
        name: listing.name.clone(),
    };
    let own_scratch = scratch.to_owned();
    let object = format!("archive of {}", listing.name);
    let sealed = blocking(move || {
        let damaged = |error| RestoreError::in_object(&object, error);
        image.verify().map_err(damaged)?;
        let Some(TransactionSummary {
            position,
            mut commit,
        }) = image.transaction()
        else {
            return Err(damaged(ChunkError::Damaged("no transaction")));
        };
        commit.whole_image = true;
        commit.slot_count = image.image_count();
        let mut write = || {
            let mut writer = ChunkWriter::create_snapshot(&own_scratch, &identity)?;
            writer.begin_transaction(TransactionSummary { position, commit })?;
            image.for_each_page(|page_no, page| writer.push_image(page_no, page))?;
            writer.finish()
        };
        write().map_err(damaged)
    })
    .await?;
    Ok(upload(store, &sealed, scratch).await?)
}
