//! A sidecar that keeps its log in memory and does with commits what a test tells it. Real QUIC.

use bytes::Bytes;
use durovfs_link::authority::{self, CA_CERTIFICATE_FILE};
use durovfs_link::{Connection, Endpoint, FrameSender, Identity, Profile};
use durovfs_wire::client::{ClientMessage, CommitOutcome, SidecarMessage};
use durovfs_wire::entry::{Origin, PartHeader, PartKind, TransactionSummary};
use durovfs_wire::position::Timestamp;
use durovfs_wire::{ClientId, DatabaseId, Epoch, Frame, LogPosition, Lsn, NodeName};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use tempfile::TempDir;
use tokio::sync::{mpsc, oneshot};

use crate::config::ClientConfig;

/// What the sidecar does with a commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Commits and answers.
    Answer,
    /// Commits, and dies before it answers.
    CommitAndDie,
    /// Dies without having committed.
    LoseAndDie,
    /// Takes it and says nothing.
    Silent,
    /// Says several times that it works on it, at this interval in milliseconds, then commits.
    Progress(u64),
    /// Answers that its log has gone on, and dropped what would tell, when it is asked.
    Forgetful,
    /// Commits, and gives up the stream that it came on.
    CommitAndResetStream,
}

/// What happened, for tests to look at.
#[derive(Debug, Default)]
pub struct State {
    pub mode: Option<Mode>,
    pub committed: HashMap<Origin, LogPosition>,
    /// Life and message, in order of arrival.
    pub heard: Vec<(u32, Heard)>,
    pub clients: HashSet<ClientId>,
    /// Entries that a reader of the log gets.
    pub log_entries: u64,
    life: u32,
    opened: HashSet<DatabaseId>,
    parts: BTreeMap<u64, u32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Heard {
    Open,
    Commit(u64),
    Resolve(u64),
    Pages(u64),
    Abort(u64),
}

pub struct FakeSidecar {
    pub directory: TempDir,
    pub address: SocketAddr,
    state: Arc<Mutex<State>>,
    life: Option<Life>,
}

struct Life {
    stop: oneshot::Sender<()>,
    thread: std::thread::JoinHandle<()>,
}

pub fn database_of(name: &str) -> DatabaseId {
    let mut id = [0; 16];
    id[..name.len()].copy_from_slice(name.as_bytes());
    DatabaseId::from_bytes(id)
}

impl FakeSidecar {
    /// One that runs.
    pub fn start() -> Self {
        let mut sidecar = Self::prepare();
        sidecar.run();
        sidecar
    }

    /// One that does not run yet, at an address that is free.
    pub fn prepare() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let authority = authority::create().unwrap();
        authority.write(directory.path()).unwrap();
        let at = |name: &str| directory.path().join(name);
        let node: NodeName = "primary".parse().unwrap();
        let pair = authority.issue_node(&node).unwrap();
        pair.write(&at("primary.pem"), &at("primary-key.pem"))
            .unwrap();
        let pair = authority.issue_client("app", &["**".to_owned()]).unwrap();
        pair.write(&at("client.pem"), &at("client-key.pem"))
            .unwrap();
        let address = std::net::UdpSocket::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap();
        let state = Arc::new(Mutex::new(State::default()));
        Self {
            directory,
            address,
            state,
            life: None,
        }
    }

