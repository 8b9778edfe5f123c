//! Compaction: a database that keeps its entries does not keep the segments of all others.
//!
//! `DUROVFS_SEED` replays one history.

use super::support::*;
use crate::disk::memory::MemoryDisk;
use crate::{Journal, JournalOptions};
use durovfs_wire::position::Lsn;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeMap;
use std::sync::Arc;

const HISTORIES: u64 = 25;
const SEGMENTS_MAX: u64 = 12;

fn open_small(disk: &MemoryDisk) -> Journal {
    let options = JournalOptions {
        limit_bytes: SEGMENTS_MAX * (64 << 10),
        ..options(true)
    };
    Journal::open_on(Arc::new(disk.clone()), options).unwrap().0
}

/// Writes, commits and drops so much of a database that a journal without compaction is full.
fn churn(journal: &Journal, number: u8, lsns: std::ops::RangeInclusive<u64>) {
    for lsn in lsns {
        write(
            journal,
            vec![transaction(number, 1, lsn, vec![number; 20_000])],
        )
        .unwrap();
        write(journal, vec![progress(number, lsn, lsn)]).unwrap();
        journal.drop_through(database(number), Lsn::new(lsn));
    }
}

/// Broken if this fails: one database that is never archived fills the journal for all others.
#[test]
fn a_database_that_keeps_its_entries_does_not_keep_the_segments_of_others() {
    let disk = MemoryDisk::default();
    let journal = open_small(&disk);
    for number in [1, 2] {
        write(
            &journal,
            vec![promise(number, 1), start(number, 1, 1, None)],
        )
        .unwrap();
    }
    // In parts, in one, and over two segments.
    write(&journal, vec![pages(1, 1, 2, 0, vec![1; 9000])]).unwrap();
    write(&journal, vec![last_part(1, 1, 2, 1, vec![2; 9000])]).unwrap();
    write(&journal, vec![transaction(1, 1, 3, vec![3; 3000])]).unwrap();
    churn(&journal, 2, 2..=5);
    write(&journal, vec![transaction(1, 1, 4, vec![4; 3000])]).unwrap();
    let kept = read(&journal, 1, 1, 4);
    let state = journal.state(database(1)).unwrap();
    let bytes = journal.entry_bytes(database(1), Lsn::new(1), Lsn::new(4));
    churn(&journal, 2, 6..=200);
    let usage = journal.usage();
    assert!(
        usage.segment_count as u64 <= SEGMENTS_MAX / 2 + 2,
        "{usage:?}"
    );
    let percent = usage.bytes * 100 / usage.limit_bytes;
    assert_eq!(u64::from(journal.percent_taken()), percent);
    assert_eq!(read(&journal, 1, 1, 4), kept);
    drop(journal);
    for _ in 0..2 {
        let journal = open_small(&disk);
        assert_eq!(journal.state(database(1)).unwrap(), state);
        assert_eq!(read(&journal, 1, 1, 4), kept);
        let left = journal.entry_bytes(database(1), Lsn::new(1), Lsn::new(4));
        assert_eq!(left, bytes);
        let next = journal.state(database(2)).unwrap().last.lsn.get() + 1;
        churn(&journal, 2, next..=next + 60);
    }
}

/// Broken if this fails: a host that dies while it sends a large entry fills the journals of its
/// replicas, for all databases, once and for all.
#[test]
fn an_entry_that_is_never_complete_does_not_keep_the_segments_of_others() {
    let disk = MemoryDisk::default();
    let journal = open_small(&disk);
    for number in [1, 2] {
        write(
            &journal,
            vec![promise(number, 1), start(number, 1, 1, None)],
        )
        .unwrap();
    }
    write(&journal, vec![pages(1, 1, 2, 0, vec![1; 9000])]).unwrap();
    // As long as there is room it may still be completed.
    churn(&journal, 2, 2..=20);
    write(&journal, vec![pages(1, 1, 2, 1, vec![1; 9000])]).unwrap();
    churn(&journal, 2, 21..=200);
    let usage = journal.usage();
    assert!((usage.segment_count as u64) < SEGMENTS_MAX, "{usage:?}");
    let state = journal.state(database(1)).unwrap();
    assert_eq!(state.last.lsn, Lsn::new(1));
    write(&journal, vec![last_part(1, 1, 2, 2, vec![2; 9000])])
        .expect_err("its first parts are gone");
    journal.resume(database(1));
    drop(journal);
    let journal = open_small(&disk);
    assert_eq!(journal.state(database(1)).unwrap(), state);
    write(&journal, vec![transaction(1, 1, 2, vec![3; 3000])]).unwrap();
    assert_eq!(read(&journal, 1, 1, 2).len(), 2);
}

