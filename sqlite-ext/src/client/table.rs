//! The calls that wait for an answer, and what must be said to the sidecar on their behalf. Pure:
//! no I/O, no waiting; the driver moves the frames.
//!
//! Rules kept here:
//! - A commit is handed to the network once. When the connection broke after that, it is asked for
//!   with `Resolve` on the next one, never sent again.
//! - Everything else may be sent again on each new connection.
//! - On each connection a database is opened before anything else is said of it: the sidecar may
//!   have been restarted, and keeps in memory only what it is told.

use super::call::Call;
use super::deferred::DeferredCommits;
use bytes::Bytes;
use durovfs_wire::client::{ClientMessage, CommitOutcome, FailureKind, SidecarMessage};
use durovfs_wire::entry::{CommitHeader, Origin};
use durovfs_wire::{DatabaseId, Frame, FrameError, Lsn};
use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::oneshot;

/// Time that the sidecar gets for an open that no caller asked for, in milliseconds. The callers
/// behind it have times of their own; this one only has to end.
const REOPEN_TIMEOUT_MS: u64 = 30_000;

/// What a caller is told.
#[derive(Debug)]
#[allow(
    clippy::large_enum_variant,
    reason = "made once and moved to the caller that waits for it"
)]
pub(super) enum Answer {
    /// What the sidecar said.
    Message(SidecarMessage),
    /// There is no use in waiting: the link is refused, for this reason.
    Refused(String),
}

/// What a call asks for.
#[derive(Debug)]
pub(super) enum Request {
    /// A question with its number in it, that may be asked again.
    Ask {
        /// The message; its time is filled in when it is sent.
        message: ClientMessage,
        /// Database that must be open for it.
        database: Option<DatabaseId>,
    },
    /// A commit on the shared stream.
    Commit {
        /// The log.
        database: DatabaseId,
        /// Its facts.
        commit: CommitHeader,
        /// Sequence of the unanswered commit that it is made on top of, if there is one.
        after: Option<u64>,
        /// Its pages.
        payload: Bytes,
    },
    /// A commit that another stream sends; here only in case that it must be asked for.
    BulkCommit {
        /// The log.
        database: DatabaseId,
        /// Who made it.
        origin: Origin,
        /// What it was made on top of.
        base_lsn: Lsn,
    },
}

impl Request {
    fn database(&self) -> Option<DatabaseId> {
        match self {
            Self::Ask { database, .. } => *database,
            Self::Commit { database, .. } | Self::BulkCommit { database, .. } => Some(*database),
        }
    }
}

/// Where an answer goes.
#[derive(Debug)]
pub(super) enum Reply {
    /// To the thread that waits for it.
    Caller(oneshot::Sender<Answer>),
    /// To whoever asks what became of a deferred commit.
    Deferred {
        /// All of this process.
        commits: Arc<DeferredCommits>,
        /// Its number.
        sequence: u64,
    },
}

impl Reply {
    fn send(self, answer: Answer) {
        match self {
            // The caller may be gone: its time is over.
            Self::Caller(sender) => drop(sender.send(answer)),
            Self::Deferred { commits, sequence } => commits.answer(sequence, answer),
        }
    }
}

/// A call that waits.
#[derive(Debug)]
pub(super) struct Pending {
    /// What both threads know of it.
    pub(super) call: Arc<Call>,
    /// What it asks for.
    pub(super) request: Request,
    /// Who waits.
    pub(super) answer: Reply,
}

/// All calls of the process, by number: the sequence of a commit, the request of anything else.
#[derive(Debug)]
pub(super) struct Table {
    numbers: Arc<AtomicU64>,
    pending: BTreeMap<u64, Pending>,
    /// Numbers to be said next, in order.
    queue: VecDeque<u64>,
    /// Names of the databases that were opened, to open them again.
    names: HashMap<DatabaseId, String>,
    /// Open on this connection.
    opened: HashSet<DatabaseId>,
    /// Opens of our own that are on their way.
    opening: HashMap<u64, DatabaseId>,
    /// Calls that wait for one of them.
    blocked: HashMap<DatabaseId, Vec<u64>>,
    /// Resolves that are on their way, and the commits that they are for.
    resolving: HashMap<u64, u64>,
    /// Streams of their own that wait for a connection.
    waiting_streams: usize,
}

impl Table {
    pub(super) fn new(numbers: Arc<AtomicU64>) -> Self {
        Self {
            numbers,
            pending: BTreeMap::new(),
            queue: VecDeque::new(),
            names: HashMap::new(),
            opened: HashSet::new(),
            opening: HashMap::new(),
            blocked: HashMap::new(),
            resolving: HashMap::new(),
            waiting_streams: 0,
        }
    }

    /// Whether anyone waits for a connection.
    pub(super) fn has_demand(&self) -> bool {
        !self.pending.is_empty() || self.waiting_streams > 0
    }

    /// A stream of its own begins to wait for a connection, or ends to.
    pub(super) fn note_waiting_stream(&mut self, waits: bool) {
        if waits {
            self.waiting_streams += 1;
        } else {
            self.waiting_streams -= 1;
        }
    }

