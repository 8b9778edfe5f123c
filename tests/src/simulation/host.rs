//! A host: its own journal, which is no vote and is not synced, and the databases that it serves or
//! wants to. What the daemon's actor does around the product's `Primary` is done here once more, in
//! the same order; `feeds.rs` has the sending, `commits.rs` the way of a commit.

mod own_journal;

use super::World;
use super::feeds::{Feed, Fetch};
use super::node::{journal_options, states_on};
use super::schedule::Event;
use super::settings::{
    DATABASE_COUNT, Machine, Micros, Mutation, NODE_COUNT_MAX, REPLICA_COUNT, Tear,
};
use super::{database_id, database_index, node_index, node_name};
use bytes::Bytes;
use durovfs_journal::disk::memory::MemoryDisk;
use durovfs_journal::{DatabaseState, Journal, JournalDriver, JournalError, Record};
use durovfs_quorum::{LocalLog, Primary, PrimaryEffect, PrimaryState};
use durovfs_sidecar::donor::{DonorEnd, LastTransaction};
use durovfs_wire::entry::TransactionSummary;
use durovfs_wire::membership::{Member, Membership};
use durovfs_wire::peer::{PrimaryMessage, ReplicaMessage};
use durovfs_wire::{
    ClaimantId, ClientId, EntryPart, Epoch, LogPosition, Lsn, NodeName, Origin, PartHeader,
    PartKind, Timestamp,
};
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

/// How often a host looks at its clocks.
const TICK: Micros = 20_000;
/// Pause before a claim is tried again, local time.
const RECLAIM_PAUSE: Micros = 100_000;
/// How often replicas that refused the epoch are asked again, local time.
const ASK_REFUSED_INTERVAL: Micros = 500_000;
/// Segments that a host's journal may have before it drops what is archived.
const HOST_SEGMENTS: u64 = 12;

/// A host's machine.
pub struct Host {
    disk: MemoryDisk,
    /// How often it was started.
    pub life: u64,
    pub up: Option<RunningHost>,
    /// How fast its clock goes, of a thousand, and where it stands at time zero.
    pub clock: (u64, u64),
}

/// Its sidecar.
pub struct RunningHost {
    pub journal: Journal,
    driver: JournalDriver,
    pub servings: BTreeMap<usize, Serving>,
    notices: Arc<Mutex<Vec<OwnNotice>>>,
    pub write_scheduled: bool,
}

/// What the host's own journal did.
#[derive(Debug)]
struct OwnNotice {
    database: usize,
    what: OwnWritten,
    result: Result<(), JournalError>,
}

#[derive(Debug, Clone, Copy)]
enum OwnWritten {
    Records {
        position: LogPosition,
        complete: bool,
    },
    /// A part of this fetch.
    Fetched(u64),
    /// Progress; then this may go, if the journal needs the room.
    Progress(Option<Lsn>),
}

/// A database that this host is, or wants to be, primary of.
pub struct Serving {
    pub machine: Primary,
    /// The own journal has all through here.
    pub written_lsn: Lsn,
    own_writes: u32,
    epoch_start: Option<LogPosition>,
    pub feeds: Vec<Feed>,
    pub fetch: Option<Fetch>,
    /// Commits whose outcome is open, in the log's order.
    pub pending: VecDeque<Pending>,
    pub last_transaction: Option<TransactionSummary>,
    pub donor_end: DonorEnd,
    own_trouble: bool,
    pub claimant: ClaimantId,
    claim_at: Option<Micros>,
    /// When the claim under way was first looked at, and when members were searched last, local
    /// time.
    pub claiming_since: Option<Micros>,
    pub searched_at: Micros,
    /// Commits are refused since then, for a step of a change.
    pub held_since: Option<Micros>,
    /// Nodes whose replica is not the recorded one, and since when.
    pub strangers: BTreeMap<NodeName, Micros>,
    /// When replicas that refused the epoch are asked again.
    ask_refused_at: Micros,
    pub settled: BTreeMap<ClientId, u64>,
    /// The checkers were told of all commits up to here.
    told_lsn: Lsn,
    pub commits_untold: bool,
}

