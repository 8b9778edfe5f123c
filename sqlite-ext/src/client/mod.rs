//! The client of the sidecar: one connection per process, on a runtime thread of its own. SQLite's
//! threads hand over a call and block until it is answered or their time is over.
//!
//! Nothing here calls SQLite. `docs/architecture.md` tells how it fits the rest.

mod call;
mod deferred;
mod driver;
mod stream;
mod table;
#[cfg(test)]
mod tests;

use crate::config::ClientConfig;
use bytes::Bytes;
use call::{Call, block_on};
use deferred::{DeferredCommits, outcome_of};
use driver::{Command, Setup};
use durovfs_vfs::shim::OWN_THREAD_NAME;
use durovfs_vfs::sink::{OpenedLog, Sink, SinkError, SinkErrorKind};
use durovfs_wire::client::{ClientMessage, CommitOutcome, FailureKind, SidecarMessage};
use durovfs_wire::entry::{CommitHeader, EntryPart, Origin, TransactionSummary};
use durovfs_wire::status::DatabaseStatus;
use durovfs_wire::{ClientId, DatabaseId, Frame, LogPosition, Lsn, PageSize};
use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};
use stream::{STALL_TIMEOUT, Step};
use table::{Answer, Pending, Reply, Request, Table};
use tokio::sync::mpsc::{self, UnboundedSender};
use tokio::sync::oneshot;

/// Largest commit on the shared stream; a larger one would hold up the small ones behind it.
const MAX_SHARED_PAYLOAD_BYTES: usize = 256 << 10;
/// Parts of a log that are read ahead of the caller.
const READ_AHEAD_PARTS: usize = 4;
/// What the runtime thread needs, with room; a host may have made its threads' stacks huge.
const STACK_BYTES: usize = 2 << 20;

/// The client. One per process, however many SQLites are in it.
pub struct Client {
    config: Arc<ClientConfig>,
    description: String,
    first: OnceLock<Box<Process>>,
}

/// All that must be new after a fork. Never dropped: after a fork it is the parent's, and the child
/// must not touch what is behind it.
struct Process {
    pid: u32,
    client: ClientId,
    /// Next number of a commit or a request: one count for both, since answers name either.
    numbers: Arc<AtomicU64>,
    /// Commits that have a stream of their own, and whose last step was not made.
    streamed: Mutex<HashSet<u64>>,
    /// Commits that nobody waits for.
    deferred: Arc<DeferredCommits>,
    commands: Mutex<Option<UnboundedSender<Command>>>,
    /// Why there is no connection.
    trouble: Arc<Mutex<Option<String>>>,
    /// The state of a child of this process.
    child: OnceLock<Box<Process>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is behind these locks is changed in single steps: it is whole, whatever panicked.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Process {
    /// # Panics
    /// When the system has no random bytes to give: a process without an id of its own must not
    /// commit, since its commits could be taken for another's.
    fn new() -> Box<Self> {
        let mut id = [0; 16];
        if let Err(error) = getrandom::fill(&mut id) {
            panic!("the system gives no random bytes: {error}");
        }
        Box::new(Self {
            pid: std::process::id(),
            client: ClientId::from_bytes(id),
            numbers: Arc::new(AtomicU64::new(1)),
            streamed: Mutex::default(),
            deferred: Arc::default(),
            commands: Mutex::default(),
            trouble: Arc::default(),
            child: OnceLock::new(),
        })
    }

    fn next_number(&self) -> u64 {
        self.numbers.fetch_add(1, Ordering::Relaxed)
    }
}

impl Client {
    /// A client that connects when it is first needed. `description` is for people.
    pub fn new(config: ClientConfig, description: String) -> Self {
        Self {
            config: Arc::new(config),
            description,
            first: OnceLock::new(),
        }
    }

    /// Its configuration.
    pub fn config(&self) -> &ClientConfig {
        &self.config
    }

    /// State of a database, as its sidecar sees it; none when it knows no database of that name.
    ///
    /// # Errors
    /// When the sidecar is not reached, or refuses.
    pub fn database_status(
        &self,
        name: &str,
        timeout: Duration,
    ) -> Result<Option<DatabaseStatus>, SinkError> {
        let name = name.to_owned();
        let message = |request| ClientMessage::DatabaseStatus { request, name };
        match self.ask(None, Some(timeout), message)? {
            SidecarMessage::DatabaseStatus { status, .. } => Ok(status),
            other => Err(refused(other)),
        }
    }

