//! The primary's side of each replica: connections, promises, acks, rejections, and where a feed
//! begins. The choice of the log is in `recovery.rs`.

use super::{Primary, PrimaryEffect, Stage, Standing};
use crate::error::ProtocolViolation;
use crate::history::History;
use crate::membership::{held_lsn, holds_quorum};
use durovfs_wire::peer::{PrimaryMessage, Promise, RejectReason, ReplicaMessage};
use durovfs_wire::{Epoch, LogPosition, Lsn, Member, NodeName, ReplicaId};

impl Primary {
    /// A replica is connected, or connected anew: it is asked for its promise, and fed when it gave
    /// it. Nodes that are not talked to are ignored.
    pub fn handle_connected(&mut self, node: &NodeName) {
        if let Some(state) = self.nodes.get_mut(node) {
            state.connected = true;
            self.ask(node);
        }
    }

    /// A replica's connection is gone; none of its messages come from now on.
    pub fn handle_disconnected(&mut self, node: &NodeName) {
        if let Some(state) = self.nodes.get_mut(node) {
            state.connected = false;
            self.ask(node);
        }
    }

    /// Finds out anew what a replica has, and feeds it from there: for a driver whose feed cannot
    /// go on (the entries were dropped), or when a troubled replica is to be tried again.
    pub fn restart_feed(&mut self, node: &NodeName) {
        self.ask(node);
    }

    /// Takes back what is known of the replica's standing, and asks for its promise.
    fn ask(&mut self, node: &NodeName) {
        let Some(state) = self.nodes.get_mut(node) else {
            return;
        };
        if std::mem::take(&mut state.feeding) {
            self.effects
                .push_back(PrimaryEffect::StopFeed { node: node.clone() });
        }
        state.standing = Standing::Asked;
        state.promise = None;
        state.excluded = false;
        let connected = state.connected;
        let active = !matches!(self.stage, Stage::Idle | Stage::Fenced { .. });
        if let (true, true, Some(claimant)) = (connected, active, self.claimant) {
            let message = PrimaryMessage::Claim(self.claim(claimant));
            self.effects.push_back(PrimaryEffect::Send {
                node: node.clone(),
                message,
            });
        }
    }

    /// Asks every connected replica that has not promised.
    pub(super) fn ask_again(&mut self) {
        let silent: Vec<NodeName> = self
            .nodes
            .iter()
            .filter(|(_, node)| node.connected && node.standing != Standing::Promised)
            .map(|(name, _)| name.clone())
            .collect();
        for node in silent {
            self.ask(&node);
        }
    }

    /// Asks every connected replica that refused this epoch without having promised a higher one.
    pub(super) fn ask_refused(&mut self) {
        let refused = Standing::Refused(self.epoch);
        let nodes: Vec<NodeName> = self
            .nodes
            .iter()
            .filter(|(_, node)| node.connected && node.standing == refused)
            .map(|(name, _)| name.clone())
            .collect();
        for node in nodes {
            self.ask(&node);
        }
    }

