//! Damage with `mend`: it is reported once, no promise is forgotten, what is left is true, and a
//! database that may have lost something is marked.
//!
//! `DUROVFS_SEED` replays one history.

use super::support::*;
use crate::disk::Disk;
use crate::disk::memory::MemoryDisk;
use crate::format::{RawRecord, SEGMENT_HEADER_BYTES, SegmentHeader};
use crate::promises::PROMISES_NAME;
use crate::{DatabaseState, Journal, JournalError, JournalOptions, Record};
use durovfs_wire::entry::EntryPart;
use durovfs_wire::position::Lsn;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::sync::Arc;

const HISTORIES: u64 = 150;
const DATABASES: u8 = 3;

fn mend(disk: &MemoryDisk) -> Result<(Journal, Vec<DatabaseState>), JournalError> {
    let options = JournalOptions {
        mend: true,
        ..options(true)
    };
    Journal::open_on(Arc::new(disk.clone()), options)
}

fn segments(disk: &MemoryDisk) -> Vec<String> {
    let mut names = disk.list().unwrap();
    names.retain(|name| name.ends_with(".seg"));
    names.sort();
    names
}

/// Starts and lengths of all records in a segment.
fn records(disk: &MemoryDisk, name: &str) -> Vec<(usize, usize)> {
    let file = disk.open(name).unwrap();
    let mut bytes = vec![0; file.byte_count().unwrap() as usize];
    file.read_at(&mut bytes, 0).unwrap();
    let salt = SegmentHeader::decode(&bytes).unwrap().salt;
    let mut found = Vec::new();
    let mut offset = SEGMENT_HEADER_BYTES as usize;
    while let Some(raw) = RawRecord::parse(&bytes[offset..], salt) {
        found.push((offset, raw.bytes as usize));
        offset += raw.bytes as usize;
    }
    found
}

/// Some databases with promises, entries, large entries, cuts and progress, over some segments.
fn history(random: &mut ChaCha8Rng) -> MemoryDisk {
    let disk = MemoryDisk::default();
    let journal = open(&disk);
    let mut epochs = [0u32; DATABASES as usize + 1];
    for _ in 0..random.random_range(20..140) {
        let number = random.random_range(1..=DATABASES);
        let epoch = &mut epochs[number as usize];
        let state = journal.state(database(number));
        let next = state.as_ref().map_or(1, |state| state.last.lsn.get() + 1);
        let last_transaction = state.as_ref().and_then(|state| state.last_transaction);
        let payload = vec![next as u8; random.random_range(100..6000)];
        let in_epoch = state.as_ref().is_some_and(|s| s.last.epoch.get() == *epoch);
        let records = match random.random_range(0..12) {
            0 => {
                *epoch += 1;
                vec![promise(number, *epoch)]
            }
            _ if *epoch == 0 => continue,
            _ if !in_epoch => vec![start(number, *epoch, next, last_transaction)],
            1 => vec![progress(number, next - 1, next / 2)],
            2 if state.as_ref().is_some_and(|s| s.commit_lsn < s.last.lsn) => {
                let state = state.unwrap();
                let after = state.commit_lsn.get();
                let mut runs = state.history.iter().rev();
                let of = runs.find(|run| run.first_lsn.get() <= after);
                let Some(of) = of else { continue };
                *epoch += 1;
                vec![
                    promise(number, *epoch),
                    truncate(number, of.epoch.get(), after),
                ]
            }
            3 => vec![
                pages(number, *epoch, next, 0, payload.clone()),
                last_part(number, *epoch, next, 1, payload),
            ],
            _ => vec![transaction(number, *epoch, next, payload)],
        };
        write(&journal, records).unwrap();
    }
    journal.close();
    disk
}

