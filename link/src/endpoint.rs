//! Endpoints and connections: who is connected with whom, over one UDP socket per process.

use crate::error::{CODE_DONE, CODE_REFUSED, LinkError};
use crate::identity::Identity;
use crate::role::{PeerRole, node_dns_name};
use crate::socket::{self, LinkSocket};
use crate::stream::{FrameReceiver, FrameSender};
use crate::transport::{MAX_DATAGRAM_BYTES, Profile, Transports};
use durovfs_wire::NodeName;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{ConnectionId, ConnectionIdGenerator, EndpointConfig, TokioRuntime};
use ring::hmac;
use ring::rand::SecureRandom;
use rustls::pki_types::CertificateDer;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

/// Handshakes that wait to be accepted; more are refused. One per client of a busy host.
const MAX_INCOMING: usize = 1024;
/// Bytes of a connection id: enough that none is guessed or met twice.
const CONNECTION_ID_BYTES: usize = 8;

/// A UDP socket that takes connections, makes them, or both. Lives on a tokio runtime.
#[derive(Clone)]
pub struct Endpoint {
    inner: quinn::Endpoint,
    server: Option<Arc<QuicServerConfig>>,
    client: Arc<QuicClientConfig>,
    transports: Transports,
    profile: Profile,
}

impl Endpoint {
    /// An endpoint at a known address, that takes and makes connections.
    ///
    /// # Errors
    /// When the address cannot be had.
    pub fn bind(
        address: SocketAddr,
        identity: &Identity,
        profile: Profile,
    ) -> Result<Self, LinkError> {
        Self::new(socket::bind(address)?, identity, profile, true)
    }

    /// An endpoint at any address, that makes connections.
    ///
    /// # Errors
    /// When the system gives no socket.
    pub fn client(identity: &Identity, profile: Profile) -> Result<Self, LinkError> {
        Self::new(socket::bind_client()?, identity, profile, false)
    }

    fn new(
        socket: UdpSocket,
        identity: &Identity,
        profile: Profile,
        takes: bool,
    ) -> Result<Self, LinkError> {
        let transports = Transports::new();
        let unusable = |e| LinkError::Refused(format!("TLS configuration: {e}"));
        let client = Arc::new(QuicClientConfig::try_from(identity.client()).map_err(unusable)?);
        let server = match takes {
            true => Some(Arc::new(
                QuicServerConfig::try_from(identity.server()).map_err(unusable)?,
            )),
            false => None,
        };
        let server_config = server.clone().map(|crypto| {
            let mut config = quinn::ServerConfig::with_crypto(crypto);
            config.max_incoming(MAX_INCOMING);
            config
        });
        let inner = quinn::Endpoint::new_with_abstract_socket(
            endpoint_config(identity)?,
            server_config,
            Arc::new(LinkSocket::new(socket)?),
            Arc::new(TokioRuntime),
        )
        .map_err(|e| LinkError::socket("start the endpoint", &e))?;
        Ok(Self {
            inner,
            server,
            client,
            transports,
            profile,
        })
    }

    /// Connects to a node. Takes up to [`crate::IDLE_TIMEOUT`] when it does not answer. A node that
    /// does not accept this side's certificate says so on the first use of the connection, not
    /// here: in TLS 1.3 this side is done first.
    ///
    /// # Errors
    /// When the node is not reached, or is not the one that `node` names.
    pub async fn connect(
        &self,
        address: SocketAddr,
        node: &NodeName,
    ) -> Result<Connection, LinkError> {
        let mut config = quinn::ClientConfig::new(self.client.clone());
        config.transport_config(self.transports.of(self.profile, address));
        let peer = format!("{node} at {address}");
        let connecting = self
            .inner
            .connect_with(config, address, &node_dns_name(node))
            .map_err(|e| LinkError::Lost(format!("connect to {peer}: {e}")))?;
        let connection = connecting
            .await
            .map_err(|e| LinkError::connection(&peer, &e))?;
        Connection::new(connection, peer)
    }

    /// The next connection attempt; none after the endpoint was closed. Finish its handshake in a
    /// task of its own, so that a slow peer holds nobody up.
    pub async fn accept(&self) -> Option<Incoming> {
        let incoming = self.inner.accept().await?;
        let crypto = self.server.clone()?;
        let mut config = quinn::ServerConfig::with_crypto(crypto);
        config.transport_config(self.transports.of(self.profile, incoming.remote_address()));
        Some(Incoming {
            inner: incoming,
            config: Arc::new(config),
        })
    }

    /// Address of the socket.
    ///
    /// # Errors
    /// When the socket is gone.
    pub fn local_addr(&self) -> Result<SocketAddr, LinkError> {
        self.inner
            .local_addr()
            .map_err(|e| LinkError::socket("read the socket's address", &e))
    }

    /// Closes all connections, and takes no more.
    pub fn close(&self, reason: &str) {
        self.inner.close(CODE_DONE, reason.as_bytes());
    }

    /// Waits until all peers were told of a close, at most `timeout`.
    pub async fn wait_idle(&self, timeout: Duration) {
        // A peer that does not answer finds out by its own timeout.
        let _ = tokio::time::timeout(timeout, self.inner.wait_idle()).await;
    }
}

impl std::fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Endpoint")
            .field("inner", &self.inner)
            .finish_non_exhaustive()
    }
}

