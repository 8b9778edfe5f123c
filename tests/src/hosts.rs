//! A cluster with two application hosts: seven sidecars as `durovfs init` sets them up, two that
//! applications talk to and five replicas, each a process of its own. Each application host has a
//! directory of its own for database files, so that the same name means two files. On demand each
//! node is a machine of its own: with an address in a network whose links can be cut, a disk that
//! can lose its power or be full, and a clock that can be set.

use crate::binaries::binaries;
use crate::clocks::Clock;
use crate::cluster::{ClusterOptions, text};
use crate::disks::Disk;
use crate::namespaces::Network;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::collections::BTreeMap;
use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// The application hosts.
pub const HOSTS: [&str; 2] = ["host-a", "host-b"];
/// Longest wait for a node to start on a busy machine.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// Pause between two looks.
const POLL_INTERVAL: Duration = Duration::from_millis(20);
/// What a sidecar logs when it serves.
const READY: &str = "sidecar is ready";
/// Port of every node that has an address of its own.
const PORT: u16 = 4400;
/// Size of a machine's disk: several of its journals, and soon filled.
const DISK_MEGABYTES: u32 = 192;
/// Journals of machines, in bytes: small, so that files of it are begun and dropped all the time.
const MACHINE_JOURNAL: [(&str, u64); 2] = [("segment_bytes", 4 << 20), ("limit_bytes", 64 << 20)];

/// The running cluster.
#[derive(Debug)]
pub struct Hosts {
    nodes: BTreeMap<String, Child>,
    network: Option<Network>,
    // Unmounted before the directory is removed.
    disks: BTreeMap<String, Disk>,
    clocks: BTreeMap<String, Clock>,
    directory: tempfile::TempDir,
}

impl Hosts {
    /// Makes a cluster in a new directory and starts all of it.
    ///
    /// # Panics
    /// When it does not start.
    pub fn start(options: &ClusterOptions) -> Self {
        let mut hosts = Self::new();
        hosts.start_all(options);
        hosts
    }

    /// The same with a machine for each node. The archive is not reached through their network.
    ///
    /// # Errors
    /// What cannot be had here.
    ///
    /// # Panics
    /// When it does not start.
    pub fn start_machines(options: &ClusterOptions) -> Result<Self, String> {
        let mut hosts = Self::new();
        let names = hosts.names();
        hosts.network = Some(Network::make(&names)?);
        for name in names {
            let directory = hosts.scratch().join("machines").join(&name);
            std::fs::create_dir_all(&directory).expect("make a machine's directory");
            let disk = Disk::make(&directory, DISK_MEGABYTES)?;
            hosts.disks.insert(name.clone(), disk);
            hosts.clocks.insert(name, Clock::make(&directory)?);
        }
        hosts.start_all(options);
        Ok(hosts)
    }

    fn new() -> Self {
        let directory = tempfile::Builder::new().prefix("durovfs-").tempdir();
        Self {
            nodes: BTreeMap::new(),
            network: None,
            disks: BTreeMap::new(),
            clocks: BTreeMap::new(),
            directory: directory.expect("make a directory"),
        }
    }

    fn start_all(&mut self, options: &ClusterOptions) {
        self.init(options);
        for node in self.names() {
            self.spawn(&node);
        }
        for node in self.names() {
            self.wait_ready(&node);
        }
    }

    /// Where each node listens: in the network, or at free ports.
    fn addresses(&self) -> Vec<String> {
        let names = self.names();
        if let Some(network) = &self.network {
            let address = |name: &String| format!("{}:{PORT}", network.address(name));
            return names.iter().map(address).collect();
        }
        // All of them open at once, so that no port is found twice.
        let open = |_| UdpSocket::bind("127.0.0.1:0").expect("find a free port");
        let sockets: Vec<UdpSocket> = names.iter().map(open).collect();
        let address = |socket: &UdpSocket| socket.local_addr().expect("its port").to_string();
        sockets.iter().map(address).collect()
    }

    fn init(&self, options: &ClusterOptions) {
        let names = self.names();
        let addresses = self.addresses();
        let mut command = Command::new(&binaries().durovfs);
        command.arg("init").arg("--dir").arg(self.path());
        for (name, address) in names.iter().zip(&addresses) {
            command.args(["--node", &format!("{name}={address}")]);
            if !HOSTS.contains(&name.as_str()) {
                command.args(["--replica", name]);
            }
        }
        let archive = options
            .archive
            .clone()
            .unwrap_or_else(|| format!("file://{}", self.archive().display()));
        std::fs::create_dir_all(self.archive()).expect("make the archive's directory");
        let output = command.args(["--archive", &archive]).output();
        let output = output.expect("run durovfs init");
        assert!(output.status.success(), "init: {}", text(&output.stderr));
        for name in &names {
            self.configure(name, options);
        }
        let client = std::fs::read_to_string(self.path().join("client.toml")).expect("client.toml");
        for (host, address) in HOSTS.iter().zip(&addresses) {
            let client = client
                .replace(&addresses[0], address)
                .replace(&format!("\"{}\"", HOSTS[0]), &format!("\"{host}\""));
            std::fs::write(self.client_config(host), client).expect("write a client config");
            std::fs::create_dir_all(self.home(host)).expect("make a host's directory");
        }
    }

