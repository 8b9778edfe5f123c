//! Where the programs under test are. They are built once per test process, in release mode: the
//! tests move gigabytes. `DUROVFS_BIN` and `DUROVFS_EXTENSION` name others.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The interpreter that Debian ships, whose SQLite is loaded from the system.
pub const PYTHON: &str = "/usr/bin/python3";
/// The shell that Debian ships.
pub const SQLITE3: &str = "/usr/bin/sqlite3";

/// The programs under test.
#[derive(Debug, Clone)]
pub struct Binaries {
    /// The `durovfs` program.
    pub durovfs: PathBuf,
    /// The extension.
    pub extension: PathBuf,
}

/// The programs under test; builds them when the environment names none.
///
/// # Panics
/// When they cannot be built.
pub fn binaries() -> &'static Binaries {
    static BINARIES: OnceLock<Binaries> = OnceLock::new();
    BINARIES.get_or_init(|| {
        let named = |name| std::env::var_os(name).map(PathBuf::from);
        let found = match (named("DUROVFS_BIN"), named("DUROVFS_EXTENSION")) {
            (Some(durovfs), Some(extension)) => Binaries { durovfs, extension },
            _ => build(),
        };
        for file in [&found.durovfs, &found.extension] {
            assert!(file.exists(), "{} does not exist", file.display());
        }
        found
    })
}

/// A command that runs a program as host of the extension: under the program and arguments in
/// `DUROVFS_HOST_WRAPPER`, when that is set (`scripts/sanitize`).
pub fn host_command(host: &str) -> Command {
    let wrapper = std::env::var("DUROVFS_HOST_WRAPPER").unwrap_or_default();
    let mut words = wrapper.split_whitespace();
    match words.next() {
        Some(program) => {
            let mut command = Command::new(program);
            command.args(words).arg(host);
            command
        }
        None => Command::new(host),
    }
}

/// The root of the workspace.
pub fn workspace() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// A program of the tests, in `tests/programs`.
pub fn program(name: &str) -> PathBuf {
    workspace().join("tests/programs").join(name)
}

/// A file that `tests/hosts/prepare` has installed.
///
/// # Panics
/// When it has not: a host that is missing must not look like one that works.
pub fn host_file(name: &str) -> PathBuf {
    let file = workspace().join("target/hosts").join(name);
    assert!(
        file.exists(),
        "{} is missing; run scripts/prepare",
        file.display()
    );
    file
}

fn build() -> Binaries {
    let cargo = std::env::var_os("CARGO").unwrap_or("cargo".into());
    let status = Command::new(&cargo)
        .current_dir(workspace())
        .args([
            "build",
            "--release",
            "-p",
            "durovfs-sidecar",
            "-p",
            "durovfs-sqlite-ext",
        ])
        .status()
        .expect("run cargo");
    assert!(status.success(), "cargo build failed");
    let metadata = cargo_metadata::MetadataCommand::new()
        .current_dir(workspace())
        .no_deps()
        .exec()
        .expect("read cargo metadata");
    let release = metadata
        .target_directory
        .join("release")
        .into_std_path_buf();
    Binaries {
        durovfs: release.join("durovfs"),
        extension: release.join(format!("libdurovfs{}", std::env::consts::DLL_SUFFIX)),
    }
}
