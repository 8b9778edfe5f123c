//! What the tests of this crate share: a model database, and the parts of its log.
//!
//! The model is the simplest thing that could be a log: a list of images, one per lsn. Everything
//! random comes from one seed, which is printed; `DUROVFS_SEED` replays it.

use durovfs_wire::entry::{Origin, PayloadBuilder, TransactionSummary};
use durovfs_wire::{
    ClientId, CommitHeader, DatabaseChecksum, DatabaseId, EntryPart, Epoch, LogPosition, Lsn,
    PageChecksum, PageNo, PageSize, PartHeader, PartKind, Timestamp,
};
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeMap;

use crate::chunk::LogIdentity;

pub(crate) const NAME: &str = "/srv/app data/über.db";

pub(crate) fn identity() -> LogIdentity {
    LogIdentity {
        database: DatabaseId::from_bytes([7; 16]),
        name: NAME.into(),
    }
}

/// The seed of this run: from `DUROVFS_SEED`, or drawn; printed, so that a failure can be replayed.
pub(crate) fn seeded_rng() -> ChaCha8Rng {
    let seed = match std::env::var("DUROVFS_SEED") {
        Ok(text) => text.parse().expect("DUROVFS_SEED is a number"),
        Err(_) => rand::rng().next_u64(),
    };
    println!("DUROVFS_SEED={seed}");
    ChaCha8Rng::seed_from_u64(seed)
}

/// A database as its log describes it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct ModelImage {
    pub(crate) page_size: usize,
    pub(crate) page_count: u32,
    pub(crate) pages: BTreeMap<u32, Vec<u8>>,
}

impl ModelImage {
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.page_count as usize * self.page_size];
        for (number, image) in &self.pages {
            let start = (*number as usize - 1) * self.page_size;
            bytes[start..start + self.page_size].copy_from_slice(image);
        }
        bytes
    }

    fn checksum(&self) -> DatabaseChecksum {
        let mut checksum = DatabaseChecksum::EMPTY;
        for (number, image) in &self.pages {
            checksum.toggle(PageChecksum::of(PageNo::new(*number).unwrap(), image));
        }
        checksum
    }
}

/// A log, and the database after each of its entries.
#[derive(Debug, Default)]
pub(crate) struct Model {
    pub(crate) entries: Vec<Vec<EntryPart>>,
    pub(crate) images: Vec<ModelImage>,
    pub(crate) times: Vec<Timestamp>,
    epoch: u32,
    now: i64,
    last: Option<TransactionSummary>,
}

pub(crate) const START_TIME: i64 = 1_763_000_000_000_000;

impl Model {
    pub(crate) fn new() -> Self {
        Self {
            now: START_TIME,
            ..Self::default()
        }
    }

    pub(crate) fn last_lsn(&self) -> u64 {
        self.entries.len() as u64
    }

    pub(crate) fn position(&self, lsn: u64) -> LogPosition {
        self.entries[lsn as usize - 1][0].header.position()
    }

    pub(crate) fn image(&self, lsn: u64) -> &ModelImage {
        &self.images[lsn as usize - 1]
    }

    pub(crate) fn is_transaction(&self, lsn: u64) -> bool {
        self.entries[lsn as usize - 1]
            .last()
            .unwrap()
            .header
            .transaction()
            .is_some()
    }

    /// Last transaction at or before `lsn`.
    pub(crate) fn transaction_at(&self, lsn: u64) -> Option<u64> {
        (1..=lsn).rev().find(|lsn| self.is_transaction(*lsn))
    }

    pub(crate) fn parts(&self, first: u64, last: u64) -> Vec<EntryPart> {
        self.entries[first as usize - 1..last as usize].concat()
    }

    fn header(&self, part: usize, kind: PartKind) -> PartHeader {
        PartHeader {
            database: identity().database,
            epoch: Epoch::new(self.epoch),
            lsn: Lsn::new(self.last_lsn() + 1),
            part: part as u32,
            kind,
        }
    }

    pub(crate) fn begin_epoch(&mut self) {
        self.epoch += 1;
        self.now += 10;
        let time = Timestamp::from_micros(self.now);
        let kind = PartKind::EpochStart {
            time,
            last_transaction: self.last,
        };
        let part = EntryPart {
            header: self.header(0, kind),
            payload: bytes::Bytes::new(),
        };
        self.entries.push(vec![part]);
        self.images
            .push(self.images.last().cloned().unwrap_or_default());
        self.times.push(time);
    }

