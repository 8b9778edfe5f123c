//! A directory as object store.
//!
//! An object is written and synced under a temporary name in `.incoming`, then linked to its own,
//! which fails if that one is taken; then its folder is synced. So an object is whole or not there,
//! also after a power cut.

use super::{Body, MAX_LISTED_OBJECTS, ObjectInfo, PutOutcome, Store, StoreError};
use super::{check_key, decode_percent};
use async_trait::async_trait;
use bytes::Bytes;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

const INCOMING: &str = ".incoming";
/// Temporary files older than this are of a process that died. No upload takes a day.
const ABANDONED_AFTER: Duration = Duration::from_secs(24 * 60 * 60);
/// Deepest folders that a listing follows: keys have five pieces and those of a long name.
const MAX_DEPTH: usize = 16;

#[derive(Debug)]
pub(super) struct FileStore {
    root: PathBuf,
    url: String,
}

impl FileStore {
    pub(super) fn open(url: &str, path: &str) -> Result<Self, StoreError> {
        let root = PathBuf::from(decode_percent(path)?);
        if !root.is_absolute() {
            return Err(StoreError::Invalid(format!(
                "archive URL {url:?}: expected an absolute path, as in file:///var/lib/archive"
            )));
        }
        Ok(Self {
            root,
            url: url.to_owned(),
        })
    }

    async fn run<T: Send + 'static>(
        &self,
        action: String,
        key: &str,
        work: impl FnOnce(&Path) -> io::Result<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        let root = self.root.clone();
        let result = match tokio::task::spawn_blocking(move || work(&root)).await {
            Ok(result) => result,
            Err(stopped) => Err(io::Error::other(stopped)),
        };
        let store = || self.url.clone();
        result.map_err(|error| match error.kind() {
            ErrorKind::NotFound => StoreError::NotFound {
                store: store(),
                key: key.to_owned(),
            },
            ErrorKind::PermissionDenied => StoreError::Denied {
                store: store(),
                action,
                detail: error.to_string(),
            },
            _ => StoreError::Unavailable {
                store: store(),
                action,
                detail: error.to_string(),
            },
        })
    }
}

#[async_trait]
impl Store for FileStore {
    async fn put_if_absent(&self, key: &str, body: Body<'_>) -> Result<PutOutcome, StoreError> {
        check_key(key)?;
        let source = match body {
            Body::Bytes(bytes) => Source::Bytes(bytes),
            Body::File(path) => Source::File(path.to_owned()),
        };
        let target = key.to_owned();
        self.run(format!("put {key}"), key, move |root| {
            put(root, &target, source)
        })
        .await
    }

    async fn get(&self, key: &str) -> Result<Bytes, StoreError> {
        check_key(key)?;
        let source = key.to_owned();
        let read = move |root: &Path| fs::read(root.join(source)).map(Bytes::from);
        self.run(format!("get {key}"), key, read).await
    }

    async fn get_range(&self, key: &str, start: u64, length: u64) -> Result<Bytes, StoreError> {
        check_key(key)?;
        let source = key.to_owned();
        let read = move |root: &Path| {
            let file = File::open(root.join(source))?;
            let mut bytes = vec![0u8; usize::try_from(length).map_err(io::Error::other)?];
            file.read_exact_at(&mut bytes, start)?;
            Ok(Bytes::from(bytes))
        };
        self.run(format!("get {key}"), key, read).await
    }

    async fn list(&self, prefix: &str) -> Result<Vec<ObjectInfo>, StoreError> {
        let wanted = prefix.to_owned();
        let read = move |root: &Path| {
            let mut found = Vec::new();
            // Only the folder that the prefix is in can hold matches.
            let folder = wanted.rsplit_once('/').map_or("", |(folder, _)| folder);
            list_into(root, folder, &wanted, MAX_DEPTH, &mut found)?;
            found.sort();
            Ok(found)
        };
        self.run(format!("list {prefix}"), prefix, read).await
    }

    async fn list_folders(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        let folder = prefix.to_owned();
        let read = move |root: &Path| {
            let mut names = Vec::new();
            for (name, is_folder) in read_folder(&root.join(folder))? {
                if is_folder {
                    names.push(name);
                }
            }
            names.sort();
            Ok(names)
        };
        self.run(format!("list {prefix}"), prefix, read).await
    }

    async fn delete(&self, keys: &[String]) -> Result<(), StoreError> {
        keys.iter().try_for_each(|key| check_key(key))?;
        let doomed = keys.to_vec();
        let work = move |root: &Path| {
            doomed
                .iter()
                .try_for_each(|key| match fs::remove_file(root.join(key)) {
                    Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
                    Ok(()) | Err(_) => Ok(()),
                })
        };
        self.run(format!("delete {} objects", keys.len()), "", work)
            .await
    }

    async fn check(&self) -> Result<(), StoreError> {
        let action = "open the archive".to_owned();
        let look = |root: &Path| match fs::read_dir(root) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                Err(io::Error::other("no such directory"))
            }
            outcome => outcome.map(drop),
        };
        self.run(action, "", look).await
    }

    fn url(&self) -> &str {
        &self.url
    }
}

