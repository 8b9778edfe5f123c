//! `durovfs dev`: a whole cluster on one machine, in the foreground.
//!
//! What the processes are and how they are stopped is in `dev/node.rs`; which files they read is in
//! `layout.rs`. Here: the order of things, and what a person sees.

mod node;

use super::ask::{ANSWER_TIMEOUT, Asker};
use super::init::node_config;
use super::layout::{self, ClientEntry};
use super::{EXIT_USAGE, Failure};
use crate::config::{
    ClientConfig, SidecarConfig, TlsPaths, dev_directory, parse_archive_url, parse_bytes,
    parse_duration,
};
use anyhow::Context;
use clap::{Args, value_parser};
use durovfs_wire::NodeName;
use node::DevNode;
use std::collections::BTreeMap;
use std::fs::File;
use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Name of the node that applications talk to.
const PRIMARY: &str = "primary";
/// More replicas than that are no test of anything on one machine.
const MAX_REPLICAS: i64 = 15;
/// How often the nodes are looked at.
const WATCH_INTERVAL: Duration = Duration::from_millis(200);
/// A killed node is gone when its last write to the disk is through.
const GONE_TIMEOUT: Duration = Duration::from_secs(5);
/// Limit of the first attempt to reach a node that was just started.
const FIRST_CONNECT_LIMIT: Duration = Duration::from_millis(100);
/// Longest wait for a node to answer: it reads its journal first, at some hundred MB/s.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// The primary finishes commits in flight and uploads the open chunk.
const STOP_PRIMARY_TIMEOUT: Duration = Duration::from_secs(30);
/// A replica has nothing to finish but its last write.
const STOP_REPLICA_TIMEOUT: Duration = Duration::from_secs(10);

/// Run a whole cluster on this machine: one primary, five replicas, a directory as archive
///
/// For development and to try things out. Stays in the foreground, prints `ready` and the lines to
/// paste; Ctrl-C stops all. Started again on the same DIR, it goes on with its data. Kill a node by
/// the number in DIR/nodes/NAME/sidecar.pid to see what happens; --start brings it back.
#[derive(Args)]
pub struct DevArgs {
    /// Where the cluster lives [default: $XDG_STATE_HOME/durovfs/dev]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// How many replicas a new cluster has [default: 5]
    #[arg(long, value_name = "N", value_parser = value_parser!(u16).range(1..=MAX_REPLICAS))]
    replicas: Option<u16>,
    /// file:///DIRECTORY or s3://BUCKET/PREFIX [default: DIR/archive]
    #[arg(long, value_name = "URL", value_parser = parse_archive_url)]
    archive: Option<String>,
    /// Upload what was committed at the latest after this time [default: 10s]
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    chunk_interval: Option<Duration>,
    /// … or when this much has come together [default: 16MiB]
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    chunk_bytes: Option<u64>,
    /// Start one node of the cluster in DIR that was killed, and return
    #[arg(
        long,
        value_name = "NAME",
        conflicts_with_all = ["replicas", "archive", "chunk_interval", "chunk_bytes"]
    )]
    start: Option<NodeName>,
}

/// Runs the cluster until it is interrupted, or starts one node of it.
///
/// # Errors
/// When the cluster cannot be started, or did not stop cleanly.
pub async fn run(args: DevArgs) -> Result<(), Failure> {
    let directory = match &args.dir {
        Some(directory) => directory.clone(),
        None => dev_directory(|name| std::env::var_os(name).map(PathBuf::from))
            .context("dev: neither XDG_STATE_HOME nor HOME is set; use --dir DIR")?,
    };
    let directory = std::path::absolute(directory).context("find the working directory")?;
    match &args.start {
        Some(name) => start_one(&directory, name).await,
        None => run_cluster(&args, &directory).await,
    }
}

async fn start_one(directory: &Path, name: &NodeName) -> Result<(), Failure> {
    if !layout::sidecar_file(directory, name).exists() {
        let problem = format!("dev: {} has no node {name}", directory.display());
        return Err(Failure::new(EXIT_USAGE, problem));
    }
    let mut node = DevNode::new(directory, name);
    // It may have been killed a moment ago.
    if !node.wait_gone(GONE_TIMEOUT).await {
        let pid = node
            .running()
            .map_or_else(String::new, |pid| format!(", as process {pid}"));
        return Err(anyhow::anyhow!("dev: {name} runs already{pid}").into());
    }
    let pid = node.spawn_alone()?;
    wait_for_answer(directory, &mut node).await?;
    println!("started {name}, process {pid}");
    Ok(())
}

