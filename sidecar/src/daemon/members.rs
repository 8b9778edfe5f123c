//! Replicas of a database that are replaced, and who its nodes are: when the next step of a change
//! is made, what waits meanwhile, and how a log's members are found again.
//!
//! What may follow what is decided in `quorum`. Here is only when: a step claims the next epoch, so
//! it is made while nothing is in flight, and writes that come in between wait for it.

use super::event::{Permit, SessionId};
use super::feed::Feed;
use super::node::{Node, new_claimant};
use super::primary::{CommitRequest, PrimaryDatabase};
use bytes::Bytes;
use durovfs_quorum::{PrimaryState, ReplaceRefused, Replacement, holds_quorum};
use durovfs_sidecar::donor::DonorEnd;
use durovfs_wire::client::{FailureKind, ReplaceState};
use durovfs_wire::peer::{FoundLog, PrimaryMessage};
use durovfs_wire::{DatabaseId, Member, Membership, NodeName, PageSize, ReplicaId};
use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

/// A node whose replica is another than the recorded one is taken for one that lost its journal
/// when it has stayed so for this long. A disk that was mounted late shows itself before.
const LOST_AFTER: Duration = Duration::from_secs(10);
/// Writes wait this long for a step of a change; then they are refused, for certain.
const HOLD_LIMIT: Duration = Duration::from_secs(2);
/// A replica that is connected answers a claim within this, or a new log begins without it.
const CLAIM_PATIENCE: Duration = Duration::from_millis(500);
/// A claim that was not won for this long may be made at nodes that were replaced: all nodes are
/// asked, as often, who the members are.
const SEARCH_INTERVAL: Duration = Duration::from_secs(1);
/// Members that refuse the epoch are left so for this long: whom one of them promised another may
/// be about to become the primary. Doubled with each claim that did not bring them back.
const REFUSED_PATIENCE: Duration = Duration::from_secs(2);
/// The most that it is doubled to: a claim holds writes for a moment.
const MAX_REFUSED_PATIENCE: Duration = Duration::from_secs(64);
/// Names the search for members in answers; searches for a log count from one.
const SEARCH_REQUEST: u64 = 0;

/// The change of members of one database, as its primary's driver sees it.
#[derive(Default)]
pub struct Members {
    /// Writes wait since then, for a step.
    hold: Option<Hold>,
    held: VecDeque<HeldWrite>,
    /// Nodes whose replica is not the recorded one, and since when.
    strangers: BTreeMap<NodeName, (ReplicaId, Instant)>,
    /// When the claim under way began.
    claiming_since: Option<Instant>,
    searched_at: Option<Instant>,
    /// Members refuse the epoch.
    refused: Option<Refused>,
}

#[derive(Clone, Copy)]
struct Refused {
    since: Instant,
    patience: Duration,
}

#[derive(Clone, Copy)]
struct Hold {
    since: Instant,
    /// The step's claim was made.
    claimed: bool,
}

/// A write of a client that waits for a step.
pub enum HeldWrite {
    /// Slots of an open transaction.
    Pages {
        session: SessionId,
        sequence: u64,
        page_size: PageSize,
        payload: Bytes,
        permit: Permit,
    },
    /// An open transaction that was taken back.
    Abort { session: SessionId, sequence: u64 },
    /// A commit.
    Commit(CommitRequest),
}

impl Members {
    /// Whether the claim under way is a step of a change.
    pub fn is_changing(&self) -> bool {
        self.hold.is_some_and(|hold| hold.claimed)
    }

    /// Notes whether members refuse the epoch of a log that is open.
    fn note_refused(&mut self, is_refused: bool, now: Instant) {
        let first = Refused {
            since: now,
            patience: REFUSED_PATIENCE,
        };
        self.refused = is_refused.then(|| self.refused.unwrap_or(first));
    }

    /// Whether the next epoch is to be claimed for those that refuse this one.
    fn must_claim_again(&self, now: Instant) -> bool {
        self.refused
            .is_some_and(|refused| now.duration_since(refused.since) >= refused.patience)
    }

    /// It was.
    fn note_claimed_again(&mut self, now: Instant) {
        if let Some(refused) = &mut self.refused {
            refused.since = now;
            refused.patience = (refused.patience * 2).min(MAX_REFUSED_PATIENCE);
        }
    }
}

