//! What a writer (`programs/writer.py`) was told about each of its commits, and whether that is
//! true of a database.

use crate::app::plain_query;
use crate::binaries::{PYTHON, binaries, program};
use crate::cluster::Cluster;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The tables that writers use.
pub const SCHEMA: &str = "CREATE TABLE rows (writer INTEGER, n INTEGER, payload BLOB, \
                          PRIMARY KEY (writer, n)); \
                          CREATE TABLE tally (writer INTEGER PRIMARY KEY, n INTEGER NOT NULL);";

/// Pause between the commits of a writer that leaves others time to write.
const SLOW_PAUSE_MS: u64 = 20;

/// Pause of a steady writer: about as long as a commit takes.
const STEADY_PAUSE_MS: u64 = 4;

/// More rows than any test writes.
const ENDLESS: u64 = 1 << 40;

/// What became of a commit, as the application was told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Told {
    /// COMMIT returned OK.
    Committed,
    /// COMMIT said: certainly not.
    NotCommitted(i64),
    /// COMMIT said: unknown.
    Unknown,
    /// The process was killed before it heard.
    Nothing,
}

/// All that one writer was told, by row.
#[derive(Debug, Clone, Default)]
pub struct Outcomes {
    told: BTreeMap<u64, Told>,
}

impl Outcomes {
    fn note(&mut self, line: &str) {
        let mut words = line.split_whitespace();
        let verb = words.next().unwrap_or_default();
        let mut number = || words.next().and_then(|word| word.parse::<u64>().ok());
        let told = |n: Option<u64>| n.unwrap_or_else(|| panic!("no row in {line:?}"));
        match verb {
            "try" => {
                self.told.insert(told(number()), Told::Nothing);
            }
            "ok" => {
                self.told.insert(told(number()), Told::Committed);
            }
            "unknown" => {
                self.told.insert(told(number()), Told::Unknown);
            }
            "no" => {
                let n = told(number());
                let code = number().unwrap_or_default() as i64;
                self.told.insert(n, Told::NotCommitted(code));
            }
            "open" | "reopen" => {}
            _ => panic!("the writer said {line:?}"),
        }
    }

    /// Adds what a later process of the same writer was told.
    pub fn extend(&mut self, later: Self) {
        self.told.extend(later.told);
    }

    /// The row after the last one that was tried.
    pub fn next_row(&self) -> u64 {
        self.told.last_key_value().map_or(1, |(n, _)| n + 1)
    }

    /// How many commits were told this.
    pub fn count(&self, wanted: impl Fn(&Told) -> bool) -> usize {
        self.told.values().filter(|told| wanted(told)).count()
    }

    /// How many commits were told that they are committed.
    pub fn committed(&self) -> usize {
        self.count(|told| *told == Told::Committed)
    }

    /// Fails unless a database holds every row that was told committed, and none that was told not
    /// committed. Returns the rows it holds, so that those of unknown outcome can be compared.
    ///
    /// # Panics
    /// When the database does not hold what the application was told.
    pub fn check(&self, what: &str, database: &Path, writer: u64) -> BTreeSet<u64> {
        let sql = format!("SELECT n FROM rows WHERE writer = {writer} ORDER BY n");
        let rows: BTreeSet<u64> = plain_query(database, &sql)
            .iter()
            .map(|row| row.parse().expect("a row number"))
            .collect();
        for (n, told) in &self.told {
            match told {
                Told::Committed => assert!(rows.contains(n), "{what}: committed row {n} is gone"),
                Told::NotCommitted(code) => {
                    assert!(
                        !rows.contains(n),
                        "{what}: row {n} was refused ({code}) and is there"
                    );
                }
                Told::Unknown | Told::Nothing => {}
            }
        }
        let strangers = rows.iter().filter(|n| !self.told.contains_key(n)).count();
        assert_eq!(strangers, 0, "{what}: rows that nobody wrote");
        let tally = format!("SELECT n FROM tally WHERE writer = {writer}");
        let tally = plain_query(database, &tally);
        assert_eq!(
            tally,
            [rows.len().to_string()],
            "{what}: a transaction was applied in part"
        );
        rows
    }
}

/// A running writer.
#[derive(Debug)]
pub struct Writer {
    child: Child,
    outcomes: Arc<Mutex<Outcomes>>,
    reader: Option<JoinHandle<()>>,
}

