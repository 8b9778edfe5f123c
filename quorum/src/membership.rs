//! Who votes on a log, and the arithmetic of their acks.

use durovfs_wire::{Lsn, NodeName};
use std::collections::BTreeSet;

/// Most replicas of one log. More would not make it safer, and each costs a copy of every commit.
const MAX_REPLICA_COUNT: usize = 15;

/// The replicas of a log and how many of them must hold an entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Membership {
    /// Number of this membership; every message carries it.
    pub generation: u32,
    /// The replicas.
    pub nodes: Vec<NodeName>,
    /// How many make a quorum.
    pub ack_quorum: usize,
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
    #[error("{0} replicas, at most {MAX_REPLICA_COUNT} are supported")]
    TooMany(usize),
}

impl Membership {
    /// Checks the numbers.
    ///
    /// # Errors When two quorums need not share a replica, a quorum is more than all, or a node is
    /// there twice.
    pub fn new(
        generation: u32,
        nodes: Vec<NodeName>,
        ack_quorum: usize,
    ) -> Result<Self, InvalidMembership> {
        let replica_count = nodes.len();
        if replica_count > MAX_REPLICA_COUNT {
            return Err(InvalidMembership::TooMany(replica_count));
        }
        if 2 * ack_quorum <= replica_count || ack_quorum > replica_count {
            return Err(InvalidMembership::Quorum {
                ack_quorum,
                replica_count,
            });
        }
        let mut seen = BTreeSet::new();
        if let Some(twice) = nodes.iter().find(|node| !seen.insert(*node)) {
            return Err(InvalidMembership::Duplicate(twice.clone()));
        }
        Ok(Self {
            generation,
            nodes,
            ack_quorum,
        })
    }

    /// How many nodes may be missing while a quorum can still be gathered.
    pub(crate) fn spare_count(&self) -> usize {
        self.nodes.len() - self.ack_quorum
    }
}

/// The highest lsn that a quorum has on disk, given what each replica has on disk: the
/// `ack_quorum`-th largest. Zero when fewer replicas than that are given.
pub fn quorum_lsn(flush_lsns: impl IntoIterator<Item = Lsn>, ack_quorum: usize) -> Lsn {
    assert!(
        ack_quorum > 0,
        "an ack quorum of zero would commit what nobody holds"
    );
    let mut sorted: Vec<Lsn> = flush_lsns.into_iter().collect();
    sorted.sort_unstable_by(|left, right| right.cmp(left));
    sorted.get(ack_quorum - 1).copied().unwrap_or(Lsn::ZERO)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nodes(names: &[&str]) -> Vec<NodeName> {
        names.iter().map(|name| name.parse().unwrap()).collect()
    }

    // If this failed, a configuration could have two quorums that never meet: two primaries at
    // once.
    #[test]
    fn memberships_whose_quorums_can_miss_each_other_are_refused() {
        assert!(Membership::new(1, nodes(&["a", "b", "c", "d", "e"]), 3).is_ok());
        assert!(Membership::new(1, nodes(&["a"]), 1).is_ok());
        for (names, quorum) in [
            (&["a", "b", "c", "d", "e"][..], 2),
            (&["a", "b", "c", "d"][..], 2),
            (&["a", "b"][..], 3),
            (&[][..], 0),
            (&["a", "b", "a"][..], 2),
        ] {
            assert!(
                Membership::new(1, nodes(names), quorum).is_err(),
                "{names:?} {quorum}"
            );
        }
    }

    // If this failed, commits would be told before a quorum holds them, or never.
    #[test]
    fn quorum_lsn_follows_the_golden_table() {
        let table = include_str!("../testdata/quorum_lsn.txt");
        let mut row_count = 0;
        for line in table
            .lines()
            .filter(|line| !line.is_empty() && !line.starts_with('#'))
        {
            let (given, expected) = line.split_once("=>").unwrap();
            let (quorum, flushes) = given.split_once(':').unwrap();
            let flushes = flushes
                .split_whitespace()
                .map(|word| Lsn::new(word.parse().unwrap()));
            let got = quorum_lsn(flushes, quorum.trim().parse().unwrap());
            assert_eq!(got.get().to_string(), expected.trim(), "{line}");
            row_count += 1;
        }
        assert!(row_count >= 15, "the table has {row_count} rows");
    }
}
