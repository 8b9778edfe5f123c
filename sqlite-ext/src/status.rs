//! The answers of the SQL functions, as values: the JSON of `durovfs_status()`, bookmarks,
//! warnings. No pointers; `lib.rs` moves them in and out of SQLite.

use crate::client::Client;
use durovfs_vfs::FileStatus;
use durovfs_vfs::sink::{SinkError, SinkErrorKind};
use durovfs_wire::client::FailureKind;
use durovfs_wire::status::{DatabaseStatus, ReplicaStatus, Role};
use durovfs_wire::{Bookmark, Epoch, LogPosition, Lsn};
use serde::Serialize;
use std::time::{Duration, Instant};

/// How long a status waits for the sidecar: it must also come when the sidecar is away.
const STATUS_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a search for a moment in the archive may take.
const FIND_TIMEOUT: Duration = Duration::from_secs(60);
/// Pause between two looks at a bookmark that has not come yet.
const WAIT_PAUSE: Duration = Duration::from_millis(20);

/// What `durovfs_status()` shows. Field names are part of the contract.
#[derive(Debug, Serialize, PartialEq, Eq)]
pub struct StatusReport {
    /// Whether commits of this database go to the quorum.
    pub protected: bool,
    /// Why not, and what to do.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Name in the cluster.
    pub database: Option<String>,
    /// Id of its log.
    pub log: Option<String>,
    /// `quorum`, for a protected database.
    pub durability: Option<&'static str>,
    /// Role of the sidecar towards it.
    pub role: Option<Role>,
    /// The primary's epoch.
    pub epoch: Option<Epoch>,
    /// Last transaction in the local file.
    pub lsn: Option<Lsn>,
    /// Known committed.
    pub commit_lsn: Option<Lsn>,
    /// Confirmed in the object store.
    pub archive_lsn: Option<Lsn>,
    /// Where the sidecar is, and whether it answers.
    pub sidecar: String,
    /// Version of the SQLite that asks.
    pub sqlite_version: String,
    /// What a person should look at.
    pub warnings: Vec<String>,
    /// The last refusal.
    pub last_error: Option<String>,
}

/// The report of a protected database.
pub fn protected(client: &Client, file: &FileStatus, sqlite_version: &str) -> StatusReport {
    let answer = client.database_status(&file.name, STATUS_TIMEOUT);
    report(&sidecar_of(client), file, &answer, sqlite_version)
}

fn sidecar_of(client: &Client) -> String {
    let config = client.config();
    format!("{} at {}", config.node, config.sidecar)
}

fn report(
    sidecar: &str,
    file: &FileStatus,
    answer: &Result<Option<DatabaseStatus>, SinkError>,
    sqlite_version: &str,
) -> StatusReport {
    // The shim has warned of the host's version.
    let mut warnings = file.warnings.clone();
    if file.in_flight {
        warnings
            .push("the outcome of a commit is unknown; the next write settles it first".to_owned());
    }
    if file.unconfirmed {
        warnings.push("deferred commits may not be confirmed yet: durovfs_wait()".to_owned());
    }
    let remote = match answer {
        Ok(remote) => {
            if remote.is_none() {
                warnings.push(format!("sidecar {sidecar} does not serve this database"));
            }
            remote.as_ref()
        }
        Err(error) => {
            warnings.push(error.message.clone());
            None
        }
    };
    warnings.extend(
        remote
            .iter()
            .flat_map(|remote| remote.warnings.iter().cloned()),
    );
    StatusReport {
        protected: true,
        reason: None,
        database: Some(file.name.clone()),
        log: Some(file.database.to_string()),
        durability: Some(file.durability.name()),
        role: remote.map(|remote| remote.role),
        epoch: Some(remote.map_or(file.epoch, |remote| remote.epoch)),
        lsn: Some(file.position.lsn),
        commit_lsn: remote.map(|remote| remote.commit_lsn),
        archive_lsn: remote.map(|remote| remote.archive_lsn),
        sidecar: sidecar.to_owned(),
        sqlite_version: sqlite_version.to_owned(),
        warnings,
        last_error: (!file.last_error.is_empty()).then(|| file.last_error.clone()),
    }
}

