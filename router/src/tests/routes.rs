//! Routes as their callers see them: limits, states, headers, probes.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::{Method, Request, StatusCode, header};
use futures_util::StreamExt;
use headrace_engine::{EngineState, FinishReason, SubmitError};
use serde_json::{Value, json};

use super::{END, Stack, WORLD, drawn, ids, post, ready, serve, text, token};
use crate::app::Ready;

fn hi() -> Value {
    json!({"inputs": "Hi", "parameters": {"max_new_tokens": 4}})
}

#[tokio::test]
async fn loading_and_draining_answer_503_everywhere() {
    let stack = Stack::new();
    for state in [EngineState::Loading, EngineState::Draining] {
        stack.script.set_state(state);
        for path in ["/health", "/", "/ping", "/readyz"] {
            let reply = stack.get(path).await;
            assert_eq!(reply.status, 503);
            let body = json!({"error": "unhealthy", "error_type": "healthcheck"});
            assert_eq!(reply.json(), body, "{path}");
        }
        let reply = stack.post("/generate", &hi()).await;
        assert_eq!(reply.status, 503);
        assert_eq!(reply.json()["error_type"], "healthcheck");
        assert_eq!(reply.header("retry-after"), Some("1"));
        assert_eq!(stack.get("/livez").await.status, 200);
        assert_eq!(stack.get("/info").await.status, 200);
    }
}

#[tokio::test]
async fn a_ready_server_says_so() {
    let stack = Stack::new();
    let reply = stack.get("/health").await;
    assert_eq!((reply.status.as_u16(), reply.text()), (200, ""));
    let info = stack.get("/info").await.json();
    assert_eq!(info["model_id"], "org/tiny");
    assert_eq!(info["max_input_tokens"], 64);
    assert_eq!(info["max_total_tokens"], 128);
    assert_eq!(info["router"], "text-generation-router");
    assert_eq!(info["model_dtype"], "float32");
    let models = stack.get("/v1/models").await.json();
    let model = json!({"id": "org/tiny", "object": "model", "created": 0, "owned_by": "org/tiny"});
    assert_eq!(models, json!({"object": "list", "data": [model]}));
    assert_eq!(stack.get("/v1/models/org/tiny").await.json(), model);
    assert_eq!(stack.get("/v1/models/other").await.status, 404);
}

#[tokio::test]
async fn a_request_without_a_permit_is_429_before_it_is_validated() {
    let stack = Stack::with(|serve| serve.requests.max_concurrent_requests = 1);
    let running = stack.call(post("/generate_stream", hi().to_string())).await;
    assert_eq!(running.status(), 200);
    let body = json!({"inputs": "", "parameters": {"top_k": 0}});
    let reply = stack.post("/generate", &body).await;
    assert_eq!(reply.status, 429);
    assert_eq!(reply.header("retry-after"), Some("1"));
    assert_eq!(reply.json()["error_type"], "overloaded");
    assert!(
        reply
            .text()
            .contains("1 requests (`max_concurrent_requests`)"),
        "{}",
        reply.text()
    );
    drop(running);
    assert_eq!(
        stack.post("/generate", &body).await.status,
        422,
        "the permit came back"
    );
}

#[tokio::test]
async fn a_full_queue_is_429_and_takes_no_permit() {
    let stack = Stack::with(|serve| serve.requests.max_concurrent_requests = 1);
    stack.script.refuse(SubmitError::QueueFull {
        waiting: 8,
        queue_max: 8,
    });
    for _ in 0..2 {
        let reply = stack.post("/generate_stream", &hi()).await;
        assert_eq!(reply.status, 429);
        assert!(reply.text().contains("at most 8 may"), "{}", reply.text());
    }
}

#[tokio::test]
async fn dropping_the_body_cancels_the_sequence_and_counts_it() {
    let stack = Stack::new();
    stack.script.push(vec![vec![token(u32::from(b'a'))]]);
    let response = stack.call(post("/generate_stream", hi().to_string())).await;
    let mut body = response.into_body().into_data_stream();
    assert!(
        body.next()
            .await
            .unwrap()
            .unwrap()
            .starts_with(b"data: {\"index\":1,")
    );
    assert_eq!(stack.script.log().dropped, 0);
    drop(body);
    assert_eq!(stack.script.log().dropped, 1);
    let metrics = stack.get("/metrics").await;
    assert!(
        metrics
            .text()
            .contains("tgi_request_failure{err=\"dropped\"} 1")
    );
}

