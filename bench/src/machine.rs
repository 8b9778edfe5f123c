//! What machine this is, as far as it explains numbers.

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use std::fs;
use std::path::Path;

/// The machine and where the files of the run are.
#[derive(Debug, Clone, Serialize)]
pub struct Machine {
    /// Processors that this process may use.
    pub cores: usize,
    /// Their name.
    pub processor: String,
    /// Version of Linux.
    pub kernel: String,
    /// File system of the run's directory.
    pub file_system: String,
    /// What that is mounted from.
    pub device: String,
    /// Version of SQLite in this binary.
    pub sqlite: String,
}

impl Machine {
    /// This machine, with the run's files in `dir`.
    ///
    /// # Errors
    /// When it does not say what it is, or the directory is in memory.
    pub fn look(dir: &Path) -> Result<Self> {
        let read = |path| fs::read_to_string(path).with_context(|| format!("read {path}"));
        let dir = dir
            .canonicalize()
            .with_context(|| format!("find {dir:?}"))?;
        let mounts = read("/proc/self/mountinfo")?;
        let (file_system, device) = mount_of(&mounts, &dir).context("find the file system")?;
        ensure!(
            file_system != "tmpfs",
            "{dir:?} is in memory, where a sync costs nothing: choose another with --dir"
        );
        Ok(Self {
            cores: std::thread::available_parallelism()
                .context("count the processors")?
                .get(),
            processor: processor(&read("/proc/cpuinfo")?),
            kernel: read("/proc/sys/kernel/osrelease")?.trim().to_owned(),
            file_system,
            device,
            sqlite: rusqlite::version().to_owned(),
        })
    }
}

fn processor(cpuinfo: &str) -> String {
    let name = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    name.map_or("unknown", |(_, name)| name.trim()).to_owned()
}

/// Type and source of the deepest mount that holds a path.
fn mount_of(mounts: &str, path: &Path) -> Option<(String, String)> {
    let parse = |line: &str| {
        // Optional fields end with a lone hyphen; behind it stand the type and the source.
        let (place, kind) = line.split_once(" - ")?;
        let point = place.split(' ').nth(4)?.replace("\\040", " ");
        let mut kind = kind.split(' ');
        Some((point, kind.next()?.to_owned(), kind.next()?.to_owned()))
    };
    let holding = mounts
        .lines()
        .filter_map(parse)
        .filter(|(point, ..)| path.starts_with(point));
    // Of several mounts on one point the last one is seen.
    let deepest = holding.max_by_key(|(point, ..)| point.len())?;
    Some((deepest.1, deepest.2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_deepest_mount_counts() {
        // Broken: a run in memory would pass for one on a disk.
        let mounts = "22 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n\
                      30 22 0:25 / /var/tmp rw shared:5 - tmpfs tmpfs rw\n\
                      31 22 0:26 / /var/tm rw - xfs /dev/vdb rw\n";
        let of = |path| mount_of(mounts, Path::new(path)).unwrap();
        assert_eq!(of("/var/tmp/x"), ("tmpfs".to_owned(), "tmpfs".to_owned()));
        assert_eq!(of("/var/tmpx"), ("ext4".to_owned(), "/dev/vda".to_owned()));
    }

    #[test]
    fn this_machine_says_what_it_is() {
        // Broken: results would be compared with those of another machine.
        let machine = Machine::look(Path::new(env!("CARGO_MANIFEST_DIR"))).unwrap();
        assert!(machine.cores > 0 && !machine.kernel.is_empty() && !machine.device.is_empty());
    }
}
