//! Opening a database for a client: which log its name means, whether another node is its live
//! primary, and then the claim. A primary that was fenced comes here again only when a client opens
//! its database: it never takes it back by itself.
//!
//! The replicas are asked before anything is claimed, so that a claim which cannot be won disturbs
//! nobody. What they say of the living is a matter of liveness only: a claim is won by promises.

use super::event::ClientGrant;
use super::node::Node;
use super::outbox::Outbox;
use super::primary::PrimaryDatabase;
use super::primary_effects::{fail_waiter, random_part};
use durovfs_quorum::PrimaryState;
use durovfs_wire::client::{FailureKind, SidecarMessage};
use durovfs_wire::entry::Origin;
use durovfs_wire::peer::{FoundLog, MAX_NAME_BYTES, PrimaryMessage};
use durovfs_wire::{DatabaseId, Lsn, Membership, NodeName};
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

/// Pause between two questions to the replicas: a live primary is found out after one or two of its
/// signs of life, a dead one when it counts as dead. A random part of as much is added where two
/// claimants might keep each other from winning.
const ASK_PAUSE: Duration = Duration::from_millis(250);
/// How long nodes that are not known to have replicas are left alone when the others do not answer,
/// and how long they are waited for before a name counts as new.
const FIND_PATIENCE: Duration = Duration::from_secs(1);
/// Claims that may fail in a row, each with a higher epoch, before whoever waits is told that
/// another node is the primary. Spread over longer than a dead primary counts as alive.
const CLAIMS_MAX: u32 = 12;

/// Who waits for the log to be open, and for our own journal to have what is asked for, until when.
pub struct Waiter {
    /// Where the answer goes.
    pub outbox: Outbox,
    /// What is wanted.
    pub want: Want,
    /// When to give up.
    pub deadline: Option<Instant>,
    /// Where the log ended when it was open and this was waiting; none before. A quorum has all of
    /// it; our own journal may have it only later, and the answer may be in it.
    pub through_lsn: Option<Lsn>,
}

/// What a [`Waiter`] wants.
#[derive(Clone, Copy)]
pub enum Want {
    /// Answer to `Open`.
    Open(Opening),
    /// Answer to `Resolve`.
    Resolve {
        request: u64,
        origin: Origin,
        base_lsn: Lsn,
    },
    /// Answer to `ReadLog`, on a stream of its own.
    ReadLog { first_lsn: Lsn, pages: bool },
}

/// A client's `Open`.
#[derive(Clone, Copy)]
pub struct Opening {
    /// Comes back in the answer.
    pub request: u64,
    /// The log that the local file says it belongs to.
    pub known: Option<DatabaseId>,
    /// Whether it may be taken from a live primary.
    pub force: bool,
    /// Whether no new log may be begun.
    pub must_exist: bool,
}

impl Waiter {
    fn opening(&self) -> Option<Opening> {
        match self.want {
            Want::Open(opening) => Some(opening),
            Want::Resolve { .. } | Want::ReadLog { .. } => None,
        }
    }

    /// Whether it can be answered. The log is open, and our own journal has this much of it.
    pub fn is_ready(&mut self, commit_lsn: Lsn, written_lsn: Lsn) -> bool {
        let through_lsn = *self.through_lsn.get_or_insert(commit_lsn);
        matches!(self.want, Want::Open(_)) || written_lsn >= through_lsn
    }

    /// Whether its time is over.
    pub fn is_expired(&self, now: Instant) -> bool {
        self.deadline.is_some_and(|deadline| now >= deadline)
    }
}

/// A search for the log of a name, and for its primary. A quorum of nodes must have answered: any
/// log that was ever claimed is known to one of them.
pub struct Finding {
    request: u64,
    began: Instant,
    asked_at: Instant,
    ask_at: Instant,
    answers: BTreeMap<NodeName, Answer>,
    waiters: Vec<Waiter>,
}

/// What a node answered, and when it had been asked at the earliest.
struct Answer {
    logs: Vec<FoundLog>,
    asked_at: Instant,
}

/// What the answers so far come to.
enum Found {
    /// More answers are needed.
    Open,
    /// Those that should know do not know the name: all others are to be asked.
    Unheard,
    /// Nothing stands in the way of a claim of this log; without one, of a new log.
    Free(Option<DatabaseId>, Option<NodeName>),
    /// It cannot be.
    Refused(FailureKind, String),
}

impl Finding {
    fn new(request: u64, delay: Duration) -> Self {
        let began = Instant::now();
        Self {
            request,
            began,
            asked_at: began,
            ask_at: began + delay,
            answers: BTreeMap::new(),
            waiters: Vec::new(),
        }
    }

    /// The newest membership of the log that was told.
    fn membership(&self) -> Option<&Membership> {
        let logs = self.answers.values().flat_map(|answer| &answer.logs);
        logs.filter_map(|log| log.membership.as_ref())
            .max_by_key(|membership| membership.epoch)
    }

