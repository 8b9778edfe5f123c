//! The runtime thread: one connection to the sidecar, made when a caller needs it and made again
//! when it breaks, and the shared stream on it.

use super::stream::{self, Step};
use super::table::{Pending, Table};
use crate::config::ClientConfig;
use crate::log;
use durovfs_link::{
    Connection, Endpoint, FrameReceiver, FrameSender, Identity, LinkError, Profile,
};
use durovfs_vfs::shim::OWN_THREAD_NAME;
use durovfs_vfs::sink::SinkError;
use durovfs_wire::client::{ClientMessage, SidecarMessage};
use durovfs_wire::entry::EntryPart;
use durovfs_wire::{DatabaseId, Frame, Lsn};
use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};
use tokio::sync::{Notify, watch};

/// Pause after the first failure to connect: a restarting sidecar is found soon.
const BACKOFF_MIN: Duration = Duration::from_millis(20);
/// Longest pause: a sidecar that is away for long costs little.
const BACKOFF_MAX: Duration = Duration::from_millis(500);
/// Longest try to connect. The sidecar is near, and a packet that was lost before it was up is sent
/// again at growing intervals: a new try starts them afresh.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(1_500);
/// Commands taken per wakeup; more wait for the next.
const COMMANDS_PER_WAKEUP: usize = 256;
/// The shared stream goes before the streams of large transactions.
const SHARED_STREAM_PRIORITY: i32 = 1;

/// From the SQLite threads. At most a few per thread are under way, so the channel needs no bound.
#[derive(Debug)]
pub(super) enum Command {
    /// A call that waits for its answer.
    Call {
        /// Its number.
        number: u64,
        /// The call.
        pending: Pending,
    },
    /// The caller of that number went away.
    Forget {
        /// The number.
        number: u64,
    },
    /// A step of a transaction that has a stream of its own.
    Step {
        /// The log.
        database: DatabaseId,
        /// The transaction.
        sequence: u64,
        /// What to do.
        step: Step,
    },
    /// Read the log, on a stream of its own.
    ReadLog {
        /// The log.
        database: DatabaseId,
        /// First entry.
        first_lsn: Lsn,
        /// Whether the pages are wanted.
        pages: bool,
        /// Where the parts go, and none as a sign of life; the end of the channel is the end of the
        /// log.
        parts: mpsc::Sender<Result<Option<EntryPart>, SinkError>>,
    },
}

/// What the driver and the tasks of the streams share.
#[derive(Debug, Clone)]
pub(super) struct Shared {
    table: Arc<Mutex<Table>>,
    /// Something was queued in the table by another task.
    queued: Arc<Notify>,
    /// The connection, while there is one.
    pub(super) connection: watch::Receiver<Option<Connection>>,
    /// First on each stream.
    pub(super) hello: Frame,
    /// Why there is no connection; for the texts of errors.
    pub(super) trouble: Arc<Mutex<Option<String>>>,
}

impl Shared {
    pub(super) fn table(&self) -> MutexGuard<'_, Table> {
        // The table is whole between its methods, whatever panicked.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn notify(&self) {
        self.queued.notify_one();
    }

    /// True when it is another trouble than before.
    fn set_trouble(&self, trouble: Option<String>) -> bool {
        let mut held = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        let is_new = *held != trouble;
        *held = trouble;
        is_new
    }
}

/// What the runtime thread is made of.
pub(super) struct Setup {
    pub(super) config: Arc<ClientConfig>,
    pub(super) table: Table,
    pub(super) hello: Frame,
    pub(super) trouble: Arc<Mutex<Option<String>>>,
}

/// The body of the runtime thread. Ends when all senders of commands are gone.
pub(super) fn run(setup: Setup, mut commands: UnboundedReceiver<Command>) {
    let runtime = match tokio::runtime::Builder::new_current_thread()
        .thread_name(OWN_THREAD_NAME)
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            log::error(format_args!("start the client's runtime: {error}"));
            return;
        }
    };
    let (announce, connection) = watch::channel(None);
    let shared = Shared {
        table: Arc::new(Mutex::new(setup.table)),
        queued: Arc::new(Notify::new()),
        connection,
        hello: setup.hello,
        trouble: setup.trouble,
    };
    let mut driver = Driver {
        config: setup.config,
        shared,
        announce,
        streams: HashMap::new(),
    };
    runtime.block_on(driver.drive(&mut commands));
}

struct Driver {
    config: Arc<ClientConfig>,
    shared: Shared,
    announce: watch::Sender<Option<Connection>>,
    streams: HashMap<u64, UnboundedSender<Step>>,
}

