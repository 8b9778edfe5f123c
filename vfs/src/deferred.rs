//! Deferred durability: COMMIT returns after the local write, and the quorum's answer is waited for
//! later (DESIGN §7). Here is the queue of what is unconfirmed, and the waiting for it; what open
//! does with commits that were lost is in `open.rs`.
//!
//! The rules that keep the local file mendable:
//! - The mark says what the file goes back to (the confirmed tip) before the first byte of an
//!   unconfirmed commit can be found in the WAL.
//! - No unconfirmed frame is moved into the database file: a checkpoint waits for all of them
//!   first, and notes that in the mark. So cutting the WAL takes a lost commit back.
//! - One process at a time has unconfirmed commits; whoever comes after it waits for them.

use crate::commit_gate::Prepared;
use crate::connection::{Connection, LogLevel};
use crate::error::{Refusal, RefusalKind};
use crate::file::BaseFile;
use crate::mark::{KnownTransaction, Mark, MarkState, Tip, Unconfirmed, WalPosition};
use crate::sink::Sink;
use durovfs_wire::client::CommitOutcome;
use durovfs_wire::{DatabaseId, LogPosition, Origin};
use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Unconfirmed bytes per database and process: a few round trips at the speed of a fast disk. A
/// COMMIT that would exceed it waits for room.
pub const WINDOW_BYTES: usize = 8 << 20;
/// Unconfirmed commits per database and process; fewer than the sidecar takes.
pub const WINDOW_COMMITS: usize = 1024;
/// Larger commits wait for the quorum: sending them takes longer than the wait.
const COMMIT_BYTES_MAX: usize = 256 << 10;
/// Pause between two looks at the log for another process's commits.
const FOREIGN_PAUSE: Duration = Duration::from_millis(5);

/// When COMMIT returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Durability {
    /// When a quorum has it on disk.
    #[default]
    Quorum,
    /// When the local file has it; `durovfs_wait()` waits for the quorum.
    Deferred,
}

impl Durability {
    /// The word in pragma, URI and status.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Quorum => "quorum",
            Self::Deferred => "deferred",
        }
    }

    /// By its word, in any case.
    pub fn parse(text: &str) -> Option<Self> {
        [Self::Quorum, Self::Deferred]
            .into_iter()
            .find(|durability| text.trim().eq_ignore_ascii_case(durability.name()))
    }
}

/// One unconfirmed commit.
#[derive(Debug, Clone, Copy)]
struct Sent {
    origin: Origin,
    /// The file after it; its position is not known yet.
    tip: Tip,
    bytes: usize,
}

/// The unconfirmed commits of one database that this process made, oldest first.
#[derive(Debug, Default)]
struct Queue {
    commits: VecDeque<Sent>,
    bytes: usize,
    /// The newest that is confirmed, and its origin.
    confirmed: Option<(Origin, Tip)>,
    /// Why the rest never will be.
    lost: Option<Refusal>,
    /// Holds off other processes while something is unconfirmed.
    owner: Option<File>,
}

type SharedQueue = Arc<Mutex<Queue>>;

/// By process (a child after a fork has commits of its own only) and log.
static QUEUES: LazyLock<Mutex<HashMap<(u32, DatabaseId), SharedQueue>>> =
    LazyLock::new(Mutex::default);
/// Whether this process ever made a deferred commit; without one nothing is looked up.
static IN_USE: AtomicBool = AtomicBool::new(false);

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn queue_of(database: DatabaseId) -> Option<SharedQueue> {
    if !IN_USE.load(Ordering::Acquire) {
        return None;
    }
    let key = (std::process::id(), database);
    locked(&QUEUES).get(&key).cloned()
}

fn queue_for(database: DatabaseId) -> SharedQueue {
    IN_USE.store(true, Ordering::Release);
    let key = (std::process::id(), database);
    Arc::clone(locked(&QUEUES).entry(key).or_default())
}

/// Nothing of this process is unconfirmed any more: the local file was put right.
pub(crate) fn forget(database: DatabaseId) {
    let key = (std::process::id(), database);
    locked(&QUEUES).remove(&key);
}

/// Why commits of this process were lost, if some were.
pub fn lost(sink: &dyn Sink, database: DatabaseId) -> Option<Refusal> {
    let queue = queue_of(database)?;
    let mut queue = locked(&queue);
    queue.poll(sink);
    queue.lost.clone()
}

