//! Rules of the primary, one by one.

mod change;

use super::*;
use crate::error::ProtocolViolation;
use durovfs_wire::Member;
use durovfs_wire::peer::{RejectReason, ReplicaMessage};

const NAMES: [&str; 5] = ["a", "b", "c", "d", "e"];

fn database() -> DatabaseId {
    DatabaseId::from_bytes([7; 16])
}

fn claimant(number: u8) -> ClaimantId {
    ClaimantId::from_bytes([number; 16])
}

fn node(name: &str) -> NodeName {
    name.parse().unwrap()
}

fn at(epoch: u32, lsn: u64) -> LogPosition {
    LogPosition::new(Epoch::new(epoch), Lsn::new(lsn))
}

fn runs(runs: &[(u32, u64)]) -> Vec<EpochRun> {
    runs.iter()
        .map(|(epoch, lsn)| EpochRun {
            epoch: Epoch::new(*epoch),
            first_lsn: Lsn::new(*lsn),
        })
        .collect()
}

/// Which replica a node has, unless its journal was lost.
fn replica(name: &str) -> ReplicaId {
    ReplicaId::from_bytes([name.as_bytes()[0]; 16])
}

fn member(name: &str) -> Member {
    Member {
        node: node(name),
        address: String::new(),
        replica: Some(replica(name)),
    }
}

/// Of known replicas, decided on before the first epoch of the test.
fn membership(names: &[&str]) -> Membership {
    let members = names.iter().map(|name| member(name)).collect();
    Membership::configured(members, 3).unwrap()
}

/// A primary with all five connected, and its effects so far dropped.
fn primary(local: LocalLog) -> Primary {
    let mut primary = Primary::new(database(), "db".to_owned(), membership(&NAMES), local);
    for name in NAMES {
        primary.handle_connected(&node(name));
    }
    primary
}

/// All but those that tell or note the membership: each epoch and each feed has them.
fn effects(primary: &mut Primary) -> Vec<PrimaryEffect> {
    all_effects(primary)
        .into_iter()
        .filter(|effect| {
            !matches!(
                effect,
                PrimaryEffect::NoteMembership { .. }
                    | PrimaryEffect::Send {
                        message: PrimaryMessage::Members { .. },
                        ..
                    }
            )
        })
        .collect()
}

fn all_effects(primary: &mut Primary) -> Vec<PrimaryEffect> {
    std::iter::from_fn(|| primary.poll_effect()).collect()
}

/// What a replica promises with this log, to the current claim.
fn promise(primary: &Primary, previous: u32, history: &[(u32, u64)], last: u64) -> Promise {
    let history = runs(history);
    let log = History::from_runs(&history).unwrap();
    Promise {
        database: database(),
        // `send` says which.
        replica: replica("?"),
        membership: None,
        epoch: primary.epoch(),
        claimant: primary.claimant.unwrap(),
        previous_promise: Epoch::new(previous),
        last: log.position_at(Lsn::new(last)).unwrap(),
        commit_lsn: Lsn::ZERO,
        archive_lsn: Lsn::ZERO,
        last_transaction: None,
        history,
        mending: false,
    }
}

fn send(primary: &mut Primary, name: &str, promise: Promise) {
    let promise = Promise {
        replica: replica(name),
        ..promise
    };
    primary
        .handle_message(&node(name), &ReplicaMessage::Promised(promise))
        .unwrap();
}

fn ack(primary: &mut Primary, name: &str, epoch: u32, flush_lsn: u64) {
    try_ack(primary, name, epoch, flush_lsn).unwrap();
}

fn try_ack(
    primary: &mut Primary,
    name: &str,
    epoch: u32,
    flush_lsn: u64,
) -> Result<(), ProtocolViolation> {
    let message = ReplicaMessage::Ack {
        database: database(),
        epoch: Epoch::new(epoch),
        generation: primary.membership().generation,
        replica: replica(name),
        flush_lsn: Lsn::new(flush_lsn),
    };
    primary.handle_message(&node(name), &message)
}

fn reject(primary: &mut Primary, name: &str, epoch: u32, reason: RejectReason) {
    let message = ReplicaMessage::Rejected {
        database: database(),
        epoch: Epoch::new(epoch),
        reason,
    };
    primary.handle_message(&node(name), &message).unwrap();
}

