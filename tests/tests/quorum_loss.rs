//! Two replicas frozen: nothing changes. Three: commits are refused with the right codes, reads go
//! on, and what was refused is nowhere when they are back.

use durovfs_tests::app::{App, NOT_COMMITTED, UNKNOWN};
use durovfs_tests::cluster::{Cluster, ClusterOptions};
use durovfs_tests::image::{assert_same, checksum_of, image_of};
use durovfs_tests::replay::{copy_journals, replay};
use std::path::Path;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(60);
/// What `PRAGMA durovfs_timeout` is set to.
const COMMIT_TIMEOUT: Duration = Duration::from_secs(3);
/// What a COMMIT may take beyond its timeout: a busy machine, no more.
const SLACK: Duration = Duration::from_secs(2);
/// Commits in one measurement of the median.
const SAMPLE: usize = 300;

fn median_commit(app: &mut App, first: usize) -> Duration {
    let mut times: Vec<_> = (first..first + SAMPLE)
        .map(|n| {
            let reply = app.execute(&format!("INSERT INTO t VALUES ({n}, 'kept')"));
            reply.result.expect("commit with a quorum");
            reply.time
        })
        .collect();
    times.sort();
    times[SAMPLE / 2]
}

fn open_with_timeout(cluster: &Cluster, database: &Path) -> App {
    let mut app = App::open(cluster, database);
    app.run("PRAGMA journal_mode=WAL");
    app.run(&format!(
        "PRAGMA durovfs_timeout={}",
        COMMIT_TIMEOUT.as_millis()
    ));
    app.run("CREATE TABLE t (n INTEGER PRIMARY KEY, fate TEXT)");
    app
}

/// Commits with three replicas frozen: unknown at first, then refused for certain, never more than
/// the timeout, and readable all along.
fn refuse_with_three_frozen(app: &mut App, kept: usize) {
    let first = app.execute("INSERT INTO t VALUES (100001, 'refused')");
    let error = first.result.expect_err("a commit without a quorum");
    assert_eq!(error.code, UNKNOWN, "{error:?}");
    assert!(
        first.time <= COMMIT_TIMEOUT + SLACK,
        "COMMIT took {:?}",
        first.time
    );
    assert_eq!(app.value("SELECT count(*) FROM t"), kept);
    for n in 100_002..100_005 {
        let again = app.execute(&format!("INSERT INTO t VALUES ({n}, 'refused')"));
        let error = again.result.expect_err("a commit without a quorum");
        assert_eq!(error.code, NOT_COMMITTED, "{error:?}");
        assert!(
            again.time <= COMMIT_TIMEOUT + SLACK,
            "COMMIT took {:?}",
            again.time
        );
        assert_eq!(app.value("SELECT count(*) FROM t"), kept);
    }
    assert_eq!(app.value("PRAGMA integrity_check"), "ok");
}

#[test]
fn what_is_refused_without_a_quorum_is_nowhere() {
    // Broken: the application would hang without a quorum, be told something that is not so, or
    // find rows later that it was told do not exist.
    let mut cluster = Cluster::start(ClusterOptions::journals_keep_all());
    let database = cluster.scratch().join("app.db");
    let mut app = open_with_timeout(&cluster, &database);
    let all = median_commit(&mut app, 1);
    for node in ["replica-1", "replica-2"] {
        cluster.freeze(node);
    }
    let three = median_commit(&mut app, 1 + SAMPLE);
    println!("median commit: {all:?} with five replicas, {three:?} with three");
    // Fewer acks to handle make it faster, the noise of a shared machine slower.
    assert!(
        three < 2 * all + Duration::from_millis(1),
        "{all:?} -> {three:?}"
    );

    cluster.freeze("replica-3");
    refuse_with_three_frozen(&mut app, 2 * SAMPLE);

    for node in ["replica-1", "replica-2", "replica-3"] {
        cluster.thaw(node);
    }
    cluster.wait_for(&database, "replicas are back", LIMIT, |state| {
        let replicas = state["replicas"].as_array().unwrap();
        let back = |state: &serde_json::Value| state == "streaming" || state == "catching_up";
        replicas
            .iter()
            .filter(|replica| back(&replica["state"]))
            .count()
            >= 3
    });
    app.run("INSERT INTO t VALUES (200000, 'kept')");
    assert_eq!(
        app.value("SELECT count(*) FROM t WHERE fate = 'refused'"),
        0
    );
    assert_eq!(app.value("SELECT count(*) FROM t"), 2 * SAMPLE + 1);
    app.close();
    cluster.wait_level(&database, LIMIT);
    let journals = copy_journals(&cluster);
    cluster.stop();

    // The same pages everywhere, and the refused rows are in none of them.
    let image = image_of(&database, cluster.scratch());
    for (node, journal) in &journals {
        let replayed = replay(journal, &database);
        assert_eq!(replayed.checksum(), checksum_of(&image), "{node}");
        assert_same(node, &replayed.image(), &image);
    }
    let restored = cluster.scratch().join("restored.db");
    cluster.restore(&database, None, &restored);
    assert_same("archive", &std::fs::read(&restored).unwrap(), &image);
}

#[test]
fn a_commit_with_three_replicas_dead_is_refused_before_it_is_sent() {
    // Broken: a quorum that is known to be gone would cost every commit its whole timeout, and an
    // outcome that could have been certain would be unknown.
    let cluster = Cluster::start(ClusterOptions::default());
    let database = cluster.scratch().join("app.db");
    let mut app = open_with_timeout(&cluster, &database);
    app.run("INSERT INTO t VALUES (1, 'kept')");
    for node in ["replica-1", "replica-2", "replica-3"] {
        cluster.kill(node);
    }
    // The links are found dead at the latest by this commit, whose outcome nobody can know.
    let first = app
        .execute("INSERT INTO t VALUES (2, 'refused')")
        .result
        .unwrap_err();
    assert!([UNKNOWN, NOT_COMMITTED].contains(&first.code), "{first:?}");
    let later = app.execute("INSERT INTO t VALUES (3, 'refused')");
    assert_eq!(later.result.unwrap_err().code, NOT_COMMITTED);
    for node in ["replica-1", "replica-2", "replica-3"] {
        cluster.start_node(node);
    }
    cluster.wait_for(&database, "replicas are back", LIMIT, |state| {
        let replicas = state["replicas"].as_array().unwrap();
        replicas
            .iter()
            .filter(|replica| replica["state"] == "streaming")
            .count()
            >= 3
    });
    app.run("INSERT INTO t VALUES (4, 'kept')");
    assert_eq!(
        app.value("SELECT group_concat(n) FROM (SELECT n FROM t ORDER BY n)"),
        "1,4"
    );
    app.close();
}
