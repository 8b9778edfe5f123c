//! Two bugs of SQLite that lose commits, brought about on purpose in the oldest host: plain, to see
//! that they are there, and through the shim, where nothing that was acknowledged may be lost.

use super::host::{Db, Failure, Host, Which};
use super::{recorder, shim};
use libsqlite3_sys as sqlite;
use std::ffi::CStr;
use std::path::Path;
use std::rc::Rc;

const PLAIN: &CStr = recorder::RECORDER;
const DUROVFS: &CStr = c"durovfs";

/// What a plain SQLite recovers from the files as they are now.
fn recovered(host: &'static Host, path: &Path, sql: &str) -> Vec<Vec<String>> {
    let copy = path.with_extension("copy");
    for suffix in ["", "-wal"] {
        let from = format!("{}{suffix}", path.display());
        std::fs::copy(from, format!("{}{suffix}", copy.display())).unwrap();
    }
    let db = Db::open(host, &copy, c"unix").unwrap();
    assert_eq!(db.must("PRAGMA integrity_check"), [["ok"]]);
    db.must(sql)
}

fn filled(host: &'static Host, path: &Path, vfs: &CStr) -> Db {
    let db = Db::open(host, path, vfs).unwrap();
    db.must(
        "PRAGMA journal_mode=WAL; PRAGMA wal_autocheckpoint=0; \
         CREATE TABLE t(id INTEGER PRIMARY KEY, data TEXT); \
         WITH n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 40) \
         INSERT INTO t SELECT i, printf('%.*c', 3500, 'a') FROM n",
    );
    db
}

/// What a savepoint takes back, when the transaction is small that is committed in its place.
const TAKEN_BACK: [&str; 2] = [
    // Old pages: they are written once more, and the commit reaches behind the overwritten frames.
    "UPDATE t SET data = printf('%.*c', 3500, 'b'); \
     UPDATE t SET data = printf('%.*c', 3500, 'c') WHERE id > 20",
    // New pages: they are forgotten, and the commit ends before the overwritten frames.
    "WITH n(i) AS (SELECT 200 UNION ALL SELECT i + 1 FROM n WHERE i < 240) \
     INSERT INTO t SELECT i, printf('%.*c', 3500, 'b') FROM n; \
     UPDATE t SET data = printf('%.*c', 3500, 'c') WHERE id > 220",
];

/// Frames are spilled, some of the last ones overwritten, and all taken back. SQLite still means to
/// seal the frames from the overwritten ones on, and does not seal those that come in their place.
fn savepoint(db: &Db, taken_back: &str) -> Result<(), Failure> {
    db.must(&format!(
        "PRAGMA cache_size=5; BEGIN; SAVEPOINT s; {taken_back}; \
         ROLLBACK TO s; INSERT INTO t VALUES (100, 'broken')",
    ));
    db.run("COMMIT").map(drop)
}

const COUNT: &str = "SELECT count(*), sum(id) FROM t";

#[test]
fn plain_sqlite_loses_commits_after_a_savepoint() {
    // Fails when the oldest host has no such bug: then the next test shows nothing.
    let host = Which::Oldest.host();
    shim(Which::Oldest);
    if !host.has_savepoint_bug() {
        println!("SQLite {}: without the bug", host.version);
        return;
    }
    for taken_back in TAKEN_BACK {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        let db = filled(host, &path, PLAIN);
        savepoint(&db, taken_back).unwrap();
        db.must("INSERT INTO t VALUES (101, 'acknowledged')");
        assert_eq!(db.must(COUNT), [["42", "1021"]]);
        assert_eq!(recovered(host, &path, COUNT), [["40", "820"]]);
    }
}

/// Broken, a commit that SQLite would lose in a crash is acknowledged, with all later ones.
#[test]
fn a_commit_that_a_savepoint_broke_is_refused() {
    for (which, taken_back, mode) in [Which::Oldest, Which::Newest]
        .into_iter()
        .flat_map(|which| TAKEN_BACK.map(|taken_back| (which, taken_back)))
        .flat_map(|(which, back)| ["NORMAL", "EXCLUSIVE"].map(|mode| (which, back, mode)))
    {
        let host = which.host();
        let sink = shim(which);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        let name = path.to_str().unwrap();
        let db = filled(host, &path, DUROVFS);
        db.must(&format!("PRAGMA locking_mode={mode}"));
        let before = sink.last_lsn(name);
        let result = savepoint(&db, taken_back);
        let mut rows = (40, 820);
        if host.has_savepoint_bug() {
            assert_eq!(result.unwrap_err().code, sqlite::SQLITE_IOERR_WRITE);
            let said = db.last_error();
            assert!(
                said.contains("SQLite could not recover this commit"),
                "{said}"
            );
            assert!(db.is_autocommit());
            assert_eq!(sink.last_lsn(name), before, "it was sent");
        } else {
            result.unwrap();
            rows = (41, 920);
        }
        let as_text = |(count, sum): (u64, u64)| [[count.to_string(), sum.to_string()]];
        assert_eq!(db.must(COUNT), as_text(rows));
        db.must("INSERT INTO t VALUES (101, 'acknowledged')");
        rows = (rows.0 + 1, rows.1 + 101);
        assert_eq!(recovered(host, &path, COUNT), as_text(rows));
        drop(db);
        recorder::assert_agreement(name);
        sink.compare(name, &std::fs::read(&path).unwrap());
    }
}

