//! The files of a cluster: what `init` and `dev` write, and what the commands find again.
//!
//! ```text
//! DIR/ca.pem ca-key.pem          the cluster's authority; its key is needed to add nodes only
//! DIR/client.toml client*.pem    for applications and commands
//! DIR/nodes/NAME/                all that a node needs: copy it to its machine
//!     sidecar.toml ca.pem node.pem node-key.pem data/
//! ```

use crate::config::{ArchiveConfig, SidecarConfig, TlsPaths};
use anyhow::Context;
use durovfs_link::authority::{self, Authority, CA_CERTIFICATE_FILE};
use durovfs_wire::NodeName;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};

/// Name in the client certificate that a new cluster comes with.
const CLIENT_NAME: &str = "client";
/// That certificate may open every database; narrower ones are for the operator to issue.
const ALL_DATABASES: &str = "*";
/// The private directory of a cluster: keys are in it.
const DIRECTORY_MODE: u32 = 0o700;

/// What the client config of a cluster says.
pub struct ClientEntry<'a> {
    /// The sidecar's name.
    pub node: &'a NodeName,
    /// Its `host:port`.
    pub address: &'a str,
    /// The archive, if there is one.
    pub archive: Option<&'a str>,
}

/// Path of a cluster's client config.
pub fn client_file(directory: &Path) -> PathBuf {
    directory.join("client.toml")
}

/// Directory of one node.
pub fn node_directory(directory: &Path, node: &NodeName) -> PathBuf {
    directory.join("nodes").join(node.as_str())
}

/// A node's configuration file.
pub fn sidecar_file(directory: &Path, node: &NodeName) -> PathBuf {
    node_directory(directory, node).join("sidecar.toml")
}

/// The identity files of a node, in its directory.
pub fn node_tls(directory: &Path, node: &NodeName) -> TlsPaths {
    let node_directory = node_directory(directory, node);
    TlsPaths {
        ca: node_directory.join(CA_CERTIFICATE_FILE),
        certificate: node_directory.join("node.pem"),
        key: node_directory.join("node-key.pem"),
    }
}

/// Makes a directory that only its owner may enter.
pub fn create_directory(directory: &Path) -> anyhow::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(DIRECTORY_MODE)
        .create(directory)
        .with_context(|| format!("create {}", directory.display()))
}

/// Makes the authority, a directory for each node, and the client's files, which come last: a
/// directory with a client config holds a whole cluster.
pub fn create_cluster(
    directory: &Path,
    nodes: &[SidecarConfig],
    client: &ClientEntry<'_>,
) -> anyhow::Result<()> {
    create_directory(directory)?;
    let authority = authority::create()?;
    authority.write(directory)?;
    write_nodes(directory, &authority, nodes)?;
    let pair = authority.issue_client(CLIENT_NAME, &[ALL_DATABASES.to_owned()])?;
    pair.write(
        &directory.join("client.pem"),
        &directory.join("client-key.pem"),
    )?;
    write_client(directory, client)
}

/// Makes the directories of further nodes of the cluster.
pub fn add_nodes(directory: &Path, nodes: &[SidecarConfig]) -> anyhow::Result<()> {
    let authority = Authority::load(directory)?;
    write_nodes(directory, &authority, nodes)
}

fn write_nodes(
    directory: &Path,
    authority: &Authority,
    nodes: &[SidecarConfig],
) -> anyhow::Result<()> {
    for config in nodes {
        create_directory(&node_directory(directory, &config.node))?;
        authority.write_certificate(&config.tls.ca)?;
        authority
            .issue_node(&config.node)?
            .write(&config.tls.certificate, &config.tls.key)?;
        write_sidecar(directory, config)?;
    }
    Ok(())
}

/// The configurations of the nodes that the cluster's directory has.
pub fn sidecar_files(directory: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let folder = directory.join("nodes");
    let mut files = Vec::new();
    let entries =
        std::fs::read_dir(&folder).with_context(|| format!("read {}", folder.display()))?;
    for entry in entries {
        let entry = entry.with_context(|| format!("read {}", folder.display()))?;
        let file = entry.path().join("sidecar.toml");
        if file.is_file() {
            files.push(file);
        }
    }
    files.sort();
    Ok(files)
}

/// Adds where further nodes are to a configuration, and leaves the rest of it as it stands.
pub fn append_nodes(file: &Path, nodes: &[(NodeName, String)]) -> anyhow::Result<()> {
    let mut text =
        std::fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
    if !text.ends_with('\n') {
        text.push('\n');
    }
    for (name, address) in nodes {
        render_node(&mut text, name, address);
    }
    write_file(file, &text)
}

fn render_node(text: &mut String, name: &NodeName, address: &str) {
    let (name, address) = (quoted(name.as_str()), quoted(address));
    // Writing to a string cannot fail.
    let _ = write!(text, "\n[[nodes]]\nname = {name}\naddress = {address}\n");
}

