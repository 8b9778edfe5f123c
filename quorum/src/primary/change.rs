//! Changes of a log's replicas: who is to be replaced by whom, which membership may follow the
//! present one, and the step to it.
//!
//! An epoch has one membership, decided by its primary before the epoch's start is appended and
//! told to every replica before its first entry. So a step is a claim of the next epoch with the
//! new membership at hand. `docs/protocol.md` has the rules and why they are safe.

use super::{Node, Primary, PrimaryEffect, Proposal, Stage, Standing};
use crate::membership::holds_quorum;
use durovfs_wire::{ClaimantId, Epoch, LogPosition, Lsn, Member, Membership, NodeName};

/// A replacement that was asked for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Replacement {
    /// The node whose replica goes.
    pub old: NodeName,
    /// The node that is to have one; the same when its replica lost its journal.
    pub new: NodeName,
    /// Where that node is, `host:port`.
    pub address: String,
}

/// Why a replacement cannot begin. The caller tells the person who asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReplaceRefused {
    /// No entries are taken now.
    #[error("the log is not open: a quorum of replicas is needed")]
    NotLeading,
    /// The node to be replaced has no replica.
    #[error("{0} has no replica of it")]
    NotMember(NodeName),
    /// The node that is to have one has one.
    #[error("{0} has a replica of it already")]
    AlreadyMember(NodeName),
    /// One at a time.
    #[error("another replacement is under way: {old} by {new}")]
    UnderWay {
        /// The node whose replica goes there.
        old: NodeName,
        /// The node that gets one there.
        new: NodeName,
    },
}

impl Primary {
    /// Begins to replace a node's replica: the new one is fed, without a vote, and as soon as it is
    /// level [`Self::next_membership`] has the first step. The same replacement again changes
    /// nothing. With the nodes the other way round, a replacement that is between its steps is
    /// taken back.
    ///
    /// Nothing of this is on any disk before the first step. After it any primary of the log goes
    /// on with it.
    ///
    /// # Errors
    /// Why not; nothing was changed.
    pub fn start_replacement(&mut self, wanted: Replacement) -> Result<(), ReplaceRefused> {
        if !matches!(self.stage, Stage::Leading { .. }) {
            return Err(ReplaceRefused::NotLeading);
        }
        if let Some(under_way) = self.replacement_under_way() {
            let (old, new) = (under_way.old, under_way.new);
            let same = old == wanted.old && new == wanted.new;
            let reverse = old == wanted.new && new == wanted.old;
            if reverse && self.membership.next.is_none() {
                self.cancel_replacement();
                return Ok(());
            }
            if reverse {
                self.replacement = Some(wanted);
                return Ok(());
            }
            return if same {
                Ok(())
            } else {
                Err(ReplaceRefused::UnderWay { old, new })
            };
        }
        let is_member = |node: &NodeName| self.membership.nodes().contains(node);
        if !is_member(&wanted.old) {
            return Err(ReplaceRefused::NotMember(wanted.old));
        }
        if wanted.new != wanted.old && is_member(&wanted.new) {
            return Err(ReplaceRefused::AlreadyMember(wanted.new));
        }
        self.replacement = Some(wanted);
        self.update_nodes();
        self.drop_needless_replacement();
        Ok(())
    }

    /// Gives up a replacement that was made, or of a replica that turned out not to be lost: its
    /// node came back with the disk that it had.
    pub(super) fn drop_needless_replacement(&mut self) {
        if self.is_replacement_over() {
            self.cancel_replacement();
        }
    }

    /// Gives up a replacement of which no step was made.
    pub fn cancel_replacement(&mut self) {
        if self.replacement.take().is_some() {
            self.update_nodes();
        }
    }

    /// The replacement that was asked for, or that an earlier primary has begun.
    pub fn replacement_under_way(&self) -> Option<Replacement> {
        let Some(next) = &self.membership.next else {
            return self.replacement.clone();
        };
        let old = only_in(&self.membership.members, next)?;
        let new = only_in(next, &self.membership.members)?;
        Some(Replacement {
            old: old.node.clone(),
            new: new.node.clone(),
            address: new.address.clone(),
        })
    }

