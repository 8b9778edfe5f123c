//! The whole way: parts of a log into chunks, over every store, and back as a file at each entry.

use super::*;
use crate::PutOutcome;
use crate::store::tests::stores;
use crate::store::{Body, S3Options, open};
use crate::testing::{Model, NAME, START_TIME, identity, seeded_rng};
use crate::uploader::{UploadError, Uploaded, write_chunk};
use crate::{snapshot, upkeep};
use durovfs_wire::{Bookmark, Epoch, Lsn, Timestamp};
use rand::RngExt;
use std::convert::Infallible;
use std::fs;
use tempfile::TempDir;

async fn archive(
    store: &Arc<dyn Store>,
    model: &Model,
    first: u64,
    last: u64,
) -> Result<Uploaded, UploadError> {
    let scratch = tempfile::tempdir().unwrap();
    let parts = model.parts(first, last);
    let parts = move || parts.into_iter().map(Ok::<_, Infallible>);
    let uploaded = write_chunk(store, &identity(), scratch.path(), parts).await;
    assert_eq!(
        fs::read_dir(scratch.path()).unwrap().count(),
        0,
        "left in the scratch folder"
    );
    uploaded
}

async fn restore_to(
    store: &Arc<dyn Store>,
    when: When,
    output: &Path,
) -> Result<Restored, RestoreError> {
    restore(
        store,
        NAME,
        None,
        when,
        output,
        &RestoreOptions::default(),
        &|_| (),
    )
    .await
}

/// Restores and compares with the model; nothing but the file must be in its folder.
async fn check_restore(store: &Arc<dyn Store>, model: &Model, when: When, lsn: u64) {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out.db");
    let expected = model.transaction_at(lsn);
    let restored = restore_to(store, when, &output).await;
    match (expected, restored) {
        (Some(expected), Ok(restored)) => {
            assert_eq!(
                restored.transaction.position,
                model.position(expected),
                "{when:?}"
            );
            let same = fs::read(&output).unwrap() == model.image(expected).bytes();
            assert!(same, "{when:?} is not the image after lsn {expected}");
            assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        }
        (None, Err(RestoreError::NotCovered { .. })) => {
            assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        }
        (expected, got) => panic!("{when:?}: expected lsn {expected:?}, got {got:?}"),
    }
}

/// The folder of a directory store whose URL this is.
fn root_of(store: &Arc<dyn Store>) -> Option<PathBuf> {
    Some(PathBuf::from(
        store.url().strip_prefix("file://")?.replace("%20", " "),
    ))
}

// Broken: the product's promise: the database as it was after any commit.
#[tokio::test]
async fn every_entry_of_a_log_can_be_restored() {
    let mut rng = seeded_rng();
    for test in stores() {
        let store = &test.store;
        let model = Model::random(&mut rng, if root_of(store).is_some() { 120 } else { 30 });
        let mut next = 1;
        while next <= model.last_lsn() {
            let last = (next + rng.random_range(0..15)).min(model.last_lsn());
            let uploaded = archive(store, &model, next, last).await.unwrap();
            assert_eq!(uploaded.outcome, PutOutcome::Created);
            next = last + 1;
            if rng.random_bool(0.2) {
                let scratch = tempfile::tempdir().unwrap();
                let listing = &Listing::load(store.as_ref(), NAME).await.unwrap()[0];
                let at = listing.archived_lsn();
                assert_eq!(at.get(), last);
                let made = snapshot::make(store, listing, at, scratch.path()).await;
                match model.transaction_at(last) {
                    Some(expected) => assert_eq!(made.unwrap().range.last_lsn.get(), expected),
                    None => assert!(made.is_err()),
                }
            }
        }
        for lsn in 1..=model.last_lsn() {
            check_restore(store, &model, When::Lsn(Lsn::new(lsn)), lsn).await;
            if rng.random_bool(0.2) {
                let bookmark = Bookmark::from(model.position(lsn));
                check_restore(store, &model, When::Bookmark(bookmark), lsn).await;
                let time = model.times[lsn as usize - 1];
                check_restore(store, &model, When::Time(time), lsn).await;
                let before = Timestamp::from_micros(time.as_micros() - 1);
                check_restore(store, &model, When::Time(before), lsn - 1).await;
            }
        }
        let future = Timestamp::from_micros(i64::MAX / 2);
        check_restore(store, &model, When::Time(future), model.last_lsn()).await;
        check_restore(store, &model, When::Latest, model.last_lsn()).await;
        let index = ArchiveIndex::of(
            store,
            Listing::load(store.as_ref(), NAME).await.unwrap().remove(0),
        );
        let found = index.transactions(None, None).await.unwrap();
        let found: Vec<_> = found.iter().map(|facts| facts.position.lsn.get()).collect();
        let expected: Vec<_> = (1..=model.last_lsn())
            .filter(|lsn| model.is_transaction(*lsn))
            .collect();
        assert_eq!(found, expected);
    }
}

