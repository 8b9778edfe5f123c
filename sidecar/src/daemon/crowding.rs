//! Journals that fill up, because the archive does not take what is committed: commits are slowed,
//! so that whoever writes notices while there is time, and then refused. Nothing is lost.

use super::node::Node;
use super::peers::Peer;
use super::primary::{CommitWaiter, PrimaryDatabase, answer_commit};
use durovfs_wire::DatabaseId;
use durovfs_wire::client::CommitOutcome;
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// From here on no more pages of open transactions are taken: before commits are slowed, by more
/// than what may have been taken from the network and not be written yet.
pub const STREAM_UP_TO_PERCENT: u8 = 75;
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

/// The worst of what the best quorum of each set has: a commit needs a quorum of every set, of
/// which there are two while members change. Nodes that are not connected take nothing, and leave
/// it to the others; where these are no quorum nothing follows.
fn of_quorums<T: Ord + Copy>(
    sets: impl Iterator<Item = Vec<T>>,
    quorum: usize,
    best_first: impl Fn(&T, &T) -> std::cmp::Ordering + Copy,
) -> Option<T> {
    let worst = sets.filter_map(|mut set| {
        set.sort_unstable_by(best_first);
        set.get(quorum.checked_sub(1)?).copied()
    });
    worst.max_by(best_first)
}

impl Node {
    /// How full the journals are that this database needs.
    pub fn crowding(&self, db: &PrimaryDatabase) -> Crowding {
        let quorum = db.machine.membership().ack_quorum;
        let percents = self.of_sets(db, |peer| peer.journal_percent);
        Crowding {
            own_percent: self.own_percent,
            quorum_percent: of_quorums(percents, quorum, u8::cmp).unwrap_or(0),
        }
    }

    /// Bytes that an open transaction may have, so that it leaves room in the journals of a quorum.
    pub fn stream_room_bytes(&self, db: &PrimaryDatabase) -> u64 {
        let quorum = db.machine.membership().ack_quorum;
        let rooms = self.of_sets(db, |peer| match peer.journal_limit_bytes {
            0 => u64::MAX,
            limit_bytes => {
                let percent = STREAM_UP_TO_PERCENT.saturating_sub(peer.journal_percent);
                limit_bytes / 100 * u64::from(percent)
            }
        });
        let largest_first = |a: &u64, b: &u64| b.cmp(a);
        of_quorums(rooms, quorum, largest_first).unwrap_or(u64::MAX)
    }

    /// Something of each connected member, by set of members.
    fn of_sets<T>(
        &self,
        db: &PrimaryDatabase,
        told: impl Fn(&Peer) -> T + Copy,
    ) -> impl Iterator<Item = Vec<T>> {
        db.machine.membership().sets().map(move |set| {
            let peers = set.iter().filter_map(|member| self.peers.get(&member.node));
            let connected = peers.filter(|peer| peer.link.is_some());
            connected.map(told).collect()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // If this failed, one of two quorums would run full while members change, or a node that is
    // away would pass for one with room.
    #[test]
    fn a_commit_needs_room_in_a_quorum_of_every_set() {
        let percent = |sets: &[&[u8]], quorum| {
            let sets = sets.iter().map(|set| set.to_vec());
            of_quorums(sets, quorum, u8::cmp)
        };
        assert_eq!(percent(&[&[97, 10, 96, 20, 30]], 3), Some(30));
        // Two of five are away: all three others are needed.
        assert_eq!(percent(&[&[97, 10, 20]], 3), Some(97));
        let joint: [&[u8]; 2] = [&[97, 10, 10, 20, 96], &[97, 10, 96, 20, 95]];
        assert_eq!(percent(&joint, 3), Some(95));
        assert_eq!(percent(&[&[97, 97]], 3), None);
        let rooms = [vec![5u64, 900, 700], vec![5, 800, 600]];
        let room = of_quorums(rooms.into_iter(), 2, |a, b| b.cmp(a));
        assert_eq!(room, Some(600));
    }

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
