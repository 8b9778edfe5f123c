//! A replica's machine: a disk that loses what was not synced, the product's journal on it, and the
//! product's binding of the state machines to that journal (`durovfs_sidecar::replica_log`). In
//! here stands only what the daemon's actor and the network do around them.

use super::World;
use super::network::SHARED;
use super::schedule::Event;
use super::settings::{DATABASE_COUNT, HOST_COUNT, Machine, Micros, Mutation, Tear};
use super::{database_id, database_index, host_index, host_name};
use bytes::Bytes;
use durovfs_journal::disk::memory::MemoryDisk;
use durovfs_journal::{DatabaseState, Journal, JournalDriver, JournalError, JournalOptions, Parts};
use durovfs_sidecar::replica_log::{AppendContext, Notice, NoticeSink, ReplicaLog};
use durovfs_wire::peer::{Claim, PrimaryMessage, Promise, RejectReason, ReplicaMessage};
use durovfs_wire::{ClaimantId, EntryPart, Epoch, Lsn, ReplicaId};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes of a segment: as little as the journal takes, so that runs get over many of them.
const SEGMENT_BYTES: u64 = 64 << 10;
/// Parts that an answer to a fetch sends at once.
const PARTS_AT_ONCE: usize = 3;

/// How every journal of the world is opened.
pub fn journal_options(sync: bool, segments: u64) -> JournalOptions {
    JournalOptions {
        segment_bytes: SEGMENT_BYTES,
        limit_bytes: segments * SEGMENT_BYTES,
        ..JournalOptions::new("unused", sync)
    }
}

/// A replica's machine.
pub struct Node {
    pub disk: MemoryDisk,
    /// How often it was started.
    pub life: u64,
    pub up: Option<Running>,
    /// Epochs told in promises, by database: they never go back, whatever happens.
    pub told_epochs: [Epoch; DATABASE_COUNT],
    /// All promises told, for the mutation that forgets them.
    pub told_promises: Vec<(usize, Epoch, ClaimantId)>,
}

/// Its process.
pub struct Running {
    pub journal: Journal,
    driver: JournalDriver,
    pub logs: BTreeMap<usize, ReplicaLog>,
    notices: Arc<Mutex<Vec<Notice>>>,
    sink: NoticeSink,
    write_scheduled: bool,
    /// The host that appended last, by database.
    holders: BTreeMap<usize, usize>,
    /// Hosts that were promised something they cannot hold the replica to: a mutation.
    unfenced: BTreeMap<usize, (usize, Claim)>,
}

/// An answer to a fetch that is under way.
pub struct Answering {
    connection: u64,
    stream: u64,
    node: usize,
    life: u64,
    parts: Parts,
}

impl Node {
    pub fn new() -> Self {
        Self {
            disk: MemoryDisk::default(),
            life: 0,
            up: None,
            told_epochs: [Epoch::ZERO; DATABASE_COUNT],
            told_promises: Vec::new(),
        }
    }

    pub fn is_up(&self) -> bool {
        self.up.is_some()
    }

    /// What a power cut now would leave, as the next process would find it.
    pub fn survivors(&self) -> BTreeMap<usize, DatabaseState> {
        let disk = self.disk.survivor(&mut |_| 0);
        states_on(disk, "a replica")
    }
}

/// What a process that starts on this disk finds.
///
/// # Panics
/// When it finds damage: no power cut may leave that.
pub fn states_on(disk: MemoryDisk, whose: &str) -> BTreeMap<usize, DatabaseState> {
    match Journal::open_driven(Arc::new(disk), &journal_options(true, 64)) {
        Ok((_, _, states)) => states
            .into_iter()
            .map(|state| (database_index(state.database), state))
            .collect(),
        Err(error) => {
            panic!("a power cut left {whose} with a journal that cannot be read: {error}")
        }
    }
}