#[tokio::test]
async fn a_stop_string_ends_the_body_at_once_and_tells_the_engine() {
    let stack = Stack::new();
    stack
        .script
        .push(drawn(&ids("a."), FinishReason::Cancelled));
    let body = json!({"prompt": "Hi", "stop": ".", "max_tokens": 9});
    let reply = stack.post("/v1/completions", &body).await.json();
    assert_eq!(reply["choices"][0]["text"], "a");
    assert_eq!(reply["choices"][0]["finish_reason"], "stop");
    assert_eq!(stack.script.log().finished, [FinishReason::StopText]);
}

#[tokio::test]
async fn a_stop_string_inside_a_token_is_the_end_of_the_text() {
    let stack = Stack::new();
    stack.script.push(drawn(
        &[u32::from(b'a'), WORLD, u32::from(b'b')],
        FinishReason::Length,
    ));
    let body = json!({"inputs": "Hi", "parameters": {"stop": ["wor"], "max_new_tokens": 3,
        "details": true}});
    let reply = stack.post("/generate", &body).await.json();
    assert_eq!(reply["details"]["finish_reason"], "stop_sequence");
    assert_eq!(reply["generated_text"], "a wor");
    let tokens = reply["details"]["tokens"].as_array().unwrap();
    assert_eq!(tokens.len(), 2, "{reply}");
    assert_eq!(tokens[1]["text"], " world");
}

#[tokio::test]
async fn the_last_permitted_token_reports_length_even_if_it_stops() {
    let stack = Stack::new();
    stack.script.push(drawn(&ids("a."), FinishReason::Length));
    let body = json!({"inputs": "Hi", "parameters": {"stop": ["."], "max_new_tokens": 2,
        "details": true}});
    let reply = stack.post("/generate", &body).await.json();
    assert_eq!(reply["details"]["finish_reason"], "length");
    assert_eq!(reply["generated_text"], "a.");
}

#[tokio::test]
async fn replies_carry_tgi_s_headers() {
    let stack = Stack::new();
    for _ in 0..3 {
        stack
            .script
            .push(drawn(&[97, END], FinishReason::EndOfText));
    }
    let reply = stack.post("/generate", &hi()).await;
    assert_eq!(reply.header("x-compute-type"), Some("1-cpu"));
    assert_eq!(reply.header("x-compute-characters"), Some("2"));
    assert_eq!(reply.header("x-prompt-tokens"), Some("2"));
    assert_eq!(reply.header("x-generated-tokens"), Some("2"));
    for name in [
        "x-compute-time",
        "x-total-time",
        "x-validation-time",
        "x-queue-time",
        "x-inference-time",
        "x-time-per-token",
    ] {
        let value = reply
            .header(name)
            .unwrap_or_else(|| panic!("{name} is missing"));
        assert!(value.parse::<f64>().is_ok(), "{name}: {value}");
    }
    let completion = stack
        .post("/v1/completions", &json!({"prompt": "Hi"}))
        .await;
    assert_eq!(completion.header("x-compute-time"), None);
    let stream = stack.post("/generate_stream", &hi()).await;
    assert_eq!(stream.header("content-type"), Some("text/event-stream"));
    assert_eq!(stream.header("cache-control"), Some("no-cache"));
    assert_eq!(stream.header("x-accel-buffering"), Some("no"));
    assert_eq!(stream.header("x-compute-characters"), Some("2"));
}

#[tokio::test]
async fn the_compute_type_may_be_named() {
    let stack = Stack::with(|serve| serve.http.compute_type = Some("8-h100".to_owned()));
    let tokens = drawn(&ids("abcd"), FinishReason::Length);
    stack.script.push(tokens);
    let reply = stack.post("/generate", &hi()).await;
    assert_eq!(reply.header("x-compute-type"), Some("8-h100"));
}

#[tokio::test]
async fn a_lost_group_is_424() {
    let stack = Stack::new();
    stack.script.push(drawn(&[97], FinishReason::GroupLost));
    let reply = stack.post("/generate", &hi()).await;
    assert_eq!(reply.status, StatusCode::FAILED_DEPENDENCY);
    let error = reply.json();
    assert_eq!(error["error_type"], "generation");
    assert!(
        error["error"]
            .as_str()
            .unwrap()
            .starts_with("Request failed during generation")
    );
}