    /// Whether something is to be said.
    pub(super) fn has_queued(&self) -> bool {
        !self.queue.is_empty()
    }

    /// A new call.
    pub(super) fn add(&mut self, number: u64, pending: Pending) {
        if !matches!(pending.request, Request::BulkCommit { .. }) {
            self.queue.push_back(number);
        }
        self.pending.insert(number, pending);
    }

    /// The caller went away.
    pub(super) fn forget(&mut self, number: u64) {
        self.pending.remove(&number);
    }

    /// A new connection stands: everything unanswered is said again, or asked for.
    pub(super) fn handle_connected(&mut self) {
        self.opened.clear();
        self.opening.clear();
        self.blocked.clear();
        self.resolving.clear();
        // A commit on a stream of its own that was not sent is that stream's affair.
        self.queue = self
            .pending
            .iter()
            .filter(|(_, pending)| {
                !matches!(pending.request, Request::BulkCommit { .. }) || pending.call.was_sent()
            })
            .map(|(number, _)| *number)
            .collect();
    }

    /// The link is refused for a reason that waiting does not mend: calls that were never sent end.
    /// What became of a commit that was sent must still be found out, if its caller has the time.
    pub(super) fn handle_refused(&mut self, reason: &str) {
        let numbers: Vec<_> = self.pending.keys().copied().collect();
        for number in numbers {
            let Some(pending) = self.pending.get(&number) else {
                continue;
            };
            let commits = !matches!(pending.request, Request::Ask { .. });
            if (commits && pending.call.was_sent())
                || matches!(pending.request, Request::BulkCommit { .. })
            {
                continue;
            }
            if let Some(pending) = self.pending.remove(&number) {
                pending.answer.send(Answer::Refused(reason.to_owned()));
            }
        }
    }

    /// The stream of a commit broke after the commit was sent, while the connection stands.
    pub(super) fn handle_stream_lost(&mut self, number: u64) {
        if self.pending.contains_key(&number) {
            self.queue.push_back(number);
        }
    }

    /// Whether a database is open on this connection.
    pub(super) fn is_open(&self, database: DatabaseId) -> bool {
        self.opened.contains(&database)
    }

    /// A message that opens a database again, and its number; none for a database that this process
    /// never opened.
    pub(super) fn reopen(&self, database: DatabaseId) -> Option<(u64, ClientMessage)> {
        let request = self.numbers.fetch_add(1, Ordering::Relaxed);
        let name = self.names.get(&database)?.clone();
        let known = Some(database);
        let timeout_ms = REOPEN_TIMEOUT_MS;
        Some((
            request,
            ClientMessage::Open {
                request,
                name,
                known,
                force: false,
                must_exist: false,
                timeout_ms,
            },
        ))
    }

    /// What is to be said now on the shared stream. From here on it counts as sent.
    ///
    /// # Errors
    /// Never, but for a message that no frame holds, which the callers do not make.
    pub(super) fn take_frames(&mut self) -> Result<Vec<Frame>, FrameError> {
        let mut frames = Vec::new();
        while let Some(number) = self.queue.pop_front() {
            let Some(database) = self.pending.get(&number).map(|p| p.request.database()) else {
                continue;
            };
            if let Some(database) = database
                && !self.is_open(database)
            {
                if let Some(waiting) = self.blocked.get_mut(&database) {
                    waiting.push(number);
                    continue;
                }
                if let Some((request, message)) = self.reopen(database) {
                    self.opening.insert(request, database);
                    self.blocked.insert(database, vec![number]);
                    frames.push(Frame::encode(&message, Bytes::new())?);
                    continue;
                }
            }
            if let Some(frame) = self.frame_of(number)? {
                frames.push(frame);
            }
        }
        Ok(frames)
    }

    fn frame_of(&mut self, number: u64) -> Result<Option<Frame>, FrameError> {
        let Some(pending) = self.pending.get(&number) else {
            return Ok(None);
        };
        let sent_before = pending.call.was_sent();
        if !pending.call.begin_sending() {
            return Ok(None);
        }
        let timeout_ms = pending.call.remaining_ms();
        let (database, origin, base_lsn) = match &pending.request {
            Request::Ask { message, .. } => {
                let message = with_timeout(message.clone(), timeout_ms);
                return Frame::encode(&message, Bytes::new()).map(Some);
            }
            Request::Commit {
                database,
                commit,
                after,
                payload,
            } if !sent_before => {
                let (database, commit, after) = (*database, *commit, *after);
                let message = ClientMessage::Commit {
                    database,
                    commit,
                    streamed_parts: 0,
                    after,
                    timeout_ms,
                };
                return Frame::encode(&message, payload.clone()).map(Some);
            }
            Request::Commit {
                database, commit, ..
            } => (*database, commit.origin, commit.base_lsn),
            Request::BulkCommit {
                database,
                origin,
                base_lsn,
            } => (*database, *origin, *base_lsn),
        };
        let request = self.numbers.fetch_add(1, Ordering::Relaxed);
        self.resolving.insert(request, number);
        let message = ClientMessage::Resolve {
            request,
            database,
            origin,
            base_lsn,
            timeout_ms,
        };
        Frame::encode(&message, Bytes::new()).map(Some)
    }

