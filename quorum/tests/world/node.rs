//! The driver of a replica: its disk, its crashes, its messages.

use super::disk::{Disk, Record};
use super::{Fault, HOST_COUNT, ToReplica, World, database, host_name, index_of};
use durovfs_quorum::{AppendVerdict, Replica, ReplicaEffect};
use durovfs_wire::peer::{PrimaryMessage, RejectReason, ReplicaMessage};
use durovfs_wire::{Lsn, ReplicaId};

#[derive(Debug, Clone, Hash)]
pub struct Node {
    pub disk: Disk,
    pub replica: Option<Replica>,
}

impl Node {
    pub fn new(replica: ReplicaId) -> Self {
        let disk = Disk::new(replica);
        let replica = Some(Replica::new(database(), disk.state()));
        Self { disk, replica }
    }
}

/// Of so many notices to a primary that lost its epoch one arrives: nothing may rest on them.
const NOTICES_LOST: usize = 8;

fn is_notice(message: &ReplicaMessage) -> bool {
    matches!(
        message,
        ReplicaMessage::Rejected {
            reason: RejectReason::TakenOver { .. },
            ..
        }
    )
}

impl World {
    pub(super) fn deliver_to_replica(&mut self, host: usize, node: usize) {
        if self.chance(2) {
            self.links[host][node].to_replica.pop_front();
        } else if self.chance(4)
            && let Some(message) = self.links[host][node].to_replica.front().cloned()
        {
            self.links[host][node].to_replica.push_front(message);
        }
        self.deliver(host, node);
    }

    pub(super) fn deliver(&mut self, host: usize, node: usize) {
        let Some(ToReplica { message, entry }) = self.links[host][node].to_replica.pop_front()
        else {
            return;
        };
        let Some(replica) = &mut self.nodes[node].replica else {
            return;
        };
        match message {
            PrimaryMessage::Claim(claim) => replica.handle_claim(&host_name(host), &claim),
            PrimaryMessage::Append {
                generation,
                epoch,
                previous,
                commit_lsn,
                archive_lsn,
                part,
            } => {
                let verdict = replica
                    .check_append(generation, epoch, previous, &part, commit_lsn, archive_lsn)
                    .unwrap();
                let under = replica.promised();
                match verdict {
                    AppendVerdict::Write {
                        truncate_after,
                        restart_at,
                    } => {
                        let disk = &mut self.nodes[node].disk;
                        self.tally.truncated += u64::from(truncate_after.is_some());
                        self.tally.replica_restarts += u64::from(restart_at.is_some());
                        disk.unsynced.extend(truncate_after.map(Record::Truncate));
                        disk.unsynced.extend(restart_at.map(Record::Restart));
                        let entry = entry.unwrap();
                        disk.unsynced.push_back(Record::Part {
                            entry,
                            part: part.part,
                            under,
                        });
                        if self.fault == Fault::AckBeforeSync {
                            let complete = part.is_last();
                            let position = part.position();
                            if let Some(replica) = &mut self.nodes[node].replica {
                                replica.handle_part_persisted(position, under, complete);
                            }
                        }
                    }
                    AppendVerdict::Duplicate => {}
                    AppendVerdict::Reject(reason) => {
                        let database = database();
                        let message = ReplicaMessage::Rejected {
                            database,
                            epoch,
                            reason,
                        };
                        self.links[host][node].to_host.push_back(message);
                    }
                }
            }
            PrimaryMessage::Progress {
                epoch,
                commit_lsn,
                archive_lsn,
                ..
            } => {
                replica.handle_progress(epoch, commit_lsn, archive_lsn);
            }
            PrimaryMessage::Mend { epoch, lsn, .. } => {
                let too_early = self.fault == Fault::WholeTooEarly;
                let lsn = if too_early { Lsn::ZERO } else { lsn };
                replica.handle_mend(epoch, lsn);
            }
            PrimaryMessage::Members { membership, .. } => {
                replica.handle_members(membership).unwrap();
            }
            other => panic!("{other:?}"),
        }
        self.drive_replica(node);
    }

    pub(super) fn drive_replica(&mut self, node: usize) {
        while let Some(effect) = self.nodes[node]
            .replica
            .as_mut()
            .and_then(Replica::poll_effect)
        {
            match effect {
                ReplicaEffect::PersistPromise {
                    token,
                    epoch,
                    claimant,
                    ..
                } => {
                    if self.fault == Fault::PromiseNotPersisted {
                        if let Some(replica) = &mut self.nodes[node].replica {
                            replica.handle_promise_persisted(token);
                        }
                        continue;
                    }
                    let record = Record::Promise {
                        token,
                        epoch,
                        claimant,
                    };
                    self.nodes[node].disk.unsynced.push_back(record);
                }
                ReplicaEffect::PersistMended => {
                    self.nodes[node].disk.unsynced.push_back(Record::Mended);
                }
                ReplicaEffect::PersistMembership { membership } => {
                    let record = Record::Membership(membership);
                    self.nodes[node].disk.unsynced.push_back(record);
                }
                ReplicaEffect::Send { node: to, message } => {
                    self.check_sent(node, &message);
                    if is_notice(&message) && self.loses_notice() {
                        continue;
                    }
                    let link = &mut self.links[index_of(&to)][node];
                    if link.up {
                        link.to_host.push_back(message);
                    }
                }
            }
        }
    }

    /// Whether a primary is not told of its successor. What that fault breaks is seen only when it
    /// is not.
    fn loses_notice(&mut self) -> bool {
        let is_lost = self.is_model || self.fault == Fault::BuryUnconditionally;
        is_lost || self.pick(NOTICES_LOST) > 0
    }