fn fenced(promised: u32) -> RejectReason {
    RejectReason::Fenced {
        promised: Epoch::new(promised),
    }
}

/// Leads epoch 1 of a new log: a, b and c hold the epoch start at lsn 1.
fn leading() -> Primary {
    let mut primary = primary(LocalLog::default());
    primary.start_claim(claimant(1));
    for name in ["a", "b", "c"] {
        let promise = promise(&primary, 0, &[], 0);
        send(&mut primary, name, promise);
    }
    primary.handle_appended(at(1, 1));
    for name in ["a", "b", "c"] {
        ack(&mut primary, name, 1, 1);
    }
    assert_eq!(primary.state(), PrimaryState::Leading);
    effects(&mut primary);
    primary
}

fn append(primary: &mut Primary) -> LogPosition {
    let position = LogPosition::new(primary.epoch(), primary.next_lsn().unwrap());
    primary.handle_appended(position);
    position
}

// If this failed, a new database could not be opened, or would take commits before its epoch is
// held.
#[test]
fn a_new_log_opens_when_a_quorum_holds_the_epoch_start() {
    let mut primary = primary(LocalLog::default());
    primary.start_claim(claimant(1));
    assert_eq!(effects(&mut primary).len(), 5, "a claim to each");
    for name in ["a", "b", "c"] {
        assert_eq!(primary.state(), PrimaryState::Claiming);
        let promise = promise(&primary, 0, &[], 0);
        send(&mut primary, name, promise);
    }
    assert_eq!(
        effects(&mut primary),
        [
            PrimaryEffect::CutOwnLog {
                after: LogPosition::ZERO
            },
            PrimaryEffect::AppendEpochStart { position: at(1, 1) }
        ]
    );
    primary.handle_appended(at(1, 1));
    let feeds = effects(&mut primary);
    assert_eq!(feeds.len(), 3, "{feeds:?}");
    ack(&mut primary, "a", 1, 1);
    ack(&mut primary, "a", 1, 1);
    ack(&mut primary, "b", 1, 1);
    assert_eq!((primary.next_lsn(), effects(&mut primary)), (None, vec![]));
    ack(&mut primary, "c", 1, 1);
    assert_eq!(primary.next_lsn(), Some(Lsn::new(2)));
    assert_eq!(
        effects(&mut primary),
        [
            PrimaryEffect::Committed { lsn: Lsn::new(1) },
            PrimaryEffect::Opened {
                epoch: Epoch::new(1),
                end: at(1, 1)
            }
        ]
    );
}

// If this failed, commits would be told that fewer than three disks hold, or an ack of a lost epoch
// would be taken for one of this.
#[test]
fn the_third_ack_of_the_current_epoch_commits() {
    let mut primary = leading();
    let position = append(&mut primary);
    ack(&mut primary, "a", 1, 2);
    ack(&mut primary, "b", 1, 2);
    ack(&mut primary, "c", 0, 2);
    ack(&mut primary, "d", 1, 2); // never promised
    assert_eq!(effects(&mut primary), []);
    ack(&mut primary, "c", 1, 2);
    assert_eq!(
        effects(&mut primary),
        [PrimaryEffect::Committed { lsn: position.lsn }]
    );
    assert!(
        try_ack(&mut primary, "a", 1, 3).is_err(),
        "acks what was never sent"
    );
    ack(&mut primary, "nobody", 1, 2);
}

