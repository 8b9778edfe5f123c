//! `durovfs restore`: a database as it was after any commit, from the archive alone; and what it
//! shares with `history`, which reads the same archive: how the store is found, and how its errors
//! become exit statuses.

use super::{EXIT_FAILED, EXIT_NO_DATABASE, EXIT_NOT_COVERED, EXIT_USAGE, Failure};
use crate::config::ClientConfig;
use anyhow::Context;
use clap::Args;
use durovfs_archive::restore::{self, Progress};
use durovfs_archive::store::{self, Store};
use durovfs_archive::when::{self, When};
use durovfs_archive::{RestoreError, RestoreOptions, Restored, S3Options};
use durovfs_wire::{Bookmark, DatabaseId};
use indicatif::{ProgressBar, ProgressStyle};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Write a database as it was at a moment to a new file, from the archive alone
///
/// Needs no sidecar: only the archive and its credentials. The file is an ordinary SQLite database,
/// and appears whole, with its checksum verified, or not at all.
#[derive(Args)]
pub struct RestoreArgs {
    /// Name of the database in the cluster, or the path of its file.
    #[arg(value_name = "DB")]
    database: String,
    /// The moment: a time with its zone, "5 minutes ago", a bookmark, lsn:N, or latest.
    #[arg(long, value_name = "WHEN", default_value = "latest")]
    at: String,
    /// The file to write.
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Replace FILE if it is there, and remove the -wal and -journal beside it.
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    source: ArchiveArgs,
}

/// Where the archive is, and which of its logs is meant.
#[derive(Args)]
pub struct ArchiveArgs {
    /// The archive: file:///dir or s3://bucket/prefix; by default the client config's.
    #[arg(long, value_name = "URL")]
    pub archive: Option<String>,
    /// Of several logs that had the name one after the other, the one with this id.
    #[arg(long, value_name = "ID")]
    pub log: Option<DatabaseId>,
    /// The client config to use.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// Restores, and says what.
///
/// # Errors
/// When the moment is not covered, the archive cannot be read, or the file cannot be written.
pub async fn run(args: RestoreArgs) -> Result<(), Failure> {
    let when = parse_when(&args.at)?;
    let store = args.source.open().await?;
    let bar = Bar::new();
    let outcome = restore_by_any_name(&args, &store, when, &bar).await;
    bar.finish();
    let (name, restored) = outcome.map_err(failure)?;
    println!("{}", describe(&name, &restored, &args.output));
    Ok(())
}

async fn restore_by_any_name(
    args: &RestoreArgs,
    store: &Arc<dyn Store>,
    when: When,
    bar: &Bar,
) -> Result<(String, Restored), RestoreError> {
    let options = RestoreOptions { force: args.force };
    let (log, output) = (args.source.log, &args.output);
    let show = |progress| bar.show(progress);
    let mut missing = None;
    for name in candidate_names(&args.database) {
        match restore::restore(store, &name, log, when, output, &options, &show).await {
            Ok(restored) => return Ok((name, restored)),
            // The error names what was typed, not the last thing that was tried.
            Err(error @ RestoreError::NoSuchDatabase { .. }) => missing = missing.or(Some(error)),
            Err(error) => return Err(error),
        }
    }
    Err(missing.unwrap_or_else(|| nothing_tried(&args.database)))
}

fn describe(name: &str, restored: &Restored, output: &Path) -> String {
    let transaction = &restored.transaction;
    format!(
        "restored {name} as of {} (bookmark {}) to {}: {} bytes, checksum verified",
        when::format_time(transaction.commit.time),
        Bookmark::from(transaction.position),
        output.display(),
        restored.file_bytes,
    )
}

impl ArchiveArgs {
    /// Opens the archive, and makes sure that it is there.
    pub async fn open(&self) -> Result<Arc<dyn Store>, Failure> {
        let url = match &self.archive {
            Some(url) => url.clone(),
            None => {
                let config = ClientConfig::load(self.config.as_deref())
                    .context("find the archive (or say --archive URL)")?;
                let missing = || {
                    let file = config.file.display();
                    let problem = format!("{file} names no archive: say --archive URL");
                    Failure::new(EXIT_FAILED, problem)
                };
                config.archive.clone().ok_or_else(missing)?
            }
        };
        let store = store::open(&url, &S3Options::default())
            .map_err(|error| Failure::new(EXIT_USAGE, error.to_string()))?;
        let problem = |error| Failure::new(EXIT_FAILED, format!("{error}"));
        store.check().await.map_err(problem)?;
        Ok(store)
    }
}

/// A moment on the command line; a mistake in it is one of usage.
pub fn parse_when(text: &str) -> Result<When, Failure> {
    When::parse(text, when::now()).map_err(|error| Failure::new(EXIT_USAGE, error.to_string()))
}

/// The names that DB may mean, the likeliest first: as it stands, and as the path of a file, whose
/// absolute form is the default name.
pub fn candidate_names(database: &str) -> Vec<String> {
    let mut names = vec![database.to_owned()];
    let path = Path::new(database);
    // Without a working directory only the name as it stands can be meant. The last is there
    // because the application may have been told another way to the same file.
    let paths = [std::path::absolute(path).ok(), path.canonicalize().ok()];
    for path in paths.into_iter().flatten() {
        if let Ok(name) = path.into_os_string().into_string()
            && !names.contains(&name)
        {
            names.push(name);
        }
    }
    names
}

/// The error of a search that had no name to search for.
pub fn nothing_tried(database: &str) -> RestoreError {
    let (name, store) = (database.to_owned(), "the archive".to_owned());
    RestoreError::NoSuchDatabase {
        name,
        store,
        near: Vec::new(),
    }
}

/// The exit status that scripts can tell an archive's errors apart by.
pub fn failure(error: RestoreError) -> Failure {
    let status = match &error {
        RestoreError::NoSuchDatabase { .. } => EXIT_NO_DATABASE,
        RestoreError::NotCovered { .. } => EXIT_NOT_COVERED,
        RestoreError::Damaged { .. }
        | RestoreError::Exists(_)
        | RestoreError::Local { .. }
        | RestoreError::Name(_)
        | RestoreError::Store(_)
        | RestoreError::TooMany { .. } => EXIT_FAILED,
    };
    Failure::new(status, error.to_string())
}

/// A progress bar on a terminal, nothing elsewhere.
struct Bar(ProgressBar);

impl Bar {
    fn new() -> Self {
        // Draws on stderr, and only if that is a terminal.
        let bar = ProgressBar::new(0);
        let template = "{bar:40} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        Self(bar)
    }

