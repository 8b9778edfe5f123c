//! `durovfs dev` and `durovfs status` as the interface page describes them.

use durovfs_tests::app::App;
use durovfs_tests::cluster::{Cluster, ClusterOptions, text};
use serde_json::Value;
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(30);

fn small() -> ClusterOptions {
    ClusterOptions {
        replicas: 3,
        ..ClusterOptions::default()
    }
}

#[test]
fn a_cluster_lays_out_its_directory_and_goes_on_with_its_data() {
    // Broken: scripts would not find the nodes, or a restart would begin with nothing.
    let mut cluster = Cluster::start(small());
    for node in ["primary", "replica-1", "replica-3"] {
        for file in ["sidecar.toml", "sidecar.pid", "sidecar.log", "data"] {
            assert!(cluster.node_path(node).join(file).exists(), "{node}/{file}");
        }
    }
    assert!(cluster.archive().is_dir());
    let database = cluster.scratch().join("app.db");
    let mut app = App::open(&cluster, &database);
    app.run("PRAGMA journal_mode=WAL");
    app.run("CREATE TABLE t (x)");
    app.run("INSERT INTO t VALUES (1)");
    app.close();
    let before = cluster.database(&database).unwrap();
    cluster.stop();
    cluster.start_again();
    let mut app = App::open(&cluster, &database);
    assert_eq!(app.value("SELECT count(*) FROM t"), 1);
    app.run("INSERT INTO t VALUES (2)");
    app.close();
    let after = cluster.database(&database).unwrap();
    assert_eq!(after["database"], before["database"]);
    assert!(
        after["lsn"].as_u64() > before["lsn"].as_u64(),
        "{before} {after}"
    );
    cluster.stop();
    for node in ["primary", "replica-1", "replica-3"] {
        assert!(
            !cluster.node_path(node).join("sidecar.pid").exists(),
            "{node} still has a pid"
        );
    }
}

#[test]
fn no_node_outlives_a_killed_dev_but_those_started_alone() {
    // Broken: each crash of the development cluster would leave six processes behind, which hold
    // the ports and journals that the next start needs.
    let mut cluster = Cluster::start(small());
    cluster.kill("replica-1");
    cluster.start_node("replica-1");
    let pid = |node: &str| cluster.pid(node).as_raw_nonzero().get();
    let (alone, child, primary) = (pid("replica-1"), pid("replica-2"), pid("primary"));
    cluster.kill_dev();
    let deadline = Instant::now() + LIMIT;
    while cluster.runs(child) || cluster.runs(primary) {
        assert!(Instant::now() < deadline, "a node outlived its cluster");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(
        cluster.runs(alone),
        "the node that was started alone is gone"
    );
    // The next start takes it over, and its end is the end of all.
    cluster.start_again();
    cluster.stop();
    assert!(!cluster.runs(alone));
}

#[test]
fn misuse_of_dev_is_told_in_one_line() {
    // Broken: a second cluster on the same directory would write the first one's journals.
    let cluster = Cluster::start(small());
    let directory = cluster.path().to_string_lossy().into_owned();
    let cases: [(&[&str], i32, &str); 5] = [
        (&["--dir", &directory], 1, "another `durovfs dev` runs"),
        (
            &["--dir", &directory, "--start", "replica-1"],
            1,
            "runs already",
        ),
        (
            &["--dir", &directory, "--start", "replica-9"],
            2,
            "has no node replica-9",
        ),
        (&["--dir", &directory, "--replicas", "0"], 2, "0"),
        (&["--dir", &directory, "--archive", "ftp://x"], 2, "s3://"),
    ];
    for (args, status, words) in cases {
        let output = cluster.durovfs(&[&["dev"], args].concat());
        let errors = text(&output.stderr);
        assert_eq!(output.status.code(), Some(status), "{errors}");
        assert!(errors.contains(words), "{words} is not in: {errors}");
    }
}

#[test]
fn status_lists_nodes_and_databases() {
    // Broken: the first question of every operator would go unanswered.
    let cluster = Cluster::start(small());
    let database = cluster.scratch().join("app.db");
    let mut app = App::open(&cluster, &database);
    app.run("PRAGMA journal_mode=WAL");
    app.run("CREATE TABLE t (x)");
    let output = cluster.durovfs(&["status", "--json"]);
    let state: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(state["node"], "primary");
    assert_eq!(
        state["databases"][0]["name"],
        database.to_string_lossy().as_ref()
    );
    assert_eq!(state["databases"][0]["role"], "primary");
    assert_eq!(state["peers"].as_array().unwrap().len(), 3, "{state}");
    let output = cluster.durovfs(&["status"]);
    let shown = text(&output.stdout);
    assert!(output.status.success() && shown.contains("app.db") && shown.contains("replica-3"));
    app.close();
}
