//! Carrying out what `durovfs resolve --keep local` decided: the local file becomes the log's next
//! transaction, as a whole image. The decision stands in a file beside the database until that is
//! done, so that a crash anywhere leaves it to the next open.

use super::{Next, Opener, SurveyedWal, committed_end};
use crate::connection::LogLevel;
use crate::deferred;
use crate::error::Refusal;
use crate::mark::{KnownTransaction, MarkState, with_suffix};
use crate::survey::{Content, is_not_empty};
use durovfs_wire::LogPosition;
use durovfs_wire::resolution::{RESOLUTION_SUFFIX, Resolution};
use std::path::Path;

/// The decision that waits beside a database; none when nobody decided anything.
///
/// # Errors
/// When it cannot be read.
pub(super) fn pending(database_path: &Path) -> Result<Option<Resolution>, Refusal> {
    let path = with_suffix(database_path, RESOLUTION_SUFFIX);
    match std::fs::read(&path) {
        Ok(bytes) => Resolution::decode(&bytes).map(Some).map_err(|error| {
            Refusal::cannot_open(format!(
                "{}: {error}; remove it, and decide again with `durovfs resolve`",
                path.display()
            ))
        }),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Refusal::io("read", &path, &error)),
    }
}

impl Opener<'_> {
    /// The mark counts no more: what it says of the file was true of another one.
    pub(super) fn carry_out(&self, resolution: &Resolution) -> Result<Next, Refusal> {
        let wal = self.survey_wal()?;
        let wal = wal.as_ref().map(SurveyedWal::parts);
        let Some(content) = Content::new(self.file, wal)? else {
            return Err(self.refuse("the local file was to be kept, and is empty"));
        };
        let end = self.log.last_transaction.map(|last| KnownTransaction {
            position: last.position,
            checksum: last.commit.checksum,
            page_size: last.commit.page_size,
            page_count: last.commit.page_count,
        });
        let position = end.map_or(LogPosition::ZERO, |last| last.position);
        let (checksum, pages) = content.checksums(None, &is_not_empty)?;
        let found = (
            checksum,
            content.header.page_size,
            content.header.page_count,
        );
        let next = match end {
            // An open that was cut short had got that far.
            Some(last) if found == (last.checksum, last.page_size, last.page_count) => {
                let state = MarkState {
                    last: Some(last),
                    wal: committed_end(wal),
                    ..MarkState::new(self.log.database)
                };
                self.ready(self.rewrite_mark(None, &state, &pages)?)?
            }
            _ if (self.log.database, position) != (resolution.database, resolution.given_up) => {
                return Err(self.refuse(&format!(
                    "the local file was to be kept instead of {}, and the log is at {position} now",
                    resolution.given_up
                )));
            }
            _ => self.adopt(&content, wal, None)?,
        };
        if matches!(next, Next::Ready(..)) {
            // Deferred commits that were lost are in the file that was kept.
            deferred::forget(self.log.database);
            let path = with_suffix(self.path, RESOLUTION_SUFFIX);
            std::fs::remove_file(&path).map_err(|e| Refusal::io("remove", &path, &e))?;
            let line = format!("{}: the local file was kept", self.path.display());
            (self.surroundings.log)(LogLevel::Info, &line);
        }
        Ok(next)
    }
}