    fn show(&self, progress: Progress) {
        self.0.set_length(progress.total_bytes);
        self.0.set_position(progress.downloaded_bytes);
    }

    fn finish(&self) {
        self.0.finish_and_clear();
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use bytes::Bytes;
    use clap::Parser;
    use durovfs_archive::LogIdentity;
    use durovfs_archive::restore::Covered;
    use durovfs_archive::uploader::write_chunk;
    use durovfs_wire::entry::{Origin, PayloadBuilder};
    use durovfs_wire::{
        ClientId, CommitHeader, DatabaseChecksum, EntryPart, Epoch, Lsn, PageChecksum, PageNo,
        PageSize, PartHeader, PartKind, Timestamp,
    };
    use std::convert::Infallible;
    use tempfile::TempDir;

    pub(in crate::cli) const NAME: &str = "/srv/app.db";
    const START: i64 = 1_763_000_000_000_000;

    /// An archive with an epoch start and `count` commits of one page, a second apart.
    pub(in crate::cli) async fn archive_of(count: u8) -> (TempDir, String) {
        let folder = tempfile::tempdir().unwrap();
        let url = format!("file://{}/archive", folder.path().display());
        let store = store::open(&url, &S3Options::default()).unwrap();
        let database = DatabaseId::from_bytes([4; 16]);
        let identity = LogIdentity {
            database,
            name: NAME.into(),
        };
        let part = |lsn: u8, kind, payload| {
            let (epoch, lsn) = (Epoch::new(1), Lsn::new(lsn.into()));
            let header = PartHeader {
                database,
                epoch,
                lsn,
                part: 0,
                kind,
            };
            Ok::<_, Infallible>(EntryPart { header, payload })
        };
        let time = Timestamp::from_micros(START);
        let start = PartKind::EpochStart {
            time,
            last_transaction: None,
        };
        let mut parts = vec![part(1, start, Bytes::new())];
        for i in 1..=count {
            let (page_no, image) = (PageNo::new(1).unwrap(), [i; 512]);
            let mut checksum = DatabaseChecksum::EMPTY;
            checksum.toggle(PageChecksum::of(page_no, &image));
            let mut payload = PayloadBuilder::default();
            payload.push(0, page_no, &image);
            let commit = CommitHeader {
                origin: Origin {
                    client: ClientId::from_bytes([5; 16]),
                    sequence: i.into(),
                },
                time: Timestamp::from_micros(START + i64::from(i) * 1_000_000),
                base_lsn: Lsn::ZERO,
                page_size: PageSize::try_from(512).unwrap(),
                page_count: 1,
                slot_count: 1,
                checksum,
                whole_image: false,
            };
            parts.push(part(i + 1, PartKind::Commit(commit), payload.take()));
        }
        write_chunk(&store, &identity, folder.path(), move || parts.into_iter())
            .await
            .unwrap();
        (folder, url)
    }

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: RestoreArgs,
    }

