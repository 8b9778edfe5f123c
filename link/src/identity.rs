//! Who this process is: its certificate and key, and the authority that it trusts.
//!
//! Turns three PEM files into the TLS configuration of both directions. Keys are never printed.

use crate::ALPN;
use crate::role::PeerRole;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{CipherSuite, RootCertStore};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Largest certificate chain of this process: with the rest of a handshake flight it must stay
/// below 16 KiB, the most that quinn can send in one packet of a handshake.
const MAX_CHAIN_BYTES: usize = 12 << 10;

/// Certificate, key and authority of this process. Cheap to clone.
#[derive(Clone)]
pub struct Identity {
    role: PeerRole,
    server: Arc<rustls::ServerConfig>,
    client: Arc<rustls::ClientConfig>,
    reset_key: [u8; 32],
}

/// The identity cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// A file cannot be read.
    #[error("read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file does not hold what it should.
    #[error("{}: {problem}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
}

impl Identity {
    /// Reads the authority's certificate, and the own certificate (with its chain, if any) and key.
    ///
    /// # Errors
    /// When a file is missing or is not what it should be, or certificate and key do not match.
    pub fn load(ca: &Path, certificate: &Path, key: &Path) -> Result<Self, IdentityError> {
        let authorities = read_certificates(ca)?;
        let chain = read_certificates(certificate)?;
        let chain_bytes = chain
            .iter()
            .map(|certificate| certificate.len())
            .sum::<usize>();
        if chain_bytes > MAX_CHAIN_BYTES {
            let problem = format!("{chain_bytes} bytes of certificates exceed {MAX_CHAIN_BYTES}");
            return Err(invalid(certificate, problem));
        }
        let key_der = PrivateKeyDer::from_pem_slice(&read(key)?)
            .map_err(|_| invalid(key, "no private key in PEM form"))?;
        let role = PeerRole::from_certificate(&chain[0]).map_err(|e| invalid(certificate, e))?;
        let mut roots = RootCertStore::empty();
        for authority in authorities {
            roots
                .add(authority)
                .map_err(|e| invalid(ca, format!("not an authority: {e}")))?;
        }
        let roots = Arc::new(roots);
        let provider = Arc::new(provider());
        let unusable =
            |e: rustls::Error| invalid(certificate, format!("does not go with its key: {e}"));

        let verifier = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone())
            .build()
            .map_err(|e| invalid(ca, e))?;
        let mut server = rustls::ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(unusable)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain.clone(), key_der.clone_key())
            .map_err(unusable)?;
        server.alpn_protocols = vec![ALPN.to_vec()];
        // A resumed session would skip the certificates; reconnects are too rare to matter.
        server.send_tls13_tickets = 0;

        let mut client = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(unusable)?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key_der.clone_key())
            .map_err(unusable)?;
        client.alpn_protocols = vec![ALPN.to_vec()];
        client.resumption = rustls::client::Resumption::disabled();

        let reset_key = derive_reset_key(key_der.secret_der());
        Ok(Self {
            role,
            server: Arc::new(server),
            client: Arc::new(client),
            reset_key,
        })
    }

    /// What the own certificate says.
    pub fn role(&self) -> &PeerRole {
        &self.role
    }

    pub(crate) fn server(&self) -> Arc<rustls::ServerConfig> {
        self.server.clone()
    }

    pub(crate) fn client(&self) -> Arc<rustls::ClientConfig> {
        self.client.clone()
    }

    pub(crate) fn reset_key(&self) -> &[u8; 32] {
        &self.reset_key
    }
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Identity")
            .field("role", &self.role)
            .finish_non_exhaustive()
    }
}

/// ring, with the ciphers in the order of their speed here: AES-128-GCM first.
fn provider() -> CryptoProvider {
    let mut provider = rustls::crypto::ring::default_provider();
    provider
        .cipher_suites
        .retain(|suite| suite.tls13().is_some());
    provider
        .cipher_suites
        .sort_by_key(|suite| match suite.suite() {
            CipherSuite::TLS13_AES_128_GCM_SHA256 => 0,
            CipherSuite::TLS13_AES_256_GCM_SHA384 => 1,
            _ => 2,
        });
    provider
}

/// The key of stateless resets outlives the process, so that a restarted node can tell its peers at
/// once that their connections are gone, where they would wait for the idle timeout.
fn derive_reset_key(key: &[u8]) -> [u8; 32] {
    let hmac = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, key);
    let tag = ring::hmac::sign(&hmac, b"durovfs stateless reset");
    let mut derived = [0; 32];
    derived.copy_from_slice(tag.as_ref());
    derived
}

fn read(path: &Path) -> Result<Vec<u8>, IdentityError> {
    std::fs::read(path).map_err(|source| IdentityError::Read {
        path: path.to_owned(),
        source,
    })
}

fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&read(path)?).collect();
    match certificates {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        Ok(_) | Err(_) => Err(invalid(path, "no certificate in PEM form")),
    }
}

fn invalid(path: &Path, problem: impl std::fmt::Display) -> IdentityError {
    IdentityError::Invalid {
        path: path.to_owned(),
        problem: problem.to_string(),
    }
}
