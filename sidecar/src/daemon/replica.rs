//! The node as replica: other primaries' messages into the log's [`ReplicaLog`], its answers to the
//! wire. What of it is on disk when is in there.

use super::bulk;
use super::event::{JournalEvent, Permit};
use super::node::{Node, random_id};
use super::orphans::OrphanState;
use super::outbox::Outbox;
use bytes::Bytes;
use durovfs_journal::{DamagedEntry, DatabaseState};
use durovfs_sidecar::replica_log::{AppendContext, AppendRefused, Notice, NoticeSink, ReplicaLog};
use durovfs_wire::peer::{
    Claim, FoundLog, LivePrimary, PrimaryMessage, RejectReason, ReplicaMessage,
};
use durovfs_wire::{DatabaseId, EntryPart, Epoch, Lsn, Membership, NodeName, ReplicaId};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A claim by another node is refused while the primary gave a sign of life this lately. Liveness
/// only: no safety argument uses it.
pub const PRIMARY_FRESH: Duration = Duration::from_secs(3);
/// A node that was promised an epoch stands in the way of other claims for so long, until it acts
/// as the primary: else the one that it takes over from would take the database back in between.
const CLAIM_GRACE: Duration = Duration::from_secs(1);

/// One database that this node keeps entries of for another.
pub struct ReplicaDatabase {
    /// Name in the cluster.
    pub name: String,
    /// What of it is on our disk, and who may append what.
    pub log: ReplicaLog,
    /// The node that last acted as the primary of the promised epoch.
    holder: Option<NodeName>,
    /// What is done in the place of a primary that is gone.
    pub orphan: OrphanState,
    /// The node whose claim was taken last, and when.
    claimed: Option<(NodeName, Instant)>,
}

/// A node whose connection to us stands.
pub struct Inbound {
    /// Which connection.
    pub session: super::event::SessionId,
    /// Its shared stream: acks go there.
    pub shared: Outbox,
    /// When it was last heard.
    pub heard: Instant,
}

impl ReplicaDatabase {
    /// The node that is, or was last, the primary, as far as is known since this node started.
    pub fn last_primary(&self) -> Option<&NodeName> {
        self.log.machine().primary().or(self.holder.as_ref())
    }

    fn new(name: String, log: ReplicaLog) -> Self {
        Self {
            name,
            log,
            holder: None,
            orphan: OrphanState::default(),
            claimed: None,
        }
    }
}

impl Node {
    /// A message from a node that is, or wants to be, primary of something.
    pub fn handle_from_primary(
        &mut self,
        node: &NodeName,
        outbox: &Outbox,
        message: PrimaryMessage,
        payload: Bytes,
        permit: Permit,
    ) {
        match message {
            PrimaryMessage::Ping { sequence } => {
                outbox.answer(&ReplicaMessage::Pong {
                    sequence,
                    trouble: self.replica_trouble(),
                    journal_percent: self.replica_journal.percent_taken(),
                    journal_limit_bytes: self.config.journal.limit_bytes,
                });
            }
            PrimaryMessage::Find { request, name } => {
                let logs = self
                    .replicas
                    .iter()
                    .filter(|(_, replica)| replica.name == name)
                    .map(|(id, replica)| FoundLog {
                        database: *id,
                        primary: self.live_primary(replica),
                        membership: replica.log.machine().membership().cloned(),
                    })
                    .collect();
                outbox.answer(&ReplicaMessage::Found { request, logs });
            }
            PrimaryMessage::Members {
                database,
                membership,
            } => self.handle_members(node, database, membership),
            PrimaryMessage::Claim(claim) => self.handle_claim(node, outbox, &claim),
            PrimaryMessage::Append {
                generation,
                epoch,
                previous,
                commit_lsn,
                archive_lsn,
                part,
            } => {
                let context = AppendContext {
                    generation,
                    epoch,
                    previous,
                    commit_lsn,
                    archive_lsn,
                };
                let entry = EntryPart {
                    header: part,
                    payload,
                };
                self.handle_append(node, context, entry, permit);
            }
            PrimaryMessage::Fetch {
                database,
                epoch,
                first_lsn,
                last_lsn,
            } => {
                self.handle_fetch(database, epoch, first_lsn, last_lsn, outbox);
            }
            told @ (PrimaryMessage::Progress { .. } | PrimaryMessage::Mend { .. }) => {
                self.handle_told(node, &told);
            }
        }
    }

