//! What callers hold: a cheap handle to submit requests by, and a stream of tokens for each.

use std::future::poll_fn;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::Duration;

use headrace_core::event::FinishReason;
use headrace_core::limits::Limits;
use headrace_core::request::Request;
use headrace_grammar::Matcher;
use headrace_wire::Describe;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tracing::Span;

use crate::config::EngineConfig;
use crate::driver;
use crate::error::{EngineError, SubmitError};
use crate::group::{Dial, dial_sockets};
use crate::message::{COMMANDS_MAX, Command, FinishBox, Submission};
use crate::metrics::{Load, Metrics};
use crate::sink::{TokenEvent, TokenSink};
use crate::trace::SeqTrace;

/// What is known once the group is prepared.
#[derive(Debug, Clone, PartialEq)]
pub struct Facts {
    /// What the group can do; requests are checked against it.
    pub limits: Limits,
    /// What rank 0 says about itself.
    pub describe: Describe,
    /// Rank 0's memory plan: what, and how many bytes.
    pub memory: Vec<(String, u64)>,
}

/// Where the engine is in its life.
#[derive(Debug, Clone, PartialEq)]
pub enum EngineState {
    /// The shards load and prepare.
    Loading,
    /// Requests are taken.
    Ready(Arc<Facts>),
    /// Running requests end, new ones are refused.
    Draining,
    /// Nothing runs any more.
    Down {
        /// Why.
        reason: Arc<str>,
    },
}

/// What comes along with a request beside what the scheduler knows of it.
#[derive(Debug, Default)]
pub struct Attached {
    /// Makes the masks of a request that may be masked: without one it ends, because none comes.
    pub matcher: Option<Matcher>,
    /// What has not ended then ends with [`FinishReason::Deadline`], whether it waits or runs.
    pub deadline: Option<Instant>,
    /// Where what happens to it is noted.
    pub trace: Option<Arc<SeqTrace>>,
}

/// The way in. Cheap to clone; the engine drains when the last one is gone.
#[derive(Debug, Clone)]
pub struct EngineHandle {
    commands: mpsc::Sender<Command>,
    finishes: Arc<FinishBox>,
    state: watch::Receiver<EngineState>,
    facts: Arc<OnceLock<Arc<Facts>>>,
    metrics: Arc<Metrics>,
}

/// One request's tokens. Dropping it cancels the request.
#[derive(Debug)]
#[must_use = "dropping the stream cancels the request"]
pub struct TokenStream {
    sink: Arc<TokenSink>,
    finishes: Arc<FinishBox>,
    /// The driver knows, or need not know, that nobody reads on.
    settled: bool,
}

/// Starts the driver. The task ends when the engine is drained, or with the error that took the
/// group down; [`EngineState`] says so too.
pub fn start(config: EngineConfig) -> (EngineHandle, JoinHandle<Result<(), EngineError>>) {
    let dial = dial_sockets(&config.sockets);
    start_with(config, dial)
}

/// [`start`] with another way to reach the shards.
pub(crate) fn start_with(
    config: EngineConfig,
    dial: Dial,
) -> (EngineHandle, JoinHandle<Result<(), EngineError>>) {
    let (commands, receiver) = mpsc::channel(COMMANDS_MAX);
    let (state, watch) = watch::channel(EngineState::Loading);
    let metrics = Metrics::new(&config.metrics);
    let handle = EngineHandle {
        commands,
        finishes: Arc::default(),
        state: watch,
        facts: Arc::default(),
        metrics: Arc::new(metrics.clone()),
    };
    let inbox = driver::Inbox {
        commands: receiver,
        finishes: Arc::clone(&handle.finishes),
        state,
        facts: Arc::clone(&handle.facts),
    };
    let task = tokio::spawn(driver::run(config, dial, inbox, metrics));
    (handle, task)
}

// === impl EngineHandle ===

impl EngineHandle {
    /// Where the engine is in its life.
    pub fn state(&self) -> EngineState {
        self.state.borrow().clone()
    }

    /// Follows [`EngineHandle::state`].
    pub fn watch(&self) -> watch::Receiver<EngineState> {
        self.state.clone()
    }

