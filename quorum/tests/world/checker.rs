//! What must hold over all nodes at once, each check with the sentence that it proves.

use super::disk::{Disk, Entry, Log, Record};
use durovfs_quorum::Replica;
use durovfs_wire::{LogPosition, Lsn};
use std::collections::{BTreeMap, BTreeSet};

/// What was ever told to be committed, archived or buried.
#[derive(Debug, Default)]
pub struct Checker {
    pub committed: BTreeMap<Lsn, Entry>,
    pub archive_lsn: Lsn,
    pub buried: BTreeSet<(LogPosition, u64)>,
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

    /// Whichever three disks survive, the log that recovery would choose from them has every
    /// committed entry.
    pub fn check_nothing_lost(&self, disks: &[&Disk]) {
        for a in 0..disks.len() {
            for b in a + 1..disks.len() {
                for c in b + 1..disks.len() {
                    let three = [disks[a], disks[b], disks[c]];
                    if let Some(donor) = three.into_iter().max_by_key(|disk| disk.log.last()) {
                        self.check_has_all(&donor.log, &format!("disks {a} {b} {c}"));
                    }
                }
            }
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
