//! Opening a database whose local file counts, because the client config's `keep_local` names it:
//! what the file holds becomes the log's next transaction when the log says otherwise, and a file
//! that was deleted is a database that begins again. For data that applications delete, replace or
//! write without durovfs on purpose; the history stays in the log.
//!
//! A commit that a crash left in flight is settled first, as everywhere: then the log decides.

use super::{Next, Opener};
use crate::connection::{LogLevel, Surroundings};
use crate::error::Refusal;
use crate::file::BaseFile;
use crate::mark::{Mark, MarkState};
use crate::survey::{Content, WalSurvey};
use std::path::Path;

/// The mark beside the file. Where the local file counts, one that came with a copy of another
/// database's files does not.
pub(super) fn open_mark(
    surroundings: &Surroundings,
    path: &Path,
    name: &str,
) -> Result<Option<(Mark, MarkState)>, Refusal> {
    let existing = Mark::open(path)?;
    Ok(existing.filter(|(mark, _)| !surroundings.keep_local || mark.name() == name))
}

impl Opener<'_> {
    /// State of a file that has nothing of the log yet, and whose first transaction is the log's
    /// next.
    pub(super) fn begins_next(&self) -> MarkState {
        MarkState {
            begins_after: self.base_lsn(),
            ..MarkState::new(self.log.database)
        }
    }

    /// The file has content that is no database. SQLite says so to the application; there is
    /// nothing to protect, unless it stands where a database was.
    pub(super) fn no_database(
        &self,
        existing: Option<(Mark, MarkState)>,
        why: &str,
    ) -> Result<Next, Refusal> {
        let is_used = |(_, state): &(Mark, MarkState)| state.last.is_some();
        let was_one = self.log.last_transaction.is_some() || existing.as_ref().is_some_and(is_used);
        if was_one && !self.surroundings.keep_local {
            return Err(self.refuse(why));
        }
        self.create()
    }

    /// The log has transactions.
    pub(super) fn keep_local(
        &self,
        content: Option<&Content<'_>>,
        existing: Option<(Mark, MarkState)>,
        wal: Option<(&dyn BaseFile, &WalSurvey)>,
    ) -> Result<Next, Refusal> {
        let in_flight = existing
            .as_ref()
            .is_some_and(|(_, state)| state.in_flight.is_some());
        match content {
            None if in_flight => self.hydrate(existing, wal),
            None => {
                let line = format!("{}: begins again, empty", self.path.display());
                (self.surroundings.log)(LogLevel::Info, &line);
                self.create()
            }
            Some(content) if in_flight || self.is_level(content, existing.as_ref(), wal)? => {
                self.compare(content, existing, wal)
            }
            Some(content) => self.adopt(content, wal, existing),
        }
    }

    /// Whether the mark says that the file is what the log's last transaction left, and the file is
    /// what the mark says.
    fn is_level(
        &self,
        content: &Content<'_>,
        existing: Option<&(Mark, MarkState)>,
        wal: Option<(&dyn BaseFile, &WalSurvey)>,
    ) -> Result<bool, Refusal> {
        let (Some((mark, state)), Some(end)) = (existing, self.log.last_transaction) else {
            return Ok(false);
        };
        let Some(last) = state
            .last
            .filter(|last| (last.position, last.checksum) == (end.position, end.commit.checksum))
        else {
            return Ok(false);
        };
        Ok(
            self.looks_as_marked(mark, state, &last, super::committed_end(wal))?
                || content.is_as_marked(&last, &mark.page_table())?,
        )
    }
}