impl World {
    /// Starts a replica's process on what its disk holds.
    pub(super) fn start_node(&mut self, node: usize) {
        if self.nodes[node].is_up() {
            return;
        }
        let machine = Machine::Node(node);
        let life = self.nodes[node].life;
        if let Some(cut) = self.settings.power_cut
            && (cut.machine, cut.life) == (machine, life)
        {
            self.nodes[node].disk.lose_power_at_barrier(cut.barrier);
        }
        if self.settings.mutation == Mutation::LyingDisks {
            self.nodes[node].disk.lie_about_syncs();
        }
        let sync = self.settings.mutation != Mutation::AckBeforeSync;
        let disk = self.nodes[node].disk.clone();
        let opened = Journal::open_driven(Arc::new(disk), &journal_options(sync, 64));
        let (journal, driver, mut states) = match opened {
            Ok(opened) => opened,
            Err(error) => {
                // An operation failed, or the power went while it started: again.
                let is_damaged = matches!(error, JournalError::Damaged { .. });
                let may_fail = self.may_fail(machine) && !is_damaged;
                assert!(
                    self.nodes[node].disk.is_off() || may_fail,
                    "replica {node} does not start: {error}"
                );
                self.crash_node(node, self.nodes[node].disk.is_off());
                return;
            }
        };
        if self.settings.mutation == Mutation::PromiseNotPersisted {
            let told = &self.nodes[node].told_promises;
            states
                .iter_mut()
                .for_each(|state| forget_promise(state, told));
        }
        let notices: Arc<Mutex<Vec<Notice>>> = Arc::default();
        let seen = notices.clone();
        let sink: NoticeSink = Arc::new(move |notice| {
            seen.lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(notice);
        });
        let drawn = self.draw_replica(node);
        let logs = states
            .iter()
            .map(|state| {
                journal.drop_through(state.database, state.archive_lsn.min(state.commit_lsn));
                let log = ReplicaLog::from_journal(journal.clone(), sink.clone(), state, drawn);
                (database_index(state.database), log)
            })
            .collect();
        self.nodes[node].up = Some(Running {
            journal,
            driver,
            logs,
            notices,
            sink,
            write_scheduled: false,
            holders: BTreeMap::new(),
            unfenced: BTreeMap::new(),
        });
        self.wake_journal(machine);
        self.schedule_rest(machine, life);
    }

    /// The process dies; with its machine's power, or without.
    pub(super) fn crash_node(&mut self, node: usize, power: bool) {
        let tear = self.tear(Machine::Node(node));
        let disk = if power {
            self.tally.node_power_cuts += 1;
            let rng = &mut self.rng;
            self.nodes[node].disk.crash(&mut |below| match tear {
                Tear::Nothing => 0,
                Tear::Everything => below - 1,
                Tear::Mixture => rng.below(below),
            })
        } else {
            self.tally.node_kills += 1;
            self.nodes[node].disk.copy()
        };
        // The old disk takes nothing more, before the journal that has it is dropped.
        let old = std::mem::replace(&mut self.nodes[node].disk, disk);
        let ended = (Machine::Node(node), self.nodes[node].life);
        self.barriers.push((ended, old.barrier_count()));
        self.nodes[node].up = None;
        self.nodes[node].life += 1;
        self.drop_node_connections(node);
        let after = 20_000 + self.rng.below(400_000);
        let machine = Machine::Node(node);
        self.schedule.after(after, Event::Start { machine });
    }

    /// A replica loses its power, and its disk with it: the next process finds an empty one.
    pub(super) fn empty_node(&mut self, node: usize) {
        self.crash_node(node, true);
        self.nodes[node].disk = MemoryDisk::default();
        self.nodes[node].told_epochs = [Epoch::ZERO; DATABASE_COUNT];
        self.nodes[node].told_promises.clear();
    }

