//! Segments come and go, room ends and comes back, disks fail; what was acknowledged stays.

use super::support::*;
use crate::disk::memory::MemoryDisk;
use crate::{Journal, JournalError, JournalOptions, Record};
use durovfs_wire::position::{Epoch, Lsn};
use std::sync::{Arc, mpsc};
use std::time::Duration;

fn fill(journal: &Journal, from: u64) -> (u64, JournalError) {
    let mut lsn = from;
    loop {
        match write(journal, vec![transaction(1, 1, lsn, vec![lsn as u8; 5000])]) {
            Ok(()) => lsn += 1,
            Err(error) => return (lsn, error),
        }
    }
}

fn small(disk: &MemoryDisk, segments: u64) -> Journal {
    let options = JournalOptions {
        limit_bytes: segments * (64 << 10),
        ..options(true)
    };
    Journal::open_on(Arc::new(disk.clone()), options).unwrap().0
}

/// Broken if this fails: old segments pile up, or a database is forgotten when they go.
#[test]
fn dropped_segments_are_deleted_and_states_outlive_them() {
    let disk = MemoryDisk::default();
    let mut journal = open(&disk);
    write(
        &journal,
        vec![promise(2, 7), start(2, 7, 1, None), progress(2, 1, 1)],
    )
    .unwrap();
    journal.drop_through(database(2), Lsn::new(1));
    write(&journal, vec![promise(1, 1), start(1, 1, 1, None)]).unwrap();
    for lsn in 2..200 {
        let first = pages(1, 1, lsn, 0, vec![lsn as u8; 3000]);
        write(&journal, vec![first]).unwrap();
        let last = last_part(1, 1, lsn, 1, vec![lsn as u8; 2000]);
        write(&journal, vec![last, progress(1, lsn, lsn)]).unwrap();
        if lsn > 20 {
            journal.drop_through(database(1), Lsn::new(lsn - 20));
        }
        if lsn % 7 == 0 {
            drop(journal);
            journal = open(&disk);
        }
        let held = journal.state(database(1)).unwrap();
        assert!(held.first_lsn.get() <= lsn.saturating_sub(20) + 1);
        assert_eq!(held.last, position(1, lsn));
        assert_eq!(held.last_transaction, Some(summary(1, lsn)));
        let parts = read(&journal, 1, held.first_lsn.get(), lsn);
        assert_eq!(
            parts.len() as u64,
            2 * (lsn + 1 - held.first_lsn.get()) - u64::from(held.first_lsn.get() == 1)
        );
    }
    assert!(journal.usage().segment_count <= 5, "{:?}", journal.usage());
    let quiet = journal.state(database(2)).unwrap();
    assert_eq!(
        (quiet.promised, quiet.last),
        (Epoch::new(7), position(7, 1))
    );
    assert_eq!(quiet.name, "db-2");
    let gone = journal.parts(database(1), Lsn::new(1), Lsn::new(9));
    assert!(matches!(gone, Err(JournalError::Gone { .. })));
}

/// Broken if this fails: an entry that is not committed could be dropped, and lost for good.
#[test]
#[should_panic(expected = "must not be dropped")]
fn dropping_what_is_not_committed_stops_the_node() {
    let journal = open(&MemoryDisk::default());
    let records = vec![
        promise(1, 1),
        start(1, 1, 1, None),
        transaction(1, 1, 2, vec![]),
        progress(1, 1, 1),
    ];
    write(&journal, records).unwrap();
    journal.drop_through(database(1), Lsn::new(2));
}

/// Broken if this fails: a full replica cannot promise, so a database cannot be taken over; or it
/// never recovers when the archive is back.
#[test]
fn a_full_journal_refuses_entries_but_not_promises_and_recovers() {
    let disk = MemoryDisk::default();
    let journal = small(&disk, 3);
    write(&journal, vec![promise(1, 1), start(1, 1, 1, None)]).unwrap();
    let (lsn, error) = fill(&journal, 2);
    assert!(matches!(error, JournalError::Full { .. }), "{error:?}");
    assert!(journal.trouble().unwrap().contains("full"));
    assert!(journal.usage().disk_bytes <= 3 * (64 << 10));
    for epoch in 2..300 {
        write(&journal, vec![promise(1, epoch)]).unwrap();
    }
    write(&journal, vec![progress(1, lsn - 1, lsn - 1)]).unwrap();
    journal.drop_through(database(1), Lsn::new(lsn - 1));
    let (after, _) = fill(&journal, lsn);
    assert!(after > lsn + 10, "entries are taken again");
    drop(journal);
    let journal = small(&disk, 3);
    let state = journal.state(database(1)).unwrap();
    assert_eq!(
        (state.last, state.promised),
        (position(1, after - 1), Epoch::new(299))
    );
}

