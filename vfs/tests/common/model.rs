//! A log in a file, shared by the processes of a test, with outcomes to order.

#![allow(clippy::unwrap_used, reason = "what fails in a test fails the test")]

use bytes::Bytes;
use durovfs_vfs::sink::{OpenedLog, Sink, SinkError, SinkErrorKind};
use durovfs_wire::checksum::VOLATILE_HEADER_RANGES;
use durovfs_wire::client::CommitOutcome;
use durovfs_wire::entry::{
    EntryPart, PartHeader, PartKind, PayloadBuilder, SlotPages, TransactionSummary,
};
use durovfs_wire::*;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// What becomes of a commit, when a test says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// As usual.
    None,
    /// Certainly not committed.
    Refuse,
    /// Nobody knows; it is not.
    UnknownLost,
    /// Nobody knows; it is.
    UnknownCommitted,
    /// Another host is the primary.
    NotPrimary,
    /// Committed, and the process is gone before it hears.
    CommitAndDie,
    /// The process is gone before it is sent.
    Die,
    /// Committed when the test lets it go, and not answered before.
    Wait,
}

#[derive(Debug, Clone)]
pub struct ModelTransaction {
    pub lsn: u64,
    pub commit: CommitHeader,
    pub pages: BTreeMap<u32, Vec<u8>>,
}

#[derive(Default)]
pub struct Log {
    pub entries: Vec<ModelTransaction>,
    pub image: BTreeMap<u32, Vec<u8>>,
    checksums: BTreeMap<u32, PageChecksum>,
    file_offset: u64,
}

#[derive(Default)]
struct State {
    logs: HashMap<DatabaseId, Log>,
    paths: HashMap<DatabaseId, PathBuf>,
    streams: HashMap<(DatabaseId, Origin), Vec<Bytes>>,
    faults: HashMap<DatabaseId, VecDeque<Fault>>,
    /// Outcomes of all further commits of a database, when no fault is queued.
    unreachable: HashMap<DatabaseId, bool>,
    /// Deferred commits of these databases wait for the test's word.
    held: HashMap<DatabaseId, Vec<(CommitHeader, Option<u64>, Bytes)>>,
    outcomes: HashMap<Origin, CommitOutcome>,
    resolve_unknown: HashMap<DatabaseId, bool>,
}

#[derive(Default)]
pub struct ModelSink {
    state: Mutex<State>,
    sequence: AtomicU64,
    pub streamed_parts: AtomicU64,
    pub aborts: AtomicU64,
    /// Whether a commit waits for the test.
    waiting: AtomicBool,
    after_open: Mutex<Option<Box<dyn FnOnce() + Send>>>,
    in_place_of_reading: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

pub fn id_of(name: &str) -> DatabaseId {
    let low = xxhash(name, 1).to_le_bytes();
    let high = xxhash(name, 2).to_le_bytes();
    let mut id = [0u8; 16];
    id[..8].copy_from_slice(&low);
    id[8..].copy_from_slice(&high);
    DatabaseId::from_bytes(id)
}

fn xxhash(name: &str, salt: u32) -> u64 {
    PageChecksum::of(PageNo::new(salt + 1).unwrap(), name.as_bytes()).as_u64()
}

const EPOCH: Epoch = Epoch::new(1);

impl ModelSink {
    /// Queues what becomes of the next commits.
    pub fn fault(&self, name: &str, faults: &[Fault]) {
        let mut state = self.state.lock().unwrap();
        state.faults.entry(id_of(name)).or_default().extend(faults);
    }

    /// What happens between the next answer to an open, and its being heard.
    pub fn after_open(&self, action: impl FnOnce() + Send + 'static) {
        *self.after_open.lock().unwrap() = Some(Box::new(action));
    }

    /// What happens when the log is read next; the reading fails after it.
    pub fn in_place_of_reading(&self, action: impl FnOnce() + Send + 'static) {
        *self.in_place_of_reading.lock().unwrap() = Some(Box::new(action));
    }

