//! `durovfs resolve`: the way out when a local file and its log have parted. What is given up is
//! saved beside the file first; then the next open of the database finds only one side to follow.
//!
//! To keep the log, the local file is emptied: the next open writes it from the log. To keep the
//! local file, the decision is left beside it (`durovfs_wire::resolution`), and the next open makes
//! it the log's next transaction: only the extension knows how to read a database as SQLite does.

mod files;

use super::ask::{ANSWER_TIMEOUT, Asker, OpenedLog};
use super::{EXIT_FAILED, EXIT_NO_DATABASE, Failure};
use crate::config::ClientConfig;
use anyhow::Context;
use clap::{Args, ValueEnum};
use durovfs_archive::restore;
use durovfs_archive::store::{self, Store};
use durovfs_archive::when::When;
use durovfs_archive::{RestoreError, RestoreOptions, S3Options};
use durovfs_wire::resolution::Resolution;
use durovfs_wire::{Bookmark, LogPosition};
use files::LocalFiles;
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long the archive may take to have the log's last transaction: longer than the default
/// interval of uploads.
const ARCHIVE_TIMEOUT: Duration = Duration::from_secs(30);
/// Pause between two looks into it.
const ARCHIVE_PAUSE: Duration = Duration::from_millis(500);

/// Decide which side counts when a database was refused: its local file, or its log
///
/// For a database that was written without durovfs, replaced, or copied over. All connections to it
/// must be closed. What is given up is saved beside the file first, as FILE-durovfs-saved-TIME; the
/// next open of the database does the rest.
#[derive(Args)]
pub struct ResolveArgs {
    /// Path of the local file.
    #[arg(value_name = "DB")]
    file: PathBuf,
    /// The side that counts: log (the local file is written from it anew), or local (the local file
    /// becomes the log's next transaction).
    #[arg(long, value_enum)]
    keep: Side,
    /// Name of the database in the cluster; by default the file's absolute path.
    #[arg(long)]
    name: Option<String>,
    /// Print JSON; its fields are stable.
    #[arg(long)]
    json: bool,
    /// The client config to use.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// One of the two that have parted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum Side {
    Local,
    Log,
}

/// What was done. The names of the fields are stable: add, do not rename.
#[derive(Serialize)]
struct Report {
    file: String,
    name: String,
    kept: Side,
    /// Bookmark of the log's last transaction; none when it has none.
    log_bookmark: Option<String>,
    /// What is given up; none when it is nothing, or only the log has it.
    saved: Option<String>,
    /// What the next open does.
    next_open: String,
}

/// Saves what is given up, and leaves the rest to the next open.
///
/// # Errors
/// When the file is in use, the log cannot be reached, or something cannot be saved; nothing is
/// given up then.
pub async fn run(args: ResolveArgs) -> Result<(), Failure> {
    let report = resolve(&args).await?;
    if args.json {
        println!(
            "{}",
            serde_json::to_string(&report).context("print the report")?
        );
    } else {
        println!("{}", report.lines());
    }
    Ok(())
}

async fn resolve(args: &ResolveArgs) -> Result<Report, Failure> {
    let typed = args.file.display();
    let file = args.file.canonicalize().map_err(|error| {
        let hint = "a file that is gone needs no decision: the next open writes it from the log";
        Failure::new(EXIT_NO_DATABASE, format!("{typed}: {error}; {hint}"))
    })?;
    let name = match &args.name {
        Some(name) => name.clone(),
        None => file.to_string_lossy().into_owned(),
    };
    let config = ClientConfig::load(args.config.as_deref())?;
    let local = LocalFiles::lock(&file)?;
    let mut asker = Asker::connect(&config, ANSWER_TIMEOUT).await?;
    let log = asker.open_log(&name).await?;
    asker.close().await;
    let (saved, next_open) = match args.keep {
        Side::Log => keep_log(&local, &log, &name)?,
        Side::Local => keep_local(&local, &log, &name, &config).await?,
    };
    Ok(Report {
        file: file.to_string_lossy().into_owned(),
        name,
        kept: args.keep,
        log_bookmark: log.last.map(|last| Bookmark::from(last).to_string()),
        saved: saved.map(|path| path.to_string_lossy().into_owned()),
        next_open,
    })
}

