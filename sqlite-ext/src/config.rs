//! The client's configuration: where the sidecar is, who this process is, what is protected.
//!
//! Looked for in this order: `DUROVFS_CONFIG`, `$XDG_CONFIG_HOME/durovfs/client.toml` (or
//! `~/.config`), `/etc/durovfs/client.toml`, and that of the development cluster,
//! `$XDG_STATE_HOME/durovfs/dev/client.toml` (or `~/.local/state`). The first that exists counts.

use durovfs_wire::NodeName;
use globset::{GlobBuilder, GlobSet, GlobSetBuilder};
use serde::Deserialize;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// No sensible configuration is larger.
const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// Why there is no usable configuration: one line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// None of the places has a file.
    #[error("no client configuration: set DUROVFS_CONFIG, or start `durovfs dev` (looked in {})",
        list(.0))]
    Missing(Vec<PathBuf>),
    /// A file cannot be used.
    #[error("client configuration {}: {problem}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
}

fn list(paths: &[PathBuf]) -> String {
    paths
        .iter()
        .map(|path| path.display().to_string())
        .collect::<Vec<_>>()
        .join(", ")
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawConfig {
    sidecar: String,
    node: String,
    ca: PathBuf,
    certificate: PathBuf,
    key: PathBuf,
    archive: Option<String>,
    #[serde(default)]
    include: Vec<String>,
    #[serde(default)]
    exclude: Vec<String>,
    #[serde(default)]
    keep_local: Vec<String>,
}

/// What the patterns of the configuration say about a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Selection {
    /// It matches a pattern of `include` (if there are any), and none of `exclude`.
    Protected,
    /// It does not.
    LeftOut {
        /// The key whose patterns decided.
        pattern: &'static str,
    },
}

/// The configuration, checked.
#[derive(Debug, Clone)]
pub struct ClientConfig {
    /// Where it was read.
    pub file: PathBuf,
    /// `host:port` of the sidecar.
    pub sidecar: String,
    /// The sidecar's name, which its certificate must carry.
    pub node: NodeName,
    /// Certificate of the cluster's authority.
    pub ca: PathBuf,
    /// Certificate of this client.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// The archive, for people; the extension does not use it.
    pub archive: Option<String>,
    include: GlobSet,
    exclude: GlobSet,
    keep_local: GlobSet,
}

impl ClientConfig {
    /// Finds and reads the configuration. `variable` gives the environment.
    ///
    /// # Errors
    /// When there is none, or it is not usable.
    pub fn find(variable: impl Fn(&str) -> Option<OsString>) -> Result<Self, ConfigError> {
        if let Some(path) = variable("DUROVFS_CONFIG").filter(|value| !value.is_empty()) {
            return Self::read(Path::new(&path));
        }
        let places = places(variable);
        for path in &places {
            // A file that is there but cannot be read is an error, not a reason to look further.
            match std::fs::metadata(path) {
                Ok(_) => return Self::read(path),
                Err(error) if is_missing(&error) => {}
                Err(error) => return Err(invalid(path, error)),
            }
        }
        Err(ConfigError::Missing(places))
    }

