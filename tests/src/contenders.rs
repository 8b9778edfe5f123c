//! Clients of one database on two hosts (`programs/contender.py`), started and killed as the hosts
//! are, and the history of all that they said.

use crate::binaries::{PYTHON, binaries, program};
use crate::hosts::{HOSTS, Hosts};
use crate::ledger::{History, schema};
use crate::nemesis::Applications;
use rustix::process::{Pid, Signal, kill_process};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Clients on each host.
const CLIENTS: u64 = 2;
/// How long a COMMIT waits, in milliseconds: short, so that many outcomes are unknown.
const TIMEOUT_MS: u64 = 2_000;
/// Pause after each transaction, in milliseconds: the other clients of the host get their turns.
const PAUSE_MS: u64 = 4;
/// Pause between two looks.
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// The numbers of a host's clients.
pub fn clients_of(host: &str) -> std::ops::Range<u64> {
    let first = HOSTS.iter().position(|name| *name == host);
    let first = first.expect("an application host") as u64 * CLIENTS;
    first..first + CLIENTS
}

#[derive(Debug)]
struct Client {
    process: Child,
    listener: JoinHandle<()>,
}

/// The clients of both hosts.
#[derive(Debug)]
pub struct Contenders {
    database: String,
    running: BTreeMap<u64, Client>,
    history: Arc<Mutex<History>>,
}

impl Contenders {
    /// Makes the tables through the first host; no client runs yet.
    ///
    /// # Panics
    /// When they cannot be made.
    pub fn new(hosts: &Hosts, database: &str) -> Self {
        let host = HOSTS[0];
        let python = hosts.command(host, PYTHON);
        let (mut app, reply) = crate::app::App::start_by(python, &hosts.uri(host, database));
        reply.result.expect("open the database");
        app.run("PRAGMA journal_mode=WAL");
        for statement in schema() {
            app.run(&statement);
        }
        app.close();
        Self {
            database: database.to_owned(),
            running: BTreeMap::new(),
            history: Arc::default(),
        }
    }

    /// All that was said so far.
    ///
    /// # Panics
    /// When a client said something that is no history.
    pub fn history(&self) -> History {
        self.history.lock().expect("the history").clone()
    }

    /// Waits until each client of a host has committed this many transactions from now on.
    ///
    /// # Panics
    /// When that takes longer than `limit`.
    pub fn wait_committed(&self, host: &str, count: usize, limit: Duration) {
        let deadline = Instant::now() + limit;
        for client in clients_of(host) {
            let wanted = self.history().committed(client) + count;
            while self.history().committed(client) < wanted {
                assert!(
                    Instant::now() < deadline,
                    "client {client} of {host}: no {count} commits within {limit:?}"
                );
                std::thread::sleep(POLL_INTERVAL);
            }
        }
    }

    fn start_client(&mut self, hosts: &Hosts, host: &str, client: u64, uri: &Path) {
        let first = self.history().next(client);
        let mut process = hosts
            .command(host, PYTHON)
            .arg(program("contender.py"))
            .arg(&binaries().extension)
            .arg(uri)
            .args([client, first, TIMEOUT_MS, PAUSE_MS].map(|number| number.to_string()))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("start a client");
        let mut output = BufReader::new(process.stdout.take().expect("its output"));
        let history = Arc::clone(&self.history);
        let listener = std::thread::spawn(move || {
            let mut line = String::new();
            // Killed in the middle of a line, it has not said that line.
            while output.read_line(&mut line).is_ok() && line.ends_with('\n') {
                history
                    .lock()
                    .expect("the history")
                    .note(client, line.trim_end());
                line.clear();
            }
        });
        self.running.insert(client, Client { process, listener });
    }
}

impl Applications for Contenders {
    fn database(&self) -> &str {
        &self.database
    }

    fn start(&mut self, hosts: &Hosts, host: &str) {
        let uri = hosts.uri(host, &self.database);
        for client in clients_of(host) {
            if !self.running.contains_key(&client) {
                self.start_client(hosts, host, client, &uri);
            }
        }
    }

    fn kill(&mut self, host: &str) {
        for client in clients_of(host) {
            if let Some(mut running) = self.running.remove(&client) {
                running.process.kill().expect("kill a client");
                running.process.wait().expect("wait for a client");
                running.listener.join().expect("listen to a client");
            }
        }
    }

    fn signal(&self, host: &str, signal: Signal) {
        for client in clients_of(host).filter_map(|client| self.running.get(&client)) {
            let pid = Pid::from_raw(client.process.id().cast_signed()).expect("a pid");
            kill_process(pid, signal).expect("signal a client");
        }
    }
}

impl Drop for Contenders {
    fn drop(&mut self) {
        for client in self.running.values_mut() {
            let _ = client.process.kill();
            let _ = client.process.wait();
        }
    }
}
