//! The shim: a SQLite VFS that wraps the host's own, lets each commit reach the local file only
//! when the quorum has it, and brings the local file level with the log when it is opened.
//!
//! Blocking, without a runtime; what leaves the process goes through [`sink::Sink`]. Only `ffi.rs`
//! and `shim.rs` hold unsafe code. `docs/architecture.md`, "The shim", tells how it works.

#![deny(unsafe_code)]

mod change_counter;
mod commit_gate;
pub mod connection;
pub mod deferred;
pub mod error;
#[allow(
    unsafe_code,
    reason = "calls the host's SQLite through the table it hands over"
)]
pub mod ffi;
pub mod file;
mod in_use;
pub mod mark;
pub mod open;
pub mod page_table;
mod pragma;
mod resolve;
mod roll_forward;
mod rollback_gate;
#[allow(
    unsafe_code,
    reason = "is called by SQLite, with SQLite's own structures"
)]
pub mod shim;
pub mod sink;
pub mod survey;
mod vacuum;
mod wal_end;
pub mod wal_tap;
mod write_lock;

pub use connection::{FileReport, FileStatus, LogFn, LogLevel, Unprotected};
pub use deferred::Durability;
pub use ffi::{Api, ApiRoutines, HostProblem};
pub use shim::{Options, RegisterError, register};
pub use sink::Sink;
