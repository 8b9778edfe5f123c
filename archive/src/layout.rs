//! Object keys: where the chunks and snapshots of a log stand in a store.
//!
//! ```text
//! databases/<name>/<database id>/chunks/<first lsn>-<last lsn>-<last epoch>-<last time>.chunk
//! databases/<name>/<database id>/snapshots/<lsn>-<epoch>-<time>.snapshot
//! ```
//!
//! Numbers are lower-case hex of fixed width, so that keys sort as positions do and a listing is
//! the index. A name is percent-encoded, never used as a path; one that is longer than a file name
//! may be is cut into pieces, each but the last ending in `~` (which is itself always encoded).

use durovfs_wire::{DatabaseId, Epoch, LogPosition, Lsn, Timestamp};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};

/// Everything of ours stands below this folder.
pub const DATABASES_FOLDER: &str = "databases/";
/// Longest encoded name. S3 allows keys of 1024 bytes; the rest is for prefix, ids and positions.
pub const MAX_ENCODED_NAME_BYTES: usize = 700;
/// Longest piece of an encoded name: file systems allow names of 255 bytes.
const MAX_PIECE_BYTES: usize = 200;
/// Ends each piece of a name that goes on in the next.
const CONTINUED: char = '~';
const CHUNKS: &str = "chunks";
const SNAPSHOTS: &str = "snapshots";
const CHUNK_SUFFIX: &str = ".chunk";
const SNAPSHOT_SUFFIX: &str = ".snapshot";
const ENCODED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.');

/// The database's name cannot stand in a key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidName {
    /// A name has at least one character.
    #[error("a database's name is not empty")]
    Empty,
    /// The encoded name is too long for a key.
    #[error("database name of {got} bytes in percent-encoding exceeds {MAX_ENCODED_NAME_BYTES}")]
    TooLong {
        /// Its length.
        got: usize,
    },
}

/// What a chunk's key says: the entries it holds. Sorts by first, then last entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkRange {
    /// First entry.
    pub first_lsn: Lsn,
    /// Last entry.
    pub last_lsn: Lsn,
    /// Epoch of the last entry.
    pub last_epoch: Epoch,
    /// Time of the last entry.
    pub last_time: Timestamp,
}

impl ChunkRange {
    /// Position of the last entry.
    pub const fn last_position(&self) -> LogPosition {
        LogPosition::new(self.last_epoch, self.last_lsn)
    }
}

/// What a snapshot's key says: the transaction that it is the image after. Sorts by position.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SnapshotPoint {
    /// The transaction.
    pub lsn: Lsn,
    /// Its epoch.
    pub epoch: Epoch,
    /// Its commit time.
    pub time: Timestamp,
}

impl SnapshotPoint {
    /// Position of the transaction.
    pub const fn position(&self) -> LogPosition {
        LogPosition::new(self.epoch, self.lsn)
    }
}

/// What an object is, by the last part of its key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ObjectName {
    /// A chunk.
    Chunk(ChunkRange),
    /// A snapshot.
    Snapshot(SnapshotPoint),
}

/// A key, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParsedKey {
    /// Name of the database.
    pub name: String,
    /// Its log.
    pub database: DatabaseId,
    /// The object.
    pub object: ObjectName,
}

/// Folder of all logs with this name, with a slash at the end.
///
/// # Errors
/// When the name is empty or too long.
pub fn name_folder(name: &str) -> Result<String, InvalidName> {
    if name.is_empty() {
        return Err(InvalidName::Empty);
    }
    let mut encoded = utf8_percent_encode(name, ENCODED).to_string();
    // A leading dot hides a file, and "." and ".." are no names at all.
    if encoded.starts_with('.') {
        encoded.replace_range(..1, "%2E");
    }
    if encoded.len() > MAX_ENCODED_NAME_BYTES {
        return Err(InvalidName::TooLong { got: encoded.len() });
    }
    let mut folder = DATABASES_FOLDER.to_owned();
    let mut rest = encoded.as_str();
    while rest.len() > MAX_PIECE_BYTES {
        // The encoding is ASCII, so any cut is at a character.
        let (piece, after) = rest.split_at(MAX_PIECE_BYTES);
        folder.push_str(piece);
        folder.push(CONTINUED);
        folder.push('/');
        rest = after;
    }
    folder.push_str(rest);
    folder.push('/');
    Ok(folder)
}

/// Folder of one log, with a slash at the end.
///
/// # Errors
/// When the name is empty or too long.
pub fn log_folder(name: &str, database: DatabaseId) -> Result<String, InvalidName> {
    Ok(format!("{}{database}/", name_folder(name)?))
}

