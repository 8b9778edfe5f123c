//! Streams of frames: one direction each, preamble first.

use crate::error::{CODE_DONE, CODE_REFUSED, LinkError};
use bytes::Bytes;
use durovfs_wire::codec::PREAMBLE;
use durovfs_wire::{Decoder, Frame};
use std::collections::VecDeque;
use std::sync::Arc;

/// Pieces of a stream that are taken per read: what a few full packets hold.
const READ_CHUNKS: usize = 32;

/// The sending half of a stream.
#[derive(Debug)]
pub struct FrameSender {
    stream: quinn::SendStream,
    peer: Arc<str>,
    preamble_sent: bool,
    chunks: Vec<Bytes>,
}

impl FrameSender {
    pub(crate) fn new(stream: quinn::SendStream, peer: Arc<str>) -> Self {
        Self {
            stream,
            peer,
            preamble_sent: false,
            chunks: Vec::new(),
        }
    }

    /// Sends frames, in order, in as few packets as they fit. Waits while the peer takes no more.
    /// When it does not return (the caller dropped the future), the stream may hold a part of a
    /// frame and must not be used again.
    ///
    /// # Errors
    /// When the stream or the connection is gone. Some of the frames may have arrived.
    pub async fn send(&mut self, frames: &[Frame]) -> Result<(), LinkError> {
        self.chunks.clear();
        if !self.preamble_sent {
            self.chunks.push(Bytes::from_static(&PREAMBLE));
        }
        for frame in frames {
            self.chunks
                .extend(frame.chunks().into_iter().filter(|chunk| !chunk.is_empty()));
        }
        self.preamble_sent = true;
        let written = self.stream.write_all_chunks(&mut self.chunks).await;
        written.map_err(|e| LinkError::write(&self.peer, &e))
    }

    /// Sends bytes that need not be a frame, nor begin with the preamble.
    #[cfg(test)]
    pub(crate) async fn send_bytes(&mut self, bytes: &[u8]) {
        let written = self.stream.write_all(bytes).await;
        written.unwrap_or_else(|error| panic!("{error}"));
    }

    /// Streams with a higher priority send first; all begin with zero.
    pub fn set_priority(&self, priority: i32) {
        // Fails only on a stream that is closed, where it does not matter.
        let _ = self.stream.set_priority(priority);
    }

    /// Says that nothing follows. What was sent is still delivered, while the connection lives.
    pub fn finish(&mut self) {
        // Fails only on a stream that is finished or stopped already.
        let _ = self.stream.finish();
    }

    /// Gives the stream up: the peer reads an error instead of the end.
    pub fn reset(&mut self) {
        // Fails only on a stream that is closed already.
        let _ = self.stream.reset(CODE_DONE);
    }
}

/// The receiving half of a stream. All methods may be cancelled without loss.
#[derive(Debug)]
pub struct FrameReceiver {
    stream: quinn::RecvStream,
    peer: Arc<str>,
    connection: quinn::Connection,
    decoder: Decoder,
    ready: VecDeque<Frame>,
}

impl FrameReceiver {
    pub(crate) fn new(
        stream: quinn::RecvStream,
        peer: Arc<str>,
        connection: quinn::Connection,
    ) -> Self {
        Self {
            stream,
            peer,
            connection,
            decoder: Decoder::default(),
            ready: VecDeque::new(),
        }
    }

    /// The next frame; none when the peer finished the stream.
    ///
    /// # Errors
    /// When the stream or the connection is gone, or its bytes are no frames.
    pub async fn recv(&mut self) -> Result<Option<Frame>, LinkError> {
        while self.ready.is_empty() {
            if !self.fill().await? {
                return Ok(None);
            }
        }
        Ok(self.ready.pop_front())
    }

    /// Appends all frames that have arrived, at least one; false when the peer finished the stream.
    ///
    /// # Errors
    /// When the stream or the connection is gone, or its bytes are no frames.
    pub async fn recv_many(&mut self, frames: &mut Vec<Frame>) -> Result<bool, LinkError> {
        while self.ready.is_empty() {
            if !self.fill().await? {
                return Ok(false);
            }
        }
        frames.extend(self.ready.drain(..));
        Ok(true)
    }

    /// Tells the peer that nothing more is read.
    pub fn stop(&mut self) {
        // Fails only on a stream that is closed already.
        let _ = self.stream.stop(CODE_DONE);
    }

    /// Waits for bytes and decodes what is whole; false at the end of the stream. Bytes that are no
    /// frames end the connection, so that the peer hears why.
    async fn fill(&mut self) -> Result<bool, LinkError> {
        let mut chunks: [Bytes; READ_CHUNKS] = Default::default();
        let read = self.stream.read_chunks(&mut chunks).await;
        let Some(count) = read.map_err(|e| LinkError::read(&self.peer, &e))? else {
            return Ok(false);
        };
        for chunk in &chunks[..count] {
            self.decoder.push(chunk);
        }
        loop {
            match self.decoder.next_frame() {
                Ok(Some(frame)) => self.ready.push_back(frame),
                Ok(None) => return Ok(true),
                Err(error) => {
                    self.connection.close(CODE_REFUSED, error.told().as_bytes());
                    return Err(error.into());
                }
            }
        }
    }
}
