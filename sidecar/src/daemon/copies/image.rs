//! From a copy to an entry: the whole database as one transaction, for a client that has nothing.

use bytes::Bytes;
use durovfs_copies::{CopyError, CopySnapshot};
use durovfs_wire::entry::{MAX_PART_PAYLOAD_BYTES, SLOT_HEADER_BYTES};
use durovfs_wire::{
    CommitHeader, DatabaseChecksum, DatabaseId, EntryPart, PageChecksum, PartHeader, PartKind,
};
use tokio::sync::mpsc;

/// Bytes of a part: a few in memory, and each well under a frame.
const PART_BYTES: usize = 1 << 20;
const _: () = assert!(PART_BYTES <= MAX_PART_PAYLOAD_BYTES);

/// Sends the copy's image in parts. The last one goes only when all that was read has the checksum
/// that the log states. Blocking.
///
/// # Errors
/// When the copy cannot be read, or is not what the log says.
pub fn read_snapshot(
    snapshot: &CopySnapshot,
    database: DatabaseId,
    sink: &mpsc::Sender<EntryPart>,
) -> Result<(), CopyError> {
    let summary = snapshot.summary();
    let page_size = summary.commit.page_size;
    let slot_bytes = SLOT_HEADER_BYTES + page_size.get();
    let part_bytes = (PART_BYTES / slot_bytes).max(1) * slot_bytes;
    let mut header = PartHeader {
        database,
        epoch: summary.position.epoch,
        lsn: summary.position.lsn,
        part: 0,
        kind: PartKind::Pages { page_size },
    };
    let mut payload = Vec::with_capacity(part_bytes);
    let mut slot = 0u32;
    let mut checksum = DatabaseChecksum::EMPTY;
    let gone = |_| CopyError::Failed("the client is gone".to_owned());
    snapshot.for_each(|page_no, image| {
        if payload.len() == part_bytes {
            let full = std::mem::replace(&mut payload, Vec::with_capacity(part_bytes));
            let payload = Bytes::from(full);
            sink.blocking_send(EntryPart { header, payload })
                .map_err(gone)?;
            header.part += 1;
        }
        payload.extend(slot.to_le_bytes());
        payload.extend(page_no.get().to_le_bytes());
        payload.extend(image);
        slot += 1;
        checksum.toggle(PageChecksum::of(page_no, image));
        Ok(())
    })?;
    if checksum != summary.commit.checksum {
        return Err(CopyError::Differs(format!(
            "its checksum is {checksum}, the log's {}",
            summary.commit.checksum
        )));
    }
    header.kind = PartKind::Commit(CommitHeader {
        slot_count: slot,
        whole_image: true,
        ..summary.commit
    });
    let payload = Bytes::from(payload);
    sink.blocking_send(EntryPart { header, payload })
        .map_err(gone)
}
