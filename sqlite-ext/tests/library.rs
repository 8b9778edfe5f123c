//! The shared library as hosts see it: its symbols, and what loading does in Debian's shell and
//! Python. Databases on a real cluster are tested in `tests/`.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Debian's Python, which loads extensions; others on the path may not.
const PYTHON: &str = "/usr/bin/python3";
const SHELL: &str = "/usr/bin/sqlite3";

fn library() -> PathBuf {
    // Beside the test's own executable: that is the one which this run has built.
    let executable = std::env::current_exe().unwrap();
    let library = executable.parent().unwrap().join("libdurovfs.so");
    assert!(library.exists(), "{} was not built", library.display());
    library
}

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", text(&output));
    text(&output)
}

fn text(output: &Output) -> String {
    let both = [output.stdout.as_slice(), output.stderr.as_slice()].concat();
    String::from_utf8_lossy(&both).into_owned()
}

/// A configuration of a sidecar that does not run; loading does not need it.
fn configured(directory: &Path, more: &str) -> PathBuf {
    let file = directory.join("client.toml");
    let text = format!(
        "sidecar = \"127.0.0.1:9\"\nnode = \"primary\"\nca = \"ca.pem\"\n\
         certificate = \"client.pem\"\nkey = \"client-key.pem\"\n{more}\n"
    );
    std::fs::write(&file, text).unwrap();
    file
}

#[test]
fn the_library_needs_no_sqlite_and_shows_only_its_entry_point() {
    // Broken if not: it does not load where SQLite is linked statically and hidden, or calls into
    // another SQLite than the one that loaded it.
    let undefined = run(Command::new("nm")
        .args(["-D", "--undefined-only"])
        .arg(library()));
    assert!(!undefined.contains("sqlite3"), "{undefined}");
    assert!(
        undefined.contains("malloc"),
        "nm shows nothing: {undefined}"
    );
    let defined = run(Command::new("nm")
        .args(["-D", "--defined-only"])
        .arg(library()));
    let names: Vec<_> = defined
        .lines()
        .filter_map(|line| line.split(' ').nth(2))
        .collect();
    assert_eq!(names, ["sqlite3_durovfs_init"]);
    let all = run(Command::new("nm").arg(library()));
    assert!(
        !all.contains("sqlite3_open"),
        "a second SQLite is in the library"
    );
    let dynamic = run(Command::new("readelf").arg("-d").arg(library()));
    assert!(
        dynamic.contains("NEEDED") && !dynamic.contains("sqlite"),
        "{dynamic}"
    );
}

#[test]
fn without_a_configuration_loading_fails_in_one_line_that_says_what_to_do() {
    // Broken if not: someone believes that the database is protected.
    let home = tempfile::tempdir().unwrap();
    let output = Command::new(SHELL)
        .args([":memory:", &format!(".load {}", library().display())])
        .env_clear()
        .env("HOME", home.path())
        .output()
        .unwrap();
    let said = text(&output);
    // What the shell shows, and the log: not every host shows what it gets.
    let lines: Vec<_> = said.trim().lines().collect();
    assert_eq!(lines.len(), 2, "{said}");
    for line in lines {
        assert!(line.contains("set DUROVFS_CONFIG"), "{line}");
    }
    let output = Command::new(SHELL)
        .args([":memory:", &format!(".load {}", library().display())])
        .env("DUROVFS_CONFIG", home.path().join("none.toml"))
        .output()
        .unwrap();
    assert!(text(&output).contains("none.toml"), "{}", text(&output));
}

#[test]
fn a_connection_that_was_open_before_the_load_is_told_that_it_is_not_protected() {
    // Broken if not: `sqlite3 app.db ".load libdurovfs"` looks protected and is not.
    let directory = tempfile::tempdir().unwrap();
    let config = configured(directory.path(), "exclude = [\"**/free.db\"]");
    let shell = |database: &str, log: &str| {
        run(Command::new(SHELL)
            .arg(directory.path().join(database))
            .arg("CREATE TABLE IF NOT EXISTS t(a)")
            .arg(format!(".load {}", library().display()))
            .arg("SELECT durovfs_status()")
            .env("DUROVFS_CONFIG", &config)
            .env("DUROVFS_LOG", log))
    };
    let said = shell("app.db", "error");
    let lines: Vec<_> = said.lines().collect();
    assert_eq!(lines.len(), 2, "{said}");
    for line in &lines {
        assert!(line.contains("opened before durovfs was loaded"), "{line}");
        assert!(line.contains("open it again"), "{line}");
    }
    let json: serde_json::Value = serde_json::from_str(lines[0]).unwrap();
    assert_eq!(json["protected"], false);
    assert!(lines[1].starts_with("durovfs: "), "{}", lines[1]);
    assert_eq!(shell("app.db", "off").lines().count(), 1);
    // A file that is left out on purpose is no reason for a line.
    let said = shell("free.db", "error");
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(said.contains("leaves it out"), "{said}");
}

