//! The UDP socket below an endpoint: its buffers, and what QUIC may ask of it.

use crate::error::LinkError;
use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, Runtime, TokioRuntime, UdpPoller};
use socket2::{Domain, Protocol, Socket, Type};
use std::io::{self, IoSliceMut};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

/// Room for a burst of all peers while this process waits for the processor. The system may give
/// less (net.core.rmem_max).
const BUFFER_BYTES: usize = 4 << 20;
/// Most packets in one segmentation-offload call: with more, packets of the largest size that
/// discovery finds exceed 64 KiB, and the call fails without a word.
const MAX_TRANSMIT_SEGMENTS: usize = 7;

/// Binds a socket to an address.
pub(crate) fn bind(address: SocketAddr) -> Result<UdpSocket, LinkError> {
    bind_socket(address).map_err(|e| LinkError::socket(&format!("bind {address}"), &e))
}

/// Binds a socket that reaches peers of both families, or of IPv4 where the system has no IPv6.
pub(crate) fn bind_client() -> Result<UdpSocket, LinkError> {
    bind_socket((Ipv6Addr::UNSPECIFIED, 0).into())
        .or_else(|_| bind_socket((Ipv4Addr::UNSPECIFIED, 0).into()))
        .map_err(|e| LinkError::socket("bind a socket for outgoing connections", &e))
}

fn bind_socket(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::DGRAM,
        Some(Protocol::UDP),
    )?;
    if address.is_ipv6() && address.ip().is_unspecified() {
        socket.set_only_v6(false)?;
    }
    socket.set_recv_buffer_size(BUFFER_BYTES)?;
    socket.set_send_buffer_size(BUFFER_BYTES)?;
    socket.bind(&address.into())?;
    Ok(socket.into())
}

/// tokio's socket with two limits of our own.
#[derive(Debug)]
pub(crate) struct LinkSocket {
    inner: Arc<dyn AsyncUdpSocket>,
}

impl LinkSocket {
    pub(crate) fn new(socket: UdpSocket) -> Result<Self, LinkError> {
        let inner = TokioRuntime
            .wrap_udp_socket(socket)
            .map_err(|e| LinkError::socket("register the socket", &e))?;
        Ok(Self { inner })
    }
}

impl AsyncUdpSocket for LinkSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        self.inner.clone().create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.inner.try_send(transmit)
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        self.inner.poll_recv(cx, bufs, meta)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.inner
            .max_transmit_segments()
            .min(MAX_TRANSMIT_SEGMENTS)
    }

    fn max_receive_segments(&self) -> usize {
        // A buffer of the largest datagram holds whatever the system merged into one: it never
        // makes more of it. The answer of the inner socket would reserve 128 MiB.
        1
    }

    fn may_fragment(&self) -> bool {
        self.inner.may_fragment()
    }
}
