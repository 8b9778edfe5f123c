//! Several programs on one database of a real cluster, with SQLites of different versions, and one
//! that forks.

use durovfs_tests::app::plain_query;
use durovfs_tests::binaries::{PYTHON, binaries, host_file, program};
use durovfs_tests::cluster::{Cluster, ClusterOptions, text};
use durovfs_tests::image::{assert_same, image_of};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(60);

fn host(cluster: &Cluster, python: &Path, name: &str, database: &Path) -> Command {
    let mut command = Command::new(python);
    command
        .arg(program(name))
        .arg(&binaries().extension)
        .arg(database)
        .env("DUROVFS_CONFIG", cluster.client_config())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// Fails unless the archive has what the file has.
fn assert_archived(cluster: &Cluster, database: &Path) {
    cluster.wait_archived(database, LIMIT);
    let restored = cluster.scratch().join("restored.db");
    let _ = std::fs::remove_file(&restored);
    cluster.restore(database, None, &restored);
    let local = image_of(database, cluster.scratch());
    assert_same(
        "file and archive",
        &local,
        &std::fs::read(&restored).unwrap(),
    );
}

#[test]
fn programs_with_different_sqlites_write_in_turns() {
    // Broken: what one program commits is lost under the other's next commit.
    let cluster = Cluster::start(ClusterOptions::default());
    let apsw = host_file("python/bin/python");
    for journal in ["WAL", "DELETE"] {
        let database = cluster.scratch().join(format!("{journal}.db"));
        plain_query(&database, &format!("PRAGMA journal_mode={journal}"));
        plain_query(
            &database,
            "CREATE TABLE t (who TEXT, n INTEGER, total INTEGER)",
        );
        let (each, mut children) = (40, Vec::new());
        for (python, who) in [
            (&*apsw, "apsw"),
            (Path::new(PYTHON), "debian"),
            (&*apsw, "apsw-2"),
        ] {
            let mut command = host(&cluster, python, "alternate_host.py", &database);
            children.push(command.args([who, &each.to_string()]).spawn().unwrap());
        }
        for child in children {
            let output = child.wait_with_output().unwrap();
            assert!(output.status.success(), "{}", text(&output.stderr));
        }
        let sql = "SELECT count(*), max(total), count(DISTINCT total) FROM t";
        let all = 3 * each;
        assert_eq!(plain_query(&database, sql), [format!("{all}|{all}|{all}")]);
        assert_archived(&cluster, &database);
    }
}

#[test]
fn an_inherited_connection_is_refused_and_the_parent_goes_on() {
    // Broken: a child of a fork would commit in its parent's name, or drop its locks.
    let cluster = Cluster::start(ClusterOptions::default());
    for journal in ["WAL", "DELETE"] {
        let database = cluster.scratch().join(format!("{journal}.db"));
        let mut command = host(&cluster, Path::new(PYTHON), "inherit_host.py", &database);
        let output = command.arg(journal).output().unwrap();
        assert!(
            output.status.success(),
            "{journal}: {}",
            text(&output.stderr)
        );
        let sql = "SELECT group_concat(who) FROM t";
        assert_eq!(plain_query(&database, sql), ["before,parent,after"]);
        assert_archived(&cluster, &database);
    }
}
