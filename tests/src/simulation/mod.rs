//! A deterministic simulation of a whole cluster: two hosts with applications, five replicas, two
//! databases. The state machines (`quorum`), the journal (`journal`) and the replica's binding of
//! the two (`sidecar::replica_log`) are the product's own; disks, network, clocks and applications
//! are made here, and everything that happens is drawn from one seed.
//!
//! Mistakes that a wrong implementation would make ([`Mutation`]) are made in here as well, in the
//! disks, drivers and messages, never in the product's code. `docs/verification.md` tells what is
//! checked, and how to run it.

mod application;
mod changes;
mod checker;
mod commits;
mod feeds;
mod host;
mod mischief;
mod network;
mod node;
mod schedule;
mod scripts;
mod settings;
pub mod suites;

pub use settings::{Machine, Mutation, PowerCut, Script, Settings, Tally, Tear, Tooth};

use crate::seed::Seeded;
use application::Application;
use checker::Checker;
use durovfs_wire::{DatabaseId, NodeName};
use feeds::Fetch;
use host::Host;
use network::Network;
use node::{Answering, Node};
use schedule::{Event, Schedule, Trace};
use settings::{DATABASE_COUNT, HOST_COUNT, Micros, REPLICA_COUNT};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// How often the checkers look at everything, virtual time.
const CHECK_INTERVAL: Micros = 150_000;
/// How long all may take to be well again when nothing goes wrong any more, virtual time.
const HEAL_TIME: Micros = 20_000_000;

/// What came of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// What happened.
    pub tally: Tally,
    /// Everything that happened, as one number.
    pub trace: u64,
    /// How many syncs each machine began in each of its lives.
    pub barriers: Vec<((Machine, u64), u64)>,
}

struct World {
    settings: Settings,
    rng: Seeded,
    schedule: Schedule,
    trace: Trace,
    network: Network,
    nodes: Vec<Node>,
    hosts: Vec<Host>,
    apps: Vec<Vec<Application>>,
    checker: Checker,
    answering: BTreeMap<u64, Answering>,
    stale_fetches: BTreeMap<u64, (usize, usize, Fetch)>,
    next_stream: u64,
    /// Claims are forced until then: an operator wants another host.
    forced_until: Micros,
    /// Databases that some replica has promised an epoch of.
    ever_promised: [bool; DATABASE_COUNT],
    /// Machines whose disk was told to fail.
    troubled: Vec<Machine>,
    healing: bool,
    /// Single messages are lost, which no transport of the product does: hosts ask again.
    asks_again: bool,
    /// Applications begin no commits.
    resting: bool,
    barriers: Vec<((Machine, u64), u64)>,
    tally: Tally,
}

/// Runs a simulation to its end.
///
/// # Errors
/// What a checker, or an assertion of the product, found.
pub fn run(settings: &Settings) -> Result<Report, String> {
    let quiet = QuietPanics::begin();
    let result = catch_unwind(AssertUnwindSafe(|| World::new(settings).run()));
    drop(quiet);
    result.map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
            .unwrap_or_default()
    })
}

thread_local! {
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

/// While it lives, panics of this thread are not printed: they are results.
struct QuietPanics;

impl QuietPanics {
    fn begin() -> Self {
        static HOOK: std::sync::Once = std::sync::Once::new();
        HOOK.call_once(|| {
            let before = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |info| {
                if !QUIET.with(Cell::get) {
                    before(info);
                }
            }));
        });
        QUIET.with(|quiet| quiet.set(true));
        Self
    }
}

impl Drop for QuietPanics {
    fn drop(&mut self) {
        QUIET.with(|quiet| quiet.set(false));
    }
}

fn database_id(index: usize) -> DatabaseId {
    DatabaseId::from_bytes([index as u8 + 1; 16])
}

fn database_index(id: DatabaseId) -> usize {
    usize::from(id.as_bytes()[0]) - 1
}

fn name(text: String) -> NodeName {
    match NodeName::try_from(text) {
        Ok(name) => name,
        Err(error) => panic!("{error}"),
    }
}

fn node_name(index: usize) -> NodeName {
    name(format!("replica-{index}"))
}

fn host_name(index: usize) -> NodeName {
    name(format!("host-{index}"))
}

fn index_of(name: &NodeName) -> usize {
    let last = name.as_str().rsplit('-').next().unwrap_or_default();
    last.parse().unwrap_or_default()
}

