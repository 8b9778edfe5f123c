//! The parts of the sidecar that need no runtime and no network, so that the simulator in `tests/`
//! runs the same code as the daemon. Everything else is private to the binary.

#![forbid(unsafe_code)]

pub mod donor;
pub mod replica_log;
