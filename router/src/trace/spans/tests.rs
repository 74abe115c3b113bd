//! Timelines as values, and the spans that they are.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use headrace_engine::{
    Chunk, Decode, FinishReason, Sampling, SeqNotes, SeqTrace, SpanOf, Started, WaitReason,
};
use headrace_otlp::{Kind, Span, SpanId, TraceId, Value};

use super::{Asked, Http, SeqLine, Settled, Timeline, build};
use crate::meter::Times;
use crate::trace::Origin;

const MS: u64 = 1_000_000;

fn origin() -> Origin {
    Origin {
        trace: TraceId([9; 16]),
        parent: Some(SpanId(5)),
        state: Some("vendor=1".into()),
        sampled: true,
        inline: false,
        random: 77,
    }
}

fn at(received: Instant, ms: u64) -> Instant {
    received + Duration::from_millis(ms)
}

/// Queued for blocks until 20, two chunks until 60, three more tokens until 90, preempted at 75.
fn notes(received: Instant) -> SeqNotes {
    let chunk = |planned, done, start| Chunk {
        step: planned,
        planned: at(received, planned),
        done: Some(at(received, done)),
        start,
        tokens: 8,
        rows: 3,
        step_tokens: 10,
        device: Duration::from_millis(15),
    };
    SeqNotes {
        started: Some(Started {
            at: at(received, 20),
            waited_for: Some(WaitReason::Blocks),
            cached: 16,
        }),
        chunks: vec![chunk(20, 40, 16), chunk(40, 60, 24)],
        decode: Some(Decode {
            planned: at(received, 50),
            done: Some(at(received, 95)),
            steps: 4,
            rows_max: 2,
            device: Duration::from_millis(30),
        }),
        sent_back: vec![at(received, 75)],
        first_token: Some(at(received, 60)),
        tokens: 4,
        finished: Some((at(received, 90), FinishReason::Length)),
        ..SeqNotes::new(at(received, 5))
    }
}

fn line(sequences: Vec<SeqNotes>) -> Timeline {
    let received = sequences[0].submitted.checked_sub(Duration::from_millis(5));
    let received = received.expect("this machine has run for longer");
    let line = |(random, notes): (u64, SeqNotes)| SeqLine {
        ids: Arc::new(SeqTrace::new([9; 16], true, random)),
        input: 32,
        notes,
        settled: Some(Settled {
            times: Some(Times::default()),
            seed: Some(3),
            error: None,
        }),
    };
    Timeline {
        received,
        unix: Duration::from_secs(1),
        http: Http {
            method: "POST".to_owned(),
            route: "/generate_stream".to_owned(),
            path: "/generate_stream".to_owned(),
            agent: Some("curl".to_owned()),
            status: 200,
            error: None,
        },
        asked: Some(Asked {
            model: "org/tiny".to_owned(),
            sampling: Sampling::default(),
            tokens_max: 4,
        }),
        validate: Some((at(received, 1), Some(at(received, 5)))),
        tokenize: Some((at(received, 2), Some(at(received, 4)))),
        grammar: None,
        sequences: (100..).zip(sequences).map(line).collect(),
        responded: Some(at(received, 6)),
        streamed: true,
    }
}

fn spans(line: &Timeline) -> Vec<Span> {
    build(&origin(), line, at(line.received, 100))
}

/// Depth, name, and from when to when, in milliseconds since the request came.
fn tree(spans: &[Span]) -> Vec<String> {
    let told = spans.iter().map(|span| {
        let mut depth = 0;
        let mut up = span.parent;
        while let Some(parent) = up.and_then(|up| spans.iter().find(|span| span.id == up)) {
            depth += 1;
            up = parent.parent;
        }
        let since = |nanos: u64| (nanos - 1000 * MS) / MS;
        let name = format!("{}{}", "  ".repeat(depth), span.name);
        format!("{name} {}-{}", since(span.begin), since(span.end))
    });
    told.collect()
}

fn value<'a>(spans: &'a [Span], name: &str, key: &str) -> &'a Value {
    let span = spans.iter().find(|span| span.name == name).unwrap();
    let found = span.attributes.iter().find(|(found, _)| *found == key);
    &found.unwrap_or_else(|| panic!("{name} has no {key}")).1
}

#[test]
fn a_streamed_request_is_a_tree_of_its_phases() {
    let spans = spans(&line(vec![notes(Instant::now())]));
    assert_eq!(
        tree(&spans),
        [
            "POST /generate_stream 0-100",
            "  generate_stream 0-100",
            "    validate 1-5",
            "      tokenize 2-4",
            "    queued 5-20",
            "    infer 20-90",
            "      prefill 20-40",
            "      prefill 40-60",
            "      decode 60-90",
            "    stream 6-100",
        ]
    );
    assert_eq!(spans[0].kind, Kind::Server);
    assert_eq!(spans[0].parent, Some(SpanId(5)), "the caller's span");
    let state = spans
        .iter()
        .all(|span| span.state.as_deref() == Some("vendor=1"));
    assert!(state, "tracestate is carried on");
}