    pub(super) fn node_write(&mut self, node: usize, life: u64) {
        let took = self.sync_time();
        let Some(running) = live(&mut self.nodes[node], life) else {
            return;
        };
        running.write_scheduled = false;
        running.driver.write_waiting();
        if self.nodes[node].disk.is_off() {
            return self.crash_node(node, true);
        }
        let machine = Machine::Node(node);
        self.schedule.after(took, Event::Hear { machine, life });
    }

    pub(super) fn node_rest(&mut self, node: usize, life: u64) {
        let Some(running) = live(&mut self.nodes[node], life) else {
            return;
        };
        running.driver.rest();
        if self.nodes[node].disk.is_off() {
            return self.crash_node(node, true);
        }
        self.schedule_rest(Machine::Node(node), life);
    }

    /// The actor takes the notices of the journal.
    pub(super) fn node_hear(&mut self, node: usize, life: u64) {
        let Some(running) = live(&mut self.nodes[node], life) else {
            return;
        };
        let notices = std::mem::take(
            &mut *running
                .notices
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
        );
        for notice in notices {
            let database = database_index(notice.database);
            let Some(running) = live(&mut self.nodes[node], life) else {
                return;
            };
            let Some(log) = running.logs.get_mut(&database) else {
                continue;
            };
            let failed = log.handle_notice(notice).is_some();
            self.drive_node(node, database);
            if failed {
                self.tally.storage_failures += 1;
                let who = (Machine::Node(node), life, database);
                self.checker.forget_ladder(who);
                if let Some(running) = live(&mut self.nodes[node], life)
                    && let Some(log) = running.logs.get_mut(&database)
                {
                    log.recover_from_trouble();
                }
                self.wake_journal(Machine::Node(node));
            }
        }
    }

    /// Marks that something was handed to a journal.
    pub(super) fn wake_journal(&mut self, machine: Machine) {
        let after = 20 + self.rng.below(300);
        let (scheduled, life) = match machine {
            Machine::Node(node) => {
                let life = self.nodes[node].life;
                let Some(running) = &mut self.nodes[node].up else {
                    return;
                };
                (&mut running.write_scheduled, life)
            }
            Machine::Host(host) => {
                let life = self.hosts[host].life;
                let Some(running) = &mut self.hosts[host].up else {
                    return;
                };
                (&mut running.write_scheduled, life)
            }
        };
        if !std::mem::replace(scheduled, true) {
            self.schedule.after(after, Event::Write { machine, life });
        }
    }

    /// How long a write and its sync take.
    pub(super) fn sync_time(&mut self) -> Micros {
        if self.chance(5) {
            self.rng.below(80_000)
        } else {
            100 + self.rng.below(2_000)
        }
    }

    /// A message from a host.
    pub(super) fn node_receives(
        &mut self,
        connection: u64,
        stream: u64,
        message: PrimaryMessage,
        payload: Bytes,
    ) {
        let Some((host, node)) = self.network.reaches_node(connection, self.schedule.now) else {
            return;
        };
        if !self.nodes[node].is_up() {
            return;
        }
        match message {
            PrimaryMessage::Claim(claim) => self.node_claim(host, node, &claim),
            PrimaryMessage::Append {
                generation,
                epoch,
                previous,
                commit_lsn,
                archive_lsn,
                part,
            } => {
                let context = AppendContext {
                    generation,
                    epoch,
                    previous,
                    commit_lsn,
                    archive_lsn,
                };
                let entry = EntryPart {
                    header: part,
                    payload,
                };
                self.node_append(host, node, context, entry);
            }
            PrimaryMessage::Fetch {
                database,
                epoch,
                first_lsn,
                last_lsn,
            } => {
                let range = (first_lsn, last_lsn);
                self.node_fetch(
                    connection,
                    stream,
                    node,
                    database_index(database),
                    epoch,
                    range,
                );
            }
            told => self.node_told(node, told),
        }
        self.wake_journal(Machine::Node(node));
    }

