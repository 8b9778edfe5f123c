//! WHEN, as people write it: a time, a relative time, a bookmark, an LSN.
//!
//! Parsing only. The caller says what time it is now; which commit is meant, the archive says.

use durovfs_wire::{Bookmark, Lsn, Timestamp};
use jiff::tz::TimeZone;
use jiff::{Span, Zoned};

/// A moment in a database's history.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// The newest commit in the archive.
    Latest,
    /// The last commit at or before this time.
    Time(Timestamp),
    /// This commit.
    Bookmark(Bookmark),
    /// The last commit at or before this position.
    Lsn(Lsn),
}

/// The text is no WHEN.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidWhen {
    /// Nothing that it could be.
    #[error(
        "{0:?} is no moment: say latest, a time with its zone (2026-01-31T08:15:00Z), \
         \"5 minutes ago\", a bookmark, or lsn:N"
    )]
    Unknown(String),
    /// A time without its zone means different moments to different people.
    #[error("{0:?} has no zone: end it with Z or an offset such as +02:00")]
    NoZone(String),
    /// A relative time that lies ahead.
    #[error("{0:?} is ahead of now: say \"… ago\"")]
    Future(String),
}

impl When {
    /// Parses a WHEN; `now` is what relative times count from.
    ///
    /// # Errors
    /// When the text is none.
    pub fn parse(text: &str, now: Timestamp) -> Result<Self, InvalidWhen> {
        let trimmed = text.trim();
        let unknown = || InvalidWhen::Unknown(text.to_owned());
        if trimmed.eq_ignore_ascii_case("latest") {
            return Ok(Self::Latest);
        }
        if trimmed.eq_ignore_ascii_case("now") {
            return Ok(Self::Time(now));
        }
        if let Some(number) = trimmed.strip_prefix("lsn:") {
            // Digits only: the number parser would take a sign too.
            let digits = number.bytes().all(|b| b.is_ascii_digit());
            let number = number.parse().ok().filter(|_| digits).ok_or_else(unknown)?;
            return Ok(Self::Lsn(Lsn::new(number)));
        }
        if let Ok(bookmark) = trimmed.parse::<Bookmark>() {
            return Ok(Self::Bookmark(bookmark));
        }
        if let Ok(time) = trimmed.parse::<jiff::Timestamp>() {
            return Ok(Self::Time(floor_micros(time)));
        }
        if trimmed.parse::<jiff::civil::DateTime>().is_ok() {
            return Err(InvalidWhen::NoZone(text.to_owned()));
        }
        let span = trimmed.parse::<Span>().map_err(|_| unknown())?;
        if !span.is_negative() {
            return Err(InvalidWhen::Future(text.to_owned()));
        }
        let now = zoned(now).ok_or_else(unknown)?;
        let then = now.checked_add(span).map_err(|_| unknown())?;
        Ok(Self::Time(floor_micros(then.timestamp())))
    }
}

/// A time as people read it: RFC 3339 in UTC, to the microsecond, so that it names one commit's
/// time exactly.
pub fn format_time(time: Timestamp) -> String {
    match jiff::Timestamp::from_microsecond(time.as_micros()) {
        Ok(time) => format!("{time:.6}"),
        Err(_) => format!("{} µs after 1970", time.as_micros()),
    }
}

/// The wall clock's time, which relative times count from.
pub fn now() -> Timestamp {
    floor_micros(jiff::Timestamp::now())
}

fn zoned(time: Timestamp) -> Option<Zoned> {
    let time = jiff::Timestamp::from_microsecond(time.as_micros()).ok()?;
    Some(time.to_zoned(TimeZone::UTC))
}

// Down, never up: a commit after the moment that was named is never meant.
fn floor_micros(time: jiff::Timestamp) -> Timestamp {
    let nanos = time.as_nanosecond().div_euclid(1000);
    Timestamp::from_micros(i64::try_from(nanos).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Timestamp = Timestamp::from_micros(1_800_000_000_000_000);

    fn micros(text: &str) -> i64 {
        match When::parse(text, NOW) {
            Ok(When::Time(time)) => time.as_micros(),
            other => panic!("{text}: {other:?}"),
        }
    }

    // Broken: a restore would go back to another moment than the one that was asked for.
    #[test]
    fn every_spelling_means_its_moment() {
        let now = NOW.as_micros();
        assert_eq!(micros("5 minutes ago"), now - 300_000_000);
        assert_eq!(micros("90 seconds ago"), now - 90_000_000);
        assert_eq!(micros("1 day ago"), now - 86_400_000_000);
        assert_eq!(micros(" 2h 30m ago "), now - 9_000_000_000);
        assert_eq!(micros("1970-01-01T00:00:01Z"), 1_000_000);
        assert_eq!(micros("1970-01-01T02:00:01.0000019+02:00"), 1_000_001);
        assert_eq!(micros("now"), now);
        assert_eq!(When::parse("latest", NOW), Ok(When::Latest));
        assert_eq!(When::parse("lsn:42", NOW), Ok(When::Lsn(Lsn::new(42))));
        let bookmark = "000000000000002a-00000003";
        assert_eq!(
            When::parse(bookmark, NOW),
            Ok(When::Bookmark(bookmark.parse().unwrap()))
        );
    }

    // Broken: a typing error would restore some other moment instead of being refused.
    #[test]
    fn what_could_be_misread_is_refused() {
        for bad in [
            "",
            "yesterday-ish",
            "lsn:",
            "lsn:-1",
            "lsn:+1",
            "2a-3",
            "5 minutes ahead",
        ] {
            assert!(When::parse(bad, NOW).is_err(), "{bad}");
        }
        let no_zone = When::parse("2026-01-31 08:15:00", NOW);
        assert!(
            matches!(no_zone, Err(InvalidWhen::NoZone(_))),
            "{no_zone:?}"
        );
        assert!(matches!(
            When::parse("5 minutes", NOW),
            Err(InvalidWhen::Future(_))
        ));
    }

    // Broken: the time that history prints would not restore the commit it stands beside.
    #[test]
    fn a_printed_time_parses_back_to_itself() {
        let time = Timestamp::from_micros(1_763_845_200_123_456);
        assert_eq!(micros(&format_time(time)), time.as_micros());
        assert!(format_time(time).ends_with(".123456Z"));
    }
}
