//! One transaction of a gigabyte: it commits, and nobody holds it in memory.

use durovfs_tests::app::App;
use durovfs_tests::cluster::{Cluster, ClusterOptions, peak_resident_bytes};
use durovfs_tests::image::{checksum_of, image_of};
use std::path::Path;
use std::time::Duration;

/// Rows of this many bytes of noise, which no layer can compress away.
const ROW_BYTES: u64 = 1 << 20;
const ROWS: u64 = 1024;
/// What the issue allows the extension and each sidecar.
const LIMIT_BYTES: u64 = 200 << 20;
const ARCHIVE_LIMIT: Duration = Duration::from_secs(600);

/// Runs the transaction and returns the process's largest resident set.
fn run_transaction(app: &mut App) -> u64 {
    app.run("PRAGMA journal_mode=WAL");
    // SQLite's own cache must spill, or it would hold the gigabyte itself.
    app.run("PRAGMA cache_size=-8192");
    app.run("CREATE TABLE t (n INTEGER PRIMARY KEY, x BLOB)");
    app.run("BEGIN");
    for n in 0..ROWS {
        app.run(&format!(
            "INSERT INTO t VALUES ({n}, randomblob({ROW_BYTES}))"
        ));
    }
    app.run("COMMIT");
    assert_eq!(app.value("SELECT count(*) FROM t"), ROWS);
    peak_resident_bytes(app.pid())
}

fn plain_peak(scratch: &Path) -> u64 {
    let file = scratch.join("plain.db");
    let mut app = App::open_plain(&file);
    let peak = run_transaction(&mut app);
    app.close();
    std::fs::remove_file(file).unwrap();
    peak
}

#[test]
fn a_gigabyte_commits_within_200_megabytes() {
    // Broken: a bulk load would take the host or a node down by its memory, or hold up the acks
    // of everybody else until it is through.
    let mut cluster = Cluster::start(ClusterOptions::default());
    let database = cluster.scratch().join("app.db");
    let plain = plain_peak(cluster.scratch());
    let mut app = App::open(&cluster, &database);
    let protected = run_transaction(&mut app);
    let share = protected.saturating_sub(plain);
    println!(
        "application: {} MiB, plain SQLite: {} MiB",
        protected >> 20,
        plain >> 20
    );
    let mut peaks = vec![("extension".to_owned(), share)];
    app.close();
    cluster.wait_archived(&database, ARCHIVE_LIMIT);
    for node in std::iter::once("primary".to_owned()).chain(cluster.replicas()) {
        let peak = peak_resident_bytes(cluster.pid(&node).as_raw_nonzero().get().unsigned_abs());
        println!("{node}: {} MiB", peak >> 20);
        peaks.push((node, peak));
    }
    for (who, peak) in peaks {
        assert!(peak < LIMIT_BYTES, "{who} held {} MiB", peak >> 20);
    }
    cluster.stop();
    let restored = cluster.scratch().join("restored.db");
    cluster.restore(&database, None, &restored);
    let image = image_of(&database, cluster.scratch());
    assert_eq!(
        checksum_of(&std::fs::read(restored).unwrap()),
        checksum_of(&image)
    );
}
