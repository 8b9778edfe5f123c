//! Which commit was the last at a moment? Our own journal knows the newest, the archive the rest.

use super::node::Node;
use super::outbox::Outbox;
use super::primary::now_micros;
use durovfs_archive::listing::Listing;
use durovfs_archive::store::Store;
use durovfs_archive::{ArchiveIndex, When};
use durovfs_wire::client::SidecarMessage;
use durovfs_wire::entry::TransactionSummary;
use durovfs_wire::{DatabaseId, LogPosition, Timestamp};
use std::sync::Arc;

impl Node {
    /// Answers with the bookmark of the last commit at or before a moment.
    pub fn find_bookmark(&self, outbox: &Outbox, request: u64, database: DatabaseId, when: &str) {
        let answer = |bookmark| {
            outbox.answer(&SidecarMessage::FoundBookmark { request, bookmark });
        };
        let Some(db) = self.primaries.get(&database) else {
            return;
        };
        let when = match When::parse(when, Timestamp::from_micros(now_micros())) {
            Ok(when) => when,
            Err(error) => return answer(Err(error.to_string())),
        };
        let state = self.primary_journal.state(database);
        let held = state.map_or_else(Vec::new, |state| {
            let last_lsn = db.machine.commit_lsn();
            self.primary_journal
                .transactions(database, state.first_lsn, last_lsn)
        });
        // The last one a quorum has; our own journal may have it only later.
        let found = held
            .iter()
            .chain(&db.last_transaction)
            .rev()
            .find(|summary| is_at_or_before(summary, when));
        // The first one held may not be the last one before the moment only if it is after it.
        if let Some(summary) = found {
            return answer(Ok(summary.position));
        }
        let Some(store) = self.store.clone() else {
            return answer(Err("no commit at or before that moment is held".to_owned()));
        };
        let (name, outbox) = (db.name.clone(), outbox.clone());
        tokio::task::spawn_local(async move {
            let bookmark = find_archived(&store, &name, database, when).await;
            outbox.answer(&SidecarMessage::FoundBookmark { request, bookmark });
        });
    }
}

fn is_at_or_before(summary: &TransactionSummary, when: When) -> bool {
    match when {
        When::Latest => true,
        When::Time(time) => summary.commit.time <= time,
        When::Lsn(lsn) => summary.position.lsn <= lsn,
        When::Bookmark(bookmark) => summary.position.lsn <= bookmark.lsn,
    }
}

async fn find_archived(
    store: &Arc<dyn Store>,
    name: &str,
    database: DatabaseId,
    when: When,
) -> Result<LogPosition, String> {
    let listing = Listing::load_log(&**store, name, database)
        .await
        .map_err(|error| error.to_string())?;
    let found = ArchiveIndex::of(store, listing)
        .last_at(when)
        .await
        .map_err(|error| error.to_string())?;
    found
        .map(|summary| summary.position)
        .ok_or_else(|| "no commit at or before that moment".to_owned())
}
