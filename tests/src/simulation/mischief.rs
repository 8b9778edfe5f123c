//! What goes wrong, and when: drawn by the weights of the run. What is scripted is in `scripts.rs`.

use super::World;
use super::schedule::Event;
use super::settings::{DATABASE_COUNT, HOST_COUNT, Machine, Micros, Tear, Weights};

/// Longest trouble of one kind.
const TROUBLE_MAX: Micros = 1_500_000;
/// Least room that a full disk leaves.
const ROOM_BYTES: u64 = 100 << 10;

/// One kind of trouble.
type Kind = fn(&mut World);

impl World {
    /// Whether an operation of this machine's disk was told to fail.
    pub(super) fn may_fail(&self, machine: Machine) -> bool {
        self.troubled.contains(&machine)
    }

    /// What a power cut of this machine leaves.
    pub(super) fn tear(&mut self, machine: Machine) -> Tear {
        if let Some(cut) = self.settings.power_cut
            && cut.machine == machine
        {
            return cut.tear;
        }
        match self.rng.below(4) {
            0 => Tear::Nothing,
            1 => Tear::Everything,
            _ => Tear::Mixture,
        }
    }

    /// One draw for each kind of trouble.
    pub(super) fn mischief(&mut self) {
        if self.healing {
            return;
        }
        let Weights {
            cut,
            partition,
            one_way,
            kill_node,
            power_node,
            power_all,
            kill_host,
            power_host,
            disk_error,
            disk_full,
            host_disk_error,
            clock_jump,
            application,
            takeover,
            replace,
            lose_disk,
        } = self.settings.weights;
        let kinds: [(u64, Kind); 14] = [
            (cut, Self::mischief_cut),
            (partition, Self::mischief_partition),
            (one_way, Self::mischief_one_way),
            (kill_node, |world| world.mischief_node(false)),
            (power_node, |world| world.mischief_node(true)),
            (power_all, Self::mischief_power_all),
            (kill_host, |world| world.mischief_host(false)),
            (power_host, |world| world.mischief_host(true)),
            (disk_error, Self::mischief_disk_error),
            (disk_full, Self::mischief_disk_full),
            (host_disk_error, Self::mischief_host_disk_error),
            (clock_jump, Self::mischief_clock),
            (application, Self::mischief_application),
            (takeover, Self::mischief_takeover),
        ];
        for (weight, what) in kinds {
            // Twenty draws a second, so a weight of 50 is once a second.
            if self.rng.below(1000) < weight {
                what(self);
            }
        }
        if self.settings.has_changes() {
            self.mischief_members(replace, lose_disk);
        }
        self.schedule.after(50_000, Event::Mischief);
    }

    fn lasts(&mut self) -> Micros {
        let most = if self.chance(70) {
            200_000
        } else {
            TROUBLE_MAX
        };
        self.rng.below(most)
    }

    fn mischief_cut(&mut self) {
        let (host, node) = (self.pick(HOST_COUNT), self.pick(self.nodes.len()));
        let lasts = self.lasts();
        self.cut_link(host, node, lasts);
    }

    fn mischief_partition(&mut self) {
        let host = self.pick(HOST_COUNT);
        let lasts = self.lasts();
        let first = self.pick(self.nodes.len());
        let count = 2 + self.pick(self.nodes.len() - 1);
        for index in 0..count {
            self.cut_link(host, (first + index) % self.nodes.len(), lasts);
        }
    }

    fn mischief_one_way(&mut self) {
        let host = self.pick(HOST_COUNT);
        let direction = self.pick(2);
        let lasts = self.lasts();
        let first = self.pick(self.nodes.len());
        let count = 1 + self.pick(self.nodes.len());
        for index in 0..count {
            self.silence(host, (first + index) % self.nodes.len(), direction, lasts);
        }
    }

    fn mischief_node(&mut self, power: bool) {
        let node = self.pick(self.nodes.len());
        if !self.nodes[node].is_up() {
            return;
        }
        self.crash_node(node, power);
    }

    fn mischief_power_all(&mut self) {
        for node in 0..self.nodes.len() {
            if self.nodes[node].is_up() {
                self.crash_node(node, true);
            }
        }
        for host in 0..HOST_COUNT {
            if self.chance(50) && self.hosts[host].is_up() {
                self.crash_host(host, true);
            }
        }
    }

    fn mischief_host(&mut self, power: bool) {
        let host = self.pick(HOST_COUNT);
        if self.hosts[host].is_up() {
            self.crash_host(host, power);
        }
    }

    fn mischief_disk_error(&mut self) {
        let node = self.pick(self.nodes.len());
        let after = self.rng.below(12);
        self.troubled.push(Machine::Node(node));
        self.nodes[node].disk.fail_after(after);
    }

    fn mischief_host_disk_error(&mut self) {
        let host = self.pick(HOST_COUNT);
        let after = self.rng.below(12);
        self.troubled.push(Machine::Host(host));
        self.hosts[host].disk().fail_after(after);
    }

    fn mischief_disk_full(&mut self) {
        let node = self.pick(self.nodes.len());
        let room = self.rng.below(ROOM_BYTES);
        self.troubled.push(Machine::Node(node));
        self.nodes[node].disk.limit_room(Some(room));
        let lasts = self.lasts();
        self.schedule.after(lasts, Event::Room { node });
    }

    fn mischief_clock(&mut self) {
        let host = self.pick(HOST_COUNT);
        // Clocks that run on and never back: the product asks the monotonic one.
        self.hosts[host].clock.1 += self.rng.below(3_000_000);
    }

    fn mischief_application(&mut self) {
        let (host, database) = (self.pick(HOST_COUNT), self.pick(DATABASE_COUNT));
        let dies = self.chance(50);
        self.application_fails(host, database, dies);
    }

    fn mischief_takeover(&mut self) {
        let (host, database) = (self.pick(HOST_COUNT), self.pick(DATABASE_COUNT));
        self.take_over(host, database);
    }

    /// From now on this host wants the database, and perhaps the other one as well.
    pub(super) fn take_over(&mut self, host: usize, database: usize) {
        for other in 0..HOST_COUNT {
            let both = other != host && self.chance(25);
            self.apps[other][database].wants_open &= both;
        }
        self.apps[host][database].wants_open = true;
        if self.chance(70) {
            self.forced_until = self.schedule.now + 1_000_000;
        }
        self.ensure_serving(host, database);
        self.claim_now(host, database);
    }
}
