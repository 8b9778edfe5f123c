//! What the journal keeps in memory of each database: its state, and where its entries are.
//!
//! [`Head`] decides what may be appended next; recovery uses the same rules as the writer, so that
//! a journal is never read in another way than it was written. [`Table`] is the index. Its size is
//! bounded by [`ENTRIES_MAX`]. `table/mending.rs` has what damage does to it. No I/O here.

mod mending;
mod moving;

use crate::record::{DatabaseState, Stored};
use durovfs_wire::entry::{CommitHeader, PartHeader, PartKind, TransactionSummary};
use durovfs_wire::ids::{ClaimantId, DatabaseId};
use durovfs_wire::position::{Epoch, EpochRun, LogPosition, Lsn};
use moving::Moves;
use std::collections::VecDeque;

/// Most entries in the index, of all databases: with about 150 bytes for each, 600 MB. Reached only
/// when nothing can be archived for long; entries are then refused as when the disk is full.
pub(crate) const ENTRIES_MAX: usize = 4 << 20;
/// Runs of history that are kept although they are archived: enough to find the common point with
/// any replica that was away for a while, little enough to restate in each segment.
const ARCHIVED_RUNS_KEPT: usize = 64;
/// Most runs of history; more cannot be told to a primary.
const RUNS_MAX: usize = durovfs_wire::peer::MAX_HISTORY_RUNS;

/// Where a record is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Location {
    /// First sequence of the segment.
    pub segment: u64,
    pub offset: u64,
    pub bytes: u32,
}

/// Of the parts of one entry; nearly all have one.
#[derive(Debug, Clone)]
enum Locations {
    One(Location),
    Many(Box<[Location]>),
}

impl Locations {
    fn of(locations: &[Location]) -> Self {
        match locations {
            [one] => Self::One(*one),
            many => Self::Many(many.into()),
        }
    }

    fn as_slice(&self) -> &[Location] {
        match self {
            Self::One(location) => std::slice::from_ref(location),
            Self::Many(locations) => locations,
        }
    }
}

#[derive(Debug, Clone)]
enum Fact {
    Transaction(CommitHeader),
    EpochStart(Option<Box<TransactionSummary>>),
}

impl Fact {
    /// What the last part of an entry says.
    fn of(header: &PartHeader) -> Option<Self> {
        match header.kind {
            PartKind::EpochStart {
                last_transaction, ..
            } => Some(Self::EpochStart(last_transaction.map(Box::new))),
            PartKind::Commit(commit) => Some(Self::Transaction(commit)),
            PartKind::Pages { .. } => None,
        }
    }

    /// The last transaction through this entry, given the one before it.
    fn transaction(
        &self,
        position: LogPosition,
        before: Option<TransactionSummary>,
    ) -> Option<TransactionSummary> {
        match self {
            Self::Transaction(commit) => Some(TransactionSummary {
                position,
                commit: *commit,
            }),
            Self::EpochStart(None) => before,
            Self::EpochStart(Some(summary)) => Some(**summary),
        }
    }
}

#[derive(Debug, Clone)]
struct IndexEntry {
    epoch: Epoch,
    fact: Fact,
    locations: Locations,
    /// Bytes of all entries up to and with this one since the index was begun, so that the size
    /// of any range is one subtraction.
    bytes_through: u64,
}

#[derive(Debug, Clone)]
struct Pending {
    position: LogPosition,
    locations: Vec<Location>,
    /// Parts of it were in segments that are deleted: it must turn out to be dropped.
    lost_parts: u32,
}

impl Pending {
    fn next_part(&self) -> u32 {
        self.lost_parts + self.locations.len() as u32
    }
}

/// What decides whether a record may follow. Cheap to copy: a batch tries its records on copies.
#[derive(Debug, Clone)]
pub(crate) struct Head {
    known: bool,
    promised: Epoch,
    claimant: Option<ClaimantId>,
    last: LogPosition,
    commit_lsn: Lsn,
    last_transaction: Option<TransactionSummary>,
    pending: Option<(LogPosition, u32)>,
    /// The log's end is not the table's any more.
    touched: bool,
}

impl Head {
    /// Of a database that is not known.
    pub(crate) fn unknown() -> Self {
        Self {
            known: false,
            promised: Epoch::ZERO,
            claimant: None,
            last: LogPosition::ZERO,
            commit_lsn: Lsn::ZERO,
            last_transaction: None,
            pending: None,
            touched: false,
        }
    }

