//! A connection over files that fail on demand: what SQLite hears after an acknowledged commit.

use super::*;
use crate::mark::{KnownTransaction, MarkState, WalPosition};
use crate::sink::{OpenedLog, SinkError};
use bytes::Bytes;
use durovfs_wire::entry::EntryPart;
use durovfs_wire::wal::{FrameHeader, WalChecksum, WalHeader, WalSalts};
use durovfs_wire::{ClientId, CommitHeader, DatabaseChecksum, PageSize};
use libsqlite3_sys as sqlite;
use std::fs::File;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

#[derive(Default)]
struct Always {
    commits: AtomicU64,
}

impl Sink for Always {
    fn open(
        &self,
        _: &str,
        _: Option<DatabaseId>,
        _: Option<Duration>,
    ) -> Result<OpenedLog, SinkError> {
        unreachable!("the connection is open")
    }

    fn next_origin(&self) -> Origin {
        Origin {
            client: ClientId::from_bytes([1; 16]),
            sequence: 1,
        }
    }

    fn send_pages(&self, _: DatabaseId, _: Origin, _: PageSize, _: Bytes) -> Result<(), SinkError> {
        Ok(())
    }

    fn abort(&self, _: DatabaseId, _: Origin) {}

    fn commit(
        &self,
        _: DatabaseId,
        _: CommitHeader,
        _: Bytes,
        _: Option<Duration>,
    ) -> CommitOutcome {
        let lsn = self.commits.fetch_add(1, Ordering::Relaxed) + 2;
        CommitOutcome::Committed {
            position: LogPosition::new(Epoch::new(1), Lsn::new(lsn)),
        }
    }

    fn commit_deferred(
        &self,
        _: DatabaseId,
        _: CommitHeader,
        _: Option<u64>,
        _: Bytes,
        _: Option<Duration>,
    ) -> Result<(), SinkError> {
        Ok(())
    }

    fn is_own(&self, _: Origin) -> bool {
        true
    }

    fn take_deferred(&self, _: Origin) -> Option<CommitOutcome> {
        None
    }

    fn wait_deferred(&self, _: Origin, _: Option<std::time::Instant>) {}

    fn resolve(&self, _: DatabaseId, _: Origin, _: Lsn, _: Option<Duration>) -> CommitOutcome {
        CommitOutcome::Unknown {
            reason: "nobody answers".into(),
        }
    }

    fn read_log(
        &self,
        _: DatabaseId,
        _: Lsn,
        _: &mut dyn FnMut(EntryPart) -> Result<(), SinkError>,
    ) -> Result<(), SinkError> {
        Ok(())
    }
}

struct Faulty {
    file: File,
    database: PathBuf,
    /// Whether the mark knew of unconfirmed commits when the last write was made.
    was_marked: Arc<AtomicBool>,
    fails: Arc<AtomicBool>,
}

impl BaseFile for Faulty {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<usize, Refusal> {
        self.file.read_at(buffer, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> Result<(), Refusal> {
        if self.fails.load(Ordering::Relaxed) {
            return Err(Refusal::new(
                RefusalKind::File(sqlite::SQLITE_FULL),
                "disk full",
            ));
        }
        let (_, state) = Mark::open(&self.database)?.unwrap();
        self.was_marked
            .store(state.unconfirmed.is_some(), Ordering::Relaxed);
        BaseFile::write_at(&self.file, bytes, offset)
    }

    fn truncate(&self, size: u64) -> Result<(), Refusal> {
        self.file.truncate(size)
    }

    fn sync(&self) -> Result<(), Refusal> {
        self.file.sync()
    }

    fn size(&self) -> Result<u64, Refusal> {
        self.file.size()
    }
}

impl DatabaseFile for File {
    fn try_lock_exclusive(&self) -> Result<bool, Refusal> {
        Ok(false)
    }

    fn try_lock_shared(&self) -> Result<bool, Refusal> {
        Ok(false)
    }

    fn unlock_all(&self) {}