/// A commit that was sent.
#[derive(Debug, Clone)]
pub struct Pending {
    pub summary: TransactionSummary,
    /// Somebody waits for it.
    pub awaited: bool,
    pub timeout: Micros,
    /// When it was sent, local time.
    pub sent_at: Micros,
}

impl Host {
    pub fn new(clock: (u64, u64)) -> Self {
        Self {
            disk: MemoryDisk::default(),
            life: 0,
            up: None,
            clock,
        }
    }

    pub fn is_up(&self) -> bool {
        self.up.is_some()
    }

    /// What its clock shows.
    pub fn local(&self, now: Micros) -> Micros {
        now * self.clock.0 / 1000 + self.clock.1
    }

    pub fn serving(&mut self, database: usize) -> Option<&mut Serving> {
        self.up.as_mut()?.servings.get_mut(&database)
    }

    pub fn disk(&self) -> &MemoryDisk {
        &self.disk
    }
}

impl Serving {
    /// With the members that the own journal noted, unless somebody told newer ones: as in the
    /// daemon.
    fn new(database: usize, told: Membership, state: Option<&DatabaseState>) -> Self {
        let noted = state.and_then(|state| state.membership.clone());
        let membership = noted.filter(|noted| noted.epoch >= told.epoch);
        Self::of_members(database, membership.unwrap_or(told), state)
    }

    fn of_members(database: usize, membership: Membership, state: Option<&DatabaseState>) -> Self {
        let local = state.map_or_else(LocalLog::default, |state| LocalLog {
            last: state.last,
            first_lsn: state.first_lsn,
            commit_lsn: state.commit_lsn,
            archive_lsn: state.archive_lsn,
            history: state.history.clone(),
            promised: state.promised,
        });
        let written_lsn = local.last.lsn;
        let name = format!("database-{database}");
        let mut machine = Primary::new(database_id(database), name, membership, local);
        machine.handle_retained(state.map_or(Lsn::ZERO.next(), |state| state.first_lsn));
        let told_lsn = machine.commit_lsn();
        Self {
            machine,
            written_lsn,
            own_writes: 0,
            epoch_start: None,
            feeds: vec![Feed::stopped(); NODE_COUNT_MAX],
            fetch: None,
            pending: VecDeque::new(),
            last_transaction: state.and_then(|state| state.last_transaction),
            donor_end: DonorEnd::NONE,
            own_trouble: false,
            claimant: ClaimantId::from_bytes([0; 16]),
            claim_at: None,
            claiming_since: None,
            searched_at: 0,
            held_since: None,
            strangers: BTreeMap::new(),
            ask_refused_at: 0,
            settled: BTreeMap::new(),
            told_lsn,
            commits_untold: false,
        }
    }

    /// Whether commits may be taken.
    pub fn is_open(&self) -> bool {
        self.machine.state() == PrimaryState::Leading && !self.own_trouble
    }

    /// The last transaction, committed or not yet.
    pub fn newest_transaction(&self) -> Option<TransactionSummary> {
        let pending = self.pending.back().map(|pending| pending.summary);
        pending.or(self.last_transaction)
    }

    pub fn note_settled(&mut self, origin: Origin) {
        let settled = self.settled.entry(origin.client).or_default();
        *settled = origin.sequence.max(*settled);
    }
}

impl World {
    /// As every node is configured: the first five.
    pub(super) fn configured(&self) -> Membership {
        Membership {
            epoch: Epoch::ZERO,
            generation: 1,
            ack_quorum: 3,
            members: (0..REPLICA_COUNT)
                .map(|node| Member::configured(node_name(node), String::new()))
                .collect(),
            next: None,
        }
    }

    pub(super) fn local(&self, host: usize) -> Micros {
        self.hosts[host].local(self.schedule.now)
    }

