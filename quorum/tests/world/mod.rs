//! A small world: five replicas and two spare nodes, two hosts that both want to be primary, links
//! that are cut, disks that lose what was not synced. All of it is drawn from one seed.
//!
//! Faults that a wrong implementation would have are made here, in the drivers, disks and links;
//! the state machines run as they are.

mod change;
pub mod checker;
pub mod disk;
mod host;
pub mod model;
mod node;
mod scenario;

use checker::Checker;
use disk::{Disk, Entry};
use durovfs_wire::peer::{PrimaryMessage, ReplicaMessage};
use durovfs_wire::{
    ClaimantId, ClientId, CommitHeader, DatabaseChecksum, DatabaseId, Epoch, LogPosition, Lsn,
    Member, Membership, NodeName, Origin, PageSize, PartHeader, PartKind, ReplicaId, Timestamp,
};
use host::Host;
use node::Node;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::VecDeque;

pub const NODE_COUNT: usize = 7;
/// The first nodes have the replicas that the log begins with.
const REPLICA_COUNT: usize = 5;
const HOST_COUNT: usize = 2;
const MAX_CLAIM_COUNT: usize = 4;

/// What a wrong implementation would do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fault {
    None,
    /// Two acks commit, two promises win.
    QuorumOfTwo,
    /// Entries of older epochs are committed by counting the disks that hold them.
    CountOldEpochs,
    /// A promise is answered without being written.
    PromiseNotPersisted,
    /// A divergent tail stays on disk.
    NoTruncation,
    /// A burial does not ask whether another claimant was there in between.
    BuryUnconditionally,
    /// An entry is acked before it is synced.
    AckBeforeSync,
    /// A replica that lost entries to damage votes as if it had never had them.
    DamagedVotes,
    /// It votes before it has again what it may have acked.
    WholeTooEarly,
    /// A replica that lost its disk is taken for the one that it was.
    AnyIdentity,
}

/// What happened, over all seeds: a simulation in which something never happens proves nothing of
/// it.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Tally {
    pub committed: u64,
    pub opened: u64,
    pub buried: u64,
    pub bury_refused: u64,
    pub fenced: u64,
    pub fetched: u64,
    pub fetch_failed: u64,
    pub truncated: u64,
    pub replica_restarts: u64,
    pub own_restarts: u64,
    pub crashes: u64,
    pub trouble: u64,
    pub damaged: u64,
    pub mended: u64,
    pub wiped: u64,
    pub changes_begun: u64,
    pub changes_done: u64,
    pub old_configs: u64,
    pub trace: u64,
}

impl Tally {
    fn note(&mut self, number: u64) {
        self.trace = self
            .trace
            .rotate_left(7)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            ^ number;
    }
}

/// A message to a replica; an append carries its entry.
#[derive(Debug, Clone, Hash)]
struct ToReplica {
    message: PrimaryMessage,
    entry: Option<Entry>,
}

/// One connection, both ways in order.
#[derive(Debug, Clone, Default, Hash)]
struct Link {
    up: bool,
    to_replica: VecDeque<ToReplica>,
    to_host: VecDeque<ReplicaMessage>,
}

#[derive(Clone)]
pub struct World {
    rng: ChaCha8Rng,
    fault: Fault,
    /// Nothing is drawn: a model checker chooses each step (`model.rs`).
    is_model: bool,
    /// Claims that each host has made.
    claims: [u8; HOST_COUNT],
    /// Whether disks are lost and replicas replaced: a world of its own, since it does less else.
    changes: bool,
    hosts: Vec<Host>,
    nodes: Vec<Node>,
    links: Vec<Vec<Link>>,
    checker: Checker,
    next_value: u64,
    pub tally: Tally,
}

pub fn database() -> DatabaseId {
    DatabaseId::from_bytes([7; 16])
}

pub fn node_name(index: usize) -> NodeName {
    format!("replica-{index}").parse().unwrap()
}

fn host_name(index: usize) -> NodeName {
    format!("host-{index}").parse().unwrap()
}

fn index_of(name: &NodeName) -> usize {
    name.as_str().rsplit('-').next().unwrap().parse().unwrap()
}

fn first_replica(node: usize) -> ReplicaId {
    ReplicaId::from_bytes([node as u8 + 1; 16])
}

fn member(node: usize, replica: ReplicaId) -> Member {
    Member {
        node: node_name(node),
        address: String::new(),
        replica: Some(replica),
    }
}

