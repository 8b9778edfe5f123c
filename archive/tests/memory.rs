//! A transaction larger than memory goes into the archive and comes back in bounded memory.
//!
//! In a process of its own, because it measures the peak of the whole process. The size is that of
//! an ordinary test; `DUROVFS_TEST_TRANSACTION_MIB=1024` measures the size that is promised.

#![allow(clippy::unwrap_used, reason = "helpers of a test")]

use durovfs_archive::uploader::write_chunk;
use durovfs_archive::{LogIdentity, RestoreOptions, S3Options, When, restore, store};
use durovfs_wire::entry::{MAX_PART_PAYLOAD_BYTES, Origin, PayloadBuilder, SLOT_HEADER_BYTES};
use durovfs_wire::{
    ClientId, CommitHeader, DatabaseChecksum, DatabaseId, EntryPart, Epoch, Lsn, PageChecksum,
    PageNo, PageSize, PartHeader, PartKind, Timestamp,
};
use std::convert::Infallible;

const PAGE_BYTES: usize = 4096;
/// What the promise allows for a transaction of 1 GiB.
const RESIDENT_LIMIT_BYTES: u64 = 50 << 20;

fn page(number: u32, image: &mut [u8]) {
    // Half noise: neither all nor nothing of it compresses away.
    let mut state = u64::from(number) << 32 | 1;
    for word in image[..PAGE_BYTES / 2].chunks_exact_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word.copy_from_slice(&state.to_le_bytes());
    }
    image[PAGE_BYTES / 2..].fill(number as u8);
}

/// The parts of one transaction of `page_count` pages, the last page first.
fn parts(
    page_count: u32,
    commit: CommitHeader,
) -> impl Iterator<Item = Result<EntryPart, Infallible>> {
    let slots_per_part = (MAX_PART_PAYLOAD_BYTES / (SLOT_HEADER_BYTES + PAGE_BYTES)) as u32;
    let part_count = page_count.div_ceil(slots_per_part);
    (0..part_count).map(move |part| {
        let mut payload = PayloadBuilder::default();
        let mut image = vec![0; PAGE_BYTES];
        let first = part * slots_per_part;
        for slot in first..(first + slots_per_part).min(page_count) {
            let number = page_count - slot;
            page(number, &mut image);
            payload.push(slot, PageNo::new(number).unwrap(), &image);
        }
        let last = part + 1 == part_count;
        let kind = match last {
            true => PartKind::Commit(commit),
            false => PartKind::Pages {
                page_size: commit.page_size,
            },
        };
        let header = PartHeader {
            database: DatabaseId::from_bytes([1; 16]),
            epoch: Epoch::new(1),
            lsn: Lsn::new(1),
            part,
            kind,
        };
        Ok(EntryPart {
            header,
            payload: payload.take(),
        })
    })
}

fn status_bytes(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(field)).unwrap();
    line.split_whitespace()
        .nth(1)
        .unwrap()
        .parse::<u64>()
        .unwrap()
        << 10
}

// Broken: a large transaction would push the application's host out of memory.
#[tokio::test]
async fn a_large_transaction_takes_little_memory() {
    let mib: u32 = match std::env::var("DUROVFS_TEST_TRANSACTION_MIB") {
        Ok(text) => text.parse().unwrap(),
        Err(_) => 192,
    };
    let page_count = mib << 8;
    let mut checksum = DatabaseChecksum::EMPTY;
    let mut image = vec![0; PAGE_BYTES];
    for number in 1..=page_count {
        page(number, &mut image);
        checksum.toggle(PageChecksum::of(PageNo::new(number).unwrap(), &image));
    }
    let commit = CommitHeader {
        origin: Origin {
            client: ClientId::from_bytes([2; 16]),
            sequence: 1,
        },
        time: Timestamp::from_micros(1_800_000_000_000_000),
        base_lsn: Lsn::ZERO,
        page_size: PageSize::try_from(PAGE_BYTES as u32).unwrap(),
        page_count,
        slot_count: page_count,
        checksum,
        whole_image: true,
    };
    let folder = tempfile::tempdir().unwrap();
    let scratch = tempfile::tempdir().unwrap();
    let url = format!("file://{}", folder.path().display());
    let store = store::open(&url, &S3Options::default()).unwrap();
    let identity = LogIdentity {
        database: DatabaseId::from_bytes([1; 16]),
        name: "large".into(),
    };
    let before = status_bytes("VmRSS:");
    write_chunk(&store, &identity, scratch.path(), move || {
        parts(page_count, commit)
    })
    .await
    .unwrap();
    let written = status_bytes("VmHWM:") - before;
    let output = scratch.path().join("out.db");
    restore::restore(
        &store,
        "large",
        None,
        When::Latest,
        &output,
        &RestoreOptions::default(),
        &|_| (),
    )
    .await
    .unwrap();
    assert_eq!(
        std::fs::metadata(&output).unwrap().len(),
        u64::from(mib) << 20
    );
    let peak = status_bytes("VmHWM:") - before;
    println!(
        "{mib} MiB: {} KiB resident to archive, {} KiB in all",
        written >> 10,
        peak >> 10
    );
    assert!(peak < RESIDENT_LIMIT_BYTES, "{peak} bytes resident");
}
