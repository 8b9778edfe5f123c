//! `durovfs init`: the files of a new cluster, to be copied to its machines.

use super::layout::{self, ClientEntry};
use super::{EXIT_USAGE, Failure};
use crate::config::{
    ArchiveConfig, DEFAULT_CHUNK_BYTES, DEFAULT_CHUNK_INTERVAL, DEFAULT_JOURNAL_LIMIT_BYTES,
    DEFAULT_ORPHAN_AFTER, DEFAULT_SCRUB_INTERVAL, DEFAULT_SEGMENT_BYTES, JournalConfig,
    SidecarConfig, parse_archive_url,
};
use anyhow::Context;
use clap::Args;
use durovfs_link::authority::CA_KEY_FILE;
use durovfs_wire::NodeName;
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

/// Make the files of a new cluster: authority, a directory per node, a client config
///
/// The first node is the one that applications on its host talk to; the others are the replicas,
/// unless --replica names them. Copy DIR/nodes/NAME to each machine and run there
/// `durovfs sidecar --config NAME/sidecar.toml`; copy DIR/client.toml, ca.pem, client.pem and
/// client-key.pem to the application's host. Keep ca-key.pem in a safe place.
///
/// With --add the nodes are added to the cluster that DIR holds (its ca-key.pem is needed): each
/// gets its directory, and the configurations in DIR learn where it is. Copy their `[[nodes]]`
/// entries to the machines whose databases are to use it; a running sidecar reads them when
/// `durovfs replace` names the node.
#[derive(Args)]
pub struct InitArgs {
    /// Where the files go; must not hold a cluster yet, unless --add is given.
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
    /// Add the nodes to the cluster in DIR.
    #[arg(long, conflicts_with = "replicas", conflicts_with = "archive")]
    add: bool,
    /// A node and where the others reach it (UDP); repeat for each.
    #[arg(long = "node", value_name = "NAME=HOST:PORT", required = true, value_parser = parse_node)]
    nodes: Vec<(NodeName, String)>,
    /// A node that is a replica of new databases; repeat for each. Default: all but the first node.
    #[arg(long = "replica", value_name = "NAME")]
    replicas: Vec<NodeName>,
    /// file:///DIRECTORY, or s3://BUCKET/PREFIX with ?endpoint=…&region=… if needed.
    #[arg(long, value_name = "URL", value_parser = parse_archive_url)]
    archive: Option<String>,
}

fn parse_node(text: &str) -> Result<(NodeName, String), String> {
    let (name, address) = text.split_once('=').ok_or("expected NAME=HOST:PORT")?;
    let name = name
        .parse::<NodeName>()
        .map_err(|error| error.to_string())?;
    port_of(address).ok_or_else(|| format!("{address:?} is not HOST:PORT"))?;
    Ok((name, address.to_owned()))
}

fn port_of(address: &str) -> Option<u16> {
    let (host, port) = address.rsplit_once(':')?;
    port.parse()
        .ok()
        .filter(|port| *port != 0 && !host.is_empty())
}

/// Writes the files.
///
/// # Errors
/// When the directory holds a cluster already, or a name is used twice or not a node's.
pub fn run(args: InitArgs) -> Result<(), Failure> {
    if args.add {
        return add_nodes(&args);
    }
    let configs = plan(&args)?;
    let authority_key = args.dir.join(CA_KEY_FILE);
    if authority_key.exists() || layout::client_file(&args.dir).exists() {
        return Err(Failure::new(
            super::EXIT_FAILED,
            format!(
                "init: {} holds a cluster already; choose another --dir",
                args.dir.display()
            ),
        ));
    }
    let (node, address) = &args.nodes[0];
    let client = ClientEntry {
        node,
        address,
        archive: args.archive.as_deref(),
    };
    layout::create_cluster(&args.dir, &configs, &client)?;
    let directory = args.dir.display();
    println!("cluster of {} nodes in {directory}", configs.len());
    for config in &configs {
        let name = &config.node;
        println!("  {name}: copy {directory}/nodes/{name}, then run there:");
        println!("    durovfs sidecar --config {name}/sidecar.toml");
    }
    println!("  applications: copy {directory}/{{client.toml,ca.pem,client.pem,client-key.pem}},");
    println!("    then set DUROVFS_CONFIG to that client.toml and load libdurovfs");
    Ok(())
}

