//! Whoever follows the parts that come back has the database that the log describes.

use super::*;
use crate::snapshot;
use crate::store::tests::stores;
use crate::testing::{Model, ModelImage, NAME, identity, seeded_rng};
use crate::uploader::write_chunk;
use durovfs_wire::entry::SlotIndex;
use durovfs_wire::{PageNo, PartKind};
use rand::RngExt;
use std::convert::Infallible;

/// A file that follows a log, as the extension does.
struct Follower {
    image: ModelImage,
    lsn: u64,
    images: Vec<Vec<u8>>,
    index: SlotIndex<usize>,
}

impl Follower {
    fn at(model: &Model, lsn: u64) -> Self {
        let image = match lsn {
            0 => ModelImage::default(),
            lsn => model.image(lsn).clone(),
        };
        Self {
            image,
            lsn,
            images: Vec::new(),
            index: SlotIndex::default(),
        }
    }

    fn take(&mut self, part: &EntryPart) {
        if part.header.part == 0 {
            self.images.clear();
            self.index = SlotIndex::default();
        }
        for slot in part.slots().unwrap() {
            self.index
                .insert(slot.slot, slot.page_no, self.images.len());
            self.images.push(slot.image.to_vec());
        }
        if let PartKind::Commit(commit) = part.header.kind {
            assert!(
                commit.whole_image || part.header.lsn.get() > self.lsn,
                "an entry that the file has"
            );
            if commit.whole_image {
                self.image = ModelImage::default();
            }
            self.image.page_size = commit.page_size.get();
            self.image.page_count = commit.page_count;
            let index = std::mem::take(&mut self.index);
            for (page, at) in index.finish(commit.slot_count) {
                let page: PageNo = page;
                self.image.pages.insert(page.get(), self.images[at].clone());
            }
            let count = commit.page_count;
            self.image.pages.retain(|page, _| *page <= count);
        }
        if part.header.is_last() {
            self.lsn = part.header.lsn.get();
        }
    }
}

async fn follow(
    store: &Arc<dyn Store>,
    plan: &EntryPlan,
    follower: &mut Follower,
) -> Result<LogPosition, RestoreError> {
    let scratch = tempfile::tempdir().unwrap();
    let (sender, mut parts) = mpsc::channel(2);
    let taking = async {
        while let Some(part) = parts.recv().await {
            follower.take(&part);
        }
    };
    let scratch = scratch.path();
    let reading = async move { read(store, plan, scratch, &sender).await };
    tokio::join!(reading, taking).0
}

async fn listing(store: &Arc<dyn Store>) -> Listing {
    Listing::load_log(store.as_ref(), NAME, identity().database)
        .await
        .unwrap()
}

async fn archive(store: &Arc<dyn Store>, model: &Model, first: u64, last: u64) {
    let scratch = tempfile::tempdir().unwrap();
    let parts = model.parts(first, last);
    let parts = move || parts.into_iter().map(Ok::<_, Infallible>);
    let uploaded = write_chunk(store, &identity(), scratch.path(), parts).await;
    uploaded.unwrap();
}

// Broken: a new machine, or one that was away for long, would get a file that no transaction left.
#[tokio::test]
async fn whoever_follows_from_anywhere_gets_the_database() {
    let mut rng = seeded_rng();
    for test in stores() {
        let store = &test.store;
        let model = Model::random(&mut rng, 60);
        let mut next = 1;
        while next <= model.last_lsn() {
            let last = (next + rng.random_range(0..12)).min(model.last_lsn());
            // Two writers of the same range leave chunks that overlap.
            let first = next.saturating_sub(rng.random_range(0..3)).max(1);
            archive(store, &model, first, last).await;
            next = last + 1;
            if rng.random_bool(0.2) && model.transaction_at(last).is_some() {
                let scratch = tempfile::tempdir().unwrap();
                let known = listing(store).await;
                let at = Lsn::new(last);
                snapshot::make(store, &known, at, scratch.path())
                    .await
                    .unwrap();
            }
        }
        let known = listing(store).await;
        for first in 1..=model.last_lsn() {
            let through = rng.random_range(first..=model.last_lsn());
            let plan = plan(&known, Lsn::new(first), Lsn::new(through)).unwrap();
            let mut follower = Follower::at(&model, first - 1);
            let reached = follow(store, &plan, &mut follower).await.unwrap();
            assert!(reached.lsn.get() >= through);
            assert_eq!(reached, model.position(follower.lsn));
            let expected = model.image(follower.lsn);
            assert!(
                follower.image == *expected,
                "from {first} to {}: another database",
                follower.lsn
            );
        }
        let beyond = Lsn::new(model.last_lsn() + 1);
        assert_eq!(plan(&known, Lsn::new(1), beyond), None);
    }
}

