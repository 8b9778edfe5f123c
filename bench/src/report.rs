//! From samples to a page: medians over the rounds, ratios within them, and the goals.

use crate::machine::Machine;
use crate::run::System;
use crate::sample::{PerCommit, Sample};
use crate::sqlite::ROW_BYTES;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write;

/// With one database a commit through durovfs is to take at most so many times what the bare
/// pipeline takes.
const P50_RATIO_GOAL: f64 = 1.3;
/// With many databases durovfs is to commit at least this share of what the bare pipeline does.
const RATE_RATIO_GOAL: f64 = 0.6;

/// Samples by number of callers and system, in the order of the rounds.
pub type Slots = BTreeMap<usize, BTreeMap<System, Vec<Sample>>>;

/// All that a run found.
#[derive(Serialize)]
pub struct Report {
    machine: Machine,
    rounds: u32,
    seconds: f64,
    commit_bytes: usize,
    results: Vec<Result>,
}

/// What was found with one number of callers.
#[derive(Serialize)]
struct Result {
    callers: usize,
    systems: BTreeMap<System, Medians>,
    ratios: Vec<Ratio>,
    samples: BTreeMap<System, Vec<Sample>>,
}

/// Medians over the rounds.
#[derive(Serialize)]
struct Medians {
    p50_us: f64,
    p99_us: f64,
    rate: f64,
    foreign_cpu: f64,
    per_commit: BTreeMap<String, PerCommit>,
}

/// durovfs beside another system: the median of the rounds' ratios, since the machine is the same
/// within a round and may not be over all of them.
#[derive(Serialize)]
struct Ratio {
    to: System,
    p50: f64,
    p99: f64,
    rate: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    goal: Option<Goal>,
}

/// What the ratio is to be.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
struct Goal {
    of: &'static str,
    bound: f64,
    is_reached: bool,
}

impl Report {
    /// Takes stock.
    pub fn new(
        machine: Machine,
        rounds: u32,
        seconds: f64,
        commit_bytes: usize,
        slots: &Slots,
    ) -> Self {
        let result = |(&callers, systems): (&usize, &BTreeMap<System, Vec<Sample>>)| Result {
            callers,
            systems: systems
                .iter()
                .map(|(&system, samples)| (system, medians(samples)))
                .collect(),
            ratios: ratios(callers, systems),
            samples: systems.clone(),
        };
        let results = slots.iter().map(result).collect();
        Self {
            machine,
            rounds,
            seconds,
            commit_bytes,
            results,
        }
    }

    /// For people.
    pub fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = self.write(&mut text);
        text
    }

    fn write(&self, text: &mut String) -> std::fmt::Result {
        let machine = &self.machine;
        writeln!(
            text,
            "durovfs benchmark: {} rounds of {} s",
            self.rounds, self.seconds
        )?;
        writeln!(
            text,
            "machine: {} cores ({}), Linux {}, {} on {}",
            machine.cores, machine.processor, machine.kernel, machine.file_system, machine.device
        )?;
        writeln!(
            text,
            "commit: one row of {ROW_BYTES} bytes; SQLite {}; {} bytes through the pipeline",
            machine.sqlite, self.commit_bytes
        )?;
        self.results
            .iter()
            .try_for_each(|result| result.write(text))
    }
}

impl Result {
    fn write(&self, text: &mut String) -> std::fmt::Result {
        let databases = if self.callers == 1 {
            "database"
        } else {
            "databases"
        };
        writeln!(
            text,
            "\n{:<26}{:>10}{:>10}{:>12}{:>10}   CPU µs per commit",
            format!("{} {databases}", self.callers),
            "p50 µs",
            "p99 µs",
            "commits/s",
            "foreign"
        )?;
        for (&system, medians) in &self.systems {
            writeln!(
                text,
                "{:<26}{:>10.0}{:>10.0}{:>12.0}{:>9.1}%   {}",
                title(system),
                medians.p50_us,
                medians.p99_us,
                medians.rate,
                medians.foreign_cpu * 100.0,
                medians.processors()
            )?;
        }
        self.ratios.iter().try_for_each(|ratio| ratio.write(text))
    }
}

impl Medians {
    fn processors(&self) -> String {
        let one = |(role, used): (&String, &PerCommit)| format!("{role} {:.0}", used.cpu_us);
        self.per_commit
            .iter()
            .map(one)
            .collect::<Vec<_>>()
            .join(", ")
    }
}

impl Ratio {
    fn write(&self, text: &mut String) -> std::fmt::Result {
        write!(
            text,
            "durovfs / {:<16}{:>9.2}x{:>9.2}x{:>11.2}x",
            title(self.to),
            self.p50,
            self.p99,
            self.rate
        )?;
        if let Some(goal) = self.goal {
            let sign = if goal.of == "p50" {
                "at most"
            } else {
                "at least"
            };
            let verdict = if goal.is_reached {
                "reached"
            } else {
                "not reached"
            };
            write!(
                text,
                "   goal: {} {sign} {:.1}x, {verdict}",
                goal.of, goal.bound
            )?;
        }
        writeln!(text)
    }
}

fn title(system: System) -> &'static str {
    match system {
        System::Plain => "plain SQLite",
        System::Pipeline => "bare pipeline",
        System::PipelineLoop => "pipeline, loop",
        System::Durovfs => "durovfs",
    }
}

