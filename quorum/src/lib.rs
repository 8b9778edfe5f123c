//! The quorum log of one database: the [`Primary`] and [`Replica`] state machines.
//!
//! Plain structs, fed with events and polled for effects. No I/O, no clock, no async, no threads,
//! no randomness: the driver owns all of these, and the same events always give the same effects.
//! `docs/protocol.md` tells the exchanges; the rules are Raft's, with a proposer that stores
//! nothing that counts and voters that never lead.
//!
//! Invariants are asserted in release builds, with every lsn and epoch involved: a node that stops
//! is better than one that lies.

#![forbid(unsafe_code)]

mod error;
mod history;
mod membership;
mod primary;
mod replica;

pub use error::ProtocolViolation;
pub use history::{History, InvalidHistory};
pub use membership::{held_lsn, holds_quorum, quorum_lsn};
pub use primary::{
    LocalLog, NodeProgress, Primary, PrimaryEffect, PrimaryState, ReplaceRefused, Replacement,
};
pub use replica::{AppendVerdict, Replica, ReplicaEffect, ReplicaState};