    /// Takes a promise, an ack or a rejection. What belongs to another epoch or membership than the
    /// current one is ignored.
    ///
    /// # Errors
    /// When the replica broke the protocol; nothing was taken from the message.
    pub fn handle_message(
        &mut self,
        node: &NodeName,
        message: &ReplicaMessage,
    ) -> Result<(), ProtocolViolation> {
        if !self.nodes.contains_key(node) {
            // Its replica was replaced a moment ago.
            return Ok(());
        }
        let database = match message {
            ReplicaMessage::Promised(promise) => promise.database,
            ReplicaMessage::Ack { database, .. } | ReplicaMessage::Rejected { database, .. } => {
                *database
            }
            ReplicaMessage::Found { .. }
            | ReplicaMessage::FetchedPart { .. }
            | ReplicaMessage::FetchEnd { .. }
            | ReplicaMessage::Pong { .. } => {
                return Err(ProtocolViolation::malformed(
                    "message is not for a primary's log",
                ));
            }
        };
        if database != self.database {
            return Err(ProtocolViolation::Database {
                expected: self.database,
                got: database,
            });
        }
        match message {
            ReplicaMessage::Promised(promise) => self.handle_promise(node, promise),
            ReplicaMessage::Ack {
                epoch,
                generation,
                replica,
                flush_lsn,
                ..
            } => self.handle_ack(node, (*epoch, *generation), *replica, *flush_lsn),
            ReplicaMessage::Rejected { epoch, reason, .. } => {
                self.handle_rejected(node, *epoch, reason);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn handle_promise(
        &mut self,
        node: &NodeName,
        promise: &Promise,
    ) -> Result<(), ProtocolViolation> {
        let current = promise.epoch == self.epoch && Some(promise.claimant) == self.claimant;
        if !current || matches!(self.stage, Stage::Idle | Stage::Fenced { .. }) {
            return Ok(());
        }
        check_promise(promise)?;
        // An entry of this epoch on the replica's disk came from here, so the log matches up to it.
        let holds_current = promise.last.epoch == self.epoch;
        if holds_current && promise.last.lsn > self.last.lsn {
            return Err(ProtocolViolation::malformed(format!(
                "node={node} holds {}, which was never sent: the log ends at {}",
                promise.last, self.last
            )));
        }
        self.check_memory(node, promise)?;
        let Some(state) = self.nodes.get_mut(node) else {
            return Ok(());
        };
        state.standing = Standing::Promised;
        state.replica = Some(promise.replica);
        state.forgot = false;
        state.promise = Some(promise.clone());
        state.flush_lsn = if holds_current {
            promise.last.lsn
        } else {
            Lsn::ZERO
        };
        match self.stage {
            Stage::Claiming => {
                self.choose_log();
                if matches!(self.stage, Stage::Claiming) {
                    self.fence_if_hopeless();
                }
            }
            Stage::Starting { .. } | Stage::Leading { .. } => {
                self.drop_needless_replacement();
                self.start_feed(node);
                self.count_acks();
            }
            Stage::Idle | Stage::Recovering { .. } | Stage::Fenced { .. } => {}
        }
        Ok(())
    }

    /// A replica that has less than it acked in this epoch lost synced writes: an old copy of its
    /// disk was put back, or the disk lies. It is left alone.
    ///
    /// What is archived does not count: a log that begins anew behind the archive acks the archived
    /// position without having it on disk, and has less again when that could not be written.
    fn check_memory(
        &mut self,
        node: &NodeName,
        promise: &Promise,
    ) -> Result<(), ProtocolViolation> {
        let (Stage::Starting { start, .. } | Stage::Leading { start }) = self.stage else {
            return Ok(());
        };
        let archive_lsn = self.archive_lsn();
        let Some(state) = self.nodes.get_mut(node) else {
            return Ok(());
        };
        let acked_lsn = state.flush_lsn;
        if promise.mending
            || state.replica != Some(promise.replica)
            || acked_lsn < start.lsn
            || acked_lsn <= archive_lsn
            || promise.last >= LogPosition::new(start.epoch, acked_lsn)
        {
            return Ok(());
        }
        state.standing = Standing::Troubled;
        state.forgot = true;
        Err(ProtocolViolation::malformed(format!(
            "node={node} acked lsn={acked_lsn} in epoch={} and now ends at {}: it lost what it had \
             synced",
            start.epoch, promise.last
        )))
    }

    fn handle_ack(
        &mut self,
        node: &NodeName,
        (epoch, generation): (Epoch, u32),
        replica: ReplicaId,
        flush_lsn: Lsn,
    ) -> Result<(), ProtocolViolation> {
        // Only the current epoch is counted: an ack of an older one may be for an entry that was
        // cut.
        if epoch != self.epoch || generation != self.membership.generation {
            return Ok(());
        }
        // Nor one of a node that has not promised to this claimant: an earlier start of this node
        // may have claimed the same epoch, lost its journal's tail, and forgotten.
        let Some(state) = self
            .nodes
            .get_mut(node)
            .filter(|n| n.standing == Standing::Promised && n.replica == Some(replica))
        else {
            return Ok(());
        };
        if flush_lsn > self.last.lsn {
            return Err(ProtocolViolation::malformed(format!(
                "node={node} acks flush_lsn={flush_lsn} in epoch={epoch}, the log ends at {}",
                self.last
            )));
        }
        state.flush_lsn = state.flush_lsn.max(flush_lsn);
        self.count_acks();
        Ok(())
    }

    /// Raises commit_lsn to what a quorum holds, and opens the log when that reaches the epoch
    /// start.
    fn count_acks(&mut self) {
        let start = match self.stage {
            Stage::Starting {
                start,
                appended: true,
            }
            | Stage::Leading { start } => start,
            _ => return,
        };
        let held_lsn = held_lsn(&self.membership, |member| self.member_flush_lsn(member));
        // Entries of older epochs are never counted directly: three disks may hold one, and a
        // primary elected by a longer log of a newer epoch would still cut it.
        if held_lsn < start.lsn {
            return;
        }
        self.raise_commit(held_lsn);
        if matches!(self.stage, Stage::Starting { .. }) {
            self.stage = Stage::Leading { start };
            if let Some(bury) = self.bury.take() {
                assert_eq!(
                    bury.first_lsn, start.lsn,
                    "buried lsn={} under the start of epoch={} at lsn={}",
                    bury.first_lsn, start.epoch, start.lsn
                );
                self.effects.push_back(PrimaryEffect::Buried {
                    lsn: bury.first_lsn,
                });
            }
            self.effects.push_back(PrimaryEffect::Opened {
                epoch: self.epoch,
                end: start,
            });
        }
    }

    fn handle_rejected(&mut self, node: &NodeName, epoch: Epoch, reason: &RejectReason) {
        if let RejectReason::Fenced { promised } | RejectReason::TakenOver { promised, .. } = reason
        {
            self.highest_epoch_seen = self.highest_epoch_seen.max(*promised);
        }
        if epoch != self.epoch || matches!(self.stage, Stage::Idle | Stage::Fenced { .. }) {
            return;
        }
        let is_member = self.is_member(node);
        let Some(state) = self.nodes.get_mut(node) else {
            return;
        };
        let had_promised = state.standing == Standing::Promised;
        match reason {
            RejectReason::Fenced { promised } | RejectReason::TakenOver { promised, .. }
                if had_promised && is_member && *promised > self.epoch =>
            {
                // It was ours: somebody is taking over.
                self.fence(*promised);
            }
            // Its machine began anew and knows no primary: that is what it says to the appends that
            // were under way, and no refusal of the epoch.
            RejectReason::Fenced { .. } if state.standing == Standing::Troubled => {}
            RejectReason::Alive { .. } if !had_promised => self.refused(node, self.epoch),
            RejectReason::Fenced { promised } if !had_promised => self.refused(node, *promised),
            RejectReason::Storage { .. } => {
                if std::mem::take(&mut state.feeding) {
                    self.effects
                        .push_back(PrimaryEffect::StopFeed { node: node.clone() });
                }
                state.standing = Standing::Troubled;
                state.promise = None;
            }
            RejectReason::Alive { .. } | RejectReason::TakenOver { .. } => {}
            RejectReason::Fenced { .. }
            | RejectReason::Gap { .. }
            | RejectReason::Generation { .. } => {
                // Appends that were under way when the first one was refused are refused as well:
                // one question is enough.
                if had_promised {
                    self.ask(node);
                }
            }
        }
    }

    /// A replica refuses the epoch; when too many do, no quorum is left for it.
    fn refused(&mut self, node: &NodeName, promised: Epoch) {
        if let Some(state) = self.nodes.get_mut(node) {
            if std::mem::take(&mut state.feeding) {
                self.effects
                    .push_back(PrimaryEffect::StopFeed { node: node.clone() });
            }
            state.standing = Standing::Refused(promised);
            state.promise = None;
        }
        self.fence_if_hopeless();
    }

    /// Gives the epoch up when so many members refuse it that those left are no quorum. A node that
    /// answers as another replica than the one that votes is not left.
    fn fence_if_hopeless(&mut self) {
        let refusal = |node: &NodeName| match self.nodes.get(node)?.standing {
            Standing::Refused(promised) => Some(promised),
            Standing::Asked | Standing::Promised | Standing::Troubled => None,
        };
        let undecided = self.membership.is_undecided();
        let may_vote =
            |member: &Member| undecided || (member.replica.is_some() && !self.is_gone(member));
        let may_win = holds_quorum(&self.membership, |member| {
            refusal(&member.node).is_none() && may_vote(member)
        });
        let nodes = self.membership.nodes();
        if !may_win && let Some(by) = nodes.into_iter().filter_map(refusal).max() {
            self.fence(by);
        }
    }

    /// Feeds a replica that promised, once the epoch start may be sent.
    pub(super) fn start_feed(&mut self, node: &NodeName) {
        if !matches!(
            self.stage,
            Stage::Starting { appended: true, .. } | Stage::Leading { .. }
        ) {
            return;
        }
        let floor = self.feed_floor();
        let Some(state) = self.nodes.get_mut(node) else {
            return;
        };
        let Some(promise) = state.promise.take() else {
            return;
        };
        let common = self
            .history
            .common_point(self.last, &promise.history, promise.last);
        let previous = if common.lsn >= floor {
            common
        } else {
            match self.history.position_at(floor) {
                Some(position) => position,
                None => panic!(
                    "epoch of archived lsn={floor} is forgotten, last is {}",
                    self.last
                ),
            }
        };
        state.feeding = true;
        if promise.mending {
            // It acked nothing beyond this, and of what it acked in older epochs all that is
            // committed is below the epoch start.
            let message = PrimaryMessage::Mend {
                database: self.database,
                epoch: self.epoch,
                lsn: self.last.lsn,
            };
            let node = node.clone();
            self.effects
                .push_back(PrimaryEffect::Send { node, message });
        }
        let members = PrimaryMessage::Members {
            database: self.database,
            membership: self.membership.clone(),
        };
        self.effects.push_back(PrimaryEffect::Send {
            node: node.clone(),
            message: members,
        });
        self.effects.push_back(PrimaryEffect::Feed {
            node: node.clone(),
            next_lsn: previous.lsn.next(),
            previous,
        });
    }
}

/// A promise that contradicts itself would make this node recover a log that never was.
fn check_promise(promise: &Promise) -> Result<(), ProtocolViolation> {
    let refuse = |what: &str| {
        Err(ProtocolViolation::malformed(format!(
            "promise of epoch={}: {what} (last {}, commit_lsn={}, archive_lsn={}, runs={:?})",
            promise.epoch, promise.last, promise.commit_lsn, promise.archive_lsn, promise.history
        )))
    };
    let history = match History::from_runs(&promise.history) {
        Ok(history) => history,
        Err(error) => return refuse(&error.to_string()),
    };
    if history.position_at(promise.last.lsn) != Some(promise.last) {
        return refuse("its history does not lead to its last entry");
    }
    if history
        .runs()
        .last()
        .is_some_and(|run| run.first_lsn > promise.last.lsn)
    {
        return refuse("its history goes beyond its last entry");
    }
    if promise.archive_lsn > promise.commit_lsn || promise.commit_lsn > promise.last.lsn {
        return refuse("not archive_lsn <= commit_lsn <= last");
    }
    let reaches_back_to = promise.archive_lsn.max(Lsn::new(1)).min(promise.last.lsn);
    if history.position_at(reaches_back_to).is_none() {
        return refuse("its history does not reach back to the archive");
    }
    let told = promise.membership.as_ref();
    if told.is_some_and(|membership| membership.epoch > promise.epoch) {
        return refuse("it was told a membership of an epoch that it has not promised");
    }
    if promise.last.epoch > promise.epoch || promise.previous_promise > promise.epoch {
        return refuse("it is for an epoch below the log's end");
    }
    Ok(())
}
