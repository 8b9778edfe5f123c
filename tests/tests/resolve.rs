//! Writes from outside are refused at the next open, with the line to type; that line, typed as it
//! is told, leads out either way, and nothing that is given up is lost.

use durovfs_tests::app::{App, CANTOPEN, NOT_COMMITTED, plain_query, sqlite_shell};
use durovfs_tests::binaries::binaries;
use durovfs_tests::cluster::{Cluster, ClusterOptions, text};
use durovfs_tests::image::{assert_same, beside, image_of};
use durovfs_tests::seed::Seeded;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(60);
const ROWS: &str = "SELECT group_concat(x, ',') FROM (SELECT x FROM t ORDER BY x)";

/// Makes a database with one row, `log`, and closes it.
fn protected(cluster: &Cluster, name: &str, journal: &str) -> PathBuf {
    let database = cluster.scratch().join(name);
    let mut app = App::open(cluster, &database);
    app.run(&format!("PRAGMA journal_mode={journal}"));
    app.run("CREATE TABLE t (x TEXT)");
    app.run("INSERT INTO t VALUES ('log')");
    app.close();
    database
}

/// What the shell tells about a database that cannot be opened.
fn refusal(cluster: &Cluster, database: &str) -> String {
    let shell = sqlite_shell(&cluster.client_config(), Path::new(database), "SELECT 1;");
    let errors = text(&shell.stderr);
    assert!(errors.contains("nothing was overwritten"), "{errors}");
    errors
}

/// Types the command that the refusal tells, for this side.
fn type_what_is_told(cluster: &Cluster, told: &str, side: &str) -> Output {
    let command = told
        .split('`')
        .find(|part| part.starts_with("durovfs resolve "))
        .unwrap_or_else(|| panic!("no command in: {told}"));
    assert!(command.ends_with(" --keep log"), "{command}");
    assert!(told.contains("(or `--keep local`)"), "{told}");
    let line = command.replace("--keep log", &format!("--keep {side}"));
    let folder = binaries()
        .durovfs
        .parent()
        .unwrap()
        .to_string_lossy()
        .into_owned();
    Command::new("sh")
        .args(["-c", &line])
        .env(
            "PATH",
            format!("{folder}:{}", std::env::var("PATH").unwrap()),
        )
        .env("DUROVFS_CONFIG", cluster.client_config())
        .output()
        .unwrap()
}

fn resolve(cluster: &Cluster, database: &Path, side: &str) -> Output {
    cluster.durovfs(&[
        "resolve",
        &database.to_string_lossy(),
        "--keep",
        side,
        "--json",
    ])
}

