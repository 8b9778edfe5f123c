//! A replica that was away while much was committed, and a primary that lost its own log, get all
//! of it in pieces: what a node holds in memory does not grow with what it lacks.

use durovfs_tests::app::App;
use durovfs_tests::cluster::{Cluster, ClusterOptions, forget_peak, peak_resident_bytes};
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(240);
/// Bytes of noise in one commit: several parts.
const ROW_BYTES: u64 = 6 << 20;
const ROWS: u64 = 40;
/// Small commits, too: many entries are held in another way than large ones.
const SMALL_ROWS: u64 = 2000;
/// Of a node that takes or gives the backlog, which is twice as much: 32 MiB that it has taken and
/// not written yet (`UNWRITTEN_LIMIT_BYTES`), 8 MiB for each peer (`OUTBOX_LIMIT_BYTES`), two
/// parts that are read ahead (`PARTS_AHEAD`), a batch of 4 MiB of the journal, QUIC's windows.
const PEAK_MAX: u64 = 120 << 20;

fn pid(cluster: &Cluster, node: &str) -> u32 {
    cluster.pid(node).as_raw_nonzero().get().unsigned_abs()
}

fn assert_bounded(cluster: &Cluster, node: &str, what: &str) {
    let peak = peak_resident_bytes(pid(cluster, node));
    println!("{node}, {what}: {} MiB", peak >> 20);
    assert!(peak < PEAK_MAX, "{node} held {} MiB, {what}", peak >> 20);
}

#[test]
fn a_large_backlog_is_made_up_in_pieces() {
    // Broken: a replica that was away for a day, or a host that begins again, takes its node down
    // by its memory, or its primary's.
    let cluster = Cluster::start(ClusterOptions {
        replicas: 3,
        ..ClusterOptions::journals_keep_all()
    });
    let database = cluster.scratch().join("app.db");
    let mut app = App::open(&cluster, &database);
    app.run("PRAGMA cache_size=-2048");
    app.run("CREATE TABLE t (n INTEGER PRIMARY KEY, x BLOB)");
    cluster.wait_level(&database, LIMIT);
    cluster.kill("replica-3");
    for _ in 0..ROWS {
        app.run(&format!(
            "INSERT INTO t (x) VALUES (randomblob({ROW_BYTES}))"
        ));
    }
    app.run("PRAGMA durovfs_durability=deferred");
    for _ in 0..SMALL_ROWS {
        app.run("INSERT INTO t (x) VALUES (randomblob(100))");
    }
    app.run("SELECT durovfs_wait()");
    app.close();

    for node in ["primary", "replica-1", "replica-2"] {
        forget_peak(pid(&cluster, node));
    }
    cluster.start_node("replica-3");
    cluster.wait_level(&database, LIMIT);
    assert_bounded(&cluster, "replica-3", "fed");
    assert_bounded(&cluster, "primary", "feeding");

    // The primary's own log is gone: it is fetched from a replica.
    cluster.kill("primary");
    let own = cluster.node_path("primary").join("data/primary-journal");
    std::fs::remove_dir_all(own).unwrap();
    cluster.start_node("primary");
    let mut app = App::open(&cluster, &database);
    assert_eq!(app.value("SELECT count(*) FROM t"), ROWS + SMALL_ROWS);
    app.run("INSERT INTO t (x) VALUES (randomblob(100))");
    app.close();
    cluster.wait_level(&database, LIMIT);
    assert_bounded(&cluster, "primary", "fetching");
    for node in ["replica-1", "replica-2", "replica-3"] {
        assert_bounded(&cluster, node, "giving");
    }
}
