//! N threads that commit one after the other, each on its own, and are measured together. The same
//! loop drives SQLite and the bare pipeline.

use crate::sample::{Latencies, Summary};
use anyhow::{Context, Result};
use std::io::Write;
use std::sync::mpsc::{self, Receiver};
use std::sync::{Barrier, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

/// Line that a client prints when its callers are warm: from here to its last line it is measured.
pub const MEASURING: &str = "measuring";
/// Unmeasured time before: connections open, caches fill, congestion windows grow.
const WARM_UP: Duration = Duration::from_millis(300);
/// Unmeasured commits before, at least: the first few of a connection are always slow.
const WARM_UP_COMMITS: usize = 20;

/// One caller: commits once per call.
pub type Caller = Box<dyn FnMut() -> Result<()>>;

/// Runs `count` callers for `duration`. `open` makes the caller with the given index, in its own
/// thread.
/// `report` is called while all threads still exist, so that what they used can be looked at.
///
/// # Errors
/// When a caller could not be made, one of its commits failed, or the report did.
pub fn drive(
    count: usize,
    duration: Duration,
    open: impl Fn(usize) -> Result<Caller> + Sync,
    report: impl FnOnce(&Summary) -> Result<()>,
) -> Result<()> {
    let gates = Gates::new(count);
    thread::scope(|scope| {
        let (sender, results) = mpsc::channel();
        for index in 0..count {
            let (gates, open, sender) = (&gates, &open, sender.clone());
            scope.spawn(move || {
                let result = run_caller(index, duration, gates, open);
                // Received in any case: the receiver outlives the threads.
                let _ = sender.send(result.with_context(|| format!("caller {index}")));
                gates.reported.wait();
            });
        }
        drop(sender);
        gates.warm.wait();
        let ready = say(MEASURING);
        let began = gates.open_now();
        let outcome = ready
            .and_then(|()| collect(&results, count))
            .and_then(|all| report(&all.summary(began.elapsed())));
        gates.reported.wait();
        outcome
    })
}

fn collect(results: &Receiver<Result<Latencies>>, count: usize) -> Result<Latencies> {
    let mut all = Latencies::new()?;
    for _ in 0..count {
        all.merge(&results.recv().context("a caller panicked")??)?;
    }
    Ok(all)
}

/// Where all callers and the main thread meet. Each gate is passed by every caller, also by one
/// that failed, so that nobody waits for it.
struct Gates {
    warm: Barrier,
    start: Barrier,
    began: OnceLock<Instant>,
    reported: Barrier,
}

impl Gates {
    fn new(callers: usize) -> Self {
        let barrier = || Barrier::new(callers + 1);
        Self {
            warm: barrier(),
            start: barrier(),
            began: OnceLock::new(),
            reported: barrier(),
        }
    }

    /// Lets the callers start, all at one moment.
    fn open_now(&self) -> Instant {
        let began = *self.began.get_or_init(Instant::now);
        self.start.wait();
        began
    }

    fn wait_for_start(&self) -> Instant {
        self.start.wait();
        *self.began.get_or_init(Instant::now)
    }
}

fn run_caller(
    index: usize,
    duration: Duration,
    gates: &Gates,
    open: impl Fn(usize) -> Result<Caller>,
) -> Result<Latencies> {
    let caller = open(index).and_then(|mut caller| {
        warm_up(&mut caller)?;
        Ok(caller)
    });
    gates.warm.wait();
    let began = gates.wait_for_start();
    measure(caller?, began + duration)
}

fn warm_up(caller: &mut Caller) -> Result<()> {
    let end = Instant::now() + WARM_UP;
    let mut commits = 0;
    while commits < WARM_UP_COMMITS || Instant::now() < end {
        caller()?;
        commits += 1;
    }
    Ok(())
}

fn measure(mut caller: Caller, end: Instant) -> Result<Latencies> {
    let mut latencies = Latencies::new()?;
    let mut began = Instant::now();
    while began < end {
        caller()?;
        let done = Instant::now();
        latencies.record(done - began);
        began = done;
    }
    Ok(latencies)
}

/// Tells the parent process something, at once.
pub fn say(line: &str) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "{line}").context("write to stdout")?;
    stdout.flush().context("write to stdout")
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::bail;

    fn slow_caller(pause: Duration, broken: bool) -> Caller {
        Box::new(move || {
            thread::sleep(pause);
            if broken { bail!("refused") } else { Ok(()) }
        })
    }

    #[test]
    fn a_caller_that_cannot_commit_fails_the_slot() {
        // Broken: a slot in which nothing was committed would count, or never end.
        let pause = Duration::from_millis(1);
        let open = |index| Ok(slow_caller(pause, index == 1));
        let result = drive(3, pause, open, |_| bail!("reported as if it had worked"));
        assert_eq!(format!("{:#}", result.unwrap_err()), "caller 1: refused");
    }

    #[test]
    fn commits_of_all_callers_are_counted_in_the_measured_time() {
        // Broken: rates would be of the warm-up, or of one caller.
        let open = |_| Ok(slow_caller(Duration::from_millis(5), false));
        let mut seen = None;
        let report = |summary: &Summary| {
            seen = Some(*summary);
            Ok(())
        };
        drive(4, Duration::from_millis(50), open, report).unwrap();
        let summary = seen.unwrap();
        // 4 callers, at most 10 commits each; a loaded machine may do far fewer.
        assert!((5..=40).contains(&summary.commits), "{summary:?}");
        assert!(summary.p50_us >= 5_000.0, "{summary:?}");
    }
}
