//! The small world as a model: every schedule of a few steps of each kind, not some of them drawn
//! from a seed. A state is all that the machines, disks and connections hold; two states that look
//! the same are visited once.
//!
//! To keep it small, what nobody else sees happens at once: a host's own journal and its fetches,
//! the sending of what a feed has, the start of a replica that died, and connecting again.

#![allow(dead_code, reason = "the simulation has the world without it")]

use super::checker::Checker;
use super::disk::Disk;
use super::{Fault, World, node_name};
use durovfs_quorum::{PrimaryState, Replacement};
use stateright::{Model, Property};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// How large the world is, and how often each thing may happen in it.
#[derive(Debug, Clone, Copy, Hash)]
pub struct Bounds {
    /// Replicas of the log.
    pub replicas: usize,
    /// Acks that commit.
    pub ack_quorum: usize,
    /// Whether the first host is the primary, its epoch start on all replicas, and the second has
    /// heard of that epoch; else nothing has happened.
    pub begun: bool,
    /// Claims of each host, beside those of burials and changes.
    pub claims: [u8; 2],
    /// Entries, beside epoch starts.
    pub entries: u8,
    /// Entries given up.
    pub burials: u8,
    /// Deaths of a replica with what it had not synced.
    pub crashes: u8,
    /// Connections that are lost with all that is on its way.
    pub cuts: u8,
    /// Replicas that are replaced by a spare node, in two steps.
    pub replacements: u8,
    /// Whether a replica's disk syncs by itself as soon as it is written: fewer states.
    pub syncs_at_once: bool,
    /// Whether all messages arrive that are on their way on a connection in one direction, when one
    /// does: fewer states, too.
    pub delivers_all: bool,
    /// Whether what a host sends a node, and what the node answers, arrive in one step: fewer
    /// states still, and all orders in which the hosts reach the nodes.
    pub exchanges_at_once: bool,
    /// A mistake that must be found.
    pub fault: Fault,
}

/// One step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Step {
    /// A host claims the next epoch.
    Claim(usize),
    /// An application commits.
    Commit(usize),
    /// A host gives up what is not committed.
    Bury(usize),
    /// A host asks for the replacement of the first replica by the spare node.
    Replace(usize),
    /// It makes the step that is due.
    Change(usize),
    /// A node gets the next message of a host.
    Deliver(usize, usize),
    /// A host gets the next message of a node.
    Answer(usize, usize),
    /// Both, with all that is on its way.
    Exchange(usize, usize),
    /// A node's disk has all that was written.
    Sync(usize),
    /// A node dies and comes back.
    Crash(usize),
    /// A connection is lost and made again.
    Cut(usize, usize),
}

/// A state of the world.
#[derive(Clone)]
pub struct State {
    world: World,
    left: Bounds,
    /// What the last step broke.
    broken: Option<String>,
    /// Of all that counts of it.
    fingerprint: u64,
}

impl std::fmt::Debug for State {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(self.broken.as_deref().unwrap_or("whole"))
    }
}

impl PartialEq for State {
    fn eq(&self, other: &Self) -> bool {
        self.fingerprint == other.fingerprint
    }
}

impl Hash for State {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        hasher.write_u64(self.fingerprint);
    }
}

impl State {
    fn seal(mut self, bounds: &Bounds) -> Self {
        let used = bounds.used_nodes();
        let World {
            hosts,
            nodes,
            links,
            checker,
            claims,
            ..
        } = &self.world;
        let links: Vec<_> = links.iter().map(|links| &links[..used]).collect();
        let nodes = &nodes[..used];
        let Checker {
            committed, buried, ..
        } = checker;
        let mut hasher = DefaultHasher::new();
        (hosts, nodes, links, committed, buried, claims).hash(&mut hasher);
        (&self.left, &self.broken).hash(&mut hasher);
        self.fingerprint = hasher.finish();
        self
    }

    /// What nobody else sees.
    fn settle(&mut self, bounds: &Bounds) {
        let used = bounds.used_nodes();
        for host in 0..2 {
            self.world.finish_append(host);
            self.world.fetch_now(host, false);
            self.world.finish_append(host);
            for node in 0..used {
                if bounds.syncs_at_once {
                    self.world.sync_all(node);
                }
                self.world.pump_all(host, node);
            }
        }
    }
}

