//! Ten thousand commits from each of two hosts, and every copy of the database agrees at the end.

use durovfs_tests::app::{App, sqlite_shell};
use durovfs_tests::cluster::{Cluster, ClusterOptions, text};
use durovfs_tests::image::{assert_same, checksum_of, image_of};
use durovfs_tests::outcomes::{Writer, create_tables};
use durovfs_tests::replay::{copy_journals, replay};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

const COMMITS: u64 = 10_000;
/// Ten thousand commits on a busy machine with a slow disk.
const LIMIT: Duration = Duration::from_secs(600);

/// Fails unless the replicas' journals, the archive and the file hold the same database.
fn assert_all_agree(
    cluster: &Cluster,
    journals: &BTreeMap<String, PathBuf>,
    database: &Path,
    rows: u64,
) {
    let scratch = cluster.scratch();
    let image = image_of(database, scratch);
    let checksum = checksum_of(&image);
    let mut lsns = Vec::new();
    for (node, journal) in journals {
        let replayed = replay(journal, database);
        assert_eq!(
            replayed.carried, checksum,
            "{node}: the log carries another checksum"
        );
        assert_eq!(
            replayed.checksum(),
            checksum,
            "{node}: its pages are others"
        );
        assert_same(node, &replayed.image(), &image);
        assert!(
            replayed.lsn.get() > rows,
            "{node}: {} entries for {rows} rows",
            replayed.lsn
        );
        lsns.push(replayed.lsn);
    }
    assert!(lsns.windows(2).all(|pair| pair[0] == pair[1]), "{lsns:?}");
    let restored = scratch.join(format!("restored-{rows}.db"));
    cluster.restore(database, None, &restored);
    let restored = std::fs::read(&restored).unwrap();
    assert_eq!(
        checksum_of(&restored),
        checksum,
        "the archive holds another database"
    );
    assert_same("archive", &restored, &image);
}

#[test]
fn ten_thousand_commits_leave_seven_equal_copies() {
    // Broken: some commit that returned OK would be missing, or different, in a place that a
    // recovery may have to rely on.
    let mut cluster = Cluster::start(ClusterOptions::journals_keep_all());
    let by_shell = cluster.scratch().join("shell.db");
    let by_python = cluster.scratch().join("python.db");

    let mut script =
        "PRAGMA journal_mode=WAL;\nCREATE TABLE t (n INTEGER PRIMARY KEY, x TEXT);\n".to_owned();
    for n in 0..COMMITS {
        script.push_str(&format!("INSERT INTO t VALUES ({n}, 'row {n}');\n"));
    }
    script.push_str("SELECT count(*) FROM t;\n");
    let output = sqlite_shell(&cluster.client_config(), &by_shell, &script);
    assert!(
        output.status.success(),
        "{}\n{}",
        text(&output.stderr),
        cluster.logs()
    );
    assert_eq!(text(&output.stdout).lines().last(), Some("10000"));

    create_tables(&cluster, &by_python, 1);
    let writer = Writer::start(&cluster, &by_python, 1, 1, COMMITS, Duration::from_secs(10));
    let outcomes = writer.finish(LIMIT);
    assert_eq!(outcomes.committed() as u64, COMMITS);

    for database in [&by_shell, &by_python] {
        cluster.wait_level(database, LIMIT);
    }
    let journals = copy_journals(&cluster);
    // The end uploads what no interval has uploaded yet.
    cluster.stop();
    for (database, rows) in [(&by_shell, COMMITS), (&by_python, COMMITS + 1)] {
        assert_all_agree(&cluster, &journals, database, rows);
    }
    outcomes.check("file", &by_python, 1);
}

#[test]
fn status_tells_what_protects_the_database() {
    // Broken: an operator could not tell a protected database from one that is not.
    let cluster = Cluster::start(ClusterOptions::default());
    let database = cluster.scratch().join("app.db");
    let mut app = App::open(&cluster, &database);
    app.run("PRAGMA journal_mode=WAL");
    app.run("CREATE TABLE t (x)");
    let status = app.value("SELECT durovfs_status()");
    let status: serde_json::Value = serde_json::from_str(status.as_str().unwrap()).unwrap();
    assert_eq!(status["protected"], true, "{status}");
    assert_eq!(
        status["database"],
        database.to_string_lossy().as_ref(),
        "{status}"
    );
    assert_eq!(status["durability"], "quorum", "{status}");
    assert_eq!(status["role"], "primary", "{status}");
    let bookmark = app.value("SELECT durovfs_bookmark()");
    let state = cluster.wait_archived(&database, Duration::from_secs(30));
    let commit_lsn = state["commit_lsn"].as_u64().unwrap();
    assert!(
        bookmark
            .as_str()
            .unwrap()
            .starts_with(&format!("{commit_lsn:016x}-")),
        "{bookmark}"
    );
    assert_eq!(state["replicas"].as_array().unwrap().len(), 5);
    app.close();
}
