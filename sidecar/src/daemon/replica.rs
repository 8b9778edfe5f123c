//! The node as replica: other primaries' messages into the state machine, its effects to the disk
//! and back. What reaches the wire here was on the disk before.

use super::bulk;
use super::event::{JournalEvent, Permit};
use super::node::Node;
use super::outbox::Outbox;
use bytes::Bytes;
use durovfs_journal::{DatabaseState, JournalError, Record};
use durovfs_quorum::{AppendVerdict, Replica, ReplicaEffect, ReplicaState};
use durovfs_wire::peer::{Claim, PrimaryMessage, RejectReason, ReplicaMessage};
use durovfs_wire::{DatabaseId, EntryPart, Epoch, LogPosition, Lsn, NodeName, PartHeader};
use std::time::{Duration, Instant};

/// A claim by another node is refused while the primary gave a sign of life this lately. Liveness
/// only: no safety argument uses it.
const PRIMARY_FRESH: Duration = Duration::from_secs(3);

/// One database that this node keeps entries of for another.
pub struct ReplicaDatabase {
    /// Name in the cluster.
    pub name: String,
    /// Who may append what.
    pub machine: Replica,
    /// The node that appended last.
    holder: Option<NodeName>,
    /// What the journal was last told may go.
    noted_archive_lsn: Lsn,
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
    /// As the journal has it.
    pub fn from_journal(state: &DatabaseState) -> Self {
        Self {
            name: state.name.clone(),
            machine: Replica::new(state.database, persisted(state)),
            holder: None,
            noted_archive_lsn: state.archive_lsn,
        }
    }

    fn unheard_of(database: DatabaseId, name: String) -> Self {
        Self {
            name,
            machine: Replica::new(database, ReplicaState::default()),
            holder: None,
            noted_archive_lsn: Lsn::ZERO,
        }
    }
}

