//! Rules of the replica, one by one.

use super::*;
use durovfs_wire::{Member, PageSize, PartHeader, PartKind, Timestamp};

fn database() -> DatabaseId {
    DatabaseId::from_bytes([7; 16])
}

fn claimant(number: u8) -> ClaimantId {
    ClaimantId::from_bytes([number; 16])
}

fn host(name: &str) -> NodeName {
    name.parse().unwrap()
}

fn at(epoch: u32, lsn: u64) -> LogPosition {
    LogPosition::new(Epoch::new(epoch), Lsn::new(lsn))
}

fn claim(epoch: u32, number: u8) -> Claim {
    Claim {
        database: database(),
        name: "db".to_owned(),
        epoch: Epoch::new(epoch),
        claimant: claimant(number),
        forced: false,
    }
}

fn effects(replica: &mut Replica) -> Vec<ReplicaEffect> {
    std::iter::from_fn(|| replica.poll_effect()).collect()
}

/// The messages among the effects.
fn sent(replica: &mut Replica) -> Vec<ReplicaMessage> {
    effects(replica)
        .into_iter()
        .filter_map(|effect| match effect {
            ReplicaEffect::Send { message, .. } => Some(message),
            ReplicaEffect::PersistMembership { .. } => None,
            ReplicaEffect::PersistPromise { .. } | ReplicaEffect::PersistMended => {
                panic!("{effect:?}")
            }
        })
        .collect()
}

fn replica_id() -> ReplicaId {
    ReplicaId::from_bytes([9; 16])
}

fn membership(epoch: u32, generation: u32) -> Membership {
    let nodes = ["a", "b", "c"].map(|name| Member {
        node: host(name),
        address: String::new(),
        replica: Some(replica_id()),
    });
    Membership {
        epoch: Epoch::new(epoch),
        generation,
        ..Membership::configured(nodes.to_vec(), 2).unwrap()
    }
}

/// Claims the epoch, persists, tells the membership, and gives the promise that was sent.
fn promise(replica: &mut Replica, epoch: u32) -> Promise {
    replica.handle_claim(&host("p"), &claim(epoch, epoch as u8));
    let token = match effects(replica)[..] {
        [ReplicaEffect::PersistPromise { token, .. }] => token,
        ref other => panic!("{other:?}"),
    };
    replica.handle_promise_persisted(token);
    let promise = match sent(replica).pop() {
        Some(ReplicaMessage::Promised(promise)) => promise,
        other => panic!("{other:?}"),
    };
    replica.handle_members(membership(epoch, 1)).unwrap();
    assert_eq!(sent(replica), []);
    promise
}

fn header(position: LogPosition, part: u32, last: bool) -> PartHeader {
    let kind = if last {
        PartKind::EpochStart {
            time: Timestamp::from_micros(0),
            last_transaction: None,
        }
    } else {
        PartKind::Pages {
            page_size: PageSize::try_from(512).unwrap(),
        }
    };
    PartHeader {
        database: database(),
        epoch: position.epoch,
        lsn: position.lsn,
        part,
        kind,
    }
}

/// What was heard with an append: the epoch it is sent in, commit_lsn, archive_lsn.
type Heard = (u32, u64, u64);

fn append(
    replica: &mut Replica,
    heard: Heard,
    previous: LogPosition,
    position: LogPosition,
) -> AppendVerdict {
    append_part(replica, heard, previous, header(position, 0, true)).unwrap()
}

fn append_part(
    replica: &mut Replica,
    (epoch, commit_lsn, archive_lsn): Heard,
    previous: LogPosition,
    part: PartHeader,
) -> Result<AppendVerdict, crate::ProtocolViolation> {
    let (commit_lsn, archive_lsn) = (Lsn::new(commit_lsn), Lsn::new(archive_lsn));
    replica.check_append(
        1,
        Epoch::new(epoch),
        previous,
        &part,
        commit_lsn,
        archive_lsn,
    )
}

fn write() -> AppendVerdict {
    AppendVerdict::Write {
        truncate_after: None,
        restart_at: None,
    }
}

