//! The thread that keeps the warm copies of a node: one copy after the other, a slice of its log at
//! a time, from our journal, and what that has dropped from the archive.

use super::{Board, Followed, Report, SnapshotRequest};
use anyhow::Context;
use durovfs_archive::listing::Listing;
use durovfs_archive::store::Store;
use durovfs_archive::{NormalizedEntry, Normalizer, entries};
use durovfs_copies::{CopyError, WarmCopy, copy_path};
use durovfs_journal::{Journal, JournalError};
use durovfs_wire::status::CopyStatus;
use durovfs_wire::{DatabaseId, EntryPart, Lsn};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;
use tokio::sync::mpsc;

/// Pause when no copy has anything to do: what readers of a quiet copy lag behind at most.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);
/// Bytes of pages after which the next copy has its turn.
const SLICE_BYTES: u64 = 16 << 20;
/// Pause after something failed.
const RETRY_PAUSE: Duration = Duration::from_secs(2);
/// A copy is read whole at the end of a chunk, but for at most one part in this many of the time:
/// a large one at every few chunks.
const CHECK_SHARE: u32 = 10;
/// Copies that are open in SQLite at once; with SQLite's cache of 2 MB each.
const OPEN_MAX: usize = 64;
/// Parts that the archive's reader may be ahead.
const PARTS_AHEAD: usize = 2;

/// What the thread is made of.
pub(super) struct Parts {
    pub board: Arc<Board>,
    pub journal: Journal,
    pub store: Option<Arc<dyn Store>>,
    pub directory: PathBuf,
    pub scratch: PathBuf,
}

/// Starts the thread. It ends with the process: a copy that is cut off anywhere knows where it is.
pub(super) fn spawn(parts: Parts) -> anyhow::Result<()> {
    durovfs_archive::chunk::prepare_scratch(&parts.scratch)
        .with_context(|| format!("prepare {}", parts.scratch.display()))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("make the runtime of the copies")?;
    let mut follower = Follower {
        parts,
        runtime,
        copies: BTreeMap::new(),
        turns: 0,
    };
    std::thread::Builder::new()
        .name("copies".to_owned())
        .spawn(move || follower.run())
        .context("start the thread of the copies")?;
    Ok(())
}

/// One log and its copy.
struct Following {
    copy: Option<WarmCopy>,
    file: Option<PathBuf>,
    next_lsn: Lsn,
    /// End of the newest chunk when the copy was last read whole, and where the copy was then.
    checked_chunk: Lsn,
    checked_lsn: Lsn,
    check_due: Instant,
    retry_at: Option<Instant>,
    trouble: Option<String>,
    /// Told as long as the process runs: a copy does not change by itself.
    difference: Option<String>,
    differences: u64,
    last_turn: u64,
}

impl Following {
    fn new() -> Self {
        Self {
            copy: None,
            file: None,
            next_lsn: Lsn::ZERO.next(),
            checked_chunk: Lsn::ZERO,
            checked_lsn: Lsn::ZERO,
            check_due: Instant::now(),
            retry_at: None,
            trouble: None,
            difference: None,
            differences: 0,
            last_turn: 0,
        }
    }

    fn lsn(&self) -> Lsn {
        let position = self.copy.as_ref().and_then(WarmCopy::position);
        position.map_or(Lsn::ZERO, |position| position.lsn)
    }

    fn report(&self, log: &Followed) -> Report {
        let state = match (&self.trouble, self.lsn()) {
            (Some(_), _) => "waiting",
            (None, Lsn::ZERO) => "building",
            (None, _) if self.next_lsn <= log.commit_lsn => "catching_up",
            (None, _) => "level",
        };
        let trouble = self.trouble.as_ref();
        let trouble = trouble.map(|trouble| format!("the warm copy waits: {trouble}"));
        let difference = self.difference.as_ref().map(|difference| {
            format!("the warm copy differed from the log and was built anew: {difference}")
        });
        let file = self.file.as_ref();
        let behind = log.commit_lsn.next().get();
        Report {
            status: CopyStatus {
                file: file.map_or_else(String::new, |file| file.display().to_string()),
                state: state.to_owned(),
                lsn: self.lsn(),
                lag_entries: behind.saturating_sub(self.next_lsn.get()),
                checked_lsn: self.checked_lsn,
                differences: self.differences,
            },
            warnings: trouble.into_iter().chain(difference).collect(),
        }
    }

    /// What follows must come from where the copy stands, whatever was read since.
    fn rewind(&mut self) {
        self.next_lsn = self.lsn().next();
    }