async fn small_archive() -> (TempDir, Arc<dyn Store>, Model) {
    let folder = tempfile::tempdir().unwrap();
    let url = format!("file://{}", folder.path().display());
    let store = open(&url, &S3Options::default()).unwrap();
    let mut model = Model::new();
    model.begin_epoch();
    for i in 0..8u8 {
        let writes = [
            (0, 1, vec![i; 512]),
            (1, 2 + u32::from(i % 3), vec![i ^ 0x55; 512]),
        ];
        model.commit(512, 4, false, &writes, 2, 1);
    }
    for (first, last) in [(1, 3), (4, 6), (7, 9)] {
        archive(&store, &model, first, last).await.unwrap();
    }
    (folder, store, model)
}

// Broken: the wrong exit status, or a guess at what was not there.
#[tokio::test]
async fn moments_outside_the_archive_are_refused_with_what_it_covers() {
    let (_folder, store, model) = small_archive().await;
    let out = tempfile::tempdir().unwrap();
    let output = out.path().join("x.db");
    let other_epoch = Bookmark {
        lsn: Lsn::new(5),
        epoch: Epoch::new(9),
    };
    for when in [
        When::Lsn(Lsn::ZERO),
        When::Lsn(Lsn::new(1)),
        When::Lsn(Lsn::new(10)),
        When::Time(Timestamp::from_micros(START_TIME)),
        When::Time(Timestamp::from_micros(START_TIME + 500)),
        When::Bookmark(other_epoch),
    ] {
        let error = restore_to(&store, when, &output).await.unwrap_err();
        let RestoreError::NotCovered { covered, .. } = &error else {
            panic!("{when:?}: {error}")
        };
        let (first, last) = *covered.commits.clone().unwrap();
        assert_eq!(
            (first.position, last.position),
            (model.position(2), model.position(9))
        );
        assert!(
            error
                .to_string()
                .contains(&Bookmark::from(model.position(9)).to_string())
        );
    }
    let missing = restore(
        &store,
        "/srv/app data/uber.db",
        None,
        When::Latest,
        &output,
        &RestoreOptions::default(),
        &|_| (),
    )
    .await;
    let Err(RestoreError::NoSuchDatabase { near, .. }) = missing else {
        panic!("{missing:?}")
    };
    assert_eq!(near, [NAME]);
    assert_eq!(fs::read_dir(out.path()).unwrap().count(), 0);
}

// Broken: a restore would destroy a database, or SQLite would replay an old log into the new one.
#[tokio::test]
async fn existing_files_are_replaced_only_by_force_and_with_their_logs() {
    let (_folder, store, model) = small_archive().await;
    for taken in ["x.db", "x.db-wal", "x.db-journal"] {
        let out = tempfile::tempdir().unwrap();
        let output = out.path().join("x.db");
        fs::write(out.path().join(taken), "old").unwrap();
        let error = restore_to(&store, When::Latest, &output).await.unwrap_err();
        assert!(
            matches!(&error, RestoreError::Exists(path) if path.ends_with(taken)),
            "{error}"
        );
        assert_eq!(fs::read_to_string(out.path().join(taken)).unwrap(), "old");
        assert_eq!(fs::read_dir(out.path()).unwrap().count(), 1);
        fs::write(out.path().join("x.db-shm"), "old").unwrap();
        let options = RestoreOptions { force: true };
        let forced = restore(&store, NAME, None, When::Latest, &output, &options, &|_| ())
            .await
            .unwrap();
        assert_eq!(forced.file_bytes, 4 * 512);
        assert_eq!(fs::read(&output).unwrap(), model.image(9).bytes());
        assert_eq!(
            fs::read_dir(out.path()).unwrap().count(),
            1,
            "a log was left beside"
        );
    }
}

