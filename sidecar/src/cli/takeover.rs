//! `durovfs takeover`: makes this host's sidecar the primary of a database, also when another
//! host's is alive.

use super::ask::{ANSWER_TIMEOUT, Asker, TakenOver};
use super::restore::candidate_names;
use super::{EXIT_NO_DATABASE, Failure};
use crate::config::{ClientConfig, parse_duration};
use anyhow::Context;
use clap::Args;
use serde::Serialize;
use std::io::Write as _;
use std::path::PathBuf;
use std::time::Duration;

/// Take a database over from another host: its next commit there is refused
///
/// The sidecar that the client config names becomes the primary of the database. What the other
/// host committed is kept: it is in the log, and applications here get it when they open the
/// database. From then on commits on the other host fail with SQLITE_READONLY until the database
/// is opened there again and taken back; the outcome of one that is in flight there is unknown to
/// its application. The file there is put right when it is opened again.
///
/// Not needed when the other host is dead: opening the database here is enough then, from three
/// seconds after its last sign of life on.
#[derive(Args)]
pub struct TakeoverArgs {
    /// Name of the database in the cluster, or the path of its file.
    #[arg(value_name = "DB")]
    database: String,
    /// Print JSON; its fields are stable.
    #[arg(long)]
    json: bool,
    /// Give up after this time.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = parse_duration)]
    timeout: Duration,
    /// The client config to use.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// What was taken over. Names of its fields are part of the contract.
#[derive(Serialize)]
struct Report {
    database: String,
    log: String,
    primary: String,
    taken_from: Option<String>,
    epoch: u32,
    lsn: u64,
}

/// Takes a database over, and tells from whom.
///
/// # Errors
/// When there is no such database, or no quorum of replicas answers in time.
pub async fn run(args: TakeoverArgs) -> Result<(), Failure> {
    let config = ClientConfig::load(args.config.as_deref())?;
    let mut asker = Asker::connect(&config, ANSWER_TIMEOUT).await?;
    let mut taken = None;
    for name in candidate_names(&args.database) {
        if let Some(found) = asker.take_over(&name, args.timeout).await? {
            taken = Some((name, found));
            break;
        }
    }
    asker.close().await;
    let Some((name, found)) = taken else {
        let message = format!("takeover: no database {} in the cluster", args.database);
        return Err(Failure::new(EXIT_NO_DATABASE, message));
    };
    let report = report(name, found, config.node.to_string());
    let text = match args.json {
        true => serde_json::to_string_pretty(&report).context("print the report")? + "\n",
        false => describe(&report),
    };
    // It is done, whether or not anybody reads of it.
    let _ = std::io::stdout().write_all(text.as_bytes());
    Ok(())
}

fn report(database: String, found: TakenOver, primary: String) -> Report {
    Report {
        database,
        log: found.database.to_string(),
        primary,
        taken_from: found.taken_from.map(|node| node.to_string()),
        epoch: found.end.epoch.get(),
        lsn: found.end.lsn.get(),
    }
}

fn describe(report: &Report) -> String {
    let from = match &report.taken_from {
        Some(node) => format!("taken over from {node}"),
        None => "no other primary was alive".to_owned(),
    };
    format!(
        "{} is the primary of {} now (epoch {}, lsn {}): {from}\n",
        report.primary, report.database, report.epoch, report.lsn
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use durovfs_wire::{DatabaseId, Epoch, LogPosition, Lsn};

    #[test]
    fn people_and_machines_are_told_from_whom() {
        // Broken: an operator would not know which host is read-only now.
        let found = TakenOver {
            database: DatabaseId::from_bytes([0xab; 16]),
            end: LogPosition::new(Epoch::new(4), Lsn::new(90)),
            taken_from: Some("host-a".parse().unwrap()),
        };
        let report = report("/srv/app.db".to_owned(), found, "host-b".to_owned());
        let text = describe(&report);
        for word in ["host-b", "host-a", "/srv/app.db", "epoch 4", "lsn 90"] {
            assert!(text.contains(word), "{text}");
        }
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["primary"], "host-b");
        assert_eq!(json["taken_from"], "host-a");
        assert_eq!((&json["epoch"], &json["lsn"]), (&4.into(), &90.into()));
    }
}
