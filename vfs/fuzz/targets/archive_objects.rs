//! What an archive's store gives back: keys, chunks and snapshots with any bytes in them. A second
//! writer packs edited headers, images, index records and footers anew, with right checksums and
//! matching counts, so that what lies behind those is reached.
//!
//! What must hold: no panic, memory bounded; an object that proves whole can be written again and
//! holds the same entries then; a restore gives a file of the length that its commit says.

#![no_main]

mod archive;
mod edits;

use arbitrary::Arbitrary;
use archive::database::{DATABASE, NAME};
use archive::object::{ObjectEdits, build};
use archive::store::MemoryStore;
use durovfs_archive::chunk::{ChunkKind, EntryFacts};
use durovfs_archive::layout::{self, ChunkRange, ObjectName, SnapshotPoint};
use durovfs_archive::restore::{RestoreOptions, restore};
use durovfs_archive::{
    ArchiveIndex, ChunkReader, ChunkWriter, Listing, NormalizedEntry, Normalizer, Store, When,
    entries,
};
use durovfs_wire::entry::SlotPages;
use durovfs_wire::{Epoch, Lsn, Timestamp};
use libfuzzer_sys::fuzz_target;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use tokio::runtime::{Builder, Runtime};

/// Largest database that is restored here: a forged length costs the time to read so many zeros.
const RESTORED_BYTES_MAX: u64 = 4 << 20;
/// Objects in one store.
const OBJECTS_MAX: usize = 3;
/// Most parts that one reading gives here: what the objects can hold, many times over.
const PARTS_MAX: usize = 4096;

#[derive(Arbitrary, Debug)]
enum Input {
    /// Any bytes, as an object, and any text, as a key.
    Raw(Vec<u8>, String),
    /// Objects that were edited, in a store.
    Objects(Vec<(ObjectEdits, KeyEdits)>),
}

/// What an object's key says; where nothing is given, what the object says.
#[derive(Arbitrary, Debug)]
struct KeyEdits {
    first_lsn: Option<u64>,
    last_lsn: Option<u64>,
    epoch: Option<u32>,
    time: Option<i64>,
}

fuzz_target!(|input: Input| {
    let scratch = tempfile::tempdir().expect("a folder");
    match input {
        Input::Raw(bytes, key) => {
            read_object(&bytes, scratch.path());
            read_key(&key);
        }
        Input::Objects(edits) => {
            let mut store = MemoryStore::default();
            let mut is_small = true;
            for (object, key) in edits.iter().take(OBJECTS_MAX) {
                let bytes = build(object);
                is_small &= read_object(&bytes, scratch.path());
                if let Some(key) = key_of(&bytes, key) {
                    read_key(&key);
                    store.objects.insert(key, bytes.into());
                }
            }
            if is_small {
                runtime().block_on(read_archive(store, scratch.path()));
            }
        }
    }
});

fn runtime() -> &'static Runtime {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| Builder::new_current_thread().build().expect("a runtime"))
}

/// Reads an object in every way there is. Whether its database is small enough to be restored.
fn read_object(bytes: &[u8], scratch: &Path) -> bool {
    let Ok(mut chunk) = open(bytes, scratch) else {
        return true;
    };
    let is_whole = chunk.verify().is_ok();
    let kind = chunk.index().footer.kind;
    let mut writer = match kind {
        ChunkKind::Chunk => ChunkWriter::create(scratch, chunk.identity()),
        ChunkKind::Snapshot => ChunkWriter::create_snapshot(scratch, chunk.identity()),
    }
    .expect("room for a chunk");
    let entries = chunk.index().entries.clone();
    for facts in &entries {
        let normalized = read_entry(&mut chunk, facts, scratch);
        assert!(normalized.is_some() || !is_whole, "whole, and unreadable");
        if let Some(entry) = normalized.filter(|_| is_whole) {
            writer.push(&entry).expect("an entry that was in a chunk");
        }
    }
    if is_whole {
        let sealed = writer.finish().expect("a chunk");
        let file = File::open(sealed.path()).expect("the chunk");
        let mut again = ChunkReader::open(file).expect("a chunk just written");
        again.verify().expect("a chunk just written");
        assert_eq!(again.identity(), chunk.identity());
        let read = &again.index().entries;
        assert_eq!(read.len(), entries.len());
        assert!(read.iter().zip(&entries).all(|(a, b)| a.is_same_entry(b)));
    }
    let bytes_of = |facts: &EntryFacts| {
        let commit = facts.transaction()?.commit;
        Some(u64::from(commit.page_count) * commit.page_size.get() as u64)
    };
    let largest = entries.iter().filter_map(bytes_of).max();
    largest.unwrap_or(0) <= RESTORED_BYTES_MAX
}

