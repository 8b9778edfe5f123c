//! Two endpoints over real sockets.

use crate::authority::{self, Authority, CA_CERTIFICATE_FILE};
use crate::{Connection, Endpoint, Identity, LinkError, PeerRole, Profile};
use bytes::Bytes;
use durovfs_wire::{Frame, NodeName};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;
use tempfile::TempDir;

/// Longer than anything here takes, shorter than a person waits.
const PATIENCE: Duration = Duration::from_secs(8);
const ANY_PORT: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

fn name(text: &str) -> NodeName {
    text.parse().unwrap()
}

fn cluster() -> (TempDir, Authority) {
    let directory = tempfile::tempdir().unwrap();
    let authority = authority::create().unwrap();
    authority.write(directory.path()).unwrap();
    (directory, authority)
}

fn node(directory: &Path, authority: &Authority, node: &str) -> Identity {
    identity(directory, node, &authority.issue_node(&name(node)).unwrap())
}

fn client(directory: &Path, authority: &Authority, patterns: &[&str]) -> Identity {
    let patterns: Vec<String> = patterns.iter().map(|p| (*p).to_owned()).collect();
    identity(
        directory,
        "app",
        &authority.issue_client("app", &patterns).unwrap(),
    )
}

fn identity(directory: &Path, stem: &str, pair: &authority::PemPair) -> Identity {
    let certificate = directory.join(format!("{stem}.pem"));
    let key = directory.join(format!("{stem}-key.pem"));
    pair.write(&certificate, &key).unwrap();
    Identity::load(&directory.join(CA_CERTIFICATE_FILE), &certificate, &key).unwrap()
}

/// A server that answers each frame with itself, and the reasons why handshakes failed.
fn echo_server(endpoint: Endpoint) -> tokio::sync::mpsc::UnboundedReceiver<LinkError> {
    let (refusals, receiver) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Some(incoming) = endpoint.accept().await {
            let refusals = refusals.clone();
            tokio::spawn(async move {
                match incoming.handshake().await {
                    Ok(connection) => echo(connection).await,
                    Err(error) => drop(refusals.send(error)),
                }
            });
        }
    });
    receiver
}

async fn echo(connection: Connection) {
    while let Ok((mut sender, mut receiver)) = connection.accept_stream().await {
        tokio::spawn(async move {
            let mut frames = Vec::new();
            while let Ok(true) = receiver.recv_many(&mut frames).await {
                if sender.send(&frames).await.is_err() {
                    return;
                }
                frames.clear();
            }
            sender.finish();
            // Keeps the sending half until all was delivered.
            tokio::time::sleep(PATIENCE).await;
        });
    }
}

fn frame(number: u64, payload: usize) -> Frame {
    Frame::encode(&number, Bytes::from(vec![number as u8; payload])).unwrap()
}

#[tokio::test]
async fn frames_of_all_sizes_arrive_in_order_and_the_peer_is_known() {
    // Broken if not: every exchange of the product.
    exchange(Profile::Auto).await;
}

#[tokio::test]
async fn frames_arrive_with_the_packets_of_a_network_too() {
    // Broken if not: a cluster of several machines, most of all its large transfers: packets that
    // are found to be larger must still fit the system's calls.
    exchange(Profile::Network).await;
}