    /// What a primary says of its log.
    fn handle_told(&mut self, node: &NodeName, message: &PrimaryMessage) {
        match *message {
            PrimaryMessage::Progress {
                database,
                epoch,
                commit_lsn,
                archive_lsn,
            } => {
                if let Some(replica) = self.replicas.get_mut(&database) {
                    replica.log.handle_progress(epoch, commit_lsn, archive_lsn);
                    if epoch == replica.log.machine().promised() {
                        replica.holder = Some(node.clone());
                        replica.claimed = None;
                    }
                }
            }
            PrimaryMessage::Mend {
                database,
                epoch,
                lsn,
            } => {
                if let Some(replica) = self.replicas.get_mut(&database) {
                    replica.log.handle_mend(epoch, lsn);
                    self.drive_replica(database);
                }
            }
            _ => {}
        }
    }

    /// The primary of a log, if it gave a sign of life lately; or who is about to be it.
    fn live_primary(&self, replica: &ReplicaDatabase) -> Option<LivePrimary> {
        if let Some((node, at)) = &replica.claimed
            && at.elapsed() < CLAIM_GRACE
        {
            return Some(LivePrimary {
                node: node.clone(),
                // Whether it becomes the primary is not known: nobody is refused for it.
                silent_ms: u32::MAX,
            });
        }
        let node = replica.holder.as_ref()?;
        let silent = self.inbound.get(node)?.heard.elapsed();
        let silent_ms = u32::try_from(silent.as_millis()).unwrap_or(u32::MAX);
        (silent < PRIMARY_FRESH).then(|| LivePrimary {
            node: node.clone(),
            silent_ms,
        })
    }

    fn handle_claim(&mut self, node: &NodeName, outbox: &Outbox, claim: &Claim) {
        if let Some(replica) = self.replicas.get(&claim.database)
            && !claim.forced
            && claim.epoch > replica.log.machine().promised()
            && let Some(LivePrimary { node: primary, .. }) = self.live_primary(replica)
            && primary != *node
        {
            tracing::info!(database = %claim.name, %primary, claimant = %node,
                "claim refused: the primary is alive");
            let reason = RejectReason::Alive { primary };
            outbox.answer(&ReplicaMessage::Rejected {
                database: claim.database,
                epoch: claim.epoch,
                reason,
            });
            return;
        }
        let (journal, notices) = (self.replica_journal.clone(), self.replica_notices());
        let replica = self.replicas.entry(claim.database).or_insert_with(|| {
            let log = ReplicaLog::unheard_of(journal, notices, claim.database, draw_replica());
            ReplicaDatabase::new(claim.name.clone(), log)
        });
        let promised = replica.log.machine().promised();
        replica.log.handle_claim(node, claim);
        if promised < claim.epoch && replica.log.machine().promised() == claim.epoch {
            replica.claimed = Some((node.clone(), Instant::now()));
        }
        self.drive_replica(claim.database);
    }

    fn handle_members(&mut self, node: &NodeName, database: DatabaseId, membership: Membership) {
        let Some(replica) = self.replicas.get_mut(&database) else {
            return;
        };
        if let Err(violation) = replica.log.handle_members(membership) {
            tracing::error!(%node, name = %replica.name, %violation, "members refused");
        }
        self.drive_replica(database);
    }

    fn handle_append(
        &mut self,
        node: &NodeName,
        context: AppendContext,
        entry: EntryPart,
        permit: Permit,
    ) {
        let database = entry.header.database;
        let Some(replica) = self.replicas.get_mut(&database) else {
            let promised = Epoch::ZERO;
            let reason = RejectReason::Fenced { promised };
            return self.reject(node, database, context.epoch, reason);
        };
        match replica.log.handle_append(context, entry, permit) {
            Ok(()) => {
                replica.holder = Some(node.clone());
                replica.claimed = None;
                self.drive_replica(database);
            }
            Err(refused) => {
                if let AppendRefused::Violation(violation) = &refused {
                    tracing::error!(%node, name = %replica.name, %violation, "append refused");
                }
                self.reject(node, database, context.epoch, refused.into_reason());
            }
        }
    }

