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
