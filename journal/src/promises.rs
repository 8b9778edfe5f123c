//! The promises a second time, in a file of their own: a replica that forgets a promise could let
//! two primaries commit, so damage to one file must not take it.
//!
//! The file is replaced as a whole before a promise counts as written; it is read only when the
//! journal is damaged. It may be ahead of the journal by promises that were never answered.

use crate::disk::Disk;
use crate::error::JournalError;
use crate::record::Stored;
use crate::table::Table;
use bytes::BufMut;
use durovfs_wire::ids::{ClaimantId, DatabaseId, ReplicaId};
use durovfs_wire::position::Epoch;
use serde::{Deserialize, Serialize};
use std::io::ErrorKind;

/// Name of the file.
pub(crate) const PROMISES_NAME: &str = "journal-promises";
/// The file that takes its place.
const NEXT_NAME: &str = "journal-promises.tmp";
const MAGIC: [u8; 8] = *b"DUROPROM";
const VERSION: u32 = 2;
/// Magic, version, checksum.
const PREFIX_BYTES: usize = 16;
/// Largest file that is read: the promises of some hundred thousand databases.
const FILE_BYTES_MAX: u64 = 64 << 20;

/// One promise.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct KeptPromise {
    pub database: DatabaseId,
    pub name: String,
    pub epoch: Epoch,
    pub claimant: ClaimantId,
    pub replica: Option<ReplicaId>,
}

impl KeptPromise {
    /// The promise that a record makes, if any.
    pub(crate) fn of_record(stored: &Stored) -> Option<Self> {
        match stored {
            Stored::Promise {
                database,
                name,
                epoch,
                claimant,
                replica,
            } => Some(Self {
                database: *database,
                name: name.clone(),
                epoch: *epoch,
                claimant: *claimant,
                replica: *replica,
            }),
            Stored::State { state, .. } => Table::from_state(state.clone(), None).kept_promise(),
            _ => None,
        }
    }
}

/// Replaces the file. Durable when it returns.
pub(crate) fn write(
    disk: &dyn Disk,
    promises: impl Iterator<Item = KeptPromise>,
) -> Result<(), JournalError> {
    let promises: Vec<KeptPromise> = promises.collect();
    let failed = |e: &std::io::Error| JournalError::io(format!("write {PROMISES_NAME}"), e);
    let body = postcard::to_stdvec(&promises)
        .map_err(|e| failed(&std::io::Error::new(ErrorKind::InvalidData, e)))?;
    let mut bytes = Vec::with_capacity(PREFIX_BYTES + body.len());
    bytes.put_slice(&MAGIC);
    bytes.put_u32_le(VERSION);
    bytes.put_u32_le(crc32fast::hash(&body));
    bytes.put_slice(&body);
    let replaced = disk.create(NEXT_NAME).and_then(|file| {
        file.write_at(&bytes, 0)?;
        file.sync_data()?;
        disk.rename(NEXT_NAME, PROMISES_NAME)?;
        disk.sync_directory()
    });
    replaced.map_err(|e| failed(&e))
}

/// Reads the file; says what is wrong with it.
pub(crate) fn read(disk: &dyn Disk) -> Result<Vec<KeptPromise>, String> {
    let describe = |e: std::io::Error| e.to_string();
    let file = disk.open(PROMISES_NAME).map_err(describe)?;
    let byte_count = file.byte_count().map_err(describe)?;
    if !(PREFIX_BYTES as u64..=FILE_BYTES_MAX).contains(&byte_count) {
        return Err(format!("file of {byte_count} bytes"));
    }
    let mut bytes = vec![0u8; byte_count as usize];
    file.read_at(&mut bytes, 0).map_err(describe)?;
    let (prefix, body) = bytes.split_at(PREFIX_BYTES);
    let number = |at: usize| {
        let bytes = prefix[at..at + 4].iter().rev();
        bytes.fold(0u32, |number, byte| number << 8 | u32::from(*byte))
    };
    if prefix[..8] != MAGIC {
        return Err("no magic".to_owned());
    }
    if number(8) != VERSION {
        return Err(format!(
            "version {}, this program reads {VERSION}",
            number(8)
        ));
    }
    if number(12) != crc32fast::hash(body) {
        return Err("checksum mismatch".to_owned());
    }
    match postcard::take_from_bytes(body) {
        Ok((promises, [])) => Ok(promises),
        Ok(_) => Err("bytes left over".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}
