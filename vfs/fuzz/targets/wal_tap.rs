//! The WAL tap under any list of operations: writes at any offset in any pieces, frames as SQLite
//! writes them and almost so, reads, truncations, refusals.
//!
//! What must hold: no panic; memory bounded by what the tap promises; what SQLite reads back is
//! what it wrote; and no write that the tap let through makes a transaction valid.

#![no_main]

use arbitrary::Arbitrary;
use durovfs_vfs::error::Refusal;
use durovfs_vfs::file::BaseFile;
use durovfs_vfs::wal_tap::{Step, WalTap};
use durovfs_wire::entry::MAX_PART_PAYLOAD_BYTES;
use libfuzzer_sys::fuzz_target;
use std::cell::RefCell;

const PAGE: usize = 512;
const FRAME: usize = PAGE + 24;
/// Of the file: far more than any list of operations needs.
const FILE_BYTES_MAX: usize = 1 << 18;
const OPERATIONS_MAX: usize = 200;

#[derive(Arbitrary, Debug)]
enum Operation {
    /// A WAL header; `salt` tells generations apart.
    Header {
        salt: u8,
    },
    /// A frame of the chain, at a frame's place.
    Frame {
        at: u8,
        page: u8,
        commit: bool,
        fill: u8,
        part: Part,
        flaw: Flaw,
    },
    /// Any bytes anywhere.
    Write {
        offset: u32,
        bytes: Vec<u8>,
    },
    Read {
        offset: u16,
        length: u16,
    },
    Truncate {
        size: u32,
    },
    Acknowledge,
    Abandon,
    /// Another connection takes its place.
    Forget,
}

#[derive(Arbitrary, Debug, Clone, Copy)]
enum Part {
    Whole,
    Header,
    Page,
    Split(u16),
}

#[derive(Arbitrary, Debug, Clone, Copy, PartialEq)]
enum Flaw {
    None,
    NoSalts,
    Checksum,
}

#[derive(Default)]
struct File(RefCell<Vec<u8>>);

impl BaseFile for File {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<usize, Refusal> {
        let bytes = self.0.borrow();
        let start = (offset as usize).min(bytes.len());
        let count = buffer.len().min(bytes.len() - start);
        buffer[..count].copy_from_slice(&bytes[start..start + count]);
        buffer[count..].fill(0);
        Ok(count)
    }

    fn write_at(&self, data: &[u8], offset: u64) -> Result<(), Refusal> {
        let mut bytes = self.0.borrow_mut();
        let end = offset as usize + data.len();
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        bytes[offset as usize..end].copy_from_slice(data);
        Ok(())
    }

    fn truncate(&self, size: u64) -> Result<(), Refusal> {
        self.0.borrow_mut().resize(size as usize, 0);
        Ok(())
    }

    fn sync(&self) -> Result<(), Refusal> {
        Ok(())
    }

