//! One node of the development cluster, as a process: start, see whether it runs, stop.
//!
//! A node that `durovfs dev` started holds the reading end of a pipe from it and ends when the pipe
//! does, so that even a `kill -9` of `durovfs dev` leaves nothing running. One that was started
//! alone has no such pipe. Both are found by `sidecar.pid`.

use crate::cli::layout;
use crate::cli::sidecar::{CONFIG, DIE_WITH_STDIN};
use anyhow::Context;
use durovfs_wire::NodeName;
use rustix::process::{Pid, Signal, kill_process};
use std::io::{Read as _, Seek as _, SeekFrom};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

/// Pause between two looks at a process that was asked to stop.
const STOP_POLL_INTERVAL: Duration = Duration::from_millis(20);
/// What is read of a log's end to find its last line.
const LOG_TAIL_BYTES: u64 = 4096;

/// One node: its files, and its process if this program started it.
pub struct DevNode {
    /// Its name.
    pub name: NodeName,
    config: PathBuf,
    pid_file: PathBuf,
    log_file: PathBuf,
    child: Option<Child>,
    end: Option<String>,
}

impl DevNode {
    /// The node of this name in the cluster in `directory`.
    pub fn new(directory: &Path, name: &NodeName) -> Self {
        let node_directory = layout::node_directory(directory, name);
        Self {
            name: name.clone(),
            config: layout::sidecar_file(directory, name),
            pid_file: node_directory.join("sidecar.pid"),
            log_file: node_directory.join("sidecar.log"),
            child: None,
            end: None,
        }
    }

    /// Starts the node; it ends with this process.
    pub fn spawn_child(&mut self) -> anyhow::Result<()> {
        self.spawn(true).map(drop)
    }

    /// Starts the node; it goes on without this process.
    pub fn spawn_alone(&mut self) -> anyhow::Result<u32> {
        self.spawn(false)
    }