    fn configure(&self, node: &str, options: &ClusterOptions) {
        let file = self.node_path(node).join("sidecar.toml");
        let config = std::fs::read_to_string(&file).expect("read sidecar.toml");
        let mut settings = vec![
            ("chunk_interval", options.chunk_interval.to_owned()),
            ("chunk_bytes", options.chunk_bytes.to_owned()),
        ];
        if let Some(disk) = self.disks.get(node) {
            settings.push(("data", disk.path().join("data").display().to_string()));
            settings.extend(MACHINE_JOURNAL.map(|(key, bytes)| (key, bytes.to_string())));
        }
        let set = |line: &str| {
            let setting = settings
                .iter()
                .find(|(key, _)| line.split(" = ").next() == Some(key));
            setting.map_or(format!("{line}\n"), |(key, value)| {
                format!("{key} = \"{value}\"\n")
            })
        };
        let config: String = config.lines().map(set).collect();
        std::fs::write(file, config).expect("write sidecar.toml");
    }

    /// Names of all nodes, application hosts first.
    pub fn names(&self) -> Vec<String> {
        let replicas = (1..=5).map(|index| format!("replica-{index}"));
        HOSTS
            .iter()
            .map(|host| (*host).to_owned())
            .chain(replicas)
            .collect()
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("cluster")
    }

    /// A directory for the test's own files.
    pub fn scratch(&self) -> &Path {
        self.directory.path()
    }

    /// The archive's directory.
    pub fn archive(&self) -> PathBuf {
        self.directory.path().join("archive")
    }

    /// The files of a node.
    pub fn node_path(&self, node: &str) -> PathBuf {
        self.path().join("nodes").join(node)
    }

    /// Where a host's applications keep their databases.
    pub fn home(&self, host: &str) -> PathBuf {
        let directory = self.disks.get(host).map_or(self.scratch(), Disk::path);
        directory.join(host)
    }

    /// The network between the machines.
    ///
    /// # Panics
    /// When the nodes are no machines.
    pub fn network(&self) -> &Network {
        self.network.as_ref().expect("the nodes are machines")
    }

    /// The disk of a machine.
    ///
    /// # Panics
    /// When the node is none.
    pub fn disk(&self, node: &str) -> &Disk {
        &self.disks[node]
    }

    /// The clock of a machine.
    ///
    /// # Panics
    /// When the node is none.
    pub fn clock(&self, node: &str) -> &Clock {
        &self.clocks[node]
    }

    /// The power of a machine goes. Its applications must be killed as well, before it comes back.
    ///
    /// # Panics
    /// When the node is no machine, or does not run.
    pub fn lose_power(&mut self, node: &str) {
        self.disks[node].lose_power();
        self.kill(node);
    }

    /// The machine starts again, and its sidecar.
    ///
    /// # Panics
    /// When the node is no machine, runs, or does not start.
    pub fn restore_power(&mut self, node: &str) {
        self.disks[node].start_again();
        self.start_node(node);
    }

    /// A command that runs where a node runs, with the client config of that host.
    pub fn command(&self, host: &str, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = match &self.network {
            Some(network) => network.command(host, program),
            None => Command::new(program),
        };
        if let Some(clock) = self.clocks.get(host) {
            clock.give_to(&mut command);
        }
        command.env("DUROVFS_CONFIG", self.client_config(host));
        command
    }

    /// The client config of a host's applications.
    pub fn client_config(&self, host: &str) -> PathBuf {
        self.path().join(format!("client-{host}.toml"))
    }

    /// A host's file of a database.
    pub fn file(&self, host: &str, name: &str) -> PathBuf {
        self.home(host).join(format!("{name}.db"))
    }

    /// How an application of a host opens a database.
    pub fn uri(&self, host: &str, name: &str) -> PathBuf {
        let file = self.file(host, name);
        format!("file:{}?durovfs_db={name}", file.display()).into()
    }

    /// The same, taking it over from a live primary.
    pub fn takeover_uri(&self, host: &str, name: &str) -> PathBuf {
        format!("{}&durovfs_takeover=1", self.uri(host, name).display()).into()
    }

    /// Starts a node that was killed.
    ///
    /// # Panics
    /// When it runs, or does not start.
    pub fn start_node(&mut self, node: &str) {
        assert!(!self.nodes.contains_key(node), "{node} runs");
        self.spawn(node);
        self.wait_ready(node);
    }

    fn log_file(&self, node: &str) -> PathBuf {
        self.node_path(node).join("sidecar.log")
    }

    fn spawn(&mut self, node: &str) {
        // Anew, so that its readiness is this start's.
        let log = std::fs::File::create(self.log_file(node)).expect("make a log");
        let child = self
            .command(node, &binaries().durovfs)
            .args(["sidecar", "--die-with-stdin", "--config"])
            .arg(self.node_path(node).join("sidecar.toml"))
            // Held open by this process, whose end is the node's.
            .stdin(Stdio::piped())
            .stdout(log.try_clone().expect("share the log"))
            .stderr(log)
            .spawn()
            .expect("start a sidecar");
        self.nodes.insert(node.to_owned(), child);
    }