    /// Takes a record, if it follows; else says why not. `table` is as it was before all that
    /// this head has taken.
    pub(crate) fn admit(&mut self, record: &Stored, table: Option<&Table>) -> Result<(), String> {
        match record {
            Stored::Mark => return Ok(()),
            Stored::Part(header) => self.admit_part(header)?,
            Stored::Promise {
                epoch, claimant, ..
            } => self.admit_promise(*epoch, *claimant)?,
            Stored::Truncate {
                after,
                last_transaction,
                ..
            } => {
                self.admit_cut(*after, "truncate after")?;
                check_truncate(*after, self.last, table)?;
                self.last_transaction = *last_transaction;
            }
            Stored::Restart { at, .. } => {
                self.admit_cut(*at, "restart at")?;
                self.commit_lsn = at.lsn;
                self.last_transaction = None;
            }
            Stored::Progress { commit_lsn, .. } => {
                self.commit_lsn = self.commit_lsn.max((*commit_lsn).min(self.last.lsn));
            }
            Stored::State { state, .. } => self.admit_state(state)?,
            Stored::Damaged { first_lsn, .. } => self.admit_damage(*first_lsn, table)?,
            Stored::Membership { .. } | Stored::Mended { .. } | Stored::Moved(_) => {}
            Stored::Dropped { through, .. } => {
                if *through > self.commit_lsn {
                    let commit_lsn = self.commit_lsn;
                    return Err(format!("lsn {through} dropped, committed is {commit_lsn}"));
                }
            }
        }
        self.known = true;
        self.touched |= matches!(
            record,
            Stored::Part(_)
                | Stored::Truncate { .. }
                | Stored::Restart { .. }
                | Stored::State { .. }
                | Stored::Damaged { .. }
        );
        Ok(())
    }

    fn admit_part(&mut self, header: &PartHeader) -> Result<(), String> {
        let position = header.position();
        let starts_epoch = matches!(header.kind, PartKind::EpochStart { .. });
        if header.part > 0 {
            if starts_epoch || self.pending != Some((position, header.part)) {
                return Err(format!(
                    "part {} of {position} has no part before it",
                    header.part
                ));
            }
        } else {
            self.check_first_part(header, starts_epoch)?;
        }
        if !header.is_last() {
            let next = header.part.checked_add(1).ok_or("too many parts")?;
            self.pending = Some((position, next));
            return Ok(());
        }
        self.pending = None;
        self.last = position;
        match header.kind {
            PartKind::EpochStart {
                last_transaction: Some(summary),
                ..
            } => {
                self.last_transaction = Some(summary);
            }
            _ => self.last_transaction = header.transaction().or(self.last_transaction),
        }
        Ok(())
    }

    fn check_first_part(&self, header: &PartHeader, starts_epoch: bool) -> Result<(), String> {
        let (position, last) = (header.position(), self.last);
        if position.lsn != last.lsn.next() {
            return Err(format!("{position} does not follow {last}"));
        }
        // Two logs can meet at an lsn by chance, after a truncation that was refused; these rules
        // of all logs keep one from being continued with the other's entries.
        let rises = position.epoch > last.epoch;
        if position.epoch < last.epoch || rises != starts_epoch {
            return Err(format!(
                "{position} ({}) cannot follow {last}: an epoch begins with its start",
                if starts_epoch {
                    "epoch start"
                } else {
                    "transaction"
                }
            ));
        }
        if let PartKind::EpochStart {
            last_transaction: Some(theirs),
            ..
        } = header.kind
            && let Some(ours) = self.last_transaction
            && ours != theirs
        {
            return Err(format!(
                "the epoch start at {position} follows the transaction at {}, not the one at {}",
                theirs.position, ours.position
            ));
        }
        Ok(())
    }

    fn admit_promise(&mut self, epoch: Epoch, claimant: ClaimantId) -> Result<(), String> {
        let promised = self.promised;
        if epoch < promised || (epoch == promised && self.claimant.is_some_and(|c| c != claimant)) {
            return Err(format!(
                "epoch {epoch} is promised to another, or below {promised}"
            ));
        }
        self.promised = epoch;
        self.claimant = Some(claimant);
        Ok(())
    }

    fn admit_cut(&mut self, at: LogPosition, what: &str) -> Result<(), String> {
        if self.touched {
            return Err(format!("{what} {at} is not the first of its append"));
        }
        if at.lsn < self.commit_lsn {
            return Err(format!("{what} {at}: lsn {} is committed", self.commit_lsn));
        }
        self.last = at;
        self.pending = None;
        Ok(())
    }