fn objects(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => found.extend(objects(&path)),
            false => found.push(path),
        }
    }
    found.sort();
    found
}

// Broken: a damaged object would give a database that looks whole, or a half-written file.
#[tokio::test]
async fn damage_is_named_and_leaves_nothing_behind() {
    let (folder, store, _model) = small_archive().await;
    let chunk = objects(folder.path())[1].clone();
    let good = fs::read(&chunk).unwrap();
    let out = tempfile::tempdir().unwrap();
    let output = out.path().join("x.db");
    for at in (0..good.len()).step_by(7) {
        let mut bad = good.clone();
        bad[at] ^= 0x10;
        fs::write(&chunk, bad).unwrap();
        let error = restore_to(&store, When::Latest, &output).await.unwrap_err();
        let RestoreError::Damaged { object, .. } = &error else {
            panic!("byte {at}: {error}")
        };
        let named = format!("{}/{object}", folder.path().display());
        assert_eq!(named, chunk.display().to_string());
        assert_eq!(fs::read_dir(out.path()).unwrap().count(), 0, "byte {at}");
    }
    fs::remove_file(&chunk).unwrap();
    let error = restore_to(&store, When::Latest, &output).await.unwrap_err();
    assert!(
        error.to_string().contains("lsn 4 to 6 are missing"),
        "{error}"
    );
}

// Broken: a database that is not what its checksum says would be given out as restored. The chunks
// here are intact, and hold a page that the checksum does not know of.
#[tokio::test]
async fn a_file_without_the_commits_checksum_gets_no_name() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(
        &format!("file://{}", folder.path().display()),
        &S3Options::default(),
    )
    .unwrap();
    let mut model = Model::new();
    model.begin_epoch();
    model.commit(
        512,
        2,
        false,
        &[(0, 1, vec![1; 512]), (1, 2, vec![2; 512])],
        2,
        9,
    );
    let part = &mut model.entries[1][0];
    let mut payload = part.payload.to_vec();
    payload[600] ^= 1;
    part.payload = payload.into();
    archive(&store, &model, 1, 2).await.unwrap();
    let out = tempfile::tempdir().unwrap();
    let error = restore_to(&store, When::Latest, &out.path().join("x.db"))
        .await
        .unwrap_err();
    assert!(error.to_string().contains("checksum"), "{error}");
    assert_eq!(fs::read_dir(out.path()).unwrap().count(), 0);
}

// Broken: two primaries that archive the same entries would stop, or hide each other's history.
#[tokio::test]
async fn chunks_written_twice_and_overlapping_are_harmless() {
    for test in stores() {
        let store = &test.store;
        let mut model = Model::new();
        model.begin_epoch();
        for i in 0..11u8 {
            model.commit(
                512,
                3,
                false,
                &[(0, 1 + u32::from(i % 3), vec![i; 512])],
                1,
                1,
            );
        }
        for (first, last) in [(1, 4), (3, 8), (5, 6), (5, 12), (1, 4)] {
            let outcome = archive(store, &model, first, last).await.unwrap().outcome;
            assert_eq!(
                outcome == PutOutcome::AlreadyThere,
                (first, last) == (1, 4) && {
                    Listing::load(store.as_ref(), NAME).await.unwrap()[0]
                        .chunks
                        .len()
                        == 4
                }
            );
        }
        for lsn in 1..=12 {
            check_restore(store, &model, When::Lsn(Lsn::new(lsn)), lsn).await;
        }
    }
}

