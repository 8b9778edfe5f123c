//! Who the replicas are: replacing them, disks that are lost with all that was on them, and how a
//! host finds members that it does not know. What the daemon's `members.rs` does is done here once
//! more; what may follow what is decided in the product's `Primary`.

use super::World;
use super::settings::{DATABASE_COUNT, HOST_COUNT, Micros, Mutation};
use super::{node_index, node_name};
use durovfs_journal::DatabaseState;
use durovfs_quorum::{PrimaryState, Replacement};
use durovfs_sidecar::donor::DonorEnd;
use durovfs_wire::{Member, Membership, NodeName};
use std::collections::BTreeMap;

/// A node whose replica is another than the recorded one is taken for one that lost its disk after
/// this, local time.
const LOST_AFTER: Micros = 200_000;
/// Commits wait this long for a step of a change, local time.
const HOLD_LIMIT: Micros = 2_000_000;
/// A replica that is connected answers a claim within this, local time.
const CLAIM_PATIENCE: Micros = 500_000;
/// A claim that is not won searches for newer members as often as this, local time.
const SEARCH_INTERVAL: Micros = 1_000_000;
/// Disks that each set must keep: with fewer, more were lost than the guarantee allows.
const DISKS_KEPT: usize = 3;
/// The same for a disk that is of none: its node may be about to become a member.
const DISKS_KEPT_BESIDE: usize = 4;

impl World {
    /// The newest members that a node which this host reaches knows of; else as configured.
    pub(super) fn found_members(&self, host: usize, database: usize) -> Membership {
        let links = &self.network.links[host];
        let reached = self.nodes.iter().zip(links).filter_map(|(node, link)| {
            link.connection?;
            node.up
                .as_ref()?
                .logs
                .get(&database)?
                .machine()
                .membership()
        });
        let newest = reached.max_by_key(|membership| membership.epoch);
        newest.cloned().unwrap_or_else(|| self.configured())
    }

    /// Looks after a database's members.
    pub(super) fn tick_members(&mut self, host: usize, database: usize, local: Micros) {
        self.tick_claiming(host, database, local);
        let Some(serving) = self.hosts[host].serving(database) else {
            return;
        };
        if serving.is_open() {
            self.bring_strangers_in(host, database, local);
        }
        self.try_change(host, database, local);
    }

    /// A claim that takes long: goes on without those that do not answer, and asks for newer
    /// members.
    fn tick_claiming(&mut self, host: usize, database: usize, local: Micros) {
        let found = self.found_members(host, database);
        let Some(serving) = self.hosts[host].serving(database) else {
            return;
        };
        if serving.machine.state() != PrimaryState::Claiming {
            serving.claiming_since = None;
            return;
        }
        let since = *serving.claiming_since.get_or_insert(local);
        if local - since >= CLAIM_PATIENCE {
            serving.machine.stop_waiting();
        }
        if local - serving.searched_at.max(since) >= SEARCH_INTERVAL {
            serving.searched_at = local;
            serving.machine.handle_membership(&found);
        }
        self.drive(host, database);
    }

    /// Nodes that come back as another replica than the recorded one get their place by a change:
    /// at once where none is recorded, after a while where one is.
    fn bring_strangers_in(&mut self, host: usize, database: usize, local: Micros) {
        let Some(serving) = self.hosts[host].serving(database) else {
            return;
        };
        let found: Vec<Member> = serving.machine.unrecorded().cloned().collect();
        let is_found = |node: &NodeName| found.iter().any(|member| member.node == *node);
        serving.strangers.retain(|node, _| is_found(node));
        if serving.machine.replacement_under_way().is_some() {
            return;
        }
        for member in &found {
            let seen = serving.strangers.entry(member.node.clone());
            let since = *seen.or_insert(local);
            if member.replica.is_none() || local - since >= LOST_AFTER {
                let wanted = replacement(&member.node, &member.node);
                // Refused when it makes no sense any more.
                let _ = serving.machine.start_replacement(wanted);
                break;
            }
        }
        self.drive(host, database);
    }

    /// Makes the next step of a change, if one is due and nothing is in flight. Commits are refused
    /// from then on, where the daemon lets them wait.
    fn try_change(&mut self, host: usize, database: usize, local: Micros) {
        let Some(serving) = self.hosts[host].serving(database) else {
            return;
        };
        if !serving.is_open() || serving.machine.next_membership().is_none() {
            serving.held_since = None;
            return;
        }
        let since = *serving.held_since.get_or_insert(local);
        if local - since >= HOLD_LIMIT {
            serving.held_since = None;
            return;
        }
        if !serving.pending.is_empty() {
            return;
        }
        if self.settings.mutation == Mutation::NoJointPhase {
            return self.change_at_once(host, database);
        }
        let claimant = self.claimant();
        if let Some(serving) = self.hosts[host].serving(database)
            && serving.machine.start_change(claimant)
        {
            serving.claimant = claimant;
            serving.donor_end = DonorEnd::NONE;
            serving.held_since = None;
            self.tally.changes_begun += 1;
            self.drive(host, database);
        }
    }