fn cut(after: LogPosition) -> AppendVerdict {
    AppendVerdict::Write {
        truncate_after: Some(after),
        restart_at: None,
    }
}

fn restart(at: LogPosition) -> AppendVerdict {
    AppendVerdict::Write {
        truncate_after: None,
        restart_at: Some(at),
    }
}

fn gap(last: LogPosition) -> AppendVerdict {
    AppendVerdict::Reject(RejectReason::Gap { last })
}

/// Promised epoch 1 and holds its entries 1 to `last`, of which one after another was synced.
fn holding(last: u64) -> Replica {
    let mut replica = Replica::new(database(), ReplicaState::unheard_of(replica_id()));
    promise(&mut replica, 1);
    for lsn in 1..=last {
        let previous = if lsn == 1 {
            LogPosition::ZERO
        } else {
            at(1, lsn - 1)
        };
        assert_eq!(
            append(&mut replica, (1, 0, 0), previous, at(1, lsn)),
            write()
        );
        replica.handle_part_persisted(at(1, lsn), Epoch::new(1), true);
    }
    effects(&mut replica);
    replica
}

fn acked(replica: &mut Replica) -> Option<(u32, u64)> {
    match sent(replica)[..] {
        [] => None,
        [
            ReplicaMessage::Ack {
                epoch, flush_lsn, ..
            },
        ] => Some((epoch.get(), flush_lsn.get())),
        ref other => panic!("{other:?}"),
    }
}

// If this failed, a replica could forget a promise by crashing, and serve two primaries.
#[test]
fn a_promise_is_answered_only_when_it_is_on_disk() {
    let mut replica = holding(2);
    replica.handle_claim(&host("q"), &claim(3, 3));
    let persist = effects(&mut replica);
    assert!(
        matches!(
            persist[..],
            [ReplicaEffect::PersistPromise { token: 2, .. }]
        ),
        "{persist:?}"
    );
    assert_eq!(
        append(&mut replica, (1, 0, 0), at(1, 2), at(1, 3)),
        fenced(3)
    );
    replica.handle_promise_persisted(1);
    assert_eq!(effects(&mut replica), [], "a notice of the earlier promise");
    replica.handle_promise_persisted(2);
    let [ReplicaMessage::Promised(promise), notice] = &sent(&mut replica)[..] else {
        panic!()
    };
    assert_eq!(*notice, taken_over((1, 3), "q"));
    assert_eq!(
        (promise.epoch.get(), promise.previous_promise.get()),
        (3, 1)
    );
    assert_eq!((promise.last, promise.history.len()), (at(1, 2), 1));
}

/// What the primary of the first epoch is told when the second one is promised to another node.
fn taken_over(epochs: (u32, u32), by: &str) -> ReplicaMessage {
    ReplicaMessage::Rejected {
        database: database(),
        epoch: Epoch::new(epochs.0),
        reason: RejectReason::TakenOver {
            promised: Epoch::new(epochs.1),
            by: host(by),
        },
    }
}

fn fenced(promised: u32) -> AppendVerdict {
    AppendVerdict::Reject(RejectReason::Fenced {
        promised: Epoch::new(promised),
    })
}

// If this failed, two claimants could both believe to have won the same epoch.
#[test]
fn an_epoch_is_promised_once_and_repeated_to_the_same_claimant() {
    let mut replica = holding(0);
    let first = promise(&mut replica, 3);
    for (epoch, number) in [(3, 4), (2, 3), (2, 5)] {
        replica.handle_claim(&host("q"), &claim(epoch, number));
        let [ReplicaMessage::Rejected { reason, .. }] = &sent(&mut replica)[..] else {
            panic!()
        };
        assert_eq!(
            *reason,
            RejectReason::Fenced {
                promised: Epoch::new(3)
            }
        );
    }
    replica.handle_claim(&host("p"), &claim(3, 3));
    let again = Promise {
        membership: Some(membership(3, 1)),
        ..first
    };
    assert_eq!(
        sent(&mut replica),
        [ReplicaMessage::Promised(again)],
        "the same answer"
    );
}

