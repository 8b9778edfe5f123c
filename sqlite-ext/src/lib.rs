//! `libdurovfs`: what a SQLite loads. Registers the VFS and the SQL functions, and talks to the
//! sidecar. No function of SQLite is linked: all go through the table that the host hands over.

pub mod client;
pub mod config;
pub mod log;
mod signals;
