//! The driver of a primary: its journal, its feeds, its clients.

use super::disk::{Entry, Log};
use super::{Fault, NODE_COUNT, ToReplica, World, database, index_of, node_name, part_header};
use durovfs_quorum::{LocalLog, Primary, PrimaryEffect, PrimaryState, quorum_lsn};
use durovfs_wire::peer::{PrimaryMessage, ReplicaMessage};
use durovfs_wire::{ClaimantId, Epoch, LogPosition, Lsn, Membership};
use rand::RngExt;
use std::collections::{BTreeMap, VecDeque};

#[derive(Debug, Clone, Hash)]
pub struct Host {
    pub primary: Primary,
    pub log: Log,
    pub fetch: Option<Fetch>,
    /// What the configuration says, as long as the log lives.
    pub configured: Membership,
    /// The newest membership in the own journal.
    pub noted: Membership,
    feeds: BTreeMap<usize, Feed>,
    /// In the journal, but the notice of it has not come yet.
    appended: VecDeque<LogPosition>,
    /// Values that the journal keeps lazily.
    commit_lsn: Lsn,
    archive_lsn: Lsn,
    /// Checked against the checker up to here; begins anew with each primary.
    told_lsn: Lsn,
    given_up: Vec<Entry>,
    led_epoch: Epoch,
    epoch: Epoch,
    acked: BTreeMap<usize, Lsn>,
}

#[derive(Debug, Clone, Copy, Hash)]
pub struct Fetch {
    donor: usize,
    first_lsn: Lsn,
    last: LogPosition,
}

#[derive(Debug, Clone, Hash)]
struct Feed {
    previous: LogPosition,
    part: u32,
}

impl Host {
    pub fn new(membership: &Membership) -> Self {
        let local = LocalLog {
            first_lsn: Lsn::new(1),
            ..LocalLog::default()
        };
        Self {
            primary: Primary::new(database(), "db".to_owned(), membership.clone(), local),
            log: Log::default(),
            fetch: None,
            configured: membership.clone(),
            noted: membership.clone(),
            feeds: BTreeMap::new(),
            appended: VecDeque::new(),
            commit_lsn: Lsn::ZERO,
            archive_lsn: Lsn::ZERO,
            told_lsn: Lsn::ZERO,
            given_up: Vec::new(),
            led_epoch: Epoch::ZERO,
            epoch: Epoch::ZERO,
            acked: BTreeMap::new(),
        }
    }

    pub fn start_claim(&mut self, claimant: ClaimantId) {
        self.fetch = None;
        self.primary.start_claim(claimant);
    }

    pub fn has_sent_all(&self) -> bool {
        let last = self.primary.last();
        self.fetch.is_none()
            && self.appended.is_empty()
            && self.feeds.values().all(|feed| feed.previous == last)
    }

    /// The process died; some of the newest entries never reached the disk.
    fn restart(&mut self, lost_count: usize, old_config: bool) {
        for _ in 0..lost_count {
            self.log.entries.pop_last();
        }
        let local = LocalLog {
            last: self.log.last(),
            first_lsn: self.log.first_lsn(),
            commit_lsn: self.commit_lsn,
            archive_lsn: self.archive_lsn,
            history: self.log.history(),
            promised: self.log.last().epoch,
        };
        if old_config {
            self.noted = self.configured.clone();
        }
        let membership = self.noted.clone();
        self.primary = Primary::new(database(), "db".to_owned(), membership, local);
        self.fetch = None;
        self.feeds.clear();
        self.appended.clear();
        self.given_up.clear();
        self.acked.clear();
        self.epoch = Epoch::ZERO;
        self.told_lsn = self.primary.commit_lsn();
    }
}

impl World {
    pub(super) fn deliver_to_host(&mut self, host: usize, node: usize) {
        if self.chance(2) {
            self.links[host][node].to_host.pop_front();
        } else if self.chance(4)
            && let Some(message) = self.links[host][node].to_host.front().cloned()
        {
            self.links[host][node].to_host.push_front(message);
        }
        self.answer(host, node);
    }

