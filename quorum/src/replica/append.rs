//! Which parts a replica takes: in order, without gaps, only from the epoch it promised, and where
//! its log parts from the primary's, cut there.

use super::{AppendVerdict, OpenEntry, Replica};
use crate::error::ProtocolViolation;
use crate::history::History;
use durovfs_wire::peer::RejectReason;
use durovfs_wire::{Epoch, LogPosition, Lsn, PartHeader};

const WRITE: AppendVerdict = AppendVerdict::Write {
    truncate_after: None,
    restart_at: None,
};

/// The facts of an append beside the part.
#[derive(Clone, Copy)]
struct Append<'a> {
    previous: LogPosition,
    part: &'a PartHeader,
    archive_lsn: Lsn,
}

impl Replica {
    /// Decides over one part of an entry, sent by a primary of `epoch`. With
    /// [`AppendVerdict::Write`] the part counts as written, and the driver must write it.
    ///
    /// # Errors
    /// When the primary broke the protocol; nothing was changed.
    pub fn check_append(
        &mut self,
        generation: u32,
        epoch: Epoch,
        previous: LogPosition,
        part: &PartHeader,
        commit_lsn: Lsn,
        archive_lsn: Lsn,
    ) -> Result<AppendVerdict, ProtocolViolation> {
        self.check_header(epoch, previous, part, commit_lsn, archive_lsn)?;
        if let Some(message) = &self.trouble {
            let reason = RejectReason::Storage {
                message: message.clone(),
            };
            return Ok(AppendVerdict::Reject(reason));
        }
        if self.pending.is_some() || epoch != self.promised || self.primary.is_none() {
            // Without a claim since the start it is not known who is to hear the acks; the primary
            // claims again when it hears of an epoch that is not above its own.
            let reason = RejectReason::Fenced {
                promised: self.promised(),
            };
            return Ok(AppendVerdict::Reject(reason));
        }
        // Also when the membership was not told yet: once an entry is acked, the disk must say who
        // votes in its epoch.
        if generation == 0 || generation != self.generation() {
            let reason = RejectReason::Generation {
                current: self.generation(),
            };
            return Ok(AppendVerdict::Reject(reason));
        }
        let append = Append {
            previous,
            part,
            archive_lsn,
        };
        let verdict = if part.part == 0 {
            self.take_first(append)?
        } else {
            self.take_next(append)
        };
        if let AppendVerdict::Write {
            truncate_after,
            restart_at,
        } = &verdict
        {
            if let Some(after) = truncate_after {
                self.truncate(*after);
            }
            if let Some(at) = restart_at {
                self.restart(*at);
            }
            self.note_written(append);
        }
        if !matches!(verdict, AppendVerdict::Reject(_)) {
            self.hear_progress(commit_lsn, archive_lsn);
        }
        Ok(verdict)
    }

    fn check_header(
        &self,
        epoch: Epoch,
        previous: LogPosition,
        part: &PartHeader,
        commit_lsn: Lsn,
        archive_lsn: Lsn,
    ) -> Result<(), ProtocolViolation> {
        if part.database != self.database {
            return Err(ProtocolViolation::Database {
                expected: self.database,
                got: part.database,
            });
        }
        let zero_matches = (previous.lsn == Lsn::ZERO) == (previous.epoch == Epoch::ZERO);
        let in_order = part.lsn.previous() == Some(previous.lsn)
            && previous.epoch <= part.epoch
            && part.epoch > Epoch::ZERO
            && part.epoch <= epoch;
        if !zero_matches || !in_order || archive_lsn > commit_lsn {
            return Err(ProtocolViolation::malformed(format!(
                "append in epoch={epoch} of {} after {previous}, commit_lsn={commit_lsn}, \
                 archive_lsn={archive_lsn}",
                part.position()
            )));
        }
        Ok(())
    }

    fn take_next(&mut self, append: Append<'_>) -> AppendVerdict {
        let position = append.part.position();
        match self.open {
            Some(open)
                if open.position == position
                    && open.previous == append.previous
                    && open.next_part == append.part.part =>
            {
                WRITE
            }
            _ if self.holds(position) => AppendVerdict::Duplicate,
            _ => AppendVerdict::Reject(RejectReason::Gap { last: self.last }),
        }
    }

