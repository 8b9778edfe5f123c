//! Following the log while the database is open in rollback mode: a commit that the quorum has and
//! the file lacks, because the process that made it died, or never learned what became of it.
//!
//! Found when a transaction begins to write, when SQLite has read the file already and others may
//! be reading it: nothing can be changed under their feet. So the writer is told to try again, and
//! when this connection takes its next lock from none, it does first what opening does.

use super::{Next, Opener, open_log};
use crate::connection::Connection;
use crate::error::Refusal;
use crate::file::DatabaseFile;
use std::time::Instant;

/// How often the file is looked at again in one go: a journal to play back, a log that must be
/// asked anew, and room for one more of each. Whatever is left is found by the next transaction.
const MOST_LOOKS: usize = 4;

impl Connection {
    /// The database file is about to be locked, and no lock is held. What goes wrong here is in the
    /// log; whoever reads goes on, and whoever writes is told when the transaction begins.
    pub(crate) fn before_shared_lock(&mut self) {
        if !std::mem::take(&mut self.must_follow) || self.poisoned.is_some() {
            return;
        }
        if let Err(refusal) = self.follow() {
            self.noted(refusal);
        }
    }

    fn follow(&mut self) -> Result<(), Refusal> {
        let deadline = Instant::now() + self.surroundings.open_timeout;
        for _ in 0..MOST_LOOKS {
            let name = self.mark.name().to_owned();
            let held = Some(self.mark.read()?);
            let known = Some(self.database_id);
            let (surroundings, path) = (&self.surroundings, &self.path);
            let log = open_log(surroundings, &name, known, path, deadline, false)?;
            let file: &dyn DatabaseFile = self.database.as_ref();
            if !file.try_lock_exclusive()? {
                return Ok(());
            }
            let opener = Opener {
                surroundings,
                path,
                name: &name,
                file,
                log,
                held,
            };
            let result = opener.run();
            file.unlock_all();
            match result? {
                Next::Ready(mark, epoch) => {
                    self.table = mark.page_table();
                    self.mark = mark;
                    self.epoch = epoch;
                    return Ok(());
                }
                Next::RecoverJournal => file.recover_journal()?,
                Next::Again => {}
            }
        }
        Ok(())
    }
}
