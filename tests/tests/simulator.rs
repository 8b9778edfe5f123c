//! The whole cluster in simulation, a few seeds of it: this build is slow. `sim --check` does the
//! same with thousands (`durovfs_tests::simulation::suites`).
//!
//! `DUROVFS_SEED=N` runs that one seed. Every failure prints its seed and how to look at it.

use durovfs_tests::simulation::{Mutation, Tooth, suites};

/// Seeds of one run.
const SEED_COUNT: u64 = 6;
/// Of the power cuts, one in so many.
const POWER_CUT_STEP: usize = 100;

// If this failed, some schedule of crashes, cuts and takeovers would lose an acknowledged commit,
// bring a refused one to life, show an application another image, or leave the cluster stuck.
#[test]
fn no_seed_breaks_a_promise() {
    let seeds = match std::env::var("DUROVFS_SEED") {
        Ok(text) => {
            let seed: u64 = text.parse().expect("DUROVFS_SEED is a number");
            seed..seed + 1
        }
        Err(_) => 0..SEED_COUNT,
    };
    println!("{:?}", suites::seeds_hold(seeds).unwrap());
}

// If this failed, a failure found by a seed could not be looked at again.
#[test]
fn the_same_seed_gives_the_same_run() {
    suites::is_deterministic(42).unwrap();
}

// If this failed, the simulation would see nothing at all.
#[test]
fn an_ack_before_the_sync_is_caught() {
    let is_first = |tooth: &&Tooth| tooth.mutation == Mutation::AckBeforeSync;
    let tooth = Tooth::ALL.iter().find(is_first).unwrap();
    suites::is_caught(tooth).unwrap();
}

// If this failed, there would be a sync at which a power cut loses an acknowledged commit, or
// leaves a journal that cannot be read.
#[test]
fn a_power_cut_at_a_sync_loses_nothing() {
    let count = suites::power_cuts_lose_nothing(POWER_CUT_STEP).unwrap();
    assert!(count > 10, "only {count} power cuts");
}
