//! Reading a log for a client whose file lacks some of it: from our own journal, and what that has
//! dropped, or never had, from the archive before it. A client that has nothing begins with the
//! warm copy of this node, if there is one. Each reading is a task with a stream of its own; one
//! part is in memory at a time, one object of the archive on the disk beside the next.

use super::bulk::{self, push};
use super::copies::{SnapshotAnswer, read_snapshot};
use super::node::Node;
use super::outbox::Outbox;
use bytes::Bytes;
use durovfs_archive::listing::Listing;
use durovfs_archive::store::Store;
use durovfs_archive::{RestoreError, entries};
use durovfs_journal::{Journal, JournalError};
use durovfs_wire::client::{CommitOutcome, SidecarMessage};
use durovfs_wire::entry::{Origin, TransactionSummary};
use durovfs_wire::{DatabaseId, Lsn, PartHeader, PartKind};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

/// Parts that the archive's reader may be ahead of the network.
const PARTS_AHEAD: usize = 2;
/// Summaries that it may be ahead: they are small.
const SUMMARIES_AHEAD: usize = 256;
/// How often a client is told that the next part takes a while.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);
/// Times that a reading goes on in the archive, or in our own journal, where the other ended.
const ROUNDS_MAX: usize = 16;

/// The first entry of every log.
const FIRST_LSN: Lsn = Lsn::new(1);
/// How long the thread of the copies may be busy with another one; then the archive is read.
const COPY_PATIENCE: Duration = Duration::from_millis(500);

/// One reading.
struct Reading {
    journal: Journal,
    store: Option<Arc<dyn Store>>,
    scratch: PathBuf,
    name: String,
    database: DatabaseId,
    next_lsn: Lsn,
    last_lsn: Lsn,
    outbox: Outbox,
    /// What readers of the warm copy see, when it comes.
    copy: Option<SnapshotAnswer>,
}

/// The client is gone; nobody is to be told.
struct Gone;

impl Node {
    /// Answers with the committed entries from `first_lsn` on.
    pub fn read_log(&self, outbox: &Outbox, database: DatabaseId, first_lsn: Lsn, pages: bool) {
        let Some(db) = self.primaries.get(&database) else {
            return;
        };
        let reading = Reading {
            journal: self.primary_journal.clone(),
            store: self.store.clone(),
            scratch: self.scratch_folder(),
            name: db.name.clone(),
            database,
            next_lsn: first_lsn,
            last_lsn: db.machine.commit_lsn().min(db.written_lsn),
            outbox: outbox.clone(),
            copy: (pages && first_lsn == FIRST_LSN)
                .then(|| self.ask_copy(database))
                .flatten(),
        };
        tokio::task::spawn_local(async move {
            let result = if pages {
                reading.entries().await
            } else {
                reading.summaries().await
            };
            let _: Result<(), Gone> = result;
        });
    }
}

/// A question for a commit that only the archive can answer.
pub struct ArchivedCommit {
    /// The log.
    pub database: DatabaseId,
    /// Of the question.
    pub request: u64,
    /// Who made the commit.
    pub origin: Origin,
    /// What it was made on top of.
    pub base_lsn: Lsn,
    /// What is answered when the archive cannot tell either.
    pub otherwise: CommitOutcome,
}

impl Node {
    /// Looks for a commit in the archive, and answers what became of it. It is not in our own
    /// journal, and none of its origin will be taken from now on.
    pub fn resolve_from_archive(&self, outbox: Outbox, commit: ArchivedCommit) {
        let state = self.primary_journal.state(commit.database);
        let name = self.primaries.get(&commit.database).map(|db| &db.name);
        let (Some(store), Some(state), Some(name)) = (self.store.clone(), state, name.cloned())
        else {
            return commit.answer(&outbox, None);
        };
        tokio::task::spawn_local(async move {
            let found = commit.search(&store, &name, state.first_lsn).await;
            let found = found.unwrap_or_else(|error| {
                tracing::warn!(%name, %error, "what became of a commit is not to be found out");
                None
            });
            commit.answer(&outbox, found);
        });
    }
}