    /// `configured` are those that a log has of which nobody tells the members; with `asked_all`
    /// there is nobody else to wait for.
    fn judge(&self, name: &str, own: &NodeName, configured: &Membership, asked_all: bool) -> Found {
        let membership = self.membership().unwrap_or(configured);
        let (quorum, replicas) = (membership.ack_quorum, membership.members.len());
        let answers = self.answers.keys();
        let answered = answers.filter(|node| membership.has_node(node)).count();
        if answered < quorum {
            return Found::Open;
        }
        let openings = || self.waiters.iter().filter_map(Waiter::opening);
        let logs: BTreeSet<DatabaseId> = self
            .answers
            .values()
            .flat_map(|answer| answer.logs.iter().map(|log| log.database))
            .collect();
        let unknown = |message: String| Found::Refused(FailureKind::UnknownDatabase, message);
        if logs.len() > 1 {
            return unknown(format!("replicas know several logs under {name}: {logs:?}"));
        }
        let Some(log) = logs.first().copied() else {
            // The list of replicas may be an old one, and the log's members others by now.
            if !asked_all {
                return Found::Unheard;
            }
            return match openings().find_map(|opening| opening.known) {
                Some(known) => unknown(format!(
                    "the file belongs to log {known}, but no replica knows {name}: moved? open it \
                     with durovfs_db= and its old name"
                )),
                None if openings().any(|opening| opening.must_exist) => {
                    unknown(format!("no database {name} in the cluster"))
                }
                None => Found::Free(None, None),
            };
        };
        let others: Vec<&NodeName> = self.others(own).map(|(primary, _)| primary).collect();
        let free = answered.saturating_sub(others.len());
        if openings().any(|opening| opening.force) {
            return Found::Free(Some(log), others.first().copied().cloned());
        }
        if free >= quorum {
            return Found::Free(Some(log), None);
        }
        // Heard after this search began: it is alive, and not only not yet known to be dead.
        let alive = self.others(own).filter(|(_, is_sure)| *is_sure).count();
        match others.first() {
            Some(primary) if alive > replicas - quorum => Found::Refused(
                FailureKind::NotPrimary,
                format!(
                    "{primary} is the primary of {name} and is alive; use the database there, or \
                     take it over with `durovfs takeover {name}` or durovfs_takeover=1"
                ),
            ),
            _ => Found::Open,
        }
    }

    /// Live primaries other than this node, one for each answer that names one, and whether it was
    /// heard since the search began.
    fn others(&self, own: &NodeName) -> impl Iterator<Item = (&NodeName, bool)> {
        self.answers.values().filter_map(move |answer| {
            let live = answer.logs.iter().find_map(|log| log.primary.as_ref());
            let live = live.filter(|live| live.node != *own)?;
            let silent = Duration::from_millis(u64::from(live.silent_ms));
            let is_sure = answer.asked_at.duration_since(self.began) > silent;
            Some((&live.node, is_sure))
        })
    }
}

impl Node {
    /// A client opens a database.
    pub fn handle_open(&mut self, grant: &ClientGrant, waiter: Waiter, name: String) {
        if name.is_empty() || name.len() > MAX_NAME_BYTES || !grant.allows(&name) {
            let message = format!(
                "the certificate {} does not allow the database {name:?}",
                grant.name
            );
            return fail_waiter(waiter, FailureKind::Forbidden, &message);
        }
        self.connect_replicas();
        let active = self.names.get(&name).copied().filter(|database| {
            self.primaries.get(database).is_some_and(|db| {
                !matches!(
                    db.machine.state(),
                    PrimaryState::Fenced { .. } | PrimaryState::Idle
                )
            })
        });
        match active {
            Some(database) => self.wait_for_log(database, waiter),
            None => self.find(name, vec![waiter], Duration::ZERO),
        }
    }

    /// Answers when the log is open, which it is or is about to be.
    fn wait_for_log(&mut self, database: DatabaseId, waiter: Waiter) {
        let Some(db) = self.primaries.get_mut(&database) else {
            return;
        };
        let known = waiter.opening().and_then(|opening| opening.known);
        if let Some(known) = known.filter(|known| *known != database) {
            let message = format!(
                "the file belongs to log {known}, but {} is log {database}: restored or copied by \
                 hand? give it a name of its own with durovfs_db=NAME",
                db.name
            );
            return fail_waiter(waiter, FailureKind::UnknownDatabase, &message);
        }
        db.waiters.push(waiter);
        self.answer_waiters(database);
    }

    fn find(&mut self, name: String, waiters: Vec<Waiter>, delay: Duration) {
        self.next_request += 1;
        let finding = self
            .findings
            .entry(name)
            .or_insert_with(|| Finding::new(self.next_request, delay));
        finding.waiters.extend(waiters);
        self.tick_findings(Instant::now());
    }