async fn exchange(profile: Profile) {
    let (directory, authority) = cluster();
    let server = Endpoint::bind(
        ANY_PORT,
        &node(directory.path(), &authority, "primary"),
        profile,
    )
    .unwrap();
    let address = server.local_addr().unwrap();
    let _refusals = echo_server(server);
    let endpoint = Endpoint::client(
        &client(directory.path(), &authority, &["/srv/*.db"]),
        profile,
    )
    .unwrap();
    let connection = endpoint.connect(address, &name("primary")).await.unwrap();
    assert_eq!(connection.peer(), &PeerRole::Node(name("primary")));
    let (mut sender, mut receiver) = connection.open_stream().await.unwrap();
    let sizes = [0, 1, 4_120, 70_000, 1 << 20];
    let frames: Vec<_> = (0..200)
        .map(|i| frame(i, sizes[i as usize % sizes.len()]))
        .collect();
    let sent = frames.clone();
    let sending = tokio::spawn(async move {
        for batch in sent.chunks(7) {
            sender.send(batch).await.unwrap();
        }
        sender.finish();
        sender
    });
    for expected in &frames {
        let got = tokio::time::timeout(PATIENCE, receiver.recv())
            .await
            .unwrap()
            .unwrap();
        assert_eq!(got.as_ref().map(Frame::len), Some(expected.len()));
        assert_eq!(got.as_ref(), Some(expected));
    }
    assert_eq!(receiver.recv().await.unwrap(), None);
    sending.await.unwrap();
}

#[tokio::test]
async fn a_client_certificate_carries_its_patterns_to_the_server() {
    // Broken if not: who may open which database. The long ones make the largest certificate that
    // can be issued, which must not be too large for a handshake.
    let (directory, authority) = cluster();
    let server = Endpoint::bind(
        ANY_PORT,
        &node(directory.path(), &authority, "n1"),
        Profile::Auto,
    )
    .unwrap();
    let address = server.local_addr().unwrap();
    let long = "x".repeat(1_000);
    let mut patterns = vec!["/srv/**/*.db", "100% ü {a,b}"];
    patterns.extend(std::iter::repeat_n(long.as_str(), 7));
    let identity = client(directory.path(), &authority, &patterns);
    let endpoint = Endpoint::client(&identity, Profile::Auto).unwrap();
    let n1 = name("n1");
    let (incoming, connection) = tokio::join!(
        async { server.accept().await.unwrap().handshake().await.unwrap() },
        endpoint.connect(address, &n1)
    );
    connection.unwrap();
    let databases = patterns.iter().map(|p| (*p).to_owned()).collect();
    assert_eq!(
        incoming.peer(),
        &PeerRole::Client {
            name: "app".to_owned(),
            databases
        }
    );
    assert_eq!(identity.role(), incoming.peer());
}

#[tokio::test]
async fn a_certificate_of_another_cluster_is_refused_on_both_sides_in_one_line() {
    // Broken if not: anyone with a self-made certificate reads and writes all databases.
    let (here, authority) = cluster();
    let (elsewhere, other) = cluster();
    let server = Endpoint::bind(
        ANY_PORT,
        &node(here.path(), &authority, "n1"),
        Profile::Auto,
    )
    .unwrap();
    let address = server.local_addr().unwrap();
    let mut refusals = echo_server(server);

    // It does not trust the server, and says so; so does the server when it is told.
    let stranger = Endpoint::client(&node(elsewhere.path(), &other, "n2"), Profile::Auto).unwrap();
    let refused = stranger.connect(address, &name("n1")).await.unwrap_err();
    assert_one_line(
        &refused,
        "refused here: the certificate is not from this cluster's authority",
    );
    let seen = tokio::time::timeout(PATIENCE, refusals.recv())
        .await
        .unwrap()
        .unwrap();
    assert_one_line(&seen, "refused by");

    // It trusts the server, but its certificate is another authority's.
    let pair = other.issue_client("app", &["**".to_owned()]).unwrap();
    pair.write(&here.path().join("x.pem"), &here.path().join("x-key.pem"))
        .unwrap();
    let forged = Identity::load(
        &here.path().join(CA_CERTIFICATE_FILE),
        &here.path().join("x.pem"),
        &here.path().join("x-key.pem"),
    )
    .unwrap();
    let endpoint = Endpoint::client(&forged, Profile::Auto).unwrap();
    let told = match endpoint.connect(address, &name("n1")).await {
        Ok(connection) => tokio::time::timeout(PATIENCE, connection.closed())
            .await
            .unwrap(),
        Err(error) => error,
    };
    assert_one_line(&told, "refused by n1");
    let seen = tokio::time::timeout(PATIENCE, refusals.recv())
        .await
        .unwrap()
        .unwrap();
    assert_one_line(&seen, "refused here: the certificate");
}