    /// What the sidecar says, on any stream. Messages that nobody waits for any more are dropped.
    pub(super) fn handle_message(&mut self, message: SidecarMessage) {
        match message {
            SidecarMessage::Progress { sequence, .. } => {
                if let Some(pending) = self.pending.get(&self.asked_for(sequence)) {
                    pending.call.note_progress();
                }
            }
            SidecarMessage::Outcome {
                database,
                sequence,
                outcome,
            } => {
                let resolved = self.resolving.remove(&sequence);
                let number = resolved.unwrap_or(sequence);
                // Of a commit that was sent before: nobody knows, and nothing is certain.
                let outcome = match outcome {
                    CommitOutcome::Behind { .. } if resolved.is_some() => CommitOutcome::Unknown {
                        reason: "the entries that would tell are in no journal".to_owned(),
                    },
                    outcome => outcome,
                };
                self.answer(
                    number,
                    SidecarMessage::Outcome {
                        database,
                        sequence,
                        outcome,
                    },
                );
            }
            SidecarMessage::Opened {
                request, database, ..
            } => {
                self.handle_opened(request, database, message);
            }
            SidecarMessage::Failed {
                request,
                kind,
                message,
            } => {
                self.handle_failed(request, kind, message);
            }
            SidecarMessage::NodeStatus { request, .. }
            | SidecarMessage::DatabaseStatus { request, .. }
            | SidecarMessage::FoundBookmark { request, .. } => self.answer(request, message),
            // Nothing waits for a welcome, nor asks for a replacement; the log is read on streams
            // of its own.
            SidecarMessage::Welcome { .. }
            | SidecarMessage::Replacing { .. }
            | SidecarMessage::LogPart { .. }
            | SidecarMessage::LogEnd { .. } => {}
        }
    }

    /// The call behind a number: a resolve of ours stands for its commit.
    fn asked_for(&self, number: u64) -> u64 {
        self.resolving.get(&number).copied().unwrap_or(number)
    }

    fn handle_opened(&mut self, request: u64, database: DatabaseId, message: SidecarMessage) {
        if let Some(wanted) = self.opening.remove(&request) {
            if wanted == database {
                self.opened.insert(database);
                self.unblock(database);
            } else {
                let text = format!("the database's name now belongs to another log, {database}");
                self.fail_blocked(wanted, FailureKind::UnknownDatabase, &text);
            }
            return;
        }
        if let Some(pending) = self.pending.get(&request)
            && let Request::Ask {
                message: ClientMessage::Open { name, .. },
                ..
            } = &pending.request
        {
            self.names.insert(database, name.clone());
            self.opened.insert(database);
        }
        self.answer(request, message);
    }

    /// A database was opened on a stream of its own.
    pub(super) fn note_opened(&mut self, database: DatabaseId) {
        self.opened.insert(database);
        self.unblock(database);
    }

    fn unblock(&mut self, database: DatabaseId) {
        self.queue
            .extend(self.blocked.remove(&database).unwrap_or_default());
    }

    fn handle_failed(&mut self, request: u64, kind: FailureKind, text: String) {
        if let Some(database) = self.opening.remove(&request) {
            return self.fail_blocked(database, kind, &text);
        }
        let number = self.resolving.remove(&request).unwrap_or(request);
        self.fail(number, kind, text);
    }

    fn fail_blocked(&mut self, database: DatabaseId, kind: FailureKind, text: &str) {
        for number in self.blocked.remove(&database).unwrap_or_default() {
            self.fail(number, kind, text.to_owned());
        }
    }

    fn fail(&mut self, number: u64, kind: FailureKind, text: String) {
        self.answer(
            number,
            SidecarMessage::Failed {
                request: number,
                kind,
                message: text,
            },
        );
    }

    fn answer(&mut self, number: u64, message: SidecarMessage) {
        if let Some(pending) = self.pending.remove(&number) {
            pending.answer.send(Answer::Message(message));
        }
    }
}

fn with_timeout(mut message: ClientMessage, milliseconds: u64) -> ClientMessage {
    if let ClientMessage::Open { timeout_ms, .. } | ClientMessage::Resolve { timeout_ms, .. } =
        &mut message
    {
        *timeout_ms = milliseconds;
    }
    message
}

/// What a failure means for a commit. `resolving` tells whether the commit had been sent before:
/// then a failure of the question says nothing of the commit.
pub(super) fn outcome_of_failure(
    kind: FailureKind,
    reason: String,
    resolving: bool,
) -> CommitOutcome {
    match kind {
        _ if resolving => CommitOutcome::Unknown { reason },
        FailureKind::NotPrimary => CommitOutcome::NotPrimary { reason },
        FailureKind::Forbidden
        | FailureKind::NoQuorum
        | FailureKind::UnknownDatabase
        | FailureKind::NotCovered
        | FailureKind::Other => CommitOutcome::NotCommitted { reason },
    }
}