    fn size(&self) -> Result<u64, Refusal> {
        Ok(self.0.borrow().len() as u64)
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    let mut four = [0u8; 4];
    four.copy_from_slice(&bytes[at..at + 4]);
    u32::from_be_bytes(four)
}

fn sum(mut s: (u32, u32), bytes: &[u8]) -> (u32, u32) {
    for pair in bytes.chunks_exact(8) {
        s.0 =
            s.0.wrapping_add(word(pair, 0).swap_bytes())
                .wrapping_add(s.1);
        s.1 =
            s.1.wrapping_add(word(pair, 4).swap_bytes())
                .wrapping_add(s.0);
    }
    s
}

/// Salts, and frames up to the last commit, of a WAL with pages of [`PAGE`].
fn recovered(bytes: &[u8]) -> Option<((u32, u32), usize)> {
    let head = bytes.get(..32)?;
    let mut chain = sum((0, 0), &head[..24]);
    let is_header = word(head, 0) == 0x377f_0682 && word(head, 8) as usize == PAGE;
    if !is_header || chain != (word(head, 24), word(head, 28)) {
        return None;
    }
    let salts = (word(head, 16), word(head, 20));
    let mut committed = 0;
    for (index, frame) in bytes[32..].chunks_exact(FRAME).enumerate() {
        chain = sum(sum(chain, &frame[..8]), &frame[24..]);
        let claimed = (word(frame, 16), word(frame, 20));
        if word(frame, 0) == 0 || (word(frame, 8), word(frame, 12)) != salts || claimed != chain {
            break;
        }
        if word(frame, 4) != 0 {
            committed = index + 1;
        }
    }
    Some((salts, committed))
}

fn header(salt: u8) -> Vec<u8> {
    let words = [0x377f_0682, 3_007_000, PAGE as u32, 0, u32::from(salt), 7];
    let mut bytes: Vec<u8> = words
        .iter()
        .flat_map(|word: &u32| word.to_be_bytes())
        .collect();
    let chain = sum((0, 0), &bytes);
    bytes.extend(
        [chain.0, chain.1]
            .iter()
            .flat_map(|word| word.to_be_bytes()),
    );
    bytes
}

/// A frame that continues the chain of what SQLite believes to be in the file.
fn frame(believed: &[u8], at: usize, page: u8, commit: bool, fill: u8, flaw: Flaw) -> Vec<u8> {
    let before = match at {
        0 => 24,
        at => 32 + (at - 1) * FRAME + 16,
    };
    let mut padded = believed.to_vec();
    padded.resize(padded.len().max(before + 8).max(32), 0);
    let image = vec![fill; PAGE];
    let mut bytes = u32::from(page).to_be_bytes().to_vec();
    bytes.extend_from_slice(&(u32::from(commit) * 9).to_be_bytes());
    let start = (word(&padded, before), word(&padded, before + 4));
    let mut chain = sum(sum(start, &bytes), &image);
    let mut salts = (word(&padded, 16), word(&padded, 20));
    match flaw {
        Flaw::None => {}
        Flaw::NoSalts => (salts, chain) = ((0, 0), (0, 0)),
        Flaw::Checksum => chain.0 ^= 1,
    }
    let words = [salts.0, salts.1, chain.0, chain.1];
    bytes.extend(words.iter().flat_map(|word| word.to_be_bytes()));
    bytes.extend_from_slice(&image);
    bytes
}

#[derive(Default)]
struct Bench {
    tap: WalTap,
    file: File,
    /// What SQLite has written, held bytes included.
    believed: File,
    /// The outcome of a commit is open: it is acknowledged next, or it is refused.
    is_open: bool,
}

impl Bench {
    fn write(&mut self, offset: usize, data: &[u8]) {
        if offset + data.len() > FILE_BYTES_MAX {
            return;
        }
        let before = recovered(&self.file.0.borrow());
        let Ok(step) = self.tap.write(&self.file, offset as u64, data) else {
            return self.abandon();
        };
        let mut ready_bytes = 0;
        for payload in self.tap.take_ready() {
            assert!(payload.len() <= MAX_PART_PAYLOAD_BYTES);
            ready_bytes += payload.len();
        }
        assert!(ready_bytes <= data.len() + 2 * MAX_PART_PAYLOAD_BYTES);
        let _ = self.believed.write_at(data, offset as u64);
        let (pieces, completes) = match step {
            Step::Pass => (vec![(offset as u64, data.to_vec())], false),
            Step::Pieces(pieces) => (pieces, false),
            Step::Complete(pieces) => (pieces, true),
            Step::Repeat => return self.repeat(),
        };
        for (at, bytes) in pieces {
            let _ = self.file.write_at(&bytes, at);
        }
        // In a new WAL nothing is known of what stands behind the header; SQLite's salts see to it.
        let after = recovered(&self.file.0.borrow());
        if let (Some(before), Some(after)) = (before, after)
            && before.0 == after.0
            && offset >= 32
        {
            assert!(after.1 <= before.1, "valid before it was acknowledged");
        }
        if completes {
            let completion = self.tap.take_completion().expect("what is to be committed");
            assert!(completion.payload.len() <= MAX_PART_PAYLOAD_BYTES);
            self.is_open = true;
        }
    }

