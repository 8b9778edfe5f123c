//! What the node tells about itself.

use super::event::ClientGrant;
use super::feed::FeedState;
use super::node::Node;
use super::primary::PrimaryDatabase;
use super::replica::ReplicaDatabase;
use durovfs_quorum::PrimaryState;
use durovfs_wire::status::{
    DatabaseStatus, MAX_DATABASES_LISTED, NodeStatus, PeerStatus, ReplicaStatus, Role,
};
use durovfs_wire::{DatabaseId, Membership, NodeName};
use std::time::Instant;

/// A replica that lags longer than this is worth a warning.
const LAG_WARNING_MS: u64 = 5_000;
/// More damage than this need not be listed: the disk is broken.
const DAMAGES_LISTED_MAX: usize = 8;
/// What a replica says of a log that lost something.
const MENDING_WARNING: &str = "the journal was damaged: acked entries may be missing here, and \
    this replica does not vote until a primary has fed it";

impl Node {
    /// The node's state, as far as the certificate may see it.
    pub fn node_status(&self, grant: Option<&ClientGrant>) -> NodeStatus {
        let now = Instant::now();
        let visible = |name: &str| grant.is_none_or(|grant| grant.allows(name));
        let mut databases: Vec<DatabaseStatus> = self
            .primaries
            .iter()
            .filter(|(_, db)| visible(&db.name))
            .map(|(id, db)| self.primary_status(*id, db, now))
            .chain(
                self.replicas
                    .iter()
                    .filter(|(_, replica)| visible(&replica.name))
                    .map(|(id, replica)| self.replica_status(*id, replica)),
            )
            .take(MAX_DATABASES_LISTED)
            .collect();
        databases.sort_by(|a, b| a.name.cmp(&b.name));
        let peers = self.peers.iter().filter(|(_, peer)| peer.is_used());
        let usages = [self.primary_journal.usage(), self.replica_journal.usage()];
        NodeStatus {
            node: self.name().clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            database_count: (self.primaries.len() + self.replicas.len()) as u64,
            databases,
            journal_bytes: usages.iter().map(|usage| usage.bytes).sum(),
            journal_limit_bytes: usages.iter().map(|usage| usage.limit_bytes).sum(),
            peers: peers
                .map(|(node, peer)| PeerStatus {
                    node: node.clone(),
                    address: peer.address.clone(),
                    answering: peer.is_answering(now),
                    trouble: peer.trouble.clone().or_else(|| peer.last_error.clone()),
                })
                .collect(),
            warnings: self.node_warnings(),
        }
    }

    fn node_warnings(&self) -> Vec<String> {
        let troubles = [self.primary_journal.trouble(), self.replica_trouble()];
        // Told as long as the process runs: the disk is worth a look also when all is mended.
        let found = [&self.primary_journal, &self.replica_journal];
        let found = found.into_iter().flat_map(|journal| journal.damages());
        let found = found.map(|damage| format!("found at start: {damage}"));
        let whole = (self.mending_count() == 0 && !self.replica_journal.damages().is_empty())
            .then(|| "all databases are whole again".to_owned());
        troubles
            .into_iter()
            .flatten()
            .chain(found.take(DAMAGES_LISTED_MAX))
            .chain(whole)
            .collect()
    }

    /// The state of the database with this name.
    pub fn database_status_by_name(&self, name: &str) -> Option<DatabaseStatus> {
        let now = Instant::now();
        if let Some(id) = self.names.get(name) {
            return self
                .primaries
                .get(id)
                .map(|db| self.primary_status(*id, db, now));
        }
        let (id, replica) = self
            .replicas
            .iter()
            .find(|(_, replica)| replica.name == name)?;
        Some(self.replica_status(*id, replica))
    }

