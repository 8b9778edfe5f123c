//! Replicas that are replaced while an application commits, and one that lost its disk.

use durovfs_tests::cluster::{Cluster, ClusterOptions, text};
use durovfs_tests::outcomes::{Told, Writer, create_tables};
use durovfs_tests::seed::Seeded;
use serde_json::Value;
use std::net::UdpSocket;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const TIMEOUT: Duration = Duration::from_secs(20);
/// So short that a commit that cannot be gathered is told soon.
const SHORT_TIMEOUT: Duration = Duration::from_secs(3);
const LIMIT: Duration = Duration::from_secs(120);
const ENDLESS: u64 = 1 << 40;

/// A cluster whose further nodes are processes of the test.
struct Grown {
    cluster: Cluster,
    added: Vec<Child>,
}

impl Drop for Grown {
    fn drop(&mut self) {
        for node in &mut self.added {
            // One that has ended cannot be killed.
            let _ = node.kill();
            let _ = node.wait();
        }
    }
}

impl Grown {
    fn start() -> Self {
        Self {
            cluster: Cluster::start(ClusterOptions::default()),
            added: Vec::new(),
        }
    }

    /// Adds a node by the command that an operator uses, and starts it.
    fn add(&mut self, name: &str) {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let address = socket.local_addr().unwrap();
        let directory = self.cluster.path();
        let output = self.cluster.durovfs(&[
            "init",
            "--dir",
            &directory.to_string_lossy(),
            "--add",
            "--node",
            &format!("{name}={address}"),
        ]);
        assert!(output.status.success(), "add: {}", text(&output.stderr));
        drop(socket);
        let node = self.cluster.node_path(name);
        let log = std::fs::File::create(node.join("sidecar.log")).unwrap();
        let child = Command::new(&durovfs_tests::binaries::binaries().durovfs)
            .arg("sidecar")
            .arg("--config")
            .arg(node.join("sidecar.toml"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        self.added.push(child);
    }

    fn replace(&self, database: &Path, old: &str, new: &str) -> Child {
        Command::new(&durovfs_tests::binaries::binaries().durovfs)
            .args(["replace", &database.to_string_lossy(), old, new])
            .env("DUROVFS_CONFIG", self.cluster.client_config())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap()
    }

    /// Replaces, while the primary is killed at a random moment; the same command again and again
    /// must bring it to its end.
    fn replace_through_a_crash(&self, seeded: &mut Seeded, database: &Path, old: &str, new: &str) {
        let mut command = self.replace(database, old, new);
        std::thread::sleep(seeded.between(Duration::ZERO, Duration::from_millis(400)));
        self.cluster.kill("primary");
        self.cluster.start_node("primary");
        let begun = Instant::now();
        while !command.wait().unwrap().success() {
            assert!(
                begun.elapsed() < LIMIT,
                "{old} is not replaced by {new}: {}",
                self.cluster.logs()
            );
            std::thread::sleep(Duration::from_millis(200));
            command = self.replace(database, old, new);
        }
    }
}

fn members(state: &Value) -> Vec<String> {
    let members = state["members"].as_array().unwrap().iter();
    members
        .map(|node| node.as_str().unwrap().to_owned())
        .collect()
}

fn has_vote(state: &Value, node: &str) -> bool {
    let mut replicas = state["replicas"].as_array().unwrap().iter();
    replicas.any(|replica| replica["node"] == node && replica["counted"] == true)
}

#[test]
fn all_five_are_replaced_while_an_application_commits() {
    // Broken: a commit would be lost, or the application stopped, when a machine is replaced; or
    // a primary that dies in between would leave the change half made.
    let mut seeded = Seeded::from_environment("replace");
    let mut grown = Grown::start();
    let database = grown.cluster.scratch().join("app.db");
    create_tables(&grown.cluster, &database, 1);
    let mut writer = Writer::start(&grown.cluster, &database, 1, 1, ENDLESS, TIMEOUT);
    let old_nodes = grown.cluster.replicas();
    for (index, old) in old_nodes.iter().enumerate() {
        let before = writer.so_far().committed();
        writer.wait_committed(before + 5, LIMIT);
        let new = format!("spare-{index}");
        grown.add(&new);
        // Every other one is dead before it is replaced.
        let dead_before = index % 2 == 0;
        if dead_before {
            grown.cluster.kill(old);
        }
        grown.replace_through_a_crash(&mut seeded, &database, old, &new);
        if !dead_before {
            grown.cluster.kill(old);
        }
    }
    // None of the first five is left, and commits go on.
    let before = writer.so_far().committed();
    writer.wait_committed(before + 5, LIMIT);
    let state = grown.cluster.database(&database).unwrap();
    let spares: Vec<String> = (0..5).map(|index| format!("spare-{index}")).collect();
    assert_eq!(members(&state), spares, "{state}");
    assert!(spares.iter().all(|node| has_vote(&state, node)), "{state}");
    assert_eq!(state["change"], Value::Null);
    let outcomes = writer.kill();
    println!("{} commits", outcomes.committed());

    // A primary that lost all it had finds the members by asking, and every commit with them.
    let status = grown.cluster.wait_archived(&database, LIMIT);
    println!("generation {}", status["generation"]);
    grown.cluster.kill("primary");
    std::fs::remove_dir_all(grown.cluster.node_path("primary").join("data")).unwrap();
    grown.cluster.start_node("primary");
    let last = Writer::start(
        &grown.cluster,
        &database,
        1,
        outcomes.next_row(),
        1,
        TIMEOUT,
    )
    .finish(LIMIT);
    assert_eq!(last.committed(), 1, "{last:?}");
    let mut outcomes = outcomes;
    outcomes.extend(last);
    grown.cluster.wait_archived(&database, LIMIT);
    outcomes.check("file", &database, 1);
    let restored = grown.cluster.scratch().join("restored.db");
    grown.cluster.restore(&database, None, &restored);
    outcomes.check("restored", &restored, 1);
}

#[test]
fn a_replica_that_lost_its_disk_has_no_vote_until_it_is_brought_in() {
    // Broken: an empty disk would be counted among the three that hold a commit.
    let cluster = Cluster::start(ClusterOptions::default());
    let database = cluster.scratch().join("app.db");
    create_tables(&cluster, &database, 1);
    let first = Writer::start(&cluster, &database, 1, 1, 20, TIMEOUT).finish(LIMIT);
    assert_eq!(first.committed(), 20);
    cluster.wait_level(&database, LIMIT);

    cluster.kill("replica-1");
    std::fs::remove_dir_all(cluster.node_path("replica-1").join("data")).unwrap();
    cluster.kill("replica-2");
    cluster.kill("replica-3");
    cluster.start_node("replica-1");
    cluster.wait_for(&database, "the empty replica is seen", LIMIT, |state| {
        let warnings = state["warnings"].as_array().unwrap().iter();
        let mut lost = warnings.filter_map(Value::as_str);
        lost.any(|line| line.contains("replica-1 lost its journal"))
    });
    // Two whole disks and an empty one: no commit may be told.
    let refused = Writer::start(&cluster, &database, 1, first.next_row(), 2, SHORT_TIMEOUT);
    let refused = refused.finish(LIMIT);
    assert_eq!(refused.committed(), 0, "{refused:?}");

    cluster.start_node("replica-2");
    cluster.start_node("replica-3");
    let output = cluster.durovfs(&[
        "replace",
        &database.to_string_lossy(),
        "replica-1",
        "replica-1",
    ]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    cluster.wait_for(&database, "the replica is brought in", LIMIT, |state| {
        has_vote(state, "replica-1") && state["change"].is_null()
    });
    cluster.kill("replica-2");
    cluster.kill("replica-3");
    let mut outcomes = first;
    outcomes.extend(refused);
    let last = Writer::start(&cluster, &database, 1, outcomes.next_row(), 20, TIMEOUT);
    let last = last.finish(LIMIT);
    assert_eq!(last.committed(), 20, "{last:?}");
    outcomes.extend(last);
    let unknown = outcomes.count(|told| *told == Told::Unknown);
    println!("{} commits, {unknown} unknown", outcomes.committed());
    cluster.wait_archived(&database, LIMIT);
    let restored = cluster.scratch().join("restored.db");
    cluster.restore(&database, None, &restored);
    outcomes.check("restored", &restored, 1);
}
