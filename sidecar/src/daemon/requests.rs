//! What clients ask for, other than commits: opening, resolving, reading the log, status.

use super::event::{ClientGrant, Permit, SessionId};
use super::node::{Node, new_claimant};
use super::opening::{Opening, Waiter, Want};
use super::outbox::Outbox;
use super::primary::{CommitRequest, CommitWaiter, PrimaryDatabase};
use super::primary_effects::fail_waiter;
use bytes::Bytes;
use durovfs_journal::Journal;
use durovfs_quorum::PrimaryState;
use durovfs_wire::client::{ClientMessage, CommitOutcome, FailureKind, SidecarMessage};
use durovfs_wire::entry::Origin;
use durovfs_wire::{DatabaseId, Lsn, NodeName};
use std::time::{Duration, Instant};

/// Longest wait of a reading for our own journal: as long as a client's stream may stand still.
const READ_PATIENCE: Duration = Duration::from_secs(10);

impl Node {
    /// A client says something.
    pub fn handle_from_client(
        &mut self,
        session: SessionId,
        grant: &ClientGrant,
        outbox: &Outbox,
        message: ClientMessage,
        (payload, permit): (Bytes, Permit),
    ) {
        match message {
            ClientMessage::Open { .. }
            | ClientMessage::Resolve { .. }
            | ClientMessage::ReadLog { .. } => self.handle_patient(grant, outbox, message),
            ClientMessage::Pages { .. }
            | ClientMessage::Abort { .. }
            | ClientMessage::Commit { .. } => {
                self.handle_write(session, grant, outbox, message, (payload, permit));
            }
            ClientMessage::Replace {
                request,
                name,
                old,
                new,
            } => self.handle_replace(grant, outbox, request, (&name, &old, &new)),
            question => self.handle_question(grant, outbox, question),
        }
    }

    /// A client asks what only an open log can answer.
    fn handle_patient(&mut self, grant: &ClientGrant, outbox: &Outbox, message: ClientMessage) {
        let waiter = |want, deadline| Waiter {
            outbox: outbox.clone(),
            want,
            deadline,
            through_lsn: None,
        };
        match message {
            ClientMessage::Open {
                request,
                name,
                known,
                force,
                must_exist,
                timeout_ms,
            } => {
                let want = Want::Open(Opening {
                    request,
                    known,
                    force,
                    must_exist,
                });
                self.handle_open(grant, waiter(want, deadline(timeout_ms)), name);
            }
            ClientMessage::Resolve {
                request,
                database,
                origin,
                base_lsn,
                timeout_ms,
            } => {
                let want = Want::Resolve {
                    request,
                    origin,
                    base_lsn,
                };
                self.handle_resolve(grant, waiter(want, deadline(timeout_ms)), database);
            }
            ClientMessage::ReadLog {
                database,
                first_lsn,
                pages,
            } => {
                let want = Want::ReadLog { first_lsn, pages };
                let deadline = Instant::now().checked_add(READ_PATIENCE);
                self.handle_read_log(grant, waiter(want, deadline), database);
            }
            // The caller takes everything else.
            _ => {}
        }
    }

    /// A client sends a transaction, or a part of one.
    fn handle_write(
        &mut self,
        session: SessionId,
        grant: &ClientGrant,
        outbox: &Outbox,
        message: ClientMessage,
        (payload, permit): (Bytes, Permit),
    ) {
        match message {
            ClientMessage::Pages {
                database,
                sequence,
                page_size,
            } if self.may_use(grant, database) => {
                self.handle_pages(session, (database, sequence), page_size, payload, permit);
            }
            ClientMessage::Abort { database, sequence } if self.may_use(grant, database) => {
                self.handle_abort(session, database, sequence);
            }
            ClientMessage::Commit {
                database,
                commit,
                streamed_parts,
                after,
                timeout_ms,
            } => {
                let request = CommitRequest {
                    session,
                    outbox: outbox.clone(),
                    database,
                    commit,
                    streamed_parts,
                    after,
                    timeout: timeout(timeout_ms),
                    payload,
                    permit,
                };
                self.admit_commit(grant, request);
            }
            // Pages and aborts of what the certificate does not allow; their commit is told.
            _ => {}
        }
    }

