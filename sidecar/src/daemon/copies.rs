//! Warm copies: what the actor tells the thread that keeps them, and what it hears of it.
//!
//! Copies run beside everything else: nothing in the log waits for them, and no queue stands
//! between. The actor writes down how far each log is known to be committed; the thread
//! ([`follower`]) looks there, and reads the journal by itself.

mod follower;
mod image;

pub use image::read_snapshot;

use super::node::Node;
use crate::config::{CopiesConfig, SidecarConfig};
use anyhow::Context;
use durovfs_copies::CopySnapshot;
use durovfs_journal::Journal;
use durovfs_wire::status::CopyStatus;
use durovfs_wire::{DatabaseId, Lsn};
use globset::{Glob, GlobSet, GlobSetBuilder};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::oneshot;

/// A log that has a copy here, as the actor knows it.
#[derive(Debug, Clone)]
struct Followed {
    /// Name in the cluster.
    name: String,
    /// Known committed, and in our journal.
    commit_lsn: Lsn,
    /// Known archived: the end of the newest chunk.
    archive_lsn: Lsn,
}

/// What the thread tells of one copy.
#[derive(Debug, Clone)]
struct Report {
    status: CopyStatus,
    warnings: Vec<String>,
}

/// Where what readers of a copy see comes, if there is something.
pub type SnapshotAnswer = oneshot::Receiver<Option<CopySnapshot>>;

/// Asked for by an opening that could begin with a copy.
struct SnapshotRequest {
    database: DatabaseId,
    answer: oneshot::Sender<Option<CopySnapshot>>,
}

/// Most snapshots that may be asked for and not yet be looked at; more openings use the archive.
const REQUESTS_MAX: usize = 64;

/// What actor and thread share. Locked for moments only, by either.
#[derive(Default)]
struct Board {
    followed: Mutex<BTreeMap<DatabaseId, Followed>>,
    reports: Mutex<BTreeMap<DatabaseId, Report>>,
    requests: Mutex<Vec<SnapshotRequest>>,
}

impl Board {
    fn followed(&self) -> MutexGuard<'_, BTreeMap<DatabaseId, Followed>> {
        self.followed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn reports(&self) -> MutexGuard<'_, BTreeMap<DatabaseId, Report>> {
        self.reports.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn requests(&self) -> MutexGuard<'_, Vec<SnapshotRequest>> {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The actor's side of the copies of this node.
pub struct Copies {
    board: Arc<Board>,
    include: GlobSet,
    exclude: GlobSet,
}

impl Copies {
    /// Starts the thread, if the configuration wants copies.
    ///
    /// # Errors
    /// When a pattern is none, the archive's address is bad, or no thread can be had.
    pub fn start(config: &SidecarConfig, journal: &Journal) -> anyhow::Result<Option<Self>> {
        let Some(copies) = &config.copies else {
            return Ok(None);
        };
        let CopiesConfig {
            directory,
            include,
            exclude,
        } = copies;
        let board = Arc::<Board>::default();
        let include = match include.as_slice() {
            [] => globs(&["**".to_owned()]),
            patterns => globs(patterns),
        };
        let copies = Self {
            board: Arc::clone(&board),
            include: include.context("copies.include")?,
            exclude: globs(exclude).context("copies.exclude")?,
        };
        follower::spawn(follower::Parts {
            board,
            journal: journal.clone(),
            // A client of its own: this thread has a runtime of its own.
            store: super::open_store(config)?,
            directory: directory.clone(),
            scratch: config.data.join("copies-scratch"),
        })?;
        Ok(Some(copies))
    }

    fn wants(&self, name: &str) -> bool {
        self.include.is_match(name) && !self.exclude.is_match(name)
    }
}

fn globs(patterns: &[String]) -> Result<GlobSet, globset::Error> {
    let mut set = GlobSetBuilder::new();
    for pattern in patterns {
        set.add(Glob::new(pattern)?);
    }
    set.build()
}

impl Node {
    /// Tells the thread how far the logs are.
    pub fn tick_copies(&self) {
        let Some(copies) = &self.copies else {
            return;
        };
        let mut followed = copies.board.followed();
        for (database, replica) in &self.replicas {
            let machine = replica.log.machine();
            let (commit_lsn, archive_lsn) = (machine.commit_lsn(), machine.archive_lsn());
            if let Some(known) = followed.get_mut(database) {
                known.commit_lsn = commit_lsn;
                known.archive_lsn = archive_lsn;
            } else if copies.wants(&replica.name) {
                let name = replica.name.clone();
                let log = Followed {
                    name,
                    commit_lsn,
                    archive_lsn,
                };
                followed.insert(*database, log);
            }
        }
    }

    /// How the copy of a database stands, if there is to be one here, and what a person should
    /// look at.
    pub fn copy_status(&self, database: DatabaseId) -> (Option<CopyStatus>, Vec<String>) {
        let report = self
            .copies
            .as_ref()
            .and_then(|copies| copies.board.reports().get(&database).cloned());
        report.map_or((None, Vec::new()), |report| {
            (Some(report.status), report.warnings)
        })
    }

    /// Asks for what readers of the copy see now. `None` when this node has no copies.
    pub fn ask_copy(&self, database: DatabaseId) -> Option<SnapshotAnswer> {
        let copies = self.copies.as_ref()?;
        copies.board.reports().get(&database)?;
        let mut requests = copies.board.requests();
        if requests.len() >= REQUESTS_MAX {
            return None;
        }
        let (answer, receiver) = oneshot::channel();
        requests.push(SnapshotRequest { database, answer });
        Some(receiver)
    }
}
