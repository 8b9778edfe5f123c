//! Golden plans: what is downloaded for which listing and moment, readable at a glance.

use super::plan::{PlanError, plan};
use crate::layout::{ChunkRange, SnapshotPoint};
use crate::listing::{ChunkObject, Listing, SnapshotObject};
use crate::testing::identity;
use crate::when::When;
use durovfs_wire::{Bookmark, Epoch, Lsn, Timestamp};

const EPOCH: Epoch = Epoch::new(1);

/// Entry `n` was committed at `n` seconds. Each object is one byte large.
fn listing(chunks: &[(u64, u64)], snapshots: &[u64]) -> Listing {
    let time = |lsn: u64| Timestamp::from_micros(lsn as i64 * 1_000_000);
    let chunk = |&(first, last): &(u64, u64)| ChunkObject {
        range: ChunkRange {
            first_lsn: Lsn::new(first),
            last_lsn: Lsn::new(last),
            last_epoch: EPOCH,
            last_time: time(last),
        },
        key: format!("{first}-{last}"),
        size: 1,
    };
    let snapshot = |&lsn: &u64| SnapshotObject {
        point: SnapshotPoint {
            lsn: Lsn::new(lsn),
            epoch: EPOCH,
            time: time(lsn),
        },
        key: format!("s{lsn}"),
        size: 1,
    };
    let mut chunks: Vec<_> = chunks.iter().map(chunk).collect();
    chunks.sort_by_key(|chunk| chunk.range);
    Listing {
        name: identity().name,
        database: identity().database,
        chunks,
        snapshots: snapshots.iter().map(snapshot).collect(),
    }
}

/// The plan as the keys of its objects, or what stands against it.
fn planned(chunks: &[(u64, u64)], snapshots: &[u64], target: When) -> String {
    match plan(&listing(chunks, snapshots), target) {
        Ok(plan) => {
            let snapshot = plan.snapshot.iter().map(|snapshot| snapshot.key.clone());
            let chunks = plan.chunks.iter().map(|chunk| chunk.key.clone());
            let keys: Vec<_> = snapshot.chain(chunks).collect();
            assert_eq!(plan.download_bytes, keys.len() as u64);
            keys.join(" ")
        }
        Err(PlanError::BeforeFirst) => "before the first".into(),
        Err(PlanError::BeyondEnd { last }) => format!("ends at {last}"),
        Err(PlanError::Gap { first, last }) => format!("lacks {first} to {last}"),
    }
}

fn lsn(number: u64) -> When {
    When::Lsn(Lsn::new(number))
}

fn seconds(seconds: f64) -> When {
    When::Time(Timestamp::from_micros((seconds * 1e6) as i64))
}

const CHAIN: &[(u64, u64)] = &[(1, 4), (5, 9), (10, 20)];

// Broken: a restore would download too much, stop too early, or start from a later snapshot.
#[test]
fn a_plan_has_what_leads_to_the_target_and_no_more() {
    let cases = [
        (When::Latest, &[][..], "1-4 5-9 10-20"),
        (When::Latest, &[3, 9], "s9 10-20"),
        (When::Latest, &[20], "s20"),
        (lsn(20), &[], "1-4 5-9 10-20"),
        (lsn(9), &[], "1-4 5-9"),
        (lsn(9), &[9], "s9"),
        (lsn(8), &[3, 9], "s3 1-4 5-9"),
        (lsn(4), &[4], "s4"),
        (lsn(1), &[], "1-4"),
        (lsn(0), &[], "before the first"),
        (lsn(21), &[], "ends at 20"),
        (lsn(21), &[20], "ends at 20"),
        (seconds(9.0), &[], "1-4 5-9 10-20"),
        (seconds(8.9), &[], "1-4 5-9"),
        (seconds(9.0), &[9], "s9 10-20"),
        (seconds(8.9), &[9], "1-4 5-9"),
        (seconds(999.0), &[9], "s9 10-20"),
        (seconds(0.5), &[], "1-4"),
    ];
    for (target, snapshots, expected) in cases {
        assert_eq!(
            planned(CHAIN, snapshots, target),
            expected,
            "{target:?} {snapshots:?}"
        );
    }
    let bookmark = Bookmark {
        lsn: Lsn::new(9),
        epoch: EPOCH,
    };
    assert_eq!(planned(CHAIN, &[], When::Bookmark(bookmark)), "1-4 5-9");
    assert_eq!(planned(&[], &[], When::Latest), "before the first");
    assert_eq!(planned(&[], &[7], When::Latest), "s7");
}

// Broken: a hole in the history would be jumped over, and the result be of no moment at all.
#[test]
fn a_gap_before_the_target_is_refused_and_one_behind_it_does_not_matter() {
    let holed = &[(1, 4), (10, 20)];
    assert_eq!(planned(holed, &[], When::Latest), "lacks 5 to 9");
    assert_eq!(planned(holed, &[], lsn(5)), "lacks 5 to 9");
    assert_eq!(planned(holed, &[], lsn(4)), "1-4");
    assert_eq!(planned(holed, &[9], When::Latest), "s9 10-20");
    assert_eq!(planned(holed, &[9], lsn(8)), "lacks 5 to 9");
    assert_eq!(planned(holed, &[], seconds(3.0)), "1-4");
    // The commit of that second may be among the missing ones.
    assert_eq!(planned(holed, &[], seconds(4.0)), "lacks 5 to 9");
    assert_eq!(planned(&[(1, 4)], &[9], lsn(5)), "lacks 5 to 9");
}

// Broken: two writers of one range would make the database unrestorable.
#[test]
fn overlapping_chunks_are_covered_by_the_longest() {
    let overlapping = &[(1, 4), (1, 9), (3, 6), (5, 9), (8, 20), (10, 12), (10, 20)];
    assert_eq!(planned(overlapping, &[], When::Latest), "1-9 8-20");
    assert_eq!(planned(overlapping, &[4], When::Latest), "s4 1-9 8-20");
    assert_eq!(
        planned(&[(1, 4), (3, 6), (5, 9)], &[], When::Latest),
        "1-4 5-9"
    );
    assert_eq!(
        planned(&[(1, 4), (3, 6), (7, 9)], &[], When::Latest),
        "1-4 3-6 7-9"
    );
}

// Broken: replicas would drop entries that the archive does not have.
#[test]
fn what_is_archived_ends_at_the_first_gap() {
    let archived = |chunks, snapshots| listing(chunks, snapshots).archived_lsn().get();
    assert_eq!(archived(CHAIN, &[]), 20);
    assert_eq!(archived(&[(1, 4), (6, 9)], &[]), 4);
    assert_eq!(archived(&[(1, 4), (6, 9)], &[5]), 9);
    assert_eq!(archived(&[(1, 9), (4, 6)], &[5]), 9);
    assert_eq!(archived(&[], &[5]), 5);
    assert_eq!(archived(&[], &[]), 0);
}
