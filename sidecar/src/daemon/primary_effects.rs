//! Carries out what the primary's state machine wants: messages, our own journal, feeds, answers.

use super::bulk::{self, FetchJob};
use super::event::SessionId;
use super::feed::Feed;
use super::node::Node;
use super::opening::{Opening, Waiter, Want};
use super::primary::PrimaryDatabase;
use super::read_log::ArchivedCommit;
use durovfs_journal::{DamagedEntry, Record};
use durovfs_quorum::{PrimaryEffect, PrimaryState};
use durovfs_wire::client::{CommitOutcome, FailureKind, SidecarMessage};
use durovfs_wire::peer::{PrimaryMessage, RejectReason, ReplicaMessage};
use durovfs_wire::{DatabaseId, Epoch, LogPosition, Lsn, NodeName};
use std::rc::Rc;
use std::time::{Duration, Instant};

/// What noting damage to our own journal may take before the log is claimed again. If it takes
/// longer, the same entry is found once more.
const OWN_DAMAGE_PAUSE: Duration = Duration::from_millis(200);

/// Pause before a step of a change that failed is followed by an ordinary claim.
const CHANGE_RECLAIM_PAUSE: Duration = Duration::from_millis(250);

impl Node {
    /// Runs a database's state machine until it wants nothing more.
    pub fn drive_primary(&mut self, database: DatabaseId) {
        while let Some(effect) = self
            .primaries
            .get_mut(&database)
            .and_then(|db| db.machine.poll_effect())
        {
            self.carry_out(database, effect);
        }
    }

    fn carry_out(&mut self, database: DatabaseId, effect: PrimaryEffect) {
        match effect {
            PrimaryEffect::Send { node, message } => {
                if let Some(link) = self.peers.get(&node).and_then(|peer| peer.link.as_ref()) {
                    link.outbox.answer(&message);
                }
            }
            PrimaryEffect::CutOwnLog { after } => self.cut_own_log(database, after),
            PrimaryEffect::RestartOwnLog { at } => self.restart_own_log(database, at),
            PrimaryEffect::Fetch {
                donor,
                first_lsn,
                last,
            } => {
                self.fetch(database, donor, first_lsn, last);
            }
            PrimaryEffect::NodesChanged => self.update_nodes(database),
            PrimaryEffect::NoteMembership { membership } => {
                let record = Record::Membership {
                    database,
                    membership,
                };
                self.write_own_records(database, vec![record], None, None);
            }
            PrimaryEffect::AppendEpochStart { position } => {
                let Some(db) = self.primaries.get_mut(&database) else {
                    return;
                };
                if db.own_writes == 0 {
                    self.write_epoch_start(database, position);
                } else {
                    db.epoch_start = Some(position);
                }
            }
            PrimaryEffect::Feed {
                node,
                next_lsn,
                previous,
            } => {
                if let Some(db) = self.primaries.get_mut(&database) {
                    db.feeds
                        .entry(node.clone())
                        .or_insert_with(Feed::stopped)
                        .start(next_lsn, previous);
                    self.pump_feed(database, &node);
                    // Also without an entry to send the replica learns who the primary is.
                    self.commits_untold.insert(database);
                }
            }
            PrimaryEffect::StopFeed { node } => {
                if let Some(feed) = self
                    .primaries
                    .get_mut(&database)
                    .and_then(|db| db.feeds.get_mut(&node))
                    // One that was refused is tried again after a pause, and must not be forgotten.
                    && !matches!(feed.state, super::feed::FeedState::Refusing { .. })
                {
                    feed.state = super::feed::FeedState::Stopped;
                }
            }
            PrimaryEffect::Opened { epoch, end } => self.opened(database, epoch, end),
            PrimaryEffect::Committed { lsn } => self.committed(database, lsn),
            PrimaryEffect::Buried { lsn } => self.buried(database, lsn),
            PrimaryEffect::BuryRefused => {
                tracing::warn!(%database, "another node claimed in between: the log decides");
            }
            PrimaryEffect::Fenced { by } => self.fenced(database, by),
        }
    }

    fn restart_own_log(&mut self, database: DatabaseId, at: LogPosition) {
        if let Some(db) = self.primaries.get_mut(&database) {
            db.fetch.stop();
            db.written_lsn = at.lsn;
            db.streamed = None;
            db.machine.handle_retained(at.lsn.next());
        }
        self.write_own_records(database, vec![Record::Restart { database, at }], None, None);
    }

