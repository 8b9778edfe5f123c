//! A replica of the bare pipeline: what has come since the last look is one write, one `fdatasync`
//! and one batch of acks.

use super::frame::{CommitId, Cutter};
use super::{LISTENING, transport};
use crate::callers::say;
use crate::children::exit_with_parent;
use anyhow::{Context, Result};
use bytes::Bytes;
use clap::Args;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Written again from its start when full: only the pace of the disk matters.
const JOURNAL_BYTES: u64 = 32 << 20;
/// Zeros are written in pieces of this size.
const ZEROS_BYTES: usize = 1 << 20;

/// Arguments of a replica.
#[derive(Args)]
pub struct ReplicaArgs {
    /// Directory with the certificate.
    #[arg(long)]
    dir: PathBuf,
    /// Its journal.
    #[arg(long)]
    journal: PathBuf,
}

/// Serves until the parent ends.
pub fn run(args: &ReplicaArgs) -> Result<()> {
    exit_with_parent();
    let mut journal = Journal::create(&args.journal)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let endpoint = transport::endpoint(&args.dir)?;
        say(&format!("{LISTENING}{}", endpoint.local_addr()?))?;
        // One relay, for as long as both live.
        let incoming = endpoint.accept().await.context("the endpoint is closed")?;
        let connection = incoming.await.context("accept the relay")?;
        let (send, receive) = connection.accept_bi().await.context("accept a stream")?;
        serve(&mut journal, send, receive).await
    })
}

async fn serve(
    journal: &mut Journal,
    mut send: quinn::SendStream,
    mut receive: quinn::RecvStream,
) -> Result<()> {
    let mut chunks = [const { Bytes::new() }; transport::CHUNKS_PER_READ];
    let mut cutter = Cutter::default();
    let (mut batch, mut acks) = (Vec::new(), Vec::new());
    while let Some(chunks) = transport::read(&mut receive, &mut chunks).await? {
        chunks.iter().for_each(|chunk| cutter.push(chunk));
        while let Some(frame) = cutter.next_frame()? {
            batch.extend_from_slice(&frame);
            acks.extend_from_slice(&CommitId::of(&frame).answer());
        }
        if batch.is_empty() {
            continue;
        }
        // On this thread: with a thread of its own the sync costs two wakeups more.
        journal.append_and_sync(&batch)?;
        send.write_all(&acks).await.context("send acks")?;
        batch.clear();
        acks.clear();
    }
    Ok(())
}

/// A file that was written once before, so that a sync has no sizes or extents to make durable.
struct Journal {
    file: File,
    offset: u64,
}

impl Journal {
    fn create(path: &Path) -> Result<Self> {
        let mut file = File::create_new(path).with_context(|| format!("create {path:?}"))?;
        let zeros = vec![0; ZEROS_BYTES];
        for _ in 0..JOURNAL_BYTES / ZEROS_BYTES as u64 {
            file.write_all(&zeros).context("prepare the journal")?;
        }
        file.sync_all().context("prepare the journal")?;
        Ok(Self { file, offset: 0 })
    }

    fn append_and_sync(&mut self, batch: &[u8]) -> Result<()> {
        if self.offset + batch.len() as u64 > JOURNAL_BYTES {
            self.offset = 0;
        }
        self.file
            .write_all_at(batch, self.offset)
            .context("write to the journal")?;
        self.offset += batch.len() as u64;
        self.file.sync_data().context("sync the journal")
    }
}
