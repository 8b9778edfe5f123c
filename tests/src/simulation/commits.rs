//! The way of a commit through a host: refused for certain, or sent; then committed, buried, or
//! unknown. The order of things is the daemon's.

use super::World;
use super::settings::{Micros, Mutation};
use super::{database_id, node_index};
use bytes::Bytes;
use durovfs_quorum::{PrimaryState, holds_quorum};
use durovfs_wire::entry::{CommitHeader, Origin, TransactionSummary};
use durovfs_wire::{EntryPart, LogPosition, Lsn, Member, PartHeader, PartKind};

use super::host::Pending;

/// Local time that is kept for the answer's way back, at most.
const ANSWER_MARGIN: Micros = 20_000;

/// What became of a commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It is in the log, here.
    Committed(LogPosition),
    /// It is not, and will not be.
    NotCommitted,
    /// Another host is the primary; it is not in the log, and will not be.
    NotPrimary,
    /// The database stands elsewhere: it is not in the log, and will not be.
    Behind,
    /// Nobody can say now.
    Unknown,
}

/// A commit as the application makes it.
#[derive(Debug, Clone)]
pub struct Request {
    pub commit: CommitHeader,
    /// Payloads of its parts, at least one.
    pub payloads: Vec<Bytes>,
    /// The unanswered commit that it follows.
    pub after: Option<u64>,
    pub timeout: Micros,
}

impl Pending {
    fn answer_after(&self) -> Micros {
        self.timeout - ANSWER_MARGIN.min(self.timeout / 10)
    }

    fn is_late(&self, local: Micros) -> bool {
        self.awaited && local.saturating_sub(self.sent_at) >= self.answer_after()
    }

    fn is_to_be_buried(&self, local: Micros) -> bool {
        let kept = self.timeout / 5;
        local.saturating_sub(self.sent_at) >= self.answer_after() - kept
    }
}

impl World {
    /// Takes a commit: refuses it for certain, or sends it.
    pub(super) fn commit(&mut self, host: usize, database: usize, request: Request) {
        let origin = request.commit.origin;
        match self.check_commit(host, database, &request) {
            Ok(position) => self.send_commit(host, database, request, position),
            Err(outcome) => self.answer(host, database, origin, outcome),
        }
    }

    fn check_commit(
        &mut self,
        host: usize,
        database: usize,
        request: &Request,
    ) -> Result<LogPosition, Outcome> {
        let is_answering: Vec<bool> = self.network.links[host]
            .iter()
            .map(|link| link.connection.is_some())
            .collect();
        let Some(serving) = self.hosts[host].serving(database) else {
            return Err(Outcome::NotCommitted);
        };
        let origin = request.commit.origin;
        let settled = serving.settled.get(&origin.client);
        if settled.is_some_and(|settled| *settled >= origin.sequence) {
            return Err(Outcome::NotCommitted);
        }
        if matches!(serving.machine.state(), PrimaryState::Fenced { .. }) {
            return Err(Outcome::NotPrimary);
        }
        let counts = |member: &Member| is_answering[node_index(&member.node)];
        // Writes wait for a step of a change; here they are refused at once.
        let is_held = serving.held_since.is_some();
        if !holds_quorum(serving.machine.membership(), counts) || !serving.is_open() || is_held {
            return Err(Outcome::NotCommitted);
        }
        let lsn = serving.machine.next_lsn().ok_or(Outcome::NotCommitted)?;
        let newest = serving.newest_transaction();
        if let Some(after) = request.after {
            let base = Origin {
                client: origin.client,
                sequence: after,
            };
            if newest.is_none_or(|newest| newest.commit.origin != base)
                || request.payloads.len() > 1 && !serving.pending.is_empty()
            {
                return Err(Outcome::NotCommitted);
            }
        } else if !serving.pending.is_empty() {
            return Err(Outcome::NotCommitted);
        } else if newest.map_or(Lsn::ZERO, |newest| newest.position.lsn) != request.commit.base_lsn
        {
            return Err(Outcome::Behind);
        }
        Ok(LogPosition::new(serving.machine.epoch(), lsn))
    }

    fn send_commit(
        &mut self,
        host: usize,
        database: usize,
        request: Request,
        position: LogPosition,
    ) {
        let time = self.entry_time(host, database);
        let sent_at = self.local(host);
        let Some(serving) = self.hosts[host].serving(database) else {
            return;
        };
        let newest = serving.newest_transaction();
        let commit = CommitHeader {
            time,
            base_lsn: newest.map_or(Lsn::ZERO, |newest| newest.position.lsn),
            ..request.commit
        };
        serving.pending.push_back(Pending {
            summary: TransactionSummary { position, commit },
            awaited: true,
            timeout: request.timeout,
            sent_at,
        });
        let last = request.payloads.len() - 1;
        self.tally.multi_part += u64::from(last > 0);
        for (part, payload) in (0..).zip(request.payloads) {
            let kind = if part == last as u32 {
                PartKind::Commit(commit)
            } else {
                PartKind::Pages {
                    page_size: commit.page_size,
                }
            };
            let header = PartHeader {
                database: database_id(database),
                epoch: position.epoch,
                lsn: position.lsn,
                part,
                kind,
            };
            let entry = EntryPart { header, payload };
            if header.is_last() {
                self.append_own(host, database, entry);
            } else {
                self.checker.stage(database, &entry);
                let record = durovfs_journal::Record::Part(entry);
                self.write_own(host, database, vec![record], position, false);
            }
        }
    }

