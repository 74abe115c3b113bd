//! `POST /v1/completions`.

use std::borrow::Cow;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use bytes::{Bytes, BytesMut};
use headrace_text::{Detokenizer, SpecialTokens};

use crate::answer::{Answer, ComputeTime, compute_headers, cost_headers};
use crate::app::{App, Text};
use crate::body::JsonBody;
use crate::error::{ApiError, Invalid};
use crate::intake::{Intake, Prompt};
use crate::openai::habits::Habits;
use crate::openai::shared::{Head, failure, joined, sequences};
use crate::openai::wire::{
    Completion, CompletionChoice, CompletionLogprobs, CompletionRequest, TopByText, Usage,
};
use crate::respond::{Finish, Manner, Piece, Respond};
use crate::sse::{self, Frames, event};
use crate::terms::Terms;
use crate::validate::{Ask, Names};

/// Writes the events of one continuation.
#[derive(Debug)]
struct CompletionFrames {
    head: Arc<Head>,
    habits: &'static Habits,
    index: usize,
    logprobs: bool,
    /// Characters written so far.
    offset: usize,
    /// The prompt, until it is written.
    echo: Option<Prompted>,
    /// Whether the prompt is all that is written.
    only: bool,
}

/// A prompt's text, where it came as text.
#[derive(Debug, Clone)]
struct Prompted(Option<String>);

/// What is told of the prompts.
#[derive(Debug)]
struct Echo {
    prompts: Vec<Prompted>,
    /// Whether nothing else is told.
    only: bool,
}

/// What an answer tells of each prompt.
#[derive(Debug)]
struct Telling {
    habits: &'static Habits,
    /// Continuations.
    n: usize,
    logprobs: bool,
    echo: Option<Echo>,
}

/// The prompt's part of an answer.
#[derive(Debug, Default)]
struct Told {
    text: String,
    columns: CompletionLogprobs,
}

/// Continues one text or several.
#[utoipa::path(
    post, path = "/v1/completions", tag = "Headrace", request_body = CompletionRequest,
    responses(
        (status = 200, description = "The continuation", content(
            (Completion = "application/json"),
            (Completion = "text/event-stream"),
        )),
    )
)]
pub(crate) async fn completions(
    State(app): State<Arc<App>>,
    terms: Terms,
    JsonBody(mut body): JsonBody<CompletionRequest>,
) -> Result<Response, ApiError> {
    if body.suffix.is_some() {
        return Err(ApiError::Suffix);
    }
    let echoes = body.echo.unwrap_or(false);
    // A prompt that is only to be scored takes one token all the same, which nobody sees.
    let only = echoes && body.max_tokens == Some(0);
    let ask = Ask {
        tokens_max: if only { Some(1) } else { body.max_tokens },
        prompt_logprobs: echoes && body.logprobs.is_some(),
        top_n: body.logprobs,
        logprob_raw: terms.habits.raw_logprobs,
        names: Names {
            prompt: "prompt",
            tokens_max: "max_tokens",
            top_n: "logprobs",
        },
        ..body.ask()
    };
    let characters = body.prompt.characters();
    let prompts = body.prompt.into_prompts();
    let echo = echoes.then(|| Echo::new(&prompts, only));
    sequences(&app, prompts.len(), body.n)?;
    let telling = Telling {
        habits: terms.habits,
        n: body.n.unwrap_or(1),
        logprobs: body.logprobs.is_some(),
        echo,
    };
    let is_streamed = body.stream.unwrap_or(false);
    let copies = candidates(&app, body.best_of, telling.n, is_streamed)?;
    let head = Head::new(&app, terms.habits, "cmpl", body.model.as_deref());
    let manner = if is_streamed && terms.habits.event_a_token {
        Manner::Tgi
    } else {
        Manner::Completion
    };
    let intake = Intake::open(&app, terms, manner, prompts.len() * copies, ask)?;
    let responds = intake.submit(prompts, copies).await?;
    if is_streamed {
        let headers = compute_headers(&app, characters);
        return Ok((headers, streamed(head, responds, &telling)).into_response());
    }
    let answers = Answer::collect_all(responds).await?;
    let headers = cost_headers(&app, characters, &answers, ComputeTime::LeftOut);
    let usage = usage(&answers, copies, telling.only());
    let answers = best(answers, copies, telling.n);
    Ok((headers, completion(&head, &answers, &telling, usage)).into_response())
}