impl ArchivedCommit {
    async fn search(
        &self,
        store: &Arc<dyn Store>,
        name: &str,
        first_held: Lsn,
    ) -> Result<Option<CommitOutcome>, RestoreError> {
        let listing = Listing::load_log(&**store, name, self.database).await?;
        let through_lsn = first_held.previous().unwrap_or(Lsn::ZERO);
        let range = (self.base_lsn.next(), through_lsn);
        let is_it = |summary: &TransactionSummary| summary.commit.origin == self.origin;
        let found = entries::find(store, listing, range, is_it).await?;
        Ok(found.map(|found| match found {
            Some(TransactionSummary { position, .. }) => CommitOutcome::Committed { position },
            None => CommitOutcome::NotCommitted {
                reason: "neither the log nor its archive has the commit".to_owned(),
            },
        }))
    }

    fn answer(&self, outbox: &Outbox, outcome: Option<CommitOutcome>) {
        outbox.answer(&SidecarMessage::Outcome {
            database: self.database,
            sequence: self.request,
            outcome: outcome.unwrap_or_else(|| self.otherwise.clone()),
        });
    }
}

impl Reading {
    fn first_held(&self) -> Lsn {
        let state = self.journal.state(self.database);
        state.map_or(self.last_lsn.next(), |state| state.first_lsn)
    }

    async fn end(&self, error: Option<String>) -> Result<(), Gone> {
        self.say(&SidecarMessage::LogEnd { error }, Bytes::new())
            .await
    }

    async fn say(&self, message: &SidecarMessage, payload: Bytes) -> Result<(), Gone> {
        match push(&self.outbox, message, payload).await {
            true => Ok(()),
            false => Err(Gone),
        }
    }

    /// The archive up to where our own journal begins, then the journal. Nothing lies between: the
    /// journal is asked anew where it begins after each reading, and what it drops while it is read
    /// is in the archive by then.
    async fn entries(mut self) -> Result<(), Gone> {
        if let Some(answer) = self.copy.take()
            && let Err(error) = self.copy_round(answer).await?
        {
            return self.end(Some(error)).await;
        }
        for _ in 0..ROUNDS_MAX {
            if self.next_lsn > self.last_lsn {
                return self.end(None).await;
            }
            let first_held = self.first_held();
            let round = if self.next_lsn >= first_held {
                self.journal_round().await?
            } else {
                let through_lsn = first_held.previous().unwrap_or(Lsn::ZERO);
                self.archive_round(through_lsn).await?
            };
            if let Err(error) = round {
                return self.end(Some(error)).await;
            }
        }
        let error = "the journal drops entries faster than they are read: try again";
        self.end(Some(error.to_owned())).await
    }

    /// Begins with the image that the warm copy has, unless that is more than the log itself.
    async fn copy_round(&mut self, answer: SnapshotAnswer) -> Result<Result<(), String>, Gone> {
        let answered = tokio::time::timeout(COPY_PATIENCE, answer).await;
        let Ok(Ok(Some(snapshot))) = answered else {
            return Ok(Ok(()));
        };
        let summary = snapshot.summary();
        let lsn = summary.position.lsn;
        let image_bytes = u64::from(snapshot.image_count()) * summary.commit.page_size.get() as u64;
        let held_bytes = (self.first_held() <= self.next_lsn).then(|| {
            self.journal
                .entry_bytes(self.database, self.next_lsn, self.last_lsn)
        });
        if lsn > self.last_lsn || held_bytes.is_some_and(|bytes| bytes <= image_bytes) {
            return Ok(Ok(()));
        }
        let (sender, parts) = mpsc::channel(PARTS_AHEAD);
        let database = self.database;
        let task = tokio::task::spawn_blocking(move || read_snapshot(&snapshot, database, &sender));
        self.forward(parts).await?;
        match task.await.map_err(|error| error.to_string()) {
            Ok(Ok(())) => {
                tracing::info!(name = %self.name, %lsn, "a client begins with the warm copy");
                self.next_lsn = lsn.next();
                Ok(Ok(()))
            }
            Ok(Err(error)) => Ok(Err(format!("read the warm copy of {}: {error}", self.name))),
            Err(error) => Ok(Err(format!("read the warm copy of {}: {error}", self.name))),
        }
    }

    /// Reads our own journal, to the end or as far as it still holds what is read.
    async fn journal_round(&mut self) -> Result<Result<(), String>, Gone> {
        let (first_lsn, last_lsn) = (self.next_lsn, self.last_lsn);
        let mut parts = bulk::read_parts(&self.journal, self.database, first_lsn, last_lsn);
        while let Some(part) = parts.recv().await {
            let part = match part {
                Ok(part) => part,
                Err(JournalError::Gone { .. }) => break,
                Err(error) => return Ok(Err(error.to_string())),
            };
            let header = part.header;
            let message = SidecarMessage::LogPart { part: header };
            self.say(&message, part.payload).await?;
            if header.is_last() {
                self.next_lsn = header.lsn.next();
            }
        }
        Ok(Ok(()))
    }

