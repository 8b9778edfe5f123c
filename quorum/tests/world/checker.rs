//! What must hold over all nodes at once, each check with the sentence that it proves.

use super::Fault;
use super::disk::{Disk, Entry, Log, Record};
use durovfs_quorum::Replica;
use durovfs_wire::{Epoch, LogPosition, Lsn, Member, Membership};
use std::collections::{BTreeMap, BTreeSet};

/// What was ever told to be committed, archived or buried.
#[derive(Debug, Clone, Default, Hash)]
pub struct Checker {
    pub committed: BTreeMap<Lsn, Entry>,
    pub archive_lsn: Lsn,
    pub buried: BTreeSet<(LogPosition, u64)>,
}

/// Which disks have a vote by one membership, a bit each, for every set.
struct Votes {
    epoch: Epoch,
    quorum: u32,
    sets: Vec<u32>,
}

impl Votes {
    fn of(membership: &Membership, disks: &[&Disk], fault: Fault) -> Self {
        let bits = |set: &[Member]| {
            let bit = |member: &Member| {
                let index = super::index_of(&member.node);
                let disk = disks[index];
                // Those that are mending do not vote.
                let votes = !disk.mending || fault == Fault::DamagedVotes;
                u32::from(votes && member.replica == Some(disk.replica)) << index
            };
            set.iter().map(bit).sum()
        };
        Self {
            epoch: membership.epoch,
            quorum: membership.ack_quorum as u32,
            sets: membership.sets().map(bits).collect(),
        }
    }

    fn hold_quorum(&self, chosen: u32) -> bool {
        self.sets
            .iter()
            .all(|set| (set & chosen).count_ones() >= self.quorum)
    }

    fn members(&self) -> u32 {
        self.sets.iter().fold(0, |all, set| all | set)
    }
}

impl Checker {
    /// One entry per lsn is ever committed, and none that was buried.
    pub fn commit(&mut self, log: &Log, from: Lsn, to: Lsn) {
        for number in from.get() + 1..=to.get() {
            let lsn = Lsn::new(number);
            let Some(entry) = log.entries.get(&lsn) else {
                assert!(
                    lsn <= log.base.lsn && lsn <= self.archive_lsn,
                    "told lsn={lsn} committed without having it; log from {} to {}",
                    log.base,
                    log.last()
                );
                continue;
            };
            let first = self.committed.entry(lsn).or_insert(*entry);
            assert_eq!(first, entry, "two entries committed at lsn={lsn}");
            assert!(
                !self.buried.contains(&(entry.position, entry.value)),
                "buried {} value={} was committed",
                entry.position,
                entry.value
            );
        }
    }

    /// An entry told to be buried is not committed, before or after.
    pub fn bury(&mut self, entries: &[Entry]) {
        for entry in entries {
            assert_ne!(
                self.committed.get(&entry.position.lsn),
                Some(entry),
                "committed {} was buried",
                entry.position
            );
            self.buried.insert((entry.position, entry.value));
        }
    }

    /// Nothing is archived that is not committed.
    pub fn archive(&mut self, lsn: Lsn) {
        assert!(
            lsn == Lsn::ZERO || self.committed.contains_key(&lsn),
            "archived lsn={lsn}"
        );
        self.archive_lsn = self.archive_lsn.max(lsn);
    }

    /// Whichever disks survive, if recovery accepts them as a quorum, the log that it would choose
    /// from them has every committed entry.
    pub fn check_nothing_lost(&self, disks: &[&Disk], configured: &Membership, fault: Fault) {
        let votes_of = |disk: &&Disk| {
            let membership = disk.membership.as_ref().unwrap_or(configured);
            Votes::of(membership, disks, fault)
        };
        let votes: Vec<Votes> = disks.iter().map(votes_of).collect();
        let mut donors = BTreeMap::new();
        for chosen in 1..1u32 << disks.len() {
            let heard = || (0..disks.len()).filter(move |index| chosen >> index & 1 == 1);
            let newest = heard().max_by_key(|index| votes[*index].epoch);
            let Some(votes) = newest.map(|index| &votes[index]) else {
                continue;
            };
            if !votes.hold_quorum(chosen) {
                continue;
            }
            let donor = heard()
                .filter(|index| votes.members() >> index & 1 == 1)
                .max_by_key(|index| disks[*index].log.last());
            if let Some(donor) = donor {
                donors.entry(donor).or_insert(chosen);
            }
        }
        for (donor, chosen) in donors {
            self.check_has_all(&disks[donor].log, &format!("disks {chosen:#b}"));
        }
    }

    fn check_has_all(&self, log: &Log, who: &str) {
        assert!(
            log.base.lsn <= self.archive_lsn,
            "{who}: log begins above the archive"
        );
        for (lsn, entry) in self.committed.range(log.base.lsn.next()..) {
            assert_eq!(
                log.entries.get(lsn),
                Some(entry),
                "{who}: committed entry at lsn={lsn} is lost; the log ends at {}",
                log.last()
            );
        }
    }

    /// What a replica takes for committed is committed, and the ladder holds.
    pub fn check_replica(&self, disk: &Disk, replica: &Replica) {
        assert!(
            replica.archive_lsn() <= replica.commit_lsn()
                && replica.commit_lsn() <= replica.flush_lsn()
                && replica.flush_lsn() <= replica.last().lsn,
            "ladder: archive={} commit={} flush={} last={}",
            replica.archive_lsn(),
            replica.commit_lsn(),
            replica.flush_lsn(),
            replica.last()
        );
        let restarts = disk
            .unsynced
            .iter()
            .any(|record| matches!(record, Record::Restart(_)));
        if restarts || replica.trouble().is_some() {
            // The log that the disk still shows is already given up for the archive's, or the
            // record that gives it up was lost; a replica in trouble is made anew from its disk.
            return;
        }
        let commit_lsn = replica.commit_lsn();
        for (lsn, entry) in disk.log.entries.range(..=commit_lsn) {
            assert_eq!(
                self.committed.get(lsn),
                Some(entry),
                "a replica with commit_lsn={commit_lsn} has another entry at lsn={lsn}"
            );
        }
    }
}
