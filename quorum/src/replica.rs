//! The replica of one log: what it promised, what it holds, what it may take and ack.
//!
//! This file holds claims, progress and the answers; `replica/append.rs` decides over entries. No
//! I/O: the driver writes to the journal what it is told, in that order, and reports back what is
//! on disk. `docs/protocol.md` tells the exchanges.

mod append;
#[cfg(test)]
mod tests;

use crate::error::ProtocolViolation;
use crate::history::History;
use durovfs_wire::peer::{Claim, Promise, RejectReason, ReplicaMessage};
use durovfs_wire::{
    ClaimantId, DatabaseId, Epoch, EpochRun, LogPosition, Lsn, Membership, NodeName, ReplicaId,
};
use std::collections::VecDeque;

/// What a replica's journal holds of a log: read at start, and again after trouble with the disk.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ReplicaState {
    /// Which replica this is.
    pub replica: ReplicaId,
    /// Highest epoch promised.
    pub promised: Epoch,
    /// To which attempt.
    pub claimant: Option<ClaimantId>,
    /// The membership of the newest epoch whose primary told it.
    pub membership: Option<Membership>,
    /// Last complete entry on disk.
    pub last: LogPosition,
    /// First entry still held; `last.lsn + 1` when none is (zero counts as one).
    pub first_lsn: Lsn,
    /// Known committed.
    pub commit_lsn: Lsn,
    /// Known archived.
    pub archive_lsn: Lsn,
    /// Runs, from the one that holds `archive_lsn` on, at least.
    pub history: Vec<EpochRun>,
    /// Damage took, or may have taken, entries that were acked: see [`Replica::is_mending`].
    pub mending: bool,
}

impl ReplicaState {
    /// Of a replica that hears of its log for the first time. The driver draws the identity.
    pub fn unheard_of(replica: ReplicaId) -> Self {
        Self {
            replica,
            promised: Epoch::ZERO,
            claimant: None,
            membership: None,
            last: LogPosition::ZERO,
            first_lsn: Lsn::ZERO,
            commit_lsn: Lsn::ZERO,
            archive_lsn: Lsn::ZERO,
            history: Vec::new(),
            mending: false,
        }
    }
}

/// What is to be done with a part.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum AppendVerdict {
    /// Write it to the journal, after what is named here, and call
    /// [`Replica::handle_part_persisted`] when it is synced. At most one of the two is set.
    Write {
        /// First cut the log after this position.
        truncate_after: Option<LogPosition>,
        /// First begin the log anew after this position: all up to it is archived.
        restart_at: Option<LogPosition>,
    },
    /// The entry is in the log already: drop the part.
    Duplicate,
    /// Drop it and send this to the primary.
    Reject(RejectReason),
}

/// What the driver is to do, in this order.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[allow(
    clippy::large_enum_variant,
    reason = "a few at a time, each taken as soon as it is there"
)]
pub enum ReplicaEffect {
    /// Write the promise to the journal, and call [`Replica::handle_promise_persisted`] when it,
    /// and all that was written before it, is synced.
    PersistPromise {
        /// Comes back in the call.
        token: u64,
        /// The epoch promised.
        epoch: Epoch,
        /// To this attempt.
        claimant: ClaimantId,
        /// Which replica promises; on disk with its first promise.
        replica: ReplicaId,
        /// The database's name.
        name: String,
    },
    /// Note in the journal that the log is whole again. Until it is on disk a restart begins to
    /// mend anew, which does no harm.
    PersistMended,
    /// Write the membership to the journal. No answer is needed: no entry that is written later is
    /// on disk before it.
    PersistMembership {
        /// What the primary of its epoch decided.
        membership: Membership,
    },
    /// Send a message.
    Send {
        /// To this node.
        node: NodeName,
        /// The message.
        message: ReplicaMessage,
    },
}