/// Adds nodes to a cluster that is there.
fn add_nodes(args: &InitArgs) -> Result<(), Failure> {
    let directory = std::path::absolute(&args.dir).context("find the directory")?;
    let known = layout::sidecar_files(&directory)?;
    let Some(like) = known.first() else {
        let message = format!("init: {} holds no cluster", directory.display());
        return Err(Failure::new(super::EXIT_FAILED, message));
    };
    let like = SidecarConfig::load(like)?;
    let mut nodes = like.nodes.clone();
    for (name, address) in &args.nodes {
        if nodes.insert(name.clone(), address.clone()).is_some() {
            let message = format!("init: node {name} is there already, or given twice");
            return Err(Failure::new(EXIT_USAGE, message));
        }
    }
    let config = |(name, address): &(NodeName, String)| SidecarConfig {
        file: layout::sidecar_file(&directory, name),
        node: name.clone(),
        listen: listen_address(address),
        data: layout::node_directory(&directory, name).join("data"),
        tls: layout::node_tls(&directory, name),
        nodes: nodes.clone(),
        ..like.clone()
    };
    let configs: Vec<SidecarConfig> = args.nodes.iter().map(config).collect();
    layout::add_nodes(&directory, &configs)?;
    for file in known {
        layout::append_nodes(&file, &args.nodes)?;
    }
    for config in &configs {
        let name = &config.node;
        println!(
            "{name}: copy {}/nodes/{name}, then run there:",
            args.dir.display()
        );
        println!("  durovfs sidecar --config {name}/sidecar.toml");
        println!("give it a replica with: durovfs replace DB OLD {name}");
    }
    Ok(())
}

/// The configurations of all nodes.
fn plan(args: &InitArgs) -> Result<Vec<SidecarConfig>, Failure> {
    let usage = |message: String| Failure::new(EXIT_USAGE, format!("init: {message}"));
    let mut nodes = BTreeMap::new();
    for (name, address) in &args.nodes {
        if nodes.insert(name.clone(), address.clone()).is_some() {
            return Err(usage(format!("node {name} is given twice")));
        }
    }
    let replicas = match args.replicas.as_slice() {
        [] if args.nodes.len() == 1 => return Err(usage("one node is no cluster".to_owned())),
        [] => args.nodes[1..]
            .iter()
            .map(|(name, _)| name.clone())
            .collect(),
        chosen => chosen.to_vec(),
    };
    for (index, name) in replicas.iter().enumerate() {
        if !nodes.contains_key(name) || replicas[..index].contains(name) {
            return Err(usage(format!(
                "replica {name} is no node, or is given twice"
            )));
        }
    }
    let directory = std::path::absolute(&args.dir).map_err(|error| usage(error.to_string()))?;
    let config = |(name, address): &(NodeName, String)| {
        node_config(
            &directory,
            name,
            listen_address(address),
            &nodes,
            &replicas,
            &args.archive,
        )
    };
    Ok(args.nodes.iter().map(config).collect())
}

/// A node listens on the address that it is known by, or on all when it is known by a host name.
fn listen_address(address: &str) -> SocketAddr {
    let any = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
    address
        .parse()
        .unwrap_or(SocketAddr::new(any, port_of(address).unwrap_or_default()))
}

