//! Two application hosts and one database: who is refused, who takes over, and what becomes of the
//! commits and of the file of the one that was the primary.

use durovfs_tests::app::{App, CANTOPEN, READONLY, SqlError, UNKNOWN};
use durovfs_tests::cluster::{ClusterOptions, text};
use durovfs_tests::hosts::{HOSTS, Hosts};
use durovfs_tests::image::{assert_same, image_of};
use durovfs_tests::outcomes::{Outcomes, Told, Writer, create_tables_on};
use durovfs_tests::seed::Seeded;
use serde_json::Value;
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(60);
const NAME: &str = "bank";
const ENDLESS: u64 = 1 << 40;
const TIMEOUT_MS: u64 = 10_000;
const A: &str = HOSTS[0];
const B: &str = HOSTS[1];

fn open(hosts: &Hosts, host: &str) -> App {
    App::open_on(&hosts.client_config(host), &hosts.uri(host, NAME))
}

fn open_by_force(hosts: &Hosts, host: &str) -> App {
    App::open_on(&hosts.client_config(host), &hosts.takeover_uri(host, NAME))
}

/// A table with one row, made on the first host; its application goes on.
fn begin(hosts: &Hosts) -> App {
    let mut app = open(hosts, A);
    app.run("PRAGMA journal_mode=WAL");
    app.run("CREATE TABLE t (n INTEGER PRIMARY KEY, host TEXT)");
    app.run("INSERT INTO t VALUES (1, 'a')");
    app
}

fn rows(app: &mut App) -> Vec<Value> {
    let rows = app.run("SELECT n FROM t ORDER BY n");
    rows.into_iter().map(|row| row[0].clone()).collect()
}

/// Both hosts' files, once opened, and the archive have the same content.
fn assert_all_level(hosts: &Hosts, last_primary: &str) {
    hosts.wait_archived(last_primary, NAME, LIMIT);
    let restored = hosts.scratch().join("restored.db");
    hosts.restore(last_primary, NAME, &restored);
    let restored = std::fs::read(&restored).unwrap();
    let image = image_of(&hosts.file(last_primary, NAME), hosts.scratch());
    assert_same("archive", &restored, &image);
}

#[test]
fn a_live_primary_is_named_and_is_taken_over_by_force_only() {
    // Broken: two hosts would take turns without anybody knowing, or an operator could not move a
    // database; the old host would go on as if its commits counted, or never be put right.
    let hosts = Hosts::start(&ClusterOptions::default());
    let mut on_a = begin(&hosts);
    let (refused, reply) = App::start_on(&hosts.client_config(B), &hosts.uri(B, NAME));
    assert_eq!(reply.result.unwrap_err().code & 0xff, CANTOPEN);
    drop(refused);
    // The reason names the host; a second open says so as well.
    let log = text(&std::fs::read(hosts.node_path("replica-1").join("sidecar.log")).unwrap());
    assert!(!log.contains("claim refused"), "nothing is claimed: {log}");
    on_a.run("INSERT INTO t VALUES (2, 'a')");

    let unknown = hosts.durovfs(B, &["takeover", "nothing"]);
    assert_eq!(unknown.status.code(), Some(3), "{unknown:?}");
    let taken = hosts.durovfs(B, &["takeover", NAME, "--json"]);
    assert!(taken.status.success(), "{}", text(&taken.stderr));
    let taken: Value = serde_json::from_slice(&taken.stdout).unwrap();
    assert_eq!(
        (&taken["taken_from"], &taken["primary"]),
        (&A.into(), &B.into())
    );
    let refused = on_a.execute("INSERT INTO t VALUES (3, 'a')").result;
    let refused = refused.unwrap_err();
    assert_eq!(refused.code & 0xff, READONLY, "{refused:?}");
    let reason = on_a.value("SELECT durovfs_last_error()");
    assert!(reason.as_str().unwrap().contains(B), "{reason}");
    assert_eq!(rows(&mut on_a), [1, 2]);

    let mut on_b = open(&hosts, B);
    assert_eq!(rows(&mut on_b), [1, 2]);
    on_b.run("INSERT INTO t VALUES (4, 'b')");
    // Not taken back by itself, nor by opening it again.
    let again = on_a.execute("INSERT INTO t VALUES (5, 'a')").result;
    assert_eq!(again.unwrap_err().code & 0xff, READONLY);
    on_a.close();
    let (refused, reply) = App::start_on(&hosts.client_config(A), &hosts.uri(A, NAME));
    assert_eq!(reply.result.unwrap_err().code & 0xff, CANTOPEN);
    drop(refused);
    let mut on_a = open_by_force(&hosts, A);
    assert_eq!(rows(&mut on_a), [1, 2, 4]);
    on_a.run("INSERT INTO t VALUES (6, 'a')");
    let refused = on_b.execute("INSERT INTO t VALUES (7, 'b')").result;
    assert_eq!(refused.unwrap_err().code & 0xff, READONLY);
    on_b.close();
    on_a.close();
    assert_all_level(&hosts, A);
}

