//! The primary of one log: claims an epoch, recovers the log's end, counts acks, buries.
//!
//! This file holds the events and the state; `primary/recovery.rs` the choice of the log,
//! `primary/feed.rs` what each replica is sent and what its answers mean, `primary/change.rs` who
//! the replicas are. No I/O: the driver carries the effects out in the order in which they are
//! polled. `docs/protocol.md` tells the exchanges.

mod change;
mod feed;
mod recovery;
#[cfg(test)]
mod tests;

use crate::history::History;
use durovfs_wire::peer::{Claim, PrimaryMessage, Promise};
use durovfs_wire::{
    ClaimantId, DatabaseId, Epoch, EpochRun, LogPosition, Lsn, Membership, NodeName, ReplicaId,
};
use std::collections::{BTreeMap, VecDeque};

pub use change::{ReplaceRefused, Replacement};

/// What a node's own journal holds of the log when its primary starts. It is no vote: what the
/// replicas say overrides it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Hash)]
pub struct LocalLog {
    /// Last complete entry.
    pub last: LogPosition,
    /// First entry still held; `last.lsn + 1` when none is (zero counts as one).
    pub first_lsn: Lsn,
    /// Known committed.
    pub commit_lsn: Lsn,
    /// Known archived.
    pub archive_lsn: Lsn,
    /// Runs, from the one that holds `archive_lsn` on, at least.
    pub history: Vec<EpochRun>,
    /// Highest epoch that this node saw for the log, as primary or as replica.
    pub promised: Epoch,
}

/// Where a primary stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PrimaryState {
    /// No claim was made yet.
    Idle,
    /// Asked for promises.
    Claiming,
    /// Has a quorum of promises, and the driver fetches what the own journal lacks.
    Recovering,
    /// The epoch start is given to the driver or to the replicas, but is not committed yet.
    Starting,
    /// The log's end is known; entries are taken.
    Leading,
    /// The epoch is lost. Only [`Primary::start_claim`] goes on from here.
    Fenced {
        /// The highest epoch that stands in the way.
        by: Epoch,
    },
}

/// What the driver is to do, in this order.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum PrimaryEffect {
    /// Send a message (a claim).
    Send {
        /// To this replica.
        node: NodeName,
        /// The message.
        message: PrimaryMessage,
    },
    /// Cut the own journal after this position. Often there is nothing to cut: carry it out all the
    /// same, since an append that this primary gave up may still be on its way into the journal.
    CutOwnLog {
        /// The last entry that stays.
        after: LogPosition,
    },
    /// Begin the own journal's log anew after this position, which it does not hold: all entries up
    /// to it are archived.
    RestartOwnLog {
        /// The position before the next entry.
        at: LogPosition,
    },
    /// Fetch entries into the own journal, then call [`Primary::handle_recovered`] or
    /// [`Primary::handle_fetch_failed`].
    Fetch {
        /// From this replica.
        donor: NodeName,
        /// From this entry on.
        first_lsn: Lsn,
        /// Up to this one.
        last: LogPosition,
    },
    /// The nodes to talk to have changed, to those of [`Primary::progress`]: connect to them, and
    /// call [`Primary::handle_connected`] for each new one that is connected.
    NodesChanged,
    /// Write the membership that was decided on to the own journal.
    NoteMembership {
        /// Its epoch is the one claimed.
        membership: Membership,
    },
    /// Append the epoch start to the own journal, then call [`Primary::handle_appended`].
    AppendEpochStart {
        /// Its position.
        position: LogPosition,
    },
    /// From now on send this replica all entries from `next_lsn` on, and everything appended later,
    /// in the current epoch. Replaces an earlier feed of the node.
    Feed {
        /// To this replica.
        node: NodeName,
        /// First entry to send; one after the log's end when the replica is level.
        next_lsn: Lsn,
        /// The entry before it.
        previous: LogPosition,
    },
    /// Send this replica no more entries.
    StopFeed {
        /// This one.
        node: NodeName,
    },
    /// The epoch start is committed: the log's end is known, and entries are taken.
    Opened {
        /// The epoch now held.
        epoch: Epoch,
        /// Position of the epoch start, the last entry of the log.
        end: LogPosition,
    },
    /// `commit_lsn` rose.
    Committed {
        /// To here.
        lsn: Lsn,
    },
    /// The entries of the older epoch from this lsn on are certain never to be committed.
    Buried {
        /// The first of them.
        lsn: Lsn,
    },
    /// A burial did not come about. If a claim goes on, the log says the outcome once it is opened.
    BuryRefused,
    /// The epoch is lost.
    Fenced {
        /// To this one, or to its claimant.
        by: Epoch,
    },
}

