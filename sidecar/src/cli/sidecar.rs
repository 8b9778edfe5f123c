//! `durovfs sidecar`: runs one node in the foreground.

use super::{EXIT_FAILED, Failure};
use crate::config::SidecarConfig;
use anyhow::Context;
use clap::Args;
use std::io::Read;
use std::path::PathBuf;

/// The option that names the configuration.
pub const CONFIG: &str = "--config";
/// The option by which a node of the development cluster ends with the process that started it.
pub const DIE_WITH_STDIN: &str = "--die-with-stdin";

/// Run one sidecar: primary of some databases, replica of others
///
/// Stays in the foreground and logs to stderr (DUROVFS_LOG sets how much: error, info, debug).
/// SIGTERM or Ctrl-C: commits in flight are finished, the open chunk is uploaded, exit status 0.
#[derive(Args)]
pub struct SidecarArgs {
    /// Its configuration, as `durovfs init` writes it.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// End at once when standard input ends.
    #[arg(long, hide = true)]
    die_with_stdin: bool,
}

/// Runs until it is told to stop.
///
/// # Errors
/// When the configuration cannot be carried out, or something was left undone at the end.
pub async fn run(args: SidecarArgs) -> Result<(), Failure> {
    let config = SidecarConfig::load(&args.config)?;
    start_log();
    if args.die_with_stdin {
        die_with_stdin()?;
    }
    let node = config.node.clone();
    crate::daemon::run(config)
        .await
        .map_err(|error| Failure::from(error.context(format!("sidecar {node}"))))
}

/// Operators want to see what a node decides: `info` unless told otherwise.
fn start_log() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("DUROVFS_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(false)
        .with_writer(std::io::stderr)
        .init();
}

/// Ends the process when the one that started it is gone. Like a power cut: the journals are made
/// for that, and nobody is left to wait for more.
fn die_with_stdin() -> anyhow::Result<()> {
    let wait = || {
        let mut nothing = [0; 64];
        while matches!(std::io::stdin().read(&mut nothing), Ok(1..)) {}
        tracing::error!("the process that started this node is gone; ending");
        std::process::exit(EXIT_FAILED.into());
    };
    std::thread::Builder::new()
        .name("stdin".to_owned())
        .spawn(wait)
        .map(drop)
        .context("start the thread that watches standard input")
}