    pub(super) fn answer(&mut self, host: usize, node: usize) {
        let Some(mut message) = self.links[host][node].to_host.pop_front() else {
            return;
        };
        let fault = self.fault;
        if fault == Fault::AnyIdentity {
            self.forge_identity(host, node, &mut message);
        }
        let state = &mut self.hosts[host];
        if let ReplicaMessage::Promised(promise) = &mut message
            && fault == Fault::BuryUnconditionally
            && state.primary.is_burying()
        {
            promise.previous_promise = state.led_epoch;
        }
        state
            .primary
            .handle_message(&node_name(node), &message)
            .unwrap();
        if let ReplicaMessage::Ack {
            epoch, flush_lsn, ..
        } = message
            && fault == Fault::CountOldEpochs
            && epoch == state.primary.epoch()
            && state.primary.state() == PrimaryState::Starting
        {
            state.acked.insert(node, flush_lsn);
            let ack_quorum = state.configured.ack_quorum;
            let held = quorum_lsn(state.acked.values().copied(), ack_quorum);
            if held > state.told_lsn && held <= state.log.last().lsn {
                self.checker.commit(&state.log, state.told_lsn, held);
                state.told_lsn = held;
            }
        }
        self.drive_host(host);
    }

    pub(super) fn drive_host(&mut self, host: usize) {
        while let Some(effect) = self.hosts[host].primary.poll_effect() {
            self.carry_out(host, effect);
        }
        let state = &mut self.hosts[host];
        let epoch = state.primary.epoch();
        assert!(
            epoch >= state.epoch,
            "epoch went from {} to {epoch}",
            state.epoch
        );
        if epoch > state.epoch {
            state.acked.clear();
        }
        state.epoch = epoch;
    }

    fn carry_out(&mut self, host: usize, effect: PrimaryEffect) {
        let state = &mut self.hosts[host];
        match effect {
            PrimaryEffect::Send { node, message } => {
                let link = &mut self.links[host][index_of(&node)];
                assert!(link.up, "sent to a node that is not connected");
                link.to_replica.push_back(ToReplica {
                    message,
                    entry: None,
                });
            }
            PrimaryEffect::CutOwnLog { after } => {
                state.fetch = None;
                state.log.truncate(after);
            }
            PrimaryEffect::RestartOwnLog { at } => {
                state.fetch = None;
                state.log.restart(at);
                self.tally.own_restarts += 1;
            }
            PrimaryEffect::Fetch {
                donor,
                first_lsn,
                last,
            } => {
                assert_eq!(first_lsn, state.log.last().lsn.next());
                state.fetch = Some(Fetch {
                    donor: index_of(&donor),
                    first_lsn,
                    last,
                });
            }
            PrimaryEffect::NodesChanged => self.connect_new_nodes(host),
            PrimaryEffect::NoteMembership { membership } => self.note_membership(host, membership),
            PrimaryEffect::AppendEpochStart { position } => {
                let value = self.new_value(host, position);
                let state = &mut self.hosts[host];
                state.log.append(Entry {
                    position,
                    value,
                    part_count: 1,
                    is_start: true,
                });
                state.appended.push_back(position);
            }
            PrimaryEffect::Feed {
                node,
                next_lsn,
                previous,
            } => {
                assert_eq!(next_lsn, previous.lsn.next());
                state
                    .feeds
                    .insert(index_of(&node), Feed { previous, part: 0 });
            }
            PrimaryEffect::StopFeed { node } => {
                state.feeds.remove(&index_of(&node));
            }
            PrimaryEffect::Opened { epoch, end } => {
                assert_eq!((epoch, state.log.last()), (state.primary.epoch(), end));
                assert_eq!(state.primary.commit_lsn(), end.lsn);
                self.tally.opened += 1;
            }
            PrimaryEffect::Committed { lsn } => {
                self.checker
                    .commit(&state.log, state.told_lsn.min(lsn), lsn);
                assert!(lsn >= state.told_lsn || self.fault == Fault::CountOldEpochs);
                state.told_lsn = lsn;
                self.tally.committed += 1;
                self.tally.note(lsn.get());
            }
            PrimaryEffect::Buried { .. } => {
                let entries = std::mem::take(&mut state.given_up);
                assert!(!entries.is_empty(), "buried nothing");
                self.checker.bury(&entries);
                self.tally.buried += 1;
            }
            PrimaryEffect::BuryRefused => {
                state.given_up.clear();
                self.tally.bury_refused += 1;
            }
            PrimaryEffect::Fenced { .. } => self.tally.fenced += 1,
        }
    }

