//! One log on this node as replica: the state machine bound to the journal.
//!
//! Here stands the order that everything rests on: a promise is on disk before it is told, an entry
//! is on disk before it is acked, and what is dropped was written down as archived before. No
//! network, no runtime, no clock: the daemon and the simulator both drive this struct.

#[cfg(test)]
mod tests;

use durovfs_journal::{DatabaseState, Journal, JournalError, Record};
use durovfs_quorum::{AppendVerdict, ProtocolViolation, Replica, ReplicaEffect, ReplicaState};
use durovfs_wire::peer::{Claim, RejectReason, ReplicaMessage};
use durovfs_wire::{
    DatabaseId, EntryPart, Epoch, LogPosition, Lsn, Membership, NodeName, ReplicaId,
};
use std::sync::Arc;

/// What the journal did for a log. Goes back to its [`ReplicaLog::handle_notice`].
#[derive(Debug, Clone)]
pub struct Notice {
    /// Of this log.
    pub database: DatabaseId,
    /// Which of the log's machines wanted it written.
    machine: u64,
    /// What was to be written.
    what: Written,
    /// What became of it.
    result: Result<(), JournalError>,
}

#[derive(Debug, Clone, Copy)]
enum Written {
    Part {
        position: LogPosition,
        epoch: Epoch,
        complete: bool,
    },
    Promise {
        token: u64,
    },
    /// Who votes.
    Membership,
    Progress {
        drop_through: Lsn,
    },
    /// What damage took, so that nothing builds on it.
    Damaged,
    /// That the log is whole again.
    Mended,
}

/// Takes notices, in the order in which the journal gives them. Runs on the journal's thread: it
/// must be short, and not block.
pub type NoticeSink = Arc<dyn Fn(Notice) + Send + Sync>;

/// What an append says of the primary that sent it.
#[derive(Debug, Clone, Copy)]
pub struct AppendContext {
    /// Generation of the membership that it goes by.
    pub generation: u32,
    /// Its epoch.
    pub epoch: Epoch,
    /// The entry before the one sent.
    pub previous: LogPosition,
    /// Known committed there.
    pub commit_lsn: Lsn,
    /// Known archived there.
    pub archive_lsn: Lsn,
}

/// Why an append was not taken.
#[derive(Debug, thiserror::Error)]
pub enum AppendRefused {
    /// A normal answer.
    #[error("{0:?}")]
    Rejected(RejectReason),
    /// The primary is at fault: its payload is malformed, or it broke the protocol.
    #[error("{0}")]
    Violation(String),
}

impl AppendRefused {
    /// What the primary is told.
    pub fn into_reason(self) -> RejectReason {
        match self {
            Self::Rejected(reason) => reason,
            Self::Violation(message) => RejectReason::Storage { message },
        }
    }
}

impl From<ProtocolViolation> for AppendRefused {
    fn from(violation: ProtocolViolation) -> Self {
        Self::Violation(violation.to_string())
    }
}

/// One log that this node keeps entries of for another.
///
/// Call a `handle_*`, then [`ReplicaLog::poll_message`] until it gives nothing.
pub struct ReplicaLog {
    database: DatabaseId,
    machine: Replica,
    /// How many machines there were before this one.
    machine_number: u64,
    journal: Journal,
    notices: NoticeSink,
    /// What the journal was last told may go.
    noted_archive_lsn: Lsn,
    /// An entry that cannot be read, until the journal has noted it.
    damage: Option<JournalError>,
}

impl ReplicaLog {
    /// As the journal has it. `drawn` is the identity to take when it has none.
    ///
    /// # Panics
    /// When the state contradicts itself.
    pub fn from_journal(
        journal: Journal,
        notices: NoticeSink,
        state: &DatabaseState,
        drawn: ReplicaId,
    ) -> Self {
        Self {
            database: state.database,
            machine: Replica::new(state.database, persisted(state, drawn)),
            machine_number: 0,
            journal,
            notices,
            noted_archive_lsn: state.archive_lsn,
            damage: None,
        }
    }

    /// A log that the journal knows nothing of: a new replica, whose identity is `drawn` at random.
    pub fn unheard_of(
        journal: Journal,
        notices: NoticeSink,
        database: DatabaseId,
        drawn: ReplicaId,
    ) -> Self {
        Self {
            database,
            machine: Replica::new(database, ReplicaState::unheard_of(drawn)),
            machine_number: 0,
            journal,
            notices,
            noted_archive_lsn: Lsn::ZERO,
            damage: None,
        }
    }