    fn differs(&mut self, name: &str, reason: String) -> Result<(), CopyError> {
        tracing::warn!(%name, %reason, "the warm copy differs from the log: it is built anew");
        self.difference = Some(reason);
        self.differences += 1;
        self.checked_lsn = Lsn::ZERO;
        let result = self.copy.as_mut().map_or(Ok(()), WarmCopy::start_over);
        self.rewind();
        result
    }
}

struct Follower {
    parts: Parts,
    runtime: Runtime,
    copies: BTreeMap<DatabaseId, Following>,
    turns: u64,
}

impl Follower {
    fn run(&mut self) {
        loop {
            let logs = self.parts.board.followed().clone();
            let mut busy = false;
            for (database, log) in &logs {
                self.answer_requests();
                busy |= self.turn(*database, log);
            }
            if !busy {
                std::thread::sleep(LOOK_INTERVAL);
            }
        }
    }

    /// Moves a copy on. Returns whether there may be more to do at once.
    fn turn(&mut self, database: DatabaseId, log: &Followed) -> bool {
        let following = self.copies.entry(database).or_insert_with(Following::new);
        if following.retry_at.is_some_and(|at| Instant::now() < at) {
            return false;
        }
        let moves = following.copy.is_none() || following.next_lsn <= log.commit_lsn;
        let chunk_ended = log.archive_lsn > following.checked_chunk;
        let checks = !moves && chunk_ended && Instant::now() >= following.check_due;
        if !moves && !checks {
            return false;
        }
        self.turns += 1;
        following.last_turn = self.turns;
        let result = if moves {
            advance(following, &self.parts, &self.runtime, database, log)
        } else {
            check(following, log)
        };
        following.retry_at = None;
        following.trouble = None;
        match result {
            Ok(()) => {}
            Err(CopyError::Differs(reason)) => {
                if let Err(error) = following.differs(&log.name, reason) {
                    self.wait(database, error.to_string());
                }
            }
            Err(error) => self.wait(database, error.to_string()),
        }
        if let Some(following) = self.copies.get(&database) {
            let report = following.report(log);
            self.parts.board.reports().insert(database, report);
        }
        self.close_oldest();
        moves
    }

    fn wait(&mut self, database: DatabaseId, trouble: String) {
        if let Some(following) = self.copies.get_mut(&database) {
            tracing::warn!(%database, %trouble, "a warm copy waits");
            following.retry_at = Some(Instant::now() + RETRY_PAUSE);
            following.trouble = Some(trouble);
            following.rewind();
        }
    }

    /// Keeps the number of open files bounded.
    fn close_oldest(&mut self) {
        let open = |following: &&mut Following| {
            let copy = following.copy.as_ref();
            copy.is_some_and(WarmCopy::is_connected)
        };
        if self.copies.values_mut().filter(open).count() > OPEN_MAX
            && let Some(oldest) = self
                .copies
                .values_mut()
                .filter(open)
                .min_by_key(|following| following.last_turn)
            && let Some(copy) = &mut oldest.copy
        {
            copy.rest();
        }
    }

    fn answer_requests(&mut self) {
        let requests = std::mem::take(&mut *self.parts.board.requests());
        for SnapshotRequest { database, answer } in requests {
            let copy = self
                .copies
                .get_mut(&database)
                .and_then(|following| following.copy.as_mut());
            let snapshot = copy.map_or(Ok(None), WarmCopy::snapshot);
            let snapshot = snapshot.unwrap_or_else(|error| {
                tracing::warn!(%database, %error, "an opening cannot begin with the warm copy");
                None
            });
            // Who asked may have gone to the archive meanwhile.
            drop(answer.send(snapshot));
        }
    }
}

/// Applies a slice of the log.
fn advance(
    following: &mut Following,
    parts: &Parts,
    runtime: &Runtime,
    database: DatabaseId,
    log: &Followed,
) -> Result<(), CopyError> {
    if following.copy.is_none() {
        let file = copy_path(&parts.directory, &log.name);
        let file = file.map_err(|error| CopyError::NotOurs(error.to_string()))?;
        following.file = Some(file.clone());
        let (copy, differed) = WarmCopy::open(&file, database)?;
        following.copy = Some(copy);
        following.rewind();
        following.checked_lsn = following.lsn(); // it was read whole
        tracing::info!(name = %log.name, file = %file.display(), lsn = %following.lsn(),
            "a warm copy follows the log");
        differed.map_or(Ok(()), |reason| Err(CopyError::Differs(reason)))?;
    }
    let first_held = parts
        .journal
        .state(database)
        .map_or(Lsn::ZERO.next(), |state| state.first_lsn);
    let result = if following.next_lsn >= first_held {
        from_journal(following, parts, database, log)
    } else {
        let through_lsn = first_held.previous().unwrap_or_default();
        runtime.block_on(from_archive(following, parts, database, log, through_lsn))
    };
    match result {
        // Transactions before what was read are only in the archive.
        Err(CopyError::NeedsImage) if following.next_lsn > Lsn::ZERO.next() => {
            following.differs(&log.name, "transactions are missing in it".to_owned())
        }
        result => result,
    }
}

