//! The node as primary: what it knows of each database it serves, and the way of one commit.

use super::bulk::RunningFetch;
use super::event::{JournalEvent, Permit, SessionId};
use super::feed::Feed;
use super::members::{HeldWrite, Members};
use super::node::{Node, new_claimant};
use super::opening::Waiter;
use super::outbox::Outbox;
use super::settled::SettledCommits;
use super::streaming::Streamed;
use super::uploader::UploadState;
use bytes::Bytes;
use durovfs_journal::{DatabaseState, JournalError, Record};
use durovfs_quorum::{LocalLog, Primary, PrimaryState};
use durovfs_sidecar::donor::DonorEnd;
use durovfs_wire::client::{CommitOutcome, SidecarMessage};
use durovfs_wire::entry::{CommitHeader, Origin, TransactionSummary};
use durovfs_wire::peer::PrimaryMessage;
use durovfs_wire::{
    ClaimantId, DatabaseId, EntryPart, Epoch, Frame, LogPosition, Lsn, Membership, NodeName,
    PartHeader, PartKind, Timestamp,
};
use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

/// Part of a client's time that is kept for burying and for the answer's way back.
const BURY_SHARE: u32 = 5;
/// Most of it that is kept: burying takes a few round trips and one sync.
const BURY_TIME_MAX: Duration = Duration::from_millis(1500);
/// The answer leaves this long before the client's own clock runs out.
const ANSWER_MARGIN: Duration = Duration::from_millis(200);
/// Commits of one database whose outcome is open: above what a client's window lets it send, so
/// that only a client that breaks its own rule meets it.
const PENDING_COMMITS_MAX: usize = 4096;

/// A database that this node is, or wants to be, primary of.
pub struct PrimaryDatabase {
    /// Name in the cluster.
    pub name: String,
    /// The protocol.
    pub machine: Primary,
    /// The last committed transaction.
    pub last_transaction: Option<TransactionSummary>,
    /// The transaction whose pages stream in.
    pub streamed: Option<Streamed>,
    /// The one that was given up because it is too large.
    pub refused_stream: Option<(SessionId, u64)>,
    /// The commits whose outcome is not certain yet, in the log's order. More than one only with
    /// deferred durability: each of them was made on top of the one before.
    pub pending: VecDeque<PendingCommit>,
    /// Who waits for the log to be open.
    pub waiters: Vec<Waiter>,
    /// Per replica.
    pub feeds: BTreeMap<NodeName, Feed>,
    /// Our own journal has all through here.
    pub written_lsn: Lsn,
    /// Writes to our own journal that are under way.
    pub own_writes: u32,
    /// An epoch start that waits for them, so that it is made from what the journal then says.
    pub epoch_start: Option<LogPosition>,
    /// The best promise of this claim.
    pub donor_end: DonorEnd,
    /// The fetch from a donor.
    pub fetch: RunningFetch,
    /// Our own journal failed: the log is read again from the replicas.
    pub own_trouble: Option<String>,
    /// Why the log's last transaction is not known yet, for those who wait for the log.
    pub unknown_end: Option<String>,
    /// The newest attempt to win an epoch.
    pub claimant: ClaimantId,
    /// When to claim again.
    pub claim_at: Option<Instant>,
    /// Claims that failed in a row.
    pub failed_claims: u32,
    /// Whether it is taken over from a live primary, until the log is open.
    pub forced: bool,
    /// That primary.
    pub taken_from: Option<NodeName>,
    /// Who took over, or stands in the way, as far as a replica told.
    pub successor: Option<NodeName>,
    /// Commits of which it is certain what became of them: a late one is refused.
    pub settled: SettledCommits,
    /// The archive's side.
    pub upload: UploadState,
    /// The change of its members.
    pub members: Members,
}

/// A commit that was sent to the replicas.
pub struct PendingCommit {
    /// Where it stands, and its facts.
    pub summary: TransactionSummary,
    /// Who waits for it; nobody any more after "unknown".
    pub waiters: Vec<CommitWaiter>,
    /// The client's time: it begins again when the entry makes progress.
    pub timeout: Option<Duration>,
    /// When the entry was sent, or last made progress.
    pub moved_at: Instant,
}

/// Who wants to know what became of a commit.
pub struct CommitWaiter {
    /// Where the answer goes.
    pub outbox: Outbox,
    /// What the answer is labelled with.
    pub sequence: u64,
}