// If this failed, a takeover would lose the newest commits, or keep a tail that nobody else has.
#[test]
fn recovery_cuts_the_own_tail_and_fetches_the_donors() {
    let local = LocalLog {
        last: at(1, 9),
        first_lsn: Lsn::new(1),
        history: runs(&[(1, 1)]),
        promised: Epoch::new(1),
        ..LocalLog::default()
    };
    let mut primary = primary(local);
    primary.start_claim(claimant(1));
    assert_eq!(primary.epoch(), Epoch::new(2));
    reject(&mut primary, "e", 2, fenced(3));
    primary.start_claim(claimant(2));
    assert_eq!(primary.epoch(), Epoch::new(4), "above all seen");
    effects(&mut primary);
    for (name, history, last) in [
        ("a", &[(1, 1)][..], 20),
        ("b", &[(1, 1), (3, 7)], 8),
        ("c", &[(1, 1), (3, 7)], 7),
    ] {
        let promise = promise(&primary, 3, history, last);
        send(&mut primary, name, promise);
    }
    let b = node("b");
    assert_eq!(
        effects(&mut primary),
        [
            PrimaryEffect::CutOwnLog { after: at(1, 6) },
            PrimaryEffect::Fetch {
                donor: b.clone(),
                first_lsn: Lsn::new(7),
                last: at(3, 8)
            }
        ],
        "the newest epoch wins over the longest log"
    );
    primary.handle_recovered(at(3, 8), runs(&[(1, 1), (3, 7)]));
    primary.handle_appended(at(4, 9));
    let feeds: Vec<_> = effects(&mut primary)
        .into_iter()
        .filter_map(|effect| match effect {
            PrimaryEffect::Feed { node, previous, .. } => Some((node.to_string(), previous)),
            _ => None,
        })
        .collect();
    let expected = [("a", at(1, 6)), ("b", at(3, 8)), ("c", at(3, 7))];
    assert_eq!(
        feeds,
        expected.map(|(name, previous)| (name.to_owned(), previous))
    );
    // Entries of older epochs are not counted directly.
    for name in ["a", "b", "c"] {
        ack(&mut primary, name, 4, 8);
    }
    assert_eq!(primary.commit_lsn(), Lsn::ZERO);
    for name in ["a", "b", "c"] {
        ack(&mut primary, name, 4, 9);
    }
    assert_eq!(primary.commit_lsn(), Lsn::new(9));
}

// If this failed, one broken donor would keep a database closed, or its entries would be mixed in.
#[test]
fn a_failed_fetch_goes_on_with_another_quorum() {
    let mut primary = primary(LocalLog::default());
    primary.start_claim(claimant(1));
    effects(&mut primary);
    primary.start_claim(claimant(2));
    effects(&mut primary);
    for (name, last) in [("a", 5), ("b", 4), ("c", 3)] {
        let promise = promise(&primary, 1, &[(1, 1)], last);
        send(&mut primary, name, promise);
    }
    assert_eq!(primary.state(), PrimaryState::Recovering);
    effects(&mut primary);
    primary.handle_fetch_failed(&node("b"));
    assert_eq!(
        primary.state(),
        PrimaryState::Recovering,
        "b is not the donor"
    );
    primary.handle_fetch_failed(&node("a"));
    assert_eq!(
        primary.state(),
        PrimaryState::Claiming,
        "two promises are no quorum"
    );
    let promise = promise(&primary, 1, &[(1, 1)], 2);
    send(&mut primary, "d", promise);
    assert_eq!(
        effects(&mut primary),
        [
            PrimaryEffect::CutOwnLog {
                after: LogPosition::ZERO
            },
            PrimaryEffect::Fetch {
                donor: node("b"),
                first_lsn: Lsn::new(1),
                last: at(1, 4)
            }
        ]
    );
}

/// Leads epoch 1, has sent an entry at lsn 2 that only a holds, and claims to bury it.
fn burying() -> Primary {
    let mut primary = leading();
    append(&mut primary);
    ack(&mut primary, "a", 1, 2);
    primary.start_bury(claimant(9));
    assert_eq!((primary.epoch(), primary.next_lsn()), (Epoch::new(2), None));
    effects(&mut primary);
    primary
}

// If this failed, a commit that was told "not committed" could still be in the log.
#[test]
fn a_burial_puts_the_epoch_start_in_place_of_the_entry() {
    let mut primary = burying();
    ack(&mut primary, "b", 1, 2);
    ack(&mut primary, "c", 1, 2);
    assert_eq!(
        primary.commit_lsn(),
        Lsn::new(1),
        "acks of the epoch given up do not count"
    );
    for (name, last) in [("a", 2), ("b", 2), ("c", 1)] {
        let promise = promise(&primary, 1, &[(1, 1)], last);
        send(&mut primary, name, promise);
    }
    assert_eq!(
        effects(&mut primary),
        [
            PrimaryEffect::CutOwnLog { after: at(1, 1) },
            PrimaryEffect::AppendEpochStart { position: at(2, 2) }
        ]
    );
    primary.handle_appended(at(2, 2));
    for name in ["a", "b"] {
        ack(&mut primary, name, 2, 2);
    }
    assert!(
        primary.is_burying(),
        "not certain before three hold the start"
    );
    effects(&mut primary);
    ack(&mut primary, "c", 2, 2);
    assert_eq!(
        effects(&mut primary),
        [
            PrimaryEffect::Committed { lsn: Lsn::new(2) },
            PrimaryEffect::Buried { lsn: Lsn::new(2) },
            PrimaryEffect::Opened {
                epoch: Epoch::new(2),
                end: at(2, 2)
            }
        ]
    );
    assert_eq!(primary.next_lsn(), Some(Lsn::new(3)));
}

