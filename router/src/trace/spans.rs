//! Which spans a request has: a pure function of its timeline.
//!
//! ```text
//! POST /v1/chat/completions           server
//!   chat_completions                  the handler, with TGI's fields and GenAI's
//!     validate                        until all sequences are known to be in order
//!       tokenize
//!       grammar                       found or compiled
//!     queued                          of each sequence, with what it waited for
//!     infer                           of each sequence, from its first step to its last token
//!       prefill                       a chunk each; the shard's span is its child
//!       decode                        the shard's spans are its children
//!     stream                          from the first byte of the answer to the last
//! ```

use std::sync::Arc;
use std::time::{Duration, Instant};

use headrace_engine::{FinishReason, Sampling, SeqNotes, SeqTrace, SpanOf, WaitReason};
use headrace_otlp::{Event, Kind, Span, SpanId, Value};

use crate::meter::Times;
use crate::trace::Origin;

/// What was noted of a request.
#[derive(Debug, Clone)]
pub(crate) struct Timeline {
    pub(crate) received: Instant,
    /// The same moment, since 1970.
    pub(crate) unix: Duration,
    pub(crate) http: Http,
    pub(crate) asked: Option<Asked>,
    pub(crate) validate: Option<Lasted>,
    pub(crate) tokenize: Option<Lasted>,
    pub(crate) grammar: Option<Lasted>,
    pub(crate) sequences: Vec<SeqLine>,
    /// The status was decided.
    pub(crate) responded: Option<Instant>,
    /// The answer is a stream of events.
    pub(crate) streamed: bool,
}

/// From when to when; without an end until now.
pub(crate) type Lasted = (Instant, Option<Instant>);

/// A request as HTTP has it.
#[derive(Debug, Clone)]
pub(crate) struct Http {
    pub(crate) method: String,
    pub(crate) route: String,
    pub(crate) path: String,
    pub(crate) agent: Option<String>,
    /// 0 until it is known.
    pub(crate) status: u16,
    /// The class of a failure.
    pub(crate) error: Option<&'static str>,
}

/// What was asked of the model.
#[derive(Debug, Clone)]
pub(crate) struct Asked {
    pub(crate) model: String,
    pub(crate) sampling: Sampling,
    pub(crate) tokens_max: u32,
}

/// What was noted of a sequence.
#[derive(Debug, Clone)]
pub(crate) struct SeqLine {
    /// The ids of its spans.
    ids: Arc<SeqTrace>,
    /// Prompt tokens.
    input: u32,
    pub(crate) notes: SeqNotes,
    pub(crate) settled: Option<Settled>,
}

/// How a sequence was told to its end.
#[derive(Debug, Clone)]
pub(crate) struct Settled {
    pub(crate) times: Option<Times>,
    pub(crate) seed: Option<u64>,
    /// The class of the failure.
    pub(crate) error: Option<String>,
}

/// The request's own spans, by the last digits of their ids.
#[derive(Debug, Clone, Copy)]
enum Own {
    Http = 1,
    Handler = 2,
    Validate = 3,
    Tokenize = 4,
    Grammar = 5,
    Stream = 6,
}

/// Makes spans of moments.
struct Builder<'a> {
    origin: &'a Origin,
    line: &'a Timeline,
    now: Instant,
    spans: Vec<Span>,
}

