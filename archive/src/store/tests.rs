//! One suite over every store. A directory always; S3 when `DUROVFS_TEST_S3_URL` and credentials
//! are set, as `scripts/s3-server` does.

use super::*;
use std::sync::atomic::{AtomicU64, Ordering};

/// A store to test, empty, and what must outlive it.
pub(crate) struct TestStore {
    pub(crate) store: Arc<dyn Store>,
    _folder: Option<tempfile::TempDir>,
}

static NEXT: AtomicU64 = AtomicU64::new(0);

/// Every store that can be reached from here.
pub(crate) fn stores() -> Vec<TestStore> {
    let folder = tempfile::tempdir().unwrap();
    let url = format!("file://{}/not%20yet/there", folder.path().display());
    let store = open(&url, &S3Options::default()).unwrap();
    let mut stores = vec![TestStore {
        store,
        _folder: Some(folder),
    }];
    if let Ok(url) = std::env::var("DUROVFS_TEST_S3_URL") {
        let (start, query) = url.split_once('?').unwrap();
        let unique = format!(
            "{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let nanos = std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos();
        let url = format!("{start}/{nanos}-{unique}?{query}");
        let store = open(&url, &S3Options::default()).unwrap();
        stores.push(TestStore {
            store,
            _folder: None,
        });
    }
    stores
}

const KEY: &str = "databases/%2Fsrv%2Fa%20b.db/0011/chunks/1-2.chunk";

// Broken: an upload would replace history, or say that it is there when it is not.
#[tokio::test]
async fn an_object_is_put_once_and_comes_back() {
    for TestStore { store, _folder } in stores() {
        let first = Bytes::from_static(b"first");
        let put = |bytes: &Bytes| Body::Bytes(bytes.clone());
        assert_eq!(
            store.put_if_absent(KEY, put(&first)).await.unwrap(),
            PutOutcome::Created
        );
        let second = Bytes::from_static(b"second!");
        let outcome = store.put_if_absent(KEY, put(&second)).await.unwrap();
        assert_eq!(outcome, PutOutcome::AlreadyThere, "{}", store.url());
        assert_eq!(store.get(KEY).await.unwrap(), first);
        assert_eq!(store.get_range(KEY, 1, 3).await.unwrap(), "irs");
        assert_eq!(store.get_range(KEY, 5, 0).await.unwrap(), "");
        assert!(
            store.get_range(KEY, 3, 5).await.is_err(),
            "a range beyond the end"
        );
        let missing = store.get("databases/x").await;
        assert!(
            matches!(missing, Err(StoreError::NotFound { .. })),
            "{missing:?}"
        );
        store.check().await.unwrap();
    }
}

// Broken: large chunks would arrive cut, or not at all.
#[tokio::test]
async fn large_files_go_up_whole() {
    for TestStore { store, _folder } in stores() {
        for size in [0, 1, (8 << 20) + 1, (24 << 20) + 4321] {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("file");
            let bytes: Vec<u8> = (0..size).map(|i| ((i * 31) >> 3) as u8).collect();
            std::fs::write(&path, &bytes).unwrap();
            let key = format!("large/{size}");
            for expected in [PutOutcome::Created, PutOutcome::AlreadyThere] {
                let outcome = store.put_if_absent(&key, Body::File(&path)).await.unwrap();
                assert_eq!(outcome, expected);
            }
            assert!(
                store.get(&key).await.unwrap() == bytes,
                "{size} of {}",
                store.url()
            );
        }
    }
}

// Broken: of two uploaders of different contents both would believe that theirs is in the store.
#[tokio::test]
async fn of_many_puts_at_once_one_wins() {
    for TestStore { store, _folder } in stores() {
        let puts = (0..16u8).map(|i| {
            let store = Arc::clone(&store);
            tokio::spawn(async move {
                (
                    i,
                    store
                        .put_if_absent("race", Body::Bytes(vec![i; 99].into()))
                        .await
                        .unwrap(),
                )
            })
        });
        let mut winners = Vec::new();
        for put in puts.collect::<Vec<_>>() {
            let (i, outcome) = put.await.unwrap();
            if outcome == PutOutcome::Created {
                winners.push(i);
            }
        }
        assert_eq!(winners.len(), 1, "{}", store.url());
        assert_eq!(store.get("race").await.unwrap(), vec![winners[0]; 99]);
    }
}

// Broken: chunks beyond the first page of a listing would be lost to every restore.
#[tokio::test]
async fn listings_are_complete_sorted_and_bounded_by_their_prefix() {
    for TestStore { store, _folder } in stores() {
        assert_eq!(store.list("").await.unwrap(), []);
        assert_eq!(
            store.list_folders("d/").await.unwrap(),
            Vec::<String>::new()
        );
        let count = 1003; // one page of S3, and three
        let keys: Vec<_> = (0..count).map(|i| format!("d/%2Fa/{i:05}")).collect();
        for keys in keys.chunks(50) {
            let puts = keys
                .iter()
                .map(|key| store.put_if_absent(key, Bytes::new().into()));
            let done = futures_util::future::join_all(puts).await;
            assert!(
                done.into_iter()
                    .all(|outcome| outcome.unwrap() == PutOutcome::Created)
            );
        }
        store
            .put_if_absent("d/%2Fab/x", Bytes::from_static(b"abc").into())
            .await
            .unwrap();
        let listed = store.list("d/%2Fa/").await.unwrap();
        assert!(
            listed.iter().map(|object| &object.key).eq(&keys),
            "{}",
            store.url()
        );
        let all = store.list("").await.unwrap();
        assert_eq!((all.len(), all.last().unwrap().size), (count + 1, 3));
        assert_eq!(store.list("d/%2Fa/0000").await.unwrap().len(), 10);
        assert_eq!(store.list_folders("d/").await.unwrap(), ["%2Fa", "%2Fab"]);
        store.delete(&keys).await.unwrap();
        store.delete(&keys[..3]).await.unwrap();
        assert_eq!(store.list("").await.unwrap().len(), 1);
    }
}

// Broken: a name with dots in it would reach outside the archive.
#[tokio::test]
async fn keys_that_are_paths_are_refused() {
    for TestStore { store, _folder } in stores() {
        for bad in ["", "/a", "a/", "a//b", "../a", "a/../b", "a/.b", "a b", "ü"] {
            let put = store.put_if_absent(bad, Bytes::new().into()).await;
            assert!(matches!(put, Err(StoreError::Invalid(_))), "{bad}: {put:?}");
            assert!(
                matches!(store.get(bad).await, Err(StoreError::Invalid(_))),
                "{bad}"
            );
        }
    }
}

// Broken: a wrong URL would look like an empty archive, or like one that is merely slow.
#[tokio::test]
async fn stores_that_are_not_there_say_so_and_open_refuses_what_is_no_url() {
    for bad in [
        "",
        "/dir",
        "file://relative",
        "ftp://x",
        "s3://",
        "s3://b?nope=1",
    ] {
        assert!(open(bad, &S3Options::default()).is_err(), "{bad}");
    }
    let missing = open("file:///nonexistent/archive", &S3Options::default()).unwrap();
    assert!(missing.check().await.is_err());
    assert_eq!(missing.list("").await.unwrap(), []);
    let Ok(url) = std::env::var("DUROVFS_TEST_S3_URL") else {
        return;
    };
    let other = url.replacen("s3://durovfs-test/", "s3://no-such-bucket/", 1);
    let store = open(&other, &S3Options::default()).unwrap();
    let error = store.check().await.unwrap_err().to_string();
    assert!(error.contains("NoSuchBucket"), "{error}");
    let put = store
        .put_if_absent("a", Bytes::new().into())
        .await
        .unwrap_err();
    assert!(matches!(put, StoreError::Unavailable { .. }), "{put:?}");
}
