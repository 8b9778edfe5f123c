//! What the target of the archive works on: a log, its objects and a store of them.

pub mod database;
pub mod object;
pub mod store;