    /// The state machine, to be looked at.
    pub fn machine(&self) -> &Replica {
        &self.machine
    }

    /// A claim came, from a node that may claim now.
    pub fn handle_claim(&mut self, from: &NodeName, claim: &Claim) {
        self.machine.handle_claim(from, claim);
    }

    /// A part of an entry came. What is written goes to the journal; the ack comes from the notice
    /// of it, never before. `held` is let go when the journal is done with the part.
    ///
    /// # Errors
    /// When it was not taken; nothing was written.
    pub fn handle_append(
        &mut self,
        context: AppendContext,
        entry: EntryPart,
        held: impl Send + 'static,
    ) -> Result<(), AppendRefused> {
        let AppendContext {
            generation,
            epoch,
            previous,
            commit_lsn,
            archive_lsn,
        } = context;
        entry
            .slots()
            .map_err(|error| AppendRefused::Violation(format!("bad payload: {error}")))?;
        let part = entry.header;
        let verdict = self.machine.check_append(
            generation,
            epoch,
            previous,
            &part,
            commit_lsn,
            archive_lsn,
        )?;
        let database = self.database;
        match verdict {
            AppendVerdict::Reject(reason) => return Err(AppendRefused::Rejected(reason)),
            AppendVerdict::Duplicate => {}
            AppendVerdict::Write {
                truncate_after,
                restart_at,
            } => {
                // One append: a crash leaves the cut and the part, or neither.
                let cut = truncate_after.map(|after| Record::Truncate { database, after });
                let restart = restart_at.map(|at| Record::Restart { database, at });
                let records = cut.into_iter().chain(restart).chain([Record::Part(entry)]);
                let written = Written::Part {
                    position: part.position(),
                    epoch,
                    complete: part.is_last(),
                };
                self.write(records.collect(), written, held);
                self.note_archived();
            }
        }
        Ok(())
    }

    /// The primary told what is committed and archived.
    pub fn handle_progress(&mut self, epoch: Epoch, commit_lsn: Lsn, archive_lsn: Lsn) {
        self.machine.handle_progress(epoch, commit_lsn, archive_lsn);
        self.note_archived();
    }

    /// The store has confirmed all up to here, which this node uploaded itself or found there.
    pub fn handle_archived(&mut self, lsn: Lsn) {
        self.machine.handle_archived(lsn);
        self.note_archived();
    }

    /// The primary told who votes in its epoch.
    ///
    /// # Errors
    /// When it told otherwise before.
    pub fn handle_members(&mut self, membership: Membership) -> Result<(), ProtocolViolation> {
        self.machine.handle_members(membership)
    }

    /// The primary told how far a log that is mending must reach.
    pub fn handle_mend(&mut self, epoch: Epoch, lsn: Lsn) {
        self.machine.handle_mend(epoch, lsn);
    }

    /// An entry cannot be read any more: nothing is promised or acked until the journal has noted
    /// it, and then the log begins anew from what is left, without a vote.
    pub fn handle_damage(&mut self, first_lsn: Lsn, error: JournalError) {
        if self.damage.is_some() {
            return; // once more it is found when the rest is read again
        }
        self.machine.handle_trouble(error.to_string());
        self.damage = Some(error);
        let record = Record::Damaged {
            database: self.database,
            first_lsn,
        };
        self.write(vec![record], Written::Damaged, ());
    }