// If this failed, an entry that another claimant may have adopted would be told not committed.
#[test]
fn a_burial_is_refused_when_a_promiser_promised_another_epoch_in_between() {
    for (previous, commit_lsn) in [(2, 1), (0, 1), (1, 2)] {
        let mut primary = burying();
        for name in ["b", "c"] {
            let promise = promise(&primary, 1, &[(1, 1)], 1);
            send(&mut primary, name, promise);
        }
        let mut promise = promise(&primary, previous, &[(1, 1)], 2);
        promise.commit_lsn = Lsn::new(commit_lsn);
        send(&mut primary, "a", promise);
        let got = effects(&mut primary);
        assert!(
            got.contains(&PrimaryEffect::BuryRefused),
            "{previous} {commit_lsn}: {got:?}"
        );
        let start = PrimaryEffect::AppendEpochStart { position: at(2, 3) };
        assert!(got.contains(&start), "the entry stays: {got:?}");
    }
}

// If this failed, a burial that waits for replicas would be lost by asking for it again.
#[test]
fn a_repeated_burial_keeps_its_claim() {
    let mut primary = burying();
    let promised = promise(&primary, 1, &[(1, 1)], 1);
    send(&mut primary, "b", promised);
    primary.start_bury(claimant(10));
    assert_eq!(primary.epoch(), Epoch::new(2));
    let asked: Vec<_> = effects(&mut primary)
        .into_iter()
        .filter_map(|effect| match effect {
            PrimaryEffect::Send {
                node,
                message: PrimaryMessage::Claim(claim),
            } => {
                assert_eq!(claim.claimant, claimant(9));
                Some(node.to_string())
            }
            _ => None,
        })
        .collect();
    assert_eq!(asked, ["a", "c", "d", "e"]);
    primary.start_claim(claimant(11));
    assert!(effects(&mut primary).contains(&PrimaryEffect::BuryRefused));
}

// If this failed, a burial asked for too early or too late would change the log.
#[test]
fn there_is_nothing_to_bury_without_an_open_entry() {
    let mut leading = leading();
    leading.start_bury(claimant(9));
    assert_eq!(
        (leading.state(), effects(&mut leading)),
        (PrimaryState::Leading, vec![])
    );
    let mut idle = primary(LocalLog::default());
    idle.start_bury(claimant(9));
    assert_eq!(effects(&mut idle), [PrimaryEffect::BuryRefused]);
    assert_eq!(idle.state(), PrimaryState::Idle);
}

// If this failed, an old primary would go on telling commits after a takeover.
#[test]
fn a_promiser_that_serves_a_higher_epoch_fences() {
    let mut primary = leading();
    reject(&mut primary, "b", 1, fenced(4));
    assert_eq!(primary.state(), PrimaryState::Fenced { by: Epoch::new(4) });
    assert_eq!(primary.next_lsn(), None);
    let got = effects(&mut primary);
    assert_eq!(
        got.last(),
        Some(&PrimaryEffect::Fenced { by: Epoch::new(4) }),
        "{got:?}"
    );
    ack(&mut primary, "a", 1, 1);
    primary.handle_connected(&node("d"));
    assert_eq!(effects(&mut primary), []);
    primary.start_claim(claimant(2));
    assert_eq!(primary.epoch(), Epoch::new(5));
}

