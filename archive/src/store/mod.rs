//! Object stores: one trait, a directory and S3 behind it.
//!
//! A store knows keys and bytes, nothing of chunks. Keys are `/`-separated, of printable ASCII, and
//! no piece of one is empty or begins with a dot. Objects are immutable: they are put once.

mod file;
mod s3;
#[cfg(test)]
pub(crate) mod tests;

use async_trait::async_trait;
use bytes::Bytes;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Most objects that a listing gives: 30 days of a chunk every 10 seconds, four times over. More is
/// a mistake in the URL, or somebody else's bucket.
pub const MAX_LISTED_OBJECTS: usize = 1_000_000;

/// What became of a conditional put.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PutOutcome {
    /// The object is there, with these bytes.
    Created,
    /// An object with this key was there before, and still is. After a repeated request it may be
    /// this very one: compare.
    AlreadyThere,
}

/// An object in a listing.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct ObjectInfo {
    /// Its key, without the store's prefix.
    pub key: String,
    /// Its length.
    pub size: u64,
}

/// Bytes to put.
#[derive(Debug, Clone)]
pub enum Body<'a> {
    /// In memory.
    Bytes(Bytes),
    /// In a local file, which does not change meanwhile.
    File(&'a Path),
}

impl From<Bytes> for Body<'_> {
    fn from(bytes: Bytes) -> Self {
        Self::Bytes(bytes)
    }
}

impl<'a> From<&'a Path> for Body<'a> {
    fn from(path: &'a Path) -> Self {
        Self::File(path)
    }
}

/// Why a store did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The URL or a key cannot be used; asking again will not help.
    #[error("{0}")]
    Invalid(String),
    /// There is no such object.
    #[error("{store}: no object {key}")]
    NotFound {
        /// The store.
        store: String,
        /// The key.
        key: String,
    },
    /// The store does not let us: credentials, policy, file modes.
    #[error("{store}: {action}: access denied: {detail}")]
    Denied {
        /// The store.
        store: String,
        /// What was asked.
        action: String,
        /// What it said.
        detail: String,
    },
    /// The store did not answer, or failed. It may help to ask again later.
    #[error("{store}: {action}: {detail}")]
    Unavailable {
        /// The store.
        store: String,
        /// What was asked.
        action: String,
        /// What it said.
        detail: String,
    },
}

/// How to talk to an S3 service, beyond what its URL says.
#[derive(Debug, Clone)]
pub struct S3Options {
    /// Bucket in the path instead of the host name; by default when the URL names an endpoint.
    pub path_style: Option<bool>,
    /// Longest time for one request.
    pub request_timeout: Duration,
    /// How often a request that may be repeated is sent at all.
    pub attempts: u32,
}

impl Default for S3Options {
    fn default() -> Self {
        Self {
            path_style: None,
            // A part of 8 MiB at half a megabit per second.
            request_timeout: Duration::from_secs(120),
            attempts: 4,
        }
    }
}

/// A store of immutable objects.
#[async_trait]
pub trait Store: Send + Sync + std::fmt::Debug {
    /// Puts an object unless one with this key is there. Objects appear whole or not at all.
    ///
    /// A store that knows no conditional put of large objects may replace the object instead of
    /// saying [`PutOutcome::AlreadyThere`]: two writers of one key must have equal contents.
    async fn put_if_absent(&self, key: &str, body: Body<'_>) -> Result<PutOutcome, StoreError>;

    /// All bytes of an object.
    async fn get(&self, key: &str) -> Result<Bytes, StoreError>;

    /// `length` bytes from `start`; fails when the object ends before.
    async fn get_range(&self, key: &str, start: u64, length: u64) -> Result<Bytes, StoreError>;

    /// All objects whose key begins with `prefix`, in the order of their keys.
    async fn list(&self, prefix: &str) -> Result<Vec<ObjectInfo>, StoreError>;

    /// What stands between `prefix` (which ends in a slash) and the next slash, of all keys.
    async fn list_folders(&self, prefix: &str) -> Result<Vec<String>, StoreError>;

    /// Deletes objects; one that is not there counts as deleted.
    async fn delete(&self, keys: &[String]) -> Result<(), StoreError>;

    /// Whether the store exists and answers. An empty one lists nothing, a missing one fails here.
    async fn check(&self) -> Result<(), StoreError>;

    /// Where it is, without anything secret.
    fn url(&self) -> &str;
}

/// Opens the store at `url`: `file:///dir`, or
/// `s3://bucket/prefix?endpoint=http://host:port&region=name&path_style=true&profile=name`.
///
/// Credentials come from the environment, a profile file, or the machine's role; asking for the
/// latter may block for seconds. Nothing is created, and no store is contacted.
///
/// # Errors
/// When the URL is none of these, or there are no credentials.
pub fn open(url: &str, options: &S3Options) -> Result<Arc<dyn Store>, StoreError> {
    match url.split_once("://") {
        Some(("file", rest)) => Ok(Arc::new(file::FileStore::open(url, rest)?)),
        Some(("s3", rest)) => Ok(Arc::new(s3::S3Store::open(rest, options)?)),
        _ => Err(StoreError::Invalid(format!(
            "archive URL {url:?}: expected file:///dir or s3://bucket/prefix"
        ))),
    }
}

/// Refuses keys that a store could take for something else than they are.
fn check_key(key: &str) -> Result<(), StoreError> {
    let legal = |piece: &str| {
        !piece.is_empty()
            && !piece.starts_with('.')
            && piece.bytes().all(|b| b.is_ascii_graphic() && b != b'\\')
    };
    if key.split('/').all(legal) {
        Ok(())
    } else {
        Err(StoreError::Invalid(format!(
            "object key {key:?} is not legal"
        )))
    }
}

fn decode_percent(text: &str) -> Result<String, StoreError> {
    percent_encoding::percent_decode_str(text)
        .decode_utf8()
        .map(std::borrow::Cow::into_owned)
        .map_err(|_| StoreError::Invalid(format!("archive URL: {text:?} is not UTF-8")))
}
