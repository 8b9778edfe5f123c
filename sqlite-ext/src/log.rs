//! The extension's log: one line per event to stderr, and to each host's own log, if it has one.
//!
//! `DUROVFS_LOG` is `off`, `error` (default), `info` or `debug`. Never a key, never row data.

use durovfs_vfs::LogLevel;
use std::fmt;
use std::sync::OnceLock;

/// How much is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Nothing.
    Off,
    /// What a person must look at.
    Error,
    /// What changes: connections, databases.
    Info,
    /// Everything.
    Debug,
}

impl Level {
    /// Reads the value of `DUROVFS_LOG`.
    ///
    /// # Errors
    /// When it is none of the four words.
    pub fn parse(text: &str) -> Result<Self, String> {
        match text {
            "off" => Ok(Self::Off),
            "" | "error" => Ok(Self::Error),
            "info" => Ok(Self::Info),
            "debug" => Ok(Self::Debug),
            other => Err(format!(
                "DUROVFS_LOG={other}: expected off, error, info or debug"
            )),
        }
    }
}

static LEVEL: OnceLock<Level> = OnceLock::new();

/// Reads the level from the environment, once per process.
///
/// # Errors
/// When it is not a level.
pub fn init() -> Result<(), String> {
    let text = std::env::var("DUROVFS_LOG").unwrap_or_default();
    let level = Level::parse(&text)?;
    LEVEL.get_or_init(|| level);
    Ok(())
}

/// Whether lines of that level are wanted.
pub fn enabled(level: Level) -> bool {
    level <= LEVEL.get().copied().unwrap_or(Level::Error) && level != Level::Off
}

/// Something that a person must look at.
pub fn error(text: fmt::Arguments<'_>) {
    write(Level::Error, text);
}

/// Something that changed.
pub fn info(text: fmt::Arguments<'_>) {
    write(Level::Info, text);
}

/// A line of the shim, told on a thread of SQLite's: it goes to the hosts' own logs, too.
pub fn from_shim(level: LogLevel, line: &str) {
    let level = match level {
        LogLevel::Error => Level::Error,
        LogLevel::Info => Level::Info,
        LogLevel::Debug => Level::Debug,
    };
    write(level, format_args!("{line}"));
    if enabled(level) {
        crate::host::log_to_all(level == Level::Error, line);
    }
}

fn write(level: Level, text: fmt::Arguments<'_>) {
    use std::io::Write;
    if enabled(level) {
        // One write per line, so that lines of several processes do not mix. A host without a
        // stderr loses the line; there is nobody left to tell.
        let _ = std::io::stderr().write_all(format!("durovfs: {text}\n").as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_the_four_words_of_the_contract() {
        // Broken if not: someone asks for silence or for detail and gets the other.
        assert_eq!(Level::parse("off"), Ok(Level::Off));
        assert_eq!(Level::parse(""), Ok(Level::Error));
        assert_eq!(Level::parse("debug"), Ok(Level::Debug));
        assert!(Level::parse("warn").is_err());
        assert!(Level::Error < Level::Info && Level::Info < Level::Debug);
    }
}