/// The replica of one log.
///
/// Call a `handle_*` or [`Replica::check_append`], then [`Replica::poll_effect`] until it gives
/// nothing. The driver's journal keeps the order in which it was given records, and reports them as
/// persisted in that order.
///
/// When the journal could not write, call [`Replica::handle_trouble`], and make a new replica from
/// what the journal then holds once it writes again.
#[derive(Debug, Clone, Hash)]
pub struct Replica {
    database: DatabaseId,
    replica: ReplicaId,
    promised: Epoch,
    claimant: Option<ClaimantId>,
    membership: Option<Membership>,
    /// What was promised before `promised`; unknown after a restart, since it is not kept on disk.
    previous_promise: Option<Epoch>,
    /// Who was told of the promise. Acks go there; without it no entry is taken.
    primary: Option<NodeName>,
    pending: Option<PendingPromise>,
    next_token: u64,
    /// Last complete entry handed to the journal.
    last: LogPosition,
    flush_lsn: Lsn,
    first_lsn: Lsn,
    history: History,
    /// Which promise each entry was written under, as runs of it: tells a late notice of an entry
    /// that was cut from one of its second writing.
    written_under: History,
    /// The log is known to equal that of the promised epoch's primary up to here. What lies above
    /// may be a divergent tail, and is neither acked nor taken as committed.
    matched_lsn: Lsn,
    commit_lsn_heard: Lsn,
    commit_lsn: Lsn,
    archive_lsn_heard: Lsn,
    open: Option<OpenEntry>,
    ack_due: bool,
    mending: Mending,
    trouble: Option<String>,
    effects: VecDeque<ReplicaEffect>,
}

#[derive(Debug, Clone, Hash)]
struct PendingPromise {
    token: u64,
    from: NodeName,
    epoch: Epoch,
    claimant: ClaimantId,
    previous: Epoch,
}

/// Whether the log may lack entries that were acked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Mending {
    /// It lacks none.
    Whole,
    /// It may. A primary of the promised epoch has not said yet how far it must reach.
    Damaged,
    /// It does not any more when the log matches that of the promised epoch's primary up to here.
    Through(Lsn),
}

/// An entry of which parts are still to come.
#[derive(Debug, Clone, Copy, Hash)]
struct OpenEntry {
    position: LogPosition,
    previous: LogPosition,
    next_part: u32,
}

impl Replica {
    /// A replica with what its journal holds.
    ///
    /// # Panics
    /// When the state contradicts itself: the journal is not to be trusted.
    pub fn new(database: DatabaseId, persisted: ReplicaState) -> Self {
        let history = match History::from_runs(&persisted.history) {
            Ok(history) => history,
            Err(error) => panic!("journal state of database={database}: {error}"),
        };
        let last = persisted.last;
        assert_eq!(
            history.position_at(last.lsn),
            Some(last),
            "journal ends at {last} but its history says otherwise: {:?}",
            history.runs()
        );
        assert!(
            last.epoch <= persisted.promised,
            "journal ends at {last}, above promised epoch={}",
            persisted.promised
        );
        let first_lsn = persisted.first_lsn.max(Lsn::new(1));
        // Entries leave a journal only when they are archived, so all before the first one is.
        let gone_lsn = first_lsn.previous().unwrap_or(Lsn::ZERO);
        assert!(
            gone_lsn <= last.lsn,
            "journal begins at lsn={first_lsn} but ends at {last}"
        );
        let commit_lsn = persisted.commit_lsn.min(last.lsn).max(gone_lsn);
        let written_under = History::default();
        // An entry of the promised epoch came from its primary, so the log matches up to it.
        let matched_lsn = if last.epoch == persisted.promised {
            last.lsn
        } else {
            commit_lsn
        };
        Self {
            database,
            replica: persisted.replica,
            promised: persisted.promised,
            claimant: persisted.claimant,
            membership: persisted.membership,
            previous_promise: None,
            primary: None,
            pending: None,
            next_token: 1,
            last,
            flush_lsn: last.lsn,
            first_lsn,
            history,
            written_under,
            matched_lsn,
            commit_lsn_heard: commit_lsn,
            commit_lsn,
            archive_lsn_heard: persisted.archive_lsn.max(gone_lsn),
            open: None,
            ack_due: false,
            mending: if persisted.mending {
                Mending::Damaged
            } else {
                Mending::Whole
            },
            trouble: None,
            effects: VecDeque::new(),
        }
    }

