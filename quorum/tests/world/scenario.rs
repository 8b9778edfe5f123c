//! Two schedules by hand: what they need (a primary that does not know of its successor, an entry
//! on one disk, claims in just this order) a random one reaches once in thousands of seeds.
//!
//! Each must hold as it is, and break with the fault that it is for.

use super::{NODE_COUNT, World};
use durovfs_quorum::PrimaryState;
use durovfs_wire::Lsn;

/// Exchanges after which a host and its replicas have said all.
const ROUND_COUNT: usize = 20;
/// Claims that a host needs to hear of the epoch in its way, and to go above it.
const CLAIM_COUNT: usize = 3;
/// More messages than what an entry's parts take, with those that come before them.
const MAX_MESSAGE_COUNT: usize = 8;

impl World {
    /// A primary gives up an entry that its successor, of which it has not heard, has committed.
    pub fn bury_what_a_successor_committed(&mut self) {
        self.connect_all();
        // The first claim reaches the last node late, and brings word of an epoch.
        self.claim(0);
        self.claim(0);
        self.converse(0, &[0, 1, 2, 3]);
        let entry = self.commit_on_first_node_only();
        self.lead(1, &[0, 1, 2, 4]);
        assert!(
            self.checker.committed.contains_key(&entry),
            "the successor has not committed the entry"
        );
        self.deliver(0, 4);
        self.answer(0, 4);
        assert!(self.hosts[0].primary.next_lsn().is_some(), "has heard");
        self.bury(0);
        self.converse(0, &[1, 2, 3]);
        self.end();
    }

    /// An entry of an older epoch is on three disks, and a later one, of an epoch in between, on
    /// another (Raft, figure 8).
    pub fn hold_an_older_entry_on_three_disks(&mut self) {
        self.connect_all();
        self.lead(0, &[0, 1, 2, 3, 4]);
        let entry = self.commit_on_first_node_only();
        self.promise(1, &[2, 3, 4]);
        self.put(1, 2, entry);
        self.promise(0, &[0, 1, 3]);
        assert_eq!(self.hosts[0].primary.state(), PrimaryState::Starting);
        for node in [1, 3] {
            self.put(0, node, entry);
            self.hear(0, node);
        }
        self.put(0, 0, entry.next());
        self.hear(0, 0);
        self.end();
    }

    fn connect_all(&mut self) {
        for node in 0..NODE_COUNT {
            (0..2).for_each(|host| self.connect(host, node));
        }
    }

    fn end(&mut self) {
        self.check();
        self.heal();
        self.check();
    }

    fn converse(&mut self, host: usize, nodes: &[usize]) {
        for _ in 0..ROUND_COUNT {
            for node in nodes {
                self.pump(host, *node);
                self.exchange(host, *node);
            }
            self.finish_append(host);
            self.fetch_now(host, false);
        }
    }

    fn exchange(&mut self, host: usize, node: usize) {
        self.deliver(host, node);
        self.sync_all(node);
        self.answer(host, node);
    }

    /// A host hears all that a node has sent.
    fn hear(&mut self, host: usize, node: usize) {
        while !self.links[host][node].to_host.is_empty() {
            self.answer(host, node);
        }
    }

    /// A host wins an epoch, and its start is committed; nobody is told that it is.
    fn lead(&mut self, host: usize, nodes: &[usize]) {
        self.promise(host, nodes);
        for _ in 0..ROUND_COUNT {
            for node in nodes {
                if self.hosts[host].primary.next_lsn().is_none() {
                    self.pump(host, *node);
                    self.exchange(host, *node);
                }
            }
        }
        assert!(self.hosts[host].primary.next_lsn().is_some(), "leads not");
    }

    /// A host wins an epoch; its start is in its own log, and sent to nobody.
    fn promise(&mut self, host: usize, nodes: &[usize]) {
        for _ in 0..CLAIM_COUNT {
            if self.hosts[host].primary.state() != PrimaryState::Starting {
                self.claim(host);
            }
            for _ in 0..ROUND_COUNT {
                nodes.iter().for_each(|node| self.exchange(host, *node));
                self.fetch_now(host, false);
            }
            self.finish_append(host);
        }
    }

    /// The first host commits an entry that reaches one disk; the ack is on its way.
    fn commit_on_first_node_only(&mut self) -> Lsn {
        self.client_commit(0);
        self.finish_append(0);
        let entry = self.hosts[0].primary.last().lsn;
        self.put(0, 0, entry);
        entry
    }

    /// Feeds a node until it has an entry on its disk.
    fn put(&mut self, host: usize, node: usize, entry: Lsn) {
        for _ in 0..MAX_MESSAGE_COUNT {
            if self.nodes[node].disk.log.last().lsn < entry {
                if self.links[host][node].to_replica.is_empty() {
                    self.pump(host, node);
                }
                self.deliver(host, node);
                self.sync_all(node);
            }
        }
        let last = self.nodes[node].disk.log.last();
        assert_eq!(last.lsn, entry, "host {host} feeds node {node}");
    }
}
