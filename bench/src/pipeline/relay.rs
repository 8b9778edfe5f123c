//! The relay of the bare pipeline: passes each commit to all replicas, and answers when the third
//! of them has acked.

use super::frame::{CALLERS_MAX, CommitId, Cutter};
use super::{ACK_QUORUM, LISTENING, transport};
use crate::callers::say;
use crate::children::exit_with_parent;
use anyhow::{Context, Result};
use bytes::Bytes;
use clap::Args;
use quinn::{Endpoint, RecvStream, SendStream};
use std::cell::RefCell;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::rc::Rc;
use tokio::sync::mpsc::{Receiver, Sender, channel};
use tokio::task::{JoinHandle, LocalSet};

/// Frames that are written to a stream at once: more than come between two wakeups.
const FRAMES_PER_WRITE: usize = 256;

/// Arguments of the relay.
#[derive(Args)]
pub struct RelayArgs {
    /// Directory with the certificate.
    #[arg(long)]
    dir: PathBuf,
    /// Addresses of the replicas.
    #[arg(long = "replica", required = true)]
    replicas: Vec<SocketAddr>,
}

/// Serves until the parent ends.
pub fn run(args: &RelayArgs) -> Result<()> {
    exit_with_parent();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(LocalSet::new().run_until(async {
        let endpoint = transport::endpoint(&args.dir)?;
        let state = Rc::new(RefCell::new(State::default()));
        let mut replicas = Vec::new();
        for &address in &args.replicas {
            let (send, receive) = transport::connect(&endpoint, address).await?;
            replicas.push(writer(send));
            tokio::task::spawn_local(or_exit(read_acks(receive, state.clone())));
        }
        say(&format!("{LISTENING}{}", endpoint.local_addr()?))?;
        accept_clients(&endpoint, replicas.into(), state).await
    }))
}

/// One client at a time: a new one puts an end to the one before.
async fn accept_clients(
    endpoint: &Endpoint,
    replicas: Rc<[Sender<Bytes>]>,
    state: Rc<RefCell<State>>,
) -> Result<()> {
    let mut serving: Option<JoinHandle<()>> = None;
    loop {
        let incoming = endpoint.accept().await.context("the endpoint is closed")?;
        let connection = incoming.await.context("accept a client")?;
        let (send, receive) = connection.accept_bi().await.context("accept a stream")?;
        if let Some(before) = serving.take() {
            before.abort();
        }
        *state.borrow_mut() = State {
            counter: AckCounter::default(),
            client: Some(writer(send)),
        };
        let serve = serve_client(receive, replicas.clone(), state.clone());
        serving = Some(tokio::task::spawn_local(or_exit(serve)));
    }
}

async fn serve_client(
    mut receive: RecvStream,
    replicas: Rc<[Sender<Bytes>]>,
    state: Rc<RefCell<State>>,
) -> Result<()> {
    let mut chunks = [const { Bytes::new() }; transport::CHUNKS_PER_READ];
    let mut cutter = Cutter::default();
    // A client that is done goes away.
    while let Ok(Some(chunks)) = transport::read(&mut receive, &mut chunks).await {
        chunks.iter().for_each(|chunk| cutter.push(chunk));
        while let Some(frame) = cutter.next_frame()? {
            state.borrow_mut().counter.begin(CommitId::of(&frame))?;
            for replica in replicas.iter() {
                replica
                    .try_send(frame.clone())
                    .context("queue a commit for a replica")?;
            }
        }
    }
    Ok(())
}

async fn read_acks(mut receive: RecvStream, state: Rc<RefCell<State>>) -> Result<()> {
    let mut chunks = [const { Bytes::new() }; transport::CHUNKS_PER_READ];
    let mut cutter = Cutter::default();
    while let Some(chunks) = transport::read(&mut receive, &mut chunks).await? {
        chunks.iter().for_each(|chunk| cutter.push(chunk));
        let mut state = state.borrow_mut();
        while let Some(frame) = cutter.next_frame()? {
            let commit = CommitId::of(&frame);
            if !state.counter.ack(commit) {
                continue;
            }
            if let Some(client) = &state.client {
                client
                    .try_send(commit.answer())
                    .context("queue an answer")?;
            }
        }
    }
    Ok(())
}

/// Writes what is queued to a stream, in batches. Every queue has room for a commit of each caller.
fn writer(send: SendStream) -> Sender<Bytes> {
    let (sender, receiver) = channel(CALLERS_MAX);
    tokio::task::spawn_local(or_exit(write_all(send, receiver)));
    sender
}

async fn write_all(mut send: SendStream, mut receiver: Receiver<Bytes>) -> Result<()> {
    let mut batch = Vec::with_capacity(FRAMES_PER_WRITE);
    while receiver.recv_many(&mut batch, FRAMES_PER_WRITE).await > 0 {
        // A client that went away is noticed by its reader.
        if send.write_all_chunks(&mut batch).await.is_err() {
            break;
        }
        batch.clear();
    }
    Ok(())
}

/// A relay that lost a part of itself ends, and with it the slot.
async fn or_exit(task: impl Future<Output = Result<()>>) {
    if let Err(error) = task.await {
        eprintln!("durovfs-bench: pipeline relay: {error:#}");
        std::process::exit(1);
    }
}

#[derive(Default)]
struct State {
    counter: AckCounter,
    client: Option<Sender<Bytes>>,
}

/// Acks of the commit that each caller has on its way.
#[derive(Default)]
struct AckCounter {
    callers: Vec<Open>,
}

#[derive(Default, Clone, Copy)]
struct Open {
    sequence: u64,
    acks: u32,
}

impl AckCounter {
    fn begin(&mut self, commit: CommitId) -> Result<()> {
        let index = commit.caller as usize;
        anyhow::ensure!(
            index < CALLERS_MAX,
            "caller {index} of at most {CALLERS_MAX}"
        );
        if self.callers.len() <= index {
            self.callers.resize(index + 1, Open::default());
        }
        self.callers[index] = Open {
            sequence: commit.sequence,
            acks: 0,
        };
        Ok(())
    }

    /// True for the ack that makes a commit; later ones, and those of earlier commits, do nothing.
    fn ack(&mut self, commit: CommitId) -> bool {
        match self.callers.get_mut(commit.caller as usize) {
            Some(open) if open.sequence == commit.sequence => {
                open.acks += 1;
                open.acks == ACK_QUORUM
            }
            Some(_) | None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_third_ack_answers_and_no_other() {
        // Broken: the pipeline would be measured with fewer syncs than durovfs needs, or more.
        let mut counter = AckCounter::default();
        let commit = |sequence| CommitId {
            caller: 2,
            sequence,
        };
        counter.begin(commit(7)).unwrap();
        let answers: Vec<_> = (0..4).map(|_| counter.ack(commit(7))).collect();
        assert_eq!(answers, [false, false, true, false]);
        // The fifth ack of one commit comes when the next is on its way.
        counter.begin(commit(8)).unwrap();
        let acks = [7, 8, 8, 8].map(|sequence| counter.ack(commit(sequence)));
        assert_eq!(acks, [false, false, false, true]);
        assert!(!counter.ack(CommitId {
            caller: 9,
            sequence: 8
        }));
    }
}