    /// A promise is on disk before it is on the wire, and so is every entry that is acked. The two
    /// faults that break just that are left to the checks of their consequences.
    fn check_sent(&self, node: usize, message: &ReplicaMessage) {
        let disk = &self.nodes[node].disk;
        match message {
            _ if matches!(
                self.fault,
                Fault::PromiseNotPersisted | Fault::AckBeforeSync
            ) => {}
            ReplicaMessage::Promised(promise) => {
                assert_eq!(
                    (disk.promised, disk.claimant),
                    (promise.epoch, Some(promise.claimant)),
                    "a promise was sent that is not on disk"
                );
                // A restart of the log is not synced for its own sake.
                assert!(
                    disk.log.last() >= promise.last || promise.last.lsn <= promise.archive_lsn,
                    "promised {} but the disk ends at {}",
                    promise.last,
                    disk.log.last()
                );
            }
            ReplicaMessage::Ack {
                epoch, flush_lsn, ..
            } => {
                assert!(
                    disk.promised >= *epoch,
                    "ack in epoch={epoch} before its promise"
                );
                assert!(
                    disk.log.last().lsn >= *flush_lsn || *flush_lsn <= self.checker.archive_lsn,
                    "acked lsn={flush_lsn} but the disk ends at {}",
                    disk.log.last()
                );
            }
            _ => {}
        }
    }

    pub(super) fn sync(&mut self, node: usize) {
        // One sync takes all that waits, or, when it began earlier, only the older part.
        let waiting = self.nodes[node].disk.unsynced.len();
        if waiting > 0 && self.nodes[node].replica.is_some() {
            let count = self.pick(waiting) + 1;
            self.sync_count(node, count);
        }
    }

    pub(super) fn sync_all(&mut self, node: usize) {
        let count = self.nodes[node].disk.unsynced.len();
        self.sync_count(node, count);
    }

    fn sync_count(&mut self, node: usize, count: usize) {
        let no_truncation = self.fault == Fault::NoTruncation;
        // All is on disk before the first notice is given.
        let synced: Vec<Record> = (0..count)
            .filter_map(|_| self.nodes[node].disk.sync_one(no_truncation))
            .collect();
        for record in synced {
            let Some(replica) = &mut self.nodes[node].replica else {
                return;
            };
            match record {
                Record::Promise { token, .. } => replica.handle_promise_persisted(token),
                Record::Part { entry, part, under } => {
                    let complete = part + 1 == entry.part_count;
                    replica.handle_part_persisted(entry.position, under, complete);
                }
                Record::Mended => self.tally.mended += 1,
                Record::Membership(_)
                | Record::Truncate(_)
                | Record::Restart(_)
                | Record::Progress { .. } => {}
            }
        }
        self.drive_replica(node);
    }

    pub(super) fn crash_replica(&mut self, node: usize) {
        if self.nodes[node].replica.take().is_none() {
            return;
        }
        self.tally.crashes += 1;
        self.lose_unsynced(node);
        for host in 0..HOST_COUNT {
            self.disconnect(host, node);
        }
    }

    /// Some of what was not synced reaches the disk all the same.
    fn lose_unsynced(&mut self, node: usize) {
        let kept = self.pick(self.nodes[node].disk.unsynced.len() + 1);
        for _ in 0..kept {
            self.nodes[node]
                .disk
                .sync_one(self.fault == Fault::NoTruncation);
        }
        self.nodes[node].disk.lose_unsynced();
    }

    pub(super) fn start_replica(&mut self, node: usize) {
        let node = &mut self.nodes[node];
        let troubled = node
            .replica
            .as_ref()
            .is_some_and(|replica| replica.trouble().is_some());
        if node.replica.is_none() || troubled {
            let mut state = node.disk.state();
            state.mending &= self.fault != Fault::DamagedVotes;
            node.replica = Some(Replica::new(database(), state));
        }
    }

    /// The end of a replica's log goes bad, found at its next start or while it runs. At most two
    /// at a time: with three, those that are left could not tell where the log ends.
    pub(super) fn damage(&mut self, node: usize) {
        if !self.may_lose(node) {
            return;
        }
        if self.chance(50) {
            self.crash_replica(node);
        } else if let Some(replica) = &mut self.nodes[node].replica {
            replica.handle_trouble("an entry cannot be read".to_owned());
            self.lose_unsynced(node);
            self.drive_replica(node);
        }
        self.tally.damaged += 1;
        let kept = self.pick(self.nodes[node].disk.log.entries.len() + 1);
        self.nodes[node].disk.damage(kept);
    }

    pub(super) fn trouble(&mut self, node: usize) {
        if let Some(replica) = &mut self.nodes[node].replica {
            replica.handle_trouble("no space left".to_owned());
            self.tally.trouble += 1;
            self.lose_unsynced(node);
            self.drive_replica(node);
        }
    }

    pub(super) fn persist_progress(&mut self, node: usize) {
        let Node {
            disk,
            replica: Some(replica),
        } = &mut self.nodes[node]
        else {
            return;
        };
        if replica.trouble().is_some() {
            return;
        }
        let (commit_lsn, archive_lsn) = (replica.commit_lsn(), replica.archive_lsn());
        disk.unsynced.push_back(Record::Progress {
            commit_lsn,
            archive_lsn,
        });
    }

    pub(super) fn drop_entries(&mut self, host: usize, node: usize) {
        let disk = &mut self.nodes[node].disk;
        let unpersisted_restart = disk
            .unsynced
            .iter()
            .any(|record| matches!(record, Record::Restart(_)));
        if !unpersisted_restart {
            disk.log.drop_through(disk.archive_lsn.min(disk.commit_lsn));
        }
        let host = &mut self.hosts[host];
        if host.fetch.is_none() {
            host.log.drop_through(host.primary.archive_lsn());
            host.primary.handle_retained(host.log.first_lsn());
        }
    }
}
