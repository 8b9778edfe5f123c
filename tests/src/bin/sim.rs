//! Runs the simulation from the command line: one seed with all that happens in it, or seed after
//! seed for hours. `scripts/sim` builds and calls it.

#![forbid(unsafe_code)]

use durovfs_tests::simulation::{Mutation, Settings, Tally, Tooth, run, suites};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

const USAGE: &str = "usage: sim SEED           one seed, with everything that happens in it
       sim SEED MISTAKE   the same with a mistake in the cluster
       sim --seeds N      the first N seeds
       sim --hours N      seeds from a new start on, until N hours are over
       sim --mistakes N   what is found of each mistake in the first N seeds
       sim --check        what every change must pass: seeds, mistakes, power cuts";
/// Seeds of `--check`.
const CHECK_SEED_COUNT: u64 = 2000;
/// How often a long run says where it is.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["--seeds", count] => match count.parse() {
            Ok(count) => run_many(0, count, None),
            Err(_) => usage(),
        },
        ["--hours", hours] => match hours.parse::<f64>() {
            Ok(hours) if hours > 0.0 => {
                // New seeds each time; those of an earlier run are not run again.
                let now = std::time::SystemTime::UNIX_EPOCH.elapsed();
                let start = now.map_or(0, |elapsed| elapsed.as_secs() << 20);
                run_many(
                    start,
                    u64::MAX,
                    Some(Duration::from_secs_f64(hours * 3600.0)),
                )
            }
            _ => usage(),
        },
        ["--mistakes", count] => match count.parse() {
            Ok(count) => tell_mistakes(count),
            Err(_) => usage(),
        },
        ["--check"] => match check() {
            Ok(()) => ExitCode::SUCCESS,
            Err(found) => {
                println!("{found}");
                ExitCode::FAILURE
            }
        },
        [seed] => match seed.parse() {
            Ok(seed) => run_one(seed, Mutation::None),
            Err(_) => usage(),
        },
        [seed, mistake] => match (seed.parse(), Mutation::named(mistake)) {
            (Ok(seed), Some(mutation)) => run_one(seed, mutation),
            _ => usage(),
        },
        _ => usage(),
    }
}

fn usage() -> ExitCode {
    let mistakes: Vec<String> = Mutation::ALL.iter().map(|m| format!("{m:?}")).collect();
    eprintln!("{USAGE}\n\nmistakes: {}", mistakes.join(" "));
    ExitCode::from(2)
}

/// What every change must pass, each part with the time it took.
fn check() -> Result<(), String> {
    let mut begun = Instant::now();
    let mut took = move || {
        let seconds = begun.elapsed().as_secs_f64();
        begun = Instant::now();
        format!("({seconds:.1} s)")
    };
    suites::is_deterministic(42)?;
    println!("the same seed gives the same run {}", took());
    let count = suites::power_cuts_lose_nothing(1)?;
    println!("{count} power cuts lose nothing {}", took());
    for tooth in &Tooth::ALL {
        let (seed, found) = suites::is_caught(tooth)?;
        println!(
            "{:?} is caught by seed {seed} {}: {found}",
            tooth.mutation,
            took()
        );
    }
    let sum = suites::seeds_hold(0..CHECK_SEED_COUNT)?;
    println!("{CHECK_SEED_COUNT} seeds hold {}; {sum:?}", took());
    Ok(())
}

fn tell_mistakes(seeds: u64) -> ExitCode {
    for mutation in Mutation::ALL {
        println!("{mutation:?}");
        for (finding, (count, first)) in suites::survey(mutation, seeds) {
            println!("  {count} seeds, from {first} on: {finding}");
        }
    }
    ExitCode::SUCCESS
}

fn run_one(seed: u64, mutation: Mutation) -> ExitCode {
    let tooth = Tooth::ALL.iter().find(|tooth| tooth.mutation == mutation);
    let settings = tooth.map_or_else(|| Settings::of_seed(seed), |tooth| tooth.settings(seed));
    let settings = Settings {
        verbose: true,
        ..settings.with(mutation)
    };
    println!("{settings:?}");
    match run(&settings) {
        Ok(report) => {
            println!(
                "seed {seed} holds; trace {:016x}; {:?}",
                report.trace, report.tally
            );
            ExitCode::SUCCESS
        }
        Err(found) => {
            println!("seed {seed} fails: {found}");
            ExitCode::FAILURE
        }
    }
}

/// What all workers share.
struct Shared {
    next: AtomicU64,
    stop: AtomicBool,
    done: Mutex<(u64, Tally)>,
}

fn run_many(start: u64, count: u64, time: Option<Duration>) -> ExitCode {
    let shared = Shared {
        next: AtomicU64::new(0),
        stop: AtomicBool::new(false),
        done: Mutex::default(),
    };
    let begun = Instant::now();
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    let failed = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                let mut told = Instant::now();
                while !shared.stop.load(Ordering::Relaxed)
                    && time.is_none_or(|time| begun.elapsed() < time)
                {
                    let number = shared.next.fetch_add(1, Ordering::Relaxed);
                    if number >= count {
                        return;
                    }
                    let seed = start + number;
                    match run(&Settings::of_seed(seed)) {
                        Ok(report) => {
                            let mut done =
                                shared.done.lock().unwrap_or_else(PoisonError::into_inner);
                            done.0 += 1;
                            done.1.add(&report.tally);
                        }
                        Err(found) => {
                            println!("seed {seed} fails: {found}\nlook at it: scripts/sim {seed}");
                            failed.store(true, Ordering::Relaxed);
                            shared.stop.store(true, Ordering::Relaxed);
                        }
                    }
                    if told.elapsed() >= PROGRESS_INTERVAL {
                        told = Instant::now();
                        tell(&shared, begun);
                    }
                }
            });
        }
    });
    tell(&shared, begun);
    if failed.load(Ordering::Relaxed) {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    }
}

fn tell(shared: &Shared, begun: Instant) {
    let done = shared.done.lock().unwrap_or_else(PoisonError::into_inner);
    println!(
        "{} seeds hold after {:.0} s; {:?}",
        done.0,
        begun.elapsed().as_secs_f64(),
        done.1
    );
}
