//! Who votes: identities, changes of members, and claimants that know old ones.

use super::*;

/// Sends a promise of a log that this test's replicas have: epoch 1 up to `last_lsn`.
fn promise_as(primary: &mut Primary, name: &str, replica: ReplicaId, told: Option<Membership>) {
    let previous = primary.highest_epoch_seen.previous_or_zero();
    let log = [(1, 1)];
    let (history, last) = if primary.epoch() == Epoch::new(1) {
        (&log[..0], 0)
    } else {
        (&log[..], 1)
    };
    let promise = Promise {
        replica,
        membership: told,
        ..promise(primary, previous, history, last)
    };
    primary
        .handle_message(&node(name), &ReplicaMessage::Promised(promise))
        .unwrap();
}

trait PreviousOrZero {
    fn previous_or_zero(self) -> u32;
}

impl PreviousOrZero for Epoch {
    fn previous_or_zero(self) -> u32 {
        self.get().saturating_sub(1)
    }
}

fn wanted(old: &str, new: &str) -> Replacement {
    Replacement {
        old: node(old),
        new: node(new),
        address: "host:1".to_owned(),
    }
}

/// Leads epoch 1 with entry 1; `f` is fed, level, and to replace `e`.
fn replacing() -> Primary {
    let mut primary = leading();
    primary.start_replacement(wanted("e", "f")).unwrap();
    assert!(all_effects(&mut primary).contains(&PrimaryEffect::NodesChanged));
    primary.handle_connected(&node("f"));
    let promise = promise(&primary, 0, &[], 0);
    send(&mut primary, "f", promise);
    assert_eq!(primary.next_membership(), None, "f holds nothing yet");
    ack(&mut primary, "f", 1, 1);
    effects(&mut primary);
    primary
}

fn names(members: &[Member]) -> String {
    members.iter().map(|member| member.node.as_str()).collect()
}

/// Claims the next step and has these promise it; gives what was decided.
fn step(primary: &mut Primary, names: &[&str]) -> Membership {
    assert!(primary.start_change(claimant(9)));
    for name in names {
        assert_eq!(primary.state(), PrimaryState::Claiming, "before {name}");
        promise_as(primary, name, replica(name), None);
    }
    let noted = all_effects(primary)
        .into_iter()
        .find_map(|effect| match effect {
            PrimaryEffect::NoteMembership { membership } => Some(membership),
            _ => None,
        });
    let start = LogPosition::new(primary.epoch(), primary.last().lsn.next());
    primary.handle_appended(start);
    noted.expect("a membership is decided")
}

// If this failed, a commit could be told by the new replicas alone, before the old ones were left,
// and a primary that knows only the old ones would lose it.
#[test]
fn a_replacement_needs_both_sets_and_then_the_new_one() {
    let mut primary = replacing();
    assert_eq!(primary.membership().generation, 1);
    let joint = step(&mut primary, &["a", "b", "c"]);
    assert_eq!((joint.epoch, joint.generation), (Epoch::new(2), 2));
    assert_eq!(names(&joint.members), "abcde");
    assert_eq!(names(joint.next.as_deref().unwrap()), "abcdf");
    // Three of the old set, two of the new one.
    for name in ["a", "b"] {
        ack(&mut primary, name, 2, 2);
    }
    promise_as(&mut primary, "e", replica("e"), None);
    ack(&mut primary, "e", 2, 2);
    assert_eq!(primary.state(), PrimaryState::Starting);
    promise_as(&mut primary, "f", replica("f"), None);
    assert_eq!(
        primary.next_membership(),
        None,
        "the joint epoch is not committed"
    );
    ack(&mut primary, "f", 2, 2);
    assert_eq!(primary.state(), PrimaryState::Leading);
    effects(&mut primary);

    assert!(primary.start_change(claimant(9)));
    for name in ["a", "b", "f"] {
        // Of the old set only two: not enough to leave it.
        assert_eq!(primary.state(), PrimaryState::Claiming);
        let promise = promise(&primary, 2, &[(1, 1), (2, 2)], 2);
        send(&mut primary, name, promise);
    }
    assert_eq!(primary.state(), PrimaryState::Claiming);
    let promise = promise(&primary, 2, &[(1, 1), (2, 2)], 2);
    send(&mut primary, "c", promise);
    primary.handle_appended(at(3, 3));
    for name in ["a", "b", "f"] {
        ack(&mut primary, name, 3, 3);
    }
    assert_eq!(primary.state(), PrimaryState::Leading);
    let last = primary.membership();
    assert_eq!(
        (names(&last.members).as_str(), last.generation),
        ("abcdf", 3)
    );
    assert_eq!(last.next, None);
    assert_eq!(primary.replacement_under_way(), None);
    assert_eq!(primary.node_progress(&node("e")), None, "e is left");
}