// If this failed, a burial would rest on what a restarted replica no longer knows.
#[test]
fn after_a_restart_the_promise_before_is_told_as_unknown() {
    let persisted = ReplicaState {
        promised: Epoch::new(3),
        claimant: Some(claimant(3)),
        ..ReplicaState::unheard_of(replica_id())
    };
    let mut replica = Replica::new(database(), persisted);
    replica.handle_claim(&host("p"), &claim(3, 3));
    let [ReplicaMessage::Promised(promise)] = &sent(&mut replica)[..] else {
        panic!()
    };
    assert_eq!(promise.previous_promise, Epoch::new(3));
}

// If this failed, a claimant could count on a promise that a later one replaced before the sync.
#[test]
fn a_higher_claim_replaces_one_that_waits_for_the_disk() {
    let mut replica = holding(0);
    replica.handle_claim(&host("p"), &claim(4, 4));
    replica.handle_claim(&host("q"), &claim(5, 5));
    effects(&mut replica);
    replica.handle_promise_persisted(2);
    assert_eq!(effects(&mut replica), []);
    replica.handle_promise_persisted(3);
    let [ReplicaMessage::Promised(promise), notice] = &sent(&mut replica)[..] else {
        panic!()
    };
    assert_eq!(*notice, taken_over((1, 5), "q"));
    assert_eq!(
        (promise.epoch.get(), promise.previous_promise.get()),
        (5, 4)
    );
}

// If this failed, an entry could be acked that a power cut takes away.
#[test]
fn an_entry_is_acked_when_it_is_synced_and_one_ack_serves_all() {
    let mut replica = holding(1);
    assert_eq!(append(&mut replica, (1, 1, 0), at(1, 1), at(1, 2)), write());
    assert_eq!(append(&mut replica, (1, 1, 0), at(1, 2), at(1, 3)), write());
    assert_eq!(acked(&mut replica), None);
    assert_eq!(
        (replica.last(), replica.flush_lsn()),
        (at(1, 3), Lsn::new(1))
    );
    replica.handle_part_persisted(at(1, 2), Epoch::new(1), true);
    replica.handle_part_persisted(at(1, 3), Epoch::new(1), true);
    assert_eq!(acked(&mut replica), Some((1, 3)));
    assert_eq!(
        append(&mut replica, (1, 1, 0), at(1, 2), at(1, 3)),
        AppendVerdict::Duplicate
    );
    assert_eq!(
        acked(&mut replica),
        Some((1, 3)),
        "the ack may have been lost"
    );
}

// If this failed, entries could be missing in the middle of a replica's log.
#[test]
fn appends_come_in_order_and_only_from_the_promised_epoch() {
    let mut replica = holding(2);
    assert_eq!(
        append(&mut replica, (1, 0, 0), at(1, 3), at(1, 4)),
        gap(at(1, 2))
    );
    assert_eq!(
        append(&mut replica, (2, 0, 0), at(1, 2), at(2, 3)),
        fenced(1)
    );
    let part = header(at(1, 3), 0, true);
    let zero = Lsn::ZERO;
    assert_eq!(
        replica.check_append(2, Epoch::new(1), at(1, 2), &part, zero, zero),
        Ok(AppendVerdict::Reject(RejectReason::Generation {
            current: 1
        }))
    );
    for (previous, position) in [
        (at(1, 1), at(1, 3)),
        (at(1, 2), at(2, 3)),
        (at(0, 2), at(1, 3)),
    ] {
        let part = header(position, 0, true);
        assert!(
            append_part(&mut replica, (1, 0, 0), previous, part).is_err(),
            "{position}"
        );
    }
    assert_eq!(replica.last(), at(1, 2));
}