    /// What is known once the group is prepared; stays known until the end.
    pub fn facts(&self) -> Option<Arc<Facts>> {
        self.facts.get().cloned()
    }

    /// How busy the engine is: a read of each number, however large the engine.
    pub fn load(&self) -> Load {
        self.metrics.load()
    }

    /// Submits a request. Resolves when it is admitted, not when it starts. Dropping this future
    /// withdraws the request.
    pub async fn submit(&self, request: Request) -> Result<TokenStream, SubmitError> {
        self.submit_with(request, Attached::default()).await
    }

    /// [`EngineHandle::submit`] of a request with what comes along with it.
    pub async fn submit_with(
        &self,
        request: Request,
        attached: Attached,
    ) -> Result<TokenStream, SubmitError> {
        let Attached {
            matcher,
            deadline,
            trace,
        } = attached;
        self.check()?;
        let request = match &trace {
            Some(trace) => request.traced(trace.context()),
            None => request,
        };
        let sink = Arc::new(TokenSink::new(request.tokens_max()));
        // Made before the command is sent, so that a caller who goes away while waiting for the
        // answer leaves no sequence behind.
        let mut stream = TokenStream {
            sink: Arc::clone(&sink),
            finishes: Arc::clone(&self.finishes),
            settled: false,
        };
        let (reply, answer) = oneshot::channel();
        let t0 = Instant::now();
        let submission = Submission {
            request,
            matcher: matcher.map(Box::new),
            trace,
            sink,
            reply,
            span: Span::current(),
            t0,
            deadline,
        };
        if self
            .commands
            .send(Command::Submit(submission))
            .await
            .is_err()
        {
            return Err(self.refusal());
        }
        match answer.await {
            Ok(Ok(())) => Ok(stream),
            Ok(Err(error)) => {
                stream.settled = true;
                Err(error)
            }
            Err(_) => Err(self.refusal()),
        }
    }

    /// Takes no more requests and returns when every stream has ended; streams that have not
    /// after `patience` are cut. Returns at once when the engine is down.
    pub async fn drain(&self, patience: Duration) {
        let deadline = Instant::now() + patience;
        if self
            .commands
            .send(Command::Drain { deadline })
            .await
            .is_err()
        {
            return;
        }
        let down = |state: &EngineState| matches!(state, EngineState::Down { .. });
        // An error means that the driver is gone, which is what is waited for.
        drop(self.state.clone().wait_for(down).await);
    }

    fn check(&self) -> Result<(), SubmitError> {
        match &*self.state.borrow() {
            EngineState::Ready(_) => Ok(()),
            EngineState::Loading => Err(SubmitError::NotReady),
            EngineState::Draining => Err(SubmitError::Draining),
            EngineState::Down { reason } => Err(SubmitError::Down {
                reason: Arc::clone(reason),
            }),
        }
    }

    /// Why the driver did not answer.
    fn refusal(&self) -> SubmitError {
        let reason = || "the driver has stopped".into();
        self.check()
            .err()
            .unwrap_or_else(|| SubmitError::Down { reason: reason() })
    }
}

// === impl TokenStream ===

impl TokenStream {
    /// All waiting events at once, or the next when there is none. Empty after the end.
    pub async fn next(&mut self) -> Vec<TokenEvent> {
        poll_fn(|cx| self.poll_next(cx)).await
    }

    /// [`TokenStream::next`] for whoever polls.
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Vec<TokenEvent>> {
        let events = std::task::ready!(self.sink.poll_take(cx));
        if matches!(events.last(), Some(TokenEvent::Finished(_))) {
            self.settled = true;
        }
        Poll::Ready(events)
    }

    /// Tells the driver that the request is done, and why. Never waits; events still come until
    /// `Finished`. Only the first call counts.
    pub fn finish(&mut self, reason: FinishReason) {
        if !self.settled {
            self.settled = true;
            self.finishes.post(Arc::clone(&self.sink), reason);
        }
    }
}

impl Drop for TokenStream {
    fn drop(&mut self) {
        self.sink.abandon();
        self.finish(FinishReason::Cancelled);
    }
}