    /// The journal has written something, or could not. Gives the error when the machine was made
    /// anew because of it: the primary then asks again what is held.
    pub fn handle_notice(&mut self, notice: Notice) -> Option<JournalError> {
        if let Written::Progress { drop_through } = notice.what {
            match notice.result {
                Ok(()) => self.journal.drop_through(self.database, drop_through),
                // What was not noted is not dropped, and noted again with the next.
                Err(error) => {
                    tracing::warn!(database = %self.database, %error, "nothing was dropped");
                }
            }
            return None;
        }
        if matches!(notice.what, Written::Damaged) {
            // Whichever machine wanted it: the journal holds less now than this one believes. If it
            // could not be noted, the entry was cut off in between, or it is found once more.
            let damage = self.damage.take();
            return notice.result.err().or(damage);
        }
        // Machines count their promises from one each: the notice of an earlier machine's promise
        // would pass for one of this machine's that is not on disk yet.
        if notice.machine != self.machine_number {
            return None;
        }
        match (notice.what, notice.result) {
            (
                Written::Part {
                    position,
                    epoch,
                    complete,
                },
                Ok(()),
            ) => self
                .machine
                .handle_part_persisted(position, epoch, complete),
            // Only now may it be told.
            (Written::Promise { token }, Ok(())) => self.machine.handle_promise_persisted(token),
            (_, Err(error)) => {
                self.machine.handle_trouble(error.to_string());
                return Some(error);
            }
            (
                Written::Membership | Written::Progress { .. } | Written::Damaged | Written::Mended,
                Ok(()),
            ) => {}
        }
        None
    }

    /// After an error of [`Self::handle_notice`], and when its messages were polled: what the
    /// machine took as written is not, so a new one begins from what the journal has.
    pub fn recover_from_trouble(&mut self) {
        let state = self.journal.state(self.database);
        let replica = self.machine.replica();
        let persisted = match &state {
            Some(state) => persisted(state, replica),
            None => ReplicaState::unheard_of(replica),
        };
        self.machine = Replica::new(self.database, persisted);
        self.machine_number += 1;
        if let Some(damage) = &self.damage {
            // The journal does not know of it yet.
            self.machine.handle_trouble(damage.to_string());
        }
        self.noted_archive_lsn = self.machine.archive_lsn().min(self.noted_archive_lsn);
        self.journal.resume(self.database);
    }

    /// The next message to send. Poll until there is none.
    pub fn poll_message(&mut self) -> Option<(NodeName, ReplicaMessage)> {
        loop {
            match self.machine.poll_effect()? {
                ReplicaEffect::PersistPromise {
                    token,
                    epoch,
                    claimant,
                    replica,
                    name,
                } => {
                    let record = Record::Promise {
                        database: self.database,
                        name,
                        epoch,
                        claimant,
                        replica: Some(replica),
                    };
                    self.write(vec![record], Written::Promise { token }, ());
                }
                ReplicaEffect::PersistMembership { membership } => {
                    let record = Record::Membership {
                        database: self.database,
                        membership,
                    };
                    self.write(vec![record], Written::Membership, ());
                }
                ReplicaEffect::PersistMended => {
                    tracing::info!(database = %self.database, "the damaged log is whole again");
                    let record = Record::Mended {
                        database: self.database,
                    };
                    self.write(vec![record], Written::Mended, ());
                }
                ReplicaEffect::Send { node, mut message } => {
                    if let ReplicaMessage::Promised(promise) = &mut message {
                        promise.last_transaction = self
                            .journal
                            .state(self.database)
                            .filter(|state| state.last == promise.last)
                            .and_then(|state| state.last_transaction);
                    }
                    return Some((node, message));
                }
            }
        }
    }

    fn write(&self, records: Vec<Record>, what: Written, held: impl Send + 'static) {
        let (database, machine) = (self.database, self.machine_number);
        let notices = self.notices.clone();
        self.journal.append(
            records,
            Box::new(move |result| {
                drop(held);
                notices(Notice {
                    database,
                    machine,
                    what,
                    result,
                });
            }),
        );
    }

    /// Writes down what is archived; it is dropped when that is on disk.
    fn note_archived(&mut self) {
        let drop_through = self.machine.droppable_lsn();
        if drop_through <= self.noted_archive_lsn {
            return;
        }
        self.noted_archive_lsn = drop_through;
        let record = Record::Progress {
            database: self.database,
            commit_lsn: self.machine.commit_lsn(),
            archive_lsn: self.machine.archive_lsn(),
        };
        self.write(vec![record], Written::Progress { drop_through }, ());
    }
}

/// What the state machine begins from.
fn persisted(state: &DatabaseState, drawn: ReplicaId) -> ReplicaState {
    ReplicaState {
        replica: state.replica.unwrap_or(drawn),
        promised: state.promised,
        claimant: state.claimant,
        membership: state.membership.clone(),
        last: state.last,
        first_lsn: state.first_lsn,
        commit_lsn: state.commit_lsn,
        archive_lsn: state.archive_lsn,
        history: state.history.clone(),
        mending: state.mending,
    }
}