    /// Starts a host's sidecar on what its disk holds.
    pub(super) fn start_host(&mut self, host: usize) {
        if self.hosts[host].is_up() {
            return;
        }
        let machine = Machine::Host(host);
        let life = self.hosts[host].life;
        if let Some(cut) = self.settings.power_cut
            && (cut.machine, cut.life) == (machine, life)
        {
            self.hosts[host].disk.lose_power_at_barrier(cut.barrier);
        }
        let disk = self.hosts[host].disk.clone();
        let opened = Journal::open_driven(Arc::new(disk), &journal_options(false, 64));
        let (journal, driver, states) = match opened {
            Ok(opened) => opened,
            Err(error) => {
                let is_damaged = matches!(error, JournalError::Damaged { .. });
                let may_fail = self.may_fail(machine) && !is_damaged;
                assert!(
                    self.hosts[host].disk.is_off() || may_fail,
                    "host {host} does not start: {error}"
                );
                self.crash_host(host, self.hosts[host].disk.is_off());
                return;
            }
        };
        let membership = self.configured();
        let servings = states
            .iter()
            .map(|state| {
                let database = database_index(state.database);
                (
                    database,
                    Serving::new(database, membership.clone(), Some(state)),
                )
            })
            .collect();
        self.hosts[host].up = Some(RunningHost {
            journal,
            driver,
            servings,
            notices: Arc::default(),
            write_scheduled: false,
        });
        for node in 0..self.nodes.len() {
            self.connect(host, node);
        }
        for state in &states {
            self.begin_claim(host, database_index(state.database));
        }
        self.schedule.after(TICK, Event::Tick { host, life });
        self.schedule_rest(machine, life);
    }

    /// The process dies; with its machine's power, or without. Its applications go with the power.
    pub(super) fn crash_host(&mut self, host: usize, power: bool) {
        let tear = self.tear(Machine::Host(host));
        let rng = &mut self.rng;
        let disk = if power {
            self.hosts[host].disk.crash(&mut |below| match tear {
                Tear::Nothing => 0,
                Tear::Everything => below - 1,
                Tear::Mixture => rng.below(below),
            })
        } else {
            self.hosts[host].disk.copy()
        };
        let old = std::mem::replace(&mut self.hosts[host].disk, disk);
        let ended = (Machine::Host(host), self.hosts[host].life);
        self.barriers.push((ended, old.barrier_count()));
        self.hosts[host].up = None;
        self.hosts[host].life += 1;
        self.tally.host_crashes += 1;
        self.drop_host_connections(host);
        for database in 0..DATABASE_COUNT {
            self.sidecar_gone(host, database, power);
        }
        let after = 20_000 + self.rng.below(400_000);
        let machine = Machine::Host(host);
        self.schedule.after(after, Event::Start { machine });
    }

    /// The database's serving, made if this host never had one.
    pub(super) fn ensure_serving(&mut self, host: usize, database: usize) {
        // What a search for the log's name would find.
        let known = self.ever_promised[database];
        let membership = self.found_members(host, database);
        let Some(running) = &mut self.hosts[host].up else {
            return;
        };
        if running.servings.contains_key(&database) {
            return;
        }
        let mut serving = Serving::new(database, membership, None);
        if !known {
            serving.machine.declare_new();
        }
        running.servings.insert(database, serving);
        self.introduce(host, database);
        self.begin_claim(host, database);
    }

    /// Tells a machine which nodes are connected that it takes for not connected.
    fn introduce(&mut self, host: usize, database: usize) {
        for node in 0..self.nodes.len() {
            let name = node_name(node);
            if self.network.links[host][node].connection.is_some()
                && let Some(serving) = self.hosts[host].serving(database)
                && let Some(progress) = serving.machine.node_progress(&name)
                && !progress.connected
            {
                serving.machine.handle_connected(&name);
            }
        }
    }