    /// The only record that takes back what is committed: it says that the disk did.
    fn admit_damage(&mut self, first_lsn: Lsn, table: Option<&Table>) -> Result<(), String> {
        let held = table.filter(|table| table.entry(first_lsn).is_some());
        let Some(table) = held.filter(|_| !self.touched) else {
            return Err(format!(
                "lsn {first_lsn} is not held, and cannot be damaged"
            ));
        };
        let mut left = table.clone();
        left.lose_from(first_lsn);
        *self = left.head();
        Ok(())
    }

    fn admit_state(&mut self, state: &DatabaseState) -> Result<(), String> {
        if self.known {
            return Err("the database is known already".to_owned());
        }
        if state.first_lsn != state.last.lsn.next() || state.commit_lsn != state.last.lsn {
            return Err("a state from outside must hold no entry and be committed".to_owned());
        }
        if state.archive_lsn > state.commit_lsn || state.history.len() > RUNS_MAX {
            return Err("the state contradicts itself".to_owned());
        }
        *self = Table::from_state(state.clone(), None).head();
        Ok(())
    }
}

fn check_truncate(
    after: LogPosition,
    last: LogPosition,
    table: Option<&Table>,
) -> Result<(), String> {
    // `admit_cut` has moved `last` already; the table still has the old one.
    let Some(table) = table else {
        return if after == LogPosition::ZERO {
            Ok(())
        } else {
            Err(format!("truncate after {last} of a log that is not there"))
        };
    };
    let have = table.state.last;
    if after.lsn > have.lsn {
        return Err(format!("truncate after {after}: the last entry is {have}"));
    }
    match table.epoch_at(after.lsn) {
        Some(epoch) if epoch != after.epoch => Err(format!(
            "truncate after {after}: the entry there is of epoch {epoch}"
        )),
        _ => Ok(()),
    }
}

/// State and index of one database.
#[derive(Debug, Clone)]
pub(crate) struct Table {
    state: DatabaseState,
    /// Entries `first_lsn..=last.lsn`.
    entries: VecDeque<IndexEntry>,
    pending: Option<Pending>,
    /// The last transaction below `first_lsn`, if it is known.
    base_transaction: Option<TransactionSummary>,
    /// `bytes_through` of the entry before the first.
    base_bytes: u64,
    /// How often entries were cut off: a reader that began before must not go on.
    cuts: u64,
    moves: Moves,
}

impl Table {
    pub(crate) fn new(database: DatabaseId) -> Self {
        Self::from_state(DatabaseState::empty(database), None)
    }

    /// As restated, with none of the entries before.
    pub(crate) fn from_state(
        mut state: DatabaseState,
        pending: Option<(LogPosition, u32)>,
    ) -> Self {
        state.first_lsn = state.last.lsn.next();
        let pending = pending.map(|(position, lost_parts)| Pending {
            position,
            locations: Vec::new(),
            lost_parts,
        });
        let base_transaction = state.last_transaction;
        let entries = VecDeque::new();
        Self {
            state,
            entries,
            pending,
            base_transaction,
            base_bytes: 0,
            cuts: 0,
            moves: Moves::default(),
        }
    }

    pub(crate) fn state(&self) -> &DatabaseState {
        &self.state
    }

    pub(crate) fn entry_count(&self) -> usize {
        self.entries.len()
    }

    pub(crate) fn cuts(&self) -> u64 {
        self.cuts
    }

    /// What is restated at the start of a segment.
    pub(crate) fn restated(&self) -> Stored {
        let pending = self.pending.as_ref().map(|p| (p.position, p.next_part()));
        Stored::State {
            state: self.state.clone(),
            pending,
            base: self.base_transaction,
        }
    }

    pub(crate) fn head(&self) -> Head {
        Head {
            known: true,
            promised: self.state.promised,
            claimant: self.state.claimant,
            last: self.state.last,
            commit_lsn: self.state.commit_lsn,
            last_transaction: self.state.last_transaction,
            pending: self.pending.as_ref().map(|p| (p.position, p.next_part())),
            touched: false,
        }
    }