    /// A claim came. Answered at once when it is refused or a repetition, else after the promise is
    /// on disk. Whether the present primary is still alive is for the driver to ask before.
    ///
    /// # Panics
    /// When the claim is for another log.
    pub fn handle_claim(&mut self, from: &NodeName, claim: &Claim) {
        assert_eq!(
            claim.database, self.database,
            "claim of epoch={} went astray",
            claim.epoch
        );
        if let Some(reason) = self.claim_refusal(claim) {
            self.reject(from, claim.epoch, reason);
            return;
        }
        if let Some(pending) = &mut self.pending
            && pending.epoch == claim.epoch
        {
            // The same attempt again, before the first was on disk: one answer serves both.
            pending.from = from.clone();
            return;
        }
        if self.pending.is_none() && claim.epoch == self.promised {
            self.primary = Some(from.clone());
            self.mend_anew();
            self.send_promise();
            return;
        }
        let mut previous = self.promised;
        if let Some(replaced) = self.pending.take() {
            // Never answered, but it may be on disk, and a restart would tell it.
            previous = replaced.epoch;
            let reason = RejectReason::Fenced {
                promised: claim.epoch,
            };
            self.reject(&replaced.from, replaced.epoch, reason);
        }
        let token = self.next_token;
        self.next_token += 1;
        self.pending = Some(PendingPromise {
            token,
            from: from.clone(),
            epoch: claim.epoch,
            claimant: claim.claimant,
            previous,
        });
        self.effects.push_back(ReplicaEffect::PersistPromise {
            token,
            epoch: claim.epoch,
            claimant: claim.claimant,
            replica: self.replica,
            name: claim.name.clone(),
        });
    }

    fn claim_refusal(&self, claim: &Claim) -> Option<RejectReason> {
        if let Some(message) = &self.trouble {
            return Some(RejectReason::Storage {
                message: message.clone(),
            });
        }
        let (epoch, claimant) = match &self.pending {
            Some(pending) => (pending.epoch, Some(pending.claimant)),
            None => (self.promised, self.claimant),
        };
        // Whatever membership the claimant goes by: the promise tells it a newer one.
        let repeated = claim.epoch == epoch && Some(claim.claimant) == claimant;
        (claim.epoch <= epoch && !repeated).then_some(RejectReason::Fenced { promised: epoch })
    }

    /// The promise, and all that was written to the journal before it, is on disk. Ignored when a
    /// later claim replaced it.
    pub fn handle_promise_persisted(&mut self, token: u64) {
        let Some(pending) = self.pending.take_if(|pending| pending.token == token) else {
            return;
        };
        assert!(
            pending.epoch > self.promised,
            "promise of epoch={} persisted after one of epoch={}",
            pending.epoch,
            self.promised
        );
        let served = std::mem::replace(&mut self.promised, pending.epoch);
        self.claimant = Some(pending.claimant);
        self.previous_promise = Some(pending.previous);
        let before = self.primary.replace(pending.from.clone());
        // What is committed is in the log of every later primary; of the rest nothing is known yet.
        self.matched_lsn = self.commit_lsn;
        self.open = None;
        self.ack_due = false;
        self.mend_anew();
        // Only now: the answer must not be seen before the promise is on disk.
        self.send_promise();
        if let Some(before) = before.filter(|before| *before != pending.from) {
            // It learns it now, not with its next commit.
            let reason = RejectReason::TakenOver {
                promised: pending.epoch,
                by: pending.from,
            };
            self.reject(&before, served, reason);
        }
    }

    /// The journal could not write. What this replica tells of its log may not be on disk, so the
    /// driver persists no progress of it. No entry is taken and nothing is acked or promised any
    /// more; the driver makes a new replica from the journal's state when it writes again.
    pub fn handle_trouble(&mut self, message: String) {
        if let Some(pending) = self.pending.take() {
            let reason = RejectReason::Storage {
                message: message.clone(),
            };
            self.reject(&pending.from, pending.epoch, reason);
        }
        self.ack_due = false;
        self.open = None;
        if self.trouble.is_none()
            && let Some(primary) = self.primary.clone()
        {
            let reason = RejectReason::Storage {
                message: message.clone(),
            };
            self.reject(&primary, self.promised, reason);
        }
        self.trouble = Some(message);
    }

