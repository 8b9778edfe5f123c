//! Segment files: how one is made ready ahead of time, and how it is begun.
//!
//! A segment is written full of zeros and synced before it is used: on the usual file systems that
//! halves the time of each later `fdatasync`, because neither the file's size nor its extents
//! change any more. A thread of its own does it, in small steps, so that commits do not wait.

use crate::disk::{Disk, DiskFile};
use crate::error::JournalError;
use crate::format::{SEGMENT_HEADER_BYTES, SegmentHeader, segment_name};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Name of the file that will be the next segment. Worthless after a crash.
pub(crate) const SPARE_NAME: &str = "journal-spare.tmp";
/// Zeros written in one step.
const STEP_BYTES: usize = 1 << 20;
/// Steps between syncs: little enough to be written that a commit's sync does not wait for long.
const STEPS_PER_SYNC: usize = 4;
/// Rest between steps while nobody waits: a 64 MiB segment takes about half a second.
const STEP_REST: Duration = Duration::from_millis(5);
/// How long a failure is believed before the disk is tried again.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// A segment that is in use.
pub(crate) struct Segment {
    pub name: String,
    pub header: SegmentHeader,
    pub file: Arc<dyn DiskFile>,
}

/// Takes the lock; a panic elsewhere has ended the process's trust in this journal already.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes a prepared file the segment that begins with `header.first_sequence`. Durable when it
/// returns; after an error the name may or may not be there.
pub(crate) fn begin_segment(
    disk: &dyn Disk,
    file: Arc<dyn DiskFile>,
    header: SegmentHeader,
) -> Result<Segment, JournalError> {
    let name = segment_name(header.first_sequence);
    let failed = |what: &str, e: &std::io::Error| JournalError::io(format!("{what} {name}"), e);
    file.write_at(&header.encode(), 0)
        .map_err(|e| failed("write header of", &e))?;
    file.sync_data().map_err(|e| failed("sync header of", &e))?;
    disk.rename(SPARE_NAME, &name)
        .map_err(|e| failed("rename spare to", &e))?;
    disk.sync_directory()
        .map_err(|e| failed("sync directory of", &e))?;
    Ok(Segment { name, header, file })
}

/// Makes a spare file that reads as zeros: `prefill` writes them all, which halves what a later
/// sync costs; without it the file is sparse, which is as good where nothing is synced. `rest` is
/// called between the steps and says whether to go on.
pub(crate) fn write_spare(
    disk: &dyn Disk,
    segment_bytes: u64,
    prefill: bool,
    mut rest: impl FnMut() -> bool,
) -> Result<Option<Arc<dyn DiskFile>>, JournalError> {
    let result = if prefill {
        fill_spare(disk, segment_bytes, &mut rest)
    } else {
        sparse_spare(disk, segment_bytes)
    };
    if !matches!(result, Ok(Some(_))) {
        // Gives the space back. If even that fails, the next attempt empties the file.
        let _ = disk.remove(SPARE_NAME);
    }
    result.map_err(|e| JournalError::io(format!("prepare {SPARE_NAME}"), &e))
}

fn sparse_spare(disk: &dyn Disk, segment_bytes: u64) -> std::io::Result<Option<Arc<dyn DiskFile>>> {
    let file = disk.create(SPARE_NAME)?;
    let end = [0u8; 8];
    file.write_at(&end, segment_bytes - end.len() as u64)?;
    file.sync_data()?;
    Ok(Some(file))
}

fn fill_spare(
    disk: &dyn Disk,
    segment_bytes: u64,
    rest: &mut impl FnMut() -> bool,
) -> std::io::Result<Option<Arc<dyn DiskFile>>> {
    let file = disk.create(SPARE_NAME)?;
    let zeros = vec![0u8; STEP_BYTES.min(segment_bytes as usize)];
    let mut offset = 0;
    let mut steps = 0;
    while offset < segment_bytes {
        let step = (segment_bytes - offset).min(zeros.len() as u64);
        file.write_at(&zeros[..step as usize], offset)?;
        offset += step;
        steps += 1;
        if steps % STEPS_PER_SYNC == 0 {
            file.sync_data()?;
        }
        if !rest() {
            return Ok(None);
        }
    }
    file.sync_data()?;
    Ok(Some(file))
}

