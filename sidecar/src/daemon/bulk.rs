//! Long transfers of entries, each a task with a stream of its own: catching up, recovery, reading
//! the log. One part is in memory at a time; the disk is read on a blocking thread.

use super::event::{Event, EventSender, JournalEvent};
use super::outbox::Outbox;
use durovfs_journal::{Journal, JournalError, Record};
use durovfs_link::Connection;
use durovfs_wire::peer::{PrimaryMessage, ReplicaMessage};
use durovfs_wire::{DatabaseId, EntryPart, Epoch, Frame, LogPosition, Lsn, NodeName, PartHeader};
use std::rc::Rc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

/// Parts that the reading thread may be ahead of the network: one being sent, one ready.
const PARTS_AHEAD: usize = 2;
/// How often a transfer of a large entry tells that it moves.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(500);

/// Reads entries on a blocking thread.
pub fn read_parts(
    journal: &Journal,
    database: DatabaseId,
    first_lsn: Lsn,
    last_lsn: Lsn,
) -> mpsc::Receiver<Result<EntryPart, JournalError>> {
    let (sender, receiver) = mpsc::channel(PARTS_AHEAD);
    let journal = journal.clone();
    tokio::task::spawn_blocking(move || match journal.parts(database, first_lsn, last_lsn) {
        Err(error) => drop(sender.blocking_send(Err(error))),
        Ok(parts) => {
            for part in parts {
                if sender.blocking_send(part).is_err() {
                    return; // the transfer was given up
                }
            }
        }
    });
    receiver
}

/// What a bulk feed sends, and as whom.
pub struct BulkFeed {
    pub database: DatabaseId,
    pub node: NodeName,
    pub feed: u64,
    pub generation: u32,
    pub epoch: Epoch,
    pub previous: LogPosition,
    pub last_lsn: Lsn,
    pub commit_lsn: Lsn,
    pub archive_lsn: Lsn,
}

/// Sends the entries after `previous` up to `last_lsn` to a replica, then reports.
pub fn spawn_feed(job: BulkFeed, journal: &Journal, link: Rc<Connection>, events: EventSender) {
    let journal = journal.clone();
    tokio::task::spawn_local(async move {
        let (database, node, feed) = (job.database, job.node.clone(), job.feed);
        let result = feed_entries(job, &journal, &link, &events).await;
        events
            .send(Event::BulkSent {
                database,
                node,
                feed,
                result,
            })
            .await;
    });
}

async fn feed_entries(
    job: BulkFeed,
    journal: &Journal,
    link: &Connection,
    events: &EventSender,
) -> Result<LogPosition, String> {
    let (mut sender, _receiver) = link
        .open_stream()
        .await
        .map_err(|error| error.to_string())?;
    // Not before there is a stream: the threads that read are few, and shared by all databases.
    let first_lsn = job.previous.lsn.next();
    let mut parts = read_parts(journal, job.database, first_lsn, job.last_lsn);
    let mut previous = job.previous;
    let mut told = Instant::now();
    while let Some(part) = parts.recv().await {
        let part = part.map_err(|error| error.to_string())?;
        let header = part.header;
        let message = PrimaryMessage::Append {
            generation: job.generation,
            epoch: job.epoch,
            previous,
            commit_lsn: job.commit_lsn,
            archive_lsn: job.archive_lsn,
            part: header,
        };
        let frame = Frame::encode(&message, part.payload).map_err(|error| error.to_string())?;
        sender
            .send(&[frame])
            .await
            .map_err(|error| error.to_string())?;
        if header.is_last() {
            previous = header.position();
        }
        if told.elapsed() >= PROGRESS_INTERVAL {
            told = Instant::now();
            let (database, node, feed) = (job.database, job.node.clone(), job.feed);
            events
                .send(Event::BulkProgress {
                    database,
                    node,
                    feed,
                    lsn: header.lsn,
                })
                .await;
        }
    }
    sender.finish();
    if previous.lsn != job.last_lsn {
        return Err(format!(
            "the journal ended at {previous}, not at lsn {}",
            job.last_lsn
        ));
    }
    Ok(previous)
}

/// Answers a question for entries, on the stream that it came on.
pub fn spawn_answer<M: serde::Serialize + 'static>(
    journal: &Journal,
    database: DatabaseId,
    (first_lsn, last_lsn): (Lsn, Lsn),
    outbox: Outbox,
    part_message: fn(PartHeader) -> M,
    end_message: fn(Option<String>) -> M,
) {
    let mut parts = read_parts(journal, database, first_lsn, last_lsn);
    tokio::task::spawn_local(async move {
        let mut error = None;
        while let Some(part) = parts.recv().await {
            match part {
                Err(problem) => {
                    error = Some(problem.to_string());
                    break;
                }
                Ok(part) => {
                    if !push(&outbox, &part_message(part.header), part.payload).await {
                        return;
                    }
                }
            }
        }
        push(&outbox, &end_message(error), bytes::Bytes::new()).await;
    });
}

/// Sends a message as soon as there is room. False when nobody receives any more.
pub async fn push<M: serde::Serialize>(
    outbox: &Outbox,
    message: &M,
    payload: bytes::Bytes,
) -> bool {
    match Frame::encode(message, payload) {
        Ok(frame) => outbox.push_when_room(frame).await.is_ok(),
        Err(error) => {
            tracing::error!(%error, "a part is larger than a frame");
            false
        }
    }
}

