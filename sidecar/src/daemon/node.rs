//! The actor: owns all state, takes events, and drives the state machines. One thread, no locks.

use super::bulk::JournalEvents;
use super::copies::Copies;
use super::crowding::HeldAnswers;
use super::event::{Event, EventSender, JournalEvent, SessionId};
use super::opening::Finding;
use super::outbox::Outbox;
use super::peers::Peer;
use super::primary::PrimaryDatabase;
use super::replica::{Inbound, ReplicaDatabase};
use crate::config::SidecarConfig;
use durovfs_archive::store::Store;
use durovfs_journal::{DatabaseState, Journal};
use durovfs_link::Endpoint;
use durovfs_wire::{ClaimantId, DatabaseId, Lsn, Member, Membership, NodeName};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a stopping node waits for commits in flight and for its last uploads.
const STOP_LIMIT: Duration = Duration::from_secs(20);

/// What a node is made of.
pub struct NodeParts {
    pub config: Rc<SidecarConfig>,
    pub endpoint: Rc<Endpoint>,
    pub events: EventSender,
    pub journal_events: JournalEvents,
    pub primary_journal: Journal,
    pub replica_journal: Journal,
    pub store: Option<Arc<dyn Store>>,
    pub copies: Option<Copies>,
}

/// One sidecar.
pub struct Node {
    pub config: Rc<SidecarConfig>,
    pub endpoint: Rc<Endpoint>,
    pub events: EventSender,
    pub journal_events: JournalEvents,
    /// The logs that this node is primary of; not synced, no vote.
    pub primary_journal: Journal,
    /// The logs that this node keeps for others; synced before every ack.
    pub replica_journal: Journal,
    pub store: Option<Arc<dyn Store>>,
    /// Warm copies of the logs that this node keeps for others.
    pub copies: Option<Copies>,
    pub primaries: BTreeMap<DatabaseId, PrimaryDatabase>,
    /// Names of `primaries`.
    pub names: BTreeMap<String, DatabaseId>,
    pub findings: BTreeMap<String, Finding>,
    pub replicas: BTreeMap<DatabaseId, ReplicaDatabase>,
    pub peers: BTreeMap<NodeName, Peer>,
    pub inbound: BTreeMap<NodeName, Inbound>,
    pub next_feed: u64,
    pub next_request: u64,
    /// Databases whose replicas have not been told the newest commit_lsn.
    pub commits_untold: BTreeSet<DatabaseId>,
    /// Databases with committed entries that are not in the archive.
    pub uploads_due: BTreeSet<DatabaseId>,
    /// How full our own journal is.
    pub own_percent: u8,
    /// Answers that are held back because the journals fill up.
    pub held_answers: HeldAnswers,
    /// When replicas whose primary is silent were last looked for.
    pub orphans_looked: Option<Instant>,
    pub membership: Membership,
    stopping_since: Option<Instant>,
}

impl Node {
    /// A node without databases.
    ///
    /// # Errors
    /// When the configured replicas are not a legal membership.
    pub fn new(parts: NodeParts) -> anyhow::Result<Self> {
        let config = parts.config;
        let members = config.replicas.iter().map(|node| {
            let address = config.nodes.get(node).cloned().unwrap_or_default();
            Member::configured(node.clone(), address)
        });
        let membership = Membership::configured(members.collect(), config.ack_quorum)?;
        let peers = config
            .nodes
            .iter()
            .map(|(name, address)| (name.clone(), Peer::new(address.clone())))
            .collect();
        Ok(Self {
            config,
            endpoint: parts.endpoint,
            events: parts.events,
            journal_events: parts.journal_events,
            primary_journal: parts.primary_journal,
            replica_journal: parts.replica_journal,
            store: parts.store,
            copies: parts.copies,
            primaries: BTreeMap::new(),
            names: BTreeMap::new(),
            findings: BTreeMap::new(),
            replicas: BTreeMap::new(),
            peers,
            inbound: BTreeMap::new(),
            next_feed: 0,
            next_request: 0,
            commits_untold: BTreeSet::new(),
            uploads_due: BTreeSet::new(),
            own_percent: 0,
            held_answers: HeldAnswers::default(),
            orphans_looked: None,
            membership,
            stopping_since: None,
        })
    }