    fn recover_journal(&self) -> Result<(), Refusal> {
        Ok(())
    }
}

struct World {
    connection: Connection,
    fails: Arc<AtomicBool>,
    was_marked: Arc<AtomicBool>,
    sink: Arc<Always>,
    header: WalHeader,
    _dir: tempfile::TempDir,
}

fn world() -> World {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.db");
    std::fs::write(&path, [0; 512]).unwrap();
    let page_size = PageSize::try_from(512).unwrap();
    let last = KnownTransaction {
        position: LogPosition::new(Epoch::new(1), Lsn::new(1)),
        checksum: DatabaseChecksum::EMPTY,
        page_size,
        page_count: 1,
    };
    let state = MarkState {
        last: Some(last),
        ..MarkState::new(DatabaseId::from_bytes([2; 16]))
    };
    let mark = Mark::create(&path, "a", &state).unwrap();
    mark.stamp().unwrap();
    let sink = Arc::new(Always::default());
    let surroundings = Surroundings {
        sink: Arc::clone(&sink) as Arc<dyn Sink>,
        log: |_, _| {},
        open_timeout: Duration::from_secs(1),
        keep_local: false,
    };
    let database = Box::new(tempfile::tempfile().unwrap());
    let log = (DatabaseId::from_bytes([2; 16]), Epoch::new(1));
    let database_path = path.clone();
    let was_marked = Arc::new(AtomicBool::new(false));
    let mut connection = Connection::new(surroundings, path, mark, database, log);
    let fails = Arc::new(AtomicBool::new(false));
    let file = tempfile::tempfile().unwrap();
    connection.attach_wal(Box::new(Faulty {
        file,
        database: database_path,
        was_marked: Arc::clone(&was_marked),
        fails: Arc::clone(&fails),
    }));
    let header = WalHeader {
        big_endian_checksums: false,
        page_size,
        checkpoint_sequence: 0,
        salts: WalSalts(1, 2),
        checksum: Default::default(),
    };
    let header = WalHeader::parse(&header.encode()).unwrap();
    World {
        connection,
        fails,
        was_marked,
        sink,
        header,
        _dir: dir,
    }
}

impl World {
    /// The frame that follows one with this checksum, as `commit` writes the first.
    fn frame_after(&self, checksum: WalChecksum, image: &[u8; 512]) -> FrameHeader {
        let mut frame = FrameHeader {
            page_no: 1,
            commit_page_count: 1,
            salts: self.header.salts,
            checksum: Default::default(),
        };
        frame.checksum = frame.chain(checksum, false, image);
        frame
    }

    fn sent(&self) -> u64 {
        self.sink.commits.load(Ordering::Relaxed)
    }

