//! A cluster of real processes, run by `durovfs dev` in a directory of its own: start it, hurt its
//! nodes, ask it how it is, and end it whatever the test did to it.

use crate::binaries::binaries;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// Longest wait for a whole cluster to start: six processes on a busy machine.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// Longest wait for a whole cluster to stop, with its last upload.
const STOP_TIMEOUT: Duration = Duration::from_secs(90);
/// Pause between two questions about the state.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// How a test cluster differs from the default one.
#[derive(Debug, Clone)]
pub struct ClusterOptions {
    /// Replicas.
    pub replicas: u16,
    /// Longest time until an upload.
    pub chunk_interval: &'static str,
    /// Size of an upload.
    pub chunk_bytes: &'static str,
    /// URL of the archive; a directory of the cluster's own without it.
    pub archive: Option<String>,
}

impl Default for ClusterOptions {
    fn default() -> Self {
        Self {
            replicas: 5,
            chunk_interval: "500ms",
            chunk_bytes: "4MiB",
            archive: None,
        }
    }
}

impl ClusterOptions {
    /// Nothing is uploaded before the end, so that the journals keep every entry.
    pub fn journals_keep_all() -> Self {
        Self {
            chunk_interval: "1d",
            chunk_bytes: "1TiB",
            ..Self::default()
        }
    }
}

/// A running cluster.
#[derive(Debug)]
pub struct Cluster {
    options: ClusterOptions,
    directory: tempfile::TempDir,
    dev: Option<Child>,
}

impl Cluster {
    /// Starts a cluster in a new directory.
    ///
    /// # Panics
    /// When it does not start.
    pub fn start(options: ClusterOptions) -> Self {
        let directory = tempfile::Builder::new()
            .prefix("durovfs-")
            .tempdir()
            .expect("make a dir");
        let mut cluster = Self {
            options,
            directory,
            dev: None,
        };
        cluster.start_again();
        cluster
    }

