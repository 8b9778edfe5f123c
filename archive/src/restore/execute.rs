//! Carries out a plan: parallel downloads, ordered application, proof, and the name at the end.

use super::image::{Applied, Image};
use super::plan::{Plan, describe};
use super::{RestoreError, When};
use crate::chunk::ChunkReader;
use crate::index::Covered;
use crate::store::Store;
use durovfs_wire::LogPosition;
use durovfs_wire::entry::TransactionSummary;
use futures_util::stream::{self, StreamExt};
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tempfile::NamedTempFile;

/// Objects that are downloaded at once: hides the store's latency, and bounds the disk that
/// objects take beside the restored file.
const PARALLEL_DOWNLOADS: usize = 4;
/// Bytes in one request: with the above, what a restore holds in memory.
const DOWNLOAD_PIECE_BYTES: u64 = 8 << 20;
/// What SQLite would replay into a database that it stands beside.
const LOG_SUFFIXES: [&str; 2] = ["-wal", "-journal"];
/// SQLite's index of a WAL that is gone.
const SHM_SUFFIX: &str = "-shm";

/// How a restore is done.
#[derive(Debug, Clone, Default)]
pub struct RestoreOptions {
    /// Replace a file that is there, and remove the logs beside it.
    pub force: bool,
}

/// How far a restore is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Bytes downloaded by now.
    pub downloaded_bytes: u64,
    /// Bytes to download.
    pub total_bytes: u64,
}

/// What was restored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Restored {
    /// The transaction that the file is the image after.
    pub transaction: TransactionSummary,
    /// Bytes of the file.
    pub file_bytes: u64,
    /// Bytes that were downloaded for it.
    pub downloaded_bytes: u64,
}

/// Carries out a plan. The file appears under its name whole, proved and synced, or not at all.
///
/// # Errors
/// See [`RestoreError`].
pub async fn execute(
    store: &Arc<dyn Store>,
    plan: &Plan,
    output: &Path,
    options: &RestoreOptions,
    progress: &(dyn Fn(Progress) + Send + Sync),
) -> Result<Restored, RestoreError> {
    if !options.force {
        refuse_existing(output)?;
    }
    let folder = folder_of(output);
    let file = tempfile::Builder::new()
        .prefix(".durovfs-restore-")
        // What SQLite gives a new database; the process's umask takes away from it.
        .permissions(fs::Permissions::from_mode(0o644))
        .tempfile_in(&folder)
        .map_err(|source| local("create a file in", &folder, source))?;
    let copy = file
        .reopen()
        .map_err(|source| local("open", file.path(), source))?;
    let image = build_image(store, plan, copy, &folder, progress).await?;
    let transaction = check_target(plan, &image)?;
    let (name, output, force) = (plan.identity.name.clone(), output.to_owned(), options.force);
    blocking(move || finish(file, image, &name, &output, force)).await?;
    let commit = &transaction.commit;
    Ok(Restored {
        transaction,
        file_bytes: u64::from(commit.page_count) * commit.page_size.get() as u64,
        downloaded_bytes: plan.download_bytes,
    })
}

/// Applies a plan to an empty file. Objects are kept in unnamed files in `scratch` meanwhile.
pub(crate) async fn build_image(
    store: &Arc<dyn Store>,
    plan: &Plan,
    file: File,
    scratch: &Path,
    progress: &(dyn Fn(Progress) + Send + Sync),
) -> Result<Image, RestoreError> {
    let first_lsn = plan.chunks.first().map(|chunk| chunk.range.first_lsn.get());
    // A log's first entry follows an empty database; later ones need a whole image first.
    let mut image = Image::new(file, plan.snapshot.is_none() && first_lsn == Some(1));
    let counter = Counter::new(plan.download_bytes, progress);
    let snapshot = plan
        .snapshot
        .iter()
        .map(|snapshot| (&snapshot.key, snapshot.size));
    let chunks = plan.chunks.iter().map(|chunk| (&chunk.key, chunk.size));
    let downloads = snapshot.chain(chunks).map(|(key, size)| {
        let counter = &counter;
        async move {
            let count = |bytes| counter.add(bytes);
            (
                key,
                download(store.as_ref(), key, size, scratch, &count).await,
            )
        }
    });
    let known: Arc<[LogPosition]> = plan.known.as_slice().into();
    let mut downloads = std::pin::pin!(stream::iter(downloads).buffered(PARALLEL_DOWNLOADS));
    while let Some((key, file)) = downloads.next().await {
        let (file, key, identity) = (file?, key.clone(), plan.identity.clone());
        let (target, known) = (plan.target, Arc::clone(&known));
        let (applied, back) = blocking(move || {
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
            let applied = image.apply(&mut chunk, target, &known).map_err(damaged)?;
            Ok((applied, image))
        })
        .await?;
        image = back;
        if applied == Applied::TargetReached {
            break;
        }
    }
    Ok(image)
}

/// Bytes downloaded so far, of all downloads.
struct Counter<'a> {
    downloaded: std::sync::atomic::AtomicU64,
    total_bytes: u64,
    progress: &'a (dyn Fn(Progress) + Send + Sync),
}

