//! A disk in memory that can lose power, fill up and fail, for tests and simulations.
//!
//! It keeps apart what is durable from what was only written. When the power goes, any part of what
//! was not synced may stay, in whole sectors; each file name change since the directory's last sync
//! stays or not, in order.

use super::{Disk, DiskFile};
use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What a disk writes whole or not at all.
const SECTOR_BYTES: usize = 512;

#[derive(Debug, Default)]
struct Content {
    durable: Vec<u8>,
    current: Vec<u8>,
    /// Since the last sync.
    writes: Vec<(usize, Vec<u8>)>,
}

#[derive(Debug, Clone)]
enum NameChange {
    Create(String, Arc<Mutex<Content>>),
    Rename(String, String),
    Remove(String),
}

type Names = BTreeMap<String, Arc<Mutex<Content>>>;

#[derive(Debug, Default)]
struct State {
    names: Names,
    durable_names: Names,
    name_changes: Vec<NameChange>,
    /// Bytes that may still be written, if limited.
    room: Option<u64>,
    /// Operations until the power goes.
    power: Option<u64>,
    /// Operations until one fails, once.
    fault: Option<u64>,
    /// Syncs of files so far.
    sync_count: u64,
    /// Syncs of files and of the directory so far.
    barrier_count: u64,
    /// The power goes when that many have begun, before the last of them is carried out.
    power_at_barrier: Option<u64>,
    /// Syncs say that they were carried out, and are not.
    lies: bool,
}

impl State {
    /// A sync begins.
    fn begin_barrier(&mut self) {
        self.barrier_count += 1;
        if self.power_at_barrier == Some(self.barrier_count) {
            self.power = Some(0);
        }
    }

    /// One operation: fails when the power is off, or its turn to fail has come.
    fn step(&mut self) -> io::Result<()> {
        if let Some(left) = &mut self.power {
            if *left == 0 {
                return Err(io::Error::other("power is off"));
            }
            *left -= 1;
        }
        match &mut self.fault {
            Some(0) => {
                self.fault = None;
                Err(io::Error::other("injected fault"))
            }
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }
}

/// The disk. Clones are the same disk.
#[derive(Debug, Clone, Default)]
pub struct MemoryDisk {
    state: Arc<Mutex<State>>,
    salt: Arc<AtomicU64>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl MemoryDisk {
    /// The power goes after so many more writes, syncs and name changes.
    pub fn lose_power_after(&self, operations: u64) {
        lock(&self.state).power = Some(operations);
    }

    /// One operation fails, once, after so many have succeeded.
    pub fn fail_after(&self, operations: u64) {
        lock(&self.state).fault = Some(operations);
    }

    /// Only so many more bytes fit; `None` lifts the limit.
    pub fn limit_room(&self, bytes: Option<u64>) {
        lock(&self.state).room = bytes;
    }

    /// The power goes at the sync, of a file or of the directory, with this number, counted from 1
    /// since the disk was made: what was written before it is there or not, by the crash's draws.
    pub fn lose_power_at_barrier(&self, number: u64) {
        lock(&self.state).power_at_barrier = Some(number);
    }

    /// Syncs of files and of the directory so far.
    pub fn barrier_count(&self) -> u64 {
        lock(&self.state).barrier_count
    }

    /// Whether the power is off.
    pub fn is_off(&self) -> bool {
        lock(&self.state).power == Some(0)
    }

    /// From now on a sync says that it was carried out, and is not: a disk that breaks its promise.
    pub fn lie_about_syncs(&self) {
        lock(&self.state).lies = true;
    }

    /// How often a file was synced.
    pub fn sync_count(&self) -> u64 {
        lock(&self.state).sync_count
    }

    /// The power goes now: the disk as it is found afterwards. `draw(n)` gives a number below `n`,
    /// and so decides what of the unsynced survives. The old disk refuses everything.
    pub fn crash(&self, draw: &mut dyn FnMut(u64) -> u64) -> Self {
        lock(&self.state).power = Some(0);
        self.survivor(draw)
    }

    /// What [`Self::crash`] would leave; the disk goes on.
    pub fn survivor(&self, draw: &mut dyn FnMut(u64) -> u64) -> Self {
        let state = lock(&self.state);
        let mut names = state.durable_names.clone();
        let kept = draw(state.name_changes.len() as u64 + 1) as usize;
        for change in state.name_changes.iter().take(kept) {
            apply_name_change(&mut names, change.clone());
        }
        let names: Names = names
            .into_iter()
            .map(|(name, content)| {
                let bytes = surviving(&lock(&content), draw);
                let content = Content {
                    durable: bytes.clone(),
                    current: bytes,
                    writes: Vec::new(),
                };
                (name, Arc::new(Mutex::new(content)))
            })
            .collect();
        let after = State {
            durable_names: names.clone(),
            names,
            ..State::default()
        };
        Self {
            state: Arc::new(Mutex::new(after)),
            salt: self.salt.clone(),
        }
    }

    /// A copy of the disk as a killed process leaves it: all that was written is there.
    pub fn copy(&self) -> Self {
        let state = lock(&self.state);
        let copied = |content: &Arc<Mutex<Content>>| {
            let bytes = lock(content).current.clone();
            let content = Content {
                durable: bytes.clone(),
                current: bytes,
                writes: Vec::new(),
            };
            Arc::new(Mutex::new(content))
        };
        let names: Names = state
            .names
            .iter()
            .map(|(name, c)| (name.clone(), copied(c)))
            .collect();
        let after = State {
            durable_names: names.clone(),
            names,
            ..State::default()
        };
        Self {
            state: Arc::new(Mutex::new(after)),
            salt: self.salt.clone(),
        }
    }

    /// Changes a file's bytes, synced ones as well. Nothing happens to a file that is not there.
    pub fn edit(&self, name: &str, change: impl FnOnce(&mut Vec<u8>)) {
        let content = lock(&self.state).names.get(name).cloned();
        if let Some(content) = content {
            let mut content = lock(&content);
            change(&mut content.current);
            content.durable = content.current.clone();
        }
    }
}

fn overwrite(bytes: &mut Vec<u8>, offset: usize, with: &[u8]) {
    let end = offset + with.len();
    if bytes.len() < end {
        bytes.resize(end, 0);
    }
    bytes[offset..end].copy_from_slice(with);
}

/// Durable bytes, and any of the sectors written since.
fn surviving(content: &Content, draw: &mut dyn FnMut(u64) -> u64) -> Vec<u8> {
    let mut bytes = content.durable.clone();
    // Some crashes keep all, some nothing, some a mixture.
    let share = draw(5);
    for (offset, written) in &content.writes {
        let mut at = *offset;
        let mut left = written.as_slice();
        while !left.is_empty() {
            let step = (SECTOR_BYTES - at % SECTOR_BYTES).min(left.len());
            if draw(4) < share {
                overwrite(&mut bytes, at, &left[..step]);
            }
            at += step;
            left = &left[step..];
        }
    }
    bytes
}

fn apply_name_change(names: &mut Names, change: NameChange) {
    match change {
        NameChange::Create(name, content) => drop(names.insert(name, content)),
        NameChange::Rename(from, to) => {
            if let Some(content) = names.remove(&from) {
                names.insert(to, content);
            }
        }
        NameChange::Remove(name) => drop(names.remove(&name)),
    }
}

impl Disk for MemoryDisk {
    fn create(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        let mut state = lock(&self.state);
        state.step()?;
        let content = Arc::new(Mutex::new(Content::default()));
        let change = NameChange::Create(name.to_owned(), content.clone());
        apply_name_change(&mut state.names, change.clone());
        state.name_changes.push(change);
        Ok(Arc::new(MemoryFile {
            content,
            state: self.state.clone(),
        }))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        let state = lock(&self.state);
        let content = state.names.get(name).cloned();
        let content = content.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        Ok(Arc::new(MemoryFile {
            content,
            state: self.state.clone(),
        }))
    }