async fn run_cluster(args: &DevArgs, directory: &Path) -> Result<(), Failure> {
    layout::create_directory(directory)?;
    let _lock = lock(directory)?;
    // Before anything is started: a signal that comes in between must not leave nodes behind.
    let mut stop = StopSignals::new()?;
    let names = prepare(args, directory).await?;
    let mut nodes: Vec<_> = names
        .iter()
        .map(|name| DevNode::new(directory, name))
        .collect();
    let started = tokio::select! {
        started = start_all(directory, &mut nodes) => started,
        () = stop.wait() => Ok(()),
    };
    if started.is_ok() && !stop.seen {
        print_ready(directory, &nodes)?;
        watch(directory, &mut nodes, &mut stop).await;
    }
    let stopped = stop_all(&mut nodes).await;
    started.and(stopped)
}

/// One `durovfs dev` per directory; the lock goes with the process, however it ends.
fn lock(directory: &Path) -> anyhow::Result<File> {
    let path = directory.join("dev.lock");
    let file = File::create(&path).with_context(|| format!("create {}", path.display()))?;
    file.try_lock().map_err(|_| {
        anyhow::anyhow!("dev: another `durovfs dev` runs on {}", directory.display())
    })?;
    Ok(file)
}

/// Makes the cluster's files, or changes those of an existing one as the arguments say. Returns the
/// names of its nodes, primary first.
async fn prepare(args: &DevArgs, directory: &Path) -> Result<Vec<NodeName>, Failure> {
    let mut configs = if layout::client_file(directory).exists() {
        load_cluster(args, directory)?
    } else {
        new_cluster(args, directory)?
    };
    for config in &configs {
        // Left over from an earlier run, or started alone: it becomes one of ours.
        DevNode::new(directory, &config.node)
            .stop(STOP_REPLICA_TIMEOUT)
            .await?;
    }
    let archive_changed = apply_archive(args, &mut configs);
    let ports_changed = ensure_free_ports(&mut configs)?;
    if archive_changed || ports_changed {
        for config in &configs {
            layout::write_sidecar(directory, config)?;
        }
        layout::write_client(directory, &client_entry(&configs))?;
    }
    Ok(configs.into_iter().map(|config| config.node).collect())
}

fn client_entry(configs: &[SidecarConfig]) -> ClientEntry<'_> {
    let primary = &configs[0];
    ClientEntry {
        node: &primary.node,
        address: &primary.nodes[&primary.node],
        archive: primary.archive.as_ref().map(|archive| archive.url.as_str()),
    }
}

fn new_cluster(args: &DevArgs, directory: &Path) -> anyhow::Result<Vec<SidecarConfig>> {
    let count = args.replicas.unwrap_or(durovfs_wire::REPLICA_COUNT as u16);
    let mut names: Vec<NodeName> = vec![PRIMARY.parse()?];
    for index in 1..=count {
        names.push(format!("replica-{index}").parse()?);
    }
    let ports = free_ports(names.len())?;
    let addresses = ports.iter().map(|port| format!("127.0.0.1:{port}"));
    let nodes: BTreeMap<_, _> = names.iter().cloned().zip(addresses).collect();
    let archive = match &args.archive {
        Some(url) => url.clone(),
        None => {
            layout::create_directory(&directory.join("archive"))?;
            format!("file://{}", directory.join("archive").display())
        }
    };
    let mut configs = Vec::new();
    for name in &names {
        let listen = nodes[name].parse().context("listen address")?;
        let archive = Some(archive.clone());
        configs.push(node_config(
            directory,
            name,
            listen,
            &nodes,
            &names[1..],
            &archive,
        ));
    }
    apply_archive(args, &mut configs);
    layout::create_cluster(directory, &configs, &client_entry(&configs))?;
    Ok(configs)
}

/// The cluster that is there, primary first.
fn load_cluster(args: &DevArgs, directory: &Path) -> Result<Vec<SidecarConfig>, Failure> {
    let primary: NodeName = PRIMARY.parse().context("name of the primary")?;
    let first = SidecarConfig::load(&layout::sidecar_file(directory, &primary))?;
    let replicas = first.replicas.clone();
    if let Some(wanted) = args
        .replicas
        .map(usize::from)
        .filter(|wanted| *wanted != replicas.len())
    {
        let message = format!(
            "dev: {} holds a cluster of {} replicas, not {wanted}; choose another --dir",
            directory.display(),
            replicas.len()
        );
        return Err(Failure::new(EXIT_USAGE, message));
    }
    let mut configs = vec![first];
    for name in &replicas {
        configs.push(SidecarConfig::load(&layout::sidecar_file(directory, name))?);
    }
    Ok(configs)
}