// === impl Echo ===

impl Echo {
    fn new(prompts: &[Prompt], only: bool) -> Self {
        let prompted = |prompt: &Prompt| match prompt {
            Prompt::Text { text, .. } => Prompted(Some(text.clone())),
            Prompt::Ids(_) => Prompted(None),
        };
        let prompts = prompts.iter().map(prompted).collect();
        Self { prompts, only }
    }
}

// === impl Telling ===

impl Telling {
    /// Whether the prompts are all that is told.
    fn only(&self) -> bool {
        self.echo.as_ref().is_some_and(|echo| echo.only)
    }
}

// === impl Told ===

impl Told {
    /// Of a sequence's prompt.
    fn new(respond: &Respond, prompt: &Prompted, logprobs: bool) -> Self {
        let tokenizer = &respond.text.tokenizer;
        let mut columns = CompletionLogprobs::default();
        if logprobs {
            let mut detokenizer = Detokenizer::new(Arc::clone(tokenizer), SpecialTokens::Skip);
            let mut offset = 0;
            for (id, told) in respond.prefill() {
                let token = tokenizer.token_text(id);
                let top = (!told.logprob.is_nan()).then(|| {
                    let mut top = TopByText::default();
                    top.add(tokenizer.token_text(told.best.0), told.best_logprob);
                    top.add(token.clone(), told.logprob);
                    top
                });
                columns.tokens.push(token);
                columns.token_logprobs.push(told.logprob);
                columns.top_logprobs.push(top);
                columns.text_offset.push(offset);
                offset += detokenizer.push(id).chars().count();
            }
        }
        let given = prompt.0.clone();
        let text = given.unwrap_or_else(|| tokenizer.decode(&respond.prompt(), true));
        Self { text, columns }
    }
}

// === impl CompletionFrames ===

impl Frames for CompletionFrames {
    fn piece(&mut self, piece: &Piece, respond: &Respond, out: &mut BytesMut) {
        let echo = self.echo.take();
        let is_told = self.habits.event_a_token || self.logprobs || piece.finish.is_some();
        if echo.is_none() && piece.text.is_empty() && !is_told {
            return;
        }
        let told = echo.map(|prompt| Told::new(respond, &prompt, self.logprobs));
        let Told { text, mut columns } = told.unwrap_or_default();
        self.offset += text.chars().count();
        let own = if self.only { "" } else { piece.text.as_str() };
        if self.logprobs && !self.only {
            let pieces = std::slice::from_ref(piece);
            add(&respond.text, pieces, self.offset, &mut columns);
        }
        self.offset += own.chars().count();
        let text = if text.is_empty() {
            Cow::Borrowed(own)
        } else {
            Cow::Owned(text + own)
        };
        let choice = CompletionChoice {
            index: self.index,
            text: &text,
            logprobs: self.logprobs.then_some(columns),
            finish_reason: match piece.finish {
                Some(_) if self.only => Finish::Length.as_tgi(),
                finish => finish.map_or("", Finish::as_tgi),
            },
        };
        let meter = &respond.meter;
        let generated = if self.only { 0 } else { meter.generated };
        let usage = piece.finish.map(|_| Usage::new(meter.input, generated));
        event(&object(&self.head, &[choice], usage), out);
    }

    fn failed(&mut self, error: &ApiError, out: &mut BytesMut) {
        failure(self.habits, error, out);
    }
}

// === free functions ===

/// How many continuations of each prompt are generated, of which `n` are told.
fn candidates(
    app: &App,
    best_of: Option<usize>,
    n: usize,
    is_streamed: bool,
) -> Result<usize, Invalid> {
    let max = app.serve.requests.max_best_of;
    match best_of {
        // Nothing is left out, so that the bound of `n` is enough.
        None => Ok(n),
        Some(given) if given == n => Ok(n),
        Some(given) if given < n => Err(Invalid::BestOfBelow { n, given }),
        Some(given) if max == 1 => Err(Invalid::BestOfDisabled { given }),
        Some(given) if given > max => Err(Invalid::BestOf { max, given }),
        Some(given) if is_streamed => Err(Invalid::BestOfStreamed { n, given }),
        Some(given) => Ok(given),
    }
}

