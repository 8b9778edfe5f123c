//! Who votes on a log: the replicas by node and identity, recorded by the log's primaries.
//!
//! The rules (what may follow what, and why that is safe) are in `docs/protocol.md`, the
//! arithmetic of quorums in `quorum/`. Nothing here but the facts and their limits.

use crate::ids::{NodeName, ReplicaId};
use crate::position::Epoch;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// Most replicas of one log. More would not make it safer, and each costs a copy of every commit.
pub const MAX_MEMBERS: usize = 15;
/// Longest address of a node: a host name has at most 253 bytes, a port five digits.
pub const MAX_ADDRESS_BYTES: usize = 300;

/// One replica of a log.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Member {
    /// The node that keeps it.
    pub node: NodeName,
    /// Where the node was when it became a member, `host:port`; a node's own configuration counts
    /// for more. Empty when nobody said.
    pub address: String,
    /// Which replica on that node: one whose journal was lost comes back as another. None as long
    /// as the node has not told; it has no vote until then.
    pub replica: Option<ReplicaId>,
}

/// The replicas of a log and how many of them must hold an entry.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "UncheckedMembership")]
pub struct Membership {
    /// The epoch whose primary decided on it; zero for one that is only configured.
    pub epoch: Epoch,
    /// Counts the changes, from 1; every message that is about entries carries it.
    pub generation: u32,
    /// How many make a quorum, of each of the sets.
    pub ack_quorum: usize,
    /// The replicas whose votes count.
    pub members: Vec<Member>,
    /// While it is being changed: the replicas from the next generation on. Until then a quorum of
    /// `members` and one of these are needed, both.
    pub next: Option<Vec<Member>>,
}

/// The numbers do not make a membership.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidMembership {
    /// Two quorums could miss each other, or none could ever be gathered.
    #[error("ack quorum of {ack_quorum} in {replica_count} replicas: any two must share one")]
    Quorum {
        /// The quorum given.
        ack_quorum: usize,
        /// The replicas given.
        replica_count: usize,
    },
    /// A node that is named twice would be counted twice.
    #[error("node={0} is named twice")]
    Duplicate(NodeName),
    /// More replicas than are supported.
    #[error("{0} replicas, at most {MAX_MEMBERS} are supported")]
    TooMany(usize),
    /// An address that is none.
    #[error("address of {0} bytes, at most {MAX_ADDRESS_BYTES} are supported")]
    Address(usize),
}

impl Member {
    /// A node of a configuration, of whose replica nothing is known yet.
    pub fn configured(node: NodeName, address: String) -> Self {
        Self {
            node,
            address,
            replica: None,
        }
    }
}

impl Membership {
    /// Members as they are configured, before any primary decided on them.
    ///
    /// # Errors
    /// When two quorums need not share a replica, a quorum is more than all, or a node is there
    /// twice.
    pub fn configured(members: Vec<Member>, ack_quorum: usize) -> Result<Self, InvalidMembership> {
        let membership = Self {
            epoch: Epoch::ZERO,
            generation: 1,
            ack_quorum,
            members,
            next: None,
        };
        membership.check()?;
        Ok(membership)
    }

    /// Checks the numbers.
    ///
    /// # Errors
    /// As [`Self::configured`].
    pub fn check(&self) -> Result<(), InvalidMembership> {
        self.sets()
            .try_for_each(|set| check_set(set, self.ack_quorum))
    }

    /// The sets of which a quorum is needed: one, or two during a change.
    pub fn sets(&self) -> impl Iterator<Item = &[Member]> {
        std::iter::once(self.members.as_slice()).chain(self.next.as_deref())
    }

    /// The members of all sets; one that stays is given twice.
    pub fn all_members(&self) -> impl Iterator<Item = &Member> {
        self.sets().flatten()
    }

    /// The nodes of all sets, each once.
    pub fn nodes(&self) -> BTreeSet<&NodeName> {
        self.all_members().map(|member| &member.node).collect()
    }

    /// Whether a node has a member, of either set.
    pub fn has_node(&self, node: &NodeName) -> bool {
        self.all_members().any(|member| member.node == *node)
    }

    /// Whether no primary has decided on it, so that no member's identity is known.
    pub fn is_undecided(&self) -> bool {
        self.epoch == Epoch::ZERO && self.all_members().all(|member| member.replica.is_none())
    }

    /// Whether this replica of this node is a member, of either set.
    pub fn has(&self, node: &NodeName, replica: ReplicaId) -> bool {
        self.all_members()
            .any(|member| member.node == *node && member.replica == Some(replica))
    }
}

fn check_set(members: &[Member], ack_quorum: usize) -> Result<(), InvalidMembership> {
    let replica_count = members.len();
    if replica_count > MAX_MEMBERS {
        return Err(InvalidMembership::TooMany(replica_count));
    }
    if ack_quorum > replica_count || ack_quorum <= replica_count / 2 {
        return Err(InvalidMembership::Quorum {
            ack_quorum,
            replica_count,
        });
    }
    let mut seen = BTreeSet::new();
    for member in members {
        if !seen.insert(&member.node) {
            return Err(InvalidMembership::Duplicate(member.node.clone()));
        }
        if member.address.len() > MAX_ADDRESS_BYTES {
            return Err(InvalidMembership::Address(member.address.len()));
        }
    }
    Ok(())
}

/// As it comes from network or disk.
#[derive(Deserialize)]
struct UncheckedMembership {
    epoch: Epoch,
    generation: u32,
    ack_quorum: usize,
    members: Vec<Member>,
    next: Option<Vec<Member>>,
}

impl TryFrom<UncheckedMembership> for Membership {
    type Error = InvalidMembership;

    fn try_from(raw: UncheckedMembership) -> Result<Self, InvalidMembership> {
        let membership = Self {
            epoch: raw.epoch,
            generation: raw.generation,
            ack_quorum: raw.ack_quorum,
            members: raw.members,
            next: raw.next,
        };
        membership.check()?;
        Ok(membership)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn members(names: &[&str]) -> Vec<Member> {
        names
            .iter()
            .map(|name| Member::configured(name.parse().unwrap(), String::new()))
            .collect()
    }

    // If this failed, a configuration could have two quorums that never meet: two primaries at
    // once.
    #[test]
    fn memberships_whose_quorums_can_miss_each_other_are_refused() {
        assert!(Membership::configured(members(&["a", "b", "c", "d", "e"]), 3).is_ok());
        assert!(Membership::configured(members(&["a"]), 1).is_ok());
        for (names, quorum) in [
            (&["a", "b", "c", "d", "e"][..], 2),
            (&["a", "b", "c", "d"][..], 2),
            (&["a", "b"][..], 3),
            (&[][..], 0),
            (&["a", "b", "a"][..], 2),
        ] {
            let got = Membership::configured(members(names), quorum);
            assert!(got.is_err(), "{names:?} {quorum}");
        }
    }

    // If this failed, a membership that was damaged on its way would be gone by.
    #[test]
    fn a_membership_from_outside_is_checked() {
        let mut membership = Membership::configured(members(&["a", "b", "c"]), 2).unwrap();
        let bytes = postcard::to_stdvec(&membership).unwrap();
        assert_eq!(postcard::from_bytes(&bytes), Ok(membership.clone()));
        membership.next = Some(members(&["a", "b", "b"]));
        let bytes = postcard::to_stdvec(&membership).unwrap();
        assert!(postcard::from_bytes::<Membership>(&bytes).is_err());
    }
}