#[test]
fn attributes_say_what_happened_and_why() {
    let spans = spans(&line(vec![notes(Instant::now())]));
    let text = |text: &'static str| Value::from(text);
    for (name, key, expected) in [
        (
            "POST /generate_stream",
            "http.response.status_code",
            Value::Int(200),
        ),
        ("generate_stream", "gen_ai.request.model", text("org/tiny")),
        (
            "generate_stream",
            "gen_ai.usage.output_tokens",
            Value::Int(4),
        ),
        (
            "generate_stream",
            "gen_ai.response.time_to_first_chunk",
            Value::Float(0.06),
        ),
        ("generate_stream", "total_time", text("0ns")),
        ("generate_stream", "seed", text("Some(3)")),
        ("queued", "headrace.wait.reason", text("blocks")),
        (
            "infer",
            "gen_ai.usage.cache_read.input_tokens",
            Value::Int(16),
        ),
        (
            "infer",
            "gen_ai.response.finish_reasons",
            Value::Texts(vec!["length".to_owned()]),
        ),
        ("infer", "headrace.preemptions", Value::Int(1)),
        ("prefill", "headrace.prefill.tokens", Value::Int(8)),
        ("prefill", "headrace.prefill.cached_tokens", Value::Int(16)),
        ("prefill", "batch_size", Value::Int(3)),
        ("decode", "headrace.decode.steps", Value::Int(4)),
        ("decode", "headrace.decode.tokens", Value::Int(3)),
        ("decode", "headrace.device_ms", Value::Float(30.0)),
    ] {
        assert_eq!(value(&spans, name, key), &expected, "{name}: {key}");
    }
    let decode = spans.iter().find(|span| span.name == "decode").unwrap();
    assert_eq!(decode.events[0].name, "preempted");
    assert_eq!(decode.events[0].at, 1075 * MS);
}

#[test]
fn ids_differ_and_plans_can_name_them_beforehand() {
    let received = Instant::now();
    let line = line(vec![notes(received), notes(received)]);
    let spans = spans(&line);
    let mut ids: Vec<_> = spans.iter().map(|span| span.id).collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), spans.len());
    assert!(ids.iter().all(|id| id.0 != 0));
    let second = SpanId(line.sequences[1].ids.span_id(SpanOf::Chunk(1)));
    let span = spans.iter().find(|span| span.id == second).unwrap();
    assert_eq!(span.name, "prefill");
}

#[test]
fn a_client_that_leaves_while_it_waits_leaves_a_span_of_the_wait() {
    let received = Instant::now();
    let mut line = line(vec![SeqNotes::new(at(received, 5))]);
    line.sequences[0].settled = None;
    line.responded = None;
    let spans = spans(&line);
    assert_eq!(
        tree(&spans)[4..],
        ["    queued 5-100"],
        "and of nothing behind it"
    );
    let reasons = value(&spans, "generate_stream", "gen_ai.response.finish_reasons");
    assert_eq!(reasons, &Value::Texts(vec!["cancelled".to_owned()]));
}

#[test]
fn a_refused_request_ends_with_its_validation() {
    let received = Instant::now();
    let mut line = line(vec![notes(received)]);
    line.sequences.clear();
    line.validate = Some((at(line.received, 1), None));
    (line.asked, line.streamed) = (None, false);
    (line.http.status, line.http.error) = (422, Some("validation"));
    let spans = spans(&line);
    assert_eq!(tree(&spans)[2], "    validate 1-6");
    assert_eq!(spans[0].error, None, "the caller's mistake is none of ours");
    let error = value(&spans, "POST /generate_stream", "error.type");
    assert_eq!(error, &Value::from("validation"));
    line.http.status = 503;
    let failed = super::build(&origin(), &line, received);
    assert!(failed[0].error.is_some());
}

#[test]
fn a_fault_is_an_error_of_the_sequence_and_of_the_handler() {
    let mut notes = notes(Instant::now());
    notes.finished = notes.finished.map(|(at, _)| (at, FinishReason::Nan));
    let mut line = line(vec![notes]);
    let error = Some("generation".to_owned());
    line.sequences[0].settled.as_mut().unwrap().error = error;
    let spans = spans(&line);
    let failed = spans.iter().filter(|span| span.error.is_some());
    let failed: Vec<_> = failed.map(|span| span.name.as_ref()).collect();
    assert_eq!(failed, ["generate_stream", "infer"]);
}