/// What the final log must hold of what was told on both hosts.
fn check(hosts: &Hosts, last_primary: &str, told: &[(u64, &Outcomes)]) {
    let mut app = open(hosts, last_primary);
    app.run("SELECT count(*) FROM rows");
    app.close();
    assert_all_level(hosts, last_primary);
    let restored = hosts.scratch().join("restored.db");
    let file = hosts.file(last_primary, NAME);
    for (writer, outcomes) in told {
        let in_archive = outcomes.check("restored", &restored, *writer);
        let in_file = outcomes.check("file", &file, *writer);
        assert_eq!(in_archive, in_file, "an unknown commit is in one of them");
    }
    std::fs::remove_file(&restored).unwrap();
}

#[test]
fn a_forced_takeover_under_load_keeps_what_was_told_on_either_host() {
    // Broken: a commit that returned OK on the old host would be lost in the change, or one that
    // was refused there would be in the log.
    let hosts = Hosts::start(&ClusterOptions::default());
    create_tables_on(&hosts.client_config(A), &hosts.uri(A, NAME), 2);
    let numbers = |writer| [writer, 1, ENDLESS, TIMEOUT_MS, 0];
    let mut on_a = Writer::start_on(&hosts.client_config(A), &hosts.uri(A, NAME), numbers(1));
    on_a.wait_committed(30, LIMIT);
    let taken = hosts.durovfs(B, &["takeover", NAME]);
    assert!(taken.status.success(), "{}", text(&taken.stderr));
    let mut on_b = Writer::start_on(&hosts.client_config(B), &hosts.uri(B, NAME), numbers(2));
    on_b.wait_committed(30, LIMIT);
    let (on_a, on_b) = (on_a.kill(), on_b.kill());
    let refused = on_a.count(|told| matches!(told, Told::NotCommitted(8)));
    let unknown = on_a.count(|told| *told == Told::Unknown);
    println!("on the old host: {refused} refused as read-only, {unknown} unknown");
    assert!(refused + unknown > 0, "the old host was never told");
    check(&hosts, B, &[(1, &on_a), (2, &on_b)]);
    // The old host's file is put right when it is the primary again.
    let mut app = open_by_force(&hosts, A);
    app.run("SELECT count(*) FROM rows");
    app.close();
    check(&hosts, A, &[(1, &on_a), (2, &on_b)]);
}

/// The application of a host that is no longer the primary is told so. A commit that it handed to
/// its old sidecar's ear, which was dead by then, is unknown; the next is refused.
fn assert_told(app: &mut App, sql: &str) {
    let code = |app: &mut App| app.execute(sql).result.unwrap_err().code;
    let first = code(app);
    if first & 0xff != READONLY {
        assert_eq!((first, code(app) & 0xff), (UNKNOWN, READONLY));
    }
}

#[test]
fn a_dead_primary_needs_no_operator() {
    // Broken: an application would wait for somebody to wake up, or longer than the three seconds
    // that a silent primary counts as alive.
    let mut hosts = Hosts::start(&ClusterOptions::default());
    let mut on_a = begin(&hosts);
    on_a.run("INSERT INTO t VALUES (2, 'a')");
    hosts.kill(A);
    let killed = Instant::now();
    let mut on_b = open(&hosts, B);
    println!("opened {:?} after the kill", killed.elapsed());
    assert_eq!(rows(&mut on_b), [1, 2]);
    on_b.run("INSERT INTO t VALUES (3, 'b')");
    println!("committed {:?} after the kill", killed.elapsed());
    // The old host comes back, and its application goes on asking.
    hosts.start_node(A);
    assert_told(&mut on_a, "INSERT INTO t VALUES (4, 'a')");
    on_b.run("INSERT INTO t VALUES (5, 'b')");
    on_a.close();
    // Now that one is dead, with a commit that its replicas hold and its file does not.
    hosts.kill(B);
    let mut on_a = open(&hosts, A);
    assert_eq!(rows(&mut on_a), [1, 2, 3, 5]);
    on_a.run("INSERT INTO t VALUES (6, 'a')");
    hosts.start_node(B);
    assert_told(&mut on_b, "INSERT INTO t VALUES (7, 'b')");
    on_b.close();
    on_a.close();
    assert_all_level(&hosts, A);
}

