//! The `durovfs` binary: reads the command line, runs one command, turns its failure into one line
//! on stderr and an exit status. What each command does is in `cli`.

#![forbid(unsafe_code)]

mod cli;
mod config;
mod daemon;

use clap::{Parser, Subcommand};
use cli::Failure;
use std::process::ExitCode;

/// Storage guarantees of a Durable Object for any SQLite application.
///
/// An application loads libdurovfs and talks to the sidecar on its host. From then on each COMMIT
/// returns when a quorum of replica machines holds it on disk; the history streams to an archive,
/// and any commit of it can be restored.
///
/// Try it on one machine: run `durovfs dev` and paste the lines that it prints.
///
/// Exit status: 0 done, 1 failed, 2 usage, 3 no such database, 4 moment not covered by the archive.
#[derive(Parser)]
#[command(
    name = "durovfs",
    version,
    propagate_version = true,
    verbatim_doc_comment
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Dev(cli::dev::DevArgs),
    Init(cli::init::InitArgs),
    Sidecar(cli::sidecar::SidecarArgs),
    Status(cli::status::StatusArgs),
    History(cli::history::HistoryArgs),
    Restore(cli::restore::RestoreArgs),
    Resolve(cli::resolve::ResolveArgs),
    Takeover(cli::takeover::TakeoverArgs),
    Replace(cli::replace::ReplaceArgs),
}

fn main() -> ExitCode {
    // Usage errors and --help end the process here, with clap's own texts and status 2 or 0.
    let arguments = Arguments::parse();
    match run(arguments.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("durovfs: {}", failure.line());
            ExitCode::from(failure.status)
        }
    }
}

fn run(command: Command) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| anyhow::anyhow!("start the runtime: {error}"))?;
    runtime.block_on(async {
        match command {
            Command::Dev(args) => cli::dev::run(args).await,
            Command::Init(args) => cli::init::run(args),
            Command::Sidecar(args) => cli::sidecar::run(args).await,
            Command::Status(args) => cli::status::run(args).await,
            Command::History(args) => cli::history::run(args).await,
            Command::Restore(args) => cli::restore::run(args).await,
            Command::Resolve(args) => cli::resolve::run(args).await,
            Command::Takeover(args) => cli::takeover::run(args).await,
            Command::Replace(args) => cli::replace::run(args).await,
        }
    })
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        // Broken: a clash of two options would only show as a panic when a user types them.
        super::Arguments::command().debug_assert();
    }
}
