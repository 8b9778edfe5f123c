//! Random work over everything SQLite does to a WAL, with refusals mixed in: the log, the file and
//! what the application was told must agree.

#![allow(clippy::unwrap_used, reason = "what fails in a test fails the test")]

mod common;

use common::model::Fault;
use common::*;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rusqlite::Connection;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

struct World {
    rng: ChaCha8Rng,
    path: PathBuf,
    name: String,
    connections: Vec<Connection>,
    exclusive: bool,
    journal: &'static str,
    next_id: i64,
    /// Rows that must be there, by id: length of the blob.
    rows: BTreeMap<i64, i64>,
    refusals: u32,
}

impl World {
    fn new(path: &Path, seed: u64, page_size: u32, exclusive: bool, journal: &'static str) -> Self {
        let rng = ChaCha8Rng::seed_from_u64(seed);
        let name = path.to_str().unwrap().to_owned();
        let mut world = Self {
            rng,
            path: path.to_owned(),
            name,
            connections: Vec::new(),
            exclusive,
            journal,
            next_id: 0,
            rows: BTreeMap::new(),
            refusals: 0,
        };
        let db = open(path);
        exec(
            &db,
            &format!("PRAGMA page_size={page_size}; PRAGMA journal_mode={journal}"),
        );
        exec(&db, "CREATE TABLE t(id INTEGER PRIMARY KEY, data BLOB)");
        exec(&db, "CREATE INDEX i ON t(data)");
        drop(db);
        world.reopen();
        world
    }

    fn reopen(&mut self) {
        self.connections.clear();
        for _ in 0..if self.exclusive { 1 } else { 2 } {
            let db = open(&self.path);
            if self.exclusive {
                exec(&db, "PRAGMA locking_mode=EXCLUSIVE");
            }
            exec(&db, &format!("PRAGMA journal_mode={}", self.journal));
            exec(
                &db,
                "PRAGMA cache_size=10; PRAGMA wal_autocheckpoint=40; PRAGMA synchronous=OFF",
            );
            if self.rng.random_bool(0.3) {
                exec(&db, "PRAGMA synchronous=FULL");
            }
            if self.rng.random_bool(0.3) {
                exec(&db, "PRAGMA journal_size_limit=20000");
            }
            self.connections.push(db);
        }
    }

    fn fault(&mut self) -> Fault {
        match self.rng.random_range(0..100) {
            0..15 => Fault::Refuse,
            15..20 => Fault::UnknownLost,
            20..25 => Fault::UnknownCommitted,
            _ => Fault::None,
        }
    }

    /// A transaction of random inserts, updates and deletes, some under savepoints.
    fn transaction(&mut self) {
        let index = self.rng.random_range(0..self.connections.len());
        let mut rows = self.rows.clone();
        let fault = self.fault();
        let before = sink().last_lsn(&self.name);
        let result = self.statements(index, &mut rows, fault);
        sink().with_log(&self.name, |_| ());
        let after = sink().last_lsn(&self.name);
        match result {
            Ok(()) => self.rows = rows,
            Err(error) => {
                self.refusals += 1;
                assert!(matches!(code(&error), 778 | 1034), "{error:?}");
                assert!(self.connections[index].is_autocommit());
            }
        }
        if fault == Fault::UnknownCommitted {
            // The next attempt to write fetches it; it may be refused itself for that.
            if after > before {
                self.refetch(index);
            }
        }
        sink().clear_faults(&self.name);
        self.check(index);
    }

    fn refetch(&mut self, index: usize) {
        for _ in 0..3 {
            if self.connections[index]
                .execute("DELETE FROM t WHERE id = -1", [])
                .is_ok()
                && self.connections[index]
                    .execute("INSERT INTO t VALUES (-1, NULL)", [])
                    .and_then(|_| self.connections[index].execute("DELETE FROM t WHERE id=-1", []))
                    .is_ok()
            {
                break;
            }
            if self.exclusive || self.journal != "WAL" {
                self.reopen();
            }
        }
        self.rows = read_rows(&self.connections[index]);
    }