fn from_journal(
    following: &mut Following,
    parts: &Parts,
    database: DatabaseId,
    log: &Followed,
) -> Result<(), CopyError> {
    let entries = parts
        .journal
        .parts(database, following.next_lsn, log.commit_lsn);
    let entries = match entries {
        Ok(entries) => entries,
        // Dropped this moment: the next turn goes to the archive.
        Err(JournalError::Gone { .. }) => return Ok(()),
        Err(error) => return Err(CopyError::Failed(error.to_string())),
    };
    let mut normalizer = Normalizer::new(&parts.scratch);
    let mut bytes = 0;
    for part in entries {
        let part = match part {
            Ok(part) => part,
            Err(JournalError::Gone { .. }) => break,
            Err(error) => return Err(CopyError::Failed(error.to_string())),
        };
        bytes += part.payload.len() as u64;
        take_part(following, &mut normalizer, &part)?;
        if bytes >= SLICE_BYTES && !normalizer.is_open() {
            break;
        }
    }
    following.copy.as_mut().map_or(Ok(()), WarmCopy::commit)
}

async fn from_archive(
    following: &mut Following,
    parts: &Parts,
    database: DatabaseId,
    log: &Followed,
    through_lsn: Lsn,
) -> Result<(), CopyError> {
    let first_lsn = following.next_lsn;
    let missing =
        format!("the entries from lsn {first_lsn} to {through_lsn} are in no journal here");
    let failed = |reason: String| CopyError::Failed(format!("{missing}, and {reason}"));
    let Some(store) = &parts.store else {
        return Err(failed("sidecar.toml has no [archive]".to_owned()));
    };
    let listing = Listing::load_log(&**store, &log.name, database).await;
    let listing = listing.map_err(|error| failed(format!("not to be had: {error}")))?;
    let Some(plan) = entries::plan(&listing, first_lsn, through_lsn) else {
        return Err(failed(format!("{} does not have them all", store.url())));
    };
    let (sender, mut receiver) = mpsc::channel(PARTS_AHEAD);
    let read = async {
        let result = entries::read(store, &plan, &parts.scratch, &sender).await;
        drop(sender);
        result
    };
    let take = async move {
        let mut normalizer = Normalizer::new(&parts.scratch);
        while let Some(part) = receiver.recv().await {
            take_part(following, &mut normalizer, &part)?;
        }
        Ok::<_, CopyError>(following)
    };
    let (read, taken) = tokio::join!(read, take);
    let following = taken?;
    let last = read.map_err(|error| failed(format!("not to be read: {error}")))?;
    following.copy.as_mut().map_or(Ok(()), WarmCopy::commit)?;
    following.next_lsn = following.next_lsn.max(last.lsn.next());
    Ok(())
}

fn take_part(
    following: &mut Following,
    normalizer: &mut Normalizer,
    part: &EntryPart,
) -> Result<(), CopyError> {
    let entry = normalizer.push(part);
    let entry = entry.map_err(|error| CopyError::Failed(format!("an entry: {error}")))?;
    if let (Some(NormalizedEntry::Transaction(pages)), Some(copy)) = (&entry, &mut following.copy) {
        copy.push(pages)?;
    }
    if let Some(entry) = &entry {
        following.next_lsn = entry.position().lsn.next();
    }
    Ok(())
}

/// Reads the copy whole, at the end of a chunk.
fn check(following: &mut Following, log: &Followed) -> Result<(), CopyError> {
    let begun = Instant::now();
    let result = following.copy.as_mut().map_or(Ok(()), WarmCopy::verify);
    following.check_due = Instant::now() + begun.elapsed() * (CHECK_SHARE - 1);
    following.checked_chunk = log.archive_lsn;
    if result.is_ok() {
        following.checked_lsn = following.lsn();
    }
    result
}
