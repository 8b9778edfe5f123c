//! What one slot of the run measured. A slot is one system with one number of callers, for some
//! seconds.

use anyhow::{Context, Result};
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::Duration;

/// Latencies above this count as this: no caller waits so long without giving up.
const LATENCY_MAX: Duration = Duration::from_secs(60);
/// Digits that a latency keeps: the quantiles are exact to one in a thousand.
const SIGNIFICANT_DIGITS: u8 = 3;

/// Latencies in nanoseconds.
pub struct Latencies(Histogram<u64>);

impl Latencies {
    /// None yet.
    pub fn new() -> Result<Self> {
        let max = LATENCY_MAX.as_nanos() as u64;
        let histogram = Histogram::new_with_bounds(1, max, SIGNIFICANT_DIGITS);
        Ok(Self(histogram.context("make a histogram")?))
    }

    /// Adds one.
    pub fn record(&mut self, latency: Duration) {
        self.0.saturating_record(latency.as_nanos() as u64);
    }

    /// Adds those of another caller.
    pub fn merge(&mut self, other: &Self) -> Result<()> {
        self.0.add(&other.0).context("merge histograms")
    }

    /// What the callers together saw in `elapsed`.
    pub fn summary(&self, elapsed: Duration) -> Summary {
        let micros = |quantile| self.0.value_at_quantile(quantile) as f64 / 1e3;
        Summary {
            commits: self.0.len(),
            seconds: elapsed.as_secs_f64(),
            p50_us: micros(0.5),
            p99_us: micros(0.99),
        }
    }
}

/// What the callers of one slot saw. The child that holds them prints it as its last line.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Commits that were answered.
    pub commits: u64,
    /// In how long.
    pub seconds: f64,
    /// Half of the commits took at most so long.
    pub p50_us: f64,
    /// All but one in a hundred took at most so long.
    pub p99_us: f64,
}

impl Summary {
    /// Commits per second.
    pub fn rate(&self) -> f64 {
        self.commits as f64 / self.seconds
    }
}

/// A slot's result: the callers' view and what the processes used.
#[derive(Debug, Clone, Serialize)]
pub struct Sample {
    /// What the callers saw.
    #[serde(flatten)]
    pub summary: Summary,
    /// Commits per second.
    pub rate: f64,
    /// By role, per commit: client, relay or primary, all replicas together.
    pub per_commit: BTreeMap<String, PerCommit>,
    /// Share of the machine's processor time that went to processes which are not ours.
    pub foreign_cpu: f64,
}

/// What the processes of one role used for one commit, on average.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct PerCommit {
    /// Processor time.
    pub cpu_us: f64,
    /// Times that a thread went to sleep or was moved off its processor.
    pub switches: f64,
    /// Bytes that were to be written to a disk.
    pub disk_bytes: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_of_all_callers_together() {
        // Broken: the table would show one caller's latencies as everybody's.
        let mut slow = Latencies::new().unwrap();
        let mut quick = Latencies::new().unwrap();
        (0..60).for_each(|_| quick.record(Duration::from_micros(100)));
        (0..40).for_each(|_| slow.record(Duration::from_micros(9_000)));
        quick.merge(&slow).unwrap();
        let summary = quick.summary(Duration::from_secs(2));
        assert_eq!(summary.commits, 100);
        assert!((summary.p50_us - 100.0).abs() < 1.0, "{summary:?}");
        assert!((summary.p99_us - 9_000.0).abs() < 10.0, "{summary:?}");
        assert!((summary.rate() - 50.0).abs() < 1e-9);
    }
}
