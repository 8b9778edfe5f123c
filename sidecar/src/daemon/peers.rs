//! Outgoing connections to the nodes that keep replicas: made on demand, made again when lost.

use super::event::{Event, EventSender, SessionId};
use super::outbox::Outbox;
use durovfs_link::{Connection, Endpoint, FrameReceiver, LinkError};
use durovfs_wire::NodeName;
use durovfs_wire::peer::ReplicaMessage;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// Pauses between attempts to connect: short, since a replica that restarts is back in a moment.
const RECONNECT_PAUSE_FIRST: Duration = Duration::from_millis(50);
/// Longest pause: what a dead node costs is then one packet a second.
const RECONNECT_PAUSE_MAX: Duration = Duration::from_secs(1);
/// A signs-of-life question goes out this often.
pub const PING_INTERVAL: Duration = Duration::from_millis(500);
/// A node that left a question unanswered for this long does not count as answering. Above the
/// stall of a busy disk, below the patience of a person.
pub const SILENCE_LIMIT: Duration = Duration::from_millis(1500);

/// Another node, as a place where replicas of our databases live.
pub struct Peer {
    /// `host:port`.
    pub address: String,
    /// The connection, when it stands.
    pub link: Option<PeerLink>,
    /// Why there is no connection, for status.
    pub last_error: Option<String>,
    /// What the node says is wrong with it.
    pub trouble: Option<String>,
    /// How full it says that its journal is.
    pub journal_percent: u8,
    /// What it says that its journal may take; zero before it has.
    pub journal_limit_bytes: u64,
    connecting: bool,
}

/// A connection that stands.
pub struct PeerLink {
    /// Which one.
    pub session: SessionId,
    /// For streams of their own.
    pub connection: Rc<Connection>,
    /// The shared stream.
    pub outbox: Outbox,
    last_ping: Instant,
    /// When the oldest unanswered question was asked.
    unanswered_since: Option<Instant>,
    ping_sequence: u64,
}

impl Peer {
    /// A node that was not needed yet.
    pub fn new(address: String) -> Self {
        Self {
            address,
            link: None,
            last_error: None,
            trouble: None,
            journal_percent: 0,
            journal_limit_bytes: 0,
            connecting: false,
        }
    }

    /// Starts connecting, if that has not been done, and keeps connected from then on.
    pub fn ensure_connecting(
        &mut self,
        name: &NodeName,
        endpoint: &Rc<Endpoint>,
        events: &EventSender,
    ) {
        if self.connecting {
            return;
        }
        self.connecting = true;
        tokio::task::spawn_local(keep_connected(
            name.clone(),
            self.address.clone(),
            Rc::clone(endpoint),
            events.clone(),
        ));
    }

    /// Whether this node needs the other one.
    pub fn is_used(&self) -> bool {
        self.connecting
    }

    /// Notes a new connection.
    pub fn connected(&mut self, session: SessionId, connection: Rc<Connection>, outbox: Outbox) {
        let now = Instant::now();
        self.last_error = None;
        let mut link = PeerLink {
            session,
            connection,
            outbox,
            last_ping: now,
            unanswered_since: None,
            ping_sequence: 0,
        };
        // The first frame also makes the stream visible to the other side.
        link.ping(now);
        self.link = Some(link);
    }

    /// Whether the node is there and answered lately.
    pub fn is_answering(&self, now: Instant) -> bool {
        self.link.as_ref().is_some_and(|link| !link.is_silent(now))
    }

    /// Asks for a sign of life when it is time, and gives up a connection without its shared
    /// stream: what was not sent on it is asked again on the next one.
    pub fn tick(&mut self, now: Instant) {
        let Some(link) = &mut self.link else {
            return;
        };
        if link.outbox.is_closed() {
            link.connection.close("its shared stream has ended");
        } else if now.duration_since(link.last_ping) >= PING_INTERVAL {
            link.ping(now);
        }
    }
}

impl PeerLink {
    fn ping(&mut self, now: Instant) {
        use durovfs_wire::peer::PrimaryMessage;
        self.last_ping = now;
        self.ping_sequence += 1;
        self.unanswered_since.get_or_insert(now);
        // A queue that is full holds older questions already.
        let _ = self.outbox.send(&PrimaryMessage::Ping {
            sequence: self.ping_sequence,
        });
    }

    /// Any message is a sign of life: what was asked before it counts as answered.
    pub fn heard(&mut self) {
        self.unanswered_since = None;
    }

    fn is_silent(&self, now: Instant) -> bool {
        self.unanswered_since
            .is_some_and(|since| now.duration_since(since) > SILENCE_LIMIT)
    }
}

async fn keep_connected(
    node: NodeName,
    address: String,
    endpoint: Rc<Endpoint>,
    events: EventSender,
) {
    let mut pause = RECONNECT_PAUSE_FIRST;
    for session in 0u64.. {
        let session = SessionId(session);
        let error = match connect(&node, &address, &endpoint, session).await {
            Err(error) => error,
            Ok((connection, outbox, receiver)) => {
                pause = RECONNECT_PAUSE_FIRST;
                let connection = Rc::new(connection);
                let connected = Event::PeerConnected {
                    node: node.clone(),
                    session,
                    connection: Rc::clone(&connection),
                    outbox,
                };
                if !events.send(connected).await {
                    return;
                }
                let error = match read_replies(&node, session, receiver, &events).await {
                    Ok(()) => "the node closed the connection".to_owned(),
                    Err(error) => error.to_string(),
                };
                connection.close("connecting again");
                error
            }
        };
        if !events
            .send(Event::PeerLost {
                node: node.clone(),
                session,
                error,
            })
            .await
        {
            return;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(RECONNECT_PAUSE_MAX);
    }
}

async fn connect(
    node: &NodeName,
    address: &str,
    endpoint: &Endpoint,
    SessionId(attempt): SessionId,
) -> Result<(Connection, Outbox, FrameReceiver), String> {
    let found = tokio::net::lookup_host(address).await;
    let found: Vec<_> = found
        .map_err(|error| format!("look up {address}: {error}"))?
        .collect();
    // A name may have addresses that lead nowhere: each attempt takes the next one.
    let resolved = (attempt as usize)
        .checked_rem(found.len())
        .map(|index| found[index])
        .ok_or_else(|| format!("look up {address}: no address"))?;
    let connection = endpoint
        .connect(resolved, node)
        .await
        .map_err(|error| error.to_string())?;
    let (sender, receiver) = connection
        .open_stream()
        .await
        .map_err(|error| error.to_string())?;
    Ok((connection, Outbox::spawn(sender), receiver))
}

async fn read_replies(
    node: &NodeName,
    session: SessionId,
    mut receiver: FrameReceiver,
    events: &EventSender,
) -> Result<(), LinkError> {
    let mut frames = Vec::new();
    while receiver.recv_many(&mut frames).await? {
        for frame in frames.drain(..) {
            let message: ReplicaMessage = frame.message()?;
            let event = Event::FromReplica {
                node: node.clone(),
                session,
                message,
            };
            if !events.send(event).await {
                return Ok(());
            }
        }
    }
    Ok(())
}
