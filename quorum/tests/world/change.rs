//! Replacing replicas, and disks that are lost with all that was on them.

use super::{NODE_COUNT, World, index_of, node_name};
use durovfs_quorum::{PrimaryState, Replacement};
use durovfs_wire::peer::ReplicaMessage;
use durovfs_wire::{Epoch, Membership, ReplicaId};
use rand::RngExt;

/// Disks that a set must keep: with fewer, more were lost than the guarantee allows.
const DISKS_KEPT: usize = 3;

impl World {
    /// Asks a host that leads to replace some replica by one of a spare node, or one that lost its
    /// disk by itself.
    pub(super) fn want_replacement(&mut self, host: usize) {
        let (old, new) = (self.pick(NODE_COUNT), self.pick(NODE_COUNT));
        if self.hosts[host].primary.replacement_under_way().is_some() && self.chance(80) {
            return;
        }
        let lost = self.hosts[host].primary.unrecorded().next();
        let (old, new) = match lost.map(|member| index_of(&member.node)) {
            Some(lost) if self.chance(70) => (lost, lost),
            _ => (old, new),
        };
        // Refused when it makes no sense; that is part of the test.
        let _ = self.hosts[host].primary.start_replacement(Replacement {
            old: node_name(old),
            new: node_name(new),
            address: String::new(),
        });
        self.drive_host(host);
    }

    /// Makes the step that is due, if one is.
    pub(super) fn change(&mut self, host: usize) {
        if self.hosts[host].primary.next_membership().is_none() {
            return; // drawn for nothing, a claimant would make another state of the same one
        }
        let claimant = self.claimant(host);
        if !self.hosts[host].primary.start_change(claimant) {
            return;
        }
        self.tally.changes_begun += 1;
        self.drive_host(host);
    }

    /// A disk is lost; the node comes back with an empty one, as another replica. Never more of
    /// them than the guarantee allows.
    pub(super) fn wipe(&mut self, node: usize) {
        if !self.chance(30) {
            return;
        }
        if !self.may_lose(node) {
            return;
        }
        self.crash_replica(node);
        let replica = ReplicaId::from_bytes(self.rng.random());
        self.nodes[node] = super::Node::new(replica);
        self.tally.wiped += 1;
    }

    /// Whether every set that may count keeps enough whole disks without this one.
    pub(super) fn may_lose(&self, node: usize) -> bool {
        let newest = self.newest_decided();
        let mut memberships = self.memberships().filter(|m| m.epoch >= newest);
        memberships.all(|membership| {
            membership.sets().all(|set| {
                let kept = set.iter().filter(|member| {
                    let index = index_of(&member.node);
                    let disk = &self.nodes[index].disk;
                    index != node && !disk.mending && member.replica == Some(disk.replica)
                });
                kept.count() >= DISKS_KEPT
            })
        })
    }

    /// The membership of the newest epoch of which an entry was committed.
    fn newest_decided(&self) -> Epoch {
        let newest = self.checker.committed.values().next_back();
        newest.map_or(Epoch::ZERO, |entry| entry.position.epoch)
    }

    fn memberships(&self) -> impl Iterator<Item = &Membership> {
        let of_hosts = self.hosts.iter().map(|host| host.primary.membership());
        let of_disks = self.nodes.iter().filter_map(|n| n.disk.membership.as_ref());
        let of_replicas = self.nodes.iter().filter_map(|node| node.replica.as_ref());
        of_hosts
            .chain(of_disks)
            .chain(of_replicas.filter_map(|replica| replica.membership()))
    }

    pub(super) fn note_membership(&mut self, host: usize, membership: Membership) {
        let before = &self.hosts[host].noted;
        self.tally.changes_done += u64::from(before.next.is_some() && membership.next.is_none());
        self.hosts[host].noted = membership;
    }

    /// Links that are up and that the primary did not need before.
    pub(super) fn connect_new_nodes(&mut self, host: usize) {
        for node in 0..NODE_COUNT {
            let primary = &mut self.hosts[host].primary;
            let progress = primary.node_progress(&node_name(node));
            if self.links[host][node].up && progress.is_some_and(|node| !node.connected) {
                primary.handle_connected(&node_name(node));
            }
        }
    }

    /// Tells a host the newest membership that any node knows, as a search for the log does.
    pub(super) fn tell_membership(&mut self, host: usize) {
        let newest = self.memberships().max_by_key(|m| m.epoch).cloned();
        if let Some(newest) = newest {
            self.hosts[host].primary.handle_membership(&newest);
            self.drive_host(host);
        }
    }

    /// Goes on until no change is under way and every node's replica is the one that votes.
    pub(super) fn finish_changes(&mut self, host: usize) {
        for _ in 0..40 {
            let primary = &mut self.hosts[host].primary;
            if primary.state() != PrimaryState::Leading {
                self.claim(host);
                self.settle();
                continue;
            }
            let lost = primary.unrecorded().next().map(|member| Replacement {
                old: member.node.clone(),
                new: member.node.clone(),
                address: String::new(),
            });
            match (primary.replacement_under_way(), lost) {
                (None, None) => return,
                (None, Some(lost)) => primary.start_replacement(lost).unwrap(),
                (Some(_), _) => {}
            }
            self.drive_host(host);
            self.settle();
            self.change(host);
            self.settle();
        }
        panic!(
            "changes do not end: {:?} {:?}",
            self.hosts[host].primary.membership(),
            self.hosts[host].primary.replacement_under_way()
        );
    }

    /// A driver that does not tell one replica of a node from another.
    pub(super) fn forge_identity(&self, host: usize, node: usize, message: &mut ReplicaMessage) {
        let membership = self.hosts[host].primary.membership();
        let recorded = membership
            .all_members()
            .find(|member| index_of(&member.node) == node)
            .and_then(|member| member.replica);
        let Some(recorded) = recorded else { return };
        match message {
            ReplicaMessage::Promised(promise) => promise.replica = recorded,
            ReplicaMessage::Ack { replica, .. } => *replica = recorded,
            _ => {}
        }
    }
}
