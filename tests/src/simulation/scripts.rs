//! What happens in the runs that leave nothing to chance but delays: step by step.

use super::World;
use super::schedule::Event;
use super::settings::{Micros, Script};

/// Longer than any script: a link that is cut for so long is joined when all is healed.
const TO_THE_END: Micros = 5_000_000;

impl World {
    pub(super) fn script(&mut self, step: usize) {
        let next = match self.settings.script {
            Some(Script::Everything) => self.everything(step),
            Some(Script::PromiserRestarts) => self.promiser_restarts(step),
            Some(Script::DisksAreLost) => self.disks_are_lost(step),
            Some(Script::OldQuorumIsUnaware) => self.old_quorum_is_unaware(step),
            None => None,
        };
        if let Some(after) = next {
            self.schedule.after(after, Event::Script { step: step + 1 });
        }
    }

    fn everything(&mut self, step: usize) -> Option<Micros> {
        match step {
            0 => {
                // What is sent is not answered, and buried.
                (0..3).for_each(|node| self.silence(0, node, 1, 400_000));
                Some(500_000)
            }
            1 => {
                self.crash_node(4, false);
                Some(100_000)
            }
            2 => {
                self.take_over(1, 0);
                Some(150_000)
            }
            3 => {
                self.crash_host(0, true);
                Some(100_000)
            }
            4 => {
                self.crash_node(2, true);
                Some(100_000)
            }
            5 => {
                self.replace(1, 0, 3, 5);
                Some(200_000)
            }
            _ => None,
        }
    }

    /// Host 1 is promised an epoch by the replicas 2, 3 and 4; then 4 is back without power for a
    /// moment, and host 0, which never heard of that, reaches it, 0 and 1.
    fn promiser_restarts(&mut self, step: usize) -> Option<Micros> {
        match step {
            0 => {
                (2..5).for_each(|node| self.cut_link(0, node, 60_000));
                (0..2).for_each(|node| self.cut_link(1, node, TO_THE_END));
                Some(2_000)
            }
            1 => {
                self.take_over(1, 0);
                self.apps[0][0].wants_open = true;
                Some(9_000)
            }
            2 => {
                self.crash_node(4, true);
                self.cut_link(1, 4, TO_THE_END);
                (2..4).for_each(|node| self.cut_link(0, node, TO_THE_END));
                Some(2_000)
            }
            3 => {
                self.start_node(4);
                Some(300_000)
            }
            4 => {
                self.heal_network();
                None
            }
            _ => None,
        }
    }

    /// What host 0 commits is on the replicas 0, 1 and 2; then 0 and 1 lose their disks, and host 1
    /// reaches all but 2.
    fn disks_are_lost(&mut self, step: usize) -> Option<Micros> {
        match step {
            0 => {
                (3..5).for_each(|node| self.cut_link(0, node, TO_THE_END));
                self.cut_link(1, 2, TO_THE_END);
                Some(60_000)
            }
            1 => {
                for node in 0..3 {
                    self.cut_link(0, node, TO_THE_END);
                }
                (0..2).for_each(|node| self.empty_node(node));
                Some(5_000)
            }
            2 => {
                (0..2).for_each(|node| self.start_node(node));
                self.take_over(1, 0);
                Some(400_000)
            }
            3 => {
                self.heal_network();
                None
            }
            _ => None,
        }
    }

    /// Host 0 reaches the replicas 2 and 3 and the one that joins, host 1 all others.
    fn old_quorum_is_unaware(&mut self, step: usize) -> Option<Micros> {
        match step {
            0 => {
                self.resting = true;
                Some(50_000)
            }
            1 => {
                for node in [0, 1, 4] {
                    self.cut_link(0, node, TO_THE_END);
                }
                for node in [2, 3, 5] {
                    self.cut_link(1, node, TO_THE_END);
                }
                self.replace(0, 0, 4, 5);
                Some(200_000)
            }
            2 => {
                self.resting = false;
                self.take_over(1, 0);
                Some(300_000)
            }
            3 => {
                self.heal_network();
                None
            }
            _ => None,
        }
    }
}
