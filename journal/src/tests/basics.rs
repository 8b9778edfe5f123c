//! What is appended is there, in order, also after a restart.

use super::support::*;
use crate::disk::memory::MemoryDisk;
use crate::{Journal, JournalError, JournalOptions, Record};
use durovfs_wire::position::{EpochRun, LogPosition, Lsn};

/// Broken if this fails: a replica forgets, after a restart, what it acknowledged.
#[test]
fn what_was_written_is_read_back_after_reopening() {
    let directory = tempfile::tempdir().unwrap();
    let options = JournalOptions {
        segment_bytes: 1 << 20,
        limit_bytes: 8 << 20,
        ..JournalOptions::new(directory.path(), true)
    };
    let (journal, states) = Journal::open(options.clone()).unwrap();
    assert!(states.is_empty());
    write(&journal, vec![promise(1, 3)]).unwrap();
    write(
        &journal,
        vec![start(1, 3, 1, None), transaction(1, 3, 2, vec![1; 520])],
    )
    .unwrap();
    write(&journal, vec![pages(1, 3, 3, 0, vec![2; 520])]).unwrap();
    assert_eq!(
        journal.state(database(1)).unwrap().last,
        position(3, 2),
        "incomplete: not there"
    );
    write(
        &journal,
        vec![last_part(1, 3, 3, 1, vec![3; 520]), progress(1, 2, 1)],
    )
    .unwrap();
    let state = journal.state(database(1)).unwrap();
    let before = read(&journal, 1, 1, 3);
    journal.close();

    let (journal, states) = Journal::open(options).unwrap();
    assert_eq!(states, vec![state.clone()]);
    assert_eq!(read(&journal, 1, 1, 3), before);
    assert_eq!(before.len(), 4);
    assert_eq!(
        (state.promised, state.last),
        (position(3, 0).epoch, position(3, 3))
    );
    assert_eq!(
        (state.commit_lsn, state.archive_lsn),
        (Lsn::new(2), Lsn::new(1))
    );
    assert_eq!(state.last_transaction, Some(summary(3, 3)));
    assert_eq!(
        state.history,
        vec![EpochRun {
            epoch: state.promised,
            first_lsn: Lsn::new(1)
        }]
    );
    assert_eq!(
        journal
            .transactions(database(1), Lsn::new(1), Lsn::new(9))
            .len(),
        2
    );
}

fn refused(journal: &Journal, records: Vec<Record>) {
    let before = journal.databases();
    let result = write(journal, records.clone());
    assert!(
        matches!(result, Err(JournalError::Refused { .. })),
        "{records:?}: {result:?}"
    );
    assert_eq!(journal.databases(), before);
    journal.resume(database(1));
}

/// Broken if this fails: a log with a gap, with entries of two primaries mixed, or with a committed
/// entry cut off is written down and acknowledged.
#[test]
fn what_does_not_follow_is_refused_and_changes_nothing() {
    let journal = open(&MemoryDisk::default());
    refused(&journal, vec![transaction(1, 1, 1, vec![])]);
    refused(&journal, vec![promise(1, 1), start(1, 1, 2, None)]);
    assert_eq!(journal.state(database(1)), None, "no append counts in half");
    write(&journal, vec![promise(1, 2), start(1, 1, 1, None)]).unwrap();
    write(
        &journal,
        vec![transaction(1, 1, 2, vec![]), transaction(1, 1, 3, vec![])],
    )
    .unwrap();
    write(&journal, vec![progress(1, 2, 0)]).unwrap();
    refused(&journal, vec![promise(1, 1)]);
    refused(&journal, vec![transaction(1, 1, 3, vec![])]);
    refused(&journal, vec![transaction(1, 1, 5, vec![])]);
    refused(&journal, vec![transaction(1, 2, 4, vec![])]);
    refused(&journal, vec![start(1, 1, 4, None)]);
    refused(&journal, vec![start(1, 2, 4, Some(summary(2, 3)))]);
    refused(&journal, vec![pages(1, 1, 4, 1, vec![])]);
    refused(
        &journal,
        vec![pages(1, 1, 4, 0, vec![]), last_part(1, 1, 4, 2, vec![])],
    );
    refused(&journal, vec![truncate(1, 1, 1)]);
    refused(&journal, vec![truncate(1, 2, 2)]);
    refused(&journal, vec![truncate(1, 1, 4)]);
    refused(
        &journal,
        vec![transaction(1, 1, 4, vec![]), truncate(1, 1, 3)],
    );
    write(&journal, vec![transaction(1, 1, 4, vec![])]).unwrap();
}

