//! `durovfs replace`: gives a replica's place to another node, and waits until that has it.
//!
//! The sidecar does the work and answers the same question as often as it is asked, so this is a
//! loop of questions; nothing is lost when it ends early.

use super::ask::{ANSWER_TIMEOUT, Asker};
use super::{EXIT_FAILED, EXIT_NO_DATABASE, EXIT_USAGE, Failure};
use crate::config::ClientConfig;
use anyhow::Context;
use clap::Args;
use durovfs_wire::NodeName;
use durovfs_wire::client::{FailureKind, ReplaceState};
use durovfs_wire::status::Role;
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Time between two questions: a person sees it move, and a sidecar hardly notices.
const ASK_INTERVAL: Duration = Duration::from_millis(200);
/// A quorum that is away for a moment comes back within this.
const QUORUM_PATIENCE: Duration = Duration::from_secs(15);
/// Progress is told this often.
const TELL_INTERVAL: Duration = Duration::from_secs(2);

/// Replace a replica for good, while the database is in use
///
/// Run it on the host that uses the database: its sidecar is the primary and does the work. The
/// node NEW gets a copy of the log from the primary, without a vote; when it is level, a commit
/// needs a quorum of the replicas with OLD and one of those with NEW for a moment, and from then on
/// OLD has no vote. Commits go on all the time; OLD may be dead or alive.
///
/// NEW must be known to the sidecar: add it under `nodes` in sidecar.toml (no restart is needed)
/// and start a sidecar there with a certificate of the cluster.
///
/// The same command again goes on where it was interrupted, and does nothing once it is done. With
/// OLD and NEW the other way round it takes a replacement back. With the same node twice it brings
/// in a node that lost its disk, and so came back as another replica.
///
/// `durovfs status` shows the members, their generation, and a change under way.
#[derive(Args)]
#[command(override_usage = "durovfs replace [OPTIONS] DB OLD NEW\n       \
                            durovfs replace [OPTIONS] --all OLD NEW")]
pub struct ReplaceArgs {
    /// The database (its name in the cluster, or the path of its file; not with --all), the node
    /// whose replica goes, and the node that gets one.
    #[arg(value_name = "DB OLD NEW", num_args = 2..=3, required = true)]
    names: Vec<String>,
    /// Every database of which this sidecar is the primary and OLD has a replica.
    #[arg(long)]
    all: bool,
    /// Print one JSON object for each database.
    #[arg(long)]
    json: bool,
    /// Client configuration.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// What is asked for, read.
struct Wanted {
    /// None for all.
    database: Option<String>,
    old: NodeName,
    new: NodeName,
    json: bool,
}

impl ReplaceArgs {
    fn wanted(&self) -> Result<Wanted, Failure> {
        let usage = |message: String| Failure::new(EXIT_USAGE, format!("replace: {message}"));
        let node = |text: &str| {
            text.parse::<NodeName>()
                .map_err(|error| usage(error.to_string()))
        };
        let (database, old, new) = match (self.all, self.names.as_slice()) {
            (true, [old, new]) => (None, old, new),
            (false, [database, old, new]) => (Some(database.clone()), old, new),
            (true, _) => return Err(usage("give --all, or DB, not both".to_owned())),
            (false, _) => return Err(usage("give DB OLD NEW, or --all OLD NEW".to_owned())),
        };
        Ok(Wanted {
            database,
            old: node(old)?,
            new: node(new)?,
            json: self.json,
        })
    }
}

#[derive(Serialize)]
struct Replaced<'a> {
    database: &'a str,
    old: &'a NodeName,
    new: &'a NodeName,
    generation: u32,
}

/// Replaces, one database after the other.
///
/// # Errors
/// When it cannot be done, or the sidecar is not reached. The same command goes on later.
pub async fn run(args: ReplaceArgs) -> Result<(), Failure> {
    let config = ClientConfig::load(args.config.as_deref())?;
    let args = args.wanted()?;
    let mut asker = Asker::connect(&config, ANSWER_TIMEOUT).await?;
    let names = databases(&mut asker, &args).await?;
    for name in &names {
        let generation = replace_one(&mut asker, name, &args).await?;
        if args.json {
            let done = Replaced {
                database: name,
                old: &args.old,
                new: &args.new,
                generation,
            };
            let line = serde_json::to_string(&done).context("encode the answer")?;
            println!("{line}");
        } else {
            println!(
                "{name}: {} has the place of {} (generation {generation})",
                args.new, args.old
            );
        }
    }
    if names.is_empty() && !args.json {
        println!("no database here has a replica on {}", args.old);
    }
    asker.close().await;
    Ok(())
}

async fn databases(asker: &mut Asker, args: &Wanted) -> Result<Vec<String>, Failure> {
    let Some(name) = &args.database else {
        let status = asker.node_status().await?;
        if status.database_count > status.databases.len() as u64 {
            let message = "too many databases to list: name them one by one".to_owned();
            return Err(Failure::new(EXIT_FAILED, message));
        }
        let ours = status.databases.into_iter().filter(|database| {
            database.role == Role::Primary && database.members.contains(&args.old)
        });
        return Ok(ours.map(|database| database.name).collect());
    };
    if asker.database_status(name).await?.is_some() {
        return Ok(vec![name.clone()]);
    }
    // Not a name: a path, then, whose absolute form is the default name.
    let path = std::path::absolute(Path::new(name)).context("find the working directory")?;
    let path = path.to_string_lossy().into_owned();
    if asker.database_status(&path).await?.is_some() {
        return Ok(vec![path]);
    }
    let message = format!("no database {name}; `durovfs status` lists those of this sidecar");
    Err(Failure::new(EXIT_NO_DATABASE, message))
}

/// Gives the generation in which it was done.
async fn replace_one(asker: &mut Asker, name: &str, args: &Wanted) -> Result<u32, Failure> {
    let begun = Instant::now();
    let mut answered = begun;
    let mut told: Option<(bool, Instant)> = None;
    loop {
        let now = Instant::now();
        match asker.replace(name, &args.old, &args.new).await? {
            Ok(ReplaceState::Done { generation }) => return Ok(generation),
            Ok(state) => {
                answered = now;
                let joint = matches!(state, ReplaceState::Joint { .. });
                let due = told.is_none_or(|(before, at)| {
                    before != joint || now.duration_since(at) >= TELL_INTERVAL
                });
                if due && !args.json {
                    told = Some((joint, now));
                    tell(name, &args.new, state);
                }
            }
            Err((FailureKind::NoQuorum, _)) if now.duration_since(answered) < QUORUM_PATIENCE => {}
            Err((kind, message)) => {
                let status = match kind {
                    FailureKind::UnknownDatabase => EXIT_NO_DATABASE,
                    _ => EXIT_FAILED,
                };
                return Err(Failure::new(status, message));
            }
        }
        tokio::time::sleep(ASK_INTERVAL).await;
    }
}

/// Says on stderr how far it is: stdout has the results only.
fn tell(name: &str, new: &NodeName, state: ReplaceState) {
    match state {
        ReplaceState::CatchingUp { lag_entries } => {
            eprintln!("{name}: {new} catches up, {lag_entries} entries to go");
        }
        ReplaceState::Joint { lag_entries } => {
            eprintln!("{name}: both sets of replicas vote, {new} lacks {lag_entries} entries");
        }
        ReplaceState::Done { .. } => {}
    }
}
