//! Torn ends are cut, damage is reported: the two must never be taken for each other.

use super::support::*;
use crate::disk::memory::MemoryDisk;
use crate::disk::{Disk, RealDisk};
use crate::format::{RawRecord, SEGMENT_HEADER_BYTES, SegmentHeader};
use crate::{Journal, JournalError, JournalOptions};
use durovfs_wire::position::Lsn;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::sync::Arc;

/// Starts and lengths of all records in a segment, with their sequences.
fn records(disk: &MemoryDisk, name: &str) -> Vec<(u64, u64, u64)> {
    let file = disk.open(name).unwrap();
    let mut bytes = vec![0; file.byte_count().unwrap() as usize];
    file.read_at(&mut bytes, 0).unwrap();
    let header = SegmentHeader::decode(&bytes).unwrap();
    let mut found = Vec::new();
    let mut offset = SEGMENT_HEADER_BYTES;
    while let Some(raw) = RawRecord::parse(&bytes[offset as usize..], header.salt) {
        found.push((raw.sequence, offset, raw.bytes));
        offset += raw.bytes;
    }
    found
}

fn only_segment(disk: &MemoryDisk) -> String {
    let names = disk.list().unwrap();
    names
        .into_iter()
        .find(|name| name.ends_with(".seg"))
        .unwrap()
}

/// Three batches: a promise and an epoch start; lsn 2; lsn 3, 4 and 5 in one. No mark follows.
fn three_batches() -> MemoryDisk {
    let disk = MemoryDisk::default();
    let journal = open(&disk);
    write(&journal, vec![promise(1, 1), start(1, 1, 1, None)]).unwrap();
    write(&journal, vec![transaction(1, 1, 2, vec![2; 100])]).unwrap();
    let last = (3..6)
        .map(|lsn| transaction(1, 1, lsn, vec![lsn as u8; 100]))
        .collect();
    write(&journal, last).unwrap();
    // Taken before the journal is closed: a mark would say that the last batch is durable.
    disk.copy()
}

fn last_lsn(disk: &MemoryDisk) -> u64 {
    open(disk).state(database(1)).unwrap().last.lsn.get()
}

/// Broken if this fails: a node does not start after a power cut, or starts with half an entry.
#[test]
fn a_file_cut_at_any_byte_of_the_last_batch_loses_only_what_was_cut() {
    let disk = three_batches();
    let name = only_segment(&disk);
    let records = records(&disk, &name);
    assert_eq!(records.len(), 6);
    let end = records[5].1 + records[5].2;
    for cut in records[3].1..=end {
        // All after the cut is missing, or was never written.
        for zeros in [false, true] {
            let disk = disk.copy();
            disk.edit(&name, |bytes| {
                let length = bytes.len();
                bytes.truncate(cut as usize);
                if zeros {
                    bytes.resize(length, 0);
                }
            });
            let whole = records
                .iter()
                .filter(|(_, offset, length)| offset + length <= cut)
                .count();
            let lsn = last_lsn(&disk);
            // The padding of a record may be missing: it is whole without.
            assert!(
                lsn == whole as u64 - 1 || lsn == whole as u64,
                "cut at {cut}: lsn {lsn}"
            );
            let journal = open(&disk);
            let next = transaction(1, 1, lsn + 1, vec![9; 700]);
            write(&journal, vec![next]).unwrap();
            journal.close();
            assert_eq!(last_lsn(&disk), lsn + 1, "what was cut came back at {cut}");
        }
    }
}

/// Broken if this fails: damage to synced entries is cut off silently, and a committed entry with
/// it.
#[test]
fn a_flipped_bit_before_the_last_batch_is_reported_and_nothing_is_touched() {
    let disk = three_batches();
    let name = only_segment(&disk);
    let records = records(&disk, &name);
    for (sequence, offset, _) in &records[..3] {
        for bit in 0..32 * 8 {
            let disk = disk.copy();
            disk.edit(&name, |bytes| {
                bytes[*offset as usize + bit / 8] ^= 1 << (bit % 8)
            });
            let error = try_open(&disk).err();
            let Some(JournalError::Damaged {
                segment,
                offset: at,
                ..
            }) = error
            else {
                panic!("record {sequence}, bit {bit}: {error:?}");
            };
            assert_eq!((segment.as_str(), at), (name.as_str(), *offset));
            assert!(
                matches!(try_open(&disk), Err(JournalError::Damaged { .. })),
                "was touched"
            );
        }
    }
}