    fn commit(&mut self, break_chain: bool) -> Result<(), Refusal> {
        let image = [7u8; 512];
        let mut frame = self.frame_after(self.header.checksum, &image);
        frame.checksum.0 ^= u32::from(break_chain);
        self.connection.write_wal(0, &self.header.encode())?;
        self.connection.write_wal(32, &frame.encode())?;
        self.connection.write_wal(56, &image)
    }
}

/// Broken, an acknowledged commit that the local disk refused is followed by others that stand on a
/// file without it.
#[test]
fn a_local_failure_after_the_acknowledgement_ends_all_writing() {
    let mut world = world();
    world
        .connection
        .write_wal(0, &world.header.encode())
        .unwrap();
    let (header, sink) = (world.header, Arc::clone(&world.sink));
    let image = [7u8; 512];
    let mut frame = FrameHeader {
        page_no: 1,
        commit_page_count: 1,
        salts: header.salts,
        checksum: Default::default(),
    };
    frame.checksum = frame.chain(header.checksum, false, &image);
    world.connection.write_wal(32, &frame.encode()).unwrap();
    world.fails.store(true, Ordering::Relaxed);
    let refusal = world.connection.write_wal(56, &image).unwrap_err();
    assert_eq!(refusal.code(), sqlite::SQLITE_IOERR_FSYNC);
    assert!(refusal.message.contains("is committed"), "{refusal}");
    world.fails.store(false, Ordering::Relaxed);
    let refusal = world.commit(false).unwrap_err();
    assert_eq!(refusal.code(), sqlite::SQLITE_IOERR_WRITE);
    assert_eq!(sink.commits.load(Ordering::Relaxed), 1);
    let status = world.connection.status();
    assert!(
        status.in_flight,
        "whoever opens it next must ask for the commit"
    );
    assert!(
        status.warnings.iter().any(|w| w.contains("open it again")),
        "{status:?}"
    );
}

/// Broken, each commit pays for a sync of a disk that nobody relies on, or a checkpoint does not
/// make the sync that it relies on.
#[test]
fn the_wal_is_not_synced_between_acknowledgement_and_unlock_only() {
    let mut world = world();
    assert!(world.connection.sync_wal().unwrap());
    world.commit(false).unwrap();
    assert!(!world.connection.sync_wal().unwrap());
    assert!(!world.connection.before_write_unlock());
    assert!(world.connection.sync_wal().unwrap());
}

/// Broken, an acknowledged commit is reported as failed when SQLite pads it, or each copy of its
/// last frame becomes a transaction of its own, or the next one does not find its place.
#[test]
fn padding_of_a_commit_is_written_and_not_sent() {
    for durability in [Durability::Quorum, Durability::Deferred] {
        let mut world = world();
        world.connection.set_durability(durability);
        world.commit(false).unwrap();
        let sent = world.sent();
        let image = [7u8; 512];
        let mut last = world.frame_after(world.header.checksum, &image);
        for frame in 2..4 {
            let offset = 32 + (frame - 1) * 536;
            last = world.frame_after(last.checksum, &image);
            // SQLite syncs in the middle of a frame: where the sector ends.
            let (first, rest) = image.split_at(100);
            let connection = &mut world.connection;
            connection.write_wal(offset, &last.encode()[..8]).unwrap();
            assert!(!connection.sync_wal().unwrap());
            connection
                .write_wal(offset + 8, &last.encode()[8..])
                .unwrap();
            assert!(!connection.sync_wal().unwrap());
            connection.write_wal(offset + 24, first).unwrap();
            assert!(!connection.sync_wal().unwrap());
            connection.write_wal(offset + 124, rest).unwrap();
            assert!(!world.connection.tap.is_holding());
            let wal = world.connection.mark.read().unwrap().wal.unwrap();
            assert_eq!((u64::from(wal.frame), wal.checksum), (frame, last.checksum));
        }
        assert_eq!(world.sent(), sent, "a copy is no transaction");
        world.connection.commit_ended();
        assert!(!world.connection.before_write_unlock());
        // The same page again is one when SQLite commits it as one.
        world.connection.set_durability(Durability::Quorum);
        let next = world.frame_after(last.checksum, &image);
        let offset = 32 + 3 * 536;
        let connection = &mut world.connection;
        connection.write_wal(offset, &next.encode()).unwrap();
        assert!(
            connection.sync_wal().is_err(),
            "a commit frame without its page"
        );
        if durability == Durability::Quorum {
            connection.write_wal(offset, &next.encode()).unwrap();
            connection.write_wal(offset + 24, &image).unwrap();
            assert_eq!(world.sent(), sent + 1);
        }
    }
}

/// Broken, a transaction that looks like padding as long as its page is not there is lost: with a
/// VFS above that does not tell when a commit ends, in exclusive mode.
#[test]
fn what_began_as_padding_can_be_a_transaction() {
    let mut world = world();
    world.commit(false).unwrap();
    let first = world.frame_after(world.header.checksum, &[7; 512]);
    let next = world.frame_after(first.checksum, &[8; 512]);
    world.connection.write_wal(568, &next.encode()).unwrap();
    world.connection.write_wal(592, &[8; 512]).unwrap();
    assert_eq!(world.sent(), 2);
    assert_eq!(world.connection.status().position.lsn, Lsn::new(3));
}

/// Broken, SQLite takes a commit back that stands, and others are built on a file that lacks it.
#[test]
fn padding_that_the_local_disk_refuses_ends_all_writing() {
    let mut world = world();
    world.commit(false).unwrap();
    let first = world.frame_after(world.header.checksum, &[7; 512]);
    let copy = world.frame_after(first.checksum, &[7; 512]);
    world.connection.write_wal(568, &copy.encode()).unwrap();
    world.fails.store(true, Ordering::Relaxed);
    let refusal = world.connection.write_wal(592, &[7; 512]).unwrap_err();
    assert_eq!(refusal.code(), sqlite::SQLITE_IOERR_FSYNC);
    world.fails.store(false, Ordering::Relaxed);
    assert!(world.connection.write_wal(568, &copy.encode()).is_err());
}

/// Broken, the savepoint bug of SQLite up to 3.49.1 loses commits that COMMIT reported as done.
#[test]
fn a_broken_chain_is_refused_and_nothing_is_sent() {
    let mut world = world();
    let refusal = world.commit(true).unwrap_err();
    assert_eq!(refusal.code(), sqlite::SQLITE_IOERR_WRITE);
    assert_eq!(world.sink.commits.load(Ordering::Relaxed), 0);
    world.connection.before_write_unlock();
    world.commit(false).unwrap();
    assert_eq!(world.connection.status().position.lsn, Lsn::new(2));
}

/// Broken, SQLITE_BUSY leaves a WAL write: SQLite keeps the transaction open, and every commit
/// after it is lost in a crash.
#[test]
fn busy_of_a_file_below_never_leaves_the_shim() {
    for code in [
        sqlite::SQLITE_BUSY,
        sqlite::SQLITE_BUSY | 1 << 8,
        sqlite::SQLITE_BUSY | 2 << 8,
    ] {
        let refusal = Refusal::new(RefusalKind::File(code), "busy");
        assert_eq!(refusal.code(), sqlite::SQLITE_IOERR);
    }
}

/// Broken, a crash leaves a frame in the WAL that no quorum has, and nothing tells what to go back
/// to.
#[test]
fn the_mark_knows_of_a_deferred_commit_before_its_frame_is_written() {
    let mut world = world();
    world.connection.set_durability(Durability::Deferred);
    world.commit(false).unwrap();
    assert!(world.was_marked.load(Ordering::Relaxed));
    assert_eq!(world.sink.commits.load(Ordering::Relaxed), 0);
    let status = world.connection.status();
    assert!(status.unconfirmed);
    assert_eq!(status.position.lsn, Lsn::new(1));
    // The local disk refuses: the commit is taken back, and nothing is unconfirmed.
    let mut world = self::world();
    world.connection.set_durability(Durability::Deferred);
    world
        .connection
        .write_wal(0, &world.header.encode())
        .unwrap();
    world.fails.store(true, Ordering::Relaxed);
    assert!(world.commit(false).is_err());
    assert!(!world.connection.status().unconfirmed);
}

/// Broken, the change of the journal mode that SQLite makes with a lock let go in between writes a
/// page over what another connection committed to a new WAL meanwhile: the log would have the old
/// page, the file the new one, and the mark would know nothing of the WAL.
#[test]
fn leaving_wal_mode_waits_for_who_began_a_wal_meanwhile() {
    let mut world = world();
    world.connection.detach_wal();
    let mut database = [0u8; 512];
    database[..18].copy_from_slice(b"SQLite format 3\0\x02\0");
    database[31] = 1;
    let leave = |connection: &mut Connection| {
        connection.write_database(0, &database)?;
        connection.commit_database()
    };
    world.connection.reserved().unwrap();
    let mut other = world.connection.mark.read().unwrap();
    let wal = WalPosition {
        salts: world.header.salts,
        checkpoint_sequence: 0,
        frame: 1,
        checksum: WalChecksum::default(),
    };
    other.last = other.last.map(|last| KnownTransaction {
        position: LogPosition::new(Epoch::new(1), Lsn::new(2)),
        ..last
    });
    other.wal = Some(wal);
    world.connection.mark.write(&other).unwrap();
    let refusal = leave(&mut world.connection).unwrap_err();
    assert_eq!(refusal.code(), sqlite::SQLITE_BUSY, "{refusal}");
    // SQLite plays its journal back, and the connection goes on.
    world.connection.write_database(0, &[0; 512]).unwrap();
    world.connection.commit_database().unwrap();
    world.connection.before_unlock();
    assert_eq!(world.connection.status().warnings, Vec::<String>::new());
    assert_eq!(world.connection.mark.read().unwrap(), other);
    // The same when the commit was made before the lock was taken.
    let path = with_suffix(&world.connection.path, "-wal");
    std::fs::write(&path, world.header.encode()).unwrap();
    world.connection.reserved().unwrap();
    let refusal = leave(&mut world.connection).unwrap_err();
    assert_eq!(refusal.code(), sqlite::SQLITE_BUSY, "{refusal}");
    assert_eq!(world.sent(), 0);
}
