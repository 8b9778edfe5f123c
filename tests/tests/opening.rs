//! What open does on a real cluster, row by row of its table: create, hydrate, equal, behind, ahead
//! or different; after deaths between the quorum's ack and the local write, and after power losses.

use durovfs_journal::{DatabaseState, Journal, JournalOptions, Record};
use durovfs_tests::app::{App, CANTOPEN, plain_query};
use durovfs_tests::cluster::{Cluster, ClusterOptions};
use durovfs_tests::hosts::{HOSTS, Hosts};
use durovfs_tests::image::{assert_same, beside, image_of};
use durovfs_tests::seed::Seeded;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(60);
const NAME: &str = "ledger";
/// What a database is made of, but for the index that SQLite makes anew.
const PIECES: [&str; 3] = ["", "-wal", "-durovfs"];

/// Contents of a database's files at a moment; none for one that is not there.
type Copied = BTreeMap<&'static str, Option<Vec<u8>>>;

fn copy(database: &Path) -> Copied {
    PIECES
        .iter()
        .map(|piece| (*piece, std::fs::read(beside(database, piece)).ok()))
        .collect()
}

fn put_back(database: &Path, files: &Copied) {
    let _ = std::fs::remove_file(beside(database, "-shm"));
    for (piece, content) in files {
        let path = beside(database, piece);
        match content {
            Some(content) => std::fs::write(path, content).unwrap(),
            None => drop(std::fs::remove_file(path)),
        }
    }
}

fn begin(cluster: &Cluster, database: &Path) -> App {
    let mut app = App::open(cluster, database);
    app.run("PRAGMA journal_mode=WAL");
    app.run("PRAGMA wal_autocheckpoint=0");
    app.run("CREATE TABLE t (n INTEGER PRIMARY KEY, filling BLOB)");
    app
}

fn insert(app: &mut App, from: u64, to: u64) {
    for n in from..=to {
        app.run(&format!("INSERT INTO t VALUES ({n}, randomblob(700))"));
    }
}

fn count(app: &mut App) -> u64 {
    let count = app.value("SELECT count(*) FROM t").as_u64().unwrap();
    assert_eq!(app.value("SELECT coalesce(max(n), 0) FROM t"), count);
    count
}

/// The file, with what open did to it, is what the archive says.
fn assert_level(cluster: &Cluster, database: &Path) {
    cluster.wait_archived(database, LIMIT);
    let restored = cluster.scratch().join("restored.db");
    cluster.restore(database, None, &restored);
    let image = image_of(database, cluster.scratch());
    assert_same("archive", &std::fs::read(&restored).unwrap(), &image);
    std::fs::remove_file(restored).unwrap();
}

#[test]
fn a_death_between_the_ack_and_the_local_write_is_rolled_forward() {
    // Broken: a commit that the quorum has would be missing on its own host, or be made twice.
    let mut cluster = Cluster::start(ClusterOptions::default());
    let database = cluster.scratch().join("app.db");
    let mut app = begin(&cluster, &database);
    insert(&mut app, 1, 5);
    let slow = ["replica-1", "replica-2", "replica-3"];
    for host_dies in [false, true] {
        let before = count(&mut app);
        slow.iter().for_each(|node| cluster.freeze(node));
        let sql = format!("INSERT INTO t VALUES ({}, 1)", before + 1);
        let committing = std::thread::spawn(move || {
            app.run(&sql);
            app
        });
        // Sent, in flight in the mark, not written to the WAL: as a crash would leave it.
        std::thread::sleep(Duration::from_millis(300));
        let files = copy(&database);
        slow.iter().for_each(|node| cluster.thaw(node));
        // kill -9 after the ack.
        drop(committing.join().unwrap());
        if host_dies {
            // With its sidecar, whose journal is not synced.
            cluster.kill("primary");
            let journal = cluster.node_path("primary").join("data/primary-journal");
            std::fs::remove_dir_all(journal).unwrap();
            cluster.start_node("primary");
        }
        put_back(&database, &files);
        app = App::open(&cluster, &database);
        assert_eq!(count(&mut app), before + 1, "host dies: {host_dies}");
        insert(&mut app, before + 2, before + 3);
    }
    app.close();
    assert_level(&cluster, &database);
    cluster.stop();
}

