//! Journals that a bad disk damaged: it is reported, the cluster goes on, and the damaged ones are
//! fed until all five are the same again.

use durovfs_tests::cluster::{Cluster, ClusterOptions};
use durovfs_tests::damage::{
    append_garbage, cut_last_quarter, flip_bit, flip_bit_before, own_segments, segments,
};
use durovfs_tests::image::{assert_same, checksum_of, copy_database, image_of};
use durovfs_tests::outcomes::{Told, Writer, create_tables};
use durovfs_tests::replay::{copy_journals, replay};
use std::path::Path;
use std::time::{Duration, Instant};

const TIMEOUT: Duration = Duration::from_secs(20);
const LIMIT: Duration = Duration::from_secs(120);
/// What a journal says when it is opened damaged, and a replica when it is whole again.
const REPORTED: &str = "going on with what is left";
const FOUND_RUNNING: &str = "an entry cannot be read";
const WHOLE: &str = "the damaged log is whole again";
/// What a primary says when an entry of its own copy is bad, and when the log is open.
const OWN_FOUND: &str = "an entry of our own journal cannot be read";
const OPEN: &str = "the log is open";

fn times_logged(cluster: &Cluster, node: &str, what: &str) -> usize {
    let log = std::fs::read(cluster.node_path(node).join("sidecar.log")).expect("read the log");
    String::from_utf8_lossy(&log).matches(what).count()
}