/// Broken if this fails: a full file system stops promises at once, or the node needs a restart
/// when there is room again.
#[test]
fn a_full_disk_refuses_entries_until_there_is_room() {
    let disk = MemoryDisk::default();
    let journal = open(&disk);
    write(&journal, vec![promise(1, 1), start(1, 1, 1, None)]).unwrap();
    disk.limit_room(Some(100 << 10));
    let (lsn, error) = fill(&journal, 2);
    assert!(matches!(error, JournalError::Full { .. }), "{error:?}");
    assert!(journal.trouble().is_some());
    write(&journal, vec![promise(1, 2)]).unwrap();
    disk.limit_room(None);
    let begun = std::time::Instant::now();
    while write(&journal, vec![transaction(1, 1, lsn, vec![1; 5000])]).is_err() {
        assert!(begun.elapsed().as_secs() < 60, "room came back unnoticed");
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    assert_eq!(journal.trouble(), None);
    drop(journal);
    assert_eq!(
        open(&disk).state(database(1)).unwrap().last,
        position(1, lsn)
    );
}

/// Broken if this fails: after a disk error something is acknowledged that is not on disk, or
/// something that failed comes back between entries that did not.
#[test]
fn one_failed_operation_anywhere_loses_nothing_acknowledged() {
    // In parallel: after a failed preparation a second passes before the next.
    const THREADS: u64 = 8;
    let threads: Vec<_> = (0..THREADS)
        .map(|first| {
            std::thread::spawn(move || {
                (0..25)
                    .filter(|step| write_with_fault(first + step * THREADS))
                    .count()
            })
        })
        .collect();
    let failed: usize = threads
        .into_iter()
        .map(|thread| thread.join().unwrap())
        .sum();
    assert!(failed > 100, "only {failed} faults were met");
}

/// One run whose disk fails once; whether an append failed.
fn write_with_fault(fault: u64) -> bool {
    let disk = MemoryDisk::default();
    let journal = open(&disk);
    write(&journal, vec![promise(1, 1), start(1, 1, 1, None)]).unwrap();
    disk.fail_after(fault);
    let (mut lsn, mut failures) = (2, 0);
    while lsn < 60 {
        match write(&journal, vec![transaction(1, 1, lsn, vec![failures; 4000])]) {
            Ok(()) => lsn += 1,
            Err(_) => failures += 1,
        }
        assert!(failures < 250, "fault {fault} never passes");
        if failures > 1 {
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
    }
    let expected = read(&journal, 1, 1, lsn);
    assert_eq!(expected.len(), 59);
    // Power goes: only what was synced is left.
    let disk = disk.crash(&mut |_| 0);
    drop(journal);
    let journal = open(&disk);
    assert_eq!(
        journal.state(database(1)).unwrap().last,
        position(1, lsn - 1),
        "{fault}"
    );
    assert_eq!(read(&journal, 1, 1, lsn), expected, "fault {fault}");
    failures > 0
}

/// Broken if this fails: what failed to be synced, and was told to have failed, is found after a
/// restart behind what took its place.
#[test]
fn a_failed_batch_never_comes_back_behind_its_successor() {
    for operation in 0..2 {
        let disk = MemoryDisk::default();
        let journal = open(&disk);
        write(&journal, vec![promise(1, 1), start(1, 1, 1, None)]).unwrap();
        let failing = (2..6)
            .map(|lsn| transaction(1, 1, lsn, vec![1; 800]))
            .collect();
        assert!(write_failing(&journal, &disk, operation, failing).is_err());
        write(&journal, vec![transaction(1, 1, 2, vec![2; 800])]).unwrap();
        // Before a mark could take the place of what follows.
        let found = open(&disk.copy());
        assert_eq!(found.state(database(1)).unwrap().last, position(1, 2));
        assert_eq!(read(&found, 1, 2, 2)[0].payload[0], 2);
        let found = open(&disk.crash(&mut |_| 0));
        assert_eq!(found.state(database(1)).unwrap().last, position(1, 2));
    }
}

/// Broken if this fails: a promise whose second copy cannot be written, at the beginning of a
/// segment, takes the states with it that the segment is to begin with; when the older segments go,
/// the journal is damaged.
#[test]
fn a_promise_that_fails_leaves_no_segment_without_states() {
    let mut failed = 0;
    for fault in 0..12 {
        let disk = MemoryDisk::default();
        // Without threads, so that each fault has its place.
        let opened = Journal::open_driven(Arc::new(disk.clone()), &options(true));
        let (journal, mut driver, _) = opened.unwrap();
        let mut attempt = |records: Vec<Record>| {
            let (sender, receiver) = mpsc::channel();
            journal.resume(database(1));
            let done = move |result| sender.send(result).unwrap();
            journal.append(records, Box::new(done));
            driver.write_waiting();
            driver.rest();
            receiver.recv().unwrap()
        };
        let quiet = vec![promise(2, 7), start(2, 7, 1, None), progress(2, 1, 1)];
        attempt(quiet).unwrap();
        journal.drop_through(database(2), Lsn::new(1));
        let begun = vec![promise(1, 1), start(1, 1, 1, None), progress(1, 1, 1)];
        attempt(begun).unwrap();
        // After this one the next begins a segment, and meets the fault.
        disk.fail_after(0);
        assert!(attempt(vec![transaction(1, 1, 2, vec![1; 100])]).is_err());
        disk.fail_after(fault);
        let mut insist = |records: Vec<Record>| {
            while attempt(records.clone()).is_err() {
                failed += 1;
                assert!(failed < 1000, "fault {fault} never passes");
                // After a failed preparation a second passes before the next.
                std::thread::sleep(Duration::from_millis(30));
            }
        };
        insist(vec![promise(1, 2)]);
        insist(vec![start(1, 2, 2, None), progress(1, 2, 2)]);
        journal.drop_through(database(1), Lsn::new(2));
        insist(vec![promise(1, 3)]);
        let disk = disk.crash(&mut |_| 0);
        let journal = try_open(&disk).unwrap_or_else(|error| panic!("fault {fault}: {error}"));
        for (number, promised, last) in [(1, 3, position(2, 2)), (2, 7, position(7, 1))] {
            let state = journal.state(database(number)).unwrap();
            assert_eq!((state.promised, state.last), (Epoch::new(promised), last));
        }
    }
    assert!(failed > 5, "only {failed} writes failed");
}

/// Broken if this fails: entries of one log continue another's, after a truncation between them
/// was refused.
#[test]
fn after_a_failed_cut_nothing_builds_on_it() {
    let disk = MemoryDisk::default();
    let journal = open(&disk);
    let first: Vec<Record> = (2..5).map(|lsn| transaction(1, 1, lsn, vec![])).collect();
    write(
        &journal,
        [vec![promise(1, 1), start(1, 1, 1, None)], first].concat(),
    )
    .unwrap();
    // The other log: lsn 3 of epoch 2 after lsn 2. Its truncation fails, what follows is in flight.
    let cut = vec![
        promise(1, 2),
        truncate(1, 1, 2),
        start(1, 2, 3, Some(summary(1, 2))),
    ];
    assert!(matches!(
        write_failing(&journal, &disk, 0, cut.clone()),
        Err(JournalError::Io { .. })
    ));
    assert!(journal.trouble().unwrap().contains("injected fault"));
    let later = vec![start(1, 3, 5, None)];
    assert!(matches!(
        write(&journal, later.clone()),
        Err(JournalError::Refused { .. })
    ));
    assert!(
        write(&journal, vec![progress(1, 4, 4)]).is_err(),
        "its commit_lsn is the other log's"
    );
    assert_eq!(journal.state(database(1)).unwrap().last, position(1, 4));
    // Made good by the same again.
    write(&journal, cut).unwrap();
    assert_eq!(journal.trouble(), None);
    assert_eq!(journal.state(database(1)).unwrap().last, position(2, 3));
    write(&journal, vec![transaction(1, 2, 4, vec![])]).unwrap();
    // Or by saying so.
    assert!(write_failing(&journal, &disk, 0, vec![promise(1, 3)]).is_err());
    assert!(write(&journal, vec![transaction(1, 2, 5, vec![])]).is_err());
    journal.resume(database(1));
    write(&journal, vec![transaction(1, 2, 5, vec![])]).unwrap();
    drop(journal);
    let state = open(&disk).state(database(1)).unwrap();
    assert_eq!(
        (state.last, state.promised),
        (position(2, 5), Epoch::new(2))
    );
}

/// Broken if this fails: a database that changed hands often cannot be restated, or its history no
/// longer reaches back to what is not archived.
#[test]
fn archived_history_is_bounded_and_the_rest_is_kept() {
    let disk = MemoryDisk::default();
    let journal = open(&disk);
    write(&journal, vec![promise(1, 1)]).unwrap();
    for epoch in 1..=300 {
        let lsn = u64::from(epoch);
        write(&journal, vec![start(1, epoch, lsn, None)]).unwrap();
        write(&journal, vec![progress(1, lsn, lsn.min(200))]).unwrap();
        // So that segments are begun, and states restated, in between.
        if epoch % 10 == 0 {
            write(&journal, vec![pages(1, epoch, lsn + 1, 0, vec![0; 9000])]).unwrap();
        }
    }
    let state = journal.state(database(1)).unwrap();
    let first = state.history[0].first_lsn.get();
    assert!(
        (100..=200).contains(&first),
        "history begins at lsn {first}"
    );
    assert_eq!(state.history.len() as u64, 301 - first);
    drop(journal);
    assert_eq!(open(&disk).databases(), vec![state]);
}

/// Broken if this fails: the same, when the truncation only waited behind what failed.
#[test]
fn a_cut_that_waited_behind_a_failure_is_not_built_on_either() {
    let disk = MemoryDisk::default();
    let journal = open(&disk);
    let first: Vec<Record> = (2..5).map(|lsn| transaction(1, 1, lsn, vec![])).collect();
    write(
        &journal,
        [vec![promise(1, 1), start(1, 1, 1, None)], first].concat(),
    )
    .unwrap();
    let appends = vec![
        vec![transaction(1, 1, 5, vec![])],
        vec![truncate(1, 1, 2), start(1, 2, 3, Some(summary(1, 2)))],
    ];
    let results = write_together(&journal, appends, || disk.fail_after(0));
    assert!(results.iter().all(Result::is_err), "{results:?}");
    let later = write(&journal, vec![start(1, 3, 5, None)]);
    assert!(
        matches!(later, Err(JournalError::Refused { .. })),
        "{later:?}"
    );
}

/// Broken if this fails: what a failed sync may have lost counts as durable when a later sync
/// succeeds, and a power cut then leaves what is reported as a damaged disk.
#[test]
fn after_a_failed_sync_a_journal_without_sync_claims_nothing_for_that_segment() {
    let unsynced = JournalOptions {
        limit_bytes: 6 * (64 << 10),
        ..options(false)
    };
    for fails_after in (1..220).step_by(6) {
        let disk = MemoryDisk::default();
        let opened = Journal::open_driven(Arc::new(disk.clone()), &unsynced);
        let (journal, mut driver, _) = opened.unwrap();
        let mut append = |records: Vec<Record>| {
            let (sender, result) = std::sync::mpsc::channel();
            let done = move |result| sender.send(result).unwrap();
            journal.append(records, Box::new(done));
            driver.write_waiting();
            result.recv().unwrap()
        };
        append(vec![promise(1, 1), start(1, 1, 1, None)]).unwrap();
        disk.fail_after(fails_after);
        let mut failures = 0;
        for lsn in 2..80 {
            let records = || {
                vec![
                    transaction(1, 1, lsn, vec![lsn as u8; 5000]),
                    progress(1, lsn, lsn),
                ]
            };
            while append(records()).is_err() {
                failures += 1;
                assert!(failures < 5, "nothing can be written any more");
                journal.resume(database(1));
            }
            journal.drop_through(database(1), Lsn::new(lsn.saturating_sub(15)));
            if lsn % 4 > 0 {
                continue;
            }
            // The power goes now: nothing, all, or a mixture of what was not synced is left.
            for draw in 0..4u64 {
                let mut number = lsn + draw;
                let left = disk.survivor(&mut |below| match draw {
                    0 => 0,
                    1 => below - 1,
                    _ => {
                        number = number
                            .wrapping_mul(6_364_136_223_846_793_005)
                            .wrapping_add(1);
                        (number >> 33) % below
                    }
                });
                if let Err(error) = Journal::open_driven(Arc::new(left), &unsynced) {
                    panic!("fault after {fails_after}, lsn {lsn}, draw {draw}: {error}");
                }
            }
        }
    }
}

/// Broken if this fails: whoever reads a log, to feed a replica or to archive it, has to begin
/// again whenever an application takes a large transaction back.
#[test]
fn an_unfinished_entry_that_is_taken_back_frees_its_room_and_stops_no_reader() {
    let disk = MemoryDisk::default();
    let journal = small(&disk, 12);
    write(&journal, vec![promise(1, 1), start(1, 1, 1, None)]).unwrap();
    for lsn in 2..6 {
        let entry = transaction(1, 1, lsn, vec![lsn as u8; 100]);
        write(&journal, vec![entry]).unwrap();
    }
    let read_range = journal.parts(database(1), Lsn::new(1), Lsn::new(5));
    let mut reader = read_range.unwrap();
    reader.next().unwrap().unwrap();
    for round in 0..20 {
        // Half of the journal.
        for index in 0..11 {
            let part = pages(1, 1, 6, index, vec![round; 30_000]);
            write(&journal, vec![part]).unwrap();
        }
        write(&journal, vec![truncate(1, 1, 5)]).unwrap();
        // The entries before it are moved out of the way batch by batch.
        for _ in 0..8 {
            write(&journal, vec![progress(1, 1, 0)]).unwrap();
        }
        let usage = journal.usage();
        assert!(usage.segment_count <= 6, "round {round}: {usage:?}");
    }
    assert_eq!(reader.map(Result::unwrap).count(), 4);
    write(&journal, vec![truncate(1, 1, 3)]).unwrap();
    assert_eq!(journal.state(database(1)).unwrap().last, position(1, 3));
}