impl Node {
    /// Keeps a write for later when a step of a change is under way; gives it back otherwise.
    pub fn hold_write(&mut self, database: DatabaseId, write: HeldWrite) -> Option<HeldWrite> {
        let members = &mut self.primaries.get_mut(&database)?.members;
        if members.hold.is_none() {
            return Some(write);
        }
        members.held.push_back(write);
        None
    }

    /// Lets the writes go on that waited for a step.
    pub fn release_held(&mut self, database: DatabaseId) {
        let Some(db) = self.primaries.get_mut(&database) else {
            return;
        };
        db.members.hold = None;
        for write in std::mem::take(&mut db.members.held) {
            match write {
                HeldWrite::Pages {
                    session,
                    sequence,
                    page_size,
                    payload,
                    permit,
                } => self.handle_pages(session, (database, sequence), page_size, payload, permit),
                HeldWrite::Abort { session, sequence } => {
                    self.handle_abort(session, database, sequence);
                }
                HeldWrite::Commit(request) => self.handle_commit(request),
            }
        }
    }

    /// Whether enough replicas of a database can be counted on now.
    ///
    /// # Errors
    /// How many can be, in words.
    pub fn check_answering(&self, db: &PrimaryDatabase) -> Result<(), String> {
        let now = Instant::now();
        let membership = db.machine.membership();
        let counts = |member: &Member| {
            let feed = db.feeds.get(&member.node);
            let takes = feed
                .is_some_and(|feed| !matches!(feed.state, super::feed::FeedState::Refusing { .. }));
            let peer = self.peers.get(&member.node);
            // While a claim is under way it is not known who they are.
            let progress = db.machine.node_progress(&member.node);
            let lost = progress.is_some_and(|progress| {
                progress.refused.is_some() || (progress.promised && !progress.counted)
            });
            takes && !(db.is_open() && lost) && peer.is_some_and(|peer| peer.is_answering(now))
        };
        if holds_quorum(membership, counts) {
            return Ok(());
        }
        let fewest = membership
            .sets()
            .map(|set| (set.iter().filter(|m| counts(m)).count(), set.len()))
            .min();
        let (answering, of) = fewest.unwrap_or_default();
        Err(format!(
            "{answering} of {of} replicas answer, {} are needed",
            membership.ack_quorum
        ))
    }

    /// Looks after a database's members: at each tick.
    pub fn tick_members(&mut self, database: DatabaseId, now: Instant) {
        self.tick_claiming(database, now);
        let Some(db) = self.primaries.get_mut(&database) else {
            return;
        };
        if db.is_open() {
            db.note_strangers(now);
            db.members.note_refused(db.machine.is_refused(), now);
        }
        let too_long = |hold: &Hold| now.duration_since(hold.since) >= HOLD_LIMIT;
        if db.members.hold.as_ref().is_some_and(too_long) {
            self.release_held(database);
            return;
        }
        self.try_change(database);
    }

    /// Makes the next step of a change, if one is due and nothing is in flight; or claims the next
    /// epoch for members that refuse this one. Writes wait for it.
    pub fn try_change(&mut self, database: DatabaseId) {
        let Some(db) = self.primaries.get_mut(&database) else {
            return;
        };
        let since = Instant::now();
        let is_step = db.machine.next_membership().is_some();
        let due = db.is_open() && (is_step || db.members.must_claim_again(since));
        if !due && db.members.hold.is_some_and(|hold| !hold.claimed) {
            return self.release_held(database);
        }
        // A transaction that streams in has its place in this epoch.
        if !due || db.streamed.is_some() {
            return;
        }
        let hold = db.members.hold.get_or_insert(Hold {
            since,
            claimed: false,
        });
        if hold.claimed || !db.pending.is_empty() {
            return;
        }
        let claimant = new_claimant();
        if db.machine.start_change(claimant) || db.machine.start_again(claimant) {
            hold.claimed = true;
            db.members.note_claimed_again(since);
            db.claimant = claimant;
            db.donor_end = DonorEnd::NONE;
            self.drive_primary(database);
        }
    }