// If this failed, an operator could not undo a replacement whose new machine died at once.
#[test]
fn a_joint_phase_can_be_taken_back() {
    let mut primary = replacing();
    step(&mut primary, &["a", "b", "c"]);
    for name in ["a", "b", "c"] {
        ack(&mut primary, name, 2, 2);
    }
    assert_eq!(primary.next_membership(), None, "f is not level");
    let other = primary.start_replacement(wanted("a", "f"));
    assert!(
        matches!(other, Err(ReplaceRefused::UnderWay { .. })),
        "{other:?}"
    );
    primary.start_replacement(wanted("f", "e")).unwrap();
    let back = primary.next_membership().unwrap();
    assert_eq!(names(&back.members), "abcdf");
    assert_eq!(names(back.next.as_deref().unwrap()), "abcde");
}

// If this failed, a machine that loses its disk while it joins would leave the change under way for
// good, and nothing could be replaced any more.
#[test]
fn a_change_goes_on_when_the_replica_that_joins_is_lost() {
    let mut primary = replacing();
    step(&mut primary, &["a", "b", "c"]);
    for name in ["a", "b", "c"] {
        ack(&mut primary, name, 2, 2);
    }
    assert_eq!(primary.next_membership(), None, "f is not level");
    promise_as(&mut primary, "f", replica("g"), None);
    let after = primary.next_membership().unwrap();
    assert_eq!(
        (names(&after.members).as_str(), after.next),
        ("abcdf", None)
    );
    let recorded = after.members.iter().find(|member| member.node == node("f"));
    assert_eq!(
        recorded.unwrap().replica,
        Some(replica("f")),
        "nothing tells what the other one holds"
    );
}

// If this failed, nothing could be replaced in a database that nobody writes to.
#[test]
fn a_replica_joins_a_log_of_which_all_is_archived() {
    let mut primary = leading();
    primary.start_replacement(wanted("e", "f")).unwrap();
    primary.handle_connected(&node("f"));
    primary.handle_archived(Lsn::new(1));
    assert_eq!(primary.next_membership(), None, "f has not answered");
    let promise = promise(&primary, 0, &[], 0);
    send(&mut primary, "f", promise);
    assert!(primary.next_membership().is_some());
}

// If this failed, a step could be made after which nothing is committed any more: the node that is
// to join lost its disk a moment ago.
#[test]
fn a_step_that_no_quorum_of_its_members_promised_is_not_made() {
    for is_back in [true, false] {
        let mut primary = replacing();
        assert!(primary.start_change(claimant(9)));
        for name in ["a", "b", "e"] {
            promise_as(&mut primary, name, replica(name), None);
        }
        assert_eq!(primary.state(), PrimaryState::Claiming, "a and b of abcdf");
        let found = if is_back { "f" } else { "?" };
        promise_as(&mut primary, "f", replica(found), None);
        assert_eq!(primary.state() == PrimaryState::Claiming, !is_back);
        primary.stop_waiting();
        assert_eq!(primary.state(), PrimaryState::Starting);
        assert_eq!(primary.membership().next.is_some(), is_back);
    }
}

// If this failed, a disk that is found again after a while would leave a replacement under way that
// nothing ends, and nothing could be replaced any more.
#[test]
fn a_replacement_ends_when_the_replica_that_was_lost_is_back() {
    let mut primary = leading();
    promise_as(&mut primary, "e", replica("g"), None);
    primary.start_replacement(wanted("e", "e")).unwrap();
    assert!(primary.replacement_under_way().is_some());
    promise_as(&mut primary, "e", replica("e"), None);
    assert_eq!(primary.replacement_under_way(), None);
    primary.start_replacement(wanted("e", "e")).unwrap();
    assert_eq!(primary.replacement_under_way(), None, "nothing to be done");
}

