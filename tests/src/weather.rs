//! The bad weather of one machine's link: a thread that gets the packets which the machine's rules
//! put into its queue, and loses some of them, and lets the others go later, in another order.

use crate::seed::Seeded;
use nfq::{Message, Queue, Verdict};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The number of the queue; each namespace counts for itself.
const QUEUE: u16 = 1;
/// Packets that may wait in the system for the thread: more than a window of the protocol.
const MOST_WAITING: u32 = 8192;
/// Pause between two looks while packets come: well below the delays that are asked for.
const PAUSE: Duration = Duration::from_micros(300);
/// … and while none come.
const IDLE_PAUSE: Duration = Duration::from_millis(10);

/// What happens to packets.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Weather {
    /// How many of a hundred arriving ones are lost.
    pub lost_percent: u64,
    /// How much later each arrives at least.
    pub delay: Duration,
    /// How much later than that it may arrive; longer than the pause between two, it reorders them.
    pub jitter: Duration,
    /// Whether some of those that the machine sends arrive twice.
    pub doubles: bool,
}

impl Weather {
    /// Whether the arriving packets have to go through the queue.
    pub fn is_queued(&self) -> bool {
        self.lost_percent > 0 || !self.delay.is_zero() || !self.jitter.is_zero()
    }
}

/// What became of packets, so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Seen {
    /// Never arrived.
    pub lost: u64,
    /// Arrived later.
    pub delayed: u64,
    /// … and before one that was sent earlier.
    pub reordered: u64,
}

#[derive(Debug, Default)]
struct Shared {
    weather: Mutex<Weather>,
    ended: AtomicBool,
    lost: AtomicU64,
    delayed: AtomicU64,
    reordered: AtomicU64,
}

/// The thread.
#[derive(Debug)]
pub struct WeatherMaker {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl WeatherMaker {
    /// Starts the thread in the network namespace that this file names.
    ///
    /// # Errors
    /// When the system has no such queues, or does not let this process use one.
    pub fn start(namespace: &Path) -> std::io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let file = std::fs::File::open(namespace)?;
        let (made, is_made) = mpsc::channel();
        let thread = {
            let shared = Arc::clone(&shared);
            std::thread::spawn(move || match open_queue(&file) {
                Ok(queue) => {
                    let _ = made.send(Ok(()));
                    serve(queue, &shared);
                }
                Err(error) => drop(made.send(Err(error))),
            })
        };
        let maker = Self {
            shared,
            thread: Some(thread),
        };
        is_made.recv().expect("the thread says")?;
        Ok(maker)
    }

    /// From now on it is like this.
    ///
    /// # Panics
    /// When the thread panicked.
    pub fn set(&self, weather: Weather) {
        *self.shared.weather.lock().expect("the weather") = weather;
    }

    /// What it did so far.
    pub fn seen(&self) -> Seen {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Seen {
            lost: count(&self.shared.lost),
            delayed: count(&self.shared.delayed),
            reordered: count(&self.shared.reordered),
        }
    }
}

impl Drop for WeatherMaker {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn open_queue(namespace: &std::fs::File) -> std::io::Result<Queue> {
    // Of this thread alone.
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
    let mut queue = Queue::open()?;
    queue.bind(QUEUE)?;
    queue.set_queue_max_len(QUEUE, MOST_WAITING)?;
    queue.set_nonblocking(true);
    Ok(queue)
}

fn serve(mut queue: Queue, shared: &Shared) {
    // What is drawn here is not replayed: when a packet comes is not either.
    let mut seeded = Seeded::new(0);
    // By the time at which each goes on, and the number by which it came.
    let mut waiting: BTreeMap<(Instant, u64), Message> = BTreeMap::new();
    let mut newest_passed = 0;
    for number in 1.. {
        if shared.ended.load(Ordering::Relaxed) {
            return;
        }
        let weather = *shared.weather.lock().expect("the weather");
        let arrived = queue.recv();
        let nothing_came = arrived.is_err();
        if let Ok(mut packet) = arrived {
            if seeded.below(100) < weather.lost_percent {
                shared.lost.fetch_add(1, Ordering::Relaxed);
                packet.set_verdict(Verdict::Drop);
                let _ = queue.verdict(packet);
            } else {
                let delay = weather.delay + seeded.between(Duration::ZERO, weather.jitter);
                waiting.insert((Instant::now() + delay, number), packet);
            }
        }
        while let Some(first) = waiting.first_entry() {
            if first.key().0 > Instant::now() {
                break;
            }
            let ((_, number), mut packet) = first.remove_entry();
            shared.delayed.fetch_add(1, Ordering::Relaxed);
            if number < newest_passed {
                shared.reordered.fetch_add(1, Ordering::Relaxed);
            }
            newest_passed = newest_passed.max(number);
            packet.set_verdict(Verdict::Accept);
            let _ = queue.verdict(packet);
        }
        if nothing_came {
            let is_busy = weather.is_queued() || !waiting.is_empty();
            std::thread::sleep(if is_busy { PAUSE } else { IDLE_PAUSE });
        }
    }
}
