//! `durovfs-bench`: what a commit through durovfs costs, beside plain SQLite and beside a bare
//! pipeline of the same processes without durovfs code. `docs/benchmarks.md` explains the results.
//!
//! Nothing here is a test, and nothing of the product depends on it. The measured programs are
//! child processes of this binary (subcommands, hidden from the help) and the release binaries.

#![deny(unsafe_code)]

mod callers;
mod children;
mod cluster;
mod machine;
mod pipeline;
mod report;
mod run;
mod sample;
mod sqlite;
mod usage;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Compares commits through durovfs with plain SQLite and with a bare pipeline.
///
/// All are measured in short interleaved rounds, so that a change of the machine's mood meets all
/// of them. Prints a table, or JSON. Use scripts/bench, which builds what is measured first.
#[derive(Parser)]
#[command(
    name = "durovfs-bench",
    version,
    args_conflicts_with_subcommands = true
)]
struct Arguments {
    #[command(subcommand)]
    child: Option<Child>,
    #[command(flatten)]
    run: run::RunArgs,
}

/// What this binary starts itself as.
#[derive(Subcommand)]
enum Child {
    /// One replica of the bare pipeline.
    #[command(hide = true)]
    PipelineReplica(pipeline::replica::ReplicaArgs),
    /// The relay of the bare pipeline.
    #[command(hide = true)]
    PipelineRelay(pipeline::relay::RelayArgs),
    /// The callers of the bare pipeline.
    #[command(hide = true)]
    PipelineClient(pipeline::client::ClientArgs),
    /// The application: commits through SQLite.
    #[command(hide = true)]
    SqliteClient(sqlite::SqliteArgs),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = match arguments.child {
        None => run::run(&arguments.run),
        Some(Child::PipelineReplica(args)) => pipeline::replica::run(&args),
        Some(Child::PipelineRelay(args)) => pipeline::relay::run(&args),
        Some(Child::PipelineClient(args)) => pipeline::client::run(&args),
        Some(Child::SqliteClient(args)) => sqlite::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("durovfs-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        // Broken: a clash of two options would only show as a panic when somebody runs it.
        super::Arguments::command().debug_assert();
    }
}