    fn spawn(&mut self, with_parent: bool) -> anyhow::Result<u32> {
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&self.log_file)
            .with_context(|| format!("open {}", self.log_file.display()))?;
        let program = std::env::current_exe().context("find the durovfs program")?;
        let mut command = Command::new(program);
        command.arg("sidecar").arg(CONFIG).arg(&self.config);
        // A group of its own: Ctrl-C reaches `durovfs dev` only, which stops the nodes in order.
        command
            .process_group(0)
            .stdout(log.try_clone()?)
            .stderr(log);
        if with_parent {
            command.arg(DIE_WITH_STDIN).stdin(Stdio::piped());
        } else {
            command.stdin(Stdio::null());
        }
        let child = command
            .spawn()
            .with_context(|| format!("start {}", self.name))?;
        let pid = child.id();
        self.child = Some(child);
        self.end = None;
        layout::write_file(&self.pid_file, &format!("{pid}\n"))?;
        Ok(pid)
    }

    /// How the process that was started here ended, if it did.
    pub fn ended(&mut self) -> Option<String> {
        self.ended_now().or_else(|| self.end.clone())
    }

    /// The same, once.
    pub fn ended_now(&mut self) -> Option<String> {
        let status = self.child.as_mut()?.try_wait().ok()??;
        self.child = None;
        self.end = Some(describe(status));
        self.end.clone()
    }

    /// The process that runs this node, whoever started it.
    pub fn running(&self) -> Option<Pid> {
        let text = std::fs::read_to_string(&self.pid_file).ok()?;
        let pid = Pid::from_raw(text.trim().parse().ok()?)?;
        self.is_this_node(pid).then_some(pid)
    }

    /// Waits until the process that ran this node has let go of its files. One that was killed
    /// first loses its arguments, and last, when its writes are through, its locks. False when it
    /// still runs or lingers after `limit`.
    pub async fn wait_gone(&self, limit: Duration) -> bool {
        let deadline = tokio::time::Instant::now() + limit;
        while self.running().is_some() || self.lingers() {
            if tokio::time::Instant::now() > deadline {
                return false;
            }
            tokio::time::sleep(STOP_POLL_INTERVAL).await;
        }
        true
    }

    /// Whether the node's process is being torn down: no arguments any more, but a live thread.
    fn lingers(&self) -> bool {
        let Ok(text) = std::fs::read_to_string(&self.pid_file) else {
            return false;
        };
        let process = Path::new("/proc").join(text.trim());
        let arguments = std::fs::read(process.join("cmdline"));
        if !arguments.is_ok_and(|arguments| arguments.is_empty()) {
            return false;
        }
        let Ok(threads) = std::fs::read_dir(process.join("task")) else {
            return false;
        };
        threads.flatten().any(|thread| {
            let stat = std::fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
            // The state stands after the name, which is in parentheses.
            let state = stat
                .rsplit_once(") ")
                .and_then(|(_, rest)| rest.chars().next());
            state.is_some_and(|state| !matches!(state, 'Z' | 'X'))
        })
    }

    /// Whether the process is this node, and not one that got an old number. A process that ended
    /// and is not yet waited for has no arguments any more.
    fn is_this_node(&self, pid: Pid) -> bool {
        let arguments = format!("/proc/{}/cmdline", pid.as_raw_nonzero());
        match std::fs::read(&arguments) {
            Ok(arguments) => arguments
                .split(|byte| *byte == 0)
                .any(|argument| argument == self.config.as_os_str().as_encoded_bytes()),
            // Without /proc the number is all there is to go by.
            Err(_) if !Path::new("/proc/self").exists() => {
                rustix::process::test_kill_process(pid).is_ok()
            }
            Err(_) => false,
        }
    }

    /// Asks the node to stop; does not wait.
    pub fn ask_to_stop(&self) {
        if let Some(pid) = self.running() {
            // It may have ended since; then there is nothing to ask.
            let _ = kill_process(pid, Signal::TERM);
            // A stopped process would not hear.
            let _ = kill_process(pid, Signal::CONT);
        }
    }

    /// Stops the node, whoever started it; kills it when it takes too long.
    pub async fn stop(&mut self, limit: Duration) -> anyhow::Result<()> {
        self.ask_to_stop();
        let deadline = tokio::time::Instant::now() + limit;
        while let Some(pid) = self.running() {
            if tokio::time::Instant::now() > deadline {
                let _ = kill_process(pid, Signal::KILL);
                self.wait_gone(limit).await;
                self.reap();
                anyhow::bail!(
                    "dev: {} did not stop within {limit:?} and was killed",
                    self.name
                );
            }
            // Waiting for a child is what takes it out of the process table.
            self.ended_now();
            tokio::time::sleep(STOP_POLL_INTERVAL).await;
        }
        self.wait_gone(limit).await;
        self.reap();
        // Nobody should take the number for a running node.
        let _ = std::fs::remove_file(&self.pid_file);
        Ok(())
    }

    fn reap(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.wait();
        }
    }

    /// The last line that the node logged.
    pub fn last_log(&self) -> String {
        let read = || -> std::io::Result<Vec<u8>> {
            let mut file = std::fs::File::open(&self.log_file)?;
            let length = file.metadata()?.len();
            file.seek(SeekFrom::Start(length.saturating_sub(LOG_TAIL_BYTES)))?;
            let mut tail = Vec::new();
            file.read_to_end(&mut tail)?;
            Ok(tail)
        };
        let tail = read().unwrap_or_default();
        let tail = String::from_utf8_lossy(&tail);
        let line = tail.lines().rev().find(|line| !line.trim().is_empty());
        line.map_or_else(|| format!("see {}", self.log_file.display()), str::to_owned)
    }
}

fn describe(status: ExitStatus) -> String {
    match (status.signal(), status.code()) {
        (Some(signal), _) => format!("signal {signal}"),
        (None, Some(code)) => format!("exit status {code}"),
        (None, None) => "unknown".to_owned(),
    }
}
