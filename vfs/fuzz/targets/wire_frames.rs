//! What comes from the network: a stream cut into frames, and the messages in them, of every kind.

#![no_main]

use bytes::Bytes;
use durovfs_wire::PageSize;
use durovfs_wire::client::{ClientMessage, SidecarMessage};
use durovfs_wire::codec::{Decoder, Frame};
use durovfs_wire::entry::SlotPages;
use durovfs_wire::peer::{PrimaryMessage, ReplicaMessage};
use libfuzzer_sys::fuzz_target;

fn read(frame: &Frame) {
    let _ = frame.message::<ClientMessage>();
    let _ = frame.message::<SidecarMessage>();
    let _ = frame.message::<PrimaryMessage>();
    let _ = frame.message::<ReplicaMessage>();
    for size in [
        None,
        PageSize::try_from(512).ok(),
        PageSize::try_from(65536).ok(),
    ] {
        if let Ok(slots) = SlotPages::parse(frame.payload(), size) {
            for slot in slots {
                assert!(slot.image.len() <= 65536);
            }
        }
    }
}

fuzz_target!(|input: (Vec<u8>, Vec<u8>, Vec<u8>)| {
    let (stream, header, payload) = input;
    // Any bytes, as they arrive.
    let mut decoder = Decoder::default();
    for piece in stream.chunks(61) {
        decoder.push(piece);
    }
    while let Ok(Some(frame)) = decoder.next_frame() {
        read(&frame);
    }
    // A frame whose lengths and checksum are right, with any message in it.
    let body_bytes = 4 + header.len() + payload.len();
    let mut body = (header.len() as u32).to_le_bytes().to_vec();
    body.extend_from_slice(&header);
    body.extend_from_slice(&payload);
    let mut decoder = Decoder::default();
    let preamble = durovfs_wire::codec::PREAMBLE;
    decoder.push(&preamble);
    decoder.push(&(body_bytes as u32).to_le_bytes());
    decoder.push(&crc32fast::hash(&body).to_le_bytes());
    decoder.push(&Bytes::from(body));
    if let Ok(Some(frame)) = decoder.next_frame() {
        assert_eq!(frame.payload().as_ref(), payload);
        read(&frame);
    }
});