/// What recovery needs from a donor.
pub struct FetchJob {
    pub database: DatabaseId,
    pub epoch: Epoch,
    pub donor: NodeName,
    pub first_lsn: Lsn,
    pub last: LogPosition,
}

/// The fetch of a database's recovery, if one is under way. Once it is stopped it writes nothing
/// more: a part of an earlier claim's donor would pass for one of the next.
#[derive(Default)]
pub struct RunningFetch(Option<AbortHandle>);

impl RunningFetch {
    /// Stops the fetch.
    pub fn stop(&mut self) {
        if let Some(task) = self.0.take() {
            task.abort();
        }
    }
}

impl Drop for RunningFetch {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Fetches entries from a donor into our own journal, then reports.
pub fn spawn_fetch(
    job: FetchJob,
    journal: Journal,
    link: Rc<Connection>,
    events: EventSender,
) -> RunningFetch {
    let task = tokio::task::spawn_local(async move {
        let fetched = fetch_entries(&job, &journal, &link).await;
        let result = fetched.map(|()| job.last);
        let FetchJob {
            database,
            epoch,
            donor,
            ..
        } = job;
        events
            .send(Event::Fetched {
                database,
                epoch,
                donor,
                result,
            })
            .await;
    });
    RunningFetch(Some(task.abort_handle()))
}

/// Our own journal must end where the donor does: a part that an earlier fetch had handed over may
/// have been written behind it.
pub fn check_fetched(held: Option<LogPosition>, wanted: LogPosition) -> Result<(), String> {
    if held == Some(wanted) {
        return Ok(());
    }
    let held = held.unwrap_or(LogPosition::ZERO);
    Err(format!(
        "our own journal ends at {held}, the donor's at {wanted}"
    ))
}

async fn fetch_entries(job: &FetchJob, journal: &Journal, link: &Connection) -> Result<(), String> {
    let (mut sender, mut receiver) = link
        .open_stream()
        .await
        .map_err(|error| error.to_string())?;
    let question = PrimaryMessage::Fetch {
        database: job.database,
        epoch: job.epoch,
        first_lsn: job.first_lsn,
        last_lsn: job.last.lsn,
    };
    let frame = Frame::encode(&question, bytes::Bytes::new()).map_err(|error| error.to_string())?;
    sender
        .send(&[frame])
        .await
        .map_err(|error| error.to_string())?;
    let mut last = LogPosition::ZERO;
    while let Some(frame) = receiver.recv().await.map_err(|error| error.to_string())? {
        match frame
            .message::<ReplicaMessage>()
            .map_err(|error| error.to_string())?
        {
            ReplicaMessage::FetchedPart { part } => {
                let entry = EntryPart {
                    header: part,
                    payload: frame.payload().clone(),
                };
                entry.slots().map_err(|error| error.to_string())?;
                write_part(journal, entry).await?;
                if part.is_last() {
                    last = part.position();
                }
            }
            ReplicaMessage::FetchEnd { error: Some(error) } => return Err(error),
            ReplicaMessage::FetchEnd { error: None } if last == job.last => return Ok(()),
            ReplicaMessage::FetchEnd { error: None } => {
                return Err(format!(
                    "the donor sent up to {last}, promised was {}",
                    job.last
                ));
            }
            ReplicaMessage::Rejected { reason, .. } => return Err(format!("{reason:?}")),
            other => return Err(format!("unexpected answer to a fetch: {other:?}")),
        }
    }
    Err("the donor's stream ended".to_owned())
}

async fn write_part(journal: &Journal, entry: EntryPart) -> Result<(), String> {
    let (done, written) = tokio::sync::oneshot::channel();
    journal.append(
        vec![Record::Part(entry)],
        Box::new(move |result| drop(done.send(result))),
    );
    match written.await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err("the journal is closed".to_owned()),
    }
}

/// How a journal's writer thread reaches the actor.
pub type JournalEvents = mpsc::UnboundedSender<JournalEvent>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_that_goes_on_behind_the_donors_was_not_recovered_from_it() {
        // Broken: an entry of a donor that was given up would be taken for the log's end.
        let at = |lsn| LogPosition::new(Epoch::new(7), Lsn::new(lsn));
        assert_eq!(check_fetched(Some(at(12)), at(12)), Ok(()));
        assert!(check_fetched(Some(at(13)), at(12)).is_err());
        assert!(check_fetched(Some(at(11)), at(12)).is_err());
        assert!(check_fetched(None, at(12)).is_err());
    }

    #[tokio::test]
    async fn a_fetch_that_is_stopped_writes_nothing_more() {
        // Broken: the fetch of an earlier claim would write into the log of the next.
        let (sender, mut receiver) = mpsc::channel(1);
        let task = tokio::spawn(async move {
            loop {
                tokio::task::yield_now().await;
                if sender.send(()).await.is_err() {
                    break;
                }
            }
        });
        let fetch = RunningFetch(Some(task.abort_handle()));
        assert_eq!(receiver.recv().await, Some(()));
        drop(fetch);
        while receiver.recv().await.is_some() {}
        assert!(task.await.is_err_and(|error| error.is_cancelled()));
    }
}
