//! Deferred commits of this process: handed to the sidecar while nobody waits, and asked for later.
//! Who made them, and in which order they stand, is the shim's affair.

use super::call::Call;
use super::table::{Answer, outcome_of_failure};
use super::{lock, refused, uncertain};
use durovfs_wire::client::{CommitOutcome, SidecarMessage};
use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Instant;

/// One deferred commit.
#[derive(Debug)]
struct Commit {
    call: Arc<Call>,
    outcome: Option<CommitOutcome>,
}

/// All deferred commits of a process whose outcome nobody has taken, by sequence. As many as the
/// shim's windows let in.
#[derive(Debug, Default)]
pub(super) struct DeferredCommits {
    commits: Mutex<HashMap<u64, Commit>>,
    changed: Condvar,
}

impl DeferredCommits {
    /// A commit is about to be handed over.
    pub(super) fn add(&self, sequence: u64, call: Arc<Call>) {
        let outcome = None;
        lock(&self.commits).insert(sequence, Commit { call, outcome });
    }

    /// The runtime thread has an answer for it.
    pub(super) fn answer(&self, sequence: u64, answer: Answer) {
        if let Some(commit) = lock(&self.commits).get_mut(&sequence) {
            commit.outcome = Some(outcome_of(&commit.call, answer));
        }
        self.changed.notify_all();
    }

    /// The commit never reached the runtime thread.
    pub(super) fn withdraw(&self, sequence: u64) {
        lock(&self.commits).remove(&sequence);
    }

    /// Takes the outcome of a commit, if there is one. A commit whose time is over has one:
    /// `trouble` says why.
    pub(super) fn take(
        &self,
        sequence: u64,
        trouble: impl FnOnce() -> String,
    ) -> Option<CommitOutcome> {
        let mut commits = lock(&self.commits);
        let commit = commits.get_mut(&sequence)?;
        let outcome = match commit.outcome.take() {
            Some(outcome) => outcome,
            None if is_over(&commit.call) => uncertain(&commit.call, trouble()),
            None => return None,
        };
        commits.remove(&sequence);
        Some(outcome)
    }

    /// Blocks until a commit has an outcome to take, or somebody took it, or the moment has come.
    pub(super) fn wait(&self, sequence: u64, until: Option<Instant>) {
        let mut commits = lock(&self.commits);
        loop {
            let Some(commit) = commits.get(&sequence) else {
                return;
            };
            if commit.outcome.is_some() || is_over(&commit.call) {
                return;
            }
            let moment = [until, commit.call.deadline()].into_iter().flatten().min();
            commits = match moment {
                None => self
                    .changed
                    .wait(commits)
                    .unwrap_or_else(PoisonError::into_inner),
                Some(moment) => {
                    let left = moment.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return;
                    }
                    let woken = self.changed.wait_timeout(commits, left);
                    woken.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }
}

fn is_over(call: &Call) -> bool {
    call.deadline()
        .is_some_and(|deadline| Instant::now() >= deadline)
}

/// What an answer says of a commit.
pub(super) fn outcome_of(call: &Call, answer: Answer) -> CommitOutcome {
    match answer {
        Answer::Message(SidecarMessage::Outcome { outcome, .. }) => outcome,
        Answer::Message(SidecarMessage::Failed { kind, message, .. }) => {
            outcome_of_failure(kind, message, call.was_sent())
        }
        Answer::Message(other) => uncertain(call, refused(other).message),
        Answer::Refused(reason) => uncertain(call, reason),
    }
}