// If this failed, a large transaction with a missing part could be acked.
#[test]
fn parts_follow_each_other_and_a_new_first_part_begins_afresh() {
    let mut replica = holding(1);
    let mut part = |index, last| {
        append_part(
            &mut replica,
            (1, 0, 0),
            at(1, 1),
            header(at(1, 2), index, last),
        )
        .unwrap()
    };
    assert_eq!(part(1, false), gap(at(1, 1)));
    assert_eq!(part(0, false), write());
    assert_eq!(part(2, true), gap(at(1, 1)));
    assert_eq!(part(1, false), write());
    assert_eq!(part(0, false), write());
    assert_eq!(part(2, true), gap(at(1, 1)));
    assert_eq!(part(1, true), write());
    assert_eq!(part(1, true), AppendVerdict::Duplicate);
    replica.handle_part_persisted(at(1, 2), Epoch::new(1), false);
    assert_eq!(
        replica.flush_lsn(),
        Lsn::new(1),
        "only a complete entry counts"
    );
    replica.handle_part_persisted(at(1, 2), Epoch::new(1), true);
    assert_eq!(acked(&mut replica), Some((1, 2)));
}

// If this failed, a divergent tail would be acked as if it were the new primary's log: commits
// would be told that no quorum holds.
#[test]
fn a_tail_of_an_older_epoch_is_not_acked_before_it_is_compared() {
    let mut replica = holding(5);
    let promise = promise(&mut replica, 3);
    assert_eq!(promise.last, at(1, 5));
    assert_eq!(
        append(&mut replica, (3, 2, 0), at(1, 1), at(1, 2)),
        AppendVerdict::Duplicate
    );
    assert_eq!(acked(&mut replica), Some((3, 2)), "not 5");
    replica.handle_progress(Epoch::new(3), Lsn::new(4), Lsn::ZERO);
    assert_eq!(
        replica.commit_lsn(),
        Lsn::new(2),
        "entry 4 of the primary is another one"
    );
    replica.handle_progress(Epoch::new(9), Lsn::new(2), Lsn::new(2));
    assert_eq!(replica.archive_lsn(), Lsn::ZERO, "not the primary's epoch");
    assert_eq!(
        append(&mut replica, (3, 2, 0), at(1, 2), at(2, 3)),
        cut(at(1, 2))
    );
    assert_eq!(
        (replica.last(), replica.flush_lsn()),
        (at(2, 3), Lsn::new(2))
    );
    replica.handle_part_persisted(at(2, 3), Epoch::new(3), true);
    assert_eq!(acked(&mut replica), Some((3, 3)));
    assert_eq!(replica.commit_lsn(), Lsn::new(3));
}

// If this failed, an entry that was cut, or came again after a cut, would count as synced.
#[test]
fn a_late_notice_of_a_cut_entry_does_not_count() {
    let mut replica = holding(2);
    assert_eq!(append(&mut replica, (1, 0, 0), at(1, 2), at(1, 3)), write());
    promise(&mut replica, 3);
    assert_eq!(
        append(&mut replica, (3, 0, 0), at(1, 2), at(2, 3)),
        cut(at(1, 2))
    );
    replica.handle_part_persisted(at(1, 3), Epoch::new(1), true);
    assert_eq!(replica.flush_lsn(), Lsn::new(2), "cut");
    promise(&mut replica, 4);
    assert_eq!(
        append(&mut replica, (4, 0, 0), at(1, 2), at(1, 3)),
        cut(at(1, 2))
    );
    replica.handle_part_persisted(at(1, 3), Epoch::new(1), true);
    assert_eq!(replica.flush_lsn(), Lsn::new(2), "the first writing of it");
    replica.handle_part_persisted(at(1, 3), Epoch::new(4), true);
    assert_eq!(replica.flush_lsn(), Lsn::new(3));
}

// If this failed, a committed entry could be cut from a disk that told it was committed.
#[test]
fn what_is_committed_is_never_cut() {
    let mut replica = holding(3);
    replica.handle_progress(Epoch::new(1), Lsn::new(2), Lsn::ZERO);
    assert_eq!(replica.commit_lsn(), Lsn::new(2));
    promise(&mut replica, 3);
    for (heard, previous, position) in [
        ((3, 2, 0), at(1, 1), at(2, 2)),
        ((3, 2, 2), at(2, 2), at(3, 3)),
    ] {
        let before = format!("{replica:?}");
        let part = header(position, 0, true);
        let result = append_part(&mut replica, heard, previous, part);
        assert!(result.is_err(), "{position}: {result:?}");
        assert_eq!(before, format!("{replica:?}"), "nothing was changed");
    }
}