#[test]
fn a_commit_in_flight_at_the_takeover_is_what_the_log_says() {
    // Broken: the old host's file would keep, or lack, a commit against the log.
    let mut hosts = Hosts::start(&ClusterOptions::default());
    // With a replica that holds the commit it may be adopted; without, it cannot be.
    for (round, (deferred, holder_is_asked)) in
        [(false, true), (true, false)].into_iter().enumerate()
    {
        let mut on_a = open_by_force(&hosts, A);
        on_a.run("PRAGMA journal_mode=WAL");
        on_a.run("CREATE TABLE IF NOT EXISTS t (n INTEGER PRIMARY KEY, host TEXT)");
        on_a.run("PRAGMA durovfs_timeout=30000");
        if deferred {
            on_a.run("PRAGMA durovfs_durability=deferred");
        }
        let first = round as u64 * 10 + 1;
        on_a.run(&format!("INSERT INTO t VALUES ({first}, 'a')"));
        on_a.value("SELECT durovfs_wait()");
        let insert = format!("INSERT INTO t VALUES ({}, 'a')", first + 1);
        let in_flight = commit_that_one_replica_has(&mut hosts, on_a, insert, deferred);
        if !holder_is_asked {
            hosts.freeze("replica-1");
        }
        let mut on_b = open_by_force(&hosts, B);
        on_b.run(&format!("INSERT INTO t VALUES ({}, 'b')", first + 2));
        let expected = rows(&mut on_b);
        if !holder_is_asked {
            let lost = Value::from(first + 1);
            assert!(
                !expected.contains(&lost),
                "no replica that was asked has it"
            );
            hosts.thaw("replica-1");
        }
        // The old primary hears of it, and so does its application.
        hosts.thaw(A);
        let (on_a, told) = in_flight.join().unwrap();
        println!("deferred {deferred}: told {told:?}");
        assert_eq!(told.unwrap_err().code, UNKNOWN);
        on_b.close();
        drop(on_a);
        let mut on_a = open_by_force(&hosts, A);
        assert_eq!(rows(&mut on_a), expected, "deferred {deferred}");
        on_a.close();
        assert_all_level(&hosts, A);
        std::fs::remove_file(hosts.scratch().join("restored.db")).unwrap();
    }
}

type InFlight = std::thread::JoinHandle<(App, Result<(), SqlError>)>;

/// A commit of the first host that only the first replica holds. Its sidecar is frozen then, so
/// that it hears of nothing that happens.
fn commit_that_one_replica_has(
    hosts: &mut Hosts,
    mut app: App,
    insert: String,
    deferred: bool,
) -> InFlight {
    let others = ["replica-2", "replica-3", "replica-4", "replica-5"];
    others.iter().for_each(|node| hosts.freeze(node));
    let in_flight = std::thread::spawn(move || {
        let told = if deferred {
            app.run(&insert);
            app.execute("SELECT durovfs_wait()").result.map(drop)
        } else {
            app.execute(&insert).result.map(drop)
        };
        (app, told)
    });
    std::thread::sleep(Duration::from_millis(300));
    hosts.freeze(A);
    // What was on its way to the others is lost with their processes.
    for node in others {
        hosts.kill(node);
        hosts.start_node(node);
    }
    in_flight
}

#[test]
fn a_paused_primary_cannot_write_over_its_successor() {
    // Broken: what the old sidecar does when it wakes, before it hears of the new one, would cut
    // commits out of the log that returned OK.
    let hosts = Hosts::start(&ClusterOptions::default());
    create_tables_on(&hosts.client_config(A), &hosts.uri(A, NAME), 2);
    let mut told = Outcomes::default();
    for _ in 0..3 {
        let mut on_a = open_by_force(&hosts, A);
        on_a.run("PRAGMA durovfs_durability=deferred");
        on_a.run("PRAGMA durovfs_timeout=20000");
        hosts.freeze(A);
        // They wait in the paused sidecar's ear.
        for _ in 0..50 {
            on_a.run("UPDATE tally SET n = n + 1 WHERE writer = 1");
        }
        let taken = hosts.durovfs(B, &["takeover", NAME]);
        assert!(taken.status.success(), "{}", text(&taken.stderr));
        // Before its own signs of life are overdue, so that it takes its replicas for answering.
        hosts.thaw(A);
        let first = told.next_row();
        let numbers = [2, first, ENDLESS, TIMEOUT_MS, 0];
        let mut on_b = Writer::start_on(&hosts.client_config(B), &hosts.uri(B, NAME), numbers);
        on_b.wait_committed(20, LIMIT);
        let lost = on_a.execute("SELECT durovfs_wait()").result.unwrap_err();
        assert_ne!(lost.code, 0, "{lost:?}");
        let before = on_b.so_far().committed();
        on_b.wait_committed(before + 20, LIMIT);
        told.extend(on_b.kill());
    }
    check(&hosts, B, &[(2, &told)]);
}