/// A WAL as a power loss leaves it: whole up to some place, then cut or zeroed.
fn damaged(wal: &[u8], keep: usize, zeroed: bool) -> Vec<u8> {
    let mut bytes = wal[..keep].to_vec();
    if zeroed {
        bytes.resize(wal.len(), 0);
    }
    bytes
}

#[test]
fn a_file_that_lost_its_unsynced_tail_is_rolled_forward() {
    // Broken: after a power loss a host would refuse its own database, or lose confirmed commits.
    let mut seeded = Seeded::from_environment("power_loss");
    let mut cluster = Cluster::start(ClusterOptions::default());
    let database = cluster.scratch().join("app.db");
    let mut app = begin(&cluster, &database);
    insert(&mut app, 1, 20);
    app.run("PRAGMA wal_checkpoint(RESTART)");
    // The WAL begins anew with the next commit: until the next checkpoint nothing of it is synced.
    let synced = copy(&database);
    insert(&mut app, 21, 30);
    let earlier = copy(&database);
    insert(&mut app, 31, 40);
    let last = copy(&database);
    drop(app);
    let wal = last["-wal"].clone().unwrap();
    let kept = earlier["-wal"].clone().unwrap().len().min(wal.len());
    let mut wals: Vec<(String, Option<Vec<u8>>)> = vec![
        ("gone".to_owned(), None),
        ("empty".to_owned(), Some(Vec::new())),
        ("as synced".to_owned(), synced["-wal"].clone()),
        ("of ten commits ago".to_owned(), earlier["-wal"].clone()),
    ];
    for _ in 0..6 {
        let keep = seeded.below(wal.len() as u64) as usize;
        for (keep, zeroed) in [(keep, false), (keep, true), (kept, true)] {
            let name = format!("{keep} of {} bytes, zeroed {zeroed}", wal.len());
            wals.push((name, Some(damaged(&wal, keep, zeroed))));
        }
    }
    let zeros = last["-durovfs"].as_ref().map(|mark| vec![0; mark.len()]);
    let marks = [
        ("newest", last["-durovfs"].clone()),
        ("of ten commits ago", earlier["-durovfs"].clone()),
        ("as synced", synced["-durovfs"].clone()),
        ("of zeros", zeros),
        ("gone", None),
    ];
    for (wal_name, wal) in &wals {
        for (mark_name, mark) in &marks {
            let files = Copied::from([
                ("", synced[""].clone()),
                ("-wal", wal.clone()),
                ("-durovfs", mark.clone()),
            ]);
            put_back(&database, &files);
            let (mut app, reply) = App::start(&cluster, &database);
            let what = format!("WAL {wal_name}, mark {mark_name}");
            reply
                .result
                .unwrap_or_else(|error| panic!("{what}: {error:?}"));
            assert_eq!(count(&mut app), 40, "{what}");
            drop(app);
        }
    }
    let mut app = App::open(&cluster, &database);
    insert(&mut app, 41, 42);
    app.close();
    assert_level(&cluster, &database);
    cluster.stop();
}

