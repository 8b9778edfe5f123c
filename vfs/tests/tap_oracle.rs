//! The WAL tap against an oracle: SQLite's recovery, written a second time from the file format,
//! over writes as SQLite's WAL writer makes them, cut into odd pieces.

#![allow(clippy::unwrap_used, reason = "what fails in a test fails the test")]

use bytes::Bytes;
use durovfs_vfs::error::Refusal;
use durovfs_vfs::file::BaseFile;
use durovfs_vfs::wal_tap::{Step, TapError, WalTap};
use durovfs_wire::{PageSize, SlotPages};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::cell::RefCell;
use std::collections::BTreeMap;

const PAGE: usize = 512;
const FRAME: usize = PAGE + 24;

#[derive(Default, Clone)]
struct MemoryFile(RefCell<Vec<u8>>);

impl BaseFile for MemoryFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<usize, Refusal> {
        let bytes = self.0.borrow();
        let start = (offset as usize).min(bytes.len());
        let count = buffer.len().min(bytes.len() - start);
        buffer[..count].copy_from_slice(&bytes[start..start + count]);
        buffer[count..].fill(0);
        Ok(count)
    }

    fn write_at(&self, data: &[u8], offset: u64) -> Result<(), Refusal> {
        let mut bytes = self.0.borrow_mut();
        let end = offset as usize + data.len();
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        bytes[offset as usize..end].copy_from_slice(data);
        Ok(())
    }

    fn truncate(&self, size: u64) -> Result<(), Refusal> {
        self.0.borrow_mut().resize(size as usize, 0);
        Ok(())
    }

    fn sync(&self) -> Result<(), Refusal> {
        Ok(())
    }

    fn size(&self) -> Result<u64, Refusal> {
        Ok(self.0.borrow().len() as u64)
    }
}

// What follows shares no code with the product: own parser, own checksum.