    /// A claim that takes long: goes on without those that do not answer, and asks all nodes for
    /// newer members.
    fn tick_claiming(&mut self, database: DatabaseId, now: Instant) {
        let Some(db) = self.primaries.get_mut(&database) else {
            return;
        };
        if db.machine.state() != PrimaryState::Claiming {
            db.members.claiming_since = None;
            return;
        }
        let since = *db.members.claiming_since.get_or_insert(now);
        if now.duration_since(since) >= CLAIM_PATIENCE {
            db.machine.stop_waiting();
        }
        let last_search = db.members.searched_at.unwrap_or(since).max(since);
        if now.duration_since(last_search) < SEARCH_INTERVAL {
            return;
        }
        db.members.searched_at = Some(now);
        let question = PrimaryMessage::Find {
            request: SEARCH_REQUEST,
            name: db.name.clone(),
        };
        self.connect_all();
        for peer in self.peers.values() {
            if let Some(link) = &peer.link {
                link.outbox.answer(&question);
            }
        }
    }

    /// Connects to the nodes of a membership, where this node's configuration or the membership
    /// itself says that they are.
    pub fn connect_members(&mut self, membership: &Membership) {
        for member in membership.all_members() {
            let peer = self.peers.entry(member.node.clone());
            peer.or_insert_with(|| super::peers::Peer::new(member.address.clone()))
                .ensure_connecting(&member.node, &self.endpoint, &self.events);
        }
    }

    /// Connects to every node of the cluster: any may know a log's members.
    pub fn connect_all(&mut self) {
        for (node, peer) in &mut self.peers {
            if *node != self.config.node || self.config.replicas.contains(node) {
                peer.ensure_connecting(node, &self.endpoint, &self.events);
            }
        }
    }

    /// A node says which members it knows of logs that are ours.
    pub fn learn_members(&mut self, logs: &[FoundLog]) {
        for log in logs {
            if let Some(membership) = &log.membership
                && let Some(db) = self.primaries.get_mut(&log.database)
            {
                db.machine.handle_membership(membership);
                self.drive_primary(log.database);
            }
        }
    }

    /// The nodes to talk to have changed: connects to them, and gives each a feed.
    pub fn update_nodes(&mut self, database: DatabaseId) {
        let Some(db) = self.primaries.get_mut(&database) else {
            return;
        };
        let nodes: Vec<(NodeName, bool)> = db
            .machine
            .progress()
            .map(|(node, progress)| (node.clone(), progress.connected))
            .collect();
        db.feeds
            .retain(|node, _| nodes.iter().any(|(name, _)| name == node));
        for (node, connected) in nodes {
            db.feeds.entry(node.clone()).or_insert_with(Feed::stopped);
            let told = db.machine.address_of(&node).unwrap_or_default();
            let peer = self
                .peers
                .entry(node.clone())
                .or_insert_with(|| super::peers::Peer::new(told));
            peer.ensure_connecting(&node, &self.endpoint, &self.events);
            if peer.link.is_some() && !connected {
                db.machine.handle_connected(&node);
            }
        }
    }

    /// Begins a replacement, or tells how far it is: the same request again asks the same.
    ///
    /// # Errors
    /// What the person who asked can do.
    pub fn replace(
        &mut self,
        name: &str,
        old: &NodeName,
        new: &NodeName,
    ) -> Result<ReplaceState, (FailureKind, String)> {
        let other = |message: String| Err((FailureKind::Other, message));
        let Some(database) = self.names.get(name).copied() else {
            return self.refuse_replace(name);
        };
        let Some(address) = self.address_of(new) else {
            return other(format!(
                "node {new} is not known: add it under `nodes` in {}",
                self.config.file.display()
            ));
        };
        let Some(db) = self.primaries.get_mut(&database) else {
            return self.refuse_replace(name);
        };
        if let PrimaryState::Fenced { by } = db.machine.state() {
            let message = format!("another sidecar is the primary of {name} (epoch {by})");
            return Err((FailureKind::NotPrimary, message));
        }
        if db.members.is_changing() {
            return Ok(db.replace_state(new));
        }
        if db.is_replaced(old, new) {
            return Ok(ReplaceState::Done {
                generation: db.generation(),
            });
        }
        let wanted = Replacement {
            old: old.clone(),
            new: new.clone(),
            address,
        };
        match db.machine.start_replacement(wanted) {
            Ok(()) => {
                let state = db.replace_state(new);
                self.drive_primary(database);
                Ok(state)
            }
            Err(refused @ ReplaceRefused::NotLeading) => {
                Err((FailureKind::NoQuorum, format!("{name}: {refused}")))
            }
            Err(refused) => other(format!("{name}: {refused}")),
        }
    }