/// Sets what the arguments say of the archive; true if that changed anything.
fn apply_archive(args: &DevArgs, configs: &mut [SidecarConfig]) -> bool {
    let mut changed = false;
    for archive in configs
        .iter_mut()
        .filter_map(|config| config.archive.as_mut())
    {
        let before = archive.clone();
        archive.url = args.archive.clone().unwrap_or(before.url.clone());
        archive.chunk_interval = args.chunk_interval.unwrap_or(before.chunk_interval);
        archive.chunk_bytes = args.chunk_bytes.unwrap_or(before.chunk_bytes);
        changed |= before != *archive;
    }
    changed
}

/// Gives all nodes new ports when another program took one of theirs.
fn ensure_free_ports(configs: &mut [SidecarConfig]) -> anyhow::Result<bool> {
    let free: Vec<_> = configs
        .iter()
        .map(|config| UdpSocket::bind(config.listen))
        .collect();
    if free.iter().all(|socket| socket.is_ok()) {
        return Ok(false);
    }
    let ports = free_ports(configs.len())?;
    let addresses: BTreeMap<_, _> = configs
        .iter()
        .zip(&ports)
        .map(|(config, port)| (config.node.clone(), format!("127.0.0.1:{port}")))
        .collect();
    for (config, port) in configs.iter_mut().zip(&ports) {
        config.listen.set_port(*port);
        config.nodes.clone_from(&addresses);
    }
    Ok(true)
}

/// Ports that no program has now. All are held until all are found, so that they differ.
fn free_ports(count: usize) -> anyhow::Result<Vec<u16>> {
    let sockets: Result<Vec<_>, _> = (0..count)
        .map(|_| UdpSocket::bind(("127.0.0.1", 0)))
        .collect();
    let ports: Result<Vec<_>, _> = sockets
        .context("find a free port on 127.0.0.1")?
        .iter()
        .map(|socket| socket.local_addr().map(|address| address.port()))
        .collect();
    ports.context("read the number of a free port")
}

async fn start_all(directory: &Path, nodes: &mut [DevNode]) -> Result<(), Failure> {
    for node in nodes.iter_mut() {
        node.spawn_child()?;
    }
    for node in nodes.iter_mut() {
        wait_for_answer(directory, node).await?;
    }
    Ok(())
}

async fn wait_for_answer(directory: &Path, node: &mut DevNode) -> Result<(), Failure> {
    let config = client_of(directory, node)?;
    let deadline = tokio::time::Instant::now() + START_TIMEOUT;
    // Short at first, as the first packet may come before the node listens; longer each time, as on
    // a busy machine a handshake takes its time.
    let mut limit = FIRST_CONNECT_LIMIT;
    loop {
        if let Some(end) = node.ended() {
            let problem = format!(
                "dev: {} ended at start ({end}): {}",
                node.name,
                node.last_log()
            );
            return Err(anyhow::anyhow!(problem).into());
        }
        match Asker::connect(&config, limit).await {
            Ok(asker) => {
                asker.close().await;
                return Ok(());
            }
            Err(failure) if tokio::time::Instant::now() > deadline => {
                return Err(Failure {
                    message: format!("dev: {}", failure.message),
                    ..failure
                });
            }
            // By a quarter: doubled, it would soon be longer than a node takes to start.
            Err(_) => limit = (5 * limit / 4).min(ANSWER_TIMEOUT),
        }
        // An attempt that failed at once must not become a busy loop.
        tokio::time::sleep(FIRST_CONNECT_LIMIT / 5).await;
    }
}

/// A client config for one node of the cluster, with the cluster's client certificate.
fn client_of(directory: &Path, node: &DevNode) -> Result<ClientConfig, Failure> {
    let config = SidecarConfig::load(&layout::sidecar_file(directory, &node.name))?;
    Ok(ClientConfig {
        file: layout::client_file(directory),
        sidecar: config.listen.to_string(),
        node: config.node,
        tls: TlsPaths {
            ca: config.tls.ca,
            certificate: directory.join("client.pem"),
            key: directory.join("client-key.pem"),
        },
        archive: None,
        include: Vec::new(),
        exclude: Vec::new(),
        keep_local: Vec::new(),
    })
}

fn print_ready(directory: &Path, nodes: &[DevNode]) -> anyhow::Result<()> {
    let client = ClientConfig::load(Some(&layout::client_file(directory)))?;
    let extension = extension_path();
    let replicas = nodes.len() - 1;
    println!("ready");
    println!(
        "one primary, {replicas} replicas, archive {}",
        client.archive.unwrap_or_default()
    );
    println!();
    println!("  export DUROVFS_CONFIG='{}'", client.file.display());
    println!("  sqlite3 -cmd '.load {extension}' -cmd '.open app.db'");
    println!("  durovfs status");
    println!();
    println!(
        "kill a node:    kill -9 $(cat '{}/nodes/replica-1/sidecar.pid')",
        directory.display()
    );
    println!(
        "bring it back:  durovfs dev --dir '{}' --start replica-1",
        directory.display()
    );
    println!("Ctrl-C stops all");
    Ok(())
}