    pub(super) fn claimant(&mut self) -> ClaimantId {
        let (high, low) = (self.rng.next_number(), self.rng.next_number());
        ClaimantId::from_bytes((u128::from(high) << 64 | u128::from(low)).to_le_bytes())
    }

    pub(super) fn begin_claim(&mut self, host: usize, database: usize) {
        let claimant = self.claimant();
        let Some(serving) = self.hosts[host].serving(database) else {
            return;
        };
        serving.claimant = claimant;
        serving.donor_end = DonorEnd::NONE;
        serving.machine.start_claim(claimant);
        self.drive(host, database);
    }

    pub(super) fn begin_bury(&mut self, host: usize, database: usize) {
        let claimant = self.claimant();
        let Some(serving) = self.hosts[host].serving(database) else {
            return;
        };
        serving.claimant = claimant;
        serving.machine.start_bury(claimant);
        self.drive(host, database);
    }

    pub(super) fn host_connected(&mut self, host: usize, node: usize) {
        for database in 0..DATABASE_COUNT {
            if let Some(serving) = self.hosts[host].serving(database) {
                serving.machine.handle_connected(&node_name(node));
                self.drive(host, database);
            }
        }
    }

    pub(super) fn host_disconnected(&mut self, host: usize, node: usize) {
        for database in 0..DATABASE_COUNT {
            if let Some(serving) = self.hosts[host].serving(database) {
                serving.feeds[node].stop();
                serving.machine.handle_disconnected(&node_name(node));
                self.fetch_connection_lost(host, database, node);
                self.drive(host, database);
            }
        }
    }

    /// A message from a replica.
    pub(super) fn host_receives(
        &mut self,
        connection: u64,
        stream: u64,
        message: ReplicaMessage,
        payload: Bytes,
    ) {
        let Some((host, node)) = self.network.reaches_host(connection) else {
            return;
        };
        if stream != super::network::SHARED {
            return self.fetch_answer(host, node, stream, message, payload);
        }
        let database = match &message {
            ReplicaMessage::Promised(promise) => promise.database,
            ReplicaMessage::Ack { database, .. } | ReplicaMessage::Rejected { database, .. } => {
                *database
            }
            _ => return,
        };
        let database = database_index(database);
        let Some(serving) = self.hosts[host].serving(database) else {
            return;
        };
        if let ReplicaMessage::Promised(promise) = &message
            && promise.epoch == serving.machine.epoch()
        {
            serving.donor_end.note(promise);
        }
        let taken = serving.machine.handle_message(&node_name(node), &message);
        // A primary that sees that a replica forgot leaves it alone: it must not save this mistake.
        let forgives = self.settings.mutation == Mutation::EmptyDiskVotes;
        assert!(
            taken.is_ok() || forgives,
            "host {host} finds a violation: {taken:?}"
        );
        if self.settings.mutation == Mutation::QuorumOfTwo {
            self.count_twice(host, node, database, &message);
        }
        self.drive(host, database);
        if let Some(serving) = self.hosts[host].serving(database) {
            serving.feeds[node].hear(&message);
        }
        if matches!(message, ReplicaMessage::Ack { .. }) {
            self.pump_feed(host, database, node);
        }
    }

    /// Counts the ack of one of the first two replicas for the third one as well.
    fn count_twice(&mut self, host: usize, node: usize, database: usize, message: &ReplicaMessage) {
        let third = self.nodes[2].up.as_ref();
        let third = third.and_then(|running| running.logs.get(&database));
        let Some(third) = third.map(|log| log.machine().replica()) else {
            return;
        };
        let mut counted = message.clone();
        if let ReplicaMessage::Ack { replica, .. } = &mut counted
            && node < 2
            && let Some(serving) = self.hosts[host].serving(database)
        {
            *replica = third;
            // Refused when nothing is on its way to that replica.
            let _ = serving.machine.handle_message(&node_name(2), &counted);
        }
    }

