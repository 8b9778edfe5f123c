//! Pages of a transaction that is still open: they wait in our own journal for its commit. One that
//! would fill the journal, which all databases share, is given up while the others have room.

use super::crowding::STREAM_UP_TO_PERCENT;
use super::event::{Permit, SessionId};
use super::members::HeldWrite;
use super::node::Node;
use super::primary::PrimaryDatabase;
use bytes::Bytes;
use durovfs_journal::Record;
use durovfs_wire::{DatabaseId, EntryPart, LogPosition, PageSize, PartHeader, PartKind};

/// A transaction whose pages were sent before its commit.
pub struct Streamed {
    session: SessionId,
    sequence: u64,
    position: LogPosition,
    parts: u32,
    bytes: u64,
}

impl Streamed {
    fn is_of(&self, (session, sequence): (SessionId, u64)) -> bool {
        (self.session, self.sequence) == (session, sequence)
    }
}

impl PrimaryDatabase {
    /// How many parts of this transaction are here, or why there will be none.
    pub fn streamed_parts(
        &self,
        transaction: (SessionId, u64),
        position: LogPosition,
    ) -> Result<u32, String> {
        if self.refused_stream == Some(transaction) {
            return Err(format!(
                "the transaction is too large for what is free in the journals of the primary and \
                 its replicas, of which open transactions may take {STREAM_UP_TO_PERCENT} %: make \
                 it smaller, or raise limit_bytes"
            ));
        }
        let open = self.streamed.as_ref();
        let open = open.filter(|open| open.is_of(transaction) && open.position == position);
        Ok(open.map_or(0, |open| open.parts))
    }
}

impl Node {
    /// Takes slots of an open transaction into our own journal.
    pub fn handle_pages(
        &mut self,
        session: SessionId,
        (database, sequence): (DatabaseId, u64),
        page_size: PageSize,
        payload: Bytes,
        permit: Permit,
    ) {
        let write = HeldWrite::Pages {
            session,
            sequence,
            page_size,
            payload,
            permit,
        };
        let Some(HeldWrite::Pages {
            payload, permit, ..
        }) = self.hold_write(database, write)
        else {
            return;
        };
        let Some(bytes) = self.admit_pages(database, (session, sequence), payload.len() as u64)
        else {
            return;
        };
        let Some(db) = self.primaries.get_mut(&database) else {
            return;
        };
        let Some(lsn) = db
            .machine
            .next_lsn()
            .filter(|_| db.is_open() && db.pending.is_empty())
        else {
            // Its commit will be refused: parts are missing.
            return self.give_up_streamed(database);
        };
        let position = LogPosition::new(db.machine.epoch(), lsn);
        let part = match &db.streamed {
            Some(open) if open.is_of((session, sequence)) && open.position == position => {
                open.parts
            }
            _ => 0,
        };
        let kind = PartKind::Pages { page_size };
        let header = PartHeader {
            database,
            epoch: position.epoch,
            lsn,
            part,
            kind,
        };
        let entry = EntryPart { header, payload };
        if let Err(error) = entry.slots() {
            tracing::error!(name = %db.name, %error, "pages refused");
            return self.give_up_streamed(database);
        }
        db.streamed = Some(Streamed {
            session,
            sequence,
            position,
            parts: part + 1,
            bytes,
        });
        self.write_own(entry, permit);
    }

    /// Bytes of the open transaction with these more; none when it has become too large.
    fn admit_pages(
        &mut self,
        database: DatabaseId,
        transaction: (SessionId, u64),
        more: u64,
    ) -> Option<u64> {
        let db = self.primaries.get(&database)?;
        if db.refused_stream == Some(transaction) {
            return None;
        }
        let open = db.streamed.as_ref().filter(|open| open.is_of(transaction));
        let bytes = open.map_or(0, |open| open.bytes) + more;
        let fits = self.primary_journal.percent_taken() < STREAM_UP_TO_PERCENT
            && bytes <= self.stream_room_bytes(db);
        if !fits {
            let db = self.primaries.get_mut(&database)?;
            tracing::warn!(name = %db.name, "a transaction is too large for the journals");
            db.refused_stream = Some(transaction);
            self.give_up_streamed(database);
        }
        fits.then_some(bytes)
    }

    /// The client takes an open transaction back.
    pub fn handle_abort(&mut self, session: SessionId, database: DatabaseId, sequence: u64) {
        let write = HeldWrite::Abort { session, sequence };
        if self.hold_write(database, write).is_none() {
            return;
        }
        self.give_up_transaction(database, (session, sequence));
    }

    /// This transaction will not be committed.
    pub fn give_up_transaction(&mut self, database: DatabaseId, transaction: (SessionId, u64)) {
        let db = self.primaries.get(&database);
        let open = db.and_then(|db| db.streamed.as_ref());
        if open.is_some_and(|open| open.is_of(transaction)) {
            self.give_up_streamed(database);
        }
    }

    /// A client is gone, and its open transactions with it.
    pub fn client_lost(&mut self, session: SessionId) {
        tracing::debug!(?session, "a client is gone");
        let open = |db: &PrimaryDatabase| db.streamed.as_ref().map(|open| open.session);
        let all = self.primaries.iter();
        let theirs = all.filter(|(_, db)| open(db) == Some(session));
        let theirs: Vec<DatabaseId> = theirs.map(|(database, _)| *database).collect();
        for database in theirs {
            self.give_up_streamed(database);
        }
    }

    /// Takes the parts of an entry that will not be completed out of our own journal, which they
    /// would keep full until something else is written to the log.
    fn give_up_streamed(&mut self, database: DatabaseId) {
        let Some(db) = self.primaries.get_mut(&database) else {
            return;
        };
        let open = db.streamed.take();
        // Of an older epoch, or with a commit behind it, it was taken back already.
        let next = db.machine.next_lsn().filter(|_| db.is_open());
        let next = next.map(|lsn| LogPosition::new(db.machine.epoch(), lsn));
        if open.is_none_or(|open| Some(open.position) != next) {
            return;
        }
        let after = db.machine.last();
        self.write_own_records(
            database,
            vec![Record::Truncate { database, after }],
            None,
            None,
        );
    }
}
