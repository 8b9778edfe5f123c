//! From parts of a log to a confirmed object in a store.
//!
//! When a chunk is due, and what follows from it, its caller knows.

use crate::chunk::{
    ChunkError, ChunkKind, ChunkReader, ChunkWriter, EntryFacts, LogIdentity, SealedChunk,
};
use crate::layout::{self, InvalidName};
use crate::normalize::{NormalizeError, Normalizer};
use crate::restore::{RestoreError, download};
use crate::store::{Body, PutOutcome, Store, StoreError};
use durovfs_wire::EntryPart;
use std::error::Error;
use std::path::Path;
use std::sync::Arc;

/// Why a chunk was not uploaded.
#[derive(Debug, thiserror::Error)]
pub enum UploadError {
    /// The log could not be read. Nothing was uploaded.
    #[error("read the log: {0}")]
    Log(Box<dyn Error + Send + Sync>),
    /// The parts are not those of whole entries, one after the other.
    #[error(transparent)]
    Parts(#[from] NormalizeError),
    /// The last entry is not complete.
    #[error("the parts end within an entry")]
    Incomplete,
    /// The chunk could not be built.
    #[error("build a chunk: {0}")]
    Chunk(#[from] ChunkError),
    /// The name cannot stand in a key.
    #[error(transparent)]
    Name(#[from] InvalidName),
    /// The store failed; it is worth trying again.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Another object stands where this one belongs, and is not the same.
    #[error("{object}: {reason}")]
    Conflict {
        /// Its key.
        object: String,
        /// How it differs.
        reason: String,
    },
}

/// An object that the store confirmed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uploaded {
    /// Its key.
    pub key: String,
    /// Its length.
    pub bytes: u64,
    /// Its entries.
    pub range: layout::ChunkRange,
    /// Whether it was there before, with the same entries.
    pub outcome: PutOutcome,
}

/// Builds a chunk of the entries whose parts `parts` gives, and uploads it.
///
/// The parts must be those of whole committed entries in order, one or more. After
/// [`crate::chunk::MAX_ENTRIES`] of them the chunk ends, which its range tells. Building runs on
/// the blocking pool; `scratch` is a folder for temporary files, as large as the largest
/// transaction.
///
/// # Errors
/// See [`UploadError`]. After a store's failure the same call may be repeated.
pub async fn write_chunk<I, E>(
    store: &Arc<dyn Store>,
    identity: &LogIdentity,
    scratch: &Path,
    parts: impl FnOnce() -> I + Send + 'static,
) -> Result<Uploaded, UploadError>
where
    I: Iterator<Item = Result<EntryPart, E>>,
    E: Into<Box<dyn Error + Send + Sync>>,
{
    let (own_identity, own_scratch) = (identity.clone(), scratch.to_owned());
    let building =
        tokio::task::spawn_blocking(move || build_chunk(&own_identity, &own_scratch, parts()));
    let sealed = match building.await {
        Ok(sealed) => sealed?,
        Err(stopped) => return Err(UploadError::Log(stopped.into())),
    };
    upload(store, &sealed, scratch).await
}

/// Builds a chunk in a local file. Blocking.
///
/// # Errors
/// See [`UploadError`].
pub fn build_chunk<E: Into<Box<dyn Error + Send + Sync>>>(
    identity: &LogIdentity,
    scratch: &Path,
    parts: impl Iterator<Item = Result<EntryPart, E>>,
) -> Result<SealedChunk, UploadError> {
    let mut writer = ChunkWriter::create(scratch, identity)?;
    let mut normalizer = Normalizer::new(scratch);
    for part in parts {
        let part = part.map_err(|error| UploadError::Log(error.into()))?;
        if let Some(entry) = normalizer.push(&part)? {
            writer.push(&entry)?;
            // The rest is for the next chunk: the caller sees in the range where this one ends.
            if writer.is_full() {
                break;
            }
        }
    }
    if normalizer.is_open() {
        return Err(UploadError::Incomplete);
    }
    Ok(writer.finish()?)
}

/// Uploads a chunk or snapshot under its key. When an object is there already, it is read back
/// and must hold the same entries, undamaged.
///
/// # Errors
/// When the store fails, or another object is there.
pub async fn upload(
    store: &Arc<dyn Store>,
    sealed: &SealedChunk,
    scratch: &Path,
) -> Result<Uploaded, UploadError> {
    let LogIdentity { database, name } = &sealed.identity;
    let key = match sealed.kind {
        ChunkKind::Chunk => layout::chunk_key(name, *database, &sealed.range)?,
        ChunkKind::Snapshot => layout::snapshot_key(name, *database, &sealed.snapshot_point())?,
    };
    let outcome = store.put_if_absent(&key, Body::File(sealed.path())).await?;
    if outcome == PutOutcome::AlreadyThere {
        check_same(store, &key, sealed, scratch).await?;
    }
    Ok(Uploaded {
        key,
        bytes: sealed.bytes,
        range: sealed.range,
        outcome,
    })
}

async fn check_same(
    store: &Arc<dyn Store>,
    key: &str,
    sealed: &SealedChunk,
    scratch: &Path,
) -> Result<(), UploadError> {
    let conflict = |reason: String| UploadError::Conflict {
        object: key.to_owned(),
        reason,
    };
    let listed = store.list(key).await?;
    let Some(object) = listed.into_iter().find(|object| object.key == key) else {
        // It was deleted since; the caller's repetition puts it again.
        let (store, key) = (store.url().to_owned(), key.to_owned());
        return Err(StoreError::NotFound { store, key }.into());
    };
    let file = match download(store.as_ref(), key, object.size, scratch, &|_| ()).await {
        Ok(file) => file,
        Err(RestoreError::Store(error)) => return Err(error.into()),
        Err(error) => return Err(conflict(error.to_string())),
    };
    let (identity, entries) = (sealed.identity.clone(), sealed.entries.clone());
    let checking = tokio::task::spawn_blocking(move || {
        let mut chunk = ChunkReader::open(file)?;
        chunk.verify()?;
        let theirs = &chunk.index().entries;
        let same = |(a, b): (&EntryFacts, &EntryFacts)| a.is_same_entry(b);
        Ok::<_, ChunkError>(
            *chunk.identity() == identity
                && theirs.len() == entries.len()
                && theirs.iter().zip(&entries).all(same),
        )
    });
    match checking.await {
        Ok(Ok(true)) => Ok(()),
        Ok(Ok(false)) => Err(conflict("is there already, with other entries".into())),
        Ok(Err(error)) => Err(conflict(format!("is there already: {error}"))),
        Err(stopped) => Err(UploadError::Log(stopped.into())),
    }
}
