//! What one run of the simulator is made of: its seed, what may go wrong in it, and what a wrong
//! implementation would do.

use crate::seed::Seeded;

/// Virtual time, microseconds.
pub type Micros = u64;

/// Replicas of every database, and the nodes that a database begins with.
pub const REPLICA_COUNT: usize = 5;
/// Further nodes of a run in which replicas are replaced.
const SPARE_COUNT: usize = 2;
/// Nodes of a run, at most.
pub const NODE_COUNT_MAX: usize = REPLICA_COUNT + SPARE_COUNT;
/// Machines with applications; each wants to be primary of every database.
pub const HOST_COUNT: usize = 2;
/// Databases; all share the journals.
pub const DATABASE_COUNT: usize = 2;

/// What a wrong implementation would do. All but the first break the product's promise, each in
/// another way; a simulator that does not see one of them would not see the real mistake either.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutation {
    /// The product as it is.
    None,
    /// Replicas ack what they have not synced.
    AckBeforeSync,
    /// The disks say that they synced, and did not.
    LyingDisks,
    /// A promise is forgotten when the replica restarts.
    PromiseNotPersisted,
    /// A promise is told, and the older primary is served on until the new one sends an entry: the
    /// reads of recovery do not fence.
    ReadsDoNotFence,
    /// A replica keeps a divergent tail, and acks as if it were the primary's.
    NoTruncation,
    /// Two of five are a quorum.
    QuorumOfTwo,
    /// A commit that was sent and not acked in time is told to be not committed.
    UnknownIsNotCommitted,
    /// A replica that lost its disk comes back empty, under the identity it had.
    EmptyDiskVotes,
    /// A replica is replaced in one step: no quorum of the old ones is needed for it.
    NoJointPhase,
    /// Replicas drop what is committed before it is archived.
    DropBeforeArchived,
    /// The client's question after a broken connection is answered while the entry is open.
    ResolveIgnoresOpenEntry,
}

impl Mutation {
    /// All mistakes.
    pub const ALL: [Self; 11] = [
        Self::AckBeforeSync,
        Self::LyingDisks,
        Self::PromiseNotPersisted,
        Self::ReadsDoNotFence,
        Self::NoTruncation,
        Self::QuorumOfTwo,
        Self::UnknownIsNotCommitted,
        Self::EmptyDiskVotes,
        Self::NoJointPhase,
        Self::DropBeforeArchived,
        Self::ResolveIgnoresOpenEntry,
    ];

    /// By its name.
    pub fn named(name: &str) -> Option<Self> {
        let mut all = Self::ALL.into_iter();
        all.find(|mutation| format!("{mutation:?}") == name)
    }
}

/// What happens in a run that leaves nothing to chance but delays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Script {
    /// Commits, a partition with burials, a takeover, replicas that restart, one that is replaced.
    Everything,
    /// A replica that promised another host loses its power, and is reached by the old primary
    /// alone when it is back.
    PromiserRestarts,
    /// Two of three replicas that alone hold a commit lose their disks, and are reached by another
    /// host that does not reach the third.
    DisksAreLost,
    /// A replica is replaced while a quorum of the old ones is out of reach, and takes part in
    /// another host's claim.
    OldQuorumIsUnaware,
}

/// Seeds within which a scripted mistake must be seen: what it needs is one order of a few events.
const SCRIPTED_SEEDS: u64 = 60;

/// A mistake that must be seen in every test run, and by what.
#[derive(Debug, Clone, Copy)]
pub struct Tooth {
    /// The mistake.
    pub mutation: Mutation,
    /// A piece of what the checker says whose property the mistake breaks.
    pub finding: &'static str,
    /// It is seen within so many seeds, from 0 on.
    pub within: u64,
    /// What happens, where chance hardly makes it happen.
    pub script: Option<Script>,
}

impl Tooth {
    const fn new(mutation: Mutation, finding: &'static str, within: u64) -> Self {
        Self {
            mutation,
            finding,
            within,
            script: None,
        }
    }

    const fn scripted(mutation: Mutation, finding: &'static str, script: Script) -> Self {
        Self {
            script: Some(script),
            ..Self::new(mutation, finding, SCRIPTED_SEEDS)
        }
    }

    /// The run of a seed, without the mistake.
    pub fn settings(&self, seed: u64) -> Settings {
        match self.script {
            None => Settings::of_seed(seed),
            Some(script) => Settings::scripted(script, seed),
        }
    }