    fn take_first(&mut self, append: Append<'_>) -> Result<AppendVerdict, ProtocolViolation> {
        let position = append.part.position();
        if position.lsn <= self.last.lsn {
            match self.history.epoch_at(position.lsn) {
                Some(held) if held == position.epoch => {
                    self.note_matched(position.lsn);
                    // It may be fed anew because the ack of it was lost.
                    self.ack_due = true;
                    return Ok(AppendVerdict::Duplicate);
                }
                // Below what the history tells, all is archived, so it is the same entry.
                None if position.lsn <= self.archive_lsn() => {
                    self.ack_due = true;
                    return Ok(AppendVerdict::Duplicate);
                }
                _ => {}
            }
            if position.lsn <= self.commit_lsn {
                return Err(self.conflict(append));
            }
        }
        if self.holds(append.previous) {
            return self.refuse_run_too_many(append.part.epoch).map_or_else(
                || {
                    let conflict = position.lsn <= self.last.lsn;
                    Ok(AppendVerdict::Write {
                        truncate_after: conflict.then_some(append.previous),
                        restart_at: None,
                    })
                },
                |reason| Ok(AppendVerdict::Reject(reason)),
            );
        }
        // The entries between are archived, and the primary may not have them any more.
        if append.previous.lsn <= append.archive_lsn {
            if append.previous.lsn <= self.commit_lsn {
                return Err(self.conflict(append));
            }
            return Ok(AppendVerdict::Write {
                truncate_after: None,
                restart_at: Some(append.previous),
            });
        }
        Ok(AppendVerdict::Reject(RejectReason::Gap { last: self.last }))
    }

    /// Whether the log holds this entry, as far as its history tells.
    fn holds(&self, position: LogPosition) -> bool {
        position.lsn <= self.last.lsn
            && self.history.position_at(position.lsn).map_or_else(
                || position.lsn <= self.archive_lsn(),
                |held| held == position,
            )
    }

    fn refuse_run_too_many(&self, epoch: Epoch) -> Option<RejectReason> {
        let new_run = self
            .history
            .runs()
            .last()
            .is_some_and(|run| run.epoch < epoch);
        (new_run && self.history.is_full()).then(|| RejectReason::Storage {
            message: format!(
                "{} epochs since the last archived entry: nothing is taken until the archive moves",
                self.history.runs().len()
            ),
        })
    }

    fn conflict(&self, append: Append<'_>) -> ProtocolViolation {
        ProtocolViolation::malformed(format!(
            "append of {} after {} would cut a committed entry: commit_lsn={}, last {}, promised \
             epoch={}, runs {:?}",
            append.part.position(),
            append.previous,
            self.commit_lsn,
            self.last,
            self.promised,
            self.history.runs()
        ))
    }

    fn truncate(&mut self, after: LogPosition) {
        assert!(
            after.lsn >= self.commit_lsn,
            "cut after {after} below commit_lsn={}, last {}, promised epoch={}",
            self.commit_lsn,
            self.last,
            self.promised
        );
        assert!(
            after.lsn >= self.matched_lsn,
            "cut after {after} below matched lsn={}, last {}, promised epoch={}",
            self.matched_lsn,
            self.last,
            self.promised
        );
        self.history.truncate_after(after.lsn);
        self.written_under.truncate_after(after.lsn);
        self.last = after;
        self.flush_lsn = self.flush_lsn.min(after.lsn);
    }

    fn restart(&mut self, at: LogPosition) {
        assert!(
            at.lsn > self.commit_lsn,
            "restart at {at} not above commit_lsn={}, last {}, promised epoch={}",
            self.commit_lsn,
            self.last,
            self.promised
        );
        self.history = History::default();
        self.history.note_entry(at);
        self.written_under = History::default();
        self.last = at;
        self.first_lsn = at.lsn.next();
        // Nothing of it has to be on this disk: the archive has it, and it is committed.
        self.flush_lsn = at.lsn;
    }

    fn note_written(&mut self, append: Append<'_>) {
        let position = append.part.position();
        assert_eq!(
            position.lsn,
            self.last.lsn.next(),
            "writes {position} after {}, promised epoch={}",
            self.last,
            self.promised
        );
        self.note_matched(append.previous.lsn);
        if !append.part.is_last() {
            let next_part = append.part.part.saturating_add(1);
            self.open = Some(OpenEntry {
                position,
                previous: append.previous,
                next_part,
            });
            return;
        }
        self.open = None;
        self.history.note_entry(position);
        self.written_under
            .note_entry(LogPosition::new(self.promised, position.lsn));
        self.last = position;
        self.note_matched(position.lsn);
    }

    fn note_matched(&mut self, lsn: Lsn) {
        self.matched_lsn = self.matched_lsn.max(lsn);
    }

    /// A part is synced, and with it all that was written before. `epoch` is the epoch that was
    /// promised when [`Self::check_append`] told to write it. Raises flush_lsn when the part
    /// completed its entry, unless the entry has been cut since.
    pub fn handle_part_persisted(&mut self, position: LogPosition, epoch: Epoch, complete: bool) {
        let lsn = position.lsn;
        // An entry that was cut and came again is another write, told by the promise it was under.
        let current = lsn <= self.last.lsn
            && self.history.epoch_at(lsn) == Some(position.epoch)
            && self.written_under.epoch_at(lsn) == Some(epoch);
        if self.trouble.is_some() || !complete || !current || lsn <= self.flush_lsn {
            return;
        }
        self.flush_lsn = lsn;
        self.written_under.forget_below(lsn);
        self.ack_due = true;
        self.raise_commit();
    }
}