impl PrimaryDatabase {
    /// A database as our own journal has it, or a new one.
    pub fn new(
        database: DatabaseId,
        name: String,
        membership: Membership,
        state: Option<&DatabaseState>,
    ) -> Self {
        // What our own journal noted, unless somebody told a newer one.
        let noted = state.and_then(|state| state.membership.clone());
        let membership = match noted {
            Some(noted) if noted.epoch >= membership.epoch => noted,
            _ => membership,
        };
        let local = state.map_or_else(LocalLog::default, |state| LocalLog {
            last: state.last,
            first_lsn: state.first_lsn,
            commit_lsn: state.commit_lsn,
            archive_lsn: state.archive_lsn,
            history: state.history.clone(),
            promised: state.promised,
        });
        let written_lsn = local.last.lsn;
        let feeds = membership
            .nodes()
            .into_iter()
            .map(|node| (node.clone(), Feed::stopped()))
            .collect();
        let mut machine = Primary::new(database, name.clone(), membership, local);
        machine.handle_retained(state.map_or(Lsn::ZERO.next(), |state| state.first_lsn));
        Self {
            machine,
            name,
            last_transaction: state.and_then(|state| state.last_transaction),
            streamed: None,
            refused_stream: None,
            pending: VecDeque::new(),
            waiters: Vec::new(),
            feeds,
            written_lsn,
            own_writes: 0,
            epoch_start: None,
            donor_end: DonorEnd::NONE,
            fetch: RunningFetch::default(),
            own_trouble: None,
            unknown_end: None,
            claimant: new_claimant(),
            claim_at: None,
            failed_claims: 0,
            forced: false,
            taken_from: None,
            successor: None,
            settled: SettledCommits::default(),
            upload: UploadState::default(),
            members: Members::default(),
        }
    }

    /// Whether commits may be taken.
    pub fn is_open(&self) -> bool {
        self.machine.state() == PrimaryState::Leading && self.own_trouble.is_none()
    }

    /// Makes a new attempt to win an epoch.
    pub fn begin_claim(&mut self) {
        self.fetch.stop();
        self.claimant = new_claimant();
        self.donor_end = DonorEnd::NONE;
        self.unknown_end = None;
        self.machine.force_claims(self.forced);
        self.machine.start_claim(self.claimant);
    }

    /// The last entry that a replica acked in this epoch.
    pub fn flush_lsn(&self, node: &NodeName) -> Lsn {
        self.machine
            .node_progress(node)
            .map_or(Lsn::ZERO, |progress| progress.flush_lsn)
    }

    /// The generation that every message names.
    pub fn generation(&self) -> u32 {
        self.machine.membership().generation
    }

    /// The last transaction of the log, committed or not yet.
    pub fn newest_transaction(&self) -> Option<TransactionSummary> {
        let pending = self.pending.back().map(|pending| pending.summary);
        pending.or(self.last_transaction)
    }

    /// Whether a commit follows what the log has, or will have.
    fn check_order(&self, request: &CommitRequest) -> Result<(), CommitOutcome> {
        let refuse = |reason: &str| {
            let reason = reason.to_owned();
            Err(CommitOutcome::NotCommitted { reason })
        };
        let newest = self.newest_transaction();
        if let Some(after) = request.after {
            let base = Origin {
                client: request.commit.origin.client,
                sequence: after,
            };
            return if newest.is_none_or(|newest| newest.commit.origin != base) {
                refuse("the commit that it was made on top of is not in the log")
            } else if self.pending.len() >= PENDING_COMMITS_MAX {
                refuse("too many commits of this database wait for the quorum")
            } else {
                Ok(())
            };
        }
        if !self.pending.is_empty() {
            return refuse("the outcome of an earlier commit is still open");
        }
        match newest {
            Some(last_transaction) if last_transaction.position.lsn != request.commit.base_lsn => {
                Err(CommitOutcome::Behind { last_transaction })
            }
            _ => Ok(()),
        }
    }
}

/// What a commit answers with when its outcome is certain.
pub fn answer_commit(database: DatabaseId, waiters: Vec<CommitWaiter>, outcome: &CommitOutcome) {
    for waiter in waiters {
        waiter.outbox.answer(&SidecarMessage::Outcome {
            database,
            sequence: waiter.sequence,
            outcome: outcome.clone(),
        });
    }
}

