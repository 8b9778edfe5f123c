//! What nodes tell people about themselves: what `durovfs status` and `durovfs_status()` show.
//!
//! The field names are the names in `--json` output, which is stable: add, do not rename.

use crate::ids::{DatabaseId, NodeName};
use crate::position::{Epoch, Lsn};
use serde::{Deserialize, Serialize};

/// A node's role towards one database.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Takes commits.
    Primary,
    /// Keeps entries for a primary.
    Replica,
}

/// State of one node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeStatus {
    /// Its name.
    pub node: NodeName,
    /// Version of the program.
    pub version: String,
    /// Its databases, by name; at most [`MAX_DATABASES_LISTED`] of them.
    pub databases: Vec<DatabaseStatus>,
    /// How many databases it has.
    pub database_count: u64,
    /// Bytes of its journal on disk.
    pub journal_bytes: u64,
    /// Bytes that its journal may take.
    pub journal_limit_bytes: u64,
    /// The other nodes.
    pub peers: Vec<PeerStatus>,
    /// What a person should look at: one line each.
    pub warnings: Vec<String>,
}

/// Most databases in one status answer, so that it fits a frame.
pub const MAX_DATABASES_LISTED: usize = 256;

/// State of one database on one node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DatabaseStatus {
    /// Name in the cluster.
    pub name: String,
    /// Its log.
    pub database: DatabaseId,
    /// The node's role.
    pub role: Role,
    /// Current epoch.
    pub epoch: Epoch,
    /// Last entry the node has.
    pub lsn: Lsn,
    /// Known committed.
    pub commit_lsn: Lsn,
    /// Confirmed in the object store.
    pub archive_lsn: Lsn,
    /// Checksum of the database after its last committed transaction, 16 hex digits.
    pub checksum: String,
    /// Where the archive is, if there is one.
    pub archive_url: Option<String>,
    /// Counts the changes of its members; zero where the node does not know them.
    pub generation: u32,
    /// Nodes of its members.
    pub members: Vec<NodeName>,
    /// The change of members under way, if one is: one line.
    pub change: Option<String>,
    /// The replicas, as their primary sees them.
    pub replicas: Vec<ReplicaStatus>,
    /// The warm copy on the node that answers, if it has one.
    pub copy: Option<CopyStatus>,
    /// What a person should look at: one line each.
    pub warnings: Vec<String>,
}

/// A warm copy of one database.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyStatus {
    /// Its file on that node.
    pub file: String,
    /// `level`, `catching_up`, `building`, or `waiting` (a warning says for what).
    pub state: String,
    /// The last transaction that readers see.
    pub lsn: Lsn,
    /// Committed entries that it lacks.
    pub lag_entries: u64,
    /// Where it was when it was last read whole and found to be what the log says.
    pub checked_lsn: Lsn,
    /// How often it differed, and was built anew, since the sidecar started.
    pub differences: u64,
}

/// A replica of one database, as its primary sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaStatus {
    /// Its name.
    pub node: NodeName,
    /// `host:port`.
    pub address: String,
    /// `streaming`, `catching_up`, `silent`, `disconnected`, `refusing` …
    pub state: String,
    /// Whether it has a vote: its node is a member, and it is the replica that the node had then.
    pub counted: bool,
    /// Last entry known to be on its disk.
    pub flush_lsn: Lsn,
    /// Entries it lacks.
    pub lag_entries: u64,
    /// Milliseconds since it was level.
    pub lag_ms: u64,
    /// Median time from send to ack, of the last few hundred.
    pub ack_p50_us: u64,
    /// 99th percentile of the same.
    pub ack_p99_us: u64,
}

/// Another node, as this one sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerStatus {
    /// Its name.
    pub node: NodeName,
    /// `host:port`.
    pub address: String,
    /// Whether it answered lately.
    pub answering: bool,
    /// What it says is wrong with it, if anything.
    pub trouble: Option<String>,
}