/// How the WAL ends that a checkpoint miscounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ending {
    BegunAnew,
    Truncated,
    Closed,
}

/// A checkpoint is overtaken by a writer that begins the WAL anew, and counts the frames of the old
/// WAL as copied from the new one. Then the new one grows to just that length, and ends. Returns
/// how often the commit after that was refused.
fn overtaken_checkpoint(host: &'static Host, path: &Path, vfs: &CStr, ending: Ending) -> u32 {
    let writer = Rc::new(filled(host, path, vfs));
    let other = Db::open(host, path, vfs).unwrap();
    other.must("PRAGMA wal_autocheckpoint=0; SELECT count(*) FROM t");
    // One frame each; SQLite does not write what does not change.
    let update = |db: &Db, id: u32| {
        db.run(&format!(
            "UPDATE t SET data = printf('%.*c', length(data) + 1, 'd') WHERE id = {id}"
        ))
    };
    update(&writer, 1).unwrap();
    let copied = writer.must("PRAGMA wal_checkpoint(FULL)");
    let frames: u32 = copied[0][1].parse().unwrap();
    assert_eq!(
        copied[0],
        ["0".to_owned(), frames.to_string(), frames.to_string()]
    );
    assert!(frames > 40, "{frames}");
    let overtaker = Rc::clone(&writer);
    recorder::at_next_unfetch(move || drop(update(&overtaker, 2).unwrap()));
    other.must("PRAGMA wal_checkpoint(PASSIVE)");
    let name = path.to_str().unwrap();
    for id in 0..2 * frames {
        // At this length nothing is left to copy, as SQLite counts.
        if recorder::wal_frames(name) == frames as usize {
            break;
        }
        update(&writer, id % 40 + 1).unwrap();
    }
    assert_eq!(recorder::wal_frames(name), frames as usize);
    let mut refused = 0;
    match ending {
        Ending::BegunAnew => {
            while let Err(failure) = update(&writer, 3) {
                assert_eq!(failure.code, sqlite::SQLITE_IOERR_WRITE, "{failure:?}");
                refused += 1;
                assert!(refused < 3, "{}", writer.last_error());
            }
        }
        Ending::Truncated => drop(other.must("PRAGMA wal_checkpoint(TRUNCATE)")),
        Ending::Closed => {}
    }
    drop(other);
    refused
}

const LETTERS: &str = "SELECT substr(data, 1, 1), count(*) FROM t GROUP BY 1 ORDER BY 1";

const ENDINGS: [Ending; 3] = [Ending::BegunAnew, Ending::Truncated, Ending::Closed];

#[test]
fn plain_sqlite_loses_pages_when_a_checkpoint_is_overtaken() {
    // Fails when the oldest host has no such bug: then the next test shows nothing.
    let host = Which::Oldest.host();
    shim(Which::Oldest);
    if host.version >= 3_051_003 {
        println!("SQLite {}: without the bug", host.version);
        return;
    }
    for ending in ENDINGS {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        overtaken_checkpoint(host, &path, PLAIN, ending);
        let db = Db::open(host, &path, c"unix").unwrap();
        let letters = db.must(LETTERS);
        assert_eq!(letters.len(), 2, "all is there, {ending:?}: {letters:?}");
    }
}

/// Broken, the local file loses pages of acknowledged commits, and the next transaction is made of
/// what they were before.
#[test]
fn pages_that_a_checkpoint_left_out_are_written_before_the_wal_ends() {
    for which in [Which::Oldest, Which::Newest] {
        for ending in ENDINGS {
            let host = which.host();
            let sink = shim(which);
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("a.db");
            let name = path.to_str().unwrap();
            let refused = overtaken_checkpoint(host, &path, DUROVFS, ending);
            let is_hit = host.version < 3_051_003 && ending == Ending::BegunAnew;
            assert_eq!(refused, u32::from(is_hit), "{which:?}, {ending:?}");
            recorder::assert_agreement(name);
            sink.compare(name, &std::fs::read(&path).unwrap());
            let db = Db::open(host, &path, DUROVFS).unwrap();
            assert_eq!(db.must(LETTERS), [["d", "40"]], "{which:?}, {ending:?}");
            db.must("INSERT INTO t VALUES (100, 'and on')");
        }
    }
}
