//! The epochs of one log, run by run, and where two logs part. Pure data.

use durovfs_wire::peer::MAX_HISTORY_RUNS;
use durovfs_wire::{Epoch, EpochRun, LogPosition, Lsn};

/// The epoch runs of one log, oldest first. Both epochs and positions rise from run to run.
///
/// Two entries of the same epoch and lsn are the same entry, and so are all before them: one
/// primary per epoch writes them, in order. So two logs are compared run by run, not entry by
/// entry. A history does not know where the log ends; that is the owner's `last`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Hash)]
pub struct History {
    runs: Vec<EpochRun>,
}

/// The runs do not rise, or are too many.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidHistory {
    /// A run does not come after the one before it.
    #[error("run of epoch={epoch} at lsn={first_lsn} does not come after the run before it")]
    Order {
        /// The run's epoch.
        epoch: Epoch,
        /// Its first entry.
        first_lsn: Lsn,
    },
    /// More runs than a promise may carry.
    #[error("{0} runs, at most {MAX_HISTORY_RUNS} are allowed")]
    TooLong(usize),
}

impl History {
    /// Takes runs that were read from disk or from the network.
    ///
    /// # Errors
    /// When epochs or positions do not rise from run to run, or there are too many.
    pub fn from_runs(runs: &[EpochRun]) -> Result<Self, InvalidHistory> {
        if runs.len() > MAX_HISTORY_RUNS {
            return Err(InvalidHistory::TooLong(runs.len()));
        }
        let mut before = EpochRun {
            epoch: Epoch::ZERO,
            first_lsn: Lsn::ZERO,
        };
        for run in runs {
            if run.epoch <= before.epoch || run.first_lsn <= before.first_lsn {
                return Err(InvalidHistory::Order {
                    epoch: run.epoch,
                    first_lsn: run.first_lsn,
                });
            }
            before = *run;
        }
        Ok(Self {
            runs: runs.to_vec(),
        })
    }

    /// Adds a run at the end.
    ///
    /// # Panics
    /// When it does not come after the last one, or when the history is over-full: it may be one
    /// longer than a promise carries, for a primary's own epoch start, which no replica then takes.
    pub fn push(&mut self, run: EpochRun) {
        let before = self.runs.last().copied().unwrap_or(EpochRun {
            epoch: Epoch::ZERO,
            first_lsn: Lsn::ZERO,
        });
        assert!(
            run.epoch > before.epoch && run.first_lsn > before.first_lsn,
            "history run epoch={} lsn={} after run epoch={} lsn={}",
            run.epoch,
            run.first_lsn,
            before.epoch,
            before.first_lsn
        );
        assert!(
            self.runs.len() <= MAX_HISTORY_RUNS,
            "history of {} runs, pushed epoch={} lsn={}",
            self.runs.len(),
            run.epoch,
            run.first_lsn
        );
        self.runs.push(run);
    }

    /// Whether a promise could not carry one run more.
    pub fn is_full(&self) -> bool {
        self.runs.len() >= MAX_HISTORY_RUNS
    }

    /// Epoch of the entry at this position, if the history reaches back to it. The caller has
    /// checked that the log reaches up to it.
    pub fn epoch_at(&self, lsn: Lsn) -> Option<Epoch> {
        self.runs
            .iter()
            .rev()
            .find(|run| run.first_lsn <= lsn)
            .map(|run| run.epoch)
    }

    /// The whole position of the entry at this lsn; that of lsn zero is before the first entry.
    pub fn position_at(&self, lsn: Lsn) -> Option<LogPosition> {
        if lsn == Lsn::ZERO {
            return Some(LogPosition::ZERO);
        }
        self.epoch_at(lsn).map(|epoch| LogPosition::new(epoch, lsn))
    }

    /// Forgets the runs that begin after this lsn: the log was cut there.
    pub fn truncate_after(&mut self, lsn: Lsn) {
        while self.runs.last().is_some_and(|run| run.first_lsn > lsn) {
            self.runs.pop();
        }
    }

    /// Forgets the runs that end before this lsn. The run that holds it stays, with its own first
    /// lsn, so that the epoch of the entry at `lsn` remains known.
    pub fn forget_below(&mut self, lsn: Lsn) {
        let keep_from = self
            .runs
            .iter()
            .rposition(|run| run.first_lsn <= lsn)
            .unwrap_or(0);
        self.runs.drain(..keep_from);
    }

    /// The highest position that both logs hold, as far as both histories reach back;
    /// [`LogPosition::ZERO`] when they share none.
    pub fn common_point(
        &self,
        own_last: LogPosition,
        other: &[EpochRun],
        other_last: LogPosition,
    ) -> LogPosition {
        for (index, run) in self.runs.iter().enumerate().rev() {
            let Some(other_index) = other.iter().position(|entry| entry.epoch == run.epoch) else {
                continue;
            };
            let end =
                run_end(&self.runs, index, own_last).min(run_end(other, other_index, other_last));
            if end >= run.first_lsn.max(other[other_index].first_lsn) {
                return LogPosition::new(run.epoch, end);
            }
        }
        LogPosition::ZERO
    }