    /// Gives up waiting: buries near the end of the application's time, says unknown at its end.
    pub(super) fn tick_pending(&mut self, host: usize, database: usize, local: Micros) {
        let lies = self.settings.mutation == Mutation::UnknownIsNotCommitted;
        let Some(serving) = self.hosts[host].serving(database) else {
            return;
        };
        let Some(oldest) = serving.pending.front() else {
            return;
        };
        if !lies
            && oldest.is_to_be_buried(local)
            && serving.machine.state() == PrimaryState::Leading
        {
            self.begin_bury(host, database);
        }
        let Some(serving) = self.hosts[host].serving(database) else {
            return;
        };
        let mut late = Vec::new();
        for pending in &mut serving.pending {
            if pending.is_late(local) {
                pending.awaited = false;
                late.push(pending.summary.commit.origin);
            }
        }
        let outcome = if lies {
            Outcome::NotCommitted
        } else {
            Outcome::Unknown
        };
        for origin in late {
            self.answer(host, database, origin, outcome);
        }
    }

    /// The pending commits up to this position are committed.
    pub(super) fn settle_committed(&mut self, host: usize, database: usize, through: LogPosition) {
        loop {
            let Some(serving) = self.hosts[host].serving(database) else {
                return;
            };
            let Some(pending) = serving.pending.pop_front_if(|pending| {
                let position = pending.summary.position;
                position.lsn <= through.lsn && position.epoch == through.epoch
            }) else {
                return;
            };
            serving.last_transaction = Some(pending.summary);
            serving.note_settled(pending.summary.commit.origin);
            let outcome = Outcome::Committed(pending.summary.position);
            self.answer(host, database, pending.summary.commit.origin, outcome);
        }
    }

    /// The log is open: it has the pending commits, or never will.
    pub(super) fn settle_by_log(&mut self, host: usize, database: usize) {
        let Some(serving) = self.hosts[host].serving(database) else {
            return;
        };
        for pending in std::mem::take(&mut serving.pending) {
            let CommitHeader {
                origin, base_lsn, ..
            } = pending.summary.commit;
            let outcome = match self.resolve_by_log(host, database, origin, base_lsn) {
                Outcome::Behind => Outcome::Unknown,
                certain => certain,
            };
            if let Some(serving) = self.hosts[host].serving(database) {
                serving.note_settled(origin);
            }
            self.answer(host, database, origin, outcome);
        }
    }

    /// All pending commits were buried.
    pub(super) fn settle_buried(&mut self, host: usize, database: usize) {
        let Some(serving) = self.hosts[host].serving(database) else {
            return;
        };
        for pending in std::mem::take(&mut serving.pending) {
            let origin = pending.summary.commit.origin;
            if let Some(serving) = self.hosts[host].serving(database) {
                serving.note_settled(origin);
            }
            self.answer(host, database, origin, Outcome::NotCommitted);
        }
    }

    /// Whoever took over decides.
    pub(super) fn abandon_pending(&mut self, host: usize, database: usize) {
        let Some(serving) = self.hosts[host].serving(database) else {
            return;
        };
        for pending in std::mem::take(&mut serving.pending) {
            let origin = pending.summary.commit.origin;
            self.answer(host, database, origin, Outcome::Unknown);
        }
    }

    /// What became of a commit, asked after its answer did not come. None when it is not known
    /// yet: ask again.
    pub(super) fn resolve(
        &mut self,
        host: usize,
        database: usize,
        origin: Origin,
        base_lsn: Lsn,
    ) -> Option<Outcome> {
        let ignores = self.settings.mutation == Mutation::ResolveIgnoresOpenEntry;
        let serving = self.hosts[host].serving(database)?;
        let open = serving
            .pending
            .iter()
            .find(|pending| pending.summary.commit.origin == origin)
            .map(|pending| pending.awaited);
        match open {
            Some(true) => return None,
            Some(false) if !ignores => {
                if serving.is_open() {
                    self.begin_bury(host, database);
                }
                return None;
            }
            _ => {}
        }
        if !serving.is_open() {
            return None;
        }
        Some(self.resolve_by_log(host, database, origin, base_lsn))
    }

    /// The log is open: the commit is in it, or never will be. "Behind": the log dropped the
    /// entries that would tell.
    fn resolve_by_log(
        &mut self,
        host: usize,
        database: usize,
        origin: Origin,
        base_lsn: Lsn,
    ) -> Outcome {
        let Some(running) = &mut self.hosts[host].up else {
            return Outcome::Unknown;
        };
        let Some(serving) = running.servings.get_mut(&database) else {
            return Outcome::Unknown;
        };
        let Some(last) = serving.last_transaction else {
            serving.note_settled(origin);
            return Outcome::NotCommitted;
        };
        if last.commit.origin == origin {
            return Outcome::Committed(last.position);
        }
        let (id, commit_lsn) = (database_id(database), serving.machine.commit_lsn());
        let found = running
            .journal
            .transactions(id, base_lsn.next(), commit_lsn)
            .into_iter()
            .find(|summary| summary.commit.origin == origin);
        if let Some(summary) = found {
            return Outcome::Committed(summary.position);
        }
        let first_held = running
            .journal
            .state(id)
            .map_or(Lsn::ZERO, |state| state.first_lsn);
        if base_lsn.next() >= first_held
            || last.position.lsn <= base_lsn
            || last.commit.base_lsn == base_lsn
        {
            serving.note_settled(origin);
            return Outcome::NotCommitted;
        }
        Outcome::Behind
    }
}
