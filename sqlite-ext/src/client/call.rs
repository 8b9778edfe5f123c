//! One call of a SQLite thread that waits for the runtime thread: its states, its time, its wait.
//!
//! The two threads agree by one atomic on whether a commit was handed to the network. That decides
//! between "certainly not committed" and "unknown" when the caller's time is over.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;
use std::time::{Duration, Instant};

/// Not handed to the network; nobody can have it.
const QUEUED: u8 = 0;
/// Handed to the network, perhaps received.
const SENT: u8 = 1;
/// The caller went away before it was sent; it must not be sent any more.
const WITHDRAWN: u8 = 2;

/// Part of the caller's time that the sidecar is not told of, so that its answer arrives in time.
const MARGIN_DIVISOR: u32 = 8;
/// Most of that part: an answer needs no more, even on a busy machine.
const MARGIN_MAX: Duration = Duration::from_millis(300);

/// What both threads know of a call.
#[derive(Debug)]
pub(super) struct Call {
    state: AtomicU8,
    started: Instant,
    timeout: Option<Duration>,
    /// Milliseconds from the start to the latest sign of progress.
    progress_ms: AtomicU64,
}

impl Call {
    pub(super) fn new(timeout: Option<Duration>) -> Self {
        Self {
            state: AtomicU8::new(QUEUED),
            started: Instant::now(),
            timeout,
            progress_ms: AtomicU64::new(0),
        }
    }

    /// Claims the right to send. False when the caller went away before.
    pub(super) fn begin_sending(&self) -> bool {
        let claimed =
            self.state
                .compare_exchange(QUEUED, SENT, Ordering::AcqRel, Ordering::Acquire);
        claimed.is_ok() || claimed == Err(SENT)
    }

    /// The caller goes away. True when nothing was sent, and now nothing will be.
    pub(super) fn withdraw(&self) -> bool {
        let withdrawn =
            self.state
                .compare_exchange(QUEUED, WITHDRAWN, Ordering::AcqRel, Ordering::Acquire);
        withdrawn.is_ok() || withdrawn == Err(WITHDRAWN)
    }

    /// Whether it was handed to the network.
    pub(super) fn was_sent(&self) -> bool {
        self.state.load(Ordering::Acquire) == SENT
    }

    /// The sidecar says that it works on it: the caller's time begins again.
    pub(super) fn note_progress(&self) {
        let elapsed = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.progress_ms.store(elapsed, Ordering::Release);
    }

    /// When the caller's time is over; never, for some.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let progress = Duration::from_millis(self.progress_ms.load(Ordering::Acquire));
        self.started
            .checked_add(progress)?
            .checked_add(self.timeout?)
    }

    /// The time to tell the sidecar, in milliseconds; zero is for ever.
    pub(super) fn remaining_ms(&self) -> u64 {
        let (Some(timeout), Some(deadline)) = (self.timeout, self.deadline()) else {
            return 0;
        };
        let margin = (timeout / MARGIN_DIVISOR).min(MARGIN_MAX);
        let left = deadline
            .saturating_duration_since(Instant::now())
            .saturating_sub(margin);
        u64::try_from(left.as_millis()).unwrap_or(u64::MAX).max(1)
    }
}

/// Blocks this thread until the future is ready, or its time is over (then none). The deadline is
/// asked for again whenever it is reached: it may have moved.
pub(super) fn block_on<F: Future>(
    future: F,
    deadline: impl Fn() -> Option<Instant>,
) -> Option<F::Output> {
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut context = Context::from_waker(&waker);
    let mut future = pin!(future);
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut context) {
            return Some(output);
        }
        match deadline() {
            None => std::thread::park(),
            Some(deadline) => {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return None;
                }
                std::thread::park_timeout(left);
            }
        }
    }
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.0.unpark();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_is_either_sent_or_withdrawn() {
        // Broken if not: a commit is reported as certainly not committed, and sent after that.
        let call = Call::new(None);
        assert!(call.withdraw());
        assert!(!call.begin_sending());
        assert!(!call.was_sent());
        let call = Call::new(None);
        assert!(call.begin_sending());
        assert!(!call.withdraw());
        assert!(call.was_sent());
    }

    #[test]
    fn of_two_threads_only_one_wins() {
        // Broken if not: the same, in the moment when the time is over while the frame goes out.
        for _ in 0..2_000 {
            let call = Call::new(None);
            let (sent, withdrawn) = std::thread::scope(|scope| {
                let sending = scope.spawn(|| call.begin_sending());
                let withdrawn = call.withdraw();
                (sending.join().unwrap(), withdrawn)
            });
            assert_ne!(sent, withdrawn);
        }
    }

    #[test]
    fn the_sidecar_is_told_of_less_time_than_the_caller_has() {
        // Broken if not: the sidecar's answer comes when the caller has given up.
        let call = Call::new(Some(Duration::from_secs(10)));
        assert!(
            (9_000..=9_700).contains(&call.remaining_ms()),
            "{}",
            call.remaining_ms()
        );
        assert_eq!(Call::new(None).remaining_ms(), 0);
        // Zero would be for ever.
        assert_eq!(Call::new(Some(Duration::ZERO)).remaining_ms(), 1);
    }

    #[test]
    fn a_wait_ends_with_its_deadline_or_its_answer() {
        // Broken if not: SQLite's thread hangs for ever, or gives up on what was answered.
        let (sender, receiver) = tokio::sync::oneshot::channel();
        let deadline = Instant::now() + Duration::from_millis(30);
        assert!(block_on(receiver, || Some(deadline)).is_none());
        assert!(Instant::now() >= deadline);
        assert!(sender.send(()).is_err());
        let (sender, receiver) = tokio::sync::oneshot::channel();
        let answering = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(30));
            sender.send(7).unwrap();
        });
        assert_eq!(block_on(receiver, || None), Some(Ok(7)));
        answering.join().unwrap();
    }
}
