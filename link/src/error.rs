//! What can go wrong on a link, by what its owner does next. Texts are one line, for people.

use durovfs_wire::FrameError;
use quinn::{ConnectionError, ReadError, VarInt, WriteError};

/// First code of the range in which QUIC carries the alerts of TLS.
const TLS_ALERT_FIRST: u64 = 0x100;
/// Last code of that range.
const TLS_ALERT_LAST: u64 = 0x1ff;

/// An error of a link.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LinkError {
    /// One side does not accept the other: trying again without a change is of no use.
    #[error("{0}")]
    Refused(String),
    /// The peer was not reached, or is gone: connect again, after a pause.
    #[error("{0}")]
    Lost(String),
    /// The peer sent what is no frame of this protocol: close the connection.
    #[error(transparent)]
    Protocol(#[from] FrameError),
    /// The peer gave up this stream; the connection goes on.
    #[error("peer gave up the stream, code {0}")]
    StreamStopped(u64),
    /// This side closed the connection or the stream.
    #[error("link is closed")]
    Closed,
    /// The operating system refused the socket.
    #[error("{0}")]
    Socket(String),
}

impl LinkError {
    /// The error of a socket call: what was done, and what the system said.
    pub(crate) fn socket(action: &str, error: &std::io::Error) -> Self {
        Self::Socket(format!("{action}: {error}"))
    }

    /// The error of a connection to or from `peer`.
    pub(crate) fn connection(peer: &str, error: &ConnectionError) -> Self {
        match error {
            ConnectionError::LocallyClosed => Self::Closed,
            ConnectionError::VersionMismatch => Self::Refused(format!(
                "{peer} speaks no QUIC version that this node speaks"
            )),
            ConnectionError::TransportError(error) => match tls_alert(error.code.into()) {
                Some(alert) => Self::Refused(format!(
                    "connection with {peer} refused here: {} ({})",
                    alert_text(alert),
                    one_line(&error.reason)
                )),
                None => Self::Lost(format!("connection with {peer} failed: {error}")),
            },
            ConnectionError::ConnectionClosed(close) => match tls_alert(close.error_code.into()) {
                Some(alert) => Self::Refused(format!(
                    "connection refused by {peer}: {} ({})",
                    alert_text(alert),
                    one_line(&String::from_utf8_lossy(&close.reason))
                )),
                None => Self::Lost(format!("connection closed by {peer}: {close}")),
            },
            ConnectionError::ApplicationClosed(close) => {
                let reason = one_line(&String::from_utf8_lossy(&close.reason));
                if close.error_code == CODE_REFUSED {
                    Self::Refused(format!("connection refused by {peer}: {reason}"))
                } else {
                    Self::Lost(format!("connection closed by {peer}: {reason}"))
                }
            }
            ConnectionError::Reset => Self::Lost(format!("{peer} was restarted")),
            ConnectionError::TimedOut => Self::Lost(format!("{peer} does not answer")),
            ConnectionError::CidsExhausted => Self::Lost(format!(
                "connection with {peer} failed: no connection id is left"
            )),
        }
    }

    pub(crate) fn read(peer: &str, error: &ReadError) -> Self {
        match error {
            ReadError::ConnectionLost(error) => Self::connection(peer, error),
            ReadError::Reset(code) => Self::StreamStopped(code.into_inner()),
            ReadError::ClosedStream
            | ReadError::IllegalOrderedRead
            | ReadError::ZeroRttRejected => Self::Closed,
        }
    }

    pub(crate) fn write(peer: &str, error: &WriteError) -> Self {
        match error {
            WriteError::ConnectionLost(error) => Self::connection(peer, error),
            WriteError::Stopped(code) => Self::StreamStopped(code.into_inner()),
            WriteError::ClosedStream | WriteError::ZeroRttRejected => Self::Closed,
        }
    }
}

/// Close code: this side is done, or stops.
pub(crate) const CODE_DONE: VarInt = VarInt::from_u32(0);
/// Close code: this side does not talk to a peer like that one.
pub(crate) const CODE_REFUSED: VarInt = VarInt::from_u32(1);

fn tls_alert(code: u64) -> Option<u8> {
    // The mask leaves the alert: the range is 256 codes long.
    (TLS_ALERT_FIRST..=TLS_ALERT_LAST)
        .contains(&code)
        .then_some((code & 0xff) as u8)
}

/// What a TLS alert means for someone who set up certificates.
fn alert_text(alert: u8) -> &'static str {
    match alert {
        40 | 42 | 43 | 46 | 51 => "the certificate is not acceptable",
        44 | 45 => "the certificate is revoked or expired",
        48 => "the certificate is not from this cluster's authority",
        49 => "access denied",
        70 => "no TLS version in common",
        116 => "a certificate is required",
        120 => "it does not speak durovfs/1",
        _ => "the TLS handshake failed",
    }
}

/// Text from a peer, fit for one line of a log.
fn one_line(text: &str) -> String {
    /// More than this is no reason but noise.
    const MAX_CHARS: usize = 200;
    text.chars()
        .take(MAX_CHARS)
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}
