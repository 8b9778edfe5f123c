//! Queues of frames on their way to a stream. One task per stream writes what has gathered.

use durovfs_link::FrameSender;
use durovfs_wire::{Frame, FrameError};
use serde::Serialize;
use std::cell::Cell;
use std::rc::Rc;
use tokio::sync::{Notify, mpsc};

/// Bytes that may wait for one peer. A level replica that is further behind than this is fed from
/// the journal instead; a client that does not read its answers is cut off.
pub const OUTBOX_LIMIT_BYTES: usize = 8 << 20;
/// Room for answers and questions when the queue is full of entries: they are small, and each is
/// said once. Who has left this much unread as well is cut off, and begins anew with another
/// connection.
const ANSWER_ROOM_BYTES: usize = 1 << 20;
/// Frames written per call: the answers to one group commit leave together.
const WRITE_BATCH: usize = 256;

/// Sending side of a stream's queue. Clones share it.
#[derive(Debug, Clone)]
pub struct Outbox {
    frames: mpsc::UnboundedSender<Frame>,
    queued_bytes: Rc<Cell<usize>>,
    written: Rc<Notify>,
    cut: Rc<Notify>,
}

/// Why a frame was not queued.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NotQueued {
    /// The stream has ended.
    Closed,
    /// Too much waits already.
    Full,
    /// The message is larger than a frame.
    TooLarge(FrameError),
}

impl Outbox {
    /// Starts the task that writes to `sender` until the queue is dropped or the stream breaks.
    pub fn spawn(mut sender: FrameSender) -> Self {
        let (frames, mut queue) = mpsc::unbounded_channel::<Frame>();
        let queued_bytes = Rc::new(Cell::new(0usize));
        let queued = Rc::clone(&queued_bytes);
        let written = Rc::new(Notify::new());
        let wakes = Rc::clone(&written);
        let cut = Rc::new(Notify::new());
        let cuts = Rc::clone(&cut);
        tokio::task::spawn_local(async move {
            let mut batch = Vec::with_capacity(WRITE_BATCH);
            while queue.recv_many(&mut batch, WRITE_BATCH).await > 0 {
                let sent = tokio::select! {
                    sent = sender.send(&batch) => sent.map_err(|error| error.to_string()),
                    () = cuts.notified() => {
                        sender.reset();
                        Err("too much is unread".to_owned())
                    }
                };
                if let Err(error) = sent {
                    tracing::debug!(%error, "stream ended while sending");
                    queue.close();
                    wakes.notify_waiters();
                    return;
                }
                let sent: usize = batch.iter().map(Frame::len).sum();
                queued.set(queued.get().saturating_sub(sent));
                batch.clear();
                wakes.notify_waiters();
            }
            // The reader of a stream that ends without notice waits for the idle timeout.
            sender.finish();
        });
        Self {
            frames,
            queued_bytes,
            written,
            cut,
        }
    }

    /// Queues an encoded frame.
    pub fn push(&self, frame: Frame) -> Result<(), NotQueued> {
        self.push_within(frame, OUTBOX_LIMIT_BYTES)
    }

    fn push_within(&self, frame: Frame, limit_bytes: usize) -> Result<(), NotQueued> {
        let queued = self.queued_bytes.get() + frame.len();
        if queued > limit_bytes {
            return Err(NotQueued::Full);
        }
        self.frames.send(frame).map_err(|_| NotQueued::Closed)?;
        self.queued_bytes.set(queued);
        Ok(())
    }

    /// Queues an encoded frame as soon as there is room. For long answers, in tasks of their own.
    pub async fn push_when_room(&self, frame: Frame) -> Result<(), NotQueued> {
        loop {
            let written = self.written.notified();
            match self.push(frame.clone()) {
                Err(NotQueued::Full) => written.await,
                result => return result,
            }
        }
    }

    /// Encodes and queues a message without payload.
    pub fn send<M: Serialize>(&self, message: &M) -> Result<(), NotQueued> {
        self.push(Frame::encode(message, bytes::Bytes::new()).map_err(NotQueued::TooLarge)?)
    }

    /// Queues what is said once, and is not missed by who is gone. Who does not read is cut off:
    /// the stream ends, so that the other side does not wait for what was not sent.
    pub fn answer<M: Serialize>(&self, message: &M) {
        let frame = Frame::encode(message, bytes::Bytes::new()).map_err(NotQueued::TooLarge);
        let limit_bytes = OUTBOX_LIMIT_BYTES + ANSWER_ROOM_BYTES;
        let queued = frame.and_then(|frame| self.push_within(frame, limit_bytes));
        if let Err(reason) = queued {
            tracing::debug!(?reason, "an answer was not sent");
            if reason == NotQueued::Full {
                self.cut.notify_one();
            }
        }
    }