fn endpoint_config(identity: &Identity) -> Result<EndpointConfig, LinkError> {
    let reset_key = hmac::Key::new(hmac::HMAC_SHA256, identity.reset_key());
    let mut seed = [0; 32];
    ring::rand::SystemRandom::new()
        .fill(&mut seed)
        .map_err(|_| LinkError::Socket("the system gives no random bytes".to_owned()))?;
    let mut config = EndpointConfig::new(Arc::new(reset_key));
    config
        .max_udp_payload_size(MAX_DATAGRAM_BYTES)
        .map_err(|e| LinkError::Socket(format!("datagram size: {e}")))?
        .cid_generator(move || Box::new(ConnectionIds::new(&seed)));
    Ok(config)
}

/// Connection ids that no one can guess. Unlike quinn's own they are not recognized by a restarted
/// process as foreign, which would make it drop packets where it must answer with a reset.
struct ConnectionIds {
    key: hmac::Key,
    count: u64,
}

impl ConnectionIds {
    fn new(seed: &[u8; 32]) -> Self {
        Self {
            key: hmac::Key::new(hmac::HMAC_SHA256, seed),
            count: 0,
        }
    }
}

impl ConnectionIdGenerator for ConnectionIds {
    fn generate_cid(&mut self) -> ConnectionId {
        self.count += 1;
        let tag = hmac::sign(&self.key, &self.count.to_le_bytes());
        ConnectionId::new(&tag.as_ref()[..CONNECTION_ID_BYTES])
    }

    fn cid_len(&self) -> usize {
        CONNECTION_ID_BYTES
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

/// A connection attempt that was not answered yet.
#[derive(Debug)]
pub struct Incoming {
    inner: quinn::Incoming,
    config: Arc<quinn::ServerConfig>,
}

impl Incoming {
    /// Where it comes from.
    pub fn remote_address(&self) -> SocketAddr {
        self.inner.remote_address()
    }

    /// Answers, and finds out who it is.
    ///
    /// # Errors
    /// When the peer's certificate is not acceptable, or it went away.
    pub async fn handshake(self) -> Result<Connection, LinkError> {
        let peer = self.inner.remote_address().to_string();
        let failed = |e| LinkError::connection(&peer, &e);
        let connection = self.inner.accept_with(self.config).map_err(failed)?.await;
        let connection = connection.map_err(|e| LinkError::connection(&peer, &e))?;
        Connection::new(connection, peer)
    }
}

/// A connection with a peer whose certificate was verified. Clones are the same connection; it is
/// closed when the last clone and the last stream are gone.
#[derive(Debug, Clone)]
pub struct Connection {
    inner: quinn::Connection,
    role: Arc<PeerRole>,
    peer: Arc<str>,
}

impl Connection {
    fn new(connection: quinn::Connection, peer: String) -> Result<Self, LinkError> {
        let identity = connection
            .peer_identity()
            .and_then(|identity| identity.downcast::<Vec<CertificateDer<'static>>>().ok());
        let role = match identity.as_ref().and_then(|chain| chain.first()) {
            Some(certificate) => PeerRole::from_certificate(certificate),
            None => Err("no certificate".to_owned()),
        };
        match role {
            Ok(role) => Ok(Self {
                inner: connection,
                role: Arc::new(role),
                peer: peer.into(),
            }),
            Err(problem) => {
                connection.close(CODE_REFUSED, problem.as_bytes());
                Err(LinkError::Refused(format!(
                    "connection with {peer} refused here: {problem}"
                )))
            }
        }
    }

    /// Who the peer is.
    pub fn peer(&self) -> &PeerRole {
        &self.role
    }

    /// Where the peer is.
    pub fn remote_address(&self) -> SocketAddr {
        self.inner.remote_address()
    }

    /// Opens a stream. The peer sees it when the first frame is sent. Waits while
    /// [`crate::MAX_STREAMS`] are open.
    ///
    /// # Errors
    /// When the connection is gone.
    pub async fn open_stream(&self) -> Result<(FrameSender, FrameReceiver), LinkError> {
        let stream = self.inner.open_bi().await;
        self.halves(stream)
    }

    /// The next stream that the peer opens.
    ///
    /// # Errors
    /// When the connection is gone.
    pub async fn accept_stream(&self) -> Result<(FrameSender, FrameReceiver), LinkError> {
        let stream = self.inner.accept_bi().await;
        self.halves(stream)
    }

    fn halves(
        &self,
        stream: Result<(quinn::SendStream, quinn::RecvStream), quinn::ConnectionError>,
    ) -> Result<(FrameSender, FrameReceiver), LinkError> {
        let (send, receive) = stream.map_err(|e| LinkError::connection(&self.peer, &e))?;
        Ok((
            FrameSender::new(send, self.peer.clone()),
            FrameReceiver::new(receive, self.peer.clone(), self.inner.clone()),
        ))
    }

    /// Waits until the connection is gone, and tells why.
    pub async fn closed(&self) -> LinkError {
        LinkError::connection(&self.peer, &self.inner.closed().await)
    }

    /// Why the connection is gone, if it is.
    pub fn close_reason(&self) -> Option<LinkError> {
        self.inner
            .close_reason()
            .map(|e| LinkError::connection(&self.peer, &e))
    }

    /// Closes the connection; what was not delivered is lost.
    pub fn close(&self, reason: &str) {
        self.inner.close(CODE_DONE, reason.as_bytes());
    }

    /// Closes the connection because of what the peer did, or may not do.
    pub fn refuse(&self, reason: &str) {
        self.inner.close(CODE_REFUSED, reason.as_bytes());
    }

    /// Round trip, as measured.
    pub fn round_trip(&self) -> Duration {
        self.inner.rtt()
    }
}