type Attributes = Vec<(&'static str, Value)>;

/// The spans of a request, each after its parent; what has not ended ends at `now`.
pub(super) fn build(origin: &Origin, line: &Timeline, now: Instant) -> Vec<Span> {
    let spans = Vec::with_capacity(6 + 8 * line.sequences.len());
    let mut builder = Builder {
        origin,
        line,
        now,
        spans,
    };
    builder.server();
    builder.handler();
    builder.validation();
    for sequence in &line.sequences {
        builder.sequence(sequence);
    }
    if let Some(responded) = line.responded.filter(|_| line.streamed) {
        let ids = (builder.own(Own::Stream), builder.own(Own::Handler));
        builder.add(ids, "stream", (responded, None), Vec::new());
    }
    builder.spans
}

/// The id of the server's span, which callers are told.
pub(super) fn http_id(origin: &Origin) -> SpanId {
    own_id(origin, Own::Http)
}

// === impl SeqLine ===

impl SeqLine {
    pub(crate) fn new(ids: &Arc<SeqTrace>, input: u32) -> Self {
        Self {
            ids: Arc::clone(ids),
            input,
            notes: ids.notes(),
            settled: None,
        }
    }
}

// === impl Builder ===

impl Builder<'_> {
    fn server(&mut self) {
        let http = &self.line.http;
        let mut attributes: Attributes = vec![
            ("http.request.method", http.method.clone().into()),
            ("http.route", http.route.clone().into()),
            ("url.path", http.path.clone().into()),
            ("url.scheme", "http".into()),
            ("trace_id", self.origin.trace.to_string().into()),
        ];
        if http.status != 0 {
            let status = u32::from(http.status);
            attributes.push(("http.response.status_code", status.into()));
        }
        if let Some(agent) = &http.agent {
            attributes.push(("user_agent.original", agent.clone().into()));
        }
        if let Some(error) = http.error {
            attributes.push(("error.type", error.into()));
        }
        let id = self.own(Own::Http);
        let span = Span {
            trace: self.origin.trace,
            id,
            parent: self.origin.parent,
            state: self.origin.state.clone(),
            name: format!("{} {}", http.method, http.route).into(),
            kind: Kind::Server,
            begin: self.nanos(self.line.received),
            end: self.nanos(self.now),
            attributes,
            events: Vec::new(),
            links: Vec::new(),
            // What the caller did wrong is no error of the server.
            error: (http.status >= 500).then(|| http.error.unwrap_or("error").into()),
        };
        self.spans.push(span);
    }

    fn handler(&mut self) {
        let line = self.line;
        let mut attributes = generation(line);
        if let Some(asked) = &line.asked {
            attributes.push(("parameters", format!("{:?}", asked.sampling).into()));
        }
        let first = line.sequences.first();
        if let Some(settled) = first.and_then(|first| first.settled.as_ref()) {
            if let Some(times) = &settled.times {
                let durations = [
                    ("total_time", times.total),
                    ("validation_time", times.validation),
                    ("queue_time", times.queue),
                    ("inference_time", times.inference),
                    ("time_per_token", times.per_token),
                ];
                let told = durations.map(|(name, time)| (name, format!("{time:?}").into()));
                attributes.extend(told);
            }
            attributes.push(("seed", format!("{:?}", settled.seed).into()));
        }
        let (id, parent) = (self.own(Own::Handler), self.own(Own::Http));
        let name = handler_name(&line.http.route);
        self.add((id, parent), name, (line.received, None), attributes);
        let failed = line.sequences.iter();
        let mut failed = failed.filter_map(|sequence| sequence.settled.as_ref()?.error.clone());
        if let Some(error) = failed.next() {
            self.fail(error);
        }
    }

    fn validation(&mut self) {
        let Some(validate) = self.line.validate else {
            return;
        };
        // One that was refused ended with its answer.
        let end = validate.1.or(self.line.responded);
        let (id, parent) = (self.own(Own::Validate), self.own(Own::Handler));
        self.add((id, parent), "validate", (validate.0, end), Vec::new());
        let parent = id;
        for (own, name, lasted) in [
            (Own::Tokenize, "tokenize", self.line.tokenize),
            (Own::Grammar, "grammar", self.line.grammar),
        ] {
            if let Some(lasted) = lasted {
                self.add((self.own(own), parent), name, lasted, Vec::new());
            }
        }
    }

    fn sequence(&mut self, sequence: &SeqLine) {
        let notes = &sequence.notes;
        let parent = self.own(Own::Handler);
        let id = |of| SpanId(sequence.ids.span_id(of));
        let ended = notes.finished.map(|(at, _)| at);
        let waited = (notes.submitted, notes.started.map(|s| s.at).or(ended));
        let reason = notes.started.and_then(|started| started.waited_for);
        let attributes = vec![
            ("headrace.wait.reason", reason_word(reason).into()),
            ("gen_ai.usage.input_tokens", sequence.input.into()),
        ];
        self.add((id(SpanOf::Queued), parent), "queued", waited, attributes);
        let Some(started) = notes.started else {
            return;
        };
        let cached = started.cached;
        let mut attributes: Attributes = vec![
            ("gen_ai.usage.input_tokens", sequence.input.into()),
            ("gen_ai.usage.output_tokens", notes.tokens.into()),
            ("gen_ai.usage.cache_read.input_tokens", cached.into()),
            ("headrace.preemptions", preemptions(notes).into()),
        ];
        if let Some((_, reason)) = notes.finished {
            let reasons = vec![finish_word(reason).to_owned()];
            attributes.push(("gen_ai.response.finish_reasons", Value::Texts(reasons)));
        }
        if notes.chunks_more > 0 {
            let left_out = notes.chunks_more.into();
            attributes.push(("headrace.prefill.chunks_left_out", left_out));
        }
        let infer = id(SpanOf::Infer);
        self.add((infer, parent), "infer", (started.at, ended), attributes);
        self.preempted(notes);
        if let Some((_, reason)) = notes.finished.filter(|(_, reason)| is_fault(*reason)) {
            self.fail(finish_word(reason).to_owned());
        }
        for (index, chunk) in notes.chunks.iter().enumerate() {
            let attributes = vec![
                ("headrace.step", chunk.step.into()),
                ("headrace.prefill.start", chunk.start.into()),
                ("headrace.prefill.tokens", chunk.tokens.into()),
                (
                    "headrace.prefill.cached_tokens",
                    if index == 0 { cached } else { 0 }.into(),
                ),
                ("batch_size", chunk.rows.into()),
                ("headrace.step.tokens", chunk.step_tokens.into()),
                (
                    "headrace.device_ms",
                    (chunk.device.as_secs_f64() * 1e3).into(),
                ),
            ];
            let lasted = (chunk.planned, chunk.done.or(ended));
            self.add(
                (id(SpanOf::Chunk(index)), infer),
                "prefill",
                lasted,
                attributes,
            );
        }
        self.decode(sequence, infer);
    }

    fn decode(&mut self, sequence: &SeqLine, infer: SpanId) {
        let notes = &sequence.notes;
        let Some(decode) = notes.decode else {
            return;
        };
        // Its first step was planned while the last chunk ran.
        let chunks = notes.chunks.iter().filter_map(|chunk| chunk.done);
        let first = notes.first_token.or_else(|| chunks.min());
        let begin = first.map_or(decode.planned, |first| first.max(decode.planned));
        let ended = notes.finished.map(|(at, _)| at);
        let attributes = vec![
            ("headrace.decode.steps", decode.steps.into()),
            (
                "headrace.decode.tokens",
                notes.tokens.saturating_sub(1).into(),
            ),
            ("batch_size", decode.rows_max.into()),
            (
                "headrace.device_ms",
                (decode.device.as_secs_f64() * 1e3).into(),
            ),
        ];
        let id = SpanId(sequence.ids.span_id(SpanOf::Decode));
        // The step that is done last may be one too many (R3).
        let end = ended.or(decode.done);
        self.add((id, infer), "decode", (begin, end), attributes);
        self.preempted(notes);
    }

    /// Marks in the newest span when the sequence went back to the queue.
    fn preempted(&mut self, notes: &SeqNotes) {
        let events = notes.sent_back.iter().map(|at| Event {
            name: "preempted",
            at: self.nanos(*at),
            attributes: Vec::new(),
        });
        let events: Vec<_> = events.collect();
        if let Some(span) = self.spans.last_mut() {
            let (begin, end) = (span.begin, span.end);
            let inside = |event: &Event| (begin..=end).contains(&event.at);
            span.events.extend(events.into_iter().filter(inside));
        }
    }

    fn add(
        &mut self,
        (id, parent): (SpanId, SpanId),
        name: &'static str,
        (begin, end): Lasted,
        attributes: Attributes,
    ) {
        let begin = self.nanos(begin);
        let end = self.nanos(end.unwrap_or(self.now));
        self.spans.push(Span {
            trace: self.origin.trace,
            id,
            parent: Some(parent),
            state: self.origin.state.clone(),
            name: name.into(),
            kind: Kind::Internal,
            begin,
            end: end.max(begin),
            attributes,
            events: Vec::new(),
            links: Vec::new(),
            error: None,
        });
    }

    /// The newest span failed.
    fn fail(&mut self, error: String) {
        if let Some(span) = self.spans.last_mut() {
            span.attributes.push(("error.type", error.clone().into()));
            span.error = Some(error.into());
        }
    }

    fn own(&self, own: Own) -> SpanId {
        own_id(self.origin, own)
    }

    /// Since 1970.
    fn nanos(&self, at: Instant) -> u64 {
        let since = self.line.unix + at.saturating_duration_since(self.line.received);
        u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
    }
}

