//! A cluster whose archive is a bucket of a real S3 server (`scripts/s3-server`).
//!
//! Broken: commits that are never confirmed in the store, a restore that needs anything but the
//! bucket and its credentials.

use durovfs_tests::app::App;
use durovfs_tests::cluster::{Cluster, ClusterOptions};
use durovfs_tests::image::{assert_same, image_of};
use std::time::Duration;

/// Where the bucket is; `scripts/test` starts the server.
const URL_VARIABLE: &str = "DUROVFS_TEST_S3_URL";

#[test]
fn a_bucket_gives_the_database_back() {
    let Ok(url) = std::env::var(URL_VARIABLE) else {
        assert!(
            std::env::var_os("CI").is_none(),
            "{URL_VARIABLE} is not set"
        );
        eprintln!("left out: {URL_VARIABLE} is not set; run it through scripts/s3-server");
        return;
    };
    let options = ClusterOptions {
        archive: Some(url.clone()),
        ..ClusterOptions::default()
    };
    let cluster = Cluster::start(options);
    let database = cluster.scratch().join("app.db");
    let mut app = App::open(&cluster, &database);
    app.run("PRAGMA journal_mode = WAL");
    app.run("CREATE TABLE t (a INTEGER PRIMARY KEY, b TEXT)");
    for row in 0..300 {
        app.run(&format!(
            "INSERT INTO t (b) VALUES (hex(randomblob({})))",
            10 + row * 7
        ));
    }
    let bookmark = app.value("SELECT durovfs_bookmark()");
    let before = image_of(&database, cluster.scratch());
    app.run("DROP TABLE t");
    cluster.wait_archived(&database, Duration::from_secs(60));
    app.close();
    let restored = cluster.scratch().join("restored.db");
    let output = cluster.durovfs(&[
        "restore",
        &database.to_string_lossy(),
        "--archive",
        &url,
        "--at",
        bookmark.as_str().expect("a bookmark"),
        "-o",
        &restored.to_string_lossy(),
    ]);
    assert!(output.status.success(), "{output:?}");
    assert_same(
        "restored from S3",
        &std::fs::read(&restored).expect("the file"),
        &before,
    );
}
