//! A bounded queue and a few threads of its own, for work that must keep nobody waiting.

use std::collections::VecDeque;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// A grammar's rules are followed by recursion; only what is touched of a stack is memory.
const STACK_BYTES: usize = 64 << 20;

type Job = Box<dyn FnOnce() + Send>;

/// Threads that work. Dropping the pool drops what waits; what runs is not waited for.
pub struct Pool {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    stopping: bool,
}

struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
    queue_max: usize,
}

// === impl Pool ===

impl Pool {
    /// Starts `threads` threads (at least one).
    pub fn new(name: &str, threads: usize, queue_max: usize) -> Self {
        let shared = Arc::new(Shared {
            queue: Mutex::default(),
            changed: Condvar::new(),
            queue_max: queue_max.max(1),
        });
        for index in 0..threads.max(1) {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new()
                .name(format!("{name}-{index}"))
                .stack_size(STACK_BYTES)
                .spawn(move || shared.work())
                .expect("the system starts threads for grammars; its thread limit is too low");
        }
        Self { shared }
    }

    /// Queues a job. With an error, how many wait already, it is not taken.
    pub fn submit(&self, job: impl FnOnce() + Send + 'static) -> Result<(), usize> {
        let mut queue = self.shared.lock();
        if queue.jobs.len() >= self.shared.queue_max {
            return Err(queue.jobs.len());
        }
        queue.jobs.push_back(Box::new(job));
        drop(queue);
        self.shared.changed.notify_one();
        Ok(())
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let mut queue = self.shared.lock();
        queue.stopping = true;
        queue.jobs.clear();
        drop(queue);
        self.shared.changed.notify_all();
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool")
            .field("queue_max", &self.shared.queue_max)
            .finish_non_exhaustive()
    }
}

// === impl Shared ===

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        // No job runs with the lock held, and the queue is whole at any time.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A thread's life.
    fn work(&self) {
        while let Some(job) = self.next() {
            // Whoever waits for the job sees that its answer never comes.
            if catch_unwind(AssertUnwindSafe(job)).is_err() {
                tracing::error!("work on a grammar panicked; this is a fault of the server");
            }
        }
    }

    fn next(&self) -> Option<Job> {
        let mut queue = self.lock();
        loop {
            if queue.stopping {
                return None;
            }
            if let Some(job) = queue.jobs.pop_front() {
                return Some(job);
            }
            queue = self
                .changed
                .wait(queue)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}
