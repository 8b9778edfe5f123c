//! The fake journals: a log of entries, and a replica's disk that loses what was not synced.

use durovfs_quorum::ReplicaState;
use durovfs_wire::{ClaimantId, Epoch, EpochRun, LogPosition, Lsn, Membership, ReplicaId};
use std::collections::{BTreeMap, VecDeque};

/// An entry, with a value that only one entry of the world has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Entry {
    pub position: LogPosition,
    pub value: u64,
    pub part_count: u32,
    pub is_start: bool,
}

/// Entries after a base.
#[derive(Debug, Clone, Default, Hash)]
pub struct Log {
    pub base: LogPosition,
    pub entries: BTreeMap<Lsn, Entry>,
}

impl Log {
    pub fn last(&self) -> LogPosition {
        self.entries
            .values()
            .next_back()
            .map_or(self.base, |entry| entry.position)
    }

    pub fn first_lsn(&self) -> Lsn {
        self.base.lsn.next()
    }

    pub fn history(&self) -> Vec<EpochRun> {
        let mut runs: Vec<EpochRun> = Vec::new();
        let base = (self.base.lsn > Lsn::ZERO).then_some(self.base);
        for position in base
            .into_iter()
            .chain(self.entries.values().map(|e| e.position))
        {
            if runs.last().is_none_or(|run| run.epoch != position.epoch) {
                runs.push(EpochRun {
                    epoch: position.epoch,
                    first_lsn: position.lsn,
                });
            }
        }
        runs
    }

    pub fn append(&mut self, entry: Entry) {
        assert_eq!(
            entry.position.lsn,
            self.last().lsn.next(),
            "append to {}",
            self.last()
        );
        self.entries.insert(entry.position.lsn, entry);
    }

    pub fn truncate(&mut self, after: LogPosition) {
        self.entries.split_off(&after.lsn.next());
        assert_eq!(self.last(), after, "cut after a position that is not there");
    }

    pub fn restart(&mut self, at: LogPosition) {
        *self = Self {
            base: at,
            entries: BTreeMap::new(),
        };
    }

    /// Drops entries at or below.
    pub fn drop_through(&mut self, lsn: Lsn) {
        if let Some(entry) = self.entries.get(&lsn) {
            self.base = entry.position;
            self.entries = self.entries.split_off(&lsn.next());
        }
    }
}

/// A record on its way to a replica's disk.
#[derive(Debug, Clone, Hash)]
pub enum Record {
    Promise {
        token: u64,
        epoch: Epoch,
        claimant: ClaimantId,
    },
    Membership(Membership),
    Truncate(LogPosition),
    Restart(LogPosition),
    Part {
        entry: Entry,
        part: u32,
        under: Epoch,
    },
    Progress {
        commit_lsn: Lsn,
        archive_lsn: Lsn,
    },
    Mended,
}

/// A replica's disk: what is on it, and what was written but not synced.
#[derive(Debug, Clone, Hash)]
pub struct Disk {
    /// Which replica; another one after its disk was lost.
    pub replica: ReplicaId,
    pub log: Log,
    pub promised: Epoch,
    pub claimant: Option<ClaimantId>,
    pub membership: Option<Membership>,
    pub commit_lsn: Lsn,
    pub archive_lsn: Lsn,
    /// Entries were lost to damage, or may have been.
    pub mending: bool,
    pub unsynced: VecDeque<Record>,
    open: Option<(LogPosition, u32)>,
}

impl Disk {
    pub fn new(replica: ReplicaId) -> Self {
        Self {
            replica,
            log: Log::default(),
            promised: Epoch::ZERO,
            claimant: None,
            membership: None,
            commit_lsn: Lsn::ZERO,
            archive_lsn: Lsn::ZERO,
            mending: false,
            unsynced: VecDeque::new(),
            open: None,
        }
    }

    pub fn state(&self) -> ReplicaState {
        ReplicaState {
            replica: self.replica,
            promised: self.promised,
            claimant: self.claimant,
            membership: self.membership.clone(),
            last: self.log.last(),
            first_lsn: self.log.first_lsn(),
            commit_lsn: self.commit_lsn,
            archive_lsn: self.archive_lsn,
            history: self.log.history(),
            mending: self.mending,
        }
    }

    /// Loses the end of the log, from any entry on, and knows it. The promise is kept twice.
    pub fn damage(&mut self, kept: usize) {
        self.lose_unsynced();
        if let Some(lsn) = self.log.entries.keys().nth(kept).copied() {
            self.log.entries.split_off(&lsn);
        }
        let last_lsn = self.log.last().lsn;
        self.commit_lsn = self.commit_lsn.min(last_lsn);
        self.archive_lsn = self.archive_lsn.min(last_lsn);
        self.mending = true;
    }

    /// Puts the oldest unsynced record on the disk. `no_truncation` is a fault: the old tail stays.
    pub fn sync_one(&mut self, no_truncation: bool) -> Option<Record> {
        let record = self.unsynced.pop_front()?;
        match record.clone() {
            Record::Promise {
                epoch, claimant, ..
            } => {
                assert!(
                    epoch > self.promised,
                    "disk promised {} then {epoch}",
                    self.promised
                );
                self.promised = epoch;
                self.claimant = Some(claimant);
            }
            Record::Membership(membership) => self.membership = Some(membership),
            Record::Truncate(_) if no_truncation => {}
            Record::Truncate(after) => self.log.truncate(after),
            Record::Restart(at) => self.log.restart(at),
            Record::Mended => self.mending = false,
            Record::Part { entry, part, .. } => self.put_part(entry, part, no_truncation),
            Record::Progress {
                commit_lsn,
                archive_lsn,
            } => {
                self.commit_lsn = self.commit_lsn.max(commit_lsn);
                self.archive_lsn = self.archive_lsn.max(archive_lsn);
            }
        }
        Some(record)
    }

    fn put_part(&mut self, entry: Entry, part: u32, no_truncation: bool) {
        if part > 0 {
            assert_eq!(
                self.open,
                Some((entry.position, part)),
                "parts out of order"
            );
        }
        self.open = Some((entry.position, part + 1));
        if part + 1 < entry.part_count {
            return;
        }
        self.open = None;
        if no_truncation && self.log.entries.contains_key(&entry.position.lsn) {
            return;
        }
        self.log.append(entry);
    }

    /// Loses what was not synced.
    pub fn lose_unsynced(&mut self) {
        self.unsynced.clear();
        self.open = None;
    }
}
