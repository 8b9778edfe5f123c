//! A log's objects in a store, by their keys alone.
//!
//! No object is read here; `index` does that.

use crate::layout::{self, ChunkRange, DATABASES_FOLDER, ObjectName, SnapshotPoint};
use crate::restore::RestoreError;
use crate::store::Store;
use durovfs_wire::{DatabaseId, Lsn, Timestamp};
use std::collections::BTreeMap;

/// Most names that a "no such database" suggests.
const MAX_NEAR_NAMES: usize = 5;

/// A chunk in a store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChunkObject {
    /// What its key says.
    pub range: ChunkRange,
    /// Its key.
    pub key: String,
    /// Its length.
    pub size: u64,
}

/// A snapshot in a store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotObject {
    /// What its key says.
    pub point: SnapshotPoint,
    /// Its key.
    pub key: String,
    /// Its length.
    pub size: u64,
}

/// All objects of one log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listing {
    /// Name of the database.
    pub name: String,
    /// The log.
    pub database: DatabaseId,
    /// Its chunks, by first, then last entry.
    pub chunks: Vec<ChunkObject>,
    /// Its snapshots, oldest first.
    pub snapshots: Vec<SnapshotObject>,
}

impl Listing {
    /// The logs of all databases that had this name, the one with the newest entry first. None when
    /// there are none.
    ///
    /// # Errors
    /// When the name cannot be one, or the store fails.
    pub async fn load(store: &dyn Store, name: &str) -> Result<Vec<Self>, RestoreError> {
        let folder = layout::name_folder(name)?;
        let mut logs: BTreeMap<DatabaseId, Self> = BTreeMap::new();
        for object in store.list(&folder).await? {
            let Some(parsed) = layout::parse_key(&object.key) else {
                tracing::debug!(key = object.key, "not an object of the archive");
                continue;
            };
            let log = logs.entry(parsed.database).or_insert_with(|| Self {
                name: name.to_owned(),
                database: parsed.database,
                chunks: Vec::new(),
                snapshots: Vec::new(),
            });
            let (key, size) = (object.key, object.size);
            match parsed.object {
                ObjectName::Chunk(range) => log.chunks.push(ChunkObject { range, key, size }),
                ObjectName::Snapshot(point) => {
                    log.snapshots.push(SnapshotObject { point, key, size });
                }
            }
        }
        let mut logs: Vec<_> = logs.into_values().collect();
        for log in &mut logs {
            log.chunks.sort_by_key(|chunk| chunk.range);
            log.snapshots.sort_by_key(|snapshot| snapshot.point);
        }
        logs.sort_by_key(|log| std::cmp::Reverse(log.last_time()));
        Ok(logs)
    }

    /// The objects of one log, which may be none.
    ///
    /// # Errors
    /// When the name cannot be one, or the store fails.
    pub async fn load_log(
        store: &dyn Store,
        name: &str,
        database: DatabaseId,
    ) -> Result<Self, RestoreError> {
        let logs = Self::load(store, name).await?;
        let empty = || Self {
            name: name.to_owned(),
            database,
            chunks: Vec::new(),
            snapshots: Vec::new(),
        };
        Ok(logs
            .into_iter()
            .find(|log| log.database == database)
            .unwrap_or_else(empty))
    }

    /// Time of the newest entry.
    pub fn last_time(&self) -> Option<Timestamp> {
        let chunk = self.chunks.iter().map(|chunk| chunk.range.last_time).max();
        chunk.max(self.snapshots.last().map(|snapshot| snapshot.point.time))
    }

    /// Last entry that an unbroken run of chunks, from the oldest one or a snapshot on, reaches:
    /// what a primary may take as archived.
    pub fn archived_lsn(&self) -> Lsn {
        let start = self.snapshots.last().map(|snapshot| snapshot.point.lsn);
        let first = self.chunks.first().map(|chunk| chunk.range.first_lsn);
        let Some(next) = start.map(Lsn::next).or(first) else {
            return Lsn::ZERO;
        };
        let last = self
            .cover_from(next)
            .last()
            .map(|chunk| chunk.range.last_lsn);
        last.or(next.previous()).unwrap_or(Lsn::ZERO)
    }

    /// The chunks that hold the entries from `start` on, in order and without a gap, each the one
    /// that reaches farthest. Neighbours may overlap.
    pub(crate) fn cover_from(&self, start: Lsn) -> impl Iterator<Item = &ChunkObject> {
        let mut next = start;
        let mut rest = self.chunks.iter().peekable();
        let mut best: Option<&ChunkObject> = None;
        std::iter::from_fn(move || {
            while let Some(chunk) = rest.next_if(|chunk| chunk.range.first_lsn <= next) {
                if best.is_none_or(|best| best.range.last_lsn < chunk.range.last_lsn) {
                    best = Some(chunk);
                }
            }
            let chunk = best.filter(|chunk| chunk.range.last_lsn >= next)?;
            next = chunk.range.last_lsn.next();
            Some(chunk)
        })
    }
}

/// Names of all databases in the store.
///
/// # Errors
/// When the store fails.
pub async fn database_names(store: &dyn Store) -> Result<Vec<String>, RestoreError> {
    let mut names = Vec::new();
    // Pieces of long names that are still to be followed.
    let mut folders = vec![DATABASES_FOLDER.to_owned()];
    while let Some(folder) = folders.pop() {
        for piece in store.list_folders(&folder).await? {
            let below = format!("{folder}{piece}/");
            match layout::split_name(below.strip_prefix(DATABASES_FOLDER).unwrap_or(&below)) {
                Some((name, _)) => names.push(name),
                None if below.len() <= layout::MAX_ENCODED_NAME_BYTES * 2 => folders.push(below),
                None => {}
            }
        }
    }
    names.sort();
    Ok(names)
}

/// Of `names` those that somebody who typed `wanted` may have meant, the nearest first.
pub fn near_names(wanted: &str, names: &[String]) -> Vec<String> {
    let file_name = |name: &str| name.rsplit('/').next().unwrap_or(name).to_owned();
    let wanted_file = file_name(wanted);
    let mut scored: Vec<_> = names
        .iter()
        .map(|name| {
            let same_file = file_name(name) == wanted_file;
            (
                if same_file {
                    0
                } else {
                    distance(&file_name(name), &wanted_file)
                },
                name,
            )
        })
        .filter(|(score, _)| *score <= wanted_file.chars().count() / 2)
        .collect();
    scored.sort();
    scored
        .into_iter()
        .take(MAX_NEAR_NAMES)
        .map(|(_, name)| name.clone())
        .collect()
}

/// Insertions, deletions and replacements between two words.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, to) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(from != *to);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mistyped_name_finds_the_one_that_was_meant() {
        let names: Vec<_> = ["/srv/app.db", "/home/x/orders.db", "/srv/other/app.db"]
            .map(String::from)
            .into();
        assert_eq!(
            near_names("/tmp/app.db", &names),
            ["/srv/app.db", "/srv/other/app.db"]
        );
        assert_eq!(near_names("order.db", &names)[0], "/home/x/orders.db");
        assert!(near_names("completely-else", &names).is_empty());
    }
}
