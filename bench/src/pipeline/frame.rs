//! What passes between the processes of the bare pipeline.
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 4 | length of the frame, all of it |
//! | 4 | 4 | index of the caller, which stands for its database |
//! | 8 | 8 | number of the commit, never used twice |
//! | 16 | … | payload |

use anyhow::{Result, bail};
use bytes::{Buf, BufMut, Bytes, BytesMut};

/// Bytes before the payload.
pub const HEADER_BYTES: usize = 16;
/// An answer: about what durovfs's has.
pub const ANSWER_BYTES: usize = 32;
/// Largest frame: far above the bytes of a one-row commit.
pub const FRAME_BYTES_MAX: usize = 1 << 20;
/// Callers at most: each has one commit on its way, which bounds all queues.
pub const CALLERS_MAX: usize = 4096;

/// Which commit a frame is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CommitId {
    /// Index of the caller.
    pub caller: u32,
    /// Number of the commit.
    pub sequence: u64,
}

impl CommitId {
    /// The header of a frame with so many bytes of payload.
    pub fn header(self, payload_bytes: usize) -> Bytes {
        let mut header = BytesMut::with_capacity(HEADER_BYTES);
        header.put_u32_le((HEADER_BYTES + payload_bytes) as u32);
        header.put_u32_le(self.caller);
        header.put_u64_le(self.sequence);
        header.freeze()
    }

    /// The answer to it.
    pub fn answer(self) -> Bytes {
        let payload = [0; ANSWER_BYTES - HEADER_BYTES];
        let mut answer = BytesMut::from(&self.header(payload.len())[..]);
        answer.put_slice(&payload);
        answer.freeze()
    }

    /// From a whole frame.
    pub fn of(frame: &Bytes) -> Self {
        let mut header = &frame[4..HEADER_BYTES];
        Self {
            caller: header.get_u32_le(),
            sequence: header.get_u64_le(),
        }
    }
}

/// Cuts a stream into frames.
#[derive(Debug, Default)]
pub struct Cutter {
    buffer: BytesMut,
}

impl Cutter {
    /// Takes bytes as they come.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole frame, if it is there.
    ///
    /// # Errors
    /// When the bytes are no frames.
    pub fn next_frame(&mut self) -> Result<Option<Bytes>> {
        let Some(mut length) = self.buffer.get(..4) else {
            return Ok(None);
        };
        let length = length.get_u32_le() as usize;
        if !(HEADER_BYTES..=FRAME_BYTES_MAX).contains(&length) {
            bail!("a frame of {length} bytes");
        }
        if self.buffer.len() < length {
            return Ok(None);
        }
        Ok(Some(self.buffer.split_to(length).freeze()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_survive_any_cut_of_the_stream() {
        // Broken: commits would be lost between the processes, and callers wait for ever.
        let commits: Vec<_> = (0..5)
            .map(|n| CommitId {
                caller: n,
                sequence: 1 << (9 * n),
            })
            .collect();
        let payload = [7; 100];
        let stream: Vec<u8> = commits
            .iter()
            .flat_map(|commit| {
                [commit.header(payload.len()), Bytes::from_static(&[7; 100])].concat()
            })
            .collect();
        for cut in 1..=stream.len() {
            let mut cutter = Cutter::default();
            let mut seen = Vec::new();
            for piece in stream.chunks(cut) {
                cutter.push(piece);
                while let Some(frame) = cutter.next_frame().unwrap() {
                    assert_eq!(frame[HEADER_BYTES..], payload);
                    seen.push(CommitId::of(&frame));
                }
            }
            assert_eq!(seen, commits, "cut={cut}");
        }
    }

    #[test]
    fn a_frame_of_no_sense_is_refused() {
        // Broken: a process that lost its place in the stream would wait for gigabytes.
        for length in [0u32, 15, u32::MAX] {
            let mut cutter = Cutter::default();
            cutter.push(&length.to_le_bytes());
            assert!(cutter.next_frame().is_err(), "length={length}");
        }
    }
}
