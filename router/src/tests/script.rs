//! An engine that says what a test wrote down.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};

use headrace_engine::{EngineState, FinishReason, Load, Request, SubmitError, TokenEvent};
use headrace_grammar::Matcher;
use tokio::time::Instant;

/// What comes for one submission, wake by wake. After it the sequence hangs.
pub(crate) type Wakes = Vec<Vec<TokenEvent>>;

/// Each number is another's: whoever swaps two of them is found out.
const LOAD: Load = Load {
    waiting: 1,
    running: 2,
    kv_blocks: 256,
    kv_blocks_used: 3,
    kv_blocks_cached: 4,
    prefill_tokens: 5,
    cached_tokens: 6,
    generated_tokens: 7,
};

/// A scripted engine.
#[derive(Clone, Debug)]
pub(crate) struct Script {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Debug)]
struct Inner {
    state: EngineState,
    load: Load,
    refusal: Option<SubmitError>,
    wakes: VecDeque<Wakes>,
    otherwise: Wakes,
    log: Log,
}

/// What was asked of the engine.
#[derive(Debug, Clone, Default)]
pub(crate) struct Log {
    pub(crate) requests: Vec<Request>,
    /// Of each request, if it is masked.
    pub(crate) matchers: Vec<Option<Matcher>>,
    pub(crate) deadlines: Vec<Option<Instant>>,
    pub(crate) finished: Vec<FinishReason>,
    pub(crate) dropped: usize,
}

/// One submission's events.
#[derive(Debug)]
pub(crate) struct ScriptStream {
    script: Script,
    wakes: VecDeque<Vec<TokenEvent>>,
    ended: bool,
}

// === impl Script ===

impl Script {
    pub(crate) fn new(state: EngineState) -> Self {
        let inner = Inner {
            state,
            load: LOAD,
            refusal: None,
            wakes: VecDeque::new(),
            otherwise: Wakes::new(),
            log: Log::default(),
        };
        Self {
            inner: Arc::new(Mutex::new(inner)),
        }
    }

    pub(crate) fn state(&self) -> EngineState {
        self.lock().state.clone()
    }

    pub(crate) fn set_state(&self, state: EngineState) {
        self.lock().state = state;
    }

    pub(crate) fn refuse(&self, error: SubmitError) {
        self.lock().refusal = Some(error);
    }

    pub(crate) fn load(&self) -> Load {
        self.lock().load
    }

    /// The events of the next submission without any.
    pub(crate) fn push(&self, wakes: Wakes) {
        self.lock().wakes.push_back(wakes);
    }

    /// The events of every submission that has none of its own.
    pub(crate) fn otherwise(&self, wakes: Wakes) {
        self.lock().otherwise = wakes;
    }

    pub(crate) fn log(&self) -> Log {
        self.lock().log.clone()
    }

    pub(crate) fn submit(
        &self,
        request: &Request,
        matcher: Option<Matcher>,
        deadline: Option<Instant>,
    ) -> Result<ScriptStream, SubmitError> {
        let mut inner = self.lock();
        inner.log.requests.push(request.clone());
        inner.log.matchers.push(matcher);
        inner.log.deadlines.push(deadline);
        if let Some(refusal) = &inner.refusal {
            return Err(refusal.clone());
        }
        let wakes = inner.wakes.pop_front();
        let wakes = wakes.unwrap_or_else(|| inner.otherwise.clone()).into();
        Ok(ScriptStream {
            script: self.clone(),
            wakes,
            ended: false,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap()
    }
}

// === impl ScriptStream ===

impl ScriptStream {
    pub(crate) async fn next(&mut self) -> Vec<TokenEvent> {
        let Some(events) = self.wakes.pop_front() else {
            if self.ended {
                return Vec::new();
            }
            return std::future::pending().await;
        };
        self.ended |= matches!(events.last(), Some(TokenEvent::Finished(_)));
        events
    }

    pub(crate) fn finish(&mut self, reason: FinishReason) {
        self.script.lock().log.finished.push(reason);
    }
}

impl Drop for ScriptStream {
    fn drop(&mut self) {
        self.script.lock().log.dropped += 1;
    }
}