    /// All. Mistakes that are not among them are rare: `docs/verification.md` tells of them.
    pub const ALL: [Self; 11] = [
        Self::new(Mutation::AckBeforeSync, "is lost; the log ends at", 20),
        Self::new(Mutation::LyingDisks, "is lost; the log ends at", 20),
        Self::new(
            Mutation::ReadsDoNotFence,
            "two entries are committed at lsn",
            200,
        ),
        Self::new(Mutation::NoTruncation, "is lost; the log ends at", 50),
        Self::new(Mutation::QuorumOfTwo, "is lost; the log ends at", 100),
        Self::new(
            Mutation::UnknownIsNotCommitted,
            "told to be not committed",
            20,
        ),
        Self::new(Mutation::DropBeforeArchived, "the archive ends at", 50),
        Self::new(
            Mutation::ResolveIgnoresOpenEntry,
            "told to be not committed",
            400,
        ),
        Self::scripted(
            Mutation::EmptyDiskVotes,
            "two entries are committed at lsn",
            Script::DisksAreLost,
        ),
        Self::scripted(
            Mutation::PromiseNotPersisted,
            "after it promised",
            Script::PromiserRestarts,
        ),
        Self::scripted(
            Mutation::NoJointPhase,
            "two entries",
            Script::OldQuorumIsUnaware,
        ),
    ];
}

/// A machine, for the plan of a power cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Machine {
    /// That replica.
    Node(usize),
    /// That host.
    Host(usize),
}

/// What is left of the writes that were not synced when the power goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tear {
    /// Nothing.
    Nothing,
    /// All.
    Everything,
    /// Any sectors of them, and any first part of the name changes.
    Mixture,
}

/// The power of one machine goes at one sync.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PowerCut {
    /// Whose.
    pub machine: Machine,
    /// In which of its lives, from 0.
    pub life: u64,
    /// At which sync of that life, from 1.
    pub barrier: u64,
    /// What is left.
    pub tear: Tear,
}

/// How often each thing goes wrong, in draws of a thousand. Each seed takes its own, many of them
/// zero, so that some runs are about one thing only.
#[derive(Debug, Clone, Copy, Default)]
pub struct Weights {
    /// A connection breaks.
    pub cut: u64,
    /// A host loses several replicas for a while.
    pub partition: u64,
    /// One direction of a connection stands still.
    pub one_way: u64,
    /// A replica's process is killed.
    pub kill_node: u64,
    /// A replica's machine loses its power.
    pub power_node: u64,
    /// All replicas lose their power at once.
    pub power_all: u64,
    /// A host's sidecar is killed.
    pub kill_host: u64,
    /// A host loses its power.
    pub power_host: u64,
    /// An operation of a replica's disk fails.
    pub disk_error: u64,
    /// A replica's disk is full for a while.
    pub disk_full: u64,
    /// An operation of a host's disk fails.
    pub host_disk_error: u64,
    /// A clock jumps.
    pub clock_jump: u64,
    /// An application dies, or loses its connection to the sidecar.
    pub application: u64,
    /// Another host wants the database, whether the primary is alive or not.
    pub takeover: u64,
    /// A replica is replaced.
    pub replace: u64,
    /// A replica's disk is lost, with all that was on it.
    pub lose_disk: u64,
}

impl Weights {
    fn draw(rng: &mut Seeded) -> Self {
        let mut one = |most: u64| {
            if rng.below(2) == 0 {
                0
            } else {
                rng.below(most) + 1
            }
        };
        Self {
            cut: one(60),
            partition: one(40),
            one_way: one(40),
            kill_node: one(40),
            power_node: one(40),
            power_all: one(6),
            kill_host: one(20),
            power_host: one(20),
            disk_error: one(40),
            disk_full: one(20),
            host_disk_error: one(20),
            clock_jump: one(20),
            application: one(40),
            takeover: one(40),
            replace: 0,
            lose_disk: 0,
        }
    }

    /// The same, with changes of who the replicas are.
    fn with_changes(self, rng: &mut Seeded) -> Self {
        Self {
            replace: rng.below(60),
            lose_disk: rng.below(40),
            ..self
        }
    }
}

/// One run.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Everything is drawn from it.
    pub seed: u64,
    /// What is wrong with the product.
    pub mutation: Mutation,
    /// How long faults are made, virtual time.
    pub duration: Micros,
    /// How often what goes wrong.
    pub weights: Weights,
    /// Single messages that are lost or come twice, in draws of a thousand.
    pub message_loss: u64,
    /// Whether replicas refuse claims while the primary is alive.
    pub protects_primary: bool,
    /// Whether applications send commits without waiting for the one before.
    pub deferred: bool,
    /// The one power cut of a run that has one.
    pub power_cut: Option<PowerCut>,
    /// Nodes that are no replicas at first; none in a run that changes nothing.
    pub spare_count: usize,
    /// What happens, where that is not left to chance.
    pub script: Option<Script>,
    /// Whether every event is printed.
    pub verbose: bool,
}

impl Settings {
    /// The run of a seed.
    pub fn of_seed(seed: u64) -> Self {
        let mut rng = Seeded::new(seed ^ 0x5eed);
        let weights = Weights::draw(&mut rng);
        // Of a generator of its own, so that a seed without changes stays what it was without them.
        let mut changes = Seeded::new(seed ^ 0xc4a);
        let (weights, spare_count) = match changes.below(3) {
            0 => (weights.with_changes(&mut changes), SPARE_COUNT),
            _ => (weights, 0),
        };
        Self {
            seed,
            mutation: Mutation::None,
            duration: 6_000_000,
            weights,
            message_loss: [0, 0, 5, 20][rng.below(4) as usize],
            protects_primary: rng.below(3) == 0,
            deferred: rng.below(3) == 0,
            power_cut: None,
            spare_count,
            script: None,
            verbose: false,
        }
    }