    /// Takes up the databases that the journals hold.
    pub fn resume(&mut self, primaries: Vec<DatabaseState>, replicas: Vec<DatabaseState>) {
        for state in replicas {
            // The last drops before a crash may not have been noted.
            self.replica_journal
                .drop_through(state.database, state.archive_lsn.min(state.commit_lsn));
            self.resume_replica(&state);
        }
        for state in primaries {
            let db = PrimaryDatabase::new(
                state.database,
                state.name.clone(),
                self.membership(),
                Some(&state),
            );
            self.names.insert(state.name.clone(), state.database);
            self.primaries.insert(state.database, db);
            self.start_primary(state.database);
            self.uploads_due.insert(state.database);
        }
    }

    /// This node's name.
    pub fn name(&self) -> &NodeName {
        &self.config.node
    }

    /// The five of a database of which nothing else is known.
    pub fn membership(&self) -> Membership {
        self.membership.clone()
    }

    /// Begins to claim a database.
    pub fn start_primary(&mut self, database: DatabaseId) {
        self.connect_replicas();
        let Some(db) = self.primaries.get_mut(&database) else {
            return;
        };
        db.begin_claim();
        self.update_nodes(database);
        self.drive_primary(database);
    }

    /// Connects to every node that keeps replicas.
    pub fn connect_replicas(&mut self) {
        for node in &self.config.replicas {
            if let Some(peer) = self.peers.get_mut(node) {
                peer.ensure_connecting(node, &self.endpoint, &self.events);
            }
        }
    }

    /// Something happened.
    pub fn handle_event(&mut self, event: Event) {
        match event {
            Event::PeerConnected {
                node,
                session,
                connection,
                outbox,
            } => {
                if let Some(peer) = self.peers.get_mut(&node) {
                    tracing::info!(%node, "connected to a replica's node");
                    peer.connected(session, connection, outbox);
                    self.handle_peer_connected(&node);
                }
            }
            Event::PeerLost {
                node,
                session,
                error,
            } => {
                self.handle_peer_lost(&node, session, error);
            }
            Event::FromReplica {
                node,
                session,
                message,
            } => {
                self.handle_from_replica(&node, session, message);
            }
            Event::FromPrimary {
                node,
                session,
                shared,
                outbox,
                message,
                payload,
                permit,
            } => {
                if self.note_heard(&node, session, shared) {
                    self.handle_from_primary(&node, &outbox, message, payload, permit);
                }
            }
            Event::PrimaryLost { node, session } => self.primary_lost(&node, session),
            Event::FromClient {
                session,
                grant,
                outbox,
                message,
                payload,
                permit,
            } => {
                self.handle_from_client(session, &grant, &outbox, message, (payload, permit));
            }
            Event::ClientLost { session } => self.client_lost(session),
            ended => self.handle_task_event(ended),
        }
    }

    /// A task of ours has ended, or tells that it moves.
    fn handle_task_event(&mut self, event: Event) {
        match event {
            Event::Fetched {
                database,
                epoch,
                donor,
                result,
            } => {
                self.handle_fetched(database, epoch, &donor, result);
                self.drive_primary(database);
            }
            Event::EndFound { question, result } => {
                let database = question.database();
                self.handle_end_found(question, result);
                self.drive_primary(database);
            }
            Event::BulkSent {
                database,
                node,
                feed,
                result,
            } => {
                self.handle_bulk_sent(database, &node, feed, result);
            }
            Event::BulkProgress {
                database,
                feed,
                node,
                lsn,
            } => {
                self.handle_bulk_progress(database, &node, feed, lsn);
            }
            Event::Uploaded { database, result } => self.handle_uploaded(database, result),
            Event::OrphanUploaded { database, result } => {
                self.handle_orphan_uploaded(database, result);
            }
            Event::SnapshotMade { database, result } => {
                self.handle_snapshot_made(database, result);
            }
            // Everything else has been taken by the caller.
            _ => {}
        }
    }

    /// Notes who is to be answered. False for what was on its way on an older connection than the
    /// node's newest: that is lost, as the connection is.
    fn note_heard(&mut self, node: &NodeName, session: SessionId, shared: Outbox) -> bool {
        let known = self.inbound.get(node);
        if known.is_some_and(|inbound| inbound.session > session) {
            return false;
        }
        let heard = Instant::now();
        let inbound = Inbound {
            session,
            shared,
            heard,
        };
        self.inbound.insert(node.clone(), inbound);
        true
    }