    /// Refuses an append. On the shared stream, whichever it came on: the primary listens there, as
    /// it does for acks.
    fn reject(&self, node: &NodeName, database: DatabaseId, epoch: Epoch, reason: RejectReason) {
        if let Some(inbound) = self.inbound.get(node) {
            inbound.shared.answer(&ReplicaMessage::Rejected {
                database,
                epoch,
                reason,
            });
        }
    }

    fn handle_fetch(
        &mut self,
        database: DatabaseId,
        epoch: Epoch,
        first_lsn: Lsn,
        last_lsn: Lsn,
        outbox: &Outbox,
    ) {
        let checked = match self.replicas.get(&database) {
            None => Err(RejectReason::Fenced {
                promised: Epoch::ZERO,
            }),
            Some(replica) => replica
                .log
                .machine()
                .check_fetch(epoch, first_lsn, last_lsn),
        };
        match checked {
            Err(reason) => outbox.answer(&ReplicaMessage::Rejected {
                database,
                epoch,
                reason,
            }),
            Ok(()) => bulk::spawn_answer(
                &self.replica_journal,
                database,
                (first_lsn, last_lsn),
                outbox.clone(),
                |part| ReplicaMessage::FetchedPart { part },
                |error| ReplicaMessage::FetchEnd { error },
            ),
        }
    }

    /// Why this node does not take, or not vote on, all that it should: one line.
    pub fn replica_trouble(&self) -> Option<String> {
        let mending = self.mending_count();
        let mends = (mending > 0).then(|| {
            format!(
                "the journal was damaged: {mending} databases wait to be fed by their primaries"
            )
        });
        self.replica_journal.trouble().or(mends)
    }

    /// Databases that lack, or may lack, entries that were acked.
    pub fn mending_count(&self) -> usize {
        let mending = |replica: &&ReplicaDatabase| replica.log.machine().is_mending();
        self.replicas.values().filter(mending).count()
    }

    /// Gives up entries that could not be read.
    pub fn tick_damage(&mut self) {
        for found in self.replica_journal.take_unreadable() {
            let DamagedEntry {
                database,
                lsn,
                error,
            } = found;
            let Some(replica) = self.replicas.get_mut(&database) else {
                continue;
            };
            tracing::error!(name = %replica.name, %lsn, %error,
                "an entry cannot be read: the log waits to be fed from there");
            replica.log.handle_damage(lsn, error);
            self.drive_replica(database);
        }
        for found in self.primary_journal.take_unreadable() {
            self.handle_own_damage(found);
        }
    }

    /// Takes up a log that our journal holds.
    pub fn resume_replica(&mut self, state: &DatabaseState) {
        let (journal, notices) = (self.replica_journal.clone(), self.replica_notices());
        let log = ReplicaLog::from_journal(journal, notices, state, draw_replica());
        self.replicas.insert(
            state.database,
            ReplicaDatabase::new(state.name.clone(), log),
        );
    }

    fn replica_notices(&self) -> NoticeSink {
        let events = self.journal_events.clone();
        // The actor is gone only when the node has stopped.
        Arc::new(move |notice| drop(events.send(JournalEvent::Replica(notice))))
    }

    /// Our journal has written something of a log, or could not.
    pub fn handle_replica_notice(&mut self, notice: Notice) {
        let database = notice.database;
        let Some(replica) = self.replicas.get_mut(&database) else {
            return;
        };
        let failed = replica.log.handle_notice(notice);
        if let Some(error) = &failed {
            tracing::error!(name = %replica.name, %error, "taking up again from the journal");
        }
        self.drive_replica(database);
        if failed.is_some()
            && let Some(replica) = self.replicas.get_mut(&database)
        {
            replica.log.recover_from_trouble();
        }
    }

    /// Sends what the log has to say.
    pub fn drive_replica(&mut self, database: DatabaseId) {
        let Some(replica) = self.replicas.get_mut(&database) else {
            return;
        };
        while let Some((node, message)) = replica.log.poll_message() {
            // A node that went away asks again when it is back.
            if let Some(inbound) = self.inbound.get(&node) {
                inbound.shared.answer(&message);
            }
        }
    }
}

/// An identity for a replica that has none yet.
fn draw_replica() -> ReplicaId {
    ReplicaId::from_bytes(random_id())
}
