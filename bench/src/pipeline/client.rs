//! The callers of the bare pipeline, on one stream of one connection.
//!
//! Threads: as in an application that uses SQLite, each caller is a thread that hands its commit to
//! the runtime's thread and sleeps until the answer. Loop: no threads but the runtime's, the next
//! commit of a caller leaves in the turn that read its last answer; no SQLite application can do
//! that, it shows what the handing over costs.

use super::frame::{ANSWER_BYTES, CALLERS_MAX, CommitId, Cutter, FRAME_BYTES_MAX, HEADER_BYTES};
use super::transport;
use crate::callers::{self, Caller, MEASURING, say};
use crate::children::wait_for_parent;
use crate::sample::{Latencies, Summary};
use anyhow::{Context, Result, bail};
use bytes::Bytes;
use clap::{Args, ValueEnum};
use quinn::{RecvStream, SendStream};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::{self, Thread};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::mpsc::{Receiver, Sender, channel};

/// A caller that waits so long gives up: the pipeline is broken.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Time before the loop is measured: congestion windows grow, caches fill.
const LOOP_WARM_UP: Duration = Duration::from_millis(300);
/// Commits that are written to the stream at once.
const COMMITS_PER_WRITE: usize = 256;

/// Arguments of a client.
#[derive(Args)]
pub struct ClientArgs {
    /// Directory with the certificate.
    #[arg(long)]
    dir: PathBuf,
    /// Address of the relay.
    #[arg(long)]
    relay: SocketAddr,
    /// How many callers.
    #[arg(long)]
    callers: usize,
    /// Measured time.
    #[arg(long)]
    seconds: f64,
    /// Bytes of a commit, all in all.
    #[arg(long)]
    bytes: usize,
    /// What the callers are.
    #[arg(long, value_enum)]
    kind: ClientKind,
}

/// What the callers are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ClientKind {
    /// A thread each.
    Threads,
    /// All in one loop.
    Loop,
}

/// Runs the callers, and prints what they saw.
pub fn run(args: &ClientArgs) -> Result<()> {
    if !(1..=CALLERS_MAX).contains(&args.callers) {
        bail!("{} callers: 1 to {CALLERS_MAX} are possible", args.callers);
    }
    if !(HEADER_BYTES..=FRAME_BYTES_MAX).contains(&args.bytes) {
        bail!(
            "{} bytes: {HEADER_BYTES} to {FRAME_BYTES_MAX} are possible",
            args.bytes
        );
    }
    let commits = Commits {
        // Later runs have higher numbers: a late ack of an earlier client's commit meets none of
        // this client's.
        first_sequence: SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos() as u64,
        payload: Bytes::from(vec![0x5a; args.bytes - HEADER_BYTES]),
    };
    match args.kind {
        ClientKind::Threads => run_threads(args, &commits),
        ClientKind::Loop => run_loop(args, &commits),
    }
}

/// The bytes of the commits.
#[derive(Clone)]
struct Commits {
    first_sequence: u64,
    payload: Bytes,
}

impl Commits {
    fn frame(&self, caller: usize, sequence: u64) -> [Bytes; 2] {
        let commit = CommitId {
            caller: caller as u32,
            sequence,
        };
        [commit.header(self.payload.len()), self.payload.clone()]
    }
}

/// Where a caller's thread sleeps.
#[derive(Default)]
struct Seat {
    thread: OnceLock<Thread>,
    answered: AtomicU64,
}

fn run_threads(args: &ClientArgs, commits: &Commits) -> Result<()> {
    let seats: Arc<Vec<Seat>> = Arc::new((0..args.callers).map(|_| Seat::default()).collect());
    // Each caller has one commit on its way.
    let (sender, receiver) = channel(args.callers);
    start_io_thread(args, receiver, seats.clone())?;
    let duration = Duration::from_secs_f64(args.seconds);
    let open = |index| {
        Ok(thread_caller(
            index,
            commits.clone(),
            sender.clone(),
            seats.clone(),
        ))
    };
    callers::drive(args.callers, duration, open, report)
}

fn thread_caller(
    index: usize,
    commits: Commits,
    sender: Sender<[Bytes; 2]>,
    seats: Arc<Vec<Seat>>,
) -> Caller {
    let mut sequence = commits.first_sequence;
    seats[index].thread.get_or_init(thread::current);
    Box::new(move || {
        sequence += 1;
        sender
            .try_send(commits.frame(index, sequence))
            .context("queue a commit")?;
        let began = Instant::now();
        while seats[index].answered.load(Ordering::Acquire) != sequence {
            thread::park_timeout(ANSWER_TIMEOUT);
            if began.elapsed() >= ANSWER_TIMEOUT {
                bail!("no answer within {} s", ANSWER_TIMEOUT.as_secs());
            }
        }
        Ok(())
    })
}

