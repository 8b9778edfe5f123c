//! The files of a local database while nobody uses it: saved, emptied, or left with a decision.
//! Every step leaves a state from which typing the command again goes on.

use crate::cli::{EXIT_FAILED, Failure};
use durovfs_wire::resolution::{RESOLUTION_SUFFIX, Resolution};
use rustix::fs::{FlockOperation, fcntl_lock};
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// What SQLite keeps beside a database that is part of its content.
const PARTS: [&str; 2] = ["-wal", "-journal"];
/// Added to the name of a copy that is being made.
const UNFINISHED: &str = "-unfinished";
/// Names that are tried when several decisions are made within a second.
const SAVED_NAMES_MAX: u32 = 100;

/// A database file that no other process has open, or can open, while this lives.
pub struct LocalFiles {
    path: PathBuf,
    // Closing any other descriptor of the file would drop the lock: all is done through this one.
    file: File,
}

impl LocalFiles {
    /// Locks a database as SQLite's exclusive lock does.
    ///
    /// # Errors
    /// When a process uses it.
    pub fn lock(path: &Path) -> Result<Self, Failure> {
        let failed = |error: &dyn std::fmt::Display| failure(path, error);
        let file = OpenOptions::new().read(true).write(true).open(path);
        let file = file.map_err(|error| failed(&error))?;
        let users = users(&file);
        // The whole file: SQLite's locks are bytes of it.
        match fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive) {
            // A connection in rollback mode holds no lock between its transactions.
            Ok(()) if users.is_empty() => Ok(Self {
                path: path.to_owned(),
                file,
            }),
            Ok(()) | Err(rustix::io::Errno::AGAIN | rustix::io::Errno::ACCESS) => {
                let by = match users.is_empty() {
                    true => String::new(),
                    false => format!(" by {}", users.join(", ")),
                };
                let message = format!("in use{by}; close all connections, then type it again");
                Err(failed(&message))
            }
            Err(error) => Err(failed(&format!("lock: {error}"))),
        }
    }

    /// The database file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the database file has no bytes.
    ///
    /// # Errors
    /// When it cannot be looked at.
    pub fn is_empty(&self) -> Result<bool, Failure> {
        let metadata = self.file.metadata();
        metadata
            .map(|metadata| metadata.len() == 0)
            .map_err(|error| failure(&self.path, &error))
    }

    /// A name beside the database that nothing has.
    ///
    /// # Errors
    /// When there is none.
    pub fn name_for_saved(&self) -> Result<PathBuf, Failure> {
        let time = jiff::Timestamp::now()
            .strftime("%Y%m%dT%H%M%SZ")
            .to_string();
        let names = (1..=SAVED_NAMES_MAX).map(|number| match number {
            1 => format!("-durovfs-saved-{time}"),
            _ => format!("-durovfs-saved-{time}-{number}"),
        });
        let free = |path: &PathBuf| {
            let suffixes = PARTS.iter().chain(&["", "-mark", UNFINISHED]);
            suffixes
                .map(|suffix| with_suffix(path, suffix))
                .all(|path| path.symlink_metadata().is_err())
        };
        names
            .map(|name| with_suffix(&self.path, &name))
            .find(free)
            .ok_or_else(|| failure(&self.path, &"no free name to save it under"))
    }

    /// Saves the database and what belongs to it, and empties it. Returns where it was saved.
    ///
    /// # Errors
    /// When something cannot be saved; nothing is given up then.
    pub fn give_up(&self) -> Result<Option<PathBuf>, Failure> {
        let failed = |what: &str, error: io::Error| {
            failure(
                &self.path,
                &format!("{what}: {error}; nothing was given up"),
            )
        };
        let saved = match self.is_empty()? && !self.has_parts() {
            true => None,
            false => {
                let saved = self.name_for_saved()?;
                self.save_as(&saved).map_err(|error| {
                    for suffix in PARTS.iter().chain(&["", UNFINISHED]) {
                        let _ = std::fs::remove_file(with_suffix(&saved, suffix));
                    }
                    failed("save", error)
                })?;
                Some(saved)
            }
        };
        // An earlier decision for the other side counts no more.
        remove(&with_suffix(&self.path, RESOLUTION_SUFFIX))
            .and_then(|()| self.put_mark_aside(saved.as_deref()))
            .and_then(|()| self.empty())
            .map_err(|error| failure(&self.path, &format!("empty: {error}; type it again")))?;
        Ok(saved)
    }

    /// Leaves a decision for the next open.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn leave(&self, resolution: &Resolution) -> Result<(), Failure> {
        let path = with_suffix(&self.path, RESOLUTION_SUFFIX);
        let written = || -> io::Result<()> {
            let directory = path.parent().unwrap_or(Path::new("."));
            let mut file = tempfile::NamedTempFile::new_in(directory)?;
            file.write_all(&resolution.encode())?;
            // Whoever opens the database must be able to read and to remove it.
            let permissions = self.file.metadata()?.permissions();
            file.as_file().set_permissions(permissions)?;
            file.as_file().sync_all()?;
            file.persist(&path)?;
            File::open(directory)?.sync_all()
        };
        written().map_err(|error| failure(&path, &error))
    }

    fn has_parts(&self) -> bool {
        PARTS.iter().any(|suffix| {
            let part = with_suffix(&self.path, suffix).metadata();
            part.is_ok_and(|part| part.len() > 0)
        })
    }

    /// The copy is on disk, under its names, when this returns.
    fn save_as(&self, saved: &Path) -> io::Result<()> {
        for suffix in PARTS {
            match File::open(with_suffix(&self.path, suffix)) {
                Ok(part) => copy(&part, &with_suffix(saved, suffix))?,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        // Last, and under its name only when it is whole: a killed run leaves nothing that looks
        // like a saved database and is none.
        let unfinished = with_suffix(saved, UNFINISHED);
        let mut from = &self.file;
        from.seek(SeekFrom::Start(0))?;
        copy(from, &unfinished)?;
        std::fs::rename(unfinished, saved)?;
        sync_directory(saved)
    }

    /// What it says of the file is true no more. Not under a name that an open of the saved copy
    /// would take for its own.
    fn put_mark_aside(&self, saved: Option<&Path>) -> io::Result<()> {
        let mark = with_suffix(&self.path, "-durovfs");
        match saved {
            Some(saved) if mark.exists() => std::fs::rename(&mark, with_suffix(saved, "-mark")),
            _ => remove(&mark),
        }
    }

    fn empty(&self) -> io::Result<()> {
        // The journal and the WAL first: played into an empty file they would be content.
        for suffix in ["-journal", "-wal", "-shm"] {
            remove(&with_suffix(&self.path, suffix))?;
        }
        self.file.set_len(0)?;
        self.file.sync_all()?;
        sync_directory(&self.path)
    }
}

fn copy(mut from: &File, to: &Path) -> io::Result<()> {
    let mut options = OpenOptions::new();
    let mut file = options.write(true).create_new(true).open(to)?;
    file.set_permissions(from.metadata()?.permissions())?;
    io::copy(&mut from, &mut file)?;
    file.sync_all()
}

fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn sync_directory(of: &Path) -> io::Result<()> {
    File::open(of.parent().unwrap_or(Path::new(".")))?.sync_all()
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

fn failure(path: &Path, problem: &dyn std::fmt::Display) -> Failure {
    Failure::new(EXIT_FAILED, format!("{}: {problem}", path.display()))
}

/// Other processes that have the file open, where the system tells (Linux, and as far as this user
/// may see).
fn users(file: &File) -> Vec<String> {
    let Ok(wanted) = file.metadata() else {
        return Vec::new();
    };
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| *pid != std::process::id())
        .filter(|pid| has_open(*pid, (wanted.dev(), wanted.ino())))
        .map(|pid| {
            let command = std::fs::read_to_string(format!("/proc/{pid}/comm"));
            format!("process {pid} ({})", command.unwrap_or_default().trim())
        })
        .collect()
}

fn has_open(pid: u32, wanted: (u64, u64)) -> bool {
    let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd"));
    let descriptors = descriptors.into_iter().flatten().flatten();
    descriptors
        // Following the link looks at the file that is open, whatever its name is now.
        .filter_map(|descriptor| std::fs::metadata(descriptor.path()).ok())
        .any(|open| (open.dev(), open.ino()) == wanted)
}