    /// Returns when a commit waits.
    pub fn wait_for_commit(&self) {
        while !self.waiting.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Lets the commit go that waits.
    pub fn let_go(&self) {
        assert!(
            self.waiting.swap(false, Ordering::SeqCst),
            "no commit waits"
        );
    }

    /// Takes back what was queued and not used.
    pub fn clear_faults(&self, name: &str) {
        self.state.lock().unwrap().faults.remove(&id_of(name));
    }

    /// Whether opening fails, and resolving finds no quorum.
    pub fn set_unreachable(&self, name: &str, unreachable: bool) {
        self.state
            .lock()
            .unwrap()
            .unreachable
            .insert(id_of(name), unreachable);
    }

    pub fn set_resolve_unknown(&self, name: &str, unknown: bool) {
        self.state
            .lock()
            .unwrap()
            .resolve_unknown
            .insert(id_of(name), unknown);
    }

    /// From now on deferred commits get no answer.
    pub fn hold(&self, name: &str) {
        self.state
            .lock()
            .unwrap()
            .held
            .entry(id_of(name))
            .or_default();
    }

    /// Answers the first `count` deferred commits that were held, and holds no more.
    pub fn release(&self, name: &str, count: usize) {
        let id = id_of(name);
        let held = self
            .state
            .lock()
            .unwrap()
            .held
            .remove(&id)
            .unwrap_or_default();
        for (at, (commit, after, payload)) in held.into_iter().enumerate() {
            let outcome = if at < count {
                self.append_after(id, commit, after, payload)
            } else {
                let reason = "no quorum".to_owned();
                CommitOutcome::NotCommitted { reason }
            };
            self.state
                .lock()
                .unwrap()
                .outcomes
                .insert(commit.origin, outcome);
        }
    }

    /// The held commits reach the log, and nobody hears of it.
    pub fn commit_held_silently(&self, name: &str) {
        let id = id_of(name);
        let held = std::mem::take(self.state.lock().unwrap().held.entry(id).or_default());
        for (commit, after, payload) in held {
            self.append_after(id, commit, after, payload);
        }
    }

    pub fn held(&self, name: &str) -> usize {
        self.state
            .lock()
            .unwrap()
            .held
            .get(&id_of(name))
            .map_or(0, Vec::len)
    }

    fn append_after(
        &self,
        id: DatabaseId,
        mut commit: CommitHeader,
        after: Option<u64>,
        payload: Bytes,
    ) -> CommitOutcome {
        if let Some(after) = after {
            let state = self.state.lock().unwrap();
            let last = state.logs[&id].entries.last().unwrap();
            let base = (last.commit.origin.client, last.commit.origin.sequence);
            assert_eq!(
                base,
                (commit.origin.client, after),
                "made on top of another commit"
            );
            commit.base_lsn = Lsn::new(last.lsn);
        }
        self.append(id, commit, &[payload])
    }

    pub fn last_lsn(&self, name: &str) -> u64 {
        self.with_log(name, |log| log.entries.last().map_or(0, |entry| entry.lsn))
    }

    pub fn with_log<R>(&self, name: &str, visit: impl FnOnce(&Log) -> R) -> R {
        let mut state = self.state.lock().unwrap();
        let id = id_of(name);
        let path = log_path(name);
        state.paths.insert(id, path.clone());
        let mut file = lock(&path);
        let log = state.logs.entry(id).or_default();
        log.catch_up(&mut file);
        visit(log)
    }

    /// A commit of another host, on top of what is there: sets these pages.
    pub fn commit_elsewhere(&self, name: &str, pages: &BTreeMap<u32, Vec<u8>>) {
        let (mut image, last) = self.with_log(name, |log| {
            (log.image.clone(), log.entries.last().unwrap().clone())
        });
        image.extend(pages.clone());
        let mut checksum = DatabaseChecksum::EMPTY;
        for (page, bytes) in &image {
            checksum.toggle(PageChecksum::of(PageNo::new(*page).unwrap(), bytes));
        }
        let origin = Origin {
            client: ClientId::from_bytes([0xee; 16]),
            sequence: last.lsn,
        };
        let commit = CommitHeader {
            origin,
            base_lsn: Lsn::new(last.lsn),
            slot_count: pages.len() as u32,
            checksum,
            whole_image: false,
            ..last.commit
        };
        let mut builder = PayloadBuilder::default();
        for (slot, (page, bytes)) in pages.iter().enumerate() {
            builder.push(slot as u32, PageNo::new(*page).unwrap(), bytes);
        }
        let outcome = self.append(id_of(name), commit, &[builder.take()]);
        assert!(
            matches!(outcome, CommitOutcome::Committed { .. }),
            "{outcome:?}"
        );
    }

    /// The database file `bytes` must be the log's image.
    pub fn compare(&self, name: &str, bytes: &[u8]) {
        self.with_log(name, |log| {
            let Some(last) = log.entries.last() else {
                assert_eq!(bytes.len(), 0, "content without a log");
                return;
            };
            let size = last.commit.page_size.get();
            assert_eq!(
                bytes.len(),
                size * last.commit.page_count as usize,
                "size of the file"
            );
            let free = free_pages(bytes, size);
            let lock_page = (0x4000_0000 / size + 1) as u32;
            let counts = |page: &u32| !free.contains(page) && *page != lock_page;
            for page in (1..=last.commit.page_count).filter(counts) {
                let image = log.image.get(&page);
                let image = image.unwrap_or_else(|| panic!("page {page} is not in the log"));
                let start = (page as usize - 1) * size;
                let mut local = bytes[start..start + size].to_vec();
                let mut logged = image.clone();
                if page == 1 {
                    for range in VOLATILE_HEADER_RANGES {
                        local[range.clone()].fill(0);
                        logged[range].fill(0);
                    }
                }
                assert!(local == logged, "page {page} differs at lsn {}", last.lsn);
            }
        });
    }

    fn append(&self, id: DatabaseId, commit: CommitHeader, payloads: &[Bytes]) -> CommitOutcome {
        let mut state = self.state.lock().unwrap();
        let path = state.paths[&id].clone();
        let mut file = lock(&path);
        let log = state.logs.entry(id).or_default();
        log.catch_up(&mut file);
        if let Some(last) = log.entries.last()
            && last.commit.origin == commit.origin
        {
            panic!("a commit was sent twice");
        }
        let last_lsn = log.entries.last().map_or(0, |entry| entry.lsn);
        if commit.base_lsn.get() != last_lsn {
            return CommitOutcome::Behind {
                last_transaction: log.summary().unwrap(),
            };
        }
        let mut slots: BTreeMap<u32, (u32, Vec<u8>)> = BTreeMap::new();
        for payload in payloads {
            for slot in SlotPages::parse(payload, Some(commit.page_size)).unwrap() {
                slots.insert(slot.slot, (slot.page_no.get(), slot.image.to_vec()));
            }
        }
        let counted = slots.range(..commit.slot_count);
        assert_eq!(
            counted.clone().count() as u32,
            commit.slot_count,
            "slots are missing"
        );
        let mut pages: BTreeMap<u32, Vec<u8>> = counted.map(|(_, page)| page.clone()).collect();
        pages.retain(|page, _| *page <= commit.page_count);
        let entry = ModelTransaction {
            lsn: last_lsn + 1,
            commit,
            pages,
        };
        log.check(&entry);
        let mut record = vec![0u8; 8];
        encode(&entry, &mut record);
        let length = record.len() as u64 - 8;
        record[..8].copy_from_slice(&length.to_le_bytes());
        file.seek(SeekFrom::End(0)).unwrap();
        file.write_all(&record).unwrap();
        log.catch_up(&mut file);
        CommitOutcome::Committed {
            position: LogPosition::new(EPOCH, Lsn::new(last_lsn + 1)),
        }
    }
}

/// Leaves of SQLite's list of free pages: a rollback in journal mode leaves other bytes there.
fn free_pages(bytes: &[u8], size: usize) -> Vec<u32> {
    let word = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap());
    let (mut free, mut trunk) = (Vec::new(), word(32) as usize);
    while trunk != 0 {
        let at = (trunk - 1) * size;
        free.extend((0..word(at + 4) as usize).map(|leaf| word(at + 8 + leaf * 4)));
        trunk = word(at) as usize;
    }
    free
}

fn log_path(name: &str) -> PathBuf {
    PathBuf::from(format!("{name}.model-log"))
}

fn lock(path: &std::path::Path) -> File {
    let mut options = OpenOptions::new();
    let file = options
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .unwrap();
    file.lock().unwrap();
    file
}

impl Log {
    fn summary(&self) -> Option<TransactionSummary> {
        self.entries.last().map(|entry| TransactionSummary {
            position: LogPosition::new(EPOCH, Lsn::new(entry.lsn)),
            commit: entry.commit,
        })
    }