/// What is known of one replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct NodeProgress {
    /// It is connected.
    pub connected: bool,
    /// It promised the current epoch on this connection.
    pub promised: bool,
    /// Its replica is the one that the membership names, so that its acks count.
    pub counted: bool,
    /// Which replica it said it is.
    pub replica: Option<ReplicaId>,
    /// It lost entries that it had acked, so that its disk is not to be trusted.
    pub forgot: bool,
    /// It refused the current epoch, having promised this one.
    pub refused: Option<Epoch>,
    /// Its disk took no entry: it is left alone until [`Primary::restart_feed`] or a new
    /// connection.
    pub troubled: bool,
    /// It is sent entries.
    pub feeding: bool,
    /// It holds the log up to here on disk, as far as it acked in the current epoch.
    pub flush_lsn: Lsn,
}

/// The primary of one log, or a node that wants to be.
///
/// Call a `handle_*` or `start_*`, then [`Primary::poll_effect`] until it gives nothing. What this
/// struct keeps is bounded by the membership and by the history's length; the queue of effects is
/// bounded by the events between two polls.
///
/// Messages of a connection come in order, and none after [`Primary::handle_disconnected`].
#[derive(Debug, Clone, Hash)]
pub struct Primary {
    database: DatabaseId,
    name: String,
    membership: Membership,
    stage: Stage,
    epoch: Epoch,
    claimant: Option<ClaimantId>,
    highest_epoch_seen: Epoch,
    last: LogPosition,
    history: History,
    commit_lsn: Lsn,
    archive_lsn_heard: Lsn,
    /// First entry that the own journal is sure to hold, where the driver tells it.
    retained_lsn: Option<Lsn>,
    bury: Option<Bury>,
    /// Claims count although another node is a live primary.
    forced: bool,
    /// A replacement that was asked for and of which the last step was not made.
    replacement: Option<Replacement>,
    /// The membership that the claim under way is for, if it is for one.
    proposal: Option<Proposal>,
    /// This node has made up the log's id, and claims it for the first time.
    is_new: bool,
    /// The first claim of a new log waits for all that are connected.
    waits: bool,
    nodes: BTreeMap<NodeName, Node>,
    effects: VecDeque<PrimaryEffect>,
}

#[derive(Debug, Clone, Hash)]
enum Stage {
    Idle,
    Claiming,
    Recovering {
        donor: NodeName,
        promise: Box<Promise>,
    },
    Starting {
        start: LogPosition,
        appended: bool,
    },
    Leading {
        start: LogPosition,
    },
    Fenced {
        by: Epoch,
    },
}

/// A burial under way, from its claim to the commit of its epoch start.
#[derive(Debug, Clone, Copy, Hash)]
struct Bury {
    /// The epoch that this primary led when it gave the entries up.
    own_epoch: Epoch,
    /// The first entry given up.
    first_lsn: Lsn,
}

/// A step of a change: the membership that the next epoch is to have.
#[derive(Debug, Clone, Hash)]
struct Proposal {
    /// The epoch that was led when it was proposed.
    base: Epoch,
    membership: Membership,
    /// The choice of the log waits for a quorum of each of its sets.
    waits: bool,
}

