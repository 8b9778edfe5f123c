//! What goes wrong outside durovfs: each a clear line, the right exit status, and nothing lost or
//! half-written.

use durovfs_tests::app::{App, CANTOPEN, Reply, sqlite_shell};
use durovfs_tests::binaries::binaries;
use durovfs_tests::cluster::{Cluster, ClusterOptions, text};
use durovfs_tests::image::{assert_same, beside, image_of};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(60);

/// Exit statuses of the command line.
const FAILED: i32 = 1;
const USAGE: i32 = 2;
const NO_DATABASE: i32 = 3;
const NOT_COVERED: i32 = 4;

/// Fails unless a command ended with this status, one line on stderr that has these words in it,
/// and nothing on stdout.
fn assert_refused(output: &Output, status: i32, words: &[&str]) {
    let errors = text(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{errors}");
    assert_eq!(errors.lines().count(), 1, "{errors}");
    for word in words {
        assert!(errors.contains(word), "{word} is not in: {errors}");
    }
    assert_eq!(text(&output.stdout), "");
}

fn protected_database(cluster: &Cluster) -> PathBuf {
    let database = cluster.scratch().join("app.db");
    let mut app = App::open(cluster, &database);
    app.run("PRAGMA journal_mode=WAL");
    app.run("CREATE TABLE t (n INTEGER PRIMARY KEY, x TEXT)");
    app.run("INSERT INTO t VALUES (1, 'one')");
    app.close();
    database
}

/// A client config like the cluster's, with one line changed.
fn changed_config(cluster: &Cluster, name: &str, from: &str, to: &str) -> PathBuf {
    let config = std::fs::read_to_string(cluster.client_config()).unwrap();
    let line = config.lines().find(|line| line.starts_with(from)).unwrap();
    let file = cluster.path().join(name);
    std::fs::write(&file, config.replace(line, to)).unwrap();
    file
}

fn durovfs_with(config: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(&binaries().durovfs);
    command
        .args(args)
        .env("DUROVFS_CONFIG", config)
        .output()
        .unwrap()
}

/// Fails unless the application got an error from opening or from its first statement.
fn assert_cannot_write(reply: Reply, words: &[&str]) {
    let error = reply
        .result
        .expect_err("open a database that cannot be protected");
    assert_eq!(error.code & 0xff, CANTOPEN, "{error:?}");
    for word in words {
        assert!(error.message.contains(word), "{word} is not in: {error:?}");
    }
}

fn open_with(config: &Path, database: &Path) -> Reply {
    let request = serde_json::json!({
        "open": database.to_string_lossy(),
        "extension": binaries().extension.to_string_lossy(),
    });
    App::spawn(config).ask(&request)
}

#[test]
fn an_unreachable_sidecar_is_told_and_nothing_is_written() {
    // Broken: an application would write without protection, or hang, when its sidecar is away.
    let cluster = Cluster::start(ClusterOptions::default());
    let config = changed_config(
        &cluster,
        "away.toml",
        "sidecar =",
        "sidecar = \"127.0.0.1:9\"",
    );
    assert_refused(
        &durovfs_with(&config, &["status"]),
        FAILED,
        &["127.0.0.1:9", "primary"],
    );
    let database = cluster.scratch().join("new.db");
    assert_cannot_write(open_with(&config, &database), &["open"]);
    let length = std::fs::metadata(&database).map_or(0, |metadata| metadata.len());
    assert_eq!(length, 0, "something was written without protection");
    // The shell itself goes on with an empty database in memory; the file must stay as it is.
    let shell = sqlite_shell(&config, &database, "CREATE TABLE t (x);");
    assert_eq!(
        std::fs::metadata(&database).map_or(0, |metadata| metadata.len()),
        0
    );
    let errors = text(&shell.stderr);
    assert!(
        errors.contains("127.0.0.1:9"),
        "the reason is not told: {errors}"
    );
}

#[test]
fn another_clusters_certificate_is_refused() {
    // Broken: anybody who reaches the port could read and write all databases.
    let cluster = Cluster::start(ClusterOptions::default());
    let other = cluster.scratch().join("other");
    let made = durovfs_with(
        &cluster.client_config(),
        &[
            "init",
            "--dir",
            &other.to_string_lossy(),
            "--node",
            "primary=127.0.0.1:1",
            "--node",
            "b=b:2",
        ],
    );
    assert!(made.status.success(), "{}", text(&made.stderr));
    let cluster_config = std::fs::read_to_string(cluster.client_config()).unwrap();
    let sidecar = cluster_config
        .lines()
        .find(|line| line.starts_with("sidecar ="))
        .unwrap();
    let config = other.join("client.toml");
    let theirs = std::fs::read_to_string(&config).unwrap();
    let line = theirs
        .lines()
        .find(|line| line.starts_with("sidecar ="))
        .unwrap()
        .to_owned();
    std::fs::write(&config, theirs.replace(&line, sidecar)).unwrap();
    assert_refused(
        &durovfs_with(&config, &["status"]),
        FAILED,
        &["certificate"],
    );
    let database = cluster.scratch().join("new.db");
    assert_cannot_write(open_with(&config, &database), &["open"]);
}

#[test]
fn an_unknown_database_and_an_uncovered_moment_have_their_own_status() {
    // Broken: a script could not tell "there is no such database" from "try again", and a failed
    // restore would leave a file that looks like a good one.
    let cluster = Cluster::start(ClusterOptions::default());
    let database = protected_database(&cluster);
    cluster.wait_archived(&database, LIMIT);
    let name = database.to_string_lossy().into_owned();
    let file = cluster.scratch().join("out.db");
    let out = file.to_string_lossy().into_owned();
    let unknown = "/nowhere/at-all.db";
    assert_refused(
        &cluster.durovfs(&["status", unknown]),
        NO_DATABASE,
        &[unknown],
    );
    assert_refused(
        &cluster.durovfs(&["history", unknown]),
        NO_DATABASE,
        &[unknown],
    );
    assert_refused(
        &cluster.durovfs(&["restore", unknown, "-o", &out]),
        NO_DATABASE,
        &[unknown],
    );
    for at in ["2001-01-01T00:00:00Z", "lsn:999999"] {
        let output = cluster.durovfs(&["restore", &name, "--at", at, "-o", &out]);
        assert_refused(&output, NOT_COVERED, &[&name]);
    }
    let nonsense = cluster.durovfs(&["restore", &name, "--at", "yesteryear", "-o", &out]);
    assert_eq!(
        nonsense.status.code(),
        Some(USAGE),
        "{}",
        text(&nonsense.stderr)
    );
    assert_eq!(cluster.durovfs(&["frobnicate"]).status.code(), Some(USAGE));
    assert_eq!(cluster.durovfs(&["restore"]).status.code(), Some(USAGE));
    assert!(!file.exists());
}

#[test]
fn an_existing_file_is_not_overwritten() {
    // Broken: a restore would destroy the database that somebody wanted to compare it with.
    let cluster = Cluster::start(ClusterOptions::default());
    let database = protected_database(&cluster);
    cluster.wait_archived(&database, LIMIT);
    let name = database.to_string_lossy().into_owned();
    let file = cluster.scratch().join("precious.db");
    let out = file.to_string_lossy().into_owned();
    std::fs::write(&file, b"precious").unwrap();
    assert_refused(
        &cluster.durovfs(&["restore", &name, "-o", &out]),
        FAILED,
        &["--force"],
    );
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");
    let forced = cluster.durovfs(&["restore", &name, "-o", &out, "--force"]);
    assert!(forced.status.success(), "{}", text(&forced.stderr));
    let image = image_of(&database, cluster.scratch());
    assert_same("restored", &std::fs::read(&file).unwrap(), &image);
}

fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(files_below(&path));
        } else {
            files.push(path);
        }
    }
    files.sort();
    files
}