    fn catch_up(&mut self, file: &mut File) {
        file.seek(SeekFrom::Start(self.file_offset)).unwrap();
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).unwrap();
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            let length = rest
                .get(..8)
                .map(|head| u64::from_le_bytes(head.try_into().unwrap()));
            let length = length.map_or(usize::MAX, |length| length as usize);
            if rest.len().saturating_sub(8) < length {
                // Its writer was killed in the middle of it: it was never acknowledged.
                file.set_len(self.file_offset).unwrap();
                break;
            }
            rest = &rest[8..];
            let entry = decode(&mut rest);
            self.file_offset += 8 + length as u64;
            self.apply(&entry);
            self.entries.push(entry);
        }
    }

    fn apply(&mut self, entry: &ModelTransaction) {
        self.checksums = self.checksums_after(entry);
        if entry.commit.whole_image {
            self.image.clear();
        }
        self.image.extend(entry.pages.clone());
        self.image
            .retain(|page, _| *page <= entry.commit.page_count);
    }

    fn checksums_after(&self, entry: &ModelTransaction) -> BTreeMap<u32, PageChecksum> {
        let mut checksums = self.checksums.clone();
        if entry.commit.whole_image {
            checksums.clear();
        }
        let of = |page: &u32, image: &[u8]| PageChecksum::of(PageNo::new(*page).unwrap(), image);
        checksums.extend(
            entry
                .pages
                .iter()
                .map(|(page, image)| (*page, of(page, image))),
        );
        checksums.retain(|page, _| *page <= entry.commit.page_count);
        checksums
    }

    /// The checksum that the shim computed must be that of the log's image after the entry.
    fn check(&self, entry: &ModelTransaction) {
        let mut checksum = DatabaseChecksum::EMPTY;
        self.checksums_after(entry)
            .values()
            .for_each(|page| checksum.toggle(*page));
        assert_eq!(
            checksum, entry.commit.checksum,
            "checksum of lsn {}",
            entry.lsn
        );
    }
}