fn be(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn sum(mut s: (u32, u32), bytes: &[u8]) -> (u32, u32) {
    for pair in bytes.chunks(8) {
        let word = |at: usize| u32::from_le_bytes(pair[at..at + 4].try_into().unwrap());
        s.0 = s.0.wrapping_add(word(0)).wrapping_add(s.1);
        s.1 = s.1.wrapping_add(word(4)).wrapping_add(s.0);
    }
    s
}

/// Salts, last committed frame, database size, and newest image of each page: walIndexRecover.
#[derive(Debug, PartialEq, Eq, Clone, Default)]
struct Recovered {
    salts: (u32, u32),
    frame: usize,
    size: u32,
    pages: BTreeMap<u32, Vec<u8>>,
}

fn recover(bytes: &[u8]) -> Recovered {
    let mut found = Recovered::default();
    if bytes.len() < 32 || be(bytes, 0) != 0x377f_0682 {
        return found;
    }
    let mut chain = sum((0, 0), &bytes[..24]);
    if chain != (be(bytes, 24), be(bytes, 28)) {
        return found;
    }
    found.salts = (be(bytes, 16), be(bytes, 20));
    let mut open: Vec<(u32, Vec<u8>)> = Vec::new();
    for (index, frame) in bytes[32..].chunks_exact(FRAME).enumerate() {
        chain = sum(sum(chain, &frame[..8]), &frame[24..]);
        let salts = (be(frame, 8), be(frame, 12));
        if be(frame, 0) == 0 || salts != found.salts || chain != (be(frame, 16), be(frame, 20)) {
            break;
        }
        open.push((be(frame, 0), frame[24..].to_vec()));
        if be(frame, 4) != 0 {
            found.size = be(frame, 4);
            found.frame = index + 1;
            found.pages.extend(open.drain(..));
        }
    }
    found
}

/// The tap in front of a file, and the file as SQLite believes it to be.
struct Bench {
    rng: ChaCha8Rng,
    tap: WalTap,
    /// What is on disk.
    file: MemoryFile,
    /// What SQLite has written, held bytes included.
    believed: MemoryFile,
    committed: Recovered,
    streamed: Vec<Bytes>,
    completions: usize,
    acknowledge: bool,
    outcome: Option<Result<(), TapError>>,
    last_commit: Option<(u32, u32, BTreeMap<u32, Vec<u8>>)>,
}

impl Bench {
    /// One write of SQLite's, in pieces; false once it got an error.
    fn write(&mut self, offset: usize, data: &[u8]) -> bool {
        let mut at = 0;
        while at < data.len() {
            let whole = self.rng.random_bool(0.8);
            let count = if whole {
                data.len()
            } else {
                self.rng.random_range(1..=data.len())
            };
            let piece = &data[at..data.len().min(at + count)];
            if !self.piece((offset + at) as u64, piece) {
                return false;
            }
            at += piece.len();
        }
        true
    }

    fn piece(&mut self, offset: u64, data: &[u8]) -> bool {
        self.believed.write_at(data, offset).unwrap();
        let step = match self.tap.write(&self.file, offset, data) {
            Ok(step) => step,
            Err(error) => {
                self.fail(Err(error));
                return false;
            }
        };
        self.streamed.extend(self.tap.take_ready());
        match step {
            Step::Pass => self.file.write_at(data, offset).unwrap(),
            Step::Pieces(pieces) => self.put(&pieces),
            Step::Complete(pieces) => {
                self.put(&pieces);
                return self.complete();
            }
            Step::Repeat => self.repeat(),
        }
        self.check();
        true
    }

    fn repeat(&mut self) {
        self.check();
        let before = self.committed.clone();
        let held = self.tap.held().map(|(at, bytes)| (at, bytes.to_vec()));
        let (offset, bytes) = held.unwrap();
        self.file.write_at(&bytes, offset).unwrap();
        let end = self.tap.acknowledge().unwrap();
        self.committed = recover(&self.file.0.borrow());
        assert_eq!(end.frame as usize, before.frame + 1);
        assert_eq!(self.committed.frame, before.frame + 1);
        assert_eq!(
            (&self.committed.pages, self.committed.size),
            (&before.pages, before.size)
        );
    }

    fn put(&self, pieces: &[(u64, Vec<u8>)]) {
        pieces
            .iter()
            .for_each(|(offset, bytes)| self.file.write_at(bytes, *offset).unwrap());
    }

    fn check(&mut self) {
        let now = recover(&self.file.0.borrow());
        if now.salts == self.committed.salts {
            assert_eq!(
                now, self.committed,
                "a commit became valid before it was acknowledged"
            );
        } else {
            assert_eq!(now.frame, 0, "a new WAL begins without commits");
            self.committed = now;
        }
        let believed = self.believed.0.borrow();
        let mut read = vec![0u8; believed.len()];
        self.file.read_at(&mut read, 0).unwrap();
        self.tap.overlay(&mut read, 0);
        assert!(
            read == *believed,
            "SQLite reads something else than it wrote"
        );
    }

    fn complete(&mut self) -> bool {
        self.check();
        self.completions += 1;
        let completion = self.tap.take_completion().unwrap();
        self.streamed.push(completion.payload.clone());
        let mut slots = BTreeMap::new();
        let size = PageSize::try_from(PAGE as u32).unwrap();
        for payload in self.streamed.drain(..) {
            for slot in SlotPages::parse(&payload, Some(size)).unwrap() {
                slots.insert(slot.slot, (slot.page_no.get(), slot.image.to_vec()));
            }
        }
        let counted = slots.range(..completion.slot_count);
        assert_eq!(counted.clone().count() as u32, completion.slot_count);
        let pages: BTreeMap<u32, Vec<u8>> = counted.map(|(_, page)| page.clone()).collect();
        let checksums: Vec<u32> = completion.changes.keys().map(|page| page.get()).collect();
        assert_eq!(checksums, pages.keys().copied().collect::<Vec<_>>());
        self.last_commit = Some((completion.end.frame, completion.page_count, pages));
        if !self.acknowledge {
            self.fail(Ok(()));
            return false;
        }
        let (offset, bytes) = self
            .tap
            .held()
            .map(|(at, bytes)| (at, bytes.to_vec()))
            .unwrap();
        self.file.write_at(&bytes, offset).unwrap();
        self.tap.acknowledge();
        self.committed = recover(&self.file.0.borrow());
        assert_eq!(
            self.committed.frame as u32, completion.end.frame,
            "SQLite would not find it"
        );
        self.outcome = Some(Ok(()));
        true
    }

    fn fail(&mut self, outcome: Result<(), TapError>) {
        self.tap.abandon();
        self.streamed.clear();
        self.outcome = Some(outcome);
        assert_eq!(recover(&self.file.0.borrow()), self.committed);
        *self.believed.0.borrow_mut() = self.file.0.borrow().clone();
    }
}

/// SQLite's writer (`walFrames`, `walRewriteChecksums`), as far as bytes go.
struct Writer {
    salts: (u32, u32),
    sequence: u32,
    committed: usize,
    chain: (u32, u32),
    frames: Vec<(u32, Vec<u8>)>,
    recompute: Option<usize>,
    /// First frame without salts.
    unsealed: Option<usize>,
    /// SQLite up to 3.49.1: what a savepoint takes back stays the first to be rewritten.
    keeps_recompute: bool,
}

impl Writer {
    fn header(&mut self, bench: &mut Bench) -> bool {
        let mut bytes = Vec::new();
        let words = [
            0x377f_0682,
            3_007_000,
            PAGE as u32,
            self.sequence,
            self.salts.0,
            self.salts.1,
        ];
        words
            .iter()
            .for_each(|word: &u32| bytes.extend_from_slice(&word.to_be_bytes()));
        self.chain = sum((0, 0), &bytes);
        bytes.extend_from_slice(&self.chain.0.to_be_bytes());
        bytes.extend_from_slice(&self.chain.1.to_be_bytes());
        bench.write(0, &bytes)
    }

    fn offset(&self, index: usize) -> usize {
        32 + (self.committed + index) * FRAME
    }

    fn frame_header(&self, page: u32, size: u32, chain: Option<(u32, u32)>) -> Vec<u8> {
        let (salts, chain) = chain.map_or(((0, 0), (0, 0)), |chain| (self.salts, chain));
        let words = [page, size, salts.0, salts.1, chain.0, chain.1];
        words.iter().flat_map(|word| word.to_be_bytes()).collect()
    }

    /// Writes a page: over its frame of this transaction, or as a new frame.
    fn page(&mut self, bench: &mut Bench, page: u32, image: &[u8], size: u32) -> bool {
        let known = self.frames.iter().rposition(|(known, _)| *known == page);
        if let (Some(index), 0) = (known, size) {
            self.recompute = Some(self.recompute.map_or(index, |known| known.min(index)));
            self.frames[index].1 = image.to_vec();
            return bench.write(self.offset(index) + 24, image);
        }
        let index = self.frames.len();
        let chain = if self.recompute.is_some() {
            None
        } else {
            let mut head = page.to_be_bytes().to_vec();
            head.extend_from_slice(&size.to_be_bytes());
            self.chain = sum(sum(self.chain, &head), image);
            Some(self.chain)
        };
        if chain.is_none() {
            self.unsealed = self.unsealed.or(Some(index));
        }
        let header = self.frame_header(page, size, chain);
        self.frames.push((page, image.to_vec()));
        bench.write(self.offset(index), &header)
            && bench.write(self.offset(index) + 24, image)
            && (size == 0 || self.rewrite(bench, size))
    }

    /// Copies of the frame last committed, up to the end of a sector.
    fn pad(&mut self, bench: &mut Bench, page: u32, image: &[u8]) {
        let completions = bench.completions;
        for _ in 0..bench.rng.random_range(1..4) {
            let committed = bench.committed.frame;
            assert!(self.page(bench, page, image, 9), "{:?}", bench.outcome);
            assert_eq!(bench.committed.frame, committed + 1);
            self.committed = committed + 1;
            self.frames.clear();
        }
        assert_eq!(bench.completions, completions, "a copy is no transaction");
    }

    fn rewrite(&mut self, bench: &mut Bench, size: u32) -> bool {
        let Some(first) = self.recompute.take() else {
            return true;
        };
        self.chain = if self.committed + first == 0 {
            let bytes = bench.believed.0.borrow();
            (be(&bytes, 24), be(&bytes, 28))
        } else {
            let bytes = bench.believed.0.borrow();
            let at = 32 + (self.committed + first - 1) * FRAME;
            (be(&bytes, at + 16), be(&bytes, at + 20))
        };
        for index in first..self.frames.len() {
            let (page, image) = self.frames[index].clone();
            let size = if index + 1 == self.frames.len() {
                size
            } else {
                0
            };
            let mut head = page.to_be_bytes().to_vec();
            head.extend_from_slice(&size.to_be_bytes());
            self.chain = sum(sum(self.chain, &head), &image);
            let header = self.frame_header(page, size, Some(self.chain));
            if !bench.write(self.offset(index), &header) {
                return false;
            }
        }
        true
    }
}

/// One transaction; returns whether it was told to be committed.
fn transaction(bench: &mut Bench, writer: &mut Writer, break_chain: bool) {
    let (chain, committed) = (writer.chain, writer.committed);
    let before = bench.completions;
    bench.outcome = None;
    bench.acknowledge = bench.rng.random_bool(0.75);
    if writer.committed == 0 && !writer.header(bench) {
        panic!("{:?}", bench.outcome);
    }
    let mut savepoint: Option<(usize, (u32, u32))> = None;
    let mut going = true;
    let steps = bench.rng.random_range(0..30);
    for _ in 0..steps {
        match bench.rng.random_range(0..10) {
            0 => savepoint = Some((writer.frames.len(), writer.chain)),
            1 => {
                if let Some((count, chain)) = savepoint.take() {
                    writer.frames.truncate(count);
                    writer.chain = chain;
                    writer.unsealed = writer.unsealed.filter(|first| *first < count);
                    if !writer.keeps_recompute {
                        writer.recompute = writer.recompute.filter(|first| *first < count);
                    }
                    if bench.rng.random_bool(0.3) {
                        break; // with little after it, the commit ends before what was overwritten
                    }
                }
            }
            _ => {
                // Few pages and few contents, so that old bytes in the file are often the new ones.
                // Behind a savepoint mostly others, so that what it takes back was overwritten
                // there.
                let other = savepoint.is_some() && bench.rng.random_bool(0.8);
                let page = bench.rng.random_range(1..8) + if other { 8 } else { 0 };
                let image = vec![bench.rng.random_range(0..3u8); PAGE];
                going = going && writer.page(bench, page, &image, 0);
            }
        }
    }
    assert!(going, "{:?}", bench.outcome);
    assert_eq!(bench.completions, before, "completed before its commit");
    let ended = if bench.rng.random_bool(0.15) {
        bench.tap.abandon();
        bench.streamed.clear();
        *bench.believed.0.borrow_mut() = bench.file.0.borrow().clone();
        false
    } else {
        if break_chain {
            writer.chain.0 ^= 1;
        }
        let unsealed = writer.unsealed.unwrap_or(writer.frames.len());
        let broken = match writer.recompute {
            None => break_chain,
            // Frames before it stay without salts; this commit's own will be one.
            Some(first) => unsealed < first,
        };
        let page = bench.rng.random_range(1..8);
        let image = vec![bench.rng.random_range(0..3u8); PAGE];
        writer.page(bench, page, &image, 9);
        match bench.outcome.take() {
            Some(Err(error)) => {
                assert!(broken, "{error}");
                assert!(matches!(error, TapError::BrokenChain(_)), "{error}");
                false
            }
            outcome => {
                assert_eq!(outcome, Some(Ok(())), "the commit was not noticed");
                assert!(
                    !broken,
                    "a commit that SQLite could not recover went through"
                );
                assert_eq!(
                    bench.completions,
                    before + 1,
                    "exactly one completing write"
                );
                let (frame, size, pages) = bench.last_commit.clone().unwrap();
                assert_eq!((frame as usize, size), (committed + writer.frames.len(), 9));
                assert_eq!(pages, writer.frames.iter().cloned().collect());
                bench.acknowledge
            }
        }
    };
    if ended {
        assert_eq!(bench.committed.frame, committed + writer.frames.len());
        let last = writer.frames.last().cloned();
        writer.committed = bench.committed.frame;
        writer.frames.clear();
        if let (true, Some((page, image))) = (bench.rng.random_bool(0.3), last) {
            writer.pad(bench, page, &image);
        }
        bench.tap.commit_ended();
    } else {
        writer.chain = chain;
    }
    writer.frames.clear();
    writer.recompute = None;
    writer.unsealed = None;
}

fn run(seed: u64) {
    let mut bench = Bench {
        rng: ChaCha8Rng::seed_from_u64(seed),
        tap: WalTap::default(),
        file: MemoryFile::default(),
        believed: MemoryFile::default(),
        committed: Recovered::default(),
        streamed: Vec::new(),
        completions: 0,
        acknowledge: true,
        outcome: None,
        last_commit: None,
    };
    let mut writer = Writer {
        salts: (seed as u32, 77),
        sequence: 0,
        committed: 0,
        chain: (0, 0),
        frames: Vec::new(),
        recompute: None,
        unsealed: None,
        keeps_recompute: seed.is_multiple_of(2),
    };
    for _ in 0..12 {
        let break_chain = bench.rng.random_bool(0.1);
        transaction(&mut bench, &mut writer, break_chain);
        if writer.committed > 0 && bench.rng.random_bool(0.4) {
            writer.salts = (writer.salts.0.wrapping_add(1), bench.rng.random());
            writer.sequence += 1;
            writer.committed = 0;
        }
        if bench.rng.random_bool(0.1) {
            // Another connection's tap knows nothing of what this one saw.
            bench.tap = WalTap::default();
        }
    }
}

/// Broken, a commit reaches the file before the quorum has it, or twice, or never, or the log gets
/// other pages than the file.
#[test]
fn the_tap_and_sqlites_recovery_agree() {
    if let Ok(seed) = std::env::var("DUROVFS_SEED") {
        return run(seed.parse().unwrap());
    }
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let first = now.unwrap().as_nanos() as u64;
    for seed in first..first + 60 {
        let result = std::panic::catch_unwind(|| run(seed));
        assert!(result.is_ok(), "replay with DUROVFS_SEED={seed}");
    }
}