enum Source {
    Bytes(Bytes),
    File(PathBuf),
}

fn put(root: &Path, key: &str, source: Source) -> io::Result<PutOutcome> {
    let target = root.join(key);
    if target.try_exists()? {
        return Ok(PutOutcome::AlreadyThere);
    }
    let incoming = root.join(INCOMING);
    fs::create_dir_all(&incoming)?;
    remove_abandoned(&incoming)?;
    let mut file = tempfile::Builder::new()
        .prefix("put-")
        .tempfile_in(&incoming)?;
    match source {
        Source::Bytes(bytes) => file.write_all(&bytes)?,
        // A source that vanished is no missing object.
        Source::File(path) => {
            let mut source = File::open(&path)
                .map_err(|error| io::Error::other(format!("read {path:?}: {error}")))?;
            copy(&mut source, file.as_file_mut())?;
        }
    }
    file.as_file().sync_all()?;
    let folder = target.parent().unwrap_or(root);
    create_folders(root, folder)?;
    match file.persist_noclobber(&target) {
        Ok(_) => {}
        Err(error) if error.error.kind() == ErrorKind::AlreadyExists => {
            return Ok(PutOutcome::AlreadyThere);
        }
        Err(error) => return Err(error.error),
    }
    File::open(folder)?.sync_all()?;
    Ok(PutOutcome::Created)
}

fn copy(source: &mut File, target: &mut File) -> io::Result<()> {
    let mut buffer = vec![0u8; 1 << 20];
    loop {
        match source.read(&mut buffer)? {
            0 => return Ok(()),
            count => target.write_all(&buffer[..count])?,
        }
    }
}

/// Makes the folders below `root` down to `folder`; each new name is synced into its parent.
fn create_folders(root: &Path, folder: &Path) -> io::Result<()> {
    if folder.is_dir() {
        return Ok(());
    }
    let parent = folder.parent().unwrap_or(root);
    if folder != root {
        create_folders(root, parent)?;
    }
    match fs::create_dir(folder) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error),
        Ok(()) | Err(_) => {}
    }
    File::open(parent)?.sync_all()
}

fn remove_abandoned(incoming: &Path) -> io::Result<()> {
    for entry in fs::read_dir(incoming)? {
        let entry = entry?;
        // Another process may finish its put, and remove its file, at any moment.
        let Ok(modified) = entry.metadata().and_then(|metadata| metadata.modified()) else {
            continue;
        };
        let age = SystemTime::now()
            .duration_since(modified)
            .unwrap_or_default();
        if age > ABANDONED_AFTER {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Names in a folder that can be pieces of keys, and whether they are folders. A missing folder is
/// an empty one: folders come with the first object.
fn read_folder(folder: &Path) -> io::Result<Vec<(String, bool)>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry?;
        if let Ok(name) = entry.file_name().into_string()
            && !name.starts_with('.')
        {
            names.push((name, entry.file_type()?.is_dir()));
        }
    }
    Ok(names)
}

fn list_into(
    root: &Path,
    folder: &str,
    prefix: &str,
    depth: usize,
    found: &mut Vec<ObjectInfo>,
) -> io::Result<()> {
    for (name, is_folder) in read_folder(&root.join(folder))? {
        let key = if folder.is_empty() {
            name
        } else {
            format!("{folder}/{name}")
        };
        if is_folder && depth > 0 {
            if key.starts_with(prefix) || prefix.starts_with(&format!("{key}/")) {
                list_into(root, &key, prefix, depth - 1, found)?;
            }
        } else if !is_folder && key.starts_with(prefix) {
            match fs::metadata(root.join(&key)) {
                Ok(metadata) => found.push(ObjectInfo {
                    key,
                    size: metadata.len(),
                }),
                // Deleted since the folder was read.
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        if found.len() > MAX_LISTED_OBJECTS {
            return Err(io::Error::other(format!(
                "more than {MAX_LISTED_OBJECTS} objects"
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    // Broken: of two puts at once the later would replace the object that the earlier was told is
    // there. A pipe as source holds one put between its look at the key and its end.
    #[test]
    fn a_put_that_is_overtaken_replaces_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("pipe");
        let made = std::process::Command::new("mkfifo")
            .arg(&pipe)
            .status()
            .unwrap();
        assert!(made.success());
        let (root, source) = (folder.path().join("root"), pipe.clone());
        let slow_root = root.clone();
        let slow = std::thread::spawn(move || put(&slow_root, "a/b", Source::File(source)));
        // Opens when the slow put opens its source, which it does after it looked at the key.
        let mut pipe = File::options().write(true).open(&pipe).unwrap();
        let quick = put(&root, "a/b", Source::Bytes(Bytes::from_static(b"first")));
        assert_eq!(quick.unwrap(), PutOutcome::Created);
        pipe.write_all(b"second").unwrap();
        drop(pipe);
        assert_eq!(slow.join().unwrap().unwrap(), PutOutcome::AlreadyThere);
        assert_eq!(fs::read(root.join("a/b")).unwrap(), b"first");
        assert_eq!(fs::read_dir(root.join(INCOMING)).unwrap().count(), 0);
    }
}
