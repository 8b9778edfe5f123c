//! Randomness that can be replayed: one seed per test run, printed, and taken from `DUROVFS_SEED`
//! when that is set.

use std::time::{Duration, SystemTime};

/// A generator of pseudo-random numbers (SplitMix64).
#[derive(Debug, Clone)]
pub struct Seeded {
    state: u64,
}

impl Seeded {
    /// A generator with this seed.
    pub fn new(seed: u64) -> Self {
        Self { state: seed }
    }

    /// A generator with the seed of this run.
    ///
    /// # Panics
    /// When `DUROVFS_SEED` is not a number.
    pub fn from_environment(test: &str) -> Self {
        let seed = match std::env::var("DUROVFS_SEED") {
            Ok(text) => text.parse().expect("DUROVFS_SEED must be a number"),
            Err(_) => SystemTime::now()
                .duration_since(SystemTime::UNIX_EPOCH)
                .map_or(0, |elapsed| elapsed.as_nanos() as u64),
        };
        println!("{test}: replay with DUROVFS_SEED={seed}");
        Self { state: seed }
    }

    /// The next number.
    pub fn next_number(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `end`, which is not zero.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next_number() % end
    }

    /// A time between two others.
    pub fn between(&mut self, shortest: Duration, longest: Duration) -> Duration {
        let span = longest.saturating_sub(shortest).as_micros() as u64;
        shortest + Duration::from_micros(self.below(span.max(1)))
    }
}

/// How often the kill tests kill: `DUROVFS_KILLS`, or what the product promises to be tested with.
///
/// # Panics
/// When `DUROVFS_KILLS` is not a number above zero.
pub fn kill_count() -> u64 {
    match std::env::var("DUROVFS_KILLS") {
        Ok(text) => {
            let count = text.parse().expect("DUROVFS_KILLS must be a number");
            assert!(count > 0, "DUROVFS_KILLS=0 would test nothing");
            count
        }
        Err(_) => 100,
    }
}
