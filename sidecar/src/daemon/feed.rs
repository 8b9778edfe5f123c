//! Feeds: what each replica of a database has been sent, and how the next entries reach it.
//!
//! A level replica gets each new entry on the shared stream. One that lags is sent a range from
//! the journal on a stream of its own; when it acked that, the rest, until it is level. An entry is
//! never on two streams at once, so entries reach a replica in order.

use super::bulk::{self, BulkFeed};
use super::node::Node;
use super::outbox::NotQueued;
use durovfs_wire::peer::PrimaryMessage;
use durovfs_wire::{DatabaseId, Frame, LogPosition, Lsn, NodeName};
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// A lag of at most this many entries and bytes is made up on the shared stream, read by the actor
/// itself: less than a millisecond of page cache.
const INLINE_ENTRIES: u64 = 64;
/// See [`INLINE_ENTRIES`].
const INLINE_BYTES: u64 = 256 << 10;
/// A replica that refused an entry is tried again after this.
const REFUSED_PAUSE: Duration = Duration::from_secs(1);
/// Times from send to ack that are kept for the percentiles.
const LATENCY_SAMPLES: usize = 512;
/// Entries in flight whose send time is kept; beyond, they are not sampled.
const SENT_SAMPLES: usize = 1024;

/// How a feed stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FeedState {
    /// Nothing is sent until the state machine says from where.
    Stopped,
    /// New entries go out on the shared stream.
    Ready,
    /// A range is on its way on a stream of its own.
    Bulk { feed: u64 },
    /// The range was sent; the shared stream is used again when it is acked.
    Settling { last_lsn: Lsn },
    /// The replica refused, or the range could not be read.
    Refusing { since: Instant, reason: String },
}

/// One replica's feed.
#[derive(Debug)]
pub struct Feed {
    /// First entry that was not sent.
    pub next_lsn: Lsn,
    /// The entry before it.
    pub previous: LogPosition,
    /// How it stands.
    pub state: FeedState,
    /// When the replica was last level.
    pub level_at: Instant,
    sent: VecDeque<(Lsn, Instant)>,
    latencies_us: VecDeque<u32>,
}

impl Feed {
    /// A feed that was not started.
    pub fn stopped() -> Self {
        Self {
            next_lsn: Lsn::ZERO,
            previous: LogPosition::ZERO,
            state: FeedState::Stopped,
            level_at: Instant::now(),
            sent: VecDeque::new(),
            latencies_us: VecDeque::new(),
        }
    }

    /// Begins at an entry.
    pub fn start(&mut self, next_lsn: Lsn, previous: LogPosition) {
        self.next_lsn = next_lsn;
        self.previous = previous;
        self.state = FeedState::Ready;
        self.sent.clear();
    }

    fn note_sent(&mut self, position: LogPosition, now: Instant) {
        self.next_lsn = position.lsn.next();
        self.previous = position;
        if self.sent.len() < SENT_SAMPLES {
            self.sent.push_back((position.lsn, now));
        }
    }

    /// The replica has all through `flush_lsn` on disk.
    pub fn acked(&mut self, flush_lsn: Lsn, now: Instant) {
        while let Some((lsn, sent)) = self.sent.front()
            && *lsn <= flush_lsn
        {
            let micros = u32::try_from(now.duration_since(*sent).as_micros()).unwrap_or(u32::MAX);
            if self.latencies_us.len() == LATENCY_SAMPLES {
                self.latencies_us.pop_front();
            }
            self.latencies_us.push_back(micros);
            self.sent.pop_front();
        }
        if let FeedState::Settling { last_lsn } = self.state
            && flush_lsn >= last_lsn
        {
            self.state = FeedState::Ready;
        }
    }

    /// Median and 99th percentile of the time from send to ack, microseconds.
    pub fn latency_percentiles_us(&self) -> (u64, u64) {
        let mut sorted: Vec<u32> = self.latencies_us.iter().copied().collect();
        sorted.sort_unstable();
        let at = |percent: usize| {
            let index = (sorted.len() * percent / 100).min(sorted.len().saturating_sub(1));
            sorted.get(index).copied().map_or(0, u64::from)
        };
        (at(50), at(99))
    }
}

impl Node {
    /// Sends an entry that was just appended to all level replicas.
    pub fn push_level(&mut self, database: DatabaseId, position: LogPosition, frame: &Frame) {
        let Some(db) = self.primaries.get_mut(&database) else {
            return;
        };
        let now = Instant::now();
        for (node, feed) in &mut db.feeds {
            let level = feed.state == FeedState::Ready && feed.next_lsn == position.lsn;
            let Some(link) = self.peers.get(node).and_then(|peer| peer.link.as_ref()) else {
                continue;
            };
            // A full queue is no error: the entry is read from the journal when there is room.
            if level && link.outbox.push(frame.clone()).is_ok() {
                feed.note_sent(position, now);
            }
        }
    }

