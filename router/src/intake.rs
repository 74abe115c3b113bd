//! The way of a prompt into the engine: permit, tokens, lengths, admission. Whatever is wrong is
//! known here, before a status is sent.

use std::sync::Arc;
use std::time::Instant;

use futures_util::future::try_join_all;
use headrace_engine::{Attached, Request};
use headrace_grammar::Matcher;
use headrace_text::Encoding;
use tokio::sync::{OwnedSemaphorePermit, oneshot};
use tokio::time::timeout_at;

use crate::app::{App, Ready, Text};
use crate::calls::ToolRules;
use crate::error::{ApiError, Invalid, Overdue, Overload};
use crate::grammar;
use crate::meter::{Account, Clock, GenerateParameters, Meter};
use crate::respond::{Manner, Respond, Rules};
use crate::terms::Terms;
use crate::trace::RequestTrace;
use crate::validate::{Ask, Checked};

/// A request that holds its permits and whose parameters are in order.
#[derive(Debug)]
pub(crate) struct Intake {
    app: Arc<App>,
    pub(crate) ready: Ready,
    pub(crate) checked: Checked,
    permits: OwnedSemaphorePermit,
    received: Instant,
    terms: Terms,
    /// What was asked for, as it is logged.
    parameters: GenerateParameters,
    manner: Manner,
    /// The tools whose calls are looked for.
    pub(crate) tools: Option<ToolRules>,
    /// If the request is traced.
    trace: Option<Arc<RequestTrace>>,
}

/// What is to be continued.
#[derive(Debug, Clone)]
pub(crate) enum Prompt {
    Text {
        text: String,
        /// Whether the tokenizer adds its own special tokens; a chat template has put them already.
        add_special_tokens: bool,
    },
    /// Taken as they are.
    Ids(Vec<u32>),
}

// === impl Intake ===

impl Intake {
    /// Takes a permit per sequence, then checks the parameters.
    pub(crate) fn open(
        app: &Arc<App>,
        terms: Terms,
        manner: Manner,
        sequences: usize,
        ask: Ask,
    ) -> Result<Self, ApiError> {
        let received = Instant::now();
        let trace = RequestTrace::current();
        if let Some(trace) = &trace {
            trace.validating();
        }
        let ready = app.ready()?;
        let permits = app.permit(sequences)?;
        let parameters = ask.told();
        let checked = ask.check(&app.serve.requests, ready.facts.limits.vocab_size)?;
        Ok(Self {
            app: Arc::clone(app),
            ready,
            checked,
            permits,
            received,
            terms,
            parameters,
            manner,
            tools: None,
            trace,
        })
    }

    /// Submits `copies` sequences of each prompt, in order, once all of them are known to be in
    /// order; resolves when the engine has admitted them, or at the deadline.
    pub(crate) async fn submit(
        self,
        prompts: Vec<Prompt>,
        copies: usize,
    ) -> Result<Vec<Respond>, ApiError> {
        let Some(deadline) = self.terms.deadline else {
            return self.submit_all(prompts, copies).await;
        };
        let submitted = timeout_at(deadline.at, self.submit_all(prompts, copies)).await;
        let timeout = deadline.timeout;
        submitted.unwrap_or(Err(ApiError::Deadline(Overdue::Waiting { timeout })))
    }