fn assert_one_line(error: &LinkError, part: &str) {
    let LinkError::Refused(text) = error else {
        panic!("not a refusal: {error:?}")
    };
    assert!(text.contains(part), "{text:?} lacks {part:?}");
    assert!(!text.contains('\n'), "{text:?}");
}

#[tokio::test]
async fn a_node_that_is_not_the_one_asked_for_is_refused() {
    // Broken if not: a client's certificate, or another node's, could pose as the primary.
    let (directory, authority) = cluster();
    for identity in [
        node(directory.path(), &authority, "n2"),
        client(directory.path(), &authority, &["**"]),
    ] {
        let server = Endpoint::bind(ANY_PORT, &identity, Profile::Auto).unwrap();
        let address = server.local_addr().unwrap();
        let _refusals = echo_server(server);
        let endpoint =
            Endpoint::client(&node(directory.path(), &authority, "n3"), Profile::Auto).unwrap();
        let refused = endpoint.connect(address, &name("n1")).await.unwrap_err();
        assert_one_line(&refused, "refused here: the certificate");
    }
}

#[tokio::test]
async fn a_restarted_node_tells_its_peers_at_once() {
    // Broken if not: after a restart of the sidecar every application waits for the idle timeout.
    let (directory, authority) = cluster();
    let identity = node(directory.path(), &authority, "n1");
    let endpoint = Endpoint::client(
        &client(directory.path(), &authority, &["**"]),
        Profile::Auto,
    )
    .unwrap();
    let (tell, address) = tokio::sync::oneshot::channel();
    let (crash, crashes) = tokio::sync::oneshot::channel::<()>();
    let first = identity.clone();
    let life = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let held = runtime.block_on(async {
            let server = Endpoint::bind(ANY_PORT, &first, Profile::Auto).unwrap();
            tell.send(server.local_addr().unwrap()).unwrap();
            let connection = server.accept().await.unwrap().handshake().await.unwrap();
            crashes.await.unwrap();
            (server, connection)
        });
        // Without its runtime a connection cannot say goodbye, as in a killed process.
        drop(runtime);
        drop(held);
    });
    let address = address.await.unwrap();
    let connection = endpoint.connect(address, &name("n1")).await.unwrap();
    crash.send(()).unwrap();
    life.join().unwrap();
    assert_eq!(connection.close_reason(), None);

    let _second = Endpoint::bind(address, &identity, Profile::Auto).unwrap();
    let (mut sender, _receiver) = connection.open_stream().await.unwrap();
    sender.send(&[frame(1, 100)]).await.unwrap();
    let reason = tokio::time::timeout(Duration::from_secs(1), connection.closed())
        .await
        .unwrap();
    assert!(reason.to_string().contains("was restarted"), "{reason}");
}

#[tokio::test]
async fn a_node_that_is_not_there_yet_is_found_soon_after_it_starts() {
    // Broken if not: a client that starts with its sidecar waits a second or more for it.
    let (directory, authority) = cluster();
    let identity = node(directory.path(), &authority, "n1");
    let probe = Endpoint::bind(ANY_PORT, &identity, Profile::Auto).unwrap();
    let address = probe.local_addr().unwrap();
    probe.close("");
    probe.wait_idle(PATIENCE).await;
    drop(probe);
    tokio::time::sleep(Duration::from_millis(50)).await;
    let endpoint = Endpoint::client(
        &client(directory.path(), &authority, &["**"]),
        Profile::Auto,
    )
    .unwrap();
    let n1 = name("n1");
    let connecting = endpoint.connect(address, &n1);
    let serving = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        let server = Endpoint::bind(address, &identity, Profile::Auto).unwrap();
        server.accept().await.unwrap().handshake().await.unwrap()
    };
    let (served, connected) = tokio::time::timeout(Duration::from_secs(2), async {
        tokio::join!(serving, connecting)
    })
    .await
    .unwrap();
    assert_eq!(connected.unwrap().peer(), &PeerRole::Node(n1));
    drop(served);
}

