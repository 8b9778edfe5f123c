//! What clients ask for, other than commits: opening, resolving, reading the log, status.

use super::bulk;
use super::event::{ClientGrant, Permit, SessionId};
use super::node::Node;
use super::outbox::Outbox;
use super::primary::{CommitRequest, CommitWaiter, PrimaryDatabase, Waiter, Want};
use super::primary_effects::fail_waiter;
use bytes::Bytes;
use durovfs_journal::Journal;
use durovfs_quorum::PrimaryState;
use durovfs_wire::client::{ClientMessage, CommitOutcome, FailureKind, SidecarMessage};
use durovfs_wire::entry::Origin;
use durovfs_wire::peer::{MAX_NAME_BYTES, PrimaryMessage};
use durovfs_wire::{DatabaseId, Lsn, NodeName};
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

/// A search for the log of a name. A quorum of nodes must have answered: any log that was ever
/// claimed is known to one of them.
pub struct Finding {
    request: u64,
    answers: BTreeMap<NodeName, Vec<DatabaseId>>,
    waiters: Vec<(Waiter, Option<DatabaseId>)>,
}

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
            ClientMessage::Open {
                request,
                name,
                known,
                timeout_ms,
            } => {
                let (outbox, deadline) = (outbox.clone(), deadline(timeout_ms));
                let waiter = Waiter {
                    outbox,
                    want: Want::Open { request },
                    deadline,
                };
                self.handle_open(grant, waiter, name, known);
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
                let (outbox, deadline) = (outbox.clone(), deadline(timeout_ms));
                let waiter = Waiter {
                    outbox,
                    want,
                    deadline,
                };
                self.handle_resolve(grant, waiter, database);
            }
            ClientMessage::Pages { .. }
            | ClientMessage::Abort { .. }
            | ClientMessage::Commit { .. } => {
                self.handle_write(session, grant, outbox, message, (payload, permit));
            }
            question => self.handle_question(grant, outbox, question),
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
            ClientMessage::ReadLog {
                database,
                first_lsn,
            } => {
                self.handle_read_log(grant, outbox, database, first_lsn);
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

    fn handle_open(
        &mut self,
        grant: &ClientGrant,
        waiter: Waiter,
        name: String,
        known: Option<DatabaseId>,
    ) {
        if name.is_empty() || name.len() > MAX_NAME_BYTES || !grant.allows(&name) {
            let message = format!(
                "the certificate {} does not allow the database {name:?}",
                grant.name
            );
            return fail_waiter(waiter, FailureKind::Forbidden, &message);
        }
        self.connect_replicas();
        if let Some(database) = self.names.get(&name).copied() {
            return self.open_known(database, waiter, known);
        }
        self.next_request += 1;
        let finding = self.findings.entry(name).or_insert_with(|| Finding {
            request: self.next_request,
            answers: BTreeMap::new(),
            waiters: Vec::new(),
        });
        finding.waiters.push((waiter, known));
        let replicas = self.config.replicas.clone();
        for node in &replicas {
            self.ask_findings(node);
        }
    }

    fn open_known(&mut self, database: DatabaseId, waiter: Waiter, known: Option<DatabaseId>) {
        let Some(db) = self.primaries.get_mut(&database) else {
            return;
        };
        if let Some(known) = known.filter(|known| *known != database) {
            let message = format!(
                "the file belongs to log {known}, but {} is log {database}: restored or copied by \
                 hand? give it a name of its own with durovfs_db=NAME",
                db.name
            );
            return fail_waiter(waiter, FailureKind::UnknownDatabase, &message);
        }
        db.waiters.push(waiter);
        if matches!(db.machine.state(), PrimaryState::Fenced { .. }) && db.claim_at.is_none() {
            db.failed_claims = 0;
            db.claim_at = Some(Instant::now());
        }
        self.answer_waiters(database);
    }

    /// Asks one node for all names that are being looked for.
    pub fn ask_findings(&mut self, node: &NodeName) {
        let Some(link) = self.peers.get(node).and_then(|peer| peer.link.as_ref()) else {
            return;
        };
        for (name, finding) in &self.findings {
            if !finding.answers.contains_key(node) {
                link.outbox.answer(&PrimaryMessage::Find {
                    request: finding.request,
                    name: name.clone(),
                });
            }
        }
    }

    /// A node says which logs it knows under a name.
    pub fn handle_found(&mut self, node: &NodeName, request: u64, databases: &[DatabaseId]) {
        let Some((name, finding)) = self
            .findings
            .iter_mut()
            .find(|(_, finding)| finding.request == request)
        else {
            return;
        };
        finding.answers.insert(node.clone(), databases.to_vec());
        if finding.answers.len() < self.config.ack_quorum {
            return;
        }
        let name = name.clone();
        let Some(finding) = self.findings.remove(&name) else {
            return;
        };
        let found: BTreeSet<DatabaseId> = finding.answers.into_values().flatten().collect();
        self.finish_finding(name, &found, finding.waiters);
    }

    fn finish_finding(
        &mut self,
        name: String,
        found: &BTreeSet<DatabaseId>,
        waiters: Vec<(Waiter, Option<DatabaseId>)>,
    ) {
        let known = waiters.iter().find_map(|(_, known)| *known);
        let problem = match (found.len(), known) {
            (0, Some(known)) => Some(format!(
                "the file belongs to log {known}, but no replica knows {name}: moved? open it with \
                 durovfs_db= and its old name"
            )),
            (0 | 1, _) => None,
            _ => Some(format!(
                "replicas know several logs under {name}: {found:?}"
            )),
        };
        if let Some(message) = problem {
            for (waiter, _) in waiters {
                fail_waiter(waiter, FailureKind::UnknownDatabase, &message);
            }
            return;
        }
        let database = found
            .first()
            .copied()
            .unwrap_or_else(|| DatabaseId::from_bytes(super::node::random_id()));
        self.names.insert(name.clone(), database);
        let state = self.primary_journal.state(database);
        let db = PrimaryDatabase::new(database, name, self.membership(), state.as_ref());
        self.primaries.insert(database, db);
        self.start_primary(database);
        for (waiter, known) in waiters {
            self.open_known(database, waiter, known);
        }
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
            && !pending.waiters.is_empty()
        {
            // It is on its way: whoever waits is told with the others.
            pending.waiters.push(CommitWaiter {
                outbox: waiter.outbox,
                sequence: request,
            });
            return;
        }
        db.waiters.push(waiter);
        self.answer_waiters(database);
    }

    fn handle_read_log(
        &self,
        grant: &ClientGrant,
        outbox: &Outbox,
        database: DatabaseId,
        first_lsn: Lsn,
    ) {
        let fail = |message: &str| {
            outbox.answer(&SidecarMessage::LogEnd {
                error: Some(message.to_owned()),
            });
        };
        if !self.may_use(grant, database) {
            return fail("the database is not open at this sidecar");
        }
        let Some(db) = self.primaries.get(&database) else {
            return;
        };
        let last_lsn = db.machine.commit_lsn().min(db.written_lsn);
        let first_held = self
            .primary_journal
            .state(database)
            .map_or(Lsn::ZERO, |s| s.first_lsn);
        if first_lsn > last_lsn {
            outbox.answer(&SidecarMessage::LogEnd { error: None });
        } else if first_lsn < first_held {
            fail(&format!(
                "entries before lsn {first_held} are only in the archive: use `durovfs restore {}`",
                db.name
            ));
        } else {
            bulk::spawn_answer(
                &self.primary_journal,
                database,
                (first_lsn, last_lsn),
                outbox.clone(),
                |part| SidecarMessage::LogPart { part },
                |error| SidecarMessage::LogEnd { error },
            );
        }
    }

    /// Gives up on everything whose time is over.
    pub fn tick_waiters(&mut self, now: Instant) {
        let expired = |waiter: &Waiter| waiter.deadline.is_some_and(|deadline| now >= deadline);
        let quorum = self.config.ack_quorum;
        let mut late = Vec::new();
        for (name, finding) in &mut self.findings {
            let answers = finding.answers.len();
            for (waiter, _) in finding
                .waiters
                .extract_if(.., |(waiter, _)| expired(waiter))
            {
                late.push((
                    waiter,
                    format!(
                        "{name} cannot be opened: {answers} replicas answered, {quorum} are needed"
                    ),
                ));
            }
        }
        self.findings
            .retain(|_, finding| !finding.waiters.is_empty());
        let databases: Vec<DatabaseId> = self.primaries.keys().copied().collect();
        for database in databases {
            let Some(db) = self.primaries.get(&database) else {
                continue;
            };
            if !db.waiters.iter().any(expired) {
                continue;
            }
            let answering = self.answering(db);
            let Some(db) = self.primaries.get_mut(&database) else {
                continue;
            };
            let message = format!(
                "{} cannot be opened: {answering} of {} replicas answer, {quorum} are needed",
                db.name,
                db.feeds.len()
            );
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
        db.note_settled(origin);
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
        db.note_settled(origin);
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
