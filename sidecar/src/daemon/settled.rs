//! Which commits were settled, so that one that arrives later is refused. Pure data, bounded.

use durovfs_wire::ClientId;
use durovfs_wire::entry::Origin;
use std::collections::{BTreeMap, VecDeque};

/// Clients that are remembered per database. Needed only for messages that a broken connection
/// still delivers, a moment later.
const CLIENTS_MAX: usize = 1024;

/// The newest settled commit of each client.
#[derive(Debug, Default)]
pub struct SettledCommits {
    newest: BTreeMap<ClientId, u64>,
    /// In the order in which they came.
    clients: VecDeque<ClientId>,
}

impl SettledCommits {
    /// Commits of this client up to this one are settled from now on.
    pub fn note(&mut self, origin: Origin) {
        if let Some(newest) = self.newest.get_mut(&origin.client) {
            *newest = origin.sequence.max(*newest);
            return;
        }
        if self.clients.len() >= CLIENTS_MAX
            && let Some(oldest) = self.clients.pop_front()
        {
            self.newest.remove(&oldest);
        }
        self.clients.push_back(origin.client);
        self.newest.insert(origin.client, origin.sequence);
    }

    /// Whether it came too late.
    pub fn has(&self, origin: Origin) -> bool {
        let newest = self.newest.get(&origin.client);
        newest.is_some_and(|newest| *newest >= origin.sequence)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin(client: u16, sequence: u64) -> Origin {
        let mut bytes = [0; 16];
        // Ids are drawn at random: later ones are not larger ones.
        bytes[..2].copy_from_slice(&(!client).to_be_bytes());
        Origin {
            client: ClientId::from_bytes(bytes),
            sequence,
        }
    }

    #[test]
    fn the_clients_that_came_last_are_remembered() {
        // Broken: a commit that was settled as "not committed" could be taken when it arrives late.
        let mut settled = SettledCommits::default();
        let clients = CLIENTS_MAX as u16 + 7;
        for client in 0..clients {
            settled.note(origin(client, 5));
            settled.note(origin(client, 4));
            assert!(settled.has(origin(client, 5)) && !settled.has(origin(client, 6)));
        }
        let remembered = (0..clients).filter(|client| settled.has(origin(*client, 1)));
        assert_eq!(
            remembered.collect::<Vec<_>>(),
            (7..clients).collect::<Vec<_>>()
        );
    }
}