fn wait_logged(cluster: &Cluster, node: &str, what: &str, times: usize) {
    let deadline = Instant::now() + LIMIT;
    while times_logged(cluster, node, what) < times {
        assert!(
            Instant::now() < deadline,
            "{node} did not say {what:?} {times} times\n{}",
            cluster.logs()
        );
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Kills the nodes, damages their journals, starts them again.
fn damage_stopped(cluster: &Cluster, nodes: &[&str], damage: impl Fn(&str)) {
    nodes.iter().for_each(|node| cluster.kill(node));
    nodes.iter().for_each(|node| damage(node));
    nodes.iter().for_each(|node| cluster.start_node(node));
}

#[test]
fn damaged_journals_are_reported_and_mended_while_commits_go_on() {
    // Broken: a flipped bit stops a replica for good, is cut off with all that follows, or is never
    // seen; or a commit fails although three replicas are whole.
    let mut cluster = Cluster::start(ClusterOptions::journals_keep_all());
    for node in cluster.replicas() {
        cluster.kill(&node);
        // Small segments, so that there are some, and a scrub that does not let a test wait.
        cluster.set(&node, "segment_bytes", "4MiB");
        cluster.set(&node, "scrub_interval", "500ms");
        // Nothing is in it yet, and it keeps the size that it was begun with.
        let empty = segments(&cluster, &node);
        empty
            .iter()
            .for_each(|file| std::fs::remove_file(file).expect("remove a segment"));
        cluster.start_node(&node);
    }
    let database = cluster.scratch().join("app.db");
    create_tables(&cluster, &database, 1);
    fill(&cluster, &database);
    let mut writer = Writer::start_steady(&cluster, &database, 1, TIMEOUT);
    writer.wait_committed(20, LIMIT);
    cluster.wait_level(&database, LIMIT);

    // A bit in the middle of an old segment.
    damage_stopped(&cluster, &["replica-1"], |node| {
        flip_bit(&segments(&cluster, node)[1], 50);
    });
    wait_logged(&cluster, "replica-1", REPORTED, 1);
    wait_logged(&cluster, "replica-1", WHOLE, 1);
    let status = cluster.node_status("replica-1").to_string();
    assert!(status.contains("journal is damaged"), "{status}");
    assert!(status.contains("all databases are whole again"), "{status}");

    // Two at once, in the segment that is written to.
    damage_stopped(&cluster, &["replica-2", "replica-3"], |node| {
        let segments = segments(&cluster, node);
        flip_bit(segments.last().expect("a segment"), 30);
    });
    for node in ["replica-2", "replica-3"] {
        wait_logged(&cluster, node, REPORTED, 1);
        wait_logged(&cluster, node, WHOLE, 1);
    }

    // A whole segment.
    damage_stopped(&cluster, &["replica-1"], |node| {
        std::fs::remove_file(&segments(&cluster, node)[1]).expect("remove a segment");
    });
    wait_logged(&cluster, "replica-1", REPORTED, 2);
    wait_logged(&cluster, "replica-1", WHOLE, 2);

    // An end that is followed by what never was a record: no damage.
    damage_stopped(&cluster, &["replica-5"], |node| {
        let segments = segments(&cluster, node);
        append_garbage(segments.last().expect("a segment"));
    });
    lose_the_end(&cluster, &database, "replica-4");

    // While it runs: the scrub finds it.
    flip_bit(&segments(&cluster, "replica-2")[0], 50);
    wait_logged(&cluster, "replica-2", FOUND_RUNNING, 1);
    wait_logged(&cluster, "replica-2", WHOLE, 2);

    let before = writer.so_far().committed();
    writer.wait_committed(before + 20, LIMIT);
    let outcomes = writer.kill();
    println!("{} commits", outcomes.committed());
    let failed = outcomes.count(|told| matches!(told, Told::NotCommitted(_) | Told::Unknown));
    assert_eq!(failed, 0, "a commit failed: {outcomes:?}");
    for node in ["replica-4", "replica-5"] {
        assert_eq!(times_logged(&cluster, node, REPORTED), 0, "{node}");
    }
    let last = Writer::start(&cluster, &database, 1, outcomes.next_row(), 1, TIMEOUT).finish(LIMIT);
    assert_eq!(last.committed(), 1, "{last:?}");
    let mut outcomes = outcomes;
    outcomes.extend(last);
    cluster.wait_level(&database, LIMIT);
    check_all(&mut cluster, &database, |copy| {
        outcomes.check("file", copy, 1);
    });
}

/// The end of a journal is gone, as if it had never been synced: it looks like a torn write, so
/// only the primary can tell, and says what to do. Done as it says, the replica is brought in anew.
fn lose_the_end(cluster: &Cluster, database: &Path, node: &str) {
    let status = || cluster.database(database).unwrap_or_default().to_string();
    damage_stopped(cluster, &[node], |node| {
        let segments = segments(cluster, node);
        cut_last_quarter(segments.last().expect("a segment"));
    });
    let told = format!("{node} lost entries that it had on disk");
    wait_until("the loss is told", || status().contains(&told), status);
    cluster.kill(node);
    std::fs::remove_dir_all(cluster.node_path(node).join("data")).expect("remove the data");
    cluster.start_node(node);
    wait_until("it is brought in", || !status().contains("lost"), status);
}

fn wait_until(what: &str, is_so: impl Fn() -> bool, state: impl Fn() -> String) {
    let deadline = Instant::now() + LIMIT;
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}: not so; {}", state());
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn a_primary_whose_own_journal_is_damaged_fetches_what_it_lacks() {
    // Broken: a bad sector under the primary, whose journal is no vote, stops its databases.
    let mut cluster = Cluster::start(ClusterOptions::journals_keep_all());
    cluster.kill("primary");
    cluster.set("primary", "scrub_interval", "500ms");
    cluster.start_node("primary");
    let database = cluster.scratch().join("app.db");
    create_tables(&cluster, &database, 1);
    let mut writer = Writer::start_steady(&cluster, &database, 1, TIMEOUT);
    writer.wait_committed(50, LIMIT);
    let opened = times_logged(&cluster, "primary", OPEN);

    let damaged = flip_bit(&own_segments(&cluster, "primary")[0], 50);
    wait_logged(&cluster, "primary", OWN_FOUND, 1);
    wait_logged(&cluster, "primary", OPEN, opened + 1);
    let before = writer.so_far().committed();
    writer.wait_committed(before + 20, LIMIT);

    damage_stopped(&cluster, &["primary"], |node| {
        // Before the entry that is bad already: behind it nothing more would be told.
        flip_bit_before(&own_segments(&cluster, node)[0], damaged);
    });
    wait_logged(&cluster, "primary", REPORTED, 1);
    let before = writer.so_far().committed();
    writer.wait_committed(before + 20, LIMIT);
    let mut outcomes = writer.kill();
    let last = Writer::start(&cluster, &database, 1, outcomes.next_row(), 1, TIMEOUT).finish(LIMIT);
    assert_eq!(last.committed(), 1, "{last:?}");
    outcomes.extend(last);
    cluster.wait_level(&database, LIMIT);
    check_all(&mut cluster, &database, |copy| {
        outcomes.check("file", copy, 1);
    });
}

/// Some segments full.
fn fill(cluster: &Cluster, database: &Path) {
    let mut app = durovfs_tests::app::App::open(cluster, database);
    app.run("CREATE TABLE filling (n INTEGER PRIMARY KEY, payload BLOB)");
    for _ in 0..10 {
        app.run("INSERT INTO filling (payload) VALUES (randomblob(1000000))");
    }
}

/// The file and all journals are the same.
fn check_all(cluster: &mut Cluster, database: &Path, check: impl Fn(&Path)) {
    let journals = copy_journals(cluster);
    cluster.stop();
    let copy = cluster.scratch().join("copy.db");
    copy_database(database, &copy);
    check(&copy);
    let image = image_of(database, cluster.scratch());
    for (node, journal) in &journals {
        let replayed = replay(journal, database);
        assert_eq!(replayed.checksum(), checksum_of(&image), "{node}");
        assert_same(node, &replayed.image(), &image);
    }
}
