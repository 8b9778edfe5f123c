//! Replays a node's journal: what a replica would have if its journal were all that is left.

use crate::cluster::Cluster;
use durovfs_journal::{DatabaseState, Journal, JournalOptions};
use durovfs_wire::entry::SlotIndex;
use durovfs_wire::{DatabaseChecksum, Lsn, PageChecksum, PageNo, PartKind};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// What a journal holds of one database.
#[derive(Debug)]
pub struct Replayed {
    /// State that the journal tells.
    pub state: DatabaseState,
    /// Pages after its last transaction; empty when older entries were dropped.
    pub pages: BTreeMap<PageNo, Vec<u8>>,
    /// The last transaction replayed.
    pub lsn: Lsn,
    /// Checksum that it carries.
    pub carried: DatabaseChecksum,
}

impl Replayed {
    /// Checksum of the pages themselves.
    pub fn checksum(&self) -> DatabaseChecksum {
        let mut checksum = DatabaseChecksum::EMPTY;
        for (page_no, image) in &self.pages {
            checksum.toggle(PageChecksum::of(*page_no, image));
        }
        checksum
    }

    /// The pages as a database file.
    ///
    /// # Panics
    /// When a page is missing.
    pub fn image(&self) -> Vec<u8> {
        let mut image = Vec::new();
        for (number, (page_no, page)) in (1..).zip(&self.pages) {
            assert_eq!(page_no.get(), number, "a page is missing");
            image.extend_from_slice(page);
        }
        image
    }
}

/// Copies the journals of all replicas, by node. To be done before the cluster stops: its last
/// upload lets the replicas drop what they hold. Nothing may be committed meanwhile.
///
/// # Panics
/// When that fails.
pub fn copy_journals(cluster: &Cluster) -> BTreeMap<String, PathBuf> {
    let copy = |node: String| {
        let to = cluster.scratch().join(format!("{node}-journal"));
        copy_journal(&cluster.node_path(&node).join("data/journal"), &to);
        (node, to)
    };
    cluster.replicas().into_iter().map(copy).collect()
}

fn copy_journal(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("make the copy's directory");
    for entry in std::fs::read_dir(from).expect("list the journal") {
        let path = entry.expect("list the journal").path();
        if path.is_file() {
            std::fs::copy(&path, to.join(path.file_name().expect("a name"))).expect("copy a file");
        }
    }
}

/// The first entry of a database that a journal holds.
///
/// # Panics
/// When the journal cannot be read, or knows nothing of the database.
pub fn first_lsn(journal_directory: &Path, name: &Path) -> u64 {
    let (journal, states) = open(journal_directory);
    journal.close();
    let name = name.to_string_lossy();
    let state = states.into_iter().find(|state| state.name == name);
    state.expect("the database").first_lsn.get()
}

fn open(journal_directory: &Path) -> (Journal, Vec<DatabaseState>) {
    Journal::open(JournalOptions {
        directory: journal_directory.to_owned(),
        sync: false,
        segment_bytes: 64 << 20,
        limit_bytes: 16 << 30,
        mend: false,
    })
    .unwrap_or_else(|error| panic!("open {}: {error}", journal_directory.display()))
}

/// Replays every committed entry of a database from its first on, out of a copy of a journal.
///
/// # Panics
/// When the journal cannot be read, or lacks the beginning.
pub fn replay(journal_directory: &Path, name: &Path) -> Replayed {
    let name = name.to_string_lossy();
    let mut all = replay_all(journal_directory, &|known| known == name);
    all.remove(&*name)
        .unwrap_or_else(|| panic!("{} has no {name}", journal_directory.display()))
}

/// The same for all databases with such names.
///
/// # Panics
/// When the journal cannot be read, or lacks the beginning of one.
pub fn replay_all(
    journal_directory: &Path,
    wanted: &dyn Fn(&str) -> bool,
) -> BTreeMap<String, Replayed> {
    let (journal, states) = open(journal_directory);
    let states = states.into_iter().filter(|state| wanted(&state.name));
    let replayed = states
        .map(|state| (state.name.clone(), replay_database(&journal, state)))
        .collect();
    journal.close();
    replayed
}

fn replay_database(journal: &Journal, state: DatabaseState) -> Replayed {
    assert_eq!(
        state.first_lsn,
        Lsn::new(1),
        "the journal lacks the beginning: {state:?}"
    );
    let mut replayed = Replayed {
        pages: BTreeMap::new(),
        lsn: Lsn::ZERO,
        carried: DatabaseChecksum::EMPTY,
        state,
    };
    let last = replayed.state.last.lsn;
    let parts = journal
        .parts(replayed.state.database, Lsn::new(1), last)
        .expect("read entries");
    // Images of the open entry, by order of arrival.
    let mut images: Vec<Vec<u8>> = Vec::new();
    let mut index = SlotIndex::default();
    for part in parts {
        let part = part.expect("read a part");
        if part.header.part == 0 {
            images.clear();
            index = SlotIndex::default();
        }
        for slot in part.slots().expect("slots") {
            index.insert(slot.slot, slot.page_no, images.len());
            images.push(slot.image.to_vec());
        }
        if let PartKind::Commit(commit) = part.header.kind {
            if commit.whole_image {
                replayed.pages.clear();
            }
            for (page_no, token) in std::mem::take(&mut index).finish(commit.slot_count) {
                replayed
                    .pages
                    .insert(page_no, std::mem::take(&mut images[token]));
            }
            replayed
                .pages
                .retain(|page_no, _| page_no.get() <= commit.page_count);
            replayed.lsn = part.header.lsn;
            replayed.carried = commit.checksum;
        }
    }
    replayed
}