    /// Runs a database's machine until it wants nothing more.
    pub(super) fn drive(&mut self, host: usize, database: usize) {
        while let Some(effect) = self.hosts[host]
            .serving(database)
            .and_then(|serving| serving.machine.poll_effect())
        {
            self.carry_out(host, database, effect);
        }
        if let Some(serving) = self.hosts[host].serving(database) {
            let (epoch, commit_lsn) = (serving.machine.epoch(), serving.machine.commit_lsn());
            let life = self.hosts[host].life;
            self.checker
                .note_ladder((Machine::Host(host), life, database), epoch, commit_lsn);
        }
    }

    fn carry_out(&mut self, host: usize, database: usize, effect: PrimaryEffect) {
        let now = self.schedule.now;
        self.trace.say(now, || {
            format!("host {host} database {database}: {effect:?}")
        });
        match effect {
            PrimaryEffect::Send { node, message } => {
                let node = node_index(&node);
                self.send_to_node(host, node, super::network::SHARED, &message, &Bytes::new());
            }
            PrimaryEffect::CutOwnLog { after } => self.cut_own_log(host, database, after),
            PrimaryEffect::RestartOwnLog { at } => self.restart_own_log(host, database, at),
            PrimaryEffect::Fetch {
                donor,
                first_lsn,
                last,
            } => self.begin_fetch(host, database, node_index(&donor), first_lsn, last),
            PrimaryEffect::NodesChanged => self.introduce(host, database),
            PrimaryEffect::NoteMembership { membership } => {
                self.note_members(host, database, &membership);
                let database_id = database_id(database);
                let record = Record::Membership {
                    database: database_id,
                    membership,
                };
                self.write_own(host, database, vec![record], LogPosition::ZERO, false);
            }
            PrimaryEffect::AppendEpochStart { position } => {
                if let Some(serving) = self.hosts[host].serving(database) {
                    if serving.own_writes == 0 {
                        self.write_epoch_start(host, database, position);
                    } else {
                        serving.epoch_start = Some(position);
                    }
                }
            }
            PrimaryEffect::Feed {
                node,
                next_lsn,
                previous,
            } => {
                let node = node_index(&node);
                if let Some(serving) = self.hosts[host].serving(database) {
                    serving.feeds[node].start(next_lsn, previous);
                    self.pump_feed(host, database, node);
                }
            }
            PrimaryEffect::StopFeed { node } => {
                if let Some(serving) = self.hosts[host].serving(database) {
                    serving.feeds[node_index(&node)].stop();
                }
            }
            PrimaryEffect::Opened { .. } => self.opened(host, database),
            PrimaryEffect::Committed { lsn } => self.committed(host, database, lsn),
            PrimaryEffect::Buried { lsn } => self.buried(host, database, lsn),
            PrimaryEffect::BuryRefused => self.tally.bury_refused += 1,
            PrimaryEffect::Fenced { .. } => self.fenced(host, database),
        }
    }

    fn opened(&mut self, host: usize, database: usize) {
        self.tally.opened += 1;
        // Ordinary recovery has decided: what was pending is in the log, or never will be.
        self.settle_by_log(host, database);
    }

    fn committed(&mut self, host: usize, database: usize, lsn: Lsn) {
        let Some(serving) = self.hosts[host].serving(database) else {
            return;
        };
        let positions = positions_of(&serving.machine, serving.told_lsn, lsn);
        serving.told_lsn = serving.told_lsn.max(lsn);
        serving.commits_untold = true;
        let through = LogPosition::new(serving.machine.epoch(), lsn);
        self.tally.committed += positions.len() as u64;
        self.checker.commit(database, &positions);
        self.settle_committed(host, database, through);
    }

    fn buried(&mut self, host: usize, database: usize, lsn: Lsn) {
        self.tally.buried += 1;
        let Some(serving) = self.hosts[host].serving(database) else {
            return;
        };
        let oldest = serving.pending.front();
        if oldest.is_some_and(|pending| pending.summary.position.lsn >= lsn) {
            self.settle_buried(host, database);
        }
    }