impl Queue {
    /// Takes the outcomes that are there.
    fn poll(&mut self, sink: &dyn Sink) {
        while self.lost.is_none()
            && let Some(oldest) = self.commits.front().copied()
            && let Some(outcome) = sink.take_deferred(oldest.origin)
        {
            match outcome {
                CommitOutcome::Committed { position } => {
                    self.commits.pop_front();
                    self.bytes -= oldest.bytes;
                    let last = KnownTransaction {
                        position,
                        ..oldest.tip.last
                    };
                    self.confirmed = Some((oldest.origin, Tip { last, ..oldest.tip }));
                }
                outcome => self.lost = Some(loss(outcome, self.commits.len())),
            }
        }
        if self.commits.is_empty() {
            self.owner = None;
        }
    }

    fn has_room(&self, bytes: usize) -> bool {
        self.commits.len() < WINDOW_COMMITS
            && (self.commits.is_empty() || self.bytes + bytes <= WINDOW_BYTES)
    }
}

fn loss(outcome: CommitOutcome, commits: usize) -> Refusal {
    let (kind, reason) = match outcome {
        CommitOutcome::Unknown { reason } => (RefusalKind::Unknown, reason),
        CommitOutcome::NotPrimary { reason } => (RefusalKind::NotPrimary, reason),
        CommitOutcome::NotCommitted { reason } => (RefusalKind::NotCommitted, reason),
        CommitOutcome::Behind { last_transaction } => {
            let position = last_transaction.position;
            let reason = format!("the log is ahead, at {position}");
            (RefusalKind::NotCommitted, reason)
        }
        // The callers have handled it.
        CommitOutcome::Committed { position } => {
            let reason = format!("{position} is committed");
            (RefusalKind::Unknown, reason)
        }
    };
    let message = format!(
        "{commits} deferred commits were not confirmed ({reason}); close all connections and open \
         the database again, it then holds what the quorum has"
    );
    Refusal::new(kind, message)
}

/// Waits until `through`, a deferred commit of this process, is confirmed, with all before it.
/// Returns the newest confirmed position.
///
/// # Errors
/// When they are lost, or the time is over.
fn wait_own(
    sink: &dyn Sink,
    queue: &Mutex<Queue>,
    through: Origin,
    timeout: Option<Duration>,
) -> Result<Option<(Origin, Tip)>, Refusal> {
    let until = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
    loop {
        let oldest = {
            let mut queue = locked(queue);
            queue.poll(sink);
            if let Some(refusal) = &queue.lost {
                return Err(refusal.clone());
            }
            match queue.commits.front() {
                Some(oldest) if oldest.origin.sequence <= through.sequence => oldest.origin,
                _ => return Ok(queue.confirmed),
            }
        };
        if until.is_some_and(|until| Instant::now() >= until) {
            return Err(Refusal::not_committed(
                "deferred commits are not confirmed yet: the time is over; nothing is given up",
            ));
        }
        // Not under the lock: others of this process go on committing.
        sink.wait_deferred(oldest, until);
    }
}

/// Waits until a commit of another process of this host is confirmed. As long as that process
/// lives its commits may still be on their way; after that the log decides.
fn wait_foreign(
    sink: &dyn Sink,
    mark: &Mark,
    state: &MarkState,
    unconfirmed: &Unconfirmed,
    timeout: Option<Duration>,
) -> Result<LogPosition, Refusal> {
    let until = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
    let base_lsn = unconfirmed.confirmed.last.position.lsn;
    loop {
        let log = sink
            .open(mark.name(), Some(state.database), timeout)
            .map_err(|error| Refusal::not_committed(error.message))?;
        if let Some(last) = log.last_transaction
            && last.commit.origin == unconfirmed.newest
        {
            return Ok(last.position);
        }
        if mark.try_own()?.is_some() {
            return match sink.resolve(state.database, unconfirmed.newest, base_lsn, timeout) {
                CommitOutcome::Committed { position } => Ok(position),
                outcome => Err(loss(outcome, 1)),
            };
        }
        if until.is_some_and(|until| Instant::now() >= until) {
            return Err(Refusal::not_committed(
                "another process has deferred commits that are not confirmed yet: try again",
            ));
        }
        std::thread::sleep(FOREIGN_PAUSE);
    }
}

/// Waits until all deferred commits that the mark tells of are confirmed, whoever made them.
pub(crate) fn wait_all(
    sink: &dyn Sink,
    mark: &Mark,
    state: &MarkState,
    timeout: Option<Duration>,
) -> Result<Option<LogPosition>, Refusal> {
    let Some(unconfirmed) = &state.unconfirmed else {
        return Ok(None);
    };
    if let Some((newest, tip)) = mark.confirmation()?
        && newest == unconfirmed.newest
    {
        return Ok(Some(tip.last.position));
    }
    if !sink.is_own(unconfirmed.newest) {
        return wait_foreign(sink, mark, state, unconfirmed, timeout).map(Some);
    }
    let Some(queue) = queue_of(state.database) else {
        return Err(crate::mark::misuse("an unconfirmed commit without a queue"));
    };
    match wait_own(sink, &queue, unconfirmed.newest, timeout)? {
        Some((newest, tip)) if newest.sequence >= unconfirmed.newest.sequence => {
            Ok(Some(tip.last.position))
        }
        // A commit that was noted in the mark and then refused: it is in no log.
        _ => Err(loss(
            CommitOutcome::NotCommitted {
                reason: "the newest was never sent".to_owned(),
            },
            1,
        )),
    }
}

