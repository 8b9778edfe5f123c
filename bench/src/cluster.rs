//! A durovfs cluster on loopback, as a user starts it.

use crate::children::Child;
use anyhow::{Context, Result, bail, ensure};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// The cluster makes its certificates, starts six processes, and waits until they know each other.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// Nodes finish their commits and upload the open chunk before they end.
const STOP_TIMEOUT: Duration = Duration::from_secs(30);
/// What it prints when commits are possible.
const READY: &str = "ready";
/// Names of the nodes, as `durovfs dev` gives them.
const PRIMARY: &str = "primary";
const REPLICA_PREFIX: &str = "replica-";

/// The release build's products.
pub struct Products {
    daemon: PathBuf,
    /// The extension.
    pub extension: PathBuf,
}

impl Products {
    /// Those in a directory.
    ///
    /// # Errors
    /// When one is not there.
    pub fn find(dir: &Path) -> Result<Self> {
        let extension = format!(
            "{}durovfs{}",
            std::env::consts::DLL_PREFIX,
            std::env::consts::DLL_SUFFIX
        );
        let products = Self {
            daemon: dir.join("durovfs"),
            extension: dir.join(extension),
        };
        for file in [&products.daemon, &products.extension] {
            ensure!(
                file.exists(),
                "{file:?} is not there: build it, or use scripts/bench"
            );
        }
        Ok(products)
    }
}

/// A running cluster.
pub struct Cluster {
    dev: Child,
    dir: PathBuf,
}

impl Cluster {
    /// Starts one with its data in `dir`.
    pub fn start(products: &Products, dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir).with_context(|| format!("create {dir:?}"))?;
        let log = File::create(dir.join("dev.log")).context("create the cluster's log")?;
        let mut command = Command::new(&products.daemon);
        command.arg("dev").arg("--dir").arg(dir).stderr(log);
        let dev = Child::spawn("durovfs dev", &mut command)?;
        let cluster = Self {
            dev,
            dir: dir.to_owned(),
        };
        match cluster.wait_until_ready() {
            Ok(()) => Ok(cluster),
            Err(error) => {
                let log = fs::read_to_string(dir.join("dev.log")).unwrap_or_default();
                Err(error.context(format!("durovfs dev said: {}", log.trim())))
            }
        }
    }

    fn wait_until_ready(&self) -> Result<()> {
        let end = Instant::now() + START_TIMEOUT;
        while Instant::now() < end {
            let rest = end.saturating_duration_since(Instant::now());
            if self.dev.line(rest)?.trim() == READY {
                return Ok(());
            }
        }
        bail!(
            "the cluster was not ready within {} s",
            START_TIMEOUT.as_secs()
        )
    }

    /// Configuration for the application.
    pub fn client_config(&self) -> PathBuf {
        self.dir.join("client.toml")
    }

    /// Process id of `durovfs dev` itself.
    pub fn dev_id(&self) -> u32 {
        self.dev.id()
    }

    /// Process id of the primary's sidecar.
    pub fn primary_id(&self) -> Result<u32> {
        self.node_id(PRIMARY)
    }

    /// Process ids of the replicas' sidecars.
    pub fn replica_ids(&self) -> Result<Vec<u32>> {
        let mut ids = Vec::new();
        for entry in fs::read_dir(self.dir.join("nodes")).context("list the nodes")? {
            let name = entry.context("list the nodes")?.file_name();
            let name = name.to_string_lossy();
            if name.starts_with(REPLICA_PREFIX) {
                ids.push(self.node_id(&name)?);
            }
        }
        Ok(ids)
    }

    fn node_id(&self, name: &str) -> Result<u32> {
        let path = self.dir.join("nodes").join(name).join("sidecar.pid");
        let text = fs::read_to_string(&path).with_context(|| format!("read {path:?}"))?;
        text.trim()
            .parse()
            .with_context(|| format!("{path:?} holds no process id"))
    }

    /// Stops it as Ctrl-C does.
    pub fn stop(mut self) -> Result<()> {
        interrupt(self.dev.id());
        self.dev.wait(STOP_TIMEOUT)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // After a failed run, too, the nodes must be told: they are children of `durovfs dev`,
        // which is only killed. When all is stopped there is nobody to hear it.
        if matches!(self.dev.has_ended(), Ok(false)) {
            interrupt(self.dev.id());
            let _ = self.dev.wait(STOP_TIMEOUT);
        }
    }
}

#[allow(unsafe_code)]
fn interrupt(process: u32) {
    let Ok(process) = libc::pid_t::try_from(process) else {
        return;
    };
    // SAFETY: kill takes no memory. The process is a child that was not waited for, so that its id
    // is not another's.
    let _ = unsafe { libc::kill(process, libc::SIGINT) };
}