    /// Carries out a record that [`Head::admit`] took.
    pub(crate) fn apply(&mut self, record: &Stored, location: Location) {
        match record {
            Stored::Mark => {}
            Stored::Part(header) => self.apply_part(header, location),
            Stored::Promise {
                name,
                epoch,
                claimant,
                replica,
                ..
            } => {
                self.state.name.clone_from(name);
                self.state.promised = *epoch;
                self.state.claimant = Some(*claimant);
                self.state.replica = *replica;
            }
            Stored::Membership { membership, .. } => {
                let known = self.state.membership.as_ref();
                if known.is_none_or(|known| known.epoch <= membership.epoch) {
                    self.state.membership = Some(membership.clone());
                }
            }
            Stored::Truncate {
                after,
                last_transaction,
                ..
            } => {
                self.truncate(*after, *last_transaction);
            }
            Stored::Restart { at, .. } => self.restart(*at),
            Stored::Progress {
                commit_lsn,
                archive_lsn,
                ..
            } => {
                let state = &mut self.state;
                state.commit_lsn = state.commit_lsn.max((*commit_lsn).min(state.last.lsn));
                state.archive_lsn = state.archive_lsn.max((*archive_lsn).min(state.commit_lsn));
                self.trim_history();
            }
            Stored::Dropped { through, .. } => self.drop_through(*through),
            Stored::State { state, pending, .. } => {
                *self = Self::from_state(state.clone(), *pending);
            }
            Stored::Moved(header) => self.apply_moved(header, location),
            Stored::Damaged { first_lsn, .. } => self.lose_from(*first_lsn),
            Stored::Mended { .. } => self.state.mending = false,
        }
        debug_assert_eq!(
            self.state.first_lsn.get() + self.entries.len() as u64,
            self.state.last.lsn.get() + 1
        );
    }

    fn apply_part(&mut self, header: &PartHeader, location: Location) {
        let position = header.position();
        if header.part == 0 {
            self.pending = Some(Pending {
                position,
                locations: Vec::new(),
                lost_parts: 0,
            });
        }
        if let Some(pending) = &mut self.pending {
            pending.locations.push(location);
        }
        if !header.is_last() {
            return;
        }
        let Some(pending) = self.pending.take() else {
            return;
        };
        let Some(fact) = Fact::of(header) else {
            return;
        };
        let runs = &mut self.state.history;
        if runs.last().is_none_or(|run| run.epoch != position.epoch) {
            runs.push(EpochRun {
                epoch: position.epoch,
                first_lsn: position.lsn,
            });
            self.trim_history();
        }
        let bytes: u64 = pending.locations.iter().map(|l| u64::from(l.bytes)).sum();
        let before = self
            .entries
            .back()
            .map_or(self.base_bytes, |e| e.bytes_through);
        let locations = Locations::of(&pending.locations);
        let epoch = position.epoch;
        self.entries.push_back(IndexEntry {
            epoch,
            fact,
            locations,
            bytes_through: before + bytes,
        });
        self.state.last = position;
        self.state.last_transaction = self.transaction_through(position.lsn);
        if pending.lost_parts > 0 {
            // Its first parts are in a segment that was deleted, so it was dropped before that.
            self.drop_through(position.lsn);
        }
    }

    fn truncate(&mut self, after: LogPosition, last_transaction: Option<TransactionSummary>) {
        let state = &mut self.state;
        let kept = after.lsn.next().get().saturating_sub(state.first_lsn.get());
        self.entries
            .truncate(usize::try_from(kept).unwrap_or(usize::MAX));
        if after.lsn.next() < state.first_lsn {
            // Only in recovery, of entries that were dropped later.
            state.first_lsn = after.lsn.next();
            self.base_transaction = last_transaction;
        }
        // Without an entry that goes, readers go on.
        self.cuts += u64::from(after.lsn < state.last.lsn);
        state.last = after;
        state.last_transaction = last_transaction;
        while state
            .history
            .last()
            .is_some_and(|run| run.first_lsn > after.lsn)
        {
            state.history.pop();
        }
        self.pending = None;
        self.moves.truncate_after(after.lsn);
    }

    fn restart(&mut self, at: LogPosition) {
        let state = &mut self.state;
        self.entries.clear();
        self.moves = Moves::default();
        self.base_transaction = None;
        self.base_bytes = 0;
        self.pending = None;
        self.cuts += 1;
        state.last = at;
        state.first_lsn = at.lsn.next();
        state.commit_lsn = at.lsn;
        state.archive_lsn = at.lsn;
        state.last_transaction = None;
        state.history.clear();
        if at != LogPosition::ZERO {
            state.history.push(EpochRun {
                epoch: at.epoch,
                first_lsn: at.lsn,
            });
        }
    }