#[derive(Debug, Clone, Default, Hash)]
struct Node {
    connected: bool,
    standing: Standing,
    feeding: bool,
    /// Which replica it said it is, on this connection or an earlier one.
    replica: Option<ReplicaId>,
    forgot: bool,
    /// What the replica said it had, until a feed was started from it.
    promise: Option<Promise>,
    /// Its log could not be fetched: it is not counted for the choice of the log.
    excluded: bool,
    flush_lsn: Lsn,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
enum Standing {
    #[default]
    Asked,
    Promised,
    Refused(Epoch),
    Troubled,
}

impl Primary {
    /// A primary that has claimed nothing yet.
    ///
    /// # Panics
    /// When the local log contradicts itself: the journal that it comes from is not to be trusted.
    pub fn new(
        database: DatabaseId,
        name: String,
        membership: Membership,
        local: LocalLog,
    ) -> Self {
        let history = match History::from_runs(&local.history) {
            Ok(history) => history,
            Err(error) => panic!("local log database={database}: {error}"),
        };
        assert_eq!(
            history.position_at(local.last.lsn),
            Some(local.last),
            "local log ends at {} but its history says otherwise: {:?}",
            local.last,
            history.runs()
        );
        // Entries leave a journal only when they are archived, so all before the first is.
        let gone_lsn = local.first_lsn.previous().unwrap_or(Lsn::ZERO);
        assert!(
            gone_lsn <= local.last.lsn,
            "local log begins at lsn={} but ends at {}",
            local.first_lsn,
            local.last
        );
        let commit_lsn = local.commit_lsn.min(local.last.lsn).max(gone_lsn);
        let highest_epoch_seen = local.promised.max(local.last.epoch).max(membership.epoch);
        let nodes = membership
            .nodes()
            .into_iter()
            .map(|node| (node.clone(), Node::default()))
            .collect();
        Self {
            database,
            name,
            membership,
            stage: Stage::Idle,
            epoch: Epoch::ZERO,
            claimant: None,
            highest_epoch_seen,
            last: local.last,
            history,
            commit_lsn,
            archive_lsn_heard: local.archive_lsn.max(gone_lsn),
            retained_lsn: None,
            bury: None,
            forced: false,
            replacement: None,
            proposal: None,
            is_new: false,
            waits: true,
            nodes,
            effects: VecDeque::new(),
        }
    }

    /// Claims an epoch above all seen. Also the way to go on after a refusal or a timeout, each
    /// time with a new claimant. A burial under way becomes ordinary recovery
    /// ([`PrimaryEffect::BuryRefused`]).
    pub fn start_claim(&mut self, claimant: ClaimantId) {
        self.refuse_bury();
        self.proposal = None;
        // Another than the first: somebody may have decided something in between.
        self.is_new &= matches!(self.stage, Stage::Idle);
        self.begin_claim(claimant);
    }

    /// Whether claims from now on count although another node is a live primary. Liveness only: the
    /// promises that win an epoch are the same.
    pub fn force_claims(&mut self, forced: bool) {
        self.forced = forced;
    }

    /// Gives up the uncommitted tail: claims a higher epoch and puts its start in place of the
    /// first uncommitted entry. Ends with [`PrimaryEffect::Buried`] or
    /// [`PrimaryEffect::BuryRefused`].
    ///
    /// With a burial under way its claim is sent again to the replicas that have not answered, and
    /// `claimant` is not used: a second epoch would hide what the replicas had promised before the
    /// first. When nothing is uncommitted, nothing is done. A primary that leads no epoch refuses
    /// at once, and nothing else changes.
    pub fn start_bury(&mut self, claimant: ClaimantId) {
        if self.bury.is_some() {
            self.ask_again();
            return;
        }
        let Stage::Leading { start } = self.stage else {
            self.effects.push_back(PrimaryEffect::BuryRefused);
            return;
        };
        if self.last.lsn == self.commit_lsn {
            return;
        }
        assert!(
            self.commit_lsn >= start.lsn,
            "leads epoch={} with commit_lsn={} below its start at lsn={}",
            self.epoch,
            self.commit_lsn,
            start.lsn
        );
        let first_lsn = self.commit_lsn.next();
        self.bury = Some(Bury {
            own_epoch: self.epoch,
            first_lsn,
        });
        self.begin_claim(claimant);
    }