fn part_header(entry: &Entry, part: u32) -> PartHeader {
    let page_size = PageSize::try_from(512).unwrap();
    let kind = if part + 1 < entry.part_count {
        PartKind::Pages { page_size }
    } else if entry.is_start {
        PartKind::EpochStart {
            time: Timestamp::from_micros(0),
            last_transaction: None,
        }
    } else {
        PartKind::Commit(CommitHeader {
            origin: Origin {
                client: ClientId::from_bytes([1; 16]),
                sequence: entry.value,
            },
            time: Timestamp::from_micros(0),
            base_lsn: Lsn::ZERO,
            page_size,
            page_count: 1,
            slot_count: 1,
            checksum: DatabaseChecksum::default(),
            whole_image: false,
        })
    };
    let LogPosition { epoch, lsn } = entry.position;
    PartHeader {
        database: database(),
        epoch,
        lsn,
        part,
        kind,
    }
}

impl World {
    pub fn new(seed: u64, fault: Fault) -> Self {
        let ack_quorum = if fault == Fault::QuorumOfTwo { 2 } else { 3 };
        Self::with_replicas(seed, fault, REPLICA_COUNT, ack_quorum)
    }

    fn with_replicas(seed: u64, fault: Fault, count: usize, ack_quorum: usize) -> Self {
        let membership = Membership {
            epoch: Epoch::ZERO,
            generation: 1,
            members: (0..count)
                .map(|node| member(node, first_replica(node)))
                .collect(),
            ack_quorum,
            next: None,
        };
        Self {
            rng: ChaCha8Rng::seed_from_u64(seed),
            fault,
            is_model: false,
            claims: [0; HOST_COUNT],
            changes: match fault {
                Fault::None => seed % 4 == 3,
                fault => fault == Fault::AnyIdentity,
            },
            hosts: (0..HOST_COUNT).map(|_| Host::new(&membership)).collect(),
            nodes: (0..NODE_COUNT)
                .map(|node| Node::new(first_replica(node)))
                .collect(),
            links: (0..HOST_COUNT)
                .map(|_| (0..NODE_COUNT).map(|_| Link::default()).collect())
                .collect(),
            checker: Checker::default(),
            next_value: 1,
            tally: Tally::default(),
        }
    }

    fn chance(&mut self, percent: u32) -> bool {
        !self.is_model && self.rng.random_range(0..100) < percent
    }

    fn pick(&mut self, count: usize) -> usize {
        if self.is_model {
            return 0;
        }
        self.rng.random_range(0..count)
    }

    fn claimant(&mut self, host: usize) -> ClaimantId {
        self.claims[host] = self.claims[host].wrapping_add(1);
        if self.is_model {
            let mut id = [host as u8 + 1; 16];
            id[0] = self.claims[host];
            return ClaimantId::from_bytes(id);
        }
        ClaimantId::from_bytes(self.rng.random())
    }

    /// A value that no other entry has.
    fn new_value(&mut self, host: usize, position: LogPosition) -> u64 {
        self.next_value += 1;
        if self.is_model {
            // The same whichever way led to it.
            self.next_value = 1;
            return u64::from(position.epoch.get()) << 32 | position.lsn.get() << 8 | host as u64;
        }
        self.next_value - 1
    }

    /// Runs with faults, then heals all and finds the log alive.
    pub fn run(&mut self, step_count: usize) {
        for node in 0..NODE_COUNT {
            (0..HOST_COUNT).for_each(|host| self.connect(host, node));
        }
        for step in 0..step_count {
            self.step();
            self.tally.note(self.next_value);
            if step % 8 == 0 {
                self.check();
            }
        }
        self.check();
        self.heal();
        self.check();
    }

    fn check(&self) {
        let disks: Vec<&Disk> = self.nodes.iter().map(|node| &node.disk).collect();
        self.checker
            .check_nothing_lost(&disks, &self.hosts[0].configured, self.fault);
        for node in &self.nodes {
            if let Some(replica) = &node.replica {
                self.checker.check_replica(&node.disk, replica);
            }
        }
    }