#[tokio::test]
async fn a_sequence_that_just_stops_is_incomplete() {
    let stack = Stack::new();
    stack.script.push(vec![vec![token(97)], Vec::new()]);
    let reply = stack.post("/generate", &hi()).await;
    assert_eq!(reply.status, 500);
    assert_eq!(reply.json()["error_type"], "incomplete_generation");
}

#[tokio::test]
async fn the_api_key_guards_what_costs() {
    let stack = Stack::with(|serve| serve.http.api_key = Some("Secret".to_owned()));
    let with = |value: &str| {
        let mut request = post("/tokenize", json!({"inputs": "é"}).to_string());
        request
            .headers_mut()
            .insert(header::AUTHORIZATION, value.parse().unwrap());
        request
    };
    for value in [
        "Secret",
        "Bearer secret",
        "Bearer Secret2",
        "Bearer",
        "Bearer Secre",
    ] {
        let reply = stack.send(with(value)).await;
        assert_eq!((reply.status.as_u16(), reply.text()), (401, ""), "{value}");
    }
    assert_eq!(stack.post("/generate", &hi()).await.status, 401);
    assert_eq!(stack.send(with("Bearer Secret")).await.status, 200);
    assert_eq!(stack.get("/health").await.status, 200);
}

#[tokio::test]
async fn browsers_may_call_from_allowed_origins_only() {
    let stack = Stack::with(|serve| {
        serve.http.cors_allow_origin = vec!["https://a.example".to_owned()];
    });
    for (origin, allowed) in [("https://a.example", true), ("https://b.example", false)] {
        let preflight = Request::builder()
            .method(Method::OPTIONS)
            .uri("/generate")
            .header(header::ORIGIN, origin)
            .header(header::ACCESS_CONTROL_REQUEST_METHOD, "POST")
            .body(Body::empty())
            .unwrap();
        let reply = stack.send(preflight).await;
        assert_eq!(reply.status, 200);
        assert_eq!(
            reply.header("access-control-allow-origin"),
            allowed.then_some(origin)
        );
        let headers = reply.header("access-control-allow-headers");
        for header in ["authorization", "x-request-timeout", "traceparent"] {
            assert_eq!(headers.is_some_and(|all| all.contains(header)), allowed);
        }
    }
    let open = Stack::new();
    let request = Request::get("/info").header(header::ORIGIN, "https://c.example");
    let reply = open.send(request.body(Body::empty()).unwrap()).await;
    assert_eq!(reply.header("access-control-allow-origin"), Some("*"));
}

#[tokio::test]
async fn tokens_are_told_with_their_bytes() {
    let stack = Stack::new();
    let reply = stack
        .post("/tokenize", &json!({"inputs": "aé"}))
        .await
        .json();
    assert_eq!(
        reply[0],
        json!({"id": 97, "text": "a", "start": 0, "stop": 1})
    );
    assert_eq!(reply[1]["text"], "é");
    assert_eq!(reply[1]["stop"], 3);
    let chat = json!({"messages": [{"role": "user", "content": "a"}]});
    let reply = stack.post("/chat_tokenize", &chat).await.json();
    assert_eq!(
        reply["templated_text"],
        "<|im_start|>user:a<|im_end|><|im_start|>assistant:"
    );
    assert_eq!(reply["tokenize_response"][0]["id"], 257);
}

