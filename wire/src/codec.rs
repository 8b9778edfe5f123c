//! Frames: how every message travels on a stream of bytes.
//!
//! A stream begins with [`PREAMBLE`] from each side. Then frames follow; numbers are little-endian:
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 4 | length of the body, at most [`MAX_BODY_BYTES`] |
//! | 4 | 4 | CRC-32 of the body |
//! | 8 | 4 | length of the header |
//! | 12 | … | header: a message, in postcard encoding |
//! | … | … | payload: raw bytes up to the end of the body |
//!
//! The payload is never copied into another encoding, so that page images pass through a node as
//! the bytes they came as. ("Frame" here is the wire's; SQLite's are always called WAL frames.)

use crate::entry::MAX_PART_PAYLOAD_BYTES;
use bytes::{Buf, BufMut, Bytes, BytesMut};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Magic and version, the first bytes of each direction of each stream.
pub const PREAMBLE: [u8; 8] = *b"DUROVFS\x02";
/// Bytes before the body.
const PREFIX_BYTES: usize = 8;
/// The version of [`PREAMBLE`].
const OWN_VERSION: u8 = PREAMBLE[7];
/// Bytes of the header's length.
const HEADER_LENGTH_BYTES: usize = 4;
/// Largest message header. Status reports of a node with many databases are the largest by far.
pub const MAX_HEADER_BYTES: usize = 256 << 10;
/// Largest body that a peer may send.
pub const MAX_BODY_BYTES: usize = HEADER_LENGTH_BYTES + MAX_HEADER_BYTES + MAX_PART_PAYLOAD_BYTES;

/// Why bytes are not a frame, or a message not one that can be sent. The link must be closed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The stream is not durovfs's.
    #[error("stream does not begin with the durovfs preamble")]
    BadPreamble,
    /// The peer speaks another version.
    #[error(
        "it speaks wire version {got}, durovfs {} here speaks {OWN_VERSION}: upgrade {}",
        env!("CARGO_PKG_VERSION"),
        if *got > OWN_VERSION { "this side" } else { "it" }
    )]
    UnsupportedVersion {
        /// The peer's.
        got: u8,
    },
    /// A length above the limit.
    #[error("frame of {got} bytes exceeds the limit of {limit}")]
    LimitExceeded {
        /// The limit.
        limit: usize,
        /// What was announced.
        got: usize,
    },
    /// The header's length is beyond the body.
    #[error("frame header of {header} bytes in a body of {body}")]
    BadHeaderLength {
        /// Announced length of the header.
        header: usize,
        /// Length of the body.
        body: usize,
    },
    /// The bytes changed on the way.
    #[error("frame checksum mismatch")]
    ChecksumMismatch,
    /// The header is no message of this protocol.
    #[error("frame header is not a known message")]
    BadMessage,
}

impl FrameError {
    /// The same, said to the side that sent it.
    pub fn told(&self) -> String {
        match self {
            Self::UnsupportedVersion { got } => format!(
                "durovfs {} there speaks wire version {OWN_VERSION}, and was spoken to in {got}: \
                 upgrade {}",
                env!("CARGO_PKG_VERSION"),
                if *got > OWN_VERSION {
                    "it"
                } else {
                    "this side"
                }
            ),
            other => other.to_string(),
        }
    }
}

/// One encoded message: header and payload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    head: Bytes,
    header_start: usize,
    payload: Bytes,
}

impl Frame {
    /// Encodes a message once; the frame may then be sent to many peers.
    ///
    /// # Errors
    /// When the message or the payload is larger than a frame may be.
    pub fn encode<M: Serialize>(message: &M, payload: Bytes) -> Result<Self, FrameError> {
        let header = postcard::to_stdvec(message).map_err(|_| FrameError::BadMessage)?;
        check_limit(header.len(), MAX_HEADER_BYTES)?;
        check_limit(payload.len(), MAX_PART_PAYLOAD_BYTES)?;
        let header_length = (header.len() as u32).to_le_bytes();
        let mut crc = crc32fast::Hasher::new();
        crc.update(&header_length);
        crc.update(&header);
        crc.update(&payload);
        let header_start = PREFIX_BYTES + HEADER_LENGTH_BYTES;
        let mut head = BytesMut::with_capacity(header_start + header.len());
        head.put_u32_le((HEADER_LENGTH_BYTES + header.len() + payload.len()) as u32);
        head.put_u32_le(crc.finalize());
        head.put_slice(&header_length);
        head.put_slice(&header);
        Ok(Self {
            head: head.freeze(),
            header_start,
            payload,
        })
    }

    /// The message.
    ///
    /// # Errors
    /// When the header is no `M`.
    pub fn message<M: DeserializeOwned>(&self) -> Result<M, FrameError> {
        match postcard::take_from_bytes(&self.head[self.header_start..]) {
            Ok((message, [])) => Ok(message),
            Ok(_) | Err(_) => Err(FrameError::BadMessage),
        }
    }

    /// The payload.
    pub fn payload(&self) -> &Bytes {
        &self.payload
    }

    /// The bytes to send, in order.
    pub fn chunks(&self) -> [Bytes; 2] {
        [self.head.clone(), self.payload.clone()]
    }

    /// Bytes that it takes on the stream.
    pub fn len(&self) -> usize {
        self.head.len() + self.payload.len()
    }

    /// Never true: a frame has at least a header length.
    pub fn is_empty(&self) -> bool {
        false
    }
}

fn check_limit(got: usize, limit: usize) -> Result<(), FrameError> {
    if got > limit {
        Err(FrameError::LimitExceeded { limit, got })
    } else {
        Ok(())
    }
}

