//! Chunks written and read back, damaged, and read from the middle.

use super::*;
use crate::normalize::{NormalizedEntry, Normalizer};
use crate::testing::{Model, identity, seeded_rng};
use crate::uploader::build_chunk;
use durovfs_wire::EntryPart;
use proptest::prelude::*;
use rand::RngExt;
use rand_chacha::rand_core::SeedableRng;
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fs::File;
use std::io::Write;

fn build(model: &Model, first: u64, last: u64) -> (tempfile::TempDir, SealedChunk) {
    let scratch = tempfile::tempdir().unwrap();
    let parts = model
        .parts(first, last)
        .into_iter()
        .map(Ok::<_, Infallible>);
    let sealed = build_chunk(&identity(), scratch.path(), parts).unwrap();
    (scratch, sealed)
}

fn reader_of(bytes: &[u8]) -> Result<ChunkReader, ChunkError> {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    ChunkReader::open(file)
}

fn images(chunk: &mut ChunkReader, facts: &EntryFacts) -> BTreeMap<u32, Vec<u8>> {
    let mut images = BTreeMap::new();
    chunk
        .read_images(facts, |page, image| {
            images.insert(page.get(), image.to_vec());
            Ok(())
        })
        .unwrap();
    images
}

fn normalized(parts: &[EntryPart]) -> Vec<NormalizedEntry> {
    let mut normalizer = Normalizer::new(std::env::temp_dir());
    parts
        .iter()
        .filter_map(|part| normalizer.push(part).unwrap())
        .collect()
}

fn pages_of(entry: &NormalizedEntry) -> BTreeMap<u32, Vec<u8>> {
    let mut pages = BTreeMap::new();
    if let NormalizedEntry::Transaction(transaction) = entry {
        transaction
            .for_each(|page, image| {
                pages.insert(page.get(), image.to_vec());
                Ok::<_, std::io::Error>(())
            })
            .unwrap();
    }
    pages
}