    /// Position of the last commit at or before a moment, as people write it.
    ///
    /// # Errors
    /// When the sidecar is not reached, or the moment is not covered.
    pub fn find_bookmark(
        &self,
        database: DatabaseId,
        when: &str,
        timeout: Duration,
    ) -> Result<LogPosition, SinkError> {
        let when = when.to_owned();
        let message = |request| ClientMessage::FindBookmark {
            request,
            database,
            when,
        };
        match self.ask(Some(database), Some(timeout), message)? {
            SidecarMessage::FoundBookmark {
                bookmark: Ok(position),
                ..
            } => Ok(position),
            SidecarMessage::FoundBookmark {
                bookmark: Err(message),
                ..
            } => Err(SinkError {
                kind: SinkErrorKind::Refused(FailureKind::NotCovered),
                message,
            }),
            other => Err(refused(other)),
        }
    }

    /// Why a call came to nothing, for people.
    fn trouble(&self, process: &Process) -> String {
        lock(&process.trouble).clone().unwrap_or_else(|| {
            format!(
                "sidecar {} at {} does not answer in time",
                self.config.node, self.config.sidecar
            )
        })
    }

    /// The state of this process: made at the first call, and again by a child after a fork.
    fn process(&self) -> &Process {
        let pid = std::process::id();
        let mut process = self.first.get_or_init(Process::new);
        while process.pid != pid {
            process = process.child.get_or_init(Process::new);
        }
        process
    }

    /// Hands a command to the runtime thread; starts the thread if it does not run.
    fn hand_over(&self, process: &Process, command: Command) -> Result<(), SinkError> {
        let mut commands = lock(&process.commands);
        // A closed channel: the thread ended by a panic, and a new one starts afresh.
        let sender = match commands.take().filter(|sender| !sender.is_closed()) {
            Some(sender) => sender,
            None => self.start(process)?,
        };
        let sent = commands.insert(sender).send(command);
        sent.map_err(|_| unreachable_error("the client has stopped".to_owned()))
    }

    fn start(&self, process: &Process) -> Result<UnboundedSender<Command>, SinkError> {
        let hello = ClientMessage::Hello {
            client: process.client,
            description: format!("{}, pid {}", self.description, process.pid),
        };
        let setup = Setup {
            config: self.config.clone(),
            table: Table::new(process.numbers.clone()),
            hello: Frame::encode(&hello, Bytes::new())
                .map_err(|error| unreachable_error(error.to_string()))?,
            trouble: process.trouble.clone(),
        };
        let (sender, commands) = mpsc::unbounded_channel();
        let body = move || driver::run(setup, commands);
        let builder = std::thread::Builder::new()
            .name(OWN_THREAD_NAME.to_owned())
            .stack_size(STACK_BYTES);
        // The handle is dropped: the thread ends with the process, and nobody waits for it.
        crate::spawn_without_signals(builder, body)
            .map_err(|error| unreachable_error(format!("start the client's thread: {error}")))?;
        Ok(sender)
    }

    /// Asks a question that may be asked again, and waits for the answer.
    fn ask(
        &self,
        database: Option<DatabaseId>,
        timeout: Option<Duration>,
        message: impl FnOnce(u64) -> ClientMessage,
    ) -> Result<SidecarMessage, SinkError> {
        let process = self.process();
        let number = process.next_number();
        let request = Request::Ask {
            message: message(number),
            database,
        };
        let call = Arc::new(Call::new(timeout));
        let answer = self.enter(process, number, &call, request)?;
        match self.wait(process, number, &call, answer) {
            Some(Answer::Message(message)) => Ok(message),
            Some(Answer::Refused(reason)) => Err(unreachable_error(reason)),
            None => Err(unreachable_error(self.trouble(process))),
        }
    }

    fn enter(
        &self,
        process: &Process,
        number: u64,
        call: &Arc<Call>,
        request: Request,
    ) -> Result<oneshot::Receiver<Answer>, SinkError> {
        let (sender, answer) = oneshot::channel();
        let pending = Pending {
            call: call.clone(),
            request,
            answer: Reply::Caller(sender),
        };
        self.hand_over(process, Command::Call { number, pending })?;
        Ok(answer)
    }

    /// Waits for the answer; none when the time is over or the runtime thread is gone.
    fn wait(
        &self,
        process: &Process,
        number: u64,
        call: &Call,
        answer: oneshot::Receiver<Answer>,
    ) -> Option<Answer> {
        match block_on(answer, || call.deadline()) {
            Some(Ok(answer)) => Some(answer),
            Some(Err(_)) => None,
            None => {
                // Without a thread there is nothing to forget.
                let _ = self.hand_over(process, Command::Forget { number });
                None
            }
        }
    }