    /// Whether the stream has ended, from this side or the other.
    pub fn is_closed(&self) -> bool {
        self.frames.is_closed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use durovfs_link::{Connection, Endpoint, FrameReceiver, Identity, Profile, authority};
    use durovfs_wire::NodeName;
    use std::time::Duration;

    const PATIENCE: Duration = Duration::from_secs(20);

    fn identity(folder: &std::path::Path, authority: &authority::Authority) -> Identity {
        let name: NodeName = "a".parse().unwrap();
        let file = |name: &str| folder.join(name);
        authority.write(folder).unwrap();
        let pair = authority.issue_node(&name).unwrap();
        pair.write(&file("a.pem"), &file("a-key.pem")).unwrap();
        let ca = file(authority::CA_CERTIFICATE_FILE);
        Identity::load(&ca, &file("a.pem"), &file("a-key.pem")).unwrap()
    }

    /// A stream to a peer that has not begun to read, both ends' connections, and the peer's half.
    async fn unread() -> (Outbox, FrameReceiver, (Connection, Connection, Endpoint)) {
        let folder = tempfile::tempdir().unwrap();
        let identity = identity(folder.path(), &authority::create().unwrap());
        let any_port = "127.0.0.1:0".parse().unwrap();
        let server = Endpoint::bind(any_port, &identity, Profile::Auto).unwrap();
        let client = Endpoint::client(&identity, Profile::Auto).unwrap();
        let name = "a".parse().unwrap();
        let (near, far) =
            tokio::join!(client.connect(server.local_addr().unwrap(), &name), async {
                server.accept().await.unwrap().handshake().await.unwrap()
            });
        let near = near.unwrap();
        let (sender, _) = near.open_stream().await.unwrap();
        let outbox = Outbox::spawn(sender);
        outbox.answer(&0u64);
        let (_, receiver) = far.accept_stream().await.unwrap();
        (outbox, receiver, (near, far, server))
    }

    /// Queues entries until there is no room for the smallest, also when what the connection takes
    /// has left.
    async fn fill(outbox: &Outbox) -> u64 {
        let mut queued = 0;
        for payload_bytes in [1 << 20, 1 << 10, 0] {
            let entry = Frame::encode(&1u64, Bytes::from(vec![7; payload_bytes])).unwrap();
            let mut pauses = 0;
            while pauses < 3 {
                match outbox.push(entry.clone()) {
                    Ok(()) => {
                        queued += 1;
                        pauses = 0;
                    }
                    Err(reason) => {
                        assert_eq!(reason, NotQueued::Full);
                        pauses += 1;
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                }
            }
        }
        queued
    }

    #[tokio::test]
    async fn what_is_said_once_has_room_behind_entries_that_fill_the_queue() {
        // Broken: a claim to a replica whose disk hangs for a moment would be lost, and the replica
        // stay out for good.
        let local = tokio::task::LocalSet::new();
        local
            .run_until(async {
                let (outbox, mut receiver, _ends) = unread().await;
                let entries = fill(&outbox).await;
                outbox.answer(&2u64);
                let mut frames = 0;
                loop {
                    let frame = tokio::time::timeout(PATIENCE, receiver.recv()).await;
                    let frame = frame.unwrap().unwrap().unwrap();
                    if frame.message::<u64>().unwrap() == 2 {
                        break;
                    }
                    frames += 1;
                }
                assert_eq!(frames, entries + 1);
                assert!(!outbox.is_closed());
            })
            .await;
    }

    #[tokio::test]
    async fn who_reads_nothing_is_cut_off_and_learns_it() {
        // Broken: the other side would wait for an answer that was thrown away.
        let local = tokio::task::LocalSet::new();
        local
            .run_until(async {
                let (outbox, mut receiver, _ends) = unread().await;
                fill(&outbox).await;
                for _ in 0..ANSWER_ROOM_BYTES {
                    outbox.answer(&2u64);
                }
                let ended = async {
                    while !outbox.is_closed() {
                        tokio::time::sleep(Duration::from_millis(10)).await;
                    }
                    loop {
                        match receiver.recv().await {
                            Ok(Some(_)) => {}
                            ended => return ended,
                        }
                    }
                };
                let ended = tokio::time::timeout(PATIENCE, ended).await;
                assert!(
                    ended.unwrap().is_err(),
                    "it must not look like a whole answer"
                );
            })
            .await;
    }
}
