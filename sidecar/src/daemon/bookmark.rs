//! Which commit was the last at a moment? Our own journal knows the newest, the archive the rest.

use super::node::Node;
use super::outbox::Outbox;
use super::primary::now_micros;
use durovfs_archive::listing::Listing;
use durovfs_archive::store::Store;
use durovfs_archive::{ArchiveIndex, When};
use durovfs_wire::client::SidecarMessage;
use durovfs_wire::entry::TransactionSummary;
use durovfs_wire::{DatabaseId, LogPosition, Lsn, Timestamp};
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
        let commit_lsn = db.machine.commit_lsn();
        let held = state.and_then(|state| {
            last_held(state.first_lsn, when, |first_lsn| {
                self.primary_journal
                    .transactions(database, first_lsn, commit_lsn)
            })
        });
        // The last one a quorum has; our own journal may have it only later.
        let newest = db.last_transaction;
        let newest = newest.filter(|summary| is_at_or_before(summary, when));
        let found = newest.or(held);
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

/// The last transaction at or before a moment. `read_from` gives those from an LSN on, as many as
/// the journal tells at a time.
fn last_held(
    first_lsn: Lsn,
    when: When,
    read_from: impl Fn(Lsn) -> Vec<TransactionSummary>,
) -> Option<TransactionSummary> {
    let mut found = None;
    let mut next_lsn = first_lsn;
    loop {
        let held = read_from(next_lsn);
        let Some(last) = held.last().map(|summary| summary.position.lsn) else {
            return found;
        };
        let before = held.iter().rfind(|summary| is_at_or_before(summary, when));
        match before {
            None => return found,
            Some(summary) if summary.position.lsn < last => return Some(*summary),
            Some(summary) => found = Some(*summary),
        }
        next_lsn = last.next();
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

#[cfg(test)]
mod tests {
    use super::*;
    use durovfs_wire::entry::Origin;
    use durovfs_wire::{ClientId, CommitHeader, DatabaseChecksum, Epoch, PageSize};

    fn transaction(lsn: u64) -> TransactionSummary {
        TransactionSummary {
            position: LogPosition::new(Epoch::new(1), Lsn::new(lsn)),
            commit: CommitHeader {
                origin: Origin {
                    client: ClientId::from_bytes([1; 16]),
                    sequence: lsn,
                },
                time: Timestamp::from_micros(lsn as i64 * 10),
                base_lsn: Lsn::new(lsn - 1),
                page_size: PageSize::try_from(512).unwrap(),
                page_count: 1,
                slot_count: 1,
                checksum: DatabaseChecksum::EMPTY,
                whole_image: false,
            },
        }
    }

    #[test]
    fn the_last_commit_is_found_behind_what_the_journal_tells_at_a_time() {
        // Broken: with many commits held, an old one would be told for every later moment.
        let read_from = |first: Lsn| -> Vec<_> {
            let lsns = first.get().max(4)..=11;
            lsns.take(3).map(transaction).collect()
        };
        let found = |when| {
            last_held(Lsn::new(2), when, read_from).map(|summary| summary.position.lsn.get())
        };
        assert_eq!(found(When::Latest), Some(11));
        assert_eq!(found(When::Lsn(Lsn::new(3))), None);
        for lsn in 4..=11 {
            assert_eq!(found(When::Lsn(Lsn::new(lsn))), Some(lsn));
            let time = Timestamp::from_micros(lsn as i64 * 10 + 9);
            assert_eq!(found(When::Time(time)), Some(lsn));
        }
        assert_eq!(found(When::Lsn(Lsn::new(90))), Some(11));
    }
}