    /// What a primary tells of the log, beside entries.
    fn node_told(&mut self, node: usize, message: PrimaryMessage) {
        let database = match &message {
            PrimaryMessage::Members { database, .. }
            | PrimaryMessage::Progress { database, .. }
            | PrimaryMessage::Mend { database, .. } => database_index(*database),
            _ => return,
        };
        let tamper = self.settings.mutation == Mutation::DropBeforeArchived;
        let running = self.nodes[node].up.as_mut();
        let Some(log) = running.and_then(|running| running.logs.get_mut(&database)) else {
            return;
        };
        match message {
            PrimaryMessage::Progress {
                epoch,
                commit_lsn,
                archive_lsn,
                ..
            } => {
                let archive_lsn = if tamper { commit_lsn } else { archive_lsn };
                log.handle_progress(epoch, commit_lsn, archive_lsn);
            }
            PrimaryMessage::Mend { epoch, lsn, .. } => log.handle_mend(epoch, lsn),
            PrimaryMessage::Members { membership, .. } => {
                let taken = log.handle_members(membership);
                assert!(taken.is_ok(), "replica {node} finds a violation: {taken:?}");
            }
            _ => {}
        }
        self.drive_node(node, database);
    }

    fn tampered_archive(&self, commit_lsn: Lsn, archive_lsn: Lsn) -> Lsn {
        if self.settings.mutation == Mutation::DropBeforeArchived {
            commit_lsn
        } else {
            archive_lsn
        }
    }

    /// An identity for a log that the node's journal knows nothing of.
    fn draw_replica(&mut self, node: usize) -> ReplicaId {
        if self.settings.mutation == Mutation::EmptyDiskVotes {
            return ReplicaId::from_bytes([node as u8 + 1; 16]);
        }
        let (high, low) = (self.rng.next_number(), self.rng.next_number());
        ReplicaId::from_bytes((u128::from(high) << 64 | u128::from(low)).to_le_bytes())
    }

    fn node_claim(&mut self, host: usize, node: usize, claim: &Claim) {
        let drawn = self.draw_replica(node);
        let database = database_index(claim.database);
        let protects = self.settings.protects_primary && self.schedule.now > self.forced_until;
        let holder = self.nodes[node].up.as_ref().and_then(|running| {
            let holder = *running.holders.get(&database)?;
            let lives = holder != host
                && self.hosts[holder].is_up()
                && self.network.links[holder][node].connection.is_some();
            lives.then_some(holder)
        });
        if protects && let Some(holder) = holder {
            let primary = host_name(holder);
            let reason = RejectReason::Alive { primary };
            return self.node_rejects(host, node, database, claim.epoch, reason);
        }
        let Some(running) = &mut self.nodes[node].up else {
            return;
        };
        let (journal, sink) = (running.journal.clone(), running.sink.clone());
        let log = running
            .logs
            .entry(database)
            .or_insert_with(|| ReplicaLog::unheard_of(journal, sink, claim.database, drawn));
        if self.settings.mutation == Mutation::ReadsDoNotFence
            && claim.epoch > log.machine().promised()
            && log.machine().last().lsn > Lsn::ZERO
        {
            let promise = promise_without_fence(log, claim);
            running.unfenced.insert(database, (host, claim.clone()));
            let message = ReplicaMessage::Promised(promise);
            return self.send_to_host(host, node, SHARED, &message, &Bytes::new());
        }
        log.handle_claim(&host_name(host), claim);
        self.drive_node(node, database);
    }

