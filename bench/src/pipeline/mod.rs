//! The bare pipeline: the processes of a durovfs cluster, passing a commit's bytes over QUIC from a
//! caller through a relay to five replicas, each with one `fdatasync`. It has no log, no epochs, no
//! recovery and no SQLite: what it takes is what the transport and the disks take.
//!
//! No code of durovfs is used here, so that the product is not measured against itself.

pub mod client;
mod frame;
pub mod relay;
pub mod replica;
mod transport;

use crate::children::Child;
use anyhow::{Context, Result};
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// Replicas, as many as durovfs has by default.
const REPLICA_COUNT: usize = 5;
/// Acks that make a commit, as in durovfs by default.
const ACK_QUORUM: u32 = 3;
/// A replica writes its whole journal once before it says that it listens.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// What a server says before its address.
const LISTENING: &str = "listening ";

/// The relay and the replicas, running.
pub struct Pipeline {
    relay: (Child, SocketAddr),
    replicas: Vec<Child>,
}

impl Pipeline {
    /// Starts all of them, with their files in `dir`.
    pub fn start(program: &Path, dir: &Path) -> Result<Self> {
        transport::make_certificate(dir)?;
        let mut replicas = Vec::new();
        let mut addresses = Vec::new();
        for index in 1..=REPLICA_COUNT {
            let mut command = Command::new(program);
            command.arg("pipeline-replica").arg("--dir").arg(dir);
            command
                .arg("--journal")
                .arg(dir.join(format!("journal-{index}")));
            replicas.push(Child::spawn(
                &format!("pipeline replica {index}"),
                &mut command,
            )?);
        }
        for replica in &replicas {
            addresses.push(listening(replica)?);
        }
        let mut command = Command::new(program);
        command.arg("pipeline-relay").arg("--dir").arg(dir);
        command.args(
            addresses
                .iter()
                .map(|address| format!("--replica={address}")),
        );
        let relay = Child::spawn("pipeline relay", &mut command)?;
        let address = listening(&relay)?;
        Ok(Self {
            relay: (relay, address),
            replicas,
        })
    }

    /// Process id of the relay.
    pub fn relay_id(&self) -> u32 {
        self.relay.0.id()
    }

    /// Process ids of the replicas.
    pub fn replica_ids(&self) -> Vec<u32> {
        self.replicas.iter().map(Child::id).collect()
    }

    /// The command of a client.
    pub fn client(&self, program: &Path, dir: &Path, args: &[String]) -> Command {
        let mut command = Command::new(program);
        command.arg("pipeline-client").arg("--dir").arg(dir);
        command.arg(format!("--relay={}", self.relay.1)).args(args);
        command
    }
}

fn listening(server: &Child) -> Result<SocketAddr> {
    let line = server.line(START_TIMEOUT)?;
    let address = line
        .strip_prefix(LISTENING)
        .context("a server says where it listens")?;
    address
        .parse()
        .with_context(|| format!("address {address:?}"))
}