    /// Sends the next part of a feed.
    pub(super) fn pump(&mut self, host: usize, node: usize) {
        let idle_progress = self.chance(20);
        let state = &mut self.hosts[host];
        let Some(feed) = state.feeds.get_mut(&node) else {
            return;
        };
        let lsn = feed.previous.lsn.next();
        let (commit_lsn, archive_lsn) = (state.primary.commit_lsn(), state.primary.archive_lsn());
        let epoch = state.primary.epoch();
        let to_replica = if lsn > state.primary.last().lsn {
            if !idle_progress {
                return;
            }
            let message = PrimaryMessage::Progress {
                database: database(),
                epoch,
                commit_lsn,
                archive_lsn,
            };
            ToReplica {
                message,
                entry: None,
            }
        } else if let Some(entry) = state.log.entries.get(&lsn).copied() {
            let message = PrimaryMessage::Append {
                generation: state.primary.membership().generation,
                epoch,
                previous: feed.previous,
                commit_lsn,
                archive_lsn,
                part: part_header(&entry, feed.part),
            };
            feed.part += 1;
            if feed.part == entry.part_count {
                *feed = Feed {
                    previous: entry.position,
                    part: 0,
                };
            }
            ToReplica {
                message,
                entry: Some(entry),
            }
        } else {
            // Dropped from the journal while the feed was on its way.
            self.restart_feed(host, node);
            return;
        };
        let link = &mut self.links[host][node];
        assert!(link.up, "feeds a node that is not connected");
        link.to_replica.push_back(to_replica);
    }

    pub(super) fn restart_feed(&mut self, host: usize, node: usize) {
        self.hosts[host].primary.restart_feed(&node_name(node));
        self.drive_host(host);
    }

    pub(super) fn client_commit(&mut self, host: usize) {
        let part_count = if self.chance(20) { 3 } else { 1 };
        let state = &mut self.hosts[host];
        if !state.appended.is_empty() {
            return;
        }
        if let Some(lsn) = state.primary.next_lsn() {
            let position = LogPosition::new(state.primary.epoch(), lsn);
            let value = self.new_value(host, position);
            let state = &mut self.hosts[host];
            state.log.append(Entry {
                position,
                value,
                part_count,
                is_start: false,
            });
            state.appended.push_back(position);
        }
    }

    pub(super) fn finish_append(&mut self, host: usize) {
        let state = &mut self.hosts[host];
        if let Some(position) = state.appended.pop_front() {
            state.primary.handle_appended(position);
            self.drive_host(host);
        }
    }

    pub(super) fn finish_fetch(&mut self, host: usize) {
        let fails = self.chance(15);
        self.fetch_now(host, fails);
    }

