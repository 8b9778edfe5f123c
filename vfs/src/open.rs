//! Opening a protected database: finds out what the local file holds, compares it with the log, and
//! makes them equal or refuses. The table is DESIGN §4's:
//!
//! | local file | log | |
//! |---|---|---|
//! | none | none | create: a mark, and the first transaction makes the rest |
//! | content, no mark | none | adopt: the whole image is the first transaction |
//! | none | exists | hydrate: write the file from the log |
//! | equal | exists | open |
//! | behind | exists | roll forward |
//! | ahead or different | exists | refuse, until `durovfs resolve` decides (`open/resolution.rs`) |
//!
//! Where the client config says `keep_local`, the local file wins instead (`open/keep_local.rs`).
//!
//! The first opener does this under SQLite's exclusive lock; who finds the database in use joins
//! (`open/joining.rs`).

mod following;
mod joining;
mod keep_local;
mod resolution;

use crate::connection::{Connection, LogLevel, Surroundings};
use crate::deferred;
use crate::error::{Refusal, RefusalKind};
use crate::file::{BaseFile, DatabaseFile};
use crate::mark::{
    InFlight, KnownTransaction, Mark, MarkState, Tip, Unconfirmed, WalPosition, mark_path,
    note_wal_ended, with_suffix,
};
use crate::page_table::PageChanges;
use crate::resolve::way_out;
use crate::roll_forward::{Applier, read_transactions};
use crate::sink::{OpenedLog, SinkErrorKind};
use crate::survey::{Content, IsWritten, WalSurvey, is_not_empty};
use bytes::Bytes;
use durovfs_wire::client::{CommitOutcome, FailureKind};
use durovfs_wire::entry::PayloadBuilder;
use durovfs_wire::wal::{WAL_HEADER_BYTES, WalHeader};
use durovfs_wire::{CommitHeader, DatabaseChecksum, Lsn, Origin, Timestamp};
use std::fs::{File, OpenOptions};
use std::path::Path;
use std::time::{Duration, Instant};

/// Pause between two looks at a database that another opener is busy with.
const BUSY_PAUSE: Duration = Duration::from_millis(10);

/// Opens the database `name`, whose file at `path` the host has opened as `file`. With `takeover`
/// also from another host that is a live primary.
///
/// # Errors
/// A refusal of the kind `CannotOpen`, with the line that explains it.
pub fn open<F>(
    surroundings: Surroundings,
    path: &Path,
    name: &str,
    file: F,
    mut takeover: bool,
) -> Result<Connection, Refusal>
where
    F: DatabaseFile + Send + 'static,
{
    let deadline = Instant::now() + surroundings.open_timeout;
    loop {
        let existing = match resolution::pending(path)? {
            Some(_) => None,
            None => keep_local::open_mark(&surroundings, path, name)?,
        };
        let known = existing.as_ref().map(|(_, state)| state.database);
        // Once: whoever takes it back while this one is opening is not fought.
        let force = std::mem::take(&mut takeover);
        let log = open_log(&surroundings, name, known, path, deadline, force)?;
        let opener = Opener {
            surroundings: &surroundings,
            path,
            name,
            file: &file,
            log,
            held: existing.as_ref().map(|(_, state)| *state),
        };
        let next = if file.try_lock_exclusive()? {
            // Nobody else is in here now; what was read before the lock may be old.
            let result = opener.run();
            file.unlock_all();
            result?
        } else {
            opener.join(existing)?
        };
        match next {
            Next::Ready(mark, epoch) => {
                return Ok(Connection::new(
                    surroundings,
                    path.to_owned(),
                    mark,
                    Box::new(file),
                    (log.database, epoch),
                ));
            }
            Next::RecoverJournal => file.recover_journal()?,
            Next::Again => {}
        }
        std::thread::sleep(BUSY_PAUSE);
        if Instant::now() > deadline {
            return Err(Refusal::cannot_open(format!(
                "{}: in use by a process without durovfs, and not as the log's end has it; or by a \
                 process that is still opening it",
                path.display()
            )));
        }
    }
}