// If this failed, a claim that only a lost replica could still win would be waited for without end:
// nobody opens the database until somebody starts a sidecar again.
#[test]
fn a_claim_is_given_up_when_those_left_are_no_quorum() {
    for lost_first in [false, true] {
        let mut primary = leading();
        primary.start_claim(claimant(2));
        if lost_first {
            promise_as(&mut primary, "e", replica("?"), None);
        }
        reject(&mut primary, "a", 2, fenced(2));
        promise_as(&mut primary, "b", replica("b"), None);
        assert_eq!(primary.state(), PrimaryState::Claiming);
        reject(&mut primary, "d", 2, fenced(2));
        if !lost_first {
            assert_eq!(primary.state(), PrimaryState::Claiming, "c and e are left");
            promise_as(&mut primary, "e", replica("?"), None);
        }
        let by = Epoch::new(2);
        assert_eq!(primary.state(), PrimaryState::Fenced { by });
    }
}

// If this failed, nonsense from the command line would become a membership.
#[test]
fn a_replacement_that_makes_no_sense_is_refused() {
    let mut primary = leading();
    assert_eq!(
        primary.start_replacement(wanted("x", "f")),
        Err(ReplaceRefused::NotMember(node("x")))
    );
    assert_eq!(
        primary.start_replacement(wanted("a", "b")),
        Err(ReplaceRefused::AlreadyMember(node("b")))
    );
    primary.start_replacement(wanted("a", "f")).unwrap();
    primary.start_replacement(wanted("a", "f")).unwrap();
    assert!(primary.start_replacement(wanted("b", "g")).is_err());
    primary.cancel_replacement();
    assert_eq!(primary.node_progress(&node("f")), None);
    let mut idle = self::primary(LocalLog::default());
    assert_eq!(
        idle.start_replacement(wanted("a", "f")),
        Err(ReplaceRefused::NotLeading)
    );
}

// If this failed, the new replica could have a vote before it has the log, or never get one.
#[test]
fn a_step_waits_until_the_new_replica_is_level_and_nothing_is_open() {
    let mut primary = replacing();
    append(&mut primary);
    assert!(primary.next_membership().is_some());
    assert!(!primary.start_change(claimant(2)), "an entry is open");
    for name in ["a", "b", "c"] {
        ack(&mut primary, name, 1, 2);
    }
    assert_eq!(primary.next_membership(), None, "f lacks what is committed");
    ack(&mut primary, "f", 1, 2);
    assert!(primary.start_change(claimant(2)));
}

// If this failed, a replica with an empty disk would be counted among the three that hold a commit.
#[test]
fn an_ack_of_another_replica_of_the_node_does_not_count() {
    let mut primary = leading();
    let position = append(&mut primary);
    ack(&mut primary, "a", 1, 2);
    ack(&mut primary, "b", 1, 2);
    primary.handle_disconnected(&node("c"));
    primary.handle_connected(&node("c"));
    promise_as(&mut primary, "c", replica("?"), None);
    for replica in [replica("c"), replica("?")] {
        let message = ReplicaMessage::Ack {
            database: database(),
            epoch: Epoch::new(1),
            generation: 1,
            replica,
            flush_lsn: position.lsn,
        };
        primary.handle_message(&node("c"), &message).unwrap();
    }
    assert_eq!(primary.commit_lsn(), Lsn::new(1));
    let lost: Vec<_> = primary.unrecorded().map(|member| &member.node).collect();
    assert_eq!(lost, [&node("c")]);
    let progress = primary.node_progress(&node("c")).unwrap();
    assert!(
        !progress.counted && progress.feeding,
        "fed, but without a vote"
    );
    primary.start_replacement(wanted("c", "c")).unwrap();
    let promise = promise(&primary, 0, &[], 0);
    send(&mut primary, "d", promise);
    ack(&mut primary, "d", 1, 2);
    assert_eq!(primary.commit_lsn(), Lsn::new(2));
    let joint = primary.next_membership().unwrap();
    assert_eq!(joint.members[2].replica, Some(replica("c")));
    assert_eq!(joint.next.unwrap()[2].replica, Some(replica("?")));
}

