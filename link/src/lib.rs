//! Links: QUIC connections with mutual TLS 1.3, and streams of frames on them.
//!
//! The only crate that knows quinn and rustls. It moves [`durovfs_wire::Frame`]s and tells who the
//! peer is; what the messages mean, and what a peer may do, is decided elsewhere. It never
//! reconnects: a lost connection is an error, and its owner makes the next one.

#![forbid(unsafe_code)]

pub mod authority;
mod endpoint;
mod error;
mod identity;
mod role;
mod socket;
mod stream;
mod transport;

pub use endpoint::{Connection, Endpoint, Incoming};
pub use error::LinkError;
pub use identity::{Identity, IdentityError};
pub use role::PeerRole;
pub use stream::{FrameReceiver, FrameSender};
pub use transport::{IDLE_TIMEOUT, KEEP_ALIVE_INTERVAL, MAX_STREAMS, Profile};

/// Application protocol of every link; the number changes with what the handshake means.
pub(crate) const ALPN: &[u8] = b"durovfs/1";

#[cfg(test)]
mod tests;
