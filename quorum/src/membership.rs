//! The arithmetic of quorums: over one set of replicas, or over both while one is being replaced.

use durovfs_wire::{Lsn, Member, Membership};

/// Whether a quorum of every set of the membership is among those that `counts` accepts.
pub fn holds_quorum(membership: &Membership, counts: impl Fn(&Member) -> bool) -> bool {
    membership
        .sets()
        .all(|set| set.iter().filter(|member| counts(member)).count() >= membership.ack_quorum)
}

/// The highest lsn that a quorum of every set has on disk, given what each member has.
pub fn held_lsn(membership: &Membership, flush_lsn: impl Fn(&Member) -> Lsn) -> Lsn {
    membership
        .sets()
        .map(|set| quorum_lsn(set.iter().map(&flush_lsn), membership.ack_quorum))
        .min()
        .unwrap_or(Lsn::ZERO)
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

    fn members(names: &str) -> Vec<Member> {
        names
            .split_whitespace()
            .map(|name| Member::configured(name.parse().unwrap(), String::new()))
            .collect()
    }

    // If this failed, a change of replicas could be decided, or a commit be told, by one of the two
    // sets alone.
    #[test]
    fn during_a_change_a_quorum_of_both_sets_is_needed() {
        let mut membership = Membership::configured(members("a b c d e"), 3).unwrap();
        membership.next = Some(members("a b x y z"));
        let quorum_of = |names: &str| {
            let has = |member: &Member| names.contains(member.node.as_str());
            let lsn = held_lsn(&membership, |member| Lsn::new(u64::from(has(member))));
            assert_eq!(
                lsn == Lsn::new(1),
                holds_quorum(&membership, has),
                "{names}"
            );
            lsn == Lsn::new(1)
        };
        for (names, expected) in [
            ("a b c", false),
            ("c d e", false),
            ("x y z", false),
            ("c d e x y", false),
            ("a b c x", true),
            ("c d e x y z", true),
            ("a c d e y z", true),
        ] {
            assert_eq!(quorum_of(names), expected, "{names}");
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
