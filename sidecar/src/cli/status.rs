//! `durovfs status`: what a sidecar says about itself and its databases, for people and as JSON.

use super::ask::{ANSWER_TIMEOUT, Asker};
use super::{EXIT_NO_DATABASE, Failure};
use crate::config::ClientConfig;
use anyhow::Context;
use clap::Args;
use durovfs_wire::status::{CopyStatus, DatabaseStatus, NodeStatus, ReplicaStatus, Role};
use serde::Serialize;
use serde_json::Value;
use std::fmt::Write as _;
use std::io::{IsTerminal, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Pause between two pictures of `--watch`.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);
/// Terminal sequence: cursor home, clear to the end.
const CLEAR_SCREEN: &str = "\x1b[H\x1b[2J";

/// Show databases, roles, positions, replicas, archive and warnings
///
/// Asks the sidecar that the client config names: DUROVFS_CONFIG, or
/// $XDG_CONFIG_HOME/durovfs/client.toml, /etc/durovfs/client.toml, the development cluster's.
#[derive(Args)]
pub struct StatusArgs {
    /// Only this database: its name in the cluster, or the path of its file.
    #[arg(value_name = "DB")]
    database: Option<String>,
    /// Print JSON; its fields are stable.
    #[arg(long)]
    json: bool,
    /// Print again every second, until interrupted.
    #[arg(long)]
    watch: bool,
    /// The client config to use.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// Prints the state, once or every second.
///
/// # Errors
/// When the sidecar does not answer, or has no database of that name.
pub async fn run(args: StatusArgs) -> Result<(), Failure> {
    let config = ClientConfig::load(args.config.as_deref())?;
    let mut asker = Asker::connect(&config, ANSWER_TIMEOUT).await?;
    loop {
        let picture = picture(&mut asker, &args).await?;
        let mut out = std::io::stdout();
        let clear = if args.watch && !args.json && out.is_terminal() {
            CLEAR_SCREEN
        } else {
            ""
        };
        if write!(out, "{clear}{picture}")
            .and_then(|()| out.flush())
            .is_err()
        {
            // The reader of the pipe has seen enough.
            break;
        }
        if !args.watch {
            break;
        }
        tokio::time::sleep(WATCH_INTERVAL).await;
    }
    asker.close().await;
    Ok(())
}

async fn picture(asker: &mut Asker, args: &StatusArgs) -> Result<String, Failure> {
    let Some(name) = &args.database else {
        let status = asker.node_status().await?;
        return if args.json {
            Ok(json_line(&status)?)
        } else {
            Ok(describe_node(&status))
        };
    };
    let status = match asker.database_status(name).await? {
        Some(status) => status,
        // Not a name: a path, then, whose absolute form is the default name.
        None => {
            let path =
                std::path::absolute(Path::new(name)).context("find the working directory")?;
            let found = asker.database_status(&path.to_string_lossy()).await?;
            found.ok_or_else(|| {
                let message =
                    format!("no database {name}; `durovfs status` lists those of this sidecar");
                Failure::new(EXIT_NO_DATABASE, message)
            })?
        }
    };
    if args.json {
        Ok(json_line(&status)?)
    } else {
        Ok(describe_database(&status))
    }
}

/// JSON on one line, with ids as people know them: hex digits.
fn json_line<T: Serialize>(status: &T) -> anyhow::Result<String> {
    let mut value = serde_json::to_value(status).context("encode the status")?;
    print_ids(&mut value);
    Ok(format!("{value}\n"))
}

fn print_ids(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            for (key, field) in fields {
                match hex_of(field).filter(|_| key == "database") {
                    Some(hex) => *field = Value::String(hex),
                    None => print_ids(field),
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(print_ids),
        _ => {}
    }
}

fn hex_of(value: &Value) -> Option<String> {
    let bytes = value.as_array()?;
    let mut hex = String::with_capacity(2 * bytes.len());
    for byte in bytes {
        let byte = u8::try_from(byte.as_u64()?).ok()?;
        write!(hex, "{byte:02x}").ok()?;
    }
    Some(hex)
}

fn describe_node(status: &NodeStatus) -> String {
    let mut text = format!(
        "node {}  durovfs {}  journal {} of {}  databases {}\n",
        status.node,
        status.version,
        human_bytes(status.journal_bytes),
        human_bytes(status.journal_limit_bytes),
        status.database_count,
    );
    let peers = status.peers.iter().map(|peer| {
        let answering = if peer.answering {
            "answers"
        } else {
            "DOES NOT ANSWER"
        };
        let trouble = peer
            .trouble
            .as_ref()
            .map_or(String::new(), |trouble| format!("  trouble: {trouble}"));
        format!(
            "  node {:<12} {:<21} {answering}{trouble}\n",
            peer.node.as_str(),
            peer.address
        )
    });
    text.extend(peers);
    text.extend(
        status
            .warnings
            .iter()
            .map(|warning| format!("  warning: {warning}\n")),
    );
    for database in &status.databases {
        text.push('\n');
        text.push_str(&describe_database(database));
    }
    text
}

fn describe_database(status: &DatabaseStatus) -> String {
    let role = match status.role {
        Role::Primary => "primary",
        Role::Replica => "replica",
    };
    let mut text = format!("database {}\n", status.name);
    text.push_str(&format!(
        "  role {role}  epoch {}  lsn {}  committed {}  archived {}  checksum {}\n",
        status.epoch, status.lsn, status.commit_lsn, status.archive_lsn, status.checksum,
    ));
    let archive = status.archive_url.as_deref().unwrap_or("none");
    text.push_str(&format!("  archive {archive}\n"));
    if !status.members.is_empty() {
        let members: Vec<&str> = status.members.iter().map(|node| node.as_str()).collect();
        let generation = status.generation;
        text.push_str(&format!(
            "  members (generation {generation}) {}\n",
            members.join(" ")
        ));
    }
    text.extend(
        status
            .change
            .iter()
            .map(|change| format!("  change: {change}\n")),
    );
    text.extend(status.replicas.iter().map(describe_replica));
    text.extend(status.copy.iter().map(describe_copy));
    text.extend(
        status
            .warnings
            .iter()
            .map(|warning| format!("  warning: {warning}\n")),
    );
    text
}

fn describe_copy(copy: &CopyStatus) -> String {
    format!(
        "  warm copy {}  {}  lsn {}  behind {} entries  checked at lsn {}\n",
        copy.file, copy.state, copy.lsn, copy.lag_entries, copy.checked_lsn,
    )
}

fn describe_replica(replica: &ReplicaStatus) -> String {
    format!(
        "  {:<12} {:<21} {:<12} {}on disk {}  behind {} entries, {} ms  ack p50 {} us, p99 {} us\n",
        replica.node.as_str(),
        replica.address,
        replica.state,
        if replica.counted { "" } else { "NO VOTE  " },
        replica.flush_lsn,
        replica.lag_entries,
        replica.lag_ms,
        replica.ack_p50_us,
        replica.ack_p99_us,
    )
}

fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut amount = bytes as f64;
    let mut unit = UNITS[0];
    for larger in &UNITS[1..] {
        if amount < 1024.0 {
            break;
        }
        amount /= 1024.0;
        unit = larger;
    }
    if unit == UNITS[0] {
        format!("{bytes} B")
    } else {
        format!("{amount:.1} {unit}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use durovfs_wire::{DatabaseId, Epoch, Lsn};

    fn database() -> DatabaseStatus {
        DatabaseStatus {
            name: "/srv/app.db".to_owned(),
            database: DatabaseId::from_bytes([0xab; 16]),
            role: Role::Primary,
            epoch: Epoch::new(2),
            lsn: Lsn::new(9),
            commit_lsn: Lsn::new(8),
            archive_lsn: Lsn::new(7),
            checksum: "00000000000000ff".to_owned(),
            archive_url: None,
            generation: 3,
            members: vec!["replica-1".parse().unwrap()],
            change: Some("replica-2 is replaced by replica-1: catching up".to_owned()),
            replicas: vec![ReplicaStatus {
                node: "replica-1".parse().unwrap(),
                address: "127.0.0.1:4002".to_owned(),
                state: "streaming".to_owned(),
                counted: true,
                flush_lsn: Lsn::new(9),
                lag_entries: 0,
                lag_ms: 0,
                ack_p50_us: 300,
                ack_p99_us: 900,
            }],
            copy: Some(CopyStatus {
                file: "/srv/copies/app.db".to_owned(),
                state: "catching_up".to_owned(),
                lsn: Lsn::new(6),
                lag_entries: 2,
                checked_lsn: Lsn::new(5),
                differences: 0,
            }),
            warnings: vec!["archive is behind".to_owned()],
        }
    }

    #[test]
    fn json_has_the_stable_fields_and_ids_as_hex() {
        // Broken: programs that read `durovfs status --json` would stop to understand it.
        let value: Value = serde_json::from_str(&json_line(&database()).unwrap()).unwrap();
        assert_eq!(value["database"], "ab".repeat(16));
        assert_eq!(value["role"], "primary");
        assert_eq!(value["commit_lsn"], 8);
        assert_eq!(value["replicas"][0]["flush_lsn"], 9);
    }

    #[test]
    fn people_see_positions_replicas_and_warnings() {
        // Broken: an operator would not see that the archive is behind.
        let text = describe_database(&database());
        for expected in [
            "/srv/app.db",
            "committed 8",
            "warm copy /srv/copies/app.db  catching_up  lsn 6  behind 2 entries",
            "archived 7",
            "replica-1",
            "warning: archive",
            "members (generation 3) replica-1",
            "change: replica-2 is replaced",
        ] {
            assert!(text.contains(expected), "{text}");
        }
        assert_eq!(human_bytes(512), "512 B");
        assert_eq!(human_bytes(64 << 20), "64.0 MiB");
    }
}