fn start_io_thread(
    args: &ClientArgs,
    receiver: Receiver<[Bytes; 2]>,
    seats: Arc<Vec<Seat>>,
) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let (dir, relay) = (args.dir.clone(), args.relay);
    thread::spawn(move || {
        let result = runtime.block_on(async {
            let endpoint = transport::endpoint(&dir)?;
            let (send, receive) = transport::connect(&endpoint, relay).await?;
            tokio::try_join!(write_commits(send, receiver), wake_callers(receive, &seats))
        });
        if let Err(error) = result {
            eprintln!("durovfs-bench: pipeline client: {error:#}");
            std::process::exit(1);
        }
    });
    Ok(())
}

async fn write_commits(mut send: SendStream, mut receiver: Receiver<[Bytes; 2]>) -> Result<()> {
    let mut batch = Vec::with_capacity(COMMITS_PER_WRITE);
    while receiver.recv_many(&mut batch, COMMITS_PER_WRITE).await > 0 {
        let mut chunks: Vec<Bytes> = batch.drain(..).flatten().collect();
        send.write_all_chunks(&mut chunks)
            .await
            .context("send commits")?;
    }
    Ok(())
}

async fn wake_callers(mut receive: RecvStream, seats: &[Seat]) -> Result<()> {
    let mut chunks = [const { Bytes::new() }; transport::CHUNKS_PER_READ];
    let mut cutter = Cutter::default();
    while let Some(chunks) = transport::read(&mut receive, &mut chunks).await? {
        chunks.iter().for_each(|chunk| cutter.push(chunk));
        while let Some(frame) = cutter.next_frame()? {
            let answer = CommitId::of(&frame);
            let seat = seats
                .get(answer.caller as usize)
                .context("answer to nobody")?;
            seat.answered.store(answer.sequence, Ordering::Release);
            if let Some(thread) = seat.thread.get() {
                thread.unpark();
            }
        }
    }
    bail!("the relay closed the stream")
}

fn run_loop(args: &ClientArgs, commits: &Commits) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let endpoint = transport::endpoint(&args.dir)?;
        let (send, receive) = transport::connect(&endpoint, args.relay).await?;
        let mut callers = Loop::start(args.callers, commits.clone(), send, receive).await?;
        callers.run_for(LOOP_WARM_UP).await?;
        say(MEASURING)?;
        let summary = callers
            .run_for(Duration::from_secs_f64(args.seconds))
            .await?;
        report(&summary)
    })
}

/// All callers in one loop.
struct Loop {
    commits: Commits,
    send: SendStream,
    receive: RecvStream,
    cutter: Cutter,
    last_sequence: u64,
    began: Vec<Instant>,
}

impl Loop {
    async fn start(
        count: usize,
        commits: Commits,
        mut send: SendStream,
        receive: RecvStream,
    ) -> Result<Self> {
        let last_sequence = commits.first_sequence;
        let began = vec![Instant::now(); count];
        let mut batch: Vec<Bytes> = (0..count)
            .flat_map(|caller| commits.frame(caller, last_sequence))
            .collect();
        send.write_all_chunks(&mut batch)
            .await
            .context("send the first commits")?;
        Ok(Self {
            commits,
            send,
            receive,
            cutter: Cutter::default(),
            last_sequence,
            began,
        })
    }

    async fn run_for(&mut self, duration: Duration) -> Result<Summary> {
        let mut latencies = Latencies::new()?;
        let mut chunks = [const { Bytes::new() }; transport::CHUNKS_PER_READ];
        let mut batch = Vec::new();
        let began = Instant::now();
        while began.elapsed() < duration {
            let read = transport::read(&mut self.receive, &mut chunks);
            let read = tokio::time::timeout(ANSWER_TIMEOUT, read)
                .await
                .context("no answer")??;
            read.context("the relay closed the stream")?
                .iter()
                .for_each(|chunk| self.cutter.push(chunk));
            let now = Instant::now();
            while let Some(frame) = self.cutter.next_frame()? {
                let caller = CommitId::of(&frame).caller as usize;
                let began = self.began.get_mut(caller).context("answer to nobody")?;
                latencies.record(now - *began);
                *began = now;
                self.last_sequence += 1;
                batch.extend(self.commits.frame(caller, self.last_sequence));
            }
            self.send
                .write_all_chunks(&mut batch)
                .await
                .context("send commits")?;
            batch.clear();
        }
        Ok(latencies.summary(began.elapsed()))
    }
}

/// Prints what was seen, and lets the parent look at this process before it ends.
fn report(summary: &Summary) -> Result<()> {
    say(&serde_json::to_string(summary).context("encode the summary")?)?;
    wait_for_parent()
}

const _: () = assert!(ANSWER_BYTES >= HEADER_BYTES);