// If this failed, one replica with the promise of a claim that failed would close a healthy log, or
// a claim that cannot win would wait for ever.
#[test]
fn refusals_fence_only_when_no_quorum_is_left() {
    let mut primary = leading();
    reject(&mut primary, "d", 1, fenced(8));
    reject(&mut primary, "e", 1, fenced(8));
    assert_eq!(primary.state(), PrimaryState::Leading);
    primary.start_claim(claimant(2));
    assert_eq!(primary.epoch(), Epoch::new(9));
    for name in ["a", "b"] {
        reject(&mut primary, name, 9, fenced(9));
        assert_eq!(primary.state(), PrimaryState::Claiming);
    }
    reject(&mut primary, "c", 9, fenced(9));
    assert_eq!(primary.state(), PrimaryState::Fenced { by: Epoch::new(9) });
}

// If this failed, a replica that was away would never catch up, or be sent what it cannot take.
#[test]
fn a_late_replica_is_claimed_and_fed_from_where_it_stands() {
    let mut primary = leading();
    append(&mut primary);
    primary.handle_disconnected(&node("a"));
    assert_eq!(
        effects(&mut primary),
        [PrimaryEffect::StopFeed { node: node("a") }]
    );
    primary.handle_connected(&node("a"));
    assert!(matches!(
        effects(&mut primary)[..],
        [PrimaryEffect::Send { .. }]
    ));
    let held = promise(&primary, 0, &[(1, 1)], 2);
    send(&mut primary, "a", held);
    let next_lsn = Lsn::new(3);
    assert_eq!(
        effects(&mut primary),
        [PrimaryEffect::Feed {
            node: node("a"),
            next_lsn,
            previous: at(1, 2)
        }]
    );
    ack(&mut primary, "b", 1, 2);
    ack(&mut primary, "c", 1, 2);
    assert_eq!(
        primary.commit_lsn(),
        Lsn::new(2),
        "its promise told what it holds of this epoch"
    );
    // A gap is settled by asking what the replica has; more of them are the same gap.
    reject(&mut primary, "a", 1, RejectReason::Gap { last: at(1, 1) });
    reject(&mut primary, "a", 1, RejectReason::Gap { last: at(1, 1) });
    let got = effects(&mut primary);
    let claims = got
        .iter()
        .filter(|e| matches!(e, PrimaryEffect::Send { .. }))
        .count();
    assert_eq!(claims, 1, "{got:?}");
}

// If this failed, a replica that was away for long would be sent entries that no journal has.
#[test]
fn what_is_archived_is_not_fed_unless_it_is_retained() {
    for (retained, previous) in [(None, at(1, 3)), (Some(3), at(1, 2)), (Some(9), at(1, 3))] {
        let mut primary = leading();
        for _ in 0..4 {
            append(&mut primary);
        }
        for name in ["a", "b", "c"] {
            ack(&mut primary, name, 1, 5);
        }
        if let Some(first_lsn) = retained {
            primary.handle_retained(Lsn::new(first_lsn));
        }
        primary.handle_archived(Lsn::new(3));
        effects(&mut primary);
        let promise = promise(&primary, 0, &[], 0);
        send(&mut primary, "d", promise);
        let next_lsn = previous.lsn.next();
        let feed = PrimaryEffect::Feed {
            node: node("d"),
            next_lsn,
            previous,
        };
        assert_eq!(effects(&mut primary), [feed]);
    }
}

// If this failed, the sidecar would die of an empty replica whenever it meets it.
#[test]
fn an_empty_replica_is_fed_from_where_the_epochs_are_known() {
    let mut primary = primary(LocalLog {
        last: at(9, 300),
        first_lsn: Lsn::new(50),
        commit_lsn: Lsn::new(300),
        archive_lsn: Lsn::new(300),
        history: runs(&[(8, 200), (9, 290)]),
        ..LocalLog::default()
    });
    primary.handle_retained(Lsn::new(50));
    primary.start_claim(claimant(1));
    for name in ["a", "b", "c"] {
        let mut promise = promise(&primary, 9, &[(8, 200), (9, 290)], 300);
        (promise.commit_lsn, promise.archive_lsn) = (Lsn::new(300), Lsn::new(300));
        send(&mut primary, name, promise);
    }
    primary.handle_appended(LogPosition::new(primary.epoch(), Lsn::new(301)));
    effects(&mut primary);
    let promise = promise(&primary, 0, &[], 0);
    send(&mut primary, "d", promise);
    let feed = PrimaryEffect::Feed {
        node: node("d"),
        next_lsn: Lsn::new(201),
        previous: at(8, 200),
    };
    assert_eq!(effects(&mut primary), [feed]);
}

