//! How long a takeover takes: from the first call on the new host to its first commit, on a
//! cluster of real processes on this machine. Prints a table; `scripts/bench-takeover` builds what
//! it needs.
//!
//! usage: takeover-bench [ROUNDS [DATABASE_KILOBYTES]]

use durovfs_tests::app::App;
use durovfs_tests::cluster::ClusterOptions;
use durovfs_tests::hosts::{HOSTS, Hosts};
use std::time::{Duration, Instant};

const NAME: &str = "bench";
const DEFAULT_ROUNDS: usize = 20;
const DEFAULT_KILOBYTES: usize = 10_000;

/// Times of one kind of takeover.
struct Row {
    what: &'static str,
    times: Vec<Duration>,
}

fn main() {
    let mut numbers = std::env::args().skip(1).map(|text| {
        text.parse()
            .unwrap_or_else(|_| panic!("{text:?} is not a number"))
    });
    let rounds = numbers.next().unwrap_or(DEFAULT_ROUNDS);
    let kilobytes = numbers.next().unwrap_or(DEFAULT_KILOBYTES);
    let mut hosts = Hosts::start(&ClusterOptions::default());
    let mut app = open(&hosts, 0, false);
    app.run("PRAGMA journal_mode=WAL");
    app.run("CREATE TABLE t (n INTEGER PRIMARY KEY, filling BLOB)");
    app.run(&format!(
        "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c WHERE n < {kilobytes}) \
         INSERT INTO t SELECT n, randomblob(1000) FROM c"
    ));
    app.close();
    let cold = time_takeover(&hosts, 1);
    let mut rows = vec![
        Row {
            what: "host that never saw the database",
            times: vec![cold],
        },
        Row {
            what: "warm copy, old primary alive (forced)",
            times: (0..rounds)
                .map(|at| time_takeover(&hosts, at % 2))
                .collect(),
        },
    ];
    let dead: Vec<Duration> = (0..rounds.div_ceil(4))
        .map(|at| {
            let (old, new) = (HOSTS[1 - at % 2], at % 2);
            hosts.kill(old);
            let begin = Instant::now();
            let mut app = open(&hosts, new, false);
            app.run("INSERT INTO t (filling) VALUES (1)");
            let time = begin.elapsed();
            app.close();
            hosts.start_node(old);
            // The next round kills a primary that everybody takes for alive.
            let _ = time_takeover(&hosts, new);
            time
        })
        .collect();
    rows.push(Row {
        what: "warm copy, old primary killed at that moment",
        times: dead,
    });
    println!("first call on the new host to first commit, database of {kilobytes} KB:");
    for Row { what, mut times } in rows {
        times.sort();
        let at = |percent: usize| times[(times.len() * percent / 100).min(times.len() - 1)];
        println!(
            "{what:46} n {:3}  p50 {:7.1} ms  max {:7.1} ms",
            times.len(),
            at(50).as_secs_f64() * 1e3,
            at(100).as_secs_f64() * 1e3
        );
    }
}

fn open(hosts: &Hosts, host: usize, takeover: bool) -> App {
    let host = HOSTS[host];
    let uri = match takeover {
        true => hosts.takeover_uri(host, NAME),
        false => hosts.uri(host, NAME),
    };
    App::open_on(&hosts.client_config(host), &uri)
}

/// Takes the database over and commits; the time includes the start of a Python process.
fn time_takeover(hosts: &Hosts, host: usize) -> Duration {
    let begin = Instant::now();
    let mut app = open(hosts, host, true);
    app.run("INSERT INTO t (filling) VALUES (1)");
    let time = begin.elapsed();
    app.close();
    time
}
