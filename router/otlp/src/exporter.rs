//! The queue in front of a collector. Whoever has spans leaves them and goes on: when too many wait
//! they are dropped and counted, and one warning says so.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout_at};

use crate::client::{Client, SendError, Target, TargetError};
use crate::pb::{Resource, request};
use crate::span::Span;

/// How many spans wait and travel together.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Spans that may wait; more are dropped.
    pub queue_max: usize,
    /// Spans sent together at most.
    pub batch_max: usize,
    /// What a span waits for company at most.
    pub delay: Duration,
}

/// What became of spans, over the process's life.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// The collector took them.
    pub sent: u64,
    /// There was no room in the queue.
    pub dropped: u64,
    /// The collector was away, not to be trusted, too slow, or refused them.
    pub failed: u64,
}

/// Where spans are left. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Exporter {
    traces: mpsc::Sender<Vec<Span>>,
    shared: Arc<Shared>,
    queue_max: usize,
    /// Told when no more is to be waited for.
    closing: Arc<watch::Sender<bool>>,
}

/// The task that sends them, to be spawned; it ends when it was told to close and has sent all.
pub struct Worker {
    traces: mpsc::Receiver<Vec<Span>>,
    client: Client,
    resource: Resource,
    limits: Limits,
    shared: Arc<Shared>,
    closing: watch::Receiver<bool>,
    /// The last batch did not arrive.
    is_away: bool,
}

#[derive(Debug, Default)]
struct Shared {
    /// Spans in the queue.
    waiting: AtomicUsize,
    sent: AtomicU64,
    dropped: AtomicU64,
    failed: AtomicU64,
    /// Dropping has been warned of.
    warned: AtomicBool,
}

/// An exporter and its task. Needs a runtime.
///
/// `resource` are attributes of the process; its `service.name` is one of them.
pub fn exporter(
    target: &Target,
    resource: Vec<(String, String)>,
    limits: Limits,
) -> Result<(Exporter, Worker), TargetError> {
    let client = Client::new(target)?;
    // Spans are counted, and a trace has one at least: the channel is never what is full.
    let (sender, traces) = mpsc::channel(limits.queue_max.max(1));
    let (closing, closed) = watch::channel(false);
    let shared = Arc::new(Shared::default());
    let exporter = Exporter {
        traces: sender,
        shared: Arc::clone(&shared),
        queue_max: limits.queue_max,
        closing: Arc::new(closing),
    };
    let worker = Worker {
        traces,
        client,
        resource: Resource::new(resource),
        limits,
        shared,
        closing: closed,
        is_away: false,
    };
    Ok((exporter, worker))
}

// === impl Exporter ===

impl Exporter {
    /// Leaves the spans of a trace, or drops them. Never waits.
    pub fn export(&self, spans: Vec<Span>) {
        let count = spans.len();
        if count == 0 {
            return;
        }
        let waiting = self.shared.waiting.fetch_add(count, Ordering::Relaxed);
        if waiting + count <= self.queue_max && self.traces.try_send(spans).is_ok() {
            return;
        }
        self.shared.waiting.fetch_sub(count, Ordering::Relaxed);
        self.shared
            .dropped
            .fetch_add(count as u64, Ordering::Relaxed);
        if !self.shared.warned.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                queue_max = self.queue_max,
                "Spans are dropped: more wait than may, because the collector does not take them"
            );
        }
    }

    /// Has the worker send what waits and end.
    pub fn close(&self) {
        self.closing.send_replace(true);
    }

    /// What became of spans so far.
    pub fn counts(&self) -> Counts {
        Counts {
            sent: self.shared.sent.load(Ordering::Relaxed),
            dropped: self.shared.dropped.load(Ordering::Relaxed),
            failed: self.shared.failed.load(Ordering::Relaxed),
        }
    }
}

// === impl Worker ===

impl fmt::Debug for Worker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Worker")
            .field("limits", &self.limits)
            .field("is_away", &self.is_away)
            .finish_non_exhaustive()
    }
}

impl Worker {
    /// Sends batches until it is told to close.
    pub async fn run(mut self) {
        let mut batch = Vec::new();
        loop {
            let first = tokio::select! {
                biased;
                first = self.traces.recv() => first,
                _ = self.closing.wait_for(|closing| *closing) => None,
            };
            let Some(first) = first else {
                break;
            };
            self.put(first, &mut batch);
            self.gather(&mut batch).await;
            while !batch.is_empty() {
                self.send(&mut batch).await;
            }
        }
        // What came in the same moment as the end.
        self.traces.close();
        while let Some(more) = self.traces.recv().await {
            self.put(more, &mut batch);
        }
        while !batch.is_empty() {
            self.send(&mut batch).await;
        }
    }

    /// Waits for company until there is enough, or for as long as may be.
    async fn gather(&mut self, batch: &mut Vec<Span>) {
        let until = Instant::now() + self.limits.delay;
        let mut closing = self.closing.clone();
        let mut company = std::pin::pin!(async {
            while batch.len() < self.limits.batch_max {
                let Ok(Some(more)) = timeout_at(until, self.traces.recv()).await else {
                    return;
                };
                let count = more.len();
                batch.extend(more);
                self.shared.waiting.fetch_sub(count, Ordering::Relaxed);
            }
        });
        tokio::select! {
            biased;
            () = &mut company => {}
            _ = closing.wait_for(|closing| *closing) => {}
        }
    }

    fn put(&self, spans: Vec<Span>, batch: &mut Vec<Span>) {
        self.shared
            .waiting
            .fetch_sub(spans.len(), Ordering::Relaxed);
        batch.extend(spans);
    }

    /// Sends the first of them, as many as may travel together.
    async fn send(&mut self, batch: &mut Vec<Span>) {
        let rest = batch.split_off(self.limits.batch_max.min(batch.len()));
        let spans = std::mem::replace(batch, rest);
        let count = spans.len() as u64;
        let outcome = self.client.send(request(&self.resource, spans)).await;
        let failed = match &outcome {
            Ok(()) => 0,
            Err(SendError::Partly { count: lost, .. }) => (*lost).min(count),
            Err(
                SendError::Late(_)
                | SendError::Unreachable(_)
                | SendError::Untrusted(_)
                | SendError::Refused(_),
            ) => count,
        };
        self.shared.failed.fetch_add(failed, Ordering::Relaxed);
        self.shared
            .sent
            .fetch_add(count - failed, Ordering::Relaxed);
        match outcome {
            Ok(()) => {
                if std::mem::take(&mut self.is_away) {
                    tracing::info!("The collector takes spans again");
                }
            }
            // Once, until it is back.
            Err(error) if !self.is_away => {
                self.is_away = true;
                tracing::warn!(%error, lost = failed, "The collector takes no spans; they are dropped until it does");
            }
            Err(error) => tracing::debug!(%error, lost = failed, "The collector takes no spans"),
        }
    }
}

#[cfg(test)]
mod tests;
