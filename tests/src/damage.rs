//! What a bad disk does to the journal of a node that does not run, or does.

use crate::cluster::Cluster;
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

/// Bytes of a segment's header.
const HEADER_BYTES: usize = 4096;

/// The segments of a node's journal of other primaries' logs, oldest first.
///
/// # Panics
/// When the node has no journal.
pub fn segments(cluster: &Cluster, node: &str) -> Vec<PathBuf> {
    segments_of(cluster, node, "journal")
}

/// The segments of a node's journal of the logs that it is primary of.
///
/// # Panics
/// When the node has no journal.
pub fn own_segments(cluster: &Cluster, node: &str) -> Vec<PathBuf> {
    segments_of(cluster, node, "primary-journal")
}

fn segments_of(cluster: &Cluster, node: &str, folder: &str) -> Vec<PathBuf> {
    let journal = cluster.node_path(node).join("data").join(folder);
    let files = std::fs::read_dir(journal).expect("list the journal");
    let mut segments: Vec<PathBuf> = files
        .map(|file| file.expect("list the journal").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "seg"))
        .collect();
    segments.sort();
    segments
}

/// Where the used part of a segment ends.
///
/// # Panics
/// When it cannot be read.
pub fn used_bytes(segment: &PathBuf) -> usize {
    let bytes = std::fs::read(segment).expect("read a segment");
    let used = bytes.iter().rposition(|byte| *byte != 0);
    used.map_or(HEADER_BYTES, |last| last + 1)
}

/// Flips one bit of a record, about as far into the used part as `percent` says, and tells where.
///
/// # Panics
/// When the segment has no records.
pub fn flip_bit(segment: &PathBuf, percent: usize) -> usize {
    let records = used_bytes(segment) - HEADER_BYTES;
    flip_bit_from(segment, HEADER_BYTES + records * percent / 100)
}

/// Flips one bit of a record that is about in the middle before this place.
///
/// # Panics
/// When the segment has no records there.
pub fn flip_bit_before(segment: &PathBuf, place: usize) -> usize {
    flip_bit_from(segment, HEADER_BYTES + (place - HEADER_BYTES) / 2)
}

fn flip_bit_from(segment: &PathBuf, from: usize) -> usize {
    let bytes = std::fs::read(segment).expect("read a segment");
    // Between records there are zeros, which no checksum covers.
    let found = (from..used_bytes(segment)).find(|at| bytes[*at] != 0);
    let at = found.expect("a record");
    let file = OpenOptions::new().write(true).open(segment).expect("open");
    file.write_all_at(&[bytes[at] ^ 1], at as u64)
        .expect("write");
    at
}

/// Cuts off the last quarter of what the file holds, synced and acked as it was.
///
/// # Panics
/// When the file cannot be cut.
pub fn cut_last_quarter(segment: &PathBuf) {
    let file = OpenOptions::new().write(true).open(segment).expect("open");
    let kept = HEADER_BYTES + (used_bytes(segment) - HEADER_BYTES) / 4 * 3;
    file.set_len(kept as u64).expect("cut");
}

/// Writes bytes that are no records behind the used part.
///
/// # Panics
/// When the file cannot be written.
pub fn append_garbage(segment: &PathBuf) {
    let file = OpenOptions::new().write(true).open(segment).expect("open");
    let garbage: Vec<u8> = (0..4000u32).map(|n| (n * 7 + 1) as u8).collect();
    let at = used_bytes(segment).next_multiple_of(8);
    file.write_all_at(&garbage, at as u64).expect("write");
}