    /// The lsn that the next entry takes; none while entries are not taken.
    pub fn next_lsn(&self) -> Option<Lsn> {
        matches!(self.stage, Stage::Leading { .. }).then(|| self.last.lsn.next())
    }

    /// The own journal holds the complete entry, and it may be sent from now on. An entry of an
    /// epoch that was given up in between is ignored: the own journal is cut before the next epoch
    /// start.
    ///
    /// # Panics
    /// When it is not the entry after the last one.
    pub fn handle_appended(&mut self, position: LogPosition) {
        if position.epoch != self.epoch {
            return;
        }
        match self.stage {
            Stage::Starting {
                start,
                appended: false,
            } => {
                assert_eq!(
                    position, start,
                    "appended {position}, expected the start {start}"
                );
                self.note_own_entry(position);
                self.stage = Stage::Starting {
                    start,
                    appended: true,
                };
                let nodes: Vec<NodeName> = self.nodes.keys().cloned().collect();
                for node in nodes {
                    self.start_feed(&node);
                }
                // The epoch is won: those that took another node for the primary are told so.
                self.ask_refused();
            }
            Stage::Leading { .. } => self.note_own_entry(position),
            Stage::Fenced { .. } => {}
            Stage::Idle | Stage::Claiming | Stage::Recovering { .. } | Stage::Starting { .. } => {
                panic!(
                    "appended {position} while {:?}, last is {}",
                    self.state(),
                    self.last
                )
            }
        }
    }

    fn note_own_entry(&mut self, position: LogPosition) {
        assert_eq!(
            position.lsn,
            self.last.lsn.next(),
            "appended {position} after {}",
            self.last
        );
        self.history.note_entry(position);
        self.last = position;
    }

    /// Everything up to here is confirmed in the object store.
    ///
    /// # Panics
    /// When it is above `commit_lsn`: something uncommitted was archived.
    pub fn handle_archived(&mut self, lsn: Lsn) {
        assert!(
            lsn <= self.commit_lsn,
            "archived lsn={lsn} above commit_lsn={} in epoch={}",
            self.commit_lsn,
            self.epoch
        );
        self.archive_lsn_heard = self.archive_lsn_heard.max(lsn);
        self.history.forget_below(self.feed_floor());
    }

    /// The own journal holds all entries from here on, archived or not, and replicas that lag may
    /// be fed from here. Call it again before the journal drops more. Without it replicas that lag
    /// behind the archive go on from the archived position.
    pub fn handle_retained(&mut self, first_lsn: Lsn) {
        self.retained_lsn = Some(first_lsn);
        self.history.forget_below(self.feed_floor());
    }

    /// Entries at or below are not fed: all of them are archived.
    fn feed_floor(&self) -> Lsn {
        let archive_lsn = self.archive_lsn();
        let retained = self.retained_lsn.and_then(Lsn::previous);
        let gone_lsn = retained.unwrap_or(archive_lsn).min(archive_lsn);
        // A journal may remember the entries' epochs less far back than it holds them, though as
        // far as they are not archived.
        match self.history.runs().first() {
            Some(oldest) if gone_lsn > Lsn::ZERO => gone_lsn.max(oldest.first_lsn),
            _ => gone_lsn,
        }
    }

    fn begin_claim(&mut self, claimant: ClaimantId) {
        self.epoch = self
            .highest_epoch_seen
            .max(self.epoch)
            .max(self.last.epoch)
            .next();
        self.highest_epoch_seen = self.epoch;
        self.claimant = Some(claimant);
        self.stage = Stage::Claiming;
        let claim = self.claim(claimant);
        for (name, node) in &mut self.nodes {
            if std::mem::take(&mut node.feeding) {
                self.effects
                    .push_back(PrimaryEffect::StopFeed { node: name.clone() });
            }
            *node = Node {
                connected: node.connected,
                replica: node.replica,
                ..Node::default()
            };
            if node.connected {
                let message = PrimaryMessage::Claim(claim.clone());
                self.effects.push_back(PrimaryEffect::Send {
                    node: name.clone(),
                    message,
                });
            }
        }
    }

