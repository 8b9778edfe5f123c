//! What a certificate says about its holder: its role, and what a client may open.
//!
//! A node has the DNS name `<name>.node.durovfs`, a client `<name>.client.durovfs`, as subject
//! alternative name; exactly one of them. A client has a URI `durovfs:databases:<pattern>` for
//! each pattern of database names that it may open, percent-encoded.

use durovfs_wire::NodeName;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer;

const NODE_SUFFIX: &str = ".node.durovfs";
const CLIENT_SUFFIX: &str = ".client.durovfs";
const DATABASES_PREFIX: &str = "durovfs:databases:";
/// All that might mean something in a URI; patterns read better with their slashes and stars.
const ENCODED: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'/');

/// Who the peer is, as its certificate says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PeerRole {
    /// A sidecar of the cluster.
    Node(NodeName),
    /// An application or a person.
    Client {
        /// Its name.
        name: String,
        /// Glob patterns of the names of the databases that it may open.
        databases: Vec<String>,
    },
}

impl PeerRole {
    /// Reads the role out of a certificate whose chain was verified.
    pub(crate) fn from_certificate(der: &[u8]) -> Result<Self, String> {
        let (_, certificate) =
            X509Certificate::from_der(der).map_err(|e| format!("certificate is not X.509: {e}"))?;
        let names = certificate
            .subject_alternative_name()
            .map_err(|e| format!("certificate has unreadable names: {e}"))?
            .map(|extension| extension.value.general_names.as_slice())
            .unwrap_or_default();
        Self::from_names(names)
    }

    fn from_names(names: &[GeneralName<'_>]) -> Result<Self, String> {
        let mut roles = Vec::new();
        let mut patterns = Vec::new();
        for name in names {
            match name {
                GeneralName::DNSName(name) => roles.push(*name),
                GeneralName::URI(uri) => patterns.push(decode_pattern(uri)?),
                // A certificate says nothing else to us.
                _ => {}
            }
        }
        let [role] = roles[..] else {
            return Err(format!(
                "certificate has {} DNS names, not one",
                roles.len()
            ));
        };
        if let Some(name) = role.strip_suffix(NODE_SUFFIX) {
            return Ok(Self::Node(parse_name(name)?));
        }
        if let Some(name) = role.strip_suffix(CLIENT_SUFFIX) {
            return Ok(Self::Client {
                name: parse_name(name)?.into(),
                databases: patterns,
            });
        }
        Err(format!(
            "certificate name {role:?} ends in neither {NODE_SUFFIX} nor {CLIENT_SUFFIX}"
        ))
    }
}

fn parse_name(name: &str) -> Result<NodeName, String> {
    name.parse().map_err(|e| format!("certificate: {e}"))
}

fn decode_pattern(uri: &str) -> Result<String, String> {
    let encoded = uri
        .strip_prefix(DATABASES_PREFIX)
        .ok_or_else(|| format!("certificate has the unknown URI {uri:?}"))?;
    match percent_decode_str(encoded).decode_utf8() {
        Ok(pattern) => Ok(pattern.into_owned()),
        Err(_) => Err(format!("certificate has the unreadable pattern {uri:?}")),
    }
}

/// The DNS name of a node's certificate.
pub(crate) fn node_dns_name(name: &NodeName) -> String {
    format!("{name}{NODE_SUFFIX}")
}

/// The DNS name of a client's certificate.
pub(crate) fn client_dns_name(name: &NodeName) -> String {
    format!("{name}{CLIENT_SUFFIX}")
}

/// The URI by which a client's certificate allows a pattern of database names.
pub(crate) fn pattern_uri(pattern: &str) -> String {
    format!(
        "{DATABASES_PREFIX}{}",
        utf8_percent_encode(pattern, ENCODED)
    )
}

impl std::fmt::Display for PeerRole {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Node(name) => write!(f, "node {name}"),
            Self::Client { name, .. } => write!(f, "client {name}"),
        }
    }
}
