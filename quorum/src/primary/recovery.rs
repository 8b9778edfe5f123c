//! The choice of the log when a quorum has promised: the donor's, or, in a burial, the own one up
//! to what is committed. Ends with the epoch start; what replicas are sent is in `feed.rs`.

use super::{Node, Primary, PrimaryEffect, Stage};
use durovfs_wire::peer::Promise;
use durovfs_wire::{Epoch, EpochRun, LogPosition, Lsn, NodeName};

impl Primary {
    /// The own journal now equals the donor's log up to `last`; `history` is the own journal's.
    /// Ignored when no fetch is under way.
    ///
    /// # Panics
    /// When it ends elsewhere than the fetch was to end.
    pub fn handle_recovered(&mut self, last: LogPosition, history: Vec<EpochRun>) {
        let Stage::Recovering { donor, promise } = self.stage.clone() else {
            return;
        };
        assert_eq!(
            last, promise.last,
            "fetched up to {last}, donor={donor} has {} in epoch={}",
            promise.last, self.epoch
        );
        let journal_epoch = history.iter().rev().find(|run| run.first_lsn <= last.lsn);
        assert_eq!(
            journal_epoch.map(|run| run.epoch),
            Some(last.epoch),
            "own journal's history does not lead to {last}"
        );
        self.follow(&promise);
    }

    /// The fetch from this donor failed. Goes on with another quorum of promises that does without
    /// it, or waits for one; the donor counts again when it promises anew. Ignored when no fetch
    /// from it is under way.
    pub fn handle_fetch_failed(&mut self, donor: &NodeName) {
        match &self.stage {
            Stage::Recovering { donor: current, .. } if current == donor => {}
            _ => return,
        }
        self.stage = Stage::Claiming;
        if let Some(node) = self.nodes.get_mut(donor) {
            // Any other quorum of promises is as good: what is committed is on one of its logs.
            node.excluded = true;
        }
        self.choose_log();
    }

    /// With a quorum of promises, decides which log is the log. Called while claiming.
    pub(super) fn choose_log(&mut self) {
        self.learn_membership();
        if !self.has_quorum_of_promises() {
            return;
        }
        if self.membership.epoch >= self.epoch {
            // Heard from elsewhere: somebody has won a later epoch than the one claimed.
            self.fence(self.membership.epoch);
            return;
        }
        let counted: Vec<(&NodeName, &Promise)> = self
            .nodes
            .iter()
            .filter(|(name, node)| self.is_counted_promise(name, node))
            .filter_map(|(name, node)| node.promise.as_ref().map(|promise| (name, promise)))
            .collect();
        if let Some(bury) = self.bury {
            // Another claimant with a quorum shares a replica with this one; that replica would
            // have promised the other epoch in between and would say so.
            let certain = counted.iter().all(|(_, promise)| {
                promise.previous_promise == bury.own_epoch && promise.commit_lsn < bury.first_lsn
            });
            if certain {
                self.bury_tail();
                return;
            }
        }
        let donor = counted.into_iter().max_by_key(|(_, promise)| promise.last);
        let Some((donor, promise)) = donor.map(|(name, promise)| (name.clone(), promise.clone()))
        else {
            return;
        };
        self.refuse_bury();
        self.recover(donor, promise);
    }

    fn bury_tail(&mut self) {
        let Some(after) = self.history.position_at(self.commit_lsn) else {
            panic!(
                "epoch={} does not know its entry at lsn={}",
                self.epoch, self.commit_lsn
            )
        };
        self.cut_own_log(after);
        self.append_epoch_start();
    }

