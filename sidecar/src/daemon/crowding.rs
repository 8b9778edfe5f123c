//! Journals that fill up, because the archive does not take what is committed: commits are slowed,
//! so that whoever writes notices while there is time, and then refused. Nothing is lost.

use super::node::Node;
use super::primary::{CommitWaiter, PrimaryDatabase, answer_commit};
use durovfs_wire::DatabaseId;
use durovfs_wire::client::CommitOutcome;
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// From here on commits are slowed: with the default limit some 800 MB are left.
const SLOW_FROM_PERCENT: u8 = 80;
/// From here on they are refused. What is left is for what is in flight and for catching up.
const REFUSE_FROM_PERCENT: u8 = 95;
/// How long the answer to a commit is held back just before commits are refused; rises from zero.
/// Far below the time that a client gives a commit.
const DELAY_MAX: Duration = Duration::from_millis(500);

/// How full the journals are that a database needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Crowding {
    /// Our own.
    own_percent: u8,
    /// The fullest of the emptiest quorum: with less room than that, no quorum takes an entry.
    quorum_percent: u8,
}

impl Crowding {
    fn percent(self) -> u8 {
        self.own_percent.max(self.quorum_percent)
    }

    fn whose(self) -> &'static str {
        if self.own_percent >= self.quorum_percent {
            "the primary's journal is"
        } else {
            "the replicas' journals are"
        }
    }

    /// Why no commit is taken, if so.
    pub fn refusal(self) -> Option<String> {
        (self.percent() >= REFUSE_FROM_PERCENT)
            .then(|| format!("{} full: is the archive reachable?", self.whose()))
    }

    /// How long answers to commits are held back.
    pub fn delay(self) -> Duration {
        let above = u32::from(self.percent().saturating_sub(SLOW_FROM_PERCENT));
        let range = u32::from(REFUSE_FROM_PERCENT - SLOW_FROM_PERCENT);
        DELAY_MAX * above.min(range) / range
    }

    /// What a person should look at.
    pub fn warning(self) -> Option<String> {
        let (whose, percent) = (self.whose(), self.percent());
        let commits = if self.refusal().is_some() {
            "refused"
        } else if !self.delay().is_zero() {
            "slowed"
        } else {
            return None;
        };
        Some(format!(
            "{whose} {percent} % full, commits are {commits}: is the archive reachable?"
        ))
    }
}

/// Answers that are held back, in the order of their commits.
#[derive(Default)]
pub struct HeldAnswers(VecDeque<HeldAnswer>);

struct HeldAnswer {
    due: Instant,
    database: DatabaseId,
    waiters: Vec<CommitWaiter>,
    outcome: CommitOutcome,
}

impl HeldAnswers {
    /// Answers after a delay, and never before an answer that is held already. How many there are
    /// is bounded by the commits that clients may have without an answer.
    pub fn answer(
        &mut self,
        delay: Duration,
        database: DatabaseId,
        waiters: Vec<CommitWaiter>,
        outcome: CommitOutcome,
    ) {
        if delay.is_zero() && self.0.is_empty() {
            return answer_commit(database, waiters, &outcome);
        }
        self.0.push_back(HeldAnswer {
            due: Instant::now() + delay,
            database,
            waiters,
            outcome,
        });
    }

    /// Sends what is due; all of it without a time.
    pub fn release(&mut self, now: Option<Instant>) {
        let due = |held: &mut HeldAnswer| now.is_none_or(|now| held.due <= now);
        while let Some(held) = self.0.pop_front_if(due) {
            answer_commit(held.database, held.waiters, &held.outcome);
        }
    }

    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl Node {
    /// How full the journals are that this database needs.
    pub fn crowding(&self, db: &PrimaryDatabase) -> Crowding {
        let quorum = self.config.ack_quorum;
        let peers = db.feeds.keys().filter_map(|node| self.peers.get(node));
        let mut percents: Vec<u8> = peers.map(|peer| peer.journal_percent).collect();
        percents.sort_unstable();
        Crowding {
            own_percent: self.own_percent,
            quorum_percent: percents.get(quorum.saturating_sub(1)).copied().unwrap_or(0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // If this failed, journals would run full without a sign, or commits would be slow for nothing.
    #[test]
    fn commits_are_slowed_before_they_are_refused() {
        let at = |own_percent, quorum_percent| Crowding {
            own_percent,
            quorum_percent,
        };
        assert_eq!(
            (at(80, 79).delay(), at(80, 79).warning()),
            (Duration::ZERO, None)
        );
        let delays: Vec<_> = (80..95).map(|percent| at(0, percent).delay()).collect();
        assert!(delays.is_sorted() && delays[14] > delays[1], "{delays:?}");
        assert!((81..95).all(|percent| at(percent, 0).refusal().is_none()));
        let slowed = at(3, 90).warning().unwrap_or_default();
        assert!(
            slowed.contains("replicas' journals") && slowed.contains("slowed"),
            "{slowed}"
        );
        let refused = at(97, 90);
        assert!(
            refused
                .refusal()
                .is_some_and(|reason| reason.contains("primary's journal"))
        );
        assert_eq!(refused.delay(), DELAY_MAX);
    }
}