fn encode(entry: &ModelTransaction, out: &mut Vec<u8>) {
    let commit = &entry.commit;
    for number in [
        entry.lsn,
        commit.origin.sequence,
        commit.base_lsn.get(),
        u64::from(u32::from(commit.page_size)),
        u64::from(commit.page_count),
        u64::from(commit.slot_count),
        commit.checksum.as_u64(),
        u64::from(commit.whole_image),
        entry.pages.len() as u64,
    ] {
        out.extend_from_slice(&number.to_le_bytes());
    }
    out.extend_from_slice(commit.origin.client.as_bytes());
    for (page, image) in &entry.pages {
        out.extend_from_slice(&page.to_le_bytes());
        out.extend_from_slice(image);
    }
}

fn take<'a>(rest: &mut &'a [u8], count: usize) -> &'a [u8] {
    let (head, tail) = rest.split_at(count);
    *rest = tail;
    head
}

fn decode(rest: &mut &[u8]) -> ModelTransaction {
    let mut numbers = [0u64; 9];
    for number in &mut numbers {
        *number = u64::from_le_bytes(take(rest, 8).try_into().unwrap());
    }
    let client = ClientId::from_bytes(take(rest, 16).try_into().unwrap());
    let page_size = PageSize::try_from(numbers[3] as u32).unwrap();
    let mut pages = BTreeMap::new();
    for _ in 0..numbers[8] {
        let page = u32::from_le_bytes(take(rest, 4).try_into().unwrap());
        pages.insert(page, take(rest, page_size.get()).to_vec());
    }
    let commit = CommitHeader {
        origin: Origin {
            client,
            sequence: numbers[1],
        },
        time: Timestamp::default(),
        base_lsn: Lsn::new(numbers[2]),
        page_size,
        page_count: numbers[4] as u32,
        slot_count: numbers[5] as u32,
        checksum: DatabaseChecksum::from_u64(numbers[6]),
        whole_image: numbers[7] != 0,
    };
    ModelTransaction {
        lsn: numbers[0],
        commit,
        pages,
    }
}

