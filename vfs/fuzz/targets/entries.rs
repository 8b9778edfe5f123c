//! A small valid log for the targets that damage one.

use durovfs_wire::entry::{Origin, PayloadBuilder};
use durovfs_wire::{
    ClientId, CommitHeader, DatabaseChecksum, DatabaseId, EntryPart, Epoch, Lsn, PageChecksum,
    PageNo, PageSize, PartHeader, PartKind, Timestamp,
};

pub const DATABASE: DatabaseId = DatabaseId::from_bytes([7; 16]);
pub const EPOCH: Epoch = Epoch::new(3);

/// An epoch start and `transactions` of one page each.
pub fn entries(transactions: u64) -> Vec<EntryPart> {
    let page_size = PageSize::try_from(512).expect("a page size");
    let start = PartKind::EpochStart {
        time: Timestamp::default(),
        last_transaction: None,
    };
    let mut parts = vec![part(1, start, PayloadBuilder::default())];
    for lsn in 2..transactions + 2 {
        let image = [lsn as u8; 512];
        let page_no = PageNo::new(1).expect("a page");
        let mut checksum = DatabaseChecksum::EMPTY;
        checksum.toggle(PageChecksum::of(page_no, &image));
        let mut builder = PayloadBuilder::default();
        builder.push(0, page_no, &image);
        let origin = Origin {
            client: ClientId::from_bytes([1; 16]),
            sequence: lsn,
        };
        let commit = CommitHeader {
            origin,
            time: Timestamp::default(),
            base_lsn: Lsn::new(if lsn == 2 { 0 } else { lsn - 1 }),
            page_size,
            page_count: 1,
            slot_count: 1,
            checksum,
            whole_image: lsn == 2,
        };
        parts.push(part(lsn, PartKind::Commit(commit), builder));
    }
    parts
}

fn part(lsn: u64, kind: PartKind, mut builder: PayloadBuilder) -> EntryPart {
    let header = PartHeader {
        database: DATABASE,
        epoch: EPOCH,
        lsn: Lsn::new(lsn),
        part: 0,
        kind,
    };
    EntryPart {
        header,
        payload: builder.take(),
    }
}
