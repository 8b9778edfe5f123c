//! What a host sends its replicas and reads from them: feeds, bulk transfers, recovery's fetches.

use super::World;
use super::network::SHARED;
use super::settings::Mutation;
use super::{database_id, node_name};
use bytes::Bytes;
use durovfs_wire::peer::{PrimaryMessage, RejectReason, ReplicaMessage};
use durovfs_wire::{EntryPart, Epoch, LogPosition, Lsn};

/// Lag that is made up on the shared stream; little, so that runs see both ways.
const INLINE_ENTRIES: u64 = 6;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FeedState {
    Stopped,
    Ready,
    /// A range was sent on a stream of its own; the shared one is used again when it is acked.
    Settling(Lsn),
    Refusing,
}

/// One replica's feed.
#[derive(Debug, Clone)]
pub struct Feed {
    next_lsn: Lsn,
    previous: LogPosition,
    state: FeedState,
}

/// A fetch of recovery that is under way.
#[derive(Debug)]
pub struct Fetch {
    id: u64,
    epoch: Epoch,
    donor: usize,
    last: LogPosition,
    /// The last whole entry that came.
    came: LogPosition,
    unwritten: u32,
    ended: bool,
    failed: bool,
}

impl Feed {
    pub fn stopped() -> Self {
        Self {
            next_lsn: Lsn::ZERO,
            previous: LogPosition::ZERO,
            state: FeedState::Stopped,
        }
    }

    pub fn start(&mut self, next_lsn: Lsn, previous: LogPosition) {
        *self = Self {
            next_lsn,
            previous,
            state: FeedState::Ready,
        };
    }

    pub fn stop(&mut self) {
        self.state = FeedState::Stopped;
    }

    /// What a message says of the feed.
    pub fn hear(&mut self, message: &ReplicaMessage) {
        match message {
            ReplicaMessage::Ack { flush_lsn, .. } => {
                if let FeedState::Settling(last_lsn) = self.state
                    && *flush_lsn >= last_lsn
                {
                    self.state = FeedState::Ready;
                }
            }
            ReplicaMessage::Rejected {
                reason: RejectReason::Storage { .. },
                ..
            } => self.state = FeedState::Refusing,
            _ => {}
        }
    }
}

impl World {
    /// Sends an entry that was just appended to all level replicas.
    pub(super) fn push_level(
        &mut self,
        host: usize,
        database: usize,
        position: LogPosition,
        message: &PrimaryMessage,
        payload: &Bytes,
    ) {
        for node in 0..self.nodes.len() {
            // A full queue is no error: the entry is read from the journal when there is room.
            let full = self.chance(2);
            let connected = self.network.links[host][node].connection.is_some();
            let Some(serving) = self.hosts[host].serving(database) else {
                return;
            };
            let feed = &mut serving.feeds[node];
            let level = feed.state == FeedState::Ready && feed.next_lsn == position.lsn;
            if level && connected && !full {
                feed.next_lsn = position.lsn.next();
                feed.previous = position;
                self.send_to_node(host, node, SHARED, message, payload);
            }
        }
    }

    pub(super) fn pump_feeds(&mut self, host: usize, database: usize) {
        for node in 0..self.nodes.len() {
            self.pump_feed(host, database, node);
        }
    }

    /// Sends what a replica lacks, as far as the own journal has it.
    pub(super) fn pump_feed(&mut self, host: usize, database: usize, node: usize) {
        let Some(running) = &mut self.hosts[host].up else {
            return;
        };
        let Some(serving) = running.servings.get_mut(&database) else {
            return;
        };
        let last_lsn = serving.written_lsn.min(serving.machine.last().lsn);
        let feed = serving.feeds[node].clone();
        let connected = self.network.links[host][node].connection.is_some();
        if feed.state != FeedState::Ready || feed.next_lsn > last_lsn || !connected {
            return;
        }
        let parts = running
            .journal
            .parts(database_id(database), feed.next_lsn, last_lsn);
        let Ok(parts) = parts.and_then(Iterator::collect::<Result<Vec<EntryPart>, _>>) else {
            serving.feeds[node].state = FeedState::Refusing;
            return;
        };
        let inline = last_lsn.get() - feed.next_lsn.get() < INLINE_ENTRIES;
        let stream = if inline {
            SHARED
        } else {
            self.tally.bulk_feeds += 1;
            self.new_stream()
        };
        let previous = self.send_parts(host, database, node, stream, (feed.previous, parts));
        if let Some(serving) = self.hosts[host].serving(database) {
            serving.feeds[node] = Feed {
                next_lsn: previous.lsn.next(),
                previous,
                state: if inline {
                    FeedState::Ready
                } else {
                    FeedState::Settling(previous.lsn)
                },
            };
        }
    }