    fn node_append(
        &mut self,
        host: usize,
        node: usize,
        mut context: AppendContext,
        entry: EntryPart,
    ) {
        let (database, epoch) = (database_index(entry.header.database), context.epoch);
        context.archive_lsn = self.tampered_archive(context.commit_lsn, context.archive_lsn);
        let position = entry.header.position();
        let Some(running) = &mut self.nodes[node].up else {
            return;
        };
        if let Some((claimant, claim)) = running.unfenced.get(&database).cloned()
            && claim.epoch == epoch
        {
            running.unfenced.remove(&database);
            if let Some(log) = running.logs.get_mut(&database) {
                log.handle_claim(&host_name(claimant), &claim);
            }
            self.drive_node(node, database);
            self.write_and_hear_now(node);
        }
        let Some(running) = &mut self.nodes[node].up else {
            return;
        };
        let Some(log) = running.logs.get_mut(&database) else {
            let promised = Epoch::ZERO;
            let reason = RejectReason::Fenced { promised };
            return self.node_rejects(host, node, database, epoch, reason);
        };
        let machine = log.machine();
        let diverges = machine.promised() == epoch
            && machine.last().lsn >= position.lsn
            && machine.commit_lsn() < position.lsn
            && machine.history().epoch_at(position.lsn) != Some(position.epoch);
        if self.settings.mutation == Mutation::NoTruncation && diverges {
            let message = ReplicaMessage::Ack {
                database: database_id(database),
                epoch,
                generation: context.generation,
                replica: machine.replica(),
                flush_lsn: position.lsn,
            };
            return self.send_to_host(host, node, SHARED, &message, &Bytes::new());
        }
        match log.handle_append(context, entry, ()) {
            Ok(()) => {
                running.holders.insert(database, host);
                self.drive_node(node, database);
            }
            Err(refused) => {
                assert!(
                    matches!(
                        refused,
                        durovfs_sidecar::replica_log::AppendRefused::Rejected(_)
                    ),
                    "replica {node} finds a violation: {refused}"
                );
                self.node_rejects(host, node, database, epoch, refused.into_reason());
            }
        }
    }

    /// All that waits is on disk and heard of, at once.
    fn write_and_hear_now(&mut self, node: usize) {
        let life = self.nodes[node].life;
        if let Some(running) = &mut self.nodes[node].up {
            running.driver.write_waiting();
        }
        self.node_hear(node, life);
    }

    fn node_rejects(
        &mut self,
        host: usize,
        node: usize,
        database: usize,
        epoch: Epoch,
        reason: RejectReason,
    ) {
        let message = ReplicaMessage::Rejected {
            database: database_id(database),
            epoch,
            reason,
        };
        self.send_to_host(host, node, SHARED, &message, &Bytes::new());
    }

    /// Sends what a log has to say, each message after the checkers saw it.
    fn drive_node(&mut self, node: usize, database: usize) {
        while let Some((to, message)) = self.nodes[node]
            .up
            .as_mut()
            .and_then(|running| running.logs.get_mut(&database))
            .and_then(ReplicaLog::poll_message)
        {
            self.check_told(node, database, &message);
            self.send_to_host(host_index(&to), node, SHARED, &message, &Bytes::new());
        }
    }

    fn node_fetch(
        &mut self,
        connection: u64,
        stream: u64,
        node: usize,
        database: usize,
        epoch: Epoch,
        (first_lsn, last_lsn): (Lsn, Lsn),
    ) {
        let Some((host, _)) = self.network.reaches_host(connection) else {
            return;
        };
        let unfenced = self.settings.mutation == Mutation::ReadsDoNotFence;
        let Some(running) = &self.nodes[node].up else {
            return;
        };
        let checked = match running.logs.get(&database) {
            None => Err(RejectReason::Fenced {
                promised: Epoch::ZERO,
            }),
            Some(_) if unfenced => Ok(()),
            Some(log) => log.machine().check_fetch(epoch, first_lsn, last_lsn),
        };
        let parts = running
            .journal
            .parts(database_id(database), first_lsn, last_lsn);
        match (checked, parts) {
            (Err(reason), _) => {
                let message = ReplicaMessage::Rejected {
                    database: database_id(database),
                    epoch,
                    reason,
                };
                self.send_to_host(host, node, stream, &message, &Bytes::new());
            }
            (Ok(()), Err(error)) => {
                let error = Some(error.to_string());
                let message = ReplicaMessage::FetchEnd { error };
                self.send_to_host(host, node, stream, &message, &Bytes::new());
            }
            (Ok(()), Ok(parts)) => {
                let life = self.nodes[node].life;
                let answering = Answering {
                    connection,
                    stream,
                    node,
                    life,
                    parts,
                };
                self.answering.insert(stream, answering);
                self.schedule.after(50, Event::Answer { fetch: stream });
            }
        }
    }