#[test]
fn the_table_of_replicas_is_there_and_says_why_it_has_no_rows() {
    // Broken if not: an empty table looks like a cluster without replicas.
    let directory = tempfile::tempdir().unwrap();
    let config = configured(directory.path(), "");
    let output = Command::new(SHELL)
        .arg(":memory:")
        .arg(format!(".load {}", library().display()))
        .arg("SELECT count(*) FROM pragma_table_info('durovfs_replicas')")
        .arg("SELECT node, ack_p99_us FROM durovfs_replicas ORDER BY node")
        .env("DUROVFS_CONFIG", &config)
        .output()
        .unwrap();
    let said = text(&output);
    assert!(said.starts_with("8\n"), "{said}");
    assert!(
        said.contains("the main database is not protected"),
        "{said}"
    );
}

#[test]
fn an_open_that_cannot_reach_its_sidecar_fails_and_says_why() {
    // Broken if not: a file is opened without protection, or nobody learns the reason.
    let directory = tempfile::tempdir().unwrap();
    let config = configured(directory.path(), "");
    let output = Command::new(SHELL)
        .arg(":memory:")
        .arg(format!(".load {}", library().display()))
        .arg(format!(
            "ATTACH '{}' AS a",
            directory.path().join("app.db").display()
        ))
        .arg("SELECT durovfs_last_error()")
        .env("DUROVFS_CONFIG", &config)
        .output()
        .unwrap();
    let said = text(&output);
    // ATTACH takes the connection's own VFS, which is the one from before the load.
    assert!(!said.contains("unable to open"), "{said}");
    let output = Command::new(SHELL)
        .arg(":memory:")
        .arg(format!(".load {}", library().display()))
        .arg(format!(
            ".open {}",
            directory.path().join("app.db").display()
        ))
        .arg("CREATE TABLE t(a)")
        .env("DUROVFS_CONFIG", &config)
        .output()
        .unwrap();
    let said = text(&output);
    assert!(said.contains("unable to open database"), "{said}");
    assert!(
        said.contains("ca.pem"),
        "the log does not name the missing file: {said}"
    );
}

#[test]
fn loading_again_works_also_after_a_shutdown_of_sqlite() {
    // Broken if not: a host that shuts SQLite down and starts it again writes without protection.
    let directory = tempfile::tempdir().unwrap();
    let config = configured(directory.path(), "");
    let script = r#"
import ctypes, sys
s = ctypes.CDLL("libsqlite3.so.0")
s.sqlite3_vfs_find.restype = ctypes.c_void_p
s.sqlite3_free.argtypes = [ctypes.c_void_p]
class Vfs(ctypes.Structure):
    _fields_ = [("v", ctypes.c_int), ("o", ctypes.c_int), ("m", ctypes.c_int),
                ("next", ctypes.c_void_p), ("name", ctypes.c_char_p)]
def default():
    return Vfs.from_address(s.sqlite3_vfs_find(None)).name
def load():
    db, error = ctypes.c_void_p(), ctypes.c_char_p()
    assert s.sqlite3_open(b":memory:", ctypes.byref(db)) == 0
    assert s.sqlite3_enable_load_extension(db, 1) == 0
    code = s.sqlite3_load_extension(db, sys.argv[1].encode(), None, ctypes.byref(error))
    assert code == 0, error.value
    assert s.sqlite3_exec(db, b"SELECT durovfs_status()", None, None, None) == 0
    assert s.sqlite3_close(db) == 0
    other = ctypes.c_void_p()
    assert s.sqlite3_open(b":memory:", ctypes.byref(other)) == 0
    assert s.sqlite3_exec(other, b"SELECT durovfs_status('main')", None, None, None) == 0
    assert s.sqlite3_close(other) == 0
load(); load()
assert default() == b"durovfs", default()
assert s.sqlite3_shutdown() == 0
load()
assert default() == b"durovfs", default()
print("fine")
"#;
    let mut command = Command::new(PYTHON);
    command
        .args(["-c", script])
        .arg(library())
        .env("DUROVFS_CONFIG", &config);
    assert_eq!(run(&mut command).trim(), "fine");
}