    /// Follows `other` after `from`: own runs up to `from` stay, those of `other` after it are
    /// added.
    pub(crate) fn adopt_after(&mut self, from: LogPosition, other: &[EpochRun]) {
        self.truncate_after(from.lsn);
        for run in other.iter().filter(|run| run.first_lsn > from.lsn) {
            self.push(*run);
        }
    }

    /// Notes an entry written at the end of the log; a new epoch begins a run.
    pub(crate) fn note_entry(&mut self, position: LogPosition) {
        if self
            .runs
            .last()
            .is_none_or(|run| run.epoch != position.epoch)
        {
            self.push(EpochRun {
                epoch: position.epoch,
                first_lsn: position.lsn,
            });
        }
    }

    /// The runs, oldest first.
    pub fn runs(&self) -> &[EpochRun] {
        &self.runs
    }
}

fn run_end(runs: &[EpochRun], index: usize, last: LogPosition) -> Lsn {
    let next = runs
        .get(index + 1)
        .and_then(|next| next.first_lsn.previous());
    next.map_or(last.lsn, |end| end.min(last.lsn))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(word: &str) -> EpochRun {
        let (epoch, lsn) = word.split_once('@').unwrap();
        EpochRun {
            epoch: Epoch::new(epoch.parse().unwrap()),
            first_lsn: Lsn::new(lsn.parse().unwrap()),
        }
    }

    /// `1@1 3@8 ..12`: runs, then the last lsn.
    fn log(text: &str) -> (History, LogPosition) {
        let (runs, last) = text.split_once("..").unwrap();
        let runs: Vec<_> = runs.split_whitespace().map(run).collect();
        let history = History::from_runs(&runs).unwrap();
        let last = history
            .position_at(Lsn::new(last.trim().parse().unwrap()))
            .unwrap();
        (history, last)
    }

    // If this failed, a replica would be fed from the wrong place: a divergent entry would stay in
    // its log, or a committed one would be cut.
    #[test]
    fn common_points_follow_the_golden_table() {
        let table = include_str!("../testdata/common_point.txt");
        let mut row_count = 0;
        for line in table
            .lines()
            .filter(|line| !line.is_empty() && !line.starts_with('#'))
        {
            let (logs, expected) = line.split_once("=>").unwrap();
            let (left, right) = logs.split_once('|').unwrap();
            let ((left, left_last), (right, right_last)) = (log(left), log(right));
            let got = left.common_point(left_last, right.runs(), right_last);
            let swapped = right.common_point(right_last, left.runs(), left_last);
            assert_eq!(got, swapped, "not symmetric: {line}");
            assert_eq!(
                format!("{}@{}", got.epoch, got.lsn),
                expected.trim(),
                "{line}"
            );
            row_count += 1;
        }
        assert!(row_count >= 12, "the table has {row_count} rows");
    }

    // If this failed, the epoch of an entry would be told wrong after a cut or after archiving.
    #[test]
    fn cutting_and_forgetting_keep_the_epochs_of_the_rest() {
        let (mut history, _) = log("1@1 3@8 4@20 ..30");
        history.truncate_after(Lsn::new(19));
        assert_eq!(history.runs(), [run("1@1"), run("3@8")]);
        history.forget_below(Lsn::new(8));
        assert_eq!(history.runs(), [run("3@8")]);
        history.forget_below(Lsn::new(15));
        assert_eq!(history.epoch_at(Lsn::new(15)), Some(Epoch::new(3)));
        assert_eq!(history.epoch_at(Lsn::new(7)), None);
        history.truncate_after(Lsn::new(7));
        assert_eq!(history.runs(), []);
    }

    // If this failed, a damaged promise would be believed and the log recovered from it.
    #[test]
    fn runs_that_do_not_rise_are_refused() {
        for bad in [
            &["1@1", "1@5"][..],
            &["2@1", "1@5"],
            &["1@5", "2@5"],
            &["0@1"],
            &["1@0"],
        ] {
            let runs: Vec<_> = bad.iter().map(|word| run(word)).collect();
            assert!(History::from_runs(&runs).is_err(), "{bad:?}");
        }
        let long: Vec<_> = (1..=MAX_HISTORY_RUNS as u32 + 1)
            .map(|n| EpochRun {
                epoch: Epoch::new(n),
                first_lsn: Lsn::new(u64::from(n)),
            })
            .collect();
        assert!(History::from_runs(&long).is_err());
        assert!(History::from_runs(&long[1..]).is_ok());
    }

    // If this failed, an epoch could begin below an older one and identity would be lost.
    #[test]
    #[should_panic(expected = "history run epoch=3 lsn=9 after run epoch=3 lsn=8")]
    fn a_run_cannot_be_pushed_twice() {
        let (mut history, _) = log("1@1 3@8 ..12");
        history.push(run("3@9"));
    }
}
