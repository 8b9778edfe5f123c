//! Joining others who hold locks on the database: those who have it open found out, when they
//! opened it, that it is what the log says. What somebody wrote since without durovfs stands in the
//! WAL, after the place where the mark says that it ends.
//!
//! Who is still opening it says nothing of the file, and may yet fail; it is waited for. A process
//! without durovfs says nothing either: beside it the file must be level as it is.

use super::{BUSY_PAUSE, Next, Opener, SurveyedWal, committed_end, keep_local, resolution};
use crate::connection::Surroundings;
use crate::deferred;
use crate::error::Refusal;
use crate::mark::{Mark, MarkState, WalPosition, describe, with_suffix};
use crate::resolve::way_out;
use crate::survey::{Content, committed_after};
use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long a WAL must end elsewhere than the mark says, neither changing, before that is taken for
/// somebody else's write: between the two writes of a commit of ours there is no wait.
const FOREIGN_AFTER: Duration = Duration::from_secs(1);

impl Opener<'_> {
    /// The exclusive lock was not to be had.
    pub(super) fn join(&self, existing: Option<(Mark, MarkState)>) -> Result<Next, Refusal> {
        let Some((mark, state)) =
            existing.filter(|(_, state)| state.database == self.log.database && !state.applying)
        else {
            return Ok(Next::Again);
        };
        if let Some(refusal) = deferred::lost(self.surroundings.sink.as_ref(), self.log.database) {
            return Err(Refusal::cannot_open(refusal.message));
        }
        if mark.is_in_use()? {
            let (mark, _) = check(self.surroundings, self.name, self.path, (mark, state))?;
            return self.ready(mark);
        }
        drop(mark);
        if !self.file.try_lock_shared()? {
            return Ok(Next::Again);
        }
        // Nobody brings the file level now, and nobody writes to it but a checkpoint.
        let found = self.find_level();
        self.file.unlock_all();
        found
    }

    /// Only processes without durovfs have the database open, or others as far as this one.
    fn find_level(&self) -> Result<Next, Refusal> {
        let existing = keep_local::open_mark(self.surroundings, self.path, self.name)?;
        let (Some((mark, state)), Some(end)) = (existing, self.log.last_transaction) else {
            return Ok(Next::Again);
        };
        let is_open = state.in_flight.is_some() || state.unconfirmed.is_some() || state.applying;
        let known = state.last.filter(|last| {
            (last.position, last.checksum) == (end.position, end.commit.checksum)
                && state.database == self.log.database
        });
        let Some(last) = known.filter(|_| !is_open) else {
            return Ok(Next::Again);
        };
        if resolution::pending(self.path)?.is_some() || self.has_hot_journal()? {
            return Ok(Next::Again);
        }
        let wal = self.survey_wal()?;
        let wal = wal.as_ref().map(SurveyedWal::parts);
        if self.looks_as_marked(&mark, &state, &last, committed_end(wal))? {
            return self.ready(mark);
        }
        match Content::new(self.file, wal)? {
            Some(content) if content.is_as_marked(&last, &mark.page_table())? => self.ready(mark),
            _ => Ok(Next::Again),
        }
    }
}

/// Makes sure that nobody wrote to the WAL without durovfs.
///
/// # Errors
/// A refusal, when somebody did.
fn check(
    surroundings: &Surroundings,
    name: &str,
    path: &Path,
    (mut mark, mut state): (Mark, MarkState),
) -> Result<(Mark, MarkState), Refusal> {
    let deadline = Instant::now() + surroundings.open_timeout;
    let mut seen = None;
    loop {
        let Some(end) = unknown_end(path, &state)? else {
            return Ok((mark, state));
        };
        let now = Instant::now();
        match seen {
            Some((before, since)) if before == (state, end) => {
                if now.duration_since(since) > FOREIGN_AFTER {
                    break Err(refusal(name, path, &state, &end));
                }
            }
            // A busy writer: the next write looks again.
            _ if now > deadline => return Ok((mark, state)),
            _ => seen = Some(((state, end), now)),
        }
        std::thread::sleep(BUSY_PAUSE);
        state = mark.read()?;
    }
}

/// Where the WAL ends, if that is after all that the mark knows or expects.
fn unknown_end(path: &Path, state: &MarkState) -> Result<Option<WalPosition>, Refusal> {
    // With a commit on its way the file may have it already.
    if state.in_flight.is_some() || state.unconfirmed.is_some() || state.last.is_none() {
        return Ok(None);
    }
    let path = with_suffix(path, "-wal");
    match File::open(&path) {
        Ok(wal) => committed_after(&wal, state.wal),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Refusal::io("open WAL", &path, &error)),
    }
}

fn refusal(name: &str, path: &Path, state: &MarkState, end: &WalPosition) -> Refusal {
    let position = state
        .last
        .map_or_else(String::new, |last| last.position.to_string());
    let marked = state.wal.map_or("none".to_owned(), |wal| describe(&wal));
    Refusal::cannot_open(format!(
        "open {}: changed without durovfs after {position}, where its log stands: its WAL ends at \
         {}, where the mark says {marked}; nothing was overwritten; close all connections, then {}",
        path.display(),
        describe(end),
        way_out(path, name)
    ))
}