    /// A run in which nothing goes wrong but one power cut, and what is scripted.
    pub fn scenario(power_cut: Option<PowerCut>) -> Self {
        Self {
            power_cut,
            ..Self::scripted(Script::Everything, 7)
        }
    }

    /// A run in which nothing goes wrong but what is scripted.
    pub fn scripted(script: Script, seed: u64) -> Self {
        Self {
            weights: Weights::default(),
            message_loss: 0,
            protects_primary: false,
            deferred: false,
            duration: 1_400_000,
            spare_count: 1,
            script: Some(script),
            ..Self::of_seed(seed)
        }
    }

    /// Whether replicas are replaced, or lose their disks.
    pub fn has_changes(&self) -> bool {
        self.spare_count > 0
    }

    /// The same with a mistake.
    pub fn with(self, mutation: Mutation) -> Self {
        Self { mutation, ..self }
    }
}

/// What happened: a simulation in which something never happens proves nothing of it.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Tally {
    pub events: u64,
    pub committed: u64,
    pub acked: u64,
    pub refused: u64,
    pub unknown: u64,
    pub resolved: u64,
    pub untold: u64,
    pub opened: u64,
    pub buried: u64,
    pub bury_refused: u64,
    pub fenced: u64,
    pub fetched: u64,
    pub fetch_failed: u64,
    pub hydrated_from_archive: u64,
    pub own_restarts: u64,
    pub archived: u64,
    pub node_kills: u64,
    pub node_power_cuts: u64,
    pub host_crashes: u64,
    pub storage_failures: u64,
    pub cuts: u64,
    pub silences: u64,
    pub bulk_feeds: u64,
    pub multi_part: u64,
    pub replayed_commits: u64,
    pub disks_lost: u64,
    pub changes_begun: u64,
    pub changes_done: u64,
}

impl Tally {
    /// What happened less often than so many times.
    pub fn seldom(&self, least: u64) -> Option<(&'static str, u64)> {
        let mut counts = [
            ("acked commits", self.acked),
            ("refused commits", self.refused),
            ("unknown outcomes", self.unknown),
            ("resolved outcomes", self.resolved),
            ("opened logs", self.opened),
            ("burials", self.buried),
            ("refused burials", self.bury_refused),
            ("fenced primaries", self.fenced),
            ("recoveries by a donor's entries", self.fetched),
            ("fetches that failed", self.fetch_failed),
            ("openings from the archive", self.hydrated_from_archive),
            ("primaries that went on from the archive", self.own_restarts),
            ("uploads", self.archived),
            ("killed replicas", self.node_kills),
            ("replicas without power", self.node_power_cuts),
            ("hosts that crashed", self.host_crashes),
            ("writes that failed", self.storage_failures),
            ("connections that broke", self.cuts),
            ("connections that stood still", self.silences),
            ("replicas that caught up in bulk", self.bulk_feeds),
            ("transactions of several parts", self.multi_part),
            ("commits compared with the model", self.replayed_commits),
            ("disks that were lost", self.disks_lost),
            ("steps of changes", self.changes_begun),
            ("changes of the replicas", self.changes_done),
        ]
        .into_iter();
        counts.find(|(_, count)| *count < least)
    }

    /// Adds another run's.
    pub fn add(&mut self, other: &Self) {
        let pairs: [(&mut u64, u64); 28] = [
            (&mut self.events, other.events),
            (&mut self.committed, other.committed),
            (&mut self.acked, other.acked),
            (&mut self.refused, other.refused),
            (&mut self.unknown, other.unknown),
            (&mut self.resolved, other.resolved),
            (&mut self.untold, other.untold),
            (&mut self.opened, other.opened),
            (&mut self.buried, other.buried),
            (&mut self.bury_refused, other.bury_refused),
            (&mut self.fenced, other.fenced),
            (&mut self.fetched, other.fetched),
            (&mut self.fetch_failed, other.fetch_failed),
            (&mut self.hydrated_from_archive, other.hydrated_from_archive),
            (&mut self.own_restarts, other.own_restarts),
            (&mut self.archived, other.archived),
            (&mut self.node_kills, other.node_kills),
            (&mut self.node_power_cuts, other.node_power_cuts),
            (&mut self.host_crashes, other.host_crashes),
            (&mut self.storage_failures, other.storage_failures),
            (&mut self.cuts, other.cuts),
            (&mut self.silences, other.silences),
            (&mut self.bulk_feeds, other.bulk_feeds),
            (&mut self.multi_part, other.multi_part),
            (&mut self.replayed_commits, other.replayed_commits),
            (&mut self.disks_lost, other.disks_lost),
            (&mut self.changes_begun, other.changes_begun),
            (&mut self.changes_done, other.changes_done),
        ];
        for (sum, more) in pairs {
            *sum += more;
        }
    }
}