    /// A transaction whose slots are `writes` in this order, cut into parts of `part_slots`.
    pub(crate) fn commit(
        &mut self,
        page_size: usize,
        page_count: u32,
        whole_image: bool,
        writes: &[(u32, u32, Vec<u8>)],
        slot_count: u32,
        part_slots: usize,
    ) {
        let mut image = match whole_image {
            true => ModelImage::default(),
            false => self.images.last().cloned().unwrap_or_default(),
        };
        image.page_size = page_size;
        image.page_count = page_count;
        let mut slots = BTreeMap::new();
        for (slot, page, bytes) in writes {
            slots.insert(*slot, (*page, bytes.clone()));
        }
        for (_, (page, bytes)) in slots.range(..slot_count) {
            image.pages.insert(*page, bytes.clone());
        }
        image.pages.retain(|page, _| *page <= page_count);
        self.now += 1000;
        let page_size = PageSize::try_from(page_size as u32).unwrap();
        let commit = CommitHeader {
            origin: Origin {
                client: ClientId::from_bytes([9; 16]),
                sequence: self.last_lsn(),
            },
            time: Timestamp::from_micros(self.now),
            base_lsn: self.last.map_or(Lsn::ZERO, |last| last.position.lsn),
            page_size,
            page_count,
            slot_count,
            checksum: image.checksum(),
            whole_image,
        };
        let mut parts = Vec::new();
        let mut pieces = writes.chunks(part_slots).peekable();
        loop {
            let mut payload = PayloadBuilder::default();
            for (slot, page, bytes) in pieces.next().unwrap_or_default() {
                payload.push(*slot, PageNo::new(*page).unwrap(), bytes);
            }
            let last = pieces.peek().is_none();
            let kind = if last {
                PartKind::Commit(commit)
            } else {
                PartKind::Pages { page_size }
            };
            let header = self.header(parts.len(), kind);
            parts.push(EntryPart {
                header,
                payload: payload.take(),
            });
            if last {
                break;
            }
        }
        self.last = parts.last().unwrap().header.transaction();
        self.entries.push(parts);
        self.images.push(image);
        self.times.push(commit.time);
    }

    /// A log of `count` entries with growth, shrinking, whole images, other page sizes, epochs,
    /// slots written again, slots taken back, and pages that are never written.
    pub(crate) fn random(rng: &mut ChaCha8Rng, count: u64) -> Self {
        let mut model = Self::new();
        model.begin_epoch();
        let mut page_size = 512usize << rng.random_range(0..3);
        while model.last_lsn() < count {
            let before = model.images.last().unwrap().page_count;
            let choice = rng.random_range(0..20);
            if choice == 0 {
                model.begin_epoch();
                continue;
            }
            let whole = choice == 1;
            if whole {
                page_size = 512 << rng.random_range(0..8);
            }
            let page_count = match rng.random_range(0..6) {
                0 => before / 2,
                1 | 2 => before + rng.random_range(0..6),
                _ => before,
            }
            .clamp(1, 40);
            let highest = page_count + rng.random_range(0..3);
            let mut writes = Vec::new();
            for slot in 0..rng.random_range(1..12u32) {
                let page = rng.random_range(1..=highest);
                writes.push((slot, page, random_page(rng, page_size)));
                if rng.random_bool(0.2) {
                    let page = rng.random_range(1..=highest);
                    let slot = rng.random_range(0..=slot);
                    writes.push((slot, page, random_page(rng, page_size)));
                }
            }
            let slots = writes.iter().map(|(slot, ..)| slot + 1).max().unwrap();
            let slot_count = if rng.random_bool(0.2) {
                slots / 2
            } else {
                slots
            };
            let part_slots = rng.random_range(1..12);
            model.commit(
                page_size, page_count, whole, &writes, slot_count, part_slots,
            );
        }
        model
    }
}

fn random_page(rng: &mut ChaCha8Rng, page_size: usize) -> Vec<u8> {
    let mut page = vec![rng.random::<u8>(); page_size];
    if rng.random_bool(0.5) {
        rng.fill_bytes(&mut page);
    }
    page
}