// If this failed, a promise of an empty disk would help to choose a log without the newest commits.
#[test]
fn a_promise_of_another_replica_of_the_node_does_not_count() {
    let mut primary = primary(LocalLog::default());
    primary.start_claim(claimant(1));
    for name in ["a", "b"] {
        let promise = promise(&primary, 0, &[], 0);
        send(&mut primary, name, promise);
    }
    promise_as(&mut primary, "c", replica("?"), None);
    assert_eq!(primary.state(), PrimaryState::Claiming);
    let promise = promise(&primary, 0, &[], 0);
    send(&mut primary, "d", promise);
    assert_eq!(primary.state(), PrimaryState::Starting);
}

// If this failed, a host that was away while replicas were replaced would open the log with those
// that are no longer asked when something is committed.
#[test]
fn a_claimant_with_old_members_goes_by_newer_ones_that_it_is_told() {
    let mut primary = primary(LocalLog {
        promised: Epoch::new(4),
        ..LocalLog::default()
    });
    primary.start_claim(claimant(1));
    let told = Membership {
        epoch: Epoch::new(3),
        generation: 5,
        ..membership(&["c", "d", "e", "f", "g"])
    };
    promise_as(&mut primary, "a", replica("a"), None);
    promise_as(&mut primary, "b", replica("b"), None);
    promise_as(&mut primary, "c", replica("c"), Some(told));
    assert_eq!(primary.state(), PrimaryState::Claiming);
    assert!(all_effects(&mut primary).contains(&PrimaryEffect::NodesChanged));
    primary.handle_connected(&node("f"));
    promise_as(&mut primary, "f", replica("f"), None);
    assert_eq!(primary.state(), PrimaryState::Claiming);
    promise_as(&mut primary, "d", replica("d"), None);
    assert_eq!(primary.state(), PrimaryState::Recovering);
    primary.handle_recovered(at(1, 1), runs(&[(1, 1)]));
    assert_eq!(primary.membership().generation, 5);
    assert_eq!(primary.membership().epoch, primary.epoch());
}

// If this failed, two changes could be made from the same members, each without the other's.
#[test]
fn a_step_is_given_up_when_another_primary_has_decided_something() {
    let mut primary = replacing();
    assert!(primary.start_change(claimant(9)));
    // It was decided in epoch 2 by somebody whose epoch start nobody holds.
    primary.start_claim(claimant(8));
    assert_eq!(primary.epoch(), Epoch::new(3));
    for name in ["a", "b", "c"] {
        promise_as(&mut primary, name, replica(name), None);
    }
    primary.handle_appended(at(3, 2));
    for name in ["a", "b", "c"] {
        ack(&mut primary, name, 3, 2);
    }
    assert_eq!(
        primary.membership().generation,
        1,
        "the first claim was given up"
    );
    let promised = promise(&primary, 2, &[(1, 1), (3, 2)], 2);
    send(&mut primary, "f", promised);
    ack(&mut primary, "f", 3, 2);
    assert!(primary.start_change(claimant(7)));
    let told = Membership {
        epoch: Epoch::new(3).next(),
        generation: 2,
        ..membership(&NAMES)
    };
    // Of an epoch that is not below the one claimed: the claim is lost.
    primary.handle_membership(&told);
    for name in ["a", "b", "c"] {
        let promised = promise(&primary, 3, &[(1, 1), (3, 2)], 2);
        send(&mut primary, name, promised);
    }
    assert!(matches!(primary.state(), PrimaryState::Fenced { .. }));
}

fn undecided() -> Primary {
    let members = NAMES.map(|name| Member::configured(node(name), String::new()));
    let membership = Membership::configured(members.to_vec(), 3).unwrap();
    let mut primary = Primary::new(database(), "db".to_owned(), membership, LocalLog::default());
    for name in NAMES {
        primary.handle_connected(&node(name));
    }
    primary
}