/// Writes the client config.
pub fn write_client(directory: &Path, client: &ClientEntry<'_>) -> anyhow::Result<()> {
    let archive = match client.archive {
        Some(url) => format!("archive = {}\n", quoted(url)),
        None => String::new(),
    };
    let text = format!(
        "# Read by libdurovfs and by the durovfs commands.\n\
         sidecar = {}\nnode = {}\nca = \"ca.pem\"\n\
         certificate = \"client.pem\"\nkey = \"client-key.pem\"\n{archive}\
         # Patterns of database paths; with no include, all files are protected.\n\
         include = []\nexclude = []\n\
         # Those whose local file counts when the log says otherwise; docs/guarantees.md.\n\
         keep_local = []\n",
        quoted(client.address),
        quoted(client.node.as_str()),
    );
    write_file(&client_file(directory), &text)
}

/// Writes a node's configuration.
pub fn write_sidecar(directory: &Path, config: &SidecarConfig) -> anyhow::Result<()> {
    let file = sidecar_file(directory, &config.node);
    write_file(
        &file,
        &render_sidecar(&node_directory(directory, &config.node), config),
    )
}

fn render_sidecar(node_directory: &Path, config: &SidecarConfig) -> String {
    // Relative where possible, so that a node's directory can be moved.
    let path = |path: &Path| {
        quoted(
            &path
                .strip_prefix(node_directory)
                .unwrap_or(path)
                .to_string_lossy(),
        )
    };
    let replicas: Vec<_> = config
        .replicas
        .iter()
        .map(|name| quoted(name.as_str()))
        .collect();
    let mut text = format!(
        "# One durovfs sidecar: durovfs sidecar --config sidecar.toml\n\
         node = {}\nlisten = {}\ndata = {}\n\
         # The replicas of databases that are created here, and how many of them must hold a\n\
         # transaction on disk before its COMMIT returns.\n\
         replicas = [{}]\nack_quorum = {}\n\n\
         [tls]\nca = {}\ncertificate = {}\nkey = {}\n\n\
         [journal]\nsegment_bytes = \"{}\"\nlimit_bytes = \"{}\"\nscrub_interval = \"{}ms\"\n",
        quoted(config.node.as_str()),
        quoted(&config.listen.to_string()),
        path(&config.data),
        replicas.join(", "),
        config.ack_quorum,
        path(&config.tls.ca),
        path(&config.tls.certificate),
        path(&config.tls.key),
        config.journal.segment_bytes,
        config.journal.limit_bytes,
        config.journal.scrub_interval.as_millis(),
    );
    if let Some(ArchiveConfig {
        url,
        chunk_interval,
        chunk_bytes,
        orphan_after,
    }) = &config.archive
    {
        let _ = write!(
            text,
            "\n[archive]\nurl = {}\nchunk_interval = \"{}ms\"\nchunk_bytes = \"{chunk_bytes}\"\n\
             orphan_after = \"{}ms\"\n",
            quoted(url),
            chunk_interval.as_millis(),
            orphan_after.as_millis(),
        );
    }
    if let Some(copies) = &config.copies {
        let patterns = |patterns: &[String]| {
            let quoted: Vec<_> = patterns.iter().map(|pattern| quoted(pattern)).collect();
            quoted.join(", ")
        };
        let _ = write!(
            text,
            "\n[copies]\ndirectory = {}\ninclude = [{}]\nexclude = [{}]\n",
            path(&copies.directory),
            patterns(&copies.include),
            patterns(&copies.exclude),
        );
    }
    for (name, address) in &config.nodes {
        render_node(&mut text, name, address);
    }
    text
}

fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

/// Writes a file whole or not at all.
pub fn write_file(file: &Path, text: &str) -> anyhow::Result<()> {
    let directory = file.parent().unwrap_or(Path::new("."));
    let write = || -> std::io::Result<()> {
        let mut temporary = tempfile::NamedTempFile::new_in(directory)?;
        temporary.write_all(text.as_bytes())?;
        temporary.as_file().sync_all()?;
        temporary.persist(file)?;
        Ok(())
    };
    write().with_context(|| format!("write {}", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{CopiesConfig, JournalConfig};
    use std::time::Duration;

    #[test]
    fn what_is_written_is_what_is_read() {
        // Broken: a cluster would not start from the files that `durovfs init` wrote, or with
        // another quorum than it was told.
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path().join("with \"quotes\" and spaces");
        let node: NodeName = "primary".parse().unwrap();
        create_directory(&node_directory(&directory, &node)).unwrap();
        let config = SidecarConfig {
            file: sidecar_file(&directory, &node),
            node: node.clone(),
            listen: "127.0.0.1:4001".parse().unwrap(),
            data: node_directory(&directory, &node).join("data"),
            tls: node_tls(&directory, &node),
            nodes: [(node.clone(), "127.0.0.1:4001".to_owned())].into(),
            replicas: vec![node.clone()],
            ack_quorum: 1,
            archive: Some(ArchiveConfig {
                url: "file:///a b".to_owned(),
                chunk_interval: Duration::from_millis(250),
                chunk_bytes: 1 << 20,
                orphan_after: Duration::from_secs(7),
            }),
            journal: JournalConfig {
                segment_bytes: 8 << 20,
                limit_bytes: 1 << 30,
                scrub_interval: Duration::from_secs(3600),
            },
            copies: Some(CopiesConfig {
                directory: "/srv/copies".into(),
                include: vec!["/srv/**".to_owned()],
                exclude: vec!["**/scratch-*".to_owned()],
            }),
        };
        write_sidecar(&directory, &config).unwrap();
        assert_eq!(
            SidecarConfig::load(&sidecar_file(&directory, &node)).unwrap(),
            config
        );
    }
}