    /// Reads one file. Paths in it are relative to its directory.
    ///
    /// # Errors
    /// When it is not usable.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let length = std::fs::metadata(path)
            .map_err(|error| invalid(path, error))?
            .len();
        if length > MAX_CONFIG_BYTES {
            return Err(invalid(
                path,
                format!("{length} bytes exceed {MAX_CONFIG_BYTES}"),
            ));
        }
        let text = std::fs::read_to_string(path).map_err(|error| invalid(path, error))?;
        let raw: RawConfig = toml::from_str(&text)
            .map_err(|error| invalid(path, error.to_string().replace('\n', " ").trim()))?;
        let port = raw
            .sidecar
            .rsplit_once(':')
            .and_then(|(host, port)| (!host.is_empty()).then(|| port.parse::<u16>().ok())?);
        if port.is_none_or(|port| port == 0) {
            return Err(invalid(
                path,
                format!("sidecar: {:?} is not HOST:PORT", raw.sidecar),
            ));
        }
        // A path without a directory is relative to the current one.
        let directory = path.parent().unwrap_or(Path::new(""));
        Ok(Self {
            file: path.to_owned(),
            sidecar: raw.sidecar,
            node: raw
                .node
                .parse()
                .map_err(|error| invalid(path, format!("node: {error}")))?,
            ca: directory.join(raw.ca),
            certificate: directory.join(raw.certificate),
            key: directory.join(raw.key),
            archive: raw.archive,
            include: globs(&raw.include).map_err(|e| invalid(path, format!("include: {e}")))?,
            exclude: globs(&raw.exclude).map_err(|e| invalid(path, format!("exclude: {e}")))?,
            keep_local: globs(&raw.keep_local)
                .map_err(|e| invalid(path, format!("keep_local: {e}")))?,
        })
    }

    /// Whether a database file is to be protected.
    pub fn protects(&self, path: &Path) -> bool {
        self.selects(path) == Selection::Protected
    }

    /// What the patterns say about a database file.
    pub fn selects(&self, path: &Path) -> Selection {
        if self.exclude.is_match(path) {
            Selection::LeftOut { pattern: "exclude" }
        } else if !self.include.is_empty() && !self.include.is_match(path) {
            Selection::LeftOut { pattern: "include" }
        } else {
            Selection::Protected
        }
    }

    /// Whether a database file counts when it is not what its log says: when it was deleted, put
    /// back from a copy, or written without durovfs.
    pub fn keeps_local(&self, path: &Path) -> bool {
        self.keep_local.is_match(path)
    }
}

