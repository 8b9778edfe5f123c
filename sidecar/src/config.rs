//! Configuration files: the sidecar's `sidecar.toml` and the client's `client.toml`.
//!
//! What is read here is checked here, once: the rest of the program holds values that are known to
//! be sound. Relative paths are relative to the file that names them. No defaults that change what
//! is durable: a key that matters for that must be written down.

use durovfs_wire::NodeName;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Committed entries are uploaded at the latest after this time: what a restore may lack when all
/// nodes are lost at once.
pub const DEFAULT_CHUNK_INTERVAL: Duration = Duration::from_secs(10);
/// … or when this much of them has come together: large enough that requests cost little.
pub const DEFAULT_CHUNK_BYTES: u64 = 16 << 20;
/// A primary that was silent for this long is taken to be gone as far as the archive goes: above a
/// restart of its sidecar, or of its host. Two that upload the same do no harm.
pub const DEFAULT_ORPHAN_AFTER: Duration = Duration::from_secs(60);
/// Size of a journal file: dropped as a whole, so not too large; made ahead, so not too small.
pub const DEFAULT_SEGMENT_BYTES: u64 = 64 << 20;
/// What a journal may take when the archive cannot be reached: hours of ordinary writing.
pub const DEFAULT_JOURNAL_LIMIT_BYTES: u64 = 4 << 30;
/// All entries that are held are read and compared with their checksums this often: a bit that rots
/// is found while other replicas still hold the entry.
pub const DEFAULT_SCRUB_INTERVAL: Duration = Duration::from_secs(24 * 3600);
/// Largest configuration file that is read: a list of thousands of nodes fits.
const MAX_CONFIG_BYTES: u64 = 1 << 20;
/// A journal needs room for the segment in use and the one that is being prepared.
const MIN_SEGMENTS: u64 = 3;
/// Smallest journal file: one part of an entry and the states of some thousand databases fit.
const MIN_SEGMENT_BYTES: u64 = 4 << 20;
/// Smallest chunk: below this the store's price per request is all that counts.
const MIN_CHUNK_BYTES: u64 = 64 << 10;

/// A configuration that cannot be used: which file, which key, what is wrong with it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("config {}: {problem}", file.display())]
pub struct ConfigError {
    /// The file.
    pub file: PathBuf,
    /// The key and what is wrong: one line.
    pub problem: String,
}

/// Files of a node's identity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsPaths {
    /// Certificate of the cluster's authority.
    pub ca: PathBuf,
    /// Certificate of this node or client.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// Where committed entries go for good.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArchiveConfig {
    /// `file:///dir` or `s3://bucket/prefix`.
    pub url: String,
    /// Longest time that a committed entry waits for its upload to begin.
    pub chunk_interval: Duration,
    /// Bytes of committed entries after which an upload begins.
    pub chunk_bytes: u64,
    /// How long a primary may be silent until a replica uploads in its place.
    pub orphan_after: Duration,
}

/// The node's journal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JournalConfig {
    /// Bytes of one journal file.
    pub segment_bytes: u64,
    /// Bytes that all of them may take.
    pub limit_bytes: u64,
    /// Pause between two readings of all that is held.
    pub scrub_interval: Duration,
}

/// Which databases have a warm copy on this node, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopiesConfig {
    /// Folder of the copies; each is called by the name of its database below it.
    pub directory: PathBuf,
    /// Patterns of names that have one; none means all.
    pub include: Vec<String>,
    /// Patterns of names that have none.
    pub exclude: Vec<String>,
}

/// Configuration of one sidecar.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SidecarConfig {
    /// The file that all this comes from.
    pub file: PathBuf,
    /// This node.
    pub node: NodeName,
    /// Where it listens (UDP).
    pub listen: SocketAddr,
    /// Where it keeps its journal.
    pub data: PathBuf,
    /// Its identity.
    pub tls: TlsPaths,
    /// All nodes of the cluster, this one too, and their `host:port`.
    pub nodes: BTreeMap<NodeName, String>,
    /// The replicas of databases that are created here.
    pub replicas: Vec<NodeName>,
    /// How many of them must hold an entry before it is committed.
    pub ack_quorum: usize,
    /// The archive, if there is one.
    pub archive: Option<ArchiveConfig>,
    /// The journal.
    pub journal: JournalConfig,
    /// Warm copies, if there are to be any.
    pub copies: Option<CopiesConfig>,
}

