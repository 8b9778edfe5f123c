//! The resolution: the file `<database>-durovfs-resolve`, in which `durovfs resolve --keep local`
//! leaves its decision. The next open of the database carries it out, and removes the file.
//!
//! | offset | bytes | |
//! |---|---|---|
//! | 0 | 8 | magic `DURORSLV` |
//! | 8 | 4 | version, 1 |
//! | 12 | 4 | CRC-32 of bytes 16..44 |
//! | 16 | 16 | log id |
//! | 32 | 8 + 4 | the log's version that is given up: lsn, epoch of its last transaction |
//!
//! Numbers are little-endian.

use crate::{DatabaseId, Epoch, LogPosition, Lsn};

/// What is added to a database's path to name its resolution.
pub const RESOLUTION_SUFFIX: &str = "-durovfs-resolve";
/// Size of the file.
pub const RESOLUTION_BYTES: usize = 44;

const MAGIC: &[u8; 8] = b"DURORSLV";
const VERSION: u32 = 1;

/// The local file counts, and becomes the log's next transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resolution {
    /// The log.
    pub database: DatabaseId,
    /// Its last transaction when the decision was made; zero when it had none. A log that went on
    /// since has something that nobody decided to give up.
    pub given_up: LogPosition,
}

/// The file is no resolution, or a damaged one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidResolution {
    /// Another size, or another beginning.
    #[error("not a resolution")]
    Foreign,
    /// Of a program that this one does not know.
    #[error("version {0} of resolutions is not known here")]
    Version(u32),
    /// Its checksum is wrong.
    #[error("the resolution is damaged")]
    Damaged,
}

impl Resolution {
    /// The bytes of the file.
    pub fn encode(&self) -> [u8; RESOLUTION_BYTES] {
        let mut bytes = [0u8; RESOLUTION_BYTES];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[16..32].copy_from_slice(self.database.as_bytes());
        bytes[32..40].copy_from_slice(&self.given_up.lsn.get().to_le_bytes());
        bytes[40..].copy_from_slice(&self.given_up.epoch.get().to_le_bytes());
        let crc = crc32fast::hash(&bytes[16..]);
        bytes[12..16].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads the bytes of the file.
    ///
    /// # Errors
    /// When they are none of a resolution.
    pub fn decode(bytes: &[u8]) -> Result<Self, InvalidResolution> {
        let bytes: &[u8; RESOLUTION_BYTES] =
            bytes.try_into().map_err(|_| InvalidResolution::Foreign)?;
        if &bytes[..8] != MAGIC {
            return Err(InvalidResolution::Foreign);
        }
        let word = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        if word(8) != VERSION {
            return Err(InvalidResolution::Version(word(8)));
        }
        if word(12) != crc32fast::hash(&bytes[16..]) {
            return Err(InvalidResolution::Damaged);
        }
        let mut id = [0u8; 16];
        id.copy_from_slice(&bytes[16..32]);
        let lsn = u64::from(word(32)) | u64::from(word(36)) << 32;
        Ok(Self {
            database: DatabaseId::from_bytes(id),
            given_up: LogPosition::new(Epoch::new(word(40)), Lsn::new(lsn)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_decided_is_read_back_and_nothing_else_is() {
        // Broken: a torn or foreign file would have a local file replace what the log has.
        let resolution = Resolution {
            database: DatabaseId::from_bytes([7; 16]),
            given_up: LogPosition::new(Epoch::new(3), Lsn::new(0x1_0000_0002)),
        };
        let bytes = resolution.encode();
        assert_eq!(Resolution::decode(&bytes), Ok(resolution));
        for at in 0..RESOLUTION_BYTES {
            let mut damaged = bytes;
            damaged[at] ^= 0x10;
            assert!(Resolution::decode(&damaged).is_err(), "byte {at}");
            assert_eq!(
                Resolution::decode(&bytes[..at]),
                Err(InvalidResolution::Foreign)
            );
        }
        let mut newer = bytes;
        newer[8] = 2;
        let error = Resolution::decode(&newer).unwrap_err();
        assert_eq!(error, InvalidResolution::Version(2));
    }
}