impl Bounds {
    fn used_nodes(&self) -> usize {
        self.replicas + usize::from(self.replacements > 0)
    }
}

impl World {
    fn pump_all(&mut self, host: usize, node: usize) {
        loop {
            let sent = self.links[host][node].to_replica.len();
            self.pump(host, node);
            if self.links[host][node].to_replica.len() == sent {
                return;
            }
        }
    }

    /// Messages that arrive, of those on their way.
    fn due(all: bool, waiting: usize) -> usize {
        if all { waiting } else { waiting.min(1) }
    }

    fn take(&mut self, step: Step, all: bool) {
        match step {
            Step::Claim(host) => self.claim(host),
            Step::Commit(host) => self.client_commit(host),
            Step::Bury(host) => self.bury(host),
            Step::Replace(host) => {
                let (old, new) = (0, self.hosts[host].configured.members.len());
                // Refused while another change is under way.
                let _ = self.hosts[host].primary.start_replacement(Replacement {
                    old: node_name(old),
                    new: node_name(new),
                    address: String::new(),
                });
                self.drive_host(host);
            }
            Step::Change(host) => self.change(host),
            Step::Deliver(host, node) => {
                for _ in 0..Self::due(all, self.links[host][node].to_replica.len()) {
                    self.deliver(host, node);
                }
            }
            Step::Answer(host, node) => {
                for _ in 0..Self::due(all, self.links[host][node].to_host.len()) {
                    self.answer(host, node);
                }
            }
            Step::Exchange(host, node) => {
                self.take(Step::Deliver(host, node), true);
                self.sync_all(node);
                self.take(Step::Answer(host, node), true);
            }
            Step::Sync(node) => self.sync_all(node),
            Step::Crash(node) => {
                self.crash_replica(node);
                self.start_replica(node);
                (0..2).for_each(|host| self.connect(host, node));
            }
            Step::Cut(host, node) => {
                self.disconnect(host, node);
                self.connect(host, node);
            }
        }
    }

    fn check_model(&self, used: usize) {
        let disks: Vec<&Disk> = self.nodes[..used].iter().map(|node| &node.disk).collect();
        self.checker
            .check_nothing_lost(&disks, &self.hosts[0].configured, self.fault);
        for node in &self.nodes[..used] {
            if let Some(replica) = &node.replica {
                self.checker.check_replica(&node.disk, replica);
            }
        }
    }
}

impl Model for Bounds {
    type State = State;
    type Action = Step;

    fn init_states(&self) -> Vec<State> {
        let mut world = World::with_replicas(0, self.fault, self.replicas, self.ack_quorum);
        world.is_model = true;
        for node in 0..self.used_nodes() {
            (0..2).for_each(|host| world.connect(host, node));
        }
        if self.begun {
            world.claim(0);
            world.settle();
            world.claim(1);
            for node in 0..self.used_nodes() {
                world.deliver(1, node);
                world.answer(1, node);
            }
        }
        let state = State {
            world,
            left: *self,
            broken: None,
            fingerprint: 0,
        };
        vec![state.seal(self)]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Step>) {
        if state.broken.is_some() {
            return;
        }
        let (world, left) = (&state.world, &state.left);
        for host in 0..2 {
            let primary = &world.hosts[host].primary;
            let leads = primary.state() == PrimaryState::Leading;
            if left.claims[host] > 0 && !leads {
                actions.push(Step::Claim(host));
            }
            if left.entries > 0 && leads {
                actions.push(Step::Commit(host));
            }
            if left.burials > 0 && leads && primary.last().lsn > primary.commit_lsn() {
                actions.push(Step::Bury(host));
            }
            if left.replacements > 0 && leads {
                actions.push(Step::Replace(host));
            }
            if leads && primary.next_membership().is_some() {
                actions.push(Step::Change(host));
            }
            for node in 0..self.used_nodes() {
                let link = &world.links[host][node];
                let (sends, answers) = (!link.to_replica.is_empty(), !link.to_host.is_empty());
                if self.exchanges_at_once && (sends || answers) {
                    actions.push(Step::Exchange(host, node));
                } else if sends {
                    actions.push(Step::Deliver(host, node));
                }
                if answers && !self.exchanges_at_once {
                    actions.push(Step::Answer(host, node));
                }
                if left.cuts > 0 {
                    actions.push(Step::Cut(host, node));
                }
            }
        }
        for node in 0..self.used_nodes() {
            if !world.nodes[node].disk.unsynced.is_empty() {
                actions.push(Step::Sync(node));
            }
            if left.crashes > 0 {
                actions.push(Step::Crash(node));
            }
        }
    }