    /// Asks the replicas where it is time to.
    pub fn tick_findings(&mut self, now: Instant) {
        let mut due = false;
        for finding in self.findings.values_mut() {
            if now >= finding.ask_at {
                finding.asked_at = now;
                finding.ask_at = now + ASK_PAUSE;
                due = true;
            }
        }
        if !due {
            return;
        }
        // The configured replicas may all have been replaced: then any node may know the log.
        let late = |finding: &Finding| now.duration_since(finding.began) >= FIND_PATIENCE;
        if self.findings.values().any(late) {
            self.connect_all();
        }
        let names: Vec<String> = self.findings.keys().cloned().collect();
        for name in names {
            self.judge_finding(name);
        }
        let nodes: Vec<NodeName> = self.peers.keys().cloned().collect();
        for node in &nodes {
            self.ask_findings(node);
        }
    }

    /// Asks one node for all names that are being looked for.
    pub fn ask_findings(&mut self, node: &NodeName) {
        let Some(link) = self.peers.get(node).and_then(|peer| peer.link.as_ref()) else {
            return;
        };
        for (name, finding) in &self.findings {
            link.outbox.answer(&PrimaryMessage::Find {
                request: finding.request,
                name: name.clone(),
            });
        }
    }

    /// A node says which logs it knows under a name.
    pub fn handle_found(&mut self, node: &NodeName, request: u64, logs: &[FoundLog]) {
        for membership in logs.iter().filter_map(|log| log.membership.as_ref()) {
            self.connect_members(membership);
        }
        let Some((name, finding)) = self
            .findings
            .iter_mut()
            .find(|(_, finding)| finding.request == request)
        else {
            return;
        };
        let (logs, asked_at) = (logs.to_vec(), finding.asked_at);
        finding
            .answers
            .insert(node.clone(), Answer { logs, asked_at });
        let name = name.clone();
        self.judge_finding(name);
    }

    /// Goes on as the answers about a name allow.
    fn judge_finding(&mut self, name: String) {
        let Some(finding) = self.findings.get(&name) else {
            return;
        };
        let own = &self.config.node;
        let silent: Vec<&NodeName> = self
            .peers
            .keys()
            .filter(|node| *node != own || self.config.replicas.contains(node))
            .filter(|node| !finding.answers.contains_key(*node))
            .collect();
        let asked_all = silent.is_empty() || finding.began.elapsed() >= FIND_PATIENCE;
        let found = finding.judge(&name, own, &self.membership, asked_all);
        if let Found::Free(None, _) = found
            && !silent.is_empty()
        {
            tracing::warn!(%name, not_heard = ?silent, "a new log, unless one of these has it");
        }
        match found {
            Found::Open => {}
            Found::Unheard => self.connect_all(),
            Found::Refused(kind, message) => {
                let waiters = self.findings.remove(&name).map(|finding| finding.waiters);
                for waiter in waiters.into_iter().flatten() {
                    fail_waiter(waiter, kind, &message);
                }
            }
            Found::Free(log, taken_from) => self.claim_found(name, log, taken_from),
        }
    }

    fn claim_found(&mut self, name: String, log: Option<DatabaseId>, from: Option<NodeName>) {
        let Some(finding) = self.findings.remove(&name) else {
            return;
        };
        let told = finding.membership().cloned();
        let waiters = finding.waiters;
        let database = log.unwrap_or_else(|| DatabaseId::from_bytes(super::node::random_id()));
        self.names.insert(name.clone(), database);
        let force = waiters
            .iter()
            .filter_map(Waiter::opening)
            .any(|opening| opening.force);
        if let Some(db) = self.primaries.get_mut(&database) {
            db.take_over(force, from);
            if let Some(told) = &told {
                db.machine.handle_membership(told);
            }
            db.begin_claim();
            self.drive_primary(database);
        } else {
            let state = self.primary_journal.state(database);
            let membership = told.unwrap_or_else(|| self.membership());
            let mut db = PrimaryDatabase::new(database, name, membership, state.as_ref());
            db.take_over(force, from);
            if log.is_none() {
                db.machine.declare_new();
            }
            self.primaries.insert(database, db);
            self.start_primary(database);
        }
        for waiter in waiters {
            self.wait_for_log(database, waiter);
        }
    }

