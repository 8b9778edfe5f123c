//! Applications under test: Debian's Python and SQLite shell, driven through pipes.

use crate::binaries::{PYTHON, SQLITE3, binaries, host_command, program};
use crate::cluster::Cluster;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Output, Stdio};
use std::time::Duration;

/// `SQLITE_IOERR_WRITE`: certainly not committed.
pub const NOT_COMMITTED: i64 = 778;
/// `SQLITE_IOERR_FSYNC`: outcome unknown.
pub const UNKNOWN: i64 = 1034;
/// `SQLITE_READONLY`: another host is the primary.
pub const READONLY: i64 = 8;
/// `SQLITE_CANTOPEN`, without its extension.
pub const CANTOPEN: i64 = 14;

/// Why SQLite refused a statement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SqlError {
    /// Extended result code; zero when the driver has none.
    pub code: i64,
    /// Its text.
    pub message: String,
}

/// Result of one statement.
#[derive(Debug, Clone)]
pub struct Reply {
    /// Rows, or the refusal.
    pub result: Result<Vec<Vec<Value>>, SqlError>,
    /// How long the statement took.
    pub time: Duration,
}

/// A Python process with one open database, that executes what it is told.
#[derive(Debug)]
pub struct App {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl App {
    /// Starts Python with the extension and opens the database.
    ///
    /// # Panics
    /// When the program cannot be started; a database that cannot be opened is a reply.
    pub fn start(cluster: &Cluster, database: &Path) -> (Self, Reply) {
        Self::start_on(&cluster.client_config(), database)
    }

    /// The same with this client config; the database may be a URI.
    ///
    /// # Panics
    /// When the program cannot be started.
    pub fn start_on(client_config: &Path, database: &Path) -> (Self, Reply) {
        Self::start_by(python(client_config), database)
    }

    /// The same with a command that runs Python where the application is to run.
    ///
    /// # Panics
    /// When the program cannot be started.
    pub fn start_by(python: Command, database: &Path) -> (Self, Reply) {
        let mut app = Self::spawn_by(python);
        let reply = app.ask(&json!({
            "open": database.to_string_lossy(),
            "extension": binaries().extension.to_string_lossy(),
        }));
        (app, reply)
    }

    /// The same, for a database that must open.
    ///
    /// # Panics
    /// When it does not.
    pub fn open(cluster: &Cluster, database: &Path) -> Self {
        let (app, reply) = Self::start(cluster, database);
        reply.result.expect("open the database");
        app
    }

    /// The same with this client config; the database may be a URI.
    ///
    /// # Panics
    /// When it does not open.
    pub fn open_on(client_config: &Path, database: &Path) -> Self {
        let (app, reply) = Self::start_on(client_config, database);
        reply.result.expect("open the database");
        app
    }

    /// A process with plain SQLite, for comparison.
    ///
    /// # Panics
    /// When the database cannot be opened.
    pub fn open_plain(database: &Path) -> Self {
        let mut app = Self::spawn(Path::new("/dev/null"));
        let reply = app.ask(&json!({ "open": database.to_string_lossy() }));
        reply.result.expect("open the database with plain SQLite");
        app
    }

    /// Starts Python; nothing is open yet.
    ///
    /// # Panics
    /// When the program cannot be started.
    pub fn spawn(client_config: &Path) -> Self {
        Self::spawn_by(python(client_config))
    }