// If this failed, a new machine would ask for entries that the replicas have dropped.
#[test]
fn a_primary_far_behind_restarts_its_log_at_the_archive() {
    let mut primary = primary(LocalLog::default());
    primary.start_claim(claimant(1));
    primary.start_claim(claimant(2));
    primary.start_claim(claimant(3));
    effects(&mut primary);
    for name in ["a", "b", "c"] {
        let mut promise = promise(&primary, 2, &[(2, 50)], 65);
        promise.commit_lsn = Lsn::new(62);
        promise.archive_lsn = Lsn::new(60);
        send(&mut primary, name, promise);
    }
    let got = effects(&mut primary);
    assert_eq!(got[0], PrimaryEffect::RestartOwnLog { at: at(2, 60) });
    assert!(
        matches!(&got[2], PrimaryEffect::Fetch { first_lsn, .. } if *first_lsn == Lsn::new(61)),
        "{got:?}"
    );
    assert_eq!(
        (primary.commit_lsn(), primary.archive_lsn()),
        (Lsn::new(60), Lsn::new(60)),
        "the own log begins there, whatever becomes of the fetch"
    );
    primary.handle_recovered(at(2, 65), runs(&[(2, 60)]));
    assert_eq!(
        (primary.commit_lsn(), primary.archive_lsn()),
        (Lsn::new(62), Lsn::new(60))
    );
}

// If this failed, a damaged or lying replica could make a log out of nothing.
#[test]
fn promises_that_contradict_themselves_are_violations() {
    type Damage = fn(&mut Promise);
    let damages: [Damage; 8] = [
        |promise| promise.last = at(1, 3),
        |promise| promise.last = at(1, 2),
        |promise| promise.commit_lsn = Lsn::new(9),
        |promise| promise.archive_lsn = Lsn::new(1),
        |promise| promise.history.reverse(),
        |promise| promise.history.clear(),
        |promise| {
            let mut told = membership(&NAMES);
            told.epoch = promise.epoch.next();
            promise.membership = Some(told);
        },
        |promise| {
            promise.history.remove(0);
        },
    ];
    for (index, damage) in damages.into_iter().enumerate() {
        let mut primary = primary(LocalLog {
            promised: Epoch::new(5),
            ..LocalLog::default()
        });
        primary.start_claim(claimant(1));
        let mut promise = promise(&primary, 5, &[(1, 1), (2, 3)], 4);
        damage(&mut promise);
        let result = primary.handle_message(&node("a"), &ReplicaMessage::Promised(promise));
        assert!(result.is_err(), "damage {index}");
        assert_eq!(
            primary.node_progress(&node("a")).map(|node| node.promised),
            Some(false)
        );
    }
}

// If this failed, a full disk would be asked again and again in a tight loop.
#[test]
fn a_replica_in_trouble_is_left_alone_until_it_is_tried_again() {
    let mut primary = leading();
    reject(
        &mut primary,
        "a",
        1,
        RejectReason::Storage {
            message: "full".to_owned(),
        },
    );
    reject(&mut primary, "a", 1, RejectReason::Gap { last: at(1, 1) });
    assert_eq!(
        effects(&mut primary),
        [PrimaryEffect::StopFeed { node: node("a") }]
    );
    assert_eq!(
        primary.node_progress(&node("a")).map(|node| node.troubled),
        Some(true)
    );
    primary.restart_feed(&node("a"));
    assert!(matches!(
        effects(&mut primary)[..],
        [PrimaryEffect::Send { .. }]
    ));
}

// If this failed, three full disks would look like another primary: the application would be told
// that somebody took over, when the disks only have to be mended.
#[test]
fn replicas_in_trouble_do_not_pass_for_ones_that_refuse_the_epoch() {
    let mut primary = leading();
    for name in ["a", "b", "c"] {
        let message = "full".to_owned();
        reject(&mut primary, name, 1, RejectReason::Storage { message });
        // To an append that was under way when its machine began anew.
        reject(&mut primary, name, 1, fenced(1));
    }
    assert_eq!(primary.state(), PrimaryState::Leading);
    let refused = primary.node_progress(&node("a")).and_then(|a| a.refused);
    assert_eq!(refused, None);
}