// === free functions ===

fn own_id(origin: &Origin, own: Own) -> SpanId {
    // The highest of the low bits keeps every id from being 0.
    SpanId((origin.random << 12) | (1 << 11) | own as u64)
}

/// What GenAI's conventions say of a whole request.
fn generation(line: &Timeline) -> Attributes {
    let operation = match line.http.route.as_str() {
        "/v1/chat/completions" => "chat",
        _ => "text_completion",
    };
    let mut told: Attributes = vec![
        ("gen_ai.operation.name", operation.into()),
        ("gen_ai.provider.name", "headrace".into()),
    ];
    if let Some(asked) = &line.asked {
        let sampling = &asked.sampling;
        told.extend([
            ("gen_ai.request.model", asked.model.clone().into()),
            ("gen_ai.response.model", asked.model.clone().into()),
            ("gen_ai.request.max_tokens", asked.tokens_max.into()),
            ("gen_ai.request.temperature", sampling.temperature.into()),
            ("gen_ai.request.top_p", sampling.top_p.into()),
            (
                "gen_ai.request.frequency_penalty",
                sampling.frequency_penalty.into(),
            ),
            (
                "gen_ai.request.presence_penalty",
                sampling.presence_penalty.into(),
            ),
        ]);
        if sampling.top_k > 0 {
            told.push(("gen_ai.request.top_k", sampling.top_k.into()));
        }
    }
    let sequences = &line.sequences;
    if sequences.is_empty() {
        return told;
    }
    told.push(("gen_ai.request.choice.count", sequences.len().into()));
    let input = sequences.iter().map(|sequence| sequence.input).max();
    let output: u32 = sequences.iter().map(|sequence| sequence.notes.tokens).sum();
    let reasons = sequences
        .iter()
        .map(|sequence| match sequence.notes.finished {
            Some((_, reason)) => finish_word(reason).to_owned(),
            None => "cancelled".to_owned(),
        });
    told.extend([
        ("gen_ai.usage.input_tokens", input.unwrap_or(0).into()),
        ("gen_ai.usage.output_tokens", output.into()),
        (
            "gen_ai.response.finish_reasons",
            Value::Texts(reasons.collect()),
        ),
    ]);
    let firsts = sequences.iter().filter_map(|s| s.notes.first_token);
    if let Some(first) = firsts.min() {
        let seconds = first.saturating_duration_since(line.received).as_secs_f64();
        told.push(("gen_ai.response.time_to_first_chunk", seconds.into()));
    }
    told
}