    /// Nodes whose replica is not the one that votes: it lost its journal, or has not been seen
    /// before. It is fed, and can be made the one that votes by a replacement of the node by
    /// itself.
    pub fn unrecorded(&self) -> impl Iterator<Item = &Member> {
        let members = self.membership.members.iter();
        members.filter(|member| self.is_gone(member))
    }

    /// Where a node of the membership, or of the replacement under way, was said to be.
    pub fn address_of(&self, node: &NodeName) -> Option<String> {
        let mut members = self.membership.all_members();
        let member = members.find(|member| member.node == *node);
        let joining = self.replacement.as_ref();
        let joining = joining.filter(|wanted| wanted.new == *node);
        member
            .map(|member| member.address.clone())
            .or_else(|| joining.map(|wanted| wanted.address.clone()))
    }

    /// The membership that may follow now, if a change is under way and its next step is due: the
    /// replica that joins holds all that is committed, or was lost when it had joined.
    pub fn next_membership(&self) -> Option<Membership> {
        if !matches!(self.stage, Stage::Leading { .. }) || self.bury.is_some() {
            return None;
        }
        let present = &self.membership;
        let generation = present.generation.checked_add(1)?;
        if let Some(next) = &present.next {
            let joins = only_in(next, &present.members)?;
            let leaves = only_in(&present.members, next)?;
            let taken_back = self
                .replacement
                .as_ref()
                .is_some_and(|wanted| wanted.old == joins.node && wanted.new == leaves.node);
            if taken_back && joins.node != leaves.node {
                return Some(Membership {
                    generation,
                    members: next.clone(),
                    next: Some(present.members.clone()),
                    ..present.clone()
                });
            }
            let may_follow = self.is_level(joins) || self.is_gone(joins);
            return may_follow.then(|| Membership {
                generation,
                members: next.clone(),
                next: None,
                ..present.clone()
            });
        }
        let wanted = self.replacement.as_ref()?;
        let replica = self.nodes.get(&wanted.new)?.replica;
        let joins = Member {
            node: wanted.new.clone(),
            address: wanted.address.clone(),
            replica: Some(replica?),
        };
        let members = &present.members;
        let leaves = members.iter().any(|member| member.node == wanted.old);
        if !leaves || members.contains(&joins) || !self.is_level(&joins) {
            return None;
        }
        let next = members.iter().map(|member| {
            if member.node == wanted.old {
                joins.clone()
            } else {
                member.clone()
            }
        });
        Some(Membership {
            generation,
            next: Some(next.collect()),
            ..present.clone()
        })
    }

    /// Whether its node answered as another replica: it lost its journal, and will never be level.
    /// A change does not wait for it; the node's new replica is brought in by the next one.
    pub(super) fn is_gone(&self, member: &Member) -> bool {
        self.nodes.get(&member.node).is_some_and(|node| {
            node.standing == Standing::Promised
                && node.replica.is_some()
                && node.replica != member.replica
        })
    }

    /// Whether it lacks nothing but what is archived. That is not sent to a replica which lacks it;
    /// when there is nothing else, the step's own epoch start is the first entry that it gets.
    fn is_level(&self, member: &Member) -> bool {
        let all_is_archived = self.archive_lsn() == self.commit_lsn;
        self.member_flush_lsn(member) >= self.commit_lsn
            || (all_is_archived && self.has_promised(member))
    }

    /// Whether it promised this epoch, on the connection that there is.
    fn has_promised(&self, member: &Member) -> bool {
        self.nodes.get(&member.node).is_some_and(|node| {
            node.standing == Standing::Promised && node.replica == member.replica
        })
    }

    /// Makes the step that [`Self::next_membership`] tells: claims the next epoch for it. Entries
    /// are taken again when that is opened. `false`, and nothing is done, when no step is due or an
    /// entry is not committed yet: it would be given up.
    ///
    /// When another primary was there in between, or the claim is given up for another, the
    /// membership stays as it was found.
    pub fn start_change(&mut self, claimant: ClaimantId) -> bool {
        let Some(membership) = self.next_membership() else {
            return false;
        };
        if self.last.lsn != self.commit_lsn {
            return false;
        }
        self.proposal = Some(Proposal {
            base: self.epoch,
            membership,
            waits: true,
        });
        self.begin_claim(claimant);
        true
    }

