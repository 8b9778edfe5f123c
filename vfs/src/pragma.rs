//! `PRAGMA durovfs_…`, and the pragmas of SQLite that a protected database cannot have.

use crate::connection::Connection;
use crate::deferred::Durability;

/// What a pragma comes to.
#[derive(Debug, PartialEq, Eq)]
pub enum PragmaAnswer {
    /// SQLite's own business.
    NotOurs,
    /// Done; its one row holds this.
    Value(String),
    /// Refused, with this message.
    Refused(String),
}

impl Connection {
    /// A pragma for this database: its name, and its argument if it has one.
    pub fn pragma(&mut self, name: &str, argument: Option<&str>) -> PragmaAnswer {
        match name.to_ascii_lowercase().as_str() {
            "durovfs_durability" => self.durability_pragma(argument),
            "durovfs_timeout" => self.timeout_pragma(argument),
            "journal_mode" => journal_mode(argument),
            _ => PragmaAnswer::NotOurs,
        }
    }

    fn durability_pragma(&mut self, argument: Option<&str>) -> PragmaAnswer {
        match argument.map(durability).transpose() {
            Err(message) => return PragmaAnswer::Refused(message),
            Ok(Some(durability)) => self.set_durability(durability),
            Ok(None) => {}
        }
        PragmaAnswer::Value(self.durability().name().to_owned())
    }

    fn timeout_pragma(&mut self, argument: Option<&str>) -> PragmaAnswer {
        if let Some(argument) = argument {
            match argument.trim().parse() {
                Ok(timeout_ms) => self.timeout_ms = timeout_ms,
                Err(_) => {
                    return PragmaAnswer::Refused(format!(
                        "durovfs_timeout: {argument:?} is not a number of milliseconds (0 waits \
                         for ever)"
                    ));
                }
            }
        }
        PragmaAnswer::Value(self.timeout_ms.to_string())
    }
}

/// The same words as `durovfs_durability=` in a URI; else what is wrong with them.
pub(crate) fn durability(text: &str) -> Result<Durability, String> {
    Durability::parse(text)
        .ok_or_else(|| format!("durovfs_durability: {text:?} is neither quorum nor deferred"))
}

fn journal_mode(argument: Option<&str>) -> PragmaAnswer {
    match argument
        .map(|text| text.trim().to_ascii_lowercase())
        .as_deref()
    {
        // Without a journal SQLite cannot take back a commit that the quorum refused.
        Some("off") => PragmaAnswer::Refused(
            "journal_mode=off cannot be protected by durovfs: a refused commit could not be \
             rolled back"
                .into(),
        ),
        _ => PragmaAnswer::NotOurs,
    }
}