fn open_log(
    surroundings: &Surroundings,
    name: &str,
    known: Option<durovfs_wire::DatabaseId>,
    path: &Path,
    deadline: Instant,
    takeover: bool,
) -> Result<OpenedLog, Refusal> {
    let way_out = way_out(path, name);
    let left = deadline
        .saturating_duration_since(Instant::now())
        .max(Duration::from_millis(1));
    let sink = surroundings.sink.as_ref();
    let opened = match takeover {
        true => sink.take_over(name, known, Some(left)),
        false => sink.open(name, known, Some(left)),
    };
    let log = opened.map_err(|error| {
        let hint = match error.kind {
            SinkErrorKind::Refused(FailureKind::UnknownDatabase) => {
                format!("; the local file belongs to another log: {way_out}")
            }
            _ => String::new(),
        };
        Refusal::cannot_open(format!("open {name}: {error}{hint}"))
    })?;
    match known {
        Some(known) if known != log.database => Err(Refusal::cannot_open(format!(
            "open {name}: the local file belongs to log {known}, the cluster has log {} under this \
             name; {way_out}",
            log.database
        ))),
        _ => Ok(log),
    }
}

enum Next {
    Ready(Mark, durovfs_wire::Epoch),
    RecoverJournal,
    Again,
}

struct Opener<'a> {
    surroundings: &'a Surroundings,
    path: &'a Path,
    name: &'a str,
    file: &'a dyn DatabaseFile,
    log: OpenedLog,
    /// What the mark said before the log was asked where it ends.
    held: Option<MarkState>,
}

