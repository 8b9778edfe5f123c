//! The tests of two libraries that many applications use, SQLAlchemy and Django, through durovfs:
//! each test has the same result as on plain SQLite. Of SQLAlchemy's these are the tests of its own
//! SQLite dialect; `scripts/client-suites` also runs the suite that every dialect must pass.

use durovfs_tests::binaries::{binaries, host_file, workspace};
use durovfs_tests::cluster::{Cluster, ClusterOptions, text};
use serde_json::Value;
use std::process::Command;

/// Runs a suite both ways; returns how many transactions the cluster got from it.
fn compare(suite: &str) -> u64 {
    let cluster = Cluster::start(ClusterOptions::default());
    let output = Command::new(host_file("python/bin/python"))
        .arg(workspace().join("tests/hosts/suites/run.py"))
        .args([suite.into(), host_file("suites")])
        .arg(&binaries().extension)
        .arg(cluster.scratch().join(suite))
        .env("DUROVFS_CONFIG", cluster.client_config())
        .output()
        .expect("run python; scripts/prepare installs it");
    let said = format!("{}{}", text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{said}");
    print!("{said}");
    let status = cluster.durovfs(&["status", "--json"]);
    let status: Value = serde_json::from_slice(&status.stdout).expect("status --json prints JSON");
    let databases = status["databases"].as_array().expect("databases");
    let committed = databases
        .iter()
        .filter_map(|database| database["commit_lsn"].as_u64());
    committed.sum()
}

#[test]
fn sqlalchemys_tests_of_its_dialect_have_the_same_results() {
    // Broken: an application on SQLAlchemy sees another SQLite than it was written for.
    let committed = compare("sqlalchemy");
    assert!(
        committed > 100,
        "only {committed} commits went through durovfs"
    );
}

#[test]
fn djangos_tests_of_its_database_layer_have_the_same_results() {
    // Broken: an application on Django sees another SQLite than it was written for.
    let committed = compare("django");
    assert!(
        committed > 100,
        "only {committed} commits went through durovfs"
    );
}
