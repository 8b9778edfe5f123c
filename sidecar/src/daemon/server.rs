//! Incoming connections: who they are, and their frames as events.
//!
//! Payload bytes wait for a permit before the actor sees them and keep it until they are on disk,
//! so that a node's memory is bounded whatever its peers send.

use super::event::{ClientGrant, Event, EventSender, Permit, SessionId};
use super::outbox::Outbox;
use durovfs_link::{Connection, Endpoint, FrameReceiver, FrameSender, LinkError, PeerRole};
use durovfs_wire::client::ClientMessage;
use durovfs_wire::peer::PrimaryMessage;
use durovfs_wire::{Frame, NodeName};
use std::rc::Rc;
use std::sync::Arc;
use tokio::sync::Semaphore;

/// Bytes taken from the network and not yet on disk, over all connections. A few group commits of
/// a fast disk; more would only be latency.
const UNWRITTEN_LIMIT_BYTES: usize = 32 << 20;

/// Accepts connections until the endpoint is closed.
pub fn spawn_accept(endpoint: Rc<Endpoint>, events: EventSender) {
    let room = Arc::new(Semaphore::new(UNWRITTEN_LIMIT_BYTES));
    tokio::task::spawn_local(async move {
        let mut next_session = 0u64;
        while let Some(incoming) = endpoint.accept().await {
            let session = SessionId(next_session);
            next_session += 1;
            let (events, room) = (events.clone(), Arc::clone(&room));
            tokio::task::spawn_local(async move {
                match incoming.handshake().await {
                    Ok(connection) => serve(session, Rc::new(connection), events, room).await,
                    Err(error) => tracing::warn!(%error, "a connection was refused"),
                }
            });
        }
    });
}

async fn serve(
    session: SessionId,
    connection: Rc<Connection>,
    events: EventSender,
    room: Arc<Semaphore>,
) {
    match connection.peer().clone() {
        PeerRole::Node(node) => {
            serve_node(session, node.clone(), &connection, &events, &room).await;
            events.send(Event::PrimaryLost { node, session }).await;
        }
        PeerRole::Client { name, databases } => {
            match grant(name, &databases) {
                Ok(grant) => serve_client(session, grant, &connection, &events, &room).await,
                Err(error) => tracing::warn!(%error, "a client's certificate has a bad pattern"),
            }
            events.send(Event::ClientLost { session }).await;
        }
    }
    connection.close("no longer needed");
}

fn grant(name: String, patterns: &[String]) -> Result<Rc<ClientGrant>, globset::Error> {
    let mut databases = globset::GlobSetBuilder::new();
    for pattern in patterns {
        databases.add(globset::Glob::new(pattern)?);
    }
    Ok(Rc::new(ClientGrant {
        name,
        databases: databases.build()?,
    }))
}

async fn serve_node(
    session: SessionId,
    node: NodeName,
    connection: &Connection,
    events: &EventSender,
    room: &Arc<Semaphore>,
) {
    let mut shared: Option<Outbox> = None;
    while let Ok((sender, receiver)) = connection.accept_stream().await {
        let outbox = Outbox::spawn(sender);
        // The first stream of a connection is the shared one: acks go there.
        let shared = shared.get_or_insert_with(|| outbox.clone()).clone();
        let (node, events, room) = (node.clone(), events.clone(), Arc::clone(room));
        tokio::task::spawn_local(async move {
            let reader = NodeStream {
                session,
                node,
                shared,
                outbox,
                events,
                room,
            };
            let name = reader.node.clone();
            if let Err(error) = reader.read(receiver).await {
                note_ended(name.as_str(), &error);
            }
        });
    }
}

/// A stream ended. Streams do all the time; a peer of another version is to be looked at.
fn note_ended(peer: &str, error: &LinkError) {
    match error {
        LinkError::Protocol(error) => tracing::warn!(peer, %error, "a peer was refused"),
        error => tracing::debug!(peer, %error, "a stream ended"),
    }
}

struct NodeStream {
    session: SessionId,
    node: NodeName,
    shared: Outbox,
    outbox: Outbox,
    events: EventSender,
    room: Arc<Semaphore>,
}

impl NodeStream {
    async fn read(self, mut receiver: FrameReceiver) -> Result<(), LinkError> {
        let mut frames = Vec::new();
        while receiver.recv_many(&mut frames).await? {
            for frame in frames.drain(..) {
                let message: PrimaryMessage = frame.message()?;
                let event = Event::FromPrimary {
                    session: self.session,
                    node: self.node.clone(),
                    shared: self.shared.clone(),
                    outbox: self.outbox.clone(),
                    message,
                    payload: frame.payload().clone(),
                    permit: room_for(&self.room, &frame).await,
                };
                if !self.events.send(event).await {
                    return Ok(());
                }
            }
        }
        Ok(())
    }
}

async fn serve_client(
    session: SessionId,
    grant: Rc<ClientGrant>,
    connection: &Connection,
    events: &EventSender,
    room: &Arc<Semaphore>,
) {
    while let Ok((sender, receiver)) = connection.accept_stream().await {
        let (grant, events, room) = (Rc::clone(&grant), events.clone(), Arc::clone(room));
        tokio::task::spawn_local(async move {
            let name = grant.name.clone();
            let reader = read_client_stream(session, grant, sender, receiver, &events, &room);
            if let Err(error) = reader.await {
                note_ended(&name, &error);
            }
        });
    }
}

async fn read_client_stream(
    session: SessionId,
    grant: Rc<ClientGrant>,
    sender: FrameSender,
    mut receiver: FrameReceiver,
    events: &EventSender,
    room: &Arc<Semaphore>,
) -> Result<(), LinkError> {
    let outbox = Outbox::spawn(sender);
    let mut frames = Vec::new();
    while receiver.recv_many(&mut frames).await? {
        for frame in frames.drain(..) {
            let message: ClientMessage = frame.message()?;
            let event = Event::FromClient {
                session,
                grant: Rc::clone(&grant),
                outbox: outbox.clone(),
                message,
                payload: frame.payload().clone(),
                permit: room_for(room, &frame).await,
            };
            if !events.send(event).await {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// Waits until the payload may be held in memory.
async fn room_for(room: &Arc<Semaphore>, frame: &Frame) -> Permit {
    match u32::try_from(frame.payload().len()) {
        Ok(0) | Err(_) => None,
        // The semaphore is never closed, and a payload is far below its size.
        Ok(bytes) => Arc::clone(room).acquire_many_owned(bytes).await.ok(),
    }
}