    fn spawn_by(mut python: Command) -> Self {
        let mut child = python
            .arg(program("session.py"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("start python3");
        let input = child.stdin.take().expect("its input");
        let output = BufReader::new(child.stdout.take().expect("its output"));
        Self {
            child,
            input,
            output,
        }
    }

    /// Asks for the database to be opened, and does not wait for it.
    ///
    /// # Panics
    /// When the process is gone.
    pub fn begin_opening(&mut self, database: &Path) {
        let request = json!({
            "open": database.to_string_lossy(),
            "extension": binaries().extension.to_string_lossy(),
        });
        writeln!(self.input, "{request}").expect("write to the application");
    }

    /// Number of the process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends one request of `programs/session.py` and waits for its answer.
    ///
    /// # Panics
    /// When the process is gone.
    pub fn ask(&mut self, request: &Value) -> Reply {
        self.try_ask(request)
            .unwrap_or_else(|| panic!("the application ended after {request}"))
    }

    /// The same; none when the process is gone, or went meanwhile.
    ///
    /// # Panics
    /// When the answer is none.
    pub fn try_ask(&mut self, request: &Value) -> Option<Reply> {
        writeln!(self.input, "{request}").ok()?;
        let mut line = String::new();
        self.output.read_line(&mut line).ok()?;
        let answer: Value = serde_json::from_str(&line).ok()?;
        let time = Duration::from_micros(answer["us"].as_u64().expect("a time"));
        let result = match answer["error"].as_str() {
            Some(message) => Err(SqlError {
                code: answer["code"].as_i64().unwrap_or_default(),
                message: message.to_owned(),
            }),
            None => {
                let rows = answer["rows"].as_array().expect("rows");
                Ok(rows
                    .iter()
                    .map(|row| row.as_array().cloned().unwrap_or_default())
                    .collect())
            }
        };
        Some(Reply { result, time })
    }

    /// Executes one statement; none when the process is gone.
    pub fn try_execute(&mut self, sql: &str) -> Option<Reply> {
        self.try_ask(&json!({ "sql": sql }))
    }

    /// Executes one statement.
    pub fn execute(&mut self, sql: &str) -> Reply {
        self.ask(&json!({ "sql": sql }))
    }

    /// Executes a statement that must succeed.
    ///
    /// # Panics
    /// When it does not.
    pub fn run(&mut self, sql: &str) -> Vec<Vec<Value>> {
        let reply = self.execute(sql);
        reply
            .result
            .unwrap_or_else(|error| panic!("{sql}: {error:?}"))
    }

    /// The one value that a statement gives.
    ///
    /// # Panics
    /// When it gives none.
    pub fn value(&mut self, sql: &str) -> Value {
        let rows = self.run(sql);
        rows.first()
            .and_then(|row| row.first())
            .cloned()
            .unwrap_or_else(|| panic!("{sql}: no row"))
    }

    /// Closes the database and ends the process.
    ///
    /// # Panics
    /// When it does not end well.
    pub fn close(mut self) {
        self.run_close();
    }

    fn run_close(&mut self) {
        let reply = self.ask(&json!({ "close": true }));
        reply.result.expect("close the database");
        let status = self.child.wait().expect("wait for the application");
        assert!(status.success(), "the application ended with {status}");
    }
}

impl Drop for App {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn python(client_config: &Path) -> Command {
    let mut command = host_command(PYTHON);
    command.env("DUROVFS_CONFIG", client_config);
    command
}

/// Runs Debian's SQLite shell with the extension on a database, with these lines as input.
///
/// # Panics
/// When the shell cannot be run.
pub fn sqlite_shell(client_config: &Path, database: &Path, input: &str) -> Output {
    let mut child = host_command(SQLITE3)
        .args(["-batch", "-bail", "-cmd"])
        .arg(format!(".load '{}'", binaries().extension.display()))
        .env("DUROVFS_CONFIG", client_config)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("start sqlite3");
    let mut shell_input = child.stdin.take().expect("its input");
    let lines = format!(".open '{}'\n{input}\n", database.display());
    // From a thread: the shell may fill its output before it has read all.
    let writer = std::thread::spawn(move || shell_input.write_all(lines.as_bytes()));
    let output = child.wait_with_output().expect("run sqlite3");
    // The shell stops reading at its first error; that is for the caller to see in the status.
    let _ = writer.join().expect("write to sqlite3");
    output
}

/// What plain SQLite, without durovfs, reads from a database file that no process uses.
///
/// # Panics
/// When the shell fails.
pub fn plain_query(database: &Path, sql: &str) -> Vec<String> {
    let output = Command::new(SQLITE3)
        .arg("-batch")
        .arg(database)
        .arg(sql)
        .output()
        .expect("run sqlite3");
    let errors = crate::cluster::text(&output.stderr);
    assert!(
        output.status.success(),
        "{sql} on {}: {errors}",
        database.display()
    );
    crate::cluster::text(&output.stdout)
        .lines()
        .map(str::to_owned)
        .collect()
}
