//! What the tests share: short names for records, and a journal whose appends can be waited for.

use crate::disk::memory::MemoryDisk;
use crate::{Journal, JournalError, JournalOptions, Record};
use bytes::Bytes;
use durovfs_wire::checksum::DatabaseChecksum;
use durovfs_wire::entry::TransactionSummary;
use durovfs_wire::entry::{CommitHeader, EntryPart, Origin, PartHeader, PartKind};
use durovfs_wire::ids::{ClaimantId, ClientId, DatabaseId, ReplicaId};
use durovfs_wire::position::{Epoch, LogPosition, Lsn, Timestamp};
use durovfs_wire::wal::PageSize;
use std::sync::{Arc, mpsc};

pub fn database(number: u8) -> DatabaseId {
    DatabaseId::from_bytes([number; 16])
}

pub fn position(epoch: u32, lsn: u64) -> LogPosition {
    LogPosition::new(Epoch::new(epoch), Lsn::new(lsn))
}

pub fn promise(number: u8, epoch: u32) -> Record {
    Record::Promise {
        database: database(number),
        name: format!("db-{number}"),
        epoch: Epoch::new(epoch),
        claimant: ClaimantId::from_bytes([epoch as u8; 16]),
        replica: Some(ReplicaId::from_bytes([number; 16])),
    }
}

pub fn commit_header(lsn: u64) -> CommitHeader {
    CommitHeader {
        origin: Origin {
            client: ClientId::from_bytes([7; 16]),
            sequence: lsn,
        },
        time: Timestamp::from_micros(lsn as i64),
        base_lsn: Lsn::new(lsn - 1),
        page_size: PageSize::try_from(512).unwrap(),
        page_count: 1,
        slot_count: 1,
        checksum: DatabaseChecksum::from_u64(lsn),
        whole_image: false,
    }
}

pub fn summary(epoch: u32, lsn: u64) -> TransactionSummary {
    TransactionSummary {
        position: position(epoch, lsn),
        commit: commit_header(lsn),
    }
}

pub fn part(number: u8, at: LogPosition, part: u32, kind: PartKind, payload: Vec<u8>) -> Record {
    let header = PartHeader {
        database: database(number),
        epoch: at.epoch,
        lsn: at.lsn,
        part,
        kind,
    };
    Record::Part(EntryPart {
        header,
        payload: Bytes::from(payload),
    })
}

pub fn start(number: u8, epoch: u32, lsn: u64, last: Option<TransactionSummary>) -> Record {
    let kind = PartKind::EpochStart {
        time: Timestamp::from_micros(lsn as i64),
        last_transaction: last,
    };
    part(number, position(epoch, lsn), 0, kind, Vec::new())
}

/// The only part of a transaction.
pub fn transaction(number: u8, epoch: u32, lsn: u64, payload: Vec<u8>) -> Record {
    let kind = PartKind::Commit(commit_header(lsn));
    part(number, position(epoch, lsn), 0, kind, payload)
}

pub fn pages(number: u8, epoch: u32, lsn: u64, index: u32, payload: Vec<u8>) -> Record {
    let kind = PartKind::Pages {
        page_size: PageSize::try_from(512).unwrap(),
    };
    part(number, position(epoch, lsn), index, kind, payload)
}

pub fn last_part(number: u8, epoch: u32, lsn: u64, index: u32, payload: Vec<u8>) -> Record {
    part(
        number,
        position(epoch, lsn),
        index,
        PartKind::Commit(commit_header(lsn)),
        payload,
    )
}

pub fn progress(number: u8, commit: u64, archive: u64) -> Record {
    Record::Progress {
        database: database(number),
        commit_lsn: Lsn::new(commit),
        archive_lsn: Lsn::new(archive),
    }
}

pub fn truncate(number: u8, epoch: u32, lsn: u64) -> Record {
    Record::Truncate {
        database: database(number),
        after: position(epoch, lsn),
    }
}

/// Small segments, so that tests get over many of them.
pub fn options(sync: bool) -> JournalOptions {
    JournalOptions {
        directory: "unused".into(),
        sync,
        segment_bytes: 64 << 10,
        limit_bytes: 64 << 20,
        mend: false,
    }
}

pub fn open(disk: &MemoryDisk) -> Journal {
    try_open(disk).unwrap()
}

pub fn try_open(disk: &MemoryDisk) -> Result<Journal, JournalError> {
    Journal::open_on(Arc::new(disk.clone()), options(true)).map(|(journal, _)| journal)
}

/// Appends, and waits for what became of it.
pub fn write(journal: &Journal, records: Vec<Record>) -> Result<(), JournalError> {
    let (sender, receiver) = mpsc::channel();
    journal.append(
        records,
        Box::new(move |result| sender.send(result).unwrap()),
    );
    receiver.recv().unwrap()
}

/// All parts that are held of a range.
pub fn read(journal: &Journal, number: u8, first: u64, last: u64) -> Vec<EntryPart> {
    let parts = journal
        .parts(database(number), Lsn::new(first), Lsn::new(last))
        .unwrap();
    parts.map(Result::unwrap).collect()
}

/// Appends that wait together while `prepare` runs, so that nothing comes between; their results.
pub fn write_together(
    journal: &Journal,
    appends: Vec<Vec<Record>>,
    prepare: impl FnOnce(),
) -> Vec<Result<(), JournalError>> {
    let (held, is_held) = mpsc::channel();
    let (go, wait) = mpsc::channel();
    let hold = move |_| {
        held.send(()).unwrap();
        wait.recv().unwrap();
    };
    journal.append(Vec::new(), Box::new(hold));
    is_held.recv().unwrap();
    prepare();
    let (sender, receiver) = mpsc::channel();
    for records in appends {
        let sender = sender.clone();
        journal.append(
            records,
            Box::new(move |result| sender.send(result).unwrap()),
        );
    }
    drop(sender);
    go.send(()).unwrap();
    receiver.iter().collect()
}

/// What becomes of an append when a disk operation fails, `after` so many.
pub fn write_failing(
    journal: &Journal,
    disk: &MemoryDisk,
    after: u64,
    records: Vec<Record>,
) -> Result<(), JournalError> {
    write_together(journal, vec![records], || disk.fail_after(after)).remove(0)
}