fn medians(samples: &[Sample]) -> Medians {
    let over = |value: &dyn Fn(&Sample) -> f64| median(samples.iter().map(value).collect());
    let roles = samples
        .first()
        .map(|sample| sample.per_commit.keys())
        .into_iter()
        .flatten();
    let role_median = |role: &String| {
        let of = |value: &dyn Fn(&PerCommit) -> f64| {
            let used = samples
                .iter()
                .filter_map(|sample| sample.per_commit.get(role));
            median(used.map(value).collect())
        };
        let used = PerCommit {
            cpu_us: of(&|used| used.cpu_us),
            switches: of(&|used| used.switches),
            disk_bytes: of(&|used| used.disk_bytes),
        };
        (role.clone(), used)
    };
    Medians {
        p50_us: over(&|sample| sample.summary.p50_us),
        p99_us: over(&|sample| sample.summary.p99_us),
        rate: over(&|sample| sample.rate),
        foreign_cpu: over(&|sample| sample.foreign_cpu),
        per_commit: roles.map(role_median).collect(),
    }
}

fn ratios(callers: usize, systems: &BTreeMap<System, Vec<Sample>>) -> Vec<Ratio> {
    let Some(durovfs) = systems.get(&System::Durovfs) else {
        return Vec::new();
    };
    let others = systems
        .iter()
        .filter(|(system, _)| **system != System::Durovfs);
    let ratio = |(&to, samples): (&System, &Vec<Sample>)| {
        let over = |value: &dyn Fn(&Sample) -> f64| {
            let rounds = durovfs.iter().zip(samples);
            median(
                rounds
                    .map(|(ours, theirs)| value(ours) / value(theirs))
                    .collect(),
            )
        };
        let (p50, rate) = (
            over(&|sample| sample.summary.p50_us),
            over(&|sample| sample.rate),
        );
        let goal = (to == System::Pipeline).then(|| goal(callers, p50, rate));
        Ratio {
            to,
            p50,
            p99: over(&|sample| sample.summary.p99_us),
            rate,
            goal,
        }
    };
    others.map(ratio).collect()
}

fn goal(callers: usize, p50: f64, rate: f64) -> Goal {
    match callers {
        1 => Goal {
            of: "p50",
            bound: P50_RATIO_GOAL,
            is_reached: p50 <= P50_RATIO_GOAL,
        },
        _ => Goal {
            of: "rate",
            bound: RATE_RATIO_GOAL,
            is_reached: rate >= RATE_RATIO_GOAL,
        },
    }
}

/// The middle value; of an even number of them the mean of the middle two; of none nothing.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match (values.get(middle), values.len() % 2) {
        (None, _) => f64::NAN,
        (Some(&value), 1) => value,
        (Some(&value), _) => (values[middle - 1] + value) / 2.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::Summary;

    fn sample(p50_us: f64, rate: f64) -> Sample {
        let commits = rate as u64;
        let summary = Summary {
            commits,
            seconds: 1.0,
            p50_us,
            p99_us: 3.0 * p50_us,
        };
        let used = PerCommit {
            cpu_us: p50_us / 2.0,
            switches: 2.0,
            disk_bytes: 0.0,
        };
        let per_commit = [("client".to_owned(), used)].into();
        Sample {
            summary,
            rate,
            per_commit,
            foreign_cpu: 0.01,
        }
    }

    fn samples(values: &[(f64, f64)]) -> Vec<Sample> {
        values
            .iter()
            .map(|&(p50_us, rate)| sample(p50_us, rate))
            .collect()
    }

    #[test]
    fn medians_are_not_moved_by_one_bad_round() {
        // Broken: one disturbed round would decide the result.
        assert_eq!(median(vec![3.0, 900.0, 1.0]), 3.0);
        assert_eq!(median(vec![4.0, 1.0, 2.0, 900.0]), 3.0);
        assert!(median(Vec::new()).is_nan());
    }

    #[test]
    fn ratios_are_taken_within_the_rounds() {
        // Broken: a machine that slows down in the middle of the run would show as a ratio.
        let systems = BTreeMap::from([
            (
                System::Pipeline,
                samples(&[(100.0, 1000.0), (900.0, 10.0), (1000.0, 9.0)]),
            ),
            (
                System::Durovfs,
                samples(&[(120.0, 700.0), (1080.0, 7.0), (500.0, 90.0)]),
            ),
        ]);
        let [ratio] = &ratios(1, &systems)[..] else {
            panic!("one ratio")
        };
        assert!((ratio.p50 - 1.2).abs() < 1e-9);
        assert!((ratio.rate - 0.7).abs() < 1e-9);
    }

    #[test]
    fn goals_are_judged_on_the_right_side() {
        // Broken: the report would say that a goal is reached when it is missed.
        assert!(goal(1, 1.3, 0.1).is_reached && !goal(1, 1.31, 9.0).is_reached);
        assert!(goal(64, 9.0, 0.6).is_reached && !goal(64, 0.1, 0.59).is_reached);
    }

    #[test]
    fn the_page_shows_each_system_and_the_verdict() {
        // Broken: a result would be missing from the page that people read.
        let machine = Machine {
            cores: 2,
            processor: "some".to_owned(),
            kernel: "6.1".to_owned(),
            file_system: "ext4".to_owned(),
            device: "/dev/vda".to_owned(),
            sqlite: "3.51".to_owned(),
        };
        let one = BTreeMap::from([
            (System::Plain, samples(&[(200.0, 4000.0)])),
            (System::Pipeline, samples(&[(600.0, 1500.0)])),
            (System::Durovfs, samples(&[(900.0, 1000.0)])),
        ]);
        let text = Report::new(machine, 1, 3.0, 4200, &Slots::from([(1, one)])).text();
        assert!(
            text.contains("durovfs / bare pipeline        1.50x"),
            "{text}"
        );
        assert!(
            text.contains("goal: p50 at most 1.3x, not reached"),
            "{text}"
        );
        assert!(text.contains("client 450"), "{text}");
    }
}