    /// Starts the cluster that was stopped.
    ///
    /// # Panics
    /// When it does not start.
    pub fn start_again(&mut self) {
        assert!(self.dev.is_none(), "the cluster runs");
        let errors = self.directory.path().join("dev.errors");
        let mut dev = Command::new(&binaries().durovfs)
            .args(["dev", "--replicas", &self.options.replicas.to_string()])
            .args(["--chunk-interval", self.options.chunk_interval])
            .args(["--chunk-bytes", self.options.chunk_bytes])
            .args(
                self.options
                    .archive
                    .iter()
                    .flat_map(|url| ["--archive", url]),
            )
            .arg("--dir")
            .arg(self.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(std::fs::File::create(&errors).expect("make a file"))
            .spawn()
            .expect("start durovfs dev");
        let output = dev.stdout.take().expect("output of durovfs dev");
        self.dev = Some(dev);
        let (lines, ready) = mpsc::channel();
        std::thread::spawn(move || {
            // Read to the end, so that the program never waits for a reader.
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                let _ = lines.send(line);
            }
        });
        let deadline = Instant::now() + START_TIMEOUT;
        loop {
            match ready.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) if line == "ready" => return,
                Ok(_) => {}
                Err(_) => {
                    let errors = std::fs::read_to_string(&errors).unwrap_or_default();
                    panic!("durovfs dev did not get ready: {errors}\n{}", self.logs());
                }
            }
        }
    }

    /// The cluster's directory, as `durovfs dev --dir` gets it.
    pub fn path(&self) -> PathBuf {
        self.directory.path().join("cluster")
    }

    /// A directory for the test's own files.
    pub fn scratch(&self) -> &Path {
        self.directory.path()
    }

    /// The client config.
    pub fn client_config(&self) -> PathBuf {
        self.path().join("client.toml")
    }

    /// The archive's directory.
    pub fn archive(&self) -> PathBuf {
        self.path().join("archive")
    }

    /// The files of a node.
    pub fn node_path(&self, node: &str) -> PathBuf {
        self.path().join("nodes").join(node)
    }

    /// Changes a setting in a node's `sidecar.toml`; it counts from the node's next start.
    ///
    /// # Panics
    /// When the file does not have it exactly once.
    pub fn set(&self, node: &str, key: &str, value: &str) {
        let file = self.node_path(node).join("sidecar.toml");
        let text = std::fs::read_to_string(&file).expect("read sidecar.toml");
        let mut count = 0;
        let lines = text.lines().map(|line| {
            if line.split(" = ").next() != Some(key) {
                return line.to_owned();
            }
            count += 1;
            format!("{key} = \"{value}\"")
        });
        let text: Vec<String> = lines.collect();
        assert_eq!(count, 1, "{key} in {}", file.display());
        std::fs::write(&file, text.join("\n") + "\n").expect("write sidecar.toml");
    }

    /// Names of the replicas.
    pub fn replicas(&self) -> Vec<String> {
        (1..=self.options.replicas)
            .map(|index| format!("replica-{index}"))
            .collect()
    }

    /// Number of the process that runs a node.
    ///
    /// # Panics
    /// When the node was never started.
    pub fn pid(&self, node: &str) -> Pid {
        let file = self.node_path(node).join("sidecar.pid");
        let text = std::fs::read_to_string(&file).expect("read sidecar.pid");
        Pid::from_raw(text.trim().parse().expect("sidecar.pid is a number")).expect("a pid")
    }

    /// Sends a signal to a node.
    ///
    /// # Panics
    /// When the node does not run.
    pub fn signal(&self, node: &str, signal: Signal) {
        kill_process(self.pid(node), signal).expect("signal a node");
    }

    /// Kills a node with no chance to say goodbye.
    pub fn kill(&self, node: &str) {
        self.signal(node, Signal::KILL);
    }

    /// Stops a node's process without ending it: it holds its connections, and does not answer.
    pub fn freeze(&self, node: &str) {
        self.signal(node, Signal::STOP);
    }

    /// Lets a frozen node go on.
    pub fn thaw(&self, node: &str) {
        self.signal(node, Signal::CONT);
    }

    /// Starts a node that was killed.
    ///
    /// # Panics
    /// When it does not start.
    pub fn start_node(&self, node: &str) {
        let output = self.durovfs(&[
            "dev",
            "--dir",
            &self.path().to_string_lossy(),
            "--start",
            node,
        ]);
        assert!(
            output.status.success(),
            "start {node}: {}\n{}",
            text(&output.stderr),
            self.logs()
        );
    }

    /// Runs a `durovfs` command with this cluster's client config.
    ///
    /// # Panics
    /// When the program cannot be run.
    pub fn durovfs(&self, args: &[&str]) -> Output {
        Command::new(&binaries().durovfs)
            .args(args)
            .env("DUROVFS_CONFIG", self.client_config())
            .stdin(Stdio::null())
            .output()
            .expect("run durovfs")
    }

    /// State of a database as the primary sees it; none before it has one of that name.
    pub fn database(&self, name: &Path) -> Option<Value> {
        let output = self.durovfs(&["status", &name.to_string_lossy(), "--json"]);
        output
            .status
            .success()
            .then(|| serde_json::from_slice(&output.stdout).expect("status --json prints JSON"))
    }

    /// A client config for another node's sidecar than the primary's.
    ///
    /// # Panics
    /// When it cannot be written.
    pub fn node_client_config(&self, node: &str) -> PathBuf {
        let sidecar = std::fs::read_to_string(self.node_path(node).join("sidecar.toml"));
        let sidecar = sidecar.expect("read sidecar.toml");
        let listen = sidecar
            .lines()
            .find_map(|line| line.strip_prefix("listen = "))
            .expect("an address");
        let client = std::fs::read_to_string(self.client_config()).expect("read client.toml");
        let lines = client.lines().map(|line| match line.split(" = ").next() {
            Some("sidecar") => format!("sidecar = {listen}"),
            Some("node") => format!("node = \"{node}\""),
            _ => line.to_owned(),
        });
        let text: Vec<String> = lines.collect();
        let file = self.path().join(format!("ask-{node}.toml"));
        std::fs::write(&file, text.join("\n") + "\n").expect("write a client.toml");
        file
    }

    /// What a node says that is asked itself.
    ///
    /// # Panics
    /// When it does not answer.
    pub fn node_status(&self, node: &str) -> Value {
        let config = self.node_client_config(node);
        let output = self.durovfs(&["status", "--json", "--config", &config.to_string_lossy()]);
        serde_json::from_slice(&output.stdout).expect("status --json prints JSON")
    }

    /// Waits until the primary's view of a database is as the test wants it.
    ///
    /// # Panics
    /// When that takes longer than `limit`.
    pub fn wait_for(
        &self,
        name: &Path,
        what: &str,
        limit: Duration,
        wanted: impl Fn(&Value) -> bool,
    ) -> Value {
        let deadline = Instant::now() + limit;
        loop {
            let state = self.database(name);
            if let Some(state) = state.as_ref().filter(|state| wanted(state)) {
                return state.clone();
            }
            assert!(
                Instant::now() < deadline,
                "{what}: not within {limit:?}; state {}\n{}",
                state.unwrap_or_default(),
                self.logs()
            );
            std::thread::sleep(POLL_INTERVAL);
        }
    }

    /// Waits until every replica holds all that is committed.
    pub fn wait_level(&self, name: &Path, limit: Duration) -> Value {
        self.wait_for(name, "all replicas level", limit, |state| {
            let level = |replica: &Value| replica["flush_lsn"] == state["lsn"];
            let replicas = state["replicas"].as_array();
            state["commit_lsn"] == state["lsn"]
                && replicas.is_some_and(|all| !all.is_empty() && all.iter().all(level))
        })
    }

    /// Waits until everything that is committed is in the archive.
    pub fn wait_archived(&self, name: &Path, limit: Duration) -> Value {
        self.wait_for(name, "all archived", limit, |state| {
            state["commit_lsn"] == state["lsn"] && state["archive_lsn"] == state["commit_lsn"]
        })
    }

    /// Restores a database from the archive alone.
    ///
    /// # Panics
    /// When the command fails.
    pub fn restore(&self, name: &Path, at: Option<&str>, file: &Path) {
        let (name, file) = (name.to_string_lossy(), file.to_string_lossy());
        let mut args = vec!["restore", &name, "-o", &file];
        args.extend(at.iter().flat_map(|at| ["--at", at]));
        let output = self.durovfs(&args);
        assert!(
            output.status.success(),
            "durovfs {args:?}: {}",
            text(&output.stderr)
        );
    }

    /// Ends the cluster as Ctrl-C does, and expects that it ends well.
    ///
    /// # Panics
    /// When it does not.
    pub fn stop(&mut self) {
        let mut dev = self.dev.take().expect("the cluster runs");
        let pid = Pid::from_raw(dev.id().cast_signed()).expect("a pid");
        kill_process(pid, Signal::INT).expect("interrupt durovfs dev");
        let deadline = Instant::now() + STOP_TIMEOUT;
        let status = loop {
            match dev.try_wait().expect("wait for durovfs dev") {
                Some(status) => break status,
                None if Instant::now() > deadline => {
                    self.dev = Some(dev);
                    panic!("durovfs dev did not stop\n{}", self.logs());
                }
                None => std::thread::sleep(POLL_INTERVAL),
            }
        };
        let errors = std::fs::read_to_string(self.scratch().join("dev.errors")).unwrap_or_default();
        assert!(
            status.success(),
            "durovfs dev ended with {status}: {errors}\n{}",
            self.logs()
        );
    }

    /// Kills the process of `durovfs dev` itself.
    ///
    /// # Panics
    /// When it does not run.
    pub fn kill_dev(&mut self) {
        let mut dev = self.dev.take().expect("the cluster runs");
        dev.kill().expect("kill durovfs dev");
        dev.wait().expect("wait for durovfs dev");
    }

    /// The last lines of every node's log, for a test that failed.
    pub fn logs(&self) -> String {
        let mut logs = String::new();
        for node in std::iter::once("primary".to_owned()).chain(self.replicas()) {
            let mut log = Vec::new();
            let file = std::fs::File::open(self.node_path(&node).join("sidecar.log"));
            if file.and_then(|mut file| file.read_to_end(&mut log)).is_ok() {
                let log = text(&log);
                let lines: Vec<_> = log.lines().collect();
                let last = lines[lines.len().saturating_sub(12)..].join("\n  ");
                logs.push_str(&format!("--- {node}\n  {last}\n"));
            }
        }
        logs
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if let Some(mut dev) = self.dev.take() {
            let _ = dev.kill();
            let _ = dev.wait();
        }
        // Frozen nodes and those that were started alone do not end with it.
        for node in std::iter::once("primary".to_owned()).chain(self.replicas()) {
            let file = self.node_path(&node).join("sidecar.pid");
            let pid = std::fs::read_to_string(file)
                .ok()
                .and_then(|text| text.trim().parse().ok());
            if let Some(pid) = pid.filter(|pid| self.runs(*pid)).and_then(Pid::from_raw) {
                let _ = kill_process(pid, Signal::KILL);
            }
        }
        if std::thread::panicking() && std::env::var_os("DUROVFS_KEEP").is_some() {
            self.directory.disable_cleanup(true);
            eprintln!("kept {}", self.directory.path().display());
        }
    }
}

impl Cluster {
    /// Whether the process is a node of this cluster, and not one that got an old number.
    pub fn runs(&self, pid: i32) -> bool {
        let arguments = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        text(&arguments).contains(&*self.path().to_string_lossy())
    }
}

/// Bytes that a program printed, for people.
pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Largest resident set that a process ever had, in bytes.
///
/// # Panics
/// When there is no such process.
pub fn peak_resident_bytes(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("read its status");
    let line = status
        .lines()
        .find(|line| line.starts_with("VmHWM:"))
        .expect("VmHWM in status");
    let kilobytes = line
        .split_whitespace()
        .nth(1)
        .and_then(|number| number.parse::<u64>().ok());
    kilobytes.expect("VmHWM is a number") << 10
}

/// From now on [`peak_resident_bytes`] tells of what comes.
///
/// # Panics
/// When there is no such process.
pub fn forget_peak(pid: u32) {
    std::fs::write(format!("/proc/{pid}/clear_refs"), "5").expect("forget its peak");
}