/// The configuration of a node in a new cluster.
pub fn node_config(
    directory: &Path,
    node: &NodeName,
    listen: SocketAddr,
    nodes: &BTreeMap<NodeName, String>,
    replicas: &[NodeName],
    archive: &Option<String>,
) -> SidecarConfig {
    SidecarConfig {
        file: layout::sidecar_file(directory, node),
        node: node.clone(),
        listen,
        data: layout::node_directory(directory, node).join("data"),
        tls: layout::node_tls(directory, node),
        nodes: nodes.clone(),
        replicas: replicas.to_vec(),
        ack_quorum: replicas.len() / 2 + 1,
        archive: archive.as_ref().map(|url| ArchiveConfig {
            url: url.clone(),
            chunk_interval: DEFAULT_CHUNK_INTERVAL,
            chunk_bytes: DEFAULT_CHUNK_BYTES,
            orphan_after: DEFAULT_ORPHAN_AFTER,
        }),
        journal: JournalConfig {
            segment_bytes: DEFAULT_SEGMENT_BYTES,
            limit_bytes: DEFAULT_JOURNAL_LIMIT_BYTES,
            scrub_interval: DEFAULT_SCRUB_INTERVAL,
        },
        copies: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ClientConfig;

    fn args(directory: &Path, nodes: &[&str], replicas: &[&str]) -> InitArgs {
        InitArgs {
            dir: directory.join("cluster"),
            add: false,
            nodes: nodes.iter().map(|node| parse_node(node).unwrap()).collect(),
            replicas: replicas.iter().map(|name| name.parse().unwrap()).collect(),
            archive: Some("file:///archive".to_owned()),
        }
    }

    #[test]
    fn a_cluster_of_six_has_five_replicas_and_a_quorum_of_three() {
        // Broken: a new cluster would confirm commits that fewer than three machines hold, or keep
        // keys that every user of the machine can read.
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::tempdir().unwrap();
        let nodes = [
            "a=10.0.0.1:4000",
            "b=b:4000",
            "c=c:1",
            "d=d:2",
            "e=e:3",
            "f=f:4",
        ];
        run(args(directory.path(), &nodes, &[])).unwrap();
        let cluster = directory.path().join("cluster");
        let node = "f".parse().unwrap();
        let config = SidecarConfig::load(&layout::sidecar_file(&cluster, &node)).unwrap();
        assert_eq!((config.replicas.len(), config.ack_quorum), (5, 3));
        assert_eq!(config.listen.to_string(), "0.0.0.0:4");
        let client = ClientConfig::load(Some(&layout::client_file(&cluster))).unwrap();
        assert_eq!(
            (client.sidecar.as_str(), client.node.as_str()),
            ("10.0.0.1:4000", "a")
        );
        for key in [cluster.join(CA_KEY_FILE), config.tls.key, client.tls.key] {
            let mode = std::fs::metadata(&key).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{}", key.display());
        }
        // A second run would replace the authority of a running cluster.
        let again = run(args(directory.path(), &nodes, &[])).unwrap_err();
        assert_eq!(again.status, crate::cli::EXIT_FAILED);
        assert!(
            again.message.contains("holds a cluster already"),
            "{}",
            again.message
        );
    }

    #[test]
    fn nonsense_is_a_usage_error() {
        // Broken: a cluster with an unknown replica would be found out at its first commit.
        let directory = tempfile::tempdir().unwrap();
        for (nodes, replicas) in [
            (vec!["a=a:1"], vec![]),
            (vec!["a=a:1", "a=b:2"], vec![]),
            (vec!["a=a:1", "b=b:2"], vec!["c"]),
            (vec!["a=a:1", "b=b:2"], vec!["b", "b"]),
        ] {
            let failure = run(args(directory.path(), &nodes, &replicas)).unwrap_err();
            assert_eq!(failure.status, EXIT_USAGE, "{nodes:?} {replicas:?}");
        }
        for bad in ["a", "a=b", "a=b:0", "A=b:1", "a=:1", "a=b:99999"] {
            assert!(parse_node(bad).is_err(), "{bad}");
        }
    }
}
