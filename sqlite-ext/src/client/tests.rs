//! The client against a fake sidecar, over real QUIC: what a commit is told when something breaks.

mod fake;

use super::Client;
use bytes::Bytes;
use durovfs_link::authority;
use durovfs_vfs::sink::{Sink, SinkError, SinkErrorKind};
use durovfs_wire::checksum::DatabaseChecksum;
use durovfs_wire::client::CommitOutcome;
use durovfs_wire::entry::{CommitHeader, Origin};
use durovfs_wire::position::Timestamp;
use durovfs_wire::{DatabaseId, Lsn, PageSize};
use fake::{FakeSidecar, Heard, Mode, database_of};
use std::time::{Duration, Instant};

/// Longer than anything here takes on a busy machine.
const PATIENT: Option<Duration> = Some(Duration::from_secs(15));
/// For what is not answered: the shorter, the sooner the test is over.
const BRIEF: Option<Duration> = Some(Duration::from_millis(800));

fn client(sidecar: &FakeSidecar) -> Client {
    Client::new(sidecar.config(), "test".to_owned())
}

fn opened(client: &Client, name: &str) -> DatabaseId {
    let log = client.open(name, None, PATIENT).unwrap();
    assert_eq!(log.database, database_of(name));
    log.database
}

fn page_size() -> PageSize {
    PageSize::try_from(4096).unwrap()
}

fn header(origin: Origin) -> CommitHeader {
    CommitHeader {
        origin,
        time: Timestamp::from_micros(0),
        base_lsn: Lsn::new(1),
        page_size: page_size(),
        page_count: 1,
        slot_count: 1,
        checksum: DatabaseChecksum::default(),
        whole_image: false,
    }
}

fn commit(client: &Client, database: DatabaseId, timeout: Option<Duration>) -> CommitOutcome {
    commit_of(client, database, 4104, timeout)
}

fn commit_of(
    client: &Client,
    database: DatabaseId,
    bytes: usize,
    timeout: Option<Duration>,
) -> CommitOutcome {
    let origin = client.next_origin();
    client.commit(
        database,
        header(origin),
        Bytes::from(vec![7; bytes]),
        timeout,
    )
}

fn is_committed(outcome: &CommitOutcome) -> bool {
    matches!(outcome, CommitOutcome::Committed { .. })
}

fn is_commit(heard: Heard) -> bool {
    matches!(heard, Heard::Commit(_))
}

fn is_resolve(heard: Heard) -> bool {
    matches!(heard, Heard::Resolve(_))
}

#[test]
fn many_threads_and_databases_commit_over_one_connection() {
    // Broken if not: every application with more than one thread.
    let sidecar = FakeSidecar::start();
    let client = client(&sidecar);
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let client = &client;
            scope.spawn(move || {
                let database = opened(client, &format!("db{thread}"));
                for number in 0..50 {
                    // Some on the shared stream, some large enough for one of their own.
                    let bytes = if number % 10 == 9 { 900_000 } else { 4104 };
                    let outcome = commit_of(client, database, bytes, PATIENT);
                    assert!(is_committed(&outcome), "{outcome:?}");
                }
            });
        }
    });
    assert_eq!(sidecar.state().committed.len(), 400);
    assert_eq!(sidecar.state().clients.len(), 1);
}

#[test]
fn a_commit_whose_answer_was_lost_is_found_committed_and_not_sent_again() {
    // Broken if not: after a restart of the sidecar an application is told "not committed" of what
    // is in the log, or has it there twice.
    let mut sidecar = FakeSidecar::start();
    let client = client(&sidecar);
    let database = opened(&client, "app");
    for bytes in [4104, 900_000] {
        sidecar.set_mode(Mode::CommitAndDie);
        let before = sidecar.state().heard.len();
        let outcome = std::thread::scope(|scope| {
            let waiting = scope.spawn(|| commit_of(&client, database, bytes, PATIENT));
            sidecar.await_death();
            sidecar.set_mode(Mode::Answer);
            sidecar.run();
            waiting.join().unwrap()
        });
        assert!(is_committed(&outcome), "{outcome:?}");
        let heard: Vec<_> = sidecar.state().heard[before..].to_vec();
        let kinds: Vec<_> = heard.iter().map(|(_, heard)| *heard).collect();
        let Heard::Commit(sequence) = kinds[0] else {
            panic!("{heard:?}")
        };
        // The new sidecar knows nothing: it is told to open the database before it is asked.
        assert_eq!(
            kinds[1..],
            [Heard::Open, Heard::Resolve(sequence)],
            "{heard:?}"
        );
        assert_eq!(heard[1].0, heard[0].0 + 1);
    }
    assert!(is_committed(&commit(&client, database, PATIENT)));
}

