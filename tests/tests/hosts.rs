//! The programs that load the extension: SQLite from the system, SQLite linked in and hidden,
//! several processes, a fork.

use durovfs_tests::app::{plain_query, sqlite_shell};
use durovfs_tests::binaries::{PYTHON, binaries, host_file, program};
use durovfs_tests::cluster::{Cluster, ClusterOptions, text};
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(60);

fn run_host(cluster: &Cluster, python: &Path, name: &str, database: &Path) -> Output {
    Command::new(python)
        .arg(program(name))
        .arg(&binaries().extension)
        .arg(database)
        .env("DUROVFS_CONFIG", cluster.client_config())
        .output()
        .unwrap_or_else(|error| panic!("{}: {error}; run scripts/prepare", python.display()))
}

fn assert_ran(output: &Output) {
    assert!(
        output.status.success(),
        "{}{}",
        text(&output.stdout),
        text(&output.stderr)
    );
}

#[test]
fn a_host_with_its_own_hidden_sqlite_is_protected() {
    // Broken: a program whose SQLite is linked in would write past durovfs, or crash at load.
    let cluster = Cluster::start(ClusterOptions::default());
    let database = cluster.scratch().join("apsw.db");
    let python = host_file("python/bin/python");
    assert_ran(&run_host(&cluster, &python, "apsw_host.py", &database));
    let state = cluster.wait_archived(&database, LIMIT);
    assert!(state["commit_lsn"].as_u64().unwrap() > 100, "{state}");
    assert_eq!(plain_query(&database, "SELECT count(*) FROM t"), ["100"]);
}

#[test]
fn a_forked_child_commits_over_a_connection_of_its_own() {
    // Broken: a preforking server would mix up the answers of its children's commits.
    let cluster = Cluster::start(ClusterOptions::default());
    let database = cluster.scratch().join("fork.db");
    assert_ran(&run_host(
        &cluster,
        Path::new(PYTHON),
        "fork_host.py",
        &database,
    ));
    cluster.wait_archived(&database, LIMIT);
    let restored = cluster.scratch().join("restored.db");
    cluster.restore(&database, None, &restored);
    let sql = "SELECT who, count(*) FROM t GROUP BY who ORDER BY who";
    assert_eq!(
        plain_query(&restored, sql),
        ["child-1|50", "child-2|50", "parent|50"]
    );
}

#[test]
fn what_wal_mode_allows_works_in_the_shell() {
    // Broken: an application that uses a part of SQLite beyond plain tables could not be protected.
    let cluster = Cluster::start(ClusterOptions::default());
    let database = cluster.scratch().join("shell.db");
    let other = cluster.scratch().join("other.db");
    let script = format!(
        "PRAGMA journal_mode=WAL;
         CREATE VIRTUAL TABLE words USING fts5(text);
         CREATE VIRTUAL TABLE boxes USING rtree(id, x0, x1);
         INSERT INTO words VALUES ('three of five'), ('two of five');
         INSERT INTO boxes VALUES (1, 0, 10), (2, 20, 30);
         ATTACH '{}' AS other;
         PRAGMA other.journal_mode=WAL;
         CREATE TABLE other.t (x);
         BEGIN; INSERT INTO other.t VALUES (1); INSERT INTO words VALUES ('four'); COMMIT;
         CREATE TABLE big (x); BEGIN; SAVEPOINT a;
         INSERT INTO big SELECT randomblob(1000) FROM words; ROLLBACK TO a; RELEASE a; COMMIT;
         VACUUM; PRAGMA wal_checkpoint(TRUNCATE);
         SELECT count(*) FROM words WHERE words MATCH 'five';
         SELECT id FROM boxes WHERE x0 > 15;",
        other.display()
    );
    let output = sqlite_shell(&cluster.client_config(), &database, &script);
    assert_ran(&output);
    let shown = text(&output.stdout);
    let last: Vec<_> = shown.lines().rev().take(2).collect();
    assert_eq!(last, ["2", "2"], "{shown}");
    for (file, sql, expected) in [
        (&database, "SELECT count(*) FROM words", "3"),
        (&other, "SELECT count(*) FROM t", "1"),
    ] {
        cluster.wait_archived(file, LIMIT);
        let restored = cluster.scratch().join("restored.db");
        let _ = std::fs::remove_file(&restored);
        cluster.restore(file, None, &restored);
        assert_eq!(plain_query(&restored, sql), [expected]);
        assert_eq!(plain_query(&restored, "PRAGMA integrity_check"), ["ok"]);
    }
}
