//! Random histories against a model, with power cuts: what is found afterwards is exactly what the
//! model says after some number of records, at least as many as were acknowledged.
//!
//! `DUROVFS_SEED` replays one history.

use super::support::*;
use crate::disk::memory::MemoryDisk;
use crate::{DatabaseState, Journal, JournalError, Record};
use durovfs_wire::entry::{EntryPart, PartKind, TransactionSummary};
use durovfs_wire::ids::ReplicaId;
use durovfs_wire::position::{Epoch, EpochRun, LogPosition, Lsn};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeMap;
use std::sync::{Arc, mpsc};

/// Histories in one run of the test.
const HISTORIES: u64 = 120;

/// One database as it should be: the plainest form that can answer.
#[derive(Debug, Clone, Default)]
struct ModelDatabase {
    known: bool,
    promised: u32,
    /// Entries from lsn `base.lsn + 1` on.
    entries: Vec<Vec<EntryPart>>,
    base: LogPosition,
    base_transaction: Option<TransactionSummary>,
    /// Runs that begin at or below the base.
    base_history: Vec<EpochRun>,
    open: Vec<EntryPart>,
    commit: u64,
    archive: u64,
}

impl ModelDatabase {
    fn last(&self) -> LogPosition {
        self.entries
            .last()
            .map_or(self.base, |parts| parts[0].header.position())
    }

    fn history(&self) -> Vec<EpochRun> {
        let mut runs = self.base_history.clone();
        for parts in &self.entries {
            let header = &parts[0].header;
            if matches!(header.kind, PartKind::EpochStart { .. }) {
                runs.push(EpochRun {
                    epoch: header.epoch,
                    first_lsn: header.lsn,
                });
            }
        }
        runs
    }

    fn last_transaction(&self) -> Option<TransactionSummary> {
        let of_entry = |parts: &Vec<EntryPart>| {
            let header = &parts.last().unwrap().header;
            match header.kind {
                PartKind::EpochStart {
                    last_transaction, ..
                } => last_transaction,
                _ => header.transaction(),
            }
        };
        self.entries
            .iter()
            .rev()
            .find_map(of_entry)
            .or(self.base_transaction)
    }

    fn apply(&mut self, record: &Record) {
        self.known = true;
        match record {
            Record::Part(part) => {
                if part.header.part == 0 {
                    self.open.clear();
                }
                self.open.push(part.clone());
                if part.header.is_last() {
                    self.entries.push(std::mem::take(&mut self.open));
                }
            }
            Record::Promise { epoch, .. } => self.promised = epoch.get(),
            Record::Membership { .. } => {}
            Record::Truncate { after, .. } => {
                self.open.clear();
                self.entries
                    .truncate((after.lsn.get() - self.base.lsn.get()) as usize);
            }
            Record::Restart { at, .. } => {
                let promised = self.promised;
                let base_history = vec![EpochRun {
                    epoch: at.epoch,
                    first_lsn: at.lsn,
                }];
                let lsn = at.lsn.get();
                *self = Self {
                    known: true,
                    promised,
                    base: *at,
                    base_history,
                    ..Self::default()
                };
                (self.commit, self.archive) = (lsn, lsn);
            }
            Record::Progress {
                commit_lsn,
                archive_lsn,
                ..
            } => {
                self.commit = self.commit.max(commit_lsn.get().min(self.last().lsn.get()));
                self.archive = self.archive.max(archive_lsn.get().min(self.commit));
            }
            Record::State(_) | Record::Damaged { .. } | Record::Mended { .. } => {
                panic!("not drawn")
            }
        }
    }
}

type Model = BTreeMap<u8, ModelDatabase>;