    fn list(&self) -> io::Result<Vec<String>> {
        Ok(lock(&self.state).names.keys().cloned().collect())
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut state = lock(&self.state);
        state.step()?;
        if !state.names.contains_key(from) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let change = NameChange::Rename(from.to_owned(), to.to_owned());
        apply_name_change(&mut state.names, change.clone());
        state.name_changes.push(change);
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let mut state = lock(&self.state);
        state.step()?;
        if !state.names.contains_key(name) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let change = NameChange::Remove(name.to_owned());
        apply_name_change(&mut state.names, change.clone());
        state.name_changes.push(change);
        Ok(())
    }

    fn sync_directory(&self) -> io::Result<()> {
        let mut state = lock(&self.state);
        state.begin_barrier();
        state.step()?;
        if !state.lies {
            state.durable_names = state.names.clone();
            state.name_changes.clear();
        }
        Ok(())
    }

    fn draw_salt(&self) -> u64 {
        self.salt
            .fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed)
    }
}

#[derive(Debug)]
struct MemoryFile {
    content: Arc<Mutex<Content>>,
    state: Arc<Mutex<State>>,
}

impl DiskFile for MemoryFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let content = lock(&self.content);
        let start = offset as usize;
        let bytes = content.current.get(start..start + buffer.len());
        buffer.copy_from_slice(bytes.ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))?);
        Ok(())
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut state = lock(&self.state);
        let mut content = lock(&self.content);
        let start = offset as usize;
        let growth = (start + bytes.len()).saturating_sub(content.current.len()) as u64;
        if let Some(room) = &mut state.room {
            if growth > *room {
                return Err(io::ErrorKind::StorageFull.into());
            }
            *room -= growth;
        }
        let stepped = state.step();
        // A write that fails may have written a part.
        let bytes = if stepped.is_ok() {
            bytes
        } else {
            &bytes[..bytes.len() / 2]
        };
        let powered = state.power != Some(0) || stepped.is_ok();
        if powered {
            overwrite(&mut content.current, start, bytes);
            content.writes.push((start, bytes.to_vec()));
        }
        stepped
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut state = lock(&self.state);
        let mut content = lock(&self.content);
        state.sync_count += 1;
        state.begin_barrier();
        let stepped = state.step();
        if stepped.is_err() && state.power == Some(0) {
            return stepped;
        }
        if state.lies {
            return stepped;
        }
        // After a failure the system forgets what it did not write, as Linux does: a later sync
        // that succeeds says nothing about it.
        let writes = std::mem::take(&mut content.writes);
        if stepped.is_ok() {
            for (offset, bytes) in writes {
                overwrite(&mut content.durable, offset, &bytes);
            }
        }
        stepped
    }

    fn byte_count(&self) -> io::Result<u64> {
        Ok(lock(&self.content).current.len() as u64)
    }
}