    /// Reads the archive through an entry.
    async fn archive_round(&mut self, through_lsn: Lsn) -> Result<Result<(), String>, Gone> {
        let missing = format!(
            "the entries from lsn {} to {through_lsn} of {} are in no journal here",
            self.next_lsn, self.name
        );
        let Some(store) = self.store.clone() else {
            return Ok(Err(format!("{missing}, and the sidecar has no archive")));
        };
        let listing = Listing::load_log(&*store, &self.name, self.database);
        let listing = match listing.await {
            Ok(listing) => listing,
            Err(error) => return Ok(Err(format!("{missing}, and not to be had: {error}"))),
        };
        let Some(plan) = entries::plan(&listing, self.next_lsn, through_lsn) else {
            let archived = listing.archived_lsn();
            return Ok(Err(format!(
                "{missing}, and {} leads to lsn {archived} or has a gap",
                store.url()
            )));
        };
        let (sender, parts) = mpsc::channel(PARTS_AHEAD);
        let scratch = self.scratch.clone();
        let task = tokio::task::spawn_local(async move {
            entries::read(&store, &plan, &scratch, &sender).await
        });
        self.forward(parts).await?;
        match task.await {
            Ok(Ok(last)) => {
                self.next_lsn = last.lsn.next().max(self.next_lsn);
                Ok(Ok(()))
            }
            Ok(Err(error)) => Ok(Err(format!("read the archive of {}: {error}", self.name))),
            Err(error) => Ok(Err(format!("read the archive of {}: {error}", self.name))),
        }
    }

    async fn forward(
        &self,
        mut parts: mpsc::Receiver<durovfs_wire::EntryPart>,
    ) -> Result<(), Gone> {
        loop {
            match tokio::time::timeout(PROGRESS_INTERVAL, parts.recv()).await {
                Ok(Some(part)) => {
                    let message = SidecarMessage::LogPart { part: part.header };
                    self.say(&message, part.payload).await?;
                }
                Ok(None) => return Ok(()),
                Err(_) => self.tell_alive().await?,
            }
        }
    }

    async fn tell_alive(&self) -> Result<(), Gone> {
        let message = SidecarMessage::Progress {
            database: self.database,
            sequence: 0,
        };
        self.say(&message, Bytes::new()).await
    }

    /// Every transaction that is kept, without its pages: what the local file may be like.
    async fn summaries(mut self) -> Result<(), Gone> {
        let through_lsn = self.first_held().previous().unwrap_or(Lsn::ZERO);
        if let Some(store) = self.store.clone()
            && self.next_lsn <= through_lsn
        {
            let listing = Listing::load_log(&*store, &self.name, self.database);
            let listing = match listing.await {
                Ok(listing) => listing,
                Err(error) => return self.end(Some(error.to_string())).await,
            };
            let (sender, mut found) = mpsc::channel(SUMMARIES_AHEAD);
            let first_lsn = self.next_lsn;
            let task = tokio::task::spawn_local(async move {
                entries::summaries(&store, listing, first_lsn, through_lsn, &sender).await
            });
            loop {
                match tokio::time::timeout(PROGRESS_INTERVAL, found.recv()).await {
                    Ok(Some(summary)) => self.say_summary(summary).await?,
                    Ok(None) => break,
                    Err(_) => self.tell_alive().await?,
                }
            }
            match task.await.map_err(|error| error.to_string()) {
                Ok(Ok(next)) => self.next_lsn = next.max(first_lsn),
                Ok(Err(error)) => return self.end(Some(error.to_string())).await,
                Err(error) => return self.end(Some(error)).await,
            }
        }
        loop {
            // As many as the journal tells at a time.
            let held = self
                .journal
                .transactions(self.database, self.next_lsn, self.last_lsn);
            let Some(last) = held.last() else {
                return self.end(None).await;
            };
            self.next_lsn = last.position.lsn.next();
            for summary in held {
                self.say_summary(summary).await?;
            }
        }
    }

    async fn say_summary(&self, summary: TransactionSummary) -> Result<(), Gone> {
        let part = PartHeader {
            database: self.database,
            epoch: summary.position.epoch,
            lsn: summary.position.lsn,
            part: 0,
            kind: PartKind::Commit(summary.commit),
        };
        self.say(&SidecarMessage::LogPart { part }, Bytes::new())
            .await
    }
}
