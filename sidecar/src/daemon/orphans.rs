//! Orphans: logs whose primary has gone silent. A replica uploads what it knows to be committed, so
//! that the archive is complete with no successor.
//!
//! No rule here decides what is committed, and none has to: what a replica knows to be committed is
//! so for good, and two that upload the same entries, or a primary that was not dead at all, put
//! chunks into the store that say the same.

use super::event::Event;
use super::node::Node;
use super::uploader::{UploadJob, Uploaded, upload};
use durovfs_archive::chunk::LogIdentity;
use durovfs_wire::DatabaseId;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How often it is looked for orphans: it looks at every database.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// A primary pings twice a second; one that was not heard for this long is silent.
const SILENT_AFTER: Duration = Duration::from_secs(5);
/// Each replica waits this much longer than the one before it in the configured list, so that
/// mostly one of them uploads: several chunks, with their requests, fit into it.
const WAIT_PER_RANK: Duration = Duration::from_secs(10);
/// Pause after a failed upload.
const RETRY_PAUSE: Duration = Duration::from_secs(30);

/// What a replica does in the place of a silent primary.
#[derive(Debug, Default)]
pub struct OrphanState {
    /// Since when the primary is silent.
    silent_since: Option<Instant>,
    running: bool,
    retry_at: Option<Instant>,
    last_error: Option<String>,
}

impl OrphanState {
    /// What a person should look at.
    pub fn warning(&self) -> Option<String> {
        let silent_s = self.silent_since?.elapsed().as_secs();
        let upload = self.last_error.as_ref();
        let upload = upload.map_or(String::new(), |error| {
            format!("; uploading in its place failed: {error}")
        });
        Some(format!("no primary was heard for {silent_s} s{upload}"))
    }
}

impl Node {
    /// Starts uploads in the place of primaries that are silent for too long.
    pub fn tick_orphans(&mut self, now: Instant) {
        let looked = self.orphans_looked;
        if looked.is_some_and(|at| now - at < LOOK_INTERVAL) || self.is_stopping() {
            return;
        }
        self.orphans_looked = Some(now);
        for replica in self.replicas.values_mut() {
            let heard = replica
                .last_primary()
                .and_then(|node| self.inbound.get(node));
            if heard.is_some_and(|inbound| now - inbound.heard < SILENT_AFTER) {
                replica.orphan = OrphanState {
                    running: replica.orphan.running,
                    ..OrphanState::default()
                };
            } else {
                replica.orphan.silent_since.get_or_insert(now);
            }
        }
        let due: Vec<DatabaseId> = self
            .replicas
            .keys()
            .filter(|database| self.is_orphan_due(**database, now))
            .copied()
            .collect();
        for database in due {
            self.upload_orphan(database);
        }
    }

    fn is_orphan_due(&self, database: DatabaseId, now: Instant) -> bool {
        let (Some(archive), Some(replica)) = (&self.config.archive, self.replicas.get(&database))
        else {
            return false;
        };
        let orphan = &replica.orphan;
        let machine = replica.log.machine();
        let rank = self
            .config
            .replicas
            .iter()
            .position(|node| node == self.name());
        let rank = u32::try_from(rank.unwrap_or_default()).unwrap_or(u32::MAX);
        let patience = archive.orphan_after + WAIT_PER_RANK.saturating_mul(rank);
        let own = self.primaries.get(&database);
        machine.archive_lsn() < machine.commit_lsn()
            && !orphan.running
            && own.is_none_or(|db| !db.is_open())
            && orphan.retry_at.is_none_or(|at| now >= at)
            && orphan
                .silent_since
                .is_some_and(|since| now - since >= patience)
    }

    fn upload_orphan(&mut self, database: DatabaseId) {
        let (Some(store), Some(archive)) = (self.store.clone(), self.config.archive.clone()) else {
            return;
        };
        let scratch = self.scratch_folder();
        let Some(replica) = self.replicas.get_mut(&database) else {
            return;
        };
        replica.orphan.running = true;
        let machine = replica.log.machine();
        let job = UploadJob {
            journal: self.replica_journal.clone(),
            store: Arc::clone(&store),
            identity: LogIdentity {
                database,
                name: replica.name.clone(),
            },
            range: (machine.archive_lsn().next(), machine.commit_lsn()),
            chunk_bytes: archive.chunk_bytes,
            scratch,
            // Another replica may have been faster, or the primary further than it had told.
            read_listing: true,
        };
        let events = self.events.clone();
        tokio::task::spawn_local(async move {
            let result = upload(job).await;
            events
                .send(Event::OrphanUploaded { database, result })
                .await;
        });
    }

    /// An upload in the place of a silent primary has ended.
    pub fn handle_orphan_uploaded(
        &mut self,
        database: DatabaseId,
        result: Result<Uploaded, String>,
    ) {
        let Some(replica) = self.replicas.get_mut(&database) else {
            return;
        };
        replica.orphan.running = false;
        match result {
            Ok(Uploaded { last_lsn }) => {
                tracing::info!(name = %replica.name, %last_lsn,
                    "the primary is silent: what it committed is in the archive");
                replica.orphan.retry_at = None;
                replica.orphan.last_error = None;
                replica.log.handle_archived(last_lsn);
                self.orphans_looked = None; // what is left goes up at once
            }
            Err(error) => {
                tracing::warn!(name = %replica.name, %error, "upload for a silent primary failed");
                replica.orphan.retry_at = Some(Instant::now() + RETRY_PAUSE);
                replica.orphan.last_error = Some(error);
            }
        }
    }
}