// If this failed, a replica that was away for long could never come back, or would lose entries
// that are not in the archive.
#[test]
fn a_replica_jumps_forward_only_to_what_is_archived() {
    let mut replica = holding(3);
    promise(&mut replica, 4);
    assert_eq!(
        append(&mut replica, (4, 60, 59), at(2, 60), at(2, 61)),
        gap(at(1, 3))
    );
    assert_eq!(
        append(&mut replica, (4, 60, 60), at(2, 60), at(2, 61)),
        restart(at(2, 60))
    );
    assert_eq!(replica.commit_lsn(), Lsn::new(60));
    assert!(
        replica
            .check_fetch(Epoch::new(4), Lsn::new(60), Lsn::new(60))
            .is_err()
    );
    replica.handle_part_persisted(at(2, 61), Epoch::new(4), true);
    assert_eq!(acked(&mut replica), Some((4, 61)));
    assert!(
        replica
            .check_fetch(Epoch::new(4), Lsn::new(61), Lsn::new(61))
            .is_ok()
    );
    // The journal has it, but what it heard was not persisted.
    let persisted = ReplicaState {
        promised: Epoch::new(4),
        claimant: Some(claimant(4)),
        last: at(2, 61),
        first_lsn: Lsn::new(61),
        history: replica.history().runs().to_vec(),
        ..ReplicaState::unheard_of(replica_id())
    };
    let replica = Replica::new(database(), persisted);
    assert_eq!(
        (replica.commit_lsn(), replica.archive_lsn()),
        (Lsn::new(60), Lsn::new(60))
    );
}

// If this failed, a recovering primary could read a log that another one is still changing.
#[test]
fn entries_are_read_only_for_the_promised_epoch_and_only_what_is_synced() {
    let mut replica = holding(3);
    append(&mut replica, (1, 0, 0), at(1, 3), at(1, 4));
    let fetch = |epoch, first, last| {
        replica
            .check_fetch(Epoch::new(epoch), Lsn::new(first), Lsn::new(last))
            .is_ok()
    };
    assert!(fetch(1, 1, 3));
    for (epoch, first, last) in [(0, 1, 3), (2, 1, 3), (1, 1, 4), (1, 3, 2), (1, 0, 2)] {
        assert!(!fetch(epoch, first, last), "{epoch} {first} {last}");
    }
}

// If this failed, a replica with a full disk would go on acking.
#[test]
fn a_replica_in_trouble_takes_and_promises_nothing() {
    let mut replica = holding(1);
    assert_eq!(append(&mut replica, (1, 0, 0), at(1, 1), at(1, 2)), write());
    replica.handle_trouble("full".to_owned());
    replica.handle_part_persisted(at(1, 2), Epoch::new(1), true);
    replica.handle_claim(&host("q"), &claim(5, 5));
    let reason = RejectReason::Storage {
        message: "full".to_owned(),
    };
    let messages = sent(&mut replica);
    assert_eq!(messages.len(), 2, "{messages:?}");
    for message in messages {
        assert!(
            matches!(message, ReplicaMessage::Rejected { reason: ref got, .. } if *got == reason)
        );
    }
    let verdict = append(&mut replica, (1, 0, 0), at(1, 2), at(1, 3));
    assert_eq!(verdict, AppendVerdict::Reject(reason));
}

// If this failed, acks would go to nobody, and the primary would wait for them.
#[test]
fn after_a_restart_no_entry_is_taken_before_a_claim() {
    let persisted = ReplicaState {
        promised: Epoch::new(1),
        claimant: Some(claimant(1)),
        ..ReplicaState::unheard_of(replica_id())
    };
    let mut replica = Replica::new(database(), persisted);
    assert_eq!(
        append(&mut replica, (1, 0, 0), LogPosition::ZERO, at(1, 1)),
        fenced(1)
    );
    replica.handle_claim(&host("p"), &claim(1, 1));
    replica.handle_members(membership(1, 1)).unwrap();
    assert_eq!(
        append(&mut replica, (1, 0, 0), LogPosition::ZERO, at(1, 1)),
        write()
    );
}