impl<'a> Counter<'a> {
    fn new(total_bytes: u64, progress: &'a (dyn Fn(Progress) + Send + Sync)) -> Self {
        Self {
            downloaded: 0.into(),
            total_bytes,
            progress,
        }
    }

    fn add(&self, bytes: u64) {
        let before = self
            .downloaded
            .fetch_add(bytes, std::sync::atomic::Ordering::Relaxed);
        let downloaded_bytes = before + bytes;
        (self.progress)(Progress {
            downloaded_bytes,
            total_bytes: self.total_bytes,
        });
    }
}

/// Downloads an object into an unnamed file in `scratch`, piece by piece.
pub(crate) async fn download(
    store: &dyn Store,
    key: &str,
    size: u64,
    scratch: &Path,
    progress: &(dyn Fn(u64) + Send + Sync),
) -> Result<File, RestoreError> {
    let failed = |source| local("write a file in", scratch, source);
    let mut file = tempfile::tempfile_in(scratch).map_err(failed)?;
    let mut start = 0;
    while start < size {
        let length = DOWNLOAD_PIECE_BYTES.min(size - start);
        let piece = store.get_range(key, start, length).await?;
        start += length;
        file = blocking(move || {
            let written = file.write_all(&piece);
            Ok(written.map(|()| file))
        })
        .await?
        .map_err(failed)?;
        progress(length);
    }
    Ok(file)
}

/// Whether the image is the one that the plan was made for.
fn check_target(plan: &Plan, image: &Image) -> Result<TransactionSummary, RestoreError> {
    let not_covered = |what: String| RestoreError::NotCovered {
        what,
        name: plan.identity.name.clone(),
        covered: Covered::default(),
    };
    if let When::Bookmark(bookmark) = plan.target
        && image.epoch_of(bookmark.lsn) != Some(bookmark.epoch)
    {
        return Err(not_covered(format!(
            "bookmark {bookmark} is no commit of this history"
        )));
    }
    if let When::Lsn(lsn) = plan.target
        && image.last_entry().lsn < lsn
    {
        return Err(not_covered(format!("no commit as late as lsn {lsn}")));
    }
    image
        .transaction()
        .ok_or_else(|| not_covered(format!("no commit as early as {}", describe(plan.target))))
}

/// Proves the file, syncs it and gives it its name.
fn finish(
    file: NamedTempFile,
    mut image: Image,
    name: &str,
    output: &Path,
    force: bool,
) -> Result<(), RestoreError> {
    let object = format!("archive of {name}");
    image
        .verify()
        .map_err(|error| RestoreError::in_object(&object, error))?;
    file.as_file()
        .sync_all()
        .map_err(|source| local("sync", file.path(), source))?;
    if force {
        remove_logs(output)?;
        file.persist(output)
            .map_err(|error| local("rename to", output, error.error))?;
    } else {
        // Somebody may have made it while the restore ran.
        refuse_existing(output)?;
        file.persist_noclobber(output)
            .map_err(|error| match error.error.kind() {
                io::ErrorKind::AlreadyExists => RestoreError::Exists(output.to_owned()),
                _ => local("rename to", output, error.error),
            })?;
    }
    let folder = folder_of(output);
    let synced = File::open(&folder).and_then(|folder| folder.sync_all());
    synced.map_err(|source| local("sync", &folder, source))
}

fn folder_of(output: &Path) -> PathBuf {
    match output.parent() {
        Some(folder) if folder != Path::new("") => folder.to_owned(),
        Some(_) | None => PathBuf::from("."),
    }
}

fn beside(output: &Path, suffix: &str) -> PathBuf {
    let mut name = output.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

fn refuse_existing(output: &Path) -> Result<(), RestoreError> {
    let logs = LOG_SUFFIXES.iter().map(|suffix| beside(output, suffix));
    for path in std::iter::once(output.to_owned()).chain(logs) {
        // Not `exists`: a link that leads nowhere is there, too.
        match fs::symlink_metadata(&path) {
            Ok(_) => return Err(RestoreError::Exists(path)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(local("look for", &path, source)),
        }
    }
    Ok(())
}

/// Before the rename: SQLite would replay the old database's log into the restored one.
fn remove_logs(output: &Path) -> Result<(), RestoreError> {
    for suffix in LOG_SUFFIXES.iter().chain([&SHM_SUFFIX]) {
        let path = beside(output, suffix);
        match fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(local("remove", &path, source));
            }
            Ok(()) | Err(_) => {}
        }
    }
    Ok(())
}

pub(crate) fn local(action: &'static str, path: &Path, source: io::Error) -> RestoreError {
    RestoreError::Local {
        action,
        path: path.to_owned(),
        source,
    }
}

/// Runs blocking work off the async threads.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, RestoreError> + Send + 'static,
) -> Result<T, RestoreError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        // The work panicked, or the runtime is shutting down.
        Err(stopped) => {
            let source = io::Error::other(stopped);
            Err(RestoreError::Local {
                action: "run",
                path: "blocking work".into(),
                source,
            })
        }
    }
}
