//! Questions to a running sidecar, over the client protocol: connect, say hello, ask, wait.
//!
//! No printing and no exit statuses of single commands; every question has a time limit.

use super::{EXIT_FAILED, Failure};
use crate::config::ClientConfig;
use bytes::Bytes;
use durovfs_link::{Endpoint, FrameReceiver, FrameSender, Identity, Profile};
use durovfs_wire::client::{ClientMessage, FailureKind, ReplaceState, SidecarMessage};
use durovfs_wire::status::{DatabaseStatus, NodeStatus};
use durovfs_wire::{ClientId, DatabaseId, Frame, LogPosition, NodeName};
use std::time::Duration;

/// Longest wait for a connection or an answer: a sidecar answers from memory, so that one which
/// does not within this time is stopped or out of reach.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a sidecar may take to become a database's primary: a restarted one needs the promises
/// of a quorum.
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest wait for the goodbye to leave the socket.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(200);

/// A log, as the sidecar opened it.
#[derive(Debug, Clone, Copy)]
pub struct OpenedLog {
    /// The log.
    pub database: DatabaseId,
    /// Its last committed transaction; none when it has none.
    pub last: Option<LogPosition>,
}

/// A connection to a sidecar for questions.
pub struct Asker {
    peer: String,
    endpoint: Endpoint,
    sender: FrameSender,
    receiver: FrameReceiver,
    requests: u64,
}

/// A database that the sidecar is the primary of now.
pub struct TakenOver {
    /// Its log.
    pub database: DatabaseId,
    /// Last entry of the log.
    pub end: LogPosition,
    /// The live primary that it was taken from.
    pub taken_from: Option<NodeName>,
}

impl Asker {
    /// Connects to the sidecar that the configuration names.
    ///
    /// # Errors
    /// When the certificate cannot be used, or the sidecar is not reached or refuses.
    pub async fn connect(config: &ClientConfig, limit: Duration) -> Result<Self, Failure> {
        let peer = format!("sidecar {} at {}", config.node, config.sidecar);
        let tls = &config.tls;
        let identity = Identity::load(&tls.ca, &tls.certificate, &tls.key)
            .map_err(|error| Failure::new(EXIT_FAILED, format!("client certificate: {error}")))?;
        let connecting = Self::connect_with(config, &identity, peer.clone());
        let connected = tokio::time::timeout(limit, connecting).await;
        let problem = match connected {
            Ok(Ok(asker)) => return Ok(asker),
            Ok(Err(problem)) => problem,
            Err(_) => format!("no answer within {limit:?}; is it running?"),
        };
        Err(Failure::new(
            EXIT_FAILED,
            format!(
                "{peer}: {problem} (client config {})",
                config.file.display()
            ),
        ))
    }

    async fn connect_with(
        config: &ClientConfig,
        identity: &Identity,
        peer: String,
    ) -> Result<Self, String> {
        let mut addresses = tokio::net::lookup_host(&config.sidecar)
            .await
            .map_err(|error| format!("look up its address: {error}"))?;
        let address = addresses.next().ok_or("its name has no address")?;
        let endpoint =
            Endpoint::client(identity, Profile::Auto).map_err(|error| error.to_string())?;
        let connection = endpoint
            .connect(address, &config.node)
            .await
            .map_err(|error| error.to_string())?;
        let (sender, receiver) = connection
            .open_stream()
            .await
            .map_err(|error| error.to_string())?;
        let mut asker = Self {
            peer,
            endpoint,
            sender,
            receiver,
            requests: 0,
        };
        let mut id = [0; 16];
        getrandom::fill(&mut id).map_err(|error| format!("draw a client id: {error}"))?;
        let description = format!("durovfs command line, process {}", std::process::id());
        asker
            .send(&ClientMessage::Hello {
                client: ClientId::from_bytes(id),
                description,
            })
            .await?;
        match asker.next().await? {
            SidecarMessage::Welcome { .. } => Ok(asker),
            other => Err(format!("answered a greeting with {other:?}")),
        }
    }

    /// The state of the node.
    ///
    /// # Errors
    /// When no answer comes in time.
    pub async fn node_status(&mut self) -> Result<NodeStatus, Failure> {
        self.requests += 1;
        let request = self.requests;
        match self.ask(&ClientMessage::NodeStatus { request }).await? {
            SidecarMessage::NodeStatus { status, .. } => Ok(status),
            other => Err(self.unexpected(&other)),
        }
    }