/// Damages something that is not the last thing in the journal; says what.
fn damage(disk: &MemoryDisk, random: &mut ChaCha8Rng) -> Option<String> {
    let names = segments(disk);
    let name = names[random.random_range(0..names.len())].clone();
    match random.random_range(0..8) {
        0 if names.len() > 2 => {
            let name = names[random.random_range(1..names.len() - 1)].clone();
            disk.remove(&name).unwrap();
            Some(format!("{name} is gone"))
        }
        1 => {
            disk.edit(&name, |bytes| bytes[20] ^= 4);
            Some(format!("header of {name}"))
        }
        kind => {
            let records = records(disk, &name);
            if records.len() < 2 {
                return None;
            }
            let first = random.random_range(0..records.len() - 1);
            let count = if kind < 5 {
                1
            } else {
                random.random_range(1..9)
            };
            let last = (first + count).min(records.len() - 1);
            for (offset, length) in &records[first..last] {
                let at = offset + random.random_range(0..(*length).min(40));
                disk.edit(&name, |bytes| bytes[at] ^= 1 << random.random_range(0..8));
            }
            Some(format!("records {first}..{last} of {name}"))
        }
    }
}

fn held(journal: &Journal, state: &DatabaseState) -> Vec<EntryPart> {
    let parts = journal.parts(state.database, state.first_lsn, state.last.lsn);
    parts.unwrap().map(Result::unwrap).collect()
}

fn check_left(truth: &DatabaseState, left: &DatabaseState, what: &str) {
    assert_eq!(left.promised, truth.promised, "{what}: promise");
    assert_eq!(left.claimant, truth.claimant, "{what}: claimant");
    if left.mending {
        assert!(left.commit_lsn <= truth.commit_lsn, "{what}: commit_lsn");
        assert!(left.commit_lsn <= left.last.lsn, "{what}: {left:?}");
        assert!(left.last.epoch <= left.promised, "{what}: {left:?}");
    } else {
        assert_eq!(left, truth, "{what}: not marked, but something is missing");
    }
}

fn check_history(seed: u64) {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let disk = history(&mut random);
    let (whole, truth) = mend(&disk.copy()).unwrap();
    if truth.is_empty() {
        return; // nothing was ever promised
    }
    let truth_parts: Vec<EntryPart> = truth.iter().flat_map(|s| held(&whole, s)).collect();
    let Some(what) = damage(&disk, &mut random) else {
        return;
    };
    let what = format!("DUROVFS_SEED={seed}: {what}");
    let untouched = disk.copy();
    let strict = Journal::open_on(Arc::new(untouched), options(true));
    assert!(
        matches!(strict, Err(JournalError::Damaged { .. })),
        "{what}: not found"
    );
    let (journal, left) = mend(&disk).unwrap_or_else(|error| panic!("{what}: {error}"));
    assert!(!journal.damages().is_empty(), "{what}: not reported");
    for truth in &truth {
        let state = left.iter().find(|s| s.database == truth.database);
        let state = state.unwrap_or_else(|| panic!("{what}: a database is forgotten"));
        check_left(truth, state, &what);
        // What is below commit_lsn is part of the true log; above it may have been cut since.
        for part in held(&journal, state) {
            let committed = part.header.lsn <= state.commit_lsn;
            assert!(
                !committed || part.header.lsn < truth.first_lsn || truth_parts.contains(&part),
                "{what}: another entry than was written: {:?}",
                part.header
            );
        }
    }
    // Built upon, and opened again by the strict rules: the same, and not reported again.
    let before = journal.databases();
    write(&journal, vec![promise(9, 1)]).unwrap();
    drop(journal);
    let again = Journal::open_on(Arc::new(disk.copy()), options(true));
    let (again, states) = again.unwrap_or_else(|error| panic!("{what}: reported twice: {error}"));
    for state in &before {
        assert_eq!(
            Some(state),
            states.iter().find(|s| s.database == state.database),
            "{what}"
        );
        held(&again, state);
    }
    go_on(&again, &before, &what);
}

/// What is left takes entries again, and a promise.
fn go_on(journal: &Journal, states: &[DatabaseState], what: &str) {
    for state in states {
        let number = state.database.as_bytes()[0];
        let epoch = state.promised.get() + 1;
        let next = state.last.lsn.get() + 1;
        let records = vec![
            promise(number, epoch),
            start(number, epoch, next, state.last_transaction),
        ];
        write(journal, records).unwrap_or_else(|error| panic!("{what}: {error}"));
        let mended = Record::Mended {
            database: state.database,
        };
        write(journal, vec![mended]).unwrap();
        let now = journal.state(state.database).unwrap();
        assert!(
            !now.mending && now.last == position(epoch, next),
            "{what}: {now:?}"
        );
    }
}

