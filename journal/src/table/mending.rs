//! What damage does to the index: entries that are lost, and states that are restated behind it.

use super::Table;
use crate::promises::KeptPromise;
use crate::record::DatabaseState;
use durovfs_wire::position::{EpochRun, LogPosition, Lsn};

impl Table {
    /// The entries from here on are lost: what is left is the log before them, and it is known to
    /// be less than what was acknowledged.
    pub(crate) fn lose_from(&mut self, first_lsn: Lsn) {
        self.state.mending = true;
        let before = first_lsn.previous().unwrap_or_default();
        let Some(epoch) = self.epoch_at(before) else {
            return self.lose_all();
        };
        let end_lsn = self.state.first_lsn.get() + self.entries.len() as u64;
        if first_lsn < self.state.first_lsn || first_lsn.get() > end_lsn {
            // Nothing that is held touches what is left.
            self.entries.clear();
            self.base_bytes = 0;
            self.base_transaction = None;
            self.state.first_lsn = first_lsn;
        }
        self.truncate(LogPosition::new(epoch, before), None);
        let last_transaction = self.transaction_through(before);
        let state = &mut self.state;
        state.last_transaction = last_transaction;
        state.commit_lsn = state.commit_lsn.min(before);
        state.archive_lsn = state.archive_lsn.min(before);
    }

    /// Of the log only the promise is left.
    fn lose_all(&mut self) {
        let cuts = self.cuts + 1;
        let state = DatabaseState {
            name: std::mem::take(&mut self.state.name),
            replica: self.state.replica,
            membership: self.state.membership.take(),
            promised: self.state.promised,
            claimant: self.state.claimant,
            mending: true,
            ..DatabaseState::empty(self.state.database)
        };
        *self = Self::from_state(state, None);
        self.cuts = cuts;
    }

    /// In recovery, behind a hole: takes what a restated state says beside the entries. True when
    /// the log that was read ends as the state says; else it is cut to what both share.
    pub(crate) fn compare_after_hole(
        &mut self,
        state: &DatabaseState,
        pending: Option<(LogPosition, u32)>,
    ) -> bool {
        if pending.is_none() && state.first_lsn > state.last.lsn {
            // It held no entry, so none can be missing.
            *self = Self::from_state(state.clone(), None);
            return true;
        }
        let ours_pending = self.pending.as_ref().map(|p| (p.position, p.next_part()));
        let shared_lsn = self.shared_lsn(state);
        let whole = if self.state.last == state.last {
            ours_pending == pending
        } else {
            // What is too much here was cut off in the hole.
            shared_lsn == state.last.lsn && pending.is_none()
        };
        if whole && self.state.last != state.last {
            self.truncate(state.last, state.last_transaction);
        }
        self.state = DatabaseState {
            first_lsn: self.state.first_lsn,
            last: self.state.last,
            last_transaction: self.state.last_transaction,
            ..state.clone()
        };
        if whole {
            self.state.last_transaction = state.last_transaction;
            self.drop_through(state.first_lsn.previous().unwrap_or_default());
        } else {
            self.lose_from(shared_lsn.next().max(state.first_lsn));
        }
        whole
    }

    /// The highest entry that this log and a stated one share.
    fn shared_lsn(&self, state: &DatabaseState) -> Lsn {
        let run_at = |runs: &[EpochRun], lsn: Lsn| {
            let mut newest_first = runs.iter().rev();
            newest_first.find(|run| run.first_lsn <= lsn).copied()
        };
        let mut lsn = self.state.last.lsn.min(state.last.lsn);
        while let (Some(ours), Some(theirs)) = (
            run_at(&self.state.history, lsn),
            run_at(&state.history, lsn),
        ) {
            if ours.epoch == theirs.epoch {
                return lsn;
            }
            let first_lsn = ours.first_lsn.max(theirs.first_lsn);
            lsn = first_lsn.previous().unwrap_or_default();
        }
        Lsn::ZERO
    }

    /// Records of this database are missing, or may be.
    pub(crate) fn mark_mending(&mut self) {
        self.state.mending = true;
    }

    /// What comes now cannot be built on what was read: nor on the parts of an entry.
    pub(crate) fn stop_building(&mut self) {
        self.state.mending = true;
        self.pending = None;
    }

    /// The promise, for the file that keeps it a second time.
    pub(crate) fn kept_promise(&self) -> Option<KeptPromise> {
        Some(KeptPromise {
            database: self.state.database,
            name: self.state.name.clone(),
            epoch: self.state.promised,
            claimant: self.state.claimant?,
            replica: self.state.replica,
        })
    }

    /// A promise that was kept a second time. The higher one counts.
    pub(crate) fn take_promise(&mut self, promise: KeptPromise) {
        let state = &mut self.state;
        if promise.epoch > state.promised {
            state.name = promise.name;
            state.promised = promise.epoch;
            state.claimant = Some(promise.claimant);
            state.replica = promise.replica;
        }
    }
}