    fn send_promise(&mut self) {
        let Some(node) = self.primary.clone() else {
            return;
        };
        let Some(claimant) = self.claimant else {
            panic!("promised epoch={} to nobody", self.promised)
        };
        let last = self.flushed_position();
        let mut history = self.history.clone();
        history.truncate_after(last.lsn);
        let promise = Promise {
            database: self.database,
            replica: self.replica,
            membership: self.membership.clone(),
            epoch: self.promised,
            claimant,
            // Not knowing is told as this epoch itself, which no burial accepts.
            previous_promise: self.previous_promise.unwrap_or(self.promised),
            last,
            commit_lsn: self.commit_lsn,
            archive_lsn: self.archive_lsn(),
            // The driver fills it in: this machine keeps no transactions.
            last_transaction: None,
            history: history.runs().to_vec(),
            mending: self.is_mending(),
        };
        self.effects.push_back(ReplicaEffect::Send {
            node,
            message: ReplicaMessage::Promised(promise),
        });
    }

    /// The primary says how far a log that is mending must reach.
    ///
    /// Ignored unless it answers the promise that was given last, since this replica started: then
    /// the primary had forgotten all acks of entries that are lost, and counts none from before.
    pub fn handle_mend(&mut self, epoch: Epoch, lsn: Lsn) {
        let answers = self.pending.is_none() && epoch == self.promised && self.primary.is_some();
        if answers && self.is_mending() {
            self.mending = Mending::Through(lsn);
            self.consider_whole();
        }
    }

    /// What an earlier promise was answered with does not count for the next.
    fn mend_anew(&mut self) {
        if self.is_mending() {
            self.mending = Mending::Damaged;
        }
    }

    /// All that this replica ever acked, in this epoch or an older one, and that may be committed,
    /// is in the primary's log up to the entry that it named.
    fn consider_whole(&mut self) {
        if let Mending::Through(lsn) = self.mending
            && self.trouble.is_none()
            && self.flush_lsn.min(self.matched_lsn) >= lsn
        {
            self.mending = Mending::Whole;
            self.effects.push_back(ReplicaEffect::PersistMended);
        }
    }

    /// Whether entries that were acked may be missing, after damage. Such a replica keeps its
    /// promises, takes entries and acks what it has; but its promise is no vote on where the log
    /// ends, until a primary has fed it up to where it must have been.
    pub fn is_mending(&self) -> bool {
        self.mending != Mending::Whole
    }

    fn flushed_position(&self) -> LogPosition {
        match self.history.position_at(self.flush_lsn) {
            Some(position) => position,
            None => panic!(
                "epoch of flush_lsn={} is unknown, log ends at {}, runs {:?}",
                self.flush_lsn,
                self.last,
                self.history.runs()
            ),
        }
    }

    fn reject(&mut self, node: &NodeName, epoch: Epoch, reason: RejectReason) {
        let message = ReplicaMessage::Rejected {
            database: self.database,
            epoch,
            reason,
        };
        self.effects.push_back(ReplicaEffect::Send {
            node: node.clone(),
            message,
        });
    }

    /// The primary told the membership that it decided on. Ignored unless its epoch is the one
    /// promised.
    ///
    /// # Errors
    /// When the primary told another one for this epoch before; nothing was changed.
    pub fn handle_members(&mut self, membership: Membership) -> Result<(), ProtocolViolation> {
        let current = self.pending.is_none() && membership.epoch == self.promised;
        if !current || membership.epoch == Epoch::ZERO || self.trouble.is_some() {
            return Ok(());
        }
        match &self.membership {
            Some(known) if *known == membership => return Ok(()),
            Some(known) if known.epoch >= membership.epoch => {
                return Err(ProtocolViolation::malformed(format!(
                    "membership {membership:?}, but {known:?} was told before"
                )));
            }
            _ => {}
        }
        self.membership = Some(membership.clone());
        self.effects
            .push_back(ReplicaEffect::PersistMembership { membership });
        Ok(())
    }

    /// The primary told what is committed and archived. Ignored unless its epoch is the one
    /// promised.
    pub fn handle_progress(&mut self, epoch: Epoch, commit_lsn: Lsn, archive_lsn: Lsn) {
        if self.pending.is_none() && epoch == self.promised {
            self.hear_progress(commit_lsn, archive_lsn);
        }
    }

    /// Everything up to here is confirmed in the object store, whoever put it there.
    pub fn handle_archived(&mut self, lsn: Lsn) {
        self.hear_progress(self.commit_lsn, lsn.min(self.commit_lsn));
    }

