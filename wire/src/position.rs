//! Where in a log: `Lsn`, `Epoch`, their pair, bookmarks, commit times. Checked arithmetic lives
//! here.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Numbers of entries from here on are refused in messages and records: no log gets as far, and
/// from whatever is taken there is room to count on.
const LSN_LIMIT: u64 = 1 << 63;
/// The same of epochs.
const EPOCH_LIMIT: u32 = 1 << 31;

/// A number that no log gets to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0} is beyond what any log gets to")]
pub struct OutOfReach(u64);

/// Position of an entry in one database's log: 1, 2, 3 … without gaps. Zero is before the first.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(try_from = "u64")]
pub struct Lsn(u64);

impl Lsn {
    /// Before the first entry.
    pub const ZERO: Self = Self(0);
    /// After all entries: no log gets as far. What comes from outside must lie before it, so that
    /// there is a position after that.
    pub const MAX: Self = Self(u64::MAX);

    /// The position with this number.
    pub const fn new(number: u64) -> Self {
        Self(number)
    }

    /// The number.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The position after this one.
    ///
    /// # Panics
    /// When 2^64 entries have been written; at a million a second that is half a million years.
    pub const fn next(self) -> Self {
        match self.0.checked_add(1) {
            Some(number) => Self(number),
            None => panic!("lsn overflow"),
        }
    }

    /// The position before this one, if there is one.
    pub const fn previous(self) -> Option<Self> {
        match self.0.checked_sub(1) {
            Some(number) => Some(Self(number)),
            None => None,
        }
    }
}

impl TryFrom<u64> for Lsn {
    type Error = OutOfReach;

    fn try_from(number: u64) -> Result<Self, OutOfReach> {
        match number < LSN_LIMIT {
            true => Ok(Self(number)),
            false => Err(OutOfReach(number)),
        }
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Fencing number of a database's log; one primary per epoch. Zero is before the first claim.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(try_from = "u32")]
pub struct Epoch(u32);

impl Epoch {
    /// Before the first claim.
    pub const ZERO: Self = Self(0);

    /// The epoch with this number.
    pub const fn new(number: u32) -> Self {
        Self(number)
    }

    /// The number.
    pub const fn get(self) -> u32 {
        self.0
    }

    /// The epoch after this one.
    ///
    /// # Panics
    /// After 2^32 claims of one database.
    pub const fn next(self) -> Self {
        match self.0.checked_add(1) {
            Some(number) => Self(number),
            None => panic!("epoch overflow"),
        }
    }
}

impl TryFrom<u32> for Epoch {
    type Error = OutOfReach;

    fn try_from(number: u32) -> Result<Self, OutOfReach> {
        match number < EPOCH_LIMIT {
            true => Ok(Self(number)),
            false => Err(OutOfReach(number.into())),
        }
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// An entry's full identity. Ordered by epoch first: that order decides who the donor is.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
pub struct LogPosition {
    /// Epoch in which the entry was written.
    pub epoch: Epoch,
    /// Its position.
    pub lsn: Lsn,
}

impl LogPosition {
    /// Before the first entry.
    pub const ZERO: Self = Self {
        epoch: Epoch::ZERO,
        lsn: Lsn::ZERO,
    };

    /// The position made of both.
    pub const fn new(epoch: Epoch, lsn: Lsn) -> Self {
        Self { epoch, lsn }
    }
}

impl fmt::Display for LogPosition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "lsn {} of epoch {}", self.lsn, self.epoch)
    }
}

/// One run of a log: all entries from `first_lsn` up to the next run were written in `epoch`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct EpochRun {
    /// The epoch of the run.
    pub epoch: Epoch,
    /// Its first entry (an epoch start).
    pub first_lsn: Lsn,
}

/// Printable, text-sortable position of a commit: `LSN-EPOCH`, 16 and 8 lower-case hex digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bookmark {
    /// The commit's position.
    pub lsn: Lsn,
    /// The epoch it was written in.
    pub epoch: Epoch,
}

/// The text is not a bookmark.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("bookmark {0:?}: expected 16 hex digits, '-', 8 hex digits")]
pub struct InvalidBookmark(String);

impl From<LogPosition> for Bookmark {
    fn from(position: LogPosition) -> Self {
        Self {
            lsn: position.lsn,
            epoch: position.epoch,
        }
    }
}

impl fmt::Display for Bookmark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}-{:08x}", self.lsn.get(), self.epoch.get())
    }
}

impl FromStr for Bookmark {
    type Err = InvalidBookmark;

    fn from_str(text: &str) -> Result<Self, InvalidBookmark> {
        let invalid = || InvalidBookmark(text.to_owned());
        let (lsn, epoch) = text.split_once('-').ok_or_else(invalid)?;
        let legal = |digits: &str, length: usize| {
            digits.len() == length
                && digits
                    .bytes()
                    .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
        };
        if !legal(lsn, 16) || !legal(epoch, 8) {
            return Err(invalid());
        }
        Ok(Self {
            lsn: Lsn::new(u64::from_str_radix(lsn, 16).map_err(|_| invalid())?),
            epoch: Epoch::new(u32::from_str_radix(epoch, 16).map_err(|_| invalid())?),
        })
    }
}

/// Microseconds since the Unix epoch, UTC. Set by the primary; never goes back within a log.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
pub struct Timestamp(i64);

impl Timestamp {
    /// The time this many microseconds after the Unix epoch.
    pub const fn from_micros(micros: i64) -> Self {
        Self(micros)
    }

    /// Microseconds since the Unix epoch.
    pub const fn as_micros(self) -> i64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_that_no_log_gets_to_are_refused_where_they_come_in() {
        // Broken: counting on from what a peer or a client says could end the sidecar.
        let last = (Lsn::new(LSN_LIMIT - 1), Epoch::new(EPOCH_LIMIT - 1));
        let bytes = postcard::to_stdvec(&last).unwrap();
        assert_eq!(postcard::from_bytes(&bytes), Ok(last));
        for number in [LSN_LIMIT, u64::MAX] {
            let bytes = postcard::to_stdvec(&Lsn::new(number)).unwrap();
            assert!(postcard::from_bytes::<Lsn>(&bytes).is_err(), "{number}");
        }
        for number in [EPOCH_LIMIT, u32::MAX] {
            let bytes = postcard::to_stdvec(&Epoch::new(number)).unwrap();
            assert!(postcard::from_bytes::<Epoch>(&bytes).is_err(), "{number}");
        }
    }

    #[test]
    fn bookmarks_sort_as_text_the_way_they_sort_as_positions() {
        let low = Bookmark {
            lsn: Lsn::new(9),
            epoch: Epoch::new(300),
        };
        let high = Bookmark {
            lsn: Lsn::new(16),
            epoch: Epoch::new(2),
        };
        assert!(low < high);
        assert!(low.to_string() < high.to_string());
        assert_eq!(high.to_string(), "0000000000000010-00000002");
        assert_eq!(high.to_string().parse(), Ok(high));
    }

    #[test]
    fn bookmarks_refuse_other_spellings() {
        for bad in [
            "",
            "10-2",
            "0000000000000010-0000000A",
            "+000000000000010-00000002",
        ] {
            assert!(bad.parse::<Bookmark>().is_err(), "{bad}");
        }
    }

    #[test]
    fn positions_order_by_epoch_before_lsn() {
        let longer = LogPosition::new(Epoch::new(1), Lsn::new(9));
        let newer = LogPosition::new(Epoch::new(2), Lsn::new(3));
        assert!(newer > longer);
    }
}
