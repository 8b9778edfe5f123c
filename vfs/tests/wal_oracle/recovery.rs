//! SQLite's recovery of a WAL (`walIndexRecover`), written a second time from the file format: what
//! a process that opens the database now would find. Shares no code with the product.

use std::collections::BTreeMap;

/// A frame through which the chain of salts and checksums holds.
#[derive(Debug, Clone, Copy)]
struct Frame {
    page: u32,
    /// Database size after it, of a commit frame; else zero.
    size: u32,
    chain: (u32, u32),
}

/// The WAL's header, when it is valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Header {
    salts: (u32, u32),
    page_size: usize,
    big_endian: bool,
    chain: (u32, u32),
}

/// Bytes of a WAL, and what recovery finds in them; kept up write by write.
#[derive(Debug, Default, Clone)]
pub struct WalImage {
    bytes: Vec<u8>,
    header: Option<Header>,
    frames: Vec<Frame>,
}

/// What is committed in a WAL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Committed {
    pub salts: Option<(u32, u32)>,
    /// Frames up to and with the last commit frame.
    pub frames: usize,
    /// Commit frames among them.
    pub commits: usize,
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn sum(mut s: (u32, u32), bytes: &[u8], big_endian: bool) -> (u32, u32) {
    for pair in bytes.chunks_exact(8) {
        let number = |at: usize| {
            let number: [u8; 4] = pair[at..at + 4].try_into().unwrap();
            match big_endian {
                true => u32::from_be_bytes(number),
                false => u32::from_le_bytes(number),
            }
        };
        s.0 = s.0.wrapping_add(number(0)).wrapping_add(s.1);
        s.1 = s.1.wrapping_add(number(4)).wrapping_add(s.0);
    }
    s
}

impl WalImage {
    pub fn new(bytes: Vec<u8>) -> Self {
        let mut image = Self {
            bytes,
            ..Self::default()
        };
        image.read_header();
        image
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub fn write(&mut self, offset: usize, data: &[u8]) {
        let end = offset + data.len();
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        self.bytes[offset..end].copy_from_slice(data);
        match self.header {
            Some(header) if offset >= 32 => {
                self.frames
                    .truncate((offset - 32) / (24 + header.page_size));
                self.extend();
            }
            _ => self.read_header(),
        }
    }

    pub fn truncate(&mut self, size: usize) {
        self.bytes.resize(size, 0);
        self.read_header();
    }

    fn read_header(&mut self) {
        self.header = None;
        self.frames.clear();
        let Some(head) = self.bytes.get(..32) else {
            return;
        };
        let magic = word(head, 0);
        let big_endian = magic & 1 == 1;
        let chain = sum((0, 0), &head[..24], big_endian);
        let page_size = word(head, 8) as usize;
        if magic & !1 != 0x377f_0682
            || !page_size.is_power_of_two()
            || !(512..=65536).contains(&page_size)
            || word(head, 4) != 3_007_000
            || chain != (word(head, 24), word(head, 28))
        {
            return;
        }
        self.header = Some(Header {
            salts: (word(head, 16), word(head, 20)),
            page_size,
            big_endian,
            chain,
        });
        self.extend();
    }

    fn extend(&mut self) {
        let Some(header) = self.header else {
            return;
        };
        let frame_bytes = 24 + header.page_size;
        let mut chain = self.frames.last().map_or(header.chain, |last| last.chain);
        for frame in self.bytes[32..]
            .chunks_exact(frame_bytes)
            .skip(self.frames.len())
        {
            let (page, salts) = (word(frame, 0), (word(frame, 8), word(frame, 12)));
            chain = sum(chain, &frame[..8], header.big_endian);
            chain = sum(chain, &frame[24..], header.big_endian);
            if page == 0 || salts != header.salts || chain != (word(frame, 16), word(frame, 20)) {
                break;
            }
            self.frames.push(Frame {
                page,
                size: word(frame, 4),
                chain,
            });
        }
    }

    pub fn committed(&self) -> Committed {
        let last = self.frames.iter().rposition(|frame| frame.size != 0);
        Committed {
            salts: self.header.map(|header| header.salts),
            frames: last.map_or(0, |last| last + 1),
            commits: self.frames.iter().filter(|frame| frame.size != 0).count(),
        }
    }

    /// Size of the database after the last commit.
    pub fn database_size(&self) -> Option<u32> {
        let commits = self.frames.iter().rev();
        commits.map(|frame| frame.size).find(|size| *size != 0)
    }

    /// Newest image of each page in the committed frames from `first` on.
    pub fn pages_from(&self, first: usize) -> BTreeMap<u32, Vec<u8>> {
        let page_size = self.header.map_or(0, |header| header.page_size);
        let committed = self.committed().frames;
        let frames = self.frames.iter().enumerate().take(committed).skip(first);
        frames
            .map(|(index, frame)| {
                let start = 32 + index * (24 + page_size) + 24;
                (frame.page, self.bytes[start..start + page_size].to_vec())
            })
            .collect()
    }
}