// If this failed, a promise could become too long to send, after thousands of takeovers.
#[test]
fn a_full_history_takes_no_further_epoch_until_the_archive_moves() {
    let limit = durovfs_wire::peer::MAX_HISTORY_RUNS as u64;
    let history = (1..=limit)
        .map(|n| EpochRun {
            epoch: Epoch::new(n as u32),
            first_lsn: Lsn::new(n),
        })
        .collect();
    let last = at(limit as u32, limit);
    let persisted = ReplicaState {
        promised: last.epoch,
        last,
        first_lsn: Lsn::new(1),
        history,
        ..ReplicaState::unheard_of(replica_id())
    };
    let mut replica = Replica::new(database(), persisted);
    let epoch = limit as u32 + 1;
    promise(&mut replica, epoch);
    let refused = append(&mut replica, (epoch, 5, 5), last, at(epoch, limit + 1));
    assert!(
        matches!(refused, AppendVerdict::Reject(RejectReason::Storage { .. })),
        "{refused:?}"
    );
    append(&mut replica, (epoch, 5, 5), at(4, 4), at(5, 5));
    assert_eq!(
        append(&mut replica, (epoch, 5, 5), last, at(epoch, limit + 1)),
        write()
    );
}

// If this failed, a recovering primary would count on entries that a power cut takes away.
#[test]
fn a_promise_tells_only_what_is_synced() {
    let mut replica = holding(2);
    assert_eq!(append(&mut replica, (1, 0, 0), at(1, 2), at(1, 3)), write());
    replica.handle_claim(&host("p"), &claim(1, 1));
    let [ReplicaMessage::Promised(repeated)] = &sent(&mut replica)[..] else {
        panic!()
    };
    assert_eq!(repeated.last, at(1, 2));
    replica.handle_part_persisted(at(1, 3), Epoch::new(1), true);
    assert_eq!(acked(&mut replica), Some((1, 3)));
}

/// A replica of epoch 1 with entries through lsn 3, as its journal has it after damage.
fn damaged() -> Replica {
    let persisted = ReplicaState {
        promised: Epoch::new(1),
        claimant: Some(claimant(1)),
        last: at(1, 3),
        first_lsn: Lsn::new(1),
        history: vec![EpochRun {
            epoch: Epoch::new(1),
            first_lsn: Lsn::new(1),
        }],
        mending: true,
        ..ReplicaState::unheard_of(replica_id())
    };
    Replica::new(database(), persisted)
}

// If this failed, an entry that only damaged disks and one other had acked could be voted away.
#[test]
fn a_damaged_log_votes_again_when_it_reaches_what_the_primary_names() {
    let mut replica = damaged();
    replica.handle_mend(Epoch::new(1), Lsn::new(3));
    assert!(replica.is_mending(), "nobody has asked since the start");
    assert!(promise(&mut replica, 2).mending);
    replica.handle_mend(Epoch::new(1), Lsn::new(3));
    replica.handle_mend(Epoch::new(2), Lsn::new(5));
    for lsn in 4..=5 {
        assert!(replica.is_mending(), "before lsn {lsn}");
        let before = at(if lsn == 4 { 1 } else { 2 }, lsn - 1);
        assert_eq!(append(&mut replica, (2, 0, 0), before, at(2, lsn)), write());
        replica.handle_part_persisted(at(2, lsn), Epoch::new(2), true);
    }
    assert!(!replica.is_mending());
    assert!(effects(&mut replica).contains(&ReplicaEffect::PersistMended));
    assert!(!promise(&mut replica, 3).mending);
}

// If this failed, what a primary named before it forgot the lost acks would end the mending.
#[test]
fn a_new_promise_forgets_how_far_the_last_primary_wanted_it_to_reach() {
    let mut replica = damaged();
    promise(&mut replica, 2);
    replica.handle_mend(Epoch::new(2), Lsn::new(4));
    assert!(promise(&mut replica, 3).mending);
    assert_eq!(append(&mut replica, (3, 0, 0), at(1, 3), at(3, 4)), write());
    replica.handle_part_persisted(at(3, 4), Epoch::new(3), true);
    assert!(replica.is_mending());
}