/// The report of a database that is not protected.
pub fn unprotected(
    client: &Client,
    reason: String,
    (version, number): (&str, i32),
    last_error: Option<String>,
) -> StatusReport {
    StatusReport {
        protected: false,
        reason: Some(reason),
        database: None,
        log: None,
        durability: None,
        role: None,
        epoch: None,
        lsn: None,
        commit_lsn: None,
        archive_lsn: None,
        sidecar: sidecar_of(client),
        sqlite_version: version.to_owned(),
        warnings: version_warnings(version, number),
        last_error,
    }
}

/// Known bugs of the host's SQLite that touch committed data.
fn version_warnings(version: &str, number: i32) -> Vec<String> {
    let mut warnings = Vec::new();
    if number < 3_050_002 {
        warnings.push(format!(
            "SQLite {version} can write a broken WAL after ROLLBACK TO in a transaction that \
             spilled (fixed in 3.50.2); durovfs refuses such a commit"
        ));
    }
    if number < 3_051_003 {
        warnings.push(format!(
            "SQLite {version} has the WAL-reset corruption bug (fixed in 3.51.3); avoid \
             checkpoints from several connections at once, or upgrade"
        ));
    }
    warnings
}

/// The replicas of a database, as their primary sees them.
///
/// # Errors
/// When the sidecar is not reached, or does not serve the database: one line.
pub fn replicas(client: &Client, file: &FileStatus) -> Result<Vec<ReplicaStatus>, String> {
    match client.database_status(&file.name, STATUS_TIMEOUT) {
        Ok(Some(remote)) => Ok(remote.replicas),
        Ok(None) => Err(format!(
            "sidecar {} does not serve {}",
            sidecar_of(client),
            file.name
        )),
        Err(error) => Err(error.message),
    }
}

/// The newest quorum-durable commit that the local file holds; none before the first.
pub fn newest_bookmark(file: &FileStatus) -> Option<Bookmark> {
    (file.position != LogPosition::ZERO).then(|| file.position.into())
}

/// The bookmark of the last commit at or before a moment.
///
/// # Errors
/// When the moment is not covered, or the sidecar is not reached: one line.
pub fn find_bookmark(client: &Client, file: &FileStatus, when: &str) -> Result<Bookmark, String> {
    match client.find_bookmark(file.database, when, FIND_TIMEOUT) {
        Ok(position) => Ok(position.into()),
        Err(error) => Err(error.message),
    }
}

/// Waits until a bookmark is quorum-durable. `status` gives the file's state, anew each time.
///
/// # Errors
/// When the time is over, the bookmark is of another history, or the sidecar says no: one line.
pub fn wait_for(
    client: &Client,
    bookmark: Bookmark,
    timeout: Option<Duration>,
    mut status: impl FnMut() -> Result<FileStatus, String>,
) -> Result<Bookmark, String> {
    let deadline = timeout.map(|timeout| Instant::now() + timeout);
    loop {
        let file = status()?;
        if let Some(reached) = reached(bookmark, file.position)? {
            return Ok(reached);
        }
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            return Err(format!(
                "bookmark {bookmark} is not durable yet: the time is over"
            ));
        }
        // Another host's or process's commit: the sidecar knows of it before the file does.
        let patience = left.unwrap_or(STATUS_TIMEOUT).min(STATUS_TIMEOUT);
        match client.database_status(&file.name, patience) {
            Ok(Some(remote)) if remote.commit_lsn >= bookmark.lsn => return Ok(bookmark),
            Ok(_) => {}
            // It may come back within the time.
            Err(SinkError {
                kind: SinkErrorKind::Unreachable,
                ..
            })
            | Err(SinkError {
                kind: SinkErrorKind::Refused(FailureKind::NoQuorum),
                ..
            }) => {}
            Err(error) => return Err(error.message),
        }
        std::thread::sleep(WAIT_PAUSE);
    }
}