fn places(variable: impl Fn(&str) -> Option<OsString>) -> Vec<PathBuf> {
    let set = |name: &str| {
        variable(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    let home = set("HOME");
    let under = |base: &str, default: &str| {
        set(base).or_else(|| home.as_ref().map(|home| home.join(default)))
    };
    let mut places = Vec::new();
    places.extend(under("XDG_CONFIG_HOME", ".config").map(|d| d.join("durovfs/client.toml")));
    places.push(PathBuf::from("/etc/durovfs/client.toml"));
    places
        .extend(under("XDG_STATE_HOME", ".local/state").map(|d| d.join("durovfs/dev/client.toml")));
    places
}

fn is_missing(error: &std::io::Error) -> bool {
    matches!(
        error.kind(),
        std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory
    )
}

fn globs(patterns: &[String]) -> Result<GlobSet, globset::Error> {
    let mut set = GlobSetBuilder::new();
    for pattern in patterns {
        // `*` stays within a directory, `**` does not: what people know from their shells.
        set.add(GlobBuilder::new(pattern).literal_separator(true).build()?);
    }
    set.build()
}

fn invalid(path: &Path, problem: impl std::fmt::Display) -> ConfigError {
    ConfigError::Invalid {
        path: path.to_owned(),
        problem: problem.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    const TEXT: &str = r#"
        sidecar = "127.0.0.1:4001"
        node = "primary"
        ca = "ca.pem"
        certificate = "/abs/client.pem"
        key = "keys/client-key.pem"
    "#;

    fn write(path: &Path, text: &str) {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    #[test]
    fn the_first_place_that_has_a_file_counts() {
        // Broken if not: an application talks to another cluster than its user thinks.
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let mut environment = HashMap::from([("HOME", at("home").into_os_string())]);
        let find = |environment: &HashMap<&str, OsString>| {
            ClientConfig::find(|name| environment.get(name).cloned()).map(|config| config.file)
        };
        let Err(ConfigError::Missing(places)) = find(&environment) else {
            panic!("found one")
        };
        assert_eq!(
            places,
            [
                at("home/.config/durovfs/client.toml"),
                "/etc/durovfs/client.toml".into(),
                at("home/.local/state/durovfs/dev/client.toml"),
            ]
        );
        write(&places[2], TEXT);
        assert_eq!(find(&environment).as_ref(), Ok(&places[2]));
        write(&places[0], TEXT);
        assert_eq!(find(&environment).as_ref(), Ok(&places[0]));
        environment.insert("XDG_CONFIG_HOME", at("xdg").into_os_string());
        write(&at("xdg/durovfs/client.toml"), TEXT);
        assert_eq!(find(&environment), Ok(at("xdg/durovfs/client.toml")));
        environment.insert("DUROVFS_CONFIG", at("none.toml").into_os_string());
        assert!(matches!(
            find(&environment),
            Err(ConfigError::Invalid { .. })
        ));
    }

    #[test]
    fn paths_are_relative_to_the_file() {
        // Broken if not: the same application works in one directory and not in another.
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("client.toml");
        write(&file, TEXT);
        let config = ClientConfig::read(&file).unwrap();
        assert_eq!(config.ca, directory.path().join("ca.pem"));
        assert_eq!(config.certificate, Path::new("/abs/client.pem"));
        assert_eq!(config.key, directory.path().join("keys/client-key.pem"));
    }

    #[test]
    fn mistakes_are_named_in_one_line() {
        // Broken if not: a misspelt key is ignored, and files are not protected that should be.
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("client.toml");
        for (text, part) in [
            (format!("{TEXT}\nexcluded = []"), "excluded"),
            (TEXT.replace("4001", "x"), "HOST:PORT"),
            (TEXT.replace("127.0.0.1", ""), "HOST:PORT"),
            (TEXT.replace("\"primary\"", "\"Pri Mary\""), "node name"),
            (format!("{TEXT}\nexclude = [\"[\"]"), "exclude"),
            (format!("{TEXT}\nkeep_local = [\"[\"]"), "keep_local"),
            (TEXT.replace("ca =", "cert ="), "cert"),
        ] {
            write(&file, &text);
            let error = ClientConfig::read(&file).unwrap_err().to_string();
            assert!(error.contains(part), "{error:?} lacks {part:?}");
            assert!(
                error.contains("client.toml") && !error.contains('\n'),
                "{error:?}"
            );
        }
    }

    #[test]
    fn patterns_say_which_files_are_protected() {
        // Broken if not: a file is protected that must not be, or the other way round.
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("client.toml");
        write(&file, TEXT);
        assert!(
            ClientConfig::read(&file)
                .unwrap()
                .protects(Path::new("/any/app.db"))
        );
        write(
            &file,
            &format!("{TEXT}\ninclude = [\"/srv/**\"]\nexclude = [\"/srv/*.tmp\"]"),
        );
        let config = ClientConfig::read(&file).unwrap();
        for (path, protected) in [
            ("/srv/app.db", true),
            ("/srv/deep/er/app.db", true),
            ("/srv/x.tmp", false),
            ("/srv/deep/x.tmp", true),
            ("/home/app.db", false),
        ] {
            assert_eq!(config.protects(Path::new(path)), protected, "{path}");
        }
        let pattern = |path| match config.selects(Path::new(path)) {
            Selection::LeftOut { pattern } => pattern,
            Selection::Protected => "",
        };
        assert_eq!(pattern("/srv/x.tmp"), "exclude");
        assert_eq!(pattern("/home/app.db"), "include");
    }

    #[test]
    fn local_files_count_only_where_a_pattern_says_so() {
        // Broken if not: a lost disk empties a database that the log would have brought back.
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("client.toml");
        write(&file, TEXT);
        let scratch = Path::new("/srv/scratch/a.db");
        assert!(!ClientConfig::read(&file).unwrap().keeps_local(scratch));
        write(
            &file,
            &format!("{TEXT}\nkeep_local = [\"/srv/scratch/**\"]"),
        );
        let config = ClientConfig::read(&file).unwrap();
        assert!(config.keeps_local(scratch));
        assert!(!config.keeps_local(Path::new("/srv/app.db")));
    }
}