    /// Sends what a replica lacks, as far as our own journal has it.
    pub fn pump_feed(&mut self, database: DatabaseId, node: &NodeName) {
        let Some(db) = self.primaries.get_mut(&database) else {
            return;
        };
        let last_lsn = db.written_lsn.min(db.machine.last().lsn);
        let generation = db.generation();
        let Some(feed) = db.feeds.get_mut(node) else {
            return;
        };
        if feed.state != FeedState::Ready || feed.next_lsn > last_lsn {
            return;
        }
        let Some(link) = self.peers.get(node).and_then(|peer| peer.link.as_ref()) else {
            return;
        };
        let entries = last_lsn.get() - feed.next_lsn.get() + 1;
        let bytes = self
            .primary_journal
            .entry_bytes(database, feed.next_lsn, last_lsn);
        if entries <= INLINE_ENTRIES && bytes <= INLINE_BYTES {
            self.pump_inline(database, node, last_lsn);
            return;
        }
        if !feed.sent.is_empty() {
            // A stream of its own would overtake them. Their ack, or a tick, comes here again.
            return;
        }
        self.next_feed += 1;
        feed.state = FeedState::Bulk {
            feed: self.next_feed,
        };
        let job = BulkFeed {
            database,
            node: node.clone(),
            feed: self.next_feed,
            generation,
            epoch: db.machine.epoch(),
            previous: feed.previous,
            last_lsn,
            commit_lsn: db.machine.commit_lsn(),
            archive_lsn: db.machine.archive_lsn(),
        };
        bulk::spawn_feed(
            job,
            &self.primary_journal,
            std::rc::Rc::clone(&link.connection),
            self.events.clone(),
        );
    }

    fn pump_inline(&mut self, database: DatabaseId, node: &NodeName, last_lsn: Lsn) {
        let Some(db) = self.primaries.get_mut(&database) else {
            return;
        };
        let generation = db.generation();
        let Some(feed) = db.feeds.get_mut(node) else {
            return;
        };
        let Some(link) = self.peers.get(node).and_then(|peer| peer.link.as_ref()) else {
            return;
        };
        let result = self
            .primary_journal
            .parts(database, feed.next_lsn, last_lsn)
            .map_err(|error| error.to_string())
            .and_then(|parts| {
                for part in parts {
                    let part = part.map_err(|error| error.to_string())?;
                    let message = PrimaryMessage::Append {
                        generation,
                        epoch: db.machine.epoch(),
                        previous: feed.previous,
                        commit_lsn: db.machine.commit_lsn(),
                        archive_lsn: db.machine.archive_lsn(),
                        part: part.header,
                    };
                    let frame =
                        Frame::encode(&message, part.payload).map_err(|error| error.to_string())?;
                    match link.outbox.push(frame) {
                        Ok(()) => {}
                        // Part 0 goes again when there is room; the replica takes that well.
                        Err(NotQueued::Full | NotQueued::Closed) => return Ok(()),
                        Err(NotQueued::TooLarge(error)) => return Err(error.to_string()),
                    }
                    if part.header.is_last() {
                        feed.note_sent(part.header.position(), Instant::now());
                    }
                }
                Ok(())
            });
        if let Err(reason) = result {
            tracing::error!(name = %db.name, %node, %reason, "feed stopped");
            feed.state = FeedState::Refusing {
                since: Instant::now(),
                reason,
            };
        }
    }

    /// A range was sent, or the task failed.
    pub fn handle_bulk_sent(
        &mut self,
        database: DatabaseId,
        node: &NodeName,
        feed_id: u64,
        result: Result<LogPosition, String>,
    ) {
        let Some(db) = self.primaries.get_mut(&database) else {
            return;
        };
        let flush_lsn = db.flush_lsn(node);
        let Some(feed) = db.feeds.get_mut(node) else {
            return;
        };
        if feed.state != (FeedState::Bulk { feed: feed_id }) {
            return; // restarted since
        }
        match result {
            Ok(last) => {
                feed.next_lsn = last.lsn.next();
                feed.previous = last;
                feed.state = FeedState::Settling { last_lsn: last.lsn };
                feed.acked(flush_lsn, Instant::now());
                self.pump_feed(database, node);
            }
            Err(reason) => {
                tracing::warn!(name = %db.name, %node, %reason, "catching up stopped");
                feed.state = FeedState::Refusing {
                    since: Instant::now(),
                    reason,
                };
            }
        }
    }

    /// Tries feeds again that were refused a while ago, and moves those that found a queue full.
    pub fn tick_feeds(&mut self, database: DatabaseId, now: Instant) {
        let Some(db) = self.primaries.get_mut(&database) else {
            return;
        };
        let mut again = Vec::new();
        for (node, feed) in &db.feeds {
            match &feed.state {
                FeedState::Refusing { since, .. }
                    if now.duration_since(*since) >= REFUSED_PAUSE =>
                {
                    again.push((node.clone(), true));
                }
                FeedState::Ready if feed.next_lsn <= db.written_lsn => {
                    again.push((node.clone(), false));
                }
                _ => {}
            }
        }
        for (node, refused) in again {
            if refused
                && self
                    .peers
                    .get(&node)
                    .is_some_and(|peer| peer.link.is_some())
            {
                // It is asked again what it has, and fed from there.
                if let Some(db) = self.primaries.get_mut(&database) {
                    if let Some(feed) = db.feeds.get_mut(&node) {
                        feed.state = FeedState::Stopped;
                    }
                    db.machine.restart_feed(&node);
                }
            } else {
                self.pump_feed(database, &node);
            }
        }
    }
}