fn die() -> ! {
    // As kill -9: nothing is unwound, closed or flushed.
    std::process::abort()
}

impl Sink for ModelSink {
    fn open(
        &self,
        name: &str,
        _known: Option<DatabaseId>,
        _timeout: Option<Duration>,
    ) -> Result<OpenedLog, SinkError> {
        if self.state.lock().unwrap().unreachable.get(&id_of(name)) == Some(&true) {
            let message = "no sidecar".to_owned();
            return Err(SinkError {
                kind: SinkErrorKind::Unreachable,
                message,
            });
        }
        let opened = self.with_log(name, |log| OpenedLog {
            database: id_of(name),
            epoch: EPOCH,
            end: log
                .summary()
                .map_or(LogPosition::ZERO, |last| last.position),
            last_transaction: log.summary(),
        });
        let action = self.after_open.lock().unwrap().take();
        if let Some(action) = action {
            action();
        }
        Ok(opened)
    }

    fn next_origin(&self) -> Origin {
        let mut client = [7u8; 16];
        client[..4].copy_from_slice(&std::process::id().to_le_bytes());
        let sequence = self.sequence.fetch_add(1, Ordering::Relaxed) + 1;
        Origin {
            client: ClientId::from_bytes(client),
            sequence,
        }
    }

    fn send_pages(
        &self,
        database: DatabaseId,
        origin: Origin,
        page_size: PageSize,
        payload: Bytes,
    ) -> Result<(), SinkError> {
        SlotPages::parse(&payload, Some(page_size)).unwrap();
        self.streamed_parts.fetch_add(1, Ordering::Relaxed);
        let mut state = self.state.lock().unwrap();
        state
            .streams
            .entry((database, origin))
            .or_default()
            .push(payload);
        Ok(())
    }

    fn abort(&self, database: DatabaseId, origin: Origin) {
        self.aborts.fetch_add(1, Ordering::Relaxed);
        let removed = self
            .state
            .lock()
            .unwrap()
            .streams
            .remove(&(database, origin));
        assert!(removed.is_some(), "abort of what was not sent");
    }

    fn commit(
        &self,
        database: DatabaseId,
        commit: CommitHeader,
        payload: Bytes,
        _timeout: Option<Duration>,
    ) -> CommitOutcome {
        let (mut payloads, fault) = {
            let mut state = self.state.lock().unwrap();
            let fault = state
                .faults
                .get_mut(&database)
                .and_then(VecDeque::pop_front);
            let payloads = state
                .streams
                .remove(&(database, commit.origin))
                .unwrap_or_default();
            (payloads, fault.unwrap_or(Fault::None))
        };
        payloads.push(payload);
        let reason = format!("{fault:?}");
        match fault {
            Fault::None => self.append(database, commit, &payloads),
            Fault::Refuse => CommitOutcome::NotCommitted { reason },
            Fault::UnknownLost => CommitOutcome::Unknown { reason },
            Fault::UnknownCommitted => match self.append(database, commit, &payloads) {
                CommitOutcome::Committed { .. } => CommitOutcome::Unknown { reason },
                other => other,
            },
            Fault::NotPrimary => CommitOutcome::NotPrimary { reason },
            Fault::CommitAndDie => {
                self.append(database, commit, &payloads);
                die()
            }
            Fault::Die => die(),
            Fault::Wait => {
                self.waiting.store(true, Ordering::SeqCst);
                while self.waiting.load(Ordering::SeqCst) {
                    std::thread::sleep(Duration::from_millis(1));
                }
                self.append(database, commit, &payloads)
            }
        }
    }