    /// Sends parts of entries in order; gives the last whole entry sent.
    fn send_parts(
        &mut self,
        host: usize,
        database: usize,
        node: usize,
        stream: u64,
        (mut previous, parts): (LogPosition, Vec<EntryPart>),
    ) -> LogPosition {
        for part in parts {
            let Some(serving) = self.hosts[host].serving(database) else {
                return previous;
            };
            let message = PrimaryMessage::Append {
                generation: serving.machine.membership().generation,
                epoch: serving.machine.epoch(),
                previous,
                commit_lsn: serving.machine.commit_lsn(),
                archive_lsn: serving.machine.archive_lsn(),
                part: part.header,
            };
            self.send_to_node(host, node, stream, &message, &part.payload);
            if part.header.is_last() {
                previous = part.header.position();
            }
        }
        previous
    }

    fn new_stream(&mut self) -> u64 {
        self.next_stream += 1;
        self.next_stream
    }

    /// Tries feeds again that were refused, and moves those that found a queue full.
    pub(super) fn tick_feeds(&mut self, host: usize, database: usize) {
        let retries = self.chance(20);
        for node in 0..self.nodes.len() {
            let Some(serving) = self.hosts[host].serving(database) else {
                return;
            };
            let refusing = serving.feeds[node].state == FeedState::Refusing;
            if refusing && retries && self.network.links[host][node].connection.is_some() {
                if let Some(serving) = self.hosts[host].serving(database) {
                    serving.feeds[node].stop();
                    serving.machine.restart_feed(&node_name(node));
                }
                self.drive(host, database);
            } else {
                self.pump_feed(host, database, node);
            }
        }
        if self.asks_again && self.chance(4) {
            // Where single messages are lost, somebody has to ask again.
            let node = self.rng.below(self.nodes.len() as u64) as usize;
            if let Some(serving) = self.hosts[host].serving(database) {
                serving.machine.restart_feed(&node_name(node));
                self.drive(host, database);
            }
        }
    }

    /// Tells replicas what is committed where no append did.
    pub(super) fn tell_progress(&mut self, host: usize, database: usize) {
        let Some(serving) = self.hosts[host].serving(database) else {
            return;
        };
        if !std::mem::take(&mut serving.commits_untold) {
            return;
        }
        let message = PrimaryMessage::Progress {
            database: database_id(database),
            epoch: serving.machine.epoch(),
            commit_lsn: serving.machine.commit_lsn(),
            archive_lsn: serving.machine.archive_lsn(),
        };
        for node in 0..self.nodes.len() {
            let ready = self.hosts[host]
                .serving(database)
                .is_some_and(|serving| serving.feeds[node].state == FeedState::Ready);
            if ready {
                self.send_to_node(host, node, SHARED, &message, &Bytes::new());
            }
        }
    }

    pub(super) fn begin_fetch(
        &mut self,
        host: usize,
        database: usize,
        donor: usize,
        first_lsn: Lsn,
        last: LogPosition,
    ) {
        let id = self.new_stream();
        let connected = self.network.links[host][donor].connection.is_some();
        let Some(serving) = self.hosts[host].serving(database) else {
            return;
        };
        if !connected {
            serving.machine.handle_fetch_failed(&node_name(donor));
            return;
        }
        let epoch = serving.machine.epoch();
        let fetch = Fetch {
            id,
            epoch,
            donor,
            last,
            came: LogPosition::ZERO,
            unwritten: 0,
            ended: false,
            failed: false,
        };
        // One that is still under way goes on, as its task does in the daemon; what it brings is
        // refused by the journal, or told apart by its epoch.
        if let Some(old) = serving.fetch.replace(fetch) {
            self.stale_fetches.insert(old.id, (host, database, old));
        }
        let message = PrimaryMessage::Fetch {
            database: database_id(database),
            epoch,
            first_lsn,
            last_lsn: last.lsn,
        };
        self.send_to_node(host, donor, id, &message, &Bytes::new());
    }