/// A client's commit, as it came.
pub struct CommitRequest {
    pub session: SessionId,
    pub outbox: Outbox,
    pub database: DatabaseId,
    pub commit: CommitHeader,
    pub streamed_parts: u32,
    pub after: Option<u64>,
    pub timeout: Option<Duration>,
    pub payload: Bytes,
    pub permit: Permit,
}

impl Node {
    /// Takes a commit: refuses it for certain, or sends it.
    pub fn handle_commit(&mut self, request: CommitRequest) {
        let database = request.database;
        let request = if self.primaries.contains_key(&database) {
            match self.hold_write(database, HeldWrite::Commit(request)) {
                Some(HeldWrite::Commit(request)) => request,
                _ => return,
            }
        } else {
            request
        };
        let waiter = CommitWaiter {
            outbox: request.outbox.clone(),
            sequence: request.commit.origin.sequence,
        };
        match self.check_commit(&request) {
            Err(outcome) => {
                let transaction = (request.session, request.commit.origin.sequence);
                self.give_up_transaction(database, transaction);
                answer_commit(database, vec![waiter], &outcome);
            }
            Ok((position, part)) => self.send_commit(request, waiter, position, part),
        }
    }

    /// Where the commit goes, or why it does not.
    fn check_commit(&self, request: &CommitRequest) -> Result<(LogPosition, u32), CommitOutcome> {
        let refuse = |reason: String| Err(CommitOutcome::NotCommitted { reason });
        if self.is_stopping() {
            return refuse("the sidecar is stopping".to_owned());
        }
        let Some(db) = self.primaries.get(&request.database) else {
            return refuse("the database is not open at this sidecar".to_owned());
        };
        let origin = request.commit.origin;
        if db.settled.has(origin) {
            return refuse("the commit was settled before it arrived".to_owned());
        }
        if let PrimaryState::Fenced { .. } = db.machine.state() {
            let reason = db.fenced_reason();
            return Err(CommitOutcome::NotPrimary { reason });
        }
        if let Some(trouble) = &db.own_trouble {
            return refuse(format!("the primary's own journal failed: {trouble}"));
        }
        if let Err(missing) = self.check_answering(db) {
            return refuse(missing);
        }
        if let Some(reason) = self.crowding(db).refusal() {
            return refuse(reason);
        }
        let Some(lsn) = db.machine.next_lsn() else {
            return refuse("the log is being opened".to_owned());
        };
        db.check_order(request)?;
        let position = LogPosition::new(db.machine.epoch(), lsn);
        match db.streamed_parts((request.session, origin.sequence), position) {
            Err(too_large) => refuse(too_large),
            Ok(streamed) if streamed != request.streamed_parts => refuse(format!(
                "{streamed} of {} streamed parts are here: the sidecar or the quorum was away",
                request.streamed_parts
            )),
            Ok(streamed) => Ok((position, streamed)),
        }
    }

    fn send_commit(
        &mut self,
        request: CommitRequest,
        waiter: CommitWaiter,
        position: LogPosition,
        part: u32,
    ) {
        let database = request.database;
        let time = self.next_time(database);
        let Some(db) = self.primaries.get_mut(&database) else {
            return;
        };
        let commit = CommitHeader {
            time,
            base_lsn: db
                .newest_transaction()
                .map_or(Lsn::ZERO, |tx| tx.position.lsn),
            ..request.commit
        };
        let header = PartHeader {
            database,
            epoch: position.epoch,
            lsn: position.lsn,
            part,
            kind: PartKind::Commit(commit),
        };
        let entry = EntryPart {
            header,
            payload: request.payload,
        };
        if let Err(error) = entry.slots() {
            let reason = format!("bad payload: {error}");
            return answer_commit(
                database,
                vec![waiter],
                &CommitOutcome::NotCommitted { reason },
            );
        }
        db.streamed = None;
        db.pending.push_back(PendingCommit {
            summary: TransactionSummary { position, commit },
            waiters: vec![waiter],
            timeout: request.timeout,
            moved_at: Instant::now(),
        });
        self.append_own(entry, request.permit);
    }