/// Key of a chunk.
///
/// # Errors
/// When the name is empty or too long.
pub fn chunk_key(name: &str, id: DatabaseId, range: &ChunkRange) -> Result<String, InvalidName> {
    Ok(format!(
        "{}{CHUNKS}/{:016x}-{:016x}-{:08x}-{:016x}{CHUNK_SUFFIX}",
        log_folder(name, id)?,
        range.first_lsn.get(),
        range.last_lsn.get(),
        range.last_epoch.get(),
        time_to_key(range.last_time),
    ))
}

/// Key of a snapshot.
///
/// # Errors
/// When the name is empty or too long.
pub fn snapshot_key(
    name: &str,
    id: DatabaseId,
    point: &SnapshotPoint,
) -> Result<String, InvalidName> {
    Ok(format!(
        "{}{SNAPSHOTS}/{:016x}-{:08x}-{:016x}{SNAPSHOT_SUFFIX}",
        log_folder(name, id)?,
        point.lsn.get(),
        point.epoch.get(),
        time_to_key(point.time),
    ))
}

/// Takes a key apart; none when it is no object of ours.
pub fn parse_key(key: &str) -> Option<ParsedKey> {
    let (name, rest) = split_name(key.strip_prefix(DATABASES_FOLDER)?)?;
    let mut parts = rest.split('/');
    let (id, folder, file) = (parts.next()?, parts.next()?, parts.next()?);
    if parts.next().is_some() {
        return None;
    }
    let object = match folder {
        CHUNKS => ObjectName::Chunk(parse_range(file.strip_suffix(CHUNK_SUFFIX)?)?),
        SNAPSHOTS => ObjectName::Snapshot(parse_point(file.strip_suffix(SNAPSHOT_SUFFIX)?)?),
        _ => return None,
    };
    Some(ParsedKey {
        name,
        database: id.parse().ok()?,
        object,
    })
}

/// Joins the pieces of the name at the front of `text`; gives the name and what follows it.
pub fn split_name(text: &str) -> Option<(String, &str)> {
    let mut encoded = String::new();
    let mut rest = text;
    loop {
        let (piece, after) = rest.split_once('/')?;
        rest = after;
        match piece.strip_suffix(CONTINUED) {
            Some(start) if encoded.len() <= MAX_ENCODED_NAME_BYTES => encoded.push_str(start),
            Some(_) => return None,
            None => {
                encoded.push_str(piece);
                break;
            }
        }
    }
    let name = percent_decode_str(&encoded)
        .decode_utf8()
        .ok()?
        .into_owned();
    (!name.is_empty()).then_some((name, rest))
}

// The sign bit is flipped, so that times sort as text even before 1970.
fn time_to_key(time: Timestamp) -> u64 {
    (time.as_micros() as u64) ^ (1 << 63)
}

fn time_from_key(key: u64) -> Timestamp {
    Timestamp::from_micros((key ^ (1 << 63)) as i64)
}

fn parse_range(text: &str) -> Option<ChunkRange> {
    let mut numbers = text.split('-');
    let range = ChunkRange {
        first_lsn: Lsn::new(hex::<16>(numbers.next()?)?),
        last_lsn: Lsn::new(hex::<16>(numbers.next()?)?),
        last_epoch: Epoch::new(u32::try_from(hex::<8>(numbers.next()?)?).ok()?),
        last_time: time_from_key(hex::<16>(numbers.next()?)?),
    };
    let ordered = Lsn::ZERO < range.first_lsn && range.first_lsn <= range.last_lsn;
    let legal = ordered && range.last_lsn < Lsn::MAX;
    (legal && numbers.next().is_none()).then_some(range)
}

fn parse_point(text: &str) -> Option<SnapshotPoint> {
    let mut numbers = text.split('-');
    let point = SnapshotPoint {
        lsn: Lsn::new(hex::<16>(numbers.next()?)?),
        epoch: Epoch::new(u32::try_from(hex::<8>(numbers.next()?)?).ok()?),
        time: time_from_key(hex::<16>(numbers.next()?)?),
    };
    let legal = Lsn::ZERO < point.lsn && point.lsn < Lsn::MAX;
    (legal && numbers.next().is_none()).then_some(point)
}