    fn hear_progress(&mut self, commit_lsn: Lsn, archive_lsn: Lsn) {
        self.commit_lsn_heard = self.commit_lsn_heard.max(commit_lsn);
        self.archive_lsn_heard = self.archive_lsn_heard.max(archive_lsn.min(commit_lsn));
        self.raise_commit();
    }

    fn raise_commit(&mut self) {
        let held_lsn = self.flush_lsn.min(self.matched_lsn);
        self.commit_lsn = self.commit_lsn.max(self.commit_lsn_heard.min(held_lsn));
        assert!(
            self.commit_lsn <= self.flush_lsn && self.flush_lsn <= self.last.lsn,
            "commit_lsn={} flush_lsn={} last {} in epoch={}",
            self.commit_lsn,
            self.flush_lsn,
            self.last,
            self.promised
        );
        self.history.forget_below(self.archive_lsn());
        self.consider_whole();
    }

    /// Whether entries may be read for a primary that recovers or catches up.
    ///
    /// # Errors
    /// The refusal to send: the epoch is not the one promised, or the entries are not all held.
    pub fn check_fetch(
        &self,
        epoch: Epoch,
        first_lsn: Lsn,
        last_lsn: Lsn,
    ) -> Result<(), RejectReason> {
        if self.pending.is_some() || epoch != self.promised {
            return Err(RejectReason::Fenced {
                promised: self.promised(),
            });
        }
        if first_lsn < self.first_lsn || first_lsn > last_lsn || last_lsn > self.flush_lsn {
            return Err(RejectReason::Gap {
                last: self.flushed_position(),
            });
        }
        Ok(())
    }

    /// The log.
    pub fn database(&self) -> DatabaseId {
        self.database
    }

    /// The highest epoch promised, or about to be.
    pub fn promised(&self) -> Epoch {
        self.pending
            .as_ref()
            .map_or(self.promised, |pending| pending.epoch)
    }

    /// Which replica this is.
    pub fn replica(&self) -> ReplicaId {
        self.replica
    }

    /// The membership of the newest epoch whose primary told it.
    pub fn membership(&self) -> Option<&Membership> {
        self.membership.as_ref()
    }

    /// Generation of the membership that the primary of the promised epoch told; zero before.
    fn generation(&self) -> u32 {
        self.membership
            .as_ref()
            .filter(|membership| membership.epoch == self.promised)
            .map_or(0, |membership| membership.generation)
    }

    /// The node that the promise was given to, since this replica started.
    pub fn primary(&self) -> Option<&NodeName> {
        self.primary.as_ref()
    }

    /// The last complete entry handed to the journal.
    pub fn last(&self) -> LogPosition {
        self.last
    }

    /// The last entry on disk.
    pub fn flush_lsn(&self) -> Lsn {
        self.flush_lsn
    }

    /// Known committed, and on disk.
    pub fn commit_lsn(&self) -> Lsn {
        self.commit_lsn
    }

    /// Known archived, and committed.
    pub fn archive_lsn(&self) -> Lsn {
        self.archive_lsn_heard.min(self.commit_lsn)
    }

    /// Entries at or below may be dropped from the journal, once the journal has persisted both
    /// values that this is made of.
    pub fn droppable_lsn(&self) -> Lsn {
        self.archive_lsn().min(self.commit_lsn).min(self.flush_lsn)
    }

    /// The epochs of the log.
    pub fn history(&self) -> &History {
        &self.history
    }

    /// Why nothing is taken now, if so.
    pub fn trouble(&self) -> Option<&str> {
        self.trouble.as_deref()
    }

    /// The next thing to do. Poll until there is none. One ack, the newest, serves all entries.
    pub fn poll_effect(&mut self) -> Option<ReplicaEffect> {
        if let Some(effect) = self.effects.pop_front() {
            return Some(effect);
        }
        if !std::mem::take(&mut self.ack_due) || self.pending.is_some() {
            return None;
        }
        let message = ReplicaMessage::Ack {
            database: self.database,
            epoch: self.promised,
            generation: self.generation(),
            replica: self.replica,
            flush_lsn: self.flush_lsn.min(self.matched_lsn),
        };
        self.primary
            .clone()
            .map(|node| ReplicaEffect::Send { node, message })
    }
}
