//! What both of OpenAI's routes need: the head of every reply, several sequences in one, and the
//! end of a stream.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::{Bytes, BytesMut};
use futures_util::{Stream, StreamExt, stream};

use crate::app::App;
use crate::error::ApiError;
use crate::openai::habits::Habits;
use crate::openai::wire::{StreamError, StreamErrorBody, Usage};
use crate::sse::{DONE, event};
use crate::validate::random_u64;

/// The fields that every object of one reply repeats.
#[derive(Debug, Clone)]
pub(crate) struct Head {
    pub(crate) id: String,
    pub(crate) created: u64,
    pub(crate) model: String,
    pub(crate) fingerprint: String,
}

/// Tokens of all sequences of a streamed reply.
#[derive(Debug, Default)]
pub(crate) struct UsageSum {
    prompt: AtomicU32,
    completion: AtomicU32,
}

// === impl Head ===

impl Head {
    pub(crate) fn new(app: &App, habits: &Habits, prefix: &str, model: Option<&str>) -> Self {
        let since = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        Self {
            id: if habits.has_ids {
                format!("{prefix}-{:016x}{:016x}", random_u64(), random_u64())
            } else {
                String::new()
            },
            created: since.as_secs(),
            model: app.model_name(model).to_owned(),
            fingerprint: format!("{}-native", env!("CARGO_PKG_VERSION")),
        }
    }
}

// === impl UsageSum ===

impl UsageSum {
    /// A prompt counts once, however many sequences it has.
    pub(crate) fn new(prompt: u32) -> Arc<Self> {
        Arc::new(Self {
            prompt: AtomicU32::new(prompt),
            completion: AtomicU32::new(0),
        })
    }

    pub(crate) fn add(&self, completion: u32) {
        self.completion.fetch_add(completion, Ordering::Relaxed);
    }

    pub(crate) fn usage(&self) -> Usage {
        Usage::new(
            self.prompt.load(Ordering::Relaxed),
            self.completion.load(Ordering::Relaxed),
        )
    }
}

// === free functions ===

/// How many sequences a request asks for, when that is allowed. `n` counts per prompt.
pub(crate) fn sequences(app: &App, prompts: usize, n: Option<usize>) -> Result<usize, ApiError> {
    let max = app.serve.requests.max_client_batch_size;
    let given = prompts.saturating_mul(n.unwrap_or(1));
    let field = if n.unwrap_or(1) == 1 { "prompt" } else { "n" };
    if given == 0 || given > max {
        return Err(ApiError::BatchSize { field, given, max });
    }
    Ok(given)
}

/// The events of several sequences as they come, then what `tail` makes, then `[DONE]`.
pub(crate) fn joined<S>(
    sequences: Vec<S>,
    tail: impl FnOnce() -> Bytes + Send + 'static,
) -> impl Stream<Item = Bytes> + Send
where
    S: Stream<Item = Bytes> + Send + 'static,
{
    let sequences = stream::select_all(sequences.into_iter().map(Box::pin));
    sequences.chain(stream::once(async {
        let mut last = BytesMut::from(&tail()[..]);
        last.extend_from_slice(&DONE);
        last.freeze()
    }))
}

/// The error event of these routes, with the status it would have had, or the one all have.
pub(crate) fn failure(habits: &Habits, error: &ApiError, out: &mut BytesMut) {
    let message = error.to_string();
    let own = error.status().as_u16();
    let http_status_code = habits.stream_failure.unwrap_or(own);
    event(
        &StreamError {
            error: StreamErrorBody {
                message,
                http_status_code,
            },
        },
        out,
    );
}