    /// Forgets where the entries up to here are.
    pub(crate) fn drop_through(&mut self, lsn: Lsn) {
        self.moves.drop_through(lsn);
        while self.state.first_lsn <= lsn
            && let Some(entry) = self.entries.pop_front()
        {
            let position = LogPosition::new(entry.epoch, self.state.first_lsn);
            self.base_transaction = entry.fact.transaction(position, self.base_transaction);
            self.base_bytes = entry.bytes_through;
            self.state.first_lsn = self.state.first_lsn.next();
        }
    }

    fn trim_history(&mut self) {
        let archive_lsn = self.state.archive_lsn;
        let runs = &mut self.state.history;
        // All runs before the one that holds `archive_lsn`.
        let archived = runs
            .iter()
            .skip(1)
            .take_while(|run| run.first_lsn <= archive_lsn)
            .count();
        runs.drain(..archived.saturating_sub(ARCHIVED_RUNS_KEPT));
    }

    /// Whether another epoch would be more than a primary can be told of.
    pub(crate) fn history_is_full(&self) -> bool {
        self.state.history.len() >= RUNS_MAX
    }

    /// Epoch of the entry at this position, if the history reaches so far back.
    fn epoch_at(&self, lsn: Lsn) -> Option<Epoch> {
        if lsn == Lsn::ZERO {
            return Some(Epoch::ZERO);
        }
        self.state
            .history
            .iter()
            .rev()
            .find(|run| run.first_lsn <= lsn)
            .map(|run| run.epoch)
    }

    fn entry(&self, lsn: Lsn) -> Option<&IndexEntry> {
        let index = lsn.get().checked_sub(self.state.first_lsn.get())?;
        self.entries.get(usize::try_from(index).ok()?)
    }

    /// The last transaction at or below this entry, if it is known.
    pub(crate) fn transaction_through(&self, lsn: Lsn) -> Option<TransactionSummary> {
        let mut at = lsn;
        while let Some(entry) = self.entry(at) {
            let position = LogPosition::new(entry.epoch, at);
            match &entry.fact {
                Fact::Transaction(commit) => {
                    return Some(TransactionSummary {
                        position,
                        commit: *commit,
                    });
                }
                Fact::EpochStart(Some(summary)) => return Some(**summary),
                Fact::EpochStart(None) => at = at.previous()?,
            }
        }
        self.base_transaction
    }

    /// The record that cuts off the entry that is not complete, and nothing else.
    pub(crate) fn cut_incomplete(&self) -> Stored {
        Stored::Truncate {
            database: self.state.database,
            after: self.state.last,
            last_transaction: self.state.last_transaction,
        }
    }

    /// The transactions of a range, at most `limit`.
    pub(crate) fn transactions(
        &self,
        first_lsn: Lsn,
        last_lsn: Lsn,
        limit: usize,
    ) -> Vec<TransactionSummary> {
        let mut found = Vec::new();
        let mut lsn = first_lsn.max(self.state.first_lsn);
        while lsn <= last_lsn
            && found.len() < limit
            && let Some(entry) = self.entry(lsn)
        {
            if let Fact::Transaction(commit) = entry.fact {
                let position = LogPosition::new(entry.epoch, lsn);
                found.push(TransactionSummary { position, commit });
            }
            lsn = lsn.next();
        }
        found
    }

    /// Bytes in the journal of the entries of a range that are held.
    pub(crate) fn entry_bytes(&self, first_lsn: Lsn, last_lsn: Lsn) -> u64 {
        let first_lsn = first_lsn.max(self.state.first_lsn);
        let last_lsn = last_lsn.min(self.state.last.lsn);
        if first_lsn > last_lsn {
            return 0;
        }
        let before = first_lsn.previous().and_then(|lsn| self.entry(lsn));
        let start = before.map_or(self.base_bytes, |entry| entry.bytes_through);
        self.entry(last_lsn)
            .map_or(0, |entry| entry.bytes_through - start)
    }

    /// Where a part of an entry is, and how many parts the entry has.
    pub(crate) fn part_location(&self, lsn: Lsn, part: u32) -> Option<(Location, u32)> {
        let locations = self.entry(lsn)?.locations.as_slice();
        Some((*locations.get(part as usize)?, locations.len() as u32))
    }

    /// The oldest segment that something of this database is needed from.
    pub(crate) fn oldest_segment(&self) -> Option<u64> {
        // In the order of the log, unless some were moved.
        let looked_at = if self.moves.any { usize::MAX } else { 1 };
        let first = self
            .entries
            .iter()
            .take(looked_at)
            .flat_map(|entry| entry.locations.as_slice());
        let pending = self.pending.as_ref().and_then(|p| p.locations.first());
        first.chain(pending).map(|location| location.segment).min()
    }
}