#[tokio::test]
async fn metrics_have_tgi_s_names_and_buckets() {
    let stack = Stack::new();
    stack
        .script
        .push(drawn(&[97, END], FinishReason::EndOfText));
    assert_eq!(stack.post("/generate", &hi()).await.status, 200);
    assert_eq!(stack.send(post("/generate", "{")).await.status, 400);
    let reply = stack.get("/metrics").await;
    for line in [
        "tgi_request_count 2",
        "tgi_request_success 1",
        "tgi_request_failure{err=\"validation\"} 1",
        "tgi_request_duration_count 1",
        "tgi_request_duration_bucket{le=\"0.00015000000000000001\"}",
        "tgi_request_duration_bucket{le=\"0.0003375\"}",
        "tgi_request_validation_duration_count 1",
        "tgi_request_queue_duration_count 1",
        "tgi_request_inference_duration_count 1",
        "tgi_request_mean_time_per_token_duration_count 1",
        "tgi_request_generated_tokens_sum 2",
        "tgi_request_input_length_sum 2",
        "tgi_request_max_new_tokens_sum 4",
        "tgi_request_skipped_tokens_bucket",
        "headrace_requests_rejected{reason=\"body\"} 1",
        "headrace_build_info{version=\"",
        "process_resident_memory_bytes ",
    ] {
        assert!(
            reply.text().lines().any(|found| found.starts_with(line)),
            "{line} in {}",
            reply.text()
        );
    }
    let buckets = reply.text().lines();
    let buckets = buckets.filter(|line| line.starts_with("tgi_request_duration_bucket"));
    assert_eq!(buckets.count(), 35 + 1, "and one without a bound");
    let mut own = reply.text().lines().filter(|line| line.starts_with("tgi_"));
    assert!(own.all(|line| !line.contains("_total ")), "no suffix");
}

#[tokio::test]
async fn a_silent_stream_says_that_it_lives() {
    let silent = futures_util::stream::pending::<axum::body::Bytes>();
    let mut body = crate::sse::KeepAlive::new(Box::pin(silent), Duration::from_millis(5));
    for _ in 0..2 {
        assert_eq!(body.next().await.unwrap().unwrap(), ":\n\n");
    }
}

#[tokio::test]
async fn every_route_is_in_the_document_and_the_other_way_round() {
    let stack = Stack::new();
    let document = stack.get("/api-doc/openapi.json").await.json();
    let paths = document["paths"].as_object().unwrap();
    let mut described = BTreeSet::new();
    for (path, item) in paths {
        for method in item.as_object().unwrap().keys() {
            described.insert(format!("{method} {path}"));
            let request = Request::builder()
                .method(method.to_uppercase().as_str())
                .uri(path.replace("{id}", "org/tiny").replace(['{', '}'], ""))
                .header(header::CONTENT_TYPE, "application/json");
            let status = stack
                .send(request.body(Body::from("{}")).unwrap())
                .await
                .status;
            assert!(
                status != 404 && status != 405,
                "{method} {path} is described: {status}"
            );
        }
    }
    let expected = [
        "get /",
        "get /health",
        "get /info",
        "get /livez",
        "get /metrics",
        "get /ping",
        "get /readyz",
        "get /status",
        "get /v1/models",
        "get /v1/models/{id}",
        "get /v2",
        "get /v2/health/live",
        "get /v2/health/ready",
        "get /v2/models/{name}/versions/{version}",
        "get /v2/models/{name}/versions/{version}/ready",
        "post /",
        "post /chat_tokenize",
        "post /generate",
        "post /generate_stream",
        "post /invocations",
        "post /tokenize",
        "post /v1/chat/completions",
        "post /v1/completions",
        "post /v2/models/{name}/versions/{version}/infer",
        "post /vertex",
    ];
    assert_eq!(described, expected.map(str::to_owned).into());
    let refusals = &document["paths"]["/generate"]["post"]["responses"];
    for status in ["200", "400", "413", "422", "424", "429", "503"] {
        assert!(refusals.get(status).is_some(), "{status}");
    }
    let text = document.to_string();
    for reference in text.split("\"#/components/schemas/").skip(1) {
        let name = reference.split('"').next().unwrap();
        assert!(
            document["components"]["schemas"].get(name).is_some(),
            "{name} is described"
        );
    }
}

#[tokio::test]
async fn the_page_about_the_api_needs_nobody_else() {
    let stack = Stack::new();
    let reply = stack.get("/docs").await;
    assert_eq!(reply.status, 308);
    assert_eq!(reply.header("location"), Some("docs/"));
    let page = stack.get("/docs/").await;
    assert_eq!(page.header("content-type"), Some("text/html"));
    let links = page.text().split("=\"").skip(1);
    let links = links.filter_map(|rest| rest.split('"').next());
    let parts: Vec<&str> = links
        .filter(|link| {
            let ends = [".js", ".css", ".png"];
            ends.iter().any(|end| link.ends_with(end))
        })
        .collect();
    assert!(parts.len() > 3, "{}", page.text());
    for part in parts {
        assert!(part.starts_with("./") || !part.contains("//"), "{part}");
        let path = format!("/docs/{}", part.trim_start_matches("./"));
        assert_eq!(stack.get(&path).await.status, 200, "{path}");
    }
    let start = stack.get("/docs/swagger-initializer.js").await;
    assert!(
        start.text().contains("../api-doc/openapi.json"),
        "{}",
        start.text()
    );
    assert_eq!(stack.get("/docs/nothing.js").await.status, 404);
}