fn report(output: &Output) -> Value {
    assert!(output.status.success(), "{}", text(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn saved_beside(database: &Path) -> Vec<PathBuf> {
    let name = database.file_name().unwrap().to_string_lossy().into_owned();
    let mut saved: Vec<_> = std::fs::read_dir(database.parent().unwrap())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| {
            let found = path.file_name().unwrap().to_string_lossy().into_owned();
            let parts = ["-wal", "-shm", "-journal", "-mark", "-unfinished"];
            found.starts_with(&format!("{name}-durovfs-saved-"))
                && !parts.iter().any(|part| found.ends_with(part))
        })
        .collect();
    saved.sort();
    saved
}

/// Changes the files of a database as somebody does who knows nothing of durovfs. Its rows are then
/// `outside`, and perhaps `log`.
type Outside = fn(&Path);

fn write_plainly(database: &Path) {
    plain_query(database, "INSERT INTO t VALUES ('outside')");
}

/// Leaves the write in the WAL, as a process does that is killed.
fn write_and_die(database: &Path) {
    let mut app = App::open_plain(database);
    app.run("INSERT INTO t VALUES ('outside')");
    let pid = rustix::process::Pid::from_raw(app.pid().cast_signed()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    drop(app);
}

fn other_file(database: &Path) -> PathBuf {
    let other = beside(database, ".other");
    let _ = std::fs::remove_file(&other);
    plain_query(&other, "CREATE TABLE t (x TEXT)");
    plain_query(&other, "INSERT INTO t VALUES ('outside')");
    other
}

fn copy_over(database: &Path) {
    std::fs::copy(other_file(database), database).unwrap();
}

fn replace(database: &Path) {
    std::fs::rename(other_file(database), database).unwrap();
}

#[test]
fn every_write_from_outside_is_refused_and_both_ways_lead_out() {
    // Broken: a database that somebody touched is lost to its application, or one of the two
    // versions is gone for good.
    let cluster = Cluster::start(ClusterOptions::default());
    let cases: [(&str, &str, Outside); 5] = [
        ("written", "WAL", write_plainly),
        ("written and killed", "WAL", write_and_die),
        ("written plainly", "DELETE", write_plainly),
        ("copied over", "WAL", copy_over),
        ("replaced by rename", "DELETE", replace),
    ];
    for (what, journal, outside) in cases {
        for side in ["log", "local"] {
            let database = protected(&cluster, &format!("{what} {side}.db"), journal);
            outside(&database);
            let reader = cluster.scratch().join("looked-at.db");
            let local = image_of(&database, cluster.scratch());
            std::fs::write(&reader, &local).unwrap();
            let outside_rows = plain_query(&reader, ROWS);
            let told = refusal(&cluster, &database.to_string_lossy());
            assert!(
                told.contains("lsn 3 of epoch 1") || told.contains("lsn 4 of epoch 1"),
                "{told}"
            );
            let output = type_what_is_told(&cluster, &told, side);
            assert!(output.status.success(), "{}", text(&output.stderr));
            let mut app = App::open(&cluster, &database);
            let rows = app.value(ROWS);
            let saved = saved_beside(&database);
            assert_eq!(saved.len(), 1, "{what} {side}: {saved:?}");
            let (kept, given_up) = match side {
                "log" => ("log".to_owned(), outside_rows[0].clone()),
                _ => (outside_rows[0].clone(), "log".to_owned()),
            };
            assert_eq!(rows, kept, "{what} {side}");
            assert_eq!(plain_query(&saved[0], ROWS), [given_up], "{what} {side}");
            app.run("INSERT INTO t VALUES ('then')");
            app.close();
            cluster.wait_archived(&database, LIMIT);
            let restored = cluster.scratch().join("restored.db");
            let _ = std::fs::remove_file(&restored);
            cluster.restore(&database, None, &restored);
            let local = image_of(&database, cluster.scratch());
            assert_same(what, &local, &std::fs::read(&restored).unwrap());
        }
    }
}

#[test]
fn a_write_under_an_open_connection_is_refused_with_the_way_out() {
    // Broken: the application that has the database open goes on over what somebody else wrote.
    let cluster = Cluster::start(ClusterOptions::default());
    for journal in ["WAL", "DELETE"] {
        let database = protected(&cluster, &format!("{journal}.db"), journal);
        let mut app = App::open(&cluster, &database);
        app.run("INSERT INTO t VALUES ('log 2')");
        write_plainly(&database);
        for _ in 0..2 {
            let error = app
                .execute("INSERT INTO t VALUES ('lost')")
                .result
                .unwrap_err();
            assert_eq!(error.code, NOT_COMMITTED, "{error:?}");
        }
        let told = app.value("SELECT durovfs_last_error()");
        let told = told.as_str().unwrap().to_owned();
        assert!(told.contains("of epoch 1"), "{told}");
        // As long as it is open nothing is decided, whatever lock it holds.
        for side in ["log", "local"] {
            let output = type_what_is_told(&cluster, &told, side);
            let errors = text(&output.stderr);
            assert_eq!(output.status.code(), Some(1), "{errors}");
            assert!(errors.contains("in use"), "{errors}");
            assert!(
                errors.contains(&format!("process {}", app.pid())),
                "{errors}"
            );
        }
        assert_eq!(saved_beside(&database), Vec::<PathBuf>::new());
        // The last to close: it must not make the other write its own, nor undo it.
        app.close();
        let (side, rows) = match journal {
            "WAL" => ("local", "log,log 2,outside"),
            _ => ("log", "log,log 2"),
        };
        let output = type_what_is_told(&cluster, &told, side);
        assert!(output.status.success(), "{}", text(&output.stderr));
        let mut app = App::open(&cluster, &database);
        assert_eq!(app.value(ROWS), rows);
        app.close();
    }
}

#[test]
fn a_database_with_a_name_of_its_own_is_resolved_by_it() {
    // Broken: the command that is told decides about another database, or none.
    let cluster = Cluster::start(ClusterOptions::default());
    let file = cluster.scratch().join("it's mine.db");
    let uri = format!(
        "file:{}?durovfs_db=the%20shop",
        file.to_string_lossy().replace(' ', "%20")
    );
    let mut app = App::open(&cluster, Path::new(&uri));
    app.run("CREATE TABLE t (x TEXT)");
    app.run("INSERT INTO t VALUES ('log')");
    app.close();
    write_plainly(&file);
    let (_, reply) = App::start(&cluster, Path::new(&uri));
    assert_eq!(reply.result.unwrap_err().code & 0xff, CANTOPEN);
    let output = resolve(&cluster, &file, "log");
    assert_eq!(
        output.status.code(),
        Some(3),
        "the path is no name in the cluster"
    );
    // The shell's own quoting stands in the way of this name: as an application tells it.
    let mut app = App::spawn(&cluster.client_config());
    let plain = serde_json::json!({
        "open": ":memory:", "extension": binaries().extension.to_string_lossy(),
    });
    app.ask(&plain).result.unwrap();
    app.execute(&format!("ATTACH '{}' AS shop", uri.replace('\'', "''")))
        .result
        .unwrap_err();
    let told = app
        .value("SELECT durovfs_last_error()")
        .as_str()
        .unwrap()
        .to_owned();
    assert!(told.contains("--name 'the shop'"), "{told}");
    let output = type_what_is_told(&cluster, &told, "local");
    assert!(output.status.success(), "{}", text(&output.stderr));
    let mut app = App::open(&cluster, Path::new(&uri));
    assert_eq!(app.value(ROWS), "log,outside");
    app.close();
}

#[test]
fn what_cannot_be_decided_is_told() {
    // Broken: a slip of the fingers gives up a database that was well.
    let cluster = Cluster::start(ClusterOptions::default());
    let database = protected(&cluster, "app.db", "WAL");
    let missing = cluster.scratch().join("none.db");
    assert_eq!(resolve(&cluster, &missing, "log").status.code(), Some(3));
    assert_eq!(resolve(&cluster, &database, "both").status.code(), Some(2));
    let unknown = other_file(&database);
    let output = resolve(&cluster, &unknown, "log");
    assert_eq!(output.status.code(), Some(3), "{}", text(&output.stderr));
    assert_eq!(plain_query(&unknown, ROWS), ["outside"]);
    // A database that is level loses nothing whichever is kept.
    let kept = report(&resolve(&cluster, &database, "local"));
    assert_eq!(
        (&kept["kept"], &kept["name"]),
        (&"local".into(), &kept["file"])
    );
    assert!(
        kept["log_bookmark"].is_string() && kept["next_open"].is_string(),
        "{kept}"
    );
    let mut app = App::open(&cluster, &database);
    assert_eq!(app.value(ROWS), "log");
    app.close();
    let kept = report(&resolve(&cluster, &database, "log"));
    let saved = PathBuf::from(kept["saved"].as_str().unwrap());
    assert_eq!(plain_query(&saved, ROWS), ["log"]);
    let mut app = App::open(&cluster, &database);
    assert_eq!(app.value(ROWS), "log");
    app.close();
}

/// Kills a `durovfs resolve` after a moment; true when it was faster.
fn kill_resolve(cluster: &Cluster, database: &Path, side: &str, after: Duration) -> bool {
    let mut child = Command::new(&binaries().durovfs)
        .args(["resolve", "--keep", side])
        .arg(database)
        .env("DUROVFS_CONFIG", cluster.client_config())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    std::thread::sleep(after);
    child.kill().unwrap();
    child.wait().unwrap().success()
}

#[test]
fn a_resolve_that_is_killed_gives_nothing_up() {
    // Broken: kill -9 in the middle loses the version that was to be saved.
    let cluster = Cluster::start(ClusterOptions::default());
    let mut random = Seeded::from_environment("resolve");
    for side in ["log", "local"] {
        let database = protected(&cluster, &format!("{side}.db"), "WAL");
        let fill = "INSERT INTO t SELECT printf('%05d', value) || hex(randomblob(4000)) \
                    FROM generate_series(1, 4000)";
        plain_query(&database, fill);
        let outside = plain_query(&database, "SELECT count(*), sum(length(x)) FROM t");
        let mut finished = false;
        for _ in 0..8 {
            let (soon, late) = (Duration::from_millis(10), Duration::from_millis(500));
            let after = random.between(soon, late);
            finished |= kill_resolve(&cluster, &database, side, after);
            // Either the file is whole still, or it is saved whole and the file is on its way.
            let whole = |file: &Path| {
                let copy = cluster.scratch().join("looked-at.db");
                for suffix in ["", "-wal", "-shm"] {
                    let _ = std::fs::remove_file(beside(&copy, suffix));
                    let _ = std::fs::copy(beside(file, suffix), beside(&copy, suffix));
                }
                plain_query(&copy, "SELECT count(*), sum(length(x)) FROM t") == outside
            };
            let candidates = saved_beside(&database);
            assert!(
                candidates.iter().any(|saved| whole(saved)) || whole(&database),
                "{side}: what was to be given up, or kept, is gone: {candidates:?}"
            );
        }
        report(&resolve(&cluster, &database, side));
        let mut app = App::open(&cluster, &database);
        let rows = app.value("SELECT count(*) FROM t");
        assert_eq!(
            rows,
            if side == "log" { 1 } else { 4001 },
            "{side} {finished}"
        );
        app.run("INSERT INTO t VALUES ('then')");
        app.close();
    }
}