impl MarkState {
    /// All is confirmed, the newest at this position.
    pub(crate) fn note_confirmed(&mut self, position: LogPosition) {
        self.unconfirmed = None;
        if let Some(last) = &mut self.last {
            last.position = position;
        }
    }
}

impl Connection {
    /// When COMMIT returns.
    pub fn durability(&self) -> Durability {
        self.durability
    }

    /// Changes when COMMIT returns, from the next transaction on.
    pub fn set_durability(&mut self, durability: Durability) {
        self.durability = durability;
    }

    /// Why statements must fail: commits that this connection shows were lost.
    pub fn check_not_lost(&mut self) -> Result<(), Refusal> {
        match lost(self.surroundings.sink.as_ref(), self.database_id) {
            // Every statement comes here: the log tells it once.
            Some(refusal) if self.last_error == refusal.message => Err(refusal),
            Some(refusal) => Err(self.noted(refusal)),
            None => Ok(()),
        }
    }

    /// Brings the state level with what is confirmed of this process's commits; waits for those of
    /// another. SQLite's write lock is held.
    pub(crate) fn settle_deferred(&mut self, state: &mut MarkState) -> Result<(), Refusal> {
        let Some(unconfirmed) = state.unconfirmed else {
            return Ok(());
        };
        let sink = Arc::clone(&self.surroundings.sink);
        if sink.is_own(unconfirmed.newest) {
            self.fold_confirmed(state, unconfirmed)
        } else {
            self.confirm_all(state)
        }
    }

    fn fold_confirmed(
        &mut self,
        state: &mut MarkState,
        unconfirmed: Unconfirmed,
    ) -> Result<(), Refusal> {
        let Some(queue) = queue_of(state.database) else {
            return self.confirm_all(state);
        };
        let mut queue = locked(&queue);
        queue.poll(self.surroundings.sink.as_ref());
        if let Some(refusal) = &queue.lost {
            return Err(refusal.clone());
        }
        if let Some((newest, tip)) = queue.confirmed {
            if newest == unconfirmed.newest {
                state.note_confirmed(tip.last.position);
            } else if tip.last.position.lsn > unconfirmed.confirmed.last.position.lsn {
                state.unconfirmed = Some(Unconfirmed {
                    confirmed: tip,
                    ..unconfirmed
                });
                if let Some(last) = &mut state.last {
                    last.position = tip.last.position;
                }
            }
        }
        Ok(())
    }

    /// Waits until all is confirmed that the state tells of.
    pub(crate) fn confirm_all(&mut self, state: &mut MarkState) -> Result<(), Refusal> {
        let sink = Arc::clone(&self.surroundings.sink);
        let confirmed = wait_all(sink.as_ref(), &self.mark, state, self.timeout())?;
        if let Some(position) = confirmed {
            state.note_confirmed(position);
            self.mark.write(state)?;
        }
        Ok(())
    }

    /// Before a checkpoint writes into the database file: what it moves can no longer be cut off.
    pub(crate) fn confirm_for_checkpoint(&mut self) -> Result<(), Refusal> {
        let state = self.mark.read()?;
        let (Some(unconfirmed), Some(last)) = (state.unconfirmed, state.last) else {
            return Ok(());
        };
        let sink = Arc::clone(&self.surroundings.sink);
        let Some(position) = wait_all(sink.as_ref(), &self.mark, &state, self.timeout())? else {
            return Ok(());
        };
        let last = KnownTransaction { position, ..last };
        let wal = state.wal;
        self.mark.confirm(unconfirmed.newest, &Tip { last, wal })
    }

    /// Whether the prepared commit may return before the quorum has it. Waits for room.
    pub(crate) fn may_defer(&mut self, prepared: &Prepared) -> Result<bool, Refusal> {
        let bytes = prepared.payload.len();
        if self.durability == Durability::Quorum || prepared.streamed || bytes > COMMIT_BYTES_MAX {
            return Ok(false);
        }
        let queue = queue_for(prepared.base.database);
        let sink = Arc::clone(&self.surroundings.sink);
        let until = self
            .timeout()
            .and_then(|timeout| Instant::now().checked_add(timeout));
        loop {
            let oldest = {
                let mut queue = locked(&queue);
                queue.poll(sink.as_ref());
                if let Some(refusal) = &queue.lost {
                    return Err(refusal.clone());
                }
                if queue.owner.is_none() {
                    queue.owner = self.mark.try_own()?;
                }
                match queue.commits.front() {
                    // Another process of this host has the window: this one waits for the quorum.
                    _ if queue.owner.is_none() => return Ok(false),
                    Some(oldest) if !queue.has_room(bytes) => oldest.origin,
                    _ => return Ok(true),
                }
            };
            if until.is_some_and(|until| Instant::now() >= until) {
                return Err(Refusal::not_committed(
                    "the window of deferred commits is full, and none was confirmed in time",
                ));
            }
            sink.wait_deferred(oldest, until);
        }
    }