/// Broken if this fails: a replica with a damaged journal forgets a promise, takes entries for
/// others than they are, or votes as if it had lost nothing.
#[test]
fn whatever_is_damaged_no_promise_is_forgotten_and_what_may_be_lost_is_marked() {
    if let Ok(seed) = std::env::var("DUROVFS_SEED") {
        return check_history(seed.parse().unwrap());
    }
    for seed in 0..HISTORIES {
        check_history(seed);
    }
}

/// Broken if this fails: one flipped bit in an old segment takes the votes of all databases.
#[test]
fn behind_restated_states_only_the_database_that_lost_an_entry_is_marked() {
    let disk = MemoryDisk::default();
    let journal = open(&disk);
    for number in [1, 2] {
        write(
            &journal,
            vec![promise(number, 1), start(number, 1, 1, None)],
        )
        .unwrap();
    }
    let mut lsn = 1;
    while journal.usage().segment_count < 2 {
        lsn += 1;
        for number in [1, 2] {
            write(
                &journal,
                vec![transaction(number, 1, lsn, vec![number; 5000])],
            )
            .unwrap();
        }
    }
    drop(journal);
    let name = segments(&disk).remove(0);
    let (offset, _) = records(&disk, &name)[4];
    disk.edit(&name, |bytes| bytes[offset + 1000] ^= 1);
    let (journal, states) = mend(&disk).unwrap();
    let [one, two] = &states[..] else { panic!() };
    assert!(one.mending && !two.mending, "{states:?}");
    assert_eq!(
        one.last.lsn.get(),
        1,
        "the entry before the one that is lost"
    );
    assert_eq!(two.last.lsn.get(), lsn);
    assert_eq!(read(&journal, 2, 1, lsn).len() as u64, lsn);
}

/// Broken if this fails: a replica whose promises are lost takes part, and two primaries commit.
#[test]
fn without_the_second_file_of_promises_a_damaged_journal_is_refused() {
    let disk = MemoryDisk::default();
    let journal = open(&disk);
    write(&journal, vec![promise(1, 7)]).unwrap();
    write(&journal, vec![promise(1, 8)]).unwrap();
    journal.close();
    let name = segments(&disk).remove(0);
    let (offset, _) = records(&disk, &name)[1];
    disk.edit(&name, |bytes| bytes[offset + 12] ^= 1);
    let (_, states) = mend(&disk.copy()).unwrap();
    assert_eq!(states[0].promised.get(), 8);
    let spoiled = disk.copy();
    spoiled.edit(PROMISES_NAME, |bytes| *bytes.last_mut().unwrap() ^= 1);
    assert!(matches!(mend(&spoiled), Err(JournalError::Damaged { .. })));
    disk.remove(PROMISES_NAME).unwrap();
    assert!(matches!(mend(&disk), Err(JournalError::Damaged { .. })));
}

/// Broken if this fails: an entry that went bad while the journal is open stays so for ever, or the
/// repair is undone by the next start.
#[test]
fn an_entry_that_cannot_be_read_is_told_cut_off_and_written_again() {
    let disk = MemoryDisk::default();
    let journal = open(&disk);
    write(&journal, vec![promise(1, 1), start(1, 1, 1, None)]).unwrap();
    for lsn in 2..6 {
        write(&journal, vec![transaction(1, 1, lsn, vec![1; 3000])]).unwrap();
    }
    write(&journal, vec![progress(1, 5, 0)]).unwrap();
    let name = segments(&disk).remove(0);
    let (offset, _) = records(&disk, &name)[3];
    disk.edit(&name, |bytes| bytes[offset + 500] ^= 1);
    let parts = journal
        .parts(database(1), Lsn::new(1), Lsn::new(5))
        .unwrap();
    assert_eq!(parts.filter(Result::is_ok).count(), 2);
    let [found] = &journal.take_unreadable()[..] else {
        panic!("nothing was told")
    };
    assert_eq!((found.database, found.lsn.get()), (database(1), 3));
    assert!(journal.take_unreadable().is_empty());
    let damaged = Record::Damaged {
        database: database(1),
        first_lsn: Lsn::new(3),
    };
    write(&journal, vec![damaged]).unwrap();
    let state = journal.state(database(1)).unwrap();
    assert!(state.mending && state.last.lsn.get() == 2 && state.commit_lsn.get() == 2);
    // Asked for before the damage was known: only what is left is dropped.
    journal.drop_through(database(1), Lsn::new(5));
    assert_eq!(journal.state(database(1)).unwrap().first_lsn.get(), 3);
    for lsn in 3..6 {
        write(&journal, vec![transaction(1, 1, lsn, vec![1; 3000])]).unwrap();
    }
    let mended = Record::Mended {
        database: database(1),
    };
    write(&journal, vec![mended]).unwrap();
    let before = journal.state(database(1)).unwrap();
    drop(journal);
    let journal = open(&disk);
    assert_eq!(journal.state(database(1)).unwrap(), before);
    assert_eq!(read(&journal, 1, 3, 5).len(), 3);
}