#[test]
fn a_commit_that_the_log_cannot_tell_of_any_more_is_unknown() {
    // Broken if not: a commit that is in the log is told to be certainly not committed, when its
    // answer was lost and the log has gone on, and dropped it, before it was asked for.
    let mut sidecar = FakeSidecar::start();
    let client = client(&sidecar);
    let database = opened(&client, "app");
    sidecar.set_mode(Mode::CommitAndDie);
    let outcome = std::thread::scope(|scope| {
        let waiting = scope.spawn(|| commit(&client, database, PATIENT));
        sidecar.await_death();
        sidecar.set_mode(Mode::Forgetful);
        sidecar.run();
        waiting.join().unwrap()
    });
    assert!(
        matches!(outcome, CommitOutcome::Unknown { .. }),
        "{outcome:?}"
    );
}

#[test]
fn a_commit_that_was_lost_with_the_sidecar_is_certainly_not_committed() {
    // Broken if not: the application hears "unknown" where "not committed" is certain, or the
    // commit is sent a second time on its own.
    let mut sidecar = FakeSidecar::start();
    let client = client(&sidecar);
    let database = opened(&client, "app");
    sidecar.set_mode(Mode::LoseAndDie);
    let outcome = std::thread::scope(|scope| {
        let waiting = scope.spawn(|| commit(&client, database, PATIENT));
        sidecar.await_death();
        sidecar.set_mode(Mode::Answer);
        sidecar.run();
        waiting.join().unwrap()
    });
    assert!(
        matches!(outcome, CommitOutcome::NotCommitted { .. }),
        "{outcome:?}"
    );
    assert_eq!(sidecar.count(is_commit), 1);
    assert_eq!(sidecar.count(is_resolve), 1);
    assert!(is_committed(&commit(&client, database, PATIENT)));
}

#[test]
fn without_a_sidecar_a_commit_is_certainly_not_committed_and_is_never_sent_later() {
    // Broken if not: rows of a refused commit appear when the sidecar comes up.
    let mut sidecar = FakeSidecar::prepare();
    let client = client(&sidecar);
    let database = database_of("app");
    let started = Instant::now();
    for bytes in [4104, 900_000] {
        let outcome = commit_of(&client, database, bytes, BRIEF);
        let CommitOutcome::NotCommitted { reason } = outcome else {
            panic!("{outcome:?}")
        };
        assert!(reason.contains("primary at 127.0.0.1"), "{reason}");
    }
    assert!(started.elapsed() < 10 * BRIEF.unwrap());
    sidecar.run();
    let database = opened(&client, "app");
    assert!(is_committed(&commit(&client, database, PATIENT)));
    assert_eq!(sidecar.count(is_commit), 1);
}

#[test]
fn a_commit_that_nobody_answers_is_unknown_until_it_is_resolved() {
    // Broken if not: "unknown" is turned into another outcome, which may be the wrong one.
    let sidecar = FakeSidecar::start();
    let client = client(&sidecar);
    let database = opened(&client, "app");
    sidecar.set_mode(Mode::Silent);
    for bytes in [4104, 900_000] {
        let origin = client.next_origin();
        let payload = Bytes::from(vec![7; bytes]);
        let started = Instant::now();
        let outcome = client.commit(database, header(origin), payload, BRIEF);
        assert!(
            matches!(outcome, CommitOutcome::Unknown { .. }),
            "{outcome:?}"
        );
        assert!(started.elapsed() >= BRIEF.unwrap() && started.elapsed() < 6 * BRIEF.unwrap());
        let outcome = client.resolve(database, origin, Lsn::new(1), PATIENT);
        assert!(
            matches!(outcome, CommitOutcome::NotCommitted { .. }),
            "{outcome:?}"
        );
    }
}

#[test]
fn a_commit_taken_by_a_sidecar_that_died_is_unknown_when_the_time_is_over() {
    // Broken if not: a crash of the sidecar is taken for a refusal.
    let mut sidecar = FakeSidecar::start();
    let client = client(&sidecar);
    let database = opened(&client, "app");
    sidecar.set_mode(Mode::CommitAndDie);
    let origin = client.next_origin();
    let outcome = client.commit(database, header(origin), Bytes::from(vec![7; 4104]), BRIEF);
    assert!(
        matches!(outcome, CommitOutcome::Unknown { .. }),
        "{outcome:?}"
    );
    let outcome = client.resolve(database, origin, Lsn::new(1), BRIEF);
    assert!(
        matches!(outcome, CommitOutcome::Unknown { .. }),
        "{outcome:?}"
    );
    sidecar.await_death();
    sidecar.run();
    let outcome = client.resolve(database, origin, Lsn::new(1), PATIENT);
    assert!(is_committed(&outcome), "{outcome:?}");
}

