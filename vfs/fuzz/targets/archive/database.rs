//! A small log: transactions of several pages, one that shrinks, epoch starts between.

use durovfs_wire::entry::{Origin, PayloadBuilder, TransactionSummary};
use durovfs_wire::{
    ClientId, CommitHeader, DatabaseChecksum, DatabaseId, EntryPart, Epoch, LogPosition, Lsn,
    PageChecksum, PageNo, PageSize, PartHeader, PartKind, Timestamp,
};
use std::collections::BTreeMap;

pub const DATABASE: DatabaseId = DatabaseId::from_bytes([7; 16]);
pub const NAME: &str = "app.db";
pub const PAGE_BYTES: usize = 512;

/// The log's entries, one part each.
pub fn log() -> Vec<EntryPart> {
    let mut log = Log::default();
    log.begin_epoch(1);
    log.commit(5, &[1, 2, 3, 4, 5]);
    log.commit(5, &[2, 3]);
    log.begin_epoch(2);
    log.commit(6, &[1, 4, 6]);
    log.commit(3, &[1]);
    log.parts
}

/// The whole image after the log's last transaction, as an entry of the same position.
pub fn image() -> EntryPart {
    let mut parts = self::log();
    let epoch = parts.pop().expect("a last transaction").header.epoch;
    let mut log = Log {
        parts,
        epoch,
        ..Log::default()
    };
    log.commit(3, &[1, 2, 3]);
    log.parts.pop().expect("the image")
}

#[derive(Default)]
struct Log {
    parts: Vec<EntryPart>,
    epoch: Epoch,
    images: BTreeMap<u32, [u8; PAGE_BYTES]>,
    last: Option<TransactionSummary>,
}

impl Log {
    fn begin_epoch(&mut self, epoch: u32) {
        self.epoch = Epoch::new(epoch);
        let time = self.time();
        let last_transaction = self.last;
        self.push(
            PartKind::EpochStart {
                time,
                last_transaction,
            },
            PayloadBuilder::default(),
        );
    }

    fn commit(&mut self, page_count: u32, pages: &[u32]) {
        let lsn = self.lsn();
        let mut payload = PayloadBuilder::default();
        for (slot, page) in (0..).zip(pages) {
            let image = [lsn.get() as u8; PAGE_BYTES];
            self.images.insert(*page, image);
            payload.push(slot, PageNo::new(*page).expect("a page"), &image);
        }
        self.images.retain(|page, _| *page <= page_count);
        let mut checksum = DatabaseChecksum::EMPTY;
        for (page, image) in &self.images {
            checksum.toggle(PageChecksum::of(PageNo::new(*page).expect("a page"), image));
        }
        let commit = CommitHeader {
            origin: Origin {
                client: ClientId::from_bytes([1; 16]),
                sequence: lsn.get(),
            },
            time: self.time(),
            base_lsn: self.last.map_or(Lsn::ZERO, |last| last.position.lsn),
            page_size: PageSize::try_from(PAGE_BYTES as u32).expect("a page size"),
            page_count,
            slot_count: pages.len() as u32,
            checksum,
            whole_image: pages.len() as u32 == page_count,
        };
        self.last = Some(TransactionSummary {
            position: LogPosition::new(self.epoch, lsn),
            commit,
        });
        self.push(PartKind::Commit(commit), payload);
    }

    fn lsn(&self) -> Lsn {
        Lsn::new(self.parts.len() as u64 + 1)
    }

    fn time(&self) -> Timestamp {
        Timestamp::from_micros(self.parts.len() as i64 * 1000)
    }

    fn push(&mut self, kind: PartKind, mut payload: PayloadBuilder) {
        let header = PartHeader {
            database: DATABASE,
            epoch: self.epoch,
            lsn: self.lsn(),
            part: 0,
            kind,
        };
        let payload = payload.take();
        self.parts.push(EntryPart { header, payload });
    }
}