fn persisted(state: &DatabaseState) -> ReplicaState {
    ReplicaState {
        promised: state.promised,
        claimant: state.claimant,
        generation: state.generation,
        last: state.last,
        first_lsn: state.first_lsn,
        commit_lsn: state.commit_lsn,
        archive_lsn: state.archive_lsn,
        history: state.history.clone(),
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
                    trouble: self.replica_journal.trouble(),
                });
            }
            PrimaryMessage::Find { request, name } => {
                let databases = self
                    .replicas
                    .iter()
                    .filter(|(_, replica)| replica.name == name)
                    .map(|(id, _)| *id)
                    .collect();
                outbox.answer(&ReplicaMessage::Found { request, databases });
            }
            PrimaryMessage::Claim(claim) => self.handle_claim(node, outbox, &claim),
            PrimaryMessage::Append {
                generation,
                epoch,
                previous,
                commit_lsn,
                archive_lsn,
                part,
            } => {
                let sender = Sender {
                    generation,
                    epoch,
                    commit_lsn,
                    archive_lsn,
                };
                let entry = EntryPart {
                    header: part,
                    payload,
                };
                self.handle_append(node, outbox, sender, previous, entry, permit);
            }
            PrimaryMessage::Progress {
                database,
                epoch,
                commit_lsn,
                archive_lsn,
            } => {
                if let Some(replica) = self.replicas.get_mut(&database) {
                    replica
                        .machine
                        .handle_progress(epoch, commit_lsn, archive_lsn);
                    self.note_archived(database);
                }
            }
            PrimaryMessage::Fetch {
                database,
                epoch,
                first_lsn,
                last_lsn,
            } => {
                self.handle_fetch(database, epoch, first_lsn, last_lsn, outbox);
            }
        }
    }

    fn handle_claim(&mut self, node: &NodeName, outbox: &Outbox, claim: &Claim) {
        let fresh = |holder: &NodeName| {
            self.inbound
                .get(holder)
                .is_some_and(|inbound| inbound.heard.elapsed() < PRIMARY_FRESH)
        };
        if let Some(replica) = self.replicas.get(&claim.database)
            && let Some(holder) = &replica.holder
            && holder != node
            && fresh(holder)
        {
            tracing::info!(database = %claim.name, %holder, claimant = %node,
                "claim refused: the primary is alive");
            outbox.answer(&ReplicaMessage::Rejected {
                database: claim.database,
                epoch: claim.epoch,
                reason: RejectReason::Fenced {
                    promised: replica.machine.promised(),
                },
            });
            return;
        }
        let replica = self
            .replicas
            .entry(claim.database)
            .or_insert_with(|| ReplicaDatabase::unheard_of(claim.database, claim.name.clone()));
        replica.machine.handle_claim(node, claim);
        self.drive_replica(claim.database);
    }

    fn handle_append(
        &mut self,
        node: &NodeName,
        outbox: &Outbox,
        sender: Sender,
        previous: LogPosition,
        entry: EntryPart,
        permit: Permit,
    ) {
        let Sender {
            generation,
            epoch,
            commit_lsn,
            archive_lsn,
        } = sender;
        let part = entry.header;
        let database = part.database;
        let reject = |reason| {
            outbox.answer(&ReplicaMessage::Rejected {
                database,
                epoch,
                reason,
            });
        };
        let Some(replica) = self.replicas.get_mut(&database) else {
            return reject(RejectReason::Fenced {
                promised: Epoch::ZERO,
            });
        };
        if let Err(error) = entry.slots() {
            tracing::error!(%node, name = %replica.name, %error, "append refused: bad payload");
            return reject(RejectReason::Storage {
                message: error.to_string(),
            });
        }
        let verdict = replica.machine.check_append(
            generation,
            epoch,
            previous,
            &part,
            commit_lsn,
            archive_lsn,
        );
        let mut records = Vec::with_capacity(2);
        match verdict {
            Err(violation) => {
                tracing::error!(%node, name = %replica.name, %violation, "append refused");
                return reject(RejectReason::Storage {
                    message: violation.to_string(),
                });
            }
            Ok(AppendVerdict::Reject(reason)) => return reject(reason),
            Ok(AppendVerdict::Duplicate) => return self.drive_replica(database),
            Ok(AppendVerdict::Write {
                truncate_after,
                restart_at,
            }) => {
                records.extend(truncate_after.map(|after| Record::Truncate { database, after }));
                records.extend(restart_at.map(|at| Record::Restart { database, at }));
            }
        }
        replica.holder = Some(node.clone());
        records.push(Record::Part(entry));
        self.persist_part(records, &part, epoch, permit);
    }

    /// Writes a part to the journal. The ack comes from the completion, never before.
    fn persist_part(
        &mut self,
        records: Vec<Record>,
        part: &PartHeader,
        epoch: Epoch,
        permit: Permit,
    ) {
        let events = self.journal_events.clone();
        let database = part.database;
        let (position, complete) = (part.position(), part.is_last());
        self.replica_journal.append(
            records,
            Box::new(move |result| {
                drop(permit);
                // The actor is gone only when the node has stopped.
                let _ = events.send(JournalEvent::PartPersisted {
                    database,
                    position,
                    epoch,
                    complete,
                    result,
                });
            }),
        );
        self.note_archived(database);
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
            Some(replica) => replica.machine.check_fetch(epoch, first_lsn, last_lsn),
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

    /// A part of an entry is on our disk, or will never be.
    pub fn handle_part_persisted(
        &mut self,
        database: DatabaseId,
        position: LogPosition,
        epoch: Epoch,
        complete: bool,
        result: Result<(), JournalError>,
    ) {
        let Some(replica) = self.replicas.get_mut(&database) else {
            return;
        };
        match result {
            Ok(()) => {
                replica
                    .machine
                    .handle_part_persisted(position, epoch, complete);
                self.drive_replica(database);
            }
            Err(error) => self.storage_failed(database, &error),
        }
    }

    /// What the machine took as written is not: it tells, and a new one begins from what the
    /// journal has. The primary asks it again what that is.
    fn storage_failed(&mut self, database: DatabaseId, error: &JournalError) {
        let Some(replica) = self.replicas.get_mut(&database) else {
            return;
        };
        tracing::error!(name = %replica.name, %error, "the journal could not write");
        replica.machine.handle_trouble(error.to_string());
        self.drive_replica(database);
        let state = self.replica_journal.state(database);
        match (state, self.replicas.get_mut(&database)) {
            (Some(state), Some(replica)) => {
                replica.machine = Replica::new(database, persisted(&state));
            }
            _ => drop(self.replicas.remove(&database)),
        }
        self.replica_journal.resume(database);
    }

    /// A promise is on our disk: only now may it be told.
    pub fn handle_promise_persisted(
        &mut self,
        database: DatabaseId,
        token: u64,
        result: Result<(), JournalError>,
    ) {
        let Some(replica) = self.replicas.get_mut(&database) else {
            return;
        };
        match result {
            Ok(()) => {
                replica.machine.handle_promise_persisted(token);
                self.drive_replica(database);
            }
            Err(error) => self.storage_failed(database, &error),
        }
    }

    /// Carries out what the state machine wants.
    pub fn drive_replica(&mut self, database: DatabaseId) {
        let Some(replica) = self.replicas.get_mut(&database) else {
            return;
        };
        while let Some(effect) = replica.machine.poll_effect() {
            match effect {
                ReplicaEffect::PersistPromise {
                    token,
                    epoch,
                    claimant,
                    generation,
                    name,
                } => {
                    let events = self.journal_events.clone();
                    self.replica_journal.append(
                        vec![Record::Promise {
                            database,
                            name,
                            epoch,
                            claimant,
                            generation,
                        }],
                        Box::new(move |result| {
                            let _ = events.send(JournalEvent::PromisePersisted {
                                database,
                                token,
                                result,
                            });
                        }),
                    );
                }
                ReplicaEffect::Send { node, mut message } => {
                    if let ReplicaMessage::Promised(promise) = &mut message {
                        promise.last_transaction = self
                            .replica_journal
                            .state(database)
                            .filter(|state| state.last == promise.last)
                            .and_then(|state| state.last_transaction);
                    }
                    // A node that went away asks again when it is back.
                    if let Some(inbound) = self.inbound.get(&node) {
                        inbound.shared.answer(&message);
                    }
                }
            }
        }
    }

    /// Writes down what is archived, and drops it when that is on disk.
    fn note_archived(&mut self, database: DatabaseId) {
        let Some(replica) = self.replicas.get_mut(&database) else {
            return;
        };
        let drop_through = replica.machine.droppable_lsn();
        if drop_through <= replica.noted_archive_lsn {
            return;
        }
        replica.noted_archive_lsn = drop_through;
        let (commit_lsn, archive_lsn) =
            (replica.machine.commit_lsn(), replica.machine.archive_lsn());
        let events = self.journal_events.clone();
        self.replica_journal.append(
            vec![Record::Progress {
                database,
                commit_lsn,
                archive_lsn,
            }],
            Box::new(move |result| {
                let _ = events.send(JournalEvent::ProgressPersisted {
                    database,
                    drop_through,
                    result,
                });
            }),
        );
    }
}

/// What an append says of the primary that sent it.
#[derive(Clone, Copy)]
struct Sender {
    generation: u32,
    epoch: Epoch,
    commit_lsn: Lsn,
    archive_lsn: Lsn,
}
