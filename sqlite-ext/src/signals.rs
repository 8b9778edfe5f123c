//! Threads that take no signals: a signal of the host must be handled on one of the host's threads.

use std::io;
use std::thread::{Builder, JoinHandle};

/// Starts a thread with all signals blocked. It inherits the mask, so no signal can reach it first.
///
/// # Errors
/// When the system gives no thread.
pub(crate) fn spawn_without_signals<F>(builder: Builder, body: F) -> io::Result<JoinHandle<()>>
where
    F: FnOnce() + Send + 'static,
{
    let before = block_all_signals()?;
    let spawned = builder.spawn(body);
    restore(&before);
    spawned
}

fn block_all_signals() -> io::Result<libc::sigset_t> {
    // SAFETY: a sigset_t is plain data; both sets live through the calls, which fill them.
    unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        let mut before: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        match libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before) {
            0 => Ok(before),
            code => Err(io::Error::from_raw_os_error(code)),
        }
    }
}

fn restore(mask: &libc::sigset_t) {
    // SAFETY: the set was filled by pthread_sigmask. It fails only for an unknown first argument.
    unsafe {
        libc::pthread_sigmask(libc::SIG_SETMASK, mask, std::ptr::null_mut());
    }
}