    /// Appends the last part of an entry: to our own journal and, if it is the only part, at once
    /// to the level replicas. Larger entries go out from the journal when it has them whole.
    pub fn append_own(&mut self, entry: EntryPart, permit: Permit) {
        let database = entry.header.database;
        let position = entry.header.position();
        let Some(db) = self.primaries.get_mut(&database) else {
            return;
        };
        let frame = (entry.header.part == 0).then(|| {
            let message = PrimaryMessage::Append {
                generation: db.generation(),
                epoch: db.machine.epoch(),
                previous: db.machine.last(),
                commit_lsn: db.machine.commit_lsn(),
                archive_lsn: db.machine.archive_lsn(),
                part: entry.header,
            };
            Frame::encode(&message, entry.payload.clone())
        });
        db.machine.handle_appended(position);
        // The replicas first: nothing waits for our own journal.
        match frame {
            Some(Ok(frame)) => self.push_level(database, position, &frame),
            Some(Err(error)) => tracing::error!(%error, "an entry is larger than a frame"),
            None => {}
        }
        self.write_own(entry, permit);
    }

    pub fn write_own(&mut self, entry: EntryPart, permit: Permit) {
        let header = entry.header;
        self.write_own_records(
            header.database,
            vec![Record::Part(entry)],
            Some(header),
            permit,
        );
    }

    /// Writes to our own journal; the event comes back when it is done.
    pub fn write_own_records(
        &mut self,
        database: DatabaseId,
        records: Vec<Record>,
        part: Option<PartHeader>,
        permit: Permit,
    ) {
        if let Some(db) = self.primaries.get_mut(&database) {
            db.own_writes += 1;
        }
        let events = self.journal_events.clone();
        let position = part.map_or(LogPosition::ZERO, |part| part.position());
        let complete = part.is_some_and(|part| part.is_last());
        self.primary_journal.append(
            records,
            Box::new(move |result| {
                drop(permit);
                // The actor is gone only when the node has stopped.
                let _ = events.send(JournalEvent::OwnWritten {
                    database,
                    position,
                    complete,
                    result,
                });
            }),
        );
    }

    /// A write to our own journal has ended.
    pub fn handle_own_written(
        &mut self,
        database: DatabaseId,
        position: LogPosition,
        complete: bool,
        result: Result<(), JournalError>,
    ) {
        let Some(db) = self.primaries.get_mut(&database) else {
            return;
        };
        db.own_writes -= 1;
        match result {
            Err(error) => {
                tracing::error!(name = %db.name, %error, "the primary's own journal failed");
                db.own_trouble = Some(error.to_string());
                db.claim_at = Some(Instant::now() + Duration::from_secs(1));
            }
            // An entry of an older epoch may have been truncated since.
            Ok(()) if complete && position.epoch == db.machine.epoch() => {
                db.written_lsn = db.written_lsn.max(position.lsn);
            }
            Ok(()) => {}
        }
        if db.own_writes == 0
            && let Some(position) = db.epoch_start.take()
        {
            self.write_epoch_start(database, position);
        }
        if complete {
            self.pump_feeds(database);
            self.answer_waiters(database);
        }
    }

    /// Moves every feed that can move.
    pub fn pump_feeds(&mut self, database: DatabaseId) {
        let Some(db) = self.primaries.get(&database) else {
            return;
        };
        let behind: Vec<NodeName> = db
            .feeds
            .iter()
            .filter(|(_, feed)| feed.next_lsn <= db.written_lsn)
            .map(|(node, _)| node.clone())
            .collect();
        for node in behind {
            self.pump_feed(database, &node);
        }
    }

    /// The time of the next entry: the clock's, but never back within a log.
    pub fn next_time(&self, database: DatabaseId) -> Timestamp {
        let last = self
            .primaries
            .get(&database)
            .and_then(PrimaryDatabase::newest_transaction)
            .map_or(0, |summary| summary.commit.time.as_micros());
        Timestamp::from_micros(now_micros().max(last + 1))
    }

