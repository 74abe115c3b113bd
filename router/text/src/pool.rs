//! Encoding beside the request tasks: a bounded queue and a few threads of its own.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use crate::tokenizer::{EncodeError, Encoding, Tokenizer};

/// The queue of the pool is full; the text was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{waiting} texts wait to be encoded and {queue_max} may")]
pub struct PoolFull {
    /// Texts in the queue.
    pub waiting: usize,
    /// Texts it may hold.
    pub queue_max: usize,
}

/// How a text is encoded: [`Tokenizer::encode`], or a fault in a test.
type Encode = fn(&Tokenizer, &str, bool) -> Result<Encoding, EncodeError>;

type Done = Box<dyn FnOnce(Result<Encoding, EncodeError>) + Send>;

/// Threads that encode. Dropping the pool answers what still waits with
/// [`EncodeError::Stopped`] and joins the threads.
#[derive(Debug)]
pub struct EncodePool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

struct Job {
    text: String,
    add_special: bool,
    done: Done,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    stopping: bool,
}

struct Shared {
    tokenizer: Arc<Tokenizer>,
    encode: Encode,
    queue: Mutex<Queue>,
    /// Signalled for each job, and for all workers at the end.
    changed: Condvar,
    queue_max: usize,
}

// === impl EncodePool ===

impl EncodePool {
    /// Starts `workers` threads (at least one) and a queue of `queue_max` texts (at least one).
    pub fn new(tokenizer: Arc<Tokenizer>, workers: usize, queue_max: usize) -> Self {
        Self::with(tokenizer, workers, queue_max, Tokenizer::encode)
    }

    fn with(tokenizer: Arc<Tokenizer>, workers: usize, queue_max: usize, encode: Encode) -> Self {
        let shared = Arc::new(Shared {
            tokenizer,
            encode,
            queue: Mutex::default(),
            changed: Condvar::new(),
            queue_max: queue_max.max(1),
        });
        let workers = (0..workers.max(1))
            .map(|index| {
                let shared = Arc::clone(&shared);
                std::thread::Builder::new()
                    .name(format!("encode-{index}"))
                    .spawn(move || shared.work())
                    .expect("the system starts the encode threads; its thread limit is too low")
            })
            .collect();
        Self { shared, workers }
    }

    /// Queues a text. `done` is called once, on a worker's thread, with its ids or with why
    /// there are none; it must not block. With [`PoolFull`] it is not called.
    pub fn submit(
        &self,
        text: String,
        add_special: bool,
        done: impl FnOnce(Result<Encoding, EncodeError>) + Send + 'static,
    ) -> Result<(), PoolFull> {
        let mut queue = self.shared.lock();
        let (waiting, queue_max) = (queue.jobs.len(), self.shared.queue_max);
        if waiting >= queue_max {
            return Err(PoolFull { waiting, queue_max });
        }
        queue.jobs.push_back(Job {
            text,
            add_special,
            done: Box::new(done),
        });
        drop(queue);
        self.shared.changed.notify_one();
        Ok(())
    }

    /// Texts that wait for a thread.
    pub fn waiting(&self) -> usize {
        self.shared.lock().jobs.len()
    }
}

impl Drop for EncodePool {
    fn drop(&mut self) {
        self.shared.lock().stopping = true;
        self.shared.changed.notify_all();
        for worker in self.workers.drain(..) {
            if worker.join().is_err() {
                tracing::error!("an encode thread had panicked; this is a fault of the server");
            }
        }
    }
}

// === impl Shared ===

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        // No code of ours panics with the lock held, and the queue is whole at any time.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A worker's life.
    fn work(&self) {
        while let Some((job, stopping)) = self.next() {
            let Job {
                text,
                add_special,
                done,
            } = job;
            let result = if stopping {
                Err(EncodeError::Stopped)
            } else {
                let encode =
                    AssertUnwindSafe(|| (self.encode)(&self.tokenizer, &text, add_special));
                catch_unwind(encode).unwrap_or(Err(EncodeError::Panicked))
            };
            // The answer is the caller's code; a fault there must not cost a worker.
            if catch_unwind(AssertUnwindSafe(|| done(result))).is_err() {
                tracing::error!("the receiver of an encoding panicked");
            }
        }
    }

    /// The next job and whether the pool is stopping; `None` when it has stopped.
    fn next(&self) -> Option<(Job, bool)> {
        let mut queue = self.lock();
        loop {
            if let Some(job) = queue.jobs.pop_front() {
                return Some((job, queue.stopping));
            }
            if queue.stopping {
                return None;
            }
            queue = self
                .changed
                .wait(queue)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared")
            .field("queue_max", &self.queue_max)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
