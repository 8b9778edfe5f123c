//! `durovfs history`: the commits that an archive holds, for people and as JSON. Reads only the
//! tails of chunks. The names of JSON fields are stable: add, do not rename.

use super::Failure;
use super::restore::{ArchiveArgs, candidate_names, failure, nothing_tried, parse_when};
use anyhow::Context;
use clap::Args;
use durovfs_archive::chunk::EntryFacts;
use durovfs_archive::listing::{ChunkObject, Listing, SnapshotObject};
use durovfs_archive::store::Store;
use durovfs_archive::when::format_time;
use durovfs_archive::{ArchiveIndex, RestoreError, restore};
use durovfs_wire::{Bookmark, Lsn};
use serde::Serialize;
use std::fmt::Write as _;
use std::io::Write as _;
use std::sync::Arc;

/// List the commits in the archive: bookmark, time, pages, bytes; snapshots and chunks
///
/// Needs no sidecar: only the archive and its credentials. Each bookmark and each time is one that
/// `durovfs restore --at` takes.
#[derive(Args)]
pub struct HistoryArgs {
    /// Name of the database in the cluster, or the path of its file.
    #[arg(value_name = "DB")]
    database: String,
    /// Only commits at or after this moment.
    #[arg(long, value_name = "WHEN")]
    from: Option<String>,
    /// Only commits at or before this moment.
    #[arg(long, value_name = "WHEN")]
    to: Option<String>,
    /// Print JSON; its fields are stable.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    source: ArchiveArgs,
}

/// Prints the history.
///
/// # Errors
/// When there is no such database, or the archive cannot be read.
pub async fn run(args: HistoryArgs) -> Result<(), Failure> {
    let text = text(&args).await?;
    // A reader of the pipe may have seen enough.
    let _ = std::io::stdout().write_all(text.as_bytes());
    Ok(())
}

async fn text(args: &HistoryArgs) -> Result<String, Failure> {
    let from = args.from.as_deref().map(parse_when).transpose()?;
    let to = args.to.as_deref().map(parse_when).transpose()?;
    let store = args.source.open().await?;
    let mut logs = find_logs(&store, args).await.map_err(failure)?;
    // `find_logs` gives at least one; the others had the name before.
    let newest = logs.remove(0);
    let others = logs.iter().map(|log| log.database.to_string()).collect();
    let index = ArchiveIndex::of(&store, newest);
    let commits = index.transactions(from, to).await.map_err(failure)?;
    let range = match (from.or(to), commits.first(), commits.last()) {
        (Some(_), first, last) => first.zip(last).map(|(first, last)| (lsn(first), lsn(last))),
        (None, ..) => Some((Lsn::ZERO, Lsn::new(u64::MAX))),
    };
    let history = History::new(store.url(), index.listing(), &commits, range, others);
    if args.json {
        Ok(serde_json::to_string_pretty(&history).context("print the history")? + "\n")
    } else {
        Ok(history.table())
    }
}

fn lsn(facts: &EntryFacts) -> Lsn {
    facts.position.lsn
}

async fn find_logs(
    store: &Arc<dyn Store>,
    args: &HistoryArgs,
) -> Result<Vec<Listing>, RestoreError> {
    let mut missing = None;
    for name in candidate_names(&args.database) {
        match restore::find_logs(store, &name, args.source.log).await {
            // The error names what was typed, not the last thing that was tried.
            Err(error @ RestoreError::NoSuchDatabase { .. }) => missing = missing.or(Some(error)),
            outcome => return outcome,
        }
    }
    Err(missing.unwrap_or_else(|| nothing_tried(&args.database)))
}

#[derive(Serialize)]
struct History {
    database: String,
    log: String,
    other_logs: Vec<String>,
    archive: String,
    commits: Vec<Commit>,
    snapshots: Vec<Snapshot>,
    chunks: Vec<Chunk>,
}

#[derive(Serialize)]
struct Commit {
    bookmark: String,
    lsn: u64,
    epoch: u32,
    time: String,
    pages: u32,
    bytes: u64,
    page_size: usize,
    page_count: u32,
    whole_image: bool,
    checksum: String,
}

#[derive(Serialize)]
struct Snapshot {
    bookmark: String,
    time: String,
    bytes: u64,
    key: String,
}

#[derive(Serialize)]
struct Chunk {
    first_lsn: u64,
    last_lsn: u64,
    last_time: String,
    bytes: u64,
    key: String,
}

impl History {
    /// `range`: the entries whose chunks and snapshots are listed, too.
    fn new(
        archive: &str,
        listing: &Listing,
        commits: &[EntryFacts],
        range: Option<(Lsn, Lsn)>,
        other_logs: Vec<String>,
    ) -> Self {
        let touches = |first: Lsn, last: Lsn| range.is_some_and(|(a, b)| first <= b && last >= a);
        let chunks = listing.chunks.iter();
        let chunks = chunks.filter(|chunk| touches(chunk.range.first_lsn, chunk.range.last_lsn));
        let snapshots = listing.snapshots.iter();
        let snapshots = snapshots.filter(|found| touches(found.point.lsn, found.point.lsn));
        Self {
            database: listing.name.clone(),
            log: listing.database.to_string(),
            other_logs,
            archive: archive.to_owned(),
            commits: commits.iter().filter_map(Commit::new).collect(),
            snapshots: snapshots.map(Snapshot::new).collect(),
            chunks: chunks.map(Chunk::new).collect(),
        }
    }

