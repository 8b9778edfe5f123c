//! A run: all systems in turn, round after round.

use crate::callers::MEASURING;
use crate::children::Child;
use crate::cluster::{Cluster, Products};
use crate::machine::Machine;
use crate::pipeline::Pipeline;
use crate::pipeline::client::ClientKind;
use crate::report::{Report, Slots};
use crate::sample::{Sample, Summary};
use crate::sqlite;
use crate::usage::{self, CLIENT, MIDDLE, OTHERS, REPLICAS, Roles, Snapshot};
use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Opening all databases and warming up takes no longer, also on a busy machine.
const WARM_TIMEOUT: Duration = Duration::from_secs(120);
/// What a slot may take above its measured time: a last commit in trouble, counting the rows.
const REPORT_TIMEOUT: Duration = Duration::from_secs(60);
/// A client has nothing to do after its report but to close its databases.
const END_TIMEOUT: Duration = Duration::from_secs(60);
/// Bytes that durovfs's message and part headers add to a commit's WAL bytes, roughly.
const MESSAGE_OVERHEAD_BYTES: usize = 64;

/// Options of a run.
#[derive(Args)]
pub struct RunArgs {
    /// Rounds; the results are medians over them.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Measured seconds of each system in each round.
    #[arg(long, default_value_t = 3.0, value_parser = seconds)]
    seconds: f64,
    /// Numbers of databases, each with one caller.
    #[arg(long, value_delimiter = ',', default_value = "1,64")]
    callers: Vec<usize>,
    /// Longest wait before each measurement for the machine to be quiet, in seconds.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(0..=600))]
    settle: u64,
    /// What is measured.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = System::ALL)]
    systems: Vec<System>,
    /// Where the run's files go, in a directory of their own: on the disk that is to be measured.
    #[arg(long, default_value = "/var/tmp")]
    dir: PathBuf,
    /// Directory of durovfs and libdurovfs; default: where this program is.
    #[arg(long)]
    products: Option<PathBuf>,
    /// Prints JSON, with every sample.
    #[arg(long)]
    json: bool,
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(seconds) if (0.01..=3600.0).contains(&seconds) => Ok(seconds),
        Ok(_) => Err("between 0.01 and 3600".to_owned()),
        Err(_) => Err("not a number".to_owned()),
    }
}

/// What can be measured, in the order of each round.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum System {
    /// SQLite alone, WAL, synchronous=FULL.
    Plain,
    /// The bare pipeline, its callers threads.
    Pipeline,
    /// The bare pipeline, its callers one loop.
    PipelineLoop,
    /// SQLite with the extension, in a cluster of one primary and five replicas.
    Durovfs,
}

impl System {
    const ALL: [Self; 4] = [
        Self::Plain,
        Self::Pipeline,
        Self::PipelineLoop,
        Self::Durovfs,
    ];
}

/// Measures and prints.
pub fn run(args: &RunArgs) -> Result<()> {
    let dir = tempfile::Builder::new()
        .prefix("durovfs-bench-")
        .tempdir_in(&args.dir);
    let dir = dir.with_context(|| format!("make a directory in {:?}", args.dir))?;
    let machine = Machine::look(dir.path())?;
    let commit_bytes = sqlite::wal_bytes_per_commit(dir.path())? + MESSAGE_OVERHEAD_BYTES;
    let bench = Bench::start(args, dir.path(), machine.cores, commit_bytes)?;
    let mut slots = Slots::new();
    for round in 1..=args.rounds {
        for &callers in &args.callers {
            for &system in &bench.systems {
                let sample = bench
                    .measure(system, callers)
                    .with_context(|| format!("round {round}, {system:?} with {callers} callers"))?;
                eprintln!(
                    "round {round}/{}: {system:?}, {callers} callers: p50 {:.0} µs, {:.0}/s",
                    args.rounds, sample.summary.p50_us, sample.rate
                );
                slots
                    .entry(callers)
                    .or_default()
                    .entry(system)
                    .or_default()
                    .push(sample);
            }
        }
    }
    bench.stop()?;
    let report = Report::new(machine, args.rounds, args.seconds, commit_bytes, &slots);
    if args.json {
        println!(
            "{}",
            serde_json::to_string_pretty(&report).context("encode the report")?
        );
    } else {
        print!("{}", report.text());
    }
    Ok(())
}

/// All that runs during the whole run.
struct Bench<'a> {
    dir: &'a Path,
    program: PathBuf,
    systems: Vec<System>,
    seconds: f64,
    settle: Duration,
    cores: usize,
    commit_bytes: usize,
    pipeline: Option<Pipeline>,
    durovfs: Option<(Cluster, Products)>,
}

