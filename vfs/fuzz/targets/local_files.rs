//! The small files beside a database, with any bytes in them: the mark, the record of a warm copy,
//! the resolution. Their checksums may be right all the same, so that what lies behind is reached.
//!
//! What must hold: no panic, memory bounded by the file, and what is read reads the same once it
//! has been written again.

#![no_main]

mod edits;

use arbitrary::Arbitrary;
use durovfs_copies::{AbsentPages, CopyRecord, Stand, record_path};
use durovfs_vfs::mark::{
    InFlight, KnownTransaction, MAX_NAME_BYTES, Mark, MarkState, Tip, Unconfirmed, WalPosition,
    mark_path, note_wal_ended,
};
use durovfs_wire::entry::{Origin, TransactionSummary};
use durovfs_wire::resolution::Resolution;
use durovfs_wire::wal::{WalChecksum, WalSalts};
use durovfs_wire::{
    ClientId, CommitHeader, DatabaseChecksum, DatabaseId, Epoch, LogPosition, Lsn, PageSize,
    Timestamp,
};
use edits::{Edit, edit};
use libfuzzer_sys::fuzz_target;
use serde_json::{Value, json};
use std::path::Path;
use std::sync::OnceLock;

/// Pages of a mark's table that are added up: each is read from the file.
const TABLE_PAGES_MAX: u32 = 100;
const SLOT_BYTES: usize = 512;
const CONFIRMATION: std::ops::Range<usize> = 1088..1176;
const NAME_OFFSET: usize = 2048;

#[derive(Arbitrary, Debug)]
enum Input {
    /// Any bytes, as every one of the files.
    Raw(Vec<u8>),
    /// A mark that was edited; `seals` makes its checksums right again.
    Mark { edits: Vec<Edit>, seals: bool },
    /// A copy's record that was edited, with a right checksum.
    CopyRecord {
        stands: [StandEdit; 2],
        edits: Vec<Edit>,
    },
    /// A resolution that was edited; `seals` makes its checksum right again.
    Resolution { edits: Vec<Edit>, seals: bool },
}

#[derive(Arbitrary, Debug)]
struct StandEdit {
    is_there: bool,
    page_count: Option<u32>,
    absent: Option<Vec<(u32, u32)>>,
    grows_to: u32,
}

fuzz_target!(|input: Input| {
    let folder = tempfile::tempdir().expect("a folder");
    let database = folder.path().join("a.db");
    match input {
        Input::Raw(bytes) => {
            read_mark(&database, &bytes);
            read_copy_record(&database, &bytes, [u32::MAX; 2]);
            read_resolution(&bytes);
        }
        Input::Mark { edits, seals } => {
            let mut bytes = valid_mark().to_vec();
            edit(&mut bytes, &edits);
            if seals {
                seal_mark(&mut bytes);
            }
            read_mark(&database, &bytes);
        }
        Input::CopyRecord { stands, edits } => {
            let bytes = copy_record(&stands, &edits);
            let grows_to = stands.map(|stand| stand.grows_to);
            read_copy_record(&database, &bytes, grows_to);
        }
        Input::Resolution { edits, seals } => {
            let resolution = Resolution {
                database: DatabaseId::from_bytes([7; 16]),
                given_up: position(3),
            };
            let mut bytes = resolution.encode().to_vec();
            edit(&mut bytes, &edits);
            if seals && bytes.len() >= 16 {
                let crc = crc32fast::hash(&bytes[16..]);
                bytes[12..16].copy_from_slice(&crc.to_le_bytes());
            }
            read_resolution(&bytes);
        }
    }
});

fn position(lsn: u64) -> LogPosition {
    LogPosition::new(Epoch::new(2), Lsn::new(lsn))
}

fn origin(sequence: u64) -> Origin {
    let client = ClientId::from_bytes([9; 16]);
    Origin { client, sequence }
}

fn tip(lsn: u64) -> Tip {
    let last = KnownTransaction {
        position: position(lsn),
        checksum: DatabaseChecksum::from_u64(lsn),
        page_size: PageSize::try_from(4096).expect("a page size"),
        page_count: 9,
    };
    let wal = WalPosition {
        salts: WalSalts(1, 2),
        checkpoint_sequence: 3,
        frame: 4,
        checksum: WalChecksum(5, 6),
    };
    let wal = Some(wal);
    Tip { last, wal }
}

/// A mark with everything in it that one can have, and some of a page table.
fn valid_mark() -> &'static [u8] {
    static BYTES: OnceLock<Vec<u8>> = OnceLock::new();
    BYTES.get_or_init(|| {
        let folder = tempfile::tempdir().expect("a folder");
        let database = folder.path().join("a.db");
        std::fs::write(&database, b"x").expect("a database");
        let newest = origin(11);
        let confirmed = tip(5);
        let state = MarkState {
            last: Some(tip(5).last),
            wal: tip(5).wal,
            in_flight: Some(InFlight {
                origin: origin(12),
                base_lsn: Lsn::new(5),
                checksum: DatabaseChecksum::from_u64(13),
            }),
            applying: true,
            unconfirmed: Some(Unconfirmed { newest, confirmed }),
            begins_after: Lsn::new(1),
            ..MarkState::new(DatabaseId::from_bytes([7; 16]))
        };
        let mut mark = Mark::create(&database, "name", &state).expect("a mark");
        mark.write(&state).expect("a second slot");
        mark.confirm(newest, &confirmed).expect("a confirmation");
        mark.stamp().expect("a stamp");
        let mut bytes = std::fs::read(mark_path(&database)).expect("the mark");
        bytes.resize(8192 + 16 * 8, 1);
        bytes
    })
}

