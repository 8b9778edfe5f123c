//! The application's machine loses its power: its database is on a file system that then forgets
//! what was not synced. What was acknowledged is there when it is opened again, whatever
//! `PRAGMA synchronous` says.

use durovfs_tests::app::App;
use durovfs_tests::cluster::{Cluster, ClusterOptions};
use durovfs_tests::disks::Disk;
use durovfs_tests::image::{assert_same, image_of};
use durovfs_tests::leave_out;
use rustix::process::{Pid, Signal, kill_process};
use std::path::{Path, PathBuf};
use std::sync::Barrier;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(120);
const DISK_MEGABYTES: u32 = 96;
/// Times that the power goes.
const ROUNDS: u64 = 3;
/// Rows that each database gets before it goes, at least; it goes in the middle of some more.
const ROWS_AT_LEAST: u64 = 25;
const ROWS_AT_MOST: u64 = 10_000;
/// Deferred commits that are waited for together.
const WAIT_EVERY: u64 = 5;
const CHECKPOINT_EVERY: u64 = 12;
const SYNCHRONOUS: [&str; 3] = ["OFF", "NORMAL", "FULL"];

/// A database, and what was told of its rows, which are numbered from 1.
struct Case {
    file: PathBuf,
    synchronous: &'static str,
    is_deferred: bool,
    /// Rows up to this one were acknowledged.
    acked: u64,
    /// Rows up to this one were tried, without those of earlier rounds that did not come to be.
    tried: u64,
}

impl Case {
    fn name(&self) -> String {
        let mode = if self.is_deferred {
            "deferred"
        } else {
            "quorum"
        };
        format!("{mode}, synchronous={}", self.synchronous)
    }

    fn open(&self, cluster: &Cluster) -> App {
        let mut app = App::open(cluster, &self.file);
        app.run(&format!("PRAGMA synchronous={}", self.synchronous));
        app.run("PRAGMA wal_autocheckpoint=0");
        if self.is_deferred {
            app.run("PRAGMA durovfs_durability=deferred");
        }
        app
    }

    /// Inserts until the power is gone.
    fn write(&mut self, app: &mut App, ready: &Barrier) {
        for count in 1..=ROWS_AT_MOST {
            if count == ROWS_AT_LEAST {
                ready.wait();
            }
            let row = self.tried + 1;
            self.tried = row;
            let insert = format!("INSERT INTO t VALUES ({row}, randomblob(900))");
            if app
                .try_execute(&insert)
                .is_none_or(|reply| reply.result.is_err())
            {
                return;
            }
            if !self.is_deferred {
                self.acked = row;
            } else if row.is_multiple_of(WAIT_EVERY) {
                let waited = app.try_execute("SELECT durovfs_wait()");
                if waited.is_none_or(|reply| reply.result.is_err()) {
                    return;
                }
                self.acked = row;
            }
            if row.is_multiple_of(CHECKPOINT_EVERY) {
                let _ = app.try_execute("PRAGMA wal_checkpoint(TRUNCATE)");
            }
        }
        panic!("{}: the power never went", self.name());
    }

    /// How many of the rows plain SQLite finds, before anything puts the file right.
    fn rows_left(&self) -> u64 {
        let copy = self.file.with_extension("copy");
        for piece in ["", "-wal"] {
            let (from, to) = (with(&self.file, piece), with(&copy, piece));
            if std::fs::copy(from, &to).is_err() {
                let _ = std::fs::remove_file(&to);
            }
        }
        // Damaged, or without its table, it may be.
        let rows = rusqlite::Connection::open(&copy).and_then(|plain| {
            plain.query_row("SELECT count(*) FROM t", [], |row| row.get::<_, i64>(0))
        });
        for piece in ["", "-wal", "-shm"] {
            let _ = std::fs::remove_file(with(&copy, piece));
        }
        rows.map_or(0, |rows| u64::try_from(rows).unwrap_or(0))
    }

    /// Every acked row is there, in order, and none that nobody made.
    fn check(&mut self, app: &mut App) {
        let name = self.name();
        assert_eq!(app.value("PRAGMA integrity_check"), "ok", "{name}");
        let rows = app.value("SELECT count(*) FROM t").as_u64().unwrap();
        let last = app.value("SELECT coalesce(max(n), 0) FROM t");
        assert_eq!(last, rows, "{name}: a row in the middle is missing");
        let Self { acked, tried, .. } = *self;
        assert!(
            rows >= acked,
            "{name}: {acked} rows were acked, {rows} are there"
        );
        assert!(
            rows <= tried,
            "{name}: {tried} rows were tried, {rows} are there"
        );
        (self.acked, self.tried) = (rows, rows);
    }
}

fn with(file: &Path, suffix: &str) -> PathBuf {
    durovfs_tests::image::beside(file, suffix)
}

fn cases(disk: &Disk) -> Vec<Case> {
    let modes = [false, true];
    let all = modes
        .iter()
        .flat_map(|mode| SYNCHRONOUS.map(|level| (*mode, level)));
    let case = |(is_deferred, synchronous): (bool, &'static str)| Case {
        file: disk.path().join(format!("{synchronous}-{is_deferred}.db")),
        synchronous,
        is_deferred,
        acked: 0,
        tried: 0,
    };
    all.map(case).collect()
}