#[test]
fn a_file_that_is_ahead_or_different_is_refused_and_left_alone() {
    // Broken: what somebody wrote or restored by hand would be overwritten, or be built upon.
    let mut cluster = Cluster::start(ClusterOptions::default());
    let database = cluster.scratch().join("app.db");
    let mut app = begin(&cluster, &database);
    insert(&mut app, 1, 5);
    app.close();
    let clean = copy(&database);
    plain_query(&database, "INSERT INTO t VALUES (99, 'outside')");
    let foreign = copy(&database);
    let (app, reply) = App::start(&cluster, &database);
    assert_eq!(reply.result.unwrap_err().code & 0xff, CANTOPEN);
    drop(app);
    assert_eq!(copy(&database)[""], foreign[""], "it was written to");
    put_back(&database, &clean);
    let mut app = App::open(&cluster, &database);
    assert_eq!(count(&mut app), 5);
    insert(&mut app, 6, 6);
    app.close();
    assert_level(&cluster, &database);
    cluster.stop();
}

fn hosts() -> Hosts {
    // Small chunks, so that a log has many, and a snapshot.
    Hosts::start(&ClusterOptions {
        chunk_interval: "300ms",
        chunk_bytes: "256KiB",
        ..ClusterOptions::default()
    })
}

fn open_by_force(hosts: &Hosts, host: &str) -> App {
    App::open_on(&hosts.client_config(host), &hosts.takeover_uri(host, NAME))
}

/// Several megabytes, most of them written more than once, and archived.
fn fill(hosts: &Hosts, app: &mut App, host: &str, rounds: u64) {
    app.run("CREATE TABLE IF NOT EXISTS big (n INTEGER PRIMARY KEY, filling BLOB)");
    for round in 0..rounds {
        app.run(&format!(
            "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c WHERE n < 400) \
             INSERT OR REPLACE INTO big SELECT n + {}, randomblob(3000) FROM c",
            round % 4 * 100
        ));
    }
    hosts.wait_archived(host, NAME, LIMIT);
}

fn content(app: &mut App) -> Vec<Vec<Value>> {
    app.run("SELECT count(*), sum(length(filling)), sum(unicode(hex(filling))) FROM big")
}

fn assert_same_on(hosts: &Hosts, host: &str) {
    hosts.wait_archived(host, NAME, LIMIT);
    let restored: PathBuf = hosts.scratch().join("restored.db");
    hosts.restore(host, NAME, &restored);
    let image = image_of(&hosts.file(host, NAME), hosts.scratch());
    assert_same("archive", &std::fs::read(&restored).unwrap(), &image);
    std::fs::remove_file(restored).unwrap();
}

#[test]
fn a_machine_that_never_saw_the_database_hydrates_from_archive_and_replicas() {
    // Broken: a takeover would end at "use restore", or with a file that lacks the archive's end or
    // the replicas' tail.
    let mut seeded = Seeded::from_environment("hydrate");
    let hosts = hosts();
    let [a, b] = HOSTS;
    let mut on_a = open_by_force(&hosts, a);
    on_a.run("PRAGMA journal_mode=WAL");
    fill(&hosts, &mut on_a, a, 12);
    // Not archived yet when the other host opens: the replicas' tail.
    on_a.run("UPDATE big SET filling = randomblob(10) WHERE n < 50");
    let expected = content(&mut on_a);
    let (config, uri) = (hosts.client_config(b), hosts.takeover_uri(b, NAME));
    // Killed in the middle, it begins again.
    for _ in 0..4 {
        let mut child = App::spawn(&config);
        child.begin_opening(&uri);
        std::thread::sleep(seeded.between(Duration::ZERO, Duration::from_millis(600)));
        drop(child);
    }
    let mut on_b = open_by_force(&hosts, b);
    assert_eq!(content(&mut on_b), expected);
    // And the old host's file lacks more than any journal holds.
    fill(&hosts, &mut on_b, b, 12);
    let expected = content(&mut on_b);
    on_b.close();
    assert_same_on(&hosts, b);
    on_a.close();
    let mut on_a = open_by_force(&hosts, a);
    assert_eq!(content(&mut on_a), expected);
    on_a.run("DELETE FROM big WHERE n % 3 = 0");
    on_a.close();
    assert_same_on(&hosts, a);
}

