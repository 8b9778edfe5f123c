//! What processes use, and what the machine has left: read from /proc.

use crate::sample::PerCommit;
use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

/// Unit of times in /proc, fixed by Linux's interface to user space.
const TICKS_PER_SECOND: f64 = 100.0;
/// Below this share of the processors the machine counts as quiet.
const QUIET_SHARE: f64 = 0.06;
/// How long the processors are looked at for that.
const QUIET_WINDOW: Duration = Duration::from_millis(250);
/// Role of the processes that commit.
pub const CLIENT: &str = "client";
/// Role of the process in the middle: the relay, or the primary's sidecar.
pub const MIDDLE: &str = "relay";
/// Role of the processes that make commits durable.
pub const REPLICAS: &str = "replicas";
/// Role of processes of the run that have no part in the slot.
pub const OTHERS: &str = "others";

/// The run's processes, by role.
pub type Roles = BTreeMap<&'static str, Vec<u32>>;

/// What was used until a moment.
#[derive(Debug, Clone, Default, PartialEq)]
struct Used {
    cpu_seconds: f64,
    switches: u64,
    disk_bytes: u64,
}

/// A look at the machine and at some of its processes.
pub struct Snapshot {
    at: Instant,
    busy_seconds: f64,
    roles: BTreeMap<&'static str, Used>,
}

impl Snapshot {
    /// Looks.
    ///
    /// # Errors
    /// When one of the processes is gone.
    pub fn take(roles: &Roles) -> Result<Self> {
        let mut used = BTreeMap::new();
        for (&role, processes) in roles {
            let sum: &mut Used = used.entry(role).or_default();
            for &process in processes {
                let one = process_usage(process).with_context(|| format!("{role} {process}"))?;
                sum.cpu_seconds += one.cpu_seconds;
                sum.switches += one.switches;
                sum.disk_bytes += one.disk_bytes;
            }
        }
        Ok(Self {
            at: Instant::now(),
            busy_seconds: busy_seconds()?,
            roles: used,
        })
    }

    /// What each role used from an earlier snapshot to this one, for each of `commits`.
    pub fn per_commit_since(&self, earlier: &Self, commits: u64) -> BTreeMap<String, PerCommit> {
        let per = |amount: f64| amount / commits.max(1) as f64;
        let since = |(role, now): (&&'static str, &Used)| {
            let before = earlier.roles.get(role).cloned().unwrap_or_default();
            let one = PerCommit {
                cpu_us: per((now.cpu_seconds - before.cpu_seconds) * 1e6),
                switches: per(now.switches.saturating_sub(before.switches) as f64),
                disk_bytes: per(now.disk_bytes.saturating_sub(before.disk_bytes) as f64),
            };
            ((*role).to_owned(), one)
        };
        self.roles
            .iter()
            .filter(|(role, _)| **role != OTHERS)
            .map(since)
            .collect()
    }

    /// Share of all processors that others had, from an earlier snapshot to this one.
    pub fn foreign_since(&self, earlier: &Self, cores: usize) -> f64 {
        let sum = |snapshot: &Self| {
            snapshot
                .roles
                .values()
                .map(|used| used.cpu_seconds)
                .sum::<f64>()
        };
        let foreign = (self.busy_seconds - earlier.busy_seconds) - (sum(self) - sum(earlier));
        let available = (self.at - earlier.at).as_secs_f64() * cores as f64;
        // Times have a grain of a tick; a difference may come out below nothing.
        (foreign / available).clamp(0.0, 1.0)
    }
}

/// Waits until nothing much runs: not our children of the slot before, nor anybody else.
/// A machine that is not quiet after `timeout` is measured as it is; the report says how busy it
/// was.
pub fn wait_for_quiet(cores: usize, timeout: Duration) -> Result<()> {
    let end = Instant::now() + timeout;
    while Instant::now() < end {
        let (busy, began) = (busy_seconds()?, Instant::now());
        std::thread::sleep(QUIET_WINDOW);
        let available = began.elapsed().as_secs_f64() * cores as f64;
        if (busy_seconds()? - busy) / available < QUIET_SHARE {
            break;
        }
    }
    Ok(())
}