    /// Whether a member that is connected refuses this epoch: it promised another one to a node
    /// that did not become the primary. Nothing but [`Self::start_again`] brings it back.
    pub fn is_refused(&self) -> bool {
        let refuses = |member: &Member| {
            let node = self.nodes.get(&member.node);
            node.is_some_and(|node| node.connected && matches!(node.standing, Standing::Refused(_)))
        };
        matches!(self.stage, Stage::Leading { .. }) && self.membership.sets().flatten().any(refuses)
    }

    /// Claims the next epoch, for the members that refuse this one. Entries are taken again when
    /// that is opened. `false`, and nothing is done, when none refuses, or an entry is not
    /// committed yet: it would be given up.
    pub fn start_again(&mut self, claimant: ClaimantId) -> bool {
        if !self.is_refused() || self.last.lsn != self.commit_lsn {
            return false;
        }
        self.begin_claim(claimant);
        true
    }

    /// A membership that another node knows. Gone by when it is newer, as long as no log is chosen.
    pub fn handle_membership(&mut self, membership: &Membership) {
        let open = matches!(self.stage, Stage::Starting { .. } | Stage::Leading { .. });
        if open || membership.epoch <= self.membership.epoch {
            return;
        }
        self.highest_epoch_seen = self.highest_epoch_seen.max(membership.epoch);
        self.membership = membership.clone();
        self.update_nodes();
        if matches!(self.stage, Stage::Claiming) {
            self.choose_log();
        }
    }

    /// Says that this node has just made up the log's id. Until another claim than the first, the
    /// configured replicas are taken for new, whoever answers.
    pub fn declare_new(&mut self) {
        self.is_new = true;
    }

    /// Goes on without the replicas that are connected and do not answer. The first claim of a new
    /// log waits for them, to learn who they are; the step of a change for those that are to vote
    /// next: it is not made without a quorum of them.
    pub fn stop_waiting(&mut self) {
        self.waits = false;
        if let Some(proposal) = &mut self.proposal {
            proposal.waits = false;
        }
        if matches!(self.stage, Stage::Claiming) {
            self.choose_log();
        }
    }

    /// Goes by the newest membership that a promise told.
    pub(super) fn learn_membership(&mut self) {
        let told = self.nodes.values().filter_map(|node| node.promise.as_ref());
        let newest = told
            .filter_map(|promise| promise.membership.as_ref())
            .max_by_key(|membership| membership.epoch);
        if let Some(newest) = newest
            && newest.epoch > self.membership.epoch
        {
            self.membership = newest.clone();
            self.update_nodes();
        }
    }

    /// Whether enough have promised for the log to be chosen.
    pub(super) fn has_quorum_of_promises(&self) -> bool {
        let counts = |member: &Member| {
            self.nodes
                .get(&member.node)
                .is_some_and(|node| self.is_counted_promise(&member.node, node))
        };
        if !self.membership.is_undecided() {
            let waits = self.proposal.as_ref().is_some_and(|step| step.waits);
            return holds_quorum(&self.membership, counts) && (!waits || self.may_take_step());
        }
        // Nobody's identity is known, so one that lost its journal cannot be told from one that
        // never had it. All of them together cannot have forgotten what a quorum once held.
        let count = self.membership.members.iter().filter(|m| counts(m)).count();
        let waits = self.waits
            && self
                .nodes
                .values()
                .any(|node| node.connected && node.standing == Standing::Asked);
        count == self.membership.members.len()
            || (self.is_new && count >= self.membership.ack_quorum && !waits)
    }

    /// Whether the step that the claim is for, if it is for one, has promises of a quorum of each
    /// of its sets: without them nothing could be committed in its epoch, nor in any later one.
    fn may_take_step(&self) -> bool {
        let promised = |member: &Member| self.has_promised(member);
        let step = self.proposal.as_ref();
        step.is_some_and(|step| holds_quorum(&step.membership, promised))
    }