    fn fenced(&mut self, host: usize, database: usize) {
        self.tally.fenced += 1;
        self.abandon_pending(host, database);
        let wanted = self.apps[host][database].wants_open;
        let local = self.local(host);
        let pause = RECLAIM_PAUSE + self.rng.below(RECLAIM_PAUSE);
        if let Some(serving) = self.hosts[host].serving(database)
            && wanted
        {
            serving.claim_at = Some(local + pause);
        }
    }

    /// Never back within a log, whatever the clock does.
    pub(super) fn entry_time(&mut self, host: usize, database: usize) -> Timestamp {
        let local = self.local(host) as i64;
        let last = self.hosts[host]
            .serving(database)
            .and_then(|serving| serving.newest_transaction())
            .map_or(0, |summary| summary.commit.time.as_micros());
        Timestamp::from_micros(local.max(last + 1))
    }

    /// The host looks at its clocks.
    pub(super) fn host_tick(&mut self, host: usize, life: u64) {
        if self.hosts[host].life != life || !self.hosts[host].is_up() {
            return;
        }
        let local = self.local(host);
        for database in 0..DATABASE_COUNT {
            self.tick_pending(host, database, local);
            self.tick_claims(host, database, local);
            self.tick_refused(host, database, local);
            self.tick_members(host, database, local);
            self.tick_feeds(host, database);
            self.tell_progress(host, database);
            self.drive(host, database);
        }
        self.schedule.after(TICK, Event::Tick { host, life });
    }

    fn tick_claims(&mut self, host: usize, database: usize, local: Micros) {
        let Some(serving) = self.hosts[host].serving(database) else {
            return;
        };
        if serving.claim_at.is_none_or(|at| local < at) {
            return;
        }
        serving.claim_at = None;
        if serving.own_trouble {
            self.restart_primary(host, database);
        } else if matches!(
            serving.machine.state(),
            PrimaryState::Fenced { .. } | PrimaryState::Idle
        ) {
            self.begin_claim(host, database);
        }
    }

    /// A replica that refused the epoch is asked again; when it promised this epoch or a higher one
    /// to somebody who never won, only a higher one brings it back.
    fn tick_refused(&mut self, host: usize, database: usize, local: Micros) {
        let used = self.apps[host][database].wants_open;
        let Some(serving) = self.hosts[host].serving(database) else {
            return;
        };
        if local < serving.ask_refused_at || serving.machine.state() != PrimaryState::Leading {
            return;
        }
        serving.ask_refused_at = local + ASK_REFUSED_INTERVAL;
        let epoch = serving.machine.epoch();
        let refused: Vec<(NodeName, Epoch)> = serving
            .machine
            .progress()
            .filter(|(_, progress)| progress.connected)
            .filter_map(|(node, progress)| Some((node.clone(), progress.refused?)))
            .collect();
        let idle = serving.pending.is_empty();
        if used && idle && refused.iter().any(|(_, promised)| *promised >= epoch) {
            return self.begin_claim(host, database);
        }
        for (node, _) in refused.iter().filter(|(_, promised)| *promised < epoch) {
            if let Some(serving) = self.hosts[host].serving(database) {
                serving.machine.restart_feed(node);
            }
        }
        self.drive(host, database);
    }

    /// An application wants the database here.
    pub(super) fn claim_now(&mut self, host: usize, database: usize) {
        let local = self.local(host);
        if let Some(serving) = self.hosts[host].serving(database)
            && matches!(serving.machine.state(), PrimaryState::Fenced { .. })
            && serving.claim_at.is_none()
        {
            serving.claim_at = Some(local);
        }
    }

    /// The own journal failed: the machine begins again from what it holds.
    fn restart_primary(&mut self, host: usize, database: usize) {
        let told = self.configured();
        self.rebuild(host, database, |state| Serving::new(database, told, state));
    }

    /// The machine begins again with members of somebody's choice: a mutation.
    pub(super) fn restart_with(&mut self, host: usize, database: usize, members: Membership) {
        self.rebuild(host, database, |state| {
            Serving::of_members(database, members, state)
        });
    }