    fn table(&self) -> String {
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "{} (log {}) in {}",
            self.database, self.log, self.archive
        );
        for log in &self.other_logs {
            let _ = writeln!(text, "an older log had the name: --log {log}");
        }
        let heads = ["BOOKMARK", "TIME", "PAGES", "BYTES"];
        let [bookmark, time, pages, bytes] = heads;
        let _ = writeln!(text, "{bookmark:<25}  {time:<27}  {pages:>8}  {bytes:>12}");
        for commit in &self.commits {
            let Commit {
                bookmark,
                time,
                pages,
                bytes,
                ..
            } = commit;
            let whole = if commit.whole_image {
                "  whole image"
            } else {
                ""
            };
            let _ = writeln!(
                text,
                "{bookmark:<25}  {time:<27}  {pages:>8}  {bytes:>12}{whole}"
            );
        }
        for Snapshot {
            bookmark,
            time,
            bytes,
            ..
        } in &self.snapshots
        {
            let _ = writeln!(text, "{bookmark:<25}  {time:<27}  snapshot  {bytes:>12}");
        }
        let bytes: u64 = self.chunks.iter().map(|chunk| chunk.bytes).sum();
        let _ = writeln!(text, "{} chunks, {bytes} bytes", self.chunks.len());
        for Chunk {
            first_lsn,
            last_lsn,
            last_time,
            bytes,
            ..
        } in &self.chunks
        {
            let lsns = format!("lsn {first_lsn} to {last_lsn}");
            let _ = writeln!(text, "{lsns:<25}  {last_time:<27}     chunk  {bytes:>12}");
        }
        text
    }
}

impl Commit {
    fn new(facts: &EntryFacts) -> Option<Self> {
        let transaction = facts.transaction()?;
        let commit = transaction.commit;
        Some(Self {
            bookmark: Bookmark::from(transaction.position).to_string(),
            lsn: transaction.position.lsn.get(),
            epoch: transaction.position.epoch.get(),
            time: format_time(commit.time),
            pages: facts.image_count(),
            bytes: facts.image_bytes(),
            page_size: commit.page_size.get(),
            page_count: commit.page_count,
            whole_image: commit.whole_image,
            checksum: commit.checksum.to_string(),
        })
    }
}

impl Snapshot {
    fn new(object: &SnapshotObject) -> Self {
        Self {
            bookmark: Bookmark::from(object.point.position()).to_string(),
            time: format_time(object.point.time),
            bytes: object.size,
            key: object.key.clone(),
        }
    }
}

impl Chunk {
    fn new(object: &ChunkObject) -> Self {
        Self {
            first_lsn: object.range.first_lsn.get(),
            last_lsn: object.range.last_lsn.get(),
            last_time: format_time(object.range.last_time),
            bytes: object.size,
            key: object.key.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::restore::tests::{NAME, archive_of};
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: HistoryArgs,
    }

    async fn history(line: &[&str]) -> Result<String, Failure> {
        let line = ["history"].iter().chain(line);
        text(&Line::try_parse_from(line).unwrap().args).await
    }

    #[tokio::test]
    async fn commits_are_listed_with_bookmarks_that_restore_takes() {
        // Broken: a user could not find the moment to go back to, or a script not read it.
        let (_folder, url) = archive_of(3).await;
        let all = history(&[NAME, "--json", "--archive", &url]).await.unwrap();
        let all: serde_json::Value = serde_json::from_str(&all).unwrap();
        assert_eq!(all["database"], NAME);
        assert_eq!(all["commits"].as_array().unwrap().len(), 3);
        let second = &all["commits"][1];
        assert_eq!(second["bookmark"], "0000000000000003-00000001");
        assert_eq!(second["time"], "2025-11-13T02:13:22.000000Z");
        assert_eq!(
            (&second["pages"], &second["bytes"]),
            (&1.into(), &512.into())
        );
        assert_eq!(all["chunks"][0]["last_lsn"], 4);
        let from = [
            "--from",
            "0000000000000003-00000001",
            "--to",
            "2025-11-13T02:13:22Z",
        ];
        let line = [&[NAME, "--archive", &url][..], &from].concat();
        let some = history(&line).await.unwrap();
        assert_eq!(some.matches("-00000001").count(), 1, "{some}");
        let missing = history(&["nope", "--archive", &url]).await.unwrap_err();
        assert_eq!(missing.status, crate::cli::EXIT_NO_DATABASE);
        assert!(
            missing.message.contains("no database"),
            "{}",
            missing.message
        );
    }
}
