//! Child processes of a run: they end with it, whatever ends it.

use anyhow::{Context, Result, bail};
use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

/// Lines of a child that wait to be read. A child says a handful; what comes when nobody reads any
/// more is dropped.
const LINES_MAX: usize = 256;
/// Pause between two looks at whether a child has ended.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// A running child process, killed when dropped.
pub struct Child {
    name: String,
    process: std::process::Child,
    lines: Receiver<String>,
}

impl Child {
    /// Starts it. Its stdin stays open until it is dropped or finished: see [`exit_with_parent`].
    pub fn spawn(name: &str, command: &mut Command) -> Result<Self> {
        let started = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut process = started.with_context(|| format!("start {name}"))?;
        let stdout = process.stdout.take().context("stdout is piped")?;
        let (sender, lines) = mpsc::sync_channel(LINES_MAX);
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                // Reading goes on in any case, so that the child never waits for this process.
                let _ = sender.try_send(line);
            }
        });
        Ok(Self {
            name: name.to_owned(),
            process,
            lines,
        })
    }

    /// Process id.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// The next line that it prints.
    pub fn line(&self, timeout: Duration) -> Result<String> {
        match self.lines.recv_timeout(timeout) {
            Ok(line) => Ok(line),
            Err(RecvTimeoutError::Timeout) => {
                bail!("{} said nothing for {} s", self.name, timeout.as_secs())
            }
            Err(RecvTimeoutError::Disconnected) => bail!("{} ended early", self.name),
        }
    }

    /// Whether it has ended, well or not.
    pub fn has_ended(&mut self) -> Result<bool> {
        Ok(self
            .process
            .try_wait()
            .context("look at a child")?
            .is_some())
    }

    /// Closes its stdin, and waits until it has ended well.
    pub fn finish(mut self, timeout: Duration) -> Result<()> {
        drop(self.process.stdin.take());
        self.wait(timeout)
    }

    /// Waits until it has ended well; kills it when that takes longer than `timeout`.
    pub fn wait(&mut self, timeout: Duration) -> Result<()> {
        let end = Instant::now() + timeout;
        loop {
            if let Some(status) = self.process.try_wait().context("wait for a child")? {
                if status.success() {
                    return Ok(());
                }
                bail!("{}: {status}", self.name);
            }
            if Instant::now() >= end {
                bail!("{} did not end within {} s", self.name, timeout.as_secs());
            }
            thread::sleep(POLL_INTERVAL);
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // Fails when it has ended, which is what is wanted.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// In a child: ends this process when its parent closes stdin, or dies.
pub fn exit_with_parent() {
    thread::spawn(|| {
        let mut rest = Vec::new();
        let _ = std::io::stdin().lock().read_to_end(&mut rest);
        std::process::exit(0);
    });
}

/// In a child: waits for the parent to close stdin, so that it can look at this process until then.
pub fn wait_for_parent() -> Result<()> {
    let mut rest = Vec::new();
    let read = std::io::stdin().lock().read_to_end(&mut rest);
    read.context("read stdin").map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_that_fails_is_noticed() {
        // Broken: a slot whose client failed would count as measured.
        let child = Child::spawn("shell", Command::new("sh").args(["-c", "echo one; exit 3"]));
        let child = child.unwrap();
        let timeout = Duration::from_secs(20);
        assert_eq!(child.line(timeout).unwrap(), "one");
        assert!(child.line(timeout).is_err());
        let error = child.finish(timeout).unwrap_err().to_string();
        assert_eq!(error, "shell: exit status: 3");
    }

    #[test]
    fn a_dropped_child_is_gone() {
        // Broken: a run that fails would leave processes behind.
        let child = Child::spawn("sleep", Command::new("sleep").arg("600")).unwrap();
        let directory = format!("/proc/{}", child.id());
        assert!(std::path::Path::new(&directory).exists());
        drop(child);
        assert!(!std::path::Path::new(&directory).exists());
    }
}
