//! What will happen when, and what has happened: the queue of events, and the trace of a run.

use super::settings::{Machine, Micros};
use bytes::Bytes;
use durovfs_wire::peer::{PrimaryMessage, ReplicaMessage};
use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};

/// Longest line of a printed trace.
const LINE_CHARACTERS: usize = 400;

/// One thing that will happen.
#[derive(Debug, Clone, Hash)]
#[allow(missing_docs)]
pub enum Event {
    /// A message reaches a replica.
    ToReplica {
        connection: u64,
        stream: u64,
        message: PrimaryMessage,
        payload: Bytes,
    },
    /// A message reaches a host.
    ToHost {
        connection: u64,
        stream: u64,
        message: ReplicaMessage,
        payload: Bytes,
    },
    /// A host tries to connect.
    Connect { host: usize, node: usize },
    /// A host notices that a connection is gone.
    Lost { connection: u64 },
    /// A replica reads on for a fetch.
    Answer { fetch: u64 },
    /// A journal writes what waits.
    Write { machine: Machine, life: u64 },
    /// What the journal did is heard of.
    Hear { machine: Machine, life: u64 },
    /// A journal is idle.
    Rest { machine: Machine, life: u64 },
    /// A host looks at its clocks.
    Tick { host: usize, life: u64 },
    /// An application does something.
    Application { host: usize, database: usize },
    /// A host uploads.
    Upload { host: usize, database: usize },
    /// An upload is confirmed.
    Uploaded {
        host: usize,
        life: u64,
        database: usize,
        through: u64,
    },
    /// A machine that was down starts.
    Start { machine: Machine },
    /// A full disk has room again.
    Room { node: usize },
    /// Something may go wrong.
    Mischief,
    /// A thing of the script.
    Script { step: usize },
    /// The checkers look at everything.
    Check,
}

/// The queue. Two events of one moment come in the order in which they were put in.
#[derive(Debug, Default)]
pub struct Schedule {
    events: BTreeMap<(Micros, u64), Event>,
    next_number: u64,
    /// The time.
    pub now: Micros,
}

impl Schedule {
    /// Puts an event in, `after` from now.
    pub fn after(&mut self, after: Micros, event: Event) {
        self.at(self.now + after, event);
    }

    /// Puts an event in at a time, or now if that has passed.
    pub fn at(&mut self, at: Micros, event: Event) {
        let number = self.next_number;
        self.next_number += 1;
        self.events.insert((at.max(self.now), number), event);
    }

    /// The next event, and moves the time to it.
    pub fn next(&mut self) -> Option<Event> {
        let ((at, _), event) = self.events.pop_first()?;
        self.now = at;
        Some(event)
    }
}

/// Everything that happened, as one number, and as lines where they are wanted.
#[derive(Debug, Default)]
pub struct Trace {
    hash: u64,
    verbose: bool,
}

impl Trace {
    /// A trace that prints, or not.
    pub fn new(verbose: bool) -> Self {
        Self { hash: 0, verbose }
    }

    /// Notes something.
    pub fn note<T: Hash + std::fmt::Debug>(&mut self, now: Micros, what: &T) {
        let mut hasher = DefaultHasher::new();
        (self.hash, now).hash(&mut hasher);
        what.hash(&mut hasher);
        self.hash = hasher.finish();
        if self.verbose {
            // Pages are long, and say little.
            let text: String = format!("{what:?}").chars().take(LINE_CHARACTERS).collect();
            println!("{:>10.3} ms  {text}", now as f64 / 1000.0);
        }
    }

    /// Says something to whoever reads along.
    pub fn say(&self, now: Micros, text: impl FnOnce() -> String) {
        if self.verbose {
            println!("{:>10.3} ms      {}", now as f64 / 1000.0, text());
        }
    }

    /// The number.
    pub fn hash(&self) -> u64 {
        self.hash
    }
}
