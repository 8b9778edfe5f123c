//! From the name of a database to the file of its copy.

use std::path::{Path, PathBuf};

/// Longest name of a file or folder.
const MAX_COMPONENT_BYTES: usize = 255;
/// What stands beside databases; a copy with such a name would be taken for it.
const RESERVED_SUFFIXES: [&str; 4] = ["-wal", "-shm", "-journal", super::stand::SUFFIX];

/// Why a database of this name has no copy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no file can be called by the name {name:?}: {reason}")]
pub struct UnusableName {
    /// The name.
    pub name: String,
    /// What is wrong with it.
    pub reason: &'static str,
}

/// The file of a database's copy: the name, which mostly is a path, below the folder of the copies.
///
/// # Errors
/// When the name would lead out of the folder, or to a file that belongs to another database.
pub fn copy_path(folder: &Path, name: &str) -> Result<PathBuf, UnusableName> {
    let unusable = |reason| UnusableName {
        name: name.to_owned(),
        reason,
    };
    let relative = name.trim_start_matches('/');
    if relative.is_empty() {
        return Err(unusable("it is empty"));
    }
    for component in relative.split('/') {
        if matches!(component, "" | "." | "..") || component.contains('\0') {
            return Err(unusable("it is no plain path"));
        }
        // The longest file beside it must fit, too.
        if component.len() + super::stand::SUFFIX.len() > MAX_COMPONENT_BYTES {
            return Err(unusable("a part of it is too long"));
        }
    }
    if RESERVED_SUFFIXES
        .iter()
        .any(|suffix| relative.ends_with(suffix))
    {
        return Err(unusable("it ends as what stands beside a database does"));
    }
    Ok(folder.join(relative))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_below_the_folder() {
        // Broken: a database's name could make a sidecar write over any file of its host.
        let folder = Path::new("/copies");
        let path = |name: &str| copy_path(folder, name).ok();
        assert_eq!(path("/srv/app.db"), Some("/copies/srv/app.db".into()));
        assert_eq!(path("room-7"), Some("/copies/room-7".into()));
        assert_eq!(path("//srv/app.db"), Some("/copies/srv/app.db".into()));
        for bad in [
            "",
            "/",
            "../etc/passwd",
            "/srv/../../x",
            "a/./b",
            "a//b",
            "a\0b",
        ] {
            assert_eq!(path(bad), None, "{bad:?}");
        }
        assert_eq!(path("/srv/app.db-wal"), None);
        assert_eq!(path(&"x".repeat(250)), None);
    }
}
