//! Streams of their own, so that what is large holds nobody up: transactions whose pages are sent
//! while SQLite still writes, and readings of the log. Each is bound to one connection and dies
//! with it.

use super::call::Call;
use super::driver::Shared;
use bytes::Bytes;
use durovfs_link::{Connection, FrameReceiver, FrameSender, LinkError};
use durovfs_vfs::sink::{SinkError, SinkErrorKind};
use durovfs_wire::client::{ClientMessage, FailureKind, SidecarMessage};
use durovfs_wire::entry::{CommitHeader, EntryPart};
use durovfs_wire::{DatabaseId, Frame, PageSize};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc::{self, UnboundedReceiver};
use tokio::sync::oneshot;

/// Longest time without any progress of a stream: for the sidecar to be reached, to take one part,
/// or to deliver one. As long as a commit waits by default.
pub(super) const STALL_TIMEOUT: Duration = Duration::from_secs(10);

/// A step of a transaction on a stream of its own.
#[derive(Debug)]
pub(super) enum Step {
    /// Send slots; the caller waits until the link took them.
    Pages {
        /// Page size of the images.
        page_size: PageSize,
        /// The slots.
        payload: Bytes,
        /// Told when they are on their way.
        done: oneshot::Sender<Result<(), SinkError>>,
    },
    /// Send the rest; the answer goes through the table.
    Commit {
        /// What both threads know of the call.
        call: Arc<Call>,
        /// The facts.
        commit: CommitHeader,
        /// The last slots.
        payload: Bytes,
    },
    /// It will not be committed.
    Abort,
}

impl Step {
    pub(super) fn is_last(&self) -> bool {
        !matches!(self, Self::Pages { .. })
    }
}

/// Keeps the driver connecting while a stream waits for a connection.
#[derive(Debug)]
pub(super) struct Waiting(Shared);

impl Waiting {
    pub(super) fn new(shared: Shared) -> Self {
        shared.table().note_waiting_stream(true);
        Self(shared)
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.table().note_waiting_stream(false);
    }
}

fn unreachable(message: String) -> SinkError {
    SinkError {
        kind: SinkErrorKind::Unreachable,
        message,
    }
}

fn lost(error: &LinkError) -> SinkError {
    unreachable(format!("connection with the sidecar: {error}"))
}

struct Stream {
    connection: Connection,
    sender: FrameSender,
    receiver: FrameReceiver,
}

impl Stream {
    /// Opens a stream on the connection, when there is one, and the database on it, if needed.
    async fn open(
        shared: &Shared,
        waiting: Option<Waiting>,
        database: DatabaseId,
    ) -> Result<Self, SinkError> {
        let mut connections = shared.connection.clone();
        let connection = match connections.wait_for(Option::is_some).await {
            Ok(connection) => connection.clone(),
            Err(_) => None,
        };
        drop(waiting);
        let Some(connection) = connection else {
            return Err(unreachable("the client has stopped".to_owned()));
        };
        let (sender, receiver) = connection.open_stream().await.map_err(|e| lost(&e))?;
        let mut stream = Self {
            connection,
            sender,
            receiver,
        };
        stream.send(std::slice::from_ref(&shared.hello)).await?;
        let reopen = {
            let table = shared.table();
            if table.is_open(database) {
                None
            } else {
                table.reopen(database)
            }
        };
        if let Some((request, message)) = reopen {
            stream.send(&[frame(&message, Bytes::new())?]).await?;
            stream.await_opened(shared, request, database).await?;
        }
        Ok(stream)
    }

    async fn await_opened(
        &mut self,
        shared: &Shared,
        wanted: u64,
        database: DatabaseId,
    ) -> Result<(), SinkError> {
        loop {
            match self.recv().await?.0 {
                SidecarMessage::Opened {
                    request,
                    database: opened,
                    ..
                } if request == wanted && opened == database => {
                    shared.table().note_opened(database);
                    shared.notify();
                    return Ok(());
                }
                SidecarMessage::Opened { request, .. } if request == wanted => {
                    let message = "the database's name now belongs to another log".to_owned();
                    let kind = SinkErrorKind::Refused(FailureKind::UnknownDatabase);
                    return Err(SinkError { kind, message });
                }
                SidecarMessage::Failed {
                    request,
                    kind,
                    message,
                } if request == wanted => {
                    return Err(SinkError {
                        kind: SinkErrorKind::Refused(kind),
                        message,
                    });
                }
                // The welcome.
                _ => {}
            }
        }
    }