    fn primary_lost(&mut self, node: &NodeName, session: SessionId) {
        if self
            .inbound
            .get(node)
            .is_some_and(|inbound| inbound.session == session)
        {
            self.inbound.remove(node);
        }
    }

    /// A journal's writer thread has done something.
    pub fn handle_journal_event(&mut self, event: JournalEvent) {
        match event {
            JournalEvent::OwnWritten {
                database,
                position,
                complete,
                result,
            } => {
                self.handle_own_written(database, position, complete, result);
            }
            JournalEvent::Replica(notice) => self.handle_replica_notice(notice),
        }
    }

    /// A large entry moves: whoever waits for it waits on. What a replica lacks of older entries
    /// is nothing that anybody waits for.
    fn handle_bulk_progress(&mut self, database: DatabaseId, node: &NodeName, feed: u64, lsn: Lsn) {
        use super::feed::FeedState;
        let Some(db) = self.primaries.get_mut(&database) else {
            return;
        };
        if db
            .feeds
            .get(node)
            .is_none_or(|known| known.state != (FeedState::Bulk { feed }))
        {
            return;
        }
        let oldest = db.pending.front();
        if oldest.is_none_or(|oldest| lsn < oldest.summary.position.lsn) {
            return;
        }
        for pending in &mut db.pending {
            pending.moved_at = Instant::now();
            for waiter in &pending.waiters {
                waiter
                    .outbox
                    .answer(&durovfs_wire::client::SidecarMessage::Progress {
                        database,
                        sequence: waiter.sequence,
                    });
            }
        }
    }

    /// Time has passed.
    pub fn handle_tick(&mut self) {
        let now = Instant::now();
        self.own_percent = self.primary_journal.percent_taken();
        let held = if self.is_stopping() { None } else { Some(now) };
        self.held_answers.release(held);
        self.tick_damage();
        for peer in self.peers.values_mut() {
            peer.tick(now);
        }
        let databases: Vec<DatabaseId> = self.primaries.keys().copied().collect();
        for database in databases {
            self.tick_pending(database, now);
            self.tick_claims(database, now);
            self.tick_feeds(database, now);
            self.tick_members(database, now);
            self.drive_primary(database);
        }
        self.tick_findings(now);
        self.tick_waiters(now);
        self.tell_progress();
        self.tick_uploads(now);
        self.tick_orphans(now);
        self.tick_copies();
    }

    /// Begins to stop: no new commits, what is in flight ends, open chunks are uploaded.
    pub fn begin_stop(&mut self) {
        tracing::info!("stopping: finishing commits in flight and uploading open chunks");
        self.stopping_since = Some(Instant::now());
    }

    /// Whether the node is about to stop.
    pub fn is_stopping(&self) -> bool {
        self.stopping_since.is_some()
    }

    /// Whether there is nothing left to wait for, or no time.
    pub fn is_stopped(&self) -> bool {
        let Some(since) = self.stopping_since else {
            return false;
        };
        let busy = !self.held_answers.is_empty()
            || self.primaries.values().any(|db| {
                db.pending.iter().any(|pending| !pending.waiters.is_empty())
                    || (self.store.is_some() && db.has_unarchived())
            });
        !busy || since.elapsed() > STOP_LIMIT
    }

    /// Flushes the journals; says what could not be finished.
    pub fn finish(self) -> Vec<String> {
        let unfinished = self
            .primaries
            .values()
            .filter(|db| self.store.is_some() && db.has_unarchived())
            .map(|db| format!("{} has commits that are not in the archive yet", db.name))
            .collect();
        self.primary_journal.close();
        self.replica_journal.close();
        unfinished
    }
}

/// 16 random bytes.
///
/// The system's generator does not fail after boot; if it does, ids must not be guessed.
pub fn random_id() -> [u8; 16] {
    let mut bytes = [0u8; 16];
    if let Err(error) = getrandom::fill(&mut bytes) {
        tracing::error!(%error, "the system gives no random bytes");
        std::process::abort();
    }
    bytes
}

/// A new attempt to win an epoch.
pub fn new_claimant() -> ClaimantId {
    ClaimantId::from_bytes(random_id())
}