/// TGI's name of what answers on a route.
fn handler_name(route: &str) -> &'static str {
    match route {
        "/" => "compat_generate",
        "/generate" => "generate",
        "/generate_stream" => "generate_stream",
        "/v1/chat/completions" => "chat_completions",
        "/v1/completions" => "completions",
        "/invocations" => "sagemaker_compatibility",
        "/vertex" => "vertex_compatibility",
        "/v2/models/{name}/versions/{version}/infer" => "kserve_model_infer",
        _ => "handler",
    }
}

fn preemptions(notes: &SeqNotes) -> usize {
    notes.sent_back.len() + notes.sent_back_more as usize
}

fn reason_word(reason: Option<WaitReason>) -> &'static str {
    match reason {
        None => "none",
        Some(WaitReason::Slots) => "slots",
        Some(WaitReason::State) => "state",
        Some(WaitReason::Blocks) => "blocks",
        Some(WaitReason::Budget) => "budget",
        Some(WaitReason::Recovery) => "recovery",
    }
}

fn finish_word(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::EndOfText => "stop",
        FinishReason::StopText => "stop_sequence",
        FinishReason::Length => "length",
        FinishReason::Cancelled => "cancelled",
        FinishReason::Deadline => "deadline",
        FinishReason::Nan => "nan",
        FinishReason::MaskMissed => "mask_missed",
        FinishReason::GrammarFailed => "grammar_failed",
        FinishReason::GroupLost => "group_lost",
    }
}

fn is_fault(reason: FinishReason) -> bool {
    match reason {
        FinishReason::EndOfText
        | FinishReason::StopText
        | FinishReason::Length
        | FinishReason::Cancelled => false,
        FinishReason::Deadline
        | FinishReason::Nan
        | FinishReason::MaskMissed
        | FinishReason::GrammarFailed
        | FinishReason::GroupLost => true,
    }
}

#[cfg(test)]
mod tests;