    pub fn config(&self) -> ClientConfig {
        let file = self.directory.path().join("client.toml");
        let text = format!(
            "sidecar = \"{}\"\nnode = \"primary\"\nca = \"{CA_CERTIFICATE_FILE}\"\n\
             certificate = \"client.pem\"\nkey = \"client-key.pem\"\n",
            self.address
        );
        std::fs::write(&file, text).unwrap();
        ClientConfig::read(&file).unwrap()
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub fn set_mode(&self, mode: Mode) {
        self.state().mode = Some(mode);
    }

    pub fn count(&self, wanted: impl Fn(Heard) -> bool) -> usize {
        self.state()
            .heard
            .iter()
            .filter(|(_, heard)| wanted(*heard))
            .count()
    }

    /// Begins a life; the log is still there, all else is forgotten.
    pub fn run(&mut self) {
        let at = |name: &str| self.directory.path().join(name);
        let identity = Identity::load(
            &at(CA_CERTIFICATE_FILE),
            &at("primary.pem"),
            &at("primary-key.pem"),
        )
        .unwrap();
        let (stop, stopped) = oneshot::channel();
        let (ready, is_ready) = std::sync::mpsc::channel();
        let (address, state) = (self.address, self.state.clone());
        let thread = std::thread::spawn(move || live(address, &identity, state, ready, stopped));
        is_ready.recv().unwrap();
        self.life = Some(Life { stop, thread });
    }

    /// Ends the life as a killed process ends: nobody is told.
    pub fn kill(&mut self) {
        let life = self.life.take().unwrap();
        // A life that ended by its mode does not listen any more.
        let _ = life.stop.send(());
        life.thread.join().unwrap();
    }

    /// Whether the life ended by its mode.
    pub fn has_died(&self) -> bool {
        self.life
            .as_ref()
            .is_some_and(|life| life.thread.is_finished())
    }

    /// Waits until the life ended by its mode.
    pub fn await_death(&mut self) {
        self.life.take().unwrap().thread.join().unwrap();
    }
}

impl Drop for FakeSidecar {
    fn drop(&mut self) {
        if self.life.is_some() {
            self.kill();
        }
    }
}

fn live(
    address: SocketAddr,
    identity: &Identity,
    state: Arc<Mutex<State>>,
    ready: std::sync::mpsc::Sender<()>,
    stopped: oneshot::Receiver<()>,
) {
    {
        let mut state = state.lock().unwrap();
        state.life += 1;
        state.opened.clear();
        state.parts.clear();
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let kept = runtime.block_on(async {
        let endpoint = Endpoint::bind(address, identity, Profile::Auto).unwrap();
        ready.send(()).unwrap();
        let (die, mut death) = mpsc::unbounded_channel();
        let connections = Arc::new(Mutex::new(Vec::new()));
        let serving = serve(endpoint.clone(), state, die, connections.clone());
        tokio::select! {
            () = serving => {}
            _ = death.recv() => {}
            _ = stopped => {}
        }
        (endpoint, connections)
    });
    // Without its runtime a connection cannot say goodbye, as in a killed process.
    drop(runtime);
    drop(kept);
}

async fn serve(
    endpoint: Endpoint,
    state: Arc<Mutex<State>>,
    die: mpsc::UnboundedSender<()>,
    connections: Arc<Mutex<Vec<Connection>>>,
) {
    while let Some(incoming) = endpoint.accept().await {
        let (state, die, connections) = (state.clone(), die.clone(), connections.clone());
        tokio::spawn(async move {
            let Ok(connection) = incoming.handshake().await else {
                return;
            };
            connections.lock().unwrap().push(connection.clone());
            while let Ok((sender, mut receiver)) = connection.accept_stream().await {
                let mut session = Session {
                    state: state.clone(),
                    die: die.clone(),
                    sender,
                };
                tokio::spawn(async move {
                    while let Ok(Some(frame)) = receiver.recv().await {
                        session.handle(frame.message().unwrap()).await;
                    }
                    // Keeps the sending half until all was delivered.
                    tokio::time::sleep(Duration::from_secs(5)).await;
                });
            }
        });
    }
}

struct Session {
    state: Arc<Mutex<State>>,
    die: mpsc::UnboundedSender<()>,
    sender: FrameSender,
}

impl Session {
    async fn say(&mut self, message: SidecarMessage) {
        let frame = Frame::encode(&message, Bytes::new()).unwrap();
        // The client may be gone.
        let _ = self.sender.send(&[frame]).await;
    }

    fn hear(&self, heard: Heard) {
        let mut state = self.state.lock().unwrap();
        let life = state.life;
        state.heard.push((life, heard));
    }

    async fn handle(&mut self, message: ClientMessage) {
        match message {
            ClientMessage::Hello { client, .. } => {
                self.state.lock().unwrap().clients.insert(client);
                self.say(SidecarMessage::Welcome {
                    node: "primary".parse().unwrap(),
                })
                .await;
            }
            ClientMessage::Open {
                request,
                name,
                known,
                ..
            } => {
                self.open(request, &name, known).await;
            }
            ClientMessage::Pages { sequence, .. } => {
                self.hear(Heard::Pages(sequence));
                *self
                    .state
                    .lock()
                    .unwrap()
                    .parts
                    .entry(sequence)
                    .or_default() += 1;
            }
            ClientMessage::Abort { sequence, .. } => self.hear(Heard::Abort(sequence)),
            ClientMessage::Commit {
                database,
                commit,
                streamed_parts,
                ..
            } => {
                self.hear(Heard::Commit(commit.origin.sequence));
                self.commit(database, commit.origin, streamed_parts).await;
            }
            ClientMessage::Resolve {
                request,
                database,
                origin,
                ..
            } => {
                self.hear(Heard::Resolve(origin.sequence));
                let outcome = self.resolve(database, origin);
                self.say(SidecarMessage::Outcome {
                    database,
                    sequence: request,
                    outcome,
                })
                .await;
            }
            ClientMessage::ReadLog {
                database,
                first_lsn,
                ..
            } => {
                self.send_log(database, first_lsn).await;
            }
            ClientMessage::Replace { .. }
            | ClientMessage::NodeStatus { .. }
            | ClientMessage::DatabaseStatus { .. }
            | ClientMessage::FindBookmark { .. } => panic!("not expected here"),
        }
    }

    async fn open(&mut self, request: u64, name: &str, known: Option<DatabaseId>) {
        self.hear(Heard::Open);
        let database = known.unwrap_or_else(|| database_of(name));
        self.state.lock().unwrap().opened.insert(database);
        let epoch = Epoch::new(1);
        let end = LogPosition::new(epoch, Lsn::new(1));
        let last_transaction = None;
        self.say(SidecarMessage::Opened {
            request,
            database,
            epoch,
            end,
            last_transaction,
            taken_from: None,
        })
        .await;
    }

    fn resolve(&self, database: DatabaseId, origin: Origin) -> CommitOutcome {
        let state = self.state.lock().unwrap();
        if !state.opened.contains(&database) {
            return CommitOutcome::Unknown {
                reason: "resolved before it was opened".to_owned(),
            };
        }
        if state.mode == Some(Mode::Forgetful) {
            let position = LogPosition::new(Epoch::new(1), Lsn::new(99));
            let commit = super::header(origin);
            let last_transaction = TransactionSummary { position, commit };
            return CommitOutcome::Behind { last_transaction };
        }
        match state.committed.get(&origin) {
            Some(position) => CommitOutcome::Committed {
                position: *position,
            },
            None => CommitOutcome::NotCommitted {
                reason: "not in the log".to_owned(),
            },
        }
    }

    async fn commit(&mut self, database: DatabaseId, origin: Origin, streamed_parts: u32) {
        let sequence = origin.sequence;
        let (mode, refusal) = {
            let state = self.state.lock().unwrap();
            let parts = state.parts.get(&sequence).copied().unwrap_or(0);
            let refusal = if !state.opened.contains(&database) {
                Some("committed before it was opened".to_owned())
            } else if parts != streamed_parts {
                Some(format!(
                    "{streamed_parts} parts announced, {parts} received"
                ))
            } else {
                None
            };
            (state.mode.unwrap_or(Mode::Answer), refusal)
        };
        if let Some(reason) = refusal {
            let outcome = CommitOutcome::NotCommitted { reason };
            return self
                .say(SidecarMessage::Outcome {
                    database,
                    sequence,
                    outcome,
                })
                .await;
        }
        match mode {
            Mode::Answer | Mode::Forgetful => self.commit_and_say(database, origin).await,
            Mode::CommitAndDie => {
                self.insert(origin);
                self.die.send(()).unwrap();
            }
            Mode::LoseAndDie => self.die.send(()).unwrap(),
            Mode::Silent => {}
            Mode::Progress(interval) => {
                for _ in 0..4 {
                    tokio::time::sleep(Duration::from_millis(interval)).await;
                    self.say(SidecarMessage::Progress { database, sequence })
                        .await;
                }
                tokio::time::sleep(Duration::from_millis(interval)).await;
                self.commit_and_say(database, origin).await;
            }
            Mode::CommitAndResetStream => {
                self.insert(origin);
                self.sender.reset();
            }
        }
    }

    fn insert(&self, origin: Origin) -> LogPosition {
        let mut state = self.state.lock().unwrap();
        let lsn = Lsn::new(2 + state.committed.len() as u64);
        let position = LogPosition::new(Epoch::new(1), lsn);
        let before = state.committed.insert(origin, position);
        assert_eq!(before, None, "{origin:?} was committed twice");
        position
    }

    async fn commit_and_say(&mut self, database: DatabaseId, origin: Origin) {
        let position = self.insert(origin);
        let outcome = CommitOutcome::Committed { position };
        let sequence = origin.sequence;
        self.say(SidecarMessage::Outcome {
            database,
            sequence,
            outcome,
        })
        .await;
    }

    async fn send_log(&mut self, database: DatabaseId, first_lsn: Lsn) {
        let last = self.state.lock().unwrap().log_entries;
        for number in first_lsn.get()..=last {
            let kind = PartKind::EpochStart {
                time: Timestamp::from_micros(0),
                last_transaction: None,
            };
            let lsn = Lsn::new(number);
            let part = PartHeader {
                database,
                epoch: Epoch::new(1),
                lsn,
                part: 0,
                kind,
            };
            self.say(SidecarMessage::LogPart { part }).await;
        }
        self.say(SidecarMessage::LogEnd { error: None }).await;
    }
}
