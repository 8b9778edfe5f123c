//! VACUUM INTO in real programs: its target is an ordinary file; what else is made is protected.

use durovfs_tests::app::{plain_query, sqlite_shell};
use durovfs_tests::binaries::{PYTHON, binaries, host_file, program};
use durovfs_tests::cluster::{Cluster, ClusterOptions, text};
use durovfs_tests::image::beside;
use std::path::Path;
use std::process::Command;

fn assert_ordinary(cluster: &Cluster, copy: &Path) {
    assert_eq!(plain_query(copy, "SELECT count(*) FROM t"), ["1"]);
    assert!(!beside(copy, "-durovfs").exists(), "{}", copy.display());
    assert!(cluster.database(copy).is_none(), "{}", copy.display());
}

#[test]
fn copies_for_backups_are_no_databases_of_the_cluster() {
    // Broken: each nightly copy is sent to every replica, and stays in the archive for a month.
    let cluster = Cluster::start(ClusterOptions::default());
    let apsw = host_file("python/bin/python");
    for (python, driver) in [(Path::new(PYTHON), "sqlite3"), (&*apsw, "apsw")] {
        let database = cluster.scratch().join(format!("{driver}.db"));
        let output = Command::new(python)
            .arg(program("vacuum_host.py"))
            .arg(&binaries().extension)
            .arg(&database)
            .arg(driver)
            .env("DUROVFS_CONFIG", cluster.client_config())
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{driver}: {}",
            text(&output.stderr)
        );
        for suffix in ["-copy", "-copy-2"] {
            assert_ordinary(&cluster, &beside(&database, suffix));
        }
        assert!(cluster.database(&database).is_some());
        assert!(cluster.database(&beside(&database, "-attached")).is_some());
    }
    let database = cluster.scratch().join("shell.db");
    let (copy, asked) = (beside(&database, "-copy"), beside(&database, "-asked"));
    let script = format!(
        "CREATE TABLE t (x); INSERT INTO t VALUES (1); VACUUM INTO '{}';
         VACUUM INTO 'file:{}?vfs=durovfs';",
        copy.display(),
        asked.display()
    );
    let output = sqlite_shell(&cluster.client_config(), &database, &script);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_ordinary(&cluster, &copy);
    assert!(cluster.database(&asked).is_some());
}
