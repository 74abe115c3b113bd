//! What the driver is told: commands down a bounded channel, and ends through a box, because a
//! stream that is dropped cannot wait for room.

use std::sync::{Arc, Mutex, PoisonError};

use headrace_core::event::FinishReason;
use headrace_core::request::Request;
use headrace_grammar::Matcher;
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;
use tracing::Span;

use crate::error::SubmitError;
use crate::sink::TokenSink;
use crate::trace::SeqTrace;

/// Commands that may wait for the driver; a full channel makes the handle wait.
pub(crate) const COMMANDS_MAX: usize = 1024;

/// What a handle asks of the driver.
#[derive(Debug)]
pub(crate) enum Command {
    /// Admit a request.
    Submit(Submission),
    /// Take no more requests; end when every stream has ended, or at the deadline.
    Drain {
        /// Streams that are not done by then are cut.
        deadline: Instant,
    },
}

/// A request on its way to the scheduler.
#[derive(Debug)]
pub(crate) struct Submission {
    /// What is asked.
    pub(crate) request: Request,
    /// What its tokens must be, for a request that is masked.
    pub(crate) matcher: Option<Box<Matcher>>,
    /// Where to note what happens to it, if it is traced.
    pub(crate) trace: Option<Arc<SeqTrace>>,
    /// Where its tokens go.
    pub(crate) sink: Arc<TokenSink>,
    /// Whether it was admitted.
    pub(crate) reply: oneshot::Sender<Result<(), SubmitError>>,
    /// The caller's span, so that what happens to the sequence is found under it.
    pub(crate) span: Span,
    /// When it was submitted.
    pub(crate) t0: Instant,
    /// When it is to end, if it has not by then.
    pub(crate) deadline: Option<Instant>,
}

/// Sequences that their streams have ended. Bounded by the number of streams: each posts at most
/// once.
#[derive(Debug, Default)]
pub(crate) struct FinishBox {
    posted: Mutex<Vec<(Arc<TokenSink>, FinishReason)>>,
    wake: Notify,
}

// === impl FinishBox ===

impl FinishBox {
    /// Never waits.
    pub(crate) fn post(&self, sink: Arc<TokenSink>, reason: FinishReason) {
        self.posted
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push((sink, reason));
        self.wake.notify_one();
    }

    /// Waits until something was posted. Cancel safe: the notice is kept.
    pub(crate) async fn posted(&self) {
        self.wake.notified().await;
    }

    /// Everything posted so far.
    pub(crate) fn take(&self) -> Vec<(Arc<TokenSink>, FinishReason)> {
        std::mem::take(&mut self.posted.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
