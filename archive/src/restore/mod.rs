//! From a listing to an ordinary SQLite file as it was after one transaction.
//!
//! [`plan`] says which objects are needed, from their keys alone; [`execute`] downloads them in
//! parallel, applies them in order exactly up to the target, proves the result by the database
//! checksum of the target, and only then gives it its name. [`restore`] is both, for people.

mod execute;
mod image;
mod plan;

pub use execute::{Progress, RestoreOptions, Restored, execute};
pub(crate) use execute::{blocking, build_image, download, local};
pub use plan::{Plan, PlanError, plan};

use crate::chunk::ChunkError;
use crate::index::ArchiveIndex;
pub use crate::index::Covered;
use crate::layout::InvalidName;
use crate::listing::{Listing, database_names, near_names};
use crate::store::{Store, StoreError};
use crate::when::When;
use durovfs_wire::DatabaseId;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Why there is no restored database. Nothing is left behind.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The archive has no log of this name.
    #[error("no database {name:?} in {store}{}", suggestion(near))]
    NoSuchDatabase {
        /// What was asked for.
        name: String,
        /// Where.
        store: String,
        /// What may have been meant.
        near: Vec<String>,
    },
    /// The archive does not reach the moment that was asked for.
    #[error("{what}; the archive of {name} covers {covered}")]
    NotCovered {
        /// What is not covered.
        what: String,
        /// The database.
        name: String,
        /// What is covered.
        covered: Covered,
    },
    /// An object is damaged, or the history has a hole.
    #[error("{object}: {reason}")]
    Damaged {
        /// The object, or the database.
        object: String,
        /// What is wrong.
        reason: String,
    },
    /// The file to be written is there, or has a log beside it that SQLite would replay into it.
    #[error("{0} exists; use --force to replace it, or another name")]
    Exists(PathBuf),
    /// The local disk fails.
    #[error("{action} {path:?}: {source}")]
    Local {
        /// What was done.
        action: &'static str,
        /// With what.
        path: PathBuf,
        /// What failed.
        source: std::io::Error,
    },
    /// A listing of commits would be too long to be held.
    #[error("more than {limit} commits between these moments; ask for a shorter time")]
    TooMany {
        /// How many are given at most.
        limit: usize,
    },
    /// The name cannot be one.
    #[error(transparent)]
    Name(#[from] InvalidName),
    /// The store fails.
    #[error(transparent)]
    Store(#[from] StoreError),
}

fn suggestion(near: &[String]) -> String {
    if near.is_empty() {
        "; a new one is there after its first upload (`durovfs status`: archived)".to_owned()
    } else {
        format!("; did you mean {}?", near.join(" or "))
    }
}

impl RestoreError {
    /// A chunk error, with the object that it was found in.
    pub(crate) fn in_object(object: &str, error: ChunkError) -> Self {
        match error {
            ChunkError::Io(source) => {
                let action = "read or write a local copy of";
                Self::Local {
                    action,
                    path: object.into(),
                    source,
                }
            }
            other => Self::Damaged {
                object: object.to_owned(),
                reason: other.to_string(),
            },
        }
    }
}

/// Restores a database by its name: finds its log, plans, executes.
///
/// Where several logs had the name one after the other, a time means the newest of them that had
/// begun by then; anything else means the newest. `log` chooses one by its id.
///
/// # Errors
/// See [`RestoreError`].
pub async fn restore(
    store: &Arc<dyn Store>,
    name: &str,
    log: Option<DatabaseId>,
    when: When,
    output: &Path,
    options: &RestoreOptions,
    progress: &(dyn Fn(Progress) + Send + Sync),
) -> Result<Restored, RestoreError> {
    let logs = find_logs(store, name, log).await?;
    let mut refused = None;
    for listing in logs {
        let outcome = match plan(&listing, when) {
            Ok(plan) => execute(store, &plan, output, options, progress).await,
            Err(error) => Err(error.into_restore_error(&listing)),
        };
        match outcome {
            Err(RestoreError::NotCovered { what, name, .. }) => {
                let covered = ArchiveIndex::of(store, listing).covered().await?;
                // Only a time can be meant for an older log: positions begin anew in each.
                let error = RestoreError::NotCovered {
                    what,
                    name,
                    covered,
                };
                if !matches!(when, When::Time(_)) {
                    return Err(error);
                }
                refused = refused.or(Some(error));
            }
            outcome => return outcome,
        }
    }
    Err(refused.unwrap_or(no_such_database(store.as_ref(), name).await?))
}

/// The logs of a name, newest first, or the error that there are none.
///
/// # Errors
/// When there are none, or the store fails.
pub async fn find_logs(
    store: &Arc<dyn Store>,
    name: &str,
    log: Option<DatabaseId>,
) -> Result<Vec<Listing>, RestoreError> {
    let mut logs = Listing::load(store.as_ref(), name).await?;
    logs.retain(|listing| log.is_none_or(|wanted| listing.database == wanted));
    if logs.is_empty() {
        return Err(no_such_database(store.as_ref(), name).await?);
    }
    Ok(logs)
}

async fn no_such_database(store: &dyn Store, name: &str) -> Result<RestoreError, RestoreError> {
    let names = database_names(store).await?;
    Ok(RestoreError::NoSuchDatabase {
        name: name.to_owned(),
        store: store.url().to_owned(),
        near: near_names(name, &names),
    })
}

#[cfg(test)]
mod plan_tests;
#[cfg(test)]
mod tests;