    fn with_fetch(
        &mut self,
        host: usize,
        database: usize,
        id: u64,
        change: impl FnOnce(&mut Fetch),
    ) {
        let current = self.hosts[host]
            .serving(database)
            .and_then(|serving| serving.fetch.as_mut())
            .filter(|fetch| fetch.id == id);
        if let Some(fetch) = current {
            change(fetch);
        } else if let Some((_, _, fetch)) = self.stale_fetches.get_mut(&id) {
            change(fetch);
        }
    }

    /// An answer on the stream of a fetch.
    pub(super) fn fetch_answer(
        &mut self,
        host: usize,
        _node: usize,
        id: u64,
        message: ReplicaMessage,
        payload: Bytes,
    ) {
        let current = self.hosts[host].up.as_ref().and_then(|running| {
            let of_id = |serving: &super::host::Serving| {
                serving.fetch.as_ref().is_some_and(|fetch| fetch.id == id)
            };
            let mut servings = running.servings.iter();
            servings.find(|(_, serving)| of_id(serving))
        });
        let stale = self
            .stale_fetches
            .get(&id)
            .map(|(_, database, _)| *database);
        let Some(database) = current.map(|(database, _)| *database).or(stale) else {
            return;
        };
        match message {
            ReplicaMessage::FetchedPart { part } => {
                self.with_fetch(host, database, id, |fetch| {
                    fetch.unwritten += 1;
                    if part.is_last() {
                        fetch.came = part.position();
                    }
                });
                let entry = EntryPart {
                    header: part,
                    payload,
                };
                self.write_fetched(host, database, id, entry);
            }
            ReplicaMessage::FetchEnd { error } => {
                self.with_fetch(host, database, id, |fetch| {
                    fetch.ended = true;
                    fetch.failed |= error.is_some() || fetch.came != fetch.last;
                });
            }
            _ => self.with_fetch(host, database, id, |fetch| {
                (fetch.ended, fetch.failed) = (true, true);
            }),
        }
        self.finish_fetch(host, database);
    }

    /// The own journal wrote a fetched part, or did not.
    pub(super) fn fetched_written(&mut self, host: usize, database: usize, id: u64, is_ok: bool) {
        self.with_fetch(host, database, id, |fetch| {
            fetch.unwritten = fetch.unwritten.saturating_sub(1);
            if !is_ok {
                (fetch.ended, fetch.failed) = (true, true);
            }
        });
        self.finish_fetch(host, database);
    }

    pub(super) fn fetch_connection_lost(&mut self, host: usize, database: usize, node: usize) {
        if let Some(serving) = self.hosts[host].serving(database)
            && let Some(fetch) = &mut serving.fetch
            && fetch.donor == node
        {
            (fetch.ended, fetch.failed) = (true, true);
        }
        self.stale_fetches
            .retain(|_, (at, _, fetch)| *at != host || fetch.donor != node);
        self.finish_fetch(host, database);
    }

    fn finish_fetch(&mut self, host: usize, database: usize) {
        let Some(running) = &mut self.hosts[host].up else {
            return;
        };
        let state = running.journal.state(database_id(database));
        let Some(serving) = running.servings.get_mut(&database) else {
            return;
        };
        let over = |fetch: &mut Fetch| fetch.ended && (fetch.failed || fetch.unwritten == 0);
        let Some(fetch) = serving.fetch.take_if(over) else {
            return;
        };
        if serving.machine.epoch() != fetch.epoch {
            return; // of an earlier claim
        }
        match state {
            // A fetch of an earlier claim may have written behind this one.
            Some(state) if !fetch.failed && state.last == fetch.last => {
                serving.written_lsn = state.last.lsn;
                serving.machine.handle_recovered(state.last, state.history);
                self.tally.fetched += 1;
            }
            _ => {
                assert!(
                    fetch.failed || self.settings.mutation != Mutation::None || state.is_some(),
                    "a fetch came to nothing"
                );
                let donor = node_name(fetch.donor);
                if let Some(serving) = self.hosts[host].serving(database) {
                    serving.machine.handle_fetch_failed(&donor);
                }
                self.tally.fetch_failed += 1;
            }
        }
        self.drive(host, database);
    }
}