    /// Writes the held commit to the local file, and hands it to the sidecar without waiting.
    pub(crate) fn commit_deferred(
        &mut self,
        wal: &dyn BaseFile,
        mut prepared: Prepared,
    ) -> Result<(), Refusal> {
        let mut base = prepared.base;
        self.settle_deferred(&mut base)?;
        let Some(last) = base.last else {
            return Err(crate::mark::misuse("deferred commit without a base"));
        };
        let origin = prepared.commit.origin;
        let confirmed = match base.unconfirmed {
            Some(unconfirmed) => unconfirmed.confirmed,
            None => Tip {
                last,
                wal: base.wal,
            },
        };
        prepared.commit.base_lsn = confirmed.last.position.lsn;
        let after = base.unconfirmed.map(|u| u.newest.sequence);
        let unconfirmed = Some(Unconfirmed {
            newest: origin,
            confirmed,
        });
        // Before the frame: who finds it after a crash must know what to go back to.
        self.mark.write(&MarkState {
            unconfirmed,
            ..base
        })?;
        if let Err(refusal) = self.release_held(wal) {
            self.mark.write(&base)?;
            return Err(refusal);
        }
        let tip = Tip {
            last: prepared.known_at(last.position),
            wal: Some(prepared.completion_end),
        };
        let state = MarkState {
            last: Some(tip.last),
            wal: tip.wal,
            unconfirmed,
            ..base
        };
        self.note_taken_over(&prepared, &state);
        self.hand_over_deferred(prepared, tip, after);
        Ok(())
    }

    fn hand_over_deferred(&mut self, prepared: Prepared, tip: Tip, after: Option<u64>) {
        let Prepared {
            base,
            commit,
            payload,
            ..
        } = prepared;
        let queue = queue_for(base.database);
        let mut queue = locked(&queue);
        queue.commits.push_back(Sent {
            origin: commit.origin,
            tip,
            bytes: payload.len(),
        });
        queue.bytes += payload.len();
        let sink = &self.surroundings.sink;
        let sent = sink.commit_deferred(base.database, commit, after, payload, self.timeout());
        if let Err(error) = sent {
            let reason = error.message;
            let refusal = loss(CommitOutcome::NotCommitted { reason }, queue.commits.len());
            (self.surroundings.log)(LogLevel::Error, &refusal.message);
            queue.lost = Some(refusal);
        }
    }

    /// Position of the newest confirmed commit of a file whose mark has this state.
    pub(crate) fn confirmed_position(&self, state: &MarkState) -> LogPosition {
        let marked = state.last.map_or(LogPosition::ZERO, |last| last.position);
        let Some(unconfirmed) = state.unconfirmed else {
            return marked;
        };
        let sink = self.surroundings.sink.as_ref();
        let own = queue_of(state.database)
            .filter(|_| sink.is_own(unconfirmed.newest))
            .and_then(|queue| {
                let mut queue = locked(&queue);
                queue.poll(sink);
                queue.confirmed
            });
        own.map_or(marked, |(_, tip)| tip.last.position.max(marked))
    }
}

/// Waits until every deferred commit of a database is confirmed, as its mark tells of them.
/// Returns the newest confirmed position; none when nothing was unconfirmed.
///
/// # Errors
/// A refusal: they are lost, or the time is over.
pub fn wait_confirmed(
    sink: &dyn Sink,
    database_path: &std::path::Path,
    timeout: Option<Duration>,
) -> Result<Option<LogPosition>, Refusal> {
    let Some((mark, state)) = Mark::open(database_path)? else {
        return Ok(None);
    };
    if let Some(refusal) = lost(sink, state.database) {
        return Err(refusal);
    }
    wait_all(sink, &mark, &state, timeout)
}

/// Where a WAL is cut to go back to a tip: after this frame of this generation, or before all when
/// it is of another.
pub(crate) fn cut_frame(tip: &Tip, salts: durovfs_wire::wal::WalSalts) -> u32 {
    match &tip.wal {
        Some(WalPosition {
            salts: marked,
            frame,
            ..
        }) if *marked == salts => *frame,
        _ => 0,
    }
}
