//! What requests ask for beside their bodies: how long they may take, and in whose dialect
//! OpenAI's routes answer.

use std::time::Duration;

use axum::body::Body;
use axum::http::Request;
use headrace_config::Dialect;
use headrace_engine::{FinishReason, TokenEvent};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::golden::golden;
use super::script::Wakes;
use super::{END, Reply, Stack, THIRD, drawn, ids, post};

const GENERATING: [(&str, &str); 4] = [
    ("/generate", r#"{"inputs": "Hi"}"#),
    ("/generate_stream", r#"{"inputs": "Hi"}"#),
    (
        "/v1/chat/completions",
        r#"{"messages": [{"role": "user", "content": "Hi"}], "stream": true, "model": "x"}"#,
    ),
    ("/v1/completions", r#"{"prompt": "Hi", "stream": true}"#),
];

fn within(seconds: &str, path: &str, body: &str) -> Request<Body> {
    let mut request = post(path, body.to_owned());
    let value = seconds.parse().unwrap();
    request.headers_mut().insert("x-request-timeout", value);
    request
}

#[tokio::test]
async fn the_api_s_description_has_what_is_asked_beside_bodies_where_it_is_read() {
    let stack = Stack::new();
    stack.script.otherwise(past(&[]));
    let document = stack.get("/api-doc/openapi.json").await.json();
    for (path, item) in document["paths"].as_object().unwrap() {
        let Some(operation) = item.get("post") else {
            continue;
        };
        let parameters = operation.get("parameters").unwrap_or(&Value::Null);
        let has = |name: &str| {
            let all = parameters.as_array();
            all.is_some_and(|all| all.iter().any(|one| one["name"] == name))
        };
        let body = match path.as_str() {
            "/v1/completions" => GENERATING[3].1,
            "/v1/chat/completions" | "/invocations" => GENERATING[2].1,
            "/vertex" => r#"{"instances": [{"inputs": "Hi"}]}"#,
            path if path.starts_with("/v2/") => {
                r#"{"inputs": [{"name": "in", "shape": [2], "datatype": "BYTES", "data": [72, 105]}]}"#
            }
            _ => GENERATING[0].1,
        };
        let path = path.replace(['{', '}'], "");
        let late = stack.send(within("never", &path, body)).await;
        let refused = late.status == 422 && late.text().contains("never");
        assert_eq!(refused, has("x-request-timeout"), "{path}");
        let query = format!("{path}?dialect=klingon");
        let strange = stack.send(post(&query, body.to_owned())).await;
        let refused = strange.status == 422 && strange.text().contains("klingon");
        assert!(refused || !has("dialect"), "{path}");
    }
}

fn past(seen: &[u32]) -> Wakes {
    let mut wakes = drawn(seen, FinishReason::Deadline);
    if seen.is_empty() {
        wakes = vec![vec![TokenEvent::Finished(FinishReason::Deadline)]];
    }
    wakes
}

async fn counted(stack: &Stack, line: &str) {
    let metrics = stack.get("/metrics").await;
    assert!(metrics.text().contains(line), "{line}: {}", metrics.text());
}

#[tokio::test]
async fn a_request_that_waits_past_its_deadline_is_504_with_the_number() {
    let stack = Stack::new();
    stack.script.push(past(&[]));
    let reply = stack
        .send(within("0.5", "/generate", GENERATING[0].1))
        .await;
    assert_eq!(reply.status, 504);
    let error = "Deadline passed: the request had 0.5 s (`x-request-timeout`), and waited for the \
                 model all the while";
    assert_eq!(
        reply.json(),
        json!({"error": error, "error_type": "deadline"})
    );
    counted(&stack, "headrace_requests_rejected{reason=\"deadline\"} 1").await;
    counted(&stack, "tgi_request_failure{err=\"deadline\"} 1").await;
}

#[tokio::test]
async fn a_request_that_is_not_submitted_by_its_deadline_is_not_waited_for() {
    // Whether the tokenizer's thread or the clock is first, the answer is the same.
    let stack = Stack::new();
    stack.script.otherwise(past(&[]));
    for _ in 0..20 {
        let reply = stack
            .send(within("1e-9", "/generate", GENERATING[0].1))
            .await;
        assert_eq!(reply.status, 504);
        assert!(
            reply.text().contains("waited for the model"),
            "{}",
            reply.text()
        );
    }
}

#[tokio::test]
async fn a_request_that_generates_past_its_deadline_says_how_far_it_came() {
    let stack = Stack::new();
    stack.script.push(past(&ids("ab")));
    let reply = stack.send(within("2", "/generate", GENERATING[0].1)).await;
    assert_eq!(reply.status, 504);
    let error = "Deadline passed: the request had 2 s (`x-request-timeout`), in which 2 tokens \
                 were generated";
    assert_eq!(
        reply.json(),
        json!({"error": error, "error_type": "deadline"})
    );
    counted(&stack, "tgi_request_failure{err=\"deadline\"} 1").await;
    let rejected = stack.get("/metrics").await;
    assert!(
        !rejected.text().contains("reason=\"deadline\""),
        "it was taken"
    );
    for (name, (path, body)) in [
        ("generate_stream_deadline.sse", GENERATING[1]),
        ("chat_deadline.sse", GENERATING[2]),
        ("completions_deadline.sse", GENERATING[3]),
    ] {
        stack.script.push(past(&ids("ab")));
        let reply = stack.send(within("2", path, body)).await;
        assert_eq!(reply.status, 200);
        golden(name, reply.text());
    }
}

#[tokio::test]
async fn every_generating_route_hands_the_deadline_on_and_the_header_wins() {
    let stack = Stack::with(|serve| serve.requests.timeout_ms = Some(3_600_000));
    let routes = [
        ("/", r#"{"inputs": "Hi"}"#),
        ("/invocations", r#"{"inputs": "Hi"}"#),
        ("/vertex", r#"{"instances": [{"inputs": "Hi"}]}"#),
        (
            "/v2/models/a/versions/b/infer",
            r#"{"inputs": [{"name": "t", "shape": [1], "datatype": "BYTES", "data": ["Hi"]}]}"#,
        ),
    ];
    for (path, body) in GENERATING.into_iter().chain(routes) {
        for (seconds, patience) in [(None, 3600), (Some("60"), 60)] {
            stack.script.push(drawn(&[END], FinishReason::EndOfText));
            let request = match seconds {
                Some(seconds) => within(seconds, path, body),
                None => post(path, body.to_owned()),
            };
            let (before, sent) = (Instant::now(), stack.send(request).await);
            assert_eq!(sent.status, 200, "{path}: {}", sent.text());
            let log = stack.script.log();
            let at = log.deadlines.last().copied().flatten().unwrap();
            let patience = Duration::from_secs(patience);
            assert!(at >= before + patience, "{path}");
            assert!(at <= Instant::now() + patience, "{path}");
        }
    }
    let stack = Stack::new();
    stack.script.push(drawn(&[END], FinishReason::EndOfText));
    stack
        .send(post("/generate", GENERATING[0].1.to_owned()))
        .await;
    assert_eq!(stack.script.log().deadlines, [None], "off unless asked for");
}

#[tokio::test]
async fn times_that_are_none_are_refused_with_what_was_given() {
    let stack = Stack::new();
    for seconds in [
        "", "soon", "0", "-1", "NaN", "inf", "604801", "1 s", "5e-324",
    ] {
        let reply = stack
            .send(within(seconds, "/generate", GENERATING[0].1))
            .await;
        assert_eq!(reply.status, 422, "{seconds}");
        let error = format!(
            "Input validation error: `x-request-timeout` must be seconds > 0 and <= 604800. \
             Given: {seconds:?}"
        );
        assert_eq!(reply.json()["error"], error);
    }
}

// === dialects ===

async fn ask(stack: &Stack, dialect: Option<&str>, path: &str, body: &Value, ids: &[u32]) -> Reply {
    stack.script.push(drawn(ids, FinishReason::Length));
    let path = match dialect {
        Some(dialect) => format!("{path}?dialect={dialect}"),
        None => path.to_owned(),
    };
    let reply = stack.post(&path, body).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    reply
}

fn chat(more: &Value) -> Value {
    let mut body = json!({"messages": [{"role": "user", "content": "Hi"}]});
    for (key, value) in more.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}

#[tokio::test]
async fn transcripts_of_both_dialects() {
    let mut drawn = ids("An");
    drawn.push(THIRD);
    drawn.extend(ids(" END and more"));
    let bodies = [
        (
            "chat",
            "/v1/chat/completions",
            chat(&json!({"stop": ["END"]})),
        ),
        (
            "completions",
            "/v1/completions",
            json!({"prompt": "Hi", "stop": ["END"]}),
        ),
    ];
    for dialect in ["openai", "tgi"] {
        for (name, path, body) in &bodies {
            let stack = Stack::new();
            let reply = ask(&stack, Some(dialect), path, body, &drawn).await;
            golden(&format!("{name}_stop_{dialect}.json"), reply.text());
            let mut body = body.clone();
            body["stream"] = true.into();
            let reply = ask(&stack, Some(dialect), path, &body, &drawn).await;
            golden(&format!("{name}_stop_{dialect}.sse"), reply.text());
        }
    }
}

#[tokio::test]
async fn the_server_s_dialect_holds_unless_a_request_says_otherwise() {
    let body = chat(&json!({"stop": ["END"]}));
    for (server, asked, reason) in [
        (Dialect::Openai, None, "stop"),
        (Dialect::Openai, Some("tgi"), "stop_sequence"),
        (Dialect::Tgi, None, "stop_sequence"),
        (Dialect::Tgi, Some("openai"), "stop"),
    ] {
        let stack = Stack::with(|serve| serve.http.v1_dialect = server);
        for path in ["/v1/chat/completions", "/invocations"] {
            let reply = ask(&stack, asked, path, &body, &ids("An END")).await;
            let choice = &reply.json()["choices"][0];
            assert_eq!(choice["finish_reason"], reason, "{server:?} {asked:?}");
            let text = if reason == "stop" { "An " } else { "An END" };
            assert_eq!(choice["message"]["content"], text);
        }
    }
    let stack = Stack::new();
    let reply = stack
        .post("/v1/chat/completions?dialect=french", &body)
        .await;
    assert_eq!(reply.status, 422);
    let error = "Input validation error: `dialect` must be openai or tgi. Given: \"french\"";
    assert_eq!(reply.json()["error"], error);
}

#[tokio::test]
async fn penalties_and_logprobs_mean_what_the_dialect_says() {
    for (dialect, repetition, presence, raw) in
        [("openai", 1.0, 0.5, true), ("tgi", 2.5, 0.0, false)]
    {
        let stack = Stack::new();
        let body = chat(&json!({"presence_penalty": 0.5, "logprobs": true}));
        ask(&stack, Some(dialect), "/v1/chat/completions", &body, &[END]).await;
        let log = stack.script.log();
        let sampling = log.requests[0].sampling();
        assert_eq!(sampling.repetition_penalty, repetition, "{dialect}");
        assert_eq!(sampling.presence_penalty, presence, "{dialect}");
        assert_eq!(sampling.logprob_raw, raw, "{dialect}");
    }
    let stack = Stack::new();
    let body = chat(&json!({"presence_penalty": -2.0}));
    let reply = stack.post("/v1/chat/completions?dialect=tgi", &body).await;
    assert_eq!(reply.status, 422, "-2 is a repetition penalty of 0 there");
}

#[tokio::test]
async fn errors_in_streams_say_422_in_tgi_s_dialect() {
    for (dialect, status) in [("openai", 424), ("tgi", 422)] {
        let stack = Stack::new();
        stack.script.push(drawn(&ids("a"), FinishReason::GroupLost));
        let path = format!("/v1/chat/completions?dialect={dialect}");
        let reply = stack.post(&path, &chat(&json!({"stream": true}))).await;
        let status = format!("\"http_status_code\":{status}");
        assert!(reply.text().contains(&status), "{}", reply.text());
    }
}