    fn primary_status(
        &self,
        database: DatabaseId,
        db: &PrimaryDatabase,
        now: Instant,
    ) -> DatabaseStatus {
        let replicas: Vec<ReplicaStatus> = db
            .feeds
            .keys()
            .map(|node| self.feed_status(db, node, now))
            .collect();
        let mut warnings = db.upload.warnings();
        warnings.extend(db.member_warnings());
        match db.machine.state() {
            PrimaryState::Leading => {}
            PrimaryState::Fenced { .. } => warnings.push(db.fenced_reason()),
            _ => warnings.push("the log is not open: waiting for a quorum of replicas".to_owned()),
        }
        warnings.extend(db.unknown_end.clone());
        warnings.extend(self.crowding(db).warning());
        warnings.extend(
            db.own_trouble
                .iter()
                .map(|trouble| format!("own journal: {trouble}")),
        );
        for replica in &replicas {
            if replica.state != "streaming" && replica.lag_ms > LAG_WARNING_MS {
                warnings.push(format!(
                    "{} is {} and lacks {} entries",
                    replica.node, replica.state, replica.lag_entries
                ));
            }
        }
        DatabaseStatus {
            name: db.name.clone(),
            database,
            role: Role::Primary,
            epoch: db.machine.epoch(),
            lsn: db.machine.last().lsn,
            commit_lsn: db.machine.commit_lsn(),
            archive_lsn: db.machine.archive_lsn(),
            checksum: db
                .last_transaction
                .map_or_else(String::new, |last| last.commit.checksum.to_string()),
            archive_url: self.store.as_ref().map(|store| store.url().to_owned()),
            generation: db.generation(),
            members: member_nodes(db.machine.membership()),
            change: db.change_text(),
            replicas,
            copy: self.copy_status(database).0,
            warnings,
        }
    }

    fn feed_status(&self, db: &PrimaryDatabase, node: &NodeName, now: Instant) -> ReplicaStatus {
        let peer = self.peers.get(node);
        let connected = peer.is_some_and(|peer| peer.link.is_some());
        let answering = peer.is_some_and(|peer| peer.is_answering(now));
        let flush_lsn = db.flush_lsn(node);
        let feed = db.feeds.get(node);
        let refused = db
            .machine
            .node_progress(node)
            .and_then(|progress| progress.refused);
        let state = match feed.map(|feed| &feed.state) {
            _ if !connected => "disconnected".to_owned(),
            _ if !answering => "silent".to_owned(),
            _ if refused.is_some() => "refusing: it promised the log to another node".to_owned(),
            Some(FeedState::Ready) => "streaming".to_owned(),
            Some(FeedState::Bulk { .. } | FeedState::Settling { .. }) => "catching_up".to_owned(),
            Some(FeedState::Refusing { reason, .. }) => format!("refusing: {reason}"),
            Some(FeedState::Stopped) | None => match peer.and_then(|peer| peer.trouble.as_ref()) {
                Some(trouble) => format!("refusing: {trouble}"),
                None => "connecting".to_owned(),
            },
        };
        let lag_entries = db.machine.last().lsn.get().saturating_sub(flush_lsn.get());
        let behind = lag_entries > 0;
        let lag_ms = feed.filter(|_| behind).map_or(0, |feed| {
            u64::try_from(now.duration_since(feed.level_at).as_millis()).unwrap_or(u64::MAX)
        });
        let (ack_p50_us, ack_p99_us) =
            feed.map_or((0, 0), super::feed::Feed::latency_percentiles_us);
        ReplicaStatus {
            node: node.clone(),
            address: peer.map_or_else(String::new, |peer| peer.address.clone()),
            state,
            counted: db
                .machine
                .node_progress(node)
                .is_some_and(|progress| progress.counted),
            flush_lsn,
            lag_entries,
            lag_ms,
            ack_p50_us,
            ack_p99_us,
        }
    }

    fn replica_status(&self, database: DatabaseId, replica: &ReplicaDatabase) -> DatabaseStatus {
        let state = self.replica_journal.state(database);
        let membership = replica.log.machine().membership();
        let (copy, copy_warnings) = self.copy_status(database);
        let mut warnings = replica_warnings(replica);
        warnings.extend(copy_warnings);
        DatabaseStatus {
            name: replica.name.clone(),
            database,
            role: Role::Replica,
            epoch: replica.log.machine().promised(),
            lsn: replica.log.machine().last().lsn,
            commit_lsn: replica.log.machine().commit_lsn(),
            archive_lsn: replica.log.machine().archive_lsn(),
            checksum: state
                .and_then(|state| state.last_transaction)
                .map_or_else(String::new, |last| last.commit.checksum.to_string()),
            archive_url: None,
            generation: membership.map_or(0, |membership| membership.generation),
            members: membership.map_or_else(Vec::new, member_nodes),
            change: None,
            replicas: Vec::new(),
            copy,
            warnings,
        }
    }
}

fn replica_warnings(replica: &ReplicaDatabase) -> Vec<String> {
    let mending = replica.log.machine().is_mending();
    let mut warnings: Vec<String> = mending
        .then(|| MENDING_WARNING.to_owned())
        .into_iter()
        .collect();
    warnings.extend(replica.orphan.warning());
    warnings
}

fn member_nodes(membership: &Membership) -> Vec<NodeName> {
    let members = membership.members.iter();
    members.map(|member| member.node.clone()).collect()
}