#[test]
fn what_became_of_a_commit_is_found_out_in_the_archive() {
    // Broken: an application would be told that its commit is certainly not committed, because
    // another host was the primary in between and the entry is in no journal any more.
    let mut hosts = Hosts::start(&ClusterOptions::default());
    let mut on_a = begin(&hosts);
    on_a.run("PRAGMA durovfs_timeout=60000");
    let slow = ["replica-1", "replica-2", "replica-3"];
    slow.iter().for_each(|node| hosts.freeze(node));
    let committing = std::thread::spawn(move || {
        let told = on_a.execute("INSERT INTO t VALUES (2, 'a')").result;
        (on_a, told.map(drop))
    });
    std::thread::sleep(Duration::from_millis(300));
    hosts.kill(A);
    // What was on its way to them arrives: a quorum has it, and nobody heard.
    slow.iter().for_each(|node| hosts.thaw(node));
    let mut on_b = open(&hosts, B);
    assert_eq!(rows(&mut on_b), [1, 2]);
    on_b.run("INSERT INTO t VALUES (3, 'b')");
    hosts.wait_archived(B, NAME, LIMIT);
    on_b.run("INSERT INTO t VALUES (4, 'b')");
    hosts.wait_archived(B, NAME, LIMIT);
    on_b.close();
    hosts.kill(B);
    hosts.start_node(A);
    let (on_a, told) = committing.join().unwrap();
    assert_eq!(told, Ok(()), "it is in the archive");
    drop(on_a);
    let mut on_a = open(&hosts, A);
    assert_eq!(rows(&mut on_a), [1, 2, 3, 4]);
    on_a.close();
    assert_all_level(&hosts, A);
}

#[test]
fn takeovers_to_and_fro_with_kills_keep_one_history() {
    // Broken: a commit would be lost, or come to life, in one of many changes under load.
    let mut seeded = Seeded::from_environment("takeover");
    let mut hosts = Hosts::start(&ClusterOptions::default());
    create_tables_on(&hosts.client_config(A), &hosts.uri(A, NAME), 2);
    let numbers = |writer| [writer, 1, ENDLESS, TIMEOUT_MS, 2];
    let start = |hosts: &Hosts, host: usize| {
        let host_name = HOSTS[host];
        let writer = host as u64 + 1;
        Writer::start_on(
            &hosts.client_config(host_name),
            &hosts.uri(host_name, NAME),
            numbers(writer),
        )
    };
    let writers = [start(&hosts, 0), start(&hosts, 1)];
    let mut last = 0;
    for round in 0..takeovers() {
        std::thread::sleep(seeded.between(Duration::ZERO, Duration::from_millis(400)));
        last = 1 - last;
        if seeded.below(3) == 0 {
            // The primary dies; the other host's application takes over by opening.
            let dead = HOSTS[1 - last];
            hosts.kill(dead);
            let before = writers[last].so_far().committed();
            wait_for_commits(&writers[last], before + 1);
            hosts.start_node(dead);
        } else {
            let taken = hosts.durovfs(HOSTS[last], &["takeover", NAME]);
            let error = text(&taken.stderr);
            assert!(taken.status.success(), "round {round}: {error}");
        }
        let before = writers[last].so_far().committed();
        wait_for_commits(&writers[last], before + 1);
    }
    let told: Vec<Outcomes> = writers.into_iter().map(Writer::kill).collect();
    for (host, told) in HOSTS.iter().zip(&told) {
        let unknown = told.count(|told| *told == Told::Unknown);
        println!("{host}: {} commits, {unknown} unknown", told.committed());
    }
    let last = HOSTS[last];
    check(&hosts, last, &[(1, &told[0]), (2, &told[1])]);
}

fn wait_for_commits(writer: &Writer, count: usize) {
    let deadline = Instant::now() + LIMIT;
    while writer.so_far().committed() < count {
        assert!(Instant::now() < deadline, "no commit within {LIMIT:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// `DUROVFS_TAKEOVERS`, or what a test run has time for.
fn takeovers() -> u64 {
    let text = std::env::var("DUROVFS_TAKEOVERS");
    text.map_or(12, |text| text.parse().unwrap())
}
