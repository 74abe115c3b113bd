//! Where the driver leaves tokens and the response task picks them up. The driver never waits for
//! a client: a sink has room for everything its request can produce.

use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::{Context, Poll, Waker};

use headrace_core::event::{FinishReason, PromptToken, SampledToken};
use headrace_core::ids::{SeqId, Tokens};

/// What happens to one request, in order.
#[derive(Debug, Clone, PartialEq)]
pub enum TokenEvent {
    /// It left the queue; so many prompt tokens came from the prefix cache.
    Started {
        /// Prompt tokens that need not be computed.
        cached_tokens: u32,
    },
    /// Log-probabilities of the prompt tokens since the last such event.
    PromptLogprobs(Vec<PromptToken>),
    /// A token was drawn.
    Token(SampledToken),
    /// It ended. Always the last event.
    Finished(FinishReason),
}

/// Events besides tokens that a sink may hold: started, prompt log-probabilities, finished.
const EXTRA_EVENTS_MAX: usize = 3;

/// One request's buffer.
#[derive(Debug)]
pub(crate) struct TokenSink {
    /// Known from admission on; written and read by the driver.
    seq: OnceLock<SeqId>,
    events_max: usize,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    events: Vec<TokenEvent>,
    reader: Option<Waker>,
    /// Nothing is written any more.
    ended: bool,
    /// Nothing is read any more.
    abandoned: bool,
}

// === impl TokenSink ===

impl TokenSink {
    /// A sink for at most this many tokens.
    pub(crate) fn new(tokens_max: Tokens) -> Self {
        let events_max = (tokens_max.0 as usize).saturating_add(EXTRA_EVENTS_MAX);
        Self {
            seq: OnceLock::new(),
            events_max,
            inner: Mutex::default(),
        }
    }

    /// The sequence whose tokens these are, once admitted.
    pub(crate) fn seq(&self) -> Option<SeqId> {
        self.seq.get().copied()
    }

    /// Binds the sink to an admitted sequence.
    pub(crate) fn bind(&self, seq: SeqId) {
        self.seq
            .set(seq)
            .expect("a sink is admitted once; this is a router bug");
    }

    /// Whether the reader is gone.
    pub(crate) fn is_abandoned(&self) -> bool {
        self.lock().abandoned
    }

    /// The reader goes; what is left will not be read.
    pub(crate) fn abandon(&self) {
        let mut inner = self.lock();
        inner.abandoned = true;
        inner.reader = None;
        inner.events = Vec::new();
    }

    /// Leaves an event and wakes the reader. Never waits.
    pub(crate) fn push(&self, event: TokenEvent) {
        let reader = {
            let mut inner = self.lock();
            if inner.abandoned {
                return;
            }
            inner.ended |= matches!(event, TokenEvent::Finished(_));
            inner.add(event);
            assert!(
                inner.events.len() <= self.events_max,
                "a sequence draws no more than its tokens_max; this is a scheduler bug"
            );
            inner.reader.take()
        };
        // Outside the lock: the reader may run at once on another thread.
        if let Some(reader) = reader {
            reader.wake();
        }
    }

    /// All waiting events; empty once the last was taken.
    pub(crate) fn poll_take(&self, cx: &mut Context<'_>) -> Poll<Vec<TokenEvent>> {
        let mut inner = self.lock();
        if !inner.events.is_empty() || inner.ended {
            return Poll::Ready(std::mem::take(&mut inner.events));
        }
        match &mut inner.reader {
            Some(reader) => reader.clone_from(cx.waker()),
            empty => *empty = Some(cx.waker().clone()),
        }
        Poll::Pending
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Inner ===

impl Inner {
    /// Appends; log-probabilities join those that still wait, which is what bounds their number.
    fn add(&mut self, event: TokenEvent) {
        match (event, self.events.last_mut()) {
            (TokenEvent::PromptLogprobs(more), Some(TokenEvent::PromptLogprobs(waiting))) => {
                waiting.extend(more);
            }
            (event, _) => self.events.push(event),
        }
    }
}
