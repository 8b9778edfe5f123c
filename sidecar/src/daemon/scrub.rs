//! The scrub: now and then all entries that the journals hold are read, so that a bit that rots is
//! found while others still have the entry. What is found the journal notes, and the actor acts on.

use anyhow::Context;
use durovfs_journal::Journal;
use std::time::{Duration, Instant};

/// Bytes read per second: a full journal of 4 GiB takes nine minutes, and a disk hardly notices.
const BYTES_PER_SECOND: u64 = 8 << 20;

/// Starts the thread. It ends with the process: it only reads.
pub fn spawn(journals: [Journal; 2], interval: Duration) -> anyhow::Result<()> {
    let body = move || {
        loop {
            std::thread::sleep(interval);
            journals.iter().for_each(scrub);
        }
    };
    std::thread::Builder::new()
        .name("scrub".to_owned())
        .spawn(body)
        .context("start the scrub's thread")?;
    Ok(())
}

fn scrub(journal: &Journal) {
    let begun = Instant::now();
    let mut bytes = 0u64;
    for state in journal.databases() {
        // What was dropped since is not missed.
        let Ok(parts) = journal.parts(state.database, state.first_lsn, state.last.lsn) else {
            continue;
        };
        for part in parts.map_while(Result::ok) {
            bytes += part.payload.len() as u64;
            let due = Duration::from_millis(bytes * 1000 / BYTES_PER_SECOND);
            std::thread::sleep(due.saturating_sub(begun.elapsed()));
        }
    }
    tracing::debug!(bytes, "all held entries were read");
}
