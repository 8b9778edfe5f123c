//! What a peer may do wrong. Normal refusals are [`durovfs_wire::peer::RejectReason`], not errors;
//! what this node itself does wrong is an assert.

use durovfs_wire::DatabaseId;

/// A peer broke the protocol: close its link. Nothing of the message was taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolViolation {
    /// The message names another log.
    #[error("message for database={got}, this log is database={expected}")]
    Database {
        /// The log of this state machine.
        expected: DatabaseId,
        /// The log named.
        got: DatabaseId,
    },
    /// The message contradicts itself, the protocol, or what the peer said before.
    #[error("{0}")]
    Malformed(String),
}

impl ProtocolViolation {
    /// A contradiction, told with every number that takes part in it.
    pub(crate) fn malformed(detail: impl Into<String>) -> Self {
        Self::Malformed(detail.into())
    }
}