    /// A copy of the frame last committed: one more frame, and nothing else. Where that frame
    /// itself is not valid, because what should come before it is not there, neither is the copy.
    fn repeat(&mut self) {
        let before = recovered(&self.file.0.borrow());
        let held = self.tap.held().map(|(at, bytes)| (at, bytes.to_vec()));
        let (offset, bytes) = held.expect("the copy");
        let _ = self.file.write_at(&bytes, offset);
        let _ = self.believed.write_at(&bytes, offset);
        self.tap.acknowledge();
        let after = recovered(&self.file.0.borrow());
        let (salts, committed) = before.expect("a WAL");
        let follows = offset as usize == 32 + committed * FRAME;
        let longer = committed + usize::from(follows);
        assert_eq!(after, Some((salts, longer)), "a commit and its copy");
    }

    fn abandon(&mut self) {
        self.tap.abandon();
        self.believed
            .0
            .borrow_mut()
            .clone_from(&self.file.0.borrow());
    }

    fn acknowledge(&mut self) {
        let held = self
            .tap
            .held()
            .map(|(offset, bytes)| (offset, bytes.to_vec()));
        if let Some((offset, bytes)) = held {
            assert!(bytes.len() <= FRAME);
            let _ = self.file.write_at(&bytes, offset);
        }
        self.tap.acknowledge();
        self.believed
            .0
            .borrow_mut()
            .clone_from(&self.file.0.borrow());
    }

    fn read(&self, offset: usize, length: usize) {
        let mut expected = vec![0u8; length];
        let mut found = vec![0u8; length];
        let _ = self.believed.read_at(&mut expected, offset as u64);
        let _ = self.file.read_at(&mut found, offset as u64);
        self.tap.overlay(&mut found, offset as u64);
        assert!(
            expected == found,
            "SQLite reads something else than it wrote"
        );
    }

    fn run(&mut self, operation: Operation) {
        let acknowledges = matches!(operation, Operation::Acknowledge);
        if std::mem::take(&mut self.is_open) != acknowledges {
            return self.abandon();
        }
        match operation {
            Operation::Header { salt } => self.write(0, &header(salt)),
            Operation::Frame {
                at,
                page,
                commit,
                fill,
                part,
                flaw,
            } => {
                let at = usize::from(at % 16);
                let believed = self.believed.0.borrow().clone();
                let bytes = frame(&believed, at, page % 8, commit, fill % 3, flaw);
                let offset = 32 + at * FRAME;
                match part {
                    Part::Whole => self.write(offset, &bytes),
                    Part::Header => self.write(offset, &bytes[..24]),
                    Part::Page => self.write(offset + 24, &bytes[24..]),
                    Part::Split(after) => {
                        let after = usize::from(after) % FRAME;
                        self.write(offset, &bytes[..after]);
                        self.write(offset + after, &bytes[after..]);
                    }
                }
            }
            Operation::Write { offset, bytes } => {
                self.write(offset as usize % FILE_BYTES_MAX, &bytes);
            }
            Operation::Read { offset, length } => self.read(offset.into(), length.into()),
            Operation::Truncate { size } => {
                // SQLite truncates a WAL between transactions only.
                self.abandon();
                let size = u64::from(size) % FILE_BYTES_MAX as u64;
                let _ = self.file.truncate(size);
                let _ = self.believed.truncate(size);
            }
            Operation::Acknowledge => self.acknowledge(),
            Operation::Abandon => self.abandon(),
            Operation::Forget => {
                self.abandon();
                self.tap = WalTap::default();
            }
        }
    }
}

fuzz_target!(|operations: Vec<Operation>| {
    let mut bench = Bench::default();
    for operation in operations.into_iter().take(OPERATIONS_MAX) {
        bench.run(operation);
    }
});