    /// The epoch is lost. Whoever opens the database asks the replicas again who is its primary.
    pub fn look_again(&mut self, database: DatabaseId) {
        let Some(db) = self.primaries.get_mut(&database) else {
            return;
        };
        db.failed_claims += 1;
        let reason = db.fenced_reason();
        let (openers, others): (Vec<Waiter>, Vec<Waiter>) = std::mem::take(&mut db.waiters)
            .into_iter()
            .partition(|waiter| waiter.opening().is_some());
        let tries_again = !openers.is_empty() && db.failed_claims <= CLAIMS_MAX;
        let name = db.name.clone();
        for waiter in others {
            fail_waiter(waiter, FailureKind::NotPrimary, &reason);
        }
        if tries_again {
            let pause = ASK_PAUSE + random_part(ASK_PAUSE);
            return self.find(name, openers, pause);
        }
        tracing::warn!(%name, reason, "fenced");
        for waiter in openers {
            fail_waiter(waiter, FailureKind::NotPrimary, &reason);
        }
    }

    /// Takes out the searches' waiters whose time is over, each with what it is told.
    pub fn expired_finders(&mut self, now: Instant) -> Vec<(Waiter, String)> {
        let quorum = self.config.ack_quorum;
        let mut late = Vec::new();
        for (name, finding) in &mut self.findings {
            let answers = finding.answers.len();
            let message = match finding.others(&self.config.node).next() {
                Some((primary, _)) if answers >= quorum => format!(
                    "{name} cannot be opened: {primary} was its primary until a moment ago; try \
                     again, or use `durovfs takeover {name}`"
                ),
                _ => format!(
                    "{name} cannot be opened: {answers} replicas answered, {quorum} are needed"
                ),
            };
            let expired = finding
                .waiters
                .extract_if(.., |waiter| waiter.is_expired(now));
            late.extend(expired.map(|waiter| (waiter, message.clone())));
        }
        self.findings
            .retain(|_, finding| !finding.waiters.is_empty());
        late
    }
}

impl PrimaryDatabase {
    fn take_over(&mut self, force: bool, from: Option<NodeName>) {
        self.forced = force;
        self.taken_from = from;
    }

    /// Why this node takes no commits although others may, for people.
    pub fn fenced_reason(&self) -> String {
        let epoch = match self.machine.state() {
            PrimaryState::Fenced { by } => by,
            _ => self.machine.epoch(),
        };
        let name = &self.name;
        match &self.successor {
            Some(node) => {
                format!("{node} has taken over {name} (epoch {epoch}): reopen")
            }
            None => format!("another host has taken over {name} (epoch {epoch}): reopen"),
        }
    }

    /// The log is open: tells those who opened the database.
    pub fn opened_message(&self, opening: Opening) -> SidecarMessage {
        use durovfs_wire::LogPosition;
        SidecarMessage::Opened {
            request: opening.request,
            database: self.machine.database(),
            epoch: self.machine.epoch(),
            end: LogPosition::new(self.machine.epoch(), self.machine.commit_lsn()),
            last_transaction: self.last_transaction,
            taken_from: self.taken_from.clone().filter(|_| opening.force),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use durovfs_wire::{Epoch, Member};

    const NAME: &str = "app";

    fn node(number: u8) -> NodeName {
        format!("n{number}").parse().expect("a name")
    }

    fn membership(numbers: &[u8]) -> Membership {
        let member = |number: &u8| Member {
            node: node(*number),
            address: format!("10.0.0.{number}:4000"),
            replica: None,
        };
        Membership {
            epoch: Epoch::new(1),
            generation: 1,
            ack_quorum: 3,
            members: numbers.iter().map(member).collect(),
            next: None,
        }
    }

    fn told(members: Option<Membership>) -> Answer {
        let logs = members.map(|members| FoundLog {
            database: DatabaseId::from_bytes([7; 16]),
            primary: None,
            membership: Some(members),
        });
        Answer {
            logs: logs.into_iter().collect(),
            asked_at: Instant::now(),
        }
    }

    // If this failed, a host whose list of replicas is an old one would begin a second log under a
    // name whose replicas were all replaced, and open an empty database.
    #[test]
    fn a_name_is_new_when_all_nodes_were_asked() {
        let configured = membership(&[1, 2, 3, 4, 5]);
        let mut finding = Finding::new(1, Duration::ZERO);
        for number in [1, 2, 3] {
            let judged = finding.judge(NAME, &node(9), &configured, false);
            assert!(matches!(judged, Found::Open), "{number}");
            finding.answers.insert(node(number), told(None));
        }
        let judge =
            |finding: &Finding, asked_all| finding.judge(NAME, &node(9), &configured, asked_all);
        assert!(matches!(judge(&finding, false), Found::Unheard));
        assert!(matches!(judge(&finding, true), Found::Free(None, None)));
        // One of the others knows it: the log's own members decide from here on.
        let members = membership(&[4, 5, 6, 7, 8]);
        finding.answers.insert(node(6), told(Some(members.clone())));
        assert!(matches!(judge(&finding, true), Found::Open));
        for number in [4, 7] {
            finding
                .answers
                .insert(node(number), told(Some(members.clone())));
        }
        assert!(matches!(judge(&finding, false), Found::Free(Some(_), None)));
    }
}