/// Cuts a stream of bytes into frames. Holds at most one incomplete frame.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: BytesMut,
    preamble_seen: bool,
}

impl Decoder {
    /// Takes bytes as they arrive.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole frame, if it is there.
    ///
    /// # Errors
    /// When the stream is not a durovfs stream of this version, or was damaged; it stays unusable.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        if !self.preamble_seen && !self.take_preamble()? {
            return Ok(None);
        }
        if self.buffer.len() < PREFIX_BYTES + HEADER_LENGTH_BYTES {
            return Ok(None);
        }
        let body = word_at(&self.buffer, 0) as usize;
        check_limit(body, MAX_BODY_BYTES)?;
        let header = word_at(&self.buffer, 8) as usize;
        // Checked before the frame is whole, so that a bad length is not waited for.
        if body < HEADER_LENGTH_BYTES || header > body - HEADER_LENGTH_BYTES {
            return Err(FrameError::BadHeaderLength { header, body });
        }
        check_limit(header, MAX_HEADER_BYTES)?;
        check_limit(body - HEADER_LENGTH_BYTES - header, MAX_PART_PAYLOAD_BYTES)?;
        if self.buffer.len() < PREFIX_BYTES + body {
            self.buffer.reserve(PREFIX_BYTES + body - self.buffer.len());
            return Ok(None);
        }
        let expected = word_at(&self.buffer, 4);
        let mut head = self.buffer.split_to(PREFIX_BYTES + body).freeze();
        if crc32fast::hash(&head[PREFIX_BYTES..]) != expected {
            return Err(FrameError::ChecksumMismatch);
        }
        let header_start = PREFIX_BYTES + HEADER_LENGTH_BYTES;
        let payload = head.split_off(header_start + header);
        Ok(Some(Frame {
            head,
            header_start,
            payload,
        }))
    }

    fn take_preamble(&mut self) -> Result<bool, FrameError> {
        if self.buffer.len() < PREAMBLE.len() {
            return Ok(false);
        }
        let mut got = [0u8; PREAMBLE.len()];
        self.buffer.copy_to_slice(&mut got);
        if got[..7] != PREAMBLE[..7] {
            return Err(FrameError::BadPreamble);
        }
        if got[7] != OWN_VERSION {
            return Err(FrameError::UnsupportedVersion { got: got[7] });
        }
        self.preamble_seen = true;
        Ok(true)
    }
}

fn word_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes([
        bytes[offset],
        bytes[offset + 1],
        bytes[offset + 2],
        bytes[offset + 3],
    ])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn stream_of(frames: &[Frame]) -> Vec<u8> {
        let mut stream = PREAMBLE.to_vec();
        for frame in frames {
            frame
                .chunks()
                .iter()
                .for_each(|chunk| stream.extend_from_slice(chunk));
        }
        stream
    }

    #[test]
    fn a_flipped_bit_is_found() {
        let frame = Frame::encode(&7u32, Bytes::from_static(b"payload")).unwrap();
        let mut stream = stream_of(&[frame]);
        let last = stream.len() - 1;
        stream[last] ^= 1;
        let mut decoder = Decoder::default();
        decoder.push(&stream);
        assert_eq!(decoder.next_frame(), Err(FrameError::ChecksumMismatch));
    }

    #[test]
    fn another_version_is_refused_with_what_to_do() {
        for (preamble, got, here, there) in [
            (b"DUROVFS\x09", 9, "upgrade this side", "upgrade it"),
            (b"DUROVFS\x01", 1, "upgrade it", "upgrade this side"),
        ] {
            let mut decoder = Decoder::default();
            decoder.push(preamble);
            let error = decoder.next_frame().unwrap_err();
            assert_eq!(error, FrameError::UnsupportedVersion { got });
            assert!(error.to_string().ends_with(here), "{error}");
            assert!(error.told().ends_with(there), "{}", error.told());
        }
        let mut decoder = Decoder::default();
        decoder.push(b"HTTP/1.1");
        assert_eq!(decoder.next_frame(), Err(FrameError::BadPreamble));
    }

    #[test]
    fn a_length_above_the_limit_is_refused_before_it_is_waited_for() {
        let mut decoder = Decoder::default();
        decoder.push(&PREAMBLE);
        decoder.push(&[0xff; 12]);
        assert!(matches!(
            decoder.next_frame(),
            Err(FrameError::LimitExceeded { .. })
        ));
    }

    proptest! {
        #[test]
        fn frames_survive_any_cut_of_the_stream(
            payloads in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 1..8),
            cut in 1usize..64,
        ) {
            let frames: Vec<_> = payloads
                .iter()
                .enumerate()
                .map(|(i, p)| Frame::encode(&(i as u64), Bytes::copy_from_slice(p)).unwrap())
                .collect();
            let mut decoder = Decoder::default();
            let mut got = Vec::new();
            for piece in stream_of(&frames).chunks(cut) {
                decoder.push(piece);
                while let Some(frame) = decoder.next_frame().unwrap() {
                    got.push((frame.message::<u64>().unwrap(), frame.payload().to_vec()));
                }
            }
            let expected: Vec<_> =
                payloads.into_iter().enumerate().map(|(i, p)| (i as u64, p)).collect();
            prop_assert_eq!(got, expected);
        }

        #[test]
        fn any_bytes_are_refused_or_decoded_without_a_panic(
            bytes in prop::collection::vec(any::<u8>(), 0..600),
        ) {
            let mut decoder = Decoder::default();
            decoder.push(&PREAMBLE);
            decoder.push(&bytes);
            while let Ok(Some(frame)) = decoder.next_frame() {
                let _ = frame.message::<crate::peer::PrimaryMessage>();
            }
        }
    }
}