// If this failed, three empty disks could be taken for a log that is new, and all it held be lost.
#[test]
fn a_log_of_which_nobody_knows_the_members_needs_all_of_them() {
    let mut primary = undecided();
    primary.start_claim(claimant(1));
    for name in ["a", "b", "c", "d"] {
        promise_as(&mut primary, name, replica(name), None);
        primary.stop_waiting();
        assert_eq!(primary.state(), PrimaryState::Claiming, "after {name}");
    }
    promise_as(&mut primary, "e", replica("e"), None);
    assert_eq!(primary.state(), PrimaryState::Starting);
    let members = &primary.membership().members;
    assert!(members.iter().all(|member| member.replica.is_some()));
}

// If this failed, no database could be made while a replica is away, or the ones that answer a
// moment later would have to be brought in one by one.
#[test]
fn a_log_that_was_just_made_up_waits_for_those_that_are_there() {
    let mut primary = undecided();
    primary.declare_new();
    primary.start_claim(claimant(1));
    for name in ["a", "b", "c", "d"] {
        promise_as(&mut primary, name, replica(name), None);
        assert_eq!(primary.state(), PrimaryState::Claiming, "after {name}");
    }
    primary.stop_waiting();
    assert_eq!(primary.state(), PrimaryState::Starting);
    let recorded = |primary: &Primary| {
        let members = primary.membership().members.iter();
        members.map(|m| m.replica.is_some()).collect::<Vec<_>>()
    };
    assert_eq!(recorded(&primary), [true, true, true, true, false]);
    primary.handle_appended(at(1, 1));
    promise_as(&mut primary, "e", replica("e"), None);
    for name in ["a", "b", "e"] {
        ack(&mut primary, name, 1, 1);
    }
    assert_eq!(primary.state(), PrimaryState::Starting, "e has no vote yet");
    ack(&mut primary, "c", 1, 1);
    assert_eq!(primary.state(), PrimaryState::Leading);
    let unrecorded: Vec<_> = primary.unrecorded().map(|m| m.node.clone()).collect();
    assert_eq!(unrecorded, [node("e")]);
    // A second claim of the same node is not the first any more.
    let mut again = undecided();
    again.declare_new();
    again.start_claim(claimant(1));
    again.start_claim(claimant(2));
    again.stop_waiting();
    for name in ["a", "b", "c", "d"] {
        promise_as(&mut again, name, replica(name), None);
    }
    assert_eq!(again.state(), PrimaryState::Claiming);
}

// If this failed, a disk that was put back to an older copy would be counted as what it was.
#[test]
fn a_replica_with_less_than_it_acked_is_left_alone() {
    let mut primary = leading();
    append(&mut primary);
    for name in ["a", "b", "c"] {
        ack(&mut primary, name, 1, 2);
    }
    primary.handle_disconnected(&node("a"));
    primary.handle_connected(&node("a"));
    let promise = Promise {
        replica: replica("a"),
        ..promise(&primary, 0, &[(1, 1)], 1)
    };
    let result = primary.handle_message(&node("a"), &ReplicaMessage::Promised(promise));
    assert!(result.is_err());
    let progress = primary.node_progress(&node("a")).unwrap();
    assert!(progress.forgot && !progress.feeding && !progress.promised);
}

// If this failed, a healthy replica whose new beginning behind the archive could not be written
// would be left alone for good.
#[test]
fn an_archived_entry_that_a_replica_has_no_more_is_no_loss() {
    let mut primary = leading();
    append(&mut primary);
    for name in ["a", "b", "c"] {
        ack(&mut primary, name, 1, 2);
    }
    primary.handle_archived(Lsn::new(2));
    primary.handle_disconnected(&node("a"));
    primary.handle_connected(&node("a"));
    let promise = Promise {
        replica: replica("a"),
        ..promise(&primary, 0, &[(1, 1)], 1)
    };
    let result = primary.handle_message(&node("a"), &ReplicaMessage::Promised(promise));
    assert_eq!(result, Ok(()));
    let progress = primary.node_progress(&node("a")).unwrap();
    assert!(progress.promised && progress.feeding && !progress.forgot);
}