#[test]
fn a_damaged_archive_object_is_named_and_nothing_is_restored() {
    // Broken: a restore from a damaged archive would pass for a good one.
    let mut cluster = Cluster::start(ClusterOptions::default());
    let database = protected_database(&cluster);
    cluster.wait_archived(&database, LIMIT);
    cluster.stop();
    let name = database.to_string_lossy().into_owned();
    let file = cluster.scratch().join("out.db");
    let out = file.to_string_lossy().into_owned();
    let objects: Vec<_> = files_below(&cluster.archive())
        .into_iter()
        .filter(|path| {
            path.extension()
                .is_some_and(|extension| extension == "chunk")
        })
        .collect();
    assert!(!objects.is_empty(), "{:?}", files_below(&cluster.archive()));
    for object in &objects {
        let good = std::fs::read(object).unwrap();
        let mut bad = good.clone();
        let middle = bad.len() / 2;
        bad[middle] ^= 0x40;
        std::fs::write(object, &bad).unwrap();
        let output = cluster.durovfs(&["restore", &name, "-o", &out]);
        let object_name = object.file_name().unwrap().to_string_lossy().into_owned();
        assert_refused(&output, FAILED, &[&object_name]);
        std::fs::write(object, &good).unwrap();
    }
    let left: Vec<_> = std::fs::read_dir(cluster.scratch())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .filter(|name| name.contains("out.db"))
        .collect();
    assert_eq!(
        left,
        Vec::<String>::new(),
        "something is left of a restore that failed"
    );
    let output = cluster.durovfs(&["restore", &name, "-o", &out]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(!beside(&file, "-wal").exists());
}

/// A small file system for one replica's data; taken away at the end.
struct SmallDisk {
    path: PathBuf,
}

impl SmallDisk {
    fn mount(path: &Path, bytes: u64) -> Self {
        let output = Command::new("mount")
            .args([
                "-t",
                "tmpfs",
                "-o",
                &format!("size={bytes}"),
                "durovfs-test",
            ])
            .arg(path)
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "needs root: {}",
            text(&output.stderr)
        );
        Self {
            path: path.to_owned(),
        }
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.path).status();
    }
}