/// Broken if this fails: what goes bad after a repair, in a segment older than the repair, is not
/// reported.
#[test]
fn more_damage_before_a_known_one_is_reported() {
    let disk = MemoryDisk::default();
    let journal = open(&disk);
    write(&journal, vec![promise(1, 1), start(1, 1, 1, None)]).unwrap();
    for lsn in 2..=60 {
        write(&journal, vec![transaction(1, 1, lsn, vec![1; 5000])]).unwrap();
    }
    journal.close();
    let names = segments(&disk);
    assert!(names.len() > 3);
    let flip = |name: &str, record: usize| {
        let (offset, _) = records(&disk, name)[record];
        disk.edit(name, |bytes| bytes[offset + 600] ^= 1);
    };
    flip(&names[2], 5);
    let (journal, states) = mend(&disk).unwrap();
    let left = states[0].last.lsn.get();
    assert!(left > 20 && left < 60, "{left}");
    write(&journal, vec![promise(1, 2)]).unwrap();
    drop(journal);
    assert!(try_open(&disk.copy()).is_ok(), "known");
    flip(&names[1], 5);
    assert!(matches!(
        try_open(&disk.copy()),
        Err(JournalError::Damaged { .. })
    ));
    let (journal, states) = mend(&disk).unwrap();
    assert_eq!(journal.damages().len(), 2);
    assert!(states[0].mending && states[0].last.lsn.get() < left);
    assert_eq!(states[0].promised.get(), 2);
}

/// Broken if this fails: a journal that does not sync takes damage before a known one for a torn
/// end, and throws away all that follows.
#[test]
fn the_same_without_syncs() {
    let disk = MemoryDisk::default();
    let (journal, _) = Journal::open_on(Arc::new(disk.clone()), options(false)).unwrap();
    write(&journal, vec![promise(1, 1), start(1, 1, 1, None)]).unwrap();
    for lsn in 2..=9 {
        write(&journal, vec![transaction(1, 1, lsn, vec![1; 3000])]).unwrap();
    }
    let name = segments(&disk).remove(0);
    let flip = |record: usize| {
        let (offset, _) = records(&disk, &name)[record];
        disk.edit(&name, |bytes| bytes[offset + 600] ^= 1);
    };
    flip(6);
    let damaged = Record::Damaged {
        database: database(1),
        first_lsn: Lsn::new(6),
    };
    write(&journal, vec![damaged]).unwrap();
    for lsn in 6..=9 {
        write(&journal, vec![transaction(1, 1, lsn, vec![1; 3000])]).unwrap();
    }
    assert_eq!(segments(&disk).len(), 2);
    let mend = |disk: &MemoryDisk| {
        let options = JournalOptions {
            mend: true,
            ..options(false)
        };
        Journal::open_on(Arc::new(disk.copy()), options).unwrap()
    };
    let (journal, states) = mend(&disk);
    assert_eq!(journal.damages(), []);
    assert_eq!(states[0].last.lsn.get(), 9);
    flip(4);
    let (journal, states) = mend(&disk);
    assert!(!journal.damages().is_empty());
    assert_eq!(states[0].last.lsn.get(), 3);
}