    fn next_state(&self, before: &State, step: Step) -> Option<State> {
        let mut state = before.clone();
        let left = &mut state.left;
        match step {
            Step::Claim(host) => left.claims[host] -= 1,
            Step::Commit(_) => left.entries -= 1,
            Step::Bury(_) => left.burials -= 1,
            Step::Replace(_) => left.replacements -= 1,
            Step::Crash(_) => left.crashes -= 1,
            Step::Cut(..) => left.cuts -= 1,
            Step::Change(_)
            | Step::Deliver(..)
            | Step::Answer(..)
            | Step::Exchange(..)
            | Step::Sync(_) => {}
        }
        let done = catch_unwind(AssertUnwindSafe(|| {
            state.world.take(step, self.delivers_all);
            state.settle(self);
            state.world.check_model(self.used_nodes());
        }));
        if let Err(panic) = done {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).into()));
            state.broken = Some(text.unwrap_or_default());
        }
        let state = state.seal(self);
        (state != *before).then_some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = vec![
            Property::always(NOTHING_LOST, |_, state: &State| !state.breaks(NOTHING_LOST)),
            Property::always(ONE_ENTRY, |_, state: &State| !state.breaks(ONE_ENTRY)),
            Property::always(NEVER_REVIVED, |_, state: &State| {
                !state.breaks(NEVER_REVIVED)
            }),
            Property::always(PROMISE_FIRST, |_, state: &State| {
                !state.breaks(PROMISE_FIRST)
            }),
            Property::always(NO_OTHER, |_, state: &State| !state.breaks(NO_OTHER)),
        ];
        if self.entries > 0 {
            properties.push(Property::sometimes("a commit", |_, state: &State| {
                let mut committed = state.world.checker.committed.values();
                committed.any(|entry| !entry.is_start)
            }));
        }
        if self.begun && self.claims[1] > 0 {
            let what = "both hosts are the primary in turn";
            properties.push(Property::sometimes(what, |_, state: &State| {
                let committed = || state.world.checker.committed.values();
                (0..2).all(|host| committed().any(|entry| entry.value & 1 == host))
            }));
        }
        if self.burials > 0 {
            properties.push(Property::sometimes("a burial", |_, state: &State| {
                !state.world.checker.buried.is_empty()
            }));
        }
        if self.replacements > 0 {
            properties.push(Property::sometimes("a replacement", |_, state: &State| {
                state.world.tally.changes_done > 0
            }));
        }
        properties
    }
}

/// No acked commit is lost, whichever quorum of disks survives.
pub const NOTHING_LOST: &str = "no acked commit is lost while a quorum of disks survives";
/// Also on the replicas that take it for committed.
pub const ONE_ENTRY: &str = "one entry per lsn is ever committed";
/// What was told to be not committed.
pub const NEVER_REVIVED: &str = "what was buried is not committed, before or after";
/// On the disk of the replica that sends it.
pub const PROMISE_FIRST: &str = "a promise is on disk before it is on the wire";
/// The machines' own assertions, and the checker's other ones.
pub const NO_OTHER: &str = "no assertion fails";

/// What the checks say when one of these is broken; anything else breaks [`NO_OTHER`].
const SAID: [(&str, &str); 7] = [
    (NOTHING_LOST, "is lost"),
    (ONE_ENTRY, "two entries committed"),
    (ONE_ENTRY, "has another entry"),
    (NEVER_REVIVED, "was committed"),
    (NEVER_REVIVED, "was buried"),
    (PROMISE_FIRST, "that is not on disk"),
    (PROMISE_FIRST, "before its promise"),
];

impl State {
    /// Whether the last step broke this property.
    fn breaks(&self, property: &str) -> bool {
        let Some(broken) = &self.broken else {
            return false;
        };
        let said = SAID.iter().find(|(_, said)| broken.contains(said));
        said.map_or(NO_OTHER, |(property, _)| property) == property
    }
}
