//! The daemon: one sidecar, as primary of some databases and replica of others.
//!
//! One actor, [`node::Node`], owns every state machine and runs on one thread; the tasks around it
//! move frames and report events. What the messages mean is in `quorum`; what the disk holds is in
//! `journal`. Nothing in here knows the command line.

mod bookmark;
mod bulk;
mod copies;
mod crowding;
mod epoch_start;
mod event;
mod feed;
mod members;
mod node;
mod opening;
mod orphans;
mod outbox;
mod peers;
mod primary;
mod primary_effects;
mod read_log;
mod replica;
mod requests;
mod scrub;
mod server;
mod settled;
mod status;
mod streaming;
mod uploader;

use crate::config::SidecarConfig;
use anyhow::Context;
use durovfs_archive::store::Store;
use durovfs_journal::{Journal, JournalOptions};
use durovfs_link::{Endpoint, Identity, Profile};
use event::{Event, EventSender, JournalEvent};
use node::{Node, NodeParts};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

/// Events handled per wake-up: enough that all that one group commit answers is taken at once,
/// few enough that the timer is not starved.
const EVENT_BATCH: usize = 512;
/// Events that network readers may have queued; beyond, they wait and QUIC slows the peer down.
const EVENT_QUEUE: usize = 4096;
/// Resolution of deadlines, heartbeats and upload thresholds.
const TICK: Duration = Duration::from_millis(50);

/// What the last answers have to leave the sockets in.
const LAST_ANSWERS: Duration = Duration::from_millis(100);

/// Runs a sidecar until it is told to stop (SIGTERM or SIGINT).
///
/// # Errors
/// When the configuration cannot be carried out (files, certificates, address, journal), or the
/// open chunk could not be uploaded at the end.
pub async fn run(config: SidecarConfig) -> anyhow::Result<()> {
    tokio::task::LocalSet::new()
        .run_until(run_local(config))
        .await
}

async fn run_local(config: SidecarConfig) -> anyhow::Result<()> {
    let identity = Identity::load(&config.tls.ca, &config.tls.certificate, &config.tls.key)
        .context("load the node's certificate")?;
    let (primary_journal, primary_states) = open_journal(&config, "primary-journal", false)?;
    let (replica_journal, replica_states) = open_journal(&config, "journal", true)?;
    let store = open_store(&config)?;
    let endpoint = Rc::new(
        Endpoint::bind(config.listen, &identity, Profile::Auto)
            .with_context(|| format!("listen on {}", config.listen))?,
    );
    let (events, mut event_queue) = mpsc::channel(EVENT_QUEUE);
    let (journal_events, mut journal_queue) = mpsc::unbounded_channel();
    let stop = stop_signal()?;
    tokio::pin!(stop);
    let events = EventSender::new(events);
    scrub::spawn(
        [&primary_journal, &replica_journal].map(Journal::clone),
        config.journal.scrub_interval,
    )?;
    server::spawn_accept(Rc::clone(&endpoint), events.clone());
    let copies = copies::Copies::start(&config, &replica_journal)?;
    let mut node = Node::new(NodeParts {
        config: Rc::new(config),
        endpoint: Rc::clone(&endpoint),
        events,
        journal_events,
        primary_journal,
        replica_journal,
        store,
        copies,
    })?;
    durovfs_archive::chunk::prepare_scratch(&node.scratch_folder())
        .with_context(|| format!("prepare {}", node.scratch_folder().display()))?;
    node.resume(primary_states, replica_states);
    tracing::info!(node = %node.name(), address = %endpoint.local_addr()?, "sidecar is ready");

    let mut ticker = tokio::time::interval(TICK);
    ticker.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut batch: Vec<Event> = Vec::with_capacity(EVENT_BATCH);
    let mut journal_batch: Vec<JournalEvent> = Vec::with_capacity(EVENT_BATCH);
    loop {
        tokio::select! {
            biased;
            _ = journal_queue.recv_many(&mut journal_batch, EVENT_BATCH) => {}
            _ = event_queue.recv_many(&mut batch, EVENT_BATCH) => {}
            _ = ticker.tick() => node.handle_tick(),
            () = &mut stop, if !node.is_stopping() => node.begin_stop(),
        }
        journal_batch
            .drain(..)
            .for_each(|event| node.handle_journal_event(event));
        batch.drain(..).for_each(|event| node.handle_event(event));
        if node.is_stopped() {
            break;
        }
    }
    let unfinished = node.finish();
    // The outcomes of the last commits leave before their connections are closed.
    tokio::time::sleep(LAST_ANSWERS).await;
    endpoint.close("the sidecar stops");
    anyhow::ensure!(
        unfinished.is_empty(),
        "stopped, but {}",
        unfinished.join("; ")
    );
    Ok(())
}

fn open_journal(
    config: &SidecarConfig,
    folder: &str,
    sync: bool,
) -> anyhow::Result<(Journal, Vec<durovfs_journal::DatabaseState>)> {
    let directory = config.data.join(folder);
    create_private_directory(&directory)?;
    Journal::open(JournalOptions {
        directory: directory.clone(),
        sync,
        segment_bytes: config.journal.segment_bytes,
        limit_bytes: config.journal.limit_bytes,
        mend: true,
    })
    .with_context(|| format!("open the journal in {}", directory.display()))
}

fn create_private_directory(directory: &Path) -> anyhow::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .with_context(|| format!("create {}", directory.display()))
}

fn open_store(config: &SidecarConfig) -> anyhow::Result<Option<Arc<dyn Store>>> {
    let Some(archive) = &config.archive else {
        return Ok(None);
    };
    let store = durovfs_archive::store::open(&archive.url, &durovfs_archive::S3Options::default())
        .with_context(|| format!("open the archive {}", archive.url))?;
    Ok(Some(store))
}

/// Resolves when the process is asked to stop.
fn stop_signal() -> anyhow::Result<impl Future<Output = ()>> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}
