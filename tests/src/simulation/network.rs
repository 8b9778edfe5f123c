//! The network: connections that keep the order of a stream, lose what is on its way when they are
//! cut, stand still in one direction, and are made again. Nothing of the product is in here.

use super::World;
use super::schedule::Event;
use super::settings::{HOST_COUNT, Micros};
use bytes::Bytes;
use durovfs_wire::peer::{PrimaryMessage, ReplicaMessage};
use std::collections::BTreeMap;

/// A connection that stands still is given up after this.
const SILENCE_LIMIT: Micros = 700_000;
/// The stream that all small messages share.
pub const SHARED: u64 = 0;

/// From one host to one replica.
#[derive(Debug, Default)]
pub struct Link {
    /// The connection that stands, if one does.
    pub connection: Option<u64>,
    /// No connection can be made before.
    pub cut_until: Micros,
    /// Nothing reaches the replica before, or the host.
    held: [Micros; 2],
    /// When the last message of a direction and stream arrives.
    last: BTreeMap<(usize, u64), Micros>,
}

/// A connection, also for a while after its end.
#[derive(Debug)]
pub struct Connection {
    pub host: usize,
    pub node: usize,
    /// What was on its way reaches the replica until then.
    closed_at: Option<Micros>,
}

/// All links and connections.
#[derive(Debug)]
pub struct Network {
    pub links: Vec<Vec<Link>>,
    connections: BTreeMap<u64, Connection>,
    next_connection: u64,
}

impl Network {
    pub fn new(node_count: usize) -> Self {
        let row = || (0..node_count).map(|_| Link::default()).collect();
        Self {
            links: (0..HOST_COUNT).map(|_| row()).collect(),
            connections: BTreeMap::new(),
            next_connection: 1,
        }
    }

    /// Whether a message on this connection still reaches the replica.
    pub fn reaches_node(&self, id: u64, now: Micros) -> Option<(usize, usize)> {
        let connection = self.connections.get(&id)?;
        let open = connection.closed_at.is_none_or(|closed| now <= closed);
        open.then_some((connection.host, connection.node))
    }

    /// Whether a message on this connection still counts at the host.
    pub fn reaches_host(&self, id: u64) -> Option<(usize, usize)> {
        let connection = self.connections.get(&id)?;
        let link = &self.links[connection.host][connection.node];
        (link.connection == Some(id)).then_some((connection.host, connection.node))
    }
}

impl World {
    /// When a message that is sent now arrives.
    fn arrival(&mut self, host: usize, node: usize, direction: usize, stream: u64) -> Micros {
        let slow = self.chance(20);
        let delay = if slow {
            self.rng.below(60_000)
        } else {
            100 + self.rng.below(900)
        };
        let now = self.schedule.now;
        let link = &mut self.network.links[host][node];
        let last = link.last.entry((direction, stream)).or_default();
        let at = (now + delay).max(link.held[direction]).max(*last + 1);
        *last = at;
        at
    }

    /// How often a message comes: a transport that keeps its promise says once. Transfers on
    /// streams of their own are left whole: nobody would ask again.
    fn copies(&mut self, stream: u64) -> usize {
        if stream != SHARED {
            return 1;
        }
        match self.rng.below(1000) {
            draw if draw < self.settings.message_loss => 0,
            draw if draw < 2 * self.settings.message_loss => 2,
            _ => 1,
        }
    }

    /// Sends to a replica; lost when there is no connection.
    pub(super) fn send_to_node(
        &mut self,
        host: usize,
        node: usize,
        stream: u64,
        message: &PrimaryMessage,
        payload: &Bytes,
    ) {
        let Some(connection) = self.network.links[host][node].connection else {
            return;
        };
        for _ in 0..self.copies(stream) {
            let at = self.arrival(host, node, 0, stream);
            let event = Event::ToReplica {
                connection,
                stream,
                message: message.clone(),
                payload: payload.clone(),
            };
            self.schedule.at(at, event);
        }
    }

    /// Sends to a host, on the connection that stands.
    pub(super) fn send_to_host(
        &mut self,
        host: usize,
        node: usize,
        stream: u64,
        message: &ReplicaMessage,
        payload: &Bytes,
    ) {
        let Some(connection) = self.network.links[host][node].connection else {
            return;
        };
        for _ in 0..self.copies(stream) {
            let at = self.arrival(host, node, 1, stream);
            let event = Event::ToHost {
                connection,
                stream,
                message: message.clone(),
                payload: payload.clone(),
            };
            self.schedule.at(at, event);
        }
    }