    /// Gives up waiting: buries what was sent, near the end of the client's time, and says
    /// "unknown" at its end. What was sent after the oldest goes with it: it was made on top of it.
    pub fn tick_pending(&mut self, database: DatabaseId, now: Instant) {
        let Some(db) = self.primaries.get_mut(&database) else {
            return;
        };
        let Some(oldest) = db.pending.front() else {
            return;
        };
        if oldest.is_to_be_buried(now) && db.machine.state() == PrimaryState::Leading {
            tracing::warn!(name = %db.name, position = %oldest.summary.position,
                entries = db.pending.len(), "no quorum of acks in time: burying");
            db.claimant = new_claimant();
            db.machine.start_bury(db.claimant);
        }
        for pending in &mut db.pending {
            let Some(timeout) = pending.timeout.filter(|_| pending.is_late(now)) else {
                continue;
            };
            let reason = format!(
                "no quorum of replicas acked within {} ms",
                timeout.as_millis()
            );
            let waiters = std::mem::take(&mut pending.waiters);
            answer_commit(database, waiters, &CommitOutcome::Unknown { reason });
        }
    }

    /// The pending commits up to this position are committed.
    pub fn settle_committed(&mut self, database: DatabaseId, through: LogPosition) {
        let crowding = self.primaries.get(&database).map(|db| self.crowding(db));
        let delay = crowding.map_or(Duration::ZERO, |crowding| crowding.delay());
        let Some(db) = self.primaries.get_mut(&database) else {
            return;
        };
        while let Some(pending) = db.pending.pop_front_if(|pending| {
            let position = pending.summary.position;
            position.lsn <= through.lsn && position.epoch == through.epoch
        }) {
            db.last_transaction = Some(pending.summary);
            db.settled.note(pending.summary.commit.origin);
            let position = pending.summary.position;
            let outcome = CommitOutcome::Committed { position };
            self.held_answers
                .answer(delay, database, pending.waiters, outcome);
        }
    }

    /// The log says what became of the pending commits: it is open, and has them or never will.
    pub fn settle_by_log(&mut self, database: DatabaseId) {
        let Some(db) = self.primaries.get_mut(&database) else {
            return;
        };
        for pending in std::mem::take(&mut db.pending) {
            let CommitHeader {
                origin, base_lsn, ..
            } = pending.summary.commit;
            let found = super::requests::resolve(db, &self.primary_journal, origin, base_lsn);
            let outcome = match found {
                CommitOutcome::Behind { .. } => CommitOutcome::Unknown {
                    reason: "the log dropped the entries that would tell".to_owned(),
                },
                certain => certain,
            };
            db.settled.note(origin);
            answer_commit(database, pending.waiters, &outcome);
        }
    }

    /// All pending commits were buried.
    pub fn settle_buried(&mut self, database: DatabaseId) {
        let Some(db) = self.primaries.get_mut(&database) else {
            return;
        };
        for pending in std::mem::take(&mut db.pending) {
            db.settled.note(pending.summary.commit.origin);
            let reason = "no quorum of replicas acked; the entry was buried".to_owned();
            answer_commit(
                database,
                pending.waiters,
                &CommitOutcome::NotCommitted { reason },
            );
        }
    }

    /// The entries may or may not be committed by whoever took over.
    pub fn abandon_pending(&mut self, database: DatabaseId, by: Epoch) {
        let Some(db) = self.primaries.get_mut(&database) else {
            return;
        };
        for pending in std::mem::take(&mut db.pending) {
            let reason =
                format!("another host took over (epoch {by}) while the commit was in flight");
            answer_commit(
                database,
                pending.waiters,
                &CommitOutcome::Unknown { reason },
            );
        }
    }
}

impl PendingCommit {
    /// How long it may go without progress until its caller must be answered; none is for ever.
    fn answer_after(&self) -> Option<Duration> {
        self.timeout
            .map(|timeout| timeout.saturating_sub(ANSWER_MARGIN.min(timeout / 10)))
    }

    fn waited(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.moved_at)
    }

    fn is_late(&self, now: Instant) -> bool {
        !self.waiters.is_empty()
            && self
                .answer_after()
                .is_some_and(|limit| self.waited(now) >= limit)
    }

    fn is_to_be_buried(&self, now: Instant) -> bool {
        let (Some(timeout), Some(answer_after)) = (self.timeout, self.answer_after()) else {
            return false;
        };
        let kept = (timeout / BURY_SHARE).min(BURY_TIME_MAX);
        self.waited(now) >= answer_after.saturating_sub(kept)
    }
}

/// The clock, microseconds since the Unix epoch.
pub fn now_micros() -> i64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |now| i64::try_from(now.as_micros()).unwrap_or(i64::MAX))
}