#[tokio::test]
async fn the_table_of_compatibility_lists_tgi_s_routes_as_they_are() {
    const TABLE: &str = include_str!("../../../docs/tgi-compatibility.md");
    let stack = Stack::with(|serve| serve.http.api_key = Some("secret".to_owned()));
    let document = stack.get("/api-doc/openapi.json").await.json();
    let (_, table) = TABLE.split_once("## Routes\n").unwrap();
    let table = table.split("\n## ").next().unwrap();
    let rows = table.lines().filter(|line| line.starts_with("| `"));
    let mut listed = 0;
    for row in rows {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let (route, access, status) = (cells[1].trim_matches('`'), cells[2], cells[3]);
        listed += 1;
        let Some((method, path)) = route.split_once(' ') else {
            assert!(route.starts_with("$AIP_"), "{route}");
            continue;
        };
        let described = document["paths"][path].get(method.to_lowercase()).is_some();
        assert!(described || path == "/docs", "{route}");
        assert!(status != "not yet", "{route}");
        let request = Request::builder()
            .method(method)
            .uri(path.replace(['{', '}'], ""))
            .header(header::CONTENT_TYPE, "application/json")
            .body(Body::from("{}"));
        let guarded = stack.send(request.unwrap()).await.status == 401;
        assert_eq!(guarded, access == "key", "{route}");
    }
    assert_eq!(listed, 24);
}

#[test]
fn limits_beyond_what_can_be_served_are_told_with_both_numbers() {
    let mut serve = serve();
    serve.requests.max_input_tokens = Some(4096);
    serve.requests.max_total_tokens = Some(9000);
    let EngineState::Ready(facts) = ready() else {
        unreachable!("it is ready")
    };
    let cut = Ready::new(&serve, Arc::clone(&facts), Arc::new(text()));
    let expected = [
        "--max-total-tokens 9000 is more than the model's context and the KV cache hold: 4096 are served",
        "--max-input-tokens 4096 is more than the model's context and the KV cache hold: 4095 are served",
    ];
    assert_eq!(cut.shortfalls(&serve), expected);
    serve.requests.max_input_tokens = None;
    serve.requests.max_total_tokens = Some(4096);
    let whole = Ready::new(&serve, facts, Arc::new(text()));
    assert!(whole.shortfalls(&serve).is_empty());
}

#[test]
fn the_tokenizer_s_own_limit_counts_where_no_flag_does() {
    let EngineState::Ready(facts) = ready() else {
        unreachable!("it is ready")
    };
    // Tokenizer, input and total of the flags; input and total that are served.
    for (told, input, total, expected) in [
        (None, None, None, (4095, 4096)),
        (Some(2048), None, None, (2047, 2048)),
        (Some(2048), Some(100), None, (100, 2048)),
        (Some(2048), Some(3000), None, (3000, 3001)),
        (Some(2048), None, Some(3000), (2999, 3000)),
        (Some(u32::MAX), None, None, (4095, 4096)),
        (Some(2048), Some(u32::MAX), None, (4095, 4096)),
    ] {
        let mut serve = serve();
        (
            serve.requests.max_input_tokens,
            serve.requests.max_total_tokens,
        ) = (input, total);
        let mut text = text();
        text.tokens_max = told;
        let ready = Ready::new(&serve, Arc::clone(&facts), Arc::new(text));
        assert_eq!((ready.input_max, ready.total_max), expected);
        let is_said = ready.shortfalls(&serve).contains(
            &"model_max_length of the tokenizer is 2048: 2048 tokens of a prompt and \
                its answer are served; --max-total-tokens allows up to 4096"
                .to_owned(),
        );
        assert_eq!(is_said, expected.1 == 2048);
    }
}
