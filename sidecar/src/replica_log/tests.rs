//! The order of disk and wire, on a journal in memory that is driven by hand.

use super::*;
use bytes::Bytes;
use durovfs_journal::disk::memory::MemoryDisk;
use durovfs_journal::{JournalDriver, JournalOptions};
use durovfs_wire::{ClaimantId, Member, PartHeader, PartKind, Timestamp};
use std::sync::Mutex;

struct Bench {
    disk: MemoryDisk,
    driver: JournalDriver,
    log: ReplicaLog,
    notices: Notices,
}

fn database() -> DatabaseId {
    DatabaseId::from_bytes([7; 16])
}

fn primary() -> NodeName {
    "a".parse().unwrap()
}

type Notices = Arc<Mutex<Vec<Notice>>>;

fn open(disk: &MemoryDisk) -> (Journal, JournalDriver, Notices, NoticeSink) {
    let options = JournalOptions {
        segment_bytes: 64 << 10,
        limit_bytes: 1 << 20,
        ..JournalOptions::new("unused", true)
    };
    let (journal, driver, _) = Journal::open_driven(Arc::new(disk.clone()), &options).unwrap();
    let notices = Notices::default();
    let seen = notices.clone();
    let sink: NoticeSink = Arc::new(move |notice| seen.lock().unwrap().push(notice));
    (journal, driver, notices, sink)
}

impl Bench {
    fn new() -> Self {
        let disk = MemoryDisk::default();
        let (journal, driver, notices, sink) = open(&disk);
        let log = ReplicaLog::unheard_of(journal, sink, database(), ReplicaId::from_bytes([5; 16]));
        Self {
            disk,
            driver,
            log,
            notices,
        }
    }

    /// Gives the messages that a claim causes at once.
    fn claim(&mut self, epoch: u32) -> Vec<ReplicaMessage> {
        let claim = Claim {
            database: database(),
            name: "db".to_owned(),
            epoch: Epoch::new(epoch),
            claimant: ClaimantId::from_bytes([epoch as u8; 16]),
            forced: false,
        };
        self.log.handle_claim(&primary(), &claim);
        self.messages()
    }

    /// The primary tells its members, and that is on disk.
    fn tell_members(&mut self, epoch: u32) {
        let member = Member::configured("replica".parse().unwrap(), String::new());
        let membership = Membership {
            epoch: Epoch::new(epoch),
            ..Membership::configured(vec![member], 1).unwrap()
        };
        self.log.handle_members(membership).unwrap();
        assert_eq!(self.messages(), []);
        self.driver.write_waiting();
        assert_eq!(self.hear(), []);
    }

    fn append_start(&mut self, epoch: u32, lsn: u64) -> Vec<ReplicaMessage> {
        self.tell_members(epoch);
        self.append(epoch, lsn).unwrap();
        self.messages()
    }

    fn append(&mut self, epoch: u32, lsn: u64) -> Result<(), AppendRefused> {
        let context = AppendContext {
            generation: 1,
            epoch: Epoch::new(epoch),
            previous: self.log.machine().last(),
            commit_lsn: Lsn::ZERO,
            archive_lsn: Lsn::ZERO,
        };
        let header = PartHeader {
            database: database(),
            epoch: Epoch::new(epoch),
            lsn: Lsn::new(lsn),
            part: 0,
            kind: PartKind::EpochStart {
                time: Timestamp::from_micros(0),
                last_transaction: None,
            },
        };
        let payload = Bytes::new();
        self.log
            .handle_append(context, EntryPart { header, payload }, ())
    }

    /// The process ends, and another one reads the journal.
    fn restart(&mut self) {
        let (journal, driver, notices, sink) = open(&self.disk);
        let state = journal.state(database()).unwrap();
        self.log = ReplicaLog::from_journal(journal, sink, &state, ReplicaId::from_bytes([6; 16]));
        (self.driver, self.notices) = (driver, notices);
    }

    fn messages(&mut self) -> Vec<ReplicaMessage> {
        std::iter::from_fn(|| self.log.poll_message())
            .map(|(_, message)| message)
            .collect()
    }

    /// Hears the oldest notice; gives the messages that it causes.
    fn hear(&mut self) -> Vec<ReplicaMessage> {
        let notice = self.notices.lock().unwrap().remove(0);
        let failed = self.log.handle_notice(notice);
        let messages = self.messages();
        if failed.is_some() {
            self.log.recover_from_trouble();
        }
        messages
    }
}

// If this failed, a primary could count a promise or an entry that a power cut takes back.
#[test]
fn nothing_is_told_before_it_is_on_disk() {
    let mut bench = Bench::new();
    assert_eq!(bench.claim(1), []);
    bench.driver.write_waiting();
    assert!(matches!(
        bench.hear()[..],
        [ReplicaMessage::Promised { .. }]
    ));
    assert_eq!(bench.append_start(1, 1), []);
    bench.driver.write_waiting();
    assert!(matches!(bench.hear()[..], [ReplicaMessage::Ack { .. }]));
}

