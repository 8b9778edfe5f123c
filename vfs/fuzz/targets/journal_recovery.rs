//! A journal that was damaged anywhere: opened, or refused with an error. What it then gives out is
//! a beginning of what was written, entry by entry.

#![no_main]

mod edits;
mod entries;

use durovfs_journal::disk::Disk;
use durovfs_journal::disk::memory::MemoryDisk;
use durovfs_journal::{Journal, JournalOptions, Record};
use durovfs_wire::{ClaimantId, Lsn, ReplicaId};
use libfuzzer_sys::fuzz_target;
use std::sync::{Arc, OnceLock, mpsc};

/// Enough for two segments.
const ENTRIES: u64 = 130;

fn options() -> JournalOptions {
    let segment_bytes = 64 << 10;
    JournalOptions {
        segment_bytes,
        limit_bytes: 64 * segment_bytes,
        ..JournalOptions::new("", true)
    }
}

fn valid() -> &'static MemoryDisk {
    static DISK: OnceLock<MemoryDisk> = OnceLock::new();
    DISK.get_or_init(|| {
        let disk = MemoryDisk::default();
        let (journal, _) = Journal::open_on(Arc::new(disk.clone()), options()).expect("a journal");
        let promise = Record::Promise {
            database: entries::DATABASE,
            name: "app.db".into(),
            epoch: entries::EPOCH,
            claimant: ClaimantId::from_bytes([1; 16]),
            replica: Some(ReplicaId::from_bytes([2; 16])),
        };
        let parts = entries::entries(ENTRIES).into_iter().map(Record::Part);
        for record in std::iter::once(promise).chain(parts) {
            let (sender, done) = mpsc::channel();
            let told = move |result| drop(sender.send(result));
            journal.append(vec![record], Box::new(told));
            done.recv().expect("an answer").expect("room for it");
        }
        journal.close();
        disk
    })
}

fuzz_target!(|edits: Vec<(u8, u32, Vec<u8>)>| {
    let disk = valid().copy();
    let names = disk.list().expect("names");
    for (file, offset, with) in edits.into_iter().take(8) {
        let name = &names[usize::from(file) % names.len()];
        disk.edit(name, |bytes| edits::edit(bytes, &[(offset, with)]));
    }
    let Ok((journal, states)) = Journal::open_on(Arc::new(disk), options()) else {
        return;
    };
    let written = entries::entries(ENTRIES);
    for state in states
        .iter()
        .filter(|state| state.database == entries::DATABASE)
    {
        let Ok(parts) = journal.parts(state.database, Lsn::new(1), state.last.lsn) else {
            continue;
        };
        for (part, expected) in parts.zip(&written) {
            let Ok(part) = part else { break };
            assert_eq!(&part, expected, "an entry that nobody wrote");
        }
    }
    journal.close();
});