    pub(super) fn fetch_now(&mut self, host: usize, fails: bool) {
        let Some(fetch) = self.hosts[host].fetch.take() else {
            return;
        };
        let epoch = self.hosts[host].primary.epoch();
        let donor = &self.nodes[fetch.donor];
        let allowed = self.links[host][fetch.donor].up
            && donor.replica.as_ref().is_some_and(|replica| {
                replica
                    .check_fetch(epoch, fetch.first_lsn, fetch.last.lsn)
                    .is_ok()
            });
        let entries: Vec<Entry> = donor
            .disk
            .log
            .entries
            .range(fetch.first_lsn..=fetch.last.lsn)
            .map(|(_, entry)| *entry)
            .collect();
        let whole = entries
            .first()
            .is_some_and(|entry| entry.position.lsn == fetch.first_lsn)
            // The end may have been damaged since.
            && entries.last().is_some_and(|entry| entry.position == fetch.last);
        let state = &mut self.hosts[host];
        if !allowed || !whole || fails {
            // What came before the failure is in the own journal.
            let came = if allowed && whole {
                entries.len() / 2
            } else {
                0
            };
            entries
                .into_iter()
                .take(came)
                .for_each(|entry| state.log.append(entry));
            state.primary.handle_fetch_failed(&node_name(fetch.donor));
            self.tally.fetch_failed += 1;
        } else {
            entries
                .into_iter()
                .for_each(|entry| state.log.append(entry));
            let history = state.log.history();
            state.primary.handle_recovered(state.log.last(), history);
            self.tally.fetched += 1;
        }
        self.drive_host(host);
    }

    /// Mostly a host without the log claims it, and one that leads is left alone by the other.
    pub(super) fn want_to_lead(&mut self, host: usize) {
        let other_leads = self
            .hosts
            .iter()
            .any(|host| host.primary.next_lsn().is_some());
        let busy = !matches!(
            self.hosts[host].primary.state(),
            PrimaryState::Idle | PrimaryState::Fenced { .. }
        );
        if self.chance(if other_leads || busy { 8 } else { 100 }) {
            self.claim(host);
        }
    }

    pub(super) fn claim(&mut self, host: usize) {
        let claimant = self.claimant(host);
        self.hosts[host].start_claim(claimant);
        self.drive_host(host);
    }

    pub(super) fn bury(&mut self, host: usize) {
        let claimant = self.claimant(host);
        let state = &mut self.hosts[host];
        let leading = state.primary.state() == PrimaryState::Leading;
        if !leading && !state.primary.is_burying() {
            return;
        }
        if leading && state.primary.last().lsn > state.primary.commit_lsn() {
            state.led_epoch = state.primary.epoch();
            let tail = state.log.entries.range(state.primary.commit_lsn().next()..);
            state.given_up = tail.map(|(_, entry)| *entry).collect();
        }
        state.primary.start_bury(claimant);
        self.drive_host(host);
    }

    pub(super) fn archive(&mut self, host: usize) {
        let state = &self.hosts[host];
        let (from, to) = (state.primary.archive_lsn(), state.primary.commit_lsn());
        if state.primary.state() != PrimaryState::Leading || from == to {
            return;
        }
        let lsn = Lsn::new(self.rng.random_range(from.get() + 1..=to.get()));
        self.checker.archive(lsn);
        let keeps_more = self.chance(50);
        let state = &mut self.hosts[host];
        if keeps_more {
            state.primary.handle_retained(state.log.first_lsn());
        }
        state.primary.handle_archived(lsn);
        if !keeps_more {
            state.log.drop_through(lsn);
            state.primary.handle_retained(state.log.first_lsn());
        }
        state.commit_lsn = state.primary.commit_lsn();
        state.archive_lsn = lsn;
    }

    pub(super) fn crash_host(&mut self, host: usize) {
        for node in 0..NODE_COUNT {
            self.links[host][node] = super::Link::default();
        }
        let count = self.hosts[host].log.entries.len().min(6);
        let lost_count = self.pick(count + 1);
        let old_config = self.chance(30);
        self.tally.old_configs += u64::from(old_config);
        self.hosts[host].restart(lost_count, old_config);
        self.tally.crashes += 1;
    }
}
