//! The application: one-row commits through SQLite, one database and connection per caller. The
//! same statements run with and without the extension.

use crate::callers::{self, Caller};
use crate::children::wait_for_parent;
use crate::sample::Summary;
use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use rusqlite::Connection;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Bytes of the row that each commit inserts.
pub const ROW_BYTES: usize = 100;
/// Commits from which the bytes of one are taken: enough for the page splits to show.
const SAMPLE_COMMITS: u32 = 2_000;
/// Bytes before the first frame of a WAL.
const WAL_HEADER_BYTES: u64 = 32;

/// Arguments of the application.
#[derive(Args)]
pub struct SqliteArgs {
    /// Directory of the databases.
    #[arg(long)]
    dir: PathBuf,
    /// Extension to load; without it this is plain SQLite.
    #[arg(long)]
    extension: Option<PathBuf>,
    /// How many callers, each with a database.
    #[arg(long)]
    callers: usize,
    /// Measured time.
    #[arg(long)]
    seconds: f64,
}

/// Runs the callers, and prints what they saw.
pub fn run(args: &SqliteArgs) -> Result<()> {
    fs::create_dir_all(&args.dir).with_context(|| format!("create {:?}", args.dir))?;
    // Stays open: the extension's VFS serves all databases opened from here on.
    let loader = Connection::open_in_memory().context("open a database in memory")?;
    if let Some(extension) = &args.extension {
        load_extension(&loader, extension)?;
    }
    let path = |index: usize| args.dir.join(format!("bench-{index}.db"));
    let open = |index| caller(&path(index), args.extension.is_some());
    let before: u64 = (0..args.callers)
        .map(|index| rows(&path(index)))
        .sum::<Result<u64>>()?;
    let report = |summary: &Summary| {
        let after = (0..args.callers)
            .map(|index| rows(&path(index)))
            .sum::<Result<u64>>()?;
        ensure!(
            after - before >= summary.commits,
            "{} commits returned, and {} rows are there",
            summary.commits,
            after - before
        );
        callers::say(&serde_json::to_string(summary).context("encode the summary")?)?;
        wait_for_parent()
    };
    callers::drive(
        args.callers,
        Duration::from_secs_f64(args.seconds),
        open,
        report,
    )
}

/// Bytes that a commit of [`run`] appends to the WAL, on average.
pub fn wal_bytes_per_commit(dir: &Path) -> Result<usize> {
    let path = dir.join("sample.db");
    let connection = open(&path)?;
    // The WAL must not begin again before it is looked at; nothing is timed here.
    connection.pragma_update(None, "wal_autocheckpoint", 0)?;
    connection.pragma_update(None, "synchronous", "OFF")?;
    let wal_bytes = || -> Result<u64> {
        Ok(fs::metadata(dir.join("sample.db-wal"))
            .context("look at the WAL")?
            .len())
    };
    let before = wal_bytes()?.max(WAL_HEADER_BYTES);
    for _ in 0..SAMPLE_COMMITS {
        insert(&connection)?;
    }
    Ok(((wal_bytes()? - before) / u64::from(SAMPLE_COMMITS)) as usize)
}

fn caller(path: &Path, is_protected: bool) -> Result<Caller> {
    let connection = open(path)?;
    if is_protected {
        check_protected(&connection)?;
    }
    Ok(Box::new(move || insert(&connection)))
}

fn open(path: &Path) -> Result<Connection> {
    let connection = Connection::open(path).with_context(|| format!("open {path:?}"))?;
    let mode: String = connection
        .pragma_update_and_check(None, "journal_mode", "WAL", |row| row.get(0))
        .context("change to WAL mode")?;
    ensure!(mode == "wal", "journal mode is {mode}, not WAL");
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection
        .execute_batch("CREATE TABLE IF NOT EXISTS bench(id INTEGER PRIMARY KEY, value TEXT)")
        .context("create the table")?;
    Ok(connection)
}

fn insert(connection: &Connection) -> Result<()> {
    const ROW: [u8; ROW_BYTES] = [b'x'; ROW_BYTES];
    let row = std::str::from_utf8(&ROW)?;
    let mut statement = connection.prepare_cached("INSERT INTO bench(value) VALUES (?1)")?;
    statement.execute([row]).context("commit")?;
    Ok(())
}

/// Rows that were ever inserted into a database; none when it was not made yet.
fn rows(path: &Path) -> Result<u64> {
    if !path.exists() {
        return Ok(0);
    }
    let connection = open(path)?;
    let rows = connection.query_row("SELECT max(id) FROM bench", [], |row| row.get(0));
    Ok(rows.map(|max: Option<i64>| max.unwrap_or(0))? as u64)
}

/// A run that measures plain SQLite under durovfs's name would look very good.
fn check_protected(connection: &Connection) -> Result<()> {
    let status: String = connection
        .query_row("SELECT durovfs_status()", [], |row| row.get(0))
        .context("ask for the status")?;
    let status: serde_json::Value = serde_json::from_str(&status).context("parse the status")?;
    if status["protected"] != true || status["durability"] != "quorum" {
        bail!("the database is not protected: {status}");
    }
    Ok(())
}

// The one unsafe step of a program that loads an extension.
#[allow(unsafe_code)]
fn load_extension(connection: &Connection, extension: &Path) -> Result<()> {
    // SAFETY: no SQL runs on this connection while extensions may be loaded by SQL.
    let guard = unsafe { rusqlite::LoadExtensionGuard::new(connection) };
    let guard = guard.context("allow extensions")?;
    // SAFETY: the file is libdurovfs of the same build, made to be loaded into any host.
    let loaded = unsafe { connection.load_extension(extension, None::<&str>) };
    drop(guard);
    loaded.with_context(|| format!("load {extension:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_commit_is_about_one_page_and_its_header() {
        // Broken: the pipeline would pass other bytes than SQLite does, and the ratio mean nothing.
        let dir = tempfile::tempdir().unwrap();
        let bytes = wal_bytes_per_commit(dir.path()).unwrap();
        assert!((4_096 + 24..2 * 4_096).contains(&bytes), "{bytes}");
    }

    #[test]
    fn each_call_is_one_row_on_disk() {
        // Broken: rates would be of something else than commits.
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("some.db");
        assert_eq!(rows(&path).unwrap(), 0);
        let mut commit = caller(&path, false).unwrap();
        (0..3).for_each(|_| commit().unwrap());
        assert_eq!(rows(&path).unwrap(), 3);
    }

    #[test]
    fn plain_sqlite_does_not_pass_for_durovfs() {
        // Broken: a failed load would be measured as a very quick durovfs.
        let dir = tempfile::tempdir().unwrap();
        assert!(caller(&dir.path().join("some.db"), true).is_err());
    }
}