#[test]
fn what_was_acked_outlives_the_applications_disk_losing_its_power() {
    // Broken: a commit that was acknowledged would be gone, or a file that lost its unsynced end
    // would stay behind, or be refused, or be damaged.
    let scratch = tempfile::tempdir().unwrap();
    let disk = match Disk::make(scratch.path(), DISK_MEGABYTES) {
        Ok(disk) => disk,
        Err(missing) => return leave_out("power cuts under the application's disk", &missing),
    };
    let mut cluster = Cluster::start(ClusterOptions {
        replicas: 3,
        ..ClusterOptions::default()
    });
    let mut cases = cases(&disk);
    for case in &cases {
        let mut app = case.open(&cluster);
        app.run("CREATE TABLE t (n INTEGER PRIMARY KEY, filling BLOB)");
        app.run("SELECT durovfs_wait()");
        app.close();
    }
    let mut lost = 0;
    for round in 1..=ROUNDS {
        let ready = Barrier::new(cases.len() + 1);
        std::thread::scope(|scope| {
            for case in &mut cases {
                let (ready, cluster) = (&ready, &cluster);
                scope.spawn(move || {
                    let mut app = case.open(cluster);
                    case.write(&mut app, ready);
                });
            }
            ready.wait();
            disk.lose_power();
        });
        disk.start_again();
        for case in &mut cases {
            let left = case.rows_left();
            println!(
                "round {round}, {}: {left} of {} acked rows",
                case.name(),
                case.acked
            );
            lost += u64::from(left < case.acked);
            let mut app = case.open(&cluster);
            case.check(&mut app);
            app.close();
        }
    }
    assert!(
        lost > 0,
        "no power loss took anything from a file: it proves nothing"
    );
    for case in &cases {
        cluster.wait_archived(&case.file, LIMIT);
        let restored = scratch.path().join("restored.db");
        cluster.restore(&case.file, None, &restored);
        let image = image_of(&case.file, scratch.path());
        assert_same(&case.name(), &std::fs::read(&restored).unwrap(), &image);
        std::fs::remove_file(restored).unwrap();
    }
    cluster.stop();
}

/// Megabytes of the database that is written in place.
const BIG_MEGABYTES: u64 = 24;
/// Cuts that must come in the middle of it.
const CUTS: u64 = 2;
/// Tries for that: the cut may come too late.
const TRIES: u64 = 10;

/// Opens a database whose file must be written in place, and takes the power away when some of
/// that is on the disk. Whether it was not all.
fn cut_while_opening(cluster: &Cluster, disk: &Disk, file: &Path) -> bool {
    let mut app = App::spawn(&cluster.client_config());
    app.begin_opening(file);
    let half = (BIG_MEGABYTES << 20) / 2;
    while std::fs::metadata(file).map_or(0, |file| file.len()) < half {
        std::thread::yield_now();
    }
    let pid = Pid::from_raw(app.pid().cast_signed()).expect("a pid");
    kill_process(pid, Signal::STOP).expect("stop the application");
    // As the system does by itself when it likes: the file, and not what lies beside it.
    let synced = std::fs::File::open(file).and_then(|file| file.sync_all());
    synced.expect("sync the database file");
    disk.lose_power();
    drop(app);
    disk.start_again();
    let left = std::fs::metadata(file).expect("the file is there").len();
    left < BIG_MEGABYTES << 20
}

#[test]
fn a_power_loss_while_a_file_is_written_from_the_log_leaves_one_that_opens() {
    // Broken: the file would be like no transaction of the log, and refused until an operator
    // comes.
    let scratch = tempfile::tempdir().unwrap();
    let disk = match Disk::make(scratch.path(), DISK_MEGABYTES) {
        Ok(disk) => disk,
        Err(missing) => return leave_out("power cuts while a file is written", &missing),
    };
    let mut cluster = Cluster::start(ClusterOptions {
        replicas: 3,
        ..ClusterOptions::default()
    });
    let file = disk.path().join("big.db");
    let mut app = App::open(&cluster, &file);
    app.run("PRAGMA journal_mode=WAL");
    app.run("CREATE TABLE t (n INTEGER PRIMARY KEY, filling BLOB)");
    for row in 1..=BIG_MEGABYTES {
        app.run(&format!(
            "INSERT INTO t VALUES ({row}, randomblob(1 << 20))"
        ));
    }
    app.close();
    let mut cuts = 0;
    for _ in 0..TRIES {
        for suffix in ["", "-wal", "-shm", "-durovfs"] {
            let _ = std::fs::remove_file(with(&file, suffix));
        }
        cuts += u64::from(cut_while_opening(&cluster, &disk, &file));
        let mut app = App::open(&cluster, &file);
        assert_eq!(app.value("PRAGMA integrity_check"), "ok");
        assert_eq!(app.value("SELECT count(*) FROM t"), BIG_MEGABYTES);
        app.close();
        if cuts == CUTS {
            return cluster.stop();
        }
    }
    panic!("{cuts} cuts came in the middle of {TRIES}: it proves little");
}
