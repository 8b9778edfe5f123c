//! One round of random work in a process of its own, which may die in the middle of a commit.

use super::common::model::{Fault, ModelSink};
use super::host::{Db, Failure, Host, Rows, Which};
use super::recorder::{self, Death};
use libsqlite3_sys as sqlite;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const PAGE_SIZES: [u32; 8] = [512, 1024, 2048, 4096, 8192, 16384, 32768, 65536];
const STEPS: usize = 25;

/// Rows by id: length of the text, and the letter that it is made of.
pub type Model = BTreeMap<i64, (u32, char)>;

/// Where a round ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// All connections are closed.
    Close,
    /// Before the commit is sent.
    Unsent,
    /// The quorum has it, and nobody heard.
    Unheard,
    /// At the write that completes it.
    Completing(Death),
}

impl End {
    pub fn of_round(seed: u64) -> Self {
        match seed % 7 {
            0 | 1 => Self::Close,
            2 => Self::Unsent,
            3 => Self::Unheard,
            4 => Self::Completing(Death::Before),
            5 => Self::Completing(Death::Within),
            _ => Self::Completing(Death::After),
        }
    }

    /// Whether the quorum has the commit; whether the local file has it.
    pub fn has_commit(self) -> (bool, bool) {
        match self {
            Self::Close | Self::Completing(Death::After) => (true, true),
            Self::Unsent => (false, false),
            Self::Unheard | Self::Completing(_) => (true, false),
        }
    }
}

pub struct Work {
    rng: ChaCha8Rng,
    host: &'static Host,
    sink: Arc<ModelSink>,
    path: PathBuf,
    name: String,
    connections: Vec<Db>,
    exclusive: bool,
    next_id: i64,
    rows: Model,
    end: End,
    pub refused: u32,
    pub committed: u32,
    /// Commits refused for SQLite's own bug.
    pub broken: u32,
}

/// What a connection reads, or what is wrong with it.
pub fn read(db: &Db) -> Result<Model, Failure> {
    let sql = "SELECT id, length(data), substr(data, 1, 1), \
               data = printf('%.*c', length(data), substr(data, 1, 1)) FROM t ORDER BY id";
    Ok(model(&db.run(sql)?))
}

fn model(rows: &Rows) -> Model {
    let row = |row: &Vec<String>| {
        assert_eq!(row[3], "1", "a row of letters that differ");
        (
            row[0].parse().unwrap(),
            (row[1].parse().unwrap(), row[2].parse().unwrap()),
        )
    };
    rows.iter().map(row).collect()
}

/// The rows before and after the commit in which the process may die.
pub fn expectation(path: &Path) -> (Model, Model) {
    let text = std::fs::read_to_string(path.with_extension("expected")).unwrap();
    let mut both = (Model::new(), Model::new());
    for line in text.lines() {
        let fields: Vec<&str> = line.split(' ').collect();
        let side = if fields[0] == "before" {
            &mut both.0
        } else {
            &mut both.1
        };
        let row = (fields[2].parse().unwrap(), fields[3].parse().unwrap());
        side.insert(fields[1].parse().unwrap(), row);
    }
    both
}

fn expect(path: &Path, before: &Model, after: &Model) {
    let mut text = String::new();
    for (side, rows) in [("before", before), ("after", after)] {
        for (id, (length, letter)) in rows {
            text.push_str(&format!("{side} {id} {length} {letter}\n"));
        }
    }
    std::fs::write(path.with_extension("expected"), text).unwrap();
}

impl Work {
    pub fn new(which: Which, sink: Arc<ModelSink>, path: &Path, seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let exclusive = rng.random_bool(0.2);
        let mut work = Self {
            rng,
            host: which.host(),
            sink,
            path: path.to_owned(),
            name: path.to_str().unwrap().to_owned(),
            connections: Vec::new(),
            exclusive,
            next_id: 0,
            rows: Model::new(),
            end: End::of_round(seed),
            refused: 0,
            committed: 0,
            broken: 0,
        };
        let page_size = PAGE_SIZES[work.rng.random_range(0..PAGE_SIZES.len())];
        let auto_vacuum = work.rng.random_range(0..3);
        let db = Db::open(work.host, path, c"durovfs").unwrap();
        db.must(&format!(
            "PRAGMA page_size={page_size}; PRAGMA auto_vacuum={auto_vacuum}; \
             PRAGMA journal_mode=WAL; CREATE TABLE t(id INTEGER PRIMARY KEY, data TEXT); \
             CREATE INDEX i ON t(data)"
        ));
        drop(db);
        work.reopen();
        work
    }