    fn buried(&mut self, database: DatabaseId, lsn: Lsn) {
        let oldest = self
            .primaries
            .get(&database)
            .and_then(|db| db.pending.front());
        if oldest.is_some_and(|pending| pending.summary.position.lsn >= lsn) {
            self.settle_buried(database);
        }
    }

    fn cut_own_log(&mut self, database: DatabaseId, after: LogPosition) {
        if let Some(db) = self.primaries.get_mut(&database) {
            db.fetch.stop();
            db.written_lsn = db.written_lsn.min(after.lsn);
            db.streamed = None;
        }
        self.write_own_records(
            database,
            vec![Record::Truncate { database, after }],
            None,
            None,
        );
    }

    fn fetch(&mut self, database: DatabaseId, donor: NodeName, first_lsn: Lsn, last: LogPosition) {
        let Some(db) = self.primaries.get_mut(&database) else {
            return;
        };
        match self.peers.get(&donor).and_then(|peer| peer.link.as_ref()) {
            None => db.machine.handle_fetch_failed(&donor),
            Some(link) => {
                let epoch = db.machine.epoch();
                db.fetch.stop();
                db.fetch = bulk::spawn_fetch(
                    FetchJob {
                        database,
                        epoch,
                        donor,
                        first_lsn,
                        last,
                    },
                    self.primary_journal.clone(),
                    Rc::clone(&link.connection),
                    self.events.clone(),
                );
            }
        }
    }

    /// The donor's entries are in our own journal, or could not be had.
    pub fn handle_fetched(
        &mut self,
        database: DatabaseId,
        epoch: Epoch,
        donor: &NodeName,
        result: Result<LogPosition, String>,
    ) {
        let state = self.primary_journal.state(database);
        let held = state.as_ref().map(|state| state.last);
        let result = result.and_then(|wanted| bulk::check_fetched(held, wanted));
        let Some(db) = self.primaries.get_mut(&database) else {
            return;
        };
        if db.machine.epoch() != epoch {
            return; // of an earlier claim
        }
        match (result, state) {
            (Ok(()), Some(state)) => {
                db.written_lsn = state.last.lsn;
                db.machine.handle_recovered(state.last, state.history);
            }
            (Ok(()), None) => db.machine.handle_fetch_failed(donor),
            (Err(error), _) => {
                tracing::warn!(name = %db.name, %donor, %error, "recovery from a replica failed");
                db.machine.handle_fetch_failed(donor);
            }
        }
    }

    fn opened(&mut self, database: DatabaseId, epoch: Epoch, end: LogPosition) {
        let Some(db) = self.primaries.get_mut(&database) else {
            return;
        };
        if db.own_trouble.is_some() {
            return; // it is opened once more, with all that our own journal lacks now
        }
        tracing::info!(name = %db.name, %epoch, %end, "the log is open");
        db.failed_claims = 0;
        db.successor = None;
        db.forced = false;
        db.machine.force_claims(false);
        // Ordinary recovery has decided: what was pending is in the log, or never will be.
        self.settle_by_log(database);
        self.answer_waiters(database);
        self.release_held(database);
    }

    /// Answers everybody who waited for the log to be open, once our own journal has what is asked.
    pub fn answer_waiters(&mut self, database: DatabaseId) {
        let Some(db) = self.primaries.get_mut(&database) else {
            return;
        };
        if !db.is_open() {
            return;
        }
        let (commit_lsn, written_lsn) = (db.machine.commit_lsn(), db.written_lsn);
        let is_ready = |waiter: &mut Waiter| waiter.is_ready(commit_lsn, written_lsn);
        let ready: Vec<Waiter> = db.waiters.extract_if(.., is_ready).collect();
        let (mut archived, mut readings) = (Vec::new(), Vec::new());
        for waiter in ready {
            match waiter.want {
                Want::ReadLog { first_lsn, pages } => {
                    readings.push((waiter.outbox, first_lsn, pages));
                }
                Want::Open(opening) => waiter.outbox.answer(&db.opened_message(opening)),
                Want::Resolve {
                    request,
                    origin,
                    base_lsn,
                } => {
                    let outcome =
                        super::requests::resolve(db, &self.primary_journal, origin, base_lsn);
                    if let CommitOutcome::Behind { .. } = outcome {
                        db.settled.note(origin);
                        let commit = ArchivedCommit {
                            database,
                            request,
                            origin,
                            base_lsn,
                            otherwise: outcome,
                        };
                        archived.push((waiter.outbox, commit));
                        continue;
                    }
                    waiter.outbox.answer(&SidecarMessage::Outcome {
                        database,
                        sequence: request,
                        outcome,
                    });
                }
            }
        }
        for (outbox, commit) in archived {
            self.resolve_from_archive(outbox, commit);
        }
        for (outbox, first_lsn, pages) in readings {
            self.read_log(&outbox, database, first_lsn, pages);
        }
    }

