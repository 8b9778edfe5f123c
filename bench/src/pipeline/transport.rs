//! QUIC as the bare pipeline uses it: the settings that were measured to be the best on loopback.

use anyhow::{Context, Result};
use bytes::Bytes;
use quinn::congestion::CubicConfig;
use quinn::rustls::RootCertStore;
use quinn::rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use quinn::{Endpoint, EndpointConfig, RecvStream, TokioRuntime, TransportConfig, VarInt};
use socket2::{Domain, Protocol, Socket, Type};
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Name in the one certificate that all servers have.
const SERVER_NAME: &str = "pipeline";
const CERTIFICATE_FILE: &str = "certificate.der";
const KEY_FILE: &str = "key.der";
/// A whole commit, and most batches, in one packet.
const MTU: u16 = 65_000;
/// Largest datagram taken; the default would hold the peer to 1,472 bytes.
const DATAGRAM_BYTES_MAX: u16 = 65_527;
/// The default window has no room for one packet of this size, and the connection hangs.
const INITIAL_WINDOW_BYTES: u64 = 10 * MTU as u64;
/// Room for a burst while this process waits for a processor.
const SOCKET_BUFFER_BYTES: usize = 4 << 20;
/// Bytes in flight on a stream. Above this, throughput does not grow.
const STREAM_WINDOW_BYTES: u32 = 2 << 20;
/// Each connection has one stream; memory for all that are allowed is taken in advance.
const STREAMS_MAX: u32 = 4;
/// Idle processes stay connected between the rounds.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(2);
/// Chunks taken from a stream at once: more than come between two wakeups.
pub const CHUNKS_PER_READ: usize = 64;

/// Makes the certificate and its key in `dir`.
pub fn make_certificate(dir: &Path) -> Result<()> {
    let made = rcgen::generate_simple_self_signed(vec![SERVER_NAME.to_owned()]);
    let made = made.context("make a certificate")?;
    fs::write(dir.join(CERTIFICATE_FILE), made.cert.der()).context("write the certificate")?;
    fs::write(dir.join(KEY_FILE), made.signing_key.serialize_der()).context("write the key")
}

/// An endpoint on loopback, with the certificate in `dir`.
pub fn endpoint(dir: &Path) -> Result<Endpoint> {
    let certificate = fs::read(dir.join(CERTIFICATE_FILE)).context("read the certificate")?;
    let certificate = CertificateDer::from(certificate);
    let key = PrivatePkcs8KeyDer::from(fs::read(dir.join(KEY_FILE)).context("read the key")?);
    let transport = Arc::new(transport());
    let mut server = quinn::ServerConfig::with_single_cert(vec![certificate.clone()], key.into())
        .context("server's TLS")?;
    server.transport_config(transport.clone());
    let mut roots = RootCertStore::empty();
    roots.add(certificate).context("trust the certificate")?;
    let mut client =
        quinn::ClientConfig::with_root_certificates(Arc::new(roots)).context("client's TLS")?;
    client.transport_config(transport);
    let mut config = EndpointConfig::default();
    config
        .max_udp_payload_size(DATAGRAM_BYTES_MAX)
        .context("datagram size")?;
    let socket = socket().context("make a UDP socket")?;
    let mut endpoint = Endpoint::new(config, Some(server), socket, Arc::new(TokioRuntime))
        .context("start an endpoint")?;
    endpoint.set_default_client_config(client);
    Ok(endpoint)
}

/// Connects, and opens the connection's one stream. The peer sees it with the first bytes.
pub async fn connect(
    endpoint: &Endpoint,
    address: SocketAddr,
) -> Result<(quinn::SendStream, RecvStream)> {
    let connecting = endpoint.connect(address, SERVER_NAME).context("connect")?;
    let connection = connecting
        .await
        .with_context(|| format!("connect to {address}"))?;
    connection.open_bi().await.context("open a stream")
}

/// Reads what is there of a stream, at least one chunk; none at its end.
pub async fn read<'a>(
    stream: &mut RecvStream,
    chunks: &'a mut [Bytes; CHUNKS_PER_READ],
) -> Result<Option<&'a [Bytes]>> {
    let count = stream
        .read_chunks(chunks)
        .await
        .context("read from a peer")?;
    Ok(count.map(|count| &chunks[..count]))
}

fn transport() -> TransportConfig {
    let mut congestion = CubicConfig::default();
    congestion.initial_window(INITIAL_WINDOW_BYTES);
    let mut config = TransportConfig::default();
    config
        .initial_mtu(MTU)
        .mtu_discovery_config(None)
        // Several such packets do not fit one call of segmentation offload.
        .enable_segmentation_offload(false)
        .congestion_controller_factory(Arc::new(congestion))
        .max_concurrent_bidi_streams(VarInt::from_u32(STREAMS_MAX))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .keep_alive_interval(Some(KEEP_ALIVE_INTERVAL))
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW_BYTES))
        .datagram_receive_buffer_size(None);
    config
}

fn socket() -> std::io::Result<std::net::UdpSocket> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP))?;
    // The system may give less.
    socket.set_recv_buffer_size(SOCKET_BUFFER_BYTES)?;
    socket.set_send_buffer_size(SOCKET_BUFFER_BYTES)?;
    socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into())?;
    Ok(socket.into())
}
