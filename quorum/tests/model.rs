//! Every schedule of a small world: stateright visits all states that the real state machines can
//! get into, within bounds on how often each thing happens.
//!
//! `scripts/model` runs larger ones, or one of a given size, and prints the counts. What burials
//! and counting acks of older epochs would break needs longer schedules than these: see
//! `world/scenario.rs`.

// Helpers outside of test functions may panic as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used)]
#![allow(dead_code, reason = "the world is the simulation's, too")]

mod world;

use stateright::{Checker, HasDiscoveries, Model};
use world::Fault;
use world::model::{Bounds, NO_OTHER, NOTHING_LOST};

/// The first host commits, and the second takes over, at any moment.
const SMALL: Bounds = Bounds {
    replicas: 3,
    ack_quorum: 2,
    begun: true,
    claims: [0, 1],
    entries: 1,
    burials: 0,
    crashes: 0,
    cuts: 0,
    replacements: 0,
    syncs_at_once: true,
    delivers_all: true,
    exchanges_at_once: false,
    fault: Fault::None,
};

/// The takeover alone, with as many replicas as the product has.
const FIVE: Bounds = Bounds {
    replicas: 5,
    ack_quorum: 3,
    entries: 0,
    ..SMALL
};

/// A replica is replaced in two steps, and the second host claims at any moment.
const CHANGE: Bounds = Bounds {
    entries: 0,
    replacements: 1,
    exchanges_at_once: true,
    ..SMALL
};

/// `DUROVFS_MODEL`, one number for each bound, in their order; of the last three, the first two are
/// 1 for more states, the third is 1 for fewer.
fn given() -> Option<Bounds> {
    let text = std::env::var("DUROVFS_MODEL").ok()?;
    let numbers: Vec<u8> = text
        .split(',')
        .map(|number| number.parse().expect("DUROVFS_MODEL is numbers and commas"))
        .collect();
    let [
        replicas,
        begun,
        first,
        second,
        entries,
        burials,
        crashes,
        cuts,
        replacements,
        syncs,
        delivers,
        exchanges,
    ] = numbers[..]
    else {
        panic!("DUROVFS_MODEL has {} numbers, not twelve", numbers.len());
    };
    Some(Bounds {
        replicas: replicas.into(),
        ack_quorum: usize::from(replicas) / 2 + 1,
        begun: begun == 1,
        claims: [first, second],
        entries,
        burials,
        crashes,
        cuts,
        replacements,
        syncs_at_once: syncs == 0,
        delivers_all: delivers == 0,
        exchanges_at_once: exchanges == 1,
        fault: Fault::None,
    })
}

fn visit(bounds: Bounds, ends: HasDiscoveries) -> impl Checker<Bounds> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let checker = bounds.checker().finish_when(ends);
    let checker = checker.threads(threads).spawn_bfs().join();
    println!(
        "{bounds:?}: {} states, {} of them different, {} steps",
        checker.state_count(),
        checker.unique_state_count(),
        checker.max_depth()
    );
    checker
}

// If this failed, there would be a schedule in which an acknowledged commit is lost, or a refused
// one comes to life.
#[test]
fn no_schedule_breaks_a_promise() {
    let sizes = match given() {
        Some(bounds) => vec![bounds],
        None => vec![SMALL, FIVE, CHANGE],
    };
    for bounds in sizes {
        visit(bounds, HasDiscoveries::AllFailures).assert_properties();
    }
}

/// A mistake is found, by the property that it breaks.
fn assert_found(bounds: Bounds, property: &'static str) {
    let checker = visit(bounds, HasDiscoveries::AnyOf([property].into()));
    let found = checker.discoveries();
    let path = found.get(property);
    let others: Vec<_> = found
        .iter()
        .map(|(name, path)| (name, path.last_state()))
        .collect();
    let path = path.unwrap_or_else(|| panic!("{:?} is not found: {others:?}", bounds.fault));
    println!(
        "{:?} is found: {:?} by {:?}",
        bounds.fault,
        path.last_state(),
        path.clone().into_actions()
    );
}

// If one of these failed, the model would not see the product make just that mistake.
#[test]
fn one_ack_of_three_is_found() {
    let bounds = Bounds {
        ack_quorum: 1,
        begun: false,
        claims: [1, 1],
        fault: Fault::QuorumOfTwo,
        ..SMALL
    };
    assert_found(bounds, NOTHING_LOST);
}

#[test]
fn a_promise_that_is_not_persisted_is_found() {
    let bounds = Bounds {
        crashes: 1,
        fault: Fault::PromiseNotPersisted,
        ..SMALL
    };
    // The replica that forgot its promise finds entries of a later epoch in its journal, and stops.
    assert_found(bounds, NO_OTHER);
}

#[test]
fn an_ack_before_the_sync_is_found() {
    let bounds = Bounds {
        begun: false,
        claims: [1, 0],
        crashes: 2,
        syncs_at_once: false,
        delivers_all: false,
        fault: Fault::AckBeforeSync,
        ..SMALL
    };
    assert_found(bounds, NOTHING_LOST);
}

#[test]
fn a_divergent_tail_that_stays_is_found() {
    let bounds = Bounds {
        fault: Fault::NoTruncation,
        ..SMALL
    };
    assert_found(bounds, NOTHING_LOST);
}