    fn statements(
        &mut self,
        index: usize,
        rows: &mut BTreeMap<i64, i64>,
        fault: Fault,
    ) -> rusqlite::Result<()> {
        let db = &self.connections[index];
        try_exec(db, "BEGIN IMMEDIATE")?;
        let count = if self.rng.random_bool(0.3) { 60 } else { 3 };
        for _ in 0..self.rng.random_range(1..=count) {
            match self.rng.random_range(0..10) {
                0..5 => {
                    self.next_id += 1;
                    let length = self.rng.random_range(1..3000);
                    db.execute(
                        "INSERT INTO t VALUES (?1, randomblob(?2))",
                        [self.next_id, length],
                    )?;
                    rows.insert(self.next_id, length);
                }
                5..8 => {
                    let id = self.rng.random_range(1..=self.next_id.max(1));
                    let length = self.rng.random_range(1..3000);
                    let sql = "UPDATE t SET data = randomblob(?2) WHERE id = ?1";
                    if db.execute(sql, [id, length])? == 1 {
                        rows.insert(id, length);
                    }
                }
                8 => {
                    let id = self.rng.random_range(1..=self.next_id.max(1));
                    db.execute("DELETE FROM t WHERE id BETWEEN ?1 AND ?1 + 3", [id])?;
                    rows.retain(|row, _| !(id..=id + 3).contains(row));
                }
                _ => {
                    try_exec(db, "SAVEPOINT s")?;
                    let length = self.rng.random_range(1..2000);
                    db.execute("UPDATE t SET data = randomblob(?1)", [length])?;
                    if self.rng.random_bool(0.7) {
                        try_exec(db, "ROLLBACK TO s; RELEASE s")?;
                    } else {
                        try_exec(db, "RELEASE s")?;
                        rows.values_mut().for_each(|l| *l = length);
                    }
                }
            }
        }
        if self.rng.random_bool(0.1) {
            try_exec(db, "ROLLBACK")?;
            *rows = self.rows.clone();
            return Ok(());
        }
        sink().fault(&self.name, &[fault]);
        try_exec(db, "COMMIT")
    }

    fn other(&mut self) {
        let index = self.rng.random_range(0..self.connections.len());
        let db = &self.connections[index];
        match self.rng.random_range(0..8) {
            0 => exec(db, "PRAGMA wal_checkpoint(PASSIVE)"),
            1 => exec(db, "PRAGMA wal_checkpoint(FULL)"),
            2 => exec(db, "PRAGMA wal_checkpoint(RESTART)"),
            3 => exec(db, "PRAGMA wal_checkpoint(TRUNCATE)"),
            4 => exec(db, "VACUUM"),
            5 => {
                exec(db, "BEGIN; DELETE FROM t WHERE id % 7 = 3; ROLLBACK");
            }
            6 => {
                self.connections.clear();
                assert_level(&self.path);
                self.reopen();
            }
            _ => {
                exec(db, "REINDEX");
            }
        }
        self.check(index);
    }

    fn check(&self, index: usize) {
        for db in [&self.connections[index], &self.connections[0]] {
            assert_eq!(read_rows(db), self.rows);
        }
    }
}

fn read_rows(db: &Connection) -> BTreeMap<i64, i64> {
    let mut statement = db
        .prepare("SELECT id, length(data) FROM t ORDER BY id")
        .unwrap();
    let rows = statement
        .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))
        .unwrap();
    rows.map(Result::unwrap).collect()
}

/// More of them: `DUROVFS_ROUNDS`.
fn rounds() -> u32 {
    std::env::var("DUROVFS_ROUNDS")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(40)
}

fn run(seed: u64, page_size: u32, exclusive: bool, journal: &'static str) -> u32 {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("work.db");
    let mut world = World::new(&path, seed, page_size, exclusive, journal);
    for _ in 0..rounds() {
        if world.rng.random_bool(0.8) {
            world.transaction();
        } else {
            world.other();
        }
    }
    world.connections.clear();
    assert_level(&path);
    world.refusals
}

/// Broken, some of what SQLite does to a WAL (spills, savepoints, rollbacks, VACUUM, checkpoints,
/// restarts, size limits) makes log and file differ, or keeps what was refused.
#[test]
fn log_and_file_agree_after_random_work() {
    let seed = seed();
    let mut refusals = 0;
    for (round, page_size) in [512, 1024, 4096, 8192, 65536].into_iter().enumerate() {
        refusals += run(seed.wrapping_add(round as u64), page_size, false, "WAL");
    }
    assert!(
        refusals > 15,
        "{refusals} refusals: the faults do not reach the gate"
    );
}

/// Broken, the same in exclusive mode, where SQLite takes no shared-memory locks at all and the end
/// of a transaction is not to be seen.
#[test]
fn log_and_file_agree_in_exclusive_mode() {
    let seed = seed();
    let refusals = run(seed, 1024, true, "WAL") + run(seed.wrapping_add(1), 4096, true, "WAL");
    assert!(
        refusals > 5,
        "{refusals} refusals: the faults do not reach the gate"
    );
}

/// Broken, the gate of rollback-journal mode sends other pages than SQLite wrote, or takes a
/// journal that is played back for a commit.
#[test]
fn log_and_file_agree_in_rollback_mode() {
    let seed = seed();
    let mut refusals = 0;
    for (round, journal) in ["DELETE", "TRUNCATE", "PERSIST"].into_iter().enumerate() {
        let page_size = [512, 4096, 65536][round];
        refusals += run(
            seed.wrapping_add(round as u64),
            page_size,
            round == 1,
            journal,
        );
    }
    assert!(
        refusals > 5,
        "{refusals} refusals: the faults do not reach the gate"
    );
}