    async fn send(&mut self, frames: &[Frame]) -> Result<(), SinkError> {
        match tokio::time::timeout(STALL_TIMEOUT, self.sender.send(frames)).await {
            Ok(sent) => sent.map_err(|e| lost(&e)),
            Err(_) => Err(unreachable("the sidecar takes no more pages".to_owned())),
        }
    }

    async fn recv(&mut self) -> Result<(SidecarMessage, Bytes), SinkError> {
        let frame = match self.receiver.recv().await {
            Ok(Some(frame)) => frame,
            Ok(None) => return Err(unreachable("the sidecar ended the stream".to_owned())),
            Err(error) => return Err(lost(&error)),
        };
        let message = frame.message().map_err(|e| lost(&e.into()))?;
        Ok((message, frame.payload().clone()))
    }
}

fn frame(message: &ClientMessage, payload: Bytes) -> Result<Frame, SinkError> {
    let kind = SinkErrorKind::Refused(FailureKind::Other);
    Frame::encode(message, payload).map_err(|e| SinkError {
        kind,
        message: e.to_string(),
    })
}

/// Until when something may take.
async fn within<T>(
    shared: &Shared,
    deadline: Option<Instant>,
    future: impl Future<Output = Result<T, SinkError>>,
) -> Result<T, SinkError> {
    let Some(deadline) = deadline else {
        return future.await;
    };
    match tokio::time::timeout_at(deadline.into(), future).await {
        Ok(output) => output,
        Err(_) => Err(unreachable(trouble(shared))),
    }
}

fn trouble(shared: &Shared) -> String {
    let trouble = shared
        .trouble
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    trouble
        .clone()
        .unwrap_or_else(|| "the sidecar does not answer in time".to_owned())
}

/// A transaction on a stream of its own, from its first pages to its last step.
pub(super) async fn transaction(
    shared: Shared,
    waiting: Waiting,
    database: DatabaseId,
    sequence: u64,
    mut steps: UnboundedReceiver<Step>,
) {
    let mut transaction = Transaction {
        shared,
        waiting: Some(waiting),
        database,
        sequence,
        stream: None,
        streamed_parts: 0,
    };
    while let Some(step) = steps.recv().await {
        match step {
            Step::Pages {
                page_size,
                payload,
                done,
            } => {
                let sent = transaction.send_pages(page_size, payload).await;
                // The caller waits as long as this may take; it cannot be gone but by a panic.
                let _ = done.send(sent);
            }
            Step::Commit {
                call,
                commit,
                payload,
            } => {
                return transaction.commit(&call, commit, payload).await;
            }
            Step::Abort => return transaction.abort().await,
        }
    }
}

struct Transaction {
    shared: Shared,
    waiting: Option<Waiting>,
    database: DatabaseId,
    sequence: u64,
    /// Once it failed it stays failed: parts that were lost cannot be sent again.
    stream: Option<Result<Stream, SinkError>>,
    streamed_parts: u32,
}

impl Transaction {
    async fn stream(&mut self, deadline: Option<Instant>) -> Result<&mut Stream, SinkError> {
        if self.stream.is_none() {
            let open = Stream::open(&self.shared, self.waiting.take(), self.database);
            let opened = within(&self.shared, deadline, open).await;
            self.stream = Some(opened);
        }
        match &mut self.stream {
            Some(Ok(stream)) => Ok(stream),
            Some(Err(error)) => Err(error.clone()),
            None => Err(unreachable("the stream was not opened".to_owned())),
        }
    }

    async fn send_pages(&mut self, page_size: PageSize, payload: Bytes) -> Result<(), SinkError> {
        let (database, sequence) = (self.database, self.sequence);
        let message = ClientMessage::Pages {
            database,
            sequence,
            page_size,
        };
        let frame = frame(&message, payload)?;
        let stream = self.stream(Some(Instant::now() + STALL_TIMEOUT)).await?;
        if let Err(error) = stream.send(&[frame]).await {
            self.stream = Some(Err(error.clone()));
            return Err(error);
        }
        self.streamed_parts += 1;
        Ok(())
    }