/// Broken if this fails: after a truncation the primary tells the application a transaction that
/// is gone, or restarts a large transaction with pages of the one before.
#[test]
fn truncation_and_beginning_afresh_take_back_what_was_there() {
    let disk = MemoryDisk::default();
    let journal = open(&disk);
    write(&journal, vec![promise(1, 1), start(1, 1, 1, None)]).unwrap();
    write(
        &journal,
        vec![transaction(1, 1, 2, vec![1]), transaction(1, 1, 3, vec![1])],
    )
    .unwrap();
    write(
        &journal,
        vec![pages(1, 1, 4, 0, vec![1]), pages(1, 1, 4, 1, vec![1])],
    )
    .unwrap();
    let reading = journal
        .parts(database(1), Lsn::new(3), Lsn::new(3))
        .unwrap();
    write(
        &journal,
        vec![truncate(1, 1, 2), start(1, 2, 3, Some(summary(1, 2)))],
    )
    .unwrap();
    let state = journal.state(database(1)).unwrap();
    assert_eq!(
        (state.last, state.last_transaction),
        (position(2, 3), Some(summary(1, 2)))
    );
    let stale: Vec<_> = reading.collect();
    assert!(
        matches!(stale[..], [Err(JournalError::Gone { .. })]),
        "{stale:?}"
    );
    write(
        &journal,
        vec![pages(1, 2, 4, 0, vec![2]), pages(1, 2, 4, 1, vec![2])],
    )
    .unwrap();
    write(
        &journal,
        vec![pages(1, 2, 4, 0, vec![3]), last_part(1, 2, 4, 1, vec![4])],
    )
    .unwrap();
    drop(journal);
    let journal = open(&disk);
    let payloads: Vec<u8> = read(&journal, 1, 4, 4)
        .iter()
        .map(|part| part.payload[0])
        .collect();
    assert_eq!(payloads, [3, 4]);
    write(
        &journal,
        vec![Record::Restart {
            database: database(1),
            at: position(5, 90),
        }],
    )
    .unwrap();
    write(&journal, vec![start(1, 6, 91, Some(summary(5, 89)))]).unwrap();
    let state = journal.state(database(1)).unwrap();
    drop(journal);
    let journal = open(&disk);
    assert_eq!(journal.databases(), vec![state.clone()]);
    assert_eq!(
        (state.first_lsn, state.commit_lsn),
        (Lsn::new(91), Lsn::new(90))
    );
    assert_eq!(state.last_transaction, Some(summary(5, 89)));
    assert_eq!(state.history.len(), 2);
    assert_eq!(
        state.last,
        LogPosition {
            lsn: Lsn::new(91),
            ..position(6, 0)
        }
    );
}

/// Broken if this fails: the sidecar misjudges what a lagging replica lacks, or its slow path.
#[test]
fn sizes_and_transactions_come_from_the_index() {
    let journal = open(&MemoryDisk::default());
    write(&journal, vec![promise(1, 1), start(1, 1, 1, None)]).unwrap();
    for lsn in 2..6 {
        write(
            &journal,
            vec![transaction(1, 1, lsn, vec![0; 1000 * lsn as usize])],
        )
        .unwrap();
    }
    let bytes = |first, last| journal.entry_bytes(database(1), Lsn::new(first), Lsn::new(last));
    assert_eq!(bytes(2, 3) + bytes(4, 5), bytes(2, 5));
    assert!(bytes(5, 5) > 5000 && bytes(5, 5) < 5400 && bytes(6, 9) == 0);
    write(&journal, vec![progress(1, 3, 3)]).unwrap();
    let all = bytes(4, 5);
    journal.drop_through(database(1), Lsn::new(3));
    assert_eq!(bytes(1, 5), all);
    let found = journal.transactions(database(1), Lsn::new(1), Lsn::new(4));
    assert_eq!(found, vec![summary(1, 4)]);
    assert_eq!(journal.usage().entry_count, 2);
}

/// Broken if this fails: each commit of each database pays for a sync of its own.
#[test]
fn what_waits_shares_one_sync() {
    let disk = MemoryDisk::default();
    let journal = open(&disk);
    for number in 0..100 {
        write(&journal, vec![promise(number, 1)]).unwrap();
    }
    // The writer is held up in a completion, as by a slow disk.
    let (go, wait) = std::sync::mpsc::channel();
    let (held, is_held) = std::sync::mpsc::channel();
    let hold = move |_| {
        held.send(()).unwrap();
        wait.recv().unwrap();
    };
    journal.append(vec![promise(0, 2)], Box::new(hold));
    is_held.recv().unwrap();
    let (sender, receiver) = std::sync::mpsc::channel();
    for number in 0..100 {
        let sender = sender.clone();
        let done = Box::new(move |result| sender.send((number, result)).unwrap());
        journal.append(vec![start(number, 2, 1, None)], done);
    }
    let before = disk.sync_count();
    go.send(()).unwrap();
    let done: Vec<_> = receiver.iter().take(100).collect();
    assert!(done.iter().all(|(_, result)| result.is_ok()));
    assert!(
        done.iter().map(|(number, _)| *number).eq(0..100),
        "not in the order of the calls"
    );
    assert_eq!(disk.sync_count() - before, 1);
}