fn open(bytes: &[u8], scratch: &Path) -> Result<ChunkReader, durovfs_archive::ChunkError> {
    let mut file = tempfile::tempfile_in(scratch).expect("a file");
    file.write_all(bytes).expect("room for it");
    ChunkReader::open(file)
}

/// The entry, when its images can be read.
fn read_entry(
    chunk: &mut ChunkReader,
    facts: &EntryFacts,
    scratch: &Path,
) -> Option<NormalizedEntry> {
    let mut normalizer = Normalizer::new(scratch);
    let mut entry = None;
    let mut images = 0;
    let read = chunk.read_parts(facts, |part| {
        let slots = SlotPages::parse(&part.payload, part.header.page_size());
        images += slots.expect("slots").count();
        entry = normalizer.push(&part).expect("a part of an entry");
        Ok(())
    });
    read.ok()?;
    assert_eq!(images, facts.image_count() as usize);
    Some(entry.expect("an entry with its last part"))
}

/// Where the object stands; none when it says too little.
fn key_of(bytes: &[u8], edits: &KeyEdits) -> Option<String> {
    let footer: &[u8; 90] = bytes.last_chunk()?;
    let long = |at: usize| footer[at..at + 8].try_into().map(u64::from_le_bytes);
    let first_lsn = Lsn::new(edits.first_lsn.or(long(32).ok())?);
    let last_lsn = Lsn::new(edits.last_lsn.or(long(40).ok())?);
    let epoch = u32::from_le_bytes(footer[12..16].try_into().ok()?);
    let epoch = Epoch::new(edits.epoch.unwrap_or(epoch));
    let time = edits.time.or(long(56).ok().map(|time| time as i64))?;
    let time = Timestamp::from_micros(time);
    let range = ChunkRange {
        first_lsn,
        last_lsn,
        last_epoch: epoch,
        last_time: time,
    };
    let lsn = last_lsn;
    let point = SnapshotPoint { lsn, epoch, time };
    match footer[72] {
        0 => layout::chunk_key(NAME, DATABASE, &range).ok(),
        _ => layout::snapshot_key(NAME, DATABASE, &point).ok(),
    }
}

/// What is read as a key is one that the product would make, but for how it encodes the name.
fn read_key(key: &str) {
    let Some(parsed) = layout::parse_key(key) else {
        return;
    };
    let (name, database) = (&parsed.name, parsed.database);
    let again = match &parsed.object {
        ObjectName::Chunk(range) => layout::chunk_key(name, database, range),
        ObjectName::Snapshot(point) => layout::snapshot_key(name, database, point),
    };
    if let Ok(again) = again {
        assert_eq!(layout::parse_key(&again), Some(parsed));
    }
}

/// Everything that is asked of an archive.
async fn read_archive(store: MemoryStore, scratch: &Path) {
    let store: Arc<dyn Store> = Arc::new(store);
    let logs = Listing::load(store.as_ref(), NAME).await;
    for listing in logs.expect("a listing") {
        let archived_lsn = listing.archived_lsn();
        let index = ArchiveIndex::of(&store, listing.clone());
        let _ = index.covered().await;
        let _ = index.transactions(None, None).await;
        let _ = index.last_through(archived_lsn).await;
        if let Some(plan) = entries::plan(&listing, Lsn::new(1), archived_lsn) {
            let (sink, _parts) = tokio::sync::mpsc::channel(PARTS_MAX);
            let _ = entries::read(&store, &plan, scratch, &sink).await;
        }
    }
    let output = scratch.join("restored.db");
    let options = RestoreOptions::default();
    let restored = restore(&store, NAME, None, When::Latest, &output, &options, &|_| ()).await;
    let written = std::fs::metadata(&output).ok().map(|found| found.len());
    assert_eq!(restored.ok().map(|restored| restored.file_bytes), written);
}