/// Compares all but `first_lsn`, below which nothing may be read; what is held must be whole.
fn matches_model(journal: &Journal, model: &Model) -> Result<(), String> {
    let known: Vec<u8> = model
        .iter()
        .filter(|(_, m)| m.known)
        .map(|(n, _)| *n)
        .collect();
    let states = journal.databases();
    if states.len() != known.len() {
        return Err(format!(
            "{} databases instead of {}",
            states.len(),
            known.len()
        ));
    }
    for (number, state) in known.into_iter().zip(states) {
        let m = &model[&number];
        let expected = DatabaseState {
            mending: false,
            database: database(number),
            name: if m.promised == 0 {
                String::new()
            } else {
                format!("db-{number}")
            },
            replica: (m.promised > 0).then(|| ReplicaId::from_bytes([number; 16])),
            membership: state.membership.clone(),
            promised: Epoch::new(m.promised),
            claimant: state.claimant,
            last: m.last(),
            first_lsn: state.first_lsn,
            commit_lsn: Lsn::new(m.commit),
            archive_lsn: Lsn::new(m.archive),
            history: m.history(),
            last_transaction: m.last_transaction(),
        };
        if state != expected {
            return Err(format!("found {state:?}, expected {expected:?}"));
        }
        let first = state.first_lsn.get();
        if first <= m.base.lsn.get() || first > m.commit + 1 {
            return Err(format!(
                "first lsn {first}, base {}, commit {}",
                m.base, m.commit
            ));
        }
        let skipped = (first - m.base.lsn.get() - 1) as usize;
        let parts: Vec<EntryPart> = m.entries.iter().skip(skipped).flatten().cloned().collect();
        if read(journal, number, first, u64::MAX) != parts {
            return Err(format!("entries of {number} differ"));
        }
    }
    Ok(())
}

struct History {
    draw: ChaCha8Rng,
    sync: bool,
    /// As it is after all that was handed over.
    model: Model,
    /// After each record handed over since the last check.
    snapshots: Vec<Model>,
}

impl History {
    fn payload(&mut self) -> Vec<u8> {
        let length = if self.draw.random_bool(0.1) {
            9000
        } else {
            700
        };
        let length = self.draw.random_range(0..length);
        let byte = self.draw.random();
        vec![byte; length]
    }

    /// Records that may follow, of one database.
    fn records(&mut self) -> Vec<Record> {
        let number = self.draw.random_range(1..4);
        let m = self.model.entry(number).or_default().clone();
        let (last, next) = (m.last(), m.last().lsn.get() + 1);
        let epoch = last.epoch.get();
        match self.draw.random_range(0..20) {
            0..2 => vec![promise(number, m.promised + 1)],
            _ if epoch == 0 => vec![start(number, m.promised.max(1), next, None)],
            2..4 => {
                let commit = self.draw.random_range(0..next + 1);
                vec![progress(
                    number,
                    commit,
                    self.draw.random_range(0..next + 1),
                )]
            }
            4 | 5 => {
                let after = self.draw.random_range(m.commit.max(m.base.lsn.get())..next);
                let mut cut = m.clone();
                let to = LogPosition {
                    lsn: Lsn::new(after),
                    ..last
                };
                cut.apply(&Record::Truncate {
                    database: database(number),
                    after: to,
                });
                let cut_to = cut.last();
                let new = epoch.max(m.promised) + 1;
                let begin = start(number, new, after + 1, cut.last_transaction());
                let cut = truncate(number, cut_to.epoch.get(), after);
                if self.draw.random_bool(0.3) {
                    vec![cut]
                } else {
                    vec![cut, begin]
                }
            }
            6 if self.draw.random_bool(0.2) => {
                let at = position(epoch + 1, next + 5);
                vec![Record::Restart {
                    database: database(number),
                    at,
                }]
            }
            7..10 if m.open.is_empty() => (0..3)
                .map(|i| pages(number, epoch, next, i, self.payload()))
                .collect(),
            7..12 if !m.open.is_empty() => {
                let index = m.open.len() as u32;
                if self.draw.random_bool(0.5) {
                    vec![pages(number, epoch, next, index, self.payload())]
                } else {
                    vec![last_part(number, epoch, next, index, self.payload())]
                }
            }
            _ => vec![transaction(number, epoch, next, self.payload())],
        }
    }

    fn note(&mut self, records: &[Record]) {
        for record in records {
            let number = record.database().as_bytes()[0];
            self.model.entry(number).or_default().apply(record);
            self.snapshots.push(self.model.clone());
        }
    }