    fn committed(&mut self, database: DatabaseId, lsn: Lsn) {
        let Some(db) = self.primaries.get_mut(&database) else {
            return;
        };
        db.upload.note_committed();
        self.uploads_due.insert(database);
        let through = LogPosition::new(db.machine.epoch(), lsn);
        self.settle_committed(database, through);
        self.try_change(database);
        self.commits_untold.insert(database);
    }

    fn fenced(&mut self, database: DatabaseId, by: Epoch) {
        self.abandon_pending(database, by);
        let Some(db) = self.primaries.get_mut(&database) else {
            return;
        };
        db.streamed = None;
        // A step of a change is a claim that nobody waits for, and that must not end the log.
        let changing = db.members.is_changing();
        self.release_held(database);
        self.look_again(database);
        if changing && let Some(db) = self.primaries.get_mut(&database) {
            db.claim_at = Some(Instant::now() + CHANGE_RECLAIM_PAUSE);
        }
    }

    /// A replica's node has connected: every database with a replica there talks to it.
    pub fn handle_peer_connected(&mut self, node: &NodeName) {
        let databases: Vec<DatabaseId> = self.primaries.keys().copied().collect();
        for database in databases {
            if let Some(db) = self.primaries.get_mut(&database)
                && db.feeds.contains_key(node)
            {
                db.machine.handle_connected(node);
                self.drive_primary(database);
            }
        }
        self.ask_findings(node);
    }

    /// A replica's node is gone.
    pub fn handle_peer_lost(&mut self, node: &NodeName, session: SessionId, error: String) {
        let Some(peer) = self.peers.get_mut(node) else {
            return;
        };
        if peer
            .link
            .as_ref()
            .is_some_and(|link| link.session != session)
        {
            return;
        }
        if peer.last_error.as_ref() != Some(&error) {
            tracing::warn!(%node, %error, "no connection to a replica's node");
        }
        peer.last_error = Some(error);
        if peer.link.take().is_none() {
            return;
        }
        let databases: Vec<DatabaseId> = self.primaries.keys().copied().collect();
        for database in databases {
            if let Some(db) = self.primaries.get_mut(&database)
                && let Some(feed) = db.feeds.get_mut(node)
            {
                feed.state = super::feed::FeedState::Stopped;
                db.machine.handle_disconnected(node);
                self.drive_primary(database);
            }
        }
    }

    /// A replica says something.
    pub fn handle_from_replica(
        &mut self,
        node: &NodeName,
        session: SessionId,
        message: ReplicaMessage,
    ) {
        let Some(peer) = self.peers.get_mut(node) else {
            return;
        };
        let Some(link) = peer.link.as_mut().filter(|link| link.session == session) else {
            return;
        };
        link.heard();
        let database = match &message {
            ReplicaMessage::Pong {
                trouble,
                journal_percent,
                journal_limit_bytes,
                ..
            } => {
                peer.trouble.clone_from(trouble);
                peer.journal_percent = *journal_percent;
                peer.journal_limit_bytes = *journal_limit_bytes;
                return;
            }
            ReplicaMessage::Found { request, logs } => {
                self.learn_members(logs);
                return self.handle_found(node, *request, logs);
            }
            ReplicaMessage::Promised(promise) => promise.database,
            ReplicaMessage::Ack { database, .. } | ReplicaMessage::Rejected { database, .. } => {
                *database
            }
            // These come on streams of their own, to the task that asked.
            ReplicaMessage::FetchedPart { .. } | ReplicaMessage::FetchEnd { .. } => return,
        };
        let Some(db) = self.primaries.get_mut(&database) else {
            return;
        };
        if let ReplicaMessage::Promised(promise) = &message
            && promise.epoch == db.machine.epoch()
        {
            db.donor_end.note(promise);
        }
        note_successor(db, &message);
        if let Err(violation) = db.machine.handle_message(node, &message) {
            tracing::error!(%node, name = %db.name, %violation, "a replica broke the protocol");
            return;
        }
        self.drive_primary(database);
        // After the machine stopped the feed: why it refuses must not be overwritten, or it would
        // never be tried again.
        if let Some(db) = self.primaries.get_mut(&database) {
            note_feed(db, node, &message);
        }
        if matches!(message, ReplicaMessage::Ack { .. }) {
            self.pump_feed(database, node);
        }
    }