#[test]
fn a_full_disk_at_a_replica_costs_no_commit_and_is_told() {
    // Broken: one full disk would stop the cluster, or the replica would confirm what it has not.
    let mut cluster = Cluster::start(ClusterOptions::journals_keep_all());
    cluster.stop();
    let data = cluster.node_path("replica-2").join("data");
    std::fs::remove_dir_all(&data).unwrap();
    std::fs::create_dir_all(&data).unwrap();
    let config = cluster.node_path("replica-2").join("sidecar.toml");
    let text_before = std::fs::read_to_string(&config).unwrap();
    let small = text_before.replace(
        "segment_bytes = \"67108864\"",
        "segment_bytes = \"4194304\"",
    );
    assert_ne!(small, text_before);
    std::fs::write(&config, small).unwrap();
    let _disk = SmallDisk::mount(&data, 24 << 20);
    cluster.start_again();
    let database = protected_database(&cluster);
    let mut app = App::open(&cluster, &database);
    for n in 2..60 {
        app.run(&format!(
            "INSERT INTO t VALUES ({n}, hex(randomblob(500000)))"
        ));
    }
    let state = cluster.wait_for(&database, "full disk in status", LIMIT, |state| {
        let shown = state.to_string();
        shown.contains("replica-2") && (shown.contains("No space") || shown.contains("full"))
    });
    // With a quorum of the other four everything went on; this one confirmed no more than it has.
    let replicas = state["replicas"].as_array().unwrap();
    let full = replicas
        .iter()
        .find(|replica| replica["node"] == "replica-2")
        .unwrap();
    assert!(
        full["flush_lsn"].as_u64() < state["commit_lsn"].as_u64(),
        "{state}"
    );
    assert_eq!(app.value("SELECT count(*) FROM t"), 59);
    app.close();
}
