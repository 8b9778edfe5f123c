//! `durovfs sidecar`: runs one node in the foreground.

use super::Failure;
use crate::config::SidecarConfig;
use clap::Args;
use std::path::PathBuf;

/// Run one sidecar: primary of some databases, replica of others
///
/// Stays in the foreground and logs to stderr (DUROVFS_LOG sets how much: error, info, debug).
/// SIGTERM or Ctrl-C: commits in flight are finished, the open chunk is uploaded, exit status 0.
#[derive(Args)]
pub struct SidecarArgs {
    /// Its configuration, as `durovfs init` writes it.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

/// Runs until it is told to stop.
///
/// # Errors
/// When the configuration cannot be carried out, or something was left undone at the end.
pub async fn run(args: SidecarArgs) -> Result<(), Failure> {
    let config = SidecarConfig::load(&args.config)?;
    start_log();
    let node = config.node.clone();
    crate::daemon::run(config)
        .await
        .map_err(|error| Failure::from(error.context(format!("sidecar {node}"))))
}

/// Operators want to see what a node decides: `info` unless told otherwise.
fn start_log() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("DUROVFS_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
}