    /// Claims again where that is due.
    pub fn tick_claims(&mut self, database: DatabaseId, now: Instant) {
        let Some(db) = self.primaries.get_mut(&database) else {
            return;
        };
        if db.claim_at.is_none_or(|at| now < at) {
            return;
        }
        db.claim_at = None;
        if db.own_trouble.take().is_some() {
            self.restart_primary(database);
        } else if matches!(
            db.machine.state(),
            PrimaryState::Fenced { .. } | PrimaryState::Idle
        ) {
            db.begin_claim();
        }
        self.drive_primary(database);
    }

    /// An entry of our own journal cannot be read: it and what follows is fetched again.
    pub fn handle_own_damage(&mut self, found: DamagedEntry) {
        let DamagedEntry {
            database,
            lsn: first_lsn,
            error,
        } = found;
        let Some(db) = self.primaries.get_mut(&database) else {
            return;
        };
        if db.own_trouble.is_some() {
            return; // it begins again anyhow
        }
        tracing::error!(name = %db.name, lsn = %first_lsn, %error,
            "an entry of our own journal cannot be read: fetching it again");
        db.own_trouble = Some(error.to_string());
        db.claim_at = Some(Instant::now() + OWN_DAMAGE_PAUSE);
        let record = Record::Damaged {
            database,
            first_lsn,
        };
        self.write_own_records(database, vec![record], None, None);
    }

    /// Our own journal failed: the machine begins again from what it holds.
    fn restart_primary(&mut self, database: DatabaseId) {
        self.primary_journal.resume(database);
        let state = self.primary_journal.state(database);
        let Some(old) = self.primaries.remove(&database) else {
            return;
        };
        let mut db = PrimaryDatabase::new(database, old.name, self.membership(), state.as_ref());
        db.waiters = old.waiters;
        db.pending = old.pending;
        db.settled = old.settled;
        db.own_writes = old.own_writes;
        db.upload = old.upload;
        db.members = old.members;
        self.primaries.insert(database, db);
        self.start_primary(database);
    }

    /// Tells replicas what is committed where no append did.
    pub fn tell_progress(&mut self) {
        for database in std::mem::take(&mut self.commits_untold) {
            let Some(db) = self.primaries.get(&database) else {
                continue;
            };
            let message = PrimaryMessage::Progress {
                database,
                epoch: db.machine.epoch(),
                commit_lsn: db.machine.commit_lsn(),
                archive_lsn: db.machine.archive_lsn(),
            };
            for (node, feed) in &db.feeds {
                if feed.state == super::feed::FeedState::Ready
                    && let Some(link) = self.peers.get(node).and_then(|peer| peer.link.as_ref())
                {
                    link.outbox.answer(&message);
                }
            }
        }
    }
}

/// What a message says about who is the primary instead.
fn note_successor(db: &mut PrimaryDatabase, message: &ReplicaMessage) {
    if let ReplicaMessage::Rejected {
        reason: RejectReason::TakenOver { by: node, .. } | RejectReason::Alive { primary: node },
        ..
    } = message
    {
        db.successor = Some(node.clone());
    }
}

/// What a message says about the replica's feed.
fn note_feed(db: &mut PrimaryDatabase, node: &NodeName, message: &ReplicaMessage) {
    let now = Instant::now();
    let last_lsn = db.machine.last().lsn;
    let Some(feed) = db.feeds.get_mut(node) else {
        return;
    };
    match message {
        ReplicaMessage::Ack { flush_lsn, .. } => {
            feed.acked(*flush_lsn, now);
            if *flush_lsn >= last_lsn {
                feed.level_at = now;
            }
        }
        ReplicaMessage::Rejected {
            reason: RejectReason::Storage { message },
            ..
        } => {
            tracing::warn!(name = %db.name, %node, reason = %message, "a replica refuses entries");
            feed.state = super::feed::FeedState::Refusing {
                since: now,
                reason: message.clone(),
            };
        }
        _ => {}
    }
}

/// Tells one who waits that it will not be.
pub fn fail_waiter(waiter: Waiter, kind: FailureKind, message: &str) {
    let message = message.to_owned();
    waiter.outbox.answer(&match waiter.want {
        Want::Open(Opening { request, .. }) | Want::Resolve { request, .. } => {
            SidecarMessage::Failed {
                request,
                kind,
                message,
            }
        }
        Want::ReadLog { .. } => SidecarMessage::LogEnd {
            error: Some(message),
        },
    });
}

/// A random part of a time.
pub fn random_part(of: Duration) -> Duration {
    let random = getrandom::u32().unwrap_or(0);
    of.mul_f64(f64::from(random) / f64::from(u32::MAX))
}