    /// Claims the next epoch with the members that the change ends with: a mutation.
    fn change_at_once(&mut self, host: usize, database: usize) {
        let Some(serving) = self.hosts[host].serving(database) else {
            return;
        };
        let Some(joint) = serving.machine.next_membership() else {
            return;
        };
        let members = joint.next.clone().unwrap_or(joint.members.clone());
        let after = Membership {
            members,
            next: None,
            ..joint
        };
        self.restart_with(host, database, after);
    }

    /// The members of the epoch that a host has claimed are decided.
    pub(super) fn note_members(&mut self, host: usize, database: usize, decided: &Membership) {
        let running = self.hosts[host].up.as_ref();
        let state = running.and_then(|running| {
            let id = super::database_id(database);
            running.journal.state(id)
        });
        let before = state.and_then(|state| state.membership);
        let is_over = before.is_some_and(|before| before.next.is_some());
        self.tally.changes_done += u64::from(is_over && decided.next.is_none());
    }

    /// One draw for each kind of trouble with members.
    pub(super) fn mischief_members(&mut self, replace: u64, lose_disk: u64) {
        if self.rng.below(1000) < replace {
            let (old, new) = (self.pick(self.nodes.len()), self.pick(self.nodes.len()));
            let (host, database) = (self.pick(HOST_COUNT), self.pick(DATABASE_COUNT));
            self.replace(host, database, old, new);
        }
        if self.rng.below(1000) < lose_disk {
            let node = self.pick(self.nodes.len());
            self.mischief_lose_disk(node);
        }
    }

    /// An operator asks a host for a replacement; refused when it makes no sense.
    pub(super) fn replace(&mut self, host: usize, database: usize, old: usize, new: usize) {
        if let Some(serving) = self.hosts[host].serving(database) {
            let wanted = replacement(&node_name(old), &node_name(new));
            let _ = serving.machine.start_replacement(wanted);
            self.drive(host, database);
        }
    }

    fn mischief_lose_disk(&mut self, node: usize) {
        if self.nodes[node].is_up() && self.may_lose(node) {
            self.tally.disks_lost += 1;
            self.empty_node(node);
        }
    }

    /// Whether this disk may be lost: every set that may count keeps enough whole ones.
    fn may_lose(&self, node: usize) -> bool {
        if self.settings.mutation == Mutation::EmptyDiskVotes {
            // Identities tell nothing then. So many may always be lost, of the first five.
            let most = (super::settings::REPLICA_COUNT - DISKS_KEPT) as u64;
            return self.tally.disks_lost < most;
        }
        let disks: Vec<BTreeMap<usize, DatabaseState>> = self
            .nodes
            .iter()
            .map(super::node::Node::survivors)
            .collect();
        (0..DATABASE_COUNT).all(|database| {
            let newest = self.checker.newest_decided(database);
            let mut counting = self.memberships(database, &disks);
            counting.retain(|membership| membership.epoch >= newest);
            counting.iter().flat_map(Membership::sets).all(|set| {
                let is_whole = |member: &&Member| {
                    let index = node_index(&member.node);
                    let state = disks[index].get(&database);
                    let replica = state.and_then(|state| state.replica);
                    index != node && replica.is_some() && member.replica == replica
                };
                let least = match set.iter().any(|member| node_index(&member.node) == node) {
                    true => DISKS_KEPT,
                    false => DISKS_KEPT_BESIDE,
                };
                set.iter().filter(is_whole).count() >= least
            })
        })
    }

    /// All memberships that somebody goes by, or has on disk.
    fn memberships(
        &self,
        database: usize,
        disks: &[BTreeMap<usize, DatabaseState>],
    ) -> Vec<Membership> {
        let of_hosts = self.hosts.iter().filter_map(|host| {
            let serving = host.up.as_ref()?.servings.get(&database)?;
            Some(serving.machine.membership().clone())
        });
        let of_replicas = self.nodes.iter().filter_map(|node| {
            let log = node.up.as_ref()?.logs.get(&database)?;
            log.machine().membership().cloned()
        });
        let on_disks = disks
            .iter()
            .filter_map(|states| states.get(&database)?.membership.clone());
        of_hosts.chain(of_replicas).chain(on_disks).collect()
    }
}

fn replacement(old: &NodeName, new: &NodeName) -> Replacement {
    Replacement {
        old: old.clone(),
        new: new.clone(),
        address: String::new(),
    }
}