    fn refuse_replace(&self, name: &str) -> Result<ReplaceState, (FailureKind, String)> {
        if self.replicas.values().any(|replica| replica.name == name) {
            let message = format!(
                "{} is not the primary of {name}: ask the sidecar of the host that uses it",
                self.name()
            );
            return Err((FailureKind::NotPrimary, message));
        }
        let message = format!("no database {name} at sidecar {}", self.name());
        Err((FailureKind::UnknownDatabase, message))
    }

    /// Where a node is. One that is not known may have been added to the configuration since the
    /// start.
    fn address_of(&mut self, node: &NodeName) -> Option<String> {
        if let Some(peer) = self.peers.get(node) {
            return Some(peer.address.clone());
        }
        let fresh = crate::config::SidecarConfig::load(&self.config.file);
        let nodes = match fresh {
            Ok(config) => config.nodes,
            Err(error) => {
                tracing::error!(%error, "the configuration cannot be read again");
                return None;
            }
        };
        for (name, address) in nodes {
            self.peers
                .entry(name)
                .or_insert_with(|| super::peers::Peer::new(address));
        }
        self.peers.get(node).map(|peer| peer.address.clone())
    }
}

impl PrimaryDatabase {
    /// Nodes that come back as another replica than the recorded one get their place by a change:
    /// at once where none is recorded, after a while where one is.
    fn note_strangers(&mut self, now: Instant) {
        let found: Vec<(Member, ReplicaId)> = self
            .machine
            .unrecorded()
            .filter_map(|member| {
                let progress = self.machine.node_progress(&member.node)?;
                Some((member.clone(), progress.replica?))
            })
            .collect();
        self.members
            .strangers
            .retain(|node, _| found.iter().any(|(member, _)| member.node == *node));
        if self.machine.replacement_under_way().is_some() {
            return;
        }
        for (member, replica) in found {
            let node = member.node;
            let seen = self.members.strangers.entry(node.clone());
            let seen = seen.or_insert((replica, now));
            if seen.0 != replica {
                *seen = (replica, now);
            }
            if member.replica.is_some() && now.duration_since(seen.1) < LOST_AFTER {
                continue;
            }
            tracing::warn!(name = %self.name, %node, %replica, recorded = ?member.replica,
                "bringing in the node's new replica");
            let wanted = Replacement {
                old: node.clone(),
                new: node,
                address: member.address,
            };
            if let Err(refused) = self.machine.start_replacement(wanted) {
                tracing::warn!(name = %self.name, %refused, "not brought in");
            }
            return; // one at a time
        }
    }

    fn is_replaced(&self, old: &NodeName, new: &NodeName) -> bool {
        let membership = self.machine.membership();
        if membership.next.is_some() || self.machine.replacement_under_way().is_some() {
            return false;
        }
        let is_member = |node: &NodeName| membership.nodes().contains(node);
        let stranger = self.machine.unrecorded().any(|member| member.node == *new);
        is_member(new) && !stranger && (old == new || !is_member(old))
    }

    fn replace_state(&self, new: &NodeName) -> ReplaceState {
        let lag_entries = self
            .machine
            .last()
            .lsn
            .get()
            .saturating_sub(self.flush_lsn(new).get());
        if self.machine.membership().next.is_some() || self.members.is_changing() {
            ReplaceState::Joint { lag_entries }
        } else {
            ReplaceState::CatchingUp { lag_entries }
        }
    }

    /// What a person should know of the members: one line each.
    pub fn member_warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        for member in self.machine.unrecorded() {
            let node = &member.node;
            if member.replica.is_some() {
                warnings.push(format!(
                    "{node} lost its journal and has no vote: it is brought in anew when it has \
                     the log; at once with `durovfs replace {} {node} {node}`",
                    self.name
                ));
            }
        }
        for (node, progress) in self.machine.progress() {
            if progress.forgot {
                warnings.push(format!(
                    "{node} lost entries that it had on disk (an older copy of its disk?): stop \
                     it, remove its data directory, and start it again"
                ));
            }
        }
        warnings
    }

    /// The change under way, in words.
    pub fn change_text(&self) -> Option<String> {
        let Replacement { old, new, .. } = self.machine.replacement_under_way()?;
        let stage = if self.machine.membership().next.is_some() {
            "both vote until it is level"
        } else {
            "catching up, without a vote"
        };
        Some(if old == new {
            format!("{new} is brought in anew: {stage}")
        } else {
            format!("{old} is replaced by {new}: {stage}")
        })
    }
}
