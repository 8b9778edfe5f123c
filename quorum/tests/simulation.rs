//! The log under crashes, cut links and competing primaries, seed after seed.
//!
//! `DUROVFS_SEED=N` runs that one seed, `DUROVFS_SEED_COUNT=N` the first N. Every failure prints
//! its seed.

// Helpers outside of test functions may panic as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use world::{Fault, Tally, World};

const SEED_COUNT: u64 = 600;
const STEP_COUNT: usize = 3000;

fn seeds() -> std::ops::Range<u64> {
    match std::env::var("DUROVFS_SEED") {
        Ok(text) => {
            let seed = text.parse().expect("DUROVFS_SEED is a number");
            seed..seed + 1
        }
        Err(_) => match std::env::var("DUROVFS_SEED_COUNT") {
            Ok(text) => 0..text.parse().expect("DUROVFS_SEED_COUNT is a number"),
            Err(_) => 0..SEED_COUNT,
        },
    }
}

fn run(seed: u64, fault: Fault) -> Result<Tally, String> {
    play(seed, fault, |world| world.run(STEP_COUNT))
}

fn play(seed: u64, fault: Fault, schedule: impl Fn(&mut World)) -> Result<Tally, String> {
    let result = catch_unwind(AssertUnwindSafe(|| {
        let mut world = World::new(seed, fault);
        schedule(&mut world);
        world.tally
    }));
    result.map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
            .unwrap_or_default()
    })
}

// If this failed, an acknowledged commit could be lost, or a refused one come to life.
#[test]
fn no_schedule_loses_a_commit_or_revives_a_buried_one() {
    let mut sum = Tally::default();
    for seed in seeds() {
        let tally = match run(seed, Fault::None) {
            Ok(tally) => tally,
            Err(panic) => panic!("DUROVFS_SEED={seed}: {panic}"),
        };
        sum.committed += tally.committed;
        sum.opened += tally.opened;
        sum.buried += tally.buried;
        sum.bury_refused += tally.bury_refused;
        sum.fenced += tally.fenced;
        sum.fetched += tally.fetched;
        sum.fetch_failed += tally.fetch_failed;
        sum.truncated += tally.truncated;
        sum.replica_restarts += tally.replica_restarts;
        sum.own_restarts += tally.own_restarts;
        sum.crashes += tally.crashes;
        sum.trouble += tally.trouble;
        sum.damaged += tally.damaged;
        sum.mended += tally.mended;
        sum.wiped += tally.wiped;
        sum.changes_begun += tally.changes_begun;
        sum.changes_done += tally.changes_done;
        sum.old_configs += tally.old_configs;
    }
    eprintln!("{sum:?}");
    if seeds().count() > 1 {
        // A rule that no schedule reaches is not tested by any.
        for (what, count) in [
            ("commits", sum.committed),
            ("elections", sum.opened),
            ("burials", sum.buried),
            ("refused burials", sum.bury_refused),
            ("fenced primaries", sum.fenced),
            ("fetches", sum.fetched),
            ("failed fetches", sum.fetch_failed),
            ("cut tails", sum.truncated),
            (
                "replicas that went on from the archive",
                sum.replica_restarts,
            ),
            ("primaries that went on from the archive", sum.own_restarts),
            ("crashes", sum.crashes),
            ("disks in trouble", sum.trouble),
            ("damaged logs", sum.damaged),
            ("mended logs", sum.mended),
            ("lost disks", sum.wiped),
            ("steps of a replacement", sum.changes_begun),
            ("replacements", sum.changes_done),
            ("hosts with the first configuration", sum.old_configs),
        ] {
            assert!(count >= 20, "only {count} {what} in all seeds: {sum:?}");
        }
    }
}

// If this failed, a failure found by a seed could not be looked at again.
#[test]
fn a_seed_gives_the_same_run_twice() {
    assert_eq!(run(42, Fault::None), run(42, Fault::None));
    assert_ne!(run(42, Fault::None), run(43, Fault::None));
}

/// What the checker says of a commit that is lost, made twice or undone. Another panic does not
/// count: it need not be the fault's.
const BROKEN_PROMISES: [&str; 4] = [
    "is lost",
    "two entries committed",
    "has another entry",
    "was committed",
];

/// Finds the first seed in which the fault breaks what the log promises.
fn assert_caught(fault: Fault, within: u64) {
    assert_says(fault, within, &BROKEN_PROMISES);
}

fn assert_says(fault: Fault, within: u64, expected: &[&str]) {
    let is_promise = |panic: &String| expected.iter().any(|said| panic.contains(said));
    let caught = (0..within).find_map(|seed| {
        let panic = run(seed, fault).err().filter(is_promise);
        panic.map(|panic| (seed, panic))
    });
    match caught {
        Some((seed, panic)) => eprintln!("{fault:?} caught by seed {seed}: {panic}"),
        None => panic!("{fault:?} was not seen in {within} seeds"),
    }
}

/// A schedule by hand holds as it is, and not with the fault.
fn assert_only_fault_breaks(fault: Fault, schedule: impl Fn(&mut World)) {
    for seed in 0..20 {
        let clean = play(seed, Fault::None, &schedule);
        assert_eq!(clean.err(), None, "DUROVFS_SEED={seed}, without the fault");
        let panic = play(seed, fault, &schedule).expect_err("the fault is not seen");
        eprintln!("{fault:?} caught in schedule {seed}: {panic}");
    }
}

// If one of these failed, the simulation would let the product lose commits in just that way.
#[test]
fn a_quorum_of_two_is_caught() {
    assert_caught(Fault::QuorumOfTwo, 50);
}

#[test]
fn counting_entries_of_older_epochs_is_caught() {
    assert_only_fault_breaks(
        Fault::CountOldEpochs,
        World::hold_an_older_entry_on_three_disks,
    );
}

#[test]
fn a_promise_that_is_not_persisted_is_caught() {
    // By the replica itself, when it starts with entries of an epoch that it has not promised: it
    // stops before anything is lost, in this world and in every schedule of the model.
    assert_says(Fault::PromiseNotPersisted, 200, &["above promised epoch"]);
}

#[test]
fn a_divergent_tail_that_stays_is_caught() {
    assert_caught(Fault::NoTruncation, 50);
}

#[test]
fn a_burial_without_its_condition_is_caught() {
    assert_only_fault_breaks(
        Fault::BuryUnconditionally,
        World::bury_what_a_successor_committed,
    );
}

#[test]
fn a_lost_disk_that_votes_as_before_is_caught() {
    assert_caught(Fault::AnyIdentity, 1500);
}

#[test]
fn an_ack_before_the_sync_is_caught() {
    assert_caught(Fault::AckBeforeSync, 50);
}

#[test]
fn a_damaged_replica_that_votes_is_caught() {
    assert_caught(Fault::DamagedVotes, 100);
}

#[test]
fn a_damaged_replica_that_votes_too_early_is_caught() {
    assert_caught(Fault::WholeTooEarly, 600);
}