fn process_usage(process: u32) -> Result<Used> {
    let read = |name: &str| {
        let path = format!("/proc/{process}/{name}");
        fs::read_to_string(&path).with_context(|| format!("read {path}"))
    };
    let mut switches = 0;
    for task in fs::read_dir(format!("/proc/{process}/task")).context("list threads")? {
        let path = task.context("list threads")?.path().join("status");
        // A thread that ended since the listing takes its count with it.
        let Ok(status) = fs::read_to_string(path) else {
            continue;
        };
        switches += field(&status, "voluntary_ctxt_switches:").unwrap_or(0);
        switches += field(&status, "nonvoluntary_ctxt_switches:").unwrap_or(0);
    }
    Ok(Used {
        cpu_seconds: process_ticks(&read("stat")?).context("parse stat")? / TICKS_PER_SECOND,
        switches,
        disk_bytes: field(&read("io")?, "write_bytes:").context("parse io")?,
    })
}

/// User and system time. The fields are counted from the end of the program's name, which may hold
/// anything.
fn process_ticks(stat: &str) -> Option<f64> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace().skip(11);
    let user: f64 = fields.next()?.parse().ok()?;
    let system: f64 = fields.next()?.parse().ok()?;
    Some(user + system)
}

/// The number after a name at the start of a line.
fn field(text: &str, name: &str) -> Option<u64> {
    text.lines()
        .find_map(|line| line.strip_prefix(name))?
        .trim()
        .parse()
        .ok()
}

fn busy_seconds() -> Result<f64> {
    let stat = fs::read_to_string("/proc/stat").context("read /proc/stat")?;
    Ok(busy_ticks(&stat).context("parse /proc/stat")? / TICKS_PER_SECOND)
}

/// All that is neither idle nor waiting for a disk; stolen time is somebody's, too.
fn busy_ticks(stat: &str) -> Option<f64> {
    let line = stat.lines().find_map(|line| line.strip_prefix("cpu "))?;
    let ticks: Vec<f64> = line
        .split_whitespace()
        .map_while(|n| n.parse().ok())
        .collect();
    match ticks[..] {
        [user, nice, system, _idle, _wait, irq, softirq, steal, ..] => {
            Some(user + nice + system + irq + softirq + steal)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_found_behind_any_program_name() {
        // Broken: a name with a blank or a bracket would shift the fields: a wrong profile.
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194560 100 0 0 0 12 30 0 0 20 0 1 0 5 6 7";
        assert_eq!(process_ticks(stat), Some(42.0));
    }

    #[test]
    fn waiting_for_a_disk_is_not_work() {
        // Broken: a benchmark that waits for fdatasync all the time would call the machine busy.
        let stat = "cpu  1 2 4 1000 500 8 16 32 0 0\ncpu0 9 9 9 9 9 9 9 9 9 9\n";
        assert_eq!(busy_ticks(stat), Some(63.0));
    }

    #[test]
    fn what_others_use_is_all_that_the_run_does_not() {
        // Broken: a busy machine would pass for a quiet one, and its numbers be believed.
        let at = Instant::now();
        let look = |seconds, busy_seconds, cpu_seconds| Snapshot {
            at: at + Duration::from_secs(seconds),
            busy_seconds,
            roles: [(
                CLIENT,
                Used {
                    cpu_seconds,
                    switches: 10 * seconds,
                    disk_bytes: 0,
                },
            )]
            .into(),
        };
        let (before, after) = (look(0, 50.0, 5.0), look(10, 58.0, 11.0));
        assert!((after.foreign_since(&before, 2) - 0.1).abs() < 1e-9);
        let per_commit = after.per_commit_since(&before, 100);
        assert_eq!(per_commit[CLIENT].cpu_us, 60_000.0);
        assert_eq!(per_commit[CLIENT].switches, 1.0);
    }

    #[test]
    fn this_process_is_seen() {
        // Broken: /proc is read wrongly, and each profile is empty.
        let before = process_usage(std::process::id()).unwrap();
        let began = Instant::now();
        while began.elapsed() < Duration::from_millis(100) {
            std::hint::black_box(began.elapsed());
        }
        let after = process_usage(std::process::id()).unwrap();
        assert!(
            after.cpu_seconds - before.cpu_seconds >= 0.02,
            "{before:?} {after:?}"
        );
    }
}