    /// A host tries to connect; it tries again when that cannot be.
    pub(super) fn connect(&mut self, host: usize, node: usize) {
        let now = self.schedule.now;
        if !self.hosts[host].is_up() || self.network.links[host][node].connection.is_some() {
            return;
        }
        let cut_until = self.network.links[host][node].cut_until;
        if !self.nodes[node].is_up() || now < cut_until {
            let at = cut_until.max(now + 20_000) + self.rng.below(20_000);
            self.schedule.at(at, Event::Connect { host, node });
            return;
        }
        let id = self.network.next_connection;
        self.network.next_connection += 1;
        let connection = Connection {
            host,
            node,
            closed_at: None,
        };
        self.network.connections.insert(id, connection);
        let link = &mut self.network.links[host][node];
        link.connection = Some(id);
        link.last.clear();
        self.host_connected(host, node);
    }

    /// The connection is gone for the host. Some of what was on its way may still reach the
    /// replica, also after the first messages of the next connection.
    pub(super) fn disconnect(&mut self, host: usize, node: usize) {
        let Some(id) = self.network.links[host][node].connection.take() else {
            return;
        };
        let lingers = if self.chance(50) {
            self.rng.below(40_000)
        } else {
            0
        };
        let now = self.schedule.now;
        if let Some(connection) = self.network.connections.get_mut(&id) {
            connection.closed_at.get_or_insert(now + lingers);
        }
        self.tally.cuts += 1;
        self.host_disconnected(host, node);
        let after = 5_000 + self.rng.below(100_000);
        self.schedule.after(after, Event::Connect { host, node });
    }

    /// The host notices that a connection is gone.
    pub(super) fn lost(&mut self, id: u64) {
        if let Some((host, node)) = self.network.reaches_host(id) {
            self.disconnect(host, node);
        }
    }

    /// A link is cut, and cannot be made again for a while.
    pub(super) fn cut_link(&mut self, host: usize, node: usize, lasts: Micros) {
        self.network.links[host][node].cut_until = self.schedule.now + lasts;
        self.disconnect(host, node);
    }

    /// One direction stands still for a while; when that is long, the host gives up.
    pub(super) fn silence(&mut self, host: usize, node: usize, direction: usize, lasts: Micros) {
        let now = self.schedule.now;
        let link = &mut self.network.links[host][node];
        link.held[direction] = now + lasts;
        self.tally.silences += 1;
        if let Some(connection) = link.connection
            && lasts > SILENCE_LIMIT
        {
            self.schedule
                .after(SILENCE_LIMIT, Event::Lost { connection });
        }
    }

    /// A replica's machine is gone: nothing reaches it, and the hosts notice a little later.
    pub(super) fn drop_node_connections(&mut self, node: usize) {
        let now = self.schedule.now;
        for host in 0..HOST_COUNT {
            let Some(id) = self.network.links[host][node].connection else {
                continue;
            };
            if let Some(connection) = self.network.connections.get_mut(&id) {
                connection.closed_at = Some(now.saturating_sub(1));
            }
            let after = self.rng.below(50_000);
            self.schedule.after(after, Event::Lost { connection: id });
        }
    }

    /// A host is gone: what it sent may still arrive.
    pub(super) fn drop_host_connections(&mut self, host: usize) {
        let now = self.schedule.now;
        for node in 0..self.nodes.len() {
            let Some(id) = self.network.links[host][node].connection.take() else {
                continue;
            };
            let lingers = self.rng.below(40_000);
            if let Some(connection) = self.network.connections.get_mut(&id) {
                connection.closed_at.get_or_insert(now + lingers);
            }
        }
    }

    /// Every link works again.
    pub(super) fn heal_network(&mut self) {
        for host in 0..HOST_COUNT {
            for node in 0..self.nodes.len() {
                let link = &mut self.network.links[host][node];
                link.cut_until = 0;
                link.held = [0; 2];
                self.schedule.after(1, Event::Connect { host, node });
            }
        }
    }
}