    /// Whether this node's promise is one of a member.
    pub(super) fn is_counted_promise(&self, name: &NodeName, node: &Node) -> bool {
        let undecided = self.membership.is_undecided();
        // One that is mending may have acked what it does not tell: an entry that three hold could
        // be missed.
        !node.excluded
            && node
                .promise
                .as_ref()
                .is_some_and(|promise| !promise.mending)
            && node
                .replica
                .is_some_and(|replica| undecided || self.membership.has(name, replica))
    }

    /// Whether what this node's replica says has a vote.
    pub(super) fn is_member(&self, name: &NodeName) -> bool {
        let undecided = self.membership.is_undecided();
        self.nodes
            .get(name)
            .and_then(|node| node.replica)
            .map_or(undecided, |replica| {
                undecided || self.membership.has(name, replica)
            })
    }

    /// What a member is known to hold: nothing, when the node's replica is another.
    pub(super) fn member_flush_lsn(&self, member: &Member) -> Lsn {
        self.nodes
            .get(&member.node)
            .filter(|node| node.replica.is_some() && node.replica == member.replica)
            .map_or(Lsn::ZERO, |node| node.flush_lsn)
    }

    /// The log is chosen, and ends at `last`: decides who votes in this epoch.
    pub(super) fn decide_membership(&mut self, last: LogPosition) {
        let mut decided = self.membership.clone();
        // A proposal stands on the membership of an epoch that was committed. If the log, or a
        // promise, has seen a later one, that may have proposed something else.
        let may_take_step = self.may_take_step();
        if let Some(proposal) = self.proposal.take()
            && may_take_step
            && proposal.base == last.epoch
            && proposal.base == decided.epoch
        {
            decided = proposal.membership;
        }
        if decided.is_undecided() {
            for member in &mut decided.members {
                let node = self.nodes.get(&member.node);
                member.replica = node
                    .filter(|node| node.standing == Standing::Promised)
                    .and_then(|node| node.replica);
            }
        }
        assert!(
            decided.epoch < self.epoch || decided.epoch == Epoch::ZERO,
            "membership of epoch={} found in epoch={}",
            decided.epoch,
            self.epoch
        );
        decided.epoch = self.epoch;
        self.membership = decided.clone();
        if self.is_replacement_over() {
            self.replacement = None;
        }
        self.update_nodes();
        self.effects.push_back(PrimaryEffect::NoteMembership {
            membership: decided,
        });
    }

    /// Whether the replacement that was asked for was made, or has lost its sense.
    fn is_replacement_over(&self) -> bool {
        let Some(wanted) = &self.replacement else {
            return false;
        };
        if self.membership.next.is_some() {
            return false;
        }
        let member = |name: &NodeName| {
            let mut members = self.membership.members.iter();
            members.find(|member| member.node == *name)
        };
        let replica = self.nodes.get(&wanted.new).and_then(|node| node.replica);
        let joined = member(&wanted.new)
            .is_some_and(|member| member.replica.is_some() && member.replica == replica);
        joined || member(&wanted.old).is_none()
    }

    /// Keeps the nodes that are fed equal to those that the membership and the replacement name.
    pub(super) fn update_nodes(&mut self) {
        let joining = self.replacement.as_ref().map(|wanted| &wanted.new);
        let wanted: Vec<NodeName> = self
            .membership
            .nodes()
            .into_iter()
            .chain(joining)
            .cloned()
            .collect();
        let mut changed = false;
        let gone: Vec<NodeName> = self
            .nodes
            .keys()
            .filter(|name| !wanted.contains(name))
            .cloned()
            .collect();
        for name in gone {
            changed = true;
            if self.nodes.remove(&name).is_some_and(|node| node.feeding) {
                self.effects
                    .push_back(PrimaryEffect::StopFeed { node: name });
            }
        }
        for name in wanted {
            self.nodes.entry(name).or_insert_with(|| {
                changed = true;
                Node::default()
            });
        }
        if changed {
            self.effects.push_back(PrimaryEffect::NodesChanged);
        }
    }
}

/// The member of the first set that is not in the other.
fn only_in<'a>(set: &'a [Member], other: &[Member]) -> Option<&'a Member> {
    set.iter().find(|member| !other.contains(member))
}
