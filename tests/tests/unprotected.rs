//! No misleading silence: each way in which a database is not protected has words of its own, in
//! `durovfs_status()` and in the log, and they say what to do.

use durovfs_tests::binaries::{binaries, host_file, program};
use durovfs_tests::cluster::{Cluster, ClusterOptions, text};
use serde_json::Value;
use std::path::PathBuf;
use std::process::{Command, Output};

/// Case of `programs/unprotected_host.py`, what happened, what to do.
const REASONS: [(&str, &str, &str); 12] = [
    (
        "opened early",
        "opened before durovfs was loaded",
        "open it again",
    ),
    (
        "attached early",
        "ATTACH takes the VFS of its connection",
        "attach again",
    ),
    (
        "attached with another VFS",
        "its URI says vfs=unix",
        "open it without that",
    ),
    ("no such schema", "there is no database \"nosuch\"", ""),
    (
        "temp",
        "in memory or temporary",
        "keep what must stay in a file",
    ),
    (
        "in memory",
        "in memory or temporary",
        "keep what must stay in a file",
    ),
    (
        "temporary",
        "in memory or temporary",
        "keep what must stay in a file",
    ),
    (
        "excluded",
        "client-excluding.toml leaves it out",
        "change exclude there",
    ),
    (
        "read-only",
        "open for reading only",
        "open it without mode=ro",
    ),
    ("immutable", "immutable=1", "open it without immutable=1"),
    ("vfs=unix", "its URI says vfs=unix", "open it without that"),
    (
        "another VFS by name",
        "with the VFS unix",
        "without naming one",
    ),
];

fn run(cluster: &Cluster, log: &str) -> Output {
    let text = std::fs::read_to_string(cluster.client_config()).expect("read the configuration");
    let config = cluster.path().join("client-excluding.toml");
    let excluding = text.replace("exclude = []", "exclude = [\"**/excluded.db\"]");
    assert_ne!(excluding, text, "the configuration has other lines now");
    std::fs::write(&config, excluding).expect("write a configuration");
    let directory: PathBuf = cluster.scratch().join(log);
    std::fs::create_dir(&directory).expect("make a directory");
    let output = Command::new(host_file("python/bin/python"))
        .arg(program("unprotected_host.py"))
        .arg(&binaries().extension)
        .current_dir(&directory)
        .env("DUROVFS_CONFIG", config)
        .env("DUROVFS_LOG", log)
        .output()
        .expect("run python; scripts/prepare installs it");
    assert!(output.status.success(), "{}", text_of(&output));
    output
}

fn text_of(output: &Output) -> String {
    format!("{}{}", text(&output.stdout), text(&output.stderr))
}

#[test]
fn each_way_of_not_being_protected_is_told_in_words() {
    // Broken: someone believes that commits are replicated, and they are not; or is told that they
    // are not, and does not know why.
    let cluster = Cluster::start(ClusterOptions::default());
    let output = run(&cluster, "info");
    let cases: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let log = text(&output.stderr);
    for (case, what, advice) in REASONS {
        let status = &cases[case];
        assert_eq!(status["protected"], false, "{case}: {status}");
        let reason = status["reason"].as_str().expect("a reason");
        assert!(reason.contains(what), "{case}: {reason}");
        assert!(reason.contains(advice), "{case}: {reason}");
        assert!(
            !reason.contains('\n') && !reason.contains("  "),
            "{case}: {reason:?}"
        );
    }
    for case in ["protected", "attached", "all attached are protected"] {
        let status = &cases[case];
        assert_eq!(status["protected"], true, "{case}: {status}");
        assert!(!status.to_string().contains("not protected"), "{status}");
    }
    for (case, protected, schema) in [
        ("one attached is not protected", true, "attached as o: "),
        ("opened early", false, "attached as a: "),
    ] {
        let status = &cases[case];
        assert_eq!(status["protected"], protected, "{status}");
        let warnings = status["warnings"].as_array().expect("warnings");
        let tells = |warning: &Value| warning.as_str().is_some_and(|w| w.starts_with(schema));
        assert_eq!(warnings.iter().filter(|w| tells(w)).count(), 1, "{status}");
    }
    // A connection's own file is told of when it is opened, or the extension is loaded into it.
    for (file, what) in [
        ("early.db", "opened before durovfs was loaded"),
        ("excluded.db", "leaves it out"),
        ("app.db", "open for reading only"),
        ("second.db", "immutable=1"),
        ("unix.db", "vfs=unix"),
        ("named.db", "the VFS unix"),
    ] {
        let tells =
            |line: &str| line.contains(&format!("{file} is not protected")) && line.contains(what);
        assert_eq!(
            log.lines().filter(|line| tells(line)).count(),
            1,
            "{file}: {log}"
        );
    }
}

#[test]
fn only_what_may_be_a_mistake_is_an_error_in_the_log() {
    // Broken: lines about what is meant hide the one that matters, or that one is missing.
    let cluster = Cluster::start(ClusterOptions::default());
    let log = text(&run(&cluster, "error").stderr);
    let lines: Vec<_> = log
        .lines()
        .filter(|line| line.contains("not protected"))
        .collect();
    assert_eq!(lines.len(), 1, "{log}");
    assert!(lines[0].contains("early.db is not protected"), "{log}");
}
