//! The first entry of an epoch: it says what the log's last transaction is, so that must be known
//! before. Where neither our own journal nor a replica knows it, the archive is asked.

use super::event::Event;
use super::node::Node;
use bytes::Bytes;
use durovfs_archive::index::ArchiveIndex;
use durovfs_archive::listing::Listing;
use durovfs_archive::store::Store;
use durovfs_journal::Record;
use durovfs_sidecar::donor::LastTransaction;
use durovfs_wire::entry::TransactionSummary;
use durovfs_wire::{DatabaseId, EntryPart, LogPosition, Lsn, PartHeader, PartKind};
use std::sync::Arc;
use std::time::Duration;

/// Pause before an archive that could not tell is asked again.
const ASK_AGAIN: Duration = Duration::from_secs(1);

/// What the archive is asked: the last transaction through an entry, for an epoch start.
#[derive(Debug, Clone, Copy)]
pub struct EndQuestion {
    database: DatabaseId,
    /// Where the epoch start is to stand.
    position: LogPosition,
    through_lsn: Lsn,
}

impl Node {
    /// Makes the epoch start from what our own journal says now: all truncation is behind it.
    pub fn write_epoch_start(&mut self, database: DatabaseId, position: LogPosition) {
        let held = self.primary_journal.state(database);
        let Some(db) = self.primaries.get(&database) else {
            return;
        };
        // A log that began anew behind the archive, in this claim or in an earlier one that came to
        // nothing, does not know its last transaction itself.
        let end = db.machine.last();
        match db.donor_end.last_transaction(held.as_ref(), end) {
            LastTransaction::Known(last) => self.append_epoch_start(database, position, last),
            LastTransaction::Archived { through_lsn } => {
                let question = EndQuestion {
                    database,
                    position,
                    through_lsn,
                };
                self.ask_archive(question, Duration::ZERO);
            }
        }
    }

    fn ask_archive(&self, question: EndQuestion, pause: Duration) {
        let Some(db) = self.primaries.get(&question.database) else {
            return;
        };
        let (name, store) = (db.name.clone(), self.store.clone());
        let events = self.events.clone();
        tokio::task::spawn_local(async move {
            tokio::time::sleep(pause).await;
            let result = question.ask(&name, store).await;
            events.send(Event::EndFound { question, result }).await;
        });
    }

    /// The archive has told the last transaction, or could not.
    pub fn handle_end_found(
        &mut self,
        question: EndQuestion,
        result: Result<Option<TransactionSummary>, String>,
    ) {
        let EndQuestion {
            database, position, ..
        } = question;
        let Some(db) = self.primaries.get_mut(&database) else {
            return;
        };
        if db.machine.epoch() != position.epoch || db.own_trouble.is_some() {
            return; // of an earlier claim
        }
        match result {
            Ok(last) => {
                tracing::info!(name = %db.name, "the archive told the last transaction");
                db.unknown_end = None;
                self.append_epoch_start(database, position, last);
            }
            Err(error) => {
                if db.unknown_end.as_ref() != Some(&error) {
                    tracing::warn!(name = %db.name, %error, "the log cannot be opened yet");
                }
                db.unknown_end = Some(error);
                self.ask_archive(question, ASK_AGAIN);
            }
        }
    }

    fn append_epoch_start(
        &mut self,
        database: DatabaseId,
        position: LogPosition,
        last_transaction: Option<TransactionSummary>,
    ) {
        let time = self.next_time(database);
        let Some(db) = self.primaries.get_mut(&database) else {
            return;
        };
        if db.own_trouble.is_some() || db.machine.epoch() != position.epoch {
            return;
        }
        let claimant = db.claimant;
        db.last_transaction = last_transaction;
        let header = PartHeader {
            database,
            epoch: position.epoch,
            lsn: position.lsn,
            part: 0,
            kind: PartKind::EpochStart {
                time,
                last_transaction,
            },
        };
        // Our own journal learns the name and the epoch by the same record as a replica's.
        let named = Record::Promise {
            database,
            name: db.name.clone(),
            epoch: position.epoch,
            claimant,
            replica: None,
        };
        self.write_own_records(database, vec![named], None, None);
        let payload = Bytes::new();
        self.append_own(EntryPart { header, payload }, None);
    }
}

impl EndQuestion {
    /// The log that is asked about.
    pub fn database(&self) -> DatabaseId {
        self.database
    }

    async fn ask(
        &self,
        name: &str,
        store: Option<Arc<dyn Store>>,
    ) -> Result<Option<TransactionSummary>, String> {
        let through_lsn = self.through_lsn;
        let untold = format!(
            "the entries through lsn {through_lsn} are in the archive only, and what the last \
             transaction is"
        );
        let Some(store) = store else {
            return Err(format!(
                "{untold} cannot be told: the sidecar has no archive"
            ));
        };
        let listing = Listing::load_log(&*store, name, self.database).await;
        let last = match listing {
            Ok(listing) => {
                let index = ArchiveIndex::of(&store, listing);
                index.last_through(through_lsn).await
            }
            Err(error) => Err(error),
        };
        last.map_err(|error| format!("{untold} cannot be told: {}: {error}", store.url()))
    }
}