// If this failed, losing committed entries would go unseen: a node that stops is better.
#[test]
#[should_panic(expected = "a quorum lost committed entries")]
fn a_donor_without_what_is_committed_stops_the_primary() {
    let mut primary = leading();
    primary.start_claim(claimant(2));
    for name in ["a", "b", "c"] {
        let promise = promise(&primary, 1, &[], 0);
        send(&mut primary, name, promise);
    }
}

// If this failed, a claim against a live primary could win, or one that an operator forced could
// not; or a replica that took another node for the primary would never serve the new one.
#[test]
fn a_live_primary_stands_in_the_way_until_the_epoch_is_won() {
    let forced_of = |primary: &mut Primary| -> Vec<(NodeName, bool)> {
        let claims = effects(primary)
            .into_iter()
            .filter_map(|effect| match effect {
                PrimaryEffect::Send {
                    node,
                    message: PrimaryMessage::Claim(claim),
                } => Some((node, claim.forced)),
                _ => None,
            });
        claims.collect()
    };
    let alive = || RejectReason::Alive { primary: node("x") };
    let mut refused = primary(LocalLog::default());
    refused.start_claim(claimant(1));
    assert!(forced_of(&mut refused).iter().all(|(_, forced)| !forced));
    for name in ["a", "b", "c"] {
        assert_eq!(refused.state(), PrimaryState::Claiming);
        reject(&mut refused, name, 1, alive());
    }
    assert!(matches!(refused.state(), PrimaryState::Fenced { .. }));
    refused.force_claims(true);
    refused.start_claim(claimant(2));
    let claims = forced_of(&mut refused);
    assert_eq!(claims.len(), 5);
    assert!(claims.iter().all(|(_, forced)| *forced));

    let mut winner = primary(LocalLog::default());
    winner.start_claim(claimant(1));
    reject(&mut winner, "d", 1, alive());
    for name in ["a", "b", "c"] {
        let promise = promise(&winner, 0, &[], 0);
        send(&mut winner, name, promise);
    }
    effects(&mut winner);
    winner.handle_appended(at(1, 1));
    assert_eq!(forced_of(&mut winner), [(node("d"), true)]);
    let promise = promise(&winner, 0, &[], 0);
    send(&mut winner, "d", promise);
    assert_eq!(
        winner.node_progress(&node("d")).map(|node| node.feeding),
        Some(true)
    );
}

// If this failed, a replica that promised a claimant that lost would refuse the primary for good,
// or an entry that is not committed yet would be given up for it.
#[test]
fn a_member_that_refuses_the_epoch_is_claimed_again_when_nothing_is_open() {
    let mut primary = leading();
    assert!(!primary.start_again(claimant(2)), "none refuses");
    primary.handle_disconnected(&node("d"));
    primary.handle_connected(&node("d"));
    reject(&mut primary, "d", 1, fenced(7));
    assert!(primary.is_refused());
    let entry = append(&mut primary);
    assert!(!primary.start_again(claimant(2)), "an entry is open");
    for name in ["a", "b", "c"] {
        ack(&mut primary, name, 1, entry.lsn.get());
    }
    assert!(primary.start_again(claimant(2)));
    assert_eq!(primary.state(), PrimaryState::Claiming);
    assert_eq!(primary.epoch(), Epoch::new(8), "above what it promised");
    for name in ["a", "b", "d"] {
        let promise = promise(&primary, 1, &[(1, 1)], if name == "d" { 1 } else { 2 });
        send(&mut primary, name, promise);
    }
    assert!(!primary.is_refused());
    assert_eq!(primary.last().lsn, entry.lsn, "nothing is given up");
}

// If this failed, the old primary would take commits that it cannot carry through.
#[test]
fn a_primary_that_is_told_of_its_successor_is_fenced() {
    let mut primary = leading();
    let reason = |promised| RejectReason::TakenOver {
        promised: Epoch::new(promised),
        by: node("x"),
    };
    reject(&mut primary, "a", 1, reason(1));
    assert_eq!(primary.state(), PrimaryState::Leading, "of an older epoch");
    reject(&mut primary, "a", 1, reason(2));
    let by = Epoch::new(2);
    assert_eq!(primary.state(), PrimaryState::Fenced { by });
    ack(&mut primary, "b", 1, 1);
    assert_eq!(primary.next_lsn(), None);
}