/// The extension is built beside the program.
fn extension_path() -> String {
    let name = format!("libdurovfs{}", std::env::consts::DLL_SUFFIX);
    let beside = std::env::current_exe()
        .ok()
        .and_then(|exe| Some(exe.parent()?.join(&name)));
    match beside.filter(|path| path.exists()) {
        Some(path) => path.display().to_string(),
        None => name,
    }
}

/// Tells of nodes that come and go until it is time to stop.
async fn watch(directory: &Path, nodes: &mut [DevNode], stop: &mut StopSignals) {
    let mut ticker = tokio::time::interval(WATCH_INTERVAL);
    loop {
        tokio::select! {
            () = stop.wait() => return,
            _ = ticker.tick() => {}
        }
        for node in nodes.iter_mut() {
            if let Some(end) = node.ended_now() {
                let (name, directory) = (&node.name, directory.display());
                println!(
                    "{name} ended ({end}); back: durovfs dev --dir '{directory}' --start {name}"
                );
            }
        }
    }
}

/// Stops the primary while its replicas can still answer it, then the replicas, all at once.
async fn stop_all(nodes: &mut [DevNode]) -> Result<(), Failure> {
    let Some((primary, replicas)) = nodes.split_first_mut() else {
        return Ok(());
    };
    let mut problems = Vec::new();
    problems.extend(primary.stop(STOP_PRIMARY_TIMEOUT).await.err());
    replicas.iter().for_each(DevNode::ask_to_stop);
    for replica in replicas {
        problems.extend(replica.stop(STOP_REPLICA_TIMEOUT).await.err());
    }
    match problems.into_iter().next() {
        Some(problem) => Err(problem.into()),
        None => Ok(()),
    }
}

/// Ctrl-C, a polite kill, and the end of the terminal.
struct StopSignals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
    seen: bool,
}

impl StopSignals {
    fn new() -> anyhow::Result<Self> {
        let listen = |kind| signal(kind).context("listen for signals");
        Ok(Self {
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
            hangup: listen(SignalKind::hangup())?,
            seen: false,
        })
    }

    async fn wait(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
            _ = self.hangup.recv() => {}
        }
        self.seen = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(replicas: Option<u16>, chunk_bytes: Option<u64>) -> DevArgs {
        DevArgs {
            dir: None,
            replicas,
            archive: None,
            chunk_interval: None,
            chunk_bytes,
            start: None,
        }
    }

    #[tokio::test]
    async fn a_second_start_goes_on_with_the_same_cluster() {
        // Broken: starting again would make new certificates and ports, and lose the data.
        let directory = tempfile::tempdir().unwrap();
        let names = prepare(&args(None, None), directory.path()).await.unwrap();
        assert_eq!(names.len(), 6);
        let file = layout::sidecar_file(directory.path(), &names[3]);
        let first = SidecarConfig::load(&file).unwrap();
        assert_eq!((first.ack_quorum, first.replicas.len()), (3, 5));
        prepare(&args(Some(5), Some(1 << 20)), directory.path())
            .await
            .unwrap();
        let mut again = SidecarConfig::load(&file).unwrap();
        assert_eq!(again.archive.as_ref().unwrap().chunk_bytes, 1 << 20);
        again.archive.clone_from(&first.archive);
        assert_eq!(again, first);
        let other = prepare(&args(Some(3), None), directory.path())
            .await
            .unwrap_err();
        assert_eq!(other.status, EXIT_USAGE, "{}", other.message);
    }

    #[tokio::test]
    async fn a_port_that_another_program_took_is_replaced_everywhere() {
        // Broken: the cluster would not start after a reboot, or half of it would look for the
        // other half at the old addresses.
        let directory = tempfile::tempdir().unwrap();
        let names = prepare(&args(Some(3), None), directory.path())
            .await
            .unwrap();
        let file = layout::sidecar_file(directory.path(), &names[1]);
        let before = SidecarConfig::load(&file).unwrap();
        let _taken = UdpSocket::bind(before.listen).unwrap();
        prepare(&args(None, None), directory.path()).await.unwrap();
        let after = SidecarConfig::load(&file).unwrap();
        assert_ne!(after.listen, before.listen);
        let client = ClientConfig::load(Some(&layout::client_file(directory.path()))).unwrap();
        assert_eq!(after.nodes[&names[0]], client.sidecar);
    }

    #[test]
    fn two_clusters_never_run_on_one_directory() {
        // Broken: two primaries would write the same journals.
        let directory = tempfile::tempdir().unwrap();
        let held = lock(directory.path()).unwrap();
        assert!(lock(directory.path()).is_err());
        drop(held);
        assert!(lock(directory.path()).is_ok());
    }
}