    /// Waits for what becomes of a commit that was handed over.
    fn wait_for_outcome(
        &self,
        process: &Process,
        number: u64,
        call: &Call,
        answer: oneshot::Receiver<Answer>,
    ) -> CommitOutcome {
        match self.wait(process, number, call, answer) {
            Some(answer) => outcome_of(call, answer),
            None => uncertain(call, self.trouble(process)),
        }
    }
}

/// The outcome of a commit without an answer: certain only when it was never sent, and now never
/// will be.
fn uncertain(call: &Call, reason: String) -> CommitOutcome {
    if call.withdraw() {
        CommitOutcome::NotCommitted { reason }
    } else {
        CommitOutcome::Unknown { reason }
    }
}

fn unreachable_error(message: String) -> SinkError {
    SinkError {
        kind: SinkErrorKind::Unreachable,
        message,
    }
}

/// The error in an answer that is not the one asked for.
fn refused(answer: SidecarMessage) -> SinkError {
    match answer {
        SidecarMessage::Failed { kind, message, .. } => SinkError {
            kind: SinkErrorKind::Refused(kind),
            message,
        },
        _ => SinkError {
            kind: SinkErrorKind::Refused(FailureKind::Other),
            message: "the sidecar answered another question".to_owned(),
        },
    }
}

impl Client {
    fn open_log(
        &self,
        name: &str,
        known: Option<DatabaseId>,
        force: bool,
        timeout: Option<Duration>,
    ) -> Result<OpenedLog, SinkError> {
        let name = name.to_owned();
        // The time is filled in when it is sent.
        let message = |request| ClientMessage::Open {
            request,
            name,
            known,
            force,
            must_exist: false,
            timeout_ms: 0,
        };
        match self.ask(None, timeout, message)? {
            SidecarMessage::Opened {
                database,
                epoch,
                end,
                last_transaction,
                ..
            } => Ok(OpenedLog {
                database,
                epoch,
                end,
                last_transaction,
            }),
            other => Err(refused(other)),
        }
    }

    /// Reads a log to its end; without `pages` each transaction as its last part alone.
    fn read_parts(
        &self,
        database: DatabaseId,
        first_lsn: Lsn,
        pages: bool,
        visit: &mut dyn FnMut(EntryPart) -> Result<(), SinkError>,
    ) -> Result<(), SinkError> {
        let process = self.process();
        let (sender, mut parts) = mpsc::channel(READ_AHEAD_PARTS);
        self.hand_over(
            process,
            Command::ReadLog {
                database,
                first_lsn,
                pages,
                parts: sender,
            },
        )?;
        loop {
            let deadline = Instant::now() + 2 * STALL_TIMEOUT;
            match block_on(parts.recv(), || Some(deadline)) {
                Some(Some(Ok(Some(part)))) => visit(part)?,
                // A sign of life.
                Some(Some(Ok(None))) => {}
                Some(Some(Err(error))) => return Err(error),
                Some(None) => return Ok(()),
                None => return Err(unreachable_error("the log does not go on".to_owned())),
            }
        }
    }
}

impl Sink for Client {
    fn open(
        &self,
        name: &str,
        known: Option<DatabaseId>,
        timeout: Option<Duration>,
    ) -> Result<OpenedLog, SinkError> {
        self.open_log(name, known, false, timeout)
    }

    fn take_over(
        &self,
        name: &str,
        known: Option<DatabaseId>,
        timeout: Option<Duration>,
    ) -> Result<OpenedLog, SinkError> {
        self.open_log(name, known, true, timeout)
    }

    fn next_origin(&self) -> Origin {
        let process = self.process();
        Origin {
            client: process.client,
            sequence: process.next_number(),
        }
    }

    fn send_pages(
        &self,
        database: DatabaseId,
        origin: Origin,
        page_size: PageSize,
        payload: Bytes,
    ) -> Result<(), SinkError> {
        let process = self.process();
        let sequence = origin.sequence;
        lock(&process.streamed).insert(sequence);
        let (done, sent) = oneshot::channel();
        let step = Step::Pages {
            page_size,
            payload,
            done,
        };
        self.hand_over(
            process,
            Command::Step {
                database,
                sequence,
                step,
            },
        )?;
        // The runtime thread keeps the time of each of its waits; this is for the case that it is
        // gone, or does not run.
        let deadline = Instant::now() + 3 * STALL_TIMEOUT;
        match block_on(sent, || Some(deadline)) {
            Some(Ok(sent)) => sent,
            Some(Err(_)) | None => Err(unreachable_error(self.trouble(process))),
        }
    }

    fn abort(&self, database: DatabaseId, origin: Origin) {
        let process = self.process();
        let sequence = origin.sequence;
        if lock(&process.streamed).remove(&sequence) {
            let command = Command::Step {
                database,
                sequence,
                step: Step::Abort,
            };
            // Without a thread there is no stream to end.
            let _ = self.hand_over(process, command);
        }
    }

