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
/// Frames written per call: the answers to one group commit leave together.
const WRITE_BATCH: usize = 256;

/// Sending side of a stream's queue. Clones share it.
#[derive(Debug, Clone)]
pub struct Outbox {
    frames: mpsc::UnboundedSender<Frame>,
    queued_bytes: Rc<Cell<usize>>,
    written: Rc<Notify>,
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
        tokio::task::spawn_local(async move {
            let mut batch = Vec::with_capacity(WRITE_BATCH);
            while queue.recv_many(&mut batch, WRITE_BATCH).await > 0 {
                if let Err(error) = sender.send(&batch).await {
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
        }
    }

    /// Queues an encoded frame.
    pub fn push(&self, frame: Frame) -> Result<(), NotQueued> {
        let queued = self.queued_bytes.get() + frame.len();
        if queued > OUTBOX_LIMIT_BYTES {
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

    /// Queues an answer; one that cannot be queued is for somebody who is gone or does not read.
    pub fn answer<M: Serialize>(&self, message: &M) {
        if let Err(reason) = self.send(message) {
            tracing::debug!(?reason, "an answer was not sent");
        }
    }
}
