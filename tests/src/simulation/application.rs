//! Applications: each has a database of a few pages, changes some of them in each transaction, and
//! knows what it was told. Its file is a cache of the log: after anything that is not "committed"
//! it is brought to the log's end before the next transaction.

use super::World;
use super::checker::Image;
use super::commits::{Outcome, Request};
use super::database_id;
use super::schedule::Event;
use super::settings::{DATABASE_COUNT, HOST_COUNT};
use durovfs_wire::entry::{CommitHeader, Origin, PayloadBuilder};
use durovfs_wire::{ClientId, EntryPart, Lsn, PageNo, PageSize, Timestamp};
use std::collections::VecDeque;

/// Bytes of a page, the smallest that there are.
pub const PAGE_BYTES: usize = 512;
/// Pages of a database, at most.
const PAGE_COUNT: u64 = 8;
/// Commits that are under way at once, where they need not wait for each other.
const WINDOW: usize = 4;

/// An application.
#[derive(Debug)]
pub struct Application {
    client: ClientId,
    next_sequence: u64,
    image: Image,
    /// The last transaction that the image has.
    at: Lsn,
    opened: bool,
    pub wants_open: bool,
    in_flight: VecDeque<InFlight>,
    /// Commits whose outcome was not heard, oldest first.
    unresolved: VecDeque<(Origin, Lsn)>,
}

#[derive(Debug)]
struct InFlight {
    origin: Origin,
    base_lsn: Lsn,
    image: Image,
}

impl Application {
    fn new(client: ClientId) -> Self {
        Self {
            client,
            next_sequence: 1,
            image: Image::default(),
            at: Lsn::ZERO,
            opened: false,
            wants_open: false,
            in_flight: VecDeque::new(),
            unresolved: VecDeque::new(),
        }
    }

    /// It will never hear what became of these from whoever was asked.
    fn forget_answers(&mut self) {
        let open = self.in_flight.drain(..);
        self.unresolved
            .extend(open.map(|commit| (commit.origin, commit.base_lsn)));
        self.opened = false;
    }
}

impl World {
    pub(super) fn new_applications(&mut self) -> Vec<Vec<Application>> {
        let mut one = || Application::new(self.new_client());
        (0..HOST_COUNT)
            .map(|_| (0..DATABASE_COUNT).map(|_| one()).collect())
            .collect()
    }

    fn new_client(&mut self) -> ClientId {
        let (high, low) = (self.rng.next_number(), self.rng.next_number());
        ClientId::from_bytes((u128::from(high) << 64 | u128::from(low)).to_le_bytes())
    }

    /// An application does the next thing that it can.
    pub(super) fn application_acts(&mut self, host: usize, database: usize) {
        let after = 1_000 + self.rng.below(25_000);
        self.schedule
            .after(after, Event::Application { host, database });
        if !self.hosts[host].is_up() || !self.apps[host][database].wants_open {
            return;
        }
        self.ensure_serving(host, database);
        if let Some((origin, base_lsn)) = self.apps[host][database].unresolved.front().copied() {
            match self.resolve(host, database, origin, base_lsn) {
                None | Some(Outcome::Unknown) => self.claim_now(host, database),
                Some(Outcome::Behind) => {
                    // Nobody will be told what became of it: the file follows the log.
                    self.tally.untold += 1;
                    self.apps[host][database].unresolved.pop_front();
                }
                Some(outcome) => {
                    self.tally.resolved += 1;
                    self.answer(host, database, origin, outcome);
                }
            }
        } else if !self.apps[host][database].opened {
            self.open(host, database);
        } else {
            let application = &self.apps[host][database];
            let window = if self.settings.deferred { WINDOW } else { 1 };
            if application.in_flight.len() < window && !self.resting {
                self.make_commit(host, database);
            }
        }
    }

    /// Opening is: win the epoch, read the log's end, bring the local file to it.
    fn open(&mut self, host: usize, database: usize) {
        let Some(serving) = self.hosts[host].serving(database) else {
            return;
        };
        if !serving.is_open() || !serving.pending.is_empty() {
            return self.claim_now(host, database);
        }
        let end = serving.machine.commit_lsn().min(serving.written_lsn);
        let (epoch, last) = (serving.machine.epoch(), serving.last_transaction);
        let application = &self.apps[host][database];
        if last.is_some_and(|last| last.position.lsn > end) || !application.in_flight.is_empty() {
            return; // our own journal does not have it yet
        }
        let target = last.map_or(Lsn::ZERO, |last| last.position.lsn);
        let Some(image) = self.rolled_forward(host, database, target) else {
            return;
        };
        if let Some(last) = last {
            assert_eq!(
                image.checksum(),
                last.commit.checksum,
                "host {host} database {database}: opened at {} with another image",
                last.position
            );
        }
        self.checker.check_opened(database, (epoch, target), &image);
        let application = &mut self.apps[host][database];
        (application.image, application.at, application.opened) = (image, target, true);
    }

