//! Everything that can happen to a node. Tasks make events, the actor takes them.

use super::outbox::Outbox;
use bytes::Bytes;
use durovfs_journal::JournalError;
use durovfs_link::Connection;
use durovfs_sidecar::replica_log::Notice;
use durovfs_wire::client::ClientMessage;
use durovfs_wire::entry::TransactionSummary;
use durovfs_wire::peer::{PrimaryMessage, ReplicaMessage};
use durovfs_wire::{DatabaseId, Epoch, LogPosition, Lsn, NodeName};
use std::rc::Rc;
use tokio::sync::{OwnedSemaphorePermit, mpsc};

/// Which connection: events of one that was replaced are told apart by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub u64);

/// What a client's certificate lets it open.
#[derive(Debug)]
pub struct ClientGrant {
    /// The certificate's name.
    pub name: String,
    /// Names that it may open.
    pub databases: globset::GlobSet,
}

/// Room for bytes that were taken from the network and are not yet on disk.
pub type Permit = Option<OwnedSemaphorePermit>;

/// What happened.
pub enum Event {
    /// A connection to a replica's node stands.
    PeerConnected {
        node: NodeName,
        session: SessionId,
        connection: Rc<Connection>,
        outbox: Outbox,
    },
    /// It is gone, or could not be made.
    PeerLost {
        node: NodeName,
        session: SessionId,
        error: String,
    },
    /// A replica says something.
    FromReplica {
        node: NodeName,
        session: SessionId,
        message: ReplicaMessage,
    },
    /// A node that is primary of something says something.
    FromPrimary {
        node: NodeName,
        session: SessionId,
        /// The shared stream of the connection.
        shared: Outbox,
        /// The stream that the message came on.
        outbox: Outbox,
        message: PrimaryMessage,
        payload: Bytes,
        permit: Permit,
    },
    /// A node's connection to us is gone.
    PrimaryLost { node: NodeName, session: SessionId },
    /// A client says something.
    FromClient {
        session: SessionId,
        grant: Rc<ClientGrant>,
        outbox: Outbox,
        message: ClientMessage,
        payload: Bytes,
        permit: Permit,
    },
    /// A client's connection is gone.
    ClientLost { session: SessionId },
    /// The entries that recovery needed are in our own journal, or could not be had.
    Fetched {
        database: DatabaseId,
        epoch: Epoch,
        donor: NodeName,
        /// Where the donor's log ends.
        result: Result<LogPosition, String>,
    },
    /// The archive has told the last transaction of a log that is to be opened, or could not.
    EndFound {
        question: super::epoch_start::EndQuestion,
        result: Result<Option<TransactionSummary>, String>,
    },
    /// A bulk feed has sent its range.
    BulkSent {
        database: DatabaseId,
        node: NodeName,
        feed: u64,
        result: Result<LogPosition, String>,
    },
    /// A bulk feed moves: it is at this entry.
    BulkProgress {
        database: DatabaseId,
        feed: u64,
        node: NodeName,
        lsn: Lsn,
    },
    /// An upload has ended.
    Uploaded {
        database: DatabaseId,
        result: Result<super::uploader::Uploaded, String>,
    },
    /// An upload in the place of a silent primary has ended.
    OrphanUploaded {
        database: DatabaseId,
        result: Result<super::uploader::Uploaded, String>,
    },
    /// A snapshot has been made, or not.
    SnapshotMade {
        database: DatabaseId,
        result: Result<Option<Lsn>, String>,
    },
}

/// What the journals' writer threads report.
pub enum JournalEvent {
    /// A part of an entry of ours is in our own journal.
    OwnWritten {
        database: DatabaseId,
        position: LogPosition,
        complete: bool,
        result: Result<(), JournalError>,
    },
    /// Of a log that this node is replica of.
    Replica(Notice),
}

/// How tasks hand events to the actor.
#[derive(Clone)]
pub struct EventSender(mpsc::Sender<Event>);

impl EventSender {
    /// Wraps the channel's sender.
    pub fn new(sender: mpsc::Sender<Event>) -> Self {
        Self(sender)
    }

    /// Waits for room and hands over. `false` when the node has stopped.
    pub async fn send(&self, event: Event) -> bool {
        self.0.send(event).await.is_ok()
    }
}