// Broken: what a fenced primary archived of an entry that was never committed would be restored.
#[tokio::test]
async fn chunks_that_disagree_about_an_epoch_are_refused() {
    let (_folder, store, model) = small_archive().await;
    let mut fork = Model::new();
    (0..3).for_each(|_| fork.begin_epoch());
    (0..5).for_each(|_| fork.commit(512, 1, false, &[(0, 1, vec![9; 512])], 1, 1));
    assert_ne!(fork.position(5).epoch, model.position(5).epoch);
    // Shorter than the chunks that are chosen, so only its key is seen.
    archive(&store, &fork, 5, 5).await.unwrap();
    let out = tempfile::tempdir().unwrap();
    let output = out.path().join("x.db");
    let error = restore_to(&store, When::Latest, &output).await.unwrap_err();
    assert!(error.to_string().contains("two histories"), "{error}");
    restore_to(&store, When::Lsn(Lsn::new(4)), &output)
        .await
        .unwrap();
}

// Broken: an uploader would take a damaged or foreign object for its own confirmed chunk, and
// replicas would drop the only good copy.
#[tokio::test]
async fn an_object_in_the_way_is_confirmed_only_if_it_is_the_same() {
    let (folder, store, model) = small_archive().await;
    let chunk = objects(folder.path())[0].clone();
    let key = chunk
        .strip_prefix(folder.path())
        .unwrap()
        .to_str()
        .unwrap()
        .to_owned();
    let good = fs::read(&chunk).unwrap();
    // Header, images (which the index does not see), index, footer.
    let first_block = 40 + NAME.len() + 4;
    for at in [3, first_block + 14, good.len() / 2, good.len() - 20] {
        let mut bad = good.clone();
        bad[at] ^= 4;
        fs::write(&chunk, bad).unwrap();
        let error = archive(&store, &model, 1, 3).await.unwrap_err();
        assert!(
            matches!(&error, UploadError::Conflict { object, .. } if *object == key),
            "{error}"
        );
    }
    fs::remove_file(&chunk).unwrap();
    let mut other = Model::new();
    other.begin_epoch();
    (0..2).for_each(|_| other.commit(512, 1, false, &[(0, 1, vec![7; 512])], 1, 1));
    let theirs = archive(&store, &other, 1, 3).await.unwrap();
    assert_eq!(theirs.key, key, "the test needs the same key");
    let error = archive(&store, &model, 1, 3).await.unwrap_err();
    assert!(matches!(error, UploadError::Conflict { .. }), "{error}");
}

// Broken: after a database was deleted and made again under its name, its past would be lost.
#[tokio::test]
async fn a_time_before_the_newest_log_of_a_name_means_the_older_one() {
    let (folder, store, model) = small_archive().await;
    let database = durovfs_wire::DatabaseId::from_bytes([8; 16]);
    let newer = crate::LogIdentity {
        database,
        name: NAME.into(),
    };
    let mut second = Model::new();
    (0..40).for_each(|_| second.begin_epoch());
    (0..40).for_each(|_| second.commit(1024, 1, false, &[(0, 1, vec![3; 1024])], 1, 1));
    let all = second.parts(1, 80);
    let parts = move || all.into_iter().map(Ok::<_, Infallible>);
    write_chunk(&store, &newer, folder.path(), parts)
        .await
        .unwrap();
    let out = tempfile::tempdir().unwrap();
    let path = |name: &str| out.path().join(name);
    let newest = restore_to(&store, When::Latest, &path("a")).await.unwrap();
    assert_eq!(newest.transaction.commit.page_size.get(), 1024);
    // Before the newer log's first commit: the older one had some by then.
    let first_of_newer = second.times[40].as_micros();
    let between = When::Time(Timestamp::from_micros(model.times[1].as_micros()));
    assert!(model.times[1].as_micros() < first_of_newer);
    let older = restore_to(&store, between, &path("b")).await.unwrap();
    assert_eq!(older.transaction.position, model.position(2));
    let chosen = restore(
        &store,
        NAME,
        Some(identity().database),
        When::Latest,
        &path("c"),
        &RestoreOptions::default(),
        &|_| (),
    )
    .await
    .unwrap();
    assert_eq!(chosen.transaction.position, model.position(9));
}