    fn handle_replace(
        &mut self,
        grant: &ClientGrant,
        outbox: &Outbox,
        request: u64,
        (name, old, new): (&str, &NodeName, &NodeName),
    ) {
        let answer = if grant.allows(name) {
            self.replace(name, old, new)
        } else {
            let message = format!(
                "the certificate {} does not allow the database {name:?}",
                grant.name
            );
            Err((FailureKind::Forbidden, message))
        };
        match answer {
            Ok(state) => outbox.answer(&SidecarMessage::Replacing { request, state }),
            Err((kind, message)) => outbox.answer(&SidecarMessage::Failed {
                request,
                kind,
                message,
            }),
        }
    }

    /// A client asks something that changes nothing.
    fn handle_question(&self, grant: &ClientGrant, outbox: &Outbox, message: ClientMessage) {
        match message {
            ClientMessage::Hello {
                client,
                description,
            } => {
                tracing::debug!(%client, description, certificate = %grant.name, "a client");
                outbox.answer(&SidecarMessage::Welcome {
                    node: self.name().clone(),
                });
            }
            ClientMessage::NodeStatus { request } => {
                let status = self.node_status(Some(grant));
                outbox.answer(&SidecarMessage::NodeStatus { request, status });
            }
            ClientMessage::DatabaseStatus { request, name } => {
                let status = self
                    .database_status_by_name(&name)
                    .filter(|_| grant.allows(&name));
                outbox.answer(&SidecarMessage::DatabaseStatus { request, status });
            }
            ClientMessage::FindBookmark {
                request,
                database,
                when,
            } => {
                if self.may_use(grant, database) {
                    self.find_bookmark(outbox, request, database, &when);
                } else {
                    let bookmark = Err("the certificate does not allow this database".to_owned());
                    outbox.answer(&SidecarMessage::FoundBookmark { request, bookmark });
                }
            }
            // Everything else has been taken by the caller.
            _ => {}
        }
    }

    fn may_use(&self, grant: &ClientGrant, database: DatabaseId) -> bool {
        self.primaries
            .get(&database)
            .is_some_and(|db| grant.allows(&db.name))
    }

    fn admit_commit(&mut self, grant: &ClientGrant, request: CommitRequest) {
        let database = request.database;
        if self.primaries.contains_key(&database) && !self.may_use(grant, database) {
            let sequence = request.commit.origin.sequence;
            let reason = "the certificate does not allow this database".to_owned();
            let outcome = CommitOutcome::NotCommitted { reason };
            request.outbox.answer(&SidecarMessage::Outcome {
                database,
                sequence,
                outcome,
            });
            return;
        }
        self.handle_commit(request);
        self.drive_primary(database);
    }

    fn handle_resolve(&mut self, grant: &ClientGrant, waiter: Waiter, database: DatabaseId) {
        if !self.may_use(grant, database) {
            let message = "the database is not open at this sidecar";
            return fail_waiter(waiter, FailureKind::UnknownDatabase, message);
        }
        let Some(db) = self.primaries.get_mut(&database) else {
            return;
        };
        if let Want::Resolve {
            request, origin, ..
        } = waiter.want
            && let Some(pending) = db
                .pending
                .iter_mut()
                .find(|pending| pending.summary.commit.origin == origin)
        {
            if !pending.waiters.is_empty() {
                // It is on its way: whoever waits is told with the others.
                pending.waiters.push(CommitWaiter {
                    outbox: waiter.outbox,
                    sequence: request,
                });
                return;
            }
            // Told to be unknown while one before it still waits. The log does not have it, and may
            // yet: only a burial makes either certain.
            if db.machine.state() == PrimaryState::Leading {
                db.claimant = new_claimant();
                db.machine.start_bury(db.claimant);
                db.waiters.push(waiter);
                return self.drive_primary(database);
            }
        }
        if let PrimaryState::Fenced { .. } = db.machine.state() {
            return fail_waiter(waiter, FailureKind::NotPrimary, &db.fenced_reason());
        }
        db.waiters.push(waiter);
        self.answer_waiters(database);
    }