    async fn submit_all(
        mut self,
        prompts: Vec<Prompt>,
        copies: usize,
    ) -> Result<Vec<Respond>, ApiError> {
        if prompts.iter().any(Prompt::is_empty) {
            return Err(Invalid::Empty {
                field: self.checked.names.prompt,
            }
            .into());
        }
        self.checked.check_truncate(&self.ready)?;
        let text = Arc::clone(&self.ready.text);
        let encodings = prompts.into_iter().map(|prompt| prompt.into_ids(&text));
        let mut requests = Vec::new();
        let begun = Instant::now();
        let encoded = try_join_all(encodings).await?;
        if let Some(trace) = &self.trace {
            trace.tokenized(begun);
        }
        for ids in encoded {
            let ids = self.checked.kept(&ids);
            // A seed that was given is each prompt's own; one that was not differs everywhere.
            let first = if self.checked.seeded {
                0
            } else {
                requests.len()
            };
            let copies = first..first + copies;
            let seeds = copies.clone().map(|copy| self.checked.seed(copy));
            requests.extend(
                self.checked
                    .requests(ids, &self.ready, copies)?
                    .into_iter()
                    .zip(seeds),
            );
        }
        let grammar = match &self.checked.grammar {
            Some(spec) => {
                let workers = self.app.serve.requests.validation_workers;
                let begun = Instant::now();
                let compiled = grammar::compile(&self.ready, workers, spec).await?;
                if let Some(trace) = &self.trace {
                    trace.compiled(begun);
                }
                Some(compiled)
            }
            None => None,
        };
        let metrics = Arc::clone(&self.app.metrics);
        let account = Arc::new(Account::new(metrics, self.parameters, requests.len()));
        let mut responds = Vec::with_capacity(requests.len());
        for (request, seed) in requests {
            let matcher = grammar
                .as_deref()
                .map(|grammar| self.checked.matcher(grammar));
            let account = Arc::clone(&account);
            responds.push(self.admit(request, matcher, seed, account).await?);
        }
        Ok(responds)
    }

    async fn admit(
        &mut self,
        request: Request,
        matcher: Option<Matcher>,
        seed: Option<u64>,
        account: Arc<Account>,
    ) -> Result<Respond, ApiError> {
        let input = u32::try_from(request.prompt().len()).unwrap_or(u32::MAX);
        self.app.metrics.accepted(input, request.tokens_max().0);
        let clock = Clock {
            received: self.received,
            submitted: Instant::now(),
        };
        let (trace, told) = match &self.trace {
            Some(trace) => {
                let model = &self.app.serve.model.id;
                trace.validated(model, self.checked.sampling(), request.tokens_max().0);
                let (ids, told) = trace.sequence(input);
                (Some(ids), Some(told))
            }
            None => (None, None),
        };
        let attached = Attached {
            matcher,
            deadline: self.terms.deadline.map(|deadline| deadline.at),
            trace,
        };
        let backend = &self.app.backend;
        let source = backend.submit(request.clone(), attached).await?;
        let permit = self
            .permits
            .split(1)
            .expect("a request takes a permit for each of its sequences; this is a router bug");
        let meter = Meter::new(account, permit, clock, (input, seed), told);
        let rules = Rules {
            manner: self.manner,
            shows_stops: self.manner == Manner::Tgi || self.terms.habits.shows_stops,
            timeout: self.terms.deadline.map(|deadline| deadline.timeout),
            stop: self.checked.stop.clone(),
            ignore_eos: self.checked.ignore_eos,
            tools: self.tools.clone(),
        };
        let text = Arc::clone(&self.ready.text);
        Ok(Respond::new(source, request, rules, text, meter))
    }
}

// === impl Prompt ===

impl Prompt {
    fn is_empty(&self) -> bool {
        match self {
            Self::Text { text, .. } => text.is_empty(),
            Self::Ids(ids) => ids.is_empty(),
        }
    }

    async fn into_ids(self, tokenizing: &Text) -> Result<Vec<u32>, ApiError> {
        match self {
            Self::Text {
                text,
                add_special_tokens,
            } => Ok(encode(tokenizing, text, add_special_tokens).await?.ids),
            Self::Ids(ids) => Ok(ids),
        }
    }
}

// === free functions ===

/// Encodes on the pool's threads.
pub(crate) async fn encode(
    text: &Text,
    prompt: String,
    add_special_tokens: bool,
) -> Result<Encoding, ApiError> {
    let (done, encoded) = oneshot::channel();
    let deliver = move |encoding| {
        // A receiver that is gone is a client that is gone.
        drop(done.send(encoding));
    };
    text.pool
        .submit(prompt, add_special_tokens, deliver)
        .map_err(|full| Overload::Encode {
            waiting: full.waiting,
            queue_max: full.queue_max,
        })
        .map_err(ApiError::Overloaded)?;
    let encoding = encoded.await.map_err(|_| ApiError::Incomplete)?;
    encoding.map_err(|error| Invalid::Tokenizer(error.to_string()).into())
}