#[test]
fn a_damaged_archive_hydrates_nothing() {
    // Broken: a new machine would get a file made of damaged bytes, or half a file that opens.
    let hosts = hosts();
    let [a, b] = HOSTS;
    let mut on_a = open_by_force(&hosts, a);
    on_a.run("PRAGMA journal_mode=WAL");
    fill(&hosts, &mut on_a, a, 4);
    let expected = content(&mut on_a);
    on_a.close();
    let objects: Vec<PathBuf> = files_below(&hosts.archive());
    let whole: Vec<Vec<u8>> = objects
        .iter()
        .map(|path| std::fs::read(path).unwrap())
        .collect();
    for (path, bytes) in objects.iter().zip(&whole) {
        let mut bytes = bytes.clone();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(path, bytes).unwrap();
    }
    let (config, uri) = (hosts.client_config(b), hosts.takeover_uri(b, NAME));
    let (app, reply) = App::start_on(&config, &uri);
    assert_eq!(reply.result.unwrap_err().code & 0xff, CANTOPEN);
    drop(app);
    for (path, bytes) in objects.iter().zip(&whole) {
        std::fs::write(path, bytes).unwrap();
    }
    let mut on_b = open_by_force(&hosts, b);
    assert_eq!(content(&mut on_b), expected);
    on_b.close();
    assert_same_on(&hosts, b);
}

/// A replica's journal as it is when it lost its power while it began anew behind the archive: the
/// first record of the append is there, and the entry that would have told of the log is not.
fn begin_anew(cluster: &Cluster, node: &str) {
    let directory = cluster.node_path(node).join("data/journal");
    let (journal, states) = Journal::open(JournalOptions {
        segment_bytes: 64 << 20,
        limit_bytes: 16 << 30,
        ..JournalOptions::new(directory, true)
    })
    .expect("open the journal");
    let (done, written) = std::sync::mpsc::channel();
    let DatabaseState { database, last, .. } = states[0].clone();
    let record = Record::Restart { database, at: last };
    let told = move |result| done.send(result).expect("tell");
    journal.append(vec![record], Box::new(told));
    written.recv().expect("an answer").expect("append");
    journal.close();
}

#[test]
fn replicas_that_all_began_anew_are_not_an_empty_database() {
    // Broken: a host with no log of its own would be told of no transaction by anybody, show an
    // empty database, and write over the one that is in the archive.
    let mut cluster = Cluster::start(ClusterOptions {
        replicas: 3,
        ..ClusterOptions::default()
    });
    let database = cluster.scratch().join("app.db");
    let mut app = begin(&cluster, &database);
    insert(&mut app, 1, 20);
    app.close();
    cluster.wait_level(&database, LIMIT);
    cluster.wait_archived(&database, LIMIT);
    cluster.stop();
    for node in cluster.replicas() {
        begin_anew(&cluster, &node);
    }
    std::fs::remove_dir_all(cluster.node_path("primary").join("data")).unwrap();
    for piece in ["", "-wal", "-shm", "-durovfs"] {
        let _ = std::fs::remove_file(beside(&database, piece));
    }
    // As long as the archive cannot be asked, nobody knows.
    let (archive, away) = (cluster.archive(), cluster.scratch().join("away"));
    std::fs::rename(&archive, &away).unwrap();
    cluster.start_again();
    let (refused, reply) = App::start(&cluster, &database);
    assert_eq!(reply.result.unwrap_err().code & 0xff, CANTOPEN);
    drop(refused);
    std::fs::remove_dir_all(&archive).unwrap_or_default();
    std::fs::rename(&away, &archive).unwrap();

    let mut app = App::open(&cluster, &database);
    assert_eq!(count(&mut app), 20);
    insert(&mut app, 21, 25);
    assert_eq!(count(&mut app), 25);
    app.close();
    assert_level(&cluster, &database);
}

fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files_below(&path));
        } else {
            found.push(path);
        }
    }
    found
}