impl World {
    fn new(settings: &Settings) -> Self {
        let mut rng = Seeded::new(settings.seed);
        let clock = |rng: &mut Seeded| (900 + rng.below(200), rng.below(10_000_000));
        let clocks: Vec<(u64, u64)> = (0..HOST_COUNT).map(|_| clock(&mut rng)).collect();
        let mut world = Self {
            settings: settings.clone(),
            rng,
            schedule: Schedule::default(),
            trace: Trace::new(settings.verbose),
            network: Network::new(REPLICA_COUNT + settings.spare_count),
            nodes: (0..REPLICA_COUNT + settings.spare_count)
                .map(|_| Node::new())
                .collect(),
            hosts: clocks.into_iter().map(Host::new).collect(),
            ever_promised: [false; DATABASE_COUNT],
            apps: Vec::new(),
            checker: Checker::new(),
            answering: BTreeMap::new(),
            stale_fetches: BTreeMap::new(),
            next_stream: 0,
            forced_until: 0,
            troubled: Vec::new(),
            healing: false,
            asks_again: settings.message_loss > 0,
            resting: false,
            barriers: Vec::new(),
            tally: Tally::default(),
        };
        world.apps = world.new_applications();
        world
    }

    /// Whether a draw of a hundred falls below.
    fn chance(&mut self, percent: u64) -> bool {
        self.rng.below(100) < percent
    }

    fn pick(&mut self, count: usize) -> usize {
        self.rng.below(count as u64) as usize
    }

    /// Runs with faults, then heals all and finds the logs alive and whole.
    fn run(mut self) -> Report {
        self.begin();
        let end = self.settings.duration;
        self.run_until(|world| world.schedule.now >= end);
        self.check_all();
        self.heal();
        let committed: Vec<usize> = self.commit_counts();
        let deadline = self.schedule.now + HEAL_TIME;
        self.run_until(|world| world.schedule.now >= deadline || world.goes_on(&committed));
        // Applications that go on and on never let all replicas be level at once.
        self.resting = self.goes_on(&committed);
        self.run_until(|world| world.schedule.now >= deadline || world.is_level());
        assert!(
            self.resting && self.is_level(),
            "not well {} s after everything was healed: {}",
            HEAL_TIME / 1_000_000,
            self.describe()
        );
        self.check_all();
        self.check_images();
        for node in 0..self.nodes.len() {
            let ended = (Machine::Node(node), self.nodes[node].life);
            self.barriers
                .push((ended, self.nodes[node].disk.barrier_count()));
        }
        for host in 0..HOST_COUNT {
            self.check_host_disk(host);
            let ended = (Machine::Host(host), self.hosts[host].life);
            self.barriers
                .push((ended, self.hosts[host].disk().barrier_count()));
        }
        Report {
            tally: self.tally,
            trace: self.trace.hash(),
            barriers: self.barriers,
        }
    }

    fn begin(&mut self) {
        for node in 0..self.nodes.len() {
            self.start_node(node);
        }
        for host in 0..HOST_COUNT {
            self.start_host(host);
            for database in 0..DATABASE_COUNT {
                self.schedule
                    .after(1_000, Event::Application { host, database });
                let after = self.rng.below(200_000);
                self.schedule.after(after, Event::Upload { host, database });
            }
        }
        // Each database begins on another host.
        for database in 0..DATABASE_COUNT {
            self.apps[database % HOST_COUNT][database].wants_open = true;
        }
        self.schedule.after(CHECK_INTERVAL, Event::Check);
        self.schedule.after(50_000, Event::Mischief);
        if self.settings.script.is_some() {
            self.schedule.after(100_000, Event::Script { step: 0 });
        }
    }