/// Broken if this fails: a replica that lost power while it wrote is taken for damaged, because
/// the disk kept a later part of the batch and not an earlier one.
#[test]
fn a_batch_that_was_never_synced_may_be_torn_anywhere() {
    let disk = three_batches();
    let name = only_segment(&disk);
    let records = records(&disk, &name);
    for (index, (_, offset, length)) in records.iter().enumerate().skip(3) {
        let disk = disk.copy();
        let range = *offset as usize..(offset + length) as usize;
        disk.edit(&name, |bytes| bytes[range].fill(0));
        let lsn = last_lsn(&disk.copy());
        assert_eq!(lsn, index as u64 - 1);
        // The good records behind the hole must not come back when the hole is filled again.
        let journal = open(&disk);
        write(
            &journal,
            vec![transaction(1, 1, lsn + 1, vec![lsn as u8 + 1; 100])],
        )
        .unwrap();
        // Before a mark could take the place of what follows.
        assert_eq!(last_lsn(&disk.copy()), lsn + 1);
    }
}

/// Broken if this fails: bit rot in the last entry of a quiet database looks like a torn write,
/// and the entry is forgotten although it was acknowledged.
#[test]
fn after_a_mark_the_last_batch_is_protected_too() {
    let disk = MemoryDisk::default();
    let journal = open(&disk);
    write(&journal, vec![promise(1, 1), start(1, 1, 1, None)]).unwrap();
    journal.close();
    let name = only_segment(&disk);
    let records = records(&disk, &name);
    assert_eq!(records.len(), 3, "a mark follows");
    disk.edit(&name, |bytes| bytes[records[1].1 as usize + 20] ^= 1);
    assert!(matches!(try_open(&disk), Err(JournalError::Damaged { .. })));
}