/// How a connection ended.
struct Ended {
    error: LinkError,
    /// Whether the sidecar had said anything on it.
    answered: bool,
}

impl Ended {
    fn unanswered(error: LinkError) -> Self {
        Self {
            error,
            answered: false,
        }
    }
}

impl Driver {
    async fn drive(&mut self, commands: &mut UnboundedReceiver<Command>) {
        let mut backoff = BACKOFF_MIN;
        loop {
            while !self.shared.table().has_demand() {
                match commands.recv().await {
                    Some(command) => self.handle_command(command),
                    None => return,
                }
            }
            let config = self.config.clone();
            let Some(connected) = self.collect(commands, connect(&config)).await else {
                return;
            };
            let ended = match connected {
                Ok(connection) => match self.session(&connection, commands).await {
                    Some(ended) => ended,
                    None => return,
                },
                Err(error) => Ended::unanswered(error),
            };
            if ended.answered {
                backoff = BACKOFF_MIN;
            }
            self.note_trouble(&ended.error);
            let pause = tokio::time::sleep(backoff);
            backoff = (backoff * 2).min(BACKOFF_MAX);
            if self.collect(commands, pause).await.is_none() {
                return;
            }
        }
    }

    fn note_trouble(&self, error: &LinkError) {
        let text = format!(
            "sidecar {} at {}: {error}",
            self.config.node, self.config.sidecar
        );
        let is_refused = matches!(error, LinkError::Refused(_) | LinkError::Protocol(_));
        // Each try says the same: once is enough.
        if self.shared.set_trouble(Some(text.clone())) {
            if is_refused {
                log::error(format_args!("{text}"));
            } else {
                log::info(format_args!("{text}"));
            }
        }
        if is_refused {
            self.shared.table().handle_refused(&text);
        }
    }

    /// Takes commands while something else is waited for; none when there will be no more.
    async fn collect<T>(
        &mut self,
        commands: &mut UnboundedReceiver<Command>,
        future: impl Future<Output = T>,
    ) -> Option<T> {
        tokio::pin!(future);
        loop {
            tokio::select! {
                output = &mut future => return Some(output),
                command = commands.recv() => self.handle_command(command?),
            }
        }
    }

    fn handle_command(&mut self, command: Command) {
        match command {
            Command::Call { number, pending } => self.shared.table().add(number, pending),
            Command::Forget { number } => self.shared.table().forget(number),
            Command::Step {
                database,
                sequence,
                step,
            } => {
                self.handle_step(database, sequence, step);
            }
            Command::ReadLog {
                database,
                first_lsn,
                pages,
                parts,
            } => {
                let waiting = stream::Waiting::new(self.shared.clone());
                let question = ClientMessage::ReadLog {
                    database,
                    first_lsn,
                    pages,
                };
                let shared = self.shared.clone();
                let read = stream::read_log(shared, waiting, database, question, parts);
                tokio::spawn(read);
            }
        }
    }

    fn handle_step(&mut self, database: DatabaseId, sequence: u64, step: Step) {
        let last = step.is_last();
        if !self.streams.contains_key(&sequence) {
            if matches!(step, Step::Abort) {
                return;
            }
            let (sender, steps) = mpsc::unbounded_channel();
            let waiting = stream::Waiting::new(self.shared.clone());
            let run = stream::transaction(self.shared.clone(), waiting, database, sequence, steps);
            tokio::spawn(run);
            self.streams.insert(sequence, sender);
        }
        if let Some(stream) = self.streams.get(&sequence) {
            // The task serves steps until the last one; if it is gone, so is the runtime.
            let _ = stream.send(step);
        }
        if last {
            self.streams.remove(&sequence);
        }
    }

    /// Lives as long as the connection; none when there will be no more commands.
    async fn session(
        &mut self,
        connection: &Connection,
        commands: &mut UnboundedReceiver<Command>,
    ) -> Option<Ended> {
        let greeted = greet(connection, self.shared.hello.clone());
        let (sender, receiver) = match self.collect(commands, greeted).await? {
            Ok(stream) => stream,
            Err(error) => {
                let error = said_by_peer(connection).unwrap_or(error);
                return Some(Ended::unanswered(error));
            }
        };
        log::info(format_args!("connected with {}", self.config.sidecar));
        self.shared.set_trouble(None);
        self.shared.table().handle_connected();
        self.announce.send_replace(Some(connection.clone()));
        let shared = self.shared.clone();
        let ended = tokio::select! {
            ended = self.write(sender, commands) => ended,
            error = read(shared, receiver) => Some(error),
            error = connection.closed() => Some(error),
        };
        self.announce.send_replace(None);
        // What closed the connection says more than what a stream on it noticed.
        let reason = said_by_peer(connection);
        connection.close("session is over");
        ended.map(|error| Ended {
            error: reason.unwrap_or(error),
            answered: true,
        })
    }