#[test]
fn keys_are_for_their_owner_only_and_an_authority_reads_back() {
    // Broken if not: other users of the machine read the key; nodes cannot be added later.
    let (directory, authority) = cluster();
    let too_long = vec!["x".repeat(1_000); 9];
    assert!(authority.issue_client("app", &too_long).is_err());
    let mode = |file: &str| {
        std::fs::metadata(directory.path().join(file))
            .unwrap()
            .permissions()
            .mode()
            & 0o777
    };
    assert_eq!(mode("ca-key.pem"), 0o600);
    let pair = authority.issue_node(&name("n1")).unwrap();
    pair.write(
        &directory.path().join("n1.pem"),
        &directory.path().join("n1-key.pem"),
    )
    .unwrap();
    assert_eq!((mode("n1.pem"), mode("n1-key.pem")), (0o644, 0o600));
    assert!(!format!("{pair:?}{authority:?}").contains("PRIVATE"));
    let loaded = Authority::load(directory.path()).unwrap();
    let identity = node(directory.path(), &loaded, "n2");
    assert_eq!(identity.role(), &PeerRole::Node(name("n2")));
    assert!(!format!("{identity:?}").contains("key"));
}

#[test]
fn wrong_files_are_named() {
    // Broken if not: someone who mixed up two files does not learn which.
    let (directory, authority) = cluster();
    node(directory.path(), &authority, "n1");
    node(directory.path(), &authority, "n2");
    let file = |name: &str| directory.path().join(name);
    let load = |ca: &str, certificate: &str, key: &str| {
        Identity::load(&file(ca), &file(certificate), &file(key))
            .unwrap_err()
            .to_string()
    };
    assert!(load("ca.pem", "n1.pem", "n3-key.pem").contains("n3-key.pem"));
    assert!(load("ca.pem", "n1.pem", "n2-key.pem").contains("does not go with its key"));
    assert!(load("n1-key.pem", "n1.pem", "n1-key.pem").contains("no certificate"));
    assert!(load("ca.pem", "ca.pem", "ca-key.pem").contains("0 DNS names"));
}

#[tokio::test]
async fn another_version_is_refused_in_words_on_both_sides() {
    // Broken if not: whoever upgrades one program of two finds a number in one log, and in the
    // other that the connection is lost.
    let (directory, authority) = cluster();
    let identity = node(directory.path(), &authority, "n1");
    let server = Endpoint::bind(ANY_PORT, &identity, Profile::Auto).unwrap();
    let address = server.local_addr().unwrap();
    let endpoint = Endpoint::client(
        &client(directory.path(), &authority, &["**"]),
        Profile::Auto,
    )
    .unwrap();
    let serving = async {
        let incoming = server.accept().await.unwrap();
        let connection = incoming.handshake().await.unwrap();
        let (_sender, mut receiver) = connection.accept_stream().await.unwrap();
        receiver.recv().await.unwrap_err().to_string()
    };
    let calling = async {
        let connection = endpoint.connect(address, &name("n1")).await.unwrap();
        let (mut sender, mut receiver) = connection.open_stream().await.unwrap();
        sender.send_bytes(b"DUROVFS\x09").await;
        receiver.recv().await.unwrap_err().to_string()
    };
    let both = async { tokio::join!(serving, calling) };
    let (here, there) = tokio::time::timeout(PATIENCE, both).await.unwrap();
    assert!(here.contains("it speaks wire version 9"), "{here}");
    assert!(here.ends_with("upgrade this side"), "{here}");
    assert!(there.contains("connection refused by n1"), "{there}");
    assert!(there.ends_with("was spoken to in 9: upgrade it"), "{there}");
}