/// The `n` most probable of each prompt's `copies` answers by token, the most probable first. All
/// of them are left as they are.
fn best(answers: Vec<Answer>, copies: usize, n: usize) -> Vec<Answer> {
    if copies == n {
        return answers;
    }
    let mut answers = answers.into_iter();
    let mut kept = Vec::new();
    loop {
        let mut candidates: Vec<Answer> = answers.by_ref().take(copies).collect();
        if candidates.is_empty() {
            return kept;
        }
        candidates.sort_by(|a, b| b.score().total_cmp(&a.score()));
        candidates.truncate(n);
        kept.append(&mut candidates);
    }
}

/// A prompt counts once, however many continuations it has; of these, all that were generated.
fn usage(answers: &[Answer], copies: usize, only: bool) -> Usage {
    let prompts = answers.iter().step_by(copies);
    let prompt = prompts.map(|answer| answer.respond.meter.input).sum();
    let generated = answers.iter().map(|answer| answer.respond.meter.generated);
    Usage::new(prompt, if only { 0 } else { generated.sum() })
}

fn streamed(head: Head, responds: Vec<Respond>, telling: &Telling) -> Response {
    let head = Arc::new(head);
    let sequences = responds.into_iter().enumerate().map(|(index, respond)| {
        let echo = telling.echo.as_ref();
        let frames = CompletionFrames {
            head: Arc::clone(&head),
            habits: telling.habits,
            index,
            logprobs: telling.logprobs,
            offset: 0,
            echo: echo.map(|echo| echo.prompts[index / telling.n].clone()),
            only: telling.only(),
        };
        sse::frames(respond, frames)
    });
    sse::response(joined(sequences.collect(), Bytes::new))
}

fn object<'a>(
    head: &'a Head,
    choices: &'a [CompletionChoice<'a>],
    usage: Option<Usage>,
) -> Completion<'a> {
    Completion {
        object: "text_completion",
        id: &head.id,
        created: head.created,
        model: &head.model,
        system_fingerprint: &head.fingerprint,
        choices,
        usage,
    }
}

fn completion(head: &Head, answers: &[Answer], telling: &Telling, usage: Usage) -> Response {
    let (logprobs, only) = (telling.logprobs, telling.only());
    let told = answers.iter().enumerate().map(|(index, answer)| {
        let echo = telling.echo.as_ref();
        let prompt = echo.map(|echo| &echo.prompts[index / telling.n]);
        let prompt = prompt.map(|prompt| Told::new(&answer.respond, prompt, logprobs));
        let Told {
            mut text,
            mut columns,
        } = prompt.unwrap_or_default();
        if !only {
            if logprobs {
                let offset = text.chars().count();
                add(&answer.respond.text, &answer.pieces, offset, &mut columns);
            }
            text.push_str(&answer.shown_text());
        }
        Told { text, columns }
    });
    let mut told: Vec<Told> = told.collect();
    let choices = answers
        .iter()
        .zip(&mut told)
        .enumerate()
        .map(|(index, (answer, told))| CompletionChoice {
            index,
            logprobs: logprobs.then(|| std::mem::take(&mut told.columns)),
            text: &told.text,
            finish_reason: if only {
                "length"
            } else {
                telling.habits.finish_reason(answer.finish)
            },
        });
    let choices: Vec<_> = choices.collect();
    Json(object(head, &choices, Some(usage))).into_response()
}

/// Appends log-probabilities in OpenAI's columns. `offset` counts characters before the first piece.
fn add(text: &Text, pieces: &[Piece], offset: usize, columns: &mut CompletionLogprobs) {
    let mut offset = offset;
    for piece in pieces {
        let mut top = TopByText::default();
        for token in text.alternatives(&piece.top) {
            top.add(token.text, token.logprob);
        }
        columns.tokens.push(text.tokenizer.token_text(piece.id));
        columns.token_logprobs.push(piece.logprob);
        columns.top_logprobs.push(Some(top));
        columns.text_offset.push(offset);
        offset += piece.text.chars().count();
    }
}
