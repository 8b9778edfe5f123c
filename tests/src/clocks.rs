//! A wall clock of its own for each machine, that can be set while programs run. It is made by a
//! library that is loaded into them; where there is no C compiler, it says so.

use crate::binaries::program;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The clock of one machine.
#[derive(Debug)]
pub struct Clock {
    library: PathBuf,
    file: PathBuf,
}

impl Clock {
    /// Makes a clock that is right, in a directory.
    ///
    /// # Errors
    /// What cannot be had here.
    pub fn make(directory: &Path) -> Result<Self, String> {
        let clock = Self {
            library: directory.join("clock.so"),
            file: directory.join("wrong-by"),
        };
        let mut compiler = Command::new("cc");
        compiler.args(["-O1", "-shared", "-fPIC", "-o"]);
        compiler.arg(&clock.library).arg(program("clock.c"));
        let output = compiler.output();
        let output = output.map_err(|error| format!("a C compiler, cc: {error}"))?;
        if !output.status.success() {
            let errors = String::from_utf8_lossy(&output.stderr).into_owned();
            return Err(format!("clock.c: {errors}"));
        }
        clock.set_wrong_by(0);
        Ok(clock)
    }

    /// This command's program gets this clock.
    pub fn give_to(&self, command: &mut Command) {
        command.env("LD_PRELOAD", &self.library);
        command.env("DUROVFS_WRONG_BY", &self.file);
    }

    /// Sets it, in seconds from the right time.
    ///
    /// # Panics
    /// When its file cannot be written.
    pub fn set_wrong_by(&self, seconds: i64) {
        // In place, since programs have it mapped; eight bytes are written at once.
        let file = std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .open(&self.file);
        let written = file.and_then(|file| {
            std::os::unix::fs::FileExt::write_all_at(&file, &seconds.to_ne_bytes(), 0)
        });
        written.expect("set the clock");
    }
}