    fn run_until(&mut self, done: impl Fn(&Self) -> bool) {
        while !done(self) {
            let Some(event) = self.schedule.next() else {
                panic!("nothing happens any more");
            };
            self.tally.events += 1;
            self.trace.note(self.schedule.now, &event);
            self.handle(event);
        }
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::ToReplica {
                connection,
                stream,
                message,
                payload,
            } => self.node_receives(connection, stream, message, payload),
            Event::ToHost {
                connection,
                stream,
                message,
                payload,
            } => self.host_receives(connection, stream, message, payload),
            Event::Connect { host, node } => self.connect(host, node),
            Event::Lost { connection } => self.lost(connection),
            Event::Answer { fetch } => self.answer_fetch(fetch),
            Event::Write { machine, life } => match machine {
                Machine::Node(node) => self.node_write(node, life),
                Machine::Host(host) => self.host_write(host, life),
            },
            Event::Hear { machine, life } => match machine {
                Machine::Node(node) => self.node_hear(node, life),
                Machine::Host(host) => self.host_hear(host, life),
            },
            Event::Rest { machine, life } => match machine {
                Machine::Node(node) => self.node_rest(node, life),
                Machine::Host(host) => self.host_rest(host, life),
            },
            Event::Tick { host, life } => self.host_tick(host, life),
            Event::Application { host, database } => self.application_acts(host, database),
            Event::Upload { host, database } => self.upload(host, database),
            Event::Uploaded {
                host,
                life,
                database,
                through,
            } => self.uploaded(host, life, database, through),
            Event::Start { machine } => match machine {
                Machine::Node(node) => self.start_node(node),
                Machine::Host(host) => self.start_host(host),
            },
            Event::Room { node } => self.nodes[node].disk.limit_room(None),
            Event::Mischief => self.mischief(),
            Event::Script { step } => self.script(step),
            Event::Check => {
                self.check_all();
                self.schedule.after(CHECK_INTERVAL, Event::Check);
            }
        }
    }

    fn schedule_rest(&mut self, machine: Machine, life: u64) {
        let after = 30_000 + self.rng.below(60_000);
        self.schedule.after(after, Event::Rest { machine, life });
    }

    fn commit_counts(&self) -> Vec<usize> {
        (0..DATABASE_COUNT)
            .map(|database| self.checker.commit_count(database))
            .collect()
    }

    /// Everything works again, and one host wants each database.
    fn heal(&mut self) {
        self.healing = true;
        self.resting = false;
        self.heal_network();
        self.forced_until = Micros::MAX;
        self.settings.message_loss = 0;
        for node in 0..self.nodes.len() {
            self.nodes[node].disk.limit_room(None);
            self.start_node(node);
        }
        for host in 0..HOST_COUNT {
            self.start_host(host);
            for database in 0..DATABASE_COUNT {
                self.apps[host][database].wants_open = host == database % HOST_COUNT;
            }
        }
    }

    /// Every database took a commit since, on the host that wants it now.
    fn goes_on(&self, committed: &[usize]) -> bool {
        (0..DATABASE_COUNT).all(|database| {
            let running = self.hosts[database % HOST_COUNT].up.as_ref();
            let serving = running.and_then(|running| running.servings.get(&database));
            self.checker.commit_count(database) > committed[database]
                && serving.is_some_and(|serving| {
                    serving.is_open()
                        && serving.machine.commit_lsn() == self.checker.commit_lsn(database)
                })
        })
    }

    /// All replicas have the whole of every log that is not archived, no change of them is under
    /// way or due, and nobody waits for an outcome.
    fn is_level(&self) -> bool {
        (0..DATABASE_COUNT).all(|database| {
            let host = database % HOST_COUNT;
            let running = self.hosts[host].up.as_ref();
            let serving = running.and_then(|running| running.servings.get(&database));
            serving.is_some_and(|serving| {
                let last_lsn = serving.machine.last().lsn;
                // What is archived is not sent to a replica that lacks it, until there is more.
                let archived = serving.machine.archive_lsn() == last_lsn;
                let mut members = serving.machine.membership().all_members();
                serving.is_open()
                    && serving.pending.is_empty()
                    && serving.machine.replacement_under_way().is_none()
                    && serving.machine.unrecorded().next().is_none()
                    && members.all(|member| {
                        let node = node_index(&member.node);
                        archived || self.node_is_level(node, database, last_lsn)
                    })
            })
        })
    }

    /// For whoever has to find out why a run did not end well.
    fn describe(&self) -> String {
        let mut lines = vec![format!("commits {:?}", self.commit_counts())];
        for (host, state) in self.hosts.iter().enumerate() {
            let Some(running) = &state.up else {
                lines.push(format!("host {host} is down"));
                continue;
            };
            for (database, serving) in &running.servings {
                lines.push(format!(
                    "host {host} database {database}: {:?} epoch {} last {} commit {} {:?}",
                    serving.machine.state(),
                    serving.machine.epoch(),
                    serving.machine.last(),
                    serving.machine.commit_lsn(),
                    serving.machine.progress().collect::<Vec<_>>()
                ));
                lines.push(format!(
                    "  {:?}, under way: {:?}",
                    serving.machine.membership(),
                    serving.machine.replacement_under_way()
                ));
                lines.push(format!("  {:?}", self.apps[host][*database]));
            }
        }
        for (node, state) in self.nodes.iter().enumerate() {
            let logs = state.up.iter().flat_map(|running| &running.logs);
            for (database, log) in logs {
                let machine = log.machine();
                lines.push(format!(
                    "replica {node} database {database}: promised {} last {} flush {} commit {}",
                    machine.promised(),
                    machine.last(),
                    machine.flush_lsn(),
                    machine.commit_lsn(),
                ));
            }
        }
        lines.join("\n")
    }
}

fn node_index(name: &NodeName) -> usize {
    index_of(name)
}

fn host_index(name: &NodeName) -> usize {
    index_of(name)
}
