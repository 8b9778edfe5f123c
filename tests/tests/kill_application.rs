//! kill -9 of the application, again and again at random points, while another process keeps
//! writing to the same database.

use durovfs_tests::cluster::{Cluster, ClusterOptions};
use durovfs_tests::image::copy_database;
use durovfs_tests::outcomes::{Outcomes, Writer, create_tables};
use durovfs_tests::seed::{Seeded, kill_count};
use std::time::Duration;

const TIMEOUT: Duration = Duration::from_secs(10);
const LIMIT: Duration = Duration::from_secs(60);
/// More rows than the other process can write during the test.
const ENDLESS: u64 = 1 << 40;

#[test]
fn a_killed_application_loses_nothing_that_it_was_told() {
    // Broken: a crash of the application would lose a commit, apply half of one, or leave the
    // file with one that the quorum does not have.
    let mut seeded = Seeded::from_environment("kill_application");
    let mut cluster = Cluster::start(ClusterOptions::default());
    let database = cluster.scratch().join("app.db");
    create_tables(&cluster, &database, 2);
    let mut killed = Outcomes::default();
    let mut steady = Writer::start_slow(&cluster, &database, 2, TIMEOUT);
    for round in 1..=kill_count() {
        let first = killed.next_row();
        let writer = Writer::start(&cluster, &database, 1, first, ENDLESS, TIMEOUT);
        // Mostly while it writes, now and then while it loads and opens.
        if seeded.below(5) > 0 {
            writer.wait_begun(LIMIT);
        }
        std::thread::sleep(seeded.between(Duration::ZERO, Duration::from_millis(250)));
        killed.extend(writer.kill());
        // Every tenth time nobody else has the database open: the next one opens what was left.
        if round % 10 == 0 {
            let before = steady.so_far().committed();
            steady.wait_committed(before + 1, LIMIT);
        }
    }
    let steady = steady.kill();
    // One more process, which must be able to open and go on.
    let last = Writer::start(&cluster, &database, 1, killed.next_row(), 5, TIMEOUT).finish(LIMIT);
    assert_eq!(last.committed(), 5, "{last:?}");
    killed.extend(last);
    println!(
        "killed {} times; {} commits by the killed",
        kill_count(),
        killed.committed()
    );
    assert!(
        killed.committed() as u64 > kill_count(),
        "the killed hardly wrote: {killed:?}"
    );

    cluster.wait_archived(&database, LIMIT);
    cluster.stop();
    let copy = cluster.scratch().join("copy.db");
    copy_database(&database, &copy);
    let restored = cluster.scratch().join("restored.db");
    cluster.restore(&database, None, &restored);
    for (writer, outcomes) in [(1, &killed), (2, &steady)] {
        let in_file = outcomes.check("file", &copy, writer);
        let in_archive = outcomes.check("restored", &restored, writer);
        assert_eq!(
            in_file, in_archive,
            "an unknown commit is in one place only"
        );
    }
}