    /// The whole round. Does not return when the process dies as it was to.
    pub fn run(&mut self) {
        for _ in 0..STEPS {
            if self.rng.random_bool(0.8) {
                self.transaction(End::Close);
            } else {
                self.other();
            }
        }
        let rows = self.rows.clone();
        expect(&self.path, &rows, &rows);
        if self.end != End::Close {
            self.transaction(self.end);
            // The transaction had nothing to write, or the host's bug broke it.
            let rows = self.rows.clone();
            expect(&self.path, &rows, &rows);
        }
        self.connections.clear();
        recorder::assert_agreement(&self.name);
    }

    fn reopen(&mut self) {
        self.connections.clear();
        for _ in 0..if self.exclusive { 1 } else { 2 } {
            let db = Db::open(self.host, &self.path, c"durovfs").unwrap();
            if self.exclusive {
                db.must("PRAGMA locking_mode=EXCLUSIVE");
            }
            let synchronous = ["OFF", "NORMAL", "FULL", "EXTRA"][self.rng.random_range(0..4)];
            let cache = [5, 10, 200][self.rng.random_range(0..3)];
            db.must(&format!(
                "PRAGMA journal_mode=WAL; PRAGMA cache_size={cache}; \
                 PRAGMA wal_autocheckpoint=40; PRAGMA synchronous={synchronous}"
            ));
            if self.rng.random_bool(0.3) {
                db.must("PRAGMA journal_size_limit=20000");
            }
            if self.rng.random_bool(0.2) {
                db.must("PRAGMA mmap_size=1000000");
            }
            self.connections.push(db);
        }
    }

    /// A quarter is refused.
    fn fault(&mut self, end: End) -> Fault {
        match end {
            End::Unsent => return Fault::Die,
            End::Unheard => return Fault::CommitAndDie,
            End::Completing(_) => return Fault::None,
            End::Close => {}
        }
        match self.rng.random_range(0..100) {
            0..10 => Fault::Refuse,
            10..15 => Fault::NotPrimary,
            15..20 => Fault::UnknownLost,
            20..25 => Fault::UnknownCommitted,
            _ => Fault::None,
        }
    }

    fn transaction(&mut self, end: End) {
        let index = self.rng.random_range(0..self.connections.len());
        let reader = self.rng.random_bool(0.2);
        if let (true, Some(other)) = (reader, self.connections.get(1 - index)) {
            other.must("BEGIN; SELECT count(*) FROM t");
        }
        let fault = self.fault(end);
        let before = (
            self.sink.last_lsn(&self.name),
            recorder::completions(&self.name),
        );
        let mut rows = self.rows.clone();
        let result = self.statements(index, &mut rows, fault, end);
        let after = (
            self.sink.last_lsn(&self.name),
            recorder::completions(&self.name),
        );
        let (logged, completed) = (after.0 - before.0, after.1 - before.1);
        recorder::assert_agreement(&self.name);
        match result {
            Ok(()) => {
                // One completing write per transaction, and none for one that wrote nothing.
                assert_eq!((logged, completed), (logged.min(1), logged), "{fault:?}");
                let changed = rows != self.rows;
                assert!(
                    logged == 1 || !changed,
                    "acknowledged, not logged: {fault:?}"
                );
                self.committed += logged as u32;
                self.rows = rows.clone();
            }
            Err(failure) => {
                assert_eq!(completed, 0, "completed and refused: {fault:?}");
                self.check_refusal(index, fault, &failure);
            }
        }
        self.sink.clear_faults(&self.name);
        if let (true, Some(other)) = (reader, self.connections.get(1 - index)) {
            other.must("COMMIT");
        }
        if fault == Fault::UnknownCommitted && logged > 0 {
            self.bring_level(index);
            self.rows = rows;
        }
        self.check();
    }

    fn check_refusal(&mut self, index: usize, fault: Fault, failure: &Failure) {
        let db = &self.connections[index];
        assert!(db.is_autocommit(), "still in its transaction: {failure:?}");
        let expected = match fault {
            Fault::Refuse => sqlite::SQLITE_IOERR_WRITE,
            Fault::NotPrimary => sqlite::SQLITE_READONLY,
            Fault::UnknownLost | Fault::UnknownCommitted => sqlite::SQLITE_IOERR_FSYNC,
            _ => 0,
        };
        if failure.code == expected {
            self.refused += 1;
            return;
        }
        let said = db.last_error();
        let is_bug = failure.code == sqlite::SQLITE_IOERR_WRITE && said.contains("broken at frame");
        assert!(
            is_bug && self.host.has_savepoint_bug(),
            "{fault:?}: {failure:?}; {said}"
        );
        self.broken += 1;
    }

