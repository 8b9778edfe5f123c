//! The command line: one file per command, and what they share.
//!
//! Every command ends in `Ok` or in one [`Failure`], which `main` prints as one line. Commands read
//! and print; what a sidecar does lives in `daemon`, what an archive holds in its crate.

mod ask;
pub mod dev;
pub mod history;
pub mod init;
mod layout;
pub mod replace;
pub mod resolve;
pub mod restore;
pub mod sidecar;
pub mod status;
pub mod takeover;

/// Something failed.
pub const EXIT_FAILED: u8 = 1;
/// The command line makes no sense.
pub const EXIT_USAGE: u8 = 2;
/// No database of that name.
pub const EXIT_NO_DATABASE: u8 = 3;
/// The moment asked for is not covered by the archive.
pub const EXIT_NOT_COVERED: u8 = 4;

/// How a command failed: its exit status, and one line for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// Exit status, one of the `EXIT_` constants.
    pub status: u8,
    /// What failed, on what, and what to do.
    pub message: String,
}

impl Failure {
    /// A failure with this exit status and message.
    pub fn new(status: u8, message: impl Into<String>) -> Self {
        Self {
            status,
            message: message.into(),
        }
    }

    /// The message as one line, whatever it was made of.
    pub fn line(&self) -> String {
        let words: Vec<_> = self.message.split_whitespace().collect();
        words.join(" ")
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        // `{:#}` prints the whole chain of causes on one line.
        Self {
            status: EXIT_FAILED,
            message: format!("{error:#}"),
        }
    }
}

impl From<crate::config::ConfigError> for Failure {
    fn from(error: crate::config::ConfigError) -> Self {
        Self {
            status: EXIT_FAILED,
            message: error.to_string(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_one_line_with_all_its_causes() {
        // Broken: scripts that read stderr line by line would see half of what went wrong.
        let error = anyhow::anyhow!("no space\nleft").context("write the journal");
        let failure = Failure::from(error);
        assert_eq!(failure.line(), "write the journal: no space left");
        assert_eq!(failure.status, EXIT_FAILED);
    }
}