impl Writer {
    /// Starts a writer that commits rows from `first` on, as fast as it can.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn start(
        cluster: &Cluster,
        database: &Path,
        writer: u64,
        first: u64,
        count: u64,
        timeout: Duration,
    ) -> Self {
        let numbers = [writer, first, count, timeout.as_millis() as u64, 0];
        Self::start_on(&cluster.client_config(), database, numbers)
    }

    /// Starts a writer that never ends by itself, and leaves others time to write.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn start_slow(cluster: &Cluster, database: &Path, writer: u64, timeout: Duration) -> Self {
        Self::start_endless(cluster, database, writer, timeout, SLOW_PAUSE_MS)
    }

    /// Starts a writer that never ends by itself, for tests that kill: about half of its time it is
    /// in a commit, and what it writes between two kills does not become the test's time.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn start_steady(
        cluster: &Cluster,
        database: &Path,
        writer: u64,
        timeout: Duration,
    ) -> Self {
        Self::start_endless(cluster, database, writer, timeout, STEADY_PAUSE_MS)
    }

    fn start_endless(
        cluster: &Cluster,
        database: &Path,
        writer: u64,
        timeout: Duration,
        pause_ms: u64,
    ) -> Self {
        let numbers = [writer, 1, ENDLESS, timeout.as_millis() as u64, pause_ms];
        Self::start_on(&cluster.client_config(), database, numbers)
    }

    /// Starts a writer with this client config; the database may be a URI. The numbers are those of
    /// `programs/writer.py`: writer, first row, count, timeout and pause in milliseconds.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn start_on(client_config: &Path, database: &Path, numbers: [u64; 5]) -> Self {
        let mut python = Command::new(PYTHON);
        python.env("DUROVFS_CONFIG", client_config);
        Self::start_by(python, database, numbers)
    }

    /// The same with a command that runs Python where the writer is to run.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn start_by(mut python: Command, database: &Path, numbers: [u64; 5]) -> Self {
        let mut child = python
            .arg(program("writer.py"))
            .arg(&binaries().extension)
            .arg(database)
            .args(numbers.map(|number| number.to_string()))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("start a writer");
        let mut output = BufReader::new(child.stdout.take().expect("its output"));
        let outcomes = Arc::new(Mutex::new(Outcomes::default()));
        let noted = Arc::clone(&outcomes);
        let reader = std::thread::spawn(move || {
            let mut line = String::new();
            // Killed in the middle of a line, it has not said that line.
            while output.read_line(&mut line).is_ok() && line.ends_with('\n') {
                noted.lock().expect("outcomes").note(line.trim_end());
                line.clear();
            }
        });
        Self {
            child,
            outcomes,
            reader: Some(reader),
        }
    }

    /// What it was told so far.
    ///
    /// # Panics
    /// When it said something that is no outcome.
    pub fn so_far(&self) -> Outcomes {
        self.outcomes.lock().expect("outcomes").clone()
    }

    /// Waits until it has tried its first row.
    ///
    /// # Panics
    /// When that takes longer than `limit`.
    pub fn wait_begun(&self, limit: Duration) {
        let deadline = Instant::now() + limit;
        while self.so_far().told.is_empty() {
            assert!(
                Instant::now() < deadline,
                "the writer does not begin within {limit:?}"
            );
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits until it has committed this many rows.
    ///
    /// # Panics
    /// When that takes longer than `limit`, or the writer ends.
    pub fn wait_committed(&mut self, count: usize, limit: Duration) {
        let deadline = Instant::now() + limit;
        while self.so_far().committed() < count {
            assert!(
                Instant::now() < deadline,
                "{count} commits: not within {limit:?}"
            );
            if let Some(status) = self.child.try_wait().expect("look at the writer") {
                let done = self.join();
                assert!(
                    done.committed() >= count,
                    "the writer ended ({status}): {done:?}"
                );
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Kills it, and returns all that it was told.
    ///
    /// # Panics
    /// When it cannot be killed.
    pub fn kill(mut self) -> Outcomes {
        self.child.kill().expect("kill the writer");
        self.join()
    }

    /// Waits for its end, which must be a good one.
    ///
    /// # Panics
    /// When it fails, or takes longer than `limit`.
    pub fn finish(mut self, limit: Duration) -> Outcomes {
        let deadline = Instant::now() + limit;
        while self.child.try_wait().expect("look at the writer").is_none() {
            assert!(
                Instant::now() < deadline,
                "the writer does not end within {limit:?}"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
        let status = self.child.wait().expect("wait for the writer");
        assert!(status.success(), "the writer ended with {status}");
        self.join()
    }

    fn join(&mut self) -> Outcomes {
        let _ = self.child.wait();
        if let Some(reader) = self.reader.take() {
            reader.join().expect("read what the writer said");
        }
        self.so_far()
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Makes the writers' tables, in the database and thereby in the cluster.
///
/// # Panics
/// When that fails.
pub fn create_tables(cluster: &Cluster, database: &Path, writers: u64) {
    create_tables_on(&cluster.client_config(), database, writers);
}

/// The same with this client config; the database may be a URI.
///
/// # Panics
/// When that fails.
pub fn create_tables_on(client_config: &Path, database: &Path, writers: u64) {
    let mut app = crate::app::App::open_on(client_config, database);
    app.run("PRAGMA journal_mode=WAL");
    for statement in SCHEMA
        .split_terminator(';')
        .filter(|part| !part.trim().is_empty())
    {
        app.run(statement);
    }
    for writer in 1..=writers {
        app.run(&format!("INSERT INTO tally VALUES ({writer}, 0)"));
    }
    app.close();
}