    /// The log has a commit that the file lacks.
    fn bring_level(&mut self, index: usize) {
        if self.exclusive || self.rng.random_bool(0.5) {
            self.reopen();
            return;
        }
        let db = &self.connections[index];
        // As after another connection's commit, and it has no busy handler.
        let refused = db.run("INSERT INTO t VALUES (-1, 'x')").unwrap_err();
        assert_eq!(refused.code & 0xff, sqlite::SQLITE_BUSY, "{refused:?}");
        db.must("INSERT INTO t VALUES (-1, 'x'); DELETE FROM t WHERE id = -1");
    }

    fn statements(
        &mut self,
        index: usize,
        rows: &mut Model,
        fault: Fault,
        end: End,
    ) -> Result<(), Failure> {
        let db = &self.connections[index];
        db.run("BEGIN IMMEDIATE")?;
        let count = if self.rng.random_bool(0.3) { 40 } else { 3 };
        for _ in 0..self.rng.random_range(0..=count) {
            statement(&mut self.rng, db, &mut self.next_id, rows)?;
        }
        if end == End::Close && self.rng.random_bool(0.1) {
            db.run("ROLLBACK")?;
            rows.clone_from(&self.rows);
            return Ok(());
        }
        expect(&self.path, &self.rows, rows);
        if let End::Completing(death) = end {
            recorder::die_at_completion(&self.name, death);
        }
        self.sink.fault(&self.name, &[fault]);
        db.run("COMMIT").map(drop)
    }

    fn other(&mut self) {
        let index = self.rng.random_range(0..self.connections.len());
        let db = &self.connections[index];
        match self.rng.random_range(0..9) {
            0 => drop(db.must("PRAGMA wal_checkpoint(PASSIVE)")),
            1 => drop(db.must("PRAGMA wal_checkpoint(FULL)")),
            2 => drop(db.must("PRAGMA wal_checkpoint(RESTART)")),
            3 => drop(db.must("PRAGMA wal_checkpoint(TRUNCATE)")),
            4 => drop(db.must("VACUUM")),
            5 => drop(db.must("BEGIN; DELETE FROM t WHERE id % 7 = 3; ROLLBACK")),
            6 => self.reopen(),
            7 => drop(db.must("PRAGMA incremental_vacuum(3)")),
            _ => drop(db.must("REINDEX")),
        }
        self.check();
    }

    fn check(&self) {
        recorder::assert_agreement(&self.name);
        for db in &self.connections {
            assert_eq!(read(db).unwrap(), self.rows);
        }
    }
}

fn statement(
    rng: &mut ChaCha8Rng,
    db: &Db,
    next_id: &mut i64,
    rows: &mut Model,
) -> Result<(), Failure> {
    let letter = char::from(rng.random_range(b'a'..b'd'));
    let length = rng.random_range(1..3000);
    let data = format!("printf('%.*c', {length}, '{letter}')");
    let id = rng.random_range(1..=(*next_id).max(1));
    match rng.random_range(0..10) {
        0..5 => {
            *next_id += 1;
            db.run(&format!("INSERT INTO t VALUES ({next_id}, {data})"))?;
            rows.insert(*next_id, (length, letter));
        }
        5..8 => {
            db.run(&format!("UPDATE t SET data = {data} WHERE id = {id}"))?;
            rows.entry(id).and_modify(|row| *row = (length, letter));
        }
        8 => {
            let last = id + 3;
            db.run(&format!("DELETE FROM t WHERE id BETWEEN {id} AND {last}"))?;
            rows.retain(|row, _| !(id..=last).contains(row));
        }
        _ => savepoint(rng, db, rows, (length, letter))?,
    }
    Ok(())
}

/// Everything changes; most of it is taken back, in one or two steps.
fn savepoint(
    rng: &mut ChaCha8Rng,
    db: &Db,
    rows: &mut Model,
    (length, letter): (u32, char),
) -> Result<(), Failure> {
    db.run("SAVEPOINT s")?;
    db.run(&format!(
        "UPDATE t SET data = printf('%.*c', {length}, '{letter}')"
    ))?;
    if rng.random_bool(0.5) {
        db.run("SAVEPOINT inner_one; DELETE FROM t WHERE id % 2; ROLLBACK TO inner_one")?;
    }
    if rng.random_bool(0.7) {
        db.run("ROLLBACK TO s")?;
    } else {
        rows.values_mut().for_each(|row| *row = (length, letter));
    }
    db.run("RELEASE s").map(drop)
}