    async fn restore(line: &[&str]) -> Result<(), Failure> {
        let line = ["restore"].iter().chain(line);
        run(Line::try_parse_from(line).unwrap().args).await
    }

    #[tokio::test]
    async fn each_way_to_say_when_restores_its_commit_and_others_have_their_status() {
        // Broken: the command would give another moment than was asked for, or the wrong status.
        let (folder, url) = archive_of(3).await;
        let path = |name: &str| folder.path().join(name).display().to_string();
        let cases = [
            ("latest", 3),
            ("lsn:3", 2),
            ("0000000000000002-00000001", 1),
            ("2025-11-13T02:13:22Z", 2),
            ("1 second ago", 3),
        ];
        for (i, (when, value)) in cases.into_iter().enumerate() {
            let output = path(&format!("{i}.db"));
            restore(&[NAME, "--at", when, "-o", &output, "--archive", &url])
                .await
                .unwrap();
            assert_eq!(std::fs::read(&output).unwrap(), [value; 512], "{when}");
        }
        let taken = path("0.db");
        let fresh = path("fresh.db");
        let wrong = url.replace("archive", "nowhere");
        for (line, status) in [
            (
                [NAME, "--at", "lsn:9", "-o", &fresh, "--archive", &url],
                EXIT_NOT_COVERED,
            ),
            (
                [
                    NAME,
                    "--at",
                    "2025-11-13T02:13:20Z",
                    "-o",
                    &fresh,
                    "--archive",
                    &url,
                ],
                4,
            ),
            (
                ["other", "--at", "latest", "-o", &fresh, "--archive", &url],
                EXIT_NO_DATABASE,
            ),
            (
                [NAME, "--at", "soon", "-o", &fresh, "--archive", &url],
                EXIT_USAGE,
            ),
            (
                [NAME, "--at", "latest", "-o", &fresh, "--archive", "nfs://x"],
                EXIT_USAGE,
            ),
            (
                [NAME, "--at", "latest", "-o", &fresh, "--archive", &wrong],
                EXIT_FAILED,
            ),
            (
                [NAME, "--at", "latest", "-o", &taken, "--archive", &url],
                EXIT_FAILED,
            ),
        ] {
            let failure = restore(&line).await.unwrap_err();
            assert!(
                !failure.message.contains("/other"),
                "not what was typed: {failure:?}"
            );
            assert_eq!(failure.status, status, "{line:?}: {}", failure.message);
            assert!(!Path::new(&fresh).exists(), "{line:?}");
        }
        restore(&[
            NAME,
            "--force",
            "-o",
            &taken,
            "--archive",
            &url,
            "--at=lsn:2",
        ])
        .await
        .unwrap();
        assert_eq!(std::fs::read(&taken).unwrap(), [1; 512]);
    }

    #[test]
    fn each_error_has_the_status_of_the_contract() {
        // Broken: a script could not tell "no such database" from "not that far back".
        assert_eq!(failure(nothing_tried("x")).status, 3);
        let not_covered = RestoreError::NotCovered {
            what: "no commit that early".into(),
            name: "x".into(),
            covered: Covered::default(),
        };
        assert_eq!(failure(not_covered).status, 4);
        assert_eq!(failure(RestoreError::Exists("x".into())).status, 1);
        assert_eq!(parse_when("soon").map_err(|failure| failure.status), Err(2));
    }

    #[test]
    fn a_database_is_looked_for_by_name_and_then_by_path() {
        // Broken: `durovfs restore app.db` beside the file would not find its database.
        let names = candidate_names("some/app.db");
        assert_eq!(names[0], "some/app.db");
        assert!(
            names[1].starts_with('/') && names[1].ends_with("/some/app.db"),
            "{names:?}"
        );
        assert_eq!(candidate_names("/x/app.db"), ["/x/app.db"]);
    }
}