// If this failed, a primary that lost its epoch could still commit with this replica's ack.
#[test]
fn an_older_epochs_entries_are_refused_from_the_claim_on_and_after_a_restart() {
    let is_fenced = |refused: Result<(), AppendRefused>| {
        let Err(AppendRefused::Rejected(RejectReason::Fenced { promised })) = refused else {
            return false;
        };
        promised == Epoch::new(2)
    };
    let mut bench = Bench::new();
    bench.claim(1);
    bench.driver.write_waiting();
    bench.hear();
    bench.append_start(1, 1);
    bench.driver.write_waiting();
    bench.hear();
    // The newer promise is on its way to the disk, then on it.
    assert_eq!(bench.claim(2), []);
    assert!(is_fenced(bench.append(1, 2)));
    bench.driver.write_waiting();
    bench.hear();
    assert!(is_fenced(bench.append(1, 2)));
    bench.restart();
    assert!(is_fenced(bench.append(1, 2)));
    assert!(matches!(
        bench.claim(1)[..],
        [ReplicaMessage::Rejected { .. }]
    ));
    assert_eq!(bench.log.machine().last().lsn, Lsn::new(1));
}

// If this failed, the notice of a promise that an earlier machine wanted would be taken for one
// that is still on its way to the disk: it would be told, lost with the power, and broken.
#[test]
fn a_notice_for_an_earlier_machine_is_not_taken_for_this_ones() {
    let mut bench = Bench::new();
    bench.claim(1);
    bench.driver.write_waiting();
    bench.hear();
    bench.append_start(1, 1);
    bench.disk.fail_after(0);
    bench.driver.write_waiting();
    // Before the failure is heard of, the machine's second promise goes to the journal.
    assert_eq!(bench.claim(2), []);
    assert_eq!(bench.hear().len(), 2);
    bench.driver.write_waiting();
    // The next machine's second promise is on its way when the notice of that one comes.
    assert_eq!(bench.claim(3), []);
    assert!(matches!(
        bench.claim(4)[..],
        [ReplicaMessage::Rejected { .. }]
    ));
    assert_eq!(bench.hear(), []);
    bench.driver.write_waiting();
    assert_eq!(bench.hear(), []);
    let told = bench.hear();
    assert!(
        matches!(&told[..], [ReplicaMessage::Promised(promise)] if promise.epoch == Epoch::new(4)),
        "{told:?}"
    );
}

fn unreadable() -> JournalError {
    JournalError::Damaged {
        segment: "journal-0000000000000001.seg".to_owned(),
        offset: 4096,
        detail: "record checksum mismatch".to_owned(),
    }
}

/// Epochs 1 and 2, each with its start on disk and acked.
fn two_entries() -> Bench {
    let mut bench = Bench::new();
    for number in [1, 2] {
        bench.claim(number);
        bench.driver.write_waiting();
        bench.hear();
        bench.append_start(number, u64::from(number));
        bench.driver.write_waiting();
        bench.hear();
    }
    bench
}

fn refused(messages: &[ReplicaMessage]) -> bool {
    let storage = |message: &ReplicaMessage| {
        let ReplicaMessage::Rejected { reason, .. } = message else {
            return false;
        };
        matches!(reason, RejectReason::Storage { .. })
    };
    !messages.is_empty() && messages.iter().all(storage)
}

// If this failed, a replica would vote with a log that lacks what it acked, or never again.
#[test]
fn after_damage_the_promise_is_no_vote_until_the_log_is_fed_again() {
    let mut bench = two_entries();
    bench.log.handle_damage(Lsn::new(2), unreadable());
    assert!(refused(&bench.messages()));
    assert!(refused(&bench.claim(3)), "the journal has not noted it yet");
    bench.driver.write_waiting();
    bench.hear();
    bench.claim(3);
    bench.driver.write_waiting();
    let told = bench.hear();
    let [ReplicaMessage::Promised(promise)] = &told[..] else {
        panic!("{told:?}")
    };
    assert!(
        promise.mending && promise.last.lsn == Lsn::new(1),
        "{promise:?}"
    );
    bench.log.handle_mend(Epoch::new(3), Lsn::new(2));
    bench.append_start(3, 2);
    assert!(bench.log.machine().is_mending());
    bench.driver.write_waiting();
    assert!(matches!(bench.hear()[..], [ReplicaMessage::Ack { .. }]));
    assert!(!bench.log.machine().is_mending());
    bench.driver.write_waiting();
    let state = bench.log.journal.state(database()).unwrap();
    assert!(!state.mending, "the journal does not know that it is whole");
}

// If this failed, a replica would go on with entries that its journal has cut off.
#[test]
fn damage_counts_whichever_machine_heard_of_it() {
    let mut bench = two_entries();
    bench.claim(3);
    bench.driver.write_waiting();
    bench.hear();
    bench.append_start(3, 3);
    bench.disk.fail_after(0);
    bench.driver.write_waiting();
    bench.log.handle_damage(Lsn::new(1), unreadable());
    bench.messages();
    // The part that failed makes a new machine; the damage is still on its way.
    bench.hear();
    assert!(refused(&bench.claim(4)));
    bench.driver.write_waiting();
    bench.hear();
    assert_eq!(bench.log.machine().last(), LogPosition::ZERO);
    assert!(bench.log.machine().is_mending());
    assert_eq!(bench.log.machine().promised(), Epoch::new(3));
}
