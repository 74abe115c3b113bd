//! Waterfalls inside answers, without a collector.

use axum::body::Body;
use axum::http::{Request, StatusCode, header};
use headrace_engine::FinishReason;
use serde_json::{Value, json};

use super::{Reply, Stack, drawn, ids};

async fn asked(stack: &Stack, path: &str, body: &Value) -> Reply {
    let request = Request::post(path)
        .header(header::CONTENT_TYPE, "application/json")
        .header("x-trace", "inline")
        .header(
            "traceparent",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        )
        .body(Body::from(body.to_string()))
        .unwrap();
    stack.send(request).await
}

fn names(trace: &Value) -> Vec<&str> {
    let spans = trace["spans"].as_array().unwrap();
    spans
        .iter()
        .map(|span| span["name"].as_str().unwrap())
        .collect()
}

#[tokio::test]
async fn a_body_has_its_waterfall_and_everything_else_as_it_was() {
    let stack = Stack::new();
    stack.script.push(drawn(&ids("ok"), FinishReason::Length));
    stack.script.push(drawn(&ids("ok"), FinishReason::Length));
    let body = json!({"inputs": "a", "parameters": {"max_new_tokens": 2}});
    let plain = stack.post("/generate", &body).await.json();
    let reply = asked(&stack, "/generate", &body).await;
    let mut told = reply.json();
    let trace = told.as_object_mut().unwrap().remove("trace").unwrap();
    assert_eq!(told, plain);
    assert_eq!(
        names(&trace)[..4],
        ["POST /generate", "generate", "validate", "tokenize"]
    );
    assert_eq!(trace["trace_id"], "0af7651916cd43dd8448eb211c80319c");
    assert_eq!(trace["spans"][0]["parent_span_id"], "b7ad6b7169203331");
    assert_eq!(reply.header("traceparent"), None, "nobody exports it");
}

#[tokio::test]
async fn a_refusal_has_its_waterfall_too() {
    let stack = Stack::new();
    let body = json!({"inputs": "a", "parameters": {"top_k": -1}});
    let reply = asked(&stack, "/generate", &body).await;
    assert_eq!(reply.status, StatusCode::UNPROCESSABLE_ENTITY);
    let told = reply.json();
    assert_eq!(told["error_type"], "validation");
    let server = &told["trace"]["spans"][0];
    assert_eq!(server["attributes"]["error.type"], "validation");
}

#[tokio::test]
async fn a_stream_of_several_answers_has_it_in_the_last_event_of_the_last() {
    let stack = Stack::new();
    stack
        .script
        .otherwise(drawn(&ids("ok"), FinishReason::Length));
    let body = json!({"prompt": ["a", "b"], "max_tokens": 2, "stream": true});
    let reply = asked(&stack, "/v1/completions", &body).await;
    let events: Vec<Value> = reply
        .text()
        .lines()
        .filter_map(|line| serde_json::from_str(line.strip_prefix("data: ")?).ok())
        .collect();
    let (last, others) = events.split_last().unwrap();
    assert!(others.iter().all(|event| event.get("trace").is_none()));
    let found = names(&last["trace"]);
    assert_eq!(found.iter().filter(|name| **name == "queued").count(), 2);
    assert!(reply.text().ends_with("data: [DONE]\n\n"));
}