    fn rebuild(
        &mut self,
        host: usize,
        database: usize,
        build: impl FnOnce(Option<&DatabaseState>) -> Serving,
    ) {
        let who = (Machine::Host(host), self.hosts[host].life, database);
        self.checker.forget_ladder(who);
        let Some(running) = &mut self.hosts[host].up else {
            return;
        };
        running.journal.resume(database_id(database));
        let state = running.journal.state(database_id(database));
        let Some(old) = running.servings.remove(&database) else {
            return;
        };
        let mut serving = build(state.as_ref());
        serving.pending = old.pending;
        serving.settled = old.settled;
        serving.own_writes = old.own_writes;
        running.servings.insert(database, serving);
        self.wake_journal(Machine::Host(host));
        self.begin_claim(host, database);
        self.introduce(host, database);
        self.drive(host, database);
    }

    /// Uploads what is committed and not archived: as the product does, from the own journal.
    pub(super) fn upload(&mut self, host: usize, database: usize) {
        let next = 30_000 + self.rng.below(300_000);
        self.schedule.after(next, Event::Upload { host, database });
        let Some(running) = &self.hosts[host].up else {
            return;
        };
        let Some(serving) = running.servings.get(&database) else {
            return;
        };
        let last_lsn = serving.machine.commit_lsn().min(serving.written_lsn);
        let first_lsn = serving.machine.archive_lsn().next();
        if !serving.is_open() || first_lsn > last_lsn {
            return;
        }
        let Ok(parts) = running
            .journal
            .parts(database_id(database), first_lsn, last_lsn)
        else {
            return;
        };
        // A journal that was cut meanwhile ends the upload; the next one begins again.
        let Ok(parts) = parts.collect::<Result<Vec<EntryPart>, JournalError>>() else {
            return;
        };
        self.checker.archive(database, &parts);
        self.tally.archived += 1;
        let (life, through) = (self.hosts[host].life, last_lsn.get());
        let after = self.rng.below(100_000);
        let event = Event::Uploaded {
            host,
            life,
            database,
            through,
        };
        self.schedule.after(after, event);
    }

    pub(super) fn uploaded(&mut self, host: usize, life: u64, database: usize, through: u64) {
        if self.hosts[host].life != life {
            return;
        }
        let Some(running) = &mut self.hosts[host].up else {
            return;
        };
        let crowded = running.journal.usage().segment_count as u64 > HOST_SEGMENTS / 4;
        let Some(serving) = running.servings.get_mut(&database) else {
            return;
        };
        let through = Lsn::new(through);
        if through <= serving.machine.archive_lsn() || through > serving.machine.commit_lsn() {
            return;
        }
        serving.machine.handle_archived(through);
        serving.commits_untold = true;
        let archive_lsn = serving.machine.archive_lsn();
        if crowded {
            serving.machine.handle_retained(archive_lsn.next());
        }
        let record = Record::Progress {
            database: database_id(database),
            commit_lsn: serving.machine.commit_lsn(),
            archive_lsn,
        };
        let drop_through = crowded.then_some(archive_lsn);
        let what = OwnWritten::Progress(drop_through);
        self.hand_over(host, database, vec![record], what);
        self.drive(host, database);
    }

    /// What the host's own disk would show after a power cut is read by nobody as a vote; that it
    /// can be read at all is checked.
    pub(super) fn check_host_disk(&self, host: usize) {
        let disk = self.hosts[host].disk().survivor(&mut |_| 0);
        drop(states_on(disk, "a host"));
    }
}

/// Positions of the entries after one lsn up to another, as far as the machine's history tells.
fn positions_of(machine: &Primary, after: Lsn, through: Lsn) -> Vec<LogPosition> {
    (after.get() + 1..=through.get())
        .filter_map(|lsn| machine.history().position_at(Lsn::new(lsn)))
        .collect()
}