    fn recover(&mut self, donor: NodeName, promise: Promise) {
        assert!(
            promise.last.lsn >= self.commit_lsn,
            "donor={donor} ends at {} below commit_lsn={}: a quorum lost committed entries",
            promise.last,
            self.commit_lsn
        );
        let common = self
            .history
            .common_point(self.last, &promise.history, promise.last);
        // What the donor has archived it may have dropped, so it is not asked for.
        let start = if common.lsn < promise.archive_lsn {
            archive_position(&promise)
        } else {
            common
        };
        assert!(
            start.lsn >= self.commit_lsn,
            "log of donor={donor} parts at {start}, below commit_lsn={} (own last {}, donor's {})",
            self.commit_lsn,
            self.last,
            promise.last
        );
        if start == common {
            self.cut_own_log(start);
        } else {
            self.effects
                .push_back(PrimaryEffect::RestartOwnLog { at: start });
            self.retained_lsn = None;
            self.history.truncate_after(Lsn::ZERO);
            self.history.note_entry(start);
            self.last = start;
            // From now on the own log lacks what is archived, also if this fetch fails and another
            // quorum, which heard less of the archive, is recovered from.
            self.archive_lsn_heard = self.archive_lsn_heard.max(start.lsn);
            self.raise_commit(start.lsn);
        }
        if promise.last.lsn == start.lsn {
            self.follow(&promise);
            return;
        }
        self.effects.push_back(PrimaryEffect::Fetch {
            donor: donor.clone(),
            first_lsn: start.lsn.next(),
            last: promise.last,
        });
        self.stage = Stage::Recovering {
            donor,
            promise: Box::new(promise),
        };
    }

    fn cut_own_log(&mut self, after: LogPosition) {
        assert!(
            after.lsn >= self.commit_lsn,
            "cut after {after}, below commit_lsn={} in epoch={}",
            self.commit_lsn,
            self.epoch
        );
        self.effects.push_back(PrimaryEffect::CutOwnLog { after });
        self.history.truncate_after(after.lsn);
        self.last = after;
    }

    /// The own log is the donor's from here on.
    fn follow(&mut self, promise: &Promise) {
        self.history.adopt_after(self.last, &promise.history);
        self.last = promise.last;
        assert_eq!(
            self.history.position_at(self.last.lsn),
            Some(self.last),
            "recovered up to {} but the history says otherwise: {:?}",
            self.last,
            self.history.runs()
        );
        // A replica knows an entry to be committed only from a primary that was told by a quorum.
        let counted = |(name, node): &(&NodeName, &Node)| self.is_counted_promise(name, node);
        let nodes = self.nodes.iter().filter(counted);
        let promises = nodes.filter_map(|(_, node)| node.promise.as_ref());
        let (commit_lsn, archive_lsn) = promises
            .chain([promise])
            .map(|promise| (promise.commit_lsn, promise.archive_lsn))
            .fold((Lsn::ZERO, Lsn::ZERO), |high, next| {
                (high.0.max(next.0), high.1.max(next.1))
            });
        self.archive_lsn_heard = self.archive_lsn_heard.max(archive_lsn);
        self.raise_commit(commit_lsn.min(self.last.lsn));
        self.append_epoch_start();
    }

    fn append_epoch_start(&mut self) {
        self.decide_membership(self.last);
        assert!(
            self.last.epoch < self.epoch,
            "epoch={} was not claimed above the log's end, {}",
            self.epoch,
            self.last
        );
        let start = LogPosition::new(self.epoch, self.last.lsn.next());
        self.stage = Stage::Starting {
            start,
            appended: false,
        };
        self.effects
            .push_back(PrimaryEffect::AppendEpochStart { position: start });
    }

    pub(super) fn raise_commit(&mut self, lsn: Lsn) {
        assert!(
            lsn <= self.last.lsn,
            "commit_lsn={lsn} above the log's end, {}, in epoch={}",
            self.last,
            self.epoch
        );
        if lsn > self.commit_lsn {
            self.commit_lsn = lsn;
            self.effects.push_back(PrimaryEffect::Committed { lsn });
        }
    }
}

/// The position of the donor's last archived entry; `feed.rs` has checked that its history tells.
fn archive_position(promise: &Promise) -> LogPosition {
    let run = promise
        .history
        .iter()
        .rev()
        .find(|run| run.first_lsn <= promise.archive_lsn);
    LogPosition::new(
        run.map_or(Epoch::ZERO, |run| run.epoch),
        promise.archive_lsn,
    )
}
