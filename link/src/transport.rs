//! How QUIC is tuned, and why. The numbers were measured: a whole commit in one packet, and few
//! packets per bulk transfer, matter most; the congestion controller does not.

use quinn::congestion::CubicConfig;
use quinn::{IdleTimeout, MtuDiscoveryConfig, TransportConfig, VarInt};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

/// A connection without a sign of life for so long is lost. Long enough for a stalled disk or a
/// paused machine, short enough that a commit's default time sees it.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(10);
/// Pause after which a sign of life is sent; several fit into [`IDLE_TIMEOUT`].
pub const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(2);
/// Streams that a peer may have open at a time. Memory for all of them is taken in advance; enough
/// for a shared stream and some dozens of bulk transfers.
pub const MAX_STREAMS: u32 = 64;

/// Packets on loopback: a commit, and most of a part, in one. More than 65,507 do not fit UDP.
const LOCAL_MTU: u16 = 65_000;
/// Largest datagram taken; the default of 1,472 would hold the peer to that.
pub(crate) const MAX_DATAGRAM_BYTES: u16 = 65_527;
/// Pause before large packets are tried again on loopback, where nothing swallows them.
const LOCAL_MTU_RETRY: Duration = Duration::from_secs(1);
/// With the default window a connection with a large MTU hangs: the congestion check asks for room
/// for whole packets. Ten is the usual start.
const INITIAL_WINDOW_PACKETS: u64 = 10;
/// Round trip assumed before the first is measured: sets when a lost handshake packet, or one sent
/// before the peer was up, is sent again.
const LOCAL_INITIAL_RTT: Duration = Duration::from_millis(10);
const NETWORK_INITIAL_RTT: Duration = Duration::from_millis(100);
/// Upper end of the search for the path's packet size: jumbo frames, less headers.
const NETWORK_MTU_MAX: u16 = 8_900;
/// Bytes in flight on one stream. Above this, throughput does not grow.
const STREAM_WINDOW_BYTES: u32 = 2 << 20;
/// Bytes sent and not acknowledged, on all streams.
const SEND_WINDOW_BYTES: u64 = 16 << 20;

/// What lies between this node and its peers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Profile {
    /// For each peer by its address: loopback is [`Profile::Local`], all else [`Profile::Network`].
    #[default]
    Auto,
    /// Loopback: packets as large as UDP allows.
    Local,
    /// A network: packets as large as the path is found to carry.
    Network,
}

impl Profile {
    /// The profile for one peer; never [`Profile::Auto`].
    pub(crate) fn for_peer(self, address: SocketAddr) -> Self {
        match self {
            Self::Auto if canonical(address.ip()).is_loopback() => Self::Local,
            Self::Auto | Self::Network => Self::Network,
            Self::Local => Self::Local,
        }
    }
}

/// On a socket for both families, IPv4 peers have mapped addresses.
fn canonical(ip: IpAddr) -> IpAddr {
    ip.to_canonical()
}

/// Both transport configurations, made once per endpoint.
#[derive(Debug, Clone)]
pub(crate) struct Transports {
    local: Arc<TransportConfig>,
    network: Arc<TransportConfig>,
}

impl Transports {
    pub(crate) fn new() -> Self {
        Self {
            local: Arc::new(local()),
            network: Arc::new(network()),
        }
    }

    pub(crate) fn of(&self, profile: Profile, peer: SocketAddr) -> Arc<TransportConfig> {
        match profile.for_peer(peer) {
            Profile::Local => self.local.clone(),
            Profile::Auto | Profile::Network => self.network.clone(),
        }
    }
}

fn local() -> TransportConfig {
    let mut config = common();
    let mut congestion = CubicConfig::default();
    congestion.initial_window(INITIAL_WINDOW_PACKETS * u64::from(LOCAL_MTU));
    // The search ends where it begins; it is there to come back after a burst of losses that was
    // taken for a path that swallows large packets.
    let mut discovery = MtuDiscoveryConfig::default();
    discovery
        .upper_bound(LOCAL_MTU)
        .black_hole_cooldown(LOCAL_MTU_RETRY);
    config
        .initial_mtu(LOCAL_MTU)
        .mtu_discovery_config(Some(discovery))
        // Several such packets do not fit one call of segmentation offload.
        .enable_segmentation_offload(false)
        .initial_rtt(LOCAL_INITIAL_RTT)
        .congestion_controller_factory(Arc::new(congestion));
    config
}

fn network() -> TransportConfig {
    let mut config = common();
    let mut discovery = MtuDiscoveryConfig::default();
    discovery.upper_bound(NETWORK_MTU_MAX);
    config
        .mtu_discovery_config(Some(discovery))
        .initial_rtt(NETWORK_INITIAL_RTT);
    config
}

fn common() -> TransportConfig {
    let mut config = TransportConfig::default();
    let idle = VarInt::from_u32(IDLE_TIMEOUT.as_millis() as u32);
    config
        .max_concurrent_bidi_streams(VarInt::from_u32(MAX_STREAMS))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .max_idle_timeout(Some(IdleTimeout::from(idle)))
        .keep_alive_interval(Some(KEEP_ALIVE_INTERVAL))
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW_BYTES))
        // All streams together may have what each may: no stalled transfer holds up another.
        .receive_window(VarInt::from_u32(STREAM_WINDOW_BYTES * MAX_STREAMS))
        .send_window(SEND_WINDOW_BYTES)
        .datagram_receive_buffer_size(None);
    config
}