impl Opener<'_> {
    fn run(&self) -> Result<Next, Refusal> {
        if self.file.has_moved()? {
            return Err(Refusal::cannot_open(format!(
                "{}: was replaced while it was opened: open it again",
                self.path.display()
            )));
        }
        if self.has_hot_journal()? {
            return Ok(Next::RecoverJournal);
        }
        if let Some(resolution) = resolution::pending(self.path)? {
            return self.carry_out(&resolution);
        }
        let mut existing = keep_local::open_mark(self.surroundings, self.path, self.name)?;
        if let Some((mark, state)) = &mut existing
            && let Some(in_flight) = state.in_flight
            && self.settle(mark, state, in_flight)?
        {
            return Ok(Next::Again);
        }
        if let Some((mark, state)) = &mut existing
            && let Some(unconfirmed) = state.unconfirmed
        {
            self.settle_deferred(mark, state, &unconfirmed)?;
            return Ok(Next::Again);
        }
        if let Some((_, state)) = &existing
            && self.is_outrun(state)
        {
            return Ok(Next::Again);
        }
        let wal = self.survey_wal()?;
        let wal = wal.as_ref().map(SurveyedWal::parts);
        let marked = existing.as_ref().map(|(_, state)| *state);
        if let Some(state) = marked
            && state.applying
        {
            return self.bring_level(existing, state, wal);
        }
        let content = match Content::new(self.file, wal) {
            Err(refusal) if refusal.kind == RefusalKind::CannotOpen => {
                return self.no_database(existing, &refusal.message);
            }
            content => content?,
        };
        if self.surroundings.keep_local && self.log.last_transaction.is_some() {
            return self.keep_local(content.as_ref(), existing, wal);
        }
        match (content, existing, self.log.last_transaction) {
            (None, None, None) => self.create(),
            (None, Some((mark, state)), None) if state.last.is_none() => self.ready(mark),
            (None, existing, Some(_)) => self.hydrate(existing, wal),
            (Some(content), None, None) => self.adopt(&content, wal, None),
            (Some(content), Some((mark, state)), None) if state.last.is_none() => {
                self.adopt(&content, wal, Some((mark, state)))
            }
            (_, Some((_, state)), None) => Err(self.refuse(&format!(
                "the local file is at lsn {}, the log has no transaction",
                state.last_lsn()
            ))),
            (Some(content), existing, Some(_)) => self.compare(&content, existing, wal),
        }
    }

    /// Whether others committed, and closed the database, between the log's answer and our lock:
    /// a file that is ahead of an old answer is not ahead of the log.
    fn is_outrun(&self, state: &MarkState) -> bool {
        let held = self.held.map_or(Lsn::ZERO, |held| held.last_lsn());
        state.last_lsn() > held.max(self.base_lsn())
    }

    /// True when the log must be asked again where it ends.
    fn settle(
        &self,
        mark: &mut Mark,
        state: &mut MarkState,
        in_flight: InFlight,
    ) -> Result<bool, Refusal> {
        let InFlight {
            origin, base_lsn, ..
        } = in_flight;
        let sink = &self.surroundings.sink;
        let timeout = Some(self.surroundings.open_timeout);
        match sink.resolve(state.database, origin, base_lsn, timeout) {
            CommitOutcome::Committed { position } => {
                // Whether the local file has it shows when it is compared with the log.
                let covered = self.log.last_transaction.map(|last| last.position.lsn);
                Ok(covered < Some(position.lsn))
            }
            CommitOutcome::NotCommitted { .. } | CommitOutcome::Behind { .. } => {
                state.in_flight = None;
                mark.write(state)?;
                Ok(false)
            }
            // The local file does not have it, and the gate asks again before the next write.
            CommitOutcome::Unknown { reason } | CommitOutcome::NotPrimary { reason } => {
                let line = format!("{}: a commit is still open: {reason}", self.path.display());
                (self.surroundings.log)(LogLevel::Error, &line);
                Ok(false)
            }
        }
    }

    /// Deferred commits that the process that made them left behind: finds out whether the log has
    /// them, and takes them back out of the local file if not.
    fn settle_deferred(
        &self,
        mark: &mut Mark,
        state: &mut MarkState,
        unconfirmed: &Unconfirmed,
    ) -> Result<(), Refusal> {
        let sink = self.surroundings.sink.as_ref();
        let timeout = Some(self.surroundings.open_timeout);
        match deferred::wait_all(sink, mark, state, timeout) {
            Ok(Some(position)) => state.note_confirmed(position),
            Ok(None) => {}
            Err(_) => {
                let confirmed = self.take_back(mark, unconfirmed)?;
                let line = format!(
                    "{}: deferred commits that were not confirmed are undone: back to {}",
                    self.path.display(),
                    confirmed.last.position
                );
                (self.surroundings.log)(LogLevel::Error, &line);
                state.last = Some(confirmed.last);
                state.wal = confirmed.wal;
                state.unconfirmed = None;
            }
        }
        mark.write(state)?;
        deferred::forget(state.database);
        Ok(())
    }

    /// Cuts the WAL after the newest confirmed commit. Doing it again does no harm.
    fn take_back(&self, mark: &Mark, unconfirmed: &Unconfirmed) -> Result<Tip, Refusal> {
        let confirmed = match mark.confirmation()? {
            // A checkpoint may have moved more into the database file than a slot tells of.
            Some((newest, tip))
                if newest.client == unconfirmed.newest.client
                    && tip.last.position > unconfirmed.confirmed.last.position =>
            {
                tip
            }
            _ => unconfirmed.confirmed,
        };
        let Some(wal) = self.open_wal()? else {
            return Ok(Tip {
                wal: None,
                ..confirmed
            });
        };
        let mut head = [0u8; WAL_HEADER_BYTES];
        let read = BaseFile::read_at(&wal, &mut head, 0)?;
        let header = WalHeader::parse(&head).filter(|_| read == head.len());
        let frame = header.map_or(0, |header| deferred::cut_frame(&confirmed, header.salts));
        let size = match frame {
            0 => 0,
            frame => WalHeader::frame_offset(confirmed.last.page_size, frame + 1),
        };
        if BaseFile::size(&wal)? > size {
            wal.truncate(size)?;
        }
        Ok(Tip {
            wal: confirmed.wal.filter(|_| frame > 0),
            ..confirmed
        })
    }

    fn has_hot_journal(&self) -> Result<bool, Refusal> {
        let path = with_suffix(self.path, "-journal");
        let mut first = [0u8; 1];
        match File::open(&path) {
            Ok(journal) => Ok(BaseFile::read_at(&journal, &mut first, 0)? == 1 && first[0] != 0),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(Refusal::io("open journal", &path, &error)),
        }
    }

    fn open_wal(&self) -> Result<Option<File>, Refusal> {
        let path = with_suffix(self.path, "-wal");
        match OpenOptions::new().read(true).write(true).open(&path) {
            Ok(file) => Ok(Some(file)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            // Enough to find out what it holds. SQLite only reads such a database.
            Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
                let file = File::open(&path);
                file.map(Some)
                    .map_err(|error| Refusal::io("open WAL", &path, &error))
            }
            Err(error) => Err(Refusal::io("open WAL", &path, &error)),
        }
    }

    /// The WAL and what it holds; none where there is none, or one without a header.
    fn survey_wal(&self) -> Result<Option<SurveyedWal>, Refusal> {
        let Some(file) = self.open_wal()? else {
            return Ok(None);
        };
        let survey = WalSurvey::read(&file)?;
        Ok(survey.map(|survey| SurveyedWal { file, survey }))
    }

    fn ready(&self, mark: Mark) -> Result<Next, Refusal> {
        // While the locks are held under which the file was found level.
        mark.hold_in_use()?;
        Ok(Next::Ready(mark, self.log.epoch))
    }

    fn create(&self) -> Result<Next, Refusal> {
        let state = self.begins_next();
        self.ready(Mark::create(self.path, self.name, &state)?)
    }

    /// The file is gone and the log has it. A mark that is left from before does not count.
    fn hydrate(
        &self,
        existing: Option<(Mark, MarkState)>,
        wal: Option<(&dyn BaseFile, &WalSurvey)>,
    ) -> Result<Next, Refusal> {
        drop(existing);
        let state = MarkState {
            applying: true,
            ..MarkState::new(self.log.database)
        };
        let mark = Mark::create(self.path, self.name, &state)?;
        let line = format!("{}: hydrate from the log", self.path.display());
        (self.surroundings.log)(LogLevel::Info, &line);
        let result = self.bring_level(Some((mark, state)), state, wal);
        if result.is_err() && self.file.size().is_ok_and(|size| size == 0) {
            // Nothing was written: the next open begins where this one did.
            let path = mark_path(self.path);
            std::fs::remove_file(&path).map_err(|e| Refusal::io("remove mark", &path, &e))?;
        }
        result
    }

    /// Applies the log's entries after the state's last one.
    fn bring_level(
        &self,
        existing: Option<(Mark, MarkState)>,
        state: MarkState,
        wal: Option<(&dyn BaseFile, &WalSurvey)>,
    ) -> Result<Next, Refusal> {
        let Some((mut mark, _)) = existing else {
            return Err(crate::mark::misuse("roll forward without a mark"));
        };
        // Frames are appended to a WAL that has commits; one that has none counts no more.
        let wal = wal.filter(|(_, survey)| survey.page_count.is_some() || state.applying);
        let appendable = wal
            .map(|(file, survey)| (file, survey.header))
            .filter(|_| !state.applying);
        let mut applier = Applier::new(self.file, appendable, &mut mark, state);
        if let (true, Some((file, _))) = (state.applying, wal) {
            file.truncate(0)?;
        }
        let first_lsn = state.last_lsn().next();
        let sink = self.surroundings.sink.as_ref();
        read_transactions(sink, &state, first_lsn, self.path, &mut |tx| {
            applier.apply(tx)
        })?;
        let reached = applier.state.last_lsn();
        let wanted = self
            .log
            .last_transaction
            .map_or(Lsn::ZERO, |last| last.position.lsn);
        if reached < wanted {
            return Err(Refusal::cannot_open(format!(
                "the log could be read to lsn {reached} only, it ends at {wanted}"
            )));
        }
        applier.finish()?;
        let line = format!("{}: rolled forward to lsn {reached}", self.path.display());
        (self.surroundings.log)(LogLevel::Info, &line);
        self.ready(mark)
    }

    /// Both have content: equal, behind, or neither.
    fn compare(
        &self,
        content: &Content<'_>,
        mut existing: Option<(Mark, MarkState)>,
        wal: Option<(&dyn BaseFile, &WalSurvey)>,
    ) -> Result<Next, Refusal> {
        let position = committed_end(wal);
        if let Some((mark, state)) = &existing
            && let Some(last) = state.last
            && self.looks_as_marked(mark, state, &last, position)?
        {
            return self.level_or_forward(existing, wal);
        }
        let line = format!("{}: scan the whole file", self.path.display());
        (self.surroundings.log)(LogLevel::Info, &line);
        if let Some((mut mark, mut state)) = existing {
            if let Some(last) = state.last
                && content.is_as_marked(&last, &mark.page_table())?
            {
                state.wal = position;
                mark.write(&state)?;
                mark.stamp()?;
                return self.level_or_forward(Some((mark, state)), wal);
            }
            existing = Some((mark, state));
        }
        let (found, checksum, pages) = self.identify(content, existing.as_ref())?;
        let Some(last) = found else {
            let mark = existing.and_then(|(_, state)| state.last);
            let marked = mark.map_or_else(
                || "has no mark".to_owned(),
                |last| {
                    format!(
                        "was last at {} with checksum {}",
                        last.position, last.checksum
                    )
                },
            );
            return Err(self.refuse(&format!(
                "the local file (checksum {checksum}, {} pages) {marked}, and is like no \
                 transaction of the log, which ends at {}",
                content.header.page_count, self.log.end
            )));
        };
        let state = MarkState {
            last: Some(last),
            wal: position,
            ..existing
                .as_ref()
                .map_or(MarkState::new(self.log.database), |(_, state)| *state)
        };
        let mark = self.rewrite_mark(existing, &state, &pages)?;
        self.level_or_forward(Some((mark, state)), wal)
    }

    /// The transaction of the log whose content this is, with the checksums of the content.
    fn identify(
        &self,
        content: &Content<'_>,
        existing: Option<&(Mark, MarkState)>,
    ) -> Result<(Option<KnownTransaction>, DatabaseChecksum, PageChanges), Refusal> {
        // Even a table that a crash left between two transactions knows pages never written.
        let table = existing.map(|(mark, state)| (mark.page_table(), state.page_count()));
        let table = table.as_ref().map(|(table, count)| (table, *count));
        // A file that shrank and grew again since the last checkpoint has old bytes on pages that
        // no transaction wrote since: only what stands in the WAL behind the mark counts.
        let marked_wal = existing.and_then(|(_, state)| state.wal);
        let is_since = |page_no, _: &[u8]| content.is_in_wal_since(marked_wal, page_no);
        // SQLite also writes pages that are empty, of which a loss of power may have kept the page
        // and taken the table's entry.
        let is_any = |_, _: &[u8]| true;
        let by_table: [(_, IsWritten<'_>); 3] =
            [(table, &is_since), (table, &is_not_empty), (table, &is_any)];
        let by_content: [(_, IsWritten<'_>); 2] = [(None, &is_any), (None, &is_not_empty)];
        let by_table = by_table.into_iter().filter(|(table, _)| table.is_some());
        let mut tried = (None, DatabaseChecksum::EMPTY, PageChanges::new());
        for (table, is_written) in by_table.chain(by_content) {
            let (checksum, pages) = content.checksums(table, is_written)?;
            let found = self.find_in_log(content, checksum, existing)?;
            let is_found = found.is_some();
            tried = (found, checksum, pages);
            if is_found {
                break;
            }
        }
        Ok(tried)
    }

    fn rewrite_mark(
        &self,
        existing: Option<(Mark, MarkState)>,
        state: &MarkState,
        pages: &PageChanges,
    ) -> Result<Mark, Refusal> {
        let mut mark = match existing {
            Some((mark, _)) => mark,
            None => Mark::create(self.path, self.name, &MarkState::new(self.log.database))?,
        };
        let table = mark.page_table();
        table.clear()?;
        table.apply(0, state.page_count(), pages)?;
        mark.write(state)?;
        mark.stamp()?;
        Ok(mark)
    }

    fn looks_as_marked(
        &self,
        mark: &Mark,
        state: &MarkState,
        last: &KnownTransaction,
        position: Option<WalPosition>,
    ) -> Result<bool, Refusal> {
        let same_place = match (state.wal, position) {
            (Some(marked), Some(found)) => {
                (marked.salts, marked.frame) == (found.salts, found.frame)
                    && marked.checksum == found.checksum
            }
            (None, None) => true,
            _ => false,
        };
        Ok(same_place
            && mark.stamp_matches()?
            && mark.page_table().sum(1, last.page_count)? == last.checksum)
    }

    /// The transaction after which the database had this checksum.
    fn find_in_log(
        &self,
        content: &Content<'_>,
        checksum: DatabaseChecksum,
        existing: Option<&(Mark, MarkState)>,
    ) -> Result<Option<KnownTransaction>, Refusal> {
        let header = content.header;
        let fits = |known: &KnownTransaction| {
            (known.checksum, known.page_size, known.page_count)
                == (checksum, header.page_size, header.page_count)
        };
        let of_log = self.log.last_transaction.map(|last| KnownTransaction {
            position: last.position,
            checksum: last.commit.checksum,
            page_size: last.commit.page_size,
            page_count: last.commit.page_count,
        });
        let marked = existing.and_then(|(_, state)| state.last);
        if let Some(known) = [of_log, marked].into_iter().flatten().find(fits) {
            return Ok(Some(known));
        }
        // A crash of the machine may have kept the file and lost the mark's last changes; or the
        // file is an older copy than the mark.
        let state = existing.map_or(MarkState::new(self.log.database), |(_, state)| *state);
        let after_mark = state.last_lsn().next();
        match self.search_log(&state, after_mark, &fits)? {
            None if state.last.is_some() => self.search_log(&state, Lsn::new(1), &fits),
            found => Ok(found),
        }
    }

    fn search_log(
        &self,
        state: &MarkState,
        first_lsn: Lsn,
        fits: &dyn Fn(&KnownTransaction) -> bool,
    ) -> Result<Option<KnownTransaction>, Refusal> {
        let mut found = None;
        let sink = self.surroundings.sink.as_ref();
        let read = sink.read_summaries(state.database, first_lsn, &mut |summary| {
            let known = KnownTransaction {
                position: summary.position,
                checksum: summary.commit.checksum,
                page_size: summary.commit.page_size,
                page_count: summary.commit.page_count,
            };
            if fits(&known) {
                found = Some(known);
            }
            Ok(())
        });
        read.map_err(|error| {
            Refusal::cannot_open(format!("search the log from lsn {first_lsn} on: {error}"))
        })?;
        Ok(found)
    }

    fn level_or_forward(
        &self,
        existing: Option<(Mark, MarkState)>,
        wal: Option<(&dyn BaseFile, &WalSurvey)>,
    ) -> Result<Next, Refusal> {
        let (Some((mut mark, mut state)), Some(end)) = (existing, self.log.last_transaction) else {
            return Err(crate::mark::misuse("compare without a mark"));
        };
        let Some(last) = state.last else {
            return Err(crate::mark::misuse("compare without content"));
        };
        let same = last.position == end.position && last.checksum == end.commit.checksum;
        if same {
            if state.in_flight.take().is_some() {
                mark.write(&state)?;
            }
            if wal.is_none() && state.wal.is_some() {
                note_wal_ended(self.path)?;
            }
            return self.ready(mark);
        }
        if last.position.lsn < end.position.lsn {
            return self.bring_level(Some((mark, state)), state, wal);
        }
        Err(self.refuse(&format!(
            "the local file is at {} with checksum {}, the log at {} with {}",
            last.position, last.checksum, end.position, end.commit.checksum
        )))
    }

    /// Position of what a whole image is made on top of.
    fn base_lsn(&self) -> Lsn {
        let last = self.log.last_transaction;
        last.map_or(Lsn::ZERO, |last| last.position.lsn)
    }

    /// The whole image becomes the next transaction of the log, of a new one the first.
    fn adopt(
        &self,
        content: &Content<'_>,
        wal: Option<(&dyn BaseFile, &WalSurvey)>,
        existing: Option<(Mark, MarkState)>,
    ) -> Result<Next, Refusal> {
        let line = format!(
            "{}: adopt, {} pages",
            self.path.display(),
            content.header.page_count
        );
        (self.surroundings.log)(LogLevel::Info, &line);
        let state = self.begins_next();
        let (mut mark, before) = match existing {
            Some((_, state)) if state.in_flight.is_some() => {
                return Err(self.refuse("an earlier adoption is not decided yet: try again"));
            }
            Some(existing) => existing,
            None => (Mark::create(self.path, self.name, &state)?, state),
        };
        let sink = &self.surroundings.sink;
        let origin = sink.next_origin();
        let sent = self.send_image(content, origin);
        let (commit, payload, changes) =
            sent.inspect_err(|_| sink.abort(state.database, origin))?;
        let CommitHeader {
            checksum,
            page_size,
            page_count,
            ..
        } = commit;
        let in_flight = Some(InFlight {
            origin,
            base_lsn: self.base_lsn(),
            checksum,
        });
        mark.write(&MarkState { in_flight, ..state })?;
        // The image may take longer than a commit does; the sidecar's answer ends it.
        let position = match sink.commit(state.database, commit, payload, None) {
            CommitOutcome::Committed { position } => position,
            // Who has the database open goes on with what the mark said before.
            CommitOutcome::NotCommitted { reason } | CommitOutcome::NotPrimary { reason } => {
                mark.write(&before)?;
                return Err(self.refuse(&reason));
            }
            CommitOutcome::Behind { .. } => {
                mark.write(&before)?;
                return Ok(Next::Again);
            }
            CommitOutcome::Unknown { reason } => return Err(self.refuse(&reason)),
        };
        let last = Some(KnownTransaction {
            position,
            checksum,
            page_size,
            page_count,
        });
        let state = MarkState {
            last,
            wal: committed_end(wal),
            ..state
        };
        self.ready(self.rewrite_mark(Some((mark, state)), &state, &changes)?)
    }

    /// Streams the whole image but for its last slots, which are returned with its facts.
    fn send_image(
        &self,
        content: &Content<'_>,
        origin: Origin,
    ) -> Result<(CommitHeader, Bytes, PageChanges), Refusal> {
        let sink = &self.surroundings.sink;
        let mut builder = PayloadBuilder::default();
        let page_size = content.header.page_size;
        let mut changes = PageChanges::new();
        let mut checksum = DatabaseChecksum::EMPTY;
        content.for_each_page(|page_no, image| {
            if !builder.has_room(page_size) {
                let payload: Bytes = builder.take();
                sink.send_pages(self.log.database, origin, page_size, payload)
                    .map_err(|error| self.refuse(&error.message))?;
            }
            builder.push(changes.len() as u32, page_no, image);
            let page = durovfs_wire::PageChecksum::of(page_no, image);
            checksum.toggle(page);
            changes.insert(page_no, page);
            Ok(())
        })?;
        let commit = CommitHeader {
            origin,
            time: Timestamp::default(),
            base_lsn: self.base_lsn(),
            page_size,
            page_count: content.header.page_count,
            slot_count: changes.len() as u32,
            checksum,
            whole_image: true,
        };
        Ok((commit, builder.take(), changes))
    }

    fn refuse(&self, what: &str) -> Refusal {
        Refusal::cannot_open(format!(
            "open {} (log {}): {what}; nothing was overwritten; {}",
            self.path.display(),
            self.log.database,
            way_out(self.path, self.name)
        ))
    }
}

struct SurveyedWal {
    file: File,
    survey: WalSurvey,
}

impl SurveyedWal {
    fn parts(&self) -> (&dyn BaseFile, &WalSurvey) {
        (&self.file, &self.survey)
    }
}

/// Where the committed part of the WAL ends; none when nothing in it is committed.
fn committed_end(wal: Option<(&dyn BaseFile, &WalSurvey)>) -> Option<WalPosition> {
    wal.filter(|(_, survey)| survey.page_count.is_some())
        .map(|(_, survey)| survey.end)
}