fn keep_log(
    local: &LocalFiles,
    log: &OpenedLog,
    name: &str,
) -> Result<(Option<PathBuf>, String), Failure> {
    let Some(last) = log.last else {
        let hint = "nothing would be kept (--name NAME, when the database has one of its own)";
        let message = format!("the log {name} has no transaction: {hint}");
        return Err(Failure::new(EXIT_NO_DATABASE, message));
    };
    let saved = local.give_up()?;
    let next = format!(
        "writes the file from the log, at {} or later",
        Bookmark::from(last)
    );
    Ok((saved, next))
}

async fn keep_local(
    local: &LocalFiles,
    log: &OpenedLog,
    name: &str,
    config: &ClientConfig,
) -> Result<(Option<PathBuf>, String), Failure> {
    if local.is_empty()? {
        let message = format!(
            "{}: empty: there is nothing to keep",
            local.path().display()
        );
        return Err(Failure::new(EXIT_FAILED, message));
    }
    let saved = match (log.last, &config.archive) {
        (Some(last), Some(url)) => save_log(local, log, name, last, url).await?,
        _ => None,
    };
    local.leave(&Resolution {
        database: log.database,
        given_up: log.last.unwrap_or(LogPosition::ZERO),
    })?;
    let next = match log.last {
        Some(last) => format!(
            "makes the file the log's next transaction, after {}, which `durovfs restore --at` \
             gives back",
            Bookmark::from(last)
        ),
        None => "makes the file the log's first transaction".to_owned(),
    };
    Ok((saved, next))
}

/// Restores the log's version beside the file. None when the archive does not get it in time: the
/// log keeps it all the same, under its bookmark.
async fn save_log(
    local: &LocalFiles,
    log: &OpenedLog,
    name: &str,
    last: LogPosition,
    url: &str,
) -> Result<Option<PathBuf>, Failure> {
    let store: Arc<dyn Store> = store::open(url, &S3Options::default())
        .map_err(|error| Failure::new(EXIT_FAILED, error.to_string()))?;
    let saved = local.name_for_saved()?;
    let when = When::Bookmark(Bookmark::from(last));
    let options = RestoreOptions { force: false };
    let deadline = Instant::now() + ARCHIVE_TIMEOUT;
    loop {
        let restored = restore::restore(
            &store,
            name,
            Some(log.database),
            when,
            &saved,
            &options,
            &|_| {},
        );
        match restored.await {
            Ok(_) => return Ok(Some(saved)),
            Err(RestoreError::NotCovered { .. } | RestoreError::NoSuchDatabase { .. })
                if Instant::now() < deadline =>
            {
                tokio::time::sleep(ARCHIVE_PAUSE).await;
            }
            Err(RestoreError::NotCovered { .. } | RestoreError::NoSuchDatabase { .. }) => {
                return Ok(None);
            }
            Err(error) => return Err(super::restore::failure(error)),
        }
    }
}

impl Report {
    fn lines(&self) -> String {
        let side = match self.kept {
            Side::Local => "the log's version",
            Side::Log => "the local file",
        };
        let saved = match (&self.saved, &self.log_bookmark) {
            (Some(saved), _) => format!("{side} is saved as {saved}"),
            (None, Some(bookmark)) if self.kept == Side::Local => {
                format!("{side} stays in the log, as {bookmark}")
            }
            (None, _) => "there was nothing to save".to_owned(),
        };
        let file = Path::new(&self.file).display();
        format!("{file}: {saved}\nthe next open {}", self.next_open)
    }
}