    fn commit_deferred(
        &self,
        database: DatabaseId,
        commit: CommitHeader,
        after: Option<u64>,
        payload: Bytes,
        _timeout: Option<Duration>,
    ) -> Result<(), SinkError> {
        if let Some(held) = self.state.lock().unwrap().held.get_mut(&database) {
            held.push((commit, after, payload));
            return Ok(());
        }
        let outcome = self.append_after(database, commit, after, payload);
        self.state
            .lock()
            .unwrap()
            .outcomes
            .insert(commit.origin, outcome);
        Ok(())
    }

    fn is_own(&self, origin: Origin) -> bool {
        origin.client.as_bytes()[..4] == std::process::id().to_le_bytes()
    }

    fn take_deferred(&self, origin: Origin) -> Option<CommitOutcome> {
        self.state.lock().unwrap().outcomes.remove(&origin)
    }

    fn wait_deferred(&self, origin: Origin, until: Option<Instant>) {
        while !self.state.lock().unwrap().outcomes.contains_key(&origin)
            && until.is_none_or(|until| Instant::now() < until)
        {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn resolve(
        &self,
        database: DatabaseId,
        origin: Origin,
        base_lsn: Lsn,
        _timeout: Option<Duration>,
    ) -> CommitOutcome {
        let mut state = self.state.lock().unwrap();
        if state.resolve_unknown.get(&database) == Some(&true) {
            return CommitOutcome::Unknown {
                reason: "no quorum".into(),
            };
        }
        let path = state.paths[&database].clone();
        let mut file = lock(&path);
        let log = state.logs.entry(database).or_default();
        log.catch_up(&mut file);
        let found = log
            .entries
            .iter()
            .find(|entry| entry.commit.origin == origin);
        match found {
            Some(entry) => {
                assert!(entry.lsn > base_lsn.get());
                let position = LogPosition::new(EPOCH, Lsn::new(entry.lsn));
                CommitOutcome::Committed { position }
            }
            None => CommitOutcome::NotCommitted {
                reason: "not in the log".into(),
            },
        }
    }

    fn read_log(
        &self,
        database: DatabaseId,
        first_lsn: Lsn,
        visit: &mut dyn FnMut(EntryPart) -> Result<(), SinkError>,
    ) -> Result<(), SinkError> {
        let action = self.in_place_of_reading.lock().unwrap().take();
        if let Some(action) = action {
            action();
            return Err(SinkError {
                kind: SinkErrorKind::Unreachable,
                message: "the sidecar was restarted".to_owned(),
            });
        }
        let entries: Vec<ModelTransaction> = {
            let state = self.state.lock().unwrap();
            let log = &state.logs[&database];
            log.entries
                .iter()
                .filter(|e| e.lsn >= first_lsn.get())
                .cloned()
                .collect()
        };
        for entry in entries {
            let commit = CommitHeader {
                slot_count: entry.pages.len() as u32,
                ..entry.commit
            };
            let page_size = commit.page_size;
            let mut builder = PayloadBuilder::default();
            let mut part = 0;
            let header = |part, kind| PartHeader {
                database,
                epoch: EPOCH,
                lsn: Lsn::new(entry.lsn),
                part,
                kind,
            };
            for (slot, (page, image)) in entry.pages.iter().enumerate() {
                if !builder.has_room(page_size) {
                    let header = header(part, PartKind::Pages { page_size });
                    visit(EntryPart {
                        header,
                        payload: builder.take(),
                    })?;
                    part += 1;
                }
                builder.push(slot as u32, PageNo::new(*page).unwrap(), image);
            }
            let header = header(part, PartKind::Commit(commit));
            visit(EntryPart {
                header,
                payload: builder.take(),
            })?;
        }
        Ok(())
    }
}