    /// Sends what is queued, in batches; ends with an error, or none when all callers are gone.
    async fn write(
        &mut self,
        mut sender: FrameSender,
        commands: &mut UnboundedReceiver<Command>,
    ) -> Option<LinkError> {
        let mut batch = Vec::with_capacity(COMMANDS_PER_WAKEUP);
        let mut frames = Vec::new();
        loop {
            match self.shared.table().take_frames() {
                Ok(queued) => frames.extend(queued),
                Err(error) => return Some(error.into()),
            }
            if !frames.is_empty() {
                if let Err(error) = sender.send(&frames).await {
                    return Some(error);
                }
                frames.clear();
                continue;
            }
            let queued = self.shared.queued.clone();
            tokio::select! {
                count = commands.recv_many(&mut batch, COMMANDS_PER_WAKEUP) => {
                    if count == 0 {
                        return None;
                    }
                    for command in batch.drain(..) {
                        self.handle_command(command);
                    }
                }
                () = queued.notified() => {}
            }
        }
    }
}

/// Opens the shared stream, says who this is, and waits for the welcome. Before that nothing is
/// sent that counts: with TLS 1.3 a sidecar may still refuse this side's certificate, and what was
/// sent by then would have an unknown outcome where "not committed" is certain.
async fn greet(
    connection: &Connection,
    hello: Frame,
) -> Result<(FrameSender, FrameReceiver), LinkError> {
    let greeting = async {
        let (mut sender, mut receiver) = connection.open_stream().await?;
        sender.set_priority(SHARED_STREAM_PRIORITY);
        sender.send(&[hello]).await?;
        let frame = receiver.recv().await?;
        match frame
            .map(|frame| frame.message::<SidecarMessage>())
            .transpose()?
        {
            Some(SidecarMessage::Welcome { .. }) => Ok((sender, receiver)),
            Some(SidecarMessage::Failed { message, .. }) => Err(LinkError::Refused(message)),
            _ => Err(LinkError::Lost("the sidecar gave no welcome".to_owned())),
        }
    };
    match tokio::time::timeout(CONNECT_TIMEOUT, greeting).await {
        Ok(greeted) => greeted,
        Err(_) => Err(LinkError::Lost("the sidecar gives no welcome".to_owned())),
    }
}

/// Why the connection is gone, unless this side closed it: then what made it do so says more.
fn said_by_peer(connection: &Connection) -> Option<LinkError> {
    let reason = connection.close_reason();
    reason.filter(|reason| *reason != LinkError::Closed)
}

/// Hands what the sidecar says to the table.
async fn read(shared: Shared, mut receiver: FrameReceiver) -> LinkError {
    let mut frames = Vec::new();
    loop {
        match receiver.recv_many(&mut frames).await {
            Ok(true) => {}
            Ok(false) => return LinkError::Lost("the sidecar ended the stream".to_owned()),
            Err(error) => return error,
        }
        let mut table = shared.table();
        for frame in frames.drain(..) {
            match frame.message::<SidecarMessage>() {
                Ok(message) => table.handle_message(message),
                Err(error) => return error.into(),
            }
        }
        let queued = table.has_queued();
        drop(table);
        if queued {
            shared.notify();
        }
    }
}

/// One try. Certificates are read each time: they may have been renewed.
async fn connect(config: &ClientConfig) -> Result<Connection, LinkError> {
    let attempt = async {
        let identity = Identity::load(&config.ca, &config.certificate, &config.key)
            .map_err(|error| LinkError::Refused(error.to_string()))?;
        let endpoint = Endpoint::client(&identity, Profile::Auto)?;
        let address = tokio::net::lookup_host(&config.sidecar)
            .await
            .map_err(|error| LinkError::Lost(format!("resolve {}: {error}", config.sidecar)))?
            .next()
            .ok_or_else(|| LinkError::Lost(format!("{} has no address", config.sidecar)))?;
        endpoint.connect(address, &config.node).await
    };
    match tokio::time::timeout(CONNECT_TIMEOUT, attempt).await {
        Ok(connected) => connected,
        Err(_) => Err(LinkError::Lost(
            "does not answer; is it running?".to_owned(),
        )),
    }
}