    fn step(&mut self) {
        let host = self.pick(HOST_COUNT);
        let node = self.pick_node(host);
        let range = if self.changes { 1070 } else { 1000 };
        match self.rng.random_range(0..range) {
            0..230 => self.some_times(|world| world.deliver_to_replica(host, node)),
            230..400 => self.some_times(|world| world.deliver_to_host(host, node)),
            400..540 => self.sync(node),
            540..710 => self.some_times(|world| world.pump(host, node)),
            710..780 => self.client_commit(host),
            780..850 => self.finish_append(host),
            850..880 => self.finish_fetch(host),
            880..935 => self.connect(host, node),
            935..940 => self.disconnect(host, node),
            940..942 => self.crash_replica(node),
            942..954 => self.start_replica(node),
            954..955 => self.crash_host(host),
            955..966 => self.want_to_lead(host),
            966..974 => self.bury(host),
            974..981 => self.archive(host),
            981..990 => self.persist_progress(node),
            990..995 => self.drop_entries(host, node),
            995..996 => self.trouble(node),
            996..997 => self.damage(node),
            1000..1020 => self.want_replacement(host),
            1020..1060 => self.change(host),
            1060..1063 => self.wipe(node),
            1063..1067 => self.crash_host(host),
            _ => self.restart_feed(host, node),
        }
    }

    /// Mostly one that the host talks to: the spare ones have little to say.
    fn pick_node(&mut self, host: usize) -> usize {
        if !self.changes {
            return self.pick(REPLICA_COUNT);
        }
        let node = self.pick(NODE_COUNT);
        let progress = self.hosts[host].primary.node_progress(&node_name(node));
        if progress.is_some() || self.chance(30) {
            node
        } else {
            self.pick(NODE_COUNT)
        }
    }

    fn some_times(&mut self, what: impl Fn(&mut Self)) {
        for _ in 0..=self.pick(4) {
            what(self);
        }
    }

    fn connect(&mut self, host: usize, node: usize) {
        // A link that is up is seldom made anew.
        let keeps = self.links[host][node].up && !self.chance(3);
        if self.nodes[node].replica.is_none() || keeps {
            return;
        }
        self.disconnect(host, node);
        self.links[host][node].up = true;
        self.hosts[host].primary.handle_connected(&node_name(node));
        self.drive_host(host);
    }

    fn disconnect(&mut self, host: usize, node: usize) {
        if std::mem::take(&mut self.links[host][node]).up {
            self.hosts[host]
                .primary
                .handle_disconnected(&node_name(node));
            self.drive_host(host);
        }
    }

    /// All nodes and links come back and nothing fails any more: one host must open the log,
    /// commit, and bring all five level.
    fn heal(&mut self) {
        for node in 0..NODE_COUNT {
            self.start_replica(node);
            self.disconnect(1, node);
            self.disconnect(0, node);
            self.connect(0, node);
        }
        self.tell_membership(0);
        // A refusal tells a higher epoch, so that few attempts are enough.
        for _ in 0..MAX_CLAIM_COUNT {
            self.claim(0);
            self.settle();
            let primary = &self.hosts[0].primary;
            let all = primary.progress().all(|(_, progress)| progress.promised);
            if all && primary.next_lsn().is_some() {
                break;
            }
        }
        self.finish_changes(0);
        let committed_before = self.checker.committed.len();
        self.client_commit(0);
        self.settle();
        assert!(
            self.checker.committed.len() > committed_before,
            "no commit after all is well again: {:?} {:?}",
            self.hosts[0].primary.state(),
            self.hosts[0].primary.progress().collect::<Vec<_>>()
        );
        let membership = self.hosts[0].primary.membership().clone();
        assert_eq!(membership.next, None, "a change does not end");
        for member in &membership.members {
            let node = &self.nodes[index_of(&member.node)];
            assert_eq!(member.replica, Some(node.disk.replica), "not brought in");
            assert_eq!(
                node.disk.log.last(),
                self.hosts[0].log.last(),
                "a replica is not level: {:?} {:?}",
                self.hosts[0].primary.progress().collect::<Vec<_>>(),
                node.replica
            );
            let mends = self.fault != Fault::DamagedVotes;
            assert!(!node.disk.mending || !mends, "a level replica is not whole");
        }
    }

    fn settle(&mut self) {
        for _ in 0..60 {
            for node in 0..NODE_COUNT {
                for _ in 0..4 {
                    self.pump(0, node);
                    self.deliver(0, node);
                    self.sync_all(node);
                    self.answer(0, node);
                }
            }
            self.finish_append(0);
            self.fetch_now(0, false);
            if self.is_quiet() {
                return;
            }
        }
    }

    /// Nothing is under way any more at the first host, and all it has was sent.
    fn is_quiet(&self) -> bool {
        self.hosts[0].has_sent_all()
            && self.nodes.iter().all(|node| node.disk.unsynced.is_empty())
            && self.links[0]
                .iter()
                .all(|link| link.to_replica.is_empty() && link.to_host.is_empty())
    }
}