/// What a chunk must give back is what went in, entry by entry, also through the log's parts.
fn check_round_trip(model: &Model, first: u64, last: u64) {
    let (_scratch, sealed) = build(model, first, last);
    let mut chunk = ChunkReader::open(File::open(sealed.path()).unwrap()).unwrap();
    chunk.verify().unwrap();
    assert_eq!(chunk.identity(), &identity());
    let expected = normalized(&model.parts(first, last));
    let facts = chunk.index().entries.clone();
    assert_eq!(facts.len(), expected.len());
    // Backwards, so that nothing depends on the block that was read before.
    for (facts, expected) in facts.iter().zip(&expected).rev() {
        let lsn = facts.position.lsn.get();
        assert_eq!(facts.position, expected.position());
        assert_eq!(facts.time, model.times[lsn as usize - 1]);
        assert_eq!(images(&mut chunk, facts), pages_of(expected), "lsn {lsn}");
        let mut parts = Vec::new();
        chunk
            .read_parts(facts, |part| {
                parts.push(part);
                Ok(())
            })
            .unwrap();
        let again = normalized(&parts);
        assert_eq!(again.len(), 1);
        assert_eq!(pages_of(&again[0]), pages_of(expected));
        let original = model.entries[lsn as usize - 1].last().unwrap().header;
        let last = parts.last().unwrap().header;
        match (original.transaction(), last.transaction()) {
            (Some(mut original), Some(last)) => {
                original.commit.slot_count = last.commit.slot_count;
                assert_eq!(original, last);
            }
            _ => assert_eq!(original.kind, last.kind),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    // Broken: history would come back from the archive as something else than it was.
    #[test]
    fn a_chunk_gives_back_the_entries_that_went_in(seed in any::<u64>(), count in 2u64..40) {
        let model = Model::random(&mut rand_chacha::ChaCha8Rng::seed_from_u64(seed), count);
        check_round_trip(&model, 1, model.last_lsn());
        check_round_trip(&model, model.last_lsn() / 2 + 1, model.last_lsn());
    }

    // Broken: an object of somebody else, or half an upload, would take the program down.
    #[test]
    fn any_bytes_are_refused_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        prop_assert!(reader_of(&bytes).is_err());
    }
}

/// All of a chunk that a reader can get, or the first error.
fn read_everything(bytes: &[u8]) -> Result<Vec<EntryFacts>, ChunkError> {
    let mut chunk = reader_of(bytes)?;
    chunk.verify()?;
    Ok(chunk.index().entries.clone())
}

fn small_chunk() -> Vec<u8> {
    let mut model = Model::new();
    model.begin_epoch();
    model.commit(
        512,
        3,
        false,
        &[(0, 1, vec![1; 512]), (1, 3, vec![2; 512])],
        2,
        1,
    );
    model.commit(
        512,
        3,
        false,
        &[(0, 2, (0..=255).cycle().take(512).collect())],
        1,
        1,
    );
    model.begin_epoch();
    std::fs::read(build(&model, 1, 4).1.path()).unwrap()
}

// Broken: a bit that rotted in the store would be restored as if it were data.
#[test]
fn damage_at_every_byte_is_an_error() {
    let good = small_chunk();
    assert_eq!(read_everything(&good).unwrap().len(), 4);
    for at in 0..good.len() {
        for bit in [0x01, 0x80, 0xff] {
            let mut bad = good.clone();
            bad[at] ^= bit;
            assert!(
                read_everything(&bad).is_err(),
                "byte {at} of {} ^ {bit:#x}",
                good.len()
            );
        }
    }
}

// Broken: a download that broke off, or an object with bytes behind it, would be taken as whole.
#[test]
fn a_chunk_of_another_length_is_an_error() {
    let good = small_chunk();
    for length in 0..good.len() {
        assert!(read_everything(&good[..length]).is_err(), "cut at {length}");
        assert!(
            read_everything(&good[length + 1..]).is_err(),
            "begun after {length}"
        );
    }
    let longer = [good.as_slice(), &[0; 7]].concat();
    assert!(read_everything(&longer).is_err());
    let twice = [good.as_slice(), &good].concat();
    assert!(read_everything(&twice).is_err());
}

// Broken: an archive written by a newer program would be misread instead of refused by name.
#[test]
fn another_version_is_refused_by_number() {
    let good = small_chunk();
    for at in [8, good.len() - 10] {
        let mut newer = good.clone();
        newer[at] = 9;
        let error = read_everything(&newer).unwrap_err();
        assert!(
            matches!(error, ChunkError::UnsupportedVersion { got: 9, .. }),
            "{error}"
        );
    }
}

// Broken: two primaries that archive the same range would see each other's chunk as a conflict.
#[test]
fn the_same_entries_give_the_same_bytes_however_they_were_cut() {
    let writes = [
        (0, 2, vec![5; 1024]),
        (1, 1, vec![6; 1024]),
        (1, 4, vec![7; 1024]),
    ];
    let chunks: Vec<_> = [1, 2, 10]
        .map(|part_slots| {
            let mut model = Model::new();
            model.begin_epoch();
            model.commit(1024, 4, false, &writes, 2, part_slots);
            std::fs::read(build(&model, 1, 2).1.path()).unwrap()
        })
        .into();
    assert!(chunks.windows(2).all(|pair| pair[0] == pair[1]));
}

// Broken: a chunk with a hole, or one that goes back, would be accepted as history.
#[test]
fn entries_that_do_not_follow_are_refused() {
    let mut rng = seeded_rng();
    let model = Model::random(&mut rng, 12);
    let scratch = tempfile::tempdir().unwrap();
    let skipped = rng.random_range(2..11);
    let mut parts = model.parts(1, skipped - 1);
    parts.extend(model.parts(skipped + 1, 12));
    let built = build_chunk(
        &identity(),
        scratch.path(),
        parts.into_iter().map(Ok::<_, Infallible>),
    );
    let error = built.unwrap_err();
    let hole = matches!(
        error,
        crate::uploader::UploadError::Chunk(ChunkError::OutOfOrder { .. })
    );
    assert!(hole, "{error}");
    assert_eq!(
        std::fs::read_dir(scratch.path()).unwrap().count(),
        0,
        "left behind"
    );
}

// Broken: a record with a right checksum would stop whoever reads the index, or a restore to a time
// and the listing of commits would each go by another time of the same commit.
#[test]
fn a_record_that_no_writer_makes_is_refused() {
    let entries = read_everything(&small_chunk()).unwrap();
    for facts in [entries[0], entries[1]] {
        let mut record = Vec::new();
        format::encode_record(&facts, &mut record);
        assert_eq!(format::decode_record(&record).unwrap(), facts);
        let mut last = record.clone();
        last[8..16].fill(0xff);
        last[96..104].fill(0xff);
        assert!(format::decode_record(&last).is_err());
        record[16] ^= 1;
        let has_two_times = facts.transaction().is_some();
        assert_eq!(format::decode_record(&record).is_err(), has_two_times);
    }
}
