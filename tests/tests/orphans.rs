//! A primary and its application that are gone for good: the replicas complete the archive.

use durovfs_tests::cluster::{Cluster, ClusterOptions, text};
use durovfs_tests::outcomes::{Writer, create_tables};
use std::path::Path;
use std::time::{Duration, Instant};

const TIMEOUT: Duration = Duration::from_secs(20);
const LIMIT: Duration = Duration::from_secs(120);
const ENDLESS: u64 = 1 << 40;
/// Replicas hear what is committed within a tick of the primary, also when nothing follows.
const TOLD_AFTER: Duration = Duration::from_secs(1);

fn restore(cluster: &Cluster, database: &Path, file: &Path) -> Result<(), String> {
    let (name, file) = (database.to_string_lossy(), file.to_string_lossy());
    let output = cluster.durovfs(&["restore", &name, "-o", &file, "--force"]);
    if output.status.success() {
        Ok(())
    } else {
        Err(text(&output.stderr))
    }
}

#[test]
fn replicas_complete_the_archive_when_the_primary_is_gone() {
    // Broken: what was committed since the last upload waits for a successor that never comes, and
    // is lost with the replicas.
    let mut cluster = Cluster::start(ClusterOptions::journals_keep_all());
    // The one that will have to do it; the others would wait for a minute.
    cluster.kill("replica-2");
    cluster.set("replica-2", "orphan_after", "1s");
    cluster.start_node("replica-2");
    let database = cluster.scratch().join("app.db");
    let restored = cluster.scratch().join("restored.db");
    create_tables(&cluster, &database, 1);
    let mut writer = Writer::start(&cluster, &database, 1, 1, ENDLESS, TIMEOUT);
    writer.wait_committed(60, LIMIT);
    let mut outcomes = writer.kill();
    cluster.wait_level(&database, LIMIT);
    std::thread::sleep(TOLD_AFTER);
    assert!(
        restore(&cluster, &database, &restored).is_err(),
        "something was uploaded before"
    );

    // The first in the list is gone too: the next does it.
    cluster.kill("primary");
    cluster.kill("replica-1");
    let deadline = Instant::now() + LIMIT;
    while let Err(error) = restore(&cluster, &database, &restored) {
        assert!(Instant::now() < deadline, "{error}\n{}", cluster.logs());
        std::thread::sleep(Duration::from_millis(500));
    }
    outcomes.check("archive", &restored, 1);

    // It was not gone for good after all: it goes on after what others uploaded.
    cluster.start_node("replica-1");
    cluster.start_node("primary");
    let again = Writer::start(&cluster, &database, 1, outcomes.next_row(), 5, TIMEOUT);
    outcomes.extend(again.finish(LIMIT));
    cluster.stop();
    restore(&cluster, &database, &restored).expect("restore");
    outcomes.check("archive", &restored, 1);
}
