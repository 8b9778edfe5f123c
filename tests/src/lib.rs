//! What the tests of whole processes share: clusters, applications, and readers of what they leave
//! on disk. The cases are in `tests/`; nothing in here decides whether the product is right.

#![forbid(unsafe_code)]

pub mod app;
pub mod binaries;
pub mod clocks;
pub mod cluster;
pub mod contenders;
pub mod damage;
pub mod disks;
pub mod hosts;
pub mod image;
pub mod ledger;
pub mod namespaces;
pub mod nemesis;
pub mod outcomes;
pub mod replay;
pub mod script;
pub mod seed;
pub mod simulation;
pub mod source;
pub mod weather;

/// Says that a test leaves something out, and why: also when its output is not shown, as that of
/// tests that pass is not.
pub fn leave_out(what: &str, why: &str) {
    use std::io::Write;
    // Not by a macro, whose output the test's harness keeps.
    let _ = writeln!(std::io::stderr(), "left out: {what}: {why}");
}