    /// Appends until `count` are through or one fails; gives how many records are acknowledged.
    fn run(&mut self, journal: &Journal, count: usize) -> usize {
        self.snapshots = vec![self.model.clone()];
        let (mut acknowledged, mut sent) = (0, 0);
        while sent < count {
            // A few at once, so that they share a batch.
            let (sender, receiver) = mpsc::channel();
            for _ in 0..self.draw.random_range(1..6) {
                let records = self.records();
                self.note(&records);
                let (sender, through) = (sender.clone(), self.snapshots.len() - 1);
                let done = move |result| sender.send((through, result)).unwrap();
                journal.append(records, Box::new(done));
                sent += 1;
            }
            drop(sender);
            let mut failed = false;
            for (through, result) in receiver {
                match result {
                    Ok(()) => {
                        assert!(!failed, "an append behind a failed one was written");
                        acknowledged = through;
                    }
                    Err(JournalError::Io { .. }) => failed = true,
                    // What follows from the failure.
                    Err(error) => assert!(failed, "{error}"),
                }
            }
            if failed {
                return acknowledged;
            }
            self.maybe_drop(journal);
        }
        acknowledged
    }

    fn maybe_drop(&mut self, journal: &Journal) {
        for state in journal.databases() {
            if self.draw.random_bool(0.3) {
                let through = state.archive_lsn.min(state.commit_lsn);
                journal.drop_through(state.database, through);
            }
        }
    }

    fn open(&self, disk: &MemoryDisk) -> Journal {
        Journal::open_on(Arc::new(disk.clone()), options(self.sync))
            .unwrap()
            .0
    }

    /// Finds which of the snapshots the journal is, and goes on from it.
    fn settle(&mut self, journal: &Journal, at_least: usize) {
        let mut why = String::new();
        for snapshot in self.snapshots.iter().skip(at_least).rev() {
            match matches_model(journal, snapshot) {
                Ok(()) => {
                    self.model = snapshot.clone();
                    // Whether an incomplete entry is there nobody can see: it begins afresh.
                    self.model.values_mut().for_each(|m| m.open.clear());
                    return;
                }
                Err(detail) => why = detail,
            }
        }
        let count = self.snapshots.len();
        panic!("none of the states {at_least}..{count} was found; of the first: {why}");
    }
}

fn run_history(seed: u64) {
    let mut draw = ChaCha8Rng::seed_from_u64(seed);
    let sync = draw.random_bool(0.8);
    let mut history = History {
        draw,
        sync,
        model: Model::new(),
        snapshots: Vec::new(),
    };
    let mut disk = MemoryDisk::default();
    for _ in 0..6 {
        let journal = history.open(&disk);
        if history.draw.random_bool(0.7) {
            disk.lose_power_after(history.draw.random_range(0..150));
        }
        let acknowledged = history.run(&journal, 120);
        let mut draw = history.draw.clone();
        match history.draw.random_range(0..3) {
            // The process is killed; the system lives on, and has all that was written.
            0 => {
                disk = disk.copy();
                drop(journal);
            }
            1 => {
                drop(journal);
                disk = disk.crash(&mut |below| draw.random_range(0..below));
            }
            _ => {
                disk = disk.crash(&mut |below| draw.random_range(0..below));
                drop(journal);
            }
        }
        let journal = history.open(&disk);
        // Without sync nothing is promised, but what is found must still be some moment's state.
        let at_least = if sync { acknowledged } else { 0 };
        history.settle(&journal, at_least);
    }
}

/// Broken if this fails: somewhere in the life of a node an acknowledged entry or promise is lost,
/// or something is there that was never written.
#[test]
fn random_histories_with_power_cuts_match_the_model() {
    if let Ok(seed) = std::env::var("DUROVFS_SEED") {
        return run_history(seed.parse().unwrap());
    }
    let base = std::time::SystemTime::UNIX_EPOCH
        .elapsed()
        .unwrap()
        .as_secs()
        * HISTORIES;
    for seed in base..base + HISTORIES {
        println!("DUROVFS_SEED={seed}");
        run_history(seed);
    }
}