    /// Some more parts for a fetch.
    pub(super) fn answer_fetch(&mut self, fetch: u64) {
        let Some(mut answering) = self.answering.remove(&fetch) else {
            return;
        };
        let (node, stream) = (answering.node, answering.stream);
        let host = self.network.reaches_host(answering.connection);
        let alive = live(&mut self.nodes[node], answering.life).is_some();
        let (Some((host, _)), true) = (host, alive) else {
            return;
        };
        for _ in 0..PARTS_AT_ONCE {
            let (message, payload) = match answering.parts.next() {
                None => (ReplicaMessage::FetchEnd { error: None }, Bytes::new()),
                Some(Err(error)) => {
                    let error = Some(error.to_string());
                    (ReplicaMessage::FetchEnd { error }, Bytes::new())
                }
                Some(Ok(part)) => (
                    ReplicaMessage::FetchedPart { part: part.header },
                    part.payload,
                ),
            };
            self.send_to_host(host, node, stream, &message, &payload);
            if matches!(message, ReplicaMessage::FetchEnd { .. }) {
                return;
            }
        }
        self.answering.insert(fetch, answering);
        let after = 50 + self.rng.below(3_000);
        self.schedule.after(after, Event::Answer { fetch });
    }

    /// The entries of a database that a replica holds, read back from its disk.
    pub(super) fn node_entries(&self, node: usize, database: usize) -> Option<(Lsn, Parts)> {
        let running = self.nodes[node].up.as_ref()?;
        let state = running.journal.state(database_id(database))?;
        let parts = running
            .journal
            .parts(state.database, state.first_lsn, state.last.lsn)
            .ok()?;
        Some((state.first_lsn, parts))
    }

    /// Whether all hosts are without something under way to this node.
    pub(super) fn node_is_level(&self, node: usize, database: usize, last_lsn: Lsn) -> bool {
        let running = self.nodes[node].up.as_ref();
        running
            .and_then(|running| running.logs.get(&database))
            .is_some_and(|log| log.machine().flush_lsn() == last_lsn)
            && (0..HOST_COUNT).any(|host| self.network.links[host][node].connection.is_some())
    }
}

fn live(node: &mut Node, life: u64) -> Option<&mut Running> {
    if node.life == life {
        node.up.as_mut()
    } else {
        None
    }
}

/// As if the last promise had never been written: what was told before it stands.
fn forget_promise(state: &mut DatabaseState, told: &[(usize, Epoch, ClaimantId)]) {
    let database = database_index(state.database);
    let before = told.iter().rev().find(|(of, epoch, _)| {
        *of == database && *epoch < state.promised && *epoch >= state.last.epoch
    });
    if let Some((_, epoch, claimant)) = before {
        (state.promised, state.claimant) = (*epoch, Some(*claimant));
    }
}

fn promise_without_fence(log: &ReplicaLog, claim: &Claim) -> Promise {
    let machine = log.machine();
    let lsn = machine.flush_lsn();
    let mut history = machine.history().clone();
    history.truncate_after(lsn);
    Promise {
        database: claim.database,
        replica: machine.replica(),
        membership: machine.membership().cloned(),
        epoch: claim.epoch,
        claimant: claim.claimant,
        previous_promise: machine.promised(),
        last: history
            .position_at(lsn)
            .unwrap_or(durovfs_wire::LogPosition::ZERO),
        commit_lsn: machine.commit_lsn(),
        archive_lsn: machine.archive_lsn(),
        last_transaction: None,
        mending: machine.is_mending(),
        history: history.runs().to_vec(),
    }
}