// Broken: a snapshot would be made with every chunk, or never.
#[tokio::test]
async fn a_snapshot_is_due_when_chunks_outgrow_the_database() {
    let (_folder, store, _model) = small_archive().await;
    let mut listing = Listing::load(store.as_ref(), NAME).await.unwrap().remove(0);
    assert_eq!(
        snapshot::due(&listing, 100),
        None,
        "tiny chunks are not worth one"
    );
    listing.chunks[1].size = 10 << 20;
    assert_eq!(snapshot::due(&listing, 100), Some(Lsn::new(9)));
    assert_eq!(snapshot::due(&listing, 11 << 20), None);
    let many = crate::listing::ChunkObject {
        size: 1,
        ..listing.chunks[2].clone()
    };
    listing.chunks[1].size = 1;
    listing.chunks.extend(std::iter::repeat_n(many, 600));
    assert_eq!(snapshot::due(&listing, 100), Some(Lsn::new(9)));
}

// Broken: after retention took the beginning of a log, its rest could not be restored.
#[tokio::test]
async fn a_log_without_its_beginning_starts_at_its_first_snapshot() {
    let (folder, store, model) = small_archive().await;
    let scratch = tempfile::tempdir().unwrap();
    let listing = Listing::load(store.as_ref(), NAME).await.unwrap().remove(0);
    snapshot::make(&store, &listing, Lsn::new(5), scratch.path())
        .await
        .unwrap();
    let gone = listing.chunks[0].key.clone();
    store.delete(&[gone]).await.unwrap();
    for lsn in 5..=9 {
        check_restore(&store, &model, When::Lsn(Lsn::new(lsn)), lsn).await;
    }
    let out = tempfile::tempdir().unwrap();
    let error = restore_to(&store, When::Lsn(Lsn::new(4)), &out.path().join("x")).await;
    let Err(RestoreError::NotCovered { covered, .. }) = error else {
        panic!("{error:?}")
    };
    assert_eq!(covered.commits.unwrap().0.position, model.position(5));
    drop(folder);
}

// Broken: an object whose key was changed by hand would be applied as another database's.
#[tokio::test]
async fn an_object_of_another_log_is_refused() {
    let (folder, store, model) = small_archive().await;
    let other = crate::LogIdentity {
        name: "/srv/other.db".into(),
        ..identity()
    };
    let scratch = tempfile::tempdir().unwrap();
    let parts = model.parts(1, 3);
    let parts = move || parts.into_iter().map(Ok::<_, Infallible>);
    let theirs = write_chunk(&store, &other, scratch.path(), parts)
        .await
        .unwrap();
    let bytes = fs::read(folder.path().join(&theirs.key)).unwrap();
    let ours = &objects(folder.path())
        .into_iter()
        .find(|path| {
            path.display().to_string().contains("%C3%BC")
                && path.display().to_string().contains("0000000000000001-")
        })
        .unwrap();
    fs::write(ours, bytes).unwrap();
    let out = tempfile::tempdir().unwrap();
    let error = restore_to(&store, When::Latest, &out.path().join("x"))
        .await
        .unwrap_err();
    assert!(error.to_string().contains("/srv/other.db"), "{error}");
}

// Broken: a put would be believed that never reached the store.
#[tokio::test]
async fn a_store_that_fails_is_an_error_that_can_be_tried_again() {
    let folder = tempfile::tempdir().unwrap();
    let blocked = folder.path().join("blocked");
    fs::write(&blocked, "a file where a folder belongs").unwrap();
    let url = format!("file://{}", blocked.display());
    let store = open(&url, &S3Options::default()).unwrap();
    let put = store
        .put_if_absent("a", Body::Bytes(bytes::Bytes::new()))
        .await;
    assert!(put.is_err(), "{put:?}");
    let mut model = Model::new();
    model.begin_epoch();
    assert!(matches!(
        archive(&store, &model, 1, 1).await,
        Err(UploadError::Store(_))
    ));
    fs::remove_file(&blocked).unwrap();
    archive(&store, &model, 1, 1).await.unwrap();
}

async fn archive_each(store: &Arc<dyn Store>, model: &Model) {
    for lsn in 1..=model.last_lsn() {
        archive(store, model, lsn, lsn).await.unwrap();
    }
}

