//! Runs over many seeds: that all hold, that each mistake is seen, and that no power cut loses
//! anything. Nothing of one run is in here.

use super::settings::{Machine, Mutation, PowerCut, Settings, Tally, Tear, Tooth};
use super::{Report, run};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Least events of each kind that [`seeds_hold`] wants to see; a rule that no schedule reaches is
/// tested by none.
const REACHED_MIN: u64 = 10;
/// Seeds from which on they must have been seen.
const SEEDS_TO_REACH: u64 = 150;

/// Does something for each number, in order, on all processors. When it says false, no further
/// ones are begun; those before it still end.
fn in_parallel(numbers: Range<u64>, each: impl Fn(u64) -> bool + Sync) {
    let next = AtomicU64::new(numbers.start);
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    let work = || {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= numbers.end {
                return;
            }
            if !each(number) {
                next.store(numbers.end, Ordering::Relaxed);
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(work);
        }
    });
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn ended<T>(mutex: Mutex<T>) -> T {
    mutex.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// Runs these seeds. Together they must reach what the product has rules for.
///
/// # Errors
/// The seeds that fail, with what was found; or what none of them reached.
pub fn seeds_hold(seeds: Range<u64>) -> Result<Tally, String> {
    let sum = Mutex::new(Tally::default());
    let failures = Mutex::new(Vec::new());
    let count = seeds.end - seeds.start;
    in_parallel(seeds, |seed| match run(&Settings::of_seed(seed)) {
        Ok(report) => {
            lock(&sum).add(&report.tally);
            true
        }
        Err(found) => {
            let failure = format!("seed {seed}: {found}\n  look at it: scripts/sim {seed}");
            lock(&failures).push(failure);
            false
        }
    });
    let failures = ended(failures);
    if !failures.is_empty() {
        return Err(failures.join("\n"));
    }
    let sum = ended(sum);
    match sum.seldom(REACHED_MIN) {
        Some((what, seen)) if count >= SEEDS_TO_REACH => {
            Err(format!("only {seen} {what} in all seeds: {sum:?}"))
        }
        _ => Ok(sum),
    }
}

/// Runs a seed twice, and another one.
///
/// # Errors
/// The same seed gave another run, or another seed the same.
pub fn is_deterministic(seed: u64) -> Result<(), String> {
    let first = run(&Settings::of_seed(seed))?;
    if run(&Settings::of_seed(seed))? != first {
        return Err(format!("seed {seed} gives two different runs"));
    }
    let other = run(&Settings::of_seed(seed + 1))?;
    if other.trace == first.trace {
        return Err(format!("seeds {seed} and {} give the same run", seed + 1));
    }
    Ok(())
}

/// Runs a mistake until the property that it breaks is seen to be broken, by a seed that holds
/// without the mistake. Gives the first such seed, and what was found.
///
/// # Errors
/// It is not seen in as many seeds as it may need, or a seed fails without it.
pub fn is_caught(tooth: &Tooth) -> Result<(u64, String), String> {
    let first = Mutex::new(None);
    in_parallel(0..tooth.within, |seed| {
        match run(&tooth.settings(seed).with(tooth.mutation)) {
            Err(found) if found.contains(tooth.finding) => {
                let mut first = lock(&first);
                if first.as_ref().is_none_or(|(earlier, _)| seed < *earlier) {
                    *first = Some((seed, found));
                }
                false
            }
            _ => true,
        }
    });
    let Some((seed, found)) = ended(first) else {
        return Err(format!(
            "{:?} was not seen by \"{}\" in {} seeds",
            tooth.mutation, tooth.finding, tooth.within
        ));
    };
    match run(&tooth.settings(seed)) {
        Ok(_) => Ok((seed, found.lines().next().unwrap_or_default().to_owned())),
        Err(found) => Err(format!("seed {seed} fails without the mistake: {found}")),
    }
}

/// What all checkers find of a mistake in so many seeds: each finding without its numbers, how many
/// seeds see it, and the first of them.
pub fn survey(mutation: Mutation, seeds: u64) -> BTreeMap<String, (u64, u64)> {
    let findings: Mutex<BTreeMap<String, (u64, u64)>> = Mutex::default();
    in_parallel(0..seeds, |seed| {
        if let Err(found) = run(&Settings::of_seed(seed).with(mutation)) {
            let line = found.lines().next().unwrap_or_default();
            // Without its numbers and identities.
            let words = line.split_inclusive(|c: char| !c.is_ascii_alphanumeric());
            let shape: String = words
                .filter(|word| !word.contains(|c: char| c.is_ascii_digit()))
                .collect();
            let mut findings = lock(&findings);
            let (count, first) = findings.entry(shape).or_insert((0, seed));
            *count += 1;
            *first = seed.min(*first);
        }
        true
    });
    ended(findings)
}

/// Runs the fixed scenario with the power going at each `step`th sync of each machine in each of
/// its lives. Gives the number of runs.
///
/// # Errors
/// The power cuts that lose something, or did not happen.
pub fn power_cuts_lose_nothing(step: usize) -> Result<usize, String> {
    let whole = run(&Settings::scenario(None))?;
    let Tally {
        changes_done,
        archived,
        buried,
        opened,
        ..
    } = whole.tally;
    // A sync of what does not happen is crashed at by nobody.
    if [changes_done, archived, buried, opened].contains(&0) {
        return Err(format!("the scenario lacks something: {:?}", whole.tally));
    }
    let cuts: Vec<PowerCut> = every_cut(&whole).into_iter().step_by(step).collect();
    let failures = Mutex::new(Vec::new());
    in_parallel(0..cuts.len() as u64, |index| {
        let cut = cuts[index as usize];
        let failure = match run(&Settings::scenario(Some(cut))) {
            Ok(report) if report.trace == whole.trace => "nothing happened".to_owned(),
            Ok(_) => return true,
            Err(found) => found,
        };
        lock(&failures).push(format!("{cut:?}: {failure}"));
        false
    });
    let failures = ended(failures);
    if failures.is_empty() {
        Ok(cuts.len())
    } else {
        Err(failures.join("\n"))
    }
}

/// Each sync of each machine in each of its lives, with each kind of tear.
fn every_cut(whole: &Report) -> Vec<PowerCut> {
    let mut cuts = Vec::new();
    for ((machine, life), barriers) in &whole.barriers {
        // A host's disk is no vote: one kind of tear is enough.
        let tears: &[Tear] = match machine {
            Machine::Node(_) => &[Tear::Nothing, Tear::Everything, Tear::Mixture],
            Machine::Host(_) => &[Tear::Mixture],
        };
        for barrier in 1..=*barriers {
            cuts.extend(tears.iter().map(|tear| PowerCut {
                machine: *machine,
                life: *life,
                barrier,
                tear: *tear,
            }));
        }
    }
    cuts
}
