//! The cluster's certificate authority: made once, kept by whoever sets the cluster up.
//!
//! Certificates do not expire: a cluster that stops on a date that nobody remembers is worse than
//! one whose authority is replaced when a key is lost. Key files have mode 0600.

use crate::role::{client_dns_name, node_dns_name, pattern_uri};
use durovfs_wire::{InvalidNodeName, NodeName};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use std::io::Write;
use std::path::{Path, PathBuf};

/// File of the authority's certificate, which every node and client has a copy of.
pub const CA_CERTIFICATE_FILE: &str = "ca.pem";
/// File of the authority's key, which stays where the authority is.
pub const CA_KEY_FILE: &str = "ca-key.pem";
/// Largest sum of the encoded patterns in one certificate, so that it fits a handshake.
pub const MAX_PATTERN_BYTES: usize = 8 << 10;

/// The authority cannot do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// A file cannot be read or written.
    #[error("{action} {}: {source}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The name is not one that a certificate can carry.
    #[error(transparent)]
    Name(#[from] InvalidNodeName),
    /// More patterns than a certificate may carry.
    #[error("{0} bytes of database patterns exceed the limit of {MAX_PATTERN_BYTES}")]
    PatternsTooLong(usize),
    /// A key or certificate is not usable.
    #[error("certificate authority: {0}")]
    Certificate(#[from] rcgen::Error),
}

/// A certificate and its key, as PEM text.
pub struct PemPair {
    certificate: String,
    key: String,
}

impl PemPair {
    /// The certificate.
    pub fn certificate(&self) -> &str {
        &self.certificate
    }

    /// Writes both files, each whole or not at all; the key is readable by its owner only.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn write(&self, certificate: &Path, key: &Path) -> Result<(), AuthorityError> {
        write_file(key, self.key.as_bytes(), KEY_MODE)?;
        write_file(certificate, self.certificate.as_bytes(), CERTIFICATE_MODE)
    }
}

impl std::fmt::Debug for PemPair {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PemPair").finish_non_exhaustive()
    }
}

/// The cluster's authority.
pub struct Authority {
    certificate: String,
    key: String,
    issuer: Issuer<'static, KeyPair>,
}

/// Makes a new authority. Nothing is written yet.
///
/// # Errors
/// When the system has no randomness to give.
pub fn create() -> Result<Authority, AuthorityError> {
    let key = KeyPair::generate()?;
    let certificate = ca_params(&key).self_signed(&key)?.pem();
    let key_pem = key.serialize_pem();
    Ok(Authority {
        certificate,
        key: key_pem,
        issuer: Issuer::new(ca_params(&key), key),
    })
}

impl Authority {
    /// Reads the authority that [`Authority::write`] wrote.
    ///
    /// # Errors
    /// When a file is missing or damaged.
    pub fn load(directory: &Path) -> Result<Self, AuthorityError> {
        let certificate = read_text(&directory.join(CA_CERTIFICATE_FILE))?;
        let key_pem = read_text(&directory.join(CA_KEY_FILE))?;
        let key = KeyPair::from_pem(&key_pem)?;
        Ok(Self {
            certificate,
            key: key_pem,
            issuer: Issuer::new(ca_params(&key), key),
        })
    }

    /// Writes certificate and key into a directory that exists.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn write(&self, directory: &Path) -> Result<(), AuthorityError> {
        write_file(&directory.join(CA_KEY_FILE), self.key.as_bytes(), KEY_MODE)?;
        self.write_certificate(&directory.join(CA_CERTIFICATE_FILE))
    }

    /// Writes the certificate alone: what a node or client needs.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write_certificate(&self, path: &Path) -> Result<(), AuthorityError> {
        write_file(path, self.certificate.as_bytes(), CERTIFICATE_MODE)
    }

    /// A certificate for a sidecar.
    ///
    /// # Errors
    /// When the system has no randomness to give.
    pub fn issue_node(&self, name: &NodeName) -> Result<PemPair, AuthorityError> {
        let mut params = CertificateParams::new(vec![node_dns_name(name)])?;
        params
            .distinguished_name
            .push(DnType::CommonName, format!("durovfs node {name}"));
        // A node both takes connections and makes them.
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        self.issue(params)
    }

    /// A certificate for an application or a person, who may open the databases whose names match
    /// one of the glob patterns. The name follows the rules of node names.
    ///
    /// # Errors
    /// When the name is not one, or the patterns are too long.
    pub fn issue_client(
        &self,
        name: &str,
        database_patterns: &[String],
    ) -> Result<PemPair, AuthorityError> {
        let uris: Vec<_> = database_patterns
            .iter()
            .map(|pattern| pattern_uri(pattern))
            .collect();
        let bytes = uris.iter().map(String::len).sum::<usize>();
        if bytes > MAX_PATTERN_BYTES {
            return Err(AuthorityError::PatternsTooLong(bytes));
        }
        let name: NodeName = name.parse()?;
        let mut params = CertificateParams::new(vec![client_dns_name(&name)])?;
        for pattern in database_patterns {
            params
                .subject_alt_names
                .push(SanType::URI(pattern_uri(pattern).try_into()?));
        }
        params
            .distinguished_name
            .push(DnType::CommonName, format!("durovfs client {name}"));
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        self.issue(params)
    }

    fn issue(&self, mut params: CertificateParams) -> Result<PemPair, AuthorityError> {
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        Ok(PemPair {
            certificate: certificate.pem(),
            key: key.serialize_pem(),
        })
    }
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority").finish_non_exhaustive()
    }
}

/// The subject is made from the key, so that a certificate of another cluster is told from a
/// damaged one, and an authority that was read back issues under the name of its certificate.
fn ca_params(key: &KeyPair) -> CertificateParams {
    let digest = ring::digest::digest(&ring::digest::SHA256, key.public_key_raw());
    let mut name = "durovfs cluster authority ".to_owned();
    digest.as_ref()[..8]
        .iter()
        .for_each(|byte| name.push_str(&format!("{byte:02x}")));
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

const KEY_MODE: u32 = 0o600;
const CERTIFICATE_MODE: u32 = 0o644;

fn read_text(path: &Path) -> Result<String, AuthorityError> {
    std::fs::read_to_string(path).map_err(|e| file_error("read", path, e))
}

/// Writes beside the file and renames, so that a crash leaves the old file or the new one.
fn write_file(path: &Path, bytes: &[u8], mode: u32) -> Result<(), AuthorityError> {
    use std::os::unix::fs::OpenOptionsExt;
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    let temporary = PathBuf::from(temporary);
    // What an interrupted write left may have another mode: it must not be written into.
    match std::fs::remove_file(&temporary) {
        Ok(()) => {}
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        Err(e) => return Err(file_error("remove", &temporary, e)),
    }
    let written = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(&temporary)
        .and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()));
    written.map_err(|e| file_error("write", &temporary, e))?;
    std::fs::rename(&temporary, path).map_err(|e| file_error("rename to", path, e))
}

fn file_error(action: &'static str, path: &Path, source: std::io::Error) -> AuthorityError {
    AuthorityError::File {
        action,
        path: path.to_owned(),
        source,
    }
}