fn seal_mark(bytes: &mut [u8]) {
    let mut seal = |checksum_at: usize, covered: std::ops::Range<usize>| {
        if bytes.len() >= covered.end.max(checksum_at + 4) {
            let crc = crc32fast::hash(&bytes[covered]);
            bytes[checksum_at..checksum_at + 4].copy_from_slice(&crc.to_le_bytes());
        }
    };
    for slot in [0, SLOT_BYTES] {
        seal(slot + 12, slot + 16..slot + 256);
    }
    seal(
        CONFIRMATION.start + 4,
        CONFIRMATION.start + 8..CONFIRMATION.end,
    );
    seal(1024 + 36, 1024..1024 + 36);
    if let Some(length) = bytes.get(NAME_OFFSET..NAME_OFFSET + 2) {
        let text = NAME_OFFSET + 6;
        let length = usize::from(u16::from_le_bytes([length[0], length[1]]));
        if let Some(name) = bytes.get(text..text + length) {
            let crc = crc32fast::hash(name);
            bytes[NAME_OFFSET + 2..text].copy_from_slice(&crc.to_le_bytes());
        }
    }
}

fn read_mark(database: &Path, bytes: &[u8]) {
    std::fs::write(database, b"x").expect("a database");
    std::fs::write(mark_path(database), bytes).expect("a mark");
    let opened = || Mark::open(database).map(|opened| opened.expect("a mark that was there"));
    let Ok(Some((mut mark, state))) = Mark::open(database) else {
        let _ = note_wal_ended(database);
        return;
    };
    assert!(mark.name().len() <= MAX_NAME_BYTES);
    let _ = mark.stamp_matches().expect("a stamp, or none");
    let pages = state.page_count().min(TABLE_PAGES_MAX);
    mark.page_table().sum(1, pages).expect("a page table");
    if let Some((newest, tip)) = mark.confirmation().expect("a confirmation, or none") {
        mark.confirm(newest, &tip).expect("room for it");
        assert_eq!(mark.confirmation().expect("it"), Some((newest, tip)));
    }
    mark.write(&state).expect("room for it");
    let (again, read) = opened().expect("a mark just written");
    assert_eq!((again.name(), read), (mark.name(), state));
    note_wal_ended(database).expect("a mark just written");
    let (_, ended) = opened().expect("a mark just written");
    assert_eq!(ended, MarkState { wal: None, ..state });
}

fn stand(lsn: u64) -> Stand {
    let commit = CommitHeader {
        origin: origin(lsn),
        time: Timestamp::from_micros(4),
        base_lsn: Lsn::new(1),
        page_size: PageSize::try_from(4096).expect("a page size"),
        page_count: 20,
        slot_count: 2,
        checksum: DatabaseChecksum::from_u64(u64::MAX),
        whole_image: false,
    };
    let mut absent = AbsentPages::all(20);
    absent.remove(1);
    absent.remove(7);
    Stand {
        summary: TransactionSummary {
            position: position(lsn),
            commit,
        },
        format: [1, 1],
        absent,
    }
}

fn copy_record(stands: &[StandEdit; 2], edits: &[Edit]) -> Vec<u8> {
    let record = CopyRecord {
        database: DatabaseId::from_bytes([9; 16]),
        at: stands[0].is_there.then(|| stand(5)),
        next: stands[1].is_there.then(|| stand(8)),
    };
    let mut record = serde_json::to_value(record).expect("JSON");
    for (name, wanted) in ["at", "next"].iter().zip(stands) {
        let Value::Object(stand) = &mut record[name] else {
            continue;
        };
        if let Some(page_count) = wanted.page_count {
            stand["summary"]["commit"]["page_count"] = json!(page_count);
        }
        if let Some(ranges) = &wanted.absent {
            stand.insert("absent".into(), json!(ranges));
        }
    }
    let mut body = record.to_string().into_bytes();
    edit(&mut body, edits);
    let mut bytes = format!("durovfs-copy 1 {:08x}\n", crc32fast::hash(&body)).into_bytes();
    bytes.extend(body);
    bytes
}

fn read_copy_record(copy: &Path, bytes: &[u8], grows_to: [u32; 2]) {
    std::fs::write(record_path(copy), bytes).expect("a record");
    let Some(record) = CopyRecord::load(copy).expect("a file that can be read") else {
        return;
    };
    let stands = [&record.at, &record.next];
    for (stand, page_count) in stands.into_iter().zip(grows_to) {
        let Some(stand) = stand else { continue };
        assert!(stand.absent.count() <= stand.page_count());
        let mut absent = stand.absent_in(page_count);
        assert!(absent.count() <= page_count);
        absent.remove(page_count / 2);
        assert!(!absent.contains(page_count / 2));
    }
    record.store(copy).expect("room for it");
    assert_eq!(CopyRecord::load(copy).expect("it"), Some(record));
}

fn read_resolution(bytes: &[u8]) {
    if let Ok(resolution) = Resolution::decode(bytes) {
        assert_eq!(resolution.encode(), bytes);
    }
}
