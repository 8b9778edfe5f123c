//! Joining others who have the database open: they found out, when they opened it, that it is what
//! the log says. What somebody wrote since without durovfs stands in the WAL, after the place where
//! the mark says that it ends.

use super::BUSY_PAUSE;
use crate::connection::Surroundings;
use crate::error::Refusal;
use crate::mark::{Mark, MarkState, WalPosition, describe, with_suffix};
use crate::resolve::way_out;
use crate::survey::committed_after;
use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long a WAL must end elsewhere than the mark says, neither changing, before that is taken for
/// somebody else's write: between the two writes of a commit of ours there is no wait.
const FOREIGN_AFTER: Duration = Duration::from_secs(1);

/// Makes sure that nobody wrote to the WAL without durovfs.
///
/// # Errors
/// A refusal, when somebody did.
pub(super) fn check(
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