#[derive(Default)]
struct PrepareState {
    /// No thread runs: whoever takes a spare makes it first.
    inline: bool,
    wanted: bool,
    /// The writer waits for it.
    urgent: bool,
    ready: Option<Arc<dyn DiskFile>>,
    failure: Option<(Instant, JournalError)>,
    stop: bool,
}

/// The next segment, made ready by a thread.
#[derive(Default)]
pub(crate) struct Preparer {
    state: Mutex<PrepareState>,
    changed: Condvar,
}

impl Preparer {
    /// One without a thread.
    pub(crate) fn inline() -> Self {
        let preparer = Self::default();
        lock(&preparer.state).inline = true;
        preparer
    }

    /// Asks for a spare, if there is none.
    pub(crate) fn want(&self) {
        let mut state = lock(&self.state);
        if !state.wanted && state.ready.is_none() {
            state.wanted = true;
            self.changed.notify_all();
        }
    }

    pub(crate) fn is_ready(&self) -> bool {
        lock(&self.state).ready.is_some()
    }

    /// The spare; waits for it when it is not ready yet.
    pub(crate) fn take(
        &self,
        disk: &dyn Disk,
        segment_bytes: u64,
        prefill: bool,
    ) -> Result<Arc<dyn DiskFile>, JournalError> {
        if lock(&self.state).inline {
            self.prepare_if_wanted(disk, segment_bytes, prefill, true)?;
        }
        let mut state = lock(&self.state);
        loop {
            if let Some(file) = state.ready.take() {
                state.urgent = false;
                return Ok(file);
            }
            if state.stop {
                return Err(JournalError::Closed);
            }
            if let Some((at, error)) = &state.failure
                && at.elapsed() < RETRY_AFTER
            {
                let error = error.clone();
                state.urgent = false;
                return Err(error);
            }
            (state.wanted, state.urgent) = (true, true);
            state.failure = None;
            self.changed.notify_all();
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Makes a spare on the caller's thread, if there is none and one is asked for, or `needed`.
    pub(crate) fn prepare_if_wanted(
        &self,
        disk: &dyn Disk,
        segment_bytes: u64,
        prefill: bool,
        needed: bool,
    ) -> Result<(), JournalError> {
        let state = lock(&self.state);
        if state.ready.is_some() || state.stop || !(state.wanted || needed) {
            return Ok(());
        }
        drop(state);
        let file = write_spare(disk, segment_bytes, prefill, || true)?;
        let mut state = lock(&self.state);
        state.wanted = false;
        state.ready = file;
        Ok(())
    }

    pub(crate) fn stop(&self) {
        lock(&self.state).stop = true;
        self.changed.notify_all();
    }

    /// The thread's loop.
    pub(crate) fn run(&self, disk: &dyn Disk, segment_bytes: u64, prefill: bool) {
        while self.wait_until_wanted() {
            let result = write_spare(disk, segment_bytes, prefill, || self.rest());
            let mut state = lock(&self.state);
            match result {
                Ok(Some(file)) => {
                    state.ready = Some(file);
                    state.wanted = false;
                    state.failure = None;
                }
                Ok(None) => {}
                Err(error) => {
                    tracing::warn!(%error, "the next journal segment could not be prepared");
                    state.failure = Some((Instant::now(), error));
                }
            }
            self.changed.notify_all();
        }
        if let Some(file) = lock(&self.state).ready.take() {
            drop(file);
            // Recovery removes it otherwise.
            let _ = disk.remove(SPARE_NAME);
        }
    }

    /// Waits; false when the thread is to end.
    fn wait_until_wanted(&self) -> bool {
        let mut state = lock(&self.state);
        loop {
            if state.stop {
                return false;
            }
            let left = match &state.failure {
                Some((at, _)) => RETRY_AFTER.saturating_sub(at.elapsed()),
                None => Duration::ZERO,
            };
            if state.wanted && state.ready.is_none() && left.is_zero() {
                return true;
            }
            let left = if left.is_zero() {
                Duration::from_secs(3600)
            } else {
                left
            };
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Lets commits go first; false when the thread is to end.
    fn rest(&self) -> bool {
        let state = lock(&self.state);
        if state.urgent || state.stop {
            return !state.stop;
        }
        drop(state);
        std::thread::sleep(STEP_REST);
        true
    }
}

/// Bytes that records may take in a segment.
pub(crate) fn capacity(segment_bytes: u64) -> u64 {
    segment_bytes - SEGMENT_HEADER_BYTES
}