/// Broken if this fails: the same for a journal that runs on but has nothing to do.
#[test]
fn an_idle_journal_writes_one_mark() {
    let disk = MemoryDisk::default();
    let journal = open(&disk);
    write(&journal, vec![promise(1, 1)]).unwrap();
    let name = only_segment(&disk);
    let begun = std::time::Instant::now();
    while records(&disk.copy(), &name).len() < 2 {
        assert!(begun.elapsed().as_secs() < 60, "no mark came");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    std::thread::sleep(std::time::Duration::from_millis(600));
    assert_eq!(records(&disk.copy(), &name).len(), 2, "marks of marks");
}

/// Broken if this fails: the tail of a sealed segment can vanish unseen when the next one is empty.
#[test]
fn a_sealed_segment_that_lost_its_end_is_damage() {
    let disk = MemoryDisk::default();
    let journal = open(&disk);
    write(&journal, vec![promise(1, 1), start(1, 1, 1, None)]).unwrap();
    let mut lsn = 1;
    while journal.usage().segment_count < 2 {
        lsn += 1;
        write(&journal, vec![transaction(1, 1, lsn, vec![1; 9000])]).unwrap();
    }
    drop(journal);
    let mut names: Vec<_> = disk.list().unwrap();
    names.retain(|name| name.ends_with(".seg"));
    names.sort();
    let records = records(&disk, &names[0]);
    let (_, offset, _) = records[records.len() - 1];
    disk.edit(&names[0], |bytes| bytes[offset as usize..].fill(0));
    disk.edit(&names[1], |bytes| {
        bytes[SEGMENT_HEADER_BYTES as usize..].fill(0)
    });
    assert!(matches!(try_open(&disk), Err(JournalError::Damaged { .. })));
    disk.remove(&names[0]).unwrap();
    let reopened = try_open(&disk);
    assert!(reopened.is_err() || reopened.unwrap().state(database(1)).is_none());
}

/// Broken if this fails: a database, and its promise, is forgotten when a node stops just after it
/// began a segment, and then deletes the one before.
#[test]
fn a_segment_is_kept_until_its_states_are_restated() {
    let disk = MemoryDisk::default();
    let journal = open(&disk);
    write(&journal, vec![promise(1, 4), start(1, 1, 1, None)]).unwrap();
    let mut lsn = 1;
    while journal.usage().segment_count < 2 {
        lsn += 1;
        let records = vec![transaction(1, 1, lsn, vec![1; 9000]), progress(1, lsn, lsn)];
        write(&journal, records).unwrap();
    }
    drop(journal);
    let mut names: Vec<_> = disk.list().unwrap();
    names.retain(|name| name.ends_with(".seg"));
    names.sort();
    // As if nothing was written to the second yet.
    disk.edit(&names[1], |bytes| {
        bytes[SEGMENT_HEADER_BYTES as usize..].fill(0)
    });
    let journal = open(&disk);
    journal.drop_through(database(1), Lsn::new(lsn - 1));
    journal.close();
    let journal = open(&disk);
    let state = journal.state(database(1)).unwrap();
    assert_eq!((state.promised.get(), state.last.lsn.get()), (4, lsn - 1));
    write(&journal, vec![promise(1, 5)]).unwrap();
    journal.drop_through(database(1), Lsn::new(lsn - 1));
    journal.close();
    let journal = open(&disk);
    assert_eq!(journal.usage().segment_count, 1);
    assert_eq!(
        journal.state(database(1)).unwrap().last,
        position(1, lsn - 1)
    );
}

/// Broken if this fails: a journal that never syncs reports damage after a power cut, because it
/// claims durability that nobody made.
#[test]
fn a_journal_without_sync_claims_nothing_durable() {
    let disk = MemoryDisk::default();
    let open = |disk: &MemoryDisk| Journal::open_on(Arc::new(disk.clone()), options(false));
    let (journal, _) = open(&disk).unwrap();
    write(&journal, vec![promise(1, 1), start(1, 1, 1, None)]).unwrap();
    for lsn in 2..30 {
        write(&journal, vec![transaction(1, 1, lsn, vec![1; 9000])]).unwrap();
    }
    assert!(journal.usage().segment_count > 3);
    let disk = disk.copy();
    let mut names = disk.list().unwrap();
    names.retain(|name| name.ends_with(".seg"));
    names.sort();
    let records = records(&disk, &names[1]);
    disk.edit(&names[1], |bytes| bytes[records[3].1 as usize] ^= 1);
    let (journal, states) = open(&disk).unwrap();
    assert_eq!(
        journal.usage().segment_count,
        2,
        "what follows the hole is gone"
    );
    let last = states[0].last.lsn.get();
    write(&journal, vec![transaction(1, 1, last + 1, vec![1; 9000])]).unwrap();
    drop(journal);
    let (_, states) = open(&disk).unwrap();
    assert_eq!(states[0].last.lsn, Lsn::new(last + 1));
}

/// Broken if this fails: an older program misreads a newer one's files instead of refusing them.
#[test]
fn another_version_and_another_process_are_refused_by_name() {
    let disk = three_batches();
    let name = only_segment(&disk);
    disk.edit(&name, |bytes| bytes[8] = 9);
    let expected = JournalError::UnsupportedVersion {
        segment: name,
        got: 9,
        supported: crate::format::FORMAT_VERSION,
    };
    assert_eq!(try_open(&disk).err(), Some(expected));

    let directory = tempfile::tempdir().unwrap();
    let held = RealDisk::open(directory.path()).unwrap();
    let options = JournalOptions::new(directory.path(), true);
    assert!(matches!(
        Journal::open(options),
        Err(JournalError::Locked { .. })
    ));
    drop(held);
}

/// Broken if this fails: a node whose disk returns garbage panics instead of saying so, or takes
/// garbage for entries.
#[test]
fn garbage_anywhere_is_cut_or_reported_but_never_believed() {
    let whole = three_batches();
    let name = only_segment(&whole);
    let seed = std::env::var("DUROVFS_SEED").map_or(7, |seed| seed.parse().unwrap());
    println!("DUROVFS_SEED={seed}");
    let mut draw = ChaCha8Rng::seed_from_u64(seed);
    let (mut cut, mut reported) = (0, 0);
    for _ in 0..400 {
        let disk = whole.copy();
        disk.edit(&name, |bytes| {
            let at = draw.random_range(0..5400);
            let length = draw.random_range(1..200);
            draw.fill(&mut bytes[at..at + length]);
        });
        match try_open(&disk) {
            Err(JournalError::Damaged { .. } | JournalError::UnsupportedVersion { .. }) => {
                reported += 1;
            }
            Err(error) => panic!("{error}"),
            Ok(journal) => {
                let state = journal.state(database(1)).unwrap();
                for entry in read(&journal, 1, 1, 9).iter().skip(1) {
                    assert_eq!(entry.payload, vec![entry.header.lsn.get() as u8; 100]);
                }
                assert!(
                    state.last.lsn >= Lsn::new(2),
                    "synced entries are gone: {state:?}"
                );
                cut += 1;
            }
        }
    }
    assert!(cut > 20 && reported > 20, "{cut} cut, {reported} reported");
}

/// Broken if this fails: a node that was killed says after its restart that it holds entries which
/// are in the system's cache only, and loses them when the power goes.
#[test]
fn what_a_restarted_journal_reports_is_on_disk() {
    let disk = MemoryDisk::default();
    let (killed, _) = Journal::open_on(Arc::new(disk.clone()), options(false)).unwrap();
    write(&killed, vec![promise(1, 1), start(1, 1, 1, None)]).unwrap();
    for lsn in 2..20 {
        write(&killed, vec![transaction(1, 1, lsn, vec![1; 9000])]).unwrap();
    }
    assert!(killed.usage().segment_count > 2);
    let restarted = open(&disk);
    assert_eq!(restarted.state(database(1)).unwrap().last, position(1, 19));
    let found = open(&disk.crash(&mut |_| 0));
    assert_eq!(found.state(database(1)).unwrap().last, position(1, 19));
}