impl<'a> Bench<'a> {
    fn start(args: &RunArgs, dir: &'a Path, cores: usize, commit_bytes: usize) -> Result<Self> {
        let program = std::env::current_exe().context("find this program")?;
        let mut systems = args.systems.clone();
        systems.sort();
        systems.dedup();
        let has = |wanted: &[System]| systems.iter().any(|system| wanted.contains(system));
        let durovfs = match has(&[System::Durovfs]) {
            true => {
                let beside = program.parent().context("find this program's directory")?;
                let products = Products::find(args.products.as_deref().unwrap_or(beside))?;
                Some((Cluster::start(&products, &dir.join("cluster"))?, products))
            }
            false => None,
        };
        let pipeline = match has(&[System::Pipeline, System::PipelineLoop]) {
            true => Some(Pipeline::start(&program, dir)?),
            false => None,
        };
        let (seconds, settle) = (args.seconds, Duration::from_secs(args.settle));
        Ok(Self {
            dir,
            program,
            systems,
            seconds,
            settle,
            cores,
            commit_bytes,
            pipeline,
            durovfs,
        })
    }

    fn stop(self) -> Result<()> {
        self.durovfs.map_or(Ok(()), |(cluster, _)| cluster.stop())
    }

    /// One slot.
    fn measure(&self, system: System, callers: usize) -> Result<Sample> {
        usage::wait_for_quiet(self.cores, self.settle)?;
        let client = Child::spawn("client", &mut self.client(system, callers)?)?;
        let line = client.line(WARM_TIMEOUT)?;
        let roles = self.roles(system, client.id())?;
        let before = Snapshot::take(&roles)?;
        ensure!(
            line == MEASURING,
            "the client says {line:?}, not {MEASURING:?}"
        );
        let line = client.line(Duration::from_secs_f64(self.seconds) + REPORT_TIMEOUT)?;
        let after = Snapshot::take(&roles)?;
        let summary: Summary =
            serde_json::from_str(&line).with_context(|| format!("the client says {line:?}"))?;
        ensure!(summary.commits > 0, "no commit was answered");
        client.finish(END_TIMEOUT)?;
        Ok(Sample {
            rate: summary.rate(),
            per_commit: after.per_commit_since(&before, summary.commits),
            foreign_cpu: after.foreign_since(&before, self.cores),
            summary,
        })
    }

    fn client(&self, system: System, callers: usize) -> Result<Command> {
        let mut args = vec![
            format!("--callers={callers}"),
            format!("--seconds={}", self.seconds),
        ];
        let kind = match system {
            System::Plain => return Ok(self.sqlite_client("plain", args)),
            System::Durovfs => {
                let (cluster, products) = self.durovfs.as_ref().context("no cluster")?;
                args.push(format!("--extension={}", products.extension.display()));
                let mut command = self.sqlite_client("durovfs", args);
                command.env("DUROVFS_CONFIG", cluster.client_config());
                return Ok(command);
            }
            System::Pipeline => ClientKind::Threads,
            System::PipelineLoop => ClientKind::Loop,
        };
        let kind = kind.to_possible_value().context("a kind has a name")?;
        args.push(format!("--kind={}", kind.get_name()));
        args.push(format!("--bytes={}", self.commit_bytes));
        let pipeline = self.pipeline.as_ref().context("no pipeline")?;
        Ok(pipeline.client(&self.program, self.dir, &args))
    }

    /// Each system has its own files, which it uses again in each round.
    fn sqlite_client(&self, databases: &str, args: Vec<String>) -> Command {
        let mut command = Command::new(&self.program);
        command
            .arg("sqlite-client")
            .arg("--dir")
            .arg(self.dir.join(databases))
            .args(args);
        command
    }

    /// Who is who in a slot; all other processes of the run are others.
    fn roles(&self, system: System, client: u32) -> Result<Roles> {
        let mut roles = Roles::from([(CLIENT, vec![client]), (OTHERS, vec![std::process::id()])]);
        let mut add = |is_measured: bool, role, processes: Vec<u32>| {
            roles
                .entry(if is_measured { role } else { OTHERS })
                .or_default()
                .extend(processes);
        };
        if let Some(pipeline) = &self.pipeline {
            let is_measured = matches!(system, System::Pipeline | System::PipelineLoop);
            add(is_measured, MIDDLE, vec![pipeline.relay_id()]);
            add(is_measured, REPLICAS, pipeline.replica_ids());
        }
        if let Some((cluster, _)) = &self.durovfs {
            let is_measured = system == System::Durovfs;
            add(is_measured, MIDDLE, vec![cluster.primary_id()?]);
            add(is_measured, REPLICAS, cluster.replica_ids()?);
            add(false, OTHERS, vec![cluster.dev_id()]);
        }
        Ok(roles)
    }
}