    fn claim(&self, claimant: ClaimantId) -> Claim {
        Claim {
            database: self.database,
            name: self.name.clone(),
            epoch: self.epoch,
            claimant,
            // A quorum has promised this epoch already: whoever was the primary before is not.
            forced: self.forced || !matches!(self.stage, Stage::Idle | Stage::Claiming),
        }
    }

    fn refuse_bury(&mut self) {
        if self.bury.take().is_some() {
            self.effects.push_back(PrimaryEffect::BuryRefused);
        }
    }

    fn fence(&mut self, by: Epoch) {
        self.refuse_bury();
        self.proposal = None;
        // Whoever leads now is asked again.
        self.cancel_replacement();
        for (name, node) in &mut self.nodes {
            if std::mem::take(&mut node.feeding) {
                self.effects
                    .push_back(PrimaryEffect::StopFeed { node: name.clone() });
            }
        }
        self.stage = Stage::Fenced { by };
        self.effects.push_back(PrimaryEffect::Fenced { by });
    }

    /// Where this primary stands.
    pub fn state(&self) -> PrimaryState {
        match self.stage {
            Stage::Idle => PrimaryState::Idle,
            Stage::Claiming => PrimaryState::Claiming,
            Stage::Recovering { .. } => PrimaryState::Recovering,
            Stage::Starting { .. } => PrimaryState::Starting,
            Stage::Leading { .. } => PrimaryState::Leading,
            Stage::Fenced { by } => PrimaryState::Fenced { by },
        }
    }

    /// The log.
    pub fn database(&self) -> DatabaseId {
        self.database
    }

    /// The membership that every message names.
    pub fn membership(&self) -> &Membership {
        &self.membership
    }

    /// The epoch claimed or held.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// The last entry of the own log.
    pub fn last(&self) -> LogPosition {
        self.last
    }

    /// Known committed.
    pub fn commit_lsn(&self) -> Lsn {
        self.commit_lsn
    }

    /// Known archived, as far as it is known to be committed.
    pub fn archive_lsn(&self) -> Lsn {
        self.archive_lsn_heard.min(self.commit_lsn)
    }

    /// The epochs of the own log.
    pub fn history(&self) -> &History {
        &self.history
    }

    /// Whether a burial is under way.
    pub fn is_burying(&self) -> bool {
        self.bury.is_some()
    }

    /// What is known of each replica, by name.
    pub fn progress(&self) -> impl Iterator<Item = (&NodeName, NodeProgress)> {
        self.nodes
            .iter()
            .map(|(name, node)| (name, self.progress_of(name, node)))
    }

    /// What is known of one replica; none when its node is not talked to.
    pub fn node_progress(&self, node: &NodeName) -> Option<NodeProgress> {
        self.nodes
            .get(node)
            .map(|state| self.progress_of(node, state))
    }

    fn progress_of(&self, name: &NodeName, node: &Node) -> NodeProgress {
        NodeProgress {
            counted: node
                .replica
                .is_some_and(|replica| self.membership.has(name, replica)),
            ..node.progress()
        }
    }

    /// The next thing to do. Poll until there is none.
    pub fn poll_effect(&mut self) -> Option<PrimaryEffect> {
        self.effects.pop_front()
    }
}

impl Node {
    fn progress(&self) -> NodeProgress {
        NodeProgress {
            connected: self.connected,
            promised: self.standing == Standing::Promised,
            counted: false,
            replica: self.replica,
            forgot: self.forgot,
            refused: match self.standing {
                Standing::Refused(promised) => Some(promised),
                Standing::Asked | Standing::Promised | Standing::Troubled => None,
            },
            troubled: self.standing == Standing::Troubled,
            feeding: self.feeding,
            flush_lsn: self.flush_lsn,
        }
    }
}