fn hex<const DIGITS: usize>(text: &str) -> Option<u64> {
    let legal = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    if text.len() != DIGITS || !text.bytes().all(legal) {
        return None;
    }
    u64::from_str_radix(text, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: DatabaseId = DatabaseId::from_bytes([0x5a; 16]);

    #[test]
    fn a_key_that_no_entry_can_follow_is_none_of_ours() {
        // Broken: one stray object would stop whoever asks how far the archive reaches.
        let first_lsn = Lsn::new(1);
        for (last_lsn, is_ours) in [(u64::MAX - 1, true), (u64::MAX, false)] {
            let (last_lsn, epoch, time) = (Lsn::new(last_lsn), Epoch::ZERO, Timestamp::default());
            let range = ChunkRange {
                first_lsn,
                last_lsn,
                last_epoch: epoch,
                last_time: time,
            };
            let lsn = last_lsn;
            let point = SnapshotPoint { lsn, epoch, time };
            let chunk = chunk_key("a", ID, &range).unwrap();
            let snapshot = snapshot_key("a", ID, &point).unwrap();
            assert_eq!(parse_key(&chunk).is_some(), is_ours, "{chunk}");
            assert_eq!(parse_key(&snapshot).is_some(), is_ours, "{snapshot}");
        }
    }

    fn range(first: u64, last: u64) -> ChunkRange {
        ChunkRange {
            first_lsn: Lsn::new(first),
            last_lsn: Lsn::new(last),
            last_epoch: Epoch::new(7),
            last_time: Timestamp::from_micros(1_700_000_000_000_000),
        }
    }

    // Broken: a database whose path is odd could not be found again, or would write elsewhere.
    #[test]
    fn any_name_comes_back_from_its_key_and_stays_below_its_folder() {
        let long = "/very/long".repeat(50);
        let names = [
            "/home/a b/app.db",
            "..",
            ".",
            "../../etc/passwd",
            "ü~%2F/",
            "a\0b",
            &long,
        ];
        for name in names {
            let key = chunk_key(name, ID, &range(1, 9)).unwrap();
            for piece in key.split('/') {
                assert!(
                    !piece.is_empty() && piece.len() <= 255 && !piece.starts_with('.'),
                    "{key}"
                );
            }
            assert!(key.is_ascii() && key.len() < 900, "{key}");
            let expected = ObjectName::Chunk(range(1, 9));
            let parsed = parse_key(&key).unwrap();
            assert_eq!(
                parsed,
                ParsedKey {
                    name: name.into(),
                    database: ID,
                    object: expected
                }
            );
        }
        assert_eq!(name_folder(""), Err(InvalidName::Empty));
        assert!(matches!(
            name_folder(&"/".repeat(400)),
            Err(InvalidName::TooLong { .. })
        ));
    }

    // Broken: one database's listing would hold another's chunks.
    #[test]
    fn no_name_folder_is_the_prefix_of_anothers() {
        let names = [
            "a",
            "a/b",
            "a~",
            &"x".repeat(200),
            &"x".repeat(201),
            &"x".repeat(400),
        ];
        let folders: Vec<_> = names
            .iter()
            .map(|name| name_folder(name).unwrap())
            .collect();
        for (i, one) in folders.iter().enumerate() {
            for (j, other) in folders.iter().enumerate() {
                assert!(i == j || !other.starts_with(one.as_str()), "{one} {other}");
            }
        }
    }

    // Broken: a listing in key order would not be in log order.
    #[test]
    fn keys_sort_as_positions_do() {
        let mut keys: Vec<_> = [range(16, 20), range(9, 15), range(1, 8), range(256, 300)]
            .iter()
            .map(|range| chunk_key("a", ID, range).unwrap())
            .collect();
        keys.sort();
        let firsts: Vec<_> = keys
            .iter()
            .map(|key| match parse_key(key).unwrap().object {
                ObjectName::Chunk(range) => range.first_lsn.get(),
                ObjectName::Snapshot(_) => unreachable!(),
            })
            .collect();
        assert_eq!(firsts, [1, 9, 16, 256]);
    }

    // Broken: somebody's stray file in the bucket would be taken for history.
    #[test]
    fn other_keys_are_not_ours() {
        let good = chunk_key("a", ID, &range(1, 2)).unwrap();
        assert!(parse_key(&good).is_some());
        for bad in [
            good.replace(".chunk", ".chunk.tmp"),
            good.replace("chunks", "chunk"),
            good.replace("databases", "database"),
            good.replace("000001-", "000009-"), // first above last
            good.replace("5a5a", "5a5"),
            format!("{good}/x"),
            "databases/".into(),
        ] {
            assert_eq!(parse_key(&bad), None, "{bad}");
        }
    }

    #[test]
    fn snapshots_parse_back_and_so_do_times_before_1970() {
        let point = SnapshotPoint {
            lsn: Lsn::new(77),
            epoch: Epoch::new(3),
            time: Timestamp::from_micros(-5),
        };
        let parsed = parse_key(&snapshot_key("x", ID, &point).unwrap()).unwrap();
        assert_eq!(parsed.object, ObjectName::Snapshot(point));
    }
}