// Broken: a gap would be jumped over, and the file would lack commits in its middle.
#[tokio::test]
async fn a_gap_is_never_jumped_over() {
    let mut rng = seeded_rng();
    for test in stores() {
        let store = &test.store;
        let model = Model::random(&mut rng, 30);
        archive(store, &model, 1, 10).await;
        archive(store, &model, 12, 30).await;
        let known = listing(store).await;
        assert_eq!(plan(&known, Lsn::new(5), Lsn::new(30)), None);
        assert!(plan(&known, Lsn::new(5), Lsn::new(10)).is_some());
        assert!(plan(&known, Lsn::new(12), Lsn::new(30)).is_some());
        // A listing that tells of more than the object holds.
        let mut plan = plan(&known, Lsn::new(5), Lsn::new(10)).unwrap();
        plan.chunks.push(known.chunks[1].clone());
        let mut follower = Follower::at(&model, 4);
        let error = follow(store, &plan, &mut follower).await.unwrap_err();
        assert!(matches!(error, RestoreError::Damaged { .. }), "{error}");
    }
}

// Broken: a search for the local file's transaction would miss it, or download the whole history.
#[tokio::test]
async fn summaries_tell_every_transaction_that_is_kept() {
    let mut rng = seeded_rng();
    for test in stores() {
        let store = &test.store;
        let model = Model::random(&mut rng, 30);
        archive(store, &model, 6, 14).await;
        archive(store, &model, 12, 30).await;
        let (sender, mut found) = mpsc::channel(64);
        let known = listing(store).await;
        let next = summaries(store, known, Lsn::new(1), Lsn::new(20), &sender).await;
        assert!(next.unwrap() > Lsn::new(20));
        drop(sender);
        let mut lsns = Vec::new();
        while let Some(summary) = found.recv().await {
            assert_eq!(summary.position, model.position(summary.position.lsn.get()));
            lsns.push(summary.position.lsn.get());
        }
        let expected: Vec<u64> = (6..=30).filter(|lsn| model.is_transaction(*lsn)).collect();
        assert_eq!(lsns, expected);
    }
}

// Broken: a host whose log begins behind the archive would open another state than the last one, or
// an empty database when the archive's beginning is gone.
#[tokio::test]
async fn the_last_transaction_through_an_entry_is_told_or_nothing() {
    let mut rng = seeded_rng();
    for test in stores() {
        let store = &test.store;
        let model = Model::random(&mut rng, 40);
        let end = model.last_lsn();
        let half = model.transaction_at(end / 2).unwrap();
        archive(store, &model, 1, half).await;
        archive(store, &model, half + 1, end).await;
        let last_through = async |lsn: u64| {
            let index = ArchiveIndex::of(store, listing(store).await);
            let found = index.last_through(Lsn::new(lsn)).await;
            found.map(|last| last.map(|last| last.position))
        };
        let expected = |lsn: u64| model.transaction_at(lsn).map(|lsn| model.position(lsn));
        for lsn in 1..=end {
            assert_eq!(last_through(lsn).await.unwrap(), expected(lsn));
        }
        assert!(last_through(end + 1).await.is_err(), "beyond the end");

        // What is before a snapshot may go.
        let scratch = tempfile::tempdir().unwrap();
        let known = listing(store).await;
        let made = snapshot::make(store, &known, Lsn::new(half), scratch.path());
        made.await.unwrap();
        let oldest = known.chunks[0].key.clone();
        store.delete(&[oldest]).await.unwrap();
        assert!(last_through(half - 1).await.is_err(), "before it begins");
        for lsn in half..=end {
            assert_eq!(last_through(lsn).await.unwrap(), expected(lsn));
        }
    }
}