    /// The local image with all that it lacks, from the host's journal or from the archive.
    fn rolled_forward(&mut self, host: usize, database: usize, target: Lsn) -> Option<Image> {
        let application = &self.apps[host][database];
        if application.at > target {
            panic!(
                "host {host} database {database}: the file is at lsn {}, the log at {target}",
                application.at
            );
        }
        let (mut image, mut next) = (application.image.clone(), application.at.next());
        let running = self.hosts[host].up.as_ref()?;
        let first_held = running.journal.state(database_id(database))?.first_lsn;
        if next < first_held && next <= target {
            self.tally.hydrated_from_archive += 1;
            let through = target.min(first_held.previous()?);
            image.apply(self.checker.archived(database, next, through));
            next = through.next();
        }
        if next <= target {
            let parts = running.journal.parts(database_id(database), next, target);
            let parts: Vec<EntryPart> = parts.ok()?.collect::<Result<_, _>>().ok()?;
            image.apply(parts.iter());
        }
        Some(image)
    }

    fn make_commit(&mut self, host: usize, database: usize) {
        let timeout = 60_000 + self.rng.below(400_000);
        let pages = 1 + self.rng.below(3);
        let parts = if self.chance(12) { 3 } else { 1 };
        let changes: Vec<(u32, u8)> = (0..pages * parts)
            .map(|_| {
                let page = 1 + self.rng.below(PAGE_COUNT) as u32;
                (page, self.rng.below(256) as u8)
            })
            .collect();
        let application = &mut self.apps[host][database];
        let origin = Origin {
            client: application.client,
            sequence: application.next_sequence,
        };
        application.next_sequence += 1;
        let before = application.in_flight.back();
        let after = before.map(|before| before.origin.sequence);
        let mut image = before.map_or(&application.image, |b| &b.image).clone();
        let mut builder = PayloadBuilder::default();
        let mut payloads = Vec::new();
        for (slot, (page, value)) in (0..).zip(&changes) {
            let mut bytes = vec![*value; PAGE_BYTES];
            bytes[100..108].copy_from_slice(&origin.sequence.to_le_bytes());
            image.set(*page, bytes.clone());
            if let Some(page_no) = PageNo::new(*page) {
                builder.push(slot, page_no, &bytes);
            }
            if u64::from(slot + 1).is_multiple_of(pages) {
                payloads.push(builder.take());
            }
        }
        let Ok(page_size) = PageSize::try_from(PAGE_BYTES as u32) else {
            return;
        };
        let commit = CommitHeader {
            origin,
            time: Timestamp::from_micros(0),
            base_lsn: application.at,
            page_size,
            page_count: PAGE_COUNT as u32,
            slot_count: changes.len() as u32,
            checksum: image.checksum(),
            whole_image: false,
        };
        application.in_flight.push_back(InFlight {
            origin,
            base_lsn: application.at,
            image,
        });
        let request = Request {
            commit,
            payloads,
            after,
            timeout,
        };
        self.commit(host, database, request);
    }

    /// The sidecar says what became of a commit. The checkers hear all of it, whoever listens.
    pub(super) fn answer(&mut self, host: usize, database: usize, origin: Origin, said: Outcome) {
        let now = self.schedule.now;
        self.trace.say(now, || {
            format!("host {host} database {database}: {origin:?} {said:?}")
        });
        match said {
            Outcome::Committed(position) => {
                self.tally.acked += 1;
                self.checker.ack(database, origin, position);
            }
            Outcome::Unknown => self.tally.unknown += 1,
            Outcome::NotCommitted | Outcome::NotPrimary | Outcome::Behind => {
                self.tally.refused += 1;
                self.checker.refuse(database, origin);
            }
        }
        let application = &mut self.apps[host][database];
        if said != Outcome::Unknown {
            application.unresolved.retain(|(open, _)| *open != origin);
        }
        let found = application
            .in_flight
            .iter()
            .position(|commit| commit.origin == origin);
        let Some(commit) = found.and_then(|index| application.in_flight.remove(index)) else {
            // Heard of later: the file follows the log.
            application.opened &= !matches!(said, Outcome::Committed(_));
            return;
        };
        match said {
            Outcome::Committed(position) if application.opened => {
                application.image = commit.image;
                application.at = position.lsn;
            }
            Outcome::Unknown => {
                application.unresolved.push_back((origin, commit.base_lsn));
                application.opened = false;
            }
            _ => application.opened = false,
        }
    }

    /// The sidecar died, and perhaps the application with it.
    pub(super) fn sidecar_gone(&mut self, host: usize, database: usize, power: bool) {
        let client = self.new_client();
        let loses_file = power && self.chance(30);
        let application = &mut self.apps[host][database];
        application.forget_answers();
        if power {
            application.client = client;
        }
        if loses_file {
            (application.image, application.at) = (Image::default(), Lsn::ZERO);
        }
    }

    /// The application dies, or its connection to the sidecar breaks.
    pub(super) fn application_fails(&mut self, host: usize, database: usize, dies: bool) {
        let client = self.new_client();
        let application = &mut self.apps[host][database];
        application.forget_answers();
        if dies {
            application.client = client;
        }
    }
}