#[test]
fn progress_gives_a_large_commit_its_time_again() {
    // Broken if not: a transaction of a gigabyte fails after ten seconds.
    let sidecar = FakeSidecar::start();
    let client = client(&sidecar);
    let database = opened(&client, "app");
    sidecar.set_mode(Mode::Progress(500));
    let started = Instant::now();
    let outcome = commit(&client, database, BRIEF);
    assert!(is_committed(&outcome), "{outcome:?}");
    assert!(started.elapsed() > 2 * BRIEF.unwrap());
}

#[test]
fn a_streamed_transaction_arrives_with_all_its_parts() {
    // Broken if not: transactions larger than memory.
    let sidecar = FakeSidecar::start();
    let client = client(&sidecar);
    let database = opened(&client, "app");
    let part = Bytes::from(vec![1; 1 << 20]);
    let origin = client.next_origin();
    for _ in 0..40 {
        client
            .send_pages(database, origin, page_size(), part.clone())
            .unwrap();
    }
    let outcome = client.commit(database, header(origin), Bytes::new(), PATIENT);
    assert!(is_committed(&outcome), "{outcome:?}");

    let given_up = client.next_origin();
    client
        .send_pages(database, given_up, page_size(), part)
        .unwrap();
    client.abort(database, given_up);
    let aborted = Heard::Abort(given_up.sequence);
    let started = Instant::now();
    while sidecar.count(|heard| heard == aborted) == 0 {
        assert!(
            started.elapsed() < PATIENT.unwrap(),
            "the abort was not heard"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(sidecar.state().committed.len(), 1);
}

#[test]
fn a_streamed_transaction_that_lost_its_parts_is_certainly_not_committed() {
    // Broken if not: half a transaction is committed after a restart of the sidecar.
    let mut sidecar = FakeSidecar::start();
    let client = client(&sidecar);
    let database = opened(&client, "app");
    let origin = client.next_origin();
    let part = Bytes::from(vec![1; 1 << 16]);
    client
        .send_pages(database, origin, page_size(), part.clone())
        .unwrap();
    sidecar.kill();
    sidecar.run();
    // The next commit goes to the connection that is gone, which cannot be known before.
    let outcome = commit(&client, database, PATIENT);
    assert!(
        matches!(outcome, CommitOutcome::NotCommitted { .. }),
        "{outcome:?}"
    );
    assert!(is_committed(&commit(&client, database, PATIENT)));
    assert!(
        client
            .send_pages(database, origin, page_size(), part)
            .is_err()
    );
    let outcome = client.commit(database, header(origin), Bytes::new(), PATIENT);
    assert!(
        matches!(outcome, CommitOutcome::NotCommitted { .. }),
        "{outcome:?}"
    );
    assert_eq!(
        sidecar.count(|heard| heard == Heard::Commit(origin.sequence)),
        0
    );
}

#[test]
fn a_commit_whose_stream_broke_is_asked_for_on_the_shared_one() {
    // Broken if not: a large commit waits in vain while the connection stands.
    let sidecar = FakeSidecar::start();
    let client = client(&sidecar);
    let database = opened(&client, "app");
    sidecar.set_mode(Mode::CommitAndResetStream);
    let outcome = commit_of(&client, database, 900_000, PATIENT);
    assert!(is_committed(&outcome), "{outcome:?}");
    assert_eq!(
        (sidecar.count(is_commit), sidecar.count(is_resolve)),
        (1, 1)
    );
}

#[test]
fn a_log_is_read_to_its_end_or_until_the_reader_stops() {
    // Broken if not: a local file that is behind cannot be brought forward.
    let sidecar = FakeSidecar::start();
    sidecar.state().log_entries = 500;
    let client = client(&sidecar);
    let database = opened(&client, "app");
    let mut lsns = Vec::new();
    client
        .read_log(database, Lsn::new(3), &mut |part| {
            lsns.push(part.header.lsn.get());
            Ok(())
        })
        .unwrap();
    assert_eq!(lsns, (3..=500).collect::<Vec<_>>());
    let stop = SinkError {
        kind: SinkErrorKind::Stopped,
        message: "enough".to_owned(),
    };
    let stopped = client.read_log(database, Lsn::new(1), &mut |part| {
        if part.header.lsn.get() == 5 {
            Err(stop.clone())
        } else {
            Ok(())
        }
    });
    assert_eq!(stopped, Err(stop.clone()));
    assert!(is_committed(&commit(&client, database, PATIENT)));
}

#[test]
fn a_certificate_of_another_cluster_fails_at_once_with_one_line() {
    // Broken if not: someone with the wrong files waits, and is not told why.
    let sidecar = FakeSidecar::start();
    let config = sidecar.config();
    let foreign = authority::create()
        .unwrap()
        .issue_client("app", &["**".to_owned()])
        .unwrap();
    foreign.write(&config.certificate, &config.key).unwrap();
    let client = Client::new(config, "test".to_owned());
    let started = Instant::now();
    let error = client.open("app", None, PATIENT).unwrap_err();
    assert_eq!(error.kind, SinkErrorKind::Unreachable);
    assert!(error.message.contains("refused by"), "{}", error.message);
    assert!(!error.message.contains('\n'));
    let outcome = commit(&client, database_of("app"), PATIENT);
    assert!(
        matches!(outcome, CommitOutcome::NotCommitted { .. }),
        "{outcome:?}"
    );
    assert!(started.elapsed() < PATIENT.unwrap() / 2);
}

/// Numbers that look random and come again with the same seed (xorshift).
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

fn seed() -> u64 {
    let given = std::env::var("DUROVFS_SEED")
        .ok()
        .map(|text| text.parse().unwrap());
    let seed = given.unwrap_or_else(|| u64::from(std::process::id()) * 2_654_435_761 + 1);
    println!("DUROVFS_SEED={seed}");
    seed
}

/// Commits once in a random way; what was unknown is asked for until it is known.
fn commit_somehow(client: &Client, dice: &mut Dice, database: DatabaseId) -> (Origin, bool) {
    let origin = client.next_origin();
    let size = [4_104, 40_000, 900_000][dice.below(3) as usize];
    let payload = Bytes::from(vec![1; size]);
    if dice.below(4) == 0
        && client
            .send_pages(database, origin, page_size(), payload.clone())
            .is_err()
    {
        client.abort(database, origin);
        return (origin, false);
    }
    let timeout = Some(Duration::from_millis(100 + dice.below(900)));
    let mut outcome = client.commit(database, header(origin), payload, timeout);
    while let CommitOutcome::Unknown { .. } = outcome {
        outcome = client.resolve(database, origin, Lsn::new(1), timeout);
    }
    (origin, is_committed(&outcome))
}

#[test]
fn no_commit_is_lost_or_brought_to_life_whatever_breaks() {
    // Broken if not: what an application was told of a commit and what is in the log differ. The
    // sidecar dies, forgets, says nothing, and gives up streams at random; it panics by itself when
    // a commit is sent twice.
    let mut dice = Dice(seed());
    let mut sidecar = FakeSidecar::start();
    let client = client(&sidecar);
    let modes = [
        Mode::Answer,
        Mode::Answer,
        Mode::CommitAndDie,
        Mode::LoseAndDie,
        Mode::Silent,
        Mode::CommitAndResetStream,
        Mode::Progress(20),
    ];
    let told = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..3)
            .map(|worker| {
                let (client, mut dice) = (&client, Dice(dice.below(u64::MAX) + 1));
                scope.spawn(move || {
                    let database = opened(client, &format!("db{worker}"));
                    let commits = 0..25;
                    commits
                        .map(|_| commit_somehow(client, &mut dice, database))
                        .collect::<Vec<_>>()
                })
            })
            .collect();
        while !workers.iter().all(|worker| worker.is_finished()) {
            sidecar.set_mode(modes[dice.below(modes.len() as u64) as usize]);
            std::thread::sleep(Duration::from_millis(dice.below(80)));
            if sidecar.has_died() {
                sidecar.await_death();
                sidecar.run();
            } else if dice.below(10) == 0 {
                sidecar.kill();
                sidecar.run();
            }
        }
        workers
            .into_iter()
            .flat_map(|worker| worker.join().unwrap())
            .collect::<Vec<_>>()
    });
    let committed = &sidecar.state().committed;
    let in_log = told.iter().filter(|(_, was_told)| *was_told).count();
    assert!(
        in_log > 0 && in_log < told.len(),
        "{in_log} of {}: nothing was tried",
        told.len()
    );
    for (origin, was_told) in &told {
        assert_eq!(committed.contains_key(origin), *was_told, "{origin:?}");
    }
    assert_eq!(committed.len(), in_log);
}

#[test]
fn a_child_after_a_fork_commits_under_an_id_of_its_own() {
    // Broken if not: a pre-forking server hangs, or two processes commit under one id.
    let sidecar = FakeSidecar::start();
    let client = client(&sidecar);
    let database = opened(&client, "app");
    assert!(is_committed(&commit(&client, database, PATIENT)));
    let inherited = client.next_origin();
    // SAFETY: the child uses only what this test shows to work after a fork, and leaves by _exit.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let works = client.open("app", None, PATIENT).is_ok()
            && is_committed(&commit(&client, database, PATIENT))
            && !is_committed(&client.commit(database, header(inherited), Bytes::new(), PATIENT));
        // SAFETY: ends the child without running the harness's exit handlers.
        unsafe { libc::_exit(i32::from(!works)) };
    }
    let mut status = 0;
    // SAFETY: waits for the child made above.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    assert_eq!(status, 0, "the child failed");
    assert_eq!(sidecar.state().clients.len(), 2);
    assert!(is_committed(&commit(&client, database, PATIENT)));
}