    async fn commit(mut self, call: &Call, commit: CommitHeader, payload: Bytes) {
        let sequence = self.sequence;
        if let Err(error) = self.send_commit(call, commit, payload).await {
            if call.was_sent() {
                // The connection may stand: then the shared stream asks what became of it.
                self.shared.table().handle_stream_lost(sequence);
                self.shared.notify();
            } else {
                let kind = match error.kind {
                    SinkErrorKind::Refused(kind) => kind,
                    SinkErrorKind::Unreachable | SinkErrorKind::Stopped => FailureKind::Other,
                };
                let message = error.message;
                let failed = SidecarMessage::Failed {
                    request: sequence,
                    kind,
                    message,
                };
                self.shared.table().handle_message(failed);
            }
        }
    }

    async fn send_commit(
        &mut self,
        call: &Call,
        commit: CommitHeader,
        payload: Bytes,
    ) -> Result<(), SinkError> {
        let (database, streamed_parts) = (self.database, self.streamed_parts);
        let shared = self.shared.clone();
        let stream = self.stream(call.deadline()).await?;
        let timeout_ms = call.remaining_ms();
        let message = ClientMessage::Commit {
            database,
            commit,
            streamed_parts,
            after: None,
            timeout_ms,
        };
        let frame = frame(&message, payload)?;
        // With the connection went the pages: nothing is sent, and the outcome is certain.
        if let Some(reason) = stream.connection.close_reason() {
            return Err(lost(&reason));
        }
        if !call.begin_sending() {
            // The caller went away; its answer is known to it.
            return Ok(());
        }
        stream.send(&[frame]).await?;
        loop {
            let (message, _) = stream.recv().await?;
            let last = matches!(
                message,
                SidecarMessage::Outcome { .. } | SidecarMessage::Failed { .. }
            );
            shared.table().handle_message(message);
            if last {
                stream.sender.finish();
                return Ok(());
            }
        }
    }

    async fn abort(self) {
        let Some(Ok(mut stream)) = self.stream else {
            return;
        };
        let (database, sequence) = (self.database, self.sequence);
        if let Ok(frame) = frame(&ClientMessage::Abort { database, sequence }, Bytes::new()) {
            // A sidecar that does not hear it drops the pages when the stream ends.
            let _ = stream.send(&[frame]).await;
        }
        stream.sender.finish();
    }
}

/// Reads a log to its end, or tells why not.
pub(super) async fn read_log(
    shared: Shared,
    waiting: Waiting,
    database: DatabaseId,
    question: ClientMessage,
    parts: mpsc::Sender<Result<Option<EntryPart>, SinkError>>,
) {
    let deadline = Some(Instant::now() + STALL_TIMEOUT);
    let open = Stream::open(&shared, Some(waiting), database);
    let failed = match within(&shared, deadline, open).await {
        Ok(stream) => pump_log(stream, &question, &parts).await.err(),
        Err(error) => Some(error),
    };
    if let Some(error) = failed {
        // The reader may have stopped: then it does not ask why.
        let _ = parts.send(Err(error)).await;
    }
}

async fn pump_log(
    mut stream: Stream,
    question: &ClientMessage,
    parts: &mpsc::Sender<Result<Option<EntryPart>, SinkError>>,
) -> Result<(), SinkError> {
    stream.send(&[frame(question, Bytes::new())?]).await?;
    loop {
        let (message, payload) = stream.recv().await?;
        match message {
            SidecarMessage::LogPart { .. } | SidecarMessage::Progress { .. } => {
                let part = match message {
                    SidecarMessage::LogPart { part: header } => Some(EntryPart { header, payload }),
                    _ => None,
                };
                let Ok(()) = parts.send(Ok(part)).await else {
                    stream.receiver.stop();
                    return Ok(());
                };
            }
            SidecarMessage::LogEnd { error: None } => return Ok(()),
            SidecarMessage::LogEnd {
                error: Some(message),
            } => {
                let kind = SinkErrorKind::Refused(FailureKind::Other);
                return Err(SinkError { kind, message });
            }
            SidecarMessage::Failed { kind, message, .. } => {
                return Err(SinkError {
                    kind: SinkErrorKind::Refused(kind),
                    message,
                });
            }
            // The welcome.
            _ => {}
        }
    }
}