// Broken: merging small chunks would lose commits, or make those between unreachable.
#[tokio::test]
async fn merged_chunks_restore_the_same_and_replace_the_small_ones() {
    let mut rng = seeded_rng();
    for test in stores() {
        let store = &test.store;
        let model = Model::random(&mut rng, 40);
        archive_each(store, &model).await;
        // Overlapping chunks, of which each of the run holds some entries that others have.
        archive(store, &model, 2, 4).await.unwrap();
        archive(store, &model, 3, 5).await.unwrap();
        let listing = Listing::load(store.as_ref(), NAME).await.unwrap().remove(0);
        assert_eq!(
            upkeep::mergeable(&listing, model.times[10]),
            None,
            "too few to merge"
        );
        let found = ArchiveIndex::of(store, listing.clone())
            .transactions(None, None)
            .await;
        let expected = (1..=model.last_lsn())
            .filter(|lsn| model.is_transaction(*lsn))
            .count();
        assert_eq!(
            found.unwrap().len(),
            expected,
            "an entry is listed twice, or not"
        );
        let mut large = listing.clone();
        large.chunks[7].size = 5 << 20;
        let run = upkeep::mergeable(&large, model.times[39]).unwrap();
        let after = large.chunks[7].range.last_lsn.next();
        assert_eq!(run[0].range.first_lsn, after, "a large chunk is left alone");
        let run = upkeep::mergeable(&listing, model.times[30]).unwrap();
        assert_eq!(run.last().unwrap().range.last_lsn.get(), 30);
        let scratch = tempfile::tempdir().unwrap();
        let merged = upkeep::merge(store, &listing, &run, scratch.path())
            .await
            .unwrap();
        assert_eq!(
            (merged.range.first_lsn.get(), merged.range.last_lsn.get()),
            (1, 30)
        );
        let listing = Listing::load(store.as_ref(), NAME).await.unwrap().remove(0);
        assert_eq!(listing.chunks.len(), 1 + 10);
        assert_eq!(listing.archived_lsn().get(), model.last_lsn());
        for lsn in 1..=model.last_lsn() {
            check_restore(store, &model, When::Lsn(Lsn::new(lsn)), lsn).await;
        }
    }
}

// Broken: a damaged chunk would be merged, and the evidence deleted with it.
#[tokio::test]
async fn nothing_is_deleted_when_a_chunk_to_merge_is_damaged() {
    let (folder, store, model) = small_archive().await;
    let listing = Listing::load(store.as_ref(), NAME).await.unwrap().remove(0);
    let chunk = &objects(folder.path())[2];
    let good = fs::read(chunk).unwrap();
    let mut bad = good.clone();
    bad[good.len() / 3] ^= 1;
    fs::write(chunk, bad).unwrap();
    let scratch = tempfile::tempdir().unwrap();
    assert!(
        upkeep::merge(&store, &listing, &listing.chunks, scratch.path())
            .await
            .is_err()
    );
    fs::write(chunk, good).unwrap();
    assert_eq!(
        Listing::load(store.as_ref(), NAME).await.unwrap(),
        [listing]
    );
    check_restore(&store, &model, When::Latest, 9).await;
}

// Broken: retention would take something that a moment within it needs.
#[tokio::test]
async fn what_expires_is_what_no_kept_moment_needs() {
    let (_folder, store, model) = small_archive().await;
    let scratch = tempfile::tempdir().unwrap();
    let listing = Listing::load(store.as_ref(), NAME).await.unwrap().remove(0);
    let last = model.times[8];
    assert_eq!(
        upkeep::expired(&listing, last),
        Vec::<String>::new(),
        "no snapshot to begin at"
    );
    for lsn in [2, 5, 8] {
        snapshot::make(&store, &listing, Lsn::new(lsn), scratch.path())
            .await
            .unwrap();
    }
    let listing = Listing::load(store.as_ref(), NAME).await.unwrap().remove(0);
    let keys = upkeep::expired(&listing, model.times[6]);
    assert_eq!(
        keys,
        [
            listing.snapshots[0].key.clone(),
            listing.chunks[0].key.clone()
        ]
    );
    // One by one, as if the process died after any of them.
    for key in keys {
        store.delete(&[key]).await.unwrap();
        for lsn in 5..=9 {
            check_restore(&store, &model, When::Lsn(Lsn::new(lsn)), lsn).await;
        }
        check_restore(&store, &model, When::Time(model.times[6]), 7).await;
    }
}
