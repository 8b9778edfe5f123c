//! A program that calls `sqlite3_shutdown`, and loads the extension again.

use durovfs_tests::app::plain_query;
use durovfs_tests::binaries::{PYTHON, binaries, program};
use durovfs_tests::cluster::{Cluster, ClusterOptions, text};
use std::process::Command;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(60);

#[test]
fn a_host_that_was_shut_down_loads_again() {
    // Broken: its databases would be written past durovfs from then on, or the load would fail.
    let cluster = Cluster::start(ClusterOptions::default());
    let database = cluster.scratch().join("shutdown.db");
    let output = Command::new(PYTHON)
        .arg(program("shutdown_host.py"))
        .arg(&binaries().extension)
        .arg(&database)
        .env("DUROVFS_CONFIG", cluster.client_config())
        .output()
        .expect("run python3");
    let said = text(&output.stdout) + &text(&output.stderr);
    assert!(output.status.success(), "{said}");
    cluster.wait_archived(&database, LIMIT);
    let restored = cluster.scratch().join("restored.db");
    cluster.restore(&database, None, &restored);
    assert_eq!(plain_query(&restored, "SELECT count(*) FROM t"), ["3"]);
}