    fn wait_ready(&self, node: &str) {
        let deadline = Instant::now() + START_TIMEOUT;
        loop {
            let log = std::fs::read(self.log_file(node)).unwrap_or_default();
            if text(&log).contains(READY) {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "{node} does not start: {}",
                text(&log)
            );
            std::thread::sleep(POLL_INTERVAL);
        }
    }

    /// Kills a node with no chance to say goodbye.
    ///
    /// # Panics
    /// When it does not run.
    pub fn kill(&mut self, node: &str) {
        let mut child = self.nodes.remove(node).expect("the node runs");
        child.kill().expect("kill a node");
        child.wait().expect("wait for a node");
    }

    /// Nodes that ended by themselves.
    ///
    /// # Panics
    /// When the system does not say.
    pub fn ended(&mut self) -> Vec<String> {
        let mut ended = Vec::new();
        for (node, child) in &mut self.nodes {
            if let Some(status) = child.try_wait().expect("look at a node") {
                ended.push(format!("{node} ({status})"));
            }
        }
        ended
    }

    /// Sends a signal to a node.
    ///
    /// # Panics
    /// When it does not run.
    pub fn signal(&self, node: &str, signal: Signal) {
        let pid = self.nodes[node].id().cast_signed();
        kill_process(Pid::from_raw(pid).expect("a pid"), signal).expect("signal a node");
    }

    /// Stops a node's process without ending it.
    pub fn freeze(&self, node: &str) {
        self.signal(node, Signal::STOP);
    }

    /// Lets a frozen node go on.
    pub fn thaw(&self, node: &str) {
        self.signal(node, Signal::CONT);
    }

    /// Ends a node as an operator does; its last chunk is uploaded.
    ///
    /// # Panics
    /// When it does not end well.
    pub fn stop(&mut self, node: &str) {
        self.signal(node, Signal::TERM);
        let mut child = self.nodes.remove(node).expect("the node runs");
        let status = child.wait().expect("wait for a node");
        assert!(
            status.success(),
            "{node} ended with {status}\n{}",
            self.logs()
        );
    }

    /// Runs a `durovfs` command on a host.
    ///
    /// # Panics
    /// When the program cannot be run.
    pub fn durovfs(&self, host: &str, args: &[&str]) -> Output {
        self.command(host, &binaries().durovfs)
            .args(args)
            .stdin(Stdio::null())
            .output()
            .expect("run durovfs")
    }

    /// State of a database as a host's sidecar sees it; none when it does not know it.
    pub fn database(&self, host: &str, name: &str) -> Option<Value> {
        let output = self.durovfs(host, &["status", name, "--json"]);
        output
            .status
            .success()
            .then(|| serde_json::from_slice(&output.stdout).expect("status --json prints JSON"))
    }

    /// Waits until a host's view of a database is as the test wants it.
    ///
    /// # Panics
    /// When that takes longer than `limit`.
    pub fn wait_for(
        &self,
        (host, name): (&str, &str),
        what: &str,
        limit: Duration,
        wanted: impl Fn(&Value) -> bool,
    ) -> Value {
        let deadline = Instant::now() + limit;
        loop {
            let state = self.database(host, name);
            if let Some(state) = state.as_ref().filter(|state| wanted(state)) {
                return state.clone();
            }
            let state = state.unwrap_or_default();
            assert!(
                Instant::now() < deadline,
                "{what}: not within {limit:?}; state {state}\n{}",
                self.logs()
            );
            std::thread::sleep(POLL_INTERVAL);
        }
    }

    /// Waits until everything that is committed is in the archive.
    pub fn wait_archived(&self, host: &str, name: &str, limit: Duration) -> Value {
        self.wait_for((host, name), "all archived", limit, |state| {
            state["commit_lsn"] == state["lsn"] && state["archive_lsn"] == state["commit_lsn"]
        })
    }

    /// Restores a database from the archive alone.
    ///
    /// # Panics
    /// When the command fails.
    pub fn restore(&self, host: &str, name: &str, file: &Path) {
        let output = self.durovfs(host, &["restore", name, "-o", &file.to_string_lossy()]);
        assert!(output.status.success(), "restore: {}", text(&output.stderr));
    }

    /// The last lines of every node's log, for a test that failed.
    pub fn logs(&self) -> String {
        let mut logs = String::new();
        for node in self.names() {
            let log = text(&std::fs::read(self.log_file(&node)).unwrap_or_default());
            let lines: Vec<_> = log.lines().collect();
            let last = lines[lines.len().saturating_sub(12)..].join("\n  ");
            logs.push_str(&format!("--- {node}\n  {last}\n"));
        }
        logs
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for child in self.nodes.values_mut() {
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() && std::env::var_os("DUROVFS_KEEP").is_some() {
            self.directory.disable_cleanup(true);
            eprintln!("kept {}", self.directory.path().display());
        }
    }
}