    /// The state of one database; none when the node has none of that name.
    ///
    /// # Errors
    /// When no answer comes in time.
    pub async fn database_status(&mut self, name: &str) -> Result<Option<DatabaseStatus>, Failure> {
        self.requests += 1;
        let question = ClientMessage::DatabaseStatus {
            request: self.requests,
            name: name.to_owned(),
        };
        match self.ask(&question).await? {
            SidecarMessage::DatabaseStatus { status, .. } => Ok(status),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Makes the sidecar the primary of a database, and asks where its log ends.
    ///
    /// # Errors
    /// When it does not get there in time, or another host is the primary.
    pub async fn open_log(&mut self, name: &str) -> Result<OpenedLog, Failure> {
        self.requests += 1;
        let question = ClientMessage::Open {
            request: self.requests,
            name: name.to_owned(),
            known: None,
            force: false,
            must_exist: false,
            timeout_ms: OPEN_TIMEOUT.as_millis() as u64,
        };
        match self
            .ask_within(&question, OPEN_TIMEOUT + ANSWER_TIMEOUT)
            .await?
        {
            SidecarMessage::Opened {
                database,
                last_transaction,
                ..
            } => Ok(OpenedLog {
                database,
                last: last_transaction.map(|last| last.position),
            }),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Makes the sidecar the primary of a database; none when the cluster has none of that name.
    ///
    /// # Errors
    /// When that is not done within `limit`.
    pub async fn take_over(
        &mut self,
        name: &str,
        limit: Duration,
    ) -> Result<Option<TakenOver>, Failure> {
        self.requests += 1;
        let timeout_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX).max(1);
        let question = ClientMessage::Open {
            request: self.requests,
            name: name.to_owned(),
            known: None,
            force: true,
            must_exist: true,
            timeout_ms,
        };
        match self.ask_within(&question, limit + ANSWER_TIMEOUT).await? {
            SidecarMessage::Opened {
                database,
                end,
                taken_from,
                ..
            } => Ok(Some(TakenOver {
                database,
                end,
                taken_from,
            })),
            SidecarMessage::Failed {
                kind: FailureKind::UnknownDatabase,
                ..
            } => Ok(None),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Begins a replacement, or asks how far it is; or why it cannot be done.
    ///
    /// # Errors
    /// When no answer comes in time.
    pub async fn replace(
        &mut self,
        name: &str,
        old: &NodeName,
        new: &NodeName,
    ) -> Result<Result<ReplaceState, (FailureKind, String)>, Failure> {
        self.requests += 1;
        let question = ClientMessage::Replace {
            request: self.requests,
            name: name.to_owned(),
            old: old.clone(),
            new: new.clone(),
        };
        match self.ask(&question).await? {
            SidecarMessage::Replacing { state, .. } => Ok(Ok(state)),
            SidecarMessage::Failed { kind, message, .. } => Ok(Err((kind, message))),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Says goodbye.
    pub async fn close(self) {
        self.endpoint.close("done");
        self.endpoint.wait_idle(CLOSE_TIMEOUT).await;
    }

    async fn ask(&mut self, question: &ClientMessage) -> Result<SidecarMessage, Failure> {
        self.ask_within(question, ANSWER_TIMEOUT).await
    }

    async fn ask_within(
        &mut self,
        question: &ClientMessage,
        limit: Duration,
    ) -> Result<SidecarMessage, Failure> {
        let exchange = async {
            self.send(question).await?;
            self.next().await
        };
        let problem = match tokio::time::timeout(limit, exchange).await {
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(problem)) => problem,
            Err(_) => format!("no answer within {limit:?}"),
        };
        Err(Failure::new(
            EXIT_FAILED,
            format!("{}: {problem}", self.peer),
        ))
    }

    fn unexpected(&self, answer: &SidecarMessage) -> Failure {
        let problem = match answer {
            SidecarMessage::Failed { message, .. } => message.clone(),
            other => format!("unexpected answer {other:?}"),
        };
        Failure::new(EXIT_FAILED, format!("{}: {problem}", self.peer))
    }

    async fn send(&mut self, message: &ClientMessage) -> Result<(), String> {
        let frame = Frame::encode(message, Bytes::new()).map_err(|error| error.to_string())?;
        self.sender
            .send(&[frame])
            .await
            .map_err(|error| error.to_string())
    }

    async fn next(&mut self) -> Result<SidecarMessage, String> {
        let frame = self
            .receiver
            .recv()
            .await
            .map_err(|error| error.to_string())?;
        let frame = frame.ok_or("the sidecar ended the conversation")?;
        frame.message().map_err(|error| error.to_string())
    }
}