/// Whether the local file has what a bookmark names: all that it has is quorum-durable.
fn reached(bookmark: Bookmark, position: LogPosition) -> Result<Option<Bookmark>, String> {
    let newest = Bookmark::from(position);
    if bookmark.lsn == newest.lsn && bookmark.epoch != newest.epoch {
        return Err(format!(
            "bookmark {bookmark} is of another history: the log has {newest}"
        ));
    }
    Ok((bookmark.lsn <= newest.lsn).then_some(bookmark))
}

#[cfg(test)]
mod tests {
    use super::*;
    use durovfs_wire::DatabaseId;

    fn file() -> FileStatus {
        FileStatus {
            database: DatabaseId::from_bytes([1; 16]),
            name: "/srv/app.db".to_owned(),
            position: LogPosition::new(Epoch::new(3), Lsn::new(9)),
            epoch: Epoch::new(4),
            timeout_ms: 10_000,
            durability: durovfs_vfs::Durability::Quorum,
            unconfirmed: false,
            in_flight: false,
            last_error: String::new(),
            warnings: Vec::new(),
        }
    }

    fn unreachable() -> SinkError {
        SinkError {
            kind: SinkErrorKind::Unreachable,
            message: "no answer".to_owned(),
        }
    }

    #[test]
    fn a_status_names_what_the_contract_names_even_without_a_sidecar() {
        // Broken if not: whoever watches the fields, most of all when the sidecar is away.
        let report = report("primary at h:1", &file(), &Err(unreachable()), "3.54.1");
        let json = serde_json::to_value(&report).unwrap();
        for field in [
            "protected",
            "database",
            "durability",
            "role",
            "epoch",
            "lsn",
            "commit_lsn",
            "archive_lsn",
            "sidecar",
            "sqlite_version",
            "warnings",
            "last_error",
        ] {
            assert!(json.get(field).is_some(), "{field} is missing in {json}");
        }
        assert_eq!(json["protected"], true);
        assert_eq!(json["database"], "/srv/app.db");
        assert_eq!((&json["lsn"], &json["epoch"]), (&9.into(), &4.into()));
        assert_eq!(json["warnings"], serde_json::json!(["no answer"]));
        assert!(json["commit_lsn"].is_null());
    }

    #[test]
    fn old_versions_are_warned_of_by_the_name_of_their_bugs() {
        // Broken if not: someone runs a SQLite that loses data and is not told.
        assert_eq!(version_warnings("3.40.1", 3_040_001).len(), 2);
        assert_eq!(version_warnings("3.51.2", 3_051_002).len(), 1);
        assert!(version_warnings("3.51.2", 3_051_002)[0].contains("WAL-reset"));
        assert!(version_warnings("3.51.3", 3_051_003).is_empty());
    }

    #[test]
    fn a_bookmark_is_reached_when_the_file_has_it_and_never_in_another_history() {
        // Broken if not: an application answers its user before the commit is durable, or waits for
        // what was lost.
        let position = LogPosition::new(Epoch::new(3), Lsn::new(9));
        let at = |lsn, epoch| Bookmark {
            lsn: Lsn::new(lsn),
            epoch: Epoch::new(epoch),
        };
        assert_eq!(reached(at(9, 3), position), Ok(Some(at(9, 3))));
        assert_eq!(reached(at(8, 2), position), Ok(Some(at(8, 2))));
        assert_eq!(reached(at(10, 3), position), Ok(None));
        assert!(reached(at(9, 2), position).is_err());
        assert_eq!(newest_bookmark(&file()), Some(at(9, 3)));
        assert_eq!(
            newest_bookmark(&FileStatus {
                position: LogPosition::ZERO,
                ..file()
            }),
            None
        );
    }
}
