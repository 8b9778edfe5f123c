//! A file system of its own, on an image in a file, whose power can go: what was not synced is lost
//! then, as on a machine; and that can be full. Needs root, loop devices and ext4; where these
//! cannot be had, it says what is missing, and the test has to say that it left something out.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Shuts the file system down at once: what is in its log and not on the disk is lost as well.
/// (`FS_IOC_SHUTDOWN` with `NOLOGFLUSH`; by Python, since it is no safe call in Rust.)
const SHUT_DOWN: &str = "import fcntl, os, struct, sys
disk = os.open(sys.argv[1], os.O_RDONLY)
fcntl.ioctl(disk, 0x8004587d, struct.pack('I', 2))";

/// Block size of the file system.
const SMALLEST_PIECE: u64 = 4096;

/// An ext4 file system that can lose its power.
#[derive(Debug)]
pub struct Disk {
    image: PathBuf,
    mount: PathBuf,
}

impl Disk {
    /// Makes one in a directory, and mounts it.
    ///
    /// # Errors
    /// What cannot be had here.
    pub fn make(directory: &Path, megabytes: u32) -> Result<Self, String> {
        let (image, mount) = (directory.join("disk.image"), directory.join("disk"));
        std::fs::create_dir_all(&mount).map_err(|error| error.to_string())?;
        let file = std::fs::File::create(&image).map_err(|error| error.to_string())?;
        let bytes = u64::from(megabytes) << 20;
        file.set_len(bytes).map_err(|error| error.to_string())?;
        run(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&image))?;
        let disk = Self { image, mount };
        disk.mount()?;
        Ok(disk)
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.mount
    }

    fn mount(&self) -> Result<(), String> {
        let mut mount = Command::new("mount");
        run(mount.args(["-o", "loop"]).arg(&self.image).arg(&self.mount))
    }

    fn filling(&self) -> PathBuf {
        self.mount.join("filling")
    }

    /// Nothing more can be written, but into what the files have.
    ///
    /// # Panics
    /// When the file that takes the rest cannot be made.
    pub fn fill(&self) {
        let file = std::fs::File::create(self.filling()).expect("make a file on the disk");
        let (mut end, mut piece) = (0, 64 << 20);
        while piece >= SMALLEST_PIECE {
            match rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), end, piece) {
                Ok(()) => end += piece,
                Err(_) => piece /= 2,
            }
        }
    }

    /// There is room again.
    ///
    /// # Panics
    /// When the disk is not full.
    pub fn make_room(&self) {
        std::fs::remove_file(self.filling()).expect("remove what fills the disk");
    }

    /// The power goes: every operation fails from now on.
    ///
    /// # Panics
    /// When the system does not do it.
    pub fn lose_power(&self) {
        let mut python = Command::new("python3");
        let done = run(python.args(["-c", SHUT_DOWN]).arg(&self.mount));
        done.expect("shut the file system down");
    }

    /// The machine starts again. Nobody may have a file open there.
    ///
    /// # Panics
    /// When it cannot be mounted.
    pub fn start_again(&self) {
        run(Command::new("umount").arg(&self.mount)).expect("unmount the disk");
        self.mount().expect("mount the disk");
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Lazily: a process that a failed test left behind may have files open.
        let _ = run(Command::new("umount").arg("--lazy").arg(&self.mount));
    }
}

fn run(command: &mut Command) -> Result<(), String> {
    let output = command.output();
    let output = output.map_err(|error| format!("{command:?}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    Err(format!("{command:?}: {}", errors.trim()))
}