/// Broken if this fails: a journal that is full of what is needed is written again and again.
#[test]
fn what_is_needed_is_not_moved_for_nothing() {
    let disk = MemoryDisk::default();
    let journal = open_small(&disk);
    write(&journal, vec![promise(1, 1), start(1, 1, 1, None)]).unwrap();
    let full = (2..).find(|lsn| {
        let record = transaction(1, 1, *lsn, vec![1; 20_000]);
        write(&journal, vec![record]).is_err()
    });
    let held = journal.state(database(1)).unwrap().last.lsn.get();
    assert_eq!(full, Some(held + 1));
    assert!(held >= SEGMENTS_MAX * 2, "{held} entries fit");
    assert_eq!(read(&journal, 1, 1, held).len() as u64, held);
}

/// Payload sizes of the entries that each database must hold, by lsn.
type Model = BTreeMap<u8, BTreeMap<u64, usize>>;

fn check(disk: &MemoryDisk, model: &Model, what: &str) {
    let journal = open_small(disk);
    for (number, entries) in model {
        let Some(state) = journal.state(database(*number)) else {
            panic!("{what}: database {number} is gone")
        };
        let first = entries.keys().next().copied();
        let first = first.unwrap_or(state.last.lsn.get() + 1);
        assert!(
            state.first_lsn.get() <= first,
            "{what}: {number}: {state:?}"
        );
        let last = state.last.lsn.get();
        assert_eq!(
            entries.keys().next_back().copied().unwrap_or(last),
            last,
            "{what}"
        );
        let parts = read(&journal, *number, first, last);
        let sizes: BTreeMap<u64, usize> = parts
            .iter()
            .map(|part| (part.header.lsn.get(), part.payload.len()))
            .collect();
        assert_eq!(&sizes, entries, "{what}: database {number}");
    }
}

fn check_history(seed: u64) {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let disk = MemoryDisk::default();
    let mut journal = open_small(&disk);
    let mut model = Model::new();
    let mut epochs = BTreeMap::new();
    for number in 1..=4 {
        write(
            &journal,
            vec![promise(number, 1), start(number, 1, 1, None)],
        )
        .unwrap();
        model.insert(number, [(1, 0)].into());
        epochs.insert(number, 1u32);
    }
    for step in 0..400 {
        // The first two keep what they have for long.
        let number = [1, 2, 3, 3, 3, 4, 4, 4][random.random_range(0..8)];
        let entries = model.get_mut(&number).unwrap();
        let epoch = epochs[&number];
        let state = journal.state(database(number)).unwrap();
        let (last, commit) = (state.last.lsn.get(), state.commit_lsn.get());
        let quiet = number < 3;
        match random.random_range(0..20) {
            0..10 => {
                let bytes = random.random_range(10..if quiet { 3000 } else { 20_000 });
                let record = transaction(number, epoch, last + 1, vec![number; bytes]);
                if write(&journal, vec![record]).is_ok() {
                    entries.insert(last + 1, bytes);
                }
            }
            10..16 if !quiet || random.random_range(0..12) == 0 => {
                write(&journal, vec![progress(number, last, last)]).unwrap();
                journal.drop_through(database(number), Lsn::new(last));
                entries.clear();
            }
            16 if last > commit => {
                let after = random.random_range(commit..last).max(1);
                let Some(of) = state
                    .history
                    .iter()
                    .rev()
                    .find(|r| r.first_lsn.get() <= after)
                else {
                    continue;
                };
                let cut = truncate(number, of.epoch.get(), after);
                let base = journal.transactions(database(number), Lsn::new(1), Lsn::new(after));
                write(&journal, vec![promise(number, epoch + 1), cut]).unwrap();
                epochs.insert(number, epoch + 1);
                entries.split_off(&(after + 1));
                let now = journal.state(database(number)).unwrap();
                assert!(base.is_empty() || now.last_transaction == base.last().copied());
                let begin = start(number, epoch + 1, after + 1, now.last_transaction);
                if write(&journal, vec![begin]).is_ok() {
                    entries.insert(after + 1, 0);
                } else {
                    return; // full: the epoch cannot begin
                }
            }
            17 => {
                drop(journal);
                journal = open_small(&disk);
            }
            _ => {}
        }
        if step % 20 == 0 {
            // Whatever a power cut leaves.
            let left = disk.survivor(&mut |below| random.random_range(0..below));
            check(&left, &model, &format!("DUROVFS_SEED={seed}, step {step}"));
        }
    }
    drop(journal);
    check(&disk, &model, &format!("DUROVFS_SEED={seed}, at the end"));
}

/// Broken if this fails: an entry is lost, or comes back, because it was moved.
#[test]
fn moved_entries_are_there_after_any_crash_and_dropped_ones_stay_dropped() {
    if let Ok(seed) = std::env::var("DUROVFS_SEED") {
        return check_history(seed.parse().unwrap());
    }
    (0..HISTORIES).for_each(check_history);
}