/// Configuration of the extension and of the commands that talk to a sidecar.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientConfig {
    /// The file that all this comes from.
    pub file: PathBuf,
    /// `host:port` of the local sidecar.
    pub sidecar: String,
    /// Its name, which its certificate must carry.
    pub node: NodeName,
    /// The client's identity.
    pub tls: TlsPaths,
    /// The archive, for commands that work without a sidecar.
    pub archive: Option<String>,
    /// Patterns of database paths that are protected; none means all.
    pub include: Vec<String>,
    /// Patterns of database paths that are not.
    pub exclude: Vec<String>,
    /// Patterns of database paths whose local file counts when it is not what the log says.
    pub keep_local: Vec<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawSidecar {
    node: String,
    listen: String,
    data: PathBuf,
    tls: RawTls,
    nodes: Vec<RawNode>,
    replicas: Vec<String>,
    ack_quorum: Option<usize>,
    archive: Option<RawArchive>,
    #[serde(default)]
    journal: RawJournal,
    copies: Option<RawCopies>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTls {
    ca: PathBuf,
    certificate: PathBuf,
    key: PathBuf,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawNode {
    name: String,
    address: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawArchive {
    url: String,
    chunk_interval: Option<String>,
    chunk_bytes: Option<String>,
    orphan_after: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct RawJournal {
    segment_bytes: Option<String>,
    limit_bytes: Option<String>,
    scrub_interval: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawCopies {
    directory: PathBuf,
    #[serde(default)]
    include: Vec<String>,
    #[serde(default)]
    exclude: Vec<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawClient {
    sidecar: String,
    node: String,
    ca: PathBuf,
    certificate: PathBuf,
    key: PathBuf,
    archive: Option<String>,
    #[serde(default)]
    include: Vec<String>,
    #[serde(default)]
    exclude: Vec<String>,
    #[serde(default)]
    keep_local: Vec<String>,
}

/// The file being read: names itself in errors, and resolves paths.
struct Source<'a> {
    file: &'a Path,
}

impl Source<'_> {
    fn error(&self, problem: impl Into<String>) -> ConfigError {
        ConfigError {
            file: self.file.to_owned(),
            problem: problem.into(),
        }
    }

    fn key_error(&self, key: &str, problem: impl std::fmt::Display) -> ConfigError {
        self.error(format!("key {key}: {problem}"))
    }

    fn read(&self) -> Result<String, ConfigError> {
        let describe = |error| self.error(format!("cannot read it: {error}"));
        let length = std::fs::metadata(self.file).map_err(describe)?.len();
        if length > MAX_CONFIG_BYTES {
            return Err(self.error(format!("{length} bytes are more than {MAX_CONFIG_BYTES}")));
        }
        std::fs::read_to_string(self.file).map_err(describe)
    }

    fn parse<T: serde::de::DeserializeOwned>(&self, text: &str) -> Result<T, ConfigError> {
        toml::from_str(text).map_err(|error: toml::de::Error| {
            let line = error.span().map_or(1, |span| {
                1 + text
                    .as_bytes()
                    .iter()
                    .take(span.start)
                    .filter(|byte| **byte == b'\n')
                    .count()
            });
            let message = error.message().replace('\n', "; ");
            self.error(format!("line {line}: {message}"))
        })
    }

    fn path(&self, path: PathBuf) -> PathBuf {
        // `join` keeps an absolute path as it is.
        self.file
            .parent()
            .map_or(path.clone(), |directory| directory.join(path))
    }

    fn node_name(&self, key: &str, text: String) -> Result<NodeName, ConfigError> {
        NodeName::try_from(text).map_err(|error| self.key_error(key, error))
    }

    fn tls(&self, raw: RawTls) -> TlsPaths {
        TlsPaths {
            ca: self.path(raw.ca),
            certificate: self.path(raw.certificate),
            key: self.path(raw.key),
        }
    }

    fn bytes(
        &self,
        key: &str,
        text: Option<&str>,
        default: u64,
        minimum: u64,
    ) -> Result<u64, ConfigError> {
        let bytes = match text {
            Some(text) => parse_bytes(text).map_err(|problem| self.key_error(key, problem))?,
            None => default,
        };
        if bytes < minimum {
            return Err(self.key_error(key, format!("{bytes} bytes; at least {minimum} needed")));
        }
        Ok(bytes)
    }

    fn nodes(&self, raw: Vec<RawNode>) -> Result<BTreeMap<NodeName, String>, ConfigError> {
        let mut nodes = BTreeMap::new();
        for entry in raw {
            let name = self.node_name("nodes.name", entry.name)?;
            check_host_port(&entry.address)
                .map_err(|problem| self.key_error("nodes.address", problem))?;
            if nodes.insert(name.clone(), entry.address).is_some() {
                return Err(self.key_error("nodes", format!("{name} is listed twice")));
            }
        }
        Ok(nodes)
    }

    fn replicas(
        &self,
        raw: Vec<String>,
        nodes: &BTreeMap<NodeName, String>,
    ) -> Result<Vec<NodeName>, ConfigError> {
        let mut replicas = Vec::new();
        for text in raw {
            let name = self.node_name("replicas", text)?;
            if !nodes.contains_key(&name) {
                return Err(self.key_error("replicas", format!("{name} is not among nodes")));
            }
            if replicas.contains(&name) {
                return Err(self.key_error("replicas", format!("{name} is listed twice")));
            }
            replicas.push(name);
        }
        if replicas.is_empty() {
            return Err(self.key_error("replicas", "at least one is needed"));
        }
        Ok(replicas)
    }

    fn ack_quorum(&self, raw: Option<usize>, replicas: usize) -> Result<usize, ConfigError> {
        let majority = replicas / 2 + 1;
        let quorum = raw.unwrap_or(majority);
        // Two quorums that share no replica could commit two different entries at one position.
        if quorum < majority || quorum > replicas {
            return Err(self.key_error(
                "ack_quorum",
                format!("{quorum} of {replicas} replicas; use {majority} to {replicas}"),
            ));
        }
        Ok(quorum)
    }

    fn interval(
        &self,
        key: &str,
        text: Option<&str>,
        default: Duration,
    ) -> Result<Duration, ConfigError> {
        let interval = match text {
            Some(text) => parse_duration(text).map_err(|problem| self.key_error(key, problem))?,
            None => default,
        };
        if interval.is_zero() {
            return Err(self.key_error(key, "must be more than zero"));
        }
        Ok(interval)
    }

    fn archive(&self, raw: RawArchive) -> Result<ArchiveConfig, ConfigError> {
        check_archive_url(&raw.url).map_err(|problem| self.key_error("archive.url", problem))?;
        let chunk_interval = self.interval(
            "archive.chunk_interval",
            raw.chunk_interval.as_deref(),
            DEFAULT_CHUNK_INTERVAL,
        )?;
        let chunk_bytes = self.bytes(
            "archive.chunk_bytes",
            raw.chunk_bytes.as_deref(),
            DEFAULT_CHUNK_BYTES,
            MIN_CHUNK_BYTES,
        )?;
        let orphan_after = self.interval(
            "archive.orphan_after",
            raw.orphan_after.as_deref(),
            DEFAULT_ORPHAN_AFTER,
        )?;
        Ok(ArchiveConfig {
            url: raw.url,
            chunk_interval,
            chunk_bytes,
            orphan_after,
        })
    }

    fn copies(&self, raw: RawCopies) -> Result<CopiesConfig, ConfigError> {
        for (key, patterns) in [
            ("copies.include", &raw.include),
            ("copies.exclude", &raw.exclude),
        ] {
            for pattern in patterns {
                globset::Glob::new(pattern).map_err(|error| self.key_error(key, error))?;
            }
        }
        Ok(CopiesConfig {
            directory: self.path(raw.directory),
            include: raw.include,
            exclude: raw.exclude,
        })
    }

    fn journal(&self, raw: RawJournal) -> Result<JournalConfig, ConfigError> {
        let segment_bytes = self.bytes(
            "journal.segment_bytes",
            raw.segment_bytes.as_deref(),
            DEFAULT_SEGMENT_BYTES,
            MIN_SEGMENT_BYTES,
        )?;
        let limit_bytes = self.bytes(
            "journal.limit_bytes",
            raw.limit_bytes.as_deref(),
            DEFAULT_JOURNAL_LIMIT_BYTES,
            segment_bytes.saturating_mul(MIN_SEGMENTS),
        )?;
        let scrub_interval = self.interval(
            "journal.scrub_interval",
            raw.scrub_interval.as_deref(),
            DEFAULT_SCRUB_INTERVAL,
        )?;
        Ok(JournalConfig {
            segment_bytes,
            limit_bytes,
            scrub_interval,
        })
    }
}

impl SidecarConfig {
    /// Reads and checks a `sidecar.toml`.
    ///
    /// # Errors
    /// When the file cannot be read, or something in it cannot be meant.
    pub fn load(file: &Path) -> Result<Self, ConfigError> {
        let source = Source { file };
        Self::parse(&source, &source.read()?)
    }

    fn parse(source: &Source<'_>, text: &str) -> Result<Self, ConfigError> {
        let raw: RawSidecar = source.parse(text)?;
        let node = source.node_name("node", raw.node)?;
        let listen = raw.listen.parse().map_err(|_| {
            source.key_error("listen", format!("{:?} is not ADDRESS:PORT", raw.listen))
        })?;
        let nodes = source.nodes(raw.nodes)?;
        if !nodes.contains_key(&node) {
            return Err(source.key_error("node", format!("{node} is not among nodes")));
        }
        let replicas = source.replicas(raw.replicas, &nodes)?;
        let ack_quorum = source.ack_quorum(raw.ack_quorum, replicas.len())?;
        Ok(Self {
            file: source.file.to_owned(),
            node,
            listen,
            data: source.path(raw.data),
            tls: source.tls(raw.tls),
            nodes,
            replicas,
            ack_quorum,
            archive: raw.archive.map(|raw| source.archive(raw)).transpose()?,
            journal: source.journal(raw.journal)?,
            copies: raw.copies.map(|raw| source.copies(raw)).transpose()?,
        })
    }
}

impl ClientConfig {
    /// Reads and checks the client config: the file given, or the first of those that
    /// [`client_config_candidates`] names and that exists.
    ///
    /// # Errors
    /// When there is none, it cannot be read, or something in it cannot be meant.
    pub fn load(explicit: Option<&Path>) -> anyhow::Result<Self> {
        let file = match explicit {
            Some(file) => file.to_owned(),
            None => find_client_config(|name| std::env::var_os(name).map(PathBuf::from))?,
        };
        let source = Source { file: &file };
        Ok(Self::parse(&source, &source.read()?)?)
    }

    fn parse(source: &Source<'_>, text: &str) -> Result<Self, ConfigError> {
        let raw: RawClient = source.parse(text)?;
        check_host_port(&raw.sidecar).map_err(|problem| source.key_error("sidecar", problem))?;
        if let Some(url) = &raw.archive {
            check_archive_url(url).map_err(|problem| source.key_error("archive", problem))?;
        }
        let tls = RawTls {
            ca: raw.ca,
            certificate: raw.certificate,
            key: raw.key,
        };
        Ok(Self {
            file: source.file.to_owned(),
            sidecar: raw.sidecar,
            node: source.node_name("node", raw.node)?,
            tls: source.tls(tls),
            archive: raw.archive,
            include: raw.include,
            exclude: raw.exclude,
            keep_local: raw.keep_local,
        })
    }
}

/// Where a client config is looked for when `DUROVFS_CONFIG` names none, first match wins.
pub fn client_config_candidates(env: impl Fn(&str) -> Option<PathBuf>) -> Vec<PathBuf> {
    let home = env("HOME");
    let config = env("XDG_CONFIG_HOME").or_else(|| home.as_ref().map(|home| home.join(".config")));
    let mut candidates = Vec::new();
    if let Some(config) = config {
        candidates.push(config.join("durovfs/client.toml"));
    }
    candidates.push(PathBuf::from("/etc/durovfs/client.toml"));
    if let Some(dev) = dev_directory(env) {
        candidates.push(dev.join("client.toml"));
    }
    candidates
}

/// The default directory of `durovfs dev`: `$XDG_STATE_HOME/durovfs/dev`.
pub fn dev_directory(env: impl Fn(&str) -> Option<PathBuf>) -> Option<PathBuf> {
    let state = env("XDG_STATE_HOME")
        .or_else(|| env("HOME").map(|home| home.join(".local").join("state")))?;
    Some(state.join("durovfs").join("dev"))
}

fn find_client_config(env: impl Fn(&str) -> Option<PathBuf>) -> anyhow::Result<PathBuf> {
    if let Some(file) = env("DUROVFS_CONFIG") {
        return Ok(file);
    }
    let candidates = client_config_candidates(env);
    if let Some(found) = candidates.iter().find(|file| file.exists()) {
        return Ok(found.clone());
    }
    let tried: Vec<_> = candidates
        .iter()
        .map(|file| file.display().to_string())
        .collect();
    anyhow::bail!(
        "no client config: looked for {}; set DUROVFS_CONFIG, or start `durovfs dev`",
        tried.join(", ")
    )
}

fn check_host_port(text: &str) -> Result<(), String> {
    let valid = text.rsplit_once(':').is_some_and(|(host, port)| {
        !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port != 0)
    });
    if valid {
        Ok(())
    } else {
        Err(format!("{text:?} is not HOST:PORT"))
    }
}

fn check_archive_url(url: &str) -> Result<(), String> {
    let valid = url
        .strip_prefix("file://")
        .is_some_and(|path| path.starts_with('/'))
        || url
            .strip_prefix("s3://")
            .is_some_and(|bucket| !bucket.is_empty());
    if valid {
        Ok(())
    } else {
        Err(format!(
            "{url:?} is neither file:///DIRECTORY nor s3://BUCKET/PREFIX"
        ))
    }
}

/// Reads an archive URL as it is typed on a command line.
///
/// # Errors
/// When its scheme is not one that durovfs knows.
pub fn parse_archive_url(text: &str) -> Result<String, String> {
    check_archive_url(text).map(|()| text.to_owned())
}

/// Reads `500ms`, `10s`, `5m`, `2h`, `30d`.
///
/// # Errors
/// When it is not a whole number and one of these units.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let (number, unit) = split_unit(text);
    let millis_per_unit = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => {
            return Err(format!(
                "{text:?} is not a duration such as 500ms, 10s, 5m, 2h"
            ));
        }
    };
    number
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(millis_per_unit))
        .map(Duration::from_millis)
        .ok_or_else(|| format!("{text:?} is not a duration such as 500ms, 10s, 5m, 2h"))
}

/// Reads `4096`, `64KiB`, `16MiB`, `4GiB`, `1TiB`.
///
/// # Errors
/// When it is not a whole number, alone or with one of these units.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let problem = || format!("{text:?} is not a size such as 65536, 64KiB, 16MiB, 4GiB");
    let (number, unit) = split_unit(text);
    let shift = match unit {
        "" | "B" => 0,
        "KiB" => 10,
        "MiB" => 20,
        "GiB" => 30,
        "TiB" => 40,
        _ => return Err(problem()),
    };
    let number: u64 = number.parse().map_err(|_| problem())?;
    number.checked_mul(1 << shift).ok_or_else(problem)
}

fn split_unit(text: &str) -> (&str, &str) {
    let text = text.trim();
    let end = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    (number, unit.trim_start())
}

#[cfg(test)]
mod tests;