    /// A reading ends where the log ended when it was asked for, or later: an opener was told that
    /// end, and its file must reach it.
    fn handle_read_log(&mut self, grant: &ClientGrant, waiter: Waiter, database: DatabaseId) {
        if !self.may_use(grant, database) {
            let message = "the database is not open at this sidecar";
            return fail_waiter(waiter, FailureKind::UnknownDatabase, message);
        }
        let Some(db) = self.primaries.get_mut(&database) else {
            return;
        };
        if let PrimaryState::Fenced { .. } = db.machine.state() {
            return fail_waiter(waiter, FailureKind::NotPrimary, &db.fenced_reason());
        }
        db.waiters.push(waiter);
        self.answer_waiters(database);
    }

    /// Gives up on everything whose time is over.
    pub fn tick_waiters(&mut self, now: Instant) {
        let expired = |waiter: &Waiter| waiter.is_expired(now);
        let mut late = self.expired_finders(now);
        let databases: Vec<DatabaseId> = self.primaries.keys().copied().collect();
        for database in databases {
            let Some(db) = self.primaries.get(&database) else {
                continue;
            };
            if !db.waiters.iter().any(expired) {
                continue;
            }
            let missing = self.check_answering(db).err();
            let Some(db) = self.primaries.get_mut(&database) else {
                continue;
            };
            let missing = missing.or_else(|| db.unknown_end.clone());
            let missing = missing.unwrap_or_else(|| match db.is_open() {
                true => "the primary's own journal is behind its replicas".to_owned(),
                false => "its replicas did not promise".to_owned(),
            });
            let message = format!("{} cannot be opened: {missing}", db.name);
            for waiter in db.waiters.extract_if(.., |waiter| expired(waiter)) {
                late.push((waiter, message.clone()));
            }
        }
        for (waiter, message) in late {
            fail_waiter(waiter, FailureKind::NoQuorum, &message);
        }
    }
}

/// What became of a commit, now that the log is open: it is in it, or never will be.
pub fn resolve(
    db: &mut PrimaryDatabase,
    journal: &Journal,
    origin: Origin,
    base_lsn: Lsn,
) -> CommitOutcome {
    let not_committed = || CommitOutcome::NotCommitted {
        reason: "the log does not have the commit".to_owned(),
    };
    let Some(last) = db.last_transaction else {
        db.settled.note(origin);
        return not_committed();
    };
    if last.commit.origin == origin {
        return CommitOutcome::Committed {
            position: last.position,
        };
    }
    let commit_lsn = db.machine.commit_lsn();
    let found = journal
        .transactions(db.machine.database(), base_lsn.next(), commit_lsn)
        .into_iter()
        .find(|summary| summary.commit.origin == origin);
    if let Some(summary) = found {
        return CommitOutcome::Committed {
            position: summary.position,
        };
    }
    let first_held = journal
        .state(db.machine.database())
        .map_or(Lsn::ZERO, |state| state.first_lsn);
    // Nothing after the base was dropped, or nothing but the last transaction came after it.
    if base_lsn.next() >= first_held
        || last.position.lsn <= base_lsn
        || last.commit.base_lsn == base_lsn
    {
        db.settled.note(origin);
        return not_committed();
    }
    CommitOutcome::Behind {
        last_transaction: last,
    }
}

impl ClientGrant {
    /// Whether the certificate allows a database.
    pub fn allows(&self, name: &str) -> bool {
        self.databases.is_match(name)
    }
}

fn timeout(timeout_ms: u64) -> Option<Duration> {
    (timeout_ms > 0).then(|| Duration::from_millis(timeout_ms))
}

fn deadline(timeout_ms: u64) -> Option<Instant> {
    timeout(timeout_ms).and_then(|timeout| Instant::now().checked_add(timeout))
}