    fn commit(
        &self,
        database: DatabaseId,
        commit: CommitHeader,
        payload: Bytes,
        timeout: Option<Duration>,
    ) -> CommitOutcome {
        let process = self.process();
        let (origin, base_lsn) = (commit.origin, commit.base_lsn);
        let number = origin.sequence;
        if origin.client != process.client {
            // The pages that the parent streamed, and its count, are not this process's.
            let reason = "the transaction was begun before a fork".to_owned();
            return CommitOutcome::NotCommitted { reason };
        }
        let own_stream =
            lock(&process.streamed).remove(&number) || payload.len() > MAX_SHARED_PAYLOAD_BYTES;
        let call = Arc::new(Call::new(timeout));
        let entered = if own_stream {
            let request = Request::BulkCommit {
                database,
                origin,
                base_lsn,
            };
            self.enter(process, number, &call, request)
                .and_then(|answer| {
                    let step = Step::Commit {
                        call: call.clone(),
                        commit,
                        payload,
                    };
                    let command = Command::Step {
                        database,
                        sequence: number,
                        step,
                    };
                    self.hand_over(process, command).map(|()| answer)
                })
        } else {
            self.enter(
                process,
                number,
                &call,
                Request::Commit {
                    database,
                    commit,
                    after: None,
                    payload,
                },
            )
        };
        match entered {
            Ok(answer) => self.wait_for_outcome(process, number, &call, answer),
            Err(error) => uncertain(&call, error.message),
        }
    }

    fn commit_deferred(
        &self,
        database: DatabaseId,
        commit: CommitHeader,
        after: Option<u64>,
        payload: Bytes,
        timeout: Option<Duration>,
    ) -> Result<(), SinkError> {
        let process = self.process();
        let sequence = commit.origin.sequence;
        if commit.origin.client != process.client {
            let reason = "the transaction was begun before a fork".to_owned();
            return Err(unreachable_error(reason));
        }
        let call = Arc::new(Call::new(timeout));
        process.deferred.add(sequence, call.clone());
        let commits = process.deferred.clone();
        let pending = Pending {
            call,
            request: Request::Commit {
                database,
                commit,
                after,
                payload,
            },
            answer: Reply::Deferred { commits, sequence },
        };
        let number = sequence;
        self.hand_over(process, Command::Call { number, pending })
            .inspect_err(|_| process.deferred.withdraw(sequence))
    }

    fn is_own(&self, origin: Origin) -> bool {
        origin.client == self.process().client
    }

    fn take_deferred(&self, origin: Origin) -> Option<CommitOutcome> {
        let process = self.process();
        let trouble = || self.trouble(process);
        let outcome = process.deferred.take(origin.sequence, trouble);
        if let Some(CommitOutcome::Unknown { .. }) = &outcome {
            // Nobody asks for it again; without a thread there is nothing to forget.
            let number = origin.sequence;
            let _ = self.hand_over(process, Command::Forget { number });
        }
        outcome
    }

    fn wait_deferred(&self, origin: Origin, until: Option<Instant>) {
        self.process().deferred.wait(origin.sequence, until);
    }

    fn resolve(
        &self,
        database: DatabaseId,
        origin: Origin,
        base_lsn: Lsn,
        timeout: Option<Duration>,
    ) -> CommitOutcome {
        let message = |request| ClientMessage::Resolve {
            request,
            database,
            origin,
            base_lsn,
            timeout_ms: 0, // filled in when it is sent
        };
        // Whatever goes wrong with the question, the commit stays what it was.
        match self.ask(Some(database), timeout, message) {
            Ok(SidecarMessage::Outcome { outcome, .. }) => outcome,
            Ok(SidecarMessage::Failed {
                kind: FailureKind::NotPrimary,
                message,
                ..
            }) => CommitOutcome::NotPrimary { reason: message },
            Ok(other) => CommitOutcome::Unknown {
                reason: refused(other).message,
            },
            Err(error) => CommitOutcome::Unknown {
                reason: error.message,
            },
        }
    }

    fn read_log(
        &self,
        database: DatabaseId,
        first_lsn: Lsn,
        visit: &mut dyn FnMut(EntryPart) -> Result<(), SinkError>,
    ) -> Result<(), SinkError> {
        self.read_parts(database, first_lsn, true, visit)
    }

    fn read_summaries(
        &self,
        database: DatabaseId,
        first_lsn: Lsn,
        visit: &mut dyn FnMut(TransactionSummary) -> Result<(), SinkError>,
    ) -> Result<(), SinkError> {
        self.read_parts(database, first_lsn, false, &mut |part| {
            part.header.transaction().map_or(Ok(()), &mut *visit)
        })
    }
}
